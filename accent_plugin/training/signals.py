"""SIGTERM and SIGINT, as a cluster or a person sends them: training ends at the next step, everything else at once."""

import contextlib
import logging
import os
import signal
import threading

logger = logging.getLogger(__name__)


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(BaseException):
    """Somebody asked this process to end; like KeyboardInterrupt no `Exception`, so that nothing swallows it.

    Arguments
    ---------
    number : int
        Of the signal.
    """

    def __init__(self, number):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def exit_code(self):
        """As a shell gives it."""
        return 128 + self.signal


class Pending:
    """What has been asked for since `deferred` began."""

    def __init__(self):
        self.number = None

    def __bool__(self):
        return self.number is not None

    def receive(self, number, frame):
        """Handle a signal: the first is remembered, the second ends at once.

        Under torchrun it does not: a terminal or a cluster may send one to all, and torchrun hands its own on.
        """
        if self.number is not None:
            if "RANK" in os.environ:
                return
            raise Interrupted(number)
        self.number = number
        logger.warning("%s: this step is finished and saved, then training ends", signal.Signals(number).name)


def _raise(number, frame):
    raise Interrupted(number)


@contextlib.contextmanager
def _handling(handler):
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only, and lets no other handle them.
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def raise_on_signal():
    """Raise `Interrupted` as soon as a signal comes."""
    with _handling(_raise):
        yield


@contextlib.contextmanager
def defer_signals():
    """Remember signals; gives a `Pending` that is true once one has come."""
    pending = Pending()
    with _handling(pending.receive):
        yield pending


@contextlib.contextmanager
def default_handlers():
    """Let a signal end this process at once: where it waits for others to join, Python calls no handler."""
    with _handling(signal.SIG_DFL):
        yield


def ignore_signals():
    """Leave signals to the process that started this one: a terminal and some clusters send them to all."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
