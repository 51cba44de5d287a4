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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("layout", ["auto", "dense", "sparse"])
def test_config_reaches_the_layers(dtype, layout):
    model = nn.Sequential(nn.Linear(64, 64))
    group = 32 if dtype == "int4" else 64
    tce.optimize(model, tce.SparseLinearConfig(dtype=dtype, layout=layout, sparsity=0.8, activation_group=group, group_size=64))
    assert model[0].dtype == dtype
    assert model[0].layout == ("sparse" if layout == "auto" else layout)
    assert model[0].activation_group == group
    assert model[0].group_size == 64
    if dtype != "int4":
        assert abs(model[0].sparsity - 0.8) < 0.02
    elif model[0].layout == "sparse":  # small weights are rounded to zero, too
        assert 0.78 < model[0].sparsity < 0.9
    else:  # zero is no code of the dense layout
        assert model[0].sparsity < 0.2


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 5e-2), ("int4", 0.4)])
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
    for dtype in ("fp32", "bf16", "int8", "int4"):
        for sparsity in (None, 0.5, 0.9):
            copy = nn.Sequential(nn.Linear(512, 512, bias=False))
            tce.optimize(copy, tce.SparseLinearConfig(dtype=dtype, sparsity=sparsity))
            sizes[dtype, sparsity] = tce.report(copy).bytes_after
    dense = model[0].weight.numel() * 4
    for (dtype, sparsity), size in sizes.items():
        if dtype == "int4":  # scales and minimums; or scales, zeros, a bitmap, and what the fuller half of a row holds
            per_weight = {None: 0.5 + 4 / 32, 0.5: 3 / 32 + 0.125 + 0.27, 0.9: 3 / 32 + 0.125 + 0.065}[sparsity]
        else:
            width = {"fp32": 4, "bf16": 2, "int8": 1}[dtype]
            per_weight = min(width, width * (1 - (sparsity or 0)) + 0.125)
        expected = dense / 4 * per_weight
        assert size <= expected * 1.05 + 4096


class Language(nn.Module):
    """The least that has an output embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).relu())

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dtype": "int4"}, ("int4", "int8")),
        ({"dtype": "int4", "head_dtype": "int4"}, ("int4", "int4")),
        ({"dtype": "int4", "head_dtype": "bf16"}, ("int4", "bf16")),
        ({"dtype": "bf16"}, ("bf16", "bf16")),
        ({"dtype": "int8", "head_dtype": "int4"}, ("int8", "int4")),
    ],
)
def test_head_dtype(tied, inside, values, expected):
    """Of the output embedding, also where the model is a part of another; restore ties it again."""
    language = Language(tied)
    weight, before = language.head.weight, language.head.weight.clone()
    model = nn.Sequential(language) if inside else language
    want = model(torch.arange(9)).detach()
    tce.optimize(model, tce.SparseLinearConfig(**values, sparsity=0.3))
    assert (language.body.dtype, language.head.dtype) == expected
    assert (model(torch.arange(9)) - want).norm() < 0.5 * want.norm()
    assert [row.kind.split()[0] for row in tce.report(model).rows] == list(expected)
    tce.restore(model)
    assert type(language.head) is nn.Linear
    assert (language.head.weight is weight) == tied
    assert (language.head.weight is language.embed.weight) == tied
    assert weight.equal(before)


def test_no_head():
    """A model that has the question, but no answer."""
    model = Language()
    model.get_output_embeddings = lambda: None
    tce.optimize(model, tce.SparseLinearConfig(dtype="int4"))
    assert model.head.dtype == "int4"
    assert tce.optimize(nn.Linear(32, 8), tce.SparseLinearConfig(dtype="int4")).dtype == "int4"


def test_int4_weights_that_cannot_be_packed_name_their_module():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"1: .*within the range of float16"):
        tce.optimize(model, tce.SparseLinearConfig(dtype="int4"))
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


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
