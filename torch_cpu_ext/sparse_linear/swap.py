"""How sparse_linear replaces parts of a model."""

from typing import cast

from torch import nn

from ..core.checks import FLOATS
from ..core.swap import Filter, Names, handles, replace, select, shared_parameters
from .config import SparseLinearConfig
from .conv1d import SparseConv1D, conv1d_class
from .modules import SparseLinear


def layer_classes() -> tuple[type[nn.Module], ...]:
    """The classes of layers that `swap_linear` replaces: ``nn.Linear``, and the ``Conv1D`` of transformers where that is loaded."""
    conv1d = conv1d_class()
    return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)


def stand_in(layer: nn.Module, config: SparseLinearConfig, *, tied: bool = False) -> SparseLinear | str:
    """What replaces a layer of one of the `layer_classes`, or why it has to stay as it is.

    Args:
        layer: with a weight on the CPU.
        config: how to pack it.
        tied: as in `SparseLinear.from_linear`.
    Raises:
        ValueError: the weight has NaN or infinities where pruning or codes need numbers.
    """
    weight = cast(nn.Parameter, layer.weight)
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device.type}, not on the CPU"
    if weight.dtype not in FLOATS.values():
        return f"its weight is {weight.dtype}, not float32, bfloat16 or float16"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized"
    if any(getattr(layer, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
        return "it has hooks, which would be lost (torch.nn.utils.prune.remove makes pruning permanent)"
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_linear(layer, config, tied=tied)
    return SparseConv1D.from_conv1d(layer, config, tied=tied)


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

    The ``Conv1D`` layers of transformers are linear layers too, and become `SparseConv1D`. Subclasses of either are left alone. A tied
    ``lm_head`` is packed too (it is a quarter or more of a small model's bytes), unpruned; the embedding keeps the shared weight, and
    `restore` ties them again.

    Args:
        model: any module; a layer itself is replaced by the returned layer.
        config: None for the default.
        filter_fn: as in `optimize`.
        include: as in `optimize`.
        exclude: as in `optimize`.
    Returns:
        ``model``, or its replacement if it was itself a layer.
    Raises:
        ValueError: a weight has NaN or infinities where pruning or codes need numbers; the message names the module.
    """
    config = config or SparseLinearConfig()
    chosen = select(model, layer_classes(), filter_fn, include, exclude)
    shared = shared_parameters(model)
    # Asked of every part: the language model may be inside of another module.
    heads = [find() for module in model.modules() if (find := getattr(module, "get_output_embeddings", None))]

    def make(name: str, layer: nn.Module) -> nn.Module | str:
        try:
            own = config.for_head() if any(layer is head for head in heads) else config
            return stand_in(layer, own, tied=id(layer.weight) in shared)
        except ValueError as error:
            raise ValueError(f"{name or '(model)'}: {error}") from error

    return join(replace(model, chosen, make, "sparse_linear: packing"), config)


def join(model: nn.Module, config: SparseLinearConfig) -> nn.Module:
    """Moves a model's packed weights together; in models of transformers, fuses MLPs and stacks of layers if the config says so."""
    SparseLinear.settle(model)
    if config.fuse and any(type(module).__module__.startswith("transformers.models.") for module in model.modules()):
        from ..integrations.decoder import fuse
        from ..integrations.mlp import fuse_mlps

        model = fuse(fuse_mlps(model))
    return model
