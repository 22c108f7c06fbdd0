"""Decode files that libsndfile reads, part by part if they are damaged."""

import io
import os

import numpy as np
import soundfile
import soxr

from accent_plugin.audio.damaged.parts import PiecesFile
from accent_plugin.audio.damaged.survey import survey
from accent_plugin.audio.samples import LossLog, to_mono

# What libsndfile and soundfile raise.
ERRORS = (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError)
_SMALL_BLOCK = 1152


class SoundReader:
    """A file that libsndfile reads.

    Arguments
    ---------
    file : binary file object
        Seekable; stays open.
    container : str, or None
        As in `accent_plugin.audio.damaged.survey.survey`.

    Attributes
    ----------
    sample_rate, channels, codec, seconds
        As in `accent_plugin.audio.codecs.Header`.
    losses : LossLog
        Complete when `blocks` ends.

    Raises
    ------
    soundfile.SoundFileError
        If no part of the file can be opened.
    """

    def __init__(self, file, container):
        self._file, self.losses = file, LossLog()
        # Samples at `sample_rate` that were decoded so far.
        self._decoded = 0
        parts, error = survey(file, container), soundfile.SoundFileError("Format not recognised.")
        self._first = None
        while parts and self._first is None:
            try:
                self._first = self._open(parts[0]) if parts[0].pieces != () else None
            except ERRORS as raised:
                error = raised
            if self._first is None:
                self.losses.add(0.0, parts[0].lost_before + (parts[0].seconds or 0.0), parts[0].reason)
                parts = parts[1:]
        if self._first is None:
            raise error
        sound, self._parts = self._first, parts
        self.sample_rate, self.channels = sound.samplerate, sound.channels
        self.codec = sound.format if sound.format == "MP3" else f"{sound.format} {sound.subtype}"
        lengths = [part.seconds for part in parts if part.pieces != ()]
        if lengths[0] is None and parts[0].pieces is None:
            lengths[0] = sound.frames / sound.samplerate
        self.seconds = None if None in lengths else sum(lengths)

    def close(self):
        """Close the decoder of the first part; the others close when they end."""
        if self._first is not None:
            self._first.close()

    def blocks(self, values, channel=None):
        """Decode in blocks of at most `values` values, of all channels together.

        Yields
        ------
        (samples,) np.ndarray
            float32 at `sample_rate`: the channel, counted from 1, or without one the mean of all.

        Raises
        ------
        soundfile.SoundFileError
            If decoding fails, and it is not known how much is lost.
        """
        for number, part in enumerate(self._parts):
            self.losses.add(self._time, part.lost_before, part.reason)
            if part.pieces == ():
                continue
            start = self._time
            sound, self._first = (self._first, None) if not number else (None, None)
            done, error = yield from self._attempt(part, values, channel, 0.0, sound)
            if error or _missing(part, done) > part.tolerance:
                # In small blocks, because a block in which decoding fails is lost.
                part, values_again = (part.repair(), values) if part.repair else (part, _SMALL_BLOCK)
                if error or part.fillers:
                    done, error = yield from self._attempt(part, values_again, channel, done)
            if error and part.seconds is None:
                raise error
            if _missing(part, done) > part.tolerance:
                self.losses.add(start if part.missing_at_start else self._time, _missing(part, done), part.reason)

    @property
    def _time(self):
        return self._decoded / self.sample_rate

    def _open(self, part):
        if part.pieces is not None:
            return _SequentialFile(PiecesFile(self._file, part.pieces))
        # libsndfile takes the position for the start of the file.
        self._file.seek(0)
        if not isinstance(self._file, io.FileIO):
            return soundfile.SoundFile(self._file)
        # libsndfile closes the descriptor even if it fails.
        return soundfile.SoundFile(os.dup(self._file.fileno()), closefd=True)

    def _attempt(self, part, values, channel, skip, sound=None):
        """Decode a part from `skip` seconds; returns the seconds that were decoded, and the error that ended it."""
        position, rate = 0, None
        try:
            with sound or self._open(part) as sound:
                rate = sound.samplerate
                resampler = None
                if rate != self.sample_rate:
                    resampler = soxr.ResampleStream(rate, self.sample_rate, 1, "float32", "HQ")
                skip = round(skip * rate)
                while len(block := sound.read(max(1, values // sound.channels), dtype="float32", always_2d=True)):
                    mono = to_mono(block, channel)
                    for piece in self._kept(mono, position, rate, part, skip):
                        piece = piece if resampler is None else resampler.resample_chunk(piece)
                        self._decoded += len(piece)
                        yield piece
                    position += len(block)
                if resampler is not None:
                    piece = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
                    self._decoded += len(piece)
                    yield piece
        except ERRORS as error:
            return (max(position, skip if rate else 0) / rate if rate else 0.0), error
        return position / rate, None

    def _kept(self, mono, position, rate, part, skip):
        """Yield the samples of a block from `skip` on, without fillers, and log the fillers as losses."""
        start = max(0, skip - position)
        for first, count in part.fillers:
            low, high = first - position, first + count - position
            if high <= start or low >= len(mono):
                continue
            if low > start:
                yield mono[start:low]
            if low >= start:
                self.losses.add(self._time, count / rate, part.reason)
            start = high
        if start < len(mono):
            yield mono[start:]


class _SequentialFile(soundfile.SoundFile):
    """Reads without seeking: soundfile seeks after each block, which fails in streams that do not begin at 0."""

    def seekable(self):
        """Return False."""
        return False


def _missing(part, done):
    """Return how many seconds of a part are missing if `done` were decoded."""
    return 0.0 if part.seconds is None else part.seconds - done
