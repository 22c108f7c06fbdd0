"""Windows of several threads through the network in common batches.

Nothing waits for company: while the network is at one batch, what other threads bring is gathered, and the next batch
is made of it. It holds the window that has waited longest, and those of similar length.
"""

import contextlib
import threading
import time

from accent_plugin.errors import LimitError


class _Request:
    """What one thread asks for: its windows' results, how many are still missing, and an error of one of them."""

    def __init__(self, count):
        self.results, self.missing, self.error = [None] * count, count, None


class DynamicBatcher:
    """A thread that does the work of all the others.

    Arguments
    ---------
    work : function
        Given a list of windows, gives a list of their results.
    batches : function
        Given the windows' lengths in samples; yields lists of indices, one for each batch that may be made of them.
    """

    def __init__(self, work, batches):
        self._work, self._batches = work, batches
        self._changed = threading.Condition()
        # Window, its request, and its place there, in the order they came.
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

    def score(self, windows):
        """Wait for the results of windows.

        Arguments
        ---------
        windows : list of (samples,) np.ndarray

        Returns
        -------
        list
            What the work gave for each.

        Raises
        ------
        LimitError
            "time" at the deadline; what has not begun by then is never done.
        Exception
            That of the work, in each thread that had a window in the batch.
        """
        if not windows:
            return []
        request, deadline = _Request(len(windows)), getattr(self._own, "deadline", None)
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._waiting += [(window, request, place) for place, window in enumerate(windows)]
            self._changed.notify_all()
            left = None if deadline is None else deadline - time.monotonic()
            in_time = self._changed.wait_for(lambda: request.error is not None or not request.missing, left)
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
        if request.error is not None:
            raise request.error
        if not in_time:
            raise LimitError("time", "there was not enough time for the network to hear all of it")
        return request.results

    def close(self):
        """End the thread, after what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self):
        while batch := self._next():
            results, error = [None] * len(batch), None
            try:
                results = self._work([window for window, _, _ in batch])
            except BaseException as raised:
                # It belongs to those who wait; this thread has others to serve.
                error = raised
            with self._changed:
                for (_, request, place), result in zip(batch, results, strict=True):
                    request.results[place] = result
                    request.missing -= 1
                    request.error = request.error or error
                self.calls += 1
                self.windows += len(batch)
                self._changed.notify_all()

    def _next(self):
        """The next batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            lengths = [len(window) for window, _, _ in self._waiting]
            chosen = set(next(batch for batch in self._batches(lengths) if 0 in batch))
            batch = [self._waiting[index] for index in sorted(chosen, key=lambda index: -lengths[index])]
            self._waiting = [entry for index, entry in enumerate(self._waiting) if index not in chosen]
            return batch
