"""Exceptions for errors that a user can fix.

Every message states the problem, the value, the place and a fix. The recipe and the command line print it without a
traceback and exit with code 2.
"""

# The hyphen, and the dashes and minus signs that editors and web pages put in its place.
DASHES = "-\u00ad\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"


def misspelt_option(word, names):
    """Describe a word of a command line that is an option with other dashes, or with none; None for other words.

    Arguments
    ---------
    word : str
    names : collection of str
        The options, without their dashes.

    Example
    -------
    >>> misspelt_option("\u2014lr_head=1", ["lr_head"])
    "'\u2014lr_head=1' does not begin with two hyphens: type --lr_head=1"
    """
    bare = word.lstrip(DASHES)
    name, equals, _ = bare.partition("=")
    if name not in names or word == f"--{bare}" or (word == bare and not equals):
        return None
    return f"{word!r} does not begin with two hyphens: type --{bare}"


class AccentPluginError(Exception):
    """Base class of all errors that this package raises for user input."""


class ConfigError(AccentPluginError):
    """Hyperparameters are unknown, malformed or contradictory."""


class DataError(AccentPluginError):
    """A data set cannot be used: it is missing, of the wrong kind, without accents, has an empty split, ..."""


class ManifestError(DataError):
    """A manifest (CSV or prepare.json) is missing, damaged or was made from other data."""


class _ReasonError(AccentPluginError):
    """An error with a short reason for counting, besides the message for a person."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        # Workers send these between processes, and the default pickling keeps only the message.
        return type(self), (self.reason, str(self))


class AudioError(_ReasonError):
    """A clip cannot be used.

    The reason is "undecodable", "empty", "too short", "too long", "non-finite", "out of range" or "silent".
    """


class LimitError(_ReasonError):
    """A request exceeds a limit of the server: "bytes", "files", "seconds", "busy" or "time"."""


class EncoderError(AccentPluginError):
    """An encoder is missing, cannot be downloaded, or its family is not supported."""


class ReportError(AccentPluginError):
    """Predictions cannot be evaluated: there are none, probabilities are invalid, ..."""


class BundleError(AccentPluginError):
    """A bundle is missing, damaged or contains unsafe values."""


class ExchangeError(AccentPluginError):
    """A model cannot be exported to, or imported from, another library."""


class FeatureError(AccentPluginError):
    """Cached features are damaged or come from another encoder."""


class CheckpointError(AccentPluginError):
    """A checkpoint cannot be written or is damaged."""


class TrainingError(AccentPluginError):
    """Training cannot continue: weights or gradients are not finite, too many clips are unreadable, ..."""
