"""`SparseConv1D`, the stand-in for the Conv1D of transformers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.sparse_linear.conv1d import SparseConv1D

from support import run_python, succeeded

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D

EXACT = tce.SparseLinearConfig(dtype="fp32")


def conv(inputs=24, outputs=40):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_computes_what_conv1d_does(dtype, isa):
    layer, x = conv(), torch.randn(2, 3, 24)
    packed = SparseConv1D.from_conv1d(layer, tce.SparseLinearConfig(dtype=dtype))
    assert packed.bias is layer.bias
    torch.testing.assert_close(packed(x), layer(x), rtol=2e-2, atol=2e-2)
    linear = nn.Linear(24, 40)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias
    assert packed(x).equal(tce.SparseLinear.from_linear(linear, tce.SparseLinearConfig(dtype=dtype))(x))


@pytest.mark.parametrize("through", ["nothing", "deepcopy", "pickle"])
@pytest.mark.parametrize("config", [EXACT, tce.SparseLinearConfig(sparsity=0.5, keep_original=True)], ids=["exact", "kept"])
def test_optimize_and_restore(config, through):
    model = nn.Sequential(conv(), nn.ReLU(), conv(40, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 24)
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(x)
    tce.optimize(model, config)
    assert [type(layer) for layer in model] == [SparseConv1D, nn.ReLU, SparseConv1D, tce.SparseLinear]
    assert [row.name for row in tce.report(model).rows] == ["0", "2", "3"]
    if through == "deepcopy":
        model = copy.deepcopy(model)
    elif through == "pickle":
        model = pickle.loads(pickle.dumps(model))
    tce.restore(model)
    assert [type(layer) for layer in model] == [Conv1D, nn.ReLU, Conv1D, nn.Linear]
    assert (model[0].nx, model[0].nf, model[0].training) == (24, 40, False)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(value) and after[name].is_contiguous() for name, value in before.items())
    assert model(x).equal(expected)


def test_a_tied_weight_is_the_same_parameter_afterwards():
    """A weight of an embedding, which a Conv1D shares, transposed or not as may be."""
    layer, embedding = conv(), nn.Embedding(24, 40)
    layer.weight = embedding.weight
    model = nn.ModuleList([embedding, layer])
    tce.optimize(model, tce.SparseLinearConfig(dtype="fp32", sparsity=0.5))
    assert model[1].weight.equal(embedding.weight.t())
    linear = model[1].to_linear()
    assert linear.weight.shape == (40, 24)
    assert linear.weight.equal(embedding.weight.t())
    tce.restore(model)
    assert model[1].weight is embedding.weight


def test_subclasses_are_left_alone():
    class Special(Conv1D):
        pass

    model = nn.Sequential(Special(4, 4), conv())
    tce.optimize(model, EXACT)
    assert [type(layer) for layer in model] == [Special, SparseConv1D]


def test_checkpoint(tmp_path):
    model = tce.optimize(nn.Sequential(conv()), tce.SparseLinearConfig())
    tce.save_checkpoint(model, tmp_path / "model.safetensors")
    fresh = tce.load_checkpoint(nn.Sequential(conv()), tmp_path / "model.safetensors")
    assert type(fresh[0]) is SparseConv1D
    x = torch.randn(2, 24)
    assert fresh(x).equal(model(x))
    assert type(tce.restore(fresh)[0]) is Conv1D


def test_a_dense_state_dict_is_packed_while_loading():
    dense, model = nn.Sequential(conv()), tce.optimize(nn.Sequential(conv()), EXACT)
    model.load_state_dict(dense.state_dict())
    assert model[0].weight.equal(dense[0].weight.t())
    with pytest.raises(RuntimeError, match=r"0\.weight must be \(40, 24\)"):
        model.load_state_dict({"0.weight": torch.zeros(40, 24), "0.bias": torch.zeros(40)})


def test_weights_that_cannot_be_packed_name_their_module():
    model = nn.Sequential(conv(), conv(40, 8))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^1: .*must be finite"):
        tce.optimize(model, tce.SparseLinearConfig())
    assert type(model[0]) is Conv1D


def test_optimize_loads_no_transformers():
    code = """
        import sys, torch, torch_cpu_ext as tce
        model = tce.optimize(torch.nn.Sequential(torch.nn.Linear(4, 4)), tce.SparseLinearConfig())
        assert tce.report(model).rows and "transformers" not in sys.modules
    """
    succeeded(run_python(code))
