"""Atomic files and folders, locks, readable errors of the file system, and files that stand in for others."""

import contextlib
import errno
import logging
import os
import re
import shutil

from accent_plugin.errors import DataError

logger = logging.getLogger(__name__)

# As many bytes of a file's beginning as `describe_content` needs.
BEGINNING = 4096

# What takes the place of a file: (pattern of its beginning, what it is, what to do). A group captures its own words.
_STAND_INS = [
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), kind, remedy)
    for pattern, kind, remedy in (
        (
            r"version https://\S+/spec/v1\s+(?:ext-.*)?oid sha256:",
            "a Git LFS pointer",
            "the content was not downloaded; run git lfs pull",
        ),
        (
            r"(?:\.\./|/)*(?:\.git/)?annex/objects/",
            "a git-annex pointer",
            "the content was not downloaded; run git annex get",
        ),
        (
            r"(?:<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(?:!doctype html|html|head|body|script)\b"
            r"(?:.*?<title[^>]*>(.*?)</title>)?",
            "an HTML page",
            "download the file itself",
        ),
        (
            r"(?:<\?xml[^>]*>\s*)?<Error\b(?:.*?<Code>(.*?)</Code>)?",
            "an object store's error",
            "download the file again",
        ),
        (
            r'\{\s*"(?:error|errors|message|detail)"\s*:\s*(?:\{\s*"message"\s*:\s*)?(?:"([^"]*))?',
            "a server's error",
            "download the file again",
        ),
        (
            r"((?:entry |repository |revision |file |page )?not found|404\W[^\n]*|invalid username or password|"
            r"forbidden|access (?:to [^\n]* is restricted|denied)[^\n]*|unauthori[sz]ed|internal server error|"
            r"bad gateway)\W*$",
            "a server's error",
            "download the file again",
        ),
    )
]


def describe_content(first_bytes):
    """Recognise what a failed download or clone leaves in place of a file.

    Arguments
    ---------
    first_bytes : bytes
        The beginning of the file; `BEGINNING` bytes are enough.

    Returns
    -------
    str, or None
        What the file is and what to do, to follow "FILE is"; None if it may be the file that its name says.

    Example
    -------
    >>> describe_content(b"version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a")
    'a Git LFS pointer: the content was not downloaded; run git lfs pull'
    """
    if not first_bytes:
        return "empty: copy or download it again"
    if not any(first_bytes):
        return "filled with zeros: the copy or download did not finish; repeat it"
    text = first_bytes.decode("utf-8-sig", "replace").lstrip()
    for pattern, kind, remedy in _STAND_INS:
        if found := pattern.match(text):
            words = " ".join((found.group(1) or "").split())[:80] if pattern.groups else ""
            return f"{kind}{f' ({words!r})' if words else ''}: {remedy}"
    return None


def describe_file(path):
    """Apply `describe_content` to a file; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return describe_content(file.read(BEGINNING))
    except OSError:
        return None


def require_downloaded(path, error_class):
    """Raise an error of a class if `describe_content` recognises the content of a file."""
    if what := describe_file(path):
        raise error_class(f"{path} is {what}")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file under a temporary name and rename it when it is complete; ``mode`` "w" writes UTF-8, "wb" bytes."""
    # Without pathlib, because preparation calls this for each clip.
    path = os.fspath(path)
    name = os.path.basename(path)
    temporary = f"{path.removesuffix(name)}.{name}.{os.getpid()}.tmp"
    newline, encoding = (None, None) if "b" in mode else ("", "utf-8")
    try:
        with open(temporary, mode, newline=newline, encoding=encoding) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
