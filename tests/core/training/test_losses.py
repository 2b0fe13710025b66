"""Losses of base classifiers against a slow NumPy reference, sample by sample, and against closed forms."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from core.config.losses import LossConfig
from core.training.losses import CatRs, Consistency, Gaussian, Loss, Macer, NoisyBatch, SmoothAdv, SmoothMix, make_loss
from core.training.losses.attacked import binomial_draw

Floats = NDArray[np.float64]
B, SHAPE, HIDDEN, K = 12, (2, 1, 3), 5, 4
PUBLISHED = {0.25: 0, 0.5: 1, 1.0: 2}


# The reference: a network of two layers in NumPy, one image at a time. What a loss holds fixed while it differentiates
# (attacks, draws, a target without a gradient) is computed first and handed in.


def softmax(weights: list[Floats], x: Floats) -> Floats:
    logits: Floats = np.tanh(x.ravel() @ weights[0]) @ weights[1]
    e = np.exp(logits - logits.max())
    return np.asarray(e / e.sum(), np.float64)


def mean_softmax(weights: list[Floats], x: Floats, noise: Floats) -> Floats:
    return np.asarray(np.mean([softmax(weights, x + n) for n in noise], axis=0), np.float64)


def cross_entropy(p: Floats, label: int, smoothing: float) -> float:
    target = np.full(K, smoothing / K)
    target[label] += 1 - smoothing
    return float(-(target * np.log(p)).sum())


def kl(target: Floats, p: Floats) -> float:
    return sum(float(t * np.log(t / q)) for t, q in zip(target, p, strict=True) if t > 0)


def slope(function: Callable[[Floats], float], at: Floats) -> Floats:
    """The gradient, by central differences."""
    found = np.zeros(at.size)
    for i in range(at.size):
        step = np.zeros(at.size)
        step[i] = 1e-5
        up, down = function(at + step.reshape(at.shape)), function(at - step.reshape(at.shape))
        found[i] = (up - down) / 2e-5
    return found.reshape(at.shape)


def shortened(moved: Floats, radius: float) -> Floats:
    length = np.linalg.norm(moved)
    return moved * (radius / length) if length > radius else moved


def uphill(weights: list[Floats], x: Floats, noise: Floats, label: int) -> Floats:
    gradient = slope(lambda at: -np.log(mean_softmax(weights, at, noise)[label]), x)
    return gradient / np.linalg.norm(gradient)


def ramp(done: float, warmup: float) -> float:
    return 1.0 if done >= warmup else done / warmup


class Sample:
    """One sample of a batch, in NumPy."""

    def __init__(self, batch: NoisyBatch, i: int) -> None:
        self.x, self.sigma, self.label = batch.images[i].numpy(), float(batch.sigma[i]), int(batch.labels[i])
        self.noise = batch.noise[:, i].numpy() * self.sigma
        self.u, self.done = float(batch.uniform[i, 0]), batch.done
        self.soft = None if batch.soft is None else batch.soft[i].numpy()
        self.level = PUBLISHED[self.sigma]


def fixed_smoothadv(loss: SmoothAdv, w: list[Floats], s: Sample) -> Any:
    radius = (loss.epsilon or (1, 1, 2)[s.level]) * ramp(s.done, loss.warmup)
    x = s.x
    for _ in range(loss.steps):
        x = np.clip(x + 2 * radius / loss.steps * uphill(w, x, s.noise, s.label), 0, 1)
        x = s.x + shortened(x - s.x, radius)
    return x


def value_smoothadv(loss: SmoothAdv, w: list[Floats], s: Sample, x: Any) -> float:
    return float(np.mean([cross_entropy(softmax(w, x + n), s.label, loss.smoothing) for n in s.noise]))


def fixed_smoothmix(loss: SmoothMix, w: list[Floats], s: Sample) -> Any:
    length = loss.step_size or (0.5, 1, 2)[s.level]
    points = [s.x]
    for _ in range(loss.steps):
        points.append(np.clip(points[-1] + length * uphill(w, points[-1], s.noise, s.label), 0, 1))
    clean = s.x
    if loss.one_step:
        clean = np.clip(s.x + shortened(points[1] - s.x, length * ramp(s.done, loss.warmup)), 0, 1)
    return clean, points[-1]


def value_smoothmix(loss: SmoothMix, w: list[Floats], s: Sample, fixed: Any) -> float:
    clean, attacked = fixed
    f, share = mean_softmax(w, clean, s.noise), s.u / 2
    target, mixture = (1 - share) * f + share / K, (1 - share) * clean + share * attacked
    value = float(np.mean([cross_entropy(softmax(w, clean + n), s.label, loss.smoothing) for n in s.noise]))
    if f.argmax() == s.label:
        apart = np.mean([kl(target, softmax(w, mixture + n)) for n in s.noise])
        value += loss.weight * ramp(s.done, loss.warmup) * float(apart)
    return value


def fixed_cat_rs(loss: CatRs, w: list[Floats], s: Sample) -> Any:
    right = sum(int(softmax(w, s.x + n).argmax() == s.label) for n in s.noise)
    chosen = max(1, int(stats.binom.ppf(np.nextafter(s.u, 1), loss.copies, right / loss.copies)))
    target = mean_softmax(w, s.x, s.noise) if s.soft is None else s.soft
    moved = []
    for start in s.noise:
        noise = start
        for _ in range(loss.steps):
            gradient = slope(lambda at: kl(target, softmax(w, s.x + at)), noise)
            noise = noise + 2 * loss.epsilon / loss.steps * gradient / np.linalg.norm(gradient)
            noise = start + shortened(noise - start, loss.epsilon)
            noise = (noise - noise.mean()) / np.sqrt(np.square(noise).mean())
            noise = start.mean() + noise * np.sqrt(np.square(start).mean())
        moved.append(noise)
    return chosen, target, moved


def value_cat_rs(loss: CatRs, w: list[Floats], s: Sample, fixed: Any) -> float:
    chosen, target, moved = fixed
    terms = [cross_entropy(softmax(w, s.x + n), s.label, loss.smoothing) for n in s.noise]
    value = min(sum(some) for some in combinations(terms, chosen)) / loss.copies
    if chosen == loss.copies:
        weight = loss.weight if loss.weight is not None else (0.5, 1, 2)[s.level]
        value += weight * max(kl(target, softmax(w, s.x + n)) for n in moved)
    return value


def value_gaussian(loss: Gaussian, w: list[Floats], s: Sample, _: Any) -> float:
    return float(np.mean([cross_entropy(softmax(w, s.x + n), s.label, loss.smoothing) for n in s.noise]))


def value_consistency(loss: Consistency, w: list[Floats], s: Sample, _: Any) -> float:
    f, p = mean_softmax(w, s.x, s.noise), [softmax(w, s.x + n) for n in s.noise]
    weight = loss.weight if loss.weight is not None else (20, 10, 10)[s.level]
    value = np.mean([cross_entropy(q, s.label, loss.smoothing) + weight * kl(f, q) for q in p])
    return float(value - loss.eta * (f * np.log(f)).sum())


def value_macer(loss: Macer, w: list[Floats], s: Sample, _: Any) -> float:
    value = cross_entropy(mean_softmax(w, s.x, s.noise), s.label, loss.smoothing)
    sharp = mean_softmax([w[0], w[1] * loss.beta], s.x, s.noise)
    second, first = np.sort(sharp)[-2:]
    margin = stats.norm.ppf(first) - stats.norm.ppf(second)
    if sharp.argmax() == s.label and margin <= loss.gamma and s.done >= loss.deferred:
        weight = loss.weight if loss.weight is not None else (12, 4, 12)[s.level]
        value += weight * s.sigma / 2 * (loss.gamma - float(margin))
    return value


def nothing_fixed(*_: object) -> None:
    return None


REFERENCES: dict[type[Any], tuple[Callable[..., Any], Callable[..., float]]] = {
    Gaussian: (nothing_fixed, value_gaussian),
    Consistency: (nothing_fixed, value_consistency),
    Macer: (nothing_fixed, value_macer),
    SmoothMix: (fixed_smoothmix, value_smoothmix),
    CatRs: (fixed_cat_rs, value_cat_rs),
    SmoothAdv: (fixed_smoothadv, value_smoothadv),
}


# The network and the batch


class Predict:
    """Of a network in torch, noting what it was asked."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self.logits = logits
        self.asked: list[tuple[bool, Tensor]] = []

    def __call__(self, images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        assert sigma.shape == images.shape[:1]
        self.asked.append((frozen, images.detach().clone()))
        return self.logits(images)


def make_weights(seed: int) -> list[Floats]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(6, HIDDEN)), 2 * random.normal(size=(HIDDEN, K))]


def make_batch(copies: int, seed: int = 0, done: float = 1.0, soft: bool = False) -> NoisyBatch:
    random = np.random.default_rng(seed)
    images, noise, teacher = (
        random.uniform(size=(B, *SHAPE)),
        random.normal(size=(copies, B, *SHAPE)),
        np.eye(K)[: B % K],
    )
    labels = [int(mean_softmax(make_weights(seed), x, 0.5 * noise[:, i]).argmax()) for i, x in enumerate(images)]
    labels[::5] = [(label + 1) % K for label in labels[::5]]
    uniform = random.uniform(size=(B, 1))
    uniform[B // 2 :] = 0.9999  # all copies count, at each level
    teacher = random.dirichlet(np.full(K, 0.5), size=B)
    teacher[0] = np.eye(K)[1]  # hard votes have zeros
    return NoisyBatch(
        images=torch.from_numpy(images),
        noise=torch.from_numpy(noise),
        sigma=torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).repeat(B // 3),
        labels=torch.tensor(labels),
        uniform=torch.from_numpy(uniform),
        done=done,
        soft=torch.from_numpy(teacher) if soft else None,
    )


@pytest.mark.parametrize(
    ("loss", "done", "soft"),
    [
        (Gaussian(), 1.0, False),
        (Gaussian(copies=3, smoothing=0.1), 1.0, False),
        (Consistency(), 1.0, False),
        (Consistency(copies=3, weight=3.0, eta=2.0, smoothing=0.1), 1.0, False),
        (Macer(copies=5, beta=1.0), 1.0, False),
        (Macer(copies=3, weight=2.0, beta=3.0, gamma=1.5, smoothing=0.1), 1.0, False),
        (Macer(copies=3, beta=1.0, deferred=0.5), 0.4, False),
        (Macer(copies=3, beta=1.0, deferred=0.5), 0.5, False),
        (SmoothMix(), 1.0, False),
        (SmoothMix(copies=3, weight=2.0, step_size=0.2, one_step=True, warmup=0.5, smoothing=0.1), 0.3, False),
        (SmoothMix(steps=2, step_size=0.2, one_step=True, warmup=0.0), 0.0, False),
        (CatRs(), 1.0, True),
        (CatRs(copies=3, weight=3.0, steps=2, epsilon=0.5, smoothing=0.1), 1.0, False),
        (SmoothAdv(copies=2, steps=3), 1.0, False),
        (SmoothAdv(copies=2, steps=4, epsilon=0.7, warmup=0.5, smoothing=0.1), 0.3, False),
    ],
    ids=repr,
)
def test_loss_and_its_gradient_are_those_of_the_slow_reference(loss: Loss, done: float, soft: bool) -> None:
    batch, weights = make_batch(loss.copies, done=done, soft=soft), make_weights(0)
    inner, outer = (torch.tensor(w, requires_grad=True) for w in weights)
    found = loss(Predict(lambda x: torch.tanh(x.flatten(1) @ inner) @ outer), batch)
    fixed_of, value_of = REFERENCES[type(loss)]
    samples = [Sample(batch, i) for i in range(B)]
    fixed = [fixed_of(loss, weights, sample) for sample in samples]

    def values(w: list[Floats]) -> Floats:
        return np.array([value_of(loss, w, sample, held) for sample, held in zip(samples, fixed, strict=True)])

    assert {term.shape for term in found.values()} == {(B,)}
    np.testing.assert_allclose(found["loss"].detach().numpy(), values(weights), rtol=1e-6)
    gradients = torch.autograd.grad(found["loss"].mean(), (inner, outer))
    for layer, gradient in enumerate(gradients):

        def mean(w: Floats, layer: int = layer) -> float:
            return float(values([w if k == layer else own for k, own in enumerate(weights)]).mean())

        np.testing.assert_allclose(gradient.numpy(), slope(mean, weights[layer]), rtol=2e-5, atol=1e-7)


# Closed forms


def of_table(table: list[list[list[float]]]) -> Predict:
    """Answers ``(m, B, K)`` probabilities whatever it sees."""
    logits = torch.tensor(table, dtype=torch.float64).log().flatten(0, 1)
    return Predict(lambda x: logits + 0 * x.sum())


def table_batch(copies: int, labels: list[int], sigma: list[float], uniform: list[float] | None = None) -> NoisyBatch:
    size = len(labels)
    return NoisyBatch(
        torch.full((size, 1, 1, 2), 0.5),
        torch.ones(copies, size, 1, 1, 2) * torch.tensor([1.0, -1.0]),
        torch.tensor(sigma),
        torch.tensor(labels),
        torch.tensor(uniform or [0.5] * size)[:, None],
        1.0,
    )


def test_macer_of_a_constant_classifier_is_its_certified_radius() -> None:
    p = [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1 - 2e-9, 1e-9, 1e-9], [0.5, 0.3, 0.2]]
    found = Macer(copies=2, beta=1.0)(of_table([p, p]), table_batch(2, [0, 1, 0, 0], [0.25, 0.25, 0.5, 0.75]))
    margin = stats.norm.ppf([0.7, 0.7, 1 - 2e-9, 0.5]) - stats.norm.ppf([0.2, 0.2, 1e-9, 0.3])
    radius = np.array([0.125, 0.125, 0.25, 0.375]) * margin
    np.testing.assert_allclose(found["radius"], radius * [1, 0, 1, 1], rtol=1e-7)  # the second is wrong
    # The third is beyond gamma; nearest to .75 is 1.
    extra = np.array([12, 0, 0, 12]) * (np.array([0.125, 0.125, 0.25, 0.375]) * 8 - radius)
    np.testing.assert_allclose(found["loss"], -np.log([0.7, 0.2, 1 - 2e-9, 0.5]) + extra, rtol=1e-6)


@pytest.mark.parametrize(("sigma", "weight"), [(0.12, 20), (0.35, 20), (0.36, 10), (1.5, 10)])
def test_consistency_of_two_opposite_answers_is_known(sigma: float, weight: float) -> None:
    a = 0.9
    found = Consistency()(of_table([[[a, 1 - a]], [[1 - a, a]]]), table_batch(2, [0], [sigma]))
    apart = -np.log(2) - 0.5 * np.log(a * (1 - a))
    assert found["divergence"].item() == pytest.approx(apart)
    assert found["entropy"].item() == pytest.approx(np.log(2))
    expected = -0.5 * np.log(a * (1 - a)) + weight * apart + 0.5 * np.log(2)
    assert found["loss"].item() == pytest.approx(expected)


def test_binomial_draw_follows_the_binomial_distribution() -> None:
    size = 10_000
    uniform = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    for num, share in [(4, 0.0), (4, 0.25), (4, 0.75), (4, 1.0), (7, 3 / 7), (1, 0.5)]:
        drawn = binomial_draw(uniform, num, torch.full((size,), share))
        expected = stats.binom.pmf(np.arange(num + 1), num, share)
        np.testing.assert_allclose(np.bincount(drawn, minlength=num + 1) / size, expected, atol=1 / size)
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert binomial_draw(ends, 4, torch.ones(2)).tolist() == [4, 4]
    assert binomial_draw(ends, 4, torch.zeros(2)).tolist() == [0, 0]


def test_cat_rs_takes_as_many_of_the_easiest_copies_as_are_drawn() -> None:
    """Three of four copies are right, so K <= k for uniform numbers below the distribution function at k."""
    right = [[0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.3, 0.4, 0.3], [0.6, 0.2, 0.2]]
    ends = stats.binom.cdf(np.arange(5), 4, 0.75)
    uniform = [float(ends[k]) - 1e-4 for k in range(5)]
    found = CatRs(steps=1)(of_table([[p] * 5 for p in right]), table_batch(4, [0] * 5, [0.5] * 5, uniform))
    ascending = -np.log([0.9, 0.6, 0.4, 0.3])
    expected = [ascending[: max(1, k)].sum() / 4 for k in range(5)]
    np.testing.assert_allclose(found["cross_entropy"], expected, rtol=1e-6)
    f = np.mean(right, axis=0)
    worst = max(kl(f, np.array(p)) for p in right)
    np.testing.assert_allclose(found["divergence"], [0, 0, 0, 0, worst], rtol=1e-6)


NORMAL = torch.tensor([[3.0, 4.0]])
UNIT = torch.tensor([0.6, 0.8])


def test_smoothmix_takes_shorter_steps_where_the_network_is_sure() -> None:
    """As its authors: the gradient is divided by its length + 1e-8."""
    normal = 3.2 * NORMAL.double()
    predict = Predict(lambda x: torch.cat([x.flatten(1) @ normal.T, -x.flatten(1) @ normal.T], dim=1))
    batch = table_batch(2, [0], [0.5], [1 - 1e-12])
    still = torch.zeros(2, 1, 1, 1, 2, dtype=torch.float64)
    SmoothMix(steps=1, step_size=0.2)(predict, replace(batch, images=batch.images.double(), noise=still))
    length = 2 * 16 / (1 + np.exp(2 * 3.2 * 3.5))
    mixed = 0.5 - 0.1 * length / (length + 1e-8) * UNIT.double()
    torch.testing.assert_close(predict.asked[-1][1].view(2, 2), mixed.expand(2, 2), rtol=1e-4, atol=0)


# All of them

ALL: list[Loss] = [Gaussian(), Consistency(), Macer(copies=4), SmoothMix(one_step=True), CatRs(), SmoothAdv()]


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.name)
def test_loss_draws_nothing_of_its_own_and_attacks_leave_batchnorm_alone(loss: Loss) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, K))

    def predict(images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        network.train(not frozen)
        logits: Tensor = network(images.float())
        return logits

    batch, state = make_batch(loss.copies), torch.get_rng_state()
    first, second = (loss(predict, batch)["loss"] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    seen = {"smoothmix": 2, "cat_rs": 2}.get(loss.name, 1)
    assert network[1].num_batches_tracked == 2 * seen
    if seen == 1 and loss.name != "smoothadv":  # an attack sees the statistics of the steps before
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.name)
def test_loss_of_extreme_logits_and_of_half_precision_is_finite_and_at_least_float32(
    loss: Loss, dtype: torch.dtype
) -> None:
    """Probabilities that underflow, an attack without a gradient, a label that is certain: no NaN anywhere."""
    batch = make_batch(loss.copies)
    batch = replace(batch, images=batch.images.float(), noise=batch.noise.float(), sigma=batch.sigma.float())
    scale = torch.tensor([0.0, 1.0, 100.0, 1e4], requires_grad=True)

    def predict(images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        return (images.flatten(1)[:, :K].sign() * scale).to(dtype)

    found = loss(predict, batch)
    (gradient,) = torch.autograd.grad(found["loss"].sum(), scale)
    assert {term.dtype for term in found.values()} <= {torch.float32, torch.float64}
    assert all(term.isfinite().all() for term in found.values())
    assert gradient.isfinite().all()


def test_make_loss_has_the_published_numbers_and_takes_others() -> None:
    made = {loss.name: make_loss(LossConfig.model_validate(loss.name)) for loss in ALL}
    expected: dict[str, Loss] = {
        "gaussian": Gaussian(copies=1, smoothing=0.0),
        "consistency": Consistency(copies=2, weight=None, eta=0.5, smoothing=0.0),
        "macer": Macer(copies=16, weight=None, beta=16.0, gamma=8.0, deferred=0.0, smoothing=0.0),
        "smoothmix": SmoothMix(2, weight=5.0, steps=4, step_size=None, one_step=False, warmup=1 / 15, smoothing=0.0),
        "cat_rs": CatRs(copies=4, weight=None, steps=4, epsilon=1.0, smoothing=0.0),
        "smoothadv": SmoothAdv(copies=4, steps=10, epsilon=None, warmup=1 / 15, smoothing=0.0),
    }
    assert made == expected
    assert [loss.num_uniform for loss in made.values()] == [0, 0, 0, 1, 1, 0]
    assert expected == {
        each.name: each for each in (Gaussian(), Consistency(), Macer(), SmoothMix(), CatRs(), SmoothAdv())
    }
    own = LossConfig(name="smoothmix", weight=0.0, steps=2, step_size=0.3, one_step=True)
    expected["own"] = SmoothMix(weight=0.0, steps=2, step_size=0.3, one_step=True, smoothing=0.1)
    assert make_loss(own, label_smoothing=0.1) == expected["own"]
