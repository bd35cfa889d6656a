"""The ten lessons, executed once from nothing, held to their outcome ranges and exact cells."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, tiny
from transformers import PreTrainedModel

from medquad_utils import generation, reference

NOTEBOOKS = REPO / "notebooks"
LESSONS: dict[str, Any] = tomllib.loads((REPO / "tests" / "notebooks.toml").read_text("utf-8"))
RANGES = [
    (file, key, *ends)
    for lesson in LESSONS.values()
    for file, keys in lesson.items()
    for key, ends in keys.items()
]
# The quickstart, 00, has no exercises and no cell that prints the same everywhere.
each_lesson = pytest.mark.parametrize("name", [name for name in LESSONS if name >= "01"])
LIVE_BASES = REPO / "tests" / "live_bases"


def medquad(*arguments: str, out: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; ``out`` is where it writes, ``more`` environment."""
    command = [sys.executable, "-m", "medquad_utils", *arguments, "--runs", str(out)]
    env = os.environ | more
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1800)


def metrics(folder: Path, file: str) -> Any:
    return json.loads((folder / "metrics" / file).read_text("utf-8"))


def cells(notebook: Path) -> list[Any]:
    """The code cells of a notebook."""
    found = json.loads(notebook.read_text("utf-8"))["cells"]
    return [c for c in found if c["cell_type"] == "code"]


@pytest.fixture(scope="session")
def course_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``medquad run --profile tiny`` from nothing: its folder, and its output in ``log.txt``.

    The reference run of it is in ``reference/tiny`` beside the folder, and what tests/live_bases
    counted on the way in ``live/loads.jsonl``.
    """
    out = tmp_path_factory.mktemp("course")
    kept, live = str(out / "reference" / "tiny"), out / "live"
    live.mkdir()
    path = os.pathsep.join([str(LIVE_BASES), os.environ.get("PYTHONPATH", "")])
    counting = {"LIVE_BASES": str(live), "PYTHONPATH": path}
    done = medquad("run", "--profile", "tiny", "--reference", kept, out=out, **counting)
    assert done.returncode == 0, done.stderr[-2000:]
    (out / "tiny" / "log.txt").write_text(done.stdout, "utf-8")
    return out / "tiny"


@pytest.mark.full
def test_the_course_ends_with_a_table_of_all_lessons(course_run: Path) -> None:
    log = (course_run / "log.txt").read_text("utf-8")
    closing = log[log.index("lesson  ") :]
    for name in LESSONS:
        assert name.replace("_", " ") in closing
        assert (course_run / "notebooks" / f"{name}.html").stat().st_size > 10_000
    assert "no headline" not in closing
    assert "GB" in closing


@pytest.mark.full
@pytest.mark.parametrize(("file", "key", "lowest", "highest"), RANGES)
def test_a_metric_lies_in_its_range(
    course_run: Path, file: str, key: str, lowest: float, highest: float
) -> None:
    assert lowest <= metrics(course_run, file)[key] <= highest


# Lesson's metrics -> the numbers of its key figure.
TWINS = {
    "quickstart": {"written"},
    "quantize": {"cost"},
    "train": {"train_curve", "validation_curve", "answers", "singular_values"},
    "ask": {"answers"},
    "evaluate": {"questions", "arms"},
    "explain": {"reading", "faithfulness"},
    "merge": {"best", "routes"},
    "specialise": {"score", "changes", "single"},
    "explore": {
        "cleaning",
        "words",
        "tokens",
        "follow_a_template",
        "leak_by_row",
        "leak_grouped",
        "look_up",
    },
}


@pytest.mark.full
def test_the_course_leaves_a_reference_run_with_every_key_figure(
    course_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "FOLDER", course_run.parent / "reference")
    monkeypatch.setattr(reference, "REAL", ["tiny"])
    for name, keys in TWINS.items():
        yours, theirs = reference.beside(name, metrics(course_run, f"{name}.json")).values()
        assert keys <= theirs.keys() and theirs.get("headline") == yours.get("headline")
        assert "headline" in yours or name == "merge", "lesson 08 has the one of publish.json"
    about = json.loads((reference.FOLDER / "tiny" / "reference.json").read_text("utf-8"))
    assert [title.replace(" ", "_") for title in about["seconds"]] == list(LESSONS)
    said = json.loads((reference.FOLDER / "tiny" / "answers.json").read_text("utf-8"))
    assert {kind: len(answers) for kind, answers in said.items()} == {
        "three questions": 3,
        "held out": 10,
    }


@pytest.mark.full
def test_a_lesson_holds_one_base_at_a_time(course_run: Path) -> None:
    """A card has room for one base of 8 B: the one before is gone, here and in other processes."""
    text = (course_run.parent / "live" / "loads.jsonl").read_text("utf-8")
    loads = [json.loads(line) for line in text.splitlines()]
    executed = {name: cells(course_run / "notebooks" / f"{name}.ipynb") for name in LESSONS}
    lessons = {"".join(c["source"]).strip(): name for name, own in executed.items() for c in own}
    assert [load for load in loads if load["here"] + load["elsewhere"]] == []
    loading = {lessons.get(load["cell"].strip(), "a process of its own")[:2] for load in loads}
    assert {"02", "03", "04", "05", "08", "09", "a "} <= loading, "each of these was counted"


def test_live_bases_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVE_BASES", str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    spec = importlib.util.spec_from_file_location("counting", LIVE_BASES / "sitecustomize.py")
    assert spec and spec.loader
    spec.loader.exec_module(counting := importlib.util.module_from_spec(spec))
    plain = vars(PreTrainedModel)["from_pretrained"]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", counting.counted(plain))
    one, two = (generation.load_base(tiny()) for _ in range(2))
    del one
    (tmp_path / str(os.getppid())).write_text("1")  # another process that lives
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / str(ended.pid)).write_text("1")
    assert generation.load_base(tiny()) is not two
    lines = [json.loads(line) for line in (tmp_path / "loads.jsonl").read_text().splitlines()]
    assert [(line["here"], line["elsewhere"]) for line in lines] == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.full
def test_training_teaches_answers_about_held_out_diseases(course_run: Path) -> None:
    outcome = metrics(course_run, "outcome.json")
    assert outcome["rouge_l_tuned"] - outcome["rouge_l_base"] >= 0.4
    assert outcome["rouge_l_gain_ci95"][0] > 0.3
    assert outcome["facts_complete_tuned"] >= 0.7 > outcome["facts_complete_nearest"]
    assert outcome["rows"] >= 80


@pytest.mark.full
def test_the_command_line_asks_the_model_of_the_course(course_run: Path) -> None:
    question = "What are the symptoms of asthma?"
    done = medquad("ask", question, "--profile", "tiny", out=course_run.parent)
    assert done.returncode == 0, done.stderr
    answer, notice = done.stdout.split("\n\n", 1)
    assert "asthma" in answer and "wheezing" in answer and answer.endswith(".")
    assert "Not medical advice" in notice and "tiny model" in notice


@pytest.mark.full
def test_nbval_finds_the_committed_outputs_of_a_lesson(course_run: Path) -> None:
    """Lesson 02 needs no training, so nbval can run it in seconds."""
    lesson = NOTEBOOKS / "02_quantize_to_4_bits.ipynb"
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=600", "-q"]
    env = {**os.environ, "MEDQUAD_OUT": str(course_run.parent)}
    command += ["-p", "no:cacheprovider", str(lesson)]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]


def exact(notebook: Path) -> list[tuple[str, str]]:
    """(source, printed text) of the cells tagged nbval-check-output."""
    return [
        ("".join(c["source"]), "".join("".join(o.get("text", ())) for o in c["outputs"]))
        for c in cells(notebook)
        if "nbval-check-output" in c["metadata"].get("tags", ())
    ]


@pytest.mark.full
@each_lesson
def test_exact_cells_print_what_is_committed(course_run: Path, name: str) -> None:
    committed = exact(NOTEBOOKS / f"{name}.ipynb")
    # Every cell of 05 and 08 depends on the model.
    assert len(committed) >= (0 if name[:2] in ("05", "08") else 2)
    assert exact(course_run / "notebooks" / f"{name}.ipynb") == committed


@pytest.mark.full
@each_lesson
def test_stubs_of_a_lesson_are_not_solved(course_run: Path, name: str) -> None:
    executed = (course_run / "notebooks" / f"{name}.ipynb").read_text("utf-8")
    assert executed.count("Not yet. ") >= 3


@each_lesson
def test_solutions_solve_every_exercise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solutions are plain Python: they run here, without a kernel each."""
    monkeypatch.chdir(NOTEBOOKS / "solutions")
    printed, names = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        for cell in cells(NOTEBOOKS / "solutions" / f"{name}.ipynb"):
            exec("".join(cell["source"]), names)
    said = printed.getvalue()
    assert said.count("✓") >= 3
    assert "Not yet" not in said


@pytest.mark.full
def test_the_first_lesson_runs_on_real_medquad(medquad_xml: Path, tmp_path: Path) -> None:
    real = ("-p", "source=xml", "-p", f"data_path={medquad_xml}")
    done = medquad("run", "--profile", "tiny", "--only", "01", *real, out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(tmp_path / "tiny", "explore.json")["rows_loaded"] == 16423
