"""One run of the recipe: manifests -> loaders -> trained Brain -> predictions -> report."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from tqdm import tqdm

from accent_plugin import devices
from accent_plugin.bundle import write as bundle_write
from accent_plugin.data.manifests import load_prepared, read_manifest
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.exchange.start import initialise_head
from accent_plugin.experiment.predict import as_predictions, calibrate
from accent_plugin.experiment.reports import describe_data, describe_model, split_sources, write_run_report
from accent_plugin.experiment.settings import read_settings
from accent_plugin.report.write import METRICS_FILE
from accent_plugin.training import distributed, feature_cache
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.checkpoints import AtomicCheckpointer
from accent_plugin.training.loaders import evaluation_batch_seconds, make_loader_of, whole_clips
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)


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


def initialise(brain, hparams):
    """Let the head begin with the weights of `from_bundle`, where that is given and no checkpoint is to be resumed."""
    if hparams["from_bundle"] is None or brain.checkpointer.find_checkpoint() is not None:
        return
    taken, new = initialise_head(hparams["model"], hparams["accents"], hparams["from_bundle"])
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
                    vectors.append(model.embed(batch.wavs, batch.wav_lens, batch.pooled_states).cpu())
                    labels.append(batch.labels.cpu())
    vectors, labels = ([item for part in distributed.all_gather(own) for item in part] for own in (vectors, labels))
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
        The same; "train" and "valid" give `Batch.pooled_states` instead of audio.
    """
    kept = dict(loaders)
    for split, precision in (("train", brain.precision), ("valid", brain.eval_precision)):
        loader = loaders[split]
        store, lost = _stored(hparams, folder, loader.dataset, brain.device, precision)
        dataset = feature_cache.PooledStatesDataset(loader.dataset, store, lost)
        kept[split] = make_loader(dataset, loader.batch_sampler, collate_fn=feature_cache.collate)
    return kept


def _stored(hparams, folder, dataset, device, precision="fp32", every_state=False):
    """A `features.Store` that has the clips of a `ClipDataset`, and which of them cannot be read."""
    encoder, loading = hparams["wav2vec2"], hparams["loading"]

    def load(clips):
        # All of them in this process, whoever else trains.
        missing = ClipDataset(clips, loading.accents)
        sampler = BucketBatchSampler(missing.seconds(), evaluation_batch_seconds(loading), shuffle=False)
        return make_loader_of(missing, sampler, loading)

    def fill():
        store = feature_cache.Store(folder, identity)
        return feature_cache.fill(store, encoder, dataset.clips, load, device)

    identity = feature_cache.identify(encoder, precision, every_state)
    lost = distributed.broadcast_from_main(fill)
    return feature_cache.Store(folder, identity), lost


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
    written = bundle_write.write_bundle(
        folder,
        hparams["model"],
        hparams["accents"],
        encoder_name=describe_model(hparams)["encoder"],
        pooling=hparams["pooling"],
        speeds=hparams["evaluation"]["test_speeds"],
        calibration=calibrated,
        metrics=metrics,
        versions=installed_versions(),
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
    settings = read_settings([str(hparams_file), *folders], run, look_at_data=False)
    if settings.values["method"] != "fine_tuning":
        raise ConfigError(f"{run} was made with method {settings.values['method']}, of which there are no bundles")
    require_checkpoint(save_folder)
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    hparams["checkpointer"] = AtomicCheckpointer(save_folder, hparams["checkpointer"].recoverables)
    prepared = load_prepared(settings.located(settings.values["preparation"])["prepared_folder"])
    fold = int(run.name.removeprefix("fold_")) if prepared.folds else None
    loaders = {"valid": whole_clips(read_manifest(prepared.paths(fold)["valid"]), hparams["loading"])}
    brain = AccentBrain(
        modules=hparams["modules"],
        options=hparams["training"],
        hparams=hparams,
        run_opts={"device": device},
        checkpointer=hparams["checkpointer"],
        history_file=save_folder / "history.json",
    )
    calibrated = calibrate(brain, loaders, hparams["loading"], hparams["evaluation"]["test_speeds"])
    metrics_file = run / "report" / METRICS_FILE
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else None
    out = Path(out or run / "bundle")
    write_bundle(out, brain, hparams, calibrated, metrics)
    return out


def run_baseline(loaders, prepared, hparams, command, fold=None, device="cpu"):
    """Fit and report the frozen baseline of `accent_plugin.experiment.baseline` in place of training.

    Where `weighted_layers` is a list, only those layers are tried.

    Arguments and returns as in `write_report`; every trial on validation is kept in `<save_folder>/trials.json`.
    """
    from accent_plugin.experiment import baseline

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
    metrics = write_run_report(
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
        audio=split_sources(clips),
    )
    return predictions, metrics


def _layer_means(dataset, hparams, device):
    """As `accent_plugin.experiment.baseline.layer_means`, kept on disk where that is wanted."""
    from accent_plugin.experiment import baseline

    if not hparams["cache_features"]:
        return baseline.layer_means(hparams["wav2vec2"], whole_clips(dataset.clips, hparams["loading"]), device)
    store, lost = _stored(hparams, hparams["features_folder"], dataset, device, every_state=True)
    baseline.require_all(lost)
    return np.stack([store[store.row(feature_cache.key(clip))] for clip in dataset.clips])
