"""The networks that are timed: denoiser and classifier with random weights, which cost what trained ones cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.machine.batch_size import DeviceProbe, choose_batch_size
from core.machine.network import Forward, Head, Network
from core.models.checkpoints import build_denoiser
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser, trained_unet_config
from core.models.small import SmallConvNet
from core.records import CLASSIFIER, Draws, Phase

__all__ = ["Pair", "digits", "larger"]

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
        denoiser: a U-Net.
        classifier: of its output.
        shape: ``(C, H, W)`` of an image.
        sigmas: noise levels.
        batch_size: that is best on a CPU (`bench.forward`); on CUDA it is measured.
    """

    name: str
    denoiser: OneShotDenoiser
    classifier: nn.Module
    shape: tuple[int, int, int]
    sigmas: tuple[float, ...]
    batch_size: int

    def network(self, device: str, forward: Forward) -> Network:
        """What the engine runs."""
        return Network({CLASSIFIER: Head(self.classifier, 10)}, self.denoiser, device, forward)

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
        plain = network.forward == Forward()

        @torch.inference_mode()
        def run() -> float:
            for _ in range(passes):
                if plain:
                    self.classifier(self.denoiser(noisy, sigma))
                else:  # precision, memory order and compilation are the network's to apply
                    network(lane, noisy, sigma)
            return batch_size * passes

        return run

    def images(self, num: int) -> list[Tensor]:
        """Random ones."""
        return list(torch.rand(num, *self.shape, generator=torch.Generator().manual_seed(0)))


def digits() -> Pair:
    """The networks of `make demo`."""
    torch.manual_seed(0)
    denoiser = build_denoiser(trained_unet_config(1, 8)).eval()
    return Pair("digits pair", denoiser, SmallConvNet(1, 8, 10).eval(), (1, 8, 8), (0.12, 0.25, 0.5), 1000)


def larger() -> Pair:
    """CIFAR-10's U-Net and a ViT, shrunk so that a batch takes a core about half a second."""
    torch.manual_seed(0)
    denoiser = build_denoiser(CIFAR_NARROW, "cosine", 4000).eval()
    classifier = ImageClassifier("vit_tiny_patch16_224", 10, input_size=112).eval()
    return Pair("U-Net + ViT", denoiser, classifier, (3, 32, 32), (0.25, 0.5, 1.0), 32)
