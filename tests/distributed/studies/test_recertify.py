"""Certificates for other terms, from stored votes alone."""

import shutil

import pytest
from scipy import stats

from core.errors import ConfigError
from core.report.multiscale import MultiscaleRows
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.recertify import Change, recertify


def test_recertify_smaller_alpha_equals_the_formula(run: RunDirectory) -> None:
    before = {row["example_id"]: row for row in ShardStore(run.path, "certificates/dual").read().to_pylist()}
    data, root = recertify(run, Change(alpha=1e-4, sigma_share=0.25))
    rows = ShardStore(root, "certificates/dual").read().to_pylist()
    assert len(rows) == 50
    for row in rows:
        old = before[row["example_id"]]
        assert row["alpha_sigma"] + row["alpha_class"] <= 1e-4
        assert row["alpha_sigma"] == 1e-4 * 0.25
        votes = row["counts_estimation_sigma"][row["sigma_index"]]
        expected = stats.norm.ppf(stats.beta.ppf(2.5e-5, votes, 101 - votes)) * 0.5 if votes else 0.0
        assert row["radius_sigma"] == pytest.approx(max(expected, 0.0), rel=1e-9)
        assert row["radius"] <= old["radius"] or old["abstained"]
    assert data.alpha == 1e-4
    assert data.dual is not None


def test_recertify_same_settings_gives_the_same_rows(run: RunDirectory) -> None:
    _, root = recertify(run, Change())
    for name in ("certificates/standard", "certificates/dual"):
        assert ShardStore(root, name).read().equals(ShardStore(run.path, name).read())


def test_recertify_derives_multiscale_of_a_run_that_has_none(cascade: RunDirectory) -> None:
    made = ShardStore(cascade.path, "certificates/multiscale").read()
    shutil.rmtree(cascade.path / "certificates/multiscale")
    data, root = recertify(cascade, Change())
    assert ShardStore(root, "certificates/multiscale").read().equals(made)
    (rows,) = data.others
    assert isinstance(rows, MultiscaleRows)
    assert rows.alpha_levels == (0.0025, 0.005)
    data, _ = recertify(cascade, Change(alpha=0.05, sigmas=(0.1,)))
    (one,) = data.others
    assert isinstance(one, MultiscaleRows)
    assert one.alpha_levels == (0.05,)
    assert one.radius.tolist() == data.standard[0].radius.tolist(), "one level is standard RS"


def test_recertify_one_sigma_takes_the_classifier_votes_from_standard(run: RunDirectory) -> None:
    _, root = recertify(run, Change(sigmas=(0.25,)))
    standard = {
        r["example_id"]: r
        for r in ShardStore(run.path, "certificates/standard").read().to_pylist()
        if r["sigma"] == 0.25
    }
    rows = ShardStore(root, "certificates/dual").read().to_pylist()
    assert {r["sigma_index"] for r in rows} == {0}
    for row in rows:
        assert row["num_estimation"] in (0, 100)
        if row["sigma"] is not None:
            assert row["counts_estimation"] == standard[row["example_id"]]["counts_estimation"]
        assert sum(row["counts_estimation_sigma"]) <= 100


@pytest.mark.parametrize(
    "change",
    [
        Change(sigmas=(0.3,)),
        Change(sigma_share=1.5),
        Change(sigma_share=0.3, split="full"),
        Change(split="thirds"),  # type: ignore[arg-type]
        Change(alpha=2.0),
        Change(sigmas=(0.5, 0.25)),
    ],
)
def test_recertify_bad_change_raises(change: Change, run: RunDirectory) -> None:
    with pytest.raises(ConfigError):
        recertify(run, change)
