"""Atomic writes: a file or folder is replaced whole or not at all, and nobody's work is lost."""

from __future__ import annotations

import errno
import glob
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
    else wrote, and a link, raises a CourseError.
    """
    for path in (record, *others):
        refuse_link(path)
    with suppress(OSError):  # it cannot be read: writing will say so
        there = [Path(p.parent.name, p.name) for p in (record, *others) if p.exists()]
        if there and not (record.is_file() and mark.encode() in record.read_bytes()):
            raise CourseError(
                f"{there[0]} is there already, and medquad did not write it. "
                "Move it away, or choose another folder or name."
            )


def refuse_link(path: Path) -> None:
    """Check that ``path`` is no link to a file: writing would lose the link."""
    if path.is_symlink():
        raise CourseError(
            f"{path.name} is a link, which would be lost. Delete it, or choose another folder "
            "or name."
        )


def _temporary(path: Path, ending: str = "part") -> Path:
    """Name a file beside ``path`` for this process; remove those that killed processes left.

    A folder that stepped aside, and whose successor never came, takes its place again.
    """
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
        else:
            raise OSError(errno.EEXIST, "others replace it again and again", folder.name)
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
