"""Logs of certificates side by side, without a run of one's own: a table, the curves, and how sure the numbers are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.csv_text import csv_text
from core.evaluation.exchange import CertifyLog
from core.evaluation.metrics import average_certified_radius
from core.files import write_files
from core.report import Kind, Method
from core.report.pages import Block, Heading, Table, Text, latex_table, markdown_table, page_files

__all__ = ["format_logs", "write_logs"]

_TITLE: Final = "Certified accuracy of logs"


def write_logs(logs: Mapping[str, CertifyLog], radii: NDArray[np.float64], strict: bool, folder: Path) -> list[Path]:
    """Write logs.html, logs.md, logs.csv, logs.tex and the figure, each log under its name; returns the paths. A
    certificate counts where its radius > r if `strict`, otherwise radius >= r.
    """
    from core.report import plots

    methods = _methods(logs, strict)
    table, figure = _table(methods, radii), plots.curves_figure({method.name: method for method in methods})
    blocks: list[Block] = [
        Text(_sentence(logs, strict)), table,
        plots.to_picture(figure, "logs", "Certified accuracy against the radius."),
        Heading("95% intervals (Clopper-Pearson, over the draw of the test examples)"), _intervals(methods, radii),
    ]  # fmt: skip
    files = {f"logs.{kind}": plots.to_bytes(figure, kind) for kind in ("png", "pdf")} | {
        "logs.csv": _csv(methods, radii).encode(),
        "logs.tex": latex_table(table, _sentence(logs, strict)).encode(),
    }
    return write_files(folder, files | page_files("logs", _TITLE, blocks, {}))


def format_logs(logs: Mapping[str, CertifyLog], radii: NDArray[np.float64], strict: bool) -> str:
    """The table for a terminal."""
    return f"{markdown_table(_table(_methods(logs, strict), radii))}\n{_sentence(logs, strict)}"


def _methods(logs: Mapping[str, CertifyLog], strict: bool) -> list[Method]:
    return [
        Method(name, Kind.STANDARD, index, log.correct, log.radius, None, log.abstained, None, strict)
        for index, (name, log) in enumerate(logs.items())
    ]


def _table(methods: list[Method], radii: NDArray[np.float64]) -> Table:
    header = ("Certified accuracy [%] beyond radius", *(f"{r:g}" for r in radii), "Mean radius", "Examples")
    rows = tuple(
        (
            method.name,
            *(f"{100.0 * share:.2f}" for share in method.accuracy(radii)),
            f"{average_certified_radius(method.correct, method.radius):.4f}",
            f"{method.num_examples:,}",
        )
        for method in methods
    )
    return Table(header, rows)


def _intervals(methods: list[Method], radii: NDArray[np.float64]) -> Table:
    rows = (
        (m.name, *(f"{100 * low:.1f} to {100 * high:.1f}" for *_, low, high in m.intervals(radii))) for m in methods
    )
    return Table(("Log", *(f"{r:g}" for r in radii)), tuple(rows))


def _sentence(logs: Mapping[str, CertifyLog], strict: bool) -> str:
    same = len({tuple(sorted(log.idx.tolist())) for log in logs.values()}) == 1
    on = "All on the same examples, by their numbers" if same else "Not all on the same examples"
    return (
        f"{on}; counted where the radius is {'larger than' if strict else 'at least'} r. What a log says is taken as "
        "it is: draws, alpha and rounding of its radii are its own."
    )


def _csv(methods: list[Method], radii: NDArray[np.float64]) -> str:
    lines = [(method.name, method.num_examples, *row) for method in methods for row in method.intervals(radii)]
    return csv_text(("log", "examples", "radius", "certified_accuracy", "ci95_lower", "ci95_upper"), lines)
