"""The figures of the report. The only module of the core that imports matplotlib (object API, Agg; never pyplot)."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.evaluation.metrics import ecdf
from core.report import Floats, Ints, Kind, Method, ReportData
from core.report.charts import Chart, Curve
from core.report.pages import Picture

__all__ = [
    "COLOURS",
    "DASHES",
    "DUAL",
    "accuracy_axes",
    "certified_accuracy_figure",
    "curves_figure",
    "delta_figure",
    "draw_curves",
    "drawing",
    "figures",
    "nth_look",
    "p_lower_figure",
    "progress_figure",
    "severity_figure",
    "sigma_choice_figure",
    "to_bytes",
    "to_picture",
]


# Okabe & Ito's palette without its yellow, which is hard to see on white. Vermillion is kept for Dual RS.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
DUAL: Final = "#D55E00"
_OTHERS: Final = ("#5D3A9B", "#117733", "#882255", "#44AA99")
_OTHER_MARKERS: Final = ("X", "p", "h", "d")
# Dots are kept for the off-the-shelf rows.
DASHES: Final = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2, 1, 2, 1, 2)), (0, (12, 2)))
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")

# Narrow figures with type of full size: a phone shows the SVG at three quarters, and it is still read.
_WIDTH_IN: Final = 4.6
_LEGEND_ROW_IN: Final = 0.19
_STYLE: Final = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",  # a reader's machine need not have the font
    "svg.hashsalt": "report",  # the same data gives the same bytes
}
_GRID_POINTS: Final = 600


def figures(data: ReportData) -> dict[str, Figure]:
    """Every figure that `data` has something to show for, by name."""
    shown = {"certified_accuracy": certified_accuracy_figure(data), "p_lower": p_lower_figure(data)}
    if data.dual is not None:
        chosen, _, best = data.choice_counts()
        shown["sigma_choice"] = sigma_choice_figure([f"{sigma:g}" for sigma in data.sigmas], chosen, best)
        lost, slack = data.lost_radius(), data.dual.slack()
        if lost.size or slack.size:
            shown["delta_radius"] = delta_figure(lost, slack)
    return shown


def certified_accuracy_figure(data: ReportData) -> Figure:
    """Certified accuracy against the radius, one curve per method, up to the largest certified radius."""
    methods = data.methods()
    with drawing(1, 3.5, [method.name for method in methods]) as (figure, (axes,)):
        # The oracle first: it runs above the others and must not hide them where they meet.
        draw_curves(axes, sorted(methods, key=lambda m: m.is_certificate))
    return figure


def delta_figure(lost: Floats, slack: Floats) -> Figure:
    """ECDFs of Delta R_c, the radius that a sub-optimal noise level costs, and of Delta R_sigma, the room that R_sigma
    leaves above R_c, negative where the estimator caps the radius; an empty array leaves its panel out.
    """
    num = bool(lost.size) + bool(slack.size)
    with drawing(num, 2.9 * num) as (figure, panels):
        if lost.size:
            _draw_ecdf(panels[0], lost, COLOURS[0], start=0.0)
            panels[0].set(title="Radius lost to the choice of sigma", xlabel=r"$\Delta R_c = R_c^* - R_c$")
        if slack.size:
            _draw_ecdf(panels[-1], slack, DUAL)
            panels[-1].axvline(0.0, color="#444444", linewidth=1.0, linestyle="--")
            title = r"Left of the dashed line $R_\sigma$ caps the radius"
            panels[-1].set(title=title, xlabel=r"$\Delta R_\sigma = R_\sigma - R_c$")
    return figure


def p_lower_figure(data: ReportData) -> Figure:
    """ECDF of the lower bound of the top class's probability, one curve per method that has one."""
    with drawing(1, 3.5) as (figure, (axes,)):
        for method in data.methods():
            if method.p_lower is not None:
                x, y = ecdf(method.p_lower)
                steps = np.r_[x[0], x, 1.0], 100.0 * np.r_[0.0, y, 1.0]
                axes.step(*steps, where="post", label=method.name, **_look(method))
        axes.axvline(0.5, color="#444444", linewidth=1.0, linestyle="--")
        axes.set(xlabel="lower bound of the top class's probability", ylabel="share of examples ≤ x [%]")
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(0.0, 101.0)
    return figure


def sigma_choice_figure(labels: Sequence[str], chosen: Ints, best: Ints) -> Figure:
    """Examples per noise level: as the estimator chose it, and as the oracle would have; ``(K,)`` counts each."""
    with drawing(1, 2.8) as (figure, (axes,)):
        place = np.arange(len(labels))
        for counts, shift, label, look in (
            (chosen, -0.2, "chosen by the estimator", {"color": DUAL}),
            (best, 0.2, "best in hindsight (oracle)", {"color": "white", "edgecolor": "black", "hatch": "///"}),
        ):
            bars = axes.bar(place + shift, counts, width=0.38, label=label, **look)
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=9)
        axes.set_xticks(place, labels)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.set(xlabel="sigma", ylabel="examples")
    return figure


def curves_figure(curves: Mapping[str, Method]) -> Figure:
    """Certified accuracy against the radius, one curve per name."""
    with drawing(1, 3.5) as (figure, (axes,)):
        looks = ({**nth_look(i), "linewidth": 1.8} for i in range(len(curves)))
        _draw_curves(axes, [(name, method, look) for (name, method), look in zip(curves.items(), looks, strict=True)])
    return figure


def progress_figure(curves: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """Examples done against the hours since the first of them, one curve per name."""
    with drawing(1, 2.8) as (figure, (axes,)):
        for number, (name, (hours, done)) in enumerate(curves.items()):
            axes.step(hours, done, where="post", label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.8)
        axes.set(xlabel="hours since the first shard", ylabel="examples done")
        axes.set_ylim(bottom=0.0)
    return figure


def severity_figure(severities: Sequence[int], methods: Sequence[Method], panels: Mapping[str, Floats]) -> Figure:
    """Certified accuracy against the severity of a corruption (0: the clean test set), one line for each of M methods;
    panels by title hold shares ``(len(severities), M)``.
    """
    with drawing(len(panels), 2.9 * len(panels), [method.name for method in methods]) as (figure, drawn):
        for axes, (title, shares) in zip(drawn, panels.items(), strict=True):
            for method, values in zip(methods, shares.T, strict=True):
                axes.plot(severities, 100.0 * values, label=method.name, **(_look(method) | {"markevery": 1}))
            axes.set_xticks(severities, ["clean" if severity == 0 else str(severity) for severity in severities])
            axes.set(title=title, xlabel="severity", ylabel="certified accuracy [%]")
            axes.set_ylim(bottom=0.0)
    return figure


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of `kind` ("png" or "pdf"), without date or version: equal data give equal bytes."""
    silent = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=220, metadata=silent[kind])
    return buffer.getvalue()


def to_picture(figure: Figure, name: str, caption: str) -> Picture:
    """The figure for a page; one whose lines have names gets a legend of buttons instead of its own."""
    lines = _named_lines(figure)
    if len(figure.axes) > 1 or not lines or not all(_is_readable(line, _grid(figure)) for line in lines):
        return Picture(f"{name}.png", caption, _to_svg(figure, name))
    legends, (width, height) = figure.legends, figure.get_size_inches()
    figure.legends = []
    figure.set_size_inches(width, height - _LEGEND_ROW_IN * len(lines))
    svg = _to_svg(figure, name)
    chart = _chart(figure, lines, name, svg)
    figure.legends = legends
    figure.set_size_inches(width, height)
    return Picture(f"{name}.png", caption, svg, chart)


def _named_lines(figure: Figure) -> list[Line2D]:
    """In the order of the legend."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_name = {name: line for name, line in zip(labels, handles, strict=True) if isinstance(line, Line2D)}
    order = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [by_name[name] for name in order or by_name if name in by_name]


def _is_readable(line: Line2D, grid: Floats) -> bool:
    """Whether a line says its value at every point of a chart's grid; between few points it would be made up."""
    x = np.asarray(line.get_xdata(), np.float64)
    return str(line.get_drawstyle()).startswith("steps") or np.array_equal(x, grid[: x.size])


def _grid(figure: Figure) -> Floats:
    """Where a chart's curves are read."""
    return np.linspace(*figure.axes[0].get_xlim(), _GRID_POINTS)


def _chart(figure: Figure, lines: Sequence[Line2D], name: str, svg: str) -> Chart:
    """What the page's script needs: the axes' place in the SVG just drawn, and every named line on one grid."""
    (axes,), grid = figure.axes, _grid(figure)
    width, height = 72.0 * figure.get_size_inches()  # an SVG of matplotlib's counts in points
    box = axes.get_position()
    curves = []
    for line in lines:
        x, y = (np.asarray(v, np.float64) for v in line.get_data())
        if str(line.get_drawstyle()).startswith("steps"):
            at = np.searchsorted(x, grid, side="right") - 1
            values = np.where(at >= 0, y[np.maximum(at, 0)], np.nan)
        else:
            values = np.interp(grid, x, y, left=np.nan)
        key = f"{name}-{line.get_gid()}"
        dashes = re.search(rf'id="{key}">.*?style="([^"]*)"', svg, re.DOTALL)
        drawn = re.search(r"stroke-dasharray: ([\d., ]+)", dashes[1] if dashes else "")
        pattern = tuple(float(d) for d in drawn[1].split(",")) if drawn else ()
        curves.append(Curve(key, str(line.get_label()), str(to_hex(line.get_color())), pattern, tuple(values.tolist())))
    return Chart(
        x_name=axes.get_xlabel(),
        grid=tuple(grid.tolist()),
        left=box.x0 * width, right=box.x1 * width, top=(1 - box.y1) * height, bottom=(1 - box.y0) * height,
        curves=tuple(curves),
    )  # fmt: skip


def _to_svg(figure: Figure, name: str) -> str:
    """The figure as one `<svg>` element to put into HTML.

    Prolog and metadata are left out, the width is the page's to choose, and every id carries `name`: several figures on
    one page otherwise share ids.
    """
    buffer = io.StringIO()
    silent = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=silent)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    head, tail = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + tail


@contextmanager
def drawing(panels: int, height_in: float, order: Sequence[str] = ()) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure and its axes, one below the other, to draw into; then it gets the legend of the first, in this order."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(panels, squeeze=False)[:, 0].tolist()
        for number, line in enumerate(_named_lines(figure)):
            line.set_gid(f"curve-{number}")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            by_name = dict(zip(labels, handles, strict=True))
            names = list(order) or labels
            # Outside the axes, so that it covers no curve, on paper of its own, so that it takes none from the axes.
            figure.legend([by_name[n] for n in names], names, loc="outside lower center", frameon=False)
            figure.set_size_inches(_WIDTH_IN, height_in + _LEGEND_ROW_IN * len(names))


def nth_look(index: int) -> dict[str, Any]:
    """Colour and dashes of one curve among others of their kind."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def accuracy_axes(axes: Any, title: str = "") -> None:
    """Name the axes of certified accuracy against the radius."""
    axes.set(title=title, xlabel="certified radius (pixel scale [0, 1])", ylabel="certified accuracy [%]")
    axes.set_ylim(0.0, 101.0)


def draw_curves(axes: Any, methods: Sequence[Method]) -> None:
    """Certified accuracy against the radius into a matplotlib axes, one curve per method."""
    _draw_curves(axes, [(method.name, method, _look(method)) for method in methods])


def _draw_curves(axes: Any, curves: Sequence[tuple[str, Method, dict[str, Any]]]) -> None:
    """Certified accuracy against the radius, (name, method, look) each, up to the largest certified radius."""
    largest = max((float(m.radius[m.correct].max(initial=0.0)) for _, m, _ in curves), default=0.0)
    grid = np.linspace(0.0, 1.02 * largest if largest > 0.0 else 1.0, _GRID_POINTS)
    for name, method, look in curves:
        accuracy = 100.0 * method.accuracy(grid)
        end = int(np.count_nonzero(accuracy)) + 1  # down to 0, then no further along the axis
        axes.plot(grid[:end], accuracy[:end], label=name, **look)
    accuracy_axes(axes)
    axes.set_xlim(0.0, grid[-1])


def _draw_ecdf(axes: Any, values: Floats, colour: str, start: float | None = None) -> None:
    x, y = ecdf(values)
    margin = 0.03 * max(float(x[-1] - x[0]), 1e-3)
    left = start if start is not None else float(x[0]) - margin
    axes.step(np.r_[left, x, x[-1] + margin], 100.0 * np.r_[0.0, y, 1.0], where="post", color=colour, linewidth=2.0)
    axes.set(ylabel="share of examples ≤ x [%]")
    axes.set_ylim(0.0, 101.0)


def _look(method: Method) -> dict[str, Any]:
    if method.kind is Kind.ORACLE:
        return {"color": "black", "linestyle": "--", "linewidth": 1.4}
    if method.kind is Kind.DUAL:
        return {"color": DUAL, "linestyle": "-", "linewidth": 2.6, "marker": "*", "markersize": 9,
                "markevery": (0.09, 0.2)}  # fmt: skip
    if method.kind is Kind.OTHER:
        colour, marker = (each[method.index % len(each)] for each in (_OTHERS, _OTHER_MARKERS))
        return {"color": colour, "linestyle": "-", "linewidth": 1.8, "marker": marker, "markersize": 6,
                "markevery": (0.05, 0.2)}  # fmt: skip
    if method.kind is Kind.IMPORTED:
        dashes = (0, (4 + 2 * (method.index // len(COLOURS)), 1, 1, 1, 1, 1))
        return {"color": COLOURS[-1 - method.index % len(COLOURS)], "linestyle": dashes, "linewidth": 1.2}
    # Marks along the drawn line, staggered so that they stay apart where curves meet.
    marks = (0.02 + 0.03 * method.index + (0.015 if method.kind is Kind.BASELINE else 0.0), 0.2)
    look = nth_look(method.index) | {
        "marker": _MARKERS[method.index % len(_MARKERS)], "markersize": 5, "linewidth": 1.5, "markevery": marks,
    }  # fmt: skip
    if method.kind is Kind.BASELINE:
        return look | {"linestyle": (0, (1, 1.5)), "linewidth": 1.2, "markerfacecolor": "white", "alpha": 0.9}
    return look
