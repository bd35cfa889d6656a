"""Run the lessons with papermill, one after another, and close with a table."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.files import whole_file
from medquad_utils.machine import default_out
from medquad_utils.profiles import resolve

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
    raise CourseError(
        "no notebooks/ folder found: run this inside a clone of the course's repository."
    )


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
    source = "".join(
        "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())
    )
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
    known = {
        name: default for notebook in chosen for name, default in parameters_of(notebook).items()
    }
    unknown = [name for name in given if name not in known]
    if unknown:
        raise CourseError(
            f"unknown parameter {', '.join(unknown)}: the lessons take {', '.join(sorted(known))}."
        )
    values: dict[str, Any] = {name: _typed(value) for name, value in given.items()}
    for name, value in values.items():
        if known[name].isdigit() and not (isinstance(value, int) and value >= 0):
            raise CourseError(
                f"parameter {name}={given[name]}: expected a whole number, 0 or more."
            )
    for name in ("data_path", "model_path"):
        if given.get(name):
            if not Path(given[name]).exists():
                raise CourseError(
                    f"{name}={given[name]}: there is no such file or folder. Give the path of one that is there."
                )
            values[name] = str(Path(given[name]).resolve())
    values["out"] = str(Path(out or str(values.get("out") or default_out())).resolve())
    names = ("source", "data_path", "model_path", "rows", "max_steps", "lora_r", "seed", "out")
    plan = resolve(
        str(values.pop("profile", profile)), **{k: v for k, v in values.items() if k in names}
    )
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
                notebook,
                target,
                parameters=dict(values),
                cwd=notebook.parent,
                log_output=False,
                progress_bar=True,
                config=_in_cipher(),
            )
    except PapermillExecutionError as error:
        where = f"lesson {title(notebook)}, cell {error.exec_count}"
        said = (str(error.evalue).strip() or "no message").splitlines()[0]
        raise CourseError(
            f"{where}: {error.ename}: {said} (see {target.name} in {folder.name}/notebooks)"
        ) from error
    except DeadKernelError as error:
        raise CourseError(
            f"lesson {title(notebook)}: the notebook's process was ended from outside, mostly because memory ran out. "
            "Close other programs, or choose a smaller profile."
        ) from error
    write_html(target)
    seconds = time.time() - started
    record = metrics_file(notebook, folder)
    headline = (
        json.loads(record.read_text(encoding="utf-8"))["headline"]
        if record.is_file()
        else "no headline"
    )
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
    rows = [(r.lesson, clock(r.seconds), f"{r.peak_gb:.1f} GB", r.headline) for r in results]
    rows.append(("all", clock(sum(r.seconds for r in results)), "", ""))
    header = ("lesson", "min:s", "peak RAM", "headline")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    lines = [
        "  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 90 -> "1:30"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---- the committed notebooks ----------------------------------------------------------------------------------------


def source_hash(cells: Sequence[Mapping[str, Any]]) -> str:
    """Hash of what a notebook says and runs, outputs aside."""
    text = json.dumps([[c["cell_type"], "".join(c["source"])] for c in cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
