"""What a listener would remark about a recording before judging it: how loud, how noisy, whether it is cut off at full
scale; and its outline for a picture. Measured while its blocks pass by, so that memory does not grow with its samples.

Levels are in dB of full scale, of frames of 25 ms every 10 ms (`accent_plugin.inference.windows`).
"""

from dataclasses import dataclass

import numpy as np

from accent_plugin.audio.levels import frame_levels
from accent_plugin.audio.samples import SAMPLE_RATE

# Of the outline: one value for each 10 ms.
_PEAK_SAMPLES = 160


_CLIPPED = 0.999


# Speech is what the loudest tenth of the frames reach, noise what the quietest tenth do not fall below.
_SPEECH_PERCENTILE, _NOISE_PERCENTILE = 90, 10


NOISY_DB = 15.0


QUIET_DB = -50.0


CLIPPED_SHARE = 0.001


@dataclass(frozen=True)
class SignalQuality:
    """What was heard: levels in dB, the share of samples at full scale, and peaks (one per 10 ms) from 0 to 1."""

    seconds: float
    speech_db: float
    noise_db: float
    clipped: float
    peaks: np.ndarray

    def warnings(self):
        """Yield a sentence for each doubt."""
        if self.speech_db < QUIET_DB:
            yield f"very quiet: the loudest parts are at {self.speech_db:.0f} dB of full scale"
        elif self.speech_db - self.noise_db < NOISY_DB:
            yield (
                f"noisy, or without pauses: its loud parts are only {self.speech_db - self.noise_db:.0f} dB above its "
                "quiet ones"
            )
        if self.clipped > CLIPPED_SHARE:
            yield f"overdriven: {self.clipped:.1%} of its samples are at full scale"


class SignalMeter:
    """Measures a recording while its blocks pass."""

    def __init__(self):
        self._samples = self._clipped = 0
        self._peaks, self._levels = [], []

    def listen(self, blocks):
        """Yield (samples,) blocks at 16 kHz as they come."""
        for block in blocks:
            self._samples += len(block)
            loudness = np.abs(block)
            self._clipped += int((loudness >= _CLIPPED).sum())
            loudness = np.pad(loudness, (0, -len(block) % _PEAK_SAMPLES))
            self._peaks.append(loudness.reshape(-1, _PEAK_SAMPLES).max(axis=1))
            self._levels.append(frame_levels(block, -(-len(block) // _PEAK_SAMPLES)))
            yield block

    def heard(self):
        """What was heard so far, of one sample or more."""
        levels = np.concatenate(self._levels)
        noise, speech = np.percentile(levels, (_NOISE_PERCENTILE, _SPEECH_PERCENTILE))
        return SignalQuality(
            seconds=self._samples / SAMPLE_RATE,
            speech_db=float(speech),
            noise_db=float(noise),
            clipped=self._clipped / self._samples,
            peaks=np.minimum(np.concatenate(self._peaks), 1.0),
        )
