"""What an audit finds, as records."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from accent_plugin.audit import confounds
from accent_plugin.errors import ConfigError

ERROR, WARNING = "error", "warning"


KINDS = (
    CLIENT,
    SENTENCE,
    CONTRADICTION,
    AUDIO,
    UNDECODABLE_CLIP,
    MISSING,
    UNLABELLED,
    BALANCE,
    CHANNEL,
) = "client", "sentence", "contradiction", "audio", "undecodable", "missing", "unlabelled", "balance", "channel"


EXAMPLES = 5


@dataclass(frozen=True)
class AuditClip:
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
    clips: tuple[AuditClip, ...] = ()


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
    confound: confounds.Confound | None
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
            "confound": None if self.confound is None else confounds.as_json(self.confound),
            "medians": medians_by_accent(self.measured),
            "notes": self.notes,
            "arguments": self.arguments,
        }
        return json.loads(json.dumps(plain))


def require_kinds(names):
    """Refuse names that are no kinds of findings."""
    if unknown := sorted(set(names) - set(KINDS)):
        raise ConfigError(f"ignore names {', '.join(unknown)}; choose of {', '.join(KINDS)}")


def medians_by_accent(measured):
    """Accent -> feature -> median, or the commonest value."""
    by_accent = {}
    for accent, clip in measured:
        by_accent.setdefault(accent, []).append(clip)
    return {
        accent: {
            name: Counter(sorted(values)).most_common(1)[0][0]
            if name in confounds.KINDS
            else round(float(np.median(values)), 3)
            for name, values in ((name, [getattr(clip, name) for clip in clips]) for name in confounds.UNITS)
        }
        for accent, clips in by_accent.items()
    }
