"""Builds the emulator, switches it on in this process, and runs single instructions. README.md says what it is for."""

import ctypes
import hashlib
import mmap
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OPS = (
    *("ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored"),
    *("tdpbf16ps", "tdpfp16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud"),
)
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def build() -> Path:
    """Path of the shared object; compiled once, kept in the temporary folder under a hash of its sources."""
    sources = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
    digest = hashlib.sha256(repr(FLAGS).encode() + b"".join(f.read_bytes() for f in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"torch_cpu_ext-amx_emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{digest}.so"
    if not target.exists():
        work = folder / f"{digest}-{os.getpid()}.so"
        subprocess.run(["g++", *FLAGS, str(FOLDER / "emulator.cpp"), "-o", str(work)], check=True)
        work.replace(target)
    return target


class Emulator:
    """The emulator of this process; one is enough."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build()))

    def install(self) -> "Emulator":
        """Takes over SIGILL, from faulthandler too if that is on already."""
        assert self.library.amx_emulator_install() == 0
        return self

    def uninstall(self) -> None:
        assert self.library.amx_emulator_uninstall() == 0

    def reset(self) -> None:
        """Sets all counts to zero; the tiles keep what they hold."""
        self.library.amx_emulator_reset()

    def threads(self) -> list[dict[str, int]]:
        """Executed instructions by name, for each thread that has executed any since the last reset."""
        return [counts for counts, _ in self._stats() if any(counts.values())]

    def counts(self) -> dict[str, int]:
        """The same over all threads."""
        return {op: sum(counts[op] for counts, _ in self._stats()) for op in OPS}

    def configured(self) -> int:
        """Threads whose tiles are configured now."""
        return sum(configured for _, configured in self._stats())

    def _stats(self) -> list[tuple[dict[str, int], bool]]:
        found = []
        for thread in range(self.library.amx_emulator_threads()):
            counts = (ctypes.c_uint64 * len(OPS))()
            configured = self.library.amx_emulator_stats(thread, counts)
            found.append((dict(zip(OPS, counts, strict=True)), bool(configured)))
        return found

    def decode(self, code: bytes) -> dict[str, int | str | None] | None:
        """What decode.h makes of some bytes; None if they are no instruction of AMX."""
        fields = (ctypes.c_int64 * 9)()
        if not self.library.amx_emulator_decode(code.ljust(16, b"\x90"), fields):
            return None
        op, length, d, a, b, base, index, shift, displacement = fields
        names = dict(enumerate((*REGISTERS, "rip"))) | {-1: None}
        tiles = {"d": d, "a": a, "b": b}
        return {
            "op": OPS[op],
            "length": length,
            **tiles,
            "base": names[base],
            "index": names[index],
            "scale": 1 << shift,
            "at": displacement,
        }


def execute(code: bytes, **registers: int) -> None:
    """Runs machine code with some general registers set (any but rsp)."""
    moves = b""
    for name, value in registers.items():
        number = REGISTERS.index(name)
        moves += bytes([0x48 | number >> 3, 0xB8 | number & 7]) + (value & (1 << 64) - 1).to_bytes(8, "little")
    saved = (3, 5, 12, 13, 14, 15)  # what a function must leave as it was
    push = b"".join(bytes([0x41, 0x50 | r & 7] if r > 7 else [0x50 | r]) for r in saved)
    pop = b"".join(bytes([0x41, 0x58 | r & 7] if r > 7 else [0x58 | r]) for r in reversed(saved))
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(push + moves + code + pop + b"\xc3")
        memory = (ctypes.c_char * 1).from_buffer(page)
        ctypes.CFUNCTYPE(None)(ctypes.addressof(memory))()
        del memory


# Encodings, for `execute`: memory operands are (%rdi) for configurations, (%rdi,%rsi) with the stride in rsi for tiles.

_PREFIX = {"tileloadd": 0x7B, "tileloaddt1": 0x79, "tilestored": 0x7A}
_PRODUCT = {
    **{"tdpbf16ps": (0x02, 0x5C), "tdpfp16ps": (0x03, 0x5C)},
    **{"tdpbssd": (0x03, 0x5E), "tdpbsud": (0x02, 0x5E), "tdpbusd": (0x01, 0x5E), "tdpbuud": (0x00, 0x5E)},
}
LDTILECFG, STTILECFG, TILERELEASE = (bytes.fromhex(code) for code in ("c4e2784907", "c4e2794907", "c4e27849c0"))


def tilezero(tile: int) -> bytes:
    return bytes([0xC4, 0xE2, 0x7B, 0x49, 0xC0 | tile << 3])


def move(op: str, tile: int) -> bytes:
    """tileloadd, tileloaddt1 or tilestored."""
    return bytes([0xC4, 0xE2, _PREFIX[op], 0x4B, tile << 3 | 4, 0x37])


def product(op: str, d: int, a: int, b: int) -> bytes:
    prefix, opcode = _PRODUCT[op]
    return bytes([0xC4, 0xE2, (~b & 15) << 3 | prefix, opcode, 0xC0 | d << 3 | a])


def config(tiles: dict[int, tuple[int, int]], palette: int = 1, start_row: int = 0) -> bytearray:
    """The 64 bytes of a configuration from (rows, bytes of a row) by tile."""
    data = bytearray(64)
    data[0], data[1] = palette, start_row
    for tile, (rows, width) in tiles.items():
        data[16 + 2 * tile : 18 + 2 * tile] = width.to_bytes(2, "little")
        data[48 + tile] = rows
    return data
