"""What is done, running, failed, cut off and missing, and how long the rest will take.

python -m benchmark status
python -m benchmark status ppo --scale paper --workers 8
"""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmark import jobs, papers, results
from benchmark.papers import Scale
from benchmark.results import records
from benchmark.run import plan

STATES = ("done", "running", "failed", "cut off", "missing")


def state(job: jobs.Job, stored: dict[str, dict]) -> str:
    if job.finished(stored):
        return "done"
    lock = job.run_dir / "lock"
    if lock.exists():
        with lock.open("r+") as file:  # to be locked on a network file system
            if not jobs.try_lock(file):
                return "running"
    if job.failed(stored):
        return "failed"
    return "cut off" if lock.exists() else "missing"


def seconds_left(job: jobs.Job, records: list[dict]) -> float | None:
    """Of one job on one thread, by the wall times of finished jobs like it; None: none is."""
    done = [record for record in records if record["state"] == "done" and record["run"] == job.run]
    times = [record["wall_seconds"] for record in done if record["env"] == job.env]
    times = times or [record["wall_seconds"] for record in done]
    if not times:
        return None
    step, total = jobs.progress(job)
    return sum(times) / len(times) * (1 - (step / total if total else 0))


def status(
    paper: Annotated[str | None, tyro.conf.Positional] = None,
    scale: Scale | None = None,
    workers: int | None = None,
    results: Path = results.RESULTS,
) -> None:
    """Show how far the runs of one paper or of all have come.

    Args:
        paper: name of a file in benchmark/papers/, without .toml; all of them if not given
        scale: one scale; all of them if not given
        workers: runs at a time, for the estimate; one for each core if not given
        results: folder of the results
    """
    workers = jobs.at_a_time(workers)
    console = Console(highlight=False)
    total, unknown = 0.0, 0
    for name in [paper] if paper else papers.names():
        scales = papers.load(name).scales
        # a scale that one of all papers lacks is no error
        wanted = [scale] if scale and paper else [s for s in scales if scale in (None, s)]
        for scale_name in wanted:
            stored = records(results, name, scale_name)
            groups = {}
            for job in plan(name, scale_name, folder=results):
                groups.setdefault((job.run, job.env), []).append(job)
            table = Table("run", *STATES, "hours", box=None, pad_edge=False)
            for (run, env), group in groups.items():
                states = [state(job, stored) for job in group]
                waiting = [job for job, s in zip(group, states, strict=True) if s != "done"]
                left = [seconds_left(job, list(stored.values())) for job in waiting]
                known = [seconds for seconds in left if seconds is not None]
                total, unknown = total + sum(known), unknown + len(left) - len(known)
                hours = f"{sum(known) / 3600:.1f}" if len(known) == len(left) else "?"
                counts = [str(states.count(s) or "") for s in STATES]
                table.add_row(f"{run} {env}".strip(), *counts, hours)
            console.print(f"[bold]{name}, {scale_name}[/]: {scales[scale_name].about}")
            console.print(table, "")
    more = f", and {unknown} runs of which none like them has finished" if unknown else ""
    console.print(f"about {total / 3600 / workers:.1f} hours with {workers} at a time{more}")


def main(flags: list[str]) -> None:
    tyro.cli(status, prog="python -m benchmark status", args=flags)
