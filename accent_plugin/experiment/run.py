"""One run of the recipe: prepared data -> clips of each split -> trained Brain -> calibration -> report and bundle."""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain import Stage
from speechbrain.utils.distributed import infer_device
from tqdm import tqdm

from accent_plugin import devices, files
from accent_plugin.audio.degradations import DEGRADATIONS
from accent_plugin.bundle.write import write_bundle
from accent_plugin.data.manifests import load_prepared, read_manifest
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.evaluation.calibration import describe_calibration
from accent_plugin.evaluation.compare import out_of_set_scores
from accent_plugin.evaluation.selective import operating_point
from accent_plugin.exchange.start import initialise_head
from accent_plugin.experiment import run_folder
from accent_plugin.experiment.predict import as_predictions, predict
from accent_plugin.experiment.reports import (
    describe_data,
    describe_model,
    encoder_name,
    split_sources,
    unread_notes,
    write_run_report,
)
from accent_plugin.experiment.settings import read_settings
from accent_plugin.report.write import METRICS_FILE
from accent_plugin.training import distributed, feature_cache
from accent_plugin.training.batches import ClipDataset
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.checkpoints import AtomicCheckpointer
from accent_plugin.training.loaders import augmentation_of, read_clips, whole_clips
from accent_plugin.training.options import read_history
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)


class Run:
    """One training with its evaluation, in its own folder.

    The recipe calls the methods in the order of their definition, and sets `brain` before `train`.

    Arguments
    ---------
    settings : accent_plugin.experiment.settings.Settings
        Inside `locked`, the attribute contains the prepared folder and the precision in use.
    fold : int
        Counted from 1; None without folds. `Settings.runs` yields settings and fold.
    command : str
        The command line, for the report.

    Attributes
    ----------
    prepared, out_of_set : accent_plugin.data.manifests.Prepared
        The data, and speech of accents outside the classes; None if there is none.
    loading : accent_plugin.training.loaders.LoadingOptions
    clips : dict
        Split -> sequence of accent_plugin.data.manifests.Clip.
    brain : AccentBrain
        None once the run is finished.
    calibration, metrics : dict
        From `accent_plugin.evaluation.calibration.describe_calibration`, and the content of metrics.json (None except
        in the first process).
    predictions : accent_plugin.evaluation.predictions.ScoredClips
        Predictions of the test split.
    """

    def __init__(self, settings, fold=None, command=""):
        self.settings, self.fold, self.command = settings, fold, command
        self.prepared = self.out_of_set = self.loading = self.brain = None
        self.calibration = self.predictions = self.metrics = None
        self.clips = {}

    @property
    def values(self):
        """Return every plain value of the configuration."""
        return self.settings.values

    @property
    def folder(self):
        """The output folder of the run."""
        return Path(self.values["output_folder"])

    # Folder and data

    @contextlib.contextmanager
    def locked(self, overwrite=False):
        """Lock the output folder for this process, and check that it belongs to this configuration.

        With `overwrite`, the run in the folder is deleted first, unless a cluster or torchrun has restarted this run.
        """
        # torchrun counts a restart only on the machine where a process died.
        restarted = any(distributed.all_gather(run_folder.restarted()))
        overwrite = overwrite and not restarted
        # Saved with the run, so that it can be exported from any working directory.
        self.settings = self.settings.with_values(
            prepared_folder=distributed.broadcast_from_main(
                lambda: str(self.settings.located(self.values["preparation"])["prepared_folder"])
            ),
            precision=distributed.broadcast_from_main(self._find_precision, overwrite),
        )
        if self.settings.run_opts.test_only:
            distributed.broadcast_from_main(require_checkpoint, self.values["save_folder"])
        with contextlib.ExitStack() as owned:
            distributed.broadcast_from_main(self._claim, owned, overwrite)
            yield
        self.brain = None

    def _find_precision(self, overwrite):
        """Return the training precision; "auto" is that of the resumed run, or else the fastest on this device."""
        if self.values["precision"] != "auto":
            return self.values["precision"]
        resumed = None if overwrite else run_folder.read_identity(self.folder)
        device = self.settings.run_opts.device or infer_device()
        return (resumed or {}).get("precision") or devices.fastest_precision(device)

    def _claim(self, owned, overwrite):
        owned.enter_context(run_folder.locked(self.folder))
        if overwrite:
            run_folder.clear(self.folder, self.values["save_folder"], self.values["train_log"])
        self._begin(None)

    def _begin(self, data):
        """Raise an error if the folder belongs to another configuration or, if `data` is known, to other data."""
        identity = run_folder.run_identity(self.values, self.fold, distributed.world_size())
        test_only = self.settings.run_opts.test_only
        run_folder.begin(self.folder, identity, data, save_folder=self.values["save_folder"], test_only=test_only)

    def prepare(self, prepare, preparation, out_of_set=False):
        """Prepare the data in the first process; raise a DataError in another that cannot read them.

        Arguments
        ---------
        prepare : callable
            The recipe's preparation.
        preparation : dict
            Arguments of `prepare`.
        out_of_set : bool
            Also prepare speech of the accents in `out_of_set`.
        """
        self.prepared = _prepare(prepare, preparation)
        self.out_of_set = _prepare(prepare, self.settings.out_of_set()) if out_of_set else None
        distributed.broadcast_from_main(self._begin, run_folder.data_fingerprint(self.prepared.paths(self.fold)))

    def read_clips(self, loading):
        """Read the manifests; `loading` is a `LoadingOptions`."""
        self.loading, self.clips = loading, read_clips(self.prepared.paths(self.fold), loading.accents)

    # Training

    def train(self, loader, features_folder=None, whitening_passes=0, whitening_shrinkage=0.0):
        """Train, or resume from the newest checkpoint.

        Arguments
        ---------
        loader : torch.utils.data.DataLoader
            Loads the training clips.
        features_folder : str or Path
            Cache of the output of a frozen encoder, which then runs once per clip. None runs the encoder in each epoch.
        whitening_passes : int
            Number of passes over the training clips to fit the whitening.
        whitening_shrinkage : float
            Shrinkage of the whitening's covariance.
        """
        brain, valid = self.brain, whole_clips(self.clips["valid"], self.loading)
        self._initialise_head()
        if features_folder is not None:
            keep = (features_folder, brain.hparams.wav2vec2, self.loading, brain.device)
            summary = brain.hparams.model.summary
            loader = feature_cache.cached(loader, *keep, brain.precision, summary)
            valid = feature_cache.cached(valid, *keep, brain.eval_precision, summary)
        _fit_whitening(brain, loader, whitening_passes, whitening_shrinkage)
        brain.fit(brain.hparams.epoch_counter, loader, valid)

    def _initialise_head(self):
        """Load the head's weights from `from_bundle`, if it is given and no checkpoint is resumed."""
        source = self.values["from_bundle"]
        if source is None or self.brain.checkpointer.find_checkpoint() is not None:
            return
        taken, new = initialise_head(self.brain.hparams.model, self.loading.accents, source)
        parts = ("encoder, " + ", ".join(taken)).rstrip(", ")
        logger.info("from %s: %s; newly initialised: %s", source, parts, ", ".join(new) or "nothing")

    # Evaluation

    def calibrate(self):
        """Fit the temperature of the best epoch's model on validation, and measure its calibration.

        With augmentation, half of the clips are augmented copies, so that probabilities hold for degraded audio too.
        """
        augmentation = augmentation_of(self.loading)
        copies = [
            as_predictions(*self._predict(self.clips["valid"], degrade), self.loading.accents)
            for degrade in ([None] if augmentation is None else [None, augmentation])
        ]
        found = describe_calibration(
            np.concatenate([copy.log_probabilities for copy in copies]), np.concatenate([copy.truth for copy in copies])
        )
        found["augmented"] = augmentation is not None
        logger.info("temperature %.3f, fitted on %d clips of validation", found["temperature"], found["clips"])
        self.calibration = found

    def _predict(self, clips, degrade=None):
        temperature = 1.0 if self.calibration is None else self.calibration["temperature"]
        return predict(self.brain, clips, self.loading, self.values["evaluation"]["test_speeds"], degrade, temperature)

    def report(self):
        """Evaluate on the test split and write the report."""
        accents, clips = self.loading.accents, self.clips["test"]
        self.predictions = as_predictions(*self._predict(clips), accents)
        notes = [*self.prepared.warnings, *unread_notes(self.brain.unread[Stage.TEST])]
        outside = degraded = None
        if self.out_of_set is not None:
            outside_clips, log_probabilities = self._predict(read_manifest(self.out_of_set.paths()["test"]))
            outside = out_of_set_scores(self.predictions, log_probabilities, [clip.accent for clip in outside_clips])
        if self.values["evaluation"]["bands"]:
            alone = len({clip.client_id or clip.id for clip in clips}) < 2
            degraded = {
                name: as_predictions(*self._predict(clips, degrade), accents)
                for name, degrade in DEGRADATIONS.items()
                if not (alone and degrade.needs_voices)
            }
        history = read_history(self.brain.history_file)
        memory = [row["peak_memory_bytes"] for row in history if row.get("peak_memory_bytes") is not None]
        trained = {"temperature": self.calibration["temperature"], "peak_memory_bytes": max(memory, default=None)}
        self._write_report(
            describe_model(self.brain.hparams.model, self.values) | trained,
            notes=notes,
            curves=history,
            selected_epoch=self.brain.best_epoch(),
            threshold=operating_point(self.calibration["curve"])["threshold"],
            out_of_set=outside,
            bands=degraded,
        )

    def _write_report(self, model, notes, **parts):
        data, audio = describe_data(self.prepared, self.fold), split_sources(self.clips["test"])
        parts |= {"data": data, "model": model, "command": self.command, "notes": notes, "audio": audio}
        self.metrics = write_run_report(self.folder, self.predictions, **parts)

    def bundle(self, folder=None):
        """Write the best epoch's model as a bundle, after `calibrate`; None writes to `bundle` in the run's folder."""
        folder = Path(folder or self.folder / "bundle")
        written = write_bundle(
            folder,
            self.brain.hparams.model,
            self.loading.accents,
            encoder_name=encoder_name(self.values),
            pooling=self.values["pooling"],
            speeds=self.values["evaluation"]["test_speeds"],
            calibration=self.calibration,
            metrics=self.metrics,
            versions=installed_versions(),
        )
        logger.info("bundle: %s", written)
        return folder

    # Instead of training

    def run_baseline(self, model, features_folder=None):
        """Fit and evaluate the frozen baseline of `accent_plugin.experiment.baseline`, and write the report.

        If `weighted_layers` is a list, only those layers are tried. All trials on validation are saved in
        `<save_folder>/trials.json`.

        Arguments
        ---------
        model : accent_plugin.model.AccentModel
            Provides the encoder.
        features_folder : str or Path
            As in `train`.
        """
        from accent_plugin.experiment import baseline

        accents, layers = self.loading.accents, self.values["weighted_layers"]
        means, labels = {}, {}
        for split, clips in self.clips.items():
            means[split] = self._layer_means(model.wav2vec2, clips, features_folder)
            labels[split] = ClipDataset(clips, accents).labels()
        classifier, layer, trials = baseline.fit(
            *(means["train"], labels["train"], means["valid"], labels["valid"]),
            classes=len(accents),
            layers=layers if isinstance(layers, list) else None,
            seed=self.values["seed"],
        )
        trials_file = Path(self.values["save_folder"]) / "trials.json"
        trials_file.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(trials_file) as file:
            json.dump(trials, file, indent=1)
        log_probabilities = classifier.predict_log_proba(means["test"][:, layer])
        self.predictions = as_predictions(self.clips["test"], log_probabilities, accents)
        fitted = {"pooling": "mean", "layer": layer, "trained_parameters": classifier[-1].coef_.size}
        self._write_report(describe_model(model, self.values) | fitted, notes=list(self.prepared.warnings))

    def _layer_means(self, encoder, clips, features_folder):
        """Call `accent_plugin.experiment.baseline.layer_means`, with a cache in `features_folder` unless it is None."""
        from accent_plugin.experiment import baseline

        device = self.settings.run_opts.device or infer_device()
        if features_folder is None:
            return baseline.layer_means(encoder, whole_clips(clips, self.loading), device)
        dataset = ClipDataset(clips, self.loading.accents)
        store, lost = feature_cache.fill_store(
            features_folder, encoder, dataset, self.loading, device, every_state=True
        )
        baseline.require_all({name: why for (name, _), why in lost.items()})
        return np.concatenate([store[store.row(feature_cache.key(clip))] for clip in clips])


def _prepare(prepare, arguments):
    prepared = distributed.broadcast_from_main(prepare, **arguments)
    if not prepared.folder.is_dir():
        raise DataError(
            f"{prepared.folder} was prepared on another machine and cannot be read here: "
            "give a prepared_folder that all machines share"
        )
    return prepared


def require_checkpoint(save_folder):
    """Raise a ConfigError if there are no trained weights to evaluate."""
    if not any(Path(save_folder).glob("CKPT*/CKPT.yaml")):
        raise ConfigError(
            f"test_only is True, but there is no checkpoint in {save_folder}: "
            "train first, or give the output_folder (and seed) of a finished run"
        )


@devices.exact_fp32()
def _fit_whitening(brain, loader, passes, shrinkage):
    """Fit the model's whitening on passes over the training clips, with the crops and augmentation of training.

    Do nothing if the model has no whitening, or if a checkpoint or `from_bundle` contains a fitted one.
    """
    model = brain.modules.model
    if model.whitening is None or model.whitening.fitted or brain.checkpointer.find_checkpoint() is not None:
        return
    model.eval()
    vectors, labels = [], []
    with torch.inference_mode():
        # Epochs after the last: training does not repeat their crops and augmentation.
        last = brain.hparams.epoch_counter.limit
        for epoch in range(last + 1, last + 1 + passes):
            loader.batch_sampler.set_epoch(epoch)
            for batch in tqdm(loader, desc="whitening", unit="batch", disable=brain.noprogressbar):
                if len(batch):
                    batch = batch.to(brain.device)
                    vectors.append(model.embed(batch.wavs, batch.wav_lens, batch.states, batch.frame_counts).cpu())
                    labels.append(batch.labels.cpu())
    vectors, labels = ([item for part in distributed.all_gather(own) for item in part] for own in (vectors, labels))
    if not vectors:
        raise DataError("no clip of the training split could be read\nprepare the data again")
    model.whitening.fit(torch.cat(vectors), torch.cat(labels), shrinkage)
    logger.info("whitening fitted on %d crops", sum(map(len, labels)))


def export(folder, out=None, device="cpu"):
    """Write the bundle of a finished run again, for example of a fold, and return its folder.

    Arguments
    ---------
    folder : str or Path
        The run's output folder. As in SpeechBrain, its hyperparams.yaml is executed, so it must be your own. Without a
        trained run, it is a ConfigError.
    out : str or Path
        None writes to `bundle` in `folder`.
    device : str
    """
    folder = Path(folder).absolute()
    hparams_file, save_folder = folder / "hyperparams.yaml", folder / "save"
    if not hparams_file.is_file():
        raise ConfigError(f"{folder} is no output folder of a run: it has no hyperparams.yaml")
    paths = {"output_folder": folder, "save_folder": save_folder, "train_log": folder / "train_log.txt"}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    settings = read_settings([str(hparams_file), *words], folder, look_at_data=False)
    if settings.values["method"] != "fine_tuning":
        raise ConfigError(f"{folder} was made with method {settings.values['method']}, which has no bundle")
    require_checkpoint(save_folder)
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    prepared = load_prepared(settings.located(settings.values["preparation"])["prepared_folder"])
    run = Run(settings, int(folder.name.removeprefix("fold_")) if prepared.folds else None)
    run.prepared, run.loading = prepared, hparams["loading"]
    run.clips = {"valid": read_manifest(prepared.paths(run.fold)["valid"])}
    run.brain = AccentBrain(
        modules=hparams["modules"],
        options=hparams["training"],
        hparams=hparams,
        run_opts={"device": device},
        checkpointer=AtomicCheckpointer(save_folder, hparams["checkpointer"].recoverables),
        history_file=save_folder / "history.json",
    )
    run.calibrate()
    metrics_file = folder / "report" / METRICS_FILE
    run.metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else None
    return run.bundle(out)
