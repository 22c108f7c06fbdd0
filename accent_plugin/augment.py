"""A name of version 0.1.0, written into its runs."""

from accent_plugin.audio.augment import make_augmentation

__all__ = ["make_augmentation"]
