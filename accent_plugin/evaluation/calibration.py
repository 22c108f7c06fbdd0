"""Calibration by temperature scaling, and the risk-coverage curve.

Conventions
-----------
* Temperature scaling (Guo et al., 2017): the probabilities are softmax(scores / T), with one T for all clips. T above 1
  lowers the confidence, T below 1 raises it. The predicted labels of clips and speakers do not change.
* T minimises the mean negative log-likelihood over clips. Accents are not reweighted, so that the probabilities fit the
  distribution of accents in the clips.
* Fit T on the validation split. If T were fitted on the test split, the calibration on test would look too good.
  The "after" figures and the curve of `describe_calibration` are computed on the clips that T was fitted on, and are
  slightly optimistic.
* Log-probabilities are floored at -700, as in `accent_plugin.evaluation.evaluate`.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.predictions import FLOOR, require_indices
from accent_plugin.evaluation.scores import expected_calibration_error
from accent_plugin.evaluation.selective import risk_coverage

BOUNDS = (0.05, 20.0)  # range of the temperature


def _checked(log_probabilities, truth):
    """Return both as arrays with normalised rows, or raise a `ReportError`."""
    scores, truth = np.asarray(log_probabilities, dtype=np.float64), np.asarray(truth)
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise ReportError(
            f"log_probabilities has shape {scores.shape}; calibration needs (clips, classes) with at least one clip "
            "and two classes: is the validation split empty?"
        )
    require_indices(truth, len(scores), scores.shape[1])
    bad = np.flatnonzero(~(scores < np.inf).all(axis=1) | ~np.isfinite(scores).any(axis=1))
    if bad.size:
        raise ReportError(
            f"{bad.size} of {len(scores)} clips have log-probabilities that are not numbers; the first is clip "
            f"{bad[0]} with {scores[bad[0]].tolist()}: did training diverge?"
        )
    return np.maximum(log_softmax(scores, axis=1), FLOOR), truth


def _loss(log_probabilities, truth):
    return float(-np.take_along_axis(log_probabilities, truth[:, None], axis=1).mean())


def fit_temperature(log_probabilities, truth):
    """Fit the temperature that maximises the likelihood of the true accents (Guo et al., 2017).

    The log-likelihood is concave in 1 / T, so a bounded search on log T finds its maximum. If no prediction is
    wrong, the best T would be 0; 1 is returned instead. If the model is worse than chance, T is at its upper bound.

    Arguments
    ---------
    log_probabilities : (clips, classes) array
        For clips that the model was not trained on. Logits work as well.
    truth : (clips,) array of int

    Returns
    -------
    temperature : float
        From 0.05 to 20.

    Raises
    ------
    ReportError
        When there are no clips or fewer than two classes, or the arrays are inconsistent.

    Example
    -------
    >>> sure = np.log([[0.99, 0.01]] * 4)  # correct three times out of four: log 99 / log 3
    >>> round(fit_temperature(sure, [0, 0, 0, 1]), 3)
    4.183
    """
    return _fit(*_checked(log_probabilities, truth))


def _fit(log_probabilities, truth):
    if (log_probabilities.argmax(axis=1) == truth).all():
        return 1.0

    def loss(temperature):
        return _loss(log_softmax(log_probabilities / temperature, axis=1), truth)

    search = minimize_scalar(
        lambda x: loss(np.exp(x)), bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-7}
    )
    # The search approaches its bounds but does not reach them.
    return float(min(*BOUNDS, np.exp(search.x), key=loss))


def apply_temperature(log_probabilities, temperature):
    """Scale log-probabilities, (..., classes), by a temperature above 0, and normalise them again.

    Raises
    ------
    ReportError
        When the temperature is not a positive number.

    Example
    -------
    >>> np.exp(apply_temperature(np.log([0.8, 0.2]), 2)).round(3)
    array([0.667, 0.333])
    """
    if not 0 < temperature < np.inf:
        raise ReportError(f"the temperature is {temperature}: it must be a positive number (1 changes nothing)")
    scores = np.maximum(np.asarray(log_probabilities, dtype=np.float64), FLOOR)
    return log_softmax(scores / temperature, axis=-1)


def describe_calibration(log_probabilities, truth):
    """Fit a temperature and describe its effect, for the bundle's config.

    Arguments
    ---------
    log_probabilities : (clips, classes) array
        Scores of the validation split.
    truth : (clips,) array of int

    Returns
    -------
    calibration : dict
        "temperature", "clips", "log_loss" and "expected_calibration_error" (each {"before", "after"}), and "curve"
        {"threshold", "coverage", "risk"} of the calibrated probabilities; numbers and lists that JSON can hold.

    Raises
    ------
    ReportError
        As for `fit_temperature`.

    Example
    -------
    >>> calibration = describe_calibration(np.log([[0.99, 0.01]] * 4), [0, 0, 0, 1])
    >>> {when: round(error, 3) for when, error in calibration["expected_calibration_error"].items()}
    {'before': 0.24, 'after': 0.0}
    """
    before, truth = _checked(log_probabilities, truth)
    temperature = _fit(before, truth)
    both = {"before": before, "after": apply_temperature(before, temperature)}
    top, right = np.exp(both["after"].max(axis=1)), before.argmax(axis=1) == truth
    curve = risk_coverage(top, right)
    return {
        "temperature": temperature,
        "clips": len(truth),
        "log_loss": {name: _loss(scores, truth) for name, scores in both.items()},
        "expected_calibration_error": {n: expected_calibration_error(np.exp(s), truth) for n, s in both.items()},
        "curve": {name: list(getattr(curve, name)) for name in ("threshold", "coverage", "risk")},
    }
