import random

import numpy as np
import pytest
from helpers.dataset_dicts import encode, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import quantise
from accent_plugin.audit import confounds
from accent_plugin.errors import ConfigError

SKIRT = 128  # Hz, by which the window widens a sharp band edge
RATES = [8_000, 16_000, 22_050, 44_100, 48_000, 192_000]


def measured(samples, rate=16_000):
    return confounds.recording_features(np.asarray(samples, np.float32), rate, "WAV PCM_16")


def limited(edge, rate, seconds=2.0):
    """Noise with nothing above ``edge`` hertz."""
    spectrum = np.fft.rfft(noise(seconds, rate))
    spectrum[np.fft.rfftfreq(int(seconds * rate), 1 / rate) > edge] = 0
    return np.fft.irfft(spectrum)


# -------------------------------------------------------------------------------------------------- what is measured


def test_features_of_a_sine_after_silence():
    sine = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(24_000) / 16_000)
    found = measured(np.concatenate([np.zeros(8_000), sine]))
    assert (found.sample_rate, found.codec, found.duration, found.leading_silence) == (16_000, "WAV PCM_16", 2.0, 0.5)
    # Three quarters of a sine whose mean square is an eighth.
    assert found.loudness == pytest.approx(10 * np.log10(0.75 / 8), abs=1e-3)
    assert found.noise_floor == confounds.SILENCE
    assert abs(measured(sine).band_edge - 1_000) <= SKIRT


def test_the_noise_floor_is_the_level_of_the_pauses():
    speech = np.where(np.arange(32_000) % 8_000 < 6_000, 0.3, 0.003) * noise(2.0) / 0.1
    found = measured(speech)
    assert found.noise_floor == pytest.approx(20 * np.log10(0.003), abs=0.6)
    assert found.loudness == pytest.approx(20 * np.log10(0.3) + 10 * np.log10(0.75), abs=0.2)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("share", [0.5, 0.85])
def test_the_band_edge_of_limited_noise(rate, share):
    edge = share * rate / 2
    assert measured(limited(edge, rate), rate).band_edge == pytest.approx(edge, abs=SKIRT)
    assert measured(quantise(limited(edge, rate)) / 32768, rate).band_edge == pytest.approx(edge, abs=SKIRT)


@pytest.mark.parametrize("rate", RATES)
def test_the_band_of_white_noise_ends_at_half_the_rate(rate):
    assert measured(noise(0.5, rate), rate).band_edge == pytest.approx(rate / 2, abs=40)


def test_an_mp3_of_low_bitrate_ends_where_its_encoder_cuts():
    decoded = codecs.decode(codecs.encode_mp3(noise(3.0), 16_000))
    assert decoded.codec == "MP3"
    assert measured(decoded.samples).band_edge < 7_000 < measured(noise(3.0)).band_edge


@pytest.mark.parametrize(
    ("format", "subtype", "codec"),
    [
        ("FLAC", "PCM_16", "FLAC PCM_16"),
        ("WAV", "FLOAT", "WAV FLOAT"),
        ("MP3", None, "MP3"),
        ("OGG", "VORBIS", "OGG VORBIS"),
    ],
)
def test_decoding_names_the_codec(format, subtype, codec):
    assert codecs.decode(encode(noise(0.2), format=format, subtype=subtype)).codec == codec


@pytest.mark.parametrize("samples", [[0.0], [0.5], [0.25] * 3, np.zeros(16_000), np.full(16_000, 0.5)])
@pytest.mark.parametrize("rate", [1_000, 16_000, 192_000])
def test_silence_has_finite_features(samples, rate):
    expected = confounds.RecordingFeatures(rate, "WAV PCM_16", 0.0, -120.0, -120.0, len(samples) / rate, 0.0)
    assert measured(samples, rate) == expected


@pytest.mark.parametrize("count", [1, 2, 7, 399, 400, 401, 800])
def test_short_clips_have_finite_features(count):
    found = measured(noise(1.0)[:count])
    assert 0 <= found.band_edge <= 8_000
    assert found.duration == count / 16_000
    assert found.leading_silence == 0.0
    assert -120 <= found.noise_floor <= 0


@given(seed=st.integers(0, 99), power=st.integers(0, 6), frames=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_gain_shifts_levels_and_silence_shifts_the_onset(seed, power, frames):
    samples = noise(1.0, seed=seed)
    first = measured(samples)
    quiet = measured(samples / 2**power)
    assert quiet.loudness == pytest.approx(first.loudness - 20 * np.log10(2**power))
    assert quiet.noise_floor == pytest.approx(first.noise_floor - 20 * np.log10(2**power))
    assert (quiet.band_edge, quiet.leading_silence) == (first.band_edge, first.leading_silence)
    late = measured(np.concatenate([np.zeros(400 * frames, np.float32), samples]))
    assert late.leading_silence == pytest.approx(0.025 * frames)


# ------------------------------------------------------------------------------------------- whether it tells accents


def clips(clients, per_client=4, seed=0, own=1.0, **shifts):
    """Features, accents and clients of us and england; ``shifts`` are what england's recordings have more.

    ``own`` is how far clients lie apart, in standard deviations of the clips of one.
    """
    generator = np.random.default_rng(seed)
    features, accents, names = [], [], []
    for accent in ("us", "england"):
        for client in range(clients):
            offset = own * generator.standard_normal(5)
            for _ in range(per_client):
                x = offset + generator.standard_normal(5)
                values = {
                    "sample_rate": 16_000,
                    "codec": "MP3",
                    "band_edge": 6_000 * 2 ** (0.1 * x[0]),
                    "loudness": -25 + 3 * x[1],
                    "noise_floor": -60 + 5 * x[2],
                    "duration": 4 * 2 ** (0.2 * x[3]),
                    "leading_silence": abs(0.3 + 0.1 * x[4]),
                }
                for name, shift in shifts.items() if accent == "england" else ():
                    values[name] = shift if isinstance(shift, str) else values[name] + shift
                features.append(confounds.RecordingFeatures(**values))
                accents.append(accent)
                names.append(f"{accent}-{client}")
    return features, accents, names


def result_of(table, **choices):
    return confounds.run_confound_test(*table, **({"seed": 5, "permutations": 100} | choices))


@pytest.mark.parametrize(
    ("name", "shift"),
    [("loudness", 15.0), ("band_edge", -3_000.0), ("sample_rate", 32_000), ("codec", "OGG VORBIS")],
)
def test_a_planted_confound_is_found_and_named(name, shift):
    found = result_of(clips(10, **{name: shift}))
    assert found.p == 1 / 101
    assert found.found
    assert found.uar > 0.9
    assert max(found.by_feature, key=found.by_feature.get) == name
    assert found.chance == pytest.approx(0.5, abs=0.08)
    assert (found.clips, found.clients, found.accents, found.by_client) == (80, 20, ("england", "us"), True)


@pytest.mark.parametrize("seed", range(2))
def test_without_a_confound_nothing_is_found(seed):
    found = result_of(clips(10, seed=seed))
    assert found.possible
    assert not found.found


def test_similar_clips_of_one_speaker_are_not_a_confound():
    # The accents are independent of the recordings, but clips of one speaker are nearly equal.
    features, accents, clients = clips(8, per_client=8, own=20.0, seed=3)
    assert not result_of((features, accents, clients)).found
    assert result_of((features, accents, None)).found


@pytest.fixture
def few(monkeypatch):
    """Function: `result_of` with 20 permutations, where it does not matter whether a p below ALPHA can be reached."""
    monkeypatch.setattr(confounds, "FEWEST_PERMUTATIONS", 20)
    return lambda table, **choices: result_of(table, permutations=20, **choices)


@pytest.fixture
def slight(few):
    """A table with a slight confound, and its result."""
    table = list(zip(*clips(6, loudness=1.0), strict=True))
    return table, few(zip(*table, strict=True))


def test_p_includes_the_observation_itself(slight):
    _, found = slight
    assert len(found.permuted) == 20
    assert found.p == (1 + sum(score >= found.uar for score in found.permuted)) / 21 > 1 / 21
    assert found.chance == pytest.approx(np.mean(found.permuted))


def test_the_result_depends_on_the_seed_and_not_on_clip_order(few, slight):
    table, found = slight
    assert few(zip(*random.Random(1).sample(table, len(table)), strict=True)) == found
    assert few(zip(*table, strict=True), seed=6).permuted != found.permuted


def test_without_client_ids_the_result_does_not_depend_on_clip_order(few):
    features, accents, _ = clips(4, loudness=3.0)
    found = few((features, accents, None))
    assert few((features[::-1], accents[::-1], [""] * len(accents))) == found
    assert (found.clients, found.by_client) == (32, False)


def test_identical_recordings_predict_nothing():
    same = confounds.RecordingFeatures(16_000, "MP3", 8_000.0, -20.0, -60.0, 5.0, 0.1)
    _, accents, clients = clips(5)
    found = result_of(([same] * len(accents), accents, clients))
    assert (found.uar, found.p, set(found.by_feature.values())) == (0.5, 1.0, {0.5})


def test_too_few_speakers_make_the_test_impossible():
    found = result_of(clips(4))
    assert not found.possible
    assert not found.found
    assert found.reason == "2 accents need 5 speakers or more, but the speakers are: england 4, us 4"
    assert result_of(([], [], [])).reason.endswith("but the speakers are: none")


def test_small_accents_and_speakers_of_two_accents_are_excluded(few):
    features, accents, clients = clips(6)
    # One more speaker with a third accent, and one with both accents.
    features += features[:3]
    accents += ["wales", "us", "england"]
    clients += ["wales-0", "both", "both"]
    found = few((features, accents, clients))
    assert (found.accents, found.clients, found.clips) == (("england", "us"), 12, 48)


def test_fewer_than_100_permutations_are_refused():
    with pytest.raises(ConfigError, match="permutations is 99: give 100 or more"):
        result_of(clips(6), permutations=99)


# ---------------------------------------------------------------------------------------------------- what is drawn


def drawn(accents, clients, seed=1):
    ranks = np.random.default_rng(0).integers(0, 2**63, len(accents), dtype=np.uint64)
    return confounds.draw(accents, clients, ranks, seed=seed)


def test_draws_limit_clips_per_speaker_and_exclude_unusable_groups():
    # Accent 0 has 5 clients, one of them with 30 clips; accent 1 has 4 clients; client 99 has two accents.
    clients = [0] * 30 + [1, 2, 3, 4] + [10, 11, 12, 13] + [99, 99] + [20]
    accents = [0] * 34 + [1] * 4 + [0, 1] + [-1]
    found = drawn(accents, clients)
    assert len(found) == 14
    assert set(found[found >= 30]) == {30, 31, 32, 33}


def test_draws_take_complete_speakers_evenly_over_accents():
    clients = np.repeat(np.arange(1_100), 8)
    accents = np.where(clients < 1_000, 0, 1)
    found = drawn(accents, clients)
    taken, count = np.unique(clients[found], return_counts=True)
    assert set(count) == {8}
    assert len(found) == confounds.MOST_CLIPS
    assert (taken >= 1_000).sum() == 100
    assert not np.array_equal(found, drawn(accents, clients, seed=2))


def test_draws_keep_the_accents_with_the_most_speakers():
    clients = np.arange(21 * 10)
    accents = np.repeat(np.arange(21), 10)
    accents[0] = 1
    assert set(accents[drawn(accents, clients)]) == set(range(1, 21))


def test_clips_without_a_client_id_count_as_speakers():
    assert len(drawn([0] * 30 + [1] * 4, [-1] * 34)) == 30


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 12)), min_size=1, max_size=80), st.randoms())
@settings(max_examples=50, deadline=None)
def test_draws_do_not_depend_on_the_order_of_rows(rows, shuffler):
    ranks = np.random.default_rng(0).permutation(len(rows)).astype(np.uint64)
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    accents, clients = np.array(rows).T
    first = confounds.draw(accents, clients, ranks, seed=4)
    second = confounds.draw(accents[order], clients[order], ranks[order], seed=4)
    assert set(first) == set(np.array(order)[second])
