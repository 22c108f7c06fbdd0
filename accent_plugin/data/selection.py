"""The selection pipeline of corpus and data: pure functions on rows that count dropped clips by reason.

The steps are ``select`` (labels, duplicates, doubtful speakers), ``cap``, a division into splits (see ``splits``),
``drop_sentences``, ``balance`` or ``balance_gender``, and ``require_filled``.

A reader gives one dictionary of text per clip, without audio, with the keys ``client``, ``path``,
``sentence``, ``accent``, ``gender``, ``age`` ("" where unknown), ``split`` (its name at the source) and ``row``, and
where the source has them ``variant``, ``up_votes``, ``down_votes`` and ``seconds``.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

from accent_plugin.audio.samples import TOO_LONG, TOO_SHORT
from accent_plugin.data import labels, splits
from accent_plugin.errors import ConfigError, DataError

FEW_UP_VOTES = "too few up-votes"
MANY_DOWN_VOTES = "too many down-votes"
NO_VOTES = "votes not given"
OTHER_ACCENT = "other accent"
NO_SPEAKER = "no client id"
CONTRADICTING = "contradicting accents"
DUPLICATE = "duplicate"
SPEAKER_CAP = "client cap"
BALANCE = "balance"
GENDER_UNKNOWN = "gender not given"
GENDER_OTHER = "gender neither male nor female"
GENDER_BALANCE = "gender balance"
NO_SPEAKERS = "no client ids: splits may share speakers"
RANDOM_SPLIT = "split at random by clip: speakers are shared between splits, accuracies flatter"
COMPOUNDS = ("drop", "agree")
# What to change where a filter takes too many clips.
_OPTIONS = {
    FEW_UP_VOTES: "--min_up_votes",
    MANY_DOWN_VOTES: "--max_down_votes",
    NO_VOTES: "--min_up_votes, --max_down_votes",
    TOO_SHORT: "--min_seconds",
    TOO_LONG: "--max_seconds",
    SPEAKER_CAP: "--max_clips_per_client",
    BALANCE: "--balance",
    GENDER_UNKNOWN: "--balance_gender",
    GENDER_OTHER: "--balance_gender",
    GENDER_BALANCE: "--balance_gender",
}


MAPPING_ADVICE = (
    "to give them labels: --mapping of prepare, with the name of a corpus or a file, which"
    " accent-plugin accents SOURCE --format yaml prints to fill in"
)


_SAME_TEXT = (
    "\n(sentence in ...: where every speaker reads the same text, let splits share sentences: --shared_sentences of"
    " prepare, disjoint_sentences of the recipe)"
)


_LISTED = 10
_EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, slots=True)
class Row(splits.Item):
    """An item with its other metadata and the place of its audio in the source."""

    gender: str = ""
    age: str = ""
    split: str = ""
    row: int = 0
    path: str = ""
    text: str = ""
    raw_accent: str = ""
    seconds: float | None = None


class SharedChoices:
    """The options that ``CorpusChoices`` and ``PreparationChoices`` share; their base class."""

    accents: tuple[str, ...] | str
    seed: int
    split: str
    max_clips_per_client: int | None
    min_seconds: float | None
    max_seconds: float | None
    valid_fraction: float
    test_fraction: float

    def require(self, kinds, *more):
        """Refuse invalid values, all at once.

        Arguments
        ---------
        kinds : sequence of str
            Valid values of ``split``.
        *more : tuple
            Further checks: whether a value is valid, and the message where it is not.

        Raises
        ------
        ConfigError
            With one line for each problem.
        """
        cap, valid, test = self.max_clips_per_client, self.valid_fraction, self.test_fraction
        shortest, longest = self.min_seconds or 0, self.max_seconds
        checks = (
            *more,
            (self.split in kinds, f"split {self.split!r} is unknown; choose {', '.join(kinds)}"),
            (cap is None or cap >= 1, f"max_clips_per_client is {cap}; give 1 or more, or none for no cap"),
            (
                shortest >= 0 and (longest is None or shortest < longest),
                f"min_seconds {shortest} and max_seconds {longest} leave no clip",
            ),
            (0 < valid < 1, f"valid_fraction is {valid}; give more than 0 and less than 1"),
            (0 < test < 1 - valid, f"test_fraction is {test}; give more than 0, and less than 1 with valid_fraction"),
        )
        if problems := [text for right, text in checks if not right]:
            raise ConfigError("\n".join(problems))

    def draw(self):
        """Fractions and seed, as the functions of ``splits`` take them."""
        return {"valid_fraction": self.valid_fraction, "test_fraction": self.test_fraction, "seed": self.seed}

    def as_json(self):
        """Plain values, accents sorted: their order decides indices in the model, nothing here."""
        return json.loads(json.dumps(vars(self) | {"accents": sorted(self.accents)}))


class DropLog:
    """Dropped clips by reason, unknown spellings, examples, and warnings; filled by each step."""

    def __init__(self):
        self.dropped = Counter()
        self.folds = defaultdict(Counter)
        self.unknown = Counter()
        self.examples = []
        self.warnings = []

    def drop(self, reason, count=1, clip=None, message="", fold=None):
        """Count clips under a reason, and keep the first few as examples; ``clip`` is as in ``place``, or a text."""
        counts = self.dropped if fold is None else self.folds[fold]
        counts[reason] += count
        if clip and counts[reason] <= 10 * _EXAMPLES_PER_REASON:
            if sum(e["reason"] == reason for e in self.examples) < _EXAMPLES_PER_REASON:
                named = clip if isinstance(clip, str) else place(clip)
                self.examples.append({"reason": reason, "id": named, "message": message})


def select(
    table, accents, notes, where, *, mapping=None, compound="drop", refusal=None, content_of=None, precedence=None
):
    """Clips of the wanted accents, each once, without doubtful speakers.

    Arguments
    ---------
    table : iterable of dict
        The metadata of each clip, see above.
    accents : sequence of str
        Labels to keep. Names outside ``labels`` are taken as they are.
    notes : DropLog
        Receives what is dropped.
    where : object
        Name of the source in messages.
    mapping : dict, optional
        More spellings, ``{spelling: label}``.
    compound : str
        "drop" drops clips with several accents; "agree" keeps those whose accents all map to one label.
    refusal : callable, optional
        The metadata of a clip -> the reason why a filter drops it, or None.
    content_of : callable, optional
        Row -> digest of its audio; distinguishes clips of the same speaker, path and sentence, or without a name.
    precedence : callable, optional
        Row -> sort key; the smallest of several equal rows is kept. None keeps the first.

    Returns
    -------
    tuple
        Rows, and whether the source names speakers.

    Raises
    ------
    DataError
        When the source has no clip of a wanted accent that passes the filters.
    """
    extra = {accent: accent for accent in accents} | (mapping or {})
    parsed, raw, found, accents_of, refused = {}, Counter(), Counter(), defaultdict(set), defaultdict(Counter)
    candidates, nameless = [], set()
    for cells in table:
        key = cells["accent"], cells.get("variant", "")
        raw[key] += 1
        if key not in parsed:
            parsed[key] = read_accent(*key, extra, compound)
        accent = parsed[key]
        if reason := refusal and refusal(cells):
            notes.drop(reason)
            refused[accent.label][reason] += 1
            continue
        if accent.label is None:
            message = f"the accent is given as '{shown(key)}'"
            notes.drop(accent.reason, clip=cells, message=message)
            if accent.reason == labels.UNKNOWN_ACCENT:
                notes.unknown[shown(key)] += 1
            continue
        found[accent.label] += 1
        # Interned, because a release has millions of rows and thousands of speakers.
        speaker = sys.intern(cells["client"])
        if speaker:
            accents_of[speaker].add(accent.label)
        if accent.label not in accents:
            notes.drop(OTHER_ACCENT)
            continue
        row = Row(
            id=digest([speaker, cells["path"], cells["sentence"]]),
            accent=accent.label,
            speaker=speaker,
            sentence=splits.normalise_sentence(cells["sentence"]),
            gender=sys.intern(labels.gender(cells["gender"])),
            age=sys.intern(cells["age"]),
            split=cells["split"],
            row=cells["row"],
            path=cells["path"],
            text=cells["sentence"],
            raw_accent=sys.intern(shown(key)),
            seconds=cells.get("seconds"),
        )
        candidates.append(row)
        if not row.path and not row.text:
            nameless.add(row.id)
    _require_accents(where, accents, found, raw, parsed, refused)
    return _without_doubtful(candidates, nameless, accents_of, notes, content_of, precedence), bool(accents_of)


def read_accent(accent, variant="", extra=None, compound="drop"):
    """Parse an accent cell; the variant is used where it is empty, and another accent there makes it compound."""
    parsed = labels.parse(accent, extra)
    if variant:
        second = labels.parse(variant, extra)
        if parsed.reason == labels.NO_ACCENT:
            parsed = second
        elif second.label and second.label not in parsed.parts:
            parsed = labels.ParsedAccent(None, labels.COMPOUND_ACCENT, (*parsed.parts, second.label))
    if parsed.reason == labels.COMPOUND_ACCENT and compound == "agree" and len(set(parsed.parts)) == 1:
        parsed = labels.ParsedAccent(parsed.parts[0], None, parsed.parts)
    return parsed


def cap(rows, choices, notes):
    """Keep at most ``max_clips_per_client`` clips of each speaker."""
    choice = splits.cap(rows, choices.max_clips_per_client, choices.seed)
    notes.drop(SPEAKER_CAP, len(choice.dropped))
    return choice.kept


def balance(rows, choices, notes, fold=None):
    """Keep as many clips of every accent as of the rarest."""
    choice = splits.downsample(rows, choices.seed)
    notes.drop(BALANCE, len(choice.dropped), fold=fold)
    return choice.kept


def balance_gender(rows, choices, notes):
    """Keep as many clips of women as of men in each accent."""
    kept = []
    for accent in sorted({row.accent for row in rows}):
        of_accent = [row for row in rows if row.accent == accent]
        binary = [row for row in of_accent if row.gender in ("female", "male")]
        notes.drop(GENDER_UNKNOWN, sum(not row.gender for row in of_accent))
        notes.drop(GENDER_OTHER, sum(row.gender not in ("female", "male", "") for row in of_accent))
        one_sided = len({row.gender for row in binary}) < 2
        choice = splits.downsample(binary, choices.seed, key=lambda row: row.gender)
        kept += () if one_sided else choice.kept
        notes.drop(GENDER_BALANCE, len(binary) if one_sided else len(choice.dropped))
    return tuple(sorted(kept, key=lambda row: row.id))


def drop_sentences(parts, notes, *, disjoint=True, trim=None, fold=None):
    """Trim each split, test first, drop clips whose sentence a split before it has, and count them.

    Arguments
    ---------
    parts : dict
        Split -> rows.
    notes : DropLog
        Receives what is dropped.
    disjoint : bool
        Whether to drop sentences; False only trims.
    trim, fold
        As in ``splits.drop_sentences`` and ``DropLog.drop``.

    Returns
    -------
    tuple
        The splits, and split -> because of split -> clips dropped for their sentence.
    """
    parts, dropped = splits.drop_sentences(parts, trim, disjoint)
    counts = {split: {} for split in reversed(splits.SPLITS)}
    for (split, source), rows in dropped.items():
        counts[split][source] = len(rows)
        notes.drop(f"sentence in {source}", len(rows), fold=fold)
    return parts, counts


def numbered(layouts):
    """Yield the number of each fold, or None where there are no folds, and its splits."""
    for number, parts in enumerate(layouts, 1):
        yield number if len(layouts) > 1 else None, parts


def leaks(knows_speakers, split):
    """Warnings for splits that share speakers, or may share them."""
    return [NO_SPEAKERS] * (not knows_speakers) + [RANDOM_SPLIT] * (split == "random")


def require_filled(layouts, accents, notes, wanted=splits.SPLITS, remedy=""):
    """Refuse a split without a clip of one of the accents.

    Arguments
    ---------
    layouts : sequence of dict
        Split -> rows; one for each fold.
    accents : sequence of str
    notes : DropLog
        What was left out, for the message.
    wanted : sequence of str
        Splits that must be filled.
    remedy : str
        One more line of advice.

    Raises
    ------
    DataError
        Naming all empty splits of the first fold that has one.
    """
    for number, parts in enumerate(layouts, 1):
        reasons = notes.dropped + notes.folds[number]
        where = f" of fold {number}" if len(layouts) > 1 else ""
        empty = {name: sorted(set(accents) - {row.accent for row in parts[name]}) for name in wanted}
        if any(empty.values()):
            raise DataError(
                "; ".join(f"split {name}{where} has no clip of {', '.join(a)}" for name, a in empty.items() if a)
                + f"\nleft out were: {_with_options(reasons) or 'none'}"
                + "\nleave the accent out, add data, or loosen the choice that took them"
                + (f"\n{remedy}" if remedy else "")
                + (_SAME_TEXT if any(reason.startswith("sentence in") for reason in +reasons) else "")
            )


def in_words(counts):
    """Counts by reason on one line, the largest first."""
    return ", ".join(f"{reason} {n}" for reason, n in _ranked(counts))


def _with_options(counts):
    """Counts by reason, each with the option that changes it."""
    parts = (
        f"{reason} {n}" + (f" ({_OPTIONS[reason]})" if reason in _OPTIONS else "") for reason, n in _ranked(counts)
    )
    return ", ".join(parts)


def _ranked(counts):
    return [(reason, n) for reason, n in sorted(counts.items(), key=lambda e: (-e[1], e[0])) if n]


def place(clip):
    """Where a clip (a Row, or cells) is in its source: row, split, and the name of its file, for messages."""
    cells = clip if isinstance(clip, dict) else dataclasses.asdict(clip)
    name = os.path.basename(cells["path"])
    return f"row {cells['row']} of {cells['split'] or 'the table'}" + (f" ({name})" if name else "")


def digest(value):
    """Digest of plain JSON values: twenty hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _without_doubtful(candidates, nameless, accents_of, notes, content_of, precedence):
    same_name = Counter(row.id for row in candidates)
    rows = {}
    for row in candidates:
        if accents_of and not row.speaker:
            notes.drop(NO_SPEAKER)
            continue
        if row.speaker and len(accents_of[row.speaker]) > 1:
            named = " and ".join(sorted(accents_of[row.speaker]))
            notes.drop(CONTRADICTING, clip=row.speaker, message=f"this speaker has clips of {named}")
            continue
        if content_of and (same_name[row.id] > 1 or row.id in nameless):
            row = dataclasses.replace(row, id=digest([row.id, content_of(row)]))
        if row.id in rows:
            kept = rows[row.id]
            notes.drop(DUPLICATE, clip=row, message=f"repeats row {kept.row} of {kept.split or 'the table'}")
            row = min(rows[row.id], row, key=precedence) if precedence else rows[row.id]
        rows[row.id] = row
    return list(rows.values())


def _require_accents(where, accents, found, raw, parsed, refused):
    """Refuse a source without a clip of one of the accents that passes the filters."""
    missing = [accent for accent in accents if not found[accent]]
    if not missing:
        return
    has = in_words(found) or "none that is known"
    lines = []
    for accent in missing:
        if refused[accent]:
            lines.append(f"every clip of '{accent}' in {where} was left out: {_with_options(refused[accent])}")
            continue
        close = difflib.get_close_matches(accent, found, 1) or [labels.parse(accent).label]
        hint = f" (did you mean '{close[0]}'?)" if close[0] in found else ""
        lines.append(f"no clip of '{accent}' in {where}; it has {has}{hint}")
    if raw and not all(refused[accent] for accent in missing):
        lines.append("its most frequent values, and what they map to:")
        for key, count in raw.most_common(_LISTED):
            lines.append(f"  '{shown(key)}' {count} -> {parsed[key].label or parsed[key].reason}")
        if any(accent.reason == labels.UNKNOWN_ACCENT for accent in parsed.values()):
            lines.append(MAPPING_ADVICE)
    if raw and not any(accent or variant for accent, variant in raw):
        lines.append("no row has an accent: Common Voice 12 has none for English; take another release")
    raise DataError("\n".join(lines))


def shown(key):
    """One text for an accent cell and its variant."""
    accent, variant = key
    return accent if not variant else f"{accent} (variant: {variant})" if accent else variant
