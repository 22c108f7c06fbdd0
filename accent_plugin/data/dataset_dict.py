"""Read a DatasetDict on disk: its splits, columns and cells, without decoding audio.

``datasets`` is imported only when rows are read: file names and times suffice to see whether anything has changed.
"""

import hashlib
import itertools
import json
import os
from pathlib import Path

from accent_plugin.data import labels, naming
from accent_plugin.data.naming import COLUMN_NAMES
from accent_plugin.errors import DataError, ManifestError

CARD_JSON = "accent_plugin.json"
_LISTING = "dataset_dict.json"
_STATE = "state.json"
_ROWS_PER_SLICE = 64


def read_json(path, error=ManifestError, first_line=False):
    """Content of a JSON file, or of the first line of a file of JSON lines."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.loads(file.readline() if first_line else file.read())
        if not isinstance(value, dict):
            raise ValueError("it holds no mapping")
        return value
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise error(f"{path} is damaged ({problem}): remove it, or make it again") from None


def content_digests(data_folder):
    """Digest of every Arrow file of a DatasetDict, by its path in the folder; reads all of them."""
    found = {}
    for path in sorted(data_folder.glob("*/*.arrow")):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        found[path.relative_to(data_folder).as_posix()] = digest.hexdigest()
    return found


def fingerprint(data_folder):
    """Identify the data without reading it, by names, sizes and times of the files of each split.

    Raises
    ------
    DataError
        When there is no DatasetDict in the folder.
    """
    if not data_folder.is_dir():
        raise DataError(
            f"there is no folder {data_folder}\n"
            "give a DatasetDict saved with save_to_disk; to make one from a Common Voice release or of other clips:"
            " accent-plugin prepare\nto try the built-in synthetic corpus instead: make demo"
        )
    listing = data_folder / _LISTING
    if not listing.is_file():
        if (data_folder / _STATE).is_file():
            raise DataError(
                f"{data_folder} holds a Dataset (or one split), not a DatasetDict\n"
                "wrap it: datasets.DatasetDict(train=datasets.load_from_disk(OLD)).save_to_disk(NEW)\n"
                "a single split is then split by speaker here"
            )
        raise DataError(
            f"{data_folder} holds no DatasetDict: it has no dataset_dict.json\n"
            "give a DatasetDict saved with save_to_disk; to make one from a Common Voice release or of other clips:"
            " accent-plugin prepare"
        )
    found = {}
    for split in sorted(read_json(listing, DataError).get("splits", ())):
        state = read_json(data_folder / split / _STATE, DataError)
        stats = {path.name: path.stat() for path in sorted((data_folder / split).glob("*.arrow"))}
        files = {name: [entry.st_size, entry.st_mtime_ns] for name, entry in stats.items()}
        found[split] = {"fingerprint": state.get("_fingerprint"), "files": files}
    if not found:
        raise DataError(f"{listing} names no split: train, validation and test are expected, or one of them")
    return {"splits": found, "card": card(data_folder)}


def card(data_folder):
    """The card of the data set, or an empty dictionary."""
    path = data_folder / CARD_JSON
    return read_json(path, DataError) if path.is_file() else {}


def open_splits(data_folder, source_splits=None, option=None):
    """Open the splits to use: name in the source -> Dataset in Arrow format, which decodes nothing; and warnings.

    Arguments
    ---------
    data_folder : Path
    source_splits : sequence of str, optional
        Splits to use, by name or by kind; None uses those whose names say that they are train, validation or test.
    option : str, optional
        Name of the option that gives `source_splits`, for messages; None where there is none.

    Raises
    ------
    DataError
        When it cannot be read, or its splits are not train, validation and test.
    """
    loaded = _load(data_folder)
    found = list(loaded)
    remedy = f"name those to use in {option}, or rename them" if option else "rename them"
    if source_splits:
        found = naming.asked_splits(found, source_splits, option)
    elif len(found) > 1:
        found = [name for members in naming.splits_by_kind(found, remedy).values() for name in members]
    kinds = {name: naming.split_kind(name) for name in found}
    # A split that is alone, or asked for alone, may have any name.
    alone = len(found) == 1 and (source_splits or len(loaded) == 1)
    if not alone and (None in kinds.values() or naming.TRAIN not in kinds.values()):
        raise DataError(
            f"{data_folder} has the splits {', '.join(loaded)}: which of them are train, validation and test?\n{remedy}"
        )
    unused = [
        f"split '{name}' of the source was not used ({len(loaded[name])} clips)" for name in loaded.keys() - kinds
    ]
    # Once, not per clip, because it copies the features.
    return {name: loaded[name].with_format("arrow") for name in loaded if name in kinds}, sorted(unused)


def open_all(data_folder):
    """Open every split, whatever its name: name in the source -> Dataset in Arrow format, which decodes nothing.

    Raises
    ------
    DataError
        When it cannot be read.
    """
    return {name: data.with_format("arrow") for name, data in _load(data_folder).items()}


def _load(data_folder):
    import datasets

    try:
        return datasets.load_from_disk(str(data_folder))
    except IndexError:
        # The library saves a split without rows as no file at all, and cannot read that.
        states = sorted(Path(data_folder).glob("*/state.json"))
        empty = [path.parent.name for path in states if not read_json(path, DataError).get("_data_files")]
        raise DataError(
            f"{data_folder} cannot be read: its split {' and '.join(empty) or '?'} has no rows\n"
            "save the DatasetDict again without it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{data_folder} cannot be read as a DatasetDict: {error}") from None


def find_columns(split, data, data_folder, given):
    """Role -> name of the column, None where there is none; `given` holds those that the user names.

    Raises
    ------
    DataError
        When a column is missing or of the wrong type.
    """
    where, listed = data_folder / split, f"columns are {', '.join(data.column_names)}"
    found = {}
    for role in COLUMN_NAMES:
        if given.get(role) and given[role] not in data.column_names:
            raise ManifestError(f"{role}_column is '{given[role]}', which {where} does not have: {listed}")
        found[role] = given.get(role) or naming.find_column(role, data.column_names)
    if not found["audio"]:
        sounds = [name for name, kind in data.features.items() if type(kind).__name__ == "Audio"]
        found["audio"] = sounds[0] if len(sounds) == 1 else None
    for role in ("audio", "accent"):
        if not found[role]:
            raise ManifestError(
                f"no {role} column in {where}: {listed}\npass --{role}_column NAME if yours is called differently"
            )
    kind = data.features.arrow_schema.field(found["audio"]).type
    fields = {kind.field(i).name for i in range(kind.num_fields)}
    if not ({"bytes", "path"} <= fields or str(kind) in ("string", "large_string")):
        raise DataError(
            f"column '{found['audio']}' of {where} holds {kind}, not audio: an Audio feature, {{bytes, path}} or paths"
        )
    accent = data.features[found["accent"]]
    if getattr(accent, "names", None) is None and "int" in str(getattr(accent, "dtype", "")):
        raise DataError(
            f"column '{found['accent']}' of {where} holds numbers without names: cast it to ClassLabel(names=[...])"
        )
    return found


def read_cells(data, columns):
    """Yield the text of one row at a time, without its audio."""
    import pyarrow.compute

    classes = {role: getattr(data.features[name], "names", None) for role, name in columns.items() if name}
    for start in range(0, len(data), 1000):
        table = data[start : start + 1000]
        texts = {role: table[columns[role]].to_pylist() for role in classes if role != "audio"}
        cells = {role: [_text(value, classes[role]) for value in column] for role, column in texts.items()}
        if "path" not in cells:
            sounds = table[columns["audio"]]
            if "string" not in str(sounds.type)[:12]:
                sounds = pyarrow.compute.struct_field(sounds, "path")
            cells["path"] = [_text(value) for value in sounds.to_pylist()]
        for i in range(len(table)):
            yield {role: cells[role][i] if role in cells else "" for role in COLUMN_NAMES if role != "audio"}


def _text(value, classes=None):
    if value is None or value != value or (classes and value == -1):
        return ""
    if classes:
        return classes[value]
    return "|".join(map(_text, value)) if isinstance(value, list) else labels.present(str(value).strip())


def audio_bytes_or_path(data, columns, number):
    """One clip's bytes, or its path where none are embedded."""
    return next(read_audio(data, columns, [number]))


def read_audio(data, columns, numbers):
    """Yield the bytes, or the path, of the clips with these row numbers, which ascend."""
    # A slice of one row takes as long as one of many, whose audio stays on the disk.
    for _, group in itertools.groupby(numbers, key=lambda number: number // _ROWS_PER_SLICE):
        block = list(group)
        cells = data[block[0] : block[-1] + 1][columns["audio"]]
        yield from (_bytes_or_path(cells[number - block[0]].as_py()) for number in block)


def _bytes_or_path(cell):
    cell = cell if isinstance(cell, dict) else {"bytes": None, "path": cell}
    return cell["bytes"] if cell["bytes"] is not None else cell["path"] or b""


def moved_audio(sounds):
    """Advice where files are not there because the folder that held them is gone; "" otherwise.

    Arguments
    ---------
    sounds : iterable of bytes or str
        As from ``audio_bytes_or_path``, absolute.
    """
    gone = [os.path.dirname(sound) for sound in sounds if isinstance(sound, str) and not os.path.exists(sound)]
    if not gone:
        return ""
    folder = Path(os.path.commonpath(gone))
    if folder.exists():
        return ""
    while not folder.parent.exists():
        folder = folder.parent
    return (
        f"the folder {folder} is gone: the data refer to audio there and do not embed it\n"
        f"move it back, or link its new place to the old one: ln -s NEW_FOLDER {folder}"
    )


def content_digest(data, columns, number):
    """Digest of one clip's bytes, or of its path where none are embedded."""
    content = audio_bytes_or_path(data, columns, number)
    return hashlib.blake2b(content if isinstance(content, bytes) else content.encode()).hexdigest()
