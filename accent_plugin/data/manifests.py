"""CSV manifests and prepared folders: records, reading, writing."""

import csv
import dataclasses
import io
import itertools
import os
import pickle
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data import dataset_dict
from accent_plugin.data import splits as data_splits
from accent_plugin.errors import ManifestError

COLUMNS = ("ID", "duration", "wav", "accent", "client_id", "gender", "age")
DATA_ROOT = "$data_root"
PREPARE_JSON = "prepare.json"
FORMAT_VERSION = 1
AUDIO_FOLDER = "audio"
# Beside the manifest of the test split, if its sentences are known. Not columns of the manifest: its bytes identify the
# data of a run.
SEEN_FILE = "test_seen.csv"
SEEN_COLUMNS = ("ID", "words_seen", "sentence_seen")


@dataclass(frozen=True)
class Clip:
    """One row of a manifest; ``wav`` is an absolute path, ``duration`` in seconds.

    ``words_seen`` and ``sentence_seen`` compare the text of a test clip with training, as in
    `accent_plugin.data.splits.seen_in_training`; "" if unknown.
    """

    id: str
    duration: float
    wav: str
    accent: str
    client_id: str
    gender: str
    age: str
    words_seen: str = ""
    sentence_seen: str = ""


class Clips(Sequence):
    """Any number of clips in two objects; each clip is unpickled on access.

    Reference counts are written even when an object is only read: in the course of an epoch, every worker process would
    copy all clips if they were objects.

    Arguments
    ---------
    clips : iterable of Clip

    Example
    -------
    >>> clips = Clips(Clip(name, 1.5, f"/clips/{name}.flac", "us", "", "", "") for name in "abc")
    >>> len(clips), clips[-1].wav, [clip.id for clip in clips[1:]]
    (3, '/clips/c.flac', ['b', 'c'])
    """

    def __init__(self, clips):
        rows, ends = io.BytesIO(), array("q", [0])
        for clip in clips:
            rows.write(pickle.dumps(tuple(vars(clip).values())))
            ends.append(rows.tell())
        self._rows, self._ends = rows.getvalue(), ends

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Clips(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        return self._between(self._ends[number], self._ends[number + 1])

    def __iter__(self):
        return itertools.starmap(self._between, itertools.pairwise(self._ends))

    def _between(self, start, end):
        return Clip(*pickle.loads(self._rows[start:end]))


@dataclass(frozen=True)
class Prepared:
    """The contents of a prepared folder.

    Arguments
    ---------
    folder : Path
        The prepared folder; ``$data_root`` of the manifests.
    name : str
        Name of the data set.
    synthetic : bool
        Whether its speech is synthetic.
    speakers_disjoint : bool or None
        False for a random split; None where the data names no speakers.
    splits : dict
        Split -> CSV path; empty when there are folds.
    folds : tuple of dict
        The same for each fold; empty when there are none.
    counts : dict
        Split -> accent -> {"clips", "speakers", "seconds"}; with folds, "fold_<k>" -> such a dictionary.
    dropped : dict
        Reason -> number of dropped clips (those of single folds are in prepare.json).
    warnings : tuple of str
        For the report.
    fingerprint : str
        Of source and arguments.
    arguments : dict
        Of ``PreparationChoices``.
    card : dict
        The card of the data set; empty where it has none.
    """

    folder: Path
    name: str
    synthetic: bool
    speakers_disjoint: bool | None
    splits: dict
    folds: tuple[dict, ...]
    counts: dict
    dropped: dict
    warnings: tuple[str, ...]
    fingerprint: str
    arguments: dict
    card: dict = dataclasses.field(default_factory=dict)

    def paths(self, fold=None):
        """Split -> CSV path, of one fold (counted from 1) where there are folds."""
        if not self.folds and fold is None:
            return self.splits
        if fold not in range(1, len(self.folds) + 1):
            what = f"folds 1 to {len(self.folds)}" if self.folds else "no folds"
            raise ManifestError(f"fold {fold} was asked for; {self.folder} has {what}")
        return self.folds[fold - 1]


def load_prepared(prepared_folder):
    """Read a prepared folder, and check that it is complete.

    Raises
    ------
    ManifestError
        When it is not finished, damaged, or of another version.
    """
    folder = Path(prepared_folder).absolute()
    made = dataset_dict.read_json(folder / PREPARE_JSON)
    try:
        if made["format_version"] != FORMAT_VERSION:
            raise ManifestError(
                f"{folder / PREPARE_JSON} has format_version {made['format_version']}; this version reads"
                f" {FORMAT_VERSION}: prepare the data again into a new folder"
            )
        for name, size in made["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ManifestError(f"{folder / name} is missing or was changed since it was prepared: prepare again")
        present = sum(name.endswith(".flac") for _, _, names in os.walk(folder / AUDIO_FOLDER) for name in names)
        if present < made["audio_files"]:
            raise ManifestError(
                f"{folder / AUDIO_FOLDER} holds {present} clips of {made['audio_files']}: prepare again"
            )
        count = made["arguments"]["n_folds"]
        return Prepared(
            folder=folder,
            name=made["name"],
            synthetic=made["synthetic"],
            speakers_disjoint=made["speakers_disjoint"],
            splits={} if count else manifest_paths(folder),
            folds=tuple(manifest_paths(folder / f"fold_{k + 1}") for k in range(count)),
            counts=made["counts"],
            dropped=made["dropped"],
            warnings=tuple(made["warnings"]),
            fingerprint=made["fingerprint"],
            arguments=made["arguments"],
            card=made["source"].get("card", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{folder / PREPARE_JSON} is damaged ({error!r}): remove it and prepare again") from None


def read_manifest(csv_path, data_root=None):
    """Read one manifest.

    Arguments
    ---------
    csv_path : str or Path
    data_root : str or Path, optional
        Value of ``$data_root``; None takes the folder that holds prepare.json: the CSV's own or the one above.

    Returns
    -------
    Clips

    Raises
    ------
    ManifestError
    """
    path = Path(csv_path).absolute()
    if data_root is None:
        data_root = path.parent.parent if (path.parent.parent / PREPARE_JSON).exists() else path.parent
    data_root, ids = Path(data_root).absolute().as_posix(), set()

    def clips(table, seen):
        for row in table:
            clip = _clip(row, data_root, seen.get(row["ID"], ("", "")))
            if clip.id in ids:
                raise ManifestError(f"{path} has the ID {clip.id} more than once")
            ids.add(clip.id)
            yield clip

    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if missing:
                raise ManifestError(f"{path} lacks column(s) {', '.join(missing)}; it has {table.fieldnames}")
            return Clips(clips(table, _read_seen(path)))
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        raise ManifestError(f"{path} cannot be read as a manifest: {error}") from None


def write_manifest(path, rows, outcomes):
    """Write the manifest of one split."""
    with files.atomic_write(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in rows:
            duration = f"{outcomes[row.id].frames / SAMPLE_RATE:.4f}"
            cells = map(escape_cell, (row.accent, row.speaker, row.gender, row.age))
            table.writerow((row.id, duration, f"{DATA_ROOT}/{wav_cell(row.id)}", *cells))


def write_seen(path, seen):
    """Write the result of `accent_plugin.data.splits.seen_in_training`."""
    with files.atomic_write(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(SEEN_COLUMNS)
        table.writerows((id_, *texts) for id_, texts in seen.items())


def _read_seen(manifest):
    path = manifest.with_name(SEEN_FILE)
    if manifest.name != f"{data_splits.TEST}.csv" or not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row[SEEN_COLUMNS[0]]: tuple(row[name] for name in SEEN_COLUMNS[1:]) for row in csv.DictReader(file)}


def _clip(row, data_root, seen):
    wav = row["wav"]
    if not wav.startswith(DATA_ROOT + "/"):
        raise ValueError(f"wav '{wav}' does not begin with {DATA_ROOT}/")
    return Clip(
        id=row["ID"],
        duration=float(row["duration"]),
        wav=f"{data_root}/{wav[len(DATA_ROOT) + 1 :]}",
        accent=_unescape(row["accent"]),
        client_id=_unescape(row["client_id"]),
        gender=_unescape(row["gender"]),
        age=_unescape(row["age"]),
        **dict(zip(SEEN_COLUMNS[1:], seen, strict=True)),
    )


def escape_cell(text):
    """Escape characters that SpeechBrain or CSV readers would interpret."""
    return re.sub(r"[%$\r\n\0]", lambda match: f"%{ord(match[0]):02X}", text)


def _unescape(text):
    return re.sub(r"%(25|24|0D|0A|00)", lambda match: chr(int(match[1], 16)), text) if "%" in text else text


def wav_cell(id_):
    """Path of a clip's audio within the prepared folder."""
    # At most some thousand files per folder, even for a whole release.
    return f"{AUDIO_FOLDER}/{id_[:2]}/{id_}.flac"


def manifest_paths(folder):
    """Split -> path of its manifest."""
    return {split: folder / f"{split}.csv" for split in data_splits.SPLITS}
