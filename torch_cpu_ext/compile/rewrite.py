"""Which linear layers of a graph are packed, and the graph with packed ones."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource, is_from_unspecialized_nn_module_source
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..core.checks import FLOATS
from ..core.progress import bar
from ..sparse_linear import SparseLinearConfig
from ..sparse_linear.ops import INT4_LIMIT
from .packs import Slot

_LOSSLESS = {torch.float32: SparseLinearConfig(dtype="fp32"), torch.bfloat16: SparseLinearConfig(dtype="bf16")}
_LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)
_PRODUCT = (torch.ops.torch_cpu_ext.sparse_linear, torch.ops.torch_cpu_ext.sparse_linear.default)
_EMBEDDING = (torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default)


@dataclasses.dataclass
class Layer:
    """One linear layer of a graph, and what becomes of it."""

    name: str
    weight: fx.Node
    config: SparseLinearConfig | None = None  # None: left alone
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SparseLinearConfig | None
) -> tuple[fx.GraphModule, list[Any], list[Slot], list[Layer]]:
    """Puts packed ops in place of linear layers.

    Args:
        gm: a graph from Dynamo; it stays as it is, since Dynamo goes on using it.
        example_inputs: its inputs; parameters and buffers are real tensors.
        config: for all layers (its `for_head` for the output embedding); None packs those that get smaller without loss.
    Returns:
        A graph with one more input for each packed weight, behind all others, in which the products of one input are one op; example inputs
        for it; the slots that provide the new inputs; and what became of each linear layer.
    """
    inputs = list(example_inputs)
    positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    layers: dict[fx.Node, Layer] = {}
    tables = _tables(gm, inputs, positions)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR:
            weight = _arguments(node)["weight"]
            value = inputs[positions[weight]] if weight in positions else None
            layers[node] = _inspect(node, weight, value, config and (config.for_head() if _is_head(value, tables) else config))

    chosen = {node: (layer.weight, layer.config) for node, layer in layers.items() if layer.config is not None}
    if not chosen and not any(_groups(gm.graph)):  # groups of a model that holds packed layers itself
        return gm, inputs, [], list(layers.values())
    slots: dict[tuple[fx.Node, SparseLinearConfig], Slot] = {}
    packed: dict[tuple[fx.Node, SparseLinearConfig], Tensor] = {}
    for key in bar(dict.fromkeys(chosen.values()), "compile: packing", "weight"):
        slots[key] = Slot(positions[key[0]], key[1])
        packed[key] = slots[key].take(inputs[positions[key[0]]])
    for node, key in chosen.items():
        layers[node].bytes_after = packed[key].numel()

    new, nodes = _copy(gm)
    fake_mode = detect_fake_mode(example_inputs)
    assert fake_mode is not None, "Dynamo, of which the weights were found to come, has one"
    last, placeholders = nodes[list(positions)[-1]], {}
    for number, key in enumerate(slots):
        name = f"torch_cpu_ext_packed_{number}"
        # The length is a symbol of its own: the graph takes packed weights of any length, so a changed weight needs no new graph. Nothing
        # in the graph depends on it, so there is no guard on it, which Dynamo could not check.
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        inputs.append(fake_mode.from_tensor(packed[key], symbolic_context=context, source=ConstantSource(name)))
        with new.graph.inserting_after(last):
            last = placeholders[key] = new.graph.placeholder(name)
        last.meta["example_value"] = inputs[-1]
        last._dynamo_source = None  # AOTAutograd asks for it; None: it does not come from the user's code
    for node, key in chosen.items():
        _put(new.graph, nodes[node], placeholders[key], key[1], inputs[positions[key[0]]].shape[0])
    for group in list(_groups(new.graph)):
        _join(new.graph, group)
    new.graph.lint()
    new.recompile()
    return new, inputs, list(slots.values()), list(layers.values())


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {"bias": None, **dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}


def _name(node: fx.Node) -> str:
    """The module that a node comes from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else node.name


def _inspect(node: fx.Node, weight: fx.Node, value: Any, config: SparseLinearConfig | None) -> Layer:
    """Decides about one linear layer."""
    layer = Layer(_name(node), weight)
    layer.reason = _obstacle(node, value)
    if layer.reason:
        return layer
    layer.bytes_before = value.numel() * value.element_size()
    if config is None:
        layer.config, layer.reason = _lossless(value)
    elif (config.sparsity is not None or config.dtype in ("int8", "int4")) and not bool(value.detach().isfinite().all()):
        layer.reason = "weight has NaN or infinities"
    elif config.dtype == "int4" and bool((value.detach().abs() > INT4_LIMIT).any()):
        layer.reason = "weight is beyond the range of float16"
    else:
        tied = len({_name(user) for user in weight.users}) > 1
        layer.config = dataclasses.replace(config, sparsity=None) if tied else config
    return layer


def _tables(gm: fx.GraphModule, inputs: Sequence[Any], positions: dict[fx.Node, int]) -> set[torch.Size]:
    """Shapes of the embedding tables in a graph."""
    found = [inputs[positions[n]] for e in gm.graph.nodes if e.target in _EMBEDDING for n in e.all_input_nodes if n in positions]
    return {value.shape for value in found if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2}


def _is_head(weight: Any, tables: set[torch.Size]) -> bool:
    """Whether a weight is that of the output embedding: a graph does not say, but its shape is that of the input embedding."""
    return isinstance(weight, Tensor) and weight.shape in tables


def _obstacle(node: fx.Node, weight: Any) -> str:
    """Why a layer cannot be packed; empty if it can."""
    arguments = _arguments(node)
    source = getattr(arguments["weight"], "_dynamo_source", None)
    if not isinstance(weight, Tensor) or source is None or not is_from_unspecialized_nn_module_source(source):
        return "weight is no parameter or buffer of a module"
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return f"weight is a {type(weight).__name__} of layout {weight.layout}"
    if weight.device.type != "cpu":
        return f"weight is on {weight.device.type}"
    if weight.dim() != 2 or not weight.numel():
        return f"weight is {weight.dim()}-D" if weight.numel() else "weight is empty"
    if weight.dtype not in FLOATS.values():
        return f"weight is {weight.dtype}"
    input, bias, out = (n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in (arguments["input"], arguments["bias"], node))
    if not isinstance(input, Tensor) or not isinstance(out, Tensor):
        return "its shapes are not known"
    if weight.requires_grad and out.requires_grad:
        return "weight trains"
    if not input.dtype == weight.dtype == out.dtype:
        return f"autocast runs it in {out.dtype}"
    if bias is not None and not (isinstance(bias, Tensor) and bias.dtype in FLOATS.values() and bias.shape == weight.shape[:1]):
        return "bias is not (out_features,)"
    # Anything else could write to it.
    if not all(_reads(user, arguments["weight"]) for user in arguments["weight"].users):
        return "weight has other uses in the graph"
    return ""


def _reads(user: fx.Node, weight: fx.Node) -> bool:
    """Whether ``user`` is a linear layer or an embedding of that weight, and can be trusted not to write to it."""
    if user.op != "call_function":
        return False
    if user.target in _LINEAR:
        return [n for n in _arguments(user).values() if n is weight] == [weight] and _arguments(user)["weight"] is weight
    return user.target in _EMBEDDING and user.kwargs.get("max_norm") is None and all(a is None for a in user.args[3:4])


def _lossless(weight: Tensor) -> tuple[SparseLinearConfig | None, str]:
    config = _LOSSLESS.get(weight.dtype)
    if config is None:
        return None, f"weight is {weight.dtype}, which no packed format holds without loss"
    size = weight.element_size()
    if weight.numel() / 8 + int(weight.detach().count_nonzero()) * size >= weight.numel() * size:  # a bitmap, and the values
        return None, "weight is not sparse"
    return config, ""


def _copy(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy that shares parameters, keeps what Dynamo noted for AOTAutograd, and the map from old to new nodes."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, nodes)
    graph.output(result).meta.update(gm.graph.output_node().meta)
    new = fx.GraphModule(gm, graph)
    new.meta.update(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(gm, name):
            setattr(new, name, getattr(gm, name))
    for old in gm.graph.find_nodes(op="placeholder"):
        nodes[old]._dynamo_source = old._dynamo_source
    return new, nodes


def _put(graph: fx.Graph, node: fx.Node, packed: fx.Node, config: SparseLinearConfig, out_features: int) -> None:
    """Puts the packed op in the place of a linear layer; shape and dtype stay, hence the metadata too."""
    arguments = _arguments(node)
    with graph.inserting_before(node):
        new = graph.call_function(
            torch.ops.torch_cpu_ext.sparse_linear.default,
            (arguments["input"], packed, arguments["bias"], out_features),
            {"activation_group": config.activation_group},
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Products with packed weights that can be one `sparse_linear_group`: of the same input, which nothing writes to between them."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in _PRODUCT and len(node.args) == 4 and isinstance(node.args[3], int):
            input, packed, bias, _ = node.args
            if packed.op == "placeholder" and (bias is None or bias.op == "placeholder"):  # they are there before the first
                key = input, bias is None, tuple(sorted(node.kwargs.items()))
                found.setdefault(key, []).append(node)
        elif _writes(node):
            yield from (group for group in found.values() if len(group) > 1)
            found = {}
    yield from (group for group in found.values() if len(group) > 1)


def _writes(node: fx.Node) -> bool:
    """Whether a node might write to a tensor; by its name, as PyTorch has them, where it has no schema."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = getattr(target, "__module__", "") == "_operator" and (name == "setitem" or name.startswith("i"))
    known = node.op in ("call_function", "call_method") and not isinstance(target, torch._ops.HigherOrderOperator)
    return not known or in_place or not name or name.endswith("_") or "out" in node.kwargs


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    """Puts one op in the place of several products."""
    weights, biases, features = (list(column) for column in zip(*(node.args[1:] for node in group), strict=True))
    with graph.inserting_before(group[0]):
        joined = graph.call_function(
            torch.ops.torch_cpu_ext.sparse_linear_group.default,
            (group[0].args[0], weights, [] if biases[0] is None else biases, features),
            dict(group[0].kwargs),
        )
        joined.meta = {**group[0].meta, "example_value": [node.meta.get("example_value") for node in group]}
        for i, node in enumerate(group):
            part = graph.call_function(operator.getitem, (joined, i))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
