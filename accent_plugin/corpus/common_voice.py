"""Reader of the metadata of a Common Voice release, of any version.

A release is recognised by its columns, not by the name of its folder. Versions 2 to 27 are tab-separated files next to
a folder ``clips``: they call the accent ``accent`` (codes) or ``accents`` (names and free text), some add ``variant``,
and durations, if any, are in ``clip_durations.tsv``. Version 1 is ``cv-valid-*.csv``, separated by commas, without
client ids. A quotation mark has no meaning in the tab-separated files, except around a whole cell.
"""

import bisect
import contextlib
import csv
import hashlib
import math
import os
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from accent_plugin.errors import DataError

WRONG_CELLS = "wrong number of cells"
NOT_UTF8 = "invalid UTF-8"
OUTSIDE = "path outside clips"
NO_PATH = "no path"
VALIDATED = "validated.tsv"
_OFFICIAL = {"train.tsv": "train", "dev.tsv": "dev", "test.tsv": "test"}
_OFFICIAL_V1 = {"cv-valid-train.csv": "train", "cv-valid-dev.csv": "dev", "cv-valid-test.csv": "test"}
_CLIPS = "clips"
_DURATIONS = "clip_durations.tsv"


# A file with a larger fraction of damaged rows is refused.
_MOST_DAMAGED = 0.05


# Role -> names of its column, the first that is there.
_COLUMNS = {
    "client": ("client_id",),
    "path": ("path", "filename"),
    "sentence": ("sentence", "text"),
    "accent": ("accents", "accent"),
    "variant": ("variant",),
    "gender": ("gender",),
    "age": ("age",),
    "up_votes": ("up_votes",),
    "down_votes": ("down_votes",),
    "seconds": ("duration",),
}


def is_release(folder):
    """Whether a folder looks like a release."""
    return (folder / _CLIPS).is_dir() or (folder / VALIDATED).is_file() or any(folder.glob("cv-valid-*.csv"))


class Release:
    """One release of one language.

    Arguments
    ---------
    folder : str or Path
        The folder that holds ``validated.tsv`` and ``clips``, or ``cv-valid-train.csv``.
    files : sequence of str, optional
        Tables to read, such as ``other.tsv``; None takes ``validated.tsv``, or all ``cv-valid-*.csv`` of version 1.
    official : bool
        Read the official splits: ``train.tsv``, ``dev.tsv`` and ``test.tsv``.

    Raises
    ------
    DataError
        When it is not a release, or lacks a column.
    """

    kind = "Common Voice release"
    without_clients = "version 1 was published without them; later versions have them"

    def __init__(self, folder, files=None, official=False):
        self.folder = Path(folder).absolute()
        _require_release(self.folder)
        first_version = not any(self.folder.glob("*.tsv"))
        self.dialect = "v1" if first_version else "tsv"
        splits = _OFFICIAL_V1 if first_version else _OFFICIAL
        if files is None:
            files = sorted(p.name for p in self.folder.glob("cv-valid-*.csv")) if first_version else [VALIDATED]
            files = list(splits) if official else files
        self.files = tuple(dict.fromkeys([files] if isinstance(files, str) else files))
        for name in self.files:
            if Path(name).name != name or not (self.folder / name).is_file():
                there = ", ".join(sorted(p.name for p in self.folder.glob("*.[tc]sv") if p.is_file())) or "none"
                raise DataError(
                    f"{self.folder} has no table {name}"
                    + (f", and split official needs {', '.join(splits)}" if official else "")
                    + f"\nits tables are {there}: name those to read in files, and split by client"
                )
        self._split_of = {name: splits.get(name, "") for name in self.files}
        self._headers = {name: _header(self.folder / name, first_version) for name in self.files}
        # cv-corpus-27.0-2026-09-11/en, without the rest of the path, which would reveal the machine.
        above = self.folder.parent.name
        self.name = f"{above}/{self.folder.name}" if re.search("cv|common.?voice", above, re.I) else self.folder.name
        self.has_clients = all("client" in header for header, _ in self._headers.values())
        if not first_version and not self.has_clients:
            name = next(name for name, (header, _) in self._headers.items() if "client" not in header)
            raise DataError(
                f"{self.folder / name} has no column client_id; its columns are {', '.join(self._headers[name][1])}"
            )
        self.damaged, self.warnings = Counter(), []
        self._named = array("q")

    def fingerprint(self):
        """Names, sizes and digests of the tables that are read."""
        found = {}
        for path in self._tables():
            with readable(path), open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            found[path.name] = {"bytes": path.stat().st_size, "blake2b": digest}
        return {"kind": self.kind, "name": self.name, "files": found}

    def cells(self):
        """Yield the metadata of each clip, as a dictionary; see ``selection``.

        It also has ``up_votes`` and ``down_votes`` (int or None) and ``seconds`` (float, None where unknown).

        Raises
        ------
        DataError
            When too many rows are damaged.
        """
        self.damaged.clear()
        self.warnings.clear()
        self._named = array("q")
        seconds, number = self._durations(), 0
        for name in self.files:
            places, columns = self._headers[name]
            texts = [(role, places[role]) for role in _TEXTS if role in places]
            unknown = {role: "" for role in _TEXTS if role not in places} | {"split": self._split_of[name]}
            read = _Rows(self.folder / name, len(columns), self.dialect == "v1")
            for cells in read:
                path, problem = self._path(cells[places["path"]])
                if problem:
                    read.damaged[problem] += 1
                    continue
                self._named.append(hash(path))
                found = {role: cells[place] for role, place in texts}
                found.update(unknown)
                found["up_votes"] = _integer(cells, places.get("up_votes"))
                found["down_votes"] = _integer(cells, places.get("down_votes"))
                found["seconds"] = _looked_up(seconds, path) if seconds else _float(cells, places.get("seconds"))
                found["path"], found["row"] = path, number
                number += 1
                yield found
            self.damaged += read.damaged
            if read.cut:
                self.warnings.append(f"{name} ends in the middle of a line: it may be truncated")
            if too_damaged(read.damaged, read.lines):
                counts = ", ".join(f"{reason} {n}" for reason, n in read.damaged.most_common())
                raise DataError(f"{self.folder / name} is damaged: of {read.lines} rows {counts}; download it again")

        if not number:
            raise DataError(f"{', '.join(self.files)} of {self.folder} has no usable row: download the release again")

    def absent(self, rows):
        """Find rows without a file, and warn of files that no table names.

        Returns
        -------
        (rows,) np.ndarray of bool

        Raises
        ------
        DataError
            When no row has a file.
        """
        # Hashes in arrays, because a release has millions of names.
        there = np.fromiter((hash(name) for name in self._audio_files()), np.int64)
        missing = ~np.isin(np.fromiter((hash(row.path) for row in rows), np.int64, len(rows)), there)
        if len(rows) and missing.all():
            where = self.folder if self.dialect == "v1" else self.folder / _CLIPS
            raise DataError(
                f"none of the {len(rows)} clips exists in {where}, for example {rows[0].path}\n"
                "unpack the audio of the release next to its tables"
            )
        named = np.frombuffer(self._named, np.int64) if self._named else np.zeros(0, np.int64)
        nameless = there[~np.isin(there, named)]
        if len(nameless):
            nameless = nameless[~np.isin(nameless, self._named_elsewhere())]
        if len(nameless):
            self.warnings.append(f"{len(nameless)} files of the release are in none of its tables")
        return missing

    def sound(self, row):
        """Path of a clip."""
        return str(self.folder / row.path if self.dialect == "v1" else self.folder / _CLIPS / row.path)

    def _tables(self):
        more = [self.folder / _DURATIONS] if (self.folder / _DURATIONS).is_file() else []
        return [self.folder / name for name in self.files] + more

    def _path(self, text):
        """Path of a file below the clips, or the reason why the cell is invalid."""
        if self.dialect == "tsv" and _PLAIN_NAME(text):
            return text, None
        if not text:
            return "", NO_PATH
        folder, _, name = text.rpartition("/")
        inside = (not folder) if self.dialect == "tsv" else re.fullmatch(r"cv-[a-z-]+", folder)
        if not inside or "\\" in text or "\0" in text or name in ("", ".", "..") or re.match("[A-Za-z]:", text):
            return "", OUTSIDE
        # Versions 2 and 3 omit the suffix of file names.
        return (text if os.path.splitext(text)[1] else text + ".mp3"), None

    def _durations(self):
        """Sorted hashes of file names, and their seconds; None where the release has no durations."""
        path = self.folder / _DURATIONS
        if self.dialect == "tsv" and path.is_file():
            names, values = array("q"), array("d")
            _, columns = _columns(path, False)
            read = _Rows(path, len(columns), False)
            name = columns.index("clip") if "clip" in columns else 0
            unit = next((i for i, column in enumerate(columns) if column.startswith("duration")), None)
            if unit is None:
                raise DataError(f"{path} has no column duration; its columns are {', '.join(columns)}")
            for cells in read:
                value = _float(cells, unit)
                if value is not None:
                    names.append(hash(cells[name]))
                    values.append(value / 1000)
            if read.damaged:
                count = sum(read.damaged.values())
                self.warnings.append(f"{count} rows of {_DURATIONS} are damaged: those durations are unknown")
            order = np.argsort(np.frombuffer(names, np.int64)) if names else []
            return array("q", [names[i] for i in order]), array("d", [values[i] for i in order])
        return None

    def _audio_files(self):
        folders = [self.folder / _CLIPS]
        if self.dialect == "v1":
            folders = [p for p in self.folder.glob("cv-*") if p.is_dir()]
        for folder in folders:
            prefix = f"{folder.name}/" if self.dialect == "v1" else ""
            with contextlib.suppress(FileNotFoundError), readable(folder), os.scandir(folder) as entries:
                for entry in entries:
                    # Dangling links, folders and pipes are not clips.
                    if not entry.name.startswith(".") and entry.is_file():
                        yield prefix + entry.name

    def _named_elsewhere(self):
        """Hashes of the files that are named in tables which are not read."""
        named = array("q")
        for path in self.folder.glob("*.csv" if self.dialect == "v1" else "*.tsv"):
            with contextlib.suppress(DataError):
                header, columns = _columns(path, self.dialect == "v1")
                if path.name not in self.files and "path" in header:
                    for cells in _Rows(path, len(columns), self.dialect == "v1"):
                        named.append(hash(self._path(cells[header["path"]])[0]))
        return np.frombuffer(named, np.int64) if named else np.zeros(0, np.int64)


# Nearly all names match, and this is fast.
_PLAIN_NAME = re.compile(r"[a-z0-9_-]+\.mp3", re.ASCII).fullmatch
_TEXTS = ("client", "path", "sentence", "accent", "variant", "gender", "age")


class _Rows:
    """Rows of a table as lists of cells; damaged rows are counted."""

    def __init__(self, path, width, commas):
        self._path, self._width, self._commas = path, width, commas
        self.damaged, self.lines, self.cut = Counter(), 0, False

    def __iter__(self):
        for cells, whole in self._lines():
            if not self.lines:
                self.lines = 1
                continue
            self.lines += 1
            if cells and len(cells) == self._width:
                yield cells
            elif cells is None or any(cells):
                self.damaged[NOT_UTF8 if cells is None else WRONG_CELLS] += 1
                self.cut |= not whole
        self.lines = max(0, self.lines - 1)

    def _lines(self):
        """Yield the cells of each line, or None where it cannot be decoded, and whether it ends in a line feed."""
        # Split at line feeds in binary: sentences contain other characters that Python takes for line ends. CSV too is
        # read line by line, so that an unclosed quotation mark damages only its own line.
        with readable(self._path), open(self._path, "rb") as file:
            for line in file:
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    yield None, line.endswith(b"\n")
                    continue
                yield _cells(text, self._commas), line.endswith(b"\n")


def _cells(text, commas):
    if not commas:
        cells = text.split("\t")
        return [_unquoted(cell) for cell in cells] if '"' in text else cells
    try:
        return next(csv.reader([text]), [])
    except csv.Error:
        return [text]


def _unquoted(cell):
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def seconds_in(text):
    """A duration as a number; None where it is not a number, not finite, or negative."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _looked_up(seconds, path):
    names, values = seconds
    place = bisect.bisect_left(names, hash(path))
    return values[place] if place < len(names) and names[place] == hash(path) else None


def _integer(cells, place):
    # Python refuses to parse numbers with thousands of digits.
    return int(cells[place]) if place is not None and cells[place].isdecimal() and len(cells[place]) < 10 else None


def _float(cells, place):
    return seconds_in(cells[place]) if place is not None else None


def too_damaged(damaged, rows):
    """Whether too many rows are damaged for the table to be usable."""
    return sum(damaged.values()) > max(1, _MOST_DAMAGED * rows)


@contextlib.contextmanager
def readable(path):
    """Name the file that the system refuses to read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _header(path, commas):
    """Role -> index of its column, and all columns; a table without path and accent is refused."""
    found, columns = _columns(path, commas)
    for role in ("path", "accent"):
        if role not in found:
            names = " or ".join(_COLUMNS[role])
            raise DataError(f"{path} has no column {names}; its columns are {', '.join(columns)}")
    return found, columns


def _columns(path, commas):
    with readable(path), open(path, "rb") as file:
        first = file.readline(1 << 20)
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    try:
        columns = _cells(first.decode("utf-8-sig").rstrip("\r\n"), commas)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a table: its first line is not UTF-8") from None
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path} has the column {twice[0]} more than once; its columns are {', '.join(columns)}")
    roles = {role: next((columns.index(n) for n in names if n in columns), None) for role, names in _COLUMNS.items()}
    return {role: place for role, place in roles.items() if place is not None}, columns


def _require_release(folder):
    """Refuse a folder that is not a release, and say what to do."""
    expected = "a release is the folder with validated.tsv and clips/, such as cv-corpus-27.0-2026-09-11/en"
    if not folder.exists():
        raise DataError(f"there is no folder {folder}\n{expected}")
    if not folder.is_dir():
        remedy = "unpack it and give its folder" if ".tar" in folder.name or ".zip" in folder.name else expected
        raise DataError(f"{folder} is a file, not a release folder\n{remedy}")
    if any(folder.glob("*.tsv")) or any(folder.glob("cv-valid-*.csv")):
        return
    below = sorted(child for child in folder.glob("*") if child.is_dir() and any(child.glob("*.tsv")))
    below += sorted(child for child in folder.glob("*/*") if child.is_dir() and any(child.glob("*.tsv")))
    packed = sorted(folder.glob("*.tar*")) + sorted(folder.glob("*.zip"))
    if below:
        named = ", ".join(map(str, below[:5]))
        raise DataError(f"{folder} is not a release, but contains one\ngive {named}")
    if packed:
        name = packed[0].name
        raise DataError(f"{folder} holds {name}, which is still packed\nunpack it first: tar -xf {name}")
    raise DataError(f"{folder} is not a release: it has no table (validated.tsv or cv-valid-*.csv)\n{expected}")
