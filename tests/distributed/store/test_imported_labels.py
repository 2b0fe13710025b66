"""Label files of the authors: what is refused, and that training on our own radii in their format changes nothing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from core.data import Dataset
from core.errors import DataError
from distributed.checks.audit import audit
from distributed.store.imported_labels import _check_rows, import_labels, parse_labels
from distributed.store.run_directory import RunDirectory
from jobs import build_dataset, choose_sigmas, train_estimator
from jobs import import_labels as job
from tests.helpers.tiny import run_main, tiny_run

QUICK = (
    "compute.executor=local", "dataset.train.first=30", "labels.num_selection=10", "labels.num_estimation=20",
    "estimator.epochs=2", "estimator.batch_size=16", "estimator.augment=flip",
)  # fmt: skip
GOOD = [[0.5, 0.0, 0.5, 0], [0.1, 0.7, 0.7, 1], [0, 0, 0, -1], [0.0, 2.0, 2.0, 1]]


def content(rows: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parse_labels_returns_the_radii(dtype: type) -> None:
    expected = np.array(GOOD, dtype)[:, :2].astype(np.float64)
    assert np.array_equal(parse_labels(content(np.array(GOOD, dtype)), (0.25, 0.5), "f"), expected)


@pytest.mark.parametrize(
    ("row", "sigmas", "message"),
    [
        (None, (0.25, 0.5, 1.0), r"float64 of shape \(4, 4\), expected numbers of shape \(N, 5\).*set sigmas"),
        ([0.5, np.nan, 0.5, 0], (0.25, 0.5), r"row 1 is \[0.5, nan, 0.5, 0.0\]: not all of it is finite"),
        ([0.5, -0.1, 0.5, 0], (0.25, 0.5), "row 1 is .*: radii are at least 0"),
        ([0.5, 0.7, 0.5, 0], (0.25, 0.5), "row 1 is .*: column 2 is not the largest of its radii"),
        ([0.5, 0.7, 0.7, 0], (0.25, 0.5), "row 1 is .*: column 3 is not the index of its largest radius"),
        ([0.5, 0.7, 0.7, 2], (0.25, 0.5), "column 3 is not the index"),
        ([0.5, 0.7, 0.7, 0.9], (0.25, 0.5), "column 3 is not the index"),
        ([1.6, 0.7, 1.6, 0], (0.25, 0.5), r"row 1 is .*: column 0 is above 1.05, .* at sigma = 0.25: its columns have"),
    ],
)
def test_parse_labels_refuses_what_contradicts_itself(row: Any, sigmas: tuple[float, ...], message: str) -> None:
    rows = np.array(GOOD)
    if row is not None:
        rows[1] = row
    with pytest.raises(DataError, match=f"^f.*{message}"):
        parse_labels(content(rows), sigmas, "f")


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"text", content(np.array([{}], object)), content(np.array(["a"]))]
)
def test_parse_labels_refuses_other_files(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^f (is no \.npy file of numbers|holds)"):
        parse_labels(data, (0.25, 0.5), "f")


def authors_file(run: RunDirectory, path: Path) -> Path:
    """The radii of a run's rows in the authors' format, by the Parquet files alone."""
    table = pq.read_table(run.path / "dataset").to_pandas()
    table["right"] = np.where(table["correct"], table["radius"], 0.0)
    wide = table.pivot(index="example_id", columns="sigma", values="right")
    radii = wide.loc[list(run.data("train").example_ids), sorted(wide.columns)].to_numpy()
    np.save(path, np.column_stack([radii, radii.max(axis=1), radii.argmax(axis=1)]))
    return path


def test_import_labels_of_a_run_gives_the_estimator_of_that_run_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", *QUICK)
    build_dataset.run(run)
    file = authors_file(run, tmp_path / "labels.npy")
    train_estimator.run(run)
    other = tiny_run(tmp_path / "other", *QUICK)
    out = str(other.path)
    assert run_main(job, "--out", out, "--file", str(file)) == 0
    kept = int((np.load(file)[:, 2] > 0).sum())
    assert 0 < kept < 30, "some are dropped"
    assert f"30 rows, {kept} with a radius" in capsys.readouterr().out
    assert run_main(build_dataset, "--out", out) == 0, "there is nothing to do"
    assert run_main(train_estimator, "--out", out) == 0
    other = RunDirectory(out, None, "look")
    assert not (other.path / "dataset").exists()
    trained = other.manifest["steps"]["train_estimator"]
    assert (trained["samples"], trained["of"]) == (kept, 30)
    assert trained["wrote"] == run.manifest["steps"]["train_estimator"]["wrote"]
    assert trained["loss"] == run.manifest["steps"]["train_estimator"]["loss"]

    assert audit(other) == ([], {})
    capsys.readouterr()
    assert run_main(choose_sigmas, "--out", out, "--size", "1") == 2
    assert "a choice of Sigma needs votes, and the labels of " in capsys.readouterr().err
    stored = other.path / "imported" / "labels.npy"
    changed = np.load(stored)
    changed[changed[:, 2] > 0, :3] *= 0.99
    np.save(stored, changed)
    (finding,) = audit(other)[0]
    assert "is not the file that was imported" in str(finding)

    # Refused for the run, not for the file.
    assert run_main(job, "--out", str(run.path), "--file", str(file)) == 2
    assert "holds labels of the run's own; import into another --out" in capsys.readouterr().err
    np.save(tmp_path / "short.npy", np.load(file)[:20])
    with pytest.raises(DataError, match="has 20 rows, the training split 30 examples: rows have no id"):
        import_labels(other, tmp_path / "short.npy")
    assert run_main(job, "--out", out, "--file", str(tmp_path / "none.npy")) == 3
    assert "cannot read" in capsys.readouterr().err
    mapped = tiny_run(tmp_path / "mapped", *QUICK, "estimator.label_radius=at_10k")
    assert run_main(job, "--out", str(mapped.path), "--file", str(file)) == 2
    assert "estimator.label_radius: at_10k is computed from votes, and imported lab" in capsys.readouterr().err


def test_import_labels_refuses_an_order_that_is_not_the_files() -> None:
    data = Dataset("some", ("a", "b", "c"), np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3, np.int64), 2)
    _check_rows(np.zeros((3, 2)), data, "f", False)
    with pytest.raises(DataError, match=r"'f' is in the order of CIFAR-10's pickles, .*take dataset\.layout=original"):
        _check_rows(np.zeros((3, 2)), data, "f", True)
