#!/usr/bin/env python3
"""Recipe that fine-tunes wav2vec 2.0, or one of its relatives, to tell English accents apart.

    python train.py hparams/wav2vec2_base.yaml --data_folder DATASET

prepares the data (a DatasetDict on disk), trains, and writes a report on the test split. Every hyperparameter of the
YAML can be changed on the command line; `--test_only True` evaluates a finished run again.
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


def run(settings, command):
    """Prepare, train and evaluate once."""
    values = settings.values
    if settings.run_opts.test_only:
        experiment.require_checkpoint(values["save_folder"])
    sb.create_experiment_directory(
        experiment_directory=values["output_folder"],
        hyperparams_to_save=settings.hparams_file,
        overrides=settings.overrides,
    )
    prepared = prepare_common_voice_accent(**config.preparation(values))

    with open(settings.hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, settings.overrides, overrides_must_match=False)
    loaders = experiment.make_loaders(prepared.paths(), hparams)

    brain = AccentBrain(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts=settings.run_opts,
        checkpointer=hparams["checkpointer"],
        class_weights=experiment.make_class_weights(hparams["class_weights"], loaders["train"].dataset),
        history_file=Path(hparams["save_folder"]) / "history.json",
    )
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    experiment.write_report(brain, loaders, prepared, hparams, command)


def main(argv):
    """Run the recipe; return the exit code."""
    try:
        if "RANK" in os.environ:
            raise ConfigError("training on several processes is not supported yet: start python train.py, not torchrun")
        settings = config.read(argv, PROJECT)
        run(settings, shlex.join(["python", "train.py", *argv]))
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
