"""A finished run with two seeds, and a copy of it to spoil."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run with two seeds: 20 examples in two shards."""
    root = tmp_path_factory.mktemp("runs")
    small = ("dataset.test_size=20", "sigmas=[0.12, 0.5]")
    return {seed: finished_run(root / str(seed), *small, f"seed={seed}", weight_seed=3).path for seed in (0, 1)}


@pytest.fixture
def run(finished: dict[int, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"
