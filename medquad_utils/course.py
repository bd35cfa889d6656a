"""Run the lessons with papermill, one after another, and print a table of times and memory."""

from __future__ import annotations

import ast
import inspect
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medquad_utils import CourseError, plots, reference
from medquad_utils.atomic import check_ours, locked, whole_file
from medquad_utils.data import HUB
from medquad_utils.files import read_json, user_path, value_hash
from medquad_utils.machine import checkout, default_out
from medquad_utils.profiles import number, resolve
from medquad_utils.specialties import SPECIALTIES

STAMP = "medquad"  # key in a committed notebook's metadata: profile, versions and source_hash


@dataclass
class Result:
    """Time, peak memory and headline of one lesson."""

    lesson: str
    seconds: float
    peak_gb: float
    headline: str


def notebooks_folder() -> Path:
    """Find ``notebooks/`` in the checkout around the package, or around the working folder."""
    if root := checkout(Path(__file__).parents[1]):
        return root / "notebooks"
    raise CourseError(
        "no notebooks/ folder found: run this inside a clone of the course's repository."
    )


def lessons(only: Sequence[str] = ()) -> list[Path]:
    """List the lessons in order, or only those with the numbers in ``only`` ("02", "4")."""
    paths = {path.name[:2]: path for path in sorted(notebooks_folder().glob("0*_*.ipynb"))}
    wanted = list(dict.fromkeys(n.strip().zfill(2) for n in only)) or list(paths)
    if unknown := [n for n in wanted if n not in paths]:
        raise CourseError(f"no lesson {', '.join(unknown)}: there are {', '.join(paths)}.")
    return [paths[n] for n in wanted]


def title(notebook: Path) -> str:
    """``04_train_with_sft.ipynb`` -> ``04 train with sft``."""
    return notebook.stem.replace("_", " ")


def parameters_of(notebook: Path) -> dict[str, str]:
    """Read name -> default (as written) from the cell tagged ``parameters``."""
    import papermill

    found = papermill.inspect_notebook(notebook)
    return {name: parameter["default"] for name, parameter in found.items()}


def source_hash(cells: Sequence[Mapping[str, Any]]) -> str:
    """Hash the source of a notebook's cells, without their outputs."""
    return value_hash([[c["cell_type"], "".join(c["source"])] for c in cells])


def changed() -> list[str]:
    """List the titles of the lessons that changed since their outputs were made."""
    titles = []
    for path in lessons():
        notebook = read_json(path)
        stamp = notebook["metadata"].get(STAMP, {})
        if stamp.get("source") != source_hash(notebook["cells"]):
            titles.append(title(path))
    return titles


def run(
    parameters: Mapping[str, str], only: Sequence[str] = (), keep: Path | None = None
) -> list[Result]:
    """Run the lessons in order, into ``<out>/<profile>/notebooks`` (notebooks and HTML pages).

    Print the plan, a headline of each lesson, and a table of times and memory. ``keep`` is a folder
    to write the reference run to. A cell that fails raises a CourseError.
    """
    chosen = lessons(only)
    if keep:
        check_ours(keep / "reference.json", '"peak_gb"', *keep.glob("*"))
    values = _values(chosen, parameters)
    values["out"] = str(user_path(values.get("out") or default_out()).resolve())
    accepted = inspect.signature(resolve).parameters
    plan = resolve(**{name: value for name, value in values.items() if name in accepted})
    values["profile"] = plan.profile
    print(plan)
    if not only:
        _ = plan.fit  # refuse a machine that is too small to train before the first lesson
    results = []
    with locked(plan.folder / "notebooks", wait=False):
        for count, notebook in enumerate(chosen, start=1):
            print(f"\n[{count}/{len(chosen)}] {title(notebook)}")
            own = {k: v for k, v in values.items() if k in parameters_of(notebook)}
            results.append(_run_one(notebook, own, plan.folder))
            print(f"      {results[-1].headline}")
    rows = [(r.lesson, clock(r.seconds), f"{r.peak_gb:.1f} GB", r.headline) for r in results]
    rows.append(("all", clock(sum(r.seconds for r in results)), "", ""))
    print("", plots.Table(rows, ("lesson", "min:s", "peak RAM", "headline")), sep="\n")
    if keep:
        peak_gb = max(r.peak_gb for r in results)
        reference.write(plan, keep, {r.lesson: r.seconds for r in results}, peak_gb)
        print(f"\nreference run written to {keep}")
    return results


def _values(chosen: Sequence[Path], given: Mapping[str, str]) -> dict[str, Any]:
    """Check the parameters of the command line; the type of each is that of its default."""
    defaults: dict[str, str] = {}
    for notebook in chosen:
        defaults |= parameters_of(notebook)
    if unknown := [name for name in given if name not in defaults]:
        names = ", ".join(sorted(defaults))
        raise CourseError(f"unknown parameter {', '.join(unknown)}: the lessons take {names}.")
    if (field := given.get("specialty", "")) not in ("", *SPECIALTIES):
        raise CourseError(f"specialty={field}: expected one of {', '.join(SPECIALTIES)}.")
    return {name: _value(name, text, defaults[name]) for name, text in given.items()}


def _value(name: str, text: str, default: str) -> Any:
    if (kind := type(ast.literal_eval(default))) is not str:
        return number(name, kind, text)
    if name not in ("data_path", "model") or not text:
        return text
    path = user_path(text)
    if name == "data_path" and not (path.exists() or text in HUB):
        raise CourseError(f"data_path={text}: there is no such file or folder. Check the path.")
    if name == "model" and path.name == "config.json":
        path = path.parent
    if path.exists() if name == "data_path" else (path / "config.json").is_file():
        return str(path.resolve())  # the kernels run in notebooks/, not here
    return text


def _run_one(notebook: Path, values: Mapping[str, Any], folder: Path) -> Result:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from nbconvert import HTMLExporter
    from papermill.exceptions import PapermillExecutionError

    target = folder / "notebooks" / notebook.name
    started, failure = time.time(), None
    with _peak_memory() as peak, whole_file(target) as fresh, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # papermill expects the ending .ipynb
        try:
            papermill.execute_notebook(notebook, fresh, values, cwd=notebook.parent, **_kernels())
        except (PapermillExecutionError, DeadKernelError) as error:
            failure = error  # the cells that ran are kept
    if isinstance(failure, DeadKernelError):
        raise CourseError(
            f"lesson {title(notebook)}: its process was killed, usually because memory ran out. "
            "Close other programs, or choose a smaller profile."
        ) from failure
    if failure:
        reason, *_ = (failure.evalue.strip() or "no message").splitlines()
        raise CourseError(
            f"lesson {title(notebook)}, cell {failure.exec_count}: {failure.ename}: {reason} "
            f"(see {target.name} in {folder.name}/notebooks)"
        ) from failure
    body, _ = HTMLExporter(template_name="lab").from_filename(str(target))
    with whole_file(target.with_suffix(".html")) as temporary:
        temporary.write_text(body, encoding="utf-8")
    # 04_train_with_sft writes metrics/train.json.
    record = folder / "metrics" / f"{notebook.stem.split('_')[1]}.json"
    headline = read_json(record)["headline"] if record.is_file() else "no headline"
    return Result(title(notebook), time.time() - started, max(peak), headline)


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Sample the resident memory of this process's children (the kernels), in GB."""
    samples, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            with suppress(psutil.Error):  # a child ended between two calls
                children = psutil.Process().children(recursive=True)
                samples.append(sum(child.memory_info().rss for child in children) / 1e9)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        try:
            yield samples
        finally:
            done.set()


def _kernels() -> dict[str, Any]:
    """Return papermill's settings for kernels of this Python, encrypted: newer ones warn else."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets.config import Config

    class Own(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    config = Config({"KernelManager": {"transport_encryption": "auto"}})
    return {"kernel_manager_class": Own, "config": config}


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds: 90 -> "1:30"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
