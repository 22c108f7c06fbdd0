"""The HTML report: one file, no scripts, nothing loaded from elsewhere."""

import base64
import io
import re
from html import escape
from pathlib import Path

import numpy as np
import soundfile

from accent_plugin.errors import AudioError
from accent_plugin.report.figures import SCALE

MOST_PLAYERS = 12


MOST_PER_SPEAKER = 2  # one odd speaker must not fill the list


MOST_BYTES = 3_000_000  # of players in one report


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


def render(title, blocks, folder, players=()):
    """Write blocks as one HTML page.

    Arguments
    ---------
    title : str
    blocks : list of tuple
        As `accent_plugin.report` makes them.
    folder : Path
        Where the pictures are.
    players : list of dict
        From `players`.

    Returns
    -------
    page : str
    """
    body = "\n".join(filter(None, (_block(block, folder, players) for block in blocks)))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block(block, folder, players):
    kind, *rest = block
    if kind == "heading":
        return f"<h{rest[0]}>{escape(rest[1])}</h{rest[0]}>"
    if kind == "warning":
        return f'<p class="warning">{escape(rest[0])}</p>'
    if kind == "text":
        return f"<p>{escape(rest[0])}</p>"
    if kind == "list":
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in rest[0]) + "</ul>"
    if kind == "table":
        return _table(rest[0], [[_cell(c) for c in row] for row in rest[1]])
    if kind == "picture":
        content = (Path(folder) / rest[0]).read_bytes()
        width = round(int.from_bytes(content[16:20], "big") * SCALE)  # a PNG says its width there
        source = "data:image/png;base64," + base64.b64encode(content).decode()
        return f'<figure><img width="{width}" alt="{escape(rest[1])}" src="{source}"></figure>'
    if kind == "code":
        return f"<pre>{escape(rest[0])}</pre>"
    return _errors(players) if kind == "errors" else ""


def _cell(text):
    number = ' class="number"' if re.fullmatch(r"[+-]?\d[\d.,%]*( \(.*\))?", str(text)) else ""
    return f"<td{number}>{escape(str(text))}</td>"


def _table(header, rows):
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="scroll{" long" if len(rows) > 24 else ""}"><table><tr>{head}</tr>\n{body}</table></div>'


def _errors(players):
    if not players:
        return ""
    rows = [
        [*(_cell(p[key]) for key in ("id", "client_id", "accent", "answer", "probability")),
         f'<td><audio controls preload="metadata" src="{p["source"]}"></audio></td>']
        for p in players
    ]  # fmt: skip
    return (
        "<h2>Most confident errors</h2>\n<p>Clips answered wrongly with the largest probability, at most "
        f"{MOST_PER_SPEAKER} of a speaker and {MOST_SECONDS:.0f} s of each.</p>\n"
        + _table(["clip", "speaker", "true accent", "answer", "probability", "listen"], rows)
    )


def players(predictions, audio):
    """Choose the most confident errors and make them playable.

    Arguments
    ---------
    predictions : Predictions
    audio : callable, or None
        Clip ID -> path of its audio, or None.

    Returns
    -------
    players : list of dict
        "id", "client_id", "accent", "answer", "probability", "source" (a data URI); without clips that cannot be read.
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
    """Encode a clip as MP3, which every browser plays, or return None where it cannot be read."""
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
