"""Reads the sparse checkpoints of compressed-tensors, without that package: its versions after 2025 read them no more.

Two formats, both in safetensors files. For a weight ``layer.weight`` of shape ``(..., n)`` there are, in place of it:

=====================  ====================================================================================
``layer.shape``        the shape, integers
``layer.bitmask``      ``(..., ceil(n / 8))`` uint8: one bit a weight, least significant first, set where it is stored
``layer.compressed``   the stored weights in row-major order: 1-D (``sparse-bitmask``), or ``(rows, n / 2)`` (``sparse-24-bitmask``, where
                       two of four are stored, zeros among them if need be)
``layer.row_offsets``  ``sparse-bitmask`` only: number of stored weights before each row
=====================  ====================================================================================
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checks import FLOATS
from ..core.errors import CorruptFileError
from ..sparse_linear import SparseLinearConfig

_QUANTIZED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale", "scale_packed", "meta")


def decompress(shape: Tensor, bitmask: Tensor, compressed: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """The dense weight of the tensors that stand for it (see above).

    Args:
        shape: integers, in any shape.
        bitmask: uint8.
        compressed: float32, bfloat16 or float16.
        row_offsets: checked if it is there.
    Returns:
        A tensor of shape ``shape`` and the dtype of ``compressed``.
    Raises:
        ValueError: the tensors do not fit together.
    """
    sizes = shape.flatten().tolist()
    if not sizes or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ValueError(f"shape must hold sizes, got {sizes}")
    expected = (*sizes[:-1], math.ceil(sizes[-1] / 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise ValueError(f"bitmask must be uint8 {expected}, got {bitmask.dtype} {tuple(bitmask.shape)}")
    if compressed.dtype not in FLOATS.values():
        raise ValueError(f"compressed must be float32, bfloat16 or float16 (quantized weights cannot be read), got {compressed.dtype}")
    mask = ((bitmask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten(-2)[..., : sizes[-1]]
    counts = mask.sum(-1)
    if int(counts.sum()) != compressed.numel():
        raise ValueError(f"compressed must hold {int(counts.sum())} weights, as many as bitmask has bits set, got {compressed.numel()}")
    if row_offsets is not None and not torch.equal(row_offsets.flatten(), (counts.cumsum(0) - counts).flatten()):
        raise ValueError("row_offsets must be the numbers of weights before each row, got others")
    return torch.zeros(sizes, dtype=compressed.dtype).masked_scatter_(mask, compressed.flatten())


class CompressedWeights(Mapping[str, Tensor]):
    """The dense tensors of a checkpoint by name; each is read and decompressed when it is asked for, and not kept.

    Args:
        path: of a folder with safetensors files, or of one such file. It may hold weights that are not compressed, too.
    Raises:
        ValueError: the checkpoint holds quantized weights.
        CorruptFileError: a file is damaged.
        FileNotFoundError: there is no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        self.files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not self.files:
            raise FileNotFoundError(f"{path} has no safetensors files")
        self._open: dict[str, Any] = {}
        for file in self.files:
            try:
                opened = safe_open(file, "pt")
            except SafetensorError as error:
                raise CorruptFileError(f"{file}: {error}") from error
            self._open |= dict.fromkeys(opened.keys(), opened)
        for name in self._open:
            if name.rpartition(".")[2] in _QUANTIZED:
                raise ValueError(f"{path} must be sparse-bitmask or sparse-24-bitmask without quantization, got a tensor {name}")
        layers = [name.removesuffix(".bitmask") for name in self._open if name.endswith(".bitmask")]
        parts = {f"{layer}.{part}" for layer in layers for part in ("shape", "bitmask", "compressed", "row_offsets")}
        regular = any(f"{layer}.row_offsets" not in self._open for layer in layers)
        self.pattern = "2:4" if regular else "unstructured"  # of the weights that are compressed
        self._names = dict.fromkeys([*(name for name in self._open if name not in parts), *(f"{layer}.weight" for layer in layers)])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._open:
            return self._open[name].get_tensor(name)
        layer = name.removesuffix(".weight")
        parts = {
            part: self._open[key].get_tensor(key) for part in ("bitmask", "compressed", "shape") if (key := f"{layer}.{part}") in self._open
        }
        if len(parts) < 3:
            raise CorruptFileError(f"{name} must have a bitmask, a shape and compressed values, got only {', '.join(parts)}")
        with contextlib.suppress(KeyError):
            parts["row_offsets"] = self._open[f"{layer}.row_offsets"].get_tensor(f"{layer}.row_offsets")
        try:
            return decompress(**parts)
        except ValueError as error:
            raise CorruptFileError(f"{name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Later:
    """Stands for a tensor until transformers wants it, which it says by an index of ``...``."""

    def __init__(self, weights: CompressedWeights, name: str) -> None:
        self.weights, self.name = weights, name

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights[self.name][index]


def load_compressed(folder: str | os.PathLike[str], config: SparseLinearConfig | None = None, **arguments: Any) -> Any:
    """Loads a sparse-bitmask or sparse-24-bitmask checkpoint as a transformers model with packed layers, one weight after the other.

    Args:
        folder: with ``config.json`` and safetensors files.
        config: how to pack; None loses nothing: bf16 for a checkpoint in bfloat16, else fp32, and the pattern 2:4 if the checkpoint has it.
            Weights are sparse already, so ``sparsity`` can stay None.
        arguments: for ``from_pretrained``.
    Returns:
        The model, of the class that ``config.json`` names; ``save_pretrained`` works as for any model of `TorchCpuExtConfig`.
    Raises:
        ImportError: transformers is not installed.
        ValueError: the checkpoint holds quantized weights, or names no class of transformers.
        CorruptFileError: a file is damaged.
    """
    from .transformers import TorchCpuExtConfig  # isort: skip (says how to install transformers if need be)
    import transformers

    weights = CompressedWeights(folder)
    architecture = transformers.AutoConfig.from_pretrained(folder)
    for name in ("quantization_config", "compression_config", "sparsity_config"):
        if hasattr(architecture, name):
            delattr(architecture, name)
    names = architecture.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(f"{folder}: config.json must name a class of transformers in architectures, got {names}")
    if config is None:
        config = SparseLinearConfig(dtype="bf16" if architecture.dtype == torch.bfloat16 else "fp32", pattern=weights.pattern)
    fields = {name: value for name, value in config.to_dict().items() if name != "config"}
    model = cls.from_pretrained(
        None,
        config=architecture,
        state_dict={name: _Later(weights, name) for name in weights},
        quantization_config=TorchCpuExtConfig(**fields),
        **arguments,
    )
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
