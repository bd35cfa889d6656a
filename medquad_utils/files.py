"""Rows and files: the columns of a row, parquet and JSON files of this package, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.atomic import whole_file

Row = dict[str, Any]

# Every source is converted to these columns. A value that a source lacks is None.
REQUIRED = ("qtype", "question", "answer")
LISTS = ("synonyms", "cui", "semantic_type")
COLUMNS = (*REQUIRED, "focus", *LISTS, "source", "url", "document_id")
ASSETS = Path(__file__).parent / "assets"
MEASURED = ASSETS / "measured"  # JSON that tests/benchmarks write


def user_path(text: str | Path) -> Path:
    """Turn a path as a user gives it into a ``Path``; ``~`` is the home folder."""
    try:
        path = Path(text).expanduser()
        path.exists()  # raises for a name that is too long
        if "\0" in str(path):
            raise ValueError("a zero byte is in it")
    except (RuntimeError, ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise CourseError(f"path {str(text)[:80]!r}: {why}. Write another path.") from error
    return path


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


def read_json(path: Path, *keys: str, **kinds: type) -> Any:
    """Read an object from a JSON file that this package wrote; a damaged one raises a CourseError.

    A file that is not there raises ``FileNotFoundError``.
    ``keys`` must be in it; ``kinds`` are types of values that may be in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        wrong = {key for key, kind in kinds.items() if not isinstance(value.get(key, kind()), kind)}
        if wrong := wrong | (set(keys) - value.keys()):
            raise ValueError(f"{min(wrong)} is wrong or missing")
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        told = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise CourseError(
            f"{path.parent.name}/{path.name} is damaged ({told}): delete it, and run the lesson "
            "that writes it again."
        ) from error
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    with whole_file(path) as temporary:
        dump_json(temporary, value)


def dump_json(temporary: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to a path of ``whole_file``."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read a file of ``write_rows``; a damaged one, or one of other columns, is a CourseError."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        if not table.schema.equals(_schema()):
            raise ValueError("its columns are not those of medquad data")
        rows: list[Row] = table.to_pylist()
    except (OSError, ValueError, pyarrow.lib.ArrowException) as error:
        told = " ".join(str(error).split()).replace(str(path), path.name)
        todo = "Delete it and run lesson 01 again, or medquad data if you named the folder."
        raise CourseError(f"cannot read {path.name}: {told[:200]}. {todo}") from error
    return rows


def write_rows(temporary: Path, rows: Sequence[Row]) -> None:
    """Write rows as parquet, in the columns ``COLUMNS``, to a path of ``whole_file``."""
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows), schema=_schema())
    pyarrow.parquet.write_table(table, temporary)


def _schema() -> Any:
    """Return the types of ``COLUMNS``: a column that is empty in all rows has none of its own."""
    import pyarrow

    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    return pyarrow.schema([(column, texts if column in LISTS else text) for column in COLUMNS])
