"""`torch-cpu-ext bench`: runs a benchmark of the checkout."""

import subprocess
import sys
from typing import Annotated

import typer

from ..core.jit import PACKAGE
from .terminal import fail, say

FOLDER = PACKAGE.parent / "benchmarks"


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark, or the start of its name; without it, their names are listed.")] = None,
) -> None:
    """Run benchmarks/NAME.py of a checkout; what follows the name goes to it (--quick, --json, --bars, --save, --threads N)."""
    if not (FOLDER / "common.py").is_file():
        fail("The benchmarks are not part of the installed package: clone the repository, `pip install -e .`, and run this again.")
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "common")
    if name is None:
        for one in names:
            say(one)
        return
    # The start of a name will do: `bench kv` is `bench kv_cache`.
    name, given = name if name in names else next((one for one in names if one.startswith(name)), None), name
    if name is None:
        fail(f"NAME must be one of {', '.join(names)}, got {given}")
    try:
        code = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *context.args]).returncode
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)
