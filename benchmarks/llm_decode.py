"""Whole language models, SmolLM2-135M and a Llama of 1B parameters with random weights: greedy decoding, against every peer installed.

Each model lives in a process of its own, and they generate in turns: a prompt of 128 or 1024 tokens, then 32 tokens one by one, with one
thread and with two. What runs in PyTorch, ours included, runs through ``model.generate``. "Compiled" is ``torch.compile`` of the step of
one token with a static cache; the prompt runs uncompiled. `peers` has the settings of every peer.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import psutil
import torch

from torch_cpu_ext.core.progress import bar

from common import Row, Seconds, main, row, seconds
from peers import ALL, OURS, PEERS, Weights, skip
from peers.models import LLAMA_1B, SMOLLM2
from peers.workers import Worker, WorkerError

NEW = 32
CONTEXTS = {SMOLLM2: (128, 1024), LLAMA_1B: (128,)}
MEMORY = {SMOLLM2: 6 << 30, LLAMA_1B: 14 << 30}  # free bytes it takes to hold all processes, the largest while it packs
LARGE = ("ours eager int4", "ours eager int8", "ours eager int8 50 %", "ours eager bf16 50 %")
NAMES = {
    SMOLLM2: tuple(ALL),
    LLAMA_1B: (*(name for name in OURS if name in LARGE), "HF eager bf16", "llama.cpp Q4_1", "llama.cpp Q4_0"),
}
QUICK = (*(name for name in OURS if name.startswith("ours eager") and "%" not in name), "HF eager fp32", "HF eager bf16", "llama.cpp Q4_1")


@dataclass
class Measured:
    """What one runner gave with one number of threads."""

    weights: Weights
    perplexity: float | None = None
    first: dict[int, Seconds | None] = field(default_factory=dict)  # to the first token, by the length of the prompt
    step: dict[int, Seconds] = field(default_factory=dict)  # of a further token


def measure(
    model: str, names: Iterable[str], threads: int, contexts: Iterable[int], *, rounds: int = 5, quality: bool = True
) -> dict[str, Measured]:
    """The runners that are installed, in turns; what is not, or fails, is left out with a message."""
    if (free := psutil.virtual_memory().available) < MEMORY[model]:
        skip(model, f"needs {MEMORY[model] >> 30} GiB of free memory, there are {free / 2**30:.1f}")
        return {}
    workers: dict[str, Worker] = {}
    found: dict[str, Measured] = {}
    with ExitStack() as stack:
        for name in bar(tuple(names), f"{model}: loading and warming up", "model"):
            if missing := ALL[name].missing():
                skip(name, missing)
                continue
            worker = stack.enter_context(Worker(ALL[name], model, threads))
            try:
                worker.ask()
                found[name] = Measured(worker.ask("weights"), worker.ask("perplexity") if quality else None)
                for context in contexts:
                    worker.ask("prepare", context, NEW)
                workers[name] = worker
            except WorkerError as error:
                found.pop(name, None)
                worker.__exit__()
                skip(name, str(error))
        for context in contexts:
            runs: dict[str, list[Any]] = {name: [] for name in workers}
            for _ in bar(range(rounds), f"{model}: {context} tokens, in turns", "round"):
                for name, worker in workers.items():
                    runs[name].append(worker.ask("decode", context, NEW))
            for name, mine in runs.items():
                firsts = [run.first_s for run in mine if run.first_s is not None]
                found[name].first[context] = seconds(firsts) if firsts else None
                found[name].step[context] = seconds([gap for run in mine for gap in run.gaps_s])
    return found


def rows(quick: bool) -> Iterator[Row]:
    if quick:
        yield from compare(
            SMOLLM2, torch.get_num_threads(), measure(SMOLLM2, QUICK, torch.get_num_threads(), (128,), rounds=2, quality=False)
        )
        return
    for model, contexts in CONTEXTS.items():
        for threads in thread_counts():
            yield from compare(model, threads, measure(model, NAMES[model], threads, contexts))


def thread_counts() -> tuple[int, ...]:
    """1 and what PyTorch takes, or was told to take."""
    return tuple(sorted({1, torch.get_num_threads()}))


def compare(model: str, threads: int, measured: dict[str, Measured]) -> Iterator[Row]:
    """Rows of each of ours against each peer: decoding, then the prompt."""
    for phase in ("decode", "prefill"):
        for ours in (name for name in measured if name in OURS):
            for peer in (name for name in measured if name in PEERS):
                mine, theirs = measured[ours], measured[peer]
                for context in mine.step:
                    config = {"model": model, "ours": ours, "phase": phase, "prompt": context, "new_tokens": NEW, "threads": threads}
                    config |= _sizes("ours", mine) | _sizes("peer", theirs)
                    if phase == "prefill":
                        if (first := mine.first[context]) and (their_first := theirs.first[context]):
                            yield row(f"prefill, {context} tokens: {ours}", first, peer, their_first, config)
                        continue
                    times = mine.step[context], theirs.step[context]
                    config |= {"ours_tokens_per_s": round(1 / times[0], 2), "peer_tokens_per_s": round(1 / times[1], 2)}
                    yield row(f"decode, a token: {ours}", times[0], peer, times[1], config)


def _sizes(side: str, one: Measured) -> dict[str, Any]:
    values = {"bytes": one.weights.held, "bytes_read": one.weights.read, "perplexity": one.perplexity}
    return {f"{side}_{key}": round(value, 3) for key, value in values.items() if value is not None}


def bars() -> dict[str, float | None]:
    """What bars.toml promises; None for what a peer that is not installed keeps from being measured."""
    ours, rival = next(iter(OURS)), "llama.cpp Q4_1"  # int4: one variant has to be fast, small and accurate at once
    hf = [name for name in PEERS if name.startswith("HF")]
    torch_paths = [*hf, "torchao int8", "torchao int4"]
    one = measure(SMOLLM2, (ours, rival), 1, CONTEXTS[SMOLLM2], quality=False)
    two = measure(SMOLLM2, (*OURS, rival, *torch_paths), 2, CONTEXTS[SMOLLM2])
    large = [measure(LLAMA_1B, NAMES[LLAMA_1B], threads, CONTEXTS[LLAMA_1B]) for threads in (1, 2)]
    size = perplexity = None
    if ours in two and rival in two:
        mine, theirs = _sizes("ours", two[ours]), _sizes("peer", two[rival])
        size, perplexity = mine["ours_bytes_read"] / theirs["peer_bytes_read"], mine["ours_perplexity"] - theirs["peer_perplexity"]

    def least(name: str, peer: str) -> float | None:
        return min((ratio for found in large if (ratio := _times(found, (name,), (peer,), 128))), default=None)

    return {
        "SmolLM2-135M decode tokens/s, best of ours / best of Hugging Face": _times(two, OURS, hf, 128),
        "SmolLM2-135M bf16 at 50 %, times the best of PyTorch": _times(two, ("ours eager bf16 50 %",), torch_paths, 128),
        "SmolLM2-135M int8 at 50 %, times the best of PyTorch": _times(two, ("ours eager int8 50 %",), torch_paths, 128),
        "1B shape bf16 at 50 %, times Hugging Face bf16, the worse of 1 and 2 threads": least("ours eager bf16 50 %", "HF eager bf16"),
        "1B shape int8 at 50 %, times Hugging Face bf16, the worse of 1 and 2 threads": least("ours eager int8 50 %", "HF eager bf16"),
        "SmolLM2-135M int4 after 128 tokens, 1 thread, times llama.cpp Q4_1": _times(one, (ours,), (rival,), 128),
        "SmolLM2-135M int4 after 128 tokens, 2 threads, times llama.cpp Q4_1": _times(two, (ours,), (rival,), 128),
        "SmolLM2-135M int4 after 1024 tokens, 1 thread, times llama.cpp Q4_1": _times(one, (ours,), (rival,), 1024),
        "SmolLM2-135M int4 after 1024 tokens, 2 threads, times llama.cpp Q4_1": _times(two, (ours,), (rival,), 1024),
        "SmolLM2-135M int4, bytes that a token reads, times those of llama.cpp Q4_1": size,
        "SmolLM2-135M int4, perplexity less that of llama.cpp Q4_1": perplexity,
        "1B shape int4 after 128 tokens, times llama.cpp Q4_1, the worse of 1 and 2 threads": least(ours, "llama.cpp Q4_1"),
        "1B shape int4 after 128 tokens, times llama.cpp Q4_0, the worse of 1 and 2 threads": least(ours, "llama.cpp Q4_0"),
    }


def _times(found: dict[str, Measured], ours: Iterable[str], peers: Iterable[str], context: int) -> float | None:
    """How many times faster the fastest of ours is than the fastest of the peers; None if one side is empty."""
    mine, theirs = ([found[name].step[context] for name in names if name in found] for names in (ours, peers))
    return min(theirs) / min(mine) if mine and theirs else None


if __name__ == "__main__":
    main(rows, bars)
