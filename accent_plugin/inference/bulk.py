"""Classify many files, and write a table, CSV or JSON lines; a second run can resume CSV and JSON lines."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import sys
from collections import Counter
from pathlib import Path

from accent_plugin import files
from accent_plugin.audio import codecs
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.inference.records import Failure, printable

logger = logging.getLogger(__name__)


FORMATS = ("table", "jsonl", "csv")
# Options that affect an answer.
_SETTINGS = ("threshold", "window_seconds", "hop_seconds")
_ANSWER = ("accent", "decision", "probability", "seconds", "lost_seconds", "reliable")
_FIELDS = ("source", "model", *_ANSWER, "error", *_SETTINGS)
# Start of each record in JSON lines.
_BEGINNING = b'{"source": '


def find(paths):
    """Yield each given file, and all audio files in and below each given folder in sorted order, except hidden files.

    A path that does not exist is yielded too; it is later reported like an unreadable file.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield str(path)
            continue
        found, skipped = [], Counter()
        for file in Path(path).rglob("*"):
            if reason := _reason_to_skip(file, path):
                skipped[reason] += 1
            elif not file.is_dir():
                found.append(str(file))
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            logger.info("%s: %d files are skipped: %s", path, skipped.total(), printable(reasons))
        if not found:
            raise DataError(f"{path} contains no audio file ({', '.join(codecs.SUFFIXES)})")
        yield from sorted(found)


def _reason_to_skip(file, folder):
    """Why a file found in a folder is skipped, if it is; macOS creates a hidden "._x.mp3" beside each x.mp3."""
    if file.is_dir():
        return None
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return "hidden"
    if file.suffix.lower() in codecs.SUFFIXES:
        return None
    return f"with the suffix {file.suffix.lower()}" if file.suffix else "without a suffix"


@contextlib.contextmanager
def _locked(output):
    """Lock an output file: two processes would both append to it."""
    output = output.resolve()
    # A pipe or a device cannot be resumed, and a missing folder is reported when the file is opened.
    if not output.parent.is_dir() or (output.exists() and not output.is_file()):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(output.parent, f".{output.name}.lock", wait=False))
        except BlockingIOError:
            raise DataError(
                f"{output} is being written by another process: wait until it has ended, or choose another --output"
            ) from None
        yield


def run(classifier, sources, format, output=None, progress=True, **reading):
    """Classify files, and write one result per file.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    sources : iterable of str
        Paths. Repeated paths are classified once.
    format : str
        One of `FORMATS`.
    output : str or Path
        None writes to stdout. The results of an interrupted run are kept, and their files are not classified again.
    progress : bool
        Whether to draw a progress bar on stderr.
    **reading
        Options of `AccentClassifier.predict_files`.

    Returns
    -------
    tuple of int
        Numbers of classified and failed files, including those of an interrupted run.

    Raises
    ------
    DataError
        When ``output`` cannot be written, is being written by another process, has results of another model or with
        other options, or is another kind of file.
    """
    from tqdm import tqdm

    sources = list(dict.fromkeys(sources))
    writer = _Writer(format, classifier, "utf-8" if output else sys.stdout.encoding or "utf-8")
    with contextlib.ExitStack() as stack:
        if output:
            stack.enter_context(_locked(Path(output)))
        answered = writer.go_on(Path(output)) if output else {}
        waiting = [source for source in sources if source not in answered]
        if answered:
            logger.info("%d of %d files already have results in %s", len(sources) - len(waiting), len(sources), output)
        failed = sum(answered.get(source, False) for source in sources)
        file = stack.enter_context(_open(output)) if output else sys.stdout
        if not output or not os.path.getsize(output):
            file.write(writer.header())
        answers = stack.enter_context(contextlib.closing(classifier.predict_files(waiting, **reading)))
        shown = progress and sys.stderr.isatty()
        for source, answer in zip(
            waiting, tqdm(answers, total=len(waiting), unit="file", disable=not shown), strict=True
        ):
            if isinstance(answer, Failure):
                failed += 1
                print(printable(f"{source}: {answer}"), file=sys.stderr)
            file.write(writer.line(source, answer))
            file.flush()
    return len(sources) - failed, failed


def make_record(classifier, source, answer):
    """Convert a result to a dict of plain values, in the order of the output.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    source : str
    answer : Prediction or Failure

    Returns
    -------
    dict
        Has "windows" if there are several, and "lost" if parts of the file could not be decoded.
    """
    record: dict = dict.fromkeys((*_FIELDS, "probabilities")) | {"source": source, "model": classifier.identity}
    record |= _settings(classifier)
    if isinstance(answer, Failure):
        return record | {"error": f"{answer.reason}: {answer.message}"}
    record |= {name: getattr(answer, name) for name in _ANSWER}
    for name in ("probability", "seconds", "lost_seconds"):
        record[name] = round(record[name], 6)
    record["probabilities"] = {label: round(p, 6) for label, p in answer.probabilities.items()}
    if len(answer.windows) > 1:
        record["windows"] = [_window(window) for window in answer.windows]
    if answer.lost:
        record["lost"] = [
            {"start": round(loss.start, 6), "seconds": round(loss.seconds, 6), "reason": loss.reason}
            for loss in answer.lost
        ]
    return record


def remarks(record):
    """Convert what limits an answer to the remarks at the end of its line in a table."""
    doubt = "" if record["reliable"] else "  (unreliable: under 1 s of speech)"
    abstained = "" if record["decision"] else "  (abstains)"
    lost = f"  ({record['lost_seconds']:.1f} s could not be decoded)" if record["lost_seconds"] else ""
    return doubt + abstained + lost


def _settings(classifier):
    settings = {name: getattr(classifier, name) for name in _SETTINGS}
    return {name: None if value is None else float(value) for name, value in settings.items()}


def _open(output):
    try:
        # A name that is not UTF-8 is written as its original bytes.
        return open(output, "a", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"{output} cannot be written: {error.strerror}\ncreate its folder first, or choose another --output"
        ) from None


class _Writer:
    """Converts answers to text and back."""

    def __init__(self, format, classifier, encoding):
        if format not in FORMATS:
            raise ConfigError(f"format {format!r} is unknown; choose {', '.join(FORMATS)}")
        self._format, self._labels, self._encoding = format, classifier.labels, encoding
        self._classifier, self._settings = classifier, _settings(classifier)
        self._model = classifier.identity
        self._columns = (*_FIELDS, *(f"p_{label}" for label in self._labels))

    def header(self):
        return self._row(self._columns) if self._format == "csv" else ""

    def line(self, source, answer):
        record = make_record(self._classifier, source, answer)
        if self._format != "jsonl":
            record.pop("windows", None)
            record.pop("lost", None)
        if self._format == "jsonl":
            return self._json(record)
        if self._format == "csv":
            flat = record | {f"p_{label}": p for label, p in (record.pop("probabilities") or {}).items()}
            return self._row(["" if flat.get(name) is None else flat[name] for name in self._columns])
        if record["error"]:
            return f"-  failed: {printable(record['error'])}  {printable(source)}\n"
        width = max(len(printable(label)) for label in self._labels)
        accent = f"{printable(record['accent']):<{width}}"
        return f"{record['probability']:.2f}  {accent}  {printable(source)}{remarks(record)}\n"

    def go_on(self, path):
        """Read the answers in ``path`` as source -> whether it failed, and remove an incomplete last line."""
        content = path.read_bytes() if path.is_file() else b""
        if not content:
            return {}
        if self._format == "table":
            raise DataError(
                f"{path} exists, and a run with --format table cannot be resumed: choose --format jsonl or csv"
            )
        end = _end_of_records(content, quotes=self._format == "csv")
        try:
            records = self._read(content[:end], content[end:])
            answered = {record["source"]: bool(record["error"]) for record in records}
            self._require_same(path, records)
        except (ValueError, KeyError, TypeError, RecursionError, csv.Error):
            raise DataError(
                f"{path} was not written by accent-plugin classify as {self._format}: choose another --output"
            ) from None
        if end < len(content):
            os.truncate(path, end)
        return answered

    def _read(self, whole, rest):
        """Parse the records of complete lines, if the rest is an incomplete record."""
        if self._format == "jsonl":
            if not rest.startswith(_BEGINNING) and not _BEGINNING.startswith(rest):
                raise ValueError("the last line is not a record")
            # splitlines would also split at U+2028 and similar characters.
            return [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
        header = self.header().encode("utf-8")
        if not whole.startswith(header) and (whole or not header.startswith(rest)):
            raise ValueError("other columns")
        text = whole.decode("utf-8", "surrogateescape")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:]
        records = [dict(zip(self._columns, row, strict=True)) for row in rows]
        return [record | {name: _number(record[name]) for name in _SETTINGS} for record in records]

    def _require_same(self, path, records):
        for record in records:
            if record["model"] != self._model:
                raise DataError(f"{path} has results of another model: choose another --output, or remove it")
            for name, ours in self._settings.items():
                theirs = record[name]
                if theirs != ours:
                    raise DataError(
                        f"{path} has results with {name} {theirs}, not {ours}: give the same options, choose another "
                        "--output, or remove it"
                    )

    def _json(self, record):
        text = json.dumps(record, ensure_ascii=False)
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            # The name is not valid in UTF-8 or in the terminal's encoding. Escapes preserve it.
            text = json.dumps(record)
        return text + "\n"

    @staticmethod
    def _row(cells):
        line = io.StringIO(newline="")
        # With "\n" as its line terminator, the writer would not quote a name that contains "\r".
        csv.writer(line).writerow(cells)
        return line.getvalue().removesuffix("\r\n") + "\n"


def _end_of_records(content, quotes):
    """Return the number of bytes in complete records; a line end between quotes is part of a name."""
    if not quotes:
        return content.rfind(b"\n") + 1
    end, inside = 0, False
    for mark in re.finditer(rb'["\n]', content):
        if mark[0] == b'"':
            inside = not inside
        elif not inside:
            end = mark.end()
    return end


def _number(text):
    return float(text) if text else None


def _window(window):
    scores = window.probabilities and {label: round(p, 6) for label, p in window.probabilities.items()}
    return {"start": window.start, "end": window.end, "probabilities": scores}
