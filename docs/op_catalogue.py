"""Sphinx directive ``op-catalogue``: a section for each op of a technique, made from `torch_cpu_ext.core.registry.CATALOGUE`."""

import importlib
import inspect
import pkgutil
import re
from typing import ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from torch_cpu_ext.core.registry import CATALOGUE, NAMESPACE, Op


def wrapper(op: Op) -> tuple[str, str]:
    """Name and first docstring sentence of the typed function that calls an op.

    Raises:
        LookupError: no file of the technique has a public function that calls it.
    """
    technique = f"torch_cpu_ext.{op.technique}"
    package = importlib.import_module(technique)
    modules = [importlib.import_module(f"{technique}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            if re.search(rf"torch\.ops\.{NAMESPACE}\.{op.name}\(", inspect.getsource(function)):
                summary = (inspect.getdoc(function) or "").split("\n\n")[0]
                place = technique if getattr(package, name, None) is function else module.__name__
                return f"{place}.{name}", " ".join(summary.split())
    raise LookupError(f"{technique} has no public function that calls {op.name}")


class OpCatalogue(SphinxDirective):
    """``{op-catalogue} <technique>``."""

    required_arguments = 1
    has_content = False
    option_spec: ClassVar[dict] = {}

    def run(self) -> list[nodes.Node]:
        """The sections, parsed as Markdown."""
        lines: list[str] = []
        for op in CATALOGUE.values():
            if op.technique != self.arguments[0]:
                continue
            function, summary = wrapper(op)
            gradient = "has gradients" if op.trains else "has no gradients"
            lines += [f"### {op.name}", "", summary, "", "```text", f"{NAMESPACE}::{op.schema}", "```", ""]
            lines += [f"Typed wrapper: {{py:func}}`{function}`. The op {gradient}.", ""]
        if not lines:
            raise self.error(f"no op belongs to {self.arguments[0]!r}")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("op-catalogue", OpCatalogue)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
