"""Write a report from predictions: metrics.json, predictions.csv, report.md, report.html and PNG figures.

The text is built once, as a list of blocks, and written as Markdown and as HTML.
"""

import json
import logging
import math
from pathlib import Path

import numpy as np

from accent_plugin import files
from accent_plugin.audio.degradations import DEGRADATIONS
from accent_plugin.evaluation.compare import compare_models
from accent_plugin.evaluation.evaluate import evaluate, speaker_rows
from accent_plugin.report import figures, html
from accent_plugin.report.markdown import to_markdown
from accent_plugin.report.predictions_csv import PREDICTIONS_FILE, write_predictions
from accent_plugin.report.sections import report_blocks
from accent_plugin.report.text import report_title

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
_PICTURES = ("confusion", "recall", "reliability", "scores", "coverage")
# Only if speakers or epochs are known, or degradations of graded strength were tested.
_OPTIONAL_PICTURES = ("speakers", "curves", "degradations")


def write_text(path, text):
    """Write a text file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        file.write(text)


def _strict(value):
    """Convert a value to strict JSON types, without NaN, NumPy types or tuples."""
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return [_strict(v) for v in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_json(path, value):
    """Write strict JSON atomically."""
    write_text(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(
    folder,
    predictions,
    *,
    data,
    model=None,
    versions=None,
    command="",
    curves=None,
    notes=(),
    audio=None,
    out_of_set=None,
    bands=None,
    selected_epoch=None,
    threshold=None,
    draws=1000,
    seed=0,
):
    """Evaluate predictions and write the complete report.

    Arguments
    ---------
    folder : str or Path
        Created if missing. Older files with the same names are replaced.
    predictions : Predictions
    data : dict
        "name", "synthetic", "speakers_disjoint" (None if unknown), and optionally "split" ("random" leaks speakers).
    model, versions : dict
        Name -> value.
    command : str
        The command that made the report.
    curves : list of dict, or None
        One per epoch: "epoch", "train_loss", "valid_loss", "valid_macro_f1", "valid_uar".
    notes : list of str
        Additional notes for the reader.
    audio : callable, or None
        Clip ID -> path of its audio or None, for players in the HTML report.
    out_of_set : dict, or None
        From `accent_plugin.evaluation.compare.out_of_set_scores`.
    bands : dict, or None
        Name of a degradation -> Predictions of the same clips, degraded.
    selected_epoch : int, or None
    threshold : float, or None
        Smallest probability that counts as answered, chosen on validation; see
        `accent_plugin.evaluation.evaluate.evaluate`.
    draws, seed : int
        Number of draws and seed of the bootstrap.

    Returns
    -------
    metrics : dict
        The content of metrics.json.
    """
    folder, p = Path(folder), predictions
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(p, draws=draws, seed=seed, threshold=threshold)
    for sentence in metrics["warnings"]:
        logger.warning("%s", sentence)
    own_notes = metrics.pop("notes")
    metrics = {
        "data": {
            **{"name": "", "synthetic": False, "speakers_disjoint": None, **data},
            "speakers": None if p.client_ids is None else _speakers(p),
            "clips": len(p.ids),
            "seconds": float(p.seconds.sum()),
        },
        **metrics,
        "model": model or {},
        "versions": versions or {},
        "command": command,
        "notes": [*own_notes, *notes],
    }
    if out_of_set is not None:
        metrics["out_of_set"] = out_of_set
    if bands:
        metrics["bands"] = {name: _band(p, name, other, draws, seed) for name, other in bands.items()}
    metrics = _strict(metrics)

    rows = speaker_rows(p)
    images = _draw(folder, p, metrics, rows, curves, selected_epoch)
    blocks = list(report_blocks(metrics, rows, images))
    write_predictions(folder / PREDICTIONS_FILE, p)
    write_text(folder / MARKDOWN_FILE, to_markdown(blocks))
    write_text(folder / HTML_FILE, html.render(report_title(metrics["data"]), blocks, folder, html.players(p, audio)))
    # Written last, because other programs wait for this file.
    write_json(folder / METRICS_FILE, metrics)
    return metrics


def remove_report(folder):
    """Remove only the files that `write_report` writes to a folder."""
    pictures = (f"{name}.png" for name in (*_PICTURES, *_OPTIONAL_PICTURES))
    for name in (METRICS_FILE, PREDICTIONS_FILE, MARKDOWN_FILE, HTML_FILE, *pictures):
        (Path(folder) / name).unlink(missing_ok=True)


def _speakers(p):
    return len({client or f"\0{clip}" for client, clip in zip(p.client_ids, p.ids, strict=True)})


def _band(clean, name, degraded, draws, seed):
    degradation = DEGRADATIONS.get(name)
    strength = {} if degradation is None else {key: getattr(degradation, key) for key in ("kind", "strength", "unit")}
    clip = evaluate(degraded, draws=draws, seed=seed)["clip"]
    compared = compare_models(clean, degraded, draws=draws, seed=seed)["clip"]["unweighted_average_recall"]
    return {**strength, **clip, "difference": compared["difference"]}


def _draw(folder, p, metrics, rows, curves, selected_epoch):
    images = {name: f"{name}.png" for name in _PICTURES}
    counts = metrics["confusion"]
    matrices = {"by clip": counts["clips"], "by speaker": counts["speakers"]}
    figures.confusion(folder / images["confusion"], p.labels, {k: v for k, v in matrices.items() if v is not None})
    figures.recall(folder / images["recall"], metrics)
    figures.reliability(folder / images["reliability"], p, metrics["clip"]["expected_calibration_error"]["value"])
    figures.true_accent_probability(folder / images["scores"], p)
    figures.coverage(folder / images["coverage"], metrics["risk_coverage"])
    bands = metrics.get("bands", {})
    graded = any(band.get("strength") is not None for band in bands.values())
    for name, wanted in zip(_OPTIONAL_PICTURES, (rows, curves, graded), strict=True):
        if wanted:
            images[name] = f"{name}.png"
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # left by an older report
    if rows:
        figures.speakers(folder / images["speakers"], rows, p.labels)
    if curves:
        figures.curves(folder / images["curves"], curves, selected_epoch)
    if graded:
        figures.degradations(folder / images["degradations"], metrics["clip"]["unweighted_average_recall"], bands)
    return images
