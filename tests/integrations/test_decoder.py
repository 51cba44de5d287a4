"""Fused decoding through transformers' own calls, against the same packed model layer by layer."""

import copy
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce

pytest.importorskip("transformers")
import transformers
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from torch_cpu_ext.integrations import decoder
from torch_cpu_ext.integrations.decoder import FusedDecoder, StoreLayer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "vocab_size": 128, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama-biases": ("LlamaForCausalLM", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaForCausalLM",
        SMALL
        | {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            }
        },
    ),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", SMALL | {"sliding_window": 7, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {k: v for k, v in SMALL.items() if k != "head_dim"} | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", SMALL),
    "gemma": ("GemmaForCausalLM", SMALL | {"head_dim": 32}),
    "gemma2": (
        "Gemma2ForCausalLM",  # caps that bend the scores and logits of so small a model
        SMALL
        | {"head_dim": 32, "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        SMALL
        | {"num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 0.5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "final_logit_softcapping": 3.0}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            }
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", SMALL | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {k: v for k, v in SMALL.items() if k != "head_dim"} | {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "olmo2": ("Olmo2ForCausalLM", {k: v for k, v in SMALL.items() if k != "head_dim"}),
}


class RoundedLayer(DynamicLayer):
    """Keys and values in bfloat16 as the fused decoder has them: those of a long call are rounded once it is over."""

    def update(self, key_states, value_states, *args, **kwargs):
        short = key_states.shape[0] * key_states.shape[2] <= 8
        before = (self.keys, self.values) if self.is_initialized else (key_states[:, :, :0], value_states[:, :, :0])
        rounded = [states.bfloat16().to(states.dtype) for states in (key_states, value_states)]
        self.is_initialized = True
        self.keys, self.values = (torch.cat(pair, -2) for pair in zip(before, rounded, strict=True))
        return tuple(torch.cat(pair, -2) for pair in zip(before, rounded if short else (key_states, value_states), strict=True))


def rounded_cache(model):
    cache = DynamicCache()
    cache.layers = [RoundedLayer() for _ in model.model.layers]
    return cache


# Keys and values are rounded to bfloat16, 2^-9 of their size, and what is quantised after it may get another code: the share of the largest
# logit that a logit may be off.
TOLERANCE = 0.02
PROMPTS = {"short": torch.tensor([[1, 5, 9, 2]]), "long": torch.arange(1, 22)[None] * 5 % 128}


def make(name="llama", fuse=True, dtype="fp32", **changes):
    """A packed model with random weights; two calls give the same weights."""
    class_name, arguments = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(3)
    model = cls(cls.config_class(**(arguments | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return tce.optimize(model, tce.SparseLinearConfig(dtype=dtype, fuse=fuse))


@pytest.fixture
def pair():
    return make(), make(fuse=False)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what ran in one op."""
    seen = []

    def spy(hidden, *args, **kwargs):
        seen.append(tuple(hidden.shape[:2]))
        return original(hidden, *args, **kwargs)

    original = decoder.decode
    monkeypatch.setattr(decoder, "decode", spy)
    return seen


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    limit = tolerance * b.float().abs().max()
    error = (a.float() - b.float()).abs().max()
    assert error <= limit, f"off by {error}, the limit is {limit}"


def logits(model, ids, cache=None, **arguments):
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True, **arguments)


def generate(model, prompt, **arguments):
    return model.generate(prompt, **({"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | arguments))


def agree(ours, theirs, reference, prompt_length, **inputs):
    """Equal tokens; where two differ, the reference must have had a near tie there."""
    for row, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=True)):
        for at, (x, y) in enumerate(zip(a, b, strict=False)):
            if x == y:
                continue
            assert at >= prompt_length
            scores = logits(reference, theirs[row : row + 1, :at], DynamicCache(), **inputs).logits[0, -1]
            assert (scores[y] - scores[x]).abs() <= 2 * TOLERANCE * scores.abs().max(), f"row {row}, token {at}: {x} for {y}"
            break


# Against a plain model whose cache is rounded likewise: only the order of sums differs, and what becomes another code or bfloat16 by it.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.002), ("int8", 0.03)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_step(name, dtype, tolerance, calls):
    """One token at a time, several, and past the end of windows and blocks."""
    ours, theirs = make(name, dtype=dtype), make(name, False, dtype=dtype)
    assert type(ours.model) is FusedDecoder
    assert type(theirs.model) is not FusedDecoder
    ids = torch.randint(1, 128, (2, 60))
    for steps in ([1] * 20, [4, 1, 3, 2, 4, 4, 1], [20, 1, 1, 4, 12, 1, 1, 3], [40, 1, 1]):
        a, b, at = DynamicCache(config=ours.config), rounded_cache(theirs), 0
        del calls[:]
        for n in steps:
            close(logits(ours, ids[:, at : at + n], a).logits, logits(theirs, ids[:, at : at + n], b).logits, tolerance)
            at += n
        assert calls == [(2, n) for n in steps if 2 * n <= 8]
        assert a.get_seq_length() == at


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy(name, prompt, calls):
    ours, theirs = make(name), make(name, False)
    a, b = generate(ours, PROMPTS[prompt]), generate(theirs, PROMPTS[prompt])
    agree(a, b, theirs, PROMPTS[prompt].shape[1])
    assert len(calls) == 19 + (prompt == "short")


SAMPLING = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams that return all": {"num_beams": 3, "num_return_sequences": 3},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 4},
    "penalty": {"repetition_penalty": 1.3},
    "chunked prefill": {"prefill_chunk_size": 6},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "two rounds of beams": {"num_beams": 4, "do_sample": True},
}


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_ways_to_generate(pair, kind, prompt, calls):
    """The scores of the first steps, since a near tie in the choice parts the ways."""
    results = []
    for model in pair:
        torch.manual_seed(5)
        results.append(
            generate(model, PROMPTS[prompt], max_new_tokens=8, return_dict_in_generate=True, output_logits=True, **SAMPLING[kind])
        )
    assert calls
    ours, theirs = results
    start = PROMPTS[prompt].shape[1]
    if kind in ("chunked prefill", "prompt lookup"):
        agree(ours.sequences, theirs.sequences, pair[1], start)
        return
    close(ours.logits[0], theirs.logits[0])
    if "num_beams" in SAMPLING[kind]:  # whose rows change places: equal results, or none that is much better
        assert ours.sequences.equal(theirs.sequences) or SAMPLING[kind].get("do_sample")
        return
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        same = (ours.sequences[:, : start + step] == theirs.sequences[:, : start + step]).all(1)
        if same.any():
            close(a[same], b[same])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "gemma2", "gemma3", "smollm3", "olmo2"])
def test_left_padding(name, calls):
    ours, theirs = make(name), make(name, False)
    ids = torch.randint(1, 128, (3, 12))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, :padding] = 0
    a, b = (generate(m, ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True) for m in (ours, theirs))
    assert calls == [(3, 1)] * 19
    for row in range(3):
        for step, (x, y) in enumerate(zip(a.logits, b.logits, strict=True)):
            close(x[row], y[row])
            if a.sequences[row, 12 + step] != b.sequences[row, 12 + step]:
                break


def test_padding_inside_of_the_text_falls_back(pair, calls):
    mask = torch.ones(1, 5, dtype=torch.long)
    mask[0, 2] = 0
    a, b = (logits(m, torch.tensor([[3, 4, 5, 6, 7]]), DynamicCache(), attention_mask=mask).logits for m in pair)
    assert not calls
    close(a, b)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3", "olmo2"])
def test_chunked_prefill(name, calls):
    """Past the windows, in chunks of as many tokens as one call takes, and of more."""
    ours, theirs = make(name), make(name, False)
    for size in (6, 8, 13):
        del calls[:]
        a, b = (generate(m, PROMPTS["long"], prefill_chunk_size=size) for m in (ours, theirs))
        agree(a, b, theirs, 21)
        assert calls


@pytest.mark.parametrize("prompt", PROMPTS)
def test_assisted(pair, prompt, calls):
    ours, theirs = pair
    helper = make(num_hidden_layers=1)
    for assistant in (helper, make()):
        a = generate(ours, PROMPTS[prompt], assistant_model=assistant)
        agree(a, generate(theirs, PROMPTS[prompt]), theirs, PROMPTS[prompt].shape[1])
    assert calls


def test_assisted_by_its_own_first_layers(pair, calls):
    """Which sets ``config.num_hidden_layers`` for a while."""
    ours, theirs = pair
    a = generate(ours, PROMPTS["long"], assistant_early_exit=1)
    agree(a, generate(theirs, PROMPTS["long"]), theirs, 21)
    cache = DynamicCache()
    ours.config.num_hidden_layers = 1
    theirs.config.num_hidden_layers = 1
    del calls[:]
    close(logits(ours, PROMPTS["short"], cache).logits, logits(theirs, PROMPTS["short"], DynamicCache()).logits)
    assert not calls


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3"])
def test_a_prefix_is_computed_once(name):
    ours, theirs = make(name), make(name, False)
    prefix, ends = torch.randint(1, 128, (1, 17)), [torch.randint(1, 128, (1, n)) for n in (1, 4, 11)]
    caches = []
    for model in (ours, theirs):
        cache = DynamicCache(config=model.config)
        logits(model, prefix, cache)
        caches.append(cache)
    for end in ends:
        a, b = (logits(m, end, copy.deepcopy(c)).logits for m, c in zip((ours, theirs), caches, strict=True))
        close(a, b)
        whole = torch.cat([prefix, end], 1)
        results = [generate(m, whole, past_key_values=copy.deepcopy(c)) for m, c in zip((ours, theirs), caches, strict=True)]
        agree(*results, theirs, whole.shape[1])
        assert caches[0].get_seq_length() == 17


def test_crop_and_continue(pair):
    ids, caches = torch.randint(1, 128, (2, 40)), (DynamicCache(), DynamicCache())
    for model, cache in zip(pair, caches, strict=True):
        logits(model, ids[:, :21], cache)
        for t in range(21, 30):
            logits(model, ids[:, t : t + 1], cache)
        cache.crop(-13)
        assert cache.get_seq_length() == 17
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
    for t in range(30, 40):
        close(*(logits(m, ids[:, t : t + 1], c).logits for m, c in zip(pair, caches, strict=True)))
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert type(layer) is StoreLayer
        close(layer.keys, other.keys)
        close(layer.values, other.values)
    for cache in caches:
        cache.crop(-100)
        assert cache.get_seq_length() == 0


def test_rows_of_a_cache(pair):
    ids = torch.randint(1, 128, (2, 12))
    caches = (DynamicCache(), DynamicCache())
    for model, cache in zip(pair, caches, strict=True):
        logits(model, ids, cache)
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].keys.shape[0] == 4
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.reorder_cache(torch.tensor([2, 1, 0]))
    token = torch.tensor([[5], [6], [7]])
    close(*(logits(m, token, c).logits for m, c in zip(pair, caches, strict=True)))
    for model, cache in zip(pair, caches, strict=True):
        cache.reset()
        assert cache.get_seq_length() == 0
        logits(model, ids[:1], cache)
    close(*(logits(m, token[:1], c).logits for m, c in zip(pair, caches, strict=True)))


def test_a_cache_of_another_batch_is_refused(pair):
    cache = DynamicCache()
    logits(pair[0], torch.ones(2, 3, dtype=torch.long), cache)
    with pytest.raises((ValueError, RuntimeError), match=r"holds 2 rows, got 1"):
        logits(pair[0], torch.ones(1, 1, dtype=torch.long), cache)


def test_continue_from_a_returned_cache(pair):
    results = []
    for model in pair:
        first = generate(model, PROMPTS["long"], max_new_tokens=5, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        results.append(generate(model, ids, past_key_values=first.past_key_values, max_new_tokens=6))
    agree(*results, pair[1], 21)


def test_a_cache_that_the_plain_model_filled(pair, calls):
    ours, theirs = pair
    cache = DynamicCache()
    logits(theirs, PROMPTS["long"], cache)
    other = copy.deepcopy(cache)
    token = torch.tensor([[3]])
    close(logits(ours, token, cache).logits, logits(theirs, token, other).logits)
    assert calls == [(1, 1)]
    close(logits(theirs, token, cache).logits, logits(theirs, token, other).logits)  # and back


@pytest.mark.parametrize("make_cache", [lambda c: StaticCache(config=c, max_cache_len=64)])
def test_other_caches_fall_back(pair, make_cache, calls):
    a, b = (logits(m, PROMPTS["short"], make_cache(m.config)).logits for m in pair)
    close(a, b)
    results = [generate(m, PROMPTS["long"], cache_implementation="static", disable_compile=True) for m in pair]
    agree(*results, pair[1], 21)
    assert not calls


def test_streamer_and_stopping(pair):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    streamer = Streamer()
    out = generate(pair[0], PROMPTS["short"], streamer=streamer, stopping_criteria=StoppingCriteriaList([Third()]))
    assert out.shape == (1, 7)
    assert streamer.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("kind", ["output_hidden_states", "output_attentions"])
def test_hidden_states_and_attentions_fall_back(pair, kind, where, calls):
    results = []
    for model in pair:
        model.set_attn_implementation("eager")
        if where == "config":
            setattr(model.config, kind, True)
        results.append(logits(model, PROMPTS["short"], DynamicCache(), **({kind: True} if where == "argument" else {})))
        if where == "config":
            setattr(model.config, kind, False)
    ours, theirs = (getattr(r, kind.removeprefix("output_")) for r in results)
    assert len(ours) == len(theirs) >= 2
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    assert not calls
    logits(pair[0], PROMPTS["short"], DynamicCache())  # the hooks that transformers leaves behind hinder nobody
    assert calls == [(1, 4)]
    a = generate(pair[0], PROMPTS["short"], return_dict_in_generate=True, **{kind: True})
    assert len(getattr(a, kind.removeprefix("output_"))) == 20


def test_embeddings_as_input(pair, calls):
    embeddings = torch.randn(1, 3, 64)
    a, b = (logits(m, None, DynamicCache(), inputs_embeds=embeddings).logits for m in pair)
    close(a, b)
    assert calls == [(1, 3)]
    results = [generate(m, None, inputs_embeds=embeddings) for m in pair]
    assert results[0][0, :3].equal(results[1][0, :3])
    for model in pair:
        with pytest.raises(ValueError, match="exactly one"):
            logits(model, PROMPTS["short"], DynamicCache(), inputs_embeds=embeddings)


def test_training_and_gradients_fall_back(pair, calls):
    ours, theirs = pair
    a, b = ours(PROMPTS["short"], past_key_values=DynamicCache()).logits, theirs(PROMPTS["short"], past_key_values=DynamicCache()).logits
    close(a, b)
    a.sum().backward()
    assert ours.model.embed_tokens.weight.grad is not None
    ours.train()
    assert ours.model.layers[0].training
    assert ours.model.original().training
    logits(ours, PROMPTS["short"], DynamicCache())
    assert not calls
    ours.eval()
    logits(ours, PROMPTS["short"], DynamicCache())
    assert len(calls) == 1


PLACES = [
    "",
    "layers.0",
    "layers.1.self_attn",
    "layers.0.self_attn.q_proj",
    "layers.1.mlp",
    "norm",
    "layers.1.input_layernorm",
    "rotary_emb",
]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", PLACES)
def test_hooks_run(pair, name, kind, calls):
    """On a layer inside, or the stack itself; and they are left out once removed. The prompt is short: nothing else falls back."""
    ours = pair[0]
    generate(ours, PROMPTS["short"], max_new_tokens=2)
    seen = []
    handle = getattr(ours.model.get_submodule(name), kind)(lambda *args: seen.append(1))
    del calls[:]
    generate(ours, PROMPTS["short"], max_new_tokens=3)
    assert len(seen) >= 1 if name == "rotary_emb" else len(seen) == 3
    if name:
        assert not calls
    handle.remove()
    generate(ours, PROMPTS["short"], max_new_tokens=3)
    assert len(calls) == (3 if name else 6)


def test_a_hook_of_the_stack_before_optimize(calls):
    model = make(fuse=False)
    seen = []
    model.model.register_forward_hook(lambda *args: seen.append(1))
    tce.optimize(model, tce.SparseLinearConfig())
    generate(model, PROMPTS["short"], max_new_tokens=3)
    assert len(seen) == 3


def test_a_forward_of_its_own(pair, calls):
    """As accelerate and others put one into a module."""
    ours = pair[0]
    attention, seen = ours.model.layers[0].self_attn, []
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (seen.append(1), plain(*args, **kwargs))[1]
    generate(ours, PROMPTS["short"], max_new_tokens=3)
    assert len(seen) == 3


class Adapted(nn.Module):
    """A low-rank addition beside a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.delta(x)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["layers.0.self_attn.v_proj", "layers.1.mlp.down_proj", "layers.1", "norm", "layers.0.input_layernorm"])
def test_a_module_inside_is_replaced(pair, name, prompt, calls):
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, *args, **kwargs):
            return 2 * self.base(*args, **kwargs)

    results = []
    for model in pair:
        generate(model, PROMPTS[prompt], max_new_tokens=3)
        holder, _, leaf = name.rpartition(".")
        base = model.model.get_submodule(name)
        torch.manual_seed(4)
        replacement = Adapted(base) if isinstance(base, tce.SparseLinear) else Doubled(base)
        setattr(model.model.get_submodule(holder), leaf, replacement)
    del calls[:]
    close(*(logits(m, PROMPTS[prompt], DynamicCache()).logits for m in pair))
    results = [generate(m, PROMPTS[prompt], max_new_tokens=6) for m in pair]
    agree(*results, pair[1], PROMPTS[prompt].shape[1])
    assert not calls
    holder, _, leaf = name.rpartition(".")
    setattr(pair[0].model.get_submodule(holder), leaf, pair[0].model.get_submodule(name).base)
    generate(pair[0], PROMPTS[prompt], max_new_tokens=6)
    assert calls


def change_norms(model):
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(2)
        model.model.norm.weight.mul_(-0.5)


def load_others(model):
    torch.manual_seed(8)
    state = {k: v if k.endswith("packed") else v + torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, tce.SparseLinear):
            del state[f"{name}.packed"]
            state[f"{name}.weight"] = torch.randn(module.out_features, module.in_features) / 8
    model.load_state_dict(state)


CHANGES = {
    "norms": change_norms,
    "load_state_dict": load_others,
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "there and back": lambda m: m.to(torch.bfloat16).float(),
    "fewer layers": lambda m: (setattr(m.model, "layers", m.model.layers[:1]), setattr(m.config, "num_hidden_layers", 1)),
    "a new norm": lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.rand(64, generator=torch.Generator().manual_seed(1)))),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(pair, change, prompt, calls):
    """Even if no call ever was long enough for the original's code."""
    for model in pair:
        generate(model, PROMPTS[prompt], max_new_tokens=3)
        CHANGES[change](model)
    del calls[:]
    caches = DynamicCache(), DynamicCache()
    for ids in (PROMPTS[prompt], torch.tensor([[4]]), torch.tensor([[9]])):
        close(*(logits(m, ids, c).logits for m, c in zip(pair, caches, strict=True)))
    assert len(calls) == 2 + (prompt == "short")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_change_between_two_tokens_of_a_long_text(pair, prompt):
    caches = DynamicCache(), DynamicCache()
    for model, cache in zip(pair, caches, strict=True):
        logits(model, PROMPTS[prompt], cache)
        logits(model, torch.tensor([[4]]), cache)
        load_others(model)
    close(*(logits(m, torch.tensor([[4]]), c).logits for m, c in zip(pair, caches, strict=True)))


def via_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, via_pickle])
def test_copies_stand_alone(pair, copier, ran, calls):
    ours, theirs = pair
    before = generate(ours, PROMPTS["short"]) if ran else None
    other = copier(ours)
    assert type(other.model) is FusedDecoder
    assert other.model.layers is other.model.original().layers
    assert other.model.layers is not ours.model.layers
    del calls[:]
    again = generate(other, PROMPTS["short"])
    assert calls
    for parameter in other.parameters():
        parameter.data.zero_()
    assert generate(ours, PROMPTS["short"]).equal(again)
    if ran:
        assert again.equal(before)
    agree(again, generate(theirs, PROMPTS["short"]), theirs, 4)


def test_checkpoint(pair, tmp_path, calls):
    ours = pair[0]
    expected = generate(ours, PROMPTS["short"])
    tce.save_checkpoint(ours, tmp_path / "model.safetensors")
    cls = type(ours)
    with torch.device("meta"):
        empty = cls(ours.config)
    empty.model.rotary_emb = copy.deepcopy(ours.model.rotary_emb)  # its buffers are not part of a checkpoint
    loaded = tce.load_checkpoint(empty.eval(), tmp_path / "model.safetensors")
    assert type(loaded.model) is FusedDecoder
    del calls[:]
    assert generate(loaded, PROMPTS["short"]).equal(expected)
    assert calls
    plain = cls(ours.config)
    assert plain.state_dict().keys() == tce.restore(loaded).state_dict().keys()


def test_restore_and_again(pair, calls):
    ours, theirs = pair
    expected = generate(ours, PROMPTS["short"])
    original = ours.model.original()
    tce.optimize(ours, tce.SparseLinearConfig(dtype="fp32"))  # nothing is left to do
    assert ours.model.original() is original
    assert sum(row.kind == "fused decoder" for row in tce.report(ours).rows) == 1
    tce.restore(ours)
    assert ours.model is original
    assert not any(isinstance(module, tce.SparseLinear | FusedDecoder) for module in ours.modules())
    del calls[:]
    agree(generate(ours, PROMPTS["short"]), expected, theirs, 4)
    assert not calls
    tce.optimize(ours, tce.SparseLinearConfig(dtype="fp32"))
    assert generate(ours, PROMPTS["short"]).equal(expected)
    assert calls


def test_packed_in_two_steps(calls):
    model = make(fuse=False)
    tce.restore(model)
    tce.optimize(model, tce.SparseLinearConfig(), include="mlp")
    assert "layers.0.self_attn.q_proj is not packed" in tce.report(model).kept["model"]
    tce.optimize(model, tce.SparseLinearConfig(dtype="int4"))
    assert "model" not in tce.report(model).kept
    generate(model, PROMPTS["short"])
    assert calls


REASONS = {
    "its rotary embedding is dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}},
        {},
    ),
    "its heads have 24 elements, not a multiple of 16": ({"head_dim": 24}, {}),
    "its activation is relu": ({"hidden_act": "relu"}, {}),
    r"layers.0.self_attn.q_proj has activation_group 64, not 32": ({}, {"activation_group": 64}),
    "it has no layers": ({"num_hidden_layers": 0}, {}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_report_says_why_not(reason, calls):
    changes, config = REASONS[reason]
    class_name, arguments = MODELS["llama"]
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**(arguments | changes))).eval()
    tce.optimize(model, tce.SparseLinearConfig(**config))
    assert tce.report(model).kept["model"] == f"decodes layer by layer: {reason}"
    generate(model, PROMPTS["short"], max_new_tokens=3)
    assert not calls


OTHERS = {
    "Phi3ForCausalLM": r"its projections are fused \(qkv_proj, gate_up_proj\)",
}


@pytest.mark.parametrize("class_name", OTHERS)
def test_report_names_what_other_models_lack(class_name):
    cls = getattr(transformers, class_name)
    model = tce.optimize(cls(cls.config_class(**SMALL)).eval(), tce.SparseLinearConfig())
    assert re.match(f"decodes layer by layer: {OTHERS[class_name]}", tce.report(model).kept["model"])
    assert generate(model, PROMPTS["short"], max_new_tokens=3).shape == (1, 7)


def test_gemma_that_looks_both_ways():
    class_name, arguments = MODELS["gemma3"]
    cls = getattr(transformers, class_name)
    model = tce.optimize(cls(cls.config_class(**arguments, use_bidirectional_attention=True)).eval(), tce.SparseLinearConfig())
    assert tce.report(model).kept["model"] == "decodes layer by layer: its attention is bidirectional"


def test_report(pair):
    (row,) = [row for row in tce.report(pair[0]).rows if row.kind == "fused decoder"]
    assert (row.name, row.detail) == ("model", "2 layers in one call, up to 8 tokens")
    assert row.isa == tce.kernel_isa("sparse_linear", "decode")
    assert "fused decoder" in str(tce.report(pair[0]))
    assert tce.report(pair[1]).kept == {}


def test_compiled_models_run_the_layers(pair, calls):
    ours = pair[0]
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        out = compiled(PROMPTS["short"], past_key_values=DynamicCache()).logits
    assert not calls
    close(out, logits(pair[1], PROMPTS["short"], DynamicCache()).logits)
    torch._dynamo.reset()


def test_two_threads(pair):
    """On a fresh model, which both find unprepared; and one that outgrows its tables."""
    expected = [generate(make(), PROMPTS["short"] + i, max_new_tokens=12) for i in range(4)]
    for _ in range(3):
        model, start = make(), threading.Barrier(4)

        def run(i, model=model, start=start):
            start.wait()
            return generate(model, PROMPTS["short"] + i, max_new_tokens=12)

        with ThreadPoolExecutor(4) as pool:
            for a, b in zip(pool.map(run, range(4)), expected, strict=True):
                assert a.equal(b)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    model = make("qwen3", dtype="int8")
    torch.set_num_threads(1)
    expected = generate(model, PROMPTS["short"], return_dict_in_generate=True, output_logits=True)
    torch.set_num_threads(threads)
    again = generate(model, PROMPTS["short"], return_dict_in_generate=True, output_logits=True)
    assert all(a.equal(b) for a, b in zip(again.logits, expected.logits, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = make().to(dtype), make(fuse=False).to(dtype)
    caches = DynamicCache(), DynamicCache()
    for ids in (PROMPTS["long"], torch.tensor([[4]]), torch.tensor([[7, 8, 9]]), torch.tensor([[3]])):
        a, b = (logits(m, ids, c).logits for m, c in zip((ours, theirs), caches, strict=True))
        assert a.dtype == dtype
        close(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_beyond_the_tables(name):
    pair, positions = (make(name), make(name, False)), torch.tensor([[5000, 5001, 5002]])
    for model in pair:
        generate(model, PROMPTS["short"], max_new_tokens=2)
    close(*(logits(m, torch.tensor([[4, 5, 6]]), DynamicCache(), position_ids=positions).logits for m in pair))


def test_the_stack_alone(pair):
    """Called like transformers' own class, with and without a cache."""
    ours, theirs = pair[0].model, pair[1].model
    with torch.no_grad():
        for arguments in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}, {"return_dict": False}):
            a = ours(PROMPTS["short"], **arguments)
            b = theirs(PROMPTS["short"], **(arguments | ({"past_key_values": DynamicCache()} if "past_key_values" in arguments else {})))
            assert type(a) is type(b)
            close(a[0], b[0])
    assert ours.config is pair[0].config
    assert ours.get_input_embeddings() is pair[0].get_input_embeddings()
