"""Pages of keys and values, and attention over them: schema, fake and reference of each op, side by side.

A page holds 16 tokens of one KV head; ``kernels/kv_cache/attend.h`` draws its kinds. The dtype of a tensor says which kind it holds:

========== ============== =====================================  =========================================
dtype      what           elements of a page of keys              elements of a page of values
========== ============== =====================================  =========================================
float32    ``"fp32"``     ``16 * head_dim``                       ``16 * head_dim``
bfloat16   ``"bf16"``     ``16 * head_dim``                       ``16 * head_dim``
int8       ``"int8"``     ``16 * head_dim + 64``                  ``16 * head_dim + 64``
uint8      ``"int4"``     ``12 * head_dim``                       ``8 * head_dim + 64``
int16      sparse bf16    ``head_dim + 16 * kept``                ``head_dim + 16 * kept``
========== ============== =====================================  =========================================

The last are what `torch_cpu_ext.sparse_linear.compress_kv` makes, viewed as int16 where they are smaller than dense ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import TOKENS, check_float, check_head_dim, check_kind, type_name
from ..core.registry import define

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LIMIT = 65504.0  # of float16, in which scales and minimums are kept


def page_size(kind: str, dtype: str, head_dim: int) -> int:
    """Elements of a page.

    Args:
        kind: ``"key"`` or ``"value"``.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``.
        head_dim: elements of a token's vector.
    """
    if dtype == "int8":
        return TOKENS * head_dim + 64
    if dtype == "int4":
        return 12 * head_dim if kind == "key" else 8 * head_dim + 64
    return TOKENS * head_dim


def page_bytes(kind: str, dtype: str, head_dim: int) -> int:
    """Bytes of a page.

    Args:
        kind: ``"key"`` or ``"value"``.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``.
        head_dim: elements of a token's vector.
    """
    return page_size(kind, dtype, head_dim) * DTYPES[dtype].itemsize


# ------------------------------------------------------------------------------------------------------------------------------------ pack


def pack(x: Tensor, *, kind: str, dtype: str) -> Tensor:
    """Packs keys or values into pages of 16 tokens.

    ``"int8"`` has a scale and a minimum for each token, codes from 0 to 255; ``"int4"`` for each token of values and for each element of
    the 16 keys of a page, codes from 0 to 15 (keys have elements that are large in all tokens: KIVI, arXiv:2402.02750). Both are float16.

    Args:
        x: ``(batch, KV heads, tokens, head_dim)``, float32, bfloat16 or float16, any strides; a multiple of 16 tokens, and ``head_dim`` a
            multiple of 16.
        kind: ``"key"`` or ``"value"``: the order of the elements.
        dtype: ``"fp32"``, ``"bf16"`` (rounded to nearest even), ``"int8"`` or ``"int4"``.
    Returns:
        ``(batch, KV heads, tokens / 16, elements)``, see `page_size`; float32, bfloat16, int8 or uint8.
    Raises:
        RuntimeError: a dtype, shape or name does not fit.
    """
    return torch.ops.torch_cpu_ext.kv_cache_pack(x, kind=kind, dtype=dtype)


def _check_pack(x: Tensor, kind: str, dtype: str) -> None:
    op = "kv_cache_pack"
    check_float(op, "x", x)
    torch._check(x.dim() == 4, lambda: f"{op}: x must be 4-D (batch, KV heads, tokens, head_dim), got {x.dim()}-D")
    check_head_dim(op, x.shape[3])
    torch._check(x.shape[2] % TOKENS == 0, lambda: f"{op}: x must have a multiple of 16 tokens, got {x.shape[2]}")
    check_kind(op, kind)
    torch._check(dtype in DTYPES, lambda: f"{op}: dtype must be fp32, bf16, int8 or int4, got {dtype}")


def _pack_fake(x: Tensor, *, kind: str, dtype: str) -> Tensor:
    _check_pack(x, kind, dtype)
    return x.new_empty((*x.shape[:2], x.shape[2] // TOKENS, page_size(kind, dtype, x.shape[3])), dtype=DTYPES[dtype])


def _rows(x: Tensor, kind: str, group: int) -> Tensor:
    """``(..., 16, d)`` as the rows of a page: ``group`` elements along the sum in a lane, lanes of tokens for keys, else of elements."""
    x = x.transpose(-1, -2) if kind == "key" else x  # (along the sum, lanes)
    return x.unflatten(-2, (-1, group)).transpose(-1, -2)  # (rows, lanes, group)


def _from_rows(rows: Tensor, kind: str) -> Tensor:
    x = rows.transpose(-1, -2).flatten(-3, -2)
    return x.transpose(-1, -2) if kind == "key" else x


def _codes(x: Tensor, dim: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to ``most``, scale and minimum in float16, of groups along ``dim``; those of a group with NaN or infinities are NaN."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    broken = ~x.isfinite().all(dim, keepdim=True)
    scale = ((high / most - low / most).clamp(max=_LIMIT).to(torch.float16)).masked_fill(broken, math.nan)
    minimum = low.clamp(-_LIMIT, _LIMIT).to(torch.float16).masked_fill(broken, math.nan)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    codes = ((x - minimum.float()) * inverse).round().clamp(0, most)
    return codes.nan_to_num(0).to(torch.uint8), scale, minimum


def _pack_reference(x: Tensor, *, kind: str, dtype: str) -> Tensor:
    _check_pack(x, kind, dtype)
    x = x.float().unflatten(2, (-1, TOKENS))  # (batch, heads, pages, 16, d)
    if dtype == "fp32":
        return _rows(x, kind, 1).flatten(3).contiguous()
    if dtype == "bf16":
        return _rows(x.to(torch.bfloat16), kind, 2).flatten(3)
    if dtype == "int8":
        codes, scale, minimum = _codes(x, -1, 255)
        grid = torch.cat([scale, minimum], -1).transpose(-1, -2).flatten(3)  # the 16 scales, the 16 minimums
        return torch.cat([_rows(codes, kind, 4).flatten(3), grid.view(torch.uint8)], 3).view(torch.int8)
    codes, scale, minimum = _codes(x, -2 if kind == "key" else -1, 15)
    if kind == "key":
        scale, minimum = scale.transpose(-1, -2), minimum.transpose(-1, -2)
    grid = torch.cat([scale, minimum], -1).transpose(-1, -2).flatten(3)
    # The eight codes of a lane: the first of each pair in its lower, the second in its upper sixteen bits.
    lanes = _rows(codes, kind, 8).unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([(lanes[..., 0::2] | lanes[..., 1::2] << 4).flatten(3), grid.contiguous().view(torch.uint8)], 3)


define("kv_cache_pack(Tensor x, *, str kind, str dtype) -> Tensor", fake=_pack_fake, reference=_pack_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- unpack


def unpack(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    """The keys or values that pages stand for.

    Args:
        pages: ``(batch, KV heads, pages, elements)``, as `pack` made them, or sparse ones; any strides.
        kind: ``"key"`` or ``"value"``, as for `pack`.
        head_dim: elements of a vector.
    Returns:
        ``(batch, KV heads, 16 * pages, head_dim)``, float32 of pages that are float32, else bfloat16.
    Raises:
        RuntimeError: a dtype, shape or name does not fit, or a sparse page is damaged.
    """
    return torch.ops.torch_cpu_ext.kv_cache_unpack(pages, kind=kind, head_dim=head_dim)


def _check_pages(op: str, argument: str, pages: Tensor, kind: str, head_dim: int) -> None:
    if pages.dtype == torch.int16:
        torch._check(
            head_dim + 16 <= pages.shape[-1] < 16 * head_dim and (pages.shape[-1] - head_dim) % 16 == 0,
            lambda: f"{op}: {argument} must have sparse pages of a size that fits head_dim {head_dim}, got {pages.shape[-1]} elements",
        )
        return
    torch._check(
        pages.dtype in _NAMES,
        lambda: f"{op}: {argument} must be float32, bfloat16, int8, uint8 (int4) or int16 (sparse), got {type_name(pages.dtype)}",
    )
    size = page_size(kind, _NAMES[pages.dtype], head_dim)
    torch._check(
        pages.shape[-1] == size,
        lambda: f"{op}: {argument} must have pages of {size} elements for head_dim {head_dim}, got {pages.shape[-1]}",
    )


def _check_unpack(pages: Tensor, kind: str, head_dim: int) -> None:
    op = "kv_cache_unpack"
    check_head_dim(op, head_dim)
    check_kind(op, kind)
    torch._check(pages.dim() == 4, lambda: f"{op}: pages must be 4-D (batch, KV heads, pages, elements), got {pages.dim()}-D")
    _check_pages(op, "pages", pages, kind, head_dim)


def _unpack_fake(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    _check_unpack(pages, kind, head_dim)
    dtype = torch.float32 if pages.dtype == torch.float32 else torch.bfloat16
    return pages.new_empty((*pages.shape[:2], TOKENS * pages.shape[2], head_dim), dtype=dtype)


def _dense(op: str, pages: Tensor, kind: str, head_dim: int) -> Tensor:
    """float32 ``(..., 16, d)`` of pages ``(..., elements)``."""
    if pages.dtype == torch.int16:
        return _dense_sparse(op, pages, kind, head_dim)
    lanes = TOKENS if kind == "key" else head_dim
    if pages.dtype in (torch.float32, torch.bfloat16):
        group = 4 // pages.dtype.itemsize
        return _from_rows(pages.float().unflatten(-1, (-1, lanes, group)), kind)
    by_token = pages.dtype == torch.int8 or kind == "value"
    groups = TOKENS if by_token else head_dim
    raw = pages.view(torch.uint8) if pages.is_contiguous() else pages.contiguous().view(torch.uint8)
    codes, grid = raw.split([raw.shape[-1] - 4 * groups, 4 * groups], -1)
    scale, minimum = grid.clone(memory_format=torch.contiguous_format).view(torch.float16).float().unflatten(-1, (2, groups)).unbind(-2)
    if pages.dtype == torch.int8:
        rows = codes.unflatten(-1, (-1, lanes, 4))
    else:
        bytes = codes.unflatten(-1, (-1, lanes, 4))
        rows = torch.stack([bytes & 15, bytes >> 4], -1).flatten(-2).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    x = _from_rows(rows, kind).float()
    dim = -1 if by_token else -2
    return x * scale.unsqueeze(dim) + minimum.unsqueeze(dim)


def _dense_sparse(op: str, pages: Tensor, kind: str, head_dim: int) -> Tensor:
    """The rows of a block of bf16 from a bitmap and values, those of values ordered by sixteen elements first."""
    words, values = pages.split([head_dim, pages.shape[-1] - head_dim], -1)
    mask = ((words.contiguous().view(torch.uint8)[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) != 0
    intact = bool((mask.sum(-1) == values.shape[-1]).all())
    torch._check(intact, lambda: f"{op}: sparse pages must be intact, got a page whose bitmap does not fit its size")
    rows = torch.zeros(mask.shape, dtype=torch.bfloat16)
    rows[mask] = values.contiguous().view(torch.bfloat16).flatten()
    if kind == "value":
        rows = rows.unflatten(-1, (-1, TOKENS // 2, 2 * TOKENS)).transpose(-2, -3).flatten(-3)
    return _from_rows(rows.float().unflatten(-1, (-1, TOKENS if kind == "key" else head_dim, 2)), kind)


def _unpack_reference(pages: Tensor, *, kind: str, head_dim: int) -> Tensor:
    _check_unpack(pages, kind, head_dim)
    dtype = torch.float32 if pages.dtype == torch.float32 else torch.bfloat16
    return _dense("kv_cache_unpack", pages, kind, head_dim).flatten(2, 3).to(dtype).contiguous()


define("kv_cache_unpack(Tensor pages, *, str kind, int head_dim) -> Tensor", fake=_unpack_fake, reference=_unpack_reference)


# ------------------------------------------------------------------------------------------------------------------------ pools and tables


def _check_pool(op: str, suffix: str, k_pages: Tensor, v_pages: Tensor, table: Tensor, length: Tensor, shape: tuple[int, int, int]) -> None:
    """Checks of one pool, for ``shape`` (batch, KV heads, head_dim); ``suffix`` is its number in a list, in brackets."""
    batch, heads, head_dim = shape
    for name, pages, kind in ((f"k_pages{suffix}", k_pages, "key"), (f"v_pages{suffix}", v_pages, "value")):
        torch._check(
            pages.dim() == 3, lambda name=name, pages=pages: f"{op}: {name} must be 3-D (pages, heads, elements), got {pages.dim()}-D"
        )
        _check_pages(op, name, pages, kind, head_dim)
    torch._check(
        v_pages.shape[0] == k_pages.shape[0] and v_pages.shape[1] == k_pages.shape[1],
        lambda: (
            f"{op}: v_pages{suffix} must have as many pages and heads as k_pages, ({k_pages.shape[0]}, {k_pages.shape[1]}), "
            f"got ({v_pages.shape[0]}, {v_pages.shape[1]})"
        ),
    )
    torch._check(
        k_pages.shape[1] == 1 or k_pages.shape[1] == heads,
        lambda: f"{op}: k_pages{suffix} must have 1 or {heads} heads, got {k_pages.shape[1]}",
    )
    tables = heads if k_pages.shape[1] == 1 else 1
    torch._check(
        table.dim() == 3 and table.dtype == torch.int32 and table.shape[0] == batch and table.shape[1] == tables,
        lambda: (
            f"{op}: table{suffix} must be an int32 tensor of shape ({batch}, {tables}, pages), "
            f"got {table.dim()}-D {type_name(table.dtype)} with {table.numel()} elements"
        ),
    )
    torch._check(
        length.dim() == 2 and length.dtype == torch.int64 and length.shape[0] == batch and length.shape[1] == heads,
        lambda: (
            f"{op}: length{suffix} must be an int64 tensor of shape ({batch}, {heads}), got {length.dim()}-D {type_name(length.dtype)} "
            f"with {length.numel()} elements"
        ),
    )


def _pages_of(op: str, suffix: str, table: Tensor, first: int, end: int, room: int, batch: int, head: int) -> Tensor:
    """Pages that hold the tokens from ``first`` to ``end`` of a KV head, checked."""
    torch._check(
        0 <= end <= TOKENS * table.shape[2],
        lambda: f"{op}: length{suffix} must be from 0 to {TOKENS * table.shape[2]}, the tokens of its table, got {end}",
    )
    used = table[batch, head % table.shape[1], first // TOKENS : -(-end // TOKENS)].long()
    wrong = used[(used < 0) | (used >= room)]
    torch._check(
        wrong.numel() == 0, lambda: f"{op}: table{suffix} must have pages from 0 to {room - 1}, got {wrong[0].item() if len(wrong) else 0}"
    )
    return used


# ---------------------------------------------------------------------------------------------------------------------------------- append


def append(k_pages: Tensor, v_pages: Tensor, table: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes new tokens into the pages of a pool, after those that are there.

    Args:
        k_pages: the pool of keys, float32 or bfloat16 ``(pages, heads, elements)``, contiguous, written to. With one head, each KV head has
            a table of its own; with as many as there are KV heads, all share one table and a page has 16 tokens of each (vLLM's block
            tables).
        v_pages: the pool of values.
        table: int32 ``(batch, KV heads, pages)``, or ``(batch, 1, pages)`` where the pool has all heads: the pages of the pool that
            hold a head's tokens, in order. Entries past the last token may be anything.
        length: int64 ``(batch, KV heads)``: tokens that are there. The new ones take the slots after them; ``length`` is not changed.
        key: ``(batch, KV heads, tokens, head_dim)``, float32, bfloat16 or float16, any strides.
        value: the same.
    Raises:
        RuntimeError: a dtype or shape does not fit, or the table has no room or no such page.
    """
    torch.ops.torch_cpu_ext.kv_cache_append(k_pages, v_pages, table, length, key, value)


def _check_append(k_pages: Tensor, v_pages: Tensor, table: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    op = "kv_cache_append"
    for name, x in (("key", key), ("value", value)):
        check_float(op, name, x)
        torch._check(x.dim() == 4, lambda name=name, x=x: f"{op}: {name} must be 4-D (batch, KV heads, tokens, head_dim), got {x.dim()}-D")
    torch._check(
        value.shape == key.shape and value.dtype == key.dtype,
        lambda: (
            f"{op}: value must have the shape and dtype of key, {list(key.shape)} {type_name(key.dtype)}, "
            f"got {list(value.shape)} {type_name(value.dtype)}"
        ),
    )
    check_head_dim(op, key.shape[3])
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        torch._check(
            pages.dtype in (torch.float32, torch.bfloat16) and pages.dtype == k_pages.dtype,
            lambda name=name, pages=pages: f"{op}: {name} must be float32 or bfloat16, the same for both, got {type_name(pages.dtype)}",
        )
        torch._check(pages.is_contiguous(), lambda name=name: f"{op}: {name} must be contiguous")
    _check_pool(op, "", k_pages, v_pages, table, length, (key.shape[0], key.shape[1], key.shape[3]))


def _append_fake(k_pages: Tensor, v_pages: Tensor, table: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    _check_append(k_pages, v_pages, table, length, key, value)


def _append_reference(k_pages: Tensor, v_pages: Tensor, table: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    _check_append(k_pages, v_pages, table, length, key, value)
    op, (batch, heads, new, d) = "kv_cache_append", key.shape
    if not new:
        return
    for b in range(batch):
        for h in range(heads):
            first = int(length[b, h])
            torch._check(first >= 0, lambda first=first: f"{op}: length must not be negative, got {first}")
            used = _pages_of(op, "", table, first, first + new, k_pages.shape[0], b, h)
            own = h % k_pages.shape[1]
            at = first % TOKENS
            for pages, x, kind in ((k_pages, key, "key"), (v_pages, value, "value")):
                tokens = _dense(op, pages[used, own], kind, d).flatten(0, 1)
                tokens[at : at + new] = x[b, h].float()
                size = page_size(kind, _NAMES[pages.dtype], d)
                pages[used, own] = _pack_reference(tokens[None, None], kind=kind, dtype=_NAMES[pages.dtype]).view(-1, size)


define(
    "kv_cache_append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor table, Tensor length, Tensor key, Tensor value) -> ()",
    fake=_append_fake,
    reference=_append_reference,
)


# ---------------------------------------------------------------------------------------------------------------------------------- attend


class Attended(NamedTuple):
    """What `attend` returns.

    Args:
        out: as ``query``: the values weighted by the softmax of the scores; zeros for a query that sees no token.
        lse: float32 ``(batch, heads, length)``: the logarithm of the sum of the exponentials of the scores, by which results over different
            tokens can be joined; minus infinity for a query that sees no token.
        mass: float32 ``(batch, KV heads, slots)``: what each slot of all tables, one after another, got of the probabilities, added up over
            the queries that share the KV head; no slots where it was not asked for.
    """

    out: Tensor
    lse: Tensor
    mass: Tensor


def attend(
    query: Tensor,
    k_pages: Sequence[Tensor],
    v_pages: Sequence[Tensor],
    tables: Sequence[Tensor],
    lengths: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    *,
    scale: float,
    softcap: float = 0.0,
    mass: bool = False,
) -> Attended:
    """Softmax attention of a few queries over pages, whatever the pages are.

    The tokens of a KV head are those of the first pool, then those of the second, and so on; every head has as many as it has. The queries
    belong to the last ``length`` of them, and none sees the tokens after its own. The query heads that share a KV head are computed
    together, from one read of each page. Long heads are split among threads, and the parts joined by their log-sum-exp; the result does not
    depend on the number of threads. Sums are float32; where the machine multiplies bfloat16, queries and probabilities are rounded to it
    for pages of bfloat16 and int4, and to 16 bits of their largest for int8.

    Args:
        query: ``(batch, heads, length, head_dim)``, float32, bfloat16 or float16, any strides; ``heads`` a multiple of the KV heads,
            ``head_dim`` of 16. Meant for decoding: a handful of rows.
        k_pages: pools of keys, ``(pages, heads, elements)`` each, as for `append`, of any dtype above. One at least.
        v_pages: pools of values, as many.
        tables: as for `append`, one for each pool.
        lengths: int64 ``(batch, KV heads)``, one for each pool: tokens of each head. Slots after them may hold anything.
        bias: float32 ``(batch, KV heads, 16 * pages of the table)``, one for each pool, added to the scores after scale and soft cap; or
            none at all.
        scale: what scores are multiplied with before the softmax.
        softcap: where not 0, a score becomes ``softcap * tanh(score / softcap)``.
        mass: whether to return it.
    Returns:
        An `Attended`.
    Raises:
        RuntimeError: a dtype or shape does not fit, a table has no such page, or a sparse page is damaged.
    """
    return Attended(
        *torch.ops.torch_cpu_ext.kv_cache_attend(
            query, list(k_pages), list(v_pages), list(tables), list(lengths), list(bias), scale=scale, softcap=softcap, mass=mass
        )
    )


def _check_attend(
    query: Tensor,
    k_pages: list[Tensor],
    v_pages: list[Tensor],
    tables: list[Tensor],
    lengths: list[Tensor],
    bias: list[Tensor],
    softcap: float,
) -> int:
    """Returns the number of KV heads."""
    op = "kv_cache_attend"
    check_float(op, "query", query)
    torch._check(query.dim() == 4, lambda: f"{op}: query must be 4-D (batch, heads, length, head_dim), got {query.dim()}-D")
    batch, q_heads, _, d = query.shape
    check_head_dim(op, d)
    torch._check(len(k_pages) > 0, lambda: f"{op}: k_pages must have one pool at least, got none")
    for name, values in (("v_pages", v_pages), ("tables", tables), ("lengths", lengths)):
        torch._check(
            len(values) == len(k_pages),
            lambda name=name, values=values: f"{op}: {name} must be as many as k_pages, {len(k_pages)}, got {len(values)}",
        )
    torch._check(len(bias) in (0, len(k_pages)), lambda: f"{op}: bias must be none or as many as k_pages, {len(k_pages)}, got {len(bias)}")
    torch._check(softcap >= 0, lambda: f"{op}: softcap must not be negative, got {softcap:g}")
    torch._check(
        lengths[0].dim() == 2 and lengths[0].shape[1] > 0,
        lambda: f"{op}: lengths must be 2-D (batch, KV heads), got {lengths[0].dim()}-D with {lengths[0].numel()} elements",
    )
    heads = lengths[0].shape[1]
    torch._check(q_heads % heads == 0, lambda: f"{op}: query must have a multiple of the {heads} KV heads, got {q_heads}")
    for i, pools in enumerate(zip(k_pages, v_pages, tables, lengths, strict=True)):
        _check_pool(op, f"[{i}]", *pools, (batch, heads, d))
    for i, one in enumerate(bias):
        slots = TOKENS * tables[i].shape[2]
        torch._check(
            one.dim() == 3 and one.dtype == torch.float32 and tuple(one.shape) == (batch, heads, slots),
            lambda i=i, one=one, slots=slots: (
                f"{op}: bias[{i}] must be a float32 tensor of shape ({batch}, {heads}, {slots}), got {one.dim()}-D {type_name(one.dtype)} "
                f"with {one.numel()} elements"
            ),
        )
    return heads


def _attend_fake(
    query: Tensor,
    k_pages: list[Tensor],
    v_pages: list[Tensor],
    tables: list[Tensor],
    lengths: list[Tensor],
    bias: list[Tensor],
    *,
    scale: float,
    softcap: float = 0.0,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _check_attend(query, k_pages, v_pages, tables, lengths, bias, softcap)
    slots = sum(TOKENS * table.shape[2] for table in tables) if mass else 0
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty((query.shape[0], heads, slots), dtype=torch.float32),
    )


def _attend_reference(
    query: Tensor,
    k_pages: list[Tensor],
    v_pages: list[Tensor],
    tables: list[Tensor],
    lengths: list[Tensor],
    bias: list[Tensor],
    *,
    scale: float,
    softcap: float = 0.0,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _check_attend(query, k_pages, v_pages, tables, lengths, bias, softcap)
    op, (batch, q_heads, length, d) = "kv_cache_attend", query.shape
    out, lse = query.new_zeros(query.shape), query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
    slots = [TOKENS * table.shape[2] for table in tables]
    masses = query.new_zeros((batch, heads, sum(slots) if mass else 0), dtype=torch.float32)
    group = q_heads // heads
    for b in range(batch):
        for h in range(heads):
            k: list[Tensor] = []
            v: list[Tensor] = []
            added, places, at = [], [], 0
            for i, (k_pool, v_pool, table, tokens) in enumerate(zip(k_pages, v_pages, tables, lengths, strict=True)):
                count = int(tokens[b, h])
                used = _pages_of(op, f"[{i}]", table, 0, count, k_pool.shape[0], b, h)
                own = h % k_pool.shape[1]
                for to, pool, kind in ((k, k_pool, "key"), (v, v_pool, "value")):
                    to.append(_dense(op, pool[used, own], kind, d).flatten(0, 1)[:count])
                added.append(bias[i][b, h, :count] if bias else k[-1].new_zeros(count))
                places.append(torch.arange(at, at + count))
                at += slots[i]
            keys, values, offset, place = torch.cat(k), torch.cat(v), torch.cat(added), torch.cat(places)
            total = keys.shape[0]
            if total == 0 or length == 0:
                continue
            own_heads = slice(h * group, (h + 1) * group)
            scores = query[b, own_heads].float() @ keys.T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            seen = torch.arange(total) <= torch.arange(total - length, total)[:, None]
            scores = (scores + offset).masked_fill(~seen, -math.inf)
            sums = scores.logsumexp(-1)
            p = (scores - sums[..., None]).exp().masked_fill(sums[..., None] == -math.inf, 0)
            out[b, own_heads] = (p @ values).to(out.dtype)
            lse[b, own_heads] = sums
            if mass:
                masses[b, h, place] = p.sum((0, 1))
    return out, lse, masses


define(
    "kv_cache_attend(Tensor query, Tensor[] k_pages, Tensor[] v_pages, Tensor[] tables, Tensor[] lengths, Tensor[] bias, *, float scale, "
    "float softcap=0.0, bool mass=False) -> (Tensor, Tensor, Tensor)",
    fake=_attend_fake,
    reference=_attend_reference,
)
