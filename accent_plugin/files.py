"""Atomic files and folders, locks, and readable errors of the file system."""

import contextlib
import errno
import logging
import os
import shutil

from accent_plugin.errors import DataError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file under a temporary name and rename it when it is complete; ``mode`` "w" writes UTF-8, "wb" bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    newline, encoding = (None, None) if "b" in mode else ("", "utf-8")
    try:
        with open(temporary, mode, newline=newline, encoding=encoding) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writable_folder(folder, argument):
    """Make ``folder``, and turn the system's errors into advice; ``argument`` is the option that named the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        remedy = f"choose another {argument}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free disk space and run the same command again: finished work is kept"
        raise DataError(f"{folder} cannot be written: {error.strerror or error}\n{remedy}") from error


@contextlib.contextmanager
def atomic_folder(folder, files):
    """Make a folder under a temporary name that replaces ``folder`` when it is complete.

    Only ``files`` are deleted from the old folder, after the new folder is in place.
    """
    folder = folder.resolve()
    temporary, aside = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        with writable_folder(temporary, "folder"):
            yield temporary
            _take_place(temporary, folder, aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        for name in files:
            (aside / name).unlink(missing_ok=True)
        aside.rmdir()
    if aside.exists():
        logger.warning("%s was replaced; its other files are in %s", folder, aside)


def _take_place(new, folder, aside):
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise


@contextlib.contextmanager
def lock(folder, name=".lock", wait=True):
    """Lock ``folder`` for one process; the lock ends with the process, and a forked child does not inherit it.

    If another process has the lock, wait for it, or raise a BlockingIOError if ``wait`` is False.
    """
    from filelock import FileLock, Timeout

    # A killed process would leave the file of a soft lock behind.
    file_lock = FileLock(folder / name, fallback_to_soft=False)
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise BlockingIOError(f"{folder} is locked") from None
        logger.info("another process uses %s: waiting for it", folder)
        file_lock.acquire()
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not run two processes in it at once", folder, error)
    try:
        yield
    finally:
        file_lock.release()
