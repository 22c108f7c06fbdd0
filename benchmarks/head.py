"""Training time of heads on cached features of a frozen encoder, for each pooling, with and without augmentation.

    python benchmarks/head.py DATASETDICT ENCODER

The head takes a learned sum of all normalised states. For each row the cache is filled once; then the head trains from
it. Data and splits are those of accuracy.py. An epoch includes validation; the first one, which reads the cache from
disk, does not count. CPU seconds are those of this process: on a busy machine they tell more than the clock.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accuracy import LR_HEAD, ROOT, prepare
from hyperpyyaml import load_hyperpyyaml
from speechbrain import Stage

from accent_plugin import devices
from accent_plugin.data.manifests import read_manifest
from accent_plugin.training import feature_cache
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.loaders import training_clips, whole_clips

CHANGED = {"augment": True, "crop_seconds": 3.0, "augment_copies": 5}
HEADS = {
    "mean": {"pooling": "mean"},
    "statistics": {"pooling": "statistics"},
    "attentive": {"pooling": "attentive"},
    "attentive_statistics": {"pooling": "attentive_statistics"},
    "statistics, 5 copies": {"pooling": "statistics", **CHANGED},
    "attentive, 5 copies": {"pooling": "attentive", **CHANGED},
}


def now():
    """Clock and CPU time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class Brain(AccentBrain):
    """Notes when each epoch ends."""

    def fit(self, *arguments, **keywords):
        self.ends = [now()]
        super().fit(*arguments, **keywords)

    def on_stage_end(self, stage, loss, epoch=None):
        super().on_stage_end(stage, loss, epoch)
        if stage == Stage.VALID:
            self.ends.append(now())


def measure(options, paths, changes, folder):
    """Train one head; return the bytes of the cache, and (clock, CPU) seconds of filling it and of each epoch."""
    values = {
        **{"wav2vec2_hub": str(options.encoder), "output_folder": folder, "early_stopping": 0, "max_seconds": 30.0},
        **{"freeze_wav2vec2": True, "weighted_layers": "all", "normalize_layers": True, "lr_head": LR_HEAD},
        "number_of_epochs": options.epochs + 1,
        "precision": options.precision or devices.fastest_precision("cuda" if torch.cuda.is_available() else "cpu"),
    }
    with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, values | changes)
    loading, summary = hparams["loading"], hparams["model"].summary
    run = {"noprogressbar": True} | ({} if torch.cuda.is_available() else {"device": "cpu"})
    brain = Brain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=run)
    keep = (f"{folder}/features", hparams["wav2vec2"], loading, brain.device)
    train = training_clips(read_manifest(paths["train"]), loading)
    valid = whole_clips(read_manifest(paths["test"]), loading)
    started = now()
    train = feature_cache.cached(train, *keep, brain.precision, summary)
    valid = feature_cache.cached(valid, *keep, brain.eval_precision, summary)
    filled = now() - started
    brain.fit(hparams["epoch_counter"], train, valid)
    size = sum(path.stat().st_size for path in Path(folder).rglob(feature_cache.VALUES_FILE))
    return size, filled, np.diff(brain.ends, axis=0)[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="DatasetDict with the splits train and validation")
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--epochs", type=int, default=10, help="epochs from the cache")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the fastest")
    options = parser.parse_args()
    print(f"{'head':24}{'MB':>8}{'fill s':>9}{'CPU':>7}{'epoch s':>9}{'min':>7}{'max':>7}{'CPU':>7}")
    with tempfile.TemporaryDirectory() as place:
        paths = prepare(options.source, Path(place) / "prepared")
        for name in options.heads:
            with tempfile.TemporaryDirectory() as folder:
                size, filled, epochs = measure(options, paths, HEADS[name], folder)
            clock, cpu = epochs.T
            print(
                f"{name:24}{size / 1e6:8.1f}{filled[0]:9.1f}{filled[1]:7.1f}"
                f"{np.median(clock):9.3f}{clock.min():7.3f}{clock.max():7.3f}{np.median(cpu):7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
