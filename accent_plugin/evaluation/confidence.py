"""Calibration and coverage of groups of clips, and warnings about answers and confidences that carry no information.

Conventions
-----------
* The confidence of an answer is its probability: the largest of the clip.
* Mean confidence minus accuracy is positive for an overconfident model. Unlike the expected calibration error it is not
  biased in small groups, but errors of opposite sign cancel in it.
* AUROC of the confidence: the probability that a random right answer has a larger confidence than a random wrong one; a
  tie counts half, and 0.5 is chance. It is exact; its interval is computed from tenths of the clips by confidence, and
  shifted to match the exact value.
"""

import numpy as np

from accent_plugin.evaluation.bootstrap import bootstrap_interval, grouped_sums
from accent_plugin.evaluation.scores import BINS, auroc

_COLLAPSED = 0.95  # fraction of clips with the same answer
_EXCESS = 0.1  # by which that fraction, or the accuracy, differs from what it should be
_CHANCE = 0.1  # distance of an AUROC from 0.5 that counts as near
_FLAT = 0.05  # range of the confidence of 90 % of clips


def calibration_figures(clips, gap, answered):
    """Calibration and coverage from sums over clips.

    Arguments
    ---------
    clips : (...) np.ndarray
        Number of clips.
    gap : (..., BINS) np.ndarray
        Confidence minus correctness, summed over the clips of each calibration bin.
    answered : (...) np.ndarray
        Number of clips that reach the threshold.

    Returns
    -------
    figures : dict
        Name -> (...) np.ndarray; NaN where there are no clips.

    Example
    -------
    >>> found = calibration_figures(np.array(4), np.array([0.4, -0.8]), np.array(3))
    >>> {name: round(float(value), 3) for name, value in found.items()}
    {'expected_calibration_error': 0.3, 'confidence_minus_accuracy': -0.1, 'coverage': 0.75}
    """
    sums = {
        "expected_calibration_error": np.abs(gap).sum(axis=-1),
        "confidence_minus_accuracy": gap.sum(axis=-1),
        "coverage": answered,
    }
    return {
        name: np.divide(total, clips, out=np.full(np.shape(clips), np.nan), where=clips > 0)
        for name, total in sums.items()
    }


class GroupStatistics:
    """Statistics summed over the clips of each group: clips, right answers, answered clips, and gaps of each bin."""

    def __init__(self, items, answered, cell, groups):
        self.items, self.answered, self.cell, self.groups = items, answered, cell, groups
        self.columns = groups * (3 + BINS)

    def statistics(self, first, last):
        """(units, columns) np.ndarray for units first to last - 1."""
        a, b = np.searchsorted(self.items.unit, [first, last])
        unit, units, cell = self.items.unit[a:b] - first, last - first, self.cell[a:b]
        counts = (None, self.items.right[a:b], self.answered[a:b])
        bins = cell * BINS + self.items.bin[a:b]
        return np.hstack([
            *(grouped_sums(unit, units, cell, self.groups, weights) for weights in counts),
            grouped_sums(unit, units, bins, self.groups * BINS, self.items.gap[a:b]),
        ])  # fmt: skip

    def split(self, totals):
        """Split (..., columns) totals: clips, right and answered (..., groups), gaps (..., groups, BINS) np.ndarray."""
        counts, gap = totals[..., : 3 * self.groups], totals[..., 3 * self.groups :]
        return *np.split(counts, 3, axis=-1), gap.reshape(*gap.shape[:-1], self.groups, BINS)


def confidence_auroc(items, tenths, totals, n):
    """AUROC of the confidence with its interval; None if all answers are right, or all are wrong.

    Arguments
    ---------
    items : accent_plugin.evaluation.bootstrap.ClipStatistics
    tenths : accent_plugin.evaluation.selective.CoverageTenths
    totals : (1 + draws, classes, 2 * tenths) np.ndarray
        Of `tenths.statistics`.
    n : int
        Number of units drawn.
    """
    if items.right.all() or not items.right.any():
        return None
    exact = auroc(np.sort(items.top[items.right]), items.top[~items.right])
    count, wrong = tenths.counts(totals)
    right = count - wrong
    # Tenths are in descending order of confidence.
    below = np.cumsum(wrong[:, ::-1], axis=-1)[:, ::-1] - wrong / 2
    pairs = right.sum(axis=-1) * wrong.sum(axis=-1)
    found = np.divide((right * below).sum(axis=-1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return bootstrap_interval(np.clip(found - found[0] + exact, 0, 1), n)


def answer_warnings(metrics, top):
    """List sentences on a model whose answers or confidences carry no information.

    Arguments
    ---------
    metrics : dict
        "confusion", "clip" and "confidence" of `accent_plugin.evaluation.evaluate.evaluate`.
    top : (clips,) np.ndarray
        Largest probability of each clip.

    Returns
    -------
    warnings : list of str
    """
    labels, confusion = metrics["confusion"]["labels"], np.array(metrics["confusion"]["clips"])
    return [
        *_about_classes(labels, confusion),
        *_about_ranking(metrics["confidence"]["auroc"]),
        *_about_range(top, metrics["clip"]["accuracy"]["value"]),
    ]


def _about_classes(labels, confusion):
    clips, answers, truth = confusion.sum(), confusion.sum(axis=0), confusion.sum(axis=1)
    most = int(answers.argmax())
    if answers[most] == clips:
        if truth[most] < clips:
            yield (
                f"The model answers every clip with {labels[most]}: it does not tell these accents apart, and its "
                f"accuracy is the fraction of {labels[most]} clips, {truth[most] / clips:.3f}."
            )
        return
    if answers[most] >= _COLLAPSED * clips and answers[most] - truth[most] > _EXCESS * clips:
        yield (
            f"The model answers {answers[most] / clips:.1%} of clips with {labels[most]}, the true accent of "
            f"{truth[most] / clips:.1%}: it hardly tells these accents apart."
        )
    never = [f"{labels[a]} ({truth[a]:,})" for a in np.flatnonzero((answers == 0) & (truth > 0))]
    if never:
        yield f"The model never answers with these accents, and is wrong on all of their clips: {', '.join(never)}."


def _about_ranking(v):
    if v is None or v["low"] is None:
        return
    figure = f"AUROC {v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f}; 0.5 is chance)"
    if v["high"] < 0.5:
        yield f"Confidence is higher for wrong answers than for right ones: {figure}. Do not abstain by it."
    elif v["low"] <= 0.5 and abs(v["value"] - 0.5) < _CHANCE:
        yield f"Confidence is the same for right and wrong answers on these clips: {figure}. Do not abstain by it."


def _about_range(top, accuracy):
    low, high = np.percentile(top, [5, 95])
    mean = float(np.mean(top))
    if high - low < _FLAT and abs(mean - accuracy) > _EXCESS:
        cause = "" if mean > accuracy else ", as happens if cosine similarities are read as logits"
        yield (
            f"Confidence is nearly the same for all clips{cause}: from {low:.3f} to {high:.3f} for 90 % of them, while "
            f"{accuracy:.1%} of the answers are right."
        )
