"""Clips -> batches: reading, cropping and augmenting in the loader's workers, batches by seconds of audio.

Everything random about a clip is drawn from (seed, epoch, clip), and the composition of the batches from
(seed, epoch): it depends neither on the number of workers nor on how often training was interrupted.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from accent_plugin import audio

# PyTorch's own mark for a target that does not count.
NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Padded clips.

    Attributes
    ----------
    ids : tuple of str
    wavs : (batch, samples) torch.Tensor
        16 kHz, zeros after each clip's end.
    wav_lens : (batch,) torch.Tensor or None
        Length of each clip as a share of the longest; None where all are equally long.
    labels : (batch,) torch.Tensor of int64
    """

    ids: tuple
    wavs: torch.Tensor
    wav_lens: torch.Tensor | None
    labels: torch.Tensor

    def _map(self, function):
        lens = None if self.wav_lens is None else function(self.wav_lens)
        return replace(self, wavs=function(self.wavs), wav_lens=lens, labels=function(self.labels))

    def to(self, device):
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The same batch in page-locked memory; called by the loader."""
        return self._map(torch.Tensor.pin_memory)


def collate(items):
    """Pad a list of (id, samples, label) to a `Batch`."""
    ids, waves, labels = zip(*items, strict=True)
    lengths = [len(wave) for wave in waves]
    wavs = torch.zeros(len(waves), max(lengths))
    for row, wave in zip(wavs, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    lens = torch.tensor(lengths) / max(lengths) if min(lengths) < max(lengths) else None
    return Batch(ids, wavs, lens, torch.tensor(labels))


class ClipDataset(Dataset):
    """Clips by (index, epoch): the key carries the epoch so that workers need not be told of it.

    Arguments
    ---------
    clips : sequence of accent_plugin.manifests.Clip
    accents : sequence of str
        Classes; a clip's label is its accent's place.
    crop_seconds : float
        Take a random stretch of this length from longer clips; None takes clips whole.
    augmentation : Augmentation
        None for none.
    seed : int
    degrade : callable
        Function of samples and a generator that returns as many, as in `accent_plugin.bands.BANDS`; applied to what was
        read, before the augmentation. None for none.
    """

    def __init__(self, clips, accents, crop_seconds=None, augmentation=None, seed=0, degrade=None):
        self.clips = clips
        self.accents = {accent: label for label, accent in enumerate(accents)}
        self.crop = None if crop_seconds is None else round(crop_seconds * audio.SAMPLE_RATE)
        self.augmentation = augmentation
        self.seed = seed
        self.degrade = degrade

    def __len__(self):
        return len(self.clips)

    def seconds(self):
        """Longest that each clip can become, in seconds: (clips,) np.ndarray."""
        slowest = self.augmentation.slowest if self.augmentation else 1.0
        seconds = np.array([clip.duration for clip in self.clips]) * slowest
        return seconds if self.crop is None else np.minimum(seconds, self.crop / audio.SAMPLE_RATE)

    def __getitem__(self, key):
        index, epoch = key
        clip = self.clips[index]
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(clip.id.encode())])
        samples = self._read(clip, rng)
        if self.degrade is not None:
            samples = self.degrade(samples, rng)
        if self.augmentation is not None:
            samples = self.augmentation(samples, rng)
            if self.crop is not None:
                samples = samples[: self.crop]
        return clip.id, samples, self.label(clip)

    def label(self, clip):
        """Index of a clip's accent; `NO_LABEL`, which losses pass over, where it is none of the classes."""
        return self.accents.get(clip.accent, NO_LABEL)

    def labels(self):
        """Index of each clip's accent: (clips,) np.ndarray of int."""
        return np.array([self.label(clip) for clip in self.clips])

    def _read(self, clip, rng):
        if self.crop is None:
            return audio.read(clip.wav)
        # Read more than the crop, so that it is still full after having been played faster.
        fastest = max(self.augmentation.speed) if self.augmentation and self.augmentation.speed else 1.0
        wanted = int(np.ceil(self.crop * fastest))
        spare = round(clip.duration * audio.SAMPLE_RATE) - wanted
        if spare <= 0:
            return audio.read(clip.wav)
        return audio.read(clip.wav, start=int(rng.integers(0, spare + 1)), frames=wanted)


class BucketBatchSampler(Sampler):
    """Batches of clips of similar length that hold at most so many seconds of audio, padding included.

    Drawn anew each epoch: clips are shuffled, cut into pools, sorted by length inside a pool and cut into batches,
    which are shuffled. The batch with the most audio comes first, so that too large a `batch_seconds` fails at once.

    Arguments
    ---------
    seconds : (clips,) np.ndarray
    batch_seconds : float
        A clip longer than that makes a batch of its own.
    shuffle : bool
        False gives one fixed order, from the longest to the shortest clip.
    seed : int
    weights : (clips,) np.ndarray
        Draw as many clips as there are, with replacement, in proportion to these; None takes each clip once.
    """

    # Batches in a pool: more means less padding, fewer means more different batches.
    _POOL = 16

    def __init__(self, seconds, batch_seconds, shuffle=True, seed=0, weights=None):
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.batch_seconds = batch_seconds
        self.shuffle = shuffle
        self.seed = seed
        self.weights = weights
        self.epoch = 0
        self._plan_of = None

    def set_epoch(self, epoch):
        """Choose the epoch; SpeechBrain's Brain calls this at its start."""
        self.epoch = epoch

    def __len__(self):
        return len(self.plan())

    def __iter__(self):
        for batch in self.plan():
            yield [(int(index), self.epoch) for index in batch]

    def plan(self):
        """The epoch's batches as a list of arrays of clip indices."""
        if self._plan_of is None or self._plan_of[0] != self.epoch:
            self._plan_of = (self.epoch, self._draw())
        return self._plan_of[1]

    def _draw(self):
        if not self.shuffle:
            return self._cut(np.argsort(-self.seconds, kind="stable"))
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.weights is None:
            order = rng.permutation(len(self.seconds))
        else:
            share = self.weights / np.sum(self.weights)
            order = rng.choice(len(self.seconds), size=len(self.seconds), p=share)
        pool = max(1, int(self._POOL * self.batch_seconds / self.seconds.mean()))
        batches = []
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            batches += self._cut(members[np.argsort(-self.seconds[members], kind="stable")])
        batches = [batches[place] for place in rng.permutation(len(batches))]
        largest = max(range(len(batches)), key=lambda place: len(batches[place]) * self.seconds[batches[place]].max())
        batches.insert(0, batches.pop(largest))
        return batches

    def _cut(self, order):
        """Cut clips sorted from long to short: the first of a batch sets how many fit."""
        batches, start = [], 0
        while start < len(order):
            count = max(1, int(self.batch_seconds / self.seconds[order[start]]))
            batches.append(order[start : start + count])
            start += count
        return batches


def make_loader(dataset, sampler, num_workers=0, pin_memory=False):
    """A DataLoader over a `ClipDataset` with batches from a `BucketBatchSampler`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def inverse_frequency(labels, classes):
    """Weight of each class so that all count the same and the mean over clips is one.

    Arguments
    ---------
    labels : (clips,) np.ndarray of int
    classes : int

    Returns
    -------
    (classes,) np.ndarray

    Example
    -------
    >>> inverse_frequency(np.array([0, 0, 0, 1]), 2)
    array([0.66666667, 2.        ])
    """
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * np.maximum(counts, 1))
