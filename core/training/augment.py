"""Augmentation of training images: torchvision's transforms with parameters that are a function of a key of ours."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.config.values import Augment
from core.machine.noise_key import random_of

__all__ = ["Augmentation", "augment", "draw_augmentation"]

_PAD = 4
_AREA = 0.08, 1.0
_LOG_RATIO = math.log(3 / 4), math.log(4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What is done to one image: a part is cut out, brought to the image's size, and mirrored. Its place counts from
    the edge of the image, so that a part of a padded image may begin below 0.
    """

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_augmentation(kind: Augment, size: tuple[int, int], key: bytes) -> Augmentation:
    """The augmentation of an image, with the distribution that torchvision's transforms have.

    `flip`: RandomHorizontalFlip. `crop_flip`: RandomCrop of the image's size out of the image with 4 black pixels
    around it, then the flip: CIFAR's. `resized_crop`: RandomResizedCrop (8% to all of the area, sides 3:4 to 4:3, ten
    tries) to the image's size, then the flip: ImageNet's, though of the image as the data set has it, which may be a
    crop already. The same key (`core.machine.noise_key.training_key`), the same augmentation.
    """
    height, width = size
    random = random_of(key)
    mirrored = kind != "none" and bool(random.random() < 0.5)
    if kind == "crop_flip":
        top, left = random.integers(-_PAD, _PAD, 2, endpoint=True).tolist()
        return Augmentation(top, left, height, width, mirrored)
    if kind != "resized_crop":
        return Augmentation(0, 0, height, width, mirrored)
    for _ in range(10):
        area, ratio = height * width * random.uniform(*_AREA), math.exp(random.uniform(*_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            return Augmentation(top, left, h, w, mirrored)
    # torchvision's way out: all of the image, or of a long one the middle.
    narrow, wide = (math.exp(each) for each in _LOG_RATIO)
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))
    return Augmentation((height - h) // 2, (width - w) // 2, h, w, mirrored)


def augment(image: NDArray[np.uint8], how: Augmentation) -> NDArray[np.uint8]:
    """The augmented image, uint8 ``(C, H, W)`` as it was, so that its pixels stay on the grid and in the range.

    Resized bilinearly, as torchvision does by default (a part is never larger than the image, so there is nothing to
    antialias); black where a part is outside.
    """
    from torchvision.transforms.v2 import functional

    size = image.shape[1:]
    tensor = torch.from_numpy(image)
    if (how.height, how.width) != size:
        tensor = functional.resized_crop(tensor, how.top, how.left, how.height, how.width, list(size))
    elif how.top or how.left:
        tensor = functional.crop(tensor, how.top, how.left, how.height, how.width)  # pads with zeros
    if how.mirrored:
        tensor = functional.horizontal_flip(tensor)
    out: NDArray[np.uint8] = tensor.numpy()
    return out
