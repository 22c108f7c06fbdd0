"""Names of the poolings, in a module of their own: checking a name takes no import of PyTorch."""

# In the order of the classes in `accent_plugin.pooling.POOLINGS`.
POOLING_NAMES = (
    "mean",
    "statistics",
    "attentive",
    "attentive_statistics",
)
