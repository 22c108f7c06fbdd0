"""What a classifier answers: frozen records of a recording, its windows, and of files that could not be classified."""

from dataclasses import dataclass, field

# Below this much speech an answer is a guess.
RELIABLE_SECONDS = 1.0


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, in seconds, and its own probabilities; None where it holds too little speech."""

    start: float
    end: float
    probabilities: dict | None

    @property
    def skipped(self):
        """Whether the window has no part in the answer."""
        return self.probabilities is None


@dataclass(frozen=True)
class Prediction:
    """What was heard in one recording.

    Arguments
    ---------
    accent : str
        The likeliest.
    decision : str
        The same, or None where the classifier abstains.
    probability : float
        Of `accent`.
    probabilities : dict
        Accent -> probability, in the classifier's order.
    seconds : float
        Length of the recording.
    speech_seconds : float
        How much of it is speech, by its energy.
    reliable : bool
        Whether that is at least `RELIABLE_SECONDS`.
    source : str
        The file's name; None for samples.
    windows : tuple of Window
        In order of time.

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

    def __str__(self):
        answer = f"{self.accent} ({self.probability:.2f})"
        return answer if self.decision is not None else f"undecided: {answer}"


@dataclass(frozen=True)
class Failure:
    """A file that gave no prediction: its name, a short reason to count by, and a sentence for a person."""

    source: str | None
    reason: str
    message: str

    def __str__(self):
        return f"{self.reason}: {self.message}"


def printable(text):
    """One line without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
