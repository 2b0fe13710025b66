"""Base networks that are trained here: interrupted, on workers, side by side; and what the card says of them."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from core.config import parse_config
from core.models.checkpoints import load_model
from core.training.loop import Training
from distributed.store.run_directory import RunDirectory
from distributed.training import checkpoints
from distributed.training import train as training
from distributed.training.lesson import Lesson
from distributed.training.train import Member, Sign
from jobs import train_base
from tests.helpers.tiny import PLAIN, tiny_run

POOL = (
    "base.denoiser.train={steps: 5, batch_size: 32}",
    "base.experts={0.25: {width: 8, train: {epochs: 2, loss: consistency, batch_size: 40}}, 0.5: {width: 8, train: "
    "{epochs: 2, ema: 0.9, optimizer: sgd, momentum: 0.5, schedule: cosine, warmup: 0.2, augment: flip}}}",
)
ROLES = ("denoiser", "classifier-0.25", "classifier-0.5")


def new_run(path: Path, *more: str) -> RunDirectory:
    return RunDirectory(path, parse_config(PLAIN, [*POOL, *more]))


def weights(run: RunDirectory) -> dict[str, bytes]:
    return {role: run.model(role).read_bytes() for role in ROLES}


def test_train_base_interrupted_anywhere_ends_as_undisturbed_and_has_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoints, "_COST", 1e9)
    whole = new_run(tmp_path / "whole", "compute.executor=local")
    train_base.run(whole)
    done: list[str] = []
    step = Training._step

    def noted(self: Training, *rest: Any) -> None:
        step(self, *rest)
        done.append(self.objective.name)

    run = Training.run

    def short(self: Training) -> Iterator[Any]:
        for record in run(self):
            yield record
            if len(done) % 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_step", noted)
    monkeypatch.setattr(Training, "run", short)
    again = new_run(tmp_path / "again", "compute.executor=local")
    for _ in range(20):
        try:
            train_base.run(again)
            break
        except KeyboardInterrupt:
            assert "train_base" not in again.manifest["steps"]
    assert weights(again) == weights(whole)
    # Batches of 97 images: 32 a step; 40; 128. None was done twice, in whichever process.
    assert {name: done.count(name) for name in ROLES} == dict(zip(ROLES, (5, 2 * 3, 2), strict=True))
    assert not list((again.path / "training").rglob("checkpoint.pt"))

    card, networks = (again.path / "models" / "card.md").read_text(), again.manifest["steps"]["train_base"]["networks"]
    rows = dict(
        cells for line in card.splitlines() if len(cells := [c.strip() for c in line.strip("|").split("|")]) == 2
    )
    assert rows["loss"].startswith("gaussian (copies 1, smoothing 0.0")  # of the last one
    assert "consistency (copies 2, weight as published for the nearest sigma, eta 0.5" in card
    assert (rows["architecture"], rows["augment"], rows["ema"]) == ("small_cnn, width 8", "flip", "0.9")
    assert (rows["noise levels"], rows["momentum"], rows["clean images too"]) == ("0.5", "0.5", "yes")
    last = load_model(again.model(ROLES[-1]))
    assert rows["parameters"] == f"{sum(p.numel() for p in last.parameters()):,}"
    losses = networks[ROLES[-1]]["loss"]
    assert rows["loss of the first and of the last epoch"] == f"{losses[0]:.4f}, {losses[-1]:.4f}"
    assert f"97 training images (digest {again.manifest['data']['train']['digest']})" in card
    assert "Not certified yet." in card


def test_train_of_a_pool_runs_as_many_side_by_side_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, "compute.train_workers=3")
    run.data("train")
    events: list[str] = []

    def workers(lesson: Lesson, model: nn.Module, what: str, patience_s: float) -> Iterator[Sign | None]:
        events.append(f"{what} begins")
        yield None
        yield Sign(0, 4, begins=True)
        for epoch in (1, 2):
            events.append(f"{what} {epoch}")
            yield Sign(2 * epoch, 4, {"epoch": float(epoch), "loss": 1 / epoch})
        state = {"model": nn.Linear(1, 1).state_dict(), "history": [{"epoch": 1.0, "loss": float(len(events))}]}
        checkpoints.Checkpoints(lesson.folder, lesson.identity(model)).offer(
            lambda: state, epoch_ended=True, ended=True
        )

    monkeypatch.setattr(training, "_on_workers", workers)
    monkeypatch.setattr(training, "train_cluster", lambda compute: nullcontext())
    monkeypatch.setattr(training, "trainings_at_once", lambda compute: 2)
    lessons = {what: Lesson.of(run, what, "base", role="classifier") for what in "abc"}
    histories = training.train(run, [Member(lesson, nn.Linear(1, 1), what) for what, lesson in lessons.items()])
    assert events == [
        "a begins", "b begins", "a 1", "b 1", "a 2", "b 2", "c begins", "c 1", "c 2",
    ]  # fmt: skip
    assert [history[0]["loss"] for history in histories] == [6.0, 6.0, 9.0]


@pytest.mark.slow
def test_train_base_on_workers_equals_the_plain_loop(tmp_path: Path) -> None:
    quick, roles = ("base.denoiser=none",), ROLES[1:]
    plain = new_run(tmp_path / "plain", "compute.executor=local", *quick)
    train_base.run(plain)
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    try:
        one, two = (new_run(tmp_path / f"{num}", f"compute.train_workers={num}", *quick) for num in (1, 2))
        train_base.run(one)
        train_base.run(two)
    finally:
        ray.shutdown()
    for role in roles:
        assert one.model(role).read_bytes() == plain.model(role).read_bytes()
        a, b = (load_model(run.model(role)).state_dict() for run in (plain, two))
        for name in a:
            # Not of width 4: with one channel a group a bias has no gradient but rounding, of which AdamW makes steps.
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    assert two.manifest["steps"]["train_base"]["networks"][roles[0]]["workers"] == 2
