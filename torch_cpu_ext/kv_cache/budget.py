"""How a budget is shared among layers and KV heads; plain arithmetic."""

import torch
from torch import Tensor

_STEEPNESS = 20  # the last layer of a pyramid keeps this part of the mean (PyramidKV, arXiv:2406.02069)
_SAFE = 0.2  # share of a budget that heads do not compete for (Ada-KV, arXiv:2407.11550)


def pyramid(total: int, layer: int, layers: int, most: int) -> int:
    """Tokens that a layer keeps where lower ones keep more: a straight line through the layers (PyramidKV, arXiv:2406.02069).

    Args:
        total: what each layer would keep if all kept the same.
        layer: number of the layer, from 0.
        layers: how many there are.
        most: tokens there are; no layer is given more.
    Returns:
        The layer's share; all layers together have ``total * layers``, unless there are fewer tokens.
    """
    if layers == 1 or total >= most:
        return min(total, most)
    high = min(2 * total - max(1, total // _STEEPNESS), most)

    def line(up_to: int) -> int:
        """The sum of the first layers, rounded, so that the whole sum is exact."""
        low = 2 * total - high
        return round(up_to * high - (high - low) * up_to * (up_to - 1) / (2 * (layers - 1)))

    return line(layer + 1) - line(layer)


def adaptive(score: Tensor, begin: Tensor, end: Tensor, each: Tensor) -> Tensor:
    """Tokens that each KV head keeps where heads compete by their scores (Ada-KV, arXiv:2407.11550).

    A head's part of the row's budget is its part of the largest scores of all heads; of a fifth all heads have the same part.

    Args:
        score: float32 ``(batch, KV heads, tokens)``.
        begin: int64 ``(batch, KV heads)``: the first token that may be dropped.
        end: int64 ``(batch, KV heads)``: one behind the last.
        each: int64 ``(batch,)``: what each head would keep if all kept the same.
    Returns:
        int64 ``(batch, KV heads)``, at least 1 and at most the tokens there are; a row has ``each * KV heads`` together, or all it has.
    """
    batch, heads, tokens = score.shape
    position = torch.arange(tokens)
    live = (position >= begin[..., None]) & (position < end[..., None])
    room = (end - begin).clamp(min=0)
    flat = torch.where(live, score.nan_to_num(-torch.inf), -torch.inf).flatten(1)
    budget = torch.zeros(batch, heads, dtype=torch.int64)
    for row in range(batch):
        total = min(int(each[row]) * heads, int(room[row].sum()))
        largest = flat[row].topk(total).indices // tokens
        won = torch.bincount(largest, minlength=heads).double()
        wish = (1 - _SAFE) * won + _SAFE * total / heads
        budget[row] = _whole(wish, room[row], total)
    return budget


def _whole(wish: Tensor, room: Tensor, total: int) -> Tensor:
    """Whole numbers close to ``wish``, between 1 and ``room``, that add up to ``total`` if they can."""
    least = room.clamp(max=1)
    budget = torch.minimum(wish.floor().long().clamp(min=1), room)
    while (missing := total - int(budget.sum())) != 0:
        free = budget < room if missing > 0 else budget > least
        if not bool(free.any()):
            break
        gap = torch.where(free, (wish - budget) * (1 if missing > 0 else -1), -torch.inf)
        chosen = gap.argsort(descending=True, stable=True)[: min(abs(missing), int(free.sum()))]
        budget[chosen] += 1 if missing > 0 else -1
    return budget
