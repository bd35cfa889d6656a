"""Hooks of the site: the lessons in the menu, README.md and Colab.md as pages, formulas."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

REPO = Path(__file__).parents[2]
CODE = re.compile(r"(<(pre|code|script|style)\b.*?</\2>)", re.DOTALL)
FORMULA = re.compile(r"(\$\$?)([^$<]+)\1")
SOURCE = "https://github.com/medquad-qlora/medquad-qlora/blob/main/"


def on_config(config: Any) -> Any:
    """List every lesson in the menu by its title."""
    lessons = []
    for path in sorted((REPO / "notebooks").glob("0*_*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = re.search(r"(?m)^# (.+)$", first)
        lessons.append({title[1] if title else path.stem: path.name})
    next(entry for entry in config["nav"] if "Lessons" in entry)["Lessons"] = lessons
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the two pages of the repository's top level. Their links point into notebooks/."""
    for name, page in {"README.md": "index.md", "Colab.md": "Colab.md"}.items():
        text = (REPO / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(README\.md", "](index.md", text.replace("](notebooks/", "]("))
        files.append(File.generated(config, page, content=_outside(text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links of the pages beside the notebooks leave the folder."""
    markdown = markdown.replace("](../README.md", "](index.md").replace(
        "](../Colab.md", "](Colab.md"
    )
    return _outside(markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Turn a lesson's formulas into MathML, which browsers draw without a script."""
    if not page.file.src_path.endswith(".ipynb"):
        return content  # a page may hold prices in dollars
    # ``split`` also returns the name of each tag, as every third part.
    parts = [part for n, part in enumerate(CODE.split(content)) if n % 3 < 2]
    return "".join(FORMULA.sub(_mathml, p) if not n % 2 else p for n, p in enumerate(parts))


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "$$" else "inline"
    return str(convert(html.unescape(found[2]), display=display))


def _outside(text: str) -> str:
    """Turn links to files that are no page of the site into links to the repository."""
    text = re.sub(r"\]\((?:\.\./)+((?!/)[^)]+)\)", rf"]({SOURCE}\1)", text)
    return re.sub(
        r"\]\(((?:\.github|medquad_utils|tests|solutions|LICENSE|environment)[^)]*)\)",
        lambda found: f"]({SOURCE}{'notebooks/' * found[1].startswith('solutions')}{found[1]})",
        text,
    )
