"""Dynamic batching: score the windows of several threads in common batches.

No window waits for a batch to fill up. While the network runs one batch, windows of other threads are queued. The next
batch contains the window that has waited longest and windows of similar length.
"""

import contextlib
import threading
import time

from accent_plugin.errors import LimitError


class _Request:
    """The request of one thread: the results of its windows, the number of missing results, and any error."""

    def __init__(self, count):
        self.results, self.missing, self.error = [None] * count, count, None


class DynamicBatcher:
    """A thread that scores the windows of all other threads in common batches.

    Arguments
    ---------
    work : function
        Maps a list of windows to a list of results.
    batches : function
        Maps the lengths of windows, in samples, to an iterator of batches, each a list of indices.
    """

    def __init__(self, work, batches):
        self._work, self._batches = work, batches
        self._changed = threading.Condition()
        # (window, request, place in the request), in order of arrival.
        self._waiting = []
        self._closed = False
        self._own = threading.local()
        self.calls = self.windows = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="together")
        self._thread.start()

    @contextlib.contextmanager
    def deadline(self, deadline):
        """Set the deadline of the calling thread, as a value of `time.monotonic`; `score` raises an error after it."""
        self._own.deadline = deadline
        try:
            yield
        finally:
            self._own.deadline = None

    def score(self, windows):
        """Queue windows, and wait for their results.

        Arguments
        ---------
        windows : list of (samples,) np.ndarray

        Returns
        -------
        list
            The result for each window.

        Raises
        ------
        LimitError
            With the reason "time", if the deadline passes. Windows still in the queue are dropped.
        Exception
            Any error of `work`. It is raised in each thread that has a window in the batch.
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
            raise LimitError("time", "there was not enough time to classify the whole recording")
        return request.results

    def close(self):
        """End the thread after it has processed the queue."""
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
                # Raised in the waiting threads; this thread continues.
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
        """Return the next batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            lengths = [len(window) for window, _, _ in self._waiting]
            chosen = set(next(batch for batch in self._batches(lengths) if 0 in batch))
            batch = [self._waiting[index] for index in sorted(chosen, key=lambda index: -lengths[index])]
            self._waiting = [entry for index, entry in enumerate(self._waiting) if index not in chosen]
            return batch
