"""`kernel_info`: which kernel runs, with which instruction set, and how near to the speed of memory it comes."""

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ..core import jit
from ..core.memory import cold_bytes, read_calls, seconds
from .modules import SparseLinear, packed_layers

_REPEATS, _SECONDS = 9, 2.0  # as many turns as fit into that time, three at least


@dataclasses.dataclass(frozen=True)
class KernelInfo:
    """What `kernel_info` found; prints as one line. Where layers differ, a text names all there are.

    Args:
        kernel: technique and kernel, e.g. ``"sparse_linear int8"``.
        isa: the instruction set it runs with now, e.g. ``"avx512_vnni"``, or ``"reference"`` where PyTorch runs in its place; with
            ``"amx"`` fewer than five rows of input, as the one measured here, run with the best one below it.
        dtype: how weights are stored.
        layout: ``"dense"`` or ``"sparse"``.
        layers: number of packed layers that were measured.
        bytes: of their packed weights.
        cold: whether so many copies took turns that no weight was in a cache; if not, the speed is that of caches in part.
        gb_per_s: bytes of packed weights read in a second, with one row of input, in 10^9 bytes.
        read_gb_per_s: what a plain read of memory reaches on this machine with the same threads.
        threads: of PyTorch.
    """

    kernel: str
    isa: str
    dtype: str
    layout: str
    layers: int
    bytes: int
    cold: bool
    gb_per_s: float
    read_gb_per_s: float
    threads: int

    @property
    def share(self) -> float:
        """``gb_per_s`` as a share of ``read_gb_per_s``."""
        return self.gb_per_s / self.read_gb_per_s

    @property
    def amx(self) -> bool:
        """Whether AMX is used."""
        return "amx" in self.isa

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "share": self.share, "amx": self.amx}

    def __str__(self) -> str:
        return (
            f"{self.kernel} ({self.layout}): {self.isa}, AMX {'used' if self.amx else 'not used'}; {self.layers} layers, "
            f"{self.bytes / 1e6:.1f} MB at {self.gb_per_s:.1f} GB/s, {self.share:.2f} of a plain read ({self.read_gb_per_s:.1f} GB/s)"
            + ("" if self.cold else ", partly out of the caches")
        )


def kernel_info(model: nn.Module, limit_bytes: int = 1 << 30) -> KernelInfo:
    """Measures the packed layers of a model with one row of input, as a language model has it that generates text.

    Layers and copies of them take turns, so that weights come from memory and not from a cache; the fastest turn counts. Takes a second
    or two. For numbers to publish there is ``benchmarks/sparse_linear.py``.

    Args:
        model: a `SparseLinear`, or any module that holds some.
        limit_bytes: the copies take no more memory than this, and the memory that is read for comparison neither.
    Returns:
        One `KernelInfo` for all of them. Is AMX used? ``kernel_info(model).amx``.
    Raises:
        ValueError: there is no packed layer, or one has no weights yet.
    """
    layers = packed_layers(model, "kernel_info")
    size = sum(layer.packed.numel() for layer in layers)
    target = min(cold_bytes(), limit_bytes)
    extra = [_copy(layer) for _ in range(math.ceil(target / size) - 1) for layer in layers]
    SparseLinear.settle(nn.ModuleList(extra))  # in memory of the kind that layers of a model have
    copies = [*layers, *extra]
    inputs = [torch.randn(1, layer.in_features).to(layer.weight_dtype) for layer in layers]

    def run() -> None:
        for i, layer in enumerate(copies):
            layer.forward(inputs[i % len(inputs)])

    total = size * (len(copies) // len(layers))
    reads = read_calls(target)
    times: list[tuple[float, ...]] = []
    with torch.inference_mode():
        run()
        while len(times) < _REPEATS and (len(times) < 3 or sum(map(sum, times)) < _SECONDS):
            times.append((seconds(run), *map(seconds, reads)))
    ours, *peers = map(min, zip(*times, strict=True))  # what else the machine does makes all of them slower, never faster
    return KernelInfo(
        kernel=_all(f"{layer.technique} {layer.dtype}" for layer in layers),
        isa=_all(jit.kernel_isa(layer.technique, layer.dtype) for layer in layers),
        dtype=_all(layer.dtype for layer in layers),
        layout=_all(layer.layout for layer in layers),
        layers=len(layers),
        bytes=size,
        cold=total >= cold_bytes(),
        gb_per_s=total / ours / 1e9,
        read_gb_per_s=target / min(peers) / 1e9,
        threads=torch.get_num_threads(),
    )


def _copy(layer: SparseLinear) -> SparseLinear:
    """The same layer with buffers of its own, whose packed weight can be moved."""
    result = copy.copy(layer)
    result._buffers = dict(layer._buffers)
    return result


def _all(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))
