"""Waveform augmentation without downloads, with the changes of `accent_plugin.audio.changes`.

Applied to each clip with a generator that is passed in, so that a clip's augmentation in an epoch depends neither on
the batch, nor on the worker, nor on restarts.
"""

from dataclasses import dataclass

import numpy as np

from accent_plugin.audio import changes
from accent_plugin.audio.samples import SAMPLE_RATE

# Kinds of change in the order in which they are applied: from the speaker through the room to the line.
KINDS = (
    *("speed", "formants", "reverberation", "babble_snr", "band", "noise_snr"),
    *("gain", "clipping", "codecs", "packet_loss", "mask_seconds"),
)
DEFAULT = "default"


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a clip; None disables one of the kinds. Values are drawn uniformly from the ranges.

    Arguments
    ---------
    sample_rate : int
        In hertz.
    probability : float or dict
        Probability of each kind, drawn independently: one for all, or kind -> probability. A kind without one has that
        of `default`, or 0.
    speed : (float, float)
        Range of the speed factor; pitch moves with it (Ko et al., "Audio augmentation for speech recognition", 2015).
    noise_snr : (float, float)
        Range of the signal-to-noise ratio in dB; the noise's spectrum falls by 0 to 6 dB per octave.
    band : (float, float)
        Range of the cutoff frequency in hertz, above which everything is removed, as by telephones and codecs.
    mask_seconds : float
        Maximum length of the segment that is silenced.
    babble_snr : (float, float)
        Range of the signal-to-noise ratio in dB of 3 to 7 other speakers.
    reverberation : (float, float)
        Range of the reverberation time in seconds; the direct sound is 0 to 12 dB above the reverberation.
    codecs : tuple of str
        Names in `changes.CODECS`, one of which is drawn.
    gain : (float, float)
        Range of the change of level in dB.
    clipping : (float, float)
        Range of the fraction of samples that are clipped.
    packet_loss : (float, float)
        Range of the fraction of packets of 20 ms that are lost.
    formants : (float, float)
        Range of the McAdams coefficient, which moves formants and keeps the pitch.
    """

    sample_rate: int
    probability: float | dict = 0.5
    speed: tuple | None = None
    noise_snr: tuple | None = None
    band: tuple | None = None
    mask_seconds: float | None = None
    babble_snr: tuple | None = None
    reverberation: tuple | None = None
    codecs: tuple | None = None
    gain: tuple | None = None
    clipping: tuple | None = None
    packet_loss: tuple | None = None
    formants: tuple | None = None

    def __call__(self, samples, rng, voices=None):
        """Augment one clip.

        Arguments
        ---------
        samples : (samples,) np.ndarray of float32
        rng : np.random.Generator
        voices : callable
            (generator, number, samples) -> list of that many clips of other speakers, for babble; None for no babble.

        Returns
        -------
        (samples,) np.ndarray of float32
            A new array; its length differs if the speed was changed.
        """
        for kind in KINDS:
            value = getattr(self, kind)
            if value and rng.random() < self._probability_of(kind):
                samples = _CHANGES[kind](samples, value, rng, voices)
        return samples.astype(np.float32, copy=False)

    def _probability_of(self, kind):
        if not isinstance(self.probability, dict):
            return self.probability
        return self.probability.get(kind, self.probability.get(DEFAULT, 0.0))

    @property
    def slowest(self):
        """Largest factor by which a clip can become longer."""
        return 1 / min(self.speed) if self.speed else 1.0

    @property
    def fastest(self):
        """Largest factor by which a clip can become shorter."""
        return max(self.speed) if self.speed else 1.0


def make_augmentation(enabled, probability, speed=None, noise_snr=None, band=None, mask_seconds=None, **kinds):
    """Make an `Augmentation` for prepared audio, or None if not enabled."""
    if not enabled:
        return None
    kinds |= {"speed": speed, "noise_snr": noise_snr, "band": band, "mask_seconds": mask_seconds}
    kinds = {kind: tuple(value) if isinstance(value, list) else value for kind, value in kinds.items()}
    return Augmentation(SAMPLE_RATE, probability, **kinds)


def _change_speed(samples, factors, rng, voices):
    return changes.change_speed(samples, rng.uniform(*factors))


def _limit_band(samples, edges, rng, voices):
    return changes.limit_band(samples, rng.uniform(*edges))


def _add_noise(samples, snr, rng, voices):
    return changes.add_noise(samples, rng.uniform(*snr), rng.uniform(0.0, 1.0), rng)


def _mask_time(samples, seconds, rng, voices):
    return changes.mask_time(samples, int(seconds * SAMPLE_RATE), rng)


def _add_babble(samples, snr, rng, voices):
    snr, number = rng.uniform(*snr), int(rng.integers(3, 8))
    return samples if voices is None else changes.add_babble(samples, snr, voices(rng, number, len(samples)))


def _reverberate(samples, seconds, rng, voices):
    return changes.reverberate(samples, rng.uniform(*seconds), rng.uniform(0.0, 12.0), rng)


def _encode(samples, names, rng, voices):
    return changes.encode_and_decode(samples, names[int(rng.integers(len(names)))])


def _change_gain(samples, decibels, rng, voices):
    return changes.change_gain(samples, rng.uniform(*decibels))


def _clip_peaks(samples, fractions, rng, voices):
    return changes.clip_peaks(samples, rng.uniform(*fractions))


def _lose_packets(samples, fractions, rng, voices):
    return changes.lose_packets(samples, rng.uniform(*fractions), rng)


def _move_formants(samples, coefficients, rng, voices):
    return changes.move_formants(samples, rng.uniform(*coefficients))


_CHANGES = {
    "speed": _change_speed,
    "formants": _move_formants,
    "reverberation": _reverberate,
    "babble_snr": _add_babble,
    "band": _limit_band,
    "noise_snr": _add_noise,
    "gain": _change_gain,
    "clipping": _clip_peaks,
    "codecs": _encode,
    "packet_loss": _lose_packets,
    "mask_seconds": _mask_time,
}
