"""The sections of a report, as blocks of plain text, tables and figures."""

from accent_plugin.evaluation.compare import CONFIDENT
from accent_plugin.report.markdown import count_cell, table_rows
from accent_plugin.report.predictions_csv import PREDICTIONS_FILE
from accent_plugin.report.text import (
    MOST_ROWS,
    NAMES,
    count_in_words,
    format_duration,
    format_figure,
    percent,
    report_title,
    warnings_of,
)


def report_blocks(metrics, rows, images):
    """Yield the blocks of a report: (kind, ...); all text is plain."""
    data, clip, speaker = metrics["data"], metrics["clip"], metrics["speaker"]
    yield "heading", 1, report_title(data)
    for _, sentence in warnings_of(data):
        yield "warning", sentence
    amount = [count_in_words(data["clips"], "clip"), format_duration(data["seconds"])]
    if data["speakers"] is not None:
        amount.insert(0, count_in_words(data["speakers"], "speaker"))
    levels = [("clip", clip)] + ([("speaker", speaker)] if speaker else [])
    average = " and ".join(f"{format_figure(v['unweighted_average_recall'])} by {name}" for name, v in levels)
    present = len(metrics["per_accent"])
    yield (
        "text",
        (
            f"Unweighted average recall {average}; chance level {1 / present:.2f}. Tested on {', '.join(amount)} of "
            f"{', '.join(metrics['per_accent'])}."
        ),
    )
    yield "table", ["", *(f"by {name}" for name, _ in levels)], [
        [text, *(format_figure(v[name]) for _, v in levels)] for name, text in NAMES.items()
    ]  # fmt: skip
    unit = "speakers within their accent" if speaker else "clips (speakers are not known)"
    yield "text", f"In brackets: 95 % intervals, from a bootstrap over {clip['accuracy']['n']:,} {unit}."
    if metrics["notes"]:
        yield "heading", 2, "Notes"
        yield "list", metrics["notes"]

    yield "heading", 2, "Confusion matrix"
    yield "picture", images["confusion"], "Confusion matrices by clip and by speaker; rows are the true accent"
    yield "table", ["accent", "recall", "precision", "F1", "clips", "speakers"], [
        [label, *(format_figure(v[k]) for k in ("recall", "precision", "f1")), count_cell(v["clips"]),
         count_cell(v["speakers"])]
        for label, v in metrics["per_accent"].items()
    ]  # fmt: skip

    yield "heading", 2, "Recall by accent and group"
    yield "picture", images["recall"], "Recall of each accent and group with its interval"
    cells = [
        [kind, name, format_figure(v["unweighted_average_recall"]), f"{v['clips']:,}", count_cell(v["speakers"]),
         "too few speakers" if v["small"] else ""]
        for kind, group in metrics["groups"].items() for name, v in group.items()
    ]  # fmt: skip
    yield "table", ["group", "", "unweighted average recall by clip", "clips", "speakers", ""], cells

    if rows:
        yield "heading", 2, "Results by speaker"
        yield "text", _few_or_many(rows)
        yield "picture", images["speakers"], "Each test speaker's clips by answer, grouped by true accent"
        ordered = sorted(rows, key=lambda r: (r["right"], r["share_right"], r["accent"], r["client_id"]))
        yield "table", ["speaker", "true accent", "clips", "clips right", "answer", "probability", ""], [
            [r["client_id"] or "?", r["accent"], f"{r['clips']:,}", percent(r["share_right"]), r["answer"],
             f"{r['probability']:.2f}", "" if r["right"] else "wrong"]
            for r in ordered[:MOST_ROWS]
        ]  # fmt: skip
        if len(ordered) > MOST_ROWS:
            yield (
                "text",
                f"The {MOST_ROWS} worst of {len(ordered):,} speakers; {PREDICTIONS_FILE} has the clips of all.",
            )

    yield "heading", 2, "Calibration"
    yield "picture", images["reliability"], "Fraction of correct answers against the probability, and number of clips"
    yield "picture", images["scores"], "Probability given to the true accent, by accent"

    yield "heading", 2, "Selective classification"
    yield "text", _surest(metrics["risk_coverage"], clip["accuracy"])
    yield "picture", images["coverage"], "Error rate against the fraction of clips answered, the most confident first"
    yield ("errors",)

    if "bands" in metrics:
        yield "heading", 2, "Degraded audio"
        yield "text", "The same clips, degraded. The cost is a paired difference; its interval resamples speakers."
        yield "table", ["degradation", "unweighted average recall by clip", "cost", "accuracy by clip"], [
            ["as recorded", format_figure(clip["unweighted_average_recall"]), "", format_figure(clip["accuracy"])],
            *([name, format_figure(v["unweighted_average_recall"]), format_figure(v["difference"], True),
               format_figure(v["accuracy"])] for name, v in metrics["bands"].items()),
        ]  # fmt: skip
    if "out_of_set" in metrics:
        yield from _out_of_set(metrics["out_of_set"])
    if "curves" in images:
        yield "heading", 2, "Training"
        yield "picture", images["curves"], "Loss and scores by epoch"

    yield "heading", 2, "Provenance"
    facts = {**data, "seconds": round(data["seconds"], 1)}
    for name, table in (("data", facts), ("model", metrics["model"]), ("versions", metrics["versions"])):
        if table:
            yield "table", [name, ""], list(table_rows(table))
    if metrics["command"]:
        yield "code", metrics["command"]


def _few_or_many(rows):
    """State whether errors come from a few speakers or from many clips."""
    total, clips = sum(r["clips"] - r["clips_right"] for r in rows), sum(r["clips"] for r in rows)
    if not total:
        return f"All {clips:,} clips of {count_in_words(len(rows), 'speaker')} are right."
    lost = [r for r in rows if not r["right"]]
    theirs = sum(r["clips"] - r["clips_right"] for r in lost)
    clean = sum(r["clips"] == r["clips_right"] for r in rows)
    return (
        f"Wrong clips: {total:,} of {clips:,}. Speakers whose answer over all clips is wrong: {len(lost):,} of "
        f"{len(rows):,}, with {theirs:,} of the wrong clips. Speakers without a wrong clip: {clean:,}."
    )


def _surest(part, accuracy):
    """State the effect of abstaining on the least confident clips."""
    points = {sure["threshold"]: sure for sure in reversed(part["surest"].values())}  # ties make some thresholds equal
    return " ".join([
        f"Answering all clips: accuracy {format_figure(accuracy)}.",
        *(f"Answering only the most confident {percent(sure['coverage'])} of clips "
          f"(probability at least {threshold:.3f}): accuracy {format_figure(sure['accuracy'])}."
          for threshold, sure in points.items()),
        f"Area under the curve of risk and coverage (lower is better, 0 without an error): "
        f"{format_figure(part['area'])}.",
        "These thresholds were chosen on the clips they are tested on.",
    ])  # fmt: skip


def _out_of_set(result):
    yield "heading", 2, "Out-of-set accents"
    yield (
        "text",
        (
            "Clips with accents outside the label set; the model still gives one of its labels. AUROC is the "
            "probability that a clip with a known accent gets a larger probability than one of these (0.5: chance)."
        ),
    )
    known = {"in_set": "(known accents)", "overall": "all others"}
    described = [(text, result[key]) for key, text in known.items()] + list(result["accents"].items())
    yield "table", ["accent", "clips", "AUROC", *(f"probability ≥ {c}" for c in CONFIDENT), "mostly answered"], [
        [name, f"{v['clips']:,}", f"{v['auroc']:.3f}" if "auroc" in v else "", *map(percent, v["confident"].values()),
         "" if "auroc" not in v else "{} {:.0%}".format(*max(v["answers"].items(), key=lambda kv: kv[1]))]
        for name, v in described
    ]  # fmt: skip
