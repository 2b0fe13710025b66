"""The section of a report on distribution shift: global noise levels and Dual RS on corrupted test sets."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.csv_text import csv_text
from core.errors import DataError
from core.report import Floats, Kind, Method, ReportData
from core.report.pages import Block, Heading, Section, Table, Text, markdown_table, shares_table

__all__ = ["Shifted", "shift_section"]


@dataclass(frozen=True, eq=False)
class Shifted:
    """A corrupted test set: which corruption, how severe (1 to 5; 0 is the clean set), and its certificates."""

    corruption: str
    severity: int
    data: ReportData


def shift_section(clean: ReportData, sets: Sequence[Shifted]) -> Section:
    """Certified accuracy per corruption and severity (0: the clean set) of the methods that all sets have, their mean,
    and the noise levels chosen.

    Raises:
        DataError: for other radii than those of `clean`.
    """
    from core.report import plots

    for each in sets:
        if not np.array_equal(each.data.radii, clean.radii):
            raise DataError(f"{each.corruption}, severity {each.severity}: has other radii than the run")
    everyone = (clean, *(each.data for each in sets))
    names = set.intersection(*({method.name for method in _certified(data)} for data in everyone))
    methods = _certified(clean, names)
    corruptions = sorted({each.corruption for each in sets})
    everywhere = [Shifted(name, 0, clean) for name in corruptions] + list(sets)
    tables = {
        (each.corruption, each.severity): np.stack([m.accuracy(clean.radii) for m in _certified(each.data, names)])
        for each in everywhere
    }
    severities = sorted({each.severity for each in everywhere})
    complete = [name for name in corruptions if all((name, severity) in tables for severity in severities)]
    sizes = sorted({each.data.num_examples for each in sets})
    blocks: list[Block] = [
        Heading("Distribution shift"),
        Text(
            f"The networks of this run, as they are, on {len(sets)} corrupted test sets of "
            f"{' or '.join(f'{size:,}' for size in sizes)} examples (severity 0: the clean one, {clean.num_examples:,} "
            "examples). A certificate is about the neighbourhood of the corrupted image. The best certified method of "
            "a severity is bold."
        ),
    ]
    files: dict[str, bytes] = {"shift.csv": _csv([Shifted("none", 0, clean), *sets], names)}
    summary = None
    if complete:
        mean = {each: np.mean([tables[name, each] for name in complete], axis=0) for each in severities}
        summary = shares_table("Certified accuracy [%] beyond radius", clean.radii, _rows(mean, methods))
        places = dict.fromkeys((0, len(clean.radii) // 2))
        shown = {f"beyond radius {clean.radii[place]:g}": place for place in places}
        panels = {title: np.stack([mean[s][:, place] for s in severities]) for title, place in shown.items()}
        figure = plots.severity_figure(severities, methods, panels)
        files["shift.png"] = plots.to_bytes(figure, "png")
        caption = f"Certified accuracy against severity, mean over {', '.join(complete)}."
        picture = plots.to_picture(figure, "shift", caption)
        blocks += [Text(f"Mean over the corruptions with every severity: {', '.join(complete)}."), summary, picture]
    else:
        blocks.append(Text("No corruption was certified at every severity shown, so no mean over them is given."))
    for name in corruptions:
        own = {severity: tables[name, severity] for severity in severities if (name, severity) in tables}
        blocks.append(shares_table(f"{name}: certified accuracy [%] beyond radius", clean.radii, _rows(own, methods)))
    if clean.dual is not None:
        choices = _choices(clean, sets)
        blocks += [Text("Share of the examples for which the estimator chose each sigma, certified or not."), choices]
        terminal = markdown_table(summary or choices)
    else:
        terminal = markdown_table(summary) if summary else f"{len(sets)} corrupted sets"
    return Section(terminal, tuple(blocks), files)


def _certified(data: ReportData, names: Collection[str] | None = None) -> list[Method]:
    """The methods that certify with the networks of the run, in their order; those of these names."""
    methods = [method for method in data.methods() if method.is_certificate and method.kind is not Kind.BASELINE]
    return [method for method in methods if names is None or method.name in names]


def _rows(tables: Mapping[int, Floats], methods: Sequence[Method]) -> list[tuple[str, Floats, object]]:
    """A row per severity and method, which competes within its severity."""
    return [
        (f"{severity}{' (clean)' if severity == 0 else ''}: {method.name}", values, severity)
        for severity, shares in sorted(tables.items())
        for method, values in zip(methods, shares, strict=True)
    ]


def _choices(clean: ReportData, sets: Iterable[Shifted]) -> Table:
    rows = []
    for each in (Shifted("clean", 0, clean), *sets):
        name = each.corruption if each.severity == 0 else f"{each.corruption}, severity {each.severity}"
        if each.data.dual is None:
            continue
        chosen, total = each.data.choice_counts()[0], each.data.num_examples
        abstained = float(each.data.dual.estimator_abstained.mean())
        rows.append((name, *(f"{100.0 * count / total:.1f}%" for count in chosen), f"{100.0 * abstained:.1f}%"))
    header = ("Test set", *(f"sigma = {sigma:g}" for sigma in clean.sigmas), "Estimator abstained")
    return Table(header, tuple(rows))


def _csv(sets: Iterable[Shifted], names: Collection[str]) -> bytes:
    """One line per set, method and radius; shares, unrounded."""
    columns = ("corruption", "severity", "method", "radius", "examples", "certified_accuracy")
    rows = [
        (each.corruption, each.severity, method.name, radius, method.num_examples, *row)
        for each in sets
        for method in _certified(each.data, names)
        for radius, *row in method.intervals(each.data.radii)
    ]
    return csv_text((*columns, "ci95_lower", "ci95_upper"), rows).encode()
