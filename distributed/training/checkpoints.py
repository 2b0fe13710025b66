"""What a training leaves in its folder `training/<name>`: the checkpoint that it goes on from, and learning curves."""

import hashlib
import io
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from core.errors import DataError
from core.training.loop import Record
from distributed.files.storage import Folder

__all__ = ["EVERY_S", "Checkpoints", "Curves", "identity_of"]

_FILE = "checkpoint.pt"

EVERY_S = 60.0
"""Seconds between two checkpoints inside an epoch."""

_COST = 0.02
"""Share of the time that checkpoints may take: where epochs are shorter than 50 of them, not every epoch has one."""

_UPLOAD_S = 30.0


def identity_of(origin: Mapping[str, Any], model: nn.Module) -> str:
    """A digest of all that decides what a training comes to: `origin` (plain JSON), and the weights it starts from."""
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoint of one training: one file, whole or not at all, replaced by the next one.

    It is written at the end of every epoch and, in epochs longer than that, every `EVERY_S` seconds, as long as all
    writing stays under 2% of the time; and at the end. Reading it runs no code (`weights_only`).
    """

    def __init__(self, folder: Folder, identity: str) -> None:
        self._folder, self._identity = folder, identity
        self._last, self._took = time.monotonic(), 0.0

    def read(self) -> dict[str, Any] | None:
        """The state to go on from; None when there is none, or only one of another training (which is said).

        Raises:
            DataError: when the file is damaged.
        """
        try:
            content = self._folder.read(_FILE)
        except FileNotFoundError:
            return None
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            identity = state.pop("identity")
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self._folder.where(_FILE)!r} is not a checkpoint of ours, or damaged ({type(error).__name__}); "
                "remove it: the training then starts from its beginning"
            ) from error
        if identity != self._identity:
            print(
                f"{self._folder.where(_FILE)!r} is of a training with other models, labels or settings: not used",
                flush=True,
            )
            return None
        return state

    def offer(self, state: Callable[[], dict[str, Any]], *, epoch_ended: bool, ended: bool) -> None:
        """Write a checkpoint if it is time for one."""
        idle = time.monotonic() - self._last
        if ended or (idle * _COST >= self._took and (epoch_ended or idle >= EVERY_S)):
            start = time.monotonic()
            buffer = io.BytesIO()
            torch.save({"identity": self._identity, **state()}, buffer)
            self._folder.write(_FILE, buffer.getvalue())
            self._last = time.monotonic()
            self._took = self._last - start

    def forget(self) -> None:
        """Remove the file: the step that the training is part of is finished."""
        self._folder.remove(_FILE)


class Curves:
    """Context manager that writes TensorBoard files: loss, its terms, learning rate, samples per second by epoch.

    For an object store the files are made aside and uploaded every half minute, and at the end.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._writer: Any = None
        self._aside = None if folder.local else tempfile.TemporaryDirectory()
        self._last_upload = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def add(self, record: Record) -> None:
        """Add an epoch; what an earlier start wrote for this epoch or later ones is not shown any more."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            where = str(self._folder.local) if self._aside is None else self._aside.name
            again = f".{time.time_ns()}"  # a start within the same second writes a file of its own
            self._writer = SummaryWriter(where, purge_step=int(record["epoch"]), flush_secs=10, filename_suffix=again)
        for name, value in record.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(record["epoch"]))
        if time.monotonic() - self._last_upload > _UPLOAD_S:
            self._upload()

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._upload()
        if self._aside is not None:
            self._aside.cleanup()

    def _upload(self) -> None:
        if self._aside is not None and self._writer is not None:
            self._writer.flush()
            for file in Path(self._aside.name).iterdir():
                self._folder.write(file.name, file.read_bytes())
            self._last_upload = time.monotonic()
