"""Files decoded by threads while the network works."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE, UNDECODABLE
from accent_plugin.errors import AudioError
from accent_plugin.inference.records import Failure

# Longer files are streamed, in blocks of so many seconds.
BLOCK_SECONDS = 60.0


_LEAST_SECONDS = 0.1


_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class SourceAudio:
    """A decoded file: all of it, or its beginning and, for a long one, the generator of the `rest`."""

    source: str | None
    blocks: tuple
    rest: Generator | None = None

    @property
    def seconds(self):
        """Length of what was decoded."""
        return sum(map(len, self.blocks)) / SAMPLE_RATE


class Prefetcher:
    """Decode sources in threads, in any order, and give them back in theirs.

    The threads pause while `seconds` of audio wait to be taken; on top of that each holds what it is decoding.
    """

    def __init__(self, sources, workers, seconds):
        self._sources, self._seconds = iter(sources), seconds
        self._changed = threading.Condition()
        self._ready, self._waiting = {}, 0.0
        self._drawn = self._taken = 0
        self._ended = False
        self._drawing = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def take(self, seconds):
        """The next items, `Sound` or `Failure`: just as many as last so long together, or all that are left."""
        taken, total = [], 0.0
        while total < seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._taken in self._ready or (self._ended and self._is_last()))
                if self._taken not in self._ready:
                    break
                item = self._ready[self._taken]
                if isinstance(item, BaseException):
                    if taken:
                        # What came before it is answered first.
                        break
                    raise item
                del self._ready[self._taken]
                self._taken += 1
                self._waiting -= _seconds(item)
                self._changed.notify_all()
            taken.append(item)
            total += _seconds(item)
        return taken

    def close(self):
        """End the threads; what they are decoding is finished first."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            drawing = self._drawing
        for thread in self._threads:
            # One that waits for the caller's iterator may wait for ever.
            thread.join(timeout=_PATIENCE_SECONDS if thread is drawing else None)
        for item in self._ready.values():
            if isinstance(item, SourceAudio) and item.rest is not None:
                item.rest.close()
        self._ready.clear()

    def _is_last(self):
        return self._taken >= self._drawn and self._drawing is None

    def _work(self):
        while (drawn := self._draw()) is not None:
            number, source = drawn
            self._put(number, _decode(source))

    def _draw(self):
        """The next number and source, or None at the end; only one thread at a time is in the caller's iterator."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (self._drawing is None and self._waiting < self._seconds))
            if self._ended:
                return None
            self._drawing = threading.current_thread()
        source, error, ended = None, None, False
        try:
            source = next(self._sources)
        except StopIteration:
            ended = True
        except BaseException as raised:
            # It belongs to the one who waits for the answers, not to this thread.
            error, ended = raised, True
        with self._changed:
            number = self._drawn
            self._drawn += error is not None or not ended
            self._drawing = None
            # Closed in the meantime, or at the end.
            ended = self._ended = self._ended or ended
            if error is not None:
                self._ready[number] = error
            self._changed.notify_all()
        return None if ended else (number, source)

    def _put(self, number, item):
        with self._changed:
            self._ready[number] = item
            self._waiting += _seconds(item)
            self._changed.notify_all()


def _seconds(item):
    """What an item counts for; failures and files of almost no length are not to pile up without end."""
    return max(_LEAST_SECONDS, item.seconds if isinstance(item, SourceAudio) else 0.0)


def _decode(source):
    """Decode a source as far as two blocks; gives a `Sound`, a `Failure`, or an interrupt for the caller."""
    name = None
    try:
        name = name_of(source)
        blocks = _blocks(source, name)
        first = next(blocks)
        second = next(blocks, None)
        return SourceAudio(name, (first,)) if second is None else SourceAudio(name, (first, second), blocks)
    except AudioError as error:
        return Failure(name, error.reason, str(error))
    except Exception as error:
        return Failure(name, UNDECODABLE, str(_unreadable(name, error)))
    except BaseException as error:
        return error


def _blocks(source, name):
    """Yield a source's blocks; whatever a caller's file object raises in between is an `AudioError`, too."""
    try:
        yield from codecs.stream(plain(source), BLOCK_SECONDS)
    except AudioError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name, error):
    return AudioError(UNDECODABLE, f"{name or 'it'} cannot be read: {type(error).__name__}: {error}")


def one_ahead(blocks):
    """Yield blocks while a thread makes the next one."""
    blocks = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def plain(source):
    """A source as `accent_plugin.audio` takes it."""
    return bytes(source) if isinstance(source, bytearray | memoryview) else source


def name_of(source):
    """A source's name for a record; None for bytes and for file objects without one."""
    if isinstance(source, bytes | bytearray | memoryview):
        return None
    name = getattr(source, "name", None) if hasattr(source, "read") else source
    return None if name is None else str(name)
