import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from core.config import DatasetConfig, SplitConfig
from core.data import Dataset, Preparation
from core.errors import ConfigError, DataError
from distributed.files.datasets import load_dataset


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Smooth and noisy parts, so that filters and rounding show."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    small = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8)).resize(size)
    noise = rng.integers(0, 60, (size[1], size[0], channels), dtype=np.uint8)
    pixels = np.asarray(small)[:, :, None] // 2 + noise
    return Image.frombytes(mode, size, pixels.astype(np.uint8).tobytes())


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_folders(root: Path, classes: tuple[str, ...] = ("n02", "n01", "n03"), num: int = 2) -> None:
    seed = 0
    for split in ("train", "val"):
        for class_name in classes:
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for number in range(num):
                seed += 1
                (folder / f"{class_name}_{number}.JPEG").write_bytes(
                    encoded(picture(seed, (300 + seed, 280 - seed)), "JPEG")
                )


def imagenet(root: Path, **keys: Any) -> DatasetConfig:
    return DatasetConfig(name="imagenet", path=str(root), **{"num_classes": 3, **keys})


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (500, 375), (375, 500), (64, 51), (24, 97), (24, 24)])
@pytest.mark.parametrize(("resize", "crop"), [(24, 24), (25, 22), (32, 31), (0, 23), (29, 0)])
def test_preparation_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], resize: int, crop: int, interpolation: Any
) -> None:
    image = picture(1, size)
    steps: list[Any] = [transforms.Resize(resize, transforms.InterpolationMode(interpolation))] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    expected = np.asarray(transforms.Compose(steps)(image))
    result = Preparation("rgb", resize, crop, interpolation)(encoded(image))
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_preparation_converts_other_colours_to_three_channels(mode: str) -> None:
    image = picture(2, mode=mode)
    content = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(content)) as again:
        expected = np.asarray(again.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(Preparation()(content), expected)
    assert Preparation("grey")(content).shape == (1, 30, 40)


def test_imagenet_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    write_folders(tmp_path)
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    for split, folder in (("train", "train"), ("test", "val")):
        reference = ImageFolder(str(tmp_path / folder), steps)
        data = load_dataset(imagenet(tmp_path), split)  # type: ignore[arg-type]
        assert (len(data), data.num_classes, data.shape) == (6, 3, (3, 224, 224))
        assert data.labels.tolist() == reference.targets == [0, 0, 1, 1, 2, 2]
        assert list(data.example_ids) == [str(Path(path).relative_to(tmp_path)) for path, _ in reference.samples]
        for index in range(len(data)):
            assert np.array_equal(data.image(index), reference[index][0].numpy())
    assert data.example_ids[0] == "val/n01/n01_0.JPEG"


def test_imagenet_ids_and_digest_do_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    write_folders(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    own = imagenet(tmp_path).model_copy(update={"path": None, "test": SplitConfig(path=str(tmp_path / "a" / "val"))})
    configs = (imagenet(tmp_path / "a"), imagenet(tmp_path / "b"), own, imagenet(f"file://{tmp_path}/a"))  # type: ignore[arg-type]
    one, *others = (load_dataset(config, "test") for config in configs)
    for other in others:
        assert (other.example_ids, other.digest()) == (one.example_ids, one.digest())
        assert np.array_equal(other.image(3), one.image(3))


def test_imagenet_part_of_the_classes_is_refused_unless_they_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    with pytest.raises(DataError, match=r"has 3 class folders, expected 1000: .*dataset\.class_file"):
        load_dataset(imagenet(tmp_path, num_classes=None), "test")
    names = tmp_path / "classes.txt"
    names.write_text("n03\nn00\nn02\nn01\n")
    data = load_dataset(imagenet(tmp_path, num_classes=None, class_file=str(names)), "test")
    assert (data.labels.tolist(), data.num_classes) == ([3, 3, 2, 2, 0, 0], 4)
    assert list(data.example_ids) == sorted(data.example_ids)
    with pytest.raises(ConfigError, match=r"dataset\.num_classes is 3, but .* names 4; drop one"):
        load_dataset(imagenet(tmp_path, class_file=str(names)), "test")
    names.write_text("n03\nn01\n")
    with pytest.raises(DataError, match=r"/val' has 1 of its 3 classes that are none of the run's 2: 'n02'"):
        load_dataset(imagenet(tmp_path, num_classes=None, class_file=str(names)), "test")


def test_folder_class_that_one_split_lacks_does_not_renumber_the_others(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for file in (tmp_path / "val" / "n02").iterdir():
        file.unlink()
    (tmp_path / "val" / "n02").rmdir()
    config = DatasetConfig(name="folder", path=str(tmp_path), crop=200, test=SplitConfig(split="val"))
    data = load_dataset(config, "test")
    assert (data.labels.tolist(), data.num_classes) == ([0, 0, 2, 2], 3)


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "garbage", "truncated"])
def test_corrupt_image_in_the_middle_fails_alone_and_by_name(tmp_path: Path, content: bytes | None) -> None:
    write_folders(tmp_path)
    file = tmp_path / "val" / "n02" / "n02_0.JPEG"
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    data = load_dataset(imagenet(tmp_path), "test")
    assert len(data) == 6
    with pytest.raises(DataError, match=r"example 'val/n02/n02_0\.JPEG': cannot decode '.*n02_0\.JPEG' \(.*ids_file"):
        data.image(2)
    assert data.image(1).shape == data.image(3).shape == (3, 224, 224)
    pixels, places = data.readable_pixels(range(6))
    assert (pixels.shape, places.tolist()) == ((5, 3, 224, 224), [0, 1, 3, 4, 5])
    file.unlink()
    with pytest.raises(DataError, match=r"example 'val/n02/n02_0\.JPEG': cannot read .*No such file"):
        data.image(2)


def test_image_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"broken: the shape is that of the first good one")
    for name, size in (("b", (8, 6)), ("c", (6, 8)), ("d", (8, 6))):
        (folder / f"{name}.png").write_bytes(encoded(picture(1, size)))
    (tmp_path / "test" / "dog").mkdir()
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").touch()
    config = DatasetConfig(name="folder", path=str(tmp_path))
    data = load_dataset(config, "test")
    assert data.example_ids == ("test/cat/a.png", "test/cat/b.png", "test/cat/c.png", "test/cat/d.png")
    assert data.shape == (3, 6, 8)
    assert data.num_classes == 2
    with pytest.raises(DataError, match=r"'test/cat/c.png' has shape \(3, 8, 6\), .* have \(3, 6, 8\); set dataset"):
        data.image(2)
    assert load_dataset(config.model_copy(update={"crop": 6}), "test").image(2).shape == (3, 6, 6)
    small = load_dataset(config.model_copy(update={"crop": 7}), "test")
    with pytest.raises(DataError, match=r"8x6 pixels are fewer than dataset\.crop = 7; set dataset\.resize"):
        small.image(1)


def test_image_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(tmp_path / "test" / "cat" / "a.png")
    data = load_dataset(DatasetConfig(name="folder", path=str(tmp_path)), "test")
    with pytest.raises(DataError, match=r"pixels of 16 bits a channel, mode 'I;16', expected 8 bits"):
        data.image(0)
    with pytest.raises(DataError, match=r"none of its 1 images can be read; the first: example 'test/cat/a.png'"):
        _ = data.shape


def test_imagenet_c_folders_and_what_is_there_when_one_is_not(tmp_path: Path) -> None:
    pixels: dict[str, NDArray[np.uint8]] = {}
    for corruption in ("fog", "snow"):
        for class_name in ("n01", "n02"):
            folder = tmp_path / corruption / "3" / class_name
            folder.mkdir(parents=True)
            image = picture(len(pixels), (224, 224))
            (folder / "x.png").write_bytes(encoded(image))
            pixels[f"{corruption}/3/{class_name}/x.png"] = np.asarray(image).transpose(2, 0, 1)

    def load(corruption: str, severity: int) -> Dataset:
        plain: dict[str, Any] = {"corruption": corruption, "severity": severity, "num_classes": 2}
        return load_dataset(DatasetConfig(name="imagenet-c", path=str(tmp_path), **plain), "test")

    data = load("fog", 3)
    assert data.example_ids == ("fog/3/n01/x.png", "fog/3/n02/x.png")
    assert data.labels.tolist() == [0, 1]
    for index, example_id in enumerate(data.example_ids):
        assert np.array_equal(data.image(index), pixels[example_id])
    with pytest.raises(DataError, match=r"no class folders in .*/rain/3 .*corruptions there: fog, snow"):
        load("rain", 3)
    with pytest.raises(DataError, match=r"no class folders in .*/fog/2"):
        load("fog", 2)


def test_folder_without_images_or_split_says_what_to_set(tmp_path: Path) -> None:
    write_folders(tmp_path)
    with pytest.raises(DataError, match=r"/test: expected <class>.*set dataset\.test\.split .*there: train, val"):
        load_dataset(DatasetConfig(name="folder", path=str(tmp_path)), "test")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in class folders below"):
        load_dataset(DatasetConfig(name="folder", test=SplitConfig(path=str(tmp_path / "empty"))), "test")
    with pytest.raises(ConfigError, match=r"dataset\.path: set it \(or dataset\.train\.path\)"):
        load_dataset(DatasetConfig(name="folder", test=SplitConfig(path=str(tmp_path / "empty"))), "train")


def test_subset_of_stored_images_reads_the_right_files(tmp_path: Path) -> None:
    write_folders(tmp_path)
    whole = load_dataset(imagenet(tmp_path), "test")
    part = load_dataset(imagenet(tmp_path, test=SplitConfig(every=2, share=0.7, seed=1)), "test")
    assert len(part) == 2
    for index, example_id in enumerate(part.example_ids):
        place = whole.example_ids.index(example_id)
        assert place % 2 == 0
        assert part.labels[index] == whole.labels[place]
        assert np.array_equal(part.image(index), whole.image(place))
