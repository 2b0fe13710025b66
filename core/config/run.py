"""A whole run: the sections together, what has to agree between them, and what decides the numbers."""

import hashlib
import json
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.config.compute import ComputeConfig
from core.config.dataset import DatasetConfig
from core.config.models import NO_DENOISER, BaseModelsConfig, ClassifierConfig, DenoiserConfig, is_own_code
from core.config.reach import check_radii, more_draws, reach_of, stages_of, uncut_sigma_e
from core.config.steps import CertifyConfig, EstimatorConfig, FinetuneConfig, LabelConfig, ReportConfig
from core.config.training import ALL_LEVELS, DenoiserTrainConfig, OptimisationConfig, TrainConfig
from core.config.values import Count, Positive, Section
from core.errors import ConfigError, ModelError
from core.law import Law, law_of
from core.procedures.confidence import draws_needed, largest_radius
from core.procedures.multiscale import level_alphas
from core.records import CLASSIFIER, Sampling

__all__ = ["Config"]


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all noise and all training."""
    sigmas: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    """Sigma, the candidate noise levels: standard deviations in the pixel scale [0, 1], ascending."""
    sigma_e: Positive | None = None
    """Noise level of the estimator; max(sigmas) unless given. Only under certify.claim `agreement` may it be below;
    there a little above max(sigmas) lets the router exclude levels as far out as the class reaches (`--dry-run`)."""
    noise: str = "gaussian"
    """`gaussian`: float32 normal noise, as everybody does it; `exact`: integer noise on the 8-bit grid, for which the
    certificate holds in exact arithmetic too (Voracek & Hein 2023). Their radii are l2. With l1 radii, all of them
    integers on the 8-bit grid: `uniform` (Yang et al. 2020), `laplace` (Teng et al. 2019), and `splitting`, which is
    deterministic: a fixed number of copies for each sigma, and no failure probability (Levine & Feizi 2021).
    `module:function`: noise of your own (docs/extending.md)."""
    noise_version: Literal[1, 2] = 2
    """Of the noise's definition. 2: one noise on all devices. 1: that of runs begun before there was another, which
    keep it; it differs between CPU and GPU."""
    dataset: DatasetConfig = DatasetConfig()
    base: BaseModelsConfig = BaseModelsConfig()
    labels: LabelConfig = LabelConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    certify: CertifyConfig = CertifyConfig()
    report: ReportConfig = ReportConfig()
    compute: ComputeConfig = ComputeConfig()
    rounds: Count = 1
    """Rounds of the alternation (step 4 of the paper's training): labels, estimator and fine-tuning again on the
    fine-tuned classifier, each round in a run directory of its own below this one. Decides no number of the rounds
    before, so it may grow."""
    track: Literal["none", "mlflow", "wandb"] = "none"
    """A tracker that is sent the metrics of trainings, certified accuracy and the report. Its own environment variables
    say where it is and who you are (MLFLOW_TRACKING_URI; WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.sigmas) != sorted(set(self.sigmas)):
            raise ValueError(f"sigmas: must be ascending and distinct, got {list(self.sigmas)}; sort them")
        self._check_noise()
        top = max(self.sigmas)
        if self.certify.claim == "constant" and self.estimator_sigma < top:
            raise ValueError(
                f"sigma_e: must be at least max(sigmas) = {top}, got {self.sigma_e}: a smaller one caps every radius; "
                "raise it, leave it out, or use certify.claim=agreement"
            )
        pool = self.base.experts
        if pool is not None and sorted(pool) != list(self.sigmas):
            raise ValueError(
                f"base.experts: has experts for {sorted(pool)}, expected one for each of sigmas = "
                f"{list(self.sigmas)} and no other; add or drop some, or change sigmas"
            )
        if self.reach <= 0:
            raise ValueError(
                f"certify.num_estimation: {self.certify.num_estimation} draws at {stages_of(self)} cannot "
                f"certify anything, every input would abstain; {more_draws(self, 0.0)}"
            )
        labels = self.labels
        if largest_radius(top, labels.num_estimation, labels.alpha, self.law) <= 0:
            raise ValueError(
                f"labels.num_estimation: {labels.num_estimation} draws at alpha = {labels.alpha:g} cannot certify "
                f"anything; set it to at least {draws_needed(0.0, top, labels.alpha, self.law):,}"
            )
        radii = list(self.report.radii)
        if radii != sorted(set(radii)):
            raise ValueError(f"report.radii: must be ascending and distinct, got {radii}; sort them")
        grid = list(self.certify.grid)
        if grid != sorted(set(grid)):
            raise ValueError(f"certify.grid: must be ascending and distinct, got {grid}; sort them")
        try:
            level_alphas(self.certify.alpha, len(self.sigmas), self.certify.level_shares)
        except ConfigError as error:
            raise ValueError(f"certify.level_shares: {error}") from None
        compute = self.compute
        if compute.max_replicas and compute.min_replicas > compute.max_replicas:
            raise ValueError(
                f"compute.min_replicas: {compute.min_replicas} is above compute.max_replicas = {compute.max_replicas}"
            )
        if compute.train_workers and compute.executor == "local":
            raise ValueError(
                f"compute.train_workers: {compute.train_workers} workers need compute.executor=ray; with local, leave "
                "it at 0"
            )
        reference = self.certify.reference
        if reference and self.deployed.compute == compute:
            raise ValueError(
                "certify.reference: is the network that compute describes; remove it, or give the two another "
                "precision, compile or batch_size"
            )
        if self.rounds > 1 and not self.finetune.epochs:
            raise ValueError(
                f"rounds: {self.rounds} rounds, but finetune.epochs is 0: each begins with the classifier that the one "
                "before has fine-tuned; raise finetune.epochs, or set rounds to 1"
            )
        return self

    @property
    def law(self) -> Law:
        """What the noise proves."""
        return law_of(self.noise)

    @property
    def alpha(self) -> float:
        """Failure probability of a certificate: `certify.alpha`, or 0 where the noise has none."""
        return 0.0 if self.law.exhaustive else self.certify.alpha

    def _check_noise(self) -> None:
        """Refuse what goes with Gaussian noise alone.

        Raises:
            ValueError: says what to change.
        """
        try:
            law = self.law
        except (ConfigError, ModelError) as error:
            raise ValueError(str(error)) from None
        if self.noise in ("gaussian", "exact"):
            return
        if self.noise_version == 1:
            raise ValueError(f"noise_version: noise {self.noise} has no version 1; leave it out")
        if self.denoiser is not None:
            raise ValueError(
                f"base.denoiser: denoisers are for Gaussian noise, and noise is {self.noise}; set its checkpoint to "
                "none: the classifier then learns from the noisy images themselves"
            )
        trained = [own.train for own in map(self.classifier, self.classifiers) if own.train is not None]
        if any(train.loss.name == "macer" for train in trained):
            raise ValueError(f"loss macer maximises Gaussian radii, and noise is {self.noise}; take another loss")
        if law.exhaustive and self.certify.budget != "fixed":
            raise ValueError(f"certify.budget: noise {self.noise} takes all copies; set it to fixed")

    @property
    def has_experts(self) -> bool:
        """Whether there is a classifier for each sigma, rather than one for all."""
        return self.base.experts is not None

    @property
    def classifiers(self) -> dict[str, float | None]:
        """The networks that classify: `classifier` at every sigma (None), or an expert for each, `classifier-0.25`."""
        if not self.has_experts:
            return {CLASSIFIER: None}
        return {f"{CLASSIFIER}-{sigma}": sigma for sigma in self.sigmas}

    @property
    def denoisers(self) -> tuple[str, ...]:
        """`denoiser`; empty where the networks read the noisy image itself."""
        return () if self.denoiser is None else ("denoiser",)

    @property
    def base_models(self) -> tuple[str, ...]:
        """The networks that `jobs.train_base` writes."""
        return (*self.denoisers, *self.classifiers)

    @property
    def certified(self) -> dict[str, str]:
        """For each of `base_models` the network that is certified: a classifier as it was fine-tuned
        (`classifier-0.25` -> `classifier_finetuned-0.25`), or as it was where `finetune.epochs` is 0.
        """
        tuned = f"{CLASSIFIER}_finetuned" if self.finetune.epochs else CLASSIFIER
        return {role: role.replace(CLASSIFIER, tuned, 1) for role in self.base_models}

    @property
    def denoiser(self) -> DenoiserConfig | None:
        """`base.denoiser` with what stands for an unset one, and its training with the noise levels that it sees; None
        where the networks read the noisy image itself.
        """
        own = self.base.denoiser or DenoiserConfig(train=DenoiserTrainConfig())
        if own.checkpoint == NO_DENOISER:
            return None
        if own.train is None:
            return own
        return own.model_copy(update={"train": own.train.model_copy(update={"sigma": self._levels(own.train)})})

    def classifier(self, role: str) -> ClassifierConfig:
        """A network of `classifiers`, with what stands for an unset one, and its training with the noise levels that it
        sees and whether it learns clean images too.
        """
        sigma = self.classifiers[role]
        own = self.base.classifier if self.base.experts is None or sigma is None else self.base.experts[sigma]
        own = own or ClassifierConfig(train=TrainConfig())
        if own.train is None:
            return own
        clean = own.train.clean
        if clean is None:
            clean = self.denoiser is not None and own.train.loss.name == "gaussian"
        return own.model_copy(
            update={"train": own.train.model_copy(update={"sigma": self._levels(own.train, sigma), "clean": clean})}
        )

    @property
    def own_code(self) -> dict[str, str]:
        """Every `module:function` that the configuration names, by key: what may be run, and nothing else."""
        named = {key: getattr(own, "arch", None) for key, own in self.own_models.items()}
        return {f"{key}.arch": arch for key, arch in named.items() if arch and is_own_code(arch)}

    @property
    def own_models(self) -> dict[str, DenoiserConfig | ClassifierConfig]:
        """The networks that the configuration describes, by key; `none` for a denoiser is none."""
        base, denoiser = self.base, self.base.denoiser
        named: dict[str, DenoiserConfig | ClassifierConfig | None] = {
            "base.denoiser": denoiser if denoiser and denoiser.checkpoint != NO_DENOISER else None,
            "base.classifier": base.classifier,
            **{f"base.experts.{sigma}": own for sigma, own in (base.experts or {}).items()},
            "estimator.backbone": self.estimator.backbone,
        }
        return {key: own for key, own in named.items() if own is not None}

    def training_of(self, role: str) -> OptimisationConfig | None:
        """How a network of `base_models` is trained here; None where it is taken as it is."""
        own = self.denoiser if role in self.denoisers else self.classifier(role)
        return None if own is None else own.train

    @property
    def distilled_levels(self) -> tuple[float, ...]:
        """The levels that a `distilled` denoiser is trained for; none where there is no such one."""
        train = None if self.denoiser is None else self.denoiser.train
        if train is None or train.objective != "distilled":
            return ()
        return tuple(sorted({*self.sigmas, self.estimator_sigma}))

    def _levels(self, train: OptimisationConfig, sigma: float | None = None) -> tuple[float, float]:
        """The noise levels that a network trained here sees, lowest and highest.

        Those of a network for all levels do not follow `sigmas`: runs that differ in them share it.
        """
        if train.sigma is not None:
            return train.sigma
        return (sigma, sigma) if sigma is not None else ALL_LEVELS

    @property
    def stage_alphas(self) -> tuple[float, float]:
        """What Dual RS spends on the noise level, and on the class."""
        certify = self.certify
        if certify.claim == "agreement":
            return self.alpha * certify.router_share, self.alpha * (1.0 - certify.router_share)
        return (self.alpha / 2 if certify.alpha_split == "halves" else self.alpha,) * 2

    @property
    def reach(self) -> float:
        """See `core.config.reach.reach_of`."""
        return reach_of(self)

    @property
    def uncut_sigma_e(self) -> float | None:
        """See `core.config.reach.uncut_sigma_e`."""
        return uncut_sigma_e(self)

    def check_radii(self, others: float = 0.0) -> None:
        """See `core.config.reach.check_radii`."""
        check_radii(self, others)

    def sampling(self, alpha: float | None = None) -> Sampling:
        """Draws of a stage of a certificate, and what of alpha (all unless given) it may spend."""
        c, reference = self.certify, self.certify.reference
        plain = Sampling(c.num_selection, c.num_estimation, c.alpha if alpha is None else alpha, self.law)
        plain = replace(plain, bound=c.bound)
        if reference is None:
            return plain
        return replace(plain, num_reference=reference.num_draws, reference_share=reference.alpha_share)

    @property
    def deployed(self) -> Self:
        """The configuration whose own network is the one that certificates are for."""
        if (reference := self.certify.reference) is None:
            return self
        given: dict[str, Any] = {"precision": reference.precision, "compile": reference.compile}
        if reference.batch_size is not None:
            given["batch_size"] = reference.batch_size
        compute, certify = self.compute.model_copy(update=given), self.certify.model_copy(update={"reference": None})
        return self.model_copy(update={"compute": compute, "certify": certify})

    @property
    def holds_for(self) -> str:
        """The network that certificates are for, in words."""
        compute = self.deployed.compute
        compiled = ", compiled" if compute.compile else ""
        own = f"{compute.precision}{compiled}, batches of {compute.batch_size}"
        return own if self.certify.reference is None else f"the reference ({own})"

    @property
    def grid_radii(self) -> tuple[float, ...]:
        """The radii that `budget: grid` decides."""
        return self.certify.grid or self.report.radii

    @property
    def estimator_sigma(self) -> float:
        """The noise level of the estimator, sigma_e."""
        return max(self.sigmas) if self.sigma_e is None else self.sigma_e

    def identity(self) -> dict[str, Any]:
        """The part that decides a run's numbers, as plain JSON: no report, `rounds`, `track`, places."""
        return self._identity(exclude_defaults=False)

    def fingerprint(self) -> str:
        """Short hash of what differs from the defaults in `identity`, so that a later version may add keys."""
        text = json.dumps(self._identity(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _identity(self, exclude_defaults: bool) -> dict[str, Any]:
        # Data may move; what they hold is for `Dataset.digest` to say.
        where: dict[str, Any] = {"path": True, "train": {"path": True}, "test": {"path": True}}
        left_out: dict[str, Any] = {
            "report": True,
            "rounds": True,
            "track": True,
            "dataset": where,
            "certify": {"multiscale": True},
        }
        plain = self.model_dump(mode="json", exclude=left_out, exclude_defaults=exclude_defaults)
        if plain.get("certify") == {}:  # nothing else differed from the defaults
            del plain["certify"]
        for split in ("train", "test"):
            if plain.get("dataset", {}).get(split) == {}:  # nothing but its path differed from the defaults
                del plain["dataset"][split]
        compute = plain.pop("compute", {})
        # `batch_size: auto` stands here as "auto", not as the number that it came to: that is found per step, on a
        # device, long after the fingerprint has been written into the manifest, and a resumption has to arrive at the
        # same fingerprint without a device. The number is the plan's (`distributed.store.plan.Plan`), written
        # before the first row and never changed: whoever goes on, replays or audits takes it from there. So two runs
        # with one fingerprint hold the same counts if their plans name the same number; one that is given always is.
        keys = ("batch_size", "precision", "channels_last", "compile", "chunk_size", "train_threads")
        plain["compute"] = {key: compute[key] for key in keys if key in compute}
        plain["sigma_e"] = self.estimator_sigma
        plain.pop("noise_version", None)  # runs of version 1 were begun before it had a name
        if self.noise_version != 1:
            plain["noise_version"] = self.noise_version
        if self.certify.budget == "grid":
            plain["certify"]["grid"] = list(self.grid_radii)
        return plain
