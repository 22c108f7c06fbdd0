"""Parts of a file that libsndfile can decode."""

import io
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

# Bytes that are examined at a time.
WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """Audio that is decoded at once.

    Arguments
    ---------
    pieces : tuple, or None
        What the decoder reads: literal bytes, and (start, end) ranges of the file. None is the whole file, and an
        empty tuple is nothing: then only a loss is described.
    seconds : float, or None
        How long the audio should be according to its bytes; None if this is unknown. If less is decoded, the
        difference is lost.
    tolerance : float
        Difference in seconds that is not a loss: delays of the encoder and the decoder.
    lost_before : float
        Seconds that are lost between the previous part and this one.
    reason : str
        Why they are lost.
    missing_at_start : bool
        Whether a difference to `seconds` is lost before this part, not at its end.
    fillers : tuple of (int, int)
        First sample and number of samples of silence that stands for lost audio, and is removed.
    repair : function, or None
        () -> Part with the same audio from its start, or None; called if decoding fails.
    """

    pieces: tuple | None = None
    seconds: float | None = None
    tolerance: float = 0.0
    lost_before: float = 0.0
    reason: str = ""
    missing_at_start: bool = False
    fillers: tuple = ()
    repair: Callable | None = field(default=None, compare=False)


class Bytes:
    """Random access to the bytes of an open file."""

    def __init__(self, file):
        self.file = file
        self.size = file.seek(0, io.SEEK_END)

    def at(self, start, count):
        """Read up to `count` bytes from `start`."""
        self.file.seek(start)
        found = self.file.read(count)
        while len(found) < count and (more := self.file.read(count - len(found))):
            found += more
        return found

    def search(self, pattern, start, end):
        """Yield the positions of a compiled pattern that matches at most 64 bytes, from `start` to `end`."""
        while start < end:
            window = self.at(start, min(WINDOW_BYTES, end - start) + 64)
            for match in pattern.finditer(window, 0):
                if match.start() < WINDOW_BYTES and start + match.end() <= end:
                    yield start + match.start()
            start += WINDOW_BYTES


class PiecesFile(io.RawIOBase):
    """A read-only file made of literal bytes and ranges of another file."""

    def __init__(self, file, pieces):
        self._file, self._pieces = file, pieces
        self._starts = [0]
        for piece in pieces:
            self._starts.append(self._starts[-1] + (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]))
        self._position = 0

    def readable(self):
        """Return True."""
        return True

    def seekable(self):
        """Return True."""
        return True

    def tell(self):
        """Return the position in bytes."""
        return self._position

    def seek(self, offset, whence=io.SEEK_SET):
        """Set the position in bytes."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer):
        """Fill a buffer, and return the number of bytes read."""
        target, done = memoryview(buffer).cast("B"), 0
        while done < len(target) and self._position < self._starts[-1]:
            index = bisect_right(self._starts, self._position) - 1
            offset, piece = self._position - self._starts[index], self._pieces[index]
            count = min(len(target) - done, self._starts[index + 1] - self._position)
            if isinstance(piece, bytes):
                found = piece[offset : offset + count]
            else:
                self._file.seek(piece[0] + offset)
                found = self._file.read(count)
                if not found:
                    break
            target[done : done + len(found)] = found
            done += len(found)
            self._position += len(found)
        return done
