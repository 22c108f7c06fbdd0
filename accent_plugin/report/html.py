"""The HTML report: one file, without scripts or external resources."""

import base64
import io
import re
from pathlib import Path

import jinja2
import numpy as np
import soundfile
from markupsafe import Markup

from accent_plugin.errors import AudioError
from accent_plugin.report.figures import SCALE

MOST_PLAYERS = 12
MOST_PER_SPEAKER = 2  # so that one speaker cannot fill the list
MOST_BYTES = 3_000_000  # total size of the players in one report
MOST_SECONDS = 15.0

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --paper: #ffffff; --line: #dde2e7; --code: #f3f5f7;
  --warn: #7a3e00; --warn-paper: #fff3e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --paper: #15191d; --line: #333b43;
  --code: #20262c; --warn: #ffcf99; --warn-paper: #3a2a14; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.6rem; }
.warning { border-left: 5px solid #e08a1e; background: var(--warn-paper); color: var(--warn); padding: .6rem 1rem;
  font-weight: 600; }
.scroll { overflow-x: auto; } .long { max-height: 30rem; overflow-y: auto; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .92rem; margin: .4rem 0; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--paper); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } td { overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { background: var(--code); padding: .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
audio { height: 2rem; width: 15rem; }
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% for kind, first, second in blocks %}
{% if kind == "heading" %}
<h{{ first }}>{{ second }}</h{{ first }}>
{% elif kind == "warning" %}
<p class="warning">{{ first }}</p>
{% elif kind == "text" %}
<p>{{ first }}</p>
{% elif kind == "list" %}
<ul>{% for item in first %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif kind == "table" %}
<div class="scroll{{ " long" if second | length > 24 }}"><table>\
<tr>{% for cell in first %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in second %}
<tr>{% for cell in row %}<td{% if cell is figure %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% elif kind == "picture" %}
{% set content = read(first) %}
<figure><img width="{{ width(content) }}" alt="{{ second }}" src="data:image/png;base64,{{ encode(content) }}"></figure>
{% elif kind == "code" %}
<pre>{{ first }}</pre>
{% endif %}
{% endfor %}
</body>
</html>
"""


def render(title, blocks, folder, players=()):
    """Write blocks as one HTML page, with the figures in a folder and the players from `players`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.tests["figure"] = lambda cell: re.fullmatch(r"[+-]?\d[\d.,%]*( \(.*\))?", str(cell))
    shown = [part for block in blocks for part in (_errors(players) if block[0] == "errors" else [block])]
    return environment.from_string(_PAGE).render(
        title=title,
        style=Markup(_STYLE),
        blocks=[(*block, None)[:3] for block in shown],
        read=lambda name: (Path(folder) / name).read_bytes(),
        # Bytes 16 to 20 of a PNG are its width.
        width=lambda content: round(int.from_bytes(content[16:20], "big") * SCALE),
        encode=lambda content: base64.b64encode(content).decode(),
    )


def _errors(players):
    if players:
        yield "heading", 2, "Most confident errors"
        text = (
            f"The misclassified clips with the largest probabilities: at most {MOST_PER_SPEAKER} per speaker, and the "
        )
        yield "text", text + f"first {MOST_SECONDS:.0f} s of each."
        audio = Markup('<audio controls preload="metadata" src="{}"></audio>')
        yield "table", ["clip", "speaker", "true accent", "answer", "probability", "listen"], [
            [*(p[key] for key in ("id", "client_id", "accent", "answer", "probability")), audio.format(p["source"])]
            for p in players
        ]  # fmt: skip


def players(predictions, audio):
    """Choose the most confident errors and encode their audio for the report; unreadable clips are skipped.

    Arguments
    ---------
    predictions : ScoredClips
    audio : callable, or None
        Clip ID -> path of its audio, or None.

    Returns
    -------
    players : list of dict
        "id", "client_id", "accent", "answer", "probability", "source" (a data URI).
    """
    if audio is None:
        return []
    p, chosen, size, per_speaker = predictions, [], 0, {}
    predicted, top = p.predicted, p.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != p.truth)
    for clip in sorted(wrong.tolist(), key=lambda i: (-top[i], p.ids[i]))[: 10 * MOST_PLAYERS]:
        client = p.client_ids[clip] if p.client_ids else ""
        if client and per_speaker.get(client, 0) >= MOST_PER_SPEAKER:
            continue
        source = _data_uri(audio(p.ids[clip]))
        if source is None or size + len(source) > MOST_BYTES:
            continue
        size += len(source)
        per_speaker[client] = per_speaker.get(client, 0) + 1
        chosen.append({
            "id": p.ids[clip], "client_id": client, "source": source, "probability": f"{top[clip]:.2f}",
            "accent": p.labels[p.truth[clip]], "answer": p.labels[predicted[clip]],
        })  # fmt: skip
        if len(chosen) == MOST_PLAYERS:
            break
    return chosen


def _data_uri(path):
    """Encode a clip as MP3, which every browser plays; return None if it cannot be read."""
    from accent_plugin.audio import codecs
    from accent_plugin.audio.samples import SAMPLE_RATE

    if path is None:
        return None
    try:
        wave = codecs.read(path)
    except (AudioError, OSError):
        return None
    content = io.BytesIO()
    soundfile.write(content, np.clip(wave[: int(MOST_SECONDS * SAMPLE_RATE)], -1, 1), SAMPLE_RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(content.getvalue()).decode()
