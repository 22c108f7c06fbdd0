"""Clips by how much of their text was in training: a classifier can learn how an accent says certain words.

The words of a clip are counted with repetitions. Clips of unknown text belong to no figure here, and to a group of
their own.
"""

import numpy as np

_SENTENCES = {"yes": "in training", "no": "not in training"}
_WORDS = ((1.0, "all in training"), (0.9, "90 % or more in training"), (0.0, "fewer in training"))


def word_counts(texts):
    """Parse "11/12" to (clips, 2) np.ndarray of int: words in training, and all words; zeros if unknown."""
    counts = np.zeros((len(texts), 2), dtype=np.int64)
    for clip, text in enumerate(texts):
        parts = text.split("/")
        if len(parts) == 2 and all(part.isdecimal() for part in parts):
            counts[clip] = [int(part) for part in parts]
    return counts


def text_overlap(p):
    """Count the clips of known text, those whose sentence was in training, and their words; None if no text is known.

    Arguments
    ---------
    p : accent_plugin.evaluation.predictions.ScoredClips

    Returns
    -------
    dict
        "clips", "sentences_in_training" (clips), "words", "words_in_training".
    """
    seen, words = word_counts(p.words_seen).sum(axis=0).tolist()
    known = sum(text in _SENTENCES for text in p.sentence_seen)
    if not known:
        return None
    sentences = p.sentence_seen.count("yes")
    return {"clips": known, "sentences_in_training": sentences, "words": words, "words_in_training": seen}


def text_groups(p, unknown):
    """Yield each kind of group with its values and the index of every clip's value; nothing if no text is known.

    Arguments
    ---------
    p : accent_plugin.evaluation.predictions.ScoredClips
    unknown : str
        Value of the clips of unknown text.
    """
    if text_overlap(p) is None:
        return
    answers = list(_SENTENCES)
    index = [answers.index(text) if text in answers else len(answers) for text in p.sentence_seen]
    yield "sentence", [*_SENTENCES.values(), unknown], np.array(index)
    seen, words = word_counts(p.words_seen).T
    share = np.divide(seen, words, out=np.full(len(words), -1.0), where=words > 0)
    index = np.argmax(share[:, None] >= np.array([least for least, _ in _WORDS] + [-1.0]), axis=1)
    yield "words", [*(name for _, name in _WORDS), unknown], index
