"""Data loaders of a run, and the weights of classes and clips."""

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from speechbrain.utils.callchains import lengths_arg_exists

from accent_plugin.audio.changes import change_speed
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data.manifests import read_manifest
from accent_plugin.errors import ConfigError, ManifestError
from accent_plugin.training import distributed
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, inverse_frequency, make_loader

# Evaluation keeps no activations for a backward pass, so that more audio fits.
_EVALUATION_BATCHES = 2

_LARGEST_BATCH = 120.0


@dataclass(frozen=True)
class LoadingOptions:
    """Options for loading clips in batches.

    Arguments
    ---------
    accents : list of str
        Classes, in the order of the output.
    seed : int
        For batches, crops and augmentation.
    balance : str
        "sampler" draws training clips so that all accents are equally frequent.
    batch_seconds : float
        Audio in a batch, including padding.
    crop_seconds : float
        Length of random crops of training clips; None for whole clips.
    augmentation : accent_plugin.audio.augment.Augmentation, or a module such as SpeechBrain's Augmenter
        For training clips; None for none. A module is wrapped in a `SpeechBrainAugmentation`.
    num_workers : int
        Number of processes that read audio.
    augment_copies : int
        Number of copies of each training clip with different crops and augmentation; None makes a new one every epoch.
    """

    accents: list
    seed: int
    balance: str
    batch_seconds: float
    crop_seconds: float | None
    augmentation: object
    num_workers: int
    augment_copies: int | None = None


def read_clips(paths, accents):
    """Read the manifests of all splits.

    Arguments
    ---------
    paths : dict
        Split -> manifest, from `accent_plugin.data.manifests.Prepared.paths`.
    accents : list of str
        Classes; a clip with another accent raises a ManifestError.

    Returns
    -------
    dict
        Split -> accent_plugin.data.manifests.Clips.
    """
    splits = {}
    for split, path in paths.items():
        splits[split] = read_manifest(path)
        strange = sorted({clip.accent for clip in splits[split]} - set(accents))
        if strange:
            raise ManifestError(f"{path} has the accent(s) {', '.join(strange)}; accents lists {', '.join(accents)}")
    return splits


def training_clips(clips, options):
    """Make a loader of clips in random batches, with the crops and augmentation of `options`, a `LoadingOptions`."""
    dataset = ClipDataset(
        *(clips, options.accents, options.crop_seconds, augmentation_of(options), options.seed),
        copies=options.augment_copies,
    )
    weights = None
    if options.balance == "sampler":
        labels = dataset.labels()
        weights = inverse_frequency(labels, len(options.accents))[labels]
    sampler = _sampler(dataset, options.batch_seconds, seed=options.seed, weights=weights)
    return make_loader_of(dataset, sampler, options)


def whole_clips(clips, options, degrade=None):
    """Make a loader of whole clips for evaluation, optionally degraded; `options` is a `LoadingOptions`."""
    dataset = ClipDataset(clips, options.accents, degrade=degrade)
    return make_loader_of(dataset, _sampler(dataset, evaluation_batch_seconds(options), shuffle=False), options)


def evaluation_batch_seconds(options):
    """Seconds of audio in a batch for evaluation."""
    # Larger batches than these are for heads on features that are kept, and gain nothing where an encoder runs.
    return _EVALUATION_BATCHES * min(options.batch_seconds, _LARGEST_BATCH)


def _sampler(dataset, batch_seconds, **keywords):
    share = {"rank": distributed.rank(), "processes": distributed.world_size()}
    return BucketBatchSampler(dataset.seconds(), batch_seconds, **keywords, **share)


def make_loader_of(dataset, sampler, options):
    """Make a loader with the run's number of workers."""
    return make_loader(dataset, sampler, options.num_workers, pin_memory=torch.cuda.is_available())


def make_class_weights(choice, dataset):
    """Weights of the classes in the loss, (classes,) torch.Tensor; `choice` is a list, "balanced", or None for None."""
    if choice is None:
        return None
    if choice == "balanced":
        choice = inverse_frequency(dataset.labels(), len(dataset.accents))
    return torch.tensor(np.asarray(choice), dtype=torch.float32)


def augmentation_of(options):
    """Return the augmentation of `options`, a `LoadingOptions`, as a function of samples, generator and voices."""
    augmentation = options.augmentation
    return SpeechBrainAugmentation(augmentation) if isinstance(augmentation, torch.nn.Module) else augmentation


class SpeechBrainAugmentation:
    """SpeechBrain's Augmenter applied to single clips in the workers, with the interface of an `Augmentation`.

    Every random number comes from the generator of the clip, so that a clip's augmentation in an epoch depends neither
    on the batch, nor on the worker, nor on restarts.

    Arguments
    ---------
    augmenter : speechbrain.augment.augmenter.Augmenter
        Another module with the same interface works too: (batch, samples) waveforms and (batch,) relative lengths ->
        both.

    Raises
    ------
    ConfigError
        If it makes several copies of a clip, reads noise in worker processes of its own or in a fixed order, or cannot
        read it.
    """

    def __init__(self, augmenter):
        parts = list(getattr(augmenter, "augmentations", {}).values())
        several = [name for name in ("concat_original", "parallel_augment") if getattr(augmenter, name, False)]
        several += ["repeat_augment"] * (getattr(augmenter, "repeat_augment", 1) > 1)
        if several:
            raise ConfigError(f"augmentation: {' and '.join(several)} would make several copies of a clip: turn it off")
        if any(getattr(part, "num_workers", 0) for part in parts):
            raise ConfigError("augmentation: num_workers of noise and impulse responses must be 0 in a worker process")
        if any(getattr(part, "csv_file", None) and part.sorting != "random" for part in parts):
            raise ConfigError(
                "augmentation: noise and impulse responses are drawn for each clip; sorting must be random"
            )
        speeds = [speed / 100 for part in parts for speed in getattr(part, "speeds", ())] or [1.0]
        self.slowest, self.fastest = max(1.0, 1 / min(speeds)), max(1.0, *speeds)
        self._augmenter, self._parts = augmenter, [part for part in parts if getattr(part, "csv_file", None)]
        # A missing file is an error before training.
        self._draw_anew(0)

    def __call__(self, samples, rng, voices=None):
        """Augment (samples,) np.ndarray with a generator; `voices` is not used."""
        seed = int(rng.integers(2**32))
        self._draw_anew(seed)
        with _seeded(seed), torch.no_grad():
            augmented, _ = self._augmenter(torch.from_numpy(samples)[None], torch.ones(1))
        return augmented[0].numpy()

    def __reduce__(self):
        # Loaders cannot be pickled, and are made anew.
        for part in self._parts:
            for name in ("data_loader", *_ITERATORS):
                vars(part).pop(name, None)
        return type(self), (self._augmenter,)

    def _draw_anew(self, seed):
        """Let the next noise and impulse response be drawn in an order that the seed decides."""
        for part in self._parts:
            if not hasattr(part, "data_loader"):
                _read_once(part)
            # SpeechBrain's sampler has a seed of its own, to which it adds the epoch.
            if hasattr(part.data_loader.sampler, "set_epoch"):
                part.data_loader.sampler.set_epoch(seed)
            for name in _ITERATORS:
                if hasattr(part, name):
                    # An exhausted iterator makes the part start a new one.
                    setattr(part, name, iter(()))


# Attributes in which SpeechBrain's noise and reverberation keep their place in a CSV.
_ITERATORS = ("noise_data", "rir_data")


def _read_once(part):
    """Let a part of an Augmenter read a first file, which makes its loader; raise a ConfigError if that fails."""
    waves = torch.ones(1, SAMPLE_RATE)
    try:
        with _seeded(0):
            part(waves, torch.ones(1)) if lengths_arg_exists(part.forward) else part(waves)
    except Exception as error:
        # SpeechBrain, torch and soundfile raise different errors.
        raise ConfigError(f"augmentation: {part.csv_file} cannot be used: {error}") from error


@contextlib.contextmanager
def _seeded(seed):
    """Seed the generators of Python, NumPy and PyTorch on the CPU, and give them back their states afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def change_clip_speed(samples, rng, voices, speed):
    """Change a clip's speed, with the interface of a degradation."""
    return change_speed(samples, speed)


class ChainedChanges:
    """Several degradations in sequence; a class, because workers may have to pickle it."""

    def __init__(self, changes):
        self.changes = changes

    def __call__(self, samples, rng, voices):
        """Apply all changes to (samples,) np.ndarray."""
        for change in self.changes:
            samples = change(samples, rng, voices)
        return samples
