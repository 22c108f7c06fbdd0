"""Ready batches and a Brain that takes steps on them, on any device."""

import torch

from accent_plugin.model import AccentModel
from accent_plugin.training.batches import Batch
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.options import TrainingOptions, make_epoch_counter

STEPS, CLIPS, SAMPLES = 5, 3, 8000


class Steps(list):
    """A training set of ready batches; stands for its own sampler."""

    epoch = 1
    start = 0
    batch_sampler = property(lambda self: self)
    dataset = property(lambda self: range(len(self) * CLIPS))

    def set_epoch(self, epoch):
        self.epoch = epoch


def batches(padded, steps=STEPS):
    lens = torch.tensor([0.6, 0.8, 1.0]) if padded else None
    names = [tuple(f"{step}-{clip}" for clip in range(CLIPS)) for step in range(steps)]
    return Steps(Batch(ids, torch.randn(CLIPS, SAMPLES), lens, torch.tensor([0, 1, 0])) for ids in names)


def make_brain(encoder, device, pooling="mean", **run):
    options = TrainingOptions(
        lr_encoder=1e-4,
        lr_head=1e-3,
        weight_decay=0.01,
        warmup=0.1,
        decay="linear",
        freeze_encoder_steps=0,
        label_smoothing=0.1,
        selection="last",
        max_unreadable_share=0.05,
        train_logger=None,
    )
    return AccentBrain(
        modules={"model": AccentModel(encoder, ["a", "b"], pooling=pooling, projector_size=4, dropout=0.1)},
        options=options,
        hparams={"epoch_counter": make_epoch_counter(1, 0)},
        run_opts={"device": device, "noprogressbar": True, "nonfinite_patience": 3, **run},
        class_weights=torch.tensor([1.0, 2.0]),
    )
