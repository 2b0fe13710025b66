"""Logs in the field's format: a hand-made one whose table is known, and ours read as the field's scripts read them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from core.config import parse_config
from core.errors import ConfigError, DataError
from core.evaluation.exchange import format_log, parse_log
from core.procedures.smoothing import certificate
from core.records import Certificate, Sampling
from core.report.render import write_report
from distributed.checks.preflight import check
from distributed.files.storage import Folder
from distributed.methods.multiscale import Multiscale
from distributed.methods.rows import CERTIFICATE_SCHEMA, certificate_row, error_row
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.exchange import export_logs, import_log, imported_logs
from jobs import import_tsv
from tests.core.report.test_report import report
from tests.helpers.tiny import PLAIN, run_main

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
LOG = HEADER + (
    "0\t3\t3\t0.924\t1\t0:00:15.382909\n"
    "20\t8\t8\t0.25\t1\t0:00:12.1\n"
    "40\t8\t8\t0.0871\t1\t0:00:12.2\n"
    "60\t0\t-1\t0.0\t0\t0:00:12.3\n"
    "80\t6\t4\t0.51\t0\t0:00:12.4\n"
)
"""As certify.py writes it. Beyond 0: 3 of 5; at least .25: 2; beyond .25: 1; beyond .5: 1; beyond 1: 0."""


def usual(frame: pd.DataFrame, radius: float) -> float:
    """Certified accuracy as analyze.py of Cohen et al. has it, word for word."""
    df = frame
    return float((df["correct"] & (df["radius"] >= radius)).mean())


def test_parse_log_hand_made_has_its_lines() -> None:
    log = parse_log(LOG, "log")
    assert log.idx.tolist() == [0, 20, 40, 60, 80]
    assert log.predict.tolist() == [3, 8, 8, -1, 4]
    assert log.radius.tolist() == [0.924, 0.25, 0.0871, 0.0, 0.51]
    assert log.correct.tolist() == [True, True, True, False, False]
    assert log.abstained.tolist() == [False, False, False, True, False]


def test_parse_log_columns_in_another_order_and_more_of_them() -> None:
    text = "sigma\tcorrect\tradius\tpredict\tlabel\tidx\n0.5\tTrue\t0.25\t8\t8\t20\n"
    log = parse_log(text, "log")
    assert (log.idx.tolist(), log.radius.tolist(), log.correct.tolist()) == ([20], [0.25], [True])


def test_parse_log_as_multiscale_writes_it_abstains_with_minus_two_as_well() -> None:
    text = "idx\tlabel\tpredict\tradius\tr_neg\tcorrect\tpred_uc\tcorr_uc\tstage\ttime\n"
    text += "0\t3\t3\t0.412\t-1e+02\t1\t3\t1\t0\t0:00:20\n1\t8\t-2\t0.0\t-1e+02\t0\t8\t1\t1\t0:00:41\n"
    log = parse_log(text + "2\t8\t-1\t0.0\t-0.3\t0\t1\t0\t2\t0:00:42\n", "log")
    assert (log.correct.tolist(), log.abstained.tolist()) == ([True, False, False], [False, True, True])


def test_parse_log_running_count_of_correct_ones_is_understood() -> None:
    """diffusion_denoised_smoothing's script for CIFAR-10 adds up: its column reads 1 1 2 2, and not 1 0 1 0."""
    rows = [(0, 3, 3, 0.5, 1), (10, 8, -1, 0.0, 1), (20, 8, 8, 0.25, 2), (30, 1, 2, 0.3, 2)]
    text = HEADER + "".join("\t".join(map(str, row)) + "\t0:00:01\n" for row in rows)
    assert parse_log(text, "log").correct.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 names no column 'idx'"),
        ("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t0:1\n", "a log of predict.py certifies no radius"),
        (HEADER, "a header and no line below it"),
        (HEADER + "0\t3\t3\t0.9\n", "line 2: has 4 columns"),
        (HEADER + "0\t3\t3\tx\t1\t0\n", "line 2: expected whole numbers"),
        (HEADER + "0\t3\t3\t0.5\t2\t0\n", "line 2: correct is 2, but predict is 3 and label is 3"),
        (HEADER + "0\t3\t3\t0.5\tyes\t0\n", "line 2: expected whole numbers"),
        (HEADER + "0\t3\t3\tnan\t1\t0\n", "line 2: radius must be a finite number"),
        (HEADER + "0\t3\t3\t-0.1\t1\t0\n", "line 2: radius must be a finite number"),
        (HEADER + "0\t3\t-1\t0.1\t0\t0\n", "line 2: label is a class, predict a class or -1"),
        (HEADER + "0\t-1\t-1\t0\t1\t0\n", "line 2: label is a class, predict a class or -1"),
        (HEADER + "0\t3\t3\t0.1\t1\t0\n1\t4\t3\t0.1\t1\t0\n2\t4\t4\t0.1\t3\t0\n", "line 3: correct is 1"),
        (HEADER + "0\t3\t4\t0.1\t1\t0\n", "line 2: correct is 1, but predict is 4 and label is 3"),
        (LOG + "20\t8\t8\t0.2\t1\t0\n", "line 7: idx 20 was there before"),
    ],
)
def test_parse_log_bad_line_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_log(text, "cohen.tsv")
    assert str(caught.value).startswith("cohen.tsv: ")


def test_import_log_hand_made_shows_the_known_values_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "cohen.tsv").write_text(LOG)
    root = Folder(tmp_path / "run")
    import_log(root, "cohen-0.25", tmp_path / "cohen.tsv")
    assert (tmp_path / "run/imported/cohen-0.25/log.tsv").read_text() == LOG
    about = json.loads((tmp_path / "run/imported/cohen-0.25/about.json").read_text())
    assert about["examples"] == 5
    data = replace(report(), imported=imported_logs(root), radii=np.array([0.0, 0.25, 0.5, 1.0]))
    write_report(data, tmp_path / "report")
    with (tmp_path / "report/table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "Imported: cohen-0.25"]
    assert [float(row["certified_accuracy"]) for row in rows] == [0.6, 0.2, 0.2, 0.0]  # radius > r
    assert float(rows[1]["ci95_lower"]) == pytest.approx(0.00505, abs=5e-6)  # 1 of 5, tabulated
    loose = {m.name: m for m in replace(data, strict=False).methods()}["Imported: cohen-0.25"]
    frame = pd.read_csv(tmp_path / "cohen.tsv", delimiter="\t")
    assert loose.accuracy(data.radii).tolist() == [usual(frame, r) for r in data.radii] == [0.6, 0.4, 0.2, 0.0]
    text = (tmp_path / "report/report.md").read_text()
    assert "Imported logs: cohen-0.25 (5 examples)" in text
    assert "Imported: cohen-0.25" in (tmp_path / "report/report.html").read_text()


def test_report_imported_log_never_leads_and_may_have_other_examples(tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text(HEADER + "0\t3\t3\t99\t1\t0\n")  # one example, certified very far
    root = Folder(tmp_path)
    import_log(root, "one", tmp_path / "one.tsv")
    plain, data = report(), replace(report(), imported=imported_logs(root))
    assert [[m.name for m in best] for best in data.leaders()] == [[m.name for m in best] for best in plain.leaders()]
    assert data.methods()[-1].accuracy(data.radii).tolist() == [1.0] * 5


def test_import_log_bad_name_or_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(LOG)
    (tmp_path / "bad.tsv").write_bytes(b"\xff\xfe\x00")
    root = Folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="--name"):
        import_log(root, "../up", tmp_path / "log.tsv")
    with pytest.raises(DataError, match=r"bad\.tsv' is not text"):
        import_log(root, "bad", tmp_path / "bad.tsv")
    with pytest.raises(DataError, match="No such file"):
        import_log(root, "none", tmp_path / "none.tsv")
    assert not (tmp_path / "run").exists()


def votes(top: int, of: int) -> Certificate:
    counts = np.array([of - top, top, 0], np.int64)
    return certificate(counts, counts, 0.5, Sampling(of, of, 0.001))


def store_with(root: Path, ids: list[str]) -> ShardStore:
    """Certificates of class 1 with radii of many digits, an abstention, a wrong class, an error."""
    store = ShardStore(root, "certificates/standard")
    tops, labels = [97, 88, 80, 50], [1, 1, 2, 1]
    rows = [certificate_row(i, label, votes(top, 100)) for i, label, top in zip(ids, labels, tops, strict=False)]
    rows.append(error_row(CERTIFICATE_SCHEMA, {}, ids[4], 1, 0.5, 0.001))
    store.commit(0, rows, CERTIFICATE_SCHEMA, "cpu")
    return store


def test_export_read_by_pandas_gives_the_same_certified_accuracies(tmp_path: Path) -> None:
    ids = [f"cifar10-test-{number:05d}" for number in (0, 20, 40, 60, 80)]
    table = store_with(tmp_path / "run", ids).read().to_pandas()
    ((name, _),) = export_logs(Folder(tmp_path / "run"), ["certificates/standard"], Folder(tmp_path / "logs"))
    assert name == "standard-0.5.tsv"
    frame = pd.read_csv(tmp_path / "logs" / name, delimiter="\t")
    assert frame.columns.tolist() == ["idx", "label", "predict", "radius", "correct", "time"]
    assert frame["idx"].tolist() == [0, 20, 40, 60, 80]
    assert frame["radius"].tolist() == table["radius"].tolist()  # every bit
    assert frame["predict"].tolist() == [1, 1, 1, -1, -1]
    assert frame["correct"].tolist() == [1, 1, 0, 0, 0]
    reached = table["radius"].tolist()
    for radius in (0.0, reached[1], np.nextafter(reached[1], 9), reached[0], 2.0):
        certified = table["correct"] & (table["radius"] >= radius)
        assert usual(frame, radius) == certified.mean()
    assert [usual(frame, r) for r in (0.0, reached[0], np.nextafter(reached[0], 9))] == [0.4, 0.2, 0.0]


def test_export_import_round_trip_is_the_same_log(tmp_path: Path) -> None:
    store_with(tmp_path, [f"digits-{number:04d}" for number in range(5)])
    ((name, log),) = export_logs(Folder(tmp_path), ["certificates/standard"], Folder(tmp_path / "logs"))
    back = import_log(Folder(tmp_path), "ours", tmp_path / "logs" / name)
    for field in ("idx", "label", "predict", "radius", "correct"):
        assert np.array_equal(getattr(log, field), getattr(back, field))
    assert format_log(back) == (tmp_path / "logs" / name).read_text()


def test_export_ids_without_numbers_are_listed_beside_the_log(tmp_path: Path) -> None:
    ids = [f"val/class/{letter}.png" for letter in "abcde"]
    store_with(tmp_path, ids)
    ((name, log),) = export_logs(Folder(tmp_path), ["certificates/standard"], Folder(tmp_path / "logs"))
    assert log.idx.tolist() == [0, 1, 2, 3, 4]
    assert (tmp_path / "logs" / name.replace(".tsv", ".ids.txt")).read_text().splitlines() == ids


def test_export_method_with_a_row_per_example_is_one_curve(tmp_path: Path) -> None:
    rows = [
        error_row(Multiscale.schema, Multiscale.empty, f"digits-{number:04d}", 1, None, 0.001) for number in range(2)
    ]
    ShardStore(tmp_path, "certificates/multiscale").commit(0, rows, Multiscale.schema, "cpu")
    ((name, log),) = export_logs(Folder(tmp_path), ["certificates/multiscale"], Folder(tmp_path / "logs"))
    assert (name, len(log.idx)) == ("multiscale.tsv", 2)


def test_export_store_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards in"):
        export_logs(Folder(tmp_path), ["certificates/dual"], Folder(tmp_path / "logs"))


IMAGENET = HEADER + "0\t852\t852\t0.5\t1\t0:1\n20\t3\t3\t2.5\t1\t0:1\n"


def import_job(where: Path, log: Path, *more: str) -> int:
    return run_main(import_tsv, "--out", str(where), "--name", "log", "--file", str(log), *more)


def test_import_tsv_with_a_configuration_makes_a_run_that_remembers_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(PLAIN))
    (tmp_path / "log.tsv").write_text(LOG)
    assert import_job(tmp_path / "new", tmp_path / "log.tsv", "--config", str(config)) == 0
    assert "log: 5 examples, 20.00% abstained" in capsys.readouterr().out
    assert RunDirectory(tmp_path / "new", None).config.sigmas == (0.25, 0.5)
    assert list(imported_logs(Folder(tmp_path / "new"))) == ["log"]
    assert import_job(tmp_path / "none", tmp_path / "log.tsv") == 2
    (tmp_path / "bad.tsv").write_text("idx")
    assert import_job(tmp_path / "bad", tmp_path / "bad.tsv", "--config", str(config)) == 3
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "bad").exists()


def test_import_tsv_log_with_other_classes_than_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.tsv").write_text(IMAGENET)
    run = RunDirectory(tmp_path / "run", parse_config(PLAIN))
    assert import_job(run.path, tmp_path / "log.tsv") == 3
    assert "idx 0 has class 852, but this run has 10 classes (0 to 9)" in capsys.readouterr().err
    assert imported_logs(run.folder) == {}
    (tmp_path / "predicted.tsv").write_text(HEADER + "0\t1\t10\t0.5\t0\t0:1\n")
    assert import_job(run.path, tmp_path / "predicted.tsv") == 3
    where: dict[str, object] = {"name": "folder", "path": str(tmp_path / "elsewhere")}
    RunDirectory(tmp_path / "own", parse_config({**PLAIN, "dataset": where}))
    assert import_job(tmp_path / "own", tmp_path / "log.tsv") == 0
    assert "its labels were not checked" in capsys.readouterr().out
    RunDirectory(tmp_path / "counted", parse_config({**PLAIN, "dataset": where}, ["dataset.num_classes=853"]))
    assert import_job(tmp_path / "counted", tmp_path / "log.tsv") == 0
    assert "not checked" not in capsys.readouterr().out


def test_radii_that_only_an_imported_log_reaches_are_a_note(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, parse_config(PLAIN, ["report.radii=[0, 2]", "compute.executor=local"]))
    found = check(run, ["certify-standard"])
    assert any("report.radii asks for 2" in str(problem) for problem in found.problems)
    (tmp_path / "log.tsv").write_text(IMAGENET)
    import_log(run.folder, "far", tmp_path / "log.tsv")
    assert not any("report.radii" in str(problem) for problem in check(run, ["certify-standard"]).problems)
    data = replace(report(), imported=imported_logs(run.folder), radii=np.array([0.0, 2.0]))
    write_report(data, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "Beyond radius 2 this run certifies nothing, whatever its networks do: 100 draws at alpha = 0.001" in text
    write_report(replace(data, radii=np.array([0.0, 0.5])), tmp_path / "report")
    assert "whatever its networks do" not in (tmp_path / "report/report.md").read_text()
