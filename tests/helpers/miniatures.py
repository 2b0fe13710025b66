"""The published data sets and models in miniature: real formats and architectures, a few images, narrow networks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from core.models.resnet_cifar import ResNetCifar
from tests.core.data.test_data_cifar import BATCHES, python2_pickle, write_cifar10, write_cifar10_c
from tests.core.data.test_data_folders import encoded, picture
from tests.core.models.test_classifiers import TINY, hf_vit
from tests.distributed.files.test_data_parquet import table
from tests.helpers.openai_reference import CIFAR, IMAGENET, randomised

ROOT = Path(__file__).parents[2]

# 4 heads of 64 channels, as in the published network, but only where an image is 4x4.
IMPROVED = replace(CIFAR, width=32, multipliers=(1, 1, 1, 8), blocks=1, attention_at=(8,))
GUIDED = replace(IMAGENET, width=32, multipliers=(1, 1, 2), blocks=1, attention_at=(4,))


SMALL = (
    "compute.executor=local",
    "compute.device=cpu",
    "compute.train_device=cpu",
    "compute.batch_size=16",
    "compute.precision=float32",  # float16 is for GPUs: on this CPU a convolution takes a hundred times as long
    "compute.shard_examples=5",
    "labels.num_selection=2",
    "labels.num_estimation=6",
    "labels.alpha=0.3",
    "estimator.epochs=1",
    "estimator.batch_size=8",
    "finetune.epochs=1",
    "finetune.num_sigma_draws=2",
    "certify.num_selection=2",
    "certify.num_estimation=12",
    "certify.alpha=0.4",
    "report.radii=[0, 0.25]",
)
"""What makes a published configuration small; its structure stays."""


def overrides(**keys: Any) -> list[str]:
    """SMALL and `section__key=value` as texts."""
    plain = {key.replace("__", "."): value for key, value in keys.items()}
    return [
        *SMALL,
        *(f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10_000)}" for key, value in plain.items()),
    ]


def cifar10_pickles(folder: Path, labels: Sequence[int] = (3, 3, 5, 5)) -> Path:
    """`cifar-10-batches-py` with these labels in each batch; images of class 5 are bright, all others dark."""
    for plain, name in zip(write_cifar10(folder, len(labels)).values(), BATCHES, strict=True):
        plain[b"labels"] = list(labels)
        plain[b"data"] = plain[b"data"] // 4 + np.array([[192 if label == 5 else 0] for label in labels], np.uint8)
        (folder / name).write_bytes(python2_pickle(plain))
    return folder


def cifar10_parquet(folder: Path) -> Path:
    """The layout of the Hugging Face hub."""
    rng = np.random.default_rng(0)
    (folder / "plain_text").mkdir(parents=True)
    for split, num in (("train", 12), ("test", 3)):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(num)]
        rows = table([encoded(image) for image in images], [(3, 5, 3)[index % 3] for index in range(num)], "img")
        pq.write_table(rows, folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    return folder


def cifar10_c(folder: Path) -> Path:
    """`fog.npy`, `snow.npy`, `labels.npy`."""
    write_cifar10_c(folder)
    return folder


def image_folder(root: Path, num: int = 6) -> Path:
    """ImageNet's layout with three classes: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`."""
    seed = 0
    for split in ("train", "val"):
        for name in ("n01", "n02", "n03"):
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                seed += 1
                image = encoded(picture(seed, (50 + seed, 48)), "JPEG")
                (root / split / name / f"{name}_{number}.JPEG").write_bytes(image)
    return root


def openai_unet(path: Path, shape: Any = IMPROVED) -> dict[str, Any]:
    """A checkpoint under OpenAI's names, saved with torch.save; returns the overrides that name it and what it does
    not say."""
    torch.save(randomised(shape).state_dict(), path)
    schedule = "linear-1000" if shape.updown else "cosine-4000"
    return {"base__denoiser": {"checkpoint": str(path), "schedule": schedule, "head_dim": 64}}


def vit_folder(folder: Path, classes: int = 10, favourite: int = 3) -> dict[str, Any]:
    """A ViT as transformers saves it, that nearly always answers `favourite`; returns its `ClassifierConfig`."""
    folder.mkdir()
    weights = hf_vit(192, 12, 16, 32, classes, "old")
    weights["classifier.bias"][favourite] += 20.0
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3, "hidden_act": "gelu"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return {"arch": TINY, "checkpoint": str(folder), "input_size": 32}


def resnet_file(path: Path, favourite: int, classes: int = 10) -> dict[str, Any]:
    """A ResNet-110 that always answers `favourite`; returns its `ClassifierConfig`."""
    torch.manual_seed(0)
    weights = ResNetCifar(classes).state_dict()
    for name, value in weights.items():
        if name.endswith("bn2.weight"):
            value.zero_()  # untrained, 54 blocks would blow up
    weights["fc.bias"][favourite] = 20.0
    torch.save(weights, path)
    return {"arch": "resnet110", "checkpoint": str(path), "mean": [0.5], "std": [0.5]}
