"""A dry run without the files: the same architectures with random weights, said so, and refused in the end."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml

from core.config import Config, load_config, parse_config
from core.data import Dataset, Split
from core.errors import DualRSError
from core.models.resnet_cifar import ResNetCifar
from distributed.checks import measure
from distributed.checks.dry_run import dry_run
from distributed.checks.preflight import check, count_found
from distributed.checks.published import published_data
from distributed.store.run_directory import RunDirectory
from distributed.store.sources import base_model
from jobs import pipeline
from tests.helpers.miniatures import ROOT

EXPERTS = {
    "sigmas": [0.25, 0.5],
    "dataset": {"name": "cifar10", "path": "nowhere/data"},
    "base": {
        "denoiser": "none",
        "experts": {
            0.25: {"arch": "resnet110", "checkpoint": "nowhere/a.pt", "mean": [0.5], "std": [0.5]},
            0.5: {"arch": "resnet18", "checkpoint": "nowhere/b.pt", "input_size": 32},
        },
    },
    "estimator": {"backbone": {"arch": "resnet110"}, "batch_size": 8},
    "finetune": {"epochs": 0},
    "report": {"radii": [0, 0.25]},
    "compute": {"executor": "local", "device": "cpu", "batch_size": 16},
}
"""Two networks of 64 MFLOPs an image."""


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of the table."""
    cells = [re.split(r"\s{2,}", line.replace("<= ", "")) for line in text.splitlines()]
    return {name: rest for name, *rest in cells}


def run_dry(config: Config, where: Path, *steps: str) -> DualRSError:
    """The error that a dry run ends with."""
    with pytest.raises(DualRSError) as caught:
        dry_run(RunDirectory(where, config, "dry"), steps or pipeline.steps_of(config), 3.0, seconds=0.02)
    assert not where.exists()
    return caught.value


def test_dry_run_without_files_measures_random_weights_and_refuses_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = str(run_dry(parse_config(EXPERTS, []), tmp_path / "run"))
    for missing in ("'nowhere/data' is not there", "base.experts.0.25: no checkpoint", "base.experts.0.5: no checkpo"):
        assert missing in error
    said = capsys.readouterr().out
    assert "random weights, files are missing: base.experts.0.25, base.experts.0.5;" in said
    assert "black images, files are missing: dataset.train, dataset.test;" in said
    assert "classifier-0.5   random weights instead of nowhere/b.pt, 11," in said
    rows = rows_of(said)
    assert rows["build_dataset"][:4] == ["50,000", "20,000,000", "-", "-"]
    for step in ("build_dataset", "train_estimator", "certify-standard", "certify-dual"):
        rate, hours = rows[step][5:7]
        copies = int(rows[step][1].replace(",", ""))
        assert copies / float(rate.replace(",", "")) / 3600 == pytest.approx(float(hours.replace(",", "")), rel=0.05)


def test_network_with_random_weights_is_the_one_that_a_file_would_fill(tmp_path: Path) -> None:
    torch.save(ResNetCifar(10).state_dict(), tmp_path / "a.pt")
    plain = yaml.safe_load(yaml.safe_dump(EXPERTS).replace("nowhere/a.pt", str(tmp_path / "a.pt")))
    made = {}
    for name, config in (("file", parse_config(plain, [])), ("random", parse_config(EXPERTS, []))):
        absent = ["base.experts.0.25"] if name == "random" else []
        run = RunDirectory(tmp_path / "run", config, "dry")
        made[name] = base_model(run, "classifier-0.25", (3, 32, 32), 10, None, absent)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in made.values()]
    assert shapes[0] == shapes[1]
    specs = [network.spec for network in made.values()]
    assert specs[0] == specs[1]


def test_dry_run_goes_on_without_a_network_that_only_its_file_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(EXPERTS, ["base={denoiser: none, classifier: {checkpoint: nowhere/own.safetensors}}"])
    assert "no checkpoint at 'nowhere/own.safetensors'" in str(run_dry(config, tmp_path / "run"))
    said = capsys.readouterr().out
    assert (
        "'nowhere/own.safetensors' is missing, and nothing else says its architecture: nothing is measured of it"
        in said
    )
    assert "build_dataset: not measured, its classifier is not known" in said
    rows = rows_of(said)
    assert [rows[step][5] for step in ("build_dataset", "certify-dual")] == ["not measured"] * 2
    assert float(rows["train_estimator"][5].replace(",", "")) > 0
    denoiser = parse_config(
        EXPERTS, ["base={denoiser: nowhere/own.pt, classifier: {arch: resnet110, pretrained: true}}"]
    )
    found = check(RunDirectory(tmp_path / "run", denoiser, "dry"), ["train_base"], here=False)
    assert dict(found.facts)["denoiser"].startswith("'nowhere/own.pt' is missing, and neither a config.json nor")


def test_dry_run_for_a_gpu_that_is_not_here_gives_no_number_of_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "_engine_rate", lambda *args: (1000.0, 0.0))
    run_dry(parse_config(EXPERTS, ["compute.train_device=cuda"]), tmp_path / "run")
    rows = rows_of(capsys.readouterr().out)
    assert rows["build_dataset"][5] == "1,000"
    assert rows["train_estimator"][5] == "not measured"
    run_dry(parse_config(EXPERTS, ["compute.device=cuda"]), tmp_path / "run")
    said = capsys.readouterr().out
    assert {rows_of(said)[step][5] for step in ("build_dataset", "train_estimator", "certify-dual")} == {"not measured"}
    assert "nothing can be measured here. For hours and a price without a device and files: --rate" in said


def test_dry_run_measures_slow_networks_on_a_single_image_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_one_row_s", lambda *args: 8.0)
    run_dry(parse_config(EXPERTS, ["compute.batch_size=auto"]), tmp_path / "run", "train_base", "build_dataset")
    said = capsys.readouterr().out
    assert "classifier: measured in two passes of one image instead of batches of 500: one image takes 8 s" in said
    assert rows_of(said)["build_dataset"][5] == "0.125"


@pytest.mark.parametrize(
    ("override", "random", "said"),
    [
        ("estimator={backbone: features}", "base.experts.0.25, base.experts.0.5", "of 2 images instead of 4"),
        (
            "base={denoiser: nowhere/own.pt, classifier: {arch: resnet18, checkpoint: nowhere/b.pt, input_size: 32}}",
            "base.classifier",
            "build_dataset: not measured, its denoiser is not known",
        ),
    ],
)
def test_training_on_slow_random_networks_is_measured_in_smaller_batches(
    override: str,
    random: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where float16 does not hold the features of random weights, and beside a denoiser that nothing reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_one_image_s", lambda *args: 8.0)
    monkeypatch.setattr(measure, "_engine_rate", lambda *args: (1000.0, 0.0))
    run_dry(parse_config(EXPERTS, [override, "estimator.denoiser=false"]), tmp_path / "run")
    text = capsys.readouterr().out
    assert said in text
    assert "train_estimator: measured in batches of 2 images" in text
    assert f"random weights, files are missing: {random};" in text
    assert float(rows_of(text)["train_estimator"][5]) > 0


def test_replica_elsewhere_stands_in_for_the_files_that_are_missing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a task of Ray runs, with what it is given, in another folder."""
    config = parse_config(EXPERTS, ["dataset.train={first: 64}"])
    run = RunDirectory(tmp_path / "run", config, "dry")
    monkeypatch.chdir(tmp_path)
    found = check(run, ["train_base", "build_dataset"], here=False)
    given = (run.folder, config, count_found(run, found, 1), tuple(found.data), "cpu", 0.02, tuple(found.absent))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    parts, notes, _ = measure._measured(*pickle.loads(pickle.dumps(given)))
    assert [(part.name, part.examples, notes) for part in parts] == [("build_dataset", 64, [])]
    assert all(rate > 0 for rate in parts[0].rates.values())
    assert parts[0].rates


def test_missing_files_do_not_hide_another_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "measure_parts", lambda *args: pytest.fail("measured before it was refused"))
    (tmp_path / "damaged.pt").write_bytes(b"no checkpoint")
    own = "base={denoiser: damaged.pt, classifier: {arch: resnet110, checkpoint: nowhere/a.pt}}"
    error = run_dry(parse_config(EXPERTS, [own]), tmp_path / "run")
    assert "'nowhere/a.pt'" in str(error)
    assert "damaged.pt' is neither a safetensors file" in str(error)


@pytest.mark.parametrize(
    ("name", "split", "num", "shape"),
    [
        ("cifar10", "train", 50_000, (3, 32, 32)),
        ("imagenet", "train", round(0.2 * 1_281_167), (3, 224, 224)),
        ("imagenet", "test", 500, (3, 224, 224)),
    ],
)
def test_published_data_has_the_size_and_shape_of_the_set(
    name: str, split: Split, num: int, shape: tuple[int, int, int]
) -> None:
    data = published_data(load_config(ROOT / "configs" / f"{name}.yaml", []), split)
    assert isinstance(data, Dataset)
    assert (len(data), data.shape, data.image(num - 1).shape) == (num, shape, shape)


def test_published_data_of_a_set_of_ones_own_is_not_known() -> None:
    config = parse_config({**EXPERTS, "dataset": {"name": "folder", "path": "nowhere"}}, [])
    assert published_data(config, "train") is None
