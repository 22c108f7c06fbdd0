"""Temperature scaling and risk-coverage curves, compared with hand-computed values and invariants."""

import json

import numpy as np
import pytest
from helpers.predictions import LABELS, simulate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax

from accent_plugin.errors import ReportError
from accent_plugin.evaluation import calibration
from accent_plugin.evaluation.evaluate import evaluate, speaker_rows
from accent_plugin.evaluation.predictions import ScoredClips
from accent_plugin.evaluation.selective import risk_coverage

# Sixteenths: equal or clearly different, so that rounding decides nothing.
SCORES = arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(2, 5)), elements=st.integers(-480, 480)).map(
    lambda scores: scores / 16
)


def synthetic(clips=20_000, seed=0):
    """Log-probabilities of three classes, and truth drawn from them, so that they are calibrated."""
    rng = np.random.default_rng(seed)
    log_probabilities = log_softmax(rng.normal(scale=2, size=(clips, 3)), axis=1)
    return log_probabilities, (rng.uniform(size=(clips, 1)) > np.exp(log_probabilities).cumsum(axis=1)).sum(axis=1)


# ---- temperature


def test_temperature_matches_hand_computed_value():
    # Three of four answers are correct: p = 3 / 4 is the most likely, and (log 9) / T = log 3 gives T = 2.
    sure = np.log([[0.9, 0.1]] * 4)
    assert calibration.fit_temperature(sure, [0, 0, 1, 0]) == pytest.approx(2, rel=1e-5)
    assert calibration.fit_temperature(np.log([[0.6, 0.4]] * 4), [0, 0, 1, 0]) == pytest.approx(
        np.log(1.5) / np.log(3), rel=1e-5
    )


def test_apply_temperature_matches_hand_computed_values():
    scaled = calibration.apply_temperature(np.log([[0.8, 0.2], [0.5, 0.5]]), 2)
    assert np.exp(scaled) == pytest.approx(np.array([[2 / 3, 1 / 3], [0.5, 0.5]]))


def test_calibrated_probabilities_have_temperature_one():
    assert calibration.fit_temperature(*synthetic()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("k", [0.2, 1.7, 8.0])
def test_scaled_logits_have_the_scale_as_temperature(k):
    log_probabilities, truth = synthetic(2000)
    own = calibration.fit_temperature(log_probabilities, truth)
    assert calibration.fit_temperature(k * log_probabilities, truth) == pytest.approx(k * own, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.floats(*calibration.BOUNDS))
def test_a_temperature_does_not_change_answers(scores, temperature):
    scaled = calibration.apply_temperature(log_softmax(scores, axis=1), temperature)
    assert (scaled.argmax(axis=1) == scores.argmax(axis=1)).all()
    assert np.exp(scaled).sum(axis=1) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.integers(0, 10**6))
def test_no_other_temperature_is_better(scores, seed):
    truth = np.random.default_rng(seed).integers(0, scores.shape[1], len(scores))
    fitted = calibration.fit_temperature(scores, truth)
    assert calibration.BOUNDS[0] <= fitted <= calibration.BOUNDS[1]
    assume((scores.argmax(axis=1) != truth).any())

    def loss(temperature):
        return -calibration.apply_temperature(log_softmax(scores, axis=1), temperature)[
            np.arange(len(truth)), truth
        ].mean()

    assert all(loss(fitted) <= loss(t) + 1e-6 * max(1, loss(t)) for t in np.geomspace(*calibration.BOUNDS, 40))


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_a_temperature_does_not_change_answers_by_speaker(temperature):
    p = simulate()
    log_probabilities = calibration.apply_temperature(p.log_probabilities, temperature)
    q = ScoredClips(p.ids, p.client_ids, p.truth, log_probabilities, LABELS, p.seconds)
    assert [row["answer"] for row in speaker_rows(q)] == [row["answer"] for row in speaker_rows(p)]


def test_without_an_error_the_temperature_is_one():
    assert calibration.fit_temperature(np.log([[0.9, 0.1], [0.3, 0.7]]), [0, 1]) == 1
    assert calibration.fit_temperature([[0.0, -np.inf]], [0]) == 1


def test_a_model_worse_than_chance_gets_the_upper_bound():
    assert calibration.fit_temperature(np.log([[0.9, 0.1]] * 3), [1, 1, 1]) == calibration.BOUNDS[1]
    assert calibration.fit_temperature([[0.0, -np.inf]] * 2, [0, 1]) == calibration.BOUNDS[1]


def test_an_impossible_truth_stays_finite():
    described = calibration.describe_calibration([[0.0, -np.inf], [-np.inf, 0.0], [0.0, -np.inf]], [0, 1, 1])
    assert np.isfinite(described["log_loss"]["after"]) and described["temperature"] == calibration.BOUNDS[1]
    assert described["log_loss"]["before"] == pytest.approx(700 / 3)


@pytest.mark.parametrize("temperature", [0, -1, np.inf, np.nan])
def test_temperatures_that_are_not_positive_numbers_are_refused(temperature):
    with pytest.raises(ReportError, match="must be a positive number"):
        calibration.apply_temperature([[0.0, 0.0]], temperature)


@pytest.mark.parametrize(
    ("scores", "truth", "match"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), r"shape \(0, 3\).*is the validation split empty"),
        (np.zeros((2, 1)), [0, 0], "two classes"),
        (np.zeros(3), [0, 0, 0], r"shape \(3,\)"),
        (np.zeros((2, 3)), [0], r"truth has type int64 and shape \(1,\); give 2 integers"),
        (np.zeros((2, 3)), [0.0, 1.0], "truth has type float64"),
        (np.zeros((2, 3)), [0, 3], "clip 1 has true accent 3; indices range from 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], "clip 0 has true accent -1"),
        ([[0.0, 0.0], [np.nan, 0.0]], [0, 0], "1 of 2 clips .* the first is clip 1 .*did training diverge"),
        ([[-np.inf, -np.inf]], [0], "not numbers"),
        ([[np.inf, 0.0]], [0], "not numbers"),
    ],
)
@pytest.mark.parametrize("function", [calibration.fit_temperature, calibration.describe_calibration])
def test_invalid_scores_and_truth_are_refused(function, scores, truth, match):
    with pytest.raises(ReportError, match=match):
        function(scores, truth)


# ---- risk and coverage


def curve_of(scores, truth):
    log_probabilities = log_softmax(scores, axis=1)
    return risk_coverage(np.exp(log_probabilities.max(axis=1)), log_probabilities.argmax(axis=1) == np.asarray(truth))


def hand():
    """Four clips, two with equal probability: the first answer is correct, one of the equal ones and the last wrong."""
    return curve_of(np.log([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.4, 0.6]]), [0, 0, 0, 0])


def test_risk_coverage_curve_matches_hand_computed_values():
    curve = hand()
    assert curve.threshold == pytest.approx((0.9, 0.8, 0.6))
    assert curve.coverage == (0.25, 0.75, 1)
    assert curve.risk == pytest.approx((0, 1 / 3, 1 / 2))
    assert curve.area == pytest.approx((0 + 1 / 3 + 1 / 3 + 1 / 2) / 4)


def test_thresholds_match_hand_computed_values():
    curve = hand()
    assert curve.threshold_for(max_risk=0) == pytest.approx(0.9)
    assert curve.threshold_for(max_risk=0.4) == pytest.approx(0.8)
    assert curve.threshold_for(max_risk=1) == pytest.approx(0.6)
    assert curve.threshold_for(min_coverage=0) == pytest.approx(0.9)
    assert curve.threshold_for(min_coverage=0.5) == pytest.approx(0.8)
    assert curve.threshold_for(min_coverage=1) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({}, "give either max_risk or min_coverage .* not neither"),
        ({"max_risk": 0.1, "min_coverage": 0.5}, "not {'max_risk': 0.1, 'min_coverage': 0.5}"),
        ({"max_risk": 5}, "max_risk is 5: give a fraction"),
        ({"min_coverage": -0.1}, "min_coverage is -0.1"),
        ({"min_coverage": float("nan")}, "min_coverage is nan"),
    ],
)
def test_invalid_risks_and_coverages_are_refused(wanted, match):
    with pytest.raises(ReportError, match=match):
        hand().threshold_for(**wanted)


def test_an_unreachable_risk_is_an_error_that_names_the_lowest():
    curve = curve_of(np.log([[0.9, 0.1], [0.8, 0.2]]), [1, 0])
    with pytest.raises(
        ReportError, match="at or below 0.2: the lowest is 0.5, at a probability of 0.8\nallow a larger"
    ):
        curve.threshold_for(max_risk=0.2)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.integers(0, 10**6))
def test_invariants_of_the_risk_coverage_curve(scores, seed):
    truth = np.random.default_rng(seed).integers(0, scores.shape[1], len(scores))
    curve = curve_of(scores, truth)
    assert (np.diff(curve.threshold) < 0).all() and (np.diff(curve.coverage) > 0).all()
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx((scores.argmax(axis=1) != truth).mean())
    assert all(0 <= risk <= 1 for risk in (*curve.risk, curve.area))
    top = softmax(scores, axis=1).max(axis=1)
    for threshold, coverage in zip(curve.threshold, curve.coverage, strict=True):
        assert (top > threshold + 1e-12).mean() < coverage <= (top >= threshold - 1e-12).mean()


# ---- what a bundle keeps


def test_description_is_json_and_matches_the_functions():
    log_probabilities, truth = synthetic(3000)
    made = calibration.describe_calibration(3 * log_probabilities, truth)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made) == {"temperature", "clips", "log_loss", "expected_calibration_error", "curve"}
    assert made["temperature"] == calibration.fit_temperature(3 * log_probabilities, truth) and made["clips"] == 3000
    curve = curve_of(calibration.apply_temperature(3 * log_probabilities, made["temperature"]), truth)
    for name in ("threshold", "coverage", "risk"):
        assert made["curve"][name] == pytest.approx(getattr(curve, name)), name
    assert len(made["curve"]["risk"]) <= 200
    assert made["log_loss"]["after"] < made["log_loss"]["before"]
    assert made["expected_calibration_error"]["after"] < 0.03 < 0.1 < made["expected_calibration_error"]["before"]


def test_description_matches_the_figures_of_a_report():
    p = simulate()
    made, clip = calibration.describe_calibration(p.log_probabilities, p.truth), evaluate(p, draws=2)["clip"]
    for name in ("log_loss", "expected_calibration_error"):
        assert made[name]["before"] == pytest.approx(clip[name]["value"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_log_loss_never_rises_on_the_clips_of_the_fit(seed):
    p = simulate(speakers=8, seed=seed)
    loss = calibration.describe_calibration(p.log_probabilities, p.truth)["log_loss"]
    assert loss["after"] <= loss["before"] + 1e-9
