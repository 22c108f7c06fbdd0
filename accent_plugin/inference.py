"""Classify speech of any kind and length with a trained bundle.

Three doors, one corridor: files, samples and batches become recordings; recordings become windows; windows go through
the network in batches of similar length; the scores of a recording's windows become one `Prediction`.

Conventions. Times are in seconds from a recording's start, levels in dB of full scale (a frame's variance, so that a
constant offset has none). A recording as long as a window or shorter is one window; a longer one has windows at
multiples of the hop and one that ends where the recording ends. Windows count equally: their log-probabilities are
averaged and normalised anew. A window in which there is hardly any speech does not count, unless that is so of all;
then the most powerful one does.
"""

import contextlib
import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.special import log_softmax
from speechbrain.inference.classifiers import EncoderClassifier
from torch import nn

from accent_plugin import audio, bundle
from accent_plugin.audio import SAMPLE_RATE
from accent_plugin.errors import AudioError, ConfigError

PRECISIONS = ("fp32", "bf16", "auto")

# Below this much speech an answer is a guess.
RELIABLE_SECONDS = 1.0

# Frames of the gate, in samples: 25 ms every 10 ms, summed from cells of 5 ms.
_FRAME, _STEP, _CELL = 400, 160, 80
# Quieter than any speech that was recorded on purpose.
_FLOOR_DB = -60.0
_RANGE_DB = 40.0
# The loudest frames are a recording's loudest half second, so that a click is not taken for its speech.
_LOUDEST_FRAMES = 50
_LOUDEST_SHARE = 10
# Least share of a window's frames that has to be speech: half a second of ten.
_SPEECH_SHARE = 0.05

# Longer files are streamed, in blocks of so many seconds.
_BLOCK_SECONDS = 60.0
# Batches whose clips are chosen by length from what has been read ahead.
_BATCHES_AHEAD = 8
# Padding may make a batch longer by this factor; more of it costs more than another call.
_PADDING = 1.2
_MOST_WORKERS = 8
_LEAST_SECONDS = 0.1
_PATIENCE_SECONDS = 1.0
# On a processor larger batches are hardly faster.
_BATCH_SECONDS = {"cpu": 20.0}
_BATCH_SECONDS_ELSEWHERE = 60.0


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, in seconds, and its own probabilities; None where it holds too little speech."""

    start: float
    end: float
    probabilities: dict | None

    @property
    def skipped(self):
        """Whether the window has no part in the answer."""
        return self.probabilities is None


@dataclass(frozen=True)
class Prediction:
    """What was heard in one recording.

    Arguments
    ---------
    accent : str
        The likeliest.
    decision : str
        The same, or None where the classifier abstains.
    probability : float
        Of `accent`.
    probabilities : dict
        Accent -> probability, in the classifier's order.
    seconds : float
        Length of the recording.
    speech_seconds : float
        How much of it is speech, by its energy.
    reliable : bool
        Whether that is at least `RELIABLE_SECONDS`.
    source : str
        The file's name; None for samples.
    windows : tuple of Window
        In order of time.

    Example
    -------
    >>> print(Prediction("us", "us", 0.834, {"us": 0.834, "england": 0.166}, 4.0, 3.1, True))
    us (0.83)
    """

    accent: str
    decision: str | None
    probability: float
    probabilities: dict
    seconds: float
    speech_seconds: float
    reliable: bool
    source: str | None = None
    windows: tuple = field(default=(), repr=False)

    def __str__(self):
        answer = f"{self.accent} ({self.probability:.2f})"
        return answer if self.decision is not None else f"undecided: {answer}"


@dataclass(frozen=True)
class Failure:
    """A file that gave no prediction: its name, a short reason to count by, and a sentence for a person."""

    source: str | None
    reason: str
    message: str

    def __str__(self):
        return f"{self.reason}: {self.message}"


class AccentClassifier(EncoderClassifier):
    """SpeechBrain's `EncoderClassifier` for a bundle of this package, with answers instead of tensors.

    Make it with `from_bundle`, or with SpeechBrain's `from_hparams`, which runs the bundle's YAML and takes the same
    options. May be used by several threads; they take turns at the network.

    Arguments
    ---------
    modules, hparams, run_opts, freeze_params
        As in SpeechBrain's `Pretrained`; `hparams` has the "bundle_config".
    window_seconds : float
        Recordings longer than this are classified in windows of this length.
    hop_seconds : float
        From the start of one window to the next.
    batch_seconds : float
        Audio in one call of the network, padding included; a longer window goes alone. None for 60 on an accelerator
        and 20 on a processor, where more costs memory and gains little.
    precision : str
        "fp32", "bf16", or "auto": bf16 where the device is faster with it, which a processor is asked once.
    min_probability, max_risk, min_coverage : float
        When to abstain; at most one of them. Decide only where the probability is at least `min_probability`; or at
        the threshold where, on the validation split, at most `max_risk` of the decided clips were wrong (the smallest
        such threshold, which decides most); or at the largest threshold at which `min_coverage` of the clips were
        decided.

    Raises
    ------
    ConfigError
        With all the options that are wrong.
    """

    def __init__(
        self,
        modules=None,
        hparams=None,
        run_opts=None,
        freeze_params=True,
        *,
        window_seconds=10.0,
        hop_seconds=5.0,
        batch_seconds=None,
        precision="fp32",
        min_probability=None,
        max_risk=None,
        min_coverage=None,
    ):
        config = _read_config(hparams)
        abstaining = {"min_probability": min_probability, "max_risk": max_risk, "min_coverage": min_coverage}
        problems = list(_problems(window_seconds, hop_seconds, batch_seconds, precision, abstaining))
        if problems:
            raise ConfigError("\n".join(problems))
        threshold = _find_threshold(config.get("calibration"), **abstaining)
        super().__init__(modules=modules, hparams=hparams, run_opts=run_opts, freeze_params=freeze_params)
        self.config = config
        self.labels, self.calibration = tuple(config["labels"]), config.get("calibration")
        self.threshold = threshold
        self.window_seconds, self.hop_seconds = float(window_seconds), float(hop_seconds)
        if batch_seconds is None:
            batch_seconds = _BATCH_SECONDS.get(self.device_type, _BATCH_SECONDS_ELSEWHERE)
        self.batch_seconds = float(batch_seconds)
        self.uses_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(self.device_type))
        if self.uses_bf16 and isinstance(self.mods["embedding_model"], bundle.Embedding):
            _cast_weights(self.mods["embedding_model"].model.wav2vec2)
        # The encoder keeps the mask of the batch that it is in the middle of.
        self._turn = threading.Lock()

    @classmethod
    def from_bundle(cls, folder, device=None, **options):
        """Load a bundle; runs no YAML and unpickles nothing.

        Arguments
        ---------
        folder : str or Path
            As training writes it.
        device : str
            Such as "cpu" or "cuda:0"; None for the best there is.
        **options
            Of this class: `window_seconds`, `precision`, `min_probability`, ...

        Raises
        ------
        BundleError
            When the bundle is missing, damaged or not to be trusted.
        ConfigError
            When an option is wrong.
        """
        if device is not None:
            _require_device(device)
        loaded = bundle.load(folder)
        run_opts = None if device is None else {"device": str(device)}
        return cls(modules=loaded.modules, hparams=loaded.hparams, run_opts=run_opts, **options)

    @property
    def identity(self):
        """Twelve digits that stand for the weights."""
        return self.config["weights"]["sha256"][:12]

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
            When there is nothing to classify: undecodable, empty, non-finite or silent.
        """
        return self._predict_stream(audio.stream(_plain(source), _BLOCK_SECONDS), _name(source))

    def predict(self, wave, sample_rate):
        """Classify one recording.

        Arguments
        ---------
        wave : (samples,), (samples, channels) or (channels, samples) np.ndarray or torch.Tensor
            Floats with full scale 1, or integers; the shorter axis is the channels. See
            `accent_plugin.audio.from_array`.
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
        return self._predict_arrays([audio.from_array(_as_array(wave), sample_rate)])[0]

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
                arrays.append(audio.from_array(_as_array(wave), sample_rate))
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
        ahead = _ReadAhead(sources, workers, _BATCHES_AHEAD * batch_seconds)
        try:
            while items := ahead.take(_BATCHES_AHEAD * batch_seconds):
                short = [item for item in items if isinstance(item, _Sound) and item.rest is None]
                predictions = iter(self._predict_arrays([item.blocks[0] for item in short], batch_seconds))
                for item in items:
                    if isinstance(item, Failure):
                        yield item
                    elif item.rest is None:
                        yield replace(next(predictions), source=item.source)
                    else:
                        yield self._predict_or_fail(item, batch_seconds)
        finally:
            ahead.close()

    def _predict_or_fail(self, item, batch_seconds):
        blocks = itertools.chain(item.blocks, item.rest)
        try:
            return self._predict_stream(blocks, item.source, batch_seconds)
        except AudioError as error:
            return Failure(item.source, error.reason, str(error))

    def _predict_arrays(self, arrays, batch_seconds=None):
        """Classify (samples,) arrays at 16 kHz."""
        recordings = [self._recording() for _ in arrays]
        jobs = []
        for recording, samples in zip(recordings, arrays, strict=True):
            jobs += recording.hear(samples, last=True)
        self._score(jobs, batch_seconds)
        return [self._answer(recording, None) for recording in recordings]

    def _predict_stream(self, blocks, source, batch_seconds=None):
        """Classify one recording from blocks of (samples,) at 16 kHz; they are decoded while the network works."""
        recording, jobs = self._recording(), []
        enough = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
        with contextlib.closing(_one_ahead(blocks)) as blocks:
            for block in blocks:
                jobs += recording.hear(block)
                if sum(len(job.samples) for job in jobs) >= enough:
                    self._score(jobs, batch_seconds)
                    jobs = []
        jobs += recording.hear(np.zeros(0, np.float32), last=True)
        self._score(jobs, batch_seconds)
        return self._answer(recording, source)

    def _recording(self):
        return _Recording(round(self.window_seconds * SAMPLE_RATE), round(self.hop_seconds * SAMPLE_RATE))

    def _score(self, jobs, batch_seconds=None):
        """Give each job's recording the log-probabilities of its window: the only place that calls the network."""
        most = (self.batch_seconds if batch_seconds is None else batch_seconds) * SAMPLE_RATE
        for batch in _buckets([len(job.samples) for job in jobs], most):
            chosen = [jobs[index] for index in batch]
            longest = max(len(job.samples) for job in chosen)
            wavs = torch.zeros(len(chosen), longest)
            for row, job in zip(wavs, chosen, strict=True):
                row[: len(job.samples)] = torch.from_numpy(job.samples)
            lens = torch.tensor([len(job.samples) / longest for job in chosen])
            scores = self._log_probabilities(wavs, lens)
            for job, row in zip(chosen, scores, strict=True):
                job.recording.scores[job.start] = row

    def _log_probabilities(self, wavs, lens):
        autocast = torch.autocast(self.device_type, torch.bfloat16, enabled=self.uses_bf16)
        try:
            with self._turn, torch.inference_mode(), autocast:
                log_probabilities = self.classify_batch(wavs, lens)[0]
        except AudioError as error:
            if error.reason != audio.TOO_LONG:
                raise
            raise ConfigError(
                f"window_seconds is {self.window_seconds:g}, too long for this encoder: {error}"
            ) from None
        return log_probabilities.double().cpu().numpy()

    def _answer(self, recording, source):
        heard = recording.outcome()
        counted = set(heard.counted)
        # Normalised once more in double precision, so that probabilities sum to one as exactly as floats can.
        mean = np.exp(log_softmax(np.mean([heard.scores[start] for start in heard.counted], axis=0)))
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


def frame_levels(samples, frames):
    """Level of each frame.

    Arguments
    ---------
    samples : (samples,) np.ndarray
    frames : int
        Frame i covers 25 ms from i times 10 ms on, or what there is of them.

    Returns
    -------
    (frames,) np.ndarray of float32
        Variance in dB of full scale.
    """
    if not frames:
        return np.zeros(0, np.float32)
    per_frame, per_step = _FRAME // _CELL, _STEP // _CELL
    cells = per_step * (frames - 1) + per_frame
    samples = samples[: cells * _CELL]
    sizes = np.clip(len(samples) - _CELL * np.arange(cells), 0, _CELL)
    samples = np.pad(samples, (0, cells * _CELL - len(samples))).reshape(cells, _CELL)
    sums = samples.sum(axis=1, dtype=np.float64)
    squares = np.einsum("ij,ij->i", samples, samples, dtype=np.float64)

    def over_frames(values):
        return np.lib.stride_tricks.sliding_window_view(values, per_frame)[::per_step].sum(axis=1)

    count = over_frames(sizes)
    variance = over_frames(squares) / count - np.square(over_frames(sums) / count)
    return (10 * np.log10(np.maximum(variance, 1e-20))).astype(np.float32)


def _cast_weights(encoder):
    """Hold the weights of linear layers in bf16: autocast would cast them anew in every call."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear) and not nn.utils.parametrize.is_parametrized(module):
            module.to(torch.bfloat16)


@functools.cache
def bf16_is_faster(device_type):
    """Whether the device is faster with bf16: a few layers like an encoder's, timed once per process."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    wide, flat = torch.zeros(1, 256, 1600), torch.zeros(256, 512)
    weights = {
        kind: (torch.zeros(256, 256, 3, dtype=kind), torch.zeros(1024, 512, dtype=kind))
        for kind in (torch.float32, torch.bfloat16)
    }

    def took(kernel, weight):
        start = time.perf_counter()
        for _ in range(3):
            torch.nn.functional.conv1d(wide, kernel, stride=2)
            torch.nn.functional.linear(flat, weight)
        return time.perf_counter() - start

    best = {}
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            # The first calls prepare the kernels; the least of several is what no other process disturbed.
            best[enabled] = min([took(*weights[torch.bfloat16 if enabled else torch.float32]) for _ in range(6)][1:])
    # Where it is about the same, exactness is worth more.
    return best[True] < 0.8 * best[False]


@dataclass(frozen=True)
class _Job:
    recording: "_Recording"
    start: int
    samples: np.ndarray


@dataclass(frozen=True)
class _Outcome:
    """All that is known of a recording at its end, in samples; `counted` are the starts of windows that count."""

    samples: int
    speech_samples: int
    spans: tuple
    counted: tuple
    scores: dict


class _Recording:
    """One recording while it is heard, block by block; holds little more than a window and a block of samples.

    The gate's threshold follows the loudest frames so far. It can only rise, so a window without speech by it will be
    without speech in the end, and is never scored; which of the others count is decided in the end, by the whole
    recording. So the answer does not depend on the blocks.
    """

    def __init__(self, window, hop):
        self._window, self._hop = window, hop
        self._samples = 0
        self._spans = []
        self._next = 0
        self._held, self._held_from = np.zeros(0, np.float32), 0
        self._unframed = np.zeros(0, np.float32)
        self._levels = np.zeros(0, np.float32)
        self._loudest = np.zeros(0, np.float32)
        self._strongest = None
        self.scores = {}

    def hear(self, block, last=False):
        """Take the next (samples,) and give the jobs of windows that may count."""
        self._samples += len(block)
        self._held = _joined(self._held, block)
        self._measure(block, last)
        starts = []
        while self._samples > self._next + self._window:
            starts.append(self._next)
            self._next += self._hop
        if last:
            starts.append(max(0, self._samples - self._window))
        # Of less than five seconds the loudest frames may still become quieter ones.
        settled = last or len(self._levels) >= _LOUDEST_FRAMES * _LOUDEST_SHARE
        threshold = self._threshold() if settled else _FLOOR_DB
        jobs = []
        for start in starts:
            end = min(start + self._window, self._samples)
            self._spans.append((start, end))
            job = _Job(self, start, self._held[start - self._held_from : end - self._held_from])
            if self._has_speech((start, end), threshold):
                jobs.append(job)
            levels = self._levels_in((start, end))
            power = float(np.mean(10 ** (levels.astype(np.float64) / 10))) if len(levels) else 0.0
            if self._strongest is None or power > self._strongest[0]:
                self._strongest = (power, _Job(self, start, job.samples.copy()))
        if starts:
            # The last window may begin as early as just after the one before it.
            self._held, self._held_from = self._held[starts[-1] - self._held_from :], starts[-1]
        strongest = self._strongest
        if last and not any(self._has_speech(span, threshold) for span in self._spans):
            jobs = [] if strongest[1].start in self.scores else [strongest[1]]
        return jobs

    def outcome(self):
        """What counts, now that all of it was heard and scored."""
        threshold = self._threshold()
        counted = [start for start, end in self._spans if self._has_speech((start, end), threshold)]
        # A frame stands for the 10 ms until the next one, so that a recording full of speech has its own length of it.
        shares = np.minimum(_STEP, self._samples - _STEP * np.arange(len(self._levels)))
        return _Outcome(
            samples=self._samples,
            speech_samples=int(shares[self._levels >= threshold].sum()),
            spans=tuple(self._spans),
            counted=tuple(counted or [self._strongest[1].start]),
            scores=self.scores,
        )

    def _measure(self, block, last):
        waiting = _joined(self._unframed, block)
        frames = -(-len(waiting) // _STEP) if last else max(0, (len(waiting) - _FRAME) // _STEP + 1)
        levels = frame_levels(waiting, frames)
        # Copied, because a view would keep the whole block.
        self._unframed = waiting[frames * _STEP :].copy()
        self._levels = _joined(self._levels, levels)
        loudest = _joined(self._loudest, levels)
        self._loudest = np.sort(loudest)[::-1][:_LOUDEST_FRAMES]

    def _threshold(self):
        """Level in dB from which on a frame is speech, by all that was heard."""
        loudest = self._loudest[: max(1, min(_LOUDEST_FRAMES, len(self._levels) // _LOUDEST_SHARE))]
        return max(_FLOOR_DB, float(loudest[-1]) - _RANGE_DB)

    def _levels_in(self, span):
        """Levels of the whole frames inside a stretch (start, end) of samples."""
        start, end = span
        return self._levels[-(-start // _STEP) : max(0, (end - _FRAME) // _STEP + 1)]

    def _has_speech(self, span, threshold):
        levels = self._levels_in(span)
        return len(levels) > 0 and float(np.mean(levels >= threshold)) >= _SPEECH_SHARE


@dataclass(frozen=True)
class _Sound:
    """A decoded file: all of it, or its beginning and, for a long one, the generator of the `rest`."""

    source: str | None
    blocks: tuple
    rest: object = None

    @property
    def seconds(self):
        return sum(map(len, self.blocks)) / SAMPLE_RATE


class _ReadAhead:
    """Decode sources in threads, in any order, and give them back in theirs.

    The threads pause while `seconds` of audio wait to be taken; on top of that each holds what it is decoding.
    """

    def __init__(self, sources, workers, seconds):
        self._sources, self._seconds = iter(sources), seconds
        self._changed = threading.Condition()
        self._ready, self._waiting = {}, 0.0
        self._drawn = self._taken = 0
        self._ended = False
        self._drawing = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def take(self, seconds):
        """The next items, `_Sound` or `Failure`: just as many as last so long together, or all that are left."""
        taken, total = [], 0.0
        while total < seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._taken in self._ready or (self._ended and self._is_last()))
                if self._taken not in self._ready:
                    break
                item = self._ready[self._taken]
                if isinstance(item, BaseException):
                    if taken:
                        # What came before it is answered first.
                        break
                    raise item
                del self._ready[self._taken]
                self._taken += 1
                self._waiting -= _seconds(item)
                self._changed.notify_all()
            taken.append(item)
            total += _seconds(item)
        return taken

    def close(self):
        """End the threads; what they are decoding is finished first."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            drawing = self._drawing
        for thread in self._threads:
            # One that waits for the caller's iterator may wait for ever.
            thread.join(timeout=_PATIENCE_SECONDS if thread is drawing else None)
        for item in self._ready.values():
            if isinstance(item, _Sound) and item.rest is not None:
                item.rest.close()
        self._ready.clear()

    def _is_last(self):
        return self._taken >= self._drawn and self._drawing is None

    def _work(self):
        while (drawn := self._draw()) is not None:
            number, source = drawn
            self._put(number, _decode(source))

    def _draw(self):
        """The next number and source, or None at the end; only one thread at a time is in the caller's iterator."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (self._drawing is None and self._waiting < self._seconds))
            if self._ended:
                return None
            self._drawing = threading.current_thread()
        source, error, ended = None, None, False
        try:
            source = next(self._sources)
        except StopIteration:
            ended = True
        except BaseException as raised:
            # It belongs to the one who waits for the answers, not to this thread.
            error, ended = raised, True
        with self._changed:
            number = self._drawn
            self._drawn += error is not None or not ended
            self._drawing = None
            # Closed in the meantime, or at the end.
            ended = self._ended = self._ended or ended
            if error is not None:
                self._ready[number] = error
            self._changed.notify_all()
        return None if ended else (number, source)

    def _put(self, number, item):
        with self._changed:
            self._ready[number] = item
            self._waiting += _seconds(item)
            self._changed.notify_all()


def _seconds(item):
    """What an item counts for; failures and files of almost no length are not to pile up without end."""
    return max(_LEAST_SECONDS, item.seconds if isinstance(item, _Sound) else 0.0)


def _decode(source):
    """Decode a source as far as two blocks; gives a `_Sound`, a `Failure`, or an exception that is nobody's audio."""
    name = _name(source)
    try:
        blocks = audio.stream(_plain(source), _BLOCK_SECONDS)
        first = next(blocks)
        second = next(blocks, None)
        return _Sound(name, (first,)) if second is None else _Sound(name, (first, second), blocks)
    except AudioError as error:
        return Failure(name, error.reason, str(error))
    except Exception as error:
        return error


def _one_ahead(blocks):
    """Yield blocks while a thread makes the next one."""
    blocks = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


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


def _joined(first, second):
    """Two arrays as one; copied only where both hold something."""
    if not len(first):
        return second
    return np.concatenate([first, second]) if len(second) else first


def _as_array(wave):
    """Samples of NumPy, torch or plain lists as an array."""
    if isinstance(wave, str | bytes | os.PathLike):
        raise AudioError(audio.UNDECODABLE, f"{type(wave).__name__} is no array of samples; predict_file takes files")
    if isinstance(wave, torch.Tensor):
        wave = wave.detach().cpu()
        return (wave.float() if wave.dtype == torch.bfloat16 else wave).numpy()
    try:
        return np.asarray(wave)
    except (TypeError, ValueError) as error:
        raise AudioError(audio.UNDECODABLE, f"{type(wave).__name__} is no array of samples: {error}") from None


def _plain(source):
    return bytes(source) if isinstance(source, bytearray | memoryview) else source


def _name(source):
    """A source's name for a record; None for bytes and for file objects without one."""
    if isinstance(source, bytes | bytearray | memoryview):
        return None
    name = getattr(source, "name", None) if hasattr(source, "read") else source
    return None if name is None else str(name)


def _require_device(device):
    try:
        torch.empty(0, device=str(device))
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {problem}; cpu always can") from None


def _read_config(hparams):
    """The bundle's config.json, from hparams of either door: a mapping, or its text as YAML carries it."""
    config = (hparams or {}).get("bundle_config")
    if isinstance(config, str):
        config = json.loads(config)
    if not isinstance(config, Mapping) or not config.get("labels"):
        raise ConfigError(
            "hparams have no bundle_config with labels: this is no bundle of accent_plugin; "
            "speechbrain.inference.EncoderClassifier loads others"
        )
    return config


def _problems(window_seconds, hop_seconds, batch_seconds, precision, abstaining):
    """Yield what is wrong with the options."""
    if not _is_number(window_seconds) or not window_seconds >= 0.1:
        yield f"window_seconds is {window_seconds!r}: give 0.1 or more"
    elif not _is_number(hop_seconds) or not 0.01 <= hop_seconds <= window_seconds:
        yield f"hop_seconds is {hop_seconds!r}: give 0.01 to window_seconds, which is {window_seconds:g}"
    if batch_seconds is not None and (not _is_number(batch_seconds) or not batch_seconds > 0):
        yield f"batch_seconds is {batch_seconds!r}: give a positive number, or None"
    if precision not in PRECISIONS:
        yield f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
    given = {name: value for name, value in abstaining.items() if value is not None}
    if len(given) > 1:
        yield f"{' and '.join(given)} are given: choose one way to abstain"
    for name, value in given.items():
        if not _is_number(value) or not 0 <= value <= 1:
            yield f"{name} is {value!r}: give a share from 0 to 1"


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
