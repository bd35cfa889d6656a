"""What keeps the course alive: the workflows, the issue that a broken lesson opens, commit hooks, and the teacher's plan."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from medquad_utils import course
from medquad_utils.profiles import CourseError, versions

REPO = Path(__file__).parent.parent
GITHUB = REPO / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
LESSONS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))


def load_upkeep() -> Any:
    spec = importlib.util.spec_from_file_location("upkeep", GITHUB / "upkeep.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


upkeep = load_upkeep()


# ---- workflows ------------------------------------------------------------------------------------------------------


def workflow(path: Path) -> dict[Any, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def runs(steps: list[dict[str, Any]]) -> str:
    return "\n".join(step.get("run", "") for step in steps)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_may_read_and_no_more_and_names_actions_by_commit(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    for name, job in found["jobs"].items():
        assert job["timeout-minutes"] <= 360, name
        assert set(job.get("permissions", {})) <= {"contents", "issues"}
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step.get("uses", f"actions/x@{'0' * 40}")), step
            if "|" in step.get("run", "").replace("||", "") and "tee" in step["run"]:
                assert step["shell"] == "bash", "only this shell fails when the first of two piped commands does"


def test_upkeep_runs_every_week_and_by_hand() -> None:
    on = workflow(GITHUB / "workflows" / "upkeep.yml")[True]  # YAML 1.1 reads the key `on` as true
    (line,) = on["schedule"]
    minute, hour, day, month, weekday = line["cron"].split()
    assert minute.isdigit() and hour.isdigit() and (day, month) == ("*", "*") and weekday.isdigit()
    assert "workflow_dispatch" in on


def test_upkeep_runs_the_course_and_the_signatures_then_tells_and_keeps_the_real_metrics() -> None:
    jobs = workflow(GITHUB / "workflows" / "upkeep.yml")["jobs"]
    newest, small = jobs["newest"]["steps"], jobs["small"]["steps"]
    assert "medquad run --profile tiny" in runs(newest)
    assert "tests/test_signatures.py" in runs(newest) and (REPO / "tests" / "test_signatures.py").is_file()
    (telling,) = [step for step in newest if "gh issue create" in step.get("run", "")]
    assert telling["if"] == "failure()" and jobs["newest"]["permissions"]["issues"] == "write"
    assert "medquad run --profile small -p source=hub" in runs(small)
    (kept,) = [step for step in small if "upload-artifact" in step.get("uses", "")]
    assert kept["with"]["path"] == "runs/small/metrics/*.json"


def test_every_command_of_a_workflow_is_one_that_is_there() -> None:
    from medquad_utils import cli

    for path in WORKFLOWS:
        for job in workflow(path)["jobs"].values():
            for line in re.findall(r"\.venv/bin/medquad (.+?)(?: 2>&1.*)?$", runs(job["steps"]), re.MULTILINE):
                options = cli.parser().parse_args(line.split())
                known = set().union(*(course.parameters_of(lesson) for lesson in LESSONS))
                assert {pair.split("=")[0] for pair in options.p} <= known


def test_the_names_to_upgrade_are_those_of_the_project() -> None:
    done = subprocess.run([sys.executable, str(GITHUB / "upkeep.py"), "names"], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert {"torch", "transformers", "scikit-learn", "pytest-xdist"} <= set(found)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in found)


# ---- the issue ------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of a course whose lesson 03 stopped at its second cell, as papermill leaves them."""
    lessons = tmp_path / "notebooks"
    lessons.mkdir()
    for name, sources in {
        "01_stay_whole": ["1 + 1"],
        "03_fall_over": ["rows = 3", 'raise KeyError("`new` name")', "print('never')"],
    }.items():
        made = nbformat.v4.new_notebook()
        parameters = nbformat.v4.new_code_cell('profile = "auto"\nout = ""')
        parameters.metadata["tags"] = ["parameters"]
        made.cells = [nbformat.v4.new_markdown_cell("# Toy"), parameters, *(nbformat.v4.new_code_cell(s) for s in sources)]
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, lessons / f"{name}.ipynb")
    monkeypatch.setattr(course, "notebooks_folder", lambda: lessons)
    with pytest.raises(CourseError, match="03 fall over"):
        course.run("tiny", [], {}, str(tmp_path / "runs"), lambda _: None)
    return tmp_path / "runs"


def test_the_issue_names_lesson_cell_and_error(broken: Path, tmp_path: Path) -> None:
    assert upkeep.main(["report", str(broken), str(tmp_path / "none.log"), str(tmp_path / "told")]) == 0
    title = (tmp_path / "told" / "title.txt").read_text().strip()
    body = (tmp_path / "told" / "body.md").read_text()
    assert title == "Upkeep: lesson 03 fall over fails with KeyError"
    assert 'raise KeyError("`new` name")' in body and "Code cell 4 of `notebooks/03_fall_over.ipynb`" in body
    assert "Traceback" in body and "\x1b" not in body
    assert re.search(r"^- transformers \d", body, re.MULTILINE)


def test_a_failure_without_a_cell_shows_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "upkeep.log"
    log.write_text("x" * 20_000 + "\nERROR: ```no matching``` distribution\n")
    title, body = upkeep.report(tmp_path / "runs", log)
    assert title == "Upkeep: the course fails with the newest releases"
    assert "````" in body and "no matching" in body and len(body) < 10_000
    assert "(no log)" in upkeep.report(tmp_path / "runs", tmp_path / "none")[1]


def test_a_wrong_call_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert upkeep.main(["tell"]) == 2
    assert "report RUNS LOG OUT" in capsys.readouterr().err


# ---- commit hooks ---------------------------------------------------------------------------------------------------


def hooks() -> dict[str, dict[str, Any]]:
    (local,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    return {hook["id"]: hook for hook in local["hooks"]}


def test_the_hooks_use_the_versions_that_were_tested() -> None:
    pins = (REPO / "environment.yml").read_text(encoding="utf-8")
    for name, hook in hooks().items():
        (pin,) = hook["additional_dependencies"]
        assert f"- {pin} " in pins, f"{name}: {pin} is not the version of environment.yml"
    assert set(hooks()) == {"ruff", "ruff-format", "nbstripout", "codespell"}


def stripped(path: Path) -> dict[str, Any]:
    import shlex

    command = [sys.executable, "-m", *shlex.split(hooks()["nbstripout"]["entry"]), str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_the_hook_leaves_a_stamped_lesson_as_it_is(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path)
    assert stripped(tmp_path / path.name) == json.loads(path.read_text(encoding="utf-8"))


def test_the_hook_takes_away_what_editors_leave(tmp_path: Path) -> None:
    notebook = json.loads(LESSONS[0].read_text(encoding="utf-8"))
    before = nbformat.reads(json.dumps(notebook), as_version=4)
    notebook["metadata"]["widgets"] = {"state": {}}
    notebook["metadata"]["colab"] = {"provenance": []}
    notebook["cells"][3]["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01"}
    notebook["cells"][4]["metadata"]["colab"] = {"base_uri": "https://localhost:8080/"}
    path = tmp_path / "edited.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert nbformat.reads(json.dumps(stripped(path)), as_version=4) == before


def test_codespell_finds_nothing_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True)
    files = [name for name in listed.stdout.split("\n") if (REPO / name).is_file()]
    assert len(files) > 50, "this is a git checkout"
    command = [sys.executable, "-m", "codespell_lib", "--toml", "pyproject.toml", *files]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_codespell_would_find_a_slip(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("You will " + "rec" + "ieve an answer.\n")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(REPO / "pyproject.toml"), str(page)]
    assert subprocess.run(command, capture_output=True, text=True).returncode != 0


# ---- the teacher's plan ---------------------------------------------------------------------------------------------


def sections(number: str) -> set[str]:
    """Headings of a lesson without their numbers."""
    (path,) = [p for p in LESSONS if p.name.startswith(number)]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line for c in cells if c["cell_type"] == "markdown" for line in "".join(c["source"]).splitlines()]
    return {re.sub(r"^#+ (\d+\. )?", "", line).strip() for line in lines if line.startswith("##")}


def plan() -> list[tuple[int, str, list[str]]]:
    page = (REPO / "notebooks" / "TEACHING.md").read_text(encoding="utf-8")
    table = page.split("## Ninety minutes")[1].split("## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (.+) \|$", table, re.MULTILINE)
    return [(int(minutes), lesson, re.findall(r'"([^"]+)"', said)) for minutes, lesson, said in rows]


def test_the_ninety_minute_plan_adds_up_and_names_sections_that_are_there() -> None:
    assert 80 <= sum(minutes for minutes, _, _ in plan()) <= 90
    for _, lesson, named in plan():
        if lesson != "README":
            assert named and set(named) <= sections(lesson), set(named) - sections(lesson)


def test_the_plan_gives_a_lesson_more_minutes_than_it_runs() -> None:
    timings = json.loads((REPO / "notebooks" / "timings.json").read_text())
    for minutes, lesson, _ in plan():
        if lesson in timings and minutes > 5:
            assert 60 * minutes > 2 * timings[lesson]["seconds"], lesson


def test_answers_to_learners_name_sections_that_are_there() -> None:
    page = (REPO / "notebooks" / "TEACHING.md").read_text(encoding="utf-8").split("## What learners ask")[1]
    named = re.findall(r'[Ll]esson (\d\d),\s+"([^"]+)"', page)
    assert len(named) >= 5
    for lesson, section in named:
        assert section in sections(lesson), section


def test_the_timings_of_both_pages_are_the_record() -> None:
    timings = json.loads((REPO / "notebooks" / "timings.json").read_text())
    for page in (REPO / "README.md", REPO / "notebooks" / "TEACHING.md"):
        text = page.read_text(encoding="utf-8")
        assert text.split("<!-- timings -->")[1].split("<!-- /timings -->")[0].strip() == course.timings_table(timings)


def test_readme_says_when_and_with_what_the_course_was_last_verified() -> None:
    said = (REPO / "README.md").read_text(encoding="utf-8").split("<!-- verified -->")[1].split("<!-- /verified -->")[0].strip()
    assert re.sub(r"\d{4}-\d\d-\d\d", "DAY", said) == re.sub(r"\d{4}-\d\d-\d\d", "DAY", course.verified(stamped()))
    assert {k: v.partition("+")[0] for k, v in stamped().items() if k != "python"} == {
        k: v.partition("+")[0] for k, v in versions().items() if k != "python"
    }


def stamped() -> dict[str, str]:
    """The versions in the stamps of the lessons, which one run made."""
    found = [json.loads(path.read_text(encoding="utf-8"))["metadata"][course.STAMP]["versions"] for path in LESSONS]
    assert all(each == found[0] for each in found), "the lessons were stamped with different versions"
    return dict(found[0])


# ---- contributing ---------------------------------------------------------------------------------------------------


def test_contributing_fits_on_a_page_and_names_files_that_are_there() -> None:
    page = (GITHUB / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(page.split()) < 600
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert target.startswith("https://") or (GITHUB / target).exists(), target
    for name in re.findall(r"`(tests/test_\w+\.py)", page):
        assert name == "tests/test_x.py" or (REPO / name).is_file(), name
