"""``medquad`` as a user types it: its help, its mistakes, and the check before a class."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from conftest import REPO

from medquad_utils import adapters, cli, course, doctor, machine, profiles, safety

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "pyarrow",
         "bitsandbytes", "matplotlib", "papermill"}  # fmt: skip


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    code = "import sys, medquad_utils.data; from medquad_utils import cli\n"
    code += "for line in ['train', '--help'], ['estimate'], ['--help']: cli.main(line)\n"
    code += "print('loaded', *(module.split('.')[0] for module in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    shown, loaded = done.stdout.split("\nloaded ")
    assert done.returncode == 0 and not HEAVY & set(loaded.split())
    assert all(f"\n    {command} " in shown for command in ("doctor", "run", "train", "ask"))


def test_doctor_says_what_auto_takes_and_why(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(machine, "hub_token", lambda: None)
    assert cli.main(["doctor"]) == 0
    found = capsys.readouterr().out
    assert re.search(r"(?m)^ok +auto +takes tiny \(no CUDA GPU", found)
    assert re.search(rf"(?m)^ok +tested .*torch {re.escape(machine.versions()['torch'])}", found)
    assert re.search(r"(?m)^profile +tiny", found)
    assert re.search(r"(?m)^ok +device +cpu: .* cores, bf16 is (not )?faster than fp32$", found)


RUN, ASK, DEMO = ([command, "--profile", "tiny"] for command in ("run", "ask", "demo"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["run", "--profile", "huge"], "unknown profile 'huge': expected auto, tiny, small"),
    ([*RUN, "--only", "99"], "no lesson 99: there are 00, 01, 02, 03, 04, 05"),
    ([*RUN, "--only", "01", "--reference", "kept"], "--reference needs all lessons: leave --only"),
    ([*RUN, "--reference", "."], "a file is there already, and medquad did not write it. Move"),
    ([*RUN, "-p", "temperatur=1"], "unknown parameter temperatur: the lessons take data_path"),
    ([*RUN, "-p", "source"], "'source': expected NAME=VALUE"),
    (["train", "--profile", "huge"], "unknown profile 'huge': expected auto, tiny, small"),
    ([*RUN, "-p", "rows=-5"], "rows=-5: expected a whole number"),
    ([*RUN, "-p", "seed=4294967296"], "seed=4294967296: expected a whole number from 0 to"),
    ([*RUN, "-p", "rows=1_000"], "rows=1_000: expected a whole number"),
    ([*RUN, "-p", "max_steps=1"], "max_steps=1: the first step only warms up"),
    ([*RUN, "-p", "specialty=magic", "--only", "09"], "specialty=magic: expected one of cardio"),
    ([*RUN, "-p", "rows=1", "-p", "rows=2"], "parameter rows is given twice"),
    ([*RUN, "-p", "profile=small"], "parameter profile is given twice"),
    ([*RUN, "-p", "out=a", "--runs", "b"], "parameter out is given twice"),
    ([*RUN, "--only", ","], "--only ',': expected numbers of lessons, such as 02,04"),
    (["estimate", "--checkpointing", "0"], "invalid choice: '0'"),
    ([*RUN, "-p", "data_path=a file"], "'sample' reads no file, and data_path is 'a file'"),
    ([*RUN, "--reference", "a file/kept"], "cannot write to kept: Not a directory"),
    ([*ASK, "A?", "--runs", "~no one/x"], "'~no one/x': Could not determine home directory"),
    (["train", "--lora-r", "-1"], "--lora-r=-1: expected a whole number from 0 to"),
    (["data", "--seed", "1e5"], "--seed=1e5: expected a whole number"),
    (["data", "--without", "spelling"], "no cleaning rule 'spelling': there are link list, pheno"),
    (["data", "--specialty", "magic"], "no specialty 'magic': there are cardiology, oncology"),
    (["data", "--out", "a file/data"], "cannot write to data: Not a directory. Check path, ri"),
    (["estimate", "--price", "nan"], "--price=nan: expected a number"),
    (["data", "--sead", "1"], "arguments: --sead 1 (all options: medquad data --help)"),
    (["train", "--data", "mine.csv"], "arguments: --data mine.csv (all options: medquad train"),
    ([*RUN, "-p", "source=xml"], "'xml' needs data_path"),
    (["train", "--source", "web"], "'web': expected one of sample, hub, xml, csv, jsonl, parquet"),
    (["train", "--print-launch", "x"], "--print-launch: invalid choice: 'x' (choose"),
    ([*RUN, "-p", "model=nowhere"], "model 'nowhere': expected OWNER/NAME"),
    ([*RUN, "--only", "01", "--runs", "a file"], "a file"),
    ([*ASK, "  "], 'medquad ask "What causes asthma?"'),
    ([*ASK, "What causes asthma?", "--runs", "nothing"], "medquad run --profile tiny --only 04"),
    ([*DEMO, "--port", "0", "--runs", "nothing"], "medquad run --profile tiny --only 04"),
    ([*DEMO, "--space", "space"], "--space DIR and --repo USER/NAME go together"),
    ([*DEMO, "--space", "space", "--repo", "me/a", "--port", "7"], "leave --host and --port out"),
    (["serve", "--host", "::1"], "Expected an address of this machine after --host"),
    (["serve", "--host", "192.0.2.1"], "Expected an address of this machine after --host: 127.0."),
], ids=lambda value: value[-1] if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_one_line_and_starts_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("it runs"))
    (tmp_path / "a file").touch()
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medquad: ") and said in line
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


# What a user may have written -> the command that would replace it.
MINE = dict.fromkeys(
    ("answers.parquet", "report.md", "report.html", "figures"), "evaluate --questions a --out mine"
) | {
    "train.parquet": "data --out mine", "test.parquet": "data --out mine",
    "a.png": "estimate --out mine/a.png", "a.html": "explain Why? --out mine/a.html",
    "config.json": "publish --profile tiny --dry-run --repo me/a --out mine",
    "README.md": "demo --profile tiny --repo me/a --space mine",
}  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_a_file_of_the_users_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (mine := Path("mine", name)).parent.mkdir()
    mine.write_text(text := 'Software\0Matplotlib; "leakage" of medquad-qlora, <b>by medquad</b>')
    assert cli.main(MINE[name].split()) == 1
    said = f"{mine} is there already, and medquad did not write it. Move it away, or choose another"
    assert said in capsys.readouterr().err
    assert mine.read_text() == text and [*Path().rglob("*")] == [mine.parent, mine]


@pytest.mark.parametrize("command", ["ask", "explain"])
@pytest.mark.parametrize(("question", "said"), [
    ("I can't breathe", safety.EMERGENCY), ("I want to die", safety.SELF_HARM),
])  # fmt: skip
def test_an_emergency_gets_what_to_do_and_loads_no_model(
    command: str, question: str, said: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "resolve_trained", lambda *_, **__: pytest.fail("it loads"))
    assert cli.main([command, question]) == 0
    assert capsys.readouterr().out == f"{said}\n" and [*tmp_path.iterdir()] == []


def test_packages_that_do_not_fit_have_the_line_that_installs_them(monkeypatch: Patch) -> None:
    have = {"torch": "2.8.0"}

    def version(name: str) -> str:
        if name not in have:
            raise importlib.metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch<2.15,>=2.9", "peft"])
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(machine, "versions", dict)
    well, text, todo = doctor._packages()
    assert not well and todo == 'pip install "torch<2.15,>=2.9" "peft"'
    assert "torch 2.8.0, expected" in text and "peft is missing" in text
    have |= {"torch": "2.14.1", "peft": "0.21.2"}
    assert doctor._packages()[0]
    well, text, _ = doctor._tested()
    assert not well and "torch 2.14.1 (tested: 2.13.0)" in text


def test_doctor_finds_all_problems(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    broken = Path(shutil.copytree(profiles.TINY_MODEL, tmp_path / "tiny"))
    (broken / "model.safetensors").write_bytes(b"not weights")
    changed = json.loads(course.lessons(["02"])[0].read_text(encoding="utf-8"))
    changed["cells"][1]["source"] = "print('mine')"
    (tmp_path / "02_changed.ipynb").write_text(json.dumps(changed))

    monkeypatch.setattr(profiles, "TINY_MODEL", broken)
    monkeypatch.setattr(course, "lessons", lambda: [tmp_path / "02_changed.ipynb"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e8, total=8e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    monkeypatch.setattr(importlib.metadata, "requires", None)  # a failing check
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken_port = doctor.WARNING, lambda: doctor._port(port, "do this")
        monkeypatch.setitem(doctor.CHECKS, f"port {port}", taken_port)
        assert cli.main(["doctor"]) == 1
    found = capsys.readouterr().out
    problems = set(re.findall(r"(?m)^problem  (\w+)", found))
    assert (
        problems == {"packages", "model", "memory", "disk"}
        and "not ready for class: 4 problems" in found
    )
    assert re.search(r"(?m)^warning  lessons .*: 02 changed\n +-> git checkout", found)
    assert re.search(rf"(?m)^warning  port {port}  taken\n +-> do this$", found)


def test_ctrl_c_while_python_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")  # imported before the real one
    command = [sys.executable, "-m", "medquad_utils", "doctor"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    said = "medquad: stopped; files that were written are complete.\n"
    assert (done.returncode, done.stderr) == (130, said)


@pytest.mark.full  # a process of its own: it reads user, home and backend at its start
def test_a_nameless_user_an_odd_folder_and_a_notebooks_backend_work(trained_adapter: Path) -> None:
    odd, runs = "Mes données (été) #1 [a] 100%20 'q' \"", ["--profile", "tiny", "--runs"]
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to others
        runs.append(str(folder := Path(temporary, odd)))
        shutil.copytree(trained_adapter, folder / "tiny" / "adapter")
        lines = [["data", *runs[2:]], ["ask", "What causes gout?", *runs],
                 ["explain", "What causes gout?", *runs], ["estimate", "--out", "memory.png"],
                 ["publish", "--repo", "me/tuned", "--dry-run", *runs]]  # fmt: skip
        code = f"from medquad_utils.cli import main\nfor l in {lines}: assert not main(l), l"
        more = {"HOME": "/proc/nonexistent", "USER": "", "LOGNAME": "",
                "MPLBACKEND": "module://ipykernel_that_is_elsewhere"}  # fmt: skip
        read = [p for file in (Path(sys.executable).resolve(), REPO) for p in (file, *file.parents)]
        user: Any = {}
        if os.getuid() == 0 and all(path.stat().st_mode & 1 for path in read):
            user = {"user": 12345}  # which has no name
            subprocess.run(["chown", "-R", "12345", temporary], check=True)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
            env=os.environ | more | {"PYTHONPATH": str(REPO)}, **user,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        written = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    assert written >= {"memory.png", "tiny/data/data.json", "tiny/explain.html",
                       "tiny/published/README.md"}  # fmt: skip


@pytest.mark.full  # forks that kill themselves, close their outputs and fill their disks
def test_one_bad_input_of_every_kind_is_refused() -> None:
    command = [sys.executable, str(REPO / "tests" / "bad_inputs.py"), "1", "1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize(("error", "said"), [
    (OSError(12, "Cannot allocate memory"), "Cannot allocate memory."),
    (OSError(28, "No space left on device"), "left on device. Check path, rights and free space"),
    (ValueError("expected approximately 3 rows"), "unexpected ValueError: expected approximately"),
    (KeyboardInterrupt(), "medquad: stopped; files that were written are complete."),
    (ValueError("proxy refused"), "proxy refused (the environment sets HTTPS_PROXY)"),
])  # fmt: skip
def test_an_error_blames_what_is_to_blame(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    for name in machine.STEERING:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status = 130 if isinstance(error, KeyboardInterrupt) else 1
    assert machine.guarded(Mock(side_effect=error)) == status
    assert said in (shown := capsys.readouterr().err) and shown.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")  # of several processes the first one speaks
    assert (machine.guarded(Mock(side_effect=error)), capsys.readouterr().err) == (status, "")


def test_the_traceback_of_an_unforeseen_error_is_in_a_log(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert machine.guarded(Mock(side_effect=ValueError("odd"))) == 1
    assert "Traceback" in (tmp_path / "medquad-qlora-error.log").read_text()


def test_a_results_folder_that_cannot_be_written_has_a_next_step(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "file" / "runs"))
    well, text, todo = doctor._disk()
    assert not well and "cannot write to runs" in text and todo.startswith("set MEDQUAD_OUT")


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_port_0_is_a_free_port_for_the_server_too(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medquad_utils import demo, generation, serving

    loaded, serve = Mock(), Mock()
    monkeypatch.setattr(generation, "load_tuned", loaded)
    monkeypatch.setattr(generation, "load_tokenizer", loaded)
    monkeypatch.setattr(demo, "load", loaded)
    monkeypatch.setattr({"serve": serving, "demo": demo}[command], "serve", serve)
    assert cli.main([command, "--profile", "tiny", "--port", "0"]) == 0
    assert serve.call_args.args[-1] > 1000
