"""python -m benchmark COMMAND ...: one line a command; each module parses its own flags."""

import importlib
import sys

from rlhf import UserError

# command: module, imported when it is asked for, as some load torch and transformers
COMMANDS = {
    "compare": "compare",
    "gpu-check": "gpu_check",
    "links": "links",
    "list": "listing",
    "report": "report",
    "run": "run",
    "speed": "speed",
    "status": "status",
    "sync": "sync",
}


def main() -> None:
    name, flags = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if name not in COMMANDS:
        print(f"usage: python -m benchmark {{{','.join(COMMANDS)}}} ... [--help]")
        sys.exit(0 if name in ("-h", "--help") else 2)
    try:
        importlib.import_module(f"benchmark.{COMMANDS[name]}").main(flags)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
