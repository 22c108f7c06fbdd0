"""What a user can get wrong, as exceptions.

Every message says what is wrong, which value, where, and what to do about it; the recipe and the command line
print it without a traceback and exit with code 2.
"""


class AccentPluginError(Exception):
    """Base of every error this package raises for a user's input."""


class ConfigError(AccentPluginError):
    """Hyperparameters that are unknown, malformed or contradict each other."""


class DataError(AccentPluginError):
    """A data set that cannot be used: missing, of the wrong kind, without accents, with an empty split, ..."""


class ManifestError(DataError):
    """A manifest (CSV or prepare.json) that is missing, damaged or was made from something else."""


class AudioError(AccentPluginError):
    """One clip that cannot be used.

    Arguments
    ---------
    reason : str
        Short name to count by ("undecodable", "empty", "too short", "too long", "non-finite", "silent").
    message : str
        Sentence for a person.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        # The default pickling would replay only the message, and workers send these between processes.
        return type(self), (self.reason, str(self))


class LimitError(AccentPluginError):
    """A request beyond what a server was told to take.

    Arguments
    ---------
    reason : str
        "bytes", "files", "seconds", "busy" or "time".
    message : str
        Sentence for a person.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class EncoderError(AccentPluginError):
    """An encoder that is missing, cannot be reached, or is of a family that is not supported."""


class ReportError(AccentPluginError):
    """Predictions that cannot be evaluated: none at all, probabilities that are no probabilities, ..."""


class BundleError(AccentPluginError):
    """A bundle that is missing, damaged, or not to be trusted."""


class ExchangeError(AccentPluginError):
    """A model that another library cannot hold, or one of another library that is not understood."""


class FeatureError(AccentPluginError):
    """Features on disk that are damaged, or of another encoder."""


class CheckpointError(AccentPluginError):
    """A checkpoint that cannot be written, or is damaged."""


class TrainingError(AccentPluginError):
    """Training that cannot go on: weights or gradients that are not finite, too many clips that cannot be read, ..."""
