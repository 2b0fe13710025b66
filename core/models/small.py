"""A small convolutional network for images of a few pixels, where timm has none."""

import math
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

__all__ = ["SmallConvNet"]


class SmallConvNet(nn.Module):
    """Three convolutions and a linear layer.

    Args:
        width: channels of the first layer; the others have twice as many.
        stride: of the first layer, whose kernel is ``2 * stride + 1``.
    """

    def __init__(self, channels: int, size: int, num_outputs: int, width: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.spec = {"channels": channels, "size": size, "num_outputs": num_outputs, "width": width}
        if stride > 1:  # left out otherwise: the files of earlier versions stay as they are, to the byte
            self.spec["stride"] = stride
        self.num_outputs = num_outputs
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 2 * stride + 1, stride=stride, padding=stride),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * math.ceil(size / stride / 2) ** 2, num_outputs),
        )

    @classmethod
    def for_images(cls, shape: Sequence[int], num_outputs: int, width: int) -> Self:
        """For images of shape ``(C, H, W)``; from 24 pixels on, the first layer halves them: ten times as fast."""
        return cls(shape[0], shape[1], num_outputs, width, stride=2 if shape[1] >= 24 else 1)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_outputs)``."""
        logits: Tensor = self.layers(2 * images - 1)
        return logits

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer reads, and the logits."""
        features: Tensor = self.layers[:-1](2 * images - 1)
        return features, self.layers[-1](features)
