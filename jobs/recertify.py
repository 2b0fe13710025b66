"""Certificates for another alpha, split or claim, or a subset of Sigma, from stored votes, without a forward pass."""

import sys

from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("recertify", __doc__)
    parser.usage = (
        "python -m jobs.recertify --out RUN [alpha=1e-4] [split=full | share=0.3] [sigmas=[0.25,0.5]] "
        "[claim=agreement] [router=plurality]"
    )
    parser.epilog = (
        "alpha: total failure probability. split: halves or full, how Dual RS spends it. share: the part of it that "
        "Dual RS spends on the noise level (0.5), or the router of claim agreement (the run's). sigmas: a subset of "
        "Sigma. claim (constant or agreement) and router (median or plurality): as in certify. " + (parser.epilog or "")
    )

    def run(args) -> None:  # type: ignore[no-untyped-def]
        from core.config import parse_values
        from core.errors import ConfigError
        from core.report.headroom import headroom_sections
        from core.report.render import format_table, write_report
        from distributed.studies.recertify import Change, recertify
        from jobs.report import require_matplotlib

        require_matplotlib()
        values = parse_values(args.overrides)
        known = ("alpha", "claim", "router", "share", "sigmas", "split")
        if unknown := sorted(values.keys() - set(known)):
            raise ConfigError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        args.overrides = []
        try:
            sigmas = tuple(float(sigma) for sigma in values["sigmas"]) if "sigmas" in values else None
            change = Change(
                alpha=float(values["alpha"]) if "alpha" in values else None,
                share=float(values["share"]) if "share" in values else None,
                split=values.get("split"),
                sigmas=sigmas,
                claim=values.get("claim"),
                router=values.get("router"),
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"alpha and share are numbers, sigmas a list of numbers: {error}") from error
        data, folder = recertify(open_run(args), change)
        with (folder / "report").staged() as local:
            write_report(data, local, headroom_sections(data))
        print(format_table(data))
        print(f"certificates and report: {folder}")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
