"""Dynamic batching by seconds of audio; clips are read, cropped and augmented in the loader's workers.

All randomness of a clip is seeded by (seed, epoch, clip), or by (seed, copy, clip) if there is a fixed number of
augmented copies, and the composition of the batches by (seed, epoch). It depends neither on the number of workers nor
on interruptions.

All processes make the same plan of batches; each of N processes takes every N-th batch. An unreadable clip is skipped,
and its batch holds the reason. A batch may be empty as a result.
"""

import atexit
import contextlib
import copy
import errno
import functools
import logging
import multiprocessing.connection
import os
import signal
import threading
import weakref
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import AudioError, TrainingError
from accent_plugin.training import signals

logger = logging.getLogger(__name__)

# PyTorch's default `ignore_index` of losses.
NO_LABEL = -100

# Seconds within which a worker whose connections are closed must have ended.
EXIT_GRACE_SECONDS = 5.0


# Words in errors about full shared memory: of PyTorch, and of Python's semaphores. A loader writes to no other disk.
_SHARED_MEMORY_FULL = ("shared memory(shm)", "unable to write to file </torch_", os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Batch:
    """Padded clips.

    Attributes
    ----------
    ids : tuple of str
    wavs : (batch, samples) torch.Tensor
        16 kHz, zeros after each clip's end.
    wav_lens : (batch,) torch.Tensor or None
        Length of each clip as a fraction of the longest; None if all are equally long.
    labels : (batch,) torch.Tensor of int64
    lost : tuple of (str, str)
        Id of each unreadable clip, and the reason.
    states : (states, batch, frames, features) torch.Tensor or None
        Hidden states of `accent_plugin.training.feature_cache` in place of the waveforms, which are then empty.
    frame_counts : (batch,) torch.Tensor of int64, or None
        Number of frames of each clip in `states`.
    """

    ids: tuple
    wavs: torch.Tensor
    wav_lens: torch.Tensor | None
    labels: torch.Tensor
    lost: tuple = ()
    states: torch.Tensor | None = None
    frame_counts: torch.Tensor | None = None

    def __len__(self):
        return len(self.ids)

    def _map(self, function):
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def to(self, device):
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def share_memory(self):
        """The same batch in shared memory; called in a worker."""
        return self._map(torch.Tensor.share_memory_)

    def pin_memory(self):
        """The same batch in page-locked memory; called by the loader."""
        return self._map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Lost:
    """An unreadable clip."""

    id: str
    why: str


def split_lost(items):
    """Separate the readable items of a batch from the id and reason of each `Lost` one."""
    lost = tuple((item.id, item.why) for item in items if isinstance(item, Lost))
    return [item for item in items if not isinstance(item, Lost)], lost


def collate(items):
    """Pad a list of (id, samples, label), or `Lost` for unreadable clips, to a `Batch`."""
    items, lost = split_lost(items)
    if not items:
        return Batch((), torch.zeros(0, 0), None, torch.zeros(0, dtype=torch.int64), lost)
    ids, waves, labels = zip(*items, strict=True)
    lengths = [len(wave) for wave in waves]
    wavs = torch.zeros(len(waves), max(lengths))
    for row, wave in zip(wavs, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    lens = torch.tensor(lengths) / max(lengths) if min(lengths) < max(lengths) else None
    return Batch(ids, wavs, lens, torch.tensor(labels), lost)


class ClipDataset(Dataset):
    """Clips by (index, epoch): the epoch is part of the key, so that persistent workers know it.

    Arguments
    ---------
    clips : sequence of accent_plugin.data.manifests.Clip
    accents : sequence of str
        Classes; a clip's label is the index of its accent.
    crop_seconds : float
        Length of a random crop from longer clips; None for whole clips.
    augmentation : Augmentation
        None for none.
    seed : int
    degrade : callable
        (samples, generator, voices) -> as many samples, applied before the augmentation, such as one of
        `accent_plugin.audio.degradations.DEGRADATIONS`; None for none. `voices` is as for an `Augmentation`.
    copies : int
        Number of copies of each clip with different crops and augmentation; each epoch uses the next copy. None makes a
        new one in every epoch.
    """

    def __init__(self, clips, accents, crop_seconds=None, augmentation=None, seed=0, degrade=None, copies=None):
        self.clips = self.voices = clips
        self.accents = {accent: label for label, accent in enumerate(accents)}
        self.crop = None if crop_seconds is None else round(crop_seconds * SAMPLE_RATE)
        self.augmentation = augmentation
        self.seed = seed
        self.degrade = degrade
        self.copies = copies

    def __len__(self):
        return len(self.clips)

    def with_clips(self, clips):
        """The same data set with other clips; babble stays that of the clips so far."""
        other = copy.copy(self)
        other.clips = clips
        return other

    def copy(self, epoch):
        """Number of the copy of each clip that an epoch, counted from 1, uses; copies are counted from 1 too."""
        return epoch if self.copies is None else (epoch - 1) % self.copies + 1

    def seconds(self):
        """Maximum length of each clip after augmentation, in seconds: (clips,) np.ndarray."""
        slowest = self.augmentation.slowest if self.augmentation else 1.0
        seconds = np.array([clip.duration for clip in self.clips]) * slowest
        return seconds if self.crop is None else np.minimum(seconds, self.crop / SAMPLE_RATE)

    def __getitem__(self, key):
        index, epoch = key
        clip = self.clips[index]
        rng = np.random.default_rng([self.seed, self.copy(epoch), zlib.crc32(clip.id.encode())])
        try:
            samples = self._read(clip, rng)
        except AudioError as error:
            return Lost(clip.id, str(error))
        if self.degrade is not None:
            samples = self.degrade(samples, rng, functools.partial(self._voices, clip))
        if self.augmentation is not None:
            samples = self.augmentation(samples, rng, functools.partial(self._voices, clip))
            if self.crop is not None:
                samples = samples[: self.crop]
        return clip.id, samples, self.label(clip)

    def label(self, clip):
        """Index of a clip's accent; `NO_LABEL`, which losses ignore, if it is none of the classes."""
        return self.accents.get(clip.accent, NO_LABEL)

    def labels(self):
        """Index of each clip's accent: (clips,) np.ndarray of int."""
        return np.array([self.label(clip) for clip in self.clips])

    def _read(self, clip, rng):
        if self.crop is None:
            return codecs.read(clip.wav)
        # Read more than the crop, so that it still has its full length at a higher speed.
        fastest = self.augmentation.fastest if self.augmentation else 1.0
        return _random_part(clip, int(np.ceil(self.crop * fastest)), rng)

    def _voices(self, clip, rng, number, samples):
        """Read parts, at most `samples` long, of clips of speakers other than `clip`'s; leave unreadable ones out."""
        voices = []
        # A corpus may have few other speakers, or none.
        for place in rng.integers(0, len(self.voices), size=4 * number):
            other = self.voices[int(place)]
            if (other.client_id or other.id) != (clip.client_id or clip.id) and len(voices) < number:
                with contextlib.suppress(AudioError):
                    voices.append(_random_part(other, samples, rng))
        return voices


def _random_part(clip, samples, rng):
    """Read a random part of a clip with `samples` samples, or all of a clip that is not longer."""
    spare = round(clip.duration * SAMPLE_RATE) - samples
    if spare <= 0:
        return codecs.read(clip.wav)
    return codecs.read(clip.wav, start=int(rng.integers(0, spare + 1)), frames=samples)


class BucketBatchSampler(Sampler):
    """Batches of clips of similar length with at most `batch_seconds` of audio, including padding.

    In each epoch clips are shuffled, cut into pools, sorted by length within each pool and cut into batches, which are
    shuffled. The batch with the most audio comes first, so that too large a `batch_seconds` fails at once.

    Arguments
    ---------
    seconds : (clips,) np.ndarray
    batch_seconds : float
        A longer clip is a batch by itself.
    shuffle : bool
        False gives one fixed order, from the longest to the shortest clip.
    seed : int
    weights : (clips,) np.ndarray
        Sampling weights: as many clips as there are, drawn with replacement. None takes each clip once.
    rank, processes : int
        Take every `processes`-th batch, beginning with batch `rank`. All processes take the same number; the last
        batches may be empty.

    Attributes
    ----------
    start : int
        Number of this process's batches to skip at the start of the epoch, because they precede a restart.
    """

    # Batches in a pool: a larger pool needs less padding, a smaller one gives more varied batches.
    _POOL = 16

    def __init__(self, seconds, batch_seconds, shuffle=True, seed=0, weights=None, rank=0, processes=1):
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.batch_seconds = batch_seconds
        self.shuffle = shuffle
        self.seed = seed
        self.weights = weights
        self.rank = rank
        self.processes = processes
        self.start = 0
        self.epoch = 0
        self._plan_of = None

    def set_epoch(self, epoch):
        """Set the epoch; SpeechBrain's Brain calls this when an epoch starts."""
        self.epoch = epoch

    def __len__(self):
        """Number of this process's batches in the whole epoch, including skipped ones."""
        return -(-len(self.plan()) // self.processes)

    def __iter__(self):
        plan = self.plan()
        for step in range(self.start, len(self)):
            place = step * self.processes + self.rank
            yield [(int(index), self.epoch) for index in plan[place]] if place < len(plan) else []

    def plan(self):
        """The epoch's batches for all processes, as a list of arrays of clip indices."""
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
            probabilities = self.weights / np.sum(self.weights)
            order = rng.choice(len(self.seconds), size=len(self.seconds), p=probabilities)
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
        """Cut clips, sorted from long to short, into batches; the first clip determines how many fit."""
        batches, start = [], 0
        while start < len(order):
            count = max(1, int(self.batch_seconds / self.seconds[order[start]]))
            batches.append(order[start : start + count])
            start += count
        return batches


class ClipLoader(DataLoader):
    """A DataLoader that restarts killed workers; its batch sampler is a `BucketBatchSampler`.

    Arguments as for a DataLoader. It has its own random generator, so that starting an epoch again leaves the global
    one unchanged.
    """

    # Restarts of the workers in one epoch. Mostly they are killed for a lack of memory, which a restart may not cure.
    RESTARTS = 3

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, worker_init_fn=_ignore_signals, generator=torch.Generator(), **keywords)

    def __iter__(self):
        first, done, restarts, batches = self.batch_sampler.start, 0, 0, None
        try:
            while True:
                try:
                    batches = self._begin()
                    for batch in batches:
                        done += 1
                        yield batch
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if self.num_workers and any(words in str(error) for words in _SHARED_MEMORY_FULL):
                        raise TrainingError(
                            "shared memory (/dev/shm) is full: workers pass batches through it\n"
                            "give a container more (docker run --shm-size=1g), or lower num_workers (0 reads without "
                            "workers) or batch_seconds, and rerun the same command: it resumes from the last checkpoint"
                        ) from error
                    if not _is_dead_worker(batches, error):
                        raise
                    restarts += 1
                    if restarts > self.RESTARTS:
                        raise TrainingError(
                            f"the workers that read audio died {restarts} times in one epoch: {error}\n"
                            "memory, or shared memory (/dev/shm), may be short: lower num_workers (0 reads without "
                            "workers) or batch_seconds, and rerun the same command: it resumes from the last checkpoint"
                        ) from error
                    logger.warning("a worker that reads audio died; restarting the workers (%s)", error)
                self._iterator = batches = None
                self.batch_sampler.start = first + done
        finally:
            self.batch_sampler.start = first

    def _begin(self):
        with _keep_sigchld_handler() if self.num_workers else contextlib.nullcontext():
            batches = super().__iter__()
        _workers.update(getattr(batches, "_workers", ()))
        return batches


# Workers that are alive.
_workers: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_workers():
    """Kill the workers at exit: they ignore the SIGTERM that Python sends, and Python would wait for them for ever."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


def _is_dead_worker(batches, error):
    """Whether an error comes from a worker's death rather than from its code."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    # The worker died after announcing a batch that had not been fetched; its connections close before it ends.
    workers = [] if "in DataLoader worker process" in str(error) else getattr(batches, "_workers", [])
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=EXIT_GRACE_SECONDS))


@contextlib.contextmanager
def _keep_sigchld_handler():
    """Undo torch's SIGCHLD handler, which raises anywhere in the program; waiting for a batch detects a death too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _ignore_signals(worker):
    signals.ignore_signals()


class _SharedCollate:
    """Collate to a batch in shared memory; a class, as spawned workers have to pickle it.

    PyTorch would share it in a thread, where an error (shared memory is full) loses the batch, and the loader waits for
    it for ever.
    """

    def __init__(self, collate_fn):
        self.collate_fn = collate_fn

    def __call__(self, items):
        return self.collate_fn(items).share_memory()


def make_loader(dataset, sampler, num_workers=0, pin_memory=False, collate_fn=collate):
    """Make a `ClipLoader` of a `ClipDataset` with batches from a `BucketBatchSampler`."""
    return ClipLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_SharedCollate(collate_fn) if num_workers else collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def inverse_frequency(labels, classes):
    """Weight each class inversely to its frequency, with a mean over clips of one; returns (classes,) np.ndarray.

    Arguments
    ---------
    labels : (clips,) np.ndarray of int
    classes : int

    Example
    -------
    >>> inverse_frequency(np.array([0, 0, 0, 1]), 2)
    array([0.66666667, 2.        ])
    """
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * np.maximum(counts, 1))
