"""The contract of a notebook (DESIGN.md), held to every committed lesson."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import itertools
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from answers import WRONG, with_own_hints

from medquad_utils import checks, course
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
def test_code_cells_parse_and_hold_nothing_outdated(path: Path) -> None:
    for cell in _code(_read(path)):
        source = _source(cell)
        compile(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE), path.name, "exec")
        for old in ("torch_dtype", "max_seq_length", "load_in_8bit", "trust_remote_code", "evaluation_strategy", "profile =="):
            assert old not in source, f"{old} in a cell of {path.name}"


@every
def test_no_committed_output_is_an_error_or_a_warning(path: Path) -> None:
    for cell in _code(_read(path)):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", _source(cell)[:80]
            assert output.get("name") != "stderr", _source(cell)[:80]


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
def test_checks_what_it_teaches(path: Path) -> None:
    assert sum(_source(c).count("assert ") for c in _code(_read(path))) >= 5


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


# ---- what makes a lesson teach: rules from a notebook to what is to be complained about ------------------------------

Rule = Callable[[Any, Path], list[str]]
FAILURE = r"(?im)^> .*\b(broken|caught|refused|nothing was learned)\b.*: \S"  # the lessons' words for a mistake that shows


def _printed(cell: Any) -> str:
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


def short_cells(notebook: Any, path: Path) -> list[str]:
    sources = [_source(cell).splitlines() for cell in _code(notebook)]
    return [f"{len(lines)} lines: {lines[0]}" for lines in sources if len(lines) > 15]


def described_images(notebook: Any, path: Path) -> list[str]:
    """Every picture of an output and of a markdown cell has an alt text of some words, and a file of its own is there."""
    found = []
    for output in (output for cell in _code(notebook) for output in cell["outputs"]):
        for kind in (kind for kind in output.get("data", {}) if kind.startswith("image/")):
            if kind != "image/png":
                found.append(f"{kind} in an output: only PNG is shown everywhere with its alt text")
            elif len(output["metadata"].get(kind, {}).get("alt", "").split()) < 6:
                found.append("an output image has no alt text of six words or more")
    text = "\n".join(_source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    if re.search(r"<img\b", text):
        found.append("<img>: write ![alt](target)")
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        ours = not target.startswith("http")
        if len(alt.split()) < (6 if ours else 1):
            found.append(f"{target} has no alt text")
        if ours and not (path.parent / target).is_file():
            found.append(f"{target} is not there")
    return found


def predictions(notebook: Any, path: Path) -> list[str]:
    """Two or more, each a number to change, a score and a reason; a run without a reader takes the number as it is."""
    cells = _tagged(notebook, "predict")
    found = [] if len(cells) >= 2 else [f"{len(cells)} predictions, and there should be two"]
    before = [_source(earlier) for earlier, cell in itertools.pairwise(notebook["cells"]) if any(cell is c for c in cells)]
    found += [f"no question right before a prediction: {text[:40]}" for text in before if "**Predict, then run" not in text]
    for cell in cells:
        source = _source(cell)
        if not re.search(r"(?im)^my_guess = [\d.]+  # \S.*: change me|^my_guess = [\d.]+  # \S.*\? change me", source):
            found.append('a prediction has no line "my_guess = 1.0  # unit: change me before you run"')
        if "checks.predict(my_guess, " not in source:
            found.append("a prediction is not scored by checks.predict(my_guess, ...)")
        said = re.search(r"You said .+?; it is .+", _printed(cell))
        if not said or len(_reason(source).split()) < 6 or said[0].count(". ") < 2:
            found.append("a prediction gives no reason for what it is")
    return found


def _reason(source: str) -> str:
    """The words of the fourth argument of ``checks.predict``, or of what was assigned to it."""
    tree = ast.parse(source)
    reasons: list[ast.AST] = [
        n.args[3] for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.args) > 3 and "predict" in ast.unparse(n.func)
    ]
    names = {node.id for node in reasons if isinstance(node, ast.Name)}
    reasons += [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in names]
    return " ".join(str(part.value) for reason in reasons for part in ast.walk(reason) if isinstance(part, ast.Constant))


def _checkers(notebook: Any) -> list[str]:
    return re.findall(r"checks\.attempt\(checks\.(\w+), ", "\n".join(_source(cell) for cell in _tagged(notebook, "exercise")))


def exercises(notebook: Any, path: Path) -> list[str]:
    """Three or more, numbered, each with a checker that is there; the text says which is easy and which is open."""
    expected = [f"ex_{path.stem[:2]}_{n}" for n in range(1, max(3, len(_tagged(notebook, "exercise"))) + 1)]
    names = _checkers(notebook)
    found = [] if names == expected else [f"exercises are checked by {names}, and should be by {expected}"]
    found += [f"checks.{name} is not there" for name in names if not hasattr(checks, name)]
    text = "\n".join(_source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown").partition("## Exercises")[2]
    return found + [f"the exercises do not say which is the {word}" for word in ("warm-up", "open end") if word not in text]


def stubs(notebook: Any, path: Path) -> list[str]:
    """What is committed under an exercise is what its checker says today to the stub: a hint, and no solution."""
    found = []
    for cell in _tagged(notebook, "exercise"):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(_source(cell), {"checks": checks})
        if not said.getvalue().startswith("Not yet. "):
            found.append(f"a stub is no stub: {said.getvalue()}")
        if said.getvalue() != _printed(cell):
            found.append(f"the checker says something else than what is committed: {said.getvalue()}")
    return found


def solutions(notebook: Any, path: Path) -> list[str]:
    """Every exercise is solved in the notebook of the same name, and the lesson links to it; test_notebooks.py runs it."""
    solved = "\n".join(_source(cell) for cell in _code(_read(path.parent / "solutions" / path.name)))
    found = [f"{name} has no solution" for name in _checkers(notebook) if f"print(checks.{name}(" not in solved]
    linked = f"](solutions/{path.name})" in _read_aloud(notebook)
    return found if linked else [*found, "no link to the solutions"]


def hints(notebook: Any, path: Path) -> list[str]:
    """Three wrong answers or more have hints of their own; test_checks.py sees that they get them."""
    own = {name: {hint for _, hint in with_own_hints(name)} for name in _checkers(notebook)}
    return [f"{name} has {len(told)} hints for wrong answers, and should have three" for name, told in own.items() if len(told) < 3]


def _read_aloud(notebook: Any) -> str:
    """What a reader sees besides code: markdown as it is, printed lines after a ``>``."""
    shown = (
        _source(c) if c["cell_type"] == "markdown" else re.sub("(?m)^", "> ", _printed(c))
        for c in notebook["cells"]
        if c["cell_type"] != "raw"
    )
    return "\n".join(shown)


def broken_and_mended(notebook: Any, path: Path) -> list[str]:
    """Under a heading "Break it", a printed line that shows the failure, and after it the mend."""
    text = _read_aloud(notebook)
    for heading in re.finditer(r"(?im)^(#+) .*\bbreak it\b.*$", text):
        part = re.split(rf"(?im)^#{{1,{len(heading[1])}}} (?!mend)", text[heading.end() :])[0]
        failure = re.search(FAILURE, part)
        if failure and re.search(r"(?i)\bmend", part[failure.end() :]):
            return []
    return ['no part "Break it" in which a mistake shows and is mended']


def numbered_sections(notebook: Any, path: Path) -> list[str]:
    """Sections count 1., 2., ..., so that a teacher can say where we are; the three that close every lesson do not."""
    text = "\n".join(_source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    titles = [t for t in re.findall(r"(?m)^## (.+)$", text) if t not in ("Exercises", "What you learned", "Further reading")]
    return [f"not section {n}: {title}" for n, title in enumerate(titles, start=1) if not title.startswith(f"{n}. ")]


OF_ALL: list[Rule] = [short_cells, described_images]
OF_LESSONS: list[Rule] = [predictions, exercises, stubs, solutions, hints, broken_and_mended, numbered_sections]


@every
@pytest.mark.parametrize("rule", OF_ALL)
def test_keeps_the_rules_of_all_notebooks(path: Path, rule: Rule) -> None:
    assert rule(_read(path), path) == []


@lesson
@pytest.mark.parametrize("rule", OF_LESSONS)
def test_keeps_the_rules_of_a_lesson(path: Path, rule: Rule) -> None:
    assert rule(_read(path), path) == []


# ---- every rule can fail: real lessons, damaged ----------------------------------------------------------------------


def _edit(cell: Any, old: str, new: str) -> None:
    assert re.search(old, _source(cell)), f"nothing to damage: {old}"
    cell["source"] = re.sub(old, new, _source(cell))


def _edit_all(old: str, new: str) -> Callable[[Any], None]:
    """Replace in every markdown cell."""

    def damage(notebook: Any) -> None:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown" and re.search(old, _source(cell))]
        assert cells, f"nothing to damage: {old}"
        for cell in cells:
            _edit(cell, old, new)

    return damage


def _edit_tagged(tag: str, old: str, new: str) -> Callable[[Any], None]:
    """Replace in the first cell with a tag."""
    return lambda notebook: _edit(_tagged(notebook, tag)[0], old, new)


def _lengthen(notebook: Any) -> None:
    cell = _code(notebook)[-1]
    cell["source"] = _source(cell) + "\n# one more" * (16 - len(_source(cell).splitlines()))


def _pictures(notebook: Any) -> list[Any]:
    return [o for cell in _code(notebook) for o in cell["outputs"] if "image/png" in o.get("data", {})]


def _forget_alt(notebook: Any) -> None:
    _pictures(notebook)[0]["metadata"] = {}


def _cut_alt(notebook: Any) -> None:
    _pictures(notebook)[-1]["metadata"]["image/png"]["alt"] = "A figure."


def _draw_svg(notebook: Any) -> None:
    _pictures(notebook)[0]["data"]["image/svg+xml"] = "<svg/>"


def _link(markdown: str) -> Callable[[Any], None]:
    return lambda notebook: notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": markdown})


def _keep_one(tag: str) -> Callable[[Any], None]:
    def damage(notebook: Any) -> None:
        for cell in _tagged(notebook, tag)[1:]:
            cell["metadata"]["tags"] = []

    return damage


def _say(tag: str, text: str) -> Callable[[Any], None]:
    """Put another output under the first cell with a tag."""

    def damage(notebook: Any) -> None:
        _tagged(notebook, tag)[0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]

    return damage


def _silence(notebook: Any) -> None:
    for cell in _code(notebook):
        cell["outputs"] = []


def _mend_nothing(notebook: Any) -> None:
    for cell in notebook["cells"]:
        cell["source"] = re.sub(r"(?i)mend", "m_nd", _source(cell))
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = re.sub(r"(?i)mend", "m_nd", "".join(output["text"]))


@pytest.mark.parametrize(
    ("rule", "damage", "complaint"),
    [
        (short_cells, _lengthen, "16 lines"),
        (described_images, _forget_alt, "no alt text"),
        (described_images, _cut_alt, "no alt text"),
        (described_images, _draw_svg, "only PNG"),
        (described_images, _link("![](https://example.org/a.png)"), "a.png has no alt text"),
        (described_images, _link("![a flow](figures/none.svg)"), "none.svg has no alt text"),
        (described_images, _link("![boxes in a row, one for each lesson](figures/none.svg)"), "none.svg is not there"),
        (described_images, _link('<img src="figures/none.svg">'), "<img>"),
        (predictions, _keep_one("predict"), "1 predictions"),
        (predictions, _edit_all(r"\*\*Predict, then run", "**Run"), "no question right before"),
        (predictions, _edit_tagged("predict", "(?i)change me", "as you like"), "change me"),
        (predictions, _edit_tagged("predict", "my_guess = .*?#", 'my_guess = input("GB?")  #'), "my_guess = "),
        (predictions, _edit_tagged("predict", r"checks\.predict\(my_guess", "checks.predict(2.5"), "not scored"),
        (predictions, _edit_tagged("predict", r'"[^"\n]{25,}"', '"So."'), "no reason"),
        (predictions, _say("predict", "You said 4 GB; it is 5 GB. Close."), "no reason"),
        (exercises, _keep_one("exercise"), "should be by"),
        (exercises, _edit_tagged("exercise", r"ex_0(\d)_1", r"ex_0\1_7"), "ex_0._7 is not there"),
        (exercises, _edit_tagged("exercise", r"checks\.attempt\(.*", ""), "should be by"),
        (exercises, _edit_all("warm-up", "first one"), "which is the warm-up"),
        (exercises, _edit_all("open end", "last one"), "which is the open end"),
        (stubs, _edit_tagged("exercise", r"checks\.attempt\(.*", 'print("✓")'), "no stub"),
        (stubs, _say("exercise", "Not yet. Think."), "something else"),
        (solutions, _edit_tagged("exercise", r"ex_0(\d)_1", r"ex_0\1_7"), "ex_0._7 has no solution"),
        (solutions, _edit_all(r"\(solutions/", "(elsewhere/"), "no link to the solutions"),
        (hints, _edit_tagged("exercise", r"ex_0(\d)_1", r"ex_0\1_7"), "ex_0._7 has 0 hints"),
        (broken_and_mended, _edit_all("(?i)break it", "Look at it"), "Break it"),
        (broken_and_mended, _silence, "Break it"),
        (broken_and_mended, _mend_nothing, "Break it"),
        (numbered_sections, _edit_all(r"(?m)^## 3\. ", "## "), "not section 3"),
    ],
)
def test_a_rule_sees_the_damage(rule: Rule, damage: Callable[[Any], None], complaint: str) -> None:
    for path in LESSONS:
        notebook = copy.deepcopy(_read(path))
        damage(notebook)
        assert re.search(complaint, "\n".join(rule(notebook, path))), path.name


def test_too_few_hints_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = LESSONS[0]
    few = [(answer, hint) for answer, hint in WRONG["ex_01_2"] if hint.startswith(("share of diseases", "Expected", "does not leak"))]
    monkeypatch.setitem(WRONG, "ex_01_2", few)
    assert hints(_read(path), path) == ["ex_01_2 has 2 hints for wrong answers, and should have three"]
