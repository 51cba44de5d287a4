"""What all benchmarks share: interleaved timing, the line about the machine, and one command line.

A benchmark defines ``rows(quick)``, which yields what `row` makes, and ``bars()``, which measures what `bars.toml` promises, and ends
with ``if __name__ == "__main__": main(rows, bars)``.
"""

import argparse
import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpu_ext
from torch_cpu_ext.core import isa, memory
from torch_cpu_ext.core.isa import cpu_name

FOLDER = Path(__file__).resolve().parent
Row = dict[str, Any]
COLD_BYTES = memory.cold_bytes()  # what rotated copies of a weight come to, so that each is out of the caches


class Seconds(float):
    """A median time, with the distance between the quartiles of its samples in ``iqr``."""

    iqr: float = 0.0


def interleave(
    functions: dict[str, Callable[[], object]], repeats: int = 21, *, warmup: int = 2, sample_s: float = 2e-3, grad: bool = False
) -> dict[str, Seconds]:
    """Median seconds of one call of each function; they take turns, so that what else the machine does hits all alike.

    Args:
        functions: what to time, by name; each takes care to touch fresh memory where that matters (see `rotate`).
        repeats: samples of each.
        warmup: calls of each before the first sample.
        sample_s: a sample repeats its function until it lasts about this long, which keeps the clock's error small.
        grad: time with autograd; off, everything runs in `torch.inference_mode`.
    """
    with torch.inference_mode(not grad):
        calls = {}
        for name, function in functions.items():
            for _ in range(warmup):
                function()
            once = _time(function, 1)
            calls[name] = max(1, round(sample_s / max(once, 1e-7)))
        samples: dict[str, list[float]] = {name: [] for name in functions}
        gc.collect()
        gc.disable()
        try:
            for _ in range(repeats):
                for name, function in functions.items():
                    samples[name].append(_time(function, calls[name]))
        finally:
            gc.enable()
    return {name: seconds(values) for name, values in samples.items()}


def _time(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def seconds(samples: Sequence[float]) -> Seconds:
    """The median of some times, and their spread."""
    result = Seconds(statistics.median(samples))
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4)
        result.iqr = high - low
    return result


def rotate(functions: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """One function that calls the given ones in turn: each call finds its layer out of the caches if all together outgrow them."""
    turn = itertools.cycle(list(functions))
    return lambda: next(turn)()


def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors at as many addresses as it takes to be out of every cache when their turn comes again, in huge pages as in a model."""
    sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
    count = math.ceil(COLD_BYTES / sum(sizes))
    parts = iter(memory.zeros(sum(sizes) * count).split(sizes * count))
    return [tuple(next(parts)[: t.nbytes].view(t.dtype).view(t.shape).copy_(t) for t in tensors) for _ in range(count)]


def row(case: str, ours_s: float, peer: str, peer_s: float, config: dict[str, Any] | None = None) -> Row:
    """One line of the results; ``ratio`` above 1 means that we are faster."""
    config = dict(config or {})
    for key, value in (("ours_iqr_ms", ours_s), ("peer_iqr_ms", peer_s)):
        if isinstance(value, Seconds):
            config[key] = round(value.iqr * 1e3, 6)
    return {
        "case": case,
        "ours_ms": round(ours_s * 1e3, 6),
        "peer": peer,
        "peer_ms": round(peer_s * 1e3, 6),
        "ratio": round(peer_s / ours_s, 3),
        "config": config,
    }


def machine() -> dict[str, Any]:
    """What a number means nothing without."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": isa.current(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_ext": torch_cpu_ext.__version__,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], FOLDER.parent), *sys.argv[1:]]),
    }


def main(rows: Callable[[bool], Iterable[Row]], bars: Callable[[], dict[str, float | None]] | None = None) -> None:
    """The command line of a benchmark.

    Args:
        rows: ``rows(quick)`` yields the results, as `row` makes them; within a minute if ``quick``.
        bars: ``bars()`` measures every bar that `bars.toml` has under this benchmark's name, by the bar's name;
            None as a value where a peer that is not installed keeps it from being measured.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    parser.add_argument("--quick", action="store_true", help="fewer cases; done within a minute")
    parser.add_argument("--bars", action="store_true", help="measure only what benchmarks/bars.toml promises; prints a JSON list")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME-<cpu>.json")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = machine()  # before the load average is our own
    if arguments.bars:
        _print_bars(name, bars, about)
        return
    results = []
    for result in rows(arguments.quick):
        result["config"] = about | result["config"]
        results.append(result)
        _note(f"{result['case']}: {result['ratio']:.2f} times {result['peer']}")
    if arguments.save:
        path = results_path(name, about["cpu"])
        store(path, results)
        _note(f"written: {path.relative_to(FOLDER.parent)}")
    print(lines(results)) if arguments.json else _print_table(results, about)


def results_path(name: str, cpu: str) -> Path:
    """Where the results of a benchmark on a processor are saved."""
    return FOLDER / "results" / f"{name}-{re.sub('[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"


def store(path: Path, results: Iterable[Row]) -> None:
    """Writes results, all or nothing."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(lines(results) + "\n")
    temporary.replace(path)


def _print_bars(name: str, bars: Callable[[], dict[str, float | None]] | None, about: dict[str, Any]) -> None:
    promises = promised(name)
    measured = bars() if bars and promises else {}
    if missing := sorted(promises.keys() - measured.keys()):
        raise SystemExit(f"{name}: bars.toml has bars that nothing measures: {', '.join(missing)}")
    results = []
    for bar, promise in promises.items():
        ((bound, limit),) = promise.items()
        result: Row = {"bar": f"{name}: {bar}", "required": f"{bound.replace('_', ' ')} {limit:g}", "measured": None, "met": None}
        if (value := measured[bar]) is not None:
            result |= {"measured": round(value, 3), "met": value >= limit if bound == "at_least" else value <= limit}
        results.append(result)
    print(lines(results))
    print(describe(about), file=sys.stderr)


def promised(name: str) -> dict[str, dict[str, float]]:
    """The bars of a benchmark: ``{"at_least": limit}`` or ``{"at_most": limit}``, by name."""
    with open(FOLDER / "bars.toml", "rb") as file:
        return dict(tomllib.load(file).get(name, {}))


def describe(about: dict[str, Any]) -> str:
    """`machine` as one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def lines(rows: Iterable[Row]) -> str:
    """A JSON list with a row on each line, for people and programs alike."""
    return "[\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n]"


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _print_table(results: list[Row], about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "peer", title=f"{Path(sys.argv[0]).stem} (ratio above 1: we are faster)", title_justify="left")
    for column in ("ours (ms)", "peer (ms)", "ratio"):
        table.add_column(column, justify="right")
    for one in results:
        style = "green" if one["ratio"] >= 1 else "red"
        cells = f"{one['ours_ms']:.4g}", f"{one['peer_ms']:.4g}", f"[{style}]{one['ratio']:.2f}[/]"
        table.add_row(one["case"], one["peer"], *cells)
    console = Console()
    console.print(table)
    console.print(describe(about), style="dim", highlight=False)
