"""docs/operations.md against the code: messages, keys, jobs, metrics, numbers and links are those that there are."""

import ast
import re
from pathlib import Path

import pytest

from core.config import ComputeConfig
from distributed.cluster import joining
from distributed.files import storage
from distributed.store import lock

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## What to do when")[2].partition("\n## ")[0]


def messages() -> list[str]:
    """Every string of the code as it is printed, with a zero byte for each value that is filled in."""
    found = []
    for folder in ("core", "distributed", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


MESSAGES = messages()


def quoted(table: str) -> list[str]:
    """What the first column has in backticks, without names of keys, columns and jobs."""
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")][2:]
    texts = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    return [text for text in texts if " " in text]


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_symptom_table_has_many_rows() -> None:
    assert len(quoted(TABLE)) >= 25


@pytest.mark.parametrize("text", quoted(TABLE))
def test_symptom_table_message_is_in_the_code(text: str) -> None:
    assert any(text in message for message in MESSAGES), text


def test_symptom_table_message_that_nobody_prints_is_found() -> None:
    (text,) = quoted("| symptom |\n|---|\n| `is used by somebody` and `compute.device` |")
    assert not any(text in message for message in MESSAGES)


def test_page_log_lines_are_in_the_code() -> None:
    table = PAGE.partition("| line of the driver's log | meaning |")[2].partition("\n\n")[0]
    lines = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(lines) >= 6
    for line in lines[:-1]:  # the last one is an example, with numbers
        for piece in line.split(" ... "):
            assert any(piece in message for message in MESSAGES), piece


def test_page_compute_keys_exist() -> None:
    keys = set(re.findall(r"compute\.([a-z_]+)", PAGE))
    assert len(keys) >= 15
    assert not keys - ComputeConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("key", "default"), re.findall(r"^\| `compute\.([a-z_]+)` \| `?([a-z0-9.]+)`? \|", PAGE, re.MULTILINE)
)
def test_page_default_is_the_codes(key: str, default: str) -> None:
    assert str(ComputeConfig.model_fields[key].default) == default


@pytest.mark.parametrize("text", re.findall(r"`compute\.([a-z_]+)` \((\d+)[ );]", PAGE))
def test_page_default_in_brackets_is_the_codes(text: tuple[str, str]) -> None:
    assert float(ComputeConfig.model_fields[text[0]].default) == float(text[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATIENCE_S", storage.PATIENCE_S),
        ("FIRST_S", storage.FIRST_S),
        ("JOIN_S", joining.JOIN_S),
        ("BEAT_S", lock.BEAT_S),
        ("STALE_S", lock.STALE_S),
    ],
)
def test_page_seconds_are_the_codes(name: str, value: float) -> None:
    assert re.findall(rf"`{name}` \((\d+) s\)", PAGE) == [f"{value:.0f}"]


def test_page_jobs_and_their_options_exist() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "jobs").glob("*.py"))
    jobs = set(re.findall(r"jobs\.([a-z_]+)", PAGE))
    assert len(jobs) >= 6
    for job in jobs:
        assert (ROOT / "jobs" / f"{job}.py").is_file(), job
    for command in re.findall(r"python -m jobs\.\w+((?:[^\n#`]|\\\n)*)", PAGE):
        for option in re.findall(r"--[a-z-]+", command):
            assert f'"{option}"' in sources, option


def test_page_metrics_are_those_of_the_code() -> None:
    said = set(re.findall(r"^\| `ray_dualrs_(\w+)`", PAGE, re.MULTILINE))
    made = set(re.findall(r'"([a-z_]+)": "', (ROOT / "distributed/execution/metrics.py").read_text(encoding="utf-8")))
    for file in (ROOT / "distributed").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Gauges":
                made |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    assert said == made
    assert len(made) == 13


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", PAGE))))
def test_page_link_resolves(target: str) -> None:
    file, _, anchor = target.partition("#")
    path = ROOT / "docs" / file if file else ROOT / "docs" / "operations.md"
    assert path.is_file(), target
    if anchor:
        assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_page_is_linked(name: str) -> None:
    assert "operations.md)" in (ROOT / name).read_text(encoding="utf-8")
