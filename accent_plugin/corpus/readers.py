"""Readers of the metadata of a corpus: a Common Voice release, a table, folders, a DatasetDict, the Hub.

A reader has ``kind`` and ``name`` for messages, ``has_clients`` (whether it names speakers), ``without_clients``
(advice where it does not), ``fingerprint()`` (identifies its contents), ``cells()`` (one dictionary per clip, see
``selection``), ``absent(rows)`` (which have no file), ``sound(row)`` (the bytes of a file, or its path), and
``damaged`` and ``warnings``, which ``cells`` and ``absent`` fill.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.corpus import common_voice, tables
from accent_plugin.data import dataset_dict, labels, naming, selection
from accent_plugin.errors import ConfigError, DataError

_TABLE_COLUMNS = {role: usual for role, usual in naming.COLUMN_NAMES.items() if role != "audio"} | {
    "path": ("path", "file", "filename", "file_name", "wav", "audio"),
    "split": ("split",),
    "seconds": ("seconds", "duration"),
}


_UNDERSTOOD = (
    "a source is a Common Voice release, a DatasetDict, a folder with one sub-folder of audio per accent, a CSV"
    " file, a folder of Parquet files, or the name of a data set on the Hub"
)


@dataclass(frozen=True)
class Reading:
    """How to read a source, where it cannot be detected.

    Arguments
    ---------
    files : sequence of str or None
        Tables of a Common Voice release to read.
    client_pattern : str or None
        For folders per accent: a regular expression for the path of a clip below its accent's folder; the first group
        is the speaker.
    config : str or None
        Configuration of a data set on the Hub.
    path_column, accent_column, client_column, sentence_column, audio_column : str or None
        Names of columns; None finds them.
    """

    files: tuple[str, ...] | None = None
    client_pattern: str | None = None
    config: str | None = None
    path_column: str | None = None
    accent_column: str | None = None
    client_column: str | None = None
    sentence_column: str | None = None
    audio_column: str | None = None

    def columns(self):
        """Role -> name of the column, of those that are given."""
        given = {role: getattr(self, f"{role}_column") for role in ("path", "accent", "client", "sentence", "audio")}
        return {role: name for role, name in given.items() if name}


_COLUMNS = tuple(field.name for field in fields(Reading) if field.name.endswith("_column"))


def open_source(source, reading=None, official=False):
    """Detect the kind of a source, and open it.

    Arguments
    ---------
    source : str or Path
        A path, or the name of a data set on the Hub. A reader is returned as it is.
    reading : Reading, optional
    official : bool
        Read the official splits of a Common Voice release; other sources always give theirs.

    Returns
    -------
    object
        A reader.

    Raises
    ------
    DataError
        When the source is of no known kind.
    ConfigError
        When an option of ``reading`` does not apply to this source.
    """
    reading = reading or Reading()

    def require_only(what, *allowed):
        given = [field.name for field in fields(Reading) if getattr(reading, field.name)]
        if useless := [name for name in given if name not in allowed]:
            raise ConfigError(f"{', '.join(useless)} does not apply to {what}: leave it out")

    if not isinstance(source, str | os.PathLike):
        require_only(f"a reader of {source.kind}")
        return source
    path, columns = Path(source), reading.columns()
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        require_only("a table", *_COLUMNS)
        return Table(path, columns)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            require_only("a DatasetDict", *_COLUMNS)
            return Saved(path, columns)
        if common_voice.is_release(path):
            require_only("a Common Voice release", "files")
            return common_voice.Release(path, reading.files, official)
        if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
            require_only("a folder of Parquet files", "config", *_COLUMNS)
            return Hub(str(source), reading.config, columns)
        if any(_sounds(child) for child in path.iterdir() if child.is_dir() and not _looks_like_release(child)):
            require_only("folders per accent", "client_pattern")
            return Folders(path, reading.client_pattern)
    # A mistyped folder must not be looked for on the Hub, which takes half a minute to fail.
    in_a_folder = str(path.parent) != "." and path.parent.exists()
    if not path.exists() and not in_a_folder and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        require_only("a data set on the Hub", "config", *_COLUMNS)
        return Hub(str(source), reading.config, columns)
    try:
        return common_voice.Release(path, reading.files, official)
    except DataError as error:
        raise DataError(f"{error}\n{_UNDERSTOOD}") from None


class Table:
    """A CSV or TSV file with columns for path, accent and, if known, speaker; see ``open_source``."""

    kind = "table"
    without_clients = "if a column names the speakers, give it as client_column"

    def __init__(self, path, columns):
        self.path, self.name = path.absolute(), path.stem
        self.damaged, self.warnings = Counter(), []
        header = tables.TableRows(self.path).columns
        self._columns = _find_columns(self.path, header, _TABLE_COLUMNS, columns, ("path", "accent"))
        tables.require_once(self.path, header, [name for name in self._columns.values() if name])
        self.has_clients = self._columns["client"] is not None

    def fingerprint(self):
        """Name, size and digest of the file."""
        content = hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()
        return {"kind": self.kind, "name": self.name, "files": {self.path.name: {"blake2b": content}}}

    def cells(self):
        """Yield the metadata of each clip."""
        self.damaged.clear()
        self.warnings.clear()
        read = tables.TableRows(self.path)
        places = {role: read.columns.index(name) for role, name in self._columns.items() if name}
        unknown = dict.fromkeys(self._columns.keys() - places.keys(), "")
        usable = False
        for row in read:
            cells = unknown | {role: labels.present(row[place].strip()) for role, place in places.items()}
            if not cells["path"]:
                read.damaged[tables.NO_PATH] += 1
                continue
            found = cells | {"row": read.line, "seconds": tables.number_in(cells["seconds"])}
            if not read.is_shifted(found, row, places):
                usable = True
                yield found
        read.report(self.damaged, self.warnings)
        tables.require_usable(usable, self.path, self.damaged, self.warnings)

    def absent(self, rows):
        """Which rows have no file."""
        return _without_file(self, rows)

    def sound(self, row):
        """Path of a clip; relative ones start at the table's folder."""
        return str(self.path.parent / row.path)


class Folders:
    """A folder with one sub-folder of audio per accent, and in those one per speaker where speakers are known."""

    kind = "folders per accent"
    without_clients = "put each speaker's clips in a folder of their own, or give client_pattern"

    def __init__(self, folder, client_pattern=None):
        self.folder = folder.absolute()
        self.name = self.folder.name
        self.damaged, self.warnings = Counter(), []
        try:
            self._pattern = re.compile(client_pattern) if client_pattern else None
        except re.error as error:
            raise ConfigError(f"client_pattern {client_pattern!r} is not a regular expression: {error}") from None
        if self._pattern and not self._pattern.groups:
            raise ConfigError(f"client_pattern {client_pattern!r} has no group: put the speaker in parentheses")
        self._files = sorted(
            (child.name, path.relative_to(child).as_posix())
            for child in self.folder.iterdir()
            if child.is_dir() and not child.name.startswith(".")
            for path in _sounds(child)
        )
        self.has_clients = any(self._speaker(*entry) for entry in self._files)
        others = Counter(path.suffix.lower() or path.name for path in _files(self.folder))
        for _, below in self._files:
            others[Path(below).suffix.lower()] -= 1
        if left := +others:
            counts = selection.in_words(left)
            self.warnings.append(f"files without an audio suffix, or outside the accents' folders: {counts}")

    def fingerprint(self):
        """Digest of names, sizes and times of all files."""
        found = [[*entry, *self._stat(entry)] for entry in self._files]
        return {
            "kind": self.kind,
            "name": self.name,
            "files": {"count": len(found), "blake2b": selection.digest(found)},
        }

    def cells(self):
        """Yield the metadata of each clip."""
        for number, (accent, below) in enumerate(self._files):
            yield {
                "client": self._speaker(accent, below),
                "path": f"{accent}/{below}",
                "sentence": "",
                "accent": accent,
                "gender": "",
                "age": "",
                "split": "",
                "row": number,
            }

    def absent(self, rows):
        """Which rows have no file."""
        return _without_file(self, rows)

    def sound(self, row):
        """Path of a clip."""
        return str(self.folder / row.path)

    def _speaker(self, accent, below):
        """A speaker's folder, after the accent's, since the speakers of each accent are often numbered from 1."""
        if self._pattern:
            match = self._pattern.match(below)
            return f"{accent}/{match[1]}" if match and match[1] else ""
        return f"{accent}/{below.partition('/')[0]}" if "/" in below else ""

    def _stat(self, entry):
        found = self.folder.joinpath(*entry).stat()
        return found.st_size, found.st_mtime_ns


class _Datasets:
    """Splits of a Hugging Face data set, opened without decoding anything."""

    without_clients = "if a column names the speakers, give it as client_column"

    def __init__(self, loaded, where, columns):
        self._loaded, self._where = loaded, where
        self._columns = {
            split: dataset_dict.find_columns(split, data, where, columns) for split, data in loaded.items()
        }
        self.has_clients = any(found["client"] for found in self._columns.values())
        self.damaged = Counter()

    def cells(self):
        """Yield the metadata of each clip."""
        for split, data in self._loaded.items():
            for number, cells in enumerate(dataset_dict.read_cells(data, self._columns[split])):
                yield cells | {"split": split, "row": number}

    def absent(self, rows):
        """Which rows have no audio."""
        return np.array([self._is_absent(self.sound(row)) for row in rows], bool)

    def sound(self, row):
        """Bytes of a clip, or its path where none are embedded."""
        content = dataset_dict.audio_bytes_or_path(self._loaded[row.split], self._columns[row.split], row.row)
        return content if isinstance(content, bytes) else str(self._where / content)

    def content_of(self, row):
        """Digest of a clip's audio."""
        return dataset_dict.content_digest(self._loaded[row.split], self._columns[row.split], row.row)

    @staticmethod
    def _is_absent(content):
        return not content if isinstance(content, bytes) else not os.path.isfile(content)


class Saved(_Datasets):
    """A DatasetDict on disk."""

    kind = "DatasetDict"

    def __init__(self, folder, columns):
        self.folder = folder.absolute()
        self._identity = dataset_dict.fingerprint(self.folder)
        loaded, self.warnings = dataset_dict.open_splits(self.folder)
        super().__init__(loaded, self.folder, columns)
        self.name = self._identity["card"].get("name") or self.folder.name

    def fingerprint(self):
        """Names, sizes and times of its files, and its card."""
        return {"kind": self.kind, "name": self.name, **self._identity}


class Hub(_Datasets):
    """A data set on the Hub, or a folder of Parquet files."""

    kind = "data set of the Hub"

    def __init__(self, name, config, columns):
        import datasets

        local = Path(name).is_dir()
        try:
            loaded = datasets.load_dataset(str(Path(name).absolute()) if local else name, config)
        except Exception as error:
            # Each way to fetch data raises its own exceptions; all mean that there are none.
            where = "cannot be read" if local else "is not a folder here and cannot be loaded from the Hub"
            raise DataError(
                f"{name} {where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
                "check the name and the connection; for gated data log in first: hf auth login"
            ) from None
        self.name, self.warnings = Path(name).name if local else name, []
        self._identity = {split: data._fingerprint for split, data in loaded.items()}
        loaded = {split: _undecoded(data) for split, data in loaded.items()}
        super().__init__(loaded, Path(name) if local else Path(), columns)
        self._config = config

    def fingerprint(self):
        """The fingerprint of each split in ``datasets``."""
        return {"kind": self.kind, "name": self.name, "config": self._config, "splits": self._identity}


def _undecoded(data):
    from datasets import Audio

    for name, kind in data.features.items():
        if isinstance(kind, Audio):
            data = data.cast_column(name, Audio(decode=False))
    return data.with_format("arrow")


def _find_columns(where, header, known, given, required):
    found, listed = {}, tables.columns_in_words(header)
    for role in known:
        if role in given and given[role] not in header:
            raise DataError(f"{role}_column is '{given[role]}', which {where} does not have: columns are {listed}")
        found[role] = given.get(role) or naming.find_column(role, header, known)
        if role in required and not found[role]:
            raise DataError(f"no {role} column in {where}: columns are {listed}\npass --{role}_column NAME")
    return found


def _sounds(folder):
    return [path for path in _files(folder) if path.suffix.lower() in codecs.SUFFIXES]


def _files(folder):
    """Files in and below a folder, also through links, without hidden ones such as ._a.wav of macOS."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        # A link may lead back to a folder above it.
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names if not name.startswith(".") and Path(where, name).is_file())


def _looks_like_release(folder):
    return any(folder.glob("*.tsv"))


def _without_file(reader, rows):
    missing = np.array([not os.path.isfile(reader.sound(row)) for row in rows], bool)
    if len(rows) and missing.all():
        raise DataError(f"none of the {len(rows)} clips of {reader.name} exists, for example {reader.sound(rows[0])}")
    return missing
