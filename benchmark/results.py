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
RETURN = "charts/episodic_return"  # by which a teacher is chosen


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


def last_100(path: Path, key: str) -> float:
    """Mean of the last 100 values of `key` in a metrics.csv. Raises KeyError without that key."""
    _, values = read_metrics(path)[key]
    return scores(values, values)["last_100"]


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
    end = max(int(steps.max()) for steps, _ in series.values())
    edges = np.unique(np.linspace(0, end, min(ROWS, end) + 1).astype(np.int64))
    edges = edges[min(1, end) :]  # a run that logs at step 0 only has that stretch
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
        cells = ["" if math.isnan(columns[key][i]) else f"{columns[key][i]:.9g}" for key in columns]
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
    """One column of several CSVs on the union of their steps: (S,), (R, S).

    A run that has no value at a step has that of its step before; NaN before its first one.
    """
    stored = [read_curve(path, key) for path in paths]
    steps = np.unique(np.concatenate([own for own, _ in stored]))
    runs = np.full((len(stored), len(steps)), np.nan)
    for line, (own, values) in zip(runs, stored, strict=True):
        known = steps >= own[0]
        line[known] = values[np.searchsorted(own, steps[known], side="right") - 1]
    return steps, runs


def write(texts: dict[Path, str]) -> None:
    """{path: text}, each whole; all, or none where the disk is full. Raises OSError with a path."""
    written = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in texts}
    try:
        for path, new in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        for path, new in written.items():
            new.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from error
    finally:
        for new in written.values():
            with contextlib.suppress(OSError):  # its folder could not be made
                new.unlink()


def records(folder: Path, paper: str, scale: str, tell: bool = True) -> dict[str, dict]:
    """{job: record} of all runs whose line and CSV are whole; says which are not."""
    path, found = folder / paper / f"{scale}.jsonl", {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["state"] == "done":
                stored = (folder / paper / scale / f"{record['job']}.csv").read_bytes()
                if hashlib.sha256(stored).hexdigest() != record["sha256"]:
                    raise ValueError("its CSV is not the one that was written")
            found[record["job"]] = record
        except (ValueError, KeyError, TypeError, OSError) as error:
            if tell:
                print(
                    f"{path} line {number} is damaged ({type(error).__name__}: {error}): "
                    "that run counts as missing, and the command that made it makes it again",
                    file=sys.stderr,
                )
    return found


def store(folder: Path, paper: str, scale: str, record: dict, text: str | None) -> None:
    """Write the CSV, then put the record in the place of an older one of the same job.

    Raises OSError (a full disk, say); what was there is then still there.
    """
    texts = {}
    if text is not None:
        texts[folder / paper / scale / f"{record['job']}.csv"] = text
        record = record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    path = folder / paper / f"{scale}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # several `run` commands may share the work
    with FileLock(path.with_name(f".{path.name}.lock")):
        found = records(folder, paper, scale, tell=False) | {record["job"]: record}
        lines = "".join(json.dumps(found[job]) + "\n" for job in sorted(found))
        write(texts | {path: lines})
