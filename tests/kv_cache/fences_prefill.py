"""Attention of a prompt on arguments that end (or begin) at a page that must not be touched. test_prefill.py starts it as a process of its
own."""

import itertools

import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported

from cases_kv_prefill import FLOATS, prefill_args
from support import Fence

assert tce.load("kv_cache")
NAMES = ("query", "key", "value", "first", "bias")
fences = {name: Fence(1 << 19) for name in NAMES}
op = torch.ops.torch_cpu_ext.kv_cache_prefill
count = 0
for kind, d, (length, tokens) in itertools.product(FLOATS, (16, 48, 80), ((1, 1), (5, 33), (16, 16), (67, 67), (2, 300))):
    for window, first in ((3, torch.tensor([[tokens // 2, 0], [1, tokens]])), (0, torch.zeros(2, 2, dtype=torch.int64))):
        args = prefill_args((2, 2, 3, length, d), tokens, kind, 8, first=first, bias=True, window=window, sample=int(window == 0), pool=3)
        for at_end in (True, False):
            fenced = args | {name: fences[name].place(args[name], at_end) for name in NAMES}
            for name in supported():
                with tce.isa(name):
                    assert all(a.equal(b) for a, b in zip(op(**fenced), op(**args), strict=True))
                    count += 1
print(f"{count} calls between fences")
