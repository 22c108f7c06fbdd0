"""Decode MP4, WebM, AMR, WMA and other containers with FFmpeg's libraries, which PyAV brings.

PyAV is optional: this module imports it when a file needs it.
"""

import contextlib

import numpy as np

from accent_plugin.audio.damaged.parts import Bytes, PiecesFile
from accent_plugin.audio.samples import UNDECODABLE, LossLog, to_mono
from accent_plugin.errors import AudioError

# Timestamps that jump by more than this mean that audio is missing; encoders round them.
_LONGEST_JUMP = 0.15
# Containers without timestamps and length; FFmpeg estimates them from the number of bytes.
_UNTIMED = ("amr", "aac", "ac3")
# Delays and padding that the length of a stream may include.
_TOLERANCE = 0.25
_DAMAGED = "packets are missing or damaged"
_TRUNCATED = "the audio ends before its announced end"


class MediaReader:
    """The first audio stream of a container that FFmpeg reads.

    Arguments
    ---------
    file : binary file object
        Seekable; stays open.
    name : str
        The file's name, for messages.
    content : accent_plugin.audio.sniff.Content
        What the file is.

    Attributes
    ----------
    sample_rate, channels, codec, seconds
        As in `accent_plugin.audio.codecs.Header`.
    losses : LossLog
        Complete when `blocks` ends.

    Raises
    ------
    AudioError
        "undecodable" if PyAV is not installed, or the file has no audio stream that FFmpeg can decode.
    """

    def __init__(self, file, name, content):
        try:
            import av
        except ImportError:
            raise AudioError(
                UNDECODABLE,
                f'{name} is {content.name}, which needs PyAV: pip install "accent_plugin[media]"',
            ) from None
        self._av, self._name, self._content, self.losses = av, name, content, LossLog()
        # Samples at `sample_rate` that were decoded so far.
        self._decoded = 0
        self._files = _joined_files(file, content.demuxer)
        if not self._files:
            raise self._refusal("its index is missing, because the recording or the download was cut off")
        self._container = self._open(self._files[0])
        context = self._container.streams.audio[0].codec_context
        self.sample_rate, self.channels = context.sample_rate, context.channels
        self.codec = f"{content.demuxer.upper()} {context.name.upper()}"
        self.seconds = self._announced(self._container) if len(self._files) == 1 else None

    def close(self):
        """Close the container."""
        self._container.close()

    def blocks(self, values, channel=None):
        """Decode in blocks of about `values` values, of all channels together.

        Yields
        ------
        (samples,) np.ndarray
            float32 at `sample_rate`: the channel, counted from 1, or without one the mean of all.
        """
        waiting, held, lost = [], 0, 0.0
        for number, file in enumerate(self._files):
            if number:
                self._container.close()
                self._container = self._open(file)
            for block in self._decode(channel):
                # A loss is between two blocks.
                if waiting and self.losses.seconds > lost:
                    yield np.concatenate(waiting)
                    waiting, held = [], 0
                lost = self.losses.seconds
                waiting.append(block)
                held += len(block)
                if held * self.channels >= values:
                    yield np.concatenate(waiting)
                    waiting, held = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def _open(self, file):
        file.seek(0)
        try:
            # The container is given, so that a playlist in disguise cannot make FFmpeg open other files.
            container = self._av.open(
                _ReadOnly(file), "r", format=self._content.demuxer, options={"protocol_whitelist": "none"}
            )
        except (self._av.error.FFmpegError, ValueError) as error:
            raise self._refusal(error) from None
        streams = container.streams.audio
        # PyAV has no context for a codec that its FFmpeg does not know.
        context = streams[0].codec_context if streams else None
        if context is not None and context.sample_rate:
            context.thread_count = 1
            return container
        container.close()
        if not streams:
            raise AudioError(UNDECODABLE, f"{self._name} is {self._content.name} without an audio stream")
        raise self._refusal("its codec is unknown" if context is None else "it holds no complete frame")

    def _announced(self, container):
        """Return how long a container says that its audio is, in seconds; None if it does not say."""
        stream = container.streams.audio[0]
        if self._content.demuxer in _UNTIMED:
            return None
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if "DURATION" in stream.metadata:
            with contextlib.suppress(ValueError):
                hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
                return 3600 * hours + 60 * minutes + seconds
        # The length of the longest stream.
        return container.duration / 1e6 if container.duration and not container.streams.video else None

    def _decode(self, channel):
        """Yield the mono samples of each frame, and log what is missing between and after them."""
        rate, start = self.sample_rate, self._decoded
        form, begin, lost = None, None, 0.0
        for frame in self._frames():
            if form != (form := (frame.sample_rate, frame.format.name, frame.layout.name)):
                resampler = self._av.AudioResampler("fltp", frame.layout, rate)
            if frame.pts is not None and frame.time_base and self._content.demuxer not in _UNTIMED:
                time = float(frame.pts * frame.time_base)
                begin = time if begin is None else begin
                jump = time - begin - (self._decoded - start) / rate - lost
                if jump > _LONGEST_JUMP:
                    self.losses.add(self._decoded / rate, jump, _DAMAGED)
                    lost += jump
            frame.pts = None
            for piece in resampler.resample(frame):
                mono = to_mono(piece.to_ndarray().T, channel)
                self._decoded += len(mono)
                yield mono
        missing = (self._announced(self._container) or 0.0) - (self._decoded - start) / rate - lost
        if missing > _TOLERANCE:
            self.losses.add(self._decoded / rate, missing, _TRUNCATED)

    def _frames(self):
        """Yield the frames; packets that cannot be decoded are left out, and their time is missing afterwards."""
        error = self._av.error.FFmpegError
        try:
            for packet in self._container.demux(self._container.streams.audio[0]):
                try:
                    yield from packet.decode()
                except error:
                    continue
        except error:
            # The container is damaged from here on; its announced length tells how much is missing.
            return

    def _refusal(self, error):
        why = getattr(error, "strerror", None) or error
        return AudioError(UNDECODABLE, f"{self._name} is {self._content.name}, but cannot be decoded: {why}")


def _joined_files(file, demuxer):
    """Return a file for each of several joined MP4 files; none if the only one has no index."""
    if demuxer != "mov":
        return [file]
    content, starts, indexed, position = Bytes(file), [], 0, 0
    while position + 8 <= content.size:
        head = content.at(position, 16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        size = int.from_bytes(head[8:16], "big") if size == 1 else size or content.size - position
        if kind == b"ftyp" and len(starts) <= indexed or not starts:
            starts.append(position)
        indexed += kind == b"moov"
        if size < 8:
            break
        position += size
    # Without an index, only the last one is incomplete.
    starts = starts[:indexed]
    if len(starts) < 2:
        return [file] if starts else []
    ends = [*starts[1:], content.size]
    return [PiecesFile(file, ((start, end),)) for start, end in zip(starts, ends, strict=True)]


class _ReadOnly:
    """What PyAV needs of a file; it would close a file object of the caller."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
