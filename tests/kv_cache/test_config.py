"""KVCrushConfig, and how budgets are shared among layers and heads."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_cpu_ext import KVCrushConfig
from torch_cpu_ext.kv_cache.budget import adaptive, pyramid
from torch_cpu_ext.kv_cache.importance import grouped, importance, scoring


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("budget", 0, "an integer of at least start + recent + 1 = 37"),
        ("budget", 36, "an integer of at least start + recent + 1 = 37"),
        ("budget", 0.0, "a share above 0 and up to 1"),
        ("budget", 1.5, "a share above 0 and up to 1"),
        ("budget", "256MB", "a share above 0 and up to 1"),
        ("budget", True, "a share above 0 and up to 1"),
        ("ratio", -0.1, "a number from 0 to 1"),
        ("ratio", 1.1, "a number from 0 to 1"),
        ("ratio", float("nan"), "a number from 0 to 1"),
        ("importance", "best", "one of snapkv, h2o, tova, streaming, key_norm, random"),
        ("window", 0, "an integer of at least 1"),
        ("pool", 4, "an odd positive integer"),
        ("sample", 0, "an integer of at least 1"),
        ("gqa", "min", "one of mean, max, sum"),
        ("start", -1, "an integer of at least 0"),
        ("recent", 0, "an integer of at least 1"),
        ("anchor", "median", "one of random, zeros, ones, mean, inv_mean, alternate"),
        ("anchors", 9, "an integer from 1 to 8"),
        ("seed", -1, "an integer from 0"),
        ("layers", "cone", "one of uniform, pyramid"),
        ("heads", "each", "one of uniform, ada"),
        ("dtype", "fp16", "one of auto, fp32, bf16, int8, int4"),
        ("representative_dtype", "bf16", "None or one of int8, int4"),
        ("evict", "never", "one of prefill, decode, manual"),
    ],
)
def test_errors(field, value, accepted):
    with pytest.raises(ValueError, match=f"KVCrushConfig: {field} must be ") as caught:
        KVCrushConfig(**{field: value})
    assert accepted in str(caught.value)
    assert repr(value) in str(caught.value)


def test_errors_of_combinations():
    with pytest.raises(ValueError, match="heads must be uniform with the importance streaming"):
        KVCrushConfig(importance="streaming", heads="ada")
    with pytest.raises(ValueError, match="value_norm must be False unless importance is one of snapkv, h2o, tova"):
        KVCrushConfig(importance="key_norm", value_norm=True)


def test_dictionary():
    config = KVCrushConfig(budget=512, importance="h2o", heads="ada", representative_dtype="int4")
    assert KVCrushConfig.from_dict(config.to_dict()) == config


@given(st.integers(1, 2000), st.integers(1, 40), st.integers(1, 4000))
@settings(deadline=None)
def test_pyramid(total, layers, most):
    shares = [pyramid(total, layer, layers, most) for layer in range(layers)]
    assert sum(shares) == min(total, most) * layers
    assert all(0 <= share <= most for share in shares)
    assert all(a >= b - 1 for a, b in itertools.pairwise(shares))  # falling, but for rounding


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_adaptive(data):
    heads, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 60))
    begin = torch.tensor([[data.draw(st.integers(0, tokens)) for _ in range(heads)]])
    end = torch.tensor([[data.draw(st.integers(int(b), tokens)) for b in begin[0]]])
    each = torch.tensor([data.draw(st.integers(1, 40))])
    score = torch.rand(1, heads, tokens, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    budget, room = adaptive(score, begin, end, each), end - begin
    assert bool((budget <= room).all())
    assert bool((budget >= room.clamp(max=1)).all()) or int(each) == 0
    assert int(budget.sum()) == max(min(int(each) * heads, int(room.sum())), int(room.clamp(max=1).sum()))


def test_adaptive_gives_to_heads_with_large_scores():
    score = torch.zeros(1, 2, 100)
    score[0, 0] = 1
    begin, end = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), 100)
    assert adaptive(score, begin, end, torch.tensor([40])).tolist() == [[72, 8]]  # a fifth of the 80 is shared evenly


def test_scoring():
    assert scoring(KVCrushConfig(pool=7)) == {"window": 16, "pool": 7}
    assert scoring(KVCrushConfig(importance="h2o", sample=4)) == {"sample": 4}
    assert scoring(KVCrushConfig(importance="tova")) == {"window": 1}
    assert scoring(KVCrushConfig(importance="random")) == {"window": 16}  # for the signatures
    assert scoring(KVCrushConfig(importance="random", ratio=0)) == {}


def test_importance():
    attention, key, value = torch.rand(2, 3, 10), torch.randn(2, 3, 10, 16), torch.randn(2, 3, 10, 16)
    position = torch.arange(10)

    def of(**options):
        return importance(KVCrushConfig(**options), attention, {"key": key, "value": value}.__getitem__, position, 5)

    assert of() is attention
    assert of(importance="h2o", value_norm=True).equal(attention * value.norm(dim=-1))
    assert of(importance="key_norm").equal(-key.norm(dim=-1))
    assert of(importance="streaming").equal(position.float().expand(2, 3, 10))
    assert of(importance="random").equal(of(importance="random"))
    queries = torch.arange(12.0).view(1, 4, 3)
    assert grouped(queries, 2, "mean").tolist() == [[[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]]
    assert grouped(queries, 2, "max").tolist() == [[[3, 4, 5], [9, 10, 11]]]
    assert grouped(queries, 2, "sum").tolist() == [[[3, 5, 7], [15, 17, 19]]]
