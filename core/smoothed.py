"""The public face: smoothed classifiers over any torch module, in the manner of Cohen's `Smooth`."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, TypeVar, Unpack, get_args, overload

import numpy as np
import torch

from core.agreement_records import AgreementCertificate, AgreementPrediction, Claim, Router
from core.data.dataset import PIXELS, ValueRange
from core.errors import ConfigError
from core.machine.network import Denoiser, Head, Module
from core.procedures.agreement import Agreement, agreement_certify, agreement_predict
from core.procedures.dual import dual_predict
from core.procedures.sequential import Budget, dual_procedure, standard_procedure
from core.procedures.smoothing import predict
from core.records import (
    CLASSIFIER,
    ESTIMATOR,
    AlphaSplit,
    Certificate,
    DualCertificate,
    DualPrediction,
    Procedure,
    Rule,
    Sampling,
)
from core.running import Image, Images, Smoothed

__all__ = ["DualSmoothedClassifier", "SmoothedClassifier", "pool_of"]

DEFAULT_RULE = Rule()

M = TypeVar("M", bound=Module)


class _Terms(TypedDict, total=False):
    """Keyword arguments of `SmoothedClassifier.certify`: those of `certify_many`, with its defaults."""

    num_selection: int
    num_estimation: int
    alpha: float
    batch_size: int
    budget: Budget
    radii: Sequence[float]
    rule: Rule


class _DualTerms(_Terms, total=False):
    """Those of `DualSmoothedClassifier.certify` that do not say what is returned."""

    alpha_split: AlphaSplit
    router: Router
    router_share: float


class _ManyTerms(_DualTerms, total=False):
    example_ids: Sequence[str] | None
    progress: bool


class _Asked(TypedDict, total=False):
    """Keyword arguments of `predict`: those of `predict_many`, with its defaults."""

    num: int
    alpha: float
    batch_size: int


class _DualAsked(_Asked, total=False):
    claim: Claim
    router: Router


class SmoothedClassifier(Smoothed):
    """A base classifier smoothed with noise of one level (Cohen et al. 2019, arXiv 1902.02918).

    The noise is a pure function of (seed, example id, phase, sigma): the same question gets the same answer. For an
    independent repetition pass another seed, or other example ids.

    Args:
        base_classifier: any torch module or function, ``(B, C, H, W)`` in [0, 1] plus noise -> ``(B, num_classes)``
            logits (or what holds them, as transformers' outputs do). It is called in evaluation mode and left as it
            was; a module of another type than float32 gets images of its type.
        num_classes: width of the logits, at least 2.
        sigma: standard deviation of the noise, > 0, pixel scale [0, 1].
        seed: of the noise.
        denoiser: runs before the classifier, for example a `core.models.denoiser.OneShotDenoiser`.
        device: where to run; by default where the classifier's parameters are, and the only place where they may be.
        noise: `gaussian`, float32 as everybody does it, or `exact`, integer noise for 8-bit images whose certificate
            holds in exact arithmetic too (`core.machine.exact_noise`). For l1 radii, of 8-bit images: `uniform`,
            `laplace`, or `splitting`, without chance. `module:function`: your own (`core.law.OwnNoise`).
        value_range: what inputs are checked against. With other bounds than [0, 1], or None, they are no images but
            floating vectors, series, volumes, of any one shape; sigma and radii are then in their units.

    Raises:
        ConfigError: for a sigma that is not positive, fewer than two classes, or a module on another device.
        NoiseError: for noise of your own that contradicts its law.
    """

    def __init__(
        self,
        base_classifier: Module,
        num_classes: int,
        sigma: float,
        *,
        seed: int = 0,
        denoiser: Denoiser | None = None,
        device: str | torch.device | None = None,
        noise: str = "gaussian",
        value_range: ValueRange | None = PIXELS,
    ):
        self.sigma = _check_sigma("sigma", sigma)
        self.num_classes = num_classes
        heads = {CLASSIFIER: Head(base_classifier, num_classes)}
        super().__init__(heads, denoiser, seed, device, noise, value_range, (self.sigma,))

    def __repr__(self) -> str:
        return f"SmoothedClassifier(num_classes={self.num_classes}, sigma={self.sigma}, seed={self.seed})"

    def certify(self, x: Image, *, example_id: str | None = None, **terms: Unpack[_Terms]) -> Certificate:
        """CERTIFY one image; see `Certificate` for what is promised.

        Args:
            x: ``(C, H, W)``, floating in [0, 1] or uint8, or a PIL image of mode RGB or L.
            example_id: names the image in the noise key; by default a hash of its pixels.
            **terms: of `certify_many`, with its defaults; errors too.
        """
        return self.certify_many([x], example_ids=_ids(example_id), **terms)[0]

    def certify_many(
        self,
        images: Images,
        *,
        num_selection: int = 100,
        num_estimation: int = 10_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        example_ids: Sequence[str] | None = None,
        budget: Budget = "fixed",
        radii: Sequence[float] = (),
        rule: Rule = DEFAULT_RULE,
        progress: bool = False,
    ) -> list[Certificate]:
        """CERTIFY many images at once, batched over all of them; results in the order of `images`.

        Each certificate equals that of `certify`, and holds with probability 1 - alpha on its own (no joint claim).
        A repeated image gets fresh noise at each repetition, unless `example_ids` say otherwise.

        Args:
            images: of one shape, each as for `certify`: an array, a list, a `DataLoader` or a data set of torch's, of
                images or ``(image, label)``.
            num_selection: draws that choose the class (n0).
            num_estimation: fresh draws that bound its probability (n).
            alpha: failure probability, in (0, 1).
            batch_size: rows of a forward pass, at most; on a CPU fewer of large images. What fills none runs as it is.
                Where a network (a function, a compiled or exported one) may know one shape only, all passes have it.
            example_ids: name the images in the noise key; by default a hash of their pixels.
            budget: `fixed`, all draws; `sequential`, stop as soon as nothing more can be certified; `grid`, decide only
                which of `radii` the radius exceeds.
            radii: the grid, ascending.
            rule: when a budget other than `fixed` looks and gives up.
            progress: show a bar with rate and ETA.

        Raises:
            DataError: for an image of another shape, dtype, mode or range.
            ConfigError: for draws below 1 or an alpha outside (0, 1).
            ModelError: when the logits have another shape, or the network is random or mixes rows ("Your network" in
                docs/guarantees.md; looked at in the first call).
        """
        sampling = Sampling(num_selection, num_estimation, alpha, self.law)
        return self._run(
            images,
            example_ids,
            batch_size,
            lambda: standard_procedure(budget, self.sigma, sampling, rule, radii),
            progress,
        )

    def predict(self, x: Image, *, example_id: str | None = None, **asked: Unpack[_Asked]) -> int:
        """PREDICT one image: the smoothed classifier's class, or ABSTAIN; another class with probability <= alpha."""
        return self.predict_many([x], example_ids=_ids(example_id), **asked)[0]

    def predict_many(
        self,
        images: Images,
        *,
        num: int = 1000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        example_ids: Sequence[str] | None = None,
    ) -> list[int]:
        """PREDICT many images at once, in order."""
        self._check_chance()
        results = self._run(images, example_ids, batch_size, lambda: predict(self.sigma, num, alpha))
        return [result.prediction for result in results]


class DualSmoothedClassifier(Smoothed):
    """Dual randomized smoothing (arXiv 2512.01782): each input is smoothed at a noise level of its own.

    Args:
        estimator: variance estimator, ``(B, C, H, W)`` -> ``(B, len(sigmas))`` logits.
        classifier: one network, or a mapping {sigma: network} of experts with one for each of `sigmas`.
        sigmas: Sigma, in the order of the estimator's outputs; pixel scale [0, 1].
        sigma_e: noise level of the estimator, at least max(sigmas).
        num_classes: width of the classifier's logits.
        seed, denoiser, device, noise, value_range: as for `SmoothedClassifier`.
        denoise_estimator: whether the denoiser runs before the estimator too, as published.

    Raises:
        ConfigError: for levels that are not positive and distinct, a sigma_e below them, a missing expert, fewer than
            two classes, or a module on another device.
    """

    def __init__(
        self,
        estimator: Module,
        classifier: Module | Mapping[float, Module],
        sigmas: Sequence[float],
        sigma_e: float,
        num_classes: int,
        *,
        seed: int = 0,
        denoiser: Denoiser | None = None,
        device: str | torch.device | None = None,
        noise: str = "gaussian",
        value_range: ValueRange | None = PIXELS,
        denoise_estimator: bool = True,
    ):
        self.sigmas = tuple(_check_sigma("sigmas", sigma) for sigma in sigmas)
        self.sigma_e = _check_sigma("sigma_e", sigma_e)
        self.num_classes = num_classes
        if not self.sigmas or len(set(self.sigmas)) != len(self.sigmas):
            raise ConfigError(f"sigmas must be distinct noise levels, got {self.sigmas}")
        if isinstance(classifier, Mapping):
            classifier = pool_of(classifier, self.sigmas)
        heads = {
            ESTIMATOR: Head(estimator, len(self.sigmas), denoise_estimator),
            CLASSIFIER: Head(classifier, num_classes),
        }
        super().__init__(heads, denoiser, seed, device, noise, value_range, (*self.sigmas, self.sigma_e))

    def __repr__(self) -> str:
        return (
            f"DualSmoothedClassifier(sigmas={self.sigmas}, sigma_e={self.sigma_e}, "
            f"num_classes={self.num_classes}, seed={self.seed})"
        )

    @overload
    def certify(
        self, x: Image, *, claim: Literal["constant"] = ..., example_id: str | None = ..., **terms: Unpack[_DualTerms]
    ) -> DualCertificate: ...

    @overload
    def certify(
        self, x: Image, *, claim: Literal["agreement"], example_id: str | None = ..., **terms: Unpack[_DualTerms]
    ) -> AgreementCertificate: ...

    def certify(
        self, x: Image, *, claim: Claim = "constant", example_id: str | None = None, **terms: Unpack[_DualTerms]
    ) -> DualCertificate | AgreementCertificate:
        """DUAL-CERTIFY one image; arguments and errors as for `SmoothedClassifier.certify`, draws of each stage.

        Args:
            x: ``(C, H, W)``, floating in [0, 1] or uint8.
            claim: `constant`, as published: level and class stay within the radius. `agreement`: the class stays,
                whatever the level (`AgreementCertificate`); never a smaller radius from the same votes.
            example_id: names the image in the noise key; by default a hash of its pixels.
            **terms: of `certify_many`, with its defaults.
        """
        if claim == "agreement":
            return self.certify_many([x], claim=claim, example_ids=_ids(example_id), **terms)[0]
        return self.certify_many([x], claim=claim, example_ids=_ids(example_id), **terms)[0]

    @overload
    def certify_many(
        self, images: Images, *, claim: Literal["constant"] = ..., **terms: Unpack[_ManyTerms]
    ) -> list[DualCertificate]: ...

    @overload
    def certify_many(
        self, images: Images, *, claim: Literal["agreement"], **terms: Unpack[_ManyTerms]
    ) -> list[AgreementCertificate]: ...

    def certify_many(
        self,
        images: Images,
        *,
        num_selection: int = 100,
        num_estimation: int = 10_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        example_ids: Sequence[str] | None = None,
        budget: Budget = "fixed",
        radii: Sequence[float] = (),
        rule: Rule = DEFAULT_RULE,
        alpha_split: AlphaSplit = "halves",
        claim: Claim = "constant",
        router: Router = "median",
        router_share: float = 0.5,
        progress: bool = False,
    ) -> list[DualCertificate] | list[AgreementCertificate]:
        """DUAL-CERTIFY many images at once; see `SmoothedClassifier.certify_many`.

        `alpha_split` says how alpha is spent on the stages, see `core.records.AlphaSplit`; `claim` what is certified,
        see `certify`; for the claim `agreement`, `router` says how the estimator's votes pick a level and
        `router_share` what part of alpha they spend.
        """
        sampling = Sampling(num_selection, num_estimation, alpha, self.law)
        self._check_claim(claim)
        if claim == "agreement":
            if alpha_split != "halves":
                raise ConfigError(f"claim 'agreement' needs alpha_split 'halves', got {alpha_split!r}")
            terms = Agreement(self.sigmas, self.sigma_e, sampling, router, budget, rule, tuple(radii), router_share)
            return self._run(images, example_ids, batch_size, lambda: agreement_certify(terms), progress)
        return self._run(
            images,
            example_ids,
            batch_size,
            lambda: dual_procedure(budget, self.sigmas, self.sigma_e, sampling, rule, radii, alpha_split),
            progress,
        )

    def predict(self, x: Image, *, example_id: str | None = None, **asked: Unpack[_DualAsked]) -> int:
        """DUAL-PREDICT one image: the class, or ABSTAIN; another class with probability <= alpha."""
        return self.predict_many([x], example_ids=_ids(example_id), **asked)[0]

    def predict_many(
        self,
        images: Images,
        *,
        num: int = 1000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        example_ids: Sequence[str] | None = None,
        claim: Claim = "constant",
        router: Router = "median",
    ) -> list[int]:
        """DUAL-PREDICT many images at once, in order.

        `claim` says whose class it is, as in `certify`: at the level that most noisy copies vote for, or (`agreement`)
        at the level that `router` picks.
        """
        self._check_claim(claim)
        self._check_chance()

        def procedure() -> Procedure[DualPrediction | AgreementPrediction]:
            if claim == "agreement":
                return (yield from agreement_predict(self.sigmas, self.sigma_e, num, alpha, router))
            return (yield from dual_predict(self.sigmas, self.sigma_e, num, alpha))

        return [result.prediction for result in self._run(images, example_ids, batch_size, procedure)]

    def _check_claim(self, claim: Claim) -> None:
        if claim not in get_args(Claim):
            raise ConfigError(f"claim must be one of {get_args(Claim)}, got {claim!r}")
        if claim == "constant" and self.sigma_e < max(self.sigmas):
            raise ConfigError(
                f"sigma_e must be at least max(sigmas) = {max(self.sigmas)} for claim 'constant', got {self.sigma_e}: "
                "raise it or use claim='agreement'"
            )


def pool_of(experts: Mapping[float, M], sigmas: Sequence[float]) -> dict[float, M]:
    """The experts by noise level; ConfigError where one of `sigmas` has none."""
    pool = {float(sigma): module for sigma, module in experts.items()}
    if missing := [sigma for sigma in sigmas if sigma not in pool]:
        raise ConfigError(f"no expert for sigma {missing}; there are experts for {sorted(pool)}")
    return pool


def _ids(example_id: str | None) -> list[str] | None:
    return None if example_id is None else [example_id]


def _check_sigma(name: str, sigma: float) -> float:
    if isinstance(sigma, str) or not (np.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"{name}: a noise level must be positive and finite, got {sigma!r}")
    return float(sigma)
