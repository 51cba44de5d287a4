"""What all tests share: no silent fallbacks, and threads, instruction set and modes as they were before each test."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPU_EXT_STRICT", "1")  # a test that runs the reference unasked must fail
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin are slow on machines with other work
sys.path.append(str(Path(__file__).parent))  # so that tests can import cases.py and support.py under --import-mode=importlib

import pytest
import torch

from torch_cpu_ext.core import isa as isas


@pytest.fixture(autouse=True, scope="session")
def emulated_amx():
    """With TORCH_CPU_EXT_TEST_AMX=emulate, AMX instructions run in software. Here, since pytest's faulthandler must not come later."""
    if isas.emulated():
        from amx_emulator.emulator import Emulator

        Emulator().install()


@pytest.fixture(autouse=True)
def keep_state():
    """Seeds torch, and puts back what a test may change."""
    threads, dtype, override = torch.get_num_threads(), torch.get_default_dtype(), isas._override
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    assert isas._override == override, "a test left an instruction set behind"


@pytest.fixture(params=isas.ISAS)
def isa(request):
    """Each instruction set in turn, in force; skipped where the machine lacks it."""
    if request.param not in isas.supported():
        pytest.skip(f"this machine has no {request.param}")
    with isas.isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def library():
    """Path of the sparse_linear library, built or found in the user's cache."""
    from torch_cpu_ext.core import jit

    assert jit.load("sparse_linear")
    return jit.library("sparse_linear").path
