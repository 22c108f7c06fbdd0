"""Splits, folds, balance and caps: pure functions on frozen records.

A seeded hash of names orders every draw, so results do not depend on the order of the rows or on random state.
An item is anything frozen with ``id`` (unique), ``accent``, ``speaker`` ("" where unknown) and ``sentence``
(normalised, "" where unknown). Splits are a dictionary from the names in ``SPLITS`` to tuples of items, sorted by id.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

from accent_plugin.data.naming import SPLITS, TEST, TRAIN, VALID, split_kind
from accent_plugin.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """One clip, as far as splitting is concerned."""

    id: str
    accent: str
    speaker: str = ""
    sentence: str = ""


@dataclass(frozen=True)
class Choice:
    """Items kept and items left out, both sorted by id."""

    kept: tuple
    dropped: tuple


def by_speaker(items, *, valid_fraction, test_fraction, seed):
    """Split one pool so that no speaker is in two splits, stratified by accent.

    A seeded hash orders the speakers of each accent: the first go to test, the next to valid. A fraction above zero
    takes at least one speaker. An item without a speaker counts as a speaker of its own.

    Arguments
    ---------
    items : iterable of Item
    valid_fraction : float
        Fraction of the speakers of each accent; 0 makes no valid split.
    test_fraction : float
        Likewise for test.
    seed : int

    Returns
    -------
    dict
        Split -> items, for train and each split with a fraction above zero.

    Raises
    ------
    DataError
        When an accent has too few speakers.
    """
    return _split(items, _speaker_of, "speaker(s)", valid_fraction, test_fraction, seed)


def by_hash(items, *, valid_fraction, test_fraction, seed):
    """Split one pool by a hash of each speaker, so that a speaker stays in the same split when data are added.

    The hash is a place between 0 and 1: places below ``test_fraction`` are in test, the next ``valid_fraction`` in
    valid, the others in train. The fractions are met on average only. In an accent with three speakers or more in which
    that leaves a split empty, the speakers with the nearest places fill it. When data are added, at most two speakers
    of an accent move. As soon as every split has a speaker by hash, all are where their hash puts them.

    Arguments
    ---------
    items : iterable of Item
        An item without a speaker counts as a speaker of its own.
    valid_fraction, test_fraction : float
        Probability of a speaker to be in valid and in test.
    seed : int

    Returns
    -------
    dict
        Split -> items, for all three. An accent with fewer than three speakers leaves splits empty, which the caller
        should refuse.
    """
    parts = {split: [] for split in SPLITS}
    for accent, units in _units(items, _speaker_of).items():
        places = sorted((rank(seed, "split", accent, unit) / 2**64, unit) for unit in units)
        count = len(places)
        test = sum(place < test_fraction for place, _ in places)
        valid = sum(place < test_fraction + valid_fraction for place, _ in places)
        if count >= len(SPLITS):
            test = min(max(test, 1), count - 2)
            valid = min(max(valid, test + 1), count - 1)
        for number, (_, unit) in enumerate(places):
            parts[TEST if number < test else VALID if number < valid else TRAIN].extend(units[unit])
    return _sorted(parts)


def given(items, *, valid_fraction, test_fraction, seed, missing=()):
    """Keep the splits of the source; those that it lacks are drawn from its train, by speaker.

    Arguments
    ---------
    items : iterable of Item
        Each also has ``split``, the name of its split in the source.
    valid_fraction, test_fraction, seed
        As in ``by_speaker``, for the missing splits.
    missing : collection of str
        Names in ``SPLITS`` that the source lacks.

    Returns
    -------
    dict
        Split -> items, for all three.
    """
    parts = {split: [item for item in items if split_kind(item.split) == split] for split in SPLITS}
    if missing:
        fractions = {
            "valid_fraction": valid_fraction if VALID in missing else 0,
            "test_fraction": test_fraction if TEST in missing else 0,
        }
        parts |= by_speaker(parts[TRAIN], **fractions, seed=seed)
    return _sorted(parts)


def at_random(items, *, valid_fraction, test_fraction, seed):
    """Split one pool by clip; splits then share speakers, which inflates the accuracy measured on them."""
    return _split(items, _id_of, "clip(s)", valid_fraction, test_fraction, seed)


def folds(items, count, *, valid_fraction, seed, by="speaker"):
    """Cut one pool into folds by speaker, stratified by accent; each speaker is in test of exactly one.

    Arguments
    ---------
    items : iterable of Item
    count : int
        Number of folds, 2 or more.
    valid_fraction : float
        Fraction of each fold's training speakers of each accent that become its valid; at least one speaker.
    seed : int
    by : str
        "speaker", or "clip" for folds that share speakers.

    Returns
    -------
    tuple of dict
        One dictionary of train, valid and test per fold.
    """
    unit_of, noun = {"speaker": (_speaker_of, "speaker(s)"), "clip": (_id_of, "clip(s)")}[by]
    if count < 2:
        raise DataError(f"{count} fold(s) cannot be made: choose 2 or more, 5 is usual")
    pool = _units(items, unit_of)
    fold_of, offset = {}, 0
    for accent, units in pool.items():
        least = max(count, 4 if count == 2 else 3)
        if len(units) < least:
            raise DataError(
                f"{accent} has {len(units)} {noun}, {count} folds need {least}: choose fewer folds or leave it out"
            )
        # Accents continue where the last one stopped, so that remainders do not pile up in the first folds.
        for place, unit in enumerate(_in_order(units, seed, "fold")):
            fold_of[accent, unit] = (place + offset) % count
        offset += len(units)
    made = []
    for fold in range(count):
        parts = {split: [] for split in SPLITS}
        for accent, units in pool.items():
            rest = [unit for unit in units if fold_of[accent, unit] != fold]
            valid = set(_in_order(rest, seed, f"valid {fold}")[: _speaker_count(valid_fraction, len(rest))])
            for unit, members in units.items():
                split = TEST if fold_of[accent, unit] == fold else VALID if unit in valid else TRAIN
                parts[split].extend(members)
        made.append(_sorted(parts))
    return tuple(made)


def cap(items, limit, seed):
    """Keep at most ``limit`` clips of each speaker; None keeps all, and clips without a speaker are not counted."""
    if limit is None:
        return Choice(_by_id(items), ())
    counts, kept, dropped = Counter(), [], []
    for item in _drawn(items, seed):
        counts[item.speaker] += bool(item.speaker)
        (dropped if counts[item.speaker] > limit else kept).append(item)
    return Choice(_by_id(kept), _by_id(dropped))


def _accent_of(item):
    return item.accent


def downsample(items, seed, key=_accent_of):
    """Keep as many clips of every accent (or other ``key``) as of the rarest, spread evenly over speakers."""
    counts = Counter(map(key, items))
    least = min(counts.values(), default=0)
    # The first clip of every speaker comes before the second clip of any.
    turns, queue = Counter(), []
    for place, item in enumerate(_drawn(items, seed)):
        unit = _speaker_of(item)
        turns[unit] += 1
        queue.append((turns[unit], place, item))
    taken, kept, dropped = Counter(), [], []
    for _, _, item in sorted(queue, key=lambda entry: entry[:2]):
        taken[key(item)] += 1
        (kept if taken[key(item)] <= least else dropped).append(item)
    return Choice(_by_id(kept), _by_id(dropped))


def drop_sentences(parts, trim=None, disjoint=True):
    """Drop test's sentences from valid and train, and valid's from train.

    Arguments
    ---------
    parts : dict
        Split -> items.
    trim : callable, optional
        Items of a split -> those to keep. It runs before the sentences of the split are dropped from the next ones, so
        that fewer clips are lost.
    disjoint : bool
        Whether to drop sentences; False only trims.

    Returns
    -------
    tuple
        The splits, and what was dropped: ``{(split, because of split): items}``.
    """
    kept, taken, dropped = {}, {}, {}
    for split in (name for name in (TEST, VALID, TRAIN) if name in parts):
        items = parts[split]
        for source, sentences in taken.items():
            dropped[split, source] = tuple(item for item in items if item.sentence in sentences)
            items = tuple(item for item in items if item.sentence not in sentences)
        kept[split] = trim(items) if trim else items
        if disjoint:
            taken[split] = {item.sentence for item in kept[split]} - {""}
    return {split: kept[split] for split in SPLITS if split in kept}, dropped


def require_disjoint(parts):
    """Refuse splits that share a speaker.

    Raises
    ------
    DataError
        Naming up to two such speakers and their splits.
    """
    found = defaultdict(set)
    for split, items in parts.items():
        for item in items:
            if item.speaker:
                found[item.speaker].add(split)
    shared = sorted(speaker for speaker, where in found.items() if len(where) > 1)
    if shared:
        named = ", ".join(f"'{c}' (in {' and '.join(s for s in parts if s in found[c])})" for c in shared[:2])
        raise DataError(
            f"{len(shared)} speaker(s) are in more than one split: {named}\n"
            "scores would not be on unseen speakers: join the splits into one, which is then split by speaker here"
        )


def normalise_sentence(text):
    """Letters and digits of a sentence in lower case, for comparing; "" where there are none."""
    text = unicodedata.normalize("NFKC", text or "").casefold()
    return " ".join(re.findall(r"\w+", text.replace("'", "").replace("\u2019", "")))


def seen_in_training(tested, training):
    """Compare the sentences of tested items with those of training items.

    Arguments
    ---------
    tested, training : iterable of Item

    Returns
    -------
    dict
        Id of a tested item with a sentence -> ("11/12", "no"): how many of its words are in training, of how many, and
        whether the whole sentence is ("yes" or "no").

    Example
    -------
    >>> seen_in_training([Item("a", "us", sentence="a red bag")], [Item("b", "us", sentence="a bag")])
    {'a': ('2/3', 'no')}
    """
    sentences = {item.sentence for item in training}
    words = {word for sentence in sentences for word in sentence.split()}
    seen = {}
    for item in tested:
        if own := item.sentence.split():
            found = sum(word in words for word in own)
            seen[item.id] = f"{found}/{len(own)}", "yes" if item.sentence in sentences else "no"
    return seen


def rank(seed, *names):
    """A number in [0, 2**64) that depends on the seed and the names only."""
    text = "\0".join((str(seed), *names)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _split(items, unit_of, noun, valid_fraction, test_fraction, seed):
    wanted = [split for split, fraction in ((TEST, test_fraction), (VALID, valid_fraction)) if fraction > 0]
    parts = {split: [] for split in SPLITS if split == TRAIN or split in wanted}
    for accent, units in _units(items, unit_of).items():
        test, valid = _speaker_count(test_fraction, len(units)), _speaker_count(valid_fraction, len(units))
        if len(units) <= test + valid:
            raise DataError(
                f"{accent} has {len(units)} {noun}, too few for {', '.join(parts)}: add data or leave this accent out"
            )
        for place, unit in enumerate(_in_order(units, seed, "split")):
            split = TEST if place < test else VALID if place < test + valid else TRAIN
            parts[split].extend(units[unit])
    return _sorted(parts)


def _speaker_count(fraction, count):
    """Speakers (or clips) of a split: the fraction of all, at least one."""
    return max(1, round(fraction * count)) if fraction > 0 else 0


def _speaker_of(item):
    return item.speaker or item.id


def _id_of(item):
    return item.id


def _units(items, unit_of):
    """accent -> unit -> items; speakers with several accents were dropped before, or they would be several units."""
    pool = defaultdict(lambda: defaultdict(list))
    for item in items:
        pool[item.accent][unit_of(item)].append(item)
    return {accent: pool[accent] for accent in sorted(pool)}


def _in_order(units, seed, purpose):
    return sorted(units, key=lambda unit: (rank(seed, purpose, unit), unit))


def _drawn(items, seed):
    return sorted(items, key=lambda item: (rank(seed, "clip", item.id), item.id))


def _by_id(items):
    return tuple(sorted(items, key=_id_of))


def _sorted(parts):
    return {split: _by_id(items) for split, items in parts.items()}
