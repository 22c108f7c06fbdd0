"""Arrays of samples: the models' sample rate, checks, resampling and 16-bit quantisation."""

import numbers

import numpy as np
import soxr

from accent_plugin.errors import AudioError

SAMPLE_RATE = 16_000


UNDECODABLE = "undecodable"


EMPTY = "empty"


TOO_SHORT = "too short"


TOO_LONG = "too long"


NON_FINITE = "non-finite"


SILENT = "silent"


# Peak to peak, so that a constant offset counts as silence: three steps of 16-bit audio.
SILENCE_LEVEL = 3 / 32768


SAMPLE_RATES = range(1_000, 384_001)


# An array with more rows than this is taken for a batch of clips, not for the channels of one.
_MAX_CHANNELS = 32


def resample(samples, sample_rate, target=SAMPLE_RATE):
    """Resample to ``target`` hertz (soxr, HQ); samples already at that rate are returned unchanged."""
    if sample_rate == target:
        return samples
    return soxr.resample(samples, sample_rate, target, quality="HQ").astype(np.float32, copy=False)


def check_samples(samples, sample_rate=SAMPLE_RATE, min_seconds=0.0, max_seconds=None):
    """Raise an error for a clip that is unusable.

    Raises
    ------
    AudioError
        "empty", "too short", "too long", "non-finite" or "silent".
    """
    seconds = len(samples) / sample_rate
    if not len(samples):
        raise AudioError(EMPTY, "the clip holds no samples")
    if seconds < min_seconds:
        raise AudioError(TOO_SHORT, f"the clip is {seconds:.2f} s long, the minimum is {min_seconds:g} s")
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(TOO_LONG, f"the clip is {seconds:.1f} s long, the maximum is {max_seconds:g} s")
    if not np.isfinite(samples).all():
        raise AudioError(NON_FINITE, f"{int((~np.isfinite(samples)).sum())} samples of the clip are NaN or infinite")
    if np.ptp(samples) <= SILENCE_LEVEL:
        raise AudioError(SILENT, "the clip is silent: all samples are equal")


def samples_from_array(samples, sample_rate):
    """Check and resample a clip in memory.

    Arguments
    ---------
    samples : (samples,), (samples, channels) or (channels, samples) np.ndarray
        Floats with full scale 1, or integers of 8, 16 or 32 bits, which are scaled by their range (unsigned ones are
        centred first, as in WAV). The shorter axis holds the channels, which are averaged; in a square array the
        first axis holds the samples, as soundfile reads them.
    sample_rate : float
        In hertz.

    Returns
    -------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``.

    Raises
    ------
    AudioError
        "empty", "non-finite", "silent"; "undecodable" for arrays that are not audio.
    """
    samples = np.asarray(samples)
    real = isinstance(sample_rate, numbers.Real)
    if not real or not SAMPLE_RATES.start <= sample_rate < SAMPLE_RATES.stop:
        raise AudioError(
            UNDECODABLE,
            f"a sample rate of {sample_rate} Hz is not supported: give {SAMPLE_RATES.start} to {SAMPLE_RATES[-1]} Hz",
        )
    if not samples.size:
        raise AudioError(EMPTY, f"the clip holds no samples: its shape is {samples.shape}")
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind not in "fiu" or (kind != "f" and bits > 32):
        raise AudioError(
            UNDECODABLE,
            f"samples of type {samples.dtype} are not supported: give floats in [-1, 1], or integers of 8, 16 or 32 "
            "bits",
        )
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and min(samples.shape) > _MAX_CHANNELS):
        raise AudioError(
            UNDECODABLE,
            f"an array of shape {samples.shape} is not one clip: give (samples,), (samples, channels) or "
            f"(channels, samples) with at most {_MAX_CHANNELS} channels; give a batch as a list of clips",
        )
    if samples.ndim == 2:
        samples = samples.T if samples.shape[0] < samples.shape[1] else samples
    with np.errstate(over="ignore", invalid="ignore"):
        samples = samples.astype(np.float32)
        if samples.ndim == 2:
            samples = samples.mean(axis=1)
    if kind != "f":
        samples = samples / np.float32(2 ** (bits - 1)) - np.float32(kind == "u")
    check_samples(samples, sample_rate)
    resampled = resample(samples, sample_rate)
    if not len(resampled):
        raise AudioError(EMPTY, f"the clip is shorter than one sample at {SAMPLE_RATE} Hz")
    return resampled


def quantise(samples):
    """Quantise float samples to 16 bits, clipped at full scale; samples that were 16-bit are restored exactly."""
    return np.clip(np.rint(np.asarray(samples) * 32768.0), -32768, 32767).astype(np.int16)
