"""Where learners sit: what JupyterLab, Notebook 7, VS Code, GitHub, Windows and macOS ask of the notebooks and of the package.

The pages themselves are looked at in test_browser.py.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, Markup

NOTEBOOKS = REPO / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*_*.ipynb"))
EVERY = [*LESSONS, *sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))]
MODULES = sorted((REPO / "medquad_utils").rglob("*.py"))

SHOWN = {"text/plain", "text/html", "text/markdown", "image/png"}  # every front end and GitHub show these without an extension
LIMIT = 1_000_000  # bytes: GitHub shows no notebook that is much larger
HIDING = {"style", "script", "link", "details", "iframe", "input", "svg", "canvas", "object", "embed", "form", "button", "video", "audio"}
# Calls and modules that are not on every system; a module may be used by name only below a guard.
POSIX_CALLS = {"os.fork", "os.uname", "os.killpg", "os.setsid", "os.getuid", "os.geteuid", "os.getloadavg", "os.mkfifo", "os.sysconf"}
POSIX_CALLS |= {"signal.SIGKILL", "signal.SIGALRM", "signal.alarm", "signal.SIGHUP", "signal.SIGUSR1", "os.sched_getaffinity", "os.nice"}
POSIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"}
TEXT_CALLS = {"open", "read_text", "write_text"}
OTHERS = r"^(?:os|tarfile|webbrowser|Image)\.open$|^importlib\.metadata\."  # of these names, but no text files
UNNAMEABLE = re.compile(r'[<>:"\\|?*\x00-\x1f]|[ .]$|^(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)', re.IGNORECASE)

lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
every = pytest.mark.parametrize("path", EVERY, ids=lambda p: f"{p.parent.name}/{p.stem}")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


# ---- the table of contents ------------------------------------------------------------------------------------------


def headings(notebook: Any) -> list[tuple[int, str]]:
    """(level, text) of the Markdown headings outside fenced code."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^```.*?^```", "", "".join(cell["source"]), flags=re.DOTALL | re.MULTILINE)
            found += [(len(marks), title) for marks, title in re.findall(r"^(#{1,6}) +(.+?) *$", text, re.MULTILINE)]
    return found


def wrong_with_headings(found: list[tuple[int, str]]) -> list[str]:
    """What keeps headings from being a table of contents: one h1, the first; no level skipped; no two alike."""
    levels = [level for level, _ in found]
    wrong = [] if levels[:1] == [1] and levels.count(1) == 1 else [f"h1 must be first and alone: {levels}"]
    wrong += [f"a level is skipped before {found[n + 1][1]!r}" for n, level in enumerate(levels[:-1]) if levels[n + 1] > level + 1]
    titles = [title for _, title in found]
    return wrong + [f"twice: {title!r}" for title in dict.fromkeys(titles) if titles.count(title) > 1]


@lesson
def test_headings_are_a_table_of_contents(path: Path) -> None:
    found = headings(read(path))
    assert len(found) >= 8
    assert wrong_with_headings(found) == []


def test_headings_that_are_none_are_found() -> None:
    assert wrong_with_headings([(1, "A"), (2, "B"), (3, "C"), (2, "D")]) == []
    wrong = wrong_with_headings([(1, "A"), (3, "B"), (1, "B")])
    assert wrong == ["h1 must be first and alone: [1, 3, 1]", "a level is skipped before 'B'", "twice: 'B'"]
    fenced = {"cell_type": "markdown", "source": ["# A\n", "```\n", "# no heading\n", "```\n", "## B"]}
    assert headings({"cells": [fenced]}) == [(1, "A"), (2, "B")]


# ---- Notebook 7, VS Code, GitHub ------------------------------------------------------------------------------------


def wrong_with_form(text: str) -> list[str]:
    """What some front end would not show of a notebook, given as its file's text."""
    notebook = json.loads(text)
    ids = [cell.get("id") for cell in notebook["cells"]]
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    magics = re.findall(
        r"^\s*((?:%|!).*)$", "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"), re.MULTILINE
    )
    hiding = {tag for o in outputs(notebook) for tag in Markup("".join(o.get("data", {}).get("text/html", ""))).tags} & HIDING
    checks = {
        "is not nbformat 4.5": (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5),
        "cells lack ids of their own": None not in ids and len(set(ids)) == len(ids),
        "does not ask for the kernel python3": notebook["metadata"]["kernelspec"]["name"] == "python3",
        "has widget metadata": "widgets" not in notebook["metadata"],
        f"outputs need an extension: {sorted(kinds - SHOWN)}": kinds <= SHOWN,
        "an output has no plain text": all("text/plain" in o["data"] for o in outputs(notebook) if "data" in o),
        f"magic beyond %pip: {magics}": all(m.startswith("%pip ") for m in magics),
        f"GitHub strips or folds {sorted(hiding)}": not hiding,
        "is too large for GitHub": len(text.encode()) < LIMIT,
    }
    return [fault for fault, sound in checks.items() if not sound]


@every
def test_every_front_end_shows_all_of_it(path: Path) -> None:
    assert wrong_with_form(path.read_text(encoding="utf-8")) == []


def _doctored(change: str) -> str:
    notebook = read(LESSONS[0])
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    widget = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "x"}}
    folded = {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<details>a</details>", "text/plain": "a"}}
    bare = {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<b>a</b>"}}
    {
        "minor": lambda: notebook.update(nbformat_minor=4),
        "ids": lambda: code[1].update(id=code[0]["id"]),
        "kernel": lambda: notebook["metadata"]["kernelspec"].update(name="conda-env"),
        "widgets": lambda: notebook["metadata"].update(widgets={}),
        "view": lambda: code[1]["outputs"].append(widget),
        "plain": lambda: code[1]["outputs"].append(bare),
        "shell": lambda: code[1]["source"].append("\n!ls"),
        "magic": lambda: code[1]["source"].append("\n%matplotlib widget"),
        "folded": lambda: code[1]["outputs"].append(folded),
        "large": lambda: notebook["metadata"].update(padding="é" * LIMIT),
    }[change]()
    return json.dumps(notebook)


@pytest.mark.parametrize("change", ["minor", "ids", "kernel", "widgets", "view", "plain", "shell", "magic", "folded", "large"])
def test_what_some_front_end_does_not_show_is_found(change: str) -> None:
    assert len(wrong_with_form(_doctored(change))) == 1


def test_tables_and_cards_read_without_their_styles() -> None:
    """GitHub drops every style: rows and cards must come from the tags."""
    from medquad_utils import plots

    table = plots.Table([["a", 1]], ["name", "n"])._repr_html_()
    cards = plots.Cards([{"question": "Q ?", "answer": "A."}, {"question": "R ?"}])._repr_html_()
    assert re.sub(r' style="[^"]*"', "", table) == "<table><tr><th>name</th><th>n</th></tr><tr><td>a</td><td>1</td></tr></table>"
    bare = "<blockquote><b>question</b>: Q ?<br><b>answer</b>: A.</blockquote><blockquote><b>question</b>: R ?</blockquote>"
    assert re.sub(r' style="[^"]*"', "", cards) == bare


# ---- Windows and macOS ----------------------------------------------------------------------------------------------


def _binary(node: ast.Call) -> bool:
    """Whether a call of open, or of a path's open, asks for bytes."""
    place = 1 if isinstance(node.func, ast.Name) else 0
    given = [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg == "mode")]
    return ast.unparse(node.func).endswith("open") and any("b" in str(a.value) for a in given if isinstance(a, ast.Constant))


def posix_only(source: str) -> list[str]:
    """What in Python source runs on some systems only, or reads text in the system's own encoding; "line N: what"."""
    found = []
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        what = _posix_only(node)
        guard = f'hasattr({what.rpartition(".")[0]}, "{what.rpartition(".")[2]}")'
        if what and guard not in lines[node.lineno - 1]:
            found.append(f"line {node.lineno}: {what}")
    return found


def _posix_only(node: ast.AST) -> str:
    """The name of what a node uses that is not on every system, "" if nothing."""
    match node:
        case ast.Attribute() if ast.unparse(node) in POSIX_CALLS:
            return ast.unparse(node)
        case ast.Import() if {a.name for a in node.names} & POSIX_MODULES:
            return ast.unparse(node)
        case ast.ImportFrom() if node.module in POSIX_MODULES:
            return ast.unparse(node)
        case ast.Constant(value=str(text)) if re.match(r"/(?:tmp|proc|dev|etc|bin|usr)\b", text):
            return repr(text)
        case ast.Call():
            called = ast.unparse(node.func)
            encoded = any(k.arg in ("encoding", None) for k in node.keywords)
            if called.rpartition(".")[2] in TEXT_CALLS and not encoded and not _binary(node) and not re.search(OTHERS, called):
                return f"{called} without encoding"
    return ""


def lesson_source(path: Path) -> str:
    code = "\n".join("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code")
    return re.sub(r"^(\s*)%.*$", r"\1pass", code, flags=re.MULTILINE)


@every
def test_no_cell_needs_a_certain_system(path: Path) -> None:
    assert posix_only(lesson_source(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_module_needs_a_certain_system(path: Path) -> None:
    assert posix_only(path.read_text(encoding="utf-8")) == []


def test_what_needs_a_certain_system_is_found() -> None:
    source = (
        "import os, resource\nos.fork()\nx = '/tmp/a'\nopen('a')\nopen('a', 'rb')\np.read_text()\np.write_text('a', encoding='utf-8')\n"
    )
    source += 'import signal\nos.kill(1, signal.SIGKILL)\nn = os.nice(1) if hasattr(os, "nice") else 0\n'
    found = posix_only(source)
    lines = sorted(int(line.split()[1].rstrip(":")) for line in found)
    assert lines == [1, 2, 3, 4, 6, 9]


def test_every_file_has_a_name_that_windows_can_hold() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout.decode().split("\0")
    names = [name for name in listed if name]
    assert len(names) > 50
    assert [n for n in names if any(UNNAMEABLE.search(part) for part in n.split("/")) or len(n) > 120] == []
    assert len({n.casefold() for n in names}) == len(names), "two names that differ in case only"
    assert UNNAMEABLE.search("aux.py") and UNNAMEABLE.search("a:b") and UNNAMEABLE.search("end.")
