"""Colab as far as it can be played here: its packages, its secrets, its Drive, a session that dies.

No real Colab was reached. ``fake_colab`` stands in for its package ``google.colab``, and ``COLAB``
for what it has installed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import types
import venv
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import nbformat
import psutil
import pytest
from conftest import REPO
from packaging.requirements import Requirement

from medquad_utils import machine, profiles
from medquad_utils.machine import Hardware

LESSONS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))
T4 = Hardware("cuda", "Tesla T4", 15.8, (7, 5), gpus=1)

FREEZE = (REPO / "tests" / "fake_colab" / "pip-freeze.txt").read_text(encoding="utf-8")
COLAB = dict(line.split("==") for line in FREEZE.splitlines() if "==" in line)
# The command line runs notebooks and the demo, and neither runs on Colab.
NOT_ON_COLAB = {"jupyterlab", "papermill", "nbclient", "nbval", "gradio", "starlette", "gguf",
                "kaggle_secrets", "jupyter_client", "traitlets", "uvicorn"}  # fmt: skip


def code_cells(path: Path) -> list[Any]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def pip_lines() -> list[list[str]]:
    """The arguments of every %pip line of the install cell, which all lessons share."""
    install = "".join(code_cells(LESSONS[0])[0]["source"])
    return [shlex.split(line) for line in re.findall(r"^ *%pip (.+)$", install, re.MULTILINE)]


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


PINNED = {
    normal(Requirement(a).name): Requirement(a) for line in pip_lines() for a in line if "==" in a
}


def stub(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """A wheel of metadata alone: pip's resolver looks at nothing else."""
    file = name.replace("-", "_")
    info = f"{file}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{file}-{version}-py3-none-any.whl", "w") as wheel:
        lines = "".join(f"Requires-Dist: {r}\n" for r in requires)
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        extras = set(re.findall(r"""extra == ['"]([\w-]+)['"]""", lines))
        head += "".join(f"Provides-Extra: {extra}\n" for extra in sorted(extras))
        wheel.writestr(f"{info}/METADATA", head + lines)
        kind = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", kind)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Colab has before and after the install cell, played with stubs of the real metadata.

    The index offers all that is installed here, among it a newer torch and numpy.
    """
    folder = tmp_path_factory.mktemp("runtime")
    index, preinstalled = folder / "index", folder / "preinstalled"
    index.mkdir()
    preinstalled.mkdir()
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if normal(name) not in ("medquad-qlora", "pip"):
            stub(index, name, found.version, found.requires or [])
    for name, version in COLAB.items():
        stub(preinstalled, name, version, [])
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stub(index, "medquad-qlora", project["version"], project["dependencies"])
    venv.create(folder / "venv", with_pip=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    env["PIP_CONFIG_FILE"] = os.devnull

    def pip(*arguments: str) -> str:
        command = [str(folder / "venv" / "bin" / "python"), "-m", "pip", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0 or arguments[0] == "check", done.stderr[-2000:]
        return done.stdout

    def versions() -> dict[str, str]:
        return {normal(p["name"]): p["version"] for p in json.loads(pip("list", "--format=json"))}

    pip("install", "--no-index", "--no-deps", *map(str, preinstalled.iterdir()))
    before = versions()
    for line in pip_lines():
        arguments = ["medquad-qlora" if "git+https" in a else a for a in line]
        pip(*arguments, "--no-index", "--find-links", str(index))
    return {"before": before, "after": versions(), "check": pip("check").splitlines()}


@pytest.mark.full
def test_the_install_cell_changes_only_what_it_pins(runtime: dict[str, Any]) -> None:
    names = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "ipykernel")
    assert {n: runtime["after"][n] for n in names} == {n: COLAB[n] for n in names}
    assert importlib.metadata.version("torch").split("+")[0] != "2.11.0", "nothing to replace it"
    before, after = runtime["before"], runtime["after"]
    # What transformers, datasets and openai ask for.
    below = {"huggingface-hub", "hf-xet", "tokenizers", "safetensors", "pyarrow", "click",
             "typing-extensions"}  # fmt: skip
    assert {name for name in before if after.get(name) != before[name]} <= PINNED.keys() | below
    assert all(pinned.specifier.contains(after[name]) for name, pinned in PINNED.items())
    assert "medquad-qlora" in after
    ours = PINNED.keys() | {"medquad-qlora"}
    assert runtime["check"], "pip check says nothing at all"
    assert [line for line in runtime["check"] if normal(line.split()[0]) in ours] == []


def imports(source: str) -> set[str]:
    """Top-level names of the modules that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"medquad_utils"}


def test_every_import_is_on_colab_or_in_the_install_cell() -> None:
    have = {normal(name) for name in COLAB} | PINNED.keys() | {"openai"}  # in transformers[serving]
    by_module = importlib.metadata.packages_distributions()

    def lacking(sources: list[str]) -> set[str]:
        modules = set().union(*map(imports, sources))
        return {m for m in modules if not {normal(d) for d in by_module.get(m, [m])} & have}

    lessons = ["".join(c["source"]) for path in LESSONS for c in code_cells(path)]
    package = [p.read_text(encoding="utf-8") for p in (REPO / "medquad_utils").rglob("*.py")]
    assert "torch" in imports("\n".join(package)), "the search finds something"
    assert lacking(lessons) == set()
    assert lacking(package) <= NOT_ON_COLAB


class Colab:
    """A simulated Colab: ``content`` is its disk, and ``drive`` outlives it once it is mounted."""

    def __init__(self, folder: Path, secret: str = "denied") -> None:
        self.folder, self.secret = folder, secret
        self.content, self.log = folder / "content", folder / "log.txt"
        self.drive = self.content / "drive" / "MyDrive"
        self.content.mkdir(parents=True)
        settings = folder / "ipython" / "profile_default" / "ipython_kernel_config.py"
        settings.parent.mkdir(parents=True)
        kernel = '"google.colab._kernel.Kernel"'
        settings.write_text(f"get_config().IPKernelApp.kernel_class = {kernel}\n")

    def start(self, cells: list[str]) -> subprocess.Popen[str]:
        """Run the cells as one notebook, in a process of its own."""
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(c) for c in cells]
        nbformat.write(notebook, self.folder / "in.ipynb")
        hidden = ("MEDQUAD_OUT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        env = {k: v for k, v in os.environ.items() if k not in hidden} | {
            "IPYTHONDIR": str(self.folder / "ipython"),
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / "hub"),
            "PYTHONPATH": f"{REPO / 'tests' / 'fake_colab'}{os.pathsep}{REPO}",
            "FAKE_COLAB_LOG": str(self.log),
            "FAKE_COLAB_SECRET": self.secret,
            "FAKE_COLAB_CONTENT": str(self.content),
        }
        files = [str(self.folder / name) for name in ("in.ipynb", "out.ipynb")]
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", *files]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.content, env=env, **pipes)

    def run(self, cells: list[str]) -> str:
        """Run the cells to their end; returns what they printed."""
        process = self.start(cells)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
        ran = nbformat.read(self.folder / "out.ipynb", as_version=4).cells
        outputs = [o for c in ran for o in c.outputs]
        return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)

    def asked(self, kind: str) -> list[str]:
        """What was asked of the runtime: its lines "pip ..." or "secret ..."."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(kind)]


def lesson(number: int, **parameters: Any) -> list[str]:
    """The code cells of a lesson, its parameters overridden."""
    first, second, *rest = ["".join(c["source"]) for c in code_cells(LESSONS[number])]
    return [first, second, "\n".join(f"{k} = {v!r}" for k, v in parameters.items()), *rest]


LOOK = f"""
from medquad_utils import machine
from medquad_utils.machine import Hardware
token = machine.hub_token()
print("token:", token)
machine.hub_reachable = lambda: True
print(profiles.choose({T4!r}))
import huggingface_hub
print("headers:", "authorization" in huggingface_hub.utils.build_hf_headers())
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("secret", "profile", "words"),
    [
        ("missing", "small", "no secret HF_TOKEN: key icon > Add new secret, with Notebook"),
        ("denied", "small", "no secret HF_TOKEN: key icon > Add new secret, with Notebook"),
        ("timeout", "small", "no secret HF_TOKEN: key icon > Add new secret, with Notebook"),
        ("hf_example", "llama-8b", "a GPU with 16 GB"),
    ],
)
def test_colabs_secret_decides_the_profile(
    secret: str, profile: str, words: str, tmp_path: Path
) -> None:
    colab = Colab(tmp_path, secret)
    said = colab.run([*lesson(1, profile="tiny")[:4], LOOK]).replace("\\'", "'")
    token = secret if secret == "hf_example" else None
    assert f"token: {token}" in said
    assert f"('{profile}'" in said
    assert words in said
    assert f"headers: {token is not None}" in said, "a download would raise, or lack the token"
    assert "lost with the session: mount Drive" in said
    assert [shlex.split(line)[1:] for line in colab.asked("pip")] == pip_lines()


def test_notebooks_of_somebody_else_are_no_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    for name in ("notebooks/01_mine.ipynb", "below/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "below")
    assert machine.default_out() == str(tmp_path / "below" / "runs")
    (tmp_path / "medquad_utils").mkdir()
    assert machine.default_out() == str(tmp_path / "runs")


def test_a_token_that_cannot_be_read_is_an_error_but_on_colab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", Mock(side_effect=PermissionError("token")))
    with pytest.raises(PermissionError):
        machine.hub_token()


def test_results_go_to_drive_on_colab_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    drive = tmp_path / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    monkeypatch.setattr(machine, "DRIVE", drive)
    assert machine.default_out() == str(tmp_path / "runs"), "a folder of that name proves nothing"
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    plan = profiles.resolve("tiny", hardware=T4)
    assert plan.folder == drive / "medquad-runs" / "tiny"
    assert dict(plan.table())["results"].startswith("on Drive, in medquad-runs/tiny")
    assert profiles.resolve("tiny", hardware=T4, out="mine").folder == Path("mine", "tiny")
    drive.rmdir()
    lost = dict(profiles.resolve("tiny", hardware=T4).table())["results"]
    assert "lost with the session: mount Drive" in lost


def test_kaggles_secret_and_folder_are_used_as_colabs_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MEDQUAD_OUT", "HF_TOKEN"):
        monkeypatch.setenv(name, "")  # so that the test's end takes away what is set below
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert not machine.hub_token() and machine.token_gap() == "", "not on Kaggle"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(machine, "KAGGLE", tmp_path / "working")
    assert machine.hub_token() is None, "no secret is attached"
    assert "Add-ons > Secrets, attach it" in machine.token_gap()
    plan = profiles.resolve("tiny", hardware=T4)
    assert plan.folder == tmp_path / "working" / "medquad-runs" / "tiny"
    assert "'Save Version' keeps it" in dict(plan.table())["results"]
    secrets = types.ModuleType("kaggle_secrets")
    client = type("UserSecretsClient", (), {"get_secret": lambda self, name: f"value of {name}"})
    secrets.UserSecretsClient = client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    assert machine.hub_token() == os.environ["HF_TOKEN"] == "value of HF_TOKEN"


@pytest.mark.full
def test_a_killed_session_goes_on_from_drive(tmp_path: Path) -> None:
    """Lesson 04 dies in the middle of training; a new runtime has nothing but the Drive."""
    cells = lesson(4, profile="tiny", rows=40, max_steps=10)
    first, second = Colab(tmp_path / "first"), Colab(tmp_path / "second")
    first.drive.mkdir(parents=True)
    process = first.start(cells)
    run = first.drive / "medquad-runs" / "tiny"
    while not (whole := list(run.glob("checkpoints/checkpoint-*/trainer_state.json"))):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    assert [p.name for p in first.content.iterdir()] == ["drive"], "the runtime's disk is lost"
    # A mark in the checkpoint: only a run that goes on from it can report it at the end.
    for state in map(json.loads, (path.read_text() for path in whole)):
        state["log_history"].insert(0, {"loss": 12.5, "step": 0, "epoch": 0.0})
        assert 0 < state["global_step"] < 10
        file = run / "checkpoints" / f"checkpoint-{state['global_step']}" / "trainer_state.json"
        file.write_text(json.dumps(state))
    second.drive.parent.mkdir()
    first.drive.rename(second.drive)
    assert "on Drive, in medquad-runs/tiny" in second.run(cells)
    run = second.drive / "medquad-runs" / "tiny"
    train = json.loads((run / "metrics" / "train.json").read_text())
    assert train["train_curve"][0] == [0, 12.5]
    assert train["steps"] == 10
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / "checkpoints").exists(), "a finished run leaves no checkpoints on Drive"
