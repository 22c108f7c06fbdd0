import csv
import os
import shutil

import pytest
from helpers.dataset_dicts import shared_data
from helpers.releases import cells_of, columns, flat, kept, line, people, pool, release, row, sound, tree

from accent_plugin.corpus import common_voice, tables
from accent_plugin.corpus.build import build_corpus, survey_accents
from accent_plugin.data import labels
from accent_plugin.errors import DataError

THIRDS = {"valid_fraction": 0.3, "test_fraction": 0.3, "progress": False, "workers": 1}


def build(source, out, **choices):
    return build_corpus(source, out, **(THIRDS | choices))


def spellings(source, **choices):
    """Raw accent -> clips, clients, label, reason."""
    found = survey_accents(source, **choices)
    return {spelling.raw: (spelling.clips, spelling.clients, spelling.label, spelling.reason) for spelling in found}


def read(made):
    """What a release says of its clips, without the places where it says it."""
    names = "client path sentence accent variant age up_votes down_votes seconds".split()
    return [{name: cell[name] for name in names} for cell in made.cells()]


def cells(folder, **choices):
    return read(common_voice.Release(folder, **choices))


# ------------------------------------------------------------------------------------------------------ dialects


def test_the_generated_header_is_that_of_a_real_release():
    real = shared_data("common_voice_6_1_sample") / "en" / "validated.tsv"
    assert real.read_text(encoding="utf-8").splitlines()[0].split("\t") == columns(6)


@pytest.mark.parametrize(
    ("version", "accent", "seconds"),
    [
        (2, "us", None),
        (3, "us", None),
        (5, "us", None),
        (8, "United States English", None),
        (12, "", None),
        (17, "United States English", 1.25),
        (22, "United States English", 1.25),
        (27, "United States English", 1.25),
    ],
)
def test_cells_of_each_dialect(tmp_path, version, accent, seconds):
    made = row("ann", "us", up_votes=3, down_votes=1, seconds=1.25)
    found = common_voice.Release(release(tmp_path, version, [made]))
    assert (found.dialect, found.has_clients, found.files) == ("tsv", True, ("validated.tsv",))
    assert read(found) == [
        {
            "client": "ann",
            "path": "common_voice_en_ann_0.mp3",
            "sentence": "Sentence ann 0.",
            "accent": accent,
            "variant": "",
            "age": "twenties",
            "up_votes": 3,
            "down_votes": 1,
            "seconds": seconds,
        }
    ]
    assert found.damaged == {}


def test_cells_of_version_1(tmp_path):
    tables = {split: [row("", "us", sentence=f"In {split}.")] for split in ("train", "dev", "test")}
    folder = release(tmp_path, 1, **tables, invalid=[row("", "us")])
    found = common_voice.Release(folder)
    assert (found.dialect, found.has_clients) == ("v1", False)
    # cv-invalid.csv and cv-other.csv are not among them.
    assert sorted(found.files) == ["cv-valid-dev.csv", "cv-valid-test.csv", "cv-valid-train.csv"]
    made = {cell["sentence"]: cell for cell in read(found)}
    assert made.keys() == {"in train", "in dev", "in test"}
    assert made["in dev"] == {
        "client": "",
        "path": "cv-valid-dev/sample-000000.mp3",
        "sentence": "in dev",
        "accent": "us",
        "variant": "",
        "age": "twenties",
        "up_votes": 2,
        "down_votes": 0,
        "seconds": None,
    }


def test_version_1_knows_a_duration_where_it_is_written(tmp_path):
    folder = release(tmp_path, 1, [row("", "us")])
    table = (folder / "cv-valid-train.csv").read_text().splitlines()
    (folder / "cv-valid-train.csv").write_text("\n".join([table[0], table[1] + "2.5"]) + "\n")
    assert [cell["seconds"] for cell in cells(folder)] == [2.5]


@pytest.mark.parametrize("version", [5, 8, 17, 22, 27])
def test_each_dialect_becomes_a_dataset(tmp_path, version):
    rows = pool(gender="female") + people("scotland", 2) + [row("x", "Kentish"), row("y"), row("z", "us,england")]
    made = build(release(tmp_path, version, rows), tmp_path / "out")
    assert kept(made) == {"us": 40, "england": 40, "australia": 40}
    assert dict(made.dropped) == {
        "other accent": 2,
        labels.UNKNOWN_ACCENT: 1,
        labels.NO_ACCENT: 1,
        labels.COMPOUND_ACCENT: 1,
    }
    assert {found["gender"] for found in flat(made.folder)} == {"female"}


@pytest.mark.parametrize("version", [2, 3])
def test_the_ending_that_the_release_leaves_out(tmp_path, version):
    folder = release(tmp_path, version, pool())
    assert ".mp3" not in (folder / "validated.tsv").read_text()
    made = build(folder, tmp_path / "out")
    assert made.dropped == {}
    assert {found["path"][-4:] for found in flat(made.folder)} == {".mp3"}


def test_files_are_those_that_are_asked_for(tmp_path):
    folder = release(tmp_path, 6, people("us", 3), train=people("us", 1), other=people("england", 2))
    asked = ("train.tsv", "other.tsv")
    assert common_voice.Release(folder, files=asked).files == asked
    assert [cell["client"] for cell in cells(folder, files=("train.tsv",))] == ["us-0"]
    assert spellings(folder, files=asked) == {"england": (2, 2, "england", None), "us": (1, 1, "us", None)}
    with pytest.raises(DataError, match=r"nope\.tsv(.|\n)*validated\.tsv"):
        common_voice.Release(folder, files=("nope.tsv",))


def test_a_column_more_does_no_harm(tmp_path):
    folder = release(tmp_path, 6, [row("ann", "us")])
    lines = (folder / "validated.tsv").read_text().splitlines()
    (folder / "validated.tsv").write_text(f"new\t{lines[0]}\nsomething\t{lines[1]}\n")
    assert [(cell["client"], cell["accent"]) for cell in cells(folder)] == [("ann", "us")]


# -------------------------------------------------------------------------------------------------------- accents


def test_survey_counts_spellings(tmp_path):
    free = [row("f", "a bit of everything"), row("g", ""), row("h", "us,Kentish")]
    folder = release(tmp_path, 8, people("us", 3, 2) + people("indian", 2) + free)
    found = survey_accents(folder)
    assert (found[0].raw, found[0].clips, found[0].clients) == ("United States English", 6, 3)
    assert [spelling.clips for spelling in found] == sorted((spelling.clips for spelling in found), reverse=True)
    assert spellings(folder) == {
        "United States English": (6, 3, "us", None),
        # The commas of a preset's own name do not make it compound.
        "India and South Asia (India, Pakistan, Sri Lanka)": (2, 2, "indian", None),
        "a bit of everything": (1, 1, None, labels.UNKNOWN_ACCENT),
        "": (1, 1, None, labels.NO_ACCENT),
        "us,Kentish": (1, 1, None, labels.COMPOUND_ACCENT),
    }


@pytest.mark.parametrize(
    "raw",
    [
        "India and South Asia (India, Pakistan, Sri Lanka),England English",
        "England English,India and South Asia (India, Pakistan, Sri Lanka)",
        "England English|India and South Asia (India, Pakistan, Sri Lanka)",
        "England English|somewhere in Kent",
    ],
)
def test_compound_values(tmp_path, raw):
    assert spellings(release(tmp_path, 27, [row("a", raw)])) == {raw: (1, 1, None, labels.COMPOUND_ACCENT)}


def test_a_mapping_explains_free_text(tmp_path):
    folder = release(tmp_path, 8, [row("a", "Estuary  english"), row("b", "Kentish")])
    found = spellings(folder, mapping={"Estuary English": "england"})
    assert found["Estuary  english"] == (1, 1, "england", None)
    assert found["Kentish"] == (1, 1, None, labels.UNKNOWN_ACCENT)


def test_the_column_variant(tmp_path):
    more = [
        row("v1", "", variant="Australian English"),
        row("v2", "us", variant="United States English"),
        row("v3", "us", variant="England English"),
        # Not understood, so that it contradicts nothing.
        row("v4", "us", variant="something else"),
        row("v5", ""),
    ]
    folder = release(tmp_path, 13, pool() + more)
    assert [cell["variant"] for cell in cells(folder)][-5:] == [made["variant"] for made in more]
    made = build(folder, tmp_path / "out")
    assert kept(made) == {"us": 42, "england": 40, "australia": 41}
    assert dict(made.dropped) == {labels.COMPOUND_ACCENT: 1, labels.NO_ACCENT: 1}


@pytest.mark.parametrize("version", [6, 25, 27])
def test_genders(tmp_path, version):
    # Versions from 25 on write male_masculine and female_feminine.
    given = {"a": "male", "b": "female", "c": "other", "d": ""}
    rows = pool(accents=("us",)) + [row(client, "us", gender=gender) for client, gender in given.items()]
    made = build(release(tmp_path, version, rows), tmp_path / "out", accents=("us",))
    assert {c["client_id"]: c["gender"] for c in flat(made.folder) if c["client_id"] in given} == given


def test_version_12_has_no_english_accents(tmp_path):
    with pytest.raises(DataError, match=r"\b12\b"):
        build(release(tmp_path, 12, pool(3)), tmp_path / "out")
    assert not (tmp_path / "out" / "accent_plugin.json").exists()


def test_an_accent_that_no_row_has(tmp_path):
    # 12 spellings, of 12, 11, ... 1 clips: the last two are too rare to be listed.
    free = [row(f"{letter}{n}", f"free {letter}") for k, letter in enumerate("abcdefghijk") for n in range(11 - k)]
    folder = release(tmp_path, 8, people("us", 12) + free)
    with pytest.raises(DataError, match="'United States English' 12 -> us") as caught:
        build(folder, tmp_path / "out", accents=("us", "wales"))
    assert "wales" in str(caught.value)
    assert "'free a' 11" in str(caught.value)
    assert "'free i' 3" in str(caught.value)
    assert "free j" not in str(caught.value)
    assert not (tmp_path / "out" / "accent_plugin.json").exists()


# ---------------------------------------------------------------------------------------------------- odd bytes


def test_quotes_swallow_nothing(tmp_path):
    sentences = ['"Never closed', 'He said "no".', '"He said ""no""."', '"', '5" of rain', '"Yes" and "no"']
    rows = [row(f"c{k}", "us", sentence=text) for k, text in enumerate(sentences)]
    found = common_voice.Release(release(tmp_path, 6, rows))
    # Only the third is a cell that a writer of CSV has quoted.
    assert [cell["sentence"] for cell in found.cells()] == [
        '"Never closed',
        'He said "no".',
        'He said "no".',
        '"',
        '5" of rain',
        '"Yes" and "no"',
    ]
    assert found.damaged == {}


@pytest.mark.parametrize("choices", [{"eol": "\r\n"}, {"bom": True}, {"eol": "\r\n", "bom": True}])
def test_windows_files(tmp_path, choices):
    plain = release(tmp_path / "plain", 6, pool(2))
    found = common_voice.Release(release(tmp_path / "odd", 6, pool(2), **choices))
    assert read(found) == cells(plain)
    assert found.damaged == {}


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    text = f"one{separator}two"
    found = common_voice.Release(release(tmp_path, 6, [row("a", "us", sentence=text), row("b", "us")]))
    assert [cell["sentence"] for cell in found.cells()] == [text, "Sentence b 0."]
    assert found.damaged == {}


def test_utf_16_is_refused(tmp_path):
    folder = release(tmp_path, 6, pool(2))
    text = (folder / "validated.tsv").read_text()
    (folder / "validated.tsv").write_text(text, encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        cells(folder)


def short(name):
    return b"\t".join(line(row(name, "us"), 6).split(b"\t")[:-2]) + b"\n"


def long(name):
    return line(row(name, "us"), 6).replace(b"\n", b"\tmore\n")


def latin_1(name):
    return line(row(name, "us", sentence="caf\u00e9"), 6).decode().encode("latin-1")


def at(path):
    return lambda name: line(row(name, "us", path=path), 6)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (short, "wrong number of cells"),
        (long, "wrong number of cells"),
        (latin_1, "invalid UTF-8"),
        (at("/etc/passwd"), "path outside clips"),
        (at("../validated.tsv"), "path outside clips"),
        (at(".."), "path outside clips"),
        (at("more/a.mp3"), "path outside clips"),
        (at("more\\a.mp3"), "path outside clips"),
        (at(""), "no path"),
    ],
)
def test_damaged_rows_are_counted(tmp_path, damaged, reason):
    good = pool()
    # In the middle, so that what follows is shown to be read.
    folder = release(tmp_path, 6, [*good[:60], damaged("a"), damaged("b"), *good[60:]])
    found = common_voice.Release(folder)
    assert [cell["client"] for cell in found.cells()] == [made["client"] for made in good]
    assert dict(found.damaged) == {reason: 2}
    made = build(folder, tmp_path / "out")
    assert dict(made.dropped) == {reason: 2}
    assert kept(made) == {"us": 40, "england": 40, "australia": 40}


def test_names_of_damage():
    assert tables.WRONG_CELLS == "wrong number of cells"
    assert tables.NOT_UTF8 == "invalid UTF-8"
    assert tables.NO_PATH == "no path"
    assert tables.SHIFTED == "shifted columns (votes, duration or age not a number)"
    assert common_voice.OUTSIDE == "path outside clips"


def test_too_much_damage(tmp_path):
    # 6 of 126 rows are 4.8 %, 7 of 127 are 5.5 %.
    six = [short(str(k)) for k in range(6)]
    made = build(release(tmp_path / "a", 6, pool() + six), tmp_path / "out_a")
    assert dict(made.dropped) == {"wrong number of cells": 6}
    with pytest.raises(DataError, match="127 rows(.|\n)*wrong number of cells 7"):
        build(release(tmp_path / "b", 6, [*pool(), *six, short("x")]), tmp_path / "out_b")


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (short("a")[:-1], "wrong number of cells"),
        (b"somebody", "wrong number of cells"),
        # Cut between the two bytes of a letter.
        (b"somebody\tcommon_voice_en_1.mp3\tCaf\xc3", "invalid UTF-8"),
    ],
)
def test_a_file_cut_in_its_last_line(tmp_path, rest, reason):
    made = build(release(tmp_path, 6, [*pool(), rest]), tmp_path / "out")
    assert dict(made.dropped) == {reason: 1}
    assert [text for text in made.warnings if "validated.tsv ends in the middle of a line" in text]


def test_a_whole_last_line_without_newline(tmp_path):
    folder = release(tmp_path, 6, pool())
    path = folder / "validated.tsv"
    path.write_bytes(path.read_bytes()[:-1])
    made = build(folder, tmp_path / "out")
    assert dict(made.dropped) == {}
    assert kept(made)["australia"] == 40


@pytest.mark.parametrize("missing", ["client_id", "path", "accent"])
def test_a_missing_column(tmp_path, missing):
    folder = release(tmp_path, 5)
    names = [name for name in columns(5) if name != missing]
    place = columns(5).index(missing)
    made = cells_of(row("a", "us"), 5)
    del made[place]
    (folder / "validated.tsv").write_text("\t".join(names) + "\n" + "\t".join(made) + "\n")
    with pytest.raises(DataError, match=missing) as caught:
        cells(folder)
    assert ", ".join(names) in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "\t".join(columns(5)) + "\n"])
def test_a_file_without_rows(tmp_path, text):
    folder = release(tmp_path, 5)
    (folder / "validated.tsv").write_text(text)
    with pytest.raises(DataError, match=r"validated\.tsv"):
        build(folder, tmp_path / "out")


def test_version_1_quotes_as_csv_does(tmp_path):
    text = 'he said "no", twice'
    found = common_voice.Release(release(tmp_path, 1, [row("", "us", sentence=text), row("", "england")]))
    assert [(cell["sentence"], cell["accent"]) for cell in found.cells()][0] == (text, "us")
    assert found.damaged == {}


@pytest.mark.parametrize("path", ["../x.mp3", "/etc/passwd", "cv-valid-train/../../x.mp3"])
def test_version_1_stays_in_its_folder(tmp_path, path):
    folder = release(tmp_path, 1, [row("", "us", sentence=f"s {k}") for k in range(40)])
    with open(folder / "cv-valid-train.csv", "a", newline="") as file:
        csv.writer(file).writerow([path, "x", 1, 0, "", "", "us", ""])
    found = common_voice.Release(folder)
    assert len(list(found.cells())) == 40
    assert dict(found.damaged) == {"path outside clips": 1}


# --------------------------------------------------------------------------------------------------------- clips


def test_clips_that_are_not_there(tmp_path):
    made = build(release(tmp_path, 6, pool() + people("us", 3, first=50, present=False)), tmp_path / "out")
    assert dict(made.dropped) == {"no audio file": 3}
    assert kept(made) == {"us": 40, "england": 40, "australia": 40}


@pytest.mark.parametrize("folder_too", [False, True])
def test_no_clip_is_there(tmp_path, folder_too):
    folder = release(tmp_path, 6, pool(present=False))
    if folder_too:
        (folder / "clips").rmdir()
    with pytest.raises(DataError, match="clips"):
        build(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "accent_plugin.json").exists()


def test_clips_that_no_row_names(tmp_path):
    folder = release(tmp_path, 6, pool())
    for name in "abc":
        (folder / "clips" / f"{name}.mp3").write_bytes(sound())
    made = build(folder, tmp_path / "out")
    assert [text for text in made.warnings if text.startswith("3 ")]
    assert dict(made.dropped) == {}


# -------------------------------------------------------------------------------------------- what is no release


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        common_voice.Release(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"validated\.tsv"):
        common_voice.Release(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path):
    folder = release(tmp_path, 6, pool(1))
    with pytest.raises(DataError, match="folder"):
        common_voice.Release(folder / "validated.tsv")


def test_the_folder_above(tmp_path):
    folder = release(tmp_path, 17, pool(1))
    with pytest.raises(DataError) as caught:
        common_voice.Release(folder.parent)
    assert str(folder) in str(caught.value)


def test_an_archive_that_was_not_unpacked(tmp_path):
    (tmp_path / "cv-corpus-17.0-2024-03-15-en.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="cv-corpus-17.0-2024-03-15-en.tar.gz(.|\n)*(unpack|tar -?x)"):
        common_voice.Release(tmp_path)


# ------------------------------------------------------------------------------------------------------ real data


def test_a_real_release(tmp_path):
    source = shared_data("common_voice_6_1_sample") / "en"
    before = tree(source)
    found = common_voice.Release(source)
    made = list(found.cells())
    assert (len(made), found.damaged, found.has_clients) == (100, {}, True)
    assert made[3]["accent"] == "england"
    assert made[3]["path"] == "common_voice_en_221948.mp3"
    assert made[3]["sentence"] == "They have gotten used to my being away, and so have I."
    counted = {spelling.raw: (spelling.clips, spelling.clients) for spelling in survey_accents(source)}
    # Two of the 35 clips of us are of one client.
    assert counted == {
        "": (50, 46),
        "us": (35, 34),
        "indian": (5, 5),
        "england": (4, 4),
        "australia": (3, 3),
        "newzealand": (2, 2),
        "ireland": (1, 1),
    }
    assert tree(source) == before


def test_a_real_release_in_another_place(tmp_path):
    source = shared_data("common_voice_6_1_sample") / "en"
    shutil.copytree(source, tmp_path / "en")
    assert cells(tmp_path / "en") == cells(source)


def test_votes_and_durations_may_be_missing_or_written_by_pandas(tmp_path):
    votes = [("", ""), ("nan", "<NA>"), ("2.0", "0.0"), ("-1", "3")]
    rows = [row(f"c{k}", "us", up_votes=up, down_votes=down) for k, (up, down) in enumerate(votes)]
    found = list(common_voice.Release(release(tmp_path, 6, rows)).cells())
    assert [(cell["up_votes"], cell["down_votes"]) for cell in found] == [(None, None), (None, None), (2, 0), (None, 3)]


@pytest.mark.parametrize("votes", ["two", "Hello there.", "twenties", "-2", "inf", "9" * 5000, "2,0"])
def test_a_row_whose_votes_are_no_number_is_left_out_and_counted(tmp_path, votes):
    rows = [*people("us", 12), row("odd", "us", up_votes=votes), *people("england", 12)]
    found = common_voice.Release(release(tmp_path, 6, rows))
    assert "odd" not in {cell["client"] for cell in found.cells()}
    assert found.damaged == {tables.SHIFTED: 1}
    (warning,) = found.warnings
    assert (
        warning
        == f"validated.tsv: rows with shifted columns left out: 1; the first: line 14 has up_votes '{votes[:40]}'"
    )


def test_rows_with_columns_shifted_by_one_are_left_out_and_counted(tmp_path):
    """Also where they are more than the 5 % of damaged rows at which a table is refused."""
    good = pool()
    shifted = [cells_of(row(f"odd{k}", "us"), 6) for k in range(20)]
    lines = ["\t".join([*cells[:3], "", *cells[3:-1]]).encode() + b"\n" for cells in shifted]
    left = ["\t".join([*cells[:3], *cells[4:], ""]).encode() + b"\n" for cells in shifted]
    for name, odd in (("right", lines), ("left", left)):
        made = build(release(tmp_path / name, 6, [*good[:60], *odd, *good[60:]]), tmp_path / f"out_{name}")
        assert made.dropped == {tables.SHIFTED: 20}
        assert kept(made) == {"us": 40, "england": 40, "australia": 40}


def test_an_age_that_is_a_gender_is_a_shifted_row(tmp_path):
    made = build(release(tmp_path, 6, [*pool(), row("odd", "us", age="male", gender="us")]), tmp_path / "out")
    assert made.dropped == {tables.SHIFTED: 1}
    assert "line 122 has age 'male'" in made.warnings[0]


def test_a_release_without_a_usable_row_says_why(tmp_path):
    folder = release(tmp_path, 6, [row(f"c{k}", "us", up_votes="two") for k in range(3)])
    with pytest.raises(DataError, match=r"no usable row(.|\n)*not a number\) 3(.|\n)*line 2 has up_votes 'two'"):
        cells(folder)


def test_durations_that_are_no_numbers_are_counted_and_unknown(tmp_path):
    folder = release(tmp_path, 17, pool())
    durations = folder / "clip_durations.tsv"
    lines = durations.read_text().splitlines()
    lines[1:4] = [line.split("\t")[0] + "\tlong" for line in lines[1:4]]
    durations.write_text("\n".join(lines) + "\n")
    found = common_voice.Release(folder)
    assert [cell["seconds"] for cell in found.cells()] == [None] * 3 + [1.5] * 117
    assert found.warnings == ["3 rows of clip_durations.tsv are damaged: those durations are unknown"]


def test_a_column_that_is_there_twice(tmp_path):
    folder = release(tmp_path, 6, pool(2))
    table = folder / "validated.tsv"
    table.write_text(table.read_text(encoding="utf-8").replace("locale", "client_id", 1), encoding="utf-8")
    with pytest.raises(DataError, match="has the column client_id more than once"):
        common_voice.Release(folder)


def test_only_regular_files_are_clips(tmp_path):
    folder = release(tmp_path, 6, pool(40, 2))
    clips = sorted((folder / "clips").iterdir())
    for clip in clips[:3]:
        clip.unlink()
    clips[0].symlink_to("nowhere.mp3")
    clips[1].mkdir()
    os.mkfifo(clips[2])
    assert build(folder, tmp_path / "out").dropped == {"no audio file": 3}


def test_a_recording_with_two_accents(tmp_path):
    """Neither row is right: chance must not decide."""
    twice = [row("x", "us", path="same.mp3"), row("y", "england", path="same.mp3")]
    built = build(release(tmp_path, 6, [*pool(40), *twice]), tmp_path / "out")
    assert built.dropped == {"contradicting accents": 2}
