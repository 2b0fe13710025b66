"""Several runs side by side: the five examples of test_report.py, and variations of them."""

import csv
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError, DataError
from core.evaluation.exchange import CertifyLog
from core.report import ReportData
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


def test_comparison_has_the_paired_difference_to_the_first_run_of_each_certificate(tmp_path: Path) -> None:
    own = report()
    more = replace(
        own.standard[0],
        correct=np.ones(5, np.bool_),
        radius=np.array([0.3, 0.6, 0.2, 0.1, 0.1]),
        abstained=np.zeros(5, np.bool_),
    )
    other = replace(own, dual=None, experts=True)
    runs = {"a": own, "b": replace(own, standard=(more, *own.standard[1:])), "c": other}
    found = cells(format_comparison(runs))
    # Differences 0, .3, 0, 0, .1: mean .08, standard deviation (.068 / 4)^(1/2), over the root of 5.
    expected = ["+0.0800 ± 0.0583", "+20.00 ± 20.00", "+0.00 ± 0.00", "+20.00 ± 20.00", "+0.00 ± 0.00", "+0.00 ± 0.00"]
    assert found["b less a: Standard RS, sigma = 0.25"] == expected
    assert found["c less a: Expert, sigma = 0.5"] == ["+0.0000 ± 0.0000", *["+0.00 ± 0.00"] * 5]
    assert not {"c less a: Dual RS", "a less a: Dual RS"} & found.keys()
    assert not [name for name in found if "less" in name and "Oracle" in name]
    write_comparison(runs, tmp_path)
    assert "b less a: Dual RS" in (tmp_path / "comparison.md").read_text()
    assert "less" not in format_comparison({"a": own, "b": report_of(3)})  # of other examples


def of_set(digest: str) -> dict[str, object]:
    return {"data": {"test": {"digest": digest}}}


def test_comparison_never_bolds_an_imported_log_or_the_oracle(tmp_path: Path) -> None:
    best = CertifyLog(np.arange(3), np.arange(3), np.arange(3), np.full(3, 9.5), np.ones(3, bool))
    runs = {"a": replace(report(), imported={"log": best}), "b": report()}
    table = cells(format_comparison(runs))
    assert table["a: Imported: log (3 examples of its own)"] == ["100.00"] * 5
    assert table["a: Oracle over Sigma (not a certificate)"][0] == "80.00"
    assert table["a: Standard RS, sigma = 0.25"][0] == table["b: Standard RS, sigma = 0.25"][0] == "**80.00**"
    write_comparison(runs, tmp_path)
    lines = (tmp_path / "comparison.tex").read_text().splitlines()
    assert any("Imported" in line for line in lines)
    assert not any("textbf" in line for line in lines if "Imported" in line or "Oracle" in line)
    with (tmp_path / "comparison.csv").open() as file:
        rows = {row["method"]: (row["is_certificate"], row["examples"]) for row in csv.DictReader(file)}
    assert rows["Imported: log"] == ("False", "3")
    assert rows["Dual RS"] == ("True", "5")


def test_comparison_across_test_sets_names_them_and_bolds_nothing(tmp_path: Path) -> None:
    fewer = report_of(3)
    table = format_comparison({"a": report(), "b": fewer})
    assert "**" not in table
    assert {"a (5 of digits): Dual RS", "b (3 of digits): Dual RS"} <= cells(table).keys()
    digests = {"a": "0123456789", "b": "abcdefghij"}
    other = {name: replace(report(), manifest=of_set(digest)) for name, digest in digests.items()}
    table = format_comparison(other)
    assert "**" not in table
    assert "a (5 of digits, set 01234567): Dual RS" in cells(table)
    write_comparison(other, tmp_path)
    text = (tmp_path / "comparison.tex").read_text()
    assert "textbf" not in text
    assert "2 different test sets" in text
    same = {name: replace(report(), manifest=of_set("0123456789")) for name in "ab"}
    assert "**" in format_comparison(same)


def report_of(num: int) -> ReportData:
    """The first of the five examples."""
    full = report()
    assert full.dual is not None
    assert full.standard_at_dual_alpha is not None

    def first(rows: Any) -> Any:
        names = [field.name for field in fields(rows) if isinstance(getattr(rows, field.name), np.ndarray)]
        return replace(rows, **{name: getattr(rows, name)[:num] for name in names})

    return replace(
        full,
        standard=tuple(map(first, full.standard)),
        baseline=tuple(map(first, full.baseline)),
        dual=first(full.dual),
        standard_at_dual_alpha=full.standard_at_dual_alpha[:num],
    )
