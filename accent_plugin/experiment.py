"""One run of the recipe: manifests -> loaders -> trained Brain -> predictions -> report."""

import importlib.metadata
import logging
import platform
from pathlib import Path

import numpy as np
import torch

from accent_plugin import manifests, report
from accent_plugin.batches import BucketBatchSampler, ClipDataset, inverse_frequency, make_loader
from accent_plugin.brain import read_history
from accent_plugin.errors import ConfigError, ManifestError
from accent_plugin.metrics import Predictions, pool, summarise

logger = logging.getLogger(__name__)

# Evaluation keeps no activations for a backward pass, so that more audio fits.
_EVALUATION_BATCHES = 2
_PACKAGES = ("accent_plugin", "speechbrain", "transformers", "torch", "torchaudio", "datasets", "scikit-learn", "numpy")


def make_loaders(paths, hparams):
    """Loaders of the three splits.

    Arguments
    ---------
    paths : dict
        Split -> manifest, as `accent_plugin.manifests.Prepared.paths` gives it.
    hparams : dict
        Of the YAML: accents, balance, batch_seconds, crop_seconds, augmentation, seed, num_workers.

    Returns
    -------
    dict
        "train", "valid", "test" -> torch.utils.data.DataLoader over a `ClipDataset`.
    """
    accents, seed = hparams["accents"], hparams["seed"]
    loaders = {}
    for split, path in paths.items():
        clips = manifests.read(path)
        strange = sorted({clip.accent for clip in clips} - set(accents))
        if strange:
            raise ManifestError(f"{path} has the accent(s) {', '.join(strange)}; accents lists {', '.join(accents)}")
        if split == "train":
            dataset = ClipDataset(clips, accents, hparams["crop_seconds"], hparams["augmentation"], seed)
            sampler = BucketBatchSampler(
                dataset.seconds(), hparams["batch_seconds"], seed=seed, weights=_clip_weights(dataset, hparams)
            )
        else:
            dataset = ClipDataset(clips, accents)
            limit = _EVALUATION_BATCHES * hparams["batch_seconds"]
            sampler = BucketBatchSampler(dataset.seconds(), limit, shuffle=False)
        pin = torch.cuda.is_available()
        loaders[split] = make_loader(dataset, sampler, num_workers=hparams["num_workers"], pin_memory=pin)
    return loaders


def _labels(dataset):
    return np.array([dataset.labels[clip.accent] for clip in dataset.clips])


def _clip_weights(dataset, hparams):
    """Weights for drawing clips so that all accents come equally often; None where `balance` is not sampler."""
    if hparams["balance"] != "sampler":
        return None
    labels = _labels(dataset)
    return inverse_frequency(labels, len(hparams["accents"]))[labels]


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
        choice = inverse_frequency(_labels(dataset), len(dataset.labels))
    return torch.tensor(np.asarray(choice), dtype=torch.float32)


def require_checkpoint(save_folder):
    """Refuse to evaluate weights that nobody trained.

    Raises
    ------
    ConfigError
        If the folder holds no checkpoint.
    """
    if not any(Path(save_folder).glob("CKPT*/CKPT.yaml")):
        raise ConfigError(
            f"test_only was asked for, but there is no checkpoint in {save_folder}: "
            "train first, or give the output_folder (and seed) of a finished run"
        )


def predict(brain, loader, accents):
    """Apply the best epoch's model to a split.

    Arguments
    ---------
    brain : AccentBrain
    loader : torch.utils.data.DataLoader
        Over a `ClipDataset`.
    accents : list of str

    Returns
    -------
    accent_plugin.metrics.Predictions
        In the order of the manifest.
    """
    ids, log_probabilities = brain.predict(loader)
    rows = {name: row for row, name in enumerate(ids)}
    # With --debug only some batches are seen.
    clips = [clip for clip in loader.dataset.clips if clip.id in rows]
    clients = [clip.client_id for clip in clips]
    return Predictions(
        ids=tuple(clip.id for clip in clips),
        client_ids=tuple(clients) if any(clients) else None,
        truth=np.array([accents.index(clip.accent) for clip in clips]),
        log_probabilities=log_probabilities[[rows[clip.id] for clip in clips]],
        labels=tuple(accents),
        seconds=np.array([clip.duration for clip in clips]),
        gender=tuple(clip.gender for clip in clips),
        age=tuple(clip.age for clip in clips),
    )


def describe_data(prepared, fold=None):
    """What a report says of the data: name, whether it is synthetic, how it was split, counts and what was left out."""
    counts = prepared.counts if fold is None else prepared.counts[f"fold_{fold}"]
    return {
        "name": prepared.name,
        "synthetic": prepared.synthetic,
        "speakers_disjoint": prepared.speakers_disjoint,
        "split": prepared.arguments["split"],
        "counts": counts,
        "left_out": prepared.dropped,
    }


def describe_model(hparams):
    """What a report says of the model: its parts, sizes, and the choices that shaped it."""
    model = hparams["model"]
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        # The base name alone: a report travels, a local path should not.
        "encoder": Path(hparams["wav2vec2_hub"]).name if Path(hparams["wav2vec2_hub"]).is_dir() else hparams["wav2vec2_hub"],
        "family": model.wav2vec2.config.model_type,
        "pooling": hparams["pooling"],
        "parameters": count,
        "trained_parameters": trained,
        "seed": hparams["seed"],
    }


def versions():
    """Versions that matter when a result is to be repeated."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_report(brain, loaders, prepared, hparams, command, fold=None):
    """Evaluate on the test split and write the run's report.

    Returns
    -------
    predictions : accent_plugin.metrics.Predictions
    metrics : dict
        The content of metrics.json.
    """
    predictions = predict(brain, loaders["test"], hparams["accents"])
    paths = {clip.id: clip.wav for clip in loaders["test"].dataset.clips}
    metrics = _write(
        hparams["output_folder"],
        predictions,
        data=describe_data(prepared, fold),
        model=describe_model(hparams),
        command=command,
        curves=read_history(brain.history_file),
        notes=list(prepared.warnings),
        audio=paths.get,
        selected_epoch=brain.best_epoch(),
    )
    return predictions, metrics


def write_pooled_report(output_folder, folds, prepared, command):
    """One report on the predictions of all folds, in which every speaker was tested once.

    Arguments
    ---------
    output_folder : str or Path
        Of the whole; the folds' own are below it.
    folds : list of (accent_plugin.metrics.Predictions, dict)
        As `write_report` returns them.
    prepared : accent_plugin.manifests.Prepared
    command : str

    Returns
    -------
    dict
        The content of metrics.json.
    """
    paths = {clip.id: clip.wav for fold in prepared.folds for clip in manifests.read(fold["test"])}
    recall = [metrics["clip"]["unweighted_average_recall"]["value"] for _, metrics in folds]
    return _write(
        output_folder,
        pool([predictions for predictions, _ in folds]),
        data=describe_data(prepared),
        model={**folds[0][1]["model"], "models": f"{len(folds)}, one per fold"},
        command=command,
        notes=[
            *prepared.warnings,
            f"Predictions of {len(folds)} folds pooled: each model is tested on speakers it has not seen. "
            f"Unweighted average recall of the single folds: {', '.join(f'{value:.3f}' for value in recall)}.",
        ],
        audio=paths.get,
    )


def write_seeds(output_folder, runs):
    """Mean and standard deviation over seeds, as summary.json and summary.md.

    Arguments
    ---------
    output_folder : str or Path
    runs : dict
        Name of a run -> the content of its metrics.json.
    """
    report.write_summary(Path(output_folder), summarise(list(runs.values()), list(runs)))
    logger.info("summary of %d runs: %s", len(runs), Path(output_folder) / "summary.md")


def _write(output_folder, predictions, **parts):
    folder = Path(output_folder) / "report"
    metrics = report.write_report(folder, predictions, versions=versions(), **parts)
    recall = metrics["clip"]["unweighted_average_recall"]
    logger.info(
        "unweighted average recall by clip %.3f (95 %%: %.3f to %.3f); report: %s",
        *(recall[key] for key in ("value", "low", "high")),
        folder / "report.md",
    )
    return metrics
