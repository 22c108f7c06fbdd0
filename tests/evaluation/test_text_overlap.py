"""Figures by how much of a clip's text was in training."""

import numpy as np
import pytest
from helpers.predictions import build

from accent_plugin.evaluation.evaluate import evaluate
from accent_plugin.evaluation.text_overlap import text_overlap, word_counts

TRUTH = [0, 0, 1, 1, 0, 1]
# Right, right, right, wrong, wrong, right.
PROBABILITIES = np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.2, 0.8], [0.2, 0.8]])


def overlapping(words, sentences):
    return build(PROBABILITIES, TRUTH, list("abcdef"), ("us", "england"), words_seen=words, sentence_seen=sentences)


def test_recall_by_words_and_sentences_by_hand():
    words = ["5/5", "9/10", "10/10", "1/2", "8/9", ""]
    metrics = evaluate(overlapping(words, ["yes", "no", "no", "no", "no", ""]), draws=10)
    recall = {
        kind: {name: (cell["unweighted_average_recall"]["value"], cell["clips"]) for name, cell in cells.items()}
        for kind, cells in metrics["groups"].items()
        if kind in ("words", "sentence")
    }
    assert recall == {
        "sentence": {"in training": (1.0, 1), "not in training": (pytest.approx(0.5), 4), "unknown": (1.0, 1)},
        "words": {
            "all in training": (1.0, 2),
            "90 % or more in training": (1.0, 1),
            "fewer in training": (0.0, 2),
            "unknown": (1.0, 1),
        },
    }
    assert metrics["text"] == {"clips": 5, "sentences_in_training": 1, "words": 36, "words_in_training": 33}


def test_without_text_there_are_no_such_groups():
    metrics = evaluate(overlapping(None, None), draws=10)
    assert metrics["text"] is None
    assert set(metrics["groups"]) == {"gender", "age", "duration"}


def test_damaged_counts_are_unknown():
    assert word_counts(["3/4", "", "x/4", "3", "-1/2", "1/2/3"]).tolist() == [[3, 4]] + [[0, 0]] * 5
    assert text_overlap(overlapping(["x"] * 6, ["maybe"] * 6)) is None
