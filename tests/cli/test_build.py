"""`torch-cpu-ext build` and `clean`, in a cache of their own."""

import fcntl
import json
import shutil

import pytest

from torch_cpu_ext.core import jit

pytest.importorskip("typer")
from typer.testing import CliRunner

from torch_cpu_ext.cli.app import app


@pytest.fixture
def cache(tmp_path, monkeypatch, library):
    """A cache with a built library in it, copied from the user's."""
    root = tmp_path / "cache"
    shutil.copytree(library.parent, root / library.parent.name)
    (root / f"{library.parent.name}.lock").touch()
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(root))
    return root


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_build_prints_the_path_and_seconds(cache):
    result = invoke("build", "sparse_linear")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"sparse_linear: {cache}")
    assert result.stdout.rstrip().endswith("s)")


def test_build_names_the_techniques_there_are():
    result = invoke("build", "sparse_lunar")
    assert result.exit_code == 1
    assert "TECHNIQUE must be one of" in result.output
    assert "got sparse_lunar" in result.output


def test_build_shows_why_it_failed(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", "no-such-compiler")
    result = invoke("build")
    assert result.exit_code == 1
    assert "no-such-compiler" in result.output
    assert "Hint" in result.output
    assert "Traceback" not in result.output


def test_info_follows_build_and_clean(cache, monkeypatch):
    monkeypatch.setattr(jit, "_libraries", {})  # as a new process would find it
    state = lambda: json.loads(invoke("info", "--json").stdout)["techniques"]["sparse_linear"]  # noqa: E731
    assert state() == "cached"
    assert invoke("clean").exit_code == 0
    assert state() == "not built"


def test_clean_removes_only_what_the_package_made(cache, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (cache / f"sparse_linear-{'0' * 16}-{'0' * 8}").symlink_to(outside)
    kept = [cache / name for name in ("notes.txt", "sparse_linear_of_mine", "models/smollm2-135m-0-0", "models/mine")]
    for path in kept:
        path.mkdir(parents=True)
    leftover = cache / ".sparse_linear-k1ll3d__"
    leftover.mkdir()
    result = invoke("clean")
    assert result.exit_code == 0, result.output
    assert not leftover.exists()
    assert not list(cache.glob("*/sparse_linear.so"))
    assert all(path.is_dir() for path in kept)
    assert (outside / "kept").exists()
    assert result.stdout.count("removed ") == 2
    assert "MB freed" in result.stdout

    assert invoke("clean", "--models").exit_code == 0
    assert [path.exists() for path in kept] == [True, True, False, True]


def test_clean_leaves_what_is_being_built(cache):
    (lock,) = cache.glob("*.lock")
    work = cache / ".sparse_linear-bu1ld1ng"
    work.mkdir()
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = invoke("clean")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("skipped ") == 2
    assert work.is_dir()
    assert lock.with_suffix("").is_dir()


def test_clean_of_no_cache_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path / "nowhere"))
    result = invoke("clean")
    assert (result.exit_code, result.stdout) == (0, "0.0 MB freed\n")
