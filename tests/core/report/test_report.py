"""The report on five examples whose every number is worked out by hand."""

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import DataError
from core.report import DualRows, ReportData, StandardRows, plots
from core.report.agreement import CONSTANT, AgreementRows
from core.report.multiscale import MultiscaleRows
from core.report.render import best_method_sentence, format_table, write_report

PAGES = ["certified_accuracy.pdf", "certified_accuracy.png", "delta_radius.png", "p_lower.png", "report.html"]
PAGES += ["report.md", "sigma_choice.png", "table.csv", "table.tex"]
SCRIPT = "<script>alert('x')</script>"


def standard(sigma: float, correct: list[int], radius: list[float]) -> StandardRows:
    reach, right = np.array(radius), np.array(correct, bool)
    p_lower, draws = np.where(reach > 0, 0.9, 0.4), np.full(reach.size, 110)
    return StandardRows(
        sigma=sigma, correct=right, radius=reach, p_lower=p_lower, abstained=reach == 0, num_draws=draws
    )


def dual() -> DualRows:
    return DualRows(
        correct=np.array([True, True, True, False, False]),
        radius=np.array([0.6, 0.7, 0.2, 0.0, 0.0]),
        radius_sigma=np.array([0.9, 0.7, 0.5, 0.0, 0.4]),
        radius_class=np.array([0.6, 0.9, 0.2, 0.0, 0.0]),
        sigma=np.array([0.5, 0.5, 0.25, np.nan, 0.25]),
        bounded_by=np.array(["class", "sigma", "class", "none", "none"]),
        abstained=np.array([False, False, False, True, True]),
        num_draws=np.array([220, 220, 220, 110, 220]),
        p_lower=np.array([0.9, 0.9, 0.8, 0.0, 0.3]),
        sigma_choice=np.array([1, 1, 0, 1, 0]),
    )


def agreement() -> AgreementRows:
    return AgreementRows(
        correct=np.array([True, True, True, False, False]),
        radius=np.array([0.6, 0.7, 0.2, 0.0, 0.0]),
        radius_constant=np.array([0.4, 0.7, 0.0, 0.0, 0.0]),
        sigma=np.array([0.5, 0.5, 0.25, 0.5, 0.25]),
        sigma_choice=np.array([1, 1, 0, 1, 0]),
        binding=np.array([1, 0, 1, -1, -1]),
        radius_excluded=np.array([[0.9, 0.0], [0.7, 0.0], [0.0, 0.1], [0.0, 0.0], [0.2, 0.0]]),
        radius_class=np.array([[0.0, 0.6], [0.3, 0.9], [0.3, 0.2], [0.0, 0.0], [0.0, 0.0]]),
        abstained=np.array([False, False, False, True, True]),
        num_draws=np.array([220, 320, 320, 110, 220]),
        alpha_router=0.005,
        draws_router=np.array([100, 100, 100, 0, 100]),
        draws_class=np.full(5, 100),
        draws_others=np.array([0, 100, 100, 0, 0]),
        p_lower=np.array([0.9, 0.9, 0.8, 0.0, 0.3]),
    )


def report() -> ReportData:
    return ReportData(
        title="Five examples", labels="digits", radii=np.array([0.0, 0.25, 0.5, 1.0, 9.0]),
        standard=(
            standard(0.25, [1, 1, 1, 1, 0], [0.3, 0.3, 0.2, 0.1, 0.0]),
            standard(0.5, [1, 1, 0, 0, 0], [0.6, 1.2, 0.4, 0.0, 0.0]),  # the third is certified for a wrong class
        ),
        dual=dual(),
        standard_at_dual_alpha=np.array([[0.28, 0.6], [0.28, 1.1], [0.2, 0.0], [0.1, 0.0], [0.0, 0.0]]),
        baseline=(standard(0.25, [1, 0, 0, 0, 0], [0.3, 0.0, 0.0, 0.0, 0.0]),),
        alpha=0.001, alpha_stages=(0.0005, 0.0005), num_selection=10, num_estimation=100,
        notes=("A note.",), manifest={"seed": 17, "path": Path("runs/a"), "versions": {"numpy": "2"}},
    )  # fmt: skip


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def markdown_table(text: str, header: str) -> dict[str, list[str]]:
    (table,) = [part for part in text.split("\n\n") if part.startswith(f"| {header}")]
    return cells(table)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    paths = write_report(report(), folder)
    assert sorted(p.name for p in paths) == PAGES
    return folder


def test_format_table_five_examples_equals_hand_count() -> None:
    assert len({len(line) for line in format_table(report()).splitlines()}) == 1
    assert cells(format_table(report())) == {
        "Certified accuracy [%] beyond radius": ["0", "0.25", "0.5", "1", "9"],
        "-" * 39: ["--------:", "--------:", "--------:", "--------:", "---:"],
        "Standard RS, sigma = 0.25": ["**80.00**", "**40.00**", "0.00", "0.00", "0.00"],
        "Standard RS, sigma = 0.5": ["40.00", "**40.00**", "**40.00**", "**20.00**", "0.00"],
        "Dual RS": ["60.00", "**40.00**", "**40.00**", "0.00", "0.00"],
        "Oracle over Sigma (not a certificate)": ["80.00", "40.00", "40.00", "20.00", "0.00"],
        "Standard RS off the shelf, sigma = 0.25": ["20.00", "20.00", "0.00", "0.00", "0.00"],
    }


def test_format_table_alone_leaves_matplotlib_unloaded() -> None:
    code = "import sys, core.report.render; print(*{'torch', 'matplotlib', 'ray', 'pandas'} & set(sys.modules))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_best_method_sentence_ties_and_nothing_certified_says_so() -> None:
    assert best_method_sentence(report()) == (
        "Highest certified accuracy: Standard RS, sigma = 0.25 beyond radius 0; "
        "Standard RS, sigma = 0.25 and Standard RS, sigma = 0.5 and Dual RS (tied) beyond radius 0.25; "
        "Standard RS, sigma = 0.5 and Dual RS (tied) beyond radius 0.5; "
        "Standard RS, sigma = 0.5 beyond radius 1; "
        "no method certifies a right class beyond radius 9; "
        "Dual RS is the best certified method at 2 of 5 radii (tied with another at 2 of them)."
    )


def test_best_method_sentence_dual_alone_on_top_counts_it() -> None:
    data = replace(report(), dual=replace(dual(), radius=np.array([0.6, 1.3, 1.4, 0.0, 0.0])))
    sentence = best_method_sentence(data)
    assert "Dual RS beyond radius 0.25, 0.5, 1;" in sentence
    assert sentence.endswith("Dual RS is the best certified method at 3 of 5 radii.")


def test_write_report_five_examples_leaves_whole_files_only(written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == PAGES
    assert (written / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (written / "certified_accuracy.pdf").read_bytes().startswith(b"%PDF")


def test_write_report_twice_gives_equal_bytes(written: Path, tmp_path: Path) -> None:
    again = write_report(report(), tmp_path)
    assert all(path.read_bytes() == (written / path.name).read_bytes() for path in again)


def test_write_report_csv_holds_unrounded_shares_and_intervals(written: Path) -> None:
    with (written / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 5
    (row,) = [r for r in rows if r["method"] == "Dual RS" and r["radius"] == "0.25"]
    assert float(row["certified_accuracy"]) == 0.4
    # 2 of 5: the tabulated Clopper-Pearson interval is 5.27% to 85.34%.
    assert float(row["ci95_lower"]) == pytest.approx(0.0527, abs=5e-5)
    assert float(row["ci95_upper"]) == pytest.approx(0.8534, abs=5e-5)
    assert {r["method"] for r in rows if r["is_certificate"] == "False"} == {"Oracle over Sigma (not a certificate)"}


def test_write_report_latex_is_the_table_with_its_bests_bold_and_marks_escaped(written: Path, tmp_path: Path) -> None:
    text = (written / "table.tex").read_text()
    accuracy, intervals = text.split("\n\n")
    (dual,) = [line for line in accuracy.splitlines() if "Dual RS" in line]
    assert dual.strip() == r"Dual RS & 60.00 & \textbf{40.00} & \textbf{40.00} & 0.00 & 0.00 \\"
    assert "5.27 -- 85.34" in intervals
    assert accuracy.count("\\toprule") == accuracy.count("\\midrule") == accuracy.count("\\bottomrule") == 1
    write_report(replace(report(), labels="50%_of {a&b} \\x~y^z"), tmp_path)
    assert (
        "50\\%\\_of \\{a\\&b\\} \\textbackslash{}x\\textasciitilde{}y\\textasciicircum{}z"
        in (tmp_path / "table.tex").read_text()
    )


def test_write_report_method_table_equals_hand_count(written: Path) -> None:
    table = markdown_table((written / "report.md").read_text(), "Method")
    # Share beyond 0; the same less 0.001 + sqrt(0.001998 * 6.9078 / 5) + 6.9078 / 15 = 0.5141; abstained; mean and
    # total draws; average radius.
    assert table["Standard RS, sigma = 0.25"] == ["80.00%", "28.59%", "20.00%", "110.0", "550", "0.1800"]
    assert table["Dual RS"] == ["60.00%", "8.59%", "40.00%", "198.0", "990", "0.3000"]
    assert table["Oracle over Sigma (not a certificate)"] == ["80.00%", "–", "–", "–", "–", "0.4200"]


def test_write_report_stages_and_choice_equal_hand_count(written: Path) -> None:
    text = (written / "report.md").read_text()
    stages = markdown_table(text, "Dual RS  ")
    assert stages["Both stages certified, of all examples"] == ["3 of 5", "60.00%"]
    assert stages["Estimator abstained, of all examples"] == ["1 of 5", "20.00%"]
    assert stages["Classifier abstained after the estimator certified, of all examples"] == ["1 of 5", "20.00%"]
    assert stages["Radius capped by R_sigma, of the certified examples"] == ["1 of 3", "33.33%"]
    assert stages["Radius capped by R_sigma, of all examples"] == ["1 of 5", "20.00%"]
    choice = markdown_table(text, "sigma")
    assert (choice["0.25"], choice["0.5"], choice["none"]) == (["2", "2", "2"], ["3", "2", "2"], ["0", "1", "1"])
    assert "chose the best one for 75.00% of the examples" in text


def test_write_report_lost_and_spare_radius_equal_hand_count(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "(R_c* &gt; 0) of 4 of 5 examples" in text
    assert "has median 0.0000 and 90% quantile 0.0700; 75.00% lose nothing." in text
    assert "Both stages certify 3 of 5 examples." in text
    assert "R_sigma - R_c has median 0.3000; it is negative for 33.33%" in text


def test_write_report_summary_states_alpha_and_its_split(written: Path) -> None:
    text = (written / "report.md").read_text()
    for words in ("5 examples of digits", "n0 = 10 ", "n = 100 ", "alpha = 0.001 ", "0.0005 on the noise level", "17."):
        assert words in text
    assert "runs/a" in text  # the manifest


class Page(HTMLParser):
    """Collects tags and addresses, and checks that every element is closed."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [v or "" for n, v in attrs if n in ("src", "href", "xlink:href", "data", "action", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_write_report_html_needs_nothing_but_itself(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags >= {"svg", "table", "details"}
    assert page.tags.isdisjoint({"link", "iframe", "object", "image"})
    assert page.addresses
    assert set(page.addresses) <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids)), "figures share ids"
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "@import" not in text


def test_write_report_html_runs_its_own_script_and_no_other(written: Path) -> None:
    text = (written / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def test_write_report_chart_answers_with_the_certified_accuracies(written: Path) -> None:
    text = (written / "report.html").read_text()
    chart = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[0])
    names = re.findall(r'aria-pressed="true">.*?<span>(.*?)</span>', text)[: len(chart["curves"])]
    assert names == [method.name for method in report().methods()]
    grid = np.array(chart["grid"])
    for name, curve in zip(names, chart["curves"], strict=True):
        assert f'id="{curve["id"]}"' in text
        (method,) = [m for m in report().methods() if m.name == name]
        values = np.array([np.nan if v is None else v for v in curve["values"]])
        np.testing.assert_allclose(values, 100 * method.accuracy(grid), atol=0.006)
    left, right, top, bottom = chart["box"]
    (width, height) = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    assert 0 < left < right < width
    assert 0 < top < bottom < height


def test_to_picture_lines_between_few_points_are_not_read_out() -> None:
    methods = report().methods()[:2]
    figure = plots.severity_figure(
        [0, 1, 5], methods, {"beyond radius 0": np.array([[0.9, 0.8], [0.5, 0.4], [0.1, 0.0]])}
    )
    assert plots.to_picture(figure, "shift", "one radius").chart is None
    curves = plots.curves_figure({method.name: method for method in methods})
    assert plots.to_picture(curves, "rounds", "curves").chart is not None


def test_write_report_script_in_text_is_escaped(tmp_path: Path) -> None:
    manifest = {SCRIPT: SCRIPT, "seed": SCRIPT}
    write_report(replace(report(), title=SCRIPT, labels=SCRIPT, notes=(SCRIPT,), manifest=manifest), tmp_path)
    # Heading, data set and seed in the summary, note, three times in the manifest; HTML has the title once more.
    for name, times in (("report.md", 7), ("report.html", 8)):
        page = (tmp_path / name).read_text()
        assert "<script>alert" not in page
        assert page.count("&lt;script&gt;alert(") == times


def test_write_report_dual_none_says_it_was_not_run(tmp_path: Path) -> None:
    data = replace(report(), dual=None, standard_at_dual_alpha=None)
    assert "Dual RS" not in best_method_sentence(data)
    paths = write_report(data, tmp_path)
    assert {p.name for p in paths}.isdisjoint({"delta_radius.png", "sigma_choice.png"})
    text = (tmp_path / "report.md").read_text()
    assert "Dual RS was not run." in text
    assert "stage by stage" not in text


def test_write_report_nothing_certified_is_still_a_report(tmp_path: Path) -> None:
    zero = np.zeros(5)
    nothing = replace(
        dual(), correct=zero > 0, abstained=zero == 0, radius=zero, radius_sigma=zero, radius_class=zero,
        sigma=zero + np.nan, bounded_by=np.full(5, "none"),
    )  # fmt: skip
    rows = tuple(standard(s, [0] * 5, [0.0] * 5) for s in (0.25, 0.5))
    data = replace(report(), standard=rows, baseline=(), dual=nothing, standard_at_dual_alpha=np.zeros((5, 2)))
    write_report(data, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "no method certifies a right class beyond radius 0, 0.25, 0.5, 1, 9" in text
    assert "Dual RS is the best certified method at 0 of 5 radii." in text
    assert "**" not in text
    assert "nan" not in text


def cascade() -> MultiscaleRows:
    """Two levels: the first two decided at 0.5; the third and the fourth at 0.25, the fourth bounded from above."""
    nan = np.nan
    return MultiscaleRows(
        correct=np.array([True, True, True, False, False]),
        radius=np.array([0.55, 1.1, 0.15, 0.1, 0.0]),
        p_lower=np.array([0.9, 0.9, 0.8, 0.9, 0.3]),
        abstained=np.array([False, False, False, False, True]),
        num_draws=np.array([110, 110, 220, 220, 220]),
        sigma=np.array([0.5, 0.5, 0.25, 0.25, nan]),
        sigma_bound=np.array([0.5, 0.5, 0.25, 0.5, nan]),
        num_levels=np.array([1, 1, 2, 2, 2]),
        alpha_levels=(0.0004, 0.0006),
    )


def test_write_report_multiscale_equals_hand_count(tmp_path: Path) -> None:
    data = replace(report(), others=(cascade(),))
    assert cells(format_table(data))["Multiscale"] == ["60.00", "**40.00**", "**40.00**", "**20.00**", "0.00"]
    write_report(data, tmp_path)
    text = (tmp_path / "report.md").read_text()
    levels = markdown_table(text, "sigma | Examples asked")
    assert levels["0.5"] == ["5", "2", "0"]
    assert levels["0.25"] == ["3", "2", "1"]
    assert levels["none"] == ["–", "1 abstained", "–"]
    assert "0.0004 at 0.25, 0.0006 at 0.5" in text
    assert markdown_table(text, "Method")["Multiscale"][3:5] == ["176.0", "880"]
    assert "Multiscale" not in format_table(report())


def test_format_table_experts_are_called_so() -> None:
    names = cells(format_table(replace(report(), experts=True)))
    assert {"Expert, sigma = 0.25", "Expert, sigma = 0.5", "Expert off the shelf, sigma = 0.25", "Dual RS"} <= set(
        names
    )
    assert "Standard RS, sigma = 0.25" not in names


@pytest.mark.parametrize("claimed", [False, True], ids=["beside the published claim", "as the run's claim"])
def test_write_report_agreement_says_what_binds_and_what_it_drew(tmp_path: Path, claimed: bool) -> None:
    rows = agreement()
    if claimed:
        data = replace(report(), dual=replace(rows, name="Dual RS"), others=(rows.constant_level(),))
    else:
        data = replace(report(), others=(rows,))
    write_report(data, tmp_path)
    text = (tmp_path / "report.md").read_text()
    name = "Dual RS" if claimed else "Dual RS, agreement"
    assert f"{name}, level by level" in text
    assert re.search(r"0\.25 +\| +2 \| +1 \| +1 \| +1 \|", text), "the second example: the router at the other level"
    assert re.search(r"0\.5 +\| +3 \| +2 \| +1 \| +0 \|", text)
    assert "Of 3 certificates the router binds 1, the class the others." in text
    assert "has 0.2200 of the mean radius 0.3000" in text
    assert "80.0 of the router, 100.0 at the chosen level, 40.0 at other levels, asked for 40.00% of" in text
    assert ("Dual RS, stage by stage" in text) == (not claimed)
    table = {row["method"]: row for row in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())}
    assert (CONSTANT in table) == claimed
    assert name in table


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (dual, {"radius": np.zeros(4)}, "radius must be a vector as long as correct"),
        (dual, {"abstained": np.ones(5, bool)}, "an abstention has radius 0 and is never correct"),
        (dual, {"bounded_by": np.full(5, "both")}, "both"),
        (dual, {"sigma": np.full(5, np.nan)}, "sigma is nan"),
        (dual, {"correct": np.ones(5)}, "float64"),
        (dual, {"p_lower": np.full(5, 1.1)}, "1.1"),
        (report, {"standard": ()}, "0 noise levels"),
        (report, {"baseline": (standard(0.25, [1], [0.3]),)}, r"\[1, 5\]"),
        (report, {"radii": np.array([0.5, 0.25])}, "0.25"),
        (report, {"standard_at_dual_alpha": np.zeros((5, 3))}, r"\(5, 2\), got \(5, 3\)"),
        (report, {"dual": replace(dual(), sigma_choice=np.array([1, 1, 0, 2, 0]))}, "must index the 2 levels"),
        (report, {"dual": replace(dual(), sigma_choice=np.array([0, 1, 0, 1, 0]))}, "check its order"),
        (cascade, {"sigma": np.zeros(5)}, "sigma must be nan exactly where nothing is certified"),
        (cascade, {"num_levels": np.zeros(4, int)}, "num_levels must have shape"),
        (agreement, {"radius_constant": np.ones(5)}, "radius_constant is above radius"),
        (agreement, {"binding": np.array([1, 0, 2, -1, -1])}, "binding must be a level"),
        (agreement, {"binding": np.array([1, 0, -1, -1, -1])}, "binding must be a level"),
        (agreement, {"radius_class": np.zeros((5, 3))}, "radii by level"),
    ],
)
def test_rows_that_are_inconsistent_are_refused(rows: Callable[[], Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(rows(), **change)
