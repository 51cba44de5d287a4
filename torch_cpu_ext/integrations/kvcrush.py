"""Hugging Face transformers with a cache that keeps what matters (KVCrush, arXiv:2503.00022).

Importing this module registers the attention implementation `NAME`. A model that uses it, given a `KVCrushCache`, attends, chooses and
forgets in its layers of full attention; with any other cache, and in other layers, it does what ``sdpa`` does.
"""

import copy
import inspect
import itertools
import types
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError("transformers must be installed: pip install 'torch_cpu_ext[transformers]'") from error

from ..core import jit
from ..core.swap import Row, SharingReplacement
from ..kv_cache.config import KVCrushConfig
from ..kv_cache.layer import CompressedKV
from .cache_layer import CpuLayer, held_bytes

NAME = "torch_cpu_ext_kvcrush"

_REFUSED = ("s_aux", "position_bias", "sliding_window")  # what attention functions are given, and the ops don't know
_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, KVCrushLayer]" = weakref.WeakValueDictionary()


class KVCrushLayer(CpuLayer):
    """Keys and values of one layer of a `KVCrushCache`.

    ``update`` only hands them on, with this layer as an attribute of the keys: importance needs the queries, so everything happens in the
    attention function.

    Args:
        config: of the decoder, to see that the model uses the attention that can read this.
        crush: what to keep.
        name: of the layer, for errors.
        shape: KV heads and head dimension that the model has here.
        place: number of this layer among those compressed, and how many they are.
    """

    def __init__(self, config: Any, crush: KVCrushConfig, name: str, shape: tuple[int, int], place: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.crush, self.name, self.shape, self.place = config, crush, name, shape, place
        self.reset()
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor([number])  # by which compiled code finds this layer; a tensor, so as not to be compiled anew for each
        _layers[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCrushLayer":
        new = copy.copy(self)
        memo[id(self)] = new
        with torch.inference_mode(False):  # it is written to outside of it
            new.kept = copy.deepcopy(self.kept, memo)  # the model's config stays shared, since the model goes on changing it
        new._register()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self.kept = CompressedKV(self.crush, *self.place)
        self.tokens = 0
        self.scaling: tuple[float, float] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shape and dtype from the first keys and values.

        Raises:
            ValueError: they are not those of the cache's model, or cannot be stored.
        """
        batch, heads, _, d = key_states.shape
        if (heads, d) != self.shape or value_states.shape[1] != heads:
            raise ValueError(
                f"KVCrushCache: {self.name} must have {self.shape[0]} KV heads of dimension {self.shape[1]}, as in the model that the "
                f"cache was made for, got {heads} of {d}"
            )
        if value_states.shape[-1] != d or d % 16:
            raise ValueError(
                f"KVCrushCache: {self.name} must have keys and values of the same head dimension, a multiple of 16, "
                f"got {d} and {value_states.shape[-1]}"
            )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands new keys and values on to the attention function, which takes them in.

        Args:
            key_states: ``(batch, KV heads, tokens, head_dim)``.
            value_states: the same.
            args: not used.
            kwargs: not used.
        Returns:
            The same, the keys with this layer as their attribute ``kvcrush``.
        Raises:
            ValueError: the model uses another attention implementation, which would not see the tokens before; or the shapes are not those
                of the tokens before.
        """
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"KVCrushCache: the model must use the attention implementation {NAME}, got {self.config._attn_implementation}; "
                f'call model.set_attn_implementation("{NAME}")'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if (key_states.shape[0], key_states.shape[1], key_states.shape[3]) != (self.batch_size, *self.shape):
            raise ValueError(
                f"KVCrushCache: {self.name} must get keys of batch {self.batch_size} with {self.shape[0]} heads of dimension "
                f"{self.shape[1]}, as before, got batch {key_states.shape[0]} with {key_states.shape[1]} of {key_states.shape[3]}"
            )
        self.tokens += key_states.shape[2]
        key_states = key_states[:]  # the attribute belongs to this call, not to the caller's tensor
        key_states.kvcrush = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
        """Attention of new tokens, which are taken in, over all that are kept.

        Args:
            query: ``(batch, heads, tokens, head_dim)``.
            key: ``(batch, KV heads, tokens, head_dim)``.
            value: the same.
            mask: bool ``(batch, all tokens)``: False for padding, on the left; None if there is none.
            scale: of the scores.
            softcap: see `torch_cpu_ext.kv_cache.attend`.
        Returns:
            As ``query``.
        Raises:
            ValueError: the mask has another form; or the keys were handed out before.
        """
        # What is kept is written to by other calls, which may be outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.scaling = scale, softcap
            seen = self.kept.seen + key.shape[2]
            try:
                return self.kept(query, key, value, _padding(mask, key.shape[0], seen), scale=scale, softcap=softcap)
            except BaseException:
                self.tokens = self.kept.seen
                raise

    def compress(self) -> None:
        """Drops what is over the budget now."""
        if self.scaling is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.kept.compress(scale=self.scaling[0], softcap=self.scaling[1])

    def positions(self) -> Tensor:
        """Which tokens are kept: int64 ``(batch, KV heads, tokens)``, ascending, counted from the first column of the batch, padding
        included; -1 in front where a head has fewer than others."""
        return self.kept.positions() if self.tokens else torch.empty((0, self.shape[0], 0), dtype=torch.int64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens a mask covers, and the first of them: all that were ever seen, since the mask tells the padding among them.

        Args:
            query_length: tokens about to come.
        """
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, those dropped included: it is what positions are counted by."""
        return self.tokens

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not after tokens were dropped or packed into int8 or int4."""
        return self.kept.croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back.

        Args:
            tokens_to_remove: how many, as a negative number, as transformers has it.
        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens were dropped before, or are packed into int8 or int4.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if not tokens_to_remove or not self.tokens:
            return
        if not self.is_croppable:
            what = "tokens were dropped" if self.kept.evicted else "pages were packed into int8 or int4"
            raise RuntimeError(
                f"KVCrushCache: {self.name} cannot take tokens back after {what}; assisted decoding needs a budget that is never exceeded, "
                "and pages of fp32 or bf16"
            )
        with torch.inference_mode(False):
            self.kept.crop(-tokens_to_remove)
        self.tokens = self.kept.seen

    def _rows(self, index: Tensor) -> None:
        with torch.inference_mode(False):
            self.kept.rows(index.cpu().clone())

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        return self.kept.nbytes


class KVCrushCache(Cache):
    """A cache that keeps the important keys and values and some that represent the others (KVCrush, arXiv:2503.00022).

    For ``model.generate(..., past_key_values=cache)`` and ``model(..., past_key_values=cache)``; the model must use the attention
    implementation ``"torch_cpu_ext_kvcrush"``, which `torch_cpu_ext.optimize` with a `KVCrushConfig` sets too. Layers with full attention
    are compressed; others, such as those with a sliding window, keep the cache that transformers gives them. For inference only.

    `copy.deepcopy` of a cache continues on its own: several questions about one context that was compressed once.

    Args:
        config: the model's configuration.
        crush: what to keep and how; None for the default.
        skip: numbers of layers that keep transformers' cache.
    Raises:
        ValueError: no layer can be compressed, or layers share their keys and values.
    """

    def __init__(self, config: Any, crush: KVCrushConfig | None = None, *, skip: Collection[int] = ()) -> None:
        self.crush = crush or KVCrushConfig()
        decoder = config.get_text_config(decoder=True)
        if "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ()):
            raise ValueError(f"KVCrushCache: the model's layers must have keys and values of their own, got {decoder.model_type}")
        layers: list[Any] = DynamicCache(config=decoder).layers
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer and i not in skip]
        if not full:
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(f"KVCrushCache: the model must have a layer of full attention to compress, got {', '.join(kinds)} only")
        for place, i in enumerate(full):
            layers[i] = KVCrushLayer(decoder, self.crush, f"layer {i}", _shape(decoder, i), (place, len(full)))
        super().__init__(layers=layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As that of `transformers.Cache`.

        Args:
            key_states: of the new tokens.
            value_states: likewise.
            layer_idx: number of the layer.
            args: for the layer.
            kwargs: for the layer.
        Raises:
            ValueError: the cache was made for a model with fewer layers, or other shapes.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(f"KVCrushCache: the cache was made for a model of {len(self.layers)} layers, got keys of layer {layer_idx}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def compress(self) -> None:
        """Drops what is over the budget now; with ``evict="manual"`` nothing else does."""
        for layer in self.layers:
            if isinstance(layer, KVCrushLayer):
                layer.compress()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by all layers, spare room included."""
        return held_bytes(self.layers)


def _shape(decoder: Any, layer: int) -> tuple[int, int]:
    """KV heads and head dimension of a layer."""
    config = decoder.per_layer_config[layer] if hasattr(decoder, "per_layer_config") else decoder
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, d


def _padding(mask: Tensor | None, batch: int, seen: int) -> Tensor | None:
    """int64 ``(batch,)``: the tokens of padding on the left that a mask tells; None if there is none. Kept on the mask, which all layers
    of a call share."""
    if mask is None:
        return None
    known: dict[int, Tensor | None] | None = getattr(mask, "kvcrush_padding", None)
    if known is not None and seen in known:
        return known[seen]
    if mask.dim() != 2 or mask.dtype != torch.bool or tuple(mask.shape) != (batch, seen):
        raise ValueError(
            f"KVCrushCache: attention_mask must be 2-D and cover all tokens so far, ({batch}, {seen}), got {mask.dtype} {tuple(mask.shape)}"
        )
    padding: Tensor | None = (~mask).cumprod(1).sum(1)
    if not bool((mask == (torch.arange(seen) >= padding[:, None])).all()):  # type: ignore[index]
        raise ValueError("KVCrushCache: attention_mask must have padding on the left only, got one with a hole or padding on the right")
    if not bool(padding.any()):  # type: ignore[union-attr]
        padding = None
    mask.kvcrush_padding = {seen: padding}  # type: ignore[attr-defined]
    return padding


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of the attention implementation `NAME`: the two-dimensional one of padding, or none, where attention is causal over all
    tokens seen; that of ``sdpa`` elsewhere.

    Args:
        batch_size: rows.
        q_length: new tokens.
        kv_length: tokens attended to.
        q_offset: the first new token.
        kv_offset: the first token attended to.
        mask_function: which tokens see which.
        attention_mask: bool ``(batch, tokens)``: False for padding.
        local_size: of a sliding window or chunk.
        use_vmap: for ``sdpa_mask``.
        kwargs: likewise.
    """
    plain = mask_function is causal_mask_function and local_size is None and not use_vmap
    if plain and isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length:
        return attention_mask
    kwargs["allow_is_causal_skip"] = False  # no mask at all means causal attention of the last tokens, which is not so in a static cache
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation `NAME`: that of a `KVCrushLayer` where the keys come from one, else what transformers' ``sdpa`` gives.

    Args:
        module: the attention module.
        query: ``(batch, heads, tokens, head_dim)``.
        key: as the cache's ``update`` gave it.
        value: as the cache's ``update`` gave it.
        attention_mask: as `mask` gave it.
        dropout: must be 0 where the cache is compressed.
        scaling: of the scores; None for ``head_dim ** -0.5``.
        kwargs: ``softcap``; others for ``sdpa``. A sliding window, sinks and a position bias are not accepted where the cache is
            compressed, sinks nowhere.
    Returns:
        ``(batch, tokens, heads, head_dim)``, and None.
    Raises:
        RuntimeError: a gradient is asked for.
        ValueError: an argument is not accepted.
    """
    layer: KVCrushLayer | None = getattr(key, "kvcrush", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.pop("softcap", None)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, dropout, scale, softcap, **kwargs)
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused or dropout:
        raise ValueError(f"{NAME}: {layer.name} cannot be compressed, since its attention has {', '.join(refused) or 'dropout'}")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise RuntimeError(f"{NAME}: there are no gradients through a KVCrushCache; use torch.no_grad()")
    if torch.compiler.is_compiling():  # the counts of a layer change after the call then
        out = torch.ops.torch_cpu_ext_kvcrush.attend(query, key, value, attention_mask, layer.handle, scale, softcap or 0.0)
    else:
        if layer.kept.seen + key.shape[2] != layer.tokens:
            raise ValueError(f"{NAME}: {layer.name} must attend once to what it was given; layers that share keys are not supported")
        out = layer.attend(query, key, value, attention_mask, scale, softcap or 0.0)
    return out.transpose(1, 2).contiguous(), None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over keys and values that no `KVCrushLayer` holds."""
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{NAME}: layer {getattr(module, 'layer_idx', '?')} has attention sinks (s_aux), which are not supported")
    new, tokens = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    if causal and (attention_mask is None or attention_mask.dim() == 2):
        attention_mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=new,
            kv_length=tokens,
            q_offset=tokens - new,
            attention_mask=attention_mask,
            allow_is_causal_skip=softcap is None,
            device=query.device,
        )
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs)
    group = query.shape[1] // key.shape[1]
    scores = softcap * torch.tanh(query @ repeat_kv(key, group).transpose(2, 3) * scale / softcap)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ repeat_kv(value, group)).transpose(1, 2).contiguous(), None


# ------------------------------------------------------------------------------------------------------------------------------ the default


class KVCrushAttention(SharingReplacement):
    """Stands for an attention module whose model makes a `KVCrushCache` where the caller gives no cache; computes what the original does.

    Args:
        module: the original.
        crush: for the model's caches; all such modules of a model have the same.
    """

    technique = "kv_cache"

    def __init__(self, module: nn.Module, crush: KVCrushConfig) -> None:
        super().__init__(module)
        self.crush = crush
        self._last: Any = None  # a weak reference to the layer of the cache that was used last, for the report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if not torch.compiler.is_compiling():
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            layer = cache.layers[self.layer_idx] if isinstance(cache, KVCrushCache) and self.layer_idx < len(cache.layers) else None
            self._last = None if layer is None else weakref.ref(layer)
        return self._original[0].forward(*args, **kwargs)  # not its hooks, which are this module's, too

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # weak references can neither be copied nor pickled

    def row(self) -> Row:
        layer: KVCrushLayer | None = self._last and self._last()
        before = after = 0
        if isinstance(layer, KVCrushLayer) and layer.is_initialized:
            before = 2 * layer.batch_size * layer.shape[0] * layer.tokens * layer.shape[1] * layer.dtype.itemsize
            after = layer.nbytes
        crush = self.crush
        share = f", {crush.ratio:.0%} representatives" if crush.ratio else ""
        budget = f"{crush.budget:.0%} of the tokens" if isinstance(crush.budget, float) else f"{crush.budget} tokens"
        tokens = f"; {layer.tokens} seen in the last cache" if before and layer is not None else ""
        isa = jit.kernel_isa(self.technique, "attend")
        return Row(self.technique, f"{crush.importance}{share}", before, after, isa, f"{budget}{tokens}")

    def spec(self) -> dict[str, Any]:
        return {"config": self.crush.to_dict()}

    @classmethod
    def from_spec(cls, values: dict[str, Any], module: nn.Module) -> "KVCrushAttention":
        return cls(module, KVCrushConfig.from_dict(values["config"]))

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Sets the attention implementation of the model, and has it make the cache."""
        owners: dict[str, list[KVCrushAttention]] = {}
        kept: dict[str, set[int]] = {}
        for name, module in attention_modules(model).items():
            owner = _owner(model, name)
            if isinstance(module, KVCrushAttention):
                owners.setdefault(owner, []).append(module)
            else:
                kept.setdefault(owner, set()).add(int(module.layer_idx))  # type: ignore[arg-type]
        for owner, modules in owners.items():
            stack: Any = model.get_submodule(owner)
            before = stack._kvcrush[2] if "_kvcrush" in stack.__dict__ else stack.config._attn_implementation
            _unsettle(stack)
            stack._kvcrush = modules[0].crush, kept.get(owner, set()), before
            stack.set_attn_implementation(NAME)
            stack.register_forward_pre_hook(_give_cache, with_kwargs=True)
            parts = owner.split(".")
            for ancestor in {".".join(parts[:i]) for i in range(len(parts) + 1)}:
                top: Any = model.get_submodule(ancestor)
                if hasattr(type(top), "prepare_inputs_for_generation"):
                    top.generate = types.MethodType(generate, top)

    def leave(self, model: nn.Module) -> None:
        for module in model.modules():
            if "_kvcrush" in module.__dict__:
                module.set_attn_implementation(module._kvcrush[2])  # type: ignore[operator,index]
                _unsettle(module)
            if getattr(module.__dict__.get("generate"), "__func__", None) is generate:
                del module.__dict__["generate"]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of causal stacks of layers in a model of transformers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "scaling")
        and getattr(module, "is_causal", False)
        and _owner(model, name) is not None
    }


def _owner(model: nn.Module, name: str) -> Any:
    """Name of the innermost module around the one of that name whose attention implementation can be set; None if there is none."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        around = ".".join(parts[:i])
        if hasattr(model.get_submodule(around), "set_attn_implementation"):
            return around
    return None


def obstacle(model: nn.Module, name: str) -> str:
    """Why an attention module of that name keeps transformers' cache; empty if it does not.

    Raises:
        ValueError: the model cannot have the attention implementation `NAME` at all.
    """
    module: Any = model.get_submodule(name)
    owner: Any = model.get_submodule(_owner(model, name))
    decoder = owner.config.get_text_config(decoder=True)
    if getattr(module, "sinks", None) is not None:
        raise ValueError(f"swap_attention: {name} cannot be served, since its attention has sinks")
    if getattr(decoder, "is_encoder_decoder", False):
        raise ValueError(f"swap_attention: {name} cannot be served, since the model is an encoder and a decoder")
    layers = DynamicCache(config=decoder).layers
    if module.layer_idx >= len(layers) or type(layers[module.layer_idx]) is not DynamicLayer:
        kind = type(layers[module.layer_idx]).__name__ if module.layer_idx < len(layers) else "none"
        return f"it has no full attention (its cache is transformers' {kind})"
    d = _shape(decoder, module.layer_idx)[1]
    return f"its head dimension is {d}, no multiple of 16" if d % 16 else ""


def _unsettle(stack: nn.Module) -> None:
    stack.__dict__.pop("_kvcrush", None)
    for key, hook in list(stack._forward_pre_hooks.items()):
        if hook is _give_cache:
            del stack._forward_pre_hooks[key]
            stack._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.compiler.disable
def _fresh(stack: Any) -> KVCrushCache:
    crush, skip, _ = stack._kvcrush
    return KVCrushCache(stack.config, crush, skip=skip)


def _name(model: Any) -> str:
    """What a model calls its cache: it changed within transformers 5."""
    forward = getattr(model, "_original", (model,))[0].forward  # of a module that another technique replaced
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _give_cache(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: a cache where one is wanted and none is given."""
    use = kwargs.get("use_cache")
    if use is None:
        use = stack.config.use_cache
    given = len(args) > 3 or kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    if given or not use or torch.is_grad_enabled():
        return None
    return args, {**kwargs, _name(stack): _fresh(stack)}


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a model that `torch_cpu_ext.swap_attention` went over: that of its class, with a fresh cache if none is given.

    Args:
        self: the model.
        args: as of ``generate``.
        kwargs: as of ``generate``.
    """
    config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or self.generation_config
    implementation = kwargs.get("cache_implementation", config.cache_implementation)
    use = kwargs.get("use_cache", config.use_cache)
    given = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    if not given and use is not False and implementation is None:
        kwargs[_name(self)] = _fresh(next(module for module in self.modules() if "_kvcrush" in module.__dict__))
    return type(self).generate(self, *args, **kwargs)


# --------------------------------------------------------------------------------------------------------------------------------- compiled
# A compiled graph calls a layer by its number, so that nothing of what is kept becomes part of the graph.


def _attend_op(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, handle: Tensor, scale: float, softcap: float) -> Tensor:
    return _layers[int(handle)].attend(query, key, value, mask, scale, softcap).contiguous()


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, handle: Tensor, scale: float, softcap: float) -> Tensor:
    return query.new_empty(query.shape)


torch.library.define(
    "torch_cpu_ext_kvcrush::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor handle, float scale, float softcap) -> Tensor",
)
torch.library.impl("torch_cpu_ext_kvcrush::attend", "CPU", _attend_op)
torch.library.register_fake("torch_cpu_ext_kvcrush::attend", _attend_fake)

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
