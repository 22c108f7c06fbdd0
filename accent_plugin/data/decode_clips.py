"""Decode the selected clips, with a journal from which an interrupted preparation is resumed."""

import contextlib
import itertools
import json
import logging

from accent_plugin import files
from accent_plugin.audio.samples import EMPTY, NON_FINITE, OUT_OF_RANGE, UNDECODABLE
from accent_plugin.audio.workers import ConversionJob, Converted, convert_files, worker_count
from accent_plugin.data import dataset_dict, selection
from accent_plugin.data.manifests import AUDIO_FOLDER, wav_cell
from accent_plugin.errors import DataError

logger = logging.getLogger(__name__)


# Reasons that count as broken files; the others follow from the options.
UNREADABLE = (UNDECODABLE, EMPTY, NON_FINITE, OUT_OF_RANGE)
JOURNAL_FILE = "audio.jsonl"


# ---------------------------------------------------------------------------------------------------------- decoding


class Journal:
    """The finished clips, in a file that survives an interruption at any byte."""

    def __init__(self, path, header):
        self.path, self.outcomes = path, {}
        if not path.exists():
            with files.atomic_write(path) as file:
                file.write(json.dumps(header) + "\n")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            with contextlib.suppress(ValueError, TypeError):
                outcome = Converted(**json.loads(line))
                self.outcomes[outcome.id] = outcome

    def __enter__(self):
        self._file = open(self.path, "a", encoding="utf-8")
        # Ends a truncated line.
        self._file.write("\n")
        return self

    def __exit__(self, *_):
        self._file.close()

    def add(self, outcome):
        """Record a finished clip."""
        # Failures are tried again: a disk that was not mounted may be mounted next time.
        if not outcome.reason:
            self._file.write(json.dumps(vars(outcome)) + "\n")
            self._file.flush()


def decode_clips(wanted, loaded, columns, data_folder, folder, choices, journal, workers, progress):
    """Decode the clips that are missing; return id -> outcome for all of ``wanted``."""
    from tqdm import tqdm

    outcomes = {id_: o for id_, o in journal.outcomes.items() if id_ in wanted and _still_there(folder, o)}
    waiting = sorted((r for r in wanted.values() if r.id not in outcomes), key=lambda r: (r.split, r.row))
    if outcomes:
        logger.info("%d of %d clips are there from before", len(outcomes), len(wanted))
    for leftover in (folder / AUDIO_FOLDER).glob("*/.*.tmp"):
        leftover.unlink(missing_ok=True)
    for prefix in sorted({row.id[:2] for row in waiting}):
        (folder / AUDIO_FOLDER / prefix).mkdir(parents=True, exist_ok=True)

    def jobs():
        for split, group in itertools.groupby(waiting, key=lambda row: row.split):
            rows = list(group)
            sounds = dataset_dict.read_audio(loaded[split], columns[split], [row.row for row in rows])
            for row, sound in zip(rows, sounds, strict=True):
                target = str(folder / wav_cell(row.id))
                source = _absolute(sound, data_folder)
                yield ConversionJob(row.id, source, target, choices.min_seconds, choices.max_seconds)

    allowed, unreadable = choices.max_unreadable_share * len(wanted), []
    converted = convert_files(jobs(), worker_count(workers, len(waiting)))
    bar = tqdm(total=len(waiting), desc="preparing", unit="clip", disable=not progress or not waiting)
    with bar, contextlib.closing(converted):
        for outcome in converted:
            outcomes[outcome.id] = outcome
            journal.add(outcome)
            bar.update()
            unreadable += [outcome] if outcome.reason in UNREADABLE else []
            if len(unreadable) > allowed:
                break
    if len(unreadable) > allowed:
        shown = "\n".join(f"  {selection.place(wanted[o.id])}: {o.reason}: {o.message}" for o in unreadable[:5])
        rows = [wanted[outcome.id] for outcome in unreadable]
        sounds = (dataset_dict.audio_bytes_or_path(loaded[row.split], columns[row.split], row.row) for row in rows)
        moved = dataset_dict.moved_audio(_absolute(sound, data_folder) for sound in sounds)
        raise DataError(
            f"{len(unreadable)} of {len(wanted)} clips cannot be read: more than max_unreadable_fraction"
            f" {choices.max_unreadable_share:g} allows\n{shown}\n"
            + (moved and f"{moved}\n")
            + "check the data; to go on without them, prepare into another folder with a larger max_unreadable_fraction"
        )
    return outcomes


def _absolute(sound, data_folder):
    """A clip's bytes, or its absolute path."""
    return sound if isinstance(sound, bytes) else str(data_folder / sound)


def _still_there(folder, outcome):
    with contextlib.suppress(OSError):
        return (folder / wav_cell(outcome.id)).stat().st_size == outcome.size
    return False
