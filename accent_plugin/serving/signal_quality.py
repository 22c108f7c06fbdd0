"""Signal quality of a recording: level, noise, clipping, and the peaks to draw its waveform.

Measured block by block, so that the samples are never all in memory. Levels are in dB relative to full scale, over
frames of 25 ms every 10 ms (`accent_plugin.audio.levels`).
"""

from dataclasses import dataclass

import numpy as np

from accent_plugin.audio.levels import frame_levels

# Samples for each peak of the waveform: 10 ms.
_PEAK_SAMPLES = 160
_CLIPPED = 0.999
# The speech level is the 90th percentile of the frame levels, the noise level the 10th.
_SPEECH_PERCENTILE, _NOISE_PERCENTILE = 90, 10
NOISY_DB = 15.0
QUIET_DB = -50.0
CLIPPED_FRACTION = 0.001


@dataclass(frozen=True)
class SignalQuality:
    """Levels in dB, the fraction of samples at full scale, and peaks (one per 10 ms) from 0 to 1."""

    speech_db: float
    noise_db: float
    clipped: float
    peaks: np.ndarray

    def warnings(self):
        """Yield a message for each problem."""
        if self.speech_db < QUIET_DB:
            yield f"very quiet: the loudest parts are at {self.speech_db:.0f} dB relative to full scale"
        elif self.speech_db - self.noise_db < NOISY_DB:
            contrast = self.speech_db - self.noise_db
            yield f"noisy or without pauses: loud parts are only {contrast:.0f} dB above quiet parts"
        if self.clipped > CLIPPED_FRACTION:
            yield f"clipped: {self.clipped:.1%} of the samples are at full scale"


class SignalMeter:
    """Measures the signal quality of a recording block by block."""

    def __init__(self):
        self._samples = self._clipped = 0
        self._peaks, self._levels = [], []

    def measure(self, blocks):
        """Measure (samples,) blocks at 16 kHz, and yield each unchanged."""
        for block in blocks:
            self._samples += len(block)
            loudness = np.abs(block)
            self._clipped += int((loudness >= _CLIPPED).sum())
            loudness = np.pad(loudness, (0, -len(block) % _PEAK_SAMPLES))
            self._peaks.append(loudness.reshape(-1, _PEAK_SAMPLES).max(axis=1))
            self._levels.append(frame_levels(block, -(-len(block) // _PEAK_SAMPLES)))
            yield block

    def quality(self):
        """The `SignalQuality` of the blocks so far; needs at least one sample."""
        levels = np.concatenate(self._levels)
        noise, speech = np.percentile(levels, (_NOISE_PERCENTILE, _SPEECH_PERCENTILE))
        return SignalQuality(
            speech_db=float(speech),
            noise_db=float(noise),
            clipped=self._clipped / self._samples,
            peaks=np.minimum(np.concatenate(self._peaks), 1.0),
        )
