"""The results of a sweep, read from the run directories of its settings: Parquet, Markdown, one figure."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.config import Setting, Sweep
from core.report.ablation import AblationSetting, ablation_row, format_ablation
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory
from distributed.studies.sweep import read_times, setting_folder
from distributed.views.tables import report_data

__all__ = ["read_settings", "write_results"]


def read_settings(sweep: Sweep, settings: Sequence[Setting], out: Folder) -> list[AblationSetting]:
    """The certificates of finished settings.

    Raises:
        DataError: when rows cannot be read.
    """
    ending = "-base" if sweep.classifier == "base" else ""
    read = []
    for setting in settings:
        folder = setting_folder(out, setting)
        manifest = RunDirectory(folder, setting.config, "look").manifest
        times = read_times(folder)
        facts = {
            "seconds": round(sum(times.values()), 1),
            **{f"seconds_{step}": seconds for step, seconds in times.items()},
            "fingerprint": manifest["fingerprint"],
            "folder": folder.uri,
        }
        data = report_data(setting.config, folder, manifest, ending=ending)
        read.append(AblationSetting(setting.name, setting.values, data, facts))
    return read


def write_results(sweep: Sweep, settings: Sequence[AblationSetting], out: Folder) -> str:
    """Write results.parquet, results.md, ablation.png and ablation.pdf; returns the table."""
    from core.report.ablation_plots import ablation_figure
    from core.report.plots import to_bytes

    rows = [ablation_row(setting) for setting in settings]
    columns = dict.fromkeys(key for row in rows for key in row)
    swept = {key: _column([setting.values.get(key) for setting in settings]) for key in sweep.keys}
    others = {key: [row.get(key) for row in rows] for key in columns if key not in sweep.keys}
    table = pa.table({"setting": others.pop("setting"), **swept, **others})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    out.write("results.parquet", sink.getvalue().to_pybytes())
    shown = format_ablation(settings)
    out.write("results.md", f"# {sweep.title}\n\n{_caption(sweep, settings)}\n\n{shown}\n".encode())
    figure = ablation_figure(settings, sweep.title)
    for kind in ("png", "pdf"):
        out.write(f"ablation.{kind}", to_bytes(figure, kind))
    return shown


def _column(values: list[Any]) -> list[Any]:
    """Numbers as they are; anything else (lists, networks) as JSON texts. None where a setting does not say."""
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        floats = any(isinstance(value, float) for value in values)
        return [float(value) if floats and value is not None else value for value in values]
    return [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]


def _caption(sweep: Sweep, settings: Sequence[AblationSetting]) -> str:
    data = settings[0].data
    which = "as it was before fine-tuning" if sweep.classifier == "base" else "fine-tuned in each setting"
    return (
        f"Certified accuracy of Dual RS [%] on {data.num_examples:,} test examples of {data.labels}, "
        f"n = {data.num_estimation:,}, alpha = {data.alpha:g}, {data.law.norm} radii; the classifier is {which}. "
        "Capped: share of the certified examples whose radius is R_sigma. ΔR_c: radius lost to the choice of sigma. "
        "All columns: results.parquet."
    )
