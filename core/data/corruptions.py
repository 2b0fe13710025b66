"""Common corruptions of small images, in the style of CIFAR-10-C and MNIST-C (arXiv 1903.12261, 1906.02337).

CIFAR-10-C and ImageNet-C themselves are read from their authors' files; this makes such a set of images that have none.
"""

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from core.data.dataset import Dataset
from core.errors import DataError

__all__ = ["CORRUPTIONS", "corrupt_images"]

Floats = NDArray[np.float64]
Random = np.random.Generator


def corrupt_images(clean: Dataset, name: str, corruption: str, severity: int) -> Dataset:
    """Every image of a set with one corruption of one severity.

    What is random in a corruption is drawn from a hash of corruption, severity and example id: the same set comes out
    wherever the versions of NumPy and SciPy are the same, whichever part of it is taken. Ids begin with `name`:
    `digits-c-contrast-3-digits-0042`.

    Raises:
        DataError: for an unknown corruption (lists those that there are).
    """
    if corruption not in CORRUPTIONS:
        raise DataError(f"{name} has no {corruption!r} (dataset.corruption); there are {', '.join(CORRUPTIONS)}")
    function, amounts = CORRUPTIONS[corruption]
    images = []
    for index, example_id in enumerate(clean.example_ids):
        key = f"{corruption}|{severity}|{example_id}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
        pixels = clean.image(index).astype(np.float64) / 255.0
        changed = function(pixels, amounts[severity - 1], np.random.Generator(np.random.PCG64(seed)))
        images.append(np.rint(255.0 * np.clip(changed, 0.0, 1.0)).astype(np.uint8))
    return Dataset(
        name=name,
        example_ids=tuple(f"{name}-{corruption}-{severity}-{example_id}" for example_id in clean.example_ids),
        images=np.stack(images),
        labels=clean.labels,
        num_classes=clean.num_classes,
        class_names=clean.class_names,
    )


# Each takes pixels (C, H, W) in [0, 1], an amount and a source of randomness; the result is clipped afterwards.


def _gaussian_noise(x: Floats, deviation: float, random: Random) -> Floats:
    return x + random.normal(scale=deviation, size=x.shape)


def _shot_noise(x: Floats, photons: float, random: Random) -> Floats:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: Floats, share: float, random: Random) -> Floats:
    hit, salt = random.random(x.shape) < share, random.random(x.shape) < 0.5
    return np.where(hit, salt.astype(np.float64), x)


def _gaussian_blur(x: Floats, deviation: float, random: Random) -> Floats:
    return np.asarray(ndimage.gaussian_filter(x, (0.0, deviation, deviation), mode="nearest"))


def _motion_blur(x: Floats, length: float, random: Random) -> Floats:
    angle = random.uniform(0.0, np.pi)
    steps = np.linspace(-length / 2.0, length / 2.0, 9)
    moved = [
        ndimage.shift(x, (0.0, t * np.sin(angle), t * np.cos(angle)), order=1, mode="nearest") for t in steps.tolist()
    ]
    return np.asarray(np.mean(moved, axis=0))


def _brightness(x: Floats, amount: float, random: Random) -> Floats:
    return x + amount


def _contrast(x: Floats, factor: float, random: Random) -> Floats:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray((x - mean) * factor + mean)


def _elastic_transform(x: Floats, amplitude: float, random: Random) -> Floats:
    height, width = x.shape[1:]
    field = ndimage.gaussian_filter(random.uniform(-1.0, 1.0, (2, height, width)), (0.0, 1.5, 1.5), mode="reflect")
    field *= amplitude / np.abs(field).max()
    places = np.mgrid[:height, :width] + field
    return np.stack([ndimage.map_coordinates(channel, places, order=1, mode="reflect") for channel in x])


def _pixelate(x: Floats, share: float, random: Random) -> Floats:
    height, width = x.shape[1:]
    fewer = max(1, round(share * width)), max(1, round(share * height))
    images = [Image.fromarray(channel.astype(np.float32)) for channel in x]
    small = [image.resize(fewer, Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float64) for image in small])


def _rotate(x: Floats, degrees: float, random: Random) -> Floats:
    angle = degrees * random.choice((-1.0, 1.0))
    return np.asarray(ndimage.rotate(x, angle, axes=(1, 2), reshape=False, order=1, mode="grid-constant"))


CORRUPTIONS: dict[str, tuple[Callable[[Floats, float, Random], Floats], tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of the pixels
    "gaussian_blur": (_gaussian_blur, (0.4, 0.55, 0.7, 0.9, 1.2)),  # standard deviation, pixels
    "motion_blur": (_motion_blur, (1.0, 1.5, 2.0, 2.75, 3.5)),  # length, pixels
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),  # of the distance from the mean, kept
    "elastic_transform": (_elastic_transform, (0.4, 0.6, 0.8, 1.0, 1.3)),  # largest displacement, pixels
    "pixelate": (_pixelate, (0.875, 0.75, 0.5, 0.375, 0.25)),  # of the side, kept
    "rotate": (_rotate, (8, 16, 24, 32, 40)),  # degrees, to either side
}
"""Function and amounts for severity 1 to 5. Lengths in pixels are meant for images of 8 to 32 pixels."""
