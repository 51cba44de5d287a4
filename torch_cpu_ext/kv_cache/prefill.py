"""Attention of a prompt, with the scores of its tokens: schema, fake and reference."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import check_float, check_head_dim, type_name
from ..core.registry import CATALOGUE, define


class Prefill(NamedTuple):
    """What `prefill` gives.

    Args:
        out: ``(batch, heads, length, head_dim)`` in the dtype of the query.
        lse: float32 ``(batch, heads, length)``, the logarithm of the sum of the exponentials of the scores.
        score: float32 ``(batch, heads, tokens)``, or ``(batch, heads, 0)`` where no scores were asked for.
        signature: int64 ``(batch, tokens, words)``, or ``(batch, 0, words)``; a word holds the bits of 64 query heads.
    """

    out: Tensor
    lse: Tensor
    score: Tensor
    signature: Tensor


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sample: int = 0,
    pool: int = 1,
    start: int = 0,
    recent: int = 0,
    sign: bool = False,
) -> Prefill:
    """Causal attention of a prompt, and in the same pass how much attention its tokens get.

    The queries belong to the last ``length`` of the tokens; a query sees the tokens from ``first`` up to its own. Scores are those of
    SnapKV (arXiv:2404.14469) with ``window``, those of H2O (arXiv:2306.14048) with ``sample=1``: the probabilities that some queries give
    to each token, added up for each query head. Signatures (KVCrush, arXiv:2503.00022) have a bit for each query head: whether the token
    is in the upper half by that head's score. With bfloat16 inputs and vdpbf16ps, probabilities are rounded to bfloat16; all sums are
    float32. The result depends neither on the number of threads nor on what else is in the batch, nor on padding.

    Args:
        query: ``(batch, heads, length, head_dim)``, float32, bfloat16 or float16, any strides; ``heads`` a multiple of the KV heads,
            ``head_dim`` of 16.
        key: ``(batch, KV heads, tokens, head_dim)`` in the dtype of ``query``, any strides, at least ``length`` tokens.
        value: the same.
        first: int64 ``(batch, KV heads)``: the first live token of each KV head; those before it are padding, which may hold anything.
            None: all tokens are live.
        bias: float32 ``(batch, KV heads, tokens)``, added to the scores of the tokens after ``scale`` and ``softcap``. None: nothing.
        scale: what products of queries and keys are multiplied with.
        softcap: where not 0, scores become ``softcap * tanh(score / softcap)``.
        window: how many of the last queries the scores are made of. 0: none.
        sample: makes the scores of every ``sample``-th query instead, counted from the last. 0: of none.
        pool: scores become the largest among this many neighbouring live tokens, an odd number.
        start: how many tokens at the start of a row, counted from the least ``first`` of its KV heads, have no bits in the signatures.
        recent: how many tokens at the end have none.
        sign: whether to make signatures, as `sign` makes them of the scores.
    Returns:
        Output, log-sum-exp, scores and signatures; see `Prefill`. A query of padding gives zeros and minus infinity. Scores of padding
        are 0.
    Raises:
        RuntimeError: a dtype, shape or value does not fit.
    """
    return Prefill(
        *torch.ops.torch_cpu_ext.kv_cache_prefill(
            query,
            key,
            value,
            first,
            bias,
            scale=scale,
            softcap=softcap,
            window=window,
            sample=sample,
            pool=pool,
            start=start,
            recent=recent,
            sign=sign,
        )
    )


_OP = "kv_cache_prefill"


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    window: int,
    sample: int,
    pool: int,
    start: int,
    recent: int,
    sign: bool,
) -> None:
    check_float(_OP, "query", query)
    torch._check(query.dim() == 4, lambda: f"{_OP}: query must be 4-D (batch, heads, length, head_dim), got {query.dim()}-D")
    batch, heads, length, d = query.shape
    check_head_dim(_OP, d)
    for name, tensor in (("key", key), ("value", value)):
        torch._check(
            tensor.dim() == 4 and tensor.dtype == query.dtype,
            lambda name=name, tensor=tensor: (
                f"{_OP}: {name} must be a 4-D {type_name(query.dtype)} tensor (batch, KV heads, tokens, head_dim), "
                f"got {tensor.dim()}-D {type_name(tensor.dtype)}"
            ),
        )
        torch._check(
            tensor.shape[0] == batch and tensor.shape[3] == d,
            lambda name=name, tensor=tensor: (
                f"{_OP}: {name} must have batch {batch} and head_dim {d}, got {tensor.shape[0]} and {tensor.shape[3]}"
            ),
        )
    kv_heads, tokens = key.shape[1], key.shape[2]
    torch._check(
        value.shape[1] == kv_heads and value.shape[2] == tokens,
        lambda: f"{_OP}: value must have {kv_heads} KV heads and {tokens} tokens, got {value.shape[1]} and {value.shape[2]}",
    )
    torch._check(
        kv_heads > 0 and heads % kv_heads == 0, lambda: f"{_OP}: query must have a multiple of the {kv_heads} KV heads, got {heads}"
    )
    torch._check(length <= tokens, lambda: f"{_OP}: query must be of at most the {tokens} tokens of key, got {length}")
    if first is not None:
        torch._check(
            first.dim() == 2 and first.dtype == torch.int64 and first.shape[0] == batch and first.shape[1] == kv_heads,
            lambda: (
                f"{_OP}: first must be an int64 tensor of shape ({batch}, {kv_heads}), got {first.dim()}-D {type_name(first.dtype)} "
                f"with {first.numel()} elements"
            ),
        )
    if bias is not None:
        torch._check(
            bias.dim() == 3
            and bias.dtype == torch.float32
            and bias.shape[0] == batch
            and bias.shape[1] == kv_heads
            and bias.shape[2] == tokens,
            lambda: (
                f"{_OP}: bias must be a float32 tensor of shape ({batch}, {kv_heads}, {tokens}), got {bias.dim()}-D "
                f"{type_name(bias.dtype)} with {bias.numel()} elements"
            ),
        )
    torch._check(0 <= softcap < math.inf, lambda: f"{_OP}: softcap must be 0 or positive, got {softcap:g}")
    for name, number in (("window", window), ("sample", sample), ("start", start), ("recent", recent)):
        torch._check(number >= 0, lambda name=name, number=number: f"{_OP}: {name} must not be negative, got {number}")
    torch._check(
        window == 0 or sample == 0, lambda: f"{_OP}: window and sample must not both be given, got window {window} and sample {sample}"
    )
    torch._check(pool > 0 and pool % 2 == 1, lambda: f"{_OP}: pool must be odd and positive, got {pool}")
    torch._check(not sign or window > 0 or sample > 0, lambda: f"{_OP}: sign must come with window or sample, got neither")


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sample: int = 0,
    pool: int = 1,
    start: int = 0,
    recent: int = 0,
    sign: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, first, bias, softcap, window, sample, pool, start, recent, sign)
    batch, heads, length, _ = query.shape
    tokens = key.shape[2]
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads, length), dtype=torch.float32),
        query.new_empty((batch, heads, tokens if window or sample else 0), dtype=torch.float32),
        query.new_empty((batch, tokens if sign else 0, (heads + 63) // 64), dtype=torch.int64),
    )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sample: int = 0,
    pool: int = 1,
    start: int = 0,
    recent: int = 0,
    sign: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, first, bias, softcap, window, sample, pool, start, recent, sign)
    (batch, heads, length, _), (kv_heads, tokens) = query.shape, key.shape[1:3]
    group = heads // kv_heads
    out, lse = query.new_zeros(query.shape), query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
    score = query.new_zeros((batch, heads, tokens if window or sample else 0), dtype=torch.float32)
    starts = torch.zeros(batch, kv_heads, dtype=torch.int64) if first is None else first
    scored = torch.arange(length - 1, -1, -sample) if sample else torch.arange(max(length - window, 0), length)
    for b in range(batch):
        for h in range(kv_heads):
            begin, mine = int(starts[b, h]), slice(h * group, (h + 1) * group)
            torch._check(0 <= begin <= tokens, lambda begin=begin: f"{_OP}: first must be 0 to {tokens} (tokens), got {begin}")
            padding = max(length - (tokens - begin), 0)  # queries that see nothing
            if padding == length:
                continue
            q, k, v = query[b, mine, padding:].float(), key[b, h, begin:].float(), value[b, h, begin:].float()
            s = q @ k.T * scale
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if bias is not None:
                s = s + bias[b, h, begin:]
            seen = torch.arange(begin, tokens) <= torch.arange(tokens - length + padding, tokens)[:, None]
            s = s.masked_fill(~seen, -math.inf)
            lse[b, mine, padding:] = s.logsumexp(-1)
            p = torch.where(s == -math.inf, 0, s - lse[b, mine, padding:, None]).exp().masked_fill(s == -math.inf, 0)
            out[b, mine, padding:] = (p @ v).to(query.dtype)
            if window or sample:
                column = p[:, scored[scored >= padding] - padding].sum(1)
                half = min(pool // 2, tokens - begin)
                score[b, mine, begin:] = F.pad(column, (half, half), value=-math.inf).unfold(-1, 2 * half + 1, 1).amax(-1)
    signature = torch.zeros(batch, tokens if sign else 0, (heads + 63) // 64, dtype=torch.int64)
    if sign:
        start_of = (starts.amin(1) + min(start, tokens)).clamp_max(tokens)
        signature = CATALOGUE["kv_cache_sign"].reference(score, start_of, start_of.clamp_min(tokens - recent))
    return out, lse, score, signature


define(
    f"{_OP}(Tensor query, Tensor key, Tensor value, Tensor? first=None, Tensor? bias=None, *, float scale, float softcap=0.0, "
    "int window=0, int sample=0, int pool=1, int start=0, int recent=0, bool sign=False) "
    "-> (Tensor out, Tensor lse, Tensor score, Tensor signature)",
    fake=_fake,
    reference=_reference,
)
