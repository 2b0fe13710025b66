"""A router that reads what the classifier reads: a small head on the features of frozen classifiers."""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.classifiers import ImageClassifier
from core.models.small import SmallConvNet

__all__ = ["FeatureExtractor", "FeatureHead", "FeatureRouter", "expert_place", "new_router"]


def expert_place(levels: Iterable[float | None], sigma_e: float) -> int:
    """Which classifier serves sigma_e: the expert whose level is nearest (of two, the smaller), or the only one."""
    distances = [0.0 if level is None else abs(level - sigma_e) for level in levels]
    return distances.index(min(distances))


class FeatureExtractor(nn.Module):
    """Log-probabilities of every classifier, and the penultimate features of one; fixed, always in evaluation mode.

    Args:
        classifiers: one, or one for each sigma.
        place: of the one whose penultimate features are taken, if it is of a kind that gives them.
    """

    def __init__(self, classifiers: Sequence[nn.Module], place: int) -> None:
        super().__init__()
        self.classifiers, self.place = nn.ModuleList(classifiers), place
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def width(self, shape: Sequence[int]) -> int:
        """Number of features of images of shape ``(C, H, W)``."""
        with torch.no_grad():
            image = torch.zeros((1, *shape), device=next(self.parameters()).device)
            return int(self(image).shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> ``(B, num_features)``."""
        said, read = [], []
        for place, classifier in enumerate(self.classifiers):
            if place == self.place and _gives_features(classifier):
                assert isinstance(classifier, SmallConvNet | ImageClassifier)
                features, logits = classifier.parts(images)
                read.append(features.flatten(1))
            else:
                logits = classifier(images)
            said.append(F.log_softmax(logits, dim=1))
        return torch.cat(said + read, dim=1)


def _gives_features(classifier: nn.Module) -> bool:
    """Networks of the user's own need not have timm's methods."""
    return isinstance(classifier, SmallConvNet) or hasattr(getattr(classifier, "net", None), "forward_head")


class FeatureHead(nn.Module):
    """Standardised features, one hidden layer, one output per sigma."""

    _mean: Tensor
    _scale: Tensor

    def __init__(self, num_features: int, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.spec = {"num_features": num_features, "hidden": hidden, "num_outputs": num_outputs}
        self.num_outputs = num_outputs
        self.register_buffer("_mean", torch.zeros(num_features))
        self.register_buffer("_scale", torch.ones(num_features))
        self.layers = nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_outputs))

    def standardise(self, features: Tensor) -> None:
        """From now on inputs are taken relative to mean and standard deviation of these, ``(N, num_features)``.

        A tenth of the root mean square deviation is added (in squares), lest a feature that hardly ever fires counts
        for more than all others where it does.
        """
        values = features.double()
        variance = values.var(dim=0, correction=0)
        floor = (0.01 * variance.mean()).clamp(min=1e-12)
        self._mean.copy_(values.mean(dim=0))
        self._scale.copy_((variance + floor).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        """``(B, num_features)`` -> logits ``(B, num_outputs)``."""
        logits: Tensor = self.layers((features - self._mean) / self._scale)
        return logits


class FeatureRouter(nn.Module):
    """A head with copies of the classifiers that it reads: fine-tuning them later does not change it."""

    def __init__(self, extractor: FeatureExtractor, head: FeatureHead) -> None:
        super().__init__()
        self.extractor, self.head, self.num_outputs = extractor, head, head.num_outputs

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_outputs)``."""
        logits: Tensor = self.head(self.extractor(images))
        return logits


def new_router(
    classifiers: Sequence[nn.Module], place: int, shape: Sequence[int], hidden: int, num_outputs: int
) -> FeatureRouter:
    """A router with an untrained head for images ``(C, H, W)``; see `FeatureExtractor` (the classifiers are not copied)
    and `FeatureHead`.
    """
    extractor = FeatureExtractor(classifiers, place)
    return FeatureRouter(extractor, FeatureHead(extractor.width(shape), hidden, num_outputs)).eval()
