"""Calibration and coverage by accent and group, and warnings about answers and confidences without information."""

import numpy as np
import pytest
from helpers.predictions import LABELS, build, simulate
from sklearn.metrics import roc_auc_score

from accent_plugin.evaluation.evaluate import evaluate
from accent_plugin.evaluation.scores import expected_calibration_error

TWO = ("us", "england")
FIGURES = ("expected_calibration_error", "confidence_minus_accuracy", "coverage")


def by_hand():
    """Five speakers with a clip each, with confidence 0.9, 0.7, 0.6, 0.8, 0.75; the second and fifth are wrong."""
    return build(
        [[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8], [0.75, 0.25]],
        [0, 0, 0, 1, 1],
        list("abcde"),
        TWO,
        gender=["female", "female", "male", "male", "male"],
        seconds=[2, 2, 4, 6, 9],
    )


def values(cell):
    return {name: cell[name]["value"] for name in FIGURES}


def test_figures_by_group_match_hand_computed_values():
    metrics = evaluate(by_hand(), draws=5, threshold=0.72)
    assert values(metrics["groups"]["gender"]["female"]) == pytest.approx(
        {
            "expected_calibration_error": (0.1 + 0.7) / 2,
            "confidence_minus_accuracy": (-0.1 + 0.7) / 2,
            "coverage": 1 / 2,
        }
    )
    # 0.6 is in the bin from 9/15, 0.75 in that from 11/15, 0.8 in that from 12/15.
    assert values(metrics["groups"]["gender"]["male"]) == pytest.approx(
        {
            "expected_calibration_error": (0.4 + 0.2 + 0.75) / 3,
            "confidence_minus_accuracy": (-0.4 - 0.2 + 0.75) / 3,
            "coverage": 2 / 3,
        }
    )
    assert metrics["groups"]["duration"]["3 to 5 s"]["confidence_minus_accuracy"]["value"] == pytest.approx(-0.4)


def test_figures_by_accent_match_hand_computed_values():
    metrics = evaluate(by_hand(), draws=5, threshold=0.72)
    assert values(metrics["per_accent"]["us"]) == pytest.approx(
        {
            "expected_calibration_error": (0.1 + 0.7 + 0.4) / 3,
            "confidence_minus_accuracy": (-0.1 + 0.7 - 0.4) / 3,
            "coverage": 1 / 3,
        }
    )
    assert metrics["per_accent"]["england"]["coverage"]["value"] == 1
    assert metrics["confidence"]["coverage"]["value"] == pytest.approx(3 / 5)
    assert metrics["confidence"]["confidence_minus_accuracy"]["value"] == pytest.approx(3.75 / 5 - 3 / 5)


def test_a_threshold_that_is_not_given_answers_four_fifths_of_the_clips():
    metrics = evaluate(by_hand(), draws=5)
    assert metrics["confidence"]["threshold"] == pytest.approx(0.7)
    assert metrics["confidence"]["coverage"]["value"] == pytest.approx(4 / 5)
    assert metrics["confidence"]["threshold_given"] is False
    assert evaluate(by_hand(), draws=5, threshold=0.72)["confidence"]["threshold_given"] is True


def drawn_clips(p, draws=1000):
    """Indices of the clips of speakers drawn with replacement within their accent: another generator, a plain loop."""
    clips = {}
    for i, (client, truth) in enumerate(zip(p.client_ids, p.truth, strict=True)):
        clips.setdefault(truth, {}).setdefault(client, []).append(i)
    rng = np.random.default_rng(0)
    for _ in range(draws):
        drawn = []
        for speakers in map(list, (own.values() for own in clips.values())):
            for s in rng.integers(0, len(speakers), len(speakers)):
                drawn += speakers[s]
        yield np.array(drawn)


def test_intervals_by_group_agree_with_a_plain_loop_over_speakers():
    p = simulate(speakers=60, clips=5, seed=3)
    female = np.array([gender == "female" for gender in p.gender])
    top, right = p.probabilities.max(axis=1), p.predicted == p.truth
    found = []
    for drawn in drawn_clips(p):
        of = drawn[female[drawn]]
        error = expected_calibration_error(p.probabilities[of], p.truth[of])
        found.append((error, (top[of] - right[of]).mean(), (top[of] >= 0.7).mean()))
    cell = evaluate(p, threshold=0.7)["groups"]["gender"]["female"]
    for name, draws in zip(FIGURES, zip(*found, strict=True), strict=True):
        expected = np.percentile(draws, [2.5, 97.5])
        assert (cell[name]["low"], cell[name]["high"]) == pytest.approx(expected, abs=0.015), name
        assert cell[name]["n"] == 20


def test_a_group_of_all_clips_has_the_overall_figures():
    p = simulate(speakers=20)
    p = build(p.probabilities, p.truth, p.client_ids, gender=["female"] * len(p.ids))
    metrics = evaluate(p, draws=100)
    cell = metrics["groups"]["gender"]["female"]
    assert cell["expected_calibration_error"] == pytest.approx(metrics["clip"]["expected_calibration_error"])
    for name in ("coverage", "confidence_minus_accuracy"):
        assert cell[name] == pytest.approx(metrics["confidence"][name])


# ---- AUROC of the confidence


def test_auroc_of_the_confidence_agrees_with_scikit_learn_and_a_plain_loop_over_speakers():
    p = simulate(speakers=60, clips=5, seed=5)
    top, right = p.probabilities.max(axis=1), p.predicted == p.truth
    v = evaluate(p)["confidence"]["auroc"]
    assert v["value"] == pytest.approx(roc_auc_score(right, top))
    found = [roc_auc_score(right[drawn], top[drawn]) for drawn in drawn_clips(p)]
    assert (v["low"], v["high"]) == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.015)


def test_without_right_or_without_wrong_answers_there_is_no_auroc():
    assert evaluate(build([[0.9, 0.1]] * 2, [0, 0], labels=TWO), draws=5)["confidence"]["auroc"] is None
    assert evaluate(build([[0.9, 0.1]] * 2, [1, 1], labels=TWO), draws=5)["confidence"]["auroc"] is None


# ---- warnings


def warnings(p):
    return evaluate(p, draws=200)["warnings"]


def answering(answers, truth, confidence=None, labels=LABELS):
    """One clip per speaker; the confidence falls from 0.9, so that it suits neither right nor wrong answers."""
    confidence = np.linspace(0.9, 0.5, len(truth)) if confidence is None else np.asarray(confidence)
    table = np.repeat((1 - confidence)[:, None] / (len(labels) - 1), len(labels), axis=1)
    table[np.arange(len(truth)), answers] = confidence
    return build(table, truth, [f"s{i}" for i in range(len(truth))], labels)


def ranked(right):
    """Confidence that is higher for right answers."""
    return np.where(right, 0.9, 0.5) + np.linspace(0, 0.05, len(right))


def test_an_ordinary_model_is_not_warned_about():
    assert warnings(simulate(speakers=60)) == []


def test_a_model_that_answers_every_clip_with_one_class_is_named():
    truth = np.repeat([0, 1, 2], 10)
    said = warnings(answering([0] * 30, truth, ranked(truth == 0)))
    assert said == [
        "The model answers every clip with us: it does not tell these accents apart, and its accuracy is the fraction "
        "of us clips, 0.333."
    ]


def test_clips_of_one_accent_that_are_all_right_are_no_reason_to_warn():
    assert warnings(answering([1] * 10, [1] * 10)) == []


def test_clips_of_one_accent_that_are_all_answered_with_another_are():
    (said,) = warnings(answering([1] * 10, [0] * 10))
    assert "answers every clip with england" in said and "the fraction of england clips, 0.000" in said


def test_a_model_that_answers_nearly_every_clip_with_one_class_is_named():
    truth = np.repeat([0, 1, 2], 20)
    answers = np.zeros(60, dtype=int)
    answers[[20, 40]] = [1, 2]
    (said,) = warnings(answering(answers, truth, ranked(truth == answers)))
    assert said.startswith("The model answers 96.7% of clips with us, the true accent of 33.3%")


def test_a_class_that_is_never_the_answer_is_named_with_its_clips():
    truth = np.repeat([0, 1, 2], 10)
    answers = np.where(truth == 2, 0, truth)
    (said,) = warnings(answering(answers, truth, ranked(truth == answers)))
    assert said == "The model never answers with these accents, and is wrong on all of their clips: australia (10)."


def test_a_class_without_clips_need_not_be_the_answer():
    truth = np.repeat([0, 1], 10)
    answers = truth.copy()
    answers[0] = 1
    assert warnings(answering(answers, truth, ranked(truth == answers))) == []


def test_confidence_that_is_the_same_for_right_and_wrong_answers_is_named():
    rng = np.random.default_rng(0)
    truth, answers = np.arange(300) % 3, rng.integers(0, 3, 300)
    answers[::2] = truth[::2]
    (said,) = warnings(answering(answers, truth, rng.uniform(0.4, 0.99, 300)))
    assert said.startswith("Confidence is the same for right and wrong answers on these clips: AUROC 0.")


def test_confidence_that_is_higher_for_wrong_answers_is_named():
    truth = np.arange(60) % 3
    answers = np.where(np.arange(60) < 30, truth, (truth + 1) % 3)
    (said,) = warnings(answering(answers, truth, ranked(truth != answers)))
    assert said.startswith("Confidence is higher for wrong answers than for right ones: AUROC 0.")


def test_cosine_similarities_that_are_read_as_logits_are_named():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    # Cosines of the class vectors with clips, 80 % of them right; the highest is clearer where it is right.
    answers = np.where(np.arange(300) % 5 > 0, truth, (truth + 1) % 3)
    cosines = rng.normal(0, 0.01, (300, 3))
    cosines[np.arange(300), answers] = np.where(answers == truth, 0.25, 0.2) + rng.normal(0, 0.02, 300)
    table = np.exp(cosines) / np.exp(cosines).sum(axis=1, keepdims=True)
    (said,) = warnings(build(table, truth, [f"s{i}" for i in range(300)]))
    assert "nearly the same for all clips, as happens if cosine similarities are read as logits" in said
    assert "from 0.37" in said and "80.0% of the answers are right" in said


def test_high_confidence_in_right_answers_is_no_reason_to_warn():
    truth = np.arange(60) % 3
    answers = truth.copy()
    answers[0] = 1
    assert warnings(answering(answers, truth, np.where(truth == answers, 0.99, 0.97))) == []
