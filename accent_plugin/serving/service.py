"""A classifier that many ask at once: who is let in, how much each may ask for, and how long it may take.

A request is let in, waits for a place, and is answered; beyond a limit it is refused at once with a `LimitError`. The
files of all requests go through the network in common batches.
"""

import asyncio
import contextlib
import io
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import accent_plugin
from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE, TOO_LONG
from accent_plugin.errors import AudioError, LimitError
from accent_plugin.inference.bulk import make_record
from accent_plugin.inference.records import RELIABLE_SECONDS, Failure, Prediction
from accent_plugin.serving.signal_quality import SignalMeter, SignalQuality

# Decoded at a time, of each request; between two blocks a request can be given up.
_BLOCK_SECONDS = 30.0


_LONGEST_NAME = 200


# Where the page sends recordings; Gradio's.
UPLOAD = "/gradio_api/upload"


@dataclass(frozen=True)
class Limits:
    """What is refused.

    Arguments
    ---------
    max_bytes : int
        Of one request, all files batcher.
    max_seconds : float
        Of audio in one file, whatever its header says.
    max_files : int
        In one request.
    max_requests : int
        Answered at the same time.
    max_queue : int
        Requests that wait; the next one is refused.
    timeout : float
        Seconds from a request's first byte to its answer, waiting included.
    """

    max_bytes: int = 50_000_000
    max_seconds: float = 600.0
    max_files: int = 16
    max_requests: int = 16
    max_queue: int = 64
    timeout: float = 120.0

    def problems(self):
        """Yield what is wrong with them."""
        for name in ("max_bytes", "max_files", "max_requests"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}: give 1 or more"
        if self.max_queue < 0:
            yield f"max_queue is {self.max_queue}: give 0 or more"
        for name in ("max_seconds", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name} is {getattr(self, name)}: give a positive number"


@dataclass(frozen=True)
class ServiceAnswer:
    """What became of one file: a prediction with what was heard, or a failure."""

    outcome: Prediction | Failure
    heard: SignalQuality | None = None
    header: codecs.Header | None = None

    def warnings(self):
        """Yield a sentence for each doubt about a prediction."""
        if isinstance(self.outcome, Failure) or self.heard is None:
            return
        if not self.outcome.reliable:
            yield f"short: {self.outcome.speech_seconds:.1f} s of speech; under {RELIABLE_SECONDS:g} s it is a guess"
        yield from self.heard.warnings()


class Service:
    """A classifier behind limits. Its methods belong to one event loop.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    limits : Limits
    """

    def __init__(self, classifier, limits=None):
        self.classifier, self.limits = classifier, limits or Limits()
        self.batcher = classifier.enable_batching()
        self._threads = ThreadPoolExecutor(self.limits.max_requests, "classify")
        self._places = asyncio.Semaphore(self.limits.max_requests)
        self._inside = 0

    @property
    def busy(self):
        """How many requests are being answered, or wait."""
        return self._inside

    @contextlib.asynccontextmanager
    async def place(self):
        """A place among those that are answered at the same time.

        Raises
        ------
        LimitError
            "busy" at once, where too many wait; "time" when what is done inside takes too long.
        """
        limits = self.limits
        if self._inside >= limits.max_requests + limits.max_queue:
            raise LimitError("busy", f"{self._inside} requests are being answered or wait: try again later")
        self._inside += 1
        try:
            async with asyncio.timeout(limits.timeout), self._places:
                yield
        except TimeoutError:
            raise LimitError("time", f"the request took more than {limits.timeout:g} s") from None
        finally:
            self._inside -= 1

    async def classify(self, files):
        """Classify files of one request, at the same time.

        Arguments
        ---------
        files : list of (str, bytes)
            A name for the answer, and the content.

        Returns
        -------
        list of Answer
        """
        deadline = time.monotonic() + self.limits.timeout
        loop = asyncio.get_running_loop()
        work = (loop.run_in_executor(self._threads, self._answer, name, content, deadline) for name, content in files)
        return list(await asyncio.gather(*work))

    def record(self, answer):
        """An answer as plain values: what ``accent-plugin classify`` writes as JSON lines, and what was heard."""
        record = make_record(self.classifier, answer.outcome.source, answer.outcome)
        if isinstance(answer.outcome, Failure):
            return record
        return record | {
            "speech_seconds": round(answer.outcome.speech_seconds, 6),
            "sample_rate": answer.header.sample_rate,
            "channels": answer.header.channels,
            "codec": answer.header.codec,
            "warnings": list(answer.warnings()),
        }

    def about(self):
        """What is served, as plain values."""
        config = self.classifier.config
        return {
            "model": self.classifier.identity,
            "labels": list(self.classifier.labels),
            "encoder": str(config["model"]["encoder"]["family"]),
            "calibrated": bool(config.get("calibration")),
            "threshold": self.classifier.threshold,
            "window_seconds": self.classifier.window_seconds,
            "hop_seconds": self.classifier.hop_seconds,
            "limits": dict(vars(self.limits)),
            "version": accent_plugin.__version__,
        }

    def close(self):
        """End the threads, after what they are at."""
        self._threads.shutdown()
        self.batcher.close()

    def _answer(self, name, content, deadline):
        source, listener = _Named(content, name), SignalMeter()
        try:
            header = codecs.read_header(_Named(content, name))
            if header.seconds is not None and header.seconds > self.limits.max_seconds:
                raise self._too_long(source.name)
            blocks = listener.listen(self._within_limits(codecs.stream(source, _BLOCK_SECONDS), source.name, deadline))
            with self.batcher.deadline(deadline):
                prediction = self.classifier.predict_blocks(blocks, source.name)
        except AudioError as error:
            return ServiceAnswer(Failure(source.name, error.reason, str(error)))
        return ServiceAnswer(prediction, listener.heard(), header)

    def _too_long(self, name):
        return AudioError(TOO_LONG, f"{name} lasts more than {self.limits.max_seconds:g} s")

    def _within_limits(self, blocks, name, deadline):
        seconds = 0.0
        for block in blocks:
            seconds += len(block) / SAMPLE_RATE
            if seconds > self.limits.max_seconds:
                raise self._too_long(name)
            if time.monotonic() > deadline:
                raise LimitError("time", f"{name} could not be decoded in time")
            yield block


class _Named(io.BytesIO):
    """A file in memory with a name for messages: what a client calls it, without folders and in one line."""

    def __init__(self, content, name):
        super().__init__(content)
        plain = "".join(c if c.isprintable() else "?" for c in name.replace("\\", "/").rpartition("/")[2])
        self.name = plain[-_LONGEST_NAME:] or "recording"


def dumps(value):
    """JSON that any parser takes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
