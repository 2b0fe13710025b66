"""The engine against its floor, the bare forward pass, and against the loop that people run now (`bench.cohen`).

All three run the same networks, numbers of draws, batch size, device and threads (one, as a replica has), in turns of
half a second where batches are small. The engine's last batch, the only one that is padded, is left out: a run has
one. Engine and floor run in a process that is settled as a replica is (`core.machine.cpu`); the loop runs in an
ordinary one, as people run it, and once more beside the engine.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count

import torch

from bench.cohen import Smooth, denoise_and_classify
from bench.pairs import Pair, digits, larger
from bench.settings import Settings
from bench.timing import Contestant, Line, apart, interleaved, ratio
from core.machine.cpu import settle
from core.machine.engine import Engine, Task
from core.machine.network import Forward, Network
from core.machine.noise import GaussianNoise
from core.procedures.smoothing import certify
from core.records import Sampling

__all__ = ["Race", "engine", "forward", "labels"]


@dataclass(frozen=True)
class Race:
    """What all contestants do.

    Attributes:
        make: makes the networks.
        batch_size: of all of them.
        sampling: of a certificate.
        sigmas: noise levels that each image is certified at.
        images: that the loop certifies in a turn; the others run as many rows, or a little more.
    """

    make: Callable[[], Pair]
    batch_size: int
    sampling: Sampling
    sigmas: tuple[float, ...]
    images: int

    @property
    def rows(self) -> int:
        """Noisy copies in a turn."""
        return self.images * len(self.sigmas) * (self.sampling.num_selection + self.sampling.num_estimation)

    def floor(self, pair: Pair, network: Network) -> Callable[[], float]:
        """Bare forward passes."""
        return pair.floor(network, self.batch_size, -(-self.rows // self.batch_size))

    def loop(self, pair: Pair, device: str) -> Callable[[], float]:
        """What people run now."""
        assert pair.denoiser is not None
        unet, schedule, num_steps = pair.denoiser.unet, pair.denoiser.schedule, pair.denoiser.num_steps
        smoothed = [
            Smooth(denoise_and_classify(unet, pair.classifier, sigma, schedule, num_steps, device), 10, sigma)
            for sigma in self.sigmas
        ]
        images, sampling = pair.images(self.images), self.sampling

        def run() -> float:
            for image in images:
                x = image.to(device)
                for one in smoothed:
                    one.certify(x, sampling.num_selection, sampling.num_estimation, sampling.alpha, self.batch_size)
            return self.rows

        return run

    def engine(self, pair: Pair, network: Network) -> Callable[[], float]:
        """This project, in the midst of a run that has no end: a turn goes on where the last one stopped."""
        images = pair.images(100)
        tasks = (
            Task((number, sigma), f"image {number}", images[number % 100], certify(sigma, self.sampling))
            for number in count()
            for sigma in self.sigmas
        )
        engine = Engine(network, GaussianNoise(0), batch_size=self.batch_size)
        finished = engine.run(tasks)

        def run() -> float:
            before = engine.rows_run
            while engine.rows_run < before + self.rows:
                _ = next(finished).result
            return engine.rows_run - before

        return run


def _ordinary(race: Race) -> dict[str, Callable[[], float]]:
    """Floor and loop in a process that nobody has settled (`core.machine.cpu`), on one thread."""
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
    rounds: int = 0,
) -> list[Line]:
    settle(1)
    cpu, pair = settings.device == "cpu", make()
    network = pair.network(settings.device, settings.forward)
    batch_size = 4 if settings.tiny else pair.best_batch(network)
    sampling = Sampling(4, 8, 0.001) if settings.tiny else Sampling(100, num, 0.001)
    race = Race(make, batch_size, sampling, sigmas, 1 if settings.tiny else images)
    sides = {
        "floor": race.floor(pair, network),
        "engine": race.engine(pair, network),
        "loop": race.loop(pair, settings.device),
    }
    # The loop as people run it knows nothing of what this process does with its memory.
    ordinary: AbstractContextManager[dict[str, Contestant]] = apart(_ordinary, race) if cpu else nullcontext({})
    with ordinary as others:
        # Without a number of rounds a single turn takes long: two of them.
        turns = settings.turns if rounds else min(settings.turns, 2)
        rounds = 1 if settings.tiny else max(1, rounds)
        taken = interleaved({**sides, **others}, turns, rounds=rounds, warm=not settings.tiny, cuda=not cpu)

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
    small, big = digits().sigmas[-1:], larger().sigmas[-1:]
    return [  # as many draws as fill whole batches where a batch takes long
        *_compare(settings, digits, "engine", 10_000, 1, small, ">= 0.97", "> 1.0", rounds=10),
        *_compare(settings, digits, "engine", 2_400, 4, small, rounds=10),
        *_compare(settings, larger, "engine", 860, 1, big, of_loop=">= 1.0"),
    ]


def labels(settings: Settings) -> list[Line]:
    """All noise levels, n = 100, as the variance estimator's training set is made."""
    return [
        *_compare(settings, digits, "labels", 100, 17, digits().sigmas, ">= 0.95", ">= 1.5", rounds=10),
        *_compare(settings, larger, "labels", 100, 1, larger().sigmas, of_loop=">= 1.0"),
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
        rows = best if settings.tiny else 8 * best if pair.batch_size > 64 else best
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
        taken = interleaved(sides, settings.turns, rounds=1 if settings.tiny else 4, cuda=cuda)
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
