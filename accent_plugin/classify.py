"""Many files through a classifier, into a table, CSV or JSON lines that a second run goes on with."""

import contextlib
import csv
import io
import json
import logging
import os
import sys
from pathlib import Path

from accent_plugin import audio
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.predictions import Failure

logger = logging.getLogger(__name__)

FORMATS = ("table", "jsonl", "csv")
_FIELDS = ("source", "model", "accent", "decision", "probability", "seconds", "reliable", "error")


def find(paths):
    """Yield files as they are given, and for a folder every audio file in and below it, sorted.

    A path that does not exist is yielded too: it fails by name, like a file that cannot be read.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield str(path)
            continue
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in audio.SUFFIXES)
        if not found:
            raise DataError(f"{path} holds no audio file ({', '.join(audio.SUFFIXES)})")
        yield from found


def run(classifier, sources, format, output=None, progress=True, **reading):
    """Classify files and write one answer each.

    Arguments
    ---------
    classifier : accent_plugin.inference.AccentClassifier
    sources : iterable of str
        Paths.
    format : str
        One of `FORMATS`.
    output : str or Path
        None writes to stdout. What an interrupted run wrote is kept, and its files are not classified again.
    progress : bool
        Whether to draw a progress bar on stderr.
    **reading
        Of `AccentClassifier.predict_files`.

    Returns
    -------
    tuple of int
        Files classified and files that failed, those of an interrupted run among them.

    Raises
    ------
    DataError
        When ``output`` holds answers of another model, or something else.
    """
    from tqdm import tqdm

    sources = list(sources)
    labels, model = classifier.labels, classifier.identity
    writer = _Writer(format, labels, model)
    answered = writer.go_on(Path(output)) if output else {}
    waiting = [source for source in sources if source not in answered]
    if answered:
        logger.info("%d of %d files are in %s already", len(sources) - len(waiting), len(sources), output)
    failed = sum(answered[source] for source in set(sources) & answered.keys())
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(output, "a", newline="", encoding="utf-8")) if output else sys.stdout
        if not answered:
            file.write(writer.header())
        answers = stack.enter_context(contextlib.closing(classifier.predict_files(waiting, **reading)))
        shown = progress and sys.stderr.isatty()
        for source, answer in zip(
            waiting, tqdm(answers, total=len(waiting), unit="file", disable=not shown), strict=True
        ):
            if isinstance(answer, Failure):
                failed += 1
                print(f"{source}: {answer.reason}: {answer.message}", file=sys.stderr)
            file.write(writer.line(source, answer))
            file.flush()
    return len(sources) - failed, failed


class _Writer:
    def __init__(self, format, labels, model):
        if format not in FORMATS:
            raise ConfigError(f"format {format!r} is unknown; choose {', '.join(FORMATS)}")
        self._format, self._labels, self._model = format, labels, model
        self._columns = (*_FIELDS, *(f"p_{label}" for label in labels))

    def header(self):
        return self._row(self._columns) if self._format == "csv" else ""

    def line(self, source, answer):
        record = self._record(source, answer)
        if self._format == "jsonl":
            return json.dumps(record, ensure_ascii=False) + "\n"
        if self._format == "csv":
            flat = record | {f"p_{label}": p for label, p in (record.pop("probabilities") or {}).items()}
            return self._row(["" if flat.get(name) is None else flat[name] for name in self._columns])
        if record["error"]:
            return f"-  failed: {record['error']}  {source}\n"
        doubt = "" if record["reliable"] else "  (unreliable: under 1 s of speech)"
        abstained = "" if record["decision"] else "  (abstains)"
        width = max(map(len, self._labels))
        return f"{record['probability']:.2f}  {record['accent']:<{width}}  {source}{doubt}{abstained}\n"

    def go_on(self, path):
        """Source -> whether it failed, of what ``path`` holds; a line that was cut is taken off."""
        if not path.exists() or not path.stat().st_size:
            return {}
        if self._format == "table":
            raise DataError(
                f"{path} is there already, and a table cannot be gone on with: choose --format jsonl or csv"
            )
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            records = self._read(whole.decode("utf-8"))
            answered = {record["source"]: bool(record["error"]) for record in records}
            models = {record["model"] for record in records}
        except (ValueError, KeyError, TypeError, csv.Error):
            raise DataError(
                f"{path} is no output of accent-plugin classify as {self._format}: choose another"
            ) from None
        if models - {self._model}:
            raise DataError(f"{path} holds answers of another model: choose another output, or remove it")
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return answered

    def _read(self, text):
        if self._format == "jsonl":
            return [json.loads(line) for line in text.splitlines()]
        table = csv.DictReader(io.StringIO(text, newline=""))
        if tuple(table.fieldnames or ()) != self._columns:
            raise ValueError("other columns")
        return list(table)

    def _record(self, source, answer):
        record = dict.fromkeys((*_FIELDS, "probabilities")) | {"source": source, "model": self._model}
        if isinstance(answer, Failure):
            return record | {"error": f"{answer.reason}: {answer.message}"}
        named = ("accent", "decision", "probability", "seconds", "reliable")
        record |= {name: getattr(answer, name) for name in named}
        record["probabilities"] = dict(answer.probabilities)
        for name in ("probability", "seconds"):
            record[name] = round(record[name], 6)
        record["probabilities"] = {label: round(p, 6) for label, p in record["probabilities"].items()}
        if len(answer.windows) > 1 and self._format == "jsonl":
            record["windows"] = [_window(window) for window in answer.windows]
        return record

    @staticmethod
    def _row(cells):
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()


def _window(window):
    scores = window.probabilities and {label: round(p, 6) for label, p in window.probabilities.items()}
    return {"start": window.start, "end": window.end, "probabilities": scores}
