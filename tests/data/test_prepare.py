import csv
import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import dataset, encode, noise, rows, save, shared_data, three_splits

from accent_plugin.audio import codecs
from accent_plugin.data import dataset_dict, selection
from accent_plugin.data import prepare as data_prepare
from accent_plugin.data.manifests import COLUMNS, load_prepared, read_manifest
from accent_plugin.data.prepare import default_prepared_folder, preparation_fingerprint, prepare_data
from accent_plugin.errors import ConfigError, DataError, ManifestError

TWO = {"accents": ["us", "england"], "seed": 7, "progress": False, "workers": 1}


def prepare(data, folder, **choices):
    return prepare_data(data, folder, **(TWO | choices))


def report(folder):
    return json.loads((Path(folder) / "prepare.json").read_text())


def clips_of(prepared, fold=None):
    return {split: read_manifest(path) for split, path in prepared.paths(fold).items()}


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.suffix in (".csv", ".flac")
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Train, validation and test of two accents, 4, 1 and 2 clients each, 2 clips a client."""
    return save(tmp_path_factory.mktemp("corpus") / "data", **three_splits())


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One split, 8 clients of each of two accents, 2 clips a client."""
    return save(tmp_path_factory.mktemp("pool") / "data", train=rows("us", 8) + rows("england", 8))


# ------------------------------------------------------------------------------------------------ what is made


def test_layout(corpus, tmp_path):
    made = prepare(corpus, tmp_path / "out")
    assert made.counts["train"]["us"] == {"clips": 8, "speakers": 4, "seconds": 9.6}
    assert {s: sum(a["clips"] for a in c.values()) for s, c in made.counts.items()} == {
        "train": 16,
        "valid": 4,
        "test": 8,
    }
    assert (made.name, made.synthetic, made.speakers_disjoint, made.warnings, made.dropped) == (
        "data",
        False,
        True,
        (),
        {},
    )
    for split, path in made.splits.items():
        assert path == tmp_path / "out" / f"{split}.csv"
        table = list(csv.reader(path.read_text().splitlines()))
        assert table[0] == "ID,duration,wav,accent,client_id,gender,age".split(",")
        assert [row[0] for row in table[1:]] == sorted(row[0] for row in table[1:])
        for row in table[1:]:
            assert row[1] == "1.2000"
            assert row[2] == f"$data_root/audio/{row[0][:2]}/{row[0]}.flac"
    clip = read_manifest(made.splits["test"])[0]
    assert len(codecs.read(clip.wav)) == clip.duration * 16_000
    assert clip.client_id.startswith(clip.accent)
    assert clip.age == "twenties"
    assert load_prepared(tmp_path / "out") == made
    saved = report(tmp_path / "out")
    assert saved["arguments"]["seed"] == 7
    assert saved["data_folder"] == str(corpus)
    assert saved["columns"]["train"]["client"] == "client_id"


def test_the_text_of_test_clips_is_compared_with_training(tmp_path):
    tables = three_splits()
    for split, table in tables.items():
        for number, row in enumerate(table):
            row["sentence"] = f"Only {split} $read number {number}."
    tables["train"][0]["sentence"] = tables["test"][0]["sentence"]
    data = save(tmp_path / "data", **tables)
    made = prepare(data, tmp_path / "out", disjoint_sentences=False, balance="none")
    seen = Counter((clip.words_seen, clip.sentence_seen) for clip in clips_of(made)["test"])
    # "test" is a word of one training clip. Numbers 0 to 7 of test are among the numbers 0 to 15 of training.
    assert seen == {("5/5", "no"): 7, ("5/5", "yes"): 1}
    apart = prepare(data, tmp_path / "apart", balance="none")
    assert Counter((clip.words_seen, clip.sentence_seen) for clip in clips_of(apart)["test"]) == {
        ("4/5", "no"): 7,
        # Without the clip that it shared with test, training has no number 0.
        ("3/5", "no"): 1,
    }
    assert {clip.words_seen for split in ("train", "valid") for clip in clips_of(apart)[split]} == {""}
    assert "test_seen.csv" in report(tmp_path / "apart")["files"]


def test_without_sentences_nothing_is_said_about_them(tmp_path):
    made = prepare(save(tmp_path / "data", **three_splits(sentences=False)), tmp_path / "out")
    assert {(clip.words_seen, clip.sentence_seen) for clip in clips_of(made)["test"]} == {("", "")}
    assert "test_seen.csv" not in report(tmp_path / "out")["files"]


def test_damaged_clips_are_used_and_counted(tmp_path):
    tables = three_splits()
    for number, row in enumerate(tables["train"][:2]):
        content = encode(noise(2.0, seed=100 + number), format="WAV")
        row["audio"] = {"bytes": content[: 44 + 48_000], "path": "cut.wav"}
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert report(tmp_path / "out")["damaged"] == {"clips": 2, "lost_seconds": 1.0}
    assert "2 of 28 clips are damaged: 1.0 s of them could not be decoded" in made.warnings
    assert made.dropped == {}


def test_speechbrain_reads_it(corpus, tmp_path):
    dataio = pytest.importorskip("speechbrain.dataio.dataio")
    made = prepare(corpus, tmp_path / "out")
    table = dataio.load_data_csv(str(made.splits["test"]), {"data_root": str(made.folder)})
    assert {id_: row["wav"] for id_, row in table.items()} == {c.id: c.wav for c in read_manifest(made.splits["test"])}


def test_same_bytes_whatever_the_order_of_rows_and_workers(corpus, tmp_path):
    tables = three_splits(clips=3)
    first = prepare(save(tmp_path / "a", **tables), tmp_path / "out_a", max_clips_per_client=2)
    for table in tables.values():
        random.Random(1).shuffle(table)
    second = prepare(save(tmp_path / "b", **tables), tmp_path / "out_b", max_clips_per_client=2, workers=2)
    assert everything(first.folder) == everything(second.folder)
    assert first.dropped == second.dropped == {"client cap": 14}


def test_train_is_balanced(tmp_path):
    tables = three_splits()
    tables["train"] += rows("us", 3, first=50)
    data = save(tmp_path / "data", **tables)
    made = prepare(data, tmp_path / "down")
    assert {a: c["clips"] for a, c in made.counts["train"].items()} == {"us": 8, "england": 8}
    assert made.counts["train"]["us"]["speakers"] == 7
    assert made.dropped == {"balance": 6}
    for balance in ("sampler", "none"):
        made = prepare(data, tmp_path / balance, balance=balance)
        assert {a: c["clips"] for a, c in made.counts["train"].items()} == {"us": 14, "england": 8}


def test_train_is_balanced_also_after_bad_clips(tmp_path):
    tables = three_splits(clients=(20, 1, 1), clips=1)
    tables["train"][0]["audio"]["bytes"] = b"broken"
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert {a: c["clips"] for a, c in made.counts["train"].items()} == {"us": 19, "england": 19}
    assert made.dropped == {"undecodable": 1, "balance": 1}


def test_one_split_is_split_by_speaker(pool, tmp_path):
    made = prepare(pool, tmp_path / "out", test_fraction=0.25, valid_fraction=0.125)
    speakers = {split: {a: c["speakers"] for a, c in counts.items()} for split, counts in made.counts.items()}
    assert speakers == {
        "train": {"us": 5, "england": 5},
        "valid": {"us": 1, "england": 1},
        "test": {"us": 2, "england": 2},
    }
    ids = [{clip.client_id for clip in clips} for clips in clips_of(made).values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 16


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_missing_split_is_taken_from_train(tmp_path, missing):
    tables = three_splits(clients=(6, 2, 2))
    kept = "test" if missing == "validation" else "validation"
    data = save(tmp_path / "data", train=tables["train"], **{kept: tables[kept]})
    made = prepare(data, tmp_path / "out")
    found = {split: {clip.client_id for clip in clips} for split, clips in clips_of(made).items()}
    assert {split: len(ids) for split, ids in found.items()} == {
        "train": 10,
        "valid": 2 if missing == "validation" else 4,
        "test": 2 if missing == "test" else 4,
    }


def test_folds(pool, tmp_path):
    made = prepare(pool, tmp_path / "out", n_folds=4, valid_fraction=0.2)
    assert made.splits == {}
    assert len(made.folds) == 4
    tested = Counter()
    for fold in range(1, 5):
        parts = clips_of(made, fold)
        assert made.paths(fold)["test"] == tmp_path / "out" / f"fold_{fold}" / "test.csv"
        assert all(Path(clip.wav).is_file() for clips in parts.values() for clip in clips)
        assert Path(parts["test"][0].wav).is_relative_to(tmp_path / "out" / "audio")
        found = [{clip.client_id for clip in clips} for clips in parts.values()]
        assert sum(map(len, found)) == len(set.union(*found)) == 16
        tested.update(clip.id for clip in parts["test"])
        assert made.counts[f"fold_{fold}"]["test"]["us"]["speakers"] == 2
    assert set(tested.values()) == {1}
    assert len(tested) == 32
    assert load_prepared(made.folder) == made
    for wrong in (None, 0, 5):
        with pytest.raises(ManifestError, match=f"fold {wrong} was asked for; .* has folds 1 to 4"):
            made.paths(wrong)


def test_folds_pool_the_splits_that_are_named(corpus, tmp_path):
    made = prepare(corpus, tmp_path / "out", n_folds=3, source_splits=["train", "valid"])
    ids = {clip.client_id for fold in (1, 2, 3) for clip in read_manifest(made.paths(fold)["test"])}
    assert ids == {f"{accent}-{k}" for accent in ("us", "england") for k in range(5)}
    assert "split 'test' of the source was not used (8 clips)" in made.warnings
    with pytest.raises(DataError, match="source_splits names 'tests'; the splits are train, validation, test"):
        prepare(corpus, tmp_path / "none", source_splits=["tests"])


@pytest.mark.parametrize("names", [
    ("train", "dev", "eval"),
    ("train_clean", "validation_clean", "test_clean"),
    ("training", "val", "held-out"),
])  # fmt: skip
def test_splits_of_other_names_are_kept(tmp_path, names):
    tables = dict(zip(names, three_splits(clients=(2, 1, 1)).values(), strict=True))
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    found = {split: {clip.client_id for clip in clips} for split, clips in clips_of(made).items()}
    assert found["valid"] == {"us-2", "england-2"} and found["test"] == {"us-3", "england-3"}
    assert not made.warnings


def test_parts_of_a_split_are_joined(tmp_path):
    tables = three_splits(clients=(2, 1, 1))
    tables["train_other"] = rows("us", 1, first=7) + rows("england", 1, first=7)
    tables["train_clean"] = tables.pop("train")
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert {clip.client_id for clip in clips_of(made)["train"]} == {
        f"{accent}-{k}" for accent in ("us", "england") for k in (0, 1, 7)
    }


def test_two_words_for_one_split_have_to_be_chosen_between(tmp_path):
    tables = three_splits(clients=(2, 1, 1))
    tables["eval"] = rows("us", 1, first=7) + rows("england", 1, first=7)
    data = save(tmp_path / "data", **tables)
    with pytest.raises(
        DataError, match="test and eval could each be the test split(.|\n)*name those to use in source_sp"
    ):
        prepare(data, tmp_path / "out")
    made = prepare(data, tmp_path / "out", source_splits=["train", "valid", "eval"])
    assert {clip.client_id for clip in clips_of(made)["test"]} == {"us-7", "england-7"}
    with pytest.raises(DataError, match="which of them are train, validation and test?"):
        prepare(data, tmp_path / "none", source_splits=["test", "eval"])


@pytest.mark.parametrize("column", ["text", "transcription", "Transcript"])
def test_sentences_are_found_under_their_usual_names(tmp_path, column):
    tables = three_splits()
    shared = tables["test"][0]["sentence"]
    tables["train"][0]["sentence"] = shared
    tables = {split: [row | {column: row["sentence"]} for row in table] for split, table in tables.items()}
    made = prepare(save(tmp_path / "data", without=("sentence",), **tables), tmp_path / "out")
    assert made.dropped["sentence in test"] == 1


def test_random_split_is_flagged(pool, tmp_path):
    made = prepare(pool, tmp_path / "out", split="random", test_fraction=0.3)
    assert made.speakers_disjoint is False
    assert made.warnings == (selection.RANDOM_SPLIT,)
    found = {split: {clip.client_id for clip in clips} for split, clips in clips_of(made).items()}
    assert found["train"] & found["test"]


def test_sentences_of_test_leave_train(tmp_path, caplog):
    tables = three_splits()
    tables["train"][0]["sentence"] = tables["test"][0]["sentence"].upper() + "!!"
    tables["train"][2]["sentence"] = tables["validation"][0]["sentence"]
    tables["validation"][1]["sentence"] = tables["test"][1]["sentence"]
    data = save(tmp_path / "data", **tables)
    caplog.set_level(logging.INFO, "accent_plugin.data.prepare")
    made = prepare(data, tmp_path / "out", balance="none")
    assert made.dropped == {"sentence in test": 2, "sentence in valid": 1}
    assert "1 of valid's clips read a sentence of test: dropped" in caplog.text
    assert prepare(data, tmp_path / "kept", balance="none", disjoint_sentences=False).dropped == {}


def test_columns_are_found_or_given_and_labels_are_names(tmp_path):
    from datasets import ClassLabel, Value

    def renamed(table):
        return [
            {
                "speaker_id": int(row["client_id"].split("-")[1]) + 100 * (row["accent"] == "us"),
                "label": ["England English", "us"].index(row["accent"].replace("england", "England English")),
                "recording": row["audio"],
            }
            for row in table
        ]

    tables = {split: renamed(table) for split, table in three_splits().items()}
    kinds = {"speaker_id": Value("int64"), "label": ClassLabel(names=["England English", "us"])}
    kinds["recording"] = {"bytes": Value("binary"), "path": Value("string")}
    data = save(tmp_path / "data", kinds, **tables)
    made = prepare(data, tmp_path / "out", audio_column="recording")
    assert {a: c["speakers"] for a, c in made.counts["test"].items()} == {"us": 2, "england": 2}
    assert report(made.folder)["columns"]["train"]["accent"] == "label"
    with pytest.raises(
        ManifestError, match="client_column is 'who', which .*train does not have: columns are speaker_id"
    ):
        prepare(data, tmp_path / "none", client_column="who")
    with pytest.raises(ManifestError, match="no audio column in .*\npass --audio_column NAME"):
        prepare(data, tmp_path / "none")


@pytest.mark.parametrize(
    ("format", "subtype", "rate", "channels"),
    [("WAV", None, 44_100, 2), ("MP3", None, 48_000, None), ("OGG", "OPUS", 48_000, None), ("OGG", "VORBIS", 8000, 2)],
)
def test_kinds_of_audio(tmp_path, format, subtype, rate, channels):
    tables = three_splits(clients=(1, 1, 1), clips=1)
    for seed, row in enumerate(row for table in tables.values() for row in table):
        row["audio"]["bytes"] = encode(noise(1.5, rate, channels, seed), rate, format, subtype)
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert made.counts["test"]["us"]["clips"] == 1
    assert made.counts["test"]["us"]["seconds"] == pytest.approx(1.5, abs=0.06)


@pytest.mark.parametrize("plain", [False, True])
def test_paths_instead_of_bytes(tmp_path, plain):
    from datasets import DatasetDict, Value

    tables = three_splits(clients=(1, 1, 1), clips=1)
    (tmp_path / "data" / "clips").mkdir(parents=True)
    for number, row in enumerate(row for table in tables.values() for row in table):
        path = tmp_path / "data" / "clips" / row["path"]
        path.write_bytes(row["audio"]["bytes"])
        path = str(path) if number % 2 else f"clips/{row['path']}"
        row["audio"] = path if plain else {"bytes": None, "path": path}
    kind = Value("string") if plain else {"bytes": Value("binary"), "path": Value("string")}
    made = DatasetDict({split: dataset(table, {"audio": kind}) for split, table in tables.items()})
    made.save_to_disk(str(tmp_path / "data"))
    assert prepare(tmp_path / "data", tmp_path / "out").counts["test"]["us"]["clips"] == 1


def test_odd_client_ids_come_back(tmp_path):
    odd = ["$HOME/x", 'comma, "quote"', "line\nbreak\r", "100%24", "../../etc/passwd", "caf\u00e9 \u4f60"]
    tables = three_splits(clients=(6, 1, 1), clips=1)
    for row, name in zip(tables["train"], odd, strict=False):
        row["client_id"], row["path"] = name, f"../../{name}/$x"
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert {clip.client_id for clip in read_manifest(made.splits["train"]) if clip.accent == "us"} == {
        name.strip() for name in odd
    }
    text = made.splits["train"].read_text()
    assert text.count("$") == text.count("$data_root/") == 12
    dataio = pytest.importorskip("speechbrain.dataio.dataio")
    assert len(dataio.load_data_csv(str(made.splits["train"]), {"data_root": "/x"})) == 12
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]


def test_the_card_of_the_data_is_carried_on(tmp_path):
    data = save(tmp_path / "data", **three_splits(clients=(1, 1, 1)))
    (data / "accent_plugin.json").write_text(json.dumps({"synthetic": True, "name": "built-in corpus"}))
    made = prepare(data, tmp_path / "out")
    assert (made.name, made.synthetic) == ("built-in corpus", True)


# -------------------------------------------------------------------------------------------- what is left out


def test_every_reason_is_counted(tmp_path, caplog):
    tables = three_splits(clients=(30, 1, 1), clips=1)
    train = tables["train"]
    bad = [b"not audio", b"", encode(noise(0.01)), encode(noise(31.0)), encode(np.zeros(32_000, np.float32))]
    broken = noise(2.0)
    broken[9] = np.nan
    bad.append(encode(broken, format="WAV", subtype="FLOAT"))
    for row, sound in zip(train, bad, strict=False):
        row["audio"]["bytes"] = sound
    for row, accent in zip(train[10:], ["", "Martian", "us|england", "Welsh English"], strict=False):
        row["accent"] = accent
    train[14]["client_id"] = ""
    # Somebody's clips are of two accents.
    train[15]["client_id"] = train[45]["client_id"]
    # The same row again; the same sound under another name, in train and in test.
    train.append(dict(train[20]))
    train.append(dict(train[21], path="other.flac", client_id="us-99"))
    train.append(dict(tables["test"][0], path="third.flac", client_id="us-98", sentence="Third."))
    caplog.set_level(logging.INFO, "accent_plugin.data.prepare")
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out", balance="none", max_unreadable_share=0.06)
    expected = {
        "undecodable": 1,
        "empty": 1,
        "non-finite": 1,
        "too short": 1,
        "too long": 1,
        "silent": 1,
        "no accent": 1,
        "unknown accent": 1,
        "compound accent": 1,
        "other accent": 1,
        "no client id": 1,
        "contradicting accents": 2,
        # One is the same row, two are the same sound.
        "duplicate": 3,
    }
    assert made.dropped == expected
    kept = {split: sum(c["clips"] for c in counts.values()) for split, counts in made.counts.items()}
    assert sum(kept.values()) + sum(made.dropped.values()) == 60 + 3 + 4
    assert kept["test"] == 2
    line = next(record.message for record in caplog.records if record.message.startswith("left out"))
    assert all(f"{reason} {n}" in line for reason, n in made.dropped.items())
    examples = report(made.folder)["examples"]
    assert len(examples) <= 20
    assert {"reason", "id", "message"} <= examples[0].keys()
    assert any("Martian" in example["message"] for example in examples)


def test_identity_falls_back_on_the_sound(tmp_path):
    tables = three_splits(clients=(3, 1, 1), clips=3, sentences=False)
    for table in tables.values():
        for row in table:
            row["path"] = row["audio"]["path"] = "audio.wav"
    tables["train"].append(dict(tables["train"][0]))
    made = prepare(save(tmp_path / "data", **tables), tmp_path / "out")
    assert made.dropped["duplicate"] == 1
    assert made.counts["train"]["us"]["clips"] == 9


def test_no_client_ids(tmp_path, caplog):
    data = save(tmp_path / "data", without=("client_id",), train=rows("us", 10) + rows("england", 10))
    made = prepare(data, tmp_path / "out")
    assert made.speakers_disjoint is None
    assert made.warnings == ("no client ids: splits may share speakers",)
    assert made.warnings[0] in caplog.text
    assert {split: c["us"]["clips"] for split, c in made.counts.items()} == {"train": 16, "valid": 2, "test": 2}
    assert {clip.client_id for clip in read_manifest(made.splits["train"])} == {""}


# --------------------------------------------------------------------------------------------- again, and after


def test_again_does_nothing(corpus, tmp_path, monkeypatch):
    made = prepare(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(data_prepare, "_prepare", None)
    assert prepare(corpus, tmp_path / "out") == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_second_call_loads_no_heavy_package(corpus, tmp_path):
    prepare(corpus, tmp_path / "out")
    code = (
        "import sys; from accent_plugin.data.prepare import prepare_data;"
        f"prepare_data({str(corpus)!r}, {str(tmp_path / 'out')!r}, accents=['us', 'england'], seed=7);"
        "assert not {'datasets', 'torch', 'tqdm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_arguments_are_refused(corpus, pool, tmp_path):
    prepare(corpus, tmp_path / "out")
    before = everything(tmp_path / "out")
    with pytest.raises(
        ManifestError, match=r"something else:\n  accents: \[england, us\] -> \[us\]\n  seed: 7 -> 8\nchoose another"
    ):
        prepare(corpus, tmp_path / "out", seed=8, accents=["us"])
    with pytest.raises(ManifestError, match="data_folder: .*corpus.* -> .*pool"):
        prepare(pool, tmp_path / "out")
    assert everything(tmp_path / "out") == before


def test_a_copy_without_its_times_is_the_same_data(tmp_path):
    data = save(tmp_path / "data", **three_splits(clients=(1, 1, 1)))
    prepare(data, tmp_path / "out")
    before = everything(tmp_path / "out")
    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.arrow"):
        os.utime(path, (1, 1))
    choices = {"accents": ["us", "england"], "seed": 7}
    assert default_prepared_folder(tmp_path / "copy", **choices) == default_prepared_folder(data, **choices)
    prepare(tmp_path / "copy", tmp_path / "out")
    assert everything(tmp_path / "out") == before


def test_changed_data_are_refused(tmp_path):
    data = save(tmp_path / "data", **three_splits(clients=(1, 1, 1)))
    prepare(data, tmp_path / "out")
    arrow = next((data / "test").glob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    with pytest.raises(ManifestError, match=r"contents of .*data: changed since \(test\)"):
        prepare(data, tmp_path / "out")


def test_the_fingerprint_follows_source_and_arguments(corpus, pool):
    choices = {"accents": ["us", "england"], "seed": 7}
    print_ = preparation_fingerprint(corpus, **choices)
    assert print_ == preparation_fingerprint(corpus, **(choices | {"accents": ["england", "us"]}))
    others = [preparation_fingerprint(corpus, **(choices | {"seed": 8})), preparation_fingerprint(pool, **choices)]
    assert len({print_, *others}) == 3
    assert default_prepared_folder(corpus, "somewhere", **choices) == Path("somewhere") / print_


def test_interrupted_it_goes_on(corpus, tmp_path, monkeypatch):
    whole = everything(prepare(corpus, tmp_path / "whole").folder)
    original, written = codecs.write, []

    def dies(path, samples):
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(path)
        return original(path, samples)

    monkeypatch.setattr(codecs, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "prepare.json").exists()
    with pytest.raises(ManifestError, match=r"\(in part\) from something else:\n  seed: 7 -> 8"):
        prepare(corpus, tmp_path / "out", seed=8)
    # A line cut in the middle, and a file that lost its end.
    journal = tmp_path / "out" / "audio.jsonl"
    journal.write_text(journal.read_text()[:-30])
    Path(written[0]).write_bytes(b"fLaC")
    written.clear()
    monkeypatch.setattr(codecs, "write", lambda path, samples: written.append(path) or original(path, samples))
    prepare(corpus, tmp_path / "out")
    assert len(written) == 28 - 10 + 2
    assert everything(tmp_path / "out") == whole


def test_clips_in_the_journal_of_an_older_version_are_decoded_again(corpus, tmp_path, monkeypatch):
    # It has another digest of the samples, which cannot be compared with the MD5 of other clips.
    made, original, written = prepare(corpus, tmp_path / "out"), codecs.write, []
    whole = everything(made.folder)
    (made.folder / "prepare.json").unlink()
    journal = made.folder / "audio.jsonl"
    journal.write_text(journal.read_text().replace('"md5"', '"digest"', 3))
    monkeypatch.setattr(codecs, "write", lambda path, samples: written.append(path) or original(path, samples))
    prepare(corpus, made.folder)
    assert len(written) == 3
    assert everything(made.folder) == whole


def test_clips_are_read_from_the_table_many_at_a_time():
    table = [{"audio": {"bytes": bytes([n]) if n % 2 else None, "path": f"{n}.mp3"}} for n in range(200)]
    data, slices = dataset(table).with_format("arrow"), []

    class Counted:
        def __getitem__(self, place):
            slices.append(place)
            return data[place]

    numbers = [0, 1, 5, 63, 64, 65, 199]
    sounds = list(dataset_dict.read_audio(Counted(), {"audio": "audio"}, numbers))
    assert sounds == ["0.mp3", b"\x01", b"\x05", b"\x3f", "64.mp3", b"\x41", b"\xc7"]
    assert slices == [slice(0, 64), slice(64, 66), slice(199, 200)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_it_goes_on(corpus, tmp_path):
    code = (
        "import time; from accent_plugin.audio import codecs; from accent_plugin.data.prepare import prepare_data\n"
        "write = codecs.write\n"
        "def slow(path, samples): return (write(path, samples), time.sleep(0.2))[0]\n"
        "codecs.write = slow\n"
        f"prepare_data({str(corpus)!r}, {str(tmp_path / 'out')!r}, accents=['us', 'england'], seed=7, workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    journal = tmp_path / "out" / "audio.jsonl"
    end = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 5) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.flac")}
    assert 3 < len(done) < 28
    prepare(corpus, tmp_path / "out")
    kept = [path for path, changed in done.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) >= len(done) - 1
    assert everything(tmp_path / "out") == everything(prepare(corpus, tmp_path / "whole").folder)


def test_a_damaged_result_is_repaired(corpus, tmp_path, caplog):
    made = prepare(corpus, tmp_path / "out")
    whole = everything(made.folder)
    Path(read_manifest(made.splits["test"])[0].wav).unlink()
    with pytest.raises(ManifestError, match="holds 27 clips of 28: prepare again"):
        load_prepared(made.folder)
    made.splits["train"].write_text("ID\n")
    prepare(corpus, made.folder)
    assert "repairing" in caplog.text
    assert everything(made.folder) == whole


def test_two_at_once(corpus, tmp_path):
    code = (
        "from accent_plugin.data.prepare import prepare_data;"
        f"prepare_data({str(corpus)!r}, {str(tmp_path / 'out')!r}, accents=['us', 'england'], seed=7)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert everything(tmp_path / "out") == everything(prepare(corpus, tmp_path / "whole").folder)


# ------------------------------------------------------------------------------------------------- what is refused


def test_folders_that_are_no_datasetdict(corpus, tmp_path):
    with pytest.raises(DataError, match="there is no folder .*\n.*DatasetDict saved with save_to_disk.*\n.*make demo"):
        prepare(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(DataError, match="holds a Dataset .*not a DatasetDict\nwrap it: datasets.DatasetDict"):
        prepare(corpus / "train", tmp_path / "out")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds no DatasetDict: it has no dataset_dict.json"):
        prepare(tmp_path / "other", tmp_path / "out")
    (tmp_path / "other" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="dataset_dict.json is damaged"):
        prepare(tmp_path / "other", tmp_path / "out")
    (tmp_path / "other" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="state.json cannot be read"):
        prepare(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_datasetdict_that_lost_its_data(tmp_path):
    data = save(tmp_path / "data", **three_splits(clients=(1, 1, 1)))
    next((data / "test").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as a DatasetDict"):
        prepare(data, tmp_path / "out")


def test_a_split_without_rows_is_named(tmp_path):
    data = save(tmp_path / "data", **three_splits(clients=(1, 1, 1)))
    # This is how datasets saves a split without rows.
    next((data / "validation").glob("*.arrow")).unlink()
    state = json.loads((data / "validation" / "state.json").read_text())
    (data / "validation" / "state.json").write_text(json.dumps(state | {"_data_files": []}))
    with pytest.raises(DataError, match="its split validation has no rows\nsave the DatasetDict again without it"):
        prepare(data, tmp_path / "out")


def test_splits_that_cannot_be_told(tmp_path):
    table = rows("us", 2) + rows("england", 2)
    data = save(tmp_path / "data", one=table, two=table)
    with pytest.raises(DataError, match="has the splits one, two: which of them are train"):
        prepare(data, tmp_path / "out")
    data = save(tmp_path / "both", train=table, valid=table, dev=table)
    with pytest.raises(DataError, match="valid and dev could each be the validation split"):
        prepare(data, tmp_path / "out")


def test_no_accent_column(tmp_path):
    data = save(tmp_path / "data", without=("accent", "gender", "age"), train=rows("us", 3))
    with pytest.raises(
        ManifestError,
        match="no accent column in .*train: columns are client_id, path, sentence, audio\n"
        "pass --accent_column NAME if yours is called differently",
    ):
        prepare(data, tmp_path / "out")


def test_numbers_for_accents_and_for_audio(tmp_path):
    from datasets import Value

    table = [dict(row, accent=1) for row in rows("us", 3)]
    data = save(tmp_path / "a", {"accent": Value("int64")}, train=table)
    with pytest.raises(DataError, match="'accent' of .* holds numbers without names: cast it to ClassLabel"):
        prepare(data, tmp_path / "out")
    table = [dict(row, audio=1.0) for row in rows("us", 3)]
    data = save(tmp_path / "b", {"audio": Value("float32")}, train=table)
    with pytest.raises(DataError, match="'audio' of .* holds float, not audio"):
        prepare(data, tmp_path / "out")


def test_no_clip_of_an_accent(corpus, tmp_path):
    with pytest.raises(
        DataError,
        match=r"no clip of 'englnd' in .*; it has (us|england) 14, (us|england) 14 \(did you mean 'england'\?\)",
    ):
        prepare(corpus, tmp_path / "out", accents=["us", "englnd"])
    with pytest.raises(DataError, match="did you mean 'us'"):
        prepare(corpus, tmp_path / "out", accents=["United States English", "england"])
    data = save(tmp_path / "free", train=[dict(row, accent="Kent") for row in rows("us", 3)])
    with pytest.raises(DataError, match="it has none that is known\n(.*\n)*  'Kent' 6 -> unknown accent"):
        prepare(data, tmp_path / "out")


def test_an_empty_split(tmp_path):
    tables = three_splits()
    tables["test"] = [row for row in tables["test"] if row["accent"] == "us"]
    with pytest.raises(DataError, match="split test has no clip of england\n"):
        prepare(save(tmp_path / "a", **tables), tmp_path / "out")
    tables["test"] = [dict(row, accent="other") for row in tables["test"]]
    with pytest.raises(DataError, match="split test has no clip of england, us\nleft out were: unknown accent 4"):
        prepare(save(tmp_path / "b", **tables), tmp_path / "out")
    tables = three_splits(clients=(10, 1, 1), clips=1)
    for row in tables["validation"]:
        row["audio"]["bytes"] = encode(noise(0.2))
    with pytest.raises(DataError, match="split valid has no clip of england, us\nleft out were: too short 2"):
        prepare(save(tmp_path / "c", **tables), tmp_path / "out_c")


def test_everybody_reads_the_same_text(tmp_path):
    tables = {split: [dict(r, sentence="Please call.") for r in table] for split, table in three_splits().items()}
    data = save(tmp_path / "data", **tables)
    with pytest.raises(
        DataError, match="split train has no clip of .*\n.*sentence in test 20\n.*\n.*disjoint_sentences"
    ):
        prepare(data, tmp_path / "out")


def test_a_client_in_two_splits(tmp_path):
    tables = three_splits()
    tables["test"] += [dict(row, path="x" + row["path"], sentence="") for row in tables["train"][:4]]
    with pytest.raises(DataError, match=r"'us-0' \(in train and test\), 'us-1' \(in train and test\)"):
        prepare(save(tmp_path / "data", **tables), tmp_path / "out")


def test_too_many_unreadable_clips(tmp_path):
    tables = three_splits(clients=(8, 1, 1), clips=1)
    for row in tables["train"][:2]:
        row["audio"]["bytes"] = b"broken"
    data = save(tmp_path / "data", **tables)
    named = r"\n  row 0 of train \(us-0-0.flac\): undecodable: .*\n  row 1 of train \(us-1-0.flac\): undecodable: "
    with pytest.raises(
        DataError, match=f"2 of 20 clips cannot be read: more than max_unreadable_fraction 0.05 allows{named}"
    ):
        prepare(data, tmp_path / "out")
    assert not (tmp_path / "out" / "prepare.json").exists()
    assert prepare(data, tmp_path / "more", max_unreadable_share=0.1).dropped == {"undecodable": 2, "balance": 2}
    examples = [e["id"] for e in report(tmp_path / "more")["examples"]]
    assert sorted(examples) == ["row 0 of train (us-0-0.flac)", "row 1 of train (us-1-0.flac)"]


def test_paths_that_were_not_there_are_tried_again(tmp_path):
    from datasets import Value

    tables = three_splits(clients=(1, 1, 1), clips=1)
    sounds = {row["path"]: row["audio"]["bytes"] for table in tables.values() for row in table}
    for row in (row for table in tables.values() for row in table):
        row["audio"] = str(tmp_path / "mount" / row["path"])
    data = save(tmp_path / "data", {"audio": Value("string")}, **tables)
    with pytest.raises(DataError, match="cannot be read(.|\n)*No such file"):
        prepare(data, tmp_path / "out")
    (tmp_path / "mount").mkdir()
    for name, sound in sounds.items():
        (tmp_path / "mount" / name).write_bytes(sound)
    assert prepare(data, tmp_path / "out").dropped == {}


def test_a_full_disk_keeps_what_was_written(corpus, tmp_path, monkeypatch):
    original, written = codecs.write, []

    def full(path, samples):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return original(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(codecs, "write", full)
        with pytest.raises(
            DataError, match="out cannot be written: No space left on device\nfree disk space and run the same"
        ):
            prepare(corpus, tmp_path / "out")
    kept = {path: os.stat(path).st_mtime_ns for path in written}
    assert prepare(corpus, tmp_path / "out").dropped == {}
    assert {path: os.stat(path).st_mtime_ns for path in written} == kept


def test_folders_that_cannot_be_written(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written: .*\nchoose another prepared_folder"):
        prepare(corpus, tmp_path / "file" / "out")
    with pytest.raises(DataError, match="cannot be written: .*\nchoose another prepared_folder"):
        prepare(corpus, tmp_path / "file")
    with pytest.raises(DataError, match="is inside data_folder, which is only read"):
        prepare(corpus, corpus / "out")
    if os.geteuid():
        (tmp_path / "readonly").mkdir(mode=0o555)
        with pytest.raises(DataError, match="cannot be written: Permission denied"):
            prepare(corpus, tmp_path / "readonly")
    (tmp_path / "mine" / "audio").mkdir(parents=True)
    with pytest.raises(ManifestError, match="made by something else: choose another prepared_folder"):
        prepare(corpus, tmp_path / "mine")


def test_wrong_choices_are_all_named(corpus, tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare(corpus, tmp_path, accents="us", balance="weighted", split="sentence", n_folds=1, max_seconds=0.5)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[1] == "balance 'weighted' is unknown; choose downsample, sampler, none"


def test_reading_what_is_no_manifest(corpus, tmp_path):
    with pytest.raises(ManifestError, match="absent.csv cannot be read"):
        read_manifest(tmp_path / "absent.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text("ID,wav\n1,x\n")
    with pytest.raises(ManifestError, match=r"bad.csv lacks column\(s\) duration, accent, client_id, gender, age"):
        read_manifest(bad)
    header, row = ",".join(COLUMNS), "1,2.0,$data_root/a.flac,us,c,,"
    for text, message in {
        f"{header}\n1,x,$data_root/a.flac,us,c,,\n": "could not convert string to float",
        f"{header}\n1,2.0,a.flac,us,c,,\n": "does not begin with",
        f"{header}\n1,2.0\n": "cannot be read as a manifest",
        f"{header}\n{row}\n{row}\n": "has the ID 1 more than once",
    }.items():
        bad.write_text(text)
        with pytest.raises(ManifestError, match=message):
            read_manifest(bad)
    bad.write_text(f"{header}\n{row}\n")
    assert read_manifest(bad)[0].wav == str(tmp_path / "a.flac")
    assert read_manifest(bad, "/elsewhere")[0].wav == "/elsewhere/a.flac"


def test_loading_what_is_not_prepared(corpus, tmp_path):
    with pytest.raises(ManifestError, match="prepare.json cannot be read: No such file"):
        load_prepared(tmp_path)
    for text, message in {
        "[]": "is damaged",
        '{"format_version": 1}': "is damaged",
        '{"format_version": 9}': "9; this version reads 1",
    }.items():
        (tmp_path / "prepare.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            load_prepared(tmp_path)


# ------------------------------------------------------------------------------------------------------ real speech


def test_speech_accent_archive(tmp_path):
    data = shared_data("speech_accent_archive")
    made = prepare_data(data, tmp_path / "out", accents=["us", "england", "australia"], seed=1, progress=False)
    found = {
        split: {a: (c["speakers"], c["clips"]) for a, c in counts.items()} for split, counts in made.counts.items()
    }
    assert found == {
        "train": {"us": (50, 67), "england": (26, 67), "australia": (15, 67)},
        "valid": {"us": (4, 16), "england": (4, 17), "australia": (3, 13)},
        "test": {"us": (8, 37), "england": (8, 36), "australia": (6, 26)},
    }
    clip = read_manifest(made.splits["test"])[0]
    assert soundfile.info(clip.wav).samplerate == 16_000


def test_common_voice_mp3(tmp_path):
    folder = shared_data("common_voice_6_1_sample") / "en"
    with open(folder / "validated.tsv", newline="", encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["accent"]]
    for row in table:
        row["audio"] = {"bytes": (folder / "clips" / row["path"]).read_bytes(), "path": row["path"]}
    data = save(tmp_path / "data", train=table)
    choices = {"accents": ["us", "england", "australia"], "test_fraction": 0.2, "balance": "none"}
    made = prepare(data, tmp_path / "out", **choices)
    clips = [clip for part in clips_of(made).values() for clip in part]
    assert Counter(clip.accent for clip in clips) == {"us": 35, "england": 4, "australia": 3}
    assert made.dropped == {"other accent": 8}
