"""What noise costs on the CPU: Gaussian and exact, as shares of the forward pass that the same copies feed."""

from collections.abc import Callable

import torch

from bench.pairs import digits
from bench.settings import Settings
from bench.timing import Line, interleaved, ratio
from core.machine.cpu import settle
from core.machine.exact_noise import ExactNoise
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
    chunks = 2 if settings.tiny else 100

    def drawn(kind: Noise, sigma: float) -> Callable[[], float]:
        image = torch.full(pair.shape, 128 / 255, device=settings.device)
        out = torch.empty(100, *pair.shape, device=settings.device)

        def run() -> float:
            for chunk in range(chunks):
                kind.corrupt(out, [Copies(image, "bench", Phase.ESTIMATION, sigma, 100 * chunk, 100)])
            return 100 * chunks

        return run

    sides = {f"{name} noise, sigma = {s}": drawn(kind, s) for s in pair.sigmas for name, kind in kinds.items()}
    passes = pair.floor(network, 100 if settings.tiny else pair.best_batch(network), 1 if settings.tiny else 20)
    taken = interleaved({"floor": passes, **sides}, settings.turns, cuda=cuda)
    return [
        Line(
            "noise",
            f"{name}: time / forward pass of the {pair.name}",
            ratio(taken["floor"], taken[name]),
            None if cuda else ratio(taken["floor"], taken[name], "cpu_s"),
        )
        for name in sides
    ]
