"""What an agent acts in: environment builders, wrappers and the state of simulators."""

import errno
import shutil
import sys
from pathlib import Path


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


def check_room(run_dir: Path, rows: int, row_bytes: int) -> None:
    """Raises UserError where a replay buffer, which grows, would not fit into three checkpoints."""
    needed, free = 3 * rows * row_bytes / 1e6, shutil.disk_usage(run_dir).free / 1e6
    if free < needed:
        text = f"{free:.0f} MB free, {needed:.0f} MB to come for the replay buffer"
        raise UserError(f"--run-dir {run_dir}: {text}; choose another or a smaller --buffer-size")
