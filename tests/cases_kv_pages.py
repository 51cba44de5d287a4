"""Pages of kv_cache and attention over them: pages written as the drawings in kernels/kv_cache/attend.h read, softmax in float64."""

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from case import Args, Bad, Case, Sample, replaced

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
NAMES = {dtype: name for name, dtype in TYPES.items()}
KINDS = ("key", "value")
HALVES = (0, 2, 4, 6, 1, 3, 5, 7)


def place(kind: str, per_lane: int, head_dim: int, token: int, element: int) -> int:
    """Number of an element in the rows of a page."""
    if kind == "key":
        return (element // per_lane * 16 + token) * per_lane + element % per_lane
    return (token // per_lane * head_dim + element) * per_lane + token % per_lane


def groups(kind: str, dtype: str, head_dim: int) -> list[list[tuple[int, int]]]:
    """Tokens and elements that share a scale."""
    if dtype == "int4" and kind == "key":
        return [[(t, e) for t in range(16)] for e in range(head_dim)]
    return [[(t, e) for e in range(head_dim)] for t in range(16)]


def page_by_hand(x: Tensor, kind: str, dtype: str) -> Tensor:
    """Sixteen vectors of d elements."""
    d, per_lane = x.shape[1], {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}[dtype]
    at = [(place(kind, per_lane, d, t, e), t, e) for t, e in itertools.product(range(16), range(d))]
    if dtype in ("fp32", "bf16"):
        page = torch.empty(16 * d, dtype=TYPES[dtype])
        for i, t, e in at:
            page[i] = x[t, e]
        return page
    most, values = {"int8": 255, "int4": 15}[dtype], x.float().numpy()
    codes, scales, minimums = np.zeros((16, d), np.uint8), [], []
    for group in groups(kind, dtype, d):
        own = np.array([values[t, e] for t, e in group], np.float32)
        if np.isfinite(own).all():
            low, high = own.min(), own.max()
            scale = np.float16(min(np.float32(high / np.float32(most) - low / np.float32(most)), np.float32(65504)))
            minimum = np.float16(np.clip(low, -65504, 65504))
        else:
            scale = minimum = np.float16(np.nan)
        scales.append(scale)
        minimums.append(minimum)
        for t, e in group:
            if scale > 0:
                code = np.rint((values[t, e] - np.float32(minimum)) * (np.float32(1) / np.float32(scale)))
                codes[t, e] = np.clip(code, 0, most)
    rows = np.zeros(16 * d if dtype == "int8" else 8 * d, np.uint8)
    for i, t, e in at:
        if dtype == "int8":
            rows[i] = codes[t, e]
        else:
            half = HALVES.index(i % 8)
            rows[i // 8 * 4 + half // 2] |= codes[t, e] << 4 * (half % 2)
    page = rows.tobytes() + np.array(scales + minimums, np.float16).tobytes()
    return torch.frombuffer(bytearray(page), dtype=torch.uint8).view(TYPES[dtype])


def read_by_hand(page: Tensor, kind: str, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 values of a page, and the scale of each; 0 where there are none."""
    dtype, d = NAMES[page.dtype], head_dim
    per_lane = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}[dtype]
    values, steps = np.zeros((16, d)), np.zeros((16, d))
    at = {(t, e): place(kind, per_lane, d, t, e) for t, e in itertools.product(range(16), range(d))}
    if dtype in ("fp32", "bf16"):
        numbers = page.double().tolist()
        for (t, e), i in at.items():
            values[t, e] = numbers[i]
        return values, steps
    raw = page.view(torch.uint8).numpy().tobytes()
    shared = groups(kind, dtype, d)
    grid = np.frombuffer(raw[len(raw) - 4 * len(shared) :], np.float16).astype(np.float64)
    for g, group in enumerate(shared):
        for t, e in group:
            i = at[t, e]
            half = HALVES.index(i % 8)
            code = raw[i] if dtype == "int8" else raw[i // 8 * 4 + half // 2] >> 4 * (half % 2) & 15
            values[t, e], steps[t, e] = grid[g] * code + grid[len(shared) + g], grid[g]
    return values, steps


def random_kv(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers, those of some elements larger in all tokens, some equal, some zero."""
    x = torch.randn(shape, generator=generator) * (1 + 4 * (torch.rand(shape[-1:], generator=generator) < 0.1))
    chance = torch.rand(shape, generator=generator)
    return torch.where(chance < 0.1, x.sign(), torch.where(chance < 0.15, torch.zeros(()), x))


# ------------------------------------------------------------------------------------------------------------------------------------ pack


def pack_sample(x: Tensor, kind: str, dtype: str, name: str = "") -> Sample:
    def expected() -> tuple[Tensor, float]:
        batch, heads, tokens, _ = x.shape
        pages = [page_by_hand(x[b, h, t : t + 16], kind, dtype) for b in range(batch) for h in range(heads) for t in range(0, tokens, 16)]
        size = page_by_hand(torch.zeros(16, x.shape[3]), kind, dtype).numel()
        whole = torch.stack(pages) if pages else torch.empty(0, dtype=TYPES[dtype])
        return whole.view(batch, heads, tokens // 16, size), 0

    return Sample(f"{name}{kind} {dtype} {tuple(x.shape)} {x.dtype}", {"x": x, "kind": kind, "dtype": dtype}, functools.cache(expected))


SHAPES = ((1, 1, 16, 16), (2, 3, 32, 64), (1, 2, 48, 80), (1, 1, 16, 256), (0, 2, 16, 32), (1, 2, 0, 32))


@functools.cache
def _pack_samples() -> list[Sample]:
    generator, floats = torch.Generator().manual_seed(40), itertools.cycle(FLOATS)
    samples = [
        pack_sample(random_kv(shape, generator).to(next(floats)), kind, dtype)
        for shape, kind, dtype in itertools.product(SHAPES, KINDS, TYPES)
    ]
    for kind, dtype in itertools.product(KINDS, ("int8", "int4")):
        x = random_kv((1, 1, 16, 32), generator)
        large, broken = x * 1e9, x.clone()
        broken[0, 0, 3, 5], broken[0, 0, 7, 9] = math.nan, math.inf
        for name, values in (("large ", large), ("broken ", broken), ("equal ", torch.full_like(x, 2.7)), ("tiny ", x * 1e-9)):
            samples.append(pack_sample(values, kind, dtype, name))
    return samples


@functools.cache
def _few_pack() -> list[Sample]:
    generator = torch.Generator().manual_seed(41)
    return [pack_sample(random_kv((1, 2, 32, 32), generator), kind, dtype) for kind, dtype in itertools.product(KINDS, TYPES)]


def _wrong_floats(op: str, argument: str) -> list[Bad]:
    return [
        Bad(f"{op}: {argument} must be float32, bfloat16 or float16, got {name}", replaced(**{argument: lambda x, d=dtype: x.to(d)}))
        for name, dtype in (("Double", torch.float64), ("Int", torch.int32))
    ]


_PACK = Case(
    op="kv_cache_pack",
    samples=_pack_samples,
    few=_few_pack,
    strided=("x",),
    bad=[
        *_wrong_floats("kv_cache_pack", "x"),
        Bad("kv_cache_pack: x must be 4-D (batch, KV heads, tokens, head_dim), got 3-D", replaced(x=lambda x: x[0])),
        Bad("kv_cache_pack: head_dim must be a positive multiple of 16, got 31", replaced(x=lambda x: x[..., 1:])),
        Bad("kv_cache_pack: head_dim must be a positive multiple of 16, got 0", replaced(x=lambda x: x[..., :0])),
        Bad("kv_cache_pack: x must have a multiple of 16 tokens, got 31", replaced(x=lambda x: x[:, :, 1:])),
        Bad("kv_cache_pack: kind must be key or value, got keys", replaced(kind="keys")),
        Bad("kv_cache_pack: dtype must be fp32, bf16, int8 or int4, got fp16", replaced(dtype="fp16")),
    ],
)


# ---------------------------------------------------------------------------------------------------------------------------------- unpack


def unpack_sample(x: Tensor, kind: str, dtype: str) -> Sample:
    pages = torch.ops.torch_cpu_ext.kv_cache_pack(x, kind=kind, dtype=dtype)
    batch, heads, tokens, d = x.shape

    def expected() -> tuple[Tensor, float]:
        flat = pages.flatten(0, 2)
        values = [torch.from_numpy(read_by_hand(page, kind, d)[0]).float() for page in flat]
        whole = torch.stack(values) if values else torch.empty(0)
        return whole.view(batch, heads, tokens, d).to(torch.float32 if dtype == "fp32" else torch.bfloat16), 0

    return Sample(f"{kind} {dtype} {tuple(x.shape)}", {"pages": pages, "kind": kind, "head_dim": d}, functools.cache(expected))


@functools.cache
def _unpack_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(42)
    return [unpack_sample(random_kv(shape, generator), kind, dtype) for shape, kind, dtype in itertools.product(SHAPES, KINDS, TYPES)]


@functools.cache
def _few_unpack() -> list[Sample]:
    generator = torch.Generator().manual_seed(43)
    return [unpack_sample(random_kv((1, 2, 32, 32), generator), kind, dtype) for kind, dtype in itertools.product(KINDS, TYPES)]


_UNPACK = Case(
    op="kv_cache_unpack",
    samples=_unpack_samples,
    few=_few_unpack,
    strided=("pages",),
    bad=[
        Bad("kv_cache_unpack: pages must be float32, bfloat16, int8 or uint8 (int4), got Half", replaced(pages=lambda p: p.half())),
        Bad("kv_cache_unpack: pages must be 4-D (batch, KV heads, pages, elements), got 3-D", replaced(pages=lambda p: p[0])),
        Bad("kv_cache_unpack: pages must have pages of 512 elements for head_dim 32, got 511", replaced(pages=lambda p: p[..., 1:])),
        Bad("kv_cache_unpack: kind must be key or value, got ", replaced(kind="")),
        Bad("kv_cache_unpack: head_dim must be a positive multiple of 16, got 24", replaced(head_dim=24)),
        Bad("kv_cache_unpack: head_dim must be a positive multiple of 16, got 0", replaced(head_dim=0)),
    ],
)


# ------------------------------------------------------------------------------------------------------------------------ pools and tables


def table_of(batch: int, heads: int, width: int, shared: bool, generator: torch.Generator) -> tuple[Tensor, int, int]:
    """A table of pages in any order, among pages that nobody uses; pages and heads of its pool."""
    tables = 1 if shared else heads
    room = batch * tables * width + 3
    order = torch.randperm(room, generator=generator)[: batch * tables * width]
    return order.int().view(batch, tables, width), room, heads if shared else 1


def pool_page(pool: Tensor, table: Tensor, b: int, h: int, i: int) -> Tensor:
    return pool[int(table[b, h % table.shape[1], i]), h % pool.shape[1]]


def _wrong_pools(op: str, few: str = "") -> list[Bad]:
    """For pools (batch 2, 3 KV heads of 32, each with a table of its own), by themselves or the first of a list."""

    def spoil(argument: str, change: Any) -> Any:
        if not few:
            return replaced(**{argument: change})
        name = {"table": "tables", "length": "lengths"}.get(argument, argument)
        return lambda args: args | {name: [change(args[name][0]), *args[name][1:]]}

    return [
        Bad(f"{op}: k_pages{few} must be 3-D (pages, heads, elements), got 2-D", spoil("k_pages", lambda p: p[0])),
        Bad(
            f"{op}: k_pages{few} must have pages of 512 elements for head_dim 32, got 511",
            spoil("k_pages", lambda p: p[..., 1:].contiguous()),
        ),
        Bad(f"{op}: v_pages{few} must have as many pages and heads as k_pages, ", spoil("v_pages", lambda p: p[1:].contiguous())),
        Bad(
            f"{op}: table{few} must be an int32 tensor of shape (2, 3, pages), got 3-D Long with ",
            spoil("table", lambda t: t.long()),
        ),
        Bad(f"{op}: table{few} must be an int32 tensor of shape (2, 3, pages), got 2-D Int with ", spoil("table", lambda t: t[0])),
        Bad(f"{op}: table{few} must be an int32 tensor of shape (2, 3, pages), got 3-D Int with ", spoil("table", lambda t: t[:, :1])),
        Bad(f"{op}: length{few} must be an int64 tensor of shape (2, 3), got 2-D Int with 6 elements", spoil("length", lambda t: t.int())),
        Bad(f"{op}: table{few} must have pages from 0 to ", spoil("table", lambda t: t + 1000), traced=False),
        Bad(f"{op}: table{few} must have pages from 0 to ", spoil("table", lambda t: -t - 1), traced=False),
        Bad(f"{op}: length{few} must be from 0 to 48, the tokens of its table, got ", spoil("length", lambda t: t + 48), traced=False),
    ]


# ---------------------------------------------------------------------------------------------------------------------------------- append


def append_sample(
    batch: int, heads: int, d: int, tokens: int, dtype: str, shared: bool, kind: torch.dtype, generator: torch.Generator
) -> Sample:
    width = 3
    table, room, own = table_of(batch, heads, width, shared, generator)
    pools = [torch.randn(room, own, 16 * d, generator=generator).to(TYPES[dtype]) for _ in KINDS]
    length = torch.randint(0, 16 * width - tokens + 1, (batch, heads), generator=generator)
    new = [random_kv((batch, heads, tokens, d), generator).to(kind) for _ in KINDS]

    before = [pool.clone() for pool in pools]

    def expected() -> tuple[Tensor, float]:
        after = [pool.clone() for pool in before]
        for pool, x, which in zip(after, new, KINDS, strict=True):
            for b, h, t, e in itertools.product(range(batch), range(heads), range(tokens), range(d)):
                page, slot = divmod(int(length[b, h]) + t, 16)
                pool_page(pool, table, b, h, page)[place(which, 4 // TYPES[dtype].itemsize, d, slot, e)] = x[b, h, t, e]
        return torch.cat([pool.double().flatten() for pool in after]), 0

    args = {"k_pages": pools[0], "v_pages": pools[1], "table": table, "length": length, "key": new[0], "value": new[1]}
    return Sample(f"{dtype} ({batch}, {heads}, {tokens}, {d}) shared={shared} {kind}", args, functools.cache(expected))


@functools.cache
def _append_samples() -> list[Sample]:
    generator, floats = torch.Generator().manual_seed(44), itertools.cycle(FLOATS)
    return [
        append_sample(batch, heads, d, tokens, dtype, shared, next(floats), generator)
        for (batch, heads, d), tokens, dtype, shared in itertools.product(
            ((1, 1, 16), (2, 3, 32), (1, 2, 80)), (0, 1, 2, 17), ("fp32", "bf16"), (False, True)
        )
    ]


@functools.cache
def _few_append() -> list[Sample]:
    generator = torch.Generator().manual_seed(45)
    return [append_sample(2, 3, 32, 2, dtype, False, torch.float32, generator) for dtype in ("fp32", "bf16")]


_APPEND = Case(
    op="kv_cache_append",
    samples=_append_samples,
    few=_few_append,
    strided=("table", "length", "key", "value"),
    mutates=("k_pages", "v_pages"),
    bad=[
        *_wrong_floats("kv_cache_append", "key"),
        Bad("kv_cache_append: key must be 4-D (batch, KV heads, tokens, head_dim), got 3-D", replaced(key=lambda x: x[0])),
        Bad(
            "kv_cache_append: value must have the shape and dtype of key, [2, 3, 2, 32] Float, got [2, 3, 1, 32] Float",
            replaced(value=lambda x: x[:, :, 1:]),
        ),
        Bad(
            "kv_cache_append: value must have the shape and dtype of key, [2, 3, 2, 32] Float, got [2, 3, 2, 32] Half",
            replaced(value=lambda x: x.half()),
        ),
        Bad(
            "kv_cache_append: k_pages must be float32 or bfloat16, the same for both, got Char",
            replaced(k_pages=lambda p: p.to(torch.int8)),
        ),
        Bad(
            "kv_cache_append: v_pages must be float32 or bfloat16, the same for both, got BFloat16",
            replaced(v_pages=lambda p: p.bfloat16()),
        ),
        Bad("kv_cache_append: k_pages must be contiguous", replaced(k_pages=lambda p: p.repeat(2, 1, 1)[::2])),
        Bad(
            "kv_cache_append: k_pages must have 1 or 3 heads, got 2",
            lambda args: args | {n: args[n].repeat(1, 2, 1) for n in ("k_pages", "v_pages")},
        ),
        Bad("kv_cache_append: length must not be negative, got ", replaced(length=lambda t: t - 48), traced=False),
        *_wrong_pools("kv_cache_append"),
    ],
)


# ---------------------------------------------------------------------------------------------------------------------------------- attend


def attend_model(args: Args) -> tuple[Tensor, Tensor]:
    """Output, log-sum-exp and mass as one vector, and how far off each may be."""
    query, pools = args["query"], list(zip(args["k_pages"], args["v_pages"], args["tables"], args["lengths"], strict=True))
    batch, q_heads, length, d = query.shape
    heads = args["lengths"][0].shape[1]
    group, slots = q_heads // heads, [16 * table.shape[2] for table in args["tables"]]
    q = query.double().numpy()
    out, out_bound = np.zeros((2, *query.shape))
    lse, lse_bound = np.full(query.shape[:3], -np.inf), np.zeros(query.shape[:3])
    mass, mass_bound = np.zeros((2, batch, heads, sum(slots) if args["mass"] else 0))
    rounded = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[query.dtype]
    for b, h in itertools.product(range(batch), range(heads)):
        keys, values, key_steps, value_steps, kinds, added, places, at = [], [], [], [], [], [], [], 0
        for n, (k_pool, v_pool, table, lengths) in enumerate(pools):
            count = int(lengths[b, h])
            for i in range(-(-count // 16)):
                for pool, kind, to, steps in ((k_pool, "key", keys, key_steps), (v_pool, "value", values, value_steps)):
                    numbers, own_steps = read_by_hand(pool_page(pool, table, b, h, i), kind, d)
                    to += list(numbers[: count - 16 * i])
                    steps += list(own_steps[: count - 16 * i])
            kinds += [NAMES[k_pool.dtype]] * count
            added += args["bias"][n][b, h, :count].double().tolist() if args["bias"] else [0.0] * count
            places += range(at, at + count)
            at += slots[n]
        total = len(keys)
        if not total:
            continue
        k, v, k_steps, v_steps = (np.array(x).reshape(total, d) for x in (keys, values, key_steps, value_steps))
        bias, codes = np.array(added), np.array([{"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}[kind] for kind in kinds])
        for g, i in itertools.product(range(group), range(length)):
            head, seen = h * group + g, total - length + i + 1
            if seen <= 0:
                continue
            one = q[b, head, i]
            scores = k[:seen] @ one * args["scale"]
            capped = args["softcap"] * np.tanh(scores / args["softcap"]) if args["softcap"] else scores
            s = capped + bias[:seen]
            p = np.exp(s - s.max())
            p /= p.sum()
            # Queries are rounded to bf16, to 8 bits, or, times the scale of the keys, to bf16; sums are float32.
            products, span = np.abs(k[:seen]) @ np.abs(one), 255 * k_steps[:seen] @ np.ones(d) * np.abs(one).max() / 254
            folded = 15 * k_steps[:seen] @ np.abs(one) * 2.0**-8
            by_kind = np.choose(codes[:seen], [0 * products, products * 2.0**-8, span, folded])
            minimums = np.abs(k[:seen]).max(-1, initial=0) + 255 * k_steps[:seen].max(-1, initial=0)
            exact = (products + minimums * np.abs(one).sum()) * (d + 8) * 2.0**-24
            off = (by_kind + exact).max() * abs(args["scale"]) + (np.abs(s).max() + args["softcap"] + 64) * 2.0**-22
            lse[b, head, i], lse_bound[b, head, i] = s.max() + np.log(np.exp(s - s.max()).sum()), 1.01 * off
            factor = np.exp(2 * off) - 1 + total * 2.0**-24
            out[b, head, i] = p @ v[:seen]
            # Weights are rounded to bf16, or to 16 bits of the largest scale.
            weights = p @ np.abs(v[:seen]) * (factor + 2.0**-8) + p @ (np.abs(v[:seen]) + 255 * v_steps[:seen]) * (2.0**-8 + factor)
            whole = (255 * v_steps[:seen].max(initial=0) + np.abs(v[:seen]).max(initial=0)) * seen * 2.0**-15 * p.max()
            out_bound[b, head, i] = weights + whole + rounded * np.abs(out[b, head, i]) + 2.0**-24
            if args["mass"]:
                mass[b, h, np.array(places[:seen])] += p
                mass_bound[b, h, np.array(places[:seen])] += p * factor + 2.0**-40
    parts = [torch.from_numpy(x).flatten() for x in (out, lse, mass)]
    bounds = [torch.from_numpy(x).flatten() for x in (out_bound, lse_bound, mass_bound)]
    return torch.cat(parts), torch.cat(bounds)


def attend_sample(
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 1,
    length: int = 1,
    d: int = 32,
    types: tuple[tuple[str, str], ...] = (("fp32", "fp32"),),
    tokens: tuple[int, ...] = (30,),
    shared: bool = False,
    kind: torch.dtype = torch.float32,
    bias: bool = False,
    softcap: float = 0.0,
    mass: bool = True,
    rest: float = 0.0,
    seed: int = 0,
) -> Sample:
    """``tokens``: at most so many of each pool; ``rest``: what the slots after the last token hold."""
    generator = torch.Generator().manual_seed(seed)
    args: dict[str, Any] = {name: [] for name in ("k_pages", "v_pages", "tables", "lengths", "bias")}
    for pair, most in zip(types, tokens, strict=True):
        width = -(-most // 16)
        table, room, own = table_of(batch, heads, width, shared, generator)
        lengths = torch.randint(most // 2, most + 1, (batch, heads), generator=generator)
        lengths[-1, -1] = most
        for name, dtype, which in zip(("k_pages", "v_pages"), pair, KINDS, strict=True):
            x = random_kv((room, own, 16, d), generator)
            pool = torch.ops.torch_cpu_ext.kv_cache_pack(x, kind=which, dtype=dtype)[:, :, 0].clone()
            args[name].append(pool)
            for b, h in itertools.product(range(batch), range(heads)) if rest and dtype in ("fp32", "bf16") else ():
                end = int(lengths[b, h])
                for slot, e in itertools.product(range(end % 16, 16) if end % 16 else (), range(d)):
                    pool_page(pool, table, b, h, end // 16)[place(which, 4 // pool.dtype.itemsize, d, slot, e)] = rest
        args["tables"].append(table)
        args["lengths"].append(lengths)
        if bias:
            args["bias"].append(torch.randn(batch, heads, 16 * width, generator=generator))
    query = torch.randn(batch, heads * group, length, d, generator=generator).to(kind)
    args = {"query": query} | args | {"scale": d**-0.5, "softcap": softcap, "mass": mass}
    sizes = f"batch={batch} heads={heads}x{group} length={length} d={d} {kind}"
    name = f"{types} {tokens} {sizes} shared={shared} bias={bias} softcap={softcap} rest={rest}"
    return Sample(name, args, functools.cache(lambda: attend_model(args)))


SAME = tuple((dtype, dtype) for dtype in TYPES)


@functools.cache
def _attend_samples() -> list[Sample]:
    seeds, floats = itertools.count(46), itertools.cycle(FLOATS)
    samples = [
        attend_sample(group=group, length=length, d=d, types=(pair,), tokens=(50,), kind=next(floats), seed=next(seeds))
        for pair, (group, length, d) in itertools.product(
            SAME, ((1, 1, 16), (3, 1, 64), (4, 2, 32), (5, 1, 80), (8, 3, 16), (2, 1, 128), (7, 1, 48), (1, 1, 256))
        )
    ]
    for pair in SAME:
        samples.append(attend_sample(batch=2, heads=3, group=3, types=(pair,), tokens=(47,), shared=True, seed=next(seeds)))
        samples.append(attend_sample(group=2, types=(pair,), tokens=(1100,), d=16, mass=False, seed=next(seeds)))
        samples.append(attend_sample(heads=1, group=4, length=2, types=(pair,), tokens=(1030,), d=16, bias=True, seed=next(seeds)))
        samples.append(attend_sample(types=(pair,), tokens=(20,), softcap=5.0, bias=True, kind=torch.bfloat16, seed=next(seeds)))
        samples.append(attend_sample(types=(pair,), tokens=(1,), seed=next(seeds)))
        for rest in (math.nan, math.inf):
            samples.append(attend_sample(group=4, types=(pair,), tokens=(37,), rest=rest, seed=next(seeds)))
    samples.append(attend_sample(types=(("int8", "int4"), ("bf16", "bf16")), tokens=(64, 20), group=4, seed=next(seeds)))
    samples.append(attend_sample(types=(("int4", "fp32"), ("bf16", "int8"), ("fp32", "fp32")), tokens=(32, 16, 9), seed=next(seeds)))
    samples.append(attend_sample(batch=3, heads=1, types=(*SAME,), tokens=(16, 32, 48, 5), group=2, bias=True, seed=next(seeds)))
    samples.append(attend_sample(heads=1, tokens=(8200,), d=16, types=(("bf16", "bf16"),), seed=next(seeds)))  # longer parts
    samples.append(attend_sample(length=4, tokens=(2,), seed=next(seeds)))  # queries before the first token
    samples.append(attend_sample(length=0, seed=next(seeds)))
    return samples


@functools.cache
def _few_attend() -> list[Sample]:
    return [
        attend_sample(batch=2, heads=3, group=2, length=2, types=(("fp32", "fp32"), ("int8", "int4")), tokens=(40, 20), seed=90),
        attend_sample(batch=2, heads=3, types=(("bf16", "bf16"),), tokens=(40,), bias=True, mass=False, seed=91),
    ]


def _listed(name: str, change: Any) -> Any:
    return lambda args: args | {name: change(args[name])}


_ATTEND = Case(
    op="kv_cache_attend",
    samples=_attend_samples,
    few=_few_attend,
    strided=("query",),
    bad=[
        *_wrong_floats("kv_cache_attend", "query"),
        Bad("kv_cache_attend: query must be 4-D (batch, heads, length, head_dim), got 3-D", replaced(query=lambda q: q[0])),
        Bad("kv_cache_attend: head_dim must be a positive multiple of 16, got 31", replaced(query=lambda q: q[..., 1:])),
        Bad("kv_cache_attend: query must have a multiple of the 3 KV heads, got 5", replaced(query=lambda q: q[:, 1:])),
        Bad("kv_cache_attend: k_pages must have one pool at least, got none", _listed("k_pages", lambda p: [])),
        Bad("kv_cache_attend: v_pages must be as many as k_pages, 2, got 1", _listed("v_pages", lambda p: p[1:])),
        Bad("kv_cache_attend: tables must be as many as k_pages, 2, got 3", _listed("tables", lambda t: [*t, t[0]])),
        Bad("kv_cache_attend: lengths must be as many as k_pages, 2, got 1", _listed("lengths", lambda t: t[1:])),
        Bad("kv_cache_attend: bias must be none or as many as k_pages, 2, got 1", _listed("bias", lambda t: [torch.zeros(2, 3, 48)])),
        Bad(
            "kv_cache_attend: bias[1] must be a float32 tensor of shape (2, 3, 32), got 3-D Float with 288 elements",
            _listed("bias", lambda t: [torch.zeros(2, 3, 48), torch.zeros(2, 3, 48)]),
        ),
        Bad("kv_cache_attend: softcap must not be negative, got -1", replaced(softcap=-1.0)),
        Bad(
            "kv_cache_attend: lengths must be 2-D (batch, KV heads), got 1-D with 2 elements",
            _listed("lengths", lambda t: [t[0][:, 0], t[1]]),
        ),
        Bad(
            "kv_cache_attend: k_pages[0] must have 1 or 3 heads, got 2",
            lambda args: args | {n: [args[n][0].repeat(1, 2, 1), args[n][1]] for n in ("k_pages", "v_pages")},
        ),
        Bad(
            "kv_cache_attend: v_pages[1] must be float32, bfloat16, int8 or uint8 (int4), got Half",
            _listed("v_pages", lambda p: [p[0], p[1].half()]),
        ),
        *_wrong_pools("kv_cache_attend", "[0]"),
    ],
)

CASES = (_PACK, _UNPACK, _APPEND, _ATTEND)
