"""The engine against its floor, the bare forward pass, and against the loop that people run now (`bench.cohen`).

All three run the same networks, numbers of draws, batch size, device and threads (one, as a replica has), in turns.
The engine is given enough images that the padding of its first and last batch is below 1% of the rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from bench.cohen import Smooth, denoise_and_classify
from bench.pairs import Pair, digits, larger
from bench.settings import Settings
from bench.timing import Line, Taken, interleaved, ratio
from core.engine import Engine, Task
from core.network import Forward, Network
from core.noise import GaussianNoise
from core.records import Sampling
from core.smoothing import certify

__all__ = ["engine", "forward", "labels"]


def contestants(
    pair: Pair, network: Network, batch_size: int, sampling: Sampling, images: int, sigmas: tuple[float, ...]
) -> dict[str, Callable[[], float]]:
    """Floor, engine and loop; each returns the rows that were asked for (the engine's padding is its own loss).

    Args:
        pair: networks.
        network: of the pair.
        batch_size: of all of them.
        sampling: of a certificate.
        images: that the engine certifies; floor and loop do about half of that work in a turn.
        sigmas: noise levels that each image is certified at.
    """
    pixels, device = pair.images(images), str(network.device)
    each = sampling.num_selection + sampling.num_estimation
    rows = images * len(sigmas) * each

    def run_engine() -> float:
        runner = Engine(network, GaussianNoise(0), batch_size=batch_size)
        tasks = (
            Task((place, sigma), f"image {place}", image, certify(sigma, sampling))
            for place, image in enumerate(pixels)
            for sigma in sigmas
        )
        return sum(done.result.num_draws for done in runner.run(tasks))

    denoiser = pair.denoiser
    smoothed = [
        Smooth(
            denoise_and_classify(denoiser.unet, pair.classifier, sigma, denoiser.schedule, denoiser.num_steps, device),
            10,
            sigma,
        )
        for sigma in sigmas
    ]

    def run_loop() -> float:
        some = pixels[: max(1, images // 2)]
        for image in some:
            for one in smoothed:
                one.certify(
                    image.to(device), sampling.num_selection, sampling.num_estimation, sampling.alpha, batch_size
                )
        return len(some) * len(sigmas) * each

    return {
        "floor": pair.floor(network, batch_size, max(1, rows // (2 * batch_size))),
        "engine": run_engine,
        "loop": run_loop,
    }


def lines(
    part: str, what: str, taken: Mapping[str, list[Taken]], of_floor: str, of_loop: str, *, cpu: bool
) -> list[Line]:
    """Engine over floor and over loop, loop over floor."""

    def line(ours: str, theirs: str, wanted: str) -> Line:
        in_cpu = ratio(taken[ours], taken[theirs], "cpu_s") if cpu else None
        return Line(part, f"{what}: {ours} / {theirs}", ratio(taken[ours], taken[theirs]), in_cpu, wanted=wanted)

    return [line("engine", "floor", of_floor), line("engine", "loop", of_loop), line("loop", "floor", "")]


def _compare(
    settings: Settings,
    pair: Pair,
    part: str,
    num: int,
    images: int,
    sigmas: tuple[float, ...],
    of_floor: str = "",
    of_loop: str = "",
    turns: int | None = None,
) -> list[Line]:
    torch.set_num_threads(1)
    cuda = settings.device == "cuda"
    network = pair.network(settings.device, settings.forward)
    if settings.tiny:
        pair, num, images = replace(pair, batch_size=4), 8, 1
    batch_size = pair.best_batch(network)
    sampling = Sampling(4 if settings.tiny else 100, num, 0.001)
    sides = contestants(pair, network, batch_size, sampling, images, sigmas)
    taken = interleaved(sides, turns or settings.turns, warm=not settings.tiny and turns is None, cuda=cuda)
    what = f"{pair.name}, n = {num:,}, batch {batch_size}"
    return lines(part, what, taken, of_floor, of_loop, cpu=not cuda)


def engine(settings: Settings) -> list[Line]:
    """One noise level, a fixed number of draws."""
    pair = digits()
    found = []
    for num, images, of_floor, of_loop in ((10_000, 8, ">= 0.97", "> 1.0"), (2_400, 32, "", "")):
        found += _compare(settings, pair, "engine", num, images, pair.sigmas[-1:], of_floor, of_loop)
    # Seconds a batch: few turns, and a number of draws that fills whole batches.
    big = larger()
    return found + _compare(
        settings, big, "engine", 860, 2, big.sigmas[-1:], of_loop=">= 1.0", turns=min(settings.turns, 2)
    )


def labels(settings: Settings) -> list[Line]:
    """All noise levels, n = 100, as the variance estimator's training set is made."""
    pair, big = digits(), larger()
    turns = min(settings.turns, 2)
    return [
        *_compare(settings, pair, "labels", 100, 128, pair.sigmas, ">= 0.95", ">= 1.5"),
        *_compare(settings, big, "labels", 100, 2, big.sigmas, of_loop=">= 1.0", turns=turns),
    ]


def forward(settings: Settings) -> list[Line]:
    """What the forward pass itself gains from batch size, memory order, precision and compilation, one at a time.

    `compiled` is left out unless it is asked for by `--compile`: on a CPU it takes minutes.
    """
    torch.set_num_threads(1)
    cuda, found = settings.device == "cuda", []
    for pair in (digits(),) if settings.tiny else (digits(), larger()):
        base = pair.network(settings.device, Forward())
        best = 8 if settings.tiny else pair.best_batch(base)
        rows = best if settings.tiny else 16 * best if pair.batch_size > 64 else 2 * best
        sides: dict[str, Callable[[], float]] = {
            f"batch {size}": pair.floor(base, size, max(1, rows // size))
            for size in sorted({best // 4, best // 2, best, 2 * best, 4 * best})
        }
        ways = {"channels_last": Forward(channels_last=True), "bfloat16": Forward("bfloat16")}
        if cuda:
            ways |= {"tf32": Forward("tf32"), "float16, channels_last": Forward("float16", channels_last=True)}
        if settings.forward.compile:
            ways |= {"compiled": Forward(compile=settings.forward.compile)}
        for name, way in ways.items():
            # A copy: the memory order belongs to the weights, and the others are timed with theirs.
            copy = digits() if pair.shape[0] == 1 else larger()
            sides[f"batch {best}, {name}"] = copy.floor(copy.network(settings.device, way), best, max(1, rows // best))
        if not cuda:
            sides[f"batch {best}, 2 threads"] = _with_threads(2, sides[f"batch {best}"])
        turns = settings.turns if pair.batch_size > 64 else min(settings.turns, 3)
        taken = interleaved(sides, turns, cuda=cuda)
        reference = taken[f"batch {best}"]
        for name in sides:
            if name != f"batch {best}":
                in_cpu = None if cuda else ratio(taken[name], reference, "cpu_s")
                what = f"{pair.name}: {name} / batch {best}"
                found.append(Line("forward", what, ratio(taken[name], reference), in_cpu))
    return found


def _with_threads(num: int, run: Callable[[], float]) -> Callable[[], float]:
    def threaded() -> float:
        torch.set_num_threads(num)
        try:
            return run()
        finally:
            torch.set_num_threads(1)

    return threaded
