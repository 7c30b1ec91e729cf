"""What an agent acts in: environment builders, wrappers and the state of simulators."""

import sys


class UserError(ValueError):
    """Bad input; its message is one line that says what to do."""


def report_user_error(kind, error, traceback) -> None:
    """sys.excepthook: a UserError is one line, everything else keeps its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
