"""The backend itself: options, and what runs around the graph that Inductor compiled."""

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..sparse_linear import SparseLinearConfig
from .packs import Slot
from .rewrite import Layer, rewrite

_log = logging.getLogger("torch_cpu_ext.compile")


# No @register_backend here: the entry point registers the function under the same name when it loads it, and a second time is an error.
def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Packs linear layers of a graph that torch.compile captured, then compiles it with Inductor; ``torch.compile`` calls this.

    Args:
        gm: the graph; it stays as it is.
        example_inputs: its inputs, in the order of its placeholders.
        mode: as for ``torch.compile`` with Inductor (``torch._inductor.list_mode_options``).
        options: ``"linear"``: a `SparseLinearConfig`, or its ``to_dict``; all other names are those of ``torch._inductor.list_options()``.
    Returns:
        The compiled graph.
    Raises:
        ValueError: an option has an unknown name, or ``"linear"`` a wrong value.
        TypeError: ``"linear"`` is neither config nor dictionary.
    """
    from torch._inductor.compile_fx import compile_fx

    config, patches = _options(mode, options)
    new, inputs, slots, layers = rewrite(gm, example_inputs, config)
    compiled: Any = compile_fx(new, inputs, config_patches=patches)
    _report(layers)  # afterwards: compile_fx may ask Dynamo to trace anew, then the graph comes a second time
    return _with_packed(compiled, slots) if slots else compiled


def _options(mode: str | None, options: dict[str, Any] | None) -> tuple[SparseLinearConfig | None, dict[str, Any]]:
    from torch._inductor import list_mode_options, list_options

    rest = dict(options or {})
    linear = rest.pop("linear", None)
    if isinstance(linear, dict):
        linear = SparseLinearConfig.from_dict(linear)
    if linear is not None and not isinstance(linear, SparseLinearConfig):
        raise TypeError(f"torch_cpu_ext: options['linear'] must be a SparseLinearConfig or its to_dict(), got {type(linear).__name__}")
    rest = {name.replace("-", "_"): value for name, value in rest.items()}  # as Inductor spells them
    known = list_options()
    if unknown := sorted(rest.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], ["linear", *known])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"torch_cpu_ext: options must be 'linear' and those of torch._inductor.list_options(), got {', '.join(unknown)}{hint}"
        )
    return linear, {**(list_mode_options(mode) if mode else {}), **rest}


def _with_packed(compiled: Callable[..., Any], slots: list[Slot]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return compiled(*args, *[slot.packed(args) for slot in slots])

    return run


def _report(layers: list[Layer]) -> None:
    packed = {layer.weight: layer for layer in layers if layer.config}  # a weight of two layers counts once
    dtypes = sorted({layer.config.dtype for layer in layers if layer.config})
    count = sum(layer.config is not None for layer in layers)
    text = f"packed {count} of {len(layers)} linear layers"
    for layer in layers:
        _log.debug("%s: %s", layer.name, f"packed ({layer.config.dtype})" if layer.config else f"left: {layer.reason}")
    if packed:
        before, after = sum(layer.bytes_before for layer in packed.values()), sum(layer.bytes_after for layer in packed.values())
        text += f" ({', '.join(dtypes)}): {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"
    if count < len(layers):
        reasons = Counter(layer.reason for layer in layers if not layer.config).most_common()
        text += f"; left {len(layers) - count}: " + ", ".join(f"{reason} x{times}" for reason, times in reasons)
    _log.info("%s", text)
