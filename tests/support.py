"""Helpers of the tests: Python subprocesses, tensors in awkward places, comparison with a bound."""

import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def run_python(code: str, *args: str, timeout: float = 300, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter; ``env`` adds variables, or removes those that are None. Does not check the exit status."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=TESTS,
    )


def environment(**env: str | None) -> dict[str, str]:
    """This process's environment without the package's variables, changed by ``env``."""
    values = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_CPU_EXT_")}
    values |= {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])}
    for name, value in env.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    return values


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a subprocess printed; fails if it did not end well (a negative status is a signal: a crash)."""
    assert done.returncode == 0, f"exit status {done.returncode}\n--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-8000:]}"
    return done.stdout


def forget_peak() -> int:
    """Bytes of memory that this process has now; what it had at most until now no longer counts for `peak_bytes`. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most bytes of memory that this process had since `forget_peak`, mapped files included."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def at_odd_address(tensor: Tensor) -> Tensor:
    """A contiguous copy whose first byte lies at an odd address."""
    if tensor.numel() == 0:
        return tensor.clone()
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    buffer = bytearray(raw.numel() + 64)
    start = (ctypes.addressof((ctypes.c_char * 1).from_buffer(buffer)) + 1) % 2
    copy = torch.frombuffer(buffer, dtype=torch.uint8)[start : start + raw.numel()]
    copy.copy_(raw)
    result = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    assert result.data_ptr() % 2 == 1
    return result


class Fence:
    """Memory between two pages that must not be touched; a read or write one byte past either end kills the process."""

    def __init__(self, bytes: int) -> None:
        page = mmap.PAGESIZE
        self.size = -(-max(bytes, 1) // page) * page
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        base = libc.mmap(None, self.size + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        self.begin = base + page
        assert libc.mprotect(self.begin, self.size, mmap.PROT_READ | mmap.PROT_WRITE) == 0

    def place(self, tensor: Tensor, at_end: bool = True) -> Tensor:
        """A copy of ``tensor`` that ends with the last byte before the upper page, or begins with the first after the lower."""
        size = tensor.numel() * tensor.element_size()
        assert size <= self.size
        if size == 0:
            return tensor.clone()
        address = self.begin + self.size - size if at_end else self.begin
        result = torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=tensor.dtype).view(tensor.shape)
        return result.copy_(tensor)


def difference(actual: Tensor, expected: Tensor, bound: Tensor | float) -> str | None:
    """What is wrong with a result, or None. NaN and infinities must stand where they are expected."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return None
    if not expected.is_floating_point():
        wrong = actual != expected
    else:
        a, e = actual.double(), expected.double()
        close = (a - e).abs() <= bound
        wrong = ~torch.where(e.isfinite(), close, (a == e) | (a.isnan() & e.isnan()))
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    limit = bound[at].item() if isinstance(bound, Tensor) and bound.dim() else bound
    count = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
    return f"{count}, first {at}: {actual[at].item()}, expected {expected[at].item()} within {limit}"
