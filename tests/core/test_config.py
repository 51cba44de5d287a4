"""Configs: frozen, checked, and plain dictionaries for files."""

import dataclasses
import json
import pickle

import pytest

import torch_cpu_ext as tce
from torch_cpu_ext.core.config import Config
from torch_cpu_ext.core.swap import _HANDLERS

CONFIGS = pytest.mark.parametrize("kind", _HANDLERS, ids=lambda kind: kind.__name__)


@CONFIGS
def test_round_trip(kind):
    config = kind()
    values = json.loads(json.dumps(config.to_dict()))
    assert values["config"] == kind.__name__
    assert values["version"] == kind.version
    assert kind.from_dict(values) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(kind())


@CONFIGS
def test_frozen(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, 1)


@CONFIGS
def test_every_field_is_documented(kind):
    for field in dataclasses.fields(kind):
        assert f"{field.name}:" in kind.__doc__


@CONFIGS
def test_from_dict_refuses(kind):
    with pytest.raises(ValueError, match=f"config must be {kind.__name__}, got Other"):
        kind.from_dict({"config": "Other"})
    with pytest.raises(ValueError, match=f"version must be at most {kind.version}, got 99; a newer torch_cpu_ext wrote it"):
        kind.from_dict(kind().to_dict() | {"version": 99})
    with pytest.raises(ValueError, match=f"fields must be those of {kind.__name__}, got colour, size"):
        kind.from_dict({"size": 1, "colour": "red"})


def test_from_dict_fills_what_is_missing_and_checks_the_rest():
    assert tce.SparseLinearConfig.from_dict({"dtype": "bf16"}) == tce.SparseLinearConfig(dtype="bf16")
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, int8, int4, got 'int3'"):
        tce.SparseLinearConfig.from_dict({"dtype": "int3"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of fp32, bf16, int8, int4, got 'int3'"),
        ({"dtype": None}, "dtype must be one of fp32, bf16, int8, int4, got None"),
        ({"head_dtype": "int3"}, "head_dtype must be None or one of fp32, bf16, int8, int4, got 'int3'"),
        ({"group_size": 16}, "group_size must be 32, 64 or 128, got 16"),
        ({"dtype": "int4", "activation_group": 64}, "activation_group must be 32 for int4 weights, got 64"),
        ({"head_dtype": "int4", "activation_group": 64}, "activation_group must be 32 for int4 weights, got 64"),
        ({"sparsity": 0.0}, "sparsity must be None or between 0 and 1, both excluded, got 0.0"),
        ({"sparsity": 1.0}, "sparsity must be None or between 0 and 1, both excluded, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be None or between 0 and 1, both excluded, got -0.1"),
        ({"sparsity": float("nan")}, "sparsity must be None or between 0 and 1, both excluded, got nan"),
        ({"granularity": "column"}, "granularity must be one of row, layer, got 'column'"),
        ({"layout": "csr"}, "layout must be one of auto, dense, sparse, got 'csr'"),
        ({"activation_group": 16}, "activation_group must be 32 or 64, got 16"),
        ({"activation_group": "32"}, "activation_group must be 32 or 64, got '32'"),
    ],
)
def test_sparse_linear_config_refuses(values, message):
    with pytest.raises(ValueError, match=f"SparseLinearConfig: {message}"):
        tce.SparseLinearConfig(**values)


def test_optimize_refuses_a_config_it_does_not_know():
    import torch

    @dataclasses.dataclass(frozen=True)
    class Unknown(Config):
        pass

    for config in (Unknown(), "int8", tce.SparseLinearConfig, None):
        with pytest.raises(TypeError, match=r"config must be one of KVCrushConfig, SparseLinearConfig.*, got"):
            tce.optimize(torch.nn.Linear(2, 2), config)
