"""The parts of benchmarks/kv_cache.py: what is asked, how answers are scored, what methods keep, and decoding over it."""

import importlib.util
import math
import sys

import pytest
import torch

from support import ROOT

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def benchmark():
    """benchmarks/kv_cache.py under another name: this folder has its own."""
    spec = importlib.util.spec_from_file_location("kv_cache_benchmark", ROOT / "benchmarks" / "kv_cache.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def count(text):
    return len(text.split())


def names():
    return (
        "needle_single",
        "needle_multikey",
        "needle_multivalue",
        "needle_multiquery",
        "tracking",
        "common_words",
        "frequent_words",
    )


def test_tasks_are_those_named_here():
    from kv import tasks

    assert tuple(tasks.TASKS) == names()


@pytest.mark.parametrize("task", names())
@pytest.mark.parametrize("length", [300, 1000])
def test_a_sample_fits_its_length_and_holds_its_answers(task, length):
    from kv import tasks

    for seed in range(4):
        sample = tasks.make(task, length, seed, count)
        assert 0.95 * length <= count(sample.context) + count(sample.question) <= length
        assert sample.references
        assert len(set(sample.references)) == len(sample.references)
        assert all(reference in sample.context for reference in sample.references)
        assert not any(reference in sample.question for reference in sample.references)
        assert sample == tasks.make(task, length, seed, count)
        assert sample != tasks.make(task, length, seed + 1, count)


@pytest.mark.parametrize(
    ("task", "keys", "asked"),
    [("needle_single", 1, 1), ("needle_multikey", 4, 1), ("needle_multivalue", 4, 4), ("needle_multiquery", 3, 3)],
)
def test_needles_are_as_many_as_the_task_says(task, keys, asked):
    from kv import tasks

    sample = tasks.make(task, 400, 0, count)
    assert sample.context.count("The secret code of the ") == keys
    assert len(sample.references) == asked


def test_the_words_asked_for_are_the_most_frequent():
    from kv import tasks

    for task in ("common_words", "frequent_words"):
        sample = tasks.make(task, 800, 3, count)
        words = sample.context.split("\n\n")[1].split()
        times = {word: words.count(word) for word in set(words) if word.isalpha()}
        assert min(times.pop(word) for word in sample.references) > max(times.values())


def test_a_length_that_is_too_short_is_an_error():
    from kv import tasks

    with pytest.raises(ValueError, match=r"length: needle_multikey needs at least .* tokens, got 20"):
        tasks.make("needle_multikey", 20, 0, count)


def test_string_match_all_is_the_share_that_was_found():
    from kv.tasks import string_match_all

    assert string_match_all("It is 12345, or Oslo.", ("12345", "oslo")) == 1
    assert string_match_all("It is 12345.", ("12345", "oslo")) == 0.5
    assert string_match_all("", ("12345",)) == 0


def test_recall_asks_for_pairs_of_the_context():
    from kv import recall

    context, keys, values = recall.sample(128, 20, 5, 3, torch.Generator().manual_seed(0))
    assert context.shape == (3, 128)
    for row, asked, wanted in zip(context.tolist(), keys.tolist(), values.tolist(), strict=True):
        assert sum(recall.FIRST_KEY <= token < recall.FIRST_VALUE for token in row) == 20
        assert sum(token >= recall.FIRST_VALUE for token in row) == 20
        assert [row[row.index(key) + 1] for key in asked] == wanted
    again = recall.sample(128, 20, 5, 3, torch.Generator().manual_seed(0))
    assert all(a.equal(b) for a, b in zip(again, (context, keys, values), strict=True))


def capture(layers=2, heads=3, group=2, tokens=200, d=16):
    from kv.methods import Layer

    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        Layer(random(heads, tokens, d), random(heads, tokens, d), random(heads * group, 64, d), random(heads * group, tokens).abs(), 0.25)
        for _ in range(layers)
    ]


def methods():
    kv_cache = benchmark()

    return [method for method, _ in kv_cache.columns() if method.importance != "full"]


def test_every_method_keeps_as_many_bytes_and_the_first_and_last_tokens():
    from kv.methods import compress

    layers = capture()
    for method in methods():
        kept = compress(layers, method, 0.4, seed=3)
        assert sum(one.tokens(16) for one in kept) / len(kept) == pytest.approx(
            80, abs=0.5 if method.dtype == "bf16" and not method.representative_dtype else 1
        )
        for one in kept:
            assert (one.bias[:, : method.start] == 0).all()
            assert (one.bias[:, -method.recent :] == 0).all()
        again = compress(layers, method, 0.4, seed=3)
        assert all(a.bias.equal(b.bias) for a, b in zip(kept, again, strict=True))


def test_weights_of_the_representatives_add_up_to_all_that_was_not_important():
    from kv.methods import Method, compress

    for changes in ({}, {"kmeans": True}, {"spread": "position"}, {"spread": "random"}):
        method = Method("ours", ratio=0.5, log_count=True, **changes)
        for one in compress(capture(), method, 0.4):
            weights = one.bias.exp()
            assert (weights.sum(1) - 200).abs().max() <= 1e-3


def test_streaming_keeps_the_latest_and_snapkv_what_the_last_queries_see():
    from kv.methods import Method, compress, scores

    layers = capture()
    bias = compress(layers, Method("streaming", "streaming"), 0.5)[0].bias
    assert (bias[:, -96:] == 0).all()
    assert (bias[:, 4:-96] == -math.inf).all()
    method = Method("SnapKV", window=1, pool=1)
    layers[0].key[1, 50] = 100 * layers[0].query[2:4, -1].mean(0)
    assert scores(layers[0], method, torch.Generator())[2:4].mean(0).argmax() == 50
    assert compress(layers, method, 0.25)[0].bias[1, 50] == 0


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def test_answers_over_a_full_cache_are_the_models_own():
    from kv.methods import Method, compress
    from kv.reading import Reader

    prompt, question = torch.randint(64, (80,)), torch.randint(64, (5,))
    model = tiny()
    everything = torch.cat([prompt, question])[None]
    expected = model.generate(
        everything, attention_mask=torch.ones_like(everything), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    reader = Reader(model)
    layers = reader.read(prompt)
    kept = [compress(layers, Method("full", "full"), 1.0), compress(layers, Method("h2o", "h2o"), 0.6)]
    answers = reader.answer(layers, kept, question, 6)
    assert answers[0].tolist() == expected[0, 85:].tolist()
    errors = reader.errors(layers, kept, question)
    assert errors.shape == (2, 2, 4, 5)
    assert errors[0].max() < 1e-5
    assert errors[1].max() > 1e-3
    losses = reader.losses(layers, kept, torch.cat([question, answers[0]]))
    assert losses[0] < losses[1] or losses[0] == pytest.approx(losses[1], rel=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 0.0},
        {"ratio": 0.25},
        {"ratio": 0.5, "log_count": True, "pool": 1, "gqa": "layer"},
        {"ratio": 0.0, "importance": "h2o"},
        {"ratio": 0.25, "importance": "h2o"},
        {"ratio": 0.0, "importance": "tova", "gqa": "layer"},
        {"ratio": 0.0, "importance": "key_norm"},
        {"ratio": 0.0, "importance": "streaming"},
    ],
    ids=str,
)
def test_the_librarys_cache_gives_what_is_evaluated(changes):
    from transformers import DynamicCache

    from torch_cpu_ext import KVCrushCache, KVCrushConfig

    from kv.methods import Method, compress
    from kv.reading import Reader, _Pass

    prompt, question, model = torch.randint(64, (160,)), torch.randint(64, (5,)), tiny()
    reader = Reader(model)
    layers = reader.read(prompt)
    kept = compress(layers, Method("ours", **changes), 0.5)
    with torch.inference_mode():
        expected = reader._forward(question[None], DynamicCache(config=model.config), _Pass(layers, [kept]), 0)
        model.set_attn_implementation("torch_cpu_ext_kvcrush")
        published = {"pool": 7, "gqa": "mean", "log_count": False}  # where a `Method` says nothing
        cache = KVCrushCache(model.config, KVCrushConfig(budget=80, **published | changes))
        model(prompt[None], past_key_values=cache)
        got = model(question[None], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_dropping_tokens_and_masking_them_is_the_same():
    from kv.methods import Kept, Method, compress
    from kv.reading import _attend

    layer = capture()[0]
    kept = compress([layer], Method("h2o", "h2o", ratio=0.5, log_count=True), 0.4)[0]
    query, key, value = torch.randn(1, 6, 2, 16), torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)
    masked = _attend(query, key, value, layer, kept)
    stays = kept.bias > -math.inf
    layer.key, layer.value = (torch.stack([x[h, stays[h]] for h in range(3)]) for x in (layer.key, layer.value))
    alone = _attend(query, key, value, layer, Kept(torch.stack([kept.bias[h, stays[h]] for h in range(3)])))
    torch.testing.assert_close(masked, alone)


def test_rows_hold_seeds_and_averages_their_differences():
    kv_cache = benchmark()

    rows, subject = {}, kv_cache.Subject("SmolLM2-135M", "needle_single", "query-aware", 512, 1)
    for seed, found in enumerate([80.0, 90.0, 100.0]):
        values = {("full", "full"): 100.0, ("SnapKV", "half"): found - 10, ("KVCrush on SnapKV", "half"): found}
        kv_cache.merge(rows, subject, seed, values, {"cpu": "none"})
    row = rows["SmolLM2-135M needle_single query-aware 512 KVCrush on SnapKV half"]
    assert (row["mean"], row["interval"]) == (90, pytest.approx(4.303 * 10 / math.sqrt(3), abs=1e-3))
    ours = next(row for row in kv_cache.average(list(rows.values())) if row["config"]["method"] == "KVCrush on SnapKV")
    assert (ours["drop"], ours["over_snapkv"], ours["over_snapkv_interval"]) == (10, 10, 0)
