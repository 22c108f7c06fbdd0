"""Signal quality: levels, noise, clipping and peaks, however a recording is cut into blocks."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accent_plugin.serving.signal_quality import SignalMeter


def measure(*blocks):
    meter = SignalMeter()
    passed = list(meter.measure(blocks))
    assert all(one is other for one, other in zip(passed, blocks, strict=True))
    return meter.quality()


def tone(seconds, level):
    """A tone of whole periods in every 10 ms, so that each frame's level is that of its root mean square."""
    return (level * np.sqrt(2) * np.sin(2 * np.pi * 200 * np.arange(int(seconds * 16_000)) / 16_000)).astype(np.float32)


def noise(seconds, level, seed=0):
    return (level * np.random.default_rng(seed).standard_normal(int(seconds * 16_000))).astype(np.float32)


def speech_like(pause_level):
    """Three seconds of tone at -20 dB and one second of pause."""
    return np.concatenate([tone(3, 0.1), noise(1, pause_level)])


def test_levels_in_decibels():
    found = measure(speech_like(0.001))
    assert found.speech_db == pytest.approx(-20, abs=0.1)
    assert found.noise_db == pytest.approx(-60, abs=1.0)
    assert list(found.warnings()) == []


def test_a_noisy_recording_has_a_warning():
    (warning,) = measure(speech_like(0.05)).warnings()
    assert warning.startswith("noisy or without pauses: loud parts are only ")


def test_a_quiet_recording_is_not_called_noisy_too():
    (warning,) = measure(tone(1, 0.001)).warnings()
    assert warning == "very quiet: the loudest parts are at -60 dB relative to full scale"


def test_clipping_has_a_warning():
    wave = speech_like(0.001)
    wave[:64] = 1.0
    found = measure(wave)
    assert found.clipped == 64 / 64_000
    assert not list(found.warnings())
    wave[:128] = -1.0
    assert list(measure(wave).warnings()) == ["clipped: 0.2% of the samples are at full scale"]


def test_a_peak_is_the_largest_magnitude_in_10_ms():
    wave = np.zeros(400, np.float32)
    wave[3], wave[170], wave[399] = 0.5, -0.25, 1.5
    assert measure(wave).peaks.tolist() == [0.5, 0.25, 1.0]


@given(st.sets(st.integers(1, 399), max_size=5))
@example({300})
def test_levels_depend_on_the_blocks_only_at_their_ends(edges):
    """Blocks are cut at multiples of 10 ms; the last frame of a block is shorter than 25 ms."""
    wave = speech_like(0.001)
    wave[:64] = 1.0
    cut, whole = measure(*np.split(wave, 160 * np.array(sorted(edges), int))), measure(wave)
    assert cut.peaks.tolist() == whole.peaks.tolist()
    assert cut.clipped == 64 / 64_000
    assert cut.speech_db == pytest.approx(-20, abs=0.1)
    assert cut.noise_db == pytest.approx(-60, abs=1.0)
