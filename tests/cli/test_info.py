"""`torch-cpu-ext info`, and the command line as such."""

import json
import re
import subprocess
import sys

import pytest
import torch

import torch_cpu_ext
from torch_cpu_ext.core import env, isa, jit
from torch_cpu_ext.sparse_linear.ops import DTYPES

from support import environment

pytest.importorskip("typer")
from typer.testing import CliRunner

from torch_cpu_ext.cli.app import app


def run(*arguments, code=0):
    """Runs a command in this process; gives what it printed on stdout, or on both streams if it is to fail."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_json_holds_what_a_bug_report_needs():
    values = json.loads(run("info", "--json"))
    assert values["versions"] == {"torch_cpu_ext": torch_cpu_ext.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    assert values["cpu"]["isas"] == list(isa.supported())
    assert values["cpu"]["cap"] == isa.current()
    assert values["cpu"]["name"]
    assert values["threads"]["intraop"] == torch.get_num_threads()
    assert {one["name"] for one in values["openmp"]} <= {"libgomp", "libiomp", "libomp"}
    assert values["compiler"].keys() == {"command", "path", "version"}
    assert values["cache"]["path"] == str(env.cache_dir())
    assert values["techniques"].keys() == set(jit.available())


def test_table_shows_every_technique():
    shown = run("info")
    for technique in jit.available():
        assert re.search(rf"{technique} +(built|cached|not built|failed)", shown)


def test_kernels_are_measured_when_asked_for():
    values = json.loads(run("info", "--json", "--kernels"))
    assert [one["dtype"] for one in values["kernels"]] == list(DTYPES)
    assert all(one["isa"] == torch_cpu_ext.kernel_isa("sparse_linear", one["dtype"]) for one in values["kernels"])
    assert "kernels" not in json.loads(run("info", "--json"))


def test_variables_that_are_set_are_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CPU_EXT_CACHE_DIR", str(tmp_path / "nowhere"))
    values = json.loads(run("info", "--json"))
    assert values["environment"]["TORCH_CPU_EXT_CACHE_DIR"] == str(tmp_path / "nowhere")
    assert values["cache"]["bytes"] == 0
    assert not (tmp_path / "nowhere").exists(), "info must not make the cache"


def test_a_wrong_instruction_set_and_a_missing_compiler_are_shown(monkeypatch):
    monkeypatch.setenv("TORCH_CPU_EXT_ISA", "sse9")
    monkeypatch.setenv("TORCH_CPU_EXT_CXX", "no-such-compiler")
    values = json.loads(run("info", "--json"))
    assert "sse9" in values["cpu"]["cap"]
    assert values["compiler"] == {"command": "no-such-compiler", "path": None, "version": None}
    assert "no-such-compiler not found" in run("info")


@pytest.mark.parametrize("command", [[], ["info"], ["build"], ["clean"], ["bench"], ["demo"], ["demo", "llm"]])
def test_help(command):
    shown = run(*command, "--help")
    assert "Usage:" in shown
    assert command in ([], ["demo"]) or f"torch-cpu-ext {' '.join(command)}" in shown, "the help must have an example"


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "torch_cpu_ext", "--version"], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, f"{torch_cpu_ext.__version__}\n"), done.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_says_what_to_install_without_its_extra(package):
    code = f"import sys; sys.modules[{package!r}] = None; from torch_cpu_ext.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert "pip install 'torch_cpu_ext[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
