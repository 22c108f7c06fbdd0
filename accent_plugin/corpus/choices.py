"""The options of ``build_corpus``."""

import os
from dataclasses import dataclass

from accent_plugin.data import labels, selection, speech_rate
from accent_plugin.errors import ConfigError

SPLIT_KINDS = ("client", "official", "random")


@dataclass(frozen=True)
class CorpusChoices(selection.SharedChoices):
    """The options of a corpus; with the source they determine every byte of the result.

    Arguments
    ---------
    accents : str or sequence of str
        "three", "sixteen", a text with commas, or labels; see ``labels.preset``.
    mapping : dict or path
        More spellings, ``{spelling: label}``, the name of a corpus, or a YAML file; see ``labels.read_mapping``.
    compound : str
        "drop" drops clips with several accents; "agree" keeps those whose accents all map to one label.
    split : str
        "client": no speaker in two splits, by a seeded hash, so that speakers keep their split when the release grows
        (see ``splits.by_hash``); "official": the splits of the source; "random": by clip, leaky, for corpora that do
        not tell speakers apart.
    seed : int
        Determines splits and draws.
    valid_fraction, test_fraction : float
        Probability that a speaker is in validation and in test.
    max_clips_per_client : int or None
        Most clips of one speaker in a split.
    min_up_votes, max_down_votes : int or None
        Filters on the votes of Common Voice's listeners.
    min_seconds, max_seconds : float or None
        Filters on duration, for clips whose duration the source gives.
    max_rate_deviation : float or None
        Drop clips whose length is further than this from the usual one for their sentence, in robust standard
        deviations; see ``data.speech_rate``. Clips are decoded where the source does not give their duration.
    balance_gender : bool
        Keep as many clips of women as of men in each accent and split; drop those of unknown gender.
    disjoint_sentences : bool
        Drop sentences of test from train and validation, and those of validation from train.
    embed : bool
        Copy the audio into the result; False stores paths to the original files.
    """

    accents: tuple[str, ...] | str = "three"
    mapping: dict | str | None = None
    compound: str = "drop"
    split: str = "client"
    seed: int = 1986
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    max_clips_per_client: int | None = 30
    min_up_votes: int | None = None
    max_down_votes: int | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    max_rate_deviation: float | None = None
    balance_gender: bool = False
    disjoint_sentences: bool = True
    embed: bool = False

    def __post_init__(self):
        """Resolve accents and mapping, and refuse invalid values, all at once."""
        mapping = labels.read_mapping(self.mapping) if isinstance(self.mapping, str | os.PathLike) else self.mapping
        mapping = dict(mapping or {})
        object.__setattr__(self, "mapping", mapping)
        named, known = self.accents, set(labels.SPELLINGS) | set(mapping.values())
        object.__setattr__(self, "accents", labels.preset(named))
        if isinstance(named, str) and len(self.accents) == 1 and self.accents[0] not in known:
            raise ConfigError(f"accents {named!r} is no preset; choose {', '.join(labels.PRESETS)}, or list labels")
        whole = ("seed", "max_clips_per_client", "min_up_votes", "max_down_votes")
        given = {name: getattr(self, name) for name in (*whole, "valid_fraction", "test_fraction")}
        given |= {"min_seconds": self.min_seconds or 0, "max_seconds": self.max_seconds}
        given["max_rate_deviation"] = self.max_rate_deviation
        wrong = {
            name: value
            for name, value in given.items()
            if isinstance(value, bool) or not isinstance(value, int | None if name in whole else int | float | None)
        }
        if wrong or self.seed is None:
            raise ConfigError(
                f"these must be numbers: {', '.join(f'{k} {v!r}' for k, v in wrong.items()) or 'seed None'}"
            )
        kinds = selection.COMPOUNDS
        problem = f"compound {self.compound!r} is unknown; choose {' or '.join(kinds)}"
        limit = self.max_rate_deviation
        self.require(
            SPLIT_KINDS,
            (self.compound in kinds, problem),
            (
                limit is None or limit > 0,
                f"max_rate_deviation is {limit}; give a positive number, usually {speech_rate.LIMIT}",
            ),
        )
