"""Separability of embeddings: whether clips of one accent, or of one speaker, are closer together than others.

Conventions
-----------
* The similarity of two clips is the cosine of their vectors after subtracting the mean of all clips, which removes what
  all clips have in common. The mean needs no labels.
* A figure compares two kinds of pairs, near and far: it is the probability that a random near pair is more similar than
  a random far one; a tie counts half. This is the area under the ROC curve (Hanley and McNeil, "The meaning and use of
  the area under a receiver operating characteristic (ROC) curve", 1982), and 0.5 is chance. The machine ABX task of
  Schatz et al. (2013) is the equivalent for triples.
* Intervals are 95 % percentile intervals of a bootstrap that draws speakers with replacement and keeps all clips of a
  speaker together. The weight of a pair of two speakers is the product of their numbers of draws. The weight of a pair
  of clips by one speaker is the number of draws of that speaker. Two copies of one speaker are never a pair of two
  speakers.
* A draw without pairs of one kind is skipped. With few speakers the interval is too narrow.
"""

import numpy as np

from accent_plugin.errors import ReportError


def similarities(vectors):
    """Cosine similarities, (clips, clips), between all rows of (clips, features) after subtracting their mean.

    A vector that equals the mean has similarity 0 to all others.

    Raises
    ------
    ReportError
        When the array does not have two dimensions, or is not finite.

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
    """Estimate the probability that a near pair of clips is more similar than a far pair.

    Arguments
    ---------
    similarity : (clips, clips) np.ndarray
        From `similarities`; only the elements above the diagonal are used, here and below.
    near, far : (clips, clips) np.ndarray of bool
        Pairs of each kind; other pairs are ignored.
    speakers : (clips,) sequence
        Units of the bootstrap; a speaker may have several accents.
    draws, seed : int
        Number of draws and seed of the bootstrap.

    Returns
    -------
    dict
        "value", "low", "high" and "n" (the number of speakers), as in a report; the bounds are None if no draw has
        pairs of both kinds.

    Raises
    ------
    ReportError
        When shapes differ, one kind has no pairs, or a pair is of both kinds.

    Example
    -------
    >>> near, far = ([[False, a, b], [False, False, b], [False] * 3] for a, b in ((True, False), (False, True)))
    >>> pairwise_auc([[1, 0.9, 0.2], [0, 1, 0.1], [0, 0, 1]], near, far, ["ann", "ann", "bob"], draws=0)["value"]
    1.0
    """
    names, speaker = np.unique(np.asarray(speakers), return_inverse=True)
    similarity, near, far = np.asarray(similarity, dtype=np.float64), np.asarray(near, bool), np.asarray(far, bool)
    for name, matrix in {"similarity": similarity, "near": near, "far": far}.items():
        if matrix.shape != (speaker.size, speaker.size):
            raise ReportError(
                f"{name} has shape {matrix.shape}; {speaker.size} speakers need {(speaker.size, speaker.size)}"
            )
    i, j = np.triu_indices(speaker.size, 1)
    near, far = near[i, j], far[i, j]
    if not near.any() or not far.any() or (near & far).any():
        raise ReportError(
            f"{near.sum()} near and {far.sum()} far pairs, of which {(near & far).sum()} are both: give at least one "
            "pair of each kind, and no pair that is both"
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
