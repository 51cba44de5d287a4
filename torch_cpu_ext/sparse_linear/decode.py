"""The op of the fused decoder: a stack of Llama-shaped layers for a few tokens in one call.

The layout of the cache is described in ``kernels/sparse_linear/decode.h``.
"""

import torch
from torch import Tensor

from ..core.registry import define
from .ops import _check_float, _linear_reference

# The columns of a plan, as binding_decode.cpp names them.
PARTS = (
    *("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down", "q_norm", "k_norm"),
    *("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias", "window"),
)
MAX_ROWS = 8
BLOCK = 16  # tokens
ACTIVATIONS = ("silu", "gelu_tanh")

_OP = "sparse_linear_decode"


def read_cache(kv: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens of a cache in plain order: ``(..., blocks, 16, head_dim) -> (..., length, head_dim)``.

    Args:
        kv: ``(layers, 2, batch, heads, blocks, 16, head_dim)``, or with some of the first dimensions chosen by slices.
        length: tokens.
    """
    keys, values = kv.unbind(1)
    *lead, blocks, _, dim = keys.shape
    keys = keys.reshape(*lead, blocks, dim // 2, BLOCK, 2).transpose(-3, -2).reshape(*lead, blocks * BLOCK, dim)
    values = values.reshape(*lead, blocks, BLOCK // 2, dim, 2).transpose(-2, -1).reshape(*lead, blocks * BLOCK, dim)
    return torch.stack([keys, values], 1)[..., :length, :]


def write_cache(kv: Tensor, start: int, states: Tensor) -> None:
    """Writes the states of tokens ``start`` and following, ``(layers, 2, batch, heads, tokens, head_dim)``, to a cache, in place."""
    first, end = start // BLOCK, -(-(start + states.shape[-2]) // BLOCK)
    touched = kv[:, :, :, :, first:end]
    plain = read_cache(touched, (end - first) * BLOCK)
    plain[..., start - first * BLOCK :, :][..., : states.shape[-2], :] = states.to(kv.dtype)
    keys, values = plain.unbind(1)
    *lead, _, dim = keys.shape
    keys = keys.reshape(*lead, end - first, BLOCK, dim // 2, 2).transpose(-3, -2).reshape(*lead, end - first, BLOCK, dim)
    values = values.reshape(*lead, end - first, BLOCK // 2, 2, dim).transpose(-2, -1).reshape(*lead, end - first, BLOCK, dim)
    touched.copy_(torch.stack([keys, values], 1))


def decode(
    hidden: Tensor,
    arena: Tensor,
    vectors: Tensor,
    plan: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    kv: Tensor,
    length: int,
    *,
    heads: int,
    inner: int,
    epsilon: float,
    scale: float,
    activation: str = "silu",
    vocabulary: int = 0,
) -> Tensor:
    """Runs Llama-shaped layers on a few new tokens: norm, attention over the cache, norm, gated MLP, with their residuals.

    Keys and values are rounded to bfloat16 as they enter the cache; sums are in float32; the result does not depend on the number of
    threads.

    Args:
        hidden: the new tokens, ``(batch, tokens, hidden_size)``, float32, bfloat16 or float16; ``batch * tokens`` from 1 to 8.
        arena: 1-D uint8: all packed weights, as `pack` makes them.
        vectors: 1-D float32: all norms and biases.
        plan: int64 ``(layers + 1, 19)``: where each of `PARTS` begins in ``arena`` (bytes) or ``vectors`` (elements), -1 where a layer has
            none; in the last column the tokens that a query sees, itself included (a sliding window), -1 for all. The last line has the
            final norm and the packed output embedding in its first two columns, -1 to leave them out.
        cos: float32 ``(positions, head_dim / 2)``, of the rotary embedding.
        sin: likewise.
        positions: int64 ``(batch, tokens)``, lines of ``cos`` and ``sin``.
        starts: int64 ``(batch,)``: the first token of the cache that is not padding; None: all zero.
        kv: bfloat16 ``(layers, 2, batch, key-value heads, blocks, 16, head_dim)``, finite throughout; the new tokens are written to it.
            Blocks are not in plain order, see `read_cache`. ``head_dim`` is a multiple of 16.
        length: tokens that ``kv`` holds already.
        heads: query heads, a multiple of the key-value heads.
        inner: width of the MLP.
        epsilon: of the norms.
        scale: of the scores, ``head_dim ** -0.5`` as a rule.
        activation: of the MLP's gate, ``"silu"`` or ``"gelu_tanh"``.
        vocabulary: rows of the output embedding; 0: give the hidden states instead of logits.
    Returns:
        ``(batch, tokens, hidden_size or vocabulary)``, dtype of ``hidden``.
    Raises:
        RuntimeError: a dtype, shape or offset does not fit, or a packed weight is damaged.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_decode(
        *(hidden, arena, vectors, plan, cos, sin, positions, starts, kv, length),
        **{"heads": heads, "inner": inner, "epsilon": epsilon, "scale": scale, "activation": activation, "vocabulary": vocabulary},
    )


def _check(
    hidden: Tensor,
    arena: Tensor,
    vectors: Tensor,
    plan: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    kv: Tensor,
    length: int,
) -> None:
    _check_float(_OP, "hidden", hidden)
    torch._check(hidden.dim() == 3, lambda: f"{_OP}: hidden must be 3-D (batch, tokens, hidden size), got {hidden.dim()}-D")
    torch._check(arena.dim() == 1 and arena.dtype == torch.uint8, lambda: f"{_OP}: arena must be a contiguous 1-D uint8 CPU tensor")
    torch._check(vectors.dim() == 1 and vectors.dtype == torch.float32, lambda: f"{_OP}: vectors must be contiguous 1-D float32")
    torch._check(plan.dim() == 2 and plan.shape[1] == len(PARTS), lambda: f"{_OP}: plan must be (layers + 1, {len(PARTS)})")
    torch._check(kv.dim() == 7 and kv.dtype == torch.bfloat16, lambda: f"{_OP}: kv must be contiguous bfloat16 of 7 dimensions")


def _decode_fake(
    hidden: Tensor,
    arena: Tensor,
    vectors: Tensor,
    plan: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    kv: Tensor,
    length: int,
    *,
    heads: int,
    inner: int,
    epsilon: float,
    scale: float,
    activation: str = "silu",
    vocabulary: int = 0,
) -> Tensor:
    _check(hidden, arena, vectors, plan, cos, sin, positions, starts, kv, length)
    return hidden.new_empty((*hidden.shape[:2], vocabulary or hidden.shape[2]))


def _decode_reference(
    hidden: Tensor,
    arena: Tensor,
    vectors: Tensor,
    plan: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    kv: Tensor,
    length: int,
    *,
    heads: int,
    inner: int,
    epsilon: float,
    scale: float,
    activation: str = "silu",
    vocabulary: int = 0,
) -> Tensor:
    _check(hidden, arena, vectors, plan, cos, sin, positions, starts, kv, length)
    batch, tokens, width = hidden.shape
    kv_heads, dim = kv.shape[3], kv.shape[6]
    offsets = [dict(zip(PARTS, line, strict=True)) for line in plan.tolist()]

    def floats(at: int, n: int) -> Tensor | None:
        return None if at < 0 else vectors[at : at + n]

    def linear(x: Tensor, at: int, outputs: int, bias: int = -1) -> Tensor:
        size = int(arena[at + 40 : at + 48].clone().view(torch.int64))
        return _linear_reference(x, arena[at : at + size], floats(bias, outputs), outputs)

    def norm(x: Tensor, at: int) -> Tensor:
        weight = floats(at, x.shape[-1])
        return x if weight is None else x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    def rotate(x: Tensor) -> Tensor:  # (batch, tokens, heads, dim)
        a, b = x.chunk(2, -1)
        c, s = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    slots = torch.arange(length + tokens)
    own = length + torch.arange(tokens)[:, None]
    seen = (slots <= own).expand(batch, tokens, -1)
    if starts is not None:
        seen = seen & (slots >= starts[:, None, None])
    x = hidden.float()
    for layer, at in enumerate(offsets[:-1]):
        y = norm(x, at["input_norm"])
        q = linear(y, at["q"], heads * dim, at["q_bias"]).view(batch, tokens, heads, dim)
        k = linear(y, at["k"], kv_heads * dim, at["k_bias"]).view(batch, tokens, kv_heads, dim)
        v = linear(y, at["v"], kv_heads * dim, at["v_bias"]).view(batch, tokens, kv_heads, dim)
        q, k = rotate(norm(q, at["q_norm"])), rotate(norm(k, at["k_norm"]))
        write_cache(kv[layer : layer + 1], length, torch.stack([k, v]).transpose(2, 3)[None])
        keys, values = read_cache(kv[layer : layer + 1], length + tokens)[0].float().repeat_interleave(heads // kv_heads, 2)
        scores = (q.transpose(1, 2) * scale) @ keys.transpose(2, 3)
        near = seen if at["window"] < 0 else seen & (slots > own - at["window"])
        attended = scores.masked_fill(~near[:, None], -torch.inf).softmax(-1) @ values
        x = x + linear(attended.transpose(1, 2).reshape(batch, tokens, heads * dim), at["o"], width, at["o_bias"])
        y = norm(x, at["post_norm"])
        gate, up = linear(y, at["gate"], inner, at["gate_bias"]), linear(y, at["up"], inner, at["up_bias"])
        gate = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        x = x + linear(gate * up, at["down"], width, at["down_bias"])
    x = norm(x, offsets[-1][PARTS[0]])
    if vocabulary:
        x = linear(x, offsets[-1][PARTS[1]], vocabulary)
    return x.to(hidden.dtype)


define(
    f"{_OP}(Tensor hidden, Tensor arena, Tensor vectors, Tensor plan, Tensor cos, Tensor sin, Tensor positions, Tensor? starts, "
    'Tensor(a!) kv, int length, *, int heads, int inner, float epsilon, float scale, str activation="silu", int vocabulary=0) -> Tensor',
    fake=_decode_fake,
    reference=_decode_reference,
)
