#!/usr/bin/env python3
"""Recipe that fine-tunes wav2vec 2.0, or one of its relatives, to tell English accents apart.

    python train.py hparams/wav2vec2_base.yaml --data_folder DATASET

prepares the data (a DatasetDict on disk), trains, and writes a report on the test split. Every hyperparameter of the
YAML can be changed on the command line; `--test_only True` evaluates a finished run again, `--n_folds 5` tests every
speaker once, `--seeds 1,2,3` trains three times, `--split both` shows what shared speakers would add. Interrupted, the
same command goes on; `torchrun --nproc_per_node=4 train.py ...` trains on four GPUs.
"""

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
from pathlib import Path

import speechbrain as sb
import torch
from common_voice_accent_prepare import prepare_common_voice_accent
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import infer_device

from accent_plugin import devices
from accent_plugin.errors import AccentPluginError, ConfigError, DataError
from accent_plugin.experiment import run_folder
from accent_plugin.experiment.predict import calibrate
from accent_plugin.experiment.reports import write_leak, write_pooled_report, write_report, write_seeds
from accent_plugin.experiment.settings import read_settings
from accent_plugin.experiment.stages import (
    fit_whitening,
    initialise,
    keep_features,
    require_checkpoint,
    run_baseline,
    write_bundle,
)
from accent_plugin.training import distributed, signals
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.loaders import make_class_weights, make_loaders

PROJECT = Path(__file__).resolve().parents[2]
# Answers of the file system that a user can do something about.
FOLDER_TROUBLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
}
# What PyTorch says where another process has left.
PARTED = ("onnection", "roken pipe")


def run(settings, command, fold=None):
    """Prepare, train and evaluate once; return predictions and metrics of the test split."""
    # On the machine where a process died, and not on the others, torchrun counts a restart.
    restarted = any(distributed.all_gather(run_folder.restarted()))
    # Written down with the run, so that it can be exported from anywhere.
    settings = settings.but(
        prepared_folder=distributed.broadcast_from_main(find_folder, settings),
        precision=distributed.broadcast_from_main(find_precision, settings, restarted),
    )
    values = settings.values
    if settings.run_opts.test_only:
        distributed.broadcast_from_main(require_checkpoint, values["save_folder"])
    with contextlib.ExitStack() as owned:
        identity = run_folder.run_identity(values, fold, distributed.world_size())
        distributed.broadcast_from_main(take_folder, settings, identity, owned, restarted)
        sb.create_experiment_directory(
            experiment_directory=values["output_folder"],
            hyperparams_to_save=settings.hparams_file,
            # Who runs that file again wants to go on.
            overrides=settings.but(overwrite=False).overrides,
        )
        prepared = prepare(values["preparation"])
        outsiders = prepare(settings.outsiders()) if values["evaluation"]["out_of_set"] else None
        distributed.broadcast_from_main(begin, settings, identity, run_folder.data_fingerprint(prepared.paths(fold)))
        return train(settings, prepared, outsiders, command, fold)


def find_folder(settings):
    """Where the prepared data are or will be."""
    return str(settings.located(settings.values["preparation"])["prepared_folder"])


def find_precision(settings, restarted):
    """The precision to train in; where it is left open, the one that a run has begun in, or the fastest here."""
    values = settings.values
    if values["precision"] != "auto":
        return values["precision"]
    begun = None if values["overwrite"] and not restarted else run_folder.begun(values["output_folder"])
    return (begun or {}).get("precision") or devices.fastest_precision(settings.run_opts.device or infer_device())


def take_folder(settings, identity, owned, restarted):
    """Make the output folder this process's own, and see that it belongs to this configuration."""
    values = settings.values
    owned.enter_context(run_folder.claimed(values["output_folder"]))
    if values["overwrite"] and not restarted:
        run_folder.clear(values["output_folder"], values["save_folder"], values["train_log"])
    begin(settings, identity, None)


def begin(settings, identity, data):
    """Refuse to go on in the folder of another configuration or, where they are known, other data."""
    values, test_only = settings.values, settings.run_opts.test_only
    run_folder.begin(values["output_folder"], identity, data, save_folder=values["save_folder"], test_only=test_only)


def prepare(arguments):
    """Prepare the data in the first process."""
    prepared = distributed.broadcast_from_main(prepare_common_voice_accent, **arguments)
    if not prepared.folder.is_dir():
        raise DataError(
            f"{prepared.folder} was prepared on another machine and is not to be seen here: "
            "give a prepared_folder that all machines share"
        )
    return prepared


def train(settings, prepared, outsiders, command, fold):
    """Build everything, train, evaluate, and write report and bundle."""
    values = settings.values
    with open(settings.hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    loaders = make_loaders(prepared.paths(fold), hparams["loading"])
    if hparams["method"] == "logistic_regression":
        device = settings.run_opts.device or infer_device()
        return run_baseline(loaders, prepared, hparams, command, fold, device)

    hparams["checkpointer"].tidy()
    brain = AccentBrain(
        modules=hparams["modules"],
        options=hparams["training"],
        hparams=hparams,
        run_opts=settings.run_opts,
        checkpointer=hparams["checkpointer"],
        class_weights=make_class_weights(hparams["class_weights"], loaders["train"].dataset),
        history_file=Path(hparams["save_folder"]) / "history.json",
    )
    initialise(brain, hparams)
    training = loaders
    if hparams["cache_features"]:
        training = keep_features(brain, loaders, hparams, hparams["features_folder"])
    fit_whitening(brain, training["train"], hparams["whitening_passes"], hparams["whitening_shrinkage"])
    brain.fit(hparams["epoch_counter"], training["train"], training["valid"])
    calibrated = calibrate(brain, loaders, hparams["loading"], hparams["evaluation"]["test_speeds"])
    predictions, metrics = write_report(
        brain, loaders, prepared, hparams, command, calibrated["temperature"], fold, outsiders
    )
    if fold is None and distributed.is_main():
        write_bundle(Path(values["output_folder"]) / "bundle", brain, hparams, calibrated, metrics)
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
    prepared = prepare(settings.located(values["preparation"]))
    return write_pooled_report(output, folds, prepared, command) if distributed.is_main() else None


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
    if distributed.is_main():
        write_seeds(output, runs)


def run_splits(settings, command):
    """Run with one way to split, or with both and a comparison of them."""
    runs = settings.splits()
    for one in runs:
        run_seeds(one, command)
    if len(runs) > 1 and distributed.is_main():
        write_leak(settings.values["output_folder"], *(one.values["output_folder"] for one in runs))


def start(argv):
    """Read and check the command line, join the other processes if there are any, and run."""
    settings = read_settings(argv, PROJECT, look_at_data=distributed.is_local_main())
    if distributed.is_launched() and settings.values["method"] != "fine_tuning":
        raise ConfigError(f"method {settings.values['method']} takes one process: start python train.py, not torchrun")
    settings = dataclasses.replace(settings, run_opts=distributed.start(settings.run_opts))
    run_splits(settings, shlex.join(["python", "train.py", *argv]))
    distributed.stop()


def complain(text):
    """Print an error, with the number of the process where there are several."""
    rank = f"[process {os.environ['RANK']}] " if distributed.is_launched() else ""
    print(f"{rank}{text}", file=sys.stderr, flush=True)


def main(argv):
    """Run the recipe; return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        with signals.raise_on_signal():
            start(argv)
    except signals.Interrupted as error:
        complain(f"stopped by {error}: what is finished is kept; run the same command again, and it goes on")
        return error.exit_code
    except AccentPluginError as error:
        # Before they have joined, all processes of a machine find the same.
        if distributed.is_local_main() or distributed.world_size() > 1:
            complain(f"{type(error).__name__}: {error}")
        return 2
    except torch.cuda.OutOfMemoryError as error:
        complain(f"the GPU's memory is full; lower batch_seconds: {error}")
        return 2
    except (OSError, ValueError) as error:
        # The configuration of logging hides what the system said of its file.
        said = error.__cause__ if isinstance(error, ValueError) else error
        if not isinstance(said, OSError) or said.errno not in FOLDER_TROUBLE:
            raise
        complain(f"cannot write: {said}; free some space there, or choose another output_folder")
        return 2
    except RuntimeError as error:
        if not (distributed.is_launched() and any(words in str(error) for words in PARTED)):
            raise
        complain(f"another process has ended, see its error: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
