"""A name of version 0.1.0, written into its runs."""

from accent_plugin.training.checkpoints import AtomicCheckpointer

__all__ = ["AtomicCheckpointer"]
