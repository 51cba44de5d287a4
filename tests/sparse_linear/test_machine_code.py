"""What the compiler makes of the AVX-512 and AMX loops: two things it once did behind our back must not come back."""

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
REGISTER = re.compile(r"[xyz](mm\d+)(?:\{k\d\})?(\{z\})?,?")  # writing xmm or ymm writes all of zmm


@pytest.fixture(scope="module", params=["avx512", "avx512_vnni", "avx512_bf16", "amx"])
def functions(request, tmp_path_factory):
    """Name to instructions, as (mnemonic, operands); compiling needs no machine that could run them."""
    source, target = jit.SOURCES / "sparse_linear" / f"{request.param}.cpp", tmp_path_factory.mktemp("objects") / "kernel.o"
    flags = ["-std=c++20", "-fPIC", *jit._FLAGS, f"-I{jit.SOURCES}"]
    subprocess.run([*shlex.split(env.compiler()), *flags, "-c", str(source), "-o", str(target)], check=True)
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--disassembler-options=intel", str(target)]
    found = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.endswith(">:"):
            found[line.split("<", 1)[1][:-2]] = instructions = []
        elif match := re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line):
            instructions.append(match.groups())
    return found


def test_streams_prefetch(functions):
    """gcc 12 drops _mm_prefetch where a pragma sets the target; without it streams took 1.6 times as long on Emerald Rapids."""
    names = ("::stream<", "run_stream<", "stream_units<", "::next(")
    streams = [code for name, code in functions.items() if any(word in name for word in names) and len(code) > 50]
    assert streams, f"no stream among {sorted(functions)}"
    assert all(any(mnemonic == "prefetcht0" for mnemonic, _ in code) for code in streams)


def test_int4_products_do_not_divide(functions):
    """The sum of a group's activations is their offset by -128, an exact multiplication; a division would cost more than the products."""
    products = [code for name, code in functions.items() if "Int4" in name and "prepare" not in name]
    if not products:
        pytest.skip("this file has no int4 kernel")
    assert any(mnemonic.startswith(("vpdpbusd", "vpmaddubsw", "tdpbsud")) for code in products for mnemonic, _ in code)
    assert not [mnemonic for code in products for mnemonic, _ in code if "div" in mnemonic and mnemonic.startswith("v")]


def test_expands_do_not_wait_for_each_other(functions):
    """On Zen 4 and 5 an expand waits for its destination, so each one's must be written by something else just before."""
    count = 0
    for name, code in functions.items():
        writer: dict[str, str] = {}
        for mnemonic, operands in code:
            match = REGISTER.match(operands)
            if match is None:
                continue
            register, zeroed = match.groups()
            if mnemonic.startswith("vpexpand"):
                count += 1
                assert not zeroed, f"{name}: {mnemonic} {operands} waits for the last use of {register}"
                assert not writer.get(register, "").startswith("vpexpand"), f"{name}: {mnemonic} {operands} follows another into {register}"
            writer[register] = mnemonic
    assert count, "no expand was found"
