"""Names of splits and columns: the one table by which every reader finds what a source calls them."""

import re

from accent_plugin.errors import DataError

TRAIN, VALID, TEST = SPLITS = ("train", "valid", "test")


# Role -> names of its column, the most specific first. Case, spaces, hyphens and underscores do not count.
COLUMN_NAMES = {
    "audio": ("audio",),
    "accent": ("accent", "accents", "label"),
    "client": ("client_id", "speaker_id", "speaker", "client", "spk_id"),
    "sentence": ("sentence", "text", "transcription", "transcript"),
    "gender": ("gender", "sex"),
    "age": ("age",),
    "path": ("path",),
}


# Role -> what messages call it.
ROLE_NOUNS = {role: role for role in COLUMN_NAMES} | {"client": "speaker"}


# Role -> words in the name of a column that probably has this role, although no reader takes it without being told.
_LIKELY_WORDS = {
    "client": {"speaker", "speakers", "client", "spk", "reader", "talker", "participant", "user", "voice"},
    "sentence": {"sentence", "text", "transcription", "transcript", "prompt", "utterance"},
}


_SPLIT_WORDS = {
    TRAIN: {"train", "training"},
    VALID: {"valid", "validation", "val", "dev", "devel", "development"},
    TEST: {"test", "testing", "eval", "evaluation", "heldout"},
}


def find_column(role, columns, known=None):
    """Name of the column with a role, or None.

    Arguments
    ---------
    role : str
        A key of `known`.
    columns : sequence of str
    known : dict, optional
        Role -> usual names; None takes ``COLUMN_NAMES``.
    """
    usual = (COLUMN_NAMES if known is None else known)[role]
    by_key = {}
    for column in columns:
        by_key.setdefault(_key(column), column)
    exact = (name for name in usual if name in columns)
    return next(exact, None) or next((by_key[_key(name)] for name in usual if _key(name) in by_key), None)


def likely_columns(role, columns):
    """Columns that no reader uses but whose names suggest the role "client" or "sentence"."""
    return [column for column in columns if _words(column) & _LIKELY_WORDS[role]]


def split_kind(name):
    """What a split is for: one of ``SPLITS``, or None where its name does not say, or says two things.

    ``dev``, ``validation_clean`` and ``Val`` are "valid"; ``eval``, ``held-out`` and ``test-other`` are "test".
    """
    words = _split_words(name)
    kinds = [kind for kind, known in _SPLIT_WORDS.items() if words & known]
    return kinds[0] if len(kinds) == 1 else None


def splits_of_kind(names, kind, remedy):
    """Names of the splits of a source that are of one kind.

    Several splits such as ``test_clean`` and ``test_other`` are one kind in parts. ``test`` beside ``eval`` is not: one
    of them may be for something else.

    Arguments
    ---------
    names : iterable of str
        Names of all splits of the source.
    kind : str
        One of ``SPLITS``.
    remedy : str
        What to do, for the message.

    Returns
    -------
    list of str

    Raises
    ------
    DataError
        When different words name splits of this kind.
    """
    found = [name for name in names if split_kind(name) == kind]
    if len({frozenset(_split_words(name) & _SPLIT_WORDS[kind]) for name in found}) > 1:
        raise DataError(
            f"{' and '.join(found)} could each be the {'validation' if kind == VALID else kind} split; the splits are "
            f"{', '.join(names)}\n{remedy}"
        )
    return found


def splits_by_kind(names, remedy):
    """``splits_of_kind`` for every kind: kind -> names of its splits, without kinds that have none."""
    found = {kind: splits_of_kind(names, kind, remedy) for kind in SPLITS}
    return {kind: members for kind, members in found.items() if members}


def asked_splits(names, asked, option):
    """The splits that a user names, by their own name or by a kind.

    Raises
    ------
    DataError
        When a name fits no split.
    """
    chosen = set()
    for one in asked:
        kind = split_kind(one)
        fitting = (
            [name for name in names if name == one]
            or [name for name in names if name.casefold() == one.casefold()]
            or [name for name in names if kind and split_kind(name) == kind]
        )
        if not fitting:
            raise DataError(f"{option} names '{one}'; the splits are {', '.join(names)}")
        chosen.update(fitting)
    return [name for name in names if name in chosen]


def _key(name):
    return re.sub(r"[\W_]", "", name).lower()


def _words(name):
    """Words of a name in lower case; camelCase counts as two words."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))


def _split_words(name):
    return _words(re.sub(r"held[\W_]*out", "heldout", name, flags=re.IGNORECASE))
