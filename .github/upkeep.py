"""What the upkeep workflow needs beside pip: the names to upgrade, and the text of an issue about a course that broke.

python .github/upkeep.py names                   the packages of pyproject.toml, without their ranges
python .github/upkeep.py report RUNS LOG OUT     title.txt and body.md in OUT, from a failed run's notebooks and log
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # tracebacks in notebooks are coloured for terminals
LONGEST = 6000  # characters of a traceback or log in an issue


def names() -> list[str]:
    """Distribution names of the package's dependencies and of its test extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]


def failing_cell(notebook: Path) -> tuple[int, str, Any] | None:
    """Number (code cells from 1), source and error output of the cell that stopped an executed notebook."""
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        for output in cell["outputs"]:
            # papermill marks the cell and puts a note with the word "error" above it; the error itself is of this type
            if output["output_type"] == "error":
                return number, "".join(cell["source"]), output
    return None


def report(runs: Path, log: Path) -> tuple[str, str]:
    """Title and body of the issue: the failing lesson, its cell and error; without one, the end of the log."""
    versions = "\n".join(f"- {name} {_version(name)}" for name in names())
    for notebook in sorted(runs.glob("*/notebooks/*.ipynb")):
        if found := failing_cell(notebook):
            number, source, error = found
            title = f"Upkeep: lesson {notebook.stem.replace('_', ' ')} fails with {error['ename']}"
            said = COLOUR.sub("", "\n".join(error["traceback"]))[-LONGEST:]
            what = f"Code cell {number} of `notebooks/{notebook.name}`:\n\n{_fenced(source, 'python')}\n\n{_fenced(said)}"
            break
    else:
        title = "Upkeep: the course fails with the newest releases"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "(no log)"
        what = f"No lesson stopped at a cell. The log ends so:\n\n{_fenced(COLOUR.sub('', text)[-LONGEST:])}"
    return title, f"The weekly run against the newest releases failed.\n\n{what}\n\nInstalled:\n\n{versions}\n"


def _fenced(text: str, language: str = "") -> str:
    """A Markdown block that ``text`` cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def main(arguments: list[str]) -> int:
    """Run one of the two commands above; anything else prints them and ends with status 2."""
    match arguments:
        case ["names"]:
            print(*names())
        case ["report", runs, log, out]:
            title, body = report(Path(runs), Path(log))
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / "title.txt").write_text(title + "\n", encoding="utf-8")
            (Path(out) / "body.md").write_text(body, encoding="utf-8")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
