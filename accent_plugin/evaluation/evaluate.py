"""Metrics of a set of predictions with confidence intervals.

Conventions
-----------
* The rows of a confusion matrix are the true accents, the columns the answers (predicted accents). The answer is the
  class with the largest probability; on a tie, the first of them.
* By clip, every clip counts once. By speaker, every speaker counts once: a speaker's log-probabilities are the
  normalised means over the clips. A speaker with clips of two accents counts as one speaker in each accent.
* An accent without clips is excluded from every average and listed under ``absent_accents``; predicting it is still
  an error. An accent that is never predicted has precision 0 and F1 0.
* Log-loss is in nats. Log-probabilities are floored at -700, so that a single wrong answer cannot make it infinite.
* Expected calibration error: 15 equal-width bins [k/15, (k+1)/15) of the largest probability, with 1 in the last bin;
  the mean over clips of the gap between a bin's accuracy and its mean probability (Guo et al., 2017). With few clips
  it is biased upwards, and even more so in resamples: its interval may lie above the value.
* Risk and coverage: a clip is answered if its largest probability reaches a threshold. Coverage is the fraction of
  clips answered, risk the fraction of wrong answers among them. The area under the curve is the mean over clips of the
  risk at the clip's own probability (AURC of Geifman and El-Yaniv, 2017; clips with equal probability have the same
  risk). Its interval is computed from tenths of the clips by probability, and shifted to match the exact value.
* Intervals are 95 % percentile intervals of a bootstrap that draws speakers with replacement within each accent and
  keeps all clips of a speaker together, because their errors are correlated. If speakers are unknown it draws clips;
  the intervals are then too narrow, which a note states. ``n`` is the number of units drawn for the figure.
* If there are no errors, the interval has zero width.
* A group's unweighted average recall is over the accents in the group. A group of fewer than 5 speakers is ``small``:
  too small for conclusions.
* Equal predictions give an identical report, whatever the order of the clips. An accent's draws do not depend on other
  accents.
"""

from collections import Counter

import numpy as np

from accent_plugin.evaluation.bootstrap import (
    ClipStatistics,
    ResamplingUnits,
    bootstrap_interval,
    grouped_sums,
    headline_figures,
)
from accent_plugin.evaluation.confidence import (
    GroupStatistics,
    answer_warnings,
    calibration_figures,
    confidence_auroc,
)
from accent_plugin.evaluation.scores import BINS, f1s, precisions, recalls, safe_ratio
from accent_plugin.evaluation.selective import COVERAGE_TENTHS, USUAL_COVERAGE, CoverageTenths, risk_coverage
from accent_plugin.evaluation.text_overlap import text_groups, text_overlap

SMALL = 5  # speakers; groups with fewer are marked
UNKNOWN = "unknown"
_AGES = ("teens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_DURATIONS = ((3.0, "under 3 s"), (5.0, "3 to 5 s"), (8.0, "5 to 8 s"), (np.inf, "8 s and over"))
_MOST_GROUPS = 12  # so that a free-text column does not produce a thousand groups


def _age(text):
    text = text.lower().replace("fourties", "forties")
    try:
        return _AGES[min(max(int(float(text)) // 10 - 1, 0), len(_AGES) - 1)] if float(text) > 0 else UNKNOWN
    except ValueError:
        return text or UNKNOWN


def _gender(text):
    return text.lower() or UNKNOWN


def _groups(p):
    """Yield each kind of group with its values in display order and the index of every clip's value."""
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
    yield from text_groups(p, UNKNOWN)


def evaluate(predictions, draws=1000, seed=0, threshold=None):
    """Compute all metrics of a report, with intervals.

    Arguments
    ---------
    predictions : ScoredClips
    draws, seed : int
        Number of draws and seed of the bootstrap.
    threshold : float, or None
        Smallest probability that counts as answered in the coverage of accents and groups, best chosen on validation.
        None takes the one at which 80 % of these clips are answered.

    Returns
    -------
    metrics : dict
        "clip", "speaker" (None if unknown), "per_accent", "confusion", "risk_coverage" (by clip: "threshold",
        "coverage", "risk", "area", and "surest": accuracy of the 50, 80 and 90 % of clips with the largest
        probabilities), "confidence" (by clip: "threshold", "threshold_given", "coverage",
        "confidence_minus_accuracy", "auroc"), "groups", "text" (from `accent_plugin.evaluation.text_overlap`),
        "absent_accents", "notes", "warnings"; every figure is {"value", "low", "high", "n"}, never NaN.

    Example
    -------
    >>> from accent_plugin.evaluation.predictions import ScoredClips
    >>> p = ScoredClips(("a", "b"), ("x", "y"), [0, 1], np.log([[0.9, 0.1], [0.6, 0.4]]), ("us", "england"), [4, 5])
    >>> evaluate(p)["clip"]["accuracy"]
    {'value': 0.5, 'low': 0.5, 'high': 0.5, 'n': 2}
    """
    p, labels, classes = predictions, predictions.labels, len(predictions.labels)
    units = ResamplingUnits(p)
    truth = p.truth[units.order]
    items = [ClipStatistics(p.log_probabilities[units.order], truth, units.unit)]
    if units.names is not None:
        items.append(ClipStatistics(units.speaker_log_probabilities(p), units.accent, np.arange(len(units))))
    tenths = CoverageTenths(items[0])
    least = threshold
    if threshold is None:
        least = float(tenths.edges[round(USUAL_COVERAGE * COVERAGE_TENTHS) - 1])
    answered = items[0].top >= least
    groups = [
        (kind, values, GroupStatistics(items[0], answered, cell[units.order], len(values)))
        for kind, values, cell in _groups(p)
        if values
    ]

    def statistics(first, last):
        a, b = np.searchsorted(units.unit, [first, last])
        return np.hstack([
            *(i.statistics(first, last) for i in items),
            tenths.statistics(first, last),
            grouped_sums(units.unit[a:b] - first, last - first, 0, 1, answered[a:b]),
            *(group.statistics(first, last) for _, _, group in groups),
        ])  # fmt: skip

    def intervals(totals):
        return {name: bootstrap_interval(v, len(units)) for name, v in headline_figures(totals).items()}

    totals = units.resample(statistics, draws, seed)
    width = classes + 1 + BINS
    clips, *speakers = (totals[..., i * width : (i + 1) * width] for i in range(len(items)))
    rest = totals[..., len(items) * width :]
    sure, reached, rest = np.split(rest, [2 * COVERAGE_TENTHS, 2 * COVERAGE_TENTHS + 1], axis=-1)
    calibration = (clips[..., :classes].sum(axis=-1), clips[..., classes + 1 :], reached[..., 0])
    overall = calibration_figures(*(part.sum(axis=1) for part in calibration))
    metrics = {
        "clip": intervals(clips),
        "speaker": intervals(speakers[0]) if speakers else None,
        "per_accent": _per_accent(clips[..., :classes], calibration_figures(*calibration), units, labels),
        "confusion": {
            "labels": list(labels),
            "clips": clips[0, :, :classes].astype(int).tolist(),
            "speakers": speakers[0][0, :, :classes].astype(int).tolist() if speakers else None,
        },
        "risk_coverage": tenths.figures(sure, risk_coverage(items[0].top, items[0].right), len(units)),
        "confidence": {
            "threshold": least,
            "threshold_given": threshold is not None,
            **{k: bootstrap_interval(overall[k], len(units)) for k in ("coverage", "confidence_minus_accuracy")},
            "auroc": confidence_auroc(items[0], tenths, sure, len(units)),
        },
        "groups": {kind: {} for kind in ("gender", "age", "duration")},
        "text": text_overlap(p),
        "absent_accents": [labels[a] for a in np.flatnonzero(units.per_accent == 0)],
    }
    for kind, values, group in groups:
        part, rest = rest[..., : group.columns], rest[..., group.columns :]
        metrics["groups"][kind] = _of_groups(values, group, part, units)
    metrics["notes"] = _notes(p, units, metrics)
    metrics["warnings"] = answer_warnings(metrics, items[0].top)
    return metrics


def _of_groups(values, group, totals, units):
    clips, right, answered, gap = group.split(totals)
    present = (clips > 0).sum(axis=1)
    recall = safe_ratio(right, clips).sum(axis=1)
    figures = {
        "unweighted_average_recall": np.divide(recall, present, out=np.full(recall.shape, np.nan), where=present > 0),
        **calibration_figures(clips.sum(axis=1), gap.sum(axis=1), answered.sum(axis=1)),
    }
    counts = clips[0].sum(axis=0).astype(int).tolist()
    cells = {}
    for g, value in enumerate(values):
        if counts[g]:
            n = len(np.unique(units.unit[group.cell == g]))
            cells[value] = {
                **{name: bootstrap_interval(v[:, g], n) for name, v in figures.items()},
                "clips": counts[g],
                "speakers": n if units.names is not None else None,
                "small": n < SMALL,
            }
    return cells


def _per_accent(confusion, calibration, units, labels):
    return {
        label: {
            # Recall depends on the accent's own speakers only, precision and F1 on all speakers.
            "precision": bootstrap_interval(precisions(confusion)[:, a], len(units)),
            "recall": bootstrap_interval(recalls(confusion)[:, a], units.per_accent[a]),
            "f1": bootstrap_interval(f1s(confusion)[:, a], len(units)),
            **{name: bootstrap_interval(v[:, a], units.per_accent[a]) for name, v in calibration.items()},
            "clips": int(confusion[0, a].sum()),
            "speakers": int(units.per_accent[a]) if units.names is not None else None,
        }
        for a, label in enumerate(labels)
        if units.per_accent[a]
    }


def _notes(p, units, metrics):
    notes, present = [], np.flatnonzero(units.per_accent)
    if metrics["absent_accents"]:
        names = ", ".join(metrics["absent_accents"])
        notes.append(f"These data have no clips of {names}: excluded from every average.")
    if units.names is None:
        notes.append(
            "Speakers unknown: intervals resample clips, so they are too narrow, and there are no figures by speaker."
        )
        return notes
    unnamed = sum(not c for c in p.client_ids)
    if unnamed:
        notes.append(f"{unnamed} clips have no speaker ID; each counts as a separate speaker.")
    if len(set(p.client_ids) - {""}) + unnamed < len(units):
        notes.append("Speakers with clips of several accents count as one speaker in each of these accents.")
    few = [f"{p.labels[a]} ({units.per_accent[a]})" for a in present if units.per_accent[a] < SMALL]
    if few:
        notes.append(f"Fewer than {SMALL} speakers of {', '.join(few)}: their intervals are too narrow to be reliable.")
    for level in ("clip", "speaker"):
        if metrics[level]["accuracy"]["value"] == 1:
            bound = 1 - 0.05 ** (1 / len(units))
            notes.append(
                f"No error by {level}, so the bootstrap interval has no width; with {len(units)} speakers, this is "
                f"consistent with an error rate of up to {bound:.0%} of speakers (exact one-sided 95 % bound)."
            )
    return notes


def speaker_rows(predictions):
    """List all speakers with their own answer and the answers of their clips.

    Arguments
    ---------
    predictions : ScoredClips

    Returns
    -------
    rows : list of dict
        "client_id", "accent", "answer", "probability" (of the answer), "right", "clips", "clips_right", "share_right"
        and "answers" (clips per answer, in the order of the labels), sorted by accent and client id. Empty if the
        speakers are unknown.
    """
    p, units = predictions, ResamplingUnits(predictions)
    if units.names is None:
        return []
    log_probabilities = units.speaker_log_probabilities(p)
    answer, probability = log_probabilities.argmax(axis=1), np.exp(log_probabilities.max(axis=1))
    answers = grouped_sums(units.unit, len(units), p.predicted[units.order], len(p.labels))
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
