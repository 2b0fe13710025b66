"""Several runs side by side: the five examples of test_report.py, and variations of them."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError, DataError
from core.report.compare import format_comparison, write_comparison
from jobs.report import distinct_names
from tests.core.report.test_report import Page, cells, report


def test_write_comparison_two_runs_equal_hand_count(tmp_path: Path) -> None:
    first = replace(report(), manifest={"config": {"seed": 1, "estimator": {"loss": "hard"}}})
    other = replace(report(), dual=None, manifest={"config": {"seed": 1, "estimator": {"loss": "soft"}}})
    runs = {"a": first, "b": other}
    paths = write_comparison(runs, tmp_path)
    assert {p.name for p in paths} == {
        *(f"comparison.{kind}" for kind in ("html", "md", "csv", "tex")),
        *(f"comparison_{method}.{kind}" for method in ("dual", "oracle") for kind in ("png", "pdf")),
    }
    table = cells(format_comparison(runs))
    assert table["a: Dual RS"][:3] == ["60.00", "**40.00**", "**40.00**"]
    assert "b: Dual RS" not in table
    assert table["a: Standard RS, sigma = 0.5"] == table["b: Standard RS, sigma = 0.5"]
    text = (tmp_path / "comparison.md").read_text()
    assert cells(next(part for part in text.split("\n\n") if part.startswith("| Key")))["estimator.loss"] == [
        "hard",
        "soft",
    ]
    assert "| seed" not in text
    with (tmp_path / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "a" and row["method"] == "Dual RS"]
    assert [float(row["certified_accuracy"]) for row in rows] == [0.6, 0.4, 0.4, 0.0, 0.0]
    page = Page((tmp_path / "comparison.html").read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_write_comparison_of_one_run_or_of_other_radii_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two runs"):
        write_comparison({"a": report()}, tmp_path)
    with pytest.raises(DataError, match="other radii"):
        write_comparison({"a": report(), "b": replace(report(), radii=np.array([0.0]))}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_distinct_names_are_the_shortest_endings() -> None:
    assert distinct_names(["runs/a", "s3://bucket/b/"]) == ["a", "b"]
    assert distinct_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    with pytest.raises(ConfigError, match="named twice"):
        distinct_names(["x/run", "x/run/"])
