"""What exists must be documented, and what is documented must exist."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import torch_cpu_ext
from torch_cpu_ext.core import env, swap
from torch_cpu_ext.core.registry import CATALOGUE

from support import ROOT

DOCS = ROOT / "docs"


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table behind a heading: first cell -> the others, code marks removed."""
    lines = iter(text[text.index(heading) :].splitlines())
    rows = list(first_table(lines))
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows[2:]]
    return {first.strip("`"): rest for first, *rest in cells}


def first_table(lines):
    inside = False
    for line in lines:
        if line.startswith("|"):
            inside = True
            yield line
        elif inside:
            return


def test_environment_variables():
    documented = table((DOCS / "installation.md").read_text(), "## Environment variables")
    assert documented.keys() == env.VARIABLES.keys()


def test_environment_variables_are_all_there_is():
    read = set()
    for file in (*(ROOT / "torch_cpu_ext").rglob("*.py"), ROOT / "setup.py"):
        text = file.read_text()
        read |= set(re.findall(r"TORCH_CPU_EXT_[A-Z_]+\b", text))
        read |= {f"TORCH_CPU_EXT_{name}" for name in re.findall(r"\b(?:env\.)?(?:flag|text)\(\"([A-Z_]+)\"\)", text)}
    assert read == env.VARIABLES.keys()


@pytest.mark.parametrize("op", CATALOGUE)
def test_ops(op):
    page = DOCS / "techniques" / f"{CATALOGUE[op].technique}.md"
    assert f"`{op}`" in page.read_text()
    assert f"{{op-catalogue}} {CATALOGUE[op].technique}" in (DOCS / "reference" / "ops.md").read_text()


@pytest.mark.parametrize("config", [*swap._HANDLERS, torch_cpu_ext.PruneConfig], ids=lambda config: config.__name__)
def test_config_fields(config):
    technique = config.__module__.split(".")[1]
    page = "pruning.md" if config is torch_cpu_ext.PruneConfig else f"techniques/{technique}.md"
    documented = table((DOCS / page).read_text(), "## Parameters")
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    fields = {name: repr(default).replace("'", '"') for name, default in defaults.items()}
    assert {name: cells[0].strip("`") for name, cells in documented.items()} == fields
    for name in fields:
        assert f"        {name}: " in config.__doc__


@pytest.mark.parametrize("name", torch_cpu_ext.__all__)
def test_public_names(name):
    assert re.search(rf":: torch_cpu_ext\.{name}$", (DOCS / "reference" / "package.md").read_text(), re.MULTILINE)
    thing = getattr(torch_cpu_ext, name)
    assert_arguments_documented(thing)


@pytest.mark.parametrize("name", sorted({op.technique for op in CATALOGUE.values()}))
def test_technique_names(name):
    module = importlib.import_module(f"torch_cpu_ext.{name}")
    reference = (DOCS / "reference" / f"{name}.md").read_text() + (DOCS / "reference" / "package.md").read_text()
    for public in module.__all__:
        assert re.search(rf":: (torch_cpu_ext\.)?{public}$", reference, re.MULTILINE), public
        assert_arguments_documented(getattr(module, public))


def assert_arguments_documented(thing):
    """Every argument has its line in the docstring."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return
    for argument in inspect.signature(thing).parameters:
        assert re.search(rf"^\s+{argument}: ", inspect.getdoc(thing) or "", re.MULTILINE), f"{thing.__name__}: {argument}"


def modules():
    names = ["torch_cpu_ext", *(m.name for m in pkgutil.walk_packages(torch_cpu_ext.__path__, "torch_cpu_ext."))]
    return [name for name in names if not re.search(r"\._(kernels|lib)\b", name)]


@pytest.mark.parametrize("module", modules())
def test_docstrings(module):
    try:
        code = importlib.import_module(module)
    except ImportError as error:  # an extra that is not installed
        if (error.name or "").startswith("torch_cpu_ext"):
            raise
        pytest.skip(str(error))
    missing = [] if code.__doc__ else [module]
    for name, thing in vars(code).items():
        if (
            name.startswith("_")
            or getattr(thing, "__module__", None) != module
            or not (inspect.isfunction(thing) or inspect.isclass(thing))
        ):
            continue
        if not inspect.getdoc(thing):
            missing.append(name)
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if member.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
                    continue
                if not inspect.getdoc(getattr(thing, member)):
                    missing.append(f"{name}.{member}")
    assert not missing


def commands():
    """Every command of the CLI, by its words, with its options; empty where typer is not installed."""
    try:
        import typer

        from torch_cpu_ext.cli.app import app
    except ImportError as error:
        if (error.name or "").startswith("torch_cpu_ext"):
            raise
        return {}

    found = {}

    def walk(command, words):
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                walk(child, [*words, name])
        else:
            options = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
            found[" ".join(words)] = options

    walk(typer.main.get_command(app), [])
    return found


def sections(text: str) -> dict[str, str]:
    """Text behind each second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("command", commands())
def test_commands(command):
    documented = sections((DOCS / "cli.md").read_text())
    assert f"`torch-cpu-ext {command}`" in documented
    for option in set(commands()[command]) - {"--help"}:
        assert f"`{option}" in documented[f"`torch-cpu-ext {command}`"], option


def test_documented_commands_exist():
    known = commands()
    if not known:
        pytest.skip("the extra [cli] is not installed")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
    for page in pages:
        for words, options in re.findall(r"torch-cpu-ext((?: [a-z]+)+)((?: --?[\w-]+)*)", page.read_text()):
            command = next((c for c in known if f"{words.strip()} ".startswith(f"{c} ")), None)
            assert command, f"{page.name}: torch-cpu-ext{words}"
            assert set(re.findall(r"--[\w-]+", options)) <= {*known[command], "--help"}, f"{page.name}: torch-cpu-ext{words}{options}"


def test_manual_builds(tmp_path):
    """As `make docs`; skipped where Sphinx is not installed."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
