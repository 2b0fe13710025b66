"""Features of noisy copies, computed once and kept: a head on them trains at the speed of a matrix product."""

import os
import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError, ModelError
from core.training.samples import MEMORY_SHARE, Samples

__all__ = ["Features"]


class Features:
    """So many noisy copies of each sample as a fixed network sees them, in float16 on the CPU.

    All copies of a sample are computed in one pass of their own, at its first use. So they are a function of the
    sample alone, to the bit: neither a resumption nor another worker, which compute them at another time and beside
    other samples, sees others.

    Args:
        extract: ``(copies, C, H, W)`` noisy images -> ``(copies, num_features)``.

    Raises:
        ConfigError: when they take more than a quarter of the machine's memory.
    """

    def __init__(
        self,
        samples: Samples,
        sigma: float,
        copies: int,
        extract: Callable[[Tensor], Tensor],
        num_features: int,
        *,
        processes: int = 1,
    ) -> None:
        self._samples, self._sigma, self.copies, self._extract = samples, sigma, copies, extract
        needed = processes * len(samples) * copies * num_features * 2
        allowed = MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > allowed:
            raise ConfigError(
                f"estimator.backbone: the features of {copies} copies of {len(samples)} samples take "
                f"{needed / 2**30:.1f} GiB on this machine, expected at most a quarter of its memory, "
                f"{allowed / 2**30:.1f} GiB; lower estimator.feature_copies (estimator.holdout_copies for those that "
                "are held out) or take a part of the training split"
            )
        # Not touched before it is filled, so it takes no more memory than the features that are there.
        self._held = torch.empty((len(samples), copies, num_features), dtype=torch.float16)
        self._known = np.zeros(len(samples), np.bool_)
        self._lock = threading.Lock()

    def batch(self, epoch: int, chosen: NDArray[np.int64], num: int) -> Tensor:
        """Copies of some samples: float16 ``(num * B, num_features)``, one of each sample first, as `Samples.noisy`.

        Copy i of an epoch is number (epoch * num + i) modulo `copies`.

        Raises:
            DataError: for an image that cannot be read; names it.
            ModelError: for features that float16 does not hold.
        """
        for number in chosen[~self._known[chosen]].tolist():
            self._fill(number)
        copies = (epoch * num + torch.arange(num)) % self.copies
        return self._held[torch.from_numpy(chosen), copies[:, None]].flatten(0, 1)

    def _fill(self, number: int) -> None:
        noisy = self._samples.noisy(0, np.array([number]), self._sigma, self.copies)
        torch.get_num_threads()  # a thread takes over the process's number at its first look
        with self._lock, torch.no_grad():
            found = self._extract(noisy).to("cpu", torch.float16)
        if not torch.isfinite(found).all():
            raise ModelError(
                "estimator.backbone: the classifier's features are not finite in float16; use another classifier, or "
                "another estimator.backbone"
            )
        self._held[number] = found
        self._known[number] = True
