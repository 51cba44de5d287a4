"""What pruned keys and values do to SmolLM2-135M: perplexity, and a fact to be found again in a long text.

Prompts are read with dense attention; all that is scored comes afterwards, through `SparseKVCache`, eight tokens a step.
"""

import argparse
import json
import math
import os
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from torch_cpu_ext.core.progress import bar
from torch_cpu_ext.integrations import smollm2
from torch_cpu_ext.integrations.sparse_kv import NAME, SparseKVCache

SETTINGS = ((0.0, 0.0), (0.3, 0.3), (0.3, 0.5), (0.5, 0.5), (0.7, 0.7))  # sparsity of keys, of values
LENGTH, PROMPT, STEP, HAYSTACK = 2048, 256, 8, 1400
CITIES = ("Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Quito", "Riga", "Accra", "Hanoi", "Perth")


def sparse(model: Any, settings: tuple[float, float], prompt: DynamicCache) -> SparseKVCache:
    """A cache that holds what a dense one does."""
    cache = SparseKVCache(model.config, k_sparsity=settings[0], v_sparsity=settings[1])
    for i, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def read(model: Any, ids: Tensor) -> DynamicCache:
    """The dense cache of a prompt."""
    cache = DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache, logits_to_keep=1)
    return cache


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of more tokens, a few at a time."""
    return torch.cat([model(part, past_key_values=cache).logits[0].float() for part in ids[None].split(STEP, 1)])


def perplexity(model: Any, text: Tensor, settings: tuple[float, float], prompt: DynamicCache) -> float:
    """Of the tokens from `PROMPT` to `LENGTH`."""
    logits = feed(model, sparse(model, settings, prompt), text[PROMPT - 1 : LENGTH - 1])
    return math.exp(float(F.cross_entropy(logits, text[PROMPT:LENGTH])))


def needle(model: Any, settings: tuple[float, float], prompt: DynamicCache, question: Tensor, answer: Tensor) -> tuple[bool, float]:
    """Whether a fact is repeated word for word, and the log-probability of the right answer, a token."""
    cache = sparse(model, settings, prompt)
    logits = torch.cat([feed(model, cache, question)[-1:], feed(model, cache, answer)[:-1]])
    return logits.argmax(-1).equal(answer), float(F.log_softmax(logits, -1).gather(1, answer[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    as_json = parser.parse_args().json
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model("fp32")
    model.set_attn_implementation(NAME)
    text = torch.tensor(tokenizer(smollm2.text()[: LENGTH * 16])["input_ids"])
    results: dict[tuple[float, float], dict[str, float]] = {}
    with torch.inference_mode():
        prompt = read(model, text[: PROMPT - 1])
        for settings in bar(SETTINGS, "perplexity", "setting"):
            results[settings] = {
                "k_sparsity": settings[0],
                "v_sparsity": settings[1],
                "perplexity": round(perplexity(model, text, settings, prompt), 3),
                "needles_found": 0,
                "needle_log_probability": 0.0,
            }
        for i, city in enumerate(bar(CITIES, "needles", "needle")):
            number, at = str(1009 + 887 * i), 100 + 120 * i
            fact, question, answer = (
                torch.tensor(tokenizer(words)["input_ids"])
                for words in (f" The secret number of {city} is {number}.", f"\n\nThe secret number of {city} is", f" {number}")
            )
            prompt = read(model, torch.cat([text[:at], fact, text[at:HAYSTACK]]))
            for settings, result in results.items():
                found, score = needle(model, settings, prompt, question, answer)
                result["needles_found"] += found
                result["needle_log_probability"] = round(result["needle_log_probability"] + score / len(CITIES), 4)
    lines = [json.dumps(result) for result in results.values()]
    print("[\n  " + ",\n  ".join(lines) + "\n]" if as_json else "\n".join(lines))


if __name__ == "__main__":
    main()
