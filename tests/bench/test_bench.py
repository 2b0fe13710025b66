"""The bench: its opponent is a fair one, its ratios are what they say, and every part runs."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench.cohen import ABSTAIN, Smooth, denoise_and_classify
from bench.settings import Settings
from bench.timing import Line, Spread, Taken, apart, as_markdown, interleaved, ratio, spread
from core.machine.engine import Engine, Task
from core.machine.network import Head, Network
from core.machine.noise import GaussianNoise
from core.models.checkpoints import build_denoiser
from core.models.denoiser import Schedule, trained_unet_config
from core.models.small import SmallConvNet
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Certificate, Sampling
from tests.helpers.reference_noise import normals

SAMPLING = Sampling(100, 250, 0.01)


def keyed(seed: int, example_id: str, sigma: float) -> Callable[[Tensor], Tensor]:
    """The noise of one certificate in batches of 100, by its definition: selection first, then estimation."""
    batches = iter([("selection", 0), ("estimation", 0), ("estimation", 100), ("estimation", 200)])

    def draw(batch: Tensor) -> Tensor:
        phase, first = next(batches)
        return torch.from_numpy(normals(seed, example_id, phase, sigma, len(batch), tuple(batch.shape[1:]), first))

    return draw


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_certify_of_the_loop_with_the_same_noise_gives_the_engine_s_certificates(schedule: Schedule) -> None:
    torch.manual_seed(0)
    denoiser = build_denoiser(trained_unet_config(1, 8), schedule, 1000 if schedule == "linear" else 4000).eval()
    classifier, sigma = SmallConvNet(1, 8, 3).eval(), 0.25
    for module in (denoiser, classifier):  # classes that do not win every draw
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    images = torch.rand(6, 1, 8, 8)
    engine = Engine(Network({CLASSIFIER: Head(classifier, 3)}, denoiser), GaussianNoise(3), batch_size=100)
    tasks = (Task(place, f"x{place}", images[place], certify(sigma, SAMPLING)) for place in range(6))
    ours: dict[int, Certificate] = {done.key: done.result for done in engine.run(tasks)}

    base = denoise_and_classify(denoiser.unet, classifier, sigma, schedule, denoiser.num_steps, "cpu")
    certified, votes = 0, 0
    for place in range(6):
        loop = Smooth(base, 3, sigma, keyed(3, f"x{place}", sigma))
        prediction, radius = loop.certify(images[place], 100, 250, 0.01, 100)
        assert prediction == ours[place].prediction
        assert math.isclose(radius, ours[place].radius, rel_tol=1e-9, abs_tol=1e-12)
        certified += prediction != ABSTAIN
        votes += int(ours[place].counts_estimation.max())
    assert certified
    assert votes < 6 * 250


def test_interleaved_gives_every_contestant_its_turns_and_ratio_compares_them_pairwise() -> None:
    seen: list[str] = []

    def side(name: str) -> Callable[[], float]:
        return lambda: seen.append(name) or 3.0  # type: ignore[func-returns-value]

    taken = interleaved({"a": side("a"), "b": side("b")}, 4)
    assert [len(turns) for turns in taken.values()] == [4, 4]
    assert [sorted(seen[turn : turn + 2]) for turn in range(0, 10, 2)] == [["a", "b"]] * 5  # the first is not counted
    assert all(turn.units == 3.0 and turn.wall_s > 0 for turns in taken.values() for turn in turns)
    added = interleaved({"a": side("a"), "b": side("b")}, 2, rounds=3, warm=False)
    assert [[turn.units for turn in turns] for turns in added.values()] == [[9.0, 9.0], [9.0, 9.0]]
    ours = [Taken(10, 2.0, 1.0), Taken(10, 1.0, 1.0), Taken(10, 5.0, 1.0)]
    theirs = [Taken(20, 2.0, 4.0), Taken(20, 4.0, 4.0), Taken(20, 10.0, 4.0)]
    assert ratio(ours, theirs) == Spread(1.0, 0.5, 2.0, 3)
    assert ratio(ours, theirs, "cpu_s").median == 2.0


def elsewhere(exponent: int) -> dict[str, Callable[[], float]]:
    return {"power": lambda: 2.0**exponent, "process": lambda: float(os.getpid())}


def test_apart_contestants_run_in_one_process_of_their_own() -> None:
    with apart(elsewhere, 5) as contestants:
        taken = interleaved(contestants, 2, warm=False)
    assert [turn.units for turn in taken["power"]] == [32.0, 32.0]
    (process,) = {turn.units for turn in taken["process"]}
    assert process != os.getpid()
    assert all(turn.wall_s >= 0 and turn.cpu_s >= 0 for turn in taken["power"])


@pytest.mark.parametrize(
    ("wanted", "value", "met"),
    [
        (">= 0.97", 0.97, "yes"),
        (">= 0.97", 0.96, "no"),
        ("> 1.0", 1.0, "no"),
        ("<= 2,000", 1999, "yes"),
        ("1+- 0.15", 0.9, "yes"),
        ("1+- 0.15", 1.2, "no"),
        ("", 5, ""),
    ],
)
def test_line_says_whether_the_median_is_what_was_wanted(wanted: str, value: float, met: str) -> None:
    line = Line("part", "what", spread([value]), wanted=wanted)
    assert line.met == met
    assert as_markdown([line]).splitlines()[-1].split("|")[-2].strip() == met


@pytest.mark.slow
def test_every_part_without_ray_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = "engine,labels,forward,budgets,noise,estimate,startup"
    run_bench(tmp_path, monkeypatch, parts)
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert {line["part"] for line in lines} == set(parts.split(","))
    assert all(0 < line["value"]["median"] < math.inf for line in lines)


@pytest.mark.slow
def test_every_part_on_ray_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bench(tmp_path, monkeypatch, "replicas,scheduler")
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert {line["part"] for line in lines} == {"replicas", "scheduler"}


def run_bench(folder: Path, monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    arguments = ["--tiny", "--parts", parts, "--out", str(folder / "results.json"), "--run", str(folder / "run")]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert command.main() == 0


def test_unknown_part_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--parts", "engines"])
    with pytest.raises(SystemExit):
        command.main()
    assert "unknown parts: engines; known: engine, labels" in capsys.readouterr().err


def test_settings_tiny_takes_one_turn() -> None:
    assert (Settings(tiny=True).turns, Settings(repetitions=5).turns) == (1, 5)
