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


def draw(rows: list[dict[str, Any]], x: str, at: dict[str, float], lines: str, value: str, panels: str | None) -> str:
    """An SVG element: ``value`` with its ``interval`` against ``x``, in percent; a line of a single point goes straight across.

    Args:
        rows: results.
        x: field that says where a point stands,
        at: the percentage of each of its values.
        lines: field whose values have a line each.
        value: field to be shown.
        panels: field whose values have a panel each, side by side; None: one panel.
    """
    parts = list(dict.fromkeys(field(row, panels) for row in rows)) if panels else [""]
    names = list(dict.fromkeys(field(row, lines) for row in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.8), layout="constrained")
        for panel, axes in zip(parts, figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], strict=True):
            shown = [row for row in rows if not panels or field(row, panels) == panel]
            axes.set(title=panel, xlabel="bytes of the full cache, %", xscale="log")
            for i, name in enumerate(names):
                mine = sorted((row for row in shown if field(row, lines) == name), key=lambda row: at[field(row, x)])
                if len(mine) == 1:
                    axes.axhline(mine[0][value], color="gray", linestyle="--", label=name)
                    continue
                axes.errorbar(
                    [at[field(row, x)] * 1.015 ** (i - len(names) / 2) for row in mine],  # beside each other, to be told apart
                    [row[value] for row in mine],
                    [row.get("interval") or 0 for row in mine],
                    label=name,
                    color=f"C{i % 10}" if i < 10 else "black",
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=4,
                    linewidth=1.1,
                    elinewidth=0.5,
                )
            ticks = sorted({at[field(row, x)] for row in shown} - {100.0})
            axes.minorticks_off()
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


class BenchmarkPlot(SphinxDirective):
    """``{benchmark-plot} NAME`` with the options ``x``, ``at``, ``lines``, ``value`` (mean), ``panels`` and ``where``.

    ``at`` is ``value=percent, ...``, ``where`` is ``field=value, ...``, in which ``a|b`` stands for either.
    """

    required_arguments = 1
    option_spec: ClassVar[dict[str, Callable[[str], str]]] = dict.fromkeys(
        ("x", "at", "lines", "value", "panels", "where"), directives.unchanged
    )

    def run(self) -> list[nodes.Node]:
        """The figures, as SVG within the page."""
        wanted, at = self._pairs("where"), {name: float(percent) for name, percent in self._pairs("at").items()}
        result: list[nodes.Node] = []
        for file in sorted(RESULTS.glob(f"{self.arguments[0]}-*.json")):
            self.env.note_dependency(str(file))
            stored = json.loads(file.read_text())
            rows = [row for row in stored if all(str(field(row, name)) in text.split("|") for name, text in wanted.items())]
            if rows:
                options = self.options["lines"], self.options.get("value", "mean"), self.options.get("panels")
                result.append(nodes.raw("", draw(rows, self.options["x"], at, *options), format="html"))
        if not result:
            raise self.error(f"no result of {self.arguments[0]} fits {self.options.get('where', '')}")
        return result

    def _pairs(self, option: str) -> dict[str, str]:
        items = (item.strip() for item in self.options.get(option, "").split(","))
        return dict(item.split("=", 1) for item in items if item)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("benchmark-plot", BenchmarkPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
