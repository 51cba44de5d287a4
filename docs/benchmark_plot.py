"""Sphinx directive ``benchmark-plot``: lines through the results that ``benchmarks/NAME.py --save`` wrote, one figure a processor."""

import io
import json
from collections.abc import Callable
from typing import Any, ClassVar

from benchmark_table import RESULTS, field
from docutils import nodes
from docutils.parsers.rst import directives
from matplotlib import rc_context
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# The same on light and dark pages; ids and no date, so that a figure's file changes only with its results.
STYLE = {"svg.hashsalt": "torch_cpu_ext", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
MARKERS = "os^vDPX*<>"


def draw(rows: list[dict[str, Any]], x: str, lines: str, value: str, title: str) -> str:
    """An SVG element: ``value`` with its ``interval`` against ``x``; lines of a single point go straight across."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=value, title=title, xscale="log")
        ticks = sorted({field(row, x) for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        for i, name in enumerate(dict.fromkeys(field(row, lines) for row in rows)):
            mine = sorted((row for row in rows if field(row, lines) == name), key=lambda row: field(row, x))
            if len(mine) == 1:
                axes.axhline(mine[0][value], color="gray", linestyle="--", label=name)
                continue
            # Points of different lines stand beside each other, else their intervals hide one another.
            at = [field(row, x) * 1.01 ** (i - 5) for row in mine]
            axes.errorbar(
                at,
                [row[value] for row in mine],
                [row.get("interval") or 0 for row in mine],
                label=name,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                elinewidth=0.6,
            )
        figure.legend(loc="outside right upper", frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


class BenchmarkPlot(SphinxDirective):
    """``{benchmark-plot} NAME`` with the options ``x``, ``lines``, ``value`` (mean), ``title`` and ``where`` (``field=value, ...``).

    In ``where``, ``a|b`` stands for either.
    """

    required_arguments = 1
    option_spec: ClassVar[dict[str, Callable[[str], str]]] = dict.fromkeys(("x", "lines", "value", "title", "where"), directives.unchanged)

    def run(self) -> list[nodes.Node]:
        """The figures, as SVG within the page."""
        wanted = dict(item.strip().split("=") for item in self.options.get("where", "").split(",") if item.strip())
        result: list[nodes.Node] = []
        for file in sorted(RESULTS.glob(f"{self.arguments[0]}-*.json")):
            self.env.note_dependency(str(file))
            stored = json.loads(file.read_text())
            rows = [row for row in stored if all(str(field(row, name)) in text.split("|") for name, text in wanted.items())]
            if rows:
                title = self.options.get("title", "")
                picture = draw(rows, self.options["x"], self.options["lines"], self.options.get("value", "mean"), title)
                result.append(nodes.raw("", picture, format="html"))
        if not result:
            raise self.error(f"no result of {self.arguments[0]} fits {self.options.get('where', '')}")
        return result


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("benchmark-plot", BenchmarkPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
