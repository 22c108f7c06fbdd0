"""`accent-plugin classify` and `evaluate`: many files, formats, going on, and the report of a bundle."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import encode, noise, save, three_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accent_plugin.audio.samples import Loss
from accent_plugin.bundle.write import write_bundle
from accent_plugin.cli import main
from accent_plugin.cli import models as cli_models
from accent_plugin.data.prepare import prepare_data
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.inference import labelled
from accent_plugin.inference.bulk import find, run
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled
from accent_plugin.inference.records import Failure, Prediction
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")


@pytest.fixture(scope="module")
def classifier(tiny_bundle):
    return AccentClassifier.from_bundle(tiny_bundle, device="cpu")


@pytest.fixture
def speech(tmp_path):
    """Four clips in two folders, one of them damaged, and a file that is none."""
    folder = tmp_path / "speech"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.wav", "b.flac", "more/c.wav")):
        soundfile.write(folder / name, noise(1.2, seed=number), 16_000)
    (folder / "d.wav").write_text("not a sound")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def answers(classifier, sources, output, format="jsonl"):
    return run(classifier, sources, format, output, progress=False)


def rounded(text):
    """Text with every number of many decimals cut to three."""
    return re.sub(r"\d\.\d{4,}(e-\d+)?", lambda number: f"{float(number[0]):.3f}", text)


def read(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


class Fake:
    """Answers by a file's name alone, without a network."""

    labels, identity = LABELS, "0123456789ab"
    window_seconds, hop_seconds = 10.0, 5.0

    def __init__(self, threshold=None):
        self.threshold = threshold

    @staticmethod
    def predict_files(sources, **reading):
        for source in sources:
            if len(source) % 3 == 0:
                yield Failure(source, "undecodable", f"{source} cannot be decoded")
            else:
                scores = dict(zip(LABELS, (0.5, 0.3, 0.2), strict=True))
                yield Prediction("us", "us", 0.5, scores, float(len(source)), 1.5, True, source)


class Damaged(Fake):
    """Answers that a part of each file was lost."""

    @staticmethod
    def predict_files(sources, **reading):
        lost = (Loss(2.0, 1.25, "bytes that are no MP3 frames"),)
        for answer in Fake.predict_files(sources):
            yield answer if isinstance(answer, Failure) else replace(answer, lost=lost)


def test_every_format_says_how_much_was_lost(tmp_path):
    for format in ("jsonl", "csv", "table"):
        run(Damaged(), ["a.wav", "ab.wavs"], format, tmp_path / format, progress=False)
    (record, other) = read(tmp_path / "jsonl")
    assert record["lost_seconds"] == 1.25
    assert record["lost"] == [{"start": 2.0, "seconds": 1.25, "reason": "bytes that are no MP3 frames"}]
    with open(tmp_path / "csv", encoding="utf-8", newline="") as file:
        assert [row["lost_seconds"] for row in csv.DictReader(file)] == ["1.25", "1.25"]
    assert "a.wav  (1.2 s could not be decoded)\n" in (tmp_path / "table").read_text()


def test_sound_files_lost_nothing(tmp_path):
    for format in ("jsonl", "table"):
        run(Fake(), ["a.wav"], format, tmp_path / format, progress=False)
    (record,) = read(tmp_path / "jsonl")
    assert record["lost_seconds"] == 0
    assert "lost" not in record
    assert (tmp_path / "table").read_text().endswith("a.wav\n")


def test_folders_are_searched_and_files_taken_as_they_are(speech):
    found = [path.removeprefix(str(speech)) for path in find([speech, speech / "notes.txt"])]
    assert found == ["/a.wav", "/b.flac", "/d.wav", "/more/c.wav", "/notes.txt"]


def test_a_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(DataError, match="contains no audio file .*.wav"):
        list(find([tmp_path]))


def test_folders_and_hidden_files_inside_a_folder_are_no_sound(speech):
    """macOS leaves a `._x.mp3` beside each x.mp3 on foreign disks; what is given by name is taken."""
    (speech / "album.wav").mkdir()
    (speech / ".trash").mkdir()
    (speech / "gone.wav").symlink_to("nowhere")
    for name in ("._a.wav", ".trash/e.wav", "album.wav/f.wav"):
        (speech / name).write_bytes(b"")
    found = [path.removeprefix(str(speech)) for path in find([speech, speech / "._a.wav"])]
    assert found == ["/a.wav", "/album.wav/f.wav", "/b.flac", "/d.wav", "/gone.wav", "/more/c.wav", "/._a.wav"]


def test_one_line_for_each_file_in_order_and_bad_ones_named(classifier, speech, tmp_path, capsys):
    sources = list(find([speech]))
    assert answers(classifier, sources, tmp_path / "out.jsonl") == (3, 1)
    records = read(tmp_path / "out.jsonl")
    assert [record["source"] for record in records] == sources
    bad = records[2]
    assert bad["error"].startswith("undecodable: ") and bad["accent"] is None
    assert "d.wav: undecodable" in capsys.readouterr().err
    good = records[0]
    assert good["accent"] == max(good["probabilities"], key=good["probabilities"].get)
    assert sum(good["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert good["seconds"] == pytest.approx(1.2)


def test_csv(classifier, speech, tmp_path):
    answers(classifier, list(find([speech])), tmp_path / "out.csv", "csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[-3:] == ["p_us", "p_england", "p_australia"]
    assert [bool(row["error"]) for row in table] == [False, False, True, False]
    assert table[2]["p_us"] == ""


def test_table(classifier, speech, capsys):
    run(classifier, [str(speech / "a.wav"), str(speech / "d.wav")], "table", progress=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[1] in LABELS and first.split()[2] == str(speech / "a.wav")
    assert second.startswith("-  failed: undecodable")


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_second_run_goes_on(classifier, speech, tmp_path, format, cut):
    """Also where the first was killed in the middle of a line."""
    sources, whole, output = list(find([speech])), tmp_path / "whole", tmp_path / "out"
    answers(classifier, sources, whole, format)
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + (lines[3][:cut] if cut else b""))
    seen = []

    class Spy(Fake):
        identity = classifier.identity

        @staticmethod
        def predict_files(paths, **reading):
            seen.extend(paths)
            return classifier.predict_files(seen, **reading)

    assert answers(Spy(), sources, output, format) == (3, 1)
    # To the fourth decimal: other clips share the batches now, which shows in the sixth.
    assert rounded(output.read_text(encoding="utf-8")) == rounded(whole.read_text(encoding="utf-8"))
    assert seen == sources[3 - (format == "csv") :]


def test_answers_of_another_model_are_not_mixed(classifier, speech, tmp_path):
    sources, output = list(find([speech])), tmp_path / "out.jsonl"
    answers(classifier, sources, output)
    text = output.read_text(encoding="utf-8")
    output.write_text(text.replace(classifier.identity, "another"), encoding="utf-8")
    with pytest.raises(DataError, match="has results of another model"):
        answers(classifier, sources, output)


NAMES = st.one_of(
    st.text(min_size=1, max_size=6),
    st.text('a"\n\r\x85\u2028,é', min_size=1, max_size=6),
    # As the system gives names that are not UTF-8.
    st.binary(min_size=1, max_size=4).map(os.fsdecode),
)


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(NAMES, max_size=6), share=st.floats(0, 1))
def test_a_second_run_goes_on_wherever_the_first_was_killed(tmp_path, format, names, share):
    whole, output = tmp_path / "whole", tmp_path / "out"
    whole.unlink(missing_ok=True)
    counts = answers(Fake(), names, whole, format)
    content = whole.read_bytes()
    output.write_bytes(content[: round(share * len(content))])
    assert answers(Fake(), names, output, format) == counts
    assert output.read_bytes() == content


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_names_come_back_as_they_are(tmp_path, format):
    names = ["a\nb.wav", "c\rd", 'e"f', "g\u2028h\x85", os.fsdecode(b"\xffi"), "名"]
    answers(Fake(), names, tmp_path / "out", format)
    if format == "jsonl":
        found = [record["source"] for record in read(tmp_path / "out")]
    else:
        with open(tmp_path / "out", newline="", encoding="utf-8", errors="surrogateescape") as file:
            found = [row["source"] for row in csv.DictReader(file)]
    assert found == names


def test_a_file_that_is_given_twice_is_answered_once(tmp_path):
    assert answers(Fake(), ["a.wav", "a.wav"], tmp_path / "out") == (1, 0)
    assert len(read(tmp_path / "out")) == 1


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_answers_of_other_options_are_not_mixed(tmp_path, format):
    answers(Fake(), ["a.wav"], tmp_path / "out", format)
    with pytest.raises(DataError, match="has results with threshold None, not 0.9"):
        answers(Fake(threshold=0.9), ["a.wav", "b.wav"], tmp_path / "out", format)
    answers(Fake(threshold=0.9), ["a.wav"], tmp_path / "more", format)
    assert answers(Fake(threshold=0.9), ["a.wav", "b.wav"], tmp_path / "more", format) == (2, 0)


@pytest.mark.parametrize(
    "content",
    [b"my thesis\n", b"my notes", b"\x00\xff\xfe", b"[]\n", b'{"source": 1}\n', b"[" * 100_000 + b"\n", b"source,note"],
)
@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_other_peoples_files_are_left_alone(tmp_path, format, content):
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(DataError, match="was not written by accent-plugin classify"):
        answers(Fake(), ["a.wav"], tmp_path / "out", format)
    assert (tmp_path / "out").read_bytes() == content


def test_what_was_written_after_our_answers_is_left_alone(tmp_path):
    answers(Fake(), ["a.wav"], tmp_path / "out")
    content = (tmp_path / "out").read_bytes() + b"my notes"
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(DataError, match="was not written by accent-plugin classify"):
        answers(Fake(), ["a.wav"], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("name", ["nowhere/out.jsonl", "."])
def test_an_output_that_cannot_be_written(tmp_path, name):
    with pytest.raises(DataError, match="cannot be written: .*\ncreate its folder first, or choose another --output"):
        answers(Fake(), ["a.wav"], tmp_path / name)


def test_names_that_a_terminal_would_obey(capsys):
    run(Fake(), ["\x1b[2J\na", "\x1b\nb"], "table", progress=False)
    printed = capsys.readouterr()
    assert printed.out == (
        "-  failed: undecodable: \\x1b[2J\\na cannot be decoded  \\x1b[2J\\na\n"
        "-  failed: undecodable: \\x1b\\nb cannot be decoded  \\x1b\\nb\n"
    )
    assert "\x1b" not in printed.err and len(printed.err.splitlines()) == 2


@pytest.mark.parametrize("format", ["table", "jsonl", "csv"])
def test_a_name_that_stdout_cannot_encode(monkeypatch, format):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    monkeypatch.setattr(cli_models, "_classifier", lambda *_, **__: Fake())
    assert main.main(["classify", "名", os.fsdecode(b"\xff.wav"), "--model", "x", "--format", format]) == 0
    text = sys.stdout.buffer.getvalue().decode("latin-1")
    assert "\\u540d" in text and "\\udcff.wav" in text


def test_an_unknown_format(classifier):
    with pytest.raises(ConfigError, match="format 'xml' is unknown; choose table, jsonl, csv"):
        run(classifier, [], "xml")


# ------------------------------------------------------------------------------------------------ the command line


def test_command_exits_with_1_when_a_file_fails(tiny_bundle, speech, tmp_path):
    output = tmp_path / "out.csv"
    assert main.main(["classify", str(speech), "--model", str(tiny_bundle), "--output", str(output)]) == 1
    assert len(output.read_text(encoding="utf-8").splitlines()) == 5
    (speech / "d.wav").unlink()
    assert main.main(["classify", str(speech), "--model", str(tiny_bundle), "--format", "jsonl"]) == 0


def test_command_cuts_windows(tiny_bundle, speech, capsys):
    command = ["classify", str(speech / "a.wav"), "--model", str(tiny_bundle), "--format", "jsonl"]
    assert main.main([*command, "--window_seconds", "0.6"]) == 0
    assert main.main([*command, "--window_seconds", "0.6", "--hop_seconds", "0.6"]) == 0
    halves, apart = map(json.loads, capsys.readouterr().out.splitlines())
    assert [window["start"] for window in halves["windows"]] == pytest.approx([0, 0.3, 0.6])
    assert [window["start"] for window in apart["windows"]] == pytest.approx([0, 0.6])
    assert (apart["window_seconds"], apart["hop_seconds"]) == (0.6, 0.6)


def test_command_abstains(tiny_bundle, speech, capsys):
    sound = str(speech / "a.wav")
    assert (
        main.main(["classify", sound, "--model", str(tiny_bundle), "--format", "jsonl", "--min_probability", "1"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["decision"] is None


@pytest.mark.parametrize("verb", ["classify", "evaluate", "push"])
def test_a_bundle_that_is_none(tmp_path, verb, capsys):
    arguments = {
        "classify": ["x.wav", "--model", str(tmp_path)],
        "evaluate": ["--data", "x", "--model", str(tmp_path)],
        "push": [str(tmp_path), "user/name"],
    }
    assert main.main([verb, *arguments[verb]]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_export_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert main.main(["export", str(tmp_path)]) == 2
    assert "is no output folder of a run" in capsys.readouterr().err


def test_completion_knows_the_verbs(capsys):
    assert main.main(["completion", "bash"]) == 0
    assert "classify" in capsys.readouterr().out


def test_version_names_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit):
        main.main(["--version"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("accent_plugin", "speechbrain", "transformers", "torch", "python"))


# ------------------------------------------------------------------------------------------------------ evaluation


def test_a_report_of_a_bundle_on_a_dataset(tiny_bundle, classifier, tmp_path, capsys):
    data = save(tmp_path / "data", **three_splits(("us", "england", "Kentish"), clients=(1, 1, 3)))
    out = tmp_path / "report"
    assert main.main(["evaluate", "--model", str(tiny_bundle), "--data", str(data), "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    # Of test: three clients of two known accents with two clips each; six of an accent the model does not know.
    assert (metrics["data"]["clips"], metrics["data"]["speakers"]) == (12, 6)
    assert metrics["data"]["left_out"] == {"unknown accent": 6}
    assert metrics["data"]["speakers_disjoint"] is None
    curve = classifier.config["calibration"]["curve"]
    chosen = max(t for t, c in zip(curve["threshold"], curve["coverage"], strict=True) if c >= 0.8)
    assert (metrics["confidence"]["threshold"], metrics["confidence"]["threshold_given"]) == (chosen, True)
    assert (out / "report.html").is_file()
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    number = int(first["ID"].partition(":")[2])
    rows = read_labelled(data, LABELS).rows
    sound = next(row.sound() for row in rows if row.clip.id == f"test:{number}")
    expected = classifier.predict_file(sound).probabilities
    assert {label: float(first[f"p_{label}"]) for label in LABELS} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["eval", "test_clean", "heldout"])
def test_only_the_test_split_is_evaluated_whatever_its_name(tiny_bundle, tmp_path, capsys, name):
    tables = three_splits(("us", "england", "Kentish"), clients=(2, 1, 1))
    tables[name] = tables.pop("test")
    data, out = save(tmp_path / "data", **tables), tmp_path / "report"
    assert main.main(["evaluate", "--model", str(tiny_bundle), "--data", str(data), "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["data"]["splits"], metrics["data"]["clips"]) == ([name], 4)
    assert metrics["data"]["unknown_accents"] == {"Kentish": 2}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert f"Splits: {name}." in text and "Skipped accents without a known label: 'Kentish' 2." in text


def test_without_a_test_split_one_has_to_be_chosen(tmp_path):
    tables = three_splits(LABELS, clients=(1, 1, 1))
    data = save(tmp_path / "data", train=tables["train"], dev=tables["validation"])
    with pytest.raises(
        DataError, match="has no test split: its splits are train, dev\nchoose one or several with split"
    ):
        read_labelled(data, LABELS)
    assert read_labelled(data, LABELS, split="valid").splits == ("dev",)
    assert read_labelled(data, LABELS, split="train, dev").splits == ("train", "dev")
    assert read_labelled(save(tmp_path / "one", all=tables["test"]), LABELS).splits == ("all",)


def test_unknown_accents_are_named_where_nothing_is_left(tmp_path):
    data = save(tmp_path / "data", **three_splits(("Kentish",), clients=(1, 1, 1)))
    with pytest.raises(DataError, match="spellings without a known label: 'Kentish' 2; give a mapping for them"):
        read_labelled(data, LABELS)


def test_a_mapping_brings_clips_back(tmp_path):
    data = save(tmp_path / "data", **three_splits(("us", "Kentish"), clients=(1, 1, 2)))
    found = read_labelled(data, LABELS, mapping={"Kentish": "england"})
    rows, left_out = found.rows, found.left_out
    assert [row.accent for row in rows].count("england") == 4
    assert not left_out


def test_a_manifest_is_evaluated_too(tiny_bundle, classifier, tmp_path):
    data = save(tmp_path / "data", **three_splits(LABELS, clients=(2, 1, 2)))
    prepared = prepare_data(data, tmp_path / "prepared", accents=LABELS, seed=1, progress=False)
    rows = read_labelled(prepared.splits["test"], LABELS).rows
    predictions, failures = evaluate_model(classifier, rows, progress=False)
    assert len(predictions.ids) == 12 and not failures
    assert np.exp(predictions.log_probabilities).sum(axis=1) == pytest.approx(np.ones(12), abs=1e-5)


def test_two_bundles_are_compared(tiny_bundle, tmp_path, capsys):
    data = save(tmp_path / "data", **three_splits(LABELS, clients=(1, 1, 3)))
    models = ["--model", str(tiny_bundle)] * 2
    assert main.main(["evaluate", *models, "--data", str(data), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "comparison.md").is_file()
    assert (tmp_path / "report" / "model_2" / "report.md").is_file()


def test_clips_that_cannot_be_heard_are_counted(classifier, tmp_path):
    tables = three_splits(LABELS, clients=(1, 1, 1))
    tables["test"][0]["audio"] = {"bytes": encode(np.zeros(16_000, np.float32)), "path": "silent.flac"}
    rows = read_labelled(save(tmp_path / "data", **tables), LABELS).rows
    predictions, failures = evaluate_model(classifier, rows, progress=False)
    assert (len(predictions.ids), dict(failures)) == (5, {"silent": 1})


def test_a_clip_that_is_too_long_for_the_encoder_is_counted(tmp_path, tiny_encoder):
    model = AccentModel(make_encoder(str(tiny_encoder("whisper"))), LABELS)
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    classifier = AccentClassifier.from_bundle(folder, device="cpu", batch_seconds=200, **WHOLE_CLIPS)
    tables = three_splits(LABELS, clients=(1, 1, 1))
    tables["test"][0]["audio"] = {"bytes": encode(noise(30.2)), "path": "long.flac"}
    tables["test"][1]["audio"] = {"bytes": encode(noise(29.8)), "path": "just.flac"}
    rows = read_labelled(save(tmp_path / "data", **tables), LABELS).rows
    predictions, failures = evaluate_model(classifier, rows, progress=False)
    assert (len(predictions.ids), dict(failures)) == (5, {"too long": 1})


def test_columns_of_other_names_are_evaluated_too(tiny_bundle, tmp_path, capsys):
    tables = three_splits(LABELS, clients=(1, 1, 1))
    tables = {split: [row | {"dialect": row["accent"]} for row in table] for split, table in tables.items()}
    data = save(tmp_path / "data", without=("accent",), **tables)
    command = ["evaluate", "--model", str(tiny_bundle), "--data", str(data), "--out", str(tmp_path / "report")]
    assert main.main(command) == 2
    assert "pass --accent_column NAME" in capsys.readouterr().err
    assert main.main([*command, "--accent_column", "dialect"]) == 0


def test_a_manifest_has_columns_of_its_own(tmp_path):
    (tmp_path / "test.csv").write_text("")
    with pytest.raises(DataError, match="is a manifest, whose column names are fixed: leave accent_column out"):
        read_labelled(tmp_path / "test.csv", LABELS, columns={"accent": "dialect", "client": None})


def bundle_with(labels, folder, tiny_encoder):
    model = AccentModel(make_encoder(str(tiny_encoder("moonshine"))), labels)
    return str(write_bundle(folder, model, labels, encoder_name="tiny", pooling="mean"))


def test_bundles_of_other_labels_are_told_before_the_work(tiny_bundle, tiny_encoder, tmp_path, capsys, monkeypatch):
    other = bundle_with(("us", "scotland"), tmp_path / "other", tiny_encoder)
    monkeypatch.setattr(labelled, "evaluate_model", None)
    assert main.main(["evaluate", "--model", str(tiny_bundle), "--model", other, "--data", "x"]) == 2
    assert "cannot be compared: " in capsys.readouterr().err


def test_a_folder_that_is_none_is_told_before_the_work(tiny_bundle, tmp_path, capsys, monkeypatch):
    data = save(tmp_path / "data", **three_splits(LABELS, clients=(1, 1, 1)))
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(labelled, "evaluate_model", None)
    command = ["evaluate", "--model", str(tiny_bundle), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main.main(command) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_an_evaluation_replaces_what_an_earlier_one_wrote(tiny_bundle, tmp_path, capsys):
    data, out = save(tmp_path / "data", **three_splits(LABELS, clients=(1, 1, 2))), tmp_path / "out"
    command = ["evaluate", "--data", str(data), "--out", str(out), "--model", str(tiny_bundle)]
    assert main.main([*command, "--model", str(tiny_bundle)]) == 0
    two = {str(path.relative_to(out)) for path in out.rglob("*")}
    (out / "model_2" / "mine.txt").write_text("")
    assert main.main(command) == 0
    one = {str(path.relative_to(out)) for path in out.rglob("*")} - {"model_2", "model_2/mine.txt"}
    assert one and not one & two
    assert main.main([*command, "--model", str(tiny_bundle)]) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == two | {"model_2/mine.txt"}


def test_an_evaluation_leaves_the_files_of_others(tiny_bundle, tmp_path, capsys):
    data, out = save(tmp_path / "data", **three_splits(LABELS, clients=(1, 1, 2))), tmp_path / "out"
    out.mkdir()
    foreign = {
        "metrics.json": json.dumps({"command": "train.py hparams.yaml"}),
        "report.md": "of training",
        "comparison.md": "of compare",
    }
    for name, content in foreign.items():
        (out / name).write_text(content)
    models = ["--model", str(tiny_bundle)] * 2
    assert main.main(["evaluate", *models, "--data", str(data), "--out", str(out)]) == 0
    assert (out / "metrics.json").read_text() == foreign["metrics.json"]
    assert (out / "report.md").read_text() == foreign["report.md"]


def test_two_bundles_are_compared_on_the_clips_that_both_answered(tiny_bundle, tiny_encoder, tmp_path, caplog):
    model = AccentModel(make_encoder(str(tiny_encoder("whisper"))), LABELS)
    whisper = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    tables = three_splits(LABELS, clients=(1, 1, 2))
    tables["test"][0]["audio"] = {"bytes": encode(noise(30.2)), "path": "long.flac"}
    data, out = save(tmp_path / "data", **tables), tmp_path / "out"
    models = ["--model", str(whisper), "--model", str(tiny_bundle)]
    assert main.main(["evaluate", *models, "--data", str(data), "--out", str(out)]) == 1
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8"))["clips"] == 11
    assert "only one of the two models could classify, left out of the comparison: 1" in caplog.text


@pytest.mark.parametrize("accent", ["Kentish", ""])
def test_nothing_to_evaluate_on(tmp_path, accent):
    data = save(tmp_path / "data", **three_splits((accent,), clients=(1, 1, 1)))
    with pytest.raises(DataError, match="has one of the accents us, england, australia: (unknown|no) accent 2"):
        read_labelled(data, LABELS)


@pytest.mark.slow
def test_a_thousand_files_with_thirty_bad_ones(tiny_bundle, tmp_path, capsys):
    folder = tmp_path / "speech"
    folder.mkdir()
    content = encode(noise(1.0))
    for number in range(1000):
        bad = number % 33 == 0 and number < 990
        (folder / f"{number:04d}.flac").write_bytes(content[: number % 90] if bad else content)
    output = tmp_path / "out.jsonl"
    assert main.main(["classify", str(folder), "--model", str(tiny_bundle), "--output", str(output)]) == 1
    records = read(output)
    assert sum(record["error"] is None for record in records) == 970
    named = [line for line in capsys.readouterr().err.splitlines() if ".flac: " in line]
    assert len(named) == 30


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_give_an_answer_or_a_failure(classifier, data):
    """Damaged copies of real containers, and noise: never an exception of another kind."""
    kind = data.draw(st.sampled_from(["WAV", "FLAC", "OGG", "MP3", "noise"]))
    if kind == "noise":
        content = data.draw(st.binary(max_size=2000))
    else:
        content = bytearray(encode(noise(0.3), format=kind))
        for _ in range(data.draw(st.integers(0, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(content[: data.draw(st.integers(0, len(content)))])
    (answer,) = classifier.predict_files([content])
    assert isinstance(answer, Failure) or answer.accent in LABELS


def test_files_in_a_folder_that_are_not_audio_are_counted_by_reason(speech, caplog):
    (speech / ".hidden.wav").touch()
    (speech / "more/README").touch()
    (speech / "more/list.TXT").touch()
    with caplog.at_level("INFO"):
        assert len(list(find([speech]))) == 4
    assert "4 files are skipped: 1 hidden, 2 with the suffix .txt, 1 without a suffix" in caplog.text


def test_without_skipped_files_nothing_is_said(speech, caplog):
    (speech / "notes.txt").unlink()
    with caplog.at_level("INFO"):
        list(find([speech]))
    assert caplog.text == ""


def test_an_output_that_another_process_writes_is_refused(classifier, speech, tmp_path):
    output = tmp_path / "answers.jsonl"
    code = (
        "import sys, pathlib; from accent_plugin.inference.bulk import _locked\n"
        "with _locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DataError, match="is being written by another process"):
            answers(classifier, list(find([speech])), output)
        assert not output.exists()
        other.stdin.close()
    assert answers(classifier, list(find([speech])), output) == (3, 1)
