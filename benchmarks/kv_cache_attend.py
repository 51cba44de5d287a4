"""Attention of one new token over pages of keys and values, against PyTorch, after 4k to 32k tokens: all of them, and a quarter.

One layer of 32 query heads and 8 KV heads of 64. PyTorch has the better of two ways to share the keys between query heads: ``enable_gqa``,
and keys and values repeated beforehand, which is not timed.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext import kernel_isa
from torch_cpu_ext.core import memory
from torch_cpu_ext.kv_cache import attend, pack, page_bytes

from common import COLD_BYTES, Row, Seconds, copies, interleave, main, rotate, row

HEADS, KV_HEADS, DIM = 32, 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGES = ("fp32", "bf16", "int8", "int4")
TOKENS = (4096, 8192, 16384, 32768)
SHUFFLED = "bf16, shuffled pages"

Call = Callable[[], object]


def page_call(tokens: int, dtype: str, *, shuffled: bool = False, mass: bool = False) -> Call:
    """Attention over pages that lie in order, or in any order."""
    query = torch.randn(1, HEADS, 1, DIM).to(DTYPES.get(dtype, torch.bfloat16))
    kv = torch.randn(2, 1, KV_HEADS, tokens, DIM)
    pools = [pack(x, kind=kind, dtype=dtype).flatten(0, 2).unsqueeze(1) for x, kind in zip(kv, ("key", "value"), strict=True)]
    count = KV_HEADS * tokens // 16
    table = (torch.randperm(count) if shuffled else torch.arange(count)).int().view(1, KV_HEADS, -1)
    length = torch.full((1, KV_HEADS), tokens)

    def call(k: Tensor, v: Tensor) -> Call:
        return lambda: attend(query, [k], [v], [table], [length], scale=DIM**-0.5, mass=mass)

    return rotate(call(k, v) for k, v in copies(*pools))


def torch_call(tokens: int, dtype: str, *, repeated: bool) -> Call:
    """PyTorch's attention."""
    query = torch.randn(1, HEADS, 1, DIM).to(DTYPES[dtype])
    kv = torch.randn(2, 1, HEADS if repeated else KV_HEADS, tokens, DIM).to(DTYPES[dtype])

    def call(k: Tensor, v: Tensor) -> Call:
        return lambda: F.scaled_dot_product_attention(query, k, v, enable_gqa=not repeated)

    return rotate(call(k, v) for k, v in copies(*kv))


def times(tokens: int, repeats: int) -> dict[str, Seconds]:
    """Seconds of one call of everything; ``"read"``: of a plain read of as many bytes as the bf16 pages have."""
    torch.manual_seed(0)
    calls = {dtype: page_call(tokens, dtype) for dtype in PAGES}
    calls |= {f"{dtype}, a quarter": page_call(tokens // 4, dtype) for dtype in PAGES}
    calls["bf16, with mass"] = page_call(tokens, "bf16", mass=True)
    calls[SHUFFLED] = page_call(tokens, "bf16", shuffled=True)
    for dtype in DTYPES:
        calls[f"SDPA {dtype}"] = torch_call(tokens, dtype, repeated=False)
        calls[f"SDPA {dtype}, heads repeated"] = torch_call(tokens, dtype, repeated=True)
    reads = dict(enumerate(memory.read_calls(COLD_BYTES)))
    seconds = interleave(calls | {f"read {i}": read for i, read in reads.items()}, repeats, warmup=1, sample_s=1e-2)
    for dtype in DTYPES:
        seconds[f"SDPA {dtype}"] = min(seconds[f"SDPA {dtype}"], seconds.pop(f"SDPA {dtype}, heads repeated"))
    read = min(seconds.pop(f"read {i}") for i in reads)
    return seconds | {"read": Seconds(read * bytes_of("bf16", tokens) / COLD_BYTES)}


def bytes_of(dtype: str, tokens: int) -> int:
    """Of the pages that one call reads."""
    return KV_HEADS * tokens // 16 * sum(page_bytes(kind, dtype, DIM) for kind in ("key", "value"))


def measure(tokens: int, repeats: int) -> Iterator[Row]:
    """Rows for one length: each kind of pages against PyTorch, the others against bf16 pages, and bf16 pages against a plain read."""
    seconds = times(tokens, repeats)
    isa = kernel_isa("kv_cache", "attend")
    for name, ours in seconds.items():
        if name.startswith("SDPA") or name == "read":
            continue
        dtype = name.split(",")[0]
        read = bytes_of(dtype, tokens // 4 if name.endswith("a quarter") else tokens)
        config = {"pages": name, "tokens": tokens, "gb_per_s": round(read / ours / 1e9, 1), "kernel_isa": isa}
        for peer in DTYPES:
            yield row(f"{tokens} tokens, {name}", ours, f"SDPA {peer}", seconds[f"SDPA {peer}"], config)
        if name != "bf16":
            yield row(f"{tokens} tokens, {name}", ours, "bf16 pages", seconds["bf16"], config)
        share = seconds["read"] * read / bytes_of("bf16", tokens)
        yield row(f"{tokens} tokens, {name}", ours, "plain read of as many bytes", share, config)


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them."""
    for tokens in TOKENS[:1] if quick else TOKENS:
        yield from measure(tokens, 3 if quick else 11)


def bars() -> dict[str, float]:
    """What bars.toml promises: the worse of 16k and 32k tokens."""
    both = [times(tokens, 11) for tokens in (16384, 32768)]

    def worse(name: str, peer: str) -> float:
        return min(seconds[peer] / seconds[name] for seconds in both)

    return {
        "all tokens in bf16, times SDPA in bf16": worse("bf16", "SDPA bf16"),
        "all tokens in bf16, times SDPA in fp32": worse("bf16", "SDPA fp32"),
        "a quarter of the tokens in bf16, times SDPA in bf16": worse("bf16, a quarter", "SDPA bf16"),
        "a quarter of the tokens in bf16, times SDPA in fp32": worse("bf16, a quarter", "SDPA fp32"),
        "int8 pages, times bf16 pages": worse("int8", "bf16"),
        "bf16 pages, share of the speed of a plain read": worse("bf16", "read"),
    }


if __name__ == "__main__":
    main(rows, bars)
