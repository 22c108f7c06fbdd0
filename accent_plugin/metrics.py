"""How good a set of predictions is, and how sure of that one can be: arrays in, a report out.

Conventions
-----------
* A confusion matrix has the truth in its rows and the answers in its columns. The answer is the largest probability,
  the first one on a tie.
* By clip, every clip counts once. By speaker, every speaker counts once: his log-probabilities are the means over his
  clips, made to sum to one again. A client id that has clips of two accents is one speaker in each of them.
* An accent that no clip has is left out of every average and named under ``absent_accents``; answering with it is still
  an error. An accent that is never the answer has precision 0 and F1 0.
* Log-loss is in nats. Log-probabilities are floored at -700, so that one impossible answer cannot make it infinite.
* Expected calibration error: 15 equal-width bins [k/15, (k+1)/15) of the largest probability, 1 in the last one; the
  mean over clips of the distance between a bin's accuracy and its mean probability (Guo et al., 2017). Few clips make
  it too large, and a resample of few clips larger still: its interval may lie above it.
* Risk and coverage: only clips whose largest probability reaches a threshold are answered; coverage is their share,
  risk the share of wrong answers among them, and clips of equal probability are answered together. The area under the
  curve is the mean over clips of the risk at the clip's own probability (AURC of Geifman and El-Yaniv, 2017; of several
  clips with the same probability each counts with the risk of all). Its interval comes from tenths of the clips by
  probability, moved so that it belongs to the exact value.
* Intervals are 95 % percentile intervals of a bootstrap that draws speakers with replacement within each accent and
  keeps all clips of a speaker together, since clips of one speaker are right or wrong together. Without client ids it
  draws clips, which is too narrow, and a note says so. ``n`` is the number of units drawn for the figure.
* A bootstrap cannot see what did not happen: with no error at all the interval has no width.
* A group's unweighted average recall is over the accents that it has. A group of fewer than 5 speakers is ``small``:
  too few to read anything into.
* Same predictions, same bytes out, in whatever order the clips come; an accent's draws do not depend on the others.
"""

import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.special import logsumexp

from accent_plugin.errors import ReportError

FIGURES = ("accuracy", "unweighted_average_recall", "macro_f1", "log_loss", "expected_calibration_error")
BINS = 15
SURE = (0.5, 0.8, 0.9)  # shares of clips that are answered, the surest ones
SMALL = 5  # speakers; a cell with fewer is marked
CONFIDENT = (0.5, 0.8, 0.9)  # probabilities from which an answer to out-of-set speech is counted as given
UNKNOWN = "unknown"

FLOOR = -700.0  # of log-probabilities; exp of it is still a normal double
_POINTS = 200  # of a curve that is kept
_TENTHS = 10
_BLOCK = 4_000_000  # counts held at once while resampling: 32 MB
_AGES = ("teens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_GENDERS = {"m": "male", "f": "female", "male_masculine": "male", "female_feminine": "female"}
_DURATIONS = ((3.0, "under 3 s"), (5.0, "3 to 5 s"), (8.0, "5 to 8 s"), (np.inf, "8 s and over"))
_MOST_GROUPS = 12  # somebody's free-text column must not become a thousand groups


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said about clips whose accent is known.

    Arguments
    ---------
    ids : tuple of str
        One name per clip, no two the same.
    client_ids : tuple of str, or None
        Speaker of each clip; None (or all empty) where the data do not say. A clip with an empty one is a speaker
        of its own.
    truth : (clips,) np.ndarray of int
        Index of the true accent in `labels`.
    log_probabilities : (clips, classes) np.ndarray
        Natural logarithms; each row's probabilities sum to one.
    labels : tuple of str
        Accents in index order.
    seconds : (clips,) np.ndarray
        Length of each clip.
    gender, age : tuple of str
        As the data have them; empty where unknown.

    Raises
    ------
    ReportError
        When there is nothing to evaluate or the arrays contradict each other.

    Example
    -------
    >>> p = Predictions(("a", "b"), ("x", "y"), [0, 1], np.log([[0.9, 0.1], [0.6, 0.4]]), ("us", "england"), [4, 5])
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

    def __post_init__(self):  # noqa: D105
        def put(name, value):
            object.__setattr__(self, name, value)

        put("ids", tuple(map(str, self.ids)))
        put("labels", tuple(map(str, self.labels)))
        for name in ("gender", "age"):
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
            raise ReportError("no predictions to evaluate: the list of clips is empty; is the test split empty?")
        if len(set(self.labels)) < classes or classes < 2:
            raise ReportError(f"labels must be two or more different accents, not {list(self.labels)}")
        columns = {"client_ids": self.client_ids, "truth": self.truth, "log_probabilities": self.log_probabilities,
                   "seconds": self.seconds, "gender": self.gender, "age": self.age}  # fmt: skip
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
            raise ReportError(f"clip {twice!r} is there twice; every clip may be predicted once")
        if not (np.issubdtype(self.truth.dtype, np.integer) and self.truth.ndim == 1):
            raise ReportError(f"truth must be a list of integers, not {self.truth.dtype} of shape {self.truth.shape}")
        outside = np.flatnonzero((self.truth < 0) | (self.truth >= classes))
        if outside.size:
            clip = outside[0]
            raise ReportError(
                f"clip {self.ids[clip]!r} has true accent {self.truth[clip]}; indices go from 0 to {classes - 1}"
            )
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
        if not (np.isfinite(self.seconds) & (self.seconds >= 0)).all():
            clip = np.flatnonzero(~(np.isfinite(self.seconds) & (self.seconds >= 0)))[0]
            raise ReportError(f"clip {self.ids[clip]!r} is {self.seconds[clip]} seconds long")

    @property
    def probabilities(self):
        """(clips, classes) np.ndarray: the probabilities themselves."""
        return np.exp(self.log_probabilities)

    @property
    def predicted(self):
        """(clips,) np.ndarray: index of each clip's answer."""
        return self.log_probabilities.argmax(axis=1)


def _text(value):
    """Return a cell of a table as text; None and NaN are empty."""
    return "" if value is None or value != value else str(value).strip()


def pool(parts):
    """Put the predictions of several folds together, as if one model had made them.

    Arguments
    ---------
    parts : list of Predictions
        No clip in two of them, the same labels in all.

    Returns
    -------
    predictions : Predictions
    """
    if not parts:
        raise ReportError("no predictions to pool")
    if len({p.labels for p in parts}) > 1:
        raise ReportError(f"predictions for different labels cannot be pooled: {sorted({p.labels for p in parts})}")

    def chained(name):
        return tuple(chain.from_iterable(getattr(p, name) for p in parts))

    return Predictions(
        ids=chained("ids"),
        client_ids=None if any(p.client_ids is None for p in parts) else chained("client_ids"),
        truth=np.concatenate([p.truth for p in parts]),
        log_probabilities=np.concatenate([p.log_probabilities for p in parts]),
        labels=parts[0].labels,
        seconds=np.concatenate([p.seconds for p in parts]),
        gender=chained("gender"),
        age=chained("age"),
    )


# ---- figures of a confusion matrix -----------------------------------------------------------------------------------


def _ratio(a, b):
    """Divide, with 0 where there is nothing to divide by."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


def _mean_over_present(values, confusion):
    present = confusion.sum(axis=-1) > 0
    return _ratio((values * present).sum(axis=-1), present.sum(axis=-1))[()]


def recalls(confusion):
    """Share of each accent's clips that got it as answer, (..., classes) np.ndarray; 0 for an absent accent."""
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1))


def precisions(confusion):
    """Share of each answer that was right, (..., classes) np.ndarray; 0 for an answer never given."""
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-2))


def f1s(confusion):
    """Harmonic mean of precision and recall, (..., classes) np.ndarray."""
    return _ratio(2 * np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def unweighted_average_recall(confusion):
    """Average the recalls of the accents that are present, each counting the same.

    Arguments
    ---------
    confusion : (..., classes, classes) np.ndarray
        Counts, rows are the truth.

    Returns
    -------
    value : (...) np.ndarray

    Example
    -------
    >>> float(unweighted_average_recall(np.array([[8, 2], [2, 2]])))
    0.65
    """
    return _mean_over_present(recalls(np.asarray(confusion)), np.asarray(confusion))


def macro_f1(confusion):
    """Average the F1 of the accents that are present; arguments as for `unweighted_average_recall`.

    Example
    -------
    >>> float(macro_f1(np.array([[8, 2], [2, 2]])))
    0.65
    """
    return _mean_over_present(f1s(np.asarray(confusion)), np.asarray(confusion))


def confusion_matrix(truth, predicted, classes):
    """Count (classes, classes) np.ndarray of int, rows are the truth."""
    return np.bincount(np.asarray(truth) * classes + np.asarray(predicted), minlength=classes**2).reshape(
        classes, classes
    )


def calibration_bins(probabilities, truth):
    """Count, confidence and accuracy in each of the 15 bins of the reliability diagram.

    Arguments
    ---------
    probabilities : (clips, classes) np.ndarray
    truth : (clips,) np.ndarray of int

    Returns
    -------
    count, confidence, accuracy : (15,) np.ndarray
        The latter two are 0 in empty bins.
    """
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((top * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    return count, *(_ratio(np.bincount(bins, weights=w, minlength=BINS), count) for w in (top, right))


def expected_calibration_error(probabilities, truth):
    """Mean over clips of the distance between the accuracy and the mean probability of their bin (Guo et al., 2017).

    Arguments
    ---------
    probabilities : (clips, classes) np.ndarray
    truth : (clips,) np.ndarray of int

    Returns
    -------
    error : float

    Example
    -------
    >>> round(expected_calibration_error(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0])), 3)
    0.45
    """
    count, confidence, accuracy = calibration_bins(probabilities, truth)
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


# ---- answering only when sure ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What answering only the surest clips costs and gains, from the surest ones to all.

    Arguments
    ---------
    threshold : tuple of float
        Largest probability from which a clip is answered; falling.
    coverage : tuple of float
        Share of the clips that are answered; rising to 1.
    risk : tuple of float
        Share of these answers that is wrong; the last one is the error rate.
    area : float
        Mean of the risk over the clips, of all points, also those that were thinned out (Geifman and El-Yaniv, 2017).
    """

    threshold: tuple
    coverage: tuple
    risk: tuple
    area: float

    def threshold_for(self, *, max_risk=None, min_coverage=None):
        """Choose a threshold for a wanted risk or coverage.

        What held on these clips need not hold on others: a small risk seen on few clips is no bound.

        Arguments
        ---------
        max_risk : float
            Answer as many clips as possible with at most this share of wrong answers.
        min_coverage : float
            Answer at least this share of clips, and as few as that allows.

        Returns
        -------
        threshold : float

        Raises
        ------
        ReportError
            When not exactly one is given, it is no share, or no threshold reaches that risk.

        Example
        -------
        >>> curve = risk_coverage(np.array([0.9, 0.8, 0.6, 0.5]), np.array([True, True, False, True]))
        >>> curve.threshold_for(max_risk=0.1), curve.threshold_for(min_coverage=0.7)
        (0.8, 0.6)
        """
        given = {k: v for k, v in (("max_risk", max_risk), ("min_coverage", min_coverage)) if v is not None}
        if len(given) != 1:
            raise ReportError(
                f"a threshold is chosen by max_risk or by min_coverage, one of them; got {given or 'none'}"
            )
        ((name, share),) = given.items()
        if not 0 <= share <= 1:
            raise ReportError(f"{name} is {share}; it is a share, from 0 to 1")
        if min_coverage is not None:
            return next(t for t, c in zip(self.threshold, self.coverage, strict=True) if c >= min_coverage)
        reached = [t for t, r in zip(self.threshold, self.risk, strict=True) if r <= max_risk]
        if not reached:
            raise ReportError(
                f"no threshold keeps the share of wrong answers at or below {max_risk}: the lowest is "
                f"{min(self.risk):.3g}, at a probability of {self.threshold[int(np.argmin(self.risk))]:.3g}\n"
                "allow a larger max_risk, or choose by min_coverage"
            )
        return reached[-1]


def risk_coverage(top, right):
    """Trace risk against coverage as the threshold falls.

    Arguments
    ---------
    top : (clips,) np.ndarray
        Largest probability of each clip.
    right : (clips,) np.ndarray of bool
        Whether its answer is right.

    Returns
    -------
    curve : Curve
        At most 200 points, evenly spaced in coverage, with both ends.

    Example
    -------
    >>> risk_coverage(np.array([0.9, 0.6, 0.6]), np.array([True, True, False])).risk
    (0.0, 0.3333333333333333)
    """
    order = np.argsort(top)[::-1]
    top, wrong = top[order], np.cumsum(~right[order])
    last = np.flatnonzero(np.append(top[1:] != top[:-1], True))  # of the clips with the same probability
    count, clips = last + 1, len(top)
    risk = wrong[last] / count
    area = float((np.diff(count, prepend=0) * risk).sum() / clips)
    kept = np.unique(np.searchsorted(count, np.linspace(count[0], clips, _POINTS)))

    def points(values):
        return tuple(values[kept].tolist())

    return Curve(points(top[last]), points(count / clips), points(risk), area)


class _Tenths:
    """Tenths of the clips by their largest probability, the surest first: how many, and how many are wrong."""

    def __init__(self, items):
        self.unit, self.right, clips = items.unit, items.right, len(items.top)
        ranked = np.sort(items.top)[::-1]
        # Of each tenth the smallest probability; all clips that share it belong to the same one.
        self.edges = ranked[(np.arange(1, _TENTHS + 1) * clips - 1) // _TENTHS]
        self.tenth = np.searchsorted(-self.edges, -items.top)

    def statistics(self, first, last):
        """(units, 2 * tenths) np.ndarray for units first to last - 1."""
        a, b = np.searchsorted(self.unit, [first, last])
        unit, units, tenth = self.unit[a:b] - first, last - first, self.tenth[a:b]
        return np.hstack([
            _sums(unit, units, tenth, _TENTHS), _sums(unit, units, tenth, _TENTHS, ~self.right[a:b])
        ])  # fmt: skip

    def figures(self, totals, curve, n):
        """Make the report's part on risk and coverage of (1 + draws, classes, 2 * tenths) totals."""
        count, wrong = np.cumsum(totals.sum(axis=1).reshape(-1, 2, _TENTHS), axis=-1).swapaxes(0, 1)
        risk = _ratio(wrong, count)
        # Within a tenth the risk is taken to change evenly; in the first there is no telling where it began.
        middle = (risk + np.hstack([risk[:, :1], risk[:, :-1]])) / 2
        area = (np.diff(count, prepend=0) * middle).sum(axis=-1) / count[:, -1]
        surest = {}
        for share in SURE:
            k = round(share * _TENTHS) - 1
            surest[str(share)] = {
                "threshold": float(self.edges[k]),
                "coverage": float(count[0, k] / count[0, -1]),
                "accuracy": _interval(np.where(count[:, k] > 0, 1 - risk[:, k], np.nan), n),
            }
        return {
            "threshold": list(curve.threshold),
            "coverage": list(curve.coverage),
            "risk": list(curve.risk),
            "area": _interval(np.maximum(area - area[0] + curve.area, 0), n),
            "surest": surest,
        }


# ---- speakers and the bootstrap --------------------------------------------------------------------------------------


class _Units:
    """The units that the bootstrap draws, sorted by accent: speakers, or clips where speakers are not known."""

    def __init__(self, p):
        clips = len(p.ids)
        by_id = np.array(sorted(range(clips), key=p.ids.__getitem__))
        if p.client_ids is None:
            self.names, speaker = None, np.empty(clips, dtype=np.int64)
            speaker[by_id] = np.arange(clips)
        else:
            keys = [client or f"\0{clip}" for client, clip in zip(p.client_ids, p.ids, strict=True)]
            names = sorted(set(keys))
            index = dict(zip(names, range(len(names)), strict=True))
            speaker = np.fromiter((index[key] for key in keys), dtype=np.int64, count=clips)
        self.order = by_id[np.lexsort((speaker[by_id], p.truth[by_id]))]
        speaker, truth = speaker[self.order], p.truth[self.order]
        first = np.ones(clips, dtype=bool)
        first[1:] = (np.diff(speaker) != 0) | (np.diff(truth) != 0)
        self.starts = np.flatnonzero(first)
        self.unit = np.cumsum(first) - 1
        self.accent = truth[self.starts]
        if p.client_ids is not None:
            self.names = [names[s] if names[s][0] != "\0" else "" for s in speaker[self.starts]]
        self.labels = p.labels
        self.per_accent = np.bincount(self.accent, minlength=len(p.labels))

    def __len__(self):
        return len(self.starts)

    def speaker_log_probabilities(self, p):
        """(speakers, classes) np.ndarray: mean over the speaker's clips, normalised."""
        clips = np.diff(np.append(self.starts, len(self.order)))
        means = np.add.reduceat(p.log_probabilities[self.order], self.starts, axis=0) / clips[:, None]
        return means - logsumexp(means, axis=1, keepdims=True)

    def resample(self, statistics, draws, seed):
        """Sum statistics over the units of each accent, for the sample itself and for every draw.

        Arguments
        ---------
        statistics : callable
            (first unit, last unit + 1) -> (units, columns) np.ndarray.

        Returns
        -------
        totals : (1 + draws, classes, columns) np.ndarray
            Row 0 is the sample itself.
        """
        totals, block = None, max(1, _BLOCK // (draws + 1))
        ends = np.cumsum(self.per_accent)
        for accent, (start, end) in enumerate(zip(ends - self.per_accent, ends, strict=True)):
            rng = np.random.default_rng([seed, zlib.crc32(self.labels[accent].encode())])
            firsts = np.arange(start, end, block)
            sizes = np.diff(np.append(firsts, end))
            if not sizes.size:
                continue
            # Drawing how often each block is hit, then units within it, is the same multinomial in bounded memory.
            hits = rng.multinomial(end - start, sizes / (end - start), size=draws)
            for first, size, hit in zip(firsts, sizes, hits.T, strict=True):
                drawn = np.repeat(np.arange(1, draws + 1), hit) * size + rng.integers(0, size, hit.sum())
                counts = np.bincount(drawn, minlength=(draws + 1) * size).reshape(draws + 1, size)
                counts[0] = 1
                values = statistics(first, first + size)
                if totals is None:
                    totals = np.zeros((draws + 1, len(self.labels), values.shape[1]))
                totals[:, accent] += counts.astype(np.float64) @ values
        return totals


class _Items:
    """What is summed over clips, or over speakers: answers, log-loss, and the gap of each calibration bin."""

    def __init__(self, log_probabilities, truth, unit):
        self.unit, self.classes = unit, log_probabilities.shape[1]
        self.predicted = log_probabilities.argmax(axis=1)
        self.right = self.predicted == truth
        self.loss = -np.take_along_axis(log_probabilities, truth[:, None], axis=1)[:, 0]
        self.top = np.exp(log_probabilities.max(axis=1))
        self.bin, self.gap = np.minimum((self.top * BINS).astype(int), BINS - 1), self.top - self.right

    def statistics(self, first, last):
        """(units, classes + 1 + BINS) np.ndarray for units first to last - 1."""
        a, b = np.searchsorted(self.unit, [first, last])
        unit, units = self.unit[a:b] - first, last - first
        return np.hstack([
            _sums(unit, units, self.predicted[a:b], self.classes),
            _sums(unit, units, 0, 1, self.loss[a:b]),
            _sums(unit, units, self.bin[a:b], BINS, self.gap[a:b]),
        ])  # fmt: skip


def _sums(unit, units, column, columns, weights=None):
    return np.bincount(unit * columns + column, weights=weights, minlength=units * columns).reshape(units, columns)


def _figures(totals):
    """Headline figures from (..., classes, classes + 1 + BINS) totals of `_Items.statistics`."""
    classes = totals.shape[-2]
    confusion = totals[..., :classes]
    count = confusion.sum(axis=(-2, -1))
    return {
        "accuracy": np.trace(confusion, axis1=-2, axis2=-1) / count,
        "unweighted_average_recall": unweighted_average_recall(confusion),
        "macro_f1": macro_f1(confusion),
        "log_loss": totals[..., classes].sum(axis=-1) / count,
        "expected_calibration_error": np.abs(totals[..., classes + 1 :].sum(axis=-2)).sum(axis=-1) / count,
    }


def _interval(values, n):
    """Make {"value", "low", "high", "n"} of the sample's figure (first) and those of the draws."""
    draws = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws.size else (None, None)
    return {"value": _number(values[0]), "low": _number(low), "high": _number(high), "n": int(n)}


def _number(value):
    return None if value is None or np.isnan(value) else float(value)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _age(text):
    text = text.lower().replace("fourties", "forties")
    try:
        return _AGES[min(max(int(float(text)) // 10 - 1, 0), len(_AGES) - 1)] if float(text) > 0 else UNKNOWN
    except ValueError:
        return text or UNKNOWN


def _gender(text):
    return _GENDERS.get(text.lower(), text.lower()) or UNKNOWN


def _groups(p):
    """Yield the name of each kind of group, its values in reading order, and the index of every clip's value."""
    for kind, column, band in (("gender", p.gender, _gender), ("age", p.age, _age)):
        texts = Counter(column)
        bands, counts = {text: band(text) for text in texts}, Counter()
        for text, count in texts.items():
            counts[bands[text]] += count
        order = sorted(counts.items(), key=lambda item: (item[0] != UNKNOWN, -item[1], item[0]))
        common = [name for name, _ in order[:_MOST_GROUPS]]
        values = sorted(common, key=lambda c: (c == UNKNOWN, _AGES.index(c) if c in _AGES else -1, c))
        index = {text: values.index(name) if name in values else len(values) for text, name in bands.items()}
        if len(counts) > len(values):
            values.append(f"{len(counts) - len(values)} others")
        yield (
            kind,
            [] if values == [UNKNOWN] else values,
            np.fromiter((index[text] for text in column), dtype=np.int64, count=len(column)),
        )
    yield "duration", [name for _, name in _DURATIONS], np.digitize(p.seconds, [bound for bound, _ in _DURATIONS[:-1]])


# ---- what callers use ------------------------------------------------------------------------------------------------


def evaluate(predictions, draws=1000, seed=0):
    """Compute every figure of a report, with its interval.

    Arguments
    ---------
    predictions : Predictions
    draws : int
        Bootstrap samples.
    seed : int
        Of the bootstrap.

    Returns
    -------
    metrics : dict
        "clip", "speaker" (None without client ids), "per_accent", "confusion", "risk_coverage" (by clip: "threshold",
        "coverage", "risk", "area", and "surest": what accuracy the surest 50, 80 and 90 % of clips have), "groups",
        "absent_accents", "notes"; every figure is {"value", "low", "high", "n"}, and nothing in it is NaN.

    Example
    -------
    >>> p = Predictions(("a", "b"), ("x", "y"), [0, 1], np.log([[0.9, 0.1], [0.6, 0.4]]), ("us", "england"), [4, 5])
    >>> evaluate(p)["clip"]["accuracy"]
    {'value': 0.5, 'low': 0.5, 'high': 0.5, 'n': 2}
    """
    p, labels, classes = predictions, predictions.labels, len(predictions.labels)
    units = _Units(p)
    truth = p.truth[units.order]
    items = [_Items(p.log_probabilities[units.order], truth, units.unit)]
    if units.names is not None:
        items.append(_Items(units.speaker_log_probabilities(p), units.accent, np.arange(len(units))))
    groups = [(kind, values, cell[units.order]) for kind, values, cell in _groups(p)]
    tenths = _Tenths(items[0])

    def statistics(first, last):
        a, b = np.searchsorted(units.unit, [first, last])
        unit, size = units.unit[a:b] - first, last - first
        parts = [*(i.statistics(first, last) for i in items), tenths.statistics(first, last)]
        for _, values, cell in groups:
            parts.append(_sums(unit, size, cell[a:b], max(1, len(values))))
            parts.append(_sums(unit, size, cell[a:b], max(1, len(values)), items[0].right[a:b]))
        return np.hstack(parts)

    totals = units.resample(statistics, draws, seed)
    width = classes + 1 + BINS
    clips, *speakers = (totals[..., i * width : (i + 1) * width] for i in range(len(items)))
    rest = totals[..., len(items) * width :]
    sure, rest = rest[..., : 2 * _TENTHS], rest[..., 2 * _TENTHS :]
    metrics = {
        "clip": {name: _interval(v, len(units)) for name, v in _figures(clips).items()},
        "speaker": {n: _interval(v, len(units)) for n, v in _figures(speakers[0]).items()} if speakers else None,
        "per_accent": _per_accent(clips[..., :classes], units, labels),
        "confusion": {
            "labels": list(labels),
            "clips": clips[0, :, :classes].astype(int).tolist(),
            "speakers": speakers[0][0, :, :classes].astype(int).tolist() if speakers else None,
        },
        "risk_coverage": tenths.figures(sure, risk_coverage(items[0].top, items[0].right), len(units)),
        "groups": {},
        "absent_accents": [labels[a] for a in np.flatnonzero(units.per_accent == 0)],
    }
    for kind, values, cell in groups:
        size = max(1, len(values))
        total, right, rest = rest[..., :size], rest[..., size : 2 * size], rest[..., 2 * size :]
        metrics["groups"][kind] = {}
        for g, value in enumerate(values):
            count = int(total[0, :, g].sum())
            if count:
                n = len(np.unique(units.unit[cell == g]))
                present = (total[..., g] > 0).sum(axis=-1)
                recall = _ratio(right[..., g], total[..., g]).sum(axis=-1)
                average = np.divide(recall, present, out=np.full(recall.shape, np.nan), where=present > 0)
                metrics["groups"][kind][value] = {
                    "unweighted_average_recall": _interval(average, n),
                    "clips": count,
                    "speakers": n if speakers else None,
                    "small": n < SMALL,
                }
    metrics["notes"] = _notes(p, units, metrics)
    return metrics


def _per_accent(confusion, units, labels):
    figures = {"precision": precisions(confusion), "recall": recalls(confusion), "f1": f1s(confusion)}
    return {
        label: {
            # Only the accent's own speakers move its recall; everybody's answers move the other two.
            **{k: _interval(v[:, a], units.per_accent[a] if k == "recall" else len(units)) for k, v in figures.items()},
            "clips": int(confusion[0, a].sum()),
            "speakers": int(units.per_accent[a]) if units.names is not None else None,
        }
        for a, label in enumerate(labels)
        if units.per_accent[a]
    }


def _notes(p, units, metrics):
    """Say what a reader must know before believing the figures."""
    notes, present = [], np.flatnonzero(units.per_accent)
    if metrics["absent_accents"]:
        names = ", ".join(metrics["absent_accents"])
        notes.append(f"No clip of {names} is in these data: left out of every average.")
    if units.names is None:
        notes.append(
            "No client ids: intervals resample clips, not speakers, and are too narrow; nothing is counted by speaker."
        )
        return notes
    unnamed = sum(not c for c in p.client_ids)
    if unnamed:
        notes.append(f"{unnamed} clips have no client id; each counts as a speaker of its own.")
    if len(set(p.client_ids) - {""}) + unnamed < len(units):
        notes.append(
            "Some client ids have clips of more than one accent; each counts as one speaker in every accent it has."
        )
    few = [f"{p.labels[a]} ({units.per_accent[a]})" for a in present if units.per_accent[a] < SMALL]
    if few:
        notes.append(f"Fewer than {SMALL} speakers of {', '.join(few)}: these intervals are too narrow to rely on.")
    for level in ("clip", "speaker"):
        if metrics[level]["accuracy"]["value"] == 1:
            bound = 1 - 0.05 ** (1 / len(units))
            notes.append(
                f"No error by {level}, so the bootstrap shows no width; with {len(units)} speakers, up to {bound:.0%} "
                "of speakers wrong would still be consistent with this (exact one-sided 95 % bound)."
            )
    return notes


def speakers(predictions):
    """List every speaker with his clips' answers and his own.

    Arguments
    ---------
    predictions : Predictions
        With client ids.

    Returns
    -------
    rows : list of dict
        "client_id", "accent", "answer", "probability" (of the answer), "right", "clips", "clips_right", "share_right"
        and "answers" (clips per answer, in the order of the labels), sorted by accent and client id. Empty without
        client ids.
    """
    p, units = predictions, _Units(predictions)
    if units.names is None:
        return []
    log_probabilities = units.speaker_log_probabilities(p)
    answer, probability = log_probabilities.argmax(axis=1), np.exp(log_probabilities.max(axis=1))
    answers = _sums(units.unit, len(units), p.predicted[units.order], len(p.labels))
    return [
        {
            "client_id": name,
            "accent": p.labels[a],
            "answer": p.labels[answer[u]],
            "probability": float(probability[u]),
            "right": bool(answer[u] == a),
            "clips": int(answers[u].sum()),
            "clips_right": int(answers[u, a]),
            "share_right": float(answers[u, a] / answers[u].sum()),
            "answers": answers[u].tolist(),
        }
        for u, (name, a) in enumerate(zip(units.names, units.accent, strict=True))
    ]


def compare(a, b, draws=1000, seed=0):
    """Compare two models on the same clips; a positive difference means that b has the larger figure.

    Arguments
    ---------
    a, b : Predictions
        Of the same clips with the same truth; clips and labels may come in another order.
    draws, seed : int
        Of the bootstrap. Both models are resampled by the same draws, so that what the speakers have in common cancels.

    Returns
    -------
    comparison : dict
        "clip" and "speaker": {figure: {"a", "b", "difference": {"value", "low", "high", "n"}}} ("speaker" is None
        without client ids); "changed": the speakers with another answer; "clips", "speakers", "notes".

    Raises
    ------
    ReportError
        When the clips, labels, truth or speakers differ.
    """
    b = _aligned(a, b)
    units = _Units(a)
    truth = a.truth[units.order]
    items = [_Items(p.log_probabilities[units.order], truth, units.unit) for p in (a, b)]
    if units.names is not None:
        own = np.arange(len(units))
        items += [_Items(units.speaker_log_probabilities(p), units.accent, own) for p in (a, b)]
    totals = units.resample(lambda *ends: np.hstack([i.statistics(*ends) for i in items]), draws, seed)
    width = len(a.labels) + 1 + BINS
    figures = [_figures(totals[..., i * width : (i + 1) * width]) for i in range(len(items))]

    def differences(x, y):
        return {
            name: {
                "a": float(x[name][0]),
                "b": float(y[name][0]),
                "difference": _interval(y[name] - x[name], len(units)),
            }
            for name in FIGURES
        }

    pairs = zip(speakers(a), speakers(b), strict=True)
    return {
        "clip": differences(*figures[:2]),
        "speaker": differences(*figures[2:]) if units.names is not None else None,
        "changed": [
            {
                "client_id": x["client_id"],
                "accent": x["accent"],
                "clips": x["clips"],
                **{
                    k: {key: s[key] for key in ("answer", "probability", "share_right")}
                    for k, s in (("a", x), ("b", y))
                },
            }
            for x, y in pairs
            if x["answer"] != y["answer"]
        ],
        "clips": len(a.ids),
        "speakers": len(units) if units.names is not None else None,
        "notes": [] if units.names is not None else ["No client ids: intervals resample clips, and are too narrow."],
    }


def _aligned(a, b):
    """Return b with its clips and labels in a's order."""
    if sorted(a.labels) != sorted(b.labels):
        raise ReportError(f"predictions for different labels cannot be compared: {list(a.labels)} and {list(b.labels)}")
    where = {clip: i for i, clip in enumerate(b.ids)}
    missing = [clip for clip in a.ids if clip not in where]
    if missing or len(a.ids) != len(b.ids):
        extra = sorted(set(b.ids).difference(a.ids))
        raise ReportError(
            f"only predictions of the same clips can be compared: {len(missing)} of {len(a.ids)} are missing from the "
            f"second (first: {missing[:1]}), {len(extra)} are only there (first: {extra[:1]})"
        )
    order = np.array([where[clip] for clip in a.ids])
    columns = [b.labels.index(label) for label in a.labels]
    truth = np.argsort(columns)[b.truth[order]]
    if (truth != a.truth).any():
        clip = np.flatnonzero(truth != a.truth)[0]
        names = f"{a.labels[a.truth[clip]]} and {a.labels[truth[clip]]}"
        raise ReportError(f"clip {a.ids[clip]!r} has two true accents, {names}: these are not the same data")
    clients = None if b.client_ids is None else tuple(b.client_ids[i] for i in order)
    if clients != a.client_ids:
        raise ReportError("the client ids of the two sets of predictions differ: these are not the same data")
    return Predictions(
        a.ids, clients, truth, b.log_probabilities[order][:, columns], a.labels, a.seconds, a.gender, a.age
    )


def summarise(runs, names=None):
    """Average the headline figures of several runs, such as seeds.

    Arguments
    ---------
    runs : list of dict
        As `evaluate` or metrics.json gives them.
    names : list of str, or None
        Of the runs; "1", "2", ... by default.

    Returns
    -------
    summary : dict
        "runs": names; "clip" and "speaker": {figure: {"mean", "standard_deviation" (n - 1; None for one run),
        "values"}}; "speaker" is None where a run has none.
    """
    if not runs:
        raise ReportError("no runs to summarise")
    names = [str(i + 1) for i in range(len(runs))] if names is None else [str(name) for name in names]
    if len(names) != len(runs):
        raise ReportError(f"{len(runs)} runs, but {len(names)} names")
    summary: dict = {"runs": names}
    for level in ("clip", "speaker"):
        summary[level] = None
        if all(run[level] for run in runs):
            values = {name: [run[level][name]["value"] for run in runs] for name in FIGURES}
            summary[level] = {
                name: {
                    "mean": float(np.mean(v)),
                    "standard_deviation": float(np.std(v, ddof=1)) if len(v) > 1 else None,
                    "values": v,
                }
                for name, v in values.items()
            }
    return summary


def auroc(scores_in, scores_out):
    """Probability that a random in-set score is above a random out-of-set one; a tie counts half.

    Example
    -------
    >>> auroc([0.9, 0.8], [0.8, 0.1])
    0.875
    """
    inside, outside = np.asarray(scores_in, dtype=float), np.asarray(scores_out, dtype=float)
    if not inside.size or not outside.size:
        raise ReportError("AUROC needs scores of both kinds; one of the lists is empty")
    outside = np.sort(outside)
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * outside.size))


def out_of_set(predictions_in, log_probabilities_out, accents_out):
    """Measure how well the largest probability tells speech of the known accents from that of others.

    Arguments
    ---------
    predictions_in : Predictions
        Of speech of the known accents.
    log_probabilities_out : (clips, classes) np.ndarray
        The same model's answers to other speech.
    accents_out : sequence of str
        True accent of each of those clips.

    Returns
    -------
    result : dict
        "in_set", "overall" and each of "accents": {"clips", "auroc" (not for in_set), "confident": share answered with
        a probability of at least 0.5, 0.8, 0.9, "answers": share of each answer}.
    """
    out = np.asarray(log_probabilities_out, dtype=np.float64)
    accents = np.asarray(list(map(str, accents_out)))
    classes = len(predictions_in.labels)
    if out.ndim != 2 or out.shape != (len(accents), classes) or not len(accents):
        raise ReportError(
            f"out-of-set log-probabilities have shape {out.shape}; {len(accents)} clips, {classes} classes"
        )
    if not (np.abs(np.exp(out).sum(axis=1) - 1) < 1e-3).all():
        raise ReportError("out-of-set probabilities do not sum to 1")
    inside = predictions_in.log_probabilities.max(axis=1)

    def describe(log_probabilities):
        top, answers = np.exp(log_probabilities.max(axis=1)), log_probabilities.argmax(axis=1)
        share = np.bincount(answers, minlength=classes) / len(top)
        return {
            "clips": len(top),
            "confident": {str(c): float((top >= c).mean()) for c in CONFIDENT},
            "answers": dict(zip(predictions_in.labels, share.tolist(), strict=True)),
        }

    def rejected(rows):
        return {**describe(rows), "auroc": auroc(inside, rows.max(axis=1))}

    return {
        "in_set": describe(predictions_in.log_probabilities),
        "overall": rejected(out),
        "accents": {accent: rejected(out[accents == accent]) for accent in sorted(set(accents.tolist()))},
    }
