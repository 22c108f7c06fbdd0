"""Reports on several runs: comparison, summary of seeds, effect of leaky splits."""

from pathlib import Path

from accent_plugin.report.markdown import to_markdown
from accent_plugin.report.sections import figures_table
from accent_plugin.report.text import LEAKY, MOST_ROWS, NAMES, count_in_words, format_figure
from accent_plugin.report.write import write_json, write_text

LEAK_FILE = "leak.md"
COMPARISON_FILES = ("comparison.json", "comparison.md")


def write_comparison(folder, a_name, b_name, comparison):
    """Write comparison.json and comparison.md from the dict of `accent_plugin.evaluation.compare.compare_models`."""
    figures, text = (Path(folder) / name for name in COMPARISON_FILES)
    write_json(figures, {"a": a_name, "b": b_name, **comparison})
    write_text(text, to_markdown(_compared(a_name, b_name, comparison)))


def _compared(a_name, b_name, comparison):
    yield "heading", 1, f"{b_name} against {a_name}"
    speakers = "" if comparison["speakers"] is None else f" of {count_in_words(comparison['speakers'], 'speaker')}"
    text = f"The same {count_in_words(comparison['clips'], 'clip')}{speakers}. Difference: {b_name} minus {a_name}, "
    yield "text", text + "with the 95 % interval of a paired bootstrap. If it contains 0, there is no clear difference."
    for level in ("clip", "speaker"):
        if comparison[level]:
            yield "heading", 2, f"By {level}"
            yield "table", ["", a_name, b_name, "difference"], [
                [text, f"{v['a']:.3f}", f"{v['b']:.3f}", format_figure(v["difference"], signed=True)]
                for v, text in ((comparison[level][name], text) for name, text in NAMES.items())
            ]  # fmt: skip
    if comparison["notes"]:
        yield "list", comparison["notes"]
    if comparison["speaker"]:
        changed = comparison["changed"]
        results = [(c["a"]["answer"] == c["accent"], c["b"]["answer"] == c["accent"]) for c in changed]
        improved, worse = results.count((False, True)), results.count((True, False))
        yield "heading", 2, "Speakers whose answer changed"
        text = f"{len(changed)} of {comparison['speakers']}: {improved} corrected, {worse} newly wrong, "
        yield "text", text + f"{len(changed) - improved - worse} wrong both times."
        if changed:
            order = sorted(changed, key=lambda c: (c["b"]["answer"] == c["accent"], c["accent"], c["client_id"]))
            yield "table", ["speaker", "true accent", "clips", a_name, b_name, ""], [
                [c["client_id"] or "?", c["accent"], str(c["clips"]),
                 *(f"{c[k]['answer']} {c[k]['probability']:.2f}, {c[k]['share_right']:.0%} correct" for k in "ab"),
                 {c["a"]["answer"]: "newly wrong", c["b"]["answer"]: "corrected"}.get(c["accent"], "")]
                for c in order[:MOST_ROWS]
            ]  # fmt: skip


def write_summary(folder, summary):
    """Write summary.json and summary.md from the dict of `accent_plugin.evaluation.compare.summarise_runs`."""
    write_json(Path(folder) / "summary.json", summary)
    write_text(Path(folder) / "summary.md", to_markdown(_summarised(summary)))


def _summarised(summary):
    yield "heading", 1, f"Summary of {count_in_words(len(summary['runs']), 'run')}"
    for level in ("clip", "speaker"):
        if summary[level]:
            yield "heading", 2, f"By {level}"
            yield "table", ["", "mean", "standard deviation", *summary["runs"]], [
                [text, f"{v['mean']:.3f}", "–" if v["standard_deviation"] is None else f"{v['standard_deviation']:.3f}",
                 *(f"{x:.3f}" for x in v["values"])]
                for v, text in ((summary[level][name], text) for name, text in NAMES.items())
            ]  # fmt: skip
    yield (
        "text",
        "The standard deviation is over runs on the same test data. It does not measure variation between speakers.",
    )


def write_leak(folder, runs):
    """Write leak.md: a test on the training split's speakers compared with a test on new speakers.

    ``runs`` maps the name of a run to the content of its metrics.json; the run split by speaker comes first.
    """
    write_text(Path(folder) / LEAK_FILE, to_markdown(_leaked(runs)))


def _leaked(runs):
    yield "heading", 1, "Effect of shared speakers"
    yield "text", LEAKY
    for level in ("clip", "speaker"):
        if all(run[level] for run in runs.values()):
            yield "heading", 2, f"By {level}"
            yield figures_table({name: run[level] for name, run in runs.items()})
