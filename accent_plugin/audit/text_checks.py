"""Checks of the table without audio: speakers and sentences in several splits, contradictory labels, balance."""

from array import array
from collections import Counter

import numpy as np

from accent_plugin.audit.findings import (
    BALANCE,
    CLIENT,
    CONTRADICTION,
    ERROR,
    EXAMPLES,
    MISSING,
    SENTENCE,
    UNLABELLED,
    WARNING,
    AuditClip,
    Example,
    Finding,
)
from accent_plugin.data import dataset_dict, labels, naming, speech_rate, splits
from accent_plugin.report.text import count_in_words

MOST_UNBALANCED = 3.0


class ClipTable:
    """A few numbers for each row of every split, in the order of the data; -1 means "none"."""

    def __init__(self, loaded, columns, seed, mapping):
        self.loaded, self.columns, self.names = loaded, columns, list(loaded)
        self.starts = np.cumsum([0, *map(len, loaded.values())])
        accents, clients = {}, {}
        accent, client, sentence, ranks = array("q"), array("q"), array("Q"), array("Q")
        self.characters = array("q")
        self.compound = Counter()
        self._texts = {}
        for split, data in loaded.items():
            for cells in dataset_dict.read_cells(data, columns[split]):
                label = self._label(cells["accent"], mapping)
                accent.append(accents.setdefault(label, len(accents)) if label else -1)
                client.append(clients.setdefault(cells["client"], len(clients)) if cells["client"] else -1)
                words = splits.normalise_sentence(cells["sentence"])
                self.characters.append(speech_rate.count_characters(cells["sentence"]))
                # 64 bits: ten million sentences have a collision in one of 300,000 corpora.
                sentence.append(splits.rank("sentence", words) if words else 0)
                ranks.append(splits.rank(seed, "check", cells["client"], cells["path"], cells["sentence"]))
        # Codes follow the sorted names, so that nothing depends on the order of rows.
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
        """A pseudo-random number for each row, from its text, or from its audio if other rows have the same text."""
        ranks = self._ranks.copy()
        _, inverse, count = np.unique(ranks, return_inverse=True, return_counts=True)
        for row in np.flatnonzero((count[inverse] > 1) & (self.accent >= 0)):
            split, number = self.place(row)
            content = dataset_dict.content_digest(self.loaded[split], self.columns[split], number)
            ranks[row] = splits.rank(int(ranks[row]), content)
        return ranks

    def place(self, row):
        """Split of a row, and its number there."""
        split = self.split[row]
        return self.names[split], int(row - self.starts[split])

    def clip(self, row):
        """Position and path of a row."""
        split, number = self.place(row)
        return AuditClip(split, number, self.cells(row)["path"])

    def cells(self, row):
        """Read the text cells of one row."""
        split, number = self.place(row)
        return next(dataset_dict.read_cells(_SingleRow(self.loaded[split], number), self.columns[split]))

    def accent_name(self, row):
        """Label of a row; empty if it has none."""
        return self.accents[self.accent[row]] if self.accent[row] >= 0 else ""

    def client_name(self, row):
        """Speaker of a row; empty if unknown."""
        return self.clients[self.client[row]] if self.client[row] >= 0 else ""

    def sentence_text(self, row):
        """Sentence of a row in its original spelling."""
        return self.cells(row)["sentence"]

    def counts(self, seconds=None):
        """Clips, speakers and seconds of each accent in each split."""
        made = {name: {} for name in self.names}
        labelled = np.flatnonzero(self.accent >= 0)
        cell = self.split[labelled] * len(self.accents) + self.accent[labelled]
        order = labelled[np.argsort(cell, kind="stable")]
        for mine in runs_of_equal(self.split[order] * len(self.accents) + self.accent[order], order):
            clients = np.unique(self.client[mine])
            made[self.names[self.split[mine[0]]]][self.accent_name(mine[0])] = {
                "clips": len(mine),
                "clients": int((clients >= 0).sum()) if self.clients else None,
                "seconds": None if seconds is None else round(float(seconds[mine].sum()), 2),
            }
        return made

    def notes(self):
        """Notes on cells that are not findings."""
        made = []
        if self.compound:
            (cell, _), total = self.compound.most_common(1)[0], sum(self.compound.values())
            made.append(
                f"{count_in_words(total, 'row')} with more than one accent in the cell, such as '{cell}': "
                "counted as unlabelled"
            )
        made += self._unused_columns()
        nameless = int((self.client < 0).sum())
        if self.clients and nameless:
            made.append(f"{nameless:,} of {count_in_words(len(self.client), 'row')} without a client id")
        return made

    def _unused_columns(self):
        """Notes on checks that lack a column in some split, and on columns that look as if they could serve."""
        for role, unchecked in _UNCHECKED.items():
            without = [split for split in self.names if not self.columns[split][role]]
            if not without:
                continue
            where = "" if len(without) == len(self.names) else f" in {', '.join(without)}"
            noun = naming.ROLE_NOUNS[role]
            yield f"no {noun} column{where}: {unchecked}"
            columns = {column for split in without for column in self.loaded[split].column_names}
            if likely := naming.likely_columns(role, sorted(columns)):
                yield f"columns that may hold the {noun}: {', '.join(likely)}; name one with {role}_column"
        if len(self.names) == 1:
            yield f"the only split is {self.names[0]}: nothing can be in several splits"


# Role -> what is not checked without its column.
_UNCHECKED = {
    "client": "speakers in several splits and speakers with several accents were not looked for",
    "sentence": "sentences in several splits were not looked for",
}


class _SingleRow:
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
    """Groups of rows that occur in more than one part, as arrays of the first row in each part, in the data's order."""
    order = rows[np.lexsort((rows, part[rows], group[rows]))]
    first = order[_changes(group[order]) | _changes(part[order])]
    return sorted(map(np.sort, runs_of_equal(group[first], first, 2)), key=lambda members: members[0])


def runs_of_equal(values, rows, least=1):
    """Yield the rows of each run of equal values, if it has at least ``least`` rows; the values are sorted."""
    starts = np.flatnonzero(_changes(values))
    ends = np.append(starts[1:], len(values))
    for place in np.flatnonzero(ends - starts >= least):
        yield rows[starts[place] : ends[place]]


def _changes(values):
    """Whether each element of a sorted array differs from the one before; True for the first."""
    changed = np.ones(len(values), bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def shared_speakers(table):
    """Yield a finding about speakers in more than one split."""
    if not table.clients:
        message = "no speaker column: cannot check whether splits share speakers (client_column names the column)"
        yield Finding(CLIENT, WARNING, message)
        return
    found = _in_several(table.client, table.split, np.flatnonzero(table.client >= 0))
    if found:
        where = name_splits(table, found)
        message = f"{count_in_words(len(found), 'speaker')} in more than one split ({where}): "
        message += "the test is not on unseen speakers"
        yield Finding(CLIENT, ERROR, message, len(found), _examples(table, found, table.client_name))


def shared_sentences(table):
    """Yield a finding about sentences in more than one split."""
    found = _in_several(table.sentence, table.split, np.flatnonzero(table.sentence != 0))
    if found:
        message = f"{count_in_words(len(found), 'sentence')} in more than one split ({name_splits(table, found)})"
        yield Finding(SENTENCE, ERROR, message, len(found), _examples(table, found, table.sentence_text))


def contradictions(table):
    """Yield a finding about speakers with more than one accent."""
    found = _in_several(table.client, table.accent, np.flatnonzero((table.client >= 0) & (table.accent >= 0)))
    if found:
        examples = []
        for rows in found[:EXAMPLES]:
            clips = [table.clip(row) for row in rows]
            accents = ", ".join(f"{table.accent_name(row)} ({clip})" for row, clip in zip(rows, clips, strict=True))
            examples.append(Example(f"'{table.client_name(rows[0])}': {accents}", tuple(clips)))
        message = f"{count_in_words(len(found), 'speaker')} with contradictory accents"
        yield Finding(CONTRADICTION, ERROR, message, len(found), tuple(examples))


def imbalance(table):
    """Yield findings about missing labels, missing accents and imbalanced training data."""
    counts = table.counts()
    if nothing := int((table.accent < 0).sum()):
        rows = np.flatnonzero(table.accent < 0)[:EXAMPLES]
        total = len(table.accent)
        message = f"{nothing:,} of {count_in_words(total, 'row')} without an accent"
        examples = tuple(Example(str(clip), (clip,)) for clip in map(table.clip, rows))
        yield Finding(UNLABELLED, ERROR if nothing == total else WARNING, message, nothing, examples)
    absent = [(split, accent) for split in counts for accent in table.accents if accent not in counts[split]]
    if absent:
        examples = tuple(Example(f"{accent} has no clip in {split}") for split, accent in absent[:EXAMPLES])
        accents = len({accent for _, accent in absent})
        message = f"{count_in_words(accents, 'accent')} without a clip in some split"
        yield Finding(MISSING, ERROR, message, len(absent), examples)
    # A single split is training data, whatever its name.
    for split in (name for name in table.names if naming.split_kind(name) == naming.TRAIN or len(counts) == 1):
        clips = {accent: cell["clips"] for accent, cell in counts[split].items()}
        if clips and (ratio := max(clips.values()) / min(clips.values())) > MOST_UNBALANCED:
            large, small = max(clips, key=clips.__getitem__), min(clips, key=clips.__getitem__)
            message = f"{large} has {ratio:.1f} times as many clips in {split} as {small}: "
            yield Finding(BALANCE, WARNING, message + f"{clips[large]:,} and {clips[small]:,}")


def name_splits(table, found):
    """Name the splits of groups of rows, the most frequent combinations first."""
    pairs = Counter(tuple(dict.fromkeys(table.names[table.split[row]] for row in rows)) for rows in found)
    return ", ".join(f"{' and '.join(names)} {count:,}" for names, count in pairs.most_common(4))


def _examples(table, found, name):
    made = []
    for rows in found[:EXAMPLES]:
        clips = tuple(map(table.clip, rows))
        made.append(Example(f"'{shorten(name(rows[0]))}': {' and '.join(map(str, clips))}", clips))
    return tuple(made)


def shorten(words, most=60):
    """The beginning of a text on one line."""
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 1] + "…"
