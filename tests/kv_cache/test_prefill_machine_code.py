"""What the compiler makes of the loops that take most of a prompt's time."""

import platform
import re
import shlex
import shutil
import subprocess

import pytest

from torch_cpu_ext.core import env, jit

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
]


def loops(code: list[tuple[int, str, str]]):
    """Instructions between a jump back and where it goes, where no other jump back is among them."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    ends = []
    for i, (_, mnemonic, operands) in enumerate(code):
        match = re.match(r"([0-9a-f]+) ", operands) if mnemonic.startswith("j") else None
        if match and (start := places.get(int(match[1], 16), i)) < i:
            ends.append((start, i))
    return [code[a : b + 1] for a, b in ends if not any(a <= c and d < b for c, d in ends)]


@pytest.mark.parametrize(("isa", "product"), [("avx512", "vfmadd"), ("avx512_bf16", "vdpbf16ps")])
def test_sums_stay_in_registers(isa, product, tmp_path):
    """Sixteen products of a row of keys or values with four queries, eight loads at most, and nothing on the stack."""
    flags = ["-std=c++20", "-fPIC", *jit._FLAGS, f"-I{jit.SOURCES}"]
    source, target = jit.SOURCES / "kv_cache" / f"{isa}.cpp", tmp_path / "kernel.o"
    subprocess.run([*shlex.split(env.compiler()), *flags, "-c", str(source), "-o", str(target)], check=True)
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--disassembler-options=intel", str(target)]
    functions: dict[str, list[tuple[int, str, str]]] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.endswith(">:"):
            functions[line.split("<", 1)[1][:-2]] = instructions = []
        elif match := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            instructions.append((int(match[1], 16), match[2], match[3]))
    names = "multiply_keys", "attend_tile"
    for name in names:
        full = [
            loop
            for function, code in functions.items()
            if f"::{name}<" in function
            for loop in loops(code)
            if sum(m.startswith(product) for _, m, _ in loop) == 16
        ]
        assert full, f"no loop of sixteen products in {name}, of {sorted(functions)}"
        for loop in full:
            memory = [operands for _, _, operands in loop if "PTR" in operands]
            assert len(memory) <= 8, loop
            assert not any("rsp" in operands or "rbp" in operands for operands in memory), loop
