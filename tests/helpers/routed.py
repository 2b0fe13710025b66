"""Routed classifiers whose reaches, class radii and certified radius are known: slabs route, half-spaces classify.

Slabs across one axis give the router's shares of votes at x, half-spaces across other axes the experts': all of them
independent of each other, so that probabilities are sums over multinomial and binomial outcomes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from core.agreement_records import AgreementCertificate, AgreementVotes, Router, StageVotes
from core.procedures.agreement import Agreement, agreement_certify
from core.records import CLASSIFIER, ESTIMATOR, Answer, Counts, Draws, Phase, Sampling, Stop
from tests.helpers.lattice import Floats, counts
from tests.helpers.oracles import drive


@dataclass(frozen=True)
class Routed:
    """What the levels are, and their true probabilities at x."""

    sigmas: tuple[float, ...]
    sigma_e: float
    shares: tuple[float, ...]
    """q_j, what the router's votes are; what is missing to 1 votes for no level."""
    p: tuple[float, ...]
    """P[the expert of level j answers 1]."""

    def reach(self, chosen: int, router: Router = "median") -> Floats:
        """E_j: the router cannot pick j within it."""
        q, below = np.array(self.shares), np.cumsum([0.0, *self.shares])
        radii = np.zeros(len(q))
        for j in range(len(q)):
            if j == chosen:
                continue
            if router == "plurality":
                with np.errstate(invalid="ignore"):
                    radii[j] = self.sigma_e / 2 * (special.ndtri(q[chosen]) - special.ndtri(q[j]))
            else:
                event = below[j] if chosen < j else math.fsum(self.shares[j + 1 :])
                radii[j] = self.sigma_e * special.ndtri(event)
        return np.maximum(radii, 0.0)

    def stay(self, c: int) -> Floats:
        """R_j: the expert of level j, smoothed, answers c within it."""
        p = np.array(self.p)
        return np.asarray(np.maximum(np.array(self.sigmas) * special.ndtri(p if c else 1 - p), 0.0))

    def radius(self, chosen: int, c: int, router: Router = "median") -> float:
        """T, by the statement."""
        return float(np.maximum(self.reach(chosen, router), self.stay(c)).min())


@dataclass
class Given:
    """Votes as an answer to draws: everybody's selection is for `chosen` and `c`, estimation as given, all at once."""

    router: Counts
    ones: tuple[int, ...]
    chosen: int
    c: int
    sigmas: tuple[float, ...]
    sigma_e: float
    asked: list[Draws] = field(default_factory=list)

    def __call__(self, draws: Draws) -> Answer:
        self.asked.append(draws)
        answer = {}
        for head in draws.heads:
            if draws.phase == Phase.SELECTION:
                width, top = (len(self.sigmas), self.chosen) if head == ESTIMATOR else (2, self.c)
                answer[head] = np.eye(width, dtype=np.int64)[top] * draws.num
            elif head == ESTIMATOR:
                answer[head] = self.router
            else:
                ones = self.ones[self.sigmas.index(draws.sigma)]
                answer[head] = counts(draws.num - ones, ones)
        return answer

    def stored(self, num: int) -> AgreementVotes:
        """The same as stored votes, with every level asked for `num` draws."""
        return AgreementVotes(
            np.eye(len(self.sigmas), dtype=np.int64)[self.chosen],
            np.eye(2, dtype=np.int64)[self.c],
            StageVotes(self.router, num, Stop.FULL),
            tuple(StageVotes(counts(num - ones, ones), num, Stop.FULL) for ones in self.ones),
        )


Certify = Callable[[Agreement, Given], AgreementCertificate]


def certified(terms: Agreement, given: Given) -> AgreementCertificate:
    """The real procedure."""
    return drive(agreement_certify(terms), given)


def is_false(certificate: AgreementCertificate, routed: Routed) -> bool:
    """Whether more is claimed than is true of the certificate's own level and class."""
    if certificate.abstained:
        return False
    return certificate.radius > routed.radius(certificate.level, certificate.prediction, certificate.router)


def false_claims(
    routed: Routed, chosen: int, c: int, num: int, alpha: float, router: Router = "median", certify: Certify = certified
) -> float:
    """Probability of a false claim, given the selection draws: the sum over all outcomes of the estimation draws."""
    terms = Agreement(routed.sigmas, routed.sigma_e, Sampling(1, num, alpha), router)
    return math.fsum(
        weight
        for weight, votes, ones in outcomes_of(routed, num)
        if is_false(certify(terms, Given(votes, ones, chosen, c, routed.sigmas, routed.sigma_e)), routed)
    )


def outcomes_of(routed: Routed, num: int) -> Iterator[tuple[float, Counts, tuple[int, ...]]]:
    """Every outcome of the estimation draws of all stages, independent of each other: probability, the router's votes,
    and each level's votes for class 1."""
    shares = [*routed.shares, max(0.0, 1 - math.fsum(routed.shares))]
    possible = [place for place, q in enumerate(shares) if q > 1e-12]
    routes = []
    for votes in _compositions(num, len(possible)):
        full = np.zeros(len(shares), np.int64)
        full[possible] = votes
        routes.append((float(stats.multinomial.pmf(votes, num, [shares[i] for i in possible])), full[:-1]))
    ones = [
        [(k, w) for k, w in enumerate(stats.binom.pmf(np.arange(num + 1), num, p).tolist()) if w > 1e-14]
        for p in routed.p
    ]
    for (weight, router), votes_of_levels in product(routes, product(*ones)):
        yield (weight * math.prod(w for _, w in votes_of_levels), router, tuple(k for k, _ in votes_of_levels))


def _compositions(total: int, parts: int) -> Iterator[list[int]]:
    if parts == 1:
        yield [total]
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield [first, *rest]


@dataclass(frozen=True)
class SlabRouter:
    """A network: level j where cuts[j - 1] < z_0 - 1/2 <= cuts[j]."""

    cuts: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        edges = torch.tensor([-math.inf, *self.cuts, math.inf], dtype=torch.float64)
        z = images.flatten(1)[:, :1].double() - 0.5
        return ((z > edges[:-1]) & (z <= edges[1:])).to(images.dtype)

    def shares(self, z: Floats, sigma_e: float) -> Floats:
        """q_j at images whose first pixel is 1/2 + z, ``(len(z), K)``."""
        below = special.ndtr((np.array([-math.inf, *self.cuts, math.inf]) - z[:, None]) / sigma_e)
        return np.diff(below, axis=1)


def routed_classes(
    router: SlabRouter, planes: Mapping[float, tuple[int, float, int]], z: Floats, sigma_e: float, rule: Router
) -> Counts:
    """The routed classifier itself, at points z of shape (n, dim), counted from 1/2.

    `planes`: for each level the axis, the threshold, and the class beyond it (the other one before it).
    """
    q = router.shares(z[:, 0], sigma_e)
    median = np.minimum((q.cumsum(axis=1) < 0.5).sum(axis=1), q.shape[1] - 1)
    level = median if rule == "median" else q.argmax(axis=1)
    answers = np.stack(
        [np.where(z[:, axis] > at, beyond, 1 - beyond) for _, (axis, at, beyond) in sorted(planes.items())], axis=1
    )
    return np.asarray(answers[np.arange(len(z)), level])


@dataclass
class Stream:
    """Fixed sequences of draws for every head, level and phase, so that several procedures see the same ones.

    Outputs are numbers of classes or levels; the last one of each head votes for nothing.
    """

    draws: Mapping[tuple[str, float, Phase], Counts]
    widths: Mapping[str, int]
    asked: list[Draws] = field(default_factory=list)

    @classmethod
    def of(cls, routed: Routed, sampling: Sampling, random: np.random.Generator) -> "Stream":
        """As the truth has it: two classes, and the router's shares."""
        blind, made = max(0.0, 1 - math.fsum(routed.shares)), {}
        for phase, num in ((Phase.SELECTION, sampling.num_selection), (Phase.ESTIMATION, sampling.num_estimation)):
            share = np.array([*routed.shares, blind])
            made[ESTIMATOR, routed.sigma_e, phase] = random.choice(len(share), num, p=share / share.sum())
            for sigma, p in zip(routed.sigmas, routed.p, strict=True):
                made[CLASSIFIER, sigma, phase] = (random.random(num) < p).astype(np.int64)
        return cls(made, {ESTIMATOR: len(routed.sigmas), CLASSIFIER: 2})

    def __call__(self, draws: Draws) -> Answer:
        self.asked.append(draws)
        return {
            head: np.bincount(
                self.draws[head, draws.sigma, draws.phase][draws.start : draws.start + draws.num],
                minlength=self.widths[head] + 1,
            )[: self.widths[head]].astype(np.int64)
            for head in draws.heads
        }
