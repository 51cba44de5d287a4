"""What makes a token important: from attention, keys and values to one score a KV head and token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import ATTENTION, KVCrushConfig


def scoring(config: KVCrushConfig) -> dict[str, int]:
    """Arguments of `prefill` for the attention that scores, or else signatures, are made of; none where neither is needed."""
    if config.importance == "snapkv":
        return {"window": config.window, "pool": config.pool}
    if config.importance == "h2o":
        return {"sample": config.sample}
    if config.importance == "tova":
        return {"window": 1}
    return {"window": config.window} if config.ratio else {}


def grouped(attention: Tensor, heads: int, how: str) -> Tensor:
    """Scores of query heads as scores of the KV heads that they share.

    Args:
        attention: float32 ``(batch, query heads, tokens)``.
        heads: KV heads.
        how: ``"mean"``, ``"max"`` or ``"sum"``; or ``"layer"``, the mean of all query heads for each KV head.
    """
    if how == "layer":
        return attention.mean(1, keepdim=True).expand(-1, heads, -1)
    groups = attention.unflatten(1, (heads, -1))
    if how == "max":
        return groups.amax(2)
    return groups.sum(2) if how == "sum" else groups.mean(2)


def importance(config: KVCrushConfig, attention: Tensor, dense: Callable[[str], Tensor], position: Tensor, seed: int) -> Tensor:
    """Scores of tokens by the method that the config names.

    Args:
        config: says which.
        attention: float32 ``(batch, KV heads, tokens)``: what each got of it.
        dense: gives the keys or values, ``(batch, KV heads, tokens, head_dim)``, for ``"key"`` or ``"value"``; asked only if needed.
        position: integers that can be expanded to ``attention``'s shape: the places of the tokens.
        seed: of random scores.
    Returns:
        As ``attention``.
    """
    if config.importance in ATTENTION:
        return attention * _norm(dense("value")) if config.value_norm else attention
    if config.importance == "key_norm":
        return -_norm(dense("key"))
    if config.importance == "streaming":
        return position.float().expand(attention.shape)
    return torch.rand(attention.shape, generator=torch.Generator().manual_seed(seed))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def selection(config: KVCrushConfig, layer: int) -> dict[str, Any]:
    """Arguments of `select` that the config names, for a layer."""
    return {"ratio": config.ratio, "anchor": config.anchor, "anchors": config.anchors, "seed": config.seed + layer}
