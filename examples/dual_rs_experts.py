"""Dual RS with experts of your own: `python examples/dual_rs_experts.py` (seconds on a CPU).

The estimator picks a noise level for each input, and the expert of that level classifies. Both choices are certified;
the radius is the smaller of the two. Here everything has a closed form, so that each certificate can be compared with
the true radius: the estimator asks for the left half of the image, the experts for its right half.
"""

import torch
from torch import Tensor

from core import DualSmoothedClassifier

SIGMAS = (0.25, 0.5)
SIZE = 8


def brightness(images: Tensor, columns: slice) -> Tensor:
    """How far half of the image is from grey, as l2 distance: the exact radius of the classifier [brightness > 0]."""
    half = images[:, :, :, columns]
    return (half - 0.5).sum(dim=(1, 2, 3)) / half[0].numel() ** 0.5


def estimator(images: Tensor) -> Tensor:
    """Logits of the noise levels: 0.5 where the left half is bright, else 0.25."""
    value = brightness(images, slice(0, SIZE // 2))
    return torch.stack([-value, value], dim=1)


def expert(images: Tensor) -> Tensor:
    """Logits of two classes: is the right half bright? One of your own networks per noise level goes here."""
    value = brightness(images, slice(SIZE // 2, SIZE))
    return torch.stack([-value, value], dim=1)


dual = DualSmoothedClassifier(estimator, {0.25: expert, 0.5: expert}, SIGMAS, sigma_e=0.5, num_classes=2)
for left, right in ((0.9, 0.6), (0.55, 0.8), (0.2, 0.3), (0.5, 0.9)):
    image = torch.full((1, SIZE, SIZE), left)
    image[:, :, SIZE // 2 :] = right
    c = dual.certify(image, num_estimation=10_000, alpha=0.001)
    exact = min(
        abs(float(brightness(image[None], columns))) for columns in (slice(0, SIZE // 2), slice(SIZE // 2, SIZE))
    )
    print(f"left {left}, right {right}: sigma {c.sigma}, class {c.prediction}, radius {c.radius:.3f}", end=" ")
    print(f"(bounded by {c.bounded_by}); exact {exact:.3f}")
    assert c.radius <= exact + 1e-9, "a certificate beyond the true radius: probability 0.001"
