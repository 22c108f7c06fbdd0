"""Classify recordings of any length with a trained bundle.

Files, arrays and batches use the same code. Each recording is cut into windows. The network scores the windows in
batches of similar length. The scores of all windows of a recording are combined into one `Prediction`.

Times are in seconds from the start of a recording. A recording that is not longer than a window is one window. In a
longer recording, windows start at multiples of the hop, and the last window ends with the recording. The
log-probabilities of the windows are averaged, weighted by length, and normalised again.
`accent_plugin.inference.windows` skips windows without speech.
"""

import contextlib
import itertools
import os
from dataclasses import dataclass

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import NON_FINITE, SAMPLE_RATE, UNDECODABLE, samples_from_array
from accent_plugin.errors import AudioError, ConfigError
from accent_plugin.evaluation.scores import log_softmax
from accent_plugin.inference.batcher import DynamicBatcher
from accent_plugin.inference.prefetch import BLOCK_SECONDS, Prefetcher, SourceAudio, name_of, one_ahead, plain
from accent_plugin.inference.records import RELIABLE_SECONDS, Failure, Prediction, Window
from accent_plugin.inference.windows import RecordingWindows

# Number of prefetched batches from which clips of similar length are chosen.
_BATCHES_AHEAD = 8
# Largest factor by which padding may lengthen a batch; more padding costs more than another call.
_PADDING = 1.2
_MOST_WORKERS = 8
# On a CPU, larger batches are hardly faster.
_BATCH_SECONDS = {"cpu": 20.0}
_BATCH_SECONDS_ELSEWHERE = 60.0


@dataclass(frozen=True)
class InferenceOptions:
    """Options for cutting recordings into windows and for abstaining.

    Arguments
    ---------
    window_seconds : float
        Recordings longer than this are classified in windows of this length.
    hop_seconds : float
        Time from the start of one window to the start of the next.
    batch_seconds : float
        Length of a batch, including padding. A longer window gets its own batch. None uses 60 on an accelerator, and 20
        on a CPU, where larger batches need more memory and are hardly faster.
    min_probability, max_risk, min_coverage : float
        Threshold for abstaining; give at most one. `min_probability` is the threshold itself: the classifier abstains
        below it. `max_risk` selects the smallest threshold at which at most this fraction of the answered validation
        clips was wrong. `min_coverage` selects the largest threshold at which at least this fraction of the validation
        clips was answered.
    """

    window_seconds: float = 10.0
    hop_seconds: float = 5.0
    batch_seconds: float | None = None
    min_probability: float | None = None
    max_risk: float | None = None
    min_coverage: float | None = None

    def problems(self):
        """Yield descriptions of invalid options."""
        window, hop, batch = self.window_seconds, self.hop_seconds, self.batch_seconds
        if not _is_number(window) or not window >= 0.1:
            yield f"window_seconds is {window!r}: give 0.1 or more"
        elif not _is_number(hop) or not 0.01 <= hop <= window:
            yield f"hop_seconds is {hop!r}: give 0.01 to window_seconds, which is {window:g}"
        if batch is not None and (not _is_number(batch) or not batch > 0):
            yield f"batch_seconds is {batch!r}: give a positive number, or None"
        names = ("min_probability", "max_risk", "min_coverage")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            yield f"{' and '.join(given)} are given: choose one way to abstain"
        for name, value in given.items():
            if not _is_number(value) or not 0 <= value <= 1:
                yield f"{name} is {value!r}: give a fraction from 0 to 1"


class RecordingClassifier:
    """Classify recordings of any kind; a subclass runs its network in `_log_probabilities`."""

    _batcher = None

    def _set_up(self, config, options, device_type="cpu"):
        """Store a bundle's configuration and valid `InferenceOptions`."""
        self.config, self.labels, self.calibration = config, tuple(config["labels"]), config.get("calibration")
        self.threshold = _find_threshold(
            self.calibration, options.min_probability, options.max_risk, options.min_coverage
        )
        self.window_seconds, self.hop_seconds = float(options.window_seconds), float(options.hop_seconds)
        batch_seconds = options.batch_seconds
        if batch_seconds is None:
            batch_seconds = _BATCH_SECONDS.get(device_type, _BATCH_SECONDS_ELSEWHERE)
        self.batch_seconds = float(batch_seconds)

    @property
    def identity(self):
        """Return the first twelve hexadecimal digits of the SHA-256 of the weights."""
        return self.config["weights"]["sha256"][:12]

    def enable_batching(self):
        """Turn on dynamic batching: score the windows of several threads in common batches.

        A prediction does not depend on the other windows in its batch.

        Returns
        -------
        accent_plugin.inference.batcher.DynamicBatcher
            For counting batches and setting deadlines.
        """
        if self._batcher is None:
            self._batcher = DynamicBatcher(
                self._score_batch, lambda lengths: buckets(lengths, self.batch_seconds * SAMPLE_RATE)
            )
        return self._batcher

    def predict_file(self, source):
        """Classify one file.

        Arguments
        ---------
        source : str, Path, bytes or binary file object
            With any sample rate and length, and any number of channels (their mean is used); docs/inputs.md lists the
            formats. Memory does not grow with the length.

        Returns
        -------
        Prediction

        Raises
        ------
        AudioError
            If the file cannot be classified: it is undecodable, empty, non-finite, out of range or silent, or a window
            is too long for the encoder ("too long"). "non-finite" also means that the network returned NaN.
        """
        lost = []
        return self.predict_blocks(codecs.stream(plain(source), BLOCK_SECONDS, lost), name_of(source), lost=lost)

    def predict(self, wave, sample_rate):
        """Classify one recording.

        Arguments
        ---------
        wave : (samples,), (samples, channels) or (channels, samples) np.ndarray or torch.Tensor
            Floats with full scale 1, or integers; the shorter axis is the channels. See
            `accent_plugin.audio.samples.samples_from_array`.
        sample_rate : float
            In hertz.

        Returns
        -------
        Prediction

        Raises
        ------
        AudioError
            As in `predict_file`.
        """
        return self._predict_arrays([samples_from_array(_as_array(wave), sample_rate)])[0]

    def predict_batch(self, waves, sample_rate=SAMPLE_RATE):
        """Classify several recordings; each prediction is independent of the other recordings.

        Arguments
        ---------
        waves : sequence of np.ndarray or torch.Tensor
            Each as in `predict`, of any length, or a (batch, samples) array.
        sample_rate : float
            In hertz, for all recordings.

        Returns
        -------
        list of Prediction

        Raises
        ------
        AudioError
            If a recording cannot be classified; the error names its index.
        """
        arrays = []
        for number, wave in enumerate(waves):
            try:
                arrays.append(samples_from_array(_as_array(wave), sample_rate))
            except AudioError as error:
                raise AudioError(error.reason, f"waves[{number}]: {error}") from None
        return self._predict_arrays(arrays)

    def predict_files(self, sources, workers=None, batch_seconds=None):
        """Classify many files; threads decode ahead, and batches contain clips of similar length.

        Arguments
        ---------
        sources : iterable
            Each as in `predict_file`. The threads draw from it one item at a time, on demand.
        workers : int
            Number of decoding threads; None for one per core.
        batch_seconds : float
            As in `InferenceOptions`; None uses the value given there. Eight times as much audio is prefetched before
            the first prediction, so that the batches, and therefore the last digits of the probabilities, do not depend
            on the timing of the threads.

        Returns
        -------
        iterator of Prediction or Failure
            One for each source, in order. If you stop early, call `close` to end the threads.

        Raises
        ------
        ConfigError
            When `workers` or `batch_seconds` is not positive.
        """
        workers = min(_MOST_WORKERS, os.cpu_count() or 1) if workers is None else workers
        batch_seconds = self.batch_seconds if batch_seconds is None else batch_seconds
        for name, value in (("workers", workers), ("batch_seconds", batch_seconds)):
            if not value > 0:
                raise ConfigError(f"{name} is {value!r}: give a positive number")
        return self._predict_many(sources, workers, batch_seconds)

    def _predict_many(self, sources, workers, batch_seconds):
        ahead = Prefetcher(sources, workers, _BATCHES_AHEAD * batch_seconds)
        try:
            while items := ahead.take(_BATCHES_AHEAD * batch_seconds):
                short = [item for item in items if isinstance(item, SourceAudio) and item.rest is None]
                recordings, jobs = self._cut([item.blocks[0] for item in short])
                self.score(jobs, batch_seconds)
                recordings = iter(recordings)
                for item in items:
                    if isinstance(item, Failure):
                        yield item
                    elif item.rest is None:
                        yield or_failure(item.source, self.answer, [next(recordings)], item.source, item.lost)
                    else:
                        blocks = itertools.chain(item.blocks, item.rest)
                        yield or_failure(
                            item.source, self.predict_blocks, blocks, item.source, batch_seconds, item.lost
                        )
        finally:
            ahead.close()

    def _predict_arrays(self, arrays):
        """Classify (samples,) arrays at 16 kHz."""
        recordings, jobs = self._cut(arrays)
        self.score(jobs)
        return [self.answer([recording]) for recording in recordings]

    def _cut(self, arrays):
        """Cut (samples,) arrays at 16 kHz; returns the recordings and the jobs of all their windows."""
        recordings = [self.make_recording() for _ in arrays]
        jobs = [job for recording, wave in zip(recordings, arrays, strict=True) for job in recording.feed(wave, True)]
        return recordings, jobs

    def predict_blocks(self, blocks, source=None, batch_seconds=None, lost=()):
        """Classify one recording in blocks; the next block is decoded while the network runs.

        Arguments
        ---------
        blocks : iterable of (samples,) np.ndarray
            At 16 kHz, from `accent_plugin.audio.codecs.stream`.
        source : str, or None
            Its name.
        batch_seconds : float
            As in `predict_files`.
        lost : list of accent_plugin.audio.samples.Loss
            What could not be decoded; complete when `blocks` ends.

        Returns
        -------
        Prediction

        Raises
        ------
        AudioError
            As in `predict_file`, and any error that `blocks` raises.
        """
        recording, jobs = self.make_recording(), []
        enough = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
        with contextlib.closing(one_ahead(blocks)) as blocks:
            for block in blocks:
                jobs += recording.feed(block)
                if sum(len(job.samples) for job in jobs) >= enough:
                    self.score(jobs, batch_seconds)
                    jobs = []
        jobs += recording.feed(np.zeros(0, np.float32), last=True)
        self.score(jobs, batch_seconds)
        return self.answer([recording], source, lost)

    def make_recording(self, offset=0):
        """Create the windows of a recording, or of a segment that starts `offset` samples after the recording."""
        window, hop = round(self.window_seconds * SAMPLE_RATE), round(self.hop_seconds * SAMPLE_RATE)
        return RecordingWindows(window, hop, offset)

    def score(self, jobs, batch_seconds=None):
        """Score the windows of jobs and pass the scores to their recordings."""
        if self._batcher is not None:
            batches, score = [jobs], self._batcher.score
        else:
            most = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
            groups = buckets([len(job.samples) for job in jobs], most)
            batches, score = [[jobs[index] for index in indices] for indices in groups], self._score_batch
        for batch in batches:
            for job, scores in zip(batch, score([job.samples for job in batch]), strict=True):
                job.recording.collect(job.start, scores)

    def _score_batch(self, windows):
        """Return the log-probabilities of each (samples,) window, or an `AudioError` if the window is too long.

        No other function calls the network.
        """
        try:
            return list(self._log_probabilities(windows))
        except AudioError as error:
            half = len(windows) // 2
            return self._score_batch(windows[:half]) + self._score_batch(windows[half:]) if half else [error]

    def _log_probabilities(self, waves):
        """Map (samples,) float32 arrays at 16 kHz, longest first, to (batch, classes) log-probabilities in float64.

        Raises
        ------
        AudioError
            "too long" if the longest array is too long for the encoder.
        """
        raise NotImplementedError

    def answer(self, recordings, source=None, lost=()):
        """Answer one recording, or several that have the same speaker, from all their windows, weighted by length."""
        if refused := next((recording.refused for recording in recordings if recording.refused), None):
            raise refused
        parts = [(recording.offset, recording.outcome()) for recording in recordings]
        counted = [
            (part.scores[start], end - start) for _, part in parts for start, end in part.spans if start in part.counted
        ]
        scores, lengths = zip(*counted, strict=True)
        # Normalise again in double precision, so that the probabilities sum to one up to rounding.
        with np.errstate(invalid="ignore"):
            mean = np.exp(log_softmax(np.average(scores, axis=0, weights=lengths)))
        if not np.isfinite(mean).all():
            raise AudioError(
                NON_FINITE,
                "the network returns scores that are not finite: the model is damaged",
            )
        best = int(mean.argmax())
        accent, probability = self.labels[best], float(mean[best])
        decided = self.threshold is None or probability >= self.threshold
        speech = sum(part.speech_samples for _, part in parts)
        return Prediction(
            accent=accent,
            decision=accent if decided else None,
            probability=probability,
            probabilities=self._named(mean),
            seconds=sum(part.samples for _, part in parts) / SAMPLE_RATE,
            speech_seconds=speech / SAMPLE_RATE,
            reliable=speech >= RELIABLE_SECONDS * SAMPLE_RATE,
            source=source,
            windows=tuple(
                Window(
                    (offset + start) / SAMPLE_RATE,
                    (offset + end) / SAMPLE_RATE,
                    self._named(np.exp(log_softmax(part.scores[start]))) if start in part.counted else None,
                )
                for offset, part in parts
                for start, end in part.spans
            ),
            lost=tuple(lost),
        )

    def _named(self, probabilities):
        return dict(zip(self.labels, probabilities.tolist(), strict=True))


def or_failure(source, work, *arguments):
    """Return the result of `work`, or a `Failure` with the reason."""
    try:
        return work(*arguments)
    except AudioError as error:
        return Failure(source, error.reason, str(error))


def buckets(lengths, most):
    """Yield batches of indices of similar lengths, longest first, with at most `most` padded samples or one item."""
    batch, total, longest = [], 0, 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = (len(batch) + 1) * longest
        if batch and (padded > most or padded > _PADDING * (total + lengths[index])):
            yield batch
            batch, total = [], 0
        if not batch:
            longest = lengths[index]
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def _as_array(wave):
    """Convert a NumPy array, a torch tensor or a list to an array."""
    if isinstance(wave, str | bytes | os.PathLike):
        raise AudioError(UNDECODABLE, f"{type(wave).__name__} is not an array of samples: use predict_file for files")
    if hasattr(wave, "detach"):
        # A torch tensor. torch is not imported here, because some classifiers run without it.
        wave = wave.detach().cpu()
        return (wave.float() if str(wave.dtype) == "torch.bfloat16" else wave).numpy()
    try:
        return np.asarray(wave)
    except (TypeError, ValueError) as error:
        raise AudioError(UNDECODABLE, f"{type(wave).__name__} is not an array of samples: {error}") from None


def _is_number(value):
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _find_threshold(calibration, min_probability, max_risk, min_coverage):
    """Return the smallest probability that is answered; None answers always."""
    if max_risk is None and min_coverage is None:
        return min_probability
    name, wanted = ("max_risk", max_risk) if max_risk is not None else ("min_coverage", min_coverage)
    curve = (calibration or {}).get("curve") or {}
    columns = (curve.get(key) or [] for key in ("threshold", "coverage", "risk"))
    # Without answers, the risk is undefined.
    points = [point for point in zip(*columns, strict=True) if point[1] > 0 and point[2] is not None]
    if not points:
        raise ConfigError(
            f"{name} is {wanted:g}, but the bundle was not calibrated: train with a validation split, or give "
            "min_probability"
        )
    if name == "max_risk":
        enough = [threshold for threshold, _, risk in points if risk <= wanted]
        if not enough:
            _, coverage, risk = min(points, key=lambda point: point[2])
            raise ConfigError(
                f"max_risk is {wanted:g}, but the lowest risk that validation reached is {risk:.3g}, "
                f"with a coverage of {coverage:.3g}: give that or more"
            )
        return min(enough)
    enough = [threshold for threshold, coverage, _ in points if coverage >= wanted]
    if not enough:
        raise ConfigError(
            f"min_coverage is {wanted:g}, but the highest coverage on validation is "
            f"{max(coverage for _, coverage, _ in points):.3g}: give that or less"
        )
    return max(enough)
