"""Logs of others side by side, against plain pandas as their own script counts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from core.errors import DataError
from dual_rs import results
from jobs import report
from tests.helpers.tiny import run_main


def write_log(path: Path, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 10, 120)
    predict = np.where(generator.random(120) < 0.6, label, generator.integers(-1, 10, 120))
    radius = np.where(predict < 0, 0.0, generator.choice([0.25, 0.5, 0.873, 1.2], 120))
    columns = {"idx": np.arange(0, 2400, 20), "label": label, "predict": predict, "radius": radius}
    frame = pd.DataFrame({**columns, "correct": (predict == label).astype(int), "time": "0:00:01"})
    frame.to_csv(path, sep="\t", index=False)
    return frame


def test_logs_side_by_side_count_as_their_script_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = {name: write_log(tmp_path / f"{seed}.tsv", seed) for seed, name in enumerate(("sigma=0.25", "b"))}
    given = [f"{name}={tmp_path / f'{seed}.tsv'}" for seed, name in enumerate(logs)]
    assert run_main(report, "--out", str(tmp_path / "page"), "--logs", *given, "report.radii=[0,0.25,0.5,1]") == 0
    found = pd.read_csv(tmp_path / "page" / "logs.csv")
    assert list(found["log"].unique()) == list(logs)
    for row in found.itertuples():
        frame = logs[str(row.log)]
        hits = int(((frame["correct"] == 1) & (frame["radius"] >= row.radius)).sum())
        interval = stats.binomtest(hits, 120).proportion_ci(method="exact")
        assert row.certified_accuracy == pytest.approx(hits / 120)
        assert (row.ci95_lower, row.ci95_upper) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert f" {100 * hits / 120:.2f} " in capsys.readouterr().out or row.Index  # the first row, in the terminal
    for name in ("logs.html", "logs.md", "logs.tex", "logs.png", "logs.pdf"):
        assert (tmp_path / "page" / name).stat().st_size > 300
    strict = ("--out", str(tmp_path / "strict"), "--logs", *given, "report.radii=[0.25]", "report.strict=true")
    assert run_main(report, *strict) == 0
    beyond = pd.read_csv(tmp_path / "strict" / "logs.csv")["certified_accuracy"].tolist()
    assert beyond == [((f["correct"] == 1) & (f["radius"] > 0.25)).mean() for f in logs.values()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a=nowhere.tsv",), "--logs: 'a=nowhere.tsv': expected NAME=FILE, no file 'nowhere.tsv'"),
        (("a={}", "a={}"), "'a' is there twice"),
        (("={}",), "no name"),
        (("a={}", "report.raddi=[1]"), "report.raddi"),
    ],
)
def test_logs_that_are_not_named_right_are_refused(
    given: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log.tsv", 0)
    logs = (each.format(tmp_path / "log.tsv") for each in given)
    assert run_main(report, "--out", str(tmp_path / "page"), "--logs", *logs) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_log_that_is_no_text_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.tsv").write_bytes(b"idx\t\xff")
    assert run_main(report, "--out", str(tmp_path / "page"), "--logs", f"a={tmp_path / 'log.tsv'}") == 3
    assert "log.tsv' is not text" in capsys.readouterr().err
    with pytest.raises(DataError, match="is not text"):
        results.of_log(tmp_path / "log.tsv")
    with pytest.raises(DataError, match="cannot read"):
        results.of_log(tmp_path / "nowhere.tsv")
