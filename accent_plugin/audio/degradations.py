"""Degradations of the test set at graded strengths, to measure robustness to noise, rooms, codecs and lines.

Each is called with (samples,) np.ndarray of float32 at 16 kHz, a np.random.Generator, and `voices` as an `Augmentation`
has them. It returns as many samples of float32. Functions have names because the loader's workers may have to pickle
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from accent_plugin.audio import changes

# Number of other speakers in babble, and dB of direct sound above reverberation.
_VOICES, _DIRECT = 5, 6.0


@dataclass(frozen=True)
class Degradation:
    """One degradation.

    Attributes
    ----------
    kind : str
        Degradations of one kind differ in strength, and are points of a curve in the report.
    strength : float or None
        None for a kind without strengths.
    unit : str
        Of the strength.
    change : callable
        (samples, strength, generator, voices) -> as many samples.
    """

    kind: str
    strength: float | None
    unit: str
    change: Callable

    def __call__(self, samples, rng, voices):
        """Degrade one clip, (samples,) np.ndarray."""
        return self.change(samples, self.strength, rng, voices).astype(np.float32, copy=False)

    @property
    def needs_voices(self):
        """Whether it needs clips of other speakers."""
        return self.change is _babble


def _noise(samples, snr, rng, voices):
    # Between white and pink: the amplitude falls at most with the square root of frequency.
    return changes.add_noise(samples, snr, rng.uniform(0.0, 0.5), rng)


def _babble(samples, snr, rng, voices):
    return changes.add_babble(samples, snr, voices(rng, _VOICES, len(samples)))


def _room(samples, seconds, rng, voices):
    return changes.reverberate(samples, seconds, _DIRECT, rng)


def _eight_kilohertz(samples, strength, rng, voices):
    return changes.limit_band(samples, 4000)


def _telephone(samples, strength, rng, voices):
    # The band of an analogue line.
    limited = changes.limit_band(samples, 3400)
    return limited - changes.limit_band(limited, 300)


def _mu_law(samples, strength, rng, voices):
    return changes.encode_and_decode(_telephone(samples, None, rng, voices), "mu-law")


def _gsm(samples, strength, rng, voices):
    return changes.encode_and_decode(samples, "gsm")


def _opus(samples, strength, rng, voices):
    return changes.encode_and_decode(samples, "opus")


def _mp3(samples, kilobits, rng, voices):
    return changes.encode_and_decode(samples, "mp3", round(1000 * kilobits))


def _packets(samples, percent, rng, voices):
    return changes.lose_packets(samples, percent / 100, rng)


def _clipped(samples, percent, rng, voices):
    return changes.clip_peaks(samples, percent / 100)


# Kind, unit, change, and strength -> name in a report.
_ALL = (
    ("noise", "dB", _noise, {20.0: "noise at 20 dB", 10.0: "noise at 10 dB", 0.0: "noise at 0 dB"}),
    ("babble", "dB", _babble, {20.0: "babble at 20 dB", 10.0: "babble at 10 dB", 0.0: "babble at 0 dB"}),
    ("reverberation", "s", _room, {0.3: "room of 0.3 s", 0.6: "room of 0.6 s", 1.0: "room of 1 s"}),
    ("MP3", "kbit/s", _mp3, {64.0: "MP3 64 kbit/s", 32.0: "MP3 32 kbit/s", 16.0: "MP3 16 kbit/s"}),
    ("packet loss", "%", _packets, {5.0: "5 % packets lost", 10.0: "10 % packets lost", 20.0: "20 % packets lost"}),
    ("clipping", "%", _clipped, {1.0: "1 % clipped", 5.0: "5 % clipped", 20.0: "20 % clipped"}),
    ("telephone", "", _telephone, {None: "telephone"}),
    ("8 kHz band", "", _eight_kilohertz, {None: "8 kHz band"}),
    ("mu-law telephone", "", _mu_law, {None: "mu-law telephone"}),
    ("GSM", "", _gsm, {None: "GSM"}),
    ("Opus", "", _opus, {None: "Opus 12 kbit/s"}),
)  # fmt: skip

# Name in a report -> degradation.
DEGRADATIONS = {
    name: Degradation(kind, strength, unit, change)
    for kind, unit, change, names in _ALL
    for strength, name in names.items()
}
