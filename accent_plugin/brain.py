"""Compatibility with version 0.1.0: `AccentBrain` is a public name, and saved runs contain the others."""

from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.options import TrainingOptions, make_epoch_counter, make_tensorboard_logger

__all__ = ["AccentBrain", "TrainingOptions", "make_epoch_counter", "make_tensorboard_logger"]
