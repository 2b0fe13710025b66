"""The section of a report that compares the rounds of the alternation."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from core.csv_text import csv_text
from core.errors import DataError
from core.evaluation.metrics import average_certified_radius, reached
from core.report import Kind, Method, ReportData
from core.report.pages import NONE, Block, Heading, Section, Table, Text, markdown_table, percent, shares_table

__all__ = ["rounds_section"]


def rounds_section(rounds: Sequence[ReportData]) -> Section:
    """Dual RS round by round, the first one first: table, curves, summary numbers, examples gained and lost.

    Raises:
        DataError: for a round without Dual RS, or of another number of examples.
    """
    from core.report import plots

    if any(data.dual is None or data.num_examples != rounds[0].num_examples for data in rounds):
        raise DataError("rounds can be compared where each has certificates of Dual RS for the same examples")
    radii = rounds[0].radii
    methods = {f"Round {number}": _dual(data) for number, data in enumerate(rounds, 1)}
    shares = {name: method.accuracy(radii) for name, method in methods.items()}
    rows = [(name, row, True) for name, row in shares.items()]
    accuracy = shares_table("Dual RS, certified accuracy [%] beyond radius", radii, rows)
    figure = plots.curves_figure(methods)
    blocks: list[Block] = [
        Heading("Rounds"),
        Text(
            "Each round after the first repeats labels, estimator and fine-tuning on the classifier that the round "
            "before has fine-tuned, with noise of its own. A round that is picked because these numbers favour it has "
            "been picked on the test examples: to report one, fix the number of rounds beforehand."
        ),
        accuracy,
        plots.to_picture(figure, "rounds", "Dual RS, round by round."),
        _summary(rounds),
        Text("Examples whose right class is certified beyond a radius in a round and not in the round before (+), and "
             "the other way round (-)."),
        _changes(radii, methods),
    ]  # fmt: skip
    lines = (
        (number, float(radius), float(share))
        for number, row in enumerate(shares.values(), 1)
        for radius, share in zip(radii, row, strict=True)
    )
    content = csv_text(("round", "radius", "certified_accuracy"), lines).encode()
    files = {"rounds.png": plots.to_bytes(figure, "png"), "rounds.csv": content}
    return Section(markdown_table(accuracy), tuple(blocks), files)


def _dual(data: ReportData) -> Method:
    return next(method for method in data.methods() if method.kind is Kind.DUAL)


def _summary(rounds: Sequence[ReportData]) -> Table:
    rows = []
    for number, data in enumerate(rounds, 1):
        method, lost, agreement = _dual(data), data.lost_radius(), data.choice_agreement()
        assert data.dual is not None
        rows.append(
            (
                f"Round {number}",
                percent(float(data.dual.abstained.mean())),
                percent(float(data.dual.estimator_abstained.mean())),
                percent(float(data.dual.capped.mean())),
                NONE if np.isnan(agreement) else percent(agreement),
                f"{np.median(lost):.4f}" if lost.size else NONE,
                f"{data.oracle[1].mean():.4f}",
                f"{average_certified_radius(method.correct, method.radius):.4f}",
                f"{data.dual.num_draws.mean():,.1f}",
            )
        )
    header = (
        "Dual RS", "Abstained", "Estimator abstained", "Radius capped by R_sigma",
        "Best sigma chosen, where one certifies", "Median radius lost to the choice", "Average radius of the oracle",
        "Average certified radius", "Mean draws per example",
    )  # fmt: skip
    return Table(header, tuple(rows))


def _changes(radii: np.ndarray, methods: dict[str, Method]) -> Table:
    beyond = {
        name: reached(np.where(method.correct, method.radius, 0.0), radii, method.strict) > 0.0
        for name, method in methods.items()
    }
    rows = []
    for (before, old), (name, new) in pairwise(beyond.items()):
        gained, lost = (new & ~old).sum(axis=0), (old & ~new).sum(axis=0)
        rows.append((f"{name} against {before.lower()}", *(f"+{g} -{k}" for g, k in zip(gained, lost, strict=True))))
    return Table(("Examples beyond radius", *(f"{radius:g}" for radius in radii)), tuple(rows))
