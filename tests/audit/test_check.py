import json
import random
import re
import shutil

import numpy as np
import pytest
from helpers.dataset_dicts import encode, noise, rows, save, shared_data, three_splits

from accent_plugin.audio.samples import quantise
from accent_plugin.audit import audio_checks
from accent_plugin.audit.check import check_dataset
from accent_plugin.audit.findings import AuditClip
from accent_plugin.audit.report import audit_to_text, write_audit
from accent_plugin.errors import ConfigError, DataError, ManifestError

KEYS = ("train", "validation", "test")


def checked(folder, **choices):
    return check_dataset(folder, **({"progress": False, "workers": 1, "permutations": 100} | choices))


def of_text(folder, **choices):
    return checked(folder, with_audio=False, **choices)


def found(result):
    return [(finding.kind, finding.severity, finding.count) for finding in result.findings]


def places(finding):
    return [[(clip.split, clip.row, clip.path) for clip in example.clips] for example in finding.examples]


def sound(samples=None, **encoding):
    return {"bytes": encode(noise(1.0) if samples is None else samples, **encoding), "path": "planted"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A clean dataset of two accents with enough speakers for the confound test, and its audit."""
    tables = three_splits(clients=(4, 2, 2))
    folder = save(tmp_path_factory.mktemp("clean") / "data", **tables)
    return tables, folder, checked(folder)


def changed(tmp_path, tables, *edits, without=(), **more):
    """The same rows with some cells replaced: (split, row, cells)."""
    tables = {split: [dict(row) for row in table] for split, table in tables.items()}
    for split, row, cells in edits:
        tables[split][row] |= cells
    return save(tmp_path / "data", without=without, **tables, **more)


# ----------------------------------------------------------------------------------------------- nothing is wrong


def test_a_clean_dataset_has_no_findings(clean):
    _, _, result = clean
    assert result.findings == result.wrong() == ()
    assert result.confound.possible
    assert not result.confound.found
    assert (result.confound.clips, result.confound.clients) == (32, 16)
    assert len(result.measured) == 32
    assert result.name == "data"
    assert result.counts == {
        split: {accent: {"clips": n, "clients": n // 2, "seconds": 1.2 * n} for accent in ("us", "england")}
        for split, n in zip(KEYS, (8, 4, 4), strict=True)
    }
    assert result.notes == (
        "the confound test used 32 of 32 labelled clips, from 16 speakers: at most 10 per speaker and 4,000 in all",
    )


def test_findings_do_not_depend_on_row_order_or_workers(clean, tmp_path):
    tables, _, first = clean
    shuffled = {split: random.Random(1).sample(table, len(table)) for split, table in tables.items()}
    second = checked(save(tmp_path / "data", **shuffled), workers=2)
    assert second.as_json() == first.as_json()
    assert second.measured == first.measured


# ------------------------------------------------------------------------------------------------ what is in the text


def test_a_speaker_in_two_splits_is_an_error(clean, tmp_path):
    result = of_text(changed(tmp_path, clean[0], ("test", 2, {"client_id": "us-0"})))
    assert found(result) == [("client", "error", 1)]
    (finding,) = result.findings
    assert places(finding) == [[("train", 0, "us-0-0.flac"), ("test", 2, "us-7-0.flac")]]
    assert finding.message == "1 speaker in more than one split (train and test 1): the test is not on unseen speakers"
    assert finding.examples[0].text == "'us-0': train:0 us-0-0.flac and test:2 us-7-0.flac"


def test_a_speaker_in_three_splits_is_one_finding(clean, tmp_path):
    edits = [(split, 0, {"client_id": "somebody"}) for split in KEYS]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert [[clip[:2] for clip in example] for example in places(result.findings[0])] == [[(s, 0) for s in KEYS]]


def test_a_sentence_in_two_splits_is_found_in_any_spelling(clean, tmp_path):
    edits = [("train", 5, {"sentence": "Don't stop!"}), ("validation", 1, {"sentence": " dont  STOP"})]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert found(result) == [("sentence", "error", 1)]
    assert [clip[:2] for clip in places(result.findings[0])[0]] == [("train", 5), ("validation", 1)]
    assert result.findings[0].examples[0].text.startswith("'Don't stop!': train:5")


def test_empty_sentences_and_punctuation_are_ignored(clean, tmp_path):
    edits = [(split, row, {"sentence": text}) for split in KEYS for row, text in enumerate(("", "...", "?"))]
    assert found(of_text(changed(tmp_path, clean[0], *edits))) == []


def test_a_speaker_with_two_accents_is_an_error(clean, tmp_path):
    result = of_text(changed(tmp_path, clean[0], ("train", 1, {"accent": "Scots English"})))
    assert ("contradiction", "error", 1) in found(result)
    (finding,) = (f for f in result.findings if f.kind == "contradiction")
    assert places(finding) == [[("train", 0, "us-0-0.flac"), ("train", 1, "us-0-1.flac")]]
    assert finding.examples[0].text == "'us-0': us (train:0 us-0-0.flac), scotland (train:1 us-0-1.flac)"


def test_spellings_of_one_accent_do_not_contradict(clean, tmp_path):
    edits = [("train", 1, {"accent": "United States English"}), ("train", 2, {"accent": "yankee"})]
    assert found(of_text(changed(tmp_path, clean[0], *edits), mapping={"Yankee": "us"})) == []


def test_unknown_accents_keep_their_spelling(clean, tmp_path):
    edits = [(split, row, {"accent": " Klingon"}) for split in KEYS for row in range(4 if split == "train" else 2)]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert found(result) == []
    assert result.counts["train"]["klingon"] == {"clips": 4, "clients": 2, "seconds": None}


def test_rows_without_an_accent_and_with_several_are_reported(clean, tmp_path):
    edits = [("train", 0, {"accent": ""}), ("train", 3, {"accent": "US English|Scottish English"})]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert found(result) == [("unlabelled", "warning", 2)]
    assert result.findings[0].message == "2 of 32 rows without an accent"
    assert [clip[0][1] for clip in places(result.findings[0])] == [0, 3]
    assert result.notes[0] == (
        "1 row with more than one accent in the cell, such as 'US English|Scottish English': counted as unlabelled"
    )
    assert result.counts["train"]["us"]["clips"] == 6


def test_no_accent_at_all_is_an_error(tmp_path):
    result = of_text(save(tmp_path / "data", train=rows("", 2)))
    assert found(result) == [("unlabelled", "error", 4)]


def test_an_accent_missing_from_a_split_is_an_error(clean, tmp_path):
    edits = [("train", row, {"accent": "wales"}) for row in range(4)]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert found(result) == [("missing", "error", 2)]
    assert [example.text for example in result.findings[0].examples] == [
        "wales has no clip in validation",
        "wales has no clip in test",
    ]


@pytest.mark.parametrize(("split", "clients", "expected"), [
    ("train", 3, []),
    ("train", 4, [("balance", "warning", 1)]),
    ("whatever", 4, [("balance", "warning", 1)]),
])  # fmt: skip
def test_more_than_three_times_as_many_clips_is_a_warning(tmp_path, split, clients, expected):
    result = of_text(save(tmp_path / "data", **{split: rows("us", clients) + rows("wales", 1)}))
    assert found(result) == expected
    if expected:
        assert result.findings[0].message == f"us has 4.0 times as many clips in {split} as wales: 8 and 2"


def test_missing_client_ids_are_a_warning(clean, tmp_path):
    result = of_text(changed(tmp_path, clean[0], without=("client_id",)))
    assert found(result) == [("client", "warning", 1)]
    assert "no speaker column: cannot check whether splits share speakers" in result.findings[0].message
    assert result.counts["test"]["us"]["clients"] is None


def test_some_client_ids_missing_is_noted(clean, tmp_path):
    edits = [(split, 0, {"client_id": ""}) for split in KEYS]
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert found(result) == []
    assert result.notes[0] == "3 of 32 rows without a client id"


@pytest.mark.parametrize(("role", "kind", "columns"), [
    ("client_id", "client", ("speaker", "Speaker ID", "spk_id")),
    ("sentence", "sentence", ("text", "transcription", "transcript")),
])  # fmt: skip
def test_leaks_are_found_under_every_usual_column_name(tmp_path, role, kind, columns):
    for column in columns:
        first = [row | {column: row[role]} for row in rows("us", 1)]
        tables = {"train": first, "test": [row | {"sentence": "Else.", "client_id": "other"} for row in first]}
        folder = save(tmp_path / column, without=(role,), **tables)
        assert kind in [each.kind for each in of_text(folder).findings if each.severity == "error"]


def test_clips_that_do_not_fit_their_sentence_are_a_warning(tmp_path):
    table = [row | {"sentence": "some words " * k} for k in range(1, 41) for row in rows("us", 1, 1)]
    for k, row in enumerate(table, 1):
        row["audio"] = {
            "bytes": encode(noise((0.5 + 0.3 * k) * (2.2 if k == 7 else 0.4 if k == 30 else 1), seed=k)),
            "path": "",
        }
    options = {"progress": False, "workers": 1, "permutations": 100}
    (finding,) = [
        f for f in check_dataset(save(tmp_path / "data", train=table), **options).findings if f.kind == "rate"
    ]
    assert (finding.severity, finding.count) == ("warning", 2)
    assert "(1 too long, 1 too short)" in finding.message
    assert {example.clips[0].row for example in finding.examples} == {6, 29}


def test_audio_in_a_folder_that_is_gone_is_said_to_be_so(tmp_path):
    sounds = tmp_path / "sounds" / "clips"
    sounds.mkdir(parents=True)
    from datasets import Value

    table = rows("us", 2)
    for row in table:
        (sounds / row["path"]).write_bytes(row["audio"]["bytes"])
        row["audio"] = str(sounds / row["path"])
    folder = save(tmp_path / "data", types={"audio": Value("string")}, train=table)
    (tmp_path / "sounds").rename(tmp_path / "moved")
    options = {"progress": False, "workers": 1, "permutations": 100}
    (finding,) = [each for each in check_dataset(folder, **options).findings if each.kind == "undecodable"]
    assert f"the folder {tmp_path / 'sounds'} is gone" in finding.message
    assert f"ln -s NEW_FOLDER {tmp_path / 'sounds'}" in finding.message
    (tmp_path / "sounds").symlink_to(tmp_path / "moved")
    assert "undecodable" not in [each.kind for each in check_dataset(folder, **options).findings]


def test_checks_that_did_not_run_are_notes(tmp_path):
    first = [row | {"reader_name": row["client_id"], "words": row["sentence"]} for row in rows("us", 1)]
    result = of_text(save(tmp_path / "data", without=("client_id", "sentence"), train=first))
    assert result.notes[:4] == (
        "no speaker column: speakers in several splits and speakers with several accents were not looked for",
        "columns that may hold the speaker: reader_name; name one with client_column",
        "no sentence column: sentences in several splits were not looked for",
        "the only split is train: nothing can be in several splits",
    )
    parts = {"train": first, "test": [row | {"text": "Else."} for row in first]}
    parts["train"] = [row | {"text": None} for row in first]
    assert not any("sentence" in note for note in of_text(save(tmp_path / "other", **parts)).notes)


def test_splits_and_columns_can_have_any_name(tmp_path):
    first = [row | {"who": row["client_id"], "said": row["sentence"]} for row in rows("us", 1)]
    second = [row | {"said": "Else.", "client_id": "other"} for row in first]
    folder = save(tmp_path / "data", one=first, odd=second)
    assert found(of_text(folder)) == [("sentence", "error", 2)]
    assert found(of_text(folder, client_column="who", sentence_column="said")) == [("client", "error", 1)]
    with pytest.raises(ManifestError, match="client_column is 'whom'"):
        of_text(folder, client_column="whom")


def test_a_folder_without_a_datasetdict_is_an_error(tmp_path, clean):
    with pytest.raises(DataError, match="there is no folder"):
        of_text(tmp_path / "absent")
    with pytest.raises(DataError, match="holds a Dataset"):
        of_text(clean[1] / "train")


# ----------------------------------------------------------------------------------------------- what is in the audio


@pytest.fixture(scope="module")
def broken(clean, tmp_path_factory):
    """One clip of every kind of broken file, duplicate recordings, and one speaker too few for the confound test."""
    tables = {split: [dict(row) for row in table] for split, table in clean[0].items()}
    train, test = tables["train"], tables["test"]
    steps = quantise(noise(1.0, seed=77))
    nan = noise(1.0)
    nan[3] = np.nan
    for row, cell in enumerate(
        (
            {"bytes": b"nothing to hear" * 50, "path": "junk"},
            {"bytes": encode(noise(1.0))[:3000], "path": "cut short"},
            {"bytes": b"", "path": "no bytes"},
            sound(nan, format="WAV", subtype="FLOAT"),
            sound(np.zeros(16_000, np.float32)),
        )
    ):
        train[row]["audio"] = cell
    # The same bytes in two splits; the same samples as FLAC and WAV in one split, by one speaker.
    test[1]["audio"] = clean[0]["train"][6]["audio"]
    train[12] |= {"audio": sound(steps)}
    train[13] |= {"audio": sound(steps, format="WAV", subtype="PCM_16")}
    # Two silent clips are not duplicates.
    tables["validation"][0]["audio"] = sound(np.zeros(16_000, np.float32))
    folder = save(tmp_path_factory.mktemp("broken") / "data", **tables)
    return folder, checked(folder)


def finding_of(result, kind, severity):
    return next(f for f in result.findings if (f.kind, f.severity) == (kind, severity))


def test_broken_files_are_listed_by_reason(broken):
    finding = finding_of(broken[1], "undecodable", "error")
    assert finding.message == "6 unusable files: undecodable 2, empty 1, non-finite 1, silent 2"
    assert finding.count == 6
    named = [example.text.split(":")[0] for example in finding.examples]
    assert named == ["undecodable", "undecodable", "empty", "non-finite", "silent", "silent"]
    where = [(clip.split, clip.row) for example in finding.examples for clip in example.clips]
    assert where == [*(("train", row) for row in range(5)), ("validation", 0)]
    assert finding.examples[2].text == "empty: train:2 us-1-0.flac: clip holds no bytes"


def test_the_same_bytes_in_two_splits_are_an_error(broken):
    finding = finding_of(broken[1], "audio", "error")
    assert finding.count == 1
    assert places(finding) == [[("train", 6, "us-3-0.flac"), ("test", 1, "us-6-1.flac")]]
    assert "(train and test 1)" in finding.message
    assert finding.examples[0].text == ("train:6 us-3-0.flac (us-3, us) and test:1 us-6-1.flac (us-6, us): same bytes")


def test_the_same_samples_in_another_file_are_found(broken):
    finding = finding_of(broken[1], "audio", "warning")
    assert [[clip[:2] for clip in pair] for pair in places(finding)] == [[("train", 12), ("train", 13)]]
    assert finding.examples[0].text.endswith("same samples in another file")


def test_unusable_files_have_no_hours(broken):
    assert broken[1].counts["train"]["us"] == {"clips": 8, "clients": 4, "seconds": 3.6}
    assert broken[1].confound.clips == 26


def test_copies_with_another_accent_or_speaker_are_errors(tmp_path):
    table = rows("us", 2, 1) + rows("england", 1, 1)
    for row in table:
        row["audio"] = table[0]["audio"]
    result = checked(save(tmp_path / "data", train=table))
    finding = finding_of(result, "audio", "error")
    assert finding.examples[0].text.endswith("(us-1, us), and 1 more: same bytes")


def test_paths_are_relative_to_the_data(tmp_path):
    from datasets import Value

    table = rows("us", 3, 1)
    for number, row in enumerate(table):
        row["audio"] = f"clips/{number}.wav"
    folder = save(tmp_path / "data", types={"audio": Value("string")}, train=table)
    (folder / "clips").mkdir()
    for number in range(2):
        (folder / "clips" / f"{number}.wav").write_bytes(encode(noise(1.0), format="WAV"))
    result = checked(folder)
    assert finding_of(result, "undecodable", "error").examples[0].clips[0] == AuditClip("train", 2, "us-2-0.flac")
    assert finding_of(result, "audio", "error").examples[0].text.endswith("same bytes")


def test_damaged_clips_are_found_and_stay_usable(tmp_path):
    table = rows("us", 4, 1)
    table[2]["audio"] = {"bytes": encode(noise(4.0, seed=9), format="WAV")[: 44 + 3 * 32_000], "path": "cut.wav"}
    result = checked(save(tmp_path / "data", train=table))
    finding = finding_of(result, "damaged", "warning")
    assert (finding.message, finding.count) == ("1 damaged file: 1.0 s could not be decoded", 1)
    assert finding.examples[0].text == (
        "train:2 us-2-0.flac: 1.0 s at 3.0 s could not be decoded: the audio ends before its announced end"
    )
    assert result.counts["train"]["us"]["clips"] == 4
    assert "undecodable" not in [each.kind for each in result.findings]


def test_a_clip_that_is_too_long_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_checks, "MAX_SECONDS", 1.1)
    result = checked(save(tmp_path / "data", train=rows("us", 1, 1)))
    assert finding_of(result, "undecodable", "error").message.endswith("too long 1")


# ------------------------------------------------------------------------------------------------------- the channel


def test_an_accent_with_its_own_recording_conditions_is_found(clean, tmp_path):
    edits = []
    for split, table in clean[0].items():
        for row, cells in enumerate(table):
            if cells["accent"] == "england":
                quiet = 0.1 * noise(1.2, rate=8_000, seed=500 + 50 * KEYS.index(split) + row)
                edits.append((split, row, {"audio": sound(quiet, rate=8_000, format="WAV")}))
    result = checked(changed(tmp_path, clean[0], *edits))
    assert found(result) == [("channel", "error", 1)]
    (finding,) = result.wrong()
    assert "average recall 1.00 without any speech features" in finding.message
    assert "p = 0.010" in finding.message
    told = [re.sub(" alone.*", "", example.text) for example in finding.examples]
    assert told == ["sample rate", "codec", "band edge"]
    assert result.wrong(ignore=["channel"]) == ()


def test_too_few_speakers_for_the_confound_test_are_a_warning(tmp_path):
    result = checked(save(tmp_path / "data", **three_splits(clients=(2, 1, 1))))
    assert found(result) == [("channel", "warning", 1)]
    assert result.findings[0].message.endswith(
        "predict the accent: 2 accents need 5 speakers or more, but the speakers are: none"
    )
    assert result.wrong() == ()


def test_too_few_permutations_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="permutations is 20"):
        checked(tmp_path / "absent", permutations=20)


# ------------------------------------------------------------------------------------------------------- what is said


def test_ignored_kinds_are_not_errors(broken):
    assert {finding.kind for finding in broken[1].wrong()} == {"audio", "undecodable"}
    assert [finding.kind for finding in broken[1].wrong(ignore=["audio"])] == ["undecodable"]
    with pytest.raises(
        ConfigError, match="ignore has unknown kinds sound: choose from client, sentence, contradiction, audio"
    ):
        broken[1].wrong(ignore=["sound"])


def test_errors_come_first(clean, tmp_path):
    edits = [("train", 0, {"accent": "", "client_id": "us-7"}), ("test", 0, {"sentence": "One."}),
             ("train", 1, {"sentence": "one"})]  # fmt: skip
    result = of_text(changed(tmp_path, clean[0], *edits))
    assert [f"{f.severity} {f.kind}" for f in result.findings] == [
        "error client",
        "error sentence",
        "warning unlabelled",
    ]


def test_text_of_a_clean_dataset(clean):
    head, *rest = audit_to_text(clean[2]).split("\n\n")
    assert head == "data: 0 errors, 0 warnings"
    assert rest[0].splitlines() == [
        "           train                  validation             test",
        "accent     clips clients hours    clips clients hours    clips clients hours",
        "england        8       4  0.00        4       2  0.00        4       2  0.00",
        "us             8       4  0.00        4       2  0.00        4       2  0.00",
        "all           16       8  0.01        8       4  0.00        8       4  0.00",
    ]
    assert rest[1].startswith("channel: average recall of 2 accents from the recording alone 0.")


def test_text_without_audio(clean):
    said = audit_to_text(of_text(clean[1]))
    assert "hours" not in said.split("note:")[0]
    assert said.endswith(
        "note: the audio was not read: duplicate recordings, broken files, hours and confounds were not checked\n"
    )


def test_a_report_is_written_and_read(broken, tmp_path):
    result = broken[1]
    write_audit(tmp_path / "report", result)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"check.md", "check.json", "composition.png", "nuisance.png", "channel.png"}
    assert json.loads((tmp_path / "report" / "check.json").read_text()) == result.as_json()
    assert result.as_json()["errors"] == 2
    assert result.as_json()["medians"]["us"]["codec"] == "FLAC PCM_16"
    said = (tmp_path / "report" / "check.md").read_text()
    assert all(f"]({name})" in said for name in names if name.endswith(".png"))
    assert "| us | 8 | 4 | 0.00 |" in said


def test_an_unwritable_report_folder_is_an_error(clean, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        write_audit(tmp_path / "file", clean[2])


# ---------------------------------------------------------------------------------------------------------- real data


def test_a_planted_leak_is_found_in_real_speech(tmp_path):
    from datasets import Audio, DatasetDict, concatenate_datasets, load_from_disk

    folder = shared_data("speech_accent_archive")
    result = checked(folder)
    assert not {finding.kind for finding in result.findings} & {"client", "sentence", "contradiction", "audio"}
    assert (result.confound.clips, result.confound.clients) == (550, 124)

    loaded = DatasetDict({k: v.cast_column("audio", Audio(decode=False)) for k, v in load_from_disk(folder).items()})
    loaded["train"], loaded["test"] = loaded["train"].select(range(20)), loaded["test"].select(range(5))
    del loaded["validation"]
    copy = loaded["train"].select([7])
    path = copy[0]["path"]
    loaded["test"] = concatenate_datasets([loaded["test"], copy])
    loaded.save_to_disk(tmp_path / "data")
    result = checked(tmp_path / "data")
    finding = finding_of(result, "audio", "error")
    assert places(finding) == [[("train", 7, path), ("test", 5, path)]]
    assert finding_of(result, "client", "error").count == 1
    shutil.rmtree(tmp_path / "data")


def test_a_dataset_without_rows_is_an_error(tmp_path):
    from datasets import DatasetDict

    data = save(tmp_path / "data", train=rows("us", 1))
    empty = DatasetDict.load_from_disk(str(data)).filter(lambda _: False, input_columns=["accent"])
    empty.save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="has no rows in any of its splits train"):
        check_dataset(tmp_path / "empty")
