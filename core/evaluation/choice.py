"""Which noise levels to use: every subset of a wide Sigma, scored from stored votes (an open question of 2512.01782).

A subset is worth what Dual RS can certify with it. Three scores say what that is, from below and from above:

- single: the best of its levels for all examples, standard RS;
- router: a light router that chooses among its levels, with the price that Dual RS pays for choosing: the radius is
  min(R_sigma, R_c), or min_j max(E_j, R_j) under the agreement claim. It is linear in the pixels, so that its part
  needs no draws, and it is fitted on other examples than it is scored on;
- oracle: the best level in hindsight, for free. No router does better.

A score is the certified accuracy, averaged over the radii that the user cares about.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from core.errors import DataError
from core.evaluation.metrics import Floats, Ints, paired_difference, reached
from core.evaluation.routing import Price, route
from core.procedures.confidence import certified_radius, lower_bounds

__all__ = ["Candidate", "Choice", "Sample", "choose", "expected", "pooled", "subsets"]


FOLDS: Final = 5
_PENALTIES: Final = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, np.inf)
"""Of the ridge, in units of the mean eigenvalue of the features' scatter matrix; inf is the router that always answers
the same."""
_HALVES: Final = 200
_GRID: Final = 150
_EM_STEPS: Final = 300


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples of which it is known what each level of Sigma certifies.

    Attributes:
        features: ``(N, d)``, see `pooled`.
        certified: ``(N, K, R)`` how likely level i certifies the right class beyond each radius, in [0, 1]: `reached`
            where it is known, `expected` where it is predicted from fewer draws.

    Raises:
        DataError: for shapes that do not fit, or too few examples to hold some out.
    """

    features: Floats
    certified: Floats

    def __post_init__(self) -> None:
        shapes = self.features.shape, self.certified.shape
        if self.features.ndim != 2 or self.certified.ndim != 3 or shapes[0][0] != shapes[1][0]:
            raise DataError(f"expected features (N, d) and certified (N, K, R) of the same examples, got {shapes}")
        if len(self.certified) < 4 * FOLDS:
            raise DataError(f"{len(self.certified)} examples are too few to compare subsets; {4 * FOLDS} at least")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A subset of Sigma and what it is worth, on one sample.

    Attributes:
        levels: places in Sigma, ascending.
        single, router, oracle: ``(R,)`` certified accuracy at each radius; the router's on examples that it was not
            fitted on.
        values: ``(N,)`` each example's share of the radii that the router certifies; its mean is the score.
    """

    levels: tuple[int, ...]
    single: Floats
    router: Floats
    oracle: Floats
    values: Floats

    @property
    def score(self) -> float:
        """The router's certified accuracy, averaged over the radii."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Of the score, over the draw of the examples."""
        return float(self.values.std(ddof=1) / np.sqrt(self.values.size))


@dataclass(frozen=True, eq=False)
class Choice:
    """All subsets, best first.

    Attributes:
        candidates: by falling score, fewer levels first on ties.
        optimism: by how much the score of the best subset falls, on average, from the half of the examples that it was
            chosen on to the other half: the winner's curse of a choice on half of the examples, larger than on all.
        wins: ``(subsets,)`` in how many of these halves each candidate is the best.
        evaluation: the same subset on examples that had no part in anything, by its place among the candidates.
    """

    candidates: tuple[Candidate, ...]
    optimism: float
    wins: Floats
    evaluation: "tuple[Candidate, ...] | None"

    @property
    def behind(self) -> Floats:
        """How far each candidate's score is behind the best one's."""
        return np.array([self.candidates[0].score - candidate.score for candidate in self.candidates])

    @property
    def behind_error(self) -> Floats:
        """Standard error of `behind`: the scores are of the same examples, so that much of their noise is common."""
        best = self.candidates[0].values
        return np.array([paired_difference(best, each.values)[1] for each in self.candidates])


def subsets(num_levels: int, size: int) -> list[tuple[int, ...]]:
    """All subsets of Sigma with 1 to `size` levels."""
    return [levels for width in range(1, size + 1) for levels in itertools.combinations(range(num_levels), width)]


def expected(
    votes: Ints, draws: int, sigma: float, radii: Floats, *, num: int, alpha: float, strict: bool = True
) -> Floats:
    """How likely a certificate of `num` draws exceeds each radius, given the right class's votes in fewer draws.

    To take the same share of votes at `num` draws would be far off at large radii: 100 of 100 votes would become 10,000
    of 10,000. Here the distribution of the class's probability p over the examples is estimated first (the
    non-parametric maximum likelihood estimate of Kiefer & Wolfowitz 1956, by EM on a grid), then each example's p given
    its votes by Bayes' rule (empirical Bayes, Robbins 1956). What the votes of no example can tell apart, such as p =
    0.999 and 0.9999 with 100 draws, stays a guess.

    Args:
        votes: ``(N,)`` for the label.
        draws: behind each of them.
        sigma: noise level.
        radii: ``(R,)``.
        num: draws of the certificates that are predicted.
        alpha: their failure probability.
        strict: as for `metrics.reached`.

    Returns:
        float64 ``(N, R)`` in [0, 1].
    """
    half = np.linspace(0.0, 12.0, _GRID)
    grid = special.expit(np.concatenate([-half[:0:-1], half]))  # p from 6e-6 to 1 - 6e-6
    seen, which, counts = np.unique(votes, return_inverse=True, return_counts=True)
    likelihood = np.exp(
        special.xlogy(seen[:, None], grid) + special.xlog1py(draws - seen[:, None], -grid)
        - (special.xlogy(seen, seen / draws) + special.xlog1py(draws - seen, -seen / draws))[:, None]
    )  # fmt: skip
    prior = np.full(grid.size, 1.0 / grid.size)
    for _ in range(_EM_STEPS):
        joint = likelihood * prior
        prior = (counts / counts.sum()) @ (joint / joint.sum(axis=1, keepdims=True))
    joint = likelihood * prior
    posterior = joint / joint.sum(axis=1, keepdims=True)
    radius = certified_radius(lower_bounds(num, alpha), sigma)  # of 0 .. num votes, ascending
    enough = reached(radius, radii, strict) > 0.0
    needed = np.where(enough.any(axis=0), enough.argmax(axis=0), num + 1)
    chance = np.where(needed > num, 0.0, special.bdtrc(needed - 1.0, num, grid[:, None]))
    return np.asarray(np.clip(posterior @ chance, 0.0, 1.0)[which], np.float64)


def pooled(image: NDArray[np.uint8], side: int = 8) -> Floats:
    """An image, uint8 ``(C, H, W)``, as features of a router, float64 ``(d,)``: sums over blocks, at most `side` x
    `side` a channel, as an orthonormal map.

    Orthonormal: a change of the pixels by r changes the features by at most r, and by r along a feature. So distances
    among the features are distances in the pixel scale.
    """
    values = image.astype(np.float64) / 255.0
    for axis in (1, 2):
        edges = np.unique(np.linspace(0, values.shape[axis], min(side, values.shape[axis]) + 1).astype(int))
        counts = np.diff(edges).astype(np.float64)
        shape = [1, 1, 1]
        shape[axis] = counts.size
        values = np.add.reduceat(values, edges[:-1], axis=axis) / np.sqrt(counts).reshape(shape)
    return np.asarray(values.reshape(-1), np.float64)


@dataclass(frozen=True, eq=False)
class _Ridge:
    """Linear predictions of what each level certifies, for one penalty: ``features @ weights + offset``."""

    weights: Floats
    offset: Floats

    def scores(self, features: Floats) -> Floats:
        return np.asarray(features @ self.weights + self.offset)

    @property
    def norms(self) -> Floats:
        """``(K, K)`` of the differences of the levels' weights: how fast the difference of two scores can change."""
        between = self.weights[:, :, None] - self.weights[:, None, :]
        return np.asarray(np.linalg.norm(between, axis=0), np.float64)


def _fit(features: Floats, targets: Floats) -> list[_Ridge]:
    """A ridge regression for each of `_PENALTIES`."""
    centre, mean = features.mean(axis=0), targets.mean(axis=0)
    centred = features - centre
    values, vectors = np.linalg.eigh(centred.T @ centred)
    right = vectors.T @ (centred.T @ (targets - mean))
    unit = max(float(values.mean()), np.finfo(np.float64).tiny)
    fits = []
    for penalty in _PENALTIES:
        shrunk = (
            np.zeros_like(right) if np.isinf(penalty) else right / (np.maximum(values, 0) + penalty * unit)[:, None]
        )
        weights = vectors @ shrunk
        fits.append(_Ridge(weights, mean - centre @ weights))
    return fits


def choose(
    sample: Sample,
    sigmas: Floats,
    radii: Floats,
    size: int,
    *,
    price: Price,
    strict: bool = True,
    evaluation: Sample | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Choice:
    """Score every subset of Sigma with 1 to `size` levels.

    The router predicts, by ridge regression on the features, what share of the radii each level certifies, and takes
    the level with the highest prediction. Its penalty (at its largest: always the same level) is chosen for each subset
    by the score itself, on examples other than those it is scored on: five folds, and folds among the other four.

    Args:
        sample: what the choice is made on.
        sigmas: ``(K,)`` ascending.
        radii: ``(R,)`` that the user cares about, >= 0.
        size: levels at most.
        price: of the router's choice.
        strict: count radius > r, otherwise radius >= r.
        evaluation: examples that have no part in the choice; the router that they are scored with is fitted on all of
            `sample`.
        seed: of folds and halves.
        progress: called after each subset.
    """
    generator = np.random.default_rng(seed)
    fold = generator.permutation(len(sample.features)) % FOLDS
    places = [np.flatnonzero(fold == f) for f in range(FOLDS)]
    targets = sample.certified.mean(axis=2)

    def fit(*without: int) -> list[_Ridge]:
        kept = ~np.isin(fold, without)
        return _fit(sample.features[kept], targets[kept])

    def routed(model: _Ridge, levels: tuple[int, ...], of: Sample, where: Ints) -> Floats:
        """How likely Dual RS certifies each radius with this router, ``(N, R)``."""
        picked, excluded = route(model.scores(of.features[where]), model.norms, levels, sigmas, price)
        own = of.certified[where, picked]
        out = reached(excluded, radii, strict)
        other = np.array(levels) != picked[:, None]
        if price.claim == "agreement":  # out of reach, or the same class: votes at different levels are independent
            out = np.maximum(out, of.certified[where][:, list(levels)])
        return np.asarray(own * np.where(other[:, :, None], out, 1.0).prod(axis=1), np.float64)

    def best_penalty(levels: tuple[int, ...], blocks: Sequence[tuple[list[_Ridge], Ints]]) -> int:
        """The place among the penalties with the highest score on examples that the fits have not seen."""
        sums = [
            sum(float(routed(fits[place], levels, sample, where).sum()) for fits, where in blocks)
            for place in range(len(_PENALTIES) if len(levels) > 1 else 1)
        ]
        return len(sums) - 1 - int(np.argmax(sums[::-1]))  # the stronger one on ties

    inner = {pair: fit(*pair) for pair in itertools.combinations(range(FOLDS), 2)}
    outer, whole = [fit(f) for f in range(FOLDS)], fit()
    candidates, evaluated = [], []
    for levels in subsets(len(sigmas), size):
        out_of_fold = np.empty((len(targets), radii.size))
        for f in range(FOLDS):
            others = [(inner[min(f, g), max(f, g)], places[g]) for g in range(FOLDS) if g != f]
            out_of_fold[places[f]] = routed(outer[f][best_penalty(levels, others)], levels, sample, places[f])
        candidates.append(_candidate(levels, sample, out_of_fold))
        if evaluation is not None:
            model = whole[best_penalty(levels, [(outer[f], places[f]) for f in range(FOLDS)])]
            everything = np.arange(len(evaluation.features))
            evaluated.append(_candidate(levels, evaluation, routed(model, levels, evaluation, everything)))
        progress()
    order = sorted(range(len(candidates)), key=lambda place: _rank(candidates[place]))
    ranked = tuple(candidates[place] for place in order)
    optimism, wins = _winners_curse(np.stack([each.values for each in ranked]), generator)
    return Choice(ranked, optimism, wins, tuple(evaluated[place] for place in order) if evaluated else None)


def _rank(candidate: Candidate) -> tuple[float, ...]:
    """Ascending from the best: routers worth the same have fewer levels first, then what a better one could reach."""
    return (-round(candidate.score, 9), len(candidate.levels), -float(candidate.oracle.mean()))


def _candidate(levels: tuple[int, ...], sample: Sample, routed: Floats) -> Candidate:
    each = [sample.certified[:, level].mean(axis=0) for level in levels]
    best = sample.certified[:, list(levels)].max(axis=1).mean(axis=0)
    single = max(each, key=lambda accuracy: float(accuracy.mean()))
    return Candidate(levels, single, routed.mean(axis=0), best, routed.mean(axis=1))


def _winners_curse(values: Floats, generator: np.random.Generator) -> tuple[float, Floats]:
    """Choose among ``(subsets, N)`` values on half of N, look at the rest: the winner's mean fall, and who wins."""
    num = values.shape[1]
    falls, wins = [], np.zeros(len(values))
    for _ in range(_HALVES):
        order = generator.permutation(num)
        first, second = values[:, order[: num // 2]].mean(axis=1), values[:, order[num // 2 :]].mean(axis=1)
        winner = int(first.argmax())
        falls.append(float(first[winner] - second[winner]))
        wins[winner] += 1
    return float(np.mean(falls)), wins / _HALVES
