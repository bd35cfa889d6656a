"""Is this machine ready for a class? What ``medquad course --check`` looks at: packages, model, lessons, memory, disk, ports."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medquad_utils import CourseError, course
from medquad_utils.machine import default_out
from medquad_utils.profiles import resolve

PACKAGE = "medquad-qlora"
BESIDE_GB = 1.0  # a browser and JupyterLab beside a lesson's kernel, in GB of RAM
DISK_GB = 1.0  # results of the nine lessons are under 0.1 GB on tiny, and lesson 05 and 08 write a merged model for a while
PORTS = {
    8888: "JupyterLab takes the next free one: read the address that it prints",
    7860: "start the chat with: medquad demo --port 7861",
}
OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``state`` is ok, warning or problem; ``todo`` says what to do next, if anything."""

    what: str
    state: str
    said: str
    todo: str = ""


def check() -> list[Finding]:
    """Everything a class on ``tiny`` needs, looked at on this machine; nothing is left behind. Takes some seconds."""
    folder = Path(default_out())
    looks: dict[str, Callable[[], list[Finding]]] = {
        "packages": packages,
        "model": model,
        "lessons": lessons,
        "memory": memory,
        "disk": lambda: disk(folder),
        "results": lambda: results(folder),
        "ports": lambda: [port(number, todo) for number, todo in PORTS.items()],
        "auto": auto,
    }
    found = []
    for what, look in looks.items():
        try:
            found += look()
        except CourseError as error:
            found.append(Finding(what, PROBLEM, str(error)))
    return found


def packages() -> list[Finding]:
    """Python and every package in the range that the course states; where a checkout has its pins, also in the tested version."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return [
            Finding(
                "packages",
                PROBLEM,
                f"{PACKAGE} is not installed",
                "make course, or: pip install -e .",
            )
        ]
    asked = [
        Requirement(line)
        for line in importlib.metadata.requires(PACKAGE) or ()
        if "extra ==" not in line
    ]
    have = {need.name: _installed(need.name) for need in asked}
    wrong = [
        need
        for need in asked
        if not (have[need.name] and need.specifier.contains(have[need.name], prereleases=True))
    ]
    found = []
    python, range_ = platform.python_version(), about["Requires-Python"]
    if not SpecifierSet(range_).contains(python):
        found.append(
            Finding(
                "python",
                PROBLEM,
                f"{python}, and the course needs {range_}",
                "make a .venv with another Python",
            )
        )
    for need in wrong:
        said = f"{need.name} {have[need.name] or 'is missing'}, expected {need.specifier}"
        found.append(Finding("packages", PROBLEM, said, f'pip install "{need}"'))
    other = [
        f"{name} {have[name]} (tested: {pin})"
        for name, pin in _pins().items()
        if have.get(name) and _public(have[name]) != pin
    ]
    if other and not wrong:
        todo = "touch environment.yml && make course (it installs the tested ones)"
        found.append(
            Finding("packages", WARNING, f"in range, other than tested: {', '.join(other)}", todo)
        )
    return found or [Finding("packages", OK, f"Python {python}, {len(asked)} packages as tested")]


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _public(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: the build does not matter."""
    return version.partition("+")[0]


def _pins() -> dict[str, str]:
    """Name -> tested version, of the environment.yml beside the lessons; empty without one."""
    try:
        text = (course.notebooks_folder().parent / "environment.yml").read_text(encoding="utf-8")
    except (CourseError, OSError):
        return {}
    return dict(re.findall(r"^\s*- ([\w-]+)==([\w.]+)", text, re.MULTILINE))


def model() -> list[Finding]:
    """The embedded model loads in 4 bits and answers one token."""
    from transformers.utils import logging

    from medquad_utils import generation

    logging.disable_progress_bar()
    plan = resolve("tiny")
    try:
        tokenizer = generation.load_tokenizer(plan)
        (answer,) = generation.ask(generation.load_base(plan), tokenizer, ["What is asthma?"], 1)
    except Exception as error:  # whatever a broken file, a broken package or too little memory raises: here it is a finding
        said = f"the embedded model does not answer: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return [
            Finding(
                "model",
                PROBLEM,
                said,
                "restore it with: git checkout medquad_utils/assets; then see the packages above",
            )
        ]
    return [Finding("model", OK, f"loads in 4 bits and answers ({answer.tokens} token asked for)")]


def lessons() -> list[Finding]:
    """Every lesson is there, whole, and its outputs are of its own source."""
    paths = course.lessons()
    stale = [course.title(path) for path in paths if not _stamped(path)]
    if stale:
        todo = "git checkout notebooks, or stamp your own changes: python tests/stamp.py"
        return [
            Finding(
                "lessons",
                WARNING,
                f"changed since their outputs were made: {', '.join(stale)}",
                todo,
            )
        ]
    return [Finding("lessons", OK, f"{len(paths)} lessons, outputs of their own sources")]


def _stamped(path: Path) -> bool:
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return bool(
            notebook["metadata"][course.STAMP]["source"] == course.source_hash(notebook["cells"])
        )
    except (KeyError, ValueError, TypeError):
        return False


def timings() -> Mapping[str, Mapping[str, float]]:
    """Lesson number -> seconds and peak_gb, as the run that stamped the lessons measured them; empty without a record."""
    try:
        record: Mapping[str, Mapping[str, float]] = json.loads(
            (course.notebooks_folder() / "timings.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return {}
    return record


def memory() -> list[Finding]:
    """RAM that is free now against the hungriest lesson's peak, a browser and JupyterLab beside it."""
    import psutil

    peaks = {number: measured["peak_gb"] for number, measured in timings().items()}
    need, free = (
        max(peaks.values(), default=1.0) + BESIDE_GB,
        psutil.virtual_memory().available / 1e9,
    )
    said = f"{free:.1f} GB of RAM free, {need:.1f} GB needed (lesson {max(peaks, key=lambda n: peaks[n], default='?')} and a browser)"
    return [
        Finding(
            "memory",
            OK if free >= need else PROBLEM,
            said,
            "" if free >= need else "close other programs and notebooks",
        )
    ]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.exists())


def disk(folder: Path) -> list[Finding]:
    """Free space where results go."""
    free = shutil.disk_usage(_existing(folder)).free / 1e9
    said = f"{free:.1f} GB free for results, {DISK_GB:.1f} GB needed"
    todo = "free some space, or set MEDQUAD_OUT to a folder on another disk"
    return [
        Finding("disk", OK if free >= DISK_GB else PROBLEM, said, "" if free >= DISK_GB else todo)
    ]


def results(folder: Path) -> list[Finding]:
    """The results folder, or where it would be made, can be written."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return [Finding("results", OK, f"{folder.name}/ can be written")]
    except OSError as error:
        said = f"{folder.name}/ cannot be written ({error.strerror})"
        return [
            Finding(
                "results",
                PROBLEM,
                said,
                "set MEDQUAD_OUT to a folder of yours, or run the course in one",
            )
        ]


def port(number: int, todo: str) -> Finding:
    """Whether a program could listen on this port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a connection that has just ended is nobody's
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            why = "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
            return Finding(f"port {number}", WARNING, why, todo)
    return Finding(f"port {number}", OK, "free")


def auto() -> list[Finding]:
    """The profile that notebooks take by default here, and why (Hub, token and card are in ``medquad doctor``)."""
    plan = resolve("auto")
    return [
        Finding(
            "auto", OK, f"notebooks take {plan.profile} here: {plan.why.removeprefix('auto: ')}"
        )
    ]


def table(found: Sequence[Finding]) -> str:
    """The findings, one a line; under one that is not ok, what to do next."""
    width = max(len(f.what) for f in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.state:<7}  {finding.what:<{width}}  {finding.said}")
        if finding.todo:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.todo}")
    problems = sum(f.state == PROBLEM for f in found)
    warnings = sum(f.state == WARNING for f in found)
    know = f", with {warnings} to know of" if warnings else ""
    verdict = f"not ready: {problems} to mend" if problems else f"ready for class{know}"
    return "\n".join([*lines, "", verdict])
