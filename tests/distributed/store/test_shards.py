import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from core.errors import ConfigError, DataError
from core.files import file_sha256
from core.procedures.smoothing import certificate
from core.records import Bound, Certificate, DualCertificate, Sampling
from distributed.files.parquet import from_bytes, to_bytes
from distributed.files.storage import Folder
from distributed.methods.dual import Dual
from distributed.methods.rows import CERTIFICATE_SCHEMA, certificate_row, error_row
from distributed.methods.standard import grid
from distributed.store.plan import Plan
from distributed.store.shards import ShardStore

IDS = tuple(f"e{i}" for i in range(7))


def made(sigma: float = 0.25, votes: int = 97) -> Certificate:
    return certificate(np.array([10, 90]), np.array([100 - votes, votes]), sigma, Sampling(100, 100, 0.001))


SIGMAS = (0.25, 0.5)


def rows_of(plan: Plan, shard: int) -> list[dict[str, Any]]:
    return [certificate_row(IDS[i], i % 2, made(s)) for i in plan.members(shard) for s in SIGMAS]


def store_with_rows(root: Path, plan: Plan) -> ShardStore:
    store = ShardStore(root, "dataset")
    store.write_plan(plan, IDS)
    for shard in range(len(plan)):
        store.commit(shard, rows_of(plan, shard), CERTIFICATE_SCHEMA, "cpu")
    return store


def fail_one(store: ShardStore, plan: Plan) -> None:
    """The first row of the second shard becomes one of an error."""
    rows = rows_of(plan, 1)
    failed = error_row(CERTIFICATE_SCHEMA, {}, rows[0]["example_id"], rows[0]["label"], rows[0]["sigma"], 0.001)
    note = {"example_id": "e3", "sigma": 0.25, "error": "DataError", "message": "broken", "traceback": "", "node": "n"}
    store.commit(1, [failed, *rows[1:]], CERTIFICATE_SCHEMA, "cpu", [{**note, "time": datetime.now(UTC)}])


def test_commit_then_read_gives_rows_back_to_the_last_bit(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {"seed": 0})
    store = store_with_rows(tmp_path, plan)
    table = store.read()
    verified = store.verify(plan, IDS, SIGMAS)
    assert verified.rows == table.num_rows == 14
    assert (verified.error_rows, verified.devices, verified.non_finite_draws) == (0, {"cpu"}, 0)
    assert verified.votes == 14 * 200
    assert verified.sha256["shard-000001.parquet"] == file_sha256(tmp_path / "dataset" / "shard-000001.parquet")
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


def test_plan_read_back_is_the_plan_that_was_written_and_readable_by_itself(tmp_path: Path) -> None:
    store, plan = ShardStore(tmp_path, "dataset"), Plan.divide(7, 3, 2, {"seed": 0}, "cuda")
    assert store.read_plan() is None
    store.write_plan(plan, IDS)
    read = store.read_plan()
    assert read is not None
    assert [read.members(shard).tolist() for shard in range(len(read))] == [[0, 1, 2], [3, 4, 5], [6]]
    assert (read.origin, read.device, read.rows_per_example) == ({"seed": 0}, "cuda", 2)
    assert pq.read_table(store.plan_file).column("example_id").to_pylist() == list(IDS)


@pytest.mark.parametrize(("num", "size", "slots"), [(0, 3, 0), (1, 5, 2), (97, 8, 2), (1000, 20, 4), (7, 1, 3)])
def test_plan_divides_examples_into_shards_each_once_the_last_ones_smaller(num: int, size: int, slots: int) -> None:
    plan = Plan.divide(num, size, 1, {}, "cpu", slots)
    assert [i for shard in range(len(plan)) for i in plan.members(shard).tolist()] == list(range(num))
    assert all(0 < n <= size for n in plan.sizes)
    if num == 1000:
        assert plan.sizes.tolist() == [20] * 42 + [5] * 32


def test_plan_of_other_inputs_is_refused(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {"seed": 0, "models": {"classifier": "a"}})
    with pytest.raises(ConfigError, match=r"made from other inputs \(models.classifier is 'a', expected 'b'\)"):
        ShardStore(tmp_path, "dataset").check_origin(plan, {"seed": 0, "models": {"classifier": "b"}})


def test_plan_lost_beside_shards_is_refused(tmp_path: Path) -> None:
    store = store_with_rows(tmp_path, Plan.divide(7, 3, 2, {}))
    Path(store.plan_file).unlink()
    with pytest.raises(ConfigError, match="holds shards without a plan"):
        ShardStore(tmp_path, "dataset").read_plan()


def test_plan_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'plan\.parquet' is not a plan"):
        Plan.from_bytes(b"no", "plan.parquet")


def test_verify_finds_missing_doubled_and_foreign_rows(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {})
    store = store_with_rows(tmp_path, plan)
    rows, other = rows_of(plan, 1), rows_of(plan, 0)
    doubled = [*rows[1:], rows[1]]  # one row twice, its neighbour not at all
    moved = [{**rows[0], "sigma": 0.7}, *rows[1:]]
    foreign = [{**row, "example_id": "foreign"} if row["example_id"] == "e5" else row for row in rows]
    for damaged, first in ((rows[1:], ""), (doubled, ""), (rows * 2, ""), (other, ""), (moved, ""), (foreign, "5'")):
        store.commit(1, damaged, CERTIFICATE_SCHEMA, "cpu")
        with pytest.raises(DataError, match=rf"shard-000001.* exactly once, the first is 'e{first}"):
            store.verify(plan, IDS, SIGMAS)
    file = tmp_path / "dataset" / "shard-000001.parquet"
    store.commit(1, rows, CERTIFICATE_SCHEMA, "cpu")
    pq.write_table(store.read_file(file.name), file)
    with pytest.raises(DataError, match=r"shard-000001.* does not say on which device"):
        store.verify(plan, IDS, SIGMAS)
    file.unlink()
    with pytest.raises(DataError, match="1 shards of dataset are missing, the first is 1"):
        store.verify(plan, IDS, SIGMAS)


def test_read_file_with_a_flipped_bit_is_refused_by_its_checksum(tmp_path: Path) -> None:
    store = store_with_rows(tmp_path, Plan.divide(7, 7, 2, {}))
    path = tmp_path / "dataset" / "shard-000000.parquet"
    content, whole = path.read_bytes(), store.read_file("shard-000000.parquet")
    refused = 0
    for place in range(4, len(content) - 8, 23):
        path.write_bytes(bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]]))
        try:  # pages have checksums; headers and footer do not, but what they say of the rows is checked
            assert store.read_file("shard-000000.parquet").equals(whole)
        except DataError:
            refused += 1
    assert refused > 100


def test_finish_joins_shards_and_nothing_is_seen_twice_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.divide(7, 2, 2, {})
    store = store_with_rows(tmp_path, plan)
    before, seen = store.read(), []
    for action in ("write", "remove"):
        real = getattr(Folder, action)

        def spied(self: Folder, *args: Any, real: Any = real) -> None:
            real(self, *args)
            seen.append(store.read().equals(before))

        monkeypatch.setattr(Folder, action, spied)
    store.finish(plan, IDS, SIGMAS, part_rows=8)  # two shards to a part
    assert seen == [True] * 6
    assert store.files() == ["part-000000-000001.parquet", "part-000002-000003.parquet"]
    assert store.committed() == {0, 1, 2, 3}
    assert store.verify(plan, IDS, SIGMAS).rows == 14
    assert pq.read_table(tmp_path / "dataset").num_rows == 14


def test_finish_reads_each_file_once_and_returns_what_verify_finds_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.divide(7, 2, 2, {})
    store = store_with_rows(tmp_path, plan)
    store.commit(1, rows_of(plan, 1), CERTIFICATE_SCHEMA, "cpu (micro-batch 2 of 4)")
    read, real = [], Folder.read

    def spied(self: Folder, name: str) -> bytes:
        read.append(name)
        return real(self, name)

    with monkeypatch.context() as context:
        context.setattr(Folder, "read", spied)
        found = store.finish(plan, IDS, SIGMAS, part_rows=12)  # three shards to a part, the last one alone
    assert sorted(read) == [f"shard-00000{i}.parquet" for i in range(4)]
    facts = found.facts(1, 2, 3.0)
    assert list(facts["sha256"]) == store.files() == ["part-000000-000002.parquet", "shard-000003.parquet"]
    assert facts["devices"] == ["cpu", "cpu (micro-batch 2 of 4)"]
    assert facts == store.verify(plan, IDS, SIGMAS).facts(1, 2, 3.0)
    assert facts == store.finish(plan, IDS, SIGMAS, part_rows=12).facts(1, 2, 3.0)


def test_finish_does_not_join_what_is_not_whole_and_keeps_foreign_files(tmp_path: Path) -> None:
    plan = Plan.divide(7, 2, 2, {})
    store = store_with_rows(tmp_path, plan)
    (tmp_path / "dataset" / "notes.txt").write_bytes(b"mine")
    store.commit(1, rows_of(plan, 1)[1:], CERTIFICATE_SCHEMA, "cpu")
    with pytest.raises(DataError, match=r"shard-000001.* exactly once, the first is 'e2'"):
        store.finish(plan, IDS, SIGMAS, part_rows=8)
    assert {f"shard-00000{i}.parquet" for i in range(4)} <= {file.name for file in (tmp_path / "dataset").iterdir()}
    store.commit(1, rows_of(plan, 1), CERTIFICATE_SCHEMA, "cpu")
    store.finish(plan, IDS, SIGMAS, part_rows=8)
    assert (tmp_path / "dataset" / "notes.txt").read_bytes() == b"mine"


def test_finish_that_was_cut_off_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.divide(7, 2, 2, {})
    store = store_with_rows(tmp_path, plan)
    before = store.read()
    with monkeypatch.context() as context:
        context.setattr(Folder, "remove", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.finish(plan, IDS, SIGMAS, part_rows=8)
    assert len(list((tmp_path / "dataset").iterdir())) == 5  # a part beside the shards that it covers
    assert store.read().equals(before)
    store.finish(plan, IDS, SIGMAS, part_rows=8)
    assert len(list((tmp_path / "dataset").iterdir())) == 2
    (tmp_path / "dataset" / "part-000000-000001.parquet").unlink()
    assert store.committed() == {2, 3}
    for shard in (0, 1):
        store.commit(shard, rows_of(plan, shard), CERTIFICATE_SCHEMA, "cpu")
    store.finish(plan, IDS, SIGMAS, part_rows=1_000)  # parts of another size are there: they stay
    assert store.read().equals(before)


def test_commit_with_an_error_keeps_its_message_until_it_succeeds(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {})
    store = store_with_rows(tmp_path, plan)
    fail_one(store, plan)
    assert store.shards_with_errors() == {1}
    assert store.read_errors().column("message").to_pylist() == ["broken"]
    verified = store.verify(plan, IDS, SIGMAS)
    assert (verified.rows, verified.error_rows) == (14, 1)
    store.finish(plan, IDS, SIGMAS, 1_000)
    assert "shard-000001.parquet" in store.files()  # may be tried again
    store.commit(1, rows_of(plan, 1), CERTIFICATE_SCHEMA, "cpu")
    assert store.read_errors().num_rows == 0
    assert store.verify(plan, IDS, SIGMAS).error_rows == 0


def test_begin_counts_the_replicas_that_began_a_shard(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, "certificates/dual")
    assert [store.begin(4, name) for name in ("a", "b", "a")] == [1, 2, 2]
    assert store.begin(5, "a") == 1
    assert store.attempts() == {4: 2, 5: 1}
    assert len([*(tmp_path / "attempts/certificates-dual").iterdir()]) == 2
    store.forget_attempts()
    assert store.attempts() == {}


def test_read_file_from_before_rows_had_a_hash_has_none(tmp_path: Path) -> None:
    store = store_with_rows(tmp_path, Plan.divide(7, 3, 2, {}))
    before = store.read_file("shard-000000.parquet")
    table, about = from_bytes((tmp_path / "dataset/shard-000000.parquet").read_bytes(), "")
    old = table.drop_columns(["image_hash"])
    store.folder.write("shard-000000.parquet", to_bytes(old.schema, [old], lambda: about))
    assert store.read_file("shard-000000.parquet").equals(before)


def test_images_are_of_as_many_examples_as_are_asked_for_whatever_file_they_are_in(tmp_path: Path) -> None:
    plan = Plan.divide(7, 2, 2, {})
    store = store_with_rows(tmp_path, plan)
    assert list(store.images()) == []
    for shard in range(4):
        rows = [row | {"image_hash": row["example_id"].upper()} for row in rows_of(plan, shard)]
        store.commit(shard, rows, CERTIFICATE_SCHEMA, "cpu")
    assert store.verify(plan, IDS, SIGMAS).rows == 14
    store.finish(plan, IDS, SIGMAS, part_rows=12)
    pairs = [(name, name.upper()) for name in IDS]
    assert sorted(store.images(7)) == sorted(store.images()) == pairs
    found = [list(store.images(3)) for _ in range(50)]
    assert {len(set(each)) for each in found} == {3}
    assert set().union(*found) == set(pairs)
    store.commit(3, [row | {"image_hash": None} for row in rows_of(plan, 3)], CERTIFICATE_SCHEMA, "cpu")
    assert sorted(store.images()) == pairs[:6]


def test_read_truncated_shard_is_named(tmp_path: Path) -> None:
    store = store_with_rows(tmp_path, Plan.divide(7, 3, 2, {}))
    file = tmp_path / "dataset" / "shard-000002.parquet"
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
    store.commit(0, [Dual().row("a", 1, both), Dual().row("b", 1, alone)], Dual.schema, "cpu")
    one, two = store.read().to_pylist()
    assert (one["sigma"], one["num_draws"], one["bounded_by"], one["correct"]) == (0.25, 400, "class", True)
    assert (one["counts_estimation"], one["counts_estimation_sigma"]) == ([1, 99], [20, 80])
    assert (two["sigma"], two["num_draws"], two["counts_estimation"], two["abstained"]) == (None, 200, [], True)
    assert two["sigma_index"] == 1


def test_copy_from_takes_the_rows_of_some_levels_and_their_errors(tmp_path: Path) -> None:
    plan = Plan.divide(7, 3, 2, {})
    source = store_with_rows(tmp_path / "a", plan)
    fail_one(source, plan)
    for sigma, errors in ((0.25, ["broken"]), (0.5, [])):
        store = ShardStore(tmp_path / f"b{sigma}", "dataset")
        fewer = Plan.divide(7, 3, 1, {"seed": 1})
        store.write_plan(fewer, IDS)
        store.copy_from(source, [sigma])
        assert store.files() == source.files()
        assert store.verify(fewer, IDS, [sigma]).devices == {"cpu"}  # files that are of the new plan
        expected = [row for row in source.read().to_pylist() if row["sigma"] == sigma]
        assert store.read().to_pylist() == expected
        assert store.read_errors().column("message").to_pylist() == errors
