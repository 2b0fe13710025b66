"""Runs without a denoiser: experts that read the noisy image itself, through every job; and without fine-tuning."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.config import parse_config
from core.models.checkpoints import load_model
from core.report import ReportData, render
from core.report.pages import Section
from distributed.checks import dry_run
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.adopt import adopt, shared_config
from jobs import audit, choose_sigmas, finetune_classifier, pipeline, predict, shift, status, train_base
from tests.helpers.reference_noise import normals
from tests.helpers.tiny import PLAIN, run_main

SMALL = (
    "base.denoiser=none", "compute.executor=local",
    "dataset.test_size=800", "dataset.train.first=200", "dataset.test.first=20", "estimator.epochs=2",
    "finetune.epochs=1", "finetune.num_sigma_draws=10", "finetune.lr=1e-3", "labels.num_selection=5",
    "labels.num_estimation=20", "certify.num_selection=5", "certify.num_estimation=20", "compute.part_rows=1",
)  # fmt: skip
POOL = "base.experts={0.25: {width: 4, train: {epochs: 30}}, 0.5: {width: 8, train: {epochs: 30}}}"
EXPERTS = ("classifier-0.25", "classifier-0.5")


def votes_of(network: nn.Module, image: np.ndarray, seed: int, example_id: str, sigma: float) -> list[int]:
    """The 20 estimation votes of a bare network: noise from the key's definition, one copy at a time."""
    noise = normals(seed, example_id, "estimation", sigma, 20, image.shape)
    copies = torch.from_numpy(image.astype(np.float32) / 255 + np.float32(sigma) * noise)
    with torch.inference_mode():
        answers = [int(network(copy[None]).argmax()) for copy in copies]
    return [answers.count(label) for label in range(10)]


@pytest.mark.parametrize("epochs", [1, 0])
def test_pipeline_of_a_pool_without_a_denoiser_votes_on_the_noisy_images_themselves(
    tmp_path: Path, epochs: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[bytes] = []

    def write(data: ReportData, folder: Path, sections: Sequence[Section]) -> None:  # figures take seconds
        pages.extend(section.files["examples.html"] for section in sections if "examples.html" in section.files)

    monkeypatch.setattr(render, "write_report", write)
    out = str(tmp_path / "run")
    config = parse_config(PLAIN, [*SMALL, POOL, f"finetune.epochs={epochs}"])
    pipeline.run(RunDirectory(out, config))
    run = RunDirectory(out, None, "look")
    steps = run.manifest["steps"]
    written = {name for step in steps.values() for name in step["wrote"]}
    tuned = tuple(name.replace("classifier", "classifier_finetuned") for name in EXPERTS)
    assert written == {*EXPERTS, "estimator", *(tuned if epochs else ())}
    assert {path.stem for path in (run.path / "models").glob("*.safetensors")} == written
    assert ("finetune_classifier" in steps) == bool(epochs)
    certified = tuned if epochs else EXPERTS
    assert set(steps["certify-dual"]["read"]) == {*certified, "estimator"}

    images, rows = run.data("test"), ShardStore(run.folder, "certificates/standard").read().to_pylist()
    networks = dict(zip(config.sigmas, (load_model(run.model(name)) for name in certified), strict=True))
    for row in rows[::5]:
        image = images.image(images.example_ids.index(row["example_id"]))
        found = votes_of(networks[row["sigma"]], image, config.seed, row["example_id"], row["sigma"])
        assert found == row["counts_estimation"], row["example_id"]
    assert sum(row["correct"] for row in rows) > len(rows) / 3, "the experts have learnt something"
    (page,) = re.findall(r'id="data">(.*?)</script>', pages[0].decode())
    shots = json.loads(page)["gallery"]
    assert len(shots) > 1
    assert all("noisy" in shot and "denoised" not in shot for shot in shots)

    store = ShardStore(run.folder, "certificates/dual")
    before = store.read()
    (run.path / "certificates/dual" / store.files()[0]).unlink()
    capsys.readouterr()
    assert run_main(pipeline, "--out", out) == 0
    assert store.read().equals(before)
    assert ("finetune_classifier" in capsys.readouterr().out) == bool(epochs)
    assert run_main(audit, "--out", out, "--replay", "4") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing found"
    assert run_main(pipeline, "--out", out, "--dry-run") == 0
    assert "everything is finished" in capsys.readouterr().out
    if epochs:
        return
    assert run_main(status, "--out", out) == 0
    assert run_main(choose_sigmas, "--out", out, "--size", "1") == 0
    assert run_main(shift, "--out", out, "--corruptions", "gaussian_noise", "--severities", "1") == 0
    assert run_main(finetune_classifier, "--out", out) == 2
    assert "finetune.epochs: is 0, so there is no step finetune_classifier" in capsys.readouterr().err
    named = tmp_path / "images" / "one.png"
    named.parent.mkdir()
    write_png(named, images.image(0))
    assert run_main(predict, "--out", out, "--images", str(named.parent), "--to", str(tmp_path / "rows.csv")) == 0
    assert (tmp_path / "rows.csv").read_text().splitlines()[1].startswith("one")


def write_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(image[0]).save(path)


def test_dry_run_of_a_run_without_a_denoiser_counts_no_row_through_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "dry_run", partial(dry_run.dry_run, seconds=0.01))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(PLAIN))
    arguments = ("--config", str(config), "--out", str(tmp_path / "run"), *SMALL, POOL)
    assert run_main(pipeline, *arguments, "--dry-run") == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in lines if line[0] == "step")
    parts = {line[0]: dict(zip(header, line, strict=False)) for line in lines if len(line) == len(header)}
    assert {name: part["denoiser"] for name, part in parts.items() if name != "step"} == {
        **dict.fromkeys(("build_dataset", "train_estimator", "certify-standard", "certify-dual"), "-"),
        **dict.fromkeys(("finetune_classifier, sigmas", "finetune_classifier, training"), "-"),
        **dict.fromkeys((f"train_base, {role}" for role in EXPERTS), "-"),
    }
    for role in EXPERTS:
        assert parts[f"train_base, {role}"]["classifier"] == f"{30 * 200:,}", "noisy copies, no clean ones"
    assert not any(line[0] == "denoiser" for line in lines)
    assert not (tmp_path / "run").exists()


def test_adopt_base_models_of_a_run_without_a_denoiser(tmp_path: Path) -> None:
    config = parse_config(PLAIN, [*SMALL, "base.classifier.train.epochs=1"])
    source = RunDirectory(tmp_path / "shared", shared_config(config, "train_base", config.sigmas))
    train_base.run(source)
    target = RunDirectory(tmp_path / "run", config)
    adopt(target, source, "train_base")
    assert target.model_hashes(["classifier"]) == source.model_hashes(["classifier"])
    assert [path.name for path in (target.path / "models").iterdir()] == ["classifier.safetensors"]
