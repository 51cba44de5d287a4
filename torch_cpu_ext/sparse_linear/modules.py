"""`SparseLinear`, the drop-in for ``nn.Linear``."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..core import jit, memory
from ..core.checks import FLOATS
from ..core.swap import Replacement, Row, tensor_bytes
from . import ops
from .config import SparseLinearConfig
from .pruning import has_pattern, magnitude_mask


def packed_pattern(weight: Tensor, config: SparseLinearConfig) -> str:
    """The ``pattern`` for `ops.pack`: that of the config if the weight has it, and the structured layout may be chosen and can hold it."""
    possible = config.layout == "auto" and config.dtype != "int4" and ops.structured_pattern(config.pattern) is not None
    return config.pattern if possible and has_pattern(weight, config.pattern) else "unstructured"


_CONSTANT = (
    "the packed weight of a SparseLinear is a constant and cannot be set or trained; gradients reach the input and the bias. "
    "torch_cpu_ext.restore(model) gives an nn.Linear that trains"
)


class SparseLinear(Replacement):
    """``y = x @ weight.T + bias`` with a packed weight of fewer bytes, which takes less time where memory is the limit (arXiv:2502.12444).

    Made from a trained layer by `from_linear` or, for a whole model, by `torch_cpu_ext.optimize`. The packed weight is a constant:
    gradients reach the input and the bias (enough for adapters on top). It is a buffer, so ``state_dict``, safetensors, ``deepcopy`` and
    export work.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``; checked when weights are loaded.
        activation_group: inputs that share a scale when an int8 or int4 layer quantises its input, 32 or 64 (int4: 32).
        group_size: inputs that share a scale in an int4 weight; used when a dense weight is loaded, a packed one says its own.
        symmetric: whether the grid of an int4 weight is centred on zero; used likewise.
        device: of the (empty) parameters; ``"meta"`` is fine.

    A layer made by the constructor holds no weights until ``load_state_dict`` brings them, packed (key ``packed``) or dense (key
    ``weight``, packed while loading).

    Shape: input ``(..., in_features)`` of float32, bfloat16 or float16 in any strides; output ``(..., out_features)`` of the same dtype.
    """

    technique = "sparse_linear"
    packed: Tensor
    __jit_unused_properties__ = ["weight", "layout", "pattern", "sparsity"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: str = "int8",
        activation_group: int = 32,
        group_size: int = 32,
        symmetric: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        config = SparseLinearConfig(dtype=dtype, activation_group=activation_group, group_size=group_size, symmetric=symmetric)
        self.dtype = config.dtype
        self.activation_group = config.activation_group
        self.group_size = config.group_size
        self.symmetric = config.symmetric
        self.weight_dtype = torch.float32  # of the dense weight that `weight` and `to_linear` give
        self.weight_requires_grad = True
        self.stream_rows = 0  # set by `torch_cpu_ext.tune`
        self._original: tuple[Tensor, ...] = ()  # a dense weight that lives on: tied to another module, or kept on request
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SparseLinearConfig | None = None, *, tied: bool = False) -> "SparseLinear":
        """Packs a layer's weight; the bias is shared with it.

        Args:
            linear: the layer; it stays as it is. If `torch_cpu_ext.prune` quantised it to the dtype of the config, it is packed with the
                same scales, so that nothing more is lost, and their ``group_size`` and ``symmetric`` count.
            config: None for the default.
            tied: the weight belongs to another module too: it is not pruned, and `to_linear` gives back the very same parameter.
        Raises:
            ValueError: the weight is on another device than the CPU, or has NaN or infinities where pruning or codes need
                numbers, or for int4 values beyond float16.
            TypeError: the weight is not float32, bfloat16 or float16.
        """
        config = config or SparseLinearConfig()
        weight = linear.weight
        if weight.device.type != "cpu":
            raise ValueError(f"from_linear: linear.weight must be on the CPU, got {weight.device}")
        if weight.dtype not in FLOATS.values():
            raise TypeError(f"from_linear: linear.weight must be float32, bfloat16 or float16, got {weight.dtype}")
        dense = weight.detach()
        if config.dtype in ("int8", "int4") and not bool(dense.isfinite().all()):
            raise ValueError(f"from_linear: linear.weight must be finite to be packed as {config.dtype}, got NaN or an infinity")
        if config.dtype == "int4" and bool((dense.abs() > ops.INT4_LIMIT).any()):
            raise ValueError(
                f"from_linear: linear.weight must be within the range of float16 to be packed as int4, got {dense.abs().max():g}"
            )
        if config.sparsity is not None and not tied:
            dense = dense * magnitude_mask(dense, config.sparsity, config.granularity, config.pattern)
        group_size, symmetric = config.group_size, config.symmetric
        scale: Tensor | None = None
        minimum: Tensor | None = None
        grid = getattr(linear, "quantization_grid", None)  # of `prune`; of no use if the weight changed since
        if grid is not None and config.sparsity is None and grid.dtype == config.dtype and grid.holds(dense):
            scale, minimum = grid.scale, grid.minimum
            if config.dtype == "int4":
                group_size, symmetric = grid.group_size, minimum is None
        result = cls(
            linear.in_features,
            linear.out_features,
            False,
            dtype=config.dtype,
            activation_group=config.activation_group,
            group_size=group_size,
            symmetric=symmetric,
        )
        result.packed = ops.pack(
            dense,
            dtype=config.dtype,
            layout=config.layout,
            group_size=group_size,
            symmetric=symmetric,
            scale=scale,
            minimum=minimum,
            pattern=packed_pattern(dense, config),
        )
        result.bias = linear.bias
        result.weight_dtype, result.weight_requires_grad = weight.dtype, weight.requires_grad
        if tied or config.keep_original:
            result._original = (linear.weight,)
        return result.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the weights this layer computes with, or the original ones where they were kept or are tied."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.weight_dtype)
        weight = self._original[0] if self._original else nn.Parameter(self.weight, requires_grad=self.weight_requires_grad)
        linear.register_parameter("weight", cast(nn.Parameter, weight))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    original = to_linear

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.torch_cpu_ext.sparse_linear(
            input, self.packed, self.bias, self.out_features, activation_group=self.activation_group, stream_rows=self.stream_rows
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module for False; True is refused, since the weight would not train. Ask the bias itself for gradients.

        Raises:
            RuntimeError: ``requires_grad`` is True.
        """
        if requires_grad:
            raise RuntimeError(f"requires_grad_: {_CONSTANT}")
        return super().requires_grad_(False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; a ``weight`` is refused."""
        if name == "weight":
            raise AttributeError(f"weight: {_CONSTANT}")
        super().register_parameter(name, param)

    @property
    def weight(self) -> Tensor:
        """The dense weight, ``(out_features, in_features)``; a copy, unpacked anew at every access, hence slow and read-only.

        What happens to the copy does not reach the layer: it has no gradient, and an optimizer that is given it trains nothing.
        """
        name = next(name for name, kind in FLOATS.items() if kind == self.weight_dtype)
        return ops.unpack(self.packed, self.out_features, self.in_features, dtype=name)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(f"weight: {_CONSTANT}")

    def _has_weights(self) -> bool:
        return self.packed.numel() > 0 and not self.packed.is_meta

    @property
    def layout(self) -> str:
        """``"dense"``, ``"sparse"`` or ``"structured"``, or ``"empty"`` before weights are loaded."""
        return ops.LAYOUT_NAMES[int(self.packed[16])] if self._has_weights() else "empty"

    @property
    def pattern(self) -> str:
        """``"n:m"`` of a structured weight, which a dense one that is loaded keeps if it can; else ``"unstructured"``."""
        if self.layout != "structured":
            return "unstructured"
        return f"{int(self.packed[20:24].clone().view(torch.int32))}:{int(self.packed[56:64].clone().view(torch.int64))}"

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero once rounded to the dtype."""
        if not self._has_weights():
            return 0.0
        return 1 - int(self.packed[48:56].clone().view(torch.int64)) / max(1, self.in_features * self.out_features)

    def row(self) -> Row:
        return Row(
            technique=self.technique,
            kind=f"{self.dtype} {self.layout}",
            bytes_before=self.in_features * self.out_features * self.weight_dtype.itemsize + tensor_bytes([self.bias]),
            bytes_after=tensor_bytes([self.packed, self.bias]),
            isa=jit.kernel_isa(self.technique, self.dtype),
            detail=f"{self.out_features}x{self.in_features}, sparsity {self.sparsity:.2f}"
            + (", original kept or tied" if self._original else ""),
        )

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": self.dtype,
            "activation_group": self.activation_group,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_spec(cls, values: dict[str, Any], module: nn.Module) -> "SparseLinear":
        arguments = dict(values)
        weight_dtype = getattr(torch, arguments.pop("weight_dtype"))
        result = cls(**arguments, device="meta")
        result.weight_dtype = weight_dtype
        return result

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Moves the packed weights of a model into one array in huge pages, of which the layers keep views; one layer at a time."""
        layers = [module for module in model.modules() if isinstance(module, SparseLinear) and module._has_weights()]
        ends = list(accumulate((-(-layer.packed.numel() // 64) * 64 for layer in layers), initial=0))
        with torch.inference_mode(False):  # else no gradient could pass a layer later
            arena = memory.zeros(ends[-1])
            for layer, start in zip(layers, ends, strict=False):
                layer.packed = arena[start : start + layer.packed.numel()].copy_(layer.packed)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.dtype}, "
            f"layout={self.layout}, sparsity={self.sparsity:.2f}, bytes={self.packed.numel()}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        """Casts (``half()``, ``to(dtype)``) reach the bias; the dense weight of `weight` and `to_linear` follows."""
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        if dtype in FLOATS.values() and dtype != self.weight_dtype:
            self.weight_dtype = dtype
            for weight in self._original:
                weight.data = weight.data.to(dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        """Takes ``packed`` of any length, after a check, or a dense ``weight``, which it packs; nothing changes if that fails."""
        packed, weight = state_dict.get(prefix + "packed"), state_dict.get(prefix + "weight")
        errors = args[-1]
        if packed is None and weight is not None:
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
            if tuple(weight.shape) != (self.out_features, self.in_features):
                errors.append(f"{prefix}weight must be {(self.out_features, self.in_features)}, got {tuple(weight.shape)}")
                return
            try:
                pattern = self.pattern if has_pattern(weight, self.pattern) else "unstructured"
                packed = ops.pack(weight, dtype=self.dtype, group_size=self.group_size, symmetric=self.symmetric, pattern=pattern)
                state_dict[prefix + "packed"] = packed
            except RuntimeError as error:
                errors.append(f"{prefix}weight: {error}")
                return
            self.weight_dtype = weight.dtype
        elif packed is not None and packed.device.type != "meta":
            try:
                _, dtype, _, outputs, inputs, *_ = ops.check(packed).tolist()
            except RuntimeError as error:
                errors.append(f"{prefix}packed: {error}")
                return
            found, wanted = (ops.DTYPES[dtype], outputs, inputs), (self.dtype, self.out_features, self.in_features)
            if found != wanted:
                errors.append(f"{prefix}packed must hold (dtype, out_features, in_features) = {wanted}, got {found}")
                return
        if packed is not None and packed.shape != self.packed.shape:
            self.packed = torch.empty_like(packed, device=self.packed.device)
        self._original = ()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def packed_layers(model: nn.Module, caller: str) -> list[SparseLinear]:
    """The `SparseLinear` layers of a model, at least one and all with weights; else an error in the name of the function that asks."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if not layers:
        raise ValueError(f"{caller}: model must have packed layers, as optimize makes them, got none")
    if any(layer.layout == "empty" for layer in layers):
        raise ValueError(f"{caller}: model must have weights, got a layer without")
    return layers
