"""Evidence of runs: one small CSV and one JSON line each, below benchmark/results/.

    PAPER/SCALE.jsonl            a line a run: state, scores, commit, versions, hardware, wall time
    PAPER/SCALE/JOB.csv          its curves: a row for each of at most 100 stretches of the run

Every file is written beside its place and renamed, so a reader never meets half of one. A file that
was damaged all the same (cut by hand, by a merge, by a full disk) is reported, and its run counts
as missing, so that `run` makes it again.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock

RESULTS = Path(__file__).with_name("results")
ROWS = 100


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{key: (steps, values)} of a metrics.csv (step, key, value); a last line cut short is left."""
    series = {}
    with path.open(newline="") as file:
        text = file.read()
    for row in csv.reader(text[: text.rfind("\n") + 1].splitlines()[1:]):
        step, key, value = row
        steps, values = series.setdefault(key, ([], []))
        steps.append(int(step))
        values.append(float(value))
    return {key: (np.array(s), np.array(v)) for key, (s, v) in series.items()}


def scores(values: np.ndarray, curve: np.ndarray) -> dict[str, float]:
    """The numbers that a claim may ask for, kept apart; `curve` is what the CSV keeps."""
    return {
        "last": float(values[-1]),
        "last_100": float(values[-100:].mean()),
        "best": float(np.nanmax(curve)),
        "count": len(values),
    }


def curves(series: dict, keys: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Means over ROWS equal stretches of the run: the last step of each, {key: (ROWS,)}.

    A stretch without a value is NaN. Runs with the same number of steps share the grid.
    """
    end = max(int(steps[-1]) for steps, _ in series.values())
    edges = np.unique(np.linspace(0, end, min(ROWS, end) + 1).astype(np.int64))[1:]
    columns = {}
    for key in keys:
        steps, values = series[key]
        place = np.searchsorted(edges, steps)  # step 0 belongs to the first stretch
        count = np.bincount(place, minlength=len(edges))
        total = np.bincount(place, values, minlength=len(edges))
        columns[key] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return edges, columns


def csv_text(edges: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", *columns])
    for i, step in enumerate(edges):
        cells = ["" if math.isnan(columns[key][i]) else f"{columns[key][i]:.6g}" for key in columns]
        if any(cells):
            writer.writerow([step, *cells])
    return out.getvalue()


def read_curve(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one column; rows without a value are left out."""
    with path.open(newline="") as file:
        rows = [(int(r["step"]), float(r[key])) for r in csv.DictReader(file) if r[key]]
    steps, values = zip(*rows, strict=True)
    return np.array(steps), np.array(values)


def table(paths: list[Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """One column of several CSVs on the union of their steps: (S,), (R, S); NaN: no value."""
    stored = [read_curve(path, key) for path in paths]
    steps = np.unique(np.concatenate([own for own, _ in stored]))
    runs = np.full((len(stored), len(steps)), np.nan)
    for line, (own, values) in zip(runs, stored, strict=True):
        line[np.searchsorted(steps, own)] = values
    return steps, runs


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def records(folder: Path, paper: str, scale: str) -> dict[str, dict]:
    """{job: record} of all runs whose line and CSV are whole; says which are not."""
    path, found = folder / paper / f"{scale}.jsonl", {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["state"] == "done":
                stored = (folder / paper / scale / f"{record['job']}.csv").read_bytes()
                if hashlib.sha256(stored).hexdigest() != record["sha256"]:
                    raise ValueError("its CSV is not the one that was written")
            found[record["job"]] = record
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(
                f"{path.name} line {number} is damaged ({type(error).__name__}: {error}): "
                f"that run counts as missing; python -m benchmark run {paper} makes it again",
                file=sys.stderr,
            )
    return found


def store(folder: Path, paper: str, scale: str, record: dict, text: str | None) -> None:
    """Write the CSV, then put the record in the place of an older one of the same job.

    Raises OSError (a full disk, say); what was there is then still there.
    """
    if text is not None:
        write(folder / paper / scale / f"{record['job']}.csv", text)
        record = record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    path = folder / paper / f"{scale}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # several `run` commands may share the work
    with FileLock(path.with_name(f".{path.name}.lock")), contextlib.redirect_stderr(io.StringIO()):
        found = records(folder, paper, scale) | {record["job"]: record}
        write(path, "".join(json.dumps(found[job]) + "\n" for job in sorted(found)))
