"""How figures, counts and durations are written in reports."""

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


# ---- text ------------------------------------------------------------------------------------------------------------


def format_figure(v, signed=False):
    """Show a figure with its interval: 0.912 (0.861 to 0.955)."""
    if v is None or v["value"] is None:
        return "–"
    style = "+.3f" if signed else ".3f"
    interval = "" if v["low"] is None else f" ({v['low']:{style}} to {v['high']:{style}})"
    return f"{v['value']:{style}}{interval}"


def percent(share):
    """A fraction as a whole percentage."""
    return f"{share:.0%}"


def count_in_words(count, word):
    """Count in words: 1 clip, 2 clips."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def format_duration(seconds):
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


def report_title(data):
    """Title of a report, with what its data cannot show."""
    short = "; ".join(w for w, _ in warnings_of(data))
    return f"English accents: {data['name']}" + (f" ({short})" if short else "")
