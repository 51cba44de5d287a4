"""A prompt of 4k to 32k tokens and tokens after it, with compressed caches and with others: times and memory.

Two layers of Llama 3.2 1B's shape with random weights in bf16, each way in a process of its own, taking turns. In the config, ``peak_mb``
is the memory the prompt needed at most and ``kept_mb`` what was still held after it, both as the system counts them, in megabytes.
kvpress needs an environment of its own: TORCH_CPU_EXT_KVPRESS_PYTHON names its interpreter.
"""

import contextlib
import itertools
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from torch_cpu_ext import KVCrushConfig
from torch_cpu_ext.kv_cache import select, sign

from common import Row, interleave, main, row
from peers import Peer, skip
from peers.caches import KVPRESS
from peers.stack import LAYERS
from peers.workers import Worker, WorkerError

CONTEXTS, QUICK = (4096, 8192, 16384), (2048,)
TOKENS = 12
ALL, QUARTER = "ours, all tokens", "ours, a quarter"
DYNAMIC = "DynamicCache, SDPA"


def _own(**values: Any) -> Peer:
    return Peer("caches", "OwnCache", {"config": KVCrushConfig(**values)})


WAYS = {
    ALL: _own(budget=1.0),
    QUARTER: _own(budget=0.25),
    "ours, all tokens, int8": _own(budget=1.0, dtype="int8"),
    "ours, a quarter, int8": _own(budget=0.25, dtype="int8"),
    "ours, all tokens, int4": _own(budget=1.0, dtype="int4"),
    DYNAMIC: Peer("caches", "TransformersCache"),
    "QuantizedCache fp8": Peer("caches", "TransformersCache", {"backend": "fp8"}),
    "QuantizedCache int4 quanto": Peer(
        "caches", "TransformersCache", {"backend": "quanto"}, ("optimum.quanto",), "pip install optimum-quanto"
    ),
    "kvpress SnapKV, a quarter": Peer("caches", "Kvpress", {"share": 0.25}),
}


def measure(names: tuple[str, ...], contexts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """For each context and way: its name, the context, and medians."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            why = f"{KVPRESS} names no interpreter" if name.startswith("kvpress") and KVPRESS not in os.environ else ""
            try:
                why = why or WAYS[name].missing()
            except ModuleNotFoundError as error:
                why = f"{error} ({WAYS[name].install})"
            if why:
                skip(name, why)
                continue
            workers[name] = stack.enter_context(Worker(WAYS[name], "", torch.get_num_threads()))
            workers[name].ask()
            workers[name].ask("measure", 256, 4)  # loads what is loaded late
        for context in contexts:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
            for _ in range(2 if context <= 8192 else 1):
                for name in [*workers]:
                    try:
                        runs[name].append(workers[name].ask("measure", context, TOKENS))
                    except WorkerError as error:
                        skip(name, str(error))
                        del workers[name], runs[name]
            for name, own in runs.items():
                yield {
                    "name": name,
                    "context": context,
                    "first_s": statistics.median(run["first_s"] for run in own),
                    "gap_s": statistics.median(gap for run in own for gap in run["gaps_s"][2:]),
                    "peak": statistics.median(run["peak"] for run in own),
                    "kept": statistics.median(run["kept"] for run in own),
                }


def rows(quick: bool) -> Iterator[Row]:
    """All results, or a few of them: each of ours against each other way; memory is in the config."""
    names = (ALL, QUARTER, DYNAMIC) if quick else tuple(WAYS)
    for _, group in itertools.groupby(measure(names, QUICK if quick else CONTEXTS), lambda one: one["context"]):
        found = list(group)
        own = [one for one in found if one["name"].startswith("ours")]
        for ours, peer in itertools.product(own, [one for one in found if one not in own]):
            config = {"context": ours["context"], "cache": ours["name"], "layers": LAYERS, "tokens": TOKENS}
            for key in ("peak", "kept"):
                config |= {f"{key}_mb": round(ours[key] / 1e6), f"peer_{key}_mb": round(peer[key] / 1e6)}
            for key, what in (("first_s", "prompt"), ("gap_s", "each token")):
                yield row(f"{ours['context']} tokens, {ours['name']}: {what}", ours[key], peer["name"], peer[key], config | {"time": what})


def choice_seconds(tokens: int) -> float:
    """Of the signatures and the selection of one layer."""
    score = torch.rand(1, 32, tokens)
    first = torch.zeros(1, 8, dtype=torch.int64)
    begin, end = torch.tensor([4]), torch.tensor([tokens - 32])
    numbers = first, first + tokens, first + tokens // 4

    def choose() -> object:
        signature = sign(score, begin, end)[:, None]
        return select(score[:, :8], signature, *numbers, most=tokens // 4, start=4, recent=32)

    return interleave({"choice": choose}, 15)["choice"]


def bars() -> dict[str, float]:
    """What bars.toml promises."""
    found = {(one["name"], one["context"]): one for one in measure((QUARTER, DYNAMIC), (4096, 16384))}
    ours, theirs = found[QUARTER, 16384], found[DYNAMIC, 16384]
    overheads = [LAYERS * choice_seconds(n) / (found[QUARTER, n]["first_s"] + TOKENS * found[QUARTER, n]["gap_s"]) for n in (4096, 16384)]
    return {
        "signatures and selection, share of the time of a prompt and 12 tokens (%)": 100 * max(overheads),
        "16k tokens, a quarter kept, prompt, times DynamicCache and SDPA": theirs["first_s"] / ours["first_s"],
        "16k tokens, a quarter kept, each token, times DynamicCache and SDPA": theirs["gap_s"] / ours["gap_s"],
        "16k tokens, a quarter kept, memory held, share of DynamicCache's": ours["kept"] / theirs["kept"],
    }


if __name__ == "__main__":
    main(rows, bars)
