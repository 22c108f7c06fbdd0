"""Predictions -> a folder for people and programs: metrics.json, predictions.csv, report.md, report.html, PNG.

The text is built once, as a list of blocks, and written twice, as Markdown here and as HTML in `report_html`.
"""

import csv
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from accent_plugin import metrics as m
from accent_plugin import pictures, report_html
from accent_plugin.errors import ReportError

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.csv"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
LEAK_FILE = "leak.md"
COMPARISON_FILES = ("comparison.json", "comparison.md")
_PICTURES = ("confusion", "recall", "reliability", "scores", "coverage")
_PICTURES_OF_SOME = ("speakers", "curves")  # where clients, or epochs, are known
PROBABILITY = "p_"  # prefix of the probability columns
MOST_ROWS = 250  # speakers in the table; predictions.csv has them all

SYNTHETIC = "Synthetic speech: proves the machinery, says nothing about accuracy on people."
LEAKY = (
    "LEAKY split: clips of the same speaker are in train and in test. Such figures reward recognising the speaker and "
    "are far above those on unseen speakers; do not compare the two."
)
SHARED = "Speakers are shared between train and test: these figures are not those on unseen speakers."
MAY_SHARE = "Train and test may share speakers: the data do not say who speaks. Figures on unseen speakers are lower."

NAMES = {
    "accuracy": "Accuracy",
    "unweighted_average_recall": "Unweighted average recall",
    "macro_f1": "Macro-F1",
    "log_loss": "Log-loss (nats, lower is better)",
    "expected_calibration_error": "Expected calibration error (lower is better)",
}


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(path, text):
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _strict(value):
    """Make a value fit for strict JSON: no NaN, no NumPy, no tuples."""
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return [_strict(v) for v in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _write_json(path, value):
    _write(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_predictions(path, predictions):
    """Write predictions.csv: one row per clip, with enough digits to compute the report again.

    Arguments
    ---------
    path : str or Path
    predictions : Predictions
    """
    p, path = predictions, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    clients = p.client_ids or ("",) * len(p.ids)
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = [PROBABILITY + label for label in p.labels]
            writer.writerow(["ID", "client_id", "accent", "predicted", *columns, "gender", "age", "seconds"])
            truth, predicted = p.truth.tolist(), p.predicted.tolist()
            for i, row in enumerate(p.probabilities.tolist()):
                answer = p.labels[predicted[i]]
                writer.writerow(
                    [p.ids[i], clients[i], p.labels[truth[i]], answer, *row, p.gender[i], p.age[i], p.seconds[i].item()]
                )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_predictions(path):
    """Read predictions.csv back.

    Arguments
    ---------
    path : str or Path
        The file, or the report's folder.

    Returns
    -------
    predictions : Predictions

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
    return m.Predictions(
        ids=column["ID"],
        client_ids=column.get("client_id"),
        truth=np.array(truth, dtype=np.int64),
        log_probabilities=log_probabilities.reshape(len(rows), len(labels)),
        labels=labels,
        seconds=seconds,
        gender=column.get("gender"),
        age=column.get("age"),
    )


# ---- text ------------------------------------------------------------------------------------------------------------


def show(v, signed=False):
    """Show a figure with its interval: 0.912 (0.861 to 0.955)."""
    if v is None or v["value"] is None:
        return "–"
    style = "+.3f" if signed else ".3f"
    interval = "" if v["low"] is None else f" ({v['low']:{style}} to {v['high']:{style}})"
    return f"{v['value']:{style}}{interval}"


def _percent(share):
    return f"{share:.0%}"


def many(count, word):
    """Count in words: 1 clip, 2 clips."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def span(seconds):
    """Show a duration in the unit that suits it."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def warnings_of(data):
    """Say what the data of a report cannot show, as a list of (short form for a title, sentence)."""
    warnings = []
    if data.get("split") == "random":
        warnings.append(("LEAKY split: speakers shared", LEAKY))
    elif data.get("speakers_disjoint") is None:
        warnings.append(("may share speakers", MAY_SHARE))
    elif not data["speakers_disjoint"]:
        warnings.append(("speakers shared", SHARED))
    if data.get("synthetic"):
        warnings.append(("synthetic speech", SYNTHETIC))
    return warnings


def _title(data):
    short = "; ".join(w for w, _ in warnings_of(data))
    return f"English accents: {data['name']}" + (f" ({short})" if short else "")


def _contents(metrics, rows, images):
    """Yield the blocks of a report: (kind, ...), all text plain."""
    data, clip, speaker = metrics["data"], metrics["clip"], metrics["speaker"]
    yield "heading", 1, _title(data)
    for _, sentence in warnings_of(data):
        yield "warning", sentence
    amount = [many(data["clips"], "clip"), span(data["seconds"])]
    if data["speakers"] is not None:
        amount.insert(0, many(data["speakers"], "speaker"))
    levels = [("clip", clip)] + ([("speaker", speaker)] if speaker else [])
    average = " and ".join(f"{show(v['unweighted_average_recall'])} by {name}" for name, v in levels)
    present = len(metrics["per_accent"])
    yield (
        "text",
        (
            f"Unweighted average recall {average}; guessing gives {1 / present:.2f}. Tested on {', '.join(amount)} of "
            f"{', '.join(metrics['per_accent'])}."
        ),
    )
    yield "table", ["", *(f"by {name}" for name, _ in levels)], [
        [text, *(show(v[name]) for _, v in levels)] for name, text in NAMES.items()
    ]  # fmt: skip
    unit = "speakers within their accent" if speaker else "clips (speakers are not known)"
    yield "text", f"In brackets: 95 % intervals, from a bootstrap over {clip['accuracy']['n']:,} {unit}."
    if metrics["notes"]:
        yield "heading", 2, "Notes"
        yield "list", metrics["notes"]

    yield "heading", 2, "What is taken for what"
    yield "picture", images["confusion"], "Confusion matrices by clip and by speaker; rows are the true accent"
    yield "table", ["accent", "recall", "precision", "F1", "clips", "speakers"], [
        [label, *(show(v[k]) for k in ("recall", "precision", "f1")), f"{v['clips']:,}", _count(v["speakers"])]
        for label, v in metrics["per_accent"].items()
    ]  # fmt: skip

    yield "heading", 2, "Who is recognised how well"
    yield "picture", images["recall"], "Recall of each accent and group with its interval"
    cells = [
        [kind, name, show(v["unweighted_average_recall"]), f"{v['clips']:,}", _count(v["speakers"]),
         "too few to read" if v["small"] else ""]
        for kind, group in metrics["groups"].items() for name, v in group.items()
    ]  # fmt: skip
    yield "table", ["group", "", "unweighted average recall by clip", "clips", "speakers", ""], cells

    if rows:
        yield "heading", 2, "Speakers at a glance"
        yield "text", _few_or_many(rows)
        yield "picture", images["speakers"], "Each test speaker's clips by answer, grouped by true accent"
        ordered = sorted(rows, key=lambda r: (r["right"], r["share_right"], r["accent"], r["client_id"]))
        yield "table", ["speaker", "true accent", "clips", "clips right", "answer", "probability", ""], [
            [r["client_id"] or "?", r["accent"], f"{r['clips']:,}", _percent(r["share_right"]), r["answer"],
             f"{r['probability']:.2f}", "" if r["right"] else "wrong"]
            for r in ordered[:MOST_ROWS]
        ]  # fmt: skip
        if len(ordered) > MOST_ROWS:
            yield (
                "text",
                f"The {MOST_ROWS} worst of {len(ordered):,} speakers; {PREDICTIONS_FILE} has the clips of all.",
            )

    yield "heading", 2, "How far to trust a probability"
    yield "picture", images["reliability"], "Share of right answers against their probability, and number of clips"
    yield "picture", images["scores"], "Probability given to the true accent, by accent"

    yield "heading", 2, "Answering only when sure"
    yield "text", _surest(metrics["risk_coverage"], clip["accuracy"])
    yield "picture", images["coverage"], "Share of wrong answers against the share of clips answered, the surest first"
    yield ("errors",)

    if "bands" in metrics:
        yield "heading", 2, "Worse recordings"
        yield "text", "The same clips, degraded; the cost is paired, resampling speakers."
        yield "table", ["band", "unweighted average recall by clip", "cost", "accuracy by clip"], [
            ["as recorded", show(clip["unweighted_average_recall"]), "", show(clip["accuracy"])],
            *([name, show(v["unweighted_average_recall"]), show(v["difference"], True), show(v["accuracy"])]
              for name, v in metrics["bands"].items()),
        ]  # fmt: skip
    if "out_of_set" in metrics:
        yield from _out_of_set(metrics["out_of_set"])
    if "curves" in images:
        yield "heading", 2, "Training"
        yield "picture", images["curves"], "Loss and scores by epoch"

    yield "heading", 2, "Where this comes from"
    facts = {**data, "seconds": round(data["seconds"], 1)}
    for name, table in (("data", facts), ("model", metrics["model"]), ("versions", metrics["versions"])):
        if table:
            yield "table", [name, ""], list(rows_of(table))
    if metrics["command"]:
        yield "code", metrics["command"]


def _count(number):
    return "–" if number is None else f"{number:,}"


def rows_of(table, above=""):
    """Yield rows of a nested dict; its innermost dicts take one row each."""
    for key, value in table.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            yield from rows_of(value, f"{above}{key}, ")
        elif isinstance(value, dict):
            yield [f"{above}{key}", ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "none"]
        else:
            yield [f"{above}{key}", _plain(value)]


def _plain(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not known"}[value]
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)


def _few_or_many(rows):
    """Say whether errors are a few speakers or many clips."""
    total, clips = sum(r["clips"] - r["clips_right"] for r in rows), sum(r["clips"] for r in rows)
    if not total:
        return f"All {clips:,} clips of {many(len(rows), 'speaker')} are right."
    lost = [r for r in rows if not r["right"]]
    theirs = sum(r["clips"] - r["clips_right"] for r in lost)
    clean = sum(r["clips"] == r["clips_right"] for r in rows)
    return (
        f"Wrong clips: {total:,} of {clips:,}. Speakers whose answer over all clips is wrong: {len(lost):,} of "
        f"{len(rows):,}, with {theirs:,} of the wrong clips. Speakers without a wrong clip: {clean:,}."
    )


def _surest(part, accuracy):
    """Say what leaving the least sure clips unanswered gains."""
    points = {sure["threshold"]: sure for sure in reversed(part["surest"].values())}  # ties make some of them equal
    return " ".join([
        f"Answering all clips: accuracy {show(accuracy)}.",
        *(f"Answering only the surest {_percent(sure['coverage'])} of clips (probability at least {threshold:.3f}): "
          f"accuracy {show(sure['accuracy'])}." for threshold, sure in points.items()),
        f"Area under the curve of risk and coverage (lower is better, 0 without an error): {show(part['area'])}.",
        "These thresholds were chosen on the clips they are tested on.",
    ])  # fmt: skip


def _out_of_set(result):
    yield "heading", 2, "Other accents"
    yield (
        "text",
        (
            "Speech of accents that are not among the classes: the model answers all the same. AUROC: how often a clip "
            "of a known accent gets a larger probability than one of these (0.5: no difference seen)."
        ),
    )
    known = {"in_set": "(known accents)", "overall": "all others"}
    described = [(text, result[key]) for key, text in known.items()] + list(result["accents"].items())
    yield "table", ["accent", "clips", "AUROC", *(f"probability ≥ {c}" for c in m.CONFIDENT), "mostly answered"], [
        [name, f"{v['clips']:,}", f"{v['auroc']:.3f}" if "auroc" in v else "", *map(_percent, v["confident"].values()),
         "" if "auroc" not in v else "{} {:.0%}".format(*max(v["answers"].items(), key=lambda kv: kv[1]))]
        for name, v in described
    ]  # fmt: skip


def _escape(text):
    """Make plain text safe in Markdown, also in a table's cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;").replace(">", "&gt;")


def to_markdown(blocks):
    """Write blocks as GitHub's Markdown."""
    lines = []
    for kind, *rest in blocks:
        if kind == "heading":
            lines.append("#" * rest[0] + " " + _escape(rest[1]))
        elif kind == "warning":
            lines.append(f"> **{_escape(rest[0])}**")
        elif kind == "text":
            lines.append(_escape(rest[0]))
        elif kind == "list":
            lines.append("\n".join(f"* {_escape(item)}" for item in rest[0]))
        elif kind == "table":
            header, rows = rest
            cells = [header, ["---"] * len(header), *rows]
            body = [[_escape(c) if i != 1 else c for c in row] for i, row in enumerate(cells)]
            lines.append("\n".join("| " + " | ".join(row) + " |" for row in body))
        elif kind == "picture":
            lines.append(f"![{_escape(rest[1])}]({rest[0]})")
        elif kind == "code":
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", rest[0])), default=0))
            lines.append(f"{fence}\n{rest[0]}\n{fence}")
    return "\n\n".join(lines) + "\n"


# ---- what callers use ------------------------------------------------------------------------------------------------


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
    draws=1000,
    seed=0,
):
    """Evaluate predictions and write the whole report.

    Arguments
    ---------
    folder : str or Path
        Made where it is missing; older files of the same names are replaced.
    predictions : Predictions
    data : dict
        "name", "synthetic", "speakers_disjoint" (None: not known), and perhaps "split" ("random": a leaky one).
    model, versions : dict
        Anything worth telling, name -> value.
    command : str
        How this came about.
    curves : list of dict, or None
        One per epoch: "epoch", "train_loss", "valid_loss", "valid_macro_f1", "valid_uar".
    notes : list of str
        What a reader must know besides.
    audio : callable, or None
        Clip ID -> path of its audio or None, for players in the HTML report.
    out_of_set : dict, or None
        From `accent_plugin.metrics.out_of_set`.
    bands : dict, or None
        Name of a degradation -> Predictions of the same clips.
    selected_epoch : int, or None
    draws, seed : int
        Of the bootstrap.

    Returns
    -------
    metrics : dict
        As written to metrics.json.
    """
    folder, p = Path(folder), predictions
    folder.mkdir(parents=True, exist_ok=True)
    metrics = m.evaluate(p, draws=draws, seed=seed)
    own_notes = metrics.pop("notes")
    metrics = {
        "data": {
            "name": str(data.get("name", "")),
            "synthetic": bool(data.get("synthetic", False)),
            "speakers_disjoint": data.get("speakers_disjoint"),
            **{k: v for k, v in data.items() if k not in ("name", "synthetic", "speakers_disjoint")},
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
        metrics["bands"] = {name: _band(p, other, draws, seed) for name, other in bands.items()}
    metrics = _strict(metrics)

    rows = m.speakers(p)
    images = _draw(folder, p, metrics, rows, curves, selected_epoch)
    blocks = list(_contents(metrics, rows, images))
    write_predictions(folder / PREDICTIONS_FILE, p)
    _write(folder / MARKDOWN_FILE, to_markdown(blocks))
    _write(
        folder / HTML_FILE, report_html.render(_title(metrics["data"]), blocks, folder, report_html.players(p, audio))
    )
    # Last, since it is what other programs look for.
    _write_json(folder / METRICS_FILE, metrics)
    return metrics


def remove_report(folder):
    """Remove what `write_report` writes to a folder, and nothing else."""
    pictures_of_it = (f"{name}.png" for name in (*_PICTURES, *_PICTURES_OF_SOME))
    for name in (METRICS_FILE, PREDICTIONS_FILE, MARKDOWN_FILE, HTML_FILE, *pictures_of_it):
        (Path(folder) / name).unlink(missing_ok=True)


def _speakers(p):
    return len({client or f"\0{clip}" for client, clip in zip(p.client_ids, p.ids, strict=True)})


def _band(clean, degraded, draws, seed):
    """Evaluate the same clips degraded, and what that costs."""
    clip = m.evaluate(degraded, draws=draws, seed=seed)["clip"]
    difference = m.compare(clean, degraded, draws=draws, seed=seed)["clip"]["unweighted_average_recall"]["difference"]
    return {**clip, "difference": difference}


def _draw(folder, p, metrics, rows, curves, selected_epoch):
    """Draw every picture and return their file names."""
    images = {name: f"{name}.png" for name in _PICTURES}
    counts = metrics["confusion"]
    matrices = {"by clip": counts["clips"], "by speaker": counts["speakers"]}
    pictures.confusion(folder / images["confusion"], p.labels, {k: v for k, v in matrices.items() if v is not None})
    pictures.recall(folder / images["recall"], metrics)
    pictures.reliability(folder / images["reliability"], p, metrics["clip"]["expected_calibration_error"]["value"])
    pictures.scores(folder / images["scores"], p)
    pictures.coverage(folder / images["coverage"], metrics["risk_coverage"])
    for name, wanted in zip(_PICTURES_OF_SOME, (rows, curves), strict=True):
        if wanted:
            images[name] = f"{name}.png"
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # an older report's
    if rows:
        pictures.speakers(folder / images["speakers"], rows, p.labels)
    if curves:
        pictures.curves(folder / images["curves"], curves, selected_epoch)
    return images


def write_comparison(folder, a_name, b_name, comparison):
    """Write comparison.json and comparison.md.

    Arguments
    ---------
    folder : str or Path
    a_name, b_name : str
    comparison : dict
        From `accent_plugin.metrics.compare`.
    """
    figures, text = (Path(folder) / name for name in COMPARISON_FILES)
    _write_json(figures, {"a": a_name, "b": b_name, **comparison})
    _write(text, to_markdown(_compared(a_name, b_name, comparison)))


def _compared(a_name, b_name, comparison):
    yield "heading", 1, f"{b_name} against {a_name}"
    speakers = "" if comparison["speakers"] is None else f" of {many(comparison['speakers'], 'speaker')}"
    text = (
        f"The same {many(comparison['clips'], 'clip')}{speakers}. Difference: {b_name} minus {a_name}, with the 95 % "
    )
    yield "text", text + "interval of a paired bootstrap; an interval that holds 0 shows no difference."
    for level in ("clip", "speaker"):
        if comparison[level]:
            yield "heading", 2, f"By {level}"
            yield "table", ["", a_name, b_name, "difference"], [
                [text, f"{v['a']:.3f}", f"{v['b']:.3f}", show(v["difference"], signed=True)]
                for v, text in ((comparison[level][name], text) for name, text in NAMES.items())
            ]  # fmt: skip
    if comparison["notes"]:
        yield "list", comparison["notes"]
    if comparison["speaker"]:
        changed = comparison["changed"]
        right = sum(c["b"]["answer"] == c["accent"] for c in changed)
        lost = sum(c["a"]["answer"] == c["accent"] for c in changed)
        yield "heading", 2, "Speakers whose answer changed"
        text = f"{len(changed)} of {comparison['speakers']}: {right} put right, {lost} lost, "
        yield "text", text + f"{len(changed) - right - lost} wrong both times."
        if changed:
            order = sorted(changed, key=lambda c: (c["b"]["answer"] == c["accent"], c["accent"], c["client_id"]))
            yield "table", ["speaker", "true accent", "clips", a_name, b_name, ""], [
                [c["client_id"] or "?", c["accent"], str(c["clips"]),
                 *(f"{c[k]['answer']} {c[k]['probability']:.2f}, {c[k]['share_right']:.0%} right" for k in "ab"),
                 "put right" if c["b"]["answer"] == c["accent"] else "lost" if c["a"]["answer"] == c["accent"] else ""]
                for c in order[:MOST_ROWS]
            ]  # fmt: skip


def write_summary(folder, summary):
    """Write summary.json and summary.md.

    Arguments
    ---------
    folder : str or Path
    summary : dict
        From `accent_plugin.metrics.summarise`.
    """
    _write_json(Path(folder) / "summary.json", summary)
    _write(Path(folder) / "summary.md", to_markdown(_summarised(summary)))


def _summarised(summary):
    yield "heading", 1, f"Summary of {many(len(summary['runs']), 'run')}"
    for level in ("clip", "speaker"):
        if summary[level]:
            yield "heading", 2, f"By {level}"
            yield "table", ["", "mean", "standard deviation", *summary["runs"]], [
                [text, f"{v['mean']:.3f}", "–" if v["standard_deviation"] is None else f"{v['standard_deviation']:.3f}",
                 *(f"{x:.3f}" for x in v["values"])]
                for v, text in ((summary[level][name], text) for name, text in NAMES.items())
            ]  # fmt: skip
    yield "text", "The standard deviation is over runs on the same test data; it says nothing about other speakers."


def write_leak(folder, runs):
    """Write leak.md: what an evaluation on speakers heard in training reports beside an honest one.

    Arguments
    ---------
    folder : str or Path
    runs : dict
        Name of a run -> the content of its metrics.json; the honest one first.
    """
    _write(Path(folder) / LEAK_FILE, to_markdown(_leaked(runs)))


def _leaked(runs):
    yield "heading", 1, "What shared speakers add"
    yield "text", LEAKY
    for level in ("clip", "speaker"):
        if all(run[level] for run in runs.values()):
            yield "heading", 2, f"By {level}"
            yield (
                "table",
                ["", *runs],
                [[text, *(show(run[level][name]) for run in runs.values())] for name, text in NAMES.items()],
            )
