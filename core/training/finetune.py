"""Fine-tuning of the classifier at each sample's own noise level (arXiv 2512.01782, section 5)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import FinetuneConfig
from core.config.training import OptimisationConfig
from core.data import Dataset
from core.machine.network import Denoiser
from core.records import ESTIMATOR, Draws, Phase, Procedure
from core.training.loop import Objective, Schedule
from core.training.samples import Samples

__all__ = ["FinetuneObjective", "choose_sigma"]


def choose_sigma(sigmas: Sequence[float], sigma_e: float, num: int) -> Procedure[float]:
    """The noise level that most of `num` noisy copies vote for; an estimate for training, without a guarantee."""
    votes = (yield Draws(sigma_e, num, (ESTIMATOR,), Phase.SELECTION))[ESTIMATOR]
    return sigmas[int(votes.argmax())]


class FinetuneObjective(Objective):
    """Cross-entropy on images noised at their own sigma, then denoised.

    Args:
        places: which examples of the data, int64 ``(N,)``.
        sigma: ``(N,)`` their levels, from `choose_sigma`.
    """

    def __init__(
        self,
        data: Dataset,
        places: NDArray[np.int64],
        sigma: NDArray[np.float64],
        denoiser: Denoiser | None,
        config: FinetuneConfig,
        seed: int,
        *,
        noise: str = "gaussian",
        processes: int = 1,
    ) -> None:
        name, how = "finetune_classifier", config.augment
        samples = Samples(data, places, name, seed, augment=how, noise=noise, processes=processes)
        same = config.model_dump(include={"batch_size", "lr", "weight_decay"})
        super().__init__(samples, Schedule(OptimisationConfig(schedule="constant", **same), config.epochs))
        self._denoiser = denoiser
        self._labels = torch.from_numpy(data.labels[places])
        self._sigma = torch.tensor(sigma, dtype=torch.float32)

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, their levels and labels."""
        sigma = self._sigma[chosen]
        return self._samples.noisy(epoch, chosen, sigma, copies=1), sigma, self._labels[chosen]

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss` of each sample."""
        noisy, sigma, labels = batch
        with torch.no_grad():
            images = noisy if self._denoiser is None else self._denoiser(noisy, sigma)
        return {"loss": F.cross_entropy(model(images), labels, reduction="none")}
