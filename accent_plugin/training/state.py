"""Training state besides weights and optimizer: what a resumed run needs to match an uninterrupted one."""

import logging
import math
import random

import numpy as np
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

from accent_plugin.training import distributed

logger = logging.getLogger(__name__)


@register_checkpoint_hooks
class TrainingState:
    """The position in the epoch, running sums, and the states of all random generators in every process.

    Batches and augmentation depend on (seed, epoch, clip) only, so that skipping the first batches is enough to resume.

    Attributes
    ----------
    step : int
        Batches of the epoch that each process has finished.
    figures : dict
        Name -> running sums.
    """

    def __init__(self):
        self.step, self.figures, self._random = 0, {}, []

    def capture(self, step, figures):
        """Capture the state; all processes must call this before a checkpoint is written."""
        self.step, self.figures = step, dict(figures)
        self._random = distributed.all_gather(random_state())

    @mark_as_saver
    def save(self, path):
        """Write the captured state, with the batches of all processes: their number may change."""
        done = self.step * distributed.world_size()
        torch.save({"step": done, "figures": self.figures, "random": self._random}, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Read the state, and set the random generators of this process."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.step, self.figures = math.ceil(state["step"] / distributed.world_size()), state["figures"]
        if len(state["random"]) == distributed.world_size():
            set_random_state(state["random"][distributed.rank()])
        else:
            logger.warning(
                "the checkpoint was written by %d processes, now there are %d: dropout differs from that of an "
                "uninterrupted run",
                len(state["random"]),
                distributed.world_size(),
            )


def random_state():
    """States of PyTorch's, NumPy's and Python's generators, as tensors and plain values."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        # This process's GPU only: querying the others would create CUDA contexts on them.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state):
    """Restore the generators from `random_state`; the GPU's only if there was one and is one now."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
