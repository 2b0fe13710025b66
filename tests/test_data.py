import numpy as np
import pytest
from sklearn.datasets import load_digits

from core.config import DatasetConfig
from core.data import Dataset, load_dataset


def test_load_dataset_digits_splits_all_images_without_overlap() -> None:
    train, test = (load_dataset(DatasetConfig(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1297, 500)
    assert len({*train.example_ids, *test.example_ids}) == 1797
    assert train.images.shape == (1297, 1, 8, 8)
    assert set(test.labels.tolist()) == set(range(10))
    assert list(train.example_ids) == sorted(train.example_ids)


def test_load_dataset_digits_keeps_pixels_and_labels_with_their_id() -> None:
    raw, labels = load_digits(return_X_y=True)
    test = load_dataset(DatasetConfig(), "test")
    for place in (0, 123, 499):
        index = int(test.example_ids[place].removeprefix("digits-"))
        assert test.labels[place] == labels[index]
        assert np.abs(test.pixels()[place].numpy().reshape(64) - raw[index] / 16).max() <= 0.5 / 255 + 1e-6


def test_load_dataset_other_split_seed_gives_another_split_of_the_same_images() -> None:
    one, two = (load_dataset(DatasetConfig(split_seed=seed), "test") for seed in (0, 1))
    assert one.example_ids != two.example_ids


def test_dataset_label_out_of_range_names_the_example() -> None:
    from core.errors import DataError

    images = np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(DataError, match="'b' has label 7, expected 0 to 2"):
        Dataset("x", ("a", "b"), images, np.array([0, 7]), 3)
    with pytest.raises(DataError, match="not distinct"):
        Dataset("x", ("a", "a"), images, np.array([0, 1]), 3)
    with pytest.raises(DataError, match="expected 2 uint8 images"):
        Dataset("x", ("a", "b"), images.astype(np.float32), np.array([0, 1]), 3)
