"""The section of a report on what lies between the oracle and a routed method: which part to mend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from core.csv_text import csv_text
from core.errors import DataError
from core.evaluation.metrics import paired_difference, reached
from core.report import Bools, DualRows, Floats, Ints, ReportData
from core.report.agreement import CONSTANT, AgreementRows
from core.report.pages import Block, Heading, Section, Table, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Routed", "agreement_claims", "dual_claim", "headroom", "headroom_sections", "radius_cells"]


_ORACLE: Final = "oracle"
_LEVEL: Final = "wrong level"
_ALPHA: Final = "price of alpha"
_REACH: Final = "capped by the router's reach"
_CLASS: Final = "capped by the class at another level"
_ABSTAINED: Final = "abstained"
_MENDED_BY: Final = {
    _LEVEL: "a router that picks better (more labelled images, a better network: estimator.backbone)",
    _ALPHA: "more draws (certify.num_estimation); where the level has to stay also certify.alpha_split=full",
    _REACH: "a router that is surer, or reaches further where it is sure (certify.num_estimation, sigma_e)",
    _CLASS: "a classifier that answers the same at neighbouring levels, or levels that are closer together",
    _ABSTAINED: "a router with a majority (estimator.consistency_lambda, fewer levels) or more draws",
}
_COLOURS: Final = {_LEVEL: "#E69F00", _ALPHA: "#CC79A7", _REACH: "#0072B2", _CLASS: "#56B4E9", _ABSTAINED: "#7F7F7F"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Routed:
    """What one claim of a routed method says of N examples.

    Attributes:
        name: of the claim, distinct within a report.
        choice: int64 ``(N,)``, index into Sigma of m, the level that the router's selection draws name.
        at_share: float64 ``(N,)``, radius of the class at m at its share of alpha; any value where that class is wrong.
        certified: float64 ``(N,)``, certified radius, 0 where the class is wrong or nothing is certified.
        by_router: bool ``(N,)``, whether the router's reach gives that radius; where neither does, the class at m does.
        by_class: bool ``(N,)``, whether the class at another level gives it; None for a claim that asks no other level.
    """

    name: str
    choice: Ints
    at_share: Floats
    certified: Floats
    by_router: Bools
    by_class: Bools | None = None


def dual_claim(rows: DualRows, at_share: Floats) -> Routed:
    """Neither the class nor the level changes (arXiv 2512.01782); ``(N, K)`` `at_share` is standard RS at each level,
    at the class's share of alpha.
    """
    return Routed(
        name=rows.name,
        choice=rows.sigma_choice,
        at_share=at_share[np.arange(rows.sigma_choice.size), rows.sigma_choice],
        certified=np.where(rows.correct, rows.radius, 0.0),
        by_router=np.asarray(rows.bounded_by == "sigma"),
    )


def agreement_claims(rows: AgreementRows) -> list[Routed]:
    """The class does not change; and what the same votes show of class and level."""
    row, other = np.arange(rows.binding.size), rows.binding != rows.sigma_choice
    at_share = rows.radius_class[row, rows.sigma_choice]
    router = rows.radius_excluded[row, rows.binding] > rows.radius_class[row, rows.binding]
    first, second = (np.where(rows.correct, each, 0.0) for each in (rows.radius, rows.radius_constant))
    common = partial(Routed, choice=rows.sigma_choice, at_share=at_share)
    return [
        common(name=rows.name, certified=first, by_router=other & router, by_class=other & ~router),
        common(name=CONSTANT, certified=second, by_router=rows.radius_constant < at_share),
    ]


def headroom(standard: Floats, routed: Routed) -> dict[str, Floats]:
    """The way from the oracle's radius down to the certified one, example by example.

    S_j is the radius of standard RS at level j and at alpha, 0 where its class is wrong; C the certified one; H the
    radius at m at the class's share of alpha: C where the class at m gives C, elsewhere `at_share`, between C (which
    needs it) and S_m (which has more alpha, and knows whether the class is right). A part is the difference of two
    stations, so the parts add up to oracle - C for every example, and after `metrics.reached` at every radius:

        wrong level      max_j S_j - S_m, >= 0; all of the oracle's radius where the class at m is wrong
        price of alpha   S_m - H, >= 0 unless C > S_m: the routed method drew other noise, and was luckier
        capped           H - C where C > 0, >= 0: by the router's reach, or by the class at another level
        abstained        H where C = 0, >= 0: nothing was certified, or, from other noise, a wrong class

    With a budget that stops early the votes of standard RS do not say exactly what they would at another alpha: taken
    from them, H is approximate, and with it where the price of alpha ends and the rest begins; their sum is not.

    Args:
        standard: float64 ``(N, K)``, S.
        routed: the claim.

    Returns:
        Float64 ``(N,)`` by station: "oracle", then each part's name for what is left after it; the last one is C. A
        claim that asks no other level has no station for the class there.

    Raises:
        DataError: for shapes that do not match.
    """
    by_class = np.zeros_like(routed.by_router) if routed.by_class is None else routed.by_class
    columns = (routed.choice, routed.at_share, routed.certified, routed.by_router, by_class)
    shapes = {each.shape for each in columns}
    if standard.ndim != 2 or shapes != {standard.shape[:1]}:
        raise DataError(
            f"{routed.name}: standard RS is (N, K) and a claim (N,), got {standard.shape} and {sorted(shapes)}"
        )
    at, certified = (np.arange(routed.choice.size), routed.choice), routed.certified
    shown, capped = certified > 0.0, routed.by_router | by_class
    share = np.maximum(np.minimum(routed.at_share, standard[at]), certified)
    share = np.where(shown & ~capped, certified, share)
    stations = {_ORACLE: standard.max(axis=1), _LEVEL: standard[at], _ALPHA: share}
    stations[_REACH] = np.where(shown & ~by_class, certified, share)
    if routed.by_class is not None:
        stations[_CLASS] = np.where(shown, certified, share)
    return stations | {_ABSTAINED: certified}


def headroom_sections(data: ReportData) -> list[Section]:
    """The section; none without a routed method, or where the radii at the class's share of alpha were not measured."""
    claims = _claims(data)
    if not claims:
        return []
    standard = np.stack([np.where(rows.correct, rows.radius, 0.0) for rows in data.standard], axis=1)
    place = int(standard.mean(axis=0).argmax())

    def columns(radius: Floats) -> Floats:
        """The radius, and 1.0 where it reaches each of the report's: ``(N, 1 + R)``."""
        return np.column_stack([radius, reached(radius, data.radii, data.strict)])

    single = columns(standard[:, place])
    ways = []
    for claim in claims:
        stations = {name: columns(each).mean(axis=0) for name, each in headroom(standard, claim).items()}
        ways.append(_Way(claim.name, stations, *paired_difference(columns(claim.certified), single)))
    best = f"Best single level (sigma = {data.sigmas[place]:g})"
    return [_section(data.radii, best, single.mean(axis=0), ways)]


def _claims(data: ReportData) -> list[Routed]:
    """Of every routed method that was run."""
    at_share, found = data.standard_at_dual_alpha, []
    for rows in (data.dual, *data.others):
        if isinstance(rows, DualRows) and at_share is not None:
            found.append(dual_claim(rows, at_share))
        if isinstance(rows, AgreementRows):
            claims = agreement_claims(rows)
            found += claims[:1] if found else claims  # the published claim may stand there already
    return found


@dataclass(frozen=True, eq=False)
class _Way:
    """One claim's means, ``(1 + R,)`` each: the certified radius, then the certified accuracies.

    Attributes:
        stations: of `headroom`.
        gap, error: the claim less the best single level, and the paired standard error of that.
    """

    name: str
    stations: Mapping[str, Floats]
    gap: Floats
    error: Floats

    @property
    def parts(self) -> dict[str, Floats]:
        """What is lost on the way to each station."""
        return {name: above - below for (_, above), (name, below) in pairwise(self.stations.items())}


def _section(radii: Floats, best: str, single: Floats, ways: Sequence[_Way]) -> Section:
    from core.report import plots

    header = ("Mean certified radius", *(f"{radius:g}" for radius in radii))
    lines = [(best, *radius_cells(single)), ("Oracle (not a certificate)", *radius_cells(ways[0].stations[_ORACLE]))]
    for way in ways:
        lines += [
            (f"{way.name}: its choice, not certified", *radius_cells(way.stations[_LEVEL])),
            (way.name, *radius_cells(way.stations[_ABSTAINED])),
            (f"{way.name} less the best single level", *radius_cells(way.gap, way.error)),
        ]
    parts = tuple((f"{way.name}: {name}", *radius_cells(part)) for way in ways for name, part in way.parts.items())
    said = [_sentence(way) for way in ways]
    figure = _figure(radii, best, single, ways)
    blocks: list[Block] = [
        Heading("Headroom: from the oracle to the certificate"),
        *map(Text, said),
        Table(("Certified accuracy [%] beyond radius", *header), tuple(lines)),
        Text(
            "± is the standard error of a mean difference over the same examples. The best single level has the "
            "largest mean certified radius on these very examples, which favours it. What the oracle has and the "
            "certificate has not, by cause: at the level that the router picks, less is certified or the class is "
            "wrong (wrong level); the class has but a share of alpha (price of alpha); the certificate is smaller than "
            "the class's radius at that level (capped), or there is none (abstained). The parts add up."
        ),
        Table(("Lost [%] beyond radius", *header), parts),
        plots.to_picture(figure, "headroom", "Certified accuracy, and what the oracle has beyond it, by cause."),
    ]
    files = {"headroom.png": plots.to_bytes(figure, "png"), "headroom.csv": _csv(radii, single, ways)}
    return Section("\n".join(said), tuple(blocks), files)


def radius_cells(values: Floats, error: Floats | None = None) -> list[str]:
    """A radius, then percentages; differences have a sign, and a standard error where there is one."""
    formats = [(1.0, 4), *[(100.0, 2)] * (values.size - 1)]
    if error is None:
        return [f"{scale * value:.{digits}f}" for value, (scale, digits) in zip(values, formats, strict=True)]
    return [
        f"{scale * value:+.{digits}f}" + ("" if np.isnan(spread) else f" ± {scale * spread:.{digits}f}")
        for value, spread, (scale, digits) in zip(values, error, formats, strict=True)
    ]


def _sentence(way: _Way) -> str:
    """How far the claim gets, and what the largest part is."""
    oracle, certified = (float(way.stations[name][0]) for name in (_ORACLE, _ABSTAINED))
    parts = {name: float(part[0]) for name, part in way.parts.items()}
    largest, total = max(parts, key=parts.__getitem__), oracle - certified
    text = (
        f"{way.name}: mean certified radius {certified:.4f} of the oracle's {oracle:.4f}, "
        f"{radius_cells(way.gap, way.error)[0]} against the best single level."
    )
    if not parts[largest] > 0.0:
        return f"{text} Nothing is lost on the way."
    return (
        f"{text} Of the {total:.4f} that are missing the largest part is '{largest}' ({parts[largest]:.4f}); it takes "
        f"{_MENDED_BY[largest]}."
    )


def _figure(radii: Floats, best: str, single: Floats, ways: Sequence[_Way]) -> "Figure":
    """Bars at each radius: what is certified, and on it, up to the oracle, what is lost; a panel for each claim."""
    from core.report.plots import DUAL, accuracy_axes, drawing

    place, every = np.arange(radii.size), 1 + radii.size // 14
    parts = [name for name in _COLOURS if any(name in way.stations for way in ways)]  # the panels share a legend
    with drawing(len(ways), 3.2 * len(ways)) as (figure, panels):
        for axes, way in zip(panels, ways, strict=True):
            above = way.stations[_ORACLE]
            for name in parts:
                below = way.stations.get(name, above)
                heights, bottom = 100.0 * (above - below)[1:], 100.0 * below[1:]
                axes.bar(place, heights, 0.7, bottom=bottom, color=_COLOURS[name], label=name)
                above = below
            axes.bar(place, 100.0 * above[1:], 0.7, color=DUAL, label="certified")
            axes.hlines(100.0 * single[1:], place - 0.42, place + 0.42, colors="black", linewidth=2.0, label=best)
            axes.set_xticks(place[::every], [f"{radius:g}" for radius in radii[::every]])
            axes.grid(visible=False, axis="x")
            accuracy_axes(axes, way.name)
    return figure


def _csv(radii: Floats, single: Floats, ways: Sequence[_Way]) -> bytes:
    """One line per claim, quantity and radius, unrounded; without a radius: of the mean certified radius."""
    places: list[object] = [None, *map(float, radii)]
    nothing = np.full(single.shape, np.nan)
    rows: list[tuple[object, ...]] = []
    for way in ways:
        named = {"best single level": single, _ORACLE: way.stations[_ORACLE], "choice": way.stations[_LEVEL]}
        named |= {"certified": way.stations[_ABSTAINED], **way.parts}
        lines = [(name, values, nothing) for name, values in named.items()]
        for name, values, error in [*lines, ("certified less best single level", way.gap, way.error)]:
            cells = zip(places, values, error, strict=True)
            rows += [(way.name, name, at, float(v), None if np.isnan(e) else float(e)) for at, v, e in cells]
    return csv_text(("claim", "quantity", "radius", "value", "standard_error"), rows).encode()
