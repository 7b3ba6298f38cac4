"""Plots as inline SVG by matplotlib: text and colours follow the page, so one drawing serves light and dark, any width.

matplotlib draws in marker colours that no one would choose; they are replaced by the page's CSS variables.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 4.2, 2.3  # inches at 72 units each: the SVG's own coordinates
LEFT, BOTTOM, RIGHT, TOP = 0.115, 0.17, 0.985, 0.97  # of the axes, as shares of the drawing
INKS = {
    name: f"#0102{number:02x}" for number, name in enumerate(("ink", "soft", "line", "start", "mle", "dqn", "more"))
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "lmdqn",
    "font.size": 10,
    "axes.edgecolor": INKS["line"],
    "xtick.color": INKS["soft"],
    "ytick.color": INKS["soft"],
    "axes.labelcolor": INKS["soft"],
    "grid.color": INKS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Series:
    """A line: `x` ascending, `y` beside it, `ink` a name of INKS."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ink: str = "dqn"


@dataclass(frozen=True)
class Chart:
    """A drawing and what the page needs to read values off it."""

    title: str
    note: str
    svg: Markup
    readout: str  # JSON: the series, and where the axes lie
    legend: list[tuple[str, str]]  # name and ink of each series, where there are several


def line_chart(title: str, series: Sequence[Series], x_label: str, note: str = "", zero: bool = False) -> Chart:
    """Lines over one x; with `zero`, a line where y is 0."""

    def paint(axes: Axes) -> None:
        if zero:
            axes.axhline(0, color=INKS["soft"], linewidth=0.8)
        for one in series:
            marker = "o" if len(one.x) <= 20 else ""
            axes.plot(one.x, one.y, color=INKS[one.ink], marker=marker)
        axes.set_xlabel(x_label)

    return _draw(title, note, paint, series)


def reliability_chart(title: str, rows: Sequence[tuple[float, float, float]], note: str) -> Chart:
    """Predicted against realised, each (mean predicted, mean realised, its standard error); the diagonal is perfect."""
    x, y, error = (list(column) for column in zip(*rows, strict=True))

    def paint(axes: Axes) -> None:
        axes.axline((x[0], x[0]), slope=1, color=INKS["soft"], linewidth=0.9, dashes=(4, 3))
        axes.errorbar(x, y, yerr=[2 * e for e in error], color=INKS["dqn"], marker="o", linewidth=1.2)
        axes.set_xlabel("predicted V(s), mean of a tenth of the states")
        axes.margins(0.06)

    return _draw(title, note, paint, [Series("realised", x, y)])


def interval_chart(title: str, rows: Sequence[tuple[str, float, tuple[float, float], str]]) -> Chart:
    """A dot and its interval a system: (name, value, (low, high), ink), the first on top."""

    def paint(axes: Axes) -> None:
        for place, (_, value, (low, high), ink) in enumerate(rows):
            axes.plot([low, high], [place, place], color=INKS[ink], linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place], color=INKS[ink], marker="o", markersize=6)
        axes.set_yticks(range(len(rows)), ["" for _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        for place, (name, _, _, ink) in enumerate(rows):
            axes.annotate(name, (0, place), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points",
                          color=INKS[ink], va="center")  # fmt: skip

    return _draw(title, "", paint, [])


def _draw(title: str, note: str, paint: Callable[[Axes], None], series: Sequence[Series]) -> Chart:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
        axes.margins(x=0.02, y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=_all_whole(series)))
        paint(axes)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    limits = [float(end) for end in axes.get_xlim()]
    readout = {"series": [_readable(one) for one in series], "limits": limits, "box": [LEFT, RIGHT]}
    legend = [(one.name, one.ink) for one in series] if len(series) > 1 else []
    return Chart(title, note, _page_svg(drawing.getvalue(), title), json.dumps(readout), legend)


def _all_whole(series: Sequence[Series]) -> bool:
    """Every x is a whole number, as steps and tokens are: so are the ticks then."""
    return bool(series) and all(x == int(x) for one in series for x in one.x)


def _readable(series: Series) -> dict[str, Any]:
    x, y = [float(f"{n:.6g}") for n in series.x], [float(f"{n:.4g}") for n in series.y]
    return {"ink": series.ink, "x": x, "y": y}


def _page_svg(document: str, title: str) -> Markup:
    """What goes into the page: no XML header, no fixed size, the page's font and colours, ids of its own."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">', svg
    )
    svg = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    for name, marker in INKS.items():
        svg = svg.replace(marker, f"var(--{name})")
    own = re.sub(r"\W", "", title)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", svg)
    return Markup(svg)
