"""A prompt read once with the full cache, and what comes after it with the caches that many methods leave of it, all in one batch.

Dropping a token and giving it a bias of minus infinity is the same to attention. So all methods share the keys and values of the one
full cache, and differ by their biases; the tokens that follow are each method's own.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from torch_cpu_ext.kv_cache.prefill import prefill

from .methods import LONGEST_WINDOW, Kept, Layer

NAME = "kv_evaluation"


@dataclass
class _Pass:
    """What the attention function needs to know about a forward, and what it leaves there."""

    layers: list[Layer]
    kept: list[list[Kept]] = field(default_factory=list)  # by method, by layer; empty: a prefill, which makes the layers
    errors: list[Tensor] | None = None  # relative errors of each layer's outputs, (methods, query heads, tokens); None: not wanted


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **kwargs: Any) -> tuple[Tensor, None]:
    now: _Pass = kwargs["reading"]
    if not now.kept:
        result = prefill(query, key, value, scale=scaling, sample=1)
        last = query[0, :, -LONGEST_WINDOW:].clone()
        now.layers.append(Layer(key[0].contiguous(), value[0].contiguous(), last, result.score[0], scaling))
        return result.out.transpose(1, 2), None
    layer, kept = now.layers[module.layer_idx], [method[module.layer_idx] for method in now.kept]
    if now.errors is None:
        out = torch.cat([_attend(query[i : i + 1], key[i : i + 1], value[i : i + 1], layer, one) for i, one in enumerate(kept)])
    else:
        out = _attend(query, key, value, layer, Kept(torch.zeros(layer.key.shape[:2])))
        each = torch.cat([_attend(query, key, value, layer, one) for one in kept])
        now.errors.append((each - out).norm(dim=-1) / out.norm(dim=-1))
    return out.to(query.dtype).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: Layer, kept: Kept) -> Tensor:
    """Of one row of tokens that follow a compressed cache; float32."""
    (_, heads, length, d), kv_heads = query.shape, key.shape[1]
    grouped = query[0].reshape(kv_heads, -1, d)  # the query heads of a KV head one after another
    stored = (grouped @ layer.key.mT).float() * layer.scale
    for dtype, low in kept.low.items():
        if dtype not in layer.rounded:
            layer.rounded[dtype] = round_trip(layer.key, "key", dtype), round_trip(layer.value, "value", dtype)
        stored = torch.where(low[:, None], (grouped @ layer.rounded[dtype][0].mT).float() * layer.scale, stored)
    own = (grouped @ key[0].mT).float() * layer.scale
    seen = torch.arange(key.shape[2]) <= torch.arange(key.shape[2] - length, key.shape[2])[:, None]
    own = own.masked_fill(~seen.repeat(heads // kv_heads, 1), -math.inf)
    p = torch.cat([stored + kept.bias[:, None], own], -1).softmax(-1).to(query.dtype)
    p, q = p[..., : -key.shape[2]], p[..., -key.shape[2] :]
    dense = p
    for low in kept.low.values():
        dense = dense.masked_fill(low[:, None], 0)
    out = dense @ layer.value
    for dtype, low in kept.low.items():
        out = out + p.masked_fill(~low[:, None], 0) @ layer.rounded[dtype][1]
    return (out + q @ value[0]).float().view(1, heads, length, d)


def round_trip(x: Tensor, kind: str, dtype: str) -> Tensor:
    """``x`` (KV heads, tokens, head_dim) as pages of ``dtype`` hold it."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))[None]
    pages = torch.ops.torch_cpu_ext.kv_cache_pack(padded, kind=kind, dtype=dtype)
    return torch.ops.torch_cpu_ext.kv_cache_unpack(pages, kind=kind, head_dim=x.shape[2])[0, :, : x.shape[1]].to(x.dtype)


class Reader:
    """A model, and what it reads.

    Args:
        model: a decoder of Hugging Face transformers; its attention implementation is changed.
    """

    def __init__(self, model: Any) -> None:
        model.set_attn_implementation(NAME)
        self.model = model

    def read(self, ids: Tensor) -> list[Layer]:
        """The full cache of a prompt, ``ids`` (tokens,)."""
        state = _Pass([])
        with torch.inference_mode():
            self.model.model(ids[None], use_cache=False, reading=state)
        return state.layers

    def answer(self, layers: list[Layer], kept: list[list[Kept]], ids: Tensor, tokens: int) -> Tensor:
        """Greedy continuations, (methods, tokens), after ``ids`` (tokens,), which come after what the caches hold."""
        cache, state = DynamicCache(config=self.model.config), _Pass(layers, kept)
        result: list[Tensor] = []
        inputs = ids.expand(len(kept), -1)
        with torch.inference_mode():
            for _ in range(tokens):
                logits = self._forward(inputs, cache, state, 1)
                inputs = logits[:, -1:].argmax(-1)
                result.append(inputs)
        return torch.cat(result, 1)

    def losses(self, layers: list[Layer], kept: list[list[Kept]], ids: Tensor) -> Tensor:
        """Mean negative log-likelihood by method of ``ids`` but the first, which comes after what the caches hold."""
        state = _Pass(layers, kept)
        with torch.inference_mode():
            logits = self._forward(ids[:-1].expand(len(kept), -1), DynamicCache(config=self.model.config), state, 0).float()
            return torch.nn.functional.cross_entropy(logits.mT, ids[1:].expand(len(kept), -1), reduction="none").mean(1)

    def errors(self, layers: list[Layer], kept: list[list[Kept]], ids: Tensor) -> Tensor:
        """Relative errors of attention outputs at ``ids``, (methods, layers, heads, tokens); what comes before a layer is exact."""
        state = _Pass(layers, kept, [])
        with torch.inference_mode():
            self._forward(ids[None], DynamicCache(config=self.model.config), state, 1)
        assert state.errors is not None
        return torch.stack(state.errors, 1)

    def _forward(self, inputs: Tensor, cache: DynamicCache, state: _Pass, keep: int) -> Tensor:
        first = state.layers[0].key.shape[1] + cache.get_seq_length()
        positions = torch.arange(first, first + inputs.shape[1]).expand(len(inputs), -1)
        return self.model(inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep, reading=state).logits
