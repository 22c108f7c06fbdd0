"""The web page: the answer as HTML, and the Gradio app around it.

The page has one column: record or choose a file, then the answer, then the model card. The answer consists of text and
tables; colours only repeat the text. The page loads no external resources.
"""

import contextlib
import html
import os
import shutil
import time
from pathlib import Path

import numpy as np

from accent_plugin.bundle.config import CARD_FILE
from accent_plugin.errors import AudioError, LimitError
from accent_plugin.inference.records import Failure
from accent_plugin.report.figures import COLOURS
from accent_plugin.report.text import UNCALIBRATED, count_in_words, limit_of_labels
from accent_plugin.serving.service import UPLOAD

# Used for classifiers without a threshold: below this probability, an answer is more likely wrong than right.
UNSURE = 0.5
# Time for which an upload is kept for playback.
KEEP_SECONDS = 600
_WIDTH, _WAVE, _ROW = 1000, 120, 26
_COLUMNS = 500
_MOST_ROWS = 4
_LETTERS = 9  # width of a letter, in pixels of the figure

CSS = """
.answer h2 { font-size: 1.5rem; margin: 0 0 .25rem; }
.answer h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.answer p { margin: .25rem 0; }
.answer table { width: 100%; border-collapse: collapse; border: 0; margin: .25rem 0; }
.answer table tr { border: 0; }
.answer table th, .answer table td { border: 0; padding: .2rem .5rem .2rem 0; text-align: left; }
.answer .bars th { font-weight: 600; width: 1%; overflow-wrap: anywhere; min-width: 5rem; }
.answer .bars td.number { text-align: right; width: 1%; white-space: nowrap; font-variant-numeric: tabular-nums; }
.answer .track { background: var(--border-color-primary); border-radius: 4px; height: 1.1rem; }
.answer .bar { border-radius: 4px; height: 1.1rem; min-width: 2px; border: 1px solid var(--body-text-color); }
.answer .warning, .answer .failure { border-left: 4px solid #D55E00; padding: .25rem .75rem; margin: .5rem 0; }
.answer .key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.answer .key i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; vertical-align: -.1em; }
.answer svg { width: 100%; height: auto; display: block; margin: .5rem 0; }
.answer details { margin-top: .5rem; }
.answer .hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.labels { font-size: .95rem; }
"""

# Screen readers read the answer when it changes. Gradio has no option for this.
_ON_LOAD = """() => {
    const answer = document.getElementById("answer");
    answer.setAttribute("role", "status");
    answer.setAttribute("aria-live", "polite");
}"""


def render(answer, classifier):
    """Render a `ServiceAnswer` as HTML, with the labels, threshold and calibration of the classifier."""
    if isinstance(answer.outcome, Failure):
        return failure(str(answer.outcome))
    outcome = answer.outcome
    parts = [f"<h2>{_headline(outcome)}</h2>", f"<p>{_escape(_caveat(outcome, classifier))}</p>"]
    parts += [f'<p class="warning">Warning: {_escape(warning)}.</p>' for warning in answer.warnings()]
    parts += ["<h3>Probability by accent</h3>", _bars(outcome, classifier.labels)]
    parts.append(f"<p>{_escape(_calibrated(classifier.calibration))}</p>")
    if len(outcome.windows) > 1:
        parts += ["<h3>Over time</h3>", _timeline(answer, classifier.labels)]
    parts += ["<h3>Recording</h3>", f"<p>{_escape(_recording_text(answer))}</p>"]
    return f'<section class="answer">{"".join(parts)}</section>'


def failure(message):
    """Render an error message as HTML."""
    return f'<section class="answer"><h2>No answer</h2><p class="failure" role="alert">{_escape(message)}</p></section>'


def is_unsure(outcome):
    """Whether a prediction is shown as uncertain."""
    return outcome.decision is None or not outcome.reliable or outcome.probability < UNSURE


def _headline(outcome):
    number = f"{_escape(outcome.accent)}, {_percent(outcome.probability)}"
    return f"Unsure; most likely: {number}" if is_unsure(outcome) else f"Most likely: {number}"


def _caveat(outcome, classifier):
    if outcome.decision is None:
        return f"The model is set to abstain below a probability of {classifier.threshold:.3f}."
    if not outcome.reliable:
        return "There is too little speech for a reliable answer."
    if outcome.probability < UNSURE:
        return "The answer is more likely wrong than right."
    return "An accent is not a nationality. Do not use this answer in decisions about people."


def _bars(outcome, labels):
    rows = []
    for number, label in enumerate(labels):
        p = outcome.probabilities[label]
        rows.append(
            f'<tr><th scope="row">{_escape(label)}</th><td><div class="track" aria-hidden="true"><div class="bar" '
            f'style="width:{100 * p:.1f}%;background:{_colour(number)}"></div></div></td>'
            f'<td class="number">{100 * p:.1f} %</td></tr>'
        )
    head = '<caption class="hidden">Probability by accent</caption>'
    return f'<table class="bars">{head}<tbody>{"".join(rows)}</tbody></table>'


def _calibrated(calibration):
    if not calibration:
        return UNCALIBRATED
    return (
        f"Calibrated on {count_in_words(calibration['clips'], 'validation clip')}: probabilities and frequencies "
        f"differed by {calibration['expected_calibration_error']['after']:.3f} on average there."
    )


def _recording_text(answer):
    outcome, header = answer.outcome, answer.header
    channels = "mono" if header.channels == 1 else f"{header.channels} channels, averaged to mono"
    return (
        f"{outcome.seconds:.1f} s, of which {outcome.speech_seconds:.1f} s are speech (estimated from the energy). "
        f"{header.codec}, {header.sample_rate:,} Hz, {channels}. Level relative to full scale: loud parts "
        f"{answer.quality.speech_db:.0f} dB, quiet parts {answer.quality.noise_db:.0f} dB."
    )


def _timeline(answer, labels):
    """Render the waveform, the accent of each window below it, and the same as a table."""
    outcome = answer.outcome
    rows = _rows_of(outcome.windows)
    scale = _WIDTH / outcome.seconds
    shapes, lines, seen = [], [], set()
    for row, window in zip(rows, outcome.windows, strict=True):
        span = f"{_time(window.start)} to {_time(window.end)}"
        if window.skipped:
            lines.append(f"<tr><td>{span}</td><td>too little speech</td><td></td></tr>")
            continue
        accent, p = max(window.probabilities.items(), key=lambda item: item[1])
        seen.add(accent)
        x, width = window.start * scale, (window.end - window.start) * scale
        y = _WAVE + 4 + row * _ROW
        fill, ink = _colour(labels.index(accent)), _text_colour(labels.index(accent))
        text = f"{accent}, {_percent(p)}"
        text = text if len(text) * _LETTERS < width else ""
        shapes.append(
            f'<g><title>{span}: {_escape(accent)}, {_percent(p)}</title><rect x="{x:.1f}" y="{y}" '
            f'width="{max(width - 2, 1):.1f}" height="{_ROW - 4}" rx="3" fill="{fill}"/>'
            f'<text x="{x + 5:.1f}" y="{y + 16}" font-size="15" fill="{ink}">{_escape(text)}</text></g>'
        )
        lines.append(f"<tr><td>{span}</td><td>{_escape(accent)}</td><td>{100 * p:.1f} %</td></tr>")
    height = _WAVE + 4 + (max(rows) + 1) * _ROW
    keys = "".join(
        f'<span class="key"><i style="background:{_colour(number)}" aria-hidden="true"></i>{_escape(label)}</span>'
        for number, label in enumerate(labels)
        if label in seen
    )
    head = (
        '<thead><tr><th scope="col">time</th><th scope="col">accent</th><th scope="col">probability</th></tr></thead>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Waveform of {outcome.seconds:.0f} seconds with '
        f'the most likely accent of each window; the table below has the same content">'
        f'<path d="{_waveform_path(answer.quality.peaks)}" fill="currentColor" fill-opacity="0.55"/>'
        f"{''.join(shapes)}</svg>"
        f"<p>{keys}</p><p>Overlapping windows of {outcome.windows[0].end - outcome.windows[0].start:g} s.</p>"
        f"<details><summary>Windows as a table</summary>"
        f"<table>{head}<tbody>{''.join(lines)}</tbody></table></details>"
    )


def _rows_of(windows):
    """Assign a row to each window, so that overlapping windows are in different rows as far as possible."""
    ends, rows = [], []
    for window in windows:
        free = next((row for row, end in enumerate(ends) if end <= window.start), None)
        if free is None and len(ends) < _MOST_ROWS:
            ends.append(0.0)
            free = len(ends) - 1
        row = free if free is not None else int(np.argmin(ends))
        ends[row] = window.end
        rows.append(row)
    return rows


def _waveform_path(peaks):
    """Make an SVG path of the waveform, scaled to its highest peak."""
    parts = np.array_split(peaks, min(_COLUMNS, len(peaks)))
    heights = np.array([part.max() for part in parts])
    heights = heights / max(float(heights.max()), 1e-6) * (_WAVE / 2 - 2)
    x = np.linspace(0, _WIDTH, len(heights))
    upper = [f"{a:.0f},{_WAVE / 2 - b:.1f}" for a, b in zip(x, heights, strict=True)]
    lower = [f"{a:.0f},{_WAVE / 2 + b:.1f}" for a, b in zip(x, heights, strict=True)][::-1]
    return f"M{' L'.join(upper + lower)} Z"


def _time(seconds):
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


def _colour(number):
    return COLOURS[number % len(COLOURS)]


def _text_colour(number):
    """Return black or white, whichever has more contrast with a colour."""
    red, green, blue = (int(_colour(number)[at : at + 2], 16) for at in (1, 3, 5))
    return "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "#fff"


def _percent(p):
    """Format a probability as a percentage, without rounding it to 100 %."""
    return "over 99 %" if p > 0.99 else f"{100 * p:.0f} %"


def _escape(text):
    return html.escape(str(text))


def read_card(folder):
    """Read a model card without its metadata; a sentence if there is no card."""
    try:
        text = Path(folder, CARD_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "This model has no card: its accuracy is unknown."
    return text.split("---\n", 2)[-1] if text.startswith("---\n") else text


def is_served(method, path, folder):
    """Whether the page needs a request; Gradio's other routes are blocked.

    ``path`` is the decoded path. Only files in ``folder``, the folder of uploads, are served.
    """
    if method == "POST":
        return path in _POSTS
    if method not in ("GET", "HEAD"):
        return False
    if path.startswith(_FILE):
        return _is_inside(path.removeprefix(_FILE), folder)
    return path in _GETS or (path.startswith(_BELOW) and len(path) < _LONGEST_PATH)


_FILE = "/gradio_api/file="
_POSTS = {UPLOAD, "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"}

_GETS = {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt"} | {
    f"/gradio_api/{name}" for name in ("theme.css", "info", "queue/data", "upload_progress", "startup-events", "app_id")
}
_LONGEST_PATH = 500
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")


def _is_inside(path, folder):
    try:
        return Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, ValueError):
        return False


def has_space(folder, limits):
    """Whether there is space for another upload.

    The disk needs space for an upload of the largest size. For each request that may run or wait, the folder may
    contain `max_bytes` of uploads and ten files.
    """
    if shutil.disk_usage(folder).free < limits.max_bytes:
        return False
    slots = limits.max_requests + limits.max_queue
    size = 0
    for number, path in enumerate(_files(folder), 1):
        size += _size(path)
        # Stop early, because counting all files may take long.
        if size >= slots * limits.max_bytes or number >= 10 * slots:
            return False
    return True


def sweep(folder, keep_seconds):
    """Delete all files that were not modified for `keep_seconds`, and empty folders.

    Gradio's own clean-up misses uploads from other forms and interrupted uploads.
    """
    before = time.time() - keep_seconds
    for path in _files(folder):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < before:
                path.unlink()
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            if path != str(folder) and os.stat(path).st_mtime < before:
                os.rmdir(path)


def _files(folder):
    return (Path(path, name) for path, _, names in os.walk(folder) for name in names)


def _size(path):
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def make_page(service, card, folder):
    """Make the Gradio app; ``card`` is Markdown, ``folder`` is where Gradio stores uploads."""
    import gradio

    async def classify(path):
        if path is None:
            return ""
        try:
            content = Path(path).read_bytes()
            async with service.slot():
                (answer,) = await service.classify([(Path(path).name, content)])
        except (LimitError, AudioError) as error:
            return failure(f"{error.reason}: {error}")
        except OSError:
            return failure("the recording was deleted: record or choose it again")
        return render(answer, service.classifier)

    labels, limits = service.classifier.labels, service.limits
    with gradio.Blocks(title="English accent", analytics_enabled=False) as page:
        gradio.Markdown("# English accent classifier")
        gradio.Markdown(
            f"Record yourself or choose a file: up to {limits.max_seconds:g} seconds, {limits.max_bytes / 1e6:g} MB. "
            "Five or more seconds of speech work best. The recording stays on the machine that serves this page and is "
            f"deleted after about {KEEP_SECONDS / 60:.0f} minutes."
        )
        with gradio.Tabs():
            sounds = [
                _make_recorder(gradio, folder, tab, source, elem_id)
                for tab, source, elem_id in (("Speak", "microphone", "recording"), ("Choose a file", "upload", "file"))
            ]
        answer = gradio.HTML(elem_id="answer")
        gradio.Markdown(_escape(limit_of_labels(labels)), elem_classes="labels")
        with gradio.Accordion("Model card", open=False):
            gradio.Markdown(card)
        for sound in sounds:
            sound.change(classify, sound, answer, api_name=False, concurrency_limit=limits.max_requests)
        page.load(None, js=_ON_LOAD)
    page.queue(max_size=limits.max_requests + limits.max_queue)
    return page


def _make_recorder(gradio, folder, tab, source, elem_id):
    """Make a tab with an audio component that accepts only uploads."""

    def uploaded(path):
        if path is None or not _is_inside(path, folder) or not os.path.isfile(path):
            raise gradio.Error("this file was not uploaded to this page")
        return str(path)

    async def uploaded_later(path):
        return uploaded(path)

    with gradio.Tab(tab):
        sound = gradio.Audio(
            sources=[source], type="filepath", label="Your recording", editable=False, buttons=[], elem_id=elem_id
        )
    # Gradio's own methods would fetch any URL or open any path that a request names. They are replaced without a
    # subclass, for which Gradio would write a stub into this package's folder.
    sound.move_resource_to_block_cache, sound.async_move_resource_to_block_cache = uploaded, uploaded_later
    return sound


def mount(app, page, limits):
    """Mount the page at the root of an app, without Gradio's monitoring, footer links and external fonts."""
    import gradio

    theme = gradio.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=True,
        max_file_size=limits.max_bytes,
        **dict.fromkeys(("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring"), False),
    )
