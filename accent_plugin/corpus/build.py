"""Build a DatasetDict from any corpus: map accents, select clips, split by speaker, and write a card.

The files in ``out``::

    train/ validation/ test/    Arrow shards for datasets.load_from_disk; audio as paths or embedded
    accent_plugin.json          the card: source, arguments, counts, dropped clips by reason
    README.md                   the same for people
    dataset_dict.json           written last

Nothing here imports torch. Audio is decoded only where a filter needs it; ``data.prepare`` and ``audit.check`` do that.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from accent_plugin import files
from accent_plugin.audio.samples import TOO_LONG, TOO_SHORT
from accent_plugin.audio.workers import core_count
from accent_plugin.corpus import arrow_shards, readers
from accent_plugin.corpus.card import REASON_NAMES, corpus_card_to_markdown, make_corpus_card
from accent_plugin.corpus.choices import CorpusChoices
from accent_plugin.corpus.rates import drop_odd_rates
from accent_plugin.data import dataset_dict, labels, naming, provenance, selection, splits
from accent_plugin.errors import ConfigError, DataError, ManifestError

logger = logging.getLogger(__name__)


NO_AUDIO = "no audio file"
COLUMNS = ("client_id", "path", "sentence", "accent", "raw_accent", "gender", "age")
_SPLITTERS = {"client": splits.by_hash, "official": splits.given, "random": splits.at_random}
_BUILDING = ".building.json"
_README = "README.md"
_ABSENT_LISTED = 5
_SPELLINGS_LISTED = 5


@dataclass(frozen=True)
class Built:
    """A finished DatasetDict.

    Arguments
    ---------
    folder : Path
        For ``datasets.load_from_disk``, and ``data_folder`` of the recipe.
    counts : dict
        Split -> accent -> {"clips", "clients", "seconds"}; seconds is None where some are unknown.
    dropped : dict
        Reason -> number of dropped clips.
    warnings : tuple of str
        What users of the data should know.
    card : dict
        All of that, with source and arguments.
    """

    folder: Path
    counts: dict
    dropped: dict
    warnings: tuple[str, ...]
    card: dict


@dataclass(frozen=True)
class Spelling:
    """One raw accent: its number of clips and speakers, and its label or the reason why it has none."""

    raw: str
    clips: int
    clients: int
    label: str | None
    reason: str | None


def survey_accents(source, *, mapping=None, compound="drop", **reading):
    """List the raw accents of a corpus.

    Arguments
    ---------
    source : str or Path
        As in ``build_corpus``.
    mapping, compound
        As in ``CorpusChoices``.
    **reading
        Fields of ``readers.Reading``.

    Returns
    -------
    tuple of Spelling
        The most frequent first; clips without an accent count as one with an empty name.
    """
    mapping = labels.read_mapping(mapping) if isinstance(mapping, str | os.PathLike) else mapping
    clips, speakers = Counter(), defaultdict(set)
    for cells in readers.open_source(source, readers.Reading(**reading)).cells():
        key = cells["accent"], cells.get("variant", "")
        clips[key] += 1
        speakers[key].add(cells["client"])
    found = []
    for key, count in sorted(clips.items(), key=lambda entry: (-entry[1], entry[0])):
        accent, variant = key
        parsed = selection.read_accent(accent, variant, mapping, compound)
        found.append(Spelling(selection.shown(key), count, len(speakers[key] - {""}), parsed.label, parsed.reason))
    return tuple(found)


def build_corpus(source, out, *, workers=None, progress=True, **arguments):
    """Select and split the clips of a corpus and write them as a DatasetDict, unless ``out`` holds it already.

    An interrupted run is resumed. An ``out`` that was made with other arguments is refused.

    Arguments
    ---------
    source : str or Path
        A Common Voice release, a DatasetDict, a folder per accent, a CSV file, or a name on the Hub; only read. Or
        your own reader (see ``readers``), whose ``folder`` holds its files.
    out : str or Path
        Output folder; nothing is written outside it.
    workers : int, optional
        Threads that copy audio; None takes one per core.
    progress : bool
        Whether to draw a progress bar on stderr.
    **arguments
        Fields of ``CorpusChoices``, and of ``readers.Reading``: how to read the source.

    Returns
    -------
    Built

    Raises
    ------
    ConfigError
        When an argument is invalid.
    DataError
        When the source is unusable, or a split would be empty.
    ManifestError
        When ``out`` holds something else.
    """
    of_reading = {field.name for field in dataclasses.fields(readers.Reading)} & arguments.keys()
    reading = readers.Reading(**{name: arguments.pop(name) for name in of_reading})
    choices, out = CorpusChoices(**arguments), Path(out).absolute()
    reader = readers.open_source(source, reading, official=choices.split == "official")
    _require_outside(source, out)
    _require_speakers(reader, choices, reader.has_clients)
    header = {"arguments": choices.as_json() | dataclasses.asdict(reading), "source": reader.fingerprint()}
    header = json.loads(json.dumps(header))
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; give 1 or more")
    if done := _finished(out, header):
        gone = done.dropped.get(NO_AUDIO)
        logger.info(
            "%s is there already, from the same source and arguments%s",
            out,
            f"; {gone} clips had no audio file then: remove it to look again" if gone else "",
        )
        return done
    with files.writable_folder(out, "--out"), files.lock(out):
        if done := _finished(out, header):
            return done
        with _without_collection():
            return _build(reader, out, choices, header, workers or core_count(), progress)


def load_corpus(folder):
    """Read the card of a finished DatasetDict.

    Raises
    ------
    ManifestError
        When there is none.
    """
    folder = Path(folder).absolute()
    if not arrow_shards.is_finished(folder) or not (folder / dataset_dict.CARD_JSON).is_file():
        raise ManifestError(f"{folder} holds no finished DatasetDict with a card: make it with accent-plugin prepare")
    card = dataset_dict.read_json(folder / dataset_dict.CARD_JSON)
    try:
        return Built(folder, card["counts"], card["dropped"], tuple(card["warnings"]), card)
    except KeyError as error:
        raise ManifestError(
            f"{folder / dataset_dict.CARD_JSON} was written by something else: it lacks {error}"
        ) from None


def plan_corpus(reader, choices, notes, progress=False):
    """Select and split clips by their metadata, and refuse what can be refused before anything is written.

    Returns
    -------
    tuple
        Split -> rows, and split -> because of split -> clips dropped for their sentence.
    """
    whole = reader.validated() if choices.split == "official" and hasattr(reader, "validated") else None
    if whole is None:
        rows, knows_speakers = _select(reader, choices, notes, progress)
        return _divide(rows, knows_speakers, choices, notes)
    try:
        rows, knows_speakers = _select(reader, choices, notes, progress)
        parts, lost = _divide(rows, knows_speakers, choices, notes)
    except DataError as error:
        text, _ = _client_split(whole, choices, progress)
        raise DataError(f"{error}\n{text}") from None
    text, clips = _client_split(whole, choices, progress)
    if clips:
        fraction = f"{len(rows)} of {clips} validated clips of these accents ({len(rows) / clips:.0%})"
        text = f"the official splits hold {fraction}; {text}"
    notes.warnings.append(text)
    return parts, lost


def _client_split(whole, choices, progress):
    """What split client would give, in words, and the number of clips it has to choose from; 0 where it fails."""
    choices, notes = dataclasses.replace(choices, split="client"), selection.DropLog()
    try:
        rows, knows_speakers = _select(whole, choices, notes, progress)
        parts, _ = _divide(rows, knows_speakers, choices, notes)
    except DataError as error:
        return f"split client would fail: {str(error).splitlines()[0]}", 0
    kept = [row for part in parts.values() for row in part]
    return f"split client would give {len(kept)} clips of {len({row.speaker for row in kept})} speakers", len(rows)


def _divide(rows, knows_speakers, choices, notes):
    def trim(rows):
        rows = selection.cap(rows, choices, notes)
        return selection.balance_gender(rows, choices, notes) if choices.balance_gender else rows

    if choices.split == "official":
        _require_official(rows)
    parts = _SPLITTERS[choices.split](rows, **choices.draw())
    notes.warnings += selection.leaks(knows_speakers, choices.split)
    if choices.split != "random":
        splits.require_disjoint(parts)
    elif knows_speakers:
        notes.warnings.append("the recipe refuses splits that share speakers, unless it is given --split random")
    parts, lost = selection.drop_sentences(parts, notes, disjoint=choices.disjoint_sentences, trim=trim)
    remedy = ""
    if choices.split == "client":
        speakers = Counter(accent for accent, _ in {(row.accent, row.speaker) for row in rows})
        counts = ", ".join(f"{accent} {speakers[accent]}" for accent in choices.accents)
        remedy = f"speakers: {counts}; train, valid and test need three of every accent, before clips are left out"
    selection.require_filled([parts], choices.accents, notes, remedy=remedy)
    return parts, lost


def _select(reader, choices, notes, progress):
    """Clips of the wanted accents that have audio, and whether the source names speakers."""
    from tqdm import tqdm

    read = tqdm(reader.cells(), desc="reading", unit="row", mininterval=1.0, leave=False, disable=not progress)
    extra = {
        "precedence": lambda row: (row.gender, row.age, row.raw_accent, row.split),
        "mapping": choices.mapping,
        "compound": choices.compound,
        "refusal": _refusal(choices),
        "content_of": getattr(reader, "content_of", None),
    }
    rows, knows_speakers = selection.select(read, choices.accents, notes, reader.name, **extra)
    if not extra["content_of"]:
        rows = _each_file_once(rows, notes)
    notes.dropped += reader.damaged
    _require_speakers(reader, choices, knows_speakers)
    absent = reader.absent(rows)
    gone = [row for row, missing in zip(rows, absent, strict=True) if missing]
    notes.drop(NO_AUDIO, len(gone))
    notes.examples += [{"reason": NO_AUDIO, "id": row.path, "message": ""} for row in gone[:_ABSENT_LISTED]]
    notes.warnings += reader.warnings
    if notes.unknown:
        shown = ", ".join(f"'{raw}' {n}" for raw, n in notes.unknown.most_common(_SPELLINGS_LISTED))
        more = len(notes.unknown) - _SPELLINGS_LISTED
        count = f"unknown accents left out: {shown}" + (f" and {more} more" if more > 0 else "")
        notes.warnings.append(f"{count}; {selection.MAPPING_ADVICE}")
    known_labels = labels.SPELLINGS.keys() | labels.mapped_labels()
    if strange := sorted(set(choices.mapping.values()) - known_labels - set(choices.accents)):
        known = ", ".join(labels.SPELLINGS)
        notes.warnings.append(f"mapping gives labels that are not asked for: {', '.join(strange)}; known are {known}")
    rows = [row for row, missing in zip(rows, absent, strict=True) if not missing]
    if choices.max_rate_deviation is not None:
        rows = drop_odd_rates(rows, reader, choices.max_rate_deviation, notes, progress)
    return rows, knows_speakers


def _build(reader, out, choices, header, workers, progress):
    notes = selection.DropLog()
    parts, lost = plan_corpus(reader, choices, notes, progress)
    planned = selection.digest({name: [row.id for row in rows] for name, rows in parts.items()})
    begun = dataset_dict.read_json(out / _BUILDING) if (out / _BUILDING).is_file() else {}
    if begun.get("planned") != planned:
        arrow_shards.remove(out)
        with files.atomic_write(out / _BUILDING) as file:
            json.dump(header | {"planned": planned}, file)
    named = {REASON_NAMES[split]: rows for split, rows in parts.items()}
    options = {"embed": choices.embed, "workers": workers, "progress": progress, "fingerprint": planned}
    arrow_shards.write(out, named, COLUMNS, _record, reader.sound, **options)
    card = make_corpus_card(reader, parts, lost, choices, header, notes)
    with files.atomic_write(out / _README) as file:
        file.write(corpus_card_to_markdown(card))
    with files.atomic_write(out / dataset_dict.CARD_JSON) as file:
        json.dump(card, file, indent=1, ensure_ascii=False)
    arrow_shards.finish(out, named)
    (out / _BUILDING).unlink()
    for warning in notes.warnings:
        logger.warning(warning)
    return load_corpus(out)


def _refusal(choices):
    """Cells of a clip -> the reason why its votes or duration are refused, or None."""
    fewest, most = choices.min_up_votes, choices.max_down_votes
    shortest, longest = choices.min_seconds or 0, math.inf if choices.max_seconds is None else choices.max_seconds

    def refusal(cells):
        if fewest is not None or most is not None:
            if "up_votes" not in cells:
                raise ConfigError(
                    "min_up_votes and max_down_votes need a Common Voice release: this source has no votes"
                )
            up, down = cells["up_votes"], cells["down_votes"]
            if (fewest is not None and up is None) or (most is not None and down is None):
                return selection.NO_VOTES
            if fewest is not None and up < fewest:
                return selection.FEW_UP_VOTES
            if most is not None and down > most:
                return selection.MANY_DOWN_VOTES
        seconds = cells.get("seconds")
        if seconds is None or shortest <= seconds <= longest:
            return None
        return TOO_SHORT if seconds < shortest else TOO_LONG

    return refusal


def _each_file_once(rows, notes):
    """Keep one row per file; drop files that have two accents or two speakers."""
    of_file = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.id):
        of_file[row.path].append(row)
    kept = []
    for path, members in of_file.items():
        pairs = sorted({(row.accent, row.speaker) for row in members})
        if len(pairs) > 1:
            message = "given as " + " and ".join(f"{accent} by '{speaker}'" for accent, speaker in pairs[:2])
            notes.drop(selection.CONTRADICTING, len(members), clip=path, message=message)
            continue
        notes.drop(selection.DUPLICATE, len(members) - 1)
        kept.append(members[0])
    return kept


def _require_official(rows):
    """Refuse clips whose split in the source is not train, validation or test."""
    for split in sorted({row.split for row in rows}):
        if naming.split_kind(split) is None:
            raise DataError(
                f"split official needs splits called train, validation and test; the source has '{split}'"
                if split
                else "split official needs a source with splits, and this one has none: give split client"
            )


def _record(row):
    """The text columns of one clip."""
    return dict(
        zip(
            COLUMNS,
            (row.speaker, os.path.basename(row.path), row.text, row.accent, row.raw_accent, row.gender, row.age),
            strict=True,
        )
    )


def _finished(out, header):
    """The DatasetDict when it is finished, None when there is work to do; a different one is refused."""
    begun, card = out / _BUILDING, out / dataset_dict.CARD_JSON
    if not out.exists() or (out.is_dir() and not any(p.name != ".lock" for p in out.iterdir())):
        return None
    if not out.is_dir():
        raise ManifestError(f"--out {out} is a file: give a folder")
    if not begun.is_file() and not card.is_file():
        raise ManifestError(f"--out {out} holds files made by something else: choose another folder, or empty it")
    made = dataset_dict.read_json(begun if begun.is_file() else card)
    provenance.require_same(out, made, header, option="--out", in_part=begun.is_file())
    return load_corpus(out) if arrow_shards.is_finished(out) and not begun.is_file() else None


@contextlib.contextmanager
def _without_collection():
    """Turn off garbage collection: text records form no cycles, and among millions the search costs a fifth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_outside(source, out):
    folder = Path(source if isinstance(source, str | os.PathLike) else source.folder)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"--out {out} is inside the source, which is only read: choose another folder")


def _require_speakers(reader, choices, knows_speakers):
    if choices.split == "client" and not knows_speakers:
        raise DataError(
            f"{reader.name} has no client ids, so no split can keep speakers apart\n{reader.without_clients}\n"
            "or give split official to keep its own splits, or split random: every report will then warn that splits"
            " may share speakers, which inflates its figures"
        )
