"""Checkpoints of Cohen, Salman, Jeong (CAT-RS) and Sun et al. ("ACR weakness"), in the layouts that their code writes.

locuslab/smoothing, Hadisalman/smoothing-adversarial, alinlab/smoothing-catrs and eth-sri/acr-weakness all call
torch.save({epoch, arch, state_dict, optimizer}) of Sequential(layer, network). The layer (NormalizeLayer, or Salman's
InputCenterLayer) keeps its numbers in plain attributes, so no file says them. `network` is ResNet-110 for CIFAR-10
(keys `1.conv1.weight`), or DataParallel around torchvision's ResNet-50 (`1.module.conv1.weight`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from core.config import ClassifierConfig
from core.errors import ModelError
from core.models.checkpoints import load_classifier

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resnet110_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of archs/cifar_resnet.py, `resnet(depth=110, num_classes=10)`: 18 blocks a stage."""

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var"))
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (16, 3, 3, 3)
    yield from norm("bn1", 16)
    before = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(18):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1.weight", (width, before, 3, 3)
            yield from norm(f"{name}.bn1", width)
            yield f"{name}.conv2.weight", (width, width, 3, 3)
            yield from norm(f"{name}.bn2", width)
            if before != width:
                yield f"{name}.downsample.0.weight", (width, before, 1, 1)
                yield from norm(f"{name}.downsample.1", width)
            before = width
    yield "fc.weight", (10, 64)
    yield "fc.bias", (10,)


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(35_190)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape) * (2 / shape[0] / shape[-1] ** (2 * (len(shape) > 2))) ** 0.5
        else:
            low = -0.2 if name.endswith(("bias", "mean")) else 0.4
            weights[name] = torch.empty(shape).uniform_(low, low + 0.5)
    return weights


def resnet110(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Its forward pass, written out: 3x3 convolutions, shortcuts of 1x1 where the width changes, mean of 8x8."""

    def convolved(x: Tensor, name: str, norm: str, stride: int = 1, padding: int = 1) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=padding)
        mean, var, scale, shift = (
            weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, shift)

    x = convolved(x, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(18):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = convolved(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            inner = convolved(inner, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:
                x = convolved(x, f"{name}.downsample.0", f"{name}.downsample.1", stride, 0)
            x = (inner + x).relu()
    return F.avg_pool2d(x, 8).flatten(1) @ weights["fc.weight"].T + weights["fc.bias"]


def write(path: Path, arch: str, weights: Mapping[str, Tensor], *, legacy: bool) -> str:
    """As their training scripts do; `legacy`: as the PyTorch of 2019 did."""
    momentum = {i: {"momentum_buffer": torch.zeros_like(value)} for i, value in enumerate(weights.values())}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.001, "params": list(momentum)}]}
    plain = {"epoch": 90, "arch": arch, "state_dict": weights, "optimizer": optimizer}
    torch.save(plain, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


@pytest.mark.parametrize("layer", ["NormalizeLayer", "InputCenterLayer"])
@pytest.mark.parametrize("legacy", [False, True])
def test_cifar_resnet110_of_the_four_repositories_gives_their_logits(layer: str, legacy: bool, tmp_path: Path) -> None:
    weights = random_weights(dict(resnet110_shapes()))
    name = "checkpoint.pth.tar"
    file = write(tmp_path / name, "cifar_resnet110", {f"1.{k}": v for k, v in weights.items()}, legacy=legacy)
    images = torch.rand(3, 3, 32, 32) + 0.25 * torch.randn(3, 3, 32, 32)
    mean, std = CIFAR10[0], CIFAR10[1] if layer == "NormalizeLayer" else (1.0,)
    seen = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    check(ClassifierConfig(arch="resnet110", checkpoint=file), 10, images, resnet110(weights, seen), mean, std)


@pytest.mark.parametrize("layer", ["NormalizeLayer", "InputCenterLayer"])
def test_imagenet_resnet50_of_the_four_repositories_gives_their_logits(layer: str, tmp_path: Path) -> None:
    net: nn.Module = resnet50()
    net.load_state_dict(random_weights({name: tuple(value.shape) for name, value in net.state_dict().items()}))
    mean, std = IMAGENET[0], IMAGENET[1] if layer == "NormalizeLayer" else (1.0,)
    plain = {f"1.module.{name}": value for name, value in net.state_dict().items()}
    file = write(tmp_path / "checkpoint.pth.tar", "resnet50", plain, legacy=False)
    images = torch.rand(2, 3, 224, 224)
    seen = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.inference_mode():
        expected = net.eval()(seen)
    check(ClassifierConfig(arch="resnet50", checkpoint=file), 1000, images, expected, mean, std)


def check(config: ClassifierConfig, num: int, images: Tensor, expected: Tensor, mean: Any, std: Any) -> None:
    with pytest.raises(ModelError, match=r"how its pixels are normalised .*begin with '1\..*std: \[1\] for"):
        load_classifier(config, num)
    model = load_classifier(config.model_copy(update={"mean": mean, "std": std}), num)
    with torch.inference_mode():
        found = model(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
