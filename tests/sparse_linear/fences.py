"""Runs the ops on arguments that end (or begin) at a page that must not be touched. test_linear.py starts it as a process of its own."""

import itertools

import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported
from torch_cpu_ext.sparse_linear import check, linear, pack, unpack

from cases import DTYPES, FLOATS, GRIDS, LAYOUTS, given_grid, random_weight
from support import Fence

assert tce.load("sparse_linear")
fences = [Fence(1 << 18) for _ in range(3)]
generator = torch.Generator().manual_seed(0)
count = 0
sizes = (1, 15, 16, 17, 31, 33, 63, 64, 65, 129, 257)
kinds, batches, grids = (itertools.cycle(values) for values in (FLOATS.values(), (1, 2, 3, 4, 5, 8, 11, 17), GRIDS))
for dtype, layout, outputs, inputs in itertools.product(DTYPES, LAYOUTS, (1, 15, 16, 17, 33), sizes):
    for sparsity in (0.0, 0.5, 1.0):
        weight = random_weight(outputs, inputs, sparsity, generator)
        grid = next(grids) if dtype == "int4" else {}
        plain = pack(weight, dtype=dtype, layout=layout, **grid)
        kind = next(kinds)
        x, bias = (
            torch.randn(next(batches), inputs, generator=generator).to(kind),
            torch.randn(outputs, generator=generator).to(next(kinds)),
        )
        for at_end in (True, False):
            packed = fences[0].place(plain, at_end)
            fenced_x, fenced_bias = fences[1].place(x, at_end), fences[2].place(bias, at_end)
            for name in supported():
                with tce.isa(name):
                    assert linear(fenced_x, packed, fenced_bias, outputs).equal(linear(x, plain, bias, outputs))
                    assert linear(fenced_x[:1], packed, fenced_bias, outputs).equal(linear(x[:1], plain, bias, outputs))
                    count += 2
            assert unpack(packed, outputs, inputs).equal(unpack(plain, outputs, inputs))
            assert check(packed).equal(check(plain))
        given = given_grid(weight, dtype, generator, **grid) if dtype in ("int8", "int4") else {}
        for scales in ({}, given):
            fenced = {name: fences[1 + (name == "scale")].place(t) if isinstance(t, torch.Tensor) else t for name, t in scales.items()}
            again = pack(fences[0].place(weight.to(kind)), dtype=dtype, layout=layout, **fenced)
            assert again.equal(pack(weight.to(kind), dtype=dtype, layout=layout, **scales))
print(f"{count} products between fences")
