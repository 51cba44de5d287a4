"""The structured layout of weights with an n:m pattern: what it stands for, when it is chosen, what it refuses."""

import hashlib
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.compile import packs
from torch_cpu_ext.core.isa import ISAS, supported
from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.sparse_linear import check, linear, magnitude_mask, ops, pack, unpack
from torch_cpu_ext.sparse_linear.pruning import has_pattern

from cases import PATTERNS, pack_by_hand, patterned_weight

DTYPES = ("fp32", "bf16", "int8")
BATCHES = (1, 2, 4, 5, 9)
reference = CATALOGUE["sparse_linear_pack"].reference

# sha256 of the packed form of `fixed_weight()`. A change here breaks files that users have saved.
GOLDEN = {
    ("fp32", "2:4"): "a1b7d88b19638e797d73bb82396a3c1e79326449e31680b7995ff318e58457ff",
    ("bf16", "2:4"): "4b86b3c45a7724505566be5985b94856d917256243a80d5393e4f726a1ac3163",
    ("int8", "2:4"): "74b2f5e8f698e61b988da0cae172e1b7a7941e1ac5bd09fc4cb587f52a278be4",
    ("bf16", "4:8"): "1de2ed5aa06e9f86ad31fa69dafaad14bd24f2185eec1effbbdb1920bc0250ce",
    ("int8", "1:2"): "d02c751efbdc4faa43f8c3f478a4bd70b3390e28bc3785064b5b5cb60c505e67",
}


def fixed_weight(pattern: str) -> torch.Tensor:
    """18 x 72, exact in every dtype, without a random generator; some groups have fewer values than the pattern allows."""
    n, m = map(int, pattern.split(":"))
    i = torch.arange(18 * 72)
    return torch.where((i % m * 3 + i // m) % m < n, (i * 37 % 255 - 127) * (i * 3 % 7 != 0), 0).float().view(18, 72) / 64


@pytest.mark.parametrize("key", GOLDEN, ids=" ".join)
def test_golden(key):
    dtype, pattern = key
    assert has_pattern(fixed_weight(pattern), pattern)
    packed = pack(fixed_weight(pattern), dtype=dtype, pattern=pattern)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == GOLDEN[key]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(DTYPES),
    pattern=st.integers(1, 6).flatmap(lambda e: st.tuples(st.integers(1, 2**e - 1), st.just(2**e))),
    outputs=st.integers(0, 40),
    inputs=st.integers(0, 300),
    sparsity=st.sampled_from((0.0, 0.1, 0.9, 1.0)),
    seed=st.integers(0, 1000),
)
def test_bits_of_the_sparse_layout(dtype, pattern, outputs, inputs, sparsity, seed):
    """Same weight and same products, bit for bit, on every instruction set; the length depends on the sizes only."""
    n, m = pattern
    name, generator = f"{n}:{m}", torch.Generator().manual_seed(seed)
    weight = patterned_weight(outputs, inputs, name, generator, sparsity)
    weight[:, 1::3] *= -1  # zeros of both signs
    outputs, inputs = weight.shape
    packed, sparse = pack(weight, dtype=dtype, pattern=name), pack(weight, dtype=dtype, layout="sparse")
    assert packed.numpy().tobytes() == pack_by_hand(weight, dtype, "auto", pattern=name)
    assert packed.equal(reference(weight, dtype=dtype, pattern=name))
    assert packed.numel() == pack(torch.zeros(outputs, inputs), dtype=dtype, pattern=name).numel()
    assert check(packed).tolist() == [1, DTYPES.index(dtype), 2, outputs, inputs, int(check(sparse)[5]), n, m]
    assert unpack(packed, outputs, inputs).equal(unpack(sparse, outputs, inputs))
    for isa in supported():
        with tce.isa(isa):
            for rows in BATCHES:
                x = torch.randn(rows, inputs, generator=generator)
                assert linear(x, packed, None, outputs).equal(linear(x, sparse, None, outputs)), (isa, rows)


def test_threads_and_sizes_beyond_one_part(isa):
    for dtype in DTYPES:
        weight = patterned_weight(700, 640, "2:4", torch.Generator().manual_seed(0))
        packed, sparse = pack(weight, dtype=dtype, pattern="2:4"), pack(weight, dtype=dtype, layout="sparse")
        for rows in (1, 3, 7, 40):
            x = torch.randn(rows, 640)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert linear(x, packed, None, 700).equal(linear(x, sparse, None, 700))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_special_weights(isa, dtype, pattern):
    """NaN and infinities are values like others."""
    weight = patterned_weight(35, 64, pattern, torch.Generator().manual_seed(0), 0.0)
    places = weight.nonzero()
    for place, value in zip(places[:: len(places) // 3][:3].tolist(), (float("nan"), float("inf"), -float("inf")), strict=True):
        weight[tuple(place)] = value
    packed, sparse = pack(weight, dtype=dtype, pattern=pattern), pack(weight, dtype=dtype, layout="sparse")
    for rows in BATCHES:
        x = torch.randn(rows, 64)
        torch.testing.assert_close(linear(x, packed, None, 35), linear(x, sparse, None, 35), rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_named():
    for function in (pack, reference):
        for dtype in DTYPES:
            weight = patterned_weight(40, 64, "2:4", torch.Generator().manual_seed(0))
            weight[33, 8:12], weight[37] = 1, 1
            with pytest.raises(RuntimeError, match="at most 2 nonzeros among every 4 inputs for the pattern 2:4, got more in output 33"):
                function(weight, dtype=dtype, pattern="2:4")
    # It is the rounded weight that counts.
    weight = torch.tensor([[1.0, 1e-5, 1e-5, -1.0]])
    assert unpack(pack(weight, dtype="int8", pattern="2:4"), 1, 4).equal(torch.tensor([[1.0, 0, 0, -1]]))
    with pytest.raises(RuntimeError, match="got more in output 0"):
        pack(weight, dtype="bf16", pattern="2:4")


@pytest.mark.parametrize(("dtype", "pattern"), [(dtype, pattern) for dtype in DTYPES for pattern in ("2:4", "1:4", "3:4", "4:8")])
def test_bits_moved_to_another_group(isa, dtype, pattern):
    """The whole panel has as many bits as it should; what walks through it finds the group, and so do the kernels that rely on counts."""
    m = int(pattern.split(":")[1])
    packed = pack(patterned_weight(16, 128, pattern, torch.Generator().manual_seed(0), 0.0), dtype=dtype, pattern=pattern)
    first = struct.unpack_from("<q", packed.numpy().tobytes(), 64)[0]
    for chunk in (first, first + 128 + 16 * 64 * 4 // {"fp32": 1, "bf16": 2, "int8": 4}[dtype] * int(pattern[0]) // m):
        damaged, block = packed.clone(), 2 * m  # bytes of bitmap for m inputs
        at = chunk + int(damaged[chunk : chunk + block].nonzero()[0])
        damaged[at] &= damaged[at] - 1  # one bit less in the first m inputs, one more in the second
        at = chunk + block + int((damaged[chunk + block : chunk + 2 * block] != 255).nonzero()[0])
        damaged[at] |= damaged[at] + 1
        for function in (check, lambda p: unpack(p, 16, 128), CATALOGUE["sparse_linear_check"].reference):
            with pytest.raises(RuntimeError, match="a panel whose bitmap and bytes disagree"):
                function(damaged)
        if m == 4 and dtype != "fp32" and ISAS.index(isa) >= ISAS.index("avx512_vnni"):
            with pytest.raises(RuntimeError, match="a panel whose bitmap and bytes disagree"):
                linear(torch.randn(1, 128), damaged, None, 16)
        else:
            linear(torch.randn(1, 128), damaged, None, 16)


def halved(outputs=32, inputs=64) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight *= magnitude_mask(layer.weight, 0.5, pattern="2:4")
    return layer


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, "sparse"),
        ({"pattern": "2:4"}, "structured"),
        ({"pattern": "2:4", "sparsity": 0.5}, "structured"),
        ({"pattern": "4:8"}, "structured"),
        ({"pattern": "1:4"}, "sparse"),  # the weight has it not
        ({"pattern": "2:4", "layout": "sparse"}, "sparse"),
        ({"pattern": "2:4", "layout": "dense"}, "dense"),
        ({"pattern": "2:4", "dtype": "int4"}, "sparse"),
        ({"pattern": "4:8", "dtype": "bf16"}, "structured"),
        ({"pattern": "3:6", "sparsity": 0.5}, "error"),
        ({"pattern": "2:128"}, "sparse"),
    ],
    ids=str,
)
def test_choice(config, layout):
    linear = halved()
    if layout == "error":
        with pytest.raises(ValueError, match="in_features must be a multiple of 6"):
            tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(**config))
        return
    packed = tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(**config))
    assert packed.layout == layout
    assert packed.pattern == (config["pattern"] if layout == "structured" else "unstructured")
    plain = tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype=packed.dtype, layout=layout.replace("structured", "sparse")))
    x = torch.randn(3, 64)
    assert packed(x).equal(plain(x))


def test_a_weight_that_is_shared_is_not_pruned_and_has_no_pattern():
    layer = nn.Linear(64, 32)
    packed = tce.SparseLinear.from_linear(layer, tce.SparseLinearConfig(dtype="fp32", sparsity=0.5, pattern="2:4"), tied=True)
    assert packed.layout == "dense"
    assert packed.weight.equal(layer.weight)


def test_state_dict():
    """Packed weights load as they are; a dense weight is packed with the pattern of the one before, if it has it."""
    config = tce.SparseLinearConfig(dtype="bf16", pattern="2:4")
    one = tce.SparseLinear.from_linear(halved(), config)
    other = tce.SparseLinear(64, 32, dtype="bf16")
    assert (other.layout, other.pattern) == ("empty", "unstructured")
    other.load_state_dict(one.state_dict())
    assert (other.layout, other.pattern) == ("structured", "2:4")
    assert other.packed.equal(one.packed)
    again = halved()
    other.load_state_dict(again.state_dict())
    assert (other.layout, other.pattern) == ("structured", "2:4")
    assert other.weight.equal(again.weight.bfloat16().float())
    other.load_state_dict(nn.Linear(64, 32).state_dict())
    assert other.layout == "dense"


def test_compiled_and_saved(tmp_path):
    config = tce.SparseLinearConfig(dtype="fp32", sparsity=0.5, pattern="2:4")
    model, x = nn.Sequential(nn.Linear(64, 32)).eval().requires_grad_(False), torch.randn(2, 64)
    expected = tce.SparseLinear.from_linear(model[0], config)(x)
    assert ops.LAYOUT_NAMES[int(check(packs.pack(model[0].weight, config))[2])] == "structured"
    tce.save_checkpoint(tce.optimize(model, config), tmp_path / "model.safetensors")
    loaded = tce.load_checkpoint(nn.Sequential(nn.Linear(64, 32)), tmp_path / "model.safetensors")
    assert loaded[0].layout == "structured"
    assert loaded(x).equal(expected)
