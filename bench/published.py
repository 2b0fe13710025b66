"""The published networks at full size, and the digits' trained ones, in every precision and way of running them: what a
device makes of its arithmetic, and what the engine leaves of that.

Precisions and memory orders are timed uncompiled; compiled, and as CUDA graphs, in the faster order; the engine, noise
and Dual RS in the fastest way. What a device cannot do (memory, an unsupported type) is a line that says so. Weights
are random but for the digits', so votes that differ say something of those alone.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.engine import Race
from bench.pairs import Pair, cifar, imagenet, larger, resnet110, trained_digits
from bench.settings import Settings
from bench.timing import Line, Spread, interleaved, ratio, spread
from core.machine.cpu import settle
from core.machine.engine import Engine, Task
from core.machine.network import Compile, Forward, Head, Network, Precision, set_tf32
from core.machine.noise import Copies, GaussianNoise
from core.procedures.dual import dual_certify
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, ESTIMATOR, Draws, Phase, Procedure, Sampling

__all__ = ["published"]

T = TypeVar("T")

_SHORT_OF_MEMORY = 24 * 2**30
"""Bytes of a device below which ImageNet's classifier is ViT-L/16."""


class _Table:
    """Lines so far; each is told when it is found, for all of them may take an hour."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(
        self,
        what: str,
        value: Spread | None,
        unit: str = "x",
        wanted: str = "",
        beside: Mapping[str, float] | None = None,
    ) -> None:
        """A line."""
        line = Line("published", what, value, unit=unit, wanted=wanted, beside=beside or {})
        self.lines.append(line)
        print(f"  {what}: {line.number}; {line.others}", file=sys.stderr, flush=True)

    def attempt(self, what: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns, or None and a line that says why there is nothing."""
        try:
            return measure()
        except Exception as error:  # of compilers, drivers, libraries
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"
        _clean()  # out of the handler, whose traceback holds the activations of the pass that failed
        self.add(f"{what}: not measured ({why})", None)
        return None


def published(settings: Settings) -> list[Line]:
    """Each pair alone on the device. On a CPU what takes minutes: ImageNet's arithmetic is counted and not run, and the
    engine runs where ten seconds make a hundred draws.
    """
    settle(1)
    table, cuda = _Table(), settings.device == "cuda"
    kinds: tuple[Precision, ...] = get_args(Precision) if cuda or settings.tiny else ("float32", "bfloat16")
    side = 64 if settings.tiny else 8192 if cuda else 1024
    products: dict[Precision, float] = {}
    for kind in kinds:
        what = f"{kind}: product of two {side} x {side} matrices"
        rates = table.attempt(what, partial(_product, settings, kind, side))
        if rates:
            products[kind] = spread(rates).median
            table.add(what, spread(rates), "TFLOP/s")
    makes: tuple[Callable[[], Pair], ...] = (trained_digits, resnet110)
    if not settings.tiny:
        makes = (trained_digits, cifar, resnet110)
    if cuda and not settings.tiny:
        short = torch.cuda.mem_get_info()[1] < _SHORT_OF_MEMORY
        makes = (*makes, partial(imagenet, "vit_large_patch16_224") if short else imagenet)
    for make in makes:
        pair = table.attempt(getattr(make, "__name__", "ImageNet"), make)
        if pair is not None:
            _Bench(settings, pair, table, products).run()
            del pair
            _clean()
    if not cuda:
        pair = larger() if settings.tiny else imagenet()
        _count(table, pair, "cpu", FakeTensorMode(allow_non_fake_inputs=True))
    return table.lines


def _clean() -> None:
    """Give back what was compiled, recorded and cached."""
    torch.compiler.reset()
    gc.collect()
    with suppress(RuntimeError):  # after some errors a device refuses even that, and all that follows says so
        torch.cuda.empty_cache()


def _product(settings: Settings, precision: Precision, side: int) -> list[float]:
    """TFLOP/s of the device's own matrix product, turn by turn."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    one, two, out = (torch.rand(side, side, device=settings.device).to(dtype) for _ in range(3))
    times = 100 if settings.device == "cuda" else 4

    def run() -> float:
        if settings.device == "cuda":
            set_tf32(precision == "tf32")
        for _ in range(times):
            torch.mm(one, two, out=out)
        return times * 2 * side**3 / 1e12

    taken = interleaved({"product": run}, settings.turns, cuda=settings.device == "cuda")["product"]
    return [turn.units / turn.wall_s for turn in taken]


def _count(table: _Table, pair: Pair, device: str, mode: Any = None) -> float | None:
    """GFLOP of a draw, as twice the multiply-adds of one row's pass; lines beside the anchors. None: not counted."""
    networks: dict[str, nn.Module | None] = {"classifier": pair.classifier, "estimator": pair.estimator}

    def flops() -> dict[str, float]:
        image, sigma = torch.rand(1, *pair.shape, device=device), torch.full((1,), pair.sigmas[-1], device=device)
        found = {}
        for name, network in (("denoiser", pair.denoiser), *networks.items()):
            if network is not None:
                given = (image, sigma) if name == "denoiser" else (image,)
                # Attention as plain products: the counter does not know the kernels of every device.
                with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    network.to(device)(*given)
                found[name] = counter.get_total_flops() / 1e9
        return found

    with mode or nullcontext():
        found = table.attempt(f"{pair.name}: GFLOP", flops)
    if found is None:
        return None
    for name in [name for name in networks if name in found]:
        total, anchor = found.get("denoiser", 0.0) + found[name], pair.anchors.get(name)
        what, unit = f"{pair.name}, {name}: GFLOP of a draw", "GFLOP"
        if anchor is not None:
            what, unit = f"{what} / {anchor:,g}", "x"
        value = spread([total / (anchor or 1.0)])
        table.add(what, value, unit, "1+- 0.01" if anchor else "", {f"GFLOP, {k}": v for k, v in found.items()})
    return found.get("denoiser", 0.0) + found["classifier"]


class _Picks(nn.Module):
    """An estimator whose choice is known, at its own cost."""

    def __init__(self, network: nn.Module, choice: int) -> None:
        super().__init__()
        self.network, self.choice = network, choice

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(images)
        return logits + 1e4 * (torch.arange(logits.shape[1], device=logits.device) == self.choice)


class _Bench:
    """All measurements of one pair."""

    def __init__(self, settings: Settings, pair: Pair, table: _Table, products: dict[Precision, float]) -> None:
        self.settings, self.pair, self.table, self.products = settings, pair, table, products
        self.cuda = settings.device == "cuda"
        self.plain_votes: Tensor | None = None
        self.gflop: float | None = None

    def run(self) -> None:
        """Every precision; Dual RS in the fastest of all ways."""
        self.gflop = _count(self.table, self.pair, self.settings.device)
        fastest: dict[Forward, tuple[float, int]] = {}
        hows: tuple[Compile, ...] = (True, "graphs") if self.cuda else (self.settings.forward.compile,)
        for precision in self.products:
            batch = self.attempt(f"{precision}: batch size", self.batch_size, Forward(precision))
            if batch is None:
                continue
            rates = self.rates([Forward(precision, last) for last in (False, True)], batch)
            if rates:
                order = max(rates, key=rates.__getitem__).channels_last
                rates |= self.rates([Forward(precision, order, how) for how in hows if how], batch)
            # Where a CPU takes long for a pass, it takes minutes to see that the engine takes no longer.
            if rates and (self.cuda or self.settings.tiny or max(rates.values()) > 10):
                best = max(rates, key=rates.__getitem__)
                fastest[best] = rates[best], batch
                self.attempt(f"{_words(best)}: engine", self.engine, best, *fastest[best])
        if fastest and self.pair.estimator is not None:
            best = max(fastest, key=fastest.__getitem__)
            self.attempt(f"{_words(best)}: Dual RS", self.dual, best, *fastest[best])

    def attempt(self, what: str, measure: Callable[..., T], *args: Any) -> T | None:
        """See `_Table.attempt`."""
        _clean()
        return self.table.attempt(f"{self.pair.name}, {what}", partial(measure, *args))

    def network(self, forward: Forward) -> Network:
        """On the device."""
        return self.pair.network(self.settings.device, forward)

    def batch_size(self, forward: Forward) -> int:
        """Of all ways of a precision."""
        return 2 if self.settings.tiny else self.pair.best_batch(self.network(forward))

    def rates(self, ways: Sequence[Forward], batch: int) -> dict[Forward, float]:
        """Rows per second of the ways that the device can run."""
        found = {way: self.attempt(_words(way), self.timed, way, batch) for way in ways}
        return {way: rate for way, rate in found.items() if rate is not None}

    def timed(self, forward: Forward, batch: int) -> float:
        """Rows per second of bare passes; the line has what goes with it."""
        network = self.network(forward)
        # A pass that is not counted (it compiles), and one that says how many make about a second.
        one = interleaved({"pass": self.pair.floor(network, batch, 1)}, 1, cuda=self.cuda)["pass"][0]
        passes = max(1, min(100, int(1 / one.wall_s))) if not self.settings.tiny else 1
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        run = self.pair.floor(network, batch, passes)
        taken = interleaved({"passes": run}, self.settings.turns, warm=self.cuda, cuda=self.cuda)["passes"]
        value = spread([turn.units / turn.wall_s for turn in taken])
        beside: dict[str, float] = {}
        if self.gflop is not None:
            beside["TFLOP/s"] = value.median * self.gflop / 1e3
            beside["of the product's"] = beside["TFLOP/s"] / self.products[forward.precision]
        if self.cuda:
            beside["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        votes = self.votes(network, batch)
        if forward == Forward():
            self.plain_votes = votes
        elif self.plain_votes is not None:
            beside |= {"votes unlike float32's": int((votes != self.plain_votes).sum()), "of": len(votes)}
        weights = "" if self.pair.given else " (random weights)"
        what = f"{self.pair.name}{weights}, {_words(forward)}, batch {batch}: images a second"
        self.table.add(what, value, "1/s", beside=beside)
        return value.median

    @torch.inference_mode()
    def votes(self, network: Network, batch: int) -> Tensor:
        """Of the same copies in every way: ten thousand of trained networks."""
        num = 256 if self.cuda else 4
        if self.pair.given:
            num = 100 if self.settings.tiny else 10_000
        images, generator = self.pair.images(100), torch.Generator().manual_seed(1)
        level = self.pair.sigmas[len(self.pair.sigmas) // 2]
        lane = network.lane(Draws(level, 1, (CLASSIFIER,), Phase.ESTIMATION))
        copies = torch.stack([images[row % len(images)] for row in range(num)])
        copies += level * torch.randn(copies.shape, generator=generator)
        sigma, found = torch.full((batch,), level, device=self.settings.device), []
        for first in range(0, num, batch):  # of one shape: the last one begins anew
            rows = torch.arange(first, first + batch) % num
            found.append(network(lane, copies[rows].to(self.settings.device), sigma)[CLASSIFIER].argmax(1).cpu())
        return torch.cat(found)[:num]

    def draws(self, most: int, rate: float) -> Sampling:
        """As many as a turn of some seconds has at one noise level."""
        num = 16 if self.settings.tiny else max(16, min(most, int(rate * (20 if self.cuda else 10))))
        return Sampling(100 if num == most else min(100, num // 8), num, 0.001)

    def images(self, batch: int, rows: int) -> int:
        """Of a turn, for it to have several batches."""
        return max(1, 8 * batch // rows) if self.cuda else 1

    def engine(self, forward: Forward, rate: float, batch: int) -> None:
        """The engine over bare passes, one noise level and all of them; and noise."""
        pair, network = self.pair, self.network(forward)
        for most, sigmas, wanted in ((10_000, pair.sigmas[-1:], ">= 0.97"), (100, pair.sigmas, ">= 0.95")):
            sampling = self.draws(most, rate / len(sigmas))
            rows = len(sigmas) * (sampling.num_selection + sampling.num_estimation)
            race = Race(lambda: pair, batch, sampling, sigmas, self.images(batch, rows))
            sides = {
                "floor": race.floor(pair, network),
                "engine": race.engine(pair, network),
                "noise": self.noise(race),
            }
            taken = interleaved(sides, min(3, self.settings.turns), warm=not self.settings.tiny, cuda=self.cuda)
            what = f"{pair.name}, {_words(forward)}, batch {batch}, n = {sampling.num_estimation:,}, sigma = {sigmas}"
            full = sampling.num_estimation == most
            self.table.add(f"{what}: engine / bare passes", ratio(taken["engine"], taken["floor"]), "x", wanted * full)
            self.table.add(f"{what}: time of Gaussian noise / pass", ratio(taken["floor"], taken["noise"]))

    def noise(self, race: Race) -> Callable[[], float]:
        """Gaussian noise for whole batches, in the engine's pieces."""
        device, sampling = self.settings.device, race.sampling
        image = self.pair.images(1)[0].to(device)
        out, noise = torch.empty(race.batch_size, *self.pair.shape, device=device), GaussianNoise(0)
        each = min(race.batch_size, sampling.num_estimation)

        def copies() -> Iterator[Copies]:
            for first in range(0, race.batch_size, each):
                num = min(each, race.batch_size - first)
                yield Copies(image, f"{first}", Phase.ESTIMATION, race.sigmas[-1], 0, num)

        def run() -> float:
            batches = -(-race.rows // race.batch_size)
            for _ in range(batches):
                noise.corrupt(out, list(copies()))
            return batches * race.batch_size

        return run

    def dual(self, forward: Forward, rate: float, batch: int) -> None:
        """Dual RS (fixed) over standard RS: where the estimator picks sigma_e the stages share their copies."""
        pair, sampling, sigmas = self.pair, self.draws(10_000, rate), self.pair.sigmas
        num, images = self.images(batch, sampling.num_selection + sampling.num_estimation), pair.images(100)
        assert pair.estimator is not None
        dual = partial(dual_certify, sigmas, sigmas[-1], sampling)

        def side(procedure: Callable[[], Procedure[Any]], estimator: nn.Module) -> Callable[[], float]:
            heads = self.network(forward).heads | {ESTIMATOR: Head(estimator, len(sigmas))}
            network = Network(heads, pair.denoiser, self.settings.device, forward)
            engine = Engine(network, GaussianNoise(0), batch_size=batch)

            def run() -> float:  # from the first batch to the last
                tasks = (Task(i, f"image {i}", images[i % len(images)], procedure()) for i in range(num))
                return len([done.result for done in engine.run(tasks)])

            return run

        sides = {
            "standard": side(partial(certify, sigmas[-1], sampling), pair.estimator),
            "sigma_e": side(dual, _Picks(pair.estimator, len(sigmas) - 1)),
            "another level": side(dual, _Picks(pair.estimator, 0)),
        }
        taken = interleaved(sides, min(2, self.settings.turns), warm=not self.settings.tiny, cuda=self.cuda)
        what = f"{pair.name}, {_words(forward)}, batch {batch}, n = {sampling.num_estimation:,}: Dual RS / standard RS"
        for name in ("sigma_e", "another level"):
            self.table.add(f"{what}: time, the estimator picks {name}", ratio(taken["standard"], taken[name]))


def _words(forward: Forward) -> str:
    how = {False: "", True: ", compiled", "graphs": ", CUDA graphs"}[forward.compile]
    return f"{forward.precision}{', channels_last' * forward.channels_last}{how}"
