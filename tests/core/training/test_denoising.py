"""The denoiser's training against a plain NumPy account of it, and against what is known of Gaussian data."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor, nn

from core.config import DenoiserConfig, DenoiserTrainConfig, load_config
from core.data import Dataset
from core.errors import ConfigError
from core.models.checkpoints import load_denoiser, save_model
from core.models.denoiser import OneShotDenoiser, alphas_cumprod, trained_unet_config
from core.models.diffusers_folder import write_folder
from core.models.openai_unet import convert_openai_unet
from core.training.denoising import DenoisingObjective, new_denoiser
from core.training.loop import Training
from tests.helpers.openai_reference import CIFAR, UNetModel

CONFIG = Path(__file__).parents[3] / "configs" / "cifar10_denoiser.yaml"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"objective": "plain"},
    "timesteps": {"objective": "plain", "timesteps": True},
    "distilled": {"objective": "distilled"},
}


class Affine(nn.Module):
    """Predicts weight * input + bias + slope * t, in the place of a U-Net."""

    def __init__(self, weight: float = 0.0, bias: float = 0.0, slope: float = 0.0) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.tensor([weight, bias, slope], dtype=torch.float64))

    def forward(self, scaled: Tensor, t: Tensor) -> SimpleNamespace:
        weight, bias, slope = self.parts
        return SimpleNamespace(sample=weight * scaled + bias + slope * t.view(-1, 1, 1, 1))


def data(images: NDArray[np.uint8]) -> Dataset:
    num = len(images)
    return Dataset("some", tuple(f"s/{i}" for i in range(num)), images, np.zeros(num, np.int64), 2)


def grey(num: int) -> Dataset:
    return data(np.random.default_rng(0).integers(0, 256, (num, 1, 4, 4), np.uint8))


def objective(of: Dataset, low: float, high: float, **keys: Any) -> DenoisingObjective:
    config = DenoiserTrainConfig(**{"batch_size": 32, **keys})
    return DenoisingObjective(
        of, config.model_copy(update={"sigma": (low, high)}), (low, high), 3, "train_base-denoiser"
    )


def numpy_losses(
    parts: NDArray[np.float64], batch: tuple[Tensor, ...], kind: str, low: float, high: float, steps: int
) -> NDArray[np.float64]:
    """Pixel by pixel, from the papers: linear betas, x_t, and one call of the noise predictor."""
    images, noise, uniform = (tensor.double().numpy() for tensor in batch)
    bars, bar = [], 1.0
    for t in range(steps):
        bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / (steps - 1)) * 1000 / steps
        bars.append(bar)
    losses = []
    for image, z, u in zip(images, noise, uniform, strict=True):
        sigma = low ** (1 - u) * high**u if kind == "plain" else (low, high)[int(u >= 0.5)]
        t = math.floor(u * steps)
        if kind != "timesteps":
            t = next(t for t in range(1, steps) if math.sqrt((1 - bars[t]) / bars[t]) >= 2 * sigma)
        errors = []
        for x, e in zip(image.flat, z.flat, strict=True):
            if kind == "distilled":
                x_t = math.sqrt(bars[t]) * (2 * (x + sigma * e) - 1)
            else:
                x_t = math.sqrt(bars[t]) * (2 * x - 1) + math.sqrt(1 - bars[t]) * e
            predicted = parts[0] * x_t + parts[1] + parts[2] * t * 1000 / steps
            x_0 = (x_t - math.sqrt(1 - bars[t]) * predicted) / math.sqrt(bars[t])
            errors.append(min(max((x_0 + 1) / 2, 0), 1) - x if kind == "distilled" else predicted - e)
        losses.append(sum(error**2 for error in errors) / len(errors))
    return np.array(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradient_are_those_of_a_plain_account(kind: str) -> None:
    chosen, steps, parts = np.array([3, 0, 7, 5]), 200, np.array([0.4, -0.1, 0.003])
    lesson = objective(grey(8), 0.1, 0.6, **KINDS[kind])
    model = OneShotDenoiser(Affine(*parts), "linear", steps)
    batch = lesson.batch(2, chosen)
    losses = lesson.losses(model, batch)["loss"]
    assert losses.detach().numpy() == pytest.approx(numpy_losses(parts, batch, kind, 0.1, 0.6, steps), rel=1e-5)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("unet.parts").grad
    assert gradient is not None
    for place in range(3):
        step = np.eye(3)[place] * 1e-6
        up, down = (numpy_losses(parts + side * step, batch, kind, 0.1, 0.6, steps).sum() for side in (1, -1))
        assert gradient[place].item() == pytest.approx((up - down) / 2e-6, rel=1e-4)
    if kind == "distilled":  # the case has pixels that are clamped, and pixels that are not
        images, noise, uniform = batch
        sigma = torch.where(uniform < 0.5, 0.1, 0.6).float()
        shown = model(images + sigma.view(-1, 1, 1, 1) * noise, sigma)
        assert 0.05 < ((shown == 0) | (shown == 1)).double().mean() < 0.5


def test_batch_is_a_function_of_epoch_and_example_and_its_levels_are_uniform() -> None:
    lesson = objective(grey(2000), 0.1, 0.6)
    whole = lesson.batch(1, np.arange(2000))
    for one, all_of_them in zip(lesson.batch(1, np.array([7, 3])), whole, strict=True):
        assert torch.equal(one, all_of_them[[7, 3]])
    images, noise, uniform = whole
    other = lesson.batch(2, np.arange(2000))
    assert torch.equal(other[0], images)
    assert not (other[1] == noise).any()
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    for epoch in (uniform, other[2]):
        assert stats.kstest(epoch, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(uniform, other[2])[0, 1]) < 0.1
    assert abs(np.corrcoef(uniform, noise[:, 0, 0, 0])[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_affine_denoiser_of_gaussian_data_reaches_the_optimum(kind: str) -> None:
    """x ~ N(mu, s^2): E[x | y] = mu + s^2 / (s^2 + sigma^2) (y - mu), with variance s^2 sigma^2 / (s^2 + sigma^2)."""
    random = np.random.default_rng(1)
    some = data(np.rint(random.normal(130, 20, (64, 1, 32, 32))).clip(0, 255).astype(np.uint8))
    mu, s = some.images.mean() / 255, some.images.std() / 255
    model = OneShotDenoiser(Affine())
    sigma = math.sqrt(1 / alphas_cumprod("linear", 1000)[90] - 1) / 2 * (1 - 1e-9)  # a level that the schedule has
    assert model.timestep(sigma) == 90
    keys = {"lr": 0.1, "weight_decay": 0.0, "ema": None, "steps": 200, "batch_size": 32, **KINDS[kind]}
    training = Training(model, objective(some, sigma, sigma, **keys))
    for _ in training.run():
        pass
    shrunk = s**2 / (s**2 + sigma**2)
    noisy = torch.linspace(float(mu) - 0.3, float(mu) + 0.3, 7).view(7, 1, 1, 1)
    got = model(noisy, torch.full((7,), sigma)).detach().double().numpy().ravel()
    assert got == pytest.approx(mu + shrunk * (noisy.numpy().ravel() - mu), abs=5e-3)
    least = shrunk if kind == "plain" else shrunk * sigma**2
    assert training.history[-1]["loss"] == pytest.approx(least, rel=0.02)  # of 65,536 pixels: 0.6%
    assert training.history[0]["loss"] > 1.3 * least


def test_alphas_cumprod_are_the_published_closed_forms() -> None:
    t = np.arange(1000)
    c, d = 1 - 1e-4, (0.02 - 1e-4) / 999  # the product over i <= t of (c - d i)
    log = (t + 1) * math.log(d) + special.gammaln(c / d + 1) - special.gammaln(c / d - t)
    assert np.log(alphas_cumprod("linear", 1000)) == pytest.approx(log, abs=1e-6)
    t = np.arange(4000)
    f = np.cos((np.append(t, 4000) / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2
    beta_below_cap = t < 3990
    cosine = alphas_cumprod("cosine", 4000)
    assert cosine[beta_below_cap] == pytest.approx((f[1:] / f[0])[beta_below_cap], rel=1e-9)


def test_config_of_cifar_is_the_published_network_but_for_the_learned_variance() -> None:
    config = load_config(CONFIG).base.denoiser
    assert config is not None
    assert config.train is not None
    assert config.schedule == "cosine-4000"
    with torch.device("meta"):
        published = convert_openai_unet(UNetModel(CIFAR).state_dict(), head_dim=64, schedule="cosine-4000").config
    own = trained_unet_config(3, 32, config.train, config.head_dim)
    assert own.pop("dropout") == 0.3
    assert own.pop("add_attention")
    assert own.pop("out_channels") * 2 == published["out_channels"]
    assert own.items() <= published.items()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": {"attention": (16,)}}, "blocks see images of 8, 4 pixels a side, got 16"),
        ({"train": {"attention": (4,)}, "head_dim": 5}, "head_dim: 5 does not divide 16"),
    ],
)
def test_new_denoiser_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_denoiser(DenoiserConfig.model_validate(config), (1, 8, 8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"timesteps": True, "objective": "distilled"}, "timesteps: says nothing about objective distilled"),
        ({"timesteps": True, "sigma": 0.5}, "sigma: .* that of all timesteps"),
        ({"objective": "distilled", "sigma": (0.1, 0.5)}, "sigma: .* that of the levels of the run"),
    ],
)
def test_levels_from_two_places_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserTrainConfig(**keys)


def test_trained_denoiser_comes_back_from_its_file_and_from_a_diffusers_folder(tmp_path: Path) -> None:
    train = {"attention": (2,), "scale_shift": True, "layers": 2, "steps": 3}
    config = DenoiserConfig.model_validate({"schedule": "cosine-400", "head_dim": 4, "train": train})
    torch.manual_seed(0)
    model = new_denoiser(config, (1, 4, 4))
    before = [value.clone() for value in model.parameters()]
    assert config.train is not None
    for _ in Training(model, objective(grey(40), 0.1, 0.6, **config.train.model_dump(exclude={"sigma"}))).run():
        pass
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    save_model(model, tmp_path / "own.safetensors")
    write_folder(model, tmp_path / "folder")
    noisy, sigma = torch.rand(3, 1, 4, 4), torch.tensor([0.1, 0.3, 0.6])
    with torch.inference_mode():
        for path in (tmp_path / "own.safetensors", tmp_path / "folder"):
            again = load_denoiser(path)
            assert torch.equal(again(noisy, sigma), model(noisy, sigma))
    assert load_denoiser(tmp_path / "folder").num_steps == 400


@pytest.mark.slow
def test_config_of_cifar_makes_a_step_at_full_size() -> None:
    config = load_config(CONFIG).denoiser
    assert config is not None
    assert config.train is not None
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    model = new_denoiser(config, (3, 32, 32))
    before = [value.clone() for value in model.parameters()]
    lesson = DenoisingObjective(data(images), config.train.model_copy(update={"steps": 1}), (0.5,), 0, "denoiser")
    training = Training(model, lesson)
    for _ in training.run():
        pass
    assert 0.5 < training.history[0]["loss"] < 2  # noise of variance 1 against an untrained network
    changed = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert all(changed)
