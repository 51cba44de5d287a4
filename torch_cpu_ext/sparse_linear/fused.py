"""The ops that multiply one input with several packed weights: schema, fake, reference and autograd of each, side by side."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.checks import FLOATS
from ..core.registry import define
from .decode import ACTIVATIONS
from .ops import _check_linear, _linear_reference


@contextlib.contextmanager
def _named(op: str, packed: str = "packed", bias: str = "bias") -> Iterator[None]:
    """Errors of `linear` in the name of another op, and of its arguments in place of ``packed`` and ``bias``."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"sparse_linear: (\w+)", str(error))
        if found is None:
            raise
        name = {"packed": packed, "bias": bias}.get(found[1], found[1])
        raise RuntimeError(f"{op}: {name}{str(error)[found.end() :]}") from error


# ----------------------------------------------------------------------------------------------------------------------------------- group


def group(
    input: Tensor, packed: list[Tensor], bias: list[Tensor], out_features: list[int], *, activation_group: int = 32, stream_rows: int = 0
) -> list[Tensor]:
    """Several products of one input, as `linear` computes them, in one call: the input is prepared once, and threads are woken once.

    Meant for the query, key and value projections of attention.

    Args:
        input: ``(..., in_features)``, float32, bfloat16 or float16, any strides.
        packed: the weights, as `pack` made them; at least one. Their dtypes may differ.
        bias: for each weight its bias, as in `linear`; an empty list: there are none.
        out_features: rows of each weight.
        activation_group: as in `linear`.
        stream_rows: as in `linear`.
    Returns:
        For each weight ``(..., out_features)``, dtype of ``input``; the same bits as `linear` gives.
    Raises:
        RuntimeError: the lists differ in length, or as for `linear`.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_group(
        input, packed, bias, out_features, activation_group=activation_group, stream_rows=stream_rows
    )


_Part = tuple[Tensor, Tensor | None, int]


def _parts(packed: list[Tensor], bias: list[Tensor], out_features: list[int]) -> list[_Part]:
    """Weight, bias and features of each product, checked for their number."""
    torch._check(
        len(packed) == len(out_features) > 0 and len(bias) in (0, len(packed)),
        lambda: (
            "sparse_linear_group: packed, out_features and bias must be lists of one length, at least 1 (bias: or 0), "
            f"got {len(packed)}, {len(out_features)} and {len(bias)}"
        ),
    )
    biases: list[Tensor | None] = list(bias) or [None] * len(packed)
    return list(zip(packed, biases, out_features, strict=True))


def _group_fake(
    input: Tensor, packed: list[Tensor], bias: list[Tensor], out_features: list[int], *, activation_group: int = 32, stream_rows: int = 0
) -> list[Tensor]:
    with _named("sparse_linear_group"):
        for part in _parts(packed, bias, out_features):
            _check_linear(input, *part, activation_group, stream_rows)
    return [input.new_empty((*input.shape[:-1], features)) for features in out_features]


def _group_reference(input: Tensor, packed: list[Tensor], bias: list[Tensor], out_features: list[int], **options: Any) -> list[Tensor]:
    with _named("sparse_linear_group"):
        return [_linear_reference(input, *part, **options) for part in _parts(packed, bias, out_features)]


def _group_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any] | None = None, output: Any = None) -> None:
    input, packed, bias, ctx.out_features = inputs
    ctx.save_for_backward(*packed)
    ctx.shape, ctx.bias_dtypes = input.shape, [one.dtype for one in bias]


def _times_weight(grad: Tensor, packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """``grad @ weight`` in the dtype of ``grad``."""
    name = next(name for name, kind in FLOATS.items() if kind == grad.dtype)
    return grad @ torch.ops.torch_cpu_ext.sparse_linear_unpack(packed, out_features, in_features, dtype=name)


def _group_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """As that of `linear`: made of known ops, hence differentiable again."""
    grad_input, sizes, count = None, ctx.out_features, len(ctx.out_features)
    if ctx.needs_input_grad[0]:
        parts = [_times_weight(*part, ctx.shape[-1]) for part in zip(grads, ctx.saved_tensors, sizes, strict=True)]
        grad_input = torch.stack(parts).sum(0)
    grad_bias = [
        grad.reshape(-1, size).sum(0).to(dtype) if needed else None
        for grad, size, dtype, needed in zip(grads, sizes, ctx.bias_dtypes, ctx.needs_input_grad[2], strict=False)
    ]
    return grad_input, [None] * count, grad_bias, None


define(
    "sparse_linear_group(Tensor input, Tensor[] packed, Tensor[] bias, int[] out_features, *, int activation_group=32, int stream_rows=0) "
    "-> Tensor[]",
    fake=_group_fake,
    reference=_group_reference,
    setup=_group_setup,
    backward=_group_backward,
)


# ----------------------------------------------------------------------------------------------------------------------------------- gated


def gated(
    input: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    *,
    activation: str = "silu",
    activation_group: int = 32,
    stream_rows: int = 0,
) -> Tensor:
    """``activation(input @ gate.T + gate_bias) * (input @ up.T + up_bias)`` with packed weights: the first half of a gated MLP.

    The input is prepared once, as in `linear`. Products and activation stay in float32 up to the result, which does not depend on the
    number of threads.

    Args:
        input: ``(..., in_features)``, float32, bfloat16 or float16, any strides.
        gate: weight of the gate, as `pack` made it.
        up: weight of what the gate multiplies, of the same shape; its dtype may differ.
        gate_bias: ``(out_features,)``, float32, bfloat16 or float16, or None.
        up_bias: likewise.
        out_features: rows of each weight.
        activation: ``"silu"`` or ``"gelu_tanh"``.
        activation_group: as in `linear`.
        stream_rows: as in `linear`.
    Returns:
        ``(..., out_features)``, dtype of ``input``. Backward computes both products again rather than keep them.
    Raises:
        RuntimeError: ``activation`` is none of those, or as for `linear`.
    """
    return torch.ops.torch_cpu_ext.sparse_linear_gated(
        *(input, gate, up, gate_bias, up_bias, out_features),
        **{"activation": activation, "activation_group": activation_group, "stream_rows": stream_rows},
    )


_GATED = "sparse_linear_gated"


def _check_gated(
    input: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    *,
    activation: str = "silu",
    activation_group: int = 32,
    stream_rows: int = 0,
) -> None:
    torch._check(activation in ACTIVATIONS, lambda: f"{_GATED}: activation must be silu or gelu_tanh, got {activation}")
    with _named(_GATED, "gate", "gate_bias"):
        _check_linear(input, gate, gate_bias, out_features, activation_group, stream_rows)
    with _named(_GATED, "up", "up_bias"):
        _check_linear(input, up, up_bias, out_features, activation_group, stream_rows)


def _gated_fake(
    input: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, out_features: int, **options: Any
) -> Tensor:
    _check_gated(input, gate, up, gate_bias, up_bias, out_features, **options)
    return input.new_empty((*input.shape[:-1], out_features))


def _activate(x: Tensor, activation: str) -> Tensor:
    return torch.nn.functional.silu(x) if activation == "silu" else torch.nn.functional.gelu(x, approximate="tanh")


def _slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of `_activate`; PyTorch's own has no second one for silu."""
    if activation == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    c, cubic = math.sqrt(2 / math.pi), 0.044715
    t = (c * (x + cubic * x**3)).tanh()
    return (1 + t + x * (1 - t * t) * c * (1 + 3 * cubic * x * x)) / 2


def _gated_reference(
    input: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    *,
    activation: str = "silu",
    activation_group: int = 32,
    stream_rows: int = 0,
) -> Tensor:
    options: dict[str, Any] = {"activation_group": activation_group, "stream_rows": stream_rows}
    _check_gated(input, gate, up, gate_bias, up_bias, out_features, activation=activation, **options)
    x = input.float()
    with _named(_GATED, "gate", "gate_bias"):
        gates = _linear_reference(x, gate, gate_bias, out_features, **options)
    with _named(_GATED, "up", "up_bias"):
        ups = _linear_reference(x, up, up_bias, out_features, **options)
    return (_activate(gates, activation) * ups).to(input.dtype)


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *tensors, ctx.out_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = keyword_only_inputs


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Made of known ops, hence differentiable again."""
    input, gate, up, gate_bias, up_bias = ctx.saved_tensors
    product, features = torch.ops.torch_cpu_ext.sparse_linear, ctx.out_features
    group, rows = ctx.options["activation_group"], ctx.options["stream_rows"]
    x, grad = input.float(), grad.float()
    gates = product(x, gate, gate_bias, features, activation_group=group, stream_rows=rows)
    ups = product(x, up, up_bias, features, activation_group=group, stream_rows=rows)
    grad_up = grad * _activate(gates, ctx.options["activation"])
    grad_gate = grad * ups * _slope(gates, ctx.options["activation"])
    result: list[Tensor | None] = [None] * 6
    if ctx.needs_input_grad[0]:
        width = input.shape[-1]
        result[0] = (_times_weight(grad_gate, gate, features, width) + _times_weight(grad_up, up, features, width)).to(input.dtype)
    for at, bias, part in ((3, gate_bias, grad_gate), (4, up_bias, grad_up)):
        if ctx.needs_input_grad[at]:
            result[at] = part.reshape(-1, features).sum(0).to(bias.dtype)
    return tuple(result)


define(
    "sparse_linear_gated(Tensor input, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, int out_features, *, "
    'str activation="silu", int activation_group=32, int stream_rows=0) -> Tensor',
    fake=_gated_fake,
    reference=_gated_reference,
    setup=_gated_setup,
    backward=_gated_backward,
)
