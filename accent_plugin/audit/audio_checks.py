"""Checks that decode every clip: unreadable and duplicate audio, and recording conditions that reveal the accent."""

import contextlib
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import (
    EMPTY,
    NON_FINITE,
    OUT_OF_RANGE,
    SILENT,
    TOO_LONG,
    UNDECODABLE,
    check_samples,
    quantise,
)
from accent_plugin.audio.workers import map_in_workers, worker_count
from accent_plugin.audit import confounds
from accent_plugin.audit.findings import (
    AUDIO,
    CHANNEL,
    DAMAGED_CLIP,
    ERROR,
    EXAMPLES,
    RATE,
    UNDECODABLE_CLIP,
    WARNING,
    Example,
    Finding,
)
from accent_plugin.audit.text_checks import name_splits, runs_of_equal, shorten
from accent_plugin.data import dataset_dict, speech_rate
from accent_plugin.errors import AudioError
from accent_plugin.report.text import count_in_words

MAX_SECONDS = 600.0  # longer than any clip; decoding a whole audiobook would fill the memory


_BAD = (UNDECODABLE, EMPTY, NON_FINITE, OUT_OF_RANGE, SILENT, TOO_LONG)


WITHOUT_AUDIO = "the audio was not read: duplicate recordings, broken files, hours and confounds were not checked"


@dataclass(frozen=True)
class AuditJob:
    """A clip to decode, and whether it is part of the confound test."""

    id: int
    source: bytes | str
    measure: bool


@dataclass(frozen=True)
class AuditOutcome:
    """Result of one job, with 64-bit digests of the file's bytes and of its samples."""

    id: int
    seconds: float = 0.0
    content: int = 0
    samples: int = 0
    features: confounds.RecordingFeatures | None = None
    lost: tuple = ()
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Measurements:
    """Results for all rows: arrays, features of the drawn clips, the first few problems of each reason, the paths of
    files that do not exist, and row -> losses of the damaged clips.
    """

    seconds: np.ndarray
    content: np.ndarray
    samples: np.ndarray
    usable: np.ndarray
    features: dict
    reasons: Counter
    problems: dict
    missing: list
    lost: dict


def _measure_clip(job):
    """Decode one clip; runs in a worker process."""
    try:
        sound = codecs.decode(job.source, MAX_SECONDS)
        check_samples(sound.samples, sound.sample_rate)
    except AudioError as error:
        return AuditOutcome(job.id, reason=error.reason, message=str(error))
    measured = confounds.recording_features(sound.samples, sound.sample_rate, sound.codec) if job.measure else None
    rate = sound.sample_rate.to_bytes(4, "big")
    content = job.source if isinstance(job.source, bytes) else Path(job.source).read_bytes()
    return AuditOutcome(
        job.id, sound.seconds, _number(content), _number(rate, quantise(sound.samples).tobytes()), measured, sound.lost
    )


def _died(id_, message):
    return AuditOutcome(id_, reason=UNDECODABLE, message=message)


def _number(*parts):
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big")


def measure_clips(table, data_folder, drawn, workers, progress):
    """Decode every clip in worker processes, and measure the drawn clips for the confound test."""
    from tqdm import tqdm

    total = len(table.accent)
    measure = np.zeros(total, bool)
    measure[drawn] = True
    measurements = Measurements(
        seconds=np.zeros(total),
        content=np.zeros(total, np.uint64),
        samples=np.zeros(total, np.uint64),
        usable=np.zeros(total, bool),
        features={},
        reasons=Counter(),
        problems={reason: [] for reason in _BAD},
        missing=[],
        lost={},
    )

    def sound_of(row):
        split, number = table.place(row)
        sound = dataset_dict.audio_bytes_or_path(table.loaded[split], table.columns[split], number)
        return sound if isinstance(sound, bytes) else str(data_folder / sound)

    def jobs():
        for row in range(total):
            yield AuditJob(row, sound_of(row), bool(measure[row]))

    outcomes = map_in_workers(_measure_clip, jobs(), worker_count(workers, total), died=_died)
    with contextlib.closing(outcomes), tqdm(total=total, desc="decoding", unit="clip", disable=not progress) as bar:
        for outcome in outcomes:
            bar.update()
            row = outcome.id
            if outcome.reason:
                measurements.reasons[outcome.reason] += 1
                sound = sound_of(row)
                if isinstance(sound, str) and not Path(sound).exists():
                    measurements.missing.append(sound)
                # Outcomes arrive in any order: the first rows are only known at the end.
                first = measurements.problems[outcome.reason]
                first.append((row, outcome.message))
                if len(first) > 4 * EXAMPLES:
                    first[:] = sorted(first)[:EXAMPLES]
                continue
            measurements.seconds[row], measurements.usable[row] = outcome.seconds, True
            measurements.content[row], measurements.samples[row] = outcome.content, outcome.samples
            if outcome.lost:
                measurements.lost[row] = outcome.lost
            if outcome.features:
                measurements.features[row] = outcome.features
    return measurements


def unusable_clips(table, measurements):
    """Yield a finding about unusable clips."""
    if not measurements.reasons:
        return
    examples = []
    for reason in _BAD:
        for row, message in sorted(measurements.problems[reason])[:EXAMPLES]:
            clip = table.clip(row)
            examples.append(Example(f"{reason}: {clip}: {message}", (clip,)))
    total = sum(measurements.reasons.values())
    counts = ", ".join(f"{reason} {measurements.reasons[reason]:,}" for reason in _BAD if measurements.reasons[reason])
    moved = dataset_dict.moved_audio(measurements.missing)
    yield Finding(
        UNDECODABLE_CLIP,
        ERROR,
        f"{count_in_words(total, 'unusable file')}: {counts}" + (moved and f"\n{moved}"),
        total,
        tuple(examples),
    )


def unusual_rates(table, measurements):
    """Yield a finding about clips that are too long or too short for their sentence."""
    found = speech_rate.rate_deviations(table.characters, np.where(measurements.usable, measurements.seconds, 0))
    if found is None or not (far := np.flatnonzero(np.abs(found) > speech_rate.LIMIT)).size:
        return
    examples = []
    for row in far[np.argsort(-np.abs(found[far]), kind="stable")][:EXAMPLES]:
        clip = table.clip(row)
        kind = "long" if found[row] > 0 else "short"
        text = f"{clip}: {measurements.seconds[row]:.1f} s, too {kind} for '{shorten(table.sentence_text(row))}'"
        examples.append(Example(text, (clip,)))
    slow = int((found[far] > 0).sum())
    yield Finding(
        RATE,
        WARNING,
        f"{count_in_words(len(far), 'clip')} whose length does not fit the sentence ({slow:,} too long,"
        f" {len(far) - slow:,} too short): blank, cut, or read twice",
        len(far),
        tuple(examples),
    )


def damaged_clips(table, measurements):
    """Yield a finding about clips of which a part could not be decoded."""
    if not measurements.lost:
        return
    rows = sorted(measurements.lost)
    examples = []
    for row in rows[:EXAMPLES]:
        clip = table.clip(row)
        examples.append(Example(f"{clip}: {'; '.join(map(str, measurements.lost[row]))}", (clip,)))
    seconds = sum(loss.seconds for losses in measurements.lost.values() for loss in losses)
    message = f"{count_in_words(len(rows), 'damaged file')}: {seconds:.1f} s could not be decoded"
    yield Finding(DAMAGED_CLIP, WARNING, message, len(rows), tuple(examples))


def duplicate_clips(table, measurements):
    """Yield findings about duplicate recordings, across splits, accents or speakers and within them."""
    rows = np.flatnonzero(measurements.usable)
    order = rows[np.argsort(measurements.samples[rows], kind="stable")]
    leaks, within = [], []
    for group in sorted(runs_of_equal(measurements.samples[order], order, 2), key=lambda group: group[0]):
        differ = any(len(np.unique(of[group])) > 1 for of in (table.split, table.accent, table.client))
        (leaks if differ else within).append(group)
    for found, severity in ((leaks, ERROR), (within, WARNING)):
        if found:
            noun = "recording" if len(found) == 1 else "recordings"
            where = name_splits(table, found)
            what = (
                "more than once, in several splits or with several accents or speakers"
                if severity == ERROR
                else "more than once in a split, with one speaker"
            )
            examples = tuple(_same(table, measurements, group) for group in found[:EXAMPLES])
            message = f"{len(found):,} {noun} {what} ({where})"
            yield Finding(AUDIO, severity, message, len(found), examples)


def _same(table, measurements, group):
    # A clip of another split is a better example than one of the same split.
    other = next((row for row in group if table.split[row] != table.split[group[0]]), group[1])
    clips = table.clip(group[0]), table.clip(other)
    what = (
        "same bytes"
        if measurements.content[group[0]] == measurements.content[other]
        else "same samples in another file"
    )
    more = f", and {count_in_words(len(group) - 2, 'more')}" if len(group) > 2 else ""
    who = [f"{table.client_name(row) or '?'}, {table.accent_name(row) or '?'}" for row in (group[0], other)]
    named = [f"{clip} ({name})" for clip, name in zip(clips, who, strict=True)] if who[0] != who[1] else clips
    return Example(f"{named[0]} and {named[1]}{more}: {what}", clips)


def measure_confounds(table, measurements, seed, permutations, progress):
    """Run the confound test; return its result and the (accent, features) pairs that it used."""
    rows = sorted(measurements.features)
    accents = [table.accent_name(row) for row in rows]
    clients = [table.client_name(row) for row in rows]
    measured = [measurements.features[row] for row in rows]
    result = confounds.run_confound_test(
        measured, accents, clients, seed=seed, permutations=permutations, progress=progress
    )
    return result, tuple(sorted(zip(accents, measured, strict=True)))


def channel_finding(confound):
    """Yield a finding if the recording conditions predict the accent, or if this cannot be tested."""
    if not confound.possible:
        yield Finding(
            CHANNEL, WARNING, f"cannot test whether the recording conditions predict the accent: {confound.reason}"
        )
    elif confound.found:
        features = sorted(confound.by_feature.items(), key=lambda item: -item[1])
        examples = tuple(
            Example(f"{name.replace('_', ' ')} alone: {uar:.2f}") for name, uar in features if uar > confound.chance
        )
        message = (
            f"the recording conditions predict the accent: average recall {confound.uar:.2f} without any speech"
            f" features, {confound.chance:.2f} by chance (p = {confound.p:.3f})"
        )
        yield Finding(CHANNEL, ERROR, message, 1, examples[:3])


def confound_notes(confound, table):
    """Notes on the clips and accents that the confound test used and excluded."""
    made = []
    labelled = int((table.accent >= 0).sum())
    if confound.possible:
        made.append(
            f"the confound test used {confound.clips:,} of {count_in_words(labelled, 'labelled clip')}, from"
            f" {count_in_words(confound.clients, 'speaker')}: at most {confounds.CLIPS_PER_CLIENT} per speaker and"
            f" {confounds.MOST_CLIPS:,} in all"
        )
        if not confound.by_client:
            made[-1] += "; without client ids each clip counts as a speaker, and p is too small if speakers repeat"
        if left := [accent for accent in table.accents if accent not in confound.accents]:
            named = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            made.append(
                f"the confound test excluded {named}: it uses the {confounds.MOST_ACCENTS} accents with the most"
                f" speakers, each with at least {confounds.FOLDS}"
            )
    return made
