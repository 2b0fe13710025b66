"""Draws and radii of the budgets side by side: `python -m bench.budgets --run runs/digits`.

Fixed, sequential and grid Dual RS on the test images of a finished run, same noise, same alpha; network evaluations
per example beside standard RS, with the estimator behind the denoiser and with a light one that does without.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.engine import Engine
from core.metrics import certified_accuracy
from core.network import Network
from core.progress import Progress
from core.records import DualCertificate, Rule, Sampling
from core.sequential import Budget, dual_procedure, standard_procedure
from distributed.datasets import load_dataset
from distributed.launch import work_of
from distributed.run_directory import RunDirectory
from distributed.work import build_engine, make_task


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run directory")
    parser.add_argument("--examples", type=int, default=100, help="test images, evenly spread (default: 100)")
    parser.add_argument("--num-estimation", type=int, default=10_000, help="draws of a stage at most (default: 10,000)")
    parser.add_argument("--step", type=float, default=0.25, help="step of the radius grid (default: 0.25)")
    parser.add_argument("--futility-z", type=float, nargs="+", default=[float("inf"), 3.0, 2.33, 1.0])
    args = parser.parse_args()

    directory = RunDirectory(args.run, None)
    config = directory.config
    work, _ = work_of(directory, "certificates/dual")
    work = replace(work, device="cpu")
    data = load_dataset(config.dataset, "test")
    chosen = np.linspace(0, len(data) - 1, args.examples).astype(int)
    sampling = Sampling(config.certify.num_selection, args.num_estimation, config.certify.alpha)
    grid = tuple(np.arange(0.0, 4.0 * config.sigmas[-1], args.step).tolist())

    def run(name: str, make: Any, light: bool = False) -> tuple[list[Any], dict[str, float]]:
        engine: Engine = build_engine(work, data.num_classes)
        network: Network = engine.network
        if light:  # the same votes would need another training; the evaluations do not
            network.heads["estimator"] = replace(network.heads["estimator"], denoise=False)
        results: dict[int, Any] = {}
        with Progress(len(chosen), name, "examples") as progress:
            for done in engine.run(make_task(i, data, i, make) for i in chosen.tolist()):
                results[done.key] = done.result
                progress.update(1)
        return [results[i] for i in chosen.tolist()], {k: v / len(chosen) for k, v in network.rows.items()}

    def dual(budget: Budget, z: float = 3.0) -> Any:
        return lambda: dual_procedure(budget, config.sigmas, config.estimator_sigma, sampling, Rule(100, 0.1, z), grid)

    torch.set_num_threads(1)
    _, standard = run("standard", lambda: standard_procedure("fixed", config.sigmas[-1], sampling, Rule(), ()))
    fixed, rows_fixed = run("dual, fixed", dual("fixed"))
    _, rows_light = run("dual, fixed, light estimator", dual("fixed"), light=True)
    sequential, rows_sequential = run("dual, sequential", dual("sequential"))
    grids = {z: run(f"dual, grid, z = {z:g}", dual("grid", z)) for z in args.futility_z}

    labels = data.labels[chosen]
    radii = np.asarray(grid)

    def accuracy(results: list[DualCertificate]) -> np.ndarray:
        correct = np.array([r.prediction for r in results]) == labels
        return 100 * certified_accuracy(correct, np.array([r.radius for r in results]), radii)

    base = sum(r.num_draws for r in fixed)
    unshared = sum(r.num_draws + r.num_shared for r in fixed)
    print(f"\n{len(chosen)} examples, n_max = {args.num_estimation:,}, alpha = {config.certify.alpha:g}")
    print(f"draws per example, fixed: {base / len(chosen):,.0f} ({unshared / len(chosen):,.0f} without shared noise)")
    ratio = np.array([s.radius / f.radius for s, f in zip(sequential, fixed, strict=True) if f.radius > 0])
    print(
        f"sequential: {sum(r.num_draws for r in sequential) / base:.3f} of the draws of fixed; radius / fixed radius: "
        f"min {ratio.min():.6f}, {int((ratio < 0.995).sum())} of {ratio.size} below 0.995, "
        f"{int((ratio == 1).sum())} equal"
    )
    for z, (results, _) in grids.items():
        lost = sum(
            int(np.searchsorted(radii, f.radius) > np.searchsorted(radii, g.radius))
            for f, g in zip(fixed, results, strict=True)
        )
        print(
            f"grid, z = {z:g}: {sum(r.num_draws for r in results) / base:.3f} of the draws of fixed; "
            f"{lost} of {len(chosen)} examples lose a level"
        )
    print(
        "\ncertified accuracy [%] beyond radius\n"
        + "".join(f"{name:>22}" for name in ("radius", "fixed", "sequential"))
        + "".join(f"{f'grid, z = {z:g}':>22}" for z in grids)
    )
    columns = [radii, accuracy(fixed), accuracy(sequential), *(accuracy(results) for results, _ in grids.values())]
    for row in zip(*columns, strict=True):
        if row[1] or row[0] <= config.sigmas[-1]:
            print("".join(f"{value:>22.2f}" for value in row))
    print("\nnetwork evaluations per example (padding included)")
    for name, rows in (
        ("standard RS, fixed", standard),
        ("Dual RS, fixed, shared noise", rows_fixed),
        ("Dual RS, fixed, light estimator", rows_light),
        ("Dual RS, sequential", rows_sequential),
    ):
        parts = ", ".join(f"{network} {count:,.0f}" for network, count in sorted(rows.items()))
        print(
            f"{name:>34}: {parts}; denoiser x{rows['denoiser'] / standard['denoiser']:.2f}, "
            f"classifier x{rows['classifier'] / standard['classifier']:.2f} of standard"
        )


if __name__ == "__main__":
    main()
