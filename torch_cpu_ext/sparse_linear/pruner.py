"""`prune`: pruning and quantising a model's Linear layers with calibration data, block by block."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import FLOATS
from ..core.progress import bar
from ..core.swap import Filter, Names, select, shared_parameters
from .blocks import Item, Replay, calibrating, find_stacks, repeated
from .calibration import Gram
from .grid import QuantizationGrid, nearest
from .obs import inverse_factor, surgery
from .prune_config import PruneConfig
from .pruning import magnitude_mask, parse_pattern, wanda_mask
from .resume import Resume, put_weights

_log = logging.getLogger("torch_cpu_ext.sparse_linear.prune")
_SPARSE = 0.25  # share of zeros from which a sparse int4 weight is the smaller one, so that zero should be on its grid


@dataclass
class PrunedLayer:
    """What `prune` did to one layer.

    Args:
        name: its dotted name.
        method: how it was pruned, and quantised.
        sparsity: share of its weights that are zero now.
        error: of its outputs on the calibration data: sum of squared differences, divided by the sum of squares before; of its weights
            where there was no calibration data.
    """

    name: str
    method: str
    sparsity: float
    error: float


@dataclass
class PruneReport:
    """What `prune` did to a model; prints as a table.

    Args:
        rows: the layers it changed, in the order of the model.
        kept: Linear layers that stayed as they were, by name, each with the reason.
    """

    rows: list[PrunedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"rows": [vars(row) for row in self.rows], "kept": self.kept}

    def __str__(self) -> str:
        cells = [
            ("layer", "method", "sparsity", "error"),
            *((r.name or "(model)", r.method, f"{r.sparsity:.3f}", f"{r.error:.5f}") for r in self.rows),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join(lines + [f"left as it was: {name or '(model)'}: {reason}" for name, reason in self.kept.items()])


def prune(
    model: nn.Module,
    calibration: Iterable[Item] | None = None,
    config: PruneConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    include: Names | None = None,
    exclude: Names | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> PruneReport:
    """Prunes, and if asked quantises, the ``nn.Linear`` weights of a model, in place; `optimize` packs them afterwards.

    The model's repeated blocks are found and done one after the other: the calibration data runs through the blocks that are done, as they
    are now, and the inputs of the next block's layers decide what becomes of their weights. So later blocks see, and make up for, what
    happened to earlier ones, and beyond the model itself only the Hessians of one block and one output for each item are in memory. A model
    without repeated blocks is done as one. Without calibration data, layers are done one by one.

    Layers outside the blocks (``lm_head``, classifiers) are changed only if ``include`` names them, those whose weight another module
    shares never. Quantised layers get an attribute ``quantization_grid`` (`QuantizationGrid`) with the scales.

    Args:
        model: any module; subclasses of ``nn.Linear`` are left alone. Its blocks must use nothing but the output of the block before, and
            what the model gives to each of them.
        calibration: model inputs, each a tensor (such as token ids ``(batch, length)``) or a dictionary of keyword arguments; a generator
            is read once and kept. Padding counts like other tokens, so use whole windows. None for methods that need none.
        config: None for the default.
        filter_fn: as in `optimize`.
        include: as in `optimize`.
        exclude: as in `optimize`.
        resume: a folder, in which every finished block is kept. Called again after an interruption, on the same model as at first or as it
            was left, with the same arguments, `prune` takes them from there and goes on; the result is the same. None keeps nothing.
    Returns:
        A `PruneReport`: sparsity and error of each layer.
    Raises:
        ValueError: calibration data is needed, but empty or None; a weight or an input is not finite; ``in_features`` is no multiple of m;
            ``resume`` holds blocks of another run. Blocks before the one at fault are changed already.
        TypeError: ``model`` is no module, or an item of ``calibration`` is neither a tensor nor a dictionary.
    """
    config = config or PruneConfig()
    items = _items(calibration)
    if config.calibrates and not items:
        wanted = config.method if config.method != "magnitude" else "gptq"
        raise ValueError(f"prune: calibration must hold at least one input for {wanted}, got none")
    report = PruneReport()
    layers = _candidates(model, config, filter_fn, include, exclude, report)
    with torch.inference_mode(False), calibrating(model):
        stacks = find_stacks(model, items[0]) if items else []
        replay = Replay(model, items, stacks)
        blocks = [name for names in stacks for name in names]
        stages: list[dict[str, nn.Linear]] = [
            {n: m for n, m in layers.items() if n == block or n.startswith(f"{block}.")} for block in blocks
        ]
        if not items:  # nothing that layers of a block have to wait for
            blocks, stages = list(layers), [{name: layer} for name, layer in layers.items()]
        inside = {name for stage in stages for name in stage}
        rest = {name: layer for name, layer in layers.items() if name not in inside}
        store = None
        if resume is not None:
            others = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
            store = Resume(
                resume,
                [config.to_dict(), items, {name: list(stage) for name, stage in zip(blocks, stages, strict=True)}, list(rest), others],
            )
        for index, stage in enumerate(bar([*stages, rest], f"pruning, {config.method}", "block" if items else "layer")):
            if not stage:
                continue
            rows = store.load(index, stage) if store else None
            if rows is None:
                rows = _do(stage, config, replay, index, store)
            report.rows += [PrunedLayer(**row) for row in rows]
            done = {row["name"] for row in rows}
            report.kept |= {name: "the calibration data does not reach it" for name in stage if name not in done}
    order = {name: i for i, name in enumerate(layers)}
    report.rows.sort(key=lambda row: order[row.name])
    _log.info("%s: %d layers changed, %d left as they were", config.method, len(report.rows), len(report.kept))
    return report


def _items(calibration: Iterable[Item] | None) -> list[Item]:
    if isinstance(calibration, Tensor | Mapping):
        raise TypeError(f"prune: calibration must be an iterable of model inputs, got one {type(calibration).__name__}; put it into a list")
    items = list(calibration or [])
    for item in items:
        if not isinstance(item, Tensor | Mapping):
            raise TypeError(f"prune: calibration must hold tensors or dictionaries of keyword arguments, got {type(item).__name__}")
    return items


def _candidates(
    model: nn.Module, config: PruneConfig, filter_fn: Filter | None, include: Names | None, exclude: Names | None, report: PruneReport
) -> dict[str, nn.Linear]:
    """The layers to change, all checked; the others go to the report."""
    found = select(model, nn.Linear, filter_fn, include, exclude, caller="prune")
    lists = tuple(f"{name}." if name else "" for name in repeated(model))
    shared = shared_parameters(model)
    layers: dict[str, nn.Linear] = {}
    for name, layer in found.items():
        assert isinstance(layer, nn.Linear)
        weight = layer.weight
        if id(weight) in shared:
            report.kept[name] = "its weight is shared with another module"
        elif lists and include is None and not name.startswith(lists):
            report.kept[name] = "it is outside of the repeated blocks; include= names it to prune it"
        elif hasattr(layer, "parametrizations"):
            report.kept[name] = "its weight is parametrized"
        elif weight.device.type != "cpu" or weight.dtype not in FLOATS.values():
            report.kept[name] = f"its weight is {weight.dtype} on {weight.device}, not float32, bfloat16 or float16 on the CPU"
        elif not bool(weight.isfinite().all()):
            raise ValueError(f"prune: {name or '(model)'}: weight must be finite, got NaN or an infinity")
        else:
            groups = parse_pattern(config.pattern) if config.sparsity_of(name) else None
            if groups and layer.in_features % groups[1]:
                raise ValueError(
                    f"prune: {name or '(model)'}: in_features must be a multiple of {groups[1]} for the pattern {config.pattern}, "
                    f"got {layer.in_features}; layer_sparsity or exclude can leave it out"
                )
            layers[name] = layer
    return layers


def _do(stage: dict[str, nn.Linear], config: PruneConfig, replay: Replay, index: int, store: Resume | None) -> list[dict[str, Any]]:
    """Prunes the layers of a block, all or none of them."""
    new: dict[str, tuple[Tensor, QuantizationGrid | None]] = {}
    rows: list[dict[str, Any]] = []

    def change(name: str, hessian: Tensor | None, factor: Tensor | None) -> None:
        layer = stage[name]
        sparsity = config.sparsity_of(name)
        weight, grid = prune_weight(layer.weight, config, sparsity, hessian, factor)
        result = weight.to(layer.weight.dtype)
        new[name] = result, grid
        rows.append(
            {
                "name": name,
                "method": _method(config, sparsity),
                "sparsity": 1 - int(result.count_nonzero()) / max(1, result.numel()),
                "error": _error(layer.weight.detach().float(), result.float(), hessian),
            }
        )

    if replay.items:
        gram = Gram()
        with gram.watching(stage):
            replay.run(index, gram.next_item)
        for names, hessian in gram.take():
            if not bool(hessian.isfinite().all()):
                raise ValueError(f"prune: {names[0] or '(model)'}: its inputs must be finite and their squares too, got NaN or an infinity")
            factor = inverse_factor(hessian, config.damping) if _operates(config) else None
            for name in names:
                change(name, hessian, factor)
    else:
        for name in stage:
            change(name, None, None)
    if store:
        store.save(index, {name: stage[name] for name in new}, new, rows)
    put_weights(stage, new)
    return rows


def _operates(config: PruneConfig) -> bool:
    return config.method == "sparsegpt" or (config.quantize is not None and config.quantize_method == "gptq")


def _method(config: PruneConfig, sparsity: float) -> str:
    parts = [config.method if config.pattern == "unstructured" else f"{config.method} {config.pattern}"] if sparsity else []
    return ", ".join(parts + ([f"{config.quantize} {config.quantize_method}"] if config.quantize else [])) or "nothing"


def prune_weight(
    weight: Tensor, config: PruneConfig, sparsity: float, hessian: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, QuantizationGrid | None]:
    """What `prune` does to one weight.

    Args:
        weight: ``(out_features, in_features)``, finite, any float dtype; stays as it is.
        config: how.
        sparsity: share to prune, in place of the config's.
        hessian: ``(in_features, in_features)``, the sum of ``x x^T`` over the layer's inputs; None if the config needs no calibration.
        factor: of `inverse_factor`; None where neither SparseGPT nor GPTQ is asked for.
    Returns:
        The new weight in float32, and its grid if it was quantised.
    """
    dense = weight.detach().float()
    options: dict[str, Any] = {"block_size": config.block_size}
    rounding: dict[str, Any] = {}
    if config.quantize is not None:
        zero_point = sparsity > 0 or float((dense == 0).float().mean()) >= _SPARSE
        rounding = {"group_size": config.group_size, "symmetric": config.symmetric, "zero_point": zero_point}
    joint = config.quantize is not None and config.quantize_method == "gptq"
    mask: Tensor | None = dense != 0  # zeros that are there stay
    if sparsity and config.method == "sparsegpt":
        options |= {"sparsity": sparsity, "pattern": config.pattern, "granularity": config.granularity}
        mask = None
    elif sparsity and config.method == "wanda":
        assert hessian is not None
        mask = wanda_mask(dense, hessian.diagonal().sqrt(), sparsity, config.granularity, config.pattern)
    elif sparsity:
        mask = magnitude_mask(dense, sparsity, config.granularity, config.pattern)
    if joint or mask is None:
        assert factor is not None
        if mask is not None:
            options["mask"], dense = mask, dense * mask
        if joint:
            options |= {"quantize": config.quantize, **rounding}
        result, grid = surgery(dense, factor, **options)
    else:
        result, grid = dense * mask, None
    if config.quantize is not None and not joint:
        importance = None if hessian is None else hessian.diagonal()
        grid = nearest(result, config.quantize, **rounding, importance=importance)
        result = grid.round(result)
    return result, grid


def _error(before: Tensor, after: Tensor, hessian: Tensor | None) -> float:
    def energy(rows: Tensor) -> float:
        return float(((rows if hessian is None else rows @ hessian) * rows).sum(dtype=torch.float64))

    whole = energy(before)
    return energy(after - before) / whole if whole > 0 else 0.0
