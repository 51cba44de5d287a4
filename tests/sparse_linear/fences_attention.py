"""Attention on arguments that end (or begin) at a page that must not be touched. test_attention.py starts it as a process of its own."""

import contextlib
import itertools

import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported
from torch_cpu_ext.sparse_linear import compress_kv, expand_kv

from cases import attend_sample
from support import Fence

assert tce.load("sparse_linear")
NAMES = ("query", "k_pages", "v_pages", "k_tail", "v_tail", "spans")
fences = {name: Fence(1 << 19) for name in NAMES}
op = torch.ops.torch_cpu_ext.sparse_linear_attend
count = 0
for d, group, (pages, tail) in itertools.product((16, 48, 128), (1, 3, 5), ((1, 0), (3, 7), (0, 16))):
    for sparsity in ((0.3, 0.5), (0.0, 0.9), (0.5, 0.0)):
        args = attend_sample((2, 2, 2, d), group, pages, -(-tail // 16), sparsity, (0, pages, tail), torch.bfloat16, 8).args
        for at_end in (True, False):
            fenced = args | {name: fences[name].place(args[name], at_end) for name in NAMES}
            for name in supported():
                with tce.isa(name):
                    assert all(a.equal(b) for a, b in zip(op(**fenced), op(**args), strict=True))
                    count += 1
            for argument, value in itertools.product(("k_pages", "v_pages"), (0, 255, 0x77)):
                damaged = fenced | {argument: fences[argument].place(torch.full_like(args[argument], value), at_end)}
                for name in supported():
                    with tce.isa(name), contextlib.suppress(RuntimeError):
                        op(**damaged)
                fences[argument].place(args[argument], at_end)
            x = fences["query"].place(torch.randn(1, 2, 32, d), at_end)
            for kind, one in itertools.product(("key", "value"), sparsity):
                packed = fences["k_pages"].place(compress_kv(x, kind=kind, sparsity=one), at_end)
                expand_kv(packed, kind=kind, head_dim=d)
print(f"{count} calls between fences")
