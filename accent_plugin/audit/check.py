"""Audit of a DatasetDict for accent classification: leaks, contradictions, broken files, confounds.

It reads every split of any DatasetDict and changes nothing. Kinds of findings:

=============  ========  =============================================================================================
kind           severity  finding
=============  ========  =============================================================================================
client         error     a speaker in more than one split; a warning if the data have no client ids
sentence       error     a sentence (letters and digits, see ``splits.normalise_sentence``) in more than one split
contradiction  error     a speaker with more than one accent
audio          error     the same samples in two splits or with two accents or speakers; otherwise a warning
undecodable    error     files that are undecodable, empty, non-finite, out of range, silent, or too long to be one clip
damaged        warning   files of which a part could not be decoded
missing        error     an accent without clips in a split
unlabelled     warning   rows without an accent; an error if all rows lack one
balance        warning   an accent with more than 3 times as many clips in train as another
rate           warning   clips that are too long or too short for their sentence (``data.speech_rate``)
channel        error     the recording conditions predict the accent (``confounds.run_confound_test``); a warning if
                         this cannot be tested
=============  ========  =============================================================================================

Samples are the same if they are equal in 16 bits after decoding to mono: a recording as FLAC and as WAV, but not after
lossy compression, cutting or resampling. Accents that ``labels`` does not know keep their spelling, so that any corpus
can be checked. Nothing here imports torch; rows are streamed, and only a few numbers of each are kept.
"""

from pathlib import Path

from accent_plugin.audit import confounds
from accent_plugin.audit.audio_checks import (
    WITHOUT_AUDIO,
    channel_finding,
    confound_notes,
    damaged_clips,
    duplicate_clips,
    measure_clips,
    measure_confounds,
    unusable_clips,
    unusual_rates,
)
from accent_plugin.audit.findings import KINDS, Audit
from accent_plugin.audit.text_checks import ClipTable, contradictions, imbalance, shared_sentences, shared_speakers
from accent_plugin.data import dataset_dict, labels
from accent_plugin.errors import ConfigError, DataError


def check_dataset(
    data_folder,
    *,
    seed=1986,
    with_audio=True,
    workers=None,
    progress=True,
    permutations=199,
    accent_column=None,
    client_column=None,
    sentence_column=None,
    audio_column=None,
    mapping=None,
):
    """Check every split of a DatasetDict on disk.

    Arguments
    ---------
    data_folder : str or Path
        A DatasetDict saved with ``save_to_disk``, which is not changed. Audio paths may be relative to this folder.
    seed : int
        Seed of the clips, folds and permutations of the confound test.
    with_audio : bool
        Whether to decode every clip.
    workers : int, optional
        Decoding processes; None takes one per core, and this process for a few clips.
    progress : bool
        Whether to draw progress bars on stderr.
    permutations : int
        Permutations of the confound test, 100 or more.
    accent_column, client_column, sentence_column, audio_column : str, optional
        Names of columns; None finds them by their usual names.
    mapping : dict, optional
        Additional accent names, ``{name: label}``.

    Returns
    -------
    Audit

    Raises
    ------
    DataError
        When there is no DatasetDict, or it lacks a required column.
    ConfigError
        When ``permutations`` is too small, or ``workers`` is less than 1.
    """
    confounds.require_permutations(permutations)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; give 1 or more")
    mapping = labels.read_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    data_folder = Path(data_folder).absolute()
    card = dataset_dict.fingerprint(data_folder)["card"]
    loaded = dataset_dict.open_all(data_folder)
    given = {"accent": accent_column, "client": client_column, "sentence": sentence_column, "audio": audio_column}
    columns = {split: dataset_dict.find_columns(split, data, data_folder, given) for split, data in loaded.items()}
    if not sum(map(len, loaded.values())):
        raise DataError(f"{data_folder} has no rows in any of its splits {', '.join(loaded)}: prepare it again")
    table = ClipTable(loaded, columns, seed, mapping)

    findings = [*shared_speakers(table), *shared_sentences(table), *contradictions(table), *imbalance(table)]
    notes, confound, measured, seconds = table.notes(), None, (), None
    if with_audio:
        drawn = confounds.draw(table.accent, table.client, table.ranks(), seed=seed)
        measurements = measure_clips(table, data_folder, drawn, workers, progress)
        seconds = measurements.seconds
        for find in (unusable_clips, damaged_clips, duplicate_clips, unusual_rates):
            findings += find(table, measurements)
        confound, measured = measure_confounds(table, measurements, seed, permutations, progress)
        findings += channel_finding(confound)
        notes += confound_notes(confound, table)
    else:
        notes.append(WITHOUT_AUDIO)
    return Audit(
        name=str(card.get("name") or data_folder.name),
        findings=tuple(sorted(findings, key=lambda found: (found.severity, KINDS.index(found.kind)))),
        counts=table.counts(seconds),
        confound=confound,
        notes=tuple(notes),
        arguments={"seed": seed, "permutations": permutations, "columns": columns},
        measured=measured,
    )
