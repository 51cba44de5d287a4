"""The engine behind `optimize`, `restore` and `report`: which modules to replace, and doing it all at once or not at all."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import nn

from .config import Config
from .progress import bar

_log = logging.getLogger("torch_cpu_ext.swap")

Filter = Callable[[nn.Module, str], bool]
Names = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]

_HANDLERS: dict[type[Config], Callable[..., Any]] = {}
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_KEPT = "_torch_cpu_ext_kept"  # {name: reason}, on the model: what the last optimize left as it was


def handles(config: type[Config]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: ``optimize(target, <config>, ...)`` calls the function it stands on, with the same arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS[config] = function
        return function

    return register


def optimize(
    model: Any,
    config: Config,
    filter_fn: Filter | None = None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
) -> Any:
    """Replaces parts of a model (or a data loader) by faster, smaller ones, in place, as the config's technique says.

    If anything goes wrong, Ctrl-C included, the model stays as it was.

    Args:
        model: an ``nn.Module``, or what else the technique replaces.
        config: says which technique, and how; e.g. `SparseLinearConfig`.
        filter_fn: ``filter_fn(module, fqn)`` says whether a module may be replaced; ``fqn`` is its dotted name. None allows all.
        include: names to replace: a string is a run of whole parts of the dotted name (``"lm_head"``, ``"layers.0"``, ``"mlp.up_proj"``), a
            compiled regular expression is searched in the name; or a list of those. None includes all.
        exclude: names to leave alone, in the same form; wins over ``include``.
    Returns:
        ``model``, or its replacement if it was itself replaced.
    Raises:
        TypeError: ``config`` belongs to no technique, or the technique cannot replace parts of ``model``.
        ValueError: ``include`` or ``exclude`` fits no module.
    """
    if type(config) not in _HANDLERS:
        known = ", ".join(c.__name__ for c in _HANDLERS)
        raise TypeError(f"optimize: config must be one of {known}, got {type(config).__name__}")
    return _HANDLERS[type(config)](model, config, filter_fn, include=include, exclude=exclude)


class Replacement(nn.Module):
    """A module that stands in for another; what `restore` and `report` need of it."""

    technique: str = ""
    classes: ClassVar[dict[str, type["Replacement"]]] = {}  # by name, for checkpoints
    # Those whose module needs an extra.
    elsewhere: ClassVar[dict[str, str]] = {
        "FusedDecoder": "torch_cpu_ext.integrations.decoder",
        "KVCrushAttention": "torch_cpu_ext.integrations.kvcrush",
        "SparseMLP": "torch_cpu_ext.integrations.mlp",
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Replacement.classes[cls.__name__] = cls

    def original(self) -> nn.Module:
        """The module this one stands in for, or one made anew from what this one holds."""
        raise NotImplementedError

    def row(self) -> "Row":
        """This module's line of the report; its name is filled in by `report`."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Plain values from which `from_spec` makes a module that this one's ``state_dict`` fits."""
        raise NotImplementedError

    @classmethod
    def from_spec(cls, values: dict[str, Any], module: nn.Module) -> "Replacement":
        """A replacement of ``module`` without weights, from what `spec` gave."""
        raise NotImplementedError

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Called once all replacements of a model have their weights."""

    def leave(self, model: nn.Module) -> None:
        """Called by `restore` before this module is taken out of ``model``: undoes what `settle` did to other parts of it."""


class SharingReplacement(Replacement):
    """A replacement that keeps the original and shares its children and hooks: names in the ``state_dict`` stay, what is put in the place
    of a child is seen by both, and attributes that this module lacks are the original's.

    Args:
        module: the original.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        for name in _HOOKS:
            setattr(self, name, getattr(module, name))
        self._original = (module,)  # in a tuple, so as not to be a child
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":
                raise
            return getattr(self._original[0], name)

    def original(self) -> nn.Module:
        return self._original[0]

    def train(self, mode: bool = True) -> Self:
        self._original[0].train(mode)
        self.training = mode
        return self

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, values: dict[str, Any], module: nn.Module) -> Self:
        return cls(module)


@dataclass
class Row:
    """One replaced module.

    Args:
        technique: name of the technique.
        kind: what runs, in the technique's words, e.g. ``"int8 sparse"``.
        bytes_before: of the module's weights before.
        bytes_after: of what stands in for them.
        isa: the instruction set that its kernel runs with now.
        detail: sizes and the like, for people.
        name: the module's dotted name; empty for the model itself.
    """

    technique: str
    kind: str
    bytes_before: int
    bytes_after: int
    isa: str
    detail: str = ""
    name: str = ""


@dataclass
class Report:
    """What `optimize` did to a model; prints as a table.

    Args:
        rows: the replaced modules.
        kept: modules of the right kind that stayed, by name, each with the reason.
    """

    rows: list[Row] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of the replaced modules before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of their replacements."""
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rows": [vars(row) for row in self.rows],
            "kept": self.kept,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        if not self.rows:
            lines = ["nothing was replaced"]
        else:
            header = ("module", "technique", "kernel", "isa", "MB before", "MB after", "detail")
            cells = [
                (r.name or "(model)", r.technique, r.kind, r.isa, f"{r.bytes_before / 1e6:.3f}", f"{r.bytes_after / 1e6:.3f}", r.detail)
                for r in self.rows
            ]
            widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
            lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (header, *cells)]
            ratio = f" ({self.bytes_before / max(1, self.bytes_after):.2f} times smaller)" if self.bytes_before else ""
            lines.append(f"{len(self.rows)} modules, {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB{ratio}")
        lines += [f"left as it was: {name or '(model)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What was replaced in a model, bytes before and after, and the instruction set each replacement runs with now.

    Args:
        model: any module; one that was never optimized gives an empty report.
    Returns:
        A `Report`; ``print`` it, or take its ``rows``.
    """
    result = Report(kept=dict(getattr(model, _KEPT, {})))
    for name, module in model.named_modules():
        if isinstance(module, Replacement):
            row = module.row()
            row.name = name
            result.rows.append(row)
    return result


def restore(model: nn.Module) -> nn.Module:
    """Puts the original modules back, in place.

    Where the technique lost nothing the values are the original ones, bit for bit (up to the sign of zeros); a module optimized with
    ``keep_original=True`` always is. Elsewhere the modules hold what the replacement computed with.

    Args:
        model: any module; nothing happens to one that was never optimized.
    Returns:
        ``model``, or its original if it was itself a replacement.
    """
    replacements = {name: module for name, module in model.named_modules() if isinstance(module, Replacement)}
    for module in replacements.values():
        module.leave(model)
    result = put(model, {name: module.original() for name, module in replacements.items()})
    if hasattr(result, _KEPT):
        delattr(result, _KEPT)
    return result


def select(
    model: nn.Module,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
    filter_fn: Filter | None,
    include: Names | None,
    exclude: Names | None,
    caller: str = "optimize",
) -> dict[str, nn.Module]:
    """The modules of exactly one of the classes ``kinds`` that the user's choice leaves, by name (a shared module under its first name).

    Subclasses are left alone: their ``forward`` may do more. Errors are in the name of ``caller``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``include`` or ``exclude`` fits no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    classes = kinds if isinstance(kinds, tuple) else (kinds,)
    found = {name: module for name, module in model.named_modules() if type(module) in classes}
    everything = [name for name, _ in model.named_modules()]
    for argument, names in (("include", include), ("exclude", exclude)):
        for one in _patterns(names):
            if not any(_fits(one, name) for name in everything):
                shown = one if isinstance(one, str) else one.pattern
                raise ValueError(f"{caller}: {argument} must fit the name of a module, got {shown!r}, which fits none")
    return {
        name: module
        for name, module in found.items()
        if (include is None or any(_fits(p, name) for p in _patterns(include)))
        and not any(_fits(p, name) for p in _patterns(exclude))
        and (filter_fn is None or filter_fn(module, name))
    }


def _patterns(names: Names | None) -> list[str | re.Pattern[str]]:
    if names is None:
        return []
    return [names] if isinstance(names, str | re.Pattern) else list(names)


def _fits(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, str):
        return f".{pattern}." in f".{name}."
    return pattern.search(name) is not None


def replace(
    model: nn.Module, chosen: dict[str, nn.Module], make: Callable[[str, nn.Module], nn.Module | str], description: str
) -> nn.Module:
    """Makes all replacements first, then puts them in; an exception on the way leaves the model untouched.

    Args:
        model: the model.
        chosen: the modules to replace, by name.
        make: ``make(name, module)`` gives the replacement, or a string that says why the module stays as it is.
        description: for the progress bar and the log.
    Returns:
        ``model``, or the replacement of ``model`` itself.
    """
    made: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    for name, module in bar(chosen.items(), description, "module"):
        outcome = make(name, module)
        if isinstance(outcome, str):
            kept[name] = outcome
        else:
            outcome.train(module.training)
            made[name] = outcome
    result = put(model, made)
    earlier = {name: reason for name, reason in getattr(result, _KEPT, {}).items() if name not in made}
    setattr(result, _KEPT, {**earlier, **kept})
    _log.info("%s: %d modules replaced, %d left as they were", description, len(made), len(kept))
    return result


def put(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """Puts modules at their names, everywhere the old ones are referred to; all of them or, if interrupted, none."""
    if "" in modules:
        return modules[""]
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is not None and id(child) in new:
                    done.append((parent, name, child))
                    parent._modules[name] = new[id(child)]
    except BaseException:
        for parent, name, child in done:
            parent._modules[name] = child
        raise
    return model


def shared_parameters(model: nn.Module) -> set[int]:
    """``id`` of every parameter that more than one module holds (tied weights)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def tensor_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of some tensors, missing ones counted as none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
