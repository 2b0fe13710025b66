"""Step 6: certified accuracy against radius, as a table, plots, Markdown and one self-contained HTML page.

Where the run has more than one round, or certified corrupted sets (jobs.shift), the report compares them too.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job

if TYPE_CHECKING:
    from core.report import ReportData
    from core.report.pages import Section


def run(directory: RunDirectory) -> None:
    """Write report/ anew and print the tables and where the plot and the page are."""
    from core.report.render import best_method_sentence, format_table, write_report
    from distributed.tables import report_data

    data = report_data(directory.config, directory.folder, directory.manifest)
    if directory.config.report.gallery:
        from distributed.gallery import gallery

        images = gallery(directory, directory.config.report.gallery)
        if isinstance(images, str):
            print(f"no gallery of images: {images}")
        else:
            data = replace(data, gallery=images)
    shown = sections(directory, data)
    folder = directory.folder / "report"
    with folder.staged() as local:
        write_report(data, local, shown)
    print(format_table(data))
    print(best_method_sentence(data))
    for section in shown:
        print(f"\n{section.summary}\n")
    print(f"plot:   {folder.where('certified_accuracy.png')}")
    print(f"report: {folder.where('report.html')} (and report.md, table.csv beside it)")


def sections(directory: RunDirectory, data: "ReportData") -> "list[Section]":
    """What the report says of later rounds and of corrupted sets; nothing where there are none."""
    from core.report.rounds import rounds_section
    from core.report.shift import Shifted, shift_section
    from distributed.rounds import rounds_there
    from distributed.shift import sets_there
    from distributed.tables import report_data

    def certified(each: RunDirectory) -> bool:
        return {"certify-standard", "certify-dual"} <= set(each.manifest["steps"])

    def table(each: RunDirectory) -> "ReportData":
        config = each.config.model_copy(update={"report": directory.config.report})  # one set of radii for all
        return report_data(config, each.folder, each.manifest)

    found = []
    later = [each for each in rounds_there(directory)[1:] if certified(each)]
    if later and data.dual is not None:
        found.append(rounds_section([data, *map(table, later)]))
    shifted = [
        Shifted(each.config.dataset.corruption or "", each.config.dataset.severity or 0, table(each))
        for each in sets_there(directory)
        if certified(each)
    ]
    return [*found, shift_section(data, shifted)] if shifted else found


def main() -> int:
    """Command line."""
    parser = job_parser("report", __doc__)
    return run_job(parser, lambda args: run(open_run(args)))


if __name__ == "__main__":
    sys.exit(main())
