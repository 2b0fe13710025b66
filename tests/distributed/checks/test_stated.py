"""What a run costs at stated rates, on a machine that has none of its files; against sums written out."""

import re
from pathlib import Path

import pytest

from core.errors import ConfigError
from distributed.checks.stated import parse_rates
from jobs import pipeline, train_base
from tests.helpers.miniatures import ROOT
from tests.helpers.tiny import run_main

RATES = ("--rate", "classifier=40000", "--rate", "estimator=13000")


def dry(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, list[str]]:
    """The cells of each step's line."""
    out = tmp_path / "run"
    assert run_main(pipeline, "--config", str(ROOT / "configs" / config), "--out", str(out), "--dry-run", *more) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert sum("is not here: counted as published" in line for line in lines) == 2
    assert sum("stated, not measured" in line for line in lines) == 1
    cells = [re.split(r"\s{2,}", line.replace("<= ", "")) for line in lines]
    return {name: rest for name, *rest in cells}


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"


def test_price_of_a_pool_without_a_denoiser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dry("cifar10_rn110_experts.yaml", tmp_path, capsys, *RATES, "--price", "2.5")
    draws, copies = 100 + 100_000, 16 * 45_000 + 32 * 5_000
    expected = {
        "build_dataset": 50_000 * 3 * 120 / 40_000,
        "train_estimator": copies / 13_000,  # once through the experts, then a small head
        "certify-standard": 10_000 * 3 * draws / 40_000,
        # What is counted there is for test_estimate.py.
        "certify-agreement": sum(
            int(cell.replace(",", "")) / rate
            for cell, rate in zip(rows["certify-agreement"][3:5], (13_000, 40_000), strict=True)
        ),
    }
    for step, seconds in expected.items():
        assert hours(seconds) in rows[step], (step, rows[step])
        assert f"{seconds / 3600 * 2.5:.2f}" in rows[step]


def test_price_counts_a_training_step_as_three_passes_of_what_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dry("cifar10.yaml", tmp_path, capsys, *RATES, "--rate", "denoiser=1000")
    estimator = 90 * 50_000 * 2 * (1 / 1_000 + 3 / 13_000)
    tuning = 15 * 50_000 * (1 / 1_000 + 3 / 40_000)
    routing = 50_000 * 100 * (1 / 1_000 + 1 / 13_000)
    assert hours(estimator) in rows["train_estimator"]
    assert hours(tuning) in rows["finetune_classifier, training"]
    assert hours(routing) in rows["finetune_classifier, sigmas"]


def test_price_of_a_part_of_imagenet_counts_that_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dry("imagenet_rn50_experts.yaml", tmp_path, capsys, *RATES)
    assert rows == dry("imagenet_rn50_experts.yaml", tmp_path, capsys, *RATES, "dataset.crop=0")
    assert [rows[step][0] for step in ("build_dataset", "certify-standard")] == ["64,058", "500"]
    assert round(0.05 * 1_281_167) == 64_058


def test_price_at_the_rates_that_an_earlier_run_printed_for_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("build_dataset", "train_estimator", "certify-standard", "certify-agreement")
    stated = [word for number, step in enumerate(steps, 2) for word in ("--rate", f"{step}={number}000")]
    rows = dry("cifar10_rn110_experts.yaml", tmp_path, capsys, *stated, "--price", "2")
    for number, step in enumerate(steps, 2):
        seconds = int(rows[step][1].replace(",", "")) / (1000 * number)
        assert rows[step][5:7] == [f"{1000 * number:,}", hours(seconds)]
        assert f"{seconds / 3600 * 2:.2f}" in rows[step]


@pytest.mark.parametrize("text", ["classifier", "classifier=", "classifier=0", "classifier=inf"])
def test_parse_rates_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--rate: expected NAME=PER_S, such as classifier=20000, got"):
        parse_rates([text])


def test_rate_that_is_missing_or_a_set_that_nobody_knows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "run"))
    config = ("--config", str(ROOT / "configs/cifar10_rn110_experts.yaml"), *out)
    assert run_main(pipeline, *config, "--dry-run", "--rate", "classifier=5") == 2
    assert (
        "--rate: add --rate estimator=IMAGES_PER_S, or --rate 'train_estimator'=COPIES_PER_S" in capsys.readouterr().err
    )
    assert run_main(pipeline, *config, "--dry-run", "--rate", "router=5") == 2
    assert "--rate: 'router' is none of 'denoiser', 'estimator', 'classifier', 'build_d" in capsys.readouterr().err
    assert run_main(train_base, *config, "--rate", "classifier=5") == 2
    assert "--rate: goes with --dry-run" in capsys.readouterr().err
    own = ("--config", str(ROOT / "configs/fashion_mnist.yaml"), *out, f"dataset.path={tmp_path}")
    assert run_main(pipeline, *own, "--dry-run", *RATES) == 3
    assert "error: dataset.train: cannot be counted without its files: " in capsys.readouterr().err
