"""``medquad`` as a user types it: each command in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from medquad_utils import profiles

REPO = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "matplotlib", "papermill", "huggingface_hub")


def medquad(*arguments: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """Run the command line without a Hub, a token or a chosen output folder; ``python -m`` is what the script ``medquad`` calls."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MEDQUAD_"))}
    nobody = str(Path(tempfile.gettempdir()) / "home of nobody who logged in to the Hub")
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": nobody, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "medquad_utils.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def mistake(*arguments: str, cwd: Path = REPO) -> str:
    """What one wrong command says: exit status 1, one line on stderr, no traceback anywhere."""
    done = medquad(*arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("medquad: ")
    return line


# ---- what it answers ------------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    code = f"""
import sys
from medquad_utils import cli
try:
    cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
loaded = set({HEAVY}) & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "run", "ask"):
        assert re.search(rf"^ +{command} +\w", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", ["run", "ask"])
def test_the_help_of_a_command_names_every_profile(command: str) -> None:
    done = medquad(command, "--help")
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    assert f"auto, {', '.join(profiles.PROFILES)}" in said


def test_the_version_is_that_of_the_project() -> None:
    declared = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert medquad("--version").stdout.split() == ["medquad", declared[1]]


def test_doctor_names_the_profile_that_auto_takes_and_why(tmp_path: Path) -> None:
    done = medquad("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = dict(re.findall(r"^(\S.*?)  +(\S.*)$", done.stdout, re.MULTILINE))
    assert facts["auto takes"].startswith("tiny (")
    assert "Hub is out of reach" in facts["auto takes"]
    assert facts["Hugging Face Hub"] == "out of reach"
    assert facts["HF_TOKEN"] == "not set"
    for name, version in profiles.versions().items():
        assert facts[name] == version
    assert facts["profile"].startswith("tiny")
    assert not list(tmp_path.iterdir()), "looking writes nothing"


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("run", "--profile", "huge"), ("ask", "What causes asthma?", "--profile", "huge")], ids=["run", "ask"])
def test_an_unknown_profile_is_refused_with_the_known_ones(command: tuple[str, ...]) -> None:
    line = mistake(*command)
    assert "'huge'" in line
    assert all(name in line for name in ("auto", *profiles.PROFILES))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "99"), "no lesson 99: there are 01, 02, 03, 04, 05"),
        (("-p", "temperatur=1"), "unknown parameter temperatur: the lessons take data_path, lora_r, "),
        (("-p", "source"), "'source': expected NAME=VALUE"),
        (("-p", "rows=many"), "rows=many: expected a whole number"),
        (("-p", "rows=-5"), "rows=-5: expected a whole number"),
        (("-p", "source=web"), "unknown source 'web': expected one of sample, hub, xml"),
        (("-p", "source=xml"), "'xml' needs data_path"),
        (("-p", "source=csv", "-p", "data_path=nowhere/rows.csv"), "data_path=nowhere/rows.csv: there is no such file"),
        (("-p", "model_path=nowhere"), "model_path=nowhere: there is no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_of_run_is_named_before_anything_runs(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert said in mistake("run", "--profile", "tiny", "--out", str(out), *arguments)
    assert not out.exists()


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert "a file" in mistake("run", "--profile", "tiny", "--only", "01", "--out", str(tmp_path / "a file"))


def test_an_empty_question_shows_how_to_ask_one() -> None:
    assert 'medquad ask "What causes asthma?"' in mistake("ask", "  ", "--profile", "tiny")


def test_asking_before_training_names_the_lesson_that_trains(tmp_path: Path) -> None:
    line = mistake("ask", "What causes asthma?", "--profile", "tiny", "--out", str(tmp_path))
    assert "medquad run --profile tiny --only 04" in line
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word() -> None:
    """As ``medquad doctor | head -1`` does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "medquad_utils.cli", "doctor"]
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == ""
