"""`tune`: up to how many rows of input the kernel for few rows is the faster one, measured for each shape on this machine."""

import statistics
from functools import partial

import torch
from torch import nn

from ..core import measured
from ..core.memory import seconds
from ..core.progress import bar
from .modules import SparseLinear, packed_layers

ROWS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)  # what is tried
_REPEATS = 9
_FILE = "tune"


def tune(model: nn.Module, again: bool = False) -> dict[str, int]:
    """Measures for the packed layers of a model up to how many rows the kernel for few rows pays, and has them use that number.

    Few rows stream through the weights with all sums in registers; with more, pieces of the weight are expanded and serve all rows (in
    tiles, with AMX). Which is faster from where on depends on the processor, the threads and the shape. Takes about a second for each
    shape, once: results are kept in the cache folder, for this processor, instruction set, number of threads and version. Without a call
    of `tune`, built-in numbers count. The two kernels add up in another order, so a tuned layer may differ in the last bits of its result.

    Args:
        model: a `SparseLinear`, or any module that holds some; their attribute ``stream_rows`` is set. 0 there undoes it.
        again: whether to measure what was measured before.
    Returns:
        The number for each shape, under names such as ``"int8 sparse 8192x2048 bfloat16"``; 1 means that one row is all that streams.
    Raises:
        ValueError: there is no packed layer, or one has no weights yet.
    """
    layers = packed_layers(model, "tune")
    shapes: dict[str, list[SparseLinear]] = {}
    for layer in layers:
        kind = str(layer.weight_dtype).removeprefix("torch.")
        shapes.setdefault(f"{layer.dtype} {layer.layout} {layer.out_features}x{layer.in_features} {kind}", []).append(layer)
    place = measured.conditions(SparseLinear.technique)
    known = {} if again else measured.load(_FILE)
    result = {shape: known.get(f"{place} | {shape}", 0) for shape in shapes}
    missing = [shape for shape, rows in result.items() if rows < 1]
    for shape in bar(missing, "sparse_linear: tuning", "shape"):
        result[shape] = _measure(shapes[shape])
    if missing:
        measured.save(_FILE, {f"{place} | {shape}": result[shape] for shape in missing})
    for shape, alike in shapes.items():
        for layer in alike:
            layer.stream_rows = result[shape]
    return result


@torch.inference_mode()
def _measure(layers: list[SparseLinear]) -> int:
    """The largest of `ROWS` up to which the kernel for few rows wins; layers of one shape take turns, as in the model they are of."""
    best = 1
    for rows in ROWS:
        x = torch.randn(rows, layers[0].in_features).to(layers[0].weight_dtype)
        times: list[tuple[float, float]] = []
        for turn in range(_REPEATS + 1):
            one, other = layers[2 * turn % len(layers)], layers[(2 * turn + 1) % len(layers)]  # neither finds its weight in a cache
            times.append((seconds(partial(_product, one, x, ROWS[-1])), seconds(partial(_product, other, x, 1))))
        few, many = (statistics.median(side) for side in zip(*times[1:], strict=True))
        if few >= many:
            return best
        best = rows
    return best


def _product(layer: SparseLinear, x: torch.Tensor, stream_rows: int) -> torch.Tensor:
    return torch.ops.torch_cpu_ext.sparse_linear(
        x, layer.packed, layer.bias, layer.out_features, activation_group=layer.activation_group, stream_rows=stream_rows
    )
