"""Runs whose radii are l1, through every job: what they certify, what is said of it, and what is refused."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core import SmoothedClassifier
from core.config import parse_config
from core.errors import ConfigError, DataError, NoiseError
from core.law import LAPLACE, SPLITTING, law_of
from core.machine.noise import make_noise
from core.machine.noise_check import problems
from core.models.checkpoints import load_model
from core.procedures.confidence import certified_radius
from core.running import _check_own
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.recertify import Change, recertify
from jobs import audit, choose_sigmas, pipeline, predict, report
from tests.core.machine.test_l1_noise import drawn
from tests.helpers.tiny import PLAIN, run_main

SMALL = (
    "base.denoiser=none", "compute.executor=local", "dataset.test_size=800", "dataset.train.first=200",
    "dataset.test.first=12", "estimator.epochs=2", "finetune.epochs=0", "labels.num_selection=5",
    "labels.num_estimation=40", "certify.num_selection=5", "certify.num_estimation=100", "compute.part_rows=1",
    "base.experts={0.25: {width: 4, train: {epochs: 12}}, 0.5: {width: 4, train: {epochs: 12}}}",
)  # fmt: skip

OWN = '''"""Laplace noise of my own."""

import numpy as np

from core.law import Laplace, OwnNoise


class Mine(Laplace):
    title = "my Laplace"


def draw(words, sigma):
    u = (words.astype(np.float64) + 0.5) / 2**31  # in (-1, 1), never 0
    return (-np.sign(u) * np.log(np.abs(u)) * sigma / np.sqrt(2)).astype(np.float32)


def noise():
    return OwnNoise(Mine(), draw)
'''


def own_file(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = OWN) -> None:
    (folder / "own_noise_file.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("own_noise_file", None)
    importlib.invalidate_caches()
    from core.law import own_noise

    own_noise.cache_clear()
    _check_own.cache_clear()


def test_splitting_goes_through_every_job_without_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    config = parse_config(PLAIN, [*SMALL, "noise=splitting", "certify.claim=agreement"])
    pipeline.run(RunDirectory(out, config))
    run = RunDirectory(out, None, "look")
    images, rows = run.data("test"), ShardStore(run.folder, "certificates/standard").read().to_pylist()
    expert = load_model(run.model("classifier-0.5"))
    for row in (row for row in rows if row["sigma"] == 0.5):
        image = torch.from_numpy(images.image(images.example_ids.index(row["example_id"]))).float() / 255
        copies = drawn(make_noise("splitting", config.seed), image, 0.5, SPLITTING.copies(0.5))
        with torch.inference_mode():
            votes = torch.bincount(torch.cat([expert(copy[None]) for copy in copies]).argmax(dim=1), minlength=10)
        assert row["counts_estimation"] == votes.tolist()
        assert row["num_estimation"] == SPLITTING.copies(0.5) == 442
        assert row["alpha"] == 0.0
        share = votes[row["prediction"]].item() / 442 if not row["abstained"] else 0.0
        assert row["radius"] == pytest.approx(max(0.0, 2 * 442 / 510 * (share - 0.5)), abs=1e-12)
    assert sum(row["radius"] > 0 for row in rows) > len(rows) / 3
    assert run_main(audit, "--out", out, "--replay", "6") == 0
    shown = (run.path / "report/report.md").read_text() if (run.path / "report/report.md").exists() else ""
    shown = shown or next(run.path.rglob("report.md")).read_text()
    assert "Radii are l1" in shown
    assert "alpha is 0" in shown
    assert "r / d: with d = 64" in shown

    with pytest.raises(ConfigError, match="have no failure probability"):
        recertify(run, Change(alpha=0.1))
    data, _ = recertify(run, Change(sigmas=(0.5,)))
    assert data.alpha == 0.0
    for job, arguments, message in (
        (predict, ("--images", str(tmp_path)), "decides without chance"),
        (predict, ("--images", str(tmp_path), "--certify", "--seed", "3"), "part of the classifier"),
        (choose_sigmas, (), "known for Gaussian noise alone"),
    ):
        (tmp_path / "a.png").write_bytes(png(images.image(0)))
        capsys.readouterr()
        assert run_main(job, "--out", out, *arguments) != 0
        assert message in capsys.readouterr().err
    assert run_main(predict, "--out", out, "--images", str(tmp_path / "a.png"), "--certify") == 0
    assert "radii are l1" in capsys.readouterr().out


def png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels[0]).save(out, "PNG")
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["uniform", "own_noise_file:noise"])
def test_l1_run_is_audited_replayed_and_compared(
    noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_file(tmp_path, monkeypatch)
    out, other = str(tmp_path / "run"), str(tmp_path / "gaussian")
    pipeline.run(RunDirectory(out, parse_config(PLAIN, [*SMALL, f"noise={noise}"])))
    pipeline.run(RunDirectory(other, parse_config(PLAIN, SMALL)))
    run = RunDirectory(out, None, "look")
    rows = [row for row in ShardStore(run.folder, "certificates/standard").read().to_pylist() if row["radius"] > 0]
    assert len(rows) >= 4
    for row in rows:
        assert row["radius"] == float(certified_radius(row["p_lower"], row["sigma"], law_of(noise)))
    assert run_main(audit, "--out", out, "--replay", "6") == 0
    capsys.readouterr()
    assert run_main(report, "--runs", out, other, "--out", str(tmp_path / "both")) == 0
    table = (tmp_path / "both/comparison.md").read_text()
    assert "l1 radii" in table
    assert "l2 radii" in table
    assert "none is called the best" in table
    assert "Less the first run" not in table
    if ":" in noise:
        assert run.manifest["sources"]["noise"]["named"] == noise
        own_file(tmp_path, monkeypatch, OWN + "\n")
        (run.path / "certificates/standard" / ShardStore(run.folder, "certificates/standard").files()[0]).unlink()
        assert run_main(pipeline, "--out", out) != 0
        assert "is not the file that" in capsys.readouterr().err


def test_own_noise_has_its_law_and_one_with_another_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_file(tmp_path, monkeypatch)
    noise = make_noise("own_noise_file:noise", 0)
    assert not list(problems(noise, torch.device("cpu")))
    values = drawn(noise, torch.zeros(1, 16, 32), 0.5, 400).double()
    assert float(values.abs().mean()) == pytest.approx(float(LAPLACE.scale(0.5)), rel=0.02)
    own_file(tmp_path, monkeypatch, OWN.replace("sigma / np.sqrt(2)", "sigma / 2"))
    found = list(problems(make_noise("own_noise_file:noise", 0), torch.device("cpu")))
    assert "a half-space falls below what its law says" in found[0]
    own_file(tmp_path, monkeypatch, OWN.replace("np.float32)", "np.float64)"))
    with pytest.raises(ConfigError, match="draw returned float64"):
        make_noise("own_noise_file:noise", 0)


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        # At sigma = 1, where alone it was looked for, a variance is a standard deviation.
        (").astype(np.float32) * np.float32(sigma)", NoiseError, r"at sigma = 0\.5 a half-space falls below"),
        (").clip(-sigma).astype(np.float32)", NoiseError, "scale down an axis"),  # half-spaces up an axis are right
        (").astype(np.float32)[np.arange(-1, len(u) - 1)]", ConfigError, "other noise of a word in other company"),
    ],
)
def test_own_noise_that_is_wrong_at_its_level_downwards_or_between_pixels_is_refused(
    end: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path, monkeypatch, OWN.replace(").astype(np.float32)", end))
    with pytest.raises(error, match=message):
        SmoothedClassifier(lambda images: images.flatten(1)[:, :2], 2, 0.5, noise="own_noise_file:noise")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("noise=cauchy",), "noise: is 'cauchy', expected one of"),
        (("noise=uniform", "base.denoiser={train: {}}"), "base.denoiser: denoisers are for Gaussian noise"),
        (("noise=laplace", "base.experts=null", "base.classifier={train: {loss: macer}}"), "loss macer"),
        (("noise=splitting", "certify.budget=grid"), "certify.budget: noise splitting takes all copies"),
        (("noise=uniform", "noise_version=1"), "noise_version: noise uniform has no version 1"),
        (("noise=nowhere_to_be_found:noise",), "cannot import 'nowhere_to_be_found'"),
    ],
)
def test_keys_that_do_not_go_with_the_noise_are_refused(key: tuple[str, ...], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        parse_config(PLAIN, [*SMALL, *key])


def test_radii_that_no_number_of_draws_certifies_are_refused() -> None:
    config = parse_config(PLAIN, [*SMALL, "noise=uniform", "report.radii=[0, 0.9]"])
    with pytest.raises(ConfigError, match=r"certify no radius from 0\.8647 on, with however many draws"):
        config.check_radii()
