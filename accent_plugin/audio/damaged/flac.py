"""FLAC files without a length, with a wrong one, truncated, with damaged frames, and joined FLAC files."""

import functools
import re
import struct
from dataclasses import dataclass

import numpy as np

from accent_plugin.audio.damaged.parts import WINDOW_BYTES, Part

_MARKER = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_SYNC = re.compile(rb"\xff[\xf8\xf9]")
# Longest frame header, in bytes.
_HEADER_BYTES = 16
# How much of the end of a file is searched for its last frame, in bytes; then all of it.
_TAILS = (1 << 17, 1 << 21)
# Headers and checksums of a frame, and what follows the last one, such as an ID3 tag.
_SLACK_BYTES = 1024
_BLOCK_SIZES = {
    1: 192,
    **{code: 576 << code - 2 for code in range(2, 6)},
    **{code: 256 << code - 8 for code in range(8, 16)},
}
# Code in a frame header -> bits per sample; 0 refers to the header of the stream.
_BITS = {1: 8, 2: 12, 4: 16, 5: 20, 6: 24, 7: 32}
# Frames whose checksums are computed at once, in bytes.
_GROUP_BYTES = 1 << 24
_MISSING = "FLAC frames are missing or damaged"
_TRUNCATED = "the audio ends before its announced end"


@dataclass(frozen=True)
class _Stream:
    """A FLAC stream in a file: where it and its first frame begin, where it ends, and what its header announces."""

    start: int
    frames: int
    end: int
    info: bytes
    rate: int
    channels: int
    bits: int
    announced: int


@dataclass(frozen=True)
class _Frame:
    """A frame: position in the file, first sample, number of samples, and whether frames have various lengths."""

    position: int
    first: int
    samples: int
    various: bool


def survey_flac(content):
    """Divide a FLAC file into parts; see `accent_plugin.audio.damaged.survey.survey`.

    Raises
    ------
    ValueError
        If the first header is damaged.
    """
    starts = list(content.search(_MARKER, 0, content.size))
    if not starts:
        raise ValueError("no FLAC header")
    streams = [_stream(content, at, end) for at, end in zip(starts, [*starts[1:], content.size], strict=True)]
    parts = []
    for stream in streams:
        found = _last_sample(content, stream)
        if not found:
            parts.append(Part((), lost_before=stream.announced / stream.rate, reason=_MISSING))
            continue
        pieces: tuple | None = (_header(stream, found), (stream.frames, stream.end))
        if found == stream.announced:
            pieces = None if len(streams) == 1 and stream.start == 0 else ((stream.start, stream.end),)
        repair = functools.partial(_repaired, content, stream, found)
        parts.append(Part(pieces, found / stream.rate, reason=_MISSING, repair=repair))
        missing = stream.announced - found
        # An encoder that writes to a pipe announces 0, or the largest number that the header can hold.
        if 0 < missing < 1 << 35:
            parts.append(Part((), lost_before=missing / stream.rate, reason=_TRUNCATED))
    return parts


def _stream(content, start, end):
    info = content.at(start + 8, 34)
    if len(info) < 34:
        raise ValueError("truncated header")
    packed = int.from_bytes(info[10:18], "big")
    rate, channels, bits = packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1
    position = start + 4
    while True:
        block = content.at(position, 4)
        if len(block) < 4:
            raise ValueError("no frames")
        position += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            break
    if not rate or position > end:
        raise ValueError("no frames")
    return _Stream(start, position, end, info, rate, channels, bits, packed & (1 << 36) - 1)


def _header(stream, samples):
    """Make the header of a stream with another number of samples, and without a checksum of all samples."""
    packed = int.from_bytes(stream.info[10:18], "big") >> 36 << 36 | samples
    return b"fLaC\x80\x00\x00\x22" + stream.info[:10] + packed.to_bytes(8, "big") + bytes(16)


def _frame(head, position, stream):
    """Parse a frame header; None if it is none of this stream."""
    if len(head) < 6 or head[0] != 0xFF or head[1] not in (0xF8, 0xF9) or head[3] & 1:
        return None
    number, used = _number(head[4:])
    code, at = head[2] >> 4, 4 + used
    if not used or not code:
        return None
    if code in (6, 7):
        samples, at = int.from_bytes(head[at : at + code - 5], "big") + 1, at + code - 5
    else:
        samples = _BLOCK_SIZES[code]
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if at >= len(head) or head[at] != _crc8(head[:at]):
        return None
    # Chance matches of the checksum seldom agree with the stream.
    layout, bits = head[3] >> 4, _BITS.get(head[3] >> 1 & 7, stream.bits)
    agrees = bits == stream.bits and (layout == stream.channels - 1 or (stream.channels == 2 and 8 <= layout <= 10))
    if not agrees or samples > int.from_bytes(stream.info[2:4], "big"):
        return None
    first = number if head[1] & 1 else number * int.from_bytes(stream.info[:2], "big")
    return _Frame(position, first, samples, bool(head[1] & 1))


def _number(coded):
    """Decode a number that is written like a character in UTF-8, with up to 36 bits; returns it and its bytes."""
    lead = coded[0]
    used = 8 - (lead ^ 0xFF).bit_length()
    if not used:
        return lead, 1
    if used == 1 or used > 7 or len(coded) < used or any(byte >> 6 != 2 for byte in coded[1:used]):
        return 0, 0
    value = lead & (0x7F >> used)
    for byte in coded[1:used]:
        value = value << 6 | byte & 63
    return value, used


def _frames_in(content, stream, start, end):
    """Yield the frames whose headers are between two positions."""
    while start < end:
        window = content.at(start, min(WINDOW_BYTES, end - start) + _HEADER_BYTES)
        for match in _SYNC.finditer(window, 0, WINDOW_BYTES + 1):
            if start + match.start() < end:
                head = window[match.start() : match.start() + _HEADER_BYTES]
                if frame := _frame(head, start + match.start(), stream):
                    yield frame
        start += WINDOW_BYTES


def _last_sample(content, stream):
    """Return the number of samples up to the end of the last frame; 0 if there is none."""
    ends = set()
    for size in (*_TAILS, stream.end):
        frames = list(_frames_in(content, stream, max(stream.frames, stream.end - size), stream.end))
        ends = {frame.first + frame.samples for frame in frames}
        if stream.announced in ends:
            return stream.announced
        # Chance matches of a checksum do not follow another frame.
        if following := [frame.first + frame.samples for frame in frames if frame.first in ends]:
            return max(following)
    return max(ends, default=0)


def _repaired(content, stream, samples):
    """Make a part from the frames whose checksums are right, with silence in place of the others."""
    frames = _intact(content, stream)
    various = bool(frames) and frames[0][0].various
    if 2 * sum(frame.samples for frame, _ in frames) < samples:
        # It will be refused, and a false position would make hours of silence.
        return Part((), samples / stream.rate, reason=_MISSING)
    pieces, fillers, position = [_header(stream, samples)], [], 0
    for frame, end in frames:
        if frame.first > position:
            fillers.append((position, frame.first - position))
            pieces.append(_silence(stream, position, frame.first, various))
        pieces.append((frame.position, end))
        position = frame.first + frame.samples
    if position < samples:
        fillers.append((position, samples - position))
        pieces.append(_silence(stream, position, samples, various))
    return Part(tuple(_merged(pieces)), samples / stream.rate, reason=_MISSING, fillers=tuple(fillers))


def _merged(pieces):
    """Merge ranges that follow each other."""
    merged = []
    for piece in pieces:
        if merged and not isinstance(piece, bytes) and not isinstance(merged[-1], bytes) and merged[-1][1] == piece[0]:
            merged[-1] = (merged[-1][0], piece[1])
        else:
            merged.append(piece)
    return merged


def _intact(content, stream):
    """Return (frame, end) of the frames with the right checksum, in order of time."""
    intact, group, longest, position = [], [], 0, 0
    # A damaged frame may seem to reach to the next intact one; intact frames hardly exceed their samples.
    most = int.from_bytes(stream.info[2:4], "big") * stream.channels * (stream.bits + 1) // 8 + _SLACK_BYTES

    def check():
        nonlocal position
        for (frame, end, _), remainder in zip(group, _crc16([data for *_, data in group]), strict=True):
            if not remainder and frame.first >= position:
                intact.append((frame, end))
                position = frame.first + frame.samples

    headers = list(_frames_in(content, stream, stream.frames, stream.end))
    ends = [header.position for header in headers[1:]] + [stream.end]
    for header, end in zip(headers, ends, strict=True):
        if end - header.position > most:
            continue
        group.append((header, end, content.at(header.position, end - header.position)))
        longest = max(longest, end - header.position)
        if longest * len(group) > _GROUP_BYTES:
            check()
            group, longest = [], 0
    check()
    return intact


def _silence(stream, start, end, various):
    """Make frames of silence from one sample to another."""
    block, frames = int.from_bytes(stream.info[:2], "big"), []
    while start < end:
        count = min(block, end - start)
        number = start if various else start // block
        head = bytes((0xFF, 0xF8 | various, 0x70, stream.channels - 1 << 4)) + _coded(number)
        head += struct.pack(">H", count - 1)
        head += bytes((_crc8(head),))
        # A constant subframe is 8 bits of header and one value.
        body = head + bytes(-(-stream.channels * (8 + stream.bits) // 8))
        frames.append(body + struct.pack(">H", _crc16([body])[0]))
        start += count
    return b"".join(frames)


def _coded(number):
    """Encode a number like a character in UTF-8, with up to 36 bits."""
    if number < 0x80:
        return bytes((number,))
    count = next(count for count in range(2, 8) if number < 1 << 5 * count + 1)
    tail = [0x80 | number >> 6 * index & 63 for index in reversed(range(count - 1))]
    return bytes(((0xFF00 >> count & 0xFF) | number >> 6 * (count - 1), *tail))


def _table(polynomial, bits):
    """Return the CRC of each byte, most significant bit first."""
    table, top = [], 1 << bits - 1
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & 2 * top - 1
        table.append(value)
    return table


_CRC8, _CRC16 = _table(0x07, 8), np.array(_table(0x8005, 16), np.uint16)


def _crc8(data):
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _crc16(frames):
    """Compute the CRC-16 of several frames: zero for a frame with its checksum."""
    if not frames:
        return []
    longest = max(map(len, frames))
    # Zeros before a frame do not change its CRC.
    columns = np.zeros((longest, len(frames)), np.uint8)
    for index, frame in enumerate(frames):
        columns[longest - len(frame) :, index] = np.frombuffer(frame, np.uint8)
    values = np.zeros(len(frames), np.uint16)
    for column in columns:
        values = values << 8 ^ _CRC16[values >> 8 ^ column]
    return values.tolist()
