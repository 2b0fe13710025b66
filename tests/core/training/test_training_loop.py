"""The epoch loop: interruptions, slices of several workers, noise, schedule; against plain re-implementations."""

import copy
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import EstimatorConfig
from core.config.training import OptimisationConfig
from core.data import Dataset, Preparation, StoredImages
from core.errors import DataError, ModelError
from core.training.estimator import EstimatorObjective
from core.training.loop import Objective, Schedule, Training
from core.training.samples import Samples
from tests.core.training.test_training import numpy_loss


def small_images(num: int = 13) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num, 1, 4, 4), np.uint8)


def small_data(num: int = 13) -> Dataset:
    images = small_images(num)
    return Dataset("small", tuple(f"s/{i}" for i in range(num)), images, np.arange(num) % 2, 2)


def objective(num: int = 13, **config: Any) -> EstimatorObjective:
    radii = np.random.default_rng(1).uniform(0.1, 1, (num, 2))
    settings = EstimatorConfig(**{"epochs": 3, "batch_size": 5, "lr": 0.01, **config})
    return EstimatorObjective(small_data(num), radii, 0.3, None, settings, seed=7)


def network(seed: int = 0) -> nn.Module:
    """With what carries state of its own (BatchNorm) and randomness of its own (dropout)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 2)
    )


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def finished(training: Training) -> Training:
    for _ in training.run():
        pass
    return training


def same(one: Training, two: Training) -> bool:
    a, b = one.model.state_dict(), two.model.state_dict()
    losses = [[record["loss"] for record in training.history] for training in (one, two)]
    return losses[0] == losses[1] and all(torch.equal(a[name], b[name]) for name in a)


GROWN = {
    "optimizer": "sgd", "momentum": 0.9, "schedule": "cosine", "warmup": 0.2, "ema": 0.8, "precision": "bfloat16",
    "steps": 8,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, GROWN], ids=["as it was", "all that it can"])
def test_training_that_goes_on_from_any_batch_ends_with_the_same_bits(changes: dict[str, Any]) -> None:
    def learner() -> EstimatorObjective:
        learnt = objective()
        steps = changes.get("steps")
        config = learnt.schedule.config.model_copy(update={key: of for key, of in changes.items() if key != "steps"})
        learnt.schedule = replace(learnt.schedule, config=config, steps=steps)
        return learnt

    whole = finished(Training(network(), learner()))
    interrupted = Training(network(), learner())
    states = []
    for _ in interrupted.run():
        buffer = io.BytesIO()
        torch.save(interrupted.state(), buffer)
        states.append(buffer.getvalue())
    assert same(interrupted, whole)
    assert len(states) == changes.get("steps", 9)  # three batches in each of three epochs
    assert interrupted.samples_done == interrupted.samples_total == (39 if len(states) == 9 else 36)
    for number, content in enumerate(states):
        torch.manual_seed(99)
        resumed = Training(network(seed=5), learner())
        resumed.load_state(torch.load(io.BytesIO(content), weights_only=True))
        last = number + 1 == len(states)
        assert (resumed.epoch, resumed.batch) == ((3, 0) if last else ((number + 1) // 3, (number + 1) % 3))
        assert same(finished(resumed), whole), number


def test_training_another_seed_gives_other_weights() -> None:
    other = objective()
    other.seed = 8
    assert not same(finished(Training(network(), objective())), finished(Training(network(), other)))


@pytest.mark.parametrize("workers", [2, 3, 4, 7])
def test_slices_of_several_workers_have_the_gradient_of_the_whole_batch(workers: int) -> None:
    model = linear()
    ranks = [Training(copy.deepcopy(model), objective(), rank, workers) for rank in range(workers)]
    alone = Training(model, objective())
    parts = [list(training._batches()) for training in ranks]
    batches = list(alone._batches())
    assert [len(batch[1]) for batch, _ in batches] == [5, 5, 3]  # the last one is smaller, and than 4 and 7 workers too
    for number, (batch, _) in enumerate(batches):
        losses = alone.objective.losses(model, batch)["loss"]
        expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
        sums = [torch.zeros_like(gradient) for gradient in expected]
        seen: list[Tensor] = []
        for training, mine in zip(ranks, parts, strict=True):
            part, weight = mine[number]
            loss = training.objective.losses(training.model, part)["loss"].sum() * weight
            for total, gradient in zip(sums, torch.autograd.grad(loss, list(training.model.parameters())), strict=True):
                total += gradient / workers  # what DistributedDataParallel does
            if weight:
                seen.append(part[0].view(2, -1, 1, 4, 4))
        assert torch.equal(torch.cat(seen, dim=1).view(-1, 1, 4, 4), batch[0])  # the same samples, the same noise
        for total, gradient in zip(sums, expected, strict=True):
            torch.testing.assert_close(total, gradient, rtol=1e-5, atol=1e-6)


def test_one_worker_equals_a_loop_written_out() -> None:
    """Order, noise, loss, AdamW and step schedule, by hand."""
    trained = finished(Training(linear(), objective(epochs=4, lr=0.02, lr_step=2, lr_gamma=0.5, weight_decay=0.05)))
    images, radii = small_images(), np.random.default_rng(1).uniform(0.1, 1, (13, 2))
    best = radii.argmax(axis=1)
    weights = np.array([13 / (best == index).sum() for index in best])

    def key(use: str, epoch: int, where: str) -> bytes:
        return hashlib.blake2b(f"7|train_estimator|{use}|{epoch}|{where}".encode(), digest_size=16).digest()

    model = linear()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    step, history = 0, []
    for epoch in range(4):
        lr = 0.02 * (0.5 if epoch >= 2 else 1.0)
        order = np.random.default_rng(int.from_bytes(key("order", epoch, "")[:7], "little")).permutation(13)
        total = 0.0
        for start in (0, 5, 10):
            batch = order[start : start + 5]
            copies = []
            for index in batch:
                seed = int.from_bytes(key("noise", epoch, f"s/{index}"), "little")
                noise = np.random.Generator(np.random.SFC64(seed)).standard_normal((2, 1, 4, 4), dtype=np.float32)
                copies.append(images[index] / 255 + 0.3 * noise)
            logits = model(torch.from_numpy(np.stack(copies)).float().view(-1, 1, 4, 4)).view(len(batch), 2, 2)
            loss = torch_loss(logits.transpose(0, 1), radii[batch], weights[batch])
            value = numpy_loss(
                logits.transpose(0, 1).detach().double().numpy(), radii[batch], weights[batch], EstimatorConfig()
            )
            assert loss.item() == pytest.approx(value, rel=1e-4)
            total += value * len(batch)
            step += 1
            for parameter, (m, v), g in zip(
                model.parameters(), moments, torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                with torch.no_grad():
                    parameter.mul_(1 - lr * 0.05)
                    parameter.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        history.append((total / 13, lr))
    assert [(record["loss"], record["lr"]) for record in trained.history] == [
        pytest.approx(pair, rel=1e-4) for pair in history
    ]
    for one, two in zip(trained.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_training_compiled_has_the_bits_and_the_names_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dynamo's eager backend, which changes no arithmetic."""
    compiled = []

    def eager(self: nn.Module) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    learnt = objective(epochs=1)
    config = learnt.schedule.config.model_copy(update={"compile": True})
    learnt.schedule = replace(learnt.schedule, config=config)
    model = linear()
    training = finished(Training(model, learnt))
    assert compiled == [model]
    assert same(training, finished(Training(linear(), objective(epochs=1))))
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("total", [2, 7, 40, 1000])
def test_schedule_one_cycle_is_that_of_torch(total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
    schedule = Schedule(OptimisationConfig(batch_size=5, lr=0.3), 1, total)
    for batch in range(total):
        assert schedule.rate(batch, 10**6) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), batch
        optimizer.step()
        if batch + 1 < total:
            scheduler.step()


def test_schedule_closed_forms() -> None:
    def rates(kind: str, steps: int | None = None, **keys: Any) -> list[float]:
        config = OptimisationConfig.model_validate({"batch_size": 5, "lr": 1.0, "schedule": kind, **keys})
        schedule = Schedule(config, 4, steps)
        return [schedule.rate(batch, 5) for batch in range(20)]

    batches = np.arange(20)
    rise = np.minimum(1, (batches + 1) / 5)
    assert rates("constant") == [1.0] * 20
    assert rates("constant", warmup=0.25) == pytest.approx(rise)
    assert rates("constant", warmup=0.5, lr_every="epoch") == pytest.approx(np.repeat([0.5, 1, 1, 1], 5))
    assert rates("step", lr_step=2, lr_gamma=0.1) == pytest.approx(np.repeat([1, 1, 0.1, 0.1], 5))
    assert rates("step", lr_step=1, lr_gamma=0.5, warmup=0.25) == pytest.approx(
        rise * np.repeat([1, 0.5, 0.25, 0.125], 5)
    )
    assert rates("cosine") == pytest.approx((1 + np.cos(np.pi * batches / 20)) / 2)
    falling = (1 + np.cos(np.pi * (batches - 5) / 15)) / 2
    assert rates("cosine", warmup=0.25) == pytest.approx(np.where(batches < 5, rise, falling))
    assert rates("cosine", lr_every="epoch") == pytest.approx(np.repeat(falling_by_epoch(), 5))
    assert rates("cosine", steps=10)[9] == pytest.approx((1 + math.cos(math.pi * 0.9)) / 2)


def falling_by_epoch() -> list[float]:
    return [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]


def test_training_sgd_and_average_equal_a_loop_written_out() -> None:
    """SGD with momentum and decay; the average of weights and BatchNorm's statistics, slowly, in float64."""
    learnt = objective()
    config = OptimisationConfig(
        schedule="constant", batch_size=5, lr=0.1, weight_decay=0.02, optimizer="sgd", momentum=0.9, ema=0.6
    )
    learnt.schedule = Schedule(config, 2)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    slow = copy.deepcopy(model)
    finished(Training(model, learnt))
    average = {name: value.double() for name, value in slow.state_dict().items()}
    speeds = [torch.zeros_like(p) for p in slow.parameters()]
    step = 0
    for epoch in range(2):
        order = np.random.default_rng(
            int.from_bytes(
                hashlib.blake2b(f"7|train_estimator|order|{epoch}|".encode(), digest_size=16).digest()[:7], "little"
            )
        ).permutation(13)
        for start in (0, 5, 10):
            loss = learnt.losses(slow, learnt.batch(epoch, order[start : start + 5]))["loss"].mean()
            gradients = torch.autograd.grad(loss, list(slow.parameters()))
            with torch.no_grad():
                for parameter, speed, gradient in zip(slow.parameters(), speeds, gradients, strict=True):
                    speed.mul_(0.9).add_(gradient + 0.02 * parameter)
                    parameter.sub_(0.1 * speed)
            step += 1
            decay = min(0.6, step / (step + 9))
            for name, value in slow.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * value.double()
    for name, value in model.state_dict().items():
        expected = torch.tensor(6.0) if name.endswith("num_batches_tracked") else average[name]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)


def torch_loss(logits: Tensor, radii: NDArray[np.float64], weights: NDArray[np.float64]) -> Tensor:
    """The published loss in its textbook form: soft CE, strong consistency, lambda 40, eta 0.5."""
    p, target = logits.softmax(2), torch.from_numpy(radii).softmax(1)
    mean = p.mean(0)
    kl = (mean * (mean / p).log()).sum(2).mean(0)
    entropy = -(mean * mean.log()).sum(1)
    largest = logits.argmax(2).amax(0).numpy()
    w_r = torch.from_numpy(radii[np.arange(len(radii)), largest])
    per_sample = -(target * p.log()).sum(2).mean(0) + w_r * (40 * kl + 0.5 * entropy)
    return (torch.from_numpy(weights) * per_sample).mean()


class Broken(Objective):
    """An objective whose losses are not finite from the second epoch on."""

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor]:
        return (torch.full((len(chosen), 16), float("nan") if epoch else 1.0),)

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"loss": model(batch[0]).sum(1)}


def test_training_whose_loss_is_not_finite_ends_with_an_error() -> None:
    samples = Samples(small_data(4), np.arange(4), "broken", 0)
    broken = Broken(samples, Schedule(OptimisationConfig(schedule="constant", batch_size=2, lr=0.1), 3))
    training = Training(linear(), broken)
    with pytest.raises(ModelError, match=r"broken: the loss of epoch 2 is not finite .*lower its learning rate"):
        finished(training)
    assert training.epoch == 1


def stored(data: Dataset, fetched: list[int]) -> Dataset:
    """The same images as PNG files, with a note of each that is fetched."""
    from PIL import Image

    def fetch(place: int) -> bytes:
        fetched.append(place)
        content = io.BytesIO()
        Image.fromarray(small_images(len(data))[place][0]).save(content, "PNG")
        return content.getvalue()

    places = np.arange(len(data))
    images = StoredImages(places, fetch, lambda place: f"file {place}", Preparation("grey"))
    return Dataset("stored", data.example_ids, images, data.labels, 2)


@pytest.mark.parametrize(("memory", "times"), [(10**6, 1), (1, 3)])
def test_samples_that_are_stored_are_read_once_where_they_fit_and_are_the_same(
    memory: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: memory if name == "SC_PHYS_PAGES" else 1)
    fetched: list[int] = []
    data, places = small_data(), np.array([2, 3, 5, 7, 11])
    on_disk = stored(data, fetched)
    assert on_disk.shape == (1, 4, 4)
    fetched.clear()
    samples = Samples(on_disk, places, "train", 0)
    plain = Samples(data, places, "train", 0)
    for epoch in range(3):
        chosen = np.array([4, 0, 2])
        levels = [0.1, 0.2, 0.3]
        assert torch.equal(samples.noisy(epoch, chosen, levels, 2), plain.noisy(epoch, chosen, levels, 2))
    assert sorted(fetched) == sorted([11, 2, 5] * times)


def test_samples_noise_is_another_one_in_each_epoch_copy_and_example() -> None:
    data = Dataset("grey", ("a", "b"), np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64), 2)
    samples = Samples(data, np.arange(2), "train", 0)
    draws = torch.cat([samples.noisy(epoch, np.arange(2), [1.0, 1.0], 3) for epoch in range(50)]).flatten(1)
    assert draws.shape == (300, 64)
    correlations = (draws @ draws.T / 64 - torch.eye(300)).abs()
    assert correlations.max() < 0.8  # of the same draws it is 1
    assert draws.std().item() == pytest.approx(1, abs=0.02)
    assert draws.mean().item() == pytest.approx(0, abs=0.03)


def test_training_on_an_image_that_cannot_be_read_names_it() -> None:
    data = stored(small_data(4), [])
    assert isinstance(data.images, StoredImages)
    fetch: Callable[[int], bytes] = data.images._fetch
    data.images._fetch = lambda place: b"no image" if place == 2 else fetch(place)
    radii = np.full((4, 2), 0.5)
    training = Training(linear(), EstimatorObjective(data, radii, 0.3, None, EstimatorConfig(epochs=1), 0))
    with pytest.raises(DataError, match="example 's/2': cannot decode file 2"):
        finished(training)


def test_schedule_of_the_estimator_is_the_published_one_by_default() -> None:
    config = EstimatorConfig()
    schedule = EstimatorObjective(small_data(4), np.full((4, 2), 0.5), 1.0, None, config, 0).schedule
    assert (schedule.epochs, schedule.config.batch_size, schedule.config.weight_decay) == (90, 256, 0.01)
    rates = [schedule.rate(epoch) for epoch in range(90)]
    assert rates == pytest.approx([0.01] * 30 + [0.005] * 30 + [0.0025] * 30)
    assert (config.consistency_lambda, config.consistency_eta, config.num_copies) == (40.0, 0.5, 2)
