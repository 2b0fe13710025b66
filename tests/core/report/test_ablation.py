import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from core.config import Setting, Sweep, parse_config
from core.errors import DataError
from core.report import DualRows, ReportData, StandardRows
from core.report.ablation import AblationSetting, ablation_row, format_ablation
from core.report.ablation_plots import ablation_figure, swept_numbers
from core.report.plots import to_bytes
from distributed.files.storage import Folder
from distributed.studies.sweep_results import write_results

RADIUS = np.array([[0.3, 0.5], [0.2, 0.0], [0.4, 0.1], [0.0, 0.0]])
"""R_c of four examples at the levels 0.25 and 0.5, where the class is right."""


def setting(name: str, choice: list[int], radius_sigma: list[float], **values: Any) -> AblationSetting:
    """Dual RS with these choices; nobody abstains but where R_sigma or R_c is 0."""
    index, reach = np.array(choice), np.array(radius_sigma)
    radius_class = RADIUS[np.arange(4), index]
    radius = np.minimum(reach, radius_class)
    abstained = radius == 0.0
    bound = np.where(abstained, "none", np.where(reach < radius_class, "sigma", "class"))
    dual = DualRows(
        correct=~abstained, radius=radius, radius_sigma=reach, radius_class=radius_class,
        sigma=np.where(reach > 0, np.array([0.25, 0.5])[index], np.nan), bounded_by=bound, abstained=abstained,
        num_draws=np.array([100, 200, 300, 400]), p_lower=np.full(4, 0.5), sigma_choice=index,
    )  # fmt: skip
    standard = tuple(
        StandardRows(
            sigma=sigma, correct=RADIUS[:, k] > 0, radius=RADIUS[:, k], p_lower=np.full(4, 0.5),
            abstained=RADIUS[:, k] == 0, num_draws=np.full(4, 50),
        )
        for k, sigma in enumerate((0.25, 0.5))
    )  # fmt: skip
    data = ReportData(
        title="t", labels="digits", radii=np.array([0.0, 0.25]), standard=standard, dual=dual,
        standard_at_dual_alpha=RADIUS, alpha=0.001, alpha_stages=(0.0005, 0.0005), num_selection=10,
        num_estimation=40, manifest={},
    )  # fmt: skip
    return AblationSetting(name, values, data, {"seconds": 12.5, "fingerprint": "abc"})


GOOD = setting("good", [1, 0, 0, 0], [0.6, 0.6, 0.3, 0.6], **{"estimator.lr": 1.0})
POOR = setting("poor", [0, 1, 1, 0], [0.1, 0.6, 0.6, 0.0], **{"estimator.lr": 0.5})


def test_ablation_row_is_what_a_hand_counts() -> None:
    row = ablation_row(GOOD)
    # Radii of Dual RS: 0.5, 0.2, 0.3 (capped), none. Standard: 0.25 certifies 3 and 2 of 4, 0.5 2 and 1.
    assert (row["dual@0"], row["dual@0.25"], row["dual_mean"]) == (0.75, 0.5, 0.625)
    assert (row["best_single@0"], row["best_single@0.25"], row["best_single_sigma"]) == (0.75, 0.5, 0.25)
    assert (row["oracle@0"], row["oracle@0.25"]) == (0.75, 0.5)
    assert (row["share_capped"], row["abstained"], row["estimator_abstained"]) == (1 / 3, 0.25, 0.0)
    assert (row["delta_r_c_mean"], row["delta_r_c_zero"]) == (0.0, 1.0)
    assert row["delta_r_sigma_mean"] == pytest.approx((0.1 + 0.4 - 0.1) / 3)
    assert (row["sigma_label_accuracy"], row["draws_per_example"], row["seconds"]) == (1.0, 250.0, 12.5)
    poor = ablation_row(POOR)
    assert (poor["delta_r_c_mean"], poor["delta_r_c_zero"]) == (pytest.approx((0.2 + 0.2 + 0.3) / 3), 0.0)
    assert (poor["share_capped"], poor["abstained"], poor["estimator_abstained"]) == (0.5, 0.5, 0.25)
    assert (poor["sigma_shares"], poor["estimator.lr"]) == ("0.25: 0.500, 0.5: 0.500", 0.5)


def test_format_ablation_marks_the_best_and_shows_what_all_share() -> None:
    lines = format_ablation([GOOD, POOR]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:4] == ["good", "**75.0**", "**50.0**", "**62.5**"]
    assert cells[3][:4] == ["poor", "50.0", "0.0", "25.0"]
    assert [row[0] for row in cells[4:]] == ["best single sigma (0.25)", "oracle (not a certificate)"]


def test_ablation_setting_without_dual_is_refused() -> None:
    data = GOOD.data
    with pytest.raises(DataError, match="has no certificates of Dual RS"):
        AblationSetting("x", {}, ReportData(**{**{n: getattr(data, n) for n in data.__slots__}, "dual": None}), {})


def test_swept_numbers_only_where_one_key_has_distinct_numbers() -> None:
    assert swept_numbers([{"a": 1}, {"a": 2.5}]) == ("a", [1.0, 2.5])
    others: list[list[dict[str, Any]]] = [
        [{"a": 1}, {"b": 2}], [{"a": "x"}, {"a": "y"}], [{"a": 1}, {"a": 1}], [{}, {}], [{"a": True}],
    ]  # fmt: skip
    for values in others:
        assert swept_numbers(values) is None


def test_ablation_figure_is_drawn_for_numbers_and_for_names() -> None:
    for settings in ([GOOD, POOR], [setting("a", [0] * 4, [0.0] * 4), setting("b", [1] * 4, [0.6] * 4)]):
        figure = ablation_figure(settings, "title")
        assert to_bytes(figure, "png")[:4] == b"\x89PNG"
        assert [len(axes.lines) for axes in figure.axes] == [2, 2, 3]
    assert ablation_figure([GOOD, POOR], "t").axes[2].lines[0].get_xdata() == pytest.approx([0.5, 1.0])
    assert ablation_figure([GOOD, POOR], "t").axes[2].lines[0].get_ydata() == pytest.approx([0.5, 1 / 3])


def test_write_results_parquet_has_a_row_per_setting_with_the_swept_keys(tmp_path: Path) -> None:
    config = parse_config({"sigmas": [0.25, 0.5], "report": {"radii": [0]}})
    settings = [setting("a", [0] * 4, [0.6] * 4, lr=1, net={"arch": "r"}), setting("b", [1] * 4, [0.6] * 4, lr=0.5)]
    sweep = Sweep("s", "A title", "base", ("lr", "net"), tuple(Setting(s.name, s.values, config) for s in settings))
    shown = write_results(sweep, settings, Folder(tmp_path))
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["setting"], row["lr"], row["net"]) for row in table] == [
        ("a", 1.0, json.dumps({"arch": "r"})), ("b", 0.5, None),
    ]  # fmt: skip
    assert table[0] | {"net": {"arch": "r"}} == ablation_row(settings[0])
    assert shown in (tmp_path / "results.md").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {
        "results.parquet",
        "results.md",
        "ablation.png",
        "ablation.pdf",
    }
