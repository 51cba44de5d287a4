"""KVCrushCache with tiny random models, against transformers' own cache; skipped where transformers is not installed."""

import copy
import io
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import DynamicCache, StaticCache  # noqa: E402

from torch_cpu_ext import KVCrushConfig  # noqa: E402
from torch_cpu_ext.integrations.kvcrush import NAME, KVCrushCache, KVCrushLayer  # noqa: E402
from torch_cpu_ext.kv_cache.pages import TOKENS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
VOCABULARY = 97
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "vocab_size": VOCABULARY, "initializer_range": 0.15, "pad_token_id": 0},  # so that attention matters
}
MODELS = {
    "llama": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 80}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": ("Gemma2", {"sliding_window": 24, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 24, "query_pre_attn_scalar": 32, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def make(name="llama", attention=NAME, dtype=torch.float32, **options):
    torch.manual_seed(1)
    kind, arguments = MODELS[name]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config(**{**SMALL, **arguments, **options}, attn_implementation=attention)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def plain():
    return make(attention="sdpa")


def cache(model, **options):
    return KVCrushCache(model.config, KVCrushConfig(**{"budget": 1.0, **options}))


def tokens(batch, length):
    return torch.randint(1, VOCABULARY, (batch, length))


def steps(model, cache, parts, mask=None):
    """Logits of a sequence given in parts."""
    logits, seen = [], cache.get_seq_length()
    with torch.no_grad():
        for part in parts:
            seen += part.shape[1]
            options = {} if mask is None else {"attention_mask": mask[:, :seen]}
            logits.append(model(part, past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(logits, 1)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def lengths(cache):
    return [layer.kept.lengths for layer in cache.layers if isinstance(layer, KVCrushLayer)]


# ----------------------------------------------------------------------------------------------------------------------- nothing is dropped


@pytest.mark.parametrize("name", MODELS)
def test_nothing_dropped_is_dynamic_cache(name):
    """Prompts, chunks and single tokens, over the edges of pages."""
    ours, theirs = make(name), make(name, "eager")
    for lengths in ((70, *[1] * 40, 20, 3, 1), (5, 3, 1, 1, 8, 1), (16, 1, 16, 1), (1,) * 20):
        parts = tokens(2, sum(lengths)).split(lengths, 1)
        own = cache(ours)
        close(steps(ours, own, parts), steps(theirs, DynamicCache(config=theirs.config), parts))
        assert own.get_seq_length() == sum(lengths)


@pytest.mark.parametrize(
    "options", [{"importance": "h2o"}, {"log_count": True}, {"heads": "ada", "layers": "pyramid"}, {"evict": "decode"}]
)
@pytest.mark.parametrize("budget", [1.0, 200])
def test_nothing_dropped_whatever_the_options(model, plain, options, budget):
    parts = tokens(2, 136).split((90, 17, *[1] * 20, 9), 1)
    own = cache(model, budget=budget, **options)
    close(steps(model, own, parts), steps(plain, DynamicCache(config=plain.config), parts))
    assert all(bool((length == 136).all()) for length in lengths(own))
    assert own.layers[0].positions().equal(torch.arange(136).expand(2, 2, 136))


# Queries are rounded to 8 bits for int8 pages where the machine multiplies those.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("int8", 0.05), ("int4", 0.25)])
def test_rounded_pages(model, plain, dtype, tolerance):
    parts = tokens(2, 150).split((100, *[1] * 50), 1)
    own = cache(model, dtype=dtype)
    close(steps(model, own, parts), steps(plain, DynamicCache(config=plain.config), parts), tolerance)
    tiers = own.layers[0].kept.tiers
    assert {name: tier.dtype for name, tier in tiers.items()} == (
        {"recent": "bf16"} if dtype == "bf16" else {"start": "fp32", "old": dtype, "recent": "fp32"}
    )
    if dtype != "bf16":
        assert bool((tiers["recent"].length >= 32).all())
        assert bool((tiers["recent"].length < 32 + 2 * TOKENS).all())
        assert bool((tiers["start"].length == 4).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = (make(dtype=dtype, attention=name) for name in (NAME, "sdpa"))
    parts = tokens(1, 80).split((60, *[1] * 20), 1)
    own = cache(ours)
    logits = steps(ours, own, parts)
    assert logits.dtype == dtype
    assert own.layers[0].kept.tiers["recent"].dtype == "bf16"
    close(logits.float(), steps(theirs, DynamicCache(config=theirs.config), parts).float(), 0.05)


def test_pages_are_packed_once(model):
    """int8 pages that are there stay as they are, bit for bit."""
    own = cache(model, dtype="int8", decode_evict=False)
    steps(model, own, [tokens(2, 100)])
    old = own.layers[0].kept.tiers["old"]
    count = int(old.pages[0, 0])
    before = old.pools["key"][old.table[:, :, :count].long()].clone()
    steps(model, own, tokens(2, 60).split(1, 1))
    old = own.layers[0].kept.tiers["old"]
    assert int(old.pages[0, 0]) > count
    assert old.pools["key"][old.table[:, :, :count].long()].equal(before)


# ----------------------------------------------------------------------------------------------------------------------------- left padding


@pytest.mark.parametrize("options", [{}, {"budget": 60}, {"budget": 60, "evict": "decode"}, {"budget": 60, "importance": "h2o"}])
def test_padded_row_is_the_row_alone(model, options):
    ids, mask = tokens(3, 132), torch.ones(3, 132, dtype=torch.long)
    pads = (37, 16, 0)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    sizes = (100, 12, *[1] * 20)
    batch = cache(model, **options)
    together = steps(model, batch, ids.split(sizes, 1), mask)
    for row, count in enumerate(pads):
        own = cache(model, **options)
        alone = steps(model, own, ids[row : row + 1, count:].split((100 - count, *sizes[1:]), 1))
        close(together[row, count:], alone[0])
        for ours, theirs in zip(batch.layers, own.layers, strict=True):
            kept = ours.positions()[row]
            assert (kept[kept >= 0] - count).view(2, -1).equal(theirs.positions()[0])


def test_rows_of_padding(model):
    """A row may be all padding, in its first chunk or in all."""
    ids, mask = tokens(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[0, :50], mask[1] = 0, 0
    own = cache(model, budget=48)
    logits = steps(model, own, ids.split((40, 30, 30), 1), mask)
    alone = cache(model, budget=48)
    close(logits[0, 50:], steps(model, alone, ids[:1, 50:].split((20, 30), 1))[0])
    assert lengths(own)[0].tolist() == [[48, 48], [0, 0], [48, 48]]


def test_masks(model):
    ids = tokens(1, 40)
    own = cache(model)
    steps(model, own, [ids])
    holed = torch.ones(1, 41, dtype=torch.long)
    holed[0, 5] = 0
    for bad, message in (
        (holed, "padding on the left only"),
        (torch.ones(1, 30, dtype=torch.long), r"cover all tokens so far, \(1, 41\), got torch.bool \(1, 30\)"),
        (torch.ones(1, 1, 1, 41, dtype=torch.bool), "must be 2-D"),
    ):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(ids[:, :1], past_key_values=own, attention_mask=bad)
        assert own.get_seq_length() == 40  # nothing was taken in
    moved = torch.ones(1, 41, dtype=torch.long)
    moved[0, :3] = 0
    with pytest.raises(ValueError, match="the padding of a row must stay as it was"), torch.no_grad():
        model(ids[:, :1], past_key_values=own, attention_mask=moved)


# --------------------------------------------------------------------------------------------------------------------------------- eviction

METHODS = [
    *({"importance": name} for name in ("snapkv", "h2o", "tova", "streaming", "key_norm", "random")),
    {"ratio": 0.0},
    {"ratio": 1.0},
    {"anchors": 3, "anchor": "alternate"},
    {"heads": "ada"},
    {"layers": "pyramid"},
    {"value_norm": True, "gqa": "max"},
    {"log_count": True},
    {"dtype": "int8"},
    {"dtype": "int4", "representative_dtype": "int4", "log_count": True},
    {"representative_dtype": "int8"},
    {"start": 0, "recent": 1},
    {"start": 20},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_budget_is_kept(model, options):
    """After prompts exactly; while decoding up to two pages more, for ever, but at least what the first and last tokens take in pages."""
    own = cache(model, **{"budget": 64, "recent": 16, **options})
    steps(model, own, tokens(2, 150).split((130, 20), 1))
    kept = torch.stack(lengths(own))
    assert int(kept.sum()) == 64 * 2 * 2 * 2
    if options.get("heads") != "ada" and options.get("layers") != "pyramid":
        assert bool((kept == 64).all())
    start, recent = options.get("start", 4), options.get("recent", 16)
    for layer in own.layers:
        for position in layer.positions().flatten(0, 1):
            position = position[position >= 0]
            assert position.diff().min() > 0
            assert position[:start].tolist() == list(range(start))
            assert position[-recent:].tolist() == list(range(150 - recent, 150))
    bytes = own.nbytes
    logits = steps(model, own, tokens(2, 100).split(1, 1))
    assert bool(logits.isfinite().all())
    least = -(-start // TOKENS) * TOKENS + recent + TOKENS
    assert int((torch.stack(lengths(own)) - kept.clamp(min=least)).max()) < 2 * TOKENS
    grown = own.nbytes
    steps(model, own, tokens(2, 150).split(1, 1))
    assert own.nbytes <= grown < 2 * bytes
    assert own.get_seq_length() == 400
    for layer in own.layers:
        assert layer.positions()[..., :start].equal(torch.arange(start).expand(2, 2, start)) or options.get("heads") == "ada"
        assert int(layer.positions().max()) == 399


def test_what_is_kept_is_attended_to(model):
    """Against attention over the tokens that are kept, computed by PyTorch."""
    seen = {}

    def spy(module, args, kwargs, output):
        seen["hidden"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["output"], seen["angles"] = output[0], kwargs["position_embeddings"]

    attention = model.model.layers[0].self_attn
    keys = []

    def note(layer, key, value, mask=None):
        keys.append((key, value))

    ids = tokens(1, 120)
    own = cache(model, budget=48, log_count=False)
    update = own.layers[0].update
    own.layers[0].update = lambda key, value, *a, **k: (note(None, key, value), update(key, value, *a, **k))[1]
    hook = attention.register_forward_hook(spy, with_kwargs=True)
    try:
        steps(model, own, [ids[:, :119]])
        position = own.layers[0].positions()[0]
        assert position.shape == (2, 48)
        steps(model, own, [ids[:, 119:]])
    finally:
        hook.remove()
    key, value = (torch.cat([pair[i] for pair in keys], 2)[0] for i in (0, 1))
    query = attention.q_proj(seen["hidden"]).view(1, 1, 4, 32).transpose(1, 2)
    cos, sin = seen["angles"]
    rotated = query * cos[:, None] + torch.cat([-query[..., 16:], query[..., :16]], -1) * sin[:, None]
    kept = torch.cat([position, torch.full((2, 1), 119)], 1)
    index = kept[..., None].expand(2, 49, 32)
    k, v = (x.gather(1, index).repeat_interleave(2, 0) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(rotated[0], k, v, scale=32**-0.5)
    with torch.no_grad():
        close(seen["output"], attention.o_proj(expected.transpose(0, 1).reshape(1, 1, -1)))


def test_chunks_with_evict_decode_are_one_prompt(model):
    """Whatever the chunks, the last one shorter than the window included: the same tokens, the same answers."""
    for importance in ("snapkv", "h2o", "tova", "key_norm"):
        ids, more = tokens(2, 150), tokens(2, 20)
        kept, logits = [], []
        for sizes in ((150,), (64, 64, 22), (100, 45, 5), (71, 79)):
            own = cache(model, budget=60, evict="decode", importance=importance)
            steps(model, own, ids.split(sizes, 1))
            assert bool((lengths(own)[0] == 150).all())  # nothing is dropped yet
            logits.append(steps(model, own, more.split(1, 1)))
            assert int(lengths(own)[0].max()) <= 60 + 2 * TOKENS
            kept.append([layer.positions() for layer in own.layers])
        for other, answer in zip(kept[1:], logits[1:], strict=True):
            assert all(a.equal(b) for a, b in zip(kept[0], other, strict=True))
            close(answer, logits[0])
    whole = cache(model, budget=60, importance=importance)
    steps(model, whole, [ids])
    close(steps(model, whole, more.split(1, 1)), logits[0])


def test_chunks_bound_memory(model):
    """A prompt in chunks never has more than the budget and a chunk."""
    own = cache(model, budget=64)
    most = 0
    for part in tokens(1, 640).split(64, 1):
        steps(model, own, [part])
        most = max(most, own.nbytes)
    one = cache(model, budget=64)
    steps(model, one, [tokens(1, 128)])
    assert most <= one.nbytes
    assert own.get_seq_length() == 640


def test_ragged_budgets_free_memory(model):
    """Heads that keep less take less: bytes follow the tokens kept, not the longest head."""
    ids = tokens(1, 600)
    uniform, ada = cache(model, budget=200), cache(model, budget=200, heads="ada", layers="pyramid")
    full = cache(model)
    for own in (uniform, ada, full):
        steps(model, own, [ids])
    kept = torch.stack(lengths(ada))
    assert int(kept.max()) > int(kept.min()) + 50
    pages = sum(tier.pools["key"].shape[0] for layer in ada.layers for tier in layer.kept.tiers.values())
    assert pages <= int((-(-kept // TOKENS)).sum()) + kept.numel()  # a page to grow into each
    assert ada.nbytes < 1.15 * uniform.nbytes < 0.5 * full.nbytes


def test_deep_prompts_do_not_keep_dense_keys(model):
    own = cache(model, budget=0.25)
    steps(model, own, [tokens(1, 1024)])
    layer = own.layers[0]
    assert layer.keys is None
    dense = 2 * 2 * 1024 * 32 * 4
    assert layer.nbytes < 0.25 * dense * 1.25
    own.reset()
    assert own.nbytes == own.get_seq_length() == 0
    close(steps(model, own, [tokens(1, 30)])[:, -1:], steps(model, own, [tokens(1, 1)]), 10)  # it goes on


def test_manual(model):
    ids, more = tokens(2, 150), tokens(2, 40)
    own, whole = cache(model, budget=60, evict="manual"), cache(model, budget=60)
    steps(model, own, ids.split((75, 75), 1))
    assert bool((lengths(own)[0] == 150).all())
    own.compress()
    steps(model, whole, [ids])
    assert all(a.positions().equal(b.positions()) for a, b in zip(own.layers, whole.layers, strict=True))
    close(steps(model, own, more.split(1, 1)), steps(model, whole, more.split(1, 1)))
    cache(model, budget=60, evict="manual").compress()  # nothing to do


def test_several_questions(model):
    """Copies of a compressed context go on on their own, and pickled ones too."""
    own = cache(model, budget=64)
    steps(model, own, [tokens(1, 200)])
    questions = [tokens(1, 30) for _ in range(2)]
    copies = [copy.deepcopy(own) for _ in range(2)]
    answers = [steps(model, one, question.split((12, *[1] * 18), 1)) for one, question in zip(copies, questions, strict=True)]
    assert own.get_seq_length() == 200
    assert own.layers[0].config is copies[0].layers[0].config is model.config
    close(steps(model, own, questions[1].split((12, *[1] * 18), 1)), answers[1])
    file = io.BytesIO()
    pickle.dump(copies[0], file)
    again = pickle.loads(file.getvalue())
    more = tokens(1, 5)
    close(steps(model, again, more.split(1, 1)), steps(model, copies[0], more.split(1, 1)))


def test_representatives_speak_for_others(model):
    own = cache(model, budget=60, log_count=True)
    steps(model, own, [tokens(1, 150)])
    tier = own.layers[0].kept.tiers["recent"]
    members = tier.slots["bias"][:, :, :60].exp()
    # The candidates' number; each is spoken for by a representative, or is one: 6 of them, which is a quarter of 60 - 36.
    close(members.sum(2), torch.full((1, 2), 150.0 - 36 - 18 + 36 + 18))
    assert bool(((members > 1.5).sum(2) <= 6).all())


# --------------------------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 48}])
def test_generate(model, plain, options):
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :21] = 0
    common = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **options}
    ours = model.generate(ids, past_key_values=cache(model), **common)
    assert ours.equal(plain.generate(ids, **common))


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_beams_that_evict(model, dtype):
    """Beams share pages: the answer is that of beams which share none."""
    ids = tokens(2, 100)

    class Apart(KVCrushCache):
        def reorder_cache(self, beam_idx):
            for layer in self.layers:
                for tier in layer.kept.tiers.values():  # every page of every row a copy
                    used = torch.arange(tier.table.shape[2]) < tier.pages[..., None]
                    for kind, pool in tier.pools.items():
                        tier.pools[kind] = torch.cat([pool, pool[tier.table[used].long()]])
                    tier.table[used] = (pool.shape[0] + torch.arange(int(used.sum()))).int()
            super().reorder_cache(beam_idx)

    config = KVCrushConfig(budget=56, recent=16, dtype=dtype)
    common = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "num_beams": 4}
    outs = [model.generate(ids, past_key_values=kind(model.config, config), **common) for kind in (KVCrushCache, Apart)]
    assert outs[0].equal(outs[1])
    own = KVCrushCache(model.config, config)
    model.generate(ids, past_key_values=own, **common)
    assert int(lengths(own)[0].max()) <= 56 + 2 * TOKENS


def test_sampling_and_sequences(model):
    torch.manual_seed(3)
    own = cache(model, budget=50)
    out = model.generate(tokens(1, 80), past_key_values=own, max_new_tokens=60, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert out.shape == (3, 140)
    assert own.get_seq_length() == 139


def test_turns(model, plain):
    """A conversation: each turn's ids hold all before."""
    ours, theirs = cache(model), DynamicCache(config=plain.config)
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = tokens(1, 50)
    for turn in (30, 5, 2):
        a = model.generate(ids, past_key_values=ours, **common)
        assert a.equal(plain.generate(ids, past_key_values=theirs, **common))
        ids = torch.cat([a, tokens(1, turn)], 1)
    own = cache(model, budget=40)
    for turn in (30, 5, 2):
        ids = torch.cat([model.generate(ids, past_key_values=own, **common), tokens(1, turn)], 1)
        assert int(lengths(own)[0].max()) <= 40 + 2 * TOKENS


def test_assisted_decoding(model, plain):
    """Candidates are taken back while nothing was dropped; after that it is refused."""
    ids = tokens(1, 20).repeat(1, 5)
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 4}
    ours, theirs = model.generate(ids, past_key_values=cache(model), **common), plain.generate(ids, **common)
    assert ours.equal(theirs)
    with pytest.raises(ValueError, match="cache that can be cropped"):
        model.generate(ids, past_key_values=cache(model, budget=50), **common)
    with pytest.raises(RuntimeError, match="layer 0 cannot take tokens back after tokens were dropped"):
        model.generate(ids, past_key_values=cache(model, budget=105), **{**common, "max_new_tokens": 60})


@pytest.mark.parametrize("removed", [0, 1, 15, 16, 40, 119, 120])
def test_crop(model, plain, removed):
    ids, more = tokens(2, 120), tokens(2, 20)
    ours, theirs = cache(model), DynamicCache(config=plain.config)
    steps(model, ours, ids.split((100, *[1] * 20), 1))
    steps(plain, theirs, [ids])
    ours.crop(-removed)
    theirs.crop(-removed)
    assert ours.get_seq_length() == 120 - removed
    close(steps(model, ours, more.split((12, *[1] * 8), 1)), steps(plain, theirs, more.split((12, *[1] * 8), 1)))
    assert ours.layers[0].positions().equal(torch.arange(140 - removed).expand(2, 2, 140 - removed))


def test_crop_is_refused(model):
    for options, what in (({"budget": 50}, "tokens were dropped"), ({"dtype": "int8"}, "pages were packed into int8 or int4")):
        own = cache(model, **options)
        steps(model, own, [tokens(1, 80)])
        assert not own.is_croppable
        with pytest.raises(RuntimeError, match=what):
            own.crop(-1)
        own.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative, got 5"):
        own.layers[0].crop(5)


def test_rows_of_the_batch(model, plain):
    ids, more = tokens(3, 60), tokens(4, 25)
    ours, theirs = cache(model), DynamicCache(config=plain.config)
    for own, one in ((ours, model), (theirs, plain)):
        steps(one, own, ids.split((50, *[1] * 10), 1))
        own.reorder_cache(torch.tensor([2, 0, 0]))
        own.batch_repeat_interleave(2)
        own.batch_select_indices(torch.tensor([0, 1, 3, 5]))
    assert ours.batch_size == 4
    close(steps(model, ours, more.split(1, 1)), steps(plain, theirs, more.split(1, 1)))


# ----------------------------------------------------------------------------------------------------------------------------- other caches


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_other_caches_and_layers(name):
    """Under this attention implementation transformers' caches work as ever, and layers with a window keep theirs."""
    ours, theirs = make(name), make(name, "eager")
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    parts = ids.split((40, 10, *[1] * 20), 1)
    expected = steps(theirs, DynamicCache(config=theirs.config), parts, mask)
    close(steps(ours, DynamicCache(config=ours.config), parts, mask)[mask.bool()], expected[mask.bool()])
    own = cache(ours)
    close(steps(ours, own, parts, mask)[mask.bool()], expected[mask.bool()])
    if name != "llama":
        assert sorted(type(layer).__name__ for layer in own.layers) == ["DynamicSlidingWindowLayer", "KVCrushLayer"]
    static = StaticCache(config=ours.config, max_cache_len=80)
    close(steps(ours, static, parts[:1], mask)[mask[:, :40].bool()], expected[:, :40][mask[:, :40].bool()])
    with torch.no_grad():
        close(ours(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected[mask.bool()])
    assert own.nbytes > 0


def test_gradients_without_a_cache(model, plain):
    ids = tokens(1, 20)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    close(loss, plain(ids, labels=ids, use_cache=False).loss)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.zero_grad()


def test_inference_mode(model):
    """What one mode wrote, the other goes on with."""
    ids = tokens(1, 120)
    own, other = cache(model, budget=50), cache(model, budget=50)
    with torch.inference_mode():
        first = steps(model, own, ids[:, :80].split((70, *[1] * 10), 1)).clone()
        copied = copy.deepcopy(own)
    rest = steps(model, own, ids[:, 80:].split(1, 1))
    close(torch.cat([first, rest], 1), steps(model, other, ids.split((70, *[1] * 50), 1)))
    close(steps(model, copied, ids[:, 80:].split(1, 1)), rest)


def test_threads_do_not_matter(model):
    ids = tokens(2, 200).split((180, *[1] * 20), 1)
    logits = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        logits.append(steps(model, cache(model, budget=60), ids))
    close(logits[0], logits[1], 1e-6)


# --------------------------------------------------------------------------------------------------------------------------------- compiled


def test_compiled(model):
    """One graph for prompts and one for decoding, whatever the cache; nothing falls back to Python."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    for mask in (None, torch.cat([torch.zeros(2, 9), torch.ones(2, 117)], 1).long()):
        parts = tokens(2, 126).split((100, *[1] * 26), 1)
        for _ in range(2):
            ours, theirs = cache(model, budget=60), cache(model, budget=60)
            a, b = steps(compiled, ours, parts, mask), steps(model, theirs, parts, mask)
            live = torch.ones(2, 126, dtype=torch.bool) if mask is None else mask.bool()
            close(a[live], b[live])
            assert ours.get_seq_length() == theirs.get_seq_length() == 126
            assert all(x.positions().equal(y.positions()) for x, y in zip(ours.layers, theirs.layers, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------------------------------- errors


def test_errors(model, plain):
    with pytest.raises(ValueError, match=f"must use the attention implementation {NAME}, got sdpa"), torch.no_grad():
        plain(tokens(1, 4), past_key_values=KVCrushCache(plain.config))
    odd = make(head_dim=24)
    with pytest.raises(ValueError, match="layer 0 must have keys and values of the same head dimension, a multiple of 16, got 24 and 24"):
        odd(tokens(1, 4), past_key_values=KVCrushCache(odd.config))
    with pytest.raises(RuntimeError, match="no gradients through a KVCrushCache"):
        model(tokens(1, 4), past_key_values=cache(model))
    window = transformers.MistralConfig(**SMALL, sliding_window=16)
    with pytest.raises(ValueError, match="must have a layer of full attention to compress, got DynamicSlidingWindowLayer only"):
        KVCrushCache(window)


def test_caches_of_other_models(model):
    other = make("llama-mha")
    with pytest.raises(ValueError, match=r"layer 0 must have 2 KV heads of dimension 32, .* got 4 of 16"), torch.no_grad():
        other(tokens(1, 4), past_key_values=cache(model))
    deeper = make(num_hidden_layers=3)
    with pytest.raises(ValueError, match="made for a model of 2 layers, got keys of layer 2"), torch.no_grad():
        deeper(tokens(1, 4), past_key_values=cache(model))
    own = cache(model)
    steps(model, own, [tokens(2, 10)])
    with pytest.raises(ValueError, match=r"layer 0 must get keys of batch 2 .* got batch 3"), torch.no_grad():
        model(tokens(3, 1), past_key_values=own)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "sliding_window"])
def test_what_cannot_be_served(model, name):
    with pytest.raises(ValueError, match=f"layer 0 cannot be compressed, since its attention has {name}"), torch.no_grad():
        model(tokens(1, 4), past_key_values=cache(model), **{name: torch.ones(4)})


def test_dropout(model):
    own = make(attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="layer 0 cannot be compressed, since its attention has dropout"), torch.no_grad():
        own(tokens(1, 4), past_key_values=cache(own))
