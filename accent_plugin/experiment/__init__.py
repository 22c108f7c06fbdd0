"""What only the recipe needs: hyperparameters, settings, run folder, run, reports."""

from accent_plugin import lazy_names

# Written into runs of version 0.1.0.
__getattr__ = lazy_names(
    __name__,
    {
        "LoadingOptions": "accent_plugin.training.loaders",
    },
)
