"""Parts that only the recipe uses: hyperparameters, settings, run folder, run, reports."""

from accent_plugin import lazy_names

# Runs of version 0.1.0 contain these names.
__getattr__ = lazy_names(__name__, {"LoadingOptions": "accent_plugin.training.loaders"})
