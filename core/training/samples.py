"""The images of a training, noised: held in memory where they fit, otherwise read and decoded as they come."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data import Dataset
from core.machine.former_noise import fill_normal
from core.machine.noise_key import training_key

__all__ = ["MEMORY_SHARE", "Samples"]

MEMORY_SHARE = 0.25
"""Of the machine's memory, for decoded images; as much for features."""


class Samples:
    """Some examples of a data set, with noise that is a function of (seed, training, epoch, example id).

    It stays that of version 1: no certificate rests on it, and the same configuration gives the weights that it gave.

    Images that are stored encoded are decoded at their first use and kept as uint8 where all of them take at most a
    quarter of the machine's memory; larger sets are decoded in every epoch.

    Args:
        data: the split.
        places: which of its examples, int64 ``(N,)``.
        name, seed: of the training and of the run, for the noise.
        processes: that hold samples on this machine.
    """

    def __init__(self, data: Dataset, places: NDArray[np.int64], name: str, seed: int, *, processes: int = 1) -> None:
        self._data, self._places, self._name, self._seed = data, places, name, seed
        in_memory = isinstance(data.images, np.ndarray)
        needed = processes * len(places) * int(np.prod(data.shape))
        fits = needed <= MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        # Not touched before it is filled, so it takes no more memory than the images that are there.
        self._held = None if in_memory or not fits else np.empty((len(places), *data.shape), np.uint8)
        self._known = np.zeros(len(places), np.bool_)
        self.threads = 1 if in_memory else min(16, max(2, (os.cpu_count() or 1) // processes))
        """That are worth having to read them."""

    def __len__(self) -> int:
        return len(self._places)

    def noisy(self, epoch: int, chosen: NDArray[np.int64], sigmas: Sequence[float] | Tensor, copies: int) -> Tensor:
        """Noisy copies of some samples: ``(copies * B, C, H, W)``, one of each sample first, then the next of each.

        Args:
            epoch: the noise is another one in each.
            chosen: ``(B,)`` numbers of samples.
            sigmas: ``(B,)`` noise level of each.
            copies: of each sample.

        Raises:
            DataError: for an image that cannot be read; names it.
        """
        noise = torch.empty(len(chosen), copies, *self._data.shape)
        for row, number in zip(noise, chosen.tolist(), strict=True):
            example_id = self._data.example_ids[self._places[number]]
            fill_normal(row.numpy(), training_key(self._seed, self._name, "noise", epoch, example_id))
        images = torch.from_numpy(np.stack([self._image(number) for number in chosen.tolist()])).float().div_(255.0)
        levels = torch.as_tensor(sigmas, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        return noise.mul_(levels).add_(images[:, None]).transpose(0, 1).reshape(-1, *self._data.shape)

    def _image(self, number: int) -> NDArray[np.uint8]:
        if self._held is None:
            return self._data.image(int(self._places[number]))
        if not self._known[number]:  # two threads at once do the same
            self._held[number] = self._data.image(int(self._places[number]))
            self._known[number] = True
        image: NDArray[np.uint8] = self._held[number]
        return image
