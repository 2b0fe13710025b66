"""Running procedures over a caller's images: whose networks, which images, under which names, with which noise."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data import as_image
from core.errors import ConfigError, DataError
from core.machine.engine import Engine, Task
from core.machine.exact_noise import grid_integers
from core.machine.network import Denoiser, Head, Module, Network
from core.machine.noise import make_noise
from core.machine.user_modules import direct_module
from core.records import CLASSIFIER, Procedure

__all__ = ["Image", "Images", "NoiseKind", "Smoothed"]

R = TypeVar("R")
Image = Tensor | NDArray[np.generic] | PIL.Image.Image
Images = Tensor | NDArray[np.generic] | Sequence[Image]
NoiseKind = Literal["gaussian", "exact"]


class Smoothed:
    """What both classifiers share: a network, a seed, and running procedures over images."""

    def __init__(
        self,
        heads: Mapping[str, Head],
        denoiser: Denoiser | None,
        seed: int,
        device: str | torch.device | None,
        noise: NoiseKind,
    ):
        if noise not in get_args(NoiseKind):
            raise ConfigError(f"noise must be one of {get_args(NoiseKind)}, got {noise!r}")
        calls = [(name, each) for name in (CLASSIFIER, *heads) for each in _networks(heads[name])]
        self.device = _device_of([*calls, ("denoiser", denoiser)], device)
        self.seed = seed
        self.noise = noise
        self._network = Network(heads, denoiser, self.device)

    def _run(
        self,
        images: Images,
        example_ids: Sequence[str] | None,
        batch_size: int,
        procedure: Callable[[], Procedure[R]],
    ) -> list[R]:
        if isinstance(images, PIL.Image.Image):
            raise DataError("got one PIL image, expected a sequence of images: pass [image], or use certify or predict")
        if example_ids is not None and len(example_ids) != len(images):
            raise ConfigError(f"got {len(images)} images but {len(example_ids)} example_ids")
        names = example_ids if example_ids is not None else [f"image {index}" for index in range(len(images))]
        tensors = [as_image(image, str(name)) for image, name in zip(images, names, strict=True)]
        for tensor, name in zip(tensors, names, strict=True):  # here, where the caller's names are known
            if tensor.shape != tensors[0].shape:
                raise DataError(
                    f"example {str(name)!r} has shape {tuple(tensor.shape)}, {str(names[0])!r} has "
                    f"{tuple(tensors[0].shape)}: all images of a call must have one shape"
                )
            if self.noise == "exact":
                grid_integers(tensor, str(name))
        ids = list(map(str, example_ids)) if example_ids is not None else list(_content_ids(tensors))

        def tasks() -> Iterator[Task[R]]:
            for index, (example_id, image) in enumerate(zip(ids, tensors, strict=True)):
                yield Task(index, example_id, image, procedure())

        noise = make_noise(self.noise, self.seed)
        engine = Engine(self._network, noise, batch_size=batch_size)
        results = {finished.key: finished.result for finished in engine.run(tasks())}
        return [results[index] for index in range(len(ids))]


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
