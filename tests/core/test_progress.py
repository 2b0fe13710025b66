import pytest

from core.progress import Progress


def test_progress_without_a_terminal_prints_rate_eta_and_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1200, "dataset", "examples", done=200, interval_s=1e-9) as progress:
        progress.update(500, "7 draws/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("dataset: 700/1,200 examples (58%), ")
    assert " examples/s, ETA 0:0" in lines[0]
    assert lines[0].endswith(", 7 draws/s")
    assert len(lines) == 2


def test_progress_prints_no_more_than_a_line_per_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "x", "steps", interval_s=3600) as progress:
        for _ in range(1000):
            progress.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "1,000/1,000 steps (100%)" in lines[0]
    assert "took 0:00" in lines[0]
