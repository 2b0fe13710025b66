from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits

from core.config import Config, DatasetConfig, SplitConfig, load_config, parse_config
from core.data import Dataset, as_image, load_dataset
from core.errors import ConfigError, DataError


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
        assert np.abs(test.image(place).reshape(64) / 255 - raw[index] / 16).max() <= 0.5 / 255 + 1e-6


def test_load_dataset_other_split_seed_gives_another_split_of_the_same_images() -> None:
    one, two = (load_dataset(DatasetConfig(split_seed=seed), "test") for seed in (0, 1))
    assert one.example_ids != two.example_ids


def test_dataset_label_out_of_range_names_the_example() -> None:
    images = np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(DataError, match="'b' has label 7, expected 0 to 2"):
        Dataset("x", ("a", "b"), images, np.array([0, 7]), 3)
    with pytest.raises(DataError, match="not distinct"):
        Dataset("x", ("a", "a"), images, np.array([0, 1]), 3)
    with pytest.raises(DataError, match="expected 2 uint8 images"):
        Dataset("x", ("a", "b"), images.astype(np.float32), np.array([0, 1]), 3)


def test_dataset_readable_pixels_are_those_of_the_images() -> None:
    data = load_dataset(DatasetConfig(), "test")
    assert data.shape == data.image(3).shape == (1, 8, 8)
    assert np.array_equal(data.readable_pixels([3])[0][0].numpy(), data.image(3).astype(np.float32) / 255)


def test_dataset_digest_changes_with_ids_labels_and_pixels_and_with_nothing_else() -> None:
    images = np.zeros((2, 1, 8, 8), np.uint8)
    labels = np.array([0, 1])
    digest = Dataset("x", ("a", "b"), images, labels, 3).digest()
    assert digest == Dataset("y", ("a", "b"), images.copy(), labels, 3).digest()
    others = [
        Dataset("x", ("a", "c"), images, labels, 3),
        Dataset("x", ("a", "b"), images, labels[::-1], 3),
        Dataset("x", ("a", "b"), images + np.uint8(1), labels, 3),
        Dataset("x", ("a", "b"), images, labels, 4),
        Dataset("x", ("a",), images[:1], labels[:1], 3),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 6


@pytest.mark.parametrize(
    ("plain", "kept"),
    [
        ({"every": 20}, list(range(0, 500, 20))),
        ({"first": 7}, list(range(7))),
        ({"every": 3, "first": 5}, [0, 3, 6, 9, 12]),
        ({}, list(range(500))),
    ],
)
def test_load_dataset_subset_keeps_what_it_names_in_order(plain: dict[str, int], kept: list[int]) -> None:
    whole = load_dataset(DatasetConfig(), "test")
    part = load_dataset(DatasetConfig(test=SplitConfig(**plain)), "test")  # type: ignore[arg-type]
    assert part.example_ids == tuple(whole.example_ids[place] for place in kept)
    assert np.array_equal(part.labels, whole.labels[kept])
    assert np.array_equal(part.image(len(kept) - 1), whole.image(kept[-1]))
    assert len(load_dataset(DatasetConfig(test=SplitConfig(**plain)), "train")) == 1297  # type: ignore[arg-type]


def test_load_dataset_share_is_seeded_sorted_and_of_the_right_size() -> None:
    def ids(share: float, seed: int = 0, every: int = 1) -> tuple[str, ...]:
        part = SplitConfig(share=share, seed=seed, every=every)
        return load_dataset(DatasetConfig(test=part), "test").example_ids

    whole = ids(1.0)
    assert len(ids(0.2)) == 100
    assert list(ids(0.2)) == sorted(ids(0.2))
    assert ids(0.2) == ids(0.2) != ids(0.2, seed=1)
    assert set(ids(0.2, every=2)) <= set(whole[::2])
    assert len(ids(0.2, every=2)) == 50
    assert len(ids(1e-9)) == 1


def test_load_dataset_ids_file_takes_exactly_these_and_refuses_others_by_name(tmp_path: Path) -> None:
    whole, file = load_dataset(DatasetConfig(), "test"), tmp_path / "ids.txt"
    config = DatasetConfig(test=SplitConfig(ids_file=str(file)))
    file.write_text(f"{whole.example_ids[9]}\n\n  {whole.example_ids[4]}\n")
    assert load_dataset(config, "test").example_ids == (whole.example_ids[4], whole.example_ids[9])
    file.write_text(f"{whole.example_ids[9]}\nnobody\n")
    with pytest.raises(DataError, match=r"dataset\.test\.ids_file: .*names 1 examples .*'nobody'; its ids look like"):
        load_dataset(config, "test")
    file.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="names 'a' twice"):
        load_dataset(config, "test")
    file.unlink()
    with pytest.raises(ConfigError, match=r"dataset\.test\.ids_file: cannot read"):
        load_dataset(config, "test")


def test_load_dataset_first_beyond_the_split_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.test\.first asks for 501 examples, there are 500"):
        load_dataset(DatasetConfig(test=SplitConfig(first=501)), "test")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"name": "cifar10"}, r"dataset\.path: is missing; set it to where cifar10 is"),
        ({"name": "cifar10", "path": "x", "corruption": "fog"}, r"dataset\.corruption: means nothing for cifar10"),
        ({"name": "cifar10-c", "path": "x"}, r"dataset\.corruption: cifar10-c needs it"),
        ({"path": "x"}, r"dataset\.path: means nothing for digits"),
        ({"test": {"path": "x"}}, r"dataset\.test: digits have neither path nor split"),
        ({"test": {"ids_file": "x", "every": 2}}, r"dataset\.test: ids_file goes without every"),
        ({"name": "imagenet", "path": "x", "crop": 300}, r"dataset\.crop: 300 is more than dataset\.resize = 256"),
        ({"name": "imagenet", "path": "x", "id_column": "a"}, r"dataset\.id_column: needs dataset\.layout=parquet"),
        ({"name": "cifar10", "path": "x", "test": {"split": "val"}}, r"test\.split: means nothing for CIFAR-10's"),
        (
            {"name": "parquet", "train": {"path": "x"}, "test": {"path": "x"}},
            r"dataset\.test\.path: train and test would be the same images",
        ),
        ({"test": {"evry": 2}}, r"unknown key 'dataset\.test\.evry'; did you mean 'every'"),
        ({"test": {"share": 0}}, r"'dataset\.test\.share' is 0: input should be greater than 0"),
    ],
)
def test_parse_config_dataset_that_cannot_be_names_key_and_remedy(dataset: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({"sigmas": [0.5], "dataset": dataset, "report": {"radii": [0]}})
    assert "{" not in str(caught.value)


def test_fingerprint_of_the_digits_is_what_it_always_was() -> None:
    config = load_config(Path("configs/digits.yaml"))
    assert config.fingerprint() == "2655857b7c82f322"
    assert config.model_copy(update={"noise_version": 1}).fingerprint() == "a46e30e70b43655f"  # of runs begun with that


def test_identity_does_not_know_where_data_lie_but_which_part_is_taken() -> None:
    def config(**dataset: object) -> Config:
        dataset["name"] = "cifar10"
        return parse_config({"sigmas": [0.5], "report": {"radii": [0]}, "dataset": dataset})

    base = config(path="/a")
    for same in (config(path="s3://b"), config(train={"path": "/c"}, test={"path": "/d"})):
        assert (same.fingerprint(), same.identity()) == (base.fingerprint(), base.identity())
    for other in (config(path="/a", test={"every": 20}), config(path="/a", train={"share": 0.5})):
        assert other.fingerprint() != base.fingerprint()
        assert other.identity() != base.identity()


def colours(height: int = 5, width: int = 7) -> Any:
    """uint8 ``(H, W, 3)``."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_as_image_of_a_pil_image_is_its_pixels_channels_first() -> None:
    pixels = colours()
    image = as_image(PIL.Image.fromarray(pixels), "a")
    assert image.shape == (3, 5, 7)
    assert all(
        image[c, y, x] == np.float32(pixels[y, x, c]) / 255 for c in range(3) for y in range(5) for x in range(7)
    )
    assert torch.equal(as_image(pixels.transpose(2, 0, 1), "a"), image)
    grey = PIL.Image.fromarray(pixels[:, :, 0])
    assert torch.equal(as_image(grey, "a"), image[:1])


def test_as_image_is_on_the_cpu_and_wants_no_gradient() -> None:
    image = as_image(torch.full((1, 2, 2), 0.5, requires_grad=True) * 1.0, "a")
    assert not image.requires_grad
    assert image.numpy().dtype == np.float32
    assert as_image(np.full((1, 2, 2), 0.5, np.float16), "a").dtype == torch.float32
    assert as_image(torch.zeros(2, 4, 4), "a").shape == (2, 4, 4)  # axes too short to tell: as documented
    assert as_image(torch.zeros(30, 1, 1), "a").shape == (30, 1, 1)


def test_as_image_of_another_byte_order_or_layout_has_the_same_pixels() -> None:
    pixels = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 4, 4)
    for same in (pixels.astype(">f4"), torch.from_numpy(pixels).to_sparse(), np.ma.masked_array(pixels, mask=False)):
        assert np.array_equal(as_image(same, "a").numpy(), pixels)


def turned() -> PIL.Image.Image:
    image = PIL.Image.fromarray(colours())
    image.getexif()[0x0112] = 6
    return image


def keyed() -> PIL.Image.Image:
    """Its first pixel has the colour that stands for transparent."""
    image = PIL.Image.fromarray(colours())
    image.info["transparency"] = image.getpixel((0, 0))
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (colours(), r"has shape \(5, 7, 3\), which reads as \(H, W, C\); use \(C, H, W\)"),
        (torch.zeros(28, 28, 1), r"has shape \(28, 28, 1\), which reads as \(H, W, C\)"),
        (np.zeros((64, 48, 4), np.float32), r"use \(C, H, W\)"),
        (np.zeros((64, 48), np.uint8), r"expected one image \(C, H, W\), got shape \(64, 48\)"),
        (np.zeros((3, 0, 4)), r"got shape \(3, 0, 4\)"),
        (PIL.Image.new("RGBA", (4, 4)), "mode 'RGBA', expected 'RGB' or 'L'"),
        (PIL.Image.new("P", (4, 4)), "mode 'P'"),
        (PIL.Image.new("I;16", (4, 4)), "mode 'I;16'"),
        (PIL.Image.new("1", (4, 4)), "mode '1'"),
        (turned(), "EXIF orientation 6"),
        (np.zeros((1, 4, 4), np.uint16), "expected uint8 or floating pixels, got torch.uint16"),
        (np.zeros((1, 4, 4), bool), "got torch.bool"),
        (np.zeros((1, 4, 4), object), "got an array of object"),
        (np.ma.masked_array(np.zeros((1, 4, 4)), mask=True), "got an array of float64 with masked values"),
        (torch.zeros(1, 4, 4, device="meta"), "got Tensor"),
        (keyed(), "transparent pixels: show them on a background"),
        ("cat.png", "got str"),
        (None, "got NoneType"),
        (np.full((1, 4, 4), 1 + 2e-7), r"pixels span \[1\.0000002, 1\.0000002\], expected \[0, 1\]; clamp"),
        (torch.full((1, 4, 4), -1e-9), r"pixels span \[-9\.99999\d*e-10, "),
    ],
)
def test_as_image_what_cannot_be_told_is_refused_in_a_line_that_names_it(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"example 'image 1'.*{message}") as caught:
        as_image(image, "image 1")
    assert "\n" not in str(caught.value)
