"""Every op once: arguments, what must come out and how exactly, what trains, what must fail.

The generic tests in core/test_ops.py drive each case through every instruction set, thread count, tracer and kind of argument.
"""

import functools
import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cases_kv_pages
import cases_kv_prefill
import cases_kv_select
from case import Args, Bad, Case, Sample, replaced

# ------------------------------------------------------------------------------------------------------------------------- sparse_linear
# An independent model of the documented arithmetic, in numpy: codes and scales in float32, element by element as the header file and the
# docstrings say, sums in float64.

DTYPES, LAYOUTS = ("fp32", "bf16", "int8", "int4"), ("dense", "sparse")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GROUP = {"fp32": 1, "bf16": 2, "int8": 4}
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half the distance from 1 to the next number
_TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


def numpy32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 (nearest even), as float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return np.where(np.isnan(x), x, rounded.view(np.float32)).astype(np.float32)


def inverted(scale: np.ndarray) -> np.ndarray:
    """What values are multiplied by; 0 for zeros of either sign and for scales so small that it would be infinite."""
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, 0).astype(np.float32)


def quantize(x: np.ndarray, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes in [-127, 127] and the scale of each row, as it is given or found."""
    if scale is None:
        scale = (np.abs(x).max(-1, initial=0) / np.float32(127)).astype(np.float32)
    inverse = inverted(scale)
    with np.errstate(all="ignore"):
        codes = np.clip(np.rint(x * inverse[..., None]), -127, 127)
    return codes.astype(np.float32), scale


@dataclass(frozen=True)
class Int4:
    """An int4 weight: codes, and the grids of its groups, all spread to the shape of the weight."""

    codes: np.ndarray
    scale: np.ndarray  # values of float16, as float32
    minimum: np.ndarray  # the value of code 0; float16 where the weight has one
    zero: np.ndarray  # the code of padding
    affine: bool  # whether the minimums are stored; else zero is a code

    @property
    def values(self) -> np.ndarray:
        return self.scale * self.codes + self.minimum if self.affine else self.scale * (self.codes - self.zero)


def int4(
    weight: Tensor, layout: str, group_size: int = 32, symmetric: bool = False, scale: Tensor | None = None, minimum: Tensor | None = None
) -> Int4:
    """The arithmetic of int4, group by group."""
    w, f16 = numpy32(weight), np.float16
    codes, scales, minimums, zeros = (np.zeros(w.shape, np.float32) for _ in range(4))
    affine = layout == "dense" and not symmetric
    for group in range(-(-w.shape[1] // group_size)):
        at = slice(None), slice(group * group_size, (group + 1) * group_size)
        low, high = (ends[:, None] + np.float32(0) for ends in (w[at].min(1), w[at].max(1)))
        least = np.zeros_like(low)
        if scale is not None:
            step = numpy32(scale)[:, group, None]
            least = least if minimum is None else numpy32(minimum)[:, group, None]
        elif symmetric:
            step = np.where(-low >= high, low, high) / np.float32(-8) + np.float32(0)
        else:
            if layout == "sparse":
                low, high = np.minimum(low, 0), np.maximum(high, 0)
            step, least = (high - low) / np.float32(15), low
        step = step.astype(f16).astype(np.float32)
        inverse = inverted(step)
        zero = np.full_like(step, 8 * symmetric) if symmetric or affine else np.clip(np.rint(-least * inverse), 0, 15)
        if affine:
            least = least.astype(f16).astype(np.float32)
            codes[at] = np.clip(np.rint((w[at] - least) * inverse), 0, 15)
        else:
            least = -step * zero
            codes[at] = np.clip(np.rint(w[at] * inverse + zero), 0, 15)
        scales[at], minimums[at], zeros[at] = step, least, zero
    return Int4(codes, scales, minimums, zeros, affine)


def stored(weight: Tensor, dtype: str, layout: str = "dense", **grid: Any) -> np.ndarray:
    """The float32 weight that a packed one stands for; layout and grid (arguments of `pack`) make a difference to int4 only."""
    w = numpy32(weight)
    if dtype == "int4":
        return int4(weight, layout, **grid).values
    if dtype == "fp32":
        return w
    if dtype == "bf16":
        return round_bf16(w)
    codes, scale = quantize(w, given(grid))
    return codes * scale[:, None]


def given(grid: Args) -> np.ndarray | None:
    """The scales of int8 rows, if there are any."""
    return None if grid.get("scale") is None else numpy32(grid["scale"])[:, 0]


def product(
    x: Tensor, weight: Tensor, dtype: str, bias: Tensor | None, group: int, layout: str = "dense", **grid: Any
) -> tuple[Tensor, Tensor]:
    """The product that `sparse_linear` computes, in float64, and a bound on the rounding errors of any order of float32 sums."""
    w = stored(weight, dtype, layout, **grid).astype(np.float64)
    v = numpy32(x).reshape(-1, x.shape[-1]) if x.shape[-1] else np.zeros((x.shape[:-1].numel(), 0), np.float32)
    inputs = v.shape[1]
    if dtype == "bf16":
        v = round_bf16(v)
    if dtype in ("int8", "int4"):
        padded = np.pad(v, ((0, 0), (0, -inputs % group))).reshape(len(v), -(-inputs // group), group)
        codes, scale = quantize(padded)
        v = (codes.astype(np.float64) * scale[..., None].astype(np.float64)).reshape(len(v), -(-inputs // group) * group)[:, :inputs]
    v = v.astype(np.float64)
    b = np.zeros(len(w)) if bias is None else numpy32(bias).astype(np.float64)
    magnitude = np.abs(w)
    if dtype == "int4":  # codes and minimums are multiplied on their own, so one can be much larger than what remains of both
        grids = int4(weight, layout, **grid)
        magnitude = (np.abs(grids.scale * grids.codes) + np.abs(grids.minimum)).astype(np.float64)
    exact, size = v @ w.T + b, np.abs(v) @ magnitude.T + np.abs(b)
    # Rounded additions and products; integer sums are exact. int4 has two sums, of codes and of minimums, in one.
    terms = {"int8": -(-inputs // group), "int4": 2 * -(-inputs // group)}.get(dtype, inputs) + 4
    bound = 1.01 * terms * 2.0**-24 * size + (inputs + 1) * 2.0**-126
    bound += _UNIT[x.dtype] * (np.abs(exact) + bound) + _TINY[x.dtype]
    shape = (*x.shape[:-1], len(w))
    return torch.from_numpy(exact).reshape(shape), torch.from_numpy(bound).reshape(shape)


def _assemble(
    streams: list[bytes], dtype: str, layout: str, shape: Any, nonzeros: int, group_size: int = 0, symmetric: int = False
) -> bytes:
    """A packed array of its panels."""
    first = -(-(64 + 8 * (len(streams) + 1)) // 64) * 64
    offsets = [first, *itertools.accumulate((len(s) for s in streams), initial=first)][1:]
    layouts = (*LAYOUTS, "structured")
    fields = 1, DTYPES.index(dtype), layouts.index(layout), group_size, *shape, offsets[-1] + 64, nonzeros, symmetric
    header = b"\x01TCESPL\0" + struct.pack("<IIIIqqqqq", *fields)
    return (header + np.array(offsets, "<i8").tobytes()).ljust(first, b"\0") + b"".join(streams) + bytes(64)


def pack_int4_by_hand(weight: Tensor, layout: str, group_size: int = 32, symmetric: bool = False, **given: Any) -> bytes:
    """As `pack_by_hand`, element by element."""
    grids = int4(weight, layout, group_size, symmetric, **given)
    outputs, inputs = weight.shape
    chunks = -(-inputs // 32)
    streams = []
    for panel in range(-(-outputs // 16)):
        stream = b""
        lines = range(panel * 16, panel * 16 + 16)
        for chunk in range(chunks):
            k0 = chunk * 32
            # what padding is: of an output that is there, or of one that is not
            zeros = [(int(grids.zero[n, k0]) if n < outputs else 8 * symmetric) if layout == "sparse" or symmetric else 0 for n in lines]
            if k0 % group_size == 0:
                for name in ("scale",) if symmetric or layout == "sparse" else ("scale", "minimum"):
                    grid = getattr(grids, name)
                    stream += np.array([grid[n, k0] if n < outputs else 0 for n in lines], np.float16).tobytes()
                if layout == "sparse" and not symmetric:
                    stream += bytes(zeros)
            words, tails = b"", b""
            for row in range(4):
                halves: list[list[int]] = [[], []]
                for half in range(2):
                    word = 0
                    for byte in range(64):
                        n, k = lines[byte // 4], k0 + 8 * row + 4 * half + byte % 4
                        zero = zeros[byte // 4]
                        code = int(grids.codes[n, k]) if n < outputs and k < inputs else zero
                        if layout == "dense" or code != zero:
                            halves[half].append(code)
                            word |= 1 << byte
                    words += word.to_bytes(8, "little")
                tails += bytes(low | high << 4 for low, high in itertools.zip_longest(*halves, fillvalue=0))
            stream += words * (layout == "sparse") + tails
        streams.append(stream)
    return _assemble(streams, "int4", layout, weight.shape, int(np.count_nonzero(grids.values)), group_size, symmetric)


def pack_by_hand(weight: Tensor, dtype: str, layout: str, pattern: str = "unstructured", **grid: Any) -> bytes:
    """The packed format, written as the drawing in kernels/sparse_linear/sparse_linear.h reads."""
    if dtype == "int4":
        return pack_int4_by_hand(weight, layout, **grid)
    w, group = numpy32(weight), _GROUP[dtype]
    outputs, inputs = w.shape
    scale = np.zeros(outputs, np.float32)
    if dtype == "int8":
        codes, scale = quantize(w, given(grid))
        elements, zero, kind = codes + 128, 128, np.uint8
    elif dtype == "bf16":
        elements, zero, kind = np.ascontiguousarray(round_bf16(w)).view(np.uint32) >> 16, 0, np.uint16
    else:
        elements, zero, kind = np.ascontiguousarray(w).view(np.uint32), 0, np.uint32
    panels, rows = -(-outputs // 16), -(-inputs // group)
    full = np.full((panels * 16, rows * group), zero, kind)
    full[:outputs, :inputs] = elements
    nonzero = full != zero if dtype == "int8" else (full & (0x7FFF if dtype == "bf16" else 0x7FFFFFFF)) != 0
    scales = np.zeros(panels * 16, np.float32)
    scales[:outputs] = scale
    numbers, count = (0, 0), int(nonzero.sum())
    if pattern != "unstructured":
        layout, numbers = "structured", tuple(map(int, pattern.split(":")))
        full[~nonzero] = zero  # no sign
        for row, first in itertools.product(range(panels * 16), range(0, rows * group, numbers[1])):
            part = nonzero[row, first : first + numbers[1]]  # a view
            part[np.flatnonzero(~part)[: numbers[0] - np.count_nonzero(part)]] = True
    streams = []
    for panel in range(panels):
        stream, lines = b"", slice(panel * 16, panel * 16 + 16)
        for k in range(0, rows * group, 64):
            # number (n % 16) * group + k % group of row k // group
            def in_order(a: np.ndarray, k: int = k, lines: slice = lines) -> np.ndarray:
                return a[lines, k : k + 64].reshape(16, -1, group).transpose(1, 0, 2).reshape(-1)

            chunk, bits = in_order(full), in_order(nonzero)
            stream += chunk.tobytes() if layout == "dense" else np.packbits(bits, bitorder="little").tobytes() + chunk[bits].tobytes()
        streams.append(stream + (scales[lines].tobytes() if dtype == "int8" else b""))
    return _assemble(streams, dtype, layout, w.shape, count, *numbers)


SIZES = (0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 191, 255, 257)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 20)
SPARSITIES = (0.0, 0.5, 0.9, 1.0, "one")


GRIDS = [
    {"group_size": size, "symmetric": symmetric} for size, symmetric in zip((32, 32, 64, 128, 128, 64), (False, True) * 3, strict=True)
]
_grids = itertools.cycle(GRIDS)  # of int4 samples that name none


def random_weight(outputs: int, inputs: int, sparsity: float | str, generator: torch.Generator) -> Tensor:
    """Normal weights, of which the share ``sparsity`` is zero; ``"one"``: all but one are."""
    weight = torch.randn(outputs, inputs, generator=generator)
    if sparsity == "one":
        keep = torch.zeros(outputs, inputs, dtype=torch.bool)
        if weight.numel():
            keep.view(-1)[int(torch.randint(weight.numel(), (), generator=generator))] = True
    else:
        keep = torch.rand(outputs, inputs, generator=generator) >= sparsity
    return torch.where(keep, weight, torch.zeros(()))


PATTERNS = ("2:4", "4:8", "1:4", "1:2", "3:4", "1:8", "7:16", "9:32", "33:64")


def patterned_weight(outputs: int, inputs: int, pattern: str, generator: torch.Generator, sparsity: float = 0.1) -> Tensor:
    """Normal weights of which at most n of m are not zero, and some groups of m have fewer; ``inputs`` is rounded up to a multiple of m."""
    n, m = map(int, pattern.split(":"))
    weight = random_weight(outputs, -(-inputs // m) * m, sparsity, generator)
    order = torch.rand(weight.numel() // m, m, generator=generator).argsort(1)
    return torch.where((order < n).view_as(weight), weight, torch.zeros(()))


def linear_sample(
    shape: tuple[int, ...], weight: Tensor, dtype: str, layout: str, kind: torch.dtype, bias: torch.dtype | None, group: int, **grid: Any
) -> Sample:
    if dtype == "int4":
        group, grid = 32, grid or next(_grids)
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(hash((shape, outputs, inputs, group)) & 0xFFFF)
    x = torch.randn(*shape, inputs, generator=generator).to(kind)
    b = None if bias is None else torch.randn(outputs, generator=generator).to(bias)
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout, **grid)
    args = {"input": x, "packed": packed, "bias": b, "out_features": outputs, "activation_group": group, "stream_rows": 0}
    name = f"{dtype} {layout} {grid or ''} {shape} x {outputs} x {inputs} {kind} bias={bias} group={group}"
    return Sample(name, args, functools.cache(lambda: product(x, weight, dtype, b, group, layout, **grid)))


@functools.cache
def _linear_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    batches, sparsities = itertools.cycle(BATCHES), itertools.cycle(SPARSITIES)
    biases, groups = itertools.cycle((None, torch.float32, torch.bfloat16, torch.float16)), itertools.cycle((32, 64, 32))
    samples = []
    for dtype, layout, outputs, inputs in itertools.product(DTYPES, LAYOUTS, SIZES, SIZES):
        sparsity = next(sparsities)
        weight = random_weight(outputs, inputs, sparsity, generator)
        for kind in FLOATS.values():
            samples.append(linear_sample((next(batches),), weight, dtype, layout, kind, next(biases), next(groups)))
    for dtype, layout, kind in itertools.product(DTYPES, LAYOUTS, FLOATS.values()):
        weight = random_weight(49, 300, 0.5, generator)
        for shape in [(), (0,), (1,), (2, 3), (3, 0, 2), (2, 1, 2, 2)]:  # 1-D, empty, 3-D and more
            samples.append(linear_sample(shape, weight, dtype, layout, kind, torch.float32, 32))
        samples.append(linear_sample((515,), weight[:33, :65], dtype, layout, kind, None, 64))  # past one tile of 512 rows
        samples.append(linear_sample((1030,), weight[:17, :70], dtype, layout, kind, None, 32))
        few = [linear_sample((m,), weight, dtype, layout, kind, None, 64) for m in range(1, 21)]
        samples += few
        for sample, rows in zip(few, itertools.cycle((1, 3, 6, 16)), strict=False):
            args = sample.args | {"stream_rows": rows}
            samples.append(Sample(f"{sample.name} stream_rows={rows}", args, sample.expected))
    patterns, kinds = itertools.cycle(PATTERNS), itertools.cycle(FLOATS.values())
    for dtype, outputs, inputs in itertools.product(("fp32", "bf16", "int8"), (0, 1, 15, 16, 17, 33), (0, 1, 33, 64, 65, 127, 257, 600)):
        pattern = next(patterns)
        weight = patterned_weight(outputs, inputs, pattern, generator, 0.9 if outputs == 16 else 0.1)
        for m in (1, next(batches)):
            samples.append(linear_sample((m,), weight, dtype, "auto", next(kinds), next(biases), next(groups), pattern=pattern))
    for dtype in ("fp32", "bf16", "int8"):
        weight = patterned_weight(49, 300, "2:4", generator)
        samples += [linear_sample((m,), weight, dtype, "auto", next(kinds), None, 64, pattern="2:4") for m in (*range(1, 21), 515)]
    return samples


@functools.cache
def _few_linear() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    return [
        linear_sample(shape, random_weight(33, 67, 0.6, generator), dtype, layout, kind, bias, 32)
        for shape, dtype, layout, kind, bias in [
            ((3,), "fp32", "sparse", torch.float32, torch.float32),
            ((5,), "bf16", "dense", torch.bfloat16, None),
            ((2, 4), "int8", "sparse", torch.float32, torch.float32),
            ((), "bf16", "sparse", torch.float16, torch.float16),
            ((2, 3), "int4", "dense", torch.bfloat16, torch.float32),
            ((6,), "int4", "sparse", torch.float32, None),
        ]
    ] + [linear_sample((3,), patterned_weight(33, 68, "2:4", generator), "bf16", "auto", torch.float32, None, 32, pattern="2:4")]


def _dense_linear(args: Args) -> Tensor:
    """Straight through the rounding of the input, as the op's gradient is defined."""
    weight = torch.ops.torch_cpu_ext.sparse_linear_unpack(args["packed"], args["out_features"], args["input"].shape[-1])
    return torch.nn.functional.linear(args["input"].double(), weight.double(), None if args["bias"] is None else args["bias"].double())


def patched(format: str, offset: int, value: int) -> Callable[[Tensor], Tensor]:
    """Overwrites a number in a packed array."""

    def patch(packed: Tensor) -> Tensor:
        data = bytearray(packed.numpy().tobytes())
        struct.pack_into(format, data, offset, value)
        return torch.frombuffer(data, dtype=torch.uint8)

    return patch


TYPE_NAMES = {  # as PyTorch's C++ side prints them
    torch.float64: "Double",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn",
}


def _wrong_types(op: str, argument: str) -> list[Bad]:
    return [
        Bad(f"{op}: {argument} must be float32, bfloat16 or float16, got {name}", replaced(**{argument: lambda t, kind=kind: t.to(kind)}))
        for kind, name in TYPE_NAMES.items()
    ]


def _wrong_packed(op: str) -> list[Bad]:
    not_an_array = f"{op}: packed must be a contiguous 1-D uint8"
    damaged = f"{op}: packed must be intact, got "
    return [
        Bad(f"{not_an_array} CPU tensor, as sparse_linear_pack makes it, got 2-D Byte", replaced(packed=lambda p: p.view(1, -1))),
        Bad(f"{not_an_array} CPU tensor, as sparse_linear_pack makes it, got 1-D Float", replaced(packed=lambda p: p.float())),
        Bad(f"{not_an_array} CPU tensor, as sparse_linear_pack makes it, got 1-D Char", replaced(packed=lambda p: p.view(torch.int8))),
        Bad(not_an_array, replaced(packed=lambda p: p[::2])),
        Bad(damaged + "an array too short for a header", replaced(packed=lambda p: p[:0]), traced=False),
        Bad(damaged + "an array too short for a header", replaced(packed=lambda p: p[:63]), traced=False),
        Bad(damaged + "an array of another length than its header says (truncated?)", replaced(packed=lambda p: p[:-1]), traced=False),
        Bad(damaged + "an array that does not begin with the format's magic", replaced(packed=patched("<Q", 0, 7)), traced=False),
        Bad(damaged + "a format version from the future: update torch_cpu_ext", replaced(packed=patched("<I", 8, 2)), traced=False),
        Bad(damaged + "format version 0", replaced(packed=patched("<I", 8, 0)), traced=False),
        Bad(damaged + "an unknown dtype code", replaced(packed=patched("<I", 12, 4)), traced=False),
        Bad(damaged + "an unknown group size", replaced(packed=patched("<I", 12, 3)), traced=False),  # int4 in groups of 0
        Bad(damaged + "an unknown group size", replaced(packed=patched("<I", 20, 32)), traced=False),
        Bad(damaged + "an unknown kind of zero", replaced(packed=patched("<q", 56, 1)), traced=False),
        Bad(damaged + "an unknown layout code", replaced(packed=patched("<I", 16, 3)), traced=False),
        Bad(damaged + "an unknown pattern", replaced(packed=patched("<I", 16, 2)), traced=False),  # 0:0
        Bad(damaged + "sizes out of range", replaced(packed=patched("<q", 24, -1)), traced=False),
        Bad(damaged + "sizes out of range", replaced(packed=patched("<q", 32, 1 << 62)), traced=False),
        Bad(damaged + "an array too short for its offsets", replaced(packed=patched("<q", 24, 1 << 40)), traced=False),
        Bad(damaged + "offsets that do not span the array", replaced(packed=patched("<q", 64, 0)), traced=False),
        Bad(damaged + "offsets out of order", replaced(packed=patched("<q", 72, 1 << 62)), traced=False),
        Bad(damaged + "offsets out of order", replaced(packed=patched("<q", 72, -(1 << 62))), traced=False),
    ]


_LINEAR = Case(
    op="sparse_linear",
    samples=_linear_samples,
    few=_few_linear,
    trains=("input", "bias"),
    dense=_dense_linear,
    strided=("input", "bias"),
    batched="input",
    bad=[
        *_wrong_types("sparse_linear", "input"),
        *_wrong_types("sparse_linear", "bias"),
        *_wrong_packed("sparse_linear"),
        Bad("sparse_linear: input must have at least one dimension, got a scalar", replaced(input=torch.tensor(1.0))),
        Bad("sparse_linear: activation_group must be 32 or 64, got 16", replaced(activation_group=16)),
        Bad("sparse_linear: stream_rows must be 0 or more, got -1", replaced(stream_rows=-1)),
        Bad("sparse_linear: activation_group must be 32 or 64, got 0", replaced(activation_group=0)),
        Bad("sparse_linear: activation_group must be 32 or 64, got -32", replaced(activation_group=-32)),
        Bad(
            "sparse_linear: activation_group must be 32 for int4 weights, got 64",
            lambda args: (
                args | {"packed": torch.ops.torch_cpu_ext.sparse_linear_pack(torch.ones(33, 67), dtype="int4"), "activation_group": 64}
            ),
            traced=False,
        ),
        Bad("sparse_linear: bias must be 1-D with 33 elements, got 1-D with 32", replaced(bias=lambda b: b[:-1])),
        Bad("sparse_linear: bias must be 1-D with 33 elements, got 2-D with 33", replaced(bias=lambda b: b[None])),
        Bad("sparse_linear: bias must be 1-D with 33 elements, got 0-D with 1", replaced(bias=lambda b: b[0])),
        Bad(
            "sparse_linear: packed must hold 33 x 66 (out_features x in_features), got 33 x 67",
            replaced(input=lambda x: x[..., :-1]),
            traced=False,
        ),
        Bad(
            "sparse_linear: packed must hold 32 x 67 (out_features x in_features), got 33 x 67",
            replaced(out_features=32, bias=None),
            traced=False,
        ),
        Bad(
            "sparse_linear: packed must hold -1 x 67 (out_features x in_features), got 33 x 67", replaced(out_features=-1, bias=None), False
        ),
    ],
)


def _gated_product(
    x: Tensor, weights: list[Tensor], kinds: tuple[str, str], bias: list[Tensor | None], layout: str, activation: str, group: int
) -> tuple[Tensor, Tensor]:
    """float64 and a bound, from those of the two products; their sums stay in float32."""
    (g, of_g), (u, of_u) = (product(x.float(), w, d, b, group, layout) for w, d, b in zip(weights, kinds, bias, strict=True))
    if activation == "silu":
        gates = torch.nn.functional.silu(g)
    else:
        gates = torch.nn.functional.gelu(g, approximate="tanh")
    exact = gates * u
    bound = 1.13 * of_g * (u.abs() + of_u) + gates.abs() * of_u  # neither slope is above 1.13
    bound += 4e-6 * (gates.abs() + 1e-3) * u.abs() + 1e-30  # of the exponential
    return exact, bound + _UNIT[x.dtype] * (exact.abs() + bound) + _TINY[x.dtype]


def gated_sample(
    shape: tuple[int, ...], outputs: int, inputs: int, kinds: tuple[str, str], layout: str, kind: torch.dtype, bias: bool, activation: str
) -> Sample:
    generator = torch.Generator().manual_seed(hash((shape, outputs, inputs)) & 0xFFFF)
    group = 32 if "int4" in kinds else 64
    weights = [random_weight(outputs, inputs, 0.5, generator) / 4 for _ in range(2)]
    x = torch.randn(*shape, inputs, generator=generator).to(kind)
    biases = [torch.randn(outputs, generator=generator).to(one) if bias else None for one in (torch.float32, torch.bfloat16)]
    packed = [torch.ops.torch_cpu_ext.sparse_linear_pack(w, dtype=d, layout=layout) for w, d in zip(weights, kinds, strict=True)]
    args = {"input": x, "gate": packed[0], "up": packed[1], "gate_bias": biases[0], "up_bias": biases[1], "out_features": outputs}
    args |= {"activation": activation, "activation_group": group, "stream_rows": 0}
    return Sample(
        f"{kinds} {layout} {shape} x {outputs} x {inputs} {kind} bias={bias} {activation}",
        args,
        functools.cache(lambda: _gated_product(x, weights, kinds, biases, layout, activation, group)),
    )


_KINDS = [(dtype, dtype) for dtype in DTYPES] + [("int8", "bf16"), ("int4", "fp32")]


@functools.cache
def _gated_samples() -> list[Sample]:
    shapes, activations = itertools.cycle([(1,), (2, 3), (), (4,), (9,), (17,), (0,), (3, 1)]), itertools.cycle(("silu", "gelu_tanh"))
    samples = [
        gated_sample(next(shapes), outputs, inputs, kinds, layout, kind, bool(outputs % 2), next(activations))
        for outputs, inputs in itertools.product((0, 1, 16, 33, 100), (0, 1, 64, 65, 130))
        for kinds, layout, kind in zip(_KINDS, itertools.cycle(LAYOUTS), itertools.cycle(FLOATS.values()))
    ]
    wide = [
        gated_sample((1030,), 17, 70, kinds, "sparse", kind, True, "silu") for kinds, kind in itertools.product(_KINDS, FLOATS.values())
    ]
    return samples + wide


@functools.cache
def _few_gated() -> list[Sample]:
    return [
        gated_sample((3,), 33, 67, ("fp32", "fp32"), "sparse", torch.float32, True, "silu"),
        gated_sample((2, 4), 33, 67, ("int8", "int8"), "dense", torch.bfloat16, True, "gelu_tanh"),
        gated_sample((5,), 33, 67, ("int4", "bf16"), "sparse", torch.float16, False, "silu"),
    ]


def _rounded_input(x: Tensor, packed: Tensor, group: int) -> Tensor:
    """The input as a weight's kernel reads it, straight through for gradients; float64."""
    values, dtype = numpy32(x), DTYPES[int(packed[12])]
    if dtype == "bf16":
        values = round_bf16(values)
    elif dtype in ("int8", "int4"):
        flat = values.reshape(-1, values.shape[-1])
        padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % group))).reshape(len(flat), -1, group)
        codes, scale = quantize(padded)
        values = (codes * scale[..., None]).reshape(len(flat), -1)[:, : flat.shape[1]].reshape(values.shape)
    return x.double() + (torch.from_numpy(np.ascontiguousarray(values)).double() - x.detach().double())


def _dense_gated(args: Args) -> Tensor:
    def part(name: str) -> Tensor:
        packed, bias, x = args[name], args[f"{name}_bias"], args["input"]
        weight = torch.ops.torch_cpu_ext.sparse_linear_unpack(packed, args["out_features"], x.shape[-1]).double()
        return torch.nn.functional.linear(
            _rounded_input(x, packed, args["activation_group"]), weight, None if bias is None else bias.double()
        )

    gate = part("gate")
    gate = torch.nn.functional.silu(gate) if args["activation"] == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    return gate * part("up")


def _instead(argument: str, bads: list[Bad]) -> list[Bad]:
    """Cases of ``packed`` as those of another argument."""

    def spoil(bad: Bad) -> Callable[[Args], Args]:
        return lambda args: args | {argument: bad.spoil({"packed": args[argument]})["packed"]}

    return [Bad(bad.message.replace(": packed must", f": {argument} must"), spoil(bad), bad.traced) for bad in bads]


_GATED = Case(
    op="sparse_linear_gated",
    samples=_gated_samples,
    few=_few_gated,
    trains=("input", "gate_bias", "up_bias"),
    dense=_dense_gated,
    strided=("input", "gate_bias", "up_bias"),
    batched="input",
    bad=[
        *_wrong_types("sparse_linear_gated", "input"),
        *_wrong_types("sparse_linear_gated", "gate_bias"),
        *_wrong_types("sparse_linear_gated", "up_bias"),
        *_instead("gate", _wrong_packed("sparse_linear_gated")),
        *_instead("up", _wrong_packed("sparse_linear_gated")),
        Bad("sparse_linear_gated: activation must be silu or gelu_tanh, got relu", replaced(activation="relu")),
        Bad("sparse_linear_gated: input must have at least one dimension, got a scalar", replaced(input=torch.tensor(1.0))),
        Bad("sparse_linear_gated: activation_group must be 32 or 64, got 16", replaced(activation_group=16)),
        Bad("sparse_linear_gated: stream_rows must be 0 or more, got -1", replaced(stream_rows=-1)),
        Bad("sparse_linear_gated: gate_bias must be 1-D with 33 elements, got 1-D with 32", replaced(gate_bias=lambda b: b[:-1])),
        Bad("sparse_linear_gated: up_bias must be 1-D with 33 elements, got 2-D with 33", replaced(up_bias=lambda b: b[None])),
        Bad(
            "sparse_linear_gated: up must hold 33 x 67 (out_features x in_features), got 32 x 67",
            replaced(up=torch.ops.torch_cpu_ext.sparse_linear_pack(torch.ones(32, 67))),
            traced=False,
        ),
        Bad(
            "sparse_linear_gated: activation_group must be 32 for int4 weights, got 64",
            replaced(up=lambda _: torch.ops.torch_cpu_ext.sparse_linear_pack(torch.ones(33, 67), dtype="int4"), activation_group=64),
            traced=False,
        ),
    ],
)


def group_sample(shape: tuple[int, ...], parts: list[tuple[int, str]], inputs: int, layout: str, kind: torch.dtype, bias: bool) -> Sample:
    generator = torch.Generator().manual_seed(hash((shape, len(parts), inputs)) & 0xFFFF)
    x = torch.randn(*shape, inputs, generator=generator).to(kind)
    weights = [random_weight(outputs, inputs, 0.5, generator) for outputs, _ in parts]
    biases = [torch.randn(outputs, generator=generator).bfloat16() for outputs, _ in parts] if bias else []
    args = {
        "input": x,
        "packed": [torch.ops.torch_cpu_ext.sparse_linear_pack(w, dtype=d, layout=layout) for w, (_, d) in zip(weights, parts, strict=True)],
        "bias": biases,
        "out_features": [outputs for outputs, _ in parts],
        "activation_group": 32,
        "stream_rows": 0,
    }

    def expected() -> tuple[Tensor, Tensor]:
        every = [product(x, w, d, b, 32, layout) for w, (_, d), b in zip(weights, parts, biases or [None] * len(parts), strict=True)]
        return torch.cat([exact.flatten() for exact, _ in every]), torch.cat([bound.flatten() for _, bound in every])

    return Sample(f"{parts} {layout} {shape} x {inputs} {kind} bias={bias}", args, functools.cache(expected))


_TRIPLES = [[(48, d), (16, d), (17, d)] for d in DTYPES] + [
    [(33, "int8"), (33, "bf16"), (1, "int4")],
    [(5, "int8")],
    [(0, "bf16"), (20, "bf16")],
]


@functools.cache
def _group_samples() -> list[Sample]:
    shapes = itertools.cycle([(1,), (2, 3), (), (4,), (9,), (17,), (0,), (600,)])
    return [
        group_sample(next(shapes), parts, inputs, layout, kind, bool(inputs % 2))
        for parts, inputs, layout, kind in itertools.product(_TRIPLES, (1, 64, 130), LAYOUTS, FLOATS.values())
    ]


@functools.cache
def _few_group() -> list[Sample]:
    return [
        group_sample((3,), [(33, "int8"), (17, "int8")], 67, "sparse", torch.float32, True),
        group_sample((2, 4), [(33, "bf16"), (17, "int8"), (17, "int4")], 67, "dense", torch.bfloat16, False),
    ]


def _dense_group(args: Args) -> Tensor:
    every = []
    for i, (packed, features) in enumerate(zip(args["packed"], args["out_features"], strict=True)):
        bias = args["bias"][i] if args["bias"] else None
        every.append(_dense_linear({"input": args["input"], "packed": packed, "bias": bias, "out_features": features}).flatten())
    return torch.cat(every)


def _first(bads: list[Bad]) -> list[Bad]:
    """Cases of ``packed`` as those of the first weight of a list."""

    def spoil(bad: Bad) -> Callable[[Args], Args]:
        return lambda args: args | {"packed": [bad.spoil({"packed": args["packed"][0]})["packed"], *args["packed"][1:]]}

    return [Bad(bad.message, spoil(bad), bad.traced) for bad in bads]


_LENGTHS = "sparse_linear_group: packed, out_features and bias must be lists of one length, at least 1 (bias: or 0), got "
_GROUP_OP = Case(
    op="sparse_linear_group",
    samples=_group_samples,
    few=_few_group,
    trains=("input",),
    dense=_dense_group,
    strided=("input",),
    batched="input",
    bad=[
        *_wrong_types("sparse_linear_group", "input"),
        *_first(_wrong_packed("sparse_linear_group")),
        Bad(_LENGTHS + "1, 2 and 2", replaced(packed=lambda p: p[:1])),
        Bad(_LENGTHS + "2, 1 and 2", replaced(out_features=lambda n: n[:1])),
        Bad(_LENGTHS + "2, 2 and 1", replaced(bias=lambda b: b[:1])),
        Bad(_LENGTHS + "0, 0 and 0", replaced(packed=[], out_features=[], bias=[])),
        Bad("sparse_linear_group: input must have at least one dimension, got a scalar", replaced(input=torch.tensor(1.0))),
        Bad("sparse_linear_group: activation_group must be 32 or 64, got 16", replaced(activation_group=16)),
        Bad("sparse_linear_group: stream_rows must be 0 or more, got -1", replaced(stream_rows=-1)),
        Bad("sparse_linear_group: bias must be 1-D with 17 elements, got 1-D with 16", replaced(bias=lambda b: [b[0], b[1][:-1]])),
        Bad("sparse_linear_group: bias must be float32, bfloat16 or float16, got Double", replaced(bias=lambda b: [b[0], b[1].double()])),
        Bad(
            "sparse_linear_group: packed must hold 17 x 67 (out_features x in_features), got 33 x 67",
            replaced(packed=lambda p: [p[0], p[0]]),
            traced=False,
        ),
    ],
)


def pack_sample(weight: Tensor, dtype: str, layout: str, **grid: Any) -> Sample:
    def expected() -> tuple[Tensor, float]:
        free = layout == "auto" and grid.get("pattern", "unstructured") == "unstructured"
        packed = {one: pack_by_hand(weight, dtype, one, **grid) for one in (LAYOUTS if free else [layout])}
        best = min(packed.values(), key=len)  # on a tie the first, dense
        return torch.frombuffer(bytearray(best), dtype=torch.uint8), 0

    shape = " x ".join(map(str, weight.shape))
    args = {"weight": weight, "dtype": dtype, "layout": layout, "group_size": 32, "symmetric": False, "scale": None, "minimum": None}
    args |= {"pattern": "unstructured"} | grid
    kind = ", ".join(f"{name}={'given' if isinstance(value, Tensor) else value}" for name, value in grid.items())
    return Sample(f"{dtype} {layout} {kind} {shape} {weight.dtype}", args, functools.cache(expected))


def given_grid(weight: Tensor, dtype: str, generator: torch.Generator, group_size: int = 32, symmetric: bool = False) -> Args:
    """Grids as another program could have made them: of either sign, and so coarse or fine that codes are clamped."""
    groups = -(-weight.shape[1] // group_size) if dtype == "int4" else 1
    grid: Args = {"scale": torch.randn(weight.shape[0], groups, generator=generator) * (0.5 if dtype == "int4" else 0.02)}
    if dtype == "int4":
        grid |= {"group_size": group_size, "symmetric": symmetric}
        if not symmetric:
            grid["minimum"] = torch.randn(weight.shape[0], groups, generator=generator) - 8 * grid["scale"]
    return grid


@functools.cache
def _pack_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    sparsities, kinds, layouts = itertools.cycle(SPARSITIES), itertools.cycle(FLOATS.values()), itertools.cycle(("auto", *LAYOUTS))
    sizes = (0, 1, 15, 16, 17, 33, 64, 65, 127, 257)
    grids = itertools.cycle(GRIDS)
    samples = [
        pack_sample(
            random_weight(outputs, inputs, next(sparsities), generator).to(next(kinds)),
            dtype,
            next(layouts),
            **(next(grids) if dtype == "int4" else {}),
        )
        for dtype, outputs, inputs, _ in itertools.product(DTYPES, sizes, sizes, range(2))
    ]
    for dtype, layout, outputs, inputs in itertools.product(("int8", "int4"), ("auto", *LAYOUTS), (1, 17, 33), (0, 1, 32, 67, 130)):
        weight = random_weight(outputs, inputs, next(sparsities), generator).to(next(kinds))
        for grid in GRIDS if dtype == "int4" else [{}]:
            samples.append(pack_sample(weight, dtype, layout, **given_grid(weight, dtype, generator, **grid)))
    for dtype, pattern, outputs, inputs in itertools.product(("fp32", "bf16", "int8"), PATTERNS, (0, 1, 17, 33), (0, 1, 65, 190)):
        weight = patterned_weight(outputs, inputs, pattern, generator)
        samples.append(pack_sample(weight.to(next(kinds)), dtype, "auto", pattern=pattern))
    return samples


@functools.cache
def _few_pack() -> list[Sample]:
    generator = torch.Generator().manual_seed(4)
    samples = [
        pack_sample(random_weight(17, 33, 0.5, generator), dtype, layout)
        for dtype, layout in zip(DTYPES, ("auto", *LAYOUTS, "auto"), strict=True)
    ]
    for dtype, layout in (("int8", "dense"), ("int4", "dense"), ("int4", "sparse")):
        weight = random_weight(17, 67, 0.5, generator)
        samples.append(pack_sample(weight, dtype, layout, **given_grid(weight, dtype, generator)))
    weight = patterned_weight(17, 68, "2:4", generator)
    weight[:, 0] = 0  # any one column, or row, repeated has the pattern, too
    return [*samples, pack_sample(weight, "int8", "auto", pattern="2:4")]


def with_grids(dtype: str, scale: Tensor | None, minimum: Tensor | None = None, **others: Any) -> Callable[[Args], Args]:
    return replaced(dtype=dtype, scale=scale, minimum=minimum, **others)


_PACK = Case(
    op="sparse_linear_pack",
    samples=_pack_samples,
    few=_few_pack,
    strided=("weight", "scale", "minimum"),
    dynamic_shape=True,
    bad=[
        *_wrong_types("sparse_linear_pack", "weight"),
        Bad("sparse_linear_pack: weight must be 2-D (out_features, in_features), got 1-D", replaced(weight=lambda w: w[0])),
        Bad("sparse_linear_pack: weight must be 2-D (out_features, in_features), got 3-D", replaced(weight=lambda w: w[None])),
        Bad("sparse_linear_pack: dtype must be fp32, bf16, int8 or int4, got fp16", replaced(dtype="fp16")),
        Bad("sparse_linear_pack: dtype must be fp32, bf16, int8 or int4, got ", replaced(dtype="")),
        Bad("sparse_linear_pack: layout must be auto, sparse or dense, got Sparse", replaced(layout="Sparse")),
        *(
            Bad(
                f"sparse_linear_pack: pattern must be unstructured or n:m with n below m and m a power of two from 2 to 64, got {pattern}",
                replaced(pattern=pattern),
            )
            for pattern in ("", "2:3", "4:4", "0:4", "2:4 ", "02:4", "2:128", "-1:4", "2:4:8")
        ),
        Bad("sparse_linear_pack: layout must be auto with a pattern, got sparse", replaced(pattern="2:4", layout="sparse")),
        Bad(
            "sparse_linear_pack: pattern must be unstructured for int4 weights, got 2:4",
            replaced(pattern="2:4", dtype="int4", layout="auto"),
        ),
        Bad(
            "sparse_linear_pack: weight must have a multiple of 4 inputs for the pattern 2:4, got 33",
            replaced(pattern="2:4", dtype="bf16", layout="auto"),
        ),
        Bad(
            "sparse_linear_pack: weight must have at most 2 nonzeros among every 4 inputs for the pattern 2:4, got more in output 16",
            replaced(pattern="2:4", dtype="bf16", layout="auto", weight=lambda w: torch.eye(17)[:, 16:].repeat(1, 32)),
            traced=False,
        ),
        *(
            Bad(
                "sparse_linear_pack: weight must be finite to be packed as int8, got NaN or an infinity",
                replaced(dtype="int8", weight=lambda w, value=value: w.clone().index_fill_(1, torch.tensor([w.shape[1] - 1]), value)),
                traced=False,
            )
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
        *(
            Bad(
                "sparse_linear_pack: weight must be finite and within the range of fp16 scales to be packed as int4, got other values",
                replaced(dtype="int4", weight=lambda w, value=value: w.clone().index_fill_(1, torch.tensor([w.shape[1] - 1]), value)),
                traced=False,
            )
            for value in (float("nan"), float("inf"), -float("inf"), 1e6, -66000.0)
        ),
        *(
            Bad(f"sparse_linear_pack: group_size must be 32, 64 or 128, got {size}", replaced(dtype="int4", group_size=size))
            for size in (0, 16, 33, 256, -32)
        ),
        *(
            Bad(
                f"sparse_linear_pack: scale must be None unless dtype is int8 or int4, got a tensor with dtype {dtype}",
                with_grids(dtype, torch.ones(17, 1)),
            )
            for dtype in ("fp32", "bf16")
        ),
        *(
            Bad("sparse_linear_pack: minimum must be given with scale for an int4 weight that is not symmetric, and only then", spoil)
            for spoil in (
                with_grids("int4", torch.ones(17, 2)),
                with_grids("int4", None, torch.ones(17, 2)),
                with_grids("int4", torch.ones(17, 2), torch.ones(17, 2), symmetric=True),
                with_grids("int8", torch.ones(17, 1), torch.ones(17, 1)),
            )
        ),
        *(
            Bad(f"sparse_linear_pack: {message}", spoil)
            for message, spoil in (
                ("scale must be float32 (17, 1), got 1-D Float with 17 elements", with_grids("int8", torch.ones(17))),
                ("scale must be float32 (17, 1), got 2-D Double with 17 elements", with_grids("int8", torch.ones(17, 1).double())),
                ("scale must be float32 (17, 2), got 2-D Float with 17 elements", with_grids("int4", torch.ones(17, 1), torch.ones(17, 1))),
                ("scale must be float32 (17, 2), got 2-D Float with 34 elements", with_grids("int4", torch.ones(2, 17), torch.ones(17, 2))),
                (
                    "minimum must be float32 (17, 2), got 2-D Half with 34 elements",
                    with_grids("int4", torch.ones(17, 2), torch.ones(17, 2).half()),
                ),
                (
                    "scale must be float32 (17, 1), got 2-D Float with 34 elements",
                    with_grids("int4", torch.ones(17, 2), torch.ones(17, 2), group_size=64),
                ),
            )
        ),
        *(
            Bad(f"sparse_linear_pack: {name} must be finite, got NaN or an infinity", with_grids("int4", *grids), traced=False)
            for value in (float("nan"), float("inf"))
            for name, grids in (
                ("scale", (torch.full((17, 2), value), torch.ones(17, 2))),
                ("minimum", (torch.ones(17, 2), torch.full((17, 2), -value))),
            )
        ),
        Bad(
            "sparse_linear_pack: scale must be finite, got NaN or an infinity",
            with_grids("int8", torch.full((17, 1), float("nan"))),
            traced=False,
        ),
    ],
)


def unpack_sample(weight: Tensor, dtype: str, layout: str, kind: str) -> Sample:
    grid = next(_grids) if dtype == "int4" else {}
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout, **grid)
    args = {"packed": packed, "out_features": weight.shape[0], "in_features": weight.shape[1], "dtype": kind}
    return Sample(
        f"{dtype} {layout} {' x '.join(map(str, weight.shape))} to {kind}",
        args,
        functools.cache(lambda: (torch.from_numpy(stored(weight, dtype, layout, **grid)).to(FLOATS[kind]), 0.0)),
    )


@functools.cache
def _unpack_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    sparsities, kinds, sizes = itertools.cycle(SPARSITIES), itertools.cycle(FLOATS), (0, 1, 15, 16, 17, 33, 64, 65, 127, 257)
    return [
        unpack_sample(random_weight(outputs, inputs, next(sparsities), generator), dtype, layout, next(kinds))
        for dtype, layout, outputs, inputs in itertools.product(DTYPES, LAYOUTS, sizes, sizes)
    ]


@functools.cache
def _few_unpack() -> list[Sample]:
    generator = torch.Generator().manual_seed(6)
    return [
        unpack_sample(random_weight(33, 67, 0.5, generator), dtype, layout, kind)
        for dtype, layout, kind in [
            ("fp32", "sparse", "fp32"),
            ("bf16", "dense", "bf16"),
            ("int8", "sparse", "fp16"),
            ("int4", "sparse", "fp32"),
            ("int4", "dense", "bf16"),
        ]
    ]


_UNPACK = Case(
    op="sparse_linear_unpack",
    samples=_unpack_samples,
    few=_few_unpack,
    bad=[
        *_wrong_packed("sparse_linear_unpack"),
        Bad("sparse_linear_unpack: dtype must be fp32, bf16 or fp16, got int8", replaced(dtype="int8")),
        Bad("sparse_linear_unpack: packed must hold 32 x 67 (out_features x in_features), got 33 x 67", replaced(out_features=32), False),
        Bad("sparse_linear_unpack: packed must hold 33 x 0 (out_features x in_features), got 33 x 67", replaced(in_features=0), False),
    ],
)


def check_sample(weight: Tensor, dtype: str, layout: str) -> Sample:
    grid = next(_grids) if dtype == "int4" else {}
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout, **grid)
    nonzeros = int(np.count_nonzero(quantize(numpy32(weight))[0] if dtype == "int8" else stored(weight, dtype, layout, **grid)))
    kind = grid.get("group_size", 0), grid.get("symmetric", 0)
    facts = torch.tensor([1, DTYPES.index(dtype), LAYOUTS.index(layout), *weight.shape, nonzeros, *kind])
    return Sample(f"{dtype} {layout} {tuple(weight.shape)}", {"packed": packed}, lambda: (facts, 0))


@functools.cache
def _check_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(7)
    sparsities, sizes = itertools.cycle(SPARSITIES), (0, 1, 16, 17, 64, 65, 257)
    return [
        check_sample(random_weight(outputs, inputs, next(sparsities), generator), dtype, layout)
        for dtype, layout, outputs, inputs in itertools.product(DTYPES, LAYOUTS, sizes, sizes)
    ]


@functools.cache
def _few_check() -> list[Sample]:
    generator = torch.Generator().manual_seed(8)
    kinds = [("bf16", "sparse"), ("int8", "dense"), ("int4", "dense"), ("int4", "sparse")]
    return [check_sample(random_weight(33, 67, 0.5, generator), dtype, layout) for dtype, layout in kinds]


_CHECK = Case(op="sparse_linear_check", samples=_check_samples, few=_few_check, bad=_wrong_packed("sparse_linear_check"))


# --------------------------------------------------------------------------------------------------------------- sparse_linear, attention
# Blocks and pages written as the drawings in kernels/common/kv_block.h and kernels/sparse_linear/attention.h read; softmax in float64.


def prune(x: Tensor, keep: int) -> np.ndarray:
    """bf16 values as float32, all but the `keep` largest of each vector zero; and which those are."""
    x = round_bf16(numpy32(x))
    order = np.argsort(-np.abs(np.where(np.isnan(x), np.inf, x)), -1, kind="stable")
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[..., :keep], True, -1)
    return np.stack([np.where(mask, x, 0), mask])


def page_by_hand(x: np.ndarray, mask: np.ndarray, kind: str) -> bytes:
    """Sixteen vectors of d elements."""
    d, keep = x.shape[1], int(mask[0].sum())
    bits = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    dense = 2 * d + 32 * keep >= 32 * d
    rows = []
    if kind == "key":
        rows = [[(t, 2 * i + j) for t in range(16) for j in (0, 1)] for i in range(d // 2)]
    else:
        pairs, groups = range(8), range(d // 16)
        order = [(p, g) for p in pairs for g in groups] if dense else [(p, g) for g in groups for p in pairs]
        rows = [[(2 * p + j, 16 * g + i) for i in range(16) for j in (0, 1)] for p, g in order]
    tokens, elements = np.array(rows).reshape(-1, 2).T
    values, kept = bits[tokens, elements], mask[tokens, elements]
    return values.tobytes() if dense else np.packbits(kept, bitorder="little").tobytes() + values[kept].tobytes()


def compress_sample(x: Tensor, kind: str, sparsity: float) -> Sample:
    def expected() -> tuple[Tensor, float]:
        values, mask = prune(x, round((1 - sparsity) * x.shape[3]))
        pages = [
            [
                [page_by_hand(values[b, h, t : t + 16], mask[b, h, t : t + 16] != 0, kind) for t in range(0, x.shape[2], 16)]
                for h in range(x.shape[1])
            ]
            for b in range(x.shape[0])
        ]
        size = min(2 * x.shape[3] + 32 * round((1 - sparsity) * x.shape[3]), 32 * x.shape[3])
        flat = b"".join(page for rows in pages for heads in rows for page in heads)
        array = torch.frombuffer(bytearray(flat), dtype=torch.uint8) if flat else torch.empty(0, dtype=torch.uint8)
        return array.view(x.shape[0], x.shape[1], x.shape[2] // 16, size), 0

    return Sample(f"{kind} {tuple(x.shape)} {x.dtype} {sparsity}", {"x": x, "kind": kind, "sparsity": sparsity}, functools.cache(expected))


KV_SHAPES = (
    (1, 1, 16, 16),
    (2, 3, 32, 64),
    (1, 2, 48, 80),
    (1, 1, 32, 96),
    (3, 1, 16, 128),
    (1, 1, 16, 256),
    (0, 2, 16, 32),
    (1, 2, 0, 32),
)


def random_kv(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers, some of which are equal in magnitude or zero."""
    x = torch.randn(shape, generator=generator)
    equal = torch.rand(shape, generator=generator)
    return torch.where(equal < 0.1, x.sign(), torch.where(equal < 0.15, torch.zeros(()), x))


@functools.cache
def _compress_samples() -> list[Sample]:
    generator, kinds = torch.Generator().manual_seed(9), itertools.cycle(FLOATS.values())
    return [
        compress_sample(random_kv(shape, generator).to(next(kinds)), kind, sparsity)
        for shape, kind, sparsity in itertools.product(KV_SHAPES, ("key", "value"), (0.0, 0.05, 0.0625, 0.3, 0.5, 0.9))
    ]


@functools.cache
def _few_compress() -> list[Sample]:
    generator = torch.Generator().manual_seed(10)
    return [
        compress_sample(random_kv((1, 2, 32, 32), generator), "key", 0.3),
        compress_sample(random_kv((2, 1, 16, 48), generator).bfloat16(), "value", 0.5),
    ]


_COMPRESS = Case(
    op="sparse_linear_compress_kv",
    samples=_compress_samples,
    few=_few_compress,
    strided=("x",),
    bad=[
        *_wrong_types("sparse_linear_compress_kv", "x"),
        Bad("sparse_linear_compress_kv: x must be 4-D (batch, KV heads, tokens, head_dim), got 3-D", replaced(x=lambda x: x[0])),
        Bad("sparse_linear_compress_kv: head_dim must be a positive multiple of 16, got 31", replaced(x=lambda x: x[..., 1:])),
        Bad("sparse_linear_compress_kv: head_dim must be a positive multiple of 16, got 0", replaced(x=lambda x: x[..., :0])),
        Bad("sparse_linear_compress_kv: x must have a multiple of 16 tokens, got 31", replaced(x=lambda x: x[:, :, 1:])),
        Bad("sparse_linear_compress_kv: kind must be key or value, got keys", replaced(kind="keys")),
        *(
            Bad(
                f"sparse_linear_compress_kv: sparsity must be at least 0 and leave one element a vector, got {value:g}",
                replaced(sparsity=value),
            )
            for value in (-0.5, 1.0, 0.99, 2.0)
        ),
    ],
)


def _wrong_pages(op: str, argument: str, d: int) -> list[Bad]:
    shape = f"{op}: {argument} must be a 4-D uint8 tensor (batch, KV heads, pages, bytes), got "
    size = f"{op}: {argument} must have pages of a size that fits head_dim {d}, got "
    return [
        Bad(shape + "3-D Byte", replaced(**{argument: lambda p: p[0]})),
        Bad(shape + "4-D Char", replaced(**{argument: lambda p: p.view(torch.int8)})),
        Bad(size + f"{2 * d} bytes", replaced(**{argument: lambda p: p[..., : 2 * d]})),
        Bad(size + f"{2 * d + 33} bytes", replaced(**{argument: lambda p: p[..., : 2 * d + 33]})),
        Bad(size + f"{32 * d + 32} bytes", replaced(**{argument: lambda p: torch.zeros((*p.shape[:3], 32 * d + 32), dtype=torch.uint8)})),
    ]


def expand_sample(x: Tensor, kind: str, sparsity: float) -> Sample:
    pages = torch.ops.torch_cpu_ext.sparse_linear_compress_kv(x, kind=kind, sparsity=sparsity)
    expected = functools.cache(lambda: (torch.from_numpy(prune(x, round((1 - sparsity) * x.shape[3]))[0]).bfloat16(), 0.0))
    return Sample(f"{kind} {tuple(x.shape)} {sparsity}", {"pages": pages, "kind": kind, "head_dim": x.shape[3]}, expected)


@functools.cache
def _expand_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(11)
    return [
        expand_sample(random_kv(shape, generator), kind, sparsity)
        for shape, kind, sparsity in itertools.product(KV_SHAPES, ("key", "value"), (0.0, 0.3, 0.5, 0.9))
    ]


@functools.cache
def _few_expand() -> list[Sample]:
    generator = torch.Generator().manual_seed(12)
    return [expand_sample(random_kv((1, 2, 32, 32), generator), kind, sparsity) for kind, sparsity in (("key", 0.3), ("value", 0.5))]


_EXPAND = Case(
    op="sparse_linear_expand_kv",
    samples=_expand_samples,
    few=_few_expand,
    bad=[
        *_wrong_pages("sparse_linear_expand_kv", "pages", 32),
        Bad("sparse_linear_expand_kv: kind must be key or value, got ", replaced(kind="")),
        Bad("sparse_linear_expand_kv: head_dim must be a positive multiple of 16, got 24", replaced(head_dim=24)),
        Bad("sparse_linear_expand_kv: head_dim must be a positive multiple of 16, got -16", replaced(head_dim=-16)),
        Bad(
            "sparse_linear_expand_kv: pages must be intact, got a page whose bitmap does not fit its size",
            replaced(pages=lambda p: torch.zeros_like(p)),
            traced=False,
        ),
    ],
)


def softmax_attention(query: Tensor, k: np.ndarray, v: np.ndarray, spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logarithms of the sums, flattened one after the other, in float64, and a bound on the errors of any order of float32 sums.

    ``k`` and ``v`` hold all tokens of all heads, those of the pages first; between them and the tail there may be unused ones.
    """
    batch, heads, length, d = query.shape
    group, used = heads // k.shape[1], k.shape[2]
    q = round_bf16(numpy32(query)).astype(np.float64)
    out, out_bound = np.zeros(query.shape), np.zeros(query.shape)
    lse, lse_bound = np.full(query.shape[:3], -np.inf), np.zeros(query.shape[:3])
    for b, h in itertools.product(range(batch), range(heads)):
        first, total = int(spans[b, h // group, 0]), int(16 * spans[b, h // group, 1] + spans[b, h // group, 2])
        assert total <= used
        for row in range(length):
            seen = slice(first, max(first, total - length + 1 + row))
            keys, values = (t[b, h // group, seen].astype(np.float64) for t in (k, v))
            if not len(keys):
                continue
            scores = keys @ q[b, h, row] * scale
            wrong = float((abs(scale) * (np.abs(keys) @ np.abs(q[b, h, row])) * (d + 8)).max()) * 2.0**-24 + 2.0**-22 * np.abs(scores).max()
            largest = scores.max()
            p = np.exp(scores - largest)
            lse[b, h, row] = largest + np.log(p.sum())
            lse_bound[b, h, row] = wrong + (len(p) + 16) * 2.0**-24 + 2.0**-22 * (1 + abs(lse[b, h, row]))
            p /= p.sum()
            out[b, h, row] = p @ values
            # Probabilities are rounded to bfloat16; their scores are off, and so is the sum they are divided by.
            out_bound[b, h, row] = (p @ np.abs(values)) * 1.05 * (2.0**-8 + 2 * wrong + (2 * len(p) + 32) * 2.0**-24) + 2.0**-100
    out_bound += _UNIT[query.dtype] * (np.abs(out) + out_bound) + _TINY[query.dtype]
    return tuple(torch.from_numpy(np.concatenate([a.reshape(-1), c.reshape(-1)])) for a, c in ((out, lse), (out_bound, lse_bound)))


def attend_sample(
    shape: tuple[int, int, int, int],
    group: int,
    pages: int,
    blocks: int,
    sparsity: tuple[float, float],
    spans: Any,
    kind: torch.dtype,
    seed: int,
    junk: bool = True,
) -> Sample:
    """``shape``: batch, KV heads, queries, head_dim; ``spans``: of every head, or a tensor; ``junk``: NaN where no token is."""
    batch, heads, length, d = shape
    generator = torch.Generator().manual_seed(seed)
    paged = [torch.randn(batch, heads, 16 * pages, d, generator=generator) for _ in range(2)]
    dense = [torch.randn(batch, heads, 16 * blocks, d, generator=generator) for _ in range(2)]
    query = (2 * torch.randn(batch, heads * group, length, d, generator=generator)).to(kind)
    spans = spans if isinstance(spans, Tensor) else torch.tensor(spans).repeat(batch, heads, 1)
    unused = torch.arange(16 * blocks) >= spans[..., 2:] if junk else torch.zeros(batch, heads, 16 * blocks, dtype=torch.bool)
    names = ("key", "value")
    op = torch.ops.torch_cpu_ext.sparse_linear_compress_kv
    k_pages, v_pages = (op(x, kind=name, sparsity=s) for x, name, s in zip(paged, names, sparsity, strict=True))
    tails = [x.masked_fill(unused[..., None], float("nan")).bfloat16() for x in dense]
    k_tail = tails[0].unflatten(2, (-1, 16)).unflatten(4, (-1, 2)).transpose(3, 4).contiguous()
    v_tail = tails[1].unflatten(2, (-1, 8, 2)).transpose(4, 5).contiguous()

    def expected() -> tuple[Tensor, Tensor]:
        k, v = (np.zeros((batch, heads, 16 * (pages + blocks), d), np.float32) for _ in range(2))
        for target, page, tail, s in ((k, paged[0], dense[0], sparsity[0]), (v, paged[1], dense[1], sparsity[1])):
            for b, h in itertools.product(range(batch), range(heads)):
                _, used, rest = spans[b, h].tolist()
                target[b, h, : 16 * used] = prune(page[b, h, : 16 * used], round((1 - s) * d))[0]
                target[b, h, 16 * used : 16 * used + rest] = round_bf16(numpy32(tail[b, h, :rest]))
        return softmax_attention(query, k, v, spans, d**-0.5)

    args = {"query": query, "k_pages": k_pages, "v_pages": v_pages, "k_tail": k_tail, "v_tail": v_tail, "spans": spans, "scale": d**-0.5}
    return Sample(
        f"{shape} group={group} pages={pages} blocks={blocks} {sparsity} {spans[:1, :1].tolist()} {kind}", args, functools.cache(expected)
    )


@functools.cache
def _attend_samples() -> list[Sample]:
    kinds, seeds = itertools.cycle(FLOATS.values()), itertools.count(20)
    samples = []
    for d, group in itertools.product((16, 48, 64, 80, 96, 128, 256), (1, 2, 3, 4, 5, 8, 16)):
        for sparsity, pages, blocks, spans in (
            ((0.3, 0.5), 3, 2, (0, 3, 21)),
            ((0.0, 0.7), 2, 1, (3, 2, 1)),
            ((0.5, 0.0), 1, 3, (16, 1, 33)),
            ((0.3, 0.5), 4, 0, (0, 4, 0)),
        ):
            length = 1 + next(seeds) % 3
            samples.append(attend_sample((1, 2, length, d), group, pages, blocks, sparsity, spans, next(kinds), next(seeds)))
    for length in range(1, 9):  # causal among the queries, also where a page or the padding ends between them
        for spans in ((0, 1, 17), (5, 1, 3), (17, 1, 4), (20, 1, 4)):
            samples.append(attend_sample((2, 1, length, 32), 2, 1, 2, (0.3, 0.5), spans, next(kinds), next(seeds)))
    for pages, tail in ((31, 16), (32, 0), (32, 1), (33, 40), (64, 5), (70, 0)):  # around the splits of 512 tokens
        for first in (0, 490, 511, 512):
            samples.append(attend_sample((1, 2, 2, 32), 3, pages, 3, (0.3, 0.5), (first, pages, tail), next(kinds), next(seeds)))
    ragged = torch.tensor([[[0, 5, 3], [40, 2, 20], [0, 0, 0]], [[7, 0, 9], [80, 5, 0], [0, 5, 32]]])
    for sparsity in ((0.3, 0.5), (0.0, 0.0), (0.9, 0.9)):
        samples.append(attend_sample((2, 3, 3, 64), 3, 5, 2, sparsity, ragged, next(kinds), next(seeds)))
    for shape in ((0, 2, 1, 32), (2, 1, 0, 32)):
        samples.append(attend_sample(shape, 2, 1, 1, (0.3, 0.5), (0, 1, 1), torch.float32, next(seeds)))
    samples.append(attend_sample((1, 1, 2, 32), 2, 0, 0, (0.3, 0.5), (0, 0, 0), torch.float32, next(seeds)))
    return samples


@functools.cache
def _few_attend() -> list[Sample]:
    return [
        attend_sample((1, 2, 2, 32), 3, 3, 2, (0.3, 0.5), (5, 3, 20), torch.float32, 1, junk=False),
        attend_sample((2, 1, 1, 48), 1, 2, 1, (0.5, 0.0), (0, 2, 16), torch.bfloat16, 2, junk=False),
    ]


def _wrong_tail(argument: str, inner: str, swapped: str) -> list[Bad]:
    op = "sparse_linear_attend"
    return [
        Bad(f"{op}: {argument} must be a 6-D bfloat16 tensor of blocks, got 5-D BFloat16", replaced(**{argument: lambda t: t[0]})),
        Bad(f"{op}: {argument} must be a 6-D bfloat16 tensor of blocks, got 6-D Float", replaced(**{argument: lambda t: t.float()})),
        Bad(
            f"{op}: {argument} must be (1, 2, blocks, {inner}, 2), got (1, 2, blocks, {swapped}, 2)",
            replaced(**{argument: lambda t: t.transpose(3, 4)}),
        ),
        Bad(
            f"{op}: {argument} must be (1, 2, blocks, {inner}, 2), got (1, 1, blocks, {inner}, 2)",
            replaced(**{argument: lambda t: t[:, 1:]}),
        ),
    ]


def _spans(index: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda spans: spans.clone().index_fill_(2, torch.tensor([index]), value)


_ATTEND = Case(
    op="sparse_linear_attend",
    samples=_attend_samples,
    few=_few_attend,
    strided=("query", "k_tail", "v_tail"),
    bad=[
        *_wrong_types("sparse_linear_attend", "query"),
        Bad("sparse_linear_attend: query must be 4-D (batch, heads, length, head_dim), got 3-D", replaced(query=lambda q: q[0])),
        Bad("sparse_linear_attend: head_dim must be a positive multiple of 16, got 31", replaced(query=lambda q: q[..., 1:])),
        Bad("sparse_linear_attend: query must have a multiple of the 2 KV heads, got 5", replaced(query=lambda q: q[:, 1:])),
        Bad("sparse_linear_attend: query must have a multiple of the 0 KV heads, got 6", replaced(k_pages=lambda p: p[:, :0])),
        *_wrong_pages("sparse_linear_attend", "k_pages", 32),
        *_wrong_pages("sparse_linear_attend", "v_pages", 32),
        Bad(
            "sparse_linear_attend: v_pages must have batch 1 and 2 KV heads, got 1 and 1",
            replaced(v_pages=lambda p: p[:, 1:]),
        ),
        Bad("sparse_linear_attend: v_pages must have as many pages as k_pages, 3, got 2", replaced(v_pages=lambda p: p[:, :, 1:])),
        *_wrong_tail("k_tail", "16, 16", "16, 16")[:2],
        *_wrong_tail("v_tail", "8, 32", "32, 8"),
        _wrong_tail("k_tail", "16, 16", "16, 16")[3],
        Bad("sparse_linear_attend: v_tail must have as many blocks as k_tail, 2, got 1", replaced(v_tail=lambda t: t[:, :, 1:])),
        Bad(
            "sparse_linear_attend: spans must be an int64 tensor of shape (1, 2, 3), got 3-D Int with 6 elements",
            replaced(spans=lambda s: s.int()),
        ),
        Bad(
            "sparse_linear_attend: spans must be an int64 tensor of shape (1, 2, 3), got 3-D Long with 3 elements",
            replaced(spans=lambda s: s[:, 1:]),
        ),
        Bad("sparse_linear_attend: spans must have at most 3 pages, got 4", replaced(spans=_spans(1, 4)), traced=False),
        Bad("sparse_linear_attend: spans must have at most 3 pages, got -1", replaced(spans=_spans(1, -1)), traced=False),
        Bad("sparse_linear_attend: spans must have at most 32 tokens in the tail, got 33", replaced(spans=_spans(2, 33)), traced=False),
        Bad("sparse_linear_attend: spans must have at most 32 tokens in the tail, got -1", replaced(spans=_spans(2, -1)), traced=False),
        Bad("sparse_linear_attend: spans must begin with a token from 0 to 68, got 69", replaced(spans=_spans(0, 69)), traced=False),
        Bad("sparse_linear_attend: spans must begin with a token from 0 to 68, got -1", replaced(spans=_spans(0, -1)), traced=False),
        *(
            Bad(
                "sparse_linear_attend: pages must be intact, got a page whose bitmap does not fit its size",
                replaced(**{argument: lambda p, value=value: torch.full_like(p, value)}),
                traced=False,
            )
            for argument, value in itertools.product(("k_pages", "v_pages"), (0, 255))
        ),
    ],
)


# The fused decoder. An independent model in float64: codes of weights and activations as above, keys and values rounded to bfloat16.

PLAN = (  # columns, as kernels/sparse_linear/binding_decode.cpp has them
    *("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down", "q_norm", "k_norm"),
    *("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias", "window"),
    *("attention_norm", "mlp_norm", "rope", "q_norm_all", "k_norm_all"),
)
# A sum that is off by its last bit can round to the next code or the next bfloat16, and that error is carried through the rest: the bound
# is this share of the largest magnitude of a row. Rarely is there one at all; test_decode.py says how rarely.
DECODE_BOUND = 0.02


def in_blocks(plain: Tensor, blocks: int, generator: torch.Generator) -> Tensor:
    """A cache of plain keys and values, ``(layers, 2, batch, heads, tokens, dim)``, with other numbers where there are no tokens."""
    *lead, tokens, dim = plain.shape
    kv = torch.randn(*lead, blocks, 16, dim, generator=generator).bfloat16()
    flat = kv.view(*lead, blocks, 16 * dim)
    for t, d in itertools.product(range(tokens), range(dim)):
        flat[:, 0, :, :, t // 16, d // 2 * 32 + t % 16 * 2 + d % 2] = plain[:, 0, :, :, t, d]
        flat[:, 1, :, :, t // 16, t % 16 // 2 * 2 * dim + d * 2 + t % 2] = plain[:, 1, :, :, t, d]
    return kv


def decode_sample(
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    inner: int = 96,
    dtype: str = "int8",
    layout: str = "dense",
    kind: torch.dtype = torch.float32,
    bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int, ...] = (-1,),
    batch: int = 1,
    tokens: int = 1,
    length: int = 0,
    starts: tuple[int, ...] | None = None,
    vocabulary: int = 0,
    activation: str = "silu",
    final_norm: bool = True,
    norms_before: bool = True,
    norms_after: bool = False,
    qk_norm_all: bool = False,
    ropes: tuple[int, ...] = (0,),
    softcap: float = 0.0,
) -> Sample:
    name = ", ".join(f"{key}={value}" for key, value in locals().items())
    generator = torch.Generator().manual_seed(length * 64 + batch * 8 + tokens)
    dtypes = itertools.cycle(DTYPES if dtype == "mixed" else [dtype])
    weights: dict[tuple[int, str], tuple[Tensor, str]] = {}  # dense weights and their dtypes
    vectors: dict[tuple[int, str], Tensor] = {}
    plan = torch.full((layers + 1, len(PLAN)), -1)
    arena, floats = b"", torch.empty(0)

    def add_weight(layer: int, part: str, outputs: int, inputs: int) -> None:
        nonlocal arena
        weight, stored_as = random_weight(outputs, inputs, 0.3, generator) / inputs**0.5, next(dtypes)
        weights[layer, part] = weight, stored_as
        plan[layer, PLAN.index(part if layer < layers else "q")] = len(arena)
        arena += torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=stored_as, layout=layout).numpy().tobytes()

    def add_vector(layer: int, part: str, values: Tensor) -> None:
        nonlocal floats
        vectors[layer, part] = values
        plan[layer, PLAN.index(part)] = len(floats)
        floats = torch.cat([floats, values])

    sizes = {
        **{"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden), "o": (hidden, heads * dim)},
        **{"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)},
    }
    for layer in range(layers):
        for part in (*(("input_norm", "post_norm") if norms_before else ()), *(("attention_norm", "mlp_norm") if norms_after else ())):
            add_vector(layer, part, torch.rand(hidden, generator=generator) + 0.5)
        for part in ("q_norm", "k_norm") if qk_norm else ():
            add_vector(layer, part, torch.rand(dim, generator=generator) + 0.5)
        for part in ("q", "k") if qk_norm_all else ():
            add_vector(layer, f"{part}_norm_all", torch.rand(sizes[part][0], generator=generator) + 0.5)
        for part, (outputs, inputs) in sizes.items():
            add_weight(layer, part, outputs, inputs)
            if bias:
                add_vector(layer, f"{part}_bias", torch.randn(outputs, generator=generator))
        plan[layer, PLAN.index("window")] = windows[layer % len(windows)]
        plan[layer, PLAN.index("rope")] = ropes[layer % len(ropes)]
    if final_norm:
        add_vector(layers, "input_norm", torch.rand(hidden, generator=generator) + 0.5)
    if vocabulary:
        add_weight(layers, "head", vocabulary, hidden)

    angles = torch.randn(300 + max(*ropes, 0), dim // 2, generator=generator)
    before = torch.randn(layers, 2, batch, kv_heads, length, dim, generator=generator).bfloat16()
    args: Args = {
        "hidden": torch.randn(batch, tokens, hidden, generator=generator).to(kind),
        "arena": torch.frombuffer(bytearray(arena), dtype=torch.uint8),
        "vectors": floats,
        "plan": plan,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(300, (batch, tokens), generator=generator),
        "starts": None if starts is None else torch.tensor(starts),
        "kv": in_blocks(before, (length + tokens) // 16 + 2, generator),
        "length": length,
        "heads": heads,
        "inner": inner,
        "epsilon": 1e-5,
        "scale": dim**-0.5,
        "activation": activation,
        "vocabulary": vocabulary,
        "softcap": softcap,
    }
    hidden_states = args["hidden"]

    def linear(x: np.ndarray, layer: int, part: str) -> np.ndarray:
        weight, stored_as = weights[layer, part]
        vector = vectors.get((layer, f"{part}_bias"))
        return product(torch.from_numpy(x).float(), weight, stored_as, vector, 32, layout, group_size=32, symmetric=False)[0].numpy()

    def norm(x: np.ndarray, layer: int, part: str) -> np.ndarray:
        if (layer, part) not in vectors:
            return x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * vectors[layer, part].double().numpy()

    def expected() -> tuple[Tensor, Tensor]:
        x = hidden_states.double().numpy()
        for layer in range(layers):
            y = norm(x, layer, "input_norm")
            q, k, v = (norm(linear(y, layer, part), layer, f"{part}_norm_all").reshape(batch, tokens, -1, dim) for part in "qkv")
            q, k = norm(q, layer, "q_norm"), norm(k, layer, "k_norm")
            attended = np.zeros(q.shape)
            rope = ropes[layer % len(ropes)]
            for b, t in itertools.product(range(batch), range(tokens)) if rope >= 0 else ():
                angle = np.arctan2(numpy32(args["sin"]), numpy32(args["cos"])).astype(np.float64)[int(args["positions"][b, t]) + rope]
                turn = np.exp(1j * angle)
                for states in (q, k):
                    pairs = (states[b, t, :, : dim // 2] + 1j * states[b, t, :, dim // 2 :]) * turn
                    states[b, t] = np.concatenate([pairs.real, pairs.imag], -1)
            for b, t, h in itertools.product(range(batch), range(tokens), range(heads)):
                shared = h // (heads // kv_heads)
                keys, values = (
                    np.concatenate([before[layer, i, b, shared].double().numpy(), round_bf16(new[b, : t + 1, shared].astype(np.float32))])
                    for i, new in enumerate((k, v))
                )
                window = windows[layer % len(windows)]
                first = max(starts[b] if starts else 0, len(keys) - window if window > 0 else 0)
                scores = keys[first:] @ q[b, t, h] * dim**-0.5
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                probabilities = np.exp(scores - scores.max())
                attended[b, t, h] = probabilities @ values[first:] / probabilities.sum()
            x = x + norm(linear(attended.reshape(batch, tokens, -1), layer, "o"), layer, "attention_norm")
            y = norm(x, layer, "post_norm")
            gate, up = linear(y, layer, "gate"), linear(y, layer, "up")
            u = gate if activation == "silu" else 2 * (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
            x = x + norm(linear(gate / (1 + np.exp(-u)) * up, layer, "down"), layer, "mlp_norm")
        x = norm(x, layers, "input_norm")
        result = torch.from_numpy(linear(x, layers, "head") if vocabulary else x)
        bound = DECODE_BOUND * result.abs().amax(-1, keepdim=True).expand_as(result) + _UNIT[kind] * result.abs()
        return result, bound

    return Sample(name, args, functools.cache(expected))


@functools.cache
def _decode_samples() -> list[Sample]:
    samples = []
    shapes = itertools.cycle(
        [
            {},
            {"batch": 2, "tokens": 3, "bias": True},
            {"tokens": 8, "windows": (7, -1)},
            {"batch": 8, "heads": 6, "kv_heads": 1, "qk_norm": True},
            {"batch": 2, "tokens": 2, "heads": 4, "kv_heads": 4, "vocabulary": 50},
            {"tokens": 5, "heads": 3, "kv_heads": 1, "dim": 80, "activation": "gelu_tanh", "vocabulary": 17},
            {"batch": 3, "dim": 64, "hidden": 70, "inner": 101, "windows": (16, 100), "kind": torch.bfloat16},
            {"tokens": 2, "heads": 8, "kv_heads": 2, "layers": 3, "kind": torch.float16, "final_norm": False, "vocabulary": 33},
            {"batch": 4, "hidden": 33, "inner": 17, "bias": True, "qk_norm": True, "final_norm": False},
        ]
    )
    starts = itertools.cycle([False, True, False, False, True])
    for dtype, length in itertools.product((*DTYPES, "mixed"), (0, 1, 15, 16, 17, 31, 127, 128, 129, 255, 257)):
        shape = next(shapes)
        batch = shape.get("batch", 1)
        padding = tuple((0, length, length // 2, min(length, 16), min(length, 130))[b % 5] for b in range(batch)) if next(starts) else None
        layout = LAYOUTS[len(samples) % 2]
        samples.append(decode_sample(dtype=dtype, layout=layout, length=length, starts=padding, **shape))
    samples.append(decode_sample(layers=0, vocabulary=40))
    for dtype, length in itertools.product(("fp32", "int8"), (0, 17, 130)):  # Gemma 2, Gemma 3, SmolLM3, Olmo 2
        gemma = {"norms_after": True, "activation": "gelu_tanh", "windows": (9, -1), "dtype": dtype, "length": length}
        samples.append(decode_sample(batch=2, tokens=2, softcap=0.7, hidden=70, **gemma))
        samples.append(decode_sample(tokens=3, qk_norm=True, ropes=(0, 1), starts=(length // 2,), **gemma))
        olmo = {"norms_before": False, "norms_after": True, "qk_norm_all": True}
        samples.append(decode_sample(batch=2, tokens=3, dim=48, heads=6, kv_heads=2, dtype=dtype, length=length, **olmo))
        samples.append(decode_sample(layers=3, batch=3, ropes=(-1, 0), dtype=dtype, length=length))
    return samples


@functools.cache
def _few_decode() -> list[Sample]:
    return [
        decode_sample(batch=2, tokens=3, length=20, starts=(0, 5), vocabulary=50, bias=True),
        decode_sample(dtype="fp32", layout="sparse", length=130, windows=(20,), activation="gelu_tanh", kind=torch.bfloat16),
        decode_sample(dtype="int4", batch=2, length=3, qk_norm=True, heads=3, kv_heads=1),
        decode_sample(dtype="bf16", tokens=4, kind=torch.float16),
        decode_sample(dtype="fp32", batch=2, length=20, norms_after=True, softcap=2.0, ropes=(3, -1), windows=(5, -1)),
    ]


def in_plan(layer: int, part: str, value: int) -> Callable[[Args], Args]:
    """Spoils one entry of the plan."""

    def spoil(args: Args) -> Args:
        plan = args["plan"].clone()
        plan[layer, PLAN.index(part)] = value
        return args | {"plan": plan}

    return spoil


def in_arena(format: str, offset: int, value: int) -> Callable[[Args], Args]:
    """Overwrites a number in the packed weight of the first layer's keys."""
    return lambda args: args | {"arena": patched(format, int(args["plan"][0, PLAN.index("k")]) + offset, value)(args["arena"])}


_DECODE = Case(
    op="sparse_linear_decode",
    samples=_decode_samples,
    few=_few_decode,
    mutates=("kv",),
    bad=[
        *_wrong_types("sparse_linear_decode", "hidden"),
        *(
            Bad(f"sparse_linear_decode: {message}", spoil)
            for message, spoil in (
                ("hidden must be 3-D (batch, tokens, hidden size), got 2-D", replaced(hidden=lambda h: h[0])),
                ("hidden must have 1 to 8 rows (batch times tokens), got 10", replaced(hidden=torch.ones(2, 5, 64))),
                ("hidden must have 1 to 8 rows (batch times tokens), got 0", replaced(hidden=lambda h: h[:, :0])),
                ("arena must be a contiguous 1-D uint8 CPU tensor, got 2-D Byte", replaced(arena=lambda a: a[None])),
                ("arena must be a contiguous 1-D uint8 CPU tensor, got 1-D Char", replaced(arena=lambda a: a.view(torch.int8))),
                ("arena must be a contiguous 1-D uint8 CPU tensor, got 1-D Byte", replaced(arena=lambda a: a[::2])),
                ("vectors must be contiguous 1-D float32, got 1-D Double", replaced(vectors=lambda v: v.double())),
                ("vectors must be contiguous 1-D float32, got 2-D Float", replaced(vectors=lambda v: v[None])),
                ("vectors must be contiguous 1-D float32, got 1-D Float", replaced(vectors=lambda v: v[::2])),
                ("plan must be (layers + 1, 24), got 1-D with 72 elements", replaced(plan=lambda p: p.view(-1))),
                ("plan must be (layers + 1, 24), got 2-D with 69 elements", replaced(plan=lambda p: p[:, :-1].contiguous())),
                ("plan must be (layers + 1, 24), got 2-D with 0 elements", replaced(plan=lambda p: p[:0])),
                ("plan must be contiguous int64 with 72 elements, got Int with 72", replaced(plan=lambda p: p.int())),
                ("plan must be contiguous int64 with 72 elements, got Long with 72", replaced(plan=lambda p: p.T.contiguous().T)),
                *(
                    ("kv must be contiguous bfloat16 (2, 2, 2, key-value heads, blocks, 16, head size), got " + given, replaced(kv=spoil))
                    for given, spoil in (
                        ("7-D Float with 12288 elements", lambda kv: kv.float()),
                        ("6-D BFloat16 with 6144 elements", lambda kv: kv[0]),
                        ("7-D BFloat16 with 6144 elements", lambda kv: kv[:1]),
                        ("7-D BFloat16 with 6144 elements", lambda kv: kv[:, :1].contiguous()),
                        ("7-D BFloat16 with 6144 elements", lambda kv: kv[:, :, :1].contiguous()),
                        ("7-D BFloat16 with 12288 elements", lambda kv: kv.transpose(5, 6)),
                        ("7-D BFloat16 with 12288 elements", lambda kv: kv.view(2, 2, 2, 2, 6, 8, 16)),
                    )
                ),
                ("kv must have a head size that is a multiple of 16, got 8", replaced(kv=lambda kv: kv[..., :8].contiguous())),
                ("kv must have a head size that is a multiple of 16, got 0", replaced(kv=lambda kv: kv[..., :0].contiguous())),
                *(
                    (f"heads must be a multiple of the 2 key-value heads, for which the arena has weights, got {n}", replaced(heads=n))
                    for n in (0, 3, -2, 1 << 20, 1 << 60)
                ),
                (
                    "heads must be a multiple of the 0 key-value heads, for which the arena has weights, got 4",
                    replaced(kv=lambda kv: kv[:, :, :, :0].contiguous()),
                ),
                *(
                    (f"inner must be the width of the MLP, for which the arena has weights, got {n}", replaced(inner=n))
                    for n in (0, -1, 1 << 30, 1 << 62)
                ),
                *(
                    (f"length must be 0 to 45 (tokens that kv holds, less the new ones), got {n}", replaced(length=n))
                    for n in (-1, 46, 1 << 62)
                ),
                ("positions must be contiguous int64 with 6 elements, got Int with 6", replaced(positions=lambda p: p.int())),
                ("positions must be contiguous int64 with 6 elements, got Long with 3", replaced(positions=lambda p: p[0])),
                ("positions must be contiguous int64 with 6 elements, got Long with 6", replaced(positions=lambda p: p.T.contiguous().T)),
                ("cos must be contiguous float32 (positions, 8), got 2-D Double", replaced(cos=lambda c: c.double())),
                ("cos must be contiguous float32 (positions, 8), got 2-D Float", replaced(cos=lambda c: c[:, :7].contiguous())),
                ("cos must be contiguous float32 (positions, 8), got 2-D Float", replaced(cos=lambda c: c[::2])),
                ("cos must be contiguous float32 (positions, 8), got 1-D Float", replaced(cos=lambda c: c[0])),
                ("sin must be of the shape and dtype of cos, got 2-D Half", replaced(sin=lambda s: s.half())),
                ("sin must be of the shape and dtype of cos, got 2-D Float", replaced(sin=lambda s: s[1:])),
                ("sin must be of the shape and dtype of cos, got 1-D Float", replaced(sin=lambda s: s[0])),
                ("sin must be of the shape and dtype of cos, got 2-D Float", replaced(sin=lambda s: s.T.contiguous().T)),
                ("starts must be contiguous int64 with 2 elements, got Long with 1", replaced(starts=lambda s: s[:1])),
                ("starts must be contiguous int64 with 2 elements, got Float with 2", replaced(starts=lambda s: s.float())),
                *(
                    (f"vocabulary must be the rows of a head that the arena has, or 0, got {n}", replaced(vocabulary=n))
                    for n in (-1, 1 << 30, 1 << 62)
                ),
                ("activation must be silu or gelu_tanh, got relu", replaced(activation="relu")),
                *((f"softcap must be 0 or positive, got {n:g}", replaced(softcap=n)) for n in (-1.0, math.inf, math.nan)),
            )
        ),
        *(
            Bad(f"sparse_linear_decode: {message}", spoil, traced=False)
            for message, spoil in (
                ("positions must be 0 to 299, got -1", replaced(positions=torch.tensor([[0, 1, 2], [3, -1, 4]]))),
                ("positions must be 0 to 299, got 300", replaced(positions=torch.tensor([[0, 1, 2], [3, 300, 4]]))),
                *(
                    (f"plan must name lines of cos, got {at} beside position", in_plan(1, "rope", at))
                    for at in (300, 1 << 62, (1 << 63) - 1)
                ),
                ("starts must be 0 to 20 (length), got 21", replaced(starts=torch.tensor([0, 21]))),
                ("starts must be 0 to 20 (length), got -1", replaced(starts=torch.tensor([-1, 0]))),
                ("plan must have a norm in each layer, got none in layer 1", in_plan(1, "post_norm", -1)),
                ("plan must name offsets inside the arena, got -1", in_plan(1, "down", -1)),
                *(
                    (f"plan must name offsets inside the arena, got {at}", in_plan(1, "gate", at))
                    for at in (1 << 30, 1 << 62, (1 << 63) - 1, -(1 << 63))
                ),
                *(
                    (f"plan must name places among the vectors, got {at}", in_plan(1, part, at))
                    for at in (1 << 20, (1 << 63) - 1)
                    for part in ("input_norm", "v_bias")
                ),
                ("arena must be intact, got a packed weight that leaves it", in_arena("<q", 40, 1 << 40)),
                ("arena must be intact, got a packed weight that leaves it", in_arena("<q", 40, -1)),
                ("arena must be intact, got an array too short for a header", in_arena("<q", 40, 63)),
                ("arena must be intact, got an array that does not begin with the format's magic", in_arena("<Q", 0, 7)),
                ("arena must be intact, got a format version from the future", in_arena("<I", 8, 2)),
                ("arena must be intact, got offsets out of order", in_arena("<q", 72, 1 << 62)),
                ("arena must be intact, got a panel of the wrong length", in_arena("<q", 32, 65)),
                ("arena must hold 98 x 64", replaced(inner=98)),
                ("arena must hold 49 x 64", replaced(vocabulary=49)),
                ("arena must hold 32 x 64", lambda args: in_plan(0, "k", 0)(args)),
                ("arena must hold 64 x 63", replaced(hidden=torch.ones(2, 3, 63))),
            )
        ),
    ],
)

CASES: dict[str, Case] = {
    case.op: case
    for case in (
        *(_LINEAR, _GROUP_OP, _GATED, _PACK, _UNPACK, _CHECK, _COMPRESS, _EXPAND, _ATTEND, _DECODE),
        *cases_kv_pages.CASES,
        *cases_kv_prefill.CASES,
        *cases_kv_select.CASES,
    )
}
