import csv
import io
import re
from pathlib import Path

import pytest

from core.csv_text import csv_text
from distributed.studies.predict import write_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n"])
def test_csv_text_a_text_that_begins_as_a_formula_is_made_plain(start: str) -> None:
    evil = f'{start}HYPERLINK("http://x";"y")'
    header, row = csv.reader(io.StringIO(csv_text(["id", start + "b"], [[evil, -1.5]]), newline=""))
    assert header == ["id", f"'{start}b"]
    assert row == ["'" + evil, "-1.5"]


def test_csv_text_other_cells_stay_as_they_are() -> None:
    rows: list[list[object]] = [["x=1, y", None, True], ["a-b", -2, 0.1], ["a\r=1", "", ""]]
    assert csv_text(["a", "b", "c"], rows) == 'a,b,c\n"x=1, y",,True\na-b,-2,0.1\na\\r=1,,\n'


def test_write_rows_of_an_image_named_as_a_formula_is_plain_text(tmp_path: Path) -> None:
    write_rows([{"id": "=1+1.png", "class": -1}], ["id", "class"], str(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_text() == "id,class\n'=1+1.png,-1\n"


def test_no_other_code_writes_csv() -> None:
    for path in (path for name in ("core", "distributed", "jobs") for path in (ROOT / name).rglob("*.py")):
        if path.name != "csv_text.py":
            assert not re.search(r"csv\.(Dict)?[wW]riter|\.to_csv\(|write_csv\(", path.read_text()), path
