"""sparse_linear against itself: streaming few rows against the kernels for many, and several products in one call against several calls.

Weights are beyond the caches, inputs in bf16. What `torch_cpu_ext.tune` measures for a shape is here in a table.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext.sparse_linear import gated, group, linear, pack

from common import Row, copies, interleave, main, rotate, row

SHAPES = ((1536, 576), (8192, 2048))  # inner and hidden size of SmolLM2-135M and of a Llama of 1B parameters
KEY_VALUE = {576: 192, 2048: 512}  # features of the key and of the value projection, by the hidden size
STREAMED = (2, 4, 6, 8, 16)
JOINED = (1, 16, 128)
KINDS = [(dtype, layout) for dtype in ("int4", "int8", "bf16") for layout in ("dense", "sparse")]


def weight(outputs: int, inputs: int, dtype: str, layout: str = "dense") -> Tensor:
    """A packed weight, half of it zeros where it is sparse."""
    dense = torch.randn(outputs, inputs) / math.sqrt(inputs)
    if layout == "sparse":
        dense *= torch.rand(outputs, inputs) < 0.5
    return pack(dense, dtype=dtype, layout=layout)


def streams(shapes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """The kernels for few rows, which `stream_rows` asks for, against those for many."""
    for (n, k), (dtype, layout) in itertools.product(shapes, KINDS):
        packed = copies(weight(n, k, dtype, layout))
        for m in STREAMED:
            x = torch.randn(m, k).bfloat16()
            few, many = (rotate(partial(linear, x, p, None, n, stream_rows=limit) for (p,) in packed) for limit in (m, 1))
            times = interleave({"few": few, "many": many}, 21)
            config = {"call": "stream", "layer": f"{n} x {k} {dtype} {layout}", "m": m}
            yield row(f"{m} rows, {n}x{k} {dtype} {layout}, streamed", times["few"], "kernel for many rows", times["many"], config)


def each(x: Tensor, packed: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [linear(x, one, None, n) for one, n in zip(packed, sizes, strict=True)]


def gate_up(x: Tensor, packed: Sequence[Tensor], inner: int) -> Tensor:
    gate, up = each(x, packed, (inner, inner))
    return F.silu(gate) * up


def joined(shapes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """`group` and `gated` against the calls that they stand for."""
    for (inner, hidden), dtype in itertools.product(shapes, ("int8", "int4", "bf16")):
        sizes = [hidden, KEY_VALUE[hidden], KEY_VALUE[hidden]]
        triples, pairs = (copies(*(weight(n, hidden, dtype) for n in of)) for of in (sizes, [inner, inner]))
        for m in JOINED:
            x = torch.randn(m, hidden).bfloat16()
            calls = {
                "query key value": (
                    rotate(partial(group, x, list(p), [], sizes) for p in triples),
                    rotate(partial(each, x, p, sizes) for p in triples),
                ),
                "gate up": (
                    rotate(partial(gated, x, *p, None, None, inner) for p in pairs),
                    rotate(partial(gate_up, x, p, inner) for p in pairs),
                ),
            }
            for name, (ours, theirs) in calls.items():
                times = interleave({"ours": ours, "peer": theirs}, 21)
                config = {"call": name, "layer": f"{inner} x {hidden} {dtype}", "m": m}
                yield row(f"{m} rows, {name} of {inner}x{hidden} {dtype}", times["ours"], "one call each", times["peer"], config)


def rows(quick: bool) -> Iterator[Row]:
    shapes = SHAPES[:1] if quick else SHAPES
    yield from joined(shapes)
    yield from streams(shapes)


if __name__ == "__main__":
    main(rows)
