"""Waveform augmentation without downloads, with the changes of `accent_plugin.audio.changes`.

Applied to each clip with a generator that is passed in, so that a clip's augmentation in an epoch depends neither on
the batch, nor on the worker, nor on restarts.
"""

from dataclasses import dataclass

import numpy as np

from accent_plugin.audio import changes
from accent_plugin.audio.samples import SAMPLE_RATE

DEFAULT = "default"


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a clip at 16 kHz; None disables a kind. Values are drawn uniformly from the ranges.

    Arguments
    ---------
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
        for kind, change in _CHANGES.items():
            value = getattr(self, kind)
            if value and rng.random() < self._probability_of(kind):
                samples = change(samples, value, rng, voices)
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
    return Augmentation(probability, **kinds)


def _add_babble(samples, snr, rng, voices):
    snr, number = rng.uniform(*snr), int(rng.integers(3, 8))
    return samples if voices is None else changes.add_babble(samples, snr, voices(rng, number, len(samples)))


# Kind -> function of samples, the kind's value, a generator and voices. Arguments are drawn from left to right.
_CHANGES = {
    "speed": lambda samples, value, rng, _: changes.change_speed(samples, rng.uniform(*value)),
    "formants": lambda samples, value, rng, _: changes.move_formants(samples, rng.uniform(*value)),
    "reverberation": lambda samples, value, rng, _: changes.reverberate(
        samples, rng.uniform(*value), rng.uniform(0.0, 12.0), rng
    ),
    "babble_snr": _add_babble,
    "band": lambda samples, value, rng, _: changes.limit_band(samples, rng.uniform(*value)),
    "noise_snr": lambda samples, value, rng, _: changes.add_noise(
        samples, rng.uniform(*value), rng.uniform(0.0, 1.0), rng
    ),
    "gain": lambda samples, value, rng, _: changes.change_gain(samples, rng.uniform(*value)),
    "clipping": lambda samples, value, rng, _: changes.clip_peaks(samples, rng.uniform(*value)),
    "codecs": lambda samples, value, rng, _: changes.encode_and_decode(samples, value[int(rng.integers(len(value)))]),
    "packet_loss": lambda samples, value, rng, _: changes.lose_packets(samples, rng.uniform(*value), rng),
    "mask_seconds": lambda samples, value, rng, _: changes.mask_time(samples, int(value * SAMPLE_RATE), rng),
}

# In the order in which the changes are applied: from the speaker through the room to the line.
KINDS = tuple(_CHANGES)
