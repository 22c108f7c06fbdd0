"""Write and read predictions.csv: one row per clip."""

import csv
from pathlib import Path

import numpy as np

from accent_plugin import files
from accent_plugin.errors import ReportError
from accent_plugin.evaluation.predictions import ScoredClips, text_columns

PREDICTIONS_FILE = "predictions.csv"
PROBABILITY = "p_"  # prefix of the probability columns


def write_predictions(path, predictions):
    """Write `ScoredClips` as predictions.csv: one row per clip, with enough digits to recompute the report."""
    p, path = predictions, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"ID": p.ids, "client_id": p.client_ids or ("",) * len(p.ids)}
    columns["accent"], columns["predicted"] = ([p.labels[i] for i in index] for index in (p.truth, p.predicted))
    columns |= dict(zip((PROBABILITY + label for label in p.labels), p.probabilities.T.tolist(), strict=True))
    columns |= {name: getattr(p, name) for name in text_columns()} | {"seconds": p.seconds.tolist()}
    with files.atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_predictions(path):
    """Read predictions.csv, given the file or the report's folder.

    Raises
    ------
    ReportError
        When the file is missing or damaged.
    """
    path = Path(path)
    path = path / PREDICTIONS_FILE if path.is_dir() else path
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [row for row in reader if row]
    except OSError as error:
        raise ReportError(
            f"no predictions in {path}: {error.strerror}; give a report's folder or its {PREDICTIONS_FILE}"
        ) from None
    labels = tuple(name[len(PROBABILITY) :] for name in header if name.startswith(PROBABILITY))
    missing = [name for name in ("ID", "accent", "seconds") if name not in header]
    if missing or len(labels) < 2:
        raise ReportError(f"{path} is not a {PREDICTIONS_FILE}: it lacks {', '.join(missing) or 'p_<accent> columns'}")
    ragged = [i + 2 for i, row in enumerate(rows) if len(row) != len(header)]
    if ragged:
        raise ReportError(f"{path}, line {ragged[0]}: {len(header)} columns expected; the file is damaged")
    column = {name: tuple(row[i] for row in rows) for i, name in enumerate(header)}
    try:
        truth = [labels.index(accent) for accent in column["accent"]]
        probabilities = np.array([column[PROBABILITY + label] for label in labels], dtype=np.float64).T
        seconds = np.array(column["seconds"], dtype=np.float64)
    except ValueError as error:
        raise ReportError(f"{path} is damaged: {error}") from None
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probabilities = np.log(probabilities)
    return ScoredClips(
        ids=column["ID"],
        client_ids=column.get("client_id"),
        truth=np.array(truth, dtype=np.int64),
        log_probabilities=log_probabilities.reshape(len(rows), len(labels)),
        labels=labels,
        seconds=seconds,
        **{name: column.get(name) for name in text_columns()},
    )
