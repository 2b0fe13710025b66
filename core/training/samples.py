"""The images of a training, augmented and noised: held in memory where they fit, else decoded as they come."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config.values import Augment
from core.data import Dataset
from core.machine.former_noise import fill_normal
from core.machine.noise import Copies, make_noise
from core.machine.noise_key import random_of, training_key
from core.records import Phase
from core.training.augment import augment, draw_augmentation

__all__ = ["MEMORY_SHARE", "Samples"]

MEMORY_SHARE = 0.25
"""Of the machine's memory, for decoded images; as much for features."""

Levels = float | Sequence[float] | Tensor
"""One noise level for all samples that are asked for, or ``(B,)``."""


def _fill_uniform(out: NDArray[np.float32], key: bytes) -> None:
    numbers = random_of(key).random(out.shape, np.float32)
    np.multiply(2.0 * numbers - 1.0, np.float32(np.sqrt(3.0)), out=out)


def _fill_laplace(out: NDArray[np.float32], key: bytes) -> None:
    random = random_of(key)
    random.standard_exponential(dtype=np.float32, out=out)
    out *= random.choice(np.array([-(0.5**0.5), 0.5**0.5], np.float32), out.shape)


STANDARD = {"gaussian": fill_normal, "exact": fill_normal, "uniform": _fill_uniform, "laplace": _fill_laplace}
"""What overwrites an array with the noise of a key, of standard deviation 1."""


class Samples:
    """Some examples of a data set; augmentation and noise are functions of (seed, training, epoch, example id).

    It stays that of version 1: no certificate rests on it, and the same configuration gives the weights that it gave.

    Images that are stored encoded are decoded at their first use and kept as uint8 where all of them take at most a
    quarter of the machine's memory; larger sets are decoded in every epoch.

    Args:
        data: the split.
        places: which of its examples, int64 ``(N,)``.
        name, seed: of the training and of the run, for the noise.
        augment: what is done to the images before they are noised.
        noise: its kind, as in the configuration.
        processes: that hold samples on this machine.
    """

    def __init__(
        self,
        data: Dataset,
        places: NDArray[np.int64],
        name: str,
        seed: int,
        *,
        augment: Augment = "none",
        noise: str = "gaussian",
        processes: int = 1,
    ) -> None:
        self._kind, self._corrupt = noise, None if noise in STANDARD else make_noise(noise, seed).corrupt
        self.data, self._places, self.name, self.seed, self._augment = data, places, name, seed, augment
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

    def images(self, epoch: int, chosen: NDArray[np.int64]) -> Tensor:
        """Some samples, float32 ``(B, C, H, W)`` in [0, 1], augmented in another way in each epoch.

        Raises:
            DataError: for an image that cannot be read; names it.
        """
        images = np.stack([self._augmented(epoch, number) for number in chosen.tolist()])
        return torch.from_numpy(images).float().div_(255.0)

    def noise(self, epoch: int, chosen: NDArray[np.int64], sigmas: Levels, copies: int) -> Tensor:
        """Noise of standard deviation 1 for some samples, float32 ``(B, copies, C, H, W)``, another one in each epoch.

        Gaussian, uniform and Laplace noise are the same at every level, and not rounded to 8 bits. Of others this is
        what they do to the sample at its level, divided by that.
        """
        noise = torch.empty(len(chosen), copies, *self.data.shape)
        levels = torch.as_tensor(sigmas).expand(len(chosen)).tolist()
        for row, number, sigma in zip(noise, chosen.tolist(), levels, strict=True):
            key = self._key("noise", epoch, number)
            if self._corrupt is None:
                STANDARD[self._kind](row.numpy(), key)
            else:
                image = torch.from_numpy(self._augmented(epoch, number)).float().div_(255.0)
                self._corrupt(row, [Copies(image, key.hex(), Phase.TRAINING, sigma, 0, copies)])
                row.sub_(image).div_(sigma)
        return noise

    def uniform(self, epoch: int, chosen: NDArray[np.int64]) -> Tensor:
        """A number in [0, 1) for each of some samples, float64 ``(B,)``, another one in each epoch."""
        keys = (self._key("uniform", epoch, number)[:8] for number in chosen.tolist())
        return torch.tensor([(int.from_bytes(key, "little") >> 11) * 2.0**-53 for key in keys], dtype=torch.float64)

    def noisy(self, epoch: int, chosen: NDArray[np.int64], sigmas: Levels, copies: int) -> Tensor:
        """Noisy copies of some samples: ``(copies * B, C, H, W)``, one of each sample first, then the next of each.

        All copies of a sample have the augmentation that `images` gives it in this epoch.
        """
        levels = torch.as_tensor(sigmas, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        noise, images = self.noise(epoch, chosen, sigmas, copies), self.images(epoch, chosen)
        return noise.mul_(levels).add_(images[:, None]).transpose(0, 1).reshape(-1, *self.data.shape)

    def _key(self, use: str, epoch: int, number: int) -> bytes:
        return training_key(self.seed, self.name, use, epoch, self.data.example_ids[self._places[number]])

    def _augmented(self, epoch: int, number: int) -> NDArray[np.uint8]:
        image = self._image(number)
        if self._augment == "none":
            return image
        height, width = image.shape[1:]
        return augment(image, draw_augmentation(self._augment, (height, width), self._key("augment", epoch, number)))

    def _image(self, number: int) -> NDArray[np.uint8]:
        if self._held is None:
            return self.data.image(int(self._places[number]))
        if not self._known[number]:  # two threads at once do the same
            self._held[number] = self.data.image(int(self._places[number]))
            self._known[number] = True
        image: NDArray[np.uint8] = self._held[number]
        return image
