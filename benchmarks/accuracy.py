"""Training time to a validation score on real speech: this recipe and a plain loop of transformers.Trainer.

    python benchmarks/accuracy.py DATASETDICT ENCODER [--score 0.75] [--seeds 1 2 3]
    python benchmarks/accuracy.py DATASETDICT ENCODER --peers accent_plugin "four layers"   # only four layers

Both fine-tune a Moonshine encoder on the same clips with the same learning rates, mean number of clips per step and
number of epochs. They validate on a third of the speakers of the splits train and validation; the test split is not
used. The third peer is this recipe's head on cached features of the frozen encoder, the mode for machines without a
GPU. Peers and seeds run one after the other in separate processes. Time counts from the first step, and includes
validation.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ACCENTS = ("us", "england", "australia")
ROOT = Path(__file__).resolve().parents[1]
PEERS = ("accent_plugin", "transformers", "cached features")
CLIPS, LR_ENCODER, LR_HEAD, WARMUP = 8, 1e-4, 1e-3, 0.1


def prepare(source, folder):
    """Return the manifests of the first of three folds: "train", and "test" for validation."""
    from accent_plugin.data.prepare import prepare_data

    choices = {"accents": ACCENTS, "seed": 1986, "balance": "none", "n_folds": 3, "valid_fraction": 0.01}
    made = prepare_data(source, folder, source_splits=("train", "validation"), progress=False, **choices)
    return made.paths(1)


def report(started, epoch, score):
    print(json.dumps({"seconds": time.perf_counter() - started, "epoch": epoch, "score": score}), flush=True)


def run_ours(options, seed, cached=False, num_layers=None):
    """Train with the recipe's Brain and YAML."""
    from hyperpyyaml import load_hyperpyyaml
    from speechbrain import Stage

    from accent_plugin import devices
    from accent_plugin.data.manifests import read_manifest
    from accent_plugin.training import feature_cache
    from accent_plugin.training.brain import AccentBrain
    from accent_plugin.training.loaders import training_clips, whole_clips
    from accent_plugin.training.options import read_history

    paths = prepare(options.source, options.place / "prepared")
    seconds = np.mean([clip.duration for clip in read_manifest(paths["train"])])
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            **{"wav2vec2_hub": str(options.encoder), "output_folder": folder, "seed": seed, "early_stopping": 0},
            **{"number_of_epochs": options.epochs, "batch_seconds": float(CLIPS * seconds), "max_seconds": 30.0},
            **{"lr_encoder": LR_ENCODER, "lr_head": LR_HEAD, "warmup_fraction": WARMUP, "dropout": 0.0},
            "num_layers": num_layers,
            "precision": options.precision or devices.fastest_precision("cuda" if torch.cuda.is_available() else "cpu"),
        }
        if cached:
            changes |= {"freeze_wav2vec2": True, "cache_features": True, "features_folder": folder, "lr_head": 1e-2}
            changes |= {"weighted_layers": "all", "normalize_layers": True, "number_of_epochs": 5 * options.epochs}
        with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, changes)
        loading = hparams["loading"]
        train = training_clips(read_manifest(paths["train"]), loading)
        valid = whole_clips(read_manifest(paths["test"]), loading)

        class Brain(AccentBrain):
            def on_stage_end(self, stage, loss, epoch):
                super().on_stage_end(stage, loss, epoch)
                if stage == Stage.VALID:
                    report(started, epoch, read_history(self.history_file)[-1]["valid_uar"])

        run = {"noprogressbar": True} | ({} if torch.cuda.is_available() else {"device": "cpu"})
        brain = Brain(
            modules=hparams["modules"],
            options=hparams["training"],
            hparams=hparams,
            run_opts=run,
            history_file=Path(folder) / "history.json",
        )
        started = time.perf_counter()
        if cached:
            keep = (folder, hparams["wav2vec2"], loading, brain.device)
            train = feature_cache.cached(train, *keep, brain.precision, hparams["model"].summary)
            valid = feature_cache.cached(valid, *keep, brain.eval_precision, hparams["model"].summary)
        brain.fit(hparams["epoch_counter"], train, valid)


def run_transformers(options, seed):
    """Train the encoder, mean pooling and a linear layer with transformers.Trainer at its defaults."""
    import transformers

    from accent_plugin.audio import codecs
    from accent_plugin.data.manifests import read_manifest
    from accent_plugin.evaluation.scores import confusion_matrix, unweighted_average_recall

    paths = prepare(options.source, options.place / "prepared")
    transformers.set_seed(seed)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(options.encoder)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.AutoModel.from_pretrained(options.encoder).encoder
            # As in the recipe, the layers on the waveform are frozen.
            for layer in (self.encoder.conv1, self.encoder.groupnorm, self.encoder.conv2, self.encoder.conv3):
                layer.requires_grad_(False)
            self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(ACCENTS))

        def forward(self, input_values, attention_mask, labels=None):
            output = self.encoder(input_values, attention_mask=attention_mask)
            mask = getattr(output, "attention_mask", None)
            mask = torch.ones(output.last_hidden_state.shape[:2]) if mask is None else mask
            mask = mask.to(output.last_hidden_state)[..., None]
            logits = self.head((output.last_hidden_state * mask).sum(1) / mask.sum(1))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Clips(torch.utils.data.Dataset):
        def __init__(self, path):
            self.clips = read_manifest(path)

        def __len__(self):
            return len(self.clips)

        def __getitem__(self, index):
            clip = self.clips[index]
            values = extractor(codecs.read(clip.wav), sampling_rate=16_000)["input_values"][0]
            return {"input_values": values, "labels": ACCENTS.index(clip.accent)}

    def collate(items):
        batch = extractor.pad([{"input_values": item["input_values"]} for item in items], return_tensors="pt")
        return {**batch, "labels": torch.tensor([item["labels"] for item in items])}

    def score(outputs):
        guesses = outputs.predictions.argmax(-1)
        return {"uar": float(unweighted_average_recall(confusion_matrix(outputs.label_ids, guesses, len(ACCENTS))))}

    class Callback(transformers.TrainerCallback):
        def on_evaluate(self, arguments, state, control, metrics, **keywords):
            report(started, round(state.epoch), metrics["eval_uar"])

    model = Model()
    rates = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": LR_ENCODER},
        {"params": model.head.parameters(), "lr": LR_HEAD},
    ]
    train = Clips(paths["train"])
    steps = options.epochs * -(-len(train) // CLIPS)
    optimizer = torch.optim.AdamW(rates, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            **{"output_dir": tempfile.mkdtemp(), "num_train_epochs": options.epochs, "save_strategy": "no"},
            **{"per_device_train_batch_size": CLIPS, "per_device_eval_batch_size": CLIPS, "eval_strategy": "epoch"},
            **{"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "seed": seed, "max_grad_norm": 5.0},
            **{"remove_unused_columns": False, "use_cpu": not torch.cuda.is_available(), "label_names": ["labels"]},
        ),
        train_dataset=train,
        eval_dataset=Clips(paths["test"]),
        data_collator=collate,
        compute_metrics=score,
        optimizers=(optimizer, schedule),
        callbacks=[Callback()],
    )
    started = time.perf_counter()
    trainer.train()


RUN = {
    "accent_plugin": run_ours,
    "transformers": run_transformers,
    "cached features": functools.partial(run_ours, cached=True),
    "four layers": functools.partial(run_ours, num_layers=4),
}


def compare(options):
    """Run every peer with every seed, and print medians."""
    curves = {name: [] for name in options.peers}
    with tempfile.TemporaryDirectory() as place:
        options.place = Path(place)
        prepare(options.source, options.place / "prepared")
        for seed in options.seeds:
            for name in options.peers:
                words = [sys.executable, __file__, str(options.source), str(options.encoder), "--peers", name]
                words += ["--worker", place, "--seeds", str(seed), "--epochs", str(options.epochs)]
                words += ["--precision", options.precision] if options.precision else []
                done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
                curves[name].append([json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')])
    print_table(curves, options)


def print_table(curves, options):
    print(f"| | seconds to {options.score:g} | runs that reached it | best average recall | seconds per epoch |")
    print("|---|---|---|---|---|")
    for name, runs in curves.items():
        reached = [next((row["seconds"] for row in run if row["score"] >= options.score), None) for run in runs]
        there = [seconds for seconds in reached if seconds is not None]
        best = [max(row["score"] for row in run) for run in runs]
        epoch = statistics.median(run[-1]["seconds"] / run[-1]["epoch"] for run in runs)
        median = f"{statistics.median(there):.0f} ({min(there):.0f} to {max(there):.0f})" if there else "never"
        scores = f"{statistics.median(best):.3f} ({min(best):.3f} to {max(best):.3f})"
        print(f"| {name} | {median} | {len(there)} of {len(runs)} | {scores} | {epoch:.1f} |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    print(f"\n{device}; torch {torch.__version__}; seeds {options.seeds}, {options.epochs} epochs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="DatasetDict with splits train and validation")
    parser.add_argument("encoder", type=Path, help="folder of a Moonshine encoder")
    parser.add_argument("--score", type=float, default=0.75, help="unweighted average recall on validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--precision", help="of accent_plugin (default: the fastest on this machine; the peer uses fp32)"
    )
    parser.add_argument("--peers", nargs="+", choices=RUN, default=list(PEERS))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        compare(options)
        return
    options.place = options.worker
    RUN[options.peers[0]](options, options.seeds[0])


if __name__ == "__main__":
    main()
