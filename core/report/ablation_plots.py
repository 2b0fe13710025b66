"""The figure of an ablation: certified accuracy and lost radius by setting, and what changes with the swept value."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from core.evaluation.metrics import ecdf
from core.report import Kind
from core.report.ablation import AblationSetting
from core.report.plots import COLOURS, DASHES, drawing

__all__ = ["ablation_figure", "swept_numbers"]


def ablation_figure(settings: Sequence[AblationSetting], title: str) -> Figure:
    """Three panels: certified accuracy of Dual RS against the radius, ECDF of Delta R_c, measures by setting."""
    largest = max(float(setting.data.oracle[1].max()) for setting in settings)
    grid = np.linspace(0.0, 1.02 * largest if largest > 0.0 else 1.0, 400)
    with drawing(3, 9.6, [setting.name for setting in settings]) as (figure, (accuracy, lost, measures)):
        for index, setting in enumerate(settings):
            turn, colour = divmod(index, len(COLOURS))
            look: dict[str, Any] = {"color": COLOURS[colour], "linestyle": DASHES[turn % len(DASHES)], "linewidth": 1.6}
            accuracy.plot(grid, 100.0 * setting.accuracy(Kind.DUAL, grid), label=setting.name, **look)
            if (values := setting.data.lost_radius()).size:
                x, y = ecdf(values)
                lost.step(np.r_[0.0, x], 100.0 * np.r_[0.0, y], where="post", **look)
        accuracy.set(
            title=title, xlabel="certified radius (pixel scale [0, 1])", ylabel="certified accuracy, Dual RS [%]"
        )
        accuracy.set_xlim(0.0, grid[-1])
        accuracy.set_ylim(0.0, 101.0)
        lost.set(xlabel=r"$\Delta R_c = R_c^* - R_c$, lost to the choice of sigma", ylabel="share of examples ≤ x [%]")
        lost.set_ylim(0.0, 101.0)
        _draw_measures(measures, settings)
    return figure


def _draw_measures(axes: Any, settings: Sequence[AblationSetting]) -> None:
    """A line for each number that says how good a setting is, against what is swept."""
    capped = [setting.share_capped for setting in settings]
    dual, oracle = ([float(each.accuracy(kind).mean()) for each in settings] for kind in (Kind.DUAL, Kind.ORACLE))
    numbers = swept_numbers([setting.values for setting in settings])
    places = np.arange(len(settings)) if numbers is None else np.array(numbers[1])
    order = np.argsort(places, kind="stable")
    for label, colour, marker, values in (
        (r"share capped by $R_\sigma$", "#D55E00", "o", capped),
        ("mean certified accuracy, Dual RS", "#0072B2", "s", dual),
        ("the same, oracle", "black", "^", oracle),
    ):
        axes.plot(places[order], np.array(values)[order], color=colour, marker=marker, label=label, linewidth=1.4)
    if numbers is None:
        axes.set_xticks(places, [setting.name for setting in settings], rotation=30, ha="right")
    else:
        axes.set_xlabel(numbers[0])
    axes.set_ylim(0.0, 1.01)
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8)


def swept_numbers(values: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    """The swept key and its values, where one key is swept over distinct numbers; None otherwise."""
    keys = {key for each in values for key in each}
    if len(keys) != 1:
        return None
    key = keys.pop()
    numbers = [each.get(key) for each in values]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return None
    return (key, [float(number) for number in numbers]) if len(set(numbers)) == len(numbers) else None  # type: ignore[arg-type]
