"""Which clips an embedding puts close together: those of one accent, or those of one person?

Conventions
-----------
* Two clips are as close as the cosine of the angle between their vectors, seen from the mean of all clips: what all of
  them have in common says nothing about any. The mean needs no labels.
* A figure compares two kinds of pairs, near and far: it is the probability that a random near pair is closer than a
  random far one, a tie counting half, which is the area under the ROC curve (Hanley and McNeil, "The meaning and use of
  the area under a receiver operating characteristic (ROC) curve", 1982). 0.5 is chance. The machine ABX task of Schatz
  et al. (2013) asks the same of triples.
* Intervals are 95 % percentile intervals of a bootstrap that draws speakers with replacement and keeps all clips of a
  speaker together. A pair of two speakers counts as often as both were drawn, one after the other; a pair of one
  speaker's clips as often as that speaker was. Two copies of one speaker are never a pair of two speakers.
* A draw that leaves no pairs of one kind is left out. Few speakers make an interval too narrow.
"""

import numpy as np

from accent_plugin.errors import ReportError


def similarities(vectors):
    """Cosines between all clips, seen from their mean.

    Arguments
    ---------
    vectors : (clips, features) np.ndarray

    Returns
    -------
    (clips, clips) np.ndarray of float64
        A vector that is the mean itself has 0 to all.

    Raises
    ------
    ReportError
        When they are not vectors of numbers.

    Example
    -------
    >>> similarities([[1, 5], [3, 5], [2, 6], [2, 4]])[0]
    array([ 1., -1.,  0.,  0.])
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ReportError(f"vectors have shape {vectors.shape}; give (clips, features), all finite")
    centred = vectors - vectors.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    return unit @ unit.T


def pairwise_auc(similarity, near, far, speakers, draws=1000, seed=0):
    """Measure how often a near pair of clips is closer than a far pair.

    Arguments
    ---------
    similarity : (clips, clips) np.ndarray
        As from `similarities`; only what is above the diagonal is read, here and below.
    near, far : (clips, clips) np.ndarray of bool
        Pairs of either kind; those of neither are left out.
    speakers : (clips,) sequence
        Whom the bootstrap draws, so a voice that reads several accents is one of them.
    draws : int
    seed : int

    Returns
    -------
    dict
        "value", "low", "high" and "n", the number of speakers, as in a report; the bounds are None where no draw has
        pairs of both kinds.

    Raises
    ------
    ReportError
        When shapes differ, there are no pairs of one kind, or a pair is of both.

    Example
    -------
    >>> near, far = ([[False, a, b], [False, False, b], [False] * 3] for a, b in ((True, False), (False, True)))
    >>> closer([[1, 0.9, 0.2], [0, 1, 0.1], [0, 0, 1]], near, far, ["ann", "ann", "bob"], draws=0)["value"]
    1.0
    """
    names, speaker = np.unique(np.asarray(speakers), return_inverse=True)
    similarity, near, far = np.asarray(similarity, dtype=np.float64), np.asarray(near, bool), np.asarray(far, bool)
    for name, matrix in {"similarity": similarity, "near": near, "far": far}.items():
        if matrix.shape != (speaker.size, speaker.size):
            raise ReportError(
                f"{name} has shape {matrix.shape}; with the speakers of {speaker.size} clips, give a square"
            )
    i, j = np.triu_indices(speaker.size, 1)
    near, far = near[i, j], far[i, j]
    if not near.any() or not far.any() or (near & far).any():
        raise ReportError(
            f"{near.sum()} near and {far.sum()} far pairs, {(near & far).sum()} of them both; "
            "give some of each kind, and none of both"
        )
    kept = near | far
    near, one, other = near[kept], speaker[i[kept]], speaker[j[kept]]
    values, rank = np.unique(similarity[i[kept], j[kept]], return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(names.size, np.full(names.size, 1 / names.size), size=draws)
    figures = []
    for times in np.vstack([np.ones(names.size, dtype=np.int64), drawn]):
        weights = np.where(one == other, times[one], times[one] * times[other])
        nears = np.bincount(rank, weights * near, minlength=values.size)
        fars = np.bincount(rank, weights * ~near, minlength=values.size)
        if nears.any() and fars.any():
            below = np.cumsum(fars) - fars / 2
            figures.append(float(nears @ below / (nears.sum() * fars.sum())))
    low, high = map(float, np.percentile(figures[1:], [2.5, 97.5])) if figures[1:] else (None, None)
    return {"value": figures[0], "low": low, "high": high, "n": int(names.size)}
