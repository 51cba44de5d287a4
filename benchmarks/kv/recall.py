"""Associative recall for a model so small that a few minutes of training suffice: pairs of a key and a value, strewn over filler.

The task is multi-query associative recall (MQAR; Zoology, arXiv:2312.04927, section 3) with filler between the pairs. The model is an
ordinary `LlamaForCausalLM` of two layers with grouped-query attention; ``python benchmarks/kv/recall.py`` trains and keeps it.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpu_ext.core import env
from torch_cpu_ext.integrations.smollm2 import once

ASK, FILLER, KEYS, VALUES = 1, 30, 64, 64  # the token before the questions, and how many there are of each kind, in this order
FIRST_FILLER, FIRST_KEY, FIRST_VALUE = 2, 2 + FILLER, 2 + FILLER + KEYS
VOCABULARY = FIRST_VALUE + VALUES
VERSION = 1  # of the architecture and the schedule; a kept model of another version is not used
# length, pairs at least and at most, steps: short and dense first, where a model finds out in a moment how recall works
SCHEDULE = ((32, 2, 8, 400), (64, 4, 16, 200), (128, 4, 32, 150), (256, 8, 48, 150), (512, 8, 48, 150))
PAIRS = 32  # of a context in benchmarks/kv_cache.py
BATCH_TOKENS, RATE, QUESTIONS = 2048, 2e-3, 32


def sample(length: int, pairs: int, questions: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, and questions about them.

    Args:
        length: tokens of a context.
        pairs: how many keys a context has, each followed by its value; the rest is filler.
        questions: keys that are asked for, each a different one; at most ``pairs``.
        batch: how many contexts.
        generator: makes it repeatable.
    Returns:
        ``context`` (batch, length), ``keys`` and ``values`` (batch, questions); int64.
    """
    context = torch.randint(FIRST_FILLER, FIRST_KEY, (batch, length), generator=generator)
    rank = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    keys, values = rank + FIRST_KEY, torch.randint(FIRST_VALUE, VOCABULARY, (batch, pairs), generator=generator)
    # Places of the pairs: a choice of `pairs` out of length - pairs places, each of which a pair then makes one longer.
    places = torch.rand(batch, length - pairs, generator=generator).argsort(1)[:, :pairs].sort(1).values + torch.arange(pairs)
    context.scatter_(1, places, keys).scatter_(1, places + 1, values)
    asked = torch.rand(batch, pairs, generator=generator).argsort(1)[:, :questions]
    return context, keys.gather(1, asked), values.gather(1, asked)


def batches(length: int, least: int, most: int, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (batch, tokens) and targets, -100 where nothing is to be predicted, for one stage of the schedule."""
    for _ in range(steps):
        pairs = int(torch.randint(least, most + 1, (), generator=generator))
        questions = min(pairs, QUESTIONS)
        context, keys, values = sample(length, pairs, questions, BATCH_TOKENS // length, generator)
        asked = torch.stack([keys, values], 2).flatten(1)
        targets = torch.stack([values, torch.full_like(values, -100)], 2).flatten(1)  # a value is predicted where its key stands
        ask = torch.full((len(context), 1), ASK)
        yield torch.cat([context, ask, asked], 1), F.pad(targets, (length + 1, 0), value=-100)


def build() -> Any:
    """The model, untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow rotations, which content can be matched by
        tie_word_embeddings=False,
        initializer_range=0.08,  # the default leaves attention of so narrow a model without contrast
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # queries of the second layer look for the keys in whose basis `train` asks the first to name the token before
        model.model.embed_tokens.weight.mul_(4)  # a token is not to drown in what says which came before it
        attention = model.model.layers[1].self_attn
        key = attention.k_proj.weight.unflatten(0, (4, 32)).repeat_interleave(2, 0).flatten(0, 1)
        attention.q_proj.weight.copy_(key @ basis())
    return model


def basis() -> Tensor:
    """A random rotation of the residual stream: where the first layer puts the token before, apart from the token itself."""
    return torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))).Q


def train(log: Any = None) -> Any:
    """The model after the schedule; some minutes on two cores."""
    model, generator = build().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    turn = basis()
    total, done, start = sum(stage[3] for stage in SCHEDULE), 0, time.perf_counter()
    for length, least, most, steps in SCHEDULE:
        for inputs, targets in batches(length, least, most, steps, generator):
            done += 1
            rate = RATE * min(1, done / 50) * min(1, (total - done + 1) / (0.2 * total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            states = model.model(inputs, use_cache=False, output_hidden_states=True).hidden_states
            logits, wanted = model.lm_head(states[-1][targets != -100]), targets[targets != -100]
            loss = F.cross_entropy(logits, wanted)
            # Recall is built on a head that looks one token back. Asked for by itself, it is there in a moment; else it takes hours.
            back = F.cross_entropy((states[1][:, 1:] @ turn @ model.model.embed_tokens.weight.T).flatten(0, 1), inputs[:, :-1].flatten())
            optimizer.zero_grad()
            (loss + back.clamp_min(0.5)).backward()  # no further than that: nor is that to outgrow the token
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if log and done % 25 == 0:
                right = float((logits.argmax(-1) == wanted).float().mean())
                log(f"step {done}, length {length}: loss {loss.item():.3f}, recall {right:.1%}, {time.perf_counter() - start:.0f} s")
    return model.eval()


def load(log: Any = None) -> Any:
    """The trained model; the first call trains it."""
    from transformers import LlamaForCausalLM

    def make(target: Any) -> None:
        train(log).save_pretrained(target)

    path = once(env.cache_dir() / "models" / f"recall-{VERSION}", "training a model of associative recall", make)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


if __name__ == "__main__":
    load(lambda line: print(line, file=sys.stderr, flush=True))
