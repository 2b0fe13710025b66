"""Blocks of a report, written as Markdown and as one self-contained HTML page."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.report.charts import CSS, SCRIPT, Chart, chart_html

__all__ = [
    "NONE",
    "Block",
    "Heading",
    "Link",
    "Picture",
    "Section",
    "Table",
    "Text",
    "document",
    "html_page",
    "html_table",
    "latex_table",
    "markdown_page",
    "markdown_table",
    "page_files",
    "percent",
    "shares_table",
]

NONE: Final = "–"
"""A cell without a value."""


def percent(share: float) -> str:
    """A share for people."""
    return f"{100.0 * share:.2f}%"


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's heading."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Link:
    """A paragraph that leads to a file beside the page."""

    file: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as plain text; `bold` holds (row, column)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: its file for Markdown, its SVG for HTML, and its curves where a reader may question them."""

    file: str
    caption: str
    svg: str
    chart: Chart | None = None


Block = Heading | Text | Link | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """Further blocks of a report, what a terminal is shown of them, and the files of their pictures and tables."""

    summary: str
    blocks: tuple[Block, ...]
    files: Mapping[str, bytes]


Shares = NDArray[np.float64]


def shares_table(title: str, radii: Shares, rows: Sequence[tuple[str, Shares, object]]) -> Table:
    """Shares at each radius, in percent.

    Args:
        title: of the names' column.
        radii: ``(R,)``.
        rows: name, shares ``(R,)``, and with whom it competes: the best of a group at a radius is bold, unless it is 0;
            of the group None is none.
    """
    groups = {group for *_, group in rows if group is not None}
    best = {group: np.max([shares for _, shares, own in rows if own == group], axis=0) for group in groups}
    bold = (
        (i, j + 1)
        for i, (_, shares, group) in enumerate(rows)
        for j, share in enumerate(shares if group is not None else ())
        if share == best[group][j] > 0.0
    )
    cells = tuple((name, *(f"{100.0 * share:.2f}" for share in shares)) for name, shares, _ in rows)
    return Table((title, *(f"{radius:g}" for radius in radii)), cells, frozenset(bold))


# Markdown


def _plain(text: str) -> str:
    """Text that is safe between Markdown's marks and on one line; titles and notes come from outside."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def markdown_table(table: Table) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    cells = [[_plain(cell) for cell in row] for row in (table.header, *table.rows)]
    for i, j in table.bold:
        cells[i + 1][j] = f"**{cells[i + 1][j]}**"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(table: Table, caption: str) -> str:
    """A LaTeX table; the document has to load the package booktabs."""
    cells = [[_latex(cell) for cell in row] for row in (table.header, *table.rows)]
    for i, j in table.bold:
        cells[i + 1][j] = rf"\textbf{{{cells[i + 1][j]}}}"
    head, *body = (" & ".join(row) + r" \\" for row in cells)
    lines = [
        r"\begin{table}", r"  \centering", rf"  \caption{{{_latex(caption)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"    \toprule", f"    {head}", r"    \midrule",
        *(f"    {line}" for line in body),
        r"    \bottomrule", r"  \end{tabular}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    marks |= {mark: "\\" + mark for mark in "&%$#_{}"}
    return "".join(marks.get(mark, mark) for mark in " ".join(text.split()))


def markdown_page(title: str, blocks: Sequence[Block], manifest: Mapping[str, object] | None) -> str:
    """The report as Markdown, with the manifest folded below, if any; pictures are named, not embedded."""
    parts = [f"# {_plain(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {_plain(text)}")
            case Text(text):
                parts.append(_plain(text))
            case Link(file, text):
                parts.append(f"[{_plain(text)}]({file})")
            case Table():
                parts.append(markdown_table(block))
            case Picture(file, caption):
                parts.append(f"![{_plain(caption)}]({file})")
    return "\n\n".join(parts if manifest is None else [*parts, _manifest(manifest)]) + "\n"


# HTML

_CSS: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --line: #39404a; --soft: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem; line-height: 1.25rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .375rem .7rem; text-align: right; border-bottom: 1px solid var(--line); background: var(--paper); }
thead tr > th { background: var(--soft); min-width: 4rem; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; min-width: 9rem; font-weight: 500; position: sticky; left: 0; }
/* More columns to the right: they fade, until one has scrolled to the end. */
.scroll.more { mask-image: linear-gradient(to left, transparent, #000 3rem); }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; } thead tr > th { min-width: 3rem; }
  th:first-child { min-width: 6.5rem; max-width: 6.5rem; font-size: .8rem; } }
figure { margin: 1.4rem 0; } figcaption { font-size: .85rem; opacity: .8; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
.card > svg { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto; }
pre { overflow-x: auto; padding: .8rem; background: var(--soft); border-radius: 6px; font-size: .8rem; }
"""


def page_files(name: str, title: str, blocks: Sequence[Block], manifest: Mapping[str, object]) -> dict[str, bytes]:
    """The pages `name`.md and `name`.html."""
    markdown, page = markdown_page(title, blocks, manifest), html_page(title, blocks, manifest)
    return {f"{name}.md": markdown.encode(), f"{name}.html": page.encode()}


def html_page(title: str, blocks: Sequence[Block], manifest: Mapping[str, object]) -> str:
    """The report as one page that needs nothing but itself."""
    body = "\n".join(map(_html_block, blocks))
    return document(title, f"{body}\n{_manifest(manifest)}", CSS, SCRIPT)


def document(title: str, body: str, css: str, script: str) -> str:
    """A page in the report's look. Its policy: it loads nothing, and nothing in it runs but its own script."""
    title, digest = html.escape(title), base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{_CSS}{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Link(file, text):
            return f'<p><a href="{html.escape(file)}">{html.escape(text)}</a></p>'
        case Picture(_, caption, svg, chart):
            image = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
            look, inside = ("card", image) if chart is None else ("card chart", chart_html(chart, image))
            return f'<figure><div class="{look}">{inside}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
        case Table():
            return html_table(block)


def html_table(table: Table) -> str:
    """A table in a region that scrolls sideways, which takes the focus so that the keyboard can scroll it."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    body = "\n".join(_html_row(row, {j for i, j in table.bold if i == k}) for k, row in enumerate(table.rows))
    inside = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.header[0])}">{inside}</div>'


def _html_row(row: tuple[str, ...], bold: set[int]) -> str:
    cells = [html.escape(cell) for cell in row]
    marked = [f"<td><strong>{c}</strong></td>" if j in bold else f"<td>{c}</td>" for j, c in enumerate(cells)]
    return f'<tr><th scope="row">{cells[0]}</th>{"".join(marked[1:])}</tr>'


def _manifest(manifest: Mapping[str, object]) -> str:
    """The manifest as JSON, folded; the same HTML serves both pages (Markdown passes it through)."""
    text = json.dumps(dict(manifest), indent=2, ensure_ascii=False, default=str)
    return f"<details>\n<summary>Manifest</summary>\n<pre>{html.escape(text)}</pre>\n</details>"
