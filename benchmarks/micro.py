"""Components of the package compared with those of PyTorch and SpeechBrain that they replace.

    pip install -e '.[bench]'
    python -m pytest benchmarks/micro.py
    OMP_NUM_THREADS=1 python -m pytest benchmarks/micro.py --benchmark-timer=time.process_time   # CPU seconds

Each group is one table; the factor in brackets beside each median is the ratio to the group's fastest. On a machine
with other work, threads wait for each other and wall-clock times can be ten times too long: use the CPU times of the
last command. `-k` selects a part. Shapes are those of a batch of 60 s of audio, 11 clips of 5.4 s, except for pooling.
With xdist (`-n`) nothing is measured.

The peers do not do exactly the same work: PyTorch's GroupNorm includes the padding, SpeechBrain's mean adds noise, its
attention has a weight for each feature of a frame, and its batch contains more than waveforms and labels.
"""

import functools

import numpy as np
import pytest
import torch
from torch import nn

CLIPS, SECONDS, RATE = 11, 5.4, 16_000
# Frames of a clip after convolutions with strides of 5 and of 320 in total.
FIRST_FRAMES, FRAMES = 17_279, 269


def measure(benchmark, group, work, rounds):
    """Run rounds of one call each; the shortest takes half a millisecond, which the timer resolves well."""
    benchmark.group = group
    benchmark.pedantic(work, rounds=rounds, iterations=1, warmup_rounds=2)


def backward(forward, *inputs):
    """Make a function that runs `forward` on inputs, and the backward pass."""
    inputs = [one.requires_grad_() for one in inputs]
    slope = torch.ones_like(forward(*inputs))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, slope)


def shares(clips):
    """Make the relative lengths of clips: evenly from 1 down to 0.7."""
    return torch.linspace(1.0, 0.7, clips)


def valid(lens, frames):
    return torch.arange(frames) < (lens * frames).round()[:, None]


# --------------------------------------------------------------------------------------------------------- pooling


def our_pooling(name, lens):
    from accent_plugin.pooling import make_pooling

    pool, mask = make_pooling(name, 768), valid(lens, 270)
    return lambda frames: pool(frames, mask)


def their_statistics(lens, **options):
    from speechbrain.nnet.pooling import StatisticsPooling

    pool = StatisticsPooling(**options)
    return lambda frames: pool(frames, lens)


def their_attention(lens, **options):
    from speechbrain.lobes.models.ECAPA_TDNN import AttentiveStatisticsPooling

    pool = AttentiveStatisticsPooling(768, **options)
    # It takes channels first.
    return lambda frames: pool(frames.transpose(1, 2), lens)


# Group -> name -> function of lengths that makes a function of frames.
POOLINGS = {
    "mean": {
        "accent_plugin mean": lambda lens: our_pooling("mean", lens),
        "SpeechBrain StatisticsPooling(return_std=False)": lambda lens: their_statistics(lens, return_std=False),
    },
    "statistics": {
        "accent_plugin statistics": lambda lens: our_pooling("statistics", lens),
        "SpeechBrain StatisticsPooling": their_statistics,
    },
    "attention": {
        "accent_plugin attentive": lambda lens: our_pooling("attentive", lens),
        "accent_plugin attentive_statistics": lambda lens: our_pooling("attentive_statistics", lens),
        "SpeechBrain AttentiveStatisticsPooling(global_context=False)": lambda lens: their_attention(
            lens, global_context=False
        ),
        "SpeechBrain AttentiveStatisticsPooling": their_attention,
    },
}


@pytest.mark.parametrize("group, name", [(group, name) for group, found in POOLINGS.items() for name in found])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def test_pooling(benchmark, group, name, training):
    torch.manual_seed(0)
    pool, frames = POOLINGS[group][name](shares(16)), torch.randn(16, 270, 768)
    if training:
        work = backward(pool, frames)
    else:
        work = torch.no_grad()(lambda: pool(frames))
    way = "forward and backward" if training else "forward"
    measure(benchmark, f"pooling, {group}, (16, 270, 768), {way}", work, rounds=30)


# ------------------------------------------------------------------------- group normalisation of the first convolution


@pytest.mark.parametrize("name", ["accent_plugin MaskedGroupNorm", "PyTorch GroupNorm"])
@pytest.mark.parametrize("way", ["forward", "forward in bf16", "forward and backward"])
def test_group_norm(benchmark, name, way):
    from accent_plugin.encoder.masking import MaskedGroupNorm

    torch.manual_seed(0)
    norm = nn.GroupNorm(512, 512)
    if "Masked" in name:
        norm = functools.partial(MaskedGroupNorm.replacing(norm), valid=valid(shares(CLIPS), FIRST_FRAMES))
    hidden = torch.randn(CLIPS, 512, FIRST_FRAMES)
    if way == "forward and backward":
        work = backward(norm, hidden)
    else:
        hidden = hidden.bfloat16() if "bf16" in way else hidden
        work = torch.no_grad()(lambda: norm(hidden))
    measure(benchmark, f"group norm, {(CLIPS, 512, FIRST_FRAMES)}, {way}", work, rounds=5)


# ------------------------------------------------------------------------------------------------------- collation


@pytest.mark.parametrize("name", ["accent_plugin collate", "SpeechBrain PaddedBatch"])
def test_collation(benchmark, name):
    from speechbrain.dataio.batch import PaddedBatch

    from accent_plugin.training.batches import collate

    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(int(share * SECONDS * RATE), dtype=np.float32) for share in shares(CLIPS).tolist()]
    if name.startswith("SpeechBrain"):
        items = [{"id": str(number), "sig": wave, "label": number % 3} for number, wave in enumerate(waves)]
        work = PaddedBatch
    else:
        items = [(str(number), wave, number % 3) for number, wave in enumerate(waves)]
        work = collate
    measure(benchmark, f"collation, {CLIPS} clips of up to {SECONDS} s", lambda: work(items), rounds=100)


# --------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", ["accent_plugin dropout", "PyTorch dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["forward", "forward and backward"])
def test_dropout(benchmark, name, dtype, way):
    """Measure dropout of the attention weights of wav2vec2-base."""
    from accent_plugin.encoder.fast_dropout import dropout

    drop = nn.functional.dropout if name.startswith("PyTorch") else dropout
    torch.manual_seed(0)
    weights = torch.rand(CLIPS, 12, FRAMES, FRAMES, dtype=dtype)
    if way == "forward":
        work = torch.no_grad()(lambda: drop(weights, 0.1, True))
    else:
        work = backward(lambda inputs: drop(inputs, 0.1, True), weights)
    kind = str(dtype).removeprefix("torch.")
    measure(benchmark, f"dropout, {tuple(weights.shape)}, {kind}, {way}", work, rounds=15)
