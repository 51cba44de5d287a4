"""A whole language model, SmolLM2-135M: prefill of 128 tokens and greedy decoding of 64, through ``model.generate``.

All models are loaded at once and generate in turns. "Compiled" is ``torch.compile(model.forward)`` with a static cache;
``max-autotune`` and freezing, tried in turn with the default, made no difference to the Hugging Face model.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch

from torch_cpu_ext import SparseLinearConfig
from torch_cpu_ext.core.progress import bar
from torch_cpu_ext.integrations import smollm2

from common import Row, Seconds, main, row, seconds

PROMPT, NEW = 128, 64
EAGER: dict[str, Callable[[], Any]] = {
    "HF eager fp32": lambda: smollm2.load_model("fp32"),
    "HF eager bf16": lambda: smollm2.load_model("bf16"),
    "ours eager int8": lambda: smollm2.load_optimized(SparseLinearConfig(dtype="int8")),
    "ours eager bf16": lambda: smollm2.load_optimized(SparseLinearConfig(dtype="bf16")),
}
COMPILED: dict[str, Callable[[], Any]] = {
    "HF compiled bf16": lambda: smollm2.load_model("bf16"),
    "ours compiled int8": lambda: smollm2.load_optimized(SparseLinearConfig(dtype="int8")),
}


def measure(quick: bool) -> dict[str, tuple[Seconds, Seconds]]:
    """Time to first token and time of a further token, of each model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = smollm2.load_tokenizer()
    text = smollm2.text()
    prompt = tokenizer(text[: PROMPT * 16], return_tensors="pt")["input_ids"][:, :PROMPT]
    makers = EAGER if quick else {**EAGER, **COMPILED}
    models = {name: make() for name, make in makers.items()}
    options = {name: {} if name in EAGER else {"cache_implementation": "static"} for name in models}
    for name, model in bar(models.items(), "warming up", "model"):
        if name in COMPILED:
            model.forward = torch.compile(model.forward)
        for _ in range(1 if name in EAGER else 2):
            smollm2.generate(model, prompt, 8 if name in EAGER else NEW, **options[name])
    first: dict[str, list[float]] = {name: [] for name in models}
    gaps: dict[str, list[float]] = {name: [] for name in models}
    for _ in bar(range(2 if quick else 9), "generating in turns", "round"):
        for name, model in models.items():
            run = smollm2.generate(model, prompt, NEW, **options[name])
            first[name].append(run.first_s)
            gaps[name] += run.gaps_s
    return {name: (seconds(first[name]), seconds(gaps[name])) for name in models}


def rows(quick: bool) -> Iterator[Row]:
    measured = measure(quick)
    for phase, index in (("decode, a token", 1), (f"prefill, {PROMPT} tokens", 0)):
        for ours in (name for name in measured if name.startswith("ours")):
            for peer in (name for name in measured if name.startswith("HF")):
                times = measured[ours][index], measured[peer][index]
                config: dict[str, Any] = {"model": "SmolLM2-135M", "prompt": PROMPT, "new_tokens": NEW}
                if index:
                    config |= {"ours_tokens_per_s": round(1 / times[0], 2), "peer_tokens_per_s": round(1 / times[1], 2)}
                yield row(f"{phase}: {ours}", times[0], peer, times[1], config)


def bars() -> dict[str, float]:
    decode = {name: float(times[1]) for name, times in measure(quick=False).items()}
    best = {side: min(time for name, time in decode.items() if name.startswith(side)) for side in ("ours", "HF")}
    return {"SmolLM2-135M decode tokens/s, best of ours / best of Hugging Face": best["HF"] / best["ours"]}


if __name__ == "__main__":
    main(rows, bars)
