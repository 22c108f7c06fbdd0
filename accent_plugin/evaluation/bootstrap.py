"""Bootstrap over speakers, computed from each speaker's sufficient statistics."""

import zlib

import numpy as np
from scipy.special import logsumexp

from accent_plugin.evaluation.scores import BINS, macro_f1, unweighted_average_recall

_BLOCK = 4_000_000  # counts in memory at a time while resampling: 32 MB


class ResamplingUnits:
    """The units that the bootstrap draws, sorted by accent: speakers, or clips if the speakers are unknown."""

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
        """Average over each speaker's clips, and normalise: (speakers, classes) np.ndarray."""
        clips = np.diff(np.append(self.starts, len(self.order)))
        means = np.add.reduceat(p.log_probabilities[self.order], self.starts, axis=0) / clips[:, None]
        return means - logsumexp(means, axis=1, keepdims=True)

    def resample(self, statistics, draws, seed):
        """Sum statistics over the units of each accent, for the sample itself and for every draw.

        Arguments
        ---------
        statistics : callable
            (first unit, last unit + 1) -> (units, columns) np.ndarray.
        draws, seed : int
            Number of draws and seed of the bootstrap.

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
            # Drawing the number of hits per block, then units within the block, gives the same distribution, but needs
            # only bounded memory.
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


class ClipStatistics:
    """Statistics to sum over clips or speakers: predicted labels, log-loss, and the gap of each calibration bin."""

    def __init__(self, log_probabilities, truth, unit):
        self.unit, self.classes = unit, log_probabilities.shape[1]
        self.predicted = log_probabilities.argmax(axis=1)
        self.right = self.predicted == truth
        self.loss = -np.take_along_axis(log_probabilities, truth[:, None], axis=1)[:, 0]
        self.top = np.exp(log_probabilities.max(axis=1))
        self.bin, self.gap = np.minimum((self.top * BINS).astype(int), BINS - 1), self.top - self.right

    def statistics(self, first, last):
        """Return the (units, classes + 1 + BINS) np.ndarray for the units from first to last - 1."""
        a, b = np.searchsorted(self.unit, [first, last])
        unit, units = self.unit[a:b] - first, last - first
        return np.hstack([
            grouped_sums(unit, units, self.predicted[a:b], self.classes),
            grouped_sums(unit, units, 0, 1, self.loss[a:b]),
            grouped_sums(unit, units, self.bin[a:b], BINS, self.gap[a:b]),
        ])  # fmt: skip


def grouped_sums(unit, units, column, columns, weights=None):
    """Count, or sum weights, by unit and column: (units, columns) np.ndarray."""
    return np.bincount(unit * columns + column, weights=weights, minlength=units * columns).reshape(units, columns)


def headline_figures(totals):
    """Compute the headline metrics from (..., classes, classes + 1 + BINS) totals of `ClipStatistics.statistics`."""
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


def bootstrap_interval(values, n):
    """Make {"value", "low", "high", "n"} from the metric of the sample (first) and those of the draws."""
    draws = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws.size else (None, None)
    return {"value": _number(values[0]), "low": _number(low), "high": _number(high), "n": int(n)}


def _number(value):
    return None if value is None or np.isnan(value) else float(value)
