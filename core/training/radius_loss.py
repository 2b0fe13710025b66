"""Training for the agreement claim: T = min over levels j of max(E_j, R_j), in a form that has a gradient.

E_j is how far the router cannot reach level j, R_j how far the classifier at level j answers the label. A router is
worth its T (docs/guarantees.md), so T itself is what `estimator.loss: radius` maximises; it is not convex, and from
random weights it falls into a router that always answers the same. `expected_radius`, the radius of the level that a
single noisy copy picks, is a cost-sensitive loss without that fault: the way there.
"""

import math

import torch
from torch import Tensor

from core.config import EstimatorConfig
from core.errors import ConfigError
from core.law import GAUSSIAN, Gaussian, Laplace, Law, Uniform

__all__ = ["expected_radius", "joint_radius", "largest_share", "radius_losses", "voted_radius"]

_BLUR = 0.05
"""How far from a radius asked for T still counts, pixel scale [0, 1]: the width of the sigmoid."""


def largest_share(num: int, alpha: float) -> float:
    """The largest probability that `num` draws can show at `alpha`, all of them agreeing: alpha^(1/num)."""
    return math.exp(math.log(alpha) / num) if alpha else 1.0


def _quantile(p: Tensor, law: Law) -> Tensor:
    """`Law.quantile`, with a gradient."""
    match law:
        case Gaussian():
            quantile: Tensor = torch.special.ndtri(p)
            return quantile
        case Uniform():
            return 2.0 * p - 1.0
        case Laplace():
            return -torch.sign(p - 0.5) * torch.log(2.0 * torch.minimum(p, 1.0 - p))
    raise ConfigError(
        "estimator.loss: radius and expected_radius know the noises of this package; train on a noise of your own with "
        "loss=consistency"
    )


def expected_radius(logits: Tensor, radii: Tensor) -> Tensor:
    """``(B,)`` radius R_j ``(B, K)`` of a level drawn from the softmax of logits ``(m, B, K)``, averaged over the
    copies.
    """
    return (logits.softmax(dim=2) * radii.clamp(min=0.0)).sum(dim=2).mean(dim=0)


def joint_radius(
    logits: Tensor, radii: Tensor, sigma_e: float, largest: float, temperature: float, law: Law = GAUSSIAN
) -> Tensor:
    """``(B,)`` T of the router that votes as the mean of the copies' softmax says, smoothly.

    E_j = sigma_e Phi^-1(q) (under another noise what its law says), q the larger of P[h < j] and P[h > j], scaled from
    [0, 1] into [1 - largest, largest]: no vote is worth more than a test can show, and the gradient ends nowhere.
    Maximum and minimum are log-sum-exps: exact where the values lie apart, off by at most temperature log 2 upwards and
    temperature log K downwards.

    Args:
        logits: ``(m, B, K)`` of m noisy copies.
        radii: ``(B, K)`` R_j, sigma ascending; below 0 where the class is behind by so much (`shrunk_radii`). T is then
            below 0 where the router picks such a level, by the smaller of how far it is from another and how far the
            class is behind. With 0 instead, a sample that is routed wrongly has no gradient, and all end at one level.
        sigma_e: noise level of the router.
        largest: see `largest_share`.
        temperature: of maximum and minimum, a radius in the pixel scale [0, 1].
        law: of the noise.
    """
    p = logits.softmax(dim=2).mean(dim=0)
    up_to = p.cumsum(dim=1)
    excluded = torch.maximum(up_to - p, 1.0 - up_to)
    share = (1.0 - largest) + (2.0 * largest - 1.0) * excluded.clamp(0.0, 1.0)
    reach = float(law.scale(sigma_e)) * _quantile(share, law)
    levels = torch.logaddexp(reach / temperature, radii / temperature)
    return -temperature * torch.logsumexp(-levels, dim=1)


def voted_radius(votes: Tensor, radii: Tensor, sigma_e: float, largest: float, law: Law = GAUSSIAN) -> Tensor:
    """``(B,)`` float64 T that votes ``(B, K)``, k of n as (k + 1/2) / (n + 1), promise with radii R_j ``(B, K)``, 0
    where none: hard, and an estimate, no bound. The other arguments are those of `joint_radius`.
    """
    up_to = votes.cumsum(dim=1)
    num = up_to[:, -1:]
    excluded = torch.maximum(up_to - votes, num - up_to)
    share = ((excluded.double() + 0.5) / (num + 1)).clamp(max=largest)
    reach = float(law.scale(sigma_e)) * _quantile(share, law)
    return torch.maximum(reach, radii.double()).amin(dim=1).clamp(min=0.0)


def radius_losses(
    logits: Tensor,
    radii: Tensor,
    warming: Tensor,
    sigma_e: float,
    largest: float,
    config: EstimatorConfig,
    law: Law = GAUSSIAN,
) -> dict[str, Tensor]:
    """The `loss` of each sample under `expected_radius` or `radius`, in float64, and the two radii in the pixel scale
    [0, 1]: `expected_radius` and, smooth, `radius`.

    A sample that is `warming` ``(B,)`` still trains with `expected_radius`. The other arguments are those of
    `joint_radius`.
    """
    logits, radii = logits.double(), radii.double()
    expected = expected_radius(logits, radii)
    joint = worth = joint_radius(logits, radii, sigma_e, largest, config.temperature * sigma_e, law)
    if config.radii:
        asked = torch.tensor(config.radii, dtype=joint.dtype, device=joint.device)
        worth = torch.sigmoid((joint[:, None] - asked) / _BLUR).mean(dim=1)
    loss = -expected if config.loss == "expected_radius" else -torch.where(warming, expected, worth)
    return {"loss": loss, "expected_radius": expected, "radius": joint}
