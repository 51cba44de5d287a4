"""One model in a process of its own, for `torch-cpu-ext demo llm`: so its peak memory is its own.

``python -m torch_cpu_ext.cli.llm_worker '{"model": "fp32" | "bf16" | "optimized" | "prepare", ...}'`` reads one JSON command a line from
stdin and answers with JSON lines on stdout, of which the last of each answer has the key ``result`` (or ``error``).
"""

import json
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..core import env

REST = "fp32"  # measured: torch's attention on one bf16 token is slow, and decoding with the rest in bf16 7 % slower than in fp32


def main() -> None:
    """Answers commands until stdin ends."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not land among the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        serve(settings, answer)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if env.flag("VERBOSE"):
            raise
        answer(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def serve(settings: dict[str, Any], answer: Callable[..., None]) -> None:
    """Loads the model, then answers ``generate`` and ``perplexity``."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    warnings.filterwarnings("ignore", module="transformers|gguf|huggingface_hub")

    import torch
    from transformers.utils import logging

    from torch_cpu_ext import SparseLinearConfig, report
    from torch_cpu_ext.integrations import smollm2

    logging.disable_progress_bar()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    config = SparseLinearConfig(dtype=settings["dtype"])
    if settings["model"] == "prepare":
        smollm2.load_optimized(config, REST)
        answer(result={})
        return
    optimized = settings["model"] == "optimized"
    tokenizer = smollm2.load_tokenizer()
    model = smollm2.load_optimized(config, REST) if optimized else smollm2.load_model(settings["model"])
    prompt = smollm2.chat(tokenizer, settings["prompt"])
    smollm2.generate(model, prompt, 4)
    answer(result={})

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "generate":
            shown = ""

            def show(tokens: list[int]) -> None:
                nonlocal shown
                text = smollm2.visible(tokenizer, tokens)
                answer(text=text[len(shown) :])
                shown = text

            run = smollm2.generate(model, prompt, command["tokens"], show if command["live"] else None)
            answer(result={"first_s": run.first_s, "gaps_s": run.gaps_s, "text": smollm2.visible(tokenizer, run.tokens)})
        elif command["do"] == "describe":  # before the perplexity, whose logits would count as the model's memory
            isas = sorted({row.isa for row in report(model).rows}) if optimized else [torch.backends.cpu.get_cpu_capability()]
            answer(
                result={
                    "weight_bytes": smollm2.weight_bytes(model),
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "isa": "+".join(isas),
                    "dtype": settings["dtype"] if optimized else settings["model"],
                    "threads": torch.get_num_threads(),
                }
            )
        else:
            answer(result={"perplexity": smollm2.perplexity(model, tokenizer)})


if __name__ == "__main__":
    main()
