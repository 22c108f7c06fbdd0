"""Mutated files through the command line: no traceback, no hang, and never success with a wrong count."""

import contextlib
import csv
import io
import json
import logging
import random
from collections import Counter
from unittest import mock

import pytest
from helpers.dataset_dicts import encode, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accent_plugin.cli import main

KINDS = {
    "wav": ("WAV", None),
    "flac": ("FLAC", None),
    "mp3": ("MP3", None),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def without_a_part(data, rng):
    start, size = rng.randrange(len(data)), rng.randrange(1, 4000)
    return data[:start] + data[start + size :]


def with_zeros(data, rng):
    start, size = rng.randrange(len(data)), rng.randrange(1, 10_000)
    return data[:start] + bytes(size) + data[start + rng.choice([0, size]) :]


def with_garbage(data, rng):
    start = rng.choice([0, len(data), rng.randrange(len(data))])
    return data[:start] + rng.randbytes(rng.randrange(1, 3000)) + data[start:]


def with_flipped_bits(data, rng):
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 40)):
        changed[rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(100, len(data)))] ^= (
            1 << rng.randrange(8)
        )
    return bytes(changed)


def twice(data, rng):
    return data + data


def with_a_false_size(data, rng):
    start = rng.randrange(4, 64)
    return data[:start] + rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff"]) + data[start + 4 :]


MUTATIONS = [cut, without_a_part, with_zeros, with_garbage, with_flipped_bits, twice, with_a_false_size]


@pytest.fixture(scope="module")
def sounds():
    return {suffix: encode(noise(2.5), 16_000, *kind) for suffix, kind in KINDS.items()}


@pytest.mark.slow
@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_mutated_audio_is_answered_or_counted_as_failed(tiny_bundle, sounds, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    for number in range(8):
        suffix = rng.choice(list(sounds))
        content = sounds[suffix]
        for mutation in rng.choices(MUTATIONS, k=rng.choice([1, 1, 2])):
            content = mutation(content, rng) or b"\0"
        (folder / f"{number}.{suffix}").write_bytes(content)
    out, err = run(["classify", str(folder), "--model", str(tiny_bundle), "--format", "jsonl"])
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 8
    failed = [record for record in records if record["error"]]
    assert run.code == (1 if failed else 0)
    for record in failed:
        assert record["source"] in err and record["accent"] is None
    for record in records:
        if not record["error"]:
            # Up to two files in one, or a header that makes the rate of the same samples lower.
            assert 0 < record["seconds"] < 200
            assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def run(command):
    """Run the command in this process; returns what it prints. Its exit code is `run.code`."""
    # Tests before this one may have left handlers with streams that are closed now.
    quiet = mock.patch.object(logging.root, "handlers", [])
    with quiet, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        run.code = main.main(command)
    assert run.code in (0, 1, 2)
    assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


ROWS = 80


def table(rng, delimiter):
    """A table of clips of 16 speakers, with odd cells in some rows."""
    odd = ["", "nan", "None", '"', 'it\'s "so"', "a\tb", "1,5", "\u2028", "x" * 3000, "-1", "\ufeff"]
    lines = [["path", "accent", "client_id", "sentence", "up_votes", "age", "duration"]]
    for number in range(ROWS):
        accent = ("us", "england")[number % 2]
        cells = [f"{number}.wav", accent, f"s{number % 16}", f"Sentence {number}.", "2", "teens", "1.0"]
        if rng.random() < 0.04:
            cells[rng.randrange(len(cells))] = rng.choice(odd)
        if rng.random() < 0.01:
            cells.insert(rng.randrange(len(cells)), "shifted")
        lines.append(cells)
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=rng.choice(["\n", "\r\n"])).writerows(lines)
    return text.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8-sig"]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(ROWS):
        (folder / f"{number}.wav").write_bytes(encode(noise(1.0, seed=number), format="WAV"))
    return folder


@pytest.mark.slow
def test_every_row_of_a_mutated_table_is_kept_or_counted(clips, tmp_path_factory):
    codes = Counter()

    @FUZZ
    @given(st.integers(0, 2**32))
    def prepare(seed):
        rng = random.Random(seed)
        content = table(rng, rng.choice([",", "\t", ";"]))
        for mutation in rng.choices(MUTATIONS[:6], k=rng.choice([0, 0, 1])):
            content = mutation(content, rng) or b"\0"
        (clips / "table.csv").write_bytes(content)
        out = tmp_path_factory.mktemp("fuzz") / "out"
        command = ["prepare", str(clips / "table.csv"), "--out", str(out), "--accents", "us,england"]
        _, err = run([*command, "--workers", "1"])
        codes[run.code] += 1
        assert len(err) < 20_000
        if run.code != 0:
            assert err.strip()
            return
        card = json.loads((out / "accent_plugin.json").read_text(encoding="utf-8"))
        kept = sum(cell["clips"] for split in card["counts"].values() for cell in split.values())
        rows = content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").strip("\n").count("\n")
        # Line ends inside of quotes, and mutations that join or repeat lines, change what a row is.
        assert kept + sum(card["dropped"].values()) <= rows + 1
        if not any(mark in content for mark in (b'"', b"\0")):
            assert kept + sum(card["dropped"].values()) == rows

    prepare()
    # Tables that are refused as a whole show nothing about their rows.
    assert codes[0] >= codes.total() / 4


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_mutated_segment_files_are_read_or_refused(tiny_bundle, tmp_path_factory, data):
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    folder = tmp_path_factory.mktemp("segments")
    (folder / "talk.wav").write_bytes(encode(noise(3.0), format="WAV"))
    content = b"start,end,speaker\n0,1,a\n1.5,2.5,b\n2,2.75,a\n"
    if rng.random() < 0.5:
        content = b"SPEAKER talk 1 0.5 1.25 <NA> <NA> A <NA> <NA>\nSPEAKER talk 1 2 0.5 <NA> <NA> B <NA> <NA>\n"
    suffix = "csv" if content.startswith(b"start") else "rttm"
    content = rng.choice(MUTATIONS[:6])(content, rng)
    (folder / f"talk.{suffix}").write_bytes(content)
    command = ["classify", str(folder / "talk.wav"), "--model", str(tiny_bundle), "--format", "jsonl"]
    out, err = run([*command, "--segments", str(folder / f"talk.{suffix}")])
    records = [json.loads(line) for line in out.splitlines()]
    assert (run.code == 2) == (not records) and (run.code == 1) == any(record["error"] for record in records)
    assert run.code == 0 or err.strip()
