"""Finished blocks of `prune` on disk: one safetensors file a block, written whole or not at all."""

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..core.errors import CorruptFileError
from .grid import QuantizationGrid


def fingerprint(values: Any) -> str:
    """A hash of plain values, tensors and containers of them; equal in all processes."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
            digest.update((ctypes.c_ubyte * (data.numel() * data.element_size())).from_address(data.data_ptr()))
        elif isinstance(value, Mapping):
            digest.update(b"{")
            for key in value:
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()


class Resume:
    """The folder of one run.

    Args:
        folder: made if it does not exist.
        settings: whatever shapes the result, but the weights of the layers that are pruned.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Any) -> None:
        self.folder = Path(folder)
        self.settings = fingerprint([__version__, settings])
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def load(self, index: int, layers: Mapping[str, nn.Linear]) -> list[dict[str, Any]] | None:
        """Puts the weights of a finished block in place.

        Args:
            index: number of the block.
            layers: its layers, by name.
        Returns:
            The rows that `save` was given, or None if the block was not finished.
        Raises:
            ValueError: the file belongs to another run: other settings, calibration data or weights.
            CorruptFileError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["torch_cpu_ext_prune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
            settings, before, rows, grids = (metadata[key] for key in ("settings", "before", "rows", "grids"))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path} is damaged: {error!r}; delete it") from error
        same = settings == self.settings and before.keys() <= layers.keys()
        for name in before if same else ():
            # a run interrupted in this process may have put the new weights in place already
            same = same and fingerprint(layers[name].weight) in (before[name], fingerprint(tensors.get(f"{name}.weight")))
        if not same:
            raise ValueError(
                f"prune: resume must be a folder of the same model, calibration data, config and version, but {path} is of others; "
                "delete it, or give another folder"
            )
        new = {}
        for name in before:
            grid = None
            if name in grids:
                dtype, group_size = grids[name]
                grid = QuantizationGrid(dtype, group_size, tensors[f"{name}.scale"], tensors.get(f"{name}.minimum"))
            new[name] = tensors[f"{name}.weight"], grid
        put_weights(layers, new)
        return rows

    def save(
        self,
        index: int,
        layers: Mapping[str, nn.Linear],
        new: Mapping[str, tuple[Tensor, QuantizationGrid | None]],
        rows: Iterable[dict[str, Any]],
    ) -> None:
        """Writes the new weights of a block; the layers still hold the old ones."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        grids: dict[str, tuple[str, int]] = {}
        for name, (weight, grid) in new.items():
            tensors[f"{name}.weight"] = weight.contiguous()
            if grid is not None:
                grids[name] = grid.dtype, grid.group_size
                tensors[f"{name}.scale"] = grid.scale.contiguous()
                if grid.minimum is not None:
                    tensors[f"{name}.minimum"] = grid.minimum.contiguous()
        before = {name: fingerprint(layer.weight) for name, layer in layers.items()}
        metadata = {"settings": self.settings, "before": before, "rows": list(rows), "grids": grids}
        temporary = self.folder / f".{self._path(index).name}-{secrets.token_hex(8)}"
        try:
            save_file(tensors, temporary, metadata={"torch_cpu_ext_prune": json.dumps(metadata)})
            os.replace(temporary, self._path(index))
        finally:
            temporary.unlink(missing_ok=True)


def put_weights(layers: Mapping[str, nn.Linear], new: Mapping[str, tuple[Tensor, QuantizationGrid | None]]) -> None:
    """Writes new weights into layers, and leaves each one's grid on it."""
    with torch.no_grad():
        for name, (weight, grid) in new.items():
            layers[name].weight.copy_(weight)
            if grid is not None:
                layers[name].__dict__["quantization_grid"] = grid  # a plain attribute: in no state_dict
            elif hasattr(layers[name], "quantization_grid"):
                del layers[name].quantization_grid
