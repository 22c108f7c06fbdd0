"""Data loaders of a run, and the weights of classes and clips."""

from dataclasses import dataclass

import numpy as np
import torch

from accent_plugin.audio.augment import change_speed
from accent_plugin.data.manifests import read_manifest
from accent_plugin.errors import ManifestError
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
    augmentation : accent_plugin.audio.augment.Augmentation
        For training clips; None for none.
    num_workers : int
        Number of processes that read audio.
    """

    accents: list
    seed: int
    balance: str
    batch_seconds: float
    crop_seconds: float | None
    augmentation: object
    num_workers: int


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
    dataset = ClipDataset(clips, options.accents, options.crop_seconds, options.augmentation, options.seed)
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


def change_clip_speed(samples, rng, speed):
    """Change a clip's speed, with the interface of a degradation."""
    return change_speed(samples, speed)


class ChainedChanges:
    """Several degradations in sequence; a class, because workers may have to pickle it."""

    def __init__(self, changes):
        self.changes = changes

    def __call__(self, samples, rng):
        """Apply all changes to (samples,) np.ndarray."""
        for change in self.changes:
            samples = change(samples, rng)
        return samples
