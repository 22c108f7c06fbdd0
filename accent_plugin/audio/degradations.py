"""Degradations of the test set, to measure robustness to telephones, codecs and noise.

Each is a function of (samples,) np.ndarray of float32 at 16 kHz and a np.random.Generator that returns as many samples
of float32. They are named functions because the loader's workers may have to pickle them.
"""

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.audio.augment import add_noise, limit_band
from accent_plugin.audio.samples import SAMPLE_RATE


def telephone(samples, rng):
    """Keep 300 to 3400 Hz, the band of an analogue telephone line."""
    limited = limit_band(samples, 3400, SAMPLE_RATE)
    return (limited - limit_band(limited, 300, SAMPLE_RATE)).astype(np.float32)


def half_rate(samples, rng):
    """Keep the band below 4 kHz, which a sample rate of 8 kHz can represent."""
    return limit_band(samples, 4000, SAMPLE_RATE).astype(np.float32)


def mp3(samples, rng):
    """Encode as MP3 and decode, as a listener would: the codec's delay of 69 ms stays, and the end is cut off."""
    return codecs.decode(codecs.encode_mp3(samples, 32_000)).samples[: len(samples)]


def noise(samples, rng):
    """Add noise at 10 dB SNR, between white and pink (amplitude falling with the square root of frequency)."""
    return add_noise(samples, 10.0, rng.uniform(0.0, 0.5), rng).astype(np.float32)


# Name in a report -> function.
DEGRADATIONS = {
    "telephone": telephone,
    "8 kHz band": half_rate,
    "MP3 32 kbit/s": mp3,
    "noise at 10 dB": noise,
}
