"""The digits that scikit-learn ships."""

import numpy as np

from core.data.dataset import Dataset, Split

__all__ = ["read_digits"]


def read_digits(split: Split, test_size: int, split_seed: int) -> Dataset:
    """1,797 grey 8x8 images of 10 classes.

    Pixel values 0..16 become round(255 v / 16); a seeded shuffle of all images gives `test_size` test images, the
    others train. Ids name the image's place in scikit-learn's order: `digits-0042`.
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    images = np.rint(raw.reshape(-1, 1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    order = np.random.default_rng(split_seed).permutation(len(images))
    chosen = np.sort(order[:test_size] if split == "test" else order[test_size:])
    return Dataset(
        name="digits",
        example_ids=tuple(f"digits-{index:04d}" for index in chosen),
        images=images[chosen],
        labels=labels[chosen].astype(np.int64),
        num_classes=10,
        class_names=tuple("0123456789"),
    )
