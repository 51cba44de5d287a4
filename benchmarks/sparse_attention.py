"""Decode attention of one token over pruned pages, against our own dense blocks and PyTorch, at 4k to 32k tokens of context.

One layer's attention; its keys and values come from memory, because copies of them are used in turn. PyTorch has the better of two ways to
share the keys between query heads: ``enable_gqa``, and the heads of a group as rows of one query.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext import kernel_isa
from torch_cpu_ext.sparse_linear import attend, compress_kv, to_blocks

from common import Row, Seconds, copies, interleave, main, rotate, row

GEOMETRIES = {"Llama-3-8B": (8, 32, 128), "SmolLM2-135M": (3, 9, 64)}  # KV heads, query heads, head_dim
CONTEXTS = (4096, 8192, 16384, 32768)
SPARSITIES = ((0.3, 0.5), (0.5, 0.5), (0.7, 0.7))  # of keys and values

Call = Callable[[], object]


def ours(k: Tensor, v: Tensor, query: Tensor, sparsity: tuple[float, float] | None) -> tuple[Call, int]:
    """Our attention over pages, or over dense blocks; and the bytes it reads."""
    heads, tokens, d = k.shape[1:]
    if sparsity is None:
        spans = torch.tensor([0, 0, tokens]).expand(1, heads, 3).contiguous()
        stored = copies(to_blocks(k, "key"), to_blocks(v, "value"))
        empty = torch.empty(1, heads, 0, 32 * d, dtype=torch.uint8)
        calls: list[Call] = [lambda k=k, v=v: attend(query, empty, empty, k, v, spans, scale=d**-0.5) for k, v in stored]
    else:
        spans = torch.tensor([0, tokens // 16, 0]).expand(1, heads, 3).contiguous()
        stored = copies(compress_kv(k, kind="key", sparsity=sparsity[0]), compress_kv(v, kind="value", sparsity=sparsity[1]))
        none = to_blocks(k[:, :, :0], "key"), to_blocks(v[:, :, :0], "value")
        calls = [lambda k=k, v=v: attend(query, k, v, *none, spans, scale=d**-0.5) for k, v in stored]
    return rotate(calls), sum(t.numel() * t.element_size() for t in stored[0])


def torch_calls(k: Tensor, v: Tensor, query: Tensor, name: str) -> dict[str, Call]:
    """PyTorch's ways to compute the same."""
    heads, d, scale = k.shape[1], k.shape[3], k.shape[3] ** -0.5
    grouped = query.view(1, heads, -1, d)
    stored = copies(k, v)
    return {
        f"SDPA {name}, enable_gqa": rotate(
            [lambda k=k, v=v: F.scaled_dot_product_attention(query, k, v, enable_gqa=True) for k, v in stored]
        ),
        f"SDPA {name}, grouped": rotate([lambda k=k, v=v: F.scaled_dot_product_attention(grouped, k, v) for k, v in stored]),
        f"matmul {name}": rotate([lambda k=k, v=v: ((grouped @ k.mT) * scale).softmax(-1) @ v for k, v in stored]),
    }


def measure(geometry: str, tokens: int, repeats: int, sparsities: tuple[tuple[float, float], ...] = SPARSITIES) -> Iterator[Row]:
    """Rows for one length of context."""
    torch.manual_seed(0)
    heads, query_heads, d = GEOMETRIES[geometry]
    k, v, query = torch.randn(1, heads, tokens, d), torch.randn(1, heads, tokens, d), torch.randn(1, query_heads, 1, d)
    calls: dict[object, Call] = {}
    sizes: dict[object, int] = {}
    for sparsity in (None, *sparsities):
        calls[sparsity], sizes[sparsity] = ours(k, v, query.bfloat16(), sparsity)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        calls.update(torch_calls(k.to(dtype), v.to(dtype), query.to(dtype), name))
    times = interleave(calls, repeats, warmup=1)
    peers: dict[str, Seconds] = {"ours dense bf16": times[None]}
    for name in ("bf16", "fp32"):
        peers[f"SDPA {name}"] = min(times[f"SDPA {name}, enable_gqa"], times[f"SDPA {name}, grouped"])
        peers[f"matmul {name}"] = times[f"matmul {name}"]
    for sparsity in sparsities:
        config = {
            "geometry": geometry,
            "context": tokens,
            "sparsity": f"K {sparsity[0]:g} V {sparsity[1]:g}",
            "kernel_isa": kernel_isa("sparse_linear", "attention"),
            "bytes": sizes[sparsity],
            "dense_bytes": sizes[None],
            "gb_per_s": round(sizes[sparsity] / times[sparsity] / 1e9, 2),
            "dense_gb_per_s": round(sizes[None] / times[None] / 1e9, 2),
        }
        for peer, seconds in peers.items():
            yield row(f"{geometry} {tokens} tokens, {config['sparsity']}", times[sparsity], peer, seconds, config)


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them."""
    for geometry in GEOMETRIES:
        for tokens in CONTEXTS[::2] if quick else CONTEXTS:
            yield from measure(geometry, tokens, 5 if quick else 11, SPARSITIES[:1] if quick else SPARSITIES)


def bars() -> dict[str, float]:
    """What bars.toml promises."""
    worst = min(r["ratio"] for tokens in (16384, 32768) for r in measure("Llama-3-8B", tokens, 15, SPARSITIES[:1]))
    return {"16k and 32k tokens, K 30 % and V 50 % pruned, times the best dense attention": worst}


if __name__ == "__main__":
    main(rows, bars)
