"""Read and write audio files: decode, resample, check.

Samples are ``(samples,) np.ndarray`` of float32, mono. Everything after preparation is at ``SAMPLE_RATE``. Libsndfile
decodes wav, flac, mp3, ogg-vorbis and opus, so that neither FFmpeg nor torch is needed. Other containers need PyAV
(`accent_plugin.audio.media`). Of a damaged file, the intact parts are decoded (`accent_plugin.audio.damaged`).
"""

import contextlib
import io
import os
import stat
from dataclasses import dataclass, replace

import numpy as np
import soundfile
import soxr

from accent_plugin import files
from accent_plugin.audio import sniff
from accent_plugin.audio.samples import (
    EMPTY,
    NON_FINITE,
    SAMPLE_RATE,
    SAMPLE_RATES,
    SILENCE_LEVEL,
    SILENT,
    TOO_LONG,
    UNDECODABLE,
    check_range,
    check_samples,
    quantise,
    resample,
)
from accent_plugin.audio.sound import ERRORS, SoundReader
from accent_plugin.errors import AudioError

# Suffixes of audio files in folders; the format itself is determined by the content. The second line needs PyAV.
SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au"),
    *(".m4a", ".mp4", ".webm", ".amr", ".wma", ".aac", ".3gp", ".mov", ".mkv", ".mka", ".m4b", ".avi"),
)
# Values decoded at a time: a header may claim any number of frames or channels, so memory grows with the actual data.
_BLOCK_VALUES = 1 << 21
# Where the STREAMINFO of a FLAC file has the MD5 of the samples.
_FLAC_MD5 = slice(26, 42)


@dataclass(frozen=True)
class DecodedAudio:
    """Decoded mono samples, their rate in hertz, the file's format ("MP3", "FLAC PCM_16"), and what was lost."""

    samples: np.ndarray
    sample_rate: int
    codec: str = ""
    lost: tuple = ()

    @property
    def seconds(self):
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True)
class Header:
    """Header of a file: sample rate in hertz, channels, format ("FLAC PCM_16"), and duration in seconds.

    `seconds` is None if the container does not say it.
    """

    sample_rate: int
    channels: int
    codec: str
    seconds: float | None = None


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes of a FLAC file, and the MD5 of its 16-bit samples, which the encoder writes into the header."""

    size: int
    md5: str


def read_header(source):
    """Read the header of a file; `source` and errors as for `decode`."""
    with _opened(source) as (reader, _):
        return Header(reader.sample_rate, reader.channels, reader.codec, reader.seconds)


def decode(source, max_seconds=None):
    """Decode one clip to mono, at its own sample rate.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        The clip, with any number of channels, which are averaged. docs/inputs.md lists the formats.
    max_seconds : float, optional
        Refuse longer clips, if possible without decoding them.

    Returns
    -------
    DecodedAudio
        Without the parts that could not be decoded, which its `lost` lists.

    Raises
    ------
    AudioError
        "undecodable", "empty" or "too long". A file of which less than half can be decoded is undecodable.
    """
    with _opened(source) as (reader, name):
        limit = None if max_seconds is None else int(max_seconds * reader.sample_rate)
        if limit is not None and reader.seconds is not None and reader.seconds > max_seconds:
            raise AudioError(TOO_LONG, f"{name} is {reader.seconds:.1f} s long, the maximum is {max_seconds:g} s")
        blocks, total = [], 0
        for block in reader.blocks(
            _BLOCK_VALUES if limit is None else min(_BLOCK_VALUES, reader.channels * (limit + 1))
        ):
            blocks.append(block)
            total += len(block)
            if limit is not None and total > limit:
                raise AudioError(TOO_LONG, f"{name} is longer than {max_seconds:g} s")
        lost = reader.losses.result(name, total / reader.sample_rate)
        if not total:
            raise AudioError(EMPTY, f"{name} holds no samples")
        samples = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return DecodedAudio(samples, reader.sample_rate, reader.codec, lost)


def load(source, min_seconds=0.0, max_seconds=None, lost=None):
    """Decode, check and resample one clip of any kind.

    Arguments
    ---------
    source, max_seconds
        As in `decode`.
    min_seconds : float
        Refuse shorter clips.
    lost : list, optional
        Gets a `Loss` for each part that could not be decoded.

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
    if lost is not None:
        lost += sound.lost
    return resample(sound.samples, sound.sample_rate)


def stream(source, block_seconds=60.0, lost=None, channel=None, keep_time=False):
    """Decode, check and resample a clip of any length block by block: the samples of `load`, in constant memory.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        As in `decode`.
    block_seconds : float
        Length of a block.
    lost : list, optional
        Gets a `Loss` for each part that could not be decoded, before the last block is yielded.
    channel : int, optional
        The channel to decode, counted from 1; None averages all.
    keep_time : bool
        Whether silence stands in for what could not be decoded, so that times are those of the recording.

    Yields
    ------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``, `block_seconds` long, the last one shorter. Blocks are decoded as they are consumed.

    Raises
    ------
    AudioError
        As `decode` and `check_samples`: "undecodable", "empty", "non-finite" or "out of range" when decoding reaches
        the problem, and "silent", or "undecodable" if less than half was decoded, before the last block.
    """
    size = int(block_seconds * SAMPLE_RATE)
    held, total = [], 0
    with _opened(source) as (reader, name):
        for piece in _pieces(reader, name, block_seconds, lost, channel, keep_time):
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
        # libsndfile closes the descriptor even if it fails.
        with soundfile.SoundFile(_descriptor(path), closefd=True) as sound:
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
    except ERRORS as error:
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

    Returns
    -------
    WrittenFile

    Raises
    ------
    OSError
        When the disk is full, permission is missing, ...
    """
    steps = samples if samples.dtype == np.int16 else quantise(samples)
    # Encoded in memory, because libsndfile hides the system's errno when a disk is full.
    encoded = io.BytesIO()
    # The fastest level: clips at the slowest are only 3 % smaller, and slower to read.
    soundfile.write(encoded, steps, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=0.0)
    flac = encoded.getbuffer()
    with files.atomic_write(path, "wb") as file:
        file.write(flac)
    return WrittenFile(len(flac), bytes(flac[_FLAC_MD5]).hex())


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


@contextlib.contextmanager
def _opened(source):
    """Open a source; gives its reader (`SoundReader` or `MediaReader`) and its name for messages."""
    # A Path also has a name, but without its folder.
    opened = hasattr(source, "read")
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", "clip") if opened else source)
    try:
        with _binary_file(source) as file, contextlib.closing(_reader(file, name)) as reader:
            if reader.sample_rate not in SAMPLE_RATES:
                raise AudioError(UNDECODABLE, f"{name} has an unsupported sample rate of {reader.sample_rate} Hz")
            yield reader, name
    except ERRORS as error:
        raise AudioError(UNDECODABLE, f"{name} cannot be decoded: {_why(error)}") from None


def _binary_file(source):
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return contextlib.nullcontext(source if source.seekable() else io.BytesIO(source.read()))
    return io.FileIO(_descriptor(source))


def _descriptor(path):
    """Open a regular file; returns its descriptor."""
    # Without O_NONBLOCK, opening a FIFO would block. Given a name, soundfile would guess some formats from the suffix.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AudioError(UNDECODABLE, f"{path} is not a regular file")
    return descriptor


def _reader(file, name):
    """Choose the reader for an open file by its content."""
    file.seek(0)
    head = file.read(sniff.HEAD_BYTES)
    if not head:
        raise AudioError(EMPTY, f"{name} holds no bytes")
    content = sniff.identify(head)
    if content is None:
        try:
            return SoundReader(file, "")
        except soundfile.SoundFileError:
            if not any(head):
                advice = f"its first {len(head)} bytes are zeros: the download may be incomplete"
                raise AudioError(UNDECODABLE, f"{name} cannot be decoded: {advice}") from None
            return SoundReader(file, None)
    if content.kind == sniff.SOUND:
        try:
            return SoundReader(file, content.name)
        except soundfile.SoundFileError:
            if not content.demuxer:
                raise
            # The container is libsndfile's, but perhaps not the codec.
            with contextlib.suppress(AudioError):
                return _media_reader(file, name, content)
            raise
    if content.kind == sniff.MEDIA:
        return _media_reader(file, name, content)
    advice = f": {content.advice}" if content.advice else ""
    raise AudioError(UNDECODABLE, f"{name} is {content.name}, not audio{advice}")


def _media_reader(file, name, content):
    from accent_plugin.audio.media import MediaReader

    return MediaReader(file, name, content)


def _pieces(reader, name, seconds, lost, channel, keep_time):
    """Yield a reader's samples as mono at ``SAMPLE_RATE``, in pieces of at most about ``seconds``."""
    rate = reader.sample_rate
    resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    low, high, total, filled = np.inf, -np.inf, 0, 0.0
    for piece in reader.blocks(max(1, min(_BLOCK_VALUES, int(seconds * rate) * reader.channels)), channel):
        if not len(piece):
            continue
        if keep_time and reader.losses.seconds > filled:
            # Before a false position in a damaged file makes hours of silence.
            reader.losses.result(name, np.inf if reader.seconds is None else reader.seconds)
            silence = np.zeros(round((reader.losses.seconds - filled) * rate), np.float32)
            filled = reader.losses.seconds
            yield silence if resampler is None else resampler.resample_chunk(silence)
        low, high, total = min(low, piece.min()), max(high, piece.max()), total + len(piece)
        check_range(name, low, high)
        yield piece if resampler is None else resampler.resample_chunk(piece)
    losses = reader.losses.result(name, total / rate)
    if lost is not None:
        before = np.cumsum([0.0, *(loss.seconds for loss in losses)]) if keep_time else np.zeros(len(losses) + 1)
        lost += [replace(loss, start=loss.start + float(shift)) for loss, shift in zip(losses, before, strict=False)]
    if low > high:
        raise AudioError(EMPTY, f"{name} holds no samples")
    if high - low <= SILENCE_LEVEL:
        raise AudioError(SILENT, f"{name} is silent: all samples are equal")
    yield np.zeros(0, np.float32) if resampler is None else resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _why(error):
    """Message of libsndfile, without the Python object that soundfile puts before it."""
    message = getattr(error, "error_string", error)
    # libsndfile's words for an MP3 in memory that is too short.
    return "it holds no complete frame" if "not a regular file" in str(message) else message
