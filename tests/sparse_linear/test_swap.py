"""swap_linear on models people have."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_cpu_ext as tce


def test_swap_linear_is_optimize():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert tce.swap_linear(model, include="1") is model
    assert [type(m) for m in model] == [nn.Linear, tce.SparseLinear]
    assert model[1].dtype == "int8"
    assert tce.swap_linear(nn.Linear(3, 3), tce.SparseLinearConfig(dtype="bf16")).dtype == "bf16"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("layout", ["auto", "dense", "sparse"])
def test_config_reaches_the_layers(dtype, layout):
    model = nn.Sequential(nn.Linear(64, 64))
    tce.optimize(model, tce.SparseLinearConfig(dtype=dtype, layout=layout, sparsity=0.8, activation_group=64))
    assert model[0].dtype == dtype
    assert model[0].layout == ("sparse" if layout == "auto" else layout)
    assert model[0].activation_group == 64
    assert abs(model[0].sparsity - 0.8) < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 5e-2)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_transformer_encoder(dtype, tolerance, mode):
    """PyTorch's fast path reads the weights of the Linear layers itself; the result must be right with and without it."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    expected = model(x).detach()
    tce.optimize(model, tce.SparseLinearConfig(dtype=dtype))
    assert isinstance(model.linear1, tce.SparseLinear)
    with mode():
        torch.testing.assert_close(model(x).detach(), expected, rtol=tolerance, atol=tolerance)


def test_smaller():
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    sizes = {}
    for dtype in ("fp32", "bf16", "int8"):
        for sparsity in (None, 0.5, 0.9):
            copy = nn.Sequential(nn.Linear(512, 512, bias=False))
            tce.optimize(copy, tce.SparseLinearConfig(dtype=dtype, sparsity=sparsity))
            sizes[dtype, sparsity] = tce.report(copy).bytes_after
    dense = model[0].weight.numel() * 4
    for (dtype, sparsity), size in sizes.items():
        width = {"fp32": 4, "bf16": 2, "int8": 1}[dtype]
        expected = dense / 4 * (min(width, width * (1 - (sparsity or 0)) + 0.125))
        assert size <= expected * 1.05 + 4096


def test_two_linears_with_one_weight():
    """Tied to each other: both are packed unpruned, and tied again after restore."""
    model = nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False)})
    model["b"].weight = model["a"].weight
    weight = model["a"].weight
    tce.optimize(model, tce.SparseLinearConfig(sparsity=0.5))
    tce.restore(model)
    assert model["a"].weight is model["b"].weight is weight


def test_tied_weight_under_another_name_and_class():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, 4))
            self.out = nn.Linear(4, 10)
            self.out.weight = self.table

    model = tce.optimize(Tied(), tce.SparseLinearConfig(dtype="fp32", sparsity=0.5))
    assert model.out.weight.equal(model.table)
    assert model.out.sparsity == 0
    assert tce.restore(model).out.weight is model.table


def test_pruned_with_torch():
    """torch.nn.utils.prune keeps its mask in a hook until it is made permanent."""
    model = nn.Sequential(nn.Linear(32, 32))
    prune.l1_unstructured(model[0], "weight", 0.5)
    tce.optimize(model, tce.SparseLinearConfig(dtype="fp32"))
    assert type(model[0]) is nn.Linear
    assert "prune.remove" in tce.report(model).kept["0"]
    prune.remove(model[0], "weight")
    expected = model[0].weight.clone()
    tce.optimize(model, tce.SparseLinearConfig(dtype="fp32"))
    assert abs(model[0].sparsity - 0.5) < 0.01
    assert model[0].weight.equal(expected)
