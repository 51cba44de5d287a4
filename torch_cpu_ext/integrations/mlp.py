"""Gated MLPs of transformers' models: gate, up and activation in one op."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from ..core import jit
from ..core.swap import Row, SharingReplacement, replace
from ..sparse_linear import SparseLinear

_ACTIVATIONS = {type(ACT2FN[theirs]): ours for theirs, ours in (("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"))}


def _code(module: type[nn.Module]) -> tuple[Any, ...]:
    """What the ``forward`` of a class does, whatever the class is called."""
    code = module.forward.__code__
    return code.co_code, code.co_consts[1:], code.co_names, code.co_varnames  # without the docstring, or None


def obstacle(module: nn.Module) -> str:
    """Why a module cannot be replaced by a `SparseMLP`; empty if it can."""
    if "forward" in vars(module) or _code(type(module)) != _code(LlamaMLP):
        return "its forward is not down_proj(act_fn(gate_proj(x)) * up_proj(x))"
    if type(module.act_fn) not in _ACTIVATIONS:
        return f"its activation is a {type(module.act_fn).__name__}"
    gate, up = module.gate_proj, module.up_proj
    if type(gate) is not SparseLinear or type(up) is not SparseLinear:
        return "gate_proj and up_proj are not packed"
    if gate.activation_group != up.activation_group:
        return "gate_proj and up_proj differ in activation_group"
    return ""


def _bare(module: nn.Module) -> bool:
    """Whether a call of a `SparseLinear` would do nothing but its product."""
    return type(module) is SparseLinear and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class SparseMLP(SharingReplacement):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` with packed weights: gate, up and activation in one op, `gated`.

    It shares the children of the module it stands for, so names in the ``state_dict`` stay. Where ``gate_proj`` or ``up_proj`` was replaced
    since, by an adapter for instance, or got hooks, the original's code runs.

    Args:
        module: the MLP, with `SparseLinear` children ``gate_proj`` and ``up_proj``.
    """

    technique = "sparse_linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._activation = _ACTIVATIONS[type(module.act_fn)]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., hidden_size)`` in, the same shape and dtype out."""
        modules: dict[str, Any] = self._modules
        gate, up = modules["gate_proj"], modules["up_proj"]
        if not (_bare(gate) and _bare(up) and gate.activation_group == up.activation_group):
            return self._original[0].forward(x)
        inner = torch.ops.torch_cpu_ext.sparse_linear_gated(
            *(x, gate.packed, up.packed, gate.bias, up.bias, gate.out_features),
            activation=self._activation,
            activation_group=gate.activation_group,
            stream_rows=gate.stream_rows,
        )
        return modules["down_proj"](inner)

    def row(self) -> Row:
        isa = jit.kernel_isa(self.technique, "decode")
        return Row(self.technique, "gated MLP", 0, 0, isa, f"{self._activation}; gate and up in one call")


def fuse_mlps(model: nn.Module) -> nn.Module:
    """Puts a `SparseMLP` in the place of each gated MLP of transformers that is packed.

    Args:
        model: a model of transformers, or one that contains such, whose Linears were replaced by `SparseLinear`.
    Returns:
        ``model``.
    """
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    found = {
        name: module
        for name, module in model.named_modules()
        if name
        and type(module).__module__.startswith("transformers.models.")
        and all(part in module._modules for part in parts)
        and not obstacle(module)
    }
    return replace(model, found, lambda name, module: SparseMLP(module), "sparse_linear: fusing MLPs") if found else model
