"""Data sets as (stable example id, uint8 image, label)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config import DatasetConfig
from core.errors import DataError

__all__ = ["Dataset", "Split", "as_image", "load_dataset"]

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: as in the configuration.
        example_ids: distinct names that stay the same from run to run, sortable, part of the noise key.
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)`` in [0, num_classes).
        num_classes: classes of the task.
    """

    name: str
    example_ids: tuple[str, ...]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_classes: int

    def __post_init__(self) -> None:
        num = len(self.example_ids)
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or len(self.images) != num or len(self.labels) != num:
            raise DataError(
                f"{self.name}: expected {num} uint8 images (N, C, H, W) and {num} labels, got images "
                f"{self.images.dtype} {self.images.shape} and labels {self.labels.shape}"
            )
        if len(set(self.example_ids)) != num:
            raise DataError(f"{self.name}: example ids are not distinct")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"{self.name}: example {self.example_ids[first]!r} has label {self.labels[first]}, "
                f"expected 0 to {self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.example_ids)

    def pixels(self) -> Tensor:
        """All images as float32 ``(N, C, H, W)`` in [0, 1]."""
        return torch.from_numpy(self.images).float().div_(255.0)


def load_dataset(config: DatasetConfig, split: Split) -> Dataset:
    """Load one split of the configured data set.

    Digits: pixel values 0..16 become round(255 v / 16); a seeded shuffle of all 1,797 images gives `test_size` test
    images, the others train. Ids name the image's place in scikit-learn's order.
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    images = np.rint(raw.reshape(-1, 1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    order = np.random.default_rng(config.split_seed).permutation(len(images))
    chosen = np.sort(order[: config.test_size] if split == "test" else order[config.test_size :])
    return Dataset(
        name=config.name,
        example_ids=tuple(f"digits-{index:04d}" for index in chosen),
        images=images[chosen],
        labels=labels[chosen].astype(np.int64),
        num_classes=10,
    )


def as_image(image: Tensor | NDArray[np.generic], name: str) -> Tensor:
    """Check one image and return it as float32 in [0, 1].

    Args:
        image: ``(C, H, W)``, uint8 in [0, 255] or floating in [0, 1].
        name: what messages call it.

    Raises:
        DataError: for another shape or dtype, a non-finite pixel or one outside the range; names the example.
    """
    tensor = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image))
    if tensor.ndim != 3:
        raise DataError(f"example {name!r}: expected one image (C, H, W), got shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(255.0)
    if not tensor.is_floating_point():
        raise DataError(f"example {name!r}: expected uint8 or floating pixels, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise DataError(f"example {name!r} has non-finite pixels")
    low, high = float(tensor.min()), float(tensor.max())
    if low < 0.0 or high > 1.0:
        raise DataError(
            f"example {name!r}: pixels span [{low:g}, {high:g}], expected [0, 1]; put the normalisation into the "
            "network: noise levels and radii are in the pixel scale"
        )
    return tensor.float()
