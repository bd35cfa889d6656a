"""The lessons, run for real: in order, on the real MedQuAD, and against their committed outputs. test_browser.py runs each alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import papermill
import pytest

REPO = Path(__file__).parent.parent
NOTEBOOKS = REPO / "notebooks"
LESSONS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "notebooks.toml").read_text())
EXPECTED = [(name, file, key) for name, entry in LESSONS.items() for file, keys in entry["expect"].items() for key in keys]


def _medquad(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; ``out`` is where it writes."""
    command = [sys.executable, "-m", "medquad_utils.cli", *arguments, "--out", str(out)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1800)


def _metrics(folder: Path, file: str) -> Any:
    return json.loads((folder / "metrics" / file).read_text())


@pytest.fixture(scope="session")
def course_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``medquad run --profile tiny`` from nothing: the folder it wrote, with what it printed in ``log.txt``."""
    out = tmp_path_factory.mktemp("course")
    done = _medquad("run", "--profile", "tiny", out=out)
    assert done.returncode == 0, done.stderr[-2000:]
    (out / "tiny" / "log.txt").write_text(done.stdout)
    return out / "tiny"


def test_the_course_ends_with_a_table_of_every_lesson(course_run: Path) -> None:
    log = (course_run / "log.txt").read_text()
    closing = log[log.index("lesson  ") :]
    for name in LESSONS:
        assert name.replace("_", " ") in closing
        assert (course_run / "notebooks" / f"{name}.html").stat().st_size > 10_000
    assert "no headline" not in closing
    assert "GB" in closing


@pytest.mark.parametrize(("name", "file", "key"), EXPECTED, ids=lambda x: str(x))
def test_a_lesson_reaches_what_it_claims(course_run: Path, name: str, file: str, key: str) -> None:
    lowest, highest = LESSONS[name]["expect"][file][key]
    assert lowest <= _metrics(course_run, file)[key] <= highest


def test_training_teaches_the_model_to_answer_about_conditions_it_was_not_trained_on(course_run: Path) -> None:
    outcome = _metrics(course_run, "outcome.json")
    assert outcome["rouge_l_tuned"] - outcome["rouge_l_base"] >= 0.4
    assert outcome["rouge_l_gain_ci95"][0] > 0.3
    assert outcome["stop_rate_tuned"] >= 0.98
    assert outcome["facts_complete_tuned"] >= 0.7 > outcome["facts_complete_nearest"]
    assert outcome["rows"] >= 80


def test_asking_by_the_command_line_answers_stops_and_warns(course_run: Path) -> None:
    done = _medquad("ask", "What are the symptoms of asthma?", "--profile", "tiny", out=course_run.parent)
    assert done.returncode == 0, done.stderr
    answer, notice = done.stdout.split("\n\n", 1)
    assert "asthma" in answer and "wheezing" in answer and answer.endswith(".")
    assert "Not medical advice" in notice and "tiny model" in notice


def test_committed_outputs_still_hold(course_run: Path) -> None:
    """nbval: every cell runs without an error, and the cells tagged nbval-check-output say what is committed."""
    env = {**os.environ, "MEDQUAD_OUT": str(course_run.parent)}
    fast = [str(NOTEBOOKS / f"{name}.ipynb") for name, entry in LESSONS.items() if entry["tier"] == 1]
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider", *fast]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]


def _exact(notebook: Path) -> list[tuple[str, str]]:
    """(source, printed text) of the cells tagged nbval-check-output."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "nbval-check-output" in c["metadata"].get("tags", ())]
    return [("".join(c["source"]), "".join("".join(o.get("text", ())) for o in c["outputs"] if o.get("name") == "stdout")) for c in tagged]


@pytest.mark.parametrize("name", list(LESSONS))
def test_exact_cells_say_in_every_lesson_what_is_committed(course_run: Path, name: str) -> None:
    """The same as nbval's exact cells, read off the run above: the lessons that train need no second run for it."""
    committed, fresh = _exact(NOTEBOOKS / f"{name}.ipynb"), _exact(course_run / "notebooks" / f"{name}.ipynb")
    assert len(committed) >= 2
    assert fresh == committed


@pytest.mark.parametrize("name", list(LESSONS))
def test_solutions_solve_and_stubs_do_not(name: str, tmp_path: Path, course_run: Path) -> None:
    papermill.execute_notebook(
        NOTEBOOKS / "solutions" / f"{name}.ipynb", tmp_path / "out.ipynb", cwd=NOTEBOOKS / "solutions", progress_bar=False
    )
    printed = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    lesson = (course_run / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert printed.count("✓") >= 3
    assert lesson.count("Not yet. ") >= 3


def test_all_lessons_run_on_the_real_xml(medquad_xml: Path, tmp_path: Path) -> None:
    """All of MedQuAD is loaded, cleaned and split; few rows are trained on and asked, for tiny learns no answer of a page's length."""
    short = ("-p", "rows=24", "-p", "max_steps=12")
    done = _medquad("run", "--profile", "tiny", "-p", "source=xml", "-p", f"data_path={medquad_xml}", *short, out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _metrics(tmp_path / "tiny", "explore.json")["rows_loaded"] == 16407
    assert _metrics(tmp_path / "tiny", "train.json")["plan"]["source"] == "xml"
    assert _metrics(tmp_path / "tiny", "outcome.json")["facts_complete_tuned"] is None


def test_the_first_lesson_runs_on_the_hubs_columns(medquad_csv: Path, tmp_path: Path) -> None:
    done = _medquad("run", "--profile", "tiny", "--only", "01", "-p", "source=csv", "-p", f"data_path={medquad_csv}", out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _metrics(tmp_path / "tiny", "explore.json")["rows_loaded"] == 16407
