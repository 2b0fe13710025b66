"""The published configurations end to end, on miniatures of the published data sets and models."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torchvision.models import resnet50

from core.config import load_config
from core.models.checkpoints import load_model
from core.models.denoiser import OneShotDenoiser
from distributed.checks.audit import audit, replay
from distributed.methods.rows import ERROR, OK
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import certify, pipeline
from tests.core.models.test_classifiers import TINY, hf_vit
from tests.core.models.test_published_layouts import random_weights, resnet110_shapes, write
from tests.helpers import miniatures
from tests.helpers.openai_reference import CIFAR

ROOT = miniatures.ROOT
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def shrunk(name: str, out: Path, **keys: Any) -> RunDirectory:
    """A run of `configs/<name>.yaml` made small."""
    return RunDirectory(out, load_config(ROOT / "configs" / f"{name}.yaml", miniatures.overrides(**keys)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_is_valid_and_survives_the_manifest(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = RunDirectory(tmp_path / "run", config).config.model_dump(mode="json")
    assert RunDirectory(tmp_path / "run", None).config == config
    assert json.loads(json.dumps(again)) == again


def test_published_settings_are_those_of_the_paper() -> None:
    cifar, experts, imagenet = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("cifar10", "cifar10_experts", "imagenet")
    )
    assert cifar.sigmas == (0.25, 0.5, 1.0)
    assert experts.sigmas == (0.25, 1.0)
    assert list(experts.classifiers) == ["classifier-0.25", "classifier-1.0"]
    assert imagenet.sigmas == (0.5, 1.0)
    for config in (cifar, experts, imagenet):
        assert (config.estimator_sigma, config.labels.num_estimation) == (1.0, 100)
        draws = config.certify
        assert (draws.num_selection, draws.num_estimation, draws.alpha, draws.alpha_split) == (
            100, 10_000, 0.001, "halves",
        )  # fmt: skip
        loss = config.estimator
        assert (loss.consistency_lambda, loss.consistency_eta, loss.num_copies) == (40, 0.5, 2)
    estimator, finetune = cifar.estimator, cifar.finetune
    assert (estimator.epochs, estimator.batch_size, estimator.lr, estimator.weight_decay) == (90, 128, 0.01, 0.01)
    assert (estimator.augment, finetune.augment, cifar.compute.precision) == ("crop_flip", "none", "float16")
    kept = 47_302  # of their labels; the loader's batches of 256, each cut into num_noise_vec steps
    assert estimator.epochs * math.ceil(kept / estimator.batch_size) == 90 * 2 * math.ceil(kept / 256) == 33_300
    assert (estimator.lr_step, estimator.lr_gamma, estimator.consistency_weight) == (30, 0.5, "strong")
    assert (finetune.epochs, finetune.batch_size, finetune.lr) == (15, 128, 2e-5)
    assert (imagenet.estimator.epochs, imagenet.estimator.consistency_weight) == (9, "weak")
    assert imagenet.finetune.epochs == 1
    assert imagenet.finetune.share * imagenet.dataset.train.share == pytest.approx(0.02)
    assert 50_000 // imagenet.dataset.test.every == 500


def check(directory: RunDirectory, test_ids: list[str], train: int) -> None:
    """Everything is there, and nothing is wrong with it."""
    levels = len(directory.config.sigmas)
    assert ShardStore(directory.folder, "dataset").read().num_rows == train * levels
    for store, rows in (("certificates/standard", levels), ("certificates/dual", 1)):
        table = ShardStore(directory.folder, store).read()
        assert table.column("example_id").to_pylist() == sorted(test_ids * rows)
        assert set(table.column("status").to_pylist()) == {OK}
    findings, _ = audit(directory)
    assert findings == []
    assert "Dual RS" in (directory.path / "report" / "report.md").read_text()


def test_cifar10_pickles_run_end_to_end(tmp_path: Path) -> None:
    directory = shrunk(
        "cifar10",
        tmp_path / "run",
        dataset__path=str(miniatures.cifar10_pickles(tmp_path / "data")),
        **miniatures.openai_unet(tmp_path / "unet.pt"),
        base__classifier=miniatures.vit_folder(tmp_path / "vit"),
    )
    pipeline.run(directory)
    check(directory, [f"cifar10-test-{index:05d}" for index in range(4)], train=20)
    denoiser = load_model(directory.model("denoiser"))
    assert isinstance(denoiser, OneShotDenoiser)
    assert (denoiser.schedule, denoiser.num_steps) == ("cosine", 4000)
    assert type(load_model(directory.model("estimator")).net).__name__ == "ResNetCifar"
    certify.run(directory, "dual", "base")  # the row "off the shelf"
    assert ShardStore(directory.folder, "certificates/dual-base").read().num_rows == 4


@pytest.mark.slow
def test_cifar10_parquet_runs_end_to_end(tmp_path: Path) -> None:
    directory = shrunk(
        "cifar10",
        tmp_path / "run",
        dataset__path=str(miniatures.cifar10_parquet(tmp_path / "hub")),
        dataset__layout="parquet",
        **miniatures.openai_unet(tmp_path / "unet.pt"),
        base__classifier=miniatures.vit_folder(tmp_path / "vit"),
        finetune__share=0.5,
    )
    pipeline.run(directory)
    check(directory, [f"cifar10-test-{index:05d}" for index in range(3)], train=12)
    step = directory.manifest["steps"]["finetune_classifier"]
    assert (step["samples"], step["of"]) == (6, 12)


@pytest.mark.slow
def test_cifar10_c_is_certified_after_training_on_the_clean_images(tmp_path: Path) -> None:
    directory = shrunk(
        "cifar10",
        tmp_path / "run",
        dataset={
            "name": "cifar10-c",
            "path": str(miniatures.cifar10_c(tmp_path / "c")),
            "corruption": "fog",
            "severity": 2,
            "train": {"path": str(miniatures.cifar10_pickles(tmp_path / "clean")), "first": 10},
        },
        **miniatures.openai_unet(tmp_path / "unet.pt"),
        base__classifier=miniatures.vit_folder(tmp_path / "vit"),
    )
    pipeline.run(directory)
    check(directory, [f"cifar10-c-fog-2-{index:05d}" for index in range(4)], train=10)


def imagenet(tmp_path: Path, **keys: Any) -> RunDirectory:
    own: dict[str, Any] = {
        "dataset__path": str(tmp_path / "data"),
        "dataset__num_classes": 3,
        "dataset__resize": 40,
        "dataset__crop": 32,
        "dataset__train__share": 0.5,
        "dataset__test__every": 4,
        "base__denoiser": {"checkpoint": str(tmp_path / "unet.pt"), "schedule": "linear-1000", "head_dim": 64},
        "base__classifier": {
            "arch": TINY, "checkpoint": str(tmp_path / "vit"), "input_size": 32,
        },
        "estimator__backbone": {"arch": "resnet10t", "input_size": 32},
    }  # fmt: skip
    return shrunk("imagenet", tmp_path / "run", **(own | keys))


@pytest.fixture
def imagenet_files(tmp_path: Path) -> Path:
    miniatures.image_folder(tmp_path / "data")
    miniatures.openai_unet(tmp_path / "unet.pt", miniatures.GUIDED)
    miniatures.vit_folder(tmp_path / "vit", classes=3, favourite=1)
    return tmp_path


@pytest.mark.slow
def test_image_folder_runs_end_to_end_past_a_corrupt_image(
    imagenet_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ImageNet's structure; one broken training and one broken test image cost their own rows and nothing else."""
    directory = imagenet(imagenet_files, dataset__train__share=1.0, finetune__share=1.0)
    for broken in ("train/n02/n02_3.JPEG", "val/n02/n02_2.JPEG"):
        file = imagenet_files / "data" / broken
        file.write_bytes(file.read_bytes()[:700])
    pipeline.run(directory)
    out = capsys.readouterr().out
    assert "clean test images (1 cannot be read)" in out
    assert "fine-tuning: 1 of 18 images cannot be read and are left out" in out
    denoiser = load_model(directory.model("denoiser"))
    assert isinstance(denoiser, OneShotDenoiser)
    assert (denoiser.schedule, denoiser.num_steps) == ("linear", 1000)
    for store, broken, rows in (
        ("dataset", "train/n02/n02_3.JPEG", 18 * 2),
        ("certificates/standard", "val/n02/n02_2.JPEG", 5 * 2),
        ("certificates/dual", "val/n02/n02_2.JPEG", 5),
    ):
        table = ShardStore(directory.folder, store).read().to_pandas()
        assert len(table) == rows
        assert set(table[table.status == ERROR].example_id) == {broken}
    assert audit(directory)[0] == []
    assert (
        "1 examples could not be run and count as not certified"
        in (directory.path / "report" / "report.md").read_text()
    )


def expert_run(tmp_path: Path) -> RunDirectory:
    """Two experts of different architectures: at 0.25 a ResNet that says 3, at 1.0 a ViT that says 5; dark images are
    of class 3, bright ones of 5."""
    return shrunk(
        "cifar10_experts",
        tmp_path / "run",
        dataset__path=str(miniatures.cifar10_pickles(tmp_path / "data")),
        dataset__train__first=8,
        **miniatures.openai_unet(tmp_path / "unet.pt"),
        base__experts={
            0.25: miniatures.resnet_file(tmp_path / "dark.pt", 3),
            1.0: miniatures.vit_folder(tmp_path / "bright", favourite=5),
        },
        estimator__backbone=None,  # the small CNN on noisy images learns brightness at once
        estimator__denoiser=False,
        estimator__loss="hard",
        estimator__lr=0.001,
        estimator__epochs=40,
    )


@pytest.mark.slow
def test_experts_each_certify_their_own_sigma_and_the_estimator_routes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = expert_run(tmp_path)
    pipeline.run(directory)
    check(directory, [f"cifar10-test-{index:05d}" for index in range(4)], train=8)
    says = {0.25: 3, 1.0: 5}
    for store in ("dataset", "certificates/standard"):
        rows = ShardStore(directory.folder, store).read().to_pandas()
        assert (rows.prediction == rows.sigma.map(says)).all()
    dual = ShardStore(directory.folder, "certificates/dual").read().to_pandas()
    assert not dual.abstained.any()
    assert (dual.prediction == dual.sigma.map(says)).all()
    assert dual.correct.all()  # only because each image got its own expert
    steps = directory.manifest["steps"]
    assert set(steps["train_base"]["clean_accuracy"].items()) == {("classifier-0.25", 0.5), ("classifier-1.0", 0.5)}
    assert "classifier-0.25: 50.0% of 4 clean test images" in capsys.readouterr().out
    names = {path.name for path in (directory.path / "models").iterdir()}
    assert names == {
        *(f"classifier{kind}-{sigma}.safetensors" for kind in ("", "_finetuned") for sigma in says),
        "denoiser.safetensors",
        "card.md",
        "estimator.safetensors",
    }
    assert steps["finetune_classifier"]["share_of_samples_at_sigma"] == {"0.25": 0.5, "1.0": 0.5}
    for name in ("classifier-0.25", "classifier-1.0"):  # each has learnt something
        digest = steps["finetune_classifier"]["wrote"][name.replace("classifier", "classifier_finetuned")]
        assert digest != steps["train_base"]["wrote"][name]
    assert replay(directory, 4, seed=0) == []
    kinds = {role: type(load_model(directory.model(role)).net).__name__ for role in directory.config.classifiers}
    assert kinds == {"classifier-0.25": "ResNetCifar", "classifier-1.0": "VisionTransformer"}
    text = (directory.path / "report" / "report.md").read_text()
    assert "| Expert, sigma = 0.25 " in text
    assert "| Expert, sigma = 1 " in text
    certify.run(directory, "multiscale")  # the cascade over the pool: the largest sigma always decides here
    cascade = ShardStore(directory.folder, "certificates/multiscale").read().to_pandas()
    assert set(cascade.prediction) == {5}
    assert set(cascade.num_levels) == {1}


@pytest.mark.slow
def test_full_size_networks_certify_two_images_on_the_cpu(tmp_path: Path) -> None:
    """The published CIFAR-10 networks (random weights): 50M U-Net, ViT-B/16 at 224 pixels; prints time and memory."""
    (tmp_path / "vit").mkdir()
    save_file(hf_vit(768, 12, 16, 224, 10, "old"), tmp_path / "vit" / "model.safetensors")
    settings = [
        "sigmas=[0.25]",
        "sigma_e=0.25",
        f"dataset.path={miniatures.cifar10_pickles(tmp_path / 'data', labels=(3, 5))}",
        f"base.denoiser={miniatures.openai_unet(tmp_path / 'unet.pt', CIFAR)['base__denoiser']['checkpoint']}",
        f"base.classifier.checkpoint={tmp_path / 'vit'}",
        "certify.num_selection=10",
        "certify.num_estimation=100",
        "report.radii=[0, 0.25]",
        "compute.executor=local",
        "compute.device=cpu",
        "compute.batch_size=50",
        "compute.shard_examples=2",
        "compute.train_threads=2",
        "compute.train_device=cpu",
        "compute.threads_per_replica=2",
    ]
    config = ["--config", str(ROOT / "configs" / "cifar10.yaml")]
    took = {}
    for job, options in (("train_base", []), ("certify", ["--method", "standard", "--classifier", "base"])):
        start = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", "--out", str(tmp_path / "run"), *config, *options, *settings],
            cwd=ROOT,
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        took[job] = (
            f"{time.monotonic() - start:.0f} s, {usage.ru_utime:.0f} s of CPU, {usage.ru_maxrss / 2**20:.1f} GiB"
        )
    print(f"2 images, 110 draws each: {took}")
    rows = ShardStore(tmp_path / "run", "certificates/standard-base").read().to_pandas()
    assert rows.num_draws.tolist() == [110, 110]
    denoiser = load_model(tmp_path / "run" / "models" / "denoiser.safetensors")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 52_546_438


POOLS = {"cifar10_rn110_experts": "cifar_resnet110", "imagenet_rn50_experts": "resnet50"}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_public_experts_run_end_to_end_at_full_size(name: str, tmp_path: Path) -> None:
    """ResNet-110 on 32 pixels, ResNet-50 on 224: random weights in the layout of the public files, a few draws."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    large = config.dataset.name == "imagenet"
    shapes = dict(resnet110_shapes())
    if large:
        shapes = {key: tuple(value.shape) for key, value in resnet50(num_classes=3).state_dict().items()}
    keys: dict[str, Any] = {"dataset__path": str(tmp_path / "data"), "finetune__epochs": 0}
    if large:
        miniatures.image_folder(tmp_path / "data")
        keys |= {"dataset__num_classes": 3, "dataset__train__share": 0.5, "dataset__test__every": 6}
    else:
        miniatures.cifar10_pickles(tmp_path / "data")
        keys["dataset__train__first"] = 8
    experts = {}
    for sigma, expert in (config.base.experts or {}).items():
        weights = random_weights(shapes)
        for key, value in weights.items():
            if key == "fc.weight" or key.endswith("bn3.weight" if large else "bn2.weight"):
                value *= 1e-3  # untrained, many blocks would blow up
        weights["fc.bias"][1 if large else 3] += 20.0  # all answer the same, which is right for some
        file = tmp_path / f"{sigma}.pth.tar"
        write(file, POOLS[name], {("1.module." if large else "1.") + k: v for k, v in weights.items()}, legacy=False)
        experts[sigma] = {"arch": expert.arch, "checkpoint": str(file), "mean": expert.mean, "std": expert.std}
    plain = {sigma: {key: [*v] if isinstance(v, tuple) else v for key, v in e.items()} for sigma, e in experts.items()}
    directory = shrunk(name, tmp_path / "run", base__experts=plain, estimator__holdout=0.4, **keys)
    pipeline.run(directory)
    rows = ShardStore(directory.folder, "certificates/agreement").read()
    assert rows.num_rows == len(directory.data("test"))
    assert directory.data("test").shape == ((3, 224, 224) if large else (3, 32, 32))
    assert audit(directory)[0] == []
    right = (directory.data("test").labels == (1 if large else 3)).mean()
    assert sum(rows.column("correct").to_pylist()) == right * rows.num_rows > 0
