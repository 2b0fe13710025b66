"""The report as files: one list of blocks, written as Markdown and as one self-contained HTML page.

Every number and every claim is computed from `ReportData` here; nothing is asserted that the rows do not show.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from core.csv_text import csv_text
from core.evaluation.metrics import average_certified_radius, dataset_level_bound
from core.files import write_files
from core.procedures.confidence import largest_radius
from core.report import DualRows, Kind, ReportData, RoutedRows
from core.report.pages import (
    NONE,
    Block,
    Heading,
    Picture,
    Section,
    Table,
    Text,
    latex_table,
    markdown_table,
    page_files,
    percent,
    shares_table,
)

__all__ = ["accuracies", "accuracy_table", "best_method_sentence", "format_table", "write_report"]

_RHO: Final = 0.001
_CAPTIONS: Final = {
    "certified_accuracy": "Certified accuracy against the radius. The oracle picks the best sigma with the label in "
    "hand.",
    "sigma_choice": "The estimator's choice of sigma, against the oracle's.",
    "delta_radius": "Empirical distribution of the lost radius and of the spare radius, where measured.",
    "p_lower": "Empirical distribution of the lower bound.",
}


def format_table(data: ReportData) -> str:
    """Certified accuracy (percent) per method and radius, as a Markdown table that also reads in a terminal.

    The best certified methods of a column are bold, unless nothing is certified there; the oracle never is.
    """
    return markdown_table(accuracy_table(data))


def accuracies(data: ReportData) -> dict[str, float]:
    """Certified accuracy of each method at each radius, and its average certified radius, by a name for trackers."""
    found: dict[str, float] = {}
    for m in data.methods():
        name = re.sub(r"[^\w\-./ ]+", "", m.name).replace("  ", " ")
        shares = zip(data.radii, m.accuracy(data.radii), strict=True)
        found |= {f"certified_accuracy/{name}/{radius:g}": float(share) for radius, share in shares}
        found[f"average_certified_radius/{name}"] = average_certified_radius(m.correct, m.radius)
    return found


def best_method_sentence(data: ReportData) -> str:
    """Which method is best at each radius of the table, and at how many of them Dual RS (if it was run) is."""
    leaders = data.leaders()
    by_names: dict[str, list[str]] = {}
    for radius, best in zip(data.radii, leaders, strict=True):
        names = " and ".join(m.name for m in best) + (" (tied)" if len(best) > 1 else "")
        by_names.setdefault(names or "no method certifies a right class", []).append(f"{radius:g}")
    clauses = (f"{names} beyond radius {', '.join(radii)}" for names, radii in by_names.items())
    text = f"Highest certified accuracy: {'; '.join(clauses)}"
    if data.dual is None:
        return text + "."
    wins = [best for best in leaders if any(m.kind is Kind.DUAL for m in best)]
    shared = sum(len(best) > 1 for best in wins)
    count = f"{len(wins)} of {len(leaders)} radii" + (f" (tied with another at {shared} of them)" if shared else "")
    return f"{text}; Dual RS is the best certified method at {count}."


def write_report(data: ReportData, folder: Path, sections: Sequence[Section] = ()) -> list[Path]:
    """Write report.md, report.html, table.csv, table.tex and the figures, then further sections; each file appears
    whole or not at all, those of an earlier report are replaced.

    Returns:
        The paths written: table.csv, table.tex (booktabs), certified_accuracy.{png,pdf}, p_lower.png, sigma_choice.png,
        delta_radius.png (the last two where what they show was measured), those of the sections,
        report.md, report.html.
    """
    from core.report import plots  # matplotlib: half a second that a terminal table does not need

    figures = plots.figures(data)
    files = {"table.csv": _csv(data).encode()}
    files |= {f"{name}.png": plots.to_bytes(figure, "png") for name, figure in figures.items()}
    files["certified_accuracy.pdf"] = plots.to_bytes(figures["certified_accuracy"], "pdf")
    blocks = _blocks(data, {name: plots.to_picture(figure, name, _CAPTIONS[name]) for name, figure in figures.items()})
    files["table.tex"] = _latex(data).encode()
    for section in sections:
        files |= section.files
        blocks += section.blocks
    # The pages last: they name the other files.
    return write_files(folder, files | page_files("report", data.title, blocks, data.manifest))


# What the report says


def accuracy_table(data: ReportData) -> Table:
    """Certified accuracy of each method beyond each radius, the best in bold."""
    rows = [(m.name, m.accuracy(data.radii), m.is_certificate or None) for m in data.methods()]
    return shares_table("Certified accuracy [%] beyond radius", data.radii, rows)


def _interval_table(data: ReportData) -> Table:
    rows = []
    for m in data.methods():
        rows.append((m.name, *(f"{100.0 * low:.2f} – {100.0 * high:.2f}" for *_, low, high in m.intervals(data.radii))))
    return Table(("95% interval [%] beyond radius", *(f"{r:g}" for r in data.radii)), tuple(rows))


def _method_table(data: ReportData) -> Table:
    rows = []
    for m in data.methods():
        clean = float(m.accuracy(np.zeros(1))[0])
        held = m.is_certificate  # the alpha of an imported log is not known
        least = dataset_level_bound(clean, data.num_examples, data.alpha, _RHO) if held and data.alpha else clean
        bound = percent(least) if held else NONE
        abstained = NONE if m.abstained is None else percent(float(m.abstained.mean()))
        draws = (NONE, NONE) if m.num_draws is None else (f"{m.num_draws.mean():,.1f}", f"{m.num_draws.sum():,}")
        radius = f"{average_certified_radius(m.correct, m.radius):.4f}"
        rows.append((m.name, percent(clean), bound, abstained, *draws, radius))
    header = (
        "Method", "Clean certified accuracy (beyond radius 0)", "At least, with 99.9% confidence", "Abstained",
        "Mean draws per example", "Total draws", "Average certified radius (secondary)",
    )  # fmt: skip
    return Table(header, tuple(rows))


def _summary(data: ReportData) -> str:
    sigmas = ", ".join(f"{s:g}" for s in data.sigmas)
    config = data.manifest.get("config")
    seed = data.manifest.get("seed", config.get("seed") if isinstance(config, Mapping) else None)
    text = (
        f"{data.num_examples:,} examples of {data.labels}, certified with n0 = {data.num_selection:,} selection draws "
        f"and n = {data.num_estimation:,} estimation draws per certificate, at failure probability alpha = "
        f"{data.alpha:g} per example. Standard RS spends all of it on one certificate, at each sigma of {{{sigmas}}}."
    )
    if data.dual is None:
        text += " Dual RS was not run."
    elif isinstance(data.dual, DualRows):
        text += (
            f" Dual RS spends {data.alpha_stages[0]:g} on the noise level and {data.alpha_stages[1]:g} on the class; "
            "the claim holds at alpha."
        )
    text += "".join(f" {said}" for rows in (data.dual, *data.others) if rows and (said := rows.summary(data)))
    if data.experts:
        text += (
            " Each sigma has a classifier of its own: a row 'Expert' is standard RS with that one, Dual RS routes "
            "between the experts."
        )
    text += "" if seed is None else f" Seed {seed}."
    counted = "radius > r" if data.strict else "radius >= r"
    text += f" Radii are {data.law.norm}, in the pixel scale [0, 1]; a certificate counts at r when its {counted}."
    return text + _limits(data)


def _limits(data: ReportData) -> str:
    """What there is to say of the norm: certificates without chance, and the l_inf ball inside."""
    text = ""
    if data.law.exhaustive:
        text += (
            " The noise is deterministic: every certificate takes all copies that there are at its sigma (not n), and "
            "alpha is 0. It holds for images of 8 bits."
        )
    splits = data.manifest.get("data")
    test = splits.get("test") if isinstance(splits, Mapping) else None
    shape = test.get("shape") if isinstance(test, Mapping) else None
    if not shape:
        return text
    d = math.prod(shape)
    inside, by = ("sqrt(d)", math.sqrt(d)) if data.law.norm == "l2" else ("d", float(d))
    unit = 255.0 / by
    return text + (
        f" Within an {data.law.norm} ball of radius r lies the l_inf ball of radius r / {inside}: with d = {d:,}, "
        f"{unit:.3g} grey levels for r = 1. That baseline is small by necessity: no smoothing certifies much more than "
        "1 / sqrt(d) in l_inf (Yang et al. 2020, Kumar et al. 2020)."
    )


def _imported_notes(data: ReportData) -> list[str]:
    names = ", ".join(f"{name} ({log.correct.size:,} examples)" for name, log in data.imported.items())
    if not data.imported:
        return []
    return [
        f"Imported logs: {names}. They are shown as they are: on examples of their own, with their rounding of the "
        f"radii, and unchecked. They do not compete for the best method. Radii of this run are {data.law.norm}; a log "
        "does not say of which norm its own are."
    ]


def _reach_notes(data: ReportData) -> list[str]:
    """Where the columns begin that no certificate of this run can fill."""
    reach = data.reach or largest_radius(float(data.sigmas.max()), data.num_estimation, data.alpha, data.law)
    beyond = [f"{radius:g}" for radius in data.radii if radius >= reach]
    if not beyond:
        return []
    return [
        f"Beyond radius {', '.join(beyond)} this run certifies nothing, whatever its networks do: "
        f"{data.num_estimation:,} draws at alpha = {data.alpha:g} reach {reach:.3f} at sigma = "
        f"{data.sigmas.max():g}. There is nothing to compare an imported log with."
    ]


def _stage_table(dual: DualRows) -> Table:
    certified, capped = ~dual.abstained, dual.capped
    everyone = np.ones_like(certified)
    lines = (
        ("Both stages certified, of all examples", certified, everyone),
        ("Estimator abstained, of all examples", dual.estimator_abstained, everyone),
        ("Classifier abstained after the estimator certified, of all examples",
         dual.abstained & ~dual.estimator_abstained, everyone),
        ("Radius capped by R_sigma, of the certified examples", capped & certified, certified),
        ("Radius capped by R_sigma, of all examples", capped, everyone),
    )  # fmt: skip
    counts = ((name, int(hits.sum()), int(of.sum())) for name, hits, of in lines)
    rows = tuple((name, f"{hits:,} of {of:,}", percent(hits / of) if of else NONE) for name, hits, of in counts)
    return Table(("Dual RS", "Examples", "Share"), rows)


def _choice_table(data: ReportData, dual: RoutedRows) -> Table:
    chosen, certified, best = data.choice_counts()
    columns = {
        "Chosen by the estimator": (*chosen, 0),
        "Certified by the estimator": (*certified, dual.estimator_abstained.sum()),
        "Best in hindsight": (*best, data.num_examples - best.sum()),
    }
    if not isinstance(dual, DualRows):
        del columns["Certified by the estimator"]  # the claim is not about it
    names = (*(f"{sigma:g}" for sigma in data.sigmas), "none")
    counts = zip(names, *columns.values(), strict=True)
    return Table(("sigma", *columns), tuple((name, *(f"{count:,}" for count in row)) for name, *row in counts))


def _dual_blocks(data: ReportData, dual: RoutedRows, pictures: Mapping[str, Picture]) -> list[Block]:
    agree = data.choice_agreement()
    said = "No sigma certifies the right class of any example." if np.isnan(agree) else (
        f"Where some sigma certifies the right class, the estimator chose the best one for {percent(agree)} "
        "of the examples (ties count for the smaller sigma)."
    )  # fmt: skip
    staged: list[Block] = []
    if isinstance(dual, DualRows):
        staged = [Heading("Dual RS, stage by stage"), _stage_table(dual)]
    blocks: list[Block] = [
        *staged, *dual.blocks(data),
        Heading("Choice of the noise level"), Text(said), _choice_table(data, dual),
        pictures["sigma_choice"],
        Heading("Lost and spare radius"),
    ]  # fmt: skip
    lost, slack = data.lost_radius(), dual.slack()
    if data.standard_at_dual_alpha is None:
        blocks.append(Text("The radius lost to the choice of sigma was not measured."))
    else:
        text = f"Some sigma certifies the right class (R_c* > 0) of {lost.size:,} of {data.num_examples:,} examples."
        if lost.size:
            text += (
                " Over these, Delta R_c = R_c* - R_c at the classifier's share of alpha has median "
                f"{np.median(lost):.4f} and 90% quantile {np.quantile(lost, 0.9):.4f}; "
                f"{percent(float((lost <= 0.0).mean()))} lose nothing."
            )
        blocks.append(Text(text))
    text = f"Both stages certify {slack.size:,} of {data.num_examples:,} examples." if staged else ""
    if slack.size:
        text += (
            f" Over these, Delta R_sigma = R_sigma - R_c has median {np.median(slack):.4f};"
            f" it is negative for {percent(float((slack < 0.0).mean()))}, where the estimator caps the radius."
        )
    blocks += [Text(text)] if text else []
    if "delta_radius" in pictures:
        blocks.append(pictures["delta_radius"])
    return blocks


def _blocks(data: ReportData, pictures: Mapping[str, Picture]) -> list[Block]:
    blocks: list[Block] = [
        Text(_summary(data)), *(Text(note) for note in (*data.notes, *_reach_notes(data), *_imported_notes(data))),
        Heading("Certified accuracy"), Text(best_method_sentence(data)), accuracy_table(data),
        pictures["certified_accuracy"],
        Heading("How sure the accuracies are"),
        Text("Exact intervals (Clopper-Pearson, 95% each) over the draw of the test set, for one method at one radius."
              " The methods share their examples, so these intervals are no test of a difference between two of them."),
        _interval_table(data),
        Heading("Per method"),
        Text("The column 'At least' allows for certificates that are wrong: each bound holds with probability 99.9% "
              "over their noise, on these examples. The average certified radius favours large radii on easy examples; "
              "judge by the curve."),
        _method_table(data),
    ]  # fmt: skip
    for rows in data.others:
        blocks += rows.blocks(data)
    if data.dual is not None:
        blocks += _dual_blocks(data, data.dual, pictures)
    text = "Up to one half (dashed) nothing is certified."
    if isinstance(data.dual, DualRows):
        text += " Dual RS counts as 0 where its estimator abstained and its classifier was not run."
    blocks += [Heading("Lower bound of the top class's probability"), Text(text), pictures["p_lower"]]
    steps = data.manifest.get("steps")
    if isinstance(steps, Mapping) and (table := _steps_table(steps)).rows:
        blocks += [Heading("What it took"), table]
    return blocks


def _csv(data: ReportData) -> str:
    """One line per method and radius; shares, unrounded."""
    rows = [(m.name, m.is_certificate, *row) for m in data.methods() for row in m.intervals(data.radii)]
    return csv_text(("method", "is_certificate", "radius", "certified_accuracy", "ci95_lower", "ci95_upper"), rows)


def _latex(data: ReportData) -> str:
    claim = f"{data.labels}, {data.num_examples} examples, n = {data.num_estimation}, alpha = {data.alpha:g}"
    if data.imported:
        claim += "; imported logs: examples and settings of their own"
    accuracy = latex_table(accuracy_table(data), f"Certified accuracy ({claim}).")
    intervals = latex_table(_interval_table(data), f"95% Clopper-Pearson intervals over the test set ({claim}).")
    return f"{accuracy}\n{intervals}"


def _steps_table(steps: Mapping[str, Mapping[str, object]]) -> Table:
    """What each certifying step drew and took, from the manifest."""
    rows = []
    for name, step in steps.items():
        if (seconds := step.get("duration_s")) is None:
            continue
        draws, device = step.get("draws_this_call"), step.get("devices")
        where = ", ".join(map(str, device)) if isinstance(device, list) else NONE
        rows.append((name, f"{step.get('rows', 0):,}", NONE if draws is None else f"{draws:,}", f"{seconds:,}", where))
    return Table(("Step (its last call)", "Rows", "Draws", "Wall time [s]", "Device"), tuple(rows))
