"""Residual networks for images of 32 pixels (He et al. 2016, arXiv 1512.03385, section 4.2): timm has none.

Names and shortcuts (a 1x1 convolution where the width changes) are those of Cohen et al. (2019, locuslab/smoothing), so
their checkpoints load.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNetCifar"]


class _BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _BasicBlock(width_in, width, stride)
    return nn.Sequential(first, *(_BasicBlock(width, width, 1) for _ in range(blocks - 1)))


class ResNetCifar(nn.Module):
    """6n + 2 layers in three stages of n blocks, 16, 32 and 64 channels wide; n = 18 is ResNet-110."""

    def __init__(self, num_classes: int = 10, channels: int = 3, blocks: int = 18) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)``, normalised, any size -> logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm's: up to the last stage."""
        x = F.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's: the pooled features, or the logits."""
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pooled if pre_logits else self.fc(pooled)
