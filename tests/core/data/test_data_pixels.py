"""Pixels as they are stored, or a refusal: files are made by hand or by Pillow, expected values by arithmetic."""

import io
import logging
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile

from core.config import DatasetConfig
from core.data import Preparation, as_image
from core.data.formats import ENDINGS, check_header
from core.errors import DataError
from distributed.files.datasets import load_dataset
from tests.core.data.test_data_folders import encoded, picture


def png(
    depth: int, color: int, row: bytes, size: tuple[int, int], transparent: bytes = b"", palette: bytes = b""
) -> bytes:
    """A PNG file of one repeated row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", transparent)] if transparent else []
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"".join(parts)
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
        + chunk(b"IEND", b"")
    )


def two(kind: str) -> bytes:
    """A file of two pictures."""
    return saved(Image.new("RGB", (2, 2)), kind, save_all=True, append_images=[Image.new("RGB", (2, 2), (9, 9, 9))])


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(values: NDArray[Any]) -> bytes:
    return saved(Image.fromarray(values), "TIFF")


SIXTEEN = np.arange(4 * 3, dtype=np.uint16).reshape(3, 4) * 300
TWELVE_RGB = np.full((2, 3, 3), 4095, ">u2")


def rgb16_tiff() -> bytes:
    """Uncompressed RGB of 16 bits a channel, 2x1, written tag by tag: Pillow writes none."""
    entries = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12)]
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        head += struct.pack("<HHI", tag, kind, count) + (
            struct.pack("<HH", value, 0) if kind == 3 and count == 1 else struct.pack("<I", value)
        )
    head += struct.pack("<I", 0)
    return (head.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)).ljust(300, b"\0") + struct.pack(
        "<6H", *range(0, 60_000, 10_000)
    )


def j2k(depth: int) -> bytes:
    """A JPEG 2000 file whose header states another depth: refused before anything is decoded."""
    content = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG2000"))
    start = content.find(b"\xff\x4f\xff\x51")
    content[start + 42 : start + 42 + 9 : 3] = bytes([depth - 1] * 3)
    return bytes(content)


DEEP = {
    "png-rgb": (png(16, 2, struct.pack(">6H", *range(6)), (2, 1)), "16 bits"),
    "png-rgba": (png(16, 6, struct.pack(">8H", *range(8)), (2, 1)), "16 bits"),
    "png-la": (png(16, 4, struct.pack(">4H", *range(4)), (2, 1)), "16 bits"),
    "png-grey": (png(16, 0, struct.pack(">2H", *range(2)), (2, 1)), "16 bits"),
    "ppm-16": (b"P6 # a comment\n3 2\n# another\n65535\n" + TWELVE_RGB.tobytes(), "16 bits"),
    "ppm-12": (b"P6\n3 2\n4095\n" + TWELVE_RGB.tobytes(), "12 bits"),
    "ppm-plain-12": (b"P3\n1 1\n4095\n0 1 2\n", "12 bits"),
    "pgm-16": (b"P5\n3 2\n65535\n" + TWELVE_RGB.tobytes()[:12], "16 bits"),
    "pfm": (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "'F'"),
    "tiff-16": (tiff(SIXTEEN), "16 bits"),
    "tiff-rgb-16": (rgb16_tiff(), "16 bits"),
    "tiff-int32": (tiff(SIXTEEN.astype(np.int32)), "signed or floating"),
    "tiff-float": (tiff(SIXTEEN.astype(np.float32)), "signed or floating"),
    "j2k-12": (j2k(12), "not of 8 bits"),
    "j2k-4": (j2k(4), "not of 8 bits"),
    "gif-two": (two("GIF"), "2 frames"),
    "webp-two": (two("WEBP"), "2 frames"),
    "apng-two": (two("PNG"), "2 frames"),
    "tiff-two": (two("TIFF"), "2 frames or pages"),
    "ico": (saved(Image.new("RGB", (16, 16)), "ICO"), "a ICO file"),
    "png-grey-4-key": (png(4, 0, b"\x3f", (2, 1), struct.pack(">H", 3)), "which Pillow misreads"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_preparation_of_more_than_eight_bits_or_one_picture_is_refused(name: str) -> None:
    content, message = DEEP[name]
    with pytest.raises(ValueError, match=message):
        Preparation()(content)


@pytest.mark.parametrize(("flags", "depth"), [(0x40, 10), (0x60, 12)])
def test_check_header_of_a_deep_avif_is_refused(flags: int, depth: int) -> None:
    """Pillow writes none, and libavif opens none whose headers disagree: the header alone is made."""
    content = saved(Image.new("RGB", (8, 8)), "AVIF")
    deep = bytearray(content)
    deep[deep.find(b"av1C") + 6] |= flags
    with Image.open(io.BytesIO(content)) as file:
        assert isinstance(file, ImageFile)
        check_header(file, content)
        with pytest.raises(ValueError, match=f"{depth} bits"):
            check_header(file, bytes(deep))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), (2, 1)), [[1, 2, 3], [4, 5, 6]]),
        (png(4, 0, b"\x3f", (2, 1)), [[51] * 3, [255] * 3]),  # 3 and 15 of 15
        (png(2, 0, b"\x60", (2, 1)), [[85] * 3, [170] * 3]),  # 1 and 2 of 3
        (png(1, 0, b"\x40", (2, 1)), [[0] * 3, [255] * 3]),
        (png(2, 3, b"\x60", (2, 1), b"\xff\xff", bytes(range(9))), [[3, 4, 5], [6, 7, 8]]),  # opaque palette
        (png(8, 6, bytes([9, 8, 7, 255, 1, 2, 3, 255]), (2, 1)), [[9, 8, 7], [1, 2, 3]]),  # opaque alpha
        (png(8, 2, bytes([9, 8, 7, 1, 2, 3]), (2, 1), struct.pack(">HHH", 9, 9, 9)), [[9, 8, 7], [1, 2, 3]]),
        (b"P6\n2 1\n15\n" + bytes([0, 5, 15, 1, 2, 3]), [[0, 85, 255], [17, 34, 51]]),
        (b"P6\n#255\n2 1\n#4095\n255\n" + bytes(range(6)), [[0, 1, 2], [3, 4, 5]]),
        (b"P4\n2 1\n\x40", [[255] * 3, [0] * 3]),
        (saved(Image.frombytes("RGB", (2, 1), bytes(range(6))), "TIFF"), [[0, 1, 2], [3, 4, 5]]),
        (saved(Image.frombytes("RGB", (2, 1), bytes(range(6))), "WEBP", lossless=True), [[0, 1, 2], [3, 4, 5]]),
        (saved(Image.frombytes("RGB", (2, 1), bytes(range(6))), "JPEG2000"), [[0, 1, 2], [3, 4, 5]]),
        (saved(Image.frombytes("L", (2, 1), bytes([7, 200])), "GIF"), [[7] * 3, [200] * 3]),
        (saved(Image.frombytes("RGB", (2, 1), bytes(range(6))), "BMP"), [[0, 1, 2], [3, 4, 5]]),
    ],
)  # fmt: skip
def test_preparation_of_eight_bits_or_fewer_is_exact(content: bytes, expected: list[list[int]]) -> None:
    assert Preparation()(content)[:, 0].T.tolist() == expected


TRANSPARENT = {
    "rgba": (png(8, 6, bytes([10, 20, 30, 255, 200, 100, 0, 77]), (2, 1)), [(10, 20, 30, 255), (200, 100, 0, 77)]),
    "la": (png(8, 4, bytes([10, 255, 200, 128]), (2, 1)), [(10, 10, 10, 255), (200, 200, 200, 128)]),
    "key": (png(8, 2, bytes([1, 2, 3, 9, 9, 9]), (2, 1), struct.pack(">HHH", 9, 9, 9)), [(1, 2, 3, 255), (9, 9, 9, 0)]),
    "palette": (png(8, 3, b"\0\1", (2, 1), bytes([255, 3]), bytes(range(6))), [(0, 1, 2, 255), (3, 4, 5, 3)]),
    "bit": (png(1, 0, b"\x40", (2, 1), struct.pack(">H", 1)), [(0, 0, 0, 255), (255, 255, 255, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_preparation_with_transparent_pixels_shows_them_on_the_background_or_refuses(name: str) -> None:
    content, layers = TRANSPARENT[name]
    with pytest.raises(ValueError, match=r"transparent pixels; set dataset\.background"):
        Preparation()(content)
    for background in (0, 128, 255):
        expected = [
            [round(Fraction(alpha * value + (255 - alpha) * background, 255)) for value in color]
            for *color, alpha in layers
        ]
        assert Preparation(background=background)(content)[:, 0].T.tolist() == expected
        if name in ("la", "bit"):  # grey in all three channels
            grey = [color[0] for color in expected]
            assert Preparation("grey", background=background)(content)[0].tolist() == [grey]


# Where the pixels of [[0, 1, 2], [3, 4, 5]] are to be seen, by the EXIF standard.
UPRIGHT = {
    1: [[0, 1, 2], [3, 4, 5]], 2: [[2, 1, 0], [5, 4, 3]], 3: [[5, 4, 3], [2, 1, 0]], 4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]], 6: [[3, 0], [4, 1], [5, 2]], 7: [[5, 2], [4, 1], [3, 0]], 8: [[2, 5], [1, 4], [0, 3]],
}  # fmt: skip
STORED = Image.frombytes("L", (3, 2), bytes(range(6)))


def turned(orientation: int, kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(STORED, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_preparation_orientation_is_applied_if_the_key_says_so(orientation: int) -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = turned(orientation, kind, **options)
        assert Preparation("grey", exif="apply")(content)[0].tolist() == UPRIGHT[orientation]
        assert Preparation("grey")(content)[0].tolist() == UPRIGHT[1]
    for exif in ("ignore", "apply"):  # TIFF: the format's own tag, applied once
        assert Preparation("grey", exif=exif)(turned(orientation, "TIFF"))[0].tolist() == UPRIGHT[orientation]


def test_preparation_orientation_of_a_jpeg_is_that_of_torchvision_unless_applied() -> None:
    image, exif = picture(3), Image.Exif()
    exif[0x0112] = 6
    content = saved(image, "JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as file:
        plain = np.asarray(file.convert("RGB"))
    assert np.array_equal(Preparation()(content), plain.transpose(2, 0, 1))
    assert np.array_equal(Preparation(exif="apply")(content), np.rot90(plain, -1).transpose(2, 0, 1))


def test_stored_images_that_carry_an_orientation_warn_once_and_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "test" / "cat"
    folder.mkdir(parents=True)
    for name, orientation in (("a", 1), ("b", 6), ("c", 3)):
        (folder / f"{name}.png").write_bytes(turned(orientation, "PNG"))
    (folder / "d.png").write_bytes(saved(STORED, "PNG", exif=b"Exif\0\0broken"))
    config = DatasetConfig(name="folder", path=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        data = load_dataset(config, "test")
        assert [data.image(index).shape for index in range(4)] == [(3, 2, 3)] * 4
        assert [record.getMessage() for record in caplog.records] == [
            "example 'test/cat/b.png': its EXIF orientation 6 is ignored, as torchvision does; dataset.exif=apply "
            "turns it (there may be more such images)"
        ]
        caplog.clear()
        upright = load_dataset(config.model_copy(update={"exif": "apply"}), "test")
        assert upright.image(2)[0].tolist() == UPRIGHT[3]
        with pytest.raises(DataError, match=r"'test/cat/b.png' has shape \(3, 3, 2\)"):
            upright.image(1)
    assert not caplog.records


def test_image_that_cannot_be_shown_as_stored_fails_alone_and_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png(8, 2, bytes(6), (2, 1)))
    (folder / "b.png").write_bytes(DEEP["png-rgb"][0])
    (folder / "c.png").write_bytes(TRANSPARENT["rgba"][0])
    config = DatasetConfig(name="folder", path=str(tmp_path))
    data = load_dataset(config, "test")
    assert data.image(0).shape == (3, 1, 2)
    for index, message in ((1, "b.png.* 16 bits"), (2, "c.png.* transparent pixels")):
        with pytest.raises(DataError, match=message):
            data.image(index)
    shown = load_dataset(config.model_copy(update={"background": 0}), "test")
    assert shown.image(2)[:, 0].T.tolist() == [[10, 20, 30], [60, 30, 0]]


def test_preparation_photograph_of_a_phone_is_the_first_picture() -> None:
    """MPO: a JPEG with a second picture behind it."""
    first, second = picture(1), picture(2)
    content = saved(first, "MPO", save_all=True, append_images=[second], quality=95)
    alone = saved(first, "JPEG", quality=95)
    assert np.array_equal(Preparation()(content), Preparation()(alone))


def test_preparation_cmyk_and_colour_profiles_are_pillows_plain_conversion() -> None:
    image = picture(4, mode="CMYK")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with_profile = saved(picture(4), "PNG", icc_profile=profile)
    assert np.array_equal(Preparation()(with_profile), Preparation()(encoded(picture(4))))
    content = saved(image, "TIFF")
    cyan, magenta, yellow, black = (np.asarray(image)[..., place].astype(int) for place in range(4))
    clipped = np.stack([255 - black - ink * (255 - black) / 255 for ink in (cyan, magenta, yellow)])
    assert np.abs(Preparation()(content) - clipped).max() <= 1


def test_endings_are_those_of_static_images() -> None:
    assert {".gif", ".jfif", ".jpe", ".jpg", ".jpeg", ".png", ".tif", ".webp", ".bmp", ".ppm"} <= set(ENDINGS)
    assert not {".pdf", ".mpg", ".eps", ".psd", ".h5", ".txt", ".npy"} & set(ENDINGS)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_preparation_orientation_that_is_none_is_upright_without_a_word(orientation: int) -> None:
    """Cameras that do not know write 0."""
    for exif in ("ignore", "apply"):
        said: list[str] = []
        assert Preparation("grey", exif=exif)(turned(orientation, "PNG"), said.append)[0].tolist() == UPRIGHT[1]
        assert not said
    image = Image.open(io.BytesIO(turned(orientation, "PNG")))
    assert as_image(image, "a").shape == (1, 2, 3)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"<!DOCTYPE html><html>"])
def test_preparation_of_no_image_says_the_same_every_time(content: bytes) -> None:
    """The words are kept with the rows."""
    with pytest.raises(ValueError, match=rf"^no image: {len(content)} bytes that begin with {content[:16]!r}$"):
        Preparation()(content)
