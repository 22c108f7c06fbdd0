import hashlib
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accent_plugin.data import splits
from accent_plugin.data.splits import Item
from accent_plugin.errors import DataError

ACCENTS = ("us", "england", "australia")


@st.composite
def pools(draw, least_speakers=5):
    """Clips of at least so many speakers per accent, some with a sentence that others read too."""
    items = []
    for accent in ACCENTS[: draw(st.integers(1, 3))]:
        for speaker, clips in enumerate(draw(st.lists(st.integers(1, 4), min_size=least_speakers, max_size=9))):
            for clip in range(clips):
                sentence = draw(st.sampled_from(["", "one", "two", *(f"own {accent} {speaker} {k}" for k in range(3))]))
                items.append(Item(f"{accent}-{speaker}-{clip}", accent, f"{accent}{speaker}", sentence))
    return draw(st.permutations(items))


seeds = st.integers(0, 2**40)


def speakers(items):
    return {item.speaker for item in items}


@settings(deadline=None, max_examples=60)
@given(pools(), seeds, st.randoms())
def test_split_by_speaker(items, seed, random):
    parts = splits.by_speaker(items, valid_fraction=0.2, test_fraction=0.3, seed=seed)
    splits.require_disjoint(parts)
    assert sorted(i.id for part in parts.values() for i in part) == sorted(i.id for i in items)
    for accent in {item.accent for item in items}:
        total = len({i.speaker for i in items if i.accent == accent})
        shares = {s: len({i.speaker for i in part if i.accent == accent}) for s, part in parts.items()}
        assert shares["test"] == max(1, round(0.3 * total))
        assert shares["valid"] == max(1, round(0.2 * total))
    shuffled = random.sample(items, len(items))
    assert splits.by_speaker(shuffled, valid_fraction=0.2, test_fraction=0.3, seed=seed) == parts


@settings(deadline=None, max_examples=60)
@given(pools(), seeds, st.integers(2, 5), st.sampled_from(["speaker", "clip"]), st.randoms())
def test_folds(items, seed, count, by, random):
    made = splits.folds(items, count, valid_fraction=0.25, seed=seed, by=by)
    assert len(made) == count
    tested = Counter(i.id for parts in made for i in parts["test"])
    assert tested == Counter(i.id for i in items)
    everywhere = {i.id for i in items}
    for parts in made:
        assert {i.id for part in parts.values() for i in part} == everywhere
        for part in parts.values():
            assert {i.accent for i in part} == {i.accent for i in items}
        if by == "speaker":
            splits.require_disjoint(parts)
    if by == "speaker":
        folds_of = Counter(speaker for parts in made for speaker in speakers(parts["test"]))
        assert set(folds_of.values()) == {1}
    assert splits.folds(random.sample(items, len(items)), count, valid_fraction=0.25, seed=seed, by=by) == made


@settings(deadline=None, max_examples=60)
@given(pools(1), seeds, st.integers(1, 3), st.randoms())
def test_cap(items, seed, limit, random):
    choice = splits.cap(items, limit, seed)
    before, after = Counter(i.speaker for i in items), Counter(i.speaker for i in choice.kept)
    assert after == {speaker: min(n, limit) for speaker, n in before.items()}
    assert len(choice.kept) + len(choice.dropped) == len(items)
    assert splits.cap(random.sample(items, len(items)), limit, seed) == choice


@settings(deadline=None, max_examples=60)
@given(pools(1), seeds, st.randoms())
def test_downsampling(items, seed, random):
    choice = splits.downsample(items, seed)
    counts = Counter(i.accent for i in items)
    assert Counter(i.accent for i in choice.kept) == dict.fromkeys(counts, min(counts.values()))
    assert splits.downsample(random.sample(items, len(items)), seed) == choice
    for accent in counts:
        wanted = min(min(counts.values()), len({i.speaker for i in items if i.accent == accent}))
        assert len({i.speaker for i in choice.kept if i.accent == accent}) == wanted


@settings(deadline=None, max_examples=60)
@given(pools(), seeds)
def test_no_sentence_in_two_splits(items, seed):
    before = splits.by_speaker(items, valid_fraction=0.2, test_fraction=0.2, seed=seed)
    after, dropped = splits.drop_sentences(before)
    read = {split: {i.sentence for i in part} - {""} for split, part in after.items()}
    assert not read["train"] & read["valid"]
    assert not read["train"] & read["test"]
    assert not read["valid"] & read["test"]
    assert after["test"] == before["test"]
    assert sum(map(len, after.values())) + sum(map(len, dropped.values())) == len(items)
    assert all(item.sentence for items in dropped.values() for item in items)


def test_sentences_by_hand():
    parts = {
        "train": (
            Item("a", "us", "1", "x"),
            Item("b", "us", "1", "y"),
            Item("c", "us", "1", ""),
            Item("d", "us", "1", "z"),
        ),
        "valid": (Item("e", "us", "2", "y"), Item("f", "us", "2", "x"), Item("g", "us", "2", "")),
        "test": (Item("h", "us", "3", "x"), Item("i", "us", "3", "")),
    }
    after, dropped = splits.drop_sentences(parts)
    assert {s: "".join(i.id for i in part) for s, part in after.items()} == {"train": "cd", "valid": "eg", "test": "hi"}
    assert {key: "".join(i.id for i in part) for key, part in dropped.items()} == {
        ("valid", "test"): "f",
        ("train", "test"): "a",
        ("train", "valid"): "b",
    }


def test_normalised_sentences():
    assert splits.normalise_sentence("  Don\u2019t, STOP\u2026 it's  fine! ") == "dont stop its fine"
    assert splits.normalise_sentence("don't stop, its fine") == "dont stop its fine"
    assert splits.normalise_sentence("?!") == splits.normalise_sentence(None) == ""


def test_two_offenders_are_named():
    parts = {
        "train": (Item("1", "us", "anna"), Item("2", "us", "bert"), Item("3", "us", "carl"), Item("4", "us", "")),
        "valid": (Item("5", "us", "dora"), Item("6", "us", "")),
        "test": (Item("7", "us", "bert"), Item("8", "us", "anna")),
    }
    with pytest.raises(DataError, match=r"2 speaker.*'anna' \(in train and test\), 'bert' \(in train and test\)"):
        splits.require_disjoint(parts)
    splits.require_disjoint({name: part for name, part in parts.items() if name != "test"})


def test_the_seed_matters():
    items = [Item(f"{speaker}", "us", f"c{speaker}") for speaker in range(40)]
    chosen = {
        seed: splits.by_speaker(items, valid_fraction=0.2, test_fraction=0.2, seed=seed)["test"] for seed in (1, 2)
    }
    assert chosen[1] != chosen[2]


DRAWS = [
    "a10 a11 a2 a3 a6 a7 a8 a9 b0 b1 b2 b3 b4 b5 b8 b9 | a0 a1 b6 b7 | a4 a5 b10 b11",
    # By hash, a has no test and b no valid: the speakers of a4 and b10 are the nearest.
    "a0 a1 a10 a11 a6 a7 b0 b1 b4 b5 b6 b7 | a2 a3 a8 a9 b10 b11 | a4 a5 b2 b3 b8 b9",
    "a1 a10 a11 a3 a5 a6 a8 a9 b0 b1 b10 b11 b2 b4 b6 b9 | a4 a7 b3 b7 | a0 a2 b5 b8",
    "a4 a5 a6 a7 a8 a9 b4 b5 b6 b7 b8 b9 | a10 a11 b0 b1 | a0 a1 a2 a3 b10 b11 b2 b3",
    "a0 a1 a10 a11 a6 a7 b10 b11 b4 b5 b8 b9 | a2 a3 b2 b3 | a4 a5 a8 a9 b0 b1 b6 b7",
    "a2 a3 a4 a5 a8 a9 b0 b1 b10 b11 b6 b7 | a0 a1 b2 b3 | a10 a11 a6 a7 b4 b5 b8 b9",
    "a0 a11 a2 a5 a7 a9 b1 b11 b2 b4 b6 b8",
    "b0 b5 b7 b9",
]


def draws(seed):
    """Names of the clips in each split, for 24 clips of 12 clients, in a line each."""
    items = [Item(f"{accent}{n}", accent, f"{accent}{n // 2}") for accent in "ab" for n in range(12)]
    fractions = {"valid_fraction": 0.2, "test_fraction": 0.2, "seed": seed}
    made = [
        splits.by_speaker(items, **fractions),
        splits.by_hash(items, **fractions),
        splits.at_random(items, **fractions),
        *splits.folds(items, 3, valid_fraction=0.2, seed=seed),
        {"kept": splits.cap(items, 1, seed).kept},
        {"dropped": splits.downsample(items[:8] + items[12:], seed).dropped},
    ]
    return [" | ".join(" ".join(item.id for item in part) for part in parts.values()) for parts in made]


def test_draws_are_those_of_earlier_versions():
    """Data that were prepared with an older version, and a later preparation of them, have the same splits."""
    assert draws(1) == DRAWS


def test_every_draw_depends_on_the_seed():
    assert not set(draws(1)) & set(draws(2))


def test_without_a_limit_every_clip_is_kept():
    items = [Item(name, "us", "anna") for name in "cab"]
    assert splits.cap(items, None, 1) == splits.Choice(tuple(sorted(items, key=lambda item: item.id)), ())


def test_a_client_keeps_its_split_whatever_is_added():
    items = [Item(f"{accent}{n}", accent, f"{accent}{n // 2}") for accent in "ab" for n in range(400)]
    parts = splits.by_hash(items, valid_fraction=0.3, test_fraction=0.2, seed=1)
    splits.require_disjoint(parts)
    assert {split: round(len(part) / len(items), 1) for split, part in parts.items()} == {
        "train": 0.5,
        "valid": 0.3,
        "test": 0.2,
    }
    fewer = splits.by_hash(items[::3], valid_fraction=0.3, test_fraction=0.2, seed=1)
    assert all(set(fewer[split]) <= set(parts[split]) for split in splits.SPLITS)


def test_a_large_corpus_keeps_the_splits_of_earlier_versions():
    items = [Item(f"{a}{n}", a, f"{a}{n // 2}") for a in ("us", "england", "australia") for n in range(400)]
    parts = splits.by_hash(items, valid_fraction=0.1, test_fraction=0.1, seed=1986)
    text = "\n".join(f"{split} {item.id}" for split, part in parts.items() for item in part)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "067abcb7d82a2b0449922a4c470f405cabb138f8acd96e2390a0de087481bafb"
    )


@pytest.mark.parametrize("seed", range(20))
def test_three_speakers_are_enough_to_fill_the_splits_by_hash(seed):
    items = [Item(f"{accent}{n}", accent, f"{accent}{n}") for accent in ACCENTS for n in range(3)]
    parts = splits.by_hash(items, valid_fraction=0.1, test_fraction=0.1, seed=seed)
    splits.require_disjoint(parts)
    assert {split: Counter(i.accent for i in part) for split, part in parts.items()} == dict.fromkeys(
        splits.SPLITS, Counter(ACCENTS)
    )


def test_the_nearest_speakers_by_hash_fill_an_empty_split():
    """With thresholds 0.2 and 0.4, and places 0.45, 0.5 and 0.9, the first goes to test and the second to valid."""
    places = {name: splits.rank(1, "split", "us", name) / 2**64 for name in map(str, range(3000))}
    chosen = [next(n for n, place in places.items() if at < place < at + 0.01) for at in (0.9, 0.5, 0.45)]
    items = [Item(name, "us", name) for name in chosen]
    parts = splits.by_hash(items, valid_fraction=0.2, test_fraction=0.2, seed=1)
    assert {split: [item.id for item in part] for split, part in parts.items()} == {
        "train": [chosen[0]],
        "valid": [chosen[1]],
        "test": [chosen[2]],
    }


def test_too_few_speakers_are_left_where_their_hash_puts_them():
    items = [Item(name, "us", name) for name in "ab"]
    parts = splits.by_hash(items, valid_fraction=0.001, test_fraction=0.001, seed=1)
    assert [len(parts[split]) for split in splits.SPLITS] == [2, 0, 0]


@settings(deadline=None, max_examples=60)
@example([Item(f"{n}", "australia", f"australia{n}") for n in range(5)], 0, 3)
@given(pools(), seeds, st.integers(0, 60))
def test_when_data_are_added_at_most_two_speakers_of_an_accent_move(items, seed, known):
    """And none of an accent in which no split had to be filled.

    In the example, test has two of three speakers by hash, so one of them fills valid. Of five speakers test has three,
    and the fourth fills valid.
    """
    fractions = {"valid_fraction": 0.2, "test_fraction": 0.3, "seed": seed}
    before = splits.by_hash(items[:known], **fractions)
    after = splits.by_hash(items, **fractions)
    old, new = (
        {(i.accent, i.speaker): split for split, part in parts.items() for i in part} for parts in (before, after)
    )
    places = {unit: splits.rank(seed, "split", *unit) / 2**64 for unit in new}
    by_hash = {unit: "test" if p < 0.3 else "valid" if p < 0.5 else "train" for unit, p in places.items()}
    moved = [unit for unit in old if old[unit] != new[unit]]
    assert max(Counter(accent for accent, _ in moved).values(), default=0) <= 2
    settled = {accent for accent, _ in old if len({by_hash[unit] for unit in old if unit[0] == accent}) == 3}
    assert not [unit for unit in moved if unit[0] in settled]


def test_a_fraction_of_zero_makes_no_split():
    items = [Item(f"{speaker}", "us", f"c{speaker}") for speaker in range(4)]
    assert list(splits.by_speaker(items, valid_fraction=0.2, test_fraction=0, seed=1)) == ["train", "valid"]


def test_random_split_shares_speakers_on_purpose():
    items = [Item(f"{speaker}-{clip}", "us", f"c{speaker}") for speaker in range(4) for clip in range(20)]
    parts = splits.at_random(items, valid_fraction=0.2, test_fraction=0.2, seed=1)
    assert {split: len(part) for split, part in parts.items()} == {"train": 48, "valid": 16, "test": 16}
    with pytest.raises(DataError, match="in more than one split"):
        splits.require_disjoint(parts)


def test_too_few_speakers():
    items = [Item(f"{speaker}", "us", f"c{speaker}") for speaker in range(2)]
    with pytest.raises(DataError, match=r"us has 2 speaker\(s\), too few for train, valid, test"):
        splits.by_speaker(items, valid_fraction=0.1, test_fraction=0.1, seed=1)
    with pytest.raises(DataError, match=r"us has 2 speaker\(s\), 5 folds need 5"):
        splits.folds(items, 5, valid_fraction=0.1, seed=1)
    with pytest.raises(DataError, match="choose 2 or more"):
        splits.folds(items, 1, valid_fraction=0.1, seed=1)


def test_items_without_speaker_stand_for_themselves():
    items = [Item(str(k), "us") for k in range(10)]
    parts = splits.by_speaker(items, valid_fraction=0.2, test_fraction=0.2, seed=1)
    assert {split: len(part) for split, part in parts.items()} == {"train": 6, "valid": 2, "test": 2}
    assert splits.cap(items, 1, 1).dropped == ()


def test_words_and_sentences_of_test_are_looked_up_in_training():
    training = [Item("a", "us", sentence="the cat sat"), Item("b", "england", sentence="a dog"), Item("c", "us")]
    tested = [
        Item("same", "us", sentence="a dog"),
        Item("words", "us", sentence="the dog sat the cat"),
        Item("some", "us", sentence="the catalogue"),
        Item("unknown", "us"),
    ]
    assert splits.seen_in_training(tested, training) == {
        "same": ("2/2", "yes"),
        "words": ("5/5", "no"),
        "some": ("1/2", "no"),
    }
