"""One run of the recipe: manifests -> loaders -> trained Brain -> predictions -> report."""

import functools
import importlib.metadata
import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from scipy.special import log_softmax
from speechbrain import Stage
from tqdm import tqdm

from accent_plugin import (
    bundle,
    bundle_config,
    calibration,
    config,
    devices,
    exchange,
    features,
    manifests,
    processes,
    report,
)
from accent_plugin.augment import change_speed
from accent_plugin.bands import BANDS
from accent_plugin.batches import BucketBatchSampler, ClipDataset, inverse_frequency, make_loader
from accent_plugin.brain import AccentBrain, read_history
from accent_plugin.checkpoints import AtomicCheckpointer
from accent_plugin.errors import ConfigError, DataError, ManifestError
from accent_plugin.metrics import Predictions, compare, out_of_set, pool, summarise

logger = logging.getLogger(__name__)

# Evaluation keeps no activations for a backward pass, so that more audio fits.
_EVALUATION_BATCHES = 2
_LARGEST_BATCH = 120.0
# Clips that a note names.
_NAMED = 10
# Of the card that a DatasetDict carries, what a report repeats.
_CARD_REPEATED = ("made_by", "source", "arguments", "counts", "dropped", "lost_sentences", "labels", "warnings")
_PACKAGES = ("accent_plugin", "speechbrain", "transformers", "torch", "torchaudio", "datasets", "scikit-learn", "numpy")


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
    augmentation : accent_plugin.augment.Augmentation
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


def make_loaders(paths, options):
    """Loaders of the three splits.

    Arguments
    ---------
    paths : dict
        Split -> manifest, as `accent_plugin.manifests.Prepared.paths` gives it.
    options : LoadingOptions

    Returns
    -------
    dict
        "train", "valid", "test" -> torch.utils.data.DataLoader over a `ClipDataset`.
    """
    accents, seed = options.accents, options.seed
    loaders = {}
    for split, path in paths.items():
        clips = manifests.read(path)
        strange = sorted({clip.accent for clip in clips} - set(accents))
        if strange:
            raise ManifestError(f"{path} has the accent(s) {', '.join(strange)}; accents lists {', '.join(accents)}")
        if split == "train":
            dataset = ClipDataset(clips, accents, options.crop_seconds, options.augmentation, seed)
            weights = _clip_weights(dataset, options)
            sampler = _sampler(dataset, options.batch_seconds, seed=seed, weights=weights)
            loaders[split] = _loader(dataset, sampler, options)
        else:
            loaders[split] = whole_clips(clips, options)
    return loaders


def whole_clips(clips, options, degrade=None):
    """A loader of clips as they are, or as `degrade` leaves them, for evaluation; `options` is a `LoadingOptions`."""
    dataset = ClipDataset(clips, options.accents, degrade=degrade)
    return _loader(dataset, _sampler(dataset, _evaluation_seconds(options), shuffle=False), options)


def _evaluation_seconds(options):
    # Larger batches than these are for heads on features that are kept, and gain nothing where an encoder runs.
    return _EVALUATION_BATCHES * min(options.batch_seconds, _LARGEST_BATCH)


def _sampler(dataset, batch_seconds, **keywords):
    """Batches for this one of the processes."""
    share = {"rank": processes.rank(), "processes": processes.count()}
    return BucketBatchSampler(dataset.seconds(), batch_seconds, **keywords, **share)


def _loader(dataset, sampler, options):
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


def predict(brain, clips, loading, speeds=(1.0,), degrade=None, temperature=1.0):
    """Apply the best epoch's model to clips.

    Arguments
    ---------
    brain : AccentBrain
    clips : sequence of accent_plugin.manifests.Clip
    loading : LoadingOptions
    speeds : sequence of float
        Speed factors; log-probabilities are averaged over the copies of a clip.
    degrade : callable
        Of `accent_plugin.bands.BANDS`; None takes the clips as they are.
    temperature : float
        Of `calibrate`.

    Returns
    -------
    clips : list of accent_plugin.manifests.Clip
        In their order; with `--debug` only some batches are seen.
    log_probabilities : (clips, classes) np.ndarray
        Means over the copies of a clip, normalised anew.
    """
    copies = []
    for speed in speeds:
        changes = [degrade] if degrade else []
        changes += [functools.partial(_played, speed=speed)] if speed != 1 else []
        ids, log_probabilities = brain.predict(whole_clips(clips, loading, _Chain(changes) if changes else None))
        copies.append(dict(zip(ids, log_probabilities, strict=True)))
    seen = [clip for clip in clips if all(clip.id in copy for copy in copies)]
    mean = np.mean([[copy[clip.id] for clip in seen] for copy in copies], axis=0)
    return seen, calibration.apply_temperature(log_softmax(mean, axis=1), temperature)


def calibrate(brain, loaders, loading, speeds):
    """Fit the temperature of the best epoch's model, and what its probabilities are worth, on validation.

    Arguments
    ---------
    brain : AccentBrain
    loaders : dict
        As `make_loaders` gives it.
    loading : LoadingOptions
    speeds : list of float
        As in `predict`.

    Returns
    -------
    dict
        As `accent_plugin.calibration.describe` gives it.
    """
    predictions = as_predictions(*predict(brain, loaders["valid"].dataset.clips, loading, speeds), loading.accents)
    found = calibration.describe(predictions.log_probabilities, predictions.truth)
    logger.info("temperature %.3f, fitted on %d clips of validation", found["temperature"], found["clips"])
    return found


def _played(samples, rng, speed):
    return change_speed(samples, speed)


class _Chain:
    """Degradations one after the other; a class, as the loader's workers may have to pickle it."""

    def __init__(self, changes):
        self.changes = changes

    def __call__(self, samples, rng):
        for change in self.changes:
            samples = change(samples, rng)
        return samples


def initialise(brain, hparams):
    """Let the head begin with the weights of `from_bundle`, where that is given and no checkpoint is to be resumed."""
    if hparams["from_bundle"] is None or brain.checkpointer.find_checkpoint() is not None:
        return
    taken, new = exchange.initialise(hparams["model"], hparams["accents"], hparams["from_bundle"])
    parts = ("encoder, " + ", ".join(taken)).rstrip(", ")
    logger.info("from %s: %s; anew: %s", hparams["from_bundle"], parts, ", ".join(new) or "nothing")


@devices.exact_fp32()
def fit_whitening(brain, loader, passes, shrinkage):
    """Fit the model's whitening on some passes over the training clips, as training will draw them.

    Nothing is done where the model has none, or where a checkpoint or `from_bundle` holds the fitted one.
    """
    model = brain.modules.model
    if model.whitening is None or model.whitening.fitted or brain.checkpointer.find_checkpoint() is not None:
        return
    model.eval()
    vectors, labels = [], []
    with torch.inference_mode():
        # Epochs beyond the last: crops and augmentation that training does not see again.
        last = brain.hparams.epoch_counter.limit
        for epoch in range(last + 1, last + 1 + passes):
            loader.batch_sampler.set_epoch(epoch)
            for batch in tqdm(loader, desc="whitening", unit="batch", disable=brain.noprogressbar):
                if len(batch):
                    batch = batch.to(brain.device)
                    vectors.append(model.embed(batch.wavs, batch.wav_lens, batch.means).cpu())
                    labels.append(batch.labels.cpu())
    vectors, labels = ([item for part in processes.gather(own) for item in part] for own in (vectors, labels))
    if not vectors:
        raise DataError("no clip of the training split could be read\nprepare the data again")
    model.whitening.fit(torch.cat(vectors), torch.cat(labels), shrinkage)
    logger.info("whitening fitted on %d crops", sum(map(len, labels)))


def keep_features(brain, loaders, hparams, folder):
    """Let a frozen encoder run once over the training and validation clips, and go on with what is kept of them.

    Arguments
    ---------
    brain : AccentBrain
    loaders : dict
        As `make_loaders` gives it.
    hparams : dict
    folder : str or Path
        Where they are kept.

    Returns
    -------
    dict
        The same; "train" and "valid" give `Batch.means` instead of audio.
    """
    kept = dict(loaders)
    for split, precision in (("train", brain.precision), ("valid", brain.eval_precision)):
        loader = loaders[split]
        store, lost = _stored(hparams, folder, loader.dataset, brain.device, precision)
        dataset = features.MeansDataset(loader.dataset, store, lost)
        kept[split] = make_loader(dataset, loader.batch_sampler, collate_fn=features.collate)
    return kept


def _stored(hparams, folder, dataset, device, precision="fp32", every_state=False):
    """A `features.Store` that has the clips of a `ClipDataset`, and which of them cannot be read."""
    encoder, loading = hparams["wav2vec2"], hparams["loading"]

    def load(clips):
        # All of them in this process, whoever else trains.
        missing = ClipDataset(clips, loading.accents)
        sampler = BucketBatchSampler(missing.seconds(), _evaluation_seconds(loading), shuffle=False)
        return _loader(missing, sampler, loading)

    def fill():
        store = features.Store(folder, identity)
        return features.fill(store, encoder, dataset.clips, load, device)

    identity = features.identify(encoder, precision, every_state)
    lost = processes.from_main(fill)
    return features.Store(folder, identity), lost


def as_predictions(clips, log_probabilities, accents):
    """`accent_plugin.metrics.Predictions` of clips whose accents are among `accents`."""
    clients = [clip.client_id for clip in clips]
    return Predictions(
        ids=tuple(clip.id for clip in clips),
        client_ids=tuple(clients) if any(clients) else None,
        truth=np.array([accents.index(clip.accent) for clip in clips]),
        log_probabilities=log_probabilities,
        labels=tuple(accents),
        seconds=np.array([clip.duration for clip in clips]),
        gender=tuple(clip.gender for clip in clips),
        age=tuple(clip.age for clip in clips),
    )


def describe_data(prepared, fold=None):
    """What a report says of the data: name, whether it is synthetic, how it was split, counts and what was left out."""
    counts = prepared.counts if fold is None else prepared.counts[f"fold_{fold}"]
    made = {key: value for key, value in prepared.card.items() if key in _CARD_REPEATED}
    if "arguments" in made:
        made["arguments"] = {key: value for key, value in made["arguments"].items() if value not in (None, {})}
    return {
        "name": prepared.name,
        "synthetic": prepared.synthetic,
        "speakers_disjoint": prepared.speakers_disjoint,
        "split": prepared.arguments["split"],
        "counts": counts,
        "left_out": prepared.dropped,
    } | ({"made_before": made} if made else {})


def describe_model(hparams):
    """What a report says of the model: its parts, sizes, and the choices that shaped it."""
    model = hparams["model"]
    start = {} if hparams["from_bundle"] is None else {"from_bundle": exchange.identity(hparams["from_bundle"])}
    return {
        "encoder": _encoder_name(hparams),
        **start,
        "family": model.wav2vec2.config.model_type,
        "method": hparams["method"],
        "pooling": hparams["pooling"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": hparams["seed"],
    }


def _encoder_name(hparams):
    start = hparams["from_bundle"]
    if start is not None and bundle_config.is_bundle(start):
        return bundle_config.read(start)["model"]["encoder"].get("name")
    encoder = start or hparams["wav2vec2_hub"]
    # The folder's name alone: a report travels, a local path should not.
    return Path(encoder).name if Path(encoder).is_dir() else encoder


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


def write_report(brain, loaders, prepared, hparams, command, temperature=1.0, fold=None, outsiders=None):
    """Evaluate on the test split and write the run's report.

    Arguments
    ---------
    brain : AccentBrain
    loaders : dict
        As `make_loaders` gives it.
    prepared : accent_plugin.manifests.Prepared
    hparams : dict
    command : str
    temperature : float
        Of `calibrate`.
    fold : int
    outsiders : accent_plugin.manifests.Prepared
        Speech of accents that are not among the classes; None for none.

    Returns
    -------
    predictions : accent_plugin.metrics.Predictions
    metrics : dict
        The content of metrics.json; None in all processes but the first.
    """
    accents, clips = hparams["accents"], loaders["test"].dataset.clips

    def scores(clips, degrade=None):
        return predict(brain, clips, hparams["loading"], hparams["evaluation"]["test_speeds"], degrade, temperature)

    predictions = as_predictions(*scores(clips), accents)
    notes = [*prepared.warnings, *_unread_note(brain.unread[Stage.TEST])]
    outside = None
    if outsiders is not None:
        heard, log_probabilities = scores(manifests.read(outsiders.paths()["test"]))
        outside = out_of_set(predictions, log_probabilities, [clip.accent for clip in heard])
    degraded = None
    if hparams["evaluation"]["bands"]:
        degraded = {name: as_predictions(*scores(clips, degrade), accents) for name, degrade in BANDS.items()}
    history = read_history(brain.history_file)
    memory = [row["peak_memory_bytes"] for row in history if row.get("peak_memory_bytes") is not None]
    metrics = _write(
        hparams["output_folder"],
        predictions,
        data=describe_data(prepared, fold),
        model=describe_model(hparams) | {"temperature": temperature, "peak_memory_bytes": max(memory, default=None)},
        command=command,
        curves=history,
        notes=notes,
        audio=_paths(clips),
        selected_epoch=brain.best_epoch(),
        out_of_set=outside,
        bands=degraded,
    )
    return predictions, metrics


def _unread_note(unread):
    if not unread:
        return []
    names = ", ".join(sorted(unread)[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
    return [f"{len(unread)} clips of the test split could not be read and are not scored: {names}"]


def write_bundle(folder, brain, hparams, calibrated, metrics=None):
    """Write the best epoch's model, which `brain` holds after `calibrate`, as a bundle.

    Arguments
    ---------
    folder : str or Path
    brain : AccentBrain
    hparams : dict
    calibrated : dict
        As `calibrate` returns it.
    metrics : dict
        The content of the run's metrics.json, for the model card; None where there is none.
    """
    written = bundle.write(
        folder,
        hparams["model"],
        hparams["accents"],
        encoder_name=describe_model(hparams)["encoder"],
        pooling=hparams["pooling"],
        speeds=hparams["evaluation"]["test_speeds"],
        calibration=calibrated,
        metrics=metrics,
        versions=versions(),
    )
    logger.info("bundle: %s", written)


def export(run, out=None, device="cpu"):
    """Write the bundle of a finished run anew, for example of a fold.

    Arguments
    ---------
    run : str or Path
        Its output folder. Its hyperparams.yaml is run, as by SpeechBrain: it must be your own.
    out : str or Path
        None for `bundle` in it.
    device : str

    Returns
    -------
    Path

    Raises
    ------
    ConfigError
        When the folder holds no trained run.
    """
    run = Path(run).absolute()
    hparams_file, save_folder = run / "hyperparams.yaml", run / "save"
    if not hparams_file.is_file():
        raise ConfigError(f"{run} is no output folder of a run: it has no hyperparams.yaml")
    folders = [
        "--output_folder",
        str(run),
        "--save_folder",
        str(save_folder),
        "--train_log",
        str(run / "train_log.txt"),
    ]
    settings = config.read([str(hparams_file), *folders], run, look_at_data=False)
    if settings.values["method"] != "fine_tuning":
        raise ConfigError(f"{run} was made with method {settings.values['method']}, of which there are no bundles")
    require_checkpoint(save_folder)
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    hparams["checkpointer"] = AtomicCheckpointer(save_folder, hparams["checkpointer"].recoverables)
    prepared = manifests.load(settings.located(settings.values["preparation"])["prepared_folder"])
    fold = int(run.name.removeprefix("fold_")) if prepared.folds else None
    loaders = {"valid": whole_clips(manifests.read(prepared.paths(fold)["valid"]), hparams["loading"])}
    brain = AccentBrain(
        modules=hparams["modules"],
        options=hparams["training"],
        hparams=hparams,
        run_opts={"device": device},
        checkpointer=hparams["checkpointer"],
        history_file=save_folder / "history.json",
    )
    calibrated = calibrate(brain, loaders, hparams["loading"], hparams["evaluation"]["test_speeds"])
    metrics_file = run / "report" / report.METRICS_FILE
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else None
    out = Path(out or run / "bundle")
    write_bundle(out, brain, hparams, calibrated, metrics)
    return out


def run_baseline(loaders, prepared, hparams, command, fold=None, device="cpu"):
    """Fit and report the frozen baseline of `accent_plugin.baseline` in place of training.

    Where `weighted_layers` is a list, only those layers are tried.

    Arguments and returns as in `write_report`; every trial on validation is kept in `<save_folder>/trials.json`.
    """
    from accent_plugin import baseline

    datasets = {split: loader.dataset for split, loader in loaders.items()}
    means = {split: _layer_means(dataset, hparams, device) for split, dataset in datasets.items()}
    model, layer, trials = baseline.fit(
        means["train"],
        datasets["train"].labels(),
        means["valid"],
        datasets["valid"].labels(),
        len(hparams["accents"]),
        layers=hparams["weighted_layers"] if isinstance(hparams["weighted_layers"], list) else None,
        seed=hparams["seed"],
    )
    trials_file = Path(hparams["save_folder"]) / "trials.json"
    trials_file.parent.mkdir(parents=True, exist_ok=True)
    trials_file.write_text(json.dumps(trials, indent=1), encoding="utf-8")
    clips = datasets["test"].clips
    log_probabilities = model.predict_log_proba(means["test"][:, layer])
    predictions = as_predictions(clips, log_probabilities, hparams["accents"])
    metrics = _write(
        hparams["output_folder"],
        predictions,
        data=describe_data(prepared, fold),
        model={
            **describe_model(hparams),
            "pooling": "mean",
            "layer": layer,
            "trained_parameters": model[-1].coef_.size,
        },
        command=command,
        notes=list(prepared.warnings),
        audio=_paths(clips),
    )
    return predictions, metrics


def _layer_means(dataset, hparams, device):
    """As `accent_plugin.baseline.layer_means`, kept on disk where that is wanted."""
    from accent_plugin import baseline

    if not hparams["cache_features"]:
        return baseline.layer_means(hparams["wav2vec2"], whole_clips(dataset.clips, hparams["loading"]), device)
    store, lost = _stored(hparams, hparams["features_folder"], dataset, device, every_state=True)
    baseline.require_all(lost)
    return np.stack([store[store.row(features.key(clip))] for clip in dataset.clips])


def _paths(clips):
    return {clip.id: clip.wav for clip in clips}.get


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
    clips = [clip for fold in prepared.folds for clip in manifests.read(fold["test"])]
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
        audio=_paths(clips),
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


def write_leak(output_folder, honest, leaky):
    """What sharing speakers between train and test adds: leak.md, and a paired comparison where the clips are the same.

    Arguments
    ---------
    output_folder, honest, leaky : str or Path
        Folder of the comparison, and of the two runs (split by speaker, and at random).
    """
    names = ("split by speaker", "split at random")
    runs = [Path(run) / "report" for run in (honest, leaky)]
    metrics = [json.loads((run / report.METRICS_FILE).read_text(encoding="utf-8")) for run in runs]
    predictions = [report.read_predictions(run) for run in runs]
    report.write_leak(output_folder, dict(zip(names, metrics, strict=True)))
    if set(predictions[0].ids) == set(predictions[1].ids):
        report.write_comparison(output_folder, *names, compare(*predictions))
    logger.info("what the leak adds: %s", Path(output_folder) / report.LEAK_FILE)


def _write(output_folder, predictions, **parts):
    if not processes.is_main():
        return None
    folder = Path(output_folder) / "report"
    metrics = report.write_report(folder, predictions, versions=versions(), **parts)
    recall = metrics["clip"]["unweighted_average_recall"]
    logger.info(
        "unweighted average recall by clip %.3f (95 %%: %.3f to %.3f); report: %s",
        *(recall[key] for key in ("value", "low", "high")),
        folder / "report.md",
    )
    return metrics
