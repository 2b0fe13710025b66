"""A network and its reference on the same copies, against votes counted one copy at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.machine.engine import Engine, Task
from core.machine.network import Forward, Head, Network
from core.machine.noise import Copies, GaussianNoise
from core.machine.noise_key import auxiliary
from core.machine.reference import WithReference
from core.procedures.randomized import uniform_of
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, ESTIMATOR, Certificate, Draws, Phase, Sampling, paired
from tests.helpers.oracles import HalfSpace, axis

SHAPE = (1, 2, 2)
SEEN = Sampling(5, 60, num_reference=9)


def pair(network: object, reference: object, batch_size: int | None = None, **others: object) -> WithReference:
    """Two networks that have nothing in common, as no configuration can make them."""

    def made(module: Any) -> Network:
        return Network({CLASSIFIER: Head(module, 2)}, **others)  # type: ignore[arg-type]

    both = WithReference(made(network), Forward(), batch_size)
    both.reference = made(reference)
    both.reference.rows = both.rows
    return both


def run(network: Network, sampling: Sampling, num: int = 3, batch_size: int = 16) -> list[Certificate]:
    engine = Engine(network, GaussianNoise(7), batch_size=batch_size, max_live=8)
    tasks = [Task(n, f"e{n}", torch.full(SHAPE, 0.1 * n), certify(0.5, sampling)) for n in range(num)]
    found = {finished.key: finished.result for finished in engine.run(tasks)}
    return [found[n] for n in range(num)]


class Overflowing(HalfSpace):
    """Its logits are not finite for some copies."""

    def __call__(self, images: Tensor) -> Tensor:
        values = super().__call__(images)
        return torch.where(values[:, :1] > 0.8, torch.inf, 1.0) * values


def slow_votes(network: Callable[[Tensor], Tensor], name: str, num: int, image: Tensor) -> list[int]:
    """The vote of each estimation copy, one at a time; -1 for none."""
    votes = []
    for place in range(num):
        out = torch.empty(1, *SHAPE)
        GaussianNoise(7).corrupt(out, [Copies(image, name, Phase.ESTIMATION, 0.5, place, 1)])
        logits = network(out)[0]
        votes.append(int(logits.argmax()) if bool(torch.isfinite(logits).all()) else -1)
    return votes


@pytest.mark.parametrize("batch_size", [None, 1, 5, 24])
def test_missed_votes_are_those_of_the_same_copies(batch_size: int | None) -> None:
    own, other = Overflowing(axis(4, 0), 0.1), Overflowing(axis(4, 1), -0.4)
    passes: list[int] = []

    def reference(images: Tensor) -> Tensor:
        passes.append(len(images))
        return other(images)

    results = run(pair(own, reference, batch_size), Sampling(5, 60, 0.1, num_reference=37))
    for n, result in enumerate(results):
        image = torch.full(SHAPE, 0.1 * n)
        first = slow_votes(own, f"e{n}", 60, image)
        second = slow_votes(other, f"e{n}", 37, image)
        assert result.counts_estimation.tolist() == [first.count(c) for c in (0, 1)]
        missed = [one for one, two in zip(first, second, strict=False) if one != two]
        assert result.counts_missed is not None
        assert result.counts_missed.tolist() == [missed.count(c) for c in (0, 1)]
        assert -1 in first + second
    if batch_size is not None:
        assert {batch_size} <= set(passes) <= {batch_size, 16}  # 16 rows: the look at the network


def test_a_network_agrees_with_itself_whatever_the_batch_and_the_level() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    heads = {CLASSIFIER: Head(body, 3), ESTIMATOR: Head(body, 3)}
    network = WithReference(Network(heads), Forward(), batch_size=7)
    lane = network.lane(Draws(0.5, 9, (CLASSIFIER, ESTIMATOR, paired(CLASSIFIER), paired(ESTIMATOR)), Phase.ESTIMATION))
    outputs = network(lane, torch.randn(9, *SHAPE), torch.full((9,), 0.5))
    for head in heads:
        assert outputs[paired(head)].argmax(dim=1).tolist() == [3] * 9
    assert network.rows == {CLASSIFIER: 9 + 14, ESTIMATOR: 9 + 14}


def test_noise_that_is_not_the_same_is_seen() -> None:
    """Planted: the reference sees copies of its own."""

    class Unpaired(WithReference):
        def _by_reference(self, lane: Any, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
            return super()._by_reference(lane, noisy.roll(1, 0), sigma)

    plain = Network({CLASSIFIER: Head(HalfSpace(axis(4, 0), 0.0), 2)})
    missed = [result.counts_missed for result in run(WithReference(plain, Forward(), 4), SEEN)]
    assert [each.tolist() for each in missed if each is not None] == [[0, 0]] * 3
    with pytest.raises(ModelError, match="votes otherwise for the same images"):
        run(Unpaired(plain, Forward(), 4), SEEN)


def test_bfloat16_votes_are_compared_with_those_of_float32() -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8))
    network = WithReference(Network({CLASSIFIER: Head(body, 8)}, forward=Forward("bfloat16")), Forward())
    noisy, sigma = torch.randn(4000, *SHAPE), torch.full((4000,), 0.5)
    lane = network.lane(Draws(0.5, 4000, (CLASSIFIER, paired(CLASSIFIER)), Phase.ESTIMATION))
    outputs = network(lane, noisy, sigma)
    with torch.no_grad():
        true = body(noisy).argmax(dim=1)
    own = outputs[CLASSIFIER].argmax(dim=1)
    assert 0 < int((own != true).sum()) < 400
    assert outputs[paired(CLASSIFIER)].argmax(dim=1).tolist() == torch.where(own != true, own, 8).tolist()


def test_reference_that_is_random_is_refused() -> None:
    with pytest.raises(ModelError, match="is not a function of its images"):
        run(
            pair(HalfSpace(axis(4, 0), 0.0), lambda images: torch.randn(len(images), 2)),
            Sampling(5, 60, num_reference=9),
        )


def test_passes_keep_their_shape_when_memory_runs_out() -> None:
    def hungry(images: Tensor) -> Tensor:
        if len(images) > 8:
            raise torch.OutOfMemoryError("too large")
        return torch.stack([images.sum(dim=(1, 2, 3)), images.amin(dim=(1, 2, 3))], dim=1)

    assert len(run(Network({CLASSIFIER: Head(hungry, 2)}), Sampling(5, 60))) == 3
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(pair(hungry, hungry), SEEN)
    assert any("all passes have one shape" in note for note in error.value.__notes__)


def test_auxiliary_number_is_that_of_the_key_whatever_the_batch() -> None:
    sampling = Sampling(5, 60, 0.1, bound="randomized")
    results = [
        run(Network({CLASSIFIER: Head(HalfSpace(axis(4, 0), 0.1), 2)}), sampling, batch_size=b) for b in (16, 64)
    ]
    expected = [uniform_of(auxiliary(7, f"e{n}", Phase.ESTIMATION, 0.5)) for n in range(3)]
    for found in results:
        assert [result.uniform for result in found] == expected
    assert len({*np.round(expected, 6)}) == 3
