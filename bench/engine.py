"""The engine against its floor, the bare forward pass, and against the loop that people run now (`bench.cohen`).

All three run the same networks, numbers of draws, batch size, device and threads (one, as a replica has), in turns.
The engine is given enough images that the padding of its first and last batch is below 1% of the rows. Engine and floor
run in a process that is settled as a replica is (`core.cpu`); the loop runs in an ordinary one, as people run it, and
once more beside the engine.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bench.cohen import Smooth, denoise_and_classify
from bench.pairs import Pair, digits, larger
from bench.settings import Settings
from bench.timing import Contestant, Line, apart, interleaved, ratio
from core.cpu import settle
from core.engine import Engine, Task
from core.network import Forward, Network
from core.noise import GaussianNoise
from core.records import Sampling
from core.smoothing import certify

__all__ = ["engine", "forward", "labels"]


@dataclass(frozen=True)
class _Race:
    """What all contestants do.

    Attributes:
        make: makes the networks.
        batch_size: of all of them.
        sampling: of a certificate.
        images: that the engine certifies; floor and loop do about half of that work in a turn.
        sigmas: noise levels that each image is certified at.
    """

    make: Callable[[], Pair]
    batch_size: int
    sampling: Sampling
    images: int
    sigmas: tuple[float, ...]

    @property
    def rows_per_image(self) -> int:
        """Noisy copies of an image, at all noise levels."""
        return len(self.sigmas) * (self.sampling.num_selection + self.sampling.num_estimation)

    def floor(self, pair: Pair, network: Network) -> Callable[[], float]:
        """Bare forward passes."""
        return pair.floor(network, self.batch_size, max(1, self.images * self.rows_per_image // (2 * self.batch_size)))

    def loop(self, pair: Pair, device: str) -> Callable[[], float]:
        """What people run now."""
        denoiser = pair.denoiser
        smoothed = [
            Smooth(
                denoise_and_classify(
                    denoiser.unet, pair.classifier, sigma, denoiser.schedule, denoiser.num_steps, device
                ),
                10,
                sigma,
            )
            for sigma in self.sigmas
        ]
        some, sampling = pair.images(max(1, self.images // 2)), self.sampling

        def run() -> float:
            for image in some:
                for one in smoothed:
                    one.certify(
                        image.to(device),
                        sampling.num_selection,
                        sampling.num_estimation,
                        sampling.alpha,
                        self.batch_size,
                    )
            return len(some) * self.rows_per_image

        return run

    def engine(self, pair: Pair, network: Network) -> Callable[[], float]:
        """This project; the padding is its own loss."""
        images = pair.images(self.images)

        def run() -> float:
            runner = Engine(network, GaussianNoise(0), batch_size=self.batch_size)
            tasks = (
                Task((place, sigma), f"image {place}", image, certify(sigma, self.sampling))
                for place, image in enumerate(images)
                for sigma in self.sigmas
            )
            return sum(done.result.num_draws for done in runner.run(tasks))

        return run


def _ordinary(race: _Race) -> dict[str, Callable[[], float]]:
    """Floor and loop in a process that nobody has settled (`core.cpu`), on one thread."""
    torch.set_num_threads(1)
    pair = race.make()
    network = pair.network("cpu", Forward())
    return {"ordinary floor": race.floor(pair, network), "ordinary loop": race.loop(pair, "cpu")}


def _compare(
    settings: Settings,
    make: Callable[[], Pair],
    part: str,
    num: int,
    images: int,
    sigmas: tuple[float, ...],
    of_floor: str = "",
    of_loop: str = "",
    turns: int | None = None,
) -> list[Line]:
    settle(1)
    cpu, pair = settings.device == "cpu", make()
    network = pair.network(settings.device, settings.forward)
    batch_size = 4 if settings.tiny else pair.best_batch(network)
    sampling = Sampling(4, 8, 0.001) if settings.tiny else Sampling(100, num, 0.001)
    race = _Race(make, batch_size, sampling, 1 if settings.tiny else images, sigmas)
    sides = {
        "floor": race.floor(pair, network),
        "engine": race.engine(pair, network),
        "loop": race.loop(pair, settings.device),
    }
    # The loop as people run it knows nothing of what this process does with its memory.
    ordinary: AbstractContextManager[dict[str, Contestant]] = apart(_ordinary, race) if cpu else nullcontext({})
    with ordinary as others:
        warm = not settings.tiny and turns is None
        taken = interleaved({**sides, **others}, turns or settings.turns, warm=warm, cuda=not cpu)

    def line(ours: str, theirs: str, words: str, wanted: str = "") -> Line:
        in_cpu = ratio(taken[ours], taken[theirs], "cpu_s") if cpu else None
        what = f"{pair.name}, n = {num:,}, batch {batch_size}: {words}"
        return Line(part, what, ratio(taken[ours], taken[theirs]), in_cpu, wanted=wanted)

    found = [line("engine", "floor", "engine / floor", of_floor)]
    if cpu:
        found += [
            line("engine", "ordinary loop", "engine / loop", of_loop),
            line("engine", "loop", "engine / loop, both settled"),
            line("loop", "floor", "loop / floor, both settled"),
            line("ordinary loop", "ordinary floor", "loop / floor, neither settled"),
            line("floor", "ordinary floor", "floor, settled / not"),
        ]
    else:
        found += [line("engine", "loop", "engine / loop", of_loop), line("loop", "floor", "loop / floor")]
    return found


def engine(settings: Settings) -> list[Line]:
    """One noise level, a fixed number of draws."""
    sigmas = digits().sigmas[-1:]
    found = []
    for num, images, of_floor, of_loop in ((10_000, 8, ">= 0.97", "> 1.0"), (2_400, 32, "", "")):
        found += _compare(settings, digits, "engine", num, images, sigmas, of_floor, of_loop)
    # Seconds a batch: few turns, and a number of draws that fills whole batches.
    return found + _compare(
        settings, larger, "engine", 860, 2, larger().sigmas[-1:], of_loop=">= 1.0", turns=min(settings.turns, 2)
    )


def labels(settings: Settings) -> list[Line]:
    """All noise levels, n = 100, as the variance estimator's training set is made."""
    turns = min(settings.turns, 2)
    return [
        *_compare(settings, digits, "labels", 100, 256, digits().sigmas, ">= 0.95", ">= 1.5"),
        *_compare(settings, larger, "labels", 100, 2, larger().sigmas, of_loop=">= 1.0", turns=turns),
    ]


def forward(settings: Settings) -> list[Line]:
    """What the forward pass itself gains from batch size, memory order, precision and compilation, one at a time.

    `compiled` is left out unless it is asked for by `--compile`: on a CPU it takes minutes.
    """
    settle(1)
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
