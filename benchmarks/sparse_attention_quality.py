"""What pruned keys and values do to SmolLM2-135M: perplexity, and a fact to be found again in a long text.

Prompts are read with dense attention; all that is scored comes afterwards, through `SparseKVCache`, eight tokens a step or one.
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

from torch_cpu_ext.core.progress import bar
from torch_cpu_ext.integrations import smollm2
from torch_cpu_ext.integrations.sparse_kv import NAME, SparseKVCache

SETTINGS = ((0.0, 0.0), (0.3, 0.3), (0.3, 0.5), (0.5, 0.5), (0.7, 0.7))  # sparsity of keys, of values
LENGTH, PROMPT, WINDOWS, STEP = 2048, 256, 2, 8
CITIES = ("Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Quito", "Riga", "Accra", "Hanoi", "Perth")


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of more tokens, a few at a time."""
    return torch.cat([model(part, past_key_values=cache).logits[0].float() for part in ids[None].split(STEP, 1)])


def perplexity(model: Any, text: Tensor, settings: tuple[float, float], tail: int) -> float:
    """Of tokens `PROMPT` to `LENGTH` of each window."""
    total = 0.0
    for window in text[: WINDOWS * LENGTH].view(WINDOWS, LENGTH):
        cache = SparseKVCache(model.config, k_sparsity=settings[0], v_sparsity=settings[1], window=tail)
        model(window[None, : PROMPT - 1], past_key_values=cache, logits_to_keep=1)
        logits = feed(model, cache, window[PROMPT - 1 : -1])
        total += float(F.cross_entropy(logits, window[PROMPT:], reduction="sum"))
    return math.exp(total / (WINDOWS * (LENGTH - PROMPT)))


def needles(model: Any, tokenizer: Any, text: Tensor, settings: tuple[float, float], tail: int) -> tuple[float, float]:
    """Share of facts repeated word for word, and the mean log-probability of a digit of the right answer."""
    found, score, digits = 0, 0.0, 0
    for i, city in enumerate(CITIES):
        number = str(1009 + 887 * i)
        encode = lambda words: torch.tensor(tokenizer(words)["input_ids"])  # noqa: E731
        fact, question = encode(f" The secret number of {city} is {number}."), encode(f"\n\nThe secret number of {city} is")
        answer, at = encode(f" {number}"), 100 + 120 * i
        ids = torch.cat([text[:at], fact, text[at:1400], question])
        cache = SparseKVCache(model.config, k_sparsity=settings[0], v_sparsity=settings[1], window=tail)
        model(ids[None, : -len(question)], past_key_values=cache, logits_to_keep=1)
        logits = torch.cat([feed(model, cache, question)[-1:], feed(model, cache, answer)[:-1]])
        found += int(logits.argmax(-1).equal(answer))
        score += float(F.log_softmax(logits, -1).gather(1, answer[:, None]).sum())
        digits += len(answer)
    return found / len(CITIES), score / digits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    as_json = parser.parse_args().json
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model("fp32")
    model.set_attn_implementation(NAME)
    text = torch.tensor(tokenizer(smollm2.text()[: LENGTH * WINDOWS * 16])["input_ids"])
    results = []
    with torch.inference_mode():
        for tail, settings in bar([(tail, s) for tail in (128, 16) for s in SETTINGS], "measuring", "setting"):
            found, score = needles(model, tokenizer, text, settings, tail)
            results.append(
                {
                    "k_sparsity": settings[0],
                    "v_sparsity": settings[1],
                    "window": tail,
                    "perplexity": round(perplexity(model, text, settings, tail), 3),
                    "needles_found": found,
                    "needle_log_probability": round(score, 3),
                }
            )
            if not as_json:
                print(results[-1], flush=True)
    if as_json:
        print("[\n  " + ",\n  ".join(json.dumps(r) for r in results) + "\n]")


if __name__ == "__main__":
    main()
