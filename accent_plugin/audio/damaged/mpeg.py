"""MP3 files with gaps, tags in the middle, a wrong or missing Xing header, and joined MP3 files."""

import functools
import re
import struct
from dataclasses import dataclass, field

from accent_plugin.audio.damaged.parts import WINDOW_BYTES, Part

# kbit/s by index, of MPEG-1 and of MPEG-2 and 2.5, layer III.
_BITRATES = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
# Everything in a header but its checksum bit, private bit, mode extension, copyright, original and emphasis.
_MASK = 0xFFFEFEC0
_SYNC = re.compile(rb"\xff[\xe2-\xe3\xf2-\xf3\xfa-\xfb]")
_XING, _VBRI = (b"Xing", b"Info"), b"VBRI"
# Junk before the first frame and after the last one that is not taken for lost audio.
_PADDING_BYTES = 4096
# Frames that the delays of the encoder and the decoder may cost.
_DELAY_FRAMES = 5
_GAP = "bytes that are no MP3 frames"
_TRUNCATED = "the file ends before the last frame that its header announces"


@dataclass(frozen=True)
class _Header:
    """Frame header: bytes of the frame, offset of a Xing tag in it, and what all frames of a stream have in common."""

    size: int
    tag: int
    samples: int
    rate: int
    kind: int


def _headers():
    """Return masked header -> `_Header` for all valid headers of layer III."""
    found = {}
    for version, rates in _RATES.items():
        samples, factor = (1152, 144) if version == 3 else (576, 72)
        for rate_index, rate in enumerate(rates):
            for mode in range(4):
                side = (17 if mode == 3 else 32) if version == 3 else (9 if mode == 3 else 17)
                kind = version << 4 | rate_index << 1 | (mode == 3)
                for index, bitrate in enumerate(_BITRATES[3 if version == 3 else 2], 1):
                    for padding in range(2):
                        word = 0x7FF << 21 | version << 19 | 1 << 17 | index << 12 | rate_index << 10 | padding << 9
                        size = factor * bitrate * 1000 // rate + padding
                        found[word | mode << 6] = _Header(size, 4 + side, samples, rate, kind)
    return found


_HEADERS = _headers()


@dataclass
class _Run:
    """Consecutive frames of one kind; `frames` excludes a Xing frame, which `tag` and `announced` describe."""

    start: int
    word: int
    header: _Header
    end: int = 0
    frames: int = 0
    sizes: set = field(default_factory=set)
    first: bytes = b""
    announced: int | None = None
    first_audio: int = 0
    gap: int = 0


def survey_mp3(content):
    """Divide an MP3 file into parts; see `accent_plugin.audio.damaged.survey.survey`.

    Raises
    ------
    ValueError
        If there are no frames of layer III.
    """
    runs, position, gap, begins = [], 0, 0, None
    while position < content.size:
        after = _after_tag(content, position)
        if after > position:
            position = after
            continue
        found = _walk(content, position)
        begins = position if begins is None else begins
        if found and found[0].frames + bool(found[0].first):
            found[0].gap, gap = gap, 0
            runs += found
            position = found[-1].end
            continue
        following = _next_frame(content, position + 1)
        gap += following - position
        position = following
    if not runs:
        raise ValueError("no frames")
    if len(runs) == 1 and runs[0].start == begins and _is_right(runs[0]) and gap < _PADDING_BYTES:
        run = runs[0]
        seconds = run.frames * run.header.samples / run.header.rate
        missing = max(0, (run.announced or 0) - run.frames) * run.header.samples / run.header.rate
        return [Part(None, seconds, _tolerance(run)), *_end(missing, _TRUNCATED)]
    return list(_parts(runs, gap))


def _after_tag(content, position):
    """Return the end of an ID3, APE or Lyrics3 tag at `position`; the same position if there is none."""
    head = content.at(position, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and head[3] < 0xFF and max(head[6:10]) < 0x80:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        end = position + 10 + size + 10 * bool(head[5] & 0x10)
        # A size beyond the end is wrong.
        return end if end < content.size else position + 10
    if head[:3] == b"TAG" and content.size - position >= 128 and not _is_frame(content, position):
        return position + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, flags = struct.unpack_from("<I4xI", head, 12)
        # The size excludes the header, but includes the footer.
        return position + 32 + (size if flags & 0x20000000 else 0)
    return position


def _is_frame(content, position):
    head = content.at(position, 4)
    return len(head) == 4 and struct.unpack(">I", head)[0] & _MASK in _HEADERS


def _walk(content, position):
    """Walk along consecutive frames; returns their runs, each with frames of one kind and at most one Xing frame."""
    runs, run = [], None
    window, base = b"", position
    table, unpack = _HEADERS, struct.Struct(">I").unpack_from
    while True:
        offset = position - base
        if offset + 2048 > len(window):
            window, base, offset = content.at(position, WINDOW_BYTES), position, 0
        if offset + 4 > len(window):
            break
        word = unpack(window, offset)[0]
        header = table.get(word & _MASK)
        if header is None or offset + header.size > len(window):
            break
        tag = offset + header.tag
        mark = window[tag : tag + 4]
        tagged = mark in _XING or window[offset + 36 : offset + 40] == _VBRI
        if run is None or header.kind != run.header.kind or tagged:
            if run is None and not tagged and not _agrees(window, offset, header, content.size - position):
                break
            run = _Run(position, word, header, position, first_audio=position)
            runs.append(run)
        count = 1 if tagged else (_frames_like(word & _MASK).match(window, offset).end() - offset) // header.size
        position += count * header.size
        run.end = position
        if tagged:
            run.first, run.first_audio = window[offset : offset + header.size], position
            if mark in _XING and window[tag + 7] & 1:
                run.announced = unpack(window, tag + 8)[0]
        else:
            run.frames += count
            run.sizes.add(header.size)
    return runs


@functools.cache
def _frames_like(word):
    """Compile a pattern of consecutive frames that have a masked header and no tag."""
    header = _HEADERS[word]
    # The bits that the mask ignores are the lowest of each byte.
    ranges = zip(word.to_bytes(4, "big"), (word | ~_MASK & 0xFFFFFFFF).to_bytes(4, "big"), strict=True)
    start = b"".join(b"[\\x%02x-\\x%02x]" % bounds for bounds in ranges)
    tag = b"(?!.{%d}(?:%s)|.{36}%s)" % (header.tag, b"|".join(_XING), _VBRI)
    return re.compile(b"(?:%s%s.{%d})++" % (tag, start, header.size - 4), re.DOTALL)


def _agrees(window, offset, header, left):
    """Whether another frame of the same kind follows, or the file ends with this one."""
    if header.size == left:
        return True
    if offset + header.size + 4 > len(window):
        return False
    following = _HEADERS.get(struct.unpack_from(">I", window, offset + header.size)[0] & _MASK)
    return following is not None and following.kind == header.kind


def _next_frame(content, position):
    """Return the next position at which two frames or a tag begin, or the end of the file."""
    while position < content.size:
        window = content.at(position, WINDOW_BYTES + 2048)
        for match in _START.finditer(window, 0, WINDOW_BYTES + 8):
            offset = match.start()
            if match[0][0] != 0xFF:
                return position + offset
            word = struct.unpack_from(">I", window, offset)[0] if offset + 4 <= len(window) else 0
            header = _HEADERS.get(word & _MASK)
            if header is not None and _agrees(window, offset, header, content.size - position - offset):
                return position + offset
        position += WINDOW_BYTES
    return content.size


_START = re.compile(_SYNC.pattern + rb"|ID3[\x02-\x04]|TAG|APETAGEX")


def _is_right(run):
    """Whether libsndfile decodes all frames of a run: their number is announced, or all have one bitrate."""
    if run.announced is not None:
        return run.announced >= run.frames
    return max(run.sizes, default=0) - min(run.sizes, default=0) <= 1 and not run.first


def _parts(runs, last_gap):
    """Yield a part for each run, and what is lost between them."""
    streams = []
    for run in runs:
        if run.first or not streams:
            streams.append([])
        streams[-1].append(run)
    for number, stream in enumerate(streams):
        end_gap = streams[number + 1][0].gap if number + 1 < len(streams) else last_gap
        end_gap = 0 if end_gap < _PADDING_BYTES else end_gap
        gaps = [run.gap for run in stream[1:]] + [end_gap]
        frames = sum(run.frames for run in stream)
        header, announced = stream[0].header, stream[0].announced
        if announced is None or announced < frames:
            per_byte = frames / max(1, sum(run.end - run.first_audio for run in stream))
            lost = [gap * per_byte for gap in gaps]
        else:
            # The header says how many frames are missing, but not in which gap.
            total = sum(gaps)
            lost = (
                [(announced - frames) * gap / total for gap in gaps]
                if total
                else [0] * (len(gaps) - 1) + [announced - frames]
            )
        seconds = [count * header.samples / header.rate for count in lost]
        if number == 0 and stream[0].gap >= _PADDING_BYTES and announced is None:
            yield Part((), lost_before=stream[0].gap * per_byte * header.samples / header.rate, reason=_GAP)
        for run, before in zip(stream, [0.0, *seconds], strict=False):
            length = run.frames * run.header.samples / run.header.rate
            yield Part(_pieces(run), length, _tolerance(run), before, _GAP)
        yield from _end(seconds[-1], _GAP if end_gap else _TRUNCATED)


def _end(seconds, reason):
    if seconds > 0:
        yield Part((), lost_before=seconds, reason=reason)


def _tolerance(run):
    return _DELAY_FRAMES * run.header.samples / run.header.rate


def _pieces(run):
    """Return the frames of a run behind a frame that announces their number."""
    if run.announced is not None:
        first, at = bytearray(run.first), run.header.tag + 8
        first[at : at + 4] = struct.pack(">I", run.frames)
        # libmpg123 warns if the number of bytes is wrong too.
        if first[at - 1] & 2:
            first[at + 4 : at + 8] = struct.pack(">I", run.end - run.start)
        return bytes(first), (run.first_audio, run.end)
    return _xing_frame(run), (run.first_audio, run.end)


def _xing_frame(run):
    """Make a frame that holds no audio and announces the number of frames of a run."""
    for bitrate in range(1, 15):
        # Without checksum and padding, at the smallest bitrate at which the frame is long enough.
        word = run.word & ~0xF200 | 1 << 16 | bitrate << 12
        header = _HEADERS[word & _MASK]
        if header.size >= header.tag + 12:
            break
    frame = struct.pack(">I", word) + bytes(header.tag - 4) + b"Xing" + struct.pack(">II", 1, run.frames)
    return frame + bytes(header.size - len(frame))
