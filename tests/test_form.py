"""The contract of a notebook (DESIGN.md), held to every committed lesson."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest

from medquad_utils import course
from medquad_utils.profiles import versions

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*_*.ipynb"))
EVERY = [*LESSONS, *sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))]
PARAMETERS = {"profile", "source", "data_path", "model_path", "rows", "max_steps", "lora_r", "seed", "out"}
FURTHER = {"09_specialise": {"specialty", "mixing"}}  # parameters that one lesson alone has, after those of all


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _source(cell: Any) -> str:
    return "".join(cell["source"])


def _tagged(notebook: Any, tag: str) -> list[Any]:
    return [c for c in notebook["cells"] if tag in c["metadata"].get("tags", ())]


def _code(notebook: Any) -> list[Any]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
every = pytest.mark.parametrize("path", EVERY, ids=lambda p: f"{p.parent.name}/{p.stem}")


def test_the_nine_lessons_are_there_and_each_is_in_notebooks_toml() -> None:
    listed = tomllib.loads((Path(__file__).parent / "notebooks.toml").read_text())
    assert [p.stem for p in LESSONS] == sorted(listed)
    assert [p.stem[:2] for p in LESSONS] == [f"{number:02d}" for number in range(1, 10)]
    for name, entry in listed.items():
        assert {"tier", "timeout", "parameters", "expect"} <= set(entry), name


@every
def test_is_valid_small_and_free_of_machine_traces(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert len(text) < 1_000_000
    notebook = _read(path)
    assert "widgets" not in notebook["metadata"]
    assert "application/vnd.jupyter.widget-view+json" not in text
    found = re.findall(r"/(?:home|root|tmp|Users|work|opt)/[\w.-]+|[A-Z]:\\\\Users|hf_[A-Za-z0-9]{20,}", text)
    assert not found, f"paths or tokens of a machine: {found[:3]}"


@every
def test_code_cells_are_short_and_parse(path: Path) -> None:
    for cell in _code(_read(path)):
        source = _source(cell)
        assert len(source.splitlines()) <= 15, source.splitlines()[0]
        compile(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE), path.name, "exec")
        for old in ("torch_dtype", "max_seq_length", "load_in_8bit", "trust_remote_code", "evaluation_strategy", "profile =="):
            assert old not in source, f"{old} in a cell of {path.name}"


@every
def test_no_committed_output_is_an_error_or_a_warning(path: Path) -> None:
    for cell in _code(_read(path)):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", _source(cell)[:80]
            assert output.get("name") != "stderr", _source(cell)[:80]


@every
def test_every_image_has_alt_text(path: Path) -> None:
    notebook = _read(path)
    for cell in _code(notebook):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                alt = output["metadata"]["image/png"]["alt"]
                assert len(alt.split()) >= 6, alt
            assert "image/svg+xml" not in output.get("data", {})
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", _source(cell)):
                assert alt.strip(), f"image {target} lacks alt text"
                if not target.startswith("http"):
                    assert len(alt.split()) >= 6
                    assert (path.parent / target).is_file(), target


@lesson
def test_opens_by_the_contract(path: Path) -> None:
    notebook = _read(path)
    first = _source(notebook["cells"][0])
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert f"blob/main/notebooks/{path.name}" in first, "Colab badge"
    assert re.search(rf"^# {path.stem[:2]} · [A-Z]\w+ ", first, re.MULTILINE), "title with a verb"
    for part in ("**You will do**", "**You will learn**", "**You need**"):
        assert part in first
    assert re.search(r"\*\*You need\*\* .*\d+ (s|min)\b.*\d GB", first), "measured time and memory"
    code = _code(notebook)
    assert [c["metadata"].get("tags") for c in code[:2]] == [["install"], ["parameters"]]
    assert "-U" not in _source(code[0]) and "google.colab" in _source(code[0])
    assert set(course.parameters_of(path)) == PARAMETERS | FURTHER.get(path.stem, set())
    assert course.parameters_of(path)["profile"] == '"auto"'
    assert "profiles.resolve(" in _source(code[2])


@lesson
def test_installs_and_sets_its_parameters_like_every_other_lesson(path: Path) -> None:
    here, first = (_code(_read(p))[:3] for p in (path, LESSONS[0]))
    for number, (mine, others) in enumerate(zip(here, first, strict=True)):
        further = _source(mine).removeprefix(_source(others)).strip().splitlines()
        assert _source(mine).startswith(_source(others))
        assert {line.split(" = ")[0] for line in further} == (FURTHER.get(path.stem, set()) if number == 1 else set())


@lesson
def test_predicts_exercises_and_checks(path: Path) -> None:
    notebook = _read(path)
    predictions = _tagged(notebook, "predict")
    assert len(predictions) >= 2
    assert all("my_guess" in _source(c) and "checks.predict(" in _source(c) for c in predictions)
    exercises = "\n".join(_source(c) for c in _tagged(notebook, "exercise"))
    checkers = set(re.findall(rf"checks\.(ex_{path.stem[:2]}_\d)", exercises))
    assert len(checkers) >= 2
    solution = (NOTEBOOKS / "solutions" / path.name).read_text(encoding="utf-8")
    assert all(name in solution for name in checkers)
    asserts = sum(_source(c).count("assert ") for c in _code(notebook))
    assert asserts >= 5


@lesson
def test_ends_by_the_contract(path: Path) -> None:
    notebook = _read(path)
    markdown = [_source(c) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    assert "## What you learned" in "\n".join(markdown[-3:])
    assert "## Further reading" in "\n".join(markdown[-3:])
    code = "\n".join(_source(c) for c in _code(notebook))
    assert f'"{path.stem.split("_")[1]}.json"' in code
    assert '"headline"' in code


@lesson
def test_stamp_matches_the_source_and_names_the_tested_versions(path: Path) -> None:
    notebook = _read(path)
    stamp = notebook["metadata"][course.STAMP]
    assert stamp["source"] == course.source_hash(notebook["cells"]), "outputs are of another source: run python -m medquad_utils.course"
    assert stamp["profile"] == "tiny"
    assert {k: v.split("+")[0] for k, v in stamp["versions"].items() if k != "python"} == {
        k: v.split("+")[0] for k, v in versions().items() if k != "python"
    }
    assert [c["execution_count"] for c in _code(notebook)] == list(range(1, len(_code(notebook)) + 1)), "not one run from top to bottom"
    shown = sum(bool(c["outputs"]) for c in _code(notebook))
    assert shown > len(_code(notebook)) / 2, "committed without outputs"


@lesson
def test_every_code_cell_that_computes_has_words_before_it(path: Path) -> None:
    kinds = [c["cell_type"] for c in _read(path)["cells"]]
    longest = max(len(run) for run in "".join("c" if k == "code" else " " for k in kinds[4:]).split())
    assert longest <= 4, "more than four code cells in a row without a word"


@lesson
def test_has_exact_cells_for_nbval(path: Path) -> None:
    exact = _tagged(_read(path), "nbval-check-output")
    assert len(exact) >= 2
    assert all(c["outputs"] for c in exact)
