"""Waveform augmentation without downloads: speed, noise, band limit, time masking.

Applied to each clip with a generator that is passed in, so that a clip's augmentation in an epoch depends neither on
the batch, nor on the worker, nor on restarts.
"""

from dataclasses import dataclass

import numpy as np
import soxr

from accent_plugin.audio.samples import SAMPLE_RATE

_SILENCE = 1e-8


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a clip; None disables one of the four kinds.

    Arguments
    ---------
    sample_rate : int
        In hertz.
    probability : float
        Probability of each kind, drawn independently.
    speed : (float, float)
        Range of the speed factor; pitch moves with it (Ko et al., "Audio augmentation for speech recognition", 2015).
    noise_snr : (float, float)
        Range of the signal-to-noise ratio in dB; the noise's spectrum falls by 0 to 6 dB per octave.
    band : (float, float)
        Range of the cutoff frequency in hertz, above which everything is removed, as by telephones and codecs.
    mask_seconds : float
        Maximum length of the segment that is silenced.
    """

    sample_rate: int
    probability: float = 0.5
    speed: tuple | None = None
    noise_snr: tuple | None = None
    band: tuple | None = None
    mask_seconds: float | None = None

    def __call__(self, samples, rng):
        """Augment one clip.

        Arguments
        ---------
        samples : (samples,) np.ndarray of float32
        rng : np.random.Generator

        Returns
        -------
        (samples,) np.ndarray of float32
            A new array; its length differs if the speed was changed.
        """
        if self.speed and rng.random() < self.probability:
            samples = change_speed(samples, rng.uniform(*self.speed))
        if self.band and rng.random() < self.probability:
            samples = limit_band(samples, rng.uniform(*self.band), self.sample_rate)
        if self.noise_snr and rng.random() < self.probability:
            samples = add_noise(samples, rng.uniform(*self.noise_snr), rng.uniform(0.0, 1.0), rng)
        if self.mask_seconds and rng.random() < self.probability:
            samples = mask_time(samples, int(self.mask_seconds * self.sample_rate), rng)
        return samples.astype(np.float32, copy=False)

    @property
    def slowest(self):
        """Largest factor by which a clip can become longer."""
        return 1 / min(self.speed) if self.speed else 1.0


def make_augmentation(enabled, probability, speed=None, noise_snr=None, band=None, mask_seconds=None):
    """Make an `Augmentation` for prepared audio, or None if not enabled."""
    if not enabled:
        return None
    speed, noise_snr, band = (tuple(value) if value else None for value in (speed, noise_snr, band))
    return Augmentation(SAMPLE_RATE, probability, speed, noise_snr, band, mask_seconds)


def change_speed(samples, factor):
    """Play (samples,) faster by `factor`, which also raises the pitch."""
    return soxr.resample(samples, factor, 1.0, quality="MQ")


def limit_band(samples, edge, sample_rate):
    """Remove frequencies above `edge` hertz from (samples,)."""
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / sample_rate) > edge] = 0
    return np.fft.irfft(spectrum, len(samples))


def add_noise(samples, snr, slope, rng):
    """Add noise to (samples,) at `snr` dB; its amplitude is proportional to frequency to the power of -`slope`."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** slope
    noise = np.fft.irfft(spectrum, len(samples))
    power, noise_power = np.mean(np.square(samples, dtype=np.float64)), np.mean(np.square(noise))
    if power < _SILENCE or noise_power == 0:
        return samples
    return samples + noise * np.sqrt(power / noise_power / 10 ** (snr / 10))


def mask_time(samples, longest, rng):
    """Silence a segment of (samples,) of at most `longest` samples, and at most half the clip."""
    length = int(rng.integers(0, min(longest, len(samples) // 2) + 1))
    start = int(rng.integers(0, len(samples) - length + 1))
    samples = samples.copy()
    samples[start : start + length] = 0
    return samples
