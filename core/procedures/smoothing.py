"""Standard randomized smoothing: CERTIFY and PREDICT of Cohen et al. 2019 (arXiv 1902.02918), as generators.

A procedure asks for draws by yielding `Draws` and is sent the votes. It knows nothing of networks or devices, so it
reads like the paper's pseudo-code and is tested by sending it counts.
"""

from core.errors import ConfigError
from core.procedures.confidence import binomial_p_value, bound_and_radius, top_two
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    Certificate,
    Counts,
    Draws,
    Phase,
    Prediction,
    Procedure,
    Sampling,
)

__all__ = ["certificate", "certify", "predict"]


def certify(sigma: float, sampling: Sampling, head: str = CLASSIFIER) -> Procedure[Certificate]:
    """CERTIFY: choose the class on selection draws, bound its probability on fresh estimation draws.

    Args:
        sigma: noise level, > 0, pixel scale [0, 1].
        sampling: draws of the two phases and the failure probability.
        head: the network that votes.

    Returns:
        A `Certificate`, wrong with probability at most `sampling.alpha` over the noise.
    """
    sampling = sampling.at(sigma)
    selection = (yield Draws(sigma, sampling.num_selection, (head,), Phase.SELECTION))[head]
    estimation = (yield Draws(sigma, sampling.num_estimation, (head,), Phase.ESTIMATION))[head]
    return certificate(selection, estimation, sigma, sampling)


def certificate(selection: Counts, estimation: Counts, sigma: float, sampling: Sampling) -> Certificate:
    """The certificate that the votes of both phases give; also recomputes one from stored counts."""
    top_class = int(selection.argmax())
    successes, s = int(estimation[top_class]), sampling.at(sigma)
    p_lower, radius = bound_and_radius(successes, s.num_estimation, s.alpha, sigma, s.law)
    certified = p_lower > 0.5
    return Certificate(
        prediction=top_class if certified else ABSTAIN,
        radius=radius,
        p_lower=p_lower,
        sigma=sigma,
        num_selection=s.num_selection,
        num_estimation=s.num_estimation,
        counts_selection=selection,
        counts_estimation=estimation,
        alpha=sampling.alpha,
        law=sampling.law,
    )


def predict(sigma: float, num: int, alpha: float, head: str = CLASSIFIER) -> Procedure[Prediction]:
    """PREDICT: the most frequent class if an exact test tells it from the second, else ABSTAIN.

    Args:
        sigma: noise level, > 0, pixel scale [0, 1].
        num: noisy copies.
        alpha: probability of returning a class other than the smoothed classifier's.
        head: the network that votes.
    """
    if num < 1 or not 0.0 < alpha < 1.0:
        raise ConfigError(f"PREDICT needs num >= 1 and alpha in (0, 1), got num={num!r}, alpha={alpha!r}")
    counts = (yield Draws(sigma, num, (head,), Phase.PREDICTION))[head]
    top_class, first, second = top_two(counts)
    p_value = binomial_p_value(first, first + second)
    return Prediction(top_class if p_value <= alpha else ABSTAIN, p_value, sigma, num, counts, alpha)
