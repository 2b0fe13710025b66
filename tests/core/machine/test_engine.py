import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ConfigError, DataError, ModelError
from core.machine.engine import Engine, Finished, Task
from core.machine.network import Head, Network
from core.machine.noise import Copies, GaussianNoise, rows_of
from core.models.small import SmallConvNet
from core.procedures.dual import dual_certify
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, ESTIMATOR, Answer, Certificate, Draws, DualCertificate, Phase, Sampling
from tests.helpers.oracles import HalfSpace, axis
from tests.helpers.reference_noise import normals

SAMPLING = Sampling(100, 250, 0.01)


def naive_counts(module, image: Tensor, seed: int, example_id: str, phase: str, sigma: float, num: int, classes: int):  # type: ignore[no-untyped-def]
    """Votes by a plain loop, one forward pass per noisy copy; shares no code with the engine or the noise room."""
    votes = np.zeros(classes, np.int64)
    for row in normals(seed, example_id, phase, sigma, num, tuple(image.shape)):
        logits = module((image + sigma * torch.from_numpy(row))[None])
        if torch.isfinite(logits).all():
            votes[int(logits.argmax())] += 1
    return votes


def images(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(1, 4, 4, generator=generator) for _ in range(num)]


def tasks(num: int, order: list[int] | None = None) -> Iterator[Task[Certificate]]:
    pictures = images(num)
    for index in order if order is not None else range(num):
        for sigma in (0.25, 0.5):
            yield Task((index, sigma), f"x{index}", pictures[index], certify(sigma, SAMPLING))


def run(module, batch_size: int, num: int = 6, order: list[int] | None = None, **kwargs):  # type: ignore[no-untyped-def]
    engine = Engine(Network({CLASSIFIER: Head(module, 2)}), GaussianNoise(3), batch_size=batch_size, **kwargs)
    return {finished.key: finished.result for finished in engine.run(tasks(num, order))}


def test_run_counts_equal_a_plain_loop_of_single_forward_passes() -> None:
    module = HalfSpace(axis(16, 2), 0.4)
    results = run(module, batch_size=64)
    assert len(results) == 12
    for (index, sigma), result in results.items():
        args = (module, images(6)[index], 3, f"x{index}")
        assert result.counts_selection.tolist() == naive_counts(*args, "selection", sigma, 100, 2).tolist()
        assert result.counts_estimation.tolist() == naive_counts(*args, "estimation", sigma, 250, 2).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 100, 333, 5000])
def test_run_any_batch_size_gives_identical_results(batch_size: int) -> None:
    module = HalfSpace(axis(16, 2), 0.4)
    assert run(module, batch_size, num=3) == run(module, 64, num=3)


def test_run_any_order_and_window_gives_identical_results_with_a_network() -> None:
    torch.manual_seed(0)
    module = SmallConvNet(1, 4, 2)
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert run(module, 128) == run(module, 128, order=order) == run(module, 128, max_live=2)


def test_run_non_finite_logits_count_for_no_class() -> None:
    def half_broken(noisy: Tensor) -> Tensor:
        logits = torch.stack([torch.ones(len(noisy)), torch.zeros(len(noisy))], dim=1)
        logits[noisy[:, 0, 0, 0] > 0.5, 1] = torch.nan
        logits[noisy[:, 0, 0, 0] < 0.2, 0] = torch.inf
        logits[noisy[:, 0, 0, 1] < 0.0, 1] = -torch.inf
        return logits

    result = run(half_broken, 64, num=1)[0, 0.25]
    expected = naive_counts(half_broken, images(1)[0], 3, "x0", "estimation", 0.25, 250, 2)
    assert result.counts_estimation.tolist() == expected.tolist()
    assert 0 < result.counts_estimation.sum() < 250
    assert result.num_non_finite == 350 - result.counts_estimation.sum() - result.counts_selection.sum()


def test_run_finite_logits_count_where_their_sum_overflows() -> None:
    def large(noisy: Tensor) -> Tensor:
        logits = torch.full((len(noisy), 2), 3e38)
        logits[noisy[:, 0, 0, 0] > 0.5, 0] = 0.0
        return logits

    result = run(large, 64, num=1)[0, 0.25]
    expected = naive_counts(large, images(1)[0], 3, "x0", "estimation", 0.25, 250, 2)
    assert result.counts_estimation.tolist() == expected.tolist()
    assert result.counts_estimation.sum() == 250


def test_run_every_forward_pass_has_the_batch_shape() -> None:
    shapes = set()

    def module(noisy: Tensor) -> Tensor:
        shapes.add(tuple(noisy.shape))
        return torch.zeros(len(noisy), 2)

    run(module, 77)
    assert shapes == {(77, 1, 4, 4)}


def test_run_without_padding_runs_no_more_rows_than_the_work_has(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    class Recording(torch.nn.Module):
        def forward(self, noisy: Tensor) -> Tensor:
            shapes.append(len(noisy))
            return HalfSpace(axis(16, 2), 0.4)(noisy)

    def results(module, batch_size: int, pad: bool):  # type: ignore[no-untyped-def]
        network = Network({CLASSIFIER: Head(module, 2)})
        network.check = lambda *args: None  # type: ignore[method-assign]  # it asks too
        engine = Engine(network, GaussianNoise(3), batch_size=batch_size, pad=pad)
        found = {each.key: each.result for each in engine.run(tasks(1))}
        assert engine.rows_run == sum(shapes)
        return found, [shapes.pop(0) for _ in list(shapes)]

    module = Recording()
    expected, padded = results(module, 1000, True)
    assert set(padded) == {1000}
    assert results(module, 1000, False) == (expected, [700])
    assert results(module, 150, False) == (expected, [150, 150, 150, 125, 125])
    assert results(lambda noisy: module(noisy), 1000, False) == (expected, padded), "it may know one shape only"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("core.machine.engine._CPU_NUMBERS", 150 * 16)
    assert results(module, 1000, False) == (expected, [300, 200, 200]), "150 a thread"


def test_run_keeps_batches_full_until_the_end() -> None:
    network = Network({CLASSIFIER: Head(HalfSpace(axis(16, 0), 0.5), 2)})
    engine = Engine(network, GaussianNoise(0), batch_size=200)
    picture = images(1)[0]
    sampling = Sampling(100, 100, 0.01)
    list(engine.run(Task(i, str(i), picture, certify(0.5, sampling)) for i in range(200)))
    assert engine.rows_run <= 200 * 200 + 3 * 200  # at most three padded batches


def test_run_experts_get_the_rows_of_their_sigma() -> None:
    seen: dict[float, int] = {0.25: 0, 0.5: 0}

    def expert(sigma: float):  # type: ignore[no-untyped-def]
        def module(noisy: Tensor) -> Tensor:
            seen[sigma] += len(noisy)
            return torch.tensor([[sigma == 0.25, sigma == 0.5]]).float().expand(len(noisy), 2)

        return module

    network = Network({CLASSIFIER: Head({s: expert(s) for s in (0.25, 0.5)}, 2)})
    engine = Engine(network, GaussianNoise(0), batch_size=50)
    results = {f.key: f.result for f in engine.run(tasks(4))}
    assert all(result.prediction == (0 if sigma == 0.25 else 1) for (_, sigma), result in results.items())
    assert seen[0.25] == seen[0.5] == 4 * 350 + 50, "one pass more, of the check"
    assert network.rows == {CLASSIFIER: 2 * 4 * 350}
    with pytest.raises(ConfigError, match=r"no classifier expert for sigma=0\.7"):
        list(engine.run([Task(0, "a", images(1)[0], certify(0.7, SAMPLING))]))


def test_run_dual_equals_the_two_stages_by_a_plain_loop() -> None:
    estimator, classifier = HalfSpace(axis(16, 0), 0.3), HalfSpace(axis(16, 1), 0.4)
    network = Network({ESTIMATOR: Head(estimator, 2), CLASSIFIER: Head(classifier, 2)})
    engine = Engine(network, GaussianNoise(5), batch_size=64)
    picture = images(1)[0]
    done: list[Finished[DualCertificate]] = list(
        engine.run([Task("k", "e", picture, dual_certify((0.25, 0.5), 0.5, SAMPLING))])
    )
    level = done[0].result.sigma_stage
    args = (estimator, picture, 5, "e")
    assert level.counts_selection.tolist() == naive_counts(*args, "selection", 0.5, 100, 2).tolist()
    assert level.counts_estimation.tolist() == naive_counts(*args, "estimation", 0.5, 250, 2).tolist()
    if not level.abstained:
        label, sigma = done[0].result.class_stage, (0.25, 0.5)[level.prediction]
        assert label is not None
        votes = naive_counts(classifier, picture, 5, "e", Phase.ESTIMATION.value, sigma, 250, 2)
        assert label.counts_estimation.tolist() == votes.tolist()


def test_run_wrong_width_of_logits_names_the_head() -> None:
    with pytest.raises(ModelError, match=r"classifier returned logits of shape \(64, 3\).*expected \(64, 2\)"):
        run(lambda noisy: torch.zeros(len(noisy), 3), 64)


def test_run_task_that_fails_says_so_and_its_neighbours_go_on() -> None:
    def broken() -> Generator[Draws, Answer, Certificate]:
        yield Draws(0.5, 10, (CLASSIFIER,), Phase.SELECTION)
        raise ValueError("in the procedure")

    engine = Engine(Network({CLASSIFIER: Head(lambda x: torch.zeros(len(x), 2), 2)}), GaussianNoise(0), batch_size=10)
    images = {0: torch.zeros(1, 4, 4), 1: torch.zeros(1, 5, 4), 2: torch.zeros(1, 4, 4), 3: torch.zeros(1, 4, 4)}
    tasks = [Task(i, f"e{i}", image, broken() if i == 2 else certify(0.5, SAMPLING)) for i, image in images.items()]
    done = {finished.key: finished for finished in engine.run(tasks)}
    assert done[0].result == done[3].result
    assert isinstance(done[1].error, DataError)
    with pytest.raises(DataError, match="'e1' has shape"):
        _ = done[1].result
    with pytest.raises(ValueError, match="in the procedure"):
        _ = done[2].result
    assert engine.live == 0


def test_run_abandoned_and_started_again_gives_the_same_results() -> None:
    module = HalfSpace(axis(16, 2), 0.4)
    engine = Engine(Network({CLASSIFIER: Head(module, 2)}), GaussianNoise(3), batch_size=64)
    next(iter(engine.run(tasks(6))))  # the generator is dropped half-way
    assert {f.key: f.result for f in engine.run(tasks(6))} == run(module, 64)


def test_run_abandoned_with_draws_made_ahead_half_done_leaves_no_vote_to_the_next() -> None:
    def broken() -> Generator[Draws, Answer, Certificate]:
        later = Draws(0.5, 1000, (CLASSIFIER,), Phase.ESTIMATION)
        yield Draws(0.5, 70, (CLASSIFIER,), Phase.SELECTION, ahead=(later,))
        raise ValueError("in the procedure")

    module = HalfSpace(axis(16, 2), 0.4)
    engine = Engine(Network({CLASSIFIER: Head(module, 2)}), GaussianNoise(3), batch_size=64)
    failed = next(engine.run([Task(0, "x", images(1)[0], broken())]))  # nothing is live any more
    assert isinstance(failed.error, ValueError)
    assert engine.rows_run == 128, "and some rows of the later draws have run"
    assert {f.key: f.result for f in engine.run(tasks(6))} == run(module, 64)


@pytest.mark.parametrize("batch_size", [10, 64, 1000])
def test_run_draws_made_ahead_are_those_asked_for_later(batch_size: int) -> None:
    """Asked in another order, in part, or never: the votes are the ones of the same request without `ahead`."""
    wanted = [Draws(0.5, num, (CLASSIFIER,), Phase.ESTIMATION, start) for num, start in ((30, 0), (70, 30), (25, 100))]
    other = Draws(0.25, 40, (CLASSIFIER,), Phase.SELECTION)

    def asks(first: Draws, then: Sequence[Draws]) -> Generator[Draws, Answer, list[list[int]]]:
        votes = []
        for draws in (first, *then):
            votes.append((yield draws)[CLASSIFIER].tolist())
        return votes

    def answers(first: Draws, then: Sequence[Draws]) -> list[list[int]]:
        network = Network({CLASSIFIER: Head(HalfSpace(axis(16, 2), 0.4), 2)})
        engine = Engine(network, GaussianNoise(3), batch_size=batch_size, pad=False)
        todo = [Task(number, f"x{number}", image, asks(first, then)) for number, image in enumerate(images(100))]
        found = {each.key: each.result for each in engine.run(todo)}
        assert engine.live == 0
        assert not any(lane.rows for lane in engine._lanes.values())
        assert not engine._votes[1:].any(), "a free slot holds zeros"
        return [each for number in range(100) for each in found[number]]

    ahead = replace(other, ahead=tuple(wanted))
    assert ahead == other
    assert len(set(map(tuple, answers(other, wanted)))) > 10
    for then in (wanted, wanted[::-1], wanted[1:], [other, *wanted], []):
        assert answers(ahead, then) == answers(other, then)


def test_run_certificate_of_one_image_is_one_pass() -> None:
    """And of DUAL-CERTIFY one for each stage."""
    shapes = []

    class Recording(torch.nn.Module):
        def forward(self, noisy: Tensor) -> Tensor:
            shapes.append(len(noisy))
            return torch.tensor([[1.0, 0.0]]).expand(len(noisy), 2)

    network = Network({ESTIMATOR: Head(Recording(), 2), CLASSIFIER: Head(Recording(), 2)})
    network.check = lambda *args: None  # type: ignore[method-assign]
    engine = Engine(network, GaussianNoise(3), batch_size=1000, pad=False)
    sampling = Sampling(20, 100, 0.01)
    for procedure, passes in ((certify(0.5, sampling), 1), (dual_certify((0.25, 0.5), 1.0, sampling), 2)):
        _ = next(iter(engine.run([Task(0, "x", images(1)[0], procedure)]))).result
        assert shapes == [120] * passes
        shapes.clear()


def test_run_source_that_pauses_is_asked_again() -> None:
    def paused() -> Iterator[Task[Certificate] | None]:
        yield None
        for task in tasks(3):
            yield task
            yield None

    engine = Engine(Network({CLASSIFIER: Head(HalfSpace(axis(16, 2), 0.4), 2)}), GaussianNoise(3), batch_size=64)
    assert list(engine.run([])) == []
    assert {f.key: f.result for f in engine.run(paused())} == run(HalfSpace(axis(16, 2), 0.4), 64, num=3)


class Numbered:
    """Noise that writes each copy's number into it, and of some tens lets a scattered third vote."""

    kind = "numbered"
    seed = 0

    def __init__(self, masked_tens: int) -> None:
        self.masked_tens = masked_tens

    def may_vote(self, numbers: Tensor) -> Tensor:
        return ((numbers // 10) % self.masked_tens != 0) | ((numbers * 7919) % 101 % 3 == 0)

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> Tensor | None:
        assert len(out) == sum(each.num for each in copies)
        numbers = torch.cat([each.first + torch.arange(each.num) for each in copies])
        for each, rows in rows_of(out, copies):
            rows.copy_(each.image + each.first + torch.arange(each.num)[:, None, None, None])
        mask = self.may_vote(numbers)
        return None if mask.all() else mask


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 64, 1000])
@pytest.mark.parametrize("masked_tens", [1, 3])
def test_run_votes_are_those_of_the_copies_that_may_vote(batch_size: int, masked_tens: int) -> None:
    noise = Numbered(masked_tens)
    windows = [(0, 57), (3, 41), (20, 20), (19, 1), (100, 63), (8, 12)]

    def module(noisy: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(noisy[:, 0, 0, 0].long() % 5, 5).float()

    def procedure(windows: list[tuple[int, int]]) -> Generator[Draws, Answer, list[list[int]]]:
        votes = []
        for start, num in windows:
            answer = yield Draws(0.5, num, (CLASSIFIER,), Phase.ESTIMATION, start)
            votes.append(answer[CLASSIFIER].tolist())
        return votes

    engine = Engine(Network({CLASSIFIER: Head(module, 5)}), noise, batch_size=batch_size)
    tasks = [Task(i, f"e{i}", torch.zeros(1, 1, 1), procedure(windows[i:] + windows[:i])) for i in range(6)]
    done = {finished.key: finished.result for finished in engine.run(tasks)}
    for i in range(6):
        for (start, num), votes in zip(windows[i:] + windows[:i], done[i], strict=True):
            voters = [n for n in range(start, start + num) if noise.may_vote(torch.tensor([n])).item()]
            assert votes == [sum(n % 5 == c for n in voters) for c in range(5)]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_run_denoiser_gets_the_level_of_each_row_and_one_of_the_batch_for_padding(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "check", lambda *args: None)  # it mixes rows and levels on purpose

    class Level:
        """Copies that are their noise level."""

        kind = "level"
        seed = 0

        def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
            for each, rows in rows_of(out, copies):
                rows.fill_(each.sigma)

    passes: list[Tensor] = []

    def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
        padding = sigma != noisy[:, 0, 0, 0]
        assert sigma.dtype == torch.float32
        assert set(sigma[padding].tolist()) <= set(sigma[~padding].tolist())
        passes.append(sigma)
        return noisy

    network = Network({CLASSIFIER: Head(lambda x: torch.zeros(len(x), 2), 2)}, denoiser=denoiser)
    engine = Engine(network, Level(), batch_size=batch_size)
    assert engine.rows_run == 0
    list(engine.run(tasks(1)))
    assert engine.rows_run == sum(len(sigma) for sigma in passes)
    found = [sum(int((sigma == level).sum()) for sigma in passes) for level in (0.25, 0.5)]
    assert sum(found) == engine.rows_run, "no other level, padding included"
    assert min(found) >= 350


@pytest.mark.parametrize(("batch_size", "max_live"), [(0, 1), (1, 0), (-1, 5)])
def test_engine_without_room_is_refused(batch_size: int, max_live: int) -> None:
    network = Network({CLASSIFIER: Head(HalfSpace(axis(16, 0), 0.5), 2)})
    with pytest.raises(ConfigError, match="at least 1"):
        Engine(network, GaussianNoise(0), batch_size=batch_size, max_live=max_live)
    assert len(run(HalfSpace(axis(16, 2), 0.4), 1, num=1, max_live=1)) == 2


def test_warm_up_runs_each_kind_of_request_at_the_batch_shape_and_leaves_no_trace() -> None:
    shapes: dict[float, list[tuple[int, ...]]] = {0.25: [], 0.5: []}

    def expert(sigma: float):  # type: ignore[no-untyped-def]
        def module(noisy: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            shapes[sigma].append(tuple(noisy.shape))
            return HalfSpace(axis(16, 2), 0.4)(noisy)

        return module

    network = Network({CLASSIFIER: Head({s: expert(s) for s in shapes}, 2)})
    engine = Engine(network, GaussianNoise(3), batch_size=64)
    seconds = engine.warm_up((1, 4, 4), [Draws(s, 1, (CLASSIFIER,), Phase.SELECTION) for s in shapes])
    assert 0.0 < seconds < 60.0
    assert all(seen and set(seen) == {(64, 1, 4, 4)} for seen in shapes.values())
    assert (network.rows, engine.rows_run) == ({}, 0)
    assert {f.key: f.result for f in engine.run(tasks(6))} == run(HalfSpace(axis(16, 2), 0.4), 64)
