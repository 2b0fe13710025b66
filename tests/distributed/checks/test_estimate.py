"""What a run will take, counted beside what the engine counts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distributed.execution.work as work_module
from core.config import parse_config
from core.machine.engine import Engine
from core.models.checkpoints import save_model
from core.models.small import SmallConvNet
from core.procedures.smoothing import certificate
from core.records import CLASSIFIER, ESTIMATOR
from distributed.checks.dry_run import dry_run
from distributed.checks.estimate import (
    DENOISER,
    Part,
    count_parts,
    format_parts,
    rows_of,
    store_bytes,
)
from distributed.checks.preflight import check
from distributed.execution.launch import certify_store, outline, work_of
from distributed.methods.dual import Dual, dual_copies
from distributed.methods.rows import certificate_row
from distributed.store.shards import ShardStore

# Estimates
from tests.distributed.checks.test_preflight import ALL, dry, tree
from tests.helpers.tiny import PLAIN, tiny_run
from tests.jobs.test_jobs import call


class Counting(Engine):
    """Keeps the engines that were made."""

    made: list[Engine] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Counting.made.append(self)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    monkeypatch.setattr(Counting, "made", [])
    monkeypatch.setattr(work_module, "Engine", Counting)
    return Counting.made


WHOLE_BATCHES = ("compute.executor=local", "compute.batch_size=20", "dataset.test_size=60")
"""All requests are multiples of 20 draws: no batch is padded."""


def test_rows_of_a_standard_run_are_as_counted(tmp_path: Path, engines: list[Engine]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES)
    work, _ = work_of(run, "certificates/standard-base")
    each, exact = work.method.copies(work.terms)
    certify_store(run, work.store)
    assert exact
    assert engines[-1].network.rows == {name: 60 * rows for name, rows in rows_of(each, run.config).items()}
    assert engines[-1].network.rows == {DENOISER: 60 * 240, CLASSIFIER: 60 * 240}


@pytest.mark.parametrize(
    "overrides", [(), ("sigma_e=0.7",), ("estimator.denoiser=false",)], ids=["shared", "other sigma_e", "bare"]
)
def test_rows_of_a_dual_run_are_as_counted(tmp_path: Path, engines: list[Engine], overrides: tuple[str, ...]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, *overrides)
    config = run.config
    certify_store(run, "certificates/dual-base")
    rows = ShardStore(run.folder, "certificates/dual-base").read().to_pylist()
    work = outline(run, "certificates/dual-base")
    copies: Counter[tuple[str, ...]] = Counter()
    kinds: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        shared = config.sigmas[row["sigma_index"]] == config.estimator_sigma
        certified = row["sigma"] is not None
        kinds[shared, certified] += 1
        copies += dual_copies(work.terms, shared=shared, class_stage=certified)
    assert len(kinds) > 1
    assert engines[-1].network.rows == rows_of(copies, config)
    most = rows_of({kind: 60 * num for kind, num in work.method.copies(work.terms)[0].items()}, config)
    assert all(most[name] >= num for name, num in engines[-1].network.rows.items())
    assert sum(copies.values()) == sum(row["num_draws"] for row in rows)


def test_rows_of_a_single_sigma_are_exact(tmp_path: Path, engines: list[Engine]) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, "sigmas=[0.5]")
    save_model(SmallConvNet(1, 8, 1), run.model("estimator"))
    wrote = {**run.manifest["steps"]["train_base"]["wrote"]}
    wrote["estimator"] = (run.folder / "models").sha256("estimator.safetensors")
    run.finish("train_base", read={}, wrote=wrote, facts={})
    certify_store(run, "certificates/dual-base")
    work = outline(run, "certificates/dual-base")
    each, exact = work.method.copies(work.terms)
    assert exact
    assert engines[-1].network.rows == {DENOISER: 60 * 120, ESTIMATOR: 60 * 120, CLASSIFIER: 60 * 120}
    assert rows_of(each, run.config) == {DENOISER: 120, ESTIMATOR: 120, CLASSIFIER: 120}


def test_rows_of_multiscale_stay_below_the_bound_and_reach_it_where_no_level_decides(
    tmp_path: Path, engines: list[Engine]
) -> None:
    settings = ("certify.budget=grid", "sigmas=[0.1, 1.0]")
    run = tiny_run(tmp_path, *WHOLE_BATCHES, *settings, weight_seed=4)
    store = "certificates/multiscale-base"
    certify_store(run, store)
    work = outline(run, store)
    each, exact = work.method.copies(work.terms)
    assert (each, exact) == ({(CLASSIFIER,): 240}, False)
    rows = ShardStore(run.folder, store).read().to_pylist()
    assert engines[-1].network.rows == {name: sum(r["num_draws"] for r in rows) for name in (DENOISER, CLASSIFIER)}
    assert {row["num_draws"] for row in rows} == {120, 240}
    assert {row["num_estimation"] for row in rows} == {100}, "all draws of a level, whatever the budget"


@pytest.mark.parametrize("budget", ["sequential", "grid"])
@pytest.mark.parametrize("method", ["standard", "dual", "agreement"])
def test_rows_of_sequential_budgets_stay_below_the_bound(
    tmp_path: Path, engines: list[Engine], budget: str, method: str
) -> None:
    run = tiny_run(tmp_path, *WHOLE_BATCHES, f"certify.budget={budget}", "certify.look_every=20")
    store = f"certificates/{method}-base"
    certify_store(run, store)
    work = outline(run, store)
    each, exact = work.method.copies(work.terms)
    assert not exact
    most = {name: 60 * num for name, num in rows_of(each, run.config).items()}
    assert engines[-1].network.rows.keys() == most.keys()
    assert all(num <= most[name] for name, num in engines[-1].network.rows.items())


def test_count_parts_of_a_pipeline_and_of_one_that_has_begun(tmp_path: Path) -> None:
    config = parse_config(PLAIN, ["base.denoiser.train.steps=10", "finetune.epochs=2", "compute.executor=local"])
    found = check(dry(tmp_path / "new", config), ALL)
    parts = {part.name: part for part in count_parts(dry(tmp_path / "new", config), ALL, found.data, {}, 2)}
    assert {name: (part.num_copies, part.exact) for name, part in parts.items()} == {
        "train_base, denoiser": (10 * 97, False),
        "train_base, classifier": (40 * 97, True),
        "build_dataset": (97 * 2 * 80, True),
        "train_estimator": (90 * 97 * 2, False),
        "finetune_classifier, sigmas": (97 * 100, True),
        "finetune_classifier, training": (2 * 97, True),
        "certify-standard": (1700 * 2 * 120, True),
        "certify-dual": (1700 * 2 * 120, False),
    }
    assert "not measured" in format_parts(list(parts.values()), None)
    run = tiny_run(tmp_path / "run", "compute.executor=local", "compute.part_rows=1")
    certify_store(run, "dataset")
    (run.path / "dataset" / "shard-000003.parquet").unlink()
    (part,) = count_parts(run, ["build_dataset"], {"train": run.data("train")}, {}, 1)
    assert part.examples == 10


def test_store_bytes_is_above_what_is_written_and_not_far(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    work, random = outline(run, "certificates/standard-base"), np.random.default_rng(0)
    rows = []
    for number in range(1000):
        share = random.dirichlet(np.full(10, 0.2))
        selection, estimation = (random.multinomial(num, share) for num in (20, 100))
        for sigma in run.config.sigmas:
            made = certificate(selection, estimation, sigma, work.sampling)
            rows.append(certificate_row(f"digits-{number:04d}", number % 10, made))
    store = ShardStore(run.folder, work.store)
    store.commit(0, rows, work.method.schema, "cpu")
    written = sum(file.size for file in store.folder.files())
    estimated = store_bytes(work, 1000, 10)
    assert written <= estimated <= 4 * written


def test_part_time_and_money() -> None:
    part = Part("x", 10, {Dual.heads: 7200, (CLASSIFIER,): 3600}, {}, replicas=2, rates={Dual.heads: 1.0})
    assert part.device_s is None
    part.rates[CLASSIFIER,] = 2.0
    part = replace(part, start_s=100.0)
    assert (part.work_s, part.device_s, part.wall_s) == (9000.0, 9200.0, 4600.0)
    assert format_parts([part], 3.0).splitlines()[1].split()[-1] == f"{9200 / 3600 * 3:.2f}"


def test_dry_run_prints_the_table_and_leaves_no_trace(tmp_path: Path) -> None:
    small = [
        "base.denoiser.train.steps=20",
        "compute.executor=local",
        "certify.num_estimation=200",
        "report.radii=[0, 0.5]",
    ]
    where = tmp_path / "runs" / "one"
    result = call(
        "pipeline", "--config", "configs/digits.yaml", "--out", str(where), "--dry-run", "--price", "3", *small
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "train data  digits, 1,297 images 1x8x8, 10 classes" in result.stdout
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "778,200" in lines["build_dataset"]
    assert "<= " in lines["certify-dual"]
    assert "not measured" not in result.stdout
    assert "<= is an upper bound" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_run_that_is_there_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local")
    before = tree(tmp_path)
    dry_run(dry(run.folder.uri, None), ["build_dataset"], None, seconds=0.2)
    assert "15,520" in capsys.readouterr().out
    assert tree(tmp_path).items() - before.items() == {((run.path), run.path.stat().st_mtime_ns)}  # the probe
    certify_store(run, "dataset")
    dry_run(dry(run.folder.uri, None), ["build_dataset"], None)
    assert "everything is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "messages"),
    [
        (
            ["base.denoiser=nowhere.pt", "dataset={{name: folder, path: {tmp}/gone}}"],
            3,
            ["2 problems", "data: ", "model: "],
        ),
        (["base.denoiser=nowhere.pt", "--dry-run"], 3, ["base.denoiser: no checkpoint at 'nowhere.pt'"]),
        (["--price", "3"], 2, ["--price: goes with --dry-run"]),
        (["labels.num_estimation=2"], 2, ["cannot certify anything"]),
    ],
)
def test_pipeline_bad_input_is_refused_before_anything_is_made(
    args: list[str], code: int, messages: list[str], tmp_path: Path
) -> None:
    given = [arg.format(tmp=tmp_path) for arg in args]
    config = tmp_path / "c.yaml"
    config.write_text("{sigmas: [0.12, 0.25, 0.5], certify: {num_estimation: 1000}}")
    result = call("pipeline", "--config", str(config), "--out", str(tmp_path / "run"), *given)
    assert result.returncode == code, result.stderr
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
