"""The machine's memory: huge pages, the size of the caches, the speed of a plain read."""

import contextlib
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_HUGE = 2 << 20


def zeros(size: int) -> Tensor:
    """``size`` bytes of zeros, uint8, aligned to 64 at least; in huge pages where the system has them and ``size`` is worth one.

    Measured on two Zen 4 cores of a virtual machine by ``torch.sum``: with one thread 17 GB/s in small pages and 32 in huge ones, with two
    threads 25 and 34 (the row "plain read, huge pages" of ``benchmarks/sparse_linear.py``).
    """
    if size < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    region = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)  # keeps the region
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size]


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)


def cold_bytes() -> int:
    """What arrays that are read in turn must come to, so that each is out of every cache when its turn comes again."""
    return max(160 << 20, 3 * last_level_cache() // 2)


def read_calls(size: int) -> list[Callable[[], object]]:
    """Ways to read ``size`` bytes of memory and do next to nothing else; the fastest one shows what PyTorch streams here."""
    block = zeros(size).fill_(1).view(torch.float32)
    return [block.sum, block.amax]


def seconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
