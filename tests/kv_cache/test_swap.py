"""optimize, restore and report with a KVCrushConfig; skipped where transformers is not installed."""

import copy
import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

import torch_cpu_ext as tce  # noqa: E402
from torch_cpu_ext.integrations.kvcrush import NAME, KVCrushAttention, KVCrushCache, KVCrushLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
CONFIG = tce.KVCrushConfig(budget=50, recent=16)
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "vocab_size": 97, "initializer_range": 0.15, "pad_token_id": 0, "eos_token_id": None},
}


def make(**options):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **options})).eval()


def tokens(length, batch=1):
    return torch.randint(1, 97, (batch, length))


def used(model, ids, **options):
    """The cache that generate made."""
    return model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **options).past_key_values


def test_generate_makes_a_fresh_cache():
    model, ids = make(), tokens(120)
    assert tce.optimize(model, CONFIG) is model
    caches = [used(model, ids) for _ in range(2)]
    assert caches[0] is not caches[1]
    for cache in caches:
        assert type(cache) is KVCrushCache
        assert cache.crush is CONFIG
        assert cache.get_seq_length() == 124
        assert all(int(layer.kept.lengths.max()) < 80 for layer in cache.layers)
    expected = used(model, ids, past_key_values=KVCrushCache(model.config, CONFIG))
    assert expected.layers[0].positions().equal(caches[0].layers[0].positions())
    assert type(used(model, ids, generation_config=GenerationConfig(eos_token_id=None))) is KVCrushCache
    assert type(used(model, ids, num_beams=2)) is KVCrushCache
    assert type(used(model, ids, prefill_chunk_size=50)) is KVCrushCache


def test_calls_make_a_fresh_cache():
    model, ids = tce.swap_attention(make(), CONFIG), tokens(60)
    with torch.no_grad():
        out = model(ids)
        assert type(out.past_key_values) is KVCrushCache
        assert type(model.model(ids).past_key_values) is KVCrushCache
        assert model(ids, use_cache=False).past_key_values is None
        more = model(tokens(1), past_key_values=out.past_key_values)
    assert more.past_key_values is out.past_key_values
    assert out.past_key_values.get_seq_length() == 61
    loss = model(ids, labels=ids).loss  # with gradients, as before
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_given_cache_is_used_as_it_is():
    model, plain, ids = tce.optimize(make(), CONFIG), make(), tokens(120)
    for options in ({"past_key_values": DynamicCache(config=model.config)}, {"cache_implementation": "static"}, {"use_cache": False}):
        common = {"max_new_tokens": 10, "do_sample": False}
        given = {key: copy.deepcopy(value) for key, value in options.items()}
        assert model.generate(ids, **common, **options).equal(plain.generate(ids, **common, **given))


def test_restore():
    model, ids = make(), tokens(120)
    names = [name for name, _ in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    tce.optimize(model, CONFIG)
    assert model.state_dict().keys() == state.keys()
    assert model.config._attn_implementation == NAME
    tce.optimize(model, tce.KVCrushConfig(budget=60, recent=16))  # another one instead
    assert used(model, ids).crush.budget == 60
    assert tce.restore(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert model.model.layers[0].self_attn is attention
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in model.__dict__
    assert not model.model._forward_pre_hooks
    assert type(used(model, ids)) is DynamicCache
    assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(before)
    assert not tce.report(model).rows


def test_copies_are_apart():
    model, ids = tce.optimize(make(), CONFIG), tokens(120)
    used(model, ids)
    other = copy.deepcopy(model)
    tce.restore(model)
    assert type(used(other, ids)) is KVCrushCache
    tce.restore(other)
    assert type(used(other, ids)) is DynamicCache


def test_report():
    model = tce.optimize(make(), CONFIG)
    rows = tce.report(model).rows
    assert [row.name for row in rows] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert {row.technique for row in rows} == {"kv_cache"}
    assert {row.kind for row in rows} == {"snapkv, 25% representatives"}
    assert {row.bytes_before for row in rows} == {0}
    assert {row.isa for row in rows} == {tce.kernel_isa("kv_cache", "attend")}
    cache = used(model, tokens(300))
    row = tce.report(model).rows[0]
    assert row.bytes_before == 2 * 2 * 304 * 32 * 4
    assert row.bytes_after == cache.layers[0].nbytes < 0.4 * row.bytes_before
    assert row.detail == "50 tokens; 304 seen in the last cache"
    del cache
    share = tce.optimize(make(), tce.KVCrushConfig(ratio=0, importance="h2o"))
    assert {(row.kind, row.detail) for row in tce.report(share).rows} == {("h2o", "25% of the tokens")}


def test_some_layers():
    model, ids = make(), tokens(120)
    tce.optimize(model, CONFIG, include="layers", exclude=re.compile(r"\.1\."))
    cache = used(model, ids)
    assert [isinstance(layer, KVCrushLayer) for layer in cache.layers] == [True, False, True]
    assert [isinstance(layer.self_attn, KVCrushAttention) for layer in model.model.layers] == [True, False, True]
    assert cache.layers[0].place == (0, 2)
    with pytest.raises(ValueError, match="include must fit the name of a module, got 'mlps', which fits none"):
        tce.optimize(make(), CONFIG, include="mlps")
    with pytest.raises(ValueError, match="layer that can be compressed, got none: there is no attention layer"):
        tce.optimize(make(), CONFIG, filter_fn=lambda module, name: False)


def test_layers_with_a_window_are_left_alone():
    config = transformers.Gemma3TextConfig(
        **{**SMALL, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, sliding_window=24
    )
    model, ids = transformers.Gemma3ForCausalLM(config).eval(), tokens(100)
    tce.optimize(model, CONFIG)
    kept = tce.report(model).kept
    assert kept == {"model.layers.1.self_attn": "it has no full attention (its cache is transformers' DynamicSlidingWindowLayer)"}
    assert [isinstance(layer, KVCrushLayer) for layer in used(model, ids).layers] == [True, False, True]
    tce.restore(model)
    assert type(used(model, ids)) is DynamicCache


def test_with_packed_weights(tmp_path):
    """Both techniques on one model, saved and loaded."""
    model, ids = make(), tokens(120)
    tce.optimize(model, tce.SparseLinearConfig(dtype="fp32"))
    tce.optimize(model, CONFIG)
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert {row.technique for row in tce.report(model).rows} == {"sparse_linear", "kv_cache"}
    tce.save_checkpoint(model, tmp_path / "model.safetensors")
    again = tce.load_checkpoint(make(), tmp_path / "model.safetensors")
    assert type(used(again, ids)) is KVCrushCache
    assert again.generate(ids, max_new_tokens=8, do_sample=False).equal(out)
    tce.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.lm_head) is nn.Linear


def test_what_cannot_be_served():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        tce.swap_attention({}, CONFIG)
    with pytest.raises(ValueError, match="there is no attention layer of transformers"):
        tce.optimize(nn.Sequential(nn.Linear(4, 4)), CONFIG)
    odd = make(head_dim=24)
    with pytest.raises(ValueError, match=r"got none: model\.layers\.0\.self_attn: its head dimension is 24, no multiple of 16; model"):
        tce.optimize(odd, CONFIG)
    sinks = make()
    sinks.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn cannot be served, since its attention has sinks"):
        tce.optimize(sinks, CONFIG)
    assert sinks.config._attn_implementation == "sdpa"  # as it was
    assert not tce.report(sinks).rows


def test_compiled():
    torch._dynamo.reset()
    model, ids = tce.optimize(make(), CONFIG), tokens(100)
    compiled = torch.compile(model)
    with torch.no_grad():
        a, b = compiled(ids), model(ids)
        assert type(a.past_key_values) is KVCrushCache
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)
        more = tokens(1)
        for _ in range(3):
            a, b = compiled(more, past_key_values=a.past_key_values), model(more, past_key_values=b.past_key_values)
            torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)
    torch._dynamo.reset()
