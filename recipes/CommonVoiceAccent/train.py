#!/usr/bin/env python3
"""Recipe that fine-tunes wav2vec 2.0, or a related speech encoder, to classify English accents.

    python train.py hparams/wav2vec2_base.yaml --data_folder DATASET

The script prepares the data (a DatasetDict on disk), trains, and writes a report on the test split. Every
hyperparameter of the YAML can be changed on the command line. `--test_only True` evaluates a finished run again,
`--n_folds 5` tests every speaker once, `--seeds 1,2,3` trains with three seeds, and `--split both` measures the effect
of speakers shared by train and test. The same command resumes an interrupted run. `torchrun --nproc_per_node=4 train.py
...` trains on four GPUs.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

from common_voice_accent_prepare import prepare_common_voice_accent
from hyperpyyaml import load_hyperpyyaml

from accent_plugin.errors import ConfigError
from accent_plugin.experiment.exit_codes import returns_exit_code
from accent_plugin.experiment.settings import read_settings
from accent_plugin.training import distributed

PROJECT = Path(__file__).resolve().parents[2]
# SpeechBrain's tests require every key of a YAML in its script. accent_plugin reads those of the overlays:
# ["base"] ["name"] ["wav2vec2_hub"] ["batch_seconds"] ["data_folder"]


def train(settings, fold, command):
    """Prepare, train and evaluate once; return the finished run."""
    # PyTorch and SpeechBrain take seconds to import: they wait until the settings have been checked.
    import speechbrain as sb

    from accent_plugin.experiment.run import Run
    from accent_plugin.training.brain import AccentBrain
    from accent_plugin.training.loaders import make_class_weights, training_clips

    run = Run(settings, fold, command)
    with run.locked(overwrite=settings.values["overwrite"]):
        values = run.values
        sb.create_experiment_directory(
            experiment_directory=values["output_folder"],
            hyperparams_to_save=settings.hparams_file,
            # If the saved file is run again, it resumes.
            overrides=run.settings.with_values(overwrite=False).overrides,
        )
        run.prepare(prepare_common_voice_accent, values["preparation"], out_of_set=values["evaluation"]["out_of_set"])
        with open(settings.hparams_file, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, run.settings.overrides, overrides_must_match=False)
        run.read_clips(hparams["loading"])
        features_folder = hparams["features_folder"] if hparams["cache_features"] else None
        if hparams["method"] == "logistic_regression":
            run.run_baseline(hparams["model"], features_folder)
            return run
        hparams["checkpointer"].tidy()
        loader = training_clips(run.clips["train"], hparams["loading"])
        run.brain = AccentBrain(
            modules=hparams["modules"],
            options=hparams["training"],
            hparams=hparams,
            run_opts=settings.run_opts,
            checkpointer=hparams["checkpointer"],
            class_weights=make_class_weights(hparams["class_weights"], loader.dataset),
            history_file=Path(hparams["save_folder"]) / "history.json",
        )
        run.train(loader, features_folder, hparams["whitening_passes"], hparams["whitening_shrinkage"])
        run.calibrate()
        run.report()
        if fold is None and distributed.is_main():
            run.bundle()
    return run


@returns_exit_code
def main(argv):
    """Read and check the command line, join the other processes if there are any, and run."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    settings = read_settings(argv, PROJECT, look_at_data=distributed.is_local_main())
    values = settings.values
    if distributed.is_launched() and values["method"] != "fine_tuning":
        raise ConfigError(f"method {values['method']} takes one process: start python train.py, not torchrun")
    settings = dataclasses.replace(settings, run_opts=distributed.start(settings.run_opts))
    from accent_plugin.experiment.reports import Summaries

    folds = 0 if values["fold"] else values["n_folds"]
    summaries = Summaries(values["output_folder"], folds, values["seeds"])
    for settings_of_run, fold in settings.runs():
        summaries.add(train(settings_of_run, fold, shlex.join(["python", "train.py", *argv])))
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
