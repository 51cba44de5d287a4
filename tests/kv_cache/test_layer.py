"""CompressedKV through random histories, against attention over the tokens it says it keeps."""

import copy
import random

import pytest
import torch

from torch_cpu_ext import KVCrushConfig
from torch_cpu_ext.kv_cache.layer import CompressedKV
from torch_cpu_ext.kv_cache.pages import TOKENS
from torch_cpu_ext.kv_cache.store import Tier

HEADS, GROUP, D, SCALE = 2, 2, 16, 0.3


class History:
    """A layer, all keys and values it was ever given, and the padding of its rows."""

    def __init__(self, config, padding):
        self.layer, self.padding = CompressedKV(config, 1, 3), torch.tensor(padding)
        self.key = self.value = torch.zeros(len(padding), HEADS, 0, D)
        self.error = 0.0

    def call(self, new):
        """New tokens; notes how far their output is from attention over the tokens kept before, and the new ones."""
        batch, seen = len(self.padding), self.key.shape[2]
        query = torch.randn(batch, HEADS * GROUP, new, D)
        key, value = torch.randn(2, batch, HEADS, new, D)
        before, bias = self.kept()
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        padding = self.padding.clamp(max=seen + new)
        waited = self.layer.waiting and new == 1
        out = self.layer(query, key, value, padding, scale=SCALE)
        if waited:  # it chose before it attended
            return
        for b in range(batch):
            for h in range(HEADS):
                old = before[b][h]
                index = torch.cat([old, torch.arange(seen, seen + new)])
                k, v = self.key[b, h, index], self.value[b, h, index]
                extra = torch.cat([bias[b][h], torch.zeros(new)])
                mask = (index <= torch.arange(seen, seen + new)[:, None]) & (index >= padding[b])
                for g in range(GROUP):
                    q = query[b, h * GROUP + g]
                    scores = (q @ k.T * SCALE + extra).masked_fill(~mask, -torch.inf)
                    expected = scores.softmax(-1).nan_to_num(0) @ v
                    self.error = max(self.error, float((out[b, h * GROUP + g] - expected).abs().max()))

    def kept(self):
        """Positions by row and head, and the bias of each."""
        if not self.layer.tiers:
            return [[torch.empty(0, dtype=torch.int64)] * HEADS] * len(self.padding), [[torch.empty(0)] * HEADS] * len(self.padding)
        positions = self.layer.positions()
        bias = [[torch.zeros(int((p >= 0).sum())) for p in row] for row in positions]
        if self.layer.config.log_count:
            slots = {}
            for tier in self.layer.tiers.values():
                for b, h, s in tier.live().nonzero().tolist():
                    slots[b, h, int(tier.slots["position"][b, h, s])] = tier.slots["bias"][b, h, s]
            bias = [
                [torch.tensor([slots[b, h, int(p)] for p in line if p >= 0]) for h, line in enumerate(row)]
                for b, row in enumerate(positions)
            ]
        return [[p[p >= 0] for p in row] for row in positions], bias

    def rows(self, index):
        self.layer.rows(torch.tensor(index))
        self.key, self.value, self.padding = self.key[index], self.value[index], self.padding[index]

    def crop(self, tokens):
        self.layer.crop(tokens)
        self.key, self.value = self.key[:, :, : self.key.shape[2] - tokens], self.value[:, :, : self.value.shape[2] - tokens]

    def check(self):
        """What must always hold."""
        layer, config = self.layer, self.layer.config
        assert layer.seen == self.key.shape[2]
        kept, _ = self.kept()
        for b, row in enumerate(kept):
            live = layer.seen - int(self.padding[b].clamp(max=layer.seen))
            for h, position in enumerate(row):
                assert len(position) == int(layer.lengths[b, h])
                assert bool((position.diff() > 0).all())
                own = position - self.padding[b]
                assert bool((own >= 0).all())
                assert set(range(min(config.start, live))) <= set(own.tolist())
                assert set(range(max(0, live - config.recent), live)) <= set(own.tolist())
        for tier in layer.tiers.values():
            used = tier.table[torch.arange(tier.table.shape[2]) < tier.pages[..., None]]
            assert bool((tier.length <= TOKENS * tier.pages).all())
            assert bool((used < tier.pools["key"].shape[0]).all())
            assert all(bool((x[~tier.live()] == 0).all()) for name, x in tier.slots.items() if name != "position")
        recent = layer.tiers["recent"]
        column = torch.arange(recent.table.shape[2])
        written = recent.table[(column >= recent.length[..., None] // TOKENS) & (column < recent.pages[..., None])]
        assert len(written.unique()) == len(written)  # nobody else writes there


OPTIONS = [
    {},
    {"budget": 40},
    {"budget": 40, "importance": "h2o", "ratio": 0.5},
    {"budget": 40, "heads": "ada", "layers": "pyramid"},
    {"budget": 0.4, "heads": "ada", "importance": "tova"},
    {"budget": 40, "evict": "decode"},
    {"budget": 40, "evict": "decode", "importance": "h2o"},
    {"budget": 40, "evict": "manual", "importance": "random"},
    {"budget": 40, "log_count": True},
    {"budget": 40, "importance": "streaming", "start": 17},
    {"budget": 40, "importance": "key_norm", "decode_evict": False},
    {"budget": 60, "dtype": "int8"},
    {"budget": 60, "dtype": "int8", "start": 20, "heads": "ada"},
    {"budget": 60, "dtype": "int4", "representative_dtype": "int8", "log_count": True},
    {"budget": 60, "dtype": "bf16", "representative_dtype": "int8", "importance": "h2o"},
    {"budget": 60, "dtype": "int8", "start": 0, "evict": "decode", "value_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (0, 7, 30)], ids=["full", "padded"])
def test_histories(options, padding):
    config = KVCrushConfig(**{"recent": 8, **options})
    tolerance = {"auto": 1e-5, "bf16": 0.05, "int8": 0.05, "int4": 1.0}[config.dtype]
    tolerance = max(tolerance, 0.05 if config.representative_dtype else 0)
    for seed in range(3):
        torch.manual_seed(seed)
        choose = random.Random(seed)
        history = History(config, padding)
        for _ in range(12):
            what = choose.choice(["prompt", "few", "decode", "decode", "rows", "crop", "copy", "compress"])
            if what == "prompt":
                history.call(choose.randint(9, 70))
            elif what == "few":
                history.call(choose.randint(2, 8))
            elif what == "decode":
                for _ in range(choose.randint(1, 40)):
                    history.call(1)
            elif what == "rows":
                history.rows([choose.randrange(len(history.padding)) for _ in range(len(history.padding))])
            elif what == "crop" and history.layer.croppable and history.layer.tiers:
                history.crop(choose.randint(0, min(20, history.layer.seen)))
            elif what == "copy":
                other = copy.deepcopy(history)
                other.call(20)
                other.check()
            elif what == "compress" and config.evict == "manual":
                history.layer.compress(scale=SCALE)
            if history.layer.tiers:
                history.check()
        assert history.error < tolerance


def test_tier_uses_freed_pages():
    """Pages that are dropped are the next to be filled: a pool that neither gains nor loses tokens stays as large as it was."""
    tokens = torch.randn(2, HEADS, 160, D)
    tier = Tier(tokens, tokens, torch.tensor([[160, 100], [33, 16]]), "fp32", {"mark": torch.rand(2, HEADS, 160)}, True)
    assert int(tier.pages.sum()) == tier.pools["key"].shape[0] == 10 + 7 + 3 + 1 + 4
    for _ in range(20):
        keep = torch.ones(2, HEADS, tier.table.shape[2], dtype=torch.bool)
        keep[0, 0, 1] = False
        tier.keep(keep)
        tier.reserve(TOKENS)
        more = torch.randn(2, HEADS, TOKENS, D)
        tier.append(more, more, torch.tensor([[TOKENS, 0], [0, 0]]))
        assert tier.dense("key")[0, 0, 144:160].equal(more[0, 0])
        assert tier.dense("key")[0, 1, :100].equal(tokens[0, 1, :100])
        assert tier.dense("value")[1, 0, :33].equal(tokens[1, 0, :33])
    assert tier.pools["key"].shape[0] <= 25 + 4 + 25 // 8
