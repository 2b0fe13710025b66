"""The alternation: a later round is a run like any other, on the networks of the round before, with its own noise."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import parse_config
from core.errors import ConfigError, DataError
from core.files import file_sha256
from core.models.checkpoints import load_model, save_model
from core.models.small import SmallConvNet
from core.report import ReportData
from core.report.render import write_report
from core.report.rounds import rounds_section
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.rounds import begin_round, broken_links, rounds_there
from distributed.views.tables import report_data
from jobs import audit, build_dataset, pipeline, status
from jobs import report as report_job
from tests.core.report.test_report import cells, dual, report
from tests.helpers.tiny import PLAIN, run_main, tiny_run

TINY = [
    "compute.executor=local",
    "compute.device=cpu",
    "dataset.train.first=40",
    "dataset.test.first=30",
    "base.denoiser.train.steps=5",
    "base.classifier.train.epochs=2",
    "estimator.epochs=1",
    "finetune.epochs=1",
    "finetune.lr=1e-3",
    "finetune.num_sigma_draws=5",
    "labels.num_selection=5",
    "labels.num_estimation=20",
    "certify.num_selection=5",
    "certify.num_estimation=20",
]
STORES = ("dataset", "certificates/standard", "certificates/dual")


def rows(run: RunDirectory, store: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = ShardStore(run.folder, store).read().to_pylist()
    return found


def test_pipeline_two_rounds_interrupted_and_resumed_equal_a_run_begun_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_job, "run", lambda directory: None)  # figures take their time
    monkeypatch.setitem(pipeline.STEPS, "report", lambda directory: None)
    one = RunDirectory(tmp_path / "run", parse_config(PLAIN, TINY))
    pipeline.run(one)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")}

    # The second round, asked for later, ends while it fine-tunes.
    def interrupt(directory: RunDirectory) -> None:
        if directory.folder.name == "2":
            raise KeyboardInterrupt

    two = RunDirectory(tmp_path / "run", parse_config(PLAIN, [*TINY, "rounds=2"]))
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STEPS, "finetune_classifier", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(two)
    second = rounds_there(two)[1]
    dataset = {path: path.stat().st_mtime_ns for path in (second.path / "dataset").iterdir()}
    pipeline.run(RunDirectory(tmp_path / "run", None))
    assert {path: path.stat().st_mtime_ns for path in (second.path / "dataset").iterdir()} == dataset
    assert {path: path.stat().st_mtime_ns for path in first} == first, "the first round was touched"

    # By hand: a run with the fine-tuned classifier as its own, and the second round's seed.
    own = [
        f"base.classifier={{checkpoint: {one.model('classifier_finetuned')}}}",
        f"base.denoiser={one.model('denoiser')}",
    ]
    by_hand = RunDirectory(tmp_path / "hand", parse_config(PLAIN, [*TINY, *own, "seed=1000"]))
    pipeline.run(by_hand)
    for store in STORES:
        assert rows(RunDirectory(second.folder, None), store) == rows(by_hand, store)
        assert rows(by_hand, store) != rows(one, store)

    _, section = report_job.sections(one, report_data(one.config, one.folder, one.manifest))
    for name, run in (("Round 1", one), ("Round 2", by_hand)):
        found = ShardStore(run.folder, "certificates/dual").read().to_pandas()
        expected = [100 * np.mean(found.correct & (found.radius > radius)) for radius in (0.0, 0.2)]
        assert [float(cell.strip("*")) for cell in cells(section.summary)[name]] == pytest.approx(expected, abs=0.005)

    capsys.readouterr()
    assert run_main(audit, "--out", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing found"
    assert "rounds/2/certificates/dual: 30 rows" in out
    assert run_main(status, "--out", str(tmp_path / "run")) == 0
    assert "rounds/2/dataset: 40/40 examples (100%), finished" in capsys.readouterr().out
    assert run_main(pipeline, "--out", str(tmp_path / "run"), "--dry-run") == 0
    assert "rounds=2: this is the first round alone" in capsys.readouterr().out


def finetuned_run(path: Path) -> RunDirectory:
    """A tiny run whose classifier counts as fine-tuned."""
    run = tiny_run(path, "compute.executor=local", "rounds=3", "dataset.train.first=5")
    torch.manual_seed(7)
    save_model(SmallConvNet(1, 8, 10), run.model("classifier_finetuned"))
    wrote = {"classifier_finetuned": file_sha256(run.model("classifier_finetuned"))}
    run.finish("finetune_classifier", read={}, wrote=wrote, facts={})
    return run


def test_begin_round_takes_the_networks_of_the_round_before_and_mends_what_a_kill_left(tmp_path: Path) -> None:
    run = finetuned_run(tmp_path)
    second = begin_round(run, 2)
    assert second.folder == run.folder / "rounds/2"
    assert (second.config.seed, second.config.rounds) == (1000, 1)
    for name, source in (("classifier", "classifier_finetuned"), ("denoiser", "denoiser")):
        assert second.model(name).read_bytes() == run.model(source).read_bytes()
    with pytest.raises(ConfigError, match=r"classifier_finetuned.safetensors' is not there yet"):
        begin_round(run, 3)
    second.model("denoiser").unlink()  # as if it had been killed before
    assert begin_round(run, 2).model_hashes(["denoiser"]) == run.model_hashes(["denoiser"])
    assert broken_links(rounds_there(run)) == []


def test_round_whose_base_is_not_the_classifier_of_the_round_before_is_found_and_refused(tmp_path: Path) -> None:
    run = finetuned_run(tmp_path)
    build_dataset.run(begin_round(run, 2))
    save_model(load_model(run.model("classifier")), run.model("classifier_finetuned"))
    wrote = {"classifier_finetuned": file_sha256(run.model("classifier_finetuned"))}
    run.finish("finetune_classifier", read={}, wrote=wrote, facts={})
    assert broken_links(rounds_there(run)) == [
        ("rounds/2", "its classifier is not the classifier_finetuned of the round before")
    ]
    with pytest.raises(ConfigError, match="made from other inputs"):
        build_dataset.run(begin_round(run, 2))


def better() -> ReportData:
    """The five examples of the report's tests, where Dual RS certifies the fourth one too and the third no more."""
    changed = replace(
        dual(),
        correct=np.array([True, True, False, True, False]),
        radius=np.array([0.6, 0.7, 0.0, 0.3, 0.0]),
        abstained=np.array([False, False, True, False, True]),
        sigma=np.array([0.5, 0.5, 0.25, 0.5, 0.25]),
        bounded_by=np.array(["class", "sigma", "none", "class", "none"]),
    )
    return replace(report(), dual=changed)


def test_rounds_section_five_examples_equals_hand_count(tmp_path: Path) -> None:
    section = rounds_section([report(), better()])
    assert cells(section.summary)["Round 1"] == ["**60.00**", "40.00", "**40.00**", "0.00", "0.00"]
    assert cells(section.summary)["Round 2"] == ["**60.00**", "**60.00**", "**40.00**", "0.00", "0.00"]
    write_report(report(), tmp_path, [section])
    page = (tmp_path / "report.md").read_text()
    (changes,) = [part for part in page.split("\n\n") if part.startswith("| Examples beyond radius")]
    assert cells(changes)["Round 2 against round 1"] == ["+1 -1", "+1 -0", "+0 -0", "+0 -0", "+0 -0"]
    (summary,) = [part for part in page.split("\n\n") if part.startswith("| Dual RS ") and "Mean draws" in part]
    # Abstained, by the estimator, capped, best sigma of the 4 that some sigma certifies, median lost radius.
    assert cells(summary)["Round 1"][:5] == ["40.00%", "20.00%", "20.00%", "75.00%", "0.0000"]
    assert cells(summary)["Round 2"][:5] == ["40.00%", "0.00%", "20.00%", "75.00%", "0.0000"]
    with (tmp_path / "rounds.csv").open() as file:
        found = {(row["round"], float(row["radius"])): float(row["certified_accuracy"]) for row in csv.DictReader(file)}
    assert (found["1", 0.25], found["2", 0.25], len(found)) == (0.4, 0.6, 10)
    assert (tmp_path / "rounds.png").stat().st_size > 0
    assert "rounds.png" in page
    with pytest.raises(DataError, match="each has certificates of Dual RS"):
        rounds_section([report(), replace(report(), dual=None)])
