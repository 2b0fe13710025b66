"""The procedure of examples/new_procedure.py keeps its promise; `make docs-test` runs the examples themselves."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom

from core.records import ABSTAIN, Sampling
from distributed.checks.audit import audit, replay
from distributed.checks.estimate import count_parts
from distributed.methods import METHODS
from distributed.store.shards import ShardStore
from distributed.studies.recertify import Change, recertify
from distributed.views.exchange import export_logs
from distributed.views.tables import report_data
from examples.new_procedure import two_sided
from jobs import certify
from tests.helpers.runs import finished_run

SIGMA, SAMPLING = 0.5, Sampling(10, 40, 0.05)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.51, 0.6, 0.75, 0.9, 0.97])
def test_two_sided_is_wrong_with_probability_below_alpha(p: float) -> None:
    """Two classes, the selection draws having chosen the second, of probability p: an exact sum over its votes."""
    true_radius = SIGMA * ndtri(p)  # negative: the claim itself is false
    k = np.arange(SAMPLING.num_estimation + 1)
    found = [two_sided(np.array([0, 10]), np.array([40 - votes, votes]), SIGMA, SAMPLING) for votes in k]
    false = [c.prediction != ABSTAIN and c.radius > max(true_radius, 0.0) for c in found]
    assert binom.pmf(k, 40, p)[false].sum() <= SAMPLING.alpha


def test_two_sided_draws_without_a_class_are_a_class_of_their_own() -> None:
    full = two_sided(np.array([0, 10]), np.array([0, 40]), SIGMA, SAMPLING)
    lost = two_sided(np.array([0, 10]), np.array([0, 25]), SIGMA, SAMPLING)  # 15 of 40 had no finite logits
    assert 0.0 == lost.radius < full.radius
    assert lost.prediction == ABSTAIN


def test_method_of_a_user_passes_through_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line in the table: certified, audited, drawn again, recertified, exported and reported."""
    monkeypatch.setitem(METHODS, "two_sided", ("examples.new_procedure:TwoSided", "both bounds"))
    run = finished_run(tmp_path, "certify.budget=sequential", "dataset.test_size=20")
    certify.run(run, "two_sided")
    rows = ShardStore(run.folder, "certificates/two_sided").read().to_pylist()
    assert {row["sigma"] for row in rows} == {run.config.sigmas[-1]}
    assert any(row["radius"] > 0 for row in rows)
    findings, checked = audit(run)
    assert (findings, checked["certificates/two_sided"]) == ([], len(rows))
    assert replay(run, 10_000, seed=0) == []
    (shown,) = report_data(run.config, run.folder, run.manifest).others
    assert (shown.name, shown.radius.tolist()) == ("Two-sided", [row["radius"] for row in rows])
    data, _ = recertify(run, Change(alpha=0.1))
    assert (data.others[0].radius >= shown.radius).all()
    assert (data.others[0].radius > shown.radius).any()
    (part,) = count_parts(run, ["certify-two_sided"], {"test": run.data("test")}, {}, 1)
    assert (part.examples, part.exact) == (0, True)
    ((_, log),) = export_logs(run.folder, ["certificates/two_sided"], run.folder / "logs")
    assert len(log.idx) == len(rows)
