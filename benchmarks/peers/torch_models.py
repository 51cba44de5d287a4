"""Models of transformers: as they are, compiled by a backend, quantised by torchao, or optimized by this package."""

import functools
import importlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torch_cpu_ext import SparseLinearConfig
from torch_cpu_ext.integrations import smollm2

from . import Run, Runner, Weights, models


class TransformersModel(Runner):
    """``model.generate``, greedily.

    Args:
        model: name of the model.
        threads: of PyTorch.
        module: the model itself.
        backend: of ``torch.compile`` for the step of one token, with a static cache; None compiles nothing. The prompt runs uncompiled.
        by_token: measure perplexity token by token, as decoding computes it, not a window at a time.
    """

    def __init__(self, model: str, threads: int, module: Any, *, backend: str | None = None, by_token: bool = False) -> None:
        torch.set_num_threads(threads)
        self.name, self.by_token = model, by_token
        self.model = module
        self.caches: dict[int, Any] | None = None
        self.size = self._weights()
        if backend:
            self.caches = {}
            whole, step = self.model.forward, torch.compile(self.model.forward, backend=backend, dynamic=False)

            @functools.wraps(whole)
            def forward(input_ids: Any = None, **rest: Any) -> Any:
                return (step if input_ids.shape[1] == 1 else whole)(input_ids=input_ids, **rest)

            self.model.forward = forward

    def prepare(self, context: int, tokens: int) -> None:
        for _ in range(2):
            self.decode(context, 8 if self.caches is None else tokens)

    def decode(self, context: int, tokens: int) -> Run:
        options = {}
        if self.caches is not None:
            from transformers import StaticCache

            if context not in self.caches:  # one of just the length needed, since attention reads all of it
                self.caches[context] = StaticCache(config=self.model.config, max_cache_len=context + tokens + 1)
            with torch.inference_mode():  # as in `generate`, whose tensors it holds
                self.caches[context].reset()
            options["past_key_values"] = self.caches[context]
        run = smollm2.generate(self.model, models.prompt(self.name, context), tokens + 1, **options)
        return Run(run.first_s, run.gaps_s)

    def weights(self) -> Weights:
        return self.size

    def _weights(self) -> Weights:
        modules = list(self.model.modules())
        everything = _bytes(modules)
        others = _bytes(m for m in modules if not isinstance(m, nn.Embedding))
        return Weights(sum(everything.values()), sum(others.values()))

    def perplexity(self) -> float | None:
        windows = models.windows(self.name)
        if windows is None:
            return None
        if not self.by_token:
            return smollm2.perplexity(self.model, smollm2.load_tokenizer())
        total = 0.0
        with torch.inference_mode():
            for window in windows:
                cache = None
                for token, target in itertools.pairwise(window):
                    out = self.model(token.view(1, 1), past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    total += float(nn.functional.cross_entropy(out.logits[0].float(), target.view(1)))
        return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _bytes(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Bytes of the modules' own parameters and buffers by address, so that what is shared counts once."""
    found = {}
    pending = [tensor for m in modules for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    while pending:
        tensor = pending.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps the tensors with the numbers, as torchao's do
            pending += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        elif tensor.numel():
            found[tensor.data_ptr()] = tensor.nbytes
    return found


class Untouched(TransformersModel):
    """The model as Hugging Face has it; a ``backend`` other than Inductor is a package that registers itself."""

    def __init__(self, model: str, threads: int, dtype: str, backend: str | None = None) -> None:
        if backend not in (None, "inductor"):
            importlib.import_module(backend)
            torch._inductor.config.freezing = True
        super().__init__(model, threads, models.load(model, dtype), backend=backend)


class Optimized(TransformersModel):
    """The model after this package's ``optimize``."""

    def __init__(self, model: str, threads: int, config: SparseLinearConfig, backend: str | None = None) -> None:
        super().__init__(model, threads, models.load_optimized(model, config), backend=backend, by_token=backend is None)


class TorchAo(TransformersModel):
    """Weight-only int8, or int4 in groups of 32 with the head in int8; the rest in bf16; compiled."""

    def __init__(self, model: str, threads: int, kind: str) -> None:
        from torchao.quantization import quantize_

        module = models.load(model, "bf16")
        for one in ("int8", "int4"):
            quantize_(module, torchao_config(one), lambda m, name, one=one: isinstance(m, nn.Linear) and _kind(kind, name) == one)
        super().__init__(model, threads, module, backend="inductor")


def _kind(kind: str, name: str) -> str:
    return "int8" if name == "lm_head" else kind


def torchao_config(kind: str) -> Any:
    """What ``quantize_`` takes for ``"int8"`` or ``"int4"``; the latter's kernel for CPUs is under a provisional name.

    The settings of Inductor that torchao recommends are for GPUs; on a CPU they only tune for minutes.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
