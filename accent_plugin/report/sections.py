"""The sections of a report, as blocks of plain text, tables and figures."""

from accent_plugin.evaluation.compare import CONFIDENT
from accent_plugin.evaluation.evaluate import SMALL
from accent_plugin.report.markdown import count_cell, table_rows
from accent_plugin.report.predictions_csv import PREDICTIONS_FILE
from accent_plugin.report.text import (
    MOST_ROWS,
    NAMES,
    count_in_words,
    describe_amount,
    format_figure,
    percent,
    report_title,
    warnings_of,
)


def figures_table(columns):
    """Make the table of headline figures: heading of a column -> its figures."""
    rows = [[text, *(format_figure(v[name]) for v in columns.values())] for name, text in NAMES.items()]
    return "table", ["", *columns], rows


def accents_table(accents):
    """Make the table of the figures of each accent by clip, from "per_accent" of metrics.json."""
    return "table", ["accent", "recall", "precision", "F1", "clips", "speakers"], [
        [label, *(format_figure(v[k]) for k in ("recall", "precision", "f1")), count_cell(v["clips"]),
         count_cell(v["speakers"])]
        for label, v in accents.items()
    ]  # fmt: skip


def report_blocks(metrics, rows, images):
    """Yield the blocks of a report: (kind, ...); all text is plain."""
    data, clip, speaker = metrics["data"], metrics["clip"], metrics["speaker"]
    yield "heading", 1, report_title(data)
    for sentence in [*(sentence for _, sentence in warnings_of(data)), *metrics["warnings"]]:
        yield "warning", sentence
    levels = [("clip", clip)] + ([("speaker", speaker)] if speaker else [])
    average = " and ".join(f"{format_figure(v['unweighted_average_recall'])} by {name}" for name, v in levels)
    present = len(metrics["per_accent"])
    text = (
        f"Unweighted average recall {average}; chance level {1 / present:.2f}. Tested on {describe_amount(data)} with "
    )
    yield "text", text + f"the accents {', '.join(metrics['per_accent'])}."
    yield figures_table({f"by {name}": v for name, v in levels})
    unit = "speakers, stratified by accent" if speaker else "clips (speakers are not known)"
    yield "text", f"In brackets: 95 % intervals, from a bootstrap over {clip['accuracy']['n']:,} {unit}."
    if metrics["notes"]:
        yield "heading", 2, "Notes"
        yield "list", metrics["notes"]

    yield "heading", 2, "Confusion matrix"
    yield "picture", images["confusion"], "Confusion matrices by clip and by speaker; rows are the true accent"
    yield accents_table(metrics["per_accent"])

    yield "heading", 2, "Recall by accent and group"
    if metrics.get("text"):
        yield "text", _text_in_training(metrics["text"])
    yield "picture", images["recall"], "Recall of each accent and group with its interval"
    cells = [
        [kind, name, format_figure(v["unweighted_average_recall"]), f"{v['clips']:,}", count_cell(v["speakers"]),
         "too few speakers" if v["small"] else ""]
        for kind, group in metrics["groups"].items() for name, v in group.items()
    ]  # fmt: skip
    yield "table", ["group", "", "unweighted average recall by clip", "clips", "speakers", ""], cells

    if rows:
        yield "heading", 2, "Results by speaker"
        yield "text", _distribution_of_errors(rows)
        yield "picture", images["speakers"], "Each test speaker's clips by answer, grouped by true accent"
        ordered = sorted(rows, key=lambda r: (r["right"], r["share_right"], r["accent"], r["client_id"]))
        yield "table", ["speaker", "true accent", "clips", "correct clips", "answer", "probability", ""], [
            [r["client_id"] or "?", r["accent"], f"{r['clips']:,}", percent(r["share_right"]), r["answer"],
             f"{r['probability']:.2f}", "" if r["right"] else "wrong"]
            for r in ordered[:MOST_ROWS]
        ]  # fmt: skip
        if len(ordered) > MOST_ROWS:
            yield "text", f"The worst {MOST_ROWS} of {len(ordered):,} speakers; {PREDICTIONS_FILE} has all clips."

    yield "heading", 2, "Calibration"
    yield "picture", images["reliability"], "Fraction of correct answers against the probability, and number of clips"
    yield "picture", images["scores"], "Probability given to the true accent, by accent"

    yield "heading", 2, "Calibration by accent and group"
    yield from _calibration_by_group(metrics)

    yield "heading", 2, "Selective classification"
    yield "text", _effect_of_abstaining(metrics["risk_coverage"], clip["accuracy"])
    yield "picture", images["coverage"], "Error rate against the fraction of clips answered, the most confident first"
    yield ("errors",)

    if "bands" in metrics:
        yield "heading", 2, "Degraded audio"
        yield "text", "The same clips, degraded. Difference: degraded minus as recorded, from a paired bootstrap."
        if "degradations" in images:
            yield (
                "picture",
                images["degradations"],
                "Unweighted average recall by strength (dashed: as recorded)",
            )
        header = ["degradation", "unweighted average recall by clip", "difference", "accuracy by clip"]
        yield "table", [*header, "expected calibration error"], [
            ["as recorded", format_figure(clip["unweighted_average_recall"]), "", format_figure(clip["accuracy"]),
             format_figure(clip["expected_calibration_error"])],
            *([name, format_figure(v["unweighted_average_recall"]), format_figure(v["difference"], True),
               format_figure(v["accuracy"]), format_figure(v["expected_calibration_error"])]
              for name, v in metrics["bands"].items()),
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


def _text_in_training(text):
    return (
        f"Training has {text['words_in_training']:,} of the {text['words']:,} words of the test clips, and the whole "
        f"sentence of {text['sentences_in_training']:,} of {text['clips']:,} clips. On words that training does not "
        "have, expect the lower figures of the table below."
    )


def _calibration_by_group(metrics):
    confidence = metrics["confidence"]
    source = "chosen on validation" if confidence["threshold_given"] else "at which 80% of these clips are answered"
    yield "text", (
        "Mean probability minus accuracy is positive for an overconfident model. The calibration error of small groups "
        f"is biased upwards. Clips count as answered from a probability of {confidence['threshold']:.3f} on, {source}."
    )  # fmt: skip
    overall = {"expected_calibration_error": metrics["clip"]["expected_calibration_error"], **confidence}
    accents = [("accent", label, cell, cell["recall"]["n"] < SMALL) for label, cell in metrics["per_accent"].items()]
    groups = [
        (kind, name, cell, cell["small"]) for kind, group in metrics["groups"].items() for name, cell in group.items()
    ]
    cells = [("all", "", {**overall, **{key: metrics["data"][key] for key in ("clips", "speakers")}}, False)]
    yield "table", ["group", "", "expected calibration error", "mean probability minus accuracy", "fraction answered",
                    "clips", "speakers", ""], [
        [kind, name, format_figure(v["expected_calibration_error"]),
         format_figure(v["confidence_minus_accuracy"], signed=True), format_figure(v["coverage"]),
         count_cell(v["clips"]), count_cell(v["speakers"]), "too few speakers" if small else ""]
        for kind, name, v, small in [*cells, *accents, *groups]
    ]  # fmt: skip
    if confidence["auroc"]:
        figure = format_figure(confidence["auroc"])
        yield "text", f"AUROC of the probability between right and wrong answers: {figure} (0.5: chance)."


def _distribution_of_errors(rows):
    """State whether errors come from a few speakers or from many clips."""
    total, clips = sum(r["clips"] - r["clips_right"] for r in rows), sum(r["clips"] for r in rows)
    if not total:
        return f"All {clips:,} clips of {count_in_words(len(rows), 'speaker')} are classified correctly."
    wrong = [r for r in rows if not r["right"]]
    of_wrong = sum(r["clips"] - r["clips_right"] for r in wrong)
    without = sum(r["clips"] == r["clips_right"] for r in rows)
    return (
        f"Misclassified clips: {total:,} of {clips:,}. Misclassified speakers: {len(wrong):,} of {len(rows):,}, with "
        f"{of_wrong:,} of the misclassified clips. Speakers without a misclassified clip: {without:,}."
    )


def _effect_of_abstaining(part, accuracy):
    points = {sure["threshold"]: sure for sure in reversed(part["surest"].values())}  # ties make some thresholds equal
    return " ".join([
        f"Answering all clips: accuracy {format_figure(accuracy)}.",
        *(f"Answering only the most confident {percent(sure['coverage'])} of clips "
          f"(probability at least {threshold:.3f}): accuracy {format_figure(sure['accuracy'])}."
          for threshold, sure in points.items()),
        f"Area under the risk-coverage curve (lower is better, 0 without errors): "
        f"{format_figure(part['area'])}.",
        "The thresholds were chosen on these test clips, so the accuracies are slightly optimistic.",
    ])  # fmt: skip


def _out_of_set(result):
    yield "heading", 2, "Out-of-set accents"
    text = "Clips with accents outside the label set; the model still gives one of its labels. AUROC is the "
    yield "text", text + "probability that a clip with a known accent gets a larger probability (0.5: chance)."
    known = {"in_set": "(known accents)", "overall": "all others"}
    described = [(text, result[key]) for key, text in known.items()] + list(result["accents"].items())
    yield "table", ["accent", "clips", "AUROC", *(f"probability ≥ {c}" for c in CONFIDENT), "most frequent answer"], [
        [name, f"{v['clips']:,}", f"{v['auroc']:.3f}" if "auroc" in v else "", *map(percent, v["confident"].values()),
         "" if "auroc" not in v else "{} {:.0%}".format(*max(v["answers"].items(), key=lambda kv: kv[1]))]
        for name, v in described
    ]  # fmt: skip
