"""Classify segments of recordings that a diarisation tool or an annotator has marked.

Times are in seconds from the start of the recording. A segment holds the samples from ``round(start * 16000)`` up to,
not including, ``round(end * 16000)``, after resampling.
"""

import contextlib
import csv
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from accent_plugin import files
from accent_plugin.audio import codecs
from accent_plugin.audio.samples import EMPTY, SAMPLE_RATE, SILENCE_LEVEL, SILENT
from accent_plugin.errors import AudioError, DataError
from accent_plugin.inference.base import or_failure
from accent_plugin.inference.bulk import make_record, remarks
from accent_plugin.inference.prefetch import BLOCK_SECONDS, name_of, one_ahead, plain
from accent_plugin.inference.records import Failure, printable
from accent_plugin.inference.segment_files import Segment, read_segments

__all__ = ["Segment", "SegmentAnswers", "assign_segments", "predict_segments", "read_segments", "run"]

_WHOLE = Segment(0.0, math.inf)


def assign_segments(segments, sources):
    """Find the segments of each recording.

    Arguments
    ---------
    segments : sequence of Segment
    sources : sequence of str
        Paths of the recordings. A single recording gets all segments if they name no file, or all name the same one.

    Returns
    -------
    dict
        Source -> list of Segment; sources without segments are omitted.

    Raises
    ------
    DataError
        When there are several recordings and some segments name no file, or a segment names a file that is not given.
    """
    named = {segment.file for segment in segments}
    if len(sources) == 1 and len(named) == 1:
        return {sources[0]: list(segments)}
    if "" in named:
        raise DataError(f"{len(sources)} recordings are given, but some segments do not name theirs: add a column file")
    by_name = defaultdict(list)
    for source in sources:
        by_name[Path(source).stem].append(source)
    if unknown := sorted(named - by_name.keys()):
        raise DataError(f"segments name recordings that are not given: {', '.join(unknown[:5])}")
    if double := sorted(name for name in named if len(by_name[name]) > 1):
        raise DataError(
            f"segments name '{double[0]}', which may be {' or '.join(by_name[double[0]])}: give one of them"
        )
    found = defaultdict(list)
    for segment in segments:
        found[by_name[segment.file][0]].append(segment)
    return dict(found)


@dataclass(frozen=True)
class SegmentAnswers:
    """Results for the segments and the speakers of one recording.

    Arguments
    ---------
    segments : tuple of (Segment, Prediction or Failure)
        In the order in which the segments were given. The times of windows are relative to the recording.
    speakers : dict
        (speaker, channel) -> Prediction or Failure from all segments of the speaker, with windows weighted by length.
        Segments without a speaker are left out. The channel is None unless each channel is classified.
    """

    segments: tuple
    speakers: dict


def predict_segments(classifier, source, segments, each_channel=False):
    """Classify the segments of one recording, which is decoded once, block by block.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    source : str, Path, bytes or binary file object
        As in `predict_file`.
    segments : sequence of Segment
        They may overlap.
    each_channel : bool
        Whether to classify each channel by itself, as in telephone calls with one speaker per channel. A segment is
        then classified on its channel, or on every channel if it names none. Otherwise channels are averaged.

    Returns
    -------
    SegmentAnswers

    Raises
    ------
    AudioError
        When the recording cannot be decoded. With `each_channel`, a channel that is silent, non-finite or out of range
        is a `Failure` of its segments instead.
    DataError
        When the segments name several channels and `each_channel` is false, or a channel that the recording lacks.
    """
    named = sorted({segment.channel for segment in segments if segment.channel is not None})
    if not each_channel:
        if len(named) > 1:
            raise DataError(f"segments of {source} name the channels {named}: classify each channel (--channels each)")
        return _of_one_stream(classifier, source, [replace(segment, channel=None) for segment in segments], None)
    if hasattr(source, "read"):
        source = source.read()
    channels = codecs.read_header(source).channels
    if named and named[-1] > channels:
        raise DataError(f"segments name channel {named[-1]}, but {source} has {channels}")
    answers, speakers = [], {}
    for channel in range(1, channels + 1):
        mine = [replace(segment, channel=channel) for segment in segments if segment.channel in (None, channel)]
        if mine:
            # A channel can be silent or out of range by itself.
            found = or_failure(name_of(source), _of_one_stream, classifier, source, mine, channel)
            if isinstance(found, Failure):
                failing = {segment.speaker for segment in mine if segment.speaker}
                found = SegmentAnswers(
                    tuple((segment, found) for segment in mine), {(speaker, channel): found for speaker in failing}
                )
            answers += found.segments
            speakers |= found.speakers
    return SegmentAnswers(tuple(answers), speakers)


def run(classifier, sources, segments, format, output=None, each_channel=False):
    """Classify segments of recordings, and write a result for each segment and each speaker.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    sources : sequence of str
        Paths of recordings.
    segments : sequence of Segment or None
        None classifies whole recordings.
    format : str
        "table", "jsonl" or "csv".
    output : str or Path, optional
        File to write. It is replaced once all results are complete. None writes to stdout after each recording.
    each_channel : bool
        As in `predict_segments`.

    Returns
    -------
    tuple of int
        Numbers of predictions and of failures.
    """
    sources = list(dict.fromkeys(sources))
    whole = {source: [_WHOLE] for source in sources}
    of_source = whole if segments is None else assign_segments(segments, sources)
    counts = Counter()
    with files.atomic_write(Path(output)) if output else contextlib.nullcontext(sys.stdout) as file:
        table = csv.DictWriter(file, _fields(classifier), extrasaction="ignore", lineterminator="\n")
        if format == "csv":
            table.writeheader()
        for source in sources:
            for record in _records(classifier, source, of_source.get(source, ()), each_channel):
                counts[record["error"] is None] += 1
                if record["error"]:
                    print(printable(f"{source}: {record['error']}"), file=sys.stderr)
                if format == "csv":
                    table.writerow(record | {f"p_{label}": p for label, p in (record["probabilities"] or {}).items()})
                else:
                    file.write(json.dumps(record) + "\n" if format == "jsonl" else _line(record))
    return counts[True], counts[False]


def _records(classifier, source, segments, each_channel):
    """Yield a record for each segment of a recording, then one for each speaker."""
    if not segments:
        yield _record(classifier, source, _WHOLE, Failure(source, EMPTY, "no segments are given for this recording"))
        return
    try:
        found = predict_segments(classifier, source, segments, each_channel)
    except AudioError as error:
        yield _record(classifier, source, _WHOLE, Failure(source, error.reason, str(error)))
        return
    for segment, answer in found.segments:
        yield _record(classifier, source, segment, answer)
    for (speaker, channel), answer in found.speakers.items():
        record = _record(classifier, source, replace(_WHOLE, speaker=speaker, channel=channel), answer)
        yield record | {"scope": "speaker"}


def _record(classifier, source, segment, answer):
    record = make_record(classifier, source, answer)
    whole = math.isinf(segment.end)
    place = {
        "scope": "recording" if whole else "segment",
        "start": None if whole else segment.start,
        "end": None if whole else segment.end,
        "speaker": segment.speaker or None,
        "channel": segment.channel,
    }
    return {"source": record.pop("source")} | place | record


def _fields(classifier):
    first = _record(classifier, "", Segment(0.0, 1.0), Failure("", EMPTY, ""))
    return [*(name for name in first if name != "probabilities"), *(f"p_{label}" for label in classifier.labels)]


def _line(record):
    place = record["source"]
    if record["start"] is not None:
        place += f"  {record['start']:.2f}-{record['end']:.2f}"
    if record["channel"]:
        place += f"  channel {record['channel']}"
    if record["speaker"]:
        place += f"  {record['speaker']}" + (": all segments" if record["scope"] == "speaker" else "")
    if record["error"]:
        return printable(f"-  failed: {record['error']}  {place}") + "\n"
    return printable(f"{record['probability']:.2f}  {record['accent']}  {place}{remarks(record)}") + "\n"


def _of_one_stream(classifier, source, segments, channel):
    parts = [_Part(segment, classifier) for segment in segments]
    name, lost = name_of(source), []
    # The times of segments are those of the recording, also of a damaged one.
    blocks = codecs.stream(plain(source), BLOCK_SECONDS, lost, channel=channel, keep_time=True)
    waiting, position, jobs = sorted(parts, key=lambda part: part.start), 0, []
    enough = classifier.batch_seconds * SAMPLE_RATE
    with contextlib.closing(one_ahead(blocks)) as blocks:
        for block in blocks:
            end = position + len(block)
            for part in waiting:
                if part.start >= end:
                    break
                bounds = max(0, part.start - position), min(part.end, end) - position
                jobs += part.feed(block[slice(*bounds)], part.end <= end)
            waiting = [part for part in waiting if part.end > end]
            position = end
            if sum(len(job.samples) for job in jobs) >= enough:
                classifier.score(jobs)
                jobs = []
    for part in waiting:
        jobs += part.feed(np.zeros(0, np.float32), last=True)
    classifier.score(jobs)
    by_speaker = defaultdict(list)
    for part in parts:
        if part.segment.speaker:
            by_speaker[part.segment.speaker, channel].append(part)

    def answer(members):
        return or_failure(name, _answer, classifier, members, name, position, lost)

    answers = tuple((part.segment, answer([part])) for part in parts)
    return SegmentAnswers(answers, {key: answer(members) for key, members in by_speaker.items()})


class _Part:
    """A segment while its recording is read: its bounds in samples, its windows, and the range of its values."""

    def __init__(self, segment, classifier):
        self.segment = segment
        self.start = round(segment.start * SAMPLE_RATE)
        self.end = math.inf if math.isinf(segment.end) else round(segment.end * SAMPLE_RATE)
        self.recording = classifier.make_recording(self.start)
        self.samples, self.low, self.high = 0, math.inf, -math.inf

    def feed(self, samples, last):
        if len(samples):
            self.samples += len(samples)
            self.low, self.high = min(self.low, samples.min()), max(self.high, samples.max())
        return self.recording.feed(samples, last) if self.samples else []

    @property
    def is_silent(self):
        return self.high - self.low <= SILENCE_LEVEL


def _answer(classifier, parts, name, total, lost):
    heard = [part for part in parts if part.samples and not part.is_silent]
    if not heard:
        first = parts[0].segment
        where = f"{first.start:g} to {first.end:g} s"
        if parts[0].start == parts[0].end:
            raise AudioError(EMPTY, f"{where}: shorter than one sample at {SAMPLE_RATE} Hz")
        if not parts[0].samples:
            raise AudioError(EMPTY, f"{where}: the recording ends at {total / SAMPLE_RATE:.2f} s")
        raise AudioError(SILENT, f"{where}: all samples are equal")
    lost = [loss for loss in lost if any(part.segment.overlaps(loss.start, loss.seconds) for part in heard)]
    return classifier.answer([part.recording for part in heard], name, lost)
