"""Rows and files: a row's columns, writes that succeed whole or not at all, hashes of content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medquad_utils import CourseError

Row = dict[str, Any]

# Every source is converted to these columns. A value that a source lacks is None.
REQUIRED = ("qtype", "question", "answer")
LISTS = ("synonyms", "cui", "semantic_type")
COLUMNS = (*REQUIRED, "focus", *LISTS, "source", "url", "document_id")
MEASURED = Path(__file__).parent / "assets" / "measured"  # JSON that tests/benchmarks write


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move it to ``path`` at the end.

    An error or a kill on the way leaves an older ``path`` as it was.

    Raises:
        CourseError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)  # atomic, because both are in one folder
    except OSError as error:
        raise CourseError(
            f"cannot write {path.name}: {error.strerror or error}. "
            "Free some space or choose another folder with out=..."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to create beside ``folder``, and replace ``folder`` at the end.

    An error passes through unchanged and leaves an older ``folder`` as it was.
    """
    fresh, older = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        # No system call replaces a folder that has files in it, so the older one steps aside.
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        fresh.rename(folder)
    except BaseException:
        if older.exists() and not folder.exists():
            older.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)


def content_hash(paths: Iterable[Path], root: Path) -> str:
    """Return the sha256 of files by their path below ``root`` and content, whatever their order."""
    lines = []
    for path in paths:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        lines.append(f"{path.relative_to(root).as_posix()} {digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def value_hash(value: Any) -> str:
    """Return 16 digits of the sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read a file of ``write_rows``."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowInvalid) as error:
        advice = "Delete it and run lesson 01 again."
        raise CourseError(f"cannot read {path.name}: {error}. {advice}") from error
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as parquet, in the columns ``COLUMNS``."""
    import pyarrow
    import pyarrow.parquet

    # The types are given, because a column that is empty in these rows has none of its own.
    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema([(c, texts if c in LISTS else text) for c in COLUMNS])
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)
