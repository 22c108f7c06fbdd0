"""The metrics of a report, compared with hand-computed values, scikit-learn and confidence-intervals."""

import json

import numpy as np
import pytest
import scipy.special
from helpers.predictions import LABELS, build, permuted, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from accent_plugin.errors import ReportError
from accent_plugin.evaluation import bootstrap
from accent_plugin.evaluation.bootstrap import ResamplingUnits
from accent_plugin.evaluation.compare import FIGURES, compare_models, out_of_set_scores, summarise_runs
from accent_plugin.evaluation.evaluate import evaluate, speaker_rows
from accent_plugin.evaluation.predictions import ScoredClips, pool_clips
from accent_plugin.evaluation.scores import (
    auroc,
    calibration_bins,
    confusion_matrix,
    f1s,
    log_softmax,
    macro_f1,
    precisions,
    recalls,
    unweighted_average_recall,
)
from accent_plugin.evaluation.selective import SURE, risk_coverage


def values(part):
    return {name: v["value"] for name, v in part.items()}


# ---- figures of a confusion matrix


def test_average_recall_and_macro_f1_match_hand_computed_values():
    confusion = np.array([[8, 2, 0], [1, 3, 0], [2, 0, 0]])
    assert recalls(confusion) == pytest.approx([0.8, 0.75, 0])
    assert precisions(confusion) == pytest.approx([8 / 11, 3 / 5, 0])  # australia is never the answer
    assert unweighted_average_recall(confusion) == pytest.approx((0.8 + 0.75) / 3)
    assert f1s(confusion) == pytest.approx([16 / 21, 6 / 9, 0])
    assert macro_f1(confusion) == pytest.approx((16 / 21 + 6 / 9) / 3)


def test_an_absent_accent_is_left_out_of_averages_but_answering_it_is_wrong():
    confusion = np.array([[3, 0, 1], [0, 4, 0], [0, 0, 0]])
    assert unweighted_average_recall(confusion) == pytest.approx((0.75 + 1) / 2)
    assert macro_f1(confusion) == pytest.approx((6 / 7 + 1) / 2)


def test_metrics_are_vectorised_over_matrices():
    stack = np.random.default_rng(0).integers(0, 9, (5, 3, 3))
    assert macro_f1(stack) == pytest.approx([macro_f1(c) for c in stack])
    assert unweighted_average_recall(stack) == pytest.approx([unweighted_average_recall(c) for c in stack])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_figures_agree_with_scikit_learn(pairs):
    truth, predicted = np.array(pairs).T
    confusion = confusion_matrix(truth, predicted, 4)
    assert (confusion == sk.confusion_matrix(truth, predicted, labels=range(4))).all()
    present = sorted(set(truth.tolist()))
    precision, recall, f1, _ = sk.precision_recall_fscore_support(truth, predicted, labels=range(4), zero_division=0)
    assert precisions(confusion) == pytest.approx(precision)
    assert recalls(confusion) == pytest.approx(recall)
    assert f1s(confusion) == pytest.approx(f1)
    assert unweighted_average_recall(confusion) == pytest.approx(recall[present].mean())
    assert macro_f1(confusion) == pytest.approx(f1[present].mean())


# ---- evaluate


def by_hand():
    """Two speakers of us, one of england; a's second clip outweighs the first."""
    return build(
        [[0.4, 0.6], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]],
        [0, 0, 0, 1],
        ["a", "a", "b", "c"],
        labels=("us", "england"),
    )


def test_figures_by_clip_match_hand_computed_values():
    clip = values(evaluate(by_hand(), draws=20)["clip"])
    assert clip["accuracy"] == pytest.approx(2 / 4)
    assert clip["unweighted_average_recall"] == pytest.approx((2 / 3 + 0) / 2)
    assert clip["macro_f1"] == pytest.approx((4 / 6 + 0) / 2)
    assert clip["log_loss"] == pytest.approx(-np.log([0.4, 0.9, 0.8, 0.3]).mean())


def test_figures_by_speaker_match_hand_computed_values():
    metrics = evaluate(by_hand(), draws=20)
    us, england = np.sqrt(0.4 * 0.9), np.sqrt(0.6 * 0.1)  # geometric means of a's clips
    assert metrics["confusion"] == {
        "labels": ["us", "england"],
        "clips": [[2, 1], [1, 0]],
        "speakers": [[2, 0], [1, 0]],
    }
    speaker = values(metrics["speaker"])
    assert speaker["accuracy"] == pytest.approx(2 / 3)
    assert speaker["unweighted_average_recall"] == pytest.approx(1 / 2)
    assert speaker["log_loss"] == pytest.approx(-np.log([us / (us + england), 0.8, 0.3]).mean())
    rows = speaker_rows(by_hand())
    assert [(r["client_id"], r["answer"], r["right"], r["clips_right"], r["answers"]) for r in rows] == [
        ("a", "us", True, 1, [1, 1]),
        ("b", "us", True, 1, [1, 0]),
        ("c", "us", False, 0, [1, 0]),
    ]
    assert rows[0]["probability"] == pytest.approx(us / (us + england))


def test_expected_calibration_error_matches_hand_computed_value():
    # Bin 9 is [0.6, 0.667): mean probability 0.62, half of the answers correct. Probability 1 is in the last bin.
    p = build([[0.61, 0.39], [0.37, 0.63], [1, 0]], [0, 0, 0], labels=("us", "england"))
    assert evaluate(p, draws=5)["clip"]["expected_calibration_error"]["value"] == pytest.approx(2 / 3 * 0.12)
    count, confidence, accuracy = calibration_bins(p.probabilities, p.truth)
    assert count.tolist() == [0] * 9 + [2, 0, 0, 0, 0, 1]
    assert (confidence[9], accuracy[9]) == (pytest.approx(0.62), 0.5)


def test_calibration_error_matches_the_reliability_diagram():
    p = simulate()
    count, confidence, accuracy = calibration_bins(p.probabilities, p.truth)
    expected = (count * np.abs(confidence - accuracy)).sum() / count.sum()
    assert evaluate(p, draws=5)["clip"]["expected_calibration_error"]["value"] == pytest.approx(expected)


def test_risk_and_coverage_match_hand_computed_values():
    # The two clips with 0.8 are answered at the same threshold, with a risk of 1 / 3; the last clip has 2 / 4.
    p = build([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.4, 0.6]], [0, 0, 0, 0], list("abcd"), labels=("us", "england"))
    part = evaluate(p, draws=20)["risk_coverage"]
    assert part["threshold"] == pytest.approx([0.9, 0.8, 0.6])
    assert part["coverage"] == [0.25, 0.75, 1] and part["risk"] == pytest.approx([0, 1 / 3, 1 / 2])
    assert part["area"]["value"] == pytest.approx((0 + 2 / 3 + 1 / 2) / 4) and part["area"]["n"] == 4
    assert list(part["surest"]) == [str(share) for share in SURE]
    sure = part["surest"]["0.5"]
    assert (sure["threshold"], sure["coverage"]) == (pytest.approx(0.8), 0.75)
    assert sure["accuracy"]["value"] == pytest.approx(2 / 3)
    assert part["surest"]["0.9"]["accuracy"]["value"] == pytest.approx(1 / 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=80))
def test_area_agrees_with_a_plain_loop_over_clips(clips):
    top, right = np.array([t / 30 for t, _ in clips]), np.array([r for _, r in clips])
    curve = risk_coverage(top, right)
    assert curve.area == pytest.approx(np.mean([1 - right[top >= t].mean() for t in top]))
    assert curve.risk[-1] == pytest.approx(1 - right.mean()) and curve.coverage[-1] == 1
    assert sorted(curve.coverage) == list(curve.coverage) and sorted(curve.threshold)[::-1] == list(curve.threshold)


def test_a_long_curve_is_thinned_without_losing_its_ends():
    rng = np.random.default_rng(0)
    top, right = rng.uniform(size=20_000), rng.uniform(size=20_000) < 0.8
    curve = risk_coverage(top, right)
    assert 190 <= len(curve.coverage) <= 200
    assert (curve.threshold[0], curve.threshold[-1]) == (top.max(), top.min())
    assert (curve.coverage[0], curve.coverage[-1]) == (1 / 20_000, 1)
    assert np.diff(curve.coverage).max() < 0.006


def test_interval_of_the_area_agrees_with_a_plain_loop_over_speakers():
    p = simulate(speakers=30, clips=8, seed=3)
    top, right = p.probabilities.max(axis=1), p.predicted == p.truth
    rng, areas = np.random.default_rng(0), []
    of_accent = [np.arange(30)[np.arange(30) % 3 == a] for a in range(3)]
    for _ in range(500):
        drawn = np.concatenate([rng.choice(speakers, len(speakers)) for speakers in of_accent])
        clips = (drawn[:, None] * 8 + np.arange(8)).ravel()
        areas.append(risk_coverage(top[clips], right[clips]).area)
    v = evaluate(p)["risk_coverage"]["area"]
    assert (v["low"], v["high"]) == pytest.approx(np.percentile(areas, [2.5, 97.5]), abs=0.02)
    assert v["low"] < v["value"] < v["high"]


@pytest.mark.parametrize("clips", [1, 9, 10, 11, 95])
def test_the_surest_clips_match_the_curve(clips):
    p = simulate(speakers=clips, clips=1)
    metrics = evaluate(p, draws=5)
    top, right = p.probabilities.max(axis=1), p.predicted == p.truth
    for share, sure in metrics["risk_coverage"]["surest"].items():
        mine = top >= sure["threshold"]
        assert sure["coverage"] == pytest.approx(mine.mean()) and float(share) <= sure["coverage"]
        assert sure["coverage"] < float(share) + 1 / clips
        assert sure["accuracy"]["value"] == pytest.approx(right[mine].mean())


def test_an_impossible_answer_has_a_finite_log_loss():
    p = build([[0.0, 1.0], [1.0, 0.0]], [0, 0], ["a", "b"], labels=("us", "england"))
    metrics = evaluate(p, draws=5)
    assert metrics["clip"]["log_loss"]["value"] == 350
    assert np.isfinite(metrics["speaker"]["log_loss"]["value"])


def test_a_report_has_the_documented_structure():
    metrics = evaluate(simulate(), draws=20)
    assert list(metrics) == ["clip", "speaker", "per_accent", "confusion", "risk_coverage", "confidence", "groups",
                             "text", "absent_accents", "notes", "warnings"]  # fmt: skip
    assert list(metrics["clip"]) == list(metrics["speaker"]) == list(FIGURES)
    assert set(metrics["clip"]["accuracy"]) == {"value", "low", "high", "n"}
    assert list(metrics["per_accent"]) == list(LABELS)
    calibration = {"expected_calibration_error", "confidence_minus_accuracy", "coverage"}
    assert set(metrics["per_accent"]["us"]) == {"precision", "recall", "f1", "clips", "speakers"} | calibration
    assert set(metrics["groups"]) == {"gender", "age", "duration"}
    wanted = {"unweighted_average_recall", "clips", "speakers", "small"} | calibration
    assert set(metrics["groups"]["gender"]["male"]) == wanted
    json.dumps(metrics, allow_nan=False)


def test_n_counts_the_units_drawn():
    metrics = evaluate(simulate(speakers=31), draws=20)
    assert metrics["clip"]["accuracy"]["n"] == metrics["per_accent"]["us"]["f1"]["n"] == 31
    assert metrics["per_accent"]["us"]["recall"]["n"] == metrics["per_accent"]["us"]["speakers"] == 11


def test_an_absent_accent_is_named_and_excluded_from_averages():
    p = build([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], [0, 1], ["a", "b"])
    metrics = evaluate(p, draws=20)
    assert metrics["absent_accents"] == ["australia"]
    assert list(metrics["per_accent"]) == ["us", "england"]
    assert metrics["clip"]["macro_f1"]["value"] == 1
    assert any("australia" in note for note in metrics["notes"])


def test_without_client_ids_a_note_replaces_figures_by_speaker():
    p = simulate()
    metrics = evaluate(build(p.probabilities, p.truth), draws=20)
    assert metrics["speaker"] is None and metrics["confusion"]["speakers"] is None
    assert metrics["clip"]["accuracy"]["n"] == len(p.ids)
    assert metrics["per_accent"]["us"]["speakers"] is None
    assert "resample clips" in metrics["notes"][0]
    assert speaker_rows(build(p.probabilities, p.truth)) == []
    assert build(p.probabilities, p.truth, [""] * len(p.ids)).client_ids is None


def test_a_clip_without_client_id_is_a_speaker_of_its_own():
    p = build([[0.9, 0.1]] * 4, [0] * 4, ["a", "a", "", None], labels=("us", "england"))
    metrics = evaluate(p, draws=5)
    assert metrics["speaker"]["accuracy"]["n"] == 3
    assert any("2 clips have no speaker ID" in note for note in metrics["notes"])


def test_a_client_with_two_accents_is_a_speaker_in_each():
    p = build([[0.9, 0.1], [0.2, 0.8]], [0, 1], ["a", "a"], labels=("us", "england"))
    metrics = evaluate(p, draws=5)
    assert metrics["confusion"]["speakers"] == [[1, 0], [0, 1]]
    assert any("clips of several accents" in note for note in metrics["notes"])


def test_without_errors_a_note_gives_an_exact_bound():
    p = build(
        [[0.9, 0.1]] * 22 + [[0.1, 0.9]], [0] * 22 + [1], list("abcdefghijklmnopqrstuvw"), labels=("us", "england")
    )
    notes = " ".join(evaluate(p, draws=5)["notes"])
    assert "No error by clip" in notes and "up to 12%" in notes  # 1 - 0.05 ** (1 / 23)
    assert "england (1)" in notes


def test_groups_have_clip_counts_and_recalls():
    p = simulate()
    groups = evaluate(p, draws=50)["groups"]
    for kind, cells in groups.items():
        assert sum(cell["clips"] for cell in cells.values()) == len(p.ids), kind
    mine = [i for i, gender in enumerate(p.gender) if gender == "female"]
    confusion = confusion_matrix(p.truth[mine], p.predicted[mine], 3)
    cell = groups["gender"]["female"]
    assert cell["unweighted_average_recall"]["value"] == pytest.approx(unweighted_average_recall(confusion))
    assert cell["speakers"] == cell["unweighted_average_recall"]["n"] == 10 and not cell["small"]
    assert list(groups["gender"]) == ["female", "male", "unknown"]
    assert list(groups["duration"]) == ["under 3 s", "3 to 5 s", "5 to 8 s", "8 s and over"]


@pytest.mark.parametrize(
    ("age", "band"),
    [("22", "twenties"), ("18", "teens"), ("101", "nineties"), ("fourties", "forties"), ("fifties", "fifties"),
     ("", "unknown"), ("0", "unknown"), (None, "unknown"), (float("nan"), "unknown"), ("37.0", "thirties")],
)  # fmt: skip
def test_ages_are_banded(age, band):
    p = build([[0.9, 0.1]] * 2, [0, 0], labels=("us", "england"), age=["60", age])
    assert set(evaluate(p, draws=2)["groups"]["age"]) == {"sixties", band}


def test_groups_under_five_speakers_are_small_and_the_number_of_groups_is_limited():
    n = 40
    p = build([[0.9, 0.1]] * n, [0] * n, [str(i) for i in range(n)], labels=("us", "england"),
              gender=[f"text {i}" for i in range(n)])  # fmt: skip
    cells = evaluate(p, draws=2)["groups"]["gender"]
    assert len(cells) == 13 and cells["28 others"]["clips"] == 28
    assert cells["text 0"]["small"] and not cells["28 others"]["small"]
    assert evaluate(p, draws=2)["groups"]["age"] == {}


# ---- laws


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_permuting_clips_changes_nothing(seed, clients):
    p = simulate(speakers=9)
    if not clients:
        p = ScoredClips(p.ids, None, p.truth, p.log_probabilities, p.labels, p.seconds, p.gender, p.age)
    order = np.random.default_rng(seed).permutation(len(p.ids))
    assert json.dumps(evaluate(permuted(p, order), draws=20)) == json.dumps(evaluate(p, draws=20))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(3)))
def test_another_order_of_labels_gives_the_same_figures(order):
    p = simulate(speakers=10)
    inverse = np.argsort(order)
    q = ScoredClips(p.ids, p.client_ids, inverse[p.truth], p.log_probabilities[:, order],
                      [p.labels[i] for i in order], p.seconds, p.gender, p.age)  # fmt: skip
    a, b = evaluate(p, draws=30), evaluate(q, draws=30)
    for part in ("clip", "speaker"):
        for name in FIGURES:
            assert b[part][name] == pytest.approx(a[part][name])
    for label in LABELS:
        assert b["per_accent"][label]["f1"] == pytest.approx(a["per_accent"][label]["f1"])
    assert (np.array(b["confusion"]["clips"]) == np.array(a["confusion"]["clips"])[np.ix_(order, order)]).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 4))
def test_intervals_are_ordered_and_within_bounds(seed, speakers, clips):
    metrics = evaluate(simulate(speakers, clips, seed), draws=60)
    for part in ("clip", "speaker"):
        for name, v in metrics[part].items():
            assert 0 <= v["low"] <= v["high"], name
            assert name == "log_loss" or v["high"] <= 1
            if name in ("accuracy", "unweighted_average_recall", "log_loss"):
                assert v["low"] - 1e-9 <= v["value"] <= v["high"] + 0.25, name


def test_with_one_clip_per_speaker_speakers_and_clips_are_the_same():
    p = simulate(speakers=60, clips=1)
    named = ScoredClips(p.ids, p.ids, p.truth, p.log_probabilities, p.labels, p.seconds)
    unnamed = ScoredClips(p.ids, None, p.truth, p.log_probabilities, p.labels, p.seconds)
    metrics = evaluate(named, draws=200)
    for name in FIGURES:
        assert metrics["speaker"][name] == pytest.approx(metrics["clip"][name]), name
    assert evaluate(unnamed, draws=200)["clip"] == metrics["clip"]


def test_clips_of_a_speaker_are_resampled_together():
    p = simulate(speakers=30, clips=20, spread=2)
    alone = ScoredClips(p.ids, None, p.truth, p.log_probabilities, p.labels, p.seconds)
    wide, narrow = (evaluate(q, draws=300)["clip"]["accuracy"] for q in (p, alone))
    assert wide["high"] - wide["low"] > 1.8 * (narrow["high"] - narrow["low"])


def test_draws_depend_on_the_seed():
    p = simulate()
    assert evaluate(p, draws=100, seed=1) == evaluate(p, draws=100, seed=1)
    assert evaluate(p, draws=100, seed=1)["clip"] != evaluate(p, draws=100, seed=2)["clip"]


@pytest.mark.parametrize("block", [1, 700, 10**9])
def test_every_draw_has_as_many_units_as_the_sample(monkeypatch, block):
    monkeypatch.setattr(bootstrap, "_BLOCK", block)
    units = ResamplingUnits(simulate(speakers=31, clips=2))
    totals = units.resample(lambda a, b: np.stack([np.ones(b - a), np.arange(a, b)], axis=1).astype(float), 400, 0)
    assert (totals[:, :, 0] == [11, 10, 10]).all()
    assert totals[0, :, 1].tolist() == [55, 155, 255]
    # Mean and spread of the resampled mean of 0..10: 5 and sqrt(10 / 11).
    assert (totals[1:, 0, 1] / 11).mean() == pytest.approx(5, abs=0.2)
    assert (totals[1:, 0, 1] / 11).std() == pytest.approx(np.sqrt(10 / 11), rel=0.15)


def recall_of(truth, predicted):
    return unweighted_average_recall(confusion_matrix(truth, predicted, 3))


def test_interval_agrees_with_a_plain_loop_over_speakers():
    p = simulate(speakers=30, clips=5, seed=3)
    clips = {}
    for i, (client, truth) in enumerate(zip(p.client_ids, p.truth, strict=True)):
        clips.setdefault(truth, {}).setdefault(client, []).append(i)
    rng, figures = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = []
        for speakers in clips.values():
            for s in rng.integers(0, len(speakers), len(speakers)):
                drawn += list(speakers.values())[s]
        figures.append(recall_of(p.truth[drawn], p.predicted[drawn]))
    v = evaluate(p)["clip"]["unweighted_average_recall"]
    assert (v["low"], v["high"]) == pytest.approx(np.percentile(figures, [2.5, 97.5]), abs=0.02)


def test_interval_agrees_with_confidence_intervals():
    package = pytest.importorskip("confidence_intervals")
    p = simulate(speakers=45, clips=20, seed=3, spread=1.5)
    speakers = np.array([int(c[1:]) for c in p.client_ids])
    value, (low, high) = package.evaluate_with_conf_int(
        p.predicted, recall_of, p.truth, speakers, num_bootstraps=200, alpha=5
    )
    v = evaluate(p)["clip"]["unweighted_average_recall"]
    assert v["value"] == pytest.approx(value)
    # confidence-intervals also resamples clips within a speaker and does not stratify: slightly wider intervals.
    assert (v["low"], v["high"]) == pytest.approx((low, high), abs=0.035)
    assert 0.75 < (v["high"] - v["low"]) / (high - low) < 1.1


def test_intervals_cover_the_truth_at_the_nominal_rate():
    truth = evaluate(simulate(speakers=6000, clips=4, seed=999), draws=2)["clip"]["accuracy"]["value"]
    inside = 0
    for seed in range(100):
        v = evaluate(simulate(speakers=60, clips=4, seed=seed), draws=200)["clip"]["accuracy"]
        inside += v["low"] <= truth <= v["high"]
    assert 88 <= inside <= 99


# ---- wrong input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"probabilities": np.zeros((0, 3)), "truth": []}, "no predictions"),
        ({"probabilities": [[0.5, 0.4, 0.05]] * 2}, "do not sum to 1.*'clip0000'"),
        ({"probabilities": [[np.nan, 0.5, 0.5]] * 2}, "2 of 2 clips .* do not sum to 1"),
        ({"probabilities": [[0.5, 0.5]] * 2}, r"shape \(2, 2\)"),
        ({"truth": [0, 3]}, "'clip0001' has true accent 3; indices range from 0 to 2"),
        ({"truth": [0, -1]}, "true accent -1"),
        ({"truth": [0.0, 1.0]}, "integers"),
        ({"clients": ["a"]}, "2 ids, but 1 client_ids"),
        ({"seconds": [1.0]}, "2 ids, but 1 seconds"),
        ({"seconds": [1.0, np.nan]}, "'clip0001' is nan seconds"),
        ({"ids": ["x", "x"]}, "'x' occurs twice"),
        ({"labels": ("us", "us", "england")}, "different accents"),
        ({"gender": ["male"] * 3}, "3 gender"),
    ],
)
def test_predictions_that_cannot_be_evaluated_are_refused(change, match):
    good = {"probabilities": [[0.5, 0.3, 0.2]] * 2, "truth": [0, 1]}
    with pytest.raises(ReportError, match=match):
        build(**{**good, **change})


# ---- comparing, summarising, pooling, rejecting


def test_a_model_compared_with_itself_has_no_differences():
    comparison = compare_models(simulate(), simulate(), draws=50)
    assert comparison["changed"] == []
    for level in ("clip", "speaker"):
        for figure in comparison[level].values():
            assert figure["difference"] == {"value": 0, "low": 0, "high": 0, "n": 30}


def test_a_better_model_is_detected_in_any_order_of_clips_and_labels():
    a, b = simulate(skill=1.0), simulate(skill=2.0)
    order = np.random.default_rng(0).permutation(len(b.ids))
    comparison = compare_models(a, b, draws=200)
    accuracy = comparison["clip"]["accuracy"]
    assert accuracy["b"] - accuracy["a"] == pytest.approx(accuracy["difference"]["value"])
    assert accuracy["difference"]["low"] > 0 > comparison["clip"]["log_loss"]["difference"]["high"]
    assert compare_models(a, permuted(b, order), draws=200) == comparison
    back = compare_models(b, a, draws=200)["clip"]["accuracy"]["difference"]
    assert (back["low"], back["high"]) == pytest.approx(
        (-accuracy["difference"]["high"], -accuracy["difference"]["low"])
    )
    q = ScoredClips(b.ids, b.client_ids, 2 - b.truth, b.log_probabilities[:, ::-1], LABELS[::-1], b.seconds)
    assert compare_models(a, q, draws=200) == comparison


def test_pairing_makes_the_interval_narrower_than_two_intervals():
    a, b = simulate(skill=1.0), simulate(skill=1.2)
    paired = compare_models(a, b)["clip"]["accuracy"]["difference"]
    alone = [evaluate(p)["clip"]["accuracy"] for p in (a, b)]
    assert paired["high"] - paired["low"] < 0.5 * sum(v["high"] - v["low"] for v in alone)


def test_speakers_whose_answer_changed_are_listed():
    a = build([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [0, 0, 1], ["x", "y", "z"], labels=("us", "england"))
    b = build([[0.8, 0.2], [0.7, 0.3], [0.2, 0.8]], [0, 0, 1], ["x", "y", "z"], labels=("us", "england"))
    (changed,) = compare_models(a, b, draws=10)["changed"]
    assert (changed["client_id"], changed["accent"], changed["clips"]) == ("y", "us", 1)
    assert changed["a"] == {"answer": "england", "probability": pytest.approx(0.6), "share_right": 0}
    assert changed["b"] == {"answer": "us", "probability": pytest.approx(0.7), "share_right": 1}


def test_models_are_compared_by_clip_alone_without_client_ids():
    a, b = (build(p, [0, 1], labels=("us", "england")) for p in ([[0.9, 0.1], [0.8, 0.2]], [[0.9, 0.1], [0.4, 0.6]]))
    comparison = compare_models(a, b, draws=10)
    assert comparison["clip"]["accuracy"]["difference"]["value"] == 0.5
    assert (comparison["speaker"], comparison["speakers"], comparison["changed"]) == (None, None, [])
    assert comparison["notes"] == ["Speakers unknown: intervals resample clips and are too narrow."]


def test_predictions_for_other_data_cannot_be_compared():
    a = by_hand()
    with pytest.raises(ReportError, match="1 of 4 are missing from the second set .*'clip0003'"):
        compare_models(a, permuted(a, [0, 1, 2]))
    with pytest.raises(ReportError, match="different labels"):
        compare_models(a, simulate())
    other = ScoredClips(a.ids, a.client_ids, [0, 0, 1, 1], a.log_probabilities, a.labels, a.seconds)
    with pytest.raises(ReportError, match="'clip0002' has two true accents, us and england"):
        compare_models(a, other)
    with pytest.raises(ReportError, match="the speakers of the two sets"):
        compare_models(a, ScoredClips(a.ids, None, a.truth, a.log_probabilities, a.labels, a.seconds))


def test_summary_matches_hand_computed_values():
    runs = [{"clip": {n: {"value": v} for n in FIGURES}, "speaker": None} for v in (0.8, 0.9, 1.0)]
    summary = summarise_runs(runs, ["1", "2", "3"])
    assert summary["clip"]["accuracy"] == {
        "mean": pytest.approx(0.9),
        "standard_deviation": pytest.approx(0.1),
        "values": [0.8, 0.9, 1.0],
    }
    assert summary["speaker"] is None and summary["runs"] == ["1", "2", "3"]
    assert summarise_runs(runs[:1])["clip"]["accuracy"]["standard_deviation"] is None
    with pytest.raises(ReportError, match="no runs"):
        summarise_runs([])
    with pytest.raises(ReportError, match="3 runs, but 1 names"):
        summarise_runs(runs, ["1"])


def test_pooled_folds_equal_one_evaluation():
    p = simulate()
    parts = [permuted(p, np.flatnonzero(np.arange(len(p.ids)) // 4 % 5 == k)) for k in range(5)]
    assert evaluate(pool_clips(parts), draws=30) == evaluate(p, draws=30)
    with pytest.raises(ReportError, match="twice"):
        pool_clips([p, p])
    with pytest.raises(ReportError, match="different labels"):
        pool_clips([p, by_hand()])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_auroc_agrees_with_scikit_learn(inside, outside):
    expected = sk.roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)
    assert auroc(inside, outside) == pytest.approx(expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_log_softmax_is_scipys(axis):
    scores = np.random.default_rng(0).standard_normal((5, 3)) * 300
    assert log_softmax(scores, axis) == pytest.approx(scipy.special.log_softmax(scores, axis), rel=1e-12)


def test_out_of_set_scores_match_hand_computed_values():
    inside = build([[0.95, 0.05], [0.1, 0.9], [0.6, 0.4]], [0, 1, 0], labels=("us", "england"))
    out = np.log([[0.6, 0.4], [0.15, 0.85], [0.45, 0.55]])
    result = out_of_set_scores(inside, out, ["scotland", "scotland", "spanish"])
    assert result["in_set"]["confident"] == {"0.5": 1, "0.8": pytest.approx(2 / 3), "0.9": pytest.approx(2 / 3)}
    assert result["overall"]["auroc"] == pytest.approx((3 + 3 + 1.5) / 9)
    scotland = result["accents"]["scotland"]
    assert (scotland["clips"], scotland["confident"]["0.8"], scotland["answers"]) == (
        2,
        0.5,
        {"us": 0.5, "england": 0.5},
    )
    assert result["accents"]["spanish"]["auroc"] == 1
    with pytest.raises(ReportError, match="shape"):
        out_of_set_scores(inside, out, ["scotland"])
    with pytest.raises(ReportError, match="empty"):
        auroc([], [0.5])
