"""Classify recordings of any length."""

from accent_plugin import lazy_names

# Public.
__getattr__ = lazy_names(
    __name__,
    {
        "AccentClassifier": "accent_plugin.inference.classifier",
        "Prediction": "accent_plugin.inference.records",
        "Failure": "accent_plugin.inference.records",
        "Window": "accent_plugin.inference.records",
    },
)
