"""Loudness of short frames, in decibels."""

import numpy as np

# In samples: frames of 25 ms every 10 ms, summed from cells of 5 ms.
FRAME_SAMPLES, STEP_SAMPLES, _CELL = 400, 160, 80


def frame_levels(samples, frames):
    """Compute the level of each frame.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    frames : int
        Number of frames. Frame i starts at i times 10 ms; the last ones may be shorter than 25 ms.

    Returns
    -------
    (frames,) np.ndarray of float32
        Variance in dB relative to full scale.
    """
    if not frames:
        return np.zeros(0, np.float32)
    per_frame, per_step = FRAME_SAMPLES // _CELL, STEP_SAMPLES // _CELL
    cells = per_step * (frames - 1) + per_frame
    samples = samples[: cells * _CELL]
    sizes = np.clip(len(samples) - _CELL * np.arange(cells), 0, _CELL)
    samples = np.pad(samples, (0, cells * _CELL - len(samples))).reshape(cells, _CELL)
    sums = samples.sum(axis=1, dtype=np.float64)
    squares = np.einsum("ij,ij->i", samples, samples, dtype=np.float64)

    def over_frames(values):
        return np.lib.stride_tricks.sliding_window_view(values, per_frame)[::per_step].sum(axis=1)

    count = over_frames(sizes)
    variance = over_frames(squares) / count - np.square(over_frames(sums) / count)
    return (10 * np.log10(np.maximum(variance, 1e-20))).astype(np.float32)
