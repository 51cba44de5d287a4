"""Which tokens each method keeps, out of one full cache.

A `Capture` is what one prefill with the full cache leaves behind; `compress` says what a method would have kept of it, as masks, so that
many methods are compared on the very same keys and values. KVCrush's choice itself is that of the library's ops.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext.kv_cache.selection import select, sign

LONGEST_WINDOW = 64
# Bytes of a key and a value together in tokens of bf16, by dtype: pages of 16 tokens as kv_cache_pack lays them out.
PAGE_BYTES = {"bf16": lambda d: 64 * d, "int8": lambda d: 2 * (16 * d + 64), "int4": lambda d: 12 * d + 8 * d + 64}


@dataclass
class Layer:
    """One layer after a prefill: ``key`` and ``value`` (KV heads, tokens, head_dim), ``query`` (query heads, last queries, head_dim), and
    ``h2o`` (query heads, tokens), the probabilities of all queries added up."""

    key: Tensor
    value: Tensor
    query: Tensor
    h2o: Tensor
    scale: float
    rounded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # keys and values as pages of a dtype give them back
    scored: dict[tuple[object, ...], Tensor] = field(default_factory=dict)  # what `scores` gave, by what it depends on


@dataclass(frozen=True)
class Method:
    """A way to choose.

    Args:
        name: in the results.
        importance: ``"full"``, ``"random"``, ``"streaming"``, ``"h2o"``, ``"snapkv"``, ``"tova"`` or ``"key_norm"``.
        ratio: share of the budget for representatives; 0 is the importance method alone.
        window: last queries that SnapKV looks at.
        pool: neighbours whose largest score SnapKV takes.
        start: first tokens that are always kept.
        recent: last tokens that are always kept.
        gqa: how the scores of a KV head's query heads are put together, ``"mean"`` or ``"max"``; ``"layer"``: the mean of all query
            heads of the layer, so that all KV heads keep the same tokens.
        value_norm: multiply scores by the norms of the values.
        layers: ``"uniform"``, or ``"pyramid"``: less for later layers.
        heads: ``"uniform"``, or ``"ada"``: the heads of a layer compete.
        anchor: of KVCrush.
        anchors: of KVCrush.
        kmeans: choose the representatives by k-means of the signatures in place of their distance to an anchor.
        spread: choose them evenly by position, or at random, in place of signatures: ``"position"``, ``"random"`` or None.
        log_count: a representative's attention scores get the logarithm of the number of tokens that it stands for.
        dtype: ``"bf16"``, ``"int8"`` or ``"int4"``, of all but the first and last tokens; what that saves goes into more tokens.
        representative_dtype: the same of representatives alone; None: as the others.
    """

    name: str
    importance: str = "snapkv"
    ratio: float = 0.0
    window: int = 16
    pool: int = 7
    start: int = 4
    recent: int = 32
    gqa: str = "mean"
    value_norm: bool = False
    layers: str = "uniform"
    heads: str = "uniform"
    anchor: str = "mean"
    anchors: int = 1
    kmeans: bool = False
    spread: str | None = None
    log_count: bool = False
    dtype: str = "bf16"
    representative_dtype: str | None = None

    def but(self, name: str, **changes: Any) -> "Method":
        """The same with changes."""
        return replace(self, name=name, **changes)


@dataclass
class Kept:
    """What stays of a layer: ``bias`` (KV heads, tokens), minus infinity for what was dropped; and which tokens are held at a lower
    precision, (KV heads, tokens) by dtype."""

    bias: Tensor
    low: dict[str, Tensor] = field(default_factory=dict)

    def tokens(self, d: int) -> float:
        """Tokens per KV head that take as many bytes in bf16."""
        kept = (self.bias > -math.inf).sum(1).float()
        for dtype, low in self.low.items():
            kept -= (1 - cost(dtype, d)) * low.sum(1)
        return float(kept.mean())


def cost(dtype: str, d: int) -> float:
    """Bytes of a token, as a share of those of a token in bf16."""
    return PAGE_BYTES[dtype](d) / PAGE_BYTES["bf16"](d)


def scores(layer: Layer, method: Method, generator: torch.Generator) -> Tensor:
    """Importance of each token by query head, (query heads, tokens); by KV head where queries play no part in it."""
    if method.importance == "random":
        return torch.rand(layer.key.shape[:2], generator=generator)
    depends = method.importance, method.window, method.pool, method.value_norm
    if depends not in layer.scored:
        layer.scored[depends] = _scores(layer, method)
    return layer.scored[depends]


def _scores(layer: Layer, method: Method) -> Tensor:
    heads, tokens, _ = layer.key.shape
    if method.importance == "snapkv":
        result = F.max_pool1d(_probabilities(layer, method.window).sum(1), method.pool, 1, method.pool // 2)
    elif method.importance == "tova":  # one choice for all heads of a layer, as published
        result = _probabilities(layer, 1)[:, 0]
        result = result.mean(0, keepdim=True).expand_as(result)
    elif method.importance == "h2o":
        result = layer.h2o
    elif method.importance == "streaming":
        result = torch.arange(tokens, dtype=torch.float32).expand(heads, tokens)
    elif method.importance == "key_norm":
        result = -layer.key.float().norm(dim=-1)
    else:
        raise ValueError(f"importance: unknown, {method.importance}")
    if method.value_norm:
        norms = layer.value.float().norm(dim=-1)
        result = result * norms.repeat_interleave(len(result) // heads, 0)
    return result.contiguous()


def _probabilities(layer: Layer, window: int) -> Tensor:
    """(query heads, window, tokens): what the last queries attend to."""
    heads, tokens, d = layer.key.shape
    query = layer.query[:, -window:].float()
    window = query.shape[1]
    logits = (query.reshape(heads, -1, d) @ layer.key.float().mT * layer.scale).view(-1, window, tokens)
    seen = torch.arange(tokens) <= torch.arange(tokens - window, tokens)[:, None]
    return logits.masked_fill(~seen, -math.inf).softmax(-1)


def budgets(method: Method, capture: list[Layer], share: float) -> list[int]:
    """Tokens per KV head of each layer: the same share of all tokens in all, whatever the method."""
    tokens, layers = capture[0].key.shape[1], len(capture)
    least = method.start + method.recent + 1
    total = max(least, math.floor(share * tokens + 0.5))
    if method.layers == "uniform":
        return [total] * layers
    # PyramidKV (arXiv:2406.02069, section 3.2): a straight line from the first layer to the last, which gets 1/20 of twice the mean.
    free, beta = total - least + 1, 20
    last = free * 2 / beta
    line = [2 * free - last - (2 * free - 2 * last) * i / (layers - 1) for i in range(layers)]
    return [min(tokens, max(1, round(one)) + least - 1) for one in line]


def compress(capture: list[Layer], method: Method, share: float, seed: int = 0) -> list[Kept]:
    """What a method keeps of every layer, with ``share`` of the full cache's bytes."""
    layers, heads, tokens, d = len(capture), *capture[0].key.shape
    if method.importance == "full":
        return [Kept(torch.zeros(heads, tokens))] * layers
    generator = torch.Generator().manual_seed(seed)
    by_query = torch.stack([scores(layer, method, generator) for layer in capture])  # (layers, query heads, tokens)
    groups = by_query.view(layers, heads, -1, tokens)
    if method.gqa == "layer":  # all KV heads keep the same tokens
        groups = by_query[:, None].expand(-1, heads, -1, -1)
    score = groups.amax(2) if method.gqa == "max" else groups.mean(2)
    budget = torch.tensor(budgets(method, capture, share))[:, None].expand(-1, heads)
    if method.heads == "ada":
        budget = torch.stack([_ada(one, method, int(most)) for one, most in zip(score, budget[:, 0], strict=True)])
    edges = method.start + method.recent
    representatives = method.ratio * (budget - edges)
    important = budget - edges - (representatives + 0.5).floor()
    important, representatives = (
        (x / cost(dtype or method.dtype, d) + 0.5).floor().long()
        for x, dtype in ((important, None), (budget - edges - important, method.representative_dtype))
    )
    room = tokens - edges
    important = important.clamp_max(room)
    representatives = torch.minimum(representatives, room - important)
    budget, own = edges + important + representatives, method.kmeans or method.spread is not None
    if own:  # the op chooses the important ones only
        budget, ratio = budget - representatives, 0.0
    else:
        ratios = representatives / (important + representatives)
        ratio = float(ratios.flatten()[0]) if method.dtype != "bf16" or method.representative_dtype else method.ratio
    begin, end = torch.full((layers,), method.start), torch.full((layers,), tokens - method.recent)
    signature = sign(by_query, begin, end)[:, None]
    chosen = select(
        score,
        signature,
        torch.zeros(layers, heads, dtype=torch.int64),
        torch.full((layers, heads), tokens),
        budget.contiguous(),
        most=int(budget.max()),
        start=method.start,
        recent=method.recent,
        ratio=ratio,
        anchor=method.anchor,
        anchors=method.anchors,
        seed=seed,
    )
    # Padding goes to one more place, which is cut off.
    index = torch.where(chosen.index < 0, tokens, chosen.index).long()
    weight = torch.full((layers, heads, tokens + 1), -math.inf).scatter_(2, index, chosen.members.log())[..., :tokens]
    kind = torch.full((layers, heads, tokens + 1), 255, dtype=torch.uint8).scatter_(2, index, chosen.kind)[..., :tokens]
    if own:
        for i in range(layers):
            for h in range(heads):
                candidates = (weight[i, h] == -math.inf).nonzero()[:, 0]
                picked, sizes = _own(signature[i, 0, candidates], method, int(representatives[i, h]), generator)
                weight[i, h, candidates[picked]], kind[i, h, candidates[picked]] = sizes.log(), 2
    bias = weight if method.log_count else torch.where(weight > -math.inf, 0.0, -math.inf)
    low: dict[str, Tensor] = {}
    for number, dtype in ((1, method.dtype), (2, method.representative_dtype or method.dtype)):
        if dtype != "bf16":
            low[dtype] = (kind == number) | low.get(dtype, False)
    return [Kept(bias[i], {dtype: mask[i] for dtype, mask in low.items()}) for i in range(layers)]


def _ada(score: Tensor, method: Method, budget: int) -> Tensor:
    """AdaKV (arXiv:2407.11550, algorithm 1): a layer's heads share one budget by their scores; each has a fifth of its part for sure."""
    heads, tokens = score.shape
    free = budget - method.start - method.recent
    sure = int(0.2 * free)
    middle = score[:, method.start : tokens - method.recent]
    middle = middle / score.sum(1, keepdim=True)  # shares of attention, so that heads can be compared
    rest = middle.scatter(1, middle.topk(min(sure, middle.shape[1])).indices, -math.inf)
    top = rest.flatten().topk(min((free - sure) * heads, rest.numel())).indices // middle.shape[1]
    return top.bincount(minlength=heads) + sure + method.start + method.recent


def _own(signature: Tensor, method: Method, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Representatives chosen otherwise than by KVCrush: positions among the candidates, and how many each stands for."""
    n = len(signature)
    count = min(count, n)
    if method.spread == "random":
        return torch.randperm(n, generator=generator)[:count].sort().values, torch.full((count,), n / count)
    if method.spread == "position":
        i = torch.arange(count)
        return (2 * i + 1) * n // (2 * count), ((i + 1) * n // count - i * n // count).float()
    bits = (signature[..., None] >> torch.arange(64) & 1).flatten(1)
    return kmeans(bits[:, bits.any(0)].float(), count)


def kmeans(bits: Tensor, count: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Of each of ``count`` clusters of binary rows, the row nearest to its centre, and the cluster's size.

    The centres start at rows evenly spread in the order of the rows as numbers. A cluster left empty gives its place to a row that is no
    representative yet, evenly spread among those.
    """
    n = len(bits)
    order = (bits @ 2.0 ** torch.arange(bits.shape[1])).sort(stable=True).indices
    centres = bits[order[(2 * torch.arange(count) + 1) * n // (2 * count)]]
    for _ in range(iterations):
        nearest = (bits @ centres.T * -2 + centres.square().sum(1)).argmin(1)
        sizes = nearest.bincount(minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, bits)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
    distance = (bits - centres[nearest]).square().sum(1)
    ranked = distance.sort(stable=True).indices
    ranked = ranked[nearest[ranked].sort(stable=True).indices]  # by cluster, the nearest first
    heads = torch.cat([torch.ones(1, dtype=torch.bool), nearest[ranked][1:] != nearest[ranked][:-1]])
    picked = ranked[heads]
    if missing := count - len(picked):
        rest = torch.ones(n, dtype=torch.bool)
        rest[picked] = False
        others = rest.nonzero()[:, 0]
        others = others[(2 * torch.arange(missing) + 1) * len(others) // (2 * missing)]
        sizes.index_add_(0, nearest[others], torch.full_like(others, -1))  # they stand for themselves
        return torch.cat([picked, others]), torch.cat([sizes[nearest[picked]], torch.ones_like(others)]).float()
    return picked, sizes[nearest[picked]].float()
