"""Atomic writes: a file or folder is replaced whole or not at all, and nobody's work is lost."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from medquad_utils import CourseError


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
    else wrote raises a CourseError.
    """
    with suppress(OSError):  # it cannot be read: writing will say so
        there = [Path(p.parent.name, p.name) for p in (record, *others) if p.exists()]
        if there and not (record.is_file() and mark.encode() in record.read_bytes()):
            raise CourseError(
                f"{there[0]} is there already, and medquad did not write it. "
                "Move it away, or choose another folder or name."
            )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move it to ``path`` at the end.

    An error or a kill on the way leaves an older ``path`` as it was. If ``path`` is a link, the
    file that it leads to is replaced. A path that cannot be written raises a CourseError.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.part")  # what a kill left is written over
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)  # atomic, because both are in one folder
    except OSError as error:
        raise CourseError(f"cannot write {path.name}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def reason(error: Exception) -> str:
    """Say why the system refused to write, and what helps."""
    why = getattr(error, "strerror", None) or error
    return f"{why}. Check path, rights and free space, or choose another folder (--runs, --out)."


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to create beside ``folder``, and replace ``folder`` at the end.

    An error passes through unchanged and leaves an older ``folder`` as it was. If ``folder`` is a
    link, the folder that it leads to is replaced, and the link stays.
    """
    folder = folder.resolve()
    fresh, older = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder.name)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
        if folder.exists():  # no system call replaces a folder that has files in it
            shutil.rmtree(older, ignore_errors=True)
            folder.rename(older)
        fresh.rename(folder)
    finally:
        if older.exists() and not folder.exists():  # an error or a kill came between the renames
            older.rename(folder)
        for left in (fresh, older):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold ``folder`` against other processes that lock it; the lock ends with this process.

    If another process holds it and ``wait`` is false, a CourseError is raised.
    """
    with ExitStack() as stack:
        # Windows has no fcntl. In a folder that cannot be written, the first file will say so.
        with suppress(ImportError, OSError):
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise CourseError(
                    f"another run is writing to {folder.parent.name}/{folder.name}: wait for its "
                    "end, or choose another folder with --runs."
                ) from error
        yield
