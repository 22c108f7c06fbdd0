"""Read segment files: RTTM (NIST, Rich Transcription 2009), CSV or TSV tables, and Praat TextGrids."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from accent_plugin.data import naming
from accent_plugin.errors import DataError

_COLUMNS = {
    "start": ("start", "begin", "onset", "start_time", "tbeg", "start_seconds"),
    "end": ("end", "stop", "offset", "end_time", "tend", "end_seconds"),
    "duration": ("duration", "dur", "tdur"),
    "speaker": ("speaker", "speaker_id", "name", "spk", "label"),
    "channel": ("channel", "chnl"),
    "file": ("file", "recording", "audio", "path", "filename", "uri"),
}


@dataclass(frozen=True)
class Segment:
    """A part of a recording, in seconds; an infinite end is the end of the recording.

    `speaker` is empty if unknown. `channel` counts from 1 and is None if it is not given. `file` is the name of the
    recording without folder and suffix, and is empty if it is not given.
    """

    start: float
    end: float
    speaker: str = ""
    channel: int | None = None
    file: str = ""

    def overlaps(self, start, seconds):
        """Whether a part of the segment is within so many seconds from `start`."""
        return start < self.end and self.start < start + seconds


def read_segments(path):
    """Read a segment file; the suffix decides its format: .rttm, .csv, .tsv or .TextGrid.

    In a TextGrid with one interval tier, the labels of the intervals are speakers. With several tiers, each tier is a
    speaker. Empty intervals are pauses.

    Returns
    -------
    list of Segment
        In the order of the file.

    Raises
    ------
    DataError
        When the file cannot be read, has no segments, or has a line that is not valid in its format.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not a segment file: give {', '.join(_READERS)}")
    try:
        content = path.read_bytes()
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    segments = list(reader(text, path))
    if not segments:
        raise DataError(f"{path} has no segments")
    return segments


def _from_rttm(text, path):
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        # Records of other types describe words and non-speech.
        if not fields or fields[0] != "SPEAKER":
            continue
        where = f"{path} line {number}"
        if len(fields) < 8:
            raise DataError(f"{where} has {len(fields)} fields: a SPEAKER record has 8 or more")
        start = _seconds(fields[3], "start", where)
        speaker = "" if fields[7] == "<NA>" else fields[7]
        end = start + _seconds(fields[4], "duration", where)
        yield _segment(start, end, speaker, fields[2], _stem(fields[1]), where)


def _from_table(text, path):
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = next((mark for mark in "\t;," if mark in header), ",")
    # Otherwise a quotation mark that is never closed makes one cell of all rows that follow.
    table = csv.DictReader(lines, delimiter=delimiter, strict=True)
    columns = {role: naming.find_column(role, table.fieldnames or [], _COLUMNS) for role in _COLUMNS}
    if not columns["start"] or not (columns["end"] or columns["duration"]):
        found = ", ".join(table.fieldnames or []) or "none"
        raise DataError(f"{path} needs the columns start and end, or start and duration: it has {found}")
    for row in _rows(table, path):
        where = f"{path} line {table.line_num}"
        if extra := row.get(None):
            width = len(table.fieldnames or [])
            raise DataError(
                f"{where} has {width + len(extra)} cells, but the header has {width}: quote cells that contain "
                f"'{delimiter}'"
            )
        cells = {role: (row[name] or "").strip() if name else "" for role, name in columns.items()}
        start = _seconds(cells["start"], "start", where)
        if columns["end"]:
            end = _seconds(cells["end"], "end", where)
        else:
            end = start + _seconds(cells["duration"], "duration", where)
        yield _segment(start, end, cells["speaker"], cells["channel"], _stem(cells["file"]), where)


def _rows(table, path):
    try:
        yield from table
    except csv.Error as error:
        raise DataError(f"{path} line {table.line_num}: {error}: close or remove the quotation mark") from None


def _from_textgrid(text, path):
    """Both of Praat's text formats have the same values in the same order; the long format adds names before them."""
    tokens = [
        found[0]
        for found in re.finditer(r'"(?:[^"]|"")*"|\[\d*\]|<\w+>|-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?', text)
        if not found[0].startswith("[")
    ]
    values = iter(tokens)
    try:
        if next(values) != '"ooTextFile"' or next(values) != '"TextGrid"':
            raise DataError(f"{path} is not a TextGrid in one of Praat's text formats")
        tiers = []
        next(values), next(values)
        if next(values) == "<exists>":
            for _ in range(int(next(values))):
                kind, name = _unquoted(next(values)), _unquoted(next(values))
                next(values), next(values)
                width = 3 if kind == "IntervalTier" else 2
                entries = [[next(values) for _ in range(width)] for _ in range(int(next(values)))]
                if kind == "IntervalTier":
                    tiers.append((name, entries))
    except (StopIteration, ValueError):
        raise DataError(f"{path} is a damaged TextGrid: it ends early, or has text where a number belongs") from None
    for name, entries in tiers:
        for number, (*bounds, label) in enumerate(entries, 1):
            where = f"{path}, tier {name}, interval {number}"
            if label := _unquoted(label).strip():
                start, end = (_seconds(bound, "time", where) for bound in bounds)
                yield _segment(start, end, name if len(tiers) > 1 else label, "", "", where)


_READERS = {".rttm": _from_rttm, ".csv": _from_table, ".tsv": _from_table, ".textgrid": _from_textgrid}


def _segment(start, end, speaker, channel, file, where):
    # Diarisation tools round short segments to nothing: these fail alone.
    if not 0 <= start <= end:
        raise DataError(
            f"{where} is a segment from {start:g} to {end:g} s: start must be 0 or more, and end must not be before it"
        )
    if channel and not (channel.isdecimal() and int(channel) > 0):
        raise DataError(f"{where}: channel is '{channel}': give a number, at least 1")
    return Segment(start, end, speaker, int(channel) if channel else None, file)


def _seconds(text, name, where):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {name} is '{text}': give seconds, with a decimal point")
    return value


def _stem(name):
    return "" if name == "<NA>" else Path(name).stem


def _unquoted(token):
    return token[1:-1].replace('""', '"')
