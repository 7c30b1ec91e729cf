"""What surrounds a language model: log-probabilities, sampler, tasks, rewards, evaluation."""

import errno
import sys


class UserError(Exception):
    """Bad input; its message is one line that says what to do."""


class RewardError(UserError):
    """A reward that failed; every process of a run raises it, so that all can act alike."""


def check_numbers(args, names: str, least=None, above=None, most: str | None = None) -> None:
    """Raise UserError where a field is outside of its bounds; None, not given, is in any.

    names: fields of args. most: the field that they may reach. nan is outside of all bounds.
    """
    for name in names.split():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if least is not None and not value >= least:
            raise UserError(f"{flag} {value}: want {least} or more")
        if above is not None and not value > above:
            raise UserError(f"{flag} {value}: want more than {above}")
        if most is not None and not value <= getattr(args, most):
            bound = f"--{most.replace('_', '-')} {getattr(args, most)}"
            raise UserError(f"{flag} {value}: want no more than {bound}")


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
