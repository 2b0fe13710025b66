"""Results as a DataFrame, against the fields they are made of, plain pandas and scipy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from core import ABSTAIN, DualSmoothedClassifier, SmoothedClassifier
from core.errors import ConfigError, DataError
from distributed.files.storage import Folder
from distributed.store.shards import ShardStore
from dual_rs import results
from tests.distributed.views.test_exchange import LOG


def bright(images: Tensor) -> Tensor:
    share = images.mean((1, 2, 3)) - 0.5
    return torch.stack([-share, share], 1)


def level(images: Tensor) -> Tensor:
    return torch.tensor([[0.0, 1.0]]).repeat(len(images), 1)


IMAGES = torch.stack([torch.full((1, 4, 4), value) for value in (0.2, 0.5, 0.7, 0.9)])


def test_of_certificates_has_their_fields_and_says_which_are_right() -> None:
    certificates = SmoothedClassifier(bright, 2, 0.25).certify_many(IMAGES, num_estimation=200)
    table = results.of_certificates(certificates, [0, 1, 1, 0], method="mine")
    assert table["radius"].tolist() == [c.radius for c in certificates]
    assert [list(votes) for votes in table["counts_estimation"]] == [list(c.counts_estimation) for c in certificates]
    assert (table["method"] == "mine").all()
    assert table["correct"].tolist() == [True, certificates[1].prediction == 1, True, False]
    assert table["abstained"].tolist() == [c.prediction == ABSTAIN for c in certificates]
    with pytest.raises(ConfigError, match=r"shape \(4,\)"):
        results.of_certificates(certificates, [0, 1])
    with pytest.raises(DataError, match="needs a column 'correct'"):
        results.accuracy(results.of_certificates(certificates), [0.0])


@pytest.mark.parametrize("claim", ["constant", "agreement"])
def test_of_certificates_takes_both_claims(claim: str) -> None:
    dual = DualSmoothedClassifier(level, bright, (0.25, 0.5), 0.5, 2)
    certificates = dual.certify_many(IMAGES, num_estimation=200, claim=claim)  # type: ignore[call-overload]
    table = results.of_certificates(certificates, [0, 1, 1, 1])
    assert table["radius"].tolist() == [c.radius for c in certificates]
    assert table["sigma"].tolist() == [c.sigma for c in certificates]
    assert table["num_draws"].tolist() == [c.num_draws for c in certificates]


def test_accuracy_is_the_share_with_the_interval_of_scipy() -> None:
    generator = np.random.default_rng(3)
    table = pd.DataFrame(
        {
            "method": ["a"] * 40 + ["b"] * 25,
            "radius": generator.choice([0.0, 0.25, 0.5, 1.0], 65),
            "correct": generator.random(65) < 0.7,
        }
    )
    found = results.accuracy(table, [0.0, 0.25, 0.75], confidence=0.9)
    assert len(found) == 6
    for row in found.itertuples():
        rows = table[table["method"] == row.method]
        hits = int((rows["correct"] & (rows["radius"] > row.radius)).sum())
        interval = stats.binomtest(hits, len(rows)).proportion_ci(0.9, method="exact")
        assert row.certified_accuracy == pytest.approx(hits / len(rows), abs=1e-15)
        assert (row.lower, row.upper) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert row.examples == len(rows)
    loose = results.accuracy(table, [0.25], strict=False)["certified_accuracy"].tolist()
    assert loose == [(r["correct"] & (r["radius"] >= 0.25)).mean() for _, r in table.groupby("method")]


def test_of_log_counts_as_its_own_script_does(tmp_path: Path) -> None:
    (tmp_path / "sigma_0.25.tsv").write_text(LOG)
    table = results.of_log(tmp_path / "sigma_0.25.tsv")
    assert results.accuracy(table, [0, 0.25, 1], strict=False)["certified_accuracy"].tolist() == [0.6, 0.4, 0.0]
    assert set(table["method"]) == {"sigma_0.25"}


def test_plot_draws_into_the_axes_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(LOG)
    table = pd.concat([results.of_log(tmp_path / "log.tsv", method=name) for name in ("one", "two")])
    axes = Figure().add_subplot()
    assert results.plot(table, axes) is axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines) == ["one", "two"]
    x, y = lines["one"].get_data()
    for radius, share in zip(x, y, strict=True):
        expected = 100 * sum(r > radius for r in (0.924, 0.25, 0.0871)) / 5
        assert share == pytest.approx(expected)
    assert results.plot(table).get_figure() is not None


def test_of_run_has_every_row_of_its_stores(finished: Path, tmp_path: Path) -> None:
    run = Folder(finished)
    table = results.of_run(run)
    assert table["method"].iloc[0].startswith("standard, sigma = ")
    stores = {name: ShardStore(run, f"certificates/{name}").read() for name in ("standard", "dual")}
    assert len(table) == sum(map(len, stores.values()))
    dual = table[table["method"] == "dual"]
    assert dual["radius"].tolist() == stores["dual"].column("radius").to_pylist()
    with pytest.raises(DataError, match="holds no certificates"):
        results.of_run(tmp_path)
