"""Degradations: pass bands, lengths, types, and reproducibility."""

import pickle

import numpy as np
import pytest

from accent_plugin.audio import codecs
from accent_plugin.audio.degradations import DEGRADATIONS
from accent_plugin.audio.samples import SAMPLE_RATE

RATE = SAMPLE_RATE


def tone(frequency, seconds=1.0):
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def voices(rng, number, samples):
    """Clips of other speakers, as a data set has them."""
    return [0.1 * rng.standard_normal(samples) for _ in range(number)]


def degraded(name, samples, seed=0):
    return DEGRADATIONS[name](samples, np.random.default_rng(seed), voices)


def decibels(samples, reference):
    return 10 * np.log10(np.mean(np.square(samples)) / np.mean(np.square(reference)))


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("samples", [1, 400, 16000, 48123])
def test_a_degradation_keeps_length_and_type_and_is_reproducible(name, samples):
    clip = np.random.default_rng(1).uniform(-1, 1, samples).astype(np.float32)
    before = clip.copy()
    one, again = degraded(name, clip), degraded(name, clip)
    assert one.shape == clip.shape and one.dtype == np.float32 and np.isfinite(one).all()
    assert np.array_equal(one, again) and np.array_equal(clip, before)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_silence_stays_silent(name):
    assert np.abs(degraded(name, np.zeros(RATE, np.float32))).max() < 1e-3


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degradation_can_be_pickled(name):
    assert pickle.loads(pickle.dumps(DEGRADATIONS[name])) == DEGRADATIONS[name]


def test_only_babble_needs_other_speakers():
    assert {d.kind for d in DEGRADATIONS.values() if d.needs_voices} == {"babble"}
    for degradation in DEGRADATIONS.values():
        if not degradation.needs_voices:
            degradation(tone(440), np.random.default_rng(0), None)


STRENGTHS = ("noise", "babble", "packet loss", "clipping")


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_kind_is_listed_from_the_mildest_to_the_strongest(kind):
    clip = np.random.default_rng(1).uniform(-0.3, 0.3, 4 * RATE).astype(np.float32)
    graded = [name for name, d in DEGRADATIONS.items() if d.kind == kind]
    likeness = [np.corrcoef(clip, degraded(name, clip))[0, 1] for name in graded]
    assert len(graded) == 3 and likeness == sorted(likeness, reverse=True) and likeness[0] > likeness[-1]


def test_rooms_are_listed_by_their_reverberation_time():
    assert [d.strength for d in DEGRADATIONS.values() if d.kind == "reverberation"] == [0.3, 0.6, 1.0]


def test_the_strength_is_in_the_name():
    for name, degradation in DEGRADATIONS.items():
        assert degradation.strength is None or f"{degradation.strength:g} {degradation.unit}" in name


@pytest.mark.parametrize(
    ("name", "kept", "removed"),
    [("telephone", [350, 1000, 3350], [50, 250, 3450, 7000]), ("8 kHz band", [50, 1000, 3950], [4050, 7000])],
)
def test_tones_inside_are_kept_and_tones_outside_removed(name, kept, removed):
    inside = sum(map(tone, kept))
    assert np.allclose(degraded(name, inside + sum(map(tone, removed))), inside, atol=1e-5)


def test_mp3_keeps_a_tone_and_removes_high_frequencies():
    low = degraded("MP3 32 kbit/s", tone(1000))
    # Without the silent start, which is the codec's delay, and the end.
    assert abs(decibels(low[4000:-1000], tone(1000)[4000:-1000])) < 0.5
    hiss = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32) * 0.1
    before, after = (np.abs(np.fft.rfft(x))[30000:] for x in (hiss, degraded("MP3 32 kbit/s", hiss)))
    assert decibels(after, before) < -30


@pytest.mark.parametrize("bitrate", [16_000, 24_000, 32_000])
def test_mp3_has_the_given_bitrate(bitrate):
    clip = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE).astype(np.float32)
    encoded = codecs.encode_mp3(clip, bitrate)
    decoded = codecs.decode(encoded)
    assert decoded.sample_rate == RATE and 0 <= len(decoded.samples) - len(clip) < 3 * 576
    assert len(encoded) * 8 / decoded.seconds == bitrate


def test_mp3_is_delayed_by_its_codec():
    # Documented in encode_mp3. A libsndfile that compensates the delay would make the degradation milder.
    clip = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
    decoded = codecs.decode(codecs.encode_mp3(clip, 32_000)).samples
    assert np.correlate(decoded, clip[:8000], "valid").argmax() == 1105


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_ten_decibels_below_the_clip(seed):
    clip = tone(440)
    added = degraded("noise at 10 dB", clip, seed) - clip
    assert abs(decibels(clip, added) - 10) < 0.01


def test_noise_is_between_white_and_pink_and_differs_between_clips():
    clip = tone(440, 4.0)
    added = [degraded("noise at 10 dB", clip, seed) - clip for seed in range(20)]
    # Power in the octave 3.5 to 7 kHz over that in 437.5 to 875 Hz: 8 for white noise, 1 for pink noise.
    spectra = np.square(np.abs(np.fft.rfft(added)))
    ratios = spectra[:, 14000:28000].sum(axis=1) / spectra[:, 1750:3500].sum(axis=1)
    assert 0.9 < ratios.min() < 2.5 and 4 < ratios.max() < 8.8
