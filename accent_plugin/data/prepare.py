"""Prepare a DatasetDict on disk: write 16 kHz clips, CSV manifests and ``prepare.json``.

The files in ``prepared_folder``::

    audio/3f/3f...e1.flac    one clip: 16 kHz, mono, 16 bit
    train.csv valid.csv test.csv, or with folds fold_1/train.csv ... fold_5/test.csv
    test_seen.csv            which words and sentences of test are in train, if the sentences are known
    prepare.json             arguments, source, counts, dropped clips by reason; written last
    audio.jsonl              the result of each decoded clip, from which an interrupted run is resumed

``accent_plugin.data.manifests.COLUMNS`` lists the columns of the CSV files. ``wav`` begins with ``$data_root/``, which
stands for ``prepared_folder``. SpeechBrain would replace any other ``$word``: so ``%``, ``$``, line breaks and NUL in
other cells are written as ``%`` and two hexadecimal digits, and ``read_manifest`` decodes them.

Nothing here imports torch, and ``datasets`` only when there is something to do.
"""

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data import dataset_dict, naming, provenance, selection, splits
from accent_plugin.data.decode_clips import JOURNAL_FILE, Journal, decode_clips
from accent_plugin.data.manifests import (
    AUDIO_FOLDER,
    FORMAT_VERSION,
    PREPARE_JSON,
    SEEN_FILE,
    escape_cell,
    load_prepared,
    manifest_paths,
    write_manifest,
    write_seen,
)
from accent_plugin.errors import DataError, ManifestError

logger = logging.getLogger(__name__)


BALANCES = ("downsample", "sampler", "none")
SPLIT_KINDS = ("speaker", "random", "all")
_EXAMPLES = 20


@dataclass(frozen=True)
class PreparationChoices(selection.SharedChoices):
    """The options of a preparation; with the source they determine every byte of the result.

    Arguments
    ---------
    accents : sequence of str
        Labels to keep; names that ``accent_plugin.data.labels`` does not know are used unchanged.
    seed : int
        Determines every draw.
    balance : str
        "downsample": each accent of train has as many clips as the rarest; "sampler" and "none" keep all.
    max_clips_per_client : int or None
        Most clips of one speaker.
    min_seconds, max_seconds : float
        Shorter and longer clips are dropped.
    max_unreadable_share : float
        Preparation stops when a larger fraction of clips is undecodable, empty or non-finite.
    split : str
        "speaker": no speaker in two splits; "random": by clip, ignoring the source's splits, so that splits share
        speakers; "all": every clip in test, for speech that is only scored.
    n_folds : int
        0, or the number of folds that the pooled source is cut into.
    valid_fraction, test_fraction : float
        Fraction of the speakers for each split that the source lacks; in folds, of the training speakers for valid.
    disjoint_sentences : bool
        Drop sentences of test from train and valid, and those of valid from train.
    source_splits : sequence of str or None
        Splits of the source to use; None uses all.
    accent_column, client_column, sentence_column, audio_column : str or None
        Names of columns; None finds them.
    """

    accents: tuple[str, ...]
    seed: int
    balance: str = "downsample"
    max_clips_per_client: int | None = 30
    min_seconds: float = 1.0
    max_seconds: float = 30.0
    max_unreadable_share: float = 0.05
    split: str = "speaker"
    n_folds: int = 0
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    disjoint_sentences: bool = True
    source_splits: tuple[str, ...] | None = None
    accent_column: str | None = None
    client_column: str | None = None
    sentence_column: str | None = None
    audio_column: str | None = None

    def __post_init__(self):
        """Refuse invalid values, all at once."""
        accents, share = self.accents, self.max_unreadable_share
        listed = not isinstance(accents, str) and all(isinstance(a, str) and a and escape_cell(a) == a for a in accents)
        distinct = listed and 0 < len(accents) == len(set(accents))
        self.require(
            SPLIT_KINDS,
            (distinct, f"accents is {accents!r}; give a list of distinct names"),
            (self.balance in BALANCES, f"balance {self.balance!r} is unknown; choose {', '.join(BALANCES)}"),
            (0 <= share <= 1, f"max_unreadable_share is {share}; give 0 to 1"),
            (self.n_folds == 0 or self.n_folds > 1, f"n_folds is {self.n_folds}; give 0 for none, or 2 or more"),
        )


def prepare_data(data_folder, prepared_folder, *, workers=None, progress=True, **choices):
    """Turn a DatasetDict on disk into clips and manifests, unless ``prepared_folder`` holds them already.

    An interrupted run is resumed. A ``prepared_folder`` that was made with other arguments is refused.

    Arguments
    ---------
    data_folder : str or Path
        A DatasetDict saved with ``save_to_disk``; missing splits are made by speaker. Only read.
    prepared_folder : str or Path
        Output folder; see ``default_prepared_folder``.
    workers : int, optional
        Processes that decode; None takes one per core, or none for a few clips.
    progress : bool
        Whether to draw a progress bar on stderr.
    **choices
        Fields of ``PreparationChoices``; ``accents`` and ``seed`` are required.

    Returns
    -------
    Prepared

    Raises
    ------
    DataError
        When the data cannot be used.
    ManifestError
        When ``prepared_folder`` was made from something else.
    """
    choices, data_folder, folder, header = _begin(data_folder, prepared_folder, choices)
    if done := _finished(folder, header):
        return done
    with files.writable_folder(folder, "prepared_folder"), files.lock(folder):
        if done := _finished(folder, header):
            return done
        return _prepare(data_folder, folder, choices, header, workers, progress)


def check_preparation(data_folder, prepared_folder, **choices):
    """Refuse what ``prepare_data`` with the same arguments would refuse, without writing anything.

    Raises
    ------
    DataError
        When the data cannot be used.
    ManifestError
        When ``prepared_folder`` was made from something else.
    """
    choices, data_folder, folder, header = _begin(data_folder, prepared_folder, choices)
    if not _finished(folder, header):
        _plan(data_folder, choices, selection.DropLog())


def _begin(data_folder, prepared_folder, choices):
    """Checked choices, absolute folders, and the first fields of prepare.json."""
    choices = PreparationChoices(**choices)
    data_folder, folder = Path(data_folder).absolute(), Path(prepared_folder).absolute()
    source = dataset_dict.fingerprint(data_folder)
    if folder.resolve().is_relative_to(data_folder.resolve()):
        raise DataError(f"prepared_folder {folder} is inside data_folder, which is only read: choose another")
    header = {"arguments": choices.as_json(), "source": source, "data_folder": str(data_folder)}
    return choices, data_folder, folder, header


def preparation_fingerprint(data_folder, **choices):
    """Digest of a source and the arguments, from the names and sizes of files: a copy of the source has the same."""
    source = provenance.without_times(dataset_dict.fingerprint(Path(data_folder)))
    return selection.digest({"arguments": PreparationChoices(**choices).as_json(), "source": source})


def default_prepared_folder(data_folder, root="data/prepared", **choices):
    """The default output folder of ``prepare_data`` with these arguments."""
    return Path(root) / preparation_fingerprint(data_folder, **choices)


# ------------------------------------------------------------------------------------------------- the way through


def _prepare(data_folder, folder, choices, header, workers, progress):
    notes = selection.DropLog()
    loaded, columns, layouts, knows_speakers = _plan(data_folder, choices, notes)
    logger.info("columns of %s: %s", data_folder, next(iter(columns.values())))
    notes.warnings += selection.leaks(knows_speakers, choices.split)
    for warning in notes.warnings:
        logger.warning(warning)

    header = header | {"contents": dataset_dict.content_digests(data_folder)}
    journal = Journal(folder / JOURNAL_FILE, header)
    wanted = {row.id: row for layout in layouts for items in layout.values() for row in items}
    with journal:
        outcomes = decode_clips(wanted, loaded, columns, data_folder, folder, choices, journal, workers, progress)
    layouts = _without_failures(layouts, outcomes, choices, notes)
    _require_filled(layouts, choices, notes)
    return _write(folder, data_folder, layouts, outcomes, choices, header, columns, notes, knows_speakers)


def _plan(data_folder, choices, notes):
    """Select and split clips by their metadata, and refuse what can be refused before a file is read or written."""
    loaded, unused = dataset_dict.open_splits(data_folder, choices.source_splits, "source_splits")
    notes.warnings += unused
    given = {role: getattr(choices, f"{role}_column") for role in ("audio", "accent", "client", "sentence")}
    columns = {split: dataset_dict.find_columns(split, data, data_folder, given) for split, data in loaded.items()}

    def table():
        for split, data in loaded.items():
            for number, cells in enumerate(dataset_dict.read_cells(data, columns[split])):
                yield cells | {"split": split, "row": number}

    def content_of(row):
        return dataset_dict.content_digest(loaded[row.split], columns[row.split], row.row)

    extra = {"content_of": content_of, "precedence": _precedence}
    rows, knows_speakers = selection.select(table(), choices.accents, notes, data_folder, **extra)
    layouts = _lay_out(rows, list(loaded), choices, notes)
    _require_filled(layouts, choices, notes)
    return loaded, columns, layouts, knows_speakers


def _lay_out(rows, source_splits, choices, notes):
    """One dictionary of splits, or one per fold, with train balanced."""
    found = set(map(naming.split_kind, source_splits))
    keep_given = len(found) > 1 and choices.split == "speaker" and not choices.n_folds
    if keep_given:
        # Before the cap, which might hide a speaker in two of them.
        splits.require_disjoint(splits.given(rows, **choices.draw()))
    rows = selection.cap(rows, choices, notes)
    if choices.n_folds:
        by = "speaker" if choices.split == "speaker" else "clip"
        fraction = choices.valid_fraction
        layouts = splits.folds(rows, choices.n_folds, valid_fraction=fraction, seed=choices.seed, by=by)
    elif choices.split == "all":
        layouts = ({splits.TRAIN: (), splits.VALID: (), splits.TEST: rows},)
    elif choices.split == "random":
        layouts = (splits.at_random(rows, **choices.draw()),)
    elif keep_given:
        layouts = (splits.given(rows, **choices.draw(), missing=set(splits.SPLITS) - found),)
    else:
        layouts = (splits.by_speaker(rows, **choices.draw()),)

    made = []
    for fold, parts in selection.numbered(layouts):
        if choices.split == "speaker":
            splits.require_disjoint(parts)
        disjoint = choices.disjoint_sentences and choices.split == "speaker"
        parts, lost = selection.drop_sentences(parts, notes, disjoint=disjoint, fold=fold)
        for split, source, count in ((a, b, lost[a][b]) for a in lost for b in lost[a] if lost[a][b]):
            logger.info("%d of %s's clips read a sentence of %s: dropped", count, split, source)
        made.append(_balanced(parts, choices, notes, fold))
    return made


def _balanced(parts, choices, notes, fold):
    if choices.balance != "downsample":
        return parts
    return parts | {splits.TRAIN: selection.balance(parts[splits.TRAIN], choices, notes, fold)}


def _without_failures(layouts, outcomes, choices, notes):
    """Drop clips that could not be decoded or sound exactly like another, then balance train again."""
    # With folds, every clip is in test once, so none has precedence.
    place_of = {r.id: len(layouts) == 1 and _PLACES[name] for parts in layouts for name in parts for r in parts[name]}
    rows = {row.id: row for parts in layouts for items in parts.values() for row in items}
    out, first_of, failures = set(), {}, []
    # Test before valid before train: of two equal clips, the one in test is kept.
    for id_ in sorted(place_of, key=lambda id_: (place_of[id_], id_)):
        outcome = outcomes[id_]
        if outcome.reason:
            out.add(id_)
            notes.dropped[outcome.reason] += 1
            failures.append({"reason": outcome.reason, "id": selection.place(rows[id_]), "message": outcome.message})
        elif outcome.md5 in first_of:
            out.add(id_)
            message = f"sounds exactly like {selection.place(rows[first_of[outcome.md5]])}"
            notes.drop(selection.DUPLICATE, clip=rows[id_], message=message)
        else:
            first_of[outcome.md5] = id_
    notes.examples = (failures + notes.examples)[:_EXAMPLES]
    if not out:
        return layouts
    kept = [{name: tuple(r for r in items if r.id not in out) for name, items in parts.items()} for parts in layouts]
    return [_balanced(parts, choices, notes, fold) for fold, parts in selection.numbered(kept)]


def _write(folder, data_folder, layouts, outcomes, choices, header, columns, notes, knows_speakers):
    counts, sizes = {}, {}
    for number, parts in enumerate(layouts, 1):
        below = f"fold_{number}" if choices.n_folds else ""
        (folder / below).mkdir(exist_ok=True)
        for split, path in manifest_paths(folder / below).items():
            write_manifest(path, parts[split], outcomes)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        seen = splits.seen_in_training(parts[splits.TEST], parts[splits.TRAIN])
        if seen and parts[splits.TRAIN]:
            path = folder / below / SEEN_FILE
            write_seen(path, seen)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        counts[below] = {split: _count(parts[split], outcomes) for split in splits.SPLITS}
    card = dataset_dict.card(data_folder)
    used = {row.id for parts in layouts for items in parts.values() for row in items}
    damaged = _count_damaged([outcomes[id_] for id_ in used], notes)
    made = {
        "format_version": FORMAT_VERSION,
        "name": str(card.get("name") or data_folder.name),
        "synthetic": bool(card.get("synthetic", False)),
        "speakers_disjoint": False if choices.split == "random" else True if knows_speakers else None,
        "fingerprint": selection.digest({key: header[key] for key in ("arguments", "source")}),
        **header,
        "columns": columns,
        "counts": counts if choices.n_folds else counts[""],
        "damaged": damaged,
        "dropped": {reason: n for reason, n in notes.dropped.most_common() if n},
        "dropped_in_folds": {f"fold_{k}": {r: n for r, n in c.items() if n} for k, c in sorted(notes.folds.items())},
        "examples": notes.examples[:_EXAMPLES],
        "warnings": notes.warnings,
        "files": sizes,
        "audio_files": len(used),
    }
    with files.atomic_write(folder / PREPARE_JSON) as file:
        json.dump(made, file, indent=1)
    done = load_prepared(folder)
    logger.info("prepared %s in %s: %s", done.name, folder, _in_words(layouts))
    logger.info("left out: %s", selection.in_words(done.dropped) or "nothing")
    return done


def _require_filled(layouts, choices, notes):
    wanted = (splits.TEST,) if choices.split == "all" else splits.SPLITS
    selection.require_filled(layouts, choices.accents, notes, wanted)


# ------------------------------------------------------------------------------------------------------------ files


def _finished(folder, header):
    """The prepared folder when it is finished, None when there is work to do; a different one is refused."""
    finished, started = folder / PREPARE_JSON, folder / JOURNAL_FILE
    if finished.is_file():
        made = dataset_dict.read_json(finished)
    elif started.is_file():
        made = dataset_dict.read_json(started, first_line=True)
    elif any((folder / name).exists() for name in (AUDIO_FOLDER, "train.csv", "fold_1")):
        raise ManifestError(f"{folder} holds audio or manifests made by something else: choose another prepared_folder")
    else:
        return None
    provenance.require_same(
        folder,
        made,
        header,
        option="prepared_folder",
        in_part=not finished.is_file(),
        contents=lambda: dataset_dict.content_digests(Path(header["data_folder"])),
    )
    if not finished.is_file():
        return None
    try:
        return load_prepared(folder)
    except ManifestError as error:
        logger.warning("%s: repairing it", error)
        return None


def _count(rows, outcomes):
    by_accent = defaultdict(list)
    for row in rows:
        by_accent[row.accent].append(row)
    return {
        accent: {
            "clips": len(members),
            "speakers": len({row.speaker for row in members} - {""}),
            "seconds": round(sum(outcomes[row.id].frames for row in members) / SAMPLE_RATE, 2),
        }
        for accent, members in sorted(by_accent.items())
    }


def _count_damaged(outcomes, notes):
    """Count the clips of which a part could not be decoded, and the seconds; warn if there are any."""
    lost = [outcome.lost_seconds for outcome in outcomes if outcome.lost_seconds]
    if lost:
        warning = f"{len(lost)} of {len(outcomes)} clips are damaged: {sum(lost):.1f} s of them could not be decoded"
        notes.warnings.append(warning)
        logger.warning("%s", warning)
    return {"clips": len(lost), "lost_seconds": round(sum(lost), 2)}


def _in_words(layouts):
    sizes = [", ".join(f"{name} {len(items)}" for name, items in parts.items()) for parts in layouts]
    return "; ".join(f"fold {k}: {size}" for k, size in enumerate(sizes, 1)) if len(sizes) > 1 else f"clips: {sizes[0]}"


def _precedence(row):
    return _PLACES.get(naming.split_kind(row.split), 0), row.accent, row.gender, row.age, row.split, row.row


_PLACES = {splits.TEST: 0, splits.VALID: 1, splits.TRAIN: 2}
