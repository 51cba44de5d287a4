"""How sparse_linear replaces parts of a model."""

from torch import nn

from ..core.swap import Filter, Names, handles, replace, select, shared_parameters
from .config import SparseLinearConfig
from .modules import SparseLinear
from .ops import FLOATS


@handles(SparseLinearConfig)
def swap_linear(
    model: nn.Module,
    config: SparseLinearConfig | None = None,
    filter_fn: Filter | None = None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
) -> nn.Module:
    """Replaces the ``nn.Linear`` layers of a model by `SparseLinear`, in place; the same as `optimize` with a `SparseLinearConfig`.

    Subclasses of ``nn.Linear`` are left alone. A tied ``lm_head`` is packed too (it is a quarter or more of a small model's bytes),
    unpruned; the embedding keeps the shared weight, and `restore` ties them again.

    Args:
        model: any module; an ``nn.Linear`` itself is replaced by the returned layer.
        config: None for the default.
        filter_fn: as in `optimize`.
        include: as in `optimize`.
        exclude: as in `optimize`.
    Returns:
        ``model``, or its replacement if it was itself an ``nn.Linear``.
    Raises:
        ValueError: a weight has NaN or infinities where pruning or codes need numbers; the message names the module.
    """
    config = config or SparseLinearConfig()
    chosen = select(model, nn.Linear, filter_fn, include, exclude)
    shared = shared_parameters(model)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None

    def make(name: str, linear: nn.Module) -> nn.Module | str:
        assert isinstance(linear, nn.Linear)
        if linear.weight.device.type != "cpu":
            return f"its weight is on {linear.weight.device.type}, not on the CPU"
        if linear.weight.dtype not in FLOATS.values():
            return f"its weight is {linear.weight.dtype}, not float32, bfloat16 or float16"
        if hasattr(linear, "parametrizations"):
            return "its weight is parametrized"
        if any(getattr(linear, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            return "it has hooks, which would be lost (torch.nn.utils.prune.remove makes pruning permanent)"
        try:
            return SparseLinear.from_linear(linear, config.for_head() if linear is head else config, tied=id(linear.weight) in shared)
        except ValueError as error:
            raise ValueError(f"{name or '(model)'}: {error}") from error

    model = replace(model, chosen, make, "sparse_linear: packing")
    if config.fuse and any(type(module).__module__.startswith("transformers.models.") for module in model.modules()):
        from ..integrations.decoder import fuse

        model = fuse(model)
    return model
