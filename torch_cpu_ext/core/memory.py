"""What the machine's memory can do: the size of its caches, and the speed of a plain read."""

import time
from collections.abc import Callable
from pathlib import Path

import torch


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)


def cold_bytes() -> int:
    """What arrays that are read in turn must come to, so that each is out of every cache when its turn comes again."""
    return max(160 << 20, 3 * last_level_cache() // 2)


def read_calls(size: int) -> list[Callable[[], object]]:
    """Ways to read ``size`` bytes of memory and do next to nothing else; the fastest one shows what the machine can stream."""
    block = torch.ones(size // 4)
    return [block.sum, block.amax]


def seconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
