"""What a wheel of the project holds, and that it works in an environment that knows nothing of the checkout."""

import email
import os
import re
import shutil
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
SOURCES = (*PACKAGES, "dual_rs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


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
    assert {"report", "aws", "docs", "mlflow", "wandb", "dev"} <= extras.keys()
    names = {re.split(r"[\[<>=~ ]", text)[0] for text in PROJECT["dependencies"]}
    optional = {re.split(r"[\[<>=~ ]", text)[0] for extra in extras.keys() - {"dev"} for text in extras[extra]}
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
        if name.partition("/")[0] in SOURCES and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, a `distributed` as dask's, and this one's dependencies without its editable
    install.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    binary = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(binary), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # A path in a .pth file is searched after the environment's own, and its .pth files (the editable one) are not run.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (packages / "distributed").mkdir()
    (packages / "distributed" / "__init__.py").write_text("class Client: ...\n")
    return binary


def run(python: Path, folder: Path, *args: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(python), *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_holds_one_package_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (email.message_from_bytes(archive.read(n)) for n in names if n.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"dual_rs"}
    modules = {f"dual_rs/{path.relative_to(ROOT)}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    modules |= {"dual_rs/__init__.py", "dual_rs/__main__.py"}
    typed = {"dual_rs/py.typed", *(f"dual_rs/{package}/py.typed" for package in PACKAGES)}
    assert modules | typed == {n for n in names if ".dist-info/" not in n}
    assert metadata["Name"] == "dual-rs"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert set(metadata.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    base = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert len(base) == len(PROJECT["dependencies"])
    assert not any(text.startswith("matplotlib") for text in base)


@pytest.mark.slow
def test_wheel_imports_nothing_by_the_names_of_the_checkout(python: Path, wheel: Path, tmp_path: Path) -> None:
    """Every module, in an environment where those names are somebody else's."""
    for name in ("core", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".py") and "__main__" not in name]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "from distributed import Client\n"
        "from dual_rs.distributed.methods import METHODS, method_named\n"
        "print(Client.__module__, *(type(method_named(name)).__module__.partition('.')[0] for name in METHODS))"
    )
    assert run(python, tmp_path, "-c", code).split() == ["distributed", *["dual_rs"] * 4]


@pytest.mark.slow
def test_wheel_in_a_fresh_environment_lists_jobs_and_certifies(python: Path, tmp_path: Path) -> None:
    script = python.with_name("dual-rs")
    for command in ((python, "-m", "dual_rs"), (python, "-m", "dual_rs.jobs"), (script,)):
        listed = run(*command[:1], tmp_path, *command[1:])
        assert all(f"\n  {name} " in listed for name in summaries())
    assert run(script, tmp_path, "--names").split() == list(summaries())
    assert run(script, tmp_path, "certify", "--help").startswith("usage: dual-rs certify ")
    code = (
        "import dual_rs, torch\n"
        "net = lambda x: torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)\n"
        "c = dual_rs.SmoothedClassifier(net, 2, 0.25).certify(torch.full((1, 8, 8), 0.6), num_estimation=1000)\n"
        "print(dual_rs.__version__, c.prediction, 0.5 < c.radius < 0.8)"
    )
    assert run(python, tmp_path, "-c", code).split() == [PROJECT["version"], "1", "True"]


@pytest.mark.slow
def test_wheel_runs_a_step_with_and_without_ray(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray ships to its workers by name is found there too."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for executor in ("local", "ray"):
        shutil.copytree(ROOT / "models" / "digits", tmp_path / executor)
        options = ("--method", "standard", f"compute.executor={executor}")
        run(python.with_name("dual-rs"), tmp_path, "certify", "--out", executor, *options)
    code = (
        "from pathlib import Path; from dual_rs.distributed.store.shards import ShardStore\n"
        "runs = [ShardStore(Path(run), 'certificates/standard').read().to_pandas() for run in ('local', 'ray')]\n"
        "keys = ['example_id', 'sigma', 'counts_estimation']\n"
        "one, other = (run[keys].astype(str).sort_values(keys[:2]) for run in runs)\n"
        "print(len(one), (one.to_numpy() == other.to_numpy()).all())"
    )
    assert run(python, tmp_path, "-c", code).split() == ["300", "True"]


@pytest.mark.slow
def test_wheel_gives_its_types_to_callers(python: Path, tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(
        "import torch\n"
        "from dual_rs import SmoothedClassifier\n"
        "from dual_rs.distributed.store.shards import ShardStore\n"
        "from dual_rs.jobs.pipeline import run\n"
        "certificate = SmoothedClassifier(torch.nn.Identity(), 2, 0.25).certify(torch.zeros(1, 8, 8))\n"
        "reveal_type(certificate.radius)\n"
        "reveal_type(ShardStore)\n"
        "reveal_type(run)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "--no-incremental"]
    result = subprocess.run([*command, "caller.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "float"' in result.stdout, result.stdout + result.stderr
    assert "missing library stubs or py.typed" not in result.stdout
    assert "dual_rs.distributed.store.shards.ShardStore" in result.stdout
    assert "dual_rs.distributed.store.run_directory.RunDirectory" in result.stdout
