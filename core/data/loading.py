"""From the configuration to a data set: which layout, where, which part of it."""

from collections.abc import Callable
from typing import NamedTuple

from core.config import DatasetConfig, SplitConfig
from core.data.cifar import read_cifar10, read_cifar10_c
from core.data.corruptions import corrupt_images
from core.data.dataset import Dataset, Split
from core.data.digits import read_digits
from core.data.folders import read_folders
from core.data.images import Preparation
from core.data.storage import LocalStorage, OpenStorage, Storage
from core.data.subsets import choose, read_lines
from core.errors import ConfigError, DataError

__all__ = ["ParquetPart", "ReadParquet", "class_names", "load_dataset", "preparation"]

_CLASSES = {"cifar10": 10, "imagenet": 1000, "imagenet-c": 1000}
_DIGITS, _CIFAR = ("digits", "digits-c"), ("cifar10", "cifar10-c")
_CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ParquetPart(NamedTuple):
    """Parquet files that hold one split, and how to read them.

    Attributes:
        location: folder or address, or one file.
        files: inside it, in the order of the rows; ("",) where the location is itself the file.
        label: what made-up ids begin with.
        digits: of the row number in made-up ids.
        columns: names of the image's, the label's and the id's column (None: made up from the row number).
        classes: names of the classes in the order of the labels, for labels that are names.
        num_classes: None to take it from the file's own description.
        preparation: makes pixels of an image.
    """

    location: str
    files: tuple[str, ...]
    label: str
    digits: int
    columns: tuple[str, str, str | None]
    classes: tuple[str, ...] | None
    num_classes: int | None
    preparation: Preparation


ReadParquet = Callable[[str, ParquetPart], Dataset]


class _Place(NamedTuple):
    """Where a split is: a storage, what the split is called, and whether the storage holds nothing else."""

    location: str
    storage: Storage
    label: str
    alone: bool


def load_dataset(
    config: DatasetConfig,
    split: Split,
    *,
    open_storage: OpenStorage = LocalStorage,
    read_parquet: ReadParquet | None = None,
) -> Dataset:
    """Load one split of the configured data set, or the part of it that the configuration asks for.

    Jobs call `distributed.store.datasets.load_dataset`, which adds Parquet files and object stores to what is here:
    digits, CIFAR-10's pickles, NumPy arrays and folders of images on this machine.

    Args:
        config: which data set.
        split: `train` or `test`.
        open_storage: opens a folder.
        read_parquet: reads Parquet files.

    Raises:
        ConfigError: for a split that the configuration does not describe.
        DataError: for files that are missing or are not what they should be; names them. An image that is broken is
            no error before somebody asks for it.
    """
    part: SplitConfig = getattr(config, split)
    return choose(_whole(config, part, split, open_storage, read_parquet), part, f"dataset.{split}")


def _whole(
    config: DatasetConfig, part: SplitConfig, split: Split, open_storage: OpenStorage, read_parquet: ReadParquet | None
) -> Dataset:
    if config.name in _DIGITS:
        clean = read_digits(split, config.test_size, config.split_seed)
        if config.corruption is None or config.severity is None or split == "train":
            return clean
        return corrupt_images(clean, config.name, config.corruption, config.severity)
    if config.corruption is not None and split == "train":
        if part.path is None:
            raise ConfigError(
                f"{config.name} has test images only; set dataset.train.path to the training images of "
                f"{config.name.removesuffix('-c')}"
            )
        config = config.model_copy(update={"name": config.name.removesuffix("-c"), "corruption": None})
    place = _locate(config, part, split, open_storage)
    if config.corruption is not None and config.severity is not None:
        if config.name == "cifar10-c":
            return read_cifar10_c(config.name, place.storage, config.corruption, config.severity)
        return _corrupted_folders(config, place)
    if "parquet" in (config.name, config.layout):
        if read_parquet is None:
            raise ConfigError(f"{place.location!r} holds Parquet: load it with distributed.store.datasets.load_dataset")
        return read_parquet(config.name, _parquet_part(config, part, split, place))
    if config.name == "cifar10":
        return read_cifar10(config.name, place.storage, split)
    return _folders(config, part, split, place, open_storage)


def _locate(config: DatasetConfig, part: SplitConfig, split: Split, open_storage: OpenStorage) -> _Place:
    location = part.path or config.path
    if location is None:
        raise ConfigError(f"dataset.path: set it (or dataset.{split}.path) to where the {split} images are")
    label = part.split or ("val" if (config.name, split) == ("imagenet", "test") else split)
    return _Place(location, open_storage(location), label, alone=part.path is not None and part.split is None)


def preparation(config: DatasetConfig) -> Preparation:
    """How images become pixels; ImageNet as published (Cohen et al. 2019): shorter side 256, centre crop 224."""
    resize, crop = config.resize_crop
    return Preparation("grey" if config.name in _DIGITS else config.color, resize, crop, config.interpolation)


def class_names(config: DatasetConfig, *, open_storage: OpenStorage = LocalStorage) -> tuple[str, ...] | None:
    """Names of the classes in the order of the labels: of the set, of `class_file`, or of the class folders.

    None where nothing here tells them.

    Raises:
        ConfigError: for a `class_file` that cannot be read.
        DataError: when the class folders are not there.
    """
    if config.class_file is not None:
        return _class_file(config)
    if config.name in _DIGITS:
        return tuple("0123456789")
    if config.name in _CIFAR:
        return _CIFAR_NAMES
    if config.layout == "parquet" or config.name not in ("imagenet", "folder"):
        return None
    place = _locate(config, config.train, "train", open_storage)
    return tuple(_known_folders(config, "train", place, open_storage))


def _class_file(config: DatasetConfig) -> tuple[str, ...] | None:
    if config.class_file is None:
        return None
    classes = tuple(read_lines(config.class_file, "dataset.class_file"))
    if config.num_classes not in (None, len(classes)):
        raise ConfigError(
            f"dataset.num_classes is {config.num_classes}, but {config.class_file!r} names {len(classes)}; drop one"
        )
    return classes


def _folders(
    config: DatasetConfig, part: SplitConfig, split: Split, place: _Place, open_storage: OpenStorage
) -> Dataset:
    """<split>/<class>/<image>."""
    folder = "" if place.alone else place.label
    present = place.storage.folders(folder)
    if not present:
        there = ", ".join(place.storage.folders()) or "none"
        raise DataError(
            f"no class folders in {place.location.rstrip('/')}/{folder}: expected <class>/<image>; set "
            f"dataset.{split}.split to the split's folder (there: {there}), or dataset.{split}.path to it; "
            "Parquet files need dataset.layout=parquet, or dataset.name=parquet"
        )
    known = present if config.class_file is not None else _known_folders(config, split, place, open_storage)
    classes = _class_file(config) or _counted(config, known, place)
    return read_folders(config.name, place.storage, folder, place.label, classes, preparation(config))


def _known_folders(config: DatasetConfig, split: Split, place: _Place, open_storage: OpenStorage) -> list[str]:
    """Class folders by name, of both splits where they lie together: one that lacks a class must not renumber it."""
    other: Split = "train" if split == "test" else "test"
    part, other_part = getattr(config, split), getattr(config, other)
    known = set(place.storage.folders("" if place.alone else place.label))
    if part.path is None and other_part.path is None:
        known.update(place.storage.folders(_locate(config, other_part, other, open_storage).label))
    return sorted(known)


def _corrupted_folders(config: DatasetConfig, place: _Place) -> Dataset:
    """<corruption>/<severity>/<class>/<image>, as ImageNet-C has it."""
    folder = f"{config.corruption}/{config.severity}"
    present = place.storage.folders(folder)
    if not present:
        there = ", ".join(place.storage.folders()) or "none"
        raise DataError(
            f"no class folders in {place.location.rstrip('/')}/{folder} (dataset.corruption, dataset.severity); "
            f"corruptions there: {there}"
        )
    classes = _class_file(config) or _counted(config, present, place)
    return read_folders(config.name, place.storage, folder, folder, classes, preparation(config))


def _counted(config: DatasetConfig, folders: list[str], place: _Place) -> list[str]:
    """Class folders by name, if there are as many as there should be."""
    expected = config.num_classes or _CLASSES.get(config.name)
    if expected not in (None, len(folders)):
        raise DataError(
            f"{place.location!r} has {len(folders)} class folders, expected {expected}: a part of them would be "
            "numbered wrongly; name all classes in dataset.class_file, or set dataset.num_classes if these are all"
        )
    return folders


def _parquet_part(config: DatasetConfig, part: SplitConfig, split: Split, place: _Place) -> ParquetPart:
    """Which files hold the split."""
    label = place.label
    if config.name == "imagenet" and split == "test" and part.split is None:
        label = "validation"
    files = place.storage.files()
    if files == [""] and not place.alone:
        raise ConfigError(
            f"{place.location!r} is one Parquet file; name the files of the splits in dataset.train.path and "
            "dataset.test.path"
        )
    if files != [""]:
        found = [path for path in files if path.endswith(".parquet")]
        files = found if place.alone else [path for path in found if _is_of_split(path, label)]
        if not files:
            there = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise DataError(
                f"no Parquet files of the split {label!r} in {place.location!r}; set dataset.{split}.split to what "
                f"their names or folders begin with, or dataset.{split}.path; files there: {there or 'none'}"
            )
    image = config.image_column or ("img" if config.name == "cifar10" else "image")
    classes = _class_file(config)
    return ParquetPart(
        location=place.location,
        files=tuple(files),
        label=f"{config.name}-{label}",
        digits=5 if config.name == "cifar10" else 8,
        columns=(image, config.label_column or "label", config.id_column),
        classes=classes,
        num_classes=len(classes) if classes else config.num_classes or _CLASSES.get(config.name),
        preparation=preparation(config),
    )


def _is_of_split(path: str, label: str) -> bool:
    """`train/0.parquet`, `data/train-00000-of-00014.parquet`, `train.parquet`."""
    *folders, name = path.split("/")
    return label in folders or any(name.startswith(label + mark) for mark in ("-", "_", "."))
