"""The project's Markdown files: their links, headings, code blocks and commands."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ("configuration.md", "jobs.md")
"""Pages that docs/_site/reference.py writes."""
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line, without its comment."""

    page: str
    text: str

    @property
    def job(self) -> list[str] | None:
        """Name and arguments of the job that it runs (perhaps on a cluster), if it does."""
        match = re.search(r"(?:^|\s)python -m jobs\.(\w+)(.*)$", self.text)
        return None if match is None else [match[1], *shlex.split(match[2])]

    @property
    def local(self) -> bool:
        """Whether it runs here, as it is written."""
        return self.text.startswith("python ")


def name_of(page: Path) -> str:
    """As messages have it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, also indented ones, without the indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def commands(page: Path) -> list[Command]:
    """Commands of the shell blocks, and of the lines that are indented by four spaces."""
    text = "\n".join(blocks(page, "sh"))
    unfenced = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text += "\n" + "\n".join(re.findall(r"^    (python -m .*)$", unfenced, re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    stripped = [re.sub(r"(^|\s+)# .*$", "", line).strip() for line in lines]
    return [Command(name_of(page), line) for line in dict.fromkeys(stripped) if line]


def inline_jobs(page: Path) -> list[Command]:
    """Jobs that are named inside a sentence or a table, with their options."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = (re.sub(r"\s+", " ", match) for match in re.findall(r"`(python -m jobs\.\w[^`]*)`", text))
    return [Command(name_of(page), line) for line in found if "..." not in line and "NAME" not in line]


def links(page: Path) -> list[str]:
    """Targets of links and pictures, outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(markdown: str) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
