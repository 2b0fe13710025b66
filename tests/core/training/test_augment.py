"""Augmentation: the pixels of torchvision's own transforms, parameters with their distribution, the same ones again."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from core.config import EstimatorConfig, FinetuneConfig, parse_config
from core.config.values import Augment
from core.data import Dataset
from core.errors import ConfigError
from core.machine.noise_key import training_key
from core.training.augment import Augmentation, augment, draw_augmentation
from core.training.estimator import EstimatorObjective, hold_out
from core.training.finetune import FinetuneObjective
from core.training.samples import Samples
from tests.helpers.tiny import PLAIN


def images(num: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (num, *shape), np.uint8)


def drawn(kind: Augment, num: int, size: tuple[int, int]) -> list[Augmentation]:
    return [draw_augmentation(kind, size, training_key(0, "t", "augment", 0, str(i))) for i in range(num)]


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip", "resized_crop"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20)])
def test_augment_gives_the_pixels_of_torchvisions_transforms(
    kind: Augment, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = shape[1:]
    crops = {"crop_flip": v2.RandomCrop(size, padding=4), "resized_crop": v2.RandomResizedCrop(size)}
    for image, how in zip(images(60, *shape), drawn(kind, 60, size), strict=True):
        expected = torch.from_numpy(image)
        if kind in crops:
            part: dict[str, Any] = {"top": how.top, "left": how.left, "height": how.height, "width": how.width}
            if kind == "crop_flip":  # torchvision counts from the edge of the padding
                part |= {"top": how.top + 4, "left": how.left + 4, "needs_crop": True, "needs_pad": True}
                part["padding"] = [4] * 4
            monkeypatch.setattr(crops[kind], "make_params", lambda inputs, part=part: part)
            expected = crops[kind](expected)
        expected = v2.RandomHorizontalFlip(float(how.mirrored))(expected)
        found = augment(image, how)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected.numpy())


def test_draw_augmentation_flips_half_and_shifts_uniformly() -> None:
    """chi-squared against the closed form; p-values of a fixed seed."""
    some = drawn("crop_flip", 8_100, (32, 32))
    counts = np.zeros((2, 9, 9))
    for how in some:
        assert (how.height, how.width) == (32, 32)
        counts[int(how.mirrored), how.top + 4, how.left + 4] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 0.01  # all 162 together: they are independent as well
    mirrored = sum(how.mirrored for how in drawn("flip", 4_000, (32, 32)))
    assert stats.binomtest(mirrored, 4_000).pvalue > 0.01
    assert set(drawn("flip", 50, (32, 32))) == {Augmentation(0, 0, 32, 32, flip) for flip in (False, True)}
    assert set(drawn("none", 50, (32, 32))) == {Augmentation(0, 0, 32, 32, False)}


def test_draw_augmentation_of_a_resized_crop_has_the_closed_distribution() -> None:
    """Of a square a part with share s and ratio r fits where s max(r, 1/r) <= 1, s uniform and log r uniform before."""
    side, some = 10_000, drawn("resized_crop", 3_000, (10_000, 10_000))
    share = np.array([how.height * how.width for how in some]) / side**2
    log_ratio = np.array([math.log(how.width / how.height) for how in some])
    low, most = 0.08, math.log(4 / 3)
    norm = (1 - math.exp(-most)) - low * most

    def by_share(s: Any) -> Any:
        """P[share <= s]: for each |log r| = l the share is uniform on [low, exp(-l)]."""
        turn = np.minimum(most, -np.log(np.clip(s, low, 1)))  # up to there s is below exp(-l)
        return (s * turn + np.exp(-turn) - np.exp(-most) - low * most) / norm

    def by_ratio(value: Any) -> Any:
        size = np.abs(value)
        half = (1 - np.exp(-size) - low * size) / norm / 2
        return 0.5 + np.sign(value) * half

    assert stats.kstest(share, by_share).pvalue > 0.01
    assert stats.kstest(log_ratio, by_ratio).pvalue > 0.01
    for length, place in (("height", "top"), ("width", "left")):
        free = np.array([side - getattr(how, length) for how in some])
        assert stats.kstest(np.array([getattr(how, place) for how in some]) / (free + 1), "uniform").pvalue > 0.01
    assert stats.binomtest(sum(how.mirrored for how in some), len(some)).pvalue > 0.01


@pytest.mark.parametrize("size", [(100, 5), (5, 100)])  # 8% of it has no room at any ratio
def test_draw_augmentation_of_a_shape_that_no_part_fits_takes_torchvisions_way_out(size: tuple[int, int]) -> None:
    expected = v2.RandomResizedCrop(8).make_params([torch.zeros(1, *size)])
    for how in drawn("resized_crop", 20, size):
        assert {name: getattr(how, name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["flip", "crop_flip", "resized_crop"])
def test_samples_are_augmented_by_seed_training_epoch_and_example_and_noised_afterwards(kind: Augment) -> None:
    pixels = images(6, 3, 16, 16)
    data = Dataset("some", tuple(f"s/{i}" for i in range(6)), pixels, np.arange(6) % 2, 2)
    places, chosen = np.arange(1, 6), np.arange(5)

    def made(name: str = "one", seed: int = 3, augment: Augment = kind) -> Samples:
        return Samples(data, places, name, seed, augment=augment)

    found = made().images(2, chosen)
    expected = [
        augment(pixels[i], draw_augmentation(kind, (16, 16), training_key(3, "one", "augment", 2, f"s/{i}")))
        for i in places
    ]
    assert torch.equal(found, torch.from_numpy(np.stack(expected)).float() / 255)
    assert torch.equal(made().images(2, chosen[::-1].copy()), found.flip(0))  # whatever the batch
    for other in (made().images(3, chosen), made("two").images(2, chosen), made(seed=4).images(2, chosen)):
        assert not torch.equal(other, found)
    plain = made(augment="none")
    assert torch.equal(plain.images(2, chosen), torch.from_numpy(pixels[1:]).float() / 255)
    # The noise is what it is without augmentation, and lies on top of the augmented image.
    noise = made().noise(2, chosen, [1.0] * len(chosen), 3)
    assert torch.equal(noise, plain.noise(2, chosen, [1.0] * len(chosen), 3))
    copies = made().noisy(2, chosen, [0.5] * 5, 3).view(3, 5, 3, 16, 16)
    torch.testing.assert_close(copies, found + 0.5 * noise.transpose(0, 1), rtol=0, atol=1e-6)
    assert 0 <= found.min() <= found.max() <= 1


def test_trainings_augment_what_they_learn_from_and_nothing_else() -> None:
    pixels = images(8, 1, 8, 8)
    data, places = Dataset("some", tuple(f"s/{i}" for i in range(8)), pixels, np.arange(8) % 2, 2), np.arange(8)
    tuned = FinetuneObjective(data, places, np.full(8, 0.5), None, FinetuneConfig(augment="crop_flip"), 3)
    samples = Samples(data, places, "finetune_classifier", 3, augment="crop_flip")
    noisy, _, labels = tuned.batch(1, places)
    assert torch.equal(noisy, samples.noisy(1, places, [0.5] * 8, 1))
    assert labels.tolist() == data.labels.tolist()

    config = EstimatorConfig(augment="crop_flip", holdout=0.5, holdout_copies=4)
    radii = np.random.default_rng(1).uniform(0.1, 1, (8, 2))
    objective = EstimatorObjective(data, radii, 0.3, None, config, 3)
    learnt, held = hold_out(8, 0.5, 3, objective.name)
    expected = Samples(data, learnt, objective.name, 3, augment="crop_flip").noisy(2, np.arange(4), [0.3] * 4, 2)
    assert torch.equal(objective.batch(2, np.arange(4))[0], expected)
    seen: list[torch.Tensor] = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective.worth(model, np.arange(4))
    assert torch.equal(seen[0], Samples(data, held, objective.name, 3).noisy(0, np.arange(4), [0.3] * 4, 4))


def test_augment_with_features_that_are_kept_is_refused() -> None:
    keys = ["estimator.backbone=features", "estimator.augment=crop_flip"]
    with pytest.raises(ConfigError, match=r"estimator\.augment: is crop_flip, but backbone: features computes the cop"):
        parse_config(PLAIN, keys)
