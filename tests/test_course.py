"""Running the lessons, the table at the end, and the tool that stamps what is committed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import papermill
import pytest
import stamp
from conftest import REPO, tiny

from medquad_utils import CourseError, adapters, course
from medquad_utils.machine import versions

PARAMETERS = 'profile = "auto"  # tiny, small\nrows = 0  # 0 is all\nrate = 0.5\nout = ""\n'
WRITE = """import json, pathlib
folder = pathlib.Path(out) / profile / "metrics"
folder.mkdir(parents=True)
(folder / "toy.json").write_text(json.dumps({"headline": f"saw {rows} rows at {rate}"}))
print("done")
"""
FAIL = "print('before')\nraise ValueError('too many ' + '\\nrows')"
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def notebook(*sources: str) -> Any:
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    return made


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three short lessons that stand in for ``notebooks/``: one works, one fails, one dies."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, cells in (("01_toy", [WRITE]), ("03_fail", [FAIL, "1"]), ("04_die", [KILL])):
        made = notebook(PARAMETERS, *cells)
        made.cells.insert(0, nbformat.v4.new_markdown_cell("# Toy\n\n**You need** NEED.\n"))
        nbformat.write(made, folder / f"{name}.ipynb")
    monkeypatch.setattr(course, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path))
    return folder


def test_a_lesson_runs_with_its_parameters_and_is_stamped(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = toys.parent / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "another Python", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(other.parents[1]))
    path, before = toys / "01_toy.ipynb", (toys / "01_toy.ipynb").read_bytes()
    (result,) = course.run({"profile": "tiny", "rows": "12", "rate": "0.25"}, ["01"])
    assert (result.lesson, result.headline) == ("01 toy", "saw 12 rows at 0.25")
    assert result.seconds > 0 and result.peak_gb > 0
    assert path.read_bytes() == before, "a run does not touch the committed notebook"
    executed = toys.parent / "tiny" / "notebooks" / path.name
    assert ">done" in executed.with_suffix(".html").read_text()
    stamp.stamp(executed, path, "tiny", result)
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    assert [c.source for c in made.cells[1:]] == [PARAMETERS, WRITE], "no injected cell"
    assert made.cells[0].source.splitlines()[-1] == stamp.need(result)
    assert made.cells[2].outputs[0].text == "done\n" and made.cells[2].execution_count == 2
    assert made.metadata["medquad"]["versions"] == versions()
    assert made.metadata["medquad"]["source"] == course.source_hash(made.cells)
    assert str(toys.parent) not in path.read_text()


def test_a_failed_cell_is_one_line_with_its_place_and_stops_the_run(toys: Path) -> None:
    said = r"^lesson 03 fail, cell 3: ValueError: too many  \(see 03_fail.ipynb in tiny/notebooks"
    with pytest.raises(CourseError, match=said):
        course.run({"profile": "tiny"}, ["03"])
    kept = nbformat.read(toys.parent / "tiny" / "notebooks" / "03_fail.ipynb", as_version=4)
    assert kept.cells[-2].outputs[0].text == "before\n"
    assert kept.cells[-1].execution_count is None, "nothing runs after a failure"


def test_a_full_disk_leaves_the_notebook_of_an_earlier_run(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.run({"profile": "tiny"}, ["01"])
    kept = toys.parent / "tiny" / "notebooks" / "01_toy.ipynb"
    before = kept.read_bytes()

    def full(self: Any, buf: str, path: str) -> None:
        Path(path).write_text(buf[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    with pytest.raises(CourseError, match=r"cannot write 01_toy.ipynb: No space left"):
        course.run({"profile": "tiny"}, ["01"])
    assert kept.read_bytes() == before
    assert {path.suffix for path in kept.parent.iterdir()} == {".ipynb", ".html"}


def test_a_local_model_is_its_folder_for_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels run in another folder. A name on the Hub stays, whatever else is called so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert course._value("model", "owner/name", "''") == "owner/name"
    (tmp_path / "owner" / "name" / "config.json").touch()
    for text in ("owner/name", "owner/name/config.json"):
        assert course._value("model", text, "''") == str(tmp_path / "owner" / "name")


@pytest.mark.full  # a second process that is killed
def test_a_killed_kernel_is_one_message_about_memory(toys: Path) -> None:
    with pytest.raises(CourseError, match=r"04 die: .*memory.*smaller profile"):
        course.run({"profile": "tiny"}, ["04"])


def test_a_mistake_in_a_notebook_is_one_line_and_a_bug_keeps_its_traceback() -> None:
    setup = "from medquad_utils import machine, profiles\n"
    setup += "hardware = machine.Hardware('cpu', 'any', 16.0)\n"
    setup += "plan = profiles.resolve('tiny', hardware=hardware)"
    made = notebook(setup, "print(splits)", "profiles.resolve('huge')", "1 / 0", "print('on')")
    at = {"metadata": {"path": str(REPO)}}
    nbclient.NotebookClient(made, allow_errors=True, kernel_name="python3", resources=at).execute()
    unordered, mistake, bug, after = (cell.outputs[0] for cell in made.cells[1:])
    assert "A cell above has not been run yet" in unordered.evalue and len(unordered.traceback) == 1
    assert mistake.traceback == [f"CourseError: {mistake.evalue}"]
    assert "1 / 0" in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(bug.traceback))
    assert after.text == "on\n"


def test_an_installation_without_a_checkout_is_one_message(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(course, "__file__", str(tmp_path / "medquad_utils" / "course.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError, match="no notebooks/ folder found: run this inside a clone"):
        course.lessons()


def test_scrub_takes_out_what_a_committed_notebook_must_not_hold() -> None:
    bar = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    printed = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("a", "b")]
    noise = {"output_type": "stream", "name": "stderr", "text": "0%| | 0/4"}
    shown = {"output_type": "execute_result", "execution_count": 7, "data": {"text/plain": "x"}}
    cell: dict[str, Any] = {"id": "c1", "cell_type": "code", "source": "x"}
    ran = {"metadata": {"tags": ["predict", "injected-parameters"], "papermill": {}}}
    ran |= {"execution_count": 7, "outputs": [bar, noise, *printed, shown]}
    kept = [{**printed[0], "text": "ab"}, {**shown, "execution_count": None}]
    clean = {"metadata": {"tags": ["predict"]}, "execution_count": None, "outputs": kept}
    assert stamp.scrub(cell | ran) == cell | clean


def test_the_source_hash_changes_with_the_source_only() -> None:
    text = {"cell_type": "markdown", "source": ["# A\n", "b"]}
    code = {"cell_type": "code", "source": "x = 1", "outputs": []}
    first = course.source_hash([text, code])
    assert course.source_hash([{**text, "source": "# A\nb"}, {**code, "outputs": [1]}]) == first
    changed = [[text, {**code, "source": "x = 2"}], [code, text], [text]]
    assert len({first, *map(course.source_hash, changed)}) == 4


def test_an_adapter_is_kept_without_local_paths(trained_adapter: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_adapter, tmp_path / "run" / "adapter")).parent
    (run / "metrics").mkdir()
    here = json.dumps(str(tmp_path))  # the paths that a run leaves in its records
    for name, place in (("adapter_config", "adapter"), ("plan", "adapter"), ("train", "metrics")):
        text = (trained_adapter / f"{name}.json").read_text()
        text = text.replace('"out": "runs"', f'"out": {here}')
        text = text.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": {here}')
        (run / place / f"{name}.json").write_text(text)
    stamp.keep_adapter(run, tmp_path / "kept")
    for file in trained_adapter.iterdir():
        assert (tmp_path / "kept" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_committed_adapter_is_whole_and_of_the_embedded_base(trained_adapter: Path) -> None:
    manifest = json.loads((trained_adapter / "manifest.json").read_text())
    files = {p for p in trained_adapter.iterdir() if p.name != "manifest.json"}
    assert manifest == {p.name: stamp.digest(p) for p in files}
    plan = json.loads((trained_adapter / "plan.json").read_text())
    assert plan["base"] == adapters.base_id(tiny())
