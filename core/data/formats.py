"""Which image files are read, and what their headers must say: Pillow rounds off or leaves out much without a word."""

import re

from PIL import Image
from PIL.ImageFile import ImageFile

__all__ = ["ENDINGS", "check_header", "orientation"]

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS))
"""Of the names of image files, in lower case."""
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_MAXVAL = re.compile(rb"P\S+(?:(?:\s|#[^\r\n]*[\r\n])+(\d+)){3}")
_ORIENTATION = 0x0112


def check_header(file: ImageFile, encoded: bytes) -> None:
    """Let an image pass whose pixels come out of Pillow as they are stored: one picture, at most 8 bits a channel.

    Raises:
        ValueError: for any other; says what it is.
    """
    if file.format not in _FORMATS:
        raise ValueError(f"a {file.format} file, expected one of {', '.join(_FORMATS)}")
    # A phone's JPEG may carry more pictures (MPO), a map of depth, say: the first is the photograph.
    if file.format != "MPO" and (frames := getattr(file, "n_frames", 1)) > 1:
        raise ValueError(f"{frames} frames or pages, expected one picture")
    depth = _depth(file, encoded)
    if depth > 8 or file.mode not in _EIGHT_BIT:
        raise ValueError(f"pixels of {depth} bits a channel, mode {file.mode!r}, expected 8 bits of grey, RGB or CMYK")


def orientation(file: Image.Image) -> int:
    """EXIF orientation, 1 (upright, also where the number is none of EXIF's) to 8.

    That of a TIFF belongs to the format, and Pillow has always applied it.
    """
    stated = 1 if file.format == "TIFF" else file.getexif().get(_ORIENTATION, 1)
    return stated if stated in range(1, 9) else 1


def _depth(file: ImageFile, encoded: bytes) -> int:
    """Bits a channel by the file's own header: Pillow's modes hide 16 bits of colour."""
    match file.format:
        case "PNG":
            if encoded[12:16] != b"IHDR":
                raise ValueError("a PNG file that does not begin with its header (IHDR)")
            depth, grey = encoded[24], encoded[25] == 0
            if grey and 1 < depth < 8 and "transparency" in file.info:  # Pillow scales the pixels, not this key
                raise ValueError(f"a transparent grey level of {depth} bits, which Pillow misreads; expected 8 bits")
            return depth
        case "PPM" if encoded[:2] not in (b"P1", b"P4"):
            header = _MAXVAL.match(encoded)
            return (int(header[1]) if header else 1 << 16).bit_length()
        case "TIFF":
            kinds = set(file.tag_v2.get(339, (1,)))  # type: ignore[attr-defined]
            if kinds - {1, 4}:
                raise ValueError("TIFF samples that are signed or floating, expected unsigned 8 bits")
            return int(max(file.tag_v2.get(258, (1,))))  # type: ignore[attr-defined]
        case "JPEG2000":
            start = encoded.find(b"\xff\x4f\xff\x51")
            num = int.from_bytes(encoded[start + 40 : start + 42], "big")
            sizes = set(encoded[start + 42 : start + 42 + 3 * num : 3])
            if start < 0 or sizes != {7}:  # depth - 1, and a sign; fewer bits come out unscaled
                raise ValueError("JPEG 2000 samples that are signed or not of 8 bits, expected unsigned 8 bits")
        case "AVIF":
            head = encoded[: max(encoded.find(b"mdat"), 0)] or encoded
            flags = [head[found.end() + 2] for found in re.finditer(b"av1C", head) if found.end() + 2 < len(head)]
            return max((12 if flag & 0x20 else 10) if flag & 0x40 else 8 for flag in [*flags, 0])
    return 8
