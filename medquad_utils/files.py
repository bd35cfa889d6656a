"""Rows and files: the columns of a row, whole-or-nothing writes, JSON and parquet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medquad_utils import CourseError

Row = dict[str, Any]

# The schema that every source is brought to; what a source lacks is None.
COLUMNS = (
    "qtype",
    "question",
    "answer",
    "focus",
    "synonyms",
    "cui",
    "semantic_type",
    "source",
    "url",
    "document_id",
)
LISTS = ("synonyms", "cui", "semantic_type")
REQUIRED = ("qtype", "question", "answer")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it at the end: whole or not at all.

    Raises:
        CourseError: the disk is full or the folder cannot be written; an older ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise CourseError(
            f"cannot write {path.name}: {reason}. Free some space or choose another folder with out=..."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to be made beside ``folder``, which it replaces at the end: whole or not at all.

    Whatever goes wrong is raised as it is, and leaves an older ``folder`` as it was.
    """
    fresh, older = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
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


def between(text: str, marks: tuple[str, str]) -> str:
    """What stands in ``text`` between its two ``marks``, without the white space around it.

    Raises:
        CourseError: ``text`` lacks one of them.
    """
    return _parted(text, marks)[1].strip()


def write_between(path: Path, marks: tuple[str, str], made: str) -> None:
    """Put ``made`` between the two ``marks`` of a text file; all else in it stays.

    Raises:
        CourseError: the file lacks one of them, or cannot be written.
    """
    head, _, tail = _parted(path.read_text(encoding="utf-8"), marks, path.name)
    with whole_file(path) as temporary:
        temporary.write_text(f"{head}{marks[0]}\n{made}\n{marks[1]}{tail}", encoding="utf-8")


def _parted(text: str, marks: tuple[str, str], name: str = "the text") -> tuple[str, str, str]:
    head, first, rest = text.partition(marks[0])
    made, second, tail = rest.partition(marks[1])
    if not (first and second):
        raise CourseError(
            f"{name} holds no {marks[0]} ... {marks[1]}: put them where the table shall stand."
        )
    return head, made, tail


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the common schema as parquet, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema([(c, texts if c in LISTS else text) for c in COLUMNS])
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_rows`` wrote.

    Raises:
        CourseError: the file is not there or is not parquet.
    """
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowInvalid) as error:
        raise CourseError(
            f"cannot read {path.name}: {error}. Delete it and run lesson 01 again."
        ) from error
    return rows
