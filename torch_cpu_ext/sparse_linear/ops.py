"""The ops of sparse_linear: schema, fake, reference and autograd of each, side by side.

The packed format is drawn in ``kernels/sparse_linear/sparse_linear.h``.
"""

import itertools
import struct
from typing import Any

import torch
from torch import Tensor

from ..core.registry import define

DTYPES = ("fp32", "bf16", "int8")
LAYOUTS = ("dense", "sparse")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_MAGIC, _VERSION = 0x4C505345435401, 1
_HEADER = struct.Struct("<QIIIIqqqqq")  # magic, version, dtype, layout, reserved, outputs, inputs, bytes, nonzeros, padding
_PANEL, _CHUNK, _TAIL = 16, 64, 64
_GROUP = {"fp32": 1, "bf16": 2, "int8": 4}  # inputs in a row
_TYPE_NAMES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "uint16": "UInt16",
    "uint32": "UInt32",
    "uint64": "UInt64",
    "complex32": "ComplexHalf",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}


def _check_float(op: str, argument: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in FLOATS.values(), lambda: f"{op}: {argument} must be float32, bfloat16 or float16, got {_type_name(tensor.dtype)}"
    )


def _type_name(dtype: torch.dtype) -> str:
    """A dtype in the words of PyTorch's C++ side, so that messages do not depend on who raises them."""
    name = str(dtype).removeprefix("torch.")
    return _TYPE_NAMES.get(name, name.capitalize())


def _check_packed(op: str, packed: Tensor) -> None:
    torch._check(
        packed.dim() == 1 and packed.dtype == torch.uint8 and packed.is_contiguous(),
        lambda: (
            f"{op}: packed must be a contiguous 1-D uint8 CPU tensor, as sparse_linear_pack makes it, "
            f"got {packed.dim()}-D {_type_name(packed.dtype)}"
        ),
    )


# ------------------------------------------------------------------------------------------------------------------------------------ pack


def pack(weight: Tensor, *, dtype: str = "bf16", layout: str = "auto") -> Tensor:
    """Packs a dense weight; the result does not depend on the instruction set or the number of threads.

    Args:
        weight: ``(out_features, in_features)``, float32, bfloat16 or float16, any strides.
        dtype: how values are stored: ``"fp32"``, ``"bf16"`` (rounded to nearest even) or ``"int8"`` (symmetric, one scale an output:
            ``max(abs(row)) / 127``).
        layout: ``"sparse"`` stores a bitmap and the values that are not zero once rounded, ``"dense"`` all values; ``"auto"`` takes what is
            smaller.
    Returns:
        1-D uint8 tensor: format version, sizes and all data in one array (after arXiv:2502.12444, with bitmap and values in one
        stream).
    Raises:
        RuntimeError: a dtype, shape or name does not fit, or ``dtype="int8"`` and the weight has NaN or infinities.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout)


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale``, or 0 where that is none: zeros, and values so small that their inverse overflows, have all codes zero."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0)


def _round_bf16(x: Tensor) -> Tensor:
    """``x.bfloat16()`` with the bits that the kernels give NaN; those of PyTorch depend on the place in a vector."""
    bits = x.view(torch.int32)
    rounded = torch.where(x.isnan(), bits >> 16 | 0x40, bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16)


def _check_pack(weight: Tensor, dtype: str, layout: str) -> None:
    op = "sparse_linear_pack"
    _check_float(op, "weight", weight)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight must be 2-D (out_features, in_features), got {weight.dim()}-D")
    torch._check(dtype in DTYPES, lambda: f"{op}: dtype must be fp32, bf16 or int8, got {dtype}")
    torch._check(layout in ("auto", *LAYOUTS), lambda: f"{op}: layout must be auto, sparse or dense, got {layout}")


def _pack_fake(weight: Tensor, *, dtype: str = "bf16", layout: str = "auto") -> Tensor:
    _check_pack(weight, dtype, layout)
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _pack_reference(weight: Tensor, *, dtype: str = "bf16", layout: str = "auto") -> Tensor:
    _check_pack(weight, dtype, layout)
    outputs, inputs = weight.shape
    group, panels = _GROUP[dtype], -(-outputs // _PANEL)
    rows = -(-inputs // group)
    values = torch.zeros(panels * _PANEL, rows * group)
    values[:outputs, :inputs] = weight.float()
    scale = torch.zeros(panels * _PANEL)
    if dtype == "int8":
        torch._check(
            bool(values.isfinite().all()), lambda: "sparse_linear_pack: weight must be finite to be packed as int8, got NaN or an infinity"
        )
        scale = values.abs().amax(1) / 127 if inputs else scale
        inverse = _inverse(scale)[:, None]
        codes = (values * inverse).round().clamp(-127, 127).add(128).to(torch.uint8)
        keep = codes != 128
    else:
        codes = _round_bf16(values) if dtype == "bf16" else values
        keep = codes != 0
    # (panel, row, element of the row)
    codes, keep = (
        t.view(panels, _PANEL, rows, group).transpose(1, 2).flatten(2).clone(memory_format=torch.contiguous_format) for t in (codes, keep)
    )
    nonzeros = int(keep.sum())
    size = codes.element_size()
    tail = _PANEL * 4 if dtype == "int8" else 0
    total = {"dense": panels * (rows * 64 + tail), "sparse": panels * (rows * 2 * group + tail) + nonzeros * size}
    if layout == "auto":
        layout = "sparse" if total["sparse"] < total["dense"] else "dense"

    offsets = [-(-(_HEADER.size + (panels + 1) * 8) // 64) * 64]
    parts: list[Tensor] = []
    step = _CHUNK // group
    for panel in range(panels):
        begin = len(parts)
        for first in range(0, rows, step):
            chunk, mask = codes[panel, first : first + step], keep[panel, first : first + step]
            if layout == "dense":
                parts.append(chunk.reshape(-1).view(torch.uint8))
                continue
            bits = mask.reshape(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
            parts += [bits.sum(1, dtype=torch.uint8), chunk[mask].view(torch.uint8)]
        if tail:
            parts.append(scale[panel * _PANEL :][:_PANEL].contiguous().view(torch.uint8))
        offsets.append(offsets[-1] + sum(part.numel() for part in parts[begin:]))
    header = _HEADER.pack(
        _MAGIC, _VERSION, DTYPES.index(dtype), LAYOUTS.index(layout), 0, outputs, inputs, offsets[-1] + _TAIL, nonzeros, 0
    )
    head = (header + struct.pack(f"<{len(offsets)}q", *offsets)).ljust(offsets[0], b"\0")
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *parts, torch.zeros(_TAIL, dtype=torch.uint8)])


define('sparse_linear_pack(Tensor weight, *, str dtype="bf16", str layout="auto") -> Tensor', fake=_pack_fake, reference=_pack_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- unpack


def unpack(packed: Tensor, out_features: int, in_features: int, *, dtype: str = "fp32") -> Tensor:
    """The dense weight that a packed one stands for.

    Args:
        packed: as `pack` made it.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: of the result: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    Returns:
        ``(out_features, in_features)``.
    Raises:
        RuntimeError: ``packed`` is damaged, from a newer version, or holds another shape.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_unpack(packed, out_features, in_features, dtype=dtype)


def _check_unpack(packed: Tensor, dtype: str) -> None:
    op = "sparse_linear_unpack"
    torch._check(dtype in FLOATS, lambda: f"{op}: dtype must be fp32, bf16 or fp16, got {dtype}")
    _check_packed(op, packed)


def _unpack_fake(packed: Tensor, out_features: int, in_features: int, *, dtype: str = "fp32") -> Tensor:
    _check_unpack(packed, dtype)
    return packed.new_empty((out_features, in_features), dtype=FLOATS[dtype])


def _unpack_reference(packed: Tensor, out_features: int, in_features: int, *, dtype: str = "fp32") -> Tensor:
    _check_unpack(packed, dtype)
    codes, scale = _open("sparse_linear_unpack", packed, out_features, in_features)
    return (codes if scale is None else (codes - 128) * scale[:, None]).to(FLOATS[dtype])


def _intact(op: str, condition: bool, problem: str) -> None:
    torch._check(condition, lambda: f"{op}: packed must be intact, got {problem}")


def _read_header(op: str, packed: Tensor) -> tuple[str, str, int, int, int, list[int]]:
    """dtype, layout, outputs, inputs, nonzeros and offsets of a packed array whose header and offsets are right."""
    _check_packed(op, packed)
    data = packed.numel()
    _intact(op, data >= _HEADER.size, "an array too short for a header")
    raw = bytes(packed[: _HEADER.size].tolist())
    magic, version, dtype_code, layout_code, _, outputs, inputs, total, nonzeros, _ = _HEADER.unpack(raw)
    _intact(op, magic == _MAGIC, "an array that does not begin with the format's magic number")
    _intact(op, version <= _VERSION, "a format version from the future: update torch_cpu_ext")
    _intact(op, version >= 1, "format version 0")
    _intact(op, dtype_code < len(DTYPES), "an unknown dtype code")
    _intact(op, layout_code < len(LAYOUTS), "an unknown layout code")
    _intact(op, 0 <= outputs <= 1 << 40 and 0 <= inputs <= 1 << 40, "sizes out of range")
    _intact(op, total == data, "an array of another length than its header says (truncated?)")
    panels = -(-outputs // _PANEL)
    first = -(-(_HEADER.size + (panels + 1) * 8) // 64) * 64
    _intact(op, first + _TAIL <= data, "an array too short for its offsets")
    offsets = list(struct.unpack(f"<{panels + 1}q", bytes(packed[_HEADER.size : _HEADER.size + (panels + 1) * 8].tolist())))
    _intact(op, offsets[0] == first and offsets[-1] == data - _TAIL, "offsets that do not span the array")
    _intact(op, all(a <= b for a, b in itertools.pairwise(offsets)), "offsets out of order")
    dtype, layout = DTYPES[dtype_code], LAYOUTS[layout_code]
    group = _GROUP[dtype]
    rows, tail = -(-inputs // group), _PANEL * 4 if dtype == "int8" else 0
    least = rows * (64 if layout == "dense" else 2 * group) + tail
    for begin, end in itertools.pairwise(offsets):
        _intact(op, end - begin >= least and (layout == "sparse" or end - begin == least), "a panel of the wrong length")
    return dtype, layout, outputs, inputs, nonzeros, offsets


def _check_shape(op: str, outputs: int, inputs: int, out_features: int, in_features: int) -> None:
    torch._check(
        outputs == out_features and inputs == in_features,
        lambda: f"{op}: packed must hold {out_features} x {in_features} (out_features x in_features), got {outputs} x {inputs}",
    )


def _open(op: str, packed: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor | None]:
    """The values of a packed array as float32, and for int8 the scales, of which the values are the stored codes."""
    dtype, layout, outputs, inputs, _, offsets = _read_header(op, packed)
    _check_shape(op, outputs, inputs, out_features, in_features)
    group, panels = _GROUP[dtype], len(offsets) - 1
    rows, step, elements = -(-inputs // group), _CHUNK // group, _PANEL * group
    kind = torch.uint8 if dtype == "int8" else FLOATS[dtype]
    size, tail = 4 // group, _PANEL * 4 if dtype == "int8" else 0
    codes = torch.full((panels, rows, elements), 128 if dtype == "int8" else 0, dtype=kind)
    scales: list[Tensor] = []
    for panel in range(panels):
        at, end = offsets[panel], offsets[panel + 1] - tail
        for first in range(0, rows, step):
            chunk = codes[panel, first : first + step]
            if layout == "dense":
                chunk.copy_(packed[at : at + chunk.numel() * size].clone().view(kind).view_as(chunk))
                at += chunk.numel() * size
                continue
            words = packed[at : at + chunk.numel() // 8]
            mask = ((words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view_as(chunk)
            at += words.numel()
            count = int(mask.sum())
            _intact(op, at + count * size <= end, "a panel whose bitmap and bytes disagree")
            chunk[mask] = packed[at : at + count * size].clone().view(kind)
            at += count * size
        _intact(op, at == end, "a panel whose bitmap and bytes disagree")
        if tail:
            scales.append(packed[end : end + tail].clone().view(torch.float32))
    dense = codes.view(panels, rows, _PANEL, group).transpose(1, 2).reshape(panels * _PANEL, rows * group)[:outputs, :inputs].float()
    return dense, torch.cat([*scales, torch.empty(0)])[:outputs] if dtype == "int8" else None


define(
    'sparse_linear_unpack(Tensor packed, int out_features, int in_features, *, str dtype="fp32") -> Tensor',
    fake=_unpack_fake,
    reference=_unpack_reference,
)


# ----------------------------------------------------------------------------------------------------------------------------------- check


def check(packed: Tensor) -> Tensor:
    """Walks a packed array from end to end; for data that comes from outside. `linear` itself checks all it needs to stay inside the array.

    Args:
        packed: as `pack` made it.
    Returns:
        int64 ``(6,)``: format version, index into `DTYPES`, index into `LAYOUTS`, out_features, in_features, number of nonzero weights.
    Raises:
        RuntimeError: ``packed`` is damaged or from a newer version; the message says what is wrong.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_check(packed)


def _check_fake(packed: Tensor) -> Tensor:
    _check_packed("sparse_linear_check", packed)
    return packed.new_empty(6, dtype=torch.int64)


def _check_reference(packed: Tensor) -> Tensor:
    op = "sparse_linear_check"
    dtype, layout, outputs, inputs, nonzeros, _ = _read_header(op, packed)
    codes, scale = _open(op, packed, outputs, inputs)
    _intact(op, int((codes != (0 if scale is None else 128)).sum()) == nonzeros, "a panel whose bitmap and bytes disagree")
    return torch.tensor([_VERSION, DTYPES.index(dtype), LAYOUTS.index(layout), outputs, inputs, nonzeros])


define("sparse_linear_check(Tensor packed) -> Tensor", fake=_check_fake, reference=_check_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- linear


def linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32) -> Tensor:
    """``input @ weight.T + bias`` with a packed weight, summed in float32.

    With bf16 weights the input is rounded to bf16 first. With int8 weights it is quantised to int8, with one scale
    (``max(abs) / 127``) for every ``activation_group`` inputs of each row; a row with NaN or infinities gives NaN.
    The result does not depend on the number of threads.

    Args:
        input: ``(..., in_features)``, float32, bfloat16 or float16, any strides.
        packed: the weight, as `pack` made it.
        bias: ``(out_features,)``, float32, bfloat16 or float16, or None.
        out_features: rows of the weight.
        activation_group: 32 or 64; used by int8 weights only. A single scale a row, as SparAMX has it, costs about one point of
            perplexity on a 135M-parameter model.
    Returns:
        ``(..., out_features)``, dtype of ``input``.
    Raises:
        RuntimeError: a dtype or shape does not fit, or ``packed`` is damaged or from a newer version.
    """
    return torch.ops.torch_cpu_ext.sparse_linear(input, packed, bias, out_features, activation_group=activation_group)


def _check_linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation_group: int) -> None:
    op = "sparse_linear"
    _check_float(op, "input", input)
    torch._check(input.dim() >= 1, lambda: f"{op}: input must have at least one dimension, got a scalar")
    torch._check(activation_group in (32, 64), lambda: f"{op}: activation_group must be 32 or 64, got {activation_group}")
    _check_packed(op, packed)
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == out_features,
            lambda: f"{op}: bias must be 1-D with {out_features} elements, got {bias.dim()}-D with {bias.numel()}",
        )
        _check_float(op, "bias", bias)


def _linear_fake(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32) -> Tensor:
    _check_linear(input, packed, bias, out_features, activation_group)
    return input.new_empty((*input.shape[:-1], out_features))


def _linear_reference(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32) -> Tensor:
    _check_linear(input, packed, bias, out_features, activation_group)
    weight, scale = _open("sparse_linear", packed, out_features, input.shape[-1])
    x = input.float()
    if scale is not None:
        x = _quantize_dequantize(x, activation_group)
        weight = (weight - 128) * scale[:, None]
    elif DTYPES[int(packed[12])] == "bf16":
        x = x.bfloat16().float()
    out = x @ weight.T
    return (out if bias is None else out + bias.float()).to(input.dtype)


def _quantize_dequantize(x: Tensor, group: int) -> Tensor:
    """What int8 codes with a scale for every ``group`` inputs make of ``x``."""
    inputs = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -inputs % group)).unflatten(-1, (-1, group)) if inputs else x.unsqueeze(-1)
    scale = groups.abs().amax(-1, keepdim=True) / 127 if inputs else groups
    codes = (groups * _inverse(scale)).round().clamp(-127, 127)
    return torch.where(scale.isfinite(), codes * scale, torch.nan).flatten(-2)[..., :inputs]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any] | None = None, output: Any = None) -> None:
    input, packed, bias, out_features = inputs[:4]
    ctx.save_for_backward(packed)
    ctx.shape, ctx.dtype, ctx.bias_dtype, ctx.out_features = input.shape, input.dtype, None if bias is None else bias.dtype, out_features


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Made of known ops, hence differentiable again. int8 passes the gradient straight through the rounding of the input."""
    (packed,) = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        dtype = next(name for name, kind in FLOATS.items() if kind == ctx.dtype)
        grad_input = grad @ torch.ops.torch_cpu_ext.sparse_linear_unpack(packed, ctx.out_features, ctx.shape[-1], dtype=dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_input, None, grad_bias, None


define(
    "sparse_linear(Tensor input, Tensor packed, Tensor? bias, int out_features, *, int activation_group=32) -> Tensor",
    fake=_linear_fake,
    reference=_linear_reference,
    setup=_linear_setup,
    backward=_linear_backward,
)
