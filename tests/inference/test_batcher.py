"""Windows of several threads in common batches: who is with whom, whose error it is, and who gives up."""

import threading
import time
from dataclasses import dataclass

import pytest

from accent_plugin.errors import LimitError
from accent_plugin.inference.base import buckets
from accent_plugin.inference.batcher import DynamicBatcher


@dataclass(frozen=True)
class Window:
    name: str
    length: int = 100

    def __len__(self):
        return self.length


class Work:
    """Remembers its batches; holds the first one back until it is let go."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Event(), threading.Event()

    def __call__(self, windows):
        self.batches.append(sorted(window.name for window in windows))
        if len(self.batches) == 1:
            self.begun.set()
            assert self.go.wait(30)
        if any(window.name == "bad" for window in windows):
            raise ZeroDivisionError("of the bad one")
        return [f"of {window.name}" for window in windows]


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def batcher(work):
    made = DynamicBatcher(work, lambda lengths: buckets(lengths, 1000))
    yield made
    work.go.set()
    made.close()


def ask(batcher, *windows):
    """Score in a thread of its own; the list that is returned gets what came of it."""
    outcome = []

    def run():
        try:
            outcome.extend(batcher.score(list(windows)))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def waiting(batcher, count):
    """Wait until so many windows wait."""
    until = time.monotonic() + 30
    while len(batcher._waiting) != count:
        assert time.monotonic() < until
        time.sleep(0.001)


def first_and_others(batcher, work, *others):
    """Let the network be at "first" while others come; return the others' outcomes."""
    started = ask(batcher, Window("first"))
    assert work.begun.wait(30)
    asked = []
    for count, job in enumerate(others, 1):
        asked.append(ask(batcher, job))
        waiting(batcher, count)
    work.go.set()
    for thread, _ in (started, *asked):
        thread.join(30)
    return [outcome for _, outcome in asked]


def test_what_comes_meanwhile_goes_together(batcher, work):
    assert first_and_others(batcher, work, Window("a"), Window("b"), Window("c")) == [["of a"], ["of b"], ["of c"]]
    assert work.batches == [["first"], ["a", "b", "c"]]
    assert (batcher.calls, batcher.windows) == (2, 4)


def test_results_come_back_in_the_order_of_the_windows(batcher, work):
    work.go.set()
    windows = [Window("short"), Window("long", 900), Window("medium", 300)]
    assert batcher.score(windows) == ["of short", "of long", "of medium"]
    assert len(work.batches) > 1


def test_of_different_lengths_the_oldest_goes_first(batcher, work):
    long = Window("long", 900)
    first_and_others(batcher, work, Window("short"), long, Window("other"))
    assert work.batches == [["first"], ["other", "short"], ["long"]]


def test_an_error_belongs_to_its_batch(batcher, work):
    far = Window("far", 500)
    bad, far, company = first_and_others(batcher, work, Window("bad"), far, Window("company"))
    assert isinstance(bad[0], ZeroDivisionError) and isinstance(company[0], ZeroDivisionError)
    assert far == ["of far"]


def test_the_thread_outlives_an_error(batcher, work):
    work.go.set()
    with pytest.raises(ZeroDivisionError):
        batcher.score([Window("bad")])
    assert batcher.score([Window("good")]) == ["of good"]
    assert work.batches == [["bad"], ["good"]]


def test_what_has_not_begun_by_its_deadline_is_never_done(batcher, work):
    ask(batcher, Window("first"))
    assert work.begun.wait(30)
    with (
        pytest.raises(LimitError, match="not enough time to classify") as caught,
        batcher.deadline(time.monotonic() + 0.01),
    ):
        batcher.score([Window("late")])
    assert caught.value.reason == "time"
    work.go.set()
    batcher.score([Window("after")])
    assert work.batches == [["first"], ["after"]]


def test_the_deadline_ends_with_its_block(batcher, work):
    work.go.set()
    with batcher.deadline(time.monotonic() - 1):
        pass
    batcher.score([Window("a")])
    assert work.batches == [["a"]]


def test_nothing_to_do_waits_for_nobody(batcher, work):
    ask(batcher, Window("first"))
    assert work.begun.wait(30)
    assert batcher.score([]) == []


def test_after_closing_nothing_is_taken(work):
    made = DynamicBatcher(work, lambda lengths: buckets(lengths, 1000))
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.score([Window("a")])
