"""Compatibility with version 0.1.0: saved runs contain this name."""

from accent_plugin.audio.augment import make_augmentation

__all__ = ["make_augmentation"]
