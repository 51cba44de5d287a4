"""Masks: which weights stay when others become zero."""

import re

import torch
from torch import Tensor

GRANULARITIES = ("row", "layer")
PATTERNS = "unstructured or n:m with n below m, such as 2:4"


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """``(n, m)`` of a pattern ``"n:m"``, None of ``"unstructured"``.

    Raises:
        ValueError: it is neither, or ``n`` is not below ``m``.
    """
    if not is_pattern(pattern):
        raise ValueError(f"pattern must be {PATTERNS}, got {pattern!r}")
    if pattern == "unstructured":
        return None
    n, m = pattern.split(":")
    return int(n), int(m)


def is_pattern(pattern: str) -> bool:
    """Whether `parse_pattern` takes it."""
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    return pattern == "unstructured" or (found is not None and int(found[1]) < int(found[2]))


def has_pattern(weight: Tensor, pattern: str) -> bool:
    """Whether a weight ``(out_features, in_features)`` has at most n values that are not zero among every m inputs of an output."""
    groups = parse_pattern(pattern)
    if groups is None or weight.shape[1] % groups[1]:
        return groups is None
    return bool((weight.reshape(-1, groups[1]).count_nonzero(1) <= groups[0]).all())


def magnitude_mask(weight: Tensor, sparsity: float, granularity: str = "row", pattern: str = "unstructured") -> Tensor:
    """Marks the weights of largest magnitude.

    Args:
        weight: ``(out_features, in_features)``, any float dtype.
        sparsity: share of weights to prune, in ``[0, 1)``; the number pruned is rounded to the nearest integer.
        granularity: ``"row"`` compares within each output, ``"layer"`` within the whole weight; without effect on ``n:m``.
        pattern: ``"unstructured"``, or ``"n:m"``: of every m consecutive inputs of an output, n stay; then ``sparsity`` is 1 - n/m.
    Returns:
        Bool tensor of the shape of ``weight``, True where a weight stays. Among equal magnitudes the ones with the lower index stay, so the
        mask is deterministic.
    Raises:
        ValueError: ``sparsity``, ``granularity`` or ``pattern`` is out of range or does not fit, ``weight`` is not 2-D or has NaN or
            infinities, which have no rank.
    """
    check_mask_arguments("magnitude_mask", weight, sparsity, granularity, pattern)
    if not bool(weight.isfinite().all()):
        raise ValueError("magnitude_mask: weight must be finite to be ranked, got NaN or an infinity")
    return largest(weight.detach().abs(), sparsity, granularity, pattern)


def wanda_mask(weight: Tensor, input_norm: Tensor, sparsity: float, granularity: str = "row", pattern: str = "unstructured") -> Tensor:
    """Marks the weights whose magnitude times the norm of their input is largest (Wanda, arXiv:2306.11695, section 3).

    Args:
        weight: ``(out_features, in_features)``, any float dtype.
        input_norm: ``(in_features,)``: the Euclidean norm of each input feature over all calibration tokens; any common factor will do.
        sparsity: as in `magnitude_mask`.
        granularity: as in `magnitude_mask`; the paper compares within each output.
        pattern: as in `magnitude_mask`.
    Returns:
        Bool tensor as `magnitude_mask` gives it.
    Raises:
        ValueError: as for `magnitude_mask`, or ``input_norm`` has another shape or is not finite.
    """
    check_mask_arguments("wanda_mask", weight, sparsity, granularity, pattern)
    if input_norm.shape != weight.shape[1:]:
        raise ValueError(f"wanda_mask: input_norm must have shape {tuple(weight.shape[1:])}, got {tuple(input_norm.shape)}")
    scores = weight.detach().float().abs() * input_norm.float()
    if not bool(scores.isfinite().all()):
        raise ValueError("wanda_mask: weight times input_norm must be finite to be ranked, got NaN or an infinity")
    return largest(scores, sparsity, granularity, pattern)


def check_mask_arguments(function: str, weight: Tensor, sparsity: float, granularity: str, pattern: str) -> None:
    """Raises ValueError, in the name of a function, if the arguments of a mask are out of range or do not fit."""
    if weight.dim() != 2:
        raise ValueError(f"{function}: weight must be 2-D (out_features, in_features), got {weight.dim()}-D")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{function}: sparsity must be in [0, 1), got {sparsity}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"{function}: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    try:
        groups = parse_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from None
    if groups is None:
        return
    n, m = groups
    if weight.shape[1] % m:
        raise ValueError(f"{function}: in_features must be a multiple of {m} for the pattern {pattern}, got {weight.shape[1]}")
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f"{function}: sparsity must be {1 - n / m:g} for the pattern {pattern}, got {sparsity}")


def largest(scores: Tensor, sparsity: float, granularity: str, pattern: str) -> Tensor:
    """Marks the largest scores, by the rules of `magnitude_mask`; arguments are taken as checked."""
    groups = parse_pattern(pattern)
    if groups is not None:
        n, m = groups
        return keep(scores.reshape(-1, m), m - n).view(scores.shape)
    if granularity == "layer":
        return keep(scores.reshape(1, -1), round(sparsity * scores.numel())).view(scores.shape)
    return keep(scores, round(sparsity * scores.shape[1]))


def keep(scores: Tensor, pruned: int) -> Tensor:
    """Marks all but the ``pruned`` smallest scores of each row; of equal ones the later goes first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, scores.shape[1] - pruned :], False)
