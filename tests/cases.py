"""Every op once: arguments, what must come out and how exactly, what trains, what must fail.

The generic tests in core/test_ops.py drive each case through every instruction set, thread count, tracer and kind of argument.
"""

import functools
import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Args = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Good arguments, and what the op must make of them."""

    name: str
    args: Args
    expected: Callable[[], tuple[Tensor, Tensor | float]]  # the result (float64 where it is not exact), and how far off each element may be


@dataclass(frozen=True)
class Bad:
    """Arguments an op must refuse: the message, and what spoils good arguments."""

    message: str
    spoil: Callable[[Args], Args]
    traced: bool = True  # whether the fake must refuse them too; it cannot where the contents of a tensor are at fault


@dataclass(frozen=True)
class Case:
    """One op."""

    op: str
    samples: Callable[[], list[Sample]]
    few: Callable[[], list[Sample]]  # one or two of each kind, for what takes long: tracers, opcheck, the reference under every stride
    bad: list[Bad]
    trains: tuple[str, ...] = ()
    dense: Callable[[Args], Tensor] | None = None  # the same function in differentiable PyTorch, for the gradients
    mutates: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()  # arguments that may have any strides
    batched: str | None = None  # the argument whose first dimension may be dynamic
    dynamic_shape: bool = False  # the shape of the result depends on data


# ------------------------------------------------------------------------------------------------------------------------- sparse_linear
# An independent model of the documented arithmetic, in numpy: codes and scales in float32, element by element as the header file and the
# docstrings say, sums in float64.

DTYPES, LAYOUTS = ("fp32", "bf16", "int8"), ("dense", "sparse")
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


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes in [-127, 127] and the scale of each row."""
    scale = (np.abs(x).max(-1, initial=0) / np.float32(127)).astype(np.float32)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
        inverse = np.where((scale > 0) & np.isfinite(inverse), inverse, 0).astype(np.float32)
        codes = np.clip(np.rint(x * inverse[..., None]), -127, 127)
    return codes.astype(np.float32), scale


def stored(weight: Tensor, dtype: str) -> np.ndarray:
    """The float32 weight that a packed one stands for."""
    w = numpy32(weight)
    if dtype == "fp32":
        return w
    if dtype == "bf16":
        return round_bf16(w)
    codes, scale = quantize(w)
    return codes * scale[:, None]


def product(x: Tensor, weight: Tensor, dtype: str, bias: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """The product that `sparse_linear` computes, in float64, and a bound on the rounding errors of any order of float32 sums."""
    w = stored(weight, dtype).astype(np.float64)
    v = numpy32(x).reshape(-1, x.shape[-1]) if x.shape[-1] else np.zeros((x.shape[:-1].numel(), 0), np.float32)
    inputs = v.shape[1]
    if dtype == "bf16":
        v = round_bf16(v)
    if dtype == "int8":
        padded = np.pad(v, ((0, 0), (0, -inputs % group))).reshape(len(v), -(-inputs // group), group)
        codes, scale = quantize(padded)
        v = (codes.astype(np.float64) * scale[..., None].astype(np.float64)).reshape(len(v), -(-inputs // group) * group)[:, :inputs]
    v = v.astype(np.float64)
    b = np.zeros(len(w)) if bias is None else numpy32(bias).astype(np.float64)
    exact, size = v @ w.T + b, np.abs(v) @ np.abs(w).T + np.abs(b)
    terms = (-(-inputs // group) if dtype == "int8" else inputs) + 4  # rounded additions and products; integer sums are exact
    bound = 1.01 * terms * 2.0**-24 * size + (inputs + 1) * 2.0**-126
    bound += _UNIT[x.dtype] * (np.abs(exact) + bound) + _TINY[x.dtype]
    shape = (*x.shape[:-1], len(w))
    return torch.from_numpy(exact).reshape(shape), torch.from_numpy(bound).reshape(shape)


def pack_by_hand(weight: Tensor, dtype: str, layout: str) -> bytes:
    """The packed format, written as the drawing in kernels/sparse_linear/sparse_linear.h reads."""
    w, group = numpy32(weight), _GROUP[dtype]
    outputs, inputs = w.shape
    scale = np.zeros(outputs, np.float32)
    if dtype == "int8":
        codes, scale = quantize(w)
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
    first = -(-(64 + 8 * (panels + 1)) // 64) * 64
    offsets = [first, *itertools.accumulate((len(s) for s in streams), initial=first)][1:]
    total = offsets[-1] + 64
    header = b"\x01TCESPL\0" + struct.pack(
        "<IIIIqqqqq", 1, DTYPES.index(dtype), LAYOUTS.index(layout), 0, outputs, inputs, total, int(nonzero.sum()), 0
    )
    return (header + np.array(offsets, "<i8").tobytes()).ljust(first, b"\0") + b"".join(streams) + bytes(64)


SIZES = (0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 191, 255, 257)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 20)
SPARSITIES = (0.0, 0.5, 0.9, 1.0, "one")


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


def linear_sample(
    shape: tuple[int, ...], weight: Tensor, dtype: str, layout: str, kind: torch.dtype, bias: torch.dtype | None, group: int, name: str = ""
) -> Sample:
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(hash((shape, outputs, inputs, group)) & 0xFFFF)
    x = torch.randn(*shape, inputs, generator=generator).to(kind)
    b = None if bias is None else torch.randn(outputs, generator=generator).to(bias)
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout)
    args = {"input": x, "packed": packed, "bias": b, "out_features": outputs, "activation_group": group}
    name = name or f"{dtype} {layout} {shape} x {outputs} x {inputs} {kind} bias={bias} group={group}"
    return Sample(name, args, functools.cache(lambda: product(x, weight, dtype, b, group)))


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
        samples += [linear_sample((m,), weight, dtype, layout, kind, None, 64) for m in range(1, 21)]
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
        ]
    ]


def _dense_linear(args: Args) -> Tensor:
    """Straight through the rounding of the input, as the op's gradient is defined."""
    weight = torch.ops.torch_cpu_ext.sparse_linear_unpack(args["packed"], args["out_features"], args["input"].shape[-1])
    return torch.nn.functional.linear(args["input"].double(), weight.double(), None if args["bias"] is None else args["bias"].double())


def replaced(**values: Any) -> Callable[[Args], Args]:
    """Spoils arguments by other values; a callable gets the good value."""
    return lambda args: args | {name: value(args[name]) if callable(value) else value for name, value in values.items()}


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
        Bad(damaged + "an unknown dtype code", replaced(packed=patched("<I", 12, 3)), traced=False),
        Bad(damaged + "an unknown layout code", replaced(packed=patched("<I", 16, 2)), traced=False),
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
        Bad("sparse_linear: activation_group must be 32 or 64, got 0", replaced(activation_group=0)),
        Bad("sparse_linear: activation_group must be 32 or 64, got -32", replaced(activation_group=-32)),
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


def pack_sample(weight: Tensor, dtype: str, layout: str) -> Sample:
    def expected() -> tuple[Tensor, float]:
        packed = {one: pack_by_hand(weight, dtype, one) for one in (LAYOUTS if layout == "auto" else [layout])}
        best = min(packed.values(), key=len)  # on a tie the first, dense
        return torch.frombuffer(bytearray(best), dtype=torch.uint8), 0

    shape = " x ".join(map(str, weight.shape))
    return Sample(
        f"{dtype} {layout} {shape} {weight.dtype}", {"weight": weight, "dtype": dtype, "layout": layout}, functools.cache(expected)
    )


@functools.cache
def _pack_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    sparsities, kinds, layouts = itertools.cycle(SPARSITIES), itertools.cycle(FLOATS.values()), itertools.cycle(("auto", *LAYOUTS))
    sizes = (0, 1, 15, 16, 17, 33, 64, 65, 127, 257)
    return [
        pack_sample(random_weight(outputs, inputs, next(sparsities), generator).to(next(kinds)), dtype, next(layouts))
        for dtype, outputs, inputs, _ in itertools.product(DTYPES, sizes, sizes, range(2))
    ]


@functools.cache
def _few_pack() -> list[Sample]:
    generator = torch.Generator().manual_seed(4)
    return [
        pack_sample(random_weight(17, 33, 0.5, generator), dtype, layout) for dtype, layout in zip(DTYPES, ("auto", *LAYOUTS), strict=True)
    ]


_PACK = Case(
    op="sparse_linear_pack",
    samples=_pack_samples,
    few=_few_pack,
    strided=("weight",),
    dynamic_shape=True,
    bad=[
        *_wrong_types("sparse_linear_pack", "weight"),
        Bad("sparse_linear_pack: weight must be 2-D (out_features, in_features), got 1-D", replaced(weight=lambda w: w[0])),
        Bad("sparse_linear_pack: weight must be 2-D (out_features, in_features), got 3-D", replaced(weight=lambda w: w[None])),
        Bad("sparse_linear_pack: dtype must be fp32, bf16 or int8, got fp16", replaced(dtype="fp16")),
        Bad("sparse_linear_pack: dtype must be fp32, bf16 or int8, got ", replaced(dtype="")),
        Bad("sparse_linear_pack: layout must be auto, sparse or dense, got Sparse", replaced(layout="Sparse")),
        *(
            Bad(
                "sparse_linear_pack: weight must be finite to be packed as int8, got NaN or an infinity",
                replaced(dtype="int8", weight=lambda w, value=value: w.clone().index_fill_(1, torch.tensor([w.shape[1] - 1]), value)),
                traced=False,
            )
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
    ],
)


def unpack_sample(weight: Tensor, dtype: str, layout: str, kind: str) -> Sample:
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout)
    args = {"packed": packed, "out_features": weight.shape[0], "in_features": weight.shape[1], "dtype": kind}
    return Sample(
        f"{dtype} {layout} {' x '.join(map(str, weight.shape))} to {kind}",
        args,
        functools.cache(lambda: (torch.from_numpy(stored(weight, dtype)).to(FLOATS[kind]), 0.0)),
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
        for dtype, layout, kind in [("fp32", "sparse", "fp32"), ("bf16", "dense", "bf16"), ("int8", "sparse", "fp16")]
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
    packed = torch.ops.torch_cpu_ext.sparse_linear_pack(weight, dtype=dtype, layout=layout)
    nonzeros = int(np.count_nonzero(quantize(numpy32(weight))[0] if dtype == "int8" else stored(weight, dtype)))
    facts = torch.tensor([1, DTYPES.index(dtype), LAYOUTS.index(layout), *weight.shape, nonzeros])
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
    return [check_sample(random_weight(33, 67, 0.5, generator), dtype, layout) for dtype, layout in [("bf16", "sparse"), ("int8", "dense")]]


_CHECK = Case(op="sparse_linear_check", samples=_check_samples, few=_few_check, bad=_wrong_packed("sparse_linear_check"))

CASES: dict[str, Case] = {case.op: case for case in (_LINEAR, _PACK, _UNPACK, _CHECK)}
