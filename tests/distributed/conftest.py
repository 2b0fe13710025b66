"""Finished runs, and copies of them to spoil."""

import shutil
from pathlib import Path

import pytest

from distributed.store.run_directory import RunDirectory
from tests.helpers.runs import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run")).path


@pytest.fixture(scope="session")
def finished_cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with which the larger sigma does not always decide; one file per store."""
    settings = ("sigmas=[0.1, 1.0]", "compute.part_rows=1000", "certify.level_shares=[0.25, 0.5]")
    return finished_run(
        tmp_path_factory.mktemp("cascade"), *settings, more=("multiscale", "agreement"), weight_seed=3
    ).path


@pytest.fixture
def cascade(finished_cascade: Path, tmp_path: Path) -> RunDirectory:
    """A copy to spoil."""
    shutil.copytree(finished_cascade, tmp_path / "cascade")
    return RunDirectory(tmp_path / "cascade", None)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDirectory:
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return RunDirectory(tmp_path / "run", None)
