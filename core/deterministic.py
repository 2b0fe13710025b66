"""Deterministic experts and routers: networks whose margins certify, without a noisy copy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.data.dataset import PIXELS, ValueRange, as_image
from core.errors import ConfigError, DataError, ModelError
from core.law import Norm
from core.models.lipschitz import VerifiedNetwork, steepest_ratio
from core.procedures.composition import RouterCertificate
from core.records import ABSTAIN, Outcome
from core.running import Image, Images, listed

__all__ = ["LipschitzCertificate", "LipschitzClassifier"]

_DOWN = 1.0 - 2.0**-49
"""Sixteen roundings of float64 towards zero: more than the few that a radius is made of."""
_ROOT = math.sqrt(2.0)
"""A difference of two logits is sqrt(2) times as steep as the network."""


@dataclass(frozen=True, slots=True)
class LipschitzCertificate(Outcome):
    """The outcome of `LipschitzClassifier.certify` for one input; it holds without any exception.

    Attributes:
        prediction: class index, or ABSTAIN where the largest two logits are as good as equal. The network's largest
            logit is this one everywhere in the open l2 ball of `radius`.
        radius: the smallest of `excluded`, the prediction's aside; 0.0 where abstaining.
        excluded: for each class the radius within which its logit stays below the prediction's; 0.0 for the prediction.
        lipschitz: the constant that was proven of the network.
        norm, alpha, num_draws: l2, 0.0 and 0: nothing is drawn.
    """

    prediction: int
    radius: float
    excluded: tuple[float, ...]
    lipschitz: float
    norm: Norm = "l2"
    alpha: float = 0.0
    num_draws: int = 0

    def as_router(self) -> RouterCertificate:
        """The same, of a network whose classes are experts: how far it is from picking each.

        Where it abstains it excludes no expert; the first one stands for its choice.
        """
        return RouterCertificate(max(self.prediction, 0), self.excluded, self.norm, self.alpha, self.num_draws)


class LipschitzClassifier:
    """A network with a proven l2 Lipschitz constant L: logit k stays below logit c within (f_c - f_k) / (sqrt(2) L).

    What is certified is the class of the network as this object evaluates it, in float64 on the CPU, at every input in
    the ball: rounding at both points is counted (`VerifiedNetwork.rounding`). The weights are copied. Inputs are
    float32: others are rounded to it first, and the ball is that of the rounded one.

    Args:
        network: of layers that `core.models.lipschitz.VerifiedNetwork` knows, ``(B, C, H, W)`` -> logits.
        shape: of one input, ``(C, H, W)``.
        lipschitz: the constant that the network is meant to have, as a check: refused if more than this is proven.
        value_range: what inputs are checked against, as for `SmoothedClassifier`.

    Raises:
        ModelError: for layers whose constant is not known, or a constant beyond `lipschitz`.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        *,
        lipschitz: float | None = None,
        value_range: ValueRange | None = PIXELS,
    ) -> None:
        self.shape, self.value_range = tuple(shape), value_range
        self.network = VerifiedNetwork(network, shape)
        self.lipschitz = self.network.lipschitz
        generator = torch.Generator().manual_seed(0)
        found = steepest_ratio(self.network, torch.rand(8, *shape, generator=generator), steps=20)
        # Less what rounding may have made of it: the pairs lie within 2 sqrt(d), and not below 1e-6 apart.
        found -= 2e6 * self.network.rounding(2 * math.sqrt(math.prod(shape)))
        if found > self.lipschitz * (1 + 1e-6):
            raise ModelError(
                f"two inputs were found with a ratio of {found:.9g}, beyond the proven constant {self.lipschitz:.9g}: "
                "the proof is wrong, please report this network"
            )
        if lipschitz is not None and self.lipschitz > lipschitz * (1 + 1e-5):
            tried = "which refutes it" if found > lipschitz else "which does not refute it"
            raise ModelError(
                f"the network is said to have Lipschitz constant {lipschitz:.9g}, but what is proven is no less than "
                f"{self.lipschitz:.9g} (two inputs with a ratio of {found:.9g} were found, {tried}): constrain its "
                "weights, or leave `lipschitz` out to certify with what is proven"
            )

    def __repr__(self) -> str:
        return f"LipschitzClassifier(num_classes={self.network.num_outputs}, lipschitz={self.lipschitz:.9g})"

    def certify(self, x: Image) -> LipschitzCertificate:
        """Certify one image, ``(C, H, W)``."""
        return self.certify_many([x])[0]

    def certify_many(self, images: Images, *, batch_size: int = 1000) -> list[LipschitzCertificate]:
        """Certify many images, in order.

        Args:
            images: as for `SmoothedClassifier.certify_many`.
            batch_size: images of a forward pass.

        Raises:
            DataError: for an image of another shape, dtype, mode or range.
            ConfigError: for a batch size below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        tensors = [as_image(image, f"image {place}", self.value_range) for place, image in enumerate(listed(images))]
        for place, tensor in enumerate(tensors):
            if tensor.shape != self.shape:
                raise DataError(f"image {place} has shape {tuple(tensor.shape)}, expected {self.shape}")
        results: list[LipschitzCertificate] = []
        for start in range(0, len(tensors), batch_size):
            batch = torch.stack(tensors[start : start + batch_size]).double()
            norms = batch.flatten(1).norm(dim=1) * (1 + 2.0**-30)
            results += map(self._certificate, self.network(batch), norms.tolist())
        return results

    def _certificate(self, logits: Tensor, norm: float) -> LipschitzCertificate:
        chosen = int(logits.argmax())
        stretch = _ROOT * self.lipschitz
        leads = (logits[chosen] - logits).tolist()
        # Within the largest radius in question inputs are no larger than this, at which point rounding is worst.
        error = self.network.rounding(norm + max(leads) / max(stretch, 1e-300))
        lost = 2.0 * _ROOT * error  # at the input, and where it is moved to
        excluded = [max(0.0, (lead - lost) / max(stretch, 1e-300) * _DOWN) for lead in leads]
        excluded[chosen] = 0.0
        radius = min(value for place, value in enumerate(excluded) if place != chosen)
        if not math.isfinite(float(logits.sum())) or not radius > 0.0:
            return LipschitzCertificate(ABSTAIN, 0.0, (0.0,) * len(leads), self.lipschitz)
        return LipschitzCertificate(chosen, radius, tuple(excluded), self.lipschitz)
