"""Pruning: which weights become zero."""

import torch
from torch import Tensor

from .config import GRANULARITIES


def magnitude_mask(weight: Tensor, sparsity: float, granularity: str = "row") -> Tensor:
    """Marks the weights of largest magnitude.

    Args:
        weight: ``(out_features, in_features)``, any float dtype.
        sparsity: share of weights to prune, in ``[0, 1)``; the number pruned is rounded to the nearest integer.
        granularity: ``"row"`` compares within each output, ``"layer"`` within the whole weight.
    Returns:
        Bool tensor of the shape of ``weight``, True where a weight stays. Among equal magnitudes the ones with the lower index stay, so the
        mask is deterministic.
    Raises:
        ValueError: ``sparsity`` or ``granularity`` is out of range, ``weight`` is not 2-D or has NaN or infinities, which have no rank.
    """
    if weight.dim() != 2:
        raise ValueError(f"magnitude_mask: weight must be 2-D (out_features, in_features), got {weight.dim()}-D")
    if not 0 <= sparsity < 1:
        raise ValueError(f"magnitude_mask: sparsity must be in [0, 1), got {sparsity}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"magnitude_mask: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if not bool(weight.isfinite().all()):
        raise ValueError("magnitude_mask: weight must be finite to be ranked, got NaN or an infinity")
    scores = weight.detach().abs() if granularity == "row" else weight.detach().abs().reshape(1, -1)
    pruned = round(sparsity * scores.shape[1])
    order = scores.argsort(dim=1, descending=True, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, scores.shape[1] - pruned :], False)
    return mask.view(weight.shape)
