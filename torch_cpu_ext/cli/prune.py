"""`torch-cpu-ext prune`: a language model in, a pruned and packed checkpoint out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..sparse_linear import PruneConfig, SparseLinearConfig, calibration_from_text, prune
from ..sparse_linear.ops import DTYPES
from ..sparse_linear.prune_config import METHODS
from ..sparse_linear.pruning import parse_pattern
from .terminal import fail, print_json, size

_EVALUATED = 8  # windows of text, at most, that perplexity is measured on


def prune_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a transformers causal language model, or smollm2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result; must be new or empty.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to prune; 0.5, or what --pattern says.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "sparsegpt",
    pattern: Annotated[str, typer.Option(help="unstructured, or n:m, such as 2:4.")] = "unstructured",
    calibration: Annotated[list[Path] | None, typer.Option(help="A text file; give the option again for each further one.")] = None,
    dtype: Annotated[str, typer.Option(help="How weights are stored: bf16, int8 or int4.")] = "int8",
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate with.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    resume: Annotated[Path | None, typer.Option(help="Folder for finished blocks; run again after an interruption to go on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prune a language model with calibration text, pack it and save it with its config and tokenizer.

    Perplexity before and after is measured on windows of the calibration files that are not calibrated with.
    """
    if dtype not in ("bf16", "int8", "int4") or dtype not in DTYPES:
        fail(f"--dtype must be one of {', '.join(d for d in ('bf16', 'int8', 'int4') if d in DTYPES)}, got {dtype}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        fail(f"--output must be a new or an empty folder, got {output}")
    try:
        config = _config(sparsity, method, pattern, dtype, bool(calibration))
        texts = [path.read_text(errors="replace") for path in calibration or []]
        if config.calibrates and not texts:
            fail(f"--calibration must name a text file for --method {method}")
        result = _run(model, output, config, texts, dtype, samples, length, resume)
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _config(sparsity: float | None, method: str, pattern: str, dtype: str, calibrated: bool) -> PruneConfig:
    groups = parse_pattern(pattern)
    if sparsity is None:
        sparsity = 0.5 if groups is None else 1 - groups[0] / groups[1]
    return PruneConfig(
        sparsity=sparsity,
        method=method,
        pattern=pattern,
        quantize=None if dtype == "bf16" else dtype,
        quantize_method="gptq" if calibrated else "nearest",
    )


def _load(model: str) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model == "smollm2":
        from ..integrations import smollm2

        return smollm2.load_model(), smollm2.load_tokenizer()
    if not Path(model, "config.json").is_file():
        raise ValueError(f"MODEL must be smollm2 or a folder with a config.json, got {model}")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    return loaded.eval(), AutoTokenizer.from_pretrained(model, local_files_only=True)


def _run(
    name: str, output: Path, config: PruneConfig, texts: list[str], dtype: str, samples: int, length: int, resume: Path | None
) -> dict[str, Any]:
    from ..core.checkpoint import save_checkpoint
    from ..core.swap import optimize, report
    from ..integrations.language import perplexity

    model, tokenizer = _load(name)
    held: list[Any] = []
    windows: list[Any] = []
    if texts:
        held_samples = min(_EVALUATED, samples)
        every = calibration_from_text(tokenizer, texts, samples + held_samples, length)
        chosen = {i * len(every) // held_samples for i in range(held_samples)}
        held = [one for i, one in enumerate(every) if i in chosen]
        windows = [one for i, one in enumerate(every) if i not in chosen]
    measure: Callable[[], float | None] = lambda: perplexity(model, held) if held else None  # noqa: E731
    before = measure()
    layers = prune(model, windows if config.calibrates else None, config, resume=resume)
    optimize(model, SparseLinearConfig(dtype=dtype))
    after = measure()
    packed = report(model)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    save_checkpoint(model, output / "packed.safetensors")
    return {
        "output": str(output),
        "config": config.to_dict(),
        "dtype": dtype,
        "perplexity_before": before,
        "perplexity_after": after,
        "bytes_before": packed.bytes_before,
        "bytes_after": packed.bytes_after,
        **layers.to_dict(),
    }


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("layer", "method")
    table.add_column("sparsity", justify="right")
    table.add_column("error", justify="right")
    for row in result["rows"]:
        table.add_row(row["name"], row["method"], f"{row['sparsity']:.3f}", f"{row['error']:.5f}")
    console.print(table)
    for name, reason in result["kept"].items():
        console.print(f"not pruned: {name}: {reason}", highlight=False)
    if result["perplexity_before"] is not None:
        console.print(f"perplexity on held-out text: {result['perplexity_before']:.2f} before, {result['perplexity_after']:.2f} after")
    console.print(f"weights: {size(result['bytes_before'])} before, {size(result['bytes_after'])} packed as {result['dtype']}")
    console.print(f"written: {result['output']}", highlight=False, soft_wrap=True)
