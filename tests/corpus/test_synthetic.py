"""The built-in corpus: the laws that make only the accent tell, and what happens when it is there or half made."""

import io
import itertools
import json
import random
import sys

import numpy as np
import pytest
import soundfile as sf

from accent_plugin.corpus import synthetic
from accent_plugin.corpus.synthetic import ACCENTS, GENDERS, Espeak, compose, espeak, main, make_corpus, plan
from accent_plugin.data import dataset_dict
from accent_plugin.errors import DataError

loader = pytest.importorskip(
    "espeakng_loader", reason="eSpeak NG is not installed: pip install accent_plugin[synthetic]"
)
SMALL = {"seed": 3, "voices": 6, "clips_per_voice": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus: its folder, its card, and its splits as lists of rows with undecoded audio."""
    from datasets import Audio, load_from_disk

    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    card = make_corpus(folder, **SMALL)
    splits = load_from_disk(folder)
    assert splits["train"].features["audio"] == Audio(sampling_rate=16000)
    return folder, card, {name: list(rows.cast_column("audio", Audio(decode=False))) for name, rows in splits.items()}


def decode(row):
    return sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")


# The plan: no sound yet


def test_every_voice_reads_the_same_sentences_in_every_accent():
    for rows in plan(voices=12).values():
        read = {accent: [] for accent in ACCENTS}
        for row in rows:
            manner = (row["variant"], row["rate"], row["pitch"], row["pitch_range"], row["gender"])
            read[row["accent"]].append((row["sentence"], *manner))
            assert row["client_id"] == f"{row['accent']}-{row['variant']}"
        assert read["us"] == read["england"] == read["scotland"]


def test_a_voice_and_a_sentence_are_in_one_split_only():
    clips = plan()
    assert list(clips) == ["train", "validation", "test"]
    for column in ("variant", "client_id", "sentence", "path"):
        sets = [{row[column] for row in rows} for rows in clips.values()]
        assert all(not one & other for one, other in itertools.combinations(sets, 2)), column


def test_the_usual_corpus_has_48_voices_of_both_genders_everywhere():
    clips = plan()
    assert [len({row["variant"] for row in rows}) for rows in clips.values()] == [32, 8, 8]
    assert [len(rows) for rows in clips.values()] == [32 * 16 * 3, 8 * 16 * 3, 8 * 16 * 3]
    assert all({row["gender"] for row in rows} == {"female", "male"} for rows in clips.values())


@pytest.mark.parametrize("voices", [6, 7, 13, 24, 48])
def test_any_number_of_voices_fills_every_split(voices):
    clips = plan(voices=voices, clips_per_voice=1)
    assert sum(len(rows) for rows in clips.values()) == voices * len(ACCENTS)
    assert all(rows for rows in clips.values())


def test_a_seed_gives_the_same_clips_and_another_seed_others():
    assert plan(seed=1, voices=6) == plan(seed=1, voices=6)
    assert plan(seed=1, voices=6) != plan(seed=2, voices=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"voices": 5}, "voices is 5; choose 6 to 48"),
        ({"voices": 49}, "voices is 49; choose 6 to 48"),
        ({"clips_per_voice": 0}, "clips_per_voice is 0; choose 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        plan(**arguments)


# The sound


def test_clips_are_16_khz_mono_of_2_to_6_seconds_and_equally_loud(corpus):
    for row in itertools.chain(*corpus[2].values()):
        wave, rate = decode(row)
        assert rate == 16000 and wave.ndim == 1 and 2 * rate <= len(wave) <= 6 * rate
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(synthetic.LEVEL, rel=0.02) or np.abs(wave).max() > 0.98


def test_the_longest_and_shortest_sentences_of_the_extreme_voices_fit():
    # m4 was seen to be the slowest voice and m3 the fastest, all sentences and accents being equal.
    texts = sorted((compose(random.Random(seed)) for seed in range(300)), key=len)
    said = [
        len(espeak().speak(text, voice, variant, rate)) / espeak().sample_rate
        for text, rate, variant in [(texts[0], synthetic.RATES[1], "m3"), (texts[-1], synthetic.RATES[0], "m4")]
        for voice in ACCENTS.values()
    ]
    assert 2.0 <= min(said) and max(said) <= 6.0


def test_rows_on_disk_are_the_plans(corpus):
    clips = plan(**SMALL)
    assert list(corpus[2]) == list(clips)
    for split, rows in corpus[2].items():
        assert set(rows[0]) == {"audio", "accent", "client_id", "sentence", "gender", "path"}
        for row, planned in zip(rows, clips[split], strict=True):
            assert {name: row[name] for name in synthetic.COLUMNS} == {
                name: planned[name] for name in synthetic.COLUMNS
            }
            assert row["audio"]["path"] == row["path"]


def spectrum(wave):
    """Power in 20 bands up to the Nyquist frequency, as shares."""
    power = np.abs(np.fft.rfft(wave, 1 << 17)) ** 2
    bands = np.array([band.sum() for band in np.array_split(power, 20)])
    return bands / bands.sum()


def test_accents_sound_different_with_voice_and_sentence_the_same(corpus):
    rows = corpus[2]["train"]
    for us, england, scotland in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        assert us["sentence"] == england["sentence"] == scotland["sentence"]
        shapes = [spectrum(decode(row)[0]) for row in (us, england, scotland)]
        assert all(np.abs(one - other).sum() > 0.05 for one, other in itertools.combinations(shapes, 2))


def test_every_voice_exists_speaks_and_sounds_like_no_other():
    text = "The captain parked the car near the harbour."
    variants = [variant for names in GENDERS.values() for variant in names]
    shapes = {variant: spectrum(espeak().speak(text, "gmw/en-US", variant)) for variant in variants}
    assert len(shapes) == len(variants) == 48
    for one, other in itertools.combinations(shapes, 2):
        assert np.abs(shapes[one] - shapes[other]).sum() > 1e-3, (one, other)


def test_pitch_and_rate_are_obeyed():
    slow, fast = (espeak().speak("The harbour is near the castle.", "gmw/en-US", "m1", rate) for rate in (135, 170))
    assert len(fast) < 0.9 * len(slow)
    low, high = (espeak().speak("The harbour is near.", "gmw/en-US", "adam", pitch=pitch) for pitch in (0, 99))
    assert np.abs(spectrum(low) - spectrum(high)).sum() > 0.05


def test_a_voice_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="no voice 'gmw/en-XX'"):
        espeak().speak("Hello.", "gmw/en-XX", "f1")
    # eSpeak itself would speak with the plain voice.
    with pytest.raises(DataError, match="no variant 'f99'"):
        espeak().speak("Hello.", "gmw/en-US", "f99")


# The folder


def test_the_card_says_what_it_is(corpus):
    folder, card, _ = corpus
    assert json.loads((folder / dataset_dict.CARD_JSON).read_text(encoding="utf-8")) == card
    assert card["synthetic"] is True and "eSpeak NG" in card["name"] and "nothing about accuracy" in card["note"]
    assert card["seed"] == 3 and card["espeak_version"].startswith("1.")


def test_a_second_time_it_does_nothing_and_says_so(corpus, monkeypatch):
    folder, card, _ = corpus
    said = []
    monkeypatch.setattr(synthetic, "espeak", lambda: pytest.fail("it spoke again"))
    assert make_corpus(folder, **SMALL, say=said.append) == card
    assert len(said) == 1 and "nothing to do" in said[0]


def test_other_arguments_are_refused(corpus):
    with pytest.raises(DataError, match="other arguments: seed was 3, not 4\ndelete it"):
        make_corpus(corpus[0], **{**SMALL, "seed": 4})


@pytest.mark.parametrize("name", ["notes.txt", "accent_plugin.json"])
def test_somebody_elses_folder_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="is no built-in corpus"):
        make_corpus(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_interrupted_it_leaves_nothing_behind(tmp_path, monkeypatch):
    spoken = itertools.count()
    real = synthetic._speak

    def interrupted(clip):
        if next(spoken) == 5:
            raise KeyboardInterrupt
        return real(clip)

    monkeypatch.setattr(synthetic, "_speak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_can_be_read_by_others(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    usual = folder.stat().st_mode
    make_corpus(folder, voices=6, clips_per_voice=1)
    assert folder.stat().st_mode == usual and [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_without_the_loader_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(synthetic, "espeak", espeak.__wrapped__)
    with pytest.raises(DataError, match=r"pip install accent_plugin\[synthetic\]"):
        make_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_deep_environment_does_not_stop_espeak(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 180)
    deep.mkdir()
    (deep / "espeak-ng-data").symlink_to(loader.get_data_path())
    asked = []

    class Library:
        """Takes the place of the library, whose one state other tests use."""

        def __init__(self, path):
            assert path == "library"
            self.espeak_Info = type("Info", (), {"restype": None, "__call__": lambda *_: b"1.52"})()

        def espeak_Initialize(self, _output, _buffer, path, _options):
            asked.append(path)
            return 22050

        def espeak_SetSynthCallback(self, _callback):
            return None

    monkeypatch.setattr(synthetic.ctypes, "CDLL", Library)
    speaker = Espeak("library", deep / "espeak-ng-data")
    assert len(asked[0]) <= Espeak.LONGEST_PATH and speaker.data == deep / "espeak-ng-data"


# The command


def test_the_command_prints_progress_to_stderr_and_errors_without_a_traceback(corpus, capsys):
    arguments = ["--out", str(corpus[0]), "--voices", "6", "--clips_per_voice", "2", "--seed"]
    assert main([*arguments, "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "nothing to do" in err
    assert main([*arguments, "4"]) == 2
    assert capsys.readouterr().err.startswith("DataError: ")


def test_a_folder_that_cannot_be_written_fails_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synthetic, "_speak", lambda _: pytest.fail("it spoke first"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["--out", str(tmp_path / "file" / "corpus")]) == 2
    assert "cannot write" in capsys.readouterr().err
