"""How the recipe ends: exit codes, and what is printed in place of a traceback."""

import errno
import os
import signal

import pytest

from accent_plugin.errors import ConfigError
from accent_plugin.experiment.exit_codes import returns_exit_code
from accent_plugin.training import signals


def raising(error):
    @returns_exit_code
    def main(argv):
        raise error

    return main


def caused_by(cause):
    error = ValueError("Unable to configure handler 'file_handler'")
    error.__cause__ = cause
    return error


def test_a_function_that_returns_ends_with_0_and_is_given_its_arguments(capsys):
    seen = []
    assert returns_exit_code(seen.append)(["a", "b"]) == 0
    assert seen == [["a", "b"]] and capsys.readouterr().err == ""


def test_a_users_error_is_printed_with_its_kind(capsys):
    assert raising(ConfigError("pooling is 'stats'"))([]) == 2
    assert capsys.readouterr().err == "ConfigError: pooling is 'stats'\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_as_a_shell_would_say(capsys, number):
    @returns_exit_code
    def main(argv):
        os.kill(os.getpid(), number)
        signal.pause()

    before = signal.getsignal(number)
    assert main([]) == 128 + number
    assert capsys.readouterr().err == (
        f"stopped by {number.name}: finished work is kept; run the same command again to resume\n"
    )
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("wrap", [lambda error: error, caused_by], ids=["itself", "as the cause"])
@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ENOENT]
)
def test_an_error_of_the_file_system_says_what_to_do(capsys, number, wrap):
    assert raising(wrap(OSError(number, os.strerror(number), "/x/out")))([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"cannot write: [Errno {number}] ") and "'/x/out'; free some space there" in said


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ECONNREFUSED, "refused"), caused_by(KeyError("x")), ValueError("x"), RuntimeError("Broken pipe")],
    ids=repr,
)
def test_any_other_error_is_raised(error):
    with pytest.raises(type(error)) as caught:
        raising(error)([])
    assert caught.value is error


@pytest.fixture
def second_of_two(monkeypatch):
    """The second process that torchrun has started on a machine, before it has joined the first."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("said", ["Connection closed by peer [127.0.0.1]\nat line 3", "Broken pipe"])
def test_a_lost_connection_points_to_the_other_process(second_of_two, capsys, said):
    assert raising(RuntimeError(said))([]) == 1
    first = said.splitlines()[0]
    assert capsys.readouterr().err == f"[process 1] another process has ended, see its error: {first}\n"


def test_an_error_that_all_processes_of_a_machine_find_is_printed_by_the_first(second_of_two, capsys):
    assert raising(ConfigError("x"))([]) == 2 and capsys.readouterr().err == ""
    assert raising(signals.Interrupted(signal.SIGTERM))([]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("[process 1] stopped by SIGTERM")
