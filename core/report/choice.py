"""Which Sigma to use, as a table, CSV, JSON and a figure."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from core.csv_text import csv_text
from core.evaluation.choice import Candidate, Choice
from core.report import Floats
from core.report.pages import Table, markdown_table
from core.report.plots import accuracy_axes, drawing, nth_look

__all__ = ["choice_csv", "choice_figure", "choice_json", "format_choice", "format_curve", "recommended"]


def recommended(choice: Choice, size: int) -> int:
    """Place of the best candidate with `size` levels: by the router, then by what a better router could reach."""
    return next(place for place, candidate in enumerate(choice.candidates) if len(candidate.levels) == size)


def format_choice(choice: Choice, sigmas: Floats, shown: Sequence[int]) -> str:
    """Candidates by place, as a Markdown table: scores are percentages, averaged over the radii."""
    header = ["Sigma", "router", "behind the best", "best single", "oracle", "wins"]
    header += ["test: router", "test: best single", "test: oracle"] if choice.evaluation else []
    rows = []
    behind, error = choice.behind, choice.behind_error
    for place in shown:
        each = choice.candidates[place]
        row = [_name(each, sigmas), _share(each.score, each.standard_error), _share(behind[place], error[place])]
        row += [_share(float(curve.mean())) for curve in (each.single, each.oracle)]
        row += [f"{100 * choice.wins[place]:.0f}%"]
        if choice.evaluation:
            test = choice.evaluation[place]
            row += [_share(test.score, test.standard_error)]
            row += [_share(float(curve.mean())) for curve in (test.single, test.oracle)]
        rows.append(tuple(row))
    return markdown_table(Table(tuple(header), tuple(rows)))


def format_curve(choice: Choice, place: int, radii: Floats) -> str:
    """What one candidate is expected to certify at each radius, in percent, with standard errors."""
    samples = [("training split", choice.candidates[place])]
    samples += [("test split", choice.evaluation[place])] if choice.evaluation else []
    rows = []
    for where, each in samples:
        for name in ("single", "router", "oracle"):
            curve = getattr(each, name)
            error = np.sqrt(curve * (1.0 - curve) / each.values.size)
            title = f"{'best ' if name == 'single' else ''}{name}, {where}"
            rows.append((title, *(_share(c, e) for c, e in zip(curve.tolist(), error.tolist(), strict=True))))
    return markdown_table(Table(("certified accuracy", *(f"r = {radius:g}" for radius in radii)), tuple(rows)))


def choice_csv(choice: Choice, sigmas: Floats, radii: Floats) -> str:
    """All candidates, unrounded, best first."""
    rows = _rows(choice, sigmas, radii)
    return csv_text(list(rows[0]), ({**row, "sigmas": " ".join(map(str, row["sigmas"]))}.values() for row in rows))


def choice_json(choice: Choice, sigmas: Floats, radii: Floats, place: int) -> str:
    """All candidates, unrounded, and which is recommended."""
    plain = {
        "recommended": [float(sigmas[level]) for level in choice.candidates[place].levels],
        "radii": radii.tolist(),
        "optimism_of_halves": choice.optimism,
        "candidates": _rows(choice, sigmas, radii),
    }
    return json.dumps(plain, indent=2) + "\n"


def choice_figure(choice: Choice, sigmas: Floats, radii: Floats, shown: Sequence[int]) -> Figure:
    """Oracle and router of a few candidates against the radii that were asked for, on the test split if it is there."""
    of = choice.evaluation or choice.candidates
    names = [_name(of[place], sigmas) for place in shown]
    with drawing(2, 6.4, names) as (figure, panels):
        for axes, which, title in zip(
            panels, ("router", "oracle"), ("Light router", "Oracle (not a certificate)"), strict=True
        ):
            for number, (place, name) in enumerate(zip(shown, names, strict=True)):
                curve = 100.0 * getattr(of[place], which)
                axes.plot(radii, curve, label=name, marker="o", markersize=4, **nth_look(number))
            accuracy_axes(axes, title)
    return figure


def _rows(choice: Choice, sigmas: Floats, radii: Floats) -> list[dict[str, Any]]:
    rows = []
    behind, error = choice.behind, choice.behind_error
    for place, each in enumerate(choice.candidates):
        row: dict[str, Any] = {
            "sigmas": [float(sigmas[level]) for level in each.levels],
            "score": each.score,
            "standard_error": each.standard_error,
            "behind": float(behind[place]),
            "behind_error": float(error[place]),
            "wins": float(choice.wins[place]),
        }
        samples = [("", each)] + ([("test_", choice.evaluation[place])] if choice.evaluation else [])
        for prefix, sample in samples:
            for name in ("single", "router", "oracle"):
                curve = getattr(sample, name).tolist()
                row |= {f"{prefix}{name}@{radius:g}": value for radius, value in zip(radii, curve, strict=True)}
        rows.append(row)
    return rows


def _name(candidate: Candidate, sigmas: Floats) -> str:
    return "[" + ", ".join(f"{sigmas[level]:g}" for level in candidate.levels) + "]"


def _share(value: float, error: float | None = None) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
