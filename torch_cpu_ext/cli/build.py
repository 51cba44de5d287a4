"""`torch-cpu-ext build` and `torch-cpu-ext clean`: the cache of compiled libraries."""

import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..core import env, jit
from ..core.errors import BuildError
from ..core.registry import TECHNIQUES
from .machine import folder_bytes
from .terminal import fail, say, size


def state(technique: str) -> str:
    """Where a technique's library stands: built (loaded, or in the wheel), cached, not built or failed. Builds nothing."""
    library = jit.library(technique)
    if library.error is not None:
        return "failed"
    prebuilt = (jit.PREBUILT / f"{technique}-{jit.build_key(technique, everything)}.so" for everything in (True, False))
    if library.path is not None or any(file.is_file() for file in prebuilt):
        return "built"
    folders = env.cache_dir().glob(f"{technique}-{jit.build_key(technique)}-{jit.compiler_id() or '*'}")
    return "cached" if any((folder / f"{technique}.so").is_file() for folder in folders) else "not built"


def build(
    techniques: Annotated[list[str] | None, typer.Argument(metavar="[TECHNIQUE]...", help="What to build; all by default.")] = None,
) -> None:
    """Build the C++ libraries ahead of their first use."""
    for technique in techniques or jit.available():
        if technique not in jit.available():
            fail(f"TECHNIQUE must be one of {', '.join(jit.available())}, got {technique}")
    for technique in techniques or jit.available():
        start = time.perf_counter()
        try:
            path = jit.find_or_build(technique)
        except BuildError as error:
            fail(error)
        if jit.PREBUILT not in path.parents and env.cache_dir() not in path.parents:
            fail(f"{technique}: the cache {env.cache_dir()} cannot be written, so the library would not outlast this command")
        say(f"{technique}: {path} ({time.perf_counter() - start:.1f} s)")


def clean(models: Annotated[bool, typer.Option("--models", help="Remove converted demo models too.")] = False) -> None:
    """Remove the compiled libraries from the cache; the next use builds them anew."""
    freed = 0
    for path, locks in _removable(env.cache_dir(), models):
        with _held(locks) as held:
            if not held:
                say(f"skipped {path}: a process is making it")
                continue
            taken = folder_bytes(path)
            try:
                shutil.rmtree(path)
            except OSError as error:
                fail(f"{path} cannot be removed: {error}")
            freed += taken
            say(f"removed {path} ({size(taken)})")
    say(f"{size(freed)} freed")


def _removable(root: Path, models: bool) -> Iterator[tuple[Path, list[Path]]]:
    """What this package made in its cache, each with the locks that its maker may hold.

    Lock files stay, empty as they are: removing one that another process waits for would let two builds run at once.
    """
    patterns = [(root, re.compile(rf"\.?({'|'.join(TECHNIQUES)})-\w+(-[0-9a-f]{{8}})?"))]
    if models:
        patterns.append((root / "models", re.compile(r"\.?(smollm2)-.*")))
    for parent, pattern in patterns:
        for path in sorted(parent.glob("*")):
            match = pattern.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                # the name of a temporary folder does not say which of the locks is its own
                own = parent.glob(f"{match[1]}-*.lock") if path.name.startswith(".") else parent.glob(f"{path.name}.lock")
                yield path, [*own, *path.glob("*.lock")]


@contextmanager
def _held(locks: list[Path]) -> Iterator[bool]:
    """Holds all the locks; False if another process has one of them."""
    with ExitStack() as stack:
        try:
            for lock in locks:
                fcntl.flock(stack.enter_context(open(lock)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
