"""Classify speech of any kind and length with a trained bundle.

Three doors, one corridor: files, samples and batches become recordings; recordings become windows; windows go through
the network in batches of similar length; the scores of a recording's windows become one `Prediction`.

Times are in seconds from a recording's start. A recording as long as a window or shorter is one window; a longer one
has windows at multiples of the hop and one that ends where the recording ends. Windows count equally: their
log-probabilities are averaged and normalised anew. Which windows count: `accent_plugin.inference.windows`.
"""

import contextlib
import itertools
import os
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import NON_FINITE, SAMPLE_RATE, UNDECODABLE, samples_from_array
from accent_plugin.errors import AudioError, ConfigError
from accent_plugin.inference.batcher import DynamicBatcher
from accent_plugin.inference.prefetch import BLOCK_SECONDS, Prefetcher, SourceAudio, name_of, one_ahead, plain
from accent_plugin.inference.records import RELIABLE_SECONDS, Failure, Prediction, Window
from accent_plugin.inference.windows import RecordingWindows

# Batches whose clips are chosen by length from what has been read ahead.
_BATCHES_AHEAD = 8


# Padding may make a batch longer by this factor; more of it costs more than another call.
_PADDING = 1.2


_MOST_WORKERS = 8


# On a processor larger batches are hardly faster.
_BATCH_SECONDS = {"cpu": 20.0}


_BATCH_SECONDS_ELSEWHERE = 60.0


@dataclass(frozen=True)
class InferenceOptions:
    """How recordings are cut, and when to abstain.

    Arguments
    ---------
    window_seconds : float
        Recordings longer than this are classified in windows of this length.
    hop_seconds : float
        From the start of one window to the next.
    batch_seconds : float
        Audio in one call of the network, padding included; a longer window goes alone. None for 60 on an accelerator
        and 20 on a processor, where more costs memory and gains little.
    min_probability, max_risk, min_coverage : float
        When to abstain; at most one of them. Decide only where the probability is at least `min_probability`; or at
        the threshold where, on the validation split, at most `max_risk` of the decided clips were wrong (the smallest
        such threshold, which decides most); or at the largest threshold at which `min_coverage` of the clips were
        decided.
    """

    window_seconds: float = 10.0
    hop_seconds: float = 5.0
    batch_seconds: float | None = None
    min_probability: float | None = None
    max_risk: float | None = None
    min_coverage: float | None = None

    def problems(self):
        """Yield what is wrong with them."""
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
                yield f"{name} is {value!r}: give a share from 0 to 1"


class RecordingClassifier:
    """From recordings of any kind to answers, whatever the network runs on: that is in `_log_probabilities`."""

    _batcher = None

    def _set_up(self, config, options, device_type="cpu"):
        """Keep a bundle's configuration and the `Options`, which have no problems."""
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
        """Twelve digits that stand for the weights."""
        return self.config["weights"]["sha256"][:12]

    def enable_batching(self):
        """From now on, take what several threads ask for through the network in common batches.

        An answer does not depend on what else is in its batch.

        Returns
        -------
        accent_plugin.inference.batcher.DynamicBatcher
            To count batches, or to give up in time.
        """
        if self._batcher is None:
            self._batcher = DynamicBatcher(
                self._score_batch, lambda lengths: _buckets(lengths, self.batch_seconds * SAMPLE_RATE)
            )
        return self._batcher

    def predict_file(self, source):
        """Classify one file.

        Arguments
        ---------
        source : str, Path, bytes or binary file object
            wav, flac, mp3, ogg or opus; any rate, any number of channels (their mean is taken), any length: memory
            does not grow with it.

        Returns
        -------
        Prediction

        Raises
        ------
        AudioError
            When there is nothing to classify: undecodable, empty, non-finite or silent; "too long" where the encoder
            cannot take a window of this length, "non-finite" also where the network's scores are no numbers.
        """
        return self.predict_blocks(codecs.stream(plain(source), BLOCK_SECONDS), name_of(source))

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
        """Classify recordings; the answer for each is the same whatever the others are.

        Arguments
        ---------
        waves : sequence of np.ndarray or torch.Tensor
            Each as in `predict`, of any length, or a (batch, samples) array.
        sample_rate : float
            Of all of them, in hertz.

        Returns
        -------
        list of Prediction

        Raises
        ------
        AudioError
            When one cannot be classified; it says which.
        """
        arrays = []
        for number, wave in enumerate(waves):
            try:
                arrays.append(samples_from_array(_as_array(wave), sample_rate))
            except AudioError as error:
                raise AudioError(error.reason, f"waves[{number}]: {error}") from None
        return self._predict_arrays(arrays)

    def predict_files(self, sources, workers=None, batch_seconds=None):
        """Classify many files: threads decode ahead of the network, and batches are made of similar lengths.

        Arguments
        ---------
        sources : iterable
            Each as in `predict_file`. Drawn as they are needed, by the threads, one at a time.
        workers : int
            Threads that decode; None for one per core.
        batch_seconds : float
            As in the class; None for what was said there. Eight times as much is read before the first answer, so that
            the batches, and with them the last digits of the answers, do not depend on the threads.

        Returns
        -------
        iterator of Prediction or Failure
            One for each source, in their order. Whoever leaves it early should `close` it, which ends the threads.

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
                self._score(jobs, batch_seconds)
                recordings = iter(recordings)
                for item in items:
                    if isinstance(item, Failure):
                        yield item
                    elif item.rest is None:
                        yield _or_failure(item.source, self._answer, next(recordings), item.source)
                    else:
                        blocks = itertools.chain(item.blocks, item.rest)
                        yield _or_failure(item.source, self.predict_blocks, blocks, item.source, batch_seconds)
        finally:
            ahead.close()

    def _predict_arrays(self, arrays):
        """Classify (samples,) arrays at 16 kHz."""
        recordings, jobs = self._cut(arrays)
        self._score(jobs)
        return [self._answer(recording, None) for recording in recordings]

    def _cut(self, arrays):
        """Whole recordings of (samples,) arrays at 16 kHz, and the jobs of all their windows."""
        recordings = [self._recording() for _ in arrays]
        jobs = [job for recording, wave in zip(recordings, arrays, strict=True) for job in recording.feed(wave, True)]
        return recordings, jobs

    def predict_blocks(self, blocks, source=None, batch_seconds=None):
        """Classify one recording in blocks, the next of which is made while the network works.

        Arguments
        ---------
        blocks : iterable of (samples,) np.ndarray
            At 16 kHz, as `accent_plugin.audio.codecs.stream` yields them.
        source : str, or None
            Its name.
        batch_seconds : float
            As in `predict_files`.

        Returns
        -------
        Prediction

        Raises
        ------
        AudioError
            As in `predict_file`, and what the blocks raise.
        """
        recording, jobs = self._recording(), []
        enough = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
        with contextlib.closing(one_ahead(blocks)) as blocks:
            for block in blocks:
                jobs += recording.feed(block)
                if sum(len(job.samples) for job in jobs) >= enough:
                    self._score(jobs, batch_seconds)
                    jobs = []
        jobs += recording.feed(np.zeros(0, np.float32), last=True)
        self._score(jobs, batch_seconds)
        return self._answer(recording, source)

    def _recording(self):
        return RecordingWindows(round(self.window_seconds * SAMPLE_RATE), round(self.hop_seconds * SAMPLE_RATE))

    def _score(self, jobs, batch_seconds=None):
        """Score the windows of jobs; their recordings collect the scores."""
        if self._batcher is not None:
            _collect(jobs, self._batcher.score([job.samples for job in jobs]))
            return
        most = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
        for indices in _buckets([len(job.samples) for job in jobs], most):
            batch = [jobs[index] for index in indices]
            _collect(batch, self._score_batch([job.samples for job in batch]))

    def _score_batch(self, windows):
        """Log-probabilities of each (samples,) window, or the `AudioError` of one that the network cannot take.

        No other function calls the network.
        """
        try:
            return list(self._log_probabilities(windows))
        except AudioError as error:
            half = len(windows) // 2
            return self._score_batch(windows[:half]) + self._score_batch(windows[half:]) if half else [error]

    def _log_probabilities(self, waves):
        """Log-probabilities (batch, classes) in float64 of (samples,) arrays of float32 at 16 kHz, longest first.

        Raises
        ------
        AudioError
            "too long" where the longest is too long for the encoder.
        """
        raise NotImplementedError

    def _answer(self, recording, source):
        if recording.refused is not None:
            raise recording.refused
        heard = recording.outcome()
        counted = set(heard.counted)
        # Normalised once more in double precision, so that probabilities sum to one as exactly as floats can.
        with np.errstate(invalid="ignore"):
            mean = np.exp(log_softmax(np.mean([heard.scores[start] for start in heard.counted], axis=0)))
        if not np.isfinite(mean).all():
            raise AudioError(
                NON_FINITE,
                "the network gives scores that are no numbers: the samples are far beyond full scale, or the model is "
                "damaged",
            )
        best = int(mean.argmax())
        accent, probability = self.labels[best], float(mean[best])
        decided = self.threshold is None or probability >= self.threshold
        return Prediction(
            accent=accent,
            decision=accent if decided else None,
            probability=probability,
            probabilities=self._named(mean),
            seconds=heard.samples / SAMPLE_RATE,
            speech_seconds=heard.speech_samples / SAMPLE_RATE,
            reliable=heard.speech_samples >= RELIABLE_SECONDS * SAMPLE_RATE,
            source=source,
            windows=tuple(
                Window(
                    start / SAMPLE_RATE,
                    end / SAMPLE_RATE,
                    self._named(np.exp(log_softmax(heard.scores[start]))) if start in counted else None,
                )
                for start, end in heard.spans
            ),
        )

    def _named(self, probabilities):
        return dict(zip(self.labels, probabilities.tolist(), strict=True))


def _collect(jobs, scores):
    for job, row in zip(jobs, scores, strict=True):
        job.recording.collect(job.start, row)


def _or_failure(source, work, *arguments):
    """What the work gives, or why there is nothing."""
    try:
        return work(*arguments)
    except AudioError as error:
        return Failure(source, error.reason, str(error))


def _buckets(lengths, most):
    """Yield batches of indices, longest first: similar lengths, at most `most` samples with padding, or one alone."""
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
    """Samples of NumPy, torch or plain lists as an array."""
    if isinstance(wave, str | bytes | os.PathLike):
        raise AudioError(UNDECODABLE, f"{type(wave).__name__} is no array of samples; predict_file takes files")
    if hasattr(wave, "detach"):
        # A tensor of torch, which is not imported here: some classifiers run without it.
        wave = wave.detach().cpu()
        return (wave.float() if str(wave.dtype) == "torch.bfloat16" else wave).numpy()
    try:
        return np.asarray(wave)
    except (TypeError, ValueError) as error:
        raise AudioError(UNDECODABLE, f"{type(wave).__name__} is no array of samples: {error}") from None


def _is_number(value):
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _find_threshold(calibration, min_probability, max_risk, min_coverage):
    """Probability from which on to decide; None for always."""
    if max_risk is None and min_coverage is None:
        return min_probability
    name, wanted = ("max_risk", max_risk) if max_risk is not None else ("min_coverage", min_coverage)
    curve = (calibration or {}).get("curve") or {}
    columns = (curve.get(key) or [] for key in ("threshold", "coverage", "risk"))
    # Where nothing was decided there is no risk to speak of.
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
                f"with a coverage of {coverage:.3g}: ask for that or more"
            )
        return min(enough)
    enough = [threshold for threshold, coverage, _ in points if coverage >= wanted]
    if not enough:
        raise ConfigError(
            f"min_coverage is {wanted:g}, but the highest of the calibration is "
            f"{max(coverage for _, coverage, _ in points):.3g}: ask for that or less"
        )
    return max(enough)
