"""The peers of the benchmarks: other ways to run a model, or one product, on the same machine; all of them optional.

`models` has the models, `torch_models`, `llama_cpp` and `openvino` the ways to run them (each a `Runner`), `workers` the processes they
live in, and `products` the peers of one Linear layer.
"""

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch_cpu_ext import SparseLinearConfig
from torch_cpu_ext.sparse_linear.ops import DTYPES

BENCH = "pip install 'torch_cpu_ext[bench]'"


@dataclass
class Run:
    """One timed continuation of a prompt, all times in seconds."""

    first_s: float | None  # to the first token; None where a peer does not compute the prompt anew
    gaps_s: list[float]  # from each token to the next


@dataclass
class Weights:
    """Bytes of a model's weights, as they are stored; None where a peer does not tell."""

    held: int | None  # all of them
    read: int | None  # what a token reads: an embedding that is nothing else is looked up, not read


class Runner(ABC):
    """A loaded model with a number of threads. Made with the name of a model, a number of threads, and the options of a `Peer`."""

    @abstractmethod
    def prepare(self, context: int, tokens: int) -> None:
        """Compiles, warms up and chooses the fastest settings for the `decode` calls to come, which have the same arguments."""

    @abstractmethod
    def decode(self, context: int, tokens: int) -> Run:
        """Continues a prompt of ``context`` tokens greedily: one token, then ``tokens`` more, of which each is timed."""

    @abstractmethod
    def weights(self) -> Weights:
        """How large the weights are."""

    def perplexity(self) -> float | None:
        """Perplexity on the windows of `models.windows`; None where a peer gives no logits, or the model's weights are random."""
        return None


def absent(packages: Iterable[str], install: str) -> str:
    """Which packages cannot be imported, and how to get them; empty if all can."""
    names = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(names)} not installed ({install})" if names else ""


def skip(name: str, why: str) -> None:
    """Says that a peer is left out."""
    print(f"{name} left out: {why}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Peer:
    """Which `Runner`, with which options, and what must be installed for it."""

    module: str
    runner: str
    options: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()  # by the names they are imported by
    install: str = BENCH

    def missing(self) -> str:
        """What is not installed and how to get it; empty if nothing is missing."""
        return absent(self.packages, self.install)

    def make(self, model: str, threads: int) -> Runner:
        """The runner, its model loaded."""
        runner = getattr(importlib.import_module(f".{self.module}", __name__), self.runner)
        return runner(model, threads, **self.options)


def _ours(dtype: str, sparsity: float | None = None, **options: Any) -> Peer:
    return Peer("torch_models", "Optimized", {"config": SparseLinearConfig(dtype=dtype, sparsity=sparsity), **options})


def _transformers(dtype: str, **options: Any) -> Peer:
    return Peer("torch_models", "Untouched", {"dtype": dtype, **options})


def _torchao(kind: str) -> Peer:
    return Peer("torch_models", "TorchAo", {"kind": kind}, ("torchao",))


def _llama_cpp(kind: str) -> Peer:
    return Peer("llama_cpp", "LlamaCpp", {"kind": kind}, ("llama_cpp",))


OURS = {f"ours eager {dtype}": _ours(dtype) for dtype in ("int4", "int8", "bf16") if dtype in DTYPES}
OURS |= {f"ours eager {dtype} 50 %": _ours(dtype, 0.5) for dtype in ("int8", "bf16")}  # by magnitude: for speed, not for quality
OURS["ours compiled int8"] = _ours("int8", backend="inductor")
PEERS = {
    "HF eager fp32": _transformers("fp32"),
    "HF eager bf16": _transformers("bf16"),
    "HF compiled bf16": _transformers("bf16", backend="inductor"),
    "torchao int8": _torchao("int8"),
    "torchao int4": _torchao("int4"),
    # it works with one version of torch only, so no extra of ours can ask for it
    "zentorch bf16": Peer("torch_models", "Untouched", {"dtype": "bf16", "backend": "zentorch"}, ("zentorch",), "pip install zentorch"),
    "llama.cpp Q4_1": _llama_cpp("Q4_1"),
    "llama.cpp Q4_0": _llama_cpp("Q4_0"),
    "llama.cpp Q8_0": _llama_cpp("Q8_0"),
    "OpenVINO Q4_1": Peer("openvino", "OpenVino", {"kind": "Q4_1"}, ("openvino_genai",)),
}
ALL = {**OURS, **PEERS}
