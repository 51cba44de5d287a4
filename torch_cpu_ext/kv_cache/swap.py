"""How kv_cache becomes a model's default."""

from torch import nn

from ..core.swap import Filter, Names, handles, replace, select
from .config import KVCrushConfig


@handles(KVCrushConfig)
def swap_attention(
    model: nn.Module,
    config: KVCrushConfig | None = None,
    filter_fn: Filter | None = None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
) -> nn.Module:
    """Makes compressed keys and values the default of a model of transformers; the same as `optimize` with a `KVCrushConfig`.

    The model's attention implementation becomes ``"torch_cpu_ext_kvcrush"``. Where the caller passes no cache, ``generate``, and calls
    with ``use_cache`` that need no gradients, make a fresh `KVCrushCache`; a cache that is passed is used as it is. Layers without full
    attention, and those that ``include``, ``exclude`` or ``filter_fn`` leave out, keep transformers' cache. `restore` undoes it.

    Args:
        model: a model of transformers, or one that contains such.
        config: None for the default.
        filter_fn: as in `optimize`, for the attention modules.
        include: as in `optimize`.
        exclude: as in `optimize`.
    Returns:
        ``model``.
    Raises:
        TypeError: ``model`` is no module.
        ValueError: no layer can be compressed, or a layer cannot be served by that attention implementation; the message names it.
        ImportError: transformers is missing.
    """
    from ..integrations.kvcrush import KVCrushAttention, attention_modules, obstacle

    config = config or KVCrushConfig()
    found = attention_modules(model) if isinstance(model, nn.Module) else {}
    chosen = select(model, tuple({type(module) for module in found.values()}), filter_fn, include, exclude, "swap_attention")
    chosen = {name: module for name, module in chosen.items() if name in found}
    reasons = {name: obstacle(model, name) for name in chosen}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "there is no attention layer of transformers there"
        raise ValueError(f"swap_attention: model must have a layer that can be compressed, got none: {why}")

    def make(name: str, module: nn.Module) -> nn.Module | str:
        return reasons[name] or KVCrushAttention(module.original() if isinstance(module, KVCrushAttention) else module, config)

    result = replace(model, chosen, make, "kv_cache: swapping")
    KVCrushAttention.settle(result)
    return result
