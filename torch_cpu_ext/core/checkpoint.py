"""Saving and loading optimized models: one safetensors file, written whole or not at all."""

import importlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CorruptFileError
from .swap import Replacement, put

_FORMAT = 1


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes an optimized model's tensors and what `load_checkpoint` needs to rebuild its replaced modules.

    The file is plain safetensors. It is written under a temporary name and renamed, so a failure leaves an existing file as it was.

    Args:
        model: any module, optimized or not.
        path: of the file; one that exists is replaced.
    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    specs = {
        name: {"class": type(module).__name__, **module.spec()} for name, module in model.named_modules() if isinstance(module, Replacement)
    }
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            shared[name] = first[key]  # tied weights are stored once
            continue
        first[key] = name
        tensors[name] = tensor.contiguous()
        storage = tensors[name].untyped_storage().data_ptr()
        if storage in storages:  # safetensors takes no second view of the same memory
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    metadata = {"torch_cpu_ext": json.dumps({"format": _FORMAT, "modules": specs, "shared": shared})}
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"
    temporary.open("xb").close()
    mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files nobody else can read
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fills a model of the original architecture from a file of `save_checkpoint`, replaced modules and all.

    Args:
        model: as it was before `optimize`; parameters may be on the meta device, since all of them are taken from the file.
        path: of the file.
    Returns:
        ``model``, or its replacement if it was itself replaced.
    Raises:
        CorruptFileError: the file is no checkpoint of this package, is damaged, or a newer version wrote it.
        ValueError: the model has no module of a name the file holds, or tensors do not fit; the model is left as it was.
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = _read(Path(path))
    modules: dict[str, nn.Module] = {}
    for name, spec in metadata["modules"].items():
        values = dict(spec)
        kind = values.pop("class")
        if kind in Replacement.elsewhere:
            importlib.import_module(Replacement.elsewhere[kind])
        cls = Replacement.classes.get(kind)
        if cls is None:
            raise CorruptFileError(f"{path}: {name} is a {spec['class']}, which this version does not know")
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"load_checkpoint: model must have a module {name!r}, as the file does") from error
        try:
            modules[name] = cls.from_spec(values, model.get_submodule(name)).train(model.get_submodule(name).training)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path}: what it says of {name} is damaged: {error}") from error
    tensors |= {name: tensors[other] for name, other in metadata["shared"].items()}
    before = {name: model.get_submodule(name) for name in modules}
    result = put(model, modules)
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in result.modules()]
    try:
        _check_fit(result, tensors)
        result.load_state_dict(tensors, assign=True)
    except BaseException as error:  # some tensors may be in place already
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        put(result, before)
        if isinstance(error, RuntimeError | ValueError):
            raise ValueError(f"load_checkpoint: {error}") from error
        raise
    for name, other in metadata["shared"].items():
        _tie(result, name, other)
    for kind in {type(module) for module in result.modules() if isinstance(module, Replacement)}:
        kind.settle(result)
    return result


def _tie(model: nn.Module, name: str, other: str) -> None:
    """Makes two parameters, or two buffers, that share their values one."""
    (holder, _, leaf), (owner, _, owned) = name.rpartition("."), other.rpartition(".")
    for kind in ("_parameters", "_buffers"):
        target, source = getattr(model.get_submodule(holder), kind), getattr(model.get_submodule(owner), kind)
        if leaf in target and owned in source:
            target[leaf] = source[owned]


def _check_fit(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if names or shapes differ, before anything is loaded; replacements look at their own tensors."""
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"the file must hold every tensor of the model, but lacks {', '.join(missing[:5])}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"model must have every tensor of the file, but lacks {', '.join(unknown[:5])}")
    own = tuple(f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, Replacement))
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape and not name.startswith(own):
            raise ValueError(f"{name} must be {tuple(expected[name].shape)} as in the model, got {tuple(tensor.shape)} in the file")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("torch_cpu_ext")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    if text is None:
        raise CorruptFileError(f"{path} was not written by torch_cpu_ext.save_checkpoint")
    try:
        metadata = json.loads(text)
        newer = metadata["format"] > _FORMAT
        known = all(isinstance(spec["class"], str) for spec in metadata["modules"].values())
        known &= all(other in tensors for other in metadata["shared"].values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: its metadata is damaged: {error!r}") from error
    if newer:
        raise CorruptFileError(f"{path}: format must be at most {_FORMAT}, got {metadata['format']}; a newer torch_cpu_ext wrote it")
    if not known:
        raise CorruptFileError(f"{path}: its metadata is damaged")
    return tensors, metadata
