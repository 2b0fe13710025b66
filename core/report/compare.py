"""Several runs on one page: their curves, their tables, and what is different about them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.csv_text import csv_text
from core.errors import DataError
from core.evaluation.metrics import average_certified_radius, paired_difference, reached
from core.files import write_files
from core.report import Floats, Kind, Method, ReportData
from core.report.headroom import radius_cells
from core.report.pages import (
    NONE,
    Block,
    Heading,
    Table,
    Text,
    latex_table,
    markdown_table,
    page_files,
    percent,
    shares_table,
)

__all__ = ["accuracy_table", "format_comparison", "paired_table", "write_comparison"]

_TITLE: Final = "Comparison of runs"
_PAIRED: Final = "± is the standard error of a mean difference over the same examples."


def write_comparison(runs: Mapping[str, ReportData], folder: Path) -> list[Path]:
    """Write comparison.html, comparison.md, comparison.csv, comparison.tex and the figures of two runs at least, shown
    under their names; returns the paths.

    Raises:
        DataError: for fewer than two runs, or radii or ways of counting (`strict`) that differ.
    """
    from core.report import plots

    plain, runs = runs, _marked(runs)
    first = next(iter(runs.values()), None)
    if first is None or len(runs) < 2:
        raise DataError("a comparison needs two runs at least")
    for name, data in runs.items():
        if not np.array_equal(data.radii, first.radii) or data.strict != first.strict:
            raise DataError(f"{name} is counted at other radii or in another way than {next(iter(runs))}")
    curves = _curves(runs)
    figures = {title: plots.curves_figure(found) for title, found in curves.items()}
    files_of = {title: f"comparison_{_file_name(title)}" for title in figures}
    accuracy, differences = accuracy_table(runs), _differences(runs)
    blocks: list[Block] = [
        Text(f"{len(runs)} runs. Runs with other numbers of draws or another alpha are shown side by side but are no "
             "test of one against the other."),
        Text(_sets_sentence(runs)), Heading("Certified accuracy"), accuracy,
    ]  # fmt: skip
    if (paired := paired_table(runs)).rows:
        blocks += [Heading("Less the first run"), Text(_PAIRED), paired]
    for title, figure in figures.items():
        caption = f"{title}: certified accuracy against the radius, run by run."
        blocks += [Heading(title), plots.to_picture(figure, files_of[title], caption)]
    blocks += [Heading("In numbers"), _summary(runs), Heading("What differs in their configurations")]
    blocks.append(differences if differences.rows else Text("Nothing."))
    manifests = {name: dict(data.manifest) for name, data in runs.items()}
    files = {
        f"{files_of[title]}.{kind}": plots.to_bytes(figure, kind)
        for kind in ("png", "pdf")
        for title, figure in figures.items()
    }
    files["comparison.csv"] = _csv(plain).encode()
    files["comparison.tex"] = latex_table(accuracy, f"Certified accuracy, run by run. {_sets_sentence(runs)}").encode()
    return write_files(folder, files | page_files("comparison", _TITLE, blocks, manifests))


def format_comparison(runs: Mapping[str, ReportData]) -> str:
    """The tables of certified accuracies and of their differences for a terminal, and on which test sets they are."""
    runs = _marked(runs)
    shown = f"{markdown_table(accuracy_table(runs))}\n{_sets_sentence(runs)}"
    paired = paired_table(runs)
    return f"{shown}\n\n{markdown_table(paired)}\n{_PAIRED}" if paired.rows else shown


def accuracy_table(runs: Mapping[str, ReportData]) -> Table:
    """Certified accuracy (percent), a row per run and method.

    The best certificate of each radius is bold, where all runs are on the same test set. Neither an oracle nor an
    imported log is one.
    """
    radii = next(iter(runs.values())).radii
    comparable = len({_test_set(data) for data in runs.values()}) == 1
    rows = [
        (f"{name}: {_name(method)}", method.accuracy(radii), (comparable and method.is_certificate) or None)
        for name, data in runs.items()
        for method in data.methods()
    ]
    return shares_table("Certified accuracy [%] beyond radius", radii, rows)


def paired_table(runs: Mapping[str, ReportData]) -> Table:
    """What each certificate of the other runs has beyond the first run's of the same name or level, with the standard
    error of the paired difference: mean radius, then certified accuracy. No rows for runs on other examples.
    """
    (first, base), *others = runs.items()
    radii, own = base.radii, {_called(method): method for method in base.methods() if method.is_certificate}

    def columns(method: Method) -> Floats:
        radius = np.where(method.correct, method.radius, 0.0)
        return np.column_stack([radius, reached(radius, radii, method.strict)])

    def gap(method: Method) -> list[str]:
        return radius_cells(*paired_difference(columns(method), columns(own[_called(method)])))

    rows = tuple(
        (f"{name} less {first}: {method.name}", *gap(method))
        for name, data in others
        if _test_set(data) == _test_set(base)
        for method in data.methods()
        if method.is_certificate and _called(method) in own
    )
    return Table(("Certified accuracy [%] beyond radius", "Mean radius", *(f"{r:g}" for r in radii)), rows)


def _called(method: Method) -> tuple[Kind, str]:
    """What tells a certificate from the others of its run: of a level its sigma, an expert's or not."""
    return method.kind, method.name.rpartition("sigma = ")[2]


def _curves(runs: Mapping[str, ReportData]) -> dict[str, dict[str, Method]]:
    """What is drawn, by title: Dual RS, each further method, and the oracle, run by run."""
    found: dict[str, dict[str, Method]] = {}
    for kind in (Kind.DUAL, Kind.OTHER, Kind.ORACLE):
        for name, data in runs.items():
            for method in data.methods():
                if method.kind is kind:
                    title = "Oracle over Sigma (no certificate)" if kind is Kind.ORACLE else method.name
                    found.setdefault(title, {})[name] = method
    return found


def _file_name(title: str) -> str:
    """`Dual RS` -> `dual`, `Dual RS, agreement` -> `dual-agreement`, `Oracle over Sigma ...` -> `oracle`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace(" rs", "").partition(" over ")[0])


def _name(method: Method) -> str:
    own = f" ({method.num_examples:,} examples of its own)" if method.kind is Kind.IMPORTED else ""
    return f"{method.name}{own}"


def _test_set(data: ReportData) -> tuple[str, int, str, str]:
    """Which examples a run is on: data set, how many, the fingerprint that the run keeps of them, and the norm."""
    splits = data.manifest.get("data")
    test = splits.get("test") if isinstance(splits, Mapping) else None
    digest = str(test.get("digest", "")) if isinstance(test, Mapping) else ""
    return data.labels, data.num_examples, digest, data.law.norm


def _marked(runs: Mapping[str, ReportData]) -> Mapping[str, ReportData]:
    """The runs, with their test set in each name where they are on several."""
    sets = {name: _test_set(data) for name, data in runs.items()}
    distinct = set(sets.values())
    if len(distinct) < 2:
        return runs
    same = len({each[:2] for each in distinct}) < len({each[:3] for each in distinct})  # name and size say too little
    norms = len({each[3] for each in distinct}) > 1
    found = {}
    for name, (labels, number, digest, norm) in sets.items():
        mark = (f", set {digest[:8] or 'unknown'}" if same else "") + (f", {norm} radii" if norms else "")
        found[f"{name} ({number:,} of {labels}{mark})"] = runs[name]
    return found


def _sets_sentence(runs: Mapping[str, ReportData]) -> str:
    sets = {_test_set(data) for data in runs.values()}
    if len(sets) == 1:
        ((labels, number, _, norm),) = sets
        radii = "" if norm == "l2" else f" Radii are {norm}."
        return (
            f"All on the same {number:,} examples of {labels}. The best certificate beyond each radius is bold.{radii}"
        )
    if len({norm for *_, norm in sets}) > 1:
        return (
            "Radii are of several norms, named with each run. An l1 ball lies in the l2 ball of its radius, so that l1 "
            "certificates claim less at the same radius: none is called the best, and no difference is taken."
        )
    return (
        f"The runs are on {len(sets)} different test sets, named with each run: none of them is called the best, and a "
        "difference between two of them may be one between their examples."
    )


def _summary(runs: Mapping[str, ReportData]) -> Table:
    header = (
        "Run", "Examples", "n0", "n", "alpha", "Dual RS abstained", "Capped by R_sigma", "Best sigma chosen",
        "Mean draws", "Average certified radius",
    )  # fmt: skip
    rows = []
    for name, data in runs.items():
        claim = (f"{data.num_examples:,}", f"{data.num_selection:,}", f"{data.num_estimation:,}", f"{data.alpha:g}")
        dual: tuple[str, ...] = (NONE,) * 5
        if (d := data.dual) is not None:
            agreement = data.choice_agreement()
            dual = (
                percent(d.abstained.mean()),
                percent(d.capped.mean()),
                NONE if np.isnan(agreement) else percent(agreement),
                f"{d.num_draws.mean():,.1f}",
                f"{average_certified_radius(d.correct, d.radius):.4f}",
            )
        rows.append((name, *claim, *dual))
    return Table(header, tuple(rows))


def _differences(runs: Mapping[str, ReportData]) -> Table:
    flat = {name: _flat(data.manifest.get("config", {})) for name, data in runs.items()}
    keys = sorted({key for values in flat.values() for key in values})
    rows = []
    for key in keys:
        values = [flat[name].get(key, NONE) for name in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Table(("Key", *runs), tuple(rows))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    parts = [_flat(each, f"{prefix}.{key}" if prefix else str(key)) for key, each in value.items()]
    return {key: text for part in parts for key, text in part.items()}


def _csv(runs: Mapping[str, ReportData]) -> str:
    header = ("run", "method", "is_certificate", "examples", "radius", "certified_accuracy", "ci95_lower", "ci95_upper")
    methods = [(name, m, data.radii) for name, data in runs.items() for m in data.methods()]
    lines = [(name, m.name, m.is_certificate, m.num_examples, *row) for name, m, r in methods for row in m.intervals(r)]
    return csv_text(header, lines)
