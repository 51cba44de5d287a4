"""SparseKVCache with a tiny random Llama, against transformers' own cache; skipped where transformers is not installed."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from torch_cpu_ext.integrations.sparse_kv import NAME, SparseKVCache, SparseKVLayer  # noqa: E402
from torch_cpu_ext.sparse_linear import compress_kv, expand_kv  # noqa: E402

VOCABULARY = 97


def make(heads=4, kv_heads=2, head_dim=32, dtype=torch.float32, attention=NAME, **options):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16 * heads,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=VOCABULARY,
        initializer_range=0.15,  # so that attention matters
        attn_implementation=attention,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def plain():
    return make(attention="sdpa")


def tokens(batch, length):
    return torch.randint(1, VOCABULARY, (batch, length))


def steps(model, cache, parts, mask=None):
    """Logits of a sequence given in parts."""
    logits, seen = [], 0
    with torch.no_grad():
        for part in parts:
            seen += part.shape[1]
            options = {} if mask is None else {"attention_mask": mask[:, :seen]}
            logits.append(model(part, past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(logits, 1)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("lengths", [(150, *[1] * 40), (5, 3, 1, 1, 8, 1), (16, *[1] * 200), (40, 100, 1, 70, 1, 9, 8, 2), (1,) * 30])
def test_nothing_pruned_is_dense_attention(model, plain, lengths):
    """Prompts, chunks and single tokens, over the edges of pages and window: as DynamicCache but for the rounding to bf16."""
    parts = tokens(2, sum(lengths)).split(lengths, 1)
    cache = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=32)
    close(steps(model, cache, parts), steps(plain, DynamicCache(config=plain.config), parts))
    assert cache.get_seq_length() == sum(lengths)
    layer = cache.layers[0]
    assert layer.tail >= min(32, sum(lengths))
    assert layer.tail <= 32 + 64


def test_chunks_up_to_half_the_window_use_the_pages(model, plain, monkeypatch):
    parts = tokens(2, 521).split((180, 64, 1, 65, 40, 64, 64, 3, 40), 1)
    cache = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=128)
    seen, attend = [], SparseKVLayer.attend
    monkeypatch.setattr(SparseKVLayer, "attend", lambda self, query, *args: (seen.append(query.shape[2]), attend(self, query, *args))[1])
    close(steps(model, cache, parts), steps(plain, DynamicCache(config=plain.config), parts))
    assert seen[::2] == [64, 1, 40, 64, 64, 3, 40]  # each in two layers


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 16), (6, 2, 48), (8, 1, 64), (3, 1, 80)])
def test_head_geometries(heads, kv_heads, head_dim):
    ours, theirs = (make(heads, kv_heads, head_dim, attention=name) for name in (NAME, "sdpa"))
    parts = tokens(1, 90).split((70, *[1] * 20), 1)
    cache = SparseKVCache(ours.config, k_sparsity=0, v_sparsity=0, window=16)
    close(steps(ours, cache, parts), steps(theirs, DynamicCache(config=theirs.config), parts))


def test_bfloat16():
    ours, theirs = (make(dtype=torch.bfloat16, attention=name) for name in (NAME, "sdpa"))
    parts = tokens(1, 80).split((60, *[1] * 20), 1)
    logits = steps(ours, SparseKVCache(ours.config, k_sparsity=0, v_sparsity=0, window=16), parts)
    assert logits.dtype == torch.bfloat16
    close(logits.float(), steps(theirs, DynamicCache(config=theirs.config), parts).float())


def test_left_padding(model, plain):
    """Rows of different lengths, padded on the left, each as it is alone."""
    ids, mask = tokens(3, 90), torch.ones(3, 90, dtype=torch.long)
    mask[0, :37], mask[1, :16] = 0, 0
    parts = ids.split((70, 12, *[1] * 4, 4), 1)
    cache = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=16)
    ours, theirs = steps(model, cache, parts, mask), steps(plain, DynamicCache(config=plain.config), parts, mask)
    close(ours[mask.bool()], theirs[mask.bool()])


def test_only_pages_are_pruned(model):
    """The tail is exact, pages are what compress_kv makes of it, once."""
    ids = tokens(1, 200)
    full, cache = DynamicCache(config=model.config), SparseKVCache(model.config, k_sparsity=0.5, v_sparsity=0.75, window=32)
    with torch.no_grad():
        model(ids, past_key_values=full)
        model(ids, past_key_values=cache)
    layer, dense = cache.layers[0], full.layers[0]
    used = 16 * layer.pages
    assert used == 160
    for kind, x, sparsity in (("key", dense.keys, 0.5), ("value", dense.values, 0.75)):
        mine = layer.dense(kind)
        assert mine[:, :, used:].equal(x[:, :, used:].bfloat16().float())
        pruned = expand_kv(compress_kv(x[:, :, :used], kind=kind, sparsity=sparsity), kind=kind, head_dim=32)
        assert mine[:, :, :used].equal(pruned.float())
    before = layer.page_store["key"][:, :, : layer.pages].clone()
    steps(model, cache, tokens(1, 150).split(1, 1))
    assert layer.pages > before.shape[2]
    assert layer.page_store["key"][:, :, : before.shape[2]].equal(before)


def test_memory_is_freed(model):
    """Bytes of a long prompt: 0.76 of bf16 for keys at 30 %, 0.56 for values at 50 %, half of that in float32, and the tail."""
    cache = SparseKVCache(model.config, window=32)
    with torch.no_grad():
        model(tokens(1, 2048), past_key_values=cache)
    layer = cache.layers[0]
    pages, elements = sum(t.numel() for t in layer.page_store.values()), 2 * 2 * layer.pages * 16 * 32  # keys and values of 2 heads
    assert pages == layer.pages * 2 * (2 * 2 * 32 + 32 * 22 + 32 * 16)
    assert pages < 0.68 * 2 * elements
    assert cache.nbytes == 2 * (pages + 2 * 2 * (32 + 64) * 32 * 2)
    assert all(layer.keys is None for layer in cache.layers)
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 48}])
def test_generate(model, plain, options):
    ids, mask = tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :21] = 0
    common = {"attention_mask": mask, "max_new_tokens": 100, "do_sample": False, "eos_token_id": None, **options}
    ours = model.generate(ids, past_key_values=SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=16), **common)
    theirs = plain.generate(ids, **common)
    assert ours.shape == theirs.shape
    assert ours[:, :124].equal(theirs[:, :124])  # rounding lets them part later


def test_sampling_and_pruning(model):
    torch.manual_seed(3)
    cache = SparseKVCache(model.config, k_sparsity=0.3, v_sparsity=0.5, window=16)
    out = model.generate(tokens(1, 80), past_key_values=cache, max_new_tokens=60, do_sample=True, eos_token_id=None)
    assert out.shape == (1, 140)
    assert cache.get_seq_length() == 139


def test_assisted_decoding(model, plain):
    """Candidates are taken back by crop."""
    ids = tokens(1, 20).repeat(1, 5)
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 4}
    cache = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=16)
    ours, theirs = model.generate(ids, past_key_values=cache, **common), plain.generate(ids, **common)
    assert ours[:, :105].equal(theirs[:, :105])


@pytest.mark.parametrize("removed", [0, 1, 15, 16, 40, 47, 48, 100, 119, 120])
def test_crop(model, plain, removed):
    """Also into the pages; decoding goes on from there."""
    ids, more = tokens(2, 120), tokens(2, 6)
    ours, theirs = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=16), DynamicCache(config=plain.config)
    steps(model, ours, [ids])
    steps(plain, theirs, [ids])
    ours.crop(-removed)
    theirs.crop(-removed)
    assert ours.get_seq_length() == 120 - removed
    close(steps(model, ours, more.split(1, 1)), steps(plain, theirs, more.split(1, 1)))
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative, got 5"):
        ours.layers[0].crop(5)


def test_rows_of_the_batch(model, plain):
    ids, more = tokens(3, 60), tokens(4, 5)
    ours, theirs = SparseKVCache(model.config, k_sparsity=0, v_sparsity=0, window=16), DynamicCache(config=plain.config)
    for cache, one in ((ours, model), (theirs, plain)):
        steps(one, cache, [ids])
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 1, 3, 5]))
    assert ours.batch_size == 4
    close(steps(model, ours, more.split(1, 1)), steps(plain, theirs, more.split(1, 1)))
    again = copy.deepcopy(ours)
    assert again.layers[0].dense("key").equal(ours.layers[0].dense("key"))


def test_other_layers_keep_their_cache():
    """A layer with a sliding window is left to transformers."""
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        attn_implementation=NAME,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    cache = SparseKVCache(config, k_sparsity=0, v_sparsity=0, window=16)
    assert [isinstance(layer, SparseKVLayer) for layer in cache.layers] == [True, False]
    parts = tokens(1, 60).split((40, *[1] * 20), 1)
    ours = steps(model, cache, parts)
    assert cache.nbytes > 0
    model.set_attn_implementation("sdpa")
    close(ours, steps(model, DynamicCache(config=config), parts))


def test_errors(model, plain):
    for name, value in (("k_sparsity", 1.0), ("k_sparsity", -0.1), ("v_sparsity", 2.0)):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and below 1, got {value}"):
            SparseKVCache(model.config, **{name: value})
    for window in (-16, 8, 100):
        with pytest.raises(ValueError, match=f"window must be a multiple of 16, got {window}"):
            SparseKVCache(model.config, window=window)
    with pytest.raises(ValueError, match=f"must use the attention implementation {NAME}, got sdpa"):
        plain(tokens(1, 4), past_key_values=SparseKVCache(plain.config))
    odd = make(head_dim=24)
    with pytest.raises(ValueError, match="same multiple of 16, got 24 and 24"):
        odd(tokens(1, 4), past_key_values=SparseKVCache(odd.config))
    with pytest.raises(ValueError, match=r"sparsity of each key must leave one of 32 elements, got 0\.99"), torch.no_grad():
        model(tokens(1, 4), past_key_values=SparseKVCache(model.config, k_sparsity=0.99))


def test_unfit_masks_and_gradients(model):
    cache = SparseKVCache(model.config)
    ids, mask = tokens(1, 40), torch.ones(1, 41, dtype=torch.long)
    steps(model, cache, [ids])
    mask[0, 5] = 0  # a hole
    with pytest.raises(ValueError, match="must be causal, with padding on the left only"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache, attention_mask=mask)
    with pytest.raises(RuntimeError, match="no gradients through a SparseKVCache"):
        model(ids[:, :1], past_key_values=cache)
