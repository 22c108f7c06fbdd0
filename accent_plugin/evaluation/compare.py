"""Comparison of two models on the same clips, summaries of runs, and out-of-set detection."""

from dataclasses import replace

import numpy as np

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.bootstrap import ClipStatistics, ResamplingUnits, bootstrap_interval, headline_figures
from accent_plugin.evaluation.evaluate import speaker_rows
from accent_plugin.evaluation.scores import BINS, auroc

FIGURES = ("accuracy", "unweighted_average_recall", "macro_f1", "log_loss", "expected_calibration_error")
CONFIDENT = (0.5, 0.8, 0.9)  # thresholds at which predictions for out-of-set speech are counted


def compare_models(a, b, draws=1000, seed=0):
    """Compare two models on the same clips; a difference is the metric of b minus that of a.

    Arguments
    ---------
    a, b : ScoredClips
        Predictions for the same clips with the same truth; the order of clips and labels may differ.
    draws, seed : int
        Number of draws and seed of the bootstrap. It is paired: both models use the same draws.

    Returns
    -------
    comparison : dict
        "clip" and "speaker": {figure: {"a", "b", "difference": {"value", "low", "high", "n"}}} ("speaker" is None
        if the speakers are unknown); "changed": the speakers whose predictions differ; "clips", "speakers", "notes".

    Raises
    ------
    ReportError
        When the clips, labels, truth or speakers differ.
    """
    b = _aligned(a, b)
    units = ResamplingUnits(a)
    truth = a.truth[units.order]
    items = [ClipStatistics(p.log_probabilities[units.order], truth, units.unit) for p in (a, b)]
    if units.names is not None:
        own = np.arange(len(units))
        items += [ClipStatistics(units.speaker_log_probabilities(p), units.accent, own) for p in (a, b)]
    totals = units.resample(lambda *ends: np.hstack([i.statistics(*ends) for i in items]), draws, seed)
    width = len(a.labels) + 1 + BINS
    figures = [headline_figures(totals[..., i * width : (i + 1) * width]) for i in range(len(items))]

    def differences(x, y):
        return {
            name: {"a": float(u[0]), "b": float(v[0]), "difference": bootstrap_interval(v - u, len(units))}
            for name, u, v in ((name, x[name], y[name]) for name in FIGURES)
        }

    common, compared = ("client_id", "accent", "clips"), ("answer", "probability", "share_right")
    changed = [
        {key: x[key] for key in common}
        | {name: {key: row[key] for key in compared} for name, row in (("a", x), ("b", y))}
        for x, y in zip(speaker_rows(a), speaker_rows(b), strict=True)
        if x["answer"] != y["answer"]
    ]
    known = units.names is not None
    return {
        "clip": differences(*figures[:2]),
        "speaker": differences(*figures[2:]) if known else None,
        "changed": changed,
        "clips": len(a.ids),
        "speakers": len(units) if known else None,
        "notes": [] if known else ["Speakers unknown: intervals resample clips and are too narrow."],
    }


def _aligned(a, b):
    if sorted(a.labels) != sorted(b.labels):
        raise ReportError(f"predictions for different labels cannot be compared: {list(a.labels)} and {list(b.labels)}")
    where = {clip: i for i, clip in enumerate(b.ids)}
    missing = [clip for clip in a.ids if clip not in where]
    if missing or len(a.ids) != len(b.ids):
        extra = sorted(set(b.ids).difference(a.ids))
        raise ReportError(
            f"only predictions for the same clips can be compared: {len(missing)} of {len(a.ids)} are missing from the "
            f"second set (first: {missing[:1]}), {len(extra)} are only in the second set (first: {extra[:1]})"
        )
    order = np.array([where[clip] for clip in a.ids])
    columns = [b.labels.index(label) for label in a.labels]
    truth = np.argsort(columns)[b.truth[order]]
    if (truth != a.truth).any():
        clip = np.flatnonzero(truth != a.truth)[0]
        names = f"{a.labels[a.truth[clip]]} and {a.labels[truth[clip]]}"
        raise ReportError(f"clip {a.ids[clip]!r} has two true accents, {names}: these are not the same data")
    b = b.select(order)
    if b.client_ids != a.client_ids:
        raise ReportError("the speakers of the two sets of predictions differ: these are not the same data")
    return replace(a, log_probabilities=b.log_probabilities[:, columns])


def summarise_runs(runs, names=None):
    """Average the headline metrics of several runs, such as runs with different seeds.

    Arguments
    ---------
    runs : list of dict
        From `evaluate` or metrics.json.
    names : list of str, or None
        Names of the runs; "1", "2", ... by default.

    Returns
    -------
    summary : dict
        "runs": names; "clip" and "speaker": {figure: {"mean", "standard_deviation" (n - 1; None for one run),
        "values"}}; "speaker" is None if a run has no metrics by speaker.
    """
    if not runs:
        raise ReportError("no runs to summarise")
    names = [str(i + 1) for i in range(len(runs))] if names is None else [str(name) for name in names]
    if len(names) != len(runs):
        raise ReportError(f"{len(runs)} runs, but {len(names)} names")

    def describe(values):
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}

    summary: dict = {"runs": names}
    for level in ("clip", "speaker"):
        complete = all(run[level] for run in runs)
        values = {name: [run[level][name]["value"] for run in runs] for name in FIGURES} if complete else {}
        summary[level] = {name: describe(v) for name, v in values.items()} or None
    return summary


def out_of_set_scores(predictions_in, log_probabilities_out, accents_out):
    """Measure how well the largest probability separates known accents from other accents.

    Arguments
    ---------
    predictions_in : ScoredClips
        Predictions for speech with the known accents.
    log_probabilities_out : (clips, classes) np.ndarray
        The same model's log-probabilities for speech with other accents.
    accents_out : sequence of str
        True accent of each of the latter clips.

    Returns
    -------
    result : dict
        "in_set", "overall" and each of "accents": {"clips", "auroc" (not for in_set), "confident": fraction answered
        with a probability of at least 0.5, 0.8, 0.9, "answers": fraction of each answer}.

    Raises
    ------
    ReportError
        When the shapes do not match, there are no clips, or probabilities do not sum to 1.
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
        fractions = np.bincount(answers, minlength=classes) / len(top)
        return {
            "clips": len(top),
            "confident": {str(c): float((top >= c).mean()) for c in CONFIDENT},
            "answers": dict(zip(predictions_in.labels, fractions.tolist(), strict=True)),
        }

    def describe_other(rows):
        return {**describe(rows), "auroc": auroc(inside, rows.max(axis=1))}

    return {
        "in_set": describe(predictions_in.log_probabilities),
        "overall": describe_other(out),
        "accents": {accent: describe_other(out[accents == accent]) for accent in sorted(set(accents.tolist()))},
    }
