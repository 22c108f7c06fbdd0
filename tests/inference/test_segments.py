import csv
import json
import math
import tracemalloc

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import noise

from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.cli import main
from accent_plugin.errors import DataError
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.records import Failure, Prediction
from accent_plugin.inference.segments import Segment, assign_segments, predict_segments, read_segments


@pytest.fixture(scope="module")
def classifier(tiny_bundle):
    return AccentClassifier.from_bundle(tiny_bundle, device="cpu", window_seconds=2.0, hop_seconds=1.0)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Nine seconds of noise that changes every three, at two levels."""
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    samples = np.concatenate([noise(3.0, seed=k) * (1 + k) for k in range(3)])
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    return path


def cut(path, start, end):
    samples, _ = soundfile.read(path, dtype="float32")
    return samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


def require_same(answer, expected):
    assert list(answer.probabilities.values()) == pytest.approx(list(expected.probabilities.values()), abs=1e-5)
    assert (answer.seconds, answer.speech_seconds) == (expected.seconds, expected.speech_seconds)


@pytest.mark.parametrize("block_seconds", [0.7, 60.0])
def test_a_segment_is_answered_as_a_file_cut_there(classifier, talk, monkeypatch, block_seconds):
    monkeypatch.setattr("accent_plugin.inference.segments.BLOCK_SECONDS", block_seconds)
    segments = [Segment(4.0, 7.5), Segment(0.0, 1.00003), Segment(3.1, 3.9), Segment(0.5, 9.0), Segment(0.0, math.inf)]
    found = predict_segments(classifier, talk, segments)
    assert [segment for segment, _ in found.segments] == segments
    for segment, answer in found.segments:
        end = min(segment.end, 9.0)
        require_same(answer, classifier.predict(cut(talk, segment.start, end), SAMPLE_RATE))
        # Windows have their place in the recording.
        assert (answer.windows[0].start, answer.windows[-1].end) == pytest.approx((segment.start, end), abs=1e-4)


def test_a_speaker_is_answered_from_all_windows_of_their_segments_by_length(classifier, talk):
    segments = [Segment(0.0, 1.0, "a"), Segment(3.0, 5.5, "b"), Segment(6.0, 8.0, "a")]
    found = predict_segments(classifier, talk, segments)
    logs = [np.log(list(found.segments[k][1].probabilities.values())) for k in (0, 2)]
    mean = np.exp((logs[0] * 1.0 + logs[1] * 2.0) / 3.0)
    speaker = found.speakers["a", None]
    assert list(speaker.probabilities.values()) == pytest.approx(list(mean / mean.sum()), abs=1e-6)
    assert speaker.seconds == 3.0
    require_same(found.speakers["b", None], found.segments[1][1])


def test_a_segment_beyond_the_end_or_silent_fails_alone(classifier, tmp_path):
    samples = np.concatenate([noise(2.0), np.zeros(SAMPLE_RATE, np.float32), noise(1.0)])
    soundfile.write(tmp_path / "talk.wav", samples, SAMPLE_RATE)
    segments = [
        Segment(0.0, 1.0, "a"),
        Segment(2.0, 3.0, "a"),
        Segment(8.0, 9.0, "b"),
        Segment(3.5, 9.0),
        Segment(1.0, 1.0),
    ]
    found = predict_segments(classifier, tmp_path / "talk.wav", segments)
    kinds = [type(answer) for _, answer in found.segments]
    assert kinds == [Prediction, Failure, Failure, Prediction, Failure]
    assert "shorter than one sample" in found.segments[4][1].message
    assert [found.segments[k][1].reason for k in (1, 2)] == ["silent", "empty"]
    assert "the recording ends at 4.00 s" in found.segments[2][1].message
    assert found.segments[3][1].seconds == 0.5
    # Silence does not count for the speaker.
    assert found.speakers["a", None].seconds == 1.0
    assert isinstance(found.speakers["b", None], Failure)


def test_segments_after_a_hole_are_those_of_the_recording(classifier, tmp_path):
    path = tmp_path / "talk.flac"
    soundfile.write(path, noise(8.0, seed=3), SAMPLE_RATE)
    segments = [Segment(0.0, 1.0), Segment(1.0, 7.0), Segment(7.0, 8.0)]
    sound = predict_segments(classifier, path, segments).segments
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    damaged = predict_segments(classifier, path, segments).segments
    for number in (0, 2):
        require_same(damaged[number][1], sound[number][1])
        assert damaged[number][1].lost == ()
    assert 0.2 < damaged[1][1].lost_seconds < 1.0
    assert damaged[1][1].seconds == 6.0


def test_answered_segments_keep_no_samples(classifier, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", noise(300.0), SAMPLE_RATE)
    monkeypatch.setattr("accent_plugin.inference.segments.BLOCK_SECONDS", 5.0)
    segments = [Segment(float(start), start + 2.0) for start in range(0, 298, 2)]
    predict_segments(classifier, tmp_path / "long.wav", segments[:2])
    tracemalloc.start()
    try:
        predict_segments(classifier, tmp_path / "long.wav", segments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The samples of the file alone are 19 MB.
    assert peak < 8e6


def test_a_silent_channel_fails_alone(classifier, tmp_path):
    sides = [noise(3.0), np.zeros(3 * SAMPLE_RATE, np.float32)]
    soundfile.write(tmp_path / "call.wav", np.stack(sides, axis=1), SAMPLE_RATE, subtype="FLOAT")
    found = predict_segments(classifier, tmp_path / "call.wav", [Segment(0.0, 2.0, "a")], each_channel=True)
    assert [(segment.channel, type(answer)) for segment, answer in found.segments] == [(1, Prediction), (2, Failure)]
    assert found.segments[1][1].reason == "silent"
    assert {key: type(answer) for key, answer in found.speakers.items()} == {("a", 1): Prediction, ("a", 2): Failure}


def test_each_channel_is_answered_by_itself(classifier, tmp_path):
    sides = [noise(3.0, seed=1), 2 * noise(3.0, seed=2)]
    soundfile.write(tmp_path / "call.wav", np.stack(sides, axis=1), SAMPLE_RATE, subtype="FLOAT")
    found = predict_segments(classifier, tmp_path / "call.wav", [Segment(0.0, math.inf)], each_channel=True)
    assert [segment.channel for segment, _ in found.segments] == [1, 2]
    for (_, answer), side in zip(found.segments, sides, strict=True):
        require_same(answer, classifier.predict(side, SAMPLE_RATE))
    named = [Segment(0.0, 1.0, "a", 2), Segment(1.0, 2.0, "a", 1)]
    found = predict_segments(classifier, tmp_path / "call.wav", named, each_channel=True)
    require_same(found.speakers["a", 2], classifier.predict(sides[1][:SAMPLE_RATE], SAMPLE_RATE))
    with pytest.raises(DataError, match=r"name the channels \[1, 2\]: classify each channel"):
        predict_segments(classifier, tmp_path / "call.wav", named)
    with pytest.raises(DataError, match="segments name channel 3, but .*call.wav has 2"):
        predict_segments(classifier, tmp_path / "call.wav", [Segment(0.0, 1.0, "a", 3)], each_channel=True)


LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 9.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Ann"
        xmin = 0
        xmax = 9.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "she said ""no"" [2]"
        intervals [2]:
            xmin = 1.5
            xmax = 9.5
            text = ""
    item [2]:
        class = "TextTier"
        name = "bells"
        xmin = 0
        xmax = 9.5
        points: size = 1
        points [1]:
            number = 0.7
            mark = "ding"
"""


SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
9.5
<exists>
2
"IntervalTier"
"Ann"
0
9.5
1
0
1.5
"hello"
"IntervalTier"
"Bob"
0
9.5
2
0
2
""
2
4.25
"good day"
"""


@pytest.mark.parametrize(("name", "text", "expected"), [
    (
        "a.rttm",
        ";; a comment\nSPKR-INFO talk 1 <NA> <NA> <NA> unknown A <NA>\n"
        "SPEAKER talk 1 0.50 1.25 <NA> <NA> A <NA> <NA>\nSPEAKER my.other.wav 2 3 1e1 <NA> <NA> <NA> <NA> <NA>\n",
        [Segment(0.5, 1.75, "A", 1, "talk"), Segment(3.0, 13.0, "", 2, "my.other")],
    ),
    ("a.csv", "start,end\n0.5,1\n2,3.25\n", [Segment(0.5, 1.0), Segment(2.0, 3.25)]),
    ("a.csv", "Onset;Duration;Speaker ID;Channel\n1;2;ann;2\n", [Segment(1.0, 3.0, "ann", 2)]),
    ("a.tsv", "file\tstart\tend\tspeaker\nx/talk.mp3\t1\t2\tbob\n", [Segment(1.0, 2.0, "bob", None, "talk")]),
    ("a.TextGrid", LONG, [Segment(0.0, 1.5, 'she said "no" [2]')]),
    ("a.TextGrid", SHORT, [Segment(0.0, 1.5, "Ann"), Segment(2.0, 4.25, "Bob")]),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_segment_files_of_each_kind(tmp_path, name, text, expected, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_segments(tmp_path / name) == expected


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.txt", "0 1", "is not a segment file: give .rttm, .csv, .tsv, .textgrid"),
    ("a.rttm", "", "has no segments"),
    ("a.rttm", "SPEAKER talk 1 0.5", "line 1 has 4 fields"),
    ("a.rttm", "\nSPEAKER talk 1 0.5 abc <NA> <NA> A", "line 2: duration is 'abc': give seconds"),
    ("a.rttm", "SPEAKER talk 1 nan 1 <NA> <NA> A", "line 1: start is 'nan': give seconds"),
    ("a.csv", "start,stop,speaker\n2,1,a\n", "line 2 is a segment from 2 to 1 s: start must be 0 or more"),
    ("a.csv", "start,end\n-1,1\n", "a segment from -1 to 1 s"),
    ("a.csv", "start,end,channel\n0,1,left\n", "channel is 'left': give a number, at least 1"),
    ("a.csv", "speaker,end\na,1\n", "needs the columns start and end, or start and duration: it has speaker, end"),
    ("a.csv", "start,end\n1\n", "line 2: end is '': give seconds"),
    ("a.csv", "start,end,speaker\n0,1,a\n0,5,1,5,b\n", "line 3 has 5 cells, but the header has 3: quote cells"),
    ("a.csv", 'start,end,speaker\n0,1,"ann\n1,2,bob\n', "unexpected end of data: close or remove the quotation mark"),
    ("a.csv", "start;end\n0,5;1,5\n", "start is '0,5': give seconds, with a decimal point"),
    ("a.TextGrid", "hello", "is a damaged TextGrid"),
    ("a.TextGrid", SHORT[:-20], "is a damaged TextGrid"),
    ("a.TextGrid", 'File type = "ooTextFile"\nObject class = "Pitch"\n', "is not a TextGrid"),
])  # fmt: skip
def test_damaged_segment_files_are_errors_that_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_segments(tmp_path / name)


def test_segments_go_to_the_recordings_that_they_name():
    a, b, nameless = Segment(0, 1, file="a"), Segment(0, 1, file="b"), Segment(0, 1)
    assert assign_segments([a, b, a], ["x/a.wav", "y/b.mp3", "c.wav"]) == {"x/a.wav": [a, a], "y/b.mp3": [b]}
    assert assign_segments([a], ["other.wav"]) == {"other.wav": [a]}
    assert assign_segments([nameless], ["c.wav"]) == {"c.wav": [nameless]}
    with pytest.raises(DataError, match="segments name recordings that are not given: b"):
        assign_segments([a, b], ["a.wav"])
    with pytest.raises(DataError, match="some segments do not name theirs"):
        assign_segments([a, nameless], ["a.wav", "b.wav"])
    with pytest.raises(DataError, match="segments name 'a', which may be x/a.wav or y/a.wav"):
        assign_segments([a, b], ["x/a.wav", "y/a.wav", "b.wav"])


def test_the_command_answers_segments_and_speakers(tiny_bundle, talk, tmp_path, capsys):
    (tmp_path / "s.csv").write_text("start,end,speaker\n0,3,ann\n3,6,bob\n6,8,ann\n8,20,bob\n30,31,bob\n")
    command = ["classify", str(talk), "--model", str(tiny_bundle), "--segments", str(tmp_path / "s.csv")]
    out = tmp_path / "answers.jsonl"
    assert main.main([*command, "--output", str(out)]) == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["scope"], r["speaker"], r["start"], r["error"] is None) for r in records] == [
        *(("segment", "ann", 0.0, True), ("segment", "bob", 3.0, True), ("segment", "ann", 6.0, True)),
        *(("segment", "bob", 8.0, True), ("segment", "bob", 30.0, False)),
        *(("speaker", "ann", None, True), ("speaker", "bob", None, True)),
    ]
    assert records[5]["seconds"] == 5.0
    out = tmp_path / "answers.csv"
    assert main.main([*command, "--output", str(out)]) == 1
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["p_us"]) for row in rows if row["p_us"]] == [
        r["probabilities"]["us"] for r in records if not r["error"]
    ]
    capsys.readouterr()
    assert main.main(command) == 1
    shown = capsys.readouterr()
    assert "talk.wav  3.00-6.00  bob" in shown.out and "ann: all segments" in shown.out
    assert "30 to 31 s: the recording ends at 9.00 s" in shown.err


def test_the_length_of_a_batch_counts_for_segments_too(tiny_bundle, talk, tmp_path, capsys):
    (tmp_path / "s.csv").write_text("start,end\n0,3\n")
    command = ["classify", str(talk), "--model", str(tiny_bundle), "--segments", str(tmp_path / "s.csv")]
    assert main.main([*command, "--batch_seconds", "-1"]) == 2
    assert "batch_seconds is -1.0" in capsys.readouterr().err
    assert main.main([*command, "--batch_seconds", "3"]) == 0


def test_the_command_answers_each_side_of_a_call(tiny_bundle, tmp_path, capsys):
    soundfile.write(tmp_path / "call.wav", noise(2.0, channels=2), SAMPLE_RATE)
    (tmp_path / "broken.wav").write_text("no audio")
    files = [str(tmp_path / name) for name in ("call.wav", "broken.wav")]
    command = ["classify", *files, "--model", str(tiny_bundle), "--channels", "each", "--format", "jsonl"]
    assert main.main(command) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["scope"], r["channel"], r["error"] is None) for r in records] == [
        *(("recording", 1, True), ("recording", 2, True), ("recording", None, False)),
    ]
