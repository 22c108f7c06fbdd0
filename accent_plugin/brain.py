"""Names of version 0.1.0: `AccentBrain` is public, the others are written into its runs."""

from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.options import TrainingOptions, make_epoch_counter, make_tensorboard_logger

__all__ = ["AccentBrain", "TrainingOptions", "make_epoch_counter", "make_tensorboard_logger"]
