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
    """Batches of 1,000 copies, 100 of each of ten digits, at each noise level."""
    settle(1)
    pair, cuda = digits(), settings.device == "cuda"
    network = pair.network(settings.device, Forward())
    kinds: dict[str, Noise] = {"Gaussian": GaussianNoise(0), "exact": ExactNoise(0)}
    former = FormerGaussianNoise(0, 100)
    batches = 2 if settings.tiny else 10

    def drawn(kind: Noise, sigma: float) -> Callable[[], float]:
        image = torch.full(pair.shape, 128 / 255, device=settings.device)
        out = torch.empty(1000, *pair.shape, device=settings.device)

        def run() -> float:
            for number in range(batches):
                ten = [Copies(image, f"{place}", Phase.ESTIMATION, sigma, 100 * number, 100) for place in range(10)]
                kind.corrupt(out, ten)
            return 1000 * batches

        return run

    def randn() -> float:
        image, out = torch.full(pair.shape, 128 / 255), torch.empty(1000, *pair.shape)
        for _ in range(batches):
            torch.randn(out.shape, out=out).mul_(0.5).add_(image)
        return 1000 * batches

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
