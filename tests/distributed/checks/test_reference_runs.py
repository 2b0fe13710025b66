"""A run whose certificates are for a float32 reference of a bfloat16 network, with the randomised bound."""

import json
import shutil
from pathlib import Path

import pytest

from core.config import parse_config
from core.errors import ConfigError
from core.machine.network import Network
from core.machine.noise_key import auxiliary
from core.procedures.randomized import uniform_of
from core.records import Phase
from distributed.checks.audit import audit, replay
from distributed.checks.estimate import count_parts
from distributed.execution import work as work_module
from distributed.execution.launch import work_of
from distributed.execution.work import build_engine
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.predict import Question, _work
from distributed.studies.recertify import Change, recertify
from distributed.views.tables import report_data
from jobs import certify
from tests.helpers.runs import finished_run
from tests.helpers.tampering import findings, rewrite
from tests.helpers.tiny import PLAIN

OVERRIDES = (
    "dataset.test_size=12",
    "compute.precision=bfloat16",
    "compute.part_rows=1",
    "certify.bound=randomized",
    "certify.reference={num_draws: 40, batch_size: 1}",
)
STORES = ("certificates/standard", "certificates/dual")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("reference"), *OVERRIDES).path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(made, tmp_path / "run")
    return RunDirectory(tmp_path / "run", None)


def test_run_with_a_reference_is_audited_resumed_recertified_and_reported(run: RunDirectory) -> None:
    found, checked = audit(run)
    assert found == replay(run, 6, seed=0) == []
    assert checked == {"certificates/standard": 24, "certificates/dual": 12}
    tables = {name: ShardStore(run.path, name).read() for name in STORES}
    for row in tables[STORES[0]].to_pylist():
        assert row["num_reference"] == 40
        assert row["disagreement_upper"] >= 1 - 0.005 ** (1 / 40) - 1e-12
        assert row["uniform"] == uniform_of(auxiliary(0, row["example_id"], Phase.ESTIMATION, row["sigma"]))
    lost = sum(sum(row["counts_missed"]) for row in tables[STORES[0]].to_pylist())
    assert 0 < lost < 0.1 * 24 * 40  # random networks have near-ties
    for name in STORES:
        ShardStore(run.path, name).folder.remove(ShardStore(run.path, name).files()[0])
        manifest = json.loads((run.path / "manifest.json").read_text())
        del manifest["steps"][f"certify-{name.rpartition('/')[2]}"]
        (run.path / "manifest.json").write_text(json.dumps(manifest))
        certify.run(RunDirectory(run.path, run.config), name.rpartition("/")[2])
        assert ShardStore(run.path, name).read().equals(tables[name])
    run = RunDirectory(run.path, None)
    data = report_data(run.config, run.folder, run.manifest)
    assert "Certificates hold for the reference (float32, batches of 1), not for the bfloat16 network" in data.notes[0]
    assert "randomised" in data.notes[1]
    assert data.standard_at_dual_alpha is None
    _, root = recertify(run, Change(alpha=0.2))
    loose = ShardStore(root, STORES[0]).read().to_pylist()
    assert any(row["radius"] > 0.0 for row in loose)
    for row, before in zip(loose, tables[STORES[0]].to_pylist(), strict=True):
        assert row["disagreement_upper"] < before["disagreement_upper"]
        assert row["uniform"] == before["uniform"]
    assert not ShardStore(root, "certificates/multiscale").files()
    with pytest.raises(ConfigError, match="claim=agreement: the run has"):
        recertify(run, Change(claim="agreement"))
    with pytest.raises(ConfigError, match="is for the methods standard and dual"):
        work_of(run, "certificates/multiscale")


@pytest.mark.parametrize("column", ["uniform", "uniform_sigma", "disagreement_upper", "num_reference_sigma"])
def test_audit_finds_a_number_that_was_drawn_again_and_a_disagreement_that_was_mended(
    run: RunDirectory, column: str
) -> None:
    """Planted: a retry that took a fresh number, and rows whose radius follows from it."""
    store = ShardStore(run.path, STORES[1])

    def spoil(rows: list[dict]) -> None:  # type: ignore[type-arg]
        rows[0][column] = 0 if column.startswith("num") else 0.001

    rewrite(run.path / STORES[1] / store.files()[0], spoil)
    found = findings(run.path)
    assert f"{column} is 0" in found
    assert "its votes give" in found


def test_votes_of_another_reference_are_found_by_replay(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rows' reference was the network itself."""
    real = work_module.WithReference

    def same(network: Network, forward: object, batch_size: int | None) -> Network:
        return real(network, network.forward, None)

    monkeypatch.setattr(work_module, "WithReference", same)
    assert any("counts_missed" in str(finding) for finding in replay(run, 24, seed=0))


def test_prediction_asks_the_reference_and_the_estimate_counts_its_passes(run: RunDirectory) -> None:
    work = _work(run, Question("dual", None, True, 50, 0.01, "finetuned", 3), "cpu")
    assert (work.config.compute.precision, work.config.compute.batch_size, work.sampling.num_reference) == (
        "float32",
        1,
        0,
    )
    assert type(build_engine(work, 10, 8).network) is Network
    for name in STORES:
        shutil.rmtree(run.path / name)
    data = {"test": run.data("test")}
    (part,) = count_parts(run, ["certify-standard"], data, {}, 1)  # type: ignore[arg-type]
    assert part.num_copies == 12 * 2 * 120
    assert part.rows == {"classifier": 12 * 2 * 160, "denoiser": 12 * 2 * 160}
    engine = build_engine(work_of(run, STORES[0])[0], 10, 64)
    assert not engine.network.may_split


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["certify.reference={}"], "certify.reference: is the network that compute describes"),
        (["certify.reference={batch_size: 64}"], "certify.reference: is the network that compute describes"),
        (["certify.reference={batch_size: 1, num_draws: 101}"], "101 draws of num_estimation = 100"),
        (["certify.reference={batch_size: 1, num_draws: 5}"], "raise certify.reference.num_draws"),
        (["certify.reference={batch_size: 1}", "certify.budget=grid"], "reference: is for budget fixed"),
        (["certify.bound=randomized", "certify.claim=agreement"], "bound: is for budget fixed"),
        (["certify.bound=randomized", "certify.multiscale=true"], "bound: is for budget fixed"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(PLAIN, overrides)


def test_runs_without_them_are_what_they_were() -> None:
    plain = parse_config(PLAIN)
    assert "bound" not in json.dumps(plain._identity(exclude_defaults=True))
    assert plain.sampling().plain
    assert plain.deployed is plain
    assert plain.holds_for == "float32, batches of 64"
