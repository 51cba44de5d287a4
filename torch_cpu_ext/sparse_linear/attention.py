"""Decode attention over pruned keys and values: schema, fake and reference of each op, side by side.

Blocks are drawn in ``kernels/common/kv_block.h``, pages in ``kernels/sparse_linear/attention.h``.
"""

import math

import torch
from torch import Tensor

from ..core.checks import TOKENS, check_float, check_head_dim, check_kind, type_name
from ..core.registry import define


def kept(head_dim: int, sparsity: float) -> int:
    """How many elements of a vector stay: ``round((1 - sparsity) * head_dim)``, or 0 where ``sparsity`` is out of range.

    Args:
        head_dim: elements of the vector.
        sparsity: share to prune, at least 0 and below 1.
    """
    return round((1 - sparsity) * head_dim) if 0 <= sparsity < 1 else 0


def page_bytes(head_dim: int, sparsity: float) -> int:
    """Size of a page of 16 tokens: ``2 * head_dim`` bytes of bitmap and 32 for each kept element, at most the ``32 * head_dim`` of a block.

    Args:
        head_dim: elements of a token's vector.
        sparsity: share of them that is pruned.
    """
    return min(2 * head_dim + 32 * kept(head_dim, sparsity), 32 * head_dim)


def to_blocks(x: Tensor, kind: str) -> Tensor:
    """Keys or values as dense blocks; made of views and one copy.

    Args:
        x: ``(batch, KV heads, tokens, head_dim)``, a multiple of 16 tokens.
        kind: ``"key"`` or ``"value"``.
    Returns:
        bfloat16, ``(batch, KV heads, tokens / 16, head_dim / 2, 16, 2)`` for keys, ``(batch, KV heads, tokens / 16, 8, head_dim, 2)`` for
        values.
    """
    x = x.to(torch.bfloat16)
    if kind == "key":
        return x.unflatten(2, (-1, TOKENS)).unflatten(4, (-1, 2)).transpose(3, 4).contiguous()
    return x.unflatten(2, (-1, TOKENS // 2, 2)).transpose(4, 5).contiguous()


def from_blocks(blocks: Tensor, kind: str) -> Tensor:
    """The keys or values that blocks hold, ``(batch, KV heads, 16 * blocks, head_dim)``: the inverse of `to_blocks`.

    Args:
        blocks: as `to_blocks` made them.
        kind: ``"key"`` or ``"value"``.
    """
    if kind == "key":
        return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return blocks.transpose(4, 5).flatten(2, 4)


def _check_pages(op: str, argument: str, pages: Tensor, head_dim: int) -> None:
    torch._check(
        pages.dim() == 4 and pages.dtype == torch.uint8,
        lambda: (
            f"{op}: {argument} must be a 4-D uint8 tensor (batch, KV heads, pages, bytes), got {pages.dim()}-D {type_name(pages.dtype)}"
        ),
    )
    size = pages.shape[3]
    torch._check(
        size == 32 * head_dim or (2 * head_dim + 32 <= size < 32 * head_dim and size % 32 == 0),
        lambda: f"{op}: {argument} must have pages of a size that fits head_dim {head_dim}, got {size} bytes",
    )


# -------------------------------------------------------------------------------------------------------------------------------- compress


def compress_kv(x: Tensor, *, kind: str, sparsity: float) -> Tensor:
    """Prunes keys or values by magnitude and packs them into pages of 16 tokens, all of one size.

    Of each token's vector the ``round((1 - sparsity) * head_dim)`` elements of largest magnitude stay (the rule of Mustafar,
    arXiv:2505.22913; SparAMX, arXiv:2502.12444, has one threshold a layer); among equals, those of lower index.

    Args:
        x: ``(batch, KV heads, tokens, head_dim)``, float32, bfloat16 or float16, any strides; a multiple of 16 tokens, and ``head_dim`` a
            multiple of 16. Rounded to bfloat16.
        kind: ``"key"`` or ``"value"``: the order of the elements.
        sparsity: share of each vector to prune, at least 0 and below 1. Below about 0.06 pages are dense blocks.
    Returns:
        uint8 ``(batch, KV heads, tokens / 16, bytes)``; see `page_bytes`.
    Raises:
        RuntimeError: a dtype, shape or value does not fit.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_compress_kv(x, kind=kind, sparsity=sparsity)


def _check_compress(x: Tensor, kind: str, sparsity: float) -> None:
    op = "sparse_linear_compress_kv"
    check_float(op, "x", x)
    torch._check(x.dim() == 4, lambda: f"{op}: x must be 4-D (batch, KV heads, tokens, head_dim), got {x.dim()}-D")
    check_head_dim(op, x.shape[3])
    torch._check(x.shape[2] % TOKENS == 0, lambda: f"{op}: x must have a multiple of 16 tokens, got {x.shape[2]}")
    check_kind(op, kind)
    torch._check(
        kept(x.shape[3], sparsity) > 0, lambda: f"{op}: sparsity must be at least 0 and leave one element a vector, got {sparsity:g}"
    )


def _compress_fake(x: Tensor, *, kind: str, sparsity: float) -> Tensor:
    _check_compress(x, kind, sparsity)
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // TOKENS, page_bytes(x.shape[3], sparsity)), dtype=torch.uint8)


def _compress_reference(x: Tensor, *, kind: str, sparsity: float) -> Tensor:
    _check_compress(x, kind, sparsity)
    keep = kept(x.shape[3], sparsity)
    x = x.to(torch.bfloat16)
    magnitude = x.view(torch.int16).int() & 0x7FFF  # compared as bits, so that NaN counts as large
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask.scatter_(3, magnitude.argsort(dim=3, descending=True, stable=True)[..., :keep], True)
    blocks, bits = to_blocks(x.masked_fill(~mask, 0), kind), to_blocks(mask, kind) != 0
    if page_bytes(x.shape[3], sparsity) == 32 * x.shape[3]:
        return blocks.flatten(3).view(torch.uint8)
    if kind == "value":  # rows by their sixteen elements first
        blocks, bits = (t.unflatten(4, (-1, TOKENS)).transpose(3, 4) for t in (blocks, bits))
    blocks, bits = blocks.flatten(3), bits.flatten(3)
    words = (bits.unflatten(3, (-1, 8)) * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    values = blocks[bits].view(*blocks.shape[:3], TOKENS * keep)
    return torch.cat([words, values.view(torch.uint8)], 3)


define("sparse_linear_compress_kv(Tensor x, *, str kind, float sparsity) -> Tensor", fake=_compress_fake, reference=_compress_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- expand


def expand_kv(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    """The keys or values that pages stand for.

    Args:
        pages: as `compress_kv` made them, any strides.
        kind: ``"key"`` or ``"value"``, as for `compress_kv`.
        head_dim: elements of a vector.
    Returns:
        bfloat16 ``(batch, KV heads, 16 * pages, head_dim)``, with zeros where elements were pruned.
    Raises:
        RuntimeError: a dtype, shape or value does not fit, or a page is damaged.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_expand_kv(pages, kind=kind, head_dim=head_dim)


def _check_expand(pages: Tensor, kind: str, head_dim: int) -> None:
    op = "sparse_linear_expand_kv"
    check_head_dim(op, head_dim)
    _check_pages(op, "pages", pages, head_dim)
    check_kind(op, kind)


def _expand_fake(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    _check_expand(pages, kind, head_dim)
    return pages.new_empty((*pages.shape[:2], pages.shape[2] * TOKENS, head_dim), dtype=torch.bfloat16)


def _expand_reference(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    _check_expand(pages, kind, head_dim)
    return _expand("sparse_linear_expand_kv", pages, kind, head_dim)


def _expand(op: str, pages: Tensor, kind: str, head_dim: int) -> Tensor:
    shape = (head_dim // 2, TOKENS, 2) if kind == "key" else (TOKENS // 2, head_dim, 2)
    if pages.shape[3] == 32 * head_dim:
        blocks = pages.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    else:
        words, values = pages.split([2 * head_dim, pages.shape[3] - 2 * head_dim], 3)
        mask = ((words[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(3) != 0
        intact = bool((mask.sum(3) * 2 == values.shape[3]).all())
        torch._check(intact, lambda: f"{op}: pages must be intact, got a page whose bitmap does not fit its size")
        blocks = torch.zeros(mask.shape, dtype=torch.bfloat16)
        blocks[mask] = values.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).flatten()
        if kind == "value":
            blocks = blocks.unflatten(3, (-1, TOKENS // 2, 2 * TOKENS)).transpose(3, 4).flatten(3)
    return from_blocks(blocks.view(*pages.shape[:3], *shape), kind)


define("sparse_linear_expand_kv(Tensor pages, *, str kind, int head_dim) -> Tensor", fake=_expand_fake, reference=_expand_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- attend


def attend(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, k_tail: Tensor, v_tail: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries over pages and a dense tail of keys and values.

    The tokens of a KV head are those of its pages, then those of its tail; the queries belong to the last ``length`` of them, and none
    sees the tokens after its own. Queries and probabilities are rounded to bfloat16, sums are float32. The query heads that share a KV
    head are computed together, from one expansion of each page. The result does not depend on the number of threads.

    Args:
        query: ``(batch, heads, length, head_dim)``, float32, bfloat16 or float16, any strides; ``heads`` a multiple of the KV heads,
            ``head_dim`` of 16. Meant for decoding: a handful of rows.
        k_pages: uint8 ``(batch, KV heads, pages, bytes)``, as `compress_kv` makes them with ``kind="key"``. There may be none; then the
            tail alone is dense attention. Batch and heads may have any strides.
        v_pages: the same with ``kind="value"``; the size of a page may differ.
        k_tail: bfloat16 ``(batch, KV heads, blocks, head_dim / 2, 16, 2)``, as `to_blocks` makes them. Slots without a token may hold
            anything.
        v_tail: bfloat16 ``(batch, KV heads, blocks, 8, head_dim, 2)``.
        spans: int64 ``(batch, KV heads, 3)``: the first token attended (after the padding on the left, say), the pages in use, and the
            tokens in the tail.
        scale: what scores are multiplied with before the softmax.
    Returns:
        ``(batch, heads, length, head_dim)`` in the dtype of ``query``, and the logarithm of the sum of the exponentials of the scores,
        float32 ``(batch, heads, length)``, by which results over different tokens can be joined. A query that sees no token gives zeros
        and minus infinity.
    Raises:
        RuntimeError: a dtype or shape does not fit, ``spans`` asks for what is not there, or a page is damaged.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_attend(query, k_pages, v_pages, k_tail, v_tail, spans, scale=scale)


def _check_attend(query: Tensor, k_pages: Tensor, v_pages: Tensor, k_tail: Tensor, v_tail: Tensor, spans: Tensor) -> None:
    op = "sparse_linear_attend"
    check_float(op, "query", query)
    torch._check(query.dim() == 4, lambda: f"{op}: query must be 4-D (batch, heads, length, head_dim), got {query.dim()}-D")
    batch, heads, _, d = query.shape
    check_head_dim(op, d)
    for name, pages, tail, inner in (("k", k_pages, k_tail, (d // 2, TOKENS)), ("v", v_pages, v_tail, (TOKENS // 2, d))):
        if name == "k":
            torch._check(
                pages.dim() == 4,
                lambda: (
                    f"{op}: k_pages must be a 4-D uint8 tensor (batch, KV heads, pages, bytes), "
                    f"got {k_pages.dim()}-D {type_name(k_pages.dtype)}"
                ),
            )
            kv_heads = pages.shape[1]
            torch._check(
                kv_heads > 0 and heads % kv_heads == 0,
                lambda: f"{op}: query must have a multiple of the {k_pages.shape[1]} KV heads, got {heads}",
            )
        _check_blocks(op, name, pages, tail, batch, kv_heads, inner, d)
    torch._check(
        k_pages.shape[2] == v_pages.shape[2],
        lambda: f"{op}: v_pages must have as many pages as k_pages, {k_pages.shape[2]}, got {v_pages.shape[2]}",
    )
    torch._check(
        k_tail.shape[2] == v_tail.shape[2],
        lambda: f"{op}: v_tail must have as many blocks as k_tail, {k_tail.shape[2]}, got {v_tail.shape[2]}",
    )
    torch._check(
        spans.dim() == 3 and spans.dtype == torch.int64 and tuple(spans.shape) == (batch, kv_heads, 3),
        lambda: (
            f"{op}: spans must be an int64 tensor of shape ({batch}, {k_pages.shape[1]}, 3), got {spans.dim()}-D "
            f"{type_name(spans.dtype)} with {spans.numel()} elements"
        ),
    )


def _check_blocks(
    op: str, name: str, pages: Tensor, tail: Tensor, batch: int, kv_heads: int, inner: tuple[int, int], head_dim: int
) -> None:
    _check_pages(op, f"{name}_pages", pages, head_dim)
    torch._check(
        pages.shape[0] == batch and pages.shape[1] == kv_heads,
        lambda: f"{op}: {name}_pages must have batch {batch} and {kv_heads} KV heads, got {pages.shape[0]} and {pages.shape[1]}",
    )
    torch._check(
        tail.dim() == 6 and tail.dtype == torch.bfloat16,
        lambda: f"{op}: {name}_tail must be a 6-D bfloat16 tensor of blocks, got {tail.dim()}-D {type_name(tail.dtype)}",
    )
    torch._check(
        (tail.shape[0], tail.shape[1], *tail.shape[3:]) == (batch, kv_heads, *inner, 2),
        lambda: (
            f"{op}: {name}_tail must be ({batch}, {kv_heads}, blocks, {inner[0]}, {inner[1]}, 2), got ({tail.shape[0]}, {tail.shape[1]}, "
            f"blocks, {tail.shape[3]}, {tail.shape[4]}, {tail.shape[5]})"
        ),
    )


def _attend_fake(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, k_tail: Tensor, v_tail: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    _check_attend(query, k_pages, v_pages, k_tail, v_tail, spans)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _attend_reference(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, k_tail: Tensor, v_tail: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    op = "sparse_linear_attend"
    _check_attend(query, k_pages, v_pages, k_tail, v_tail, spans)
    batch, heads, length, d = query.shape
    kv_heads, pages, room = k_pages.shape[1], k_pages.shape[2], k_tail.shape[2] * TOKENS
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    group = heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            first, used, tail = spans[b, h].tolist()
            total = TOKENS * used + tail
            torch._check(0 <= used <= pages, lambda used=used: f"{op}: spans must have at most {pages} pages, got {used}")
            torch._check(0 <= tail <= room, lambda tail=tail: f"{op}: spans must have at most {room} tokens in the tail, got {tail}")
            torch._check(
                0 <= first <= total,
                lambda first=first, total=total: f"{op}: spans must begin with a token from 0 to {total}, got {first}",
            )
            k, v = (
                torch.cat([_expand(op, p[b : b + 1, h : h + 1, :used], kind, d)[0, 0], from_blocks(t[b : b + 1, h : h + 1], kind)[0, 0]])
                for p, t, kind in ((k_pages, k_tail, "key"), (v_pages, v_tail, "value"))
            )
            k, v = k[first:total].float(), v[first:total].float()
            q = query[b, h * group : (h + 1) * group].bfloat16().float()
            seen = torch.arange(first, total) <= torch.arange(total - length, total)[:, None]
            scores = (q @ k.T * scale).masked_fill(~seen, -math.inf)
            sums = scores.logsumexp(-1)
            largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min) if total > first else scores.sum(-1, True)
            p = (scores - largest).exp()
            weighted = p.bfloat16().float() @ v
            out[b, h * group : (h + 1) * group] = torch.where(p.sum(-1, keepdim=True) == 0, 0, weighted / p.sum(-1, keepdim=True)).to(
                out.dtype
            )
            lse[b, h * group : (h + 1) * group] = sums
    return out, lse


define(
    "sparse_linear_attend(Tensor query, Tensor k_pages, Tensor v_pages, Tensor k_tail, Tensor v_tail, Tensor spans, *, float scale) "
    "-> (Tensor, Tensor)",
    fake=_attend_fake,
    reference=_attend_reference,
)
