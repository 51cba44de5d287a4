"""Signatures and selection of kv_cache: a model in lists, sets and whole numbers, one unit after another."""

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from case import Args, Bad, Case, Sample, replaced

ANCHORS = ("random", "zeros", "ones", "mean", "inv_mean", "alternate")
SCORES = ("normal", "softmax", "rounded", "equal", "special", "zeros")


def largest(score: list[float], begin: int, end: int, count: int) -> list[int]:
    """Positions of the largest scores, the largest first; ties by position, NaN last."""
    return sorted(range(begin, end), key=lambda t: (1, 0.0, t) if math.isnan(score[t]) else (0, -score[t], t))[:count]


def signatures(score: Tensor, begin: list[int], end: list[int], page: int = 1) -> list[list[int]]:
    """Of every row and unit, as one whole number."""
    batch, heads, tokens = score.shape
    result = [[0] * -(-tokens // page) for _ in range(batch)]
    for b, s in itertools.product(range(batch), range(heads)):
        for t in largest(score[b, s].tolist(), begin[b], end[b], max(0, end[b] - begin[b]) // 2):
            result[b][t // page] |= 1 << (s * page + t % page)
    return result


def signed(word: int) -> int:
    """64 bits as an int64 has them."""
    return word - (word >> 63 << 64)


def split_mix(seed: int):
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    state, mask = seed % 2**64, 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def anchors_of(units: list[int], words: int, anchor: str, count: int, seed: int) -> list[int]:
    """All anchors as whole numbers of ``64 * words`` bits."""
    size = 64 * words
    drawn = split_mix(seed)
    result = [sum(next(drawn) << 64 * w for w in range(words)) for _ in range(count)]
    ones = 2**size - 1
    if anchor in ("mean", "inv_mean"):
        majority = sum(1 << i for i in range(size) if 2 * sum(unit >> i & 1 for unit in units) > len(units))
        result[0] = majority if anchor == "mean" else ones ^ majority
    elif anchor != "random":
        result[0] = {"zeros": 0, "ones": ones, "alternate": sum(2 << i for i in range(0, size, 2))}[anchor]
    return result


def kept(args: Args, b: int, h: int) -> dict[int, tuple[int, int]]:
    """Of one KV head: unit -> kind and members."""
    start, recent, ratio = (args.get(name, default) for name, default in (("start", 0), ("recent", 0), ("ratio", 0.25)))
    first, length, budget = (int(args[name][b, h]) for name in ("first", "length", "budget"))
    low = min(first + start, length)
    middle = range(low, max(low, length - recent))
    result = {t: (0, 1) for t in range(first, length) if t not in middle}
    if length - first <= budget:
        return result | {t: (1, 1) for t in middle}
    free = budget - start - recent
    count = math.floor(Fraction(ratio) * free + Fraction(1, 2))
    important = largest(args["score"][b, h].tolist(), middle.start, middle.stop, free - count)
    result |= {t: (1, 1) for t in important}
    if count:
        rows = args["signature"][b, h if args["signature"].shape[1] > 1 else 0].tolist()
        units = {t: sum((word % 2**64) << 64 * w for w, word in enumerate(rows[t])) for t in middle}
        points = anchors_of(list(units.values()), len(rows[0]), args.get("anchor", "mean"), args.get("anchors", 1), args.get("seed", 0))
        order = sorted(middle, key=lambda t: (*((units[t] ^ point).bit_count() for point in points), t))
        candidates = [t for t in order if t not in set(important)]
        step = Fraction(len(candidates), count)
        for i in range(count):
            result[candidates[math.floor((i + Fraction(1, 2)) * step)]] = (2, math.floor((i + 1) * step) - math.floor(i * step))
    return result


def scores(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    if kind == "softmax":
        return (3 * normal).softmax(-1) if shape[-1] else normal
    if kind == "rounded":
        return normal.round()  # with zeros of both signs
    if kind == "equal":
        return torch.full(shape, -0.5)
    if kind == "zeros":
        return torch.zeros(shape).copysign(normal)
    if kind == "special":
        for i, value in enumerate((math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42)):
            normal = torch.where((uniform * 16).int() == i, torch.tensor(value), normal)
    return normal


# ------------------------------------------------------------------------------------------------------------------------------------ sign


def sign_sample(score: Tensor, begin: list[int], end: list[int], page: int = 1, name: str = "") -> Sample:
    def expected() -> tuple[Tensor, float]:
        words, units = -(-score.shape[1] * page // 64), -(-score.shape[2] // page)
        whole = [[[signed(u >> 64 * w & (2**64 - 1)) for w in range(words)] for u in row] for row in signatures(score, begin, end, page)]
        return torch.tensor(whole, dtype=torch.int64).view(score.shape[0], units, words), 0.0

    args = {"score": score, "begin": torch.tensor(begin, dtype=torch.int64), "end": torch.tensor(end, dtype=torch.int64), "page": page}
    return Sample(f"{tuple(score.shape)} {name} page={page} {begin} {end}", args, functools.cache(expected))


@functools.cache
def _sign_samples() -> list[Sample]:
    generator, kinds = torch.Generator().manual_seed(30), itertools.cycle(SCORES)
    samples = []
    for tokens, heads in itertools.product((0, 1, 2, 15, 16, 17, 63, 64, 65, 130), (1, 3, 31, 32, 33, 64, 65)):
        for page in (1, 3, 16, 64, 100):
            kind = next(kinds)
            begin, end = ([0], [tokens]) if heads % 2 else ([tokens // 5], [tokens - tokens // 7])
            samples.append(sign_sample(scores(kind, (1, heads, tokens), generator), begin, end, page, kind))
    for kind in SCORES:
        samples.append(sign_sample(scores(kind, (4, 5, 300), generator), [0, 299, 400, 7], [300, 298, 300, -5], 1, kind))
        samples.append(sign_sample(scores(kind, (3, 2, 300), generator), [0, 10, 33], [300, 291, 34], 32, kind))
        for tokens in (4096, 4100, 9001):  # where a sample narrows the search
            samples.append(sign_sample(scores(kind, (1, 3, tokens), generator), [5], [tokens - 1], 1, kind))
    for kind in ("normal", "rounded"):
        samples.append(sign_sample(scores(kind, (1, 1, 40000), generator), [1], [40000], 1, kind))
    misleading = torch.rand(1, 2, 8192, generator=generator)
    misleading[..., ::32] += 1  # what a sample of every 32nd score sees
    samples.append(sign_sample(misleading, [0], [8192], 1, "misleading"))
    for shape in ((0, 3, 20), (2, 0, 20)):
        samples.append(sign_sample(torch.zeros(shape), [0] * shape[0], [20] * shape[0]))
    return samples


@functools.cache
def _few_sign() -> list[Sample]:
    generator = torch.Generator().manual_seed(31)
    return [
        sign_sample(scores("normal", (2, 3, 40), generator), [2, 5], [36, 40]),
        sign_sample(scores("rounded", (1, 5, 50), generator), [0], [47], 16),
    ]


def _wrong_scores(op: str, dimensions: str) -> list[Bad]:
    message = f"{op}: score must be a 3-D float32 tensor ({dimensions}), got "
    return [
        Bad(message + "2-D Float", replaced(score=lambda s: s[0])),
        Bad(message + "3-D Double", replaced(score=lambda s: s.double())),
        Bad(message + "3-D BFloat16", replaced(score=lambda s: s.bfloat16())),
    ]


def _wrong_numbers(op: str, argument: str, shape: str, other: str) -> list[Bad]:
    message = f"{op}: {argument} must be an int64 tensor of shape ({shape}), got "
    return [
        Bad(message + other.replace("Long", "Int"), replaced(**{argument: lambda t: t.int()})),
        Bad(message + other.split("-")[0] + "-D Long with 0 elements", replaced(**{argument: lambda t: t[:0]})),
        Bad(message + "0-D Long with 1 elements", replaced(**{argument: lambda t: t.flatten()[0]})),
    ]


def filled(value: int) -> Any:
    return lambda t: torch.full_like(t, value)


_SIGN = Case(
    op="kv_cache_sign",
    samples=_sign_samples,
    few=_few_sign,
    strided=("score", "begin", "end"),
    bad=[
        *_wrong_scores("kv_cache_sign", "batch, signature heads, tokens"),
        *_wrong_numbers("kv_cache_sign", "begin", "2,", "1-D Long with 2 elements"),
        *_wrong_numbers("kv_cache_sign", "end", "2,", "1-D Long with 2 elements"),
        *(Bad(f"kv_cache_sign: page must be from 1 to 1024, got {page}", replaced(page=page)) for page in (0, -1, 1025, 2**62)),
        Bad("kv_cache_sign: begin must be at least 0, got -1", replaced(begin=filled(-1)), traced=False),
        Bad("kv_cache_sign: end must be at most 40, got 41", replaced(end=filled(41)), traced=False),
    ],
)


# ---------------------------------------------------------------------------------------------------------------------------------- select


def select_expected(args: Args) -> Tensor:
    """All results one after another, as float64."""
    batch, heads, _ = args["score"].shape
    most = args["most"]
    index, kind, members = [], [], []
    count = []
    for b, h in itertools.product(range(batch), range(heads)):
        units = sorted(kept(args, b, h).items())
        rest = most - len(units)
        count.append(len(units))
        index += [t for t, _ in units] + [-1] * rest
        kind += [why for _, (why, _) in units] + [255] * rest
        members += [number for _, (_, number) in units] + [0] * rest
    return torch.tensor([*index, *count, *kind, *members], dtype=torch.float64)


def select_sample(
    shape: tuple[int, int, int], words: int, draws: int, kind: str = "normal", shared: bool = True, ragged: bool = True, **options: Any
) -> Sample:
    """``shape``: batch, KV heads, units; ``options``: those of the op; ``budget`` of all heads, or drawn."""
    batch, heads, units = shape
    generator = torch.Generator().manual_seed(draws)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, max(low, high) + 1, (batch, heads), generator=generator)

    least = options.get("start", 0) + options.get("recent", 0) + 1
    first = draw(0, units // 4) if ragged else torch.zeros(batch, heads, dtype=torch.int64)
    length = draw(units - units // 4, units) if ragged else torch.full((batch, heads), units)
    budget = draw(least, least + units // 2)
    if "budget" in options:
        budget = torch.full_like(budget, options["budget"])
    signature = torch.randint(-(2**63), 2**63 - 1, (batch, 1 if shared else heads, units, words), generator=generator)
    args = {
        **{"score": scores(kind, shape, generator), "signature": signature, "first": first, "length": length, "most": 0},
        **options,
        "budget": budget,
    }
    args["most"] = max(options.get("most", 0), int(budget.max()) if budget.numel() else 0)
    name = f"{shape} words={words} draws={draws} {kind} shared={shared} ragged={ragged} {options}"
    return Sample(name, args, functools.cache(lambda: (select_expected(args), 0.0)))


@functools.cache
def _select_samples() -> list[Sample]:
    seeds, kinds = itertools.count(50), itertools.cycle(SCORES)
    samples = []
    for anchor, anchors, words in itertools.product(ANCHORS, (1, 2, 3), (1, 2)):
        for shared in (True, False):
            samples.append(
                select_sample(
                    (2, 3, 150), words, next(seeds), next(kinds), shared, anchor=anchor, anchors=anchors, start=4, recent=9, seed=-7 * words
                )
            )
    for units, ratio in itertools.product((1, 2, 3, 16, 63, 64, 65, 129), (0.0, 0.25, 0.5, 0.9, 1.0)):
        samples.append(select_sample((1, 2, units), 1, next(seeds), next(kinds), ragged=False, ratio=ratio))
        samples.append(select_sample((1, 2, units), 1, next(seeds), next(kinds), budget=max(1, units - 1), ratio=ratio))
        samples.append(select_sample((2, 1, units), 1, next(seeds), next(kinds), budget=4, start=1, recent=2, ratio=ratio, most=7))
    for budget in (3, 4, 10, 60, 99, 100, 101, 200):  # fewer candidates than twice the representatives, none, nothing dropped
        for ratio in (0.5, 1.0):
            samples.append(
                select_sample((1, 1, 100), 1, next(seeds), next(kinds), ragged=False, budget=budget, ratio=ratio, start=1, recent=1)
            )
    for kind in SCORES:
        samples.append(select_sample((2, 2, 700), 3, next(seeds), kind, budget=200, start=4, recent=16))
        samples.append(select_sample((1, 2, 6000), 1, next(seeds), kind, budget=1500, start=4, recent=16, ragged=False))
    samples.append(select_sample((2, 3, 5000), 1, next(seeds), "rounded", budget=1200, start=4, recent=16))  # enough for two threads
    samples.append(select_sample((1, 1, 40), 20, next(seeds), budget=11, anchors=8, anchor="random", seed=2**63 - 1))
    samples.append(select_sample((2, 2, 40), 0, next(seeds), ratio=0.0))
    samples.append(select_sample((1, 2, 40), 1, next(seeds), start=30, recent=30, budget=61))  # start and recent overlap
    for shape in ((0, 2, 10), (2, 0, 10), (2, 2, 0)):
        samples.append(select_sample(shape, 1, next(seeds), shared=shape[1] > 0))
    return samples


@functools.cache
def _few_select() -> list[Sample]:
    return [
        select_sample((1, 2, 60), 1, 1, ragged=False, budget=20, start=2, recent=5),
        select_sample((2, 3, 40), 2, 2, "rounded", shared=False, start=1, recent=2, ratio=0.5, anchor="random", anchors=2, seed=3),
    ]


_SELECT_NAME = "kv_cache_select"
_SELECT = Case(
    op=_SELECT_NAME,
    samples=_select_samples,
    few=_few_select,
    strided=("score", "signature", "first", "length", "budget"),
    bad=[
        *_wrong_scores(_SELECT_NAME, "batch, KV heads, units"),
        Bad(
            f"{_SELECT_NAME}: signature must be a 4-D int64 tensor (batch, 1 or KV heads, units, words), got 3-D Long",
            replaced(signature=lambda s: s[0]),
        ),
        Bad(
            f"{_SELECT_NAME}: signature must be a 4-D int64 tensor (batch, 1 or KV heads, units, words), got 4-D Byte",
            replaced(signature=lambda s: s.byte()),
        ),
        *(
            Bad(f"{_SELECT_NAME}: signature must be (1, 1 or 2, 60, words), got ({got}, words)", replaced(signature=spoil))
            for got, spoil in (
                ("2, 1, 60", lambda s: s.expand(2, 1, 60, 1)),
                ("1, 3, 60", lambda s: s.expand(1, 3, 60, 1)),
                ("1, 1, 59", lambda s: s[:, :, 1:]),
            )
        ),
        *(
            Bad(
                f"{_SELECT_NAME}: signature must have 1 to 1023 words, or none where ratio is 0, got {words}",
                replaced(signature=lambda s, words=words: s[..., :1].expand(*s.shape[:3], words) if words else s[..., :0]),
            )
            for words in (0, 1024)
        ),
        *(bad for name in ("first", "length", "budget") for bad in _wrong_numbers(_SELECT_NAME, name, "1, 2", "2-D Long with 2 elements")),
        Bad(f"{_SELECT_NAME}: most must be at least 0, got -1", replaced(most=-1)),
        *(
            Bad(f"{_SELECT_NAME}: {name} must be from 0 to 2147483647, got {value}", replaced(**{name: value}))
            for name, value in itertools.product(("start", "recent"), (-1, 2**31, 2**62))
        ),
        *(
            Bad(f"{_SELECT_NAME}: ratio must be from 0 to 1, got {value:g}", replaced(ratio=value))
            for value in (-0.25, 1.5, math.nan, math.inf)
        ),
        *(
            Bad(
                f"{_SELECT_NAME}: anchor must be random, zeros, ones, mean, inv_mean or alternate, got {anchor}",
                replaced(anchor=anchor),
            )
            for anchor in ("median", "", "Mean")
        ),
        *(Bad(f"{_SELECT_NAME}: anchors must be from 1 to 8, got {anchors}", replaced(anchors=anchors)) for anchors in (0, -1, 9)),
        Bad(f"{_SELECT_NAME}: length must be from 0 to 60, got 61", replaced(length=filled(61)), traced=False),
        Bad(f"{_SELECT_NAME}: length must be from 0 to 60, got -1", replaced(length=filled(-1)), traced=False),
        Bad(f"{_SELECT_NAME}: first must be from 0 to the length, 60, got 61", replaced(first=filled(61)), traced=False),
        Bad(f"{_SELECT_NAME}: first must be from 0 to the length, 60, got -1", replaced(first=filled(-1)), traced=False),
        Bad(f"{_SELECT_NAME}: most must be at least each budget, 20, got 19", replaced(most=19), traced=False),
        *(
            Bad(
                f"{_SELECT_NAME}: budget must be at least start + recent + 1, 8, where units are dropped, got {value}",
                replaced(budget=filled(value)),
                traced=False,
            )
            for value in (7, 0, -1, -(2**63))
        ),
    ],
)

CASES = (_SIGN, _SELECT)
