"""Raw accent text to canonical labels, and back.

Canonical labels are Common Voice's old codes. Its releases since version 8 hold full names and free text instead, and
one cell may list several accents, joined by ``,`` (also used inside names) or, in the latest releases, by ``|``.

Example
-------
>>> parse("India and South Asia (India, Pakistan, Sri Lanka)").label
'indian'
>>> parse("England English|Scottish English")
ParsedAccent(label=None, reason='compound accent', parts=('england', 'scotland'))
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from accent_plugin.errors import ConfigError

NO_ACCENT = "no accent"
UNKNOWN_ACCENT = "unknown accent"
COMPOUND_ACCENT = "compound accent"


# "british" and "uk" are left out on purpose: they may mean any of four, and a mapping of one corpus can tell which.
# "southatlandtic" is misspelt at its source.
SPELLINGS = {
    "us": ("United States English", "United States", "USA", "American", "American English", "US English", "en-US"),
    "england": ("England English", "English (England)", "en-GB-england"),
    "australia": ("Australian English", "Australian", "en-AU"),
    "indian": ("India and South Asia (India, Pakistan, Sri Lanka)", "India", "Indian English", "en-IN"),
    "canada": ("Canadian English", "Canadian", "en-CA"),
    "african": (
        "Southern African (South Africa, Zimbabwe, Namibia)",
        "Southern African",
        "South African",
        "South African English",
        "South Africa",
        "en-ZA",
    ),
    "scotland": ("Scottish English", "Scottish", "Scots English", "en-scotland", "en-GB-scotland"),
    "ireland": ("Irish English", "Irish", "en-IE"),
    "northernireland": ("Northern Irish", "Northern Irish English", "Northern Ireland"),
    "newzealand": ("New Zealand English", "New Zealand", "New Zealander", "en-NZ"),
    "wales": ("Welsh English", "Welsh"),
    "malaysia": ("Malaysian English", "Malaysian", "en-MY"),
    "philippines": ("Filipino", "Philippino", "Filipino English", "Philippine English", "en-PH"),
    "singapore": ("Singaporean English", "Singaporian English", "Singaporean", "Singapore English", "en-SG"),
    "hongkong": ("Hong Kong English", "Hong Kong", "en-HK"),
    "bermuda": (
        "West Indies and Bermuda (Bahamas, Bermuda, Jamaica, Trinidad)",
        "West Indies and Bermuda",
    ),
    "southatlandtic": (
        "South Atlantic (Falkland Islands, Saint Helena)",
        "South Atlantic",
        "southatlantic",
    ),
}


# "sixteen" are the classes of CommonAccent (Zuluaga-Gomez et al. 2023): Common Voice's old codes without "other".
PRESETS = {
    "three": ("us", "england", "australia"),
    "sixteen": (
        "african",
        "australia",
        "bermuda",
        "canada",
        "england",
        "hongkong",
        "indian",
        "ireland",
        "malaysia",
        "newzealand",
        "philippines",
        "scotland",
        "singapore",
        "southatlandtic",
        "us",
        "wales",
    ),
}


_GENDERS = {
    "male": ("m", "male masculine"),
    "female": ("f", "female feminine"),
    "": ("do not wish to say",),
}


_MAPPINGS = Path(__file__).with_name("mappings")


# Ages of Common Voice; "fourties" is misspelt at its source.
DECADES = frozenset("teens twenties thirties forties fourties fifties sixties seventies eighties nineties".split())


# How pandas and others write an empty cell; -1 is a missing class.
_MISSING = frozenset(("", "nan", "none", "null", "na", "n/a", "#n/a", "<na>", "nat", "-1", "-1.0"))


@dataclass(frozen=True)
class ParsedAccent:
    """The parsed content of one raw accent cell.

    Arguments
    ---------
    label : str or None
        Canonical label; None where there is not exactly one.
    reason : str or None
        Why there is no label: "no accent", "unknown accent" or "compound accent".
    parts : tuple
        Label of each accent in the cell, or None where unknown.
    """

    label: str | None
    reason: str | None = None
    parts: tuple[str | None, ...] = ()


def present(text):
    """The text of a cell, or "" where it says that the value is missing, as in "nan", "None", "<NA>" or "-1"."""
    # Most of the millions of cells of a release are longer.
    return "" if len(text) < 10 and text.strip().casefold() in _MISSING else text


def normalise(text):
    """Lower-case text, with ``_``, ``-`` and runs of spaces replaced by single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\s_\-]+", " ", text).split())


def parse(raw, extra=None):
    """Find the canonical label of one raw accent cell.

    A cell with several accents is compound even where all map to one label: the caller can decide by ``parts``.

    Arguments
    ---------
    raw : str or None
        The cell as it stands in the data.
    extra : dict, optional
        More spellings, ``{spelling: label}``, which override the built-in table.

    Returns
    -------
    ParsedAccent

    Example
    -------
    >>> parse(" united  states ENGLISH ").label
    'us'
    >>> parse("somewhere in Kent").reason
    'unknown accent'
    """
    return _parse(raw or "", _frozen(extra))


def inverse(label, extra=None):
    """Every spelling that maps to a label, the label itself first, then as written in the tables."""
    more = tuple(spelling for spelling, target in (extra or {}).items() if target == label)
    known = (label, *SPELLINGS[label]) if label in SPELLINGS else ()
    return tuple(dict.fromkeys(known + more))


def preset(accents):
    """Labels from the name of a preset, a comma-separated text, or a sequence.

    Raises
    ------
    ConfigError
        When it is empty or names a label twice.

    Example
    -------
    >>> preset("three")
    ('us', 'england', 'australia')
    >>> preset("us, scotland")
    ('us', 'scotland')
    """
    if isinstance(accents, str):
        accents = PRESETS.get(accents.strip()) or [name.strip() for name in accents.split(",")]
    accents = tuple(accents)
    if not accents or not all(isinstance(name, str) and name for name in accents) or len(set(accents)) < len(accents):
        raise ConfigError(f"accents is {accents!r}; give distinct names, or one of {', '.join(PRESETS)}")
    return accents


@lru_cache(maxsize=1000)
def gender(raw):
    """The gender in a cell, in the spelling of any release: "male", "female", another as given, or ""."""
    raw = present(raw or "")
    text = normalise(raw)
    return next((name for name, spellings in _GENDERS.items() if text == name or text in spellings), raw)


def mapping_names():
    """Names of the mappings that ship: one for each corpus in the folder ``mappings``."""
    return sorted(path.stem for path in _MAPPINGS.glob("*.yaml"))


@lru_cache(maxsize=1)
def mapped_labels():
    """Every label that a mapping which ships gives."""
    return frozenset(label for name in mapping_names() for label in read_mapping(name).values())


def read_mapping(source):
    """Read a table of accents, which extends the built-in one.

    Arguments
    ---------
    source : str or Path
        One of ``mapping_names``, or a YAML file: ``spelling: label`` in each line, or ``label: [spelling, ...]``.

    Returns
    -------
    dict
        ``{spelling: label}``.

    Raises
    ------
    ConfigError
        When it cannot be read, is not such a table, or gives a spelling two labels.

    Example
    -------
    >>> parse("NorthernIrish", read_mapping("vctk")).label
    'northernireland'
    """
    import yaml

    path = _MAPPINGS / f"{source}.yaml" if str(source) in mapping_names() else source
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        names = ", ".join(mapping_names())
        raise ConfigError(f"{path} cannot be read: {error.strerror}\ngive a YAML file, or one of {names}") from None
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{path} is not a table; write one line for each spelling, such as 'Geordie: england'")
    mapping = {}
    for key, value in table.items():
        for spelling, label in [(key, value)] if not isinstance(value, list) else [(each, key) for each in value]:
            if not isinstance(spelling, str) or not isinstance(label, str) or not spelling.strip() or not label.strip():
                raise ConfigError(
                    f"{path} maps {spelling!r} to {label!r}; both must be text (YAML reads a bare no or 1 as something"
                    " else: put them in quotes)"
                )
            if mapping.setdefault(normalise(spelling), label) != label:
                raise ConfigError(f"{path} maps '{spelling}' to {mapping[normalise(spelling)]} and to {label}")
    return mapping


@lru_cache(maxsize=100_000)
def _parse(raw, extra):
    table = _table(extra)
    text = normalise(present(raw))
    if not text:
        return ParsedAccent(None, NO_ACCENT)
    pieces = [text] if text in table else _pieces(text)
    parts = tuple(table.get(piece) for piece in pieces)
    if len(parts) == 1 and parts[0]:
        return ParsedAccent(parts[0], None, parts)
    if any(parts):
        return ParsedAccent(None, COMPOUND_ACCENT, parts)
    return ParsedAccent(None, UNKNOWN_ACCENT if parts else NO_ACCENT, parts)


def _pieces(text):
    """Split at ``|``, or else at commas outside parentheses; unbalanced parentheses are ignored."""
    if "|" in text:
        pieces = text.split("|")
    elif text.count("(") == text.count(")"):
        pieces = re.split(r",(?![^()]*\))", text)
    else:
        pieces = text.split(",")
    return [piece.strip() for piece in pieces if piece.strip()]


def _frozen(extra):
    return tuple(sorted(extra.items())) if extra else ()


@lru_cache(maxsize=16)
def _table(extra):
    table = {normalise(s): label for label, spellings in SPELLINGS.items() for s in (label, *spellings)}
    return table | {normalise(spelling): label for spelling, label in extra}
