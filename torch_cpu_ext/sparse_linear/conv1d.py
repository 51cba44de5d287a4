"""`SparseConv1D`, the drop-in for the ``Conv1D`` of transformers: a linear layer whose weight is stored transposed (GPT-2 has it)."""

import sys
from typing import Any

import torch
from torch import nn

from .config import SparseLinearConfig
from .modules import SparseLinear


def conv1d_class() -> type[nn.Module] | None:
    """The class that `SparseConv1D` stands in for; None unless transformers is loaded, and then no model can have one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class SparseConv1D(SparseLinear):
    """A `SparseLinear` that stands in for a ``transformers.pytorch_utils.Conv1D``, which computes ``y = x @ weight + bias``.

    The packed weight, and ``weight``, are ``(out_features, in_features)`` as in every `SparseLinear`. Only what goes in and comes out has
    the shape ``(in_features, out_features)`` of ``Conv1D``: the layer of `original`, and a dense weight that ``load_state_dict`` packs.
    """

    @classmethod
    def from_conv1d(cls, conv: Any, config: SparseLinearConfig | None = None, *, tied: bool = False) -> "SparseConv1D":
        """Packs a layer's weight; the bias is shared with it.

        Args:
            conv: the ``Conv1D``; it stays as it is.
            config: None for the default.
            tied: as in `SparseLinear.from_linear`.
        Raises:
            ValueError: as in `SparseLinear.from_linear`.
            TypeError: as in `SparseLinear.from_linear`.
        """
        with torch.device("meta"):
            linear = nn.Linear(conv.nx, conv.nf, bias=False)
        linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=conv.weight.requires_grad)
        linear.bias = conv.bias
        result = cls.from_linear(linear, config, tied=tied)
        assert isinstance(result, cls)
        if result._original:
            result._original = (conv.weight,)
        return result.train(conv.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the weights this layer computes with, or those of the ``Conv1D`` where they were kept or are tied."""
        linear = super().to_linear()
        if self._original:
            (weight,) = self._original
            linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
        return linear

    def original(self) -> nn.Module:  # type: ignore[override]
        """The ``Conv1D``: with its own weight where that was kept or is tied, else with what this layer computes with."""
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv: Any = Conv1D(self.out_features, self.in_features)
        if self._original:
            conv.weight = self._original[0]
        else:
            linear = self.to_linear()
            conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=linear.weight.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].dim() == 2:
            state_dict = {**state_dict, key: state_dict[key].t()}
        super()._load_from_state_dict(state_dict, prefix, *args)
