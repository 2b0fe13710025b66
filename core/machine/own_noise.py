"""Noise of the user's own, `noise: module:function`: what `core.law.OwnNoise` draws is added to the image."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError
from core.law import own_noise
from core.machine.keystream import Part, words_on_host
from core.machine.noise import Copies, rows_of
from core.machine.noise_key import noise_key

__all__ = ["UserNoise"]


class UserNoise:
    """Noise of the user's own; a `core.machine.noise.Noise`. Drawn on the CPU, so that all devices see the same.

    Raises:
        ModelError, ConfigError: as `core.law.own_noise`, and for a drawing whose numbers depend on one another.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed, self._own = kind, seed, own_noise(kind)
        words = np.random.default_rng(0).integers(-(2**31), 2**31, 1001, np.int32)
        whole = self._draw(words, 0.5)
        for part in (slice(7), slice(500, None), slice(None, None, -1)):
            if not np.allclose(self._draw(words[part].copy(), 0.5), whole[part], rtol=1e-5, atol=1e-6, equal_nan=True):
                raise ConfigError(
                    f"noise {kind!r}: draw makes other noise of a word in other company; each number must come of its "
                    "own word alone, or neither are pixels independent nor is noise the same when it is drawn again"
                )

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
        """See `core.machine.noise.Noise.corrupt`: float32 sums of image and noise.

        Raises:
            ConfigError: for noise of another shape or type.
        """
        size = out[0].numel()
        for each, rows in rows_of(out, copies):
            words = np.empty(each.num * size, np.int32)
            key = noise_key(self.seed, each.example_id, each.phase, each.sigma, "own")
            words_on_host(Part(key, each.first * size, len(words)), words)
            rows.copy_(torch.from_numpy(self._draw(words, each.sigma)).view(rows.shape)).add_(each.image)

    def _draw(self, words: NDArray[np.int32], sigma: float) -> NDArray[np.float32]:
        noise = np.asarray(self._own.draw(words, sigma))
        if noise.shape != words.shape or noise.dtype != np.float32:
            raise ConfigError(
                f"noise {self.kind!r}: draw returned {noise.dtype} of shape {noise.shape} for {len(words)} words, "
                f"expected float32 of shape ({len(words)},)"
            )
        return noise
