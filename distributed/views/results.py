"""Certificates as people use them: a pandas DataFrame, certified accuracy with its interval, and the plot."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from core.agreement_records import AgreementCertificate
from core.errors import ConfigError, DataError
from core.evaluation.metrics import certified_accuracy, clopper_pearson_interval
from core.procedures.multiscale import MultiscaleCertificate
from core.records import ABSTAIN, Certificate, DualCertificate
from core.report import Kind, Method
from distributed.files.storage import Folder
from distributed.methods import METHODS
from distributed.store.shards import ShardStore
from distributed.views.exchange import read_log

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["accuracy", "of_certificates", "of_log", "of_run", "plot"]

AnyCertificate = Certificate | DualCertificate | AgreementCertificate | MultiscaleCertificate
_PLAIN = (bool, int, float, str, type(None), np.ndarray)
_ENDINGS = {"": "", "-base": ", off the shelf"}


def of_run(run: str | Path | Folder) -> "pd.DataFrame":
    """All certificates of a run, a row each, with the raw votes.

    `run`: a run directory, finished or not, also in an object store.

    Returns:
        The columns of the shards (docs/shards.md), with `method` in front: the name that a curve has.

    Raises:
        DataError: when nothing has been certified there.
    """
    import pandas as pd

    folder = Folder(run) if not isinstance(run, Folder) else run
    found = []
    for name in METHODS:
        for ending, said in _ENDINGS.items():
            store = ShardStore(folder, f"certificates/{name}{ending}")
            if not store.committed():
                continue
            rows = store.read().to_pandas()
            level = rows["sigma"].map(", sigma = {:g}".format) if name == "standard" else ""
            rows.insert(0, "method", f"{name}{said}" + level)
            found.append(rows)
    if not found:
        raise DataError(f"{str(folder)!r} holds no certificates: run jobs.certify first")
    whole: pd.DataFrame = pd.concat(found, ignore_index=True)
    return whole


def of_certificates(
    certificates: Sequence[AnyCertificate], labels: ArrayLike | None = None, *, method: str = "certificates"
) -> "pd.DataFrame":
    """What `certify_many` returned, a row each.

    Args:
        certificates: of one kind, in order.
        labels: the true classes, ``(N,)``; with them there is a column `correct`.
        method: the name that their curve has.
    """
    import pandas as pd

    if not certificates:
        raise DataError("got no certificates")
    names = [each.name for each in fields(certificates[0])] + ["abstained", "num_draws", "sigma"]
    rows = [{name: value for name in names if isinstance(value := getattr(c, name), _PLAIN)} for c in certificates]
    table = pd.DataFrame(rows)
    table.insert(0, "method", method)
    if labels is not None:
        truth = np.asarray(labels)
        if truth.shape != (len(table),):
            raise ConfigError(f"labels must have shape ({len(table)},), one for each certificate, got {truth.shape}")
        table.insert(1, "label", truth)
        table["correct"] = (table["prediction"] == table["label"]) & (table["prediction"] != ABSTAIN)
    return table


def of_log(path: str | Path, *, method: str | None = None) -> "pd.DataFrame":
    """A log of Cohen's, Salman's, Jeong's or Carlini's code (TSV), a row each; see `core.evaluation.exchange`.

    `method`: the name that its curve has; the file's unless given.

    Raises:
        DataError: for a file that cannot be read as a log.
    """
    import pandas as pd

    path = Path(path)
    log, _ = read_log(path)
    return pd.DataFrame(
        {
            "method": method or path.stem,
            "example_id": log.idx,
            "label": log.label,
            "prediction": log.predict,
            "radius": log.radius,
            "correct": log.correct,
        }
    )


def accuracy(
    table: "pd.DataFrame", radii: ArrayLike, *, strict: bool = True, confidence: float = 0.95
) -> "pd.DataFrame":
    """Certified accuracy of each method at each radius, over all its rows.

    Args:
        table: of the functions above, or several of them concatenated; needs `correct`.
        radii: ``(R,)``, l2, pixel scale [0, 1].
        strict: count radius > r (the Dual RS authors), otherwise radius >= r.
        confidence: of the interval, for the draw of the test examples (Clopper-Pearson; method by method).

    Returns:
        Columns `method`, `radius`, `certified_accuracy`, `lower`, `upper` (shares in [0, 1]) and `examples`.

    Raises:
        DataError: without a column `correct`.
    """
    import pandas as pd

    parts = []
    for method in _methods(table, strict):
        shares = certified_accuracy(method.correct, method.radius, radii, strict)
        lower, upper = clopper_pearson_interval(shares, method.correct.size, 1.0 - confidence)
        columns = {"method": method.name, "radius": np.asarray(radii, float), "certified_accuracy": shares}
        parts.append(pd.DataFrame({**columns, "lower": lower, "upper": upper, "examples": method.correct.size}))
    return pd.concat(parts, ignore_index=True)


def plot(table: "pd.DataFrame", axes: Any = None, *, strict: bool = True) -> Any:
    """Certified accuracy against the radius, a curve for each method, drawn as the report draws them.

    Args:
        table: as for `accuracy`.
        axes: matplotlib's, to draw into; new ones of `matplotlib.pyplot` unless given.
        strict: as for `accuracy`.

    Returns:
        The axes.
    """
    from core.report.plots import draw_curves

    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1]
    draw_curves(axes, _methods(table, strict))
    axes.legend(frameon=False)
    return axes


def _methods(table: "pd.DataFrame", strict: bool) -> list[Method]:
    if "correct" not in table.columns:
        raise DataError("certified accuracy needs a column 'correct': give the true labels to results.of_certificates")
    methods = []
    for index, (name, rows) in enumerate(table.groupby("method", sort=False)):
        kind = Kind.STANDARD if str(name).startswith("standard") else Kind.OTHER
        correct, radius = rows["correct"].to_numpy(bool), rows["radius"].to_numpy(float)
        methods.append(Method(str(name), kind, index, correct, radius, None, None, None, strict))
    return methods
