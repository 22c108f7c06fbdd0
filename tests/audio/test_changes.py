"""Changes of a waveform: levels, lengths, what is kept and what is lost."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.audio import changes
from accent_plugin.audio.augment import Augmentation, make_augmentation
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import ConfigError

RATE = SAMPLE_RATE


def noise(samples, seed=0, loudness=0.1):
    return (loudness * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def decibels(samples, reference):
    return 10 * np.log10(
        np.mean(np.square(samples, dtype=np.float64)) / np.mean(np.square(reference, dtype=np.float64))
    )


def generator(seed=0):
    return np.random.default_rng(seed)


def voices_of(*clips):
    return lambda rng, number, samples: list(clips)


# Laws of all


EVERY = {
    "band": lambda x, rng: changes.limit_band(x, 3000),
    "noise": lambda x, rng: changes.add_noise(x, 5.0, 0.5, rng),
    "babble": lambda x, rng: changes.add_babble(x, 5.0, [noise(300), noise(90_000)]),
    "room": lambda x, rng: changes.reverberate(x, 0.3, 6.0, rng),
    "gain": lambda x, rng: changes.change_gain(x, -6.0),
    "clipping": lambda x, rng: changes.clip_peaks(x, 0.1),
    "packets": lambda x, rng: changes.lose_packets(x, 0.2, rng),
    "mask": lambda x, rng: changes.mask_time(x, 1000, rng),
    "formants": lambda x, rng: changes.move_formants(x, 0.9),
    **{codec: lambda x, rng, codec=codec: changes.encode_and_decode(x, codec) for codec in changes.CODECS},
}


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, max_examples=8)
@given(length=st.integers(1, 9000), loudness=st.sampled_from([0.0, 1e-5, 0.1, 2.0]))
def test_a_change_keeps_the_length_and_its_input_and_is_reproducible(name, length, loudness):
    if name == "amr":
        pytest.importorskip("av", reason="AMR needs PyAV")
    clip = noise(length, loudness=loudness)
    before = clip.copy()
    one, again = (EVERY[name](clip, generator()) for _ in range(2))
    assert one.shape == clip.shape and np.isfinite(one).all()
    assert np.array_equal(one, again) and np.array_equal(clip, before)


# Babble


def test_babble_has_its_level_whatever_the_levels_of_the_voices():
    clip = noise(RATE)
    for snr in (-5.0, 10.0):
        added = changes.add_babble(clip, snr, [noise(RATE, 1, 0.5), noise(RATE // 3, 2, 1e-3)]) - clip
        assert abs(decibels(clip, added) - snr) < 0.01


def test_each_voice_of_a_babble_is_equally_loud():
    clip, loud, quiet = noise(RATE), noise(RATE, 1, 0.5), noise(RATE, 2, 1e-3)
    added = changes.add_babble(clip, 0.0, [loud, quiet]) - clip
    shares = [abs(np.corrcoef(added, voice)[0, 1]) for voice in (loud, quiet)]
    assert shares == pytest.approx([0.5**0.5] * 2, abs=0.02)


def test_silent_voices_and_none_add_nothing():
    clip = noise(RATE)
    assert np.array_equal(changes.add_babble(clip, 0.0, []), clip)
    assert np.array_equal(changes.add_babble(clip, 0.0, [np.zeros(RATE)]), clip)


# Rooms


def response(seconds, direct, seed=0):
    """Impulse response of a room, in units of its direct sound."""
    impulse = np.zeros(4 * RATE, np.float32)
    impulse[0] = 1
    heard = changes.reverberate(impulse, seconds, direct, generator(seed))
    return heard / heard[0]


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0])
def test_a_room_decays_by_sixty_decibels_in_its_reverberation_time(seconds):
    # Schroeder's backward integration, between 10 % and 40 % of the time: 30 % of 60 dB.
    energy = np.square(np.mean([np.abs(response(seconds, 0.0, seed)) for seed in range(8)], axis=0)[200:])
    left = np.cumsum(energy[::-1])[::-1]
    early, late = (left[round(share * seconds * RATE)] for share in (0.1, 0.4))
    assert 10 * np.log10(early / late) == pytest.approx(18, abs=1.0)


@pytest.mark.parametrize("direct", [0.0, 12.0])
def test_the_direct_sound_is_above_the_reverberation_by_its_ratio(direct):
    found = response(0.4, direct)
    assert -10 * np.log10(np.square(found[1:]).sum()) == pytest.approx(direct, abs=0.01)


def test_a_room_delays_nothing_and_keeps_the_power():
    clip = noise(2 * RATE)
    heard = changes.reverberate(clip, 0.5, 6.0, generator())
    assert decibels(heard, clip) == pytest.approx(0, abs=1e-6)
    lags = [np.dot(clip[1000:20_000], heard[1000 + lag : 20_000 + lag]) for lag in range(-20, 200)]
    assert np.argmax(lags) == 20


# Level, peaks, packets


def test_gain_changes_the_level_and_clips_at_full_scale():
    assert decibels(changes.change_gain(noise(RATE), -6.0), noise(RATE)) == pytest.approx(-6)
    assert changes.change_gain(np.array([0.5, -0.9, 0.1]), 20.0) == pytest.approx([1, -1, 1])


def test_the_loudest_samples_are_clipped_and_the_others_kept():
    clip = np.linspace(-1, 1, 1001)
    found = changes.clip_peaks(clip, 0.2)
    assert np.abs(found).max() == pytest.approx(0.8) and np.mean(found != clip) == pytest.approx(0.2, abs=0.003)
    assert np.array_equal(changes.clip_peaks(clip, 0.0), clip)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_packets_are_lost_whole_in_the_given_fraction_and_in_bursts(fraction):
    lost = changes.lose_packets(np.ones(320 * 20_000), fraction, generator()).reshape(-1, 320) == 0
    assert (lost.all(axis=1) == lost.any(axis=1)).all()
    lost = lost[:, 0]
    assert lost.mean() == pytest.approx(fraction, rel=0.1)
    bursts = np.sum(lost[1:] & ~lost[:-1])
    assert lost.sum() / bursts == pytest.approx(2.0, rel=0.1)


def test_nothing_or_everything_can_be_lost():
    clip = noise(RATE)
    assert np.array_equal(changes.lose_packets(clip, 0.0, generator()), clip)
    assert not changes.lose_packets(clip, 1.0, generator())[: RATE // 50].any()


# Formants


def vowel(formants, pitch=120):
    """A pulse train through resonators of 80 Hz bandwidth."""
    found = np.zeros(2 * RATE)
    found[:: RATE // pitch] = 1
    for frequency in formants:
        radius, angle = np.exp(-np.pi * 80 / RATE), 2 * np.pi * frequency / RATE
        impulse = radius ** np.arange(4000) * np.sin(angle * np.arange(1, 4001))
        found = np.convolve(found, impulse)[: 2 * RATE]
    return (0.1 * found / np.abs(found).max()).astype(np.float32)


def peak(samples, low, high):
    """Frequency of the maximum of the smoothed spectrum between two frequencies."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    spectrum = np.convolve(spectrum, np.ones(480), "same")
    frequencies = np.fft.rfftfreq(len(samples), 1 / RATE)
    inside = (frequencies > low) & (frequencies < high)
    return frequencies[inside][np.argmax(spectrum[inside])]


@pytest.mark.parametrize("coefficient", [0.85, 1.15])
def test_formants_move_as_the_coefficient_says_and_the_pitch_stays(coefficient):
    clip = vowel([700])
    moved = changes.move_formants(clip, coefficient)
    angle = 2 * np.pi * 700 / RATE
    assert peak(moved, 200, 3000) == pytest.approx(angle**coefficient * RATE / 2 / np.pi, rel=0.12)
    spectrum = np.abs(np.fft.rfft(moved * np.hanning(len(moved))))
    # 120 Hz are 240 bins here: the harmonics stay.
    assert spectrum[240 * 4 - 60 : 240 * 4 + 60].argmax() == pytest.approx(60, abs=14)


def test_a_coefficient_of_one_changes_nothing():
    clip = vowel([500, 1500])
    assert np.allclose(changes.move_formants(clip, 1.0), clip, atol=1e-4)


# Codecs


@pytest.mark.parametrize("codec", changes.CODECS)
def test_a_codec_keeps_a_tone_at_its_level(codec):
    if codec == "amr":
        pytest.importorskip("av", reason="AMR needs PyAV")
    tone = (0.2 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)
    heard = changes.encode_and_decode(tone, codec)
    # AMR models speech, not tones.
    assert abs(decibels(heard[8000:-8000], tone[8000:-8000])) < (4 if codec == "amr" else 1.5)
    spectrum = np.abs(np.fft.rfft(heard[8000:-8000]))
    assert spectrum.argmax() == 440
    # It is lossy.
    assert not np.allclose(heard, tone, atol=1e-4)


@pytest.mark.parametrize("codec", ["gsm", "mu-law", "amr"])
def test_telephone_codecs_remove_what_is_above_four_kilohertz(codec):
    if codec == "amr":
        pytest.importorskip("av", reason="AMR needs PyAV")
    heard = changes.encode_and_decode(noise(2 * RATE), codec)
    spectrum = np.abs(np.fft.rfft(heard))
    assert decibels(spectrum[-7000:], spectrum[2000:9000]) < -30


def test_a_codec_that_needs_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    changes.require_codec("opus")
    with pytest.raises(ConfigError, match=r"amr needs PyAV: pip install \"accent_plugin\[media\]\""):
        changes.require_codec("amr")


# Augmentation


KINDS = {
    "speed": [0.8, 0.8],
    "formants": [0.8, 0.8],
    "reverberation": [0.3, 0.3],
    "babble_snr": [0.0, 0.0],
    "band": [1000.0, 1000.0],
    "noise_snr": [0.0, 0.0],
    "gain": [-9.0, -9.0],
    "clipping": [0.3, 0.3],
    "codecs": ["mu-law"],
    "packet_loss": [0.5, 0.5],
    "mask_seconds": 0.5,
}


def test_every_kind_is_listed_here():
    assert set(KINDS) == set(Augmentation.__dataclass_fields__) - {"probability"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_the_probability_that_is_given_for_it(kind):
    clip, voices = noise(4000), voices_of(noise(4000, 5))
    rng = generator()

    def changed(probability):
        augment = make_augmentation(True, probability, **{kind: KINDS[kind]})
        results = (augment(clip, rng, voices) for _ in range(60))
        return sum(len(found) != len(clip) or not np.array_equal(found, clip) for found in results)

    assert (changed(0.0), changed({kind: 0.0, "default": 1.0}), changed({"default": 0.0})) == (0, 0, 0)
    assert changed(1.0) >= 55 and changed({kind: 1.0}) >= 55 and changed({"default": 1.0}) >= 55
    assert 15 <= changed({kind: 0.5, "default": 0.0}) <= 45


def test_without_voices_there_is_no_babble():
    clip = noise(4000)
    assert np.array_equal(make_augmentation(True, 1.0, babble_snr=[0, 0])(clip, generator()), clip)


def test_only_what_is_drawn_changes_with_the_generator():
    augment = make_augmentation(True, 0.5, **KINDS)
    clip, voices = noise(8000), voices_of(noise(8000, 5))
    one, again, other = (augment(clip, generator(seed), voices) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and np.array_equal(one, again) and not np.array_equal(one, other)


# Number of samples, sum of their sizes, and the next draw, of version 0.1.0.
DRAWS = (7411, 328.1, 718182)


def test_draws_are_those_of_earlier_versions():
    """A run that an earlier version began goes on with the same augmentation: kinds that are off draw nothing."""
    augment = make_augmentation(True, 0.9, [0.9, 1.1], [5, 20], [2000, 8000], 0.3)
    rng = generator(7)
    found = augment(noise(8000), rng)
    assert (len(found), round(float(np.abs(found).sum()), 1), rng.integers(10**6)) == DRAWS
