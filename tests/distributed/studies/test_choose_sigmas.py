import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from core.evaluation.choice import pooled
from core.procedures.confidence import certified_radius, clopper_pearson_lower
from distributed.execution.launch import certify_store
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.choice import test_sample, training_sample
from jobs import choose_sigmas
from tests.helpers.tiny import tiny_run

test_sample.__test__ = False  # type: ignore[attr-defined]
FEW = ("sigmas=[0.2,0.3,0.5]", "compute.executor=local", "dataset.train.first=24", "dataset.test.first=20")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = tiny_run(tmp_path_factory.mktemp("choice") / "run", *FEW, "compute.shard_examples=5")
    certify_store(directory, "dataset")
    return directory


def main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["choose_sigmas", *args])
    monkeypatch.setattr("signal.signal", lambda *args: None)  # the job's handler would stay
    return choose_sigmas.main()


def test_samples_hold_the_votes_and_images_of_their_examples(run: RunDirectory) -> None:
    radii = np.array([0.0, 0.1])
    sample, train = training_sample(run, radii), run.data("train")
    rows = ShardStore(run.folder, "dataset").read().to_pylist()
    ids = sorted(train.example_ids)
    assert sample.certified.shape == (24, 3, 2)
    for place, example_id in enumerate(ids):
        np.testing.assert_array_equal(sample.features[place], pooled(train.image(train.example_ids.index(example_id))))
    # More votes for the label, more is expected: the order of the examples is that of their votes.
    for level, sigma in enumerate((0.2, 0.3, 0.5)):
        votes = [
            row["counts_selection"][row["label"]] + row["counts_estimation"][row["label"]]
            for row in rows
            if row["sigma"] == sigma
        ]
        order = np.argsort(votes, kind="stable")
        assert np.all(np.diff(sample.certified[order, level, 0]) >= -1e-9)
        assert stats.spearmanr(votes, sample.certified[:, level, 0]).statistic > 0.9 or len(set(votes)) < 3


def test_test_sample_is_what_was_certified_at_the_classifier_s_share_of_alpha(run: RunDirectory) -> None:
    assert test_sample(run, np.array([0.0])) is None
    certify_store(run, "certificates/standard-base")
    radii = np.array([0.0, 0.05, 0.1])
    found = test_sample(run, radii)
    assert found is not None
    assert found[0] == "certificates/standard-base"
    assert run.config.stage_alphas == (0.005, 0.005)
    rows = ShardStore(run.folder, found[0]).read().to_pylist()
    for row, values in zip(rows, found[1].certified.reshape(-1, 3), strict=True):
        top = int(np.argmax(row["counts_selection"]))
        p_lower = clopper_pearson_lower(row["counts_estimation"][top], 100, 0.005)
        radius = float(certified_radius(p_lower, row["sigma"])) if top == row["label"] else 0.0
        assert values.tolist() == [float(radius > r) for r in radii]


def test_job_writes_all_subsets_and_names_one_of_the_size(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--out", str(run.path), "--size", "2", "--radii", "0,.1") == 0
    printed = capsys.readouterr().out
    plain = json.loads((run.path / "choice/choice.json").read_text())
    with (run.path / "choice/choice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plain["candidates"]) == 6
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(plain["recommended"]) == 2
    assert f"use: sigmas=[{','.join(f'{sigma:g}' for sigma in plain['recommended'])}]" in printed
    two = [each for each in plain["candidates"] if len(each["sigmas"]) == 2]
    best = max(two, key=lambda each: (round(each["score"], 9), each["oracle@0"] + each["oracle@0.1"]))
    assert plain["recommended"] == best["sigmas"]
    assert (run.path / "choice/choice.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "4"], "--size: the run has 3 levels, 4 cannot be chosen"),
        (["--radii", "0,x"], "--radii: expected numbers such as"),
        (["--radii=-1"], "--radii: must be finite and at least 0"),
    ],
)
def test_job_refuses_with_one_message(
    args: list[str],
    message: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(monkeypatch, "--out", str(run.path), *args) == 2
    assert message in capsys.readouterr().err


def test_job_without_a_data_set_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--size", "2", "--out", str(tiny_run(tmp_path / "run").path)) == 2
    assert "run jobs.build_dataset with a wide Sigma first" in capsys.readouterr().err
