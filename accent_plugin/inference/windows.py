"""Cut a recording into windows, block by block, and detect the windows with speech by their energy.

Levels are in dB relative to full scale. They are computed from the variance of a frame, so that a constant offset has
no effect. Windows with hardly any speech are skipped. If all windows have hardly any speech, the loudest one is used.
"""

from dataclasses import dataclass

import numpy as np

from accent_plugin.audio.levels import FRAME_SAMPLES, STEP_SAMPLES, frame_levels
from accent_plugin.errors import AudioError

# Quieter than any intentional recording of speech.
_FLOOR_DB = -60.0
_RANGE_DB = 40.0
# The loudest frames of a long recording last half a second, so that a click is not mistaken for speech.
_LOUDEST_FRAMES = 50
# One frame in so many counts as loud.
_LOUDEST_DIVISOR = 10
# Smallest fraction of speech frames in a window: half a second of ten.
_SPEECH_FRACTION = 0.05


@dataclass(frozen=True)
class WindowJob:
    """A window to be scored: its recording, its start in samples, and its (samples,) audio."""

    recording: "RecordingWindows"
    start: int
    samples: np.ndarray


@dataclass(frozen=True)
class WindowOutcome:
    """Result of a complete recording, in samples; `counted` holds the starts of the windows that are used."""

    samples: int
    speech_samples: int
    spans: tuple
    counted: frozenset
    scores: dict


class RecordingWindows:
    """The windows of one recording, which arrives in blocks; it holds little more than a window and a block in memory.

    The speech threshold follows the loudest frames so far and can only rise. A window without speech at the current
    threshold therefore has no speech at the final threshold, and is not scored. The final threshold decides which of
    the scored windows are used, so the result does not depend on the size of the blocks.
    """

    def __init__(self, window, hop, offset=0):
        self._window, self._hop = window, hop
        # Its first sample, if it is a segment of a longer recording.
        self.offset = offset
        self._samples = 0
        self._spans = []
        self._next = 0
        self._kept, self._kept_from = np.zeros(0, np.float32), 0
        self._unframed = np.zeros(0, np.float32)
        self._levels = np.zeros(0, np.float32)
        self._loudest = np.zeros(0, np.float32)
        # The power and the job of the loudest window; empty before the first window.
        self._loudest_window: tuple = ()
        # Start of a window -> its (classes,) log-probabilities.
        self._scores = {}
        # The `AudioError` of a window that is too long for the network.
        self.refused = None

    def feed(self, block, last=False):
        """Add the next (samples,) block, and return the jobs of the windows that may be used."""
        self._samples += len(block)
        self._kept = _joined(self._kept, block)
        self._measure(block, last)
        starts = []
        while self._samples > self._next + self._window:
            starts.append(self._next)
            self._next += self._hop
        if last:
            starts.append(max(0, self._samples - self._window))
        # In the first five seconds, the level of the loudest frames may still fall.
        settled = last or len(self._levels) >= _LOUDEST_FRAMES * _LOUDEST_DIVISOR
        threshold = self._threshold() if settled else _FLOOR_DB
        jobs = []
        for start in starts:
            end = min(start + self._window, self._samples)
            self._spans.append((start, end))
            job = WindowJob(self, start, self._kept[start - self._kept_from : end - self._kept_from])
            if self._has_speech((start, end), threshold):
                jobs.append(job)
            levels = self._levels_in((start, end))
            power = float(np.mean(10 ** (levels.astype(np.float64) / 10))) if len(levels) else 0.0
            if not self._loudest_window or power > self._loudest_window[0]:
                self._loudest_window = (power, WindowJob(self, start, job.samples.copy()))
        if starts:
            # The last window may start directly after the start of the window before it.
            self._kept, self._kept_from = self._kept[starts[-1] - self._kept_from :], starts[-1]
        if last and not any(self._has_speech(span, threshold) for span in self._spans):
            loudest = self._loudest_window[1]
            jobs = [] if loudest.start in self._scores else [loudest]
        if last:
            # The segments of a recording are all kept until it ends, so each frees its audio now.
            nothing = np.zeros(0, np.float32)
            self._kept, self._unframed = nothing, nothing
            power, loudest = self._loudest_window
            self._loudest_window = (power, WindowJob(self, loudest.start, nothing))
        return jobs

    def collect(self, start, scores):
        """Store the (classes,) log-probabilities of the window at `start`, or its `AudioError`."""
        if isinstance(scores, AudioError):
            self.refused = scores
        else:
            self._scores[start] = scores

    def outcome(self):
        """Return the result, after all blocks have been fed and all windows scored."""
        threshold = self._threshold()
        counted = [start for start, end in self._spans if self._has_speech((start, end), threshold)]
        # A frame counts until the start of the next one (10 ms), so that speech without pauses lasts as long as the
        # recording.
        lengths = np.minimum(STEP_SAMPLES, self._samples - STEP_SAMPLES * np.arange(len(self._levels)))
        return WindowOutcome(
            samples=self._samples,
            speech_samples=int(lengths[self._levels >= threshold].sum()),
            spans=tuple(self._spans),
            counted=frozenset(counted or [self._loudest_window[1].start]),
            scores=self._scores,
        )

    def _measure(self, block, last):
        waiting = _joined(self._unframed, block)
        frames = (
            -(-len(waiting) // STEP_SAMPLES) if last else max(0, (len(waiting) - FRAME_SAMPLES) // STEP_SAMPLES + 1)
        )
        levels = frame_levels(waiting, frames)
        # Copied, because a view would keep the whole block in memory.
        self._unframed = waiting[frames * STEP_SAMPLES :].copy()
        self._levels = _joined(self._levels, levels)
        loudest = _joined(self._loudest, levels)
        self._loudest = np.sort(loudest)[::-1][:_LOUDEST_FRAMES]

    def _threshold(self):
        """Return the level in dB above which a frame is speech, from all frames so far."""
        loudest = self._loudest[: max(1, min(_LOUDEST_FRAMES, len(self._levels) // _LOUDEST_DIVISOR))]
        return max(_FLOOR_DB, float(loudest[-1]) - _RANGE_DB)

    def _levels_in(self, span):
        """Return the levels of the complete frames in (start, end), in samples."""
        start, end = span
        return self._levels[-(-start // STEP_SAMPLES) : max(0, (end - FRAME_SAMPLES) // STEP_SAMPLES + 1)]

    def _has_speech(self, span, threshold):
        levels = self._levels_in(span)
        return len(levels) > 0 and float(np.mean(levels >= threshold)) >= _SPEECH_FRACTION


def _joined(first, second):
    """Concatenate two arrays; copy only if neither is empty."""
    if not len(first):
        return second
    return np.concatenate([first, second]) if len(second) else first
