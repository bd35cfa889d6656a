"""Hooks of the site: the lessons in the menu, and README.md and Colab.md as pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).parents[2]
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


def _outside(text: str) -> str:
    """Turn links to files that are no page of the site into links to the repository."""
    text = re.sub(r"\]\((?:\.\./)+((?!/)[^)]+)\)", rf"]({SOURCE}\1)", text)
    return re.sub(
        r"\]\(((?:\.github|medquad_utils|tests|solutions|LICENSE|environment)[^)]*)\)",
        lambda found: f"]({SOURCE}{'notebooks/' * found[1].startswith('solutions')}{found[1]})",
        text,
    )
