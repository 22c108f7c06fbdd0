"""Read and write audio files: decode, resample, check.

Samples are ``(samples,) np.ndarray`` of float32, mono. Everything after preparation is at ``SAMPLE_RATE``. Decoding is
libsndfile's (wav, flac, mp3, ogg-vorbis, opus), so neither FFmpeg nor torch is needed.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from accent_plugin import files
from accent_plugin.audio.samples import (
    EMPTY,
    NON_FINITE,
    SAMPLE_RATE,
    SAMPLE_RATES,
    SILENCE_LEVEL,
    SILENT,
    TOO_LONG,
    UNDECODABLE,
    check_samples,
    quantise,
    resample,
)
from accent_plugin.errors import AudioError

# Suffixes of audio files in folders; the format itself is determined by the content.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au")


# Values decoded at a time: a header may claim any number of frames or channels, so memory grows with the actual data.
_BLOCK_VALUES = 1 << 21


@dataclass(frozen=True)
class DecodedAudio:
    """Decoded mono samples, their rate in hertz, and the file's format ("MP3", "FLAC PCM_16", "OGG VORBIS")."""

    samples: np.ndarray
    sample_rate: int
    codec: str = ""

    @property
    def seconds(self):
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True)
class Header:
    """Header of a file: sample rate in hertz, channels, format ("FLAC PCM_16"), and duration in seconds.

    An MP3 header has no reliable duration: then `seconds` is None.
    """

    sample_rate: int
    channels: int
    codec: str
    seconds: float | None = None


def read_header(source):
    """Read the header of a file; `source` and errors as for `decode`."""
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", source))
    try:
        with _open(source, name) as sound:
            seconds = None if sound.format == "MP3" else sound.frames / sound.samplerate
            return Header(sound.samplerate, sound.channels, _codec(sound), seconds)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise _refusal(source, name, error) from None


def decode(source, max_seconds=None):
    """Decode one clip to mono, at its own sample rate.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        The clip: wav, flac, mp3, ogg or opus, with any number of channels, which are averaged.
    max_seconds : float, optional
        Refuse longer clips by their header, without decoding them. MP3 headers are unreliable: an MP3 is decoded up to
        this length.

    Returns
    -------
    DecodedAudio

    Raises
    ------
    AudioError
        "undecodable", "empty" or "too long".
    """
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", source))
    try:
        with _open(source, name) as sound:
            return _decode(sound, name, max_seconds)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise _refusal(source, name, error) from None


def load(source, min_seconds=0.0, max_seconds=None):
    """Decode, check and resample one clip of any kind.

    Returns
    -------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``.

    Raises
    ------
    AudioError
        With a short reason, by which errors are counted.
    """
    sound = decode(source, max_seconds)
    check_samples(sound.samples, sound.sample_rate, min_seconds, max_seconds)
    return resample(sound.samples, sound.sample_rate)


def stream(source, block_seconds=60.0, channel=None):
    """Decode, check and resample a clip of any length block by block: the samples of `load`, in constant memory.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        As in `decode`.
    block_seconds : float
        Length of a block.
    channel : int, optional
        The channel to decode, counted from 1; None averages all.

    Yields
    ------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``, `block_seconds` long, the last one shorter. Blocks are decoded as they are consumed.

    Raises
    ------
    AudioError
        "undecodable", "empty" or "non-finite" when decoding reaches the problem, and "silent" before the last block.
    """
    # A Path also has a name, but without its folder.
    opened = hasattr(source, "read")
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", "clip") if opened else source)
    size = int(block_seconds * SAMPLE_RATE)
    held, total = [], 0
    try:
        with _open(source, name) as sound:
            for piece in _pieces(sound, name, block_seconds, channel):
                held.append(piece)
                total += len(piece)
                if total > size:
                    joined = np.concatenate(held)
                    whole = (total - 1) // size * size
                    yield from np.split(joined[:whole], whole // size)
                    held, total = [joined[whole:]], total - whole
            if not total:
                raise AudioError(EMPTY, f"{name} is shorter than one sample at {SAMPLE_RATE} Hz")
            yield np.concatenate(held)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise _refusal(source, name, error) from None


def read(path, start=0, frames=-1):
    """Read a segment of a prepared clip.

    Arguments
    ---------
    path : str or Path
        A mono file at ``SAMPLE_RATE``, as written by ``write``.
    start : int
        First sample.
    frames : int
        Number of samples; -1 reads to the end. A segment that extends beyond the end is shorter.

    Returns
    -------
    (samples,) np.ndarray

    Raises
    ------
    AudioError
        When the file is unreadable, at another rate or not mono, or ``start`` is not inside the clip.
    """
    try:
        with _open(path, str(path)) as sound:
            if sound.samplerate != SAMPLE_RATE or sound.channels != 1:
                raise AudioError(
                    UNDECODABLE,
                    f"{path} has {sound.channels} channel(s) at {sound.samplerate} Hz, but prepared clips have one at "
                    f"{SAMPLE_RATE} Hz: prepare the data again, or read it with accent_plugin.audio.codecs.load",
                )
            if not 0 <= start < sound.frames:
                raise AudioError(EMPTY, f"{path} has {sound.frames} samples: cannot read from sample {start}")
            sound.seek(start)
            samples = sound.read(frames, dtype="float32")
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise AudioError(UNDECODABLE, f"{path} cannot be read: {_why(error)}") from None
    if not len(samples):
        raise AudioError(EMPTY, f"{path} ends before sample {start}")
    if not np.isfinite(samples).all():
        raise AudioError(NON_FINITE, f"{path} has samples that are NaN or infinite")
    return samples


def write(path, samples):
    """Write 16-bit FLAC at ``SAMPLE_RATE`` atomically.

    Arguments
    ---------
    path : str or Path
        File in an existing folder.
    samples : (samples,) np.ndarray
        16-bit steps, or floats in [-1, 1], which are quantised.

    Raises
    ------
    OSError
        When the disk is full, permission is missing, ...
    """
    path = Path(path)
    steps = samples if samples.dtype == np.int16 else quantise(samples)
    # Encoded in memory, because libsndfile hides the system's errno when a disk is full.
    encoded = io.BytesIO()
    soundfile.write(encoded, steps, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    with files.atomic_write(path, "wb") as file:
        file.write(encoded.getbuffer())


def encode_mp3(samples, bitrate):
    """Encode as MP3 with constant bitrate, in memory.

    Arguments
    ---------
    samples : (samples,) np.ndarray
        Floats at ``SAMPLE_RATE``.
    bitrate : int
        In bits per second: a bitrate of MPEG-2 layer III, such as 16,000, 24,000, 32,000 or 64,000.

    Returns
    -------
    bytes
        ``decode`` returns more samples, delayed by 1105: libsndfile does not write the delays of encoder and decoder
        into the file.
    """
    encoded = io.BytesIO()
    # At this rate libsndfile maps levels from 0 to 1 linearly to 160 to 8 kbit/s, and LAME takes the nearest bitrate.
    level = (160_000 - bitrate) / 152_000
    soundfile.write(encoded, samples, SAMPLE_RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return encoded.getvalue()


def _open(source, name):
    if isinstance(source, bytes):
        return soundfile.SoundFile(io.BytesIO(source))
    if hasattr(source, "read"):
        return soundfile.SoundFile(io.BytesIO(source.read()) if not source.seekable() else source)
    # Without O_NONBLOCK, opening a FIFO would block. Given a name, soundfile would guess some formats from the suffix.
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AudioError(UNDECODABLE, f"{name} is not a regular file")
    # libsndfile closes the descriptor even if it fails.
    return soundfile.SoundFile(descriptor, closefd=True)


def _decode(sound, name, max_seconds):
    rate = sound.samplerate
    if rate not in SAMPLE_RATES:
        raise AudioError(UNDECODABLE, f"{name} has an unsupported sample rate of {rate} Hz")
    limit = None if max_seconds is None else int(max_seconds * rate)
    if limit is not None and sound.frames > limit and sound.format != "MP3":
        raise AudioError(TOO_LONG, f"{name} is {sound.frames / rate:.1f} s long, the maximum is {max_seconds:g} s")
    blocks, total = [], 0
    while True:
        wanted = _BLOCK_VALUES // sound.channels
        if limit is not None:
            wanted = min(wanted, limit + 1 - total)
        block = sound.read(wanted, dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
        total += len(block)
        if limit is not None and total > limit:
            raise AudioError(TOO_LONG, f"{name} is longer than {max_seconds:g} s")
    if not total:
        raise AudioError(EMPTY, f"{name} holds no samples")
    return DecodedAudio(np.concatenate(blocks) if len(blocks) > 1 else blocks[0], rate, _codec(sound))


def _codec(sound):
    return sound.format if sound.format == "MP3" else f"{sound.format} {sound.subtype}"


def _refusal(source, name, error):
    """Make the `AudioError` for a file that libsndfile cannot open or decode."""
    if _is_empty(source):
        return AudioError(EMPTY, f"{name} holds no bytes")
    return AudioError(UNDECODABLE, f"{name} cannot be decoded: {_why(error)}")


def _pieces(sound, name, seconds, channel=None):
    """Yield an open file's samples as mono at ``SAMPLE_RATE``, in pieces of at most about ``seconds``."""
    rate = sound.samplerate
    if rate not in SAMPLE_RATES:
        raise AudioError(UNDECODABLE, f"{name} has an unsupported sample rate of {rate} Hz")
    resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    wanted = max(1, min(_BLOCK_VALUES // sound.channels, int(seconds * rate)))
    low, high = np.inf, -np.inf
    while len(block := sound.read(wanted, dtype="float32", always_2d=True)):
        piece = _mono(block, channel)
        if not np.isfinite(piece).all():
            raise AudioError(NON_FINITE, f"{name} has samples that are NaN or infinite")
        low, high = min(low, piece.min()), max(high, piece.max())
        yield piece if resampler is None else resampler.resample_chunk(piece)
    if low > high:
        raise AudioError(EMPTY, f"{name} holds no samples")
    if high - low <= SILENCE_LEVEL:
        raise AudioError(SILENT, f"{name} is silent: all samples are equal")
    yield np.zeros(0, np.float32) if resampler is None else resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _mono(block, channel):
    if channel is not None:
        return block[:, channel - 1].copy()
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def _why(error):
    """Message of libsndfile, without the Python object that soundfile puts before it."""
    return getattr(error, "error_string", error)


def _is_empty(source):
    if isinstance(source, bytes):
        return not source
    try:
        if hasattr(source, "read"):
            return source.seekable() and source.seek(0, os.SEEK_END) == 0
        return os.path.getsize(source) == 0
    except (OSError, TypeError, ValueError):
        return False
