"""Crossovers between kernels: measured once, kept, and used."""

import json
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_cpu_ext as tce
from torch_cpu_ext.core import measured
from torch_cpu_ext.sparse_linear import tune as function
from torch_cpu_ext.sparse_linear.tune import ROWS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    tce.load("sparse_linear")  # from the usual cache
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """Shapes measured, of which the answer is made up."""
    seen = []
    module = __import__(function.__module__, fromlist=["_measure"])
    monkeypatch.setattr(module, "_measure", lambda layers: seen.append(len(layers)) or 6)
    return seen


def model():
    layers = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 48))
    return tce.optimize(layers, tce.SparseLinearConfig(dtype="bf16"))


def test_measured_for_each_shape_and_results_stay_the_same():
    one = model()
    x = torch.randn(6, 64)
    before = one(x)
    found = tce.tune(one)
    assert set(found) == {"bf16 dense 48x64 float32", "bf16 dense 64x48 float32"}
    assert all(rows in (1, *ROWS) for rows in found.values())
    down, up = found["bf16 dense 48x64 float32"], found["bf16 dense 64x48 float32"]
    assert [layer.stream_rows for layer in one] == [down, up, down]
    torch.testing.assert_close(one(x), before)


def test_kept_for_the_next_process(counted, folder):
    assert tce.tune(model()) == {"bf16 dense 48x64 float32": 6, "bf16 dense 64x48 float32": 6}
    assert counted == [2, 1]
    assert tce.tune(model())["bf16 dense 48x64 float32"] == 6
    assert counted == [2, 1]
    tce.tune(model(), again=True)
    assert counted == [2, 1, 2, 1]
    with tce.isa("scalar"):  # measured under other conditions
        tce.tune(model())
    assert len(counted) == 6
    assert [path.name for path in folder.iterdir()] == ["tune.json"]
    assert len(json.loads((folder / "tune.json").read_text())["values"]) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2, "values": {}}', '{"format": 1, "values": {"a": "b"}}'])
def test_a_damaged_file_is_ignored_and_replaced(text, counted, folder, caplog):
    (folder / "tune.json").write_text(text)
    with caplog.at_level(logging.WARNING, "torch_cpu_ext.measured"):
        assert tce.tune(model())["bf16 dense 48x64 float32"] == 6
    assert "is not used" in caplog.text
    assert len(measured.load("tune")) == 2


def test_a_folder_that_cannot_be_written(counted, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert tce.tune(model())["bf16 dense 48x64 float32"] == 6
    assert "cannot be written" in caplog.text


class Numbers(TorchDispatchMode):
    """What products are called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("torch_cpu_ext::sparse_linear"):
            self.seen.append((kwargs or {}).get("stream_rows", 0))
        return func(*args, **kwargs or {})


def test_the_number_reaches_the_op():
    one = tce.SparseLinear.from_linear(nn.Linear(256, 64), tce.SparseLinearConfig(dtype="bf16"))
    x = torch.randn(3, 256)
    product = torch.ops.torch_cpu_ext.sparse_linear
    with Numbers() as numbers:
        for rows in (0, 1, 16):
            one.stream_rows = rows
            assert one(x).equal(product(x, one.packed, one.bias, 64, stream_rows=rows))
    assert numbers.seen == [0, 0, 1, 1, 16, 16]


def test_nothing_to_tune():
    with pytest.raises(ValueError, match="tune: model must have packed layers"):
        tce.tune(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tune: model must have weights"):
        tce.tune(tce.SparseLinear(4, 4))
