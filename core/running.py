"""Running procedures over a caller's images: whose networks, which images, under which names, with which noise."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.data.dataset import PIXELS, ValueRange, as_image
from core.errors import ConfigError, DataError
from core.law import NOISES, law_of
from core.machine.engine import Engine, Task
from core.machine.exact_noise import grid_integers
from core.machine.network import Denoiser, Head, Module, Network
from core.machine.noise import make_noise
from core.machine.user_modules import direct_module
from core.progress import Progress
from core.records import CLASSIFIER, Procedure

__all__ = ["Image", "Images", "Smoothed", "listed"]

R = TypeVar("R")
Image = Tensor | NDArray[np.generic] | PIL.Image.Image
Images = Tensor | NDArray[np.generic] | Sequence[Image] | Iterator[Image] | DataLoader[Any] | Dataset[Any]


class Smoothed:
    """What both classifiers share: a network, a seed, and running procedures over images."""

    def __init__(
        self,
        heads: Mapping[str, Head],
        denoiser: Denoiser | None,
        seed: int,
        device: str | torch.device | None,
        noise: str,
        value_range: ValueRange | None,
        levels: Sequence[float],
    ):
        self.law = law_of(noise)
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise ConfigError(f"value_range must be (low, high) or None, got {value_range!r}")
        self._on_grid = noise in NOISES and noise != "gaussian"
        if self._on_grid and value_range != PIXELS:
            raise ConfigError(f"noise {noise!r} is for 8-bit images: value_range must be {PIXELS}, got {value_range!r}")
        calls = [(name, each) for name in (CLASSIFIER, *heads) for each in _networks(heads[name])]
        self.device = _device_of([*calls, ("denoiser", denoiser)], device)
        self.seed = seed
        self.noise = noise
        self.value_range = value_range
        self._network = Network(heads, denoiser, self.device)
        if noise not in NOISES:
            _check_own(noise, self.device, tuple(levels))

    def _check_chance(self) -> None:
        """Refuse PREDICT where nothing is drawn at random."""
        if self.law.exhaustive:
            raise ConfigError(f"noise {self.noise!r} decides without chance: ask for a certificate instead")

    def _run(
        self,
        images: Images,
        example_ids: Sequence[str] | None,
        batch_size: int,
        procedure: Callable[[], Procedure[R]],
        progress: bool = False,
    ) -> list[R]:
        images = listed(images)
        if example_ids is not None and len(example_ids) != len(images):
            raise ConfigError(f"got {len(images)} images but {len(example_ids)} example_ids")
        names = example_ids if example_ids is not None else [f"image {index}" for index in range(len(images))]
        tensors = [as_image(image, str(name), self.value_range) for image, name in zip(images, names, strict=True)]
        for tensor, name in zip(tensors, names, strict=True):  # here, where the caller's names are known
            if tensor.shape != tensors[0].shape:
                raise DataError(
                    f"example {str(name)!r} has shape {tuple(tensor.shape)}, {str(names[0])!r} has "
                    f"{tuple(tensors[0].shape)}: all images of a call must have one shape"
                )
            if self._on_grid:
                grid_integers(tensor, str(name))
        ids = list(map(str, example_ids)) if example_ids is not None else list(_content_ids(tensors))

        def tasks() -> Iterator[Task[R]]:
            for index, (example_id, image) in enumerate(zip(ids, tensors, strict=True)):
                yield Task(index, example_id, image, procedure())

        noise = make_noise(self.noise, self.seed)
        engine = Engine(self._network, noise, batch_size=batch_size, pad=False)
        results = {}
        with Progress(len(ids), "certify", "inputs") if progress else nullcontext() as bar:
            for finished in engine.run(tasks()):
                results[finished.key] = finished.result
                if bar is not None:
                    bar.update(1)
        return [results[index] for index in range(len(ids))]


@functools.lru_cache(maxsize=64)
def _check_own(noise: str, device: torch.device, levels: tuple[float, ...]) -> None:
    """As the jobs do of all noise: that of the user's own has been looked at by nobody else."""
    from core.machine.noise_check import check_noise  # scipy.stats takes its time

    check_noise(make_noise(noise, 0), device, levels)


def listed(images: Images) -> Sequence[Image] | Tensor | NDArray[np.generic]:
    """The images one by one: of an iterator, of a DataLoader's batches, and without the labels that stand beside them.

    Raises:
        DataError: for a single image, or batches that hold none.
    """
    if isinstance(images, PIL.Image.Image):
        raise DataError("got one PIL image, expected a sequence of images: pass [image], or use certify or predict")
    if isinstance(images, DataLoader):
        batches = [batch[0] if isinstance(batch, list | tuple) else batch for batch in images]
        if odd := next((type(batch).__name__ for batch in batches if not isinstance(batch, Tensor)), None):
            raise DataError(f"a batch of the DataLoader is a {odd}, expected images or (images, labels)")
        return [image for batch in batches for image in batch]
    if isinstance(images, Dataset):
        if not isinstance(images, Sized):
            raise DataError(f"a {type(images).__name__} has no length: pass a DataLoader of it, or a list")
        pairs = (images[index] for index in range(len(images)))
        return [pair[0] if isinstance(pair, list | tuple) else pair for pair in pairs]
    return list(images) if isinstance(images, Iterator) else images


def _networks(head: Head) -> list[Module]:
    return list(head.module.values()) if isinstance(head.module, Mapping) else [head.module]


def _device_of(calls: Sequence[tuple[str, object]], device: str | torch.device | None) -> torch.device:
    """Where all modules are; the CPU where there is none.

    Raises:
        ConfigError: for one that is elsewhere, or not where the caller wants to run: it is the caller's to move.
    """
    wanted = None if device is None else torch.empty(0, device=device).device  # "cuda" with its number
    for name, call in calls:
        module = direct_module(call)
        for tensor in (*module.parameters(), *module.buffers()) if module is not None else ():
            wanted = wanted or tensor.device
            if tensor.device != wanted:
                raise ConfigError(
                    f"the {name} is on {tensor.device}, expected all networks on {wanted}: move it yourself, "
                    f"model.to({str(wanted)!r}), or pass another device; networks are not moved here"
                )
    return wanted or torch.device("cpu")


def _content_ids(images: Sequence[Tensor]) -> Iterator[str]:
    """Name images by their content, so that the noise does not depend on their order; repeated ones get a number."""
    seen: Counter[str] = Counter()
    for image in images:
        content = image.numpy()
        digest = hashlib.blake2b(repr(content.shape).encode() + content.tobytes(), digest_size=16).hexdigest()
        yield f"{digest}#{seen[digest]}"
        seen[digest] += 1
