"""What an agent acts in: environment builders, wrappers and the state of simulators."""

import errno
import sys


class UserError(Exception):
    """Bad input; its message is one line that says what to do."""


def report_user_error(kind, error, traceback) -> None:
    """sys.excepthook: bad input, a full disk or no compiler is one line, the rest a traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print("error: the disk is full: free some space, --resume auto goes on", file=sys.stderr)
    elif "InvalidCxxCompiler" in str(error):  # torch._inductor wraps it
        print(
            "error: --compile: no C++ compiler here: install g++, or leave it out", file=sys.stderr
        )
    else:
        sys.__excepthook__(kind, error, traceback)
