"""The op of the fused decoder: a stack of Llama-shaped layers for a few tokens in one call.

The layout of the cache's blocks is described in ``kernels/common/kv_block.h``.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_float, type_name
from ..core.registry import define
from .attention import from_blocks, to_blocks
from .ops import _HEADER, _linear_reference, _read_header

# The columns of a plan, as binding_decode.cpp names them.
PARTS = (
    *("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down", "q_norm", "k_norm"),
    *("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias", "window"),
    *("attention_norm", "mlp_norm", "rope", "q_norm_all", "k_norm_all"),
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
    layers, _, batch, heads, blocks, _, dim = kv.shape
    keys = kv[:, 0].reshape(layers * batch, heads, blocks, dim // 2, BLOCK, 2)
    values = kv[:, 1].reshape(layers * batch, heads, blocks, BLOCK // 2, dim, 2)
    plain = torch.stack([from_blocks(keys, "key"), from_blocks(values, "value")])
    return plain.view(2, layers, batch, heads, blocks * BLOCK, dim).transpose(0, 1)[..., :length, :]


def write_cache(kv: Tensor, start: int, states: Tensor) -> None:
    """Writes the states of tokens ``start`` and following, ``(layers, 2, batch, heads, tokens, head_dim)``, to a cache, in place."""
    first, end = start // BLOCK, -(-(start + states.shape[-2]) // BLOCK)
    touched = kv[:, :, :, :, first:end]
    plain = read_cache(touched, (end - first) * BLOCK).clone()
    plain[..., start - first * BLOCK :, :][..., : states.shape[-2], :] = states.to(kv.dtype)
    for which, kind in enumerate(("key", "value")):
        touched[:, which] = to_blocks(plain[:, which].flatten(0, 1), kind).view_as(touched[:, which])


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
    softcap: float = 0.0,
) -> Tensor:
    """Runs Llama-shaped layers on a few new tokens: norm, attention over the cache, norm, gated MLP, with their residuals.

    Keys and values are rounded to bfloat16 as they enter the cache; sums are in float32; the result does not depend on the number of
    threads.

    Args:
        hidden: the new tokens, ``(batch, tokens, hidden_size)``, float32, bfloat16 or float16; ``batch * tokens`` from 1 to 8.
        arena: 1-D uint8: all packed weights, as `pack` makes them.
        vectors: 1-D float32: all norms and biases.
        plan: int64 ``(layers + 1, 24)``: where each of `PARTS` begins in ``arena`` (bytes) or ``vectors`` (elements), -1 where a layer has
            none. ``post_norm`` is the norm before the MLP; ``attention_norm`` and ``mlp_norm`` are of what attention and MLP give, before
            it is added, and with them the norms before may be missing; ``q_norm`` and ``k_norm`` are of each head, ``q_norm_all`` and
            ``k_norm_all`` of all heads together. In ``window``: the tokens that a query sees, itself included (a sliding window), -1 for
            all. In ``rope``: what is added to ``positions`` in this layer, -1 where it does not rotate. The last line has the final norm
            and the packed output embedding in its first two columns, -1 to leave them out.
        cos: float32 ``(lines, head_dim / 2)``, of the rotary embedding: a line for each position, or several, for layers that differ.
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
        softcap: where it is not 0, a score becomes ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118, section 2).
    Returns:
        ``(batch, tokens, hidden_size or vocabulary)``, dtype of ``hidden``.
    Raises:
        RuntimeError: a dtype, shape or offset does not fit, or a packed weight is damaged.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_decode(
        *(hidden, arena, vectors, plan, cos, sin, positions, starts, kv, length),
        **{"heads": heads, "inner": inner, "epsilon": epsilon, "scale": scale, "activation": activation, "vocabulary": vocabulary},
        softcap=softcap,
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
    *,
    heads: int,
    inner: int,
    epsilon: float,
    scale: float,
    activation: str = "silu",
    vocabulary: int = 0,
    softcap: float = 0.0,
) -> None:
    def check(condition: bool, must: str, given: object) -> None:
        torch._check(condition, lambda: f"{_OP}: {must}, got {given}")

    def check_long(argument: str, tensor: Tensor, numel: int) -> None:
        check(
            tensor.dtype == torch.int64 and tensor.is_contiguous() and tensor.numel() == numel,
            f"{argument} must be contiguous int64 with {numel} elements",
            f"{type_name(tensor.dtype)} with {tensor.numel()}",
        )

    def kind(tensor: Tensor) -> str:
        return f"{tensor.dim()}-D {type_name(tensor.dtype)}"

    check_float(_OP, "hidden", hidden)
    check(hidden.dim() == 3, "hidden must be 3-D (batch, tokens, hidden size)", f"{hidden.dim()}-D")
    batch, tokens, _ = hidden.shape
    check(1 <= batch * tokens <= MAX_ROWS, f"hidden must have 1 to {MAX_ROWS} rows (batch times tokens)", batch * tokens)
    packed = arena.dim() == 1 and arena.dtype == torch.uint8 and arena.is_contiguous()
    check(packed, "arena must be a contiguous 1-D uint8 CPU tensor", kind(arena))
    floats = vectors.dim() == 1 and vectors.dtype == torch.float32 and vectors.is_contiguous()
    check(floats, "vectors must be contiguous 1-D float32", kind(vectors))
    lines = plan.dim() == 2 and plan.shape[0] >= 1 and plan.shape[1] == len(PARTS)
    check(lines, f"plan must be (layers + 1, {len(PARTS)})", f"{plan.dim()}-D with {plan.numel()} elements")
    check_long("plan", plan, plan.numel())
    layers = plan.shape[0] - 1
    check(
        kv.dim() == 7
        and kv.dtype == torch.bfloat16
        and kv.is_contiguous()
        and (kv.shape[0], kv.shape[1], kv.shape[2], kv.shape[5]) == (layers, 2, batch, BLOCK),
        f"kv must be contiguous bfloat16 ({layers}, 2, {batch}, key-value heads, blocks, {BLOCK}, head size)",
        f"{kind(kv)} with {kv.numel()} elements",
    )
    kv_heads, room, dim = kv.shape[3], kv.shape[4] * BLOCK - tokens, kv.shape[6]
    most = 2 * arena.numel()  # outputs that a packed weight of the arena can have: each panel of 16 has an offset of 8 bytes
    check(dim >= BLOCK and dim % BLOCK == 0, f"kv must have a head size that is a multiple of {BLOCK}", dim)
    check(
        kv_heads >= 1 and 1 <= heads <= most // dim and heads % kv_heads == 0,
        f"heads must be a multiple of the {kv_heads} key-value heads, for which the arena has weights",
        heads,
    )
    check(1 <= inner <= most, "inner must be the width of the MLP, for which the arena has weights", inner)
    check(0 <= length <= room, f"length must be 0 to {room} (tokens that kv holds, less the new ones)", length)
    check_long("positions", positions, batch * tokens)
    table = cos.dim() == 2 and cos.shape[1] == dim // 2 and cos.dtype == torch.float32 and cos.is_contiguous()
    check(table, f"cos must be contiguous float32 (positions, {dim // 2})", kind(cos))
    alike = sin.shape == cos.shape and sin.dtype == torch.float32 and sin.is_contiguous()
    check(alike, "sin must be of the shape and dtype of cos", kind(sin))
    if starts is not None:
        check_long("starts", starts, batch)
    check(0 <= vocabulary <= most, "vocabulary must be the rows of a head that the arena has, or 0", vocabulary)
    check(activation in ACTIVATIONS, "activation must be silu or gelu_tanh", activation)
    check(0 <= softcap < 1e30, "softcap must be 0 or positive", f"{softcap:g}")


def _decode_fake(hidden: Tensor, *rest: Any, **options: Any) -> Tensor:
    _check(hidden, *rest, **options)
    return hidden.new_empty((*hidden.shape[:2], options.get("vocabulary") or hidden.shape[2]))


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
    softcap: float = 0.0,
) -> Tensor:
    options: dict[str, Any] = {"heads": heads, "inner": inner, "epsilon": epsilon, "scale": scale, "softcap": softcap}
    _check(hidden, arena, vectors, plan, cos, sin, positions, starts, kv, length, activation=activation, vocabulary=vocabulary, **options)
    batch, tokens, width = hidden.shape
    kv_heads, dim = kv.shape[3], kv.shape[6]
    offsets = [dict(zip(PARTS, line, strict=True)) for line in plan.tolist()]

    def check(condition: bool, must: str, given: object) -> None:
        torch._check(condition, lambda: f"{_OP}: {must}, got {given}")

    for position in positions.flatten().tolist():
        check(0 <= position < len(cos), f"positions must be 0 to {len(cos) - 1}", position)
    farthest = max(positions.flatten().tolist())
    for at in offsets[:-1]:
        check(at["rope"] < len(cos) - farthest, "plan must name lines of cos", f"{at['rope']} beside position {farthest}")
    for start in [] if starts is None else starts.flatten().tolist():
        check(0 <= start <= length, f"starts must be 0 to {length} (length)", start)
    positions = positions.view(batch, tokens)

    def floats(at: int, n: int) -> Tensor | None:
        check(at < 0 or at + n <= vectors.numel(), "plan must name places among the vectors", at)
        return None if at < 0 else vectors[at : at + n]

    def linear(x: Tensor, at: int, outputs: int, bias: int = -1) -> Tensor:
        check(0 <= at <= arena.numel() - _HEADER.size, "plan must name offsets inside the arena", at)
        size = int(arena[at + 40 : at + 48].clone().view(torch.int64))
        check(0 <= size <= arena.numel() - at, "arena must be intact", "a packed weight that leaves it")
        packed, vector = arena[at : at + size], floats(bias, outputs)
        try:
            header = _read_header(_OP, packed)
            shape = outputs, x.shape[-1]
            check(
                (header.outputs, header.inputs) == shape,
                f"arena must hold {shape[0]} x {shape[1]} at {at}",
                f"{header.outputs} x {header.inputs}",
            )
            return _linear_reference(x, packed, vector, outputs)
        except RuntimeError as error:
            raise RuntimeError(re.sub("^sparse_linear(_decode)?: packed", f"{_OP}: arena", str(error))) from error

    def norm(x: Tensor, at: int) -> Tensor:
        weight = floats(at, x.shape[-1])
        return x if weight is None else x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    def rotate(x: Tensor, rope: int) -> Tensor:  # (batch, tokens, heads, dim)
        if rope < 0:
            return x
        a, b = x.chunk(2, -1)
        c, s = cos[positions + rope].unsqueeze(2), sin[positions + rope].unsqueeze(2)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    slots = torch.arange(length + tokens)
    own = length + torch.arange(tokens)[:, None]
    seen = (slots <= own).expand(batch, tokens, -1)
    if starts is not None:
        seen = seen & (slots >= starts[:, None, None])
    x = hidden.float()
    for layer, at in enumerate(offsets[:-1]):
        for part, after in (("input_norm", "attention_norm"), ("post_norm", "mlp_norm")):
            check(at[part] >= 0 or at[after] >= 0, "plan must have a norm in each layer", f"none in layer {layer}")
        y = norm(x, at["input_norm"])
        q = norm(linear(y, at["q"], heads * dim, at["q_bias"]), at["q_norm_all"]).view(batch, tokens, heads, dim)
        k = norm(linear(y, at["k"], kv_heads * dim, at["k_bias"]), at["k_norm_all"]).view(batch, tokens, kv_heads, dim)
        v = linear(y, at["v"], kv_heads * dim, at["v_bias"]).view(batch, tokens, kv_heads, dim)
        q, k = rotate(norm(q, at["q_norm"]), at["rope"]), rotate(norm(k, at["k_norm"]), at["rope"])
        write_cache(kv[layer : layer + 1], length, torch.stack([k, v]).transpose(2, 3)[None])
        keys, values = read_cache(kv[layer : layer + 1], length + tokens)[0].float().repeat_interleave(heads // kv_heads, 2)
        scores = (q.transpose(1, 2) * scale) @ keys.transpose(2, 3)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        near = seen if at["window"] <= 0 else seen & (slots > own - at["window"])
        attended = scores.masked_fill(~near[:, None], -torch.inf).softmax(-1) @ values
        y = linear(attended.transpose(1, 2).reshape(batch, tokens, heads * dim), at["o"], width, at["o_bias"])
        x = x + norm(y, at["attention_norm"])
        y = norm(x, at["post_norm"])
        gate, up = linear(y, at["gate"], inner, at["gate_bias"]), linear(y, at["up"], inner, at["up_bias"])
        gate = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        x = x + norm(linear(gate * up, at["down"], width, at["down_bias"]), at["mlp_norm"])
    x = norm(x, offsets[-1][PARTS[0]])
    if vocabulary:
        x = linear(x, offsets[-1][PARTS[1]], vocabulary)
    return x.to(hidden.dtype)


define(
    f"{_OP}(Tensor hidden, Tensor arena, Tensor vectors, Tensor plan, Tensor cos, Tensor sin, Tensor positions, Tensor? starts, "
    "Tensor(a!) kv, int length, *, int heads, int inner, float epsilon, float scale, "
    'str activation="silu", int vocabulary=0, float softcap=0.0) -> Tensor',
    fake=_decode_fake,
    reference=_decode_reference,
)
