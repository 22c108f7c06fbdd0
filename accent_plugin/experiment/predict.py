"""Apply a trained model to the clips of a split."""

import functools

import numpy as np
from scipy.special import log_softmax

from accent_plugin.data import labels
from accent_plugin.evaluation import calibration
from accent_plugin.evaluation.predictions import ScoredClips
from accent_plugin.training.loaders import ChainedChanges, change_clip_speed, whole_clips


def predict(brain, clips, loading, speeds=(1.0,), degrade=None, temperature=1.0):
    """Apply the best epoch's model to clips.

    Arguments
    ---------
    brain : AccentBrain
    clips : sequence of accent_plugin.data.manifests.Clip
    loading : LoadingOptions
    speeds : sequence of float
        Speed factors; log-probabilities are averaged over the copies of a clip and normalised again.
    degrade : callable
        One of `accent_plugin.audio.degradations.DEGRADATIONS`; None leaves the clips unchanged.
    temperature : float
        Log-probabilities are divided by it; see `accent_plugin.evaluation.calibration`.

    Returns
    -------
    clips : list of accent_plugin.data.manifests.Clip
        In the given order. With `--debug`, only the clips of some batches.
    log_probabilities : (clips, classes) np.ndarray
    """
    copies = []
    for speed in speeds:
        changes = [degrade] if degrade else []
        changes += [functools.partial(change_clip_speed, speed=speed)] if speed != 1 else []
        ids, log_probabilities = brain.predict(
            whole_clips(clips, loading, ChainedChanges(changes) if changes else None)
        )
        copies.append(dict(zip(ids, log_probabilities, strict=True)))
    seen = [clip for clip in clips if all(clip.id in copy for copy in copies)]
    mean = np.mean([[copy[clip.id] for clip in seen] for copy in copies], axis=0)
    return seen, calibration.apply_temperature(log_softmax(mean, axis=1), temperature)


def as_predictions(clips, log_probabilities, accents):
    """Make `accent_plugin.evaluation.predictions.ScoredClips` from the clips with an accent in `accents`."""
    return ScoredClips.from_clips(
        clips,
        [clip.accent for clip in clips],
        log_probabilities,
        accents,
        seconds=[clip.duration for clip in clips],
        gender=[labels.gender(clip.gender) for clip in clips],
    )
