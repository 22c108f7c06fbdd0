"""Recall, precision, F1, confusion matrix, calibration error and AUROC."""

import numpy as np

from accent_plugin.errors import ReportError

BINS = 15


def log_softmax(scores, axis=-1):
    """Normalise scores to log-probabilities; SciPy's function, whose import takes as long as that of all else here."""
    shifted = scores - np.max(scores, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


def safe_ratio(a, b):
    """Divide; 0 where the denominator is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


def _mean_over_present(values, confusion):
    present = confusion.sum(axis=-1) > 0
    return safe_ratio((values * present).sum(axis=-1), present.sum(axis=-1))[()]


def recalls(confusion):
    """Fraction of each accent's clips that are predicted correctly, (..., classes) np.ndarray; 0 for absent accents."""
    return safe_ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1))


def precisions(confusion):
    """Fraction of each accent's predictions that are correct, (..., classes) np.ndarray; 0 without predictions."""
    return safe_ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-2))


def f1s(confusion):
    """Harmonic mean of precision and recall, (..., classes) np.ndarray."""
    return safe_ratio(2 * np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def unweighted_average_recall(confusion):
    """Average the recalls of the accents that are present, with equal weights.

    Arguments
    ---------
    confusion : (..., classes, classes) np.ndarray
        Counts; rows are the truth.

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
    """Count predictions by true accent: (classes, classes) np.ndarray of int; rows are the truth."""
    cells = np.asarray(truth) * classes + np.asarray(predicted)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def calibration_bins(probabilities, truth):
    """Count, confidence and accuracy in each of the 15 bins of the reliability diagram; 0 in empty bins.

    Arguments
    ---------
    probabilities : (clips, classes) np.ndarray
    truth : (clips,) np.ndarray of int
    """
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((top * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    return count, *(safe_ratio(np.bincount(bins, weights=w, minlength=BINS), count) for w in (top, right))


def expected_calibration_error(probabilities, truth):
    """Mean over clips of the gap between the accuracy and the mean probability of their bin (Guo et al., 2017).

    Arguments as for `calibration_bins`.

    Example
    -------
    >>> round(expected_calibration_error(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0])), 3)
    0.45
    """
    count, confidence, accuracy = calibration_bins(probabilities, truth)
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


def auroc(scores_in, scores_out):
    """Probability that a random in-set score exceeds a random out-of-set score; a tie counts half.

    Example
    -------
    >>> auroc([0.9, 0.8], [0.8, 0.1])
    0.875
    """
    inside, outside = np.asarray(scores_in, dtype=float), np.asarray(scores_out, dtype=float)
    if not inside.size or not outside.size:
        raise ReportError("AUROC needs in-set and out-of-set scores, but one of the lists is empty")
    outside = np.sort(outside)
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * outside.size))
