"""PREDICT: its statistic against scipy and exact sums, and jobs.predict against the public API, image by image."""

import csv
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats

from core import DualSmoothedClassifier, SmoothedClassifier
from core.agreement_records import Router
from core.data.digits import read_digits
from core.errors import ConfigError, DataError
from core.models.checkpoints import load_model
from core.procedures.dual import dual_predict
from core.procedures.smoothing import predict
from core.records import ABSTAIN, CLASSIFIER, ESTIMATOR, Answer, Draws
from distributed.store.run_directory import RunDirectory
from distributed.studies.predict import Question, columns_of, open_images, predict_images, write_rows
from jobs import predict as predict_job
from tests.helpers.oracles import drive
from tests.helpers.tiny import run_main, tiny_run

ALPHA = 0.01


def _always(answer: Answer, draws: Draws) -> Answer:
    return answer


@pytest.mark.parametrize("votes", [(30, 12, 8), (12, 30, 8), (21, 21, 8), (50, 0, 0), (0, 3, 1), (17, 16, 17)])
def test_predict_p_value_is_that_of_scipy_for_the_two_top_classes(votes: tuple[int, ...]) -> None:
    result = drive(predict(0.5, sum(votes), ALPHA), lambda draws: {CLASSIFIER: np.array(votes)})
    first, second, *_ = sorted(votes, reverse=True)
    expected = stats.binomtest(first, first + second, 0.5, alternative="two-sided").pvalue
    assert math.isclose(result.p_value, expected, rel_tol=1e-12)
    assert result.prediction == (votes.index(first) if expected <= ALPHA else ABSTAIN)


def test_predict_three_classes_wrong_class_probability_by_exact_sum_is_at_most_alpha() -> None:
    """All classes equally likely, so that two of three answers are wrong: the worst case of choosing the top two."""
    num, alpha, wrong = 40, 0.2, 0.0
    for a, b in itertools.product(range(num + 1), repeat=2):
        if a + b <= num:
            answer = {CLASSIFIER: np.array([a, b, num - a - b])}
            result = drive(predict(0.5, num, alpha), partial(_always, answer))
            if result.prediction in (1, 2):
                wrong += float(stats.multinomial.pmf(answer[CLASSIFIER], num, [1 / 3] * 3))
    assert alpha / 8 < wrong <= alpha


def test_dual_predict_wrong_answer_probability_by_exact_sum_is_at_most_alpha() -> None:
    """The right level is 0.5 and the right class there 1; at 0.25 the class is 0. Both stages are ties."""
    num, alpha, wrong = 40, 0.1, 0.0
    likely = stats.binom.pmf(np.arange(num + 1), num, 0.5)
    for level, label in itertools.product(range(num + 1), repeat=2):

        def votes(draws: Draws, level: int = level, label: int = label) -> Answer:
            if draws.heads == (ESTIMATOR,):
                return {ESTIMATOR: np.array([num - level, level])}
            return {CLASSIFIER: np.array([num, 0] if draws.sigma == 0.25 else [num - label, label])}

        if drive(dual_predict((0.25, 0.5), 1.0, num, alpha), votes).prediction == 0:
            wrong += float(likely[level] * likely[label])
    # Each two-sided test at alpha / 2 errs to the wrong side half as often; one at alpha would exceed this.
    assert alpha / 8 < wrong <= alpha / 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = tiny_run(tmp_path_factory.mktemp("predict") / "run", "compute.executor=local")
    directory.data("train")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four digits, one that is broken, one of another size, and something that is no image."""
    root = tmp_path_factory.mktemp("images")
    digits = read_digits("test", 500, 0)
    (root / "more").mkdir()
    for index in range(4):
        Image.fromarray(digits.image(index)[0]).save(root / ("more" if index == 3 else "") / f"{index}.png")
    (root / "broken.png").write_bytes((root / "0.png").read_bytes()[:60])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "large.png")
    (root / "notes.txt").write_text("no image")
    return root


def question(**changes: Any) -> Question:
    asked = Question("dual", None, certify=False, num=60, alpha=0.1, classifier="base", seed=0)
    return replace(asked, **changes)


def answers(run: RunDirectory, where: Path, asked: Question) -> dict[str, dict[str, Any]]:
    rows = predict_images(run, open_images(str(where), run.config), asked, "cpu")
    assert all(row.keys() <= set(columns_of(asked)) for row in rows)
    return {row["id"]: row for row in rows}


def loaded(run: RunDirectory, name: str) -> Any:
    return load_model(run.model(name))


def test_predict_images_dual_equals_the_public_api_image_by_image(run: RunDirectory, folder: Path) -> None:
    digits, names = read_digits("test", 500, 0), ["0.png", "1.png", "2.png", "more/3.png"]
    smoothed = DualSmoothedClassifier(
        loaded(run, "estimator"), loaded(run, "classifier"), (0.25, 0.5), 0.5, 10,
        denoiser=loaded(run, "denoiser"),
    )  # fmt: skip
    predicted, certified = (answers(run, folder, question(certify=certify)) for certify in (False, True))
    for index, name in enumerate(names):
        image = torch.from_numpy(digits.image(index))
        row = predicted[name]
        assert row["class"] == smoothed.predict(image, num=60, alpha=0.1, batch_size=64, example_id=name)
        assert row["abstained"] == (row["class"] == ABSTAIN)
        assert row["class_name"] == ("" if row["abstained"] else str(row["class"]))
        certificate = smoothed.certify(
            image, num_selection=20, num_estimation=60, alpha=0.1, batch_size=64, example_id=name
        )
        row = certified[name]
        assert (row["class"], row["sigma"], row["radius"]) == (
            certificate.prediction,
            certificate.sigma,
            certificate.radius,
        )
        assert (row["radius_sigma"], row["radius_class"]) == (certificate.radius_sigma, certificate.radius_class)
    assert {row["class"] for row in predicted.values()} != {ABSTAIN}


@pytest.mark.parametrize("router", ["median", "plurality"])
def test_predict_images_agreement_equals_the_public_api(run: RunDirectory, folder: Path, router: Router) -> None:
    digits, names = read_digits("test", 500, 0), ["0.png", "1.png"]
    smoothed = DualSmoothedClassifier(
        loaded(run, "estimator"), loaded(run, "classifier"), (0.25, 0.5), 0.5, 10,
        denoiser=loaded(run, "denoiser"),
    )  # fmt: skip
    config = run.config.model_copy(update={"certify": run.config.certify.model_copy(update={"router": router})})
    asked = [question(method="agreement", certify=certify) for certify in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "config", config)
        predicted, certified = (answers(run, folder, each) for each in asked)
    for index, name in enumerate(names):
        image, row = torch.from_numpy(digits.image(index)), predicted[name]
        common: dict[str, Any] = {"alpha": 0.1, "batch_size": 64, "example_id": name, "router": router}
        assert row["class"] == smoothed.predict(image, num=60, claim="agreement", **common)
        assert row["sigma"] in (None, 0.25, 0.5)
        row = certified[name]
        certificate = smoothed.certify(image, claim="agreement", num_selection=20, num_estimation=60, **common)
        assert (row["class"], row["sigma"], row["radius"], row["radius_constant"]) == (
            certificate.prediction, certificate.sigma, certificate.radius, certificate.radius_constant,
        )  # fmt: skip
    assert any(not row["abstained"] for row in certified.values())


def test_predict_images_standard_equals_the_public_api(run: RunDirectory, folder: Path) -> None:
    model, digits = loaded(run, "classifier"), read_digits("test", 500, 0)
    smoothed = SmoothedClassifier(model, 10, 0.25, denoiser=loaded(run, "denoiser"), seed=3)
    rows = answers(run, folder, question(method="standard", sigma=0.25, seed=3))
    found = [rows[f"{index}.png"]["class"] for index in range(3)]
    images = [torch.from_numpy(digits.image(index)) for index in range(3)]
    ids = ["0.png", "1.png", "2.png"]
    assert found == smoothed.predict_many(images, num=60, alpha=0.1, batch_size=64, example_ids=ids)


def test_predict_images_that_cannot_be_read_become_rows_with_the_error(run: RunDirectory, folder: Path) -> None:
    rows = answers(run, folder, question())
    assert list(rows) == ["0.png", "1.png", "2.png", "broken.png", "large.png", "more/3.png"]
    for name, message in (("broken.png", "broken.png"), ("large.png", "has shape (1, 9, 9), the run's images have")):
        assert message in rows[name]["error"]
        assert (rows[name]["class"], rows[name]["abstained"]) == (ABSTAIN, True)
    assert all(row["error"] == "" for name, row in rows.items() if name not in ("broken.png", "large.png"))


def test_predict_job_folder_and_parquet_of_the_same_images_give_the_same_rows(
    run: RunDirectory, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["0.png", "1.png", "broken.png"]
    pq.write_table(
        pa.table({"picture": [(folder / n).read_bytes() for n in names], "key": names}), tmp_path / "a.parquet"
    )
    images = open_images(str(tmp_path / "a.parquet"), run.config, "picture", "key")
    from_parquet = predict_images(run, images, question(), "cpu")
    one = answers(run, folder, question())
    assert [row["class"] for row in from_parquet] == [one[name]["class"] for name in names]
    assert "row 2" in from_parquet[2]["error"]
    twice = (("a", "b", "a"), images[1])  # they would draw the same noise, and nobody could tell their rows apart
    with pytest.raises(DataError, match="'a' names 2 images, expected one each; name another --id-column"):
        predict_images(run, twice, question(), "cpu")

    flags = ("--classifier", "base", "--num", "60", "--alpha", "0.1", "compute.device=cpu")
    asked = ("--out", str(run.path), "--images", str(folder), *flags)
    assert run_main(predict_job, *asked, "--to", str(tmp_path / "a.csv")) == 0
    out = capsys.readouterr().out
    assert "6 images" in out
    assert "2 that could not be read" in out
    with (tmp_path / "a.csv").open() as file:
        written = {row["id"]: row for row in csv.DictReader(file)}
    assert {name: int(row["class"]) for name, row in written.items()} == {n: row["class"] for n, row in one.items()}


def test_write_rows_parquet_keeps_types_and_nulls(tmp_path: Path) -> None:
    asked = question(certify=True)
    row = {"id": "a", "class": -1, "class_name": "", "sigma": None, "abstained": True, "error": "why"}
    write_rows([row], columns_of(asked), str(tmp_path / "rows.parquet"))
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == list(columns_of(asked))
    assert table.to_pylist() == [{**dict.fromkeys(columns_of(asked)), **row}]
    assert table.schema.field("radius").type == pa.float64()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 4}, "too few to decide anything at 0.05 a stage; use at least 6"),  # 2 / 2^6 <= 0.05 < 2 / 2^5
        ({"num": 4, "certify": True}, "use at least 5"),  # 0.05^(1/5) > 1/2 > 0.05^(1/4)
        ({"alpha": 0.0}, r"alpha in \(0, 1\)"),
    ],
)
def test_question_that_no_answer_can_come_of_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        question(**changes)


def test_predict_images_bad_sigma_or_empty_folder_is_refused(
    run: RunDirectory, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_images(str(folder), run.config)
    for asked in (question(method="standard", sigma=0.3), question(method="standard"), question(sigma=0.25)):
        with pytest.raises(ConfigError, match="sigma"):
            predict_images(run, images, asked, "cpu")
    for where, message in ((tmp_path, "no image files"), (tmp_path / "none", "is not there: expected a folder")):
        assert run_main(predict_job, "--out", str(run.path), "--images", str(where)) == 3
        assert message in capsys.readouterr().err
    assert run_main(predict_job, "--out", str(run.path), "--images", str(folder), "--to", "a.txt") == 2
