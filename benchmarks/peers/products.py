"""One Linear layer by every peer, for `sparse_linear.py`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import BENCH, absent

Call = Callable[[], object]
Product = Callable[[Tensor], list[Call]]  # from a float32 input, a call for each copy of the weight


def dense(dtype: torch.dtype, weight: Tensor, copies: int) -> Product:
    """`F.linear`."""
    weights = [weight.to(dtype, copy=True) for _ in range(copies)]
    return lambda x: [functools.partial(F.linear, x.to(dtype), one) for one in weights]


def _compiled(make: Callable[[], nn.Module], copies: int, options: dict[str, Any]) -> Product:
    layers = [make() for _ in range(copies)]

    def calls(x: Tensor) -> list[Call]:
        torch._dynamo.reset()  # for its limit of variants of one function
        return [functools.partial(torch.compile(layer, dynamic=False, options=options), x.bfloat16()) for layer in layers]

    return calls


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16, copy=True), requires_grad=False)
    return layer


def compiled(weight: Tensor, copies: int) -> Product:
    """Inductor with freezing, which lays the weight out anew: with one row much faster than `F.linear`."""
    return _compiled(lambda: _layer(weight), copies, {"freezing": True})


def torchao(kind: str, weight: Tensor, copies: int) -> Product:
    """Weight-only int8, or int4 in groups of 32, by Inductor; freezing and max-autotune change nothing."""
    from torchao.quantization import quantize_

    from .torch_models import torchao_config

    def make() -> nn.Module:
        layer = nn.Sequential(_layer(weight))
        quantize_(layer, torchao_config(kind))
        return layer

    return _compiled(make, copies, {})


def ggml(kind: str, weight: Tensor, copies: int) -> Product:
    """llama.cpp's own product."""
    from .ggml import product

    return product(kind, weight, copies)


@dataclass(frozen=True)
class Layer:
    """How to make a `Product` of a weight with a number of copies, what a weight takes, and what must be installed for it."""

    make: Callable[[Tensor, int], Product]
    bytes_per_weight: float
    packages: tuple[str, ...] = ()

    def missing(self) -> str:
        """See `Peer.missing`."""
        return absent(self.packages, BENCH)


PLAIN = {
    "F.linear fp32": Layer(functools.partial(dense, torch.float32), 4),
    "F.linear bf16": Layer(functools.partial(dense, torch.bfloat16), 2),
}
OTHERS = {
    "compiled bf16": Layer(compiled, 2),
    "torchao int8": Layer(functools.partial(torchao, "int8"), 1, ("torchao",)),
    "torchao int4": Layer(functools.partial(torchao, "int4"), 20 / 32, ("torchao",)),  # with scale and zero in bf16
    "llama.cpp Q4_0": Layer(functools.partial(ggml, "Q4_0"), 18 / 32, ("llama_cpp", "gguf")),
    "llama.cpp Q4_1": Layer(functools.partial(ggml, "Q4_1"), 20 / 32, ("llama_cpp", "gguf")),
    "llama.cpp Q8_0": Layer(functools.partial(ggml, "Q8_0"), 34 / 32, ("llama_cpp", "gguf")),
}
