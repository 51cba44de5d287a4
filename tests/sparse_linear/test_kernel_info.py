"""`kernel_info`: what it says, not how fast anything is."""

import json

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.core import memory


def layer(**fields):
    return tce.SparseLinear.from_linear(nn.Linear(200, 100), tce.SparseLinearConfig(**fields))


@pytest.mark.parametrize("dtype", tce.sparse_linear.ops.DTYPES)
def test_layer(dtype, isa):
    info = tce.kernel_info(layer(dtype=dtype, sparsity=0.5), limit_bytes=1 << 20)
    assert info.kernel == f"sparse_linear {dtype}"
    assert info.isa == tce.kernel_isa("sparse_linear", dtype)
    assert info.amx == (info.isa == "amx")
    assert (info.dtype, info.layout, info.layers) == (dtype, "sparse", 1)
    assert info.threads == torch.get_num_threads()
    assert info.gb_per_s > 0
    assert info.read_gb_per_s > 0
    assert info.share == info.gb_per_s / info.read_gb_per_s
    assert not info.cold
    assert "\n" not in str(info)
    assert f"{info.isa}, AMX {'used' if info.amx else 'not used'}" in str(info)
    assert json.loads(json.dumps(info.to_dict()))["share"] == info.share


def test_model():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).half()
    tce.optimize(model, tce.SparseLinearConfig(), include="0")
    tce.optimize(model, tce.SparseLinearConfig(dtype="bf16"), include="2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    info = tce.kernel_info(model, limit_bytes=1 << 20)
    assert (info.layers, info.dtype, info.layout) == (2, "int8, bf16", "dense")
    assert info.bytes == model[0].packed.numel() + model[2].packed.numel()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_enough_copies(monkeypatch):
    monkeypatch.setattr(memory, "last_level_cache", lambda: 0)
    assert memory.cold_bytes() == 160 << 20
    assert tce.kernel_info(tce.SparseLinear.from_linear(nn.Linear(2048, 2048))).cold


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="model must have packed layers"):
        tce.kernel_info(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="got a layer without"):
        tce.kernel_info(tce.SparseLinear(4, 4))


def test_last_level_cache():
    assert memory.last_level_cache() >= 0
