"""Compatibility with version 0.1.0: saved runs contain this name."""

from accent_plugin.training.checkpoints import AtomicCheckpointer

__all__ = ["AtomicCheckpointer"]
