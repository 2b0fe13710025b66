"""Plug in a certification procedure of your own: `python examples/new_procedure.py` (seconds on a CPU).

A procedure is a generator: it yields what it wants drawn and is sent votes. It knows no network and no device, so it
reads like pseudo-code, and the engine batches its draws with everybody else's. This one is the two-sided form of
theorem 1 of Cohen et al. 2019, R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), whose usual form takes p_B = 1 - p_A.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from core.records import ABSTAIN, CLASSIFIER, Certificate, Counts, Draws, Phase, Procedure, Sampling
from distributed.methods.method import Copies, Method, Row, Terms, votes_of
from distributed.methods.rows import certificate_row


def certify_two_sided(sigma: float, sampling: Sampling) -> Procedure[Certificate]:
    """CERTIFY with a bound for every class, each at alpha / (number of bounds): a union bound over them."""
    selection = (yield Draws(sigma, sampling.num_selection, (CLASSIFIER,), Phase.SELECTION))[CLASSIFIER]
    votes = (yield Draws(sigma, sampling.num_estimation, (CLASSIFIER,), Phase.ESTIMATION))[CLASSIFIER]
    return two_sided(selection, votes, sigma, sampling)


def two_sided(selection: Counts, votes: Counts, sigma: float, sampling: Sampling) -> Certificate:
    """From votes to the certificate; apart from the drawing, so that a test can send any votes."""
    top = int(selection.argmax())
    none = sampling.num_estimation - votes.sum()  # draws whose logits were not finite: a class of their own
    others = np.append(np.delete(votes, top), none)
    alpha = sampling.alpha / (1 + len(others))
    p_a = float(clopper_pearson_lower(votes[top], sampling.num_estimation, alpha))
    p_b = float(clopper_pearson_upper(others, sampling.num_estimation, alpha).max())
    shown = p_a > p_b
    return Certificate(
        prediction=top if shown else ABSTAIN,
        radius=float(sigma / 2 * (ndtri(p_a) - ndtri(p_b)) * (1 - 1e-9)) if shown else 0.0,  # rounded towards 0
        p_lower=p_a,
        sigma=sigma,
        num_selection=sampling.num_selection,
        num_estimation=sampling.num_estimation,
        counts_selection=selection,
        counts_estimation=votes,
        alpha=sampling.alpha,
    )


class TwoSided(Method):
    """The same for the pipeline, at the largest sigma: what it draws, its rows, and what a stored row proves."""

    title = "Two-sided"
    early = False

    def procedures(self, terms: Terms) -> list[Callable[[], Procedure[Certificate]]]:
        """One for each row of an example."""
        return [partial(certify_two_sided, terms.sigmas[-1], terms.sampling)]

    def row(self, example_id: str, label: int, result: Certificate) -> dict[str, Any]:
        """The columns that all methods share are enough."""
        return certificate_row(example_id, label, result)

    def recompute(self, row: Row, terms: Terms) -> Certificate:
        """From its votes alone: what the audit compares it with, and what `jobs.recertify` derives."""
        return two_sided(votes_of(row, "selection"), votes_of(row, "estimation"), terms.sigmas[-1], terms.sampling)

    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """What an example costs."""
        return Counter({(CLASSIFIER,): terms.sampling.num_selection + terms.sampling.num_estimation}), True


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
