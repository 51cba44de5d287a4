"""A stack of layers of Llama 3.2 1B's shape with random weights, and what a prompt and some tokens after it cost there.

Needs torch and transformers only, so that an interpreter with other versions of them can run it, too.
"""

import contextlib
import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch

LAYERS, VOCABULARY = 2, 1024


def build() -> Any:
    """The model, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(model: Any, cache: Any, context: int, tokens: int, press: Any = contextlib.nullcontext) -> dict[str, Any]:
    """Times and memory of a prompt and of tokens after it.

    Args:
        model: what `build` makes.
        cache: for ``past_key_values``.
        context: tokens of the prompt.
        tokens: to decode, one by one.
        press: ``press(model)`` is a context in which the prompt runs.
    Returns:
        ``first_s``, ``gaps_s``, and in bytes, over what the process had before: ``peak`` while the prompt ran, ``kept`` after it.
    """
    ids = (torch.arange(context) * 7919 % VOCABULARY)[None]
    before = _settled()
    Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        start = time.perf_counter()
        with press(model):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = time.perf_counter() - start
        del out
        result = {"first_s": first, "peak": _status("VmHWM") - before, "kept": _settled() - before}
        gaps = []
        for _ in range(tokens):
            start = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            gaps.append(time.perf_counter() - start)
    return result | {"gaps_s": gaps}


def _settled() -> int:
    """Bytes of memory that the process has once what is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
