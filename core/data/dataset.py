"""A data set: labelled images under stable names."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.formats import orientation
from core.data.images import StoredImages
from core.errors import DataError

__all__ = ["PIXELS", "Dataset", "Split", "ValueRange", "as_image", "image_hash"]

ValueRange = tuple[float, float]
PIXELS: Final[ValueRange] = (0.0, 1.0)
"""The scale of noise levels and radii for images."""

Split = Literal["train", "test"]
_DIGEST_IMAGES = 32
_MOST_CHANNELS = 4
"""A last axis this short behind two longer ones holds channels."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images, in memory or decoded when asked for.

    Attributes:
        name: as in the configuration.
        example_ids: distinct names that stay the same from run to run and machine to machine, part of the noise key.
        images: uint8 ``(N, C, H, W)``, or images that stay where they are stored.
        labels: int64 ``(N,)`` in [0, num_classes).
        num_classes: classes of the task.
        class_names: of the run, in the order of the labels; None where nobody tells them. Names may repeat.
        notes: what is worth a warning: files that were left out, say.

    Raises:
        DataError: for arrays that do not fit each other, repeated ids or a label out of range; names the example.
    """

    name: str
    example_ids: tuple[str, ...]
    images: NDArray[np.uint8] | StoredImages
    labels: NDArray[np.int64]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num, images = len(self.example_ids), self.images
        if isinstance(images, np.ndarray) and (images.ndim != 4 or images.dtype != np.uint8):
            raise DataError(
                f"{self.name}: expected {num} uint8 images (N, C, H, W), got images {images.dtype} {images.shape}"
            )
        if len(images) != num or len(self.labels) != num:
            raise DataError(
                f"{self.name}: expected {num} images and labels, one of each for an id, got {len(images)} images and "
                f"{len(self.labels)} labels"
            )
        if len(set(self.example_ids)) != num:
            repeated, times = Counter(self.example_ids).most_common(1)[0]
            raise DataError(f"{self.name}: example ids are not distinct, {repeated!r} is there {times} times")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} class names, expected {self.num_classes}, one for each class"
            )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"{self.name}: example {self.example_ids[first]!r} has label {self.labels[first]}, "
                f"expected 0 to {self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.example_ids)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every image; of stored ones without a crop, the shape of the first that can be decoded.

        Raises:
            DataError: when none can be.
        """
        if isinstance(self.images, np.ndarray):
            channels, height, width = self.images.shape[1:]
            return channels, height, width
        if self.images.shape is not None:
            return self.images.shape
        failure: DataError | None = None
        for index in range(len(self)):
            try:
                channels, height, width = self._decode(index).shape
            except DataError as error:
                failure = failure or error
            else:
                return channels, height, width
        raise DataError(f"{self.name}: none of its {len(self)} images can be read; the first: {failure}")

    def image(self, index: int) -> NDArray[np.uint8]:
        """One image, uint8 ``(C, H, W)``; decoded now if it is a stored one.

        Raises:
            DataError: when it cannot be read or has another shape than the others; names the example and its file.
        """
        image = self._decode(index)
        if image.shape != self.shape:
            raise DataError(
                f"example {self.example_ids[index]!r} has shape {image.shape}, the images of {self.name} have "
                f"{self.shape}; set dataset.resize and dataset.crop so that all get one shape"
            )
        return image

    def readable_pixels(self, places: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """The images at these places, without those that cannot be read.

        Returns:
            float32 ``(M, C, H, W)`` in [0, 1], and the places of these M.

        Raises:
            DataError: when the whole set holds no image that can be read, or the machine has not the memory.
        """
        needed = 4 * len(places) * int(np.prod(self.shape))
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > available:
            raise DataError(
                f"{self.name}: {len(places):,} images of shape {self.shape} take {needed / 2**30:,.0f} GiB as float32, "
                f"this machine has {available / 2**30:,.0f}; take a part of them (dataset.train.share or .first)"
            )
        pixels = torch.empty(len(places), *self.shape)
        read: list[int] = []
        for place in places:
            try:
                pixels[len(read)] = torch.from_numpy(self.image(place))
            except DataError:
                continue
            read.append(place)
        return pixels[: len(read)].div_(255.0), np.array(read, np.int64)

    def digest(self, sample: bool = False) -> str:
        """Fingerprint of the content: ids, labels, and the images.

        It does not depend on where the data lies or on the decoder's version. All images count that are in memory (a
        quarter of a second for CIFAR-10), unless only a `sample` is asked for. Of those that are stored, 32 evenly
        spread ones do, by their bytes: it takes a second for a million, and cannot see a change of the others. Rows of
        certificates name the image that they were computed from, see `image_hash`.

        Returns:
            32 hexadecimal digits where all images count, otherwise 16.

        Raises:
            DataError: when one of the images that it looks at cannot be read.
        """
        whole = isinstance(self.images, np.ndarray) and not sample
        digest = hashlib.sha256(f"{self.num_classes}\n".encode())
        for example_id, label in zip(self.example_ids, self.labels.tolist(), strict=True):
            digest.update(f"{example_id}\0{label}\n".encode())
        for index in range(len(self)) if whole else self._spread():
            stored = self._stored(index)
            digest.update(len(stored).to_bytes(8, "big") + stored)
        return digest.hexdigest()[: 32 if whole else 16]

    def matches(self, digest: str) -> bool:
        """Whether this is the data set of a `digest`; one of 16 digits is compared by its 32 images."""
        return self.digest(sample=len(digest) == 16) == digest

    def shared(self, other: "Dataset") -> str | None:
        """In words, what two splits share that no example of both may: an id; or labels, and the images of a sample.

        Raises:
            DataError: when an image that it looks at cannot be read.
        """
        if both := set(self.example_ids) & set(other.example_ids):
            return f"{len(both):,} example ids ({min(both)!r}), which would draw the same noise in both"
        alike = len(self) > 0 and np.array_equal(self.labels, other.labels)
        if alike and all(self._stored(index) == other._stored(index) for index in self._spread()):
            return f"all {len(self):,} images, as {self.example_ids[0]!r} and {other.example_ids[0]!r}"
        return None

    def take(self, places: Sequence[int] | NDArray[np.integer]) -> "Dataset":
        """The examples at these places, in this order."""
        chosen = np.asarray(places, np.int64)
        return replace(
            self,
            example_ids=tuple(self.example_ids[place] for place in chosen),
            images=self.images[chosen] if isinstance(self.images, np.ndarray) else self.images.take(chosen),
            labels=self.labels[chosen],
        )

    def _spread(self) -> list[int]:
        """Places of at most 32 images, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, _DIGEST_IMAGES).astype(int)).tolist() if len(self) else []

    def _decode(self, index: int) -> NDArray[np.uint8]:
        if isinstance(self.images, np.ndarray):
            image: NDArray[np.uint8] = self.images[index]
            return image
        return self.images.decode(index, self.example_ids[index])

    def _stored(self, index: int) -> bytes:
        if isinstance(self.images, np.ndarray):
            return np.ascontiguousarray(self.images[index]).tobytes()
        return self.images.read(index, self.example_ids[index])


def image_hash(pixels: NDArray[np.uint8]) -> str:
    """16 hexadecimal digits of an image as it is certified (decoded, resized, cropped): of its shape and pixels."""
    content = np.ascontiguousarray(pixels)
    return hashlib.blake2b(repr(content.shape).encode() + content.tobytes(), digest_size=8).hexdigest()


def as_image(
    image: Tensor | NDArray[np.generic] | PIL.Image.Image, name: str, value_range: ValueRange | None = PIXELS
) -> Tensor:
    """Check one image, or an input that is none, and return it as float32 on the CPU.

    Args:
        image: ``(C, H, W)``, uint8 in [0, 255] or floating in [0, 1]; or a PIL image of mode RGB or L.
        name: what messages call it.
        value_range: other bounds than [0, 1], or None for none: floating values of any shape, which are no pixels.

    Raises:
        DataError: for another shape (also one that reads as ``(H, W, C)``), dtype or mode, a non-finite pixel or one
            outside the range; names the example.
    """
    if isinstance(image, PIL.Image.Image):
        image = _pixels_of(image, name)
    try:
        tensor = image.detach().cpu().to_dense() if isinstance(image, Tensor) else _tensor_of(image)
    except (TypeError, RuntimeError) as error:
        kind = type(image).__name__ if not isinstance(image, np.ndarray) else f"an array of {image.dtype}"
        kind += " with masked values" * np.ma.is_masked(image)
        raise DataError(f"example {name!r}: expected an image as uint8 or floating pixels, got {kind}") from error
    pixels = value_range == PIXELS
    if not tensor.numel() or not tensor.ndim or (pixels and tensor.ndim != 3):
        grey = "a grey image needs its channel (image[None], images[:, None] of several), " * (tensor.ndim == 2)
        raise DataError(
            f"example {name!r}: expected one image (C, H, W), got shape {tuple(tensor.shape)}; {grey}inputs that are "
            "no images have value_range=None (or their own bounds) and any shape"
        )
    if pixels and tensor.shape[2] <= _MOST_CHANNELS < min(tensor.shape[:2]):
        raise DataError(
            f"example {name!r} has shape {tuple(tensor.shape)}, which reads as (H, W, C); use (C, H, W): "
            "image.transpose(2, 0, 1) of an array, image.permute(2, 0, 1) of a tensor"
        )
    if pixels and tensor.dtype == torch.uint8:
        return tensor.float().div_(255.0)
    if not tensor.is_floating_point():
        wanted = "uint8 or floating pixels" if pixels else "floating values"
        raise DataError(f"example {name!r}: expected {wanted}, got {tensor.dtype}")
    low, high = (float(bound) for bound in tensor.aminmax())  # NaN where any value is
    if not max(-low, high) <= torch.finfo(torch.float32).max:
        raise DataError(f"example {name!r} has non-finite {'pixels' if pixels else 'values'}")
    if value_range is not None and (low < value_range[0] or high > value_range[1]):
        if not pixels:
            raise DataError(f"example {name!r}: values span [{low!r}, {high!r}], expected {list(value_range)}")
        raise DataError(
            f"example {name!r}: pixels span [{low!r}, {high!r}], expected [0, 1]; clamp what rounding or resizing left "
            "outside, and put a normalisation into the network: noise levels and radii are in the pixel scale"
        )
    return tensor.float()


def _tensor_of(array: NDArray[np.generic]) -> Tensor:
    """The same values in the machine's byte order; TypeError for what no tensor can hold, or hidden values."""
    if np.ma.is_masked(array):
        raise TypeError("masked values")
    plain = np.ascontiguousarray(array)
    return torch.from_numpy(plain.astype(plain.dtype.newbyteorder("="), copy=False))


def _pixels_of(image: PIL.Image.Image, name: str) -> NDArray[np.uint8]:
    """uint8 ``(C, H, W)`` of an image whose pixels need no decision.

    Raises:
        DataError: for other modes than RGB and L (an alpha channel, a palette, more than 8 bits), for transparent
            pixels, and for an image that says it lies on its side.
    """
    if image.mode not in ("RGB", "L"):
        raise DataError(
            f"example {name!r} is a PIL image of mode {image.mode!r}, expected 'RGB' or 'L': convert it, for example "
            "image.convert('RGB') (which drops an alpha channel and all but 8 bits)"
        )
    if "transparency" in image.info and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(
            f"example {name!r} is a PIL image with transparent pixels: show them on a background, or drop "
            "image.info['transparency']"
        )
    if (turned := orientation(image)) != 1:
        raise DataError(
            f"example {name!r} is a PIL image with EXIF orientation {turned}: turn it with "
            "PIL.ImageOps.exif_transpose, or pass its pixels as stored, np.asarray(image).transpose(2, 0, 1)"
        )
    pixels = np.array(image, np.uint8)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
