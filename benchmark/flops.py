"""A child of `benchmark speed update`: time a script's updates and count their arithmetic.

flops.py SCRIPT UPDATES THREADS FLAGS... runs the script as its command line would, with its
function `update` wrapped, and prints one JSON line. The script knows nothing of it.
"""

import importlib.util
import json
import sys
import time

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZE = 1024  # of the square float32 product; 2 * SIZE**3 operations
WARM_UP = 2


def machine_rate() -> float:
    """Operations a second of one large product: the best of five."""
    a, b = torch.randn(2, SIZE, SIZE)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(times)


def main(path: str, updates: int, threads: int, flags: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("script", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["script"] = script
    spec.loader.exec_module(script)
    original, calls = script.update, 0
    found = {"flops": [], "seconds": [], "machine": []}

    def update(*args, **options):
        nonlocal calls
        calls += 1
        if calls <= WARM_UP:
            return original(*args, **options)
        if (calls - WARM_UP - 1) % 4 < 2:
            # counting takes time, so timed and counted updates take turns, by twos, since the actor
            # of SAC and TD3 learns in every second one; the attention kernel of CPUs is not in the
            # counter's table, its parts are
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                metrics = original(*args, **options)
            found["flops"].append(counter.get_total_flops())
            return metrics
        torch.set_num_threads(threads)
        found["machine"].append(machine_rate())
        start = time.perf_counter()
        metrics = original(*args, **options)
        found["seconds"].append(time.perf_counter() - start)
        if len(found["seconds"]) == updates:
            print(json.dumps(found))
            sys.exit(0)
        return metrics

    script.update = update
    script.main(tyro.cli(script.Args, args=flags))
    sys.exit(f"{path} ended before {WARM_UP + 2 * updates} updates")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
