"""The backend as users meet it: torch.compile, options, logs, gradients, changed weights, Inductor's caches."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import torch_cpu_ext as tce
from torch_cpu_ext import SparseLinearConfig
from torch_cpu_ext.compile import backend as module_backend
from torch_cpu_ext.compile import packs
from torch_cpu_ext.compile.backend import _options

from support import run_python, succeeded

FP32 = {"linear": SparseLinearConfig(dtype="fp32")}


@pytest.fixture
def packings(monkeypatch):
    """Counts how often a weight is packed."""
    made = []
    monkeypatch.setattr(packs.ops, "pack", lambda weight, _pack=packs.ops.pack, **kw: made.append(kw["dtype"]) or _pack(weight, **kw))
    return made


class Block(nn.Module):
    def __init__(self, features=32, hidden=48):
        super().__init__()
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x):
        return x + self.down(self.up(x))


def prune(model: nn.Module) -> nn.Module:
    """The model with 70 % zeros in its linear layers."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) > 0.7)
    return model


def compiled(model, options=None, **kwargs):
    return torch.compile(model, backend="torch_cpu_ext", fullgraph=True, options=options, **kwargs)


FRESH = """
    import logging, sys, torch
    lines = []
    logger = logging.getLogger("torch_cpu_ext.compile")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    torch.manual_seed(int(sys.argv[1]))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    model[0].weight.data.mul_(torch.rand(64, 64) > 0.7)
    model[2].weight.data.mul_(torch.rand(8, 64) > 0.7)
    assert "torch_cpu_ext" not in sys.modules
    with torch.no_grad():
        x = torch.randn(3, 64)
        torch.testing.assert_close(torch.compile(model, backend="torch_cpu_ext", fullgraph=True)(x), model(x))
    (line,) = lines
    assert line.startswith("packed 2 of 2 linear layers (fp32)"), line
    counts = torch._dynamo.utils.counters["aot_autograd"]
    print(counts["autograd_cache_hit"], counts["autograd_cache_miss"])
"""


def test_works_by_name_in_a_fresh_interpreter_and_caches_hold_no_weights(tmp_path):
    """Two models of one architecture share Inductor's cache: the second takes the first one's code, and its own weights."""
    counts = [succeeded(run_python(FRESH, seed, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))).split() for seed in ("1", "2")]
    assert counts == [["0", "1"], ["1", "0"]]


def test_importing_the_package_brings_no_compiler_along():
    code = """
        import sys, torch
        before = set(sys.modules)
        import torch_cpu_ext
        unwanted = ("torch._inductor", "torch._dynamo", "torch_cpu_ext.compile")
        print([name for name in set(sys.modules) - before if name.startswith(unwanted)])
    """
    assert succeeded(run_python(code)).strip() == "[]"


@torch.no_grad()
def test_sparse_weights_are_packed_without_loss(log):
    model, x = nn.Sequential(prune(Block()), nn.ReLU(), nn.Linear(32, 8)), torch.randn(3, 32)
    torch.testing.assert_close(compiled(model)(x), model(x))
    (line,) = log()
    assert line.startswith("packed 2 of 3 linear layers (fp32): 0.0 MB -> 0.0 MB; left 1: weight is not sparse x1")


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        SparseLinearConfig(),
        SparseLinearConfig(sparsity=0.5, activation_group=64),
        SparseLinearConfig(dtype="bf16", sparsity=0.5, granularity="layer", layout="sparse"),
        SparseLinearConfig(dtype="int4"),
        SparseLinearConfig(dtype="int4", sparsity=0.5, group_size=64, symmetric=True),
    ],
)
def test_the_linear_option_gives_what_swap_linear_gives(config, log):
    model, x = nn.Sequential(Block(), Block()), torch.randn(3, 32)
    want = tce.swap_linear(copy.deepcopy(model), config)(x)
    assert not torch.allclose(want, model(x))
    for option in (config, config.to_dict()):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, {"linear": option})(x), want)
    assert len(log()) == 2
    assert all(line.startswith(f"packed 4 of 4 linear layers ({config.dtype})") for line in log())


@torch.no_grad()
def test_a_graph_without_linear_layers_is_inductors_business(log):
    x = torch.randn(3)
    torch.testing.assert_close(compiled(torch.sin)(x), x.sin())
    assert log() == ["packed 0 of 0 linear layers"]


@torch.no_grad()
def test_batch_sizes_need_no_graphs_of_their_own(packings):
    model = prune(Block())
    run = compiled(model, dynamic=True)
    for batch in (1, 2, 3, 8, 5):
        x = torch.randn(batch, 7, 32)
        torch.testing.assert_close(run(x), model(x))
    assert counters["stats"]["unique_graphs"] <= 2  # Dynamo gives size 1 a graph of its own
    assert packings == ["fp32"] * 2


@torch.no_grad()
def test_graphs_of_the_same_weight_share_what_is_packed(packings):
    model = prune(Block())
    for dynamic in (False, True):
        run = compiled(model, dynamic=dynamic)
        for batch in (2, 3):
            run(torch.randn(batch, 32))
    assert counters["stats"]["unique_graphs"] >= 3
    assert packings == ["fp32"] * 2
    compiled(model, {"linear": SparseLinearConfig()})(torch.randn(2, 32))
    assert packings == ["fp32"] * 2 + ["int8"] * 2


def test_training_is_left_alone(log):
    model, x = prune(Block()), torch.randn(3, 32)
    compiled(model)(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])
    assert log() == ["packed 0 of 2 linear layers; left 2: weight trains x2"]


def test_a_bias_trains_on_a_frozen_weight():
    model = prune(Block())
    model.up.weight.requires_grad_(False)
    model.down.weight.requires_grad_(False)
    x = torch.randn(3, 32, requires_grad=True)
    leaves = [x, model.up.bias, model.down.bias]
    with torch.inference_mode():  # packed here first
        compiled(model)(x)
    got = torch.autograd.grad(compiled(model)(x).square().sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(model(x).square().sum(), leaves))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.up.weight.mul_(torch.rand(48, 32) > 0.5),  # packed: another length
        lambda model: setattr(model.up, "weight", nn.Parameter(torch.randn(48, 32))),
        lambda model: setattr(model.up.weight, "data", torch.randn(48, 32)),
        lambda model: model.load_state_dict(Block().state_dict()),
    ],
    ids=["in place", "replaced", "data", "load_state_dict"],
)
def test_a_changed_weight_is_packed_anew(change):
    model, x = prune(Block()), torch.randn(3, 32)
    run = compiled(model)
    run(x)
    change(model)
    torch.testing.assert_close(run(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_weights_of_inference_mode_are_packed():
    with torch.inference_mode():
        model, x = prune(Block()), torch.randn(3, 32)
        torch.testing.assert_close(compiled(model)(x), model(x))


@torch.no_grad()
def test_layers_that_share_a_graph_use_their_own_weights(log, packings):
    model, x = prune(nn.Sequential(*[Block() for _ in range(4)])), torch.randn(3, 32)
    want = model(x)
    for block in model:
        block.compile(backend="torch_cpu_ext", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(model(x), want)
    assert len(log()) == 1
    assert len(packings) == 8


@torch.no_grad()
def test_reset_frees_what_is_packed(monkeypatch):
    made = []
    monkeypatch.setattr(packs.ops, "pack", lambda *a, _pack=packs.ops.pack, **kw: (p := _pack(*a, **kw), made.append(weakref.ref(p)))[0])
    model = prune(Block())
    run = compiled(model)
    run(torch.randn(3, 32))
    assert [ref() is not None for ref in made] == [True, True]
    del run
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in made] == [None, None]


@torch.no_grad()
def test_the_graph_does_not_keep_the_weights_alive():
    model = prune(Block())
    weight = weakref.ref(model.up.weight)
    run = compiled(model)
    run(torch.randn(3, 32))
    model.up.weight = nn.Parameter(model.up.weight.clone())
    run(torch.randn(3, 32))
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_options_and_modes_are_inductors():
    config, patches = _options("max-autotune", {"max-fusion-size": 3, "linear": {"dtype": "bf16"}})
    assert config == SparseLinearConfig(dtype="bf16")
    assert patches["max_fusion_size"] == 3
    assert torch._inductor.list_mode_options("max-autotune").items() <= patches.items()
    model, x = prune(Block()), torch.randn(3, 32)
    torch.testing.assert_close(compiled(model, mode="max-autotune")(x), model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, {"freezing": True})(x), model(x))
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linaer": None}, "options must be 'linear' and those of torch._inductor.list_options.., got linaer; did you mean linear?"),
        ({"linear": "int8"}, r"options\['linear'\] must be a SparseLinearConfig or its to_dict.., got str"),
        ({"linear": {"dtype": "int3"}}, "dtype must be one of fp32, bf16, int8, int4, got 'int3'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(nn.Linear(4, 4), options)(torch.randn(1, 4))


def test_a_wrong_mode_is_an_error():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Unrecognized mode"):
        compiled(nn.Linear(4, 4), mode="fastest")(torch.randn(1, 4))


@torch.no_grad()
def test_the_function_works_where_no_entry_point_is_installed(log):
    model, x = prune(Block()), torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(model, backend=module_backend)(x), model(x))
    assert log()[0].startswith("packed 2 of 2")


@torch.no_grad()
def test_graph_breaks_leave_correct_pieces(log):
    block, x = prune(Block()), torch.randn(3, 32)

    def function(x):
        x = block.up(x)
        torch._dynamo.graph_break()
        return block.down(x)

    torch.testing.assert_close(torch.compile(function, backend="torch_cpu_ext")(x), function(x))
    assert len(log()) == 2
