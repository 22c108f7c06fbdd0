"""Batches: shuffled in each epoch, reproducible by seed, limited in size; augmentation by clip, not by batch.

Unreadable clips are skipped with a reason, and a killed worker changes nothing.
"""

import dataclasses
import gc
import os
import pickle
import pickletools
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.audio import codecs
from accent_plugin.audio.augment import Augmentation, make_augmentation
from accent_plugin.audio.changes import add_noise, change_speed, limit_band, mask_time
from accent_plugin.data.manifests import Clip, Clips
from accent_plugin.errors import TrainingError
from accent_plugin.training.batches import (
    Batch,
    BucketBatchSampler,
    ClipDataset,
    ClipLoader,
    Lost,
    collate,
    inverse_frequency,
    make_loader,
)

LENGTHS = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=200)


def epoch(sampler, number):
    sampler.set_epoch(number)
    return [[index for index, _ in batch] for batch in sampler]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.booleans())
def test_every_clip_comes_once_and_no_batch_is_too_large(lengths, seed, shuffle):
    sampler = BucketBatchSampler(lengths, 30.0, shuffle=shuffle, seed=seed)
    batches = epoch(sampler, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 30.0 for batch in batches)
    assert len(sampler) == len(batches)


def test_batches_differ_between_epochs_and_not_between_runs():
    lengths = np.random.default_rng(0).uniform(1, 10, 300)
    first, again = (BucketBatchSampler(lengths, 40.0, seed=1) for _ in range(2))
    assert epoch(first, 1) == epoch(again, 1)
    assert epoch(first, 2) == epoch(again, 2)
    composition = [{frozenset(batch) for batch in epoch(first, number)} for number in (1, 2)]
    assert len(composition[0] & composition[1]) < 0.1 * len(composition[0])


def test_another_seed_gives_other_batches():
    lengths = np.full(50, 4.0)
    assert epoch(BucketBatchSampler(lengths, 16.0, seed=1), 1) != epoch(BucketBatchSampler(lengths, 16.0, seed=2), 1)


def test_the_batch_with_the_most_audio_comes_first():
    lengths = np.random.default_rng(0).uniform(1, 10, 300)
    audio_in = [len(batch) * max(lengths[batch]) for batch in epoch(BucketBatchSampler(lengths, 40.0), 1)]
    assert audio_in[0] == max(audio_in)


def test_padding_is_a_small_fraction():
    lengths = np.clip(np.random.default_rng(0).lognormal(1.6, 0.35, 5000), 1, 15)
    batches = epoch(BucketBatchSampler(lengths, 60.0), 1)
    padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.08


def test_weights_make_rare_clips_come_more_often():
    labels = np.array([0] * 900 + [1] * 100)
    weights = inverse_frequency(labels, 2)[labels]
    drawn = [
        index for batch in epoch(BucketBatchSampler(np.full(1000, 4.0), 40.0, weights=weights), 1) for index in batch
    ]
    assert len(drawn) == 1000
    assert 0.4 < np.mean(labels[drawn]) < 0.6


# Reading


@pytest.fixture
def clips(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for number, seconds in enumerate([1.0, 2.0, 2.0, 4.0]):
        path = tmp_path / f"{number}.flac"
        codecs.write(path, rng.uniform(-0.5, 0.5, round(seconds * 16000)).astype(np.float32))
        made.append(Clip(f"clip{number}", seconds, str(path), "ab"[number % 2], f"client{number}", "", ""))
    return made


def test_a_batch_is_padded_with_zeros_and_knows_its_lengths(clips):
    dataset = ClipDataset(clips, ["a", "b"])
    batch = collate([dataset[(0, 1)], dataset[(1, 1)]])
    assert batch.wavs.shape == (2, 32000) and not batch.wavs[0, 16000:].any()
    assert batch.wav_lens.tolist() == [0.5, 1.0]
    assert batch.labels.tolist() == [0, 1] and batch.ids == ("clip0", "clip1")


def test_clips_of_equal_length_have_no_lengths(clips):
    dataset = ClipDataset(clips, ["a", "b"])
    assert collate([dataset[(1, 1)], dataset[(2, 1)]]).wav_lens is None


def test_labels_follow_the_order_of_accents(clips):
    assert ClipDataset(clips, ["b", "a"])[(0, 1)][2] == 1


def test_a_crop_is_part_of_the_clip_and_differs_between_epochs(clips):
    dataset = ClipDataset(clips, ["a", "b"], crop_seconds=1.5)
    whole = codecs.read(clips[3].wav)
    crops = [dataset[(3, number)][1] for number in (1, 2, 1)]
    assert [len(crop) for crop in crops] == [24000] * 3
    assert np.array_equal(crops[0], crops[2]) and not np.array_equal(crops[0], crops[1])
    starts = np.lib.stride_tricks.sliding_window_view(whole, 24000)
    assert any(np.array_equal(crops[0], window) for window in starts)
    assert len(dataset[(0, 1)][1]) == 16000


def test_batches_do_not_depend_on_the_number_of_workers(clips):
    augmentation = make_augmentation(True, 0.9, [0.9, 1.1], [5, 20], [2000, 8000], 0.3)
    dataset = ClipDataset(clips * 1, ["a", "b"], crop_seconds=1.0, augmentation=augmentation, seed=4)
    sampler = BucketBatchSampler(dataset.seconds(), 2.0)
    sampler.set_epoch(2)
    alone, parallel = (list(make_loader(dataset, sampler, num_workers=n)) for n in (0, 2))
    for one, other in zip(alone, parallel, strict=True):
        assert one.ids == other.ids and torch.equal(one.wavs, other.wavs)


def test_no_clip_is_longer_than_its_maximum(clips):
    augmentation = make_augmentation(True, 1.0, [0.7, 1.3])
    for crop in (None, 1.5):
        dataset = ClipDataset(clips, ["a", "b"], crop_seconds=crop, augmentation=augmentation)
        for index, limit in enumerate(dataset.seconds()):
            for number in range(5):
                assert len(dataset[(index, number)][1]) <= limit * 16000 + 1


def test_epochs_repeat_a_fixed_number_of_copies(clips):
    augmentation = make_augmentation(True, 1.0, noise_snr=[10, 10])

    def epochs(copies):
        dataset = ClipDataset(clips, ["a", "b"], crop_seconds=0.5, augmentation=augmentation, copies=copies)
        return [dataset[0, epoch][1] for epoch in range(1, 6)]

    unlimited, two, many = epochs(None), epochs(2), epochs(5)
    for epoch, samples in enumerate(two):
        assert np.array_equal(samples, unlimited[epoch % 2])
    for samples, others in zip(many, unlimited, strict=True):
        assert np.array_equal(samples, others)


def test_clips_are_degraded_after_reading_and_before_augmentation(clips):
    def halve(samples, rng, voices):
        calls.append((len(samples), rng.random()))
        return samples / 2

    def samples(**choices):
        return ClipDataset(clips, ["a", "b"], crop_seconds=1.5, seed=4, **choices)[(3, 1)][1]

    calls = []
    halved = samples(degrade=halve)
    assert np.array_equal(halved, samples() / 2)
    added = samples(degrade=halve, augmentation=make_augmentation(True, 1.0, noise_snr=[10, 10])) - halved
    assert abs(10 * np.log10(np.mean(halved**2) / np.mean(added**2)) - 10) < 0.01
    # The same generator for the same clip, as it is seeded by clip and epoch only.
    assert calls == [calls[0]] * 2 and calls[0][0] == 24000


def test_babble_is_made_of_other_speakers(clips):
    heard = []

    def listen(samples, rng, voices):
        heard.append(voices(rng, 3, 8000))
        return samples

    same = [*clips, dataclasses.replace(clips[0], id="again")]
    dataset = ClipDataset(same, ["a", "b"], seed=4, degrade=listen)
    for index in (0, 4, 0):
        dataset[(index, 1)]
    others = [np.lib.stride_tricks.sliding_window_view(codecs.read(clip.wav), 8000) for clip in clips[1:]]
    for voice in (voice for voices in heard for voice in voices):
        assert any((windows == voice).all(axis=1).any() for windows in others)
    assert [len(voices) for voices in heard] == [3, 3, 3]
    assert all(map(np.array_equal, heard[0], heard[2])) and not all(map(np.array_equal, heard[0], heard[1]))


def test_a_speaker_who_is_alone_hears_no_babble(clips):
    heard = []
    alone = [dataclasses.replace(clip, client_id="anna") for clip in clips]
    ClipDataset(alone, ["a", "b"], degrade=lambda samples, rng, voices: heard.append(voices(rng, 3, 800)))[(0, 1)]
    assert heard == [[]]


def test_a_voice_that_cannot_be_read_is_left_out(clips):
    heard = []
    clips[1:] = [dataclasses.replace(clip, wav="/missing.flac") for clip in clips[1:]]
    ClipDataset(clips, ["a", "b"], degrade=lambda samples, rng, voices: heard.append(voices(rng, 3, 800)))[(0, 1)]
    assert heard == [[]]


def test_nothing_is_decoded_twice_in_an_epoch(clips, monkeypatch):
    decoded, read = [], codecs.read
    monkeypatch.setattr(codecs, "read", lambda path, **stretch: decoded.append(path) or read(path, **stretch))
    dataset = ClipDataset(clips, ["a", "b"], crop_seconds=1.5)
    loader = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0))
    for number in (1, 2):
        loader.batch_sampler.set_epoch(number)
        list(loader)
        assert sorted(decoded) == sorted(clip.wav for clip in clips)
        decoded.clear()


# A million clips


def many(count):
    clips = Clips(Clip(f"c{n}", 1 + n / 7, f"/{n}.flac", "ab"[n % 2], "s", "", "") for n in range(count))
    return ClipDataset(clips, ["a", "b"])


def objects_below(root):
    """Number of Python objects reachable from one, apart from classes, modules and their contents."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        for item in gc.get_referents(waiting.pop()):
            if id(item) not in seen and not isinstance(item, type):
                seen.add(id(item))
                waiting.append(item)
    return len(seen)


def test_the_number_of_objects_that_workers_share_does_not_grow_with_the_clips():
    # Accessing an object in a worker changes its reference count, and thereby copies its memory page.
    assert objects_below(many(5000)) == objects_below(many(50)) < 50


def test_a_pickled_dataset_has_no_object_per_clip():
    def steps(count):
        # The number of pickle frames depends on the size.
        return [code.name for code, _, _ in pickletools.genops(pickle.dumps(many(count))) if code.name != "FRAME"]

    assert len(steps(5000)) == len(steps(50)) < 150
    restored = pickle.loads(pickle.dumps(many(50)))
    assert list(restored.clips) == list(many(50).clips) and np.array_equal(restored.labels(), many(50).labels())


def test_packed_clips_equal_the_original_clips(clips):
    held = Clips(clips)
    assert list(held) == clips and [held[n] for n in range(-4, 4)] == clips + clips
    assert list(held[1:]) == clips[1:] and list(held[::-2]) == clips[::-2] and not Clips([])
    with pytest.raises(IndexError):
        held[4]
    one, other = (ClipDataset(some, ["a", "b"], crop_seconds=1.5, seed=4) for some in (clips, held))
    assert np.array_equal(one.seconds(), other.seconds()) and np.array_equal(one.labels(), other.labels())
    assert all(np.array_equal(one[(n, 1)][1], other[(n, 1)][1]) for n in range(4))


# Clips that cannot be read


def vanish(path):
    os.unlink(path)


def empty(path):
    open(path, "w").close()


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def text(path):
    with open(path, "w") as file:
        file.write("This was a clip. " * 100)


def zeros(path):
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(bytes(os.path.getsize(path) - 1000))


def endless(path):
    # A damaged header that claims more samples than fit into memory.
    with open(path, "r+b") as file:
        file.seek(21)
        file.write(bytes([0xFF] * 5))


def a_folder(path):
    os.unlink(path)
    os.mkdir(path)


def a_link_to_itself(path):
    os.unlink(path)
    os.symlink(path, path)


def a_pipe(path):
    os.unlink(path)
    os.mkfifo(path)


def a_name_that_is_too_long(path):
    return os.path.join(os.path.dirname(path), "x" * 300)


def a_name_with_a_null_byte(path):
    return path + "\0"


def not_a_number(path):
    samples = np.zeros(32000, np.float32)
    samples[::1000] = np.nan
    soundfile.write(path, samples, 16000, format="WAV", subtype="FLOAT")


def infinite(path):
    soundfile.write(path, np.full(32000, np.inf, np.float32), 16000, format="WAV", subtype="FLOAT")


def another_rate(path):
    soundfile.write(path, np.zeros(32000), 8000, format="FLAC")


def stereo(path):
    soundfile.write(path, np.zeros((32000, 2)), 16000, format="FLAC")


SPOILT = {
    vanish: "No such file",
    empty: "cannot be read",
    truncate: "cannot be read",
    text: "cannot be read",
    zeros: "cannot be read",
    endless: "cannot be read",
    a_folder: "is not a regular file",
    a_link_to_itself: "cannot be read",
    a_pipe: "is not a regular file",
    a_name_that_is_too_long: "cannot be read",
    a_name_with_a_null_byte: "cannot be read",
    not_a_number: "NaN or infinite",
    infinite: "NaN or infinite",
    another_rate: "at 8000 Hz",
    stereo: "2 channel(s)",
}


def spoil(clips, number, how):
    """The clips with one of them damaged, in its file or its name."""
    path = how(clips[number].wav) or clips[number].wav
    return [clip if place != number else Clip(**{**vars(clip), "wav": path}) for place, clip in enumerate(clips)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("how", SPOILT, ids=lambda how: how.__name__)
@pytest.mark.parametrize("crop", [None, 0.5], ids=["whole", "crop"])
def test_a_damaged_clip_is_skipped_with_the_reason(clips, how, crop):
    whole = ClipDataset(clips, ["a", "b"], crop_seconds=crop)
    others = collate([whole[(0, 1)], whole[(3, 1)]])
    if how is endless and crop:
        pytest.skip("the stretch that is asked for is there")
    dataset = ClipDataset(spoil(clips, 1, how), ["a", "b"], crop_seconds=crop)
    batch = collate([dataset[(0, 1)], dataset[(1, 1)], dataset[(3, 1)]])
    ((name, why),) = batch.lost
    assert name == "clip1" and SPOILT[how] in why and str(dataset.clips[1].wav).split("\0")[0] in why
    assert batch.ids == ("clip0", "clip3") and batch.labels.tolist() == [0, 1]
    assert torch.equal(batch.wavs, others.wavs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_gives_samples_or_a_reason(tmp_path_factory, place, bit, in_header):
    path = tmp_path_factory.getbasetemp() / "flipped.flac"
    codecs.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[place % (100 if in_header else len(content))] ^= 1 << bit
    path.write_bytes(content)
    item = ClipDataset([Clip("c", 0.25, str(path), "a", "", "", "")], ["a"])[(0, 1)]
    assert isinstance(item, Lost) or np.isfinite(item[1]).all()


def test_a_batch_of_unreadable_clips_is_empty(clips):
    batch = collate([Lost("one", "why"), Lost("other", "because")])
    assert len(batch) == 0 and batch.lost == (("one", "why"), ("other", "because"))
    assert batch.wavs.shape == (0, 0) and batch.labels.shape == (0,) and batch.to("cpu").lost == batch.lost


def test_workers_report_unreadable_clips(clips):
    vanish(clips[3].wav)
    dataset = ClipDataset(clips, ["a", "b"])
    sampler = BucketBatchSampler(dataset.seconds(), 4.0)
    batches = list(make_loader(dataset, sampler, num_workers=1))
    assert [name for batch in batches for name, _ in batch.lost] == ["clip3"]
    assert sorted(name for batch in batches for name in batch.ids) == ["clip0", "clip1", "clip2"]


# Reading processes that are killed

FORKED = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")


class Suicidal(ClipDataset):
    """Kills the worker that reads a certain clip, as many times as there are counter files."""

    def __getitem__(self, key):
        lives = sorted(self.lives.glob(f"{self.clips[key[0]].id}.{key[1]}.*"))
        if lives:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


@pytest.fixture
def soon_noticed(monkeypatch):
    """PyTorch checks every five seconds whether its workers are alive."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.fixture
def killing_dataset(clips, tmp_path, soon_noticed):
    """Function: (clip, epoch, times), ... -> dataset that kills its worker there."""

    def make(*deaths):
        augmentation = make_augmentation(True, 0.9, [0.9, 1.1], [5, 20])
        many = [Clip(**{**vars(clip), "id": f"{clip.id}{n}"}) for n in range(5) for clip in clips]
        dataset = Suicidal(many, ["a", "b"], crop_seconds=1.0, augmentation=augmentation, seed=4)
        dataset.lives = tmp_path / "lives"
        shutil.rmtree(dataset.lives, ignore_errors=True)
        dataset.lives.mkdir()
        for clip, number, times in deaths:
            for life in range(times):
                (dataset.lives / f"{clip}.{number}.{life}").touch()
        return dataset

    return make


def passes(dataset, workers, epochs=(1,), start=0, loader=None):
    """All batches of a loader, epoch by epoch."""
    sampler = BucketBatchSampler(dataset.seconds(), 2.5)
    loader = (loader or make_loader)(dataset, sampler, num_workers=workers)
    found = []
    for number in epochs:
        sampler.set_epoch(number)
        sampler.start = start
        found += [(batch.ids, batch.wavs.sum().item(), batch.wavs.shape) for batch in loader]
        assert sampler.start == start
    return found


@FORKED
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_changes_no_batch(killing_dataset, caplog, workers, start):
    undisturbed = passes(killing_dataset(), 0, (1, 2), start)
    steps = len(undisturbed) // 2
    # In the first and the last batch of the first epoch, and in the middle of the second.
    deaths = [(undisturbed[step][0][0], 1 + step // steps, 1) for step in (0, steps - 1, steps + steps // 2)]
    assert passes(killing_dataset(*deaths), workers, (1, 2), start) == undisturbed
    assert "restarting the workers" in caplog.text


@FORKED
def test_a_worker_killed_repeatedly_is_an_error(killing_dataset, caplog):
    with pytest.raises(TrainingError, match="died 4 times in one epoch") as caught:
        passes(killing_dataset(("clip12", 1, 99)), 1)
    assert "num_workers" in str(caught.value) and "last checkpoint" in str(caught.value)
    assert caplog.text.count("restarting the workers") == ClipLoader.RESTARTS


class Faulty(ClipDataset):
    """A dataset with a bug."""

    def __getitem__(self, key):
        raise RuntimeError("a bug of the data set")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_a_dataset_are_raised(clips, caplog, workers):
    with pytest.raises(RuntimeError, match="a bug of the data set"):
        passes(Faulty(clips, ["a", "b"]), workers)
    assert "restarting" not in caplog.text


class Watchful(ClipDataset):
    """Returns the worker's signal handlers in place of an accent."""

    def __getitem__(self, key):
        name, samples, _ = super().__getitem__(key)
        ignored = all(signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT))
        return name, samples, int(ignored)


def test_workers_ignore_signals(clips):
    dataset = Watchful(clips, ["a", "b"])
    loader = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0), num_workers=1)
    # Set explicitly, because background jobs of a shell ignore this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert [label for batch in loader for label in batch.labels.tolist()] == [1] * 4
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_a_loader_does_not_change_the_global_generator(clips, workers):
    dataset, before = ClipDataset(clips, ["a", "b"]), torch.get_rng_state()
    list(make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_restarts_after_an_incomplete_iteration(clips):
    dataset = ClipDataset(clips, ["a", "b"])
    loader = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0, shuffle=False), num_workers=1)
    first = next(iter(loader)).ids
    assert [batch.ids for batch in loader][0] == first


# Augmentation

RATE = 16000


def tone(frequency, seconds=1.0):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def peak(samples):
    return np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples)


def test_speed_changes_length_and_pitch():
    faster = change_speed(tone(1000), 1.25)
    assert len(faster) == 12800
    assert abs(peak(faster) - 1250) < 5


def test_band_limit_removes_what_is_above_and_keeps_what_is_below():
    limited = limit_band(tone(1000) + tone(5000), 3000)
    assert np.allclose(limited, tone(1000), atol=1e-3)


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_has_the_given_signal_to_noise_ratio(snr):
    clean = tone(440)
    noise = add_noise(clean, snr, 0.5, np.random.default_rng(0)) - clean
    assert abs(10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) - snr) < 0.01


def test_noise_does_not_change_silence():
    assert not add_noise(np.zeros(1000, np.float32), 10, 0.5, np.random.default_rng(0)).any()


def test_a_time_mask_is_one_segment_of_limited_length():
    clean = np.ones(RATE, np.float32)
    for seed in range(20):
        masked = mask_time(clean, 4000, np.random.default_rng(seed))
        silent = np.flatnonzero(masked == 0)
        assert len(silent) <= 4000
        assert len(silent) == 0 or silent[-1] - silent[0] + 1 == len(silent)
    assert clean.all()


def test_a_clip_is_augmented_the_same_for_the_same_generator():
    augmentation = Augmentation(1.0, (0.9, 1.1), (5, 20), (2000, 8000), 0.3)
    one, same, other = (augmentation(tone(440), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.dtype == np.float32 and np.isfinite(one).all()


def test_probability_zero_changes_nothing():
    clean = tone(440)
    assert np.array_equal(Augmentation(0.0, (0.9, 1.1), (5, 20))(clean, np.random.default_rng(0)), clean)


KEEPS_ITS_LOADER = """
import sys
from accent_plugin.training import batches

class Dataset:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return index

loader = batches.ClipLoader(
    Dataset(), batch_sampler=batches.BucketBatchSampler([1.0] * 4, 1.0), num_workers=1, persistent_workers=True
)
# As a traceback does that somebody holds.
sys.kept = iter(loader)
next(sys.kept)
print("the end", flush=True)
"""


def test_a_process_exits_while_its_loader_is_alive():
    """Python sends the workers SIGTERM, which they ignore, and then waits for them."""
    done = subprocess.run([sys.executable, "-c", KEEPS_ITS_LOADER], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "unable to allocate shared memory(shm) for file </torch_1_2_0>: Resource temporarily unavailable (11)",
        "unable to write to file </torch_1_2_0>: No space left on device (28)",
    ],
)
def test_full_shared_memory_is_named(clips, monkeypatch, words):
    def fail(batch):
        raise RuntimeError(words)

    monkeypatch.setattr(Batch, "share_memory", fail)
    dataset = ClipDataset(clips, ["a", "b"])
    loader = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0), num_workers=1)
    with pytest.raises(TrainingError, match="shared memory .*\n.*--shm-size=1g.*num_workers"):
        list(loader)


def test_batches_of_workers_are_in_shared_memory(clips):
    dataset = ClipDataset(clips, ["a", "b"])
    (batch, *_) = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 4.0), num_workers=1)
    assert batch.wavs.is_shared() and batch.labels.is_shared()
