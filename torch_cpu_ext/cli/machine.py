"""What to know of a machine: the names that numbers and bug reports go with."""

import shlex
import shutil
import subprocess
from pathlib import Path

from ..core import env


def compiler() -> tuple[str | None, str | None]:
    """Path of the C++ compiler that builds would use and the first line of its ``--version``; None where there is none."""
    command = shlex.split(env.compiler())
    path = shutil.which(command[0]) if command else None
    if path is None:
        return None, None
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return path, None
    return path, next(iter(done.stdout.splitlines()), None)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
