"""Bundles: a trained classifier as one folder."""

from accent_plugin import lazy_names

# The hyperparams.yaml of every bundle contains these names.
__getattr__ = lazy_names(
    __name__,
    {
        "build": "accent_plugin.bundle.load",
        "make_label_encoder": "accent_plugin.bundle.load",
        "Normalizer": "accent_plugin.bundle.modules",
        "AsIs": "accent_plugin.bundle.modules",
        "Embedding": "accent_plugin.bundle.modules",
        "Head": "accent_plugin.bundle.modules",
    },
)
