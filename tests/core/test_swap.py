"""optimize, restore and report: which modules, all or none, and everything back as it was."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.core import swap

EXACT = tce.SparseLinearConfig(dtype="fp32")


class Block(nn.Module):
    def __init__(self, size=20):
        super().__init__()
        self.up_proj = nn.Linear(size, 40)
        self.down_proj = nn.Linear(40, size, bias=False)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(x).relu())


class Model(nn.Module):
    """Embedding, two blocks, a norm and a head tied to the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(30, 20)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


TOKENS = torch.arange(12).view(2, 6)


def replaced(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, tce.SparseLinear))


def snapshot(model):
    return {name: (id(module), type(module)) for name, module in model.named_modules()}, {
        name: value.clone() for name, value in model.state_dict().items()
    }


def unchanged(model, before):
    modules, tensors = before
    now = snapshot(model)
    return now[0] == modules and now[1].keys() == tensors.keys() and all(now[1][k].equal(v) for k, v in tensors.items())


ALL = ["head", "layers.0.down_proj", "layers.0.up_proj", "layers.1.down_proj", "layers.1.up_proj"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, ALL),
        ({"include": "layers"}, ALL[1:]),
        ({"include": "layers.0"}, ALL[1:3]),
        ({"include": "up_proj"}, ["layers.0.up_proj", "layers.1.up_proj"]),
        ({"include": ["head", "layers.1.up_proj"]}, ["head", "layers.1.up_proj"]),
        ({"include": re.compile(r"\.\d\.up")}, ["layers.0.up_proj", "layers.1.up_proj"]),
        ({"exclude": "head"}, ALL[1:]),
        ({"exclude": ["layers.0", re.compile("^head$")]}, ALL[3:]),
        ({"include": "layers.0", "exclude": "up_proj"}, ["layers.0.down_proj"]),
        ({"include": "head", "exclude": "head"}, []),
        ({"include": ("layers.1",)}, ALL[3:]),
        ({"filter_fn": lambda module, name: module.bias is not None}, ["layers.0.up_proj", "layers.1.up_proj"]),
        ({"filter_fn": lambda module, name: name == "head", "exclude": "layers"}, ["head"]),
        ({"filter_fn": lambda module, name: False}, []),
    ],
)
def test_choice(choice, expected):
    model = Model()
    assert tce.optimize(model, EXACT, **choice) is model
    assert replaced(model) == expected


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["proj", "layer", "layers.2", re.compile("^up"), ["head", "tail"], "s.0"])
def test_a_name_that_fits_nothing_is_an_error(argument, pattern):
    """A string is a run of whole parts of a name: "proj" does not fit up_proj."""
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{argument} must fit the name of a module, got "):
        tce.optimize(model, EXACT, **{argument: pattern})
    assert unchanged(model, before)


def test_filter_gets_module_and_name():
    seen = {}
    model = Model()
    modules = dict(model.named_modules())
    tce.optimize(model, EXACT, lambda module, name: bool(seen.setdefault(name, module)))
    assert sorted(seen) == ALL
    assert all(modules[name] is module for name, module in seen.items())


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        tce.optimize({}, EXACT)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_midway_changes_nothing(error, monkeypatch):
    model = Model()
    before, count = snapshot(model), 0
    real = tce.SparseLinear.from_linear

    def make(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise error("midway")
        return real(*args, **kwargs)

    monkeypatch.setattr(tce.SparseLinear, "from_linear", make)
    with pytest.raises(error):
        tce.optimize(model, EXACT)
    assert unchanged(model, before)


def test_an_error_while_putting_changes_nothing():
    """Also once some modules are in place."""
    model = Model()
    before = snapshot(model)

    class Dict(dict):
        def __setitem__(self, name, value):
            if name == "down_proj":
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    model.layers[1]._modules = Dict(model.layers[1]._modules)
    with pytest.raises(KeyboardInterrupt):
        tce.optimize(model, EXACT)
    model.layers[1]._modules = dict(model.layers[1]._modules)
    assert unchanged(model, before)


def test_a_weight_that_cannot_be_packed_names_its_module():
    model = Model()
    model.layers[1].up_proj.weight.data[0, 0] = float("nan")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj: .*must be finite"):
        tce.optimize(model, tce.SparseLinearConfig(dtype="int8"))
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj: .*must be finite"):
        tce.optimize(model, tce.SparseLinearConfig(dtype="fp32", sparsity=0.5))
    assert {name: id(module) for name, module in model.named_modules()} == before
    tce.optimize(model, EXACT)  # which can hold NaN
    assert replaced(model) == ALL


def test_shared_modules_stay_shared():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared))
    x = torch.randn(3, 8)
    expected = model(x)
    tce.optimize(model, EXACT)
    assert isinstance(model[0], tce.SparseLinear)
    assert model[0] is model[2]
    assert model[0] is model[3][0]
    torch.testing.assert_close(model(x), expected)
    assert len(tce.report(model).rows) == 1
    tce.restore(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]
    assert model[0] is model[3][0]
    assert model(x).equal(expected)


def test_subclasses_and_others_are_left_alone():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"special": Special(4, 4), "attention": nn.MultiheadAttention(8, 2), "plain": nn.Linear(4, 4)})
    tce.optimize(model, EXACT)
    assert replaced(model) == ["plain"]
    assert type(model["special"]) is Special


def test_the_model_itself():
    linear = nn.Linear(6, 5)
    x = torch.randn(2, 6)
    result = tce.optimize(linear, EXACT)
    assert isinstance(result, tce.SparseLinear)
    torch.testing.assert_close(result(x), linear(x))
    assert [row.name for row in tce.report(result).rows] == [""]
    assert "(model)" in str(tce.report(result))
    back = tce.restore(result)
    assert type(back) is nn.Linear
    assert back(x).equal(linear(x))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    model = Model().train(training)
    model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    tce.optimize(model, EXACT)
    assert {name: module.training for name, module in model.named_modules()} == before
    tce.restore(model)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("through", ["nothing", "deepcopy", "pickle"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [EXACT, tce.SparseLinearConfig(dtype="int8", sparsity=0.5, keep_original=True)], ids=["exact", "kept"])
def test_restore_is_bit_equal(through, tied, config):
    model = Model(tied).eval()
    with torch.no_grad():
        model.layers[0].up_proj.weight[::2] = 0
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(TOKENS)
    tce.optimize(model, config)
    assert replaced(model) == ALL
    if through == "deepcopy":
        model = copy.deepcopy(model)
    elif through == "pickle":
        model = pickle.loads(pickle.dumps(model))
    assert tce.restore(model) is model
    assert replaced(model) == []
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(value) and after[name].dtype == value.dtype for name, value in before.items())
    assert model(TOKENS).equal(expected)
    assert (model.head.weight is model.embed.weight) == tied
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_restore_keeps_what_trains():
    """A frozen model comes back frozen."""
    model = Model(tied=False)
    model.requires_grad_(False)
    model.layers[0].up_proj.weight.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tce.restore(tce.optimize(model, EXACT))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_restore_of_half_precision(kind):
    model = Model(tied=False).to(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tce.restore(tce.optimize(model, EXACT))
    after = model.state_dict()
    assert all(after[name].equal(value) and after[name].dtype == kind for name, value in before.items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_cast_after_optimize_can_be_used_and_restored(kind):
    model = Model(tied=False).eval()
    tce.optimize(model, tce.SparseLinearConfig(dtype="bf16"))
    model.to(kind)
    out = model(TOKENS)
    assert out.dtype == kind
    tce.restore(model)
    assert model(TOKENS).dtype == kind


def test_nothing_happens_to_what_was_never_optimized():
    model = Model()
    before = snapshot(model)
    assert tce.restore(model) is model
    assert unchanged(model, before)
    report = tce.report(model)
    assert report.rows == []
    assert str(report) == "nothing was replaced"


def test_optimize_twice():
    """The second time finds nothing to do; or the rest."""
    model = Model()
    tce.optimize(model, EXACT, include="layers.0")
    first = dict(model.named_modules())["layers.0.up_proj"]
    tce.optimize(model, tce.SparseLinearConfig(dtype="bf16"))
    assert replaced(model) == ALL
    assert model.layers[0].up_proj is first
    assert model.layers[1].up_proj.dtype == "bf16"
    before = snapshot(model)
    tce.optimize(model, EXACT)
    assert unchanged(model, before)


def test_report():
    model = Model()
    model.layers[1].up_proj.double()
    tce.optimize(model, tce.SparseLinearConfig(dtype="int8", sparsity=0.5))
    report = tce.report(model)
    assert [row.name for row in report.rows] == ["layers.0.up_proj", "layers.0.down_proj", "layers.1.down_proj", "head"]
    assert list(report.kept) == ["layers.1.up_proj"]
    assert "float64" in report.kept["layers.1.up_proj"]
    row = report.rows[0]
    assert row.technique == "sparse_linear"
    assert row.bytes_before == 20 * 40 * 4 + 40 * 4
    assert row.bytes_after == model.layers[0].up_proj.packed.numel() + 40 * 4
    assert row.isa == tce.kernel_isa("sparse_linear", "int8")
    assert report.bytes_before == sum(r.bytes_before for r in report.rows)
    text = str(report)
    for word in ("layers.0.up_proj", "int8", "40x20", "sparsity 0.5", "4 modules", "left as it was: layers.1.up_proj"):
        assert word in text
    import json

    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["name"] == "layers.0.up_proj"
    tce.restore(model)
    assert str(tce.report(model)) == "nothing was replaced"


def test_report_forgets_what_was_kept_once_it_is_replaced():
    model = Model()
    model.layers[1].up_proj.double()
    tce.optimize(model, EXACT)
    assert list(tce.report(model).kept) == ["layers.1.up_proj"]
    model.layers[1].up_proj.float()
    tce.optimize(model, EXACT)
    assert replaced(model) == ALL
    assert tce.report(model).kept == {}


def test_meta_modules_are_left_alone():
    model = Model()
    model.layers[0].up_proj.to("meta")
    tce.optimize(model, EXACT)
    assert "layers.0.up_proj" not in replaced(model)
    assert "meta" in tce.report(model).kept["layers.0.up_proj"]


def test_a_tied_head_is_packed_unpruned_and_the_embedding_stays():
    model = Model().eval()
    weight = model.embed.weight.clone()
    tce.optimize(model, tce.SparseLinearConfig(dtype="fp32", sparsity=0.9))
    assert model.embed.weight.equal(weight)
    assert model.head.weight.equal(weight)
    assert "tied" in tce.report(model).rows[-1].detail


def test_parametrized_weights_are_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    tce.optimize(model, EXACT)
    assert replaced(model) == ["1"]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_modules_with_hooks_are_left_alone(hook):
    """A replacement would not call them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    getattr(model[0], hook)(lambda *args: None)
    tce.optimize(model, EXACT)
    assert replaced(model) == ["1"]
    assert "hook" in tce.report(model).kept["0"]


def test_put_knows_all_or_none():
    model = Model()
    with pytest.raises(AttributeError):
        swap.put(model, {"head": nn.Identity(), "nowhere": nn.Identity()})
    assert type(model.head) is nn.Linear
