"""Training time of heads on cached features of a frozen encoder, for each pooling, with and without augmentation.

    python benchmarks/head.py DATASETDICT ENCODER

The head takes a learned sum of all normalised states. For each row the cache is filled once; then the same head
trains from the cache, and for one epoch from audio. Data and splits are those of accuracy.py. An epoch includes
validation; the first one, which reads the cache from disk, does not count.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

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


class Brain(AccentBrain):
    """Notes when each epoch ends, and saves nothing."""

    def fit(self, *arguments, **keywords):
        self.ends, self.losses = [time.perf_counter()], []
        super().fit(*arguments, **keywords)

    def on_stage_end(self, stage, loss, epoch=None):
        super().on_stage_end(stage, loss, epoch)
        if stage == Stage.VALID:
            self.ends.append(time.perf_counter())

    def epochs(self):
        """Seconds of each epoch."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def measure(options, paths, changes, folder):
    """Train one head from the cache and from audio; return sizes and times."""
    values = {
        **{"wav2vec2_hub": str(options.encoder), "output_folder": folder, "early_stopping": 0, "max_seconds": 30.0},
        **{"freeze_wav2vec2": True, "weighted_layers": "all", "normalize_layers": True, "lr_head": LR_HEAD},
        "precision": options.precision or devices.fastest_precision("cuda" if torch.cuda.is_available() else "cpu"),
    }
    found = {}
    for name, epochs in (("cached", options.epochs), ("audio", 1)):
        with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, values | changes | {"number_of_epochs": epochs})
        loading = hparams["loading"]
        train = training_clips(read_manifest(paths["train"]), loading)
        valid = whole_clips(read_manifest(paths["test"]), loading)
        run = {"noprogressbar": True} | ({} if torch.cuda.is_available() else {"device": "cpu"})
        brain = Brain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=run)
        if name == "cached":
            keep = (f"{folder}/features", hparams["wav2vec2"], loading, brain.device)
            started = time.perf_counter()
            train = feature_cache.cached(train, *keep, brain.precision, hparams["model"].summary)
            valid = feature_cache.cached(valid, *keep, brain.eval_precision, hparams["model"].summary)
            found["fill"] = time.perf_counter() - started
            found["bytes"] = sum(path.stat().st_size for path in Path(folder).rglob(feature_cache.VALUES_FILE))
        brain.fit(hparams["epoch_counter"], train, valid)
        found[name] = brain.epochs()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="DatasetDict with the splits train and validation")
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--epochs", type=int, default=10, help="epochs from the cache")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the fastest")
    options = parser.parse_args()
    print(f"{'head':24}{'MB':>8}{'fill s':>9}{'epoch s':>9}{'min':>8}{'max':>8}{'from audio s':>14}")
    with tempfile.TemporaryDirectory() as place:
        paths = prepare(options.source, Path(place) / "prepared")
        for name in options.heads:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(options, paths, HEADS[name], folder)
            epochs = found["cached"][1:]
            print(
                f"{name:24}{found['bytes'] / 1e6:8.1f}{found['fill']:9.1f}{statistics.median(epochs):9.3f}"
                f"{min(epochs):8.3f}{max(epochs):8.3f}{found['audio'][0]:14.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
