"""Ogg files with missing pages, garbage between pages, and chained streams."""

import re
import struct
import zlib
from dataclasses import dataclass

from accent_plugin.audio.damaged.parts import Part

_PAGE = re.compile(rb"OggS\x00")
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
# Vorbis encoders begin with a block that gives no samples; libsndfile loses at most two blocks where a part begins.
_TOLERANCE = 0.3
_DAMAGED = "pages of the Ogg stream are missing or damaged"


@dataclass(frozen=True)
class _Page:
    start: int
    end: int
    flags: int
    granule: int
    serial: int
    number: int
    first: bytes

    @property
    def begins(self):
        return bool(self.flags & 2)


def survey_ogg(content):
    """Divide an Ogg file into parts; see `accent_plugin.audio.damaged.survey.survey`.

    Raises
    ------
    ValueError
        If streams are multiplexed, or the codec is unknown.
    """
    links = []
    for page in _pages(content):
        if page.begins:
            if links and len(links[-1]) == 1:
                raise ValueError("multiplexed streams")
            links.append([])
        if links and page.serial == (links[-1][0].serial if links[-1] else page.serial):
            links[-1].append(page)
    if not links:
        raise ValueError("no first page")
    ends = [link[0].start for link in links[1:]] + [content.size]
    parts = [part for link, end in zip(links, ends, strict=True) for part in _parts(link, end)]
    # Only the first run of a stream that begins with its headers has no known length.
    sound = len(parts) == 1 and parts[0].seconds is None and links[0][0].start == 0
    return [Part()] if sound else parts


def _pages(content):
    """Yield the pages whose checksums are right."""
    position = 0
    while position + 27 <= content.size:
        head = content.at(position, 27 + 255)
        if head[:5] == b"OggS\x00":
            flags, granule, serial, number, checksum, segments = struct.unpack_from("<BqIIIB", head, 5)
            end = position + 27 + segments + sum(head[27 : 27 + segments])
            page = content.at(position, end - position)
            if len(page) == end - position and _checksum(page[:22] + bytes(4) + page[26:]) == checksum:
                yield _Page(
                    position, end, flags, granule, serial, number, page[27 + segments :][:64] if flags & 2 else b""
                )
                position = end
                continue
        position = next(content.search(_PAGE, position + 1, content.size), content.size)


def _checksum(page):
    """CRC-32 of Ogg: that of zlib with bits in reversed order and other start and end values."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def _runs(link):
    """Return the header pages of a stream, and its runs of consecutive pages with audio."""
    headers = 1
    while headers < len(link) and link[headers].granule <= 0:
        headers += 1
    runs = []
    for page in link[headers:]:
        if runs and page.number == runs[-1][-1].number + 1:
            runs[-1].append(page)
        else:
            runs.append([page])
    return link[:headers], runs


def _parts(link, end):
    """Yield a part for each run of a stream; what was lost before it follows from the time at its end."""
    clock, (headers, runs) = _clock(link[0].first), _runs(link)
    head = tuple((page.start, page.end) for page in headers)
    time = 0
    for run in runs:
        granules = [page.granule for page in run if page.granule >= 0]
        seconds = (granules[-1] - time) / clock if granules and granules[-1] > time else None
        if run[0].number == headers[-1].number + 1:
            # A stream that was recorded from the middle of a broadcast does not begin at 0.
            seconds = None
        yield Part((*head, *_joined(run)), seconds, _TOLERANCE, reason=_DAMAGED, missing_at_start=True)
        time = granules[-1] if granules else time
    left, pages = end - link[-1].end, link[len(headers) :]
    if left and pages and not link[-1].flags & 4:
        # The last page does not end the stream, so that the bytes after it were pages.
        size = sum(page.end - page.start for page in pages)
        begin = pages[0].granule if len(pages) > 1 else 0
        size -= pages[0].end - pages[0].start if len(pages) > 1 else 0
        yield Part((), lost_before=max(0, time - begin) / clock * left / size, reason=_DAMAGED)


def _joined(run):
    """Return the ranges of bytes of consecutive pages."""
    ranges = []
    for page in run:
        if ranges and ranges[-1][1] == page.start:
            ranges[-1] = (ranges[-1][0], page.end)
        else:
            ranges.append((page.start, page.end))
    return ranges


def _clock(first):
    """Return the rate in hertz of the positions in a stream, from its first packet."""
    if first.startswith(b"OpusHead"):
        return 48_000
    if first.startswith(b"\x01vorbis"):
        return struct.unpack_from("<I", first, 12)[0]
    if first.startswith(b"\x7fFLAC"):
        return int.from_bytes(first[27:30], "big") >> 4
    if first.startswith(b"Speex   "):
        return struct.unpack_from("<I", first, 36)[0]
    raise ValueError("unknown codec")
