"""Draws and time of the budgets of Dual RS, beside standard RS, on trained networks and test images of the digits.

Time should follow the draws. `drawn` counts the copies that the certificates used; the padding of the last batches is
in the time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.settings import Settings
from bench.timing import Line, Taken, interleaved, ratio, spread
from core.config import load_config
from core.machine.cpu import settle
from core.machine.engine import Engine
from core.procedures.sequential import Budget, dual_procedure, standard_procedure
from core.records import Rule, Sampling
from distributed.execution.launch import work_of
from distributed.execution.work import build_engine, make_task
from distributed.files.datasets import load_dataset
from distributed.store.run_directory import RunDirectory
from jobs import build_dataset, train_base, train_estimator

__all__ = ["budgets", "trained"]

_CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
_QUICK = (
    "base.denoiser.train.steps=5",
    "base.classifier.train.epochs=1",
    "estimator.epochs=1",
    "labels.num_estimation=10",
)


def trained(settings: Settings) -> RunDirectory:
    """The run directory of the settings, with denoiser, classifier and estimator; training takes a minute or two."""
    if (settings.run / "manifest.json").exists():
        run = RunDirectory(settings.run, None)
    else:
        quick = (*_QUICK, "labels.num_selection=10", "dataset.test_size=1700") if settings.tiny else ()
        run = RunDirectory(settings.run, load_config(_CONFIG, ["compute.executor=local", *quick]))
    steps: tuple[tuple[str, Callable[[RunDirectory], None]], ...] = (
        ("train_base", train_base.run),
        ("build_dataset", build_dataset.run),
        ("train_estimator", train_estimator.run),
    )
    for name, step in steps:
        if name not in run.manifest["steps"]:
            step(run)
    return run


def budgets(settings: Settings) -> list[Line]:
    """Sequential and grid budgets against the fixed one; Dual RS against standard RS."""
    settle(1)
    run = trained(settings)
    config, alpha = run.config, run.config.certify.alpha
    work = replace(work_of(run, "certificates/dual-base")[0], device=settings.device)
    data = load_dataset(work.config.dataset, "test")
    images, most = (2, 100) if settings.tiny else (20, 10_000)
    chosen = np.linspace(0, len(data) - 1, images).astype(int).tolist()
    sampling = Sampling(config.certify.num_selection, most, alpha)
    radii, rule = tuple(np.arange(0.0, 4.0 * config.sigmas[-1], 0.25).tolist()), Rule(100, 0.1, 3.0)
    draws: dict[str, float] = {}

    def side(name: str, procedure: Callable[[], Any], *, light: bool = False) -> Callable[[], float]:
        engine: Engine = build_engine(work, data.num_classes)
        if light:  # the same votes would need another training; the time does not
            heads = engine.network.heads
            heads["estimator"] = replace(heads["estimator"], denoise=False)

        def certify() -> float:
            results = [done.result for done in engine.run(make_task(i, data, i, procedure) for i in chosen)]
            draws[name] = sum(result.num_draws for result in results) / images
            return images

        return certify

    def dual(budget: Budget) -> Callable[[], Any]:
        return partial(dual_procedure, budget, config.sigmas, config.estimator_sigma, sampling, rule, radii)

    standard = partial(standard_procedure, "fixed", config.sigmas[-1], sampling, rule, radii)
    taken = interleaved(
        {
            "standard RS": side("standard RS", standard),
            "fixed": side("fixed", dual("fixed")),
            "fixed, light estimator": side("fixed, light estimator", dual("fixed"), light=True),
            "sequential": side("sequential", dual("sequential")),
            "grid": side("grid", dual("grid")),
        },
        min(settings.turns, 2),
        warm=False,
        cuda=settings.device == "cuda",
    )
    return _lines(taken, draws, cpu=settings.device == "cpu")


def _lines(taken: dict[str, list[Taken]], draws: dict[str, float], *, cpu: bool) -> list[Line]:
    def timed(what: str, ours: str, theirs: str, wanted: str, per_draw: float = 1.0) -> Line:
        """Time of `ours` for the same images, in that of `theirs`."""

        def scaled(clock: str) -> Any:
            turns = ratio(taken[theirs], taken[ours], clock)
            return replace(turns, median=turns.median / per_draw, low=turns.low / per_draw, high=turns.high / per_draw)

        return Line("budgets", what, scaled("wall_s"), scaled("cpu_s") if cpu else None, wanted=wanted)

    found = []
    for name, wanted in (("sequential", "<= 0.6"), ("grid", "<= 0.35")):
        share = draws[name] / draws["fixed"]
        found += [
            Line("budgets", f"Dual RS, {name} / fixed: draws", spread([share]), wanted=wanted),
            timed(f"Dual RS, {name} / fixed: time", name, "fixed", ""),
            timed(f"Dual RS, {name}: time / draws, each over fixed", name, "fixed", "<= 1.10", share),
        ]
    found += [
        timed("Dual RS fixed / standard RS fixed: time", "fixed", "standard RS", ""),
        timed("Dual RS sequential / standard RS fixed: time", "sequential", "standard RS", "<= 1.15"),
        timed(
            "Dual RS fixed, light estimator / standard RS fixed: time",
            "fixed, light estimator",
            "standard RS",
            "<= 1.15",
        ),
    ]
    return found
