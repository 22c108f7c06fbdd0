"""Handling of SIGTERM, SIGINT and SIGUSR1: training stops after the current step, everything else at once."""

import contextlib
import logging
import os
import signal
import threading

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal asked this process to end. Like KeyboardInterrupt, it is no `Exception`, so no handler hides it."""

    def __init__(self, number):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def exit_code(self):
        """The exit code that a shell reports: 128 plus the signal number."""
        return 128 + self.signal


class Pending:
    """The signal received since `defer_signals` began, if any."""

    def __init__(self):
        self.number = None

    def __bool__(self):
        return self.number is not None

    def receive(self, number, frame):
        """Remember the first signal; raise `Interrupted` on the second.

        Under torchrun the second is ignored: it may be the same one, sent to all processes and forwarded by torchrun.
        """
        if self.number is not None:
            if "RANK" in os.environ:
                return
            raise Interrupted(number)
        self.number = number
        logger.warning("%s: training stops after this step is finished and saved", signal.Signals(number).name)


def _raise(number, frame):
    raise Interrupted(number)


@contextlib.contextmanager
def _handling(handler):
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread set signal handlers.
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
    """Raise `Interrupted` as soon as a signal arrives."""
    with _handling(_raise):
        yield


@contextlib.contextmanager
def defer_signals():
    """Remember signals; yields a `Pending` that is true once a signal has arrived."""
    pending = Pending()
    with _handling(pending.receive):
        yield pending


@contextlib.contextmanager
def default_handlers():
    """Let a signal end this process at once; Python calls no handler while it waits for other processes to join."""
    with _handling(signal.SIG_DFL):
        yield


def ignore_signals():
    """Ignore signals in a worker: terminals and some clusters send them to all processes; the parent handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
