"""Encoders whose output for a clip does not depend on its batch."""

from accent_plugin import lazy_names

# Public, and written into saved runs. It can start from a bundle, which lies above this folder.
__getattr__ = lazy_names(
    __name__,
    {
        "make_encoder": "accent_plugin.exchange.start",
    },
)
