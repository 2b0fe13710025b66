"""The words that the rooms exchange: what a procedure asks for, what it is sent, and what it returns."""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.law import GAUSSIAN, Law, Norm

__all__ = [
    "ABSTAIN",
    "AUXILIARY",
    "CLASSIFIER",
    "ESTIMATOR",
    "AlphaSplit",
    "Answer",
    "Bound",
    "Certificate",
    "Counts",
    "Draws",
    "DualCertificate",
    "DualPrediction",
    "Outcome",
    "Phase",
    "Prediction",
    "Procedure",
    "Record",
    "Rule",
    "Sampling",
    "Stop",
    "divided",
    "is_paired",
    "paired",
    "stage_sampling",
]

ABSTAIN: Final = -1
"""The prediction of a procedure that could not decide; its radius is 0."""

ESTIMATOR: Final = "estimator"
CLASSIFIER: Final = "classifier"

AUXILIARY: Final = "auxiliary"
"""In an answer: one integer in [0, 2^53), uniform and independent of all noise (`core.machine.noise_key.auxiliary`)."""

_PAIRED = "/reference"


def paired(head: str) -> str:
    """The head that votes for what `head` votes for and the reference does not (`core.machine.reference`)."""
    return head + _PAIRED


def is_paired(head: str) -> bool:
    """Whether this is such a head."""
    return head.endswith(_PAIRED)


Counts = NDArray[np.int64]
"""Votes per class, shape ``(num_classes,)``. Draws with non-finite logits vote for no class."""

Answer = Mapping[str, Counts]
"""What the engine sends back for one `Draws`: the counts of each head that was asked."""


class Phase(StrEnum):
    """What noise is drawn for. Phases never share a draw, so that a bound never sees the draws that chose its class."""

    SELECTION = "selection"
    ESTIMATION = "estimation"
    PREDICTION = "prediction"
    TRAINING = "training"


@dataclass(frozen=True, slots=True)
class Draws:
    """A request for the votes of `num` noisy copies of the procedure's input.

    Attributes:
        sigma: standard deviation of the noise, pixel scale [0, 1].
        num: number of noisy copies.
        heads: networks that vote on each copy; several heads read the same (denoised) copy.
        phase: noise of different phases is independent.
        start: number of the first copy; a later request of the same sigma and phase goes on where the last one ended.
        auxiliary: whether the answer has, under AUXILIARY, the number of `core.machine.noise_key.auxiliary` too.
        ahead: requests that will follow whatever the votes are, so they may be drawn at once; no part of this one.
    """

    sigma: float
    num: int
    heads: tuple[str, ...]
    phase: Phase
    start: int = 0
    auxiliary: bool = False
    ahead: tuple["Draws", ...] = field(default=(), compare=False, repr=False)


R = TypeVar("R")
Procedure = Generator[Draws, Answer, R]
"""A certification algorithm: yields `Draws`, is sent an `Answer`, returns its result."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many noisy copies a certificate may use, and how often it may be wrong.

    Attributes:
        num_selection: copies that choose the class (Cohen's n0).
        num_estimation: fresh copies that bound its probability (Cohen's n).
        alpha: failure probability in (0, 1); 0 under an exhaustive law, whatever is given.
        law: what the noise proves.
        num_reference: the first estimation copies, which the reference sees too; 0 where the network that votes is the
            one that is certified (`core.procedures.smoothing.stage_bound`).
        reference_share: share of alpha, in (0, 1), for how often the two disagree.
        bound: `randomized`: see `core.procedures.randomized`.

    Raises:
        ConfigError: for a number of copies below 1, or an alpha outside (0, 1).
    """

    num_selection: int = 100
    num_estimation: int = 10_000
    alpha: float = 0.001
    law: Law = GAUSSIAN
    num_reference: int = 0
    reference_share: float = 0.5
    bound: Literal["clopper_pearson", "randomized"] = "clopper_pearson"

    def __post_init__(self) -> None:
        for name in ("num_selection", "num_estimation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.law.exhaustive:
            object.__setattr__(self, "alpha", 0.0)
        elif not 0.0 < self.alpha < 1.0:
            raise ConfigError(f"alpha is a failure probability and must lie in (0, 1), got {self.alpha!r}")
        if not self.plain and self.law.exhaustive:
            raise ConfigError("noise that is drawn in full has no bound: neither a reference nor the randomised one")
        if not 0 <= self.num_reference <= self.num_estimation:
            raise ConfigError(f"num_reference must lie in [0, {self.num_estimation}], got {self.num_reference!r}")

    @property
    def plain(self) -> bool:
        """Whether it is Clopper-Pearson's bound of the network that votes: what all methods and budgets know."""
        return not self.num_reference and self.bound == "clopper_pearson"

    def at(self, sigma: float) -> "Sampling":
        """What is drawn at a noise level: all copies that there are, where the law asks for them."""
        return replace(self, num_estimation=self.law.copies(sigma)) if self.law.exhaustive else self


AlphaSplit = Literal["halves", "full"]
"""How Dual RS spends alpha.

`halves`: alpha / 2 on each stage, as published (theorem 4.2, a union bound). `full`: alpha on each. Given the selection
draws it is fixed which stage has the smaller true radius, and min(R_sigma, R_c) is too large only if that one stage
errs: the joint claim fails with probability at most the larger of the two, not their sum. What is given up is that both
stages' own radii hold jointly; each of them still holds with probability 1 - alpha.
"""


def stage_sampling(sampling: Sampling, split: AlphaSplit) -> Sampling:
    """What one stage of Dual RS may spend."""
    return replace(sampling, alpha=sampling.alpha / 2) if split == "halves" else sampling


def divided(sampling: Sampling, share: float) -> dict[str, Sampling]:
    """What the estimator may spend, a share of alpha, and the classifier: no more in all, in floating point too."""
    first = sampling.alpha * share
    second = first if share == 0.5 else math.nextafter(sampling.alpha - first, 0.0)
    return {ESTIMATOR: replace(sampling, alpha=first), CLASSIFIER: replace(sampling, alpha=second)}


class Bound(StrEnum):
    """Which of the two radii of Dual RS is the smaller one."""

    SIGMA = "sigma"
    CLASS = "class"
    NONE = "none"


class Stop(StrEnum):
    """Why the estimation draws of a certificate ended."""

    FULL = "full"
    """All of them were drawn; the bound is Clopper-Pearson."""
    REACHED = "reached"
    """The target radius was shown early, by the e-process."""
    FUTILE = "futile"
    """The draws that were left could not have shown the next target (or could not have certified anything)."""
    UNLIKELY = "unlikely"
    """They could have, but it was unlikely by more standard deviations than the rule allows."""
    SKIPPED = "skipped"
    """None was drawn: the other stage had abstained."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a sequential certificate may stop early.

    Attributes:
        look_every: estimation draws between two looks at the votes.
        early_share: share of alpha for stopping early (e-process), below 0.49; the rest is for the last look.
        futility_z: stop when the next target is this many standard deviations out of reach; smaller stops sooner and
            loses more targets, infinity stops only when it cannot be reached. Never touches the guarantee.

    Raises:
        ConfigError: for values out of range.
    """

    look_every: int = 100
    early_share: float = 0.1
    futility_z: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.look_every, bool) or not isinstance(self.look_every, int) or self.look_every < 1:
            raise ConfigError(f"look_every must be an integer of at least 1, got {self.look_every!r}")
        if not 0.0 < self.early_share < 0.49:
            raise ConfigError(f"early_share must lie in (0, 0.49), got {self.early_share!r}")
        if not self.futility_z > 0.0:
            raise ConfigError(f"futility_z must be positive, got {self.futility_z!r}")


class Record:
    """Equality for records that hold arrays."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name), equal_nan=False)
            for f in fields(self)  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]


class Outcome(Record):
    """Of a certification: a class, or ABSTAIN."""

    __slots__ = ()
    prediction: int

    @property
    def abstained(self) -> bool:
        """Whether nothing was certified."""
        return self.prediction == ABSTAIN


@dataclass(frozen=True, slots=True, eq=False)
class Certificate(Outcome):
    """The outcome of CERTIFY (Cohen et al. 2019) for one input at one noise level.

    With probability at least 1 - alpha over the noise, the prediction (if it is not ABSTAIN) is the class of the
    smoothed classifier everywhere in the open ball of `radius` (pixel scale [0, 1]), in the norm of the
    noise (`core.law`): l2 for Gaussian noise.

    Attributes:
        prediction: class index, or ABSTAIN.
        radius: float64, rounded towards zero; 0.0 where abstaining.
        p_lower: lower confidence bound of the top class's probability.
        sigma: noise level that was certified.
        num_selection, num_estimation: draws of the two phases.
        counts_selection, counts_estimation: int64 votes per class; they add up to the draws less those with
            non-finite logits.
        alpha: failure probability spent.
        stop: why the estimation draws ended.
        alpha_early: the part of alpha that was set aside for stopping early; the look at the last draw has the rest.
        target: the radius that was aimed at, or the highest one of a grid that was shown; None without either. A
            radius that equals it is censored: more draws might have shown more.
        num_reference: estimation draws that the reference saw too; if any, the certificate and `p_lower` are for it.
        counts_missed: of these, by class, those that voted for it while the reference did not; None without reference.
        disagreement_upper: upper bound of the probability of that, for the top class.
        uniform: of the randomised bound, in (0, 1]; None otherwise.
        law: what the noise proves.
    """

    prediction: int
    radius: float
    p_lower: float
    sigma: float
    num_selection: int
    num_estimation: int
    counts_selection: Counts
    counts_estimation: Counts
    alpha: float
    stop: Stop = Stop.FULL
    alpha_early: float = 0.0
    target: float | None = None
    num_reference: int = 0
    counts_missed: Counts | None = None
    disagreement_upper: float = 0.0
    uniform: float | None = None
    law: Law = GAUSSIAN

    @property
    def norm(self) -> Norm:
        """Of the radius."""
        return self.law.norm

    @property
    def num_draws(self) -> int:
        """Noisy copies spent on this certificate."""
        return self.num_selection + self.num_estimation

    @property
    def num_non_finite(self) -> int:
        """Draws that voted for no class: their logits were not finite (or an exact draw was undecided)."""
        return self.num_draws - int(self.counts_selection.sum() + self.counts_estimation.sum())

    @property
    def top_class(self) -> int:
        """Class that the selection draws chose, certified or not."""
        return int(self.counts_selection.argmax())


@dataclass(frozen=True, slots=True, eq=False)
class DualCertificate(Outcome):
    """The outcome of Dual RS for one input (arXiv 2512.01782, theorem 4.2).

    With probability at least 1 - alpha over the noise of both stages, if the prediction is not ABSTAIN, then for every
    x' in the open ball of `radius` the estimator picks `sigma` and the classifier smoothed at `sigma` predicts
    `prediction`.

    Attributes:
        prediction: class index, or ABSTAIN when either stage abstained.
        radius: min(radius_sigma, radius_class), or 0.0.
        sigma: certified noise level, None when the estimator abstained (no level is certified).
        radius_sigma: certified radius of local constancy of the noise level, R_sigma.
        radius_class: certified radius of the class at `sigma`, R_c; 0.0 when it abstained or was not run.
        bounded_by: which of the two radii is the smaller; NONE when abstaining.
        alpha, alpha_sigma, alpha_class: total failure probability and its split over the stages.
        sigma_stage: certificate of the estimator; its `prediction` is an index into Sigma.
        class_stage: certificate of the classifier, None when the estimator abstained and it was not run.
        num_shared: estimation and selection copies that both stages read (counted once in `num_draws`).
    """

    prediction: int
    radius: float
    sigma: float | None
    radius_sigma: float
    radius_class: float
    bounded_by: Bound
    alpha: float
    alpha_sigma: float
    alpha_class: float
    sigma_stage: Certificate
    class_stage: Certificate | None
    num_shared: int = 0

    @property
    def num_draws(self) -> int:
        """Noisy copies spent on both stages; those that both read count once."""
        both = self.sigma_stage.num_draws + (self.class_stage.num_draws if self.class_stage else 0)
        return both - self.num_shared

    @property
    def p_lower(self) -> float:
        """Lower bound of the class's probability at `sigma`; 0.0 when the classifier was not run."""
        return self.class_stage.p_lower if self.class_stage else 0.0

    @property
    def counts_selection(self) -> Counts:
        """The classifier's selection votes; empty when it was not run."""
        return self.class_stage.counts_selection if self.class_stage else np.zeros(0, np.int64)

    @property
    def counts_estimation(self) -> Counts:
        """The classifier's estimation votes; empty when it was not run."""
        return self.class_stage.counts_estimation if self.class_stage else np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction(Record):
    """The outcome of PREDICT (Cohen et al. 2019): the smoothed classifier's class at the input, without a radius.

    With probability at least 1 - alpha over the noise, the prediction is the smoothed class or ABSTAIN.
    """

    prediction: int
    p_value: float
    sigma: float
    num: int
    counts: Counts
    alpha: float


@dataclass(frozen=True, slots=True, eq=False)
class DualPrediction(Record):
    """PREDICT in both stages of Dual RS, alpha / 2 each. `class_stage` is None when the estimator abstained."""

    prediction: int
    sigma: float | None
    alpha: float
    sigma_stage: Prediction
    class_stage: Prediction | None
