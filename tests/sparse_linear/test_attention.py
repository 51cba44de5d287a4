"""Attention over pruned keys and values where numbers or memory are special, and properties that hold for any input."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import torch_cpu_ext as tce
from torch_cpu_ext.core.isa import supported
from torch_cpu_ext.sparse_linear import attend, compress_kv, expand_kv, from_blocks, page_bytes, to_blocks

from cases import attend_sample, random_kv
from support import TESTS, run_python, succeeded

NAN, INF = float("nan"), float("inf")


def spans(batch: int, heads: int, *one: int) -> torch.Tensor:
    return torch.tensor(one).repeat(batch, heads, 1)


def stored(k, v, sparsity=(0.0, 0.0), pages=0):
    """Pages and tails of some tokens, the first of them in pages."""
    n = 16 * pages
    paged = [compress_kv(x[:, :, :n], kind=kind, sparsity=s) for x, kind, s in zip((k, v), ("key", "value"), sparsity, strict=True)]
    return (*paged, to_blocks(k[:, :, n:], "key"), to_blocks(v[:, :, n:], "value"))


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (1, 1, 16, 80), (1, 2, 0, 16)])
def test_blocks_round_trip(kind, shape):
    x = torch.randn(shape).bfloat16()
    blocks = to_blocks(x, kind)
    assert from_blocks(blocks, kind).equal(x)
    if x.numel():  # dense pages are the same bytes
        assert compress_kv(x, kind=kind, sparsity=0).equal(blocks.flatten(3).view(torch.uint8))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_pruning_keeps_the_largest(data):
    """What is pruned is nowhere larger than what is kept, and as much is kept as was asked for."""
    d, kind = 16 * data.draw(st.integers(1, 16)), data.draw(st.sampled_from(["key", "value"]))
    sparsity = data.draw(st.floats(0, 1 - 1 / d))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    x = random_kv((1, 2, 32, d), generator).bfloat16()
    pages = compress_kv(x, kind=kind, sparsity=sparsity)
    assert pages.shape == (1, 2, 2, page_bytes(d, sparsity))
    back = expand_kv(pages, kind=kind, head_dim=d)
    keep = round((1 - sparsity) * d)
    assert bool(((back == x) | (back == 0)).all())
    gone = torch.where(back == x, 0, x.abs())
    least = x.abs().topk(keep, -1).values[..., -1:]
    assert bool((gone <= least).all())
    assert bool(((back != 0).sum(-1) <= keep).all())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(data):
    """Any instruction set and thread count, ragged spans: as the model in cases.py."""
    pages, blocks = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 4))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    ragged = []
    for _ in range(batch * heads):
        used, tail = data.draw(st.integers(0, pages)), data.draw(st.integers(0, 16 * blocks))
        ragged.append((data.draw(st.integers(0, 16 * used + tail)), used, tail))
    shape = batch, heads, data.draw(st.integers(1, 8)), 16 * data.draw(st.integers(1, 8))
    sparsity = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.8])), data.draw(st.sampled_from([0.0, 0.5, 0.7]))
    sample = attend_sample(
        shape, data.draw(st.integers(1, 9)), pages, blocks, sparsity, torch.tensor(ragged).view(batch, heads, 3), torch.float32, 5
    )
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    with tce.isa(data.draw(st.sampled_from(supported()))):
        result = torch.cat([one.double().flatten() for one in torch.ops.torch_cpu_ext.sparse_linear_attend(**sample.args)])
    expected, bound = sample.expected()
    assert bool(torch.where(expected.isfinite(), (result - expected).abs() <= bound, result == expected).all())


def test_pages_and_tail_are_one_sequence(isa):
    """Where the pages end makes no difference if nothing is pruned."""
    k, v, q = torch.randn(1, 2, 96, 64), torch.randn(1, 2, 96, 64), torch.randn(1, 6, 3, 64)
    whole = attend(q, *stored(k, v), spans(1, 2, 0, 0, 90), scale=0.125)
    for pages in (1, 3, 5):
        split = attend(q, *stored(k, v, pages=pages), spans(1, 2, 0, pages, 90 - 16 * pages), scale=0.125)
        assert whole[0].equal(split[0])
        assert whole[1].equal(split[1])


def test_close_to_pytorch(isa):
    """Dense, against scaled_dot_product_attention on the same bf16 numbers."""
    k, v, q = (torch.randn(2, h, n, 128).bfloat16() for h, n in ((2, 208), (2, 208), (8, 4)))
    out, _ = attend(q, *stored(k, v, pages=4), spans(2, 2, 0, 4, 144), scale=128**-0.5)
    mask = torch.ones(4, 208, dtype=torch.bool).tril(204)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), rtol=2e-2, atol=2e-2)


def test_lse_joins_parts(isa):
    """Attention over two halves of the tokens, joined by the logarithms of their sums, is attention over all."""
    k, v, q = torch.randn(1, 1, 128, 32), torch.randn(1, 1, 128, 32), torch.randn(1, 4, 1, 32)
    whole, total = attend(q, *stored(k, v), spans(1, 1, 0, 0, 128), scale=1.0)
    parts = [
        attend(q, *stored(x, y), spans(1, 1, 0, 0, 64), scale=1.0) for x, y in ((k[:, :, :64], v[:, :, :64]), (k[:, :, 64:], v[:, :, 64:]))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum((part[1] - lse).exp()[..., None] * part[0] for part in parts), whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pages", [0, 2])
def test_nan_and_infinities(isa, pages):
    k, v, q = torch.randn(1, 1, 32, 32), torch.randn(1, 1, 32, 32), torch.randn(1, 2, 1, 32)
    where = spans(1, 1, 0, pages, 32 - 16 * pages)

    def run(k=k, v=v, q=q):
        return attend(q, *stored(k, v, (0.3, 0.5), pages), where, scale=0.1)[0]

    bad = q.clone()
    bad[0, 1, 0, 3] = NAN
    assert run(q=bad)[0, 0].equal(run()[0, 0])  # rows do not see each other
    assert bool(run(q=bad)[0, 1].isnan().all())
    for value in (NAN, INF, -INF):
        values = v.clone()
        values[0, 0, 5, 7] = value  # kept, since it is the largest
        out = run(v=values)
        assert bool(out[..., 7].isnan().all() if math.isnan(value) else (out[..., 7] == value).all())
        assert bool(out[..., :7].isfinite().all())
    keys = k.clone()
    keys[0, 0, 9, 2] = NAN
    assert bool(run(k=keys).isnan().all())


def test_large_and_tiny_scores(isa):
    """Scores far apart: all weight goes to the largest, nothing overflows."""
    k, v = torch.zeros(1, 1, 16, 16), torch.randn(1, 1, 16, 16).bfloat16().float()
    k[0, 0, 3, 0], k[0, 0, 7, 0] = 1.0, -1.0
    q = torch.full((1, 1, 1, 16), 3e4).bfloat16().float()
    out, lse = attend(q, *stored(k, v), spans(1, 1, 0, 0, 16), scale=1.0)
    assert out[0, 0, 0].equal(v[0, 0, 3])
    torch.testing.assert_close(lse[0, 0], q[0, 0, :, 0])
    out, _ = attend(q, *stored(k, v), spans(1, 1, 0, 0, 16), scale=0.0)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0].mean(0), rtol=1e-2, atol=1e-2)
    out, _ = attend(q, *stored(k, v), spans(1, 1, 0, 0, 16), scale=-1.0)
    assert out[0, 0, 0].equal(v[0, 0, 7])


def test_strides_of_pages(isa):
    """A cache hands out the used part of a larger store, and heads and rows in another order."""
    sample = attend_sample((2, 3, 2, 48), 2, 5, 2, (0.3, 0.5), (3, 5, 20), torch.float32, 3, junk=False)
    op = torch.ops.torch_cpu_ext.sparse_linear_attend
    expected = op(**sample.args)
    for name in ("k_pages", "v_pages", "k_tail", "v_tail", "spans"):
        value = sample.args[name]
        wider = value.new_zeros((value.shape[0], value.shape[1], value.shape[2] + 3, *value.shape[3:]))[:, :, : value.shape[2]].copy_(value)
        swapped = value.transpose(0, 1).contiguous().transpose(0, 1)
        uneven = value.new_zeros((*value.shape[:-1], value.shape[-1] + 5))[..., : value.shape[-1]].copy_(value)
        for other in (wider, swapped, uneven):
            assert all(a.equal(b) for a, b in zip(op(**sample.args | {name: other}), expected, strict=True))
    pages = sample.args["k_pages"]
    assert expand_kv(pages.transpose(0, 1), kind="key", head_dim=48).equal(expand_kv(pages, kind="key", head_dim=48).transpose(0, 1))


def test_results_do_not_depend_on_threads():
    sample = attend_sample((1, 2, 1, 64), 4, 200, 2, (0.3, 0.5), (0, 200, 20), torch.float32, 4)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(torch.ops.torch_cpu_ext.sparse_linear_attend(**sample.args))
    assert all(out.equal(results[0][0]) and lse.equal(results[0][1]) for out, lse in results)


def test_compile_and_export():
    """fullgraph, with the number of pages dynamic; equal bits."""

    class Step(torch.nn.Module):
        def forward(self, q, k_pages, v_pages, k_tail, v_tail, where):
            return attend(q * 2, k_pages, v_pages, k_tail, v_tail, where, scale=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, dynamic=True, backend="aot_eager")
    for pages in (2, 3, 7):
        args = attend_sample((1, 2, 1, 32), 2, pages, 1, (0.3, 0.5), (0, pages, 3), torch.float32, 6, junk=False).args
        values = [args[name] for name in ("query", "k_pages", "v_pages", "k_tail", "v_tail", "spans")]
        assert all(a.equal(b) for a, b in zip(compiled(*values), Step()(*values), strict=True))
    program = torch.export.export(Step(), tuple(values))
    assert all(a.equal(b) for a, b in zip(program.module()(*values), Step()(*values), strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["key", "value"])
def test_damaged_pages(kind, isa):
    """A RuntimeError or a result, never a crash: a flipped bit of the bitmaps, at the end of the store too."""
    sample = attend_sample((1, 1, 1, 32), 2, 40, 0, (0.3, 0.5), (0, 40, 0), torch.float32, 7)
    name = "k_pages" if kind == "key" else "v_pages"
    good = sample.args[name]
    for page, byte in itertools.product((0, 20, 38, 39), (0, 31, 63)):
        bad = good.clone()
        bad[0, 0, page, byte] ^= 4
        with pytest.raises(RuntimeError, match="pages must be intact"):
            torch.ops.torch_cpu_ext.sparse_linear_attend(**sample.args | {name: bad})
        with pytest.raises(RuntimeError, match="pages must be intact"):
            expand_kv(bad, kind=kind, head_dim=32)


def test_nothing_is_touched_outside_the_arguments():
    """Arguments between pages that must not be touched, damaged ones too."""
    print(succeeded(run_python("import runpy, sys; runpy.run_path(sys.argv[1])", str(TESTS / "sparse_linear/fences_attention.py"))))
