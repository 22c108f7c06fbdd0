"""Peak memory of training steps with the YAML's defaults and wav2vec2-base (random weights).

    python benchmarks/memory.py [--steps 3] [--device cpu] [--precision fp32]

The clips are noise with lengths like Common Voice's (log-normal, mean 5.3 s, cut at max_seconds); batches hold
batch_seconds of audio, the largest first.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from hyperpyyaml import load_hyperpyyaml

from accent_plugin import audio, experiment
from accent_plugin.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.brain import AccentBrain
from accent_plugin.manifests import Clip

ROOT = Path(__file__).resolve().parents[1]


def make_base(folder):
    """wav2vec2-base's architecture is what Wav2Vec2Config makes by default."""
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)


def make_clips(folder, count, longest, accents, seed=0):
    rng = np.random.default_rng(seed)
    clips = []
    for number, seconds in enumerate(np.clip(rng.lognormal(np.log(5.3) - 0.06, 0.35, count), 1, longest)):
        path = folder / f"{number}.flac"
        samples = rng.uniform(-0.3, 0.3, int(seconds * audio.SAMPLE_RATE)).astype(np.float32)
        audio.write(path, samples)
        duration = len(samples) / audio.SAMPLE_RATE
        clips.append(Clip(f"c{number}", duration, str(path), accents[number % len(accents)], f"s{number}", "", ""))
    return tuple(clips)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_base(folder / "base")
        changes = {"wav2vec2_hub": str(folder / "base"), "output_folder": str(folder / "out"), "num_workers": 0}
        with open(ROOT / "hparams/wav2vec2_base.yaml", encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, changes)
        clips = make_clips(folder, 60 * arguments.steps, hparams["max_seconds"], hparams["accents"])
        dataset = ClipDataset(clips, hparams["accents"])
        sampler = BucketBatchSampler(dataset.seconds(), hparams["batch_seconds"])
        sampler.set_epoch(1)
        run_opts = {"device": arguments.device, "precision": arguments.precision}
        brain = AccentBrain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=run_opts)
        brain.train_sampler, brain._epochs, brain.nonfinite_count = sampler, 1, 0
        brain.init_optimizers()
        brain.modules.train()
        for batch in make_loader(dataset, sampler):
            start = time.time()
            brain.step += 1
            loss = float(brain.fit_batch(batch))
            print(
                f"step {brain.step}: {tuple(batch.wavs.shape)}, loss {loss:.3f}, {time.time() - start:.1f} s",
                flush=True,
            )
            if brain.step == arguments.steps:
                break
    versions = experiment.versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if arguments.device.startswith("cuda"):
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB (allocated)")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
