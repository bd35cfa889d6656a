"""The repository around the package: versions, commands, links, and what is shipped."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

REPO = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())
URL: str = PROJECT["project"]["urls"]["Repository"]
OWNER_AND_NAME = URL.removeprefix("https://github.com/")
NOTEBOOKS = [*sorted((REPO / "notebooks").glob("*.ipynb")), *sorted((REPO / "notebooks" / "solutions").glob("*.ipynb"))]


def required() -> dict[str, Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    return {r.name: r for r in map(Requirement, lines)}


def pinned() -> dict[str, str]:
    """Name -> version of the pip part of environment.yml."""
    parts = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    (pip,) = [part["pip"] for part in parts if isinstance(part, dict)]
    return dict(line.split("==") for line in pip if "==" in line)


# ---- versions -------------------------------------------------------------------------------------------------------


def test_every_dependency_is_pinned_and_nothing_else_is() -> None:
    assert sorted(pinned()) == sorted(required())


@pytest.mark.parametrize("name", sorted(required()))
def test_the_tested_version_is_inside_the_range_and_is_the_one_installed(name: str) -> None:
    version = pinned()[name]
    assert required()[name].specifier.contains(version), f"{name} {version} is not in {required()[name]}"
    installed = Version(importlib.metadata.version(name))
    assert installed.public == version, f"installed is {name} {installed}: the tests stand on another version than environment.yml says"


def test_every_range_has_a_lower_and_an_upper_end() -> None:
    for name, requirement in required().items():
        operators = {s.operator for s in requirement.specifier}
        assert {">=", "<"} <= operators, name


def test_environment_yml_gives_a_reason_on_every_line_and_installs_the_package() -> None:
    lines = (REPO / "environment.yml").read_text().splitlines()
    entries = [line for line in lines[lines.index("dependencies:") + 1 :] if line.strip().startswith("- ") and line.strip() != "- pip:"]
    assert len(entries) == len(pinned()) + 3  # python, pip, and the package itself
    for line in entries:
        assert re.search(r"  # \w+", line), f"no reason: {line}"
    assert any(line.strip().startswith("- -e .") for line in entries)


def test_python_of_environment_yml_is_one_that_the_project_accepts() -> None:
    (python,) = [p for p in yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"] if str(p).startswith("python=")]
    supported = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert supported.contains(python.removeprefix("python="))
    assert all(supported.contains(v) for v in ("3.11", "3.12", "3.13")), "Debian's and Colab's"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_the_lessons_install_on_colab_what_was_tested() -> None:
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        install = "".join("".join(c["source"]) for c in cells if "install" in c["metadata"].get("tags", ()))
        named = dict(re.findall(r'"([\w-]+)==([\d.]+)"', install))
        assert named, path.name
        assert {n: pinned()[n] for n in named} == named, path.name
        assert URL in install, path.name


def test_the_package_knows_the_version_of_the_project() -> None:
    import medquad_utils

    assert medquad_utils.__version__ == PROJECT["project"]["version"]


# ---- commands -------------------------------------------------------------------------------------------------------


def commands(target: str) -> list[str]:
    """What ``make TARGET`` would run."""
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_make_course_test_and_lab_run_what_the_readme_says() -> None:
    assert any(line.endswith("medquad run --profile tiny") for line in commands("course"))
    assert any("jupyter lab" in line and "notebooks" in line for line in commands("lab"))
    tests = [line for line in commands("test") if "pytest" in line and "pip install" not in line]
    assert len(tests) == 1


def test_make_test_leaves_no_test_out() -> None:
    (line,) = [line for line in commands("test") if re.search(r"-m pytest\b", line)]
    options = line.split("pytest", 1)[1].split()
    options += PROJECT["tool"]["pytest"]["ini_options"]["addopts"].split()
    short = re.compile(r"-[km]$|--(ignore|ignore-glob|deselect|collect-only|lf|last-failed|maxfail|exitfirst)\b|-x$")
    assert [o for o in options if short.match(o)] == []
    assert [o for o in options if not o.startswith("-")] in ([], ["tests"]), "a part of the tests is named"
    assert PROJECT["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


def test_every_file_with_tests_is_collected() -> None:
    """pytest looks into ``test_*.py`` alone: a test elsewhere would never run."""
    for path in (REPO / "tests").rglob("*.py"):
        functions = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        if any(name.startswith("test") for name in functions):
            assert re.fullmatch(r"test_\w+\.py", path.name), path.name
    settings = PROJECT["tool"]["pytest"]["ini_options"]
    assert not {"python_files", "norecursedirs", "collect_imported_tests"} & set(settings)
    configuration = (REPO / "tests" / "conftest.py").read_text()
    assert "collect_ignore" not in configuration
    assert "pytest_ignore_collect" not in configuration


def test_the_order_of_the_tests_leaves_none_out() -> None:
    names = ("test_a.py", "test_browser.py", "test_a.py", "test_notebooks.py", "test_z.py")
    items: Any = [SimpleNamespace(path=REPO / "tests" / name) for name in names]
    before = list(items)
    conftest.pytest_collection_modifyitems(items)
    assert [item.path.name for item in items] == [names[place] for place in (3, 1, 0, 2, 4)]
    assert sorted(map(id, items)) == sorted(map(id, before))


def test_no_two_tests_of_a_file_have_one_name() -> None:
    """The second of two functions with one name replaces the first, which then never runs."""
    for path in (REPO / "tests").glob("test_*.py"):
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert len(names) == len(set(names)), path.name


def test_continuous_integration_calls_the_readmes_test_command() -> None:
    script = REPO / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert "make test" in lines
    assert "set -euo pipefail" in lines, "a failing test must fail the script"
    assert "make test" in (REPO / "README.md").read_text()


# ---- what a reader sees ---------------------------------------------------------------------------------------------

PAGES = ["README.md", "Colab.md", "notebooks/GLOSSARY.md", "notebooks/ERRORS.md", *(str(p.relative_to(REPO)) for p in NOTEBOOKS)]


def text_of(page: str) -> str:
    """A page's text; of a notebook, the sources of its cells."""
    raw = (REPO / page).read_text(encoding="utf-8")
    return raw if page.endswith(".md") else "\n".join("".join(c["source"]) for c in json.loads(raw)["cells"])


@pytest.mark.parametrize("page", PAGES)
def test_links_to_the_repository_start_with_its_one_url(page: str) -> None:
    """Badges and links that name another owner or branch open nothing, and nobody notices but the reader."""
    text = text_of(page)
    name = OWNER_AND_NAME.split("/")[1]
    for address in re.findall(r"https?://[^\s)\"'>\]}]+", text):
        if name in address or "/blob/main/" in address or "colab.research.google.com/github" in address:
            colab = f"https://colab.research.google.com/github/{OWNER_AND_NAME}/blob/main/"
            raw = f"https://raw.githubusercontent.com/{OWNER_AND_NAME}/main/"
            assert address.removesuffix(".git") == URL or address.startswith((f"{URL}/", f"{URL}.", colab, raw)), address
            if found := re.search(r"/(?:blob|raw|tree)/main/([^#?]+)|(?<=/main/)([^#?]+)", address):
                assert (REPO / (found[1] or found[2])).exists(), f"{address} leads nowhere"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_pictures_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"[a-z]+:|#", target):
            assert ((REPO / page).parent / target.split("#")[0]).exists(), target


def test_readme_and_colab_link_every_lesson() -> None:
    for page in ("README.md", "Colab.md"):
        text = text_of(page)
        for path in sorted((REPO / "notebooks").glob("0*_*.ipynb")):
            assert f"notebooks/{path.name}" in text, f"{page} does not link {path.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_committed_notebook_holds_no_path_token_or_name_of_a_machine(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    made = json.dumps([[c.get("outputs"), c["metadata"]] for c in notebook["cells"]] + [notebook["metadata"]])
    assert re.findall(r"(?<![\w.:/<])/(?:home|root|tmp|Users|work|opt|content|mnt|var|usr|private)/[\w.-]+", made) == []
    assert re.findall(r"[A-Z]:\\\\\\\\?Users", made) == []
    everything = path.read_text(encoding="utf-8")
    assert re.findall(r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9]{16,}", everything) == []
    if (machine := platform.node()) and machine != "localhost":
        words = re.sub(r'"image/png": "[^"]*"', "", made)  # the letters of a picture's bytes spell any short name
        assert not re.search(rf"\b{re.escape(machine)}\b", words)


# ---- what is shipped ------------------------------------------------------------------------------------------------


def files_of_the_package() -> set[str]:
    paths = (REPO / "medquad_utils").rglob("*")
    return {p.relative_to(REPO).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Name -> size of the files in the wheel that pip would install, built by the project's own backend from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in [*files_of_the_package(), "pyproject.toml", "README.md", "LICENSE"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPO / name).read_bytes())
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = (folder / "dist").glob("*.whl")
    assert archive.name.endswith("-py3-none-any.whl"), "no step may need a compiler"
    with zipfile.ZipFile(archive) as content:
        return {i.filename: i.file_size for i in content.infolist()}


def test_the_wheel_holds_types_sample_and_model(wheel: dict[str, int]) -> None:
    assert "medquad_utils/py.typed" in wheel
    assert wheel["medquad_utils/assets/conditions.toml"] > 10_000
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"):
        assert wheel[f"medquad_utils/assets/tiny/{name}"] > 0
    assert wheel["medquad_utils/assets/tiny/model.safetensors"] <= 10_000_000


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: dict[str, int]) -> None:
    assert {name for name in wheel if ".dist-info/" not in name} == files_of_the_package()


def test_the_licences_are_there() -> None:
    text = (REPO / "LICENSE").read_text()
    assert "Apache License" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    readme = (REPO / "README.md").read_text()
    for name in ("Apache", "CC BY 4.0", "MedQuAD"):
        assert name in readme
