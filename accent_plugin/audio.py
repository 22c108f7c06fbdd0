"""The only place that touches samples on disk: decode, resample, check, read, write.

Samples are ``(samples,) np.ndarray`` of float32, mono. Everything after preparation is at ``SAMPLE_RATE``. Decoding is
libsndfile's (wav, flac, mp3, ogg-vorbis, opus), so neither FFmpeg nor torch is needed.
"""

import contextlib
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import numbers
import os
import signal
import stat
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from accent_plugin.errors import AudioError

SAMPLE_RATE = 16_000

# Endings of files that are looked for in folders; what a file is, its content tells.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au")

UNDECODABLE = "undecodable"
EMPTY = "empty"
TOO_SHORT = "too short"
TOO_LONG = "too long"
NON_FINITE = "non-finite"
SILENT = "silent"

# Three steps of 16-bit audio, peak to peak: a constant offset is silence too.
_SILENCE = 3 / 32768
# A header may announce any number of frames or channels: memory grows with what is really there, block by block.
_BLOCK_VALUES = 1 << 21
_RATES = range(1_000, 384_001)
# Of one recording in memory; more rows than this are a batch of clips, whose mean would be no clip.
_MAX_CHANNELS = 32
# Starting a process costs as much as decoding this many clips.
_CLIPS_PER_WORKER = 100


@dataclass(frozen=True)
class Sound:
    """Decoded mono samples, their rate in hertz, and how the file holds them ("MP3", "FLAC PCM_16", "OGG VORBIS")."""

    samples: np.ndarray
    sample_rate: int
    codec: str = ""

    @property
    def seconds(self):
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True)
class Job:
    """One clip to convert: what it is called, where it is (bytes or path), where it goes, and how long it may be."""

    id: str
    source: bytes | str
    target: str
    min_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Converted:
    """What became of one job: a file of ``frames`` samples and ``size`` bytes, or a ``reason`` why there is none."""

    id: str
    frames: int = 0
    size: int = 0
    digest: str = ""
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Header:
    """What a file says of itself: hertz, channels, how it holds the samples ("FLAC PCM_16"), and how long it is.

    An MP3 does not know how long it is: then `seconds` is None.
    """

    sample_rate: int
    channels: int
    codec: str
    seconds: float | None = None


def read_header(source):
    """Read what a file says of itself; `source` and errors as for `decode`."""
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", source))
    try:
        with _open(source, name) as sound:
            seconds = None if sound.format == "MP3" else sound.frames / sound.samplerate
            return Header(sound.samplerate, sound.channels, _codec(sound), seconds)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise _refusal(source, name, error) from None


def decode(source, max_seconds=None):
    """Decode one clip to mono, at the rate it has.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        The clip: wav, flac, mp3, ogg or opus, any number of channels (their mean is taken).
    max_seconds : float, optional
        Refuse longer clips, from the header, without decoding them. An MP3's header may lie: it is decoded up to here.

    Returns
    -------
    Sound

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


def resample(samples, sample_rate, target=SAMPLE_RATE):
    """Resample to ``target`` hertz (soxr, HQ); samples already there are returned as they are."""
    if sample_rate == target:
        return samples
    return soxr.resample(samples, sample_rate, target, quality="HQ").astype(np.float32, copy=False)


def check(samples, sample_rate=SAMPLE_RATE, min_seconds=0.0, max_seconds=None):
    """Refuse a clip that nothing can be learned from.

    Raises
    ------
    AudioError
        "empty", "too short", "too long", "non-finite" or "silent".
    """
    seconds = len(samples) / sample_rate
    if not len(samples):
        raise AudioError(EMPTY, "the clip holds no samples")
    if seconds < min_seconds:
        raise AudioError(TOO_SHORT, f"the clip lasts {seconds:.2f} s, the least is {min_seconds:g} s")
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(TOO_LONG, f"the clip lasts {seconds:.1f} s, the most is {max_seconds:g} s")
    if not np.isfinite(samples).all():
        raise AudioError(NON_FINITE, f"{int((~np.isfinite(samples)).sum())} samples of the clip are NaN or infinite")
    if np.ptp(samples) <= _SILENCE:
        raise AudioError(SILENT, "the clip is silent: its samples do not differ")


def load(source, min_seconds=0.0, max_seconds=None):
    """Decode, check and resample one clip of any kind.

    Returns
    -------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``.

    Raises
    ------
    AudioError
        With the reason to count it by.
    """
    sound = decode(source, max_seconds)
    check(sound.samples, sound.sample_rate, min_seconds, max_seconds)
    return resample(sound.samples, sound.sample_rate)


def stream(source, block_seconds=60.0):
    """Decode, check and resample a clip of any length, block by block; what `load` gives, in constant memory.

    Arguments
    ---------
    source : bytes, str, Path or binary file object
        As in `decode`.
    block_seconds : float
        Length of a block.

    Yields
    ------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``, `block_seconds` long, the last one shorter. Blocks are decoded as they are drawn.

    Raises
    ------
    AudioError
        "undecodable", "empty" or "non-finite", where the file comes to it, and "silent" before the last block.
    """
    # Not a Path's name, which is its last part alone.
    opened = hasattr(source, "read")
    name = "clip" if isinstance(source, bytes) else str(getattr(source, "name", "clip") if opened else source)
    size = int(block_seconds * SAMPLE_RATE)
    held, total = [], 0
    try:
        with _open(source, name) as sound:
            for piece in _pieces(sound, name, block_seconds):
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


def from_array(samples, sample_rate):
    """Check and resample a clip that is in memory.

    Arguments
    ---------
    samples : (samples,), (samples, channels) or (channels, samples) np.ndarray
        Floats with full scale 1, or integers of 8, 16 or 32 bits, which are scaled by their range (unsigned ones are
        centred first, as in WAV). The shorter axis is the channels, of which the mean is taken; a square has its
        samples in the first axis, as soundfile reads them.
    sample_rate : float
        In hertz.

    Returns
    -------
    (samples,) np.ndarray
        float32 at ``SAMPLE_RATE``.

    Raises
    ------
    AudioError
        "empty", "non-finite", "silent"; "undecodable" for what is no audio.
    """
    samples = np.asarray(samples)
    real = isinstance(sample_rate, numbers.Real)
    if not real or not _RATES.start <= sample_rate < _RATES.stop:
        raise AudioError(
            UNDECODABLE, f"a sample rate of {sample_rate} Hz is not supported; {_RATES.start} to {_RATES[-1]} Hz are"
        )
    if not samples.size:
        raise AudioError(EMPTY, f"the clip holds no samples: its shape is {samples.shape}")
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind not in "fiu" or (kind != "f" and bits > 32):
        raise AudioError(
            UNDECODABLE,
            f"samples of type {samples.dtype} have no agreed full scale; give floats in [-1, 1], or integers of 8, 16 "
            "or 32 bits",
        )
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and min(samples.shape) > _MAX_CHANNELS):
        raise AudioError(
            UNDECODABLE,
            f"an array of shape {samples.shape} is not one clip: give (samples,), (samples, channels) or "
            f"(channels, samples) with at most {_MAX_CHANNELS} channels, and a batch as a list of clips",
        )
    if samples.ndim == 2:
        samples = samples.T if samples.shape[0] < samples.shape[1] else samples
    with np.errstate(over="ignore", invalid="ignore"):
        samples = samples.astype(np.float32)
        if samples.ndim == 2:
            samples = samples.mean(axis=1)
    if kind != "f":
        samples = samples / np.float32(2 ** (bits - 1)) - np.float32(kind == "u")
    check(samples, sample_rate)
    resampled = resample(samples, sample_rate)
    if not len(resampled):
        raise AudioError(EMPTY, f"the clip is shorter than one sample at {SAMPLE_RATE} Hz")
    return resampled


def read(path, start=0, frames=-1):
    """Read a stretch of a prepared clip.

    Arguments
    ---------
    path : str or Path
        A mono file at ``SAMPLE_RATE``, as ``write`` makes it.
    start : int
        First sample.
    frames : int
        Number of samples; -1 reads to the end, and a stretch beyond the end is cut there.

    Returns
    -------
    (samples,) np.ndarray

    Raises
    ------
    AudioError
        Unreadable, at another rate, not mono, or ``start`` not inside the clip.
    """
    try:
        with _open(path, str(path)) as sound:
            if sound.samplerate != SAMPLE_RATE or sound.channels != 1:
                raise AudioError(
                    UNDECODABLE,
                    f"{path} has {sound.channels} channel(s) at {sound.samplerate} Hz, prepared clips have one at "
                    f"{SAMPLE_RATE} Hz: prepare the data again, or read it with accent_plugin.audio.load",
                )
            if not 0 <= start < sound.frames:
                raise AudioError(EMPTY, f"{path} has {sound.frames} samples: nothing to read from {start} on")
            sound.seek(start)
            samples = sound.read(frames, dtype="float32")
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise AudioError(UNDECODABLE, f"{path} cannot be read: {_why(error)}") from None
    if not len(samples):
        raise AudioError(EMPTY, f"{path} breaks off before sample {start}")
    if not np.isfinite(samples).all():
        raise AudioError(NON_FINITE, f"{path} holds samples that are not numbers")
    return samples


def quantise(samples):
    """Float samples as 16-bit steps, clipped at full scale; a clip that was 16-bit comes back bit by bit."""
    return np.clip(np.rint(np.asarray(samples) * 32768.0), -32768, 32767).astype(np.int16)


def write(path, samples):
    """Write 16-bit FLAC at ``SAMPLE_RATE``; the file is whole or absent.

    Arguments
    ---------
    path : str or Path
        Where to; its folder exists.
    samples : (samples,) np.ndarray
        16-bit steps, or floats in [-1, 1], which are quantised.

    Raises
    ------
    OSError
        A full disk, no permission, ...
    """
    path = Path(path)
    steps = samples if samples.dtype == np.int16 else quantise(samples)
    # Encoded in memory, because libsndfile hides the system's errno when a disk is full.
    encoded = io.BytesIO()
    soundfile.write(encoded, steps, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(encoded.getbuffer())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def encode_mp3(samples, bitrate):
    """Encode as MP3 of constant bitrate, in memory.

    Arguments
    ---------
    samples : (samples,) np.ndarray
        Floats at ``SAMPLE_RATE``.
    bitrate : int
        In bits per second: a step of MPEG-2's layer III, such as 16,000, 24,000, 32,000 or 64,000.

    Returns
    -------
    bytes
        ``decode`` gives more samples, the first 1105 places later: the delays of encoder and decoder, which libsndfile
        does not write into the file.
    """
    encoded = io.BytesIO()
    # At this rate libsndfile maps levels from 0 to 1 linearly to 160 to 8 kbit/s, and LAME takes the nearest step.
    level = (160_000 - bitrate) / 152_000
    soundfile.write(encoded, samples, SAMPLE_RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return encoded.getvalue()


def convert(jobs, workers=1):
    """Decode, check, resample and write many clips.

    Arguments
    ---------
    jobs : iterator of Job
        Drawn as they are needed, so that no more clips are in memory than there are workers.
    workers : int
        Processes; below 2 the work is done in this one. They import neither torch nor the main script.

    Yields
    ------
    Converted
        One for each job, in the order they are done. A process that dies costs the clip that it held.

    Raises
    ------
    OSError
        When a file cannot be written.
    """
    return each(_convert, jobs, workers, died=_lost)


def each(work, jobs, workers=1, *, died):
    """Do something with many clips, in the order that is quickest.

    Arguments
    ---------
    work : function
        A job -> what becomes of it; at the top of a module that imports neither torch nor the main script.
    jobs : iterator
        Drawn as they are needed, so that no more of them are in memory than there are workers. Each has an ``id``.
    workers : int
        Processes; below 2 the work is done in this one.
    died : function
        (the job's id, message) -> what becomes of a job whose process dies.

    Yields
    ------
    object
        What ``work`` or ``died`` gives, one for each job.

    Raises
    ------
    OSError
        When ``work`` does.
    """
    return _in_processes(work, jobs, workers, died) if workers > 1 else (work(job) for job in jobs)


def worker_count(workers, clips):
    """Processes worth starting for so many clips: ``workers`` where it is given, else the cores there are."""
    return min(workers, clips) if workers is not None else min(cores(), clips // _CLIPS_PER_WORKER)


def cores():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _open(source, name):
    if isinstance(source, bytes):
        return soundfile.SoundFile(io.BytesIO(source))
    if hasattr(source, "read"):
        return soundfile.SoundFile(io.BytesIO(source.read()) if not source.seekable() else source)
    # Without O_NONBLOCK a FIFO would wait for its writer. By a name, soundfile would judge the format of some files.
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AudioError(UNDECODABLE, f"{name} is not a regular file")
    # libsndfile closes the descriptor, also when it fails.
    return soundfile.SoundFile(descriptor, closefd=True)


def _decode(sound, name, max_seconds):
    rate = sound.samplerate
    if rate not in _RATES:
        raise AudioError(UNDECODABLE, f"{name} announces a sample rate of {rate} Hz")
    limit = None if max_seconds is None else int(max_seconds * rate)
    if limit is not None and sound.frames > limit and sound.format != "MP3":
        raise AudioError(TOO_LONG, f"{name} lasts {sound.frames / rate:.1f} s, the most is {max_seconds:g} s")
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
            raise AudioError(TOO_LONG, f"{name} lasts more than {max_seconds:g} s")
    if not total:
        raise AudioError(EMPTY, f"{name} holds no samples")
    return Sound(np.concatenate(blocks) if len(blocks) > 1 else blocks[0], rate, _codec(sound))


def _codec(sound):
    return sound.format if sound.format == "MP3" else f"{sound.format} {sound.subtype}"


def _refusal(source, name, error):
    """The `AudioError` of a file that libsndfile does not open or decode."""
    if _nothing_in(source):
        return AudioError(EMPTY, f"{name} holds no bytes")
    return AudioError(UNDECODABLE, f"{name} cannot be decoded: {_why(error)}")


def _pieces(sound, name, seconds):
    """Yield an open file's samples as mono at ``SAMPLE_RATE``, in pieces of about so many seconds at most."""
    rate = sound.samplerate
    if rate not in _RATES:
        raise AudioError(UNDECODABLE, f"{name} announces a sample rate of {rate} Hz")
    resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    wanted = max(1, min(_BLOCK_VALUES // sound.channels, int(seconds * rate)))
    low, high = np.inf, -np.inf
    while len(block := sound.read(wanted, dtype="float32", always_2d=True)):
        piece = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if not np.isfinite(piece).all():
            raise AudioError(NON_FINITE, f"{name} has samples that are NaN or infinite")
        low, high = min(low, piece.min()), max(high, piece.max())
        yield piece if resampler is None else resampler.resample_chunk(piece)
    if low > high:
        raise AudioError(EMPTY, f"{name} holds no samples")
    if high - low <= _SILENCE:
        raise AudioError(SILENT, f"{name} is silent: its samples do not differ")
    yield np.zeros(0, np.float32) if resampler is None else resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _why(error):
    """The library's own words, without the Python object that it prefixes."""
    return getattr(error, "error_string", error)


def _nothing_in(source):
    if isinstance(source, bytes):
        return not source
    try:
        if hasattr(source, "read"):
            return source.seekable() and source.seek(0, os.SEEK_END) == 0
        return os.path.getsize(source) == 0
    except (OSError, TypeError, ValueError):
        return False


def _convert(job):
    try:
        steps = quantise(load(job.source, job.min_seconds, job.max_seconds))
    except AudioError as error:
        return Converted(job.id, reason=error.reason, message=str(error))
    write(job.target, steps)
    digest = hashlib.blake2b(steps.tobytes(), digest_size=16).hexdigest()
    return Converted(job.id, len(steps), os.stat(job.target).st_size, digest)


def _lost(id_, message):
    return Converted(id_, reason=UNDECODABLE, message=message)


def _serve(pipe, work):
    """Do the jobs that come through the pipe until None does; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(work(job))
            except OSError as error:
                pipe.send(error)


def _in_processes(work, jobs, count, died):
    """Yield outcomes from ``count`` processes as they come; no process holds more than one clip."""
    processes, busy = {}, {}

    def start():
        ours, theirs = context.Pipe()
        processes[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with _main_hidden():
            processes[ours].start()
        theirs.close()
        return ours

    context = multiprocessing.get_context("spawn")
    idle = [start() for _ in range(count)]
    try:
        while True:
            # Zip asks for a job only when a process is idle.
            for pipe, job in zip(idle, jobs, strict=False):
                pipe.send(job)
                busy[pipe] = job.id
            if not busy:
                return
            idle = []
            ready: list = multiprocessing.connection.wait(list(busy))
            for pipe in ready:
                id_ = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    processes[pipe].join()
                    message = f"the process that decoded it died (exit code {processes[pipe].exitcode})"
                    answer, pipe = died(id_, message), start()
                if isinstance(answer, OSError):
                    raise answer
                idle.append(pipe)
                yield answer
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


@contextlib.contextmanager
def _main_hidden():
    """A spawned process imports its parent's main script: train.py would bring torch and SpeechBrain into each."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
