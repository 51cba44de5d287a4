"""What pruning costs: perplexity against bytes of SmolLM2-135M, by method, sparsity and dtype.

Each row prunes the model anew with `torch_cpu_ext.prune`, quantises in the same call, and measures perplexity on two texts of Debian
packages: ``python3.11-doc`` (technical) and ``anarchism`` (prose), which ``apt-get download`` fetches once. Calibration windows come from
both texts, none of them among those that are evaluated. Perplexity is that of the pruned and rounded weights, multiplied in float32, so
the rounding of activations in int8 and int4 kernels is not in it. "nearest" and "gptq" say how weights are rounded; bf16 is nearest.

Rows that `--save` wrote are kept and not measured again until the settings change: a run can be interrupted and goes on.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from torch import Tensor, nn

from torch_cpu_ext import PruneConfig, SparseLinear, SparseLinearConfig, prune
from torch_cpu_ext.core import env
from torch_cpu_ext.core.progress import step
from torch_cpu_ext.integrations import smollm2
from torch_cpu_ext.integrations.language import perplexity

from common import Row, lines, machine, results_path, store

PACKAGES = {"python docs": ("python3.11-doc", "**/_sources/**/*.rst.txt"), "prose": ("anarchism", "**/markdown/*.md.gz")}
LENGTH, EVALUATED, CALIBRATED = 512, 8, 16  # tokens a window; windows of each text
MARKDOWN = re.compile(r"\[([^\]]*)\]\([^)]*\)|[*_>#\\]")
SETTINGS = {
    "model": "SmolLM2-135M",
    "calibration": f"{len(PACKAGES) * CALIBRATED} x {LENGTH} tokens",
    "evaluation": f"{EVALUATED} x {LENGTH} tokens of each text",
    "pruned_layers": "210 of 211, all but the tied lm_head",
}
METHODS = ("magnitude", "wanda", "sparsegpt")
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
DTYPES = ("bf16", "int8", "int4")


def text(name: str) -> str:
    """A text, downloaded once."""
    package, files = PACKAGES[name]
    path = env.cache_dir() / "texts" / f"{package}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with step(f"downloading {package}"), tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
                subprocess.run(["dpkg-deb", "-x", str(next(Path(folder).glob("*.deb"))), folder], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"{package} cannot be downloaded ({error}): this benchmark takes its texts from Debian packages"
                ) from error
            parts = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in sorted(Path(folder).glob(files))]
        joined = "\n\n".join(part.decode(errors="replace") for part in parts)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(re.sub(r"[ \t]*\n[ \t]*\n\s*", "\n\n", MARKDOWN.sub(r"\1", joined) if package == "anarchism" else joined))
        temporary.replace(path)
    return path.read_text()


def windows(tokenizer: Any) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Calibration windows of both texts in turn, and those to evaluate of each, spread evenly and apart."""
    calibration: list[list[Tensor]] = []
    evaluation = {}
    for name in PACKAGES:
        whole, count = text(name), EVALUATED + CALIBRATED
        starts = [i * len(whole) // count for i in range(count)]
        every = [torch.tensor(tokenizer(whole[start : start + 12 * LENGTH])["input_ids"][:LENGTH])[None] for start in starts]
        assert all(one.shape[1] == LENGTH for one in every)
        held = {i * count // EVALUATED for i in range(EVALUATED)}
        evaluation[name] = [one for i, one in enumerate(every) if i in held]
        calibration.append([one for i, one in enumerate(every) if i not in held])
    return [one for pair in zip(*calibration, strict=True) for one in pair], evaluation


def packed_bytes(layers: list[nn.Module], dtype: str) -> int:
    """Bytes of the pruned layers once packed, in the smaller layout of each."""
    config = SparseLinearConfig(dtype=dtype)
    return sum(SparseLinear.from_linear(layer, config).packed.numel() for layer in layers if isinstance(layer, nn.Linear))


def cases(quick: bool) -> Iterator[tuple[str, float, str, str]]:
    """(method, sparsity, dtype, rounding), the most telling ones first; SparseGPT rounds in its pass, the others to nearest."""
    if quick:
        yield from [("magnitude", 0.0, "bf16", "nearest"), ("magnitude", 0.5, "bf16", "nearest")]
        return
    for dtype in DTYPES:
        yield "magnitude", 0.0, dtype, "nearest"
    for sparsity in sorted(SPARSITIES, key=lambda s: abs(s - 0.5)):
        for dtype in DTYPES:
            for method in METHODS:
                yield method, sparsity, dtype, "gptq" if dtype != "bf16" and method == "sparsegpt" else "nearest"


def measure(method: str, sparsity: float, dtype: str, rounding: str, calibration: list[Tensor], evaluation: dict[str, list[Tensor]]) -> Row:
    """One row: prunes the model as it comes, and measures it."""
    model = smollm2.load_model("fp32")
    config = PruneConfig(
        sparsity=sparsity,
        method=method,
        quantize=None if dtype == "bf16" else dtype,
        quantize_method=rounding,
    )
    start = time.perf_counter()
    report = prune(model, calibration if config.calibrates else None, config)
    prune_s = time.perf_counter() - start
    layers = [model.get_submodule(layer.name) for layer in report.rows]
    weights = [layer.weight for layer in layers]
    if dtype == "bf16":
        with torch.no_grad():
            for weight in weights:
                weight.copy_(weight.bfloat16())
    values = {name: round(perplexity(model, held), 3) for name, held in evaluation.items()}
    zeros = 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {
        "case": case(method, sparsity, dtype, rounding),
        **values,
        "megabytes": round(packed_bytes(layers, dtype) / 1e6, 2),
        "config": {
            "method": method,
            "sparsity": sparsity,
            "dtype": dtype,
            "rounding": rounding,
            "point": f"{sparsity:.0%} {dtype}",
            "zeros": round(zeros, 4),
            "prune_s": round(prune_s, 1),
            **SETTINGS,
        },
    }


def case(method: str, sparsity: float, dtype: str, rounding: str) -> str:
    return f"{method} {sparsity:.0%} {dtype} {rounding}"


def rows(quick: bool, kept: dict[str, Row]) -> Iterator[Row]:
    """All rows; those of ``kept``, by case, as they are."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    calibration, evaluation = windows(smollm2.load_tokenizer())
    for settings in cases(quick):
        yield kept.get(case(*settings)) or measure(*settings, calibration, evaluation)


def main() -> None:
    """As the other benchmarks' command line, but rows are saved one by one and have perplexities in place of times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--save", action="store_true", help="keep each row in benchmarks/results, and go on from there")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = machine()
    path = results_path("pruning", about["cpu"])
    old = json.loads(path.read_text()) if arguments.save and path.exists() else []
    kept = {row["case"]: row for row in old if SETTINGS.items() <= row["config"].items()}
    order = [case(*settings) for settings in cases(quick=False)]
    results: list[Row] = []
    for row in rows(arguments.quick, kept):
        row["config"] = row["config"] if row["case"] in kept else row["config"] | about
        results.append(row)
        if arguments.save:
            kept[row["case"]] = row
            store(path, sorted(kept.values(), key=lambda one: order.index(one["case"])))
    print(lines(results)) if arguments.json else print_table(results)


def print_table(results: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "sparsity", "dtype", "rounding", title="SmolLM2-135M: perplexity against bytes", title_justify="left")
    for column in ("MB", *PACKAGES):
        table.add_column(column, justify="right")
    for row in results:
        config = row["config"]
        settings = config["method"], f"{config['sparsity']:.0%}", config["dtype"], config["rounding"]
        table.add_row(*settings, *(f"{row[column]:.2f}" for column in ("megabytes", *PACKAGES)))
    Console().print(table)


if __name__ == "__main__":
    main()
