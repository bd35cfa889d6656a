"""Running notebooks, the closing table, and what a committed notebook may hold: on toys of two cells."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from medquad_utils import course, profiles
from medquad_utils.profiles import CourseError

PARAMETERS = """profile = "auto"  # tiny, small, ...
rows = 0  # 0 is all
rate = 0.5
out = ""
"""
WRITE = """import json, pathlib
folder = pathlib.Path(out) / profile / "metrics"
folder.mkdir(parents=True)
(folder / "toy.json").write_text(json.dumps({"headline": f"saw {rows} rows at {rate}"}))
print("done")
"""


def notebook(path: Path, *sources: str) -> Path:
    """A notebook with a parameters cell and ``sources``."""
    made = nbformat.v4.new_notebook()
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    made.cells = [nbformat.v4.new_markdown_cell("# Toy"), *cells]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two lessons that stands in for ``notebooks/``."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook(folder / "01_toy_lesson.ipynb", WRITE)
    notebook(folder / "03_fail_at_once.ipynb", "rows + 1", "print('before')\nraise ValueError('too many ' + '\\nrows')", "print('never')")
    monkeypatch.setattr(course, "notebooks_folder", lambda: folder)
    return folder


def executed(path: Path) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells)


# ---- finding lessons and reading parameters -------------------------------------------------------------------------


def test_parameters_are_read_with_their_defaults_and_without_their_comments(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_x.ipynb", "late = 1")
    assert course.parameters_of(path) == {"profile": '"auto"', "rows": "0", "rate": "0.5", "out": '""'}


def test_lessons_come_in_order_or_as_chosen(toys: Path) -> None:
    first, third = toys / "01_toy_lesson.ipynb", toys / "03_fail_at_once.ipynb"
    assert course.lessons() == [first, third]
    assert course.lessons(["3", "01"]) == [third, first]
    assert course.lessons([" 1 "]) == [first]
    with pytest.raises(CourseError, match="no lesson 02, 07: there are 01, 03"):
        course.lessons(["2", "1", "7"])


def test_the_lessons_of_the_course_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert course.notebooks_folder() == repo / "notebooks"
    assert [path.name[:2] for path in course.lessons()][:5] == ["01", "02", "03", "04", "05"]


def test_a_lessons_metrics_file_is_named_by_its_verb(tmp_path: Path) -> None:
    assert course.metrics_file(Path("04_train_with_sft.ipynb"), tmp_path) == tmp_path / "metrics" / "train.json"
    assert course.title(Path("04_train_with_sft.ipynb")) == "04 train with sft"


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-1", -1), ("0.5", 0.5), ("2e-4", 2e-4), ("xml", "xml"), ("", ""), ("1.2.3", "1.2.3"), ("a=b", "a=b"), ("True", "True")],
)
def test_values_of_the_command_line_become_the_numbers_they_are_written_as(text: str, value: object) -> None:
    found = course._typed(text)
    assert (found, type(found)) == (value, type(value))


# ---- running --------------------------------------------------------------------------------------------------------


def test_a_lesson_runs_with_its_parameters_and_leaves_notebook_page_and_headline(
    toys: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    before = (toys / "01_toy_lesson.ipynb").read_bytes()
    (result,) = course.run("tiny", ["01"], {"rows": "12", "rate": "0.25"}, str(tmp_path / "runs"), said.append)
    assert result.lesson == "01 toy lesson"
    assert result.headline == "saw 12 rows at 0.25"
    assert result.seconds > 0
    assert result.peak_gb > 0
    folder = tmp_path / "runs" / "tiny" / "notebooks"
    assert sorted(p.name for p in folder.iterdir()) == ["01_toy_lesson.html", "01_toy_lesson.ipynb"]
    assert executed(folder / "01_toy_lesson.ipynb")[-1].outputs[0].text == "done\n"
    assert ">done" in (folder / "01_toy_lesson.html").read_text()
    assert (toys / "01_toy_lesson.ipynb").read_bytes() == before, "the committed notebook is not touched"
    assert any("[1/1] 01 toy lesson" in line for line in said)
    assert said[-1].strip() == course.table([result])
    assert "WARNING" not in capfd.readouterr().err, "ipykernel 7.4 warns where the kernel is talked to in the clear"


def test_a_failing_cell_names_lesson_and_cell_in_one_line_and_keeps_the_notebook(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(CourseError) as caught:
        course.run("tiny", ["03"], {}, str(tmp_path / "runs"), lambda _: None)
    kept = tmp_path / "runs" / "tiny" / "notebooks" / "03_fail_at_once.ipynb"
    cells = [c for c in executed(kept) if c.cell_type == "code"]
    failed = next(c for c in cells if any(o.output_type == "error" for o in c.outputs))
    assert str(caught.value) == (
        f"lesson 03 fail at once, cell {failed.execution_count}: ValueError: too many  (see {kept.name} in tiny/notebooks)"
    )
    assert failed.outputs[0].text == "before\n"
    assert cells[-1].execution_count is None, "nothing runs after a failure"


def test_a_kernel_that_is_killed_is_one_message_about_memory(toys: Path, tmp_path: Path) -> None:
    notebook(toys / "04_die_in_silence.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(CourseError, match=r"04 die in silence: .*memory.*smaller profile"):
        course.run("tiny", ["04"], {}, str(tmp_path / "runs"), lambda _: None)


def test_a_parameter_that_no_chosen_lesson_has_is_refused_before_anything_runs(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="unknown parameter rowz: the lessons take out, profile, rate, rows"):
        course.run("tiny", [], {"rowz": "1"}, str(tmp_path / "runs"), lambda _: None)
    assert not (tmp_path / "runs").exists()


def test_the_table_lines_its_columns_up_and_adds_the_times() -> None:
    results = [course.Result("01 a", 59.9, 0.45, "short"), course.Result("02 a longer title", 125.2, 11.04, "0.2 -> 0.9")]
    assert course.table(results).splitlines() == [
        "lesson             min:s  peak RAM  headline",
        "-" * 46,
        "01 a               0:59   0.5 GB    short",
        "02 a longer title  2:05   11.0 GB   0.2 -> 0.9",
        "all                3:05",
    ]


# ---- errors in a notebook -------------------------------------------------------------------------------------------

SETUP = """from medquad_utils import profiles
plan = profiles.resolve("tiny", hardware=profiles.Hardware("cpu", "any", 16.0))"""


def test_a_cell_run_out_of_order_and_a_mistake_are_one_line_and_a_bug_keeps_its_traceback(repo: Path) -> None:
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(s) for s in (SETUP, "print(splits)", "profiles.resolve('huge')", "1 / 0", "print('goes on')")]
    nbclient.NotebookClient(made, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": str(repo)}}).execute()
    setup, unordered, mistake, bug, after = (cell.outputs for cell in made.cells)
    assert setup == []
    assert (unordered[0].ename, len(unordered[0].traceback)) == ("NameError", 1)
    assert unordered[0].evalue == (
        "name 'splits' is not defined. A cell above has not been run yet: "
        "choose Run > Run All Above Selected Cell, then run this one again."
    )
    assert (mistake[0].ename, mistake[0].traceback) == ("CourseError", [f"CourseError: {mistake[0].evalue}"])
    assert mistake[0].evalue.startswith("unknown profile 'huge'")
    assert bug[0].ename == "ZeroDivisionError"
    assert "1 / 0" in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(bug[0].traceback))
    assert after[0].text == "goes on\n"


# ---- the committed notebooks ----------------------------------------------------------------------------------------


def test_scrub_removes_what_a_committed_notebook_must_not_hold() -> None:
    widget = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}, "metadata": {}}
    table = {"output_type": "execute_result", "execution_count": 7, "data": {"text/plain": "x"}, "metadata": {}}
    printed = {"output_type": "stream", "name": "stdout", "text": "kept"}
    noise = {"output_type": "stream", "name": "stderr", "text": "0%| | 0/4"}
    cell = {
        "id": "c1", "cell_type": "code", "source": "x", "execution_count": 7, "outputs": [widget, printed, noise, table],
        "metadata": {"tags": ["predict", "injected-parameters"], "papermill": {"start_time": "2026"}, "execution": {}},
    }  # fmt: skip
    whole = json.dumps(cell)
    assert course.scrub(cell) == {
        "id": "c1", "cell_type": "code", "source": "x", "execution_count": None,
        "outputs": [printed, {**table, "execution_count": None}], "metadata": {"tags": ["predict"]},
    }  # fmt: skip
    assert json.dumps(cell) == whole, "the executed notebook is not changed"
    text = {"id": "m1", "cell_type": "markdown", "source": "# A", "metadata": {"papermill": {}}}
    assert course.scrub(text) == {"id": "m1", "cell_type": "markdown", "source": "# A", "metadata": {}}


def test_the_source_hash_changes_with_the_source_and_with_nothing_else() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"], "metadata": {}},
        {"cell_type": "code", "source": "x = 1", "outputs": [], "execution_count": None, "metadata": {}},
    ]
    first = course.source_hash(cells)
    ran = [cells[0], {**cells[1], "outputs": [{"output_type": "stream"}], "execution_count": 3, "metadata": {"papermill": {}}}]
    assert course.source_hash(ran) == first
    assert course.source_hash([{**cells[0], "source": "# A\nb"}, cells[1]]) == first, "a list of lines is the same text"
    changed = [
        [{**cells[0], "source": "# A\nc"}, cells[1]],
        [cells[0], {**cells[1], "source": "x = 2"}],
        [cells[0], {**cells[1], "cell_type": "raw"}],
        cells[::-1],
        cells[:1],
    ]
    hashes = [course.source_hash(c) for c in changed]
    assert first not in hashes
    assert len(set(hashes)) == len(hashes)


def test_a_stamped_notebook_carries_fresh_outputs_its_need_and_a_stamp_that_fits(toys: Path, tmp_path: Path) -> None:
    path = toys / "01_toy_lesson.ipynb"
    lesson = nbformat.read(path, as_version=4)
    lesson.cells[0].source = "# Toy\n\n**You need** NEED.\n"
    nbformat.write(lesson, path)
    (result,) = course.run("tiny", ["01"], {"rows": "12"}, str(tmp_path / "runs"), lambda _: None)
    course.stamp(tmp_path / "runs" / "tiny" / "notebooks" / path.name, path, "tiny", result)
    text = path.read_text()
    stamped = nbformat.reads(text, as_version=4)
    nbformat.validate(stamped)
    assert [c.source for c in stamped.cells[1:]] == [PARAMETERS, WRITE], "the injected cell is gone"
    assert "NEED" not in stamped.cells[0].source
    assert re.search(r"^\*\*You need\*\* .*\d+ (s|min) and \d+\.\d GB", stamped.cells[0].source, re.MULTILINE)
    assert stamped.cells[2].outputs[0].text == "done\n"
    assert stamped.metadata["medquad"]["source"] == course.source_hash(json.loads(text)["cells"])
    assert stamped.metadata["medquad"]["versions"] == profiles.versions()
    assert str(tmp_path) not in text


def test_an_installation_without_a_checkout_says_what_is_missing(tmp_path: Path, repo: Path) -> None:
    """A copy of the package alone, as pip installs it, asked from a folder without lessons."""
    shutil.copytree(repo / "medquad_utils", tmp_path / "medquad_utils", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "medquad_utils.cli", "run", "--profile", "tiny"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["medquad: no notebooks/ folder found: run this inside a clone of the course's repository."]
