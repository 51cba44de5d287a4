"""Instruction sets: what this machine has, and the cap on what the kernels may use.

The names form a ladder; a machine that has one has all below it. Every kernel is gated by exactly the instructions it uses, so a level
here is the set of CPU features that the source file of that name may contain.
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from . import env

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")

_AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
_VNNI = ("avx512_vnni", "avx512_vbmi", "avx512_vbmi2", "avx512_vpopcntdq")
_NEEDS = {  # what each level adds to the one below, in the words of torch.cpu.get_capabilities()
    "scalar": (),
    "avx2": ("avx2", "fma3", "f16c", "bmi2"),
    "avx512": _AVX512,
    "avx512_vnni": _VNNI,
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_int8", "amx_bf16"),
}

_override: str | None = None


def emulated() -> bool:
    """Whether ``TORCH_CPU_EXT_TEST_AMX=emulate`` stands in for AMX: the tests' emulator catches its instructions, if it is installed.

    Raises:
        ValueError: the variable has another value.
    """
    asked = env.text("TEST_AMX")
    if asked not in ("", "emulate"):
        raise ValueError(f"TORCH_CPU_EXT_TEST_AMX must be emulate, got {asked!r}")
    return asked == "emulate"


def _tiles_permitted() -> bool:
    """Asks Linux for the use of AMX tiles, for all threads of this process and those of its children.

    A process that uses a tile without permission gets SIGILL. Permission is refused where the kernel or its settings do not support tiles.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # numbers of x86-64 Linux
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def supported() -> tuple[str, ...]:
    """The instruction sets this machine can run, worst to best."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("scalar",)
    capabilities = torch.cpu.get_capabilities()
    levels: list[str] = []
    for name in ISAS:
        present = all(capabilities.get(feature, False) for feature in _NEEDS[name])
        if name == "amx":
            present = emulated() or (present and _tiles_permitted())
        if not present:
            break
        levels.append(name)
    return tuple(levels)


def _checked(name: str, source: str) -> str:
    if name not in ISAS:
        raise ValueError(f"{source} must be one of {', '.join(ISAS)}, got {name!r}")
    if name not in supported():
        raise ValueError(f"{source} must be an instruction set of this machine ({', '.join(supported())}), got {name!r}")
    return name


def current() -> str:
    """The cap in force: the innermost ``with isa(...)``, else ``TORCH_CPU_EXT_ISA``, else the best this machine has.

    Raises:
        ValueError: ``TORCH_CPU_EXT_ISA`` names no instruction set, or one that this machine lacks.
    """
    if _override is not None:
        return _override
    asked = env.text("ISA")
    return _checked(asked, "TORCH_CPU_EXT_ISA") if asked else supported()[-1]


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Caps the instruction set of all kernels inside a ``with`` block; for tests, comparisons and bug reports.

    The cap holds for the whole process, not only for the calling thread.

    Args:
        name: ``"scalar"``, ``"avx2"``, ``"avx512"``, ``"avx512_vnni"``, ``"avx512_bf16"`` or ``"amx"``. A kernel without code for it runs
            the next best it has.
    Raises:
        ValueError: ``name`` is no instruction set, or this machine lacks it.
    """
    global _override
    from . import jit

    _checked(name, "isa")
    before, _override = _override, name
    try:
        jit.apply_isa()
        yield
    finally:
        _override = before
        jit.apply_isa()


def level(name: str) -> int:
    """The number of an instruction set, as ``enum class Isa`` of ``kernels/common/isa.h`` counts them."""
    return ISAS.index(name)


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Processor", "cpu model"):
                return value.strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
