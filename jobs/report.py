"""Step 6: certified accuracy against radius, as a table, plots, Markdown and one self-contained HTML page.

Where the run has more than one round, or certified corrupted sets (jobs.shift), the report compares them too. With
--runs A B C several runs are shown side by side; with --logs NAME=FILE ... logs of others' code, without any run.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job

if TYPE_CHECKING:
    from core.report import ReportData
    from core.report.pages import Section


def require_matplotlib() -> None:
    """Refuse, before any work, where the figures could not be drawn at its end.

    Raises:
        ConfigError: says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the report needs matplotlib, which is not installed: in the checkout, python -m pip install -e '.[report]'"
        )


def run(directory: RunDirectory) -> None:
    """Write report/ anew and print the tables and where the plot and the page are."""
    require_matplotlib()
    folder = directory.folder / "report"
    folder.check_writable()
    from core.report.render import accuracies, best_method_sentence, format_table, write_report
    from distributed.store.track import check_tracker, tracked
    from distributed.views.card import write_card

    check_tracker(directory.config)
    data, shown = prepared(directory, directory.manifest)
    with folder.staged() as local, tracked(directory) as tracker:
        write_report(data, local, shown)
        tracker.log_metrics(accuracies(data))
        tracker.log_artifact(local, "report")
    write_card(directory, data)
    print(format_table(data))
    print(best_method_sentence(data))
    for section in shown:
        print(f"\n{section.summary}\n")
    print(f"plot:   {folder.where('certified_accuracy.png')}")
    print(f"report: {folder.where('report.html')} (and report.md, table.csv beside it)")


def prepared(
    directory: RunDirectory, manifest: Mapping[str, Any], images: bool = True
) -> "tuple[ReportData, list[Section]]":
    """What the report of a run is made of, with this manifest in it, and with or without images of its data."""
    from distributed.views.examples import examples_section
    from distributed.views.tables import report_data, run_tables

    tables = run_tables(directory.config, directory.folder)
    data = report_data(directory.config, directory.folder, manifest, tables=tables)
    return data, [*sections(directory, data), examples_section(directory, data, tables, images)]


def sections(directory: RunDirectory, data: "ReportData") -> "list[Section]":
    """What the report says of the headroom, of later rounds and of corrupted sets; nothing where there are none."""
    from core.report.headroom import headroom_sections
    from core.report.rounds import rounds_section
    from core.report.shift import Shifted, shift_section
    from distributed.studies.rounds import rounds_there
    from distributed.studies.shift import sets_there
    from distributed.views.tables import report_data

    def certified(each: RunDirectory) -> bool:
        return {"certify-standard", f"certify-{each.config.certify.routed}"} <= set(each.manifest["steps"])

    def table(each: RunDirectory) -> "ReportData":
        config = each.config.model_copy(update={"report": directory.config.report})  # one set of radii for all
        return report_data(config, each.folder, each.manifest)

    found = headroom_sections(data)
    later = [each for each in rounds_there(directory)[1:] if certified(each)]
    if later and data.dual is not None:
        found.append(rounds_section([data, *map(table, later)]))
    shifted = [
        Shifted(each.config.dataset.corruption or "", each.config.dataset.severity or 0, table(each))
        for each in sets_there(directory)
        if certified(each)
    ]
    return [*found, shift_section(data, shifted)] if shifted else found


def compare(runs: Sequence[str], out: str, overrides: Sequence[str]) -> None:
    """Write several runs side by side into the folder `out`, at the radii of the first one (or of `overrides`)."""
    require_matplotlib()
    from core.config import parse_config
    from core.report.compare import format_comparison, write_comparison
    from distributed.files.storage import Folder
    from distributed.views.tables import report_data

    folder = Folder(out)
    folder.check_writable()
    found = {}
    shown = None
    for where, name in zip(runs, distinct_names(runs), strict=True):
        directory = RunDirectory(where, None, "look")
        config = directory.config
        if shown is None:
            shown = parse_config(
                config.model_dump(mode="json"), overrides, source="the first run's configuration"
            ).report
        config = config.model_copy(update={"report": shown})
        found[name] = report_data(config, directory.folder, directory.manifest)
    with folder.staged() as local:
        write_comparison(found, local)
    print(format_comparison(found))
    print(f"comparison: {folder.where('comparison.html')} (and .md, .csv, .tex, the figures beside it)")


def show_logs(given: Sequence[str], out: str, overrides: Sequence[str]) -> None:
    """Write logs in the field's format side by side into the folder `out`."""
    require_matplotlib()
    import numpy as np

    from core.config import parse_config
    from core.report.logs import format_logs, write_logs
    from distributed.files.storage import Folder
    from distributed.views.exchange import read_log

    logs = {}
    for each in given:
        places = [at for at, sign in enumerate(each) if sign == "=" and Path(each[at + 1 :]).is_file()]
        name, file = (each[: places[0]], each[places[0] + 1 :]) if places else ("", each.rpartition("=")[2])
        if not name or name in logs:
            why = f"{name!r} is there twice" if name in logs else f"no file {file!r}" if not places else "no name"
            raise ConfigError(f"--logs: {each!r}: expected NAME=FILE, {why}")
        logs[name], _ = read_log(Path(file))
    if strange := [text for text in overrides if not text.startswith("report.")]:
        raise ConfigError(f"{strange[0]!r}: with --logs only keys of report, for example report.radii=[0,0.5,1]")
    usual = {"radii": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3], "strict": False}
    shown = parse_config({"sigmas": [1.0], "report": usual}, overrides, source="--logs").report
    folder = Folder(out)
    with folder.staged() as local:
        write_logs(logs, np.asarray(shown.radii), shown.strict, local)
    print(format_logs(logs, np.asarray(shown.radii), shown.strict))
    print(f"logs: {folder.where('logs.html')} (and .md, .csv, .tex, the figure beside it)")


def distinct_names(runs: Sequence[str]) -> list[str]:
    """The shortest endings of paths that tell them apart; a path that comes twice gets a number."""
    parts = [where.rstrip("/").split("/") for where in runs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"--runs: {', '.join(runs)}: a run is named twice")


def main() -> int:
    """Command line."""
    parser = job_parser("report", __doc__, needs_out=False)
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="several runs side by side; --out is where the page goes: comparison/"
    )
    parser.add_argument(
        "--logs",
        nargs="+",
        metavar="NAME=FILE",
        help="logs of Cohen's, Salman's, Jeong's or Carlini's code side by side, counted at radius >= r as they do "
        "(report.strict=true: > r) and at report.radii=[...]; --out is where the page goes: comparison/",
    )

    def either(args: argparse.Namespace) -> None:
        if args.logs is not None:
            if args.runs is not None or args.config is not None:
                raise ConfigError("--logs: goes without --runs and --config")
            keys = [each for each in args.logs if each.startswith("report.")]
            show_logs([x for x in args.logs if x not in keys], args.out or "comparison", [*args.overrides, *keys])
            return
        if args.runs is None:
            if args.out is None:
                raise ConfigError("--out: is missing; it names the run, or give several with --runs or --logs")
            run(open_run(args))
            return
        # What follows --runs takes overrides too: a run directory has no "=" in its name.
        overrides = [*args.overrides, *(each for each in args.runs if "=" in each)]
        compare([each for each in args.runs if "=" not in each], args.out or "comparison", overrides)

    return run_job(parser, either)


if __name__ == "__main__":
    sys.exit(main())
