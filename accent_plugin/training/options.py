"""How a classifier is trained: options, learning rates, early stopping, history."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import speechbrain as sb
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.epoch_loop import EpochCounter, EpochCounterWithStopper

from accent_plugin import files
from accent_plugin.errors import ConfigError
from accent_plugin.training import distributed

logger = logging.getLogger(__name__)

# Selection of the epoch -> arguments of the checkpointer.
SELECTIONS = {
    "macro_f1": {"max_key": "macro_f1"},
    "loss": {"min_key": "loss"},
    "last": {"max_key": "epoch"},
}


def learning_rate_factor(progress, warmup, decay):
    """Learning rate as a fraction of its peak, `progress` (0 to 1) through training.

    It rises linearly for a fraction `warmup` of training. Then it falls to zero with `decay` "linear" or "cosine", or
    stays constant with "none".

    Example
    -------
    >>> [round(learning_rate_factor(at, 0.1, "linear"), 2) for at in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup) if warmup < 1 else 0.0
    left = min(max(left, 0.0), 1.0)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "none": 1.0}[decay]


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a classifier is trained.

    Arguments
    ---------
    lr_encoder, lr_head : float
        Peak learning rates of the encoder, and of the head and adapters.
    weight_decay : float
        For matrices; biases, norms and layer weights have none.
    warmup, decay
        Learning-rate schedule, see `learning_rate_factor`.
    freeze_encoder_steps : int
        Number of steps at the start in which the encoder is frozen.
    label_smoothing : float
    selection : str
        Selection of the epoch to evaluate: a key of `SELECTIONS`.
    max_unreadable_share : float
        Fraction of a split's clips that may be unreadable before training stops.
    train_logger, tensorboard_logger : speechbrain.utils.train_logger.TrainLogger
        The second may be None.
    """

    lr_encoder: float
    lr_head: float
    weight_decay: float
    warmup: float
    decay: str
    freeze_encoder_steps: int
    label_smoothing: float
    selection: str
    max_unreadable_share: float
    train_logger: object
    tensorboard_logger: object = None


def read_history(path):
    """Read the metrics of each epoch, oldest first, as `AccentBrain` writes them; an empty list if there are none."""
    path = Path(path)
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(row["epoch"], int) for row in history):
            return history
        why = "an epoch has no number"
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        why = error
    logger.warning("%s is damaged (%s): the curves of earlier epochs are lost", path, why)
    return []


def add_to_history(path, row):
    """Append the metrics of an epoch; a resumed run replaces the epochs that it trains again."""
    history = [earlier for earlier in read_history(path) if earlier["epoch"] < row["epoch"]]
    with files.atomic_write(path) as file:
        json.dump([*history, row], file, indent=1)


def make_epoch_counter(number_of_epochs, patience):
    """SpeechBrain's epoch counter, which stops after `patience` epochs without improvement; 0 never stops early."""
    if not patience:
        return EpochCounter(number_of_epochs)
    # It minimises an error, because SpeechBrain's "max" counts an equal value as an improvement and never stops.
    return _EarlyStopper(number_of_epochs, limit_to_stop=patience, limit_warmup=0, direction="min")


@register_checkpoint_hooks
class _EarlyStopper(EpochCounterWithStopper):
    """Saves its whole state: SpeechBrain's class does not register its hooks, so that only the epoch is saved."""

    @mark_as_saver
    def _save(self, path):
        super()._save(path)

    @mark_as_loader
    def _recover(self, path, end_of_epoch=True):
        super()._recover(path, end_of_epoch)


def make_tensorboard_logger(enabled, folder):
    """SpeechBrain's TensorBoard logger, or None; raises ConfigError if TensorBoard is not installed."""
    if not enabled or not distributed.is_main():
        return None
    try:
        return sb.utils.train_logger.TensorboardLogger(save_dir=folder)
    except ImportError as error:
        raise ConfigError("tensorboard is True, but TensorBoard is not installed: pip install tensorboard") from error


def own_sums(sums):
    """This process's part of a checkpoint's sums; the first process gets all if the number of processes changed."""
    if len(sums) == distributed.world_size():
        return sums[distributed.rank()]
    counted = [sum(column) for column in zip(*sums, strict=True)][:2] if distributed.is_main() else [0.0, 0.0]
    return [*counted, *sums[0][2:]]


def parameter_groups(parameters, peak):
    """Make AdamW's groups of trainable parameters: biases, norms and layer weights have no weight decay."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "peak": peak},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "peak": peak, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
