import json
import os
import re
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed.checks.status import status
from distributed.methods.rows import CERTIFICATE_SCHEMA, ERROR_SCHEMA
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import status as status_job
from tests.helpers.tiny import run_main, tiny_run


def test_status_half_way_tells_examples_rate_and_eta_from_the_files(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    ids = [f"e{i}" for i in range(95)]
    store = ShardStore(tmp_path, "dataset")
    assert status(run, now=0.0) == []
    store.write_plan(Plan.divide(95, 10, 2, {}), ids)
    (begun,) = status(run, now=0.0)
    assert (begun.done, begun.total, begun.rate, begun.eta_s, begun.idle_s) == (0, 95, None, None, None)
    for number, moment in ((0, 1000.0), (1, 1020.0), (9, 1030.0)):  # 10, 10 and 5 examples
        store.commit(number, [], CERTIFICATE_SCHEMA, "cpu")
        os.utime(tmp_path / f"dataset/shard-{number:06d}.parquet", (moment, moment))
    (half,) = status(run, now=1042.0)
    assert (half.done, half.finished, half.idle_s) == (25, False, 12.0)
    assert half.rate == pytest.approx(15 / 30)
    assert half.eta_s == pytest.approx(70 / 0.5)
    run.finish("build_dataset", read={}, wrote={}, facts={"retries": 0})
    assert status(run, now=1042.0)[0].eta_s is None


def test_status_watch_looks_again_until_all_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "compute.progress_interval_s=0.05")
    ShardStore(tmp_path, "dataset").write_plan(Plan.divide(10, 10, 2, {}), [f"e{i}" for i in range(10)])

    def work() -> None:
        time.sleep(0.5)
        run.finish("build_dataset", read={}, wrote={}, facts={"retries": 0})

    worker = threading.Thread(target=work)
    worker.start()
    assert run_main(status_job, "--out", str(tmp_path), "--watch") == 0
    worker.join()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dataset: ")]
    assert len(lines) > 2
    assert [line.endswith("finished") for line in lines] == [False] * (len(lines) - 1) + [True]


def test_status_watch_is_ended_by_ctrl_c_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path)
    ShardStore(tmp_path, "dataset").write_plan(Plan.divide(10, 10, 2, {}), [f"e{i}" for i in range(10)])

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert run_main(status_job, "--out", str(tmp_path), "--watch") == 0


def test_status_page_of_a_run_in_progress_holds_what_is_there_so_far(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    store, folder = ShardStore(run.folder, "certificates/dual"), run.path
    for file in store.files()[2:]:  # as if it were at work on them
        (folder / "certificates" / "dual" / file).unlink()
    half = store.read().to_pylist()
    error = {"example_id": half[3]["example_id"], "sigma": None, "error": "DataError", "message": "<b>torn</b>"}
    (folder / "errors" / "certificates-dual").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([error], schema=ERROR_SCHEMA),
        folder / "errors" / "certificates-dual" / "shard-000000.parquet",
    )
    store.begin(2, "one")
    store.begin(3, "two")
    assert store.at_work() == {"one", "two"}
    plain = json.loads((folder / "manifest.json").read_text())
    del plain["steps"]["certify-dual"]
    (folder / "manifest.json").write_text(json.dumps(plain))
    assert run_main(status_job, "--out", str(folder), "--html") == 0
    assert f"page: {folder / 'status.html'}" in capsys.readouterr().out
    page = (folder / "status.html").read_text()
    total = len(run.data("test"))
    assert f"<td>{len(half)} of {total}</td>" in page
    assert "<td>2 replicas</td>" in page
    assert "DataError: &lt;b&gt;torn&lt;/b&gt;" in page
    curves = json.loads(page.partition("Curves so far")[2].partition('application/json">')[2].partition("</script>")[0])
    names = re.findall("<span>(certificates/[^<]*)</span>", page.partition("Curves so far")[2])
    values = dict(zip(names, [curve["values"] for curve in curves["curves"]], strict=True))["certificates/dual"]
    right = [row["correct"] and row["radius"] > 0 for row in half]
    assert values[0] == pytest.approx(100 * sum(right) / len(half))
