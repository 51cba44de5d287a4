"""Ways to keep keys and values, on the layers of `stack`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, cast

import torch

from torch_cpu_ext import KVCrushCache, KVCrushConfig

from . import stack

KVPRESS = "TORCH_CPU_EXT_KVPRESS_PYTHON"  # an interpreter that has kvpress, whose versions of transformers are older


class OwnCache:
    """The layers with a `KVCrushCache`."""

    def __init__(self, model: str, threads: int, config: KVCrushConfig) -> None:
        torch.set_num_threads(threads)
        self.config, self.model = config, stack.build()
        self.model.set_attn_implementation("torch_cpu_ext_kvcrush")

    def measure(self, context: int, tokens: int) -> dict[str, Any]:
        """As `stack.measure`."""
        return stack.measure(self.model, KVCrushCache(self.model.config, self.config), context, tokens)


class TransformersCache:
    """The layers with a cache of transformers and PyTorch's attention.

    Args:
        model: not used.
        threads: of PyTorch.
        backend: of ``QuantizedCache``; None for ``DynamicCache``.
    """

    def __init__(self, model: str, threads: int, backend: str | None = None) -> None:
        torch.set_num_threads(threads)
        self.backend, self.model = backend, stack.build()

    def measure(self, context: int, tokens: int) -> dict[str, Any]:
        """As `stack.measure`."""
        from transformers import DynamicCache, QuantizedCache

        config = self.model.config
        cache = DynamicCache(config=config) if self.backend is None else QuantizedCache(self.backend, config)
        return stack.measure(self.model, cache, context, tokens)


class Kvpress:
    """kvpress's SnapKV in a process of the interpreter that `KVPRESS` names."""

    def __init__(self, model: str, threads: int, share: float) -> None:
        command = [os.environ[KVPRESS], str(Path(__file__).with_name("kvpress_worker.py")), str(threads), str(share)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)

    def measure(self, context: int, tokens: int) -> dict[str, Any]:
        """As `stack.measure`."""
        stdin, stdout = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)
        print(context, tokens, file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"kvpress ended with code {self.process.wait()}")
        return json.loads(line)
