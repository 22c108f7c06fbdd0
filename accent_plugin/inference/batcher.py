"""Windows of several threads through the network in common batches.

Nothing waits for company: while the network is at one batch, what other threads bring is gathered, and the next batch
is made of it. It holds the window that has waited longest, and those of similar length.
"""

import contextlib
import threading
import time

from accent_plugin.errors import LimitError


class _Ticket:
    """How many of one thread's windows are not done yet, and what went wrong with one of them."""

    def __init__(self, left):
        self.left, self.error = left, None


class DynamicBatcher:
    """A thread that does the work of all the others.

    Arguments
    ---------
    work : function
        Given a list of `accent_plugin.inference.windows.WindowJob`; leaves the scores with their recordings.
    batches : function
        Given the windows' lengths in samples; yields lists of indices, one for each batch that may be made of them.
    """

    def __init__(self, work, batches):
        self._work, self._batches = work, batches
        self._changed = threading.Condition()
        # Job and ticket, in the order they came.
        self._waiting = []
        self._closed = False
        self._own = threading.local()
        self.calls = self.windows = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="together")
        self._thread.start()

    @contextlib.contextmanager
    def deadline(self, deadline):
        """In this thread, give up what is not done by then, a time of `time.monotonic`."""
        self._own.deadline = deadline
        try:
            yield
        finally:
            self._own.deadline = None

    def score(self, jobs):
        """Return when the jobs are done.

        Raises
        ------
        LimitError
            "time" at the deadline; what has not begun by then is never done.
        Exception
            That of the work, in each thread that had a job in the batch.
        """
        if not jobs:
            return
        ticket, deadline = _Ticket(len(jobs)), getattr(self._own, "deadline", None)
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._waiting += [(job, ticket) for job in jobs]
            self._changed.notify_all()
            left = None if deadline is None else deadline - time.monotonic()
            in_time = self._changed.wait_for(lambda: ticket.error is not None or not ticket.left, left)
            self._waiting = [entry for entry in self._waiting if entry[1] is not ticket]
        if ticket.error is not None:
            raise ticket.error
        if not in_time:
            raise LimitError("time", "there was not enough time for the network to hear all of it")

    def close(self):
        """End the thread, after what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self):
        while batch := self._next():
            error = None
            try:
                self._work([job for job, _ in batch])
            except BaseException as raised:
                # It belongs to those who wait; this thread has others to serve.
                error = raised
            with self._changed:
                for _, ticket in batch:
                    ticket.left -= 1
                    ticket.error = ticket.error or error
                self.calls += 1
                self.windows += len(batch)
                self._changed.notify_all()

    def _next(self):
        """The next batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            lengths = [len(job.samples) for job, _ in self._waiting]
            chosen = set(next(batch for batch in self._batches(lengths) if 0 in batch))
            batch = [self._waiting[index] for index in sorted(chosen, key=lambda index: -lengths[index])]
            self._waiting = [entry for index, entry in enumerate(self._waiting) if index not in chosen]
            return batch
