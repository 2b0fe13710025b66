"""The networks that are timed: denoiser and classifier, most with random weights, which cost what trained ones cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from core.config import load_config
from core.machine.batch_size import DeviceProbe, choose_batch_size
from core.machine.network import Forward, Head, Network, set_tf32
from core.models.checkpoints import build_denoiser, load_denoiser, load_model
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser, trained_unet_config
from core.models.small import SmallConvNet
from core.records import CLASSIFIER, Draws, Phase
from distributed.files.datasets import load_dataset

__all__ = ["Pair", "cifar", "digits", "imagenet", "larger", "resnet110", "trained_digits"]

_ROOT = Path(__file__).parent.parent

CIFAR_NARROW = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "attention_head_dim": 16,
    "resnet_time_scale_shift": "scale_shift",
}
"""improved-diffusion's CIFAR-10 U-Net with a quarter of its channels or less and one block a level."""


@dataclass(frozen=True)
class Pair:
    """Denoiser and classifier.

    Attributes:
        name: in the table.
        denoiser: a U-Net; None where the classifier reads the noisy images.
        classifier: of its output.
        shape: ``(C, H, W)`` of an image.
        sigmas: noise levels.
        batch_size: that is best on a CPU (`bench.forward`); on CUDA it is measured.
        num_classes: of the classifier.
        estimator: of the noise level, beside the classifier.
        anchors: GFLOP of a draw, as twice the multiply-adds that others count, with `classifier` or `estimator`.
        given: images of the data set that the weights were trained for; without, these are random.
    """

    name: str
    denoiser: OneShotDenoiser | None
    classifier: nn.Module
    shape: tuple[int, int, int]
    sigmas: tuple[float, ...]
    batch_size: int
    num_classes: int = 10
    estimator: nn.Module | None = None
    anchors: Mapping[str, float] = field(default_factory=dict)
    given: tuple[Tensor, ...] = ()

    def network(self, device: str, forward: Forward) -> Network:
        """What the engine runs. The memory order of the weights is that of the last one made."""
        if not forward.channels_last:
            for module in (self.denoiser, self.classifier):
                if module is not None:
                    module.to(memory_format=torch.contiguous_format)
        return Network({CLASSIFIER: Head(self.classifier, self.num_classes)}, self.denoiser, device, forward)

    def best_batch(self, network: Network) -> int:
        """Rows of a forward pass: the pair's number on a CPU, measured on CUDA."""
        if network.device.type == "cpu":
            return self.batch_size
        requests = [Draws(self.sigmas[-1], 1, (CLASSIFIER,), Phase.ESTIMATION)]
        return choose_batch_size(DeviceProbe(network, self.shape, requests, 0.5))

    def floor(self, network: Network, batch_size: int, passes: int) -> Callable[[], float]:
        """So many bare forward passes on noisy copies that lie ready; returns rows."""
        noisy = torch.rand(batch_size, *self.shape, device=network.device)
        sigma = torch.full((batch_size,), self.sigmas[-1], device=network.device)
        lane = network.lane(Draws(self.sigmas[-1], 1, (CLASSIFIER,), Phase.ESTIMATION))
        forward, kind = network.forward, network.device.type
        if forward.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run() -> float:
            if kind == "cuda":  # another network's pass may have switched it
                set_tf32(forward.precision == "tf32")
            for _ in range(passes):
                if forward.compile:  # the network's to apply
                    network(lane, noisy, sigma)
                    continue
                with forward.autocast(kind):
                    self.classifier(noisy if self.denoiser is None else self.denoiser(noisy, sigma))
            return batch_size * passes

        return run

    def images(self, num: int) -> list[Tensor]:
        """Those of the data set, or random ones."""
        random = torch.rand(num, *self.shape, generator=torch.Generator().manual_seed(0))
        return list(self.given[:num]) if self.given else list(random)


def digits() -> Pair:
    """The networks of `make demo`."""
    torch.manual_seed(0)
    denoiser = build_denoiser(trained_unet_config(1, 8)).eval()
    return Pair("digits pair", denoiser, SmallConvNet(1, 8, 10).eval(), (1, 8, 8), (0.12, 0.25, 0.5), 1000)


def trained_digits() -> Pair:
    """The same, trained, as shipped in models/digits."""
    config, models = load_config(_ROOT / "configs/digits.yaml"), _ROOT / "models/digits/models"
    data = load_dataset(config.dataset, "test")
    return Pair(
        "digits pair, trained",
        cast("OneShotDenoiser", load_model(models / "denoiser.safetensors")),
        load_model(models / "classifier.safetensors"),
        (1, 8, 8),
        (0.12, 0.25, 0.5),
        1000,
        estimator=load_model(models / "estimator.safetensors"),
        given=tuple(torch.from_numpy(data.image(place)).float() / 255 for place in range(100)),
    )


def larger() -> Pair:
    """CIFAR-10's U-Net and a ViT, shrunk so that a batch takes a core about half a second."""
    torch.manual_seed(0)
    denoiser = build_denoiser(CIFAR_NARROW, "cosine", 4000).eval()
    classifier = ImageClassifier("vit_tiny_patch16_224", 10, input_size=112).eval()
    return Pair("U-Net + ViT", denoiser, classifier, (3, 32, 32), (0.25, 0.5, 1.0), 32)


def cifar() -> Pair:
    """As published for CIFAR-10: U-Net 52.5M, ViT-B/16 at 224 pixels, ResNet-110."""
    torch.manual_seed(0)
    return Pair(
        "CIFAR U-Net + ViT-B/16",
        load_denoiser("cifar10_uncond_50M_500K.pt", untrained=True),
        ImageClassifier("vit_base_patch16_224", 10).eval(),
        (3, 32, 32),
        (0.25, 0.5, 1.0),
        4,
        estimator=ImageClassifier("resnet110", 3).eval(),
        anchors={"classifier": 51.9, "estimator": 17.3},
    )


def resnet110() -> Pair:
    """An expert of CIFAR-10 without a denoiser."""
    torch.manual_seed(0)
    network = ImageClassifier("resnet110", 10).eval()
    return Pair("ResNet-110", None, network, (3, 32, 32), (0.25, 0.5, 1.0), 64, anchors={"classifier": 0.51})


def imagenet(arch: str = "beit_large_patch16_512") -> Pair:
    """As published for ImageNet: U-Net 552.8M on images of 224 pixels, BEiT-L at 512, ResNet-50."""
    torch.manual_seed(0)
    beit = arch.startswith("beit")
    return Pair(
        f"ImageNet U-Net + {'BEiT-L at 512' if beit else arch}",
        load_denoiser("256x256_diffusion_uncond.pt", untrained=True),
        ImageClassifier(arch, 1000).eval(),
        (3, 224, 224),
        (0.5, 1.0),
        1,
        1000,
        estimator=ImageClassifier("resnet50", 2).eval(),
        anchors={"classifier": 2437.0} if beit else {},
    )
