"""Images that stay encoded where they are stored until somebody asks for them."""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from core.data.formats import check_header, orientation
from core.errors import DataError

__all__ = ["Preparation", "StoredImages"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {"rgb": "RGB", "grey": "L"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """From an encoded image to pixels: decode, convert, resize, crop; as torchvision's Resize and CenterCrop do it.

    The same file gives the same pixels wherever the versions of Pillow and of its JPEG decoder are the same.

    Attributes:
        color: `rgb` or `grey`; grey, palette and CMYK images are converted.
        resize: length of the shorter side, the longer one keeps the ratio (rounded down); 0 for none.
        crop: side of the square that is cut from the centre; 0 for none.
        interpolation: `bilinear` (torchvision's default) or `bicubic`, both antialiased.
        exif: whether the orientation that EXIF states is ignored, as torchvision does, or applied.
        background: grey level behind transparent pixels; None refuses them.
    """

    color: Literal["rgb", "grey"] = "rgb"
    resize: int = 0
    crop: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    exif: Literal["ignore", "apply"] = "ignore"
    background: int | None = None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """``(C, H, W)`` of every result, if it does not depend on the image."""
        return (3 if self.color == "rgb" else 1, self.crop, self.crop) if self.crop else None

    def __call__(self, encoded: bytes, notice: Callable[[str], None] | None = None) -> NDArray[np.uint8]:
        """Pixels of a JPEG, PNG or other image file, uint8 ``(C, H, W)``; `notice` is told of an orientation that is
        ignored.

        Raises:
            ValueError: for an image of more than 8 bits or more than one frame, with transparent pixels where there is
                no background, or smaller than the crop.
            Exception: whatever Pillow's decoders raise for bytes that are not a whole image.
        """
        if not encoded:
            raise ValueError("the image is empty; of a null in Parquet, a path beside it is not followed")
        try:
            opened = Image.open(io.BytesIO(encoded))
        except UnidentifiedImageError:  # its words hold an address, and would differ from run to run
            raise ValueError(f"no image: {len(encoded):,} bytes that begin with {encoded[:16]!r}") from None
        with opened as file:
            check_header(file, encoded)
            upright: Image.Image = file
            if self.exif == "apply":
                upright = ImageOps.exif_transpose(file)
            elif notice is not None and (turned := _stated_orientation(file)) != 1:
                notice(f"its EXIF orientation {turned} is ignored, as torchvision does; dataset.exif=apply turns it")
            image = self._on_background(upright).convert(_MODES[self.color])
        if self.resize:
            short, long = sorted(image.size)
            longer = int(self.resize * long / short)
            size = (self.resize, longer) if image.width <= image.height else (longer, self.resize)
            image = image.resize(size, _FILTERS[self.interpolation]) if image.size != size else image
        if self.crop:
            if min(image.size) < self.crop:
                raise ValueError(
                    f"{image.width}x{image.height} pixels are fewer than dataset.crop = {self.crop}; set dataset.resize"
                )
            # Python's round, half to even, as torchvision has it.
            left, top = (round((side - self.crop) / 2.0) for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.array(image, np.uint8)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])

    def _on_background(self, image: Image.Image) -> Image.Image:
        """The image itself where it is opaque; otherwise each channel as round((a c + (255 - a) background) / 255)."""
        if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
            return image
        layers = np.asarray(image.convert("RGBA"))
        alpha = layers[..., 3:].astype(np.uint16)
        if alpha.min() == 255:
            image.info.pop("transparency", None)  # Pillow warns of what it would drop
            return image
        if self.background is None:
            raise ValueError(
                "transparent pixels; set dataset.background to the grey level (0 to 255) that they are shown on"
            )
        mixed = (alpha * layers[..., :3] + (255 - alpha) * np.uint16(self.background) + 127) // 255
        return Image.fromarray(mixed.astype(np.uint8))


def _stated_orientation(file: ImageFile) -> int:
    try:
        return orientation(file)
    except Exception:  # broken EXIF, which nobody asked for, says nothing
        return 1


class StoredImages:
    """Encoded images at int64 places ``(N,)``, read and decoded one at a time: `fetch` gives the bytes at a place,
    `describe` its file (and row).
    """

    def __init__(
        self,
        places: NDArray[np.int64],
        fetch: Callable[[int], bytes],
        describe: Callable[[int], str],
        preparation: Preparation,
    ) -> None:
        self._places = places
        self._fetch = fetch
        self._describe = describe
        self._preparation = preparation
        self._noticed = False

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """``(C, H, W)`` of every image, if it can be told without reading one."""
        return self._preparation.shape

    def take(self, chosen: NDArray[np.int64]) -> "StoredImages":
        """Those at `chosen`."""
        return StoredImages(self._places[chosen], self._fetch, self._describe, self._preparation)

    def read(self, index: int, name: str) -> bytes:
        """The bytes as they are stored.

        Raises:
            DataError: when they cannot be read; names the example `name` and the file.
        """
        place = int(self._places[index])
        try:
            return self._fetch(place)
        except (OSError, ValueError) as error:
            raise DataError(f"example {name!r}: cannot read {self._describe(place)}: {error}") from error

    def decode(self, index: int, name: str) -> NDArray[np.uint8]:
        """The image, uint8 ``(C, H, W)``.

        Raises:
            DataError: when it cannot be read or decoded; names the example `name` and the file.
        """
        encoded = self.read(index, name)
        try:
            return self._preparation(encoded, None if self._noticed else partial(self._notice, name))
        except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
            raise DataError(
                f"example {name!r}: cannot decode {self._describe(int(self._places[index]))} "
                f"({type(error).__name__}: {error}); put a good file in its place, or leave the example out (ids_file)"
            ) from error

    def _notice(self, name: str, what: str) -> None:
        """Once a process and set: thousands of images may be alike."""
        self._noticed = True
        _log.warning("example %r: %s (there may be more such images)", name, what)
