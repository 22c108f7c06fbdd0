"""Evaluate models on any labelled speech: write the same report as training, or compare two models."""

import contextlib
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accent_plugin.data import dataset_dict, labels, naming
from accent_plugin.data.manifests import Clip, read_manifest
from accent_plugin.errors import DataError
from accent_plugin.evaluation.predictions import FLOOR, ScoredClips
from accent_plugin.evaluation.selective import operating_point
from accent_plugin.inference.records import Failure, printable
from accent_plugin.report.comparisons import COMPARISON_FILES
from accent_plugin.report.write import METRICS_FILE, remove_report, write_report
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)


# Clips are not cut into windows, as in the report of training.
WHOLE_CLIPS = {"window_seconds": 600.0, "hop_seconds": 300.0}


# Columns of a DatasetDict that may have other names.
ROLES = ("audio", "accent", "client", "gender", "age")


# Command named in the reports of this module.
_COMMAND = "accent-plugin evaluate"


@dataclass(frozen=True)
class Labelled:
    """A clip, its label, and a function that returns its audio as bytes or a path."""

    clip: Clip
    accent: str
    sound: Callable


@dataclass(frozen=True)
class LabelledClips:
    """Labelled clips on which a model is evaluated.

    Arguments
    ---------
    rows : list of Labelled
        Their audio is read on demand.
    left_out : collections.Counter
        Reason -> number of skipped clips.
    unknown : collections.Counter
        Spelling of an accent without a known label -> number of skipped clips.
    splits : tuple of str
        Names of the splits of the DatasetDict that were read; empty for a manifest.
    """

    rows: list
    left_out: Counter
    unknown: Counter
    splits: tuple


def read_labelled(data, accents, *, mapping=None, split=None, preferred=naming.TEST, columns=None):
    """Read labelled clips from a DatasetDict or a manifest.

    Arguments
    ---------
    data : str or Path
        Folder of a DatasetDict, or a CSV manifest of the recipe.
    accents : sequence of str
        The classes of the model. Clips of other accents are skipped.
    mapping : dict
        Additional spellings, ``{spelling: label}``.
    split : str
        Names or kinds of splits of a DatasetDict, separated by commas; None uses the splits of the preferred kind. A
        DatasetDict with a single split uses that split, whatever its name.
    preferred : str
        One of `accent_plugin.data.naming.SPLITS`.
    columns : dict
        For a DatasetDict: one of `ROLES` -> name of the column. Columns that are not given, or None, are detected.

    Returns
    -------
    LabelledClips

    Raises
    ------
    DataError
        If there are no clips to evaluate, a column is missing, or no split is of the preferred kind.
    """
    columns = {role: name for role, name in (columns or {}).items() if name}
    data, extra = Path(data), {accent: accent for accent in accents} | (mapping or {})
    if data.is_file():
        chosen, found = {}, _of_manifest(data, columns)
    else:
        chosen = _open_splits(data, split, preferred)
        found = _of_splits(data, chosen, columns)
    rows, left_out, unknown = [], Counter(), Counter()
    for clip, sound in found:
        parsed = labels.parse(clip.accent, extra)
        if parsed.label not in accents:
            left_out[parsed.reason or "other accent"] += 1
            if parsed.reason == labels.UNKNOWN_ACCENT:
                unknown[clip.accent] += 1
            continue
        rows.append(Labelled(clip, parsed.label, sound))
    if unknown:
        logger.warning("skipped accents without a known label: %s; give a mapping to include them", _most(unknown))
    if not rows:
        reasons = ", ".join(f"{reason} {n}" for reason, n in left_out.most_common()) or "it has no clips"
        spelled = f"\nspellings without a known label: {_most(unknown)}; give a mapping for them" if unknown else ""
        raise DataError(f"no clip of {data} has one of the accents {', '.join(accents)}: {reasons}{spelled}")
    if chosen:
        logger.info("splits used from %s: %s", data, ", ".join(chosen))
    return LabelledClips(rows, left_out, unknown, tuple(chosen))


def _most(counts, listed=10):
    """Return the most frequent spellings and their counts, on one line."""
    shown = ", ".join(f"'{printable(name)}' {count}" for name, count in counts.most_common(listed))
    return shown + (f" and {len(counts) - listed} more" if len(counts) > listed else "")


def evaluate_model(classifier, rows, progress=True, **reading):
    """Classify the rows of `read_labelled`.

    Returns
    -------
    predictions : accent_plugin.evaluation.predictions.ScoredClips
    failures : collections.Counter
        Reason -> number of clips that could not be classified.
    """
    from tqdm import tqdm

    answers = classifier.predict_files((row.sound() for row in rows), **reading)
    seen, scores, failures = [], [], Counter()
    for row, answer in zip(rows, tqdm(answers, total=len(rows), unit="clip", disable=not progress), strict=True):
        if isinstance(answer, Failure):
            failures[answer.reason] += 1
            logger.warning("%s", printable(f"{row.clip.id}: {answer}"))
        else:
            seen.append((row.clip, row.accent, answer.seconds))
            scores.append([answer.probabilities[label] for label in classifier.labels])
    if not seen:
        raise DataError("no clip could be classified: " + ", ".join(f"{reason} {n}" for reason, n in failures.items()))
    with np.errstate(divide="ignore"):
        log_probabilities = np.log(np.array(scores, dtype=np.float64))
    clips, accents, seconds = zip(*seen, strict=True)
    predictions = ScoredClips.from_clips(
        clips,
        accents,
        np.maximum(log_probabilities, FLOOR),
        classifier.labels,
        seconds=seconds,
        gender=[labels.gender(clip.gender) for clip in clips],
        # A manifest compares its test split with its own train split, which may not be that of the model.
        words_seen=None,
        sentence_seen=None,
    )
    return predictions, failures


def evaluate_both(first, second):
    """Restrict the predictions of two models to the clips that both could classify."""
    alone = set(first.ids) ^ set(second.ids)
    if alone:
        logger.warning(
            "clips that only one of the two models could classify, left out of the comparison: %d", len(alone)
        )
    first, second = (p.select([clip not in alone for clip in p.ids]) for p in (first, second))
    return first, second


def remove_earlier(folder):
    """Remove the files that earlier evaluations of one or two models wrote to a folder; other files stay."""
    parts = [folder_of(folder, number) for number in (1, 2)]
    if all(map(_is_ours, parts)):
        for name in COMPARISON_FILES:
            (Path(folder) / name).unlink(missing_ok=True)
    for part in filter(_is_ours, (Path(folder), *parts)):
        remove_report(part)
    for part in parts:
        # The folder may be missing or contain other files.
        with contextlib.suppress(OSError):
            part.rmdir()


def folder_of(folder, number):
    """Return the folder of the report on the first or second of two models."""
    return Path(folder) / f"model_{number}"


def _is_ours(folder):
    """Whether the report in a folder was written by this module and not by training."""
    try:
        metrics_of = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return metrics_of["command"].startswith(_COMMAND)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def write_evaluation(folder, classifier, predictions, data, labelled, failures, command=_COMMAND):
    """Write the report on a model and labelled data; return the content of metrics.json.

    Arguments
    ---------
    folder : str or Path
    classifier : accent_plugin.inference.base.RecordingClassifier
    predictions : accent_plugin.evaluation.predictions.ScoredClips
    data : str or Path
        Source of the clips.
    labelled : LabelledClips
        The clips.
    failures : collections.Counter
        From `evaluate_model`.
    command : str
        The command line.
    """
    card = dataset_dict.card(Path(data)) if Path(data).is_dir() else {}
    encoder, calibration = classifier.config["model"]["encoder"], classifier.config.get("calibration")
    return write_report(
        folder,
        predictions,
        data={
            "name": card.get("name") or Path(data).name,
            "synthetic": bool(card.get("synthetic", False)),
            # Unknown, because a bundle does not list its training speakers.
            "speakers_disjoint": None,
            "left_out": dict(labelled.left_out + failures),
            **({"splits": list(labelled.splits)} if labelled.splits else {}),
            **({"unknown_accents": dict(labelled.unknown.most_common())} if labelled.unknown else {}),
        },
        model={"bundle": classifier.identity, "encoder": encoder["name"], "family": encoder["family"]},
        versions=installed_versions(),
        command=command,
        threshold=operating_point(calibration["curve"])["threshold"] if calibration else None,
        notes=[
            *([f"Splits: {', '.join(labelled.splits)}."] if labelled.splits else []),
            *([f"Skipped accents without a known label: {_most(labelled.unknown)}."] if labelled.unknown else []),
            "It is not known whether these speakers were in the model's training data.",
        ],
    )


def _of_manifest(path, columns):
    if columns:
        given = ", ".join(f"{role}_column" for role in columns)
        raise DataError(f"{path} is a manifest, whose column names are fixed: leave {given} out")
    for clip in read_manifest(path):
        yield clip, functools.partial(str, clip.wav)


def _open_splits(folder, asked, preferred):
    """Open the splits to read: name -> Dataset."""
    dataset_dict.fingerprint(folder)
    loaded = dataset_dict.open_all(folder)
    if asked:
        chosen = naming.asked_splits(loaded, [name.strip() for name in asked.split(",")], "split")
    else:
        remedy = "choose one or several with split"
        chosen = naming.splits_of_kind(loaded, preferred, remedy) or (list(loaded) if len(loaded) == 1 else [])
        if not chosen:
            kind = "validation" if preferred == naming.VALID else preferred
            raise DataError(f"{folder} has no {kind} split: its splits are {', '.join(loaded)}\n{remedy}")
    return {name: loaded[name] for name in chosen}


def _of_splits(folder, chosen, given):
    for name, data in chosen.items():
        columns = dataset_dict.find_columns(name, data, folder, given)
        for number, cells in enumerate(dataset_dict.read_cells(data, columns)):
            clip = Clip(
                id=f"{name}:{number}",
                duration=0.0,
                wav="",
                accent=cells["accent"],
                client_id=cells["client"],
                gender=cells["gender"],
                age=cells["age"],
            )
            yield clip, functools.partial(_sound, folder, data, columns, number)


def _sound(folder, data, columns, number):
    content = dataset_dict.audio_bytes_or_path(data, columns, number)
    return content if isinstance(content, bytes) else str(folder / content)
