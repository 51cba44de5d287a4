"""Hugging Face transformers with a cache of pruned keys and values.

Importing this module registers the attention implementation `NAME`; a model that uses it, given a `SparseKVCache`, decodes with
`torch_cpu_ext.sparse_linear.attend`. Prompts go through PyTorch's own attention, then into the cache.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError("transformers must be installed: pip install 'torch_cpu_ext[transformers]'") from error

from ..core import memory
from ..core.checks import TOKENS
from ..sparse_linear.attention import attend, compress_kv, expand_kv, from_blocks, kept, page_bytes, to_blocks
from .cache_layer import CpuLayer, held_bytes

NAME = "torch_cpu_ext_sparse"

_SLACK = 64  # tokens the tail may hold beyond its window, so that pages leave it several at a time
_FEW = 8  # new tokens that attention over pages takes at least


class SparseKVLayer(CpuLayer):
    """Keys and values of one layer: pages of pruned vectors, and a dense tail of the last tokens.

    The tail holds at least the last ``window`` tokens (or all, while there are fewer) as bfloat16 and grows by 64 before whole pages of 16
    tokens leave it. A page is pruned once and never touched again.

    Args:
        config: of the decoder, to see that the model uses the attention that can read this.
        k_sparsity: see `SparseKVCache`.
        v_sparsity: see `SparseKVCache`.
        window: see `SparseKVCache`.
    """

    # A crop that reaches into the pages finds them pruned, and tokens that left the window before a crop do not come back dense. That is
    # all the trace it leaves, so that assisted decoding may roll back.
    is_croppable = True

    def __init__(self, config: Any, k_sparsity: float, v_sparsity: float, window: int) -> None:
        super().__init__()
        self.config, self.sparsity, self.window = config, {"key": k_sparsity, "value": v_sparsity}, window
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self.pages = self.tail = 0  # pages in use, tokens in the tail
        self.page_store: dict[str, Tensor] = {}  # (batch, KV heads, capacity, bytes), by kind
        self.blocks: dict[str, Tensor] = {}
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes and dtype from the first keys and values.

        Raises:
            ValueError: the head dimensions of keys and values differ, or are no multiple of 16, or nothing of a vector would stay.
        """
        batch, heads, _, d = key_states.shape
        if value_states.shape[-1] != d or d % TOKENS:
            raise ValueError(
                "SparseKVCache: the head dimension of keys and values must be the same multiple of 16, "
                f"got {d} and {value_states.shape[-1]}"
            )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        for kind, sparsity in self.sparsity.items():
            if not kept(d, sparsity):
                raise ValueError(f"SparseKVCache: the sparsity of each {kind} must leave one of {d} elements, got {sparsity}")
            self.page_store[kind] = torch.empty((batch, heads, 0, page_bytes(d, sparsity)), dtype=torch.uint8)
            self.blocks[kind] = to_blocks(torch.zeros((batch, heads, self.window + _SLACK, d), dtype=torch.bfloat16), kind)
        self.head_dim, self.is_initialized = d, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens in.

        Args:
            key_states: ``(batch, KV heads, tokens, head_dim)``.
            value_states: the same.
            args: not used.
            kwargs: not used.
        Returns:
            What the attention implementation `NAME` wants: all keys and values, dense, where many tokens are new (more than half the
            window, and than 8); else the new ones, the keys with this layer as their attribute ``sparse_kv``.
        Raises:
            ValueError: the model uses another attention implementation, which would not see the tokens before.
        """
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"SparseKVCache: the model must use the attention implementation {NAME}, got {self.config._attn_implementation}; "
                f'call model.set_attn_implementation("{NAME}")'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"key": key_states, "value": value_states}
        # Half the window, so that every query of the step sees the other half of it dense.
        if self.get_seq_length() and key_states.shape[2] <= max(_FEW, self.window // 2):
            self._append(new)
            key_states = key_states[:]  # the attribute belongs to this call, not to the caller's tensor
            key_states.sparse_kv = self  # type: ignore[attr-defined]
            return key_states, value_states
        keys, values = (torch.cat([self.dense(kind), x], 2) if self.get_seq_length() else x for kind, x in new.items())
        self._append(new)
        return keys, values

    def _append(self, new: dict[str, Tensor]) -> None:
        count = new["key"].shape[2]
        if count <= _FEW and self.tail + count <= self.window + _SLACK:
            for kind, x in new.items():
                for i in range(count):
                    block, token = divmod(self.tail + i, TOKENS)
                    if kind == "key":
                        self.blocks[kind][:, :, block, :, token] = x[:, :, i].unflatten(-1, (-1, 2))
                    else:
                        self.blocks[kind][:, :, block, token // 2, :, token % 2] = x[:, :, i]
            self.tail += count
            return
        leaving = max(0, self.tail + count - self.window) // TOKENS * TOKENS
        for kind, x in new.items():
            if self.tail:
                x = torch.cat([self._tail(kind), x], 2)
            self._add_pages(kind, compress_kv(x[:, :, :leaving], kind=kind, sparsity=self.sparsity[kind]))
            rest = x[:, :, leaving:]
            blocks = to_blocks(torch.nn.functional.pad(rest, (0, 0, 0, -rest.shape[2] % TOKENS)), kind)
            self.blocks[kind][:, :, : blocks.shape[2]] = blocks
        self.pages += leaving // TOKENS
        self.tail += count - leaving

    def _add_pages(self, kind: str, pages: Tensor) -> None:
        store, total = self.page_store[kind], self.pages + pages.shape[2]
        if total > store.shape[2]:
            room = total + total // 8 if self.pages else total  # a prompt gets what it needs, decoding some more
            shape = (*store.shape[:2], room, store.shape[3])
            grown = memory.zeros(math.prod(shape)).view(shape)
            grown[:, :, : self.pages] = store[:, :, : self.pages]
            self.page_store[kind] = store = grown
        store[:, :, self.pages : total] = pages

    def _tail(self, kind: str) -> Tensor:
        return from_blocks(self.blocks[kind], kind)[:, :, : self.tail].to(self.dtype)

    def dense(self, kind: str) -> Tensor:
        """All keys or values, with zeros where they were pruned: ``(batch, KV heads, tokens, head_dim)`` in the model's dtype.

        Args:
            kind: ``"key"`` or ``"value"``.
        """
        pages = expand_kv(self.page_store[kind][:, :, : self.pages], kind=kind, head_dim=self.head_dim)
        return torch.cat([pages.to(self.dtype), self._tail(kind)], 2)

    def attend(self, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of the last tokens' queries over all tokens, the last ones included.

        Args:
            query: ``(batch, heads, tokens, head_dim)``.
            scale: of the scores.
            mask: bool ``(batch, 1, tokens, all tokens)``, causal after some padding on the left; None for causal alone.
        Returns:
            As ``query``.
        Raises:
            ValueError: ``mask`` has another form.
        """
        pages, tails = ({k: store[:, :, : self.pages] for k, store in self.page_store.items()}, self.blocks)
        heads = self.blocks["key"].shape[1]
        spans = (
            _spans(query.shape[0], heads, self.pages, self.tail)
            if mask is None
            else _masked_spans(mask, query.shape[2], heads, self.pages, self.tail)
        )
        return attend(query, pages["key"], pages["value"], tails["key"], tails["value"], spans, scale=scale)[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens a mask covers, and the first of them.

        Args:
            query_length: tokens about to come.
        """
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.pages * TOKENS + self.tail

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens.

        Args:
            tokens_to_remove: how many, as a negative number, as transformers has it.
        Raises:
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        remaining = max(0, self.get_seq_length() + tokens_to_remove)
        if remaining >= self.pages * TOKENS:
            self.tail = remaining - self.pages * TOKENS
            return
        self.pages, self.tail = divmod(remaining, TOKENS)
        if self.tail:  # what is left of the page that was cut goes back into the tail
            for kind, store in self.page_store.items():
                page = expand_kv(store[:, :, self.pages : self.pages + 1], kind=kind, head_dim=self.head_dim)
                self.blocks[kind][:, :, :1] = to_blocks(page, kind)

    def _rows(self, index: Tensor) -> None:
        for tensors in (self.page_store, self.blocks):
            for kind, tensor in tensors.items():
                tensors[kind] = tensor.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        return sum(t.numel() * t.element_size() for tensors in (self.page_store, self.blocks) for t in tensors.values())


class SparseKVCache(Cache):
    """A cache of pruned keys and values for ``model.generate(..., past_key_values=cache)`` (after arXiv:2502.12444, with a growing cache).

    The model must use the attention implementation ``"torch_cpu_ext_sparse"``. Layers with full attention are pruned; others, such as
    those with a sliding window, keep the cache that transformers gives them. For inference only.

    Args:
        config: the model's configuration.
        k_sparsity: share of each key's elements to prune, by magnitude, at least 0 and below 1.
        v_sparsity: the same for values.
        window: how many of the last tokens stay dense at least, a multiple of 16.
    Raises:
        ValueError: a value is not among those accepted.
    """

    def __init__(self, config: Any, *, k_sparsity: float = 0.3, v_sparsity: float = 0.5, window: int = 128) -> None:
        for name, value in (("k_sparsity", k_sparsity), ("v_sparsity", v_sparsity)):
            if not 0 <= value < 1:
                raise ValueError(f"SparseKVCache: {name} must be at least 0 and below 1, got {value}")
        if window < 0 or window % TOKENS:
            raise ValueError(f"SparseKVCache: window must be a multiple of 16, got {window}")
        decoder = config.get_text_config(decoder=True)
        layers = [
            SparseKVLayer(decoder, k_sparsity, v_sparsity, window) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by all layers, spare room included."""
        return held_bytes(self.layers)


@functools.lru_cache(maxsize=32)
def _spans(batch: int, heads: int, pages: int, tail: int) -> Tensor:
    """The same for all layers of a step."""
    with torch.inference_mode(False):
        return torch.tensor([0, pages, tail]).expand(batch, heads, 3)


def _masked_spans(mask: Tensor, length: int, heads: int, pages: int, tail: int) -> Tensor:
    """The spans that a mask of left padding stands for; kept on the mask, which all layers of a step share."""
    known: tuple[tuple[int, int, int], Tensor] | None = getattr(mask, "sparse_kv_spans", None)
    if known is not None and known[0] == (heads, pages, tail):
        return known[1]
    total = pages * TOKENS + tail
    position = torch.arange(total)
    if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:] == (1, length, total):
        first = mask[:, 0, -1].int().argmax(-1)
        causal = position <= torch.arange(total - length, total)[:, None]
        if bool((mask[:, 0] == (causal & (position >= first[:, None, None]))).all()):
            spans = torch.tensor([0, pages, tail]).repeat(mask.shape[0], heads, 1)
            spans[:, :, 0] = first[:, None]
            mask.sparse_kv_spans = ((heads, pages, tail), spans)  # type: ignore[attr-defined]
            return spans
    raise ValueError("SparseKVCache: the attention mask must be causal, with padding on the left only")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation `NAME`: over a `SparseKVLayer` where the keys come from one, else transformers' ``sdpa``.

    Args:
        module: the attention module.
        query: ``(batch, heads, tokens, head_dim)``.
        key: as the cache's ``update`` gave it.
        value: as the cache's ``update`` gave it.
        attention_mask: bool, causal after padding on the left; None for causal alone.
        dropout: must be 0 where the cache is sparse.
        scaling: of the scores; None for ``head_dim ** -0.5``.
        kwargs: for ``sdpa``; additions to the scores are not accepted where the cache is sparse.
    Returns:
        ``(batch, tokens, heads, head_dim)``, and None.
    Raises:
        RuntimeError: a gradient is asked for.
        ValueError: an argument is not accepted.
    """
    layer: SparseKVLayer | None = getattr(key, "sparse_kv", None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    refused = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if kwargs.get(name) is not None]
    if refused or dropout:
        raise ValueError(f"{NAME}: {', '.join(refused) or 'dropout'} cannot be combined with a SparseKVCache")
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(f"{NAME}: there are no gradients through a SparseKVCache; use torch.no_grad()")
    out = layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
