"""Audio-seconds a second of a training step: this recipe, transformers.Trainer, and SpeechBrain's IEMOCAP recipe.

wav2vec2-base's shape with random weights and its CNN frozen, three classes, real speech cut to the lengths of Common
Voice. Each peer is a process of its own with its own loader and loop; they take turns of a few steps, so that a machine
whose speed drifts slows all of them, and each ratio is of one turn.

    python benchmarks/training.py FOLDER_OF_CLIPS                      # (a) each at its defaults
    python benchmarks/training.py FOLDER_OF_CLIPS --precision bf16     # (b) one precision, each batching as it does
    python benchmarks/training.py FOLDER_OF_CLIPS --precision bf16 --same_batches   # (c) and the same batches for all
    python benchmarks/training.py FOLDER_OF_CLIPS --peers accent_plugin checkpointing eight_layers   # our own levers

transformers: `Wav2Vec2ForSequenceClassification` as its audio-classification example sets it up, batches of 8.
SpeechBrain: `Wav2Vec2(output_norm=True, freeze_feature_extractor=True)`, StatisticsPooling, two Adams, batches of 4.
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
import soundfile
import torch

from accent_plugin import audio, devices

PEERS = ("accent_plugin", "transformers", "speechbrain")
# This package once more -> what is changed of its YAML, or `--compile` for any length of a batch.
LEVERS = {
    "checkpointing": {"gradient_checkpointing": True},
    "eight_layers": {"num_layers": 8},
    "compiled": {"compiled": True},
}
ACCENTS = ("us", "england", "australia")
RATE = 16_000
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------- the clips


def make_clips(source, folder, count, length=None, seed=0):
    """Cut real speech into clips of Common Voice's lengths (lognormal, mean 5.3 s) or one; return a manifest's rows."""
    rng = np.random.default_rng(seed)
    paths = sorted(path for path in source.rglob("*") if path.suffix in (".mp3", ".flac", ".wav"))
    if not paths:
        sys.exit(f"no audio under {source}")
    stream, rows, used = np.zeros(0, dtype=np.float32), [], 0
    lengths = np.clip(rng.lognormal(1.61, 0.35, count), 1.5, 12.0) if length is None else [length] * count
    for number, seconds in enumerate(lengths):
        wanted = int(seconds * RATE)
        while len(stream) < wanted:
            stream = np.concatenate([stream, audio.load(paths[used % len(paths)])])
            used += 1
        path = folder / f"{number:04d}.flac"
        soundfile.write(path, stream[:wanted], RATE)
        stream = stream[wanted:]
        rows.append({"ID": f"{number:04d}", "duration": wanted / RATE, "wav": str(path), "accent": ACCENTS[number % 3]})
    return rows


def make_encoder(folder):
    """wav2vec2-base with random weights, as Hugging Face saves it; no dropout of activations or of whole layers."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(activation_dropout=0.0, layerdrop=0.0)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)


# ----------------------------------------------------------------------------------------- one peer, in its process


class Turns:
    """Counts what a peer does, and waits for its turn after every few steps."""

    def __init__(self, seconds_per_turn):
        self.wanted, self.audio, self.loading = seconds_per_turn, 0.0, 0.0
        self.start = None

    def begin(self):
        """Before the first step of a turn."""
        if self.start is None:
            print(json.dumps({"ready": True}), flush=True)
            if not sys.stdin.readline():
                sys.exit(0)
            self.start, self.audio, self.loading = time.perf_counter(), 0.0, 0.0

    def loaded(self, seconds):
        self.loading += seconds

    def step(self, seconds_of_audio):
        """After each step."""
        self.audio += seconds_of_audio
        if self.audio >= self.wanted:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            memory = devices.peak_memory("cuda" if torch.cuda.is_available() else "cpu")
            took = time.perf_counter() - self.start
            done = {"audio": self.audio, "seconds": took, "loading": self.loading, "memory": memory}
            print(json.dumps(done), flush=True)
            self.start = None


def timed(turns, loader):
    """Batches of a loader; what they are waited for is counted."""
    batches = iter(loader)
    while True:
        turns.begin()
        start = time.perf_counter()
        batch = next(batches, None)
        turns.loaded(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def plan(rows, batch_seconds):
    """One epoch of this package's length-bucketed batches, as lists of row numbers, for peers that have none."""
    from accent_plugin.batches import BucketBatchSampler

    sampler = BucketBatchSampler([row["duration"] for row in rows], batch_seconds)
    return [[int(index) for index in batch] for batch in sampler.plan()]


def run_ours(rows, encoder, options, turns, compiled=False, **lever):
    """The recipe's own Brain and YAML; `fit` is SpeechBrain's."""
    from hyperpyyaml import load_hyperpyyaml

    from accent_plugin import experiment
    from accent_plugin.brain import AccentBrain

    folder, manifest = Path(tempfile.mkdtemp()), options.source / "train.csv"
    with open(manifest, "w", encoding="utf-8") as file:
        file.write("ID,duration,wav,accent,client_id,gender,age\n")
        for row in rows:
            file.write(
                f"{row['ID']},{row['duration']},$data_root/clips/{row['ID']}.flac,{row['accent']},{row['ID']},,\n"
            )
    changes = {"wav2vec2_hub": encoder, "output_folder": str(folder), "number_of_epochs": 1000, "early_stopping": 0}
    changes |= lever
    # What the YAML's "auto" comes to.
    changes["precision"] = options.precision or devices.fastest_precision(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, changes)
    loaders = experiment.make_loaders({"train": manifest}, hparams["loading"])
    durations = {row["ID"]: row["duration"] for row in rows}

    class Brain(AccentBrain):
        def fit_batch(self, batch):
            loss = super().fit_batch(batch)
            turns.step(sum(durations[name] for name in batch.ids))
            return loss

        def on_stage_end(self, *arguments):
            """Nothing is kept."""

    class Timed(torch.utils.data.DataLoader):
        batch_sampler = property(lambda self: loaders["train"].batch_sampler)
        dataset = property(lambda self: loaders["train"].dataset)

        def __init__(self):
            """Only its interface is wanted."""

        def __iter__(self):
            return timed(turns, loaders["train"])

        def __len__(self):
            return len(loaders["train"])

    options_of_run = {"noprogressbar": True} | ({} if torch.cuda.is_available() else {"device": "cpu"})
    options_of_run |= {"compile": True, "compile_using_dynamic_shape_tracing": True} if compiled else {}
    brain = Brain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=options_of_run)
    brain.fit(hparams["epoch_counter"], Timed())


def run_transformers(rows, encoder, options, turns):
    """transformers.Trainer, as its audio-classification example sets it up."""
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(encoder, return_attention_mask=True)
    model = transformers.AutoModelForAudioClassification.from_pretrained(encoder, num_labels=len(ACCENTS))
    model.freeze_feature_encoder()

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            row = rows[index]
            wave, rate = soundfile.read(row["wav"], dtype="float32")
            values = extractor([wave[: 20 * rate]], sampling_rate=rate)["input_values"][0]
            return {"input_values": values, "labels": ACCENTS.index(row["accent"])}

    class Trainer(transformers.Trainer):
        def get_batch_samples(self, *arguments, **keywords):
            turns.begin()
            start = time.perf_counter()
            samples = super().get_batch_samples(*arguments, **keywords)
            turns.loaded(time.perf_counter() - start)
            self.audio = sum(float(batch["attention_mask"].sum()) for batch in samples[0]) / RATE
            return samples

        def get_train_dataloader(self):
            if not options.same_batches:
                return super().get_train_dataloader()
            batches = plan(rows, options.batch_seconds)
            loader = torch.utils.data.DataLoader(Clips(), batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **keywords):
            turns.step(trainer.audio)

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Clips(), processing_class=extractor, callbacks=[Callback()]
    )
    trainer.train()


def run_speechbrain(rows, encoder, options, turns):
    """The loop of SpeechBrain's IEMOCAP wav2vec2 recipe: its encoder, pooling, output layer and optimizers."""
    import speechbrain as sb
    from speechbrain.dataio.dataloader import SaveableDataLoader
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.pooling import StatisticsPooling

    cache, how = tempfile.mkdtemp(), {"output_norm": True, "freeze": False, "freeze_feature_extractor": True}
    modules = {
        "wav2vec2": Wav2Vec2(encoder, cache, **how),
        "output_mlp": Linear(input_size=768, n_neurons=len(ACCENTS), bias=False),
    }
    pooling = StatisticsPooling(return_std=False)

    class Brain(sb.Brain):
        def compute_forward(self, batch, stage):
            batch = batch.to(self.device)
            pooled = pooling(self.modules.wav2vec2(*batch.sig), batch.sig[1])
            return torch.log_softmax(self.modules.output_mlp(pooled.flatten(1)), dim=-1)

        def compute_objectives(self, predictions, batch, stage):
            return sb.nnet.losses.nll_loss(predictions, batch.label)

        def init_optimizers(self):
            self.encoder_optimizer = torch.optim.Adam(self.modules.wav2vec2.parameters(), lr=1e-5)
            self.head_optimizer = torch.optim.Adam(self.modules.output_mlp.parameters(), lr=1e-4)
            self.optimizers_dict = {"head": self.head_optimizer, "encoder": self.encoder_optimizer}

        def on_fit_batch_end(self, batch, outputs, loss, should_step):
            turns.step(float(sum(batch.duration)))

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def read(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("accent")
    @sb.utils.data_pipeline.provides("label")
    def label(accent):
        return ACCENTS.index(accent)

    data = {row["ID"]: {key: value for key, value in row.items() if key != "ID"} for row in rows}
    dataset = DynamicItemDataset(data, [read, label], ["id", "sig", "label", "duration"])
    how = {"batch_sampler": plan(rows, options.batch_seconds)} if options.same_batches else {"batch_size": 4}
    how |= {} if options.same_batches else {"shuffle": True, "drop_last": False}

    class Timed(SaveableDataLoader):
        def __iter__(self):
            return timed(turns, super().__iter__())

    loader = Timed(dataset, collate_fn=sb.dataio.batch.PaddedBatch, num_workers=2, **how)
    run = {"noprogressbar": True, "precision": options.precision or "fp32"}
    run |= {} if torch.cuda.is_available() else {"device": "cpu"}
    Brain(modules=modules, run_opts=run).fit(range(1, 1000), loader)


RUN = {"accent_plugin": run_ours, "transformers": run_transformers, "speechbrain": run_speechbrain}
RUN |= {name: functools.partial(run_ours, **lever) for name, lever in LEVERS.items()}


# --------------------------------------------------------------------------------------------------- all, by turns


def compare(options):
    """Let the peers take turns; print medians, ratios and memory."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "clips").mkdir()
        rows = make_clips(options.source, place / "clips", options.clips, options.length)
        (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        make_encoder(place / "encoder")
        workers = {name: start(name, place, options) for name in options.peers}
        took = {name: [] for name in workers}
        for turn in range(options.turns + 1):
            for name, worker in workers.items():
                done = answer(name, worker, options)
                if turn:  # the first one warms up
                    took[name].append(done)
        for worker in workers.values():
            # Not terminated: this package's training would finish its step and save, and wait for its turn.
            worker.kill()
            worker.wait()
    say(took, options)


def start(name, place, options):
    words = [sys.executable, __file__, str(place), "--worker", name, "--turn", str(options.turn)]
    words += ["--precision", options.precision] if options.precision else []
    words += ["--same_batches"] * options.same_batches + ["--batch_seconds", str(options.batch_seconds)]
    log = open(options.log, "a", encoding="utf-8")
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def answer(name, worker, options):
    """Give a peer its turn; what it says of it."""
    lines = []
    for _ in range(2):
        line = worker.stdout.readline()
        while line and not line.startswith("{"):
            line = worker.stdout.readline()
        if not line:
            sys.exit(f"{name} ended, see {options.log}")
        lines.append(json.loads(line))
        if "ready" in lines[-1]:
            worker.stdin.write("go\n")
            worker.stdin.flush()
    return lines[1]


def say(took, options):
    speeds = {name: [one["audio"] / one["seconds"] for one in turns] for name, turns in took.items()}
    print(f"\n{'peer':16}{'audio-s/s':>10}{'least':>8}{'most':>8}{'ours / it':>11}{'loading':>9}{'peak MiB':>10}")
    for name, turns in took.items():
        ratios = [ours / it for ours, it in zip(speeds["accent_plugin"], speeds[name], strict=True)]
        loading = sum(one["loading"] for one in turns) / sum(one["seconds"] for one in turns)
        print(
            f"{name:16}{statistics.median(speeds[name]):10.2f}{min(speeds[name]):8.2f}{max(speeds[name]):8.2f}"
            f"{statistics.median(ratios):11.2f}{loading:9.1%}{max(one['memory'] for one in turns) / 2**20:10.0f}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    print(
        f"{device}; torch {torch.__version__}; medians of {options.turns} turns of at least {options.turn:g} s of audio"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of speech, in any format that libsndfile reads")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of all; default: each one's own")
    parser.add_argument("--same_batches", action="store_true", help="give all this package's batches")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="of the same batches")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn", type=float, default=60.0, help="seconds of audio in a turn")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--length", type=float, help="seconds of each clip, in place of Common Voice's lengths")
    parser.add_argument("--peers", nargs="+", choices=RUN, default=list(PEERS))
    parser.add_argument("--log", default=os.devnull, help="file for what the peers print")
    parser.add_argument("--worker", choices=RUN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        compare(options)
        return
    rows = json.loads((options.source / "rows.json").read_text(encoding="utf-8"))
    RUN[options.worker](rows, str(options.source / "encoder"), options, Turns(options.turn))


if __name__ == "__main__":
    main()
