"""The command line: `accent-plugin VERB`; results on stdout, notes on stderr.

Exit code 0; 1 where `check` finds something wrong, or where `classify` or `evaluate` had to leave out a file, which is
named; 2 for a wrong command or files that cannot be used; 130 when interrupted.
"""

import io
import logging
import os
import sys

from accent_plugin.cli.data import run_prepare
from accent_plugin.cli.models import format_of, run_classify
from accent_plugin.cli.parser import make_parser
from accent_plugin.errors import AccentPluginError
from accent_plugin.inference.records import printable


def _log_to_stderr():
    """Show this package's notes only: others speak for themselves."""
    logger = logging.getLogger("accent_plugin")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """To what is stderr at the time: a handler with a stream of its own would keep one that was since replaced."""

    def emit(self, record):
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _prepare_streams():
    """Make the standard streams fit for any name; False where there is no stdout."""
    if sys.stderr is None:
        # Or else print would write notes among the results.
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        print("stdout is closed: results would be lost; open it, or use /dev/null", file=sys.stderr)
        return False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return True


def _goes_on(arguments):
    """Whether the same command takes up what an interrupted one has left."""
    if arguments.do is run_classify:
        return bool(arguments.output) and (arguments.format or format_of(arguments.output)) != "table"
    return arguments.do is run_prepare


def main(argv=None):
    """Run one verb; return the exit code."""
    if not _prepare_streams():
        return 2
    arguments = make_parser().parse_args(argv)
    arguments.typed = sys.argv[1:] if argv is None else list(argv)
    _log_to_stderr()
    try:
        code = arguments.do(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AccentPluginError, OSError) as error:
        print("\n".join(map(printable, f"{type(error).__name__}: {error}".split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ": the same command goes on from here" * _goes_on(arguments), file=sys.stderr)
        return 130
