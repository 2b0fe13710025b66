"""Step 6: certified accuracy against radius, as a table, plots, Markdown and one self-contained HTML page."""

import importlib.util
import sys
from dataclasses import replace

from core.errors import ConfigError
from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


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
    """Write report/ anew and print the table and where the plot and the page are."""
    require_matplotlib()
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
    folder = directory.folder / "report"
    with folder.staged() as local:
        write_report(data, local)
    print(format_table(data))
    print(best_method_sentence(data))
    print(f"plot:   {folder.where('certified_accuracy.png')}")
    print(f"report: {folder.where('report.html')} (and report.md, table.csv beside it)")


def main() -> int:
    """Command line."""
    parser = job_parser("report", __doc__)
    return run_job(parser, lambda args: run(open_run(args)))


if __name__ == "__main__":
    sys.exit(main())
