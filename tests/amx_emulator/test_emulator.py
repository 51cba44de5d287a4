"""The emulator of AMX against the manual: encodings, rules, moves, arithmetic. Nothing here needs AMX, or torch."""

import platform
import re
import shutil
import signal
import subprocess

import pytest

from amx_emulator.emulator import Emulator, build
from support import TESTS, run_python, succeeded

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is a part of x86-64"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
]

# As the GNU assembler 2.40 writes them: bytes, op, and the fields that are not the default.
ENCODINGS = [
    ("c4e2784906", "ldtilecfg", {"base": "rsi"}),
    ("c4e27849442440", "ldtilecfg", {"base": "rsp", "at": 0x40}),
    ("c4e278490501020304", "ldtilecfg", {"base": "rip", "at": 0x04030201}),
    ("c4e27849042580000000", "ldtilecfg", {"base": None, "at": 0x80}),
    ("c4e278490418", "ldtilecfg", {"base": "rax", "index": "rbx"}),
    ("c4c2784900", "ldtilecfg", {"base": "r8"}),
    ("c4c2784980f0ffffff", "ldtilecfg", {"base": "r8", "at": -16}),
    ("c4e2794907", "sttilecfg", {"base": "rdi"}),
    ("c4c2794945f0", "sttilecfg", {"base": "r13", "at": -16}),
    ("c4e27849c0", "tilerelease", {}),
    ("c4e27b49c0", "tilezero", {"d": 0}),
    ("c4e27b49f8", "tilezero", {"d": 7}),
    ("c4e27b4b0c18", "tileloadd", {"d": 1, "base": "rax", "index": "rbx"}),
    ("c4827b4b74c840", "tileloadd", {"d": 6, "base": "r8", "index": "r9", "scale": 8, "at": 0x40}),
    ("c4a27b4b542500", "tileloadd", {"d": 2, "base": "rbp", "index": "r12"}),
    ("c4e27b4b1420", "tileloadd", {"d": 2, "base": "rax"}),
    ("c4e27b4b1c3d00010000", "tileloadd", {"d": 3, "index": "rdi", "at": 0x100}),
    ("c4e2794b0c18", "tileloaddt1", {"d": 1, "base": "rax", "index": "rbx"}),
    ("c4e27a4b1418", "tilestored", {"d": 2, "base": "rax", "index": "rbx"}),
    ("c4827a4b94b500040000", "tilestored", {"d": 2, "base": "r13", "index": "r14", "scale": 4, "at": 0x400}),
    ("c4e2625cca", "tdpbf16ps", {"d": 1, "a": 2, "b": 3}),
    ("c4e2425cee", "tdpbf16ps", {"d": 5, "a": 6, "b": 7}),
    ("c4e2635cca", "tdpfp16ps", {"d": 1, "a": 2, "b": 3}),
    ("c4e2635eca", "tdpbssd", {"d": 1, "a": 2, "b": 3}),
    ("c4e2625eca", "tdpbsud", {"d": 1, "a": 2, "b": 3}),
    ("c4e2615eca", "tdpbusd", {"d": 1, "a": 2, "b": 3}),
    ("c4e2605eca", "tdpbuud", {"d": 1, "a": 2, "b": 3}),
]
OTHERS = {
    "0f0b": "ud2",
    "c5f877": "vzeroupper, two-byte VEX",
    "c4e2784bc0": "4B with pp 0",
    "c4e27b4bc0": "a load from a register",
    "c4e27b4b08": "a load without SIB",
    "c4e1784906": "another opcode map",
    "c4e2f84906": "W = 1",
    "c4e27c4906": "L = 1",
    "c462784906": "R = 1",
    "c4e270490a": "a third operand where there is none",
    "c4e278490e": "ldtilecfg with another /digit",
    "c4e27849c1": "tilerelease with another ModRM",
    "c4e27b49c1": "tilezero with another ModRM",
    "c4c27b49c0": "tilezero of a tile above 7",
    "c4e2605cca": "5C with pp 0",
    "c4e2615cca": "5C with pp 1",
    "c4e2625c0a": "a product with memory",
    "c4e2225cca": "a product with a tile above 7",
    "c4c2625cca": "the same by B",
    "62f27c4849c0": "EVEX",
}


@pytest.fixture(scope="module")
def emulator():
    """Built and loaded, but not installed."""
    return Emulator()


@pytest.mark.parametrize(("code", "op", "fields"), ENCODINGS, ids=[code for code, _, _ in ENCODINGS])
def test_encoding(emulator, code, op, fields):
    default = {"d": 0, "a": 0, "b": 0, "base": None, "index": None, "scale": 1, "at": 0}
    assert emulator.decode(bytes.fromhex(code)) == default | fields | {"op": op, "length": len(code) // 2}


@pytest.mark.parametrize("code", OTHERS, ids=OTHERS.values())
def test_other_instructions(emulator, code):
    assert emulator.decode(bytes.fromhex(code)) is None


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_encodings_of_the_disassembler(tmp_path):
    """The table says what objdump says."""
    (tmp_path / "code").write_bytes(b"".join(bytes.fromhex(code) for code, _, _ in ENCODINGS))
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", str(tmp_path / "code")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+[0-9a-f]+:\s+(\S+)", text, re.MULTILINE)
    if "(bad)" in found:
        pytest.skip("this objdump does not know all of AMX")
    assert found == [op for _, op, _ in ENCODINGS]


PROGRAMS = re.findall(r"^def (test_\w+)", (TESTS / "amx_emulator/programs.py").read_text(), re.MULTILINE)


def run(program: str):
    build()  # here, so that its time and its errors are not those of a subprocess
    return run_python(f"from amx_emulator import programs; programs.{program}()")


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    """One function of programs.py in a process of its own."""
    succeeded(run(name))


def test_other_instructions_reach_the_handler_before():
    """SIGILL by another instruction goes to the handler that was there, or ends the process if there was none."""
    assert run("previous_handler").returncode == 7
    assert run("illegal_instruction").returncode == -signal.SIGILL
