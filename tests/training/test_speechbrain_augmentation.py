"""SpeechBrain's Augmenter in place of this package's augmentation."""

import pickle
import random

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.augment.augmenter import Augmenter
from speechbrain.augment.time_domain import AddNoise, AddReverb, DropChunk, DropFreq, SpeedPerturb

from accent_plugin.data.manifests import Clip
from accent_plugin.errors import ConfigError
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.loaders import LoadingOptions, SpeechBrainAugmentation, training_clips

RATE = 16_000


def noise(samples, seed):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.fixture
def csvs(tmp_path):
    """CSV files of six noises and six impulse responses, as SpeechBrain reads them."""
    made = {}
    for kind, samples in (("noise", 3 * RATE), ("rir", 2000)):
        lines = ["ID,duration,wav,wav_format,wav_opts"]
        for number in range(6):
            path = tmp_path / f"{kind}{number}.wav"
            sound = noise(samples, number)
            if kind == "rir":
                sound *= np.exp(-np.arange(samples) / 300, dtype=np.float32)
                sound[0] = 1
            soundfile.write(path, sound, RATE)
            lines.append(f"{kind}{number},{samples / RATE},{path},wav,")
        made[kind] = tmp_path / f"{kind}.csv"
        made[kind].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


@pytest.fixture
def clips(tmp_path):
    made = []
    for number in range(8):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, noise(RATE + 1000 * number, 50 + number), RATE)
        made.append(Clip(f"c{number}", 1 + number / 16, str(path), "ab"[number % 2], f"s{number}", "", ""))
    return made


def augmenter(csvs, **options):
    parts = [
        AddReverb(csv_file=str(csvs["rir"])),
        AddNoise(csv_file=str(csvs["noise"]), snr_low=0, snr_high=15, pad_noise=True),
        SpeedPerturb(orig_freq=RATE, speeds=[90, 110]),
        DropFreq(),
        DropChunk(drop_length_low=1000, drop_length_high=2000),
    ]
    defaults = {"min_augmentations": 1, "max_augmentations": 5, "shuffle_augmentations": True}
    return Augmenter(**defaults | {"augmentations": parts} | options)


def test_a_clip_depends_on_its_generator_alone_whatever_came_before(csvs):
    clip = noise(RATE, 99)
    alone = SpeechBrainAugmentation(augmenter(csvs))(clip, np.random.default_rng(5))
    later = SpeechBrainAugmentation(augmenter(csvs))
    for number in range(7):
        torch.rand(number), random.random(), np.random.rand()
        later(noise(RATE // 2, number), np.random.default_rng(number))
    assert np.array_equal(later(clip, np.random.default_rng(5)), alone)
    others = [later(clip, np.random.default_rng(seed)) for seed in range(6, 12)]
    assert len({(len(other), float(other.sum())) for other in others}) == 6


def test_it_leaves_no_trace_in_the_random_states(csvs):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    SpeechBrainAugmentation(augmenter(csvs))(noise(RATE, 1), np.random.default_rng(5))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), states[2], strict=True))


def test_every_noise_of_the_csv_is_drawn(csvs):
    augment = SpeechBrainAugmentation(
        Augmenter(augmentations=[AddNoise(csv_file=str(csvs["noise"]), snr_low=-60, snr_high=-60, start_index=0)])
    )
    found = [augment(noise(RATE, 9), np.random.default_rng(seed)) for seed in range(40)]
    drawn = [max(range(6), key=lambda n, clip=clip: abs(np.corrcoef(clip, noise(RATE, n))[0, 1])) for clip in found]
    assert set(drawn) == set(range(6))


def test_batches_do_not_depend_on_the_number_of_workers(csvs, clips):
    dataset = ClipDataset(clips, ["a", "b"], augmentation=SpeechBrainAugmentation(augmenter(csvs)), seed=4)
    sampler = BucketBatchSampler(dataset.seconds(), 2.5)
    sampler.set_epoch(2)
    alone, parallel = (list(make_loader(dataset, sampler, num_workers=n)) for n in (0, 2))
    for one, other in zip(alone, parallel, strict=True):
        # SpeechBrain's convolutions are computed in another order with other numbers of threads.
        assert one.ids == other.ids and torch.allclose(one.wavs, other.wavs, atol=1e-6)


def test_a_copy_for_a_spawned_worker_draws_the_same(csvs):
    augment = SpeechBrainAugmentation(augmenter(csvs))
    copy = pickle.loads(pickle.dumps(augment))
    found = [each(noise(RATE, 9), np.random.default_rng(3)) for each in (augment, copy)]
    assert np.array_equal(*found)


def test_missing_noise_is_an_error_before_training(csvs):
    csvs["rir"].unlink()
    with pytest.raises(ConfigError, match=r"augmentation: .*rir.csv cannot be used: .*rir.csv"):
        SpeechBrainAugmentation(augmenter(csvs))


def test_it_takes_the_place_of_the_augmentation_in_the_yaml(csvs, clips):
    options = LoadingOptions(["a", "b"], 4, "none", 2.5, 0.5, augmenter(csvs), 0)
    loader = training_clips(clips, options)
    plain = training_clips(clips, LoadingOptions(["a", "b"], 4, "none", 2.5, 0.5, None, 0))
    waves = [{i: w for batch in each for i, w in zip(batch.ids, batch.wavs, strict=True)} for each in (loader, plain)]
    assert waves[0].keys() == waves[1].keys()
    assert not any(torch.equal(waves[0][name], waves[1][name]) for name in waves[0])
    # Crops have their full length at a higher speed too.
    assert all(len(wave) == RATE // 2 or wave[7200:].any() for wave in waves[0].values())


def test_speeds_are_counted_in_the_lengths():
    found = SpeechBrainAugmentation(Augmenter(augmentations=[SpeedPerturb(orig_freq=RATE, speeds=[80, 125])]))
    assert (found.slowest, found.fastest) == (1.25, 1.25)
    lengths = {len(found(noise(RATE, 1), np.random.default_rng(seed))) for seed in range(20)}
    assert lengths == {20_000, 12_800}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"concat_original": True}, "concat_original would make several copies"),
        ({"parallel_augment": True}, "parallel_augment would make several copies"),
        ({"repeat_augment": 2}, "repeat_augment would make several copies"),
    ],
)
def test_several_copies_of_a_clip_are_refused(csvs, options, problem):
    with pytest.raises(ConfigError, match=problem):
        SpeechBrainAugmentation(augmenter(csvs, **options))


@pytest.mark.parametrize(
    ("options", "problem"), [({"num_workers": 1}, "num_workers .* must be 0"), ({"sorting": "original"}, "be random")]
)
def test_noise_that_cannot_be_drawn_by_clip_is_refused(csvs, options, problem):
    parts = [AddNoise(csv_file=str(csvs["noise"]), **options)]
    with pytest.raises(ConfigError, match=problem):
        SpeechBrainAugmentation(Augmenter(augmentations=parts))
