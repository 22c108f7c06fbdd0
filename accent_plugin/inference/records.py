"""Frozen result records: predictions, their windows, and files that could not be classified."""

from dataclasses import dataclass, field

# With less speech than this, a prediction is marked as unreliable.
RELIABLE_SECONDS = 1.0


@dataclass(frozen=True)
class Window:
    """Start and end of a window in seconds, and its probabilities, which are None if it contains too little speech."""

    start: float
    end: float
    probabilities: dict | None

    @property
    def skipped(self):
        """Whether the window was skipped, and does not contribute to the prediction."""
        return self.probabilities is None


@dataclass(frozen=True)
class Prediction:
    """The prediction for one recording.

    Arguments
    ---------
    accent : str
        The most probable accent.
    decision : str
        The same as `accent`, or None if the classifier abstains.
    probability : float
        The probability of `accent`.
    probabilities : dict
        Accent -> probability, in the classifier's order.
    seconds : float
        Length of the recording.
    speech_seconds : float
        Duration of speech, detected by energy.
    reliable : bool
        Whether `speech_seconds` is at least `RELIABLE_SECONDS`.
    source : str
        The file's name; None for arrays.
    windows : tuple of Window
        In order of time.
    lost : tuple of accent_plugin.audio.samples.Loss
        The parts of the file that could not be decoded; the answer is about the others. Empty if nothing was lost.

    Example
    -------
    >>> print(Prediction("us", "us", 0.834, {"us": 0.834, "england": 0.166}, 4.0, 3.1, True))
    us (0.83)
    """

    accent: str
    decision: str | None
    probability: float
    probabilities: dict
    seconds: float
    speech_seconds: float
    reliable: bool
    source: str | None = None
    windows: tuple = field(default=(), repr=False)
    lost: tuple = ()

    @property
    def lost_seconds(self):
        """How many seconds could not be decoded."""
        return sum(loss.seconds for loss in self.lost)

    def __str__(self):
        answer = f"{self.accent} ({self.probability:.2f})"
        return answer if self.decision is not None else f"undecided: {answer}"


@dataclass(frozen=True)
class Failure:
    """A file that could not be classified: its name, a short reason for counting, and a message."""

    source: str | None
    reason: str
    message: str

    def __str__(self):
        return f"{self.reason}: {self.message}"


def printable(text):
    """Convert text to one line without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
