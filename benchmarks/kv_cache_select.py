"""Choosing the tokens of a cache to keep, by KVCrush: signatures of 32 query heads and selection for 8 KV heads, against PyTorch.

Scores lie in the cache, as prefill leaves them. PyTorch does the same for all heads at once: ``torch.topk`` for the bits and the important
tokens, sorts for the order and for the result; which of equal scores it keeps is up to ``torch.topk``. That alone, unsorted, is the peer of
selection by importance alone (``ratio=0``).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext import kernel_isa
from torch_cpu_ext.kv_cache import select, sign

from common import Row, interleave, main, row

QUERY_HEADS, KV_HEADS = 32, 8
TOKENS = (4096, 8192, 16384, 32768, 131072)
START, RECENT, RATIO = 4, 32, 0.25

Call = Callable[[], object]


def torch_sign(score: Tensor, begin: int, end: int) -> Tensor:
    """The signatures of one row; those of tokens that may not be dropped are zeros."""
    top = score[0, :, begin:end].topk((end - begin) // 2, sorted=False).indices
    bits = torch.zeros(score.shape[1:], dtype=torch.int64).scatter_(1, top + begin, 1)
    return (bits << torch.arange(len(bits))[:, None]).sum(0)[None, :, None]


def torch_select(score: Tensor, signature: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Positions and kinds of one row's tokens, for all KV heads at once."""
    heads, tokens = score.shape[1:]
    begin, end = START, tokens - RECENT
    free = budget - START - RECENT
    representatives = int(RATIO * free + 0.5)
    bits = signature[0, begin:end] >> torch.arange(QUERY_HEADS) & 1
    distance = (bits != (2 * bits.sum(0) > end - begin)).sum(1)
    order = distance.sort(stable=True).indices
    important = score[0, :, begin:end].topk(free - representatives, sorted=False).indices
    candidate = torch.ones(heads, end - begin, dtype=torch.bool).scatter_(1, important, False)
    candidates = order.expand(heads, -1)[candidate[:, order]].view(heads, -1)
    picks = (2 * torch.arange(representatives) + 1) * candidates.shape[1] // (2 * representatives)
    ends = torch.cat([torch.arange(begin), torch.arange(end, tokens)]).expand(heads, -1)
    index, place = torch.cat([ends, important + begin, candidates[:, picks] + begin], 1).sort()
    kinds = torch.cat([torch.zeros(START + RECENT), torch.ones(free - representatives), torch.full((representatives,), 2.0)]).byte()
    return index, kinds[place]


def measure(tokens: int, repeats: int) -> Iterator[Row]:
    """Rows for one length of a prompt, of which a quarter is kept."""
    torch.manual_seed(0)
    queries = (3 * torch.randn(1, QUERY_HEADS, tokens)).softmax(-1)
    queries = F.max_pool1d(queries + queries.mean() * torch.rand_like(queries), 7, 1, 3)
    score = queries.view(1, KV_HEADS, -1, tokens).mean(2)
    budget = tokens // 4
    begin, end = torch.tensor([START]), torch.tensor([tokens - RECENT])
    first = torch.zeros(1, KV_HEADS, dtype=torch.int64)
    numbers = first, first + tokens, first + budget
    signature = sign(queries, begin, end)

    def ours_select(signature: Tensor, ratio: float = RATIO) -> object:
        return select(score, signature[:, None], *numbers, most=budget, start=START, recent=RECENT, ratio=ratio)

    calls: dict[str, Call] = {
        "sign": lambda: sign(queries, begin, end),
        "select": lambda: ours_select(signature),
        "select, ratio 0": lambda: ours_select(signature, 0.0),
        "both": lambda: ours_select(sign(queries, begin, end)),
        "torch sign": lambda: torch_sign(queries, START, tokens - RECENT),
        "torch select": lambda: torch_select(score, signature, budget),
        "torch both": lambda: torch_select(score, torch_sign(queries, START, tokens - RECENT), budget),
        "torch.topk": lambda: score.topk(budget, sorted=False),
    }
    times = interleave(calls, repeats, warmup=1)
    config = {"tokens": tokens, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "kept": budget}
    config |= {"kernel_isa": kernel_isa("kv_cache", "select")}
    for name, ours, peer in (
        ("signatures", "sign", "torch sign"),
        ("selection", "select", "torch select"),
        ("signatures and selection", "both", "torch both"),
        ("selection by importance alone", "select, ratio 0", "torch.topk"),
    ):
        label = peer if peer == "torch.topk" else "torch.topk, sort and others"
        yield row(f"{tokens} tokens, {name}", times[ours], label, times[peer], config | {"step": name})


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them."""
    for tokens in TOKENS[1:4:2] if quick else TOKENS:
        yield from measure(tokens, 5 if quick else 15)


def bars() -> dict[str, float]:
    """What bars.toml promises."""
    _, selection, both, _ = measure(32768, 21)
    return {
        "32k tokens, 8 KV heads, selection (ms)": selection["ours_ms"],
        "32k tokens, 8 KV heads, signatures of 32 query heads and selection (ms)": both["ours_ms"],
        "32k tokens, signatures and selection, times PyTorch": both["ratio"],
    }


if __name__ == "__main__":
    main(rows, bars)
