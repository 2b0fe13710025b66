"""Hooks of MkDocs: pages that the code writes, and links that leave docs/ for a file of the checkout."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from reference import configuration_page, jobs_page  # noqa: E402 - the path above

_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and a copy of each file of the checkout that a page links to."""
    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    files.append(File.generated(config, "jobs.md", content=jobs_page()))
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for name in sorted({match[1] for match in _OUTSIDE.finditer(text)}):
        path = ROOT / name
        if path.is_file():  # MkDocs itself complains about a link to none
            files.append(File.generated(config, _copy(name), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point the links that leave docs/ to the copies."""
    return _OUTSIDE.sub(lambda match: f"]({_copy(match[1])})" if (ROOT / match[1]).is_file() else match[0], markdown)


def _copy(name: str) -> str:
    """Where the copy is; as text, so that a Markdown file is shown as it is and not rendered once more."""
    return f"source/{name}.txt" if name.endswith(".md") or "." not in Path(name).name else f"source/{name}"
