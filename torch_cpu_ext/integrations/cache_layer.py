"""What the cache layers of this package have in common; needs transformers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class CpuLayer(CacheLayerMixin):
    """A layer that says how its rows are picked (``_rows``) and what it holds."""

    is_sliding = False
    supports_early_init = False

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        raise NotImplementedError

    def _rows(self, index: Tensor) -> None:
        raise NotImplementedError

    def _select(self, index: Tensor) -> None:
        if self.is_initialized:
            self._rows(index)
            self.batch_size = len(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows of the batch in a new order, for beam search.

        Args:
            beam_idx: int64 ``(batch,)``: the row each row becomes.
        """
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch.

        Args:
            repeats: how often.
        """
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch.

        Args:
            indices: which, int64 or bool.
        """
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # what earlier versions of transformers call it

    def offload(self) -> None:
        """Does nothing: the cache is on the CPU."""

    def prefetch(self) -> None:
        """Does nothing: the cache is on the CPU."""


def held_bytes(layers: Iterable[Any]) -> int:
    """Bytes that the layers of a cache hold, those of transformers among them."""
    total = 0
    for layer in layers:
        tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
        total += layer.nbytes if isinstance(layer, CpuLayer) else sum(t.nbytes for t in tensors if t is not None)
    return total
