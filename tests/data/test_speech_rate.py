import numpy as np
import pytest

from accent_plugin.data.speech_rate import LIMIT, count_characters, rate_deviations


def corpus(clips, pause=1.2, rate=0.07, spread=0.15, seed=0):
    """Numbers of characters, and lengths that follow them up to a factor of the given spread."""
    rng = np.random.default_rng(seed)
    characters = rng.integers(3, 90, clips)
    return characters, (pause + rate * characters) * np.exp(spread * rng.standard_normal(clips))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("pause", [0.1, 2.0])
def test_blank_cut_and_repeated_clips_are_far_from_the_rest(pause, scale):
    characters, seconds = corpus(400, pause)
    seconds[:10] *= 2
    seconds[10:20] /= 2
    seconds[20] = 60.0
    found = rate_deviations(characters, seconds * scale)
    assert (found[:10] > LIMIT).mean() > 0.7 and (found[10:20] < -LIMIT).mean() > 0.7 and found[20] > LIMIT
    assert (np.abs(found[21:]) > LIMIT).mean() < 0.01


def test_short_sentences_are_not_mistaken_for_slow_ones():
    characters, seconds = corpus(500, pause=2.0)
    characters[:20], seconds[:20] = 3, 2.0 + 3 * 0.07
    assert np.abs(rate_deviations(characters, seconds)[:20]).max() < 2


def test_clips_without_a_sentence_or_a_length_have_no_deviation():
    characters, seconds = corpus(100)
    characters[0], seconds[1], seconds[2] = 0, np.nan, 0
    assert np.isnan(rate_deviations(characters, seconds)).nonzero()[0].tolist() == [0, 1, 2]


def test_few_clips_do_not_tell_what_is_usual():
    assert rate_deviations(*corpus(29)) is None
    assert rate_deviations(*corpus(30)) is not None


def test_equal_lengths_have_no_outliers():
    assert np.abs(rate_deviations(np.full(50, 20), np.full(50, 3.0))).max() == 0


@pytest.mark.parametrize(("sentence", "count"), [("Don't!", 4), ("", 0), (None, 0), ("２ 人が", 3), ("naïve", 5)])
def test_letters_and_digits_are_counted_in_any_script(sentence, count):
    assert count_characters(sentence) == count
