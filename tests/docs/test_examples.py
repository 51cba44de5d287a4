"""Runs the Python blocks of README.md and the manual: those of a file in order, in one namespace, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

INCLUDED = [ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", ROOT / "tests" / "amx_emulator" / "README.md"]
PAGES = [ROOT / "README.md", *INCLUDED, *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
# A block that cannot run here is marked: <!-- skip: why -->
BLOCK = re.compile(r"^(?:<!-- skip: (?P<reason>[^\n]+) -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

RUN = """
import sys
import torch
torch.manual_seed(0)
page, namespace = sys.argv[1], {"__name__": "__main__"}
for block in sys.stdin.read().split("\\0")[:-1]:
    exec(compile(block, page, "exec"), namespace)
"""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    """The blocks to run, each behind as many empty lines as put its tracebacks at the right line of the page."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, m.start("code")) + m["code"] for m in BLOCK.finditer(text) if not m["reason"]]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_examples_run(page, tmp_path):
    environment = os.environ | {"TORCH_CPU_EXT_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(page)],
        input="".join(block + "\0" for block in blocks(page)),
        env=environment,
        cwd=tmp_path,  # for the files that examples write
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{name(page)}:\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_seen(page):
    text = page.read_text()
    assert len(BLOCK.findall(text)) == len(re.findall(r"^\s*(?:```|:::)(?:\{[\w-]+\} *)?(?:python|py\b|pycon)", text, re.MULTILINE))
    unmarked = BLOCK.sub("", text)
    assert not re.search(r"^<!-- skip", unmarked, re.MULTILINE), "a skip mark that belongs to no block"
    assert ">>>" not in unmarked


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_console_commands_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for target in re.findall(r"\bmake ([a-z]+)", block):
            assert target in targets
        for script in re.findall(r"\b((?:benchmarks|tests|examples)/[\w/]+\.py)", block):
            assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
