"""What noise costs on the CPU: Gaussian and exact, as shares of the forward pass that the same copies feed; and beside
`torch.randn`, which is a function of no key.
"""

from collections.abc import Callable

import torch

from bench.pairs import digits
from bench.settings import Settings
from bench.timing import Line, interleaved, ratio
from core.machine.cpu import settle
from core.machine.exact_noise import ExactNoise
from core.machine.former_noise import FormerGaussianNoise
from core.machine.network import Forward
from core.machine.noise import Copies, GaussianNoise, Noise
from core.records import Phase

__all__ = ["noise"]


def noise(settings: Settings) -> list[Line]:
    """Chunks of 100 copies of a digit, at each noise level."""
    settle(1)
    pair, cuda = digits(), settings.device == "cuda"
    network = pair.network(settings.device, Forward())
    kinds: dict[str, Noise] = {"Gaussian": GaussianNoise(0), "exact": ExactNoise(0)}
    former = FormerGaussianNoise(0, 100)
    chunks = 2 if settings.tiny else 100

    def drawn(kind: Noise, sigma: float) -> Callable[[], float]:
        image = torch.full(pair.shape, 128 / 255, device=settings.device)
        out = torch.empty(100, *pair.shape, device=settings.device)

        def run() -> float:
            for chunk in range(chunks):
                kind.corrupt(out, [Copies(image, "bench", Phase.ESTIMATION, sigma, 100 * chunk, 100)])
            return 100 * chunks

        return run

    def randn() -> float:
        image, out = torch.full(pair.shape, 128 / 255), torch.empty(100, *pair.shape)
        for _ in range(chunks):
            torch.randn(out.shape, out=out).mul_(0.5).add_(image)
        return 100 * chunks

    sides = {f"{name} noise, sigma = {s}": drawn(kind, s) for s in pair.sigmas for name, kind in kinds.items()}
    top = f"Gaussian noise, sigma = {pair.sigmas[-1]}"
    beside = {} if cuda else {"torch.randn": randn, "noise of version 1": drawn(former, pair.sigmas[-1])}
    passes = pair.floor(network, 100 if settings.tiny else pair.best_batch(network), 1 if settings.tiny else 20)
    taken = interleaved({"floor": passes, **sides, **beside}, settings.turns, cuda=cuda)
    others = [
        Line(
            "noise",
            f"{top}: time / {name}",
            ratio(taken[name], taken[top]),
            ratio(taken[name], taken[top], "cpu_s"),
            wanted="<= 1.0",
        )
        for name in beside
    ]
    return others + [
        Line(
            "noise",
            f"{name}: time / forward pass of the {pair.name}",
            ratio(taken["floor"], taken[name]),
            None if cuda else ratio(taken["floor"], taken[name], "cpu_s"),
        )
        for name in sides
    ]
