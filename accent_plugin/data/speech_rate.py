"""Clips whose length does not fit their sentence: blank or cut recordings, and sentences that are read twice.

The length of a clip is modelled as ``pause + characters * seconds_per_character``, fitted to the corpus itself, so that
it holds for any language and script. The logarithm of the ratio of a clip's length to that is compared with its spread
over the corpus: the modified z-score of B. Iglewicz and D. Hoaglin, How to Detect and Handle Outliers, 1993, who
recommend 3.5 as the limit.
"""

import re
import unicodedata

import numpy as np

LIMIT = 3.5
TOO_FAST, TOO_SLOW = "too short for its sentence", "too long for its sentence"
# Fewer clips do not tell what is usual.
LEAST_CLIPS = 30
# More do not change the fit.
_MOST_FITTED = 20_000
# Below this, lengths are closer to the model than speech ever is, as in synthetic speech.
_LEAST_SPREAD = 0.05


def count_characters(sentence):
    """Number of letters and digits of a sentence."""
    return len(re.findall(r"\w", unicodedata.normalize("NFKC", sentence or "")))


def rate_deviations(characters, seconds):
    """How far each clip is from the usual length for its sentence.

    Arguments
    ---------
    characters : (clips,) np.ndarray
        From ``count_characters``; 0 where the sentence is unknown.
    seconds : (clips,) np.ndarray
        NaN or 0 where unknown.

    Returns
    -------
    (clips,) np.ndarray or None
        In robust standard deviations: positive for clips that are too long for their sentence, negative for clips that
        are too short, NaN where the sentence or the length is unknown. None with fewer than ``LEAST_CLIPS`` clips.
    """
    from scipy.optimize import least_squares

    characters, seconds = np.asarray(characters, np.float64), np.asarray(seconds, np.float64)
    known = np.flatnonzero((characters > 0) & (seconds > 0))
    if len(known) < LEAST_CLIPS:
        return None
    fitted = known[:: -(-len(known) // _MOST_FITTED)]
    x, y = characters[fitted], np.log(seconds[fitted])

    def errors(parameters):
        pause, rate = np.exp(parameters)
        return np.log(pause + rate * x) - y

    first = [np.log(0.5), np.log(np.median(seconds[fitted] / x))]
    pause, rate = np.exp(least_squares(errors, first, loss="soft_l1", f_scale=0.1).x)
    found = np.full(len(characters), np.nan)
    found[known] = np.log(seconds[known]) - np.log(pause + rate * characters[known])
    found -= np.median(found[known])
    return found / max(_LEAST_SPREAD, 1.4826 * float(np.median(np.abs(found[known]))))
