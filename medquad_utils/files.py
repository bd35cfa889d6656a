"""Rows and files: a row's columns, writes that succeed whole or not at all, hashes of content."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
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


def check_place(folder: Path) -> None:
    """Check before any work that files can be written to ``folder``, which need not be there."""
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise CourseError(f"cannot write to {folder.name}: {reason(error)}") from error


def check_ours(record: Path, mark: str, *others: Path) -> None:
    """Check that ``record``, and ``others`` beside it, may be replaced.

    None is there, or the record holds ``mark``: a text that only this package writes. What somebody
    else wrote, and a link, raises a CourseError.
    """
    for path in (record, *others):
        refuse_link(path)
    with suppress(OSError):  # it cannot be read: writing will say so
        there = [Path(p.parent.name, p.name) for p in (record, *others) if p.exists()]
        if there and not (record.is_file() and mark.encode() in record.read_bytes()):
            raise CourseError(
                f"{there[0]} is there already, and medquad did not write it. "
                "Move it away, or choose another folder or name with --out."
            )


def refuse_link(path: Path) -> None:
    """Check that ``path`` is no link to a file: writing would lose the link."""
    if path.is_symlink():
        raise CourseError(
            f"{path.name} is a link, which would be lost. Delete it, or choose another folder "
            "or name with --out."
        )


def _temporary(path: Path, ending: str = "part") -> Path:
    """Name a file beside ``path`` for this process; remove those that killed processes left."""
    import psutil

    for left in path.parent.glob(f".{glob.escape(path.name)}.*.{ending}"):
        if not ((pid := left.name.split(".")[-2]).isdecimal() and psutil.pid_exists(int(pid))):
            if ending == "old" and not path.exists():
                left.rename(path)  # it was killed between the two renames
            remove = shutil.rmtree if left.is_dir() else os.unlink
            with suppress(OSError):
                remove(left)
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move it to ``path`` at the end.

    An error or a kill on the way leaves an older ``path`` as it was. A full disk, a folder that
    cannot be written and a link raise a CourseError.
    """
    refuse_link(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = _temporary(path)
        yield temporary
        temporary.replace(path)  # atomic, because both are in one folder
    except OSError as error:
        raise CourseError(f"cannot write {path.name}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            if temporary:
                temporary.unlink()


def reason(error: Exception) -> str:
    """Say why the system refused to write, and what helps; safetensors puts the number in words."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = getattr(error, "errno", None) or int(told[1] if told else 0)
    space, name = "Free some space", "A file is in the way"
    todo = {
        errno.ENOSPC: space, errno.EFBIG: space, errno.EDQUOT: space, errno.EROFS: "It is locked",
        errno.EACCES: "Ask for the right to write", errno.ENOTDIR: name, errno.EISDIR: name,
        errno.ENAMETOOLONG: "Shorten the name",
    }.get(number, "Check the path")  # fmt: skip
    why = getattr(error, "strerror", None) or error
    return f"{why}. {todo}, or choose another folder (--runs, --out)."


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to create beside ``folder``, and replace ``folder`` at the end.

    An error passes through unchanged and leaves an older ``folder`` as it was. If ``folder`` is a
    link, the folder that it leads to is replaced, and the link stays.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder.name)
    fresh, older = _temporary(folder), _temporary(folder, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
        for _ in range(100):  # another process may replace the folder at the same moment
            with suppress(FileNotFoundError):
                # No system call replaces a folder that has files in it: the older steps aside.
                folder.rename(older)
            try:
                fresh.rename(folder)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(older, ignore_errors=True)
    except BaseException:
        if older.exists() and not folder.exists():
            older.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold ``folder`` against other processes that lock it; the lock ends with this process.

    If another process holds it and ``wait`` is false, a CourseError is raised.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = -1
    try:
        with suppress(OSError):  # the folder cannot be written, which the first file will say
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise CourseError(
                    f"another run is writing to {folder.parent.name}/{folder.name}: wait for its "
                    "end, or choose another folder with --runs."
                ) from error
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


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
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        for number, row in enumerate(rows, start=1):
            texts = all(isinstance(row.get(column), str) for column in REQUIRED)
            if not (texts and row.keys() >= set(COLUMNS)):
                raise ValueError(f"row {number} is not one of medquad data")
    except (OSError, ValueError, pyarrow.lib.ArrowException) as error:
        told = " ".join(str(error).split()).replace(str(path), path.name)
        todo = "Delete it and run lesson 01 again, or medquad data if you named the folder."
        raise CourseError(f"cannot read {path.name}: {told[:200]}. {todo}") from error
    return rows


def write_rows(temporary: Path, rows: Sequence[Row]) -> None:
    """Write rows as parquet, in the columns ``COLUMNS``, to a path of ``whole_file``."""
    import pyarrow
    import pyarrow.parquet

    # The types are given, because a column that is empty in these rows has none of its own.
    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    types = [(column, texts if column in LISTS else text) for column in COLUMNS]
    schema = pyarrow.schema(types)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)
