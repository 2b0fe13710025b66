import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from core.config import EstimatorConfig, FinetuneConfig
from core.data import Dataset
from core.errors import DataError
from core.models.small import SmallConvNet
from core.progress import Progress
from core.records import ESTIMATOR
from core.training.estimator import EstimatorObjective, class_weights, estimator_losses, label_radii
from core.training.finetune import FinetuneObjective, choose_sigma
from core.training.loop import Record, Training
from tests.helpers.oracles import drive


def numpy_loss(logits: np.ndarray, radii: np.ndarray, weight: np.ndarray, config: EstimatorConfig) -> float:
    """The loss of the variance estimator by plain loops in float64, textbook form."""
    m, size, width = logits.shape
    total = 0.0
    for b in range(size):
        p = [np.exp(logits[i, b]) / np.exp(logits[i, b]).sum() for i in range(m)]
        if config.loss == "hard":
            target = np.eye(width)[int(np.argmax(radii[b]))]
        else:
            target = np.exp(radii[b]) / np.exp(radii[b]).sum()
        value = sum(-(target * np.log(p[i])).sum() for i in range(m)) / m
        if config.loss == "consistency":
            mean = sum(p) / m
            kl = sum((mean * np.log(mean / p[i])).sum() for i in range(m)) / m
            entropy = -(mean * np.log(mean)).sum()
            predicted = [int(np.argmax(p[i])) for i in range(m)]
            w_r = {
                "strong": radii[b, max(predicted)],
                "weak": radii[b, min(predicted)],
                "max_radius": radii[b].max(),
                "min_radius": radii[b].min(),
                "none": 1.0,
            }[config.consistency_weight]
            value += w_r * (config.consistency_lambda * kl + config.consistency_eta * entropy)
        total += weight[b] * value
    return float(total / size)


VARIANTS = [EstimatorConfig(loss="hard"), EstimatorConfig(loss="soft")] + [
    EstimatorConfig(consistency_weight=weight, consistency_lambda=lam)
    for weight in ("strong", "weak", "max_radius", "min_radius", "none")
    for lam in (40.0, 3.0)
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.loss}-{c.consistency_weight}-{c.consistency_lambda:g}")
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_estimator_loss_value_and_gradient_equal_numpy_and_finite_differences(
    config: EstimatorConfig, copies: int
) -> None:
    rng = np.random.default_rng(copies)
    logits, radii = rng.normal(size=(copies, 4, 3)), rng.uniform(0, 1, (4, 3))
    weight = rng.uniform(0.5, 3, 4)
    tensor = torch.from_numpy(logits).requires_grad_()
    terms = estimator_losses(tensor, torch.from_numpy(radii), torch.from_numpy(weight), config)
    loss = terms["loss"].mean()
    assert loss.item() == pytest.approx(numpy_loss(logits, radii, weight, config), rel=1e-10)
    plain = config.model_copy(update={"loss": "hard" if config.loss == "hard" else "soft"})
    assert terms["cross_entropy"].mean().item() == pytest.approx(numpy_loss(logits, radii, weight, plain), rel=1e-10)
    loss.backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-6
        slope = (
            numpy_loss(logits + step, radii, weight, config) - numpy_loss(logits - step, radii, weight, config)
        ) / 2e-6
        assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.loss}-{c.consistency_weight}-{c.consistency_lambda:g}")
def test_estimator_losses_probability_that_underflows_gives_finite_gradients(config: EstimatorConfig) -> None:
    for far in ([300.0, 0.0, -300.0], [0.0, -300.0, 300.0]):  # the copies agree, or they do not
        logits = torch.tensor([[[300.0, 0.0, -300.0]], [far]], requires_grad=True)
        loss = estimator_losses(logits, torch.tensor([[0.5, 0.1, 0.2]]), torch.ones(1), config)["loss"].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_label_radii_wrong_class_counts_as_zero_and_at_10k_scales_the_share() -> None:
    sigmas = np.array([0.25, 0.5])
    radius, correct = np.array([[0.3, 0.6]]), np.array([[True, False]])
    votes, draws = np.array([[97, 60]]), np.array([[100, 100]])
    at_n = label_radii(radius, correct, votes, draws, sigmas, 0.001, "at_n")
    assert at_n.tolist() == [[0.3, 0.0]]
    at_10k = label_radii(radius, correct, votes, draws, sigmas, 0.001, "at_10k")
    assert at_10k[0, 0] == pytest.approx(0.25 * stats.norm.ppf(stats.beta.ppf(0.001, 9700, 301)), rel=1e-9)
    assert at_10k[0, 1] == 0.0


def test_class_weights_are_the_inverse_shares_of_the_best_sigma() -> None:
    radii = np.array([[0.1, 0.2], [0.3, 0.2], [0.5, 0.1], [0.4, 0.4]])  # best: 1, 0, 0, 0 (tie to the smaller)
    assert class_weights(radii).tolist() == [4.0, 4 / 3, 4 / 3, 4 / 3]
    assert class_weights(radii, rebalance=False).tolist() == [1.0] * 4


def toy(num: int = 64) -> tuple[Dataset, np.ndarray]:
    """Bright images whose best sigma is the second, dark ones whose best is the first."""
    bright = np.arange(num) % 2
    images = np.broadcast_to((25 + 205 * bright)[:, None, None, None], (num, 1, 8, 8)).astype(np.uint8)
    radii = np.where(bright[:, None] == 1, [[0.1, 1.0]], [[1.0, 0.1]])
    return Dataset("toy", tuple(f"toy/{i}" for i in range(num)), images, bright.astype(np.int64), 2), radii


def progress() -> Progress:
    return Progress(1, "test", "steps")


def fit(training: Training) -> list[Record]:
    for _ in training.run():
        pass
    return training.history


def test_estimator_learns_a_separable_rule_and_is_repeatable() -> None:
    data, radii = toy()
    config = EstimatorConfig(epochs=20, batch_size=16, lr=5e-3, consistency_lambda=1.0)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SmallConvNet(1, 8, 2)
        history = fit(Training(model, EstimatorObjective(data, radii, 0.3, None, config, 0)))
        states.append(model.state_dict())
        assert history[-1]["loss"] < history[0]["loss"]
        with torch.inference_mode():
            assert (
                model(data.readable_pixels(range(len(data)))[0]).argmax(1) == torch.from_numpy(radii.argmax(1))
            ).all()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_estimator_leaves_out_samples_without_a_radius() -> None:
    data, radii = toy(8)
    radii[1:] = 0.0
    seen = set()

    def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.add(len(noisy))
        return noisy

    config = EstimatorConfig(epochs=1)
    fit(Training(SmallConvNet(1, 8, 2), EstimatorObjective(data, radii, 0.3, denoiser, config, 0)))
    assert seen == {2}  # two copies of the one sample that is left
    with pytest.raises(DataError, match="radius 0 at every sigma"):
        EstimatorObjective(data, radii * 0, 0.3, None, config, 0)


def test_classifier_is_finetuned_on_each_sample_at_its_own_sigma() -> None:
    levels: list[Tensor] = []

    def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
        assert torch.allclose(noisy.flatten(1).std(dim=1), sigma, rtol=0.4)
        levels.append(sigma)
        return noisy

    torch.manual_seed(0)
    data, _ = toy(20)
    places, sigma = np.arange(2, 18), np.tile([0.1, 0.5], 8)
    config = FinetuneConfig(epochs=3, batch_size=4, lr=1e-3)
    history = fit(Training(SmallConvNet(1, 8, 2), FinetuneObjective(data, places, sigma, denoiser, config, 0)))
    assert len(history) == 3
    assert sorted(torch.cat(levels[:4]).tolist()) == pytest.approx(sorted(sigma.tolist()))


def test_choose_sigma_is_the_majority() -> None:
    assert drive(choose_sigma((0.1, 0.2, 0.3), 0.3, 10), lambda d: {ESTIMATOR: np.array([2, 3, 5])}) == 0.3
