"""What a training learns, from which networks and data of a run: small, and sent to whoever trains."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from core.config import Config
from core.data import Dataset
from core.models.checkpoints import load_denoiser, load_model
from core.models.features import FeatureExtractor, expert_place
from core.training.base_networks import base_objective
from core.training.estimator import EstimatorObjective
from core.training.finetune import FinetuneObjective
from core.training.loop import Objective
from distributed.files.datasets import absolute
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory
from distributed.training.checkpoints import identity_of

__all__ = ["Lesson"]

_NO_PLACES, _NO_VALUES = np.empty(0, np.int64), np.empty(0)


@dataclass(frozen=True)
class Lesson:
    """What one training learns; small and picklable: names of files and numbers, neither weights nor images.

    Attributes:
        root: the run directory.
        models: where its networks are.
        name: of its folder in training/: that of the step, with the expert's level behind it.
        kind: which network, and whether it is a base network that is trained (`base`) or fine-tuned (`classifier`).
        role: of a base network, its name.
        config: the run's.
        denoiser: SHA-256 of the run's denoiser, None where it has none.
        places: int64 ``(N,)``, the examples of the training split that it may use; of a base network all.
        values: float64; the estimator's ``(N, K)`` radii, or the classifier's ``(N,)`` noise levels; of a base network
            none.
        data_digest: `Dataset.digest` of the training split.
        classifiers: SHA-256 by name of those that the estimator reads, in the order of sigma; none where it reads
            images.
    """

    root: Folder
    models: Folder
    name: str
    kind: Literal["estimator", "classifier", "base"]
    config: Config
    denoiser: str | None
    places: NDArray[np.int64] = field(repr=False)
    values: NDArray[np.float64] = field(repr=False)
    data_digest: str
    classifiers: Mapping[str, str] = field(default_factory=dict)
    role: str = ""

    @classmethod
    def of(
        cls,
        directory: RunDirectory,
        name: str,
        kind: Literal["estimator", "classifier", "base"],
        places: NDArray[np.int64] = _NO_PLACES,
        values: NDArray[np.float64] = _NO_VALUES,
        *,
        role: str = "",
        denoiser: str | None = None,
    ) -> "Lesson":
        """A training of a run whose training split has been loaded; of a base network before the step that writes it
        is finished, behind the `denoiser` that it is given.
        """
        config, base = directory.config, kind == "base"
        roles = tuple(config.classifiers) if kind == "estimator" and config.estimator.reads_features else ()
        return cls(
            root=directory.folder,
            models=directory.folder / "models" if base else directory.models,
            name=name,
            kind=kind,
            config=config.model_copy(update={"dataset": absolute(config.dataset)}),
            denoiser=denoiser if base else directory.model_hashes(config.denoisers).get("denoiser"),
            places=places,
            values=values,
            data_digest=directory.manifest["data"]["train"]["digest"],
            classifiers=directory.model_hashes(roles),
            role=role,
        )

    @property
    def folder(self) -> Folder:
        """Where its checkpoint and its curves are."""
        return self.root / "training" / self.name

    def identity(self, model: nn.Module) -> str:
        """Of its checkpoints: a training with any other identity must not go on from them."""
        origin = {
            "training": self.name,
            "fingerprint": self.config.fingerprint(),
            "denoiser": self.denoiser,
            "data": self.data_digest,
            "places": hashlib.sha256(self.places.tobytes()).hexdigest(),
            "values": hashlib.sha256(self.values.tobytes()).hexdigest(),
            **({"classifiers": dict(self.classifiers)} if self.classifiers else {}),
        }
        return identity_of(origin, model)

    def objective(self, data: Dataset, device: str, processes: int) -> Objective:
        """Its samples and its loss, with the denoiser on `device`."""
        config, code = self.config, self.config.own_code.values()
        denoiser = None
        if self.denoiser is not None and (self.kind != "estimator" or config.estimator.denoiser):
            denoiser = load_denoiser(self.models.fetch("denoiser.safetensors", self.denoiser), code=code).to(device)
        if self.kind == "base":
            return base_objective(self.config, self.role, data, denoiser, processes=processes)
        if self.kind == "estimator":
            extractor = None
            if self.classifiers:
                files = (self.models.fetch(f"{role}.safetensors", sha) for role, sha in self.classifiers.items())
                place = expert_place(config.classifiers.values(), config.estimator_sigma)
                extractor = FeatureExtractor([load_model(each, code) for each in files], place).to(device)
            return EstimatorObjective(
                data.take(self.places),
                self.values,
                config.estimator_sigma,
                denoiser,
                config.estimator,
                config.seed,
                extractor=extractor,
                certify=config.certify,
                noise=config.noise,
                processes=processes,
            )
        return FinetuneObjective(
            data,
            self.places,
            self.values,
            denoiser,
            config.finetune,
            config.seed,
            noise=config.noise,
            processes=processes,
        )
