"""Audio seconds per second of training: this recipe, transformers.Trainer, and SpeechBrain's IEMOCAP recipe.

The model has wav2vec2-base's shape, random weights, a frozen CNN and three classes; the data are real speech cut to the
lengths of Common Voice. Each peer has a separate process with its own loader and loop. The peers take turns of a few
steps, so that a change in the machine's speed affects all of them; ratios are computed within a turn.

    python benchmarks/training.py FOLDER_OF_CLIPS                      # (a) each peer at its defaults
    python benchmarks/training.py FOLDER_OF_CLIPS --precision bf16     # (b) the same precision, each peer's own batches
    python benchmarks/training.py FOLDER_OF_CLIPS --precision bf16 --same_batches   # (c) also the same batches
    python benchmarks/training.py FOLDER_OF_CLIPS --peers accent_plugin checkpointing eight_layers   # our own options

transformers: `Wav2Vec2ForSequenceClassification` as its audio-classification example sets it up, batches of 8.
SpeechBrain: `Wav2Vec2(output_norm=True, freeze_feature_extractor=True)`, StatisticsPooling, two Adams, batches of 4.
"""

import argparse
import collections
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch

from accent_plugin import devices
from accent_plugin.audio import codecs

PEERS = ("accent_plugin", "transformers", "speechbrain")
# Variant of this package -> changes of its YAML, or `--compile` for batches of any length.
LEVERS = {
    "checkpointing": {"gradient_checkpointing": True},
    "eight_layers": {"num_layers": 8},
    "compiled": {"compiled": True},
    **{f"workers_{count}": {"num_workers": count} for count in (0, 1, 4, 8)},
}
ACCENTS = ("us", "england", "australia")
RATE = 16_000
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------- the clips


def make_clips(source, folder, count, length=None, seed=0):
    """Cut speech into clips of Common Voice's lengths (lognormal, mean 5.3 s) or one; return a manifest's rows.

    Without a source the clips are noise.
    """
    rng = np.random.default_rng(seed)
    stream = _noise(rng) if source is None else _speech(source)
    lengths = np.clip(rng.lognormal(1.61, 0.35, count), 1.5, 12.0) if length is None else [length] * count
    rows, written, held = [], [], np.zeros(0, dtype=np.float32)
    with ThreadPoolExecutor() as threads:
        for number, seconds in enumerate(lengths):
            wanted = int(seconds * RATE)
            while len(held) < wanted:
                held = np.concatenate([held, next(stream)])
            path = folder / f"{number:04d}.flac"
            written.append(threads.submit(soundfile.write, path, held[:wanted], RATE))
            held = held[wanted:]
            rows.append(
                {"ID": f"{number:04d}", "duration": wanted / RATE, "wav": str(path), "accent": ACCENTS[number % 3]}
            )
    for one in written:
        one.result()
    return rows


def _speech(source):
    """Yield the samples of all files below a folder, in an endless loop."""
    paths = sorted(path for path in source.rglob("*") if path.suffix in (".mp3", ".flac", ".wav"))
    if not paths:
        sys.exit(f"no audio under {source}")
    while True:
        for path in paths:
            yield codecs.load(path)


def _noise(rng):
    while True:
        yield rng.normal(0, 0.05, 10 * RATE).astype(np.float32)


def make_encoder(folder, **shape):
    """Make a model of wav2vec2-base's or another shape with random weights, without layerdrop."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(activation_dropout=0.0, layerdrop=0.0, **shape)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)


def write_manifest(rows, path):
    """Write rows of `make_clips` as a manifest of the recipe."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("ID,duration,wav,accent,client_id,gender,age\n")
        for row in rows:
            wav = f"$data_root/{Path(row['wav']).relative_to(path.parent)}"
            file.write(f"{row['ID']},{row['duration']},{wav},{row['accent']},{row['ID']},,\n")


def load_hparams(encoder, **changes):
    """Load the recipe's YAML for wav2vec2-base with the encoder in a folder."""
    from hyperpyyaml import load_hyperpyyaml

    fixed = {"output_folder": tempfile.mkdtemp(), "number_of_epochs": 1000, "early_stopping": 0}
    with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
        return load_hyperpyyaml(file, {"wav2vec2_hub": str(encoder), **fixed, **changes})


# ----------------------------------------------------------------------------------------- one peer, in its process


class Turns:
    """Measures a peer, and makes it wait for its turn after every few steps."""

    def __init__(self, seconds_per_turn):
        self.wanted, self.audio, self.loading = seconds_per_turn, 0.0, 0.0
        self.start = None

    def begin(self):
        """Wait for the turn; called before its first step."""
        if self.start is None:
            print(json.dumps({"ready": True}), flush=True)
            if not sys.stdin.readline():
                sys.exit(0)
            self.start, self.audio, self.loading = time.perf_counter(), 0.0, 0.0

    def loaded(self, seconds):
        self.loading += seconds

    def step(self, seconds_of_audio):
        """Count a step; called after each."""
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
    """Yield the batches of a loader, and measure the time spent waiting for them."""
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
    """Return one epoch of this package's length-bucketed batches as lists of row numbers, for the other peers."""
    from accent_plugin.training.batches import BucketBatchSampler

    sampler = BucketBatchSampler([row["duration"] for row in rows], batch_seconds)
    return [[int(index) for index in batch] for batch in sampler.plan()]


def run_ours(rows, encoder, options, turns, compiled=False, **lever):
    """Train with the recipe's own Brain and YAML."""
    from accent_plugin.data.manifests import read_manifest
    from accent_plugin.training.brain import AccentBrain
    from accent_plugin.training.loaders import training_clips

    manifest = options.source / f"train_{os.getpid()}.csv"
    write_manifest(rows, manifest)
    # The result of the YAML's "auto".
    precision = options.precision or devices.fastest_precision("cuda" if torch.cuda.is_available() else "cpu")
    hparams = load_hparams(encoder, precision=precision, **lever)
    loader = training_clips(read_manifest(manifest), hparams["loading"])
    durations = {row["ID"]: row["duration"] for row in rows}

    class Brain(AccentBrain):
        def fit_batch(self, batch):
            loss = super().fit_batch(batch)
            turns.step(sum(durations[name] for name in batch.ids))
            return loss

        def on_stage_end(self, *arguments):
            """Save nothing."""

    class Timed(torch.utils.data.DataLoader):
        batch_sampler = property(lambda self: loader.batch_sampler)
        dataset = property(lambda self: loader.dataset)

        def __init__(self):
            """Do nothing; only the interface is needed."""

        def __iter__(self):
            return timed(turns, loader)

        def __len__(self):
            return len(loader)

    options_of_run = {"noprogressbar": True} | ({} if torch.cuda.is_available() else {"device": "cpu"})
    options_of_run |= {"compile": True, "compile_using_dynamic_shape_tracing": True} if compiled else {}
    brain = Brain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=options_of_run)
    brain.fit(hparams["epoch_counter"], Timed())


def run_transformers(rows, encoder, options, turns):
    """Train with transformers.Trainer, as in its audio-classification example."""
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
    """Train with the loop of SpeechBrain's IEMOCAP recipe: its encoder, pooling, output layer and optimizers."""
    import speechbrain as sb
    from speechbrain.dataio.dataloader import SaveableDataLoader
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.pooling import StatisticsPooling

    cache, how = tempfile.mkdtemp(), {"output_norm": True, "freeze": False, "freeze_feature_extractor": True}
    lobe = Wav2Vec2(encoder, cache, **how)
    head = Linear(input_size=lobe.model.config.hidden_size, n_neurons=len(ACCENTS), bias=False)
    modules = {"wav2vec2": lobe, "output_mlp": head}
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


class PeerEnded(Exception):
    """A peer ended before its turn."""


def compare(options):
    """Run the peers in turns, and print medians, ratios and memory."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "clips").mkdir()
        rows = make_clips(options.source, place / "clips", options.clips, options.length)
        (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        make_encoder(place / "encoder")
        took, ended = take_turns(place, options)
    for name in ended:
        print(f"{name} ended early: see {options.log}", file=sys.stderr)
    print_table(took, options)


def take_turns(place, options, warm_up=1, until=float("inf")):
    """Let each peer take its turns.

    Arguments
    ---------
    place : Path
        Folder with rows.json of `make_clips` and the encoder.
    options : argparse.Namespace
        From the command line of this script.
    warm_up : int
        Number of first turns that do not count.
    until : float
        `time.monotonic` after which no turn starts, except the first one that counts.

    Returns
    -------
    took : dict
        Peer -> its measurements of each turn.
    ended : list of str
        Peers that ended with an error; they are skipped.
    """
    workers = {name: start(name, place, options) for name in options.peers}
    took, ended = collections.defaultdict(list), []
    try:
        for turn in range(options.turns + warm_up):
            if turn > warm_up and time.monotonic() > until:
                break
            for name in [name for name in workers if name not in ended]:
                try:
                    done = answer(name, workers[name])
                except PeerEnded:
                    ended.append(name)
                    took.pop(name, None)
                    continue
                if turn >= warm_up:
                    took[name].append(done)
    finally:
        for worker in workers.values():
            # Killed, because on SIGTERM this package finishes its step and saves, for which it would wait for its turn.
            worker.kill()
            worker.wait()
    return took, ended


def start(name, place, options):
    words = [sys.executable, __file__, str(place), "--worker", name, "--turn", str(options.turn)]
    words += ["--precision", options.precision] if options.precision else []
    words += ["--same_batches"] * options.same_batches + ["--batch_seconds", str(options.batch_seconds)]
    with open(options.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def answer(name, worker):
    """Give a peer its turn, and return its measurements."""
    lines = []
    for _ in range(2):
        line = worker.stdout.readline()
        while line and not line.startswith("{"):
            line = worker.stdout.readline()
        if not line:
            raise PeerEnded(name)
        lines.append(json.loads(line))
        if "ready" in lines[-1]:
            worker.stdin.write("go\n")
            worker.stdin.flush()
    return lines[1]


def summarise(took):
    """Peer -> medians, least and most of its audio-seconds a second, ratio to this package's, and the rest."""
    speeds = {name: [one["audio"] / one["seconds"] for one in turns] for name, turns in took.items()}
    rows = {}
    for name, turns in took.items():
        rows[name] = {
            "speed": statistics.median(speeds[name]),
            "least": min(speeds[name]),
            "most": max(speeds[name]),
            "loading": sum(one["loading"] for one in turns) / sum(one["seconds"] for one in turns),
            "memory": max(one["memory"] for one in turns),
            "turns": len(turns),
        }
        if "accent_plugin" in speeds:
            # A peer that did not reach its last turn has one less.
            ratios = [ours / it for ours, it in zip(speeds["accent_plugin"], speeds[name], strict=False)]
            rows[name] |= {"ratio": statistics.median(ratios), "ratios": (min(ratios), max(ratios))}
    return rows


def print_table(took, options):
    print(f"\n{'peer':16}{'audio-s/s':>10}{'min':>8}{'max':>8}{'speed-up':>11}{'loading':>9}{'peak MiB':>10}")
    for name, row in summarise(took).items():
        print(
            f"{name:16}{row['speed']:10.2f}{row['least']:8.2f}{row['most']:8.2f}"
            f"{row.get('ratio', float('nan')):11.2f}{row['loading']:9.1%}{row['memory'] / 2**20:10.0f}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    print(
        f"{device}; torch {torch.__version__}; medians of {options.turns} turns of at least {options.turn:g} s of audio"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of speech, in any format that libsndfile reads")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of all peers (default: that of each peer)"
    )
    parser.add_argument("--same_batches", action="store_true", help="use this package's batches for all peers")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="length of the same batches")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn", type=float, default=60.0, help="seconds of audio in a turn")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument(
        "--length", type=float, help="length of every clip in seconds (default: the lengths of Common Voice)"
    )
    parser.add_argument("--peers", nargs="+", choices=RUN, default=list(PEERS))
    parser.add_argument("--log", default=os.devnull, help="file for the output of the peers")
    parser.add_argument("--worker", choices=RUN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        compare(options)
        return
    rows = json.loads((options.source / "rows.json").read_text(encoding="utf-8"))
    RUN[options.worker](rows, str(options.source / "encoder"), options, Turns(options.turn))


if __name__ == "__main__":
    main()
