"""Exit codes of the recipe: errors that a user can fix are printed without a traceback."""

import errno
import functools
import os
import sys

from accent_plugin.errors import AccentPluginError
from accent_plugin.training import distributed, signals

# File system errors that a user can fix.
FOLDER_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
}

# Words in PyTorch's errors about a connection that another process has closed.
_CONNECTION_LOST = ("onnection", "roken pipe")


def returns_exit_code(function):
    """Decorate a program's main function so that it returns an exit code and prints errors that a user can fix.

    The exit code is 0 if the function returns, 2 if the user has to change something, 1 if another process has ended,
    and 128 plus the signal's number if a signal ended it. Other errors are raised.
    """

    @functools.wraps(function)
    def wrapped(*arguments):
        try:
            with signals.raise_on_signal():
                function(*arguments)
        except signals.Interrupted as error:
            _print_error(f"stopped by {error}: finished work is kept; run the same command again to resume")
            return error.exit_code
        except AccentPluginError as error:
            # Before the processes join, all processes of a machine find the same error.
            if distributed.is_local_main() or distributed.world_size() > 1:
                _print_error(f"{type(error).__name__}: {error}")
            return 2
        except (OSError, ValueError) as error:
            # logging.config wraps the system's error about its file in a ValueError.
            cause = error.__cause__ if isinstance(error, ValueError) else error
            if not isinstance(cause, OSError) or cause.errno not in FOLDER_ERRORS:
                raise
            _print_error(f"cannot write: {cause}; free some space there, or choose another output_folder")
            return 2
        except RuntimeError as error:
            # Whatever has raised this error of PyTorch has imported it.
            if "torch" in sys.modules and isinstance(error, sys.modules["torch"].cuda.OutOfMemoryError):
                _print_error(f"the GPU's memory is full; lower batch_seconds: {error}")
                return 2
            if not (distributed.is_launched() and any(words in str(error) for words in _CONNECTION_LOST)):
                raise
            _print_error(f"another process has ended, see its error: {error}".splitlines()[0])
            return 1
        return 0

    return wrapped


def _print_error(text):
    rank = f"[process {os.environ['RANK']}] " if distributed.is_launched() else ""
    print(f"{rank}{text}", file=sys.stderr, flush=True)
