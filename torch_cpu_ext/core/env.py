"""The environment variables of the package: the only place that reads them, always at use, never at import."""

import os
from pathlib import Path

VARIABLES = {
    "TORCH_CPU_EXT_ISA": "highest instruction set for kernels: scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx (default: the best)",
    "TORCH_CPU_EXT_STRICT": "1: a library that cannot be built raises BuildError instead of falling back to the PyTorch reference",
    "TORCH_CPU_EXT_CACHE_DIR": "folder for libraries and measurements (default: $XDG_CACHE_HOME/torch_cpu_ext, or ~/.cache/torch_cpu_ext)",
    "TORCH_CPU_EXT_DISABLE_JIT": "1: build nothing and load nothing, run the PyTorch references without a warning",
    "TORCH_CPU_EXT_VERBOSE": "1: show the build log",
    "TORCH_CPU_EXT_CXX": "the C++ compiler (default: $CXX, or g++)",
    "TORCH_CPU_EXT_BUILD_ISAS": "all: build for every instruction set the compiler knows, not only this machine's (for wheels)",
    "TORCH_CPU_EXT_TEST_AMX": "for tests. emulate: act as if this machine had AMX; its instructions need tests/amx_emulator",
    "TORCH_CPU_EXT_PREBUILD": "1 while a wheel is built: put the compiled libraries into it",
}


def text(name: str) -> str:
    """The value of ``TORCH_CPU_EXT_<name>``, stripped; empty when unset."""
    return os.environ.get(f"TORCH_CPU_EXT_{name}", "").strip()


def flag(name: str) -> bool:
    """Whether ``TORCH_CPU_EXT_<name>`` is set to anything but ``0``."""
    return text(name) not in ("", "0")


def cache_dir() -> Path:
    """The folder of everything the package keeps between runs; it may not exist yet."""
    if chosen := text("CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_cpu_ext"


def compiler() -> str:
    """The C++ compiler command that builds use."""
    return text("CXX") or os.environ.get("CXX", "").strip() or "g++"
