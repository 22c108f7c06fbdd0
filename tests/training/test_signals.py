"""Signals: deferred during a step, raised at once elsewhere, and handlers restored afterwards."""

import os
import signal
import threading

import pytest

from accent_plugin.training import signals
from accent_plugin.training.signals import SIGNALS, Interrupted

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals to a process of its own")


def mine(number, frame):
    """A handler that was set before."""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.signal(number, mine) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def unchanged():
    return all(signal.getsignal(number) is mine for number in SIGNALS)


@pytest.mark.parametrize("number", SIGNALS)
def test_raise_on_signal_raises_at_once(number):
    with pytest.raises(Interrupted) as caught, signals.raise_on_signal():
        signal.raise_signal(number)
        pytest.fail("it goes on after the signal")
    assert caught.value.exit_code == 128 + number and str(caught.value) == signal.Signals(number).name
    assert unchanged()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_deferred_signal_is_remembered_and_logged(number, caplog):
    with signals.defer_signals() as pending:
        assert not pending
        signal.raise_signal(number)
        assert pending and pending.number == number
    assert signal.Signals(number).name in caplog.text and unchanged()


def test_the_second_deferred_signal_raises():
    with pytest.raises(Interrupted) as caught, signals.defer_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it goes on after the second signal")
    assert caught.value.signal == signal.SIGINT and unchanged()


def test_under_torchrun_the_second_signal_is_ignored(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with signals.defer_signals() as pending:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert pending.number == signal.SIGTERM


def test_defer_signals_inside_raise_on_signal_takes_precedence():
    with pytest.raises(Interrupted), signals.raise_on_signal():
        with signals.defer_signals() as pending:
            signal.raise_signal(signal.SIGTERM)
        assert pending
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the outer handlers have not come back")
    assert unchanged()


def test_except_exception_does_not_catch_an_interruption():
    with pytest.raises(Interrupted):
        try:
            raise Interrupted(signal.SIGTERM)
        except Exception:
            pytest.fail("an Exception was caught")


@pytest.mark.parametrize("manager", [signals.raise_on_signal, signals.defer_signals])
def test_handlers_are_restored_after_an_error(manager):
    with pytest.raises(ZeroDivisionError), manager():
        raise ZeroDivisionError
    assert unchanged()


@pytest.mark.parametrize("manager", [signals.raise_on_signal, signals.defer_signals])
def test_other_threads_change_no_handlers(manager):
    found = []

    def work():
        with manager():
            found.append(unchanged())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True] and unchanged()


def test_ignore_signals_ignores_all_signals():
    signals.ignore_signals()
    for number in SIGNALS:
        signal.raise_signal(number)
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS)
