"""Every example on a page of its own: its votes at every level, what bounds its radius, and how to find it.

One file, `examples.html`, drawn in the reader's browser by `examples.js` from the data inside it: nothing is loaded.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.evaluation.metrics import certified_accuracy
from core.report import MethodRows, ReportData
from core.report.pages import NONE, Table, document, html_table, percent

__all__ = ["class_table", "examples_page", "floored", "list_columns", "main_rows"]

_SAID: Final = {
    "right": "Certified, and the class is the label.",
    "wrong": "Certified, but the class is not the label.",
    "abstained": "Nothing is certified.",
    "error": "It could not be run, and certifies nothing.",
}
_SHOW: Final = ("right", "wrong", "abstained", "error", "routed wrong", "bounded by router", "bounded by class")
_CSS: Final = """
form { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; } form label { font-size: .85rem; }
input, select, #more { font: inherit; padding: .3rem .5rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; display: block; max-width: 100%; }
td, th { vertical-align: top; }
.named { display: flex; gap: .5rem; align-items: center; overflow-wrap: anywhere; }
.named img { width: 2rem; height: 2rem; } img { image-rendering: pixelated; object-fit: contain; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; } .cards img { width: 8rem; height: 8rem; }
.cards figure { margin: 0; } #gallery { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
#gallery .cards img { width: 6rem; height: 6rem; }
#gallery p { margin: .2rem 0; font-size: .85rem; overflow-wrap: anywhere; } .facts { font-size: .85rem; }
.vote { display: flex; justify-content: flex-end; gap: .4rem; align-items: center; white-space: nowrap; }
.bar { display: inline-block; height: .6rem; background: #8a94a0; border-radius: 2px; }
.bar.right { background: #009e73; }
[hidden] { display: none !important; }
"""


def floored(values: NDArray[np.float64]) -> list[float]:
    """Radii and lower bounds for people, to four digits and never up."""
    return [float(f"{value:.4f}") for value in np.floor(np.asarray(values, np.float64) * 1e4) / 1e4]


def main_rows(data: ReportData) -> MethodRows:
    """What the list of examples shows: Dual RS, or where it was not run standard RS at its best level."""
    return data.dual or max(data.standard, key=lambda rows: float((rows.correct * rows.radius).mean()))


def list_columns(data: ReportData) -> dict[str, list[Any]]:
    """Columns of the list, an entry for each example; None where there is nothing to say.

    `bound`: what bounds the radius, `router` or `class`. `lost`: as `ReportData.lost_by_example`.
    """
    rows, nothing = main_rows(data), [None] * data.num_examples
    columns: dict[str, list[Any]] = {"radius": floored(rows.radius), "bound": nothing, "lost": nothing}
    if data.dual is None:
        return columns | {"sigma": [getattr(rows, "sigma", None)] * data.num_examples}
    dual = data.dual
    names = np.where(dual.abstained, "none", np.where(dual.capped, "router", "class"))
    columns["bound"] = [None if name == "none" else str(name) for name in names]
    columns["lost"] = [round(float(value), 6) for value in data.lost_by_example()]
    return columns | {"sigma": [float(sigma) for sigma in data.sigmas[dual.sigma_choice]]}


def class_table(data: ReportData, labels: NDArray[np.int64], names: Sequence[str] | None) -> tuple[list[int], Table]:
    """The labels ``(N,)`` that occur, ascending, and the table with a row for each: certified accuracy class by class,
    of `main_rows`.
    """
    rows, found = main_rows(data), [int(label) for label in np.unique(labels)]
    wrong = data.lost_by_example() > 0
    lines = []
    for label in found:
        here = labels == label
        shares = certified_accuracy(rows.correct[here], rows.radius[here], data.radii, data.strict)
        routed = NONE if data.dual is None else percent(float(wrong[here].mean()))
        name = f"{label} {names[label]}" if names and names[label] != str(label) else f"{label}"
        abstained = percent(float(rows.abstained[here].mean()))
        lines.append((name, f"{here.sum():,}", *(f"{100 * share:.2f}" for share in shares), abstained, routed))
    radii = (f"beyond {radius:g} [%]" for radius in data.radii)
    return found, Table(("Class", "Examples", *radii, "Abstained", "Routed wrong"), tuple(lines))


def examples_page(
    data: ReportData, labels: NDArray[np.int64], names: Sequence[str] | None, content: Mapping[str, Any], note: str
) -> str:
    """The page; `content` is plain JSON (`ids`, `answer`, `methods`, `errors`, `pictures`, `gallery`), see
    `distributed.views.examples`, and `note` a sentence on the images.
    """
    shown, classes = class_table(data, labels, names)
    everything = {
        **content, **list_columns(data), "label": labels.tolist(), "classes": names, "shownClasses": shown,
        "said": _SAID,
    }  # fmt: skip
    main = main_rows(data)
    level = f", sigma = {main.sigma:g}" if data.dual is None and hasattr(main, "sigma") else ""
    options = "".join(f"<option>{each}</option>" for each in (_SHOW if data.dual is not None else _SHOW[:4]))
    text = (
        f"Answer and radius of {main.name}{level}. Radii and lower bounds are rounded down to four digits. Routed "
        f"wrong: the right class is certified further at another sigma than at the chosen one. {note}"
    )
    body = f"""<p><a href="report.html">The report</a></p>
<div id="all">
<p>{html.escape(text)}</p>
<form role="search"><label>Id or class <input name="q" type="search"></label>
<label>Show <select name="show"><option value="">everything</option>{options}</select></label>
<label>Order <select name="sort"><option value="">by id</option><option value="radius">largest radius</option>
{'<option value="lost">most lost</option>' if data.dual is not None else ""}</select></label></form>
<div id="list"></div><button id="more" type="button">More</button>
{"<h2>Looked at closely</h2>" if content["gallery"] else ""}<div id="gallery"></div>
<h2>Class by class</h2><div id="classes">{html_table(classes)}</div>
</div>
<div id="one" hidden></div>
<noscript><p>This page is drawn by its own script, which this browser does not run.</p></noscript>
<script type="application/json" id="data">{_json(everything)}</script>"""
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    return document(f"Examples of {data.labels}", body, _CSS, script)


def _json(content: Mapping[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
