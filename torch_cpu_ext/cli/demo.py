"""`torch-cpu-ext demo`: a real model with and without torch_cpu_ext, side by side."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..integrations.smollm2 import optimized_path, require
from ..sparse_linear import SparseLinearConfig
from ..sparse_linear.ops import DTYPES
from .llm_worker import REST
from .terminal import fail, print_json, size

demo = typer.Typer(help="Run a real model with and without torch_cpu_ext, side by side.", no_args_is_help=True)
PROMPT = "Explain in three sentences what a CPU cache does."


@demo.callback()
def root() -> None:
    """Run a real model with and without torch_cpu_ext, side by side."""


@demo.command(epilog='Example: torch-cpu-ext demo llm --tokens 128 --prompt "What is a CPU cache?"')
def llm(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; the texts go to stderr.")] = False,
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens to generate.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; its own choice by default.")] = None,
    dtype: Annotated[str, typer.Option(help=f"How the optimized model stores its weights: {', '.join(DTYPES)}.")] = "int8",
) -> None:
    """Run SmolLM2-135M-Instruct untouched and optimized: same prompt, greedy decoding, each in its own process.

    The baseline is the faster of fp32 and bf16. The first run converts the model (half a minute), later ones take less than a minute.
    """
    if dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    try:
        require()
    except ImportError as error:
        fail(error)
    settings = {"prompt": prompt, "threads": threads, "dtype": dtype}
    try:
        result = _compare(settings, tokens, Console(stderr=as_json))
    except WorkerError as error:
        fail(error)
    if as_json:
        print_json(result)
    else:
        _print_table(result)


class WorkerError(RuntimeError):
    """A worker process failed; the message says how."""


class Worker:
    """The parent's end of a `llm_worker` process."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.model = model
        command = [sys.executable, "-m", "torch_cpu_ext.cli.llm_worker", json.dumps({"model": model, **settings})]
        # reading GGUF has a progress bar of its own, which tqdm decides on when it is imported
        environment = os.environ if sys.stderr.isatty() else {**os.environ, "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it holds nothing that a kill could harm: what it keeps in the cache appears by renames
        self.process.communicate()

    def ask(self, on_text: Callable[[str], None] | None = None, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for its result."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; `result` says why
            self.process.stdin.write(json.dumps(command) + "\n")
        return self.result(on_text)

    def result(self, on_text: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Waits for a result, passing on what comes before it.

        Raises:
            WorkerError: the process reported an error, or ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(f"The {self.model} model failed: {answer['error']}")
            if "result" in answer:
                return dict(answer["result"])
            if on_text:
                on_text(answer["text"])
        code = self.process.wait()
        hint = " (out of memory?)" if code == -9 else ""
        raise WorkerError(f"The process of the {self.model} model ended with code {code}{hint}.")


def _compare(settings: dict[str, Any], tokens: int, console: Console) -> dict[str, Any]:
    """Runs both models in turns, so that what else the machine does hits both alike."""
    status = Console(stderr=True).status
    with ExitStack() as stack:
        if not optimized_path(SparseLinearConfig(dtype=settings["dtype"]), REST).exists():
            with Worker("prepare", settings) as prepare:  # converting takes more memory than any of the models
                prepare.result()
        with status("loading the models ..."):
            workers = {model: stack.enter_context(Worker(model, settings)) for model in ("fp32", "bf16", "optimized")}
            for worker in workers.values():
                worker.result()
        with status("choosing the faster baseline, fp32 or bf16 ..."):
            tried = _take_turns({name: workers[name] for name in ("fp32", "bf16")}, 16, budget_s=4, most=4)
            best = max(tried, key=lambda name: tried[name]["best_tokens_per_s"])
        for name in ("fp32", "bf16"):
            if name != best:
                workers[name].__exit__()
        pair = {"baseline": workers[best], "optimized": workers["optimized"]}
        titles = {"baseline": f"baseline: transformers, {best}", "optimized": f"optimized: torch_cpu_ext, {settings['dtype']}"}
        for name, worker in pair.items():
            console.rule(titles[name], align="left")
            worker.ask(lambda text: _stream(console, text), do="generate", tokens=tokens, live=True)
            console.print("\n")
        with status("timing both in turns ..."):
            results = _take_turns(pair, tokens, budget_s=10, most=5)
            for name, worker in pair.items():
                del results[name]["best_tokens_per_s"]
                results[name] |= worker.ask(do="describe")
        with status("measuring perplexity ..."):
            for name, worker in pair.items():
                results[name] |= worker.ask(do="perplexity")
    ratio = results["optimized"]["decode_tokens_per_s"] / results["baseline"]["decode_tokens_per_s"]
    return {**results, "ratio": ratio}


def _stream(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _take_turns(workers: dict[str, Worker], tokens: int, *, budget_s: float, most: int) -> dict[str, dict[str, Any]]:
    """Medians over two rounds or more, until the budget is spent."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    start = time.perf_counter()
    for done in range(most):
        if done >= 2 and time.perf_counter() - start > budget_s:
            break
        for name, worker in workers.items():
            runs[name].append(worker.ask(do="generate", tokens=tokens, live=False))
    return {
        name: {
            "text": mine[-1]["text"],
            "decode_tokens_per_s": 1 / statistics.median(gap for run in mine for gap in run["gaps_s"]),
            "ttft_ms": statistics.median(run["first_s"] for run in mine) * 1e3,
            # other work only ever slows a round down, so with few rounds the best of them tells two models apart most surely
            "best_tokens_per_s": 1 / min(statistics.median(run["gaps_s"]) for run in mine),
        }
        for name, mine in runs.items()
    }


def _print_table(result: dict[str, Any]) -> None:
    baseline, optimized = result["baseline"], result["optimized"]
    table = Table("", title="SmolLM2-135M-Instruct, greedy decoding")
    table.add_column(f"baseline ({baseline['dtype']})", justify="right")
    table.add_column(f"optimized ({optimized['dtype']})", justify="right")
    table.add_column("ratio", justify="right")
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("decode, tokens/s", "decode_tokens_per_s", lambda v: f"{v:.1f}"),
        ("time to first token", "ttft_ms", lambda v: f"{v:.0f} ms"),
        ("weights", "weight_bytes", size),
        ("peak memory of process", "peak_rss_bytes", size),
        ("perplexity, Python help", "perplexity", lambda v: f"{v:.2f}"),
    )
    for label, key, show in rows:
        before, after = baseline[key], optimized[key]
        table.add_row(label, show(before), show(after), f"{after / before:.2f}", style="bold" if key == "decode_tokens_per_s" else None)
    table.add_row("instruction set", baseline["isa"], optimized["isa"], "")
    console = Console()
    console.print(table)
    console.print(f"{result['ratio']:.2f} times the decode speed, on {optimized['threads']} threads.", highlight=False)
