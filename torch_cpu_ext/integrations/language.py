"""Measuring causal language models of Hugging Face transformers."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def perplexity(model: Any, windows: Iterable[Tensor]) -> float:
    """Perplexity over windows of tokens, each of which starts anew; its first token is not predicted.

    Args:
        model: ``model(ids).logits`` is ``(1, length, vocabulary)``.
        windows: ``(1, length)``, int64, of at least 2 tokens.
    Raises:
        ValueError: there are no windows.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in windows:
            logits = model(ids).logits[0, :-1]
            for part, target in zip(logits.split(128), ids[0, 1:].split(128), strict=True):  # no second copy of all logits in float32
                total += float(nn.functional.cross_entropy(part.float(), target, reduction="sum"))
            count += ids.shape[1] - 1
    if not count:
        raise ValueError("perplexity: windows must hold at least one, got none")
    return math.exp(total / count)
