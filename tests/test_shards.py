import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from core.errors import ConfigError, DataError
from core.records import Bound, Certificate, DualCertificate, Sampling
from core.smoothing import certificate
from distributed.shards import CERTIFICATE_SCHEMA, DUAL_SCHEMA, Plan, ShardStore, certificate_row, dual_row
from distributed.tables import grid

IDS = tuple(f"e{i}" for i in range(7))


def made(sigma: float = 0.25, votes: int = 97) -> Certificate:
    return certificate(np.array([10, 90]), np.array([100 - votes, votes]), sigma, Sampling(100, 100, 0.001))


def store_with_rows(root: Path, plan: Plan) -> ShardStore:
    store = ShardStore(root, "dataset")
    store.plan(plan, IDS)
    for number, members in enumerate(plan.shards):
        rows = [certificate_row(IDS[i], i % 2, made(s)) for i in members for s in (0.25, 0.5)]
        store.commit(number, rows, CERTIFICATE_SCHEMA, "cpu")
    return store


def test_commit_then_read_gives_rows_back_to_the_last_bit(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {"seed": 0})
    store = store_with_rows(tmp_path, plan)
    table = store.read()
    assert store.check(plan, IDS) == table.num_rows == 14
    assert table.schema.equals(CERTIFICATE_SCHEMA)
    assert table.column("example_id").to_pylist() == sorted(IDS * 2)
    row = table.to_pylist()[1]
    expected = made(0.5)
    assert row["radius"] == expected.radius
    assert row["counts_estimation"] == [3, 97]
    assert math.isclose(row["radius"], 0.5 * stats.norm.ppf(stats.beta.ppf(0.001, 97, 4)), rel_tol=1e-9)
    assert grid(table, "radius", (0.25, 0.5)).shape == (7, 2)
    assert grid(table, "counts_estimation", (0.25, 0.5)).shape == (7, 2, 2)
    with pytest.raises(DataError, match="one row per example for each sigma"):
        grid(table, "radius", (0.25, 0.7))


def test_commit_leaves_only_whole_files_that_any_reader_opens(tmp_path: Path) -> None:
    store_with_rows(tmp_path, Plan.divide(7, 3, 2, {}))
    assert sorted(p.name for p in (tmp_path / "dataset").iterdir()) == [f"shard-00000{i}.parquet" for i in range(3)]
    assert pq.read_table(tmp_path / "dataset").num_rows == 14


def test_plan_on_disk_wins_over_another_shard_size(tmp_path: Path) -> None:
    store, first = ShardStore(tmp_path, "dataset"), Plan.divide(7, 3, 2, {"seed": 0})
    assert store.plan(first, IDS) == first
    assert store.plan(Plan.divide(7, 2, 2, {"seed": 0}), IDS) == first
    assert pq.read_table(store.plan_file).column("example_id").to_pylist() == list(IDS)


def test_plan_of_other_inputs_is_refused(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, "dataset")
    store.plan(Plan.divide(7, 3, 2, {"seed": 0, "models": {"classifier": "a"}}), IDS)
    with pytest.raises(ConfigError, match=r"made from other inputs \(models differ\)"):
        store.plan(Plan.divide(7, 3, 2, {"seed": 0, "models": {"classifier": "b"}}), IDS)


def test_plan_lost_beside_shards_is_refused(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {})
    store = store_with_rows(tmp_path, plan)
    store.plan_file.unlink()
    with pytest.raises(ConfigError, match="holds shards without a plan"):
        store.plan(plan, IDS)


def test_plan_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.parquet").write_text("no")
    with pytest.raises(DataError, match="is not a plan"):
        Plan.read(tmp_path / "plan.parquet")


def test_check_finds_missing_doubled_and_foreign_rows(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {})
    store = store_with_rows(tmp_path, plan)
    file = store.shard_file(1)
    whole = pq.read_table(file)
    doubled = pa.concat_tables([whole.slice(1), whole.slice(1, 1)])  # one row twice, its neighbour not at all
    for damaged in (whole.slice(1), doubled, pa.concat_tables([whole, whole]), pq.read_table(store.shard_file(0))):
        pq.write_table(damaged, file)
        with pytest.raises(DataError, match="exactly once, the first is 'e"):
            store.check(plan, IDS)
    file.unlink()
    with pytest.raises(DataError, match="1 shards of dataset are missing, the first is 1"):
        store.check(plan, IDS)


def test_read_truncated_shard_is_named(tmp_path: Path) -> None:
    store = store_with_rows(tmp_path, Plan.divide(7, 3, 2, {}))
    file = store.shard_file(2)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"cannot read the shard '.*shard-000002"):
        store.read()
    with pytest.raises(DataError, match="no shards in"):
        ShardStore(tmp_path, "nothing").read()


def test_dual_row_holds_both_stages_and_null_sigma_when_the_estimator_abstained(tmp_path: Path) -> None:
    level, label = made(0.5, 80), made(0.25, 99)
    both = DualCertificate(1, 0.3, 0.25, 0.4, 0.3, Bound.CLASS, 0.002, 0.001, 0.001, level, label)
    alone = DualCertificate(-1, 0.0, None, 0.0, 0.0, Bound.NONE, 0.002, 0.001, 0.001, level, None)
    store = ShardStore(tmp_path, "certificates/dual")
    store.commit(0, [dual_row("a", 1, both), dual_row("b", 1, alone)], DUAL_SCHEMA, "cpu")
    one, two = store.read().to_pylist()
    assert (one["sigma"], one["num_draws"], one["bounded_by"], one["correct"]) == (0.25, 400, "class", True)
    assert (one["counts_estimation"], one["counts_estimation_sigma"]) == ([1, 99], [20, 80])
    assert (two["sigma"], two["num_draws"], two["counts_estimation"], two["abstained"]) == (None, 200, [], True)
    assert two["sigma_index"] == 1
