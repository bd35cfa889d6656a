"""Before a class: each thing that can be wrong with a machine is found, named, and has a way out."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from medquad_utils import cli, course, readiness
from medquad_utils.profiles import CourseError
from medquad_utils.readiness import OK, PROBLEM, WARNING, Finding


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A stand-in for what pip installed: two packages; a test changes versions in it, and an empty one is missing."""
    have = {"torch": "2.13.0+cpu", "peft": "0.21.2"}

    def version(name: str) -> str:
        if not have[name]:
            raise importlib.metadata.PackageNotFoundError(name)
        return have[name]

    needs = ["torch<2.15,>=2.9", "peft<0.22,>=0.21", 'pytest>=9; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.11,<3.15"})
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return have


def test_packages_in_range_and_as_tested_are_one_line(installed: dict[str, str]) -> None:
    assert only(readiness.packages()).state == OK
    assert "2 packages as tested" in only(readiness.packages()).said


def test_a_missing_package_and_an_old_one_have_the_line_that_mends_them(installed: dict[str, str]) -> None:
    installed.update(torch="2.8.0", peft="")
    old, missing = readiness.packages()
    assert (old.state, missing.state) == (PROBLEM, PROBLEM)
    assert "torch 2.8.0" in old.said and old.todo == 'pip install "torch<2.15,>=2.9"'
    assert "peft is missing" in missing.said and missing.todo == 'pip install "peft<0.22,>=0.21"'


def test_a_version_in_range_that_was_not_tested_is_a_warning(installed: dict[str, str]) -> None:
    installed["torch"] = "2.14.1"
    found = only(readiness.packages())
    assert found.state == WARNING
    assert "torch 2.14.1 (tested: 2.13.0)" in found.said and "peft" not in found.said


def test_an_old_python_is_a_problem(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness.platform, "python_version", lambda: "3.10.2")
    found = only(readiness.packages())
    assert (found.what, found.state) == ("python", PROBLEM)
    assert "3.10.2" in found.said and ">=3.11" in found.said


def test_a_checkout_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PACKAGE", "no-such-distribution-of-ours")
    assert "is not installed" in only(readiness.packages()).said


def test_the_embedded_model_answers() -> None:
    assert only(readiness.model()).state == OK


def test_a_model_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from medquad_utils import profiles

    broken = tmp_path / "tiny"
    shutil.copytree(profiles.TINY_MODEL, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr(profiles, "TINY_MODEL", broken)
    found = only(readiness.model())
    assert found.state == PROBLEM
    assert "does not answer" in found.said and "git checkout" in found.todo


def test_lessons_are_stamped_and_a_changed_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(readiness.lessons()).state == OK
    for path in course.lessons()[:2]:
        shutil.copy(path, tmp_path)
    changed = tmp_path / "02_quantize_to_4_bits.ipynb"
    notebook = json.loads(changed.read_text(encoding="utf-8"))
    notebook["cells"][1]["source"] = "print('mine')"
    changed.write_text(json.dumps(notebook), encoding="utf-8")
    monkeypatch.setattr(course, "notebooks_folder", lambda: tmp_path)
    found = only(readiness.lessons())
    assert found.state == WARNING and found.said.endswith(": 02 quantize to 4 bits")


def test_too_little_memory_names_the_hungriest_lesson(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {number: measured["peak_gb"] for number, measured in readiness.timings().items()}
    need = max(peaks.values()) + readiness.BESIDE_GB
    for free, state in ((need + 0.01, OK), (need - 0.01, PROBLEM)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free * 1e9))
        found = only(readiness.memory())
        assert found.state == state
        assert f"lesson {max(peaks, key=lambda n: peaks[n])}" in found.said


def test_a_full_disk_is_found_where_results_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def nearly_full(path: Path) -> Any:
        asked.append(path)
        return usage(1e12, 1e12 - 5e8, 5e8)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    found = only(readiness.disk(tmp_path / "not" / "yet" / "there"))
    assert asked == [tmp_path]
    assert (found.state, found.said) == (PROBLEM, "0.5 GB free for results, 1.0 GB needed")


def test_a_results_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert only(readiness.results(tmp_path / "runs")).state == OK
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"

    def refuse(dir: Path) -> None:  # root, who runs tests in containers, may write anywhere
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(readiness.tempfile, "TemporaryFile", refuse)
    found = only(readiness.results(tmp_path / "runs"))
    assert found.state == PROBLEM and "MEDQUAD_OUT" in found.todo


def test_a_port_that_somebody_listens_on_is_taken_and_free_again_afterwards() -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        number = somebody.getsockname()[1]
        taken = readiness.port(number, "do this")
    assert (taken.state, taken.said, taken.todo) == (WARNING, "taken", "do this")
    assert readiness.port(number, "do this") == Finding(f"port {number}", OK, "free")


def test_one_look_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> list[Finding]:
        raise CourseError("no notebooks/ folder found")

    for name in ("packages", "model", "auto"):
        monkeypatch.setattr(readiness, name, lambda name=name: [Finding(name, OK, "fine")])
    monkeypatch.setattr(readiness, "lessons", gone)
    found = {f.what: f for f in readiness.check()}
    assert found["lessons"] == Finding("lessons", PROBLEM, "no notebooks/ folder found")
    assert {"packages", "model", "memory", "disk", "results", "port 8888", "port 7860", "auto"} < set(found)


@pytest.mark.parametrize(
    ("state", "status", "verdict"), [(OK, 0, "ready for class"), (WARNING, 0, "1 to know of"), (PROBLEM, 1, "1 to mend")]
)
def test_the_command_ends_with_a_verdict_and_a_status(
    state: str, status: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readiness, "check", lambda: [Finding("one", OK, "fine"), Finding("the other", state, "said", "do this")])
    assert cli.main(["course", "--check"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [state, "the", "other", "said"]
    assert lines[2].strip() == "-> do this"
    assert verdict in lines[-1]


def test_without_check_the_command_runs_every_lesson_on_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(course, "run", lambda *given, **named: called.append((given, named)))
    assert cli.main(["course"]) == 0
    assert called == [(("tiny",), {})]
