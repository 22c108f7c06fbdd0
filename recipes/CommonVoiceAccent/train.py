#!/usr/bin/env python3
"""Recipe that fine-tunes wav2vec 2.0, or one of its relatives, to tell English accents apart.

    python train.py hparams/wav2vec2_base.yaml --data_folder DATASET

prepares the data (a DatasetDict on disk), trains, and writes a report on the test split. Every hyperparameter of the
YAML can be changed on the command line; `--test_only True` evaluates a finished run again, `--n_folds 5` tests every
speaker once, `--seeds 1,2,3` trains three times, `--split both` shows what shared speakers would add.
"""

import errno
import os
import shlex
import sys
from pathlib import Path

import speechbrain as sb
import torch
from common_voice_accent_prepare import prepare_common_voice_accent
from hyperpyyaml import load_hyperpyyaml

from accent_plugin import config, experiment
from accent_plugin.brain import AccentBrain
from accent_plugin.errors import AccentPluginError, ConfigError

PROJECT = Path(__file__).resolve().parents[2]
# Answers of the file system that a user can do something about.
FOLDER_TROUBLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


def run(settings, command, fold=None):
    """Prepare, train and evaluate once; return predictions and metrics of the test split."""
    # Written down with the run, so that it can be exported from anywhere.
    settings = settings.but(prepared_folder=str(settings.preparation()["prepared_folder"]))
    values = settings.values
    if settings.run_opts.test_only:
        experiment.require_checkpoint(values["save_folder"])
    sb.create_experiment_directory(
        experiment_directory=values["output_folder"],
        hyperparams_to_save=settings.hparams_file,
        overrides=settings.overrides,
    )
    prepared = prepare_common_voice_accent(**settings.preparation())
    outsiders = settings.outsiders() and prepare_common_voice_accent(**settings.outsiders())

    with open(settings.hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    loaders = experiment.make_loaders(prepared.paths(fold), hparams)
    if hparams["method"] == "logistic_regression":
        return experiment.run_baseline(loaders, prepared, hparams, command, fold, settings.run_opts.device or "cpu")

    brain = AccentBrain(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts=settings.run_opts,
        checkpointer=hparams["checkpointer"],
        class_weights=experiment.make_class_weights(hparams["class_weights"], loaders["train"].dataset),
        history_file=Path(hparams["save_folder"]) / "history.json",
    )
    experiment.initialise(brain, hparams)
    experiment.fit_whitening(brain, loaders["train"], hparams)
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    calibrated = experiment.calibrate(brain, loaders, hparams)
    predictions, metrics = experiment.write_report(
        brain, loaders, prepared, hparams, command, calibrated["temperature"], fold, outsiders
    )
    if fold is None:
        experiment.write_bundle(Path(values["output_folder"]) / "bundle", brain, hparams, calibrated, metrics)
    return predictions, metrics


def run_folds(settings, command):
    """Run once, or once per fold with a report on all of them; return the metrics."""
    values = settings.values
    if not values["n_folds"]:
        return run(settings, command)[1]
    chosen = [values["fold"]] if values["fold"] else range(1, values["n_folds"] + 1)
    output = Path(values["output_folder"])
    folds = [run(settings.but(output_folder=str(output / f"fold_{fold}")), command, fold) for fold in chosen]
    if values["fold"]:
        return folds[0][1]
    prepared = prepare_common_voice_accent(**settings.preparation())
    return experiment.write_pooled_report(output, folds, prepared, command)


def run_seeds(settings, command):
    """Run once, or once per seed with a summary of all of them."""
    values = settings.values
    if not values["seeds"]:
        run_folds(settings, command)
        return
    output = Path(values["output_folder"])
    runs = {}
    for seed in values["seeds"]:
        folder = output / str(seed)
        runs[str(folder)] = run_folds(settings.but(seed=seed, output_folder=str(folder)), command)
    experiment.write_seeds(output, runs)


def run_splits(settings, command):
    """Run with one way to split, or with both and a comparison of them."""
    runs = settings.splits()
    for one in runs:
        run_seeds(one, command)
    if len(runs) > 1:
        experiment.write_leak(settings.values["output_folder"], *(one.values["output_folder"] for one in runs))


def main(argv):
    """Run the recipe; return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        if "RANK" in os.environ:
            raise ConfigError("training on several processes is not supported yet: start python train.py, not torchrun")
        run_splits(config.read(argv, PROJECT), shlex.join(["python", "train.py", *argv]))
    except AccentPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"the GPU's memory is full; lower batch_seconds: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FOLDER_TROUBLE:
            raise
        print(f"cannot write: {error}; free some space there, or choose another output_folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
