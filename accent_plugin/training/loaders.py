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
    """How clips come to be batches.

    Arguments
    ---------
    accents : list of str
        Classes, in the order of the output.
    seed : int
        Of batches, crops and augmentation.
    balance : str
        "sampler" draws training clips so that all accents come equally often.
    batch_seconds : float
        Audio in a batch, padding included.
    crop_seconds : float
        Train on random stretches of this length; None takes clips whole.
    augmentation : accent_plugin.audio.augment.Augmentation
        Of training clips; None for none.
    num_workers : int
        Processes that read audio.
    """

    accents: list
    seed: int
    balance: str
    batch_seconds: float
    crop_seconds: float | None
    augmentation: object
    num_workers: int


def read_clips(paths, accents):
    """The clips of each split.

    Arguments
    ---------
    paths : dict
        Split -> manifest, as `accent_plugin.data.manifests.Prepared.paths` gives it.
    accents : list of str
        Classes.

    Returns
    -------
    dict
        Split -> accent_plugin.data.manifests.Clips.

    Raises
    ------
    ManifestError
        When a clip has another accent.
    """
    splits = {}
    for split, path in paths.items():
        splits[split] = read_manifest(path)
        strange = sorted({clip.accent for clip in splits[split]} - set(accents))
        if strange:
            raise ManifestError(f"{path} has the accent(s) {', '.join(strange)}; accents lists {', '.join(accents)}")
    return splits


def training_clips(clips, options):
    """A loader of clips in random batches, cropped and augmented as `options`, a `LoadingOptions`, says."""
    dataset = ClipDataset(clips, options.accents, options.crop_seconds, options.augmentation, options.seed)
    weights = _clip_weights(dataset, options)
    sampler = _sampler(dataset, options.batch_seconds, seed=options.seed, weights=weights)
    return make_loader_of(dataset, sampler, options)


def whole_clips(clips, options, degrade=None):
    """A loader of clips as they are, or as `degrade` leaves them, for evaluation; `options` is a `LoadingOptions`."""
    dataset = ClipDataset(clips, options.accents, degrade=degrade)
    return make_loader_of(dataset, _sampler(dataset, evaluation_batch_seconds(options), shuffle=False), options)


def evaluation_batch_seconds(options):
    """Seconds of audio in a batch of evaluation."""
    # Larger batches than these are for heads on features that are kept, and gain nothing where an encoder runs.
    return _EVALUATION_BATCHES * min(options.batch_seconds, _LARGEST_BATCH)


def _sampler(dataset, batch_seconds, **keywords):
    """Batches for this one of the processes."""
    share = {"rank": distributed.rank(), "processes": distributed.world_size()}
    return BucketBatchSampler(dataset.seconds(), batch_seconds, **keywords, **share)


def make_loader_of(dataset, sampler, options):
    """Make a loader with the run's number of workers."""
    return make_loader(dataset, sampler, options.num_workers, pin_memory=torch.cuda.is_available())


def _clip_weights(dataset, options):
    """Weights for drawing clips so that all accents come equally often; None where `balance` is not sampler."""
    if options.balance != "sampler":
        return None
    labels = dataset.labels()
    return inverse_frequency(labels, len(options.accents))[labels]


def make_class_weights(choice, dataset):
    """Weights of the classes in the loss.

    Arguments
    ---------
    choice : None, "balanced" or list of float
    dataset : ClipDataset
        Of the training split.

    Returns
    -------
    (classes,) torch.Tensor, or None
    """
    if choice is None:
        return None
    if choice == "balanced":
        choice = inverse_frequency(dataset.labels(), len(dataset.accents))
    return torch.tensor(np.asarray(choice), dtype=torch.float32)


def change_clip_speed(samples, rng, speed):
    """Change a clip's speed; in the form that data sets call."""
    return change_speed(samples, speed)


class ChainedChanges:
    """Degradations one after the other; a class, as the loader's workers may have to pickle it."""

    def __init__(self, changes):
        self.changes = changes

    def __call__(self, samples, rng):
        """Apply all changes to (samples,) np.ndarray."""
        for change in self.changes:
            samples = change(samples, rng)
        return samples
