"""Causal attention of a prompt, without and with the scores of its tokens, against PyTorch, at 64 to 8192 tokens.

One layer's attention. PyTorch has the better of two ways to share the keys between query heads: ``enable_gqa``, and keys and values
repeated beforehand, which is not timed.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from torch_cpu_ext import kernel_isa
from torch_cpu_ext.kv_cache import prefill

from common import Row, Seconds, interleave, main, row

HEADS = 32, 8  # of queries, of keys and values
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = {64: (64, 256, 1024, 4096, 8192), 128: (64, 256, 1024, 4096)}  # tokens by head_dim
SCORES = {"window 16": {"window": 16}, "window 64": {"window": 64}, "every 8th query": {"sample": 8}, "every query": {"sample": 1}}
ISA = {"bf16": "prefill_bf16", "fp32": "prefill"}


def times(dtype: str, d: int, tokens: int, repeats: int, scores: tuple[str, ...]) -> dict[str, Seconds]:
    """Seconds of plain attention, of attention with each kind of scores and signatures, and of PyTorch's."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, d).to(DTYPES[dtype]) for heads in (HEADS[0], HEADS[1], HEADS[1]))
    repeated = [t.repeat_interleave(HEADS[0] // HEADS[1], 1) for t in (key, value)]
    options = {"pool": 7, "sign": True, "start": 4, "recent": 32}
    calls: dict[str, Callable[[], object]] = {"plain": lambda: prefill(query, key, value, scale=d**-0.5)}
    for name in scores:
        calls[name] = lambda name=name: prefill(query, key, value, scale=d**-0.5, **SCORES[name], **options)
    calls["gqa"] = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    calls["repeated"] = lambda: F.scaled_dot_product_attention(query, *repeated, is_causal=True)
    return interleave(calls, repeats, warmup=1)


def measure(dtype: str, d: int, tokens: int, repeats: int, scores: tuple[str, ...]) -> Iterator[Row]:
    """Rows for one prompt: each of our calls against PyTorch, those with scores also against plain attention."""
    seconds = times(dtype, d, tokens, repeats, scores)
    config = {"dtype": dtype, "head_dim": d, "tokens": tokens, "kernel_isa": kernel_isa("kv_cache", ISA[dtype])}
    sdpa = min(seconds["gqa"], seconds["repeated"])
    for name in ("plain", *scores):
        flops = 2 * tokens * tokens * d * HEADS[0]
        about = config | {"scores": name, "gflop_per_s": round(flops / seconds[name] / 1e9)}
        yield row(f"{dtype} {tokens} tokens of {d}, {name}", seconds[name], "SDPA", sdpa, about)
        if name != "plain":
            yield row(f"{dtype} {tokens} tokens of {d}, {name}", seconds[name], "ours without scores", seconds["plain"], about)


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them."""
    for d, lengths in CASES.items():
        for dtype in DTYPES:
            for tokens in lengths[1:4:2] if quick else lengths:
                repeats = 51 if tokens < 1000 else 9 if tokens < 5000 else 3
                yield from measure(dtype, d, tokens, 3 if quick else repeats, ("window 16",) if quick else tuple(SCORES))


def bars() -> dict[str, float]:
    """What bars.toml promises."""
    result = {}
    scored = 0.0
    for dtype in DTYPES:
        seconds = times(dtype, 64, 4096, 9, ("window 16", "window 64"))
        sdpa = min(seconds["gqa"], seconds["repeated"])
        slowest = max(seconds["window 16"], seconds["window 64"])
        result[f"4096 tokens, {dtype}, with scores, share of the time of SDPA"] = slowest / sdpa
        scored = max(scored, slowest / seconds["plain"])
    result["4096 tokens, with scores, times the time without, the worse of bf16 and fp32"] = scored
    small = 0.0
    for d, dtype, tokens in ((d, dtype, tokens) for d in CASES for dtype in DTYPES for tokens in (64, 256)):
        seconds = times(dtype, d, tokens, 51, ("window 16",))
        small = max(small, seconds["window 16"] / min(seconds["gqa"], seconds["repeated"]))
    result["64 and 256 tokens, with scores, share of the time of SDPA, the worst"] = small
    return result


if __name__ == "__main__":
    main(rows, bars)
