"""The documentation against the code: links, commands, references; as `make docs-test`, everything that can run."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from core.config import load_config, load_sweep
from core.data.digits import read_digits
from jobs import _cli
from jobs.__main__ import summaries
from tests.helpers.documents import (
    GENERATED,
    PAGES,
    ROOT,
    Command,
    anchors,
    blocks,
    commands,
    inline_jobs,
    links,
    name_of,
)
from tests.helpers.tiny import run_main

sys.path.insert(0, str(ROOT / "docs" / "_site"))
import reference

COMMANDS = [command for page in PAGES for command in commands(page)]
CLUSTER = (
    "ray ", "aws ", "gcloud ", "DUALRS_IMAGE=", "kubectl ", "sbatch ", "scancel ", "docker ", "export RAY_",
    "tail -f slurm-", "tensorboard --logdir ", "seq ",
)  # fmt: skip
"""Commands of others, most of which need a cluster: what they run is parsed, and the files that they name are there."""
ONCE = {  # commands that run elsewhere, with the test or target that runs them
    "make demo FAST=1": "test_fast_demo_certifies_with_the_models_of_the_checkout",
    "make demo": "tests/project/test_demo.py",
}


# Links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[\w./~%+-]*)?(#[\w-]+)?", target), target
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if path.parent == ROOT / "docs" and path.name in GENERATED:
            text = reference.configuration_page() if path.name == "configuration.md" else reference.jobs_page()
        else:
            assert path.exists(), f"{name_of(page)}: {target}"
            text = path.read_text(encoding="utf-8") if anchor else ""
        assert not anchor or anchor in anchors(text), f"{name_of(page)}: {target}"


def test_links_dead_one_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md) ![b](figures/x.svg) `[c](code)` [d](page.md#part)\n\n## Part\n")
    assert links(page) == ["gone.md", "figures/x.svg", "page.md#part"]
    assert anchors(page.read_text()) == {"part"}


# References that the code writes


def test_configuration_reference_has_every_key_with_its_meaning() -> None:
    page = reference.configuration_page()
    for name, field, section in reference.fields():
        assert section is not None or field.description, f"{name} has no docstring below it"
        part = page.partition(f"## `{name.rpartition('.')[0]}`\n" if "." in name else "## Top level\n")[2]
        assert f"\n| `{name.rpartition('.')[2]}` |" in part.partition("\n## ")[0], name
    assert "| `num_estimation` | whole number, ≥ 1 | `10000` | " in page
    assert "| `sigmas` | list of number > 0 | **needed** | " in page
    assert "| `executor` | `ray` or `local` | `ray` | " in page


def test_jobs_reference_has_every_job_with_its_help() -> None:
    page = reference.jobs_page()
    for name in summaries():
        assert f"usage: python -m jobs.{name}" in page
    assert "--retry-errors" in page


# Commands


def parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """The arguments of the job that a command runs, as its parser understands them."""
    assert command.job is not None
    name, *arguments = command.job
    module, seen = importlib.import_module(f"jobs.{name}"), []

    def keep(parser: ArgumentParser, run: object) -> int:
        seen.append(parser.parse_intermixed_args())
        return 0

    monkeypatch.setattr(_cli, "run_job", keep)
    if hasattr(module, "run_job"):
        monkeypatch.setattr(module, "run_job", keep)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert module.main() == 0
    return Namespace(**vars(seen[0]))


def write_file(made: str) -> None:
    """Run the block of extending.md that writes a file, here."""
    block = next(block for block in blocks(ROOT / "docs/extending.md", "python") if f'"{made}' in block)
    exec(compile(block, "extending.md", "exec"), {})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.job], ids=lambda c: f"{c.page}: {c.text}")
def test_command_of_a_job_parses_and_its_configuration_is_valid(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "my_noise" in command.text:  # a noise is code that a configuration needs to be valid
        monkeypatch.chdir(tmp_path)
        write_file("my_noise")
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    args = parse(command, monkeypatch)
    if getattr(args, "config", None) is not None:
        (load_sweep if command.job and command.job[0] == "sweep" else load_config)(args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_jobs_inside_sentences_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in inline_jobs(page):
        assert command.job is not None
        assert command.job[0] in summaries(), command
        if "--help" in command.text:
            continue
        needs_out = "--out" not in command.text and not re.search(r"jobs\.(convert|fetch)", command.text)
        complete = Command(command.page, command.text + " --out RUN" * needs_out)
        with monkeypatch.context() as patch:
            parse(complete, patch)
    for file in re.findall(r"`(?:make test|pytest) (tests/\w+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file


def test_every_command_is_run_or_checked_somewhere() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(COMMANDS) > 40
    for command in COMMANDS:
        words = command.text.split()
        if command.text in ONCE or command.local:
            continue  # by the tests below
        if words[0] == "make":
            assert words[1] in targets, command
        elif command.text.startswith(".venv/bin/python -m pytest "):
            assert all((ROOT / word).is_file() for word in words[3:]), command
        else:
            assert command.text.startswith(CLUSTER), f"nobody runs {command}"
            for word in words:
                assert "/" not in word or not word.startswith(("deploy/", "configs/")) or (ROOT / word).is_file(), word


# What runs: `make docs-test`

SMALL = (
    "compute.executor=local compute.max_replicas=0 dataset.test_size=500 dataset.train.first=30 dataset.test.first=20 "
    "base.denoiser=models/digits/models/denoiser.safetensors "
    "base.classifier={checkpoint: models/digits/models/classifier.safetensors} "
    "labels.num_selection=10 labels.num_estimation=30 estimator.epochs=1 finetune.epochs=1 finetune.num_sigma_draws=10 "
    "certify.num_selection=10 certify.num_estimation=60 report.radii=[0,0.1] compute.shard_examples=5"
)
"""Makes any run on the digits one of seconds."""


def small() -> list[str]:
    return re.findall(r"[\w.]+=(?:\{[^}]*\}|\S+)", SMALL)


def run_job(name: str, *arguments: str) -> int:
    return run_main(importlib.import_module(f"jobs.{name}"), *arguments)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder that looks like the checkout, with a finished small run, also as runs/digits."""
    folder, before = tmp_path_factory.mktemp("desk"), Path.cwd()
    for name in ("configs", "models", "examples", "deploy", "cluster.yaml"):
        (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)
    Path("IMAGES").mkdir()
    for number in range(2):
        Image.fromarray(read_digits("test", 500, 0).image(number)[0]).save(f"IMAGES/{number}.png")
    assert run_job("pipeline", "--config", "configs/digits_fast.yaml", "--out", "RUN", *small()) == 0
    for name in ("digits", "digits-fast"):
        shutil.copytree("RUN", f"runs/{name}")
    yield folder
    os.chdir(before)


def environment() -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return plain | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def made_small(arguments: list[str]) -> list[str]:
    """The arguments of a job so that a new run takes seconds, and that one that is there goes on as it was begun."""
    if any("train_workers" in word for word in arguments):
        return [*arguments, "compute.executor=ray"]
    if "--config" not in arguments:
        return arguments
    out = Path(arguments[arguments.index("--out") + 1])
    if (out / "manifest.json").exists():
        place = arguments.index("--config")
        return [word for word in arguments[:place] + arguments[place + 2 :] if "=" not in word]
    given = {argument.partition("=")[0] for argument in arguments}
    added = [override for override in small() if override.partition("=")[0] not in given]
    if "configs/digits_l1.yaml" in arguments:  # experts of its own, no denoiser
        added = [override for override in added if not override.startswith("base.")]
        pool = "{0.25: {train: {epochs: 1}}, 0.5: {train: {epochs: 1}}, 1.0: {train: {epochs: 1}}}"
        added += [] if "base.experts" in given else [f"base.experts={pool}"]
    if any(word.startswith("noise=") or "budget=" in word for word in arguments):
        added.append("dataset.test.first=4")
    return arguments + added


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_run(page: Path, desk: Path) -> None:
    for command in commands(page):
        absent = ("BUCKET", "/shared/", "cifar10", "device=cuda", "fashion_mnist", "runs/losses")
        elsewhere = any(word in command.text for word in absent)
        if not command.local or elsewhere:
            continue  # a cluster's, a GPU's, or data that are not here: parsed above
        words = command.text.split()
        if command.job is None:
            if words[1].startswith("examples/"):
                assert (ROOT / words[1]).is_file()  # run by test_example_runs_from_its_first_line
            else:
                subprocess.run([sys.executable, *words[1:]], env=environment(), check=True, timeout=300)
            continue
        name, *arguments = command.job
        arguments = made_small(["desk/models" if word == "models/digits" else word for word in arguments])
        if name == "import_tsv" and not Path("logs").exists():
            assert run_job("export", "--out", "RUN", "--to", "logs") == 0
        for made in ("mine.pt", "my_models", "my_noise"):
            if made in command.text:
                write_file(made)
        assert run_job(name, *arguments) == 0, f"{command}: {arguments}"


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_runs(page: Path, desk: Path) -> None:
    if page.name == "results.md":
        assert run_job("export", "--out", "RUN", "--to", "logs") == 0
    for number, block in enumerate(blocks(page, "python"), 1):
        if page.name == "CONTRIBUTING.md":
            for name in ("before", "after"):
                shutil.copytree("RUN", f"runs/{name}", dirs_exist_ok=True)
        if page.name == "operations.md":
            block = block.replace('"RUN/errors/dataset"', '"errors"')  # RUN has none
            write_errors(Path("errors"))
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), {"__name__": "__main__"})


def write_errors(folder: Path) -> None:
    """One error, as a replica writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from distributed.methods.rows import ERROR_SCHEMA

    folder.mkdir(exist_ok=True)
    row = {"example_id": "digits-0000", "sigma": 0.25, "error": "DataError", "message": "broken", "node": "here"}
    pq.write_table(pa.Table.from_pylist([row], schema=ERROR_SCHEMA), folder / "shard-000000.parquet")


@pytest.mark.docs
def test_notebook_runs_from_top_to_bottom_and_shows_what_it_says(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "examples" / "dual_rs.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "notebook.py").write_text("\n\n".join([*cells, "print(accuracy)", "axes.figure.savefig('plot.png')"]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    result = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert all(result.stdout.count(method) == 4 for method in ("sigma = 0.2", "sigma = 0.4", "Dual RS"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.docs
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("[!_]*.py")), ids=lambda path: path.name)
def test_example_runs_from_its_first_line(example: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(example)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2
    assert ast_command(example) == f"python examples/{example.name}"


def ast_command(example: Path) -> str | None:
    """The command that its docstring names."""
    match = re.search(r"`(python examples/\w+\.py)", example.read_text(encoding="utf-8"))
    return match[1] if match else None


@pytest.mark.docs
def test_queries_of_the_results_page_agree_with_the_report(desk: Path) -> None:
    """pandas, Polars and DuckDB on the shards give what the certificates' own reader gives."""
    import duckdb
    import numpy as np
    import pandas as pd
    import polars as pl

    from distributed.methods.standard import grid
    from distributed.store.shards import ShardStore

    page = blocks(ROOT / "docs" / "results.md", "python")
    scope: dict[str, object] = {}
    for block in page[:4]:
        exec(compile(block, "results.md", "exec"), scope)
    own = ShardStore("RUN", "certificates/dual").read().to_pandas()
    dual, best, table = scope["dual"], scope["best"], scope["table"]
    assert isinstance(dual, pd.DataFrame)
    assert isinstance(best, pl.DataFrame)
    assert isinstance(table, duckdb.DuckDBPyRelation)
    assert sorted(dual["radius"]) == sorted(own["radius"])
    sigmas = load_config(ROOT / "configs/digits_fast.yaml").sigmas
    labels = ShardStore("RUN", "dataset").read()
    radii = np.where(grid(labels, "correct", sigmas), grid(labels, "radius", sigmas), 0.0)
    counts = np.bincount(radii.argmax(1)[radii.max(1) > 0], minlength=len(sigmas))
    assert dict(best.iter_rows()) == {s: int(c) for s, c in zip(sigmas, counts, strict=True) if c}
    found = {method: (share, draws) for method, share, draws in table.fetchall()}
    assert found["dual"][0] == pytest.approx((own["correct"] & (own["radius"] > 0.1)).mean())
    standard = ShardStore("RUN", "certificates/standard").read().to_pandas()
    for sigma, rows in standard.groupby("sigma"):
        assert found[str(sigma)] == pytest.approx(
            ((rows["correct"] & (rows["radius"] > 0.1)).mean(), rows["num_draws"].mean())
        )


@pytest.mark.docs
def test_fast_demo_certifies_with_the_models_of_the_checkout(tmp_path: Path) -> None:
    """What `make demo FAST=1` runs after the installation, at a tenth of its examples."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    assert "models/digits" in recipe
    assert "-m jobs.pipeline" in recipe
    shutil.copytree(ROOT / "models" / "digits", tmp_path / "run")
    assert run_job("audit", "--out", str(tmp_path / "run"), "--replay", "3") == 0
    assert run_job("pipeline", "--out", str(tmp_path / "run"), "--dry-run", "compute.executor=local") == 0


@pytest.mark.docs
def test_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        mkdocs, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300
    )
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?([^\" >]+)", text)
        fetched += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preload|icon|preconnect)[^>]*\bhref=\"?([^\" >]+)", text)
        assert not [address for address in fetched if re.match(r"(https?:)?//", address)], page
