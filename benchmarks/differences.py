"""Behaviour of SpeechBrain's IEMOCAP recipe for wav2vec2, measured on its parts and compared with this package.

    python benchmarks/differences.py

Tiny encoders with random weights and noise as input; two minutes at most. The figures show that an effect exists, and
its size in this setup. The script contains no code of that recipe: it runs SpeechBrain's lobe, pooling, Brain and
Checkpointer.
"""

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
import transformers
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from speechbrain.nnet.pooling import StatisticsPooling
from speechbrain.utils.checkpoints import Checkpointer, mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch.utils.data import DataLoader

from accent_plugin.encoder.factory import make_encoder
from accent_plugin.pooling import MeanPooling
from accent_plugin.training.batches import BucketBatchSampler
from accent_plugin.training.checkpoints import AtomicCheckpointer
from accent_plugin.versions import installed_versions

RATE = 16_000


def make_tiny(folder):
    """Make a tiny wav2vec2 with the architecture of wav2vec2-base."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        conv_dim=[32] * 7,
        num_conv_pos_embedding_groups=4,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)


def make_lobe(folder, **arguments):
    """Make the lobe as in that recipe's YAML."""
    return Wav2Vec2(folder, folder, output_norm=True, freeze_feature_extractor=True, **arguments)


def noise(seconds, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1)


def padding(folder, clips=8):
    """Measure the relative change of a clip's pooled vector when the clip is padded."""
    lobe, theirs = make_lobe(folder).eval(), StatisticsPooling(return_std=False)
    encoder, ours = make_encoder(folder).eval(), MeanPooling(64)

    def stock(wavs, lengths):
        return theirs(lobe(wavs, lengths), lengths)[:, 0]

    def own(wavs, lengths):
        return ours(*encoder(wavs, lengths))

    print("padded to   SpeechBrain   accent_plugin")
    with torch.no_grad():
        for times in (1.25, 2.0, 6.0):
            moved = {stock: [], own: []}
            for seed in range(clips):
                clip = noise(2.0, seed)
                wavs = torch.nn.functional.pad(clip[None], (0, int(len(clip) * (times - 1))))
                for embed, found in moved.items():
                    alone, padded = embed(clip[None], torch.ones(1)), embed(wavs, torch.tensor([1 / times]))
                    found.append(float((alone - padded).norm() / alone.norm()))
            print(f"{times:>5} times   {np.mean(moved[stock]):>10.1%}   {np.mean(moved[own]):>12.1e}")


def frozen(folder):
    """Measure the difference between two passes of a frozen encoder in training mode over one clip."""
    clip = noise(2.0, 0)[None]
    lobe, own = make_lobe(folder, freeze=True).train(), make_encoder(folder, freeze=True).train()
    for name, encode in (("SpeechBrain", lambda: lobe(clip, torch.ones(1))), ("accent_plugin", lambda: own(clip)[0])):
        first, second = encode(), encode()
        moved = float((first - second).norm() / first.norm())
        print(f"two passes of a frozen encoder in training mode: {name} differs by {moved:.1%}")


def convolutions(folder):
    """Check whether the backward pass goes through the frozen CNN."""
    lobe, called, own = make_lobe(folder), make_lobe(folder), make_encoder(folder)
    called.model.feature_extractor._freeze_parameters()
    cases = {"lobe alone": lobe, "lobe, and the recipe's own call": called, "accent_plugin": own}
    for name, encoder in cases.items():
        encoder.train()
        inside = encoder.model.feature_extractor(noise(1.0, 0)[None]).requires_grad
        print(f"frozen CNN in the backward pass: {name}: {'yes' if inside else 'no'}")


def pooling_noise():
    """Measure the noise that StatisticsPooling adds to the mean of zeros in evaluation mode."""
    pooled = StatisticsPooling(return_std=False).eval()(torch.zeros(8, 100, 64), torch.ones(8))
    print(f"StatisticsPooling, mean of zeros: {float(pooled.min()):.0e} to {float(pooled.max()):.0e}")
    ours = MeanPooling(64)(torch.zeros(8, 100, 64), torch.ones(8, 100, dtype=torch.bool))
    print(f"accent_plugin, mean of zeros: {float(ours.min()):.0e} to {float(ours.max()):.0e}")
    one = StatisticsPooling()(torch.ones(1, 1, 4), torch.ones(1))
    print(f"StatisticsPooling, deviation of one frame: {float(one[0, 0, -1])}")


class _Steps(sb.Brain):
    """Counts optimizer steps."""

    def compute_forward(self, batch, stage):
        return self.modules.layer(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


def accumulation(batches=10, factor=4):
    layer = torch.nn.Linear(2, 1)
    options = {"grad_accumulation_factor": factor, "device": "cpu", "noprogressbar": True}
    brain = _Steps({"layer": layer}, lambda parameters: torch.optim.SGD(parameters, 0.1), run_opts=options)
    brain.fit(range(1), DataLoader(torch.randn(batches, 2), batch_size=1))
    print(
        f"{batches} batches, a step every {factor}: SpeechBrain takes {brain.optimizer_step} steps and ignores the rest"
    )


def clipping():
    """Clip two parameter groups with gradients of 10 at 1 with SpeechBrain, and print the resulting steps."""
    groups = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    layer = torch.nn.ParameterList(groups)
    made = torch.optim.SGD([{"params": [group]} for group in groups], lr=1.0)
    brain = _Steps({"layer": layer}, lambda _: made, run_opts={"max_grad_norm": 1.0, "device": "cpu"})
    brain.init_optimizers()
    for group in groups:
        group.grad = torch.full((1,), 10.0)
    brain.optimizers_step()
    moved = ", ".join(f"{abs(group.item()):.0f}" for group in groups)
    print(f"two groups, gradients of 10, clipped at 1: SpeechBrain steps by {moved}")


def one_bad_batch():
    layer = torch.nn.Linear(2, 1)
    options = {"device": "cpu", "noprogressbar": True}
    brain = _Steps({"layer": layer}, lambda parameters: torch.optim.SGD(parameters, 0.1), run_opts=options)
    try:
        brain.fit(range(1), DataLoader(torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [1.0, 1.0]]), batch_size=1))
    except ValueError:
        print("stopped")
    finite = bool(torch.isfinite(layer.weight).all())
    print(f"one batch of three is NaN: SpeechBrain's weights are {'finite' if finite else 'NaN'} afterwards")


def padding_in_batches(clips=4000):
    """Measure the fraction of padding in a batch, with lengths like Common Voice's (as in memory.py)."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(np.log(5.3) - 0.06, 0.35, clips), 1, 20)
    batches = rng.permutation(clips).reshape(-1, 4)
    fixed = 1 - seconds.sum() / sum(4 * seconds[batch].max() for batch in batches)
    sampler = BucketBatchSampler(seconds, 60.0)
    sampler.set_epoch(1)
    ours = 1 - seconds.sum() / sum(len(batch) * max(seconds[_places(batch)]) for batch in sampler)
    print(f"padding: {fixed:.1%} in random batches of 4, {ours:.1%} in batches of 60 s")


def _places(batch):
    return [item if isinstance(item, int) else item[0] for item in batch]


@register_checkpoint_hooks
class _Fatal:
    """A part of a checkpoint that, if set so, kills its process while it is saved."""

    deadly = False

    @mark_as_saver
    def save(self, path):
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        Path(path).write_text("1")

    @mark_as_loader
    def load(self, path, end_of_epoch):
        Path(path).read_text()


def killed_save(folder):
    """Save, be killed inside the second save, and restart."""
    for kind in (Checkpointer, AtomicCheckpointer):
        where = Path(folder, kind.__name__)
        where.mkdir()
        child = os.fork()
        if not child:
            part = _Fatal()
            checkpointer = kind(str(where), {"part": part})
            checkpointer.save_checkpoint({"epoch": 1})
            part.deadly = True
            checkpointer.save_checkpoint({"epoch": 2})
        os.waitpid(child, 0)
        try:
            found = kind(str(where), {"part": _Fatal()}).recover_if_possible()
            outcome = "goes on from the one before" if found else "finds none"
        except Exception as error:
            outcome = f"stops with {type(error).__name__}"
        print(f"killed inside its second save, the next start of {kind.__name__} {outcome}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(Path(folder, "tiny"))
        padding(tiny)
        frozen(tiny)
        convolutions(tiny)
        pooling_noise()
        accumulation()
        clipping()
        one_bad_batch()
        padding_in_batches()
        killed_save(folder)
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))


if __name__ == "__main__":
    main()
