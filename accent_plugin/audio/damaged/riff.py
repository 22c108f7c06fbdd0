"""WAV, AIFF and AU files whose announced length is wrong, and WAV files that were joined."""

import re
import struct

from accent_plugin.audio.damaged.mpeg import survey_mp3
from accent_plugin.audio.damaged.parts import Part

# Programs that write to a pipe announce at least this much, because they cannot know the length.
_UNKNOWN_LENGTH = 0x7FF00000
# Format tag of MP3 in a WAV file, which some recorders write.
_MP3_FORMAT = 0x55
# A new header cannot announce more.
_MOST_BYTES = 1 << 31
_WAV = re.compile(rb"(RIFF|RIFX|RF64)....WAVE", re.DOTALL)
_AFTER_THE_END = "the bytes after the announced end of the audio are no audio that this package can read"
_TRUNCATED = "the audio ends before its announced end"


def survey_wav(content):
    """Divide a WAV file into parts; see `accent_plugin.audio.damaged.survey.survey`.

    Raises
    ------
    ValueError
        If the file has no "fmt " and "data" chunks, or its format has no constant bitrate.
    """
    parts = []
    position = next(content.search(_WAV, 0, content.size), content.size)
    sound = position == 0
    while position < content.size:
        order, chunks, start, announced = _chunks(content, position)
        if struct.unpack_from(order + "H", chunks[b"fmt "])[0] == _MP3_FORMAT:
            found = survey_mp3(content)
            return [Part(None, found[0].seconds, found[0].tolerance)] if len(found) == 1 else found
        rate, frame = struct.unpack_from(order + "I4xH", chunks[b"fmt "], 4)
        per_second = struct.unpack_from(order + "I", chunks[b"fmt "], 8)[0] or rate * frame
        if not per_second or not frame:
            raise ValueError("no constant bitrate")
        there = content.size - start
        unknown = announced >= _UNKNOWN_LENGTH and announced > there
        if unknown or (not announced and there and not _is_chunks(content, order, start)):
            end, missing, sound = content.size, 0, sound and unknown
        else:
            end, missing = min(start + announced, content.size), max(0, announced - there)
            if announced < there and _claims_the_rest(content, order, position, end):
                end = content.size
                sound = False
        parts += _parts(order, chunks, frame, per_second, start, end)
        if missing:
            parts.append(Part((), lost_before=missing / per_second, reason=_TRUNCATED))
        position = _after_chunks(content, order, end + (end - start) % 2)
        following = next(content.search(_WAV, position, content.size), content.size)
        if following > position and _worth_reading(content, position, following):
            parts.append(Part((), lost_before=(following - position) / per_second, reason=_AFTER_THE_END))
        position = following
        # libsndfile refuses a file that another one follows.
        sound = sound and position == content.size
    if sound:
        parts = [Part(), *(part for part in parts if part.lost_before)]
    return parts


def survey_aiff(content):
    """Divide an AIFF file into parts, one for each of several joined files; see `survey_wav`."""
    files, position = [], 0
    while position + 12 <= content.size:
        form, length, kind = struct.unpack(">4sI4s", content.at(position, 12))
        if form != b"FORM" or kind not in (b"AIFF", b"AIFC"):
            break
        end = min(position + 8 + length + length % 2, content.size)
        files.append((position, end, _aiff_seconds(content, position + 12, end)))
        position = end
    return _joined(content, files, position)


def _aiff_seconds(content, position, end):
    while position + 26 <= end:
        name, length = struct.unpack(">4sI", content.at(position, 8))
        if name == b"COMM":
            frames, exponent, mantissa = struct.unpack(">2xI2xHQ", content.at(position + 8, 18))
            # The sample rate is an 80-bit float.
            rate = mantissa * 2.0 ** (exponent - 16383 - 63)
            return frames / rate if rate else None
        position += 8 + length + length % 2
    return None


def survey_au(content):
    """Divide an AU file into parts, one for each of several joined files; see `survey_wav`."""
    files, position = [], 0
    while position + 24 <= content.size:
        header = content.at(position, 24)
        if header[:4] not in (b".snd", b"dns."):
            break
        order = ">" if header[:4] == b".snd" else "<"
        offset, announced, coding, rate, channels = struct.unpack_from(order + "5I", header, 4)
        bits, end, seconds = _AU_BITS.get(coding), content.size, None
        if announced != 0xFFFFFFFF:
            end = min(position + offset + announced, content.size)
            if bits and rate and channels:
                seconds = 8 * announced / bits / channels / rate
        files.append((position, end, seconds))
        position = end
    return _joined(content, files, position)


def _joined(content, files, position):
    """Return a part for each (start, end, seconds), and a loss for the bytes after `position`."""
    parts = [
        Part(None if len(files) == 1 else ((start, end),), seconds, 0.01, reason=_TRUNCATED)
        for start, end, seconds in files
    ]
    start, end, seconds = files[-1]
    if seconds and position < content.size and _worth_reading(content, position, content.size):
        lost = (content.size - position) * seconds / (end - start)
        parts.append(Part((), lost_before=lost, reason=_AFTER_THE_END))
    return parts


# Coding in the header -> bits per sample.
_AU_BITS = {1: 8, 2: 8, 3: 16, 4: 24, 5: 32, 6: 32, 7: 64, 27: 8}


def _chunks(content, position):
    """Read the chunks of a WAV file before its audio; returns byte order, chunks, and start and bytes of the audio."""
    head = content.at(position, 12)
    if not _WAV.match(head):
        raise ValueError("no WAV header")
    order = ">" if head[:4] == b"RIFX" else "<"
    chunks, position = {}, position + 12
    while position + 8 <= content.size:
        name, length = struct.unpack(order + "4sI", content.at(position, 8))
        position += 8
        if name == b"data":
            if b"fmt " not in chunks or len(chunks[b"fmt "]) < 16:
                raise ValueError("no format")
            if length == 0xFFFFFFFF and len(chunks.get(b"ds64", b"")) >= 16:
                length = struct.unpack_from("<Q", chunks[b"ds64"], 8)[0] or length
            return order, chunks, position, length
        if name in (b"fmt ", b"fact", b"ds64"):
            chunks[name] = content.at(position, min(length, 4096))
        position += length + length % 2
    raise ValueError("no audio")


def _parts(order, chunks, frame, per_second, start, end):
    """Yield parts with headers of their own, for the audio between two positions."""
    form = b"RIFX" if order == ">" else b"RIFF"
    middle = b"".join(
        name + struct.pack(order + "I", len(chunks[name])) + chunks[name]
        for name in (b"fmt ", b"fact")
        if name in chunks
    )
    step = _MOST_BYTES // frame * frame
    while start < end:
        stop = min(end, start + step)
        size = struct.pack(order + "I", stop - start)
        whole = struct.pack(order + "I", 4 + len(middle) + 8 + stop - start)
        pieces = (form + whole + b"WAVE" + middle + b"data" + size, (start, stop))
        yield Part(pieces, (stop - start) / per_second, tolerance=0.1)
        start = stop


def _claims_the_rest(content, order, position, end):
    """Whether a WAV file contains all bytes after its audio by its own size, although they are no chunks."""
    size = struct.unpack(order + "I", content.at(position + 4, 4))[0]
    return size + 8 >= content.size - position and not _is_chunks(content, order, end + end % 2)


def _is_chunks(content, order, position):
    """Whether everything from `position` is chunks, not audio."""
    return _after_chunks(content, order, position) >= content.size


def _after_chunks(content, order, position):
    """Return where the chunks end that begin at `position`."""
    while position + 8 <= content.size:
        name, length = struct.unpack(order + "4sI", content.at(position, 8))
        if not all(32 <= byte < 127 for byte in name) or name in (b"RIFF", b"RIFX", b"RF64"):
            break
        if position + 8 + length > content.size + 1:
            break
        position += 8 + length + length % 2
    return position


def _worth_reading(content, start, end):
    """Whether bytes are more than padding with zeros."""
    return any(any(content.at(at, min(1 << 20, end - at))) for at in range(start, end, 1 << 20))
