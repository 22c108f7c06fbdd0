"""Texts, figures, counts and durations of reports."""

MOST_ROWS = 250  # rows in the table of speakers; predictions.csv has all speakers
SYNTHETIC = "Synthetic speech: shows that the pipeline works, and says nothing about accuracy on real speech."

LEAKY = (
    "LEAKY split: clips of the same speaker are in train and in test. A model that recognises the speaker scores well, "
    "so these figures are far higher than on new speakers: do not compare the two."
)

SHARED = "Train and test share speakers: expect lower figures on new speakers."
MAY_SHARE = (
    "Train and test may share speakers, because the speakers are not known: expect lower figures on new speakers."
)

NAMES = {
    "accuracy": "Accuracy",
    "unweighted_average_recall": "Unweighted average recall",
    "macro_f1": "Macro-F1",
    "log_loss": "Log-loss (nats, lower is better)",
    "expected_calibration_error": "Expected calibration error (lower is better)",
}
UNCALIBRATED = "Not calibrated: uncalibrated probabilities are usually too high."


def format_figure(v, signed=False):
    """Format a figure with its interval: 0.912 (0.861 to 0.955)."""
    if v is None or v["value"] is None:
        return "–"
    style = "+.3f" if signed else ".3f"
    interval = "" if v["low"] is None else f" ({v['low']:{style}} to {v['high']:{style}})"
    return f"{v['value']:{style}}{interval}"


def percent(fraction):
    """Format a fraction as a whole percentage."""
    return f"{fraction:.0%}"


def count_in_words(count, word):
    """Format a count with its noun: 1 clip, 2 clips."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def format_duration(seconds):
    """Format a duration in a suitable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def describe_amount(data):
    """Format the amount of data: 22 speakers, 99 clips, 8.2 minutes."""
    speakers = [] if data["speakers"] is None else [count_in_words(data["speakers"], "speaker")]
    return ", ".join([*speakers, count_in_words(data["clips"], "clip"), format_duration(data["seconds"])])


def limit_of_labels(labels):
    """State that the model gives one of its labels to any input."""
    return (
        f"The model's labels are {', '.join(labels)}. Speech in other accents or languages, and noise, also get "
        "one of these labels."
    )


def warnings_of(data):
    """List the limitations of a report's data as (short form for the title, sentence)."""
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


def report_title(data):
    """Make the title of a report, with the limitations of its data."""
    short = "; ".join(w for w, _ in warnings_of(data))
    return f"English accents: {data['name']}" + (f" ({short})" if short else "")
