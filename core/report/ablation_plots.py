"""The figure of an ablation: certified accuracy and lost radius by setting, and what changes with the swept value."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from core.evaluation.metrics import ecdf
from core.report import Kind
from core.report.ablation import AblationSetting
from core.report.plots import _COLOURS, _DASHES, _figure

__all__ = ["ablation_figure", "swept_numbers"]


def _capped(setting: AblationSetting) -> float:
    return setting.share_capped


def _dual(setting: AblationSetting) -> float:
    return float(setting.accuracy(Kind.DUAL).mean())


def _oracle(setting: AblationSetting) -> float:
    return float(setting.accuracy(Kind.ORACLE).mean())


_MEASURES: Final = (
    (r"share capped by $R_\sigma$", "#D55E00", "o", _capped),
    ("mean certified accuracy, Dual RS", "#0072B2", "s", _dual),
    ("the same, oracle", "black", "^", _oracle),
)


def ablation_figure(settings: Sequence[AblationSetting], title: str) -> Figure:
    """Three panels: certified accuracy of Dual RS against the radius, ECDF of Delta R_c, measures by setting."""
    looks = [
        {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)]}
        for index in range(len(settings))
    ]

    def accuracy(axes: Any) -> None:
        largest = max(float(setting.data.oracle[1].max()) for setting in settings)
        grid = np.linspace(0.0, 1.02 * largest if largest > 0.0 else 1.0, 400)
        for setting, look in zip(settings, looks, strict=True):
            axes.plot(grid, 100.0 * setting.accuracy(Kind.DUAL, grid), label=setting.name, linewidth=1.6, **look)
        axes.set(title=title, xlabel="certified radius (pixel scale [0, 1])", ylabel="certified accuracy, Dual RS [%]")
        axes.set_xlim(0.0, grid[-1])
        axes.set_ylim(0.0, 101.0)

    def lost(axes: Any) -> None:
        for setting, look in zip(settings, looks, strict=True):
            if (values := setting.data.lost_radius()).size:
                x, y = ecdf(values)
                axes.step(np.r_[0.0, x], 100.0 * np.r_[0.0, y], where="post", linewidth=1.6, **look)
        axes.set(xlabel=r"$\Delta R_c = R_c^* - R_c$, lost to the choice of sigma", ylabel="share of examples ≤ x [%]")
        axes.set_ylim(0.0, 101.0)

    def measures(axes: Any) -> None:
        numbers = swept_numbers([setting.values for setting in settings])
        places = np.arange(len(settings)) if numbers is None else np.array(numbers[1])
        order = np.argsort(places, kind="stable")
        for label, colour, marker, measure in _MEASURES:
            values = np.array([measure(setting) for setting in settings])
            axes.plot(places[order], values[order], color=colour, marker=marker, label=label, linewidth=1.4)
        if numbers is None:
            axes.set_xticks(places, [setting.name for setting in settings], rotation=30, ha="right")
        else:
            axes.set_xlabel(numbers[0])
        axes.set_ylim(0.0, 1.01)
        axes.set_ylabel("share")
        axes.legend(frameon=False, fontsize=8)

    return _figure([accuracy, lost, measures], height_in=9.6, order=[setting.name for setting in settings])


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
