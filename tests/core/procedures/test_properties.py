"""What holds for any votes, any batch size and any order; the examples are drawn by hypothesis."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import ConfigError
from core.law import GAUSSIAN
from core.machine.engine import Engine, Task
from core.machine.network import Head, Network
from core.machine.noise import GaussianNoise
from core.procedures.dual import dual_certify, join_stages
from core.procedures.multiscale import MultiscaleCertificate, multiscale_certify
from core.procedures.sequential import certify_sequential, dual_certify_sequential
from core.procedures.smoothing import certificate, certify
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    Bound,
    Certificate,
    Counts,
    DualCertificate,
    Procedure,
    Rule,
    Sampling,
)

# --- Certificates from votes ------------------------------------------------------------------------------------------


def votes_of(num: int, classes: int) -> st.SearchStrategy[Counts]:
    """Any votes of at most `num` draws; those that are missing voted for no class."""
    cuts = st.lists(st.integers(0, num), min_size=classes, max_size=classes)
    return cuts.map(lambda values: np.diff([0, *sorted(values)]).astype(np.int64))


@st.composite
def decided_votes(draw: st.DrawFn, num: int, classes: int) -> Counts:
    """Votes most of which go to one class, so that about half of the certificates stand."""
    top = draw(st.integers(0, classes - 1))
    first = draw(st.integers(num // 2, num))
    votes = draw(votes_of(num - first, classes))
    votes[top] = max(first, int(votes[top]))
    return votes


N0, N = 20, 400
SAMPLING = Sampling(N0, N, 0.01)
selections = votes_of(N0, 4) | decided_votes(N0, 4)
estimations = votes_of(N, 4) | decided_votes(N, 4)
levels = st.floats(0.05, 2)


@given(selection=selections, estimation=estimations, sigma=levels, scale=st.floats(0.1, 10))
def test_certificate_radius_is_linear_in_sigma(
    selection: Counts, estimation: Counts, sigma: float, scale: float
) -> None:
    one = certificate(selection, estimation, sigma, SAMPLING)
    other = certificate(selection, estimation, scale * sigma, SAMPLING)
    ratio = float(GAUSSIAN.scale(scale * sigma) / GAUSSIAN.scale(sigma))  # of what the noise is scaled with
    assert math.isclose(ratio, scale, rel_tol=1.2e-7)
    assert math.isclose(other.radius, ratio * one.radius, rel_tol=1e-14)
    assert (other.prediction, other.p_lower) == (one.prediction, one.p_lower)


@given(selection=selections, estimation=estimations, sigma=levels)
def test_certificate_abstains_exactly_where_p_lower_is_at_most_one_half(
    selection: Counts, estimation: Counts, sigma: float
) -> None:
    result = certificate(selection, estimation, sigma, SAMPLING)
    assert result.abstained == (result.p_lower <= 0.5) == (result.radius == 0.0)
    assert result.prediction in (ABSTAIN, int(selection.argmax()))
    assert 0 <= result.p_lower <= estimation[result.top_class] / N


@given(selection=selections, estimation=estimations, order=st.permutations(range(4)))
def test_certificate_is_the_same_under_any_permutation_of_the_losing_classes(
    selection: Counts, estimation: Counts, order: list[int]
) -> None:
    top = int(selection.argmax())
    assume((selection == selection[top]).sum() == 1)  # a tie goes to the smaller index
    losers = [index for index in order if index != top]
    losers.insert(top, top)
    one, other = (
        certificate(votes[0], votes[1], 0.5, SAMPLING)
        for votes in ((selection, estimation), (selection[losers], estimation[losers]))
    )
    assert (one.prediction, one.radius, one.p_lower) == (other.prediction, other.radius, other.p_lower)


@given(selection=selections, estimation=estimations, moved=st.integers(1, 50), loser=st.integers(0, 3))
def test_certificate_radius_never_rises_when_votes_leave_the_class(
    selection: Counts, estimation: Counts, moved: int, loser: int
) -> None:
    top = int(selection.argmax())
    assume(loser != top)
    fewer = estimation.copy()
    fewer[[top, loser]] += np.array([-1, 1]) * min(moved, int(estimation[top]))
    before, after = (certificate(selection, votes, 0.5, SAMPLING) for votes in (estimation, fewer))
    assert after.radius < before.radius or before.radius == 0.0


stages = st.builds(certificate, selections, estimations, levels, st.just(SAMPLING))


@given(level=stages, label=st.none() | stages, tie=st.sampled_from([Bound.SIGMA, Bound.CLASS]))
def test_join_stages_radius_is_the_smaller_one_and_either_abstention_is_one(
    level: Certificate, label: Certificate | None, tie: Bound
) -> None:
    sigmas = (0.1, 0.2, 0.3, 0.4)
    result = join_stages(level, label, sigmas, 0.02, tie)
    assert result.abstained == (level.abstained or label is None or label.abstained)
    assert result.abstained == (result.radius == 0.0) == (result.bounded_by == Bound.NONE)
    assert result.sigma == (None if level.abstained else sigmas[level.prediction])
    if result.sigma is None:
        assert result.abstained
    if not result.abstained:
        assert label is not None
        assert result.radius == min(level.radius, label.radius)
        assert result.prediction == label.prediction
        if level.radius == label.radius:
            assert result.bounded_by == tie
        else:
            assert result.bounded_by == (Bound.SIGMA if level.radius < label.radius else Bound.CLASS)


@given(votes=decided_votes(N, 4), tie=st.sampled_from([Bound.SIGMA, Bound.CLASS]))
def test_join_stages_equal_radii_are_bounded_by_the_tie(votes: Counts, tie: Bound) -> None:
    stage = certificate(votes, votes, 0.5, SAMPLING)
    result = join_stages(stage, stage, (0.1, 0.2, 0.3, 0.4), 0.02, tie)
    assert result.bounded_by == (Bound.NONE if stage.abstained else tie)


# --- The engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """A random network without a sum over more than two numbers, so that a row gives the same bits in any batch."""

    weights: Tensor
    pixels: Tensor

    @classmethod
    def of(cls, seed: int, classes: int) -> "Pixels":
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(classes, generator=generator), torch.randint(0, 9, (classes,), generator=generator))

    def __call__(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, self.pixels] * self.weights
        logits[:, 0] = torch.where(images[:, 0, 0, 0] > 1.5, torch.nan, logits[:, 0])
        return logits


SIGMAS = (0.25, 0.5)

Result = Procedure[Certificate] | Procedure[DualCertificate] | Procedure[MultiscaleCertificate]


def procedure_of(kind: str, num: int, look_every: int) -> Result:
    sampling, rule = Sampling(max(1, num // 3), num, 0.1), Rule(look_every)
    makers: dict[str, Callable[[], Result]] = {
        "fixed": lambda: certify(0.5, sampling),
        "sequential": lambda: certify_sequential(0.25, sampling, rule),
        "grid": lambda: certify_sequential(0.5, sampling, rule, (0.0, 0.1, 0.4)),
        "dual": lambda: dual_certify(SIGMAS, 0.5, sampling),
        "dual sequential": lambda: dual_certify_sequential(SIGMAS, 0.5, sampling, rule),
        "dual grid": lambda: dual_certify_sequential(SIGMAS, 0.5, sampling, rule, (0.0, 0.1, 0.4)),
        "multiscale": lambda: multiscale_certify(SIGMAS, sampling),
    }
    return makers[kind]()


KINDS = ("fixed", "sequential", "grid", "dual", "dual sequential", "dual grid", "multiscale")
jobs = st.tuples(st.sampled_from(KINDS), st.integers(1, 250), st.integers(1, 120))


def run(
    seed: int, plan: Sequence[tuple[str, int, int]], order: Sequence[int], batch_size: int, live: int
) -> dict[int, Certificate | DualCertificate]:
    heads = {ESTIMATOR: Head(Pixels.of(seed, 2), 2), CLASSIFIER: Head(Pixels.of(seed + 1, 3), 3)}
    noise = GaussianNoise(seed)
    engine = Engine(Network(heads), noise, batch_size=batch_size, max_live=live)
    pictures = torch.rand(len(plan), 1, 3, 3, generator=torch.Generator().manual_seed(seed))

    def tasks() -> Iterator[Task[Any]]:
        for index in order:
            yield Task(index, f"x{index}", pictures[index], procedure_of(*plan[index]))

    return {finished.key: finished.result for finished in engine.run(tasks())}


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[tuple[str, int, int]], list[int]]:
    plan = draw(st.lists(jobs, min_size=2, max_size=4))
    return plan, list(draw(st.permutations(range(len(plan)))))


@given(
    seed=st.integers(0, 2**31),
    made=runs(),
    batch_sizes=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    live=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_run_any_batch_size_order_and_window_gives_identical_results(
    seed: int,
    made: tuple[list[tuple[str, int, int]], list[int]],
    batch_sizes: tuple[int, int],
    live: int,
) -> None:
    plan, order = made
    one = run(seed, plan, range(len(plan)), batch_sizes[0], len(plan))
    other = run(seed, plan, order, batch_sizes[1], live)
    assert one.keys() == other.keys() == set(range(len(plan)))
    assert one == other


@given(seed=st.integers(0, 2**31), job=jobs)
@settings(deadline=None, max_examples=20)
def test_run_looks_give_the_votes_of_one_long_request(seed: int, job: tuple[str, int, int]) -> None:
    """A request that goes on from an earlier draw gets the noise that it would have got in one piece."""
    _, num, look_every = job
    looked = run(seed, [("grid", num, look_every)], (0,), 64, 1)[0]
    assert isinstance(looked, Certificate)
    at_once = run(seed, [("fixed", looked.num_estimation, 1)], (0,), 64, 1)[0]
    assert isinstance(at_once, Certificate)
    assert at_once.counts_estimation.tolist() == looked.counts_estimation.tolist()


# --- Arguments --------------------------------------------------------------------------------------------------------

outside_zero_one = st.floats().filter(lambda value: not 0 < value < 1)


@given(bad=outside_zero_one)
def test_sampling_alpha_out_of_range_raises(bad: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        Sampling(100, 100, bad)


@given(bad=st.integers(max_value=0))
def test_sampling_and_rule_counts_below_one_raise(bad: int) -> None:
    with pytest.raises(ConfigError, match="num_selection"):
        Sampling(bad, 100, 0.1)
    with pytest.raises(ConfigError, match="num_estimation"):
        Sampling(100, bad, 0.1)
    with pytest.raises(ConfigError, match="look_every"):
        Rule(look_every=bad)


@given(share=st.floats().filter(lambda value: not 0 < value < 0.49), z=st.floats(max_value=0) | st.just(math.nan))
def test_rule_share_or_futility_out_of_range_raises(share: float, z: float) -> None:
    with pytest.raises(ConfigError, match="early_share"):
        Rule(early_share=share)
    with pytest.raises(ConfigError, match="futility_z"):
        Rule(futility_z=z)


@given(every=st.integers(1, 10**6), share=st.floats(0, 0.49, exclude_min=True, exclude_max=True))
def test_rule_and_sampling_in_range_are_kept(every: int, share: float) -> None:
    rule, sampling = Rule(every, share, math.inf), Sampling(every, every, share)
    assert (rule.look_every, rule.early_share, rule.futility_z) == (every, share, math.inf)
    assert (sampling.num_selection, sampling.num_estimation, sampling.alpha) == (every, every, share)
