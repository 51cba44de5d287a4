"""What the commands say to people: results on stdout, everything else on stderr."""

import json
from typing import Any, NoReturn

import typer
from rich.console import Console


def fail(message: object) -> NoReturn:
    """Ends the command with exit code 1 and a message on stderr."""
    Console(stderr=True).print(str(message), style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def say(message: str) -> None:
    """One line on stdout, as it is: no markup, no wrapping, so that it can be piped on."""
    Console().print(message, markup=False, highlight=False, soft_wrap=True)


def print_json(values: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(values, indent=2))


def size(count: float) -> str:
    """Bytes in MB, as people read them."""
    return f"{count / 1e6:.1f} MB"
