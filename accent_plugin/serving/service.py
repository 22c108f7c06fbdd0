"""Answers concurrent requests with one classifier, within limits on their number, size and time.

A request waits for a free slot and is then answered; a request that exceeds a limit is refused with a `LimitError`.
Files of concurrent requests share batches.
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

# Audio decoded at a time, for each file; the time limit is checked between two blocks.
_BLOCK_SECONDS = 30.0
_LONGEST_NAME = 200
# Gradio's address for uploads from the page.
UPLOAD = "/gradio_api/upload"


@dataclass(frozen=True)
class Limits:
    """Limits on requests; a request beyond one of them is refused.

    Arguments
    ---------
    max_bytes : int
        Total size of one request.
    max_seconds : float
        Length of one file, as decoded: headers are not trusted.
    max_files : int
        Files in one request.
    max_requests : int
        Requests answered at the same time.
    max_queue : int
        Requests that may wait; further ones are refused.
    timeout : float
        Seconds from a request's first byte to its answer, including the wait.
    """

    max_bytes: int = 50_000_000
    max_seconds: float = 600.0
    max_files: int = 16
    max_requests: int = 16
    max_queue: int = 64
    timeout: float = 120.0

    def problems(self):
        """Yield a message for each invalid limit."""
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
    """The answer for one file: a prediction with the signal's quality, or a failure."""

    outcome: Prediction | Failure
    quality: SignalQuality | None = None
    header: codecs.Header | None = None

    def warnings(self):
        """Yield a message for each reason to doubt the prediction."""
        if isinstance(self.outcome, Failure) or self.quality is None:
            return
        if not self.outcome.reliable:
            yield (
                f"short: {self.outcome.speech_seconds:.1f} s of speech; with less than {RELIABLE_SECONDS:g} s "
                "the answer is not reliable"
            )
        if self.outcome.lost:
            yield f"damaged file: {self.outcome.lost_seconds:.1f} s could not be decoded"
        yield from self.quality.warnings()


class Service:
    """A classifier with limits on requests. Call its methods from one event loop only.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    limits : Limits
    """

    def __init__(self, classifier, limits=None):
        self.classifier, self.limits = classifier, limits or Limits()
        self.batcher = classifier.enable_batching()
        self._threads = ThreadPoolExecutor(self.limits.max_requests, "classify")
        self._slots = asyncio.Semaphore(self.limits.max_requests)
        self._active = 0

    @property
    def busy(self):
        """Number of requests that are being answered or are waiting."""
        return self._active

    @contextlib.asynccontextmanager
    async def slot(self):
        """Wait for one of the `max_requests` slots and hold it.

        Raises
        ------
        LimitError
            "busy" at once if too many requests are waiting; "time" if the wait and the work take too long.
        """
        limits = self.limits
        if self._active >= limits.max_requests + limits.max_queue:
            raise LimitError("busy", f"{self._active} requests are being answered or waiting: try again later")
        self._active += 1
        try:
            async with asyncio.timeout(limits.timeout), self._slots:
                yield
        except TimeoutError:
            raise LimitError("time", f"the request took more than {limits.timeout:g} s") from None
        finally:
            self._active -= 1

    async def classify(self, files):
        """Classify the files of one request, (name, bytes) each, concurrently; return a `ServiceAnswer` per file."""
        deadline = time.monotonic() + self.limits.timeout
        loop = asyncio.get_running_loop()
        work = (loop.run_in_executor(self._threads, self._answer, name, content, deadline) for name, content in files)
        return list(await asyncio.gather(*work))

    def record(self, answer):
        """Convert an answer to plain values: those of `classify --format jsonl`, and the signal quality."""
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
        """Describe the model, the limits and the version as plain values."""
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
        """Finish the files in progress, and stop the threads."""
        self._threads.shutdown()
        self.batcher.close()

    def _answer(self, name, content, deadline):
        source, meter, lost = _NamedFile(content, name), SignalMeter(), []
        try:
            header = codecs.read_header(_NamedFile(content, name))
            if header.seconds is not None and header.seconds > self.limits.max_seconds:
                raise self._too_long(source.name)
            blocks = codecs.stream(source, _BLOCK_SECONDS, lost)
            blocks = meter.measure(self._within_limits(blocks, source.name, deadline))
            with self.batcher.deadline(deadline):
                prediction = self.classifier.predict_blocks(blocks, source.name, lost=lost)
        except AudioError as error:
            return ServiceAnswer(Failure(source.name, error.reason, str(error)))
        return ServiceAnswer(prediction, meter.quality(), header)

    def _too_long(self, name):
        return AudioError(TOO_LONG, f"{name} is longer than {self.limits.max_seconds:g} s")

    def _within_limits(self, blocks, name, deadline):
        seconds = 0.0
        for block in blocks:
            seconds += len(block) / SAMPLE_RATE
            if seconds > self.limits.max_seconds:
                raise self._too_long(name)
            if time.monotonic() > deadline:
                raise LimitError("time", f"{name} could not be decoded in time")
            yield block


class _NamedFile(io.BytesIO):
    """A file in memory with a name for messages: the client's name for it, without folders or control characters."""

    def __init__(self, content, name):
        super().__init__(content)
        plain = "".join(c if c.isprintable() else "?" for c in name.replace("\\", "/").rpartition("/")[2])
        self.name = plain[-_LONGEST_NAME:] or "recording"


def dumps(value):
    """Encode as strict JSON: no NaN, and no invalid UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
