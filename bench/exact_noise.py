"""What exact noise costs: `python -m bench.exact_noise`.

Times `corrupt` of exact and of Gaussian noise on the CPU, one thread, and sets it beside the forward pass of the digits
pair (random weights) that the same 100 copies feed. The contestants take turns in an order that changes from turn to
turn, so that neither a busy machine nor a cold cache is unfair to one; the table shows medians and quartiles.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from core.exact_noise import ExactNoise, exact_table
from core.models.checkpoints import build_denoiser
from core.models.denoiser import small_unet_config
from core.models.small import SmallConvNet
from core.noise import GaussianNoise, Noise
from core.records import Phase

SHAPES = ((100, 1, 8, 8), (100, 3, 32, 32))
SIGMAS = (0.25, 0.5, 1.0)
REPETITIONS = 51


def interleaved(contestants: Mapping[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of each contestant's time, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = np.random.default_rng(0)
    for repetition in range(REPETITIONS + 3):
        for name in order.permutation(list(contestants)):
            start = time.perf_counter()
            contestants[name]()
            if repetition >= 3:  # the first ones fill caches
                times[name].append(1e3 * (time.perf_counter() - start))
    quartiles = {name: np.percentile(values, [25, 50, 75]) for name, values in times.items()}
    return {name: (float(q[0]), float(q[1]), float(q[2])) for name, q in quartiles.items()}


def corruption(noise: Noise, shape: tuple[int, ...], sigma: float) -> Callable[[], object]:
    """A call that draws one chunk of that shape."""
    image, out = torch.full(shape[1:], 128 / 255), torch.empty(shape)
    return lambda: noise.corrupt(out, image, "bench", Phase.ESTIMATION, sigma, 0)


def forward_pass() -> Callable[[], object]:
    """A call that denoises and classifies 100 noisy digits."""
    torch.manual_seed(0)
    denoiser, classifier = build_denoiser(small_unet_config(1, 8)).eval(), SmallConvNet(1, 8, 10).eval()
    noisy, levels = torch.randn(100, 1, 8, 8), torch.full((100,), 0.5)

    @torch.inference_mode()
    def run() -> object:
        return classifier(denoiser(noisy, levels))

    return run


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for sigma in SIGMAS:
        exact_table.cache_clear()
        start = time.perf_counter()
        table = exact_table(sigma)
        seconds = time.perf_counter() - start
        print(f"table for sigma = {sigma}: {len(table.floors)} thresholds in {seconds:.3f} s, once per process")
    contestants = {"forward pass": forward_pass()}
    for shape in SHAPES:
        for sigma in SIGMAS:
            for name, noise in (("gaussian", GaussianNoise(0)), ("exact", ExactNoise(0))):
                contestants[f"{name:8} {shape!s:18} sigma {sigma:<4}"] = corruption(noise, shape, sigma)
    results = interleaved(contestants)
    forward = results["forward pass"][1]
    print(f"\n{'ms per call, of ' + str(REPETITIONS):42} {'median':>8} {'quartiles':>17}   ns/pixel  of forward pass")
    for name, (low, middle, high) in results.items():
        line = f"{name:42} {middle:8.3f} {low:8.3f} {high:8.3f}"
        for shape in SHAPES:
            if str(shape) in name:
                line += f" {1e6 * middle / np.prod(shape):10.2f}"
        if str(SHAPES[0]) in name:
            line += f" {middle / forward:14.2%}"
        print(line)


if __name__ == "__main__":
    main()
