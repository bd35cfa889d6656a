"""Run the lessons with papermill, one after another, and close with a table; stamp the committed notebooks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils.data import whole_file, write_between, write_json
from medquad_utils.profiles import CourseError, default_out, resolve, versions

STAMP = "medquad"  # the key of the stamp in a notebook's metadata


def notebooks_folder() -> Path:
    """The folder with the lessons: in the checkout around the package, or around the working folder.

    Raises:
        CourseError: there is none, as after an installation without a checkout.
    """
    here = Path.cwd()
    for root in (Path(__file__).parent.parent, here, *here.parents):
        if list((root / "notebooks").glob("0*_*.ipynb")):
            return root / "notebooks"
    raise CourseError("no notebooks/ folder found: run this inside a clone of the course's repository.")


def lessons(only: Sequence[str] = ()) -> list[Path]:
    """The lessons in order, or those whose numbers ``only`` names ("02", "4").

    Raises:
        CourseError: a number that no lesson has.
    """
    found = {path.name[:2]: path for path in sorted(notebooks_folder().glob("0*_*.ipynb"))}
    wanted = [number.strip().zfill(2) for number in only] or list(found)
    unknown = [number for number in wanted if number not in found]
    if unknown:
        raise CourseError(f"no lesson {', '.join(unknown)}: there are {', '.join(found)}.")
    return [found[number] for number in wanted]


def title(notebook: Path) -> str:
    """``04_train_with_sft.ipynb`` -> ``04 train with sft``."""
    return notebook.stem.replace("_", " ")


def metrics_file(notebook: Path, folder: Path) -> Path:
    """``metrics/<verb>.json`` of a lesson: ``04_train_with_sft`` writes ``train.json``."""
    return folder / "metrics" / f"{notebook.stem.split('_')[1]}.json"


def parameters_of(notebook: Path) -> dict[str, str]:
    """Name -> default (as written) of the cell tagged ``parameters``."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    return dict(re.findall(r"^(\w+)\s*=\s*([^#\n]*?)\s*(?:#.*)?$", source, re.MULTILINE))


@dataclass
class Result:
    """How one lesson went."""

    lesson: str
    seconds: float
    peak_gb: float
    headline: str


class _PeakMemory:
    """Largest resident memory of this process's children (the kernels) while the block runs, in GB."""

    def __enter__(self) -> _PeakMemory:
        self.gb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(0.25):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it ended in between
                    continue
            self.gb = max(self.gb, total / 1e9)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def run(
    profile: str = "auto",
    only: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
    out: str = "",
    report: Callable[[str], None] = print,
) -> list[Result]:
    """Run the lessons in order; executed notebooks and HTML pages go to ``<out>/<profile>/notebooks``.

    Raises:
        CourseError: a parameter that no chosen lesson has, a plan that cannot be made, or a cell that failed.
    """
    chosen = lessons(only)
    given = dict(parameters or {})
    known = {name: default for notebook in chosen for name, default in parameters_of(notebook).items()}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise CourseError(f"unknown parameter {', '.join(unknown)}: the lessons take {', '.join(sorted(known))}.")
    values: dict[str, Any] = {name: _typed(value) for name, value in given.items()}
    for name, value in values.items():
        if known[name].isdigit() and not (isinstance(value, int) and value >= 0):
            raise CourseError(f"parameter {name}={given[name]}: expected a whole number, 0 or more.")
    for name in ("data_path", "model_path"):
        if given.get(name):
            if not Path(given[name]).exists():
                raise CourseError(f"{name}={given[name]}: there is no such file or folder. Give the path of one that is there.")
            values[name] = str(Path(given[name]).resolve())
    values["out"] = str(Path(out or str(values.get("out") or default_out())).resolve())
    names = ("source", "data_path", "model_path", "rows", "max_steps", "lora_r", "seed", "out")
    plan = resolve(str(values.pop("profile", profile)), **{k: v for k, v in values.items() if k in names})
    values["profile"] = plan.profile
    report(str(plan))
    results = []
    for number, notebook in enumerate(chosen, start=1):
        report(f"\n[{number}/{len(chosen)}] {title(notebook)}")
        mine = {k: v for k, v in values.items() if k in parameters_of(notebook)}
        results.append(_run_one(notebook, mine, plan.folder))
        report(f"      {results[-1].headline}")
    report("\n" + table(results))
    return results


def _typed(value: str) -> Any:
    """A value from the command line as the number it is written as, or as text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _run_one(notebook: Path, values: Mapping[str, Any], folder: Path) -> Result:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = folder / "notebooks" / notebook.name
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        with _PeakMemory() as peak:
            papermill.execute_notebook(
                notebook, target, parameters=dict(values), cwd=notebook.parent, log_output=False, progress_bar=True, config=_in_cipher()
            )
    except PapermillExecutionError as error:
        where = f"lesson {title(notebook)}, cell {error.exec_count}"
        said = (str(error.evalue).strip() or "no message").splitlines()[0]
        raise CourseError(f"{where}: {error.ename}: {said} (see {target.name} in {folder.name}/notebooks)") from error
    except DeadKernelError as error:
        raise CourseError(
            f"lesson {title(notebook)}: the notebook's process was ended from outside, mostly because memory ran out. "
            "Close other programs, or choose a smaller profile."
        ) from error
    write_html(target)
    seconds = time.time() - started
    record = metrics_file(notebook, folder)
    headline = json.loads(record.read_text(encoding="utf-8"))["headline"] if record.is_file() else "no headline"
    return Result(title(notebook), seconds, peak.gb, headline)


def _in_cipher() -> Any:
    """Configuration under which a notebook's process is talked to in cipher; in the clear, newer ones warn at every start."""
    import zmq
    from jupyter_client.manager import KernelManager
    from traitlets.config import Config

    able = zmq.has("curve") and "transport_encryption" in KernelManager.class_trait_names()
    return Config({"KernelManager": {"transport_encryption": "auto"}} if able else {})


def write_html(notebook: Path) -> Path:
    """Write the page of an executed notebook beside it; returns its path."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(template_name="lab").from_filename(str(notebook))
    page = notebook.with_suffix(".html")
    with whole_file(page) as temporary:
        temporary.write_text(body, encoding="utf-8")
    return page


def table(results: Sequence[Result]) -> str:
    """The closing table: lesson, time, peak memory, headline, and the sum of the times."""
    rows = [(r.lesson, _clock(r.seconds), f"{r.peak_gb:.1f} GB", r.headline) for r in results]
    rows.append(("all", _clock(sum(r.seconds for r in results)), "", ""))
    header = ("lesson", "min:s", "peak RAM", "headline")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---- the committed notebooks ----------------------------------------------------------------------------------------


def source_hash(cells: Sequence[Mapping[str, Any]]) -> str:
    """Hash of what a notebook says and runs, outputs aside."""
    text = json.dumps([[c["cell_type"], "".join(c["source"])] for c in cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def scrub(cell: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``cell`` without what a committed notebook must not hold: widgets, progress bars, warnings, timings."""
    fresh = {k: v for k, v in cell.items() if k != "metadata"} | {"metadata": {}}
    if tags := [t for t in cell["metadata"].get("tags", ()) if not t.startswith("injected")]:
        fresh["metadata"]["tags"] = tags
    if cell["cell_type"] == "code":
        fresh["execution_count"] = None
        widget = "application/vnd.jupyter.widget-view+json"
        kept = [o for o in cell["outputs"] if o.get("name") != "stderr" and widget not in o.get("data", {})]
        fresh["outputs"] = [{**o, "execution_count": None} if "execution_count" in o else o for o in _joined(kept)]
    return fresh


def _joined(outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pieces that one cell printed in a row as one output: a page would show each piece on a line of its own."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1] = {**joined[-1], "text": "".join([*joined[-1]["text"], *output["text"]])}
        else:
            joined.append(output)
    return joined


def numbered(cells: Sequence[dict[str, Any]]) -> None:
    """Give code cells the execution counts of one run from top to bottom, in place: nbval takes a cell without one as not run."""
    for count, cell in enumerate((c for c in cells if c["cell_type"] == "code"), start=1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count


def need(result: Result) -> str:
    """The line of a lesson's head that says what it takes, from a measurement."""
    took = f"{result.seconds / 60:.0f} min" if result.seconds >= 90 else f"{10 * round(result.seconds / 10 + 0.5)} s"
    memory = f"{result.peak_gb:.1f} GB of RAM; VRAM at 8 B: not measured yet."
    return f"**You need** (measured on `tiny`, two CPU cores) about {took} and {memory}"


def stamp(executed: Path, notebook: Path, profile: str, result: Result) -> None:
    """Take the outputs of ``executed`` into the committed ``notebook``, scrubbed, with a stamp of what made them."""
    done = json.loads(executed.read_text(encoding="utf-8"))
    cells = [scrub(c) for c in done["cells"] if "injected-parameters" not in c["metadata"].get("tags", ())]
    numbered(cells)
    head = "".join(cells[0]["source"])
    cells[0]["source"] = re.sub(r"\*\*You need\*\*.*$", need(result), head, flags=re.MULTILINE)
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
    metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": language,
        STAMP: {"profile": profile, "source": source_hash(cells), "versions": versions()},
    }
    text = json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False)
    with whole_file(notebook) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def timings_table(timings: Mapping[str, Mapping[str, Any]]) -> str:
    """The measured times and memory of the lessons as a Markdown table."""
    lines = [f"| {n} | {_clock(t['seconds'])} | {t['peak_gb']:.1f} GB |" for n, t in sorted(timings.items())]
    total = _clock(sum(t["seconds"] for t in timings.values()))
    return "\n".join(["| lesson | min:s | peak RAM |", "|---|---|---|", *lines, f"| all | {total} | |"])


def verified(having: Mapping[str, str]) -> str:
    """The line of README that says when all lessons last ran, and with what; local builds (+cpu) aside."""
    said = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in having.items())
    return f"Last verified {time.strftime('%Y-%m-%d')}, all lessons on `tiny` in one run: {said}."


def main() -> int:
    """``python -m medquad_utils.course [02,04]``: run on ``tiny``, then stamp notebooks, timings, README and its picture.

    All lessons at once also renew README's line of when the course was last verified.
    """
    only = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    try:
        results = run("tiny", only)
        folder, home = Path(default_out()) / "tiny", notebooks_folder()
        for notebook, result in zip(lessons(only), results, strict=True):
            stamp(folder / "notebooks" / notebook.name, notebook, "tiny", result)
        record = home / "timings.json"
        timings = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        for result in results:
            timings[result.lesson[:2]] = {"seconds": round(result.seconds), "peak_gb": round(result.peak_gb, 1)}
        write_json(record, timings)
        readme = home.parent / "README.md"
        for page in (readme, home / "TEACHING.md"):
            write_between(page, ("<!-- timings -->", "<!-- /timings -->"), timings_table(timings))
        if not only:
            write_between(readme, ("<!-- verified -->", "<!-- /verified -->"), verified(versions()))
        if (picture := folder / "figures" / "outcome.png").is_file():
            shutil.copyfile(picture, home / "figures" / picture.name)
    except CourseError as error:
        print(f"medquad: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
