"""The compressed keys and values of one attention layer: attention over them, and what is kept."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import TOKENS
from .budget import adaptive, pyramid
from .config import ATTENTION, KVCrushConfig
from .importance import grouped, importance, scoring, selection
from .pages import attend, pack, unpack
from .prefill import prefill
from .selection import select, sign
from .store import Tier, take

FEW = 8  # new tokens up to which attention goes over the pages
_EVERY = 4  # decode steps from one look at the probabilities to the next
_MEMORY = 0.9  # what is left of a token's score at each look
_REPRESENTATIVE = 2  # the kind that `select` gives


class CompressedKV:
    """Keys and values of one layer in pages, and attention over them; prompts are dense only while they are attended to.

    Tokens lie in up to four tiers: ``start`` (the first ones, where the dtype is int8 or int4), ``representative`` (where those have a
    dtype of their own), ``old`` (pages of int8 or int4, each packed once, when its tokens are no longer recent) and ``recent``, the only
    one that grows, which without the others holds all.

    Args:
        config: what to keep, and how.
        layer: number of this layer among those with such a cache, from 0.
        layers: how many there are.
    """

    def __init__(self, config: KVCrushConfig, layer: int = 0, layers: int = 1) -> None:
        self.config, self.layer, self.layers = config, layer, layers
        self.tiers: dict[str, Tier] = {}
        self.seen = 0  # tokens, those dropped and padding included
        self.padding: Tensor | None = None  # int64 (batch,): how many of them are padding on the left
        self.fresh = 0  # last tokens of the recent tier whose positions are not noted yet
        self.evicted = self.waiting = False  # whether tokens were dropped; whether a prompt waits for that
        self.since = self.looked = 0  # tokens since the last upkeep, steps since the last look at the probabilities
        self.part: Tensor | None = None  # float64 (batch, KV heads): a head's part of the layer's budget, as a multiple of the mean
        self.last_queries: Tensor | None = None

    # ---------------------------------------------------------------------------------------------------------------------------- attention

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None, *, scale: float, softcap: float = 0.0
    ) -> Tensor:
        """Takes new tokens in, and attends to all that is kept from them.

        Args:
            query: ``(batch, heads, tokens, head_dim)``.
            key: ``(batch, KV heads, tokens, head_dim)``, rotated already where the model rotates.
            value: the same.
            padding: int64 ``(batch,)``: how many of all tokens so far, these included, are padding on the left; None: as before.
            scale: of the scores.
            softcap: where not 0, a score becomes ``softcap * tanh(score / softcap)``.
        Returns:
            As ``query``.
        """
        new = key.shape[2]
        skipped = self._skipped(padding, new)
        if not self.tiers:
            empty = key[:, :, :0]
            self._store(empty, empty, torch.zeros(key.shape[:2], dtype=torch.int64), self._slots(empty, query.shape[1]), None)
        if self.config.evict == "decode":
            if new == 1 and self.waiting:
                self.compress(scale=scale, softcap=softcap)
            self.waiting = new > 1
        exact = self.waiting and self.config.importance == "h2o"  # probabilities of pages come for each KV head only
        if new <= FEW and skipped is None and not exact:
            return self._few(query, key, value, scale, softcap)
        return self._many(query, key, value, skipped, scale, softcap)

    def _skipped(self, padding: Tensor | None, new: int) -> Tensor | None:
        """int64 ``(batch,)``: how many of the new tokens are padding; None if none is."""
        if padding is None or self.padding is padding:
            return None
        before = torch.zeros_like(padding) if self.padding is None else self.padding
        if not bool((padding.clamp(max=self.seen) == before).all()):
            raise ValueError("the padding of a row must stay as it was")
        skipped = padding - before
        self.padding = padding
        return skipped if bool(skipped.any()) else None

    def _few(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
        new, recent = key.shape[2], self.tiers["recent"]
        recent.reserve(new)
        recent.append(key, value)
        self.seen, self.fresh, self.since, self.looked = self.seen + new, self.fresh + new, self.since + new, self.looked + 1
        tiers = list(self.tiers.values())
        mass = "heat" in recent.slots or ("score" in recent.slots and self.looked >= _EVERY)
        result = attend(
            query,
            [tier.pools["key"] for tier in tiers],
            [tier.pools["value"] for tier in tiers],
            [tier.table for tier in tiers],
            [tier.length for tier in tiers],
            [tier.slots["bias"] for tier in tiers] if self.config.log_count else [],
            scale=scale,
            softcap=softcap,
            mass=mass,
        )
        if mass:
            self._look(result.mass, query.shape[1] // key.shape[1], new)
        self._remember(query)
        if self.since >= TOKENS:
            self._upkeep()
        return result.out

    def _look(self, mass: Tensor, group: int, queries: int) -> None:
        """Notes what the tokens got of the probabilities."""
        self.looked = 0
        for tier, part in zip(self.tiers.values(), mass.split([TOKENS * t.table.shape[2] for t in self.tiers.values()], 2), strict=True):
            if "heat" in tier.slots:
                tier.slots["heat"] += (part / group)[..., None]
            else:
                tier.slots["score"].lerp_(part / (queries * (1 if self.config.gqa == "sum" else group)), 1 - _MEMORY)

    def _remember(self, query: Tensor) -> None:
        """Keeps the last queries where a later choice needs them."""
        window = scoring(self.config).get("window", 0)
        if not window or self.config.evict == "prefill" or (self.config.evict == "decode" and not self.waiting):
            return
        last = query[:, :, -window:]
        if self.last_queries is not None and last.shape[2] < window:
            last = torch.cat([self.last_queries[:, :, last.shape[2] - window :], last], 2)
        self.last_queries = last.clone(memory_format=torch.contiguous_format)

    def _many(self, query: Tensor, key: Tensor, value: Tensor, skipped: Tensor | None, scale: float, softcap: float) -> Tensor:
        config, (batch, heads, new, _) = self.config, key.shape
        slots = self._slots(key, query.shape[1])
        keys, values, past = key, value, 0
        first = torch.zeros(batch, heads, dtype=torch.int64)
        order = None
        if self._held():
            dense, first, old, order = self._dense(key.dtype)
            past = dense["key"].shape[2]
            keys, values = torch.cat([dense["key"], key], 2), torch.cat([dense["value"], value], 2)
            slots = {name: torch.cat([old[name], x], 2) for name, x in slots.items()}
        if skipped is not None:
            first = torch.where(skipped[:, None] > 0, past + skipped[:, None], first)
        self.seen += new
        evict = config.evict == "prefill" and bool((keys.shape[2] - first > self._budget(first.shape)).any())
        scores = scoring(config) if evict or config.importance == "h2o" else {}
        summed = "heat" in slots and past > 0  # the scores of earlier calls are added, so the signatures come later
        fused = evict and config.ratio > 0 and not summed
        result = prefill(
            query,
            keys,
            values,
            first if past or skipped is not None else None,
            slots["bias"] if config.log_count and past else None,
            scale=scale,
            softcap=softcap,
            start=config.start,
            recent=config.recent,
            sign=fused,
            **scores,
        )
        if "heat" in slots:
            slots["heat"] = slots["heat"] + result.score.unflatten(1, (heads, -1)).transpose(2, 3)
        if evict:
            score = slots["heat"].transpose(2, 3).flatten(1, 2) if summed else result.score
            self._compress(keys, values, first, slots, score, min(scores.get("window", 1), new), result.signature if fused else None)
        elif not past:
            length = new - first
            if skipped is not None:
                index = (torch.arange(new) + skipped[:, None, None]).clamp(max=new - 1).expand(batch, heads, new)
                keys, values = take(keys, index), take(values, index)
                slots = {name: take(x, index) for name, x in slots.items()}
            self._store(keys, values, length, slots, None)
        else:
            self._add(key, value, skipped, slots, order)
        self._remember(query)
        return result.out

    def _add(self, key: Tensor, value: Tensor, skipped: Tensor | None, slots: dict[str, Tensor], order: Tensor | None) -> None:
        """Puts a call's tokens behind those there are."""
        batch, heads, new, _ = key.shape
        self._note()
        if "heat" in slots and order is not None:  # what earlier tokens have got now, back in the order of the slots
            heat = torch.cat([tier.slots["heat"] for tier in self.tiers.values()], 2)
            at = order[..., None].expand(*order.shape, heat.shape[3])
            heat.scatter_(2, at, slots["heat"][:, :, : order.shape[2]])
            for tier, part in zip(self.tiers.values(), heat.split([t.slots["heat"].shape[2] for t in self.tiers.values()], 2), strict=True):
                tier.slots["heat"] = part.masked_fill(~tier.live()[..., None], 0)
        recent, length, own = self.tiers["recent"], None, {name: x[:, :, -new:] for name, x in slots.items()}
        if skipped is not None:
            index = (torch.arange(new) + skipped[:, None, None]).clamp(max=new - 1).expand(batch, heads, new)
            key, value, own = take(key, index), take(value, index), {name: take(x, index) for name, x in own.items()}
            length = (new - skipped)[:, None].expand(batch, heads)
        recent.reserve(new)
        real = torch.arange(new) < (new if length is None else length[..., None])
        at = (recent.length[..., None] + torch.arange(new)).expand(batch, heads, new)
        for name, x in own.items():
            masked = x.masked_fill(~real.expand(batch, heads, new)[(..., *[None] * (x.dim() - 3))], 0)
            recent.slots[name].scatter_(2, at[(..., *[None] * (x.dim() - 3))].expand(x.shape), masked)
        recent.append(key, value, length)
        self._age()

    # ------------------------------------------------------------------------------------------------------------------------------- tokens

    def _held(self) -> bool:
        return any(bool(tier.length.any()) for tier in self.tiers.values())

    def _slots(self, key: Tensor, query_heads: int) -> dict[str, Tensor]:
        """What is noted about new tokens."""
        batch, heads, new, _ = key.shape
        config = self.config
        slots: dict[str, Tensor] = {"position": torch.arange(self.seen, self.seen + new).int().expand(batch, heads, new)}
        if config.importance == "h2o":
            slots["heat"] = torch.zeros(batch, heads, new, query_heads // heads)
        elif config.decode_evict and (config.importance in ATTENTION or config.ratio):
            slots["score"] = torch.zeros(batch, heads, new)
        if config.log_count:
            slots["bias"] = torch.zeros(batch, heads, new)
        return slots

    def _store(self, key: Tensor, value: Tensor, length: Tensor, slots: dict[str, Tensor], kind: Tensor | None) -> None:
        """Makes the tiers of dense tokens, each head's first, in the order of their positions.

        Args:
            key: ``(batch, KV heads, tokens, head_dim)``.
            value: the same.
            length: int64 ``(batch, KV heads)``.
            slots: of the tokens.
            kind: as `select` gives it; None if there are no representatives.
        """
        config, tokens = self.config, torch.arange(key.shape[2])
        plain = "fp32" if key.dtype == torch.float32 else "bf16"
        packed = config.dtype if config.dtype in ("int8", "int4") else None
        dtypes = {"recent": plain if packed or config.dtype == "auto" else config.dtype}
        role = torch.zeros(key.shape[:3], dtype=torch.uint8)
        if config.representative_dtype:
            dtypes["representative"] = config.representative_dtype
            if kind is not None:
                role[kind == _REPRESENTATIVE] = 1
        if packed:
            dtypes["old"] = packed
            if config.start:
                dtypes["start"] = plain
            free = role == 0
            free[:, :, : config.start] = False
            rank = free.cumsum(2)  # from 1
            count = (free & (tokens < length[..., None])).sum(2)
            leaving = (count - config.recent).clamp(min=0) // TOKENS * TOKENS
            role[free & (rank <= leaving[..., None])] = 2
            role[:, :, : config.start] = 3
        role = role.masked_fill(tokens >= length[..., None], 255)
        self.tiers = {}
        for name, number in (("start", 3), ("representative", 1), ("old", 2), ("recent", 0)):
            if name not in dtypes:
                continue
            if len(dtypes) == 1:
                self.tiers[name] = Tier(key, value, length, dtypes[name], slots, True)
                break
            mine = role == number
            own = mine.sum(2)
            index = (~mine).to(torch.uint8).argsort(dim=2, stable=True)[:, :, : int(own.max())] if tokens.numel() else mine.long()
            self.tiers[name] = Tier(
                take(key, index), take(value, index), own, dtypes[name], {n: take(x, index) for n, x in slots.items()}, name == "recent"
            )
        for tier in self.tiers.values():
            for name, x in tier.slots.items():
                tier.slots[name] = x.masked_fill(~tier.live()[(..., *[None] * (x.dim() - 3))], 0)
        self.fresh = self.since = 0

    def _note(self) -> None:
        """Notes the positions of tokens that came one by one."""
        if self.fresh:
            recent = self.tiers["recent"]
            slot, length = torch.arange(recent.slots["position"].shape[2]), recent.length[..., None]
            new = (slot >= length - self.fresh) & (slot < length)
            recent.slots["position"] = torch.where(new, self.seen - length + slot, recent.slots["position"]).int()
            self.fresh = 0

    def _order(self) -> tuple[Tensor, Tensor]:
        """Slots of all tiers in the order of their positions, those without a token first, up to the most tokens a head has; and how many
        of them are without, for each head."""
        self._note()
        tiers = self.tiers.values()
        position = torch.cat([tier.slots["position"].masked_fill(~tier.live(), -1) for tier in tiers], 2)
        count = (position >= 0).sum(2)
        most = int(count.max())
        return position.argsort(dim=2, stable=True)[:, :, position.shape[2] - most :], most - count

    def _dense(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
        """All tokens as they were before packing, in order, to the right; first token of each head; their slots; and those' numbers."""
        order, first = self._order()
        tiers = list(self.tiers.values())
        one = len(tiers) == 1 and not bool(first.any())  # then they are in order
        dense = {}
        for kind in ("key", "value"):
            if one:
                dense[kind] = tiers[0].dense(kind)[:, :, : order.shape[2]].to(dtype)
            else:
                dense[kind] = take(torch.cat([tier.dense(kind).to(dtype) for tier in tiers], 2), order)
        slots = {name: take(torch.cat([tier.slots[name] for tier in tiers], 2), order) for name in tiers[0].slots}
        return dense, first, slots, order

    def positions(self) -> Tensor:
        """Which tokens are kept: int64 ``(batch, KV heads, tokens)``, ascending, counted from the first of the row with its padding; -1 in
        front where a head has fewer than others."""
        order, first = self._order()
        position = take(torch.cat([tier.slots["position"] for tier in self.tiers.values()], 2), order).long()
        return position.masked_fill(torch.arange(order.shape[2]) < first[..., None], -1)

    @property
    def lengths(self) -> Tensor:
        """int64 ``(batch, KV heads)``: tokens that are kept."""
        lengths = [tier.length for tier in self.tiers.values()]
        return lengths[0].clone() if len(lengths) == 1 else torch.stack(lengths).sum(0)

    # ----------------------------------------------------------------------------------------------------------------------------- eviction

    def _budget(self, shape: torch.Size) -> Tensor:
        """int64 ``(batch, KV heads)``: tokens that each head may keep now."""
        config = self.config
        if isinstance(config.budget, int) and config.layers == "uniform":
            middle = torch.full(shape, config.budget - config.fixed)
        else:
            seen = torch.full(shape[:1], self.seen) - (0 if self.padding is None else self.padding)
            if isinstance(config.budget, float):
                total = (config.budget * seen.double() + 0.5).floor().long()
            else:
                total = torch.full_like(seen, config.budget)
            rest = (total - config.fixed).clamp(min=1)
            if config.layers == "pyramid":
                room = (seen - config.fixed).clamp(min=1)
                shares = [pyramid(int(m), self.layer, self.layers, int(r)) for m, r in zip(rest, room, strict=True)]
                rest = torch.tensor(shares).clamp(min=1)
            middle = rest[:, None].expand(shape)
        if self.part is not None:
            middle = (self.part * middle).round().long().clamp(min=1)
        return config.fixed + middle

    def compress(self, *, scale: float, softcap: float = 0.0) -> None:
        """Drops what is over the budget now.

        Args:
            scale: of the scores, as in the calls before.
            softcap: likewise.
        """
        config = self.config
        self.waiting = False
        if not self.tiers or not self._held():
            return
        dtype = torch.float32 if self.last_queries is None else self.last_queries.dtype
        self.part = None
        lengths = self.lengths
        if bool((lengths <= self._budget(lengths.shape)).all()):
            self.last_queries = None if config.evict == "decode" else self.last_queries
            return
        dense, first, slots, _ = self._dense(dtype)
        scores, queries, signature = scoring(config), 1, None
        if "heat" in slots:
            score = slots["heat"].transpose(2, 3).flatten(1, 2)
        elif scores and self.last_queries is not None:
            query = self.last_queries[:, :, -dense["key"].shape[2] :]
            queries = min(query.shape[2], scores["window"])
            result = prefill(
                query,
                dense["key"],
                dense["value"],
                first,
                slots.get("bias"),
                scale=scale,
                softcap=softcap,
                start=config.start,
                recent=config.recent,
                sign=config.ratio > 0,
                **scores,
            )
            score, signature = result.score, result.signature if config.ratio else None
        else:
            score = torch.zeros(*first.shape, dense["key"].shape[2])
        self._compress(dense["key"], dense["value"], first, slots, score, queries, signature)
        if config.evict == "decode":
            self.last_queries = None

    def _compress(
        self, key: Tensor, value: Tensor, first: Tensor, slots: dict[str, Tensor], attention: Tensor, queries: int, signature: Tensor | None
    ) -> None:
        """Chooses among dense tokens, which end where the call ends, and stores those that stay.

        Args:
            key: ``(batch, KV heads, tokens, head_dim)``.
            value: the same.
            first: int64 ``(batch, KV heads)``: the first live token.
            slots: of the tokens.
            attention: float32 ``(batch, query heads, tokens)``: what they got of the attention of some queries.
            queries: of how many, for scores that are compared with those of single queries later.
            signature: of the tokens, if they are known already.
        """
        config, (batch, heads, tokens, _) = self.config, key.shape
        least = first.amin(1)
        if not attention.shape[2]:
            attention = torch.zeros(batch, heads, tokens)
        if signature is None:
            words = torch.zeros(batch, tokens, 0, dtype=torch.int64)
            end = torch.full_like(least, tokens - config.recent)
            signature = sign(attention, (least + config.start).clamp(max=tokens), end.clamp(min=0)) if config.ratio else words
        mean = grouped(attention, heads, config.gqa)
        where = torch.arange(tokens)
        seed = config.seed + (self.layer << 32) + self.seen
        score = importance(config, mean, lambda kind: key if kind == "key" else value, where, seed)
        self.part = None
        budget = self._budget(first.shape)
        if config.heads == "ada":
            middle = budget[:, 0] - config.fixed
            own = adaptive(score, first + config.start, torch.full_like(first, tokens - config.recent), middle)
            self.part = own.double() / middle[:, None]
            budget = config.fixed + own.clamp(min=1)
        most = min(int(budget.max()), tokens)
        chosen = select(
            score,
            signature[:, None],
            first,
            torch.full_like(first, tokens),
            torch.minimum(budget, (tokens - first).clamp(min=config.fixed + 1)).clamp(max=max(most, config.fixed + 1)),
            most=max(most, config.fixed + 1),
            start=config.start,
            recent=config.recent,
            **selection(config, self.layer),
        )
        index = chosen.index[:, :, : int(chosen.count.max())].clamp(min=0).long()
        kind, members = (x[:, :, : index.shape[2]] for x in (chosen.kind, chosen.members))
        if "score" in slots:
            slots["score"] = mean / queries
        slots = {name: take(x, index) for name, x in slots.items()}
        if "bias" in slots:  # it speaks for those it spoke for before, and for the others of its bucket
            slots["bias"] = (slots["bias"].exp() + (members - 1).clamp(min=0)).log()
        self.evicted |= bool((chosen.count < tokens - first).any())
        self._store(take(key, index), take(value, index), chosen.count, slots, kind)

    # ------------------------------------------------------------------------------------------------------------------------------- upkeep

    def _upkeep(self) -> None:
        """What decoding leaves to be done every 16 tokens: packs pages that are no longer recent, drops pages over the budget."""
        self.since = 0
        self._note()
        self._age()
        config = self.config
        if config.decode_evict and not self.waiting and (config.evict != "manual" or self.evicted):
            self._drop_pages()

    def _age(self) -> None:
        """Moves whole pages that are no longer recent from the recent to the old tier."""
        if "old" not in self.tiers:
            return
        recent, old = self.tiers["recent"], self.tiers["old"]
        start = self.tiers.get("start")
        if start is not None and bool(((start.length < self.config.start) & (recent.length > 0)).any()):
            return self._restore()
        leaving = (recent.length - self.config.recent).clamp(min=0) // TOKENS
        most = int(leaving.max())
        if not most:
            return None
        mask = torch.arange(most) < leaving[..., None]
        ids = recent.table[:, :, :most][mask].long()
        packed = {}
        for kind in ("key", "value"):
            x = unpack(recent.pools[kind][ids][:, None], kind=kind, head_dim=recent.head_dim)
            packed[kind] = pack(x, kind=kind, dtype=old.dtype)[:, 0, 0]
        slots = {name: x.unflatten(2, (-1, TOKENS))[:, :, :most][mask] for name, x in recent.slots.items()}
        old.push(mask, packed["key"], packed["value"], slots)
        column = torch.arange(recent.table.shape[2])
        recent.keep(column >= leaving[..., None])
        return None

    def _restore(self) -> None:
        """Sorts tokens into tiers anew, where a row was shorter than ``start`` when they were made."""
        dtype = torch.float32 if self.tiers["recent"].dtype == "fp32" else torch.bfloat16
        dense, first, slots, _ = self._dense(dtype)
        count = dense["key"].shape[2]
        index = (torch.arange(count) + first[..., None]).clamp(max=max(count - 1, 0))
        slots = {name: take(x, index) for name, x in slots.items()}
        self._store(take(dense["key"], index), take(dense["value"], index), count - first, slots, None)

    def _drop_pages(self) -> None:
        config = self.config
        name = "old" if "old" in self.tiers else "recent"
        tier = self.tiers[name]
        over = (self.lengths - self._budget(tier.length.shape)).clamp(min=0) // TOKENS
        if not bool(over.any()):
            return
        begin = torch.full_like(over, 0 if name == "old" else -(-config.start // TOKENS))
        end = (tier.length // TOKENS if name == "old" else (tier.length - config.recent) // TOKENS).clamp(min=0)
        begin = torch.minimum(begin, end)
        over = torch.minimum(over, end - begin)
        if not bool(over.any()):
            return
        batch, heads, columns = tier.table.shape
        slots = tier.slots
        if "heat" in slots:
            attention = slots["heat"].mean(3)
        else:
            attention = slots.get("score", torch.zeros(batch, heads, TOKENS * columns))
        seed = config.seed + (self.layer << 32) + self.seen
        score = importance(config, attention, tier.dense, slots["position"], seed).masked_fill(~tier.live(), 0)
        words = torch.zeros(batch, heads, columns, 0, dtype=torch.int64)
        if config.ratio:
            flat = attention.flatten(0, 1)[:, None]
            words = sign(flat, TOKENS * begin.flatten(), TOKENS * end.flatten(), page=TOKENS).view(batch, heads, columns, -1)
        budget = end - begin - over
        chosen = select(
            score.unflatten(2, (-1, TOKENS)).sum(3),
            words,
            begin,
            end,
            budget.clamp(min=1),
            most=max(int(budget.max()), 1),
            **selection(config, self.layer),
        )
        column = torch.arange(columns)
        keep = (column < begin[..., None]) | (column >= end[..., None])
        index = chosen.index.long()
        none = (index < 0) | (budget == 0)[..., None]
        keep = F.pad(keep, (0, 1)).scatter(2, index.masked_fill(none, columns), True)[:, :, :columns]
        tier.keep(keep)
        self.evicted = True

    # ---------------------------------------------------------------------------------------------------------------------------- the batch

    def rows(self, index: Tensor) -> None:
        """Makes the rows of the batch those that ``index``, int64, says."""
        for tier in self.tiers.values():
            tier.rows(index)
        self.padding, self.part, self.last_queries = (
            None if x is None else x.index_select(0, index) for x in (self.padding, self.part, self.last_queries)
        )

    def crop(self, tokens: int) -> None:
        """Forgets the last tokens; `croppable` says whether it can."""
        tokens = min(tokens, self.seen)
        self._note()
        self.tiers["recent"].crop(tokens)
        self.seen -= tokens
        if self.padding is not None:
            self.padding = self.padding.clamp(max=self.seen)
        if self.last_queries is not None:
            self.last_queries = self.last_queries[:, :, : max(self.last_queries.shape[2] - tokens, 0)]

    @property
    def croppable(self) -> bool:
        """Whether the last tokens can be forgotten without a trace: not after tokens were dropped or packed into int8 or int4."""
        return not self.evicted and "old" not in self.tiers and self.config.dtype not in ("int8", "int4")

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        queries = self.last_queries
        return sum(tier.nbytes for tier in self.tiers.values()) + (0 if queries is None else queries.numel() * queries.element_size())
