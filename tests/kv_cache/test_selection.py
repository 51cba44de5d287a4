"""Signatures and selection: properties on drawn arguments, examples by hand, other implementations' defects."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache.variants import block_bits, openvino, vllm
from torch import Tensor

import torch_cpu_ext as tce
from torch_cpu_ext.kv_cache import Selection, select, sign

from cases_kv_select import ANCHORS, SCORES, kept, scores, signatures

MANY = settings(max_examples=150, deadline=None)


@st.composite
def drawn(draw):
    """Arguments of `select`, any that it takes; small numbers are frequent."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    units = draw(st.one_of(st.integers(1, 20), st.integers(1, 300), st.just(4500)))
    words = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, max(low, high) + 1, (batch, heads), generator=generator)

    first = whole(0, draw(st.sampled_from((0, units // 2))))
    length = torch.maximum(whole(draw(st.sampled_from((0, units // 2, units))), units), first)
    start, recent = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    budget = start + recent + 1 + whole(0, draw(st.sampled_from((1, 8, units // 2, units))))
    signature = torch.randint(-(2**63), 2**63 - 1, (batch, draw(st.sampled_from((1, heads))), units, words), generator=generator)
    if draw(st.booleans()):
        signature &= 0x5  # many at one distance
    return {
        **{"score": scores(draw(st.sampled_from(SCORES)), (batch, heads, units), generator), "signature": signature},
        **{"first": first, "length": length, "budget": budget, "most": int(budget.max()) + draw(st.integers(0, 3))},
        **{"start": start, "recent": recent, "ratio": draw(st.sampled_from((0.0, 0.1, 0.25, 0.5, 0.9, 1.0)))},
        **{"anchor": draw(st.sampled_from(ANCHORS)), "anchors": draw(st.integers(1, 3)), "seed": draw(st.integers(-(2**63), 2**63 - 1))},
    }


def units_of(chosen: Selection, b: int = 0, h: int = 0) -> list[int]:
    return chosen.index[b, h, : int(chosen.count[b, h])].tolist()


@MANY
@given(args=drawn(), threads=st.sampled_from((1, 2)), data=st.data())
def test_select_on_any_arguments(args, threads, data):
    torch.set_num_threads(threads)
    with tce.isa(data.draw(st.sampled_from(tce.core.isa.supported()))):
        chosen = select(**args)
    again = select(**args)
    assert all(a.equal(b) for a, b in zip(chosen, again, strict=True))
    start, recent = args["start"], args["recent"]
    for b, h in itertools.product(*map(range, chosen.count.shape)):
        first, length, budget = (int(args[name][b, h]) for name in ("first", "length", "budget"))
        count = int(chosen.count[b, h])
        units, kinds, members = (t[b, h, :count].tolist() for t in (chosen.index, chosen.kind, chosen.members))
        assert count == min(budget, length - first)
        assert units == sorted(set(units))
        assert all(first <= t < length for t in units)
        ends = {t for t in range(first, length) if t < first + start or t >= length - recent}
        assert ends <= set(units)
        assert [k == 0 for k in kinds] == [t in ends for t in units]
        for tensor, value in ((chosen.index, -1), (chosen.kind, 255), (chosen.members, 0)):
            assert tensor[b, h, count:].eq(value).all()
        if length - first > budget:
            free = budget - start - recent
            representatives = math.floor(args["ratio"] * free + 0.5)
            assert kinds.count(2) == representatives
            assert kinds.count(1) == free - representatives
            if representatives:  # they speak for all candidates, each for itself at least
                spoken = [m for m, k in zip(members, kinds, strict=True) if k == 2]
                assert sum(spoken) == length - first - len(ends) - kinds.count(1)
                assert min(spoken) >= 1
                assert max(spoken) - min(spoken) <= 1
        assert all(m == 1 for m, k in zip(members, kinds, strict=True) if k != 2)
        assert dict(zip(units, zip(kinds, members, strict=True), strict=True)) == kept(args, b, h)


@MANY
@given(data=st.data())
def test_sign_on_any_arguments(data):
    tokens = data.draw(st.one_of(st.integers(0, 20), st.integers(0, 300), st.just(4500)))
    heads, page = data.draw(st.integers(1, 70 if tokens < 100 else 3)), data.draw(st.sampled_from((1, 2, 8, 16, 33, 64, 65)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    score = scores(data.draw(st.sampled_from(SCORES)), (1, heads, tokens), generator)
    begin, end = data.draw(st.integers(0, tokens + 3)), data.draw(st.integers(-3, tokens))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    with tce.isa(data.draw(st.sampled_from(tce.core.isa.supported()))):
        signature = sign(score, torch.tensor([begin]), torch.tensor([end]), page=page)
    assert signature.shape == (1, -(-tokens // page), -(-heads * page // 64))
    bits = (signature[0].unsqueeze(-1) >> torch.arange(64) & 1).flatten(1)[:, : heads * page]
    bits = bits.view(-1, heads, page).transpose(0, 1).flatten(1)
    assert bits.sum(1).tolist() == [max(0, end - begin) // 2] * heads
    assert not bits[:, : max(begin, 0)].any()
    assert not bits[:, max(end, 0) :].any()
    whole = [sum((word % 2**64) << 64 * w for w, word in enumerate(row)) for row in signature[0].tolist()]
    assert whole == signatures(score, [begin], [end], page)[0]


# ------------------------------------------------------------------------------------------------------------------------------- by hand


def one(score: list[float], words: list[int], budget: int, **options) -> Selection:
    """A row with one KV head and one word a unit."""
    n = len(score)
    return select(
        torch.tensor([[score]]),
        torch.tensor([[[[word] for word in words]]]),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.full((1, 1), n),
        torch.full((1, 1), budget),
        most=budget,
        **options,
    )


def test_signatures_by_hand():
    # Tokens 1 .. 6 may be dropped, so three of them have the bit of each head. Head 0: 9, 8 and the first of the two 5. Head 1: NaN is
    # last, and of four zeros, one of them negative, the first three win.
    score = torch.tensor([[[100.0, 5, 9, 5, 1, 8, 2, 100], [7.0, math.nan, 0, -0.0, 0, -1, 0, 7]]])
    signature = sign(score, torch.tensor([1]), torch.tensor([7]))
    assert signature[0, :, 0].tolist() == [0, 0b01, 0b11, 0b10, 0b10, 0b01, 0, 0]
    pages = sign(score, torch.tensor([1]), torch.tensor([7]), page=4)
    assert pages[0, :, 0].tolist() == [0b1100_0110, 0b0001_0010]


def test_selection_by_hand():
    # 12 units, 1 at the start and 2 at the end: 1 .. 9 may be dropped. Budget 7: 4 of those stay, half of them representatives. Important:
    # 4 and 7. Distances to 0 of the others: 1:3 2:1 3:0 5:2 6:1 8:3 9:1, so the order is 3, 2, 6, 9, 5, 1, 8 and the picks are
    # floor(0.5 * 7 / 2) = 1 and floor(1.5 * 7 / 2) = 5: units 2 and 1, for 3 and for 4 of the seven.
    score = [0.0, 1, 2, 3, 9, 4, 5, 9, 6, 7, 0, 0]
    words = [0, 0b111, 0b001, 0b000, 0b1, 0b011, 0b100, 0, 0b1110, 0b1000, 0, 0]
    chosen = one(score, words, 7, start=1, recent=2, ratio=0.5, anchor="zeros")
    assert chosen.index[0, 0].tolist() == [0, 1, 2, 4, 7, 10, 11]
    assert chosen.kind[0, 0].tolist() == [0, 2, 2, 1, 1, 0, 0]
    assert chosen.members[0, 0].tolist() == [1, 4, 3, 1, 1, 1, 1]
    assert chosen.count.tolist() == [[7]]


@pytest.mark.parametrize(
    ("anchor", "distances", "expected"),
    [  # five candidates for two representatives: numbers floor(0.5 * 5 / 2) = 1 and floor(1.5 * 5 / 2) = 3 of the order
        ("zeros", [0, 1, 2, 3, 4], [1, 3]),
        ("ones", [4, 3, 2, 1, 0], [1, 3]),  # order 4, 3, 2, 1, 0
        ("alternate", [2, 1, 0, 1, 2], [0, 1]),  # order 2, 1, 3, 0, 4
    ],
)
def test_anchors_by_hand(anchor, distances, expected):
    words = [0b0000, 0b1000, 0b1010, 0b1110, 0b1111]
    point = {"zeros": 0b0000, "ones": 0b1111, "alternate": 0b1010}[anchor]
    assert [(word ^ point).bit_count() for word in words] == distances
    assert units_of(one([1.0] * 5, words, 2, ratio=1.0, anchor=anchor)) == expected


@pytest.mark.parametrize(("anchor", "expected"), [("mean", [0, 2]), ("inv_mean", [0, 1])])
def test_the_mean_takes_more_than_half(anchor, expected):
    # Each bit is set in two of four units, which is not more than half: the mean is 0, and the order by it is 1, 0, 3, 2. By its
    # complement, whose other 62 bits count for all alike, it is 2, 0, 3, 1. Of both, the picks are numbers 1 and 3.
    assert units_of(one([1.0] * 4, [0b01, 0b00, 0b11, 0b10], 2, ratio=1.0, anchor=anchor)) == expected


def test_mean_of_fresh_signatures_is_zero():
    """Every head's bit is set in half of the tokens and no more, so right after a prompt the mean anchor is that of zeros."""
    score = torch.randn(1, 16, 200)
    signature = sign(score, torch.tensor([4]), torch.tensor([190]))[:, None]
    ends = torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 200), torch.full((1, 4), 60)
    by = {
        anchor: select(score.view(1, 4, 4, 200).mean(2), signature, *ends, most=60, start=4, recent=10, anchor=anchor) for anchor in ANCHORS
    }
    assert by["mean"].index.equal(by["zeros"].index)
    assert by["inv_mean"].index.equal(by["ones"].index)
    assert not by["mean"].index.equal(by["random"].index)


def test_further_anchors_break_ties():
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(0, 64, (100,), generator=generator).tolist()  # few distances, many ties
    results = [
        units_of(one([1.0] * 100, words, 30, ratio=1.0, anchor="zeros", anchors=anchors, seed=seed))
        for anchors, seed in ((1, 0), (1, 1), (3, 0), (3, 1))
    ]
    assert results[0] == results[1]  # no random anchor, so no seed
    assert results[2] != results[0]
    assert results[3] != results[2]


# ----------------------------------------------------------------------------------------------------------------------------- structure


def whole_row(units: int, heads: int, budget: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(1, 4 * heads, units, generator=generator)
    signature = sign(score, torch.tensor([2]), torch.tensor([units - 5]))[:, None]
    ends = torch.zeros(1, heads, dtype=torch.int64), torch.full((1, heads), units), torch.full((1, heads), budget)
    return score.view(1, heads, 4, units).mean(2), signature, *ends


def test_padding_on_the_left_changes_nothing():
    score, signature, first, length, budget = whole_row(300, 3, 80)
    alone = select(score, signature, first, length, budget, most=80, start=2, recent=5)
    pad = 37
    padded = select(
        torch.nn.functional.pad(score, (pad, 0), value=math.inf),
        torch.nn.functional.pad(signature, (0, 0, pad, 0), value=-1),
        first + pad,
        length + pad,
        budget,
        **{"most": 80, "start": 2, "recent": 5},
    )
    assert padded.index.equal(alone.index + pad)
    assert all(a.equal(b) for a, b in zip(padded[1:], alone[1:], strict=True))


def test_a_signature_for_all_heads_or_for_each():
    score, signature, *numbers = whole_row(300, 3, 80)
    shared = select(score, signature, *numbers, most=80, start=2, recent=5)
    each = select(score, signature.expand(1, 3, 300, 1), *numbers, most=80, start=2, recent=5)
    assert all(a.equal(b) for a, b in zip(shared, each, strict=True))


def test_one_head_of_many_is_that_head_alone():
    score, signature, first, length, budget = whole_row(500, 4, 100, seed=3)
    length = length - torch.tensor([[0, 30, 0, 77]])
    budget = budget + torch.tensor([[0, 0, 40, 500]])
    together = select(score, signature, first, length, budget, most=600, start=2, recent=5)
    for h in range(4):
        one_head = (t[:, h : h + 1] for t in (first, length, budget))
        alone = select(score[:, h : h + 1], signature, *one_head, most=600, start=2, recent=5)
        assert all(a[:, h].equal(b[:, 0]) for a, b in zip(together, alone, strict=True))


def test_nothing_is_dropped_within_the_budget():
    score, signature, first, length, budget = whole_row(40, 2, 40)
    chosen = select(score, signature, first, length, budget, most=50, start=2, recent=5)
    assert units_of(chosen) == list(range(40))
    assert chosen.kind[0, 0, :40].tolist() == [0] * 2 + [1] * 33 + [0] * 5
    empty = select(score, signature, length, length, torch.zeros_like(budget), most=0)
    assert empty.index.shape == (1, 2, 0)
    assert empty.count.eq(0).all()


@pytest.mark.parametrize("units", [2, 50, 5000])
def test_equal_scores_keep_the_first(units):
    score = torch.zeros(1, 1, units)
    ends = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), units), torch.full((1, 1), units - 1)
    chosen = select(score, torch.zeros(1, 1, units, 0, dtype=torch.int64), *ends, most=units - 1, ratio=0.0)
    assert units_of(chosen) == list(range(units - 1))


def test_many_scores_around_the_threshold(isa):
    """Of 200000 scores, more lie between the bounds that a sample gives than are copied, and thousands lie close above those."""
    n, ulp = 200_000, 2.0**-23
    generator = torch.Generator().manual_seed(7)
    above = 1 + ulp * torch.randint(1, 60, (90_000,), generator=generator)
    below = 0.5 + torch.rand(98_000, generator=generator) / 2
    score = torch.cat([above, torch.ones(n - 188_000), below])[torch.randperm(n, generator=generator)]
    signature = sign(score[None, None], torch.tensor([0]), torch.tensor([n]))
    assert signature[0, :, 0].nonzero()[:, 0].tolist() == sorted(score.sort(descending=True, stable=True).indices[: n // 2].tolist())


def test_compiled():
    def both(score: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, ...]:
        signature = sign(score, begin, end).unsqueeze(1)
        zeros = torch.zeros(1, 2, dtype=torch.int64)
        return tuple(select(score.view(1, 2, 4, -1).sum(2), signature, zeros, zeros + 100, zeros + 30, most=30, start=2, recent=3))

    args = torch.randn(1, 8, 100), torch.tensor([2]), torch.tensor([97])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(a.equal(b) for a, b in zip(compiled(*args), both(*args), strict=True))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------------ other implementations


def pages_by_ours(score: np.ndarray, page: int, important: int, representatives: int) -> list[list[int]]:
    """Pages of each KV head, signatures over KV heads and tokens of a page; representatives as numbers below 0: ``-1 - page``."""
    heads, tokens = score.shape
    floats = torch.from_numpy(score).float()[None]
    signature = sign(floats, torch.tensor([0]), torch.tensor([tokens]), page=page)[:, None]
    numbers = torch.zeros(1, heads, dtype=torch.int64), torch.full((1, heads), tokens // page)
    budget = torch.full((1, heads), important + representatives)
    sums = floats.unflatten(2, (-1, page)).sum(3)
    share = representatives / (important + representatives)
    chosen = select(sums, signature, *numbers, budget, most=important + representatives, ratio=share)
    return [
        [-1 - t if k == 2 else t for t, k in zip(units_of(chosen, 0, h), chosen.kind[0, h].tolist(), strict=True)] for h in range(heads)
    ]


def whole_scores(seed: int, heads: int, tokens: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return np.random.default_rng(seed).integers(0, 2**16, (heads, tokens)).astype(np.float64)


@pytest.mark.parametrize("seed", range(5))
def test_signatures_are_those_of_other_implementations(seed):
    score = whole_scores(seed, 3, 256)
    bits = block_bits(score, 16)
    ours = sign(torch.from_numpy(score).float()[None], torch.tensor([0]), torch.tensor([256]), page=16)[0, :, 0]
    assert [sum(int(bit) << i for i, bit in enumerate(row)) for row in bits] == ours.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_openvino_never_samples_the_far_candidates(seed):
    """15 candidates for 8 representatives: its step is 1, so the 8 nearest are taken; ours reach to the farthest."""
    score = whole_scores(seed, 1, 20 * 32)
    important, picks = openvino(score, 32, 5, 8)
    nearest = openvino(score, 32, 5, 15)[1]  # all candidates, in their order
    assert len(nearest) == 15
    assert picks == nearest[:8]
    (ours,) = pages_by_ours(score, 32, 5, 8)
    assert [t for t in ours if t >= 0] == important
    places = sorted(nearest.index(-1 - t) for t in ours if t < 0)
    assert places == [(2 * i + 1) * 15 // 16 for i in range(8)] == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("seed", range(5))
def test_ours_and_openvinos_share_buckets_that_divide(seed):
    """16 candidates for 4 representatives: one of each 4, theirs the nearest, ours the one in the middle."""
    score = whole_scores(seed, 1, 20 * 32)
    important, picks = openvino(score, 32, 4, 4)
    nearest = openvino(score, 32, 4, 16)[1]
    assert [nearest.index(t) for t in picks] == [0, 4, 8, 12]
    (ours,) = pages_by_ours(score, 32, 4, 4)
    assert [t for t in ours if t >= 0] == important
    assert sorted(nearest.index(-1 - t) for t in ours if t < 0) == [2, 6, 10, 14]


def test_vllm_keeps_pages_twice():
    """Eight heads, 64 pages of random scores: its candidates are those of head 0, which other heads may have kept already."""
    twice, total = 0, 0
    for seed in range(20):
        score = whole_scores(seed, 8, 64 * 16)
        theirs = vllm(score, 16, 12, 8)
        twice += sum(len(pages) - len(set(pages)) for pages in theirs)
        total += sum(map(len, theirs))
        assert len(theirs[0]) == len(set(theirs[0]))
        for pages in pages_by_ours(score, 16, 12, 8):
            assert len({t if t >= 0 else -1 - t for t in pages}) == 20
    assert twice / total > 0.03


def test_vllm_with_one_head_has_our_candidates():
    score = whole_scores(1, 1, 64 * 16)
    (theirs,) = vllm(score, 16, 12, 52)  # all that there is
    assert theirs == list(range(64))
    (ours,) = pages_by_ours(score, 16, 12, 8)
    (some,) = vllm(score, 16, 12, 8)
    assert {t for t in ours if t >= 0} <= set(some)
