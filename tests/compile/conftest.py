"""What the tests of the compile backend share."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def log(caplog):
    """The backend's INFO lines so far."""
    caplog.set_level(logging.INFO, "torch_cpu_ext.compile")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "torch_cpu_ext.compile" and r.levelno == logging.INFO]
