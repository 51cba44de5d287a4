"""Progress for work beyond about two seconds: on stderr, and only when that is a terminal."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_log = logging.getLogger("torch_cpu_ext")


def bar(items: Iterable[T], description: str, unit: str) -> Iterable[T]:
    """``items`` with a progress bar around them."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, unit=unit, disable=not sys.stderr.isatty(), leave=False)


@contextlib.contextmanager
def step(description: str) -> Iterator[None]:
    """One line for a step whose length is not known: what starts, then how long it took. Logged at INFO in any case."""
    _log.info("%s", description)
    start, terminal = time.perf_counter(), sys.stderr.isatty()
    if terminal:
        print(f"torch_cpu_ext: {description} ...", end="", file=sys.stderr, flush=True)
    outcome = "stopped"
    try:
        yield
        outcome = "done"
    finally:
        seconds = time.perf_counter() - start
        _log.info("%s: %s after %.1f s", description, outcome, seconds)
        if terminal:
            print(f" {outcome} after {seconds:.1f} s", file=sys.stderr, flush=True)
