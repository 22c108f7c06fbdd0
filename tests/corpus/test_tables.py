import pytest
from helpers.dataset_dicts import save, three_splits
from helpers.releases import clients_of, flat, kept, pool, release, row, sound

from accent_plugin.corpus.build import build_corpus
from accent_plugin.corpus.tables import SHIFTED, TableRows
from accent_plugin.data import labels
from accent_plugin.data.prepare import prepare_data
from accent_plugin.errors import DataError

TWO = ("us", "england")
MISSING = ["", "nan", "NaN", "None", "null", "NULL", "N/A", "<NA>", "-1", " nan "]


def rows(clips=30, accents=TWO):
    """Cells of a table: path, accent, speaker and sentence, a speaker per clip."""
    return [[f"{a}{k}.mp3", a, f"{a}-{k}", f"Sentence {a} {k}."] for a in accents for k in range(clips)]


def write(folder, cells, name="clips.tsv", delimiter="\t", eol="\n", header=("path", "accent", "speaker", "sentence")):
    folder.mkdir(parents=True, exist_ok=True)
    for path, *_ in cells:
        (folder / path).write_bytes(sound())
    lines = [delimiter.join(line) for line in (header, *cells)]
    (folder / name).write_bytes((eol.join(lines) + eol).encode())
    return folder / name


def read(path):
    found = TableRows(path)
    return [found.columns, *found], dict(found.damaged)


def build(source, out, **choices):
    return build_corpus(source, out, **({"accents": TWO, "progress": False, "workers": 1} | choices))


KINDS = pytest.mark.parametrize(("name", "delimiter"), [("clips.tsv", "\t"), ("clips.csv", ","), ("clips.csv", ";")])


@KINDS
def test_two_stray_quotes_lose_no_row(tmp_path, name, delimiter):
    cells = rows()
    cells[10][3], cells[20][3] = '"Hello there.', 'He said "bye"'
    cells[30][3], cells[31][3], cells[45][3] = '"', '"Never', 'closed"'
    table, damaged = read(write(tmp_path, cells, name, delimiter))
    assert table[1:] == cells
    assert damaged == {}
    assert kept(build(tmp_path / name, tmp_path / "out")) == {"us": 30, "england": 30}


@KINDS
def test_quoted_cells_are_read_as_csv_writes_them(tmp_path, name, delimiter):
    cells = [["a", "b", "c", "d"], ["a", "b", f'"He said ""no""{delimiter} twice"', "d"]]
    cells += [["a", "b", '"one\ntwo\nthree"', "d"], ["a", "b", "c", '"one\n"']]
    (tmp_path / name).write_text("\n".join(delimiter.join(line) for line in [["1", "2", "3", "4"], *cells]) + "\n")
    table, damaged = read(tmp_path / name)
    assert table[2:] == [
        ["a", "b", f'He said "no"{delimiter} twice', "d"],
        ["a", "b", "one\ntwo\nthree", "d"],
        ["a", "b", "c", "one\n"],
    ]
    assert damaged == {}


@KINDS
def test_a_cell_of_200_000_characters_is_read(tmp_path, name, delimiter):
    cells = rows(2)
    cells[1][3] = "x" * 200_000
    assert read(write(tmp_path, cells, name, delimiter))[0][1:] == cells


@KINDS
@pytest.mark.parametrize("eol", ["\r", "\r\n"])
def test_other_line_ends(tmp_path, name, delimiter, eol):
    assert read(write(tmp_path, rows(), name, delimiter, eol))[0][1:] == rows()


def test_a_release_with_bare_carriage_returns(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO))
    table = folder / "validated.tsv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r"))
    assert kept(build(folder, tmp_path / "out")) == {"us": 40, "england": 40}


def test_a_file_that_is_no_table_gives_a_short_message(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"column" * 10_000)
    (tmp_path / "b.csv").write_bytes(b",".join(b"c%d" % k for k in range(10_000)))
    for name, listed in (("a.csv", r"columns are (column){6}colu\.\.\.\n"), ("b.csv", "c18, c19 and 9980 more\n")):
        with pytest.raises(DataError, match=listed) as caught:
            build(tmp_path / name, tmp_path / "out")
        assert len(str(caught.value)) < 500


def test_damaged_rows_of_a_table_are_counted(tmp_path):
    table = write(tmp_path, rows())
    lines = table.read_bytes().splitlines(keepends=True)
    lines[9:9] = [b"a.mp3\tus\n", b"b.mp3\tus\tx\tcaf\xe9\n", b'"b.mp3\tus\n']
    table.write_bytes(b"".join(lines))
    made = build(table, tmp_path / "out")
    assert made.dropped == {"wrong number of cells": 2, "invalid UTF-8": 1}
    assert kept(made) == {"us": 30, "england": 30}


def test_a_table_that_is_not_utf8_is_refused(tmp_path):
    table = write(tmp_path, rows())
    table.write_bytes(table.read_bytes().replace(b"Sentence", b"Phras\xe9"))
    with pytest.raises(DataError, match="clips.tsv is damaged: of 60 rows invalid UTF-8 60"):
        build(table, tmp_path / "out")


def test_a_duration_that_is_no_number_is_left_out_and_counted(tmp_path):
    cells = [[*line, "2.5"] for line in rows()]
    for line, text in zip(cells, ["", "nan", "two", "-3"], strict=False):
        line[4] = text
    table = write(tmp_path, cells, header=("path", "accent", "speaker", "sentence", "duration"))
    made = build(table, tmp_path / "out", max_seconds=3.0)
    assert made.dropped == {SHIFTED: 2}
    assert made.warnings == ("clips.tsv: rows with shifted columns left out: 2; the first: line 4 has seconds 'two'",)


# ------------------------------------------------------------------------------------------------- missing cells


@pytest.mark.parametrize("word", MISSING)
def test_a_speaker_that_is_missing_is_no_speaker(tmp_path, word):
    cells = rows()
    for line in cells[:10]:
        line[2] = word
    made = build(write(tmp_path / "table", cells), tmp_path / "out")
    assert made.dropped == {"no client id": 10}
    assert kept(made) == {"us": 20, "england": 30}


@pytest.mark.parametrize("word", MISSING[:-1])
def test_missing_cells_of_a_release(tmp_path, word):
    odd = [row(f"odd{k}", "us", gender="female") for k in range(5)]
    for made, role in zip(odd, ["client", "accent", "sentence", "gender", "age"], strict=True):
        made[role] = word
    made = build(release(tmp_path, 6, [*pool(accents=TWO), *odd]), tmp_path / "out")
    assert made.dropped == {"no client id": 1, labels.NO_ACCENT: 1}
    found = {clip["client_id"]: clip for clip in flat(made.folder)}
    assert [found[f"odd{k}"]["sentence"] for k in (2, 3, 4)] == ["", "Sentence odd3 0.", "Sentence odd4 0."]
    assert [found[f"odd{k}"]["gender"] for k in (2, 3, 4)] == ["female", "", "female"]
    assert [found[f"odd{k}"]["age"] for k in (2, 3, 4)] == ["twenties", "twenties", ""]


@pytest.mark.parametrize("word", MISSING)
def test_missing_cells_of_a_dataset_dict(tmp_path, word):
    tables = three_splits(clients=(6, 2, 2))
    for clip in tables["train"][:3]:
        clip.update(client_id=word, gender=word, age=word)
    made = prepare_data(save(tmp_path / "a", **tables), tmp_path / "out", accents=list(TWO), seed=7, progress=False)
    assert made.dropped == {"no client id": 3, "balance": 3}
    made = build(tmp_path / "a", tmp_path / "corpus", split="official")
    assert made.dropped == {"no client id": 3}
    assert not set.union(*clients_of(made.folder).values()) & set(MISSING)


@pytest.mark.parametrize("text", ["us", "Nancy", "None of them", "nando", "1", "-10", "n", "NAN.mp3", "null island"])
def test_other_texts_are_present(text):
    assert labels.present(text) == text
