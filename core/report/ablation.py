"""What an ablation shows: a row of numbers for each setting, and a table that puts the settings side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import DataError
from core.report import Floats, Kind, ReportData
from core.report.pages import Table, markdown_table

__all__ = ["AblationSetting", "ablation_row", "format_ablation"]


@dataclass(frozen=True, slots=True, eq=False)
class AblationSetting:
    """The certificates of one setting.

    Attributes:
        values: of the swept keys that it sets.
        data: standard RS and Dual RS on the same examples.
        facts: further columns of its row: seconds, fingerprint, folder.

    Raises:
        DataError: without Dual RS.
    """

    name: str
    values: Mapping[str, Any]
    data: ReportData
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.data.dual is None:
            raise DataError(f"the setting {self.name!r} has no certificates of Dual RS")

    def accuracy(self, kind: Kind, radii: Floats | None = None) -> Floats:
        """Certified accuracy of Dual RS, of the oracle, or of the best single sigma, at each radius.

        The best single sigma is one level for all radii: that with the highest mean over the report's.
        """
        grid = self.data.radii if radii is None else radii
        methods = [method for method in self.data.methods() if method.kind is kind]
        if kind is Kind.STANDARD:
            return methods[self.best_single].accuracy(grid)
        return methods[0].accuracy(grid)

    @property
    def best_single(self) -> int:
        """Index into Sigma of the best single sigma; the smaller one on ties."""
        standard = [method for method in self.data.methods() if method.kind is Kind.STANDARD]
        return int(np.argmax([method.accuracy(self.data.radii).mean() for method in standard]))

    @property
    def share_capped(self) -> float:
        """Share of the examples certified by Dual RS whose radius the estimator bounds; nan without any."""
        dual = self.data.dual
        assert dual is not None
        certified = ~dual.abstained
        return float(dual.capped[certified].mean()) if certified.any() else float("nan")


def ablation_row(setting: AblationSetting) -> dict[str, Any]:
    """One row of the results: plain numbers and texts; shares in [0, 1], radii in the pixel scale.

    `delta_r_c_*`: radius lost to the choice of sigma, over the examples that some sigma certifies at the classifier's
    share of alpha. `delta_r_sigma_*`: R_sigma - R_c over those that both stages certify. nan where there are none.
    """
    data = setting.data
    dual = data.dual
    assert dual is not None
    lost, slack = data.lost_radius(), dual.slack()
    row: dict[str, Any] = {"setting": setting.name, **setting.values}
    for kind, name in ((Kind.DUAL, "dual"), (Kind.STANDARD, "best_single"), (Kind.ORACLE, "oracle")):
        accuracy = setting.accuracy(kind)
        row[f"{name}_mean"] = float(accuracy.mean())
        row |= {f"{name}@{radius:g}": float(share) for radius, share in zip(data.radii, accuracy, strict=True)}
    row["best_single_sigma"] = float(data.sigmas[setting.best_single])
    row |= {f"delta_r_c_{name}": value for name, value in _summary(lost).items()}
    row["delta_r_c_zero"] = float((lost == 0.0).mean()) if lost.size else float("nan")
    row |= {f"delta_r_sigma_{name}": value for name, value in _summary(slack).items()}
    row["share_capped"] = setting.share_capped
    row["abstained"] = float(dual.abstained.mean())
    row["estimator_abstained"] = float(dual.estimator_abstained.mean())
    row["sigma_label_accuracy"] = data.choice_agreement()
    chosen = np.bincount(dual.sigma_choice, minlength=data.sigmas.size) / dual.sigma_choice.size
    row["sigma_shares"] = ", ".join(f"{sigma:g}: {share:.3f}" for sigma, share in zip(data.sigmas, chosen, strict=True))
    row["examples"] = data.num_examples
    row["draws_per_example"] = float(dual.num_draws.mean())
    return row | dict(setting.facts)


def _summary(values: Floats) -> dict[str, float]:
    if not values.size:
        return dict.fromkeys(("mean", "median", "p90"), float("nan"))
    return {"mean": float(values.mean()), "median": float(np.median(values)), "p90": float(np.quantile(values, 0.9))}


def format_ablation(settings: Sequence[AblationSetting]) -> str:
    """The settings side by side as a Markdown table: certified accuracy of Dual RS in percent, and what explains it.

    The best Dual RS of each column is bold. Where all settings have the same standard certificates, the best single
    sigma and the oracle follow as rows for comparison.
    """
    first = settings[0]
    radii = first.data.radii
    header = (
        "setting", *(f"r = {radius:g}" for radius in radii), "mean", "capped by R_sigma", "mean ΔR_c", "ΔR_c = 0",
        "abstained", "label accuracy",
    )  # fmt: skip
    accuracies = np.array([_with_mean(setting.accuracy(Kind.DUAL)) for setting in settings])
    rows = []
    for setting, accuracy in zip(settings, accuracies, strict=True):
        row = ablation_row(setting)
        rows.append(
            (
                setting.name,
                *(f"{100 * share:.1f}" for share in accuracy),
                *(f"{row[key]:.3f}" for key in ("share_capped", "delta_r_c_mean", "delta_r_c_zero")),
                *(f"{row[key]:.3f}" for key in ("abstained", "sigma_label_accuracy")),
            )
        )
    best = accuracies.max(axis=0)
    bold = frozenset((int(i), int(j) + 1) for i, j in np.argwhere((accuracies == best) & (best > 0.0)))
    if _same_standard(settings):
        for kind, name in ((Kind.STANDARD, f"best single sigma ({first.data.sigmas[first.best_single]:g})"),
                           (Kind.ORACLE, "oracle (not a certificate)")):  # fmt: skip
            shares = _with_mean(first.accuracy(kind))
            rows.append((name, *(f"{100 * share:.1f}" for share in shares), *["–"] * 5))
    return markdown_table(Table(header, tuple(rows), bold))


def _with_mean(accuracy: Floats) -> Floats:
    return np.append(accuracy, accuracy.mean())


def _same_standard(settings: Sequence[AblationSetting]) -> bool:
    """Whether all settings have the same oracle and the same best single sigma at every radius."""
    first = settings[0]
    return all(
        np.array_equal(setting.accuracy(kind), first.accuracy(kind)) and setting.best_single == first.best_single
        for setting in settings
        for kind in (Kind.STANDARD, Kind.ORACLE)
    )
