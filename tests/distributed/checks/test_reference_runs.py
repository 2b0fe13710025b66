"""A run whose certificates are for a reference, with the randomised bound."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from core.config import parse_config
from core.errors import ConfigError
from core.machine.engine import Engine
from core.machine.network import Network
from core.machine.noise_key import auxiliary
from core.machine.reference import WithReference
from core.procedures.randomized import uniform_of
from core.records import Phase
from distributed.checks.audit import audit, replay
from distributed.checks.estimate import count_parts
from distributed.execution.launch import work_of
from distributed.execution.work import Work, build_engine
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies import predict
from distributed.studies.recertify import Change, recertify
from distributed.views.tables import report_data
from jobs import certify
from tests.helpers.runs import finished_run
from tests.helpers.tampering import edit, findings, rewrite
from tests.helpers.tiny import PLAIN

STANDARD, DUAL = "certificates/standard", "certificates/dual"
begin = WithReference.__init__


class Other(nn.Module):
    """A network that answers otherwise for some copies: these random ones have no near-ties for real bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        odd = images.flatten(1).sum(dim=1, keepdim=True) * 100 % 10 < 0.3
        return torch.where(odd, logits.roll(1, 1), logits)


def otherwise(self: WithReference, network: Network, *args: Any) -> None:
    begin(self, network, *args)
    heads = {name: replace(head, module=Other(head.module)) for name, head in network.heads.items()}  # type: ignore[arg-type]
    self.reference = Network(heads, network.denoiser)
    self.reference.rows = self.rows


@pytest.fixture(autouse=True, scope="module")
def other_arithmetic() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WithReference, "__init__", otherwise)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ("certify.bound=randomized", "certify.reference={num_draws: 40, batch_size: 16}")
    sizes = ("dataset.test_size=12", "compute.part_rows=1")
    return finished_run(tmp_path_factory.mktemp("reference"), *settings, *sizes).path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(made, tmp_path / "run")
    return RunDirectory(tmp_path / "run", None)


def rows_of(run: RunDirectory, store: str = STANDARD) -> list[dict[str, Any]]:
    return ShardStore(run.path, store).read().to_pylist()  # type: ignore[no-any-return]


def test_run_with_a_reference_is_audited_resumed_and_reported(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, checked = audit(run)
    assert found == replay(run, 24, seed=0) == []
    assert checked == {STANDARD: 24, DUAL: 12}
    before = rows_of(run)
    assert {row["num_reference"] for row in before} == {40}
    assert [row["uniform"] for row in before] == [
        uniform_of(auxiliary(0, row["example_id"], Phase.ESTIMATION, row["sigma"])) for row in before
    ]
    assert 0 < sum(sum(row["counts_missed"]) for row in before) < 0.2 * 24 * 40
    (run.path / STANDARD / ShardStore(run.path, STANDARD).files()[0]).unlink()
    edit(run.path, lambda manifest: manifest["steps"].pop("certify-standard"))
    run = RunDirectory(run.path, None)
    certify.run(run, "standard")
    assert rows_of(run) == before
    data = report_data(run.config, run.folder, run.manifest)
    assert "Certificates hold for the reference (float32, batches of 16), not for the float32 network" in data.notes[0]
    assert "randomised" in data.notes[1]
    monkeypatch.setattr(WithReference, "__init__", begin)  # planted: rows of another reference
    assert any("counts_missed" in str(finding) for finding in replay(run, 24, seed=0))


def test_recertify_keeps_the_reference_and_the_number_and_other_methods_are_refused(run: RunDirectory) -> None:
    _, root = recertify(run, Change(alpha=0.2))
    loose = ShardStore(root, STANDARD).read().to_pylist()
    for row, before in zip(loose, rows_of(run), strict=True):
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
    """Planted: a retry that took a fresh number, a stage that forgot its disagreement."""

    def spoil(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["num_reference"])
        row[column] = 0 if column.startswith("num") else 0.001

    rewrite(run.path / DUAL / ShardStore(run.path, DUAL).files()[0], spoil)
    assert f"{column} is 0" in findings(run.path)


def test_prediction_asks_the_reference_and_the_estimate_counts_its_passes(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, type]] = []

    def build(work: Work, num_classes: int, batch_size: int) -> Engine:
        engine = build_engine(work, num_classes, batch_size)
        made.append((engine.batch_size, type(engine.network)))
        return engine

    monkeypatch.setattr(predict, "build_engine", build)
    question = predict.Question("dual", None, True, 50, 0.01, "finetuned", 3)
    assert predict.predict_images(run, ((), cast(Any, None)), question, "cpu") == []
    assert made == [(16, Network)]
    assert not build_engine(replace(work_of(run, STANDARD)[0], device="cpu"), 10).network.may_split
    shutil.rmtree(run.path / STANDARD)
    (part,) = count_parts(run, ["certify-standard"], {"test": run.data("test")}, {}, 1)
    assert part.num_copies == 12 * 2 * 120
    assert part.rows == {"classifier": 12 * 2 * 160, "denoiser": 12 * 2 * 160}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["certify.reference={num_draws: 50}"], "certify.reference: is the network that compute describes"),
        (["certify.reference={batch_size: 64, num_draws: 50}"], "certify.reference: is the network that compute"),
        (["certify.reference={batch_size: 1, num_draws: 101}"], "101 draws of num_estimation = 100"),
        (["certify.reference={batch_size: 1, num_draws: 5}"], "raise certify.reference.num_draws"),
        (["certify.reference={batch_size: 1, num_draws: 9}", "certify.budget=grid"], "reference: is for budget fixed"),
        (["certify.bound=randomized", "certify.claim=agreement"], "bound: is for budget fixed"),
        (["certify.bound=randomized", "certify.multiscale=true"], "bound: is for budget fixed"),
        (["certify.bound=randomized", "certify.alpha=0.5"], "randomized needs alpha below 1/2"),
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
