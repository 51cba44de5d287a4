"""Packed models through transformers' own ``from_pretrained`` and ``save_pretrained``.

Importing this module registers the quantization method ``torch_cpu_ext`` with transformers. `TorchCpuExtConfig` packs a dense checkpoint
while it is loaded, one weight after the other; a checkpoint saved by ``save_pretrained`` is loaded as it is.
"""

import ctypes
import dataclasses
import logging
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import FLOATS
from ..core.swap import put, restore, select
from ..sparse_linear import SparseLinear, SparseLinearConfig, ops, swap_linear
from ..sparse_linear.conv1d import SparseConv1D
from ..sparse_linear.swap import join, layer_classes, stand_in

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"transformers 5 must be installed: pip install 'torch_cpu_ext[transformers]' ({error})", name=error.name) from error

METHOD = "torch_cpu_ext"
_log = logging.getLogger("torch_cpu_ext.transformers")
_RELEASE_BYTES = 32 << 20  # dense bytes that are packed between two calls of `_release`
_MADV_PAGEOUT = 21  # Linux 5.4; Python's mmap module does not have it


@register_quantization_config(METHOD)
class TorchCpuExtConfig(QuantizationConfigMixin):
    """``from_pretrained(..., quantization_config=TorchCpuExtConfig(dtype="int8"))`` packs the linear layers of a model while it loads.

    Args:
        modules_to_not_convert: names of modules to leave alone, in the form of the ``exclude`` of `torch_cpu_ext.optimize`, strings only;
            None packs all linear layers, a tied ``lm_head`` too.
        version: of the fields, as ``config.json`` has it.
        quant_method: as ``config.json`` has it.
        fields: those of `SparseLinearConfig`, by name.
    Raises:
        ValueError: a field or its value is not one of `SparseLinearConfig`, or a newer version wrote it.
    """

    quant_method: Any  # transformers takes other strings than those of its enum

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        version: int = SparseLinearConfig.version,
        quant_method: str = METHOD,
        **fields: Any,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"TorchCpuExtConfig: quant_method must be {METHOD}, got {quant_method!r}")
        config = SparseLinearConfig.from_dict({"version": version, **fields})
        self.quant_method = quant_method
        self.version = SparseLinearConfig.version
        self.modules_to_not_convert = modules_to_not_convert
        for field in dataclasses.fields(config):
            setattr(self, field.name, getattr(config, field.name))

    def linear_config(self) -> SparseLinearConfig:
        """The same as a config for `torch_cpu_ext.optimize`.

        Raises:
            ValueError: a value was changed to one that is not accepted.
        """
        return SparseLinearConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SparseLinearConfig)})


@register_quantizer(METHOD)
class TorchCpuExtQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a `TorchCpuExtConfig`; there is nothing to call for users."""

    quantization_config: TorchCpuExtConfig
    requires_calibration = False

    def __init__(self, quantization_config: TorchCpuExtConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._linear_config = quantization_config.linear_config()
        self._chosen: set[str] = set()  # weights to pack while they are loaded
        self._kept = re.compile("(?!)")  # fits the weights that transformers keeps in float32
        self._files: list[str] = []
        self._unreleased = 0

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError if ``device_map`` asks for anything but the CPU."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if wrong := [str(place) for place in places if str(place) not in ("None", "auto", "cpu")]:
            raise ValueError(f"{METHOD}: device_map must be None, 'auto' or 'cpu', got {', '.join(wrong)}")

    def update_device_map(self, device_map: Any) -> None:
        """Everything goes to the CPU, which needs no map."""
        return None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> Any:
        # Their results overflow float16, in which a packed layer would return them. Names may be cut short and have a * for anything.
        names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        if names:
            self._kept = re.compile(rf"(^|\.)({'|'.join(name.replace('*', '.*') for name in names)})(\.|$)")
        self._files = [os.path.realpath(file) for file in checkpoint_files or []]
        if not self.pre_quantized:
            # Tied weights become one parameter after all are loaded; `swap_linear` packs their layers then.
            tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
            chosen = select(model, layer_classes(), self._wanted, None, self.quantization_config.modules_to_not_convert)
            self._chosen = {f"{name}.weight" for name in chosen} - tied
        return model

    def _wanted(self, layer: Any, name: str) -> bool:
        """Whether transformers and the kernels are content to have a layer packed."""
        return layer.weight.dtype in FLOATS.values() and not self._kept.search(f"{name}.weight")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight is packed as soon as it is loaded."""
        return param_name in self._chosen

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers passes those weights through."""
        return PackWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What transformers passes the packed weights of a saved model through."""
        return [WeightConverter([r"\.packed$"], [".weight"], [TakePacked(self)])] if self.pre_quantized else []

    def put(self, model: Any, weight_name: str, layer: SparseLinear, missing_keys: set[str] | None) -> None:
        """Puts a packed layer in the place of the one that has the weight ``weight_name``, whose bytes have been read for the last time."""
        name = weight_name.rpartition(".")[0]
        layer._is_hf_initialized = True  # type: ignore[assignment]
        put(model, {name: layer})
        if missing_keys is not None:
            missing_keys.discard(weight_name)
        self._unreleased += layer.out_features * layer.in_features * layer.weight_dtype.itemsize
        if self._unreleased >= _RELEASE_BYTES:
            _release(self._files)
            self._unreleased = 0

    def pack(self, model: Any, weight_name: str, weight: Tensor, missing_keys: set[str] | None) -> bool:
        """Packs a dense weight; False if its layer has to stay as it is."""
        layer = model.get_submodule(weight_name.rpartition(".")[0])
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        head = layer is model.get_output_embeddings()
        packed = stand_in(layer, self._linear_config.for_head() if head else self._linear_config)
        if isinstance(packed, str):
            return False
        self.put(model, weight_name, packed, missing_keys)
        return True

    def take(self, model: Any, weight_name: str, packed: Tensor, missing_keys: set[str] | None) -> None:
        """Puts a weight that was saved packed into the model."""
        old = model.get_submodule(weight_name.rpartition(".")[0])
        if type(old) not in layer_classes():
            raise ValueError(f"{weight_name} belongs to a {type(old).__name__}, which takes no packed weight")
        kind = SparseLinear if type(old) is nn.Linear else SparseConv1D
        _, dtype, _, outputs, inputs, _, group_size, symmetric = ops.check(packed).tolist()
        fields: dict[str, Any] = {"dtype": ops.DTYPES[dtype], "activation_group": self._linear_config.activation_group}
        if fields["dtype"] == "int4":
            fields |= {"activation_group": 32, "group_size": group_size, "symmetric": bool(symmetric)}
        layer = kind(inputs, outputs, False, **fields, device="meta")
        wanted = tuple(old.weight.shape) if kind is SparseLinear else tuple(old.weight.shape)[::-1]
        if (outputs, inputs) != wanted:
            raise ValueError(f"{weight_name} must be {wanted} (out_features, in_features), got {(outputs, inputs)}")
        layer.packed = packed.clone()  # a view of the file may begin at any address, and would change with the file
        layer.bias = old.bias
        layer.weight_dtype, layer.weight_requires_grad = old.weight.dtype, old.weight.requires_grad
        self.put(model, weight_name, layer.train(old.training), missing_keys)
        _untie(model, weight_name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:  # layers of tied weights; those that the checkpoint has no weights for are for training, and stay
            swap_linear(
                model,
                self._linear_config,
                lambda layer, name: self._wanted(layer, name) and getattr(layer.weight, "_is_hf_initialized", False),
                exclude=self.quantization_config.modules_to_not_convert,
            )
        else:
            join(model, self._linear_config)
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLinear):
                _untie(model, f"{name}.weight")
                if layer.bias is not None and not getattr(layer.bias, "_is_hf_initialized", False):  # not in the checkpoint
                    nn.init.zeros_(layer.bias)
        # Saving reverts the conversions that loading went through. Packed weights are saved as they are.
        model._weight_conversions = [one for one in model._weight_conversions if not _takes_packed(one)]
        self._chosen.clear()
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return restore(model)

    def is_serializable(self) -> bool:
        """Yes: ``save_pretrained`` writes the packed weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: a packed weight is a constant."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: a packed layer is one op."""
        return True


class PackWeight(ConversionOps):
    """Dense weights to packed layers, in the model itself: what is packed leaves the stream of tensors that transformers puts in place."""

    def __init__(self, hf_quantizer: TorchCpuExtQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, Any]:
        """Takes one or more weights by their full names (a fused weight has been split by then), gives back those that stay dense."""
        rest = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            chosen = self.hf_quantizer.param_needs_quantization(kwargs["model"], name)
            if not (chosen and self.hf_quantizer.pack(kwargs["model"], name, weight, kwargs.get("missing_keys"))):
                rest[name] = weight
        return rest


class TakePacked(ConversionOps):
    """A packed weight out of a saved model to a packed layer."""

    def __init__(self, hf_quantizer: TorchCpuExtQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, Any]:
        """Takes one packed weight, gives nothing back."""
        ((packed,),) = input_dict.values()
        self.hf_quantizer.take(kwargs["model"], kwargs["full_layer_name"], packed, kwargs.get("missing_keys"))
        return {}


def _takes_packed(conversion: Any) -> bool:
    return any(isinstance(op, TakePacked) for op in getattr(conversion, "operations", ()))


def _untie(model: Any, weight_name: str) -> None:
    """Tells transformers that a weight is no parameter any more, hence tied to none."""
    tied = model.all_tied_weights_keys
    for target in [target for target, source in tied.items() if weight_name in (target, source)]:
        del tied[target]


def _release(files: list[str]) -> None:
    """Gives back to the system what packing has used: the memory of mapped files that were read, and freed memory that malloc keeps.

    transformers maps a checkpoint and unmaps it once all is loaded, so what was read stays in the process until then. Neither of the two
    calls changes any data: pages that are needed again are read again.
    """
    try:
        with open("/proc/self/maps") as maps:
            ranges = [fields for fields in (line.rstrip("\n").split(maxsplit=5) for line in maps) if len(fields) == 6]
        libc = ctypes.CDLL(None)
        for address, *_, path in ranges:
            if path in files:
                begin, end = (int(number, 16) for number in address.split("-"))
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)
        libc.malloc_trim(ctypes.c_size_t(0))
    except (OSError, AttributeError) as error:  # no Linux, or no glibc
        _log.debug("memory that packing has used is given back later: %s", error)
