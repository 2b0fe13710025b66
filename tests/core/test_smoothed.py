"""Certificates of the public classes against closed forms (half-space, ball, router with two experts)."""

import numpy as np
import PIL.Image
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from core import ABSTAIN, DualSmoothedClassifier, SmoothedClassifier
from core.errors import ConfigError, DataError
from core.machine.network import Module
from tests.helpers.oracles import Ball, HalfSpace, Negated, axis

ALPHA = 0.1  # inflated, so that a rate above it shows


def allowed_failures(num: int) -> int:
    """Failures out of `num` that a valid method exceeds with probability 1e-6."""
    return int(stats.binom.ppf(1 - 1e-6, num, ALPHA))


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_certify_half_space_matches_the_exact_radius(sigma: float) -> None:
    plane = HalfSpace(axis(16, 3), 0.5)
    images = torch.full((400, 1, 4, 4), 0.5)
    images[:, 0, 0, 3] = torch.linspace(0.0, 1.0, 400)
    results = SmoothedClassifier(plane, num_classes=2, sigma=sigma, seed=1).certify_many(
        images, num_selection=100, num_estimation=1000, alpha=ALPHA
    )
    too_large, n = 0, 1000
    for image, result in zip(images, results, strict=True):
        margin = plane.margin(image)
        exact = abs(margin)
        if result.prediction == ABSTAIN:
            assert exact < 0.5 * sigma  # beyond it, 100 selection draws err once in 25,000
            continue
        too_large += result.radius > exact or result.prediction != int(margin >= 0)
        # No smaller than an unlucky (one in a million) number of successes explains.
        p = min(special.ndtr(exact / sigma), 1.0)
        unlucky = int(stats.binom.ppf(1e-6, n, p))
        floor = sigma * stats.norm.ppf(stats.beta.ppf(ALPHA, unlucky, n - unlucky + 1)) if unlucky > 600 else 0.0
        assert result.radius >= floor - 1e-9
    assert too_large <= allowed_failures(len(images))


def test_certify_ball_is_sound_with_cohens_slack() -> None:
    # STATISTICS: d = 100, sigma = .5, rho = 6, distance 1: exact 2.348, Cohen's bound 1.240.
    ball = Ball(torch.full((100,), 0.5), 6.0)
    image = torch.full((1, 10, 10), 0.5)
    image[0, :4, 0] += 0.5  # distance 1 from the centre
    assert ball.exact_radius(1.0, 0.5) == pytest.approx(2.348, abs=1e-3)
    cohen = 0.5 * special.ndtri(ball.probability(1.0, 0.5))
    assert cohen == pytest.approx(1.240, abs=1e-3)
    results = SmoothedClassifier(ball, 2, 0.5).certify_many(
        image.expand(200, 1, 10, 10), num_estimation=2000, alpha=ALPHA
    )
    assert all(result.prediction == 1 and result.radius < 2.348 for result in results)
    assert sum(result.radius > cohen for result in results) <= allowed_failures(200)
    p = ball.probability(1.0, 0.5)
    typical = 0.5 * stats.norm.ppf(stats.beta.ppf(ALPHA, round(2000 * p), 2001 - round(2000 * p)))
    assert np.median([result.radius for result in results]) == pytest.approx(typical, rel=0.02)


def dual_oracle(seed: int) -> DualSmoothedClassifier:
    """Router a.x >= .5; expert of the second sigma the half-space b, expert of the first its complement."""
    router, plane = HalfSpace(axis(16, 0), 0.5), HalfSpace(axis(16, 1), 0.5)
    experts: dict[float, Module] = {0.25: Negated(plane), 0.5: plane}
    return DualSmoothedClassifier(router, experts, sigmas=(0.25, 0.5), sigma_e=0.5, num_classes=2, seed=seed)


def test_dual_certify_router_and_experts_never_exceed_the_exact_radius_beyond_alpha() -> None:
    generator = np.random.default_rng(0)
    images = torch.full((600, 1, 4, 4), 0.5)
    offsets = generator.uniform(-0.45, 0.45, (600, 2))
    images[:, 0, 0, :2] += torch.from_numpy(offsets).float()
    results = dual_oracle(2).certify_many(images, num_selection=50, num_estimation=500, alpha=ALPHA)
    too_large = certified = 0
    for image, result in zip(images, results, strict=True):
        a, b = float(image[0, 0, 0]) - 0.5, float(image[0, 0, 1]) - 0.5
        if result.prediction == ABSTAIN:
            continue
        certified += 1
        right_sigma = result.sigma == (0.5 if a >= 0 else 0.25)
        right_class = result.prediction == int((b >= 0) == (a >= 0))
        too_large += not (right_sigma and right_class) or result.radius > min(abs(a), abs(b))
        assert result.radius == min(result.radius_sigma, result.radius_class)
        assert result.bounded_by == ("sigma" if result.radius_sigma < result.radius_class else "class")
    assert certified > 300
    assert too_large <= allowed_failures(len(images))


def test_certify_many_equals_certify_one_by_one_in_any_order() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images = torch.rand(5, 1, 4, 4)
    g = SmoothedClassifier(net, 3, 0.5, seed=4)
    options = {"num_selection": 100, "num_estimation": 300, "batch_size": 128}
    many = g.certify_many(images, **options)  # type: ignore[arg-type]
    assert many == [g.certify(image, **options) for image in images]  # type: ignore[arg-type]
    assert many == g.certify_many(images.flip(0), **options)[::-1]  # type: ignore[arg-type]
    other = SmoothedClassifier(net, 3, 0.5, seed=5).certify_many(images, **options)  # type: ignore[arg-type]
    assert many != other


def test_certify_many_repeated_image_gets_fresh_noise() -> None:
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    image = torch.full((1, 4, 4), 0.6)
    votes = [c.counts_estimation.tolist() for c in g.certify_many([image] * 5, num_estimation=1000)]
    assert len({tuple(v) for v in votes}) > 1
    same = g.certify_many([image] * 2, num_estimation=1000, example_ids=["a", "a"])
    assert same[0] == same[1]


def test_predict_returns_the_smoothed_class_or_abstains() -> None:
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    image = torch.full((1, 4, 4), 0.9)
    assert g.predict(image, num=1000, alpha=0.001) == 1
    assert g.predict(1 - image) == 0
    assert g.predict(torch.full((1, 4, 4), 0.5), num=100) == ABSTAIN


def test_dual_predict_routes_to_the_expert() -> None:
    image = torch.full((1, 4, 4), 0.9)
    assert dual_oracle(0).predict(image) == 1
    image[0, 0, 0] = 0.1  # the router now picks the expert of the complement
    assert dual_oracle(0).predict(image) == 0


def test_certify_takes_uint8_and_numpy() -> None:
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    grey = np.full((1, 4, 4), 204, np.uint8)
    assert g.certify(grey, num_estimation=100) == g.certify(torch.full((1, 4, 4), 204 / 255), num_estimation=100)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(4, 4), r"got shape \(4, 4\); a grey image needs its channel \(image\[None\], images"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), "expected uint8 or floating"),
        (torch.full((1, 4, 4), 2.0), r"expected \[0, 1\]"),
        (torch.full((1, 4, 4), torch.nan), "non-finite"),
    ],
)
def test_certify_bad_image_names_the_example(image: torch.Tensor, message: str) -> None:
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    with pytest.raises(DataError, match=f"'image 1'.*{message}"):
        g.certify_many([torch.zeros(1, 4, 4), image], num_estimation=10)


def test_certify_many_images_of_two_shapes_name_the_one_by_its_place_or_its_id() -> None:
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    images = [torch.zeros(1, 4, 4), torch.zeros(1, 2, 8)]
    with pytest.raises(DataError, match=r"example 'image 1' has shape \(1, 2, 8\), 'image 0' has \(1, 4, 4\)"):
        g.certify_many(images, num_estimation=10)
    with pytest.raises(DataError, match="example 'cat' has shape"):
        g.certify_many(images, num_estimation=10, example_ids=["dog", "cat"])


def test_certify_takes_pil_images_and_images_that_want_a_gradient() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    g = SmoothedClassifier(HalfSpace(axis(48, 0), 0.5), 2, 0.5)
    expected = g.certify(pixels.transpose(2, 0, 1), num_estimation=100)
    assert g.certify(PIL.Image.fromarray(pixels), num_estimation=100) == expected
    assert g.certify_many([PIL.Image.fromarray(pixels)], num_estimation=100) == [expected]
    with pytest.raises(DataError, match=r"got one PIL image, expected a sequence of images: pass \[image\]"):
        g.certify_many(PIL.Image.fromarray(pixels))  # type: ignore[arg-type]
    wants = (torch.from_numpy(pixels.transpose(2, 0, 1).copy()) / 255).requires_grad_()
    assert g.certify(wants, num_estimation=100) == expected


@pytest.mark.parametrize("shape", [(16,), (2, 8), (1, 4, 4), (2, 2, 2, 2)])
def test_certify_inputs_that_are_no_images_have_the_same_certificate_in_their_own_units(shape: tuple[int, ...]) -> None:
    """Seven units from the plane in every shape: the exact radius, and the votes do not depend on the shape."""
    plane, x = HalfSpace(axis(16, 3), 100.0), torch.full((16,), 107.0)
    g = SmoothedClassifier(plane, 2, 10.0, value_range=None)
    result = g.certify(x.view(shape), num_estimation=20_000, example_id="x")
    assert result == g.certify(x, num_estimation=20_000, example_id="x")
    assert result.prediction == 1
    assert 6.4 < result.radius < 7.0
    with pytest.raises(DataError, match=r"span \[107.0, 107.0\], expected \[-5, 5\]"):
        SmoothedClassifier(plane, 2, 10.0, value_range=(-5, 5)).certify(x.view(shape))
    with pytest.raises(ConfigError, match="8-bit images"):
        SmoothedClassifier(plane, 2, 10.0, value_range=None, noise="exact")
    with pytest.raises(DataError, match="got shape"):
        SmoothedClassifier(plane, 2, 10.0, value_range=None).certify(torch.tensor(1.0))


def test_certify_many_takes_loaders_data_sets_and_iterators(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5)
    expected = g.certify_many(images, num_estimation=100)
    data = TensorDataset(images, labels)
    for given in (DataLoader(data, 2), DataLoader(images, 2), data, iter(images)):  # type: ignore[arg-type]
        assert g.certify_many(given, num_estimation=100) == expected
    with pytest.raises(DataError, match="a batch of the DataLoader is a dict"):
        g.certify_many(DataLoader([{"image": images[0]}]))  # type: ignore[arg-type]
    g.certify_many(images, num_estimation=100, progress=True)
    assert "certify: 5/5 inputs (100%)" in capsys.readouterr().err


def test_constructors_bad_noise_levels_raise() -> None:
    plane = HalfSpace(axis(16, 0), 0.5)
    for wrong in (0.0, "0.25"):
        with pytest.raises(ConfigError, match="positive"):
            SmoothedClassifier(plane, 2, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"at least max.*claim='agreement'"):
        DualSmoothedClassifier(plane, plane, (0.25, 0.5), 0.25, 2).certify(torch.zeros(1, 4, 4))
    with pytest.raises(ConfigError, match="no expert"):
        DualSmoothedClassifier(plane, {0.25: plane}, (0.25, 0.5), 0.5, 2)
    with pytest.raises(ConfigError, match="distinct"):
        DualSmoothedClassifier(plane, plane, (0.5, 0.5), 0.5, 2)
    with pytest.raises(ConfigError, match="2 images but 1"):
        SmoothedClassifier(plane, 2, 0.5).certify_many(torch.zeros(2, 1, 4, 4), example_ids=["a"])


def test_certify_runs_the_denoiser_first_and_tells_it_the_sigma() -> None:
    seen: set[float] = set()

    def denoiser(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.update(sigma.tolist())
        return torch.ones_like(noisy)

    g = SmoothedClassifier(HalfSpace(axis(16, 0), 0.5), 2, 0.5, denoiser=denoiser)
    result = g.certify(torch.zeros(1, 4, 4), num_selection=100, num_estimation=100, batch_size=100)
    assert result.counts_estimation.tolist() == [0, 100]
    assert seen == {0.5}


def test_certify_budgets_claim_what_fixed_claims_with_fewer_draws() -> None:
    plane = HalfSpace(axis(16, 3), 0.5)
    images = torch.full((40, 1, 4, 4), 0.5)
    images[:, 0, 0, 3] = torch.linspace(0.0, 1.0, 40)
    g = SmoothedClassifier(plane, 2, 0.5, seed=3)
    radii = (0.0, 0.1, 0.2, 0.3, 0.4)
    fixed = g.certify_many(images, num_estimation=5000)
    sequential = g.certify_many(images, num_estimation=5000, budget="sequential")
    grid = g.certify_many(images, num_estimation=5000, budget="grid", radii=radii)
    assert [c.radius for c in sequential] == [c.radius for c in fixed]
    levels = [[sum(c.radius > r for r in radii) for c in run] for run in (fixed, grid)]
    assert sum(abs(a - b) for a, b in zip(*levels, strict=True)) <= 2
    assert sum(c.num_draws for c in grid) < 0.7 * sum(c.num_draws for c in fixed)
    with pytest.raises(ConfigError, match="needs ascending radii"):
        g.certify_many(images, budget="grid", radii=(0.2, 0.1))


def test_certify_exact_noise_is_sound_and_wants_eight_bit_images() -> None:
    plane = HalfSpace(axis(16, 3), 0.5)
    g = SmoothedClassifier(plane, 2, 0.5, noise="exact")
    image = torch.full((1, 4, 4), 204 / 255)
    exact = g.certify(image, num_estimation=2000)
    assert exact.prediction == 1
    assert 0.2 < exact.radius <= plane.margin(image) + 0.5 / 255
    assert exact != SmoothedClassifier(plane, 2, 0.5).certify(image, num_estimation=2000)
    with pytest.raises(DataError, match="example 'image 1': this noise needs pixels that are multiples of 1/255"):
        g.certify_many([image, torch.full((1, 4, 4), 0.7123)], num_estimation=2000)
    with pytest.raises(ConfigError, match=r"noise: is .loud., expected one of"):
        SmoothedClassifier(plane, 2, 0.5, noise="loud")


def test_dual_certify_light_estimator_reads_the_noisy_image() -> None:
    def denoiser(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(noisy)

    plane = HalfSpace(axis(16, 0), 0.5)
    image = torch.full((1, 4, 4), 0.9)
    options = {"sigmas": (0.25, 0.5), "sigma_e": 0.5, "num_classes": 2, "denoiser": denoiser}
    behind = DualSmoothedClassifier(plane, plane, **options).certify(image, num_estimation=1000)  # type: ignore[arg-type]
    light = DualSmoothedClassifier(plane, plane, denoise_estimator=False, **options).certify(image, num_estimation=1000)  # type: ignore[arg-type]
    assert (behind.sigma, light.sigma) == (0.25, 0.5)  # behind the denoiser everything is black
    assert behind.prediction == light.prediction == 0
    assert light.num_shared == 1100
    assert light.num_draws == 1100


def test_dual_predict_claim_agreement_answers_where_the_level_is_in_doubt() -> None:
    """The image lies on the router's boundary, so that no level is certain; both levels' experts see one class."""
    router, plane = HalfSpace(axis(16, 0), 0.5), HalfSpace(axis(16, 3), -2.0)
    image = torch.full((1, 4, 4), 0.5)
    dual = DualSmoothedClassifier(router, plane, (0.25, 0.5), 0.5, 2)
    assert dual.predict(image, num=400, alpha=0.05) == ABSTAIN
    assert dual.predict(image, num=400, alpha=0.05, claim="agreement") == 1
    apart = DualSmoothedClassifier(router, {0.25: plane, 0.5: Negated(plane)}, (0.25, 0.5), 0.5, 2)
    assert apart.predict(image, num=400, alpha=0.05, claim="agreement") == ABSTAIN
    with pytest.raises(ConfigError, match="claim must be one of"):
        dual.predict(image, claim="published")  # type: ignore[arg-type]
