"""Packed weights of compiled graphs: each made once, shared by all graphs, made anew when its weight changed."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..sparse_linear import SparseLinearConfig, magnitude_mask, ops
from ..sparse_linear.modules import packed_pattern

Stamp = tuple[int, int]

# weight -> config -> (stamp, packed). The graphs' slots own the packed weights, so that torch.compiler.reset() frees them.
_packs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _stamp(weight: Tensor) -> Stamp:
    """Differs after the weight changed in place or got other storage; a write through ``.data`` alone is not seen."""
    try:
        version = weight._version
    except RuntimeError:  # inference tensors count no versions
        version = -1
    return version, weight.data_ptr()


def pack(weight: Tensor, config: SparseLinearConfig) -> Tensor:
    """The packed form of ``weight`` as it is now; at the second call the one of the first.

    Raises:
        RuntimeError: int8 or int4 is asked for, and ``weight`` has NaN or infinities.
        ValueError: pruning is asked for, and ``weight`` has NaN or infinities.
    """
    made: dict[SparseLinearConfig, tuple[Stamp, weakref.ref[Tensor]]] = _packs.setdefault(weight, {})
    stamp = _stamp(weight)
    if config in made and made[config][0] == stamp and (kept := made[config][1]()) is not None:
        return kept
    # Outside inference mode: a graph that trains a bias saves the packed weight for backward, which inference tensors forbid.
    with torch.inference_mode(False), torch.no_grad():
        dense = weight.detach()
        if config.sparsity is not None:
            dense = dense * magnitude_mask(dense, config.sparsity, config.granularity, config.pattern)
        packed = ops.pack(
            dense,
            dtype=config.dtype,
            layout=config.layout,
            group_size=config.group_size,
            symmetric=config.symmetric,
            pattern=packed_pattern(dense, config),
        )
    made[config] = stamp, weakref.ref(packed)
    return packed


class Slot:
    """One input of a compiled graph that takes a packed weight.

    Args:
        position: where the dense weight stands among the graph's inputs.
        config: how it is packed.
    """

    def __init__(self, position: int, config: SparseLinearConfig) -> None:
        self.position = position
        self.config = config
        # Layers of the same code share one compiled graph and come with their own weights, hence more than one entry.
        self._known: dict[int, tuple[weakref.ref[Tensor], Stamp, Tensor]] = {}

    def packed(self, args: tuple[Any, ...]) -> Tensor:
        """The packed form of the weight among a call's inputs. Runs for every layer at every call: about 0.3 microseconds."""
        weight: Tensor = args[self.position]
        known = self._known.get(id(weight))
        return known[2] if known is not None and known[0]() is weight and known[1] == _stamp(weight) else self.take(weight)

    def take(self, weight: Tensor) -> Tensor:
        """Packs a weight that is new here, and forgets those that are gone."""
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        packed = pack(weight, self.config)
        self._known[id(weight)] = weakref.ref(weight), _stamp(weight), packed
        return packed
