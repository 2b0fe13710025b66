"""The page of examples of a finished run: each number against the rows, each image against the data and the noise."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from core.report import ReportData
from core.report.examples import class_table, examples_page, list_columns
from distributed.methods.rows import ERROR
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.examples import examples_section
from distributed.views.tables import report_data, run_tables
from tests.helpers.reference_noise import normals
from tests.helpers.runs import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return finished_run(tmp_path_factory.mktemp("run"), "report.gallery=2")


def page_of(run: RunDirectory) -> tuple[ReportData, dict[str, Any], str]:
    """What the report shows, the data inside the page, and what is said of it."""
    tables = run_tables(run.config, run.folder)
    data = report_data(run.config, run.folder, run.manifest, tables=tables)
    section = examples_section(run, data, tables)
    return data, inside(section.files["examples.html"].decode()), section.summary


def inside(page: str) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(content))


def pixels(address: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("L"))


def by_id(run: RunDirectory, name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ShardStore(run.folder, f"certificates/{name}").read().to_pylist():
        found.setdefault(row["example_id"], []).append(row)
    return found


def test_examples_votes_and_radii_are_those_of_the_rows(run: RunDirectory) -> None:
    _, page, said = page_of(run)
    methods = {method["name"]: method for method in page["methods"]}
    assert list(methods) == ["Standard RS", "Dual RS", "Dual RS, agreement"]
    assert said == f"examples: {run.path / 'report' / 'examples.html'}"
    for name, title in (("standard", "Standard RS"), ("dual", "Dual RS")):
        stored = by_id(run, name)
        assert page["ids"] == sorted(stored)
        for example_id, shown in zip(page["ids"], methods[title]["rows"], strict=True):
            for row, line in zip(stored[example_id], shown, strict=True):
                sigma, answer, radius, p_lower, draws, end, selection, estimation, *of = line
                assert (sigma, answer, draws, end) == (
                    row["sigma"], row["prediction"], row["num_draws"], row["stop_reason"],
                )  # fmt: skip
                assert 0 <= row["radius"] - radius < 1e-4
                assert 0 <= row["p_lower"] - p_lower < 1e-4
                assert of == [row["num_selection"], row["num_estimation"]]
                for votes, counts in ((selection, "counts_selection"), (estimation, "counts_estimation")):
                    most = sorted(((-n, c) for c, n in enumerate(row[counts]) if n))[:5]
                    assert votes == [x for n, c in most for x in (c, -n)]
    for example_id, levels in zip(page["ids"], methods["Dual RS"]["routers"], strict=True):
        (row,) = by_id(run, "dual")[example_id]
        assert [level[1] for level in levels] == row["counts_selection_sigma"]
        assert [level[2] for level in levels] == row["counts_estimation_sigma"]


def test_examples_say_of_each_level_what_shows_it_and_which_one_binds(run: RunDirectory) -> None:
    _, page, _ = page_of(run)
    agreement = page["methods"][2]
    words = set()
    for (shown,), levels in zip(agreement["rows"], agreement["routers"], strict=True):
        reach = [max(level[3] or 0.0, level[4]) for level in levels]
        assert (shown[1] < 0) == (not any("binds" in level[8] for level in levels))
        for level, far in zip(levels, reach, strict=True):
            assert (level[3] is None) == ("chosen" in level[8])
            words.add(by := level[8].partition(",")[0])
            assert by == ("nothing" if not far else "class" if level[4] >= (level[3] or 0.0) else "router")
            if "binds" in level[8]:
                assert far == min(reach) == shown[2]
    assert {"class", "router"} <= words


def test_examples_list_and_classes_are_a_count_over_the_rows(run: RunDirectory) -> None:
    data, page, _ = page_of(run)
    dual, standard = by_id(run, "dual"), by_id(run, "standard")
    labels = [rows[0]["label"] for rows in dual.values()]
    found, table = class_table(data, np.array(labels), None)
    assert found == page["shownClasses"] == sorted(set(labels))
    bounds = {"sigma": "router", "class": "class", "none": None}
    assert page["bound"] == [bounds[row["bounded_by"]] for (row,) in dual.values()]
    assert page["answer"] == [row["prediction"] for (row,) in dual.values()]
    for label, (name, num, beyond_0, beyond_2, abstained, routed) in zip(found, table.rows, strict=True):
        rows = [row for (row,) in dual.values() if row["label"] == label]
        lost = [x for x, each in zip(page["lost"], labels, strict=True) if each == label]
        assert (name, num) == (str(label), str(len(rows)))
        for radius, text in ((0, beyond_0), (0.2, beyond_2)):
            share = sum(row["correct"] and row["radius"] > radius for row in rows) / len(rows)
            assert text == f"{100 * share:.2f}"
        assert abstained == f"{100 * sum(row['abstained'] for row in rows) / len(rows):.2f}%"
        assert routed == f"{100 * sum(x > 0 for x in lost) / len(rows):.2f}%"
    assert any(x > 0 for x in page["lost"])
    for example_id, lost in zip(page["ids"], page["lost"], strict=True):
        right = [row["prediction"] == row["label"] for row in standard[example_id]]
        if not any(right) or right == [row["sigma"] == dual[example_id][0]["sigma"] for row in standard[example_id]]:
            assert lost == 0, "no level is right, or the chosen one alone"
    first, second = data.standard
    large = replace(first, radius=first.radius + 9.0 * ~first.abstained, correct=np.zeros_like(first.correct))
    alone = list_columns(replace(data, dual=None, standard=(large, second)))
    assert alone["sigma"][0] == second.sigma, "large radii of wrong classes are worth nothing"
    assert set(alone["bound"]) == {None}


def test_examples_images_are_those_of_the_data_and_the_first_estimation_draw(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, dual = run.data("test"), by_id(run, "dual")
    assert isinstance(data.images, np.ndarray)
    turned = replace(data, example_ids=data.example_ids[::-1], images=data.images[::-1], labels=data.labels[::-1])
    monkeypatch.setattr(run, "data", lambda split: turned)  # rows are in the order of the ids, data need not be
    report, page, _ = page_of(run)
    for example_id, small in zip(page["ids"], page["pictures"], strict=True):
        np.testing.assert_array_equal(pixels(small), data.image(data.example_ids.index(example_id))[0])
    worth = {x: row["radius"] if row["correct"] else -row["radius"] for x, (row,) in dual.items()}
    shown = [page["ids"][shot["place"]] for shot in page["gallery"]]
    assert [worth[x] for x in shown[:4]] == [*sorted(worth.values())[::-1][:2], *sorted(worth.values())[:2][::-1]]
    tied = list(worth.values()).count(max(worth.values()))
    assert page["gallery"][0]["why"] == "largest certificate" + f" (shared by {tied})" * (tied > 1)
    assert report.dual is not None
    for example_id, shot in zip(shown, page["gallery"], strict=True):
        image = data.image(data.example_ids.index(example_id)).astype(np.float32) / 255
        np.testing.assert_array_equal(pixels(shot["clean"]), (image[0] * 255).round())
        sigma = run.config.sigmas[report.dual.sigma_choice[shot["place"]]]
        draw = normals(run.config.seed, example_id, "estimation", sigma, 1, image.shape)[0]
        expected = np.clip(image + sigma * draw, 0, 1)[0] * 255
        np.testing.assert_allclose(pixels(shot["noisy"]), expected, atol=0.51)
        assert pixels(shot["denoised"]).shape == image.shape[1:]


def test_examples_without_images_or_models_say_why(run: RunDirectory) -> None:
    model = run.model("denoiser")
    aside = model.rename(model.with_suffix(".aside"))
    try:
        _, page, said = page_of(run)
    finally:
        aside.rename(model)
    assert page["gallery"] == page["pictures"] == []
    assert "No images: " in said
    assert "denoiser" in said
    assert len(page["ids"]) == 50


def test_examples_that_could_not_be_run_say_of_which_kind_the_error_was(run: RunDirectory) -> None:
    tables = run_tables(run.config, run.folder)
    data = report_data(run.config, run.folder, run.manifest, tables=tables)
    rows = tables["dual"].to_pylist()
    rows[3]["status"] = ERROR
    broken = tables | {"dual": type(tables["dual"]).from_pylist(rows, schema=tables["dual"].schema)}
    page = inside(examples_section(run, data, broken).files["examples.html"].decode())
    assert page["errors"] == {"3": "Dual RS: error"}
    assert page["methods"][1]["routers"][3] == []


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_page_keeps_names_from_outside_apart_from_its_code(run: RunDirectory) -> None:
    data, page, _ = page_of(run)
    names = [EVIL] * 10
    content = {key: page[key] for key in ("ids", "answer", "methods", "errors", "pictures", "gallery")}
    content["ids"] = [f"{EVIL}{place}" for place in range(50)]
    text = examples_page(replace(data, labels=EVIL), np.array(page["label"]), names, content, EVIL)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert inside(text)["ids"][0] == EVIL + "0"
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in text
    written = (Path(examples_page.__code__.co_filename).parent / "examples.js").read_text()
    assert script == written
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|fetch|import", written)
