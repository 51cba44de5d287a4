"""The ops of sparse_linear: schema, fake, reference and autograd of each, side by side.

The packed format is drawn in ``kernels/sparse_linear/sparse_linear.h``.
"""

import itertools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import FLOATS, check_float, type_name
from ..core.registry import define
from .pruning import is_pattern, parse_pattern

DTYPES = ("fp32", "bf16", "int8", "int4")
GROUP_SIZES = (32, 64, 128)
LAYOUTS = ("dense", "sparse")  # those to choose between; a pattern has its own
LAYOUT_NAMES = (*LAYOUTS, "structured")  # by code
INT4_LIMIT = 65504.0  # magnitude up to which every weight has float16 scales and minimums

_MAGIC, _VERSION = 0x4C505345435401, 1
_HEADER = struct.Struct("<QIIIIqqqqq")  # magic, version, dtype, layout, group size, outputs, inputs, bytes, nonzeros, symmetric
_PANEL, _CHUNK, _TAIL = 16, 64, 64
_GROUP = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}  # inputs in a row of 64 bytes


def _check_packed(op: str, packed: Tensor) -> None:
    torch._check(
        packed.dim() == 1 and packed.dtype == torch.uint8 and packed.is_contiguous(),
        lambda: (
            f"{op}: packed must be a contiguous 1-D uint8 CPU tensor, as sparse_linear_pack makes it, "
            f"got {packed.dim()}-D {type_name(packed.dtype)}"
        ),
    )


# ------------------------------------------------------------------------------------------------------------------------------------ pack


def pack(
    weight: Tensor,
    *,
    dtype: str = "bf16",
    layout: str = "auto",
    group_size: int = 32,
    symmetric: bool = False,
    scale: Tensor | None = None,
    minimum: Tensor | None = None,
    pattern: str = "unstructured",
) -> Tensor:
    """Packs a dense weight; the result does not depend on the instruction set or the number of threads.

    Args:
        weight: ``(out_features, in_features)``, float32, bfloat16 or float16, any strides.
        dtype: how values are stored: ``"fp32"``, ``"bf16"`` (rounded to nearest even), ``"int8"`` (symmetric, one scale an output:
            ``max(abs(row)) / 127``) or ``"int4"`` (codes from 0 to 15, a scale for every group of inputs of an output).
        layout: ``"sparse"`` stores a bitmap and the values that are not zero once rounded, ``"dense"`` all values; ``"auto"`` takes what is
            smaller.
        group_size: inputs that share a scale in an int4 weight: 32, 64 or 128.
        symmetric: of int4: True has zero at code 8 and the weight of largest magnitude at code 0 (GGUF Q4_0 blocks keep their codes); False
            spans the smallest to the largest weight of the group: with a minimum in the dense layout (GGUF Q4_1 blocks keep their codes),
            with a whole number as zero in the sparse one.
        scale: grid to round to, for weights that lie on one: float32 ``(out_features, 1)`` for int8, ``(out_features, groups)`` for int4,
            where it is rounded to float16; None finds one.
        minimum: with ``scale``, for int4 that is not symmetric: the value of code 0, float32 ``(out_features, groups)``.
        pattern: ``"n:m"``, such as ``"2:4"``: the weight has at most n values that are not zero among every m consecutive inputs of an
            output, m a power of two up to 64; it is packed in the ``"structured"`` layout, with exactly n values for every m inputs. Not
            for int4, and only with the layout ``"auto"``.
    Returns:
        1-D uint8 tensor: format version, sizes and all data in one array (after arXiv:2502.12444, with bitmap and values in one
        stream).
    Raises:
        RuntimeError: a dtype, shape or name does not fit, or codes are asked for and the weight has NaN or infinities (or, for int4, the
            scale is beyond float16), or the weight does not have the pattern; the message names the first output that has not.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_pack(
        weight, dtype=dtype, layout=layout, group_size=group_size, symmetric=symmetric, scale=scale, minimum=minimum, pattern=pattern
    )


def structured_pattern(pattern: str) -> tuple[int, int] | None:
    """``(n, m)`` of a pattern that the structured layout can hold; None of any other."""
    groups = parse_pattern(pattern) if is_pattern(pattern) else None
    return groups if groups is not None and groups[1] <= _CHUNK and groups[1].bit_count() == 1 else None


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale``, or 0 where that is none: zeros, and values so small that their inverse overflows, have all codes zero."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0)


def _round_bf16(x: Tensor) -> Tensor:
    """``x.bfloat16()`` with the bits that the kernels give NaN; those of PyTorch depend on the place in a vector."""
    bits = x.view(torch.int32)
    rounded = torch.where(x.isnan(), bits >> 16 | 0x40, bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16)


def _check_pack(
    weight: Tensor,
    *,
    dtype: str = "bf16",
    layout: str = "auto",
    group_size: int = 32,
    symmetric: bool = False,
    scale: Tensor | None = None,
    minimum: Tensor | None = None,
    pattern: str = "unstructured",
) -> None:
    op = "sparse_linear_pack"
    check_float(op, "weight", weight)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight must be 2-D (out_features, in_features), got {weight.dim()}-D")
    torch._check(dtype in DTYPES, lambda: f"{op}: dtype must be fp32, bf16, int8 or int4, got {dtype}")
    torch._check(layout in ("auto", *LAYOUTS), lambda: f"{op}: layout must be auto, sparse or dense, got {layout}")
    torch._check(group_size in GROUP_SIZES, lambda: f"{op}: group_size must be 32, 64 or 128, got {group_size}")
    torch._check(
        scale is None or dtype in ("int8", "int4"),
        lambda: f"{op}: scale must be None unless dtype is int8 or int4, got a tensor with dtype {dtype}",
    )
    torch._check(
        (minimum is not None) == (scale is not None and dtype == "int4" and not symmetric),
        lambda: f"{op}: minimum must be given with scale for an int4 weight that is not symmetric, and only then",
    )
    groups = -(-weight.shape[1] // group_size) if dtype == "int4" else 1
    for name, grid in (("scale", scale), ("minimum", minimum)):
        torch._check(
            grid is None or (tuple(grid.shape) == (weight.shape[0], groups) and grid.dtype == torch.float32),
            lambda name=name, grid=grid: (
                f"{op}: {name} must be float32 ({weight.shape[0]}, {groups}), got {grid.dim()}-D {type_name(grid.dtype)} "
                f"with {grid.numel()} elements"
            ),
        )
    torch._check(
        pattern == "unstructured" or structured_pattern(pattern) is not None,
        lambda: f"{op}: pattern must be unstructured or n:m with n below m and m a power of two from 2 to 64, got {pattern}",
    )
    if (found := structured_pattern(pattern)) is not None:
        torch._check(dtype != "int4", lambda: f"{op}: pattern must be unstructured for int4 weights, got {pattern}")
        torch._check(layout == "auto", lambda: f"{op}: layout must be auto with a pattern, got {layout}")
        torch._check(
            weight.shape[1] % found[1] == 0,
            lambda: f"{op}: weight must have a multiple of {found[1]} inputs for the pattern {pattern}, got {weight.shape[1]}",
        )


def _pack_fake(weight: Tensor, **options: Any) -> Tensor:
    _check_pack(weight, **options)
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _pack_reference(
    weight: Tensor,
    *,
    dtype: str = "bf16",
    layout: str = "auto",
    group_size: int = 32,
    symmetric: bool = False,
    scale: Tensor | None = None,
    minimum: Tensor | None = None,
    pattern: str = "unstructured",
) -> Tensor:
    _check_pack(
        weight, dtype=dtype, layout=layout, group_size=group_size, symmetric=symmetric, scale=scale, minimum=minimum, pattern=pattern
    )
    outputs, inputs = weight.shape
    found_pattern = structured_pattern(pattern)
    for name, grid in (("scale", scale), ("minimum", minimum)):
        finite = grid is None or bool(grid.isfinite().all())
        torch._check(finite, lambda name=name: f"sparse_linear_pack: {name} must be finite, got NaN or an infinity")
    if dtype in ("int8", "int4"):
        what = "finite and within the range of fp16 scales" if dtype == "int4" else "finite"
        found = "other values" if dtype == "int4" else "NaN or an infinity"
        message = f"sparse_linear_pack: weight must be {what} to be packed as {dtype}, got {found}"
        torch._check(bool(weight.isfinite().all()), lambda: message)
    candidates = []
    for name in ("structured",) if found_pattern else LAYOUTS if layout == "auto" else (layout,):
        if dtype == "int4":
            panels, nonzeros = _int4_panels(weight.float(), name, group_size, symmetric, scale, minimum)
            torch._check(nonzeros >= 0, lambda: message)
        else:
            panels, nonzeros = _panels(weight.float(), dtype, name, scale, found_pattern)
        candidates.append((sum(panel.numel() for panel in panels), LAYOUT_NAMES.index(name), panels, nonzeros))
    _, layout_code, panels, nonzeros = min(candidates, key=lambda candidate: candidate[:2])
    offsets = [-(-(_HEADER.size + (len(panels) + 1) * 8) // 64) * 64]
    for panel in panels:
        offsets.append(offsets[-1] + panel.numel())
    int4 = dtype == "int4"
    header = _HEADER.pack(
        *(_MAGIC, _VERSION, DTYPES.index(dtype), layout_code, found_pattern[0] if found_pattern else group_size if int4 else 0),
        *(outputs, inputs, offsets[-1] + _TAIL, nonzeros, found_pattern[1] if found_pattern else int(int4 and symmetric)),
    )
    head = (header + struct.pack(f"<{len(offsets)}q", *offsets)).ljust(offsets[0], b"\0")
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *panels, torch.zeros(_TAIL, dtype=torch.uint8)])


def _bitmap(keep: Tensor) -> Tensor:
    """Bits of a mask, eight to a byte, least significant first."""
    bits = keep.reshape(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(1, dtype=torch.uint8)


def _panels(weight: Tensor, dtype: str, layout: str, scale: Tensor | None, pattern: tuple[int, int] | None) -> tuple[list[Tensor], int]:
    """The bytes of each panel, and the number of weights that are not zero."""
    outputs, inputs = weight.shape
    group, panels = _GROUP[dtype], -(-outputs // _PANEL)
    rows = -(-inputs // group)
    values = torch.zeros(panels * _PANEL, rows * group)
    values[:outputs, :inputs] = weight
    scales = torch.zeros(panels * _PANEL)
    if dtype == "int8":
        if scale is not None:
            scales[:outputs] = scale[:, 0]
        elif inputs:
            scales = values.abs().amax(1) / 127
        codes = (values * _inverse(scales)[:, None]).round().clamp(-127, 127).add(128).to(torch.uint8)
        keep = codes != 128
    else:
        codes = _round_bf16(values) if dtype == "bf16" else values
        keep = codes != 0
    nonzeros = int(keep.sum())
    if pattern:
        n, m = pattern
        groups = keep.view(panels * _PANEL, rows * group // m, m)
        crowded = (groups.sum(2) > n).any(1)
        torch._check(
            not bool(crowded.any()),
            lambda: (
                f"sparse_linear_pack: weight must have at most {n} nonzeros among every {m} inputs for the pattern {n}:{m}, "
                f"got more in output {int(crowded.nonzero()[0])}"
            ),
        )
        zeros = ~groups & ((~groups).cumsum(2) <= n - groups.sum(2, keepdim=True))  # those that are stored, too
        codes = torch.where(keep, codes, 128 if dtype == "int8" else 0)  # no zero has a sign
        keep = keep | zeros.view_as(keep)
    # (panel, row, element of the row)
    codes, keep = (
        t.view(panels, _PANEL, rows, group).transpose(1, 2).flatten(2).clone(memory_format=torch.contiguous_format) for t in (codes, keep)
    )
    step, result = _CHUNK // group, []
    for panel in range(panels):
        parts = []
        for first in range(0, rows, step):
            chunk, mask = codes[panel, first : first + step], keep[panel, first : first + step]
            parts += [chunk.reshape(-1).view(torch.uint8)] if layout == "dense" else [_bitmap(mask), chunk[mask].view(torch.uint8)]
        if dtype == "int8":
            parts.append(scales[panel * _PANEL :][:_PANEL].contiguous().view(torch.uint8))
        result.append(torch.cat([*parts, torch.empty(0, dtype=torch.uint8)]))
    return result, nonzeros


def _int4_grid(
    weight: Tensor, layout: str, group_size: int, symmetric: bool, scale: Tensor | None, minimum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minimums as float16 and zeros as float32, each ``(outputs, groups)``, of ``weight`` padded to whole groups."""
    if scale is None:
        # A short last group is padded by its first weight, which changes neither end.
        outputs, inputs = weight.shape
        groups = -(-inputs // group_size)
        padded = torch.empty(outputs, groups * group_size)
        padded[:, :inputs] = weight
        padded[:, inputs:] = weight[:, (groups - 1) * group_size, None] if inputs else 0
        low, high = padded.view(outputs, groups, group_size).aminmax(dim=2)
        if symmetric:
            scale, minimum = torch.where(-low >= high, low, high) / -8 + 0.0, torch.zeros_like(low)  # makes -0 a 0
        else:
            if layout == "sparse":
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale, minimum = (high - low) / 15 + 0.0, low + 0.0
    halves = scale.half()
    minimum = torch.zeros_like(scale) if minimum is None else minimum
    return halves, minimum.half(), (-minimum * _inverse(halves.float())).round().clamp(0, 15).nan_to_num(0)


def _int4_panels(
    weight: Tensor, layout: str, group_size: int, symmetric: bool, scale: Tensor | None, minimum: Tensor | None
) -> tuple[list[Tensor], int]:
    """The bytes of each panel, and the number of weights that are not zero (-1: a scale is beyond float16)."""
    outputs, inputs = weight.shape
    panels, chunks, groups = -(-outputs // _PANEL), -(-inputs // 32), -(-inputs // group_size)
    halves, minimums, zeros = _int4_grid(weight, layout, group_size, symmetric, scale, minimum)
    affine = layout == "dense" and not symmetric
    if not bool(halves.isfinite().all()) or (affine and not bool(minimums.isfinite().all())):
        return [], -1
    if affine:
        zeros = torch.zeros_like(zeros)
    elif symmetric:
        zeros = torch.full_like(zeros, 8)

    def spread(grid: Tensor) -> Tensor:  # (outputs, groups) -> (outputs, inputs)
        return grid.float().repeat_interleave(group_size, 1)[:, :inputs]

    steps = (weight - spread(minimums)) * _inverse(spread(halves)) if affine else weight * _inverse(spread(halves)) + spread(zeros)
    codes = steps.round().clamp(0, 15)
    decoded = codes * spread(halves) + spread(minimums) if affine else (codes - spread(zeros)) * spread(halves)
    empty = 8 if symmetric else 0  # of the outputs that only fill the last panel

    def fill(grid: Tensor, value: float) -> Tensor:  # to whole panels, and by panel: (panels, 16, ...)
        return torch.nn.functional.pad(grid, (0, 0, 0, panels * _PANEL - outputs), value=value).view(panels, _PANEL, grid.shape[1])

    halves, minimums, zeros = fill(halves, 0), fill(minimums, 0), fill(zeros, empty).to(torch.uint8)
    full = zeros.repeat_interleave(group_size, 2)[:, :, : chunks * 32].clone()
    full.view(panels * _PANEL, chunks * 32)[:outputs, :inputs] = codes.to(torch.uint8)
    # (panel, chunk, row, half, byte)
    keep = full != zeros.repeat_interleave(group_size, 2)[:, :, : chunks * 32]
    full, keep = (t.view(panels, _PANEL, chunks, 4, 2, 4).permute(0, 2, 3, 4, 1, 5).reshape(panels, chunks, 4, 2, 64) for t in (full, keep))
    result = []
    for panel in range(panels):
        parts = [torch.empty(0, dtype=torch.uint8)]
        for chunk in range(chunks):
            group, first = divmod(chunk * 32, group_size)
            if first == 0:
                parts.append(halves[panel, :, group].contiguous().view(torch.uint8))
                if not symmetric:
                    parts.append((minimums if affine else zeros)[panel, :, group].contiguous().view(torch.uint8))
            if layout == "sparse":
                parts.append(_bitmap(keep[panel, chunk]))
            for row in range(4):
                low, high = full[panel, chunk, row]
                if layout == "sparse":
                    low, high = low[keep[panel, chunk, row, 0]], high[keep[panel, chunk, row, 1]]
                length = max(low.numel(), high.numel())
                low, high = (torch.nn.functional.pad(codes, (0, length - codes.numel())) for codes in (low, high))
                parts.append(low | high << 4)
        result.append(torch.cat(parts))
    assert groups == halves.shape[2]
    return result, int((decoded != 0).sum())


define(
    'sparse_linear_pack(Tensor weight, *, str dtype="bf16", str layout="auto", int group_size=32, bool symmetric=False, '
    'Tensor? scale=None, Tensor? minimum=None, str pattern="unstructured") -> Tensor',
    fake=_pack_fake,
    reference=_pack_reference,
)


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
    return _dense("sparse_linear_unpack", packed, out_features, in_features).to(FLOATS[dtype])


def _intact(op: str, condition: bool, problem: str) -> None:
    torch._check(condition, lambda: f"{op}: packed must be intact, got {problem}")


class _Header(NamedTuple):
    """What the header of a packed array says, once it and the offsets are known to be right."""

    dtype: str
    layout: str
    group_size: int
    outputs: int
    inputs: int
    nonzeros: int
    symmetric: bool
    pattern: tuple[int, int] | None
    offsets: list[int]


def _read_header(op: str, packed: Tensor) -> _Header:
    _check_packed(op, packed)
    data = packed.numel()
    _intact(op, data >= _HEADER.size, "an array too short for a header")
    raw = bytes(packed[: _HEADER.size].tolist())
    magic, version, dtype_code, layout_code, group_size, outputs, inputs, total, nonzeros, symmetric = _HEADER.unpack(raw)
    _intact(op, magic == _MAGIC, "an array that does not begin with the format's magic number")
    _intact(op, version <= _VERSION, "a format version from the future: update torch_cpu_ext")
    _intact(op, version >= 1, "format version 0")
    _intact(op, dtype_code < len(DTYPES), "an unknown dtype code")
    dtype = DTYPES[dtype_code]
    int4 = dtype == "int4"
    _intact(op, layout_code < len(LAYOUTS if int4 else LAYOUT_NAMES), "an unknown layout code")
    layout = LAYOUT_NAMES[layout_code]
    pattern = (group_size, symmetric) if layout == "structured" else None
    if pattern:
        group_size = symmetric = 0
    _intact(op, group_size in GROUP_SIZES if int4 else group_size == 0, "an unknown group size")
    _intact(op, symmetric == 0 or (int4 and symmetric == 1), "an unknown kind of zero")
    _intact(op, 0 <= outputs <= 1 << 40 and 0 <= inputs <= 1 << 40, "sizes out of range")
    if pattern:
        known = structured_pattern(f"{pattern[0]}:{pattern[1]}") is not None
        _intact(op, known and inputs % pattern[1] == 0, "an unknown pattern")
    _intact(op, total == data, "an array of another length than its header says (truncated?)")
    panels = -(-outputs // _PANEL)
    first = -(-(_HEADER.size + (panels + 1) * 8) // 64) * 64
    _intact(op, first + _TAIL <= data, "an array too short for its offsets")
    offsets = list(struct.unpack(f"<{panels + 1}q", bytes(packed[_HEADER.size : _HEADER.size + (panels + 1) * 8].tolist())))
    _intact(op, offsets[0] == first and offsets[-1] == data - _TAIL, "offsets that do not span the array")
    _intact(op, all(a <= b for a, b in itertools.pairwise(offsets)), "offsets out of order")
    header = _Header(dtype, layout, group_size, outputs, inputs, nonzeros, symmetric == 1, pattern, offsets)
    if int4:
        least = -(-inputs // group_size) * _group_head(header) + -(-inputs // 32) * (256 if layout == "dense" else 64)
    else:
        rows = -(-inputs // _GROUP[dtype])
        least = rows * (64 if layout == "dense" else 2 * _GROUP[dtype]) + (_PANEL * 4 if dtype == "int8" else 0)
        if pattern:
            least += rows * _PANEL * _GROUP[dtype] // pattern[1] * pattern[0] * (4 // _GROUP[dtype])
    for begin, end in itertools.pairwise(offsets):
        _intact(op, end - begin >= least and (layout == "sparse" or end - begin == least), "a panel of the wrong length")
    return header


def _group_head(header: _Header) -> int:
    """int4: bytes before the chunks of a group."""
    return _PANEL * 2 + (0 if header.symmetric else _PANEL * 2 if header.layout == "dense" else _PANEL)


def _check_shape(op: str, outputs: int, inputs: int, out_features: int, in_features: int) -> None:
    torch._check(
        outputs == out_features and inputs == in_features,
        lambda: f"{op}: packed must hold {out_features} x {in_features} (out_features x in_features), got {outputs} x {inputs}",
    )


def _dense(op: str, packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The float32 weight that a packed one stands for."""
    header = _read_header(op, packed)
    _check_shape(op, header.outputs, header.inputs, out_features, in_features)
    if header.dtype == "int4":
        return _dense_int4(op, packed, header)
    dtype, layout, offsets, inputs = header.dtype, header.layout, header.offsets, header.inputs
    group, panels = _GROUP[dtype], len(offsets) - 1
    rows, step, elements = -(-inputs // group), _CHUNK // group, _PANEL * group
    kind = torch.uint8 if dtype == "int8" else FLOATS[dtype]
    size, tail = 4 // group, _PANEL * 4 if dtype == "int8" else 0
    codes = torch.full((panels, rows, elements), 128 if dtype == "int8" else 0, dtype=kind)
    scales: list[Tensor] = [torch.empty(0)]
    for panel in range(panels):
        at, end = offsets[panel], offsets[panel + 1] - tail
        for first in range(0, rows, step):
            chunk = codes[panel, first : first + step]
            if layout == "dense":
                chunk.copy_(packed[at : at + chunk.numel() * size].clone().view(kind).view_as(chunk))
                at += chunk.numel() * size
                continue
            mask = _mask(packed[at : at + chunk.numel() // 8]).view_as(chunk)
            if header.pattern:
                n, m = header.pattern
                counts = mask.view(-1, _PANEL, group).transpose(0, 1).reshape(_PANEL, -1, m).sum(2)
                _intact(op, bool((counts == n).all()), "a panel whose bitmap and bytes disagree")
            at += chunk.numel() // 8
            count = int(mask.sum())
            _intact(op, at + count * size <= end, "a panel whose bitmap and bytes disagree")
            chunk[mask] = packed[at : at + count * size].clone().view(kind)
            at += count * size
        _intact(op, at == end, "a panel whose bitmap and bytes disagree")
        if tail:
            scales.append(packed[end : end + tail].clone().view(torch.float32))
    dense = codes.view(panels, rows, _PANEL, group).transpose(1, 2).reshape(panels * _PANEL, rows * group).float()
    if dtype == "int8":
        dense = (dense - 128) * torch.cat(scales)[:, None]
    return dense[: header.outputs, :inputs]


def _mask(bitmap: Tensor) -> Tensor:
    """The bits of bytes, least significant first."""
    return ((bitmap[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()


def _dense_int4(op: str, packed: Tensor, header: _Header) -> Tensor:
    panels, chunks = len(header.offsets) - 1, -(-header.inputs // 32)
    problem, head = "a panel whose bitmap and bytes disagree", _group_head(header)
    sparse, affine = header.layout == "sparse", header.layout == "dense" and not header.symmetric
    dense = torch.zeros(panels, chunks, 4, 2, _PANEL, 4)
    # Padding is no weight: its code must be that of zero.
    outside = torch.ones(panels * _PANEL, chunks * 32, dtype=torch.bool)
    outside[: header.outputs, : header.inputs] = False
    outside = outside.view(panels, _PANEL, chunks, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)
    for panel in range(panels):
        at, end = header.offsets[panel], header.offsets[panel + 1]
        scale, minimum, zero = torch.zeros(_PANEL), torch.zeros(_PANEL), torch.zeros(_PANEL)
        for chunk in range(chunks):
            if chunk * 32 % header.group_size == 0:
                _intact(op, at + head <= end, problem)
                scale = packed[at : at + 32].clone().view(torch.float16).float()
                if header.symmetric:
                    zero = torch.full((_PANEL,), 8.0)
                elif sparse:
                    zero = packed[at + 32 : at + 48].float()
                    _intact(op, bool((zero <= 15).all()), problem)
                else:
                    minimum = packed[at + 32 : at + 64].clone().view(torch.float16).float()
                at += head
            masks = torch.ones(4, 2, 64, dtype=torch.bool)
            if sparse:
                _intact(op, at + 64 <= end, problem)
                masks = _mask(packed[at : at + 64]).view(4, 2, 64)
                at += 64
            for row in range(4):
                length = int(masks[row].sum(1).max())
                _intact(op, at + length <= end, problem)
                stored = packed[at : at + length]
                at += length
                for half in range(2):
                    codes = zero.repeat_interleave(4)
                    count = int(masks[row, half].sum())
                    halves = stored >> 4 * half & 15
                    _intact(op, bool((halves[count:] == 0).all()), problem)
                    codes[masks[row, half]] = halves[:count].float()
                    codes = codes.view(_PANEL, 4)
                    _intact(op, bool((codes == zero[:, None])[outside[panel, chunk, row, half]].all()), problem)
                    steps = codes * scale[:, None] + minimum[:, None] if affine else (codes - zero[:, None]) * scale[:, None]
                    dense[panel, chunk, row, half] = steps
        _intact(op, at == end, problem)
    return dense.permute(0, 4, 1, 2, 3, 5).reshape(panels * _PANEL, chunks * 32)[: header.outputs, : header.inputs]


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
        int64 ``(8,)``: format version, index into `DTYPES`, index into `LAYOUT_NAMES`, out_features, in_features, number of nonzero
        weights; for int4 the group size and whether it is symmetric, for the structured layout n and m of its pattern, else zeros.
    Raises:
        RuntimeError: ``packed`` is damaged or from a newer version; the message says what is wrong.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_check(packed)


def _check_fake(packed: Tensor) -> Tensor:
    _check_packed("sparse_linear_check", packed)
    return packed.new_empty(8, dtype=torch.int64)


def _check_reference(packed: Tensor) -> Tensor:
    op = "sparse_linear_check"
    header = _read_header(op, packed)
    nonzeros = int((_dense(op, packed, header.outputs, header.inputs) != 0).sum())
    _intact(op, nonzeros == header.nonzeros, "a panel whose bitmap and bytes disagree")
    layout, last = LAYOUT_NAMES.index(header.layout), header.pattern or (header.group_size, header.symmetric)
    facts = [_VERSION, DTYPES.index(header.dtype), layout, header.outputs, header.inputs, nonzeros, *last]
    return torch.tensor([int(fact) for fact in facts])


define("sparse_linear_check(Tensor packed) -> Tensor", fake=_check_fake, reference=_check_reference)


# ---------------------------------------------------------------------------------------------------------------------------------- linear


def linear(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32, stream_rows: int = 0
) -> Tensor:
    """``input @ weight.T + bias`` with a packed weight, summed in float32.

    With bf16 weights the input is rounded to bf16 first. With int8 and int4 weights it is quantised to int8, with one scale
    (``max(abs) / 127``) for every ``activation_group`` inputs of each row; a row with NaN or infinities gives NaN.
    The result does not depend on the number of threads.

    Args:
        input: ``(..., in_features)``, float32, bfloat16 or float16, any strides.
        packed: the weight, as `pack` made it.
        bias: ``(out_features,)``, float32, bfloat16 or float16, or None.
        out_features: rows of the weight.
        activation_group: 32 or 64 for int8 weights, 32 for int4 weights; the others do not use it. A single scale a row, as
            SparAMX has it, costs about one point of perplexity on a 135M-parameter model.
        stream_rows: rows of input up to which the kernel for few rows runs; it may change the last bits of the result. 0: a built-in
            number; `torch_cpu_ext.tune` finds better ones.
    Returns:
        ``(..., out_features)``, dtype of ``input``.
    Raises:
        RuntimeError: a dtype or shape does not fit, or ``packed`` is damaged or from a newer version.
    """
    return torch.ops.torch_cpu_ext.sparse_linear(
        input, packed, bias, out_features, activation_group=activation_group, stream_rows=stream_rows
    )


def _check_linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation_group: int, stream_rows: int) -> None:
    op = "sparse_linear"
    check_float(op, "input", input)
    torch._check(input.dim() >= 1, lambda: f"{op}: input must have at least one dimension, got a scalar")
    torch._check(activation_group in (32, 64), lambda: f"{op}: activation_group must be 32 or 64, got {activation_group}")
    torch._check(stream_rows >= 0, lambda: f"{op}: stream_rows must be 0 or more, got {stream_rows}")
    _check_packed(op, packed)
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == out_features,
            lambda: f"{op}: bias must be 1-D with {out_features} elements, got {bias.dim()}-D with {bias.numel()}",
        )
        check_float(op, "bias", bias)


def _linear_fake(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32, stream_rows: int = 0
) -> Tensor:
    _check_linear(input, packed, bias, out_features, activation_group, stream_rows)
    return input.new_empty((*input.shape[:-1], out_features))


def _linear_reference(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, activation_group: int = 32, stream_rows: int = 0
) -> Tensor:
    _check_linear(input, packed, bias, out_features, activation_group, stream_rows)
    weight = _dense("sparse_linear", packed, out_features, input.shape[-1])
    dtype = DTYPES[int(packed[12])]
    torch._check(
        dtype != "int4" or activation_group == 32,
        lambda: f"sparse_linear: activation_group must be 32 for int4 weights, got {activation_group}",
    )
    x = input.float()
    if dtype in ("int8", "int4"):
        x = _quantize_dequantize(x, activation_group)
    elif dtype == "bf16":
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
    "sparse_linear(Tensor input, Tensor packed, Tensor? bias, int out_features, *, int activation_group=32, int stream_rows=0) -> Tensor",
    fake=_linear_fake,
    reference=_linear_reference,
    setup=_linear_setup,
    backward=_linear_backward,
)
