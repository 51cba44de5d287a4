"""Fused decoding of transformers' Llama-shaped models: one op for all layers where a call has few tokens, the model's own code elsewhere.

`torch_cpu_ext.optimize` puts a `FusedDecoder` in the place of the stack of layers (``model.model``); ``model.generate`` is called as
before.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..core import jit, memory
from ..core.swap import Row, SharingReplacement, replace
from ..sparse_linear import SparseLinear
from ..sparse_linear.decode import BLOCK, MAX_ROWS, PARTS, decode, read_cache, write_cache
from .mlp import SparseMLP

# Stacks of layers that are norm, attention, norm, gated MLP, each with its residual, and the norms' way with their weight.
MODELS = (
    *("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "SmolLM3Model", "Olmo2Model", "Olmo3Model"),
    *("GemmaModel", "Gemma2Model", "Gemma3TextModel"),
)
# Stacks that come close, and what the op does not have for them.
OTHERS = {"Phi3Model": "its projections are fused (qkv_proj, gate_up_proj)"}
_ATTENTION = ("sdpa", "eager")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")  # angles that depend on the position alone
_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_lock = threading.Lock()  # around what is built once: two threads may call one model
_numbers = itertools.count(1)  # of what was built
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_MORE_NORMS = _NORMS | {  # of layers that have norms after attention and MLP; Olmo 2 and 3 have no others
    "attention_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}
_CENTRED = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")  # whose weight is the distance from one


class Store:
    """Keys and values of all layers of one cache, in the blocks that `decode` reads. Grows by half, so that a token costs no copy."""

    def __init__(self, layers: int, heads: int, dim: int) -> None:
        self.kv = torch.empty(layers, 2, 0, heads, 0, BLOCK, dim, dtype=torch.bfloat16)
        self.seen = (0, 0)  # ``id`` of the store that a decoder last looked at its layers for, and which of its arenas it had then

    def reserve(self, batch: int, length: int, used: int) -> None:
        """Makes room for ``length`` tokens of ``batch`` rows, of which ``used`` are there."""
        layers, _, rows, heads, blocks, _, dim = self.kv.shape
        if rows == batch and length <= blocks * BLOCK:
            return
        if used and rows != batch:
            raise ValueError(f"the cache holds {rows} rows, got {batch}")
        wanted = -(-length // BLOCK)
        shape = (layers, 2, batch, heads, max(wanted + 4, wanted * 3 // 2), BLOCK, dim)
        larger = memory.zeros(2 * math.prod(shape)).view(torch.bfloat16).view(shape)
        if used:
            larger[:, :, :, :, : -(-used // BLOCK)] = self.kv[:, :, :, :, : -(-used // BLOCK)]
        self.kv = larger

    def select(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        self.kv = self.kv.index_select(2, indices)


class StoreLayer(DynamicLayer):
    """One layer's part of a `Store`, as transformers sees it. The layers of a cache grow, shrink and are reordered together."""

    def __init__(self, store: Store, index: int) -> None:
        self.store = store
        self.index = index
        self.length = 0
        self.dtype = torch.float32
        super().__init__()
        self.is_initialized = True
        self.device = torch.device("cpu")

    def _read(self, which: int) -> Tensor:
        kv = self.store.kv[self.index : self.index + 1]
        return read_cache(kv, self.length)[0, which].to(self.dtype)

    @property
    def keys(self) -> Tensor:
        """A copy in plain order, ``(batch, heads, length, head_dim)``."""
        return self._read(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        assert value is None, "the keys of a fused decoder's cache change by update() only"

    @property
    def values(self) -> Tensor:
        """Like `keys`."""
        return self._read(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None, "the values of a fused decoder's cache change by update() only"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds states and gives all of them; what was there before is rounded to bfloat16."""
        self.dtype = key_states.dtype
        before, end = self.length, self.length + key_states.shape[-2]
        self.store.reserve(key_states.shape[0], end, before)
        write_cache(self.store.kv[self.index : self.index + 1], before, torch.stack([key_states, value_states])[None])
        self.length = end
        if not before:
            return key_states, value_states
        keys, values = read_cache(self.store.kv[self.index : self.index + 1], before)[0].to(self.dtype)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def reset(self) -> None:
        """Forgets all tokens."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; ``tokens_to_remove`` is negative, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows of the batch into another order; the first layer does it for all."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch; the first layer does it for all."""
        if self.index == 0:
            self.store.select(torch.arange(self.store.kv.shape[2]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch; the first layer does it for all."""
        if self.index == 0:
            rows = torch.arange(self.store.kv.shape[2])
            self.store.select(rows[indices])


def obstacle(model: nn.Module) -> str:
    """Why the layers of a model cannot be fused; empty if they can.

    Args:
        model: what transformers calls the model, without the head, after its Linears were replaced by `SparseLinear`.
    """
    if type(model).__name__ in OTHERS:
        return OTHERS[type(model).__name__]
    config: Any = model.config
    if config._attn_implementation not in _ATTENTION:
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if _ACTIVATIONS.get(_activation(config)) is None:
        return f"its activation is {_activation(config)}"
    for kind in _ropes(config):
        rope = (config.rope_parameters or {}) if kind is None else config.rope_parameters[kind]
        if rope.get("rope_type") not in _FIXED_ROPES:
            return f"its rotary embedding is {rope.get('rope_type')}"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "its rotary embedding turns a part of each head only"
    layers = list(model.layers)  # type: ignore[arg-type]
    if not layers:
        return "it has no layers"
    own = type(model).__module__
    if "forward" in vars(model):
        return "it has a forward of its own"
    for index, layer in enumerate(layers):
        for name, module in [("", layer), *layer.named_children()]:
            if type(module).__module__ != own and not isinstance(module, SparseMLP):
                return f"layers.{index}{name and '.'}{name} is a {type(module).__name__}"
        for name in _LINEARS.values():
            linear = layer.get_submodule(name)
            if type(linear) is not SparseLinear:
                return f"layers.{index}.{name} is not packed"
            if linear.activation_group != 32:
                return f"layers.{index}.{name} has activation_group {linear.activation_group}, not 32"
        for holder, norm in ((f"layers.{index}.self_attn.{name}", getattr(layer.self_attn, name, None)) for name in ("q_norm", "k_norm")):
            if norm is not None and type(norm).__module__ != own:
                return f"{holder} is a {type(norm).__name__}"
        if layer.self_attn.head_dim % BLOCK:
            return f"its heads have {layer.self_attn.head_dim} elements, not a multiple of {BLOCK}"
    if type(model.norm).__module__ != own:
        return f"norm is a {type(model.norm).__name__}"
    for name, module in model.named_modules():
        if name and name != "embed_tokens" and (_hooks(module) or "forward" in vars(module)):  # the embedding is called in any case
            return f"{name} has {'hooks' if _hooks(module) else 'a forward of its own'}"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    """A module's hooks, but for those that transformers leaves in models once hidden states were asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]


class FusedDecoder(SharingReplacement):
    """Stands for a stack of Llama-shaped layers: calls of up to 8 tokens with a cache run in one op, all others in the original's code.

    It shares the original's children and hooks, so names in the ``state_dict`` stay, and other attributes are the original's. What the op
    reads is built from the layers; whether they changed is looked at for each new cache, after each call of the original's code and after
    ``to``, ``train`` and ``load_state_dict``, not for each token.

    Args:
        model: the stack, with `SparseLinear` layers.
    """

    technique = "sparse_linear"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._checked = False  # whether the arena is known to be that of the layers
        self._stamp: list[tuple[Any, int]] = []  # the layers that the arena was made of
        self._number = 0
        # Tensors that belong together are replaced together: another thread may be reading.
        self._arena = torch.empty(0, dtype=torch.uint8), torch.empty(0), torch.empty(0, dtype=torch.int64)  # and the vectors and the plan
        self._angles = torch.empty(0, 0), torch.empty(0, 0)  # cosines and sines

    def train(self, mode: bool = True) -> "FusedDecoder":
        self._checked = False
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedDecoder":
        super()._apply(fn, recurse)
        self._checked = False
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._checked = False

    def row(self) -> Row:
        isa = jit.kernel_isa(self.technique, "decode")
        return Row(self.technique, "fused decoder", 0, 0, isa, f"{len(self.layers)} layers in one call, up to {MAX_ROWS} tokens")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        plain = torch.is_grad_enabled() or self.training or torch.compiler.is_compiling() or _has_any_global_hook()
        call = None if plain else self._fusable(*args, **kwargs)
        if call is None:
            self._checked = False
            return self._original[0].forward(*args, **kwargs)  # not its hooks, which are this module's, too
        return self._decode(*call)

    def _fusable(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | None:
        """What `_decode` takes, or None where the original must run; adopts the cache in either case."""
        cache = past_key_values if cache is None else cache
        given = input_ids if inputs_embeds is None else inputs_embeds
        config: Any = self.config
        if config.num_hidden_layers != len(self.layers) or config._attn_implementation not in _ATTENTION:
            return None
        if (
            cache is None
            or given is None
            or (input_ids is not None and inputs_embeds is not None)
            or use_cache is False
            or not self._adopt(cache)
        ):
            return None
        batch, tokens = given.shape[:2]
        length = cache.layers[0].length
        if (
            not 1 <= batch * tokens <= MAX_ROWS
            or return_dict is False
            or any(value is not None and value is not False for value in kwargs.values())
        ):
            return None
        if config.output_hidden_states or config.output_attentions or not config.return_dict:
            return None
        starts = None
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length + tokens):
                return None
            if not bool(attention_mask.all()):
                starts = attention_mask.long().argmax(1)
                if not bool((attention_mask.long().sum(1) + starts == length + tokens).all()) or int(starts.max()) > length:
                    return None  # padding elsewhere than on the left of what is in the cache
        store = cache.layers[0].store
        if not (self._checked and length and store.seen == (id(store), self._number)):
            if not self._prepare():
                return None
            self._checked = True
            store.seen = id(store), self._number
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(length, length + tokens)
        positions = position_ids.expand(batch, tokens).contiguous()
        last, ropes = int(positions.max()), len(_ropes(config))
        if (last + 1) * ropes > len(self._angles[0]):
            self._extend(last + 1)
        if ropes > 1:
            positions = positions * ropes  # the lines of a position follow each other
        return hidden, positions, starts, cache, length

    def _decode(self, hidden: Tensor, positions: Tensor, starts: Tensor | None, cache: Any, length: int) -> BaseModelOutputWithPast:
        layers, store = cache.layers, cache.layers[0].store
        batch, tokens = hidden.shape[:2]
        store.reserve(batch, length + tokens, length)
        attention = self.layers[0].self_attn
        out = decode(
            *(hidden, *self._arena, *self._angles, positions, starts, store.kv, length),
            heads=attention.q_proj.out_features // attention.head_dim,
            inner=self.layers[0].mlp.gate_proj.out_features,
            epsilon=self.config.rms_norm_eps,
            scale=attention.scaling,
            activation=_ACTIVATIONS[_activation(self.config)],
            softcap=_softcap(attention),
        )
        for layer in layers:
            layer.length = length + tokens
        return BaseModelOutputWithPast(last_hidden_state=out, cache=cache)

    # ------------------------------------------------------------------------------------------------------------------------- the cache

    def _adopt(self, cache: Any) -> bool:
        """Puts `StoreLayer` layers into a plain dynamic cache, with what it holds. False if it is of another kind."""
        if type(cache) is not DynamicCache or cache.offloading:
            return False
        count = len(self.layers)
        if len(cache.layers) == count and type(cache.layers[0]) is StoreLayer:
            return True
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) or len(cache.layers) > count:
            return False
        if any(type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() for layer in cache.layers):
            return False  # it may have dropped tokens
        if cache.layers and cache.get_seq_length() and len(cache.layers) < count:
            return False
        attention = self.layers[0].self_attn
        store = Store(count, attention.k_proj.out_features // attention.head_dim, attention.head_dim)
        fresh: list[Any] = [StoreLayer(store, index) for index in range(count)]
        for new, old in zip(fresh, cache.layers, strict=False):
            if old.get_seq_length():
                new.update(old.keys, old.values)
        cache.layers = fresh
        return True

    # ------------------------------------------------------------------------------------------------------------------------- the arena

    def _parts(self) -> Iterator[tuple[int, str, Tensor]]:
        """Layer, part and tensor of all that decoding needs; norms as float32, the way they are multiplied."""
        centre = int(type(self.norm).__name__ in _CENTRED)
        for index, layer in enumerate(self.layers):
            for part, name in _LINEARS.items():
                linear = layer.get_submodule(name)
                yield index, part, linear.packed
                if linear.bias is not None:
                    yield index, f"{part}_bias", linear.bias.detach().float()
            for part, name in (_MORE_NORMS if hasattr(layer, "post_feedforward_layernorm") else _NORMS).items():
                holder, _, leaf = name.rpartition(".")
                norm = getattr(layer.get_submodule(holder), leaf, None)
                if norm is not None:
                    every = part in ("q_norm", "k_norm") and norm.weight.numel() != layer.self_attn.head_dim
                    yield index, f"{part}_all" if every else part, norm.weight.detach().float() + centre
        yield len(self.layers), PARTS[0], self.norm.weight.detach().float() + centre

    def _fingerprint(self) -> list[tuple[Any, int]]:
        """Every module, hook and tensor, with the tensors' versions: differs after one was put in or changed in place."""
        found: list[tuple[Any, int]] = []
        for module in self._original[0].modules():
            found.append((module, 0))
            if module is not self._original[0]:
                found += [(hook, 0) for hook in _hooks(module)]
            if "forward" in vars(module):
                found.append((vars(module)["forward"], 0))
            tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            found += [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        return found

    def _prepare(self) -> bool:
        """Builds the arena if a layer changed since it was built. False if the layers cannot be fused any more."""
        with _lock:
            return self._build()

    def _build(self) -> bool:
        now = self._fingerprint()
        if len(now) == len(self._stamp) and all(a is b and i == j for (a, i), (b, j) in zip(now, self._stamp, strict=True)):
            return True
        if obstacle(self._original[0]):
            return False
        packed = [tensor for _, part, tensor in self._parts() if part in _LINEARS]
        if len({tensor.untyped_storage().data_ptr() for tensor in packed}) > 1:
            SparseLinear.settle(self)
            packed = [tensor for _, part, tensor in self._parts() if part in _LINEARS]
        storage = packed[0].untyped_storage()
        arena = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload]
        plan = torch.full((len(self.layers) + 1, len(PARTS)), -1)
        vectors: list[Tensor] = []
        for index, part, tensor in self._parts():
            if part in _LINEARS:
                plan[index, PARTS.index(part)] = int(tensor.storage_offset())
            else:
                plan[index, PARTS.index(part)] = sum(vector.numel() for vector in vectors)
                vectors.append(tensor)
        for index, layer in enumerate(self.layers):
            plan[index, PARTS.index("window")] = _window(layer, self.config) or -1
            plan[index, PARTS.index("rope")] = _rope(layer, self.config)
        self._arena = arena, torch.cat(vectors), plan
        self._stamp = self._fingerprint()
        self._number = next(_numbers)
        return True

    def _extend(self, positions: int) -> None:
        """Tables of the rotary embedding for at least so many positions; those of layers that differ line by line in turn."""
        with _lock:
            ropes = _ropes(self.config)
            count = max(positions + 256, 2 * len(self._angles[0]) // len(ropes), 1024)
            line = torch.arange(count)[None]
            tables = [self.rotary_emb(torch.empty(0), line, *([] if kind is None else [kind])) for kind in ropes]
            half = tables[0][0].shape[-1] // 2
            cos, sin = (torch.stack([table[which][0, :, :half].float() for table in tables], 1).flatten(0, 1) for which in (0, 1))
            self._angles = cos, sin


def _activation(config: Any) -> str:
    """What the MLP's gate goes through; Gemma 2 and 3 have their own name for it."""
    own: str = config.hidden_act if hasattr(config, "hidden_act") else config.hidden_activation
    return own


def _softcap(attention: Any) -> float:
    """Of the scores; 0 if there is none. Gemma 3 has the field and does not use it."""
    return float(attention.attn_logit_softcapping or 0) if type(attention).__name__ == "Gemma2Attention" else 0.0


def _ropes(config: Any) -> list[str | None]:
    """The kinds of layers that have rotary embeddings of their own, in a fixed order; [None] if all share one."""
    kinds = [kind for kind, rope in (config.rope_parameters or {}).items() if isinstance(rope, dict) and kind in config.layer_types]
    return [*sorted(kinds)] or [None]


def _rope(layer: Any, config: Any) -> int:
    """Which of `_ropes` a layer has; -1 if it does not rotate."""
    if not getattr(layer.self_attn, "use_rope", True):
        return -1
    kinds = _ropes(config)
    return 0 if kinds == [None] else kinds.index(config.layer_types[layer.self_attn.layer_idx])


def _window(layer: nn.Module, config: Any) -> int | None:
    """Tokens that a layer's queries see; None if all."""
    alternating = getattr(config, "layer_types", None) is not None
    own: int | None = getattr(layer.self_attn, "sliding_window", None if alternating else getattr(config, "sliding_window", None))
    return own


def fuse(model: nn.Module) -> nn.Module:
    """Puts a `FusedDecoder` in the place of each stack of layers that can have one, and notes for `report` why others cannot.

    Args:
        model: a model of transformers, or one that contains such, whose Linears were replaced by `SparseLinear`.
    Returns:
        ``model``.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name and type(module).__name__ in (*MODELS, *OTHERS) and type(module).__module__.startswith("transformers.models.")
    }

    def make(name: str, module: nn.Module) -> nn.Module | str:
        reason = obstacle(module)
        return f"decodes layer by layer: {reason}" if reason else FusedDecoder(module)

    return replace(model, found, make, "sparse_linear: fusing") if found else model
