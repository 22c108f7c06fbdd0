"""Separability of embeddings, compared with hand-computed values and a count over all pairs of pairs."""

import itertools

import numpy as np
import pytest

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.scores import auroc
from accent_plugin.evaluation.separability import pairwise_auc, similarities


def upper(size, pairs):
    """(size, size) of bool that is True for these pairs of clips."""
    chosen = np.zeros((size, size), dtype=bool)
    chosen[tuple(np.transpose(pairs))] = True
    return chosen


def by_speaker(speakers):
    """Pairs of one speaker, and of two."""
    same = np.asarray(speakers)[:, None] == np.asarray(speakers)
    return same, ~same


def test_similarities_are_cosines_after_subtracting_the_mean():
    corners = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = np.array([[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]])
    assert np.allclose(similarities(corners), expected)
    assert np.allclose(similarities(100 + 7 * corners), expected)


def test_a_clip_at_the_mean_has_similarity_zero():
    assert np.array_equal(similarities([[1.0], [2.0], [3.0]])[1], [0, 0, 0])


@pytest.mark.parametrize("vectors", [[1.0, 2.0], [[1.0], [np.nan]]])
def test_invalid_vectors_are_refused(vectors):
    with pytest.raises(ReportError, match="vectors have shape"):
        similarities(vectors)


def test_pairwise_auc_matches_hand_computed_values():
    speakers = ["ann", "ann", "bob", "bob"]
    similarity = np.zeros((4, 4))
    for pair, value in {(0, 1): 0.9, (2, 3): 0.3, (0, 2): 0.1, (0, 3): 0.2, (1, 2): 0.3, (1, 3): 0.8}.items():
        similarity[pair] = value
    # 0.9 exceeds all four; 0.3 exceeds two and equals a third.
    found = pairwise_auc(similarity, *by_speaker(speakers), speakers)
    assert found["value"] == (4 + 2.5) / 8 and found["n"] == 2
    # A draw of the same speaker twice has no pair of two speakers, so that only the sample itself counts.
    assert found["low"] == found["high"] == found["value"]
    assert pairwise_auc(similarity, *by_speaker(speakers), speakers, draws=0)["low"] is None


def test_other_pairs_and_the_lower_triangle_are_ignored():
    similarity = np.full((3, 3), np.nan)
    similarity[0, 1], similarity[0, 2], similarity[1, 2] = 0.5, 0.4, 99.0
    near, far = upper(3, [(0, 1), (2, 1)]), upper(3, [(0, 2), (1, 0)])
    assert pairwise_auc(similarity, near, far, list("abc"), draws=0)["value"] == 1.0


def random_clips(speakers, clips, seed):
    """Similarities of clips, with ties, and their speakers."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(speakers), clips)
    return np.round(rng.normal(size=(who.size, who.size)), 1), who


def test_pairwise_auc_is_the_area_under_the_roc_curve():
    similarity, who = random_clips(speakers=5, clips=4, seed=0)
    near, far = by_speaker(who)
    i, j = np.triu_indices(who.size, 1)
    scores = similarity[i, j]
    expected = auroc(scores[near[i, j]], scores[far[i, j]])
    assert pairwise_auc(similarity, near, far, who, draws=0)["value"] == pytest.approx(expected)


def spelled_out(similarity, who, times):
    """The figure of one draw with explicit copies of each speaker; copies of one speaker are never two speakers."""
    near, far = [], []
    i, j = np.triu_indices(who.size, 1)
    for one, other in zip(i, j, strict=True):
        same = who[one] == who[other]
        copies = times[who[one]] if same else times[who[one]] * times[who[other]]
        (near if same else far).extend([similarity[one, other]] * copies)
    return auroc(near, far) if near and far else None


def test_bounds_match_explicitly_repeated_speakers():
    similarity, who = random_clips(speakers=3, clips=3, seed=1)
    possible = [
        spelled_out(similarity, who, times) for times in itertools.product(range(4), repeat=3) if sum(times) == 3
    ]
    possible = [figure for figure in possible if figure is not None]
    # With 2001 draws the percentiles need no interpolation.
    found = pairwise_auc(similarity, *by_speaker(who), who, draws=2001)
    assert found["low"] == pytest.approx(min(possible)) and found["high"] == pytest.approx(max(possible))


def test_more_speakers_give_a_narrower_interval():
    def interval(speakers):
        rng = np.random.default_rng(2)
        who = np.repeat(np.arange(speakers), 4)
        vectors = rng.normal(size=(speakers, 8))[who] + 1.5 * rng.normal(size=(who.size, 8))
        return pairwise_auc(similarities(vectors), *by_speaker(who), who, draws=300)

    few, many = interval(6), interval(60)
    for found in (few, many):
        assert found["low"] < found["value"] < found["high"]
    assert 2 * (many["high"] - many["low"]) < few["high"] - few["low"]


def test_the_same_arguments_give_the_same_figures():
    similarity, who = random_clips(speakers=6, clips=3, seed=3)
    one, same, other = (pairwise_auc(similarity, *by_speaker(who), who, seed=seed) for seed in (0, 0, 1))
    assert one == same and one["value"] == other["value"] and one["low"] != other["low"]


@pytest.mark.parametrize(
    ("near", "far", "message"),
    [
        ([(0, 1)], [(2, 0)], "1 near and 0 far pairs"),
        ([(2, 0)], [(0, 1)], "0 near and 1 far pairs"),
        ([(0, 1), (0, 2)], [(0, 1)], "2 near and 1 far pairs, of which 1 are both"),
    ],
)
def test_missing_kinds_and_overlapping_kinds_of_pairs_are_refused(near, far, message):
    with pytest.raises(ReportError, match=message):
        pairwise_auc(np.zeros((3, 3)), upper(3, near), upper(3, far), list("abc"))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ReportError, match=r"far has shape \(2, 2\); 3 speakers need \(3, 3\)"):
        pairwise_auc(np.zeros((3, 3)), upper(3, [(0, 1)]), upper(2, [(0, 1)]), list("abc"))
