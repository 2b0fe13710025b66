"""Images that stay encoded where they are stored until somebody asks for them."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.errors import DataError

__all__ = ["Preparation", "StoredImages"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {"rgb": "RGB", "grey": "L"}
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Preparation:
    """From an encoded image to pixels: decode, convert, resize, crop; as torchvision's Resize and CenterCrop do it.

    The same file gives the same pixels wherever the versions of Pillow and of its JPEG decoder are the same.

    Attributes:
        color: `rgb` or `grey`; grey, palette and CMYK images are converted, an alpha channel is dropped.
        resize: length of the shorter side, the longer one keeps the ratio (rounded down); 0 for none.
        crop: side of the square that is cut from the centre; 0 for none.
        interpolation: `bilinear` (torchvision's default) or `bicubic`, both antialiased.
    """

    color: Literal["rgb", "grey"] = "rgb"
    resize: int = 0
    crop: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """``(C, H, W)`` of every result, if it does not depend on the image."""
        return (3 if self.color == "rgb" else 1, self.crop, self.crop) if self.crop else None

    def __call__(self, encoded: bytes) -> NDArray[np.uint8]:
        """Pixels of a JPEG, PNG or other image file, uint8 ``(C, H, W)``.

        Raises:
            ValueError: for an image of more than 8 bits, or one smaller than the crop.
            Exception: whatever Pillow's decoders raise for bytes that are not a whole image.
        """
        with Image.open(io.BytesIO(encoded)) as file:
            if file.mode not in _EIGHT_BIT:
                raise ValueError(f"pixels of mode {file.mode!r}, expected 8 bits a channel")
            image = file.convert(_MODES[self.color])
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


class StoredImages:
    """Encoded images by place, read and decoded one at a time.

    Args:
        places: int64 ``(N,)``, what `fetch` and `describe` are asked for.
        fetch: the encoded bytes at a place.
        describe: which file (and row) that is.
        preparation: makes pixels of them.
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
            return self._preparation(encoded)
        except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
            raise DataError(
                f"example {name!r}: cannot decode {self._describe(int(self._places[index]))} "
                f"({type(error).__name__}: {error}); put a good file in its place, or leave the example out (ids_file)"
            ) from error
