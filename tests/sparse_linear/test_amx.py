"""The AMX kernels on machines without AMX: the compiled code runs, its tile instructions are emulated (tests/amx_emulator).

Each test is a process of its own, because the emulator takes over a signal.
"""

import re
import shutil
import subprocess
import sys

import pytest

from torch_cpu_ext.core import isa

from amx_emulator.emulator import build
from support import ROOT, TESTS, environment

pytestmark = [
    pytest.mark.skipif("avx512_bf16" not in isa.supported(), reason="the AMX kernels also contain AVX-512 with VBMI2"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
]


def run(*command: str) -> str:
    build()
    env = environment(TORCH_CPU_EXT_TEST_AMX="emulate", TORCH_CPU_EXT_STRICT="1")
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("part", ["instructions", "fences", "damage", "names"])
def test_amx(part):
    run(str(TESTS / "sparse_linear/amx.py"), part)


@pytest.mark.parametrize("file", ["core/test_ops.py", "sparse_linear/test_linear.py"])
def test_generic_tests(file):
    """What runs with every instruction set of a machine runs with this one, too."""
    text = run("-m", "pytest", str(TESTS / file), "-k", "amx", "-q", "-p", "no:cacheprovider")
    passed = re.search(r"(\d+) passed", text)
    assert passed, text
    assert int(passed[1]) >= 9, text
    assert "this machine has no amx" not in text
