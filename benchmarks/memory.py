"""Parameters and peak training memory of the recipe's YAMLs, with encoders with random weights.

    python benchmarks/memory.py [hparams/wav2vec2_base.yaml ...] [--precision bf16] [--gradient_checkpointing]

Without a YAML, all of hparams/ are measured, each in a separate process. The clips are noise with lengths like Common
Voice's (log-normal, mean 5.3 s, cut at max_seconds). On a GPU the memory is what PyTorch allocated there, otherwise
that of the whole process.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from hyperpyyaml import load_hyperpyyaml

from accent_plugin import devices
from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data.manifests import Clip
from accent_plugin.experiment.settings import read_overlay
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.brain import AccentBrain
from accent_plugin.versions import installed_versions

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAVEFORM, MEL = transformers.Wav2Vec2FeatureExtractor, transformers.WhisperFeatureExtractor
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# YAML -> family, what differs from the family's default configuration, and what reads the audio. The shapes are those
# of the papers and of the weights that the YAML names.
SHAPES = {
    "wav2vec2_base": ("Wav2Vec2", {}, WAVEFORM()),
    "xlsr_53": (
        "Wav2Vec2",
        {**LARGE, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        WAVEFORM(),
    ),
    "hubert_base": ("Hubert", {}, WAVEFORM()),
    "wavlm_base_plus": ("WavLM", {}, WAVEFORM()),
    "whisper_base": (
        "Whisper",
        {
            **{"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
            **{"decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048},
        },
        MEL(),
    ),
    "moonshine_tiny": ("Moonshine", {}, WAVEFORM(do_normalize=False)),
}


def make_encoder(name, folder, **shape):
    """Save an encoder of the YAML's shape, or of a changed one, with random weights in Hugging Face's format."""
    family, changes, extractor = SHAPES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**changes, **shape))
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)


def make_clips(folder, count, longest, accents, seed=0):
    rng = np.random.default_rng(seed)
    clips = []
    for number, seconds in enumerate(np.clip(rng.lognormal(np.log(5.3) - 0.06, 0.35, count), 1, longest)):
        path = folder / f"{number}.flac"
        samples = rng.uniform(-0.3, 0.3, int(seconds * SAMPLE_RATE)).astype(np.float32)
        codecs.write(path, samples)
        duration = len(samples) / SAMPLE_RATE
        clips.append(Clip(f"c{number}", duration, str(path), accents[number % len(accents)], f"s{number}", "", ""))
    return tuple(clips)


def train(path, precision, steps, shape=None, **changes):
    """Train a few steps with a YAML, including the longest batch, and return the measurements.

    Arguments
    ---------
    path : Path
        The YAML.
    precision : str
    steps : int
    shape : dict
        Changes of the encoder's configuration.
    **changes
        Changes of the YAML.

    Returns
    -------
    dict
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_encoder(path.stem, folder / "encoder", **(shape or {}))
        changes = {"wav2vec2_hub": str(folder / "encoder"), "output_folder": str(folder / "out"), **changes}
        whole, differs = read_overlay(path)
        with open(whole, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, differs | changes)
        steps *= hparams["grad_accumulation_factor"]
        clips = make_clips(folder, 60 * steps, hparams["max_seconds"], hparams["accents"])
        dataset = ClipDataset(clips, hparams["accents"])
        loader = make_loader(dataset, BucketBatchSampler(dataset.seconds(), hparams["batch_seconds"]))
        run = {"device": DEVICE, "precision": precision, "noprogressbar": True}
        run |= {"debug": True, "debug_batches": steps, "debug_epochs": 1}
        brain = AccentBrain(modules=hparams["modules"], options=hparams["training"], hparams=hparams, run_opts=run)
        brain.fit(hparams["epoch_counter"], loader)
    parameters = list(hparams["model"].parameters())
    return {
        "parameters": sum(one.numel() for one in parameters),
        "trained": sum(one.numel() for one in parameters if one.requires_grad),
        "batch_seconds": hparams["batch_seconds"],
        "batches_a_step": hparams["grad_accumulation_factor"],
        "peak": devices.peak_memory(DEVICE),
    }


def measure(path, options):
    """Train a few steps in this process, and print one row of the table."""
    took = train(path, options.precision, options.steps, gradient_checkpointing=options.gradient_checkpointing)
    counts = f"{took['parameters'] / 1e6:.1f} | {took['trained'] / 1e6:.1f}"
    batch = f"{took['batch_seconds']:g} s, {took['batches_a_step']} a step"
    print(f"| {path.name} | {counts} | {batch} | {options.precision} | {took['peak'] / 1e9:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yamls", type=Path, nargs="*")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--precision", default=devices.fastest_precision(DEVICE), help="(default: the result of auto on this machine)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="set gradient_checkpointing to True")
    options = parser.parse_args()
    if len(options.yamls) == 1:
        measure(options.yamls[0], options)
        return
    memory = "GPU memory" if DEVICE == "cuda" else "memory of the process"
    print(f"| | parameters (M) | trained (M) | batch | precision | peak {memory} (GB) |\n|---|---|---|---|---|---|")
    sys.stdout.flush()
    for path in options.yamls or sorted((ROOT / "hparams").glob("*.yaml")):
        words = [sys.executable, __file__, str(path), "--steps", str(options.steps)]
        words += ["--precision", options.precision] + ["--gradient_checkpointing"] * options.gradient_checkpointing
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))


if __name__ == "__main__":
    main()
