"""Plug in a certification procedure of your own: `python examples/new_procedure.py` (seconds on a CPU).

A procedure is a generator: it yields what it wants drawn and is sent votes. It knows no network and no device, so it
reads like pseudo-code, and the engine batches its draws with everybody else's. This one is the two-sided form of
theorem 1 of Cohen et al. 2019, R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), whose usual form takes p_B = 1 - p_A.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from core.config import DatasetConfig
from core.data import load_dataset
from core.machine.cpu import settle
from core.machine.engine import Engine, Task
from core.machine.network import Head, Network
from core.machine.noise import GaussianNoise
from core.models.checkpoints import load_model
from core.procedures.confidence import clopper_pearson_lower, clopper_pearson_upper
from core.procedures.smoothing import certify
from core.records import ABSTAIN, CLASSIFIER, Draws, Phase, Procedure, Sampling


class TwoSided(NamedTuple):
    """Class and radius; wrong with probability at most alpha."""

    prediction: int
    radius: float


def certify_two_sided(sigma: float, sampling: Sampling) -> Procedure[TwoSided]:
    """CERTIFY with a bound for every class, each at alpha / (number of bounds): a union bound over them."""
    selection = (yield Draws(sigma, sampling.num_selection, (CLASSIFIER,), Phase.SELECTION))[CLASSIFIER]
    votes = (yield Draws(sigma, sampling.num_estimation, (CLASSIFIER,), Phase.ESTIMATION))[CLASSIFIER]
    return two_sided(selection, votes, sigma, sampling)


def two_sided(selection: np.ndarray, votes: np.ndarray, sigma: float, sampling: Sampling) -> TwoSided:
    """From votes to the certificate; apart from the drawing, so that a test can send any votes."""
    top = int(selection.argmax())
    none = sampling.num_estimation - votes.sum()  # draws whose logits were not finite: a class of their own
    others = np.append(np.delete(votes, top), none)
    alpha = sampling.alpha / (1 + len(others))
    p_a = float(clopper_pearson_lower(votes[top], sampling.num_estimation, alpha))
    p_b = float(clopper_pearson_upper(others, sampling.num_estimation, alpha).max())
    if p_a <= p_b:
        return TwoSided(ABSTAIN, 0.0)
    return TwoSided(top, float(sigma / 2 * (ndtri(p_a) - ndtri(p_b)) * (1 - 1e-9)))  # rounded towards 0


if __name__ == "__main__":
    settle(1)
    models = Path(__file__).parent.parent / "models" / "digits" / "models"
    denoiser, classifier = (load_model(models / f"{name}.safetensors") for name in ("denoiser", "classifier"))
    engine = Engine(Network({CLASSIFIER: Head(classifier, 10)}, denoiser), GaussianNoise(0), batch_size=500)
    test = load_dataset(DatasetConfig(), "test")
    images, _ = test.readable_pixels(range(10))
    sampling = Sampling(num_selection=100, num_estimation=1000, alpha=0.001)
    tasks: list[Task[Any]] = [
        Task((index, name), test.example_ids[index], image, procedure(0.5, sampling))
        for index, image in enumerate(images)
        for name, procedure in (("one-sided", certify), ("two-sided", certify_two_sided))
    ]
    found = {finished.key: finished.result for finished in engine.run(tasks)}  # the same noise for both
    for index in range(len(images)):
        one, two = found[index, "one-sided"], found[index, "two-sided"]
        print(f"{test.example_ids[index]}: one-sided {one.radius:.4f}, two-sided {two.radius:.4f}")
