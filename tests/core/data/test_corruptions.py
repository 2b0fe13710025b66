from typing import Any

import numpy as np
import pytest

from core.config import parse_config
from core.data import Dataset, load_dataset
from core.data.corruptions import CORRUPTIONS, corrupt_images
from core.data.digits import read_digits
from core.errors import ConfigError, DataError


def corrupted(corruption: str, severity: int, clean: Dataset | None = None) -> np.ndarray:
    data = corrupt_images(clean or read_digits("test", 100, 0), "digits-c", corruption, severity)
    assert isinstance(data.images, np.ndarray)
    return data.images


def plain(value: int, shape: tuple[int, ...] = (200, 1, 8, 8)) -> Dataset:
    num = shape[0]
    return Dataset(
        "plain", tuple(f"{i}" for i in range(num)), np.full(shape, value, np.uint8), np.zeros(num, np.int64), 2
    )


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupt_images_is_reproducible_grows_with_severity_and_keeps_labels(corruption: str) -> None:
    clean = read_digits("test", 100, 0)
    assert isinstance(clean.images, np.ndarray)
    distances = []
    for severity in range(1, 6):
        images = corrupted(corruption, severity)
        assert images.dtype == np.uint8
        assert images.shape == clean.images.shape
        np.testing.assert_array_equal(images, corrupted(corruption, severity))
        part = clean.take([7, 3])  # whichever part is taken, and in which order
        np.testing.assert_array_equal(corrupted(corruption, severity, part), images[[7, 3]])
        distances.append(np.mean(np.linalg.norm((images.astype(float) - clean.images).reshape(100, -1), axis=1)))
    assert distances[0] > 10.0
    assert distances == sorted(distances)
    data = corrupt_images(clean, "digits-c", corruption, 2)
    assert data.example_ids[0] == f"digits-c-{corruption}-2-{clean.example_ids[0]}"
    np.testing.assert_array_equal(data.labels, clean.labels)


def test_corrupt_images_pixelwise_ones_equal_their_formulas() -> None:
    clean = read_digits("test", 100, 0).images
    assert isinstance(clean, np.ndarray)
    x = clean.astype(float)
    np.testing.assert_array_equal(corrupted("brightness", 2), np.rint(np.minimum(x + 0.2 * 255, 255)).astype(np.uint8))
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(corrupted("contrast", 3), 0.4 * x + 0.6 * mean, atol=0.5 + 1e-9)


def test_corrupt_images_noise_has_its_moments() -> None:
    grey = corrupted("gaussian_noise", 1, plain(128)).astype(float)
    assert abs(grey.mean() - 128) < 1.0
    assert abs(grey.std() / 255 - 0.08) < 0.002
    shot = corrupted("shot_noise", 1, plain(64)).astype(float) / 255
    assert abs(shot.var() / (64 / 255 / 60) - 1) < 0.05  # Poisson: variance = mean / photons
    hit = corrupted("impulse_noise", 4, plain(128))
    assert abs((hit == 255).mean() - 0.085) < 0.01
    assert abs((hit == 0).mean() - 0.085) < 0.01


@pytest.mark.parametrize("corruption", ["gaussian_blur", "motion_blur", "elastic_transform", "pixelate", "contrast"])
def test_corrupt_images_that_move_light_about_leave_a_plain_image_alone(corruption: str) -> None:
    np.testing.assert_array_equal(corrupted(corruption, 5, plain(77, (3, 3, 16, 12))), 77)


def test_load_dataset_digits_c_corrupts_the_test_split_alone() -> None:
    minimal: dict[str, Any] = {"sigmas": [0.25], "report": {"radii": [0.1]}}
    digits = {"name": "digits-c", "corruption": "rotate", "severity": 1, "test": {"every": 7}}
    config = parse_config(minimal | {"dataset": digits}).dataset
    clean = parse_config(minimal).dataset
    assert load_dataset(config, "train").example_ids == load_dataset(clean, "train").example_ids
    whole = corrupt_images(load_dataset(clean, "test"), "digits-c", "rotate", 1)
    assert load_dataset(config, "test").example_ids == whole.example_ids[::7]
    with pytest.raises(DataError, match=r"no 'fog' \(dataset.corruption\); there are gaussian_noise, shot_noise"):
        load_dataset(config.model_copy(update={"corruption": "fog"}), "test")
    with pytest.raises(ConfigError, match="digits-c needs it"):
        parse_config(minimal | {"dataset": {"name": "digits-c"}})
