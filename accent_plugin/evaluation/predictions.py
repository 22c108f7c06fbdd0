"""A model's scores for labelled clips: the input of every metric."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from accent_plugin.errors import ReportError

FLOOR = -700.0  # minimum log-probability; its exponential is still a normal double


@dataclass(frozen=True, eq=False)
class ScoredClips:
    """A model's log-probabilities for labelled clips.

    Arguments
    ---------
    ids : tuple of str
        Unique name of each clip.
    client_ids : tuple of str, or None
        Speaker of each clip; None (or all empty) if the speakers are unknown. A clip with an empty id counts as a
        separate speaker.
    truth : (clips,) np.ndarray of int
        Index of the true accent in `labels`.
    log_probabilities : (clips, classes) np.ndarray
        Natural logarithms; each row's probabilities sum to one.
    labels : tuple of str
        Accents in index order.
    seconds : (clips,) np.ndarray
        Duration of each clip.
    gender, age : tuple of str, or None
        Optional columns of text, with one value per clip, as in the data; empty if unknown.
    words_seen, sentence_seen : tuple of str, or None
        Optional: "11/12" if training had 11 of the 12 words of the clip, and "yes" or "no" for its whole sentence.

    Raises
    ------
    ReportError
        When there are no clips, or the arrays are inconsistent.

    Example
    -------
    >>> p = ScoredClips(("a", "b"), ("x", "y"), [0, 1], np.log([[0.9, 0.1], [0.6, 0.4]]), ("us", "england"), [4, 5])
    >>> p.predicted
    array([0, 0])
    """

    ids: tuple
    client_ids: tuple | None
    truth: np.ndarray
    log_probabilities: np.ndarray
    labels: tuple
    seconds: np.ndarray
    gender: tuple | None = None
    age: tuple | None = None
    words_seen: tuple | None = None
    sentence_seen: tuple | None = None

    def __post_init__(self):  # noqa: D105
        def put(name, value):
            object.__setattr__(self, name, value)

        put("ids", tuple(map(str, self.ids)))
        put("labels", tuple(map(str, self.labels)))
        for name in text_columns():
            put(name, ("",) * len(self.ids) if getattr(self, name) is None else tuple(map(_text, getattr(self, name))))
        if self.client_ids is not None:
            clients = tuple(map(_text, self.client_ids))
            put("client_ids", clients if any(clients) or not clients else None)
        put("truth", np.asarray(self.truth))
        put("seconds", np.asarray(self.seconds, dtype=np.float64))
        put("log_probabilities", np.asarray(self.log_probabilities, dtype=np.float64))
        self._check()
        put("truth", self.truth.astype(np.int64))
        put("log_probabilities", np.maximum(self.log_probabilities, FLOOR))

    def _check(self):
        clips, classes = len(self.ids), len(self.labels)
        if clips == 0:
            raise ReportError("no predictions to evaluate: is the test split empty?")
        if len(set(self.labels)) < classes or classes < 2:
            raise ReportError(f"labels must be two or more different accents, not {list(self.labels)}")
        columns = {name: getattr(self, name) for name in _columns()}
        wrong = {name: len(c) for name, c in columns.items() if c is not None and (np.ndim(c) < 1 or len(c) != clips)}
        if wrong:
            raise ReportError(f"{clips} ids, but {', '.join(f'{n} {name}' for name, n in wrong.items())}")
        if self.log_probabilities.shape != (clips, classes):
            shape = tuple(self.log_probabilities.shape)
            raise ReportError(
                f"log_probabilities has shape {shape}; {clips} clips and {classes} labels need {(clips, classes)}"
            )
        if len(set(self.ids)) < clips:
            twice = next(i for i, times in Counter(self.ids).items() if times > 1)
            raise ReportError(f"clip {twice!r} occurs twice: give one prediction per clip")
        require_indices(self.truth, clips, classes, self.ids)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.exp(self.log_probabilities).sum(axis=1)
        bad = np.flatnonzero(~(np.abs(sums - 1) < 1e-3))
        if bad.size:
            clip = bad[0]
            raise ReportError(
                f"{bad.size} of {clips} clips have probabilities that do not sum to 1; the first is {self.ids[clip]!r} "
                f"with log-probabilities {self.log_probabilities[clip].tolist()}: did training diverge, or are these "
                "logits?"
            )
        invalid = np.flatnonzero(~(np.isfinite(self.seconds) & (self.seconds >= 0)))
        if invalid.size:
            clip = invalid[0]
            raise ReportError(f"clip {self.ids[clip]!r} is {self.seconds[clip]} seconds long")

    @classmethod
    def from_clips(cls, clips, accents, log_probabilities, labels, **columns):
        """Create the scored clips from a list of clips.

        Arguments
        ---------
        clips : sequence
            Objects with the attributes ``id`` and ``client_id``, and with one for each optional column.
        accents : sequence of str
            True accent of each clip.
        log_probabilities : (clips, classes) np.ndarray
        labels : sequence of str
        **columns
            ``seconds``, and any optional column that is not an attribute of the clips.
        """
        texts: dict[str, Any] = {
            name: [getattr(clip, name) for clip in clips] for name in text_columns() if name not in columns
        }
        return cls(
            ids=tuple(clip.id for clip in clips),
            client_ids=tuple(clip.client_id for clip in clips),
            truth=np.array([labels.index(accent) for accent in accents], dtype=np.int64),
            log_probabilities=log_probabilities,
            labels=labels,
            **texts,
            **columns,
        )

    def select(self, rows):
        """Keep the clips with the given index: (clips,) np.ndarray of bool, or integers in the order wanted."""
        rows = np.arange(len(self.ids))[rows]
        columns = {name: getattr(self, name) for name in _columns()}
        chosen: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else column and tuple(column[i] for i in rows)
            for name, column in columns.items()
        }
        return replace(self, **chosen)

    @property
    def probabilities(self):
        """(clips, classes) np.ndarray: probability of each class."""
        return np.exp(self.log_probabilities)

    @property
    def predicted(self):
        """(clips,) np.ndarray: index of each clip's answer."""
        return self.log_probabilities.argmax(axis=1)


def require_indices(truth, clips, classes, ids=None):
    """Raise a `ReportError` unless ``truth`` has the index of a class for each clip."""
    if truth.shape != (clips,) or not np.issubdtype(truth.dtype, np.integer):
        raise ReportError(f"truth has type {truth.dtype} and shape {truth.shape}; give {clips} integers")
    outside = np.flatnonzero((truth < 0) | (truth >= classes))
    if outside.size:
        clip = outside[0]
        raise ReportError(
            f"clip {clip if ids is None else repr(ids[clip])} has true accent {truth[clip]}; indices range from 0 to "
            f"{classes - 1}"
        )


def text_columns():
    """Return the names of the optional columns of text."""
    return tuple(field.name for field in fields(ScoredClips) if field.default is None)


def _columns():
    """Return the names of the attributes with one value per clip."""
    return tuple(field.name for field in fields(ScoredClips) if field.name != "labels")


def _text(value):
    """Convert a table cell to text; None and NaN become empty."""
    return "" if value is None or value != value else str(value).strip()


def pool_clips(parts):
    """Concatenate the predictions of several folds, to evaluate them like those of one model.

    Raises
    ------
    ReportError
        When there are no predictions, their labels differ, or they have a clip in common.
    """
    if not parts:
        raise ReportError("no predictions to pool")
    if len({p.labels for p in parts}) > 1:
        raise ReportError(f"predictions for different labels cannot be pooled: {sorted({p.labels for p in parts})}")

    columns: dict[str, Any] = {}
    for name in _columns():
        values = [getattr(p, name) for p in parts]
        if any(value is None for value in values):
            columns[name] = None
        else:
            columns[name] = np.concatenate(values) if isinstance(values[0], np.ndarray) else tuple(chain(*values))
    return replace(parts[0], **columns)
