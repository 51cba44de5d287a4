"""Pages of some tokens of each KV head in a pool: what `append` and `attend` take, and its bookkeeping."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import memory
from ..core.checks import KINDS, TOKENS
from .pages import DTYPES, append, pack, page_size, unpack


def take(x: Tensor, index: Tensor) -> Tensor:
    """Picks along the third dimension: ``x[b, h, index[b, h, i], ...]``."""
    trailing = x.shape[3:]
    return x.gather(2, index[(..., *[None] * len(trailing))].expand(*index.shape, *trailing))


def pad_tokens(x: Tensor, tokens: int) -> Tensor:
    """Zeros behind the third dimension, up to ``tokens``."""
    return F.pad(x, (*[0, 0] * (x.dim() - 3), 0, tokens - x.shape[2]))


class Tier:
    """Tokens of each KV head, in pages of one dtype; heads may hold different numbers.

    The pages of a head are those that its line of the table names, in order. Pages may belong to several rows of the batch as long as none
    of them writes to them. A pool grows when no page is free; which are free is found from the table.

    Args:
        key: ``(batch, KV heads, tokens, head_dim)``, each head's tokens first.
        value: the same.
        length: int64 ``(batch, KV heads)``: tokens of each head.
        dtype: of the pages, ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``.
        slots: more about each token, ``(batch, KV heads, tokens, ...)`` each, by name.
        grows: whether tokens will be appended; then each head gets a page for them.
    """

    def __init__(self, key: Tensor, value: Tensor, length: Tensor, dtype: str, slots: dict[str, Tensor], grows: bool) -> None:
        batch, heads, tokens, self.head_dim = key.shape
        self.dtype, self.length, self.grows = dtype, length.clone(), grows
        filled = -(-length // TOKENS)
        self.pages = filled + grows  # of each head
        columns, used = -(-tokens // TOKENS), int(self.pages.sum())
        width = columns + grows
        begin = (self.pages.flatten().cumsum(0) - self.pages.flatten()).view(batch, heads, 1)
        column = torch.arange(width)
        self.table = torch.where(column < self.pages[..., None], begin + column, 0).to(torch.int32)
        self.slots = {name: pad_tokens(x, TOKENS * width) for name, x in slots.items()}
        self.pools = {kind: _pool(used, page_size(kind, dtype, self.head_dim), dtype) for kind in KINDS}
        self.free = torch.empty(0, dtype=torch.int64)
        whole = tokens // TOKENS * TOKENS  # the rest is padded apart, so that most need no copy
        for kind, x in zip(KINDS, (key, value), strict=True):
            for low, part in ((0, x[:, :, :whole]), (whole // TOKENS, pad_tokens(x[:, :, whole:], TOKENS) if whole < tokens else None)):
                if part is not None and part.shape[2]:
                    self._write(kind, low, pack(part, kind=kind, dtype=dtype), filled)
        self._count_room()

    def _write(self, kind: str, low: int, packed: Tensor, filled: Tensor) -> None:
        """Puts packed pages into the columns from ``low`` on, for heads that have so many."""
        columns = packed.shape[2]
        if bool((filled >= low + columns).all()) and bool((self.pages == self.pages[0, 0]).all()):
            at = self.pools[kind].view(*self.table.shape[:2], int(self.pages[0, 0]), -1)
            at[:, :, low : low + columns] = packed
            return
        mask = torch.arange(low, low + columns) < filled[..., None]
        self.pools[kind][self.table[:, :, low : low + columns][mask].long()] = packed[mask][:, None]

    def _count_room(self) -> None:
        self.room = int((self.pages * TOKENS - self.length).min())  # tokens that every head can take

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        tensors = (*self.pools.values(), *self.slots.values(), self.table, self.length, self.pages)
        return sum(t.numel() * t.element_size() for t in tensors)

    def live(self) -> Tensor:
        """bool ``(batch, KV heads, slots)``: whether a slot of the table holds a token."""
        return torch.arange(TOKENS * self.table.shape[2]) < self.length[..., None]

    def dense(self, kind: str) -> Tensor:
        """Keys or values by slot, ``(batch, KV heads, slots, head_dim)``; slots without a token hold anything."""
        batch, heads, _ = self.table.shape
        pages = self.pools[kind][self.table.flatten().long(), 0].view(batch, heads, -1, self.pools[kind].shape[2])
        return unpack(pages, kind=kind, head_dim=self.head_dim)

    def reserve(self, tokens: int) -> None:
        """Makes room for that many more tokens in every head."""
        if self.room >= tokens:
            return
        # A page more than needed, so that heads of different lengths don't each ask at another step.
        wanted = torch.maximum(self.pages, -(-(self.length + max(tokens, TOKENS)) // TOKENS))
        self._widen(int(wanted.max()))
        column = torch.arange(self.table.shape[2])
        new = (column >= self.pages[..., None]) & (column < wanted[..., None])
        self.table[new] = self._allocate(int(new.sum())).int()
        self._clear(new)
        self.pages = wanted
        self._count_room()

    def append(self, key: Tensor, value: Tensor, length: Tensor | None = None) -> None:
        """Adds tokens behind those of each head; `reserve` must have made room.

        Args:
            key: ``(batch, KV heads, tokens, head_dim)``.
            value: the same.
            length: int64 ``(batch, KV heads)``: how many of them are real; None: all.
        """
        append(self.pools["key"], self.pools["value"], self.table, self.length, key, value)
        self.length += key.shape[2] if length is None else length
        self.room -= key.shape[2]

    def push(self, mask: Tensor, key: Tensor, value: Tensor, slots: dict[str, Tensor]) -> None:
        """Adds whole pages behind those of each head, which must be whole too.

        Args:
            mask: bool ``(batch, KV heads, n)``: whether a head gets its ``n``-th page; those of a head are its first.
            key: packed pages ``(count of the mask, elements)``, in the order of the mask.
            value: the same.
            slots: what belongs to them, ``(count of the mask, 16, ...)`` each.
        """
        more = mask.sum(2)
        self._widen(int((self.pages + more).max()))
        batch, head, n = mask.nonzero(as_tuple=True)
        column, ids = self.pages[batch, head] + n, self._allocate(len(n))
        self.table[batch, head, column] = ids.int()
        for kind, pages in zip(KINDS, (key, value), strict=True):
            self.pools[kind][ids] = pages[:, None]
        for name, x in slots.items():
            self.slots[name].unflatten(2, (-1, TOKENS))[batch, head, column] = x
        self.pages, self.length = self.pages + more, self.length + TOKENS * more
        self._count_room()

    def keep(self, mask: Tensor) -> None:
        """Drops whole pages, which hold 16 tokens each; their places in the pool are free then.

        Args:
            mask: bool ``(batch, KV heads, columns of the table)``: False for those to drop. Columns without a page are not looked at.
        """
        column = torch.arange(self.table.shape[2])
        keep = mask & (column < self.pages[..., None])
        left = keep.sum(2)
        order = (~keep).to(torch.uint8).argsort(dim=2, stable=True)
        self.length = self.length - TOKENS * (self.pages - left)
        self.pages = left
        self.table = self.table.gather(2, order).masked_fill(column >= left[..., None], 0)
        for name, x in self.slots.items():
            self.slots[name] = take(x.unflatten(2, (-1, TOKENS)), order).flatten(2, 3)
        self._clear(column >= left[..., None])
        self._count_room()

    def _clear(self, columns: Tensor) -> None:
        for x in self.slots.values():
            x.unflatten(2, (-1, TOKENS))[columns] = 0

    def crop(self, tokens: int) -> None:
        """Forgets the last tokens of each head."""
        self.length = (self.length - tokens).clamp(min=0)
        self._unshare()
        for x in self.slots.values():
            x[~self.live()] = 0
        self._count_room()

    def rows(self, index: Tensor) -> None:
        """Makes the rows of the batch those numbers; rows that are there twice get pages of their own for what is still written to."""
        self.table, self.length, self.pages = (t.index_select(0, index) for t in (self.table, self.length, self.pages))
        self.slots = {name: x.index_select(0, index) for name, x in self.slots.items()}
        if self.grows and len(index.unique()) < len(index):
            self._unshare()
        self._count_room()

    def _unshare(self) -> None:
        """Gives rows pages of their own where they will write to pages that others have too."""
        column = torch.arange(self.table.shape[2])
        used = column < self.pages[..., None]
        sharers = torch.bincount(self.table[used], minlength=self.pools["key"].shape[0])
        written = used & (column >= (self.length // TOKENS)[..., None]) & (sharers[self.table.long()] > 1)
        old = self.table[written].long()
        if len(old):
            new = self._allocate(len(old))
            for pool in self.pools.values():
                pool[new] = pool[old]
            self.table[written] = new.int()

    def _widen(self, columns: int) -> None:
        width = self.table.shape[2]
        if columns > width:
            columns += columns // 8 + 1  # not for each page again
            self.table = F.pad(self.table, (0, columns - width))
            self.slots = {name: pad_tokens(x, TOKENS * columns) for name, x in self.slots.items()}

    def _allocate(self, count: int) -> Tensor:
        """Numbers of free pages, int64."""
        if len(self.free) < count:
            column = torch.arange(self.table.shape[2])
            room = self.pools["key"].shape[0]
            free = torch.ones(room, dtype=torch.bool)
            free[self.table[column < self.pages[..., None]].long()] = False
            self.free = free.nonzero()[:, 0]
        if len(self.free) < count:
            more = max(count - len(self.free), room // 8)
            for kind, pool in self.pools.items():
                grown = _pool(room + more, pool.shape[2], self.dtype)
                grown[:room] = pool
                self.pools[kind] = grown
            self.free = torch.cat([self.free, torch.arange(room, room + more)])
        ids, self.free = self.free[:count], self.free[count:]
        return ids


def _pool(pages: int, elements: int, dtype: str) -> Tensor:
    shape = pages, 1, elements
    return memory.zeros(math.prod(shape) * DTYPES[dtype].itemsize).view(DTYPES[dtype]).view(shape)
