"""Distribution shift: corrupted sets are certified with the run's networks, once, and reported beside the clean one."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core import DualSmoothedClassifier, SmoothedClassifier
from core.config import Config, parse_config
from core.data.corruptions import corrupt_images
from core.errors import ConfigError, DataError
from core.files import file_sha256
from core.models.checkpoints import load_model, save_model
from core.report import StandardRows
from core.report.render import write_report
from core.report.shift import Shifted, shift_section
from distributed.checks import dry_run
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.shift import sets_there, shifted_config
from jobs import audit, certify, shift, status
from jobs import report as report_job
from tests.core.report.test_report import cells, dual, report
from tests.helpers.tiny import PLAIN, run_main, tiny_run

SETS = (("contrast", 1), ("rotate", 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A tiny run of 12 test images, certified, and two corrupted sets of every third of them."""
    directory = tiny_run(
        tmp_path_factory.mktemp("shift") / "run",
        "compute.executor=local", "compute.device=cpu", "dataset.test.first=12", "certify.num_estimation=40",
    )  # fmt: skip
    save_model(load_model(directory.model("classifier")), directory.model("classifier_finetuned"))
    wrote = {"classifier_finetuned": file_sha256(directory.model("classifier_finetuned"))}
    directory.finish("finetune_classifier", read={}, wrote=wrote, facts={})
    for method in ("standard", "dual"):
        certify.run(directory, method)
    shift.run(directory, SETS, every=3)
    return directory


def test_shift_rows_equal_certificates_of_the_corrupted_images_by_the_public_api(run: RunDirectory) -> None:
    models = {name: load_model(run.model(name)) for name in ("classifier_finetuned", "denoiser", "estimator")}
    sampling: dict[str, Any] = {"num_selection": 20, "num_estimation": 40, "alpha": 0.01, "batch_size": 64}
    plain: dict[str, Any] = {"denoiser": models["denoiser"]}
    clean = run.data("test").take([0, 3, 6, 9])
    for (corruption, severity), directory in zip(SETS, sets_there(run), strict=True):
        data = corrupt_images(clean, "digits-c", corruption, severity)
        images, ids = [torch.from_numpy(data.image(index)) for index in range(4)], list(data.example_ids)
        for sigma in (0.25, 0.5):
            smoothed = SmoothedClassifier(models["classifier_finetuned"], 10, sigma, **plain)
            expected = smoothed.certify_many(images, example_ids=ids, **sampling)
            rows = ShardStore(directory.folder, "certificates/standard").read().to_pylist()
            found = [row for row in rows if row["sigma"] == sigma]
            assert [row["example_id"] for row in found] == ids
            assert [row["counts_estimation"] for row in found] == [c.counts_estimation.tolist() for c in expected]
            assert [row["radius"] for row in found] == [c.radius for c in expected]
        both = DualSmoothedClassifier(
            models["estimator"], models["classifier_finetuned"], (0.25, 0.5), 0.5, 10, **plain
        )  # fmt: skip
        duals = both.certify_many(images, example_ids=ids, **sampling)
        rows = ShardStore(directory.folder, "certificates/dual").read().to_pylist()
        assert [(row["radius"], row["counts_estimation_sigma"]) for row in rows] == [
            (c.radius, c.sigma_stage.counts_estimation.tolist()) for c in duals
        ]


def test_shift_borrows_the_networks_and_a_second_call_writes_no_row(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_job, "run", lambda directory: None)  # figures take their time
    assert list((run.path / "shift").rglob("*.safetensors")) == []
    assert sets_there(run)[0].models == run.models
    before = {path: path.stat().st_mtime_ns for path in (run.path / "shift").rglob("*.parquet")}
    shift.run(run, SETS, every=3)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run_main(audit, "--out", str(run.path), "--replay", "3") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing found"
    assert "shift/contrast-1/certificates/standard: 8 rows" in out
    assert run_main(status, "--out", str(run.path)) == 0
    assert "shift/rotate-3/certificates/dual: 4/4 examples" in capsys.readouterr().out


def test_shift_report_holds_what_the_rows_say(run: RunDirectory) -> None:
    with (run.path / "report" / "shift.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {(row["corruption"], row["severity"]) for row in found} == {
        ("none", "0"), ("contrast", "1"), ("rotate", "3"),
    }  # fmt: skip
    table = ShardStore(run.folder / "shift/rotate-3", "certificates/standard").read().to_pandas()
    for row in found:
        if row["corruption"] == "rotate" and row["method"] == "Standard RS, sigma = 0.25":
            part = table[table.sigma == 0.25]
            assert float(row["certified_accuracy"]) == (part.correct & (part.radius > float(row["radius"]))).mean()
    assert "No corruption was certified at every severity shown" in (run.path / "report" / "report.md").read_text()


def test_shift_other_part_of_the_test_images_is_refused(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=r"dataset.test.every: 3 there, 1 now"):
        shift.run(run, SETS[:1])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--severities", "6"], 2, "--severities are 1 to 5"),
        (["--severities", "a"], 2, "expected numbers such as 1,3,5"),
        (["--corruptions", "fog", "--severities", "1"], 3, "no 'fog' (dataset.corruption)"),
        (["--path", "/data"], 2, "the digits are corrupted here"),
    ],
)
def test_shift_job_bad_input_is_one_message(
    run: RunDirectory, flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(shift, "--out", str(run.path), *flags) == code
    assert message in capsys.readouterr().err
    assert [folder.name for folder in sorted((run.path / "shift").iterdir())] == ["contrast-1", "rotate-3"]


def test_shift_dry_run_counts_a_set_and_writes_nothing(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "dry_run", partial(dry_run.dry_run, seconds=0.01))
    assert run_main(shift, "--out", str(run.path), "--corruptions", "pixelate", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "5 sets; this is pixelate, severity 1" in out
    assert "certify-dual" in out
    assert not (run.path / "shift" / "pixelate-1").exists()


def of(name: str, **dataset: Any) -> Config:
    return parse_config(PLAIN | {"dataset": {"name": name, **dataset}})


def test_shifted_config_published_sets_keep_the_part_and_the_size_of_the_images() -> None:
    cifar = of("cifar10", path="/clean", layout="parquet", test={"every": 2, "first": 25})
    shifted = shifted_config(cifar, "fog", 3, "/C", every=10).dataset
    assert (shifted.name, shifted.path, shifted.corruption, shifted.severity) == ("cifar10-c", "/C", "fog", 3)
    assert (shifted.layout, shifted.test.every, shifted.test.first) == ("original", 20, 3)
    imagenet = of("imagenet", path="/clean", class_file="names.txt", test={"path": "/val", "share": 0.5, "seed": 3})
    shifted = shifted_config(imagenet, "fog", 1, "/C").dataset
    assert (shifted.resize_crop, shifted.class_file) == ((0, 0), "names.txt")  # ImageNet-C is 224 pixels already
    assert (shifted.test.path, shifted.test.share, shifted.test.seed) == (None, 0.5, 3)
    larger = of("imagenet", path="/clean", resize=292, crop=256)
    assert shifted_config(larger, "fog", 1, "/C").dataset.resize_crop == (256, 256)
    same = shifted_config(cifar, "fog", 3, "/C").model_dump(exclude={"dataset"})
    assert same == cifar.model_dump(exclude={"dataset"})


@pytest.mark.parametrize(
    ("config", "path", "message"),
    [
        (of("folder", path="/own"), "/C", "no corrupted version of 'folder'"),
        (of("cifar10", path="/clean"), None, "say where the corrupted version of cifar10 is"),
        (of("cifar10", path="/clean", test={"ids_file": "ids.txt"}), "/C", "names clean images"),
    ],
)
def test_shifted_config_that_cannot_be_is_refused(config: Config, path: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shifted_config(config, "fog", 1, path)


def scaled(factor: float) -> Any:
    """The five examples of the report's tests with radii that are smaller; the fifth never counts."""

    def smaller(rows: StandardRows) -> StandardRows:
        return replace(rows, radius=factor * rows.radius)

    changed = replace(dual(), radius=factor * dual().radius, sigma_choice=np.array([1, 1, 0, 0, 0]))
    return replace(report(), standard=tuple(map(smaller, report().standard)), dual=changed)


def test_shift_section_five_examples_equals_hand_count(tmp_path: Path) -> None:
    sets = [Shifted("fog", 1, scaled(0.9)), Shifted("snow", 1, scaled(0.4)), Shifted("fog", 2, scaled(0.4))]
    section = shift_section(report(), [*sets, Shifted("snow", 2, scaled(0.4))])
    write_report(report(), tmp_path, [section])
    page = (tmp_path / "report.md").read_text()
    (fog,) = [part for part in page.split("\n\n") if part.startswith("| fog: certified accuracy")]
    # 0.9 x: sigma 0.25: .27 .27 .18 .09; sigma 0.5: .54 1.08 (wrong) 0; Dual RS: .54 .63 .18
    assert cells(fog)["1: Standard RS, sigma = 0.25"] == ["**80.00**", "**40.00**", "0.00", "0.00", "0.00"]
    assert cells(fog)["1: Standard RS, sigma = 0.5"] == ["40.00", "**40.00**", "**40.00**", "**20.00**", "0.00"]
    assert cells(fog)["1: Dual RS"] == ["60.00", "**40.00**", "**40.00**", "0.00", "0.00"]
    # 0.4 x: .12 .12 .08 .04; .24 .48; .24 .28 .08
    assert cells(fog)["2: Dual RS"] == ["60.00", "**20.00**", "0.00", "0.00", "0.00"]
    assert cells(fog)["0 (clean): Dual RS"] == ["60.00", "**40.00**", "**40.00**", "0.00", "0.00"]
    assert "Oracle" not in fog
    assert "off the shelf" not in fog
    # The mean over fog and snow, severity 1: (40 + 20) / 2 beyond 0.25 for Dual RS.
    assert cells(section.summary)["1: Dual RS"] == ["60.00", "**30.00**", "**20.00**", "0.00", "0.00"]
    (choice,) = [part for part in page.split("\n\n") if part.startswith("| Test set")]
    assert cells(choice)["clean"] == ["40.0%", "60.0%", "20.0%"]
    assert cells(choice)["snow, severity 2"] == ["60.0%", "40.0%", "20.0%"]
    assert (tmp_path / "shift.png").stat().st_size > 0
    with (tmp_path / "shift.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 3 * 5
    with pytest.raises(DataError, match="has other radii"):
        shift_section(report(), [Shifted("fog", 1, replace(report(), radii=np.array([0.0])))])
