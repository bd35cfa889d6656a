"""Colab as far as it can be had without Colab: its packages by name and version, its secrets, its Drive, a session that dies.

No real Colab was reached. ``fake_colab`` stands in for its package ``google.colab``, and ``COLAB`` below for what it installs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from conftest import benchmark
from packaging.requirements import Requirement

from medquad_utils import profiles
from medquad_utils.profiles import Hardware

REPO = Path(__file__).parent.parent
LESSONS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))
T4 = Hardware("cuda", "Tesla T4", 15.8, (7, 5), gpus=1)

# What a GPU runtime of Colab has installed, as its public list googlecolab/backend-info, pip-freeze.gpu.txt, had it in June 2026 (Python
# 3.12): an assumption, for what a runtime really holds can be seen there only. Named is what the lessons import and what the
# install cell needs; torch and numpy are other versions than environment.yml's, which is the point.
COLAB = {
    "torch": "2.11.0+cu128", "numpy": "2.0.2", "pandas": "2.2.2", "pyarrow": "18.1.0", "scipy": "1.16.3", "scikit-learn": "1.6.1",
    "matplotlib": "3.10.0", "psutil": "5.9.5", "ipython": "7.34.0", "ipykernel": "6.17.1", "ipywidgets": "7.7.1", "nbconvert": "7.17.1",
    "accelerate": "1.13.0", "datasets": "4.0.0", "dill": "0.3.8", "multiprocess": "0.70.16", "fsspec": "2025.3.0", "xxhash": "3.7.0",
    "huggingface_hub": "1.17.0", "hf-xet": "1.5.0", "transformers": "5.9.0", "tokenizers": "0.22.2", "safetensors": "0.7.0",
    "peft": "0.19.1", "httpx": "0.28.1", "httpcore": "1.0.9", "h11": "0.16.0", "anyio": "4.13.0", "certifi": "2026.5.20", "idna": "3.18",
    "regex": "2025.11.3", "tqdm": "4.67.3", "PyYAML": "6.0.3", "packaging": "26.2", "filelock": "3.29.0", "requests": "2.32.4",
    "typer": "0.25.1", "click": "8.4.1", "jinja2": "3.1.6", "typing_extensions": "4.15.0", "joblib": "1.5.3", "nltk": "3.9.1",
    "absl-py": "1.4.0", "six": "1.17.0", "lxml": "6.1.1", "tabulate": "0.9.0", "numba": "0.60.0", "python-dateutil": "2.9.0.post0",
    "pytz": "2025.2", "tzdata": "2026.2", "rich": "13.9.4", "shellingham": "1.5.4", "setuptools": "75.2.0", "networkx": "3.6.1",
    "sympy": "1.14.0", "pillow": "11.3.0", "gradio": "5.50.0",
}  # fmt: skip
# Ours that no lesson imports on Colab: the command line around the notebooks, and Colab has a notebook of its own. The demo runs from a
# terminal; Colab's older Gradio stays, and so does the starlette beside it.
NOT_ON_COLAB = {"jupyterlab", "papermill", "nbclient", "nbval", "gradio", "starlette"}


def cell(path: Path, tag: str) -> str:
    """The source of the cell with this tag."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(c for c in cells if tag in c["metadata"].get("tags", ()))["source"])


def pip_lines() -> list[list[str]]:
    """The arguments of every %pip line of the install cell."""
    return [shlex.split(line) for line in re.findall(r"^ *%pip (.+)$", cell(LESSONS[0], "install"), re.MULTILINE)]


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_by_the_cell() -> set[str]:
    return {normal(Requirement(a).name) for line in pip_lines() for a in line if "==" in a}


# ---- the install cell -----------------------------------------------------------------------------------------------


def stub(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """A wheel of metadata alone: pip's resolver looks at nothing else."""
    file = name.replace("-", "_")
    info = f"{file}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{file}-{version}-py3-none-any.whl", "w") as wheel:
        lines = "".join(f"Requires-Dist: {r}\n" for r in requires)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A virtual environment that has what Colab has, after the install cell: versions before and after, and pip's words.

    Every package is a stub with real metadata: the index offers all that is installed here, in the tested versions and
    with their true requirements, among them a newer torch and numpy that pip would take if anything asked for them.
    """
    folder = tmp_path_factory.mktemp("runtime")
    index, preinstalled = folder / "index", folder / "preinstalled"
    for made in (index, preinstalled):
        made.mkdir()
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if normal(name) not in ("medquad-qlora", "pip"):
            stub(index, name, found.version, [r for r in found.requires or [] if "extra ==" not in r])
    for name, version in COLAB.items():
        stub(preinstalled, name, version, [])
    stub(index, "medquad-qlora", "0.1.0", tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"])
    venv.create(folder / "venv", with_pip=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))} | {"PIP_CONFIG_FILE": os.devnull}

    def pip(*arguments: str) -> str:
        command = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or arguments[0] == "check", done.stderr[-2000:]
        return done.stdout + done.stderr

    def versions() -> dict[str, str]:
        return {normal(p["name"]): p["version"] for p in json.loads(pip("list", "--format=json"))}

    pip("install", "--no-index", "--no-deps", *map(str, preinstalled.iterdir()))
    before = versions()
    said = []
    for line in pip_lines():
        arguments = ["medquad-qlora" if "git+https" in a else a for a in line]
        said.append(pip(*arguments, "--no-index", "--find-links", str(index)))
    return {"before": before, "after": versions(), "said": said, "check": pip("check")}


def test_the_install_cell_leaves_colabs_torch_and_numpy_alone(runtime: dict[str, Any]) -> None:
    before, after = runtime["before"], runtime["after"]
    for name in ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "ipython", "ipykernel"):
        assert before[name] == COLAB[name]
        assert after[name] == before[name], f"{name} was replaced"
    assert importlib.metadata.version("torch").split("+")[0] != "2.11.0", "a stub of the same version would prove nothing"


def test_the_install_cell_changes_only_what_the_course_is_built_on(runtime: dict[str, Any]) -> None:
    before, after = runtime["before"], runtime["after"]
    changed = {name for name in before if after.get(name) != before[name]}
    below = {"huggingface-hub", "hf-xet", "tokenizers", "safetensors", "pyarrow", "click"}  # what transformers and datasets ask for
    below.add("typing-extensions")  # what pydantic asks for, which openai and fastapi bring to this stand-in (Colab has its own)
    assert changed <= installed_by_the_cell() | below
    for line in pip_lines():
        for pinned in (Requirement(a) for a in line if "==" in a):
            assert pinned.specifier.contains(after[normal(pinned.name)])
    assert "medquad-qlora" in after


def test_pip_has_no_complaint_about_our_packages(runtime: dict[str, Any]) -> None:
    ours = installed_by_the_cell() | {"medquad-qlora"}
    for said in runtime["said"]:
        complaints = [line for line in said.splitlines() if re.match(r"(ERROR|[\w.-]+ \S+ (requires|has requirement)) ?", line)]
        assert [c for c in complaints if c.startswith("ERROR") or normal(c.split()[0]) in ours] == []
    left = [line for line in runtime["check"].splitlines() if normal(line.split()[0]) in ours]
    names = "|".join(NOT_ON_COLAB)
    no_matter = rf"medquad-qlora \S+ (requires ({names}), which is not installed|has requirement ({names})[<>].*, but you have .*)\."
    explained = [line for line in left if re.fullmatch(no_matter, line)]
    assert left == explained, "pip check: more than the packages that --no-deps leaves out on purpose"
    assert left, "pip check reads requirements"


def imports(source: str) -> set[str]:
    """Top-level names of the modules that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"medquad_utils"}


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted((REPO / "medquad_utils").rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in LESSONS:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if c["cell_type"] == "code":
                yield path.name, "".join(c["source"])


def test_whatever_is_imported_is_preinstalled_or_in_the_install_cell() -> None:
    have = {normal(name) for name in COLAB} | installed_by_the_cell()
    by_module = importlib.metadata.packages_distributions()
    lacking: dict[str, set[str]] = {}
    for where, source in sources():
        for module in imports(source):
            if not {normal(d) for d in by_module.get(module, [module])} & have:
                lacking.setdefault(module, set()).add(where)
    # The command line runs notebooks, with papermill and what that brings along; no lesson does.
    for module in ("papermill", "nbclient", "jupyter_client", "traitlets", "zmq"):
        assert lacking.pop(module) == {"course.py"}
    assert not any(path.suffix == ".ipynb" for path in map(Path, set().union(*lacking.values()))), lacking
    assert set(lacking) <= NOT_ON_COLAB, lacking
    assert "rouge_score" in set().union(*(imports(s) for _, s in sources())), "the search itself finds something"


# ---- a simulated runtime --------------------------------------------------------------------------------------------


class Colab:
    """A simulated Colab: ``content`` is its disk, and ``drive`` outlives it once it is mounted."""

    def __init__(self, folder: Path, secret: str = "denied") -> None:
        self.folder, self.secret = folder, secret
        self.content = folder / "content"
        self.log = folder / "log.txt"
        self.drive = self.content / "drive" / "MyDrive"
        self.content.mkdir(parents=True)
        settings = folder / "ipython" / "profile_default" / "ipython_kernel_config.py"
        settings.parent.mkdir(parents=True)
        settings.write_text('get_config().IPKernelApp.kernel_class = "google.colab._kernel.Kernel"\n')

    def start(self, cells: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Run the cells as one notebook, in a process of its own."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        nbformat.write(notebook, self.folder / "in.ipynb")
        ours = {
            "IPYTHONDIR": str(self.folder / "ipython"), "HOME": str(self.folder), "HF_HOME": str(self.folder / "hub"),
            "PYTHONPATH": f"{REPO / 'tests' / 'fake_colab'}{os.pathsep}{REPO}", "FAKE_COLAB_LOG": str(self.log),
            "FAKE_COLAB_SECRET": self.secret, "FAKE_COLAB_CONTENT": str(self.content),
        }  # fmt: skip
        hidden = ("MEDQUAD_OUT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(self.folder / "in.ipynb"), str(self.folder / "out.ipynb")]
        given = {k: v for k, v in os.environ.items() if k not in hidden} | ours | (environment or {})
        return subprocess.Popen(command, cwd=self.content, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, cells: list[str], environment: dict[str, str] | None = None) -> str:
        """Run the cells to their end; returns what they printed."""
        process = self.start(cells, environment)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
        outputs = [o for c in nbformat.read(self.folder / "out.ipynb", as_version=4).cells for o in c.outputs]
        return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)

    def asked(self, kind: str) -> list[str]:
        """What was asked of the runtime: its lines "pip ..." or "secret ..."."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(kind)]


def code(*numbers: int, **parameters: Any) -> list[str]:
    """The code cells of these lessons in a row, their parameters overridden; each begins with an empty namespace."""
    cells: list[str] = []
    for number in numbers:
        path = LESSONS[number - 1]
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if c["cell_type"] == "code":
                cells.append("".join(c["source"]))
                if "parameters" in c["metadata"].get("tags", ()):
                    cells.append("\n".join(f"{k} = {v!r}" for k, v in parameters.items()))
        cells.append("%reset -f")
    return cells


def until_plan(**parameters: Any) -> list[str]:
    """The first cells of a lesson: install, parameters, plan."""
    return code(1, **parameters)[:4]


LOOK = f"""
from medquad_utils.profiles import Hardware
token = profiles.hub_token()
print("token:", token)
print(profiles.choose({T4!r}, True, bool(token), "" if token else profiles.token_gap()))
print("again:", profiles.hub_token())
import huggingface_hub
print("headers:", "authorization" in huggingface_hub.utils.build_hf_headers())
"""


@pytest.mark.parametrize(
    ("secret", "profile", "words"),
    [
        ("missing", "small", "Colab has no secret HF_TOKEN: key icon > Add new secret"),
        ("denied", "small", "may not read Colab's secret HF_TOKEN: key icon > Notebook access"),
        ("timeout", "small", "Colab's secrets do not answer (TimeoutException)"),
        ("hf_example", "llama-8b", "and a token"),
    ],
)
def test_a_secret_that_is_missing_denied_slow_or_there(secret: str, profile: str, words: str, tmp_path: Path) -> None:
    colab = Colab(tmp_path, secret)
    said = colab.run([*until_plan(profile="tiny"), LOOK])
    token = secret if secret == "hf_example" else None
    assert f"token: {token}" in said
    assert f"('{profile}'" in said or f'("{profile}"' in said
    assert words in said.replace("\\'", "'")
    assert f"again: {token}" in said
    assert f"headers: {token is not None}" in said, "a download would raise, or go without the token"
    assert "lost with the session: mount Drive" in said, "no Drive is mounted"
    assert [shlex.split(line)[1:] for line in colab.asked("pip")] == pip_lines(), "the install cell did not run as it stands"
    if secret != "timeout":
        assert len(colab.asked("secret")) == 1, "the learner is asked once"


def test_outside_colab_nothing_is_installed_and_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "DRIVE", tmp_path)  # a folder of that name proves nothing
    assert not profiles.on_colab()
    assert profiles.default_out() == str(tmp_path / "runs")
    assert "results" not in dict(profiles.resolve("tiny", hardware=T4).table())
    assert profiles.token_gap() == ""


def test_results_go_to_drive_on_colab_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "DRIVE", tmp_path / "drive" / "MyDrive")
    plan = profiles.resolve("tiny", hardware=T4)
    assert plan.folder == tmp_path / "runs" / "tiny"
    assert "lost with the session: mount Drive" in dict(plan.table())["results"]
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    plan = profiles.resolve("tiny", hardware=T4)
    assert plan.folder == tmp_path / "drive" / "MyDrive" / "medquad-runs" / "tiny"
    assert dict(plan.table())["results"] == "on Drive, in medquad-runs/tiny: a later session goes on from there"
    assert profiles.resolve("tiny", hardware=T4, out=str(tmp_path / "mine")).folder == tmp_path / "mine" / "tiny"
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "elsewhere"))
    assert profiles.default_out() == str(tmp_path / "elsewhere")


# ---- five lessons, and a session that dies in the middle of them ----------------------------------------------------

SMALL = {"profile": "tiny", "rows": 40, "max_steps": 10}


@pytest.fixture(scope="module")
def two_sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Lessons 01 to 04 on a runtime that dies while 04 trains; then 04 and 05 on a new one, which has nothing but the Drive."""
    folder = tmp_path_factory.mktemp("colab")
    first = Colab(folder / "first")
    first.drive.mkdir(parents=True)
    process = first.start(code(1, 2, 3, 4, **SMALL))
    checkpoints = first.drive / "medquad-runs" / "tiny" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    for kernel in psutil.Process(process.pid).children(recursive=True):
        kernel.kill()
    process.kill()
    process.communicate()
    seen = {"metrics": sorted(p.name for p in checkpoints.parent.glob("metrics/*.json"))}
    seen["local"] = sorted(p.name for p in first.content.iterdir())
    # A mark in what the checkpoint remembers of the run: it can reach the final metrics through the checkpoint alone.
    whole = list(checkpoints.glob("checkpoint-*/trainer_state.json"))
    seen["steps"] = max(json.loads(p.read_text())["global_step"] for p in whole)
    for path in whole:
        state = json.loads(path.read_text())
        state["log_history"].insert(0, {"loss": 12.5, "step": 0, "epoch": 0.0})
        path.write_text(json.dumps(state))
    second = Colab(folder / "second")
    second.drive.parent.mkdir()
    first.drive.rename(second.drive)
    seen["said"] = second.run(code(4, 5, **SMALL))
    seen["second"] = second
    return seen


def test_a_session_that_dies_leaves_its_results_on_drive(two_sessions: dict[str, Any]) -> None:
    assert two_sessions["metrics"] == ["attach.json", "explore.json", "quantize.json"]
    assert two_sessions["local"] == ["drive"], "nothing was written to the disk that is lost"
    assert 0 < two_sessions["steps"] < SMALL["max_steps"], "the session was to die in the middle"


def test_a_reconnected_session_goes_on_from_the_checkpoint_on_drive(two_sessions: dict[str, Any]) -> None:
    folder = two_sessions["second"].drive / "medquad-runs" / "tiny"
    metrics = json.loads((folder / "metrics" / "train.json").read_text())
    assert metrics["train_curve"][0] == [0, 12.5], "the run began afresh: what the checkpoint remembers is gone"
    assert metrics["steps"] == SMALL["max_steps"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "checkpoints").exists(), "Drive has 15 GB: a finished run leaves no checkpoints there"


def test_the_five_lessons_ran_on_the_simulated_runtime(two_sessions: dict[str, Any]) -> None:
    second = two_sessions["second"]
    names = {p.name for p in (second.drive / "medquad-runs" / "tiny" / "metrics").iterdir()}
    assert {"explore.json", "quantize.json", "attach.json", "train.json", "ask.json"} <= names
    assert sorted(p.name for p in second.content.iterdir()) == ["drive"]
    assert two_sessions["said"].count("on Drive, in medquad-runs/tiny") == 2
    assert len(second.asked("pip")) == 4, "two lines a lesson, and nothing was installed"


# ---- system memory at 8 B -------------------------------------------------------------------------------------------


def test_loading_in_4_bits_never_holds_two_copies(tmp_path: Path) -> None:
    """A model of 100 MB in 4 bits: of a second copy in 16 bits not even half would fit under the bound."""
    load_memory, random_llama = benchmark("load_memory"), benchmark("random_llama")
    shape = profiles.Shape(1024, 4, 2816, 8, 4, 3072, tied=True)
    found = load_memory.in_a_process(random_llama.write(shape, tmp_path / "model"), kept=False)
    parts = load_memory.predicted(shape)
    assert found["compute_dtype"] in ("float32", "bfloat16")
    assert found["weights_gb"] <= parts["packed weights"] + parts["embeddings, head, norms"] + 0.001
    constant = 0.01  # threads and buffers
    assert found["added_at_peak_gb"] <= sum(parts.values()) + constant
    assert found["added_at_peak_gb"] > 0.8 * found["weights_gb"], "the peak was missed"
    assert found["added_afterwards_gb"] <= found["weights_gb"] + constant, "something of the files is still there"
    assert sum(parts.values()) + constant < found["weights_gb"] + found["files_gb"] / 2, "the bound could hide a second copy"


def test_the_record_of_loading_says_what_it_measured_and_stays_below_colabs_memory() -> None:
    load_memory = benchmark("load_memory")
    record = json.loads((REPO / "tests" / "benchmarks" / "results" / "load_memory_cpu.json").read_text())
    measured, shape = record["measured"], profiles.PROFILES["llama-1b"].shape
    assert measured["parameters"] == shape.parameters
    assert measured["predicted_gb"] == {k: round(v, 3) for k, v in load_memory.predicted(shape).items()}
    assert measured["weights_gb"] == pytest.approx(sum(list(measured["predicted_gb"].values())[:2]), abs=0.01)
    assert measured["added_at_peak_gb"] < measured["weights_gb"] + measured["files_gb"] / 2, "half a second copy"
    assert record["alive"]["added_at_peak_gb"] < sum(measured["predicted_gb"].values()) + 0.05
    sliced = [record["slices_of_8b"][str(n)] for n in load_memory.SLICES]
    at_8b = record["llama_8b"]
    assert at_8b["cpu_peak_gb"] == pytest.approx(load_memory.extrapolated(*sliced, profiles.PROFILES["llama-8b"].shape), abs=0.01)
    # By hand: 6.979 B packed weights of 4.127 bits, 2 x 128,256 x 4,096 embeddings in 4 bytes.
    assert list(at_8b["cpu_parts_gb"].values())[:2] == pytest.approx([6.979 * 4.127 / 8, 2 * 128256 * 4096 * 4 / 1e9], abs=0.005)
    assert sum(at_8b["cpu_parts_gb"].values()) < at_8b["cpu_peak_gb"] < load_memory.GOAL_GB
    assert at_8b["gpu_system_memory_gb"] < load_memory.GOAL_GB


def test_colab_md_says_what_the_plans_predict_and_what_was_not_measured() -> None:
    from medquad_utils import estimate

    page = (REPO / "Colab.md").read_text(encoding="utf-8")
    assert "No real Colab was reached" in page
    rows = {c[0].split(",")[0]: c for c in (re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.startswith("| "))}
    for card, name in {"T4": "T4", "L4": "L4", "A100": "A100-40"}.items():
        _, profile, numbers, memory, how_long = rows[card]
        found = estimate.estimate("llama-8b", name)
        assert profile == "`llama-8b`"
        assert memory == f"{sum(found.parts.values()):.1f} GB"
        assert how_long == "not measured yet"
        assert ("fp16" in numbers) == (name == "T4")
    record = json.loads((REPO / "tests" / "benchmarks" / "results" / "load_memory_cpu.json").read_text())
    assert f"{record['llama_8b']['cpu_peak_gb']:.1f} GB there" in " ".join(page.split())
