"""The command line: `accent-plugin COMMAND`. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 on success; 1 if `check` finds an error, or if `classify` or `evaluate` could not read some of the files;
2 for wrong arguments or unusable inputs; 130 when interrupted.
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
    """Show the log of this package only; other packages configure their own."""
    logger = logging.getLogger("accent_plugin")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """Writes to the current `sys.stderr`; a `StreamHandler` would keep the stream that it was created with."""

    def emit(self, record):
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _prepare_streams():
    """Make the standard streams accept any file name; return False if stdout is closed."""
    if sys.stderr is None:
        # Otherwise print(file=None) would write messages to stdout, among the results.
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        print("stdout is closed, so results would be lost: open it, or redirect it to /dev/null", file=sys.stderr)
        return False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return True


def _can_resume(arguments):
    """Whether running the same command again resumes it after an interruption."""
    if arguments.run_command is run_classify:
        return bool(arguments.output) and (arguments.format or format_of(arguments.output)) != "table"
    return arguments.run_command is run_prepare


def main(argv=None):
    """Run one command; return the exit code."""
    if not _prepare_streams():
        return 2
    arguments = make_parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    _log_to_stderr()
    try:
        code = arguments.run_command(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (such as `head`) has closed the pipe. Without this, Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AccentPluginError, OSError) as error:
        print("\n".join(map(printable, f"{type(error).__name__}: {error}".split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ": run the same command again to resume" * _can_resume(arguments), file=sys.stderr)
        return 130
