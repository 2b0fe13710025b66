"""Tables as CSV that a spreadsheet may open."""

import csv
import io
from collections.abc import Iterable, Sequence

__all__ = ["csv_text"]

_FORMULA = ("=", "+", "-", "@", "\t", "\n")
"""How a cell begins that a spreadsheet runs as a formula (or does after it has trimmed it)."""


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """CSV with a header line; a text that a spreadsheet would run gets an apostrophe in front, numbers stay.

    Ids and names come from file names and columns that anybody may have written. None is an empty cell.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_plain, columns))
    writer.writerows(map(_plain, row) for row in rows)
    return out.getvalue()


def _plain(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", "\\r")  # unquoted it would end the line
    return f"'{text}" if text.startswith(_FORMULA) else text
