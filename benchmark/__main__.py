"""python -m benchmark COMMAND ...: one line a command; each module parses its own flags."""

import sys

from benchmark import compare, gpu_check, links, listing, report, run, speed, status, sync
from rlhf import UserError

COMMANDS = {
    "compare": compare.main,
    "gpu-check": gpu_check.main,
    "links": links.main,
    "list": listing.main,
    "report": report.main,
    "run": run.main,
    "speed": speed.main,
    "status": status.main,
    "sync": sync.main,
}


def main() -> None:
    name, flags = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if name not in COMMANDS:
        print(f"usage: python -m benchmark {{{','.join(COMMANDS)}}} ... [--help]")
        sys.exit(0 if name in ("-h", "--help") else 2)
    try:
        COMMANDS[name](flags)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
