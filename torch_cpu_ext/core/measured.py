"""What was measured on this machine, kept in the cache folder: whole numbers by name, in one JSON file for each purpose."""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping

import torch

from .. import __version__
from . import env, isa, jit

_log = logging.getLogger("torch_cpu_ext.measured")
_FORMAT = 1


def conditions(technique: str) -> str:
    """What a measurement of a technique's kernels holds for: processor, instruction set, threads, and the kernels themselves."""
    parts = isa.cpu_name(), isa.current(), f"{torch.get_num_threads()} threads", __version__, jit.build_key(technique)
    return " | ".join(parts)


def load(name: str) -> dict[str, int]:
    """What `save` kept; empty where there is nothing. A file that is damaged or of another version is left out, with a line in the log.

    Args:
        name: of the file, without ``.json``.
    """
    path = env.cache_dir() / f"{name}.json"
    try:
        data = json.loads(path.read_text())
        values = data["values"] if data["format"] == _FORMAT else None
        if values is not None and all(type(value) is int for value in values.values()):
            return dict(values)
        _log.warning("%s is of another version, and is not used", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read, and is not used: %r", path, error)
    return {}


def save(name: str, values: Mapping[str, int]) -> None:
    """Adds measurements to those there are. The file is written under a temporary name and renamed; a folder that cannot be written to
    costs a line in the log.

    Args:
        name: of the file, without ``.json``.
        values: what was measured, by a name that says under what conditions.
    """
    folder = env.cache_dir()
    temporary = folder / f".{name}-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": _FORMAT, "values": {**load(name), **values}}, indent=1, sort_keys=True))
        os.replace(temporary, folder / f"{name}.json")
    except OSError as error:
        _log.warning("%s cannot be written, so measurements are not kept: %s", folder / f"{name}.json", error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
