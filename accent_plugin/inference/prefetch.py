"""Prefetching: threads decode files while the network runs."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE, UNDECODABLE
from accent_plugin.errors import AudioError
from accent_plugin.inference.records import Failure

# Longer files are streamed in blocks of this length.
BLOCK_SECONDS = 60.0
_LEAST_SECONDS = 0.1
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class SourceAudio:
    """A decoded file; for a long file, its beginning and a generator of the `rest`.

    `lost` lists what could not be decoded; it is complete when `rest` ends.
    """

    source: str | None
    blocks: tuple
    lost: list
    rest: Generator | None = None

    @property
    def seconds(self):
        """Return the decoded length."""
        return sum(map(len, self.blocks)) / SAMPLE_RATE


class Prefetcher:
    """Decode sources in threads, and return them in the order of the sources.

    The threads pause while `seconds` of decoded audio are waiting. Each thread also holds the file that it is decoding.
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
        """Return the next `SourceAudio` or `Failure` items until they reach this total length, or all that are left."""
        taken, total = [], 0.0
        while total < seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._taken in self._ready or (self._ended and self._is_last()))
                if self._taken not in self._ready:
                    break
                item = self._ready[self._taken]
                if isinstance(item, BaseException):
                    if taken:
                        # Return the items before the error first.
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
        """End the threads, after they have finished their current files."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            drawing = self._drawing
        for thread in self._threads:
            # A thread that waits for the caller's iterator may never return.
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
        """Return the next number and source, or None at the end; one thread at a time calls the caller's iterator."""
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
            # Raised in the thread that waits for the answers, not in this one.
            error, ended = raised, True
        with self._changed:
            number = self._drawn
            self._drawn += error is not None or not ended
            self._drawing = None
            # It may have been closed in the meantime.
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
    """Return the length of an item, with a minimum, so that failures and very short files cannot pile up."""
    return max(_LEAST_SECONDS, item.seconds if isinstance(item, SourceAudio) else 0.0)


def _decode(source):
    """Decode at most two blocks of a source; returns a `SourceAudio`, a `Failure`, or an interrupt for the caller."""
    name, lost = None, []
    try:
        name = name_of(source)
        blocks = _blocks(source, name, lost)
        first = next(blocks)
        second = next(blocks, None)
        return SourceAudio(name, (first,), lost) if second is None else SourceAudio(name, (first, second), lost, blocks)
    except AudioError as error:
        return Failure(name, error.reason, str(error))
    except Exception as error:
        return Failure(name, UNDECODABLE, str(_unreadable(name, error)))
    except BaseException as error:
        return error


def _blocks(source, name, lost):
    """Yield the blocks of a source; errors of a caller's file object become an `AudioError`."""
    try:
        yield from codecs.stream(plain(source), BLOCK_SECONDS, lost)
    except AudioError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name, error):
    return AudioError(UNDECODABLE, f"{name or 'the file'} cannot be read: {type(error).__name__}: {error}")


def one_ahead(blocks):
    """Yield blocks while a thread decodes the next one."""
    blocks = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def plain(source):
    """Convert a source to a type that `accent_plugin.audio` accepts."""
    return bytes(source) if isinstance(source, bytearray | memoryview) else source


def name_of(source):
    """Return a source's name for a record; None for bytes and for file objects without a name."""
    if isinstance(source, bytes | bytearray | memoryview):
        return None
    name = getattr(source, "name", None) if hasattr(source, "read") else source
    return None if name is None else str(name)
