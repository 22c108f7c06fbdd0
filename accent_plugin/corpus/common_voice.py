"""Reader of the metadata of a Common Voice release, of any version.

A release is recognised by its columns, not by the name of its folder. Versions 2 to 27 are tab-separated files next to
a folder ``clips``: they call the accent ``accent`` (codes) or ``accents`` (names and free text), some add ``variant``,
and durations, if any, are in ``clip_durations.tsv``. Version 1 is ``cv-valid-*.csv``, separated by commas, without
client ids.
"""

import bisect
import contextlib
import hashlib
import math
import os
import re
from array import array
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

from accent_plugin.corpus import tables
from accent_plugin.corpus.tables import TableRows, readable
from accent_plugin.data import labels
from accent_plugin.errors import DataError

OUTSIDE = "path outside clips"
VALIDATED = "validated.tsv"
_OFFICIAL = {"train.tsv": "train", "dev.tsv": "dev", "test.tsv": "test"}
_OFFICIAL_V1 = {"cv-valid-train.csv": "train", "cv-valid-dev.csv": "dev", "cv-valid-test.csv": "test"}
_CLIPS = "clips"
_DURATIONS = "clip_durations.tsv"


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
        self._headers = {name: _header(self._rows(name)) for name in self.files}
        # cv-corpus-27.0-2026-09-11/en, without the rest of the path, which would reveal the machine.
        above = self.folder.parent.name
        self.name = f"{above}/{self.folder.name}" if re.search("cv|common.?voice", above, re.I) else self.folder.name
        self.has_clients = all("client" in header for header in self._headers.values())
        if not first_version and not self.has_clients:
            name = next(name for name, header in self._headers.items() if "client" not in header)
            listed = tables.columns_in_words(self._rows(name).columns)
            raise DataError(f"{self.folder / name} has no column client_id; its columns are {listed}")
        self.damaged, self.warnings = Counter(), []
        self._named = array("q")

    def validated(self):
        """The release with all validated clips; None where it has no such table, or no speakers to split them by."""
        there = self.dialect == "tsv" and (self.folder / VALIDATED).is_file()
        return Release(self.folder) if there else None

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

        It also has ``up_votes``, ``down_votes`` and ``seconds``: a number, or None where unknown.

        Raises
        ------
        DataError
            When too many rows are damaged, or none is usable.
        """
        self.damaged.clear()
        self.warnings.clear()
        self._named = array("q")
        seconds, usable = self._durations(), False
        for name in self.files:
            places, read = self._headers[name], self._rows(name)
            texts = [(role, places[role]) for role in _TEXTS if role in places]
            unknown = {role: "" for role in _TEXTS if role not in places} | {"split": self._split_of[name]}
            for cells in read:
                path, problem = self._path(cells[places["path"]])
                if problem:
                    read.damaged[problem] += 1
                    continue
                self._named.append(hash(path))
                found = {role: cells[place] and labels.present(cells[place]) for role, place in texts}
                found.update(unknown)
                found["up_votes"] = _number(cells, places.get("up_votes"))
                found["down_votes"] = _number(cells, places.get("down_votes"))
                found["seconds"] = _looked_up(seconds, path) if seconds else _number(cells, places.get("seconds"))
                found["path"], found["row"] = path, read.line
                if not read.is_shifted(found, cells, places):
                    usable = True
                    yield found
            read.report(self.damaged, self.warnings)
        tables.require_usable(usable, f"{', '.join(self.files)} of {self.folder}", self.damaged, self.warnings)

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

    def _rows(self, name):
        return TableRows(self.folder / name, "," if self.dialect == "v1" else "\t")

    def _tables(self):
        more = [self.folder / _DURATIONS] if (self.folder / _DURATIONS).is_file() else []
        return [self.folder / name for name in self.files] + more

    def _path(self, text):
        """Path of a file below the clips, or the reason why the cell is invalid."""
        if self.dialect == "tsv" and _PLAIN_NAME(text):
            return text, None
        if not text:
            return "", tables.NO_PATH
        folder, _, name = text.rpartition("/")
        inside = (not folder) if self.dialect == "tsv" else re.fullmatch(r"cv-[a-z-]+", folder)
        if not inside or "\\" in text or "\0" in text or name in ("", ".", "..") or re.match("[A-Za-z]:", text):
            return "", OUTSIDE
        # Versions 2 and 3 omit the suffix of file names.
        return (text if os.path.splitext(text)[1] else text + ".mp3"), None

    def _durations(self):
        """Sorted hashes of file names, and their seconds; None where the release has no durations."""
        if self.dialect == "v1" or not (self.folder / _DURATIONS).is_file():
            return None
        names, values, bad = array("q"), array("d"), 0
        read = self._rows(_DURATIONS)
        name = read.columns.index("clip") if "clip" in read.columns else 0
        unit = next((i for i, column in enumerate(read.columns) if column.startswith("duration")), None)
        if unit is None:
            listed = tables.columns_in_words(read.columns)
            raise DataError(f"{read.path} has no column duration; its columns are {listed}")
        for cells in read:
            value = tables.number_in(cells[unit])
            if value is None or math.isnan(value):
                bad += value is not None
                continue
            names.append(hash(cells[name]))
            values.append(value / 1000)
        if bad := bad + read.damaged.total():
            self.warnings.append(f"{bad} rows of {_DURATIONS} are damaged: those durations are unknown")
        order = np.argsort(np.frombuffer(names, np.int64)) if names else []
        return array("q", [names[i] for i in order]), array("d", [values[i] for i in order])

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
                read = self._rows(path.name)
                place = _places(read).get("path")
                if path.name not in self.files and place is not None:
                    for cells in read:
                        named.append(hash(self._path(cells[place])[0]))
        return np.frombuffer(named, np.int64) if named else np.zeros(0, np.int64)


# Nearly all names match, and this is fast.
_PLAIN_NAME = re.compile(r"[a-z0-9_-]+\.mp3", re.ASCII).fullmatch
_TEXTS = ("client", "sentence", "accent", "variant", "gender", "age")


def _looked_up(seconds, path):
    names, values = seconds
    place = bisect.bisect_left(names, hash(path))
    return values[place] if place < len(names) and names[place] == hash(path) else None


# Votes are small numbers: most are looked up.
_number_in = lru_cache(maxsize=1000)(tables.number_in)


def _number(cells, place):
    return None if place is None else _number_in(cells[place])


def _places(read):
    """Role -> index of its column, for the roles that a table has."""
    found = {role: next((n for n in names if n in read.columns), None) for role, names in _COLUMNS.items()}
    found = {role: name for role, name in found.items() if name}
    tables.require_once(read.path, read.columns, found.values())
    return {role: read.columns.index(name) for role, name in found.items()}


def _header(read):
    """The same; a table without path and accent is refused."""
    found = _places(read)
    for role in ("path", "accent"):
        if role not in found:
            names, listed = " or ".join(_COLUMNS[role]), tables.columns_in_words(read.columns)
            raise DataError(f"{read.path} has no column {names}; its columns are {listed}")
    return found


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
