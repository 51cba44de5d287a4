"""All commands in one place; each group has a file of its own."""

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .build import build, clean
from .demo import demo
from .info import info
from .prune import prune_model

app = typer.Typer(
    name="torch-cpu-ext",
    help="Faster, smaller PyTorch models on the CPUs people already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command(epilog="Example: torch-cpu-ext info --json")(info)
app.command(epilog="Example: torch-cpu-ext build sparse_linear")(build)
app.command(epilog="Example: torch-cpu-ext clean --models")(clean)
app.command(
    epilog="Example: torch-cpu-ext bench sparse_linear -- --quick --json",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)
app.command("prune", epilog="Example: torch-cpu-ext prune smollm2 --calibration notes.txt --dtype int8 -o pruned")(prune_model)
app.add_typer(demo, name="demo")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Faster, smaller PyTorch models on the CPUs people already have."""
