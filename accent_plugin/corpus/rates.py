"""Drop clips whose length does not fit their sentence; see ``data.speech_rate``."""

import contextlib
from dataclasses import dataclass

import numpy as np

from accent_plugin.audio import codecs
from accent_plugin.audio.workers import map_in_workers, worker_count
from accent_plugin.data import speech_rate
from accent_plugin.errors import AudioError


@dataclass(frozen=True)
class _Job:
    id: int
    source: bytes | str


def drop_odd_rates(rows, reader, limit, notes, progress):
    """Keep the rows whose length fits their sentence, and those without a sentence.

    Arguments
    ---------
    rows : list of accent_plugin.data.selection.Row
    reader : object
        Opens their audio; it is decoded where the source gives no duration.
    limit : float
        In robust standard deviations.
    notes : accent_plugin.data.selection.DropLog
        Receives what is dropped.
    progress : bool
        Whether to draw a progress bar on stderr.
    """
    from tqdm import tqdm

    seconds = [row.seconds for row in rows]
    unknown = [number for number, row in enumerate(rows) if row.seconds is None and row.text]
    jobs = (_Job(number, reader.sound(rows[number])) for number in unknown)
    measured = map_in_workers(_duration, jobs, worker_count(None, len(unknown)), died=lambda id_, message: (id_, None))
    with contextlib.closing(measured):
        for number, duration in tqdm(measured, "measuring", len(unknown), leave=False, disable=not progress):
            seconds[number] = duration
    characters = np.array([speech_rate.count_characters(row.text) for row in rows])
    found = speech_rate.rate_deviations(characters, np.array([np.nan if s is None else s for s in seconds], float))
    if found is None:
        notes.warnings.append(
            f"max_rate_deviation: fewer than {speech_rate.LEAST_CLIPS} clips have a sentence and a duration"
        )
        return rows
    kept = []
    for row, deviation in zip(rows, found, strict=True):
        if abs(deviation) > limit:
            notes.drop(speech_rate.TOO_SLOW if deviation > 0 else speech_rate.TOO_FAST)
        else:
            kept.append(row)
    return kept


def _duration(job):
    """Number and duration in seconds of one clip; runs in a worker process."""
    try:
        return job.id, codecs.decode(job.source).seconds
    except AudioError:
        return job.id, None
