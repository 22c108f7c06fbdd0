"""Findings of an audit, as records."""

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
    DAMAGED_CLIP,
    MISSING,
    UNLABELLED,
    BALANCE,
    RATE,
    CHANNEL,
) = (
    *("client", "sentence", "contradiction", "audio", "undecodable", "damaged"),
    *("missing", "unlabelled", "balance", "rate", "channel"),
)


EXAMPLES = 5


@dataclass(frozen=True)
class AuditClip:
    """Position of a clip: split and row number (from 0) in the source, and its path there, which may be empty."""

    split: str
    row: int
    path: str = ""

    def __str__(self):
        return f"{self.split}:{self.row}" + (f" {self.path}" if self.path else "")


@dataclass(frozen=True)
class Example:
    """One instance of a finding, described in words, and its clips."""

    text: str
    clips: tuple[AuditClip, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One problem in the data.

    Arguments
    ---------
    kind : str
        One of ``KINDS``.
    severity : str
        "error" or "warning".
    message : str
        One sentence with numbers.
    count : int
        Number of speakers, sentences, recordings, files or whatever the message counts.
    examples : tuple of Example
        The first few instances, in the order of the data.
    """

    kind: str
    severity: str
    message: str
    count: int = 1
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Audit:
    """Result of ``check_dataset``.

    Arguments
    ---------
    name : str
        Name of the dataset.
    findings : tuple of Finding
        Errors first, then in the order of ``KINDS``.
    counts : dict
        Split -> accent -> {"clips", "clients", "seconds"}; clients are None without client ids; seconds exclude
        unusable files, and are None if the audio was not read.
    confound : confounds.Confound or None
        None if the audio was not read.
    notes : tuple of str
        Remarks on how to read the audit.
    arguments : dict
        Seed, permutations, and names of columns by split.
    measured : tuple
        (accent, confounds.RecordingFeatures) of each clip in the confound test.
    """

    name: str
    findings: tuple[Finding, ...]
    counts: dict
    confound: confounds.Confound | None
    notes: tuple[str, ...]
    arguments: dict
    measured: tuple = field(default=(), repr=False)

    def wrong(self, ignore=()):
        """Findings that are errors of a kind that is not ignored.

        Raises
        ------
        ConfigError
            When a kind to ignore does not exist.
        """
        require_kinds(ignore)
        return tuple(found for found in self.findings if found.severity == ERROR and found.kind not in ignore)

    def as_json(self):
        """Plain values for strict JSON, without the measurements of single clips."""
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
    """Raise a `ConfigError` for unknown kinds of findings."""
    if unknown := sorted(set(names) - set(KINDS)):
        raise ConfigError(f"ignore has unknown kinds {', '.join(unknown)}: choose from {', '.join(KINDS)}")


def medians_by_accent(measured):
    """Accent -> feature -> median, or the most common value of a categorical feature."""
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
