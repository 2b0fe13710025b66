"""Which noise levels to use: every subset of a run's wide Sigma, scored from stored votes without a forward pass.

Needs the data set of jobs.build_dataset. Where the test split was certified by standard RS as well (jobs.certify
--method standard --classifier base), the subsets are also scored there: the choice is made on the training split alone,
so what it is worth on the test split is free of the winner's curse and of what the classifier has learnt by heart.
"""

import sys

from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("choose_sigmas", __doc__)
    parser.add_argument(
        "--size", type=int, default=3, metavar="N", help="levels to use (default: 3); fewer are shown too"
    )
    parser.add_argument("--radii", metavar="R,R,...", help="radii that matter (default: report.radii)")
    parser.add_argument("--show", type=int, default=8, metavar="N", help="subsets of each size to print (default: 8)")

    def run(args) -> None:  # type: ignore[no-untyped-def]
        import numpy as np

        from core.errors import ConfigError
        from core.evaluation.choice import choose, subsets
        from core.evaluation.metrics import paired_difference
        from core.evaluation.routing import Price
        from core.law import GAUSSIAN
        from core.procedures.confidence import largest_radius
        from core.progress import Progress
        from core.report.choice import choice_csv, choice_figure, choice_json, format_choice, format_curve, recommended
        from core.report.plots import to_bytes
        from distributed.studies.choice import test_sample, training_sample

        directory = open_run(args)
        config, sigmas = directory.config, np.array(directory.config.sigmas)
        if config.law != GAUSSIAN:
            raise ConfigError(
                f"noise: the router's price is known for Gaussian noise alone, and noise is {config.noise}"
            )
        try:
            texts = args.radii.split(",") if args.radii else config.report.radii
            radii = np.unique([float(text) for text in texts])
        except ValueError as error:
            raise ConfigError(f"--radii: expected numbers such as 0,.25,.5,1, got {args.radii!r}") from error
        if not np.all(np.isfinite(radii)) or radii[0] < 0:
            raise ConfigError(f"--radii: must be finite and at least 0, got {args.radii!r}")
        if not 1 <= args.size <= len(sigmas):
            raise ConfigError(f"--size: the run has {len(sigmas)} levels, {args.size} cannot be chosen from them")
        sample, test = training_sample(directory, radii), test_sample(directory, radii)
        num, alpha = config.certify.num_estimation, config.stage_alphas[0]
        print(
            f"training split: {len(sample.features):,} examples, {config.labels.num_selection} + "
            f"{config.labels.num_estimation} draws; what {num:,} draws would certify is estimated (empirical Bayes)"
        )
        print(
            f"test split: {len(test[1].features):,} examples of {test[0]}"
            if test
            else "test split: not certified by standard RS; the training split flatters a classifier trained on it"
        )
        total = len(subsets(len(sigmas), args.size))
        with Progress(total, "subsets", "subsets", interval_s=config.compute.progress_interval_s) as progress:
            choice = choose(
                sample,
                sigmas,
                radii,
                args.size,
                price=Price(num, alpha, config.certify.claim, config.certify.router),
                strict=config.report.strict,
                evaluation=test[1] if test else None,
                seed=config.seed,
                progress=lambda: progress.update(1),
            )
        best = recommended(choice, args.size)
        sizes = [[p for p, c in enumerate(choice.candidates) if len(c.levels) == n] for n in range(1, args.size + 1)]
        shown = sorted(place for places in sizes for place in places[: args.show])
        print(f"\nMean certified accuracy [%] over the radii {', '.join(f'{radius:g}' for radius in radii)}:\n")
        print(format_choice(choice, sigmas, shown))
        levels = ",".join(f"{sigmas[level]:g}" for level in choice.candidates[best].levels)
        print(f"\nSigma = [{levels}], certified accuracy [%] at each radius:\n\n{format_curve(choice, best, radii)}\n")
        print(f"winner's curse of a choice on half of the training split: {100 * choice.optimism:.2f} points")
        for places in sizes[:-1]:
            fewer, behind = choice.candidates[places[0]], choice.behind[places[0]] - choice.behind[best]
            _, paired = paired_difference(choice.candidates[best].values, fewer.values)
            if behind <= paired:
                names = ", ".join(f"{sigmas[level]:g}" for level in fewer.levels)
                print(f"[{names}] alone is worth as much to this router: more levels pay only for a better one")
                break
        top = sigmas[max(choice.candidates[best].levels)]
        if (reach := largest_radius(float(top), num, alpha)) <= radii[-1]:
            print(f"no radius from {reach:.3f} on can be certified with it: leave those out of report.radii")
        folder = directory.folder / "choice"
        folder.write("choice.csv", choice_csv(choice, sigmas, radii).encode())
        folder.write("choice.json", choice_json(choice, sigmas, radii, best).encode())
        folder.write("choice.png", to_bytes(choice_figure(choice, sigmas, radii, sizes[-1][:5]), "png"))
        print(f"all subsets: {folder.where('choice.csv')} (and choice.json, choice.png beside it)")
        print(f"use: sigmas=[{levels}]")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
