"""Predictions: numbers by hand with a stub network, every kind of audio, and files that nobody can classify."""

import dataclasses
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from helpers.dataset_dicts import encode, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin import packing
from accent_plugin.audio import codecs
from accent_plugin.audio.levels import frame_levels
from accent_plugin.bundle import load
from accent_plugin.bundle.write import write_bundle
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.encoder.masking import sample_counts
from accent_plugin.errors import AudioError, BundleError, ConfigError
from accent_plugin.evaluation.calibration import describe_calibration
from accent_plugin.inference import base, prefetch
from accent_plugin.inference import classifier as inference_classifier
from accent_plugin.inference.base import buckets
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.records import Failure, Prediction, Window
from accent_plugin.inference.windows import RecordingWindows
from accent_plugin.model import AccentModel

LABELS = ["us", "england", "australia"]
CURVE = {"threshold": [0.4, 0.6, 0.8, 0.9], "coverage": [1.0, 0.7, 0.3, 0.0], "risk": [0.3, 0.1, 0.2, None]}


class AsIs(torch.nn.Module):
    def forward(self, features, lengths=None):
        return features


class Mean(torch.nn.Module):
    """Embedding: the mean of a clip's own samples; remembers the shapes that it was called with."""

    def __init__(self):
        super().__init__()
        self.calls, self.modes = [], []

    def forward(self, wavs, lens):
        self.calls.append(tuple(wavs.shape))
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return (wavs.sum(dim=1) / sample_counts(wavs, lens)).view(-1, 1, 1)


class Tens(torch.nn.Module):
    """Scores 0, 10 m and -10 m for a mean m."""

    def forward(self, embeddings):
        return torch.log_softmax(embeddings * torch.tensor([0.0, 10.0, -10.0]), dim=-1)


class Labels:
    def decode_torch(self, index):
        return [LABELS[i] for i in index.tolist()]


def stub(calibration=None, **options):
    """A classifier whose scores follow from the samples' mean, so that they can be worked out by hand."""
    modules = {"compute_features": AsIs(), "mean_var_norm": AsIs(), "embedding_model": Mean(), "classifier": Tens()}
    hparams = {
        "label_encoder": Labels(),
        "sample_rate": 16_000,
        "bundle_config": {"labels": LABELS, "calibration": calibration},
    }
    return AccentClassifier(modules, hparams, {"device": "cpu"}, **options)


def calls(classifier):
    return classifier.mods.embedding_model.calls


def tone(seconds, mean=0.0, level=0.1):
    """Speech for the gate: a tone of whole periods every 10 ms, on an offset that the stub takes for the accent."""
    return (level * np.sin(2 * np.pi * 200 * np.arange(int(seconds * 16_000)) / 16_000) + mean).astype(np.float32)


def softmax(*scores):
    exponentials = np.exp(scores)
    return exponentials / exponentials.sum()


def values(prediction):
    return np.array(list(prediction.probabilities.values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_encoder):
    """A bundle of a tiny encoder with random weights."""
    torch.manual_seed(0)
    model = AccentModel(make_encoder(str(tiny_encoder("wav2vec2-group"))), LABELS)
    # Scores as far apart as a trained model's; drawn from N(0, 1) they would differ by ten.
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    scores = np.log([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
    calibration = describe_calibration(scores, np.array([0, 0, 0, 0]))
    target = tmp_path_factory.mktemp("inference") / "bundle"
    return write_bundle(target, model, LABELS, encoder_name="tiny", pooling="mean", calibration=calibration)


@pytest.fixture(scope="module")
def classifier(folder):
    return AccentClassifier.from_bundle(folder, device="cpu")


def test_a_prediction_by_hand():
    classifier = stub()
    prediction = classifier.predict(tone(2.0, mean=0.1), 16_000)
    expected = softmax(0, 1, -1)
    assert prediction.accent == prediction.decision == "england"
    assert values(prediction) == pytest.approx(expected, abs=1e-6)
    assert list(prediction.probabilities) == LABELS
    assert prediction.probability == prediction.probabilities["england"]
    assert (prediction.seconds, prediction.speech_seconds, prediction.reliable) == (2.0, 2.0, True)
    assert prediction.source is None
    assert prediction.windows == (Window(0.0, 2.0, prediction.probabilities),)
    assert str(prediction) == "england (0.67)"
    assert calls(classifier) == [(1, 32_000)]
    assert classifier.mods.embedding_model.modes == [(True, False)]


def test_records_are_frozen_and_travel():
    prediction = stub().predict(tone(2.0), 16_000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.accent = "us"
    assert pickle.loads(pickle.dumps(prediction)) == prediction
    assert json.loads(json.dumps(dataclasses.asdict(prediction)))["accent"] == prediction.accent
    assert str(Failure("a.wav", "empty", "a.wav holds no bytes")) == "empty: a.wav holds no bytes"


def test_windows_are_averaged_in_the_log_domain():
    classifier = stub(window_seconds=2.0, hop_seconds=1.0)
    # Four stretches of a second with means 0.3, 0.1, -0.1 and 0.1, and a quarter of one with 0.1.
    wave = np.concatenate([tone(1.0, mean) for mean in (0.3, 0.1, -0.1, 0.1)] + [tone(0.25, 0.1)])
    prediction = classifier.predict(wave, 16_000)
    # The last window, 2.25 to 4.25, has three quarters of -0.1 and five of 0.1 in eight.
    means = [0.2, 0.0, 0.0, 0.025]
    rows = [np.log(softmax(0, 10 * mean, -10 * mean)) for mean in means]
    assert [(w.start, w.end) for w in prediction.windows] == [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.25, 4.25)]
    for window, row in zip(prediction.windows, rows, strict=True):
        assert list(window.probabilities.values()) == pytest.approx(np.exp(row), abs=1e-5)
    assert values(prediction) == pytest.approx(softmax(*np.mean(rows, axis=0)), abs=1e-5)
    assert sum(values(prediction)) == pytest.approx(1.0, abs=1e-12)
    assert not any(window.skipped for window in prediction.windows)


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [(1.5, [0.0]), (2.0, [0.0]), (2.001, [0.0, 0.001]), (3.0, [0.0, 1.0]), (3.5, [0.0, 1.0, 1.5]), (4.0, [0, 1, 2])],
)
def test_the_last_window_ends_with_the_recording(seconds, starts):
    windows = stub(window_seconds=2.0, hop_seconds=1.0).predict(tone(seconds), 16_000).windows
    assert [window.start for window in windows] == pytest.approx(starts)
    assert windows[-1].end == pytest.approx(seconds)


def test_silence_is_skipped_and_not_sent_through_the_network():
    classifier = stub(window_seconds=2.0, hop_seconds=2.0, batch_seconds=2.0)
    # 66 dB below the speech, and above the absolute floor's 60 dB only in its last stretch.
    wave = np.concatenate([tone(2.0, 0.1, level=0.8), tone(2.0, -0.5, level=0.0004), tone(2.0, -0.5, level=0.004)])
    prediction = classifier.predict(wave, 16_000)
    assert [window.skipped for window in prediction.windows] == [False, True, True]
    assert values(prediction) == pytest.approx(softmax(0, 1, -1), abs=1e-6)
    # The offset changes at the borders, in one frame of each: that is a step, and steps are loud.
    assert prediction.speech_seconds == pytest.approx(2.0, abs=0.06)
    assert (prediction.seconds, prediction.reliable, calls(classifier)) == (6.0, True, [(1, 32_000)])


def test_the_answer_does_not_depend_on_when_the_loud_part_comes():
    quiet, loud = tone(6.0, level=0.002), tone(6.0, level=0.8)
    classifier = stub(window_seconds=2.0, hop_seconds=2.0)
    for parts in itertools.permutations([quiet, loud]):
        recording = RecordingWindows(32_000, 32_000)
        jobs = [job for part in parts for block in np.split(part, 3) for job in recording.feed(block)]
        jobs += recording.feed(np.zeros(0, np.float32), last=True)
        classifier.score(jobs)
        streamed = classifier.answer([recording], None)
        # 52 dB lie between them. Before the loud part is heard, quiet windows have to be scored, and yet do not count.
        assert sum(not window.skipped for window in streamed.windows) == 3
        assert len(jobs) == (5 if parts[0] is quiet else 3)
        assert streamed == classifier.predict(np.concatenate(parts), 16_000)


def test_a_click_is_not_taken_for_speech():
    wave = tone(4.0, level=0.005)
    wave[1000:1100] += 0.9
    assert stub().predict(wave, 16_000).speech_seconds == pytest.approx(4.0, abs=0.05)


def test_without_speech_the_strongest_window_answers():
    classifier = stub(window_seconds=2.0, hop_seconds=2.0)
    wave = np.concatenate([tone(2.0, level=0.0003), tone(2.0, 0.1, level=0.0005), tone(2.0, level=0.0004)])
    # Without the steps between the offsets, which would be speech.
    wave[32_000:64_000] = tone(2.0, 0.0, level=0.0005)
    prediction = classifier.predict(wave, 16_000)
    assert [window.skipped for window in prediction.windows] == [True, False, True]
    assert (prediction.speech_seconds, prediction.reliable, len(calls(classifier))) == (0.0, False, 1)


@pytest.mark.parametrize(("seconds", "reliable"), [(0.005, False), (0.99, False), (1.0, True)])
def test_under_a_second_of_speech_is_unreliable(seconds, reliable):
    prediction = stub().predict(tone(seconds), 16_000)
    assert prediction.speech_seconds == pytest.approx(seconds, abs=1e-4)
    assert prediction.reliable is reliable


def test_levels_by_hand():
    # A square wave of amplitude 0.1 has a variance of 0.01, whatever its offset; the third frame is half of it.
    square = np.where(np.arange(640) % 2, 0.1, -0.1).astype(np.float32) + np.float32(0.3)
    square[520:] = 0.3
    levels = frame_levels(square, 4)
    half = 10 * np.log10(0.01 * 200 / 320)
    assert levels[:2] == pytest.approx([-20, 10 * np.log10(0.01 * 360 / 400)], abs=1e-3)
    assert levels[2] == pytest.approx(half, abs=1e-3)
    assert levels[3] == pytest.approx(10 * np.log10(0.01 * 40 / 160), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({}, None),
        ({"min_probability": 0.7}, 0.7),
        # Not 0.8: deciding more at the same risk is better.
        ({"max_risk": 0.2}, 0.6),
        ({"max_risk": 0.3}, 0.4),
        ({"min_coverage": 0.5}, 0.6),
        ({"min_coverage": 0.3}, 0.8),
        ({"min_coverage": 0}, 0.8),
    ],
)
def test_thresholds_by_hand(options, threshold):
    assert stub({"temperature": 1.0, "clips": 9, "curve": CURVE}, **options).threshold == threshold


def test_abstaining():
    # softmax(0, 1, -1) gives 0.665 to england.
    assert stub(min_probability=0.66).predict(tone(2.0, 0.1), 16_000).decision == "england"
    prediction = stub(min_probability=0.67).predict(tone(2.0, 0.1), 16_000)
    assert (prediction.accent, prediction.decision) == ("england", None)
    assert str(prediction) == "undecided: england (0.67)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_risk": 0.05}, "lowest risk that validation reached is 0.1, with a coverage of 0.7"),
        ({"max_risk": 0.2, "min_coverage": 0.5}, "max_risk and min_coverage are given: choose one"),
        ({"min_probability": 0.2, "max_risk": 0.5}, "min_probability and max_risk are given"),
        ({"min_probability": 1.5}, "min_probability is 1.5: give a fraction from 0 to 1"),
        ({"min_probability": float("nan")}, "min_probability is nan"),
        ({"min_coverage": True}, "min_coverage is True"),
        ({"precision": "fp16"}, "precision 'fp16' is unknown; choose one of fp32, bf16, auto"),
        ({"window_seconds": 0}, "window_seconds is 0: give 0.1 or more"),
        ({"window_seconds": 2, "hop_seconds": 3}, "hop_seconds is 3: give 0.01 to window_seconds, which is 2"),
        ({"batch_seconds": -1}, "batch_seconds is -1"),
        ({"precision": "x", "batch_seconds": 0}, "batch_seconds is 0.*\n.*precision 'x'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        stub({"temperature": 1.0, "clips": 9, "curve": CURVE}, **options)


def test_without_calibration_there_is_no_risk():
    for options in ({"max_risk": 0.1}, {"min_coverage": 0.9}):
        with pytest.raises(ConfigError, match="the bundle was not calibrated.*min_probability"):
            stub(**options)


def test_both_doors_of_a_bundle_agree(folder, tmp_path):
    wave = noise(1.5)
    direct = AccentClassifier.from_bundle(folder, device="cpu", max_risk=0.1)
    through_yaml = AccentClassifier.from_hparams(
        str(folder), savedir=tmp_path / "saved", run_opts={"device": "cpu"}, max_risk=0.1
    )
    # The third of the four clips is wrong, and surer than the fourth: only the first two are decided.
    assert direct.threshold == through_yaml.threshold == direct.calibration["curve"]["threshold"][1]
    assert direct.labels == through_yaml.labels == tuple(LABELS)
    assert values(direct.predict(wave, 16_000)) == pytest.approx(values(through_yaml.predict(wave, 16_000)), abs=1e-6)
    stock = direct.classify_batch(torch.from_numpy(wave)[None])[0].exp()[0].tolist()
    assert values(direct.predict(wave, 16_000)) == pytest.approx(stock, abs=1e-6)


def test_from_bundle_runs_no_yaml(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "bundle")
    (copy / load.YAML_FILE).write_text("boom: !apply:os._exit [3]\n")
    assert AccentClassifier.from_bundle(copy, device="cpu").labels == tuple(LABELS)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(BundleError):
        AccentClassifier.from_bundle(tmp_path)
    with pytest.raises(ConfigError, match="no bundle_config with labels"):
        AccentClassifier({}, {"label_encoder": Labels()})


def as_kinds(wave):
    """The same sound as every kind of array."""
    steps = np.rint(wave * 32768).astype(np.int16)
    exact = (steps / 32768).astype(np.float32)
    yield exact
    yield exact.astype(np.float64)
    yield exact.tolist()
    yield steps
    yield steps.astype(np.int32) << 16
    yield (steps.astype(np.int32) + 32768).astype(np.uint16)
    yield torch.from_numpy(exact)
    yield torch.from_numpy(steps)
    yield torch.from_numpy(exact).double().requires_grad_()
    yield exact[None]
    yield exact[:, None]
    yield torch.from_numpy(np.stack([exact] * 8))
    yield np.stack([exact] * 8, axis=1)
    yield np.stack([exact, 0 * exact, 2 * exact])
    # Not contiguous, and of the other byte order.
    yield np.stack([exact, exact], axis=1)[:, 0]
    yield exact.astype(">f4")


def test_any_array(classifier):
    wave = noise(1.2)
    kinds = list(as_kinds(wave))
    expected = values(classifier.predict(kinds[0], 16_000))
    for prediction in classifier.predict_batch(kinds):
        assert values(prediction) == pytest.approx(expected, abs=1e-5)
        assert prediction.seconds == 1.2
    for coarse in (np.rint(wave * 128).astype(np.int8), (np.rint(wave * 128) + 128).astype(np.uint8)):
        assert values(classifier.predict(coarse, 16_000)) == pytest.approx(expected, abs=0.05)
    for coarse in (torch.from_numpy(wave).bfloat16(), torch.from_numpy(wave).half(), wave.astype(np.float16)):
        assert values(classifier.predict(coarse, 16_000)) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 96_000, 192_000, np.int64(22_050), 22_050.0])
def test_any_rate(rate):
    wave = np.interp(np.arange(2 * rate) / rate, np.arange(32_000) / 16_000, tone(2.0, 0.1)).astype(np.float32)
    prediction = stub().predict(wave, rate)
    assert values(prediction) == pytest.approx(softmax(0, 1, -1), abs=2e-3)
    assert prediction.seconds == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("wave", "rate", "reason", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "empty", "holds no samples"),
        (np.zeros(16_000), 16_000, "silent", "all samples are equal"),
        (np.full(16_000, 0.5), 16_000, "silent", "all samples are equal"),
        (np.array([0.1, np.nan, 0.2]), 16_000, "non-finite", "NaN or infinite"),
        (np.array([0.1, 1e300, 0.2]), 16_000, "non-finite", "NaN or infinite"),
        (np.array([0.1, 1e25, 0.2]), 16_000, "out of range", "full scale, which is 1: divide 16-bit integers"),
        (np.array([0.5, -0.5]), 192_000, "empty", "shorter than one sample"),
        (np.arange(100), 16_000, "undecodable", "int64 are not supported"),
        (np.ones(100, bool), 16_000, "undecodable", "bool"),
        (np.array(["a", "b"]), 16_000, "undecodable", "are not supported"),
        ([[0.1, 0.2], [0.3]], 16_000, "undecodable", "not an array of samples"),
        (0.5, 16_000, "undecodable", r"shape \(\)"),
        (np.zeros((2, 3, 4)), 16_000, "undecodable", "is not one clip"),
        (np.zeros((64, 16_000)), 16_000, "undecodable", "a batch as a list of clips"),
        ("a.wav", 16_000, "undecodable", "use predict_file for files"),
        (tone(1.0), 0, "undecodable", "sample rate of 0 Hz"),
        (tone(1.0), float("nan"), "undecodable", "sample rate of nan Hz"),
        (tone(1.0), None, "undecodable", "sample rate of None Hz"),
    ],
)
def test_arrays_that_are_no_audio(wave, rate, reason, message):
    with pytest.raises(AudioError, match=message) as caught:
        stub().predict(wave, rate)
    assert caught.value.reason == reason


def test_a_bad_clip_of_a_batch_is_named():
    with pytest.raises(AudioError, match=r"waves\[1\]: .*all samples are equal"):
        stub().predict_batch([tone(1.0), np.zeros(100)])
    assert stub().predict_batch([]) == []


class Spoilt(torch.nn.Module):
    """What a network of NaN weights scores: clips that are louder than 0.5 only, so that batches mix the two."""

    def forward(self, wavs, lens):
        return torch.where(wavs.abs().amax(dim=1) > 0.5, torch.nan, 0.0).view(-1, 1, 1)


def test_an_answer_is_never_nan(tmp_path):
    classifier = stub()
    classifier.mods.embedding_model = Spoilt()
    loud, quiet = tone(1.0, level=0.9), tone(1.0)
    for door in (lambda: classifier.predict(loud, 16_000), lambda: classifier.predict_file(encode(loud))):
        with pytest.raises(AudioError, match="scores that are not finite") as caught:
            door()
        assert caught.value.reason == "non-finite"
    answers = list(classifier.predict_files([encode(quiet), encode(loud), encode(quiet)]))
    assert [type(answer) for answer in answers] == [Prediction, Failure, Prediction]
    assert answers[1].reason == "non-finite"


@pytest.mark.parametrize("factor", [1e4, 1e20, 3e37])
def test_samples_far_beyond_full_scale_get_no_answer(classifier, factor):
    wave = noise() * np.float32(factor)
    for answer in classifier.predict_files([encode(wave, format="WAV", subtype="FLOAT")]):
        assert answer.reason == "out of range"
        assert "divide 16-bit integers" in answer.message


KINDS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("format", "subtype"), KINDS)
def test_any_file(format, subtype, tmp_path):
    encoded = encode(np.stack([tone(2.0, 0.1)] * 2, axis=1), 16_000, format, subtype)
    path = tmp_path / "clip.bin"
    path.write_bytes(encoded)
    classifier = stub()
    expected = values(classifier.predict(codecs.load(encoded), 16_000))
    with open(path, "rb") as file:
        pipe = io.BufferedReader(Pipe(encoded))
        for source in (
            path,
            str(path),
            encoded,
            bytearray(encoded),
            memoryview(encoded),
            io.BytesIO(encoded),
            file,
            pipe,
        ):
            prediction = classifier.predict_file(source)
            assert values(prediction) == pytest.approx(expected, abs=1e-6)
            assert prediction.source == (str(path) if source in (path, str(path), file) else None)


class Pipe(io.RawIOBase):
    """Bytes that can only be read once, forwards."""

    def __init__(self, content):
        self.content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, target):
        return self.content.readinto(target)


def test_a_file_is_streamed_to_the_same_answer(tmp_path, monkeypatch, classifier):
    wave = np.concatenate([noise(7.3), 1e-5 * noise(6.0, seed=1), noise(4.0, seed=2)])
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    classifier = AccentClassifier(
        dict(classifier.mods.items()), vars(classifier.hparams), {"device": "cpu"}, window_seconds=2.0, hop_seconds=1.5
    )
    expected = classifier.predict(wave, 16_000)
    assert [window.skipped for window in expected.windows].count(True) == 3
    for seconds in (1.0, 2.7, 60.0):
        for room in (base, prefetch):
            monkeypatch.setattr(room, "BLOCK_SECONDS", seconds)
        (answer,) = classifier.predict_files([tmp_path / "a.wav"])
        for prediction in (classifier.predict_file(tmp_path / "a.wav"), answer):
            assert values(prediction) == pytest.approx(values(expected), abs=1e-5)
            assert prediction.speech_seconds == expected.speech_seconds
            skipped = [(window.start, window.end, window.skipped) for window in prediction.windows]
            assert skipped == [(window.start, window.end, window.skipped) for window in expected.windows]


def test_a_recording_holds_a_window_and_a_block():
    recording = RecordingWindows(32_000, 16_000)
    recording.feed(noise(2.0))
    for number in range(1, 50):
        recording.feed(noise(2.0, seed=number))
        held = [recording._kept, recording._unframed, recording._loudest, recording._loudest_window[1].samples]
        # With what each is a view of.
        sizes = [(array if array.base is None else array.base).size for array in held]
        assert sum(sizes) < 16_000 * (2 + 2 + 2 + 2)
    assert len(recording._levels) == pytest.approx(100 * 100, abs=3)


def bad_files(tmp_path):
    """Path -> reason of its failure."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "no_samples.wav").write_bytes(encode(np.zeros(0, np.float32), format="WAV"))
    (tmp_path / "silent.flac").write_bytes(encode(np.zeros(16_000, np.float32)))
    broken = noise()
    broken[7] = np.nan
    (tmp_path / "nan.wav").write_bytes(encode(broken, format="WAV", subtype="FLOAT"))
    (tmp_path / "cut.flac").write_bytes(encode(noise())[:3000])
    return {
        "pipe.wav": "undecodable",
        "folder.wav": "undecodable",
        "text.wav": "undecodable",
        "empty.wav": "empty",
        "no_samples.wav": "empty",
        "silent.flac": "silent",
        "nan.wav": "non-finite",
        "cut.flac": "undecodable",
        "absent.wav": "undecodable",
    }


def test_bad_files_do_not_stop_the_good_ones(tmp_path):
    reasons = bad_files(tmp_path)
    soundfile.write(tmp_path / "good.wav", tone(1.0), 16_000)
    sources = [path for name in reasons for path in (tmp_path / name, tmp_path / "good.wav")]
    answers = list(stub().predict_files([*sources, None, 7, b"", encode(tone(1.0))]))
    assert [answer.source for answer in answers[: len(sources)]] == [str(path) for path in sources]
    for failure, (name, reason) in zip(answers[: len(sources) : 2], reasons.items(), strict=True):
        assert isinstance(failure, Failure)
        assert failure.reason == reason, name
        assert failure.message
    assert all(isinstance(answer, Prediction) for answer in answers[1 : len(sources) : 2])
    assert [type(answer) for answer in answers[len(sources) :]] == [Failure, Failure, Failure, Prediction]
    for name, reason in reasons.items():
        with pytest.raises(AudioError) as caught:
            stub().predict_file(tmp_path / name)
        assert caught.value.reason == reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "secret.wav").write_bytes(encode(noise(), format="WAV"))
    (tmp_path / "secret.wav").chmod(0)
    (failure,) = stub().predict_files([tmp_path / "secret.wav"])
    assert failure.reason == "undecodable"


def test_permission_denied_is_a_failure(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(codecs.os, "open", refused)
    (failure,) = stub().predict_files([tmp_path / "secret.wav"])
    assert failure == Failure(str(tmp_path / "secret.wav"), "undecodable", failure.message)
    assert "Permission denied" in failure.message


def test_batches_have_similar_lengths_and_answers_their_order():
    classifier = stub(batch_seconds=4.0)
    lengths = [1.0, 3.0, 1.1, 0.1, 3.0, 1.0]
    waves = [tone(seconds, mean=number / 50) for number, seconds in enumerate(lengths)]
    answers = list(classifier.predict_files([encode(wave, format="WAV", subtype="FLOAT") for wave in waves], workers=2))
    assert [answer.seconds for answer in answers] == lengths
    for number, answer in enumerate(answers):
        assert values(answer) == pytest.approx(softmax(0, number / 5, -number / 5), abs=1e-5)
    assert calls(classifier) == [(1, 48_000), (1, 48_000), (3, 17_600), (1, 1600)]


def test_buckets_by_hand():
    assert list(buckets([5, 5, 5, 5], 10)) == [[0, 1], [2, 3]]
    # With the third, padding would make 30 of 21.
    assert list(buckets([1, 10, 10], 100)) == [[1, 2], [0]]
    assert list(buckets([50, 60], 10)) == [[1], [0]]
    assert list(buckets([], 10)) == []


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(40, 30_000), min_size=1, max_size=5),
    others=st.lists(st.integers(40, 30_000), max_size=2),
    random=st.randoms(use_true_random=False),
)
def test_a_prediction_depends_on_its_clip_alone(classifier, lengths, others, random):
    clips = [noise(2.0, seed=seed)[:length] for seed, length in enumerate(lengths + others)]
    order = random.sample(range(len(clips)), len(clips))
    together = classifier.predict_batch([clips[index] for index in order])
    for index, prediction in zip(order, together, strict=True):
        alone = classifier.predict(clips[index], 16_000)
        assert np.log(values(prediction)) == pytest.approx(np.log(values(alone)), abs=1e-5)
        assert (prediction.seconds, prediction.speech_seconds) == (alone.seconds, alone.speech_seconds)


def test_files_are_drawn_as_they_are_needed():
    drawn = []

    def sources():
        for number in itertools.count():
            drawn.append(number)
            yield encode(tone(1.0, level=0.1 + number / 1e6), format="WAV")

    threads = threading.active_count()
    answers = stub(batch_seconds=2.0).predict_files(sources(), workers=3)
    assert not drawn
    for _ in range(20):
        assert next(answers).seconds == 1.0
    # Two rounds of 16 s, as much read ahead, and one for each thread.
    assert len(drawn) <= 2 * 16 + 16 + 3
    answers.close()
    assert threading.active_count() == threads
    count = len(drawn)
    assert list(answers) == []
    assert len(drawn) == count


def test_an_error_of_the_callers_iterator_reaches_the_caller():
    def sources():
        yield encode(tone(1.0))
        raise RuntimeError("the list of files is gone")

    threads = threading.active_count()
    answers = stub().predict_files(sources(), workers=2)
    assert isinstance(next(answers), Prediction)
    with pytest.raises(RuntimeError, match="the list of files is gone"):
        next(answers)
    assert threading.active_count() == threads


class Broken(io.BytesIO):
    """A file object with an error of its own."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def seekable(self):
        return False

    def read(self, size=-1):
        raise self.error


def test_an_error_of_a_file_object_is_its_own_failure():
    good = encode(tone(1.0))
    answers = list(stub().predict_files([good, Broken(RuntimeError("the socket is gone")), good], workers=2))
    assert [type(answer) for answer in answers] == [Prediction, Failure, Prediction]
    assert str(answers[1]) == "undecodable: the file cannot be read: RuntimeError: the socket is gone"


def truncated_wav(seconds, announced):
    content = encode(tone(announced, mean=0.1), format="WAV")
    return content[: 44 + int(seconds * 32_000)]


@pytest.mark.parametrize(("seconds", "announced"), [(3.0, 4.5), (100.0, 103.0)])
def test_a_prediction_says_what_was_lost(seconds, announced):
    content, classifier = truncated_wav(seconds, announced), stub()
    (batched,) = classifier.predict_files([content])
    for prediction in (classifier.predict_file(content), batched):
        assert prediction.seconds == seconds
        assert [(loss.start, loss.seconds) for loss in prediction.lost] == [(seconds, announced - seconds)]
        assert prediction.lost_seconds == announced - seconds
        assert prediction.accent == "england"
    sound = classifier.predict_file(encode(tone(3.0, mean=0.1), format="WAV"))
    assert (sound.lost, sound.lost_seconds) == ((), 0)


def test_a_file_of_which_less_than_half_is_left_is_a_failure():
    (answer,) = stub().predict_files([truncated_wav(3.0, 7.0)])
    assert (answer.reason, answer.message[:52]) == (
        "undecodable",
        "clip is damaged: only 3.0 s of about 7.0 s can be de",
    )


def test_an_error_in_the_rest_of_a_file_is_its_own_failure(monkeypatch):
    def stream(source, seconds, lost):
        yield from [tone(1.0)] * 3
        raise RuntimeError("the socket is gone")

    monkeypatch.setattr(codecs, "stream", stream)
    (answer,) = stub().predict_files(["a.wav"])
    assert str(answer) == "undecodable: a.wav cannot be read: RuntimeError: the socket is gone"


def test_an_interrupt_of_a_file_object_reaches_the_caller():
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(stub().predict_files([Broken(KeyboardInterrupt())], workers=2))
    assert threading.active_count() == threads


def test_an_interrupt_ends_the_threads(monkeypatch):
    classifier = stub()
    threads = threading.active_count()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "_log_probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(classifier.predict_files([encode(tone(1.0))] * 50, workers=4))
    assert threading.active_count() == threads


def test_an_iterator_that_blocks_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(prefetch, "_PATIENCE_SECONDS", 0.05)
    release = threading.Event()

    def sources():
        yield from [encode(tone(1.0))] * 9
        release.wait(30)

    answers = stub(batch_seconds=1.0).predict_files(sources(), workers=2)
    assert next(answers).seconds == 1.0
    answers.close()
    release.set()


@pytest.mark.parametrize("options", [{"workers": 0}, {"batch_seconds": 0}])
def test_wrong_options_for_many_files_are_refused_at_once(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is 0: give a positive number"):
        stub().predict_files([], **options)


def test_the_network_is_not_rounded_to_tf32():
    network, seen = stub(), []

    def look(*_):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    network.mods["embedding_model"].register_forward_pre_hook(look)
    network.predict(tone(1.0), 16_000)
    assert seen == [(False, False)]


def test_bf16_is_used_where_it_was_asked_for(folder, monkeypatch, classifier):
    monkeypatch.setattr(inference_classifier, "bf16_is_faster", lambda device: device == "cpu")
    assert not classifier.uses_bf16
    assert stub(precision="auto").uses_bf16
    monkeypatch.setattr(inference_classifier, "bf16_is_faster", lambda device: False)
    assert not stub(precision="auto").uses_bf16
    network = stub(precision="bf16")
    network.predict(tone(1.0), 16_000)
    assert network.mods.embedding_model.modes == [(True, True)]
    waves = [noise(1.5, seed=seed) for seed in range(3)]
    in_bf16 = AccentClassifier.from_bundle(folder, device="cpu", precision="bf16").predict_batch(waves)
    for exact, rounded in zip(classifier.predict_batch(waves), in_bf16, strict=True):
        # Three layers of random weights round worse than a trained encoder.
        assert values(rounded) == pytest.approx(values(exact), abs=0.1)
        assert values(rounded) != pytest.approx(values(exact), abs=1e-6)


def test_whisper_takes_no_longer_window(tmp_path, tiny_encoder):
    model = AccentModel(make_encoder(str(tiny_encoder("whisper"))), LABELS)
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    classifier = AccentClassifier.from_bundle(folder, device="cpu", window_seconds=40, hop_seconds=40)
    assert classifier.predict(noise(1.0), 16_000).seconds == 1.0
    with pytest.raises(AudioError, match="window_seconds is 40, too long for this encoder.*30 s") as caught:
        classifier.predict(noise(35.0), 16_000)
    assert caught.value.reason == "too long"
    # In one batch with others, which are answered; and of a file that is streamed.
    answers = list(classifier.predict_files([encode(noise(s)) for s in (29.8, 30.2, 29.9, 70.0)], batch_seconds=200))
    assert [str(answer)[:8] for answer in answers if isinstance(answer, Failure)] == ["too long"] * 2
    assert [answer.seconds for answer in answers[::2]] == [29.8, 29.9]


def test_threads_may_share_a_classifier(classifier):
    waves = [noise(seconds, seed=int(10 * seconds)) for seconds in (0.3, 1.0, 2.2, 0.7)]
    expected = [values(classifier.predict(wave, 16_000)) for wave in waves]
    found = {}

    def work(number):
        found[number] = [values(prediction) for prediction in classifier.predict_batch(waves)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert np.array(found[number]) == pytest.approx(np.array(expected), abs=1e-5)


@pytest.mark.slow
def test_three_hours_fit_into_memory(folder, tmp_path):
    minute = np.rint(3000 * np.random.default_rng(0).standard_normal(44_100 * 60)).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 44_100, 1) as file:
        for _ in range(180):
            file.write(minute)
    script = (
        "import sys\n"
        "from accent_plugin.devices import peak_memory\n"
        "from accent_plugin.inference import AccentClassifier\n"
        "prediction = AccentClassifier.from_bundle(sys.argv[1], device='cpu').predict_file(sys.argv[2])\n"
        "print(prediction.seconds, len(prediction.windows), peak_memory('cpu'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "long.flac"], capture_output=True, text=True, check=True
    )
    seconds, windows, memory = map(float, run.stdout.split())
    assert (seconds, windows) == (10_800, 2159)
    assert memory < 1.5e9


# -------------------------------------------------------------------------------------------- what makes a CPU fast


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cpu_computes_no_padding_while_there_is_a_clip_for_each_core(threads):
    classifier, before = stub(batch_seconds=60.0), torch.get_num_threads()
    lengths = [4.0, 3.9, 3.6, 3.5]
    try:
        torch.set_num_threads(threads)
        answers = classifier.predict_batch([tone(seconds, mean=seconds / 10) for seconds in lengths])
    finally:
        torch.set_num_threads(before)
    assert sorted(calls(classifier)) == [(1, 56_000), (1, 57_600), (1, 62_400), (1, 64_000)]
    for seconds, answer in zip(lengths, answers, strict=True):
        assert values(answer) == pytest.approx(softmax(0, seconds, -seconds), abs=1e-5)


def test_a_cpu_computes_short_clips_together_and_clips_without_a_core_with_all_cores():
    classifier, before = stub(batch_seconds=60.0), torch.get_num_threads()
    lengths = [4.0, 3.9, 3.6, 1.2, 1.2, 1.2]
    try:
        torch.set_num_threads(3)
        answers = classifier.predict_batch([tone(seconds, mean=seconds / 10) for seconds in lengths])
        assert sorted(calls(classifier)) == [(1, 57_600), (1, 62_400), (1, 64_000), (3, 19_200)]
        calls(classifier).clear()
        answers += classifier.predict_batch([tone(seconds, mean=seconds / 10) for seconds in lengths[:2]])
        assert calls(classifier) == [(2, 64_000)]
    finally:
        torch.set_num_threads(before)
    for seconds, answer in zip(lengths + lengths[:2], answers, strict=True):
        assert values(answer) == pytest.approx(softmax(0, seconds, -seconds), abs=1e-5)


# ---------------------------------------------------------------------------------------------- what makes bf16 fast


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("family", ["wav2vec2-layer", "wavlm-group", "moonshine", "whisper"])
def test_weights_are_cast_and_packed_once(family, packs, precision, tiny_encoder, tmp_path, monkeypatch):
    """Autocast would cast them in every call, and oneDNN rearrange them; the classifier itself stays exact."""
    if packs and not packing.is_available():
        pytest.skip("this CPU has no AVX-512")
    monkeypatch.setattr(packing, "is_available", lambda *_: packs)
    model = AccentModel(make_encoder(str(tiny_encoder(family))), LABELS).eval()
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    classifier = AccentClassifier.from_bundle(folder, device="cpu", precision=precision)
    bundled = classifier.mods["embedding_model"].model
    layers = [m for m in bundled.wav2vec2.modules() if isinstance(m, torch.nn.Linear | packing.PackedLinear)]
    kinds = {m.weight.dtype if isinstance(m, torch.nn.Linear) else m.dtype for m in layers}
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    plain = {type(m) for m in layers} - {packing.PackedLinear}
    assert bool(plain) is (not packs or family.startswith("wavlm"))
    assert bundled.classifier.weight.dtype == torch.float32
    packed = []
    monkeypatch.setattr(packing, "pack", lambda weight, pack=packing.pack: packed.append(1) or pack(weight))
    waves = [noise(seconds, seed=int(10 * seconds)) for seconds in (0.5, 1.3)]
    for _ in range(2):
        answers = [np.log(values(answer)) for answer in classifier.predict_batch(waves)]
    # One for each convolution after the first.
    assert len(packed) == (6 if packs and family.startswith("wav") else 0)
    with torch.no_grad():
        expected = [model(torch.from_numpy(wave)[None])[0].numpy() for wave in waves]
    assert np.array(answers) == pytest.approx(np.array(expected), abs=0.3 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there(tiny_bundle, device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        AccentClassifier.from_bundle(tiny_bundle, device=device)


def test_a_yaml_that_was_never_downloaded_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "hyperparams.yaml").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(BundleError, match="hyperparams.yaml is a Git LFS pointer"):
        AccentClassifier.from_hparams(source=str(copy), savedir=str(tmp_path / "saved"))


FORK = """
import os, sys
import numpy as np
import torch
from accent_plugin.errors import ConfigError
from accent_plugin.inference import AccentClassifier

torch.set_num_threads(2)
classifier = AccentClassifier.from_bundle(sys.argv[1], device="cpu")
wave = np.random.default_rng(0).standard_normal(64_000).astype(np.float32) / 10
before = classifier.predict_batch([wave] * 8)[0].probability
if os.fork() == 0:
    for attempt in (lambda: classifier.predict_batch([wave] * 8), lambda: AccentClassifier.from_bundle(sys.argv[1])):
        try:
            attempt()
        except ConfigError as error:
            print(error, flush=True)
    torch.set_num_threads(1)
    print(abs(classifier.predict_batch([wave] * 8)[0].probability - before) < 1e-5, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_refused_instead_of_waiting_for_ever(tiny_bundle):
    command = [sys.executable, "-c", FORK, str(tiny_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        # The child that waits for ever holds the pipe open.
        killer = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        said = process.stdout.read()
        killer.cancel()
    assert said.count("was forked from process") == said.count("spawn") == 2
    assert said.endswith("True\n")
