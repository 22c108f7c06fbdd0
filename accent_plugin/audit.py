"""What is wrong with a DatasetDict as data for telling accents apart: leaks, contradictions, broken files, confounds.

It looks at every split of any DatasetDict, prepared by nobody, and changes nothing. Kinds of findings:

=============  ========  =============================================================================================
kind           severity  what is found
=============  ========  =============================================================================================
client         error     a client in more than one split; a warning where the data have no client ids
sentence       error     a sentence (letters and digits, see ``splits.normalise_sentence``) in more than one split
contradiction  error     a client with more than one accent
audio          error     the same samples twice, in two splits or with two accents or clients; else a warning
undecodable    error     files that are undecodable, empty, non-finite, silent, or too long to be one clip
missing        error     an accent that a split does not have
unlabelled     warning   rows without an accent; an error where no row has one
balance        warning   an accent with more than 3 times as many clips in train as another
channel        error     the recording alone tells the accents apart (``nuisance.confound``); a warning where that
                         cannot be tested
=============  ========  =============================================================================================

The same samples are those that are equal in 16 bits after decoding to mono: a recording as FLAC and as WAV, not one
that was compressed, cut or resampled. Accents outside ``labels`` count as they are written, so that any corpus can be
checked. Nothing here imports torch; rows are streamed, and of each a few numbers are kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from accent_plugin import audio, disk, labels, nuisance, sources, splits
from accent_plugin.errors import AudioError, ConfigError, DataError

ERROR, WARNING = "error", "warning"
KINDS = (
    CLIENT,
    SENTENCE,
    CONTRADICTION,
    AUDIO,
    UNDECODABLE,
    MISSING,
    UNLABELLED,
    BALANCE,
    CHANNEL,
) = "client", "sentence", "contradiction", "audio", "undecodable", "missing", "unlabelled", "balance", "channel"

MOST_UNBALANCED = 3.0
MAX_SECONDS = 600.0  # longer than any clip; decoding a whole audio book would take all memory
EXAMPLES = 5

MARKDOWN_FILE = "check.md"
JSON_FILE = "check.json"

_MOST_ROWS = 30  # accents in tables and pictures
_COLUMNS = {"clips": "clips", "clients": "clients", "hours": "seconds"}  # of tables -> key of counts
_BAD = (audio.UNDECODABLE, audio.EMPTY, audio.NON_FINITE, audio.SILENT, audio.TOO_LONG)
_NO_AUDIO = "the audio was not read: same recordings, broken files, hours and the channel were not checked"


@dataclass(frozen=True)
class Clip:
    """Where a clip is: split and row number (from 0) in the source, and its path there, which may be empty."""

    split: str
    row: int
    path: str = ""

    def __str__(self):
        return f"{self.split}:{self.row}" + (f" {self.path}" if self.path else "")


@dataclass(frozen=True)
class Example:
    """One instance of a finding, in words that name the clips, and the clips."""

    text: str
    clips: tuple[Clip, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Arguments
    ---------
    kind : str
        Of ``KINDS``.
    severity : str
        "error" or "warning".
    message : str
        One sentence with numbers.
    count : int
        Of clients, sentences, recordings, files or whatever the message counts.
    examples : tuple of Example
        The first few, in the order of the data.
    """

    kind: str
    severity: str
    message: str
    count: int = 1
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What ``check`` found.

    Arguments
    ---------
    name : str
        Of the data set.
    findings : tuple of Finding
        Errors first, then in the order of ``KINDS``.
    counts : dict
        Split -> accent -> {"clips", "clients", "seconds"}; clients are None without client ids, seconds are None where
        the audio was not read, and leave out unusable files.
    confound : nuisance.Confound or None
        None where the audio was not read.
    notes : tuple of str
        What to know when reading it.
    arguments : dict
        Seed, permutations, and names of columns by split.
    measured : tuple
        (accent, nuisance.Features) of each clip that went into the confound test.
    """

    name: str
    findings: tuple[Finding, ...]
    counts: dict
    confound: nuisance.Confound | None
    notes: tuple[str, ...]
    arguments: dict
    measured: tuple = field(default=(), repr=False)

    def wrong(self, ignore=()):
        """Findings that are errors and whose kind is not ignored.

        Raises
        ------
        ConfigError
            When a kind to ignore does not exist.
        """
        require_kinds(ignore)
        return tuple(found for found in self.findings if found.severity == ERROR and found.kind not in ignore)

    def as_json(self):
        """Plain values for strict JSON, without the single measurements."""
        plain = {
            "name": self.name,
            "errors": len(self.wrong()),
            "findings": [dataclasses.asdict(found) for found in self.findings],
            "counts": self.counts,
            "confound": None if self.confound is None else nuisance.as_json(self.confound),
            "medians": _medians(self.measured),
            "notes": self.notes,
            "arguments": self.arguments,
        }
        return json.loads(json.dumps(plain))


def require_kinds(names):
    """Refuse names that are no kinds of findings."""
    if unknown := sorted(set(names) - set(KINDS)):
        raise ConfigError(f"ignore names {', '.join(unknown)}; choose of {', '.join(KINDS)}")


def check(
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
        A DatasetDict saved with ``save_to_disk``. Relative paths in it are relative to this folder. Only read.
    seed : int
        Decides the clips, folds and permutations of the channel test.
    with_audio : bool
        Whether to decode every clip.
    workers : int, optional
        Processes that decode; None takes the machine's cores, or none for a few clips.
    progress : bool
        Whether to draw progress bars on stderr.
    permutations : int
        Of the channel test, 100 or more.
    accent_column, client_column, sentence_column, audio_column : str, optional
        Names of columns; None finds them.
    mapping : dict, optional
        More spellings of accents, ``{spelling: label}``.

    Returns
    -------
    Audit

    Raises
    ------
    DataError
        When there is no DatasetDict, or it lacks a column that is needed.
    ConfigError
        When ``permutations`` cannot show anything.
    """
    nuisance.require_permutations(permutations)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; give 1 or more")
    mapping = labels.read_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    data_folder = Path(data_folder).absolute()
    card = sources.fingerprint(data_folder)["card"]
    loaded = sources.open_all(data_folder)
    given = {"accent": accent_column, "client": client_column, "sentence": sentence_column, "audio": audio_column}
    columns = {split: sources.find_columns(split, data, data_folder, given) for split, data in loaded.items()}
    if not sum(map(len, loaded.values())):
        raise DataError(f"{data_folder} has no rows in any of its splits {', '.join(loaded)}: make it again")
    table = _Table(loaded, columns, seed, mapping)

    findings = [*_clients(table), *_sentences(table), *_contradictions(table), *_balance(table)]
    notes, confound, measured, seconds = table.notes(), None, (), None
    if with_audio:
        drawn = nuisance.draw(table.accent, table.client, table.ranks(), seed=seed)
        heard = _listen(table, data_folder, drawn, workers, progress)
        seconds = heard.seconds
        findings += [*_unusable(table, heard), *_twice(table, heard)]
        confound, measured = _confound(table, heard, seed, permutations, progress)
        findings += _channel(confound)
        notes += _about(confound, table)
    else:
        notes.append(_NO_AUDIO)
    return Audit(
        name=str(card.get("name") or data_folder.name),
        findings=tuple(sorted(findings, key=lambda found: (found.severity, KINDS.index(found.kind)))),
        counts=table.counts(seconds),
        confound=confound,
        notes=tuple(notes),
        arguments={"seed": seed, "permutations": permutations, "columns": columns},
        measured=measured,
    )


# -------------------------------------------------------------------------------------------------------- the text


class _Table:
    """A few numbers for each row of every split, in the order of the data; -1 stands for "none"."""

    def __init__(self, loaded, columns, seed, mapping):
        self.loaded, self.columns, self.names = loaded, columns, list(loaded)
        self.starts = np.cumsum([0, *map(len, loaded.values())])
        accents, clients = {}, {}
        accent, client, sentence, ranks = array("q"), array("q"), array("Q"), array("Q")
        self.compound = Counter()
        self._texts = {}
        for split, data in loaded.items():
            for cells in sources.read_cells(data, columns[split]):
                label = self._label(cells["accent"], mapping)
                accent.append(accents.setdefault(label, len(accents)) if label else -1)
                client.append(clients.setdefault(cells["client"], len(clients)) if cells["client"] else -1)
                words = splits.normalise_sentence(cells["sentence"])
                # 64 bits: among ten million sentences two share a number once in 300,000 corpora.
                sentence.append(splits.rank("sentence", words) if words else 0)
                ranks.append(splits.rank(seed, "check", cells["client"], cells["path"], cells["sentence"]))
        # Codes in the order of names, so that nothing depends on the order of rows.
        self.accents, self.accent = _sorted_codes(accents, accent)
        self.clients, self.client = _sorted_codes(clients, client)
        self.sentence, self._ranks = (np.frombuffer(a, np.uint64) if len(a) else np.zeros(0, np.uint64)
                                      for a in (sentence, ranks))  # fmt: skip
        self.split = np.repeat(np.arange(len(self.names)), np.diff(self.starts))

    def _label(self, raw, mapping):
        parsed = labels.parse(raw, mapping)
        if parsed.reason == labels.COMPOUND_ACCENT:
            self.compound[raw] += 1
            return ""
        return parsed.label or (labels.normalise(raw) if parsed.reason == labels.UNKNOWN_ACCENT else "")

    def ranks(self):
        """A pseudo-random number for each row; rows that nothing in the table tells apart are told apart by content."""
        ranks = self._ranks.copy()
        _, inverse, count = np.unique(ranks, return_inverse=True, return_counts=True)
        for row in np.flatnonzero((count[inverse] > 1) & (self.accent >= 0)):
            split, number = self.place(row)
            content = sources.content_digest(self.loaded[split], self.columns[split], number)
            ranks[row] = splits.rank(int(ranks[row]), content)
        return ranks

    def place(self, row):
        """Split and row number in it."""
        split = self.split[row]
        return self.names[split], int(row - self.starts[split])

    def clip(self, row):
        """Where a row is, with its path."""
        split, number = self.place(row)
        return Clip(split, number, self.cells(row)["path"])

    def cells(self, row):
        """Text of one row, read again."""
        split, number = self.place(row)
        return next(sources.read_cells(_One(self.loaded[split], number), self.columns[split]))

    def accent_name(self, row):
        return self.accents[self.accent[row]] if self.accent[row] >= 0 else ""

    def client_name(self, row):
        return self.clients[self.client[row]] if self.client[row] >= 0 else ""

    def sentence_text(self, row):
        """The sentence as it is written."""
        return self.cells(row)["sentence"]

    def counts(self, seconds=None):
        """Clips, clients and seconds of each accent in each split."""
        made = {name: {} for name in self.names}
        labelled = np.flatnonzero(self.accent >= 0)
        cell = self.split[labelled] * len(self.accents) + self.accent[labelled]
        order = labelled[np.argsort(cell, kind="stable")]
        for mine in _runs(self.split[order] * len(self.accents) + self.accent[order], order):
            clients = np.unique(self.client[mine])
            made[self.names[self.split[mine[0]]]][self.accent_name(mine[0])] = {
                "clips": len(mine),
                "clients": int((clients >= 0).sum()) if self.clients else None,
                "seconds": None if seconds is None else round(float(seconds[mine].sum()), 2),
            }
        return made

    def notes(self):
        made = []
        if self.compound:
            (cell, _), total = self.compound.most_common(1)[0], sum(self.compound.values())
            made.append(
                f"{_many(total, 'row')} with more than one accent in the cell, such as '{cell}': not labelled here"
            )
        nameless = int((self.client < 0).sum())
        if self.clients and nameless:
            made.append(f"{_many(nameless, 'row')} without a client id, of {len(self.client):,}")
        return made


class _One:
    """One row of a Dataset in Arrow format, as a Dataset of one row."""

    def __init__(self, data, number):
        self._data, self._number, self.features = data, number, data.features

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return self._data[self._number : self._number + 1]


def _sorted_codes(found, codes):
    names = sorted(found)
    if not names:
        return names, np.full(len(codes), -1)
    new = np.empty(len(names) + 1, np.int64)
    new[[found[name] for name in names]] = np.arange(len(names))
    new[-1] = -1
    return names, new[np.frombuffer(codes, np.int64)]


def _in_several(group, part, rows):
    """Groups of rows that lie in more than one part, as arrays of rows, each part's first, in the order of the data."""
    order = rows[np.lexsort((rows, part[rows], group[rows]))]
    first = order[_changes(group[order]) | _changes(part[order])]
    return sorted(map(np.sort, _runs(group[first], first, 2)), key=lambda members: members[0])


def _runs(values, rows, least=1):
    """Yield the stretches of rows along which the sorted values are equal, if they have so many rows."""
    starts = np.flatnonzero(_changes(values))
    ends = np.append(starts[1:], len(values))
    for place in np.flatnonzero(ends - starts >= least):
        yield rows[starts[place] : ends[place]]


def _changes(values):
    """Where a sorted array differs from the element before; the first one does."""
    changed = np.ones(len(values), bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def _clients(table):
    if not table.clients:
        message = "no client ids: whether splits share speakers cannot be told (client_column names the column)"
        yield Finding(CLIENT, WARNING, message)
        return
    found = _in_several(table.client, table.split, np.flatnonzero(table.client >= 0))
    if found:
        where = _which_splits(table, found)
        message = f"{_many(len(found), 'client')} in more than one split ({where}): scores are not on unseen speakers"
        yield Finding(CLIENT, ERROR, message, len(found), _examples(table, found, table.client_name))


def _sentences(table):
    found = _in_several(table.sentence, table.split, np.flatnonzero(table.sentence != 0))
    if found:
        message = f"{_many(len(found), 'sentence')} in more than one split ({_which_splits(table, found)})"
        yield Finding(SENTENCE, ERROR, message, len(found), _examples(table, found, table.sentence_text))


def _contradictions(table):
    found = _in_several(table.client, table.accent, np.flatnonzero((table.client >= 0) & (table.accent >= 0)))
    if found:
        examples = []
        for rows in found[:EXAMPLES]:
            clips = [table.clip(row) for row in rows]
            told = ", ".join(f"{table.accent_name(row)} ({clip})" for row, clip in zip(rows, clips, strict=True))
            examples.append(Example(f"'{table.client_name(rows[0])}': {told}", tuple(clips)))
        message = f"{_many(len(found), 'client')} with contradicting accents"
        yield Finding(CONTRADICTION, ERROR, message, len(found), tuple(examples))


def _balance(table):
    counts = table.counts()
    if nothing := int((table.accent < 0).sum()):
        rows = np.flatnonzero(table.accent < 0)[:EXAMPLES]
        total = len(table.accent)
        message = f"{nothing:,} of {_many(total, 'row')} without an accent"
        examples = tuple(Example(str(clip), (clip,)) for clip in map(table.clip, rows))
        yield Finding(UNLABELLED, ERROR if nothing == total else WARNING, message, nothing, examples)
    absent = [(split, accent) for split in counts for accent in table.accents if accent not in counts[split]]
    if absent:
        examples = tuple(Example(f"{accent} has no clip in {split}") for split, accent in absent[:EXAMPLES])
        accents = len({accent for _, accent in absent})
        message = f"{_many(accents, 'accent')} without a clip in some split"
        yield Finding(MISSING, ERROR, message, len(absent), examples)
    # A single split is a pool to train on, whatever it is called.
    for split in (name for name in table.names if sources.canonical(name) == splits.TRAIN or len(counts) == 1):
        clips = {accent: cell["clips"] for accent, cell in counts[split].items()}
        if clips and (ratio := max(clips.values()) / min(clips.values())) > MOST_UNBALANCED:
            large, small = max(clips, key=clips.__getitem__), min(clips, key=clips.__getitem__)
            message = f"{large} has {ratio:.1f} times as many clips in {split} as {small}: "
            yield Finding(BALANCE, WARNING, message + f"{clips[large]:,} and {clips[small]:,}")


def _which_splits(table, found):
    pairs = Counter(tuple(dict.fromkeys(table.names[table.split[row]] for row in rows)) for rows in found)
    return ", ".join(f"{' and '.join(names)} {count:,}" for names, count in pairs.most_common(4))


def _examples(table, found, name):
    made = []
    for rows in found[:EXAMPLES]:
        clips = tuple(map(table.clip, rows))
        made.append(Example(f"'{_short(name(rows[0]))}': {' and '.join(map(str, clips))}", clips))
    return tuple(made)


# ------------------------------------------------------------------------------------------------------- the audio


@dataclass(frozen=True)
class _Job:
    """A clip to listen to, and whether it goes into the channel test."""

    id: int
    source: bytes | str
    measure: bool


@dataclass(frozen=True)
class _Outcome:
    """What was heard; digests are 64 bits, of the bytes and of the samples."""

    id: int
    seconds: float = 0.0
    content: int = 0
    samples: int = 0
    features: nuisance.Features | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class _Heard:
    """The same for all rows: arrays, features of the drawn ones, and the first few problems of each reason."""

    seconds: np.ndarray
    content: np.ndarray
    samples: np.ndarray
    usable: np.ndarray
    features: dict
    reasons: Counter
    problems: dict


def _hear(job):
    """Decode one clip; runs in a process of its own."""
    try:
        sound = audio.decode(job.source, MAX_SECONDS)
        audio.check(sound.samples, sound.sample_rate)
    except AudioError as error:
        return _Outcome(job.id, reason=error.reason, message=str(error))
    measured = nuisance.features(sound.samples, sound.sample_rate, sound.codec) if job.measure else None
    rate = sound.sample_rate.to_bytes(4, "big")
    content = job.source if isinstance(job.source, bytes) else Path(job.source).read_bytes()
    return _Outcome(
        job.id, sound.seconds, _number(content), _number(rate, audio.quantise(sound.samples).tobytes()), measured
    )


def _died(id_, message):
    return _Outcome(id_, reason=audio.UNDECODABLE, message=message)


def _number(*parts):
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big")


def _listen(table, data_folder, drawn, workers, progress):
    from tqdm import tqdm

    total = len(table.accent)
    measure = np.zeros(total, bool)
    measure[drawn] = True
    heard = _Heard(
        seconds=np.zeros(total),
        content=np.zeros(total, np.uint64),
        samples=np.zeros(total, np.uint64),
        usable=np.zeros(total, bool),
        features={},
        reasons=Counter(),
        problems={reason: [] for reason in _BAD},
    )

    def jobs():
        for row in range(total):
            split, number = table.place(row)
            sound = sources.sound(table.loaded[split], table.columns[split], number)
            yield _Job(row, sound if isinstance(sound, bytes) else str(data_folder / sound), bool(measure[row]))

    outcomes = audio.each(_hear, jobs(), audio.worker_count(workers, total), died=_died)
    with contextlib.closing(outcomes), tqdm(total=total, desc="listening", unit="clip", disable=not progress) as bar:
        for outcome in outcomes:
            bar.update()
            row = outcome.id
            if outcome.reason:
                heard.reasons[outcome.reason] += 1
                # Outcomes come in any order: the first ones are known at the end only.
                worst = heard.problems[outcome.reason]
                worst.append((row, outcome.message))
                if len(worst) > 4 * EXAMPLES:
                    worst[:] = sorted(worst)[:EXAMPLES]
                continue
            heard.seconds[row], heard.usable[row] = outcome.seconds, True
            heard.content[row], heard.samples[row] = outcome.content, outcome.samples
            if outcome.features:
                heard.features[row] = outcome.features
    return heard


def _unusable(table, heard):
    if not heard.reasons:
        return
    examples = []
    for reason in _BAD:
        for row, message in sorted(heard.problems[reason])[:EXAMPLES]:
            clip = table.clip(row)
            examples.append(Example(f"{reason}: {clip}: {message}", (clip,)))
    total = sum(heard.reasons.values())
    counts = ", ".join(f"{reason} {heard.reasons[reason]:,}" for reason in _BAD if heard.reasons[reason])
    yield Finding(UNDECODABLE, ERROR, f"{_many(total, 'file')} that cannot be used: {counts}", total, tuple(examples))


def _twice(table, heard):
    rows = np.flatnonzero(heard.usable)
    order = rows[np.argsort(heard.samples[rows], kind="stable")]
    leaks, within = [], []
    for group in sorted(_runs(heard.samples[order], order, 2), key=lambda group: group[0]):
        differ = any(len(np.unique(of[group])) > 1 for of in (table.split, table.accent, table.client))
        (leaks if differ else within).append(group)
    for found, severity in ((leaks, ERROR), (within, WARNING)):
        if found:
            noun = "recording" if len(found) == 1 else "recordings"
            where = _which_splits(table, found)
            what = (
                "more than once, in several splits or with several accents or clients"
                if severity == ERROR
                else ("more than once in a split, with one client")
            )
            examples = tuple(_same(table, heard, group) for group in found[:EXAMPLES])
            message = f"{len(found):,} {noun} {what} ({where})"
            yield Finding(AUDIO, severity, message, len(found), examples)


def _same(table, heard, group):
    # A clip of another split says more than a neighbour.
    other = next((row for row in group if table.split[row] != table.split[group[0]]), group[1])
    clips = table.clip(group[0]), table.clip(other)
    what = "same bytes" if heard.content[group[0]] == heard.content[other] else "same samples in another file"
    more = f", and {_many(len(group) - 2, 'more')}" if len(group) > 2 else ""
    who = [f"{table.client_name(row) or '?'}, {table.accent_name(row) or '?'}" for row in (group[0], other)]
    named = [f"{clip} ({name})" for clip, name in zip(clips, who, strict=True)] if who[0] != who[1] else clips
    return Example(f"{named[0]} and {named[1]}{more}: {what}", clips)


def _confound(table, heard, seed, permutations, progress):
    rows = sorted(heard.features)
    accents = [table.accent_name(row) for row in rows]
    clients = [table.client_name(row) for row in rows]
    measured = [heard.features[row] for row in rows]
    result = nuisance.confound(measured, accents, clients, seed=seed, permutations=permutations, progress=progress)
    return result, tuple(sorted(zip(accents, measured, strict=True)))


def _channel(confound):
    if not confound.possible:
        yield Finding(
            CHANNEL, WARNING, f"whether the recording gives the accent away was not possible to test: {confound.reason}"
        )
    elif confound.found:
        told = sorted(confound.by_feature.items(), key=lambda item: -item[1])
        examples = tuple(
            Example(f"{name.replace('_', ' ')} alone: {uar:.2f}") for name, uar in told if uar > confound.chance
        )
        message = (
            f"the recording alone tells the accents apart: average recall {confound.uar:.2f} without listening to"
            f" anybody, {confound.chance:.2f} by chance (p = {confound.p:.3f})"
        )
        yield Finding(CHANNEL, ERROR, message, 1, examples[:3])


def _about(confound, table):
    made = []
    labelled = int((table.accent >= 0).sum())
    if confound.possible:
        made.append(
            f"the channel test used {confound.clips:,} of {_many(labelled, 'labelled clip')}, by"
            f" {_many(confound.clients, 'client')}: at most {nuisance.CLIPS_PER_CLIENT} of each,"
            f" {nuisance.MOST_CLIPS:,} in all"
        )
        if not confound.by_client:
            made[-1] += "; without client ids each clip stands for itself, and p is too small where speakers repeat"
        if left := [accent for accent in table.accents if accent not in confound.accents]:
            named = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            made.append(
                f"the channel test leaves out {named}: it takes the {nuisance.MOST_ACCENTS} accents with the most"
                f" clients, {nuisance.FOLDS} or more"
            )
    return made


# ----------------------------------------------------------------------------------------------------- what is said


def text(audit):
    """What the command prints: findings, the table of accents and splits, the channel test, notes."""
    lines = [_title(audit), ""]
    width = max((len(found.kind) for found in audit.findings), default=0)
    for found in audit.findings:
        lines.append(f"{found.severity:7}  {found.kind:{width}}  {found.message}")
        lines += [f"{'':{width + 11}}{example.text}" for example in found.examples]
    lines += ["", *_aligned(audit), ""]
    if audit.confound and audit.confound.possible:
        lines.append("channel: " + _tested(audit.confound))
    lines += [f"note: {note}" for note in audit.notes]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def write_report(folder, audit):
    """Write check.md, check.json and pictures.

    Arguments
    ---------
    folder : str or Path
        Made where it is absent; files of the same names are replaced.
    audit : Audit

    Raises
    ------
    DataError
        When the folder cannot be written.
    """
    # Workers that decode import this module, and have no use for matplotlib.
    from accent_plugin import pictures

    folder = Path(folder)
    with disk.writing(folder, "report"):
        shown = []
        most = sorted(_totals(audit), key=lambda accent: -_totals(audit)[accent])[:_MOST_ROWS]
        if most:
            counts = {split: {a: cell[a] for a in sorted(most) if a in cell} for split, cell in audit.counts.items()}
            pictures.composition(folder / "composition.png", counts)
            shown.append(("composition.png", "clips, clients and hours of each accent in each split"))
        if audit.measured:
            values = {}
            for accent, measured in audit.measured:
                for name in nuisance.UNITS:
                    values.setdefault(name, {}).setdefault(accent, []).append(getattr(measured, name))
            pictures.nuisance(folder / "nuisance.png", values, nuisance.UNITS)
            shown.append(("nuisance.png", "what the recordings of each accent are like"))
        if audit.confound and audit.confound.possible:
            c = audit.confound
            pictures.permutations(folder / "channel.png", c.permuted, c.uar, c.p)
            shown.append(("channel.png", "accents told apart by the recording alone, against chance"))
        with disk.replacing(folder / MARKDOWN_FILE) as file:
            file.write(_markdown(audit, shown))
        # Last, since it is what other programs look for.
        with disk.replacing(folder / JSON_FILE) as file:
            file.write(json.dumps(audit.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _title(audit):
    errors = len(audit.wrong())
    return f"{audit.name}: {_many(errors, 'error')}, {_many(len(audit.findings) - errors, 'warning')}"


def _markdown(audit, shown):
    columns, rows = _counted(audit)
    lines = [f"# Check of {_escape(_title(audit))}", ""]
    for found in audit.findings:
        lines.append(f"* **{found.severity}, {found.kind}**: {_escape(found.message)}")
        lines += [f"    * {_escape(example.text)}" for example in found.examples]
    if not audit.findings:
        lines.append("Nothing was found.")
    lines += [
        "",
        "## Accents and splits",
        "",
        *_markdown_table(["accent", *(f"{split} {c}" for split in audit.counts for c in columns)], rows),
        "",
    ]
    if audit.confound:
        lines += ["## What the recording alone gives away", ""]
        c = audit.confound
        lines += [
            _escape(f"{_tested(c)[0].upper()}{_tested(c)[1:]}." if c.possible else f"Not tested: {c.reason}."),
            "",
        ]
    if medians := _medians(audit.measured):
        header = [
            "median",
            *(f"{_spaced(name)}{f' ({unit})' if unit else ''}" for name, unit in nuisance.UNITS.items()),
        ]
        rows = [[accent, *(_plain(value) for value in cells.values())] for accent, cells in medians.items()]
        if audit.confound.possible:
            rows.append(
                ["average recall alone", *(f"{audit.confound.by_feature[name]:.2f}" for name in nuisance.UNITS)]
            )
        lines += [*_markdown_table(header, rows), ""]
    lines += [f"![{words}]({name})\n" for name, words in shown]
    if audit.notes:
        lines += ["## Notes", "", *(f"* {_escape(note)}" for note in audit.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(header, rows):
    cells = [[_escape(cell) for cell in header], ["---"] * len(header), *([_escape(c) for c in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _counted(audit):
    """Names of columns, and rows of the table of accents and splits with as many cells per split, the largest first."""
    known = [cell for cells in audit.counts.values() for cell in cells.values()]
    columns = [c for c, key in _COLUMNS.items() if any(cell[key] is not None for cell in known)]
    totals = _totals(audit)
    shown = sorted(totals, key=lambda accent: (-totals[accent], accent))
    rows = []
    for accent in shown[:_MOST_ROWS]:
        rows.append([accent, *(_cell(cells.get(accent), c) for cells in audit.counts.values() for c in columns)])
    for name, accents in ((f"{len(shown) - _MOST_ROWS} others", shown[_MOST_ROWS:]), ("all", shown)):
        if len(accents) > 1:
            sums = [_sum([cells[a] for a in accents if a in cells]) for cells in audit.counts.values()]
            rows.append([name, *(_cell(total, c) for total in sums for c in columns)])
    return columns, rows


def _sum(cells):
    total = {key: [cell[key] for cell in cells] for key in _COLUMNS.values()}
    return {key: None if None in values else sum(values) for key, values in total.items()}


def _cell(cell, column):
    if cell is None:
        return "-"
    value = cell[_COLUMNS[column]]
    return "" if value is None else f"{value / 3600:.2f}" if column == "hours" else f"{value:,}"


def _aligned(audit):
    """The table for the terminal, each split's name above its columns."""
    columns, rows = _counted(audit)
    if not rows:
        return []
    heads = ["accent", *columns * len(audit.counts)]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [" " * widths[0]] + [f"{row[0]:{widths[0]}}" for row in (heads, *rows)]
    for k, split in enumerate(audit.counts):
        places = range(1 + k * len(columns), 1 + (k + 1) * len(columns))
        cells = [" ".join(f"{row[i]:>{widths[i]}}" for i in places) for row in (heads, *rows)]
        wide = max(len(split), len(cells[0]))
        lines = [f"{line}    {cell:>{wide}}" for line, cell in zip(lines, [f"{split:<{wide}}", *cells], strict=True)]
    return [line.rstrip() for line in lines]


def _tested(confound):
    told = sorted(confound.by_feature.items(), key=lambda item: -item[1])
    alone = ", ".join(f"{_spaced(name)} {uar:.2f}" for name, uar in told)
    return (
        f"average recall of {len(confound.accents)} accents from the recording alone {confound.uar:.2f}, by chance"
        f" {confound.chance:.2f}, p = {confound.p:.3f}; each alone: {alone}"
    )


def _medians(measured):
    """Accent -> feature -> median, or the commonest value."""
    by_accent = {}
    for accent, clip in measured:
        by_accent.setdefault(accent, []).append(clip)
    return {
        accent: {
            name: Counter(sorted(values)).most_common(1)[0][0]
            if name in nuisance.KINDS
            else round(float(np.median(values)), 3)
            for name, values in ((name, [getattr(clip, name) for clip in clips]) for name in nuisance.UNITS)
        }
        for accent, clips in by_accent.items()
    }


def _totals(audit):
    totals = Counter()
    for cells in audit.counts.values():
        totals.update({accent: cell["clips"] for accent, cell in cells.items()})
    return totals


def _plain(value):
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _spaced(name):
    return name.replace("_", " ")


def _many(count, word):
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _short(words, most=60):
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 1] + "…"


def _escape(words):
    """Make plain text safe in Markdown, also in a table's cell."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(words.split())).replace("<", "&lt;").replace(">", "&gt;")
