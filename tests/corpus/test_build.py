import builtins
import io
import json
import os
import random
import re
import tempfile
from pathlib import Path

import pytest
from helpers.dataset_dicts import dataset, encode, noise, save, shared_data
from helpers.dataset_dicts import rows as clips_in_memory
from helpers.releases import clients_of, flat, kept, people, pool, release, row, saved, sound, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.corpus.build import build_corpus, load_corpus, survey_accents
from accent_plugin.data import dataset_dict, labels, selection, splits
from accent_plugin.data.manifests import read_manifest
from accent_plugin.data.prepare import prepare_data
from accent_plugin.data.splits import Item
from accent_plugin.errors import AccentPluginError, DataError, ManifestError

THIRDS = {"valid_fraction": 0.3, "test_fraction": 0.3, "progress": False, "workers": 1}
TWO = ("us", "england")
# On disk -> in counts.
NAMES = {"train": "train", "validation": "valid", "test": "test"}


def build(source, out, **choices):
    return build_corpus(source, out, **(THIRDS | choices))


def card(folder):
    return json.loads((folder / dataset_dict.CARD_JSON).read_text(encoding="utf-8"))


def numbers(folder):
    """Split -> accent -> clips and clients, counted in the rows on disk."""
    found = {}
    for split, rows in saved(folder).items():
        of = {accent: [r for r in rows if r["accent"] == accent] for accent in {r["accent"] for r in rows}}
        found[NAMES[split]] = {a: (len(of[a]), len({r["client_id"] for r in of[a]})) for a in of}
    return found


# -------------------------------------------------------------------------------------------------- what is made


def test_columns_and_counts(tmp_path):
    made = build(release(tmp_path, 17, pool(clips=2, gender="female")), tmp_path / "out")
    assert made.folder == tmp_path / "out"
    assert kept(made) == {"us": 80, "england": 80, "australia": 80}
    found = {split: {a: (c["clips"], c["clients"]) for a, c in of.items()} for split, of in made.counts.items()}
    assert found == numbers(made.folder)
    # Each clip lasts 1.5 s by clip_durations.tsv.
    for accents in made.counts.values():
        assert all(count["seconds"] == pytest.approx(1.5 * count["clips"]) for count in accents.values())
    assert (made.dropped, made.warnings) == ({}, ())
    (clip,) = [r for r in flat(made.folder) if r["path"] == "common_voice_en_england-7_1.mp3"]
    sound = clip.pop("audio")
    assert clip == {
        "client_id": "england-7",
        "path": "common_voice_en_england-7_1.mp3",
        "sentence": "Sentence england-7 1.",
        "accent": "england",
        "raw_accent": "England English",
        "gender": "female",
        "age": "twenties",
    }
    assert sound.keys() == {"bytes", "path"}


def test_seconds_are_unknown_without_durations(tmp_path):
    made = build(release(tmp_path, 6, pool()), tmp_path / "out")
    assert {count["seconds"] for accents in made.counts.values() for count in accents.values()} == {None}


def test_no_client_in_two_splits(tmp_path):
    made = build(release(tmp_path, 6, pool(clips=2)), tmp_path / "out")
    found = clients_of(made.folder)
    assert found.keys() == {"train", "validation", "test"}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 120


def test_fractions_are_about_kept(tmp_path):
    made = build(release(tmp_path, 6, pool(400, accents=TWO)), tmp_path / "out", accents=TWO, valid_fraction=0.1)
    for accent in TWO:
        # Four standard deviations: sqrt(400 * 0.3 * 0.7) = 9.2 and sqrt(400 * 0.1 * 0.9) = 6.
        assert abs(made.counts["test"][accent]["clients"] - 120) < 37
        assert abs(made.counts["valid"][accent]["clients"] - 40) < 25


def test_a_dataset_that_refers_to_the_clips(tmp_path):
    folder = release(tmp_path, 6, pool())
    made = build(folder, tmp_path / "out")
    for clip in flat(made.folder):
        assert clip["audio"]["bytes"] is None
        assert (made.folder / clip["audio"]["path"]).samefile(folder / "clips" / clip["path"])


def test_a_dataset_that_holds_the_clips(tmp_path):
    folder = release(tmp_path, 6, pool(), distinct=True)
    made = build(folder, tmp_path / "out", embed=True)
    found = flat(made.folder)
    assert len(found) == 120
    for clip in found:
        assert clip["audio"]["bytes"] == (folder / "clips" / clip["path"]).read_bytes()
        assert not os.path.isabs(clip["audio"]["path"])
    assert kept(made) == kept(build(folder, tmp_path / "refer"))


def test_the_audio_column_is_audio(tmp_path):
    from datasets import Audio, load_from_disk

    made = build(release(tmp_path, 6, pool()), tmp_path / "out")
    assert {type(data.features["audio"]) for data in load_from_disk(str(made.folder)).values()} == {Audio}


def test_the_card(tmp_path):
    folder = release(tmp_path, 17, [*pool(), row("a"), row("b", "Kentish"), row("c", "scotland")])
    made = build(folder, tmp_path / "out", seed=3, max_clips_per_client=5)
    written = card(made.folder)
    assert written == made.card
    assert "cv-corpus-17.0-2024-03-15" in written["name"]
    assert written["dropped"] == {labels.NO_ACCENT: 1, labels.UNKNOWN_ACCENT: 1, "other accent": 1}
    assert written["counts"] == {split: dict(accents) for split, accents in made.counts.items()}
    assert written["arguments"]["seed"] == 3
    assert written["arguments"]["max_clips_per_client"] == 5
    assert sorted(written["arguments"]["accents"]) == ["australia", "england", "us"]
    assert written["clients_disjoint"] is True
    for name in (dataset_dict.CARD_JSON, "README.md"):
        assert str(tmp_path) not in (made.folder / name).read_text(encoding="utf-8")


def test_only_out_is_written(tmp_path, monkeypatch):
    folder = release(tmp_path / "release", 17, pool())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(folder)
    for embed in (False, True):
        build(folder, tmp_path / f"out_{embed}", embed=embed)
        survey_accents(folder)
    assert tree(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["here", "out_False", "out_True", "release"]
    assert os.listdir(tmp_path / "here") == []


def test_out_inside_the_release_is_refused(tmp_path):
    folder = release(tmp_path, 6, pool())
    before = tree(folder)
    with pytest.raises(DataError, match="only read"):
        build(folder, folder / "out")
    assert tree(folder) == before


# ----------------------------------------------------------------------------------------------------- accents


def test_presets(tmp_path):
    sixteen = {
        *("african", "australia", "bermuda", "canada", "england", "hongkong", "indian", "ireland"),
        *("malaysia", "newzealand", "philippines", "scotland", "singapore", "southatlandtic", "us", "wales"),
    }
    assert set(labels.PRESETS["sixteen"]) == sixteen
    folder = release(tmp_path, 6, pool(accents=sorted(sixteen)))
    made = build(folder, tmp_path / "sixteen", accents="sixteen")
    assert kept(made) == dict.fromkeys(sixteen, 40)
    made = build(folder, tmp_path / "three", accents="three")
    assert kept(made) == dict.fromkeys(("us", "england", "australia"), 40)
    assert dict(made.dropped) == {"other accent": 13 * 40}
    made = build(folder, tmp_path / "list", accents=["wales", "bermuda"])
    assert kept(made) == {"wales": 40, "bermuda": 40}


def test_an_unknown_preset(tmp_path):
    with pytest.raises(AccentPluginError, match="fourteen(.|\n)*sixteen"):
        build(release(tmp_path, 6, pool(1)), tmp_path / "out", accents="fourteen")


@pytest.mark.parametrize("as_file", [False, True])
def test_a_mapping(tmp_path, as_file):
    rows = pool(accents=TWO) + [row(f"k{k}", "Kentish") for k in range(40)] + [row("e", "Estuary, mostly")]
    mapping = {"kentish": "kent", "Estuary, mostly": "england"}
    if as_file:
        # One spelling, or several spellings of a label.
        (tmp_path / "mapping.yaml").write_text("kentish: kent\nengland: ['Estuary, mostly', Brummie]\n")
        mapping = tmp_path / "mapping.yaml"
    made = build(release(tmp_path, 8, rows), tmp_path / "out", accents=("us", "england", "kent"), mapping=mapping)
    assert kept(made) == {"us": 40, "england": 41, "kent": 40}
    assert {clip["raw_accent"] for clip in flat(made.folder) if clip["accent"] == "kent"} == {"Kentish"}
    assert str(tmp_path) not in (made.folder / dataset_dict.CARD_JSON).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["- kentish\n", "kentish: {a: b}\n", "kentish: no\n", "a: [kent]\nb: [Kent]\n", "{", "just text"]
)
def test_a_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "mapping.yaml").write_text(text)
    with pytest.raises(AccentPluginError, match=r"mapping\.yaml"):
        build(release(tmp_path, 6, pool(1)), tmp_path / "out", mapping=tmp_path / "mapping.yaml")


def test_compound_values_may_agree(tmp_path):
    rows = pool(accents=TWO) + [
        row("a", "United States English|American"),
        row("b", "England English|Kentish"),
        row("c", "England English|United States English"),
    ]
    folder = release(tmp_path, 27, rows)
    made = build(folder, tmp_path / "drop", accents=TWO)
    assert (kept(made), dict(made.dropped)) == ({"us": 40, "england": 40}, {labels.COMPOUND_ACCENT: 3})
    made = build(folder, tmp_path / "agree", accents=TWO, compound="agree")
    assert (kept(made), dict(made.dropped)) == ({"us": 41, "england": 40}, {labels.COMPOUND_ACCENT: 2})


# ------------------------------------------------------------------------------------------------ what is left out


def test_every_reason_of_a_row(tmp_path):
    rows = pool(accents=TWO)
    rows += [row("n1"), row("n2", "Kentish"), row("n3", "us|england"), row("n4", "scotland"), row("n5", "scotland")]
    # No client; the same row again; one client with two accents; three clips of one client; a clip that is not there.
    rows += [row("", "us"), dict(rows[0]), row("two", "us", 0), row("two", "us", 1), row("two", "england", 2)]
    rows += people("england", 1, 3, first=90) + [row("gone", "us", present=False)]
    made = build(release(tmp_path, 27, rows), tmp_path / "out", accents=TWO, max_clips_per_client=1)
    assert dict(made.dropped) == {
        labels.NO_ACCENT: 1,
        labels.UNKNOWN_ACCENT: 1,
        labels.COMPOUND_ACCENT: 1,
        "other accent": 2,
        "no client id": 1,
        "duplicate": 1,
        "contradicting accents": 3,
        "client cap": 2,
        "no audio file": 1,
    }
    assert kept(made) == {"us": 40, "england": 41}
    # Nothing is lost without a reason: 13 and 81 are all.
    assert len(rows) == 94


def test_a_contradicting_client_is_left_out(tmp_path):
    rows = pool(accents=TWO) + [row("x", "us", 0), row("x", "us", 1), row("x", "england", 2)]
    made = build(release(tmp_path, 6, rows), tmp_path / "out", accents=TWO)
    assert dict(made.dropped) == {"contradicting accents": 3}
    assert "x" not in set.union(*clients_of(made.folder).values())


def test_an_accent_that_is_not_asked_for_contradicts_too(tmp_path):
    rows = pool(accents=TWO) + [row("x", "us", 0), row("x", "scotland", 1)]
    made = build(release(tmp_path, 6, rows), tmp_path / "out", accents=TWO)
    assert kept(made) == {"us": 40, "england": 40}


def test_duplicates_over_two_files(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO), other=[*people("us", 2), *people("us", 3, first=50)])
    made = build(folder, tmp_path / "out", accents=TWO, files=("validated.tsv", "other.tsv"))
    assert dict(made.dropped) == {"duplicate": 2}
    assert kept(made) == {"us": 43, "england": 40}


def test_the_cap(tmp_path):
    rows = pool(accents=TWO) + people("us", 2, 33, first=50) + people("england", 1, 4, first=50)
    folder = release(tmp_path, 6, rows)
    # 30 of 33 clips of two clients by default.
    assert dict(build(folder, tmp_path / "thirty", accents=TWO).dropped) == {"client cap": 6}
    made = build(folder, tmp_path / "two", accents=TWO, max_clips_per_client=2)
    assert dict(made.dropped) == {"client cap": 2 * 31 + 2}
    assert kept(made) == {"us": 44, "england": 42}
    assert build(folder, tmp_path / "none", accents=TWO, max_clips_per_client=None).dropped == {}


@pytest.mark.parametrize(
    ("choices", "dropped"),
    [
        ({"min_up_votes": 3}, {"too few up-votes": 2}),
        ({"min_up_votes": 2}, {}),
        ({"max_down_votes": 1}, {"too many down-votes": 1}),
        ({"max_down_votes": 2}, {}),
        ({"min_seconds": 2.0}, {"too short": 2}),
        ({"max_seconds": 9.0}, {"too long": 1}),
        ({"min_seconds": 1.5, "max_seconds": 9.1}, {}),
    ],
)
def test_filters(tmp_path, choices, dropped):
    rows = pool(accents=TWO, up_votes=3, seconds=2.0)
    rows += people("us", 2, first=50, up_votes=2, seconds=2.0) + people("us", 1, first=60, down_votes=2, up_votes=3)
    rows += people("us", 1, first=70, up_votes=3, seconds=1.5) + people("us", 1, first=80, up_votes=3, seconds=9.1)
    # The clip with down-votes lasts 1.5 s as well; this one is not in clip_durations.tsv, so that none can judge it.
    rows += people("us", 1, first=90, up_votes=3, seconds=None)
    made = build(release(tmp_path, 17, rows), tmp_path / "out", accents=TWO, **choices)
    assert dict(made.dropped) == dropped
    assert kept(made) == {"us": 46 - sum(dropped.values()), "england": 40}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"min_up_votes": 3}, r"too few up-votes 40 \(--min_up_votes\)"),
        ({"max_down_votes": 0}, r"too many down-votes 40 \(--max_down_votes\)"),
        ({"min_seconds": 2.0}, r"too short 40 \(--min_seconds\)"),
        ({"max_seconds": 1.0}, r"too long 40 \(--max_seconds\)"),
    ],
)
def test_a_filter_that_takes_every_clip_is_named_with_its_option(tmp_path, choices, message):
    folder = release(tmp_path, 17, pool(accents=TWO, down_votes=1))
    with pytest.raises(DataError) as caught:
        build(folder, tmp_path / "out", accents=TWO, **choices)
    first, second = str(caught.value).splitlines()
    assert re.fullmatch(f"every clip of 'us' in cv-corpus-17.0-2024-03-15/en was left out: {message}", first)
    assert re.fullmatch(f"every clip of 'england' in cv-corpus-17.0-2024-03-15/en was left out: {message}", second)


def test_a_filter_that_takes_every_clip_of_one_accent(tmp_path):
    rows = people("us", 40, up_votes=1) + people("england", 40, up_votes=3) + people("us", 3, first=50, seconds=0.5)
    with pytest.raises(DataError, match=r"^every clip of 'us' .*: too few up-votes 43 \(--min_up_votes\)$"):
        build(release(tmp_path, 17, rows), tmp_path / "out", accents=TWO, min_up_votes=3)


def test_a_balance_that_takes_every_clip_is_named_with_its_option(tmp_path):
    with pytest.raises(DataError, match=r"gender not given 80 \(--balance_gender\)"):
        build(release(tmp_path, 17, pool(accents=TWO)), tmp_path / "out", accents=TWO, balance_gender=True)


def test_votes_that_are_not_given_pass_no_filter(tmp_path):
    rows = pool(accents=TWO) + people("us", 2, first=50, up_votes="") + people("us", 3, first=60, down_votes="nan")
    folder = release(tmp_path, 6, rows)
    assert build(folder, tmp_path / "up", accents=TWO, min_up_votes=1).dropped == {"votes not given": 2}
    assert build(folder, tmp_path / "down", accents=TWO, max_down_votes=1).dropped == {"votes not given": 3}
    assert build(folder, tmp_path / "all", accents=TWO).dropped == {}


def test_votes_as_pandas_writes_them_are_numbers(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO, up_votes="2.0", down_votes="0.0"))
    made = build(folder, tmp_path / "out", accents=TWO, min_up_votes=2, max_down_votes=0)
    assert (made.dropped, kept(made)) == ({}, {"us": 40, "england": 40})


@pytest.mark.parametrize("known", [True, False])
def test_clips_that_do_not_fit_their_sentence_are_dropped(tmp_path, known):
    """With durations in the release, and by decoding; one clip lasts far too long, one is cut."""
    rows, lengths = [], {}
    for number in range(40):
        accent, words = ("us", "england")[number % 2], number % 7
        seconds = (1.0 + 0.5 * words + 0.01 * number) * {5: 3.0, 6: 0.3}.get(number, 1.0)
        sentence = f"Sentence {number:02}" + " and more" * words
        (made,) = people(accent, 1, first=number, sentence=sentence, seconds=seconds if known else None)
        rows.append(made)
        lengths[made["path"]] = seconds
    folder = release(tmp_path, 17, rows)
    if not known:
        for path, seconds in lengths.items():
            (folder / "clips" / path).write_bytes(encode(noise(seconds)))
    made = build(folder, tmp_path / "out", accents=TWO, max_rate_deviation=3.5)
    assert made.dropped == {"too long for its sentence": 1, "too short for its sentence": 1}
    assert sum(kept(made).values()) == 38


def test_lengths_are_not_judged_where_unknown(tmp_path):
    made = build(release(tmp_path, 6, pool()), tmp_path / "out", min_seconds=5.0)
    assert made.dropped == {}


def test_genders_are_balanced(tmp_path):
    rows = people("us", 60, gender="male") + people("us", 40, first=60, gender="female") + people("us", 7, first=100)
    rows += people("england", 40, gender="male") + people("england", 40, first=40, gender="female")
    rows += people("england", 3, first=90, gender="other")
    made = build(release(tmp_path, 6, rows), tmp_path / "out", accents=TWO, balance_gender=True)
    found = flat(made.folder)
    for accent in TWO:
        genders = [clip["gender"] for clip in found if clip["accent"] == accent]
        assert 0 < genders.count("male") == genders.count("female") == len(genders) / 2
    assert made.dropped.keys() == {"gender not given", selection.GENDER_OTHER, "gender balance"}
    assert made.dropped[selection.GENDER_OTHER] == 3
    assert made.dropped["gender not given"] == 7
    # At least the 20 males of us that have no counterpart.
    assert made.dropped["gender balance"] >= 20
    assert len(found) + sum(made.dropped.values()) == len(rows) == 190


def test_sentences_of_test_leave_train(tmp_path):
    rows = pool(accents=TWO)
    first = build(release(tmp_path / "a", 6, rows), tmp_path / "first", accents=TWO)
    split_of = {client: split for split, found in clients_of(first.folder).items() for client in found}
    train, valid, test = (
        [made for made in rows if split_of[made["client"]] == split] for split in ("train", "validation", "test")
    )
    # A client's split does not depend on what he reads.
    train[0]["sentence"] = test[0]["sentence"].upper() + "!!"
    train[1]["sentence"] = valid[0]["sentence"]
    valid[1]["sentence"] = test[1]["sentence"]
    folder = release(tmp_path / "b", 6, rows)
    made = build(folder, tmp_path / "out", accents=TWO)
    assert dict(made.dropped) == {"sentence in test": 2, "sentence in valid": 1}
    gone = set(split_of) - set.union(*clients_of(made.folder).values())
    assert gone == {train[0]["client"], train[1]["client"], valid[1]["client"]}
    assert build(folder, tmp_path / "all", accents=TWO, disjoint_sentences=False).dropped == {}


def test_everybody_reads_the_same_text(tmp_path):
    with pytest.raises(DataError, match="train(.|\n)*sentence in test(.|\n)*disjoint_sentences"):
        build(release(tmp_path, 6, pool(sentence="Please call.")), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("seed", range(5))
def test_ten_speakers_of_each_accent_are_enough(tmp_path, seed):
    made = build_corpus(release(tmp_path, 6, pool(10)), tmp_path / "out", seed=seed, progress=False)
    assert kept(made) == {"us": 10, "england": 10, "australia": 10}
    assert {split: accents.keys() for split, accents in made.counts.items()} == dict.fromkeys(
        ("train", "valid", "test"), {"us", "england", "australia"}
    )


def test_an_empty_split_is_refused(tmp_path):
    rows = people("us", 40) + people("england", 2)
    with pytest.raises(DataError, match="no clip of england(.|\n)*speakers: us 40, england 2; .* three"):
        build(release(tmp_path, 6, rows), tmp_path / "out", accents=TWO)
    assert not (tmp_path / "out" / dataset_dict.CARD_JSON).exists()


def official():
    parts = {"train": pool(5, accents=TWO), "dev": [], "test": []}
    for first, split in ((10, "dev"), (20, "test")):
        parts[split] = [made for accent in TWO for made in people(accent, 2, first=first)]
    return parts


@pytest.mark.parametrize("version", [1, 6, 17])
def test_official_splits(tmp_path, version):
    folder = release(tmp_path, version, **official())
    made = build(folder, tmp_path / "out", accents=TWO, split="official")
    clips = {split: {a: c["clips"] for a, c in accents.items()} for split, accents in made.counts.items()}
    assert clips == {
        "train": {"us": 5, "england": 5},
        "valid": {"us": 2, "england": 2},
        "test": {"us": 2, "england": 2},
    }
    if version > 1:
        assert clients_of(made.folder)["validation"] == {"us-10", "us-11", "england-10", "england-11"}


def test_official_splits_are_compared_with_the_client_split(tmp_path):
    """Of 100 validated clips of 96 speakers, the cap leaves 98."""
    parts = official()
    rows = [made for table in parts.values() for made in table]
    rows += people("us", 39, first=100) + people("england", 39, first=100) + people("scotland", 5)
    rows += [row("us-100", "us", clip) for clip in (1, 2, 3, 4)]
    folder = release(tmp_path, 6, rows, **parts)
    made = build(folder, tmp_path / "out", accents=TWO, split="official", max_clips_per_client=3)
    assert made.warnings == (
        "the official splits hold 18 of 100 validated clips of these accents (18%); split client would give 98 clips"
        " of 96 speakers",
    )
    assert kept(made) == {"us": 9, "england": 9}


def test_official_splits_that_fail_say_what_the_client_split_would_give(tmp_path):
    parts = official()
    parts["test"] = [made for made in parts["test"] if made["accent"] == "us"]
    with pytest.raises(DataError, match="test has no clip of england(.|\n)*split client would give 80 clips of 80 spe"):
        build(release(tmp_path, 6, pool(accents=TWO), **parts), tmp_path / "out", accents=TWO, split="official")


def test_official_splits_where_the_client_split_would_fail(tmp_path):
    made = build(release(tmp_path, 6, people("us", 9), **official()), tmp_path / "out", accents=TWO, split="official")
    (warning,) = made.warnings
    assert warning.startswith("split client would fail: no clip of 'england' in cv-corpus-6.1-2020-12-11/en")


def test_official_splits_that_are_not_there(tmp_path):
    folder = release(tmp_path, 6, pool(5), train=pool(5))
    with pytest.raises(DataError, match=r"dev\.tsv(.|\n)*split by client"):
        build(folder, tmp_path / "out", split="official")


def test_split_at_random(tmp_path):
    made = build(release(tmp_path, 6, pool(10, 10, TWO)), tmp_path / "out", accents=TWO, split="random")
    assert kept(made) == {"us": 100, "england": 100}
    found = clients_of(made.folder)
    # Ten clips a client: it would be odd if each stayed in one split.
    assert found["train"] & found["test"]
    assert made.card["clients_disjoint"] is False
    assert made.warnings == (
        "split at random by clip: speakers are shared between splits, accuracies flatter",
        "the recipe refuses splits that share speakers, unless it is given --split random",
    )


def test_version_1_has_no_clients(tmp_path):
    folder = release(tmp_path, 1, pool())
    with pytest.raises(DataError, match="official") as caught:
        build(folder, tmp_path / "out", split="client")
    assert "random" in str(caught.value)
    assert kept(build(folder, tmp_path / "out", split="random")) == {"us": 40, "england": 40, "australia": 40}


def test_another_seed_is_another_split(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO))
    one, two = (clients_of(build(folder, tmp_path / str(seed), accents=TWO, seed=seed).folder) for seed in (1, 2))
    assert one != two


def test_the_order_of_rows_changes_nothing(tmp_path):
    rows = pool(clips=3, accents=TWO)
    first = build(release(tmp_path / "a", 6, rows), tmp_path / "out_a", accents=TWO, max_clips_per_client=2)
    shuffled = random.Random(1).sample(rows, len(rows))
    second = build(release(tmp_path / "b", 6, shuffled), tmp_path / "out_b", accents=TWO, max_clips_per_client=2)

    def names(made):
        return {split: [clip["path"] for clip in clips] for split, clips in saved(made.folder).items()}

    assert names(first) == names(second)
    assert first.counts == second.counts


def test_a_release_that_has_grown(tmp_path):
    rows = pool(accents=TWO)
    old = build(release(tmp_path / "old", 6, rows), tmp_path / "out_old", accents=TWO)
    more = people("us", 70, 2) + people("england", 55, first=40) + rows[40:]
    new = build(release(tmp_path / "new", 17, more), tmp_path / "out_new", accents=TWO)
    before, after = clients_of(old.folder), clients_of(new.folder)
    for split, clients in before.items():
        assert clients <= after[split]


# ---------------------------------------------------------------------------------------------- once more, or other


@pytest.mark.parametrize("embed", [False, True])
def test_the_same_call_again_does_nothing(tmp_path, embed):
    folder = release(tmp_path, 17, pool())
    made = build(folder, tmp_path / "out", embed=embed)
    before = tree(tmp_path / "out")
    assert build(folder, tmp_path / "out", embed=embed) == made
    assert tree(tmp_path / "out") == before


def test_other_arguments_are_refused(tmp_path):
    folder = release(tmp_path, 6, pool())
    build(folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ManifestError, match="seed: 1986 -> 7") as caught:
        build(folder, tmp_path / "out", seed=7, max_clips_per_client=3)
    assert "max_clips_per_client: 30 -> 3" in str(caught.value)
    assert "valid_fraction" not in str(caught.value)
    assert tree(tmp_path / "out") == before


def test_a_release_that_has_changed_is_refused(tmp_path):
    folder = release(tmp_path, 6, pool())
    build(folder, tmp_path / "out")
    with open(folder / "validated.tsv", "a") as file:
        file.write("\n")
    with pytest.raises(ManifestError, match="changed since"):
        build(folder, tmp_path / "out")


def test_somebody_elses_folder_is_left_alone(tmp_path):
    folder = release(tmp_path, 6, pool())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match="out"):
        build(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def interrupt(patch, at):
    """Raise KeyboardInterrupt where the clip of that number is opened."""
    opened = []

    def watching(real):
        def watched(file, *arguments, **named):
            if str(file).endswith(".mp3"):
                opened.append(file)
                if len(opened) == at:
                    raise KeyboardInterrupt
            return real(file, *arguments, **named)

        return watched

    for module in (builtins, io, os):
        patch.setattr(module, "open", watching(module.open))


@pytest.mark.parametrize("at", [1, 30, 80])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, at):
    folder = release(tmp_path, 6, pool(accents=TWO), distinct=True)
    choices = {"accents": TWO, "embed": True}
    whole = build(folder, tmp_path / "whole", **choices)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path / "out", **choices)
    # What is there in part is taken for finished neither by who made it nor by who reads it.
    with pytest.raises(ManifestError, match="no finished"):
        load_corpus(tmp_path / "out")
    with pytest.raises(DataError, match="no DatasetDict"):
        dataset_dict.fingerprint(tmp_path / "out")
    with pytest.raises(ManifestError, match="in part(.|\n)*seed: 1986 -> 7"):
        build(folder, tmp_path / "out", seed=7, **choices)
    made = build(folder, tmp_path / "out", **choices)
    assert saved(made.folder) == saved(whole.folder)
    assert made.counts == whole.counts
    # Nothing is left of the first attempt.
    assert tree(made.folder).keys() == tree(whole.folder).keys()


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("accent_plugin.corpus.arrow_shards._CLIPS_EMBEDDED", 10)
    folder = release(tmp_path, 6, pool(accents=TWO), distinct=True)
    with monkeypatch.context() as patch:
        interrupt(patch, 75)
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path / "out", accents=TWO, embed=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.arrow")}
    # 74 clips in three splits: at most two shards that are shorter than 10 and one that is not finished.
    assert len(before) >= 6
    made = build(folder, tmp_path / "out", accents=TWO, embed=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(flat(made.folder)) == 80


def test_threads_change_nothing(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO), distinct=True)
    one, three = (build(folder, tmp_path / str(n), accents=TWO, embed=True, workers=n) for n in (1, 3))
    assert saved(one.folder) == saved(three.folder)


# ----------------------------------------------------------------------------------------- on into the manifests


@pytest.mark.parametrize("embed", [False, True])
def test_the_whole_way(tmp_path, embed):
    folder = release(tmp_path, 17, pool(accents=TWO), distinct=True, seconds=1.2)
    made = build(folder, tmp_path / "out", accents=TWO, embed=embed)
    choices = {"accents": list(TWO), "seed": 7, "progress": False, "workers": 1, "balance": "none"}
    prepared = prepare_data(made.folder, tmp_path / "prepared", **choices)
    clips = {s: {a: c["clips"] for a, c in accents.items()} for s, accents in prepared.counts.items()}
    assert clips == {s: {a: c["clips"] for a, c in accents.items()} for s, accents in made.counts.items()}
    assert (prepared.dropped, prepared.speakers_disjoint, prepared.synthetic) == ({}, True, False)
    assert (prepared.name, prepared.card) == (made.card["name"], made.card)
    read = {split: {clip.client_id for clip in read_manifest(path)} for split, path in prepared.splits.items()}
    assert read == {NAMES[split]: clients for split, clients in clients_of(made.folder).items()}


def test_the_whole_way_of_a_random_split(tmp_path):
    folder = release(tmp_path, 6, pool(5, 4, TWO), distinct=True, seconds=1.2)
    made = build(folder, tmp_path / "out", accents=TWO, split="random")
    choices = {"accents": list(TWO), "seed": 7, "progress": False, "workers": 1, "balance": "none"}
    with pytest.raises(DataError, match="more than one split"):
        prepare_data(made.folder, tmp_path / "prepared", **choices)
    prepared = prepare_data(made.folder, tmp_path / "prepared", split="random", **choices)
    assert prepared.speakers_disjoint is False
    assert sum(c["clips"] for of in prepared.counts.values() for c in of.values()) == 40


def test_the_whole_way_from_version_1(tmp_path):
    folder = release(tmp_path, 1, **official(), distinct=True, seconds=1.2)
    made = build(folder, tmp_path / "out", accents=TWO, split="official")
    assert made.card["clients_disjoint"] is None
    choices = {"accents": list(TWO), "seed": 7, "progress": False, "workers": 1, "balance": "none"}
    prepared = prepare_data(made.folder, tmp_path / "prepared", **choices)
    assert {split: sum(c["clips"] for c in of.values()) for split, of in prepared.counts.items()} == {
        "train": 10,
        "valid": 4,
        "test": 4,
    }
    assert prepared.speakers_disjoint is not True
    assert "no client ids: splits may share speakers" in prepared.warnings


def test_real_common_voice(tmp_path):
    source = shared_data("common_voice_6_1_sample") / "en"
    accents = ("us", "indian")
    before = tree(source)
    made = build(source, tmp_path / "out", accents=accents)
    assert kept(made) == {"us": 35, "indian": 5}
    # 35 + 5 of the 50 rows with an accent.
    assert dict(made.dropped) == {labels.NO_ACCENT: 50, "other accent": 10}
    choices = {"accents": list(accents), "seed": 7, "progress": False, "workers": 1, "balance": "none"}
    prepared = prepare_data(made.folder, tmp_path / "prepared", **choices)
    assert sum(c["clips"] for of in prepared.counts.values() for c in of.values()) == 40
    assert tree(source) == before


# --------------------------------------------------------------------------------------------------- other sources


def waves(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(0.1, seed=list(name.encode())), format="WAV"))
    return folder


def test_a_folder_for_each_accent(tmp_path):
    names = [f"{accent}/{accent}{k}/{clip}.wav" for accent in TWO for k in range(40) for clip in "ab"]
    folder = waves(tmp_path / "speech", names)
    (folder / "README.txt").write_text("about")
    made = build(folder, tmp_path / "out", accents=TWO)
    assert kept(made) == {"us": 80, "england": 80}
    found = clients_of(made.folder)
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 80
    assert all((made.folder / clip["audio"]["path"]).is_file() for clip in flat(made.folder))


def test_a_folder_may_have_any_spelling(tmp_path):
    names = [f"{accent}/c{k}{accent[0]}/a.wav" for accent in ("United States English", "en-AU") for k in range(40)]
    made = build(waves(tmp_path / "speech", names), tmp_path / "out", accents=("us", "australia"))
    assert kept(made) == {"us": 40, "australia": 40}
    assert {clip["raw_accent"] for clip in flat(made.folder)} == {"United States English", "en-AU"}


def test_clients_in_the_names_of_files(tmp_path):
    names = [f"{accent}/{accent}{k}_{clip}.wav" for accent in TWO for k in range(40) for clip in range(2)]
    folder = waves(tmp_path / "speech", names)
    made = build(folder, tmp_path / "out", accents=TWO, client_pattern=r"([^_]+)_")
    assert kept(made) == {"us": 80, "england": 80}
    found = clients_of(made.folder)
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 80
    with pytest.raises(DataError, match="no client ids(.|\n)*client_pattern"):
        build(folder, tmp_path / "none", accents=TWO)
    assert kept(build(folder, tmp_path / "random", accents=TWO, split="random")) == {"us": 80, "england": 80}


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table(tmp_path, ending, separator):
    clips = [
        (f"{accent}{k}-{clip}.wav", accent, f"{accent}{k}") for accent in TWO for k in range(40) for clip in (0, 1)
    ]
    names = [name for name, _, _ in clips]
    waves(tmp_path / "speech" / "audio", names)
    rows = [["file", "says", "who", "text"]]
    rows += [[f"audio/{name}", accent, client, f"Text {name}"] for name, accent, client in clips]
    rows += [["audio/absent.wav", "us", "us0", "Absent"], ["audio/us0-0.wav", "", "nobody", "None"]]
    table = tmp_path / "speech" / f"table.{ending}"
    table.write_text("".join(separator.join(cells) + "\n" for cells in rows))
    named = {"path_column": "file", "accent_column": "says", "client_column": "who", "sentence_column": "text"}
    made = build(table, tmp_path / "out", accents=TWO, **named)
    assert kept(made) == {"us": 80, "england": 80}
    assert dict(made.dropped) == {"no audio file": 1, labels.NO_ACCENT: 1}
    assert {clip["sentence"] for clip in flat(made.folder)} == {f"Text {name}" for name in names}
    assert str(tmp_path) not in (made.folder / dataset_dict.CARD_JSON).read_text(encoding="utf-8")
    with pytest.raises(DataError, match="speaks(.|\n)*file, says, who, text"):
        build(table, tmp_path / "none", accents=TWO, **(named | {"accent_column": "speaks"}))


def test_official_splits_of_a_table(tmp_path):
    splits_of = {"train": 6, "dev": 2, "test": 2}
    clips = [(f"{a}-{s}-{k}.wav", a, f"{a}-{s}-{k}", s) for a in TWO for s, n in splits_of.items() for k in range(n)]
    waves(tmp_path, [name for name, *_ in clips])
    text = "".join(",".join(cells) + "\n" for cells in [("path", "accent", "speaker", "split"), *clips])
    (tmp_path / "table.csv").write_text(text)
    made = build(tmp_path / "table.csv", tmp_path / "out", accents=TWO, split="official")
    assert {split: len(clients) for split, clients in clients_of(made.folder).items()} == {
        "train": 12,
        "validation": 4,
        "test": 4,
    }


def test_a_dataset_on_disk(tmp_path):
    tables = {"train": clips_in_memory("us", 24) + clips_in_memory("england", 24)}
    tables["test"] = clips_in_memory("us", 16, first=24) + clips_in_memory("england", 16, first=24)
    made = build(save(tmp_path / "data", **tables), tmp_path / "out", accents=TWO)
    assert kept(made) == {"us": 80, "england": 80}
    sounds = {clip["path"]: clip["audio"]["bytes"] for table in tables.values() for clip in table}
    assert {clip["path"]: clip["audio"]["bytes"] for clip in flat(made.folder)} == sounds


def test_official_splits_of_a_dataset(tmp_path):
    tables = {
        split: clips_in_memory("us", 2, first=first) + clips_in_memory("england", 2, first=first)
        for first, split in ((0, "train"), (10, "validation"), (20, "test"))
    }
    made = build(save(tmp_path / "data", **tables), tmp_path / "out", accents=TWO, split="official")
    assert clients_of(made.folder)["validation"] == {"us-10", "us-11", "england-10", "england-11"}


def test_parquet_files(tmp_path, monkeypatch):
    # Reading Parquet, datasets makes a copy of its own.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = clips_in_memory("us", 40, 1) + clips_in_memory("england", 40, 1)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    from datasets import Value

    # As a plain struct, because writing an Audio column would want to decode it.
    plain = {"audio": {"bytes": Value("binary"), "path": Value("string")}}
    dataset(table, plain).to_parquet(str(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet"))
    made = build(tmp_path / "repo", tmp_path / "out", accents=TWO)
    assert kept(made) == {"us": 40, "england": 40}
    assert {clip["audio"]["bytes"] for clip in flat(made.folder)} == {clip["audio"]["bytes"] for clip in table}
    assert build(tmp_path / "repo", tmp_path / "out", accents=TWO) == made


def test_a_name_that_cannot_be_reached(tmp_path):
    with pytest.raises(DataError, match="nobody/has-this"):
        build("nobody/has-this", tmp_path / "out", accents=TWO)
    assert not (tmp_path / "out" / dataset_dict.CARD_JSON).exists()


# ------------------------------------------------------------------------------------------------------ properties


FRACTIONS = {"valid_fraction": 0.2, "test_fraction": 0.3}
seeds = st.integers(0, 2**40)


@st.composite
def pools(draw):
    """Clips of some clients of each accent."""
    items = []
    for accent in ("us", "england", "australia"):
        for client, clips in enumerate(draw(st.lists(st.integers(1, 3), max_size=12))):
            sentence = draw(st.sampled_from(["", "one", "two", f"own {accent} {client}"]))
            items += [Item(f"{accent}-{client}-{k}", accent, f"{accent}{client}", sentence) for k in range(clips)]
    return draw(st.permutations(items))


@settings(deadline=None, max_examples=60)
@given(pools(), seeds, st.randoms())
def test_split_by_hash(items, seed, generator):
    parts = splits.by_hash(items, seed=seed, **FRACTIONS)
    assert list(parts) == ["train", "valid", "test"]
    splits.require_disjoint(parts)
    for part in parts.values():
        assert [item.id for item in part] == sorted(item.id for item in part)
    assert sorted(item.id for part in parts.values() for item in part) == sorted(item.id for item in items)
    assert splits.by_hash(generator.sample(items, len(items)), seed=seed, **FRACTIONS) == parts


def test_shares_of_a_hash():
    items = [Item(f"{k:04}", "us", f"client {k}") for k in range(2000)]
    parts = splits.by_hash(items, valid_fraction=0.1, test_fraction=0.2, seed=1)
    # Four standard deviations: sqrt(2000 * 0.2 * 0.8) = 17.9 and sqrt(2000 * 0.1 * 0.9) = 13.4.
    assert abs(len(parts["test"]) - 400) < 72
    assert abs(len(parts["valid"]) - 200) < 54


@settings(deadline=None, max_examples=5)
@given(seeds, st.integers(1, 3), st.randoms(), st.lists(st.sampled_from(["", "one", "two"]), min_size=40, max_size=40))
def test_any_release_gives_disjoint_splits(seed, cap, generator, texts):
    # Everybody has a sentence of his own, and 20 of each 60 clients up to two more, which others read too.
    rows = pool(60, accents=TWO)
    for made, text in zip(pool(20, accents=TWO), texts, strict=True):
        if text:
            rows += [row(made["client"], made["accent"], clip, sentence=f"{text} {clip}") for clip in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        choices = {"accents": TWO, "seed": seed, "max_clips_per_client": cap}
        made = build(release(Path(folder) / "a", 6, rows), Path(folder) / "out_a", **choices)
        shuffled = generator.sample(rows, len(rows))
        again = build(release(Path(folder) / "b", 6, shuffled), Path(folder) / "out_b", **choices)
        parts, others = saved(made.folder), saved(again.folder)
    names = {split: [clip["path"] for clip in clips] for split, clips in parts.items()}
    assert names == {split: [clip["path"] for clip in clips] for split, clips in others.items()}
    clients = [{clip["client_id"] for clip in clips} for clips in parts.values()]
    sentences = [{splits.normalise_sentence(clip["sentence"]) for clip in clips} for clips in parts.values()]
    for found in (clients, sentences):
        assert sum(map(len, found)) == len(set.union(*found))
    read = [clip["client_id"] for clips in parts.values() for clip in clips]
    assert max(map(read.count, set(read))) <= cap
    assert sum(kept(made).values()) + sum(made.dropped.values()) == len(rows)


def test_what_a_killed_process_left_is_swept(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path / "out", accents=TWO, embed=True)
    leftover = tmp_path / "out" / "train" / ".data-00000-of-00001.arrow.4711.tmp"
    leftover.write_bytes(b"half")
    build(folder, tmp_path / "out", accents=TWO, embed=True)
    assert not leftover.exists()


def test_a_result_whose_shards_are_gone_is_made_again(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO))
    made = build(folder, tmp_path / "out", accents=TWO)
    before = saved(made.folder)
    next((made.folder / "train").glob("*.arrow")).unlink()
    assert saved(build(folder, tmp_path / "out", accents=TWO).folder) == before


def test_a_shard_that_was_cut_is_made_again(tmp_path):
    folder = release(tmp_path, 6, pool(accents=TWO))
    made = build(folder, tmp_path / "out", accents=TWO)
    shard = next((made.folder / "train").glob("*.arrow"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    build(folder, tmp_path / "out", accents=TWO)
    assert shard.read_bytes() == content


def test_folders_leave_nothing_out_in_silence(tmp_path):
    source = tmp_path / "speech"
    elsewhere = tmp_path / "elsewhere"
    for accent in TWO:
        for number in range(40):
            (source / accent / f"s{number}").mkdir(parents=True)
            (source / accent / f"s{number}" / "a.mp3").write_bytes(sound())
    (source / "us" / "s0").rename(elsewhere)
    (source / "us" / "s0").symlink_to(elsewhere)
    (source / "us" / "s1" / "back").symlink_to(source / "us")
    (source / "us" / "s1" / "._a.mp3").write_bytes(b"macOS")
    (source / "us" / "s1" / "b.dat").touch()
    (source / "loose.wav").touch()
    made = build(source, tmp_path / "out", accents=TWO)
    assert kept(made) == {"us": 40, "england": 40}
    assert made.warnings == ("files without an audio suffix, or outside the accents' folders: .dat 1, .wav 1",)


def test_only_unknown_accents_are_listed_as_unknown(tmp_path):
    more = [row("a", "Kentish"), row("b", "Kentish", 1), row("c", "us|england"), row("d", ""), row("e", "wales")]
    made = build(release(tmp_path / "a", 27, pool(accents=TWO) + more), tmp_path / "out", accents=TWO)
    (warning,) = made.warnings
    assert warning.startswith("unknown accents left out: 'Kentish' 2; to give them labels: --mapping of prepare")
    assert (
        build(release(tmp_path / "b", 27, pool(accents=TWO) + more[2:]), tmp_path / "out_b", accents=TWO).warnings == ()
    )


def test_a_mapping_that_ships_may_give_labels_that_nobody_asks_for(tmp_path):
    made = build(release(tmp_path, 6, pool(accents=TWO)), tmp_path / "out", accents=TWO, mapping="edacc")
    assert made.warnings == ()


def test_a_mapping_to_a_label_that_nobody_asks_for(tmp_path):
    made = build(release(tmp_path, 6, pool()), tmp_path / "out", mapping={"Geordie": "atlantis"})
    assert [text for text in made.warnings if text.startswith("mapping gives labels that are not asked for: atlantis;")]
