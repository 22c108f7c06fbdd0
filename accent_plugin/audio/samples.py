"""Arrays of samples: the models' sample rate, checks, resampling and 16-bit quantisation."""

import numbers
from dataclasses import dataclass

import numpy as np
import soxr

from accent_plugin.errors import AudioError

SAMPLE_RATE = 16_000
UNDECODABLE = "undecodable"
EMPTY = "empty"
TOO_SHORT = "too short"
TOO_LONG = "too long"
NON_FINITE = "non-finite"
OUT_OF_RANGE = "out of range"
SILENT = "silent"
# Peak to peak, so that a constant offset counts as silence: three steps of 16-bit audio.
SILENCE_LEVEL = 3 / 32768
# 40 dB above full scale, which is 1. Integers that were converted to floats without being scaled are beyond it.
MAX_LEVEL = 100.0
# Less than this is not reported: decoders differ by a few frames where a part begins or ends.
_NEGLIGIBLE_SECONDS = 0.1
SAMPLE_RATES = range(1_000, 384_001)
# An array with more rows than this is taken for a batch of clips, not for the channels of one.
_MAX_CHANNELS = 32


@dataclass(frozen=True)
class Loss:
    """Audio that could not be decoded.

    Arguments
    ---------
    start : float
        Where it is missing, in seconds of the decoded audio, from which it is left out.
    seconds : float
        How much is missing. Where a container does not say, it is estimated from the number of bytes.
    reason : str
        Why.
    """

    start: float
    seconds: float
    reason: str

    def __str__(self):
        return f"{self.seconds:.1f} s at {self.start:.1f} s could not be decoded: {self.reason}"


class LossLog:
    """The losses of one recording, in order of time."""

    def __init__(self):
        self._losses = []

    def add(self, start, seconds, reason):
        """Note that `seconds` are missing at `start`; losses at the same place are one."""
        if not seconds > 0:
            return
        if self._losses and self._losses[-1].start == start:
            seconds += self._losses.pop().seconds
        self._losses.append(Loss(start, seconds, reason))

    @property
    def seconds(self):
        """How much is missing so far."""
        return sum(loss.seconds for loss in self._losses)

    def result(self, name, decoded):
        """Return the losses of a recording of which `decoded` seconds are left; none if they are negligible.

        Raises
        ------
        AudioError
            "undecodable" if less than half is left.
        """
        lost = self.seconds
        if lost < _NEGLIGIBLE_SECONDS:
            return ()
        if lost > decoded:
            worst = max(self._losses, key=lambda loss: loss.seconds)
            raise AudioError(
                UNDECODABLE,
                f"{name} is damaged: only {decoded:.1f} s of about {decoded + lost:.1f} s can be decoded: "
                f"{worst.reason}",
            )
        return tuple(self._losses)


def to_mono(block, channel=None):
    """Average the channels of a (samples, channels) block, or take one of them, counted from 1."""
    if channel is not None:
        # Of joined files, one may have fewer channels than the first.
        return block[:, min(channel, block.shape[1]) - 1].copy()
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


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
        "empty", "too short", "too long", "non-finite", "out of range" or "silent".
    """
    seconds = len(samples) / sample_rate
    if not len(samples):
        raise AudioError(EMPTY, "the clip holds no samples")
    if seconds < min_seconds:
        raise AudioError(TOO_SHORT, f"the clip is {seconds:.2f} s long, the minimum is {min_seconds:g} s")
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(TOO_LONG, f"the clip is {seconds:.1f} s long, the maximum is {max_seconds:g} s")
    low, high = float(samples.min()), float(samples.max())
    check_range("the clip", low, high)
    if high - low <= SILENCE_LEVEL:
        raise AudioError(SILENT, "the clip is silent: all samples are equal")


def check_range(name, low, high):
    """Raise an error if the smallest or the largest sample is not finite, or far beyond full scale.

    Raises
    ------
    AudioError
        "non-finite" or "out of range".
    """
    if not np.isfinite([low, high]).all():
        raise AudioError(NON_FINITE, f"{name} has samples that are NaN or infinite")
    if max(-low, high) > MAX_LEVEL:
        raise AudioError(
            OUT_OF_RANGE,
            f"{name} has samples of {max(-low, high):.4g}, far beyond full scale, which is 1: divide 16-bit integers "
            "that were converted to floats by 32768",
        )


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
        "empty", "non-finite", "out of range", "silent"; "undecodable" for arrays that are not audio.
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
    steps = np.asarray(samples) * 32768.0
    np.rint(steps, out=steps)
    return np.clip(steps, -32768, 32767, out=steps).astype(np.int16)
