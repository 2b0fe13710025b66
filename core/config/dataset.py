"""`dataset`: which images."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.config.values import Count, Section, Share

__all__ = ["DatasetConfig", "SplitConfig"]


class SplitConfig(Section):
    """Where one split of the data set is, and which part of it is taken.

    `every`, then `first`, then `share` narrow the split; or `ids_file` alone names the examples.
    """

    path: str | None = None
    """Where this split is, if not below `dataset.path`. Not part of a run's identity: data may move."""
    split: str | None = None
    """What the files call this split: its folder, the names of its Parquet files before their number or of its idx
    files before `-images` (`emnist-letters-train`), or its part of the names of NumPy arrays. `train` and `test` unless
    given; ImageNet's test images are in `val` (folders) or `validation` (Parquet), those of idx files in `t10k`,
    too."""
    every: Count = 1
    """Every so many-th example, from the first on (`--skip` of Cohen et al.)."""
    first: Count | None = None
    """So many examples from the beginning."""
    share: Share = 1.0
    """A random share, drawn with `seed`; the order stays."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of `share`."""
    ids_file: str | None = None
    """Text file of example ids, one per line; the order stays that of the data set."""


_CLASSES = {"digits": 10, "cifar10": 10, "imagenet": 1000}
# Keys of `dataset` that only some data sets have.
_CIFAR, _IMAGENET, _DIGITS = ("cifar10", "cifar10-c"), ("imagenet", "imagenet-c"), ("digits", "digits-c")
_CORRUPTED = ("digits-c", "cifar10-c", "imagenet-c")
_OWN, _ARRAYS = ("folder", "parquet"), ("idx", "npz")
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("test_size", "split_seed"), _DIGITS),
    "path": (*_CIFAR, *_IMAGENET, *_OWN, *_ARRAYS),
    "layout": (*_CIFAR, *_IMAGENET),
    **dict.fromkeys(("corruption", "severity"), _CORRUPTED),
    **dict.fromkeys(("resize", "crop", "interpolation"), (*_IMAGENET, *_OWN)),
    **dict.fromkeys(("num_classes", "class_file"), (*_IMAGENET, *_OWN, *_ARRAYS)),
    "color": (*_OWN, "npz"),
    **dict.fromkeys(("exif", "background"), (*_CIFAR, *_IMAGENET, *_OWN)),
    **dict.fromkeys(("image_column", "label_column", "id_column"), (*_CIFAR, *_IMAGENET, "parquet")),
}


class DatasetConfig(Section):
    """Which images."""

    name: Literal[
        "digits", "digits-c", "cifar10", "cifar10-c", "imagenet", "imagenet-c", "folder", "parquet", "idx", "npz"
    ] = "digits"
    """`digits`: 1,797 real 8x8 grey images that scikit-learn ships, 10 classes; `digits-c`: the same, the test images
    corrupted here; `idx`: MNIST, Fashion-MNIST, KMNIST or EMNIST as published; `folder`, `parquet` and `npz`: a set of
    your own, <split>/<class>/<image>, Parquet files with an image and a label column, or NumPy arrays."""
    path: str | None = None
    """Where it is: a folder, or an address such as s3://bucket/folder. Not part of a run's identity: data may move."""
    layout: Literal["original", "parquet"] = "original"
    """`original`: as the authors publish it (CIFAR-10's Python pickles, ImageNet's folders of JPEGs); `parquet`: as the
    Hugging Face hub keeps it."""
    test_size: Annotated[int, Field(ge=10, le=1700)] = 500
    """Digits held out for the test-time certificates; the rest is the training split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle that splits the digits."""
    corruption: str | None = None
    """Which corruption of the digits, of CIFAR-10-C or ImageNet-C, for example `gaussian_noise`. Only the test split is
    corrupted; for training, `train.path` names the clean set (digits: the clean digits)."""
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """How severe a corruption, 1 to 5."""
    resize: Annotated[int, Field(ge=0)] | None = None
    """Length of the shorter side before the crop, 0 for none; 256 for ImageNet unless given, otherwise 0."""
    crop: Annotated[int, Field(ge=0)] | None = None
    """Side of the square cut from the centre, 0 for none; 224 for ImageNet unless given, otherwise 0."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of `resize`; `bilinear` is torchvision's default and what Cohen et al. and Carlini et al. used."""
    color: Literal["rgb", "grey"] = "rgb"
    """What images are converted to; what NumPy arrays (`npz`) must be."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether images are turned upright as their EXIF data say; `ignore` (with a warning) is what torchvision does, and
    so the published numbers of ImageNet."""
    background: Annotated[int, Field(ge=0, le=255)] | None = None
    """Grey level behind transparent pixels, 0 black to 255 white; unless given, an image that has such pixels is
    refused."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; otherwise known, counted (folders; labels of `idx` and `npz`), or read from the Parquet files'
    description."""
    class_file: str | None = None
    """Text file of class names (those of the folders, or of the Parquet files' labels), one per line in the order of
    the labels; otherwise they are those of the folders, or of the Parquet files' description."""
    image_column: str | None = None
    """Parquet column of the images; `image` unless given, `img` for CIFAR-10."""
    label_column: str | None = None
    """Parquet column of the labels; `label` unless given."""
    id_column: str | None = None
    """Parquet column of the example ids; made from the row number unless given."""
    train: SplitConfig = SplitConfig()
    """The training split: labels, estimator and fine-tuning."""
    test: SplitConfig = SplitConfig()
    """The test split: certificates."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, names in _ONLY_FOR.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"dataset.{key}: means nothing for {self.name}, only for {', '.join(names)}; drop it")
        for key, part in (("train", self.train), ("test", self.test)):
            if self.name in _DIGITS and (part.path or part.split):
                raise ValueError(f"dataset.{key}: digits have neither path nor split; drop them")
            if part.split and self.name in _CIFAR and self.layout == "original":
                raise ValueError(f"dataset.{key}.split: means nothing for CIFAR-10's pickles; drop it")
            if part.ids_file is not None and (part.every, part.first, part.share) != (1, None, 1.0):
                raise ValueError(f"dataset.{key}: ids_file goes without every, first and share; drop one or the other")
        if self.name not in _DIGITS and self.path is None and self.train.path is None and self.test.path is None:
            raise ValueError(f"dataset.path: is missing; set it to where {self.name} is on this machine")
        if self.train.path is not None and (self.train.path, self.train.split) == (self.test.path, self.test.split):
            raise ValueError(
                "dataset.test.path: train and test would be the same images; give each its own path or split"
            )
        if self.name.endswith("-c") and (self.corruption is None or self.severity is None):
            raise ValueError(f"dataset.corruption: {self.name} needs it (fog, say), and dataset.severity (1 to 5)")
        resize, crop = self.resize_crop
        if resize and crop > resize:
            raise ValueError(
                f"dataset.crop: {crop} is more than dataset.resize = {resize}; lower one or raise the other"
            )
        if self.layout == "original" and self.name != "parquet":
            for key in ("image_column", "label_column", "id_column"):
                if getattr(self, key) is not None:
                    raise ValueError(f"dataset.{key}: needs dataset.layout=parquet")
        return self

    @property
    def known_classes(self) -> int | None:
        """Number of classes, where it is known without the data."""
        return self.num_classes or _CLASSES.get(self.name.removesuffix("-c"))

    @property
    def grey(self) -> bool:
        """Whether images have one channel."""
        return self.name in (*_DIGITS, "idx") or self.color == "grey"

    @property
    def resize_crop(self) -> tuple[int, int]:
        """What `resize` and `crop` come to; ImageNet as published (Cohen et al. 2019): 256 and 224."""
        resize, crop = (256, 224) if self.name == "imagenet" else (0, 0)
        return resize if self.resize is None else self.resize, crop if self.crop is None else self.crop
