"""The Python API beside the loop that people run (`bench.cohen`), where work is small: few images, few draws.

Both in one ordinary process on one thread, as people run them, in turns; the loop at the best of three batch sizes.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cohen import Smooth, denoise_and_classify
from bench.pairs import digits
from bench.settings import Settings
from bench.timing import Line, Taken, interleaved, ratio
from core.models.resnet_cifar import ResNetCifar
from core.models.small import SmallConvNet
from core.smoothed import SmoothedClassifier

__all__ = ["shapes"]

SIGMA, ALPHA, BATCHES = 0.5, 0.001, (100, 400, 1000)
MOST_ROWS = {"tiny net": 120_000, "digits pair": 10_500, "small resnet": 10_500}
"""Draws of a turn, at most: what is beyond takes a core too long, and shows nothing that fewer images do not."""


def shapes(settings: Settings) -> list[Line]:
    """1, 10 and 100 images with 100, 1,000 and 10,000 draws."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair, device = digits(), settings.device
    resnet = ResNetCifar(10, 3, blocks=1).eval().to(device)
    assert pair.denoiser is not None
    tiny, digit = SmallConvNet(3, 32, 10, width=4, stride=4).eval().to(device), pair.classifier.to(device)
    unet, steps = pair.denoiser.unet.to(device), pair.denoiser.num_steps
    nets: dict[str, tuple[nn.Module, nn.Module | None, Callable[[Tensor], Tensor], tuple[int, ...]]] = {
        "tiny net": (tiny, None, tiny, (3, 32, 32)),
        "digits pair": (
            digit,
            pair.denoiser,
            denoise_and_classify(unet, digit, SIGMA, "linear", steps, device),
            pair.shape,
        ),
        "small resnet": (resnet, None, resnet, (3, 32, 32)),
    }
    lines = []
    for name, (module, denoiser, loop, shape) in nets.items():
        ours, theirs = SmoothedClassifier(module, 10, SIGMA, denoiser=denoiser), Smooth(loop, 10, SIGMA)
        for images in (1, 10, 100):
            for n in (100, 1_000, 10_000):
                rows = images * (100 + n)
                if rows > (200 if settings.tiny else MOST_ROWS[name]):
                    continue
                pictures = list(torch.rand(images, *shape))
                rounds = 1 if settings.tiny else max(1, 4_000 // rows)
                sides = {"ours": _ours(ours, pictures, n, rounds)}
                for size in BATCHES:
                    sides[f"loop {size}"] = _theirs(theirs, pictures, n, size, rounds, device)
                taken = interleaved(sides, settings.turns, cuda=device == "cuda")
                a, b = taken["ours"], min((taken[f"loop {size}"] for size in BATCHES), key=_median)
                what = f"{name}, {images} image{'s' * (images > 1)}, n = {n:,}: API / loop"
                wanted = ">= 1.3" if n == 100 and images > 1 else ">= 1.0"
                wall, cpu = ratio(a, b), ratio(a, b, "cpu_s")
                lines.append(Line("shapes", what, wall, cpu, wanted=wanted))
                print(f"  {what}: {wall.median:.2f} (CPU {cpu.median:.2f})", file=sys.stderr, flush=True)
    return lines


def _median(taken: list[Taken]) -> float:
    return sorted(turn.wall_s for turn in taken)[len(taken) // 2]


def _ours(smoothed: SmoothedClassifier, images: list[Tensor], n: int, rounds: int) -> Callable[[], float]:
    def run() -> float:
        for _ in range(rounds):
            smoothed.certify_many(images, num_selection=100, num_estimation=n, alpha=ALPHA)
        return rounds * len(images)

    return run


def _theirs(
    smoothed: Smooth, images: list[Tensor], n: int, batch: int, rounds: int, device: str
) -> Callable[[], float]:
    def run() -> float:
        for _ in range(rounds):
            for image in images:
                smoothed.certify(image.to(device), 100, n, ALPHA, batch)
        return rounds * len(images)

    return run
