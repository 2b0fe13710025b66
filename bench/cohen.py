"""What people run now, written for the bench: the loop of Cohen et al. with Carlini et al.'s denoiser in front.

One image at a time, n0 copies and then n, one noise level at a time, votes brought to the host after every batch,
nothing shared between images. It takes nothing of this project but the two networks themselves: not the engine, the
procedures, the noise, the bounds, or the denoiser's schedule.

As the original (locuslab/smoothing, core.py) does it, down to the counting of votes in Python.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, norm
from torch import Tensor, nn

__all__ = ["ABSTAIN", "Smooth", "denoise_and_classify"]

ABSTAIN = -1


class Smooth:
    """A smoothed classifier, after Cohen et al. 2019.

    Args:
        base_classifier: ``(B, C, H, W)`` noisy images -> logits.
        num_classes: of them.
        sigma: noise level.
        draw: ``(B, C, H, W)`` standard normal numbers; another source of noise for tests.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        num_classes: int,
        sigma: float,
        draw: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        self.base_classifier, self.num_classes, self.sigma, self.draw = base_classifier, num_classes, sigma, draw

    def certify(self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int) -> tuple[int, float]:
        """Class and radius, or ABSTAIN and 0; wrong with probability at most alpha."""
        top_class = int(self._sample_noise(x, n0, batch_size).argmax())
        votes = int(self._sample_noise(x, n, batch_size)[top_class])
        p_lower = float(beta.ppf(alpha, votes, n - votes + 1)) if votes else 0.0
        if p_lower <= 0.5:
            return ABSTAIN, 0.0
        return top_class, self.sigma * float(norm.ppf(p_lower))

    @torch.no_grad()
    def _sample_noise(self, x: Tensor, num: int, batch_size: int) -> NDArray[np.int64]:
        counts = np.zeros(self.num_classes, dtype=np.int64)
        for _ in range(math.ceil(num / batch_size)):
            this_batch_size = min(batch_size, num)
            num -= this_batch_size
            batch = x.repeat((this_batch_size, 1, 1, 1))
            noise = self.draw(batch) * self.sigma
            predictions = self.base_classifier(batch + noise).argmax(1)
            for vote in predictions.cpu().numpy():
                counts[vote] += 1
        return counts


def denoise_and_classify(
    unet: nn.Module, classifier: nn.Module, sigma: float, schedule: str, num_steps: int, device: str
) -> Callable[[Tensor], Tensor]:
    """Carlini et al. 2022: one step of a diffusion model at the timestep whose noise is that of smoothing.

    Args:
        unet: predicts the noise of images in [-1, 1] (a diffusers model).
        classifier: images in [0, 1] -> logits.
        sigma: noise level of the images, in the scale [0, 1].
        schedule: `linear` or `cosine`.
        num_steps: of it; the network is asked for the timestep out of 1000, as OpenAI's are.
        device: of the networks.
    """
    if schedule == "linear":
        betas = np.linspace(0.1 / num_steps, 20.0 / num_steps, num_steps)
    else:
        level = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    kept = np.cumprod(1 - betas)
    t = 1
    while math.sqrt((1 - kept[t]) / kept[t]) < 2 * sigma:
        t += 1
    signal, noise = math.sqrt(kept[t]), math.sqrt(1 - kept[t])
    step = torch.tensor(t * 1000.0 / num_steps, device=device)

    def classify(x: Tensor) -> Tensor:
        x_t = signal * (2 * x - 1)
        predicted = unet(x_t, step).sample[:, : x.shape[1]]
        clean = torch.clamp((x_t - noise * predicted) / signal, -1, 1)
        logits: Tensor = classifier((clean + 1) / 2)
        return logits

    return classify
