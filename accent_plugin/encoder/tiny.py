"""A tiny wav2vec 2.0 with random weights, for a first run of the recipe without a download."""

import json
import math
from pathlib import Path

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
from transformers.utils import logging as transformers_logging

from accent_plugin.audio.samples import SAMPLE_RATE

# A small version of wav2vec2-base: seven convolutions, group norm after the first, a hop of 320 samples.
CONFIG = {
    "conv_dim": [64] * 7,
    "conv_kernel": [80, 3, 3, 3, 3, 2, 1],
    "conv_stride": [10, 2, 2, 2, 2, 2, 1],
    "feat_extract_norm": "group",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "mask_time_prob": 0.0,
}

_LOWEST, _HIGHEST = 100.0, 7000.0  # hertz


def make_tiny_wav2vec2(folder, seed=0, say=None):
    """Write a tiny wav2vec 2.0 as a Hugging Face folder, for the recipe's `wav2vec2_hub`, and return the folder.

    The model is not trained. A randomly initialised CNN would need hours of speech. Therefore its first layer contains
    wavelets with random phases and random mel frequencies, as in SincNet (Ravanelli and Bengio 2018) and LEAF
    (Zeghidour et al. 2021), and the other layers are close to averages. The transformer is initialised like Hugging
    Face's.

    Arguments
    ---------
    folder : str or Path
        Left unchanged if it already holds this encoder with the same seed.
    seed : int
    say : callable
        Called with one line that says what was done; None prints nothing.
    """
    folder, say = Path(folder), say or (lambda line: None)
    card = folder / "accent_plugin.json"
    made = {"made_by": "accent_plugin.encoder.tiny", "trained": False, "seed": seed, "config": CONFIG}
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")) == made:
        say(f"{folder} already holds the tiny encoder: nothing to do")
        return folder
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Wav2Vec2Model(Wav2Vec2Config(**CONFIG))
    with torch.no_grad():
        first, *others = (layer.conv.weight for layer in model.feature_extractor.conv_layers)
        first[:, 0] = _wavelets(*first[:, 0].shape, generator)
        for weight in others:
            weight.mul_(0.3)
            for channel in range(len(weight)):
                weight[channel, channel % weight.shape[1]] += 1.5 / weight.shape[2]
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=SAMPLE_RATE).save_pretrained(folder)
    transformers_logging.enable_progress_bar()
    card.write_text(json.dumps(made, indent=1), encoding="utf-8")
    say(f"{folder}: a wav2vec 2.0 of {model.num_parameters():,} random parameters")
    return folder


def _wavelets(count, length, generator):
    """Make (count, length) windowed tones of unit norm, spread over the mel scale."""
    seconds = (torch.arange(length) - (length - 1) / 2) / SAMPLE_RATE
    mels = torch.linspace(*(2595 * math.log10(1 + hertz / 700) for hertz in (_LOWEST, _HIGHEST)), count)
    hertz = 700 * (10 ** (mels / 2595) - 1) * (1 + 0.05 * torch.randn(count, generator=generator))
    phases = 2 * math.pi * torch.rand(count, generator=generator)
    tones = torch.cos(2 * math.pi * hertz[:, None] * seconds + phases[:, None])
    tones = tones * torch.hann_window(length, periodic=False)
    return tones / tones.norm(dim=1, keepdim=True)
