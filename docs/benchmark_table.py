"""Sphinx directive ``benchmark-table``: a pivot of the results that ``benchmarks/NAME.py --save`` wrote, one table a processor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def field(row: dict[str, Any], name: str) -> Any:
    """A value of a row, or of its config."""
    return row.get(name, row["config"].get(name))


def pivot(rows: list[dict[str, Any]], down: str, across: str, value: str) -> list[list[str]]:
    """Header and lines of a table; rows and columns come in the order of the results.

    Raises:
        ValueError: two results would share a cell.
    """
    lines, columns = list(dict.fromkeys(field(r, down) for r in rows)), list(dict.fromkeys(field(r, across) for r in rows))
    cells: dict[tuple[Any, Any], str] = {}
    for r in rows:
        place = field(r, down), field(r, across)
        if place in cells:
            raise ValueError(f"two results for {down}={place[0]}, {across}={place[1]}: narrow them down with :where:")
        cells[place] = f"{field(r, value):.2f}"
    header = [f"{down} \\ {across}", *(str(c) for c in columns)]
    return [header, *([str(line), *(cells.get((line, c), "") for c in columns)] for line in lines)]


class BenchmarkTable(SphinxDirective):
    """``{benchmark-table} NAME`` with the options ``rows``, ``columns``, ``value`` (ratio) and ``where`` (``field=value, ...``).

    A processor whose results fit nothing is left out.
    """

    required_arguments = 1
    has_content = False
    option_spec: ClassVar[dict[str, Callable[[str], str]]] = dict.fromkeys(("rows", "columns", "value", "where"), directives.unchanged)

    def run(self) -> list[nodes.Node]:
        """The tables, parsed as Markdown."""
        files = sorted(RESULTS.glob(f"{self.arguments[0]}-*.json"))
        if not files:
            raise self.error(f"no results of {self.arguments[0]}: run its benchmark with --save")
        wanted = dict(item.strip().split("=") for item in self.options.get("where", "").split(",") if item.strip())
        lines: list[str] = []
        for file in files:
            self.env.note_dependency(str(file))
            rows = [r for r in json.loads(file.read_text()) if all(str(field(r, name)) == text for name, text in wanted.items())]
            if not rows:  # measured before the benchmark had these
                continue
            table = pivot(rows, self.options["rows"], self.options["columns"], self.options.get("value", "ratio"))
            about = rows[0]["config"]
            lines += ["| " + " | ".join(line) + " |" for line in (table[0], ["---"] * len(table[0]), *table[1:])]
            lines += ["", f"{about['cpu']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}; `{about['command']}`.", ""]
        if not lines:
            raise self.error(f"no result of {self.arguments[0]} fits {self.options['where']}")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
