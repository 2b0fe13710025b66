"""From the configuration to a data set: which layout, where, which part of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from core.config import DatasetConfig, SplitConfig
from core.data.arrays import Arrays, numbering
from core.data.cifar import CLASSES, read_cifar10, read_cifar10_c
from core.data.classes import canonical, in_order, numbers_of, shown
from core.data.corruptions import corrupt_images
from core.data.dataset import Dataset, Split
from core.data.digits import read_digits
from core.data.folders import read_folders
from core.data.idx import read_idx
from core.data.images import Preparation
from core.data.npz import read_npz
from core.data.parquet_files import ParquetPart, check_whole, files_of_split, parquet_files
from core.data.storage import LocalStorage, OpenStorage, Storage
from core.data.subsets import choose, read_lines
from core.errors import ConfigError, DataError

__all__ = ["ParquetReader", "class_names", "load_dataset", "preparation"]

_DIGITS, _CIFAR, _ARRAYS = ("digits", "digits-c"), ("cifar10", "cifar10-c"), ("idx", "npz")


class ParquetReader(NamedTuple):
    """What `distributed.files.parquet_images` adds.

    Attributes:
        read: a split of the data set of this name.
        names: of the classes, as the files describe them; None where they do not.
    """

    read: Callable[[str, ParquetPart], Dataset]
    names: Callable[[ParquetPart], tuple[str, ...] | None]


class _Place(NamedTuple):
    """Where a split is: a storage, what the split is called, its folder, and whether the storage holds nothing else."""

    location: str
    storage: Storage
    label: str
    folder: str
    alone: bool


def load_dataset(
    config: DatasetConfig,
    split: Split,
    *,
    open_storage: OpenStorage = LocalStorage,
    parquet: ParquetReader | None = None,
) -> Dataset:
    """Load one split of the configured data set, or the part of it that the configuration asks for.

    Jobs call `distributed.files.datasets.load_dataset`, which adds Parquet files and object stores to what is here:
    digits, CIFAR-10's pickles, idx files, NumPy arrays and folders of images on this machine.

    Raises:
        ConfigError: for a split that the configuration does not describe.
        DataError: for files that are missing or are not what they should be; names them. An image that is broken is
            no error before somebody asks for it.
    """
    part: SplitConfig = getattr(config, split)
    whole = _whole(config, part, split, open_storage, parquet)
    if not len(whole):
        raise DataError(
            f"dataset.{split}: this split of {whole.name} holds no example; set dataset.{split}.path or .split"
        )
    return choose(replace(whole, notes=whole.notes + _without_images(whole)), part, f"dataset.{split}")


def _whole(
    config: DatasetConfig, part: SplitConfig, split: Split, open_storage: OpenStorage, parquet: ParquetReader | None
) -> Dataset:
    if config.name in _DIGITS:
        clean = read_digits(split, config.test_size, config.split_seed)
        if config.corruption is None or config.severity is None or split == "train":
            return clean
        return corrupt_images(clean, config.name, config.corruption, config.severity)
    if config.name in _ARRAYS:
        return _from_arrays(config, split, open_storage)
    if config.corruption is not None and split == "train" and part.path is None:
        raise ConfigError(
            f"{config.name} has test images only; set dataset.train.path to the training images of "
            f"{config.name.removesuffix('-c')}"
        )
    place = _locate(config, part, split, open_storage)
    if config.corruption is not None and config.severity is not None and split == "test" and config.name == "cifar10-c":
        return read_cifar10_c(config.name, place.storage, config.corruption, config.severity)
    of_split = _of_split(config, split)
    if _is_parquet(config, split):
        files = _parquet_part(of_split, part, split, place)
        if parquet is None:
            raise ConfigError(f"{place.location!r} holds Parquet: load it with distributed.files.datasets.load_dataset")
        _check_parquet(files, split, place)
        if config.corruption is not None:  # ImageNet-C's folders have other names for the classes than the hub's files
            return parquet.read(of_split.name, files)
        classes = class_names(config, open_storage=open_storage, parquet=parquet)
        if classes and config.class_file is None and config.name not in _CIFAR and not parquet.names(files):
            files = files._replace(notes=(*files.notes, "labels without names, taken for those of the other split"))
        return parquet.read(
            of_split.name, files._replace(classes=classes, num_classes=len(classes) if classes else files.num_classes)
        )
    if config.name in _CIFAR:
        return read_cifar10(of_split.name, place.storage, split)
    _check_folders(config, split, place)
    classes = class_names(config, open_storage=open_storage, parquet=parquet) or ()
    return read_folders(of_split.name, place.storage, place.folder, place.label, classes, preparation(of_split))


def _from_arrays(config: DatasetConfig, split: Split, open_storage: OpenStorage) -> Dataset:
    """A split whose labels are numbers: the classes are those that both splits number."""
    names = class_names(config, open_storage=open_storage)
    known = len(names) if names else config.num_classes
    own, other = _arrays(config, split, open_storage), None
    beside: Split = "test" if split == "train" else "train"
    try:
        if config.path is not None or getattr(config, beside).path is not None:
            other = _arrays(config, beside, open_storage)
    except DataError:
        if known is None:
            raise
    where = " and ".join(dict.fromkeys(map(repr, _locations(config))))
    first, num_classes = numbering([part.labels for part in (own, other) if part is not None], known, where)
    images = own.images()
    if (images.shape[1] == 1) != config.grey:
        color = "grey" if images.shape[1] == 1 else "rgb"
        raise DataError(f"{where} holds {color} images, expected {config.color}; set dataset.color={color}")
    return Dataset(
        name=config.name,
        example_ids=tuple(f"{config.name}-{getattr(config, split).split or split}-{i:08d}" for i in range(len(images))),
        images=images,
        labels=own.labels - first,
        num_classes=num_classes,
        class_names=names,
        notes=own.notes + (f"labels 1 to {num_classes} became 0 to {num_classes - 1}",) * first,
    )


def _arrays(config: DatasetConfig, split: Split, open_storage: OpenStorage) -> Arrays:
    part: SplitConfig = getattr(config, split)
    place = _locate(config, part, split, open_storage)
    if config.name == "idx":
        return read_idx(place.storage, split, part.split)
    return read_npz(place.storage, split, place.label, place.alone)


def _without_images(data: Dataset) -> tuple[str, ...]:
    """A note of classes that the split has no image of: a folder may be empty, a line of `class_file` no class."""
    if not data.class_names:
        return ()
    names = [data.class_names[number] for number in sorted(set(range(data.num_classes)) - set(data.labels.tolist()))]
    return (f"no image of {len(names):,} of its {data.num_classes:,} classes: {shown(names)}",) if names else ()


def _of_split(config: DatasetConfig, split: Split) -> DatasetConfig:
    """The configuration of one split: training images are never corrupted."""
    if config.corruption is None or split == "test":
        return config
    return config.model_copy(update={"name": config.name.removesuffix("-c"), "corruption": None})


def _is_parquet(config: DatasetConfig, split: Split) -> bool:
    """Corrupted images are never kept in it."""
    return "parquet" in (config.name, config.layout) and (config.corruption is None or split == "train")


def _locate(config: DatasetConfig, part: SplitConfig, split: Split, open_storage: OpenStorage) -> _Place:
    location = part.path or config.path
    if location is None:
        raise ConfigError(f"dataset.path: set it (or dataset.{split}.path) to where the {split} images are")
    storage, alone = open_storage(location), part.path is not None and part.split is None
    if config.corruption is not None and split == "test":
        folder = f"{config.corruption}/{config.severity}"
        return _Place(location, storage, folder, folder, alone)
    label = part.split or ("val" if (config.name, split) == ("imagenet", "test") else split)
    return _Place(location, storage, label, "" if alone else label, alone)


def preparation(config: DatasetConfig) -> Preparation:
    """How images become pixels; ImageNet as published (Cohen et al. 2019): shorter side 256, centre crop 224."""
    resize, crop = config.resize_crop
    return Preparation(
        "grey" if config.grey else "rgb", resize, crop, config.interpolation, config.exif, config.background
    )


def class_names(
    config: DatasetConfig, *, open_storage: OpenStorage = LocalStorage, parquet: ParquetReader | None = None
) -> tuple[str, ...] | None:
    """Names of a run's classes in the order of their labels, the same for both splits; None where nothing tells them.

    They are those of `class_file`, of CIFAR-10 or the digits, or else those that the files of both splits tell: names
    of class folders in order, or the description of the training split's Parquet files. Arrays tell none.

    Raises:
        ConfigError: for a `class_file` that cannot be read.
        DataError: for a split that is not there, or names of the test split that the training split lacks.
    """
    if config.class_file is not None:
        return _class_file(config.class_file, config.num_classes)
    if config.name in _DIGITS:
        return tuple("0123456789")
    if config.name in _CIFAR:
        return CLASSES
    if config.name in _ARRAYS:
        return None
    folders, known = not _is_parquet(config, "test"), config.known_classes
    train, test = (_own_names(config, split, open_storage, parquet) for split in ("train", "test"))
    where = " and ".join(dict.fromkeys(repr(path) for path in _locations(config)))
    if train and test and train != test and (known is None or not folders):
        numbers_of(test, train, f"the test split in {where}")
    if folders:
        together = in_order([*(train or ()), *(test or ())], where)
        if together and known is not None and known != len(together):
            raise DataError(
                f"{where} has {len(together)} class folders, expected {known}: a part of them would be numbered "
                "wrongly; name all classes in dataset.class_file, or set dataset.num_classes if these are all"
            )
        return together or None
    names = train or test
    if names and known not in (None, len(names)):
        raise DataError(
            f"the Parquet files in {where} name {len(names)} classes, expected {known}; drop dataset.num_classes, or "
            "set it to that"
        )
    return names


def _own_names(
    config: DatasetConfig, split: Split, open_storage: OpenStorage, parquet: ParquetReader | None
) -> tuple[str, ...] | None:
    """What the files of one split say; None where the split is not described, has no files, or they say nothing.

    The class folders of a split that is not there say nothing where the number of classes is known: it is compared.
    """
    part: SplitConfig = getattr(config, split)
    if part.path is None and (config.path is None or (config.corruption is not None and split == "train")):
        return None
    try:
        place = _locate(config, part, split, open_storage)
    except DataError:
        if _is_parquet(config, split) or not config.known_classes:
            raise
        return None
    if not _is_parquet(config, split):
        return tuple(map(canonical, place.storage.folders(place.folder)))
    if config.corruption is not None:  # the folders of the test split have other names
        return None
    files = _parquet_part(_of_split(config, split), part, split, place)
    return parquet.names(files) if parquet is not None and files.files else None


def _locations(config: DatasetConfig) -> list[str]:
    return [path for path in (config.train.path or config.path, config.test.path or config.path) if path is not None]


def _class_file(path: str, num_classes: int | None) -> tuple[str, ...]:
    # ImageNet has two classes "crane": repeated names are an error only where they have to tell a label.
    classes = tuple(map(canonical, read_lines(path, "dataset.class_file", distinct=False)))
    if num_classes not in (None, len(classes)):
        raise ConfigError(f"dataset.num_classes is {num_classes}, but {path!r} names {len(classes)}; drop one")
    return classes


def _check_folders(config: DatasetConfig, split: Split, place: _Place) -> None:
    if place.storage.folders(place.folder):
        return
    where, there = f"{place.location.rstrip('/')}/{place.folder}", ", ".join(place.storage.folders()) or "none"
    if config.corruption is not None and split == "test":
        raise DataError(
            f"no class folders in {where} (dataset.corruption, dataset.severity); corruptions there: {there}"
        )
    raise DataError(
        f"no class folders in {where}: expected <class>/<image>; set dataset.{split}.split to the split's folder "
        f"(there: {there}), or dataset.{split}.path to it; Parquet files need dataset.layout=parquet, or "
        "dataset.name=parquet"
    )


def _parquet_part(config: DatasetConfig, part: SplitConfig, split: Split, place: _Place) -> ParquetPart:
    """Which files hold the split; none where there are none of its name."""
    label = place.label
    if config.name == "imagenet" and split == "test" and part.split is None:
        label = "validation"
    found = parquet_files(place.storage)
    if found == [""] and not place.alone:
        raise ConfigError(
            f"{place.location!r} is one Parquet file; name the files of the splits in dataset.train.path and "
            "dataset.test.path"
        )
    files = found if place.alone else files_of_split(found, label)
    alike = [path for path in found if path.rpartition("/")[2].startswith(label) and path not in files]
    return ParquetPart(
        location=place.location,
        files=tuple(files),
        label=f"{config.name}-{label}",
        digits=5 if config.name == "cifar10" else 8,
        columns=(
            config.image_column or ("img" if config.name == "cifar10" else "image"),
            config.label_column or "label",
            config.id_column,
        ),
        classes=None,
        num_classes=config.known_classes,
        preparation=preparation(config),
        notes=(f"left out, not of the split {label!r} by their names: {shown(alike)}",) if alike else (),
    )


def _check_parquet(files: ParquetPart, split: Split, place: _Place) -> None:
    if not files.files:
        raise DataError(
            f"no Parquet files of the split {files.label.partition('-')[2]!r} in {place.location!r}; set "
            f"dataset.{split}.split to what their names begin with before the number, or to their folder, or "
            f"dataset.{split}.path; files there: {shown(parquet_files(place.storage)) or 'none'}"
        )
    check_whole(files.files, place.location, f"dataset.{split}")
