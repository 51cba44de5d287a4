"""Attention of a prompt of kv_cache: a model in float64, one query after another."""

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from case import Args, Bad, Case, Sample, replaced

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OP = "kv_cache_prefill"


def prefill_model(args: Args) -> tuple[Tensor, Tensor]:
    """Output, log-sum-exp, scores and signatures as one vector, and how far off each may be; signatures, which a rounding of the scores can
    change, have tests of their own."""
    query, key, value = (args[name].double().numpy() for name in ("query", "key", "value"))
    (batch, heads, length, d), (kv_heads, tokens) = query.shape, key.shape[1:3]
    scored = args["window"] or args["sample"]
    out, out_bound = np.zeros((2, *query.shape))
    lse, lse_bound = np.full(query.shape[:3], -np.inf), np.zeros(query.shape[:3])
    score, score_bound = np.zeros((2, batch, heads, tokens if scored else 0))
    rounded = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[args["query"].dtype]
    for b, head in itertools.product(range(batch), range(heads)):
        h = head * kv_heads // heads
        first = 0 if args["first"] is None else int(args["first"][b, h])
        k, v = key[b, h, first:], value[b, h, first:]
        chosen = np.zeros(tokens - first), np.zeros(tokens - first)
        for i in range(length):
            seen = tokens - length + i + 1 - first
            if seen <= 0:
                continue
            products = k[:seen] @ query[b, head, i] * args["scale"]
            s = products
            if args["softcap"]:
                s = args["softcap"] * np.tanh(s / args["softcap"])
            if args["bias"] is not None:
                s = s + args["bias"][b, h, first : first + seen].double().numpy()
            largest = s.max()
            p = np.exp(s - largest) if largest > -np.inf else np.zeros(seen)
            # how far off a score may be: float32 sums of d products, then a few roundings of numbers as large as the score
            sums = (np.abs(k[:seen]) @ np.abs(query[b, head, i]) * abs(args["scale"])).max() * d
            off = (sums + 8 * (np.abs(s[np.isfinite(s)]).max(initial=0) + args["softcap"]) + 32) * 2.0**-24
            if p.sum() > 0:
                lse[b, head, i], lse_bound[b, head, i] = largest + np.log(p.sum()), off
                p /= p.sum()
            out[b, head, i] = p @ v[:seen]
            weighted = p @ np.abs(v[:seen])
            weight_off = 2 * off + seen * 2.0**-24 + (2.0**-8 if args["query"].dtype == torch.bfloat16 else 0)  # weights are rounded
            out_bound[b, head, i] = weighted * weight_off + rounded * np.abs(out[b, head, i]) + 2.0**-24
            if scored and (i >= length - args["window"] if args["window"] else (length - 1 - i) % args["sample"] == 0):
                chosen[0][:seen] += p
                chosen[1][:seen] += p * (3 * off + length * 2.0**-24) + 2.0**-100
        if scored:
            half = args["pool"] // 2
            for t in range(tokens - first):
                near = slice(max(t - half, 0), t + half + 1)
                score[b, head, first + t], score_bound[b, head, first + t] = (one[near].max() for one in chosen)
    words = batch * (tokens if args["sign"] else 0) * -(-heads // 64)
    expected, bounds = (out, lse, score, np.zeros(words)), (out_bound, lse_bound, score_bound, np.full(words, np.inf))
    vector, bound = (torch.from_numpy(np.concatenate([one.ravel() for one in several])) for several in (expected, bounds))
    return vector, bound


def prefill_args(
    shape: tuple[int, int, int, int, int],
    tokens: int,
    kind: torch.dtype,
    seed: int,
    first: Tensor | bool = False,
    bias: bool = False,
    junk: bool = False,
    large: float = 1,
    **options: float,
) -> Args:
    """Arguments of the op.

    Args:
        shape: batch, KV heads, query heads that share one, queries, head_dim.
        tokens: of keys and values.
        kind: their dtype.
        seed: of random numbers.
        first: the op's, or whether to draw it.
        bias: whether there is one; some of it is minus infinity.
        junk: NaN and infinity in the place of padding.
        large: what queries are multiplied with, for scores far apart.
        options: what differs from the op's defaults.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group, length, d = shape
    query, key, value = (
        torch.randn(batch, heads, count, d, generator=generator)
        for heads, count in ((kv_heads * group, length), (kv_heads, tokens), (kv_heads, tokens))
    )
    if first is True:
        first = torch.randint(0, tokens + 1, (batch, kv_heads), generator=generator)
    biases = None
    if bias:
        biases = torch.randn(batch, kv_heads, tokens, generator=generator)
        biases[torch.rand(biases.shape, generator=generator) < 0.1] = -math.inf
    if junk and isinstance(first, Tensor):
        padding = torch.arange(tokens) < first[..., None]
        key[padding], value[padding] = math.nan, math.inf
        if biases is not None:
            biases[padding] = math.nan
    defaults = {"scale": d**-0.5, "softcap": 0.0, "window": 0, "sample": 0, "pool": 1, "start": 0, "recent": 0, "sign": False}
    return {
        **{"query": (query * large).to(kind), "key": key.to(kind), "value": value.to(kind)},
        **{"first": first if isinstance(first, Tensor) else None, "bias": biases},
        **defaults,
        **options,
    }


def _sample(*shape: object, **options: object) -> Sample:
    args = prefill_args(*shape, **options)  # type: ignore[arg-type]
    name = ", ".join(map(str, (*shape, *(f"{key}={value}" for key, value in options.items() if not isinstance(value, Tensor)))))
    return Sample(name, args, functools.cache(lambda: prefill_model(args)))


@functools.cache
def _samples() -> list[Sample]:
    kinds, seeds = itertools.cycle(FLOATS), itertools.count(50)
    scores = itertools.cycle(
        ({}, {"window": 3, "pool": 3}, {"sample": 1}, {"sample": 3, "pool": 7}, {"window": 1000, "pool": 1001, "sign": True})
    )
    samples = []
    for d, group in itertools.product((16, 48, 64, 80, 112, 128), (1, 2, 3, 4, 7, 8)):
        length = 1 + next(seeds) * 7 % 40
        past = next(seeds) % 3 * 13
        samples.append(_sample((1, 2, group, length, d), length + past, next(kinds), next(seeds), **next(scores)))
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 64, 65):  # around blocks and tiles
        samples.append(_sample((1, 1, 4, length, 16), length, next(kinds), next(seeds), **next(scores)))
    for length, tokens in ((255, 255), (256, 256), (257, 257), (3, 513), (2, 1030), (70, 530)):  # around stretches and parts
        for kind in FLOATS:
            samples.append(_sample((1, 1, 2, length, 32), tokens, kind, next(seeds), **next(scores)))
    for kind, junk, bias in itertools.product(FLOATS, (False, True), (False, True)):
        for length, tokens in ((20, 20), (5, 40), (40, 300)):
            options = next(scores) | {"first": True, "junk": junk, "bias": bias, "softcap": 2.0 * bias}
            samples.append(_sample((2, 2, 2, length, 32), tokens, kind, next(seeds), **options))
    for options in ({"scale": -0.3}, {"scale": 0.0}, {"large": 100.0}, {"large": 100.0, "softcap": 30.0}, {"large": 1e-3, "softcap": 0.5}):
        for kind in FLOATS:
            samples.append(_sample((1, 2, 2, 37, 64), 300, kind, next(seeds), window=9, pool=5, **options))
    for shape, tokens in (((0, 1, 2, 3, 16), 3), ((1, 1, 2, 0, 16), 0), ((1, 1, 2, 0, 16), 20), ((1, 2, 0, 4, 16), 20)):
        samples.append(_sample(shape, tokens, torch.float32, next(seeds), window=2, pool=3, sign=True))
    nobody = torch.full((1, 2), 20)  # only padding
    samples.append(_sample((1, 2, 2, 7, 16), 20, torch.bfloat16, next(seeds), first=nobody, window=2, pool=3, sign=True))
    return samples


@functools.cache
def _few() -> list[Sample]:
    first = torch.tensor([[3, 0]])
    return [
        _sample((1, 2, 2, 6, 32), 9, torch.float32, 1, first=first, bias=True, window=3, pool=3, start=1, recent=2, sign=True),
        _sample((2, 1, 3, 20, 48), 20, torch.bfloat16, 2, sample=2, pool=5, sign=True),
        _sample((1, 2, 1, 3, 16), 40, torch.float16, 3, first=torch.tensor([[5, 39]]), window=2),
    ]


_PREFILL = Case(
    op=OP,
    samples=_samples,
    few=_few,
    strided=("query", "key", "value", "first", "bias"),
    bad=[
        *(
            Bad(f"{OP}: {message}", spoil)
            for message, spoil in (
                ("query must be float32, bfloat16 or float16, got Double", replaced(query=lambda q: q.double())),
                ("query must be float32, bfloat16 or float16, got Long", replaced(query=lambda q: q.long())),
                ("query must be 4-D (batch, heads, length, head_dim), got 3-D", replaced(query=lambda q: q[0])),
                ("head_dim must be a positive multiple of 16, got 31", replaced(query=lambda q: q[..., 1:])),
                ("head_dim must be a positive multiple of 16, got 0", replaced(query=lambda q: q[..., :0])),
                *(
                    (f"{name} must be {message}", replaced(**{name: change}))
                    for name in ("key", "value")
                    for message, change in (
                        ("a 4-D Float tensor (batch, KV heads, tokens, head_dim), got 4-D BFloat16", lambda t: t.bfloat16()),
                        ("a 4-D Float tensor (batch, KV heads, tokens, head_dim), got 3-D Float", lambda t: t[0]),
                    )
                ),
                ("key must have batch 1 and head_dim 32, got 2 and 32", replaced(key=lambda k: k.expand(2, -1, -1, -1))),
                ("key must have batch 1 and head_dim 32, got 1 and 16", replaced(key=lambda k: k[..., :16])),
                ("value must have batch 1 and head_dim 32, got 1 and 16", replaced(value=lambda v: v[..., :16])),
                ("value must have 2 KV heads and 9 tokens, got 1 and 9", replaced(value=lambda v: v[:, 1:])),
                ("value must have 2 KV heads and 9 tokens, got 2 and 8", replaced(value=lambda v: v[:, :, 1:])),
                ("query must have a multiple of the 2 KV heads, got 3", replaced(query=lambda q: q[:, 1:])),
                (
                    "query must have a multiple of the 0 KV heads, got 4",
                    replaced(key=lambda k: k[:, :0], value=lambda v: v[:, :0]),
                ),
                (
                    "query must be of at most the 5 tokens of key, got 6",
                    replaced(key=lambda k: k[:, :, :5], value=lambda v: v[:, :, :5]),
                ),
                ("first must be an int64 tensor of shape (1, 2), got 2-D Int with 2 elements", replaced(first=lambda f: f.int())),
                ("first must be an int64 tensor of shape (1, 2), got 2-D Long with 1 elements", replaced(first=lambda f: f[:, 1:])),
                ("first must be an int64 tensor of shape (1, 2), got 1-D Long with 2 elements", replaced(first=lambda f: f[0])),
                (
                    "bias must be a float32 tensor of shape (1, 2, 9), got 3-D BFloat16 with 18 elements",
                    replaced(bias=lambda b: b.bfloat16()),
                ),
                ("bias must be a float32 tensor of shape (1, 2, 9), got 3-D Float with 16 elements", replaced(bias=lambda b: b[..., 1:])),
                ("bias must be a float32 tensor of shape (1, 2, 9), got 2-D Float with 18 elements", replaced(bias=lambda b: b[0])),
                *((f"softcap must be 0 or positive, got {n:g}", replaced(softcap=n)) for n in (-1.0, math.inf, math.nan)),
                *((f"{name} must not be negative, got -1", replaced(**{name: -1})) for name in ("window", "sample", "start", "recent")),
                ("window and sample must not both be given, got window 3 and sample 2", replaced(sample=2)),
                *((f"pool must be odd and positive, got {n}", replaced(pool=n)) for n in (0, 2, -1)),
                ("sign must come with window or sample, got neither", replaced(window=0)),
            )
        ),
        *(
            Bad(
                f"{OP}: first must be 0 to 9 (tokens), got {n}",
                replaced(first=lambda f, n=n: f.clone().fill_(n)),
                traced=False,
            )
            for n in (-1, 10)
        ),
    ],
)

CASES = (_PREFILL,)
