"""Certificates for other terms, from stored votes alone."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from core.agreement_records import Router
from core.errors import ConfigError
from core.records import Sampling
from core.report.agreement import CONSTANT, AgreementRows
from core.report.multiscale import MultiscaleRows
from distributed.methods.agreement import Agreement
from distributed.methods.method import Terms
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.recertify import Change, recertify
from distributed.views.tables import report_data


def test_recertify_smaller_alpha_equals_the_formula(run: RunDirectory) -> None:
    before = {row["example_id"]: row for row in ShardStore(run.path, "certificates/dual").read().to_pylist()}
    data, root = recertify(run, Change(alpha=1e-4, share=0.25))
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
    _, rows = data.others
    assert isinstance(rows, MultiscaleRows)
    assert rows.alpha_levels == (0.0025, 0.005)
    data, _ = recertify(cascade, Change(alpha=0.05, sigmas=(0.1,)))
    _, one = data.others
    assert isinstance(one, MultiscaleRows)
    assert one.alpha_levels == (0.05,)
    assert one.radius.tolist() == data.standard[0].radius.tolist(), "one level is standard RS"


@pytest.mark.parametrize("router", ["median", "plurality"])
def test_recertify_agreement_is_what_certifying_it_gives(cascade: RunDirectory, router: Router) -> None:
    made = ShardStore(cascade.path, "certificates/agreement").read()
    shutil.rmtree(cascade.path / "certificates/agreement")
    data, root = recertify(cascade, Change(claim="agreement", router=router))
    derived = ShardStore(root, "certificates/agreement").read()
    assert root.name == f"claim-agreement_router-{router}"
    assert derived.equals(made) == (router == "median")
    assert isinstance(data.dual, AgreementRows)
    assert [data.dual.name, *(rows.name for rows in data.others)] == ["Dual RS", CONSTANT, "Multiscale"]
    assert np.all(data.dual.radius >= data.dual.radius_constant)
    if router == "median":
        dual = data.others[0]
        same = np.array(made.column("sigma_index")) == ShardStore(root, "certificates/dual").read().column(
            "sigma_index"
        )
        assert np.all(data.dual.radius_constant[same] >= dual.radius[same])
    assert any("claim agreement" in note for note in data.notes)
    data, root = recertify(cascade, Change(claim="agreement", router=router, share=0.1))
    assert root.name == f"claim-agreement_router-{router}_share-0.1"
    certify = cascade.config.certify
    sampling = Sampling(certify.num_selection, certify.num_estimation, certify.alpha)
    terms = replace(Terms.of(cascade.config, sampling, "fixed"), router=router, router_share=0.1)
    rows = ShardStore(root, "certificates/agreement").read().to_pylist()
    assert rows != derived.to_pylist()
    for row in rows:
        again = Agreement().again(row, terms)
        assert (again["radius"], again["p_lower_level"]) == (row["radius"], row["p_lower_level"])


def test_recertify_claim_without_its_votes_is_refused(cascade: RunDirectory) -> None:
    shutil.rmtree(cascade.path / "certificates/dual")
    assert isinstance(recertify(cascade, Change(claim="agreement"))[0].dual, AgreementRows)
    with pytest.raises(ConfigError, match="claim=constant needs certificates/dual; run"):
        recertify(cascade, Change(claim="constant"))
    shutil.rmtree(cascade.path / "certificates/agreement")
    with pytest.raises(ConfigError, match="needs certificates/agreement or, of a run with budget fixed"):
        recertify(cascade, Change(claim="agreement"))


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
        Change(share=1.5),
        Change(share=0.3, split="full"),
        Change(split="thirds"),  # type: ignore[arg-type]
        Change(claim="both"),  # type: ignore[arg-type]
        Change(router="mean"),  # type: ignore[arg-type]
        Change(claim="agreement", split="full"),
        Change(claim="agreement", share=1.0),
        Change(alpha=2.0),
        Change(sigmas=(0.5, 0.25)),
    ],
)
def test_recertify_bad_change_raises(change: Change, run: RunDirectory) -> None:
    with pytest.raises(ConfigError):
        recertify(run, change)


def test_report_data_states_both_claims_where_the_votes_are_there(cascade: RunDirectory) -> None:
    made = ShardStore(cascade.path, "certificates/agreement").read().column("radius").to_pylist()
    shutil.rmtree(cascade.path / "certificates/agreement")
    config = cascade.config
    data = report_data(config, cascade.folder, cascade.manifest)
    rows = data.others[0]
    assert isinstance(rows, AgreementRows)
    assert (rows.name, rows.radius.tolist()) == ("Dual RS, agreement", made)
    assert any("follows from the votes" in note for note in data.notes)
    early = config.model_copy(update={"certify": config.certify.model_copy(update={"budget": "sequential"})})
    data = report_data(early, cascade.folder, cascade.manifest)
    assert [type(rows) for rows in data.others] == [MultiscaleRows]
