"""Saving and loading optimized models: everything comes back, damage is told, a failure leaves file and model as they were."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import torch_cpu_ext as tce


class Model(nn.Module):
    def __init__(self, tied=True, size=20):
        super().__init__()
        self.embed = nn.Embedding(30, size)
        self.body = nn.Sequential(nn.Linear(size, 40), nn.ReLU(), nn.Linear(40, size, bias=False), nn.BatchNorm1d(size))
        self.head = nn.Linear(size, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


TOKENS = torch.arange(12)
CONFIGS = [
    None,
    tce.SparseLinearConfig(dtype="fp32"),
    tce.SparseLinearConfig(dtype="int8", sparsity=0.5, activation_group=64),
    tce.SparseLinearConfig(dtype="int4", group_size=64, symmetric=True),
]


def make(config=CONFIGS[2], **arguments):
    model = Model(**arguments).eval()
    return model if config is None else tce.optimize(model, config)


def snapshot(model):
    return {name: id(m) for name, m in model.named_modules()}, {name: (id(t), t.clone()) for name, t in tensors(model).items()}


def tensors(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def unchanged(model, before):
    now = snapshot(model)
    return now[0] == before[0] and all(i == now[1][n][0] and (t.is_meta or t.equal(now[1][n][1])) for n, (i, t) in before[1].items())


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=["not optimized", "fp32", "int8", "int4"])
def test_round_trip(config, tied, meta, tmp_path):
    model = make(config, tied=tied)
    tce.save_checkpoint(model, tmp_path / "model.safetensors")
    with torch.device("meta" if meta else "cpu"):
        fresh = Model(tied).eval()
    loaded = tce.load_checkpoint(fresh, tmp_path / "model.safetensors")
    assert loaded is fresh
    assert loaded(TOKENS).equal(model(TOKENS))
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert all(t.equal(tensors(model)[name]) and t.dtype == tensors(model)[name].dtype for name, t in tensors(loaded).items())
    assert str(tce.report(loaded)) == str(tce.report(model)).replace(", original kept or tied", "")
    assert not [m for m in loaded.modules() if m.training]
    if config is None:
        assert (loaded.head.weight is loaded.embed.weight) == tied
    restored = tce.restore(loaded)
    assert type(restored.head) is nn.Linear
    restored(TOKENS)


def test_str_path_and_default_permissions(tmp_path):
    """The file can be read by whom other new files can."""
    path = os.path.join(tmp_path, "model.safetensors")
    tce.save_checkpoint(make(), path)
    open(tmp_path / "other", "w").close()
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(tmp_path / "other").st_mode)
    tce.load_checkpoint(Model(), path)


def test_the_model_itself_replaced(tmp_path):
    layer = tce.optimize(nn.Linear(8, 6), tce.SparseLinearConfig(dtype="bf16"))
    tce.save_checkpoint(layer, tmp_path / "f")
    loaded = tce.load_checkpoint(nn.Linear(8, 6, device="meta"), tmp_path / "f")
    assert isinstance(loaded, tce.SparseLinear)
    assert loaded(torch.ones(8)).equal(layer(torch.ones(8)))


def test_tied_weights_are_stored_once(tmp_path):
    tce.save_checkpoint(make(None), tmp_path / "f")
    assert {"embed.weight", "head.weight"} & set(load_file(tmp_path / "f")) == {"embed.weight"}


def test_views_of_one_storage(tmp_path):
    """Parts of one tensor, overlapping or not, other dtypes of the same bytes, transposed and expanded ones."""
    base = torch.randn(6, 4)
    model = nn.Module()
    for name, value in {
        "whole": base,
        "upper": base[:3],
        "lower": base[3:],
        "overlap": base[1:4],
        "transposed": base.T,
        "bits": base.view(torch.int32),
        "repeated": base[:1].expand(6, 4),
        "empty": base[:0],
        "scalar": base[0, 0],
    }.items():
        model.register_buffer(name, value)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tce.save_checkpoint(model, tmp_path / "f")
    assert model.upper.data_ptr() == model.whole.data_ptr()  # the model still has its views
    fresh = nn.Module()
    for name, value in before.items():
        fresh.register_buffer(name, torch.zeros_like(value))
    tce.load_checkpoint(fresh, tmp_path / "f")
    for name, value in fresh.state_dict().items():
        assert value.dtype == before[name].dtype
        assert value.equal(before[name]), name


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")

    def broken(tensors, filename, metadata=None):
        type(path)(filename).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        tce.save_checkpoint(make(), path)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(OSError, match="nowhere"):
        tce.save_checkpoint(make(), tmp_path / "nowhere" / "f")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_file(keep, tmp_path):
    tce.save_checkpoint(make(), tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data[:keep])
    model = Model()
    before = snapshot(model)
    with pytest.raises(tce.CorruptFileError, match=str(tmp_path / "f")):
        tce.load_checkpoint(model, tmp_path / "f")
    assert unchanged(model, before)


def test_foreign_files(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "plain")
    with pytest.raises(tce.CorruptFileError, match="was not written by torch_cpu_ext"):
        tce.load_checkpoint(Model(), tmp_path / "plain")
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    with pytest.raises(tce.CorruptFileError):
        tce.load_checkpoint(Model(), tmp_path / "text")
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(tce.CorruptFileError):
        tce.load_checkpoint(Model(), tmp_path / "pickle")
    with pytest.raises(FileNotFoundError):
        tce.load_checkpoint(Model(), tmp_path / "missing")


def rewrite(path, change, tensors=None):
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["torch_cpu_ext"])
    result = change(metadata)
    save_file(tensors or load_file(path), path, {"torch_cpu_ext": result if isinstance(result, str) else json.dumps(result)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 2}, "format must be at most 1, got 2; a newer torch_cpu_ext wrote it"),
        (lambda m: m | {"modules": {"head": {"class": "FutureLinear"}}}, "head is a FutureLinear, which this version does not know"),
        (lambda m: "{not json", ""),
        (lambda m: "[]", ""),
        (lambda m: {"format": 1}, ""),
        (lambda m: m | {"format": "1"}, ""),
        (lambda m: m | {"modules": {"head": {"class": "SparseLinear", "surprise": 1}}}, ""),
        (lambda m: m | {"modules": {"head": {"class": "SparseLinear"}}}, ""),
        (lambda m: m | {"modules": {"head": m["modules"]["head"] | {"dtype": "int3"}}}, ""),
        (lambda m: m | {"modules": {"head": m["modules"]["head"] | {"weight_dtype": "nonsense"}}}, ""),
        (lambda m: m | {"shared": {"head.other": "nothing"}}, ""),
    ],
)
def test_damaged_metadata(change, message, tmp_path):
    """A CorruptFileError that names the file, and a model as it was."""
    path = tmp_path / "f"
    tce.save_checkpoint(make(), path)
    rewrite(path, change)
    model = Model()
    before = snapshot(model)
    with pytest.raises(tce.CorruptFileError) as caught:
        tce.load_checkpoint(model, path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("meta", [False, True])
def test_a_damaged_packed_weight_leaves_the_model_as_it_was(meta, tmp_path):
    """Though it is found when other modules, before it, could have been loaded."""
    path = tmp_path / "f"
    tce.save_checkpoint(make(tied=False), path)
    values = load_file(path)
    values["head.packed"][70] ^= 1
    rewrite(path, lambda m: m, values)
    with torch.device("meta" if meta else "cpu"):
        model = Model(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"load_checkpoint: (?s:.*)packed must be intact"):
        tce.load_checkpoint(model, path)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Model(size=24), "must be"),
        (lambda: nn.Sequential(Model()), "model must have a module 'body.0', as the file does"),
        (lambda: nn.ModuleDict({"body": nn.Sequential(nn.Linear(20, 40))}), "model must have a module"),
    ],
)
def test_another_architecture(other, message, tmp_path):
    tce.save_checkpoint(make(), tmp_path / "f")
    model = other()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        tce.load_checkpoint(model, tmp_path / "f")
    assert unchanged(model, before)


def test_missing_and_unknown_tensors(tmp_path):
    path = tmp_path / "f"
    tce.save_checkpoint(make(tied=False), path)
    model = Model(False)
    before, values = snapshot(model), load_file(path)
    rewrite(path, lambda m: m, {name: v for name, v in values.items() if name != "embed.weight"})
    with pytest.raises(ValueError, match=r"lacks embed\.weight"):
        tce.load_checkpoint(model, path)
    rewrite(path, lambda m: m, values | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks extra"):
        tce.load_checkpoint(model, path)
    assert unchanged(model, before)
