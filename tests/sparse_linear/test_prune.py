"""prune on whole models: which layers, in which order, with which inputs; interruptions."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.sparse_linear import blocks, obs, pruner, unpack

from support import ROOT, run_python, succeeded

VOCABULARY = 64


def tokens(batch=2, length=24):
    return torch.randint(VOCABULARY, (batch, length))


class Residual(nn.Module):
    """A block that changes its input in place, as some models do."""

    def __init__(self, size=32):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size, bias=False)

    def forward(self, x, scale):
        x += self.down(torch.relu(self.up(x))) * scale
        return x


class Stacked(nn.Module):
    """Embedding, blocks with arguments of their own, head; dropout, which calibration must not use."""

    def __init__(self, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.dropout = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        x = self.dropout(self.embedding(ids))
        for index, block in enumerate(self.blocks):
            x = block(x, scale=1.0 / (1 + index))
        return self.head(x)


@pytest.fixture
def model():
    return Stacked().eval()


@pytest.fixture
def items():
    return [tokens() for _ in range(6)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def make(name):
    """(model, inputs, stacks of blocks, layers that stay)."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": VOCABULARY}
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            **size,
        )
        return transformers.LlamaForCausalLM(config), tokens, [2], {"lm_head"}
    if name == "bert":
        config = transformers.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **size)
        return transformers.BertModel(config), lambda: {"input_ids": tokens(), "attention_mask": torch.ones(2, 24)}, [2], {"pooler.dense"}
    if name == "gemma3":  # masks and positions differ between layers
        config = transformers.Gemma3TextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **size
        )  # fmt: skip
        return transformers.Gemma3ForCausalLM(config), tokens, [3], {"lm_head"}
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0, **size)
    return transformers.T5ForConditionalGeneration(config), lambda: {"input_ids": tokens(), "labels": tokens(2, 8)}, [2, 2], {"lm_head"}


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3", "t5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_models_people_have(name, method):
    model, inputs, stacks, kept = make(name)
    items = [inputs() for _ in range(4)]
    before = weights(model)
    with blocks.calibrating(model):
        assert [len(stack) for stack in blocks.find_stacks(model, items[0])] == stacks
    report = tce.prune(model, items, tce.PruneConfig(method=method))
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {row.name for row in report.rows} == linears - kept
    assert report.kept.keys() == kept
    for row in report.rows:
        weight = model.get_submodule(row.name).weight
        assert row.sparsity == pytest.approx(0.5, abs=0.01)
        assert (weight == 0).float().mean() == pytest.approx(row.sparsity)
        assert 0 < row.error < 0.5
    after = weights(model)
    assert all(after[n].equal(before[n]) for n in before if n.removesuffix(".weight") not in linears - kept)
    optimized = tce.report(tce.optimize(model, tce.SparseLinearConfig(dtype="bf16", layout="sparse")))
    packed = {row.name: row.detail for row in optimized.rows}
    assert all("sparsity 0.50" in packed[name] for name in linears - kept)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3", "t5"])
def test_blocks_see_what_they_see_in_the_model(name):
    """The Hessians of each stage are those of a plain run of the model as it is at that time."""
    model, inputs, _, _ = make(name)
    items = [inputs() for _ in range(3)]
    seen = []
    take = pruner.Gram.take

    def spy(gram):
        for names, total in take(gram):
            plain = {name: torch.zeros_like(total) for name in names}

            def hook(name, plain=plain):
                def add(module, args):
                    rows = args[0].reshape(-1, args[0].shape[-1])
                    plain[name] += rows.T @ rows

                return add

            handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
            for item in items:
                blocks.call(model, item)
            for handle in handles:
                handle.remove()
            for name in names:
                torch.testing.assert_close(total, plain[name], rtol=1e-4, atol=1e-4)
            seen.extend(names)
            yield names, total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruner.Gram, "take", spy)
        report = tce.prune(model, items, tce.PruneConfig())
    assert sorted(seen) == sorted(row.name for row in report.rows)


def test_layers_with_one_input_share_a_hessian(monkeypatch):
    model, inputs, _, _ = make("llama")
    calls = []
    factor = pruner.inverse_factor
    monkeypatch.setattr(pruner, "inverse_factor", lambda *a: calls.append(a) or factor(*a))
    tce.prune(model, [inputs()], tce.PruneConfig())
    assert len(calls) == 2 * 4  # q, k and v; o; gate and up; down


def test_blocks_that_change_their_input_in_place(model, items):
    """The errors of each layer are right only if nothing changed the kept outputs."""
    reference = copy.deepcopy(model)
    before = weights(model)
    report = tce.prune(model, items, tce.PruneConfig())
    errors = {row.name: row.error for row in report.rows}
    seen = []
    for number in range(3):  # as it was when block `number` was pruned
        state = {n: t if int(n.split(".")[1]) < number else before[n] for n, t in weights(model).items() if n.startswith("blocks")}
        reference.load_state_dict(before | state)
        layer = reference.blocks[number].up
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        with torch.no_grad():
            x = torch.cat([(reference(item), seen.pop())[1].reshape(-1, 32) for item in items])
        handle.remove()
        old, new = before[f"blocks.{number}.up.weight"], model.blocks[number].up.weight
        expected = (x @ (new - old).T).square().sum() / (x @ old.T).square().sum()
        assert errors[f"blocks.{number}.up"] == pytest.approx(expected.item(), rel=1e-3)


def test_beats_pruning_without_data(model, items):
    """End to end, on what the model computes."""
    outputs = {}
    with torch.no_grad():
        before = torch.cat([model(item) for item in items])
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = copy.deepcopy(model)
        tce.prune(pruned, items, tce.PruneConfig(method=method))
        with torch.no_grad():
            outputs[method] = float((torch.cat([pruned(item) for item in items]) - before).square().mean())
    assert outputs["sparsegpt"] < outputs["wanda"]
    assert outputs["sparsegpt"] < outputs["magnitude"]


def test_models_without_blocks_are_one():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    report = tce.prune(model, [torch.randn(50, 16)], tce.PruneConfig())
    assert [row.name for row in report.rows] == ["0", "2"]
    layer = nn.Linear(16, 8)
    report = tce.prune(layer, [torch.randn(50, 16)], tce.PruneConfig())
    assert [row.name for row in report.rows] == [""]
    assert "(model)" in str(report)
    assert (layer.weight == 0).sum() == 64


def test_lists_that_are_no_blocks():
    """Without blocks, all layers are pruned: a trunk must not stay because its heads look alike."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            return [head(self.trunk(x)) for head in self.heads]

    model = Heads()
    assert not blocks.repeated(model)
    assert len(tce.prune(model, [torch.randn(50, 8)], tce.PruneConfig()).rows) == 4


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_choice_of_layers_needs_no_data(model, items, calibrated):
    report = tce.prune(model, items if calibrated else None, tce.PruneConfig(method="magnitude"))
    assert [row.name for row in report.rows] == [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert report.kept == {"head": "it is outside of the repeated blocks; include= names it to prune it"}


def test_parallel_branches_are_no_stack():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    model = Branches()
    with torch.no_grad():
        assert blocks.find_stacks(model, torch.randn(2, 8)) == []
    assert len(tce.prune(model, [torch.randn(50, 8)], tce.PruneConfig()).rows) == 3


@pytest.mark.parametrize("fast", [True, False])
def test_pytorch_encoder(fast):
    """Its fast path calls no Linear; hooks must switch it off."""
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
        report = tce.prune(model, [torch.randn(4, 10, 32)], tce.PruneConfig())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [row.name for row in report.rows] == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]


def test_include_reaches_layers_outside_the_blocks(model, items):
    report = tce.prune(model, items, tce.PruneConfig(), include=["head", "blocks.1"])
    assert [row.name for row in report.rows] == ["blocks.1.up", "blocks.1.down", "head"]
    assert model.blocks[0].up.weight.count_nonzero() == 64 * 32
    report = tce.prune(Stacked(), items, tce.PruneConfig(), exclude=re.compile("down"), filter_fn=lambda module, name: "0" not in name)
    assert [row.name for row in report.rows] == ["blocks.1.up", "blocks.2.up"]
    with pytest.raises(ValueError, match="prune: include must fit the name of a module, got 'nothing'"):
        tce.prune(model, items, include="nothing")


def test_tied_weights_stay(items):
    model = Stacked()
    model.head.weight = model.embedding.weight
    before = model.head.weight.clone()
    report = tce.prune(model, items, tce.PruneConfig(), include=["head", "blocks"])
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.equal(before)
    assert report.kept == {"head": "its weight is shared with another module"}


def test_layers_that_are_not_reached_stay(items, tmp_path):
    model = Stacked()
    model.blocks[1].unused = nn.Linear(32, 32)
    for _ in range(2):
        report = tce.prune(model, items, tce.PruneConfig(), resume=tmp_path)
        assert report.kept["blocks.1.unused"] == "the calibration data does not reach it"
        assert model.blocks[1].unused.weight.count_nonzero() == 32 * 32


def test_budgets_by_layer(model, items):
    config = tce.PruneConfig(sparsity=0.25, layer_sparsity={r"^blocks\.0\.": 0.0, "up$": 0.75})
    report = tce.prune(model, items, config)
    assert {row.name: row.sparsity for row in report.rows} == {
        "blocks.0.up": 0.0, "blocks.0.down": 0.0, "blocks.1.up": 0.75, "blocks.1.down": 0.25, "blocks.2.up": 0.75, "blocks.2.down": 0.25,
    }  # fmt: skip
    assert report.rows[0].method == "nothing"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_grids_stay_on_the_layers(items, kind, quantize):
    model = Stacked().to(kind)
    tce.prune(model, items, tce.PruneConfig(quantize=quantize))
    for block in model.blocks:
        for layer in (block.up, block.down):
            grid = layer.quantization_grid
            assert grid.dtype == quantize
            assert grid.round(layer.weight).to(kind).equal(layer.weight)
            assert layer.weight.dtype == kind
    assert not hasattr(model.head, "quantization_grid")
    tce.prune(model, items, tce.PruneConfig())
    assert not hasattr(model.blocks[0].up, "quantization_grid")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("quantize_method", ["nearest", "gptq"])
@pytest.mark.parametrize(
    ("quantize", "group_size", "symmetric"), [("int8", 32, False), ("int4", 32, False), ("int4", 64, False), ("int4", 128, True)]
)
def test_packing_loses_nothing_more(items, kind, sparsity, quantize_method, quantize, group_size, symmetric):
    """The packed weights are the values of the grid, whatever the config says of groups."""
    model = Stacked().to(kind)
    config = tce.PruneConfig(
        sparsity=sparsity, quantize=quantize, quantize_method=quantize_method, group_size=group_size, symmetric=symmetric
    )
    tce.prune(model, items, config)
    expected = {
        f"blocks.{i}.{name}": getattr(block, name).quantization_grid.round(getattr(block, name).weight)
        for i, block in enumerate(model.blocks)
        for name in ("up", "down")
    }
    tce.optimize(model, tce.SparseLinearConfig(dtype=quantize))
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert layer.layout == ("sparse" if sparsity else "dense")
        torch.testing.assert_close(unpack(layer.packed, *weight.shape), weight, rtol=1e-6, atol=0)
        assert layer.weight.equal(weight.to(kind))


def test_a_grid_of_other_weights_is_not_used(items):
    model = Stacked()
    tce.prune(model, items, tce.PruneConfig(quantize="int4"))
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(1.01)
    for layer in (model.blocks[0].up, model.blocks[0].down):
        again = nn.Linear(layer.in_features, layer.out_features)
        again.weight = layer.weight
        packed, plain = (tce.SparseLinear.from_linear(one, tce.SparseLinearConfig(dtype="int4")).packed for one in (layer, again))
        assert packed.equal(plain) == (layer is model.blocks[0].up)
    # a config that prunes has no use for it either
    tce.SparseLinear.from_linear(model.blocks[1].up, tce.SparseLinearConfig(dtype="int4", sparsity=0.7))


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back(items, training):
    model, inputs, _, _ = make("llama")
    model.train(training)
    tce.prune(model, [inputs() for _ in range(3)], tce.PruneConfig())
    for module in model.modules():
        assert module.training == training
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    tce.prune(model, [inputs()], tce.PruneConfig(method="wanda")).to_dict()


def test_calibration_runs_without_dropout(items):
    state = Stacked().state_dict()
    results = []
    for _ in range(2):
        model = Stacked().train()
        model.load_state_dict(state)
        tce.prune(model, items)
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_gradient_modes(items, mode):
    with mode():
        assert len(tce.prune(Stacked(), (item for item in items)).rows) == 6


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("anew", [True, False], ids=["reloaded", "as it was left"])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, items, method, stop, anew):
    config = tce.PruneConfig(method=method, quantize="int4", block_size=32)
    model = Stacked()
    before = weights(model)
    expected = copy.deepcopy(model)
    report = tce.prune(expected, items, config)

    calls = []
    do = pruner.prune_weight

    def interrupted(*arguments):
        if len(calls) == 2 * stop + 1:
            raise KeyboardInterrupt
        calls.append(1)
        return do(*arguments)

    monkeypatch.setattr(pruner, "prune_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tce.prune(model, items, config, resume=tmp_path / "run")
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == stop == len(list((tmp_path / "run").iterdir()))
    state = weights(model)
    assert all(state[f"blocks.{i}.up.weight"].equal(before[f"blocks.{i}.up.weight"]) == (i >= stop) for i in range(3))
    if anew:
        model.load_state_dict(before)
        model = copy.deepcopy(model)
    calls.clear()
    monkeypatch.setattr(pruner, "prune_weight", lambda *a: calls.append(1) or do(*a))
    resumed = tce.prune(model, items, config, resume=tmp_path / "run")
    assert len(calls) == 6 - 2 * stop
    assert same(weights(model), weights(expected))
    assert resumed == report
    assert model.blocks[0].up.quantization_grid.scale.equal(expected.blocks[0].up.quantization_grid.scale)
    calls.clear()
    assert tce.prune(model, items, config, resume=tmp_path / "run") == report
    assert not calls


def test_resume_refuses_another_run(tmp_path, items):
    model = Stacked()
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    tce.prune(model, items, resume=tmp_path)

    def again(change=lambda model: None, items=items, config=None, **options):
        other = Stacked()
        other.load_state_dict(before)
        change(other)
        return tce.prune(other, items, config, resume=tmp_path, **options)

    assert again()
    message = "prune: resume must be a folder of the same model, calibration data, config and version"
    for arguments in (
        {"config": tce.PruneConfig(sparsity=0.6)},
        {"items": items[1:]},
        {"items": [item + 0 if i else (item + 1) % VOCABULARY for i, item in enumerate(items)]},
        {"change": lambda model: nn.init.zeros_(model.blocks[0].up.weight)},
        {"change": lambda model: nn.init.zeros_(model.head.bias)},
        {"exclude": "blocks.2"},
    ):
        with pytest.raises(ValueError, match=message):
            again(**arguments)
    (tmp_path / "block-00001.safetensors").write_bytes(b"no file")
    with pytest.raises(tce.CorruptFileError, match=r"block-00001.safetensors is damaged"):
        again()


def test_a_block_is_changed_whole_or_not_at_all(monkeypatch, model, items):
    before = weights(model)
    do = obs.surgery
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no memory")
        return do(*arguments, **options)

    monkeypatch.setattr(pruner, "surgery", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        tce.prune(model, items)
    changed = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert changed == {"blocks.0.up.weight", "blocks.0.down.weight"}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("calibration", [None, []])
def test_calibration_data_is_needed(model, method, calibration):
    with pytest.raises(ValueError, match=f"prune: calibration must hold at least one input for {method}, got none"):
        tce.prune(model, calibration, tce.PruneConfig(method=method))
    with pytest.raises(ValueError, match="at least one input for gptq"):
        tce.prune(model, calibration, tce.PruneConfig(method="magnitude", quantize="int4"))
    assert len(tce.prune(model, calibration, tce.PruneConfig(method="magnitude")).rows) == 6


def test_refuses(model, items):
    with pytest.raises(TypeError, match="calibration must be an iterable of model inputs, got one Tensor; put it into a list"):
        tce.prune(model, items[0])
    with pytest.raises(TypeError, match="calibration must hold tensors or dictionaries of keyword arguments, got list"):
        tce.prune(model, [[1, 2, 3]])
    with pytest.raises(TypeError, match=r"prune: model must be an nn.Module, got str"):
        tce.prune("model", items)
    with pytest.raises(ValueError, match=r"prune: blocks.0.up: in_features must be a multiple of 24 for the pattern 12:24, got 32"):
        tce.prune(model, items, tce.PruneConfig(pattern="12:24", block_size=48))
    with torch.no_grad():
        model.blocks[2].up.weight[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(ValueError, match=r"prune: blocks.2.up: weight must be finite, got NaN or an infinity"):
        tce.prune(model, items)
    assert torch.equal(weights(model)["blocks.0.up.weight"], before["blocks.0.up.weight"])


def test_calibration_data_that_overflows(items):
    model = Stacked()
    with torch.no_grad():
        model.embedding.weight.fill_(1e30)
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(ValueError, match=r"prune: blocks.0.up: its inputs must be finite"):
            tce.prune(model, items, tce.PruneConfig(method=method))


def test_windows_of_text():
    def tokenizer(text):
        return {"input_ids": list(range(len(text)))}

    windows = tce.calibration_from_text(tokenizer, ["a" * 50, "b" * 48], samples=4, length=10)
    assert [w.shape for w in windows] == [(1, 10)] * 4
    assert [int(w[0, 0]) for w in windows] == [0, 20, 50, 70]
    assert windows[0].dtype == torch.int64
    with pytest.raises(ValueError, match=r"must have samples \* length = 200 tokens or more, got 102"):
        tce.calibration_from_text(tokenizer, ["a" * 50, "b" * 50], samples=20, length=10)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        tce.calibration_from_text(tokenizer, ["a"], samples=0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_optimize_knows_patterns(pattern):
    n, m = map(int, pattern.split(":"))
    layer = tce.optimize(nn.Linear(64, 16), tce.SparseLinearConfig(dtype="fp32", sparsity=1 - n / m, pattern=pattern))
    assert (layer.weight.view(16, -1, m).count_nonzero(2) == n).all()
    assert layer.layout == "structured"
    assert layer.pattern == pattern
    for sparsity in (0.3, 0.9):
        with pytest.raises(ValueError, match=f"SparseLinearConfig: sparsity must be .* or None for the pattern {pattern}"):
            tce.SparseLinearConfig(sparsity=sparsity, pattern=pattern)
    with pytest.raises(ValueError, match="SparseLinearConfig: pattern must be unstructured or n:m"):
        tce.SparseLinearConfig(sparsity=0.5, pattern="4:2")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_no_more_than_a_block_is_twice_in_memory(method):
    """The peak of the process, mapped files included, stays near the size of the model."""
    code = """
        import sys, torch, torch_cpu_ext as tce
        from torch import nn
        from support import forget_peak, peak_bytes
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(256, 8192, bias=False)
            def forward(self, x):
                return self.linear(x)[..., :256]
        config, items = tce.PruneConfig(method=sys.argv[1]), None if sys.argv[1] == "magnitude" else [torch.randn(64, 256)]
        tce.prune(nn.Sequential(Block(), Block()), items, config)  # loads all the code there is
        large = nn.Sequential(*(Block() for _ in range(24)))
        size = sum(p.nbytes for p in large.parameters())
        before = forget_peak()
        report = tce.prune(large, items, config)
        print(len(report.rows), size, peak_bytes() - before)
    """
    layers, size, grown = map(int, succeeded(run_python(code, method, OMP_NUM_THREADS="1")).split())
    assert layers == 24
    assert size > 200e6
    assert grown < 0.5 * size, f"{grown / 1e6:.0f} MB more, model {size / 1e6:.0f} MB"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("pruning-*.json")), ids=lambda file: file.stem)
def test_measured_methods_rank(file):
    """What the manual says of a real model: SparseGPT beats Wanda, Wanda beats magnitude."""
    rows = {(row["config"]["dtype"], row["config"]["sparsity"], row["config"]["method"]): row for row in json.loads(file.read_text())}
    assert {("bf16", 0.5, method) for method in ("magnitude", "wanda", "sparsegpt")} <= rows.keys()
    for (dtype, sparsity, method), row in rows.items():
        better = {"magnitude": "wanda", "wanda": "sparsegpt"}.get(method)
        if sparsity == 0.5 and (dtype, sparsity, better) in rows:
            for text in ("python docs", "prose"):
                assert rows[dtype, sparsity, better][text] < row[text]
