"""The repository around the package: versions, commands, what is committed, what is shipped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import stamp
from conftest import REPO
from packaging.requirements import Requirement
from packaging.version import Version

from medquad_utils import cli, course

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LESSONS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))
FOLDERS = (REPO, REPO / ".github", REPO / "notebooks")
PAGES = {page.name: page.read_text("utf-8") for f in FOLDERS for page in f.glob("*.md")}


def test_one_function_reads_our_own_json() -> None:
    """``files.read_json`` says which file is damaged; another reads its own text."""
    package = (REPO / "medquad_utils").rglob("*.py")
    readers = {path.name for path in package if re.search(r"json\.loads?\(", path.read_text())}
    assert readers == {"files.py", "evaluation.py"}


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> dict[str, Requirement]:
    """Name -> range of every package that pyproject.toml names, the extras included."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    lines = itertools.chain.from_iterable(lists)
    asked = {normal(requirement.name): requirement for requirement in map(Requirement, lines)}
    return {name: requirement for name, requirement in asked.items() if name != PROJECT["name"]}


def pinned() -> dict[str, str]:
    """Name -> version in constraints.txt."""
    text = (REPO / "constraints.txt").read_text(encoding="utf-8")
    return {normal(name): version for name, version in re.findall(r"(?m)^(\S+)==(\S+)$", text)}


def test_pinned_versions_lie_in_the_ranges_and_are_installed() -> None:
    for name, requirement in required().items():
        assert {">=", "<"} <= {part.operator for part in requirement.specifier}, name
        assert requirement.specifier.contains(pinned()[name]), name
        assert Version(importlib.metadata.version(name)).public == pinned()[name], name


def test_every_package_below_a_pinned_one_is_pinned() -> None:
    """Transitive packages, too: two machines that install the course have the same versions."""
    environment = {"extra": "", "python_version": "3.11", "sys_platform": "linux"}
    below = set()
    for name in pinned():
        for line in importlib.metadata.requires(name) or ():
            asked = Requirement(line)
            if not asked.marker or asked.marker.evaluate(environment):
                below.add(normal(asked.name))
    assert below - pinned().keys() - {"setuptools", "pip"} == set()


def test_make_conda_and_ci_install_the_same_versions() -> None:
    conda = (REPO / "environment.yml").read_text(encoding="utf-8")
    assert "- -c constraints.txt" in conda and "==" not in conda
    assert (REPO / "Makefile").read_text(encoding="utf-8").count(
        "--constraint constraints.txt"
    ) == 2
    for workflow in (REPO / ".github" / "workflows").glob("*.yml"):
        assert "grep ^torch== constraints.txt" in workflow.read_text(encoding="utf-8")


def test_lessons_install_the_tested_versions_on_colab() -> None:
    cells = json.loads(LESSONS[0].read_text(encoding="utf-8"))["cells"]
    install = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    named = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', install))
    assert named and named.items() <= pinned().items()
    assert PROJECT["urls"]["Repository"] in install


def test_commands_in_the_pages_exist_with_their_options() -> None:
    parameters = set().union(*map(course.parameters_of, LESSONS))
    targets = re.findall(r"(?m)^([a-z]+):", (REPO / "Makefile").read_text(encoding="utf-8"))
    text = "\n".join(PAGES.values())
    commands = re.findall(r"(?m)^ *(?:\.venv/bin/)?medquad (.+)$", text)
    commands += re.findall(r"`(?:\.venv/bin/)?medquad ([^`]+)`", text)
    assert len(commands) > 10
    for words in (shlex.split(command, comments=True) for command in commands):
        if len(words) == 1:  # a name in a sentence: its options may be required
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.parser().parse_args([*words, "--help"])
        else:
            options = cli.parser().parse_args(words)
            assert {pair.split("=")[0] for pair in getattr(options, "p", [])} <= parameters
    assert all(map(importlib.util.find_spec, re.findall(r"-m (medquad_utils[\w.]+)", text)))
    assert set(re.findall(r"(?:`|\n)make ([a-z]+)(?=`|\n|  )", text)) <= set(targets)


def test_times_and_versions_in_the_pages_are_those_of_the_last_run() -> None:
    def between(page: str, mark: str) -> str:
        return PAGES[page].split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()

    timings = json.loads((REPO / "notebooks" / "timings.json").read_text(encoding="utf-8"))
    assert between("TEACHING.md", "timings") == stamp.timings_table(timings)
    assert between("README.md", "dial") == stamp.dial_table()
    assert between("README.md", "finding") == stamp.finding()
    metadata = json.loads(LESSONS[0].read_text(encoding="utf-8"))["metadata"]
    expected = stamp.verified(metadata[course.STAMP]["versions"])
    said = between("README.md", "verified")
    assert re.sub(r"\d{4}-\d\d-\d\d", "", said) == re.sub(r"\d{4}-\d\d-\d\d", "", expected)


TOKENS = r"\b(?:hf_|gh[pousr]_|sk-)[A-Za-z0-9]{16,}"
PATHS = r"/(?:home|root|tmp|Users|work|opt)/[\w.-]+|[A-Z]:\\+Users"
PATHS += r"|(?<![\w.:/<])/(?:content|mnt|var|usr|private)/[\w.-]+"


def test_no_tracked_file_holds_a_token_or_a_path_of_a_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    files = [REPO / name for name in listed.split("\0") if name and (REPO / name).is_file()]
    assert len(files) > 50
    for file in files:
        with contextlib.suppress(UnicodeDecodeError):  # pictures and weights
            text = file.read_text(encoding="utf-8").replace("\\n", "\n")
            text = re.sub(r'"image/png": "[^"]*"', "", text)
            written = file.suffix in (".ipynb", ".md", ".json", ".toml", ".svg", ".yml")
            assert re.findall(f"{TOKENS}|{PATHS}" if written else TOKENS, text) == [], file.name


def test_the_wheel_holds_all_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    package = tmp_path / "medquad_utils"
    ignored = shutil.ignore_patterns("__pycache__", ".ruff_cache", "ruff.toml")
    shutil.copytree(REPO / package.name, package, ignore=ignored)
    names = {p.relative_to(tmp_path).as_posix() for p in package.rglob("*") if p.is_file()}
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("*-py3-none-any.whl")
    sizes = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist()}
    assert {name for name in sizes if ".dist-info/" not in name} == names
    assert {"medquad_utils/py.typed", "medquad_utils/assets/tiny/tokenizer.json"} <= names
    assert 0 < sizes["medquad_utils/assets/tiny/model.safetensors"] <= 10_000_000
