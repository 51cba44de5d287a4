"""Attention of a prompt: what padding, chunks and neighbours must not change, scores and signatures, and what PyTorch says of it all."""

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext.core.registry import CATALOGUE
from torch_cpu_ext.kv_cache import Prefill, prefill, sign

from cases_kv_prefill import FLOATS
from support import TESTS, forget_peak, peak_bytes, run_python, succeeded

every_kind = pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: str(kind).removeprefix("torch."))


def tensors(kind: torch.dtype, heads: int, kv_heads: int, length: int, tokens: int, d: int, batch: int = 1) -> tuple[Tensor, ...]:
    shapes = (heads, length), (kv_heads, tokens), (kv_heads, tokens)
    return tuple(torch.randn(batch, h, n, d).to(kind) for h, n in shapes)


def assert_same(a: Prefill, b: Prefill) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.equal(other)


@every_kind
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1), (4, 4)])
def test_padding_changes_nothing(kind, heads, kv_heads, isa):
    """A row padded on the left, with NaN in the padding, has the bits of the row alone."""
    options = {"scale": 0.3, "softcap": 5.0, "window": 20, "pool": 7, "sign": True, "start": 4, "recent": 30}
    for padding, tokens in ((1, 50), (17, 333), (299, 300), (300, 300)):
        query, key, value = tensors(kind, heads, kv_heads, tokens, tokens, 32, batch=2)
        bias = torch.randn(2, kv_heads, tokens)
        for tensor, junk in ((query, math.nan), (key, math.nan), (value, math.inf), (bias, math.nan)):
            tensor[1, :, :padding] = junk
        first = torch.tensor([[0], [padding]]).expand(2, kv_heads)
        whole = prefill(query, key, value, first, bias, **options)
        assert_same(Prefill(*(t[:1] for t in whole)), prefill(query[:1], key[:1], value[:1], None, bias[:1], **options))
        assert not whole.out[1, :, :padding].any()
        assert whole.lse[1, :, :padding].eq(-math.inf).all()
        assert not whole.score[1, :, :padding].any()
        assert not whole.signature[1, : padding + 4].any()
        row = [t[1:, :, padding:] for t in (query, key, value)]
        alone = prefill(*row, None, bias[1:, :, padding:], **options)
        live = (*(t[1:, :, padding:] for t in whole[:3]), whole.signature[1:, padding:])
        assert_same(Prefill(*live), alone)


@every_kind
def test_ragged_heads(kind, isa):
    """Each KV head has its own first token; its query heads get what they would get alone."""
    query, key, value = tensors(kind, 6, 3, 40, 100, 48)
    first = torch.tensor([[0, 90, 33]])
    whole = prefill(query, key, value, first, scale=0.2, sample=1)
    for h in range(3):
        begin = int(first[0, h])
        length = min(40, 100 - begin)
        alone = prefill(
            query[:, 2 * h : 2 * h + 2, 40 - length :], key[:, h : h + 1, begin:], value[:, h : h + 1, begin:], scale=0.2, sample=1
        )
        assert whole.out[:, 2 * h : 2 * h + 2, 40 - length :].equal(alone.out)
        assert whole.lse[:, 2 * h : 2 * h + 2, 40 - length :].equal(alone.lse)
        assert whole.score[:, 2 * h : 2 * h + 2, begin:].equal(alone.score)


@every_kind
def test_chunks(kind, isa):
    """A prompt in chunks has the bits of the whole; the last chunk's scores too, where it holds the window."""
    query, key, value = tensors(kind, 6, 2, 700, 700, 64)
    whole = prefill(query, key, value, scale=0.125, window=16, pool=5, sign=True)
    for cuts in ((0, 1, 2, 700), (0, 256, 512, 700), (0, 333, 684, 700)):
        parts = [
            prefill(query[:, :, a:b], key[:, :, :b], value[:, :, :b], scale=0.125, window=16, pool=5, sign=True)
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.cat([p.out for p in parts], 2).equal(whole.out)
        assert torch.cat([p.lse for p in parts], 2).equal(whole.lse)
        assert parts[-1].score.equal(whole.score)
        assert parts[-1].signature.equal(whole.signature)


@every_kind
@pytest.mark.parametrize("d", [64, 128])
def test_against_sdpa(kind, d, isa):
    query, key, value = tensors(kind, 8, 2, 600, 600, d)
    ours = prefill(query, key, value, scale=d**-0.5)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    error, allowed = ((one.double() - exact).abs() for one in (ours.out, theirs))
    assert error.max() <= 2 * allowed.max()
    assert error.mean() <= 1.5 * allowed.mean()


def test_scores_of_window_and_sample_agree(isa):
    """All queries as a window, or every one of them; each gives away a probability of 1 in all."""
    query, key, value = tensors(torch.bfloat16, 4, 2, 90, 120, 32)
    window, sample = (prefill(query, key, value, scale=0.2, **{name: n}) for name, n in (("window", 90), ("sample", 1)))
    assert_same(window, sample)
    torch.testing.assert_close(window.score.sum(2), torch.full((1, 4), 90.0))
    every_third = prefill(query, key, value, scale=0.2, sample=3).score
    ones = [
        prefill(query[:, :, : 90 - i], key[:, :, : 120 - i], value[:, :, : 120 - i], scale=0.2, window=1).score for i in range(0, 90, 3)
    ]
    torch.testing.assert_close(every_third, sum(F.pad(one, (0, 120 - one.shape[2])) for one in ones))


@pytest.mark.parametrize("pool", [3, 7, 15, 33, 1001])
def test_pool(pool, isa):
    query, key, value = tensors(torch.float32, 3, 1, 50, 50, 16)
    first = torch.tensor([[9]])
    plain, pooled = (prefill(query, key, value, first, scale=0.5, sample=1, pool=n).score for n in (1, pool))
    half = pool // 2
    live = F.pad(plain[..., 9:], (half, half), value=-math.inf).unfold(2, pool, 1).amax(3)
    assert pooled[..., 9:].equal(live)
    assert not pooled[..., :9].any()


@pytest.mark.parametrize(("start", "recent"), [(0, 0), (3, 8), (100, 0), (0, 100), (60, 60), (1 << 62, 1 << 62)])
def test_signatures_are_those_of_the_scores(start, recent, isa):
    query, key, value = tensors(torch.bfloat16, 70, 7, 30, 100, 16, batch=2)
    first = torch.tensor([[9, 40, 5, 5, 90, 6, 100], [0] * 7])
    result = prefill(query, key, value, first, scale=0.5, window=16, pool=3, sign=True, start=start, recent=recent)
    begin = torch.tensor([min(5 + start, 100), min(start, 100)])
    assert result.signature.equal(sign(result.score, begin, begin.clamp_min(100 - recent)))
    assert result.signature.shape == (2, 100, 2)


def test_nan_stays_where_it_is_seen(isa):
    """A NaN in a key spoils the queries that see it, and their scores; not those before."""
    query, key, value = tensors(torch.float32, 2, 1, 40, 40, 16)
    clean = prefill(query, key, value, scale=0.3)
    key[0, 0, 25, 3] = math.nan
    spoilt = prefill(query, key, value, scale=0.3, window=1, sign=True)
    assert spoilt.out[:, :, :25].equal(clean.out[:, :, :25])
    assert spoilt.out[:, :, 25:].isnan().all()
    assert spoilt.score.isnan().all()


def test_scores_of_any_size(isa):
    """Scores that overflow without their largest taken off."""
    query, key, value = tensors(torch.float32, 2, 1, 600, 600, 16)
    result = prefill(query * 1e4, key, value, scale=1.0, window=600)
    exact = F.scaled_dot_product_attention(query.double() * 1e4, key.double(), value.double(), is_causal=True, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(result.out, exact.float(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(result.score.sum(2), torch.full((1, 2), 600.0), rtol=0.02, atol=0)


def test_layout_of_a_model():
    """Keys and values as models have them, tokens before heads, without a copy; and of a slice of a longer cache."""
    query, key, value = tensors(torch.bfloat16, 4, 2, 30, 30, 64)
    expected = prefill(query, key, value, scale=0.125)
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    assert_same(prefill(*turned, scale=0.125), expected)
    longer = (F.pad(t, (0, 0, 0, 9)) for t in (key, value))
    assert_same(prefill(query, *(t[:, :, :30] for t in longer), scale=0.125), expected)


def test_reference_agrees_on_a_long_prompt():
    args = tensors(torch.float32, 4, 2, 1500, 1500, 32)
    options = {"scale": 0.2, "window": 32, "pool": 7, "sign": True, "start": 4, "recent": 32}
    ours, reference = prefill(*args, **options), CATALOGUE["kv_cache_prefill"].reference(*args, **options)
    torch.testing.assert_close(ours[:3], reference[:3], rtol=1e-4, atol=1e-5)
    assert (ours.signature != reference[3]).float().mean() < 0.01  # a score beside the middle may fall on the other side


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_prompt_alone():
    """No array of queries times tokens, which would be 256 MiB here."""
    args = tensors(torch.bfloat16, 1, 1, 8192, 8192, 16)
    options = {"scale": 0.2, "sample": 64, "pool": 7, "sign": True}
    prefill(*args, **options)
    before = forget_peak()
    prefill(*args, **options)
    assert peak_bytes() - before < 16 << 20


@every_kind
def test_compile_and_export(kind, tmp_path):
    """fullgraph with a dynamic number of tokens, and a program from a file."""

    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, first: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.torch_cpu_ext.kv_cache_prefill(query, key, value, first, bias, scale=0.2, window=4, pool=3, sign=True)

    def example(n: int) -> tuple[Tensor, ...]:
        return *tensors(kind, 4, 2, n, n, 16), torch.tensor([[3, 0]]), torch.randn(1, 2, n)

    module = Layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, example(20), dynamic_shapes=({2: tokens}, {2: tokens}, {2: tokens}, None, {2: tokens}))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for n in (20, 33, 300):
        args = example(n)
        for function in (compiled, loaded):
            assert_same(Prefill(*function(*args)), Prefill(*module(*args)))
    torch._dynamo.reset()


def test_modes():
    args = tensors(torch.float32, 4, 2, 20, 20, 16)
    expected = prefill(*args, scale=0.2, window=4)
    with torch.inference_mode():
        assert_same(prefill(*args, scale=0.2, window=4), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(prefill(*args, scale=0.2, window=4), expected)
    meta = prefill(*(t.to("meta") for t in args), scale=0.2, window=4)
    assert [t.shape for t in meta] == [t.shape for t in expected]


def test_nothing_is_touched_outside_the_arguments():
    """Arguments between pages that must not be touched."""
    print(succeeded(run_python("import runpy, sys; runpy.run_path(sys.argv[1])", str(TESTS / "kv_cache/fences_prefill.py"))))
