"""What a wheel of the project holds, and that it works in an environment that knows nothing of the checkout."""

import email
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import core
from core.errors import ConfigError
from jobs import report
from jobs.__main__ import summaries

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("core", "distributed", "jobs")


def test_version_stands_in_one_place() -> None:
    assert core.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    image = re.search(r"dual-rs:(\d[\w.]*)", (ROOT / "deploy/Dockerfile").read_text())
    assert image is not None
    assert image[1] == PROJECT["version"]


def test_extras_are_there_and_the_base_has_none_of_them() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"report", "aws", "docs", "dev"} <= extras.keys()
    names = {re.split(r"[\[<>=~ ]", text)[0] for text in PROJECT["dependencies"]}
    optional = {re.split(r"[\[<>=~ ]", text)[0] for extra in ("report", "aws", "docs") for text in extras[extra]}
    assert not names & optional
    assert "dual-rs[report,docs]" in extras["dev"]


def test_report_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib.*pip install -e '\.\[report\]'"):
        report.require_matplotlib()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git has (and what is about to be committed), without the network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if name.partition("/")[0] in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and the dependencies of this one without its editable install."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    binary = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(binary), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # A path in a .pth file is searched after the environment's own, and its .pth files (the editable one) are not run.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return binary


def run(python: Path, folder: Path, *args: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(python), *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_holds_the_packages_their_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (email.message_from_bytes(archive.read(n)) for n in names if n.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules | {f"{package}/py.typed" for package in PACKAGES} == {n for n in names if ".dist-info/" not in n}
    assert metadata["Name"] == "dual-rs"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert set(metadata.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    base = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert len(base) == len(PROJECT["dependencies"])
    assert not any(text.startswith("matplotlib") for text in base)


@pytest.mark.slow
def test_wheel_in_a_fresh_environment_lists_jobs_and_certifies(python: Path, tmp_path: Path) -> None:
    where = "import core, distributed, jobs; print(core.__file__, distributed.__file__, jobs.__file__)"
    for path in run(python, tmp_path, "-c", where).split():
        assert Path(path).is_relative_to(python.parent.parent)
    listed = run(python, tmp_path, "-m", "jobs")
    assert all(f"\n  {name} " in listed for name in summaries())
    code = (
        "import core, torch\n"
        "net = lambda x: torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)\n"
        "c = core.SmoothedClassifier(net, 2, 0.25).certify(torch.full((1, 8, 8), 0.6), num_estimation=1000)\n"
        "print(core.__version__, c.prediction, 0.5 < c.radius < 0.8)"
    )
    assert run(python, tmp_path, "-c", code).split() == [PROJECT["version"], "1", "True"]


@pytest.mark.slow
def test_wheel_gives_its_types_to_callers(python: Path, tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(
        "import torch\n"
        "from core import SmoothedClassifier\n"
        "from distributed.store.shards import ShardStore\n"
        "from jobs.pipeline import run\n"
        "certificate = SmoothedClassifier(torch.nn.Identity(), 2, 0.25).certify(torch.zeros(1, 8, 8))\n"
        "reveal_type(certificate.radius)\n"
        "reveal_type(ShardStore)\n"
        "reveal_type(run)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "--no-incremental"]
    result = subprocess.run([*command, "caller.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "float"' in result.stdout, result.stdout + result.stderr
    assert "missing library stubs or py.typed" not in result.stdout
    assert "distributed.store.shards.ShardStore" in result.stdout
    assert "distributed.store.run_directory.RunDirectory" in result.stdout
