"""Signatures, and the choice of the tokens to keep: schema, fake and reference of each op, side by side.

The rule is that of KVCrush (arXiv:2503.00022), in the form that docs/techniques/kv_cache.md describes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import type_name
from ..core.registry import define

ANCHORS = ("random", "zeros", "ones", "mean", "inv_mean", "alternate")
_LARGEST_PAGE, _MOST_WORDS, _MOST_ANCHORS = 1024, 1023, 8
_INT32_MAX = 2**31 - 1


def _check_floats(op: str, score: Tensor, dimensions: str) -> None:
    torch._check(
        score.dim() == 3 and score.dtype == torch.float32,
        lambda: f"{op}: score must be a 3-D float32 tensor ({dimensions}), got {score.dim()}-D {type_name(score.dtype)}",
    )
    torch._check(
        score.shape[2] <= _INT32_MAX,
        lambda: f"{op}: score must have at most {_INT32_MAX} {dimensions.split()[-1]}, got {score.shape[2]}",
    )


def _check_int64(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    torch._check(
        tensor.dtype == torch.int64 and tensor.shape == shape,
        lambda: (
            f"{op}: {argument} must be an int64 tensor of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)}), "
            f"got {tensor.dim()}-D {type_name(tensor.dtype)} with {tensor.numel()} elements"
        ),
    )


def _largest(score: Tensor, count: int) -> Tensor:
    """Positions of the largest scores: ties by lower position, NaN below all numbers."""
    nan = score.isnan()
    order = score.masked_fill(nan, -math.inf).sort(descending=True, stable=True).indices
    return torch.cat([order[~nan[order]], order[nan[order]]])[:count]


# ------------------------------------------------------------------------------------------------------------------------------------ sign


def sign(score: Tensor, begin: Tensor, end: Tensor, *, page: int = 1) -> Tensor:
    """Binary signatures of tokens: one bit a head, which says whether the head finds the token important (arXiv:2503.00022, abstract).

    The bit of head ``s`` and token ``t`` is set if ``score[:, s, t]`` is among the largest ``floor((end - begin) / 2)`` of the tokens in
    ``[begin, end)``. Of equal scores those at lower positions count as larger; NaN is below all numbers. All other bits are 0.

    Args:
        score: float32 ``(batch, signature heads, tokens)``, any strides: importance by query head, or by KV head.
        begin: int64 ``(batch,)``, not negative: the first token that may be dropped. At or behind ``end``: the row has no such token.
        end: int64 ``(batch,)``, at most ``tokens``: one behind the last token that may be dropped.
        page: tokens of a unit, 1 to 1024. The signature of a unit is that of its tokens side by side.
    Returns:
        int64 ``(batch, units, words)`` with ``units = ceil(tokens / page)`` and ``words = ceil(signature heads * page / 64)``; bit
        ``s * page + t % page`` of unit ``t // page`` is that of head ``s`` and token ``t``, counted from the lowest of the first word.
    Raises:
        RuntimeError: a dtype, shape or value does not fit.
    """
    return torch.ops.torch_cpu_ext.kv_cache_sign(score, begin, end, page=page)


def _check_sign(score: Tensor, begin: Tensor, end: Tensor, page: int) -> None:
    op = "kv_cache_sign"
    _check_floats(op, score, "batch, signature heads, tokens")
    _check_int64(op, "begin", begin, (score.shape[0],))
    _check_int64(op, "end", end, (score.shape[0],))
    torch._check(1 <= page <= _LARGEST_PAGE, lambda: f"{op}: page must be from 1 to {_LARGEST_PAGE}, got {page}")


def _sign_fake(score: Tensor, begin: Tensor, end: Tensor, *, page: int = 1) -> Tensor:
    _check_sign(score, begin, end, page)
    batch, heads, tokens = score.shape
    return score.new_empty((batch, (tokens + page - 1) // page, (heads * page + 63) // 64), dtype=torch.int64)


def _sign_reference(score: Tensor, begin: Tensor, end: Tensor, *, page: int = 1) -> Tensor:
    op = "kv_cache_sign"
    _check_sign(score, begin, end, page)
    batch, heads, tokens = score.shape
    units, words = (tokens + page - 1) // page, (heads * page + 63) // 64
    bits = torch.zeros(batch, heads, units * page, dtype=torch.int64)
    for b in range(batch):
        first, last = int(begin[b]), int(end[b])
        torch._check(first >= 0, lambda first=first: f"{op}: begin must be at least 0, got {first}")
        torch._check(last <= tokens, lambda last=last: f"{op}: end must be at most {tokens}, got {last}")
        if first < last:
            for s in range(heads):
                bits[b, s, first + _largest(score[b, s, first:last], (last - first) // 2)] = 1
    flat = bits.view(batch, heads, units, page).transpose(1, 2).flatten(2)
    padded = torch.nn.functional.pad(flat, (0, 64 * words - heads * page)).view(batch, units, words, 64)
    return (padded << torch.arange(64)).sum(-1)  # the top bit is the sign of an int64, so the sum wraps as it must


define("kv_cache_sign(Tensor score, Tensor begin, Tensor end, *, int page=1) -> Tensor", fake=_sign_fake, reference=_sign_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- select


class Selection(NamedTuple):
    """What `select` keeps.

    Args:
        index: int32 ``(batch, KV heads, most)``, the units kept, ascending and without repeats; -1 behind the last.
        count: int64 ``(batch, KV heads)``, how many they are.
        kind: uint8, shaped like ``index``: why a unit is kept, 0 as one of the first or last, 1 as important, 2 as a representative; 255
            behind the last.
        members: float32, shaped like ``index``: for how many units a representative speaks, itself among them; 1 for the others, 0 behind
            the last.
    """

    index: Tensor  # type: ignore[assignment]  # these two hide methods of tuples
    count: Tensor  # type: ignore[assignment]
    kind: Tensor
    members: Tensor


def select(
    score: Tensor,
    signature: Tensor,
    first: Tensor,
    length: Tensor,
    budget: Tensor,
    *,
    most: int,
    start: int = 0,
    recent: int = 0,
    ratio: float = 0.25,
    anchor: str = "mean",
    anchors: int = 1,
    seed: int = 0,
) -> Selection:
    """Chooses the units (tokens or pages) of each KV head to keep, by KVCrush: the important ones, and representatives of the others.

    Nothing is dropped where ``length - first <= budget``. Otherwise exactly ``budget`` units stay: the first ``start`` and last ``recent``
    live ones; of those between, the ``budget - start - recent - representatives`` with the largest scores (of equal ones those at lower
    positions; NaN is below all numbers); and ``representatives = floor(ratio * (budget - start - recent) + 0.5)`` of the remaining ``n``,
    the candidates. Those are ordered by the Hamming distances of their signatures to the anchors, then by position, and number
    ``floor((i + 0.5) * n / representatives)`` in that order is kept for ``i = 0, 1, ...``. No unit is kept twice. Time is linear in the
    units. The result does not depend on the number of threads.

    Args:
        score: float32 ``(batch, KV heads, units)``, any strides: importance.
        signature: int64 ``(batch, 1 or KV heads, units, words)``, any strides, as `sign` makes it, with a dimension for the heads; 1 to
            1023 words, or none with ``ratio=0``. KV heads that share a signature and have the same live units share one order.
        first: int64 ``(batch, KV heads)``: the first live unit (behind the padding on the left, say).
        length: int64 ``(batch, KV heads)``: one behind the last live unit.
        budget: int64 ``(batch, KV heads)``: units to keep, the first and last included; at least ``start + recent + 1`` where some are
            dropped.
        most: the size of the result's last dimension, at least each budget.
        start: live units at the beginning that are always kept.
        recent: live units at the end that are always kept.
        ratio: share of ``budget - start - recent`` that goes to representatives, 0 to 1.
        anchor: ``"mean"`` (the bits that more than half of the units between the first and last have), ``"inv_mean"`` (its complement),
            ``"zeros"``, ``"ones"``, ``"alternate"`` (every other bit, from the second on) or ``"random"``.
        anchors: number of anchors, 1 to 8. The others are random; the order is by the distance to the first, then to the second, and so on.
        seed: of random anchors, which are the same for all rows and heads.
    Returns:
        `Selection`.
    Raises:
        RuntimeError: a dtype, shape or value does not fit.
    """
    return Selection(
        *torch.ops.torch_cpu_ext.kv_cache_select(
            score,
            signature,
            first,
            length,
            budget,
            most=most,
            start=start,
            recent=recent,
            ratio=ratio,
            anchor=anchor,
            anchors=anchors,
            seed=seed,
        )
    )


def _check_select(
    score: Tensor,
    signature: Tensor,
    first: Tensor,
    length: Tensor,
    budget: Tensor,
    most: int,
    start: int,
    recent: int,
    ratio: float,
    anchor: str,
    anchors: int,
) -> None:
    op = "kv_cache_select"
    _check_floats(op, score, "batch, KV heads, units")
    batch, heads, units = score.shape
    torch._check(
        signature.dim() == 4 and signature.dtype == torch.int64,
        lambda: (
            f"{op}: signature must be a 4-D int64 tensor (batch, 1 or KV heads, units, words), "
            f"got {signature.dim()}-D {type_name(signature.dtype)}"
        ),
    )
    torch._check(
        signature.shape[0] == batch and signature.shape[1] in (1, heads) and signature.shape[2] == units,
        lambda: (
            f"{op}: signature must be ({batch}, 1 or {heads}, {units}, words), "
            f"got ({signature.shape[0]}, {signature.shape[1]}, {signature.shape[2]}, words)"
        ),
    )
    for name, tensor in (("first", first), ("length", length), ("budget", budget)):
        _check_int64(op, name, tensor, (batch, heads))
    torch._check(most >= 0, lambda: f"{op}: most must be at least 0, got {most}")
    for name, value in (("start", start), ("recent", recent)):
        torch._check(0 <= value <= _INT32_MAX, lambda name=name, value=value: f"{op}: {name} must be from 0 to {_INT32_MAX}, got {value}")
    torch._check(0 <= ratio <= 1, lambda: f"{op}: ratio must be from 0 to 1, got {ratio:g}")
    words = signature.shape[3]
    torch._check(
        (words > 0 or ratio == 0) and words <= _MOST_WORDS,
        lambda: f"{op}: signature must have 1 to {_MOST_WORDS} words, or none where ratio is 0, got {words}",
    )
    torch._check(anchor in ANCHORS, lambda: f"{op}: anchor must be {', '.join(ANCHORS[:-1])} or {ANCHORS[-1]}, got {anchor}")
    torch._check(1 <= anchors <= _MOST_ANCHORS, lambda: f"{op}: anchors must be from 1 to {_MOST_ANCHORS}, got {anchors}")


def _select_fake(
    score: Tensor,
    signature: Tensor,
    first: Tensor,
    length: Tensor,
    budget: Tensor,
    *,
    most: int,
    start: int = 0,
    recent: int = 0,
    ratio: float = 0.25,
    anchor: str = "mean",
    anchors: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_select(score, signature, first, length, budget, most, start, recent, ratio, anchor, anchors)
    batch, heads, _ = score.shape
    shape = batch, heads, most
    return (
        score.new_empty(shape, dtype=torch.int32),
        score.new_empty((batch, heads), dtype=torch.int64),
        score.new_empty(shape, dtype=torch.uint8),
        score.new_empty(shape),
    )


def _random_word(seed: int, number: int) -> int:
    """The output of SplitMix64 (Steele, Lea, Flood 2014) behind the first ``number`` ones."""
    mask = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def _anchor_bits(bits: Tensor, anchor: str, number: int, seed: int) -> Tensor:
    """The anchor of units' bits ``(units, 64 * words)``."""
    size = bits.shape[1]
    if anchor == "random":
        words = [_random_word(seed, number * (size // 64) + w) for w in range(size // 64)]
        return torch.tensor([word >> i & 1 for word in words for i in range(64)])
    if anchor == "alternate":
        return torch.arange(size) % 2
    if anchor in ("mean", "inv_mean"):
        return ((2 * bits.sum(0) > bits.shape[0]) ^ (anchor == "inv_mean")).long()
    return torch.full((size,), int(anchor == "ones"))


def _select_reference(
    score: Tensor,
    signature: Tensor,
    first: Tensor,
    length: Tensor,
    budget: Tensor,
    *,
    most: int,
    start: int = 0,
    recent: int = 0,
    ratio: float = 0.25,
    anchor: str = "mean",
    anchors: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "kv_cache_select"
    _check_select(score, signature, first, length, budget, most, start, recent, ratio, anchor, anchors)
    batch, heads, units = score.shape
    index = torch.full((batch, heads, most), -1, dtype=torch.int32)
    count = torch.zeros(batch, heads, dtype=torch.int64)
    kind = torch.full((batch, heads, most), 255, dtype=torch.uint8)
    members = torch.zeros(batch, heads, most)
    for b in range(batch):
        for h in range(heads):
            low, high, room = int(first[b, h]), int(length[b, h]), int(budget[b, h])
            torch._check(0 <= high <= units, lambda high=high: f"{op}: length must be from 0 to {units}, got {high}")
            torch._check(0 <= low <= high, lambda low=low, high=high: f"{op}: first must be from 0 to the length, {high}, got {low}")
            torch._check(room <= most, lambda room=room: f"{op}: most must be at least each budget, {room}, got {most}")
            least = start + recent + 1
            torch._check(
                room >= high - low or room >= least,
                lambda room=room, least=least: (
                    f"{op}: budget must be at least start + recent + 1, {least}, where units are dropped, got {room}"
                ),
            )
            reason = torch.full((units,), 255, dtype=torch.uint8)
            weight = torch.ones(units)
            reason[low:high] = 0
            middle = torch.arange(low + start, max(low + start, high - recent))
            reason[middle] = 1
            if high - low > room:
                free = room - start - recent
                representatives = math.floor(ratio * free + 0.5)
                reason[middle] = 255
                reason[middle[_largest(score[b, h, middle], free - representatives)]] = 1
                if representatives:
                    bits = ((signature[b, h if signature.shape[1] > 1 else 0, middle][..., None] >> torch.arange(64)) & 1).flatten(1)
                    order = torch.arange(len(middle))
                    for i in reversed(range(anchors)):  # sorted by the last distance first, each time stably
                        distance = (bits != _anchor_bits(bits, anchor if i == 0 else "random", i, seed)).sum(1)
                        order = order[distance[order].sort(stable=True).indices]
                    candidates = middle[order]
                    candidates = candidates[reason[candidates] == 255]
                    number, n = torch.arange(representatives), len(candidates)
                    chosen = candidates[(2 * number + 1) * n // (2 * representatives)]
                    reason[chosen] = 2
                    weight[chosen] = ((number + 1) * n // representatives - number * n // representatives).float()
            kept = (reason != 255).nonzero()[:, 0]
            index[b, h, : len(kept)] = kept.int()
            count[b, h] = len(kept)
            kind[b, h, : len(kept)] = reason[kept]
            members[b, h, : len(kept)] = weight[kept]
    return index, count, kind, members


define(
    "kv_cache_select(Tensor score, Tensor signature, Tensor first, Tensor length, Tensor budget, *, int most, int start=0, int recent=0, "
    'float ratio=0.25, str anchor="mean", int anchors=1, int seed=0) -> (Tensor index, Tensor count, Tensor kind, Tensor members)',
    fake=_select_fake,
    reference=_select_reference,
)
