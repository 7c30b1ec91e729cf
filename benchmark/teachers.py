"""The teacher of runs that learn from another run: its best seed, whose folder they get by a link.

A run with `teacher = "td3 mujoco"` gets --teacher runs/benchmark/teachers/td3-mujoco-ENV-SCALE.
Best is the mean return of the last 100 training episodes. Runs of the teacher that are missing are
made first; they are ordinary runs of their own paper, at the same scale or, where they have no part
in that, at the next larger one.
"""

import functools
import math
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from benchmark import jobs, papers, results
from benchmark.papers import Scale
from benchmark.results import RETURN
from rlhf import UserError


@functools.cache  # asked for each run of a plan, and it reads a file
def source(teacher: str, scale: Scale) -> tuple[str, str, Scale]:
    """Paper, run and scale of the runs among which the teacher is."""
    name, run_name = teacher.split()
    try:
        run = papers.load(name).run(run_name)
    except ValueError as error:
        raise UserError(f"teacher {teacher!r}: {error}") from error
    if RETURN not in run.keys:
        raise UserError(f"teacher {teacher!r}: that run does not keep {RETURN}")
    for larger in papers.SCALES[papers.SCALES.index(scale) :]:
        if run.flags(larger) is not None:
            return name, run_name, larger
    raise UserError(f"teacher {teacher!r}: that run has no scale {scale} or larger")


def link(teacher: str, env: str, scale: Scale, runs: Path) -> Path:
    """Where --teacher points, whether it exists or not."""
    return runs / "teachers" / "-".join([*source(teacher, scale)[:2], env, scale])


def best(candidates: list[jobs.Job]) -> jobs.Job:
    """The one with the highest score; the lower seed where two are equal."""
    stored = candidates[0].stored()
    missing = [job.name for job in candidates if not job.finished(stored)]
    if missing:
        raise UserError(
            f"the teacher is one of {len(candidates)} runs, of which {missing[0]} failed"
        )
    return max(candidates, key=lambda job: stored[job.name]["scores"][RETURN]["last_100"])


def provide(path: Path, candidates: list[jobs.Job], workers: int, console: Console) -> None:
    """Run what is missing of the candidates and let `path` lead to the best one's folder.

    Raises UserError where a candidate fails.
    """
    stored = candidates[0].stored()
    if missing := [job for job in candidates if not job.finished(stored)]:
        console.print(f"{path.name}: {len(missing)} of {len(candidates)} runs of the teacher to go")
        jobs.launch(missing, workers, console)
    teacher = best(candidates)
    record = teacher.stored()[teacher.name]
    if jobs.progress(teacher)[0] < record["steps"]:  # the results came from another machine
        console.print(f"{path.name}: making {teacher.name} again")
        make_again(teacher)
        known = record["scores"][RETURN]["last_100"]
        made = results.last_100(teacher.run_dir / "metrics.csv", RETURN)
        if not math.isclose(made, known, rel_tol=1e-6):  # another machine, library or commit
            console.print(f"{path.name}: returns {made:.4g} here, {known:.4g} in the results")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(teacher.run_dir.resolve(), target_is_directory=True)
    console.print(f"{path.name}: {teacher.name}")


def make_again(teacher: jobs.Job) -> None:
    """Run, or continue, one whose results are kept, for its checkpoints. Raises UserError."""
    teacher.run_dir.mkdir(parents=True, exist_ok=True)
    with (teacher.run_dir / "lock").open("w") as lock:
        if not jobs.try_lock(lock):
            raise UserError(f"another command makes {teacher.name} just now; try again later")
        command = teacher.command(sys.executable)
        if subprocess.run(command, cwd=jobs.ROOT, pass_fds=[lock.fileno()]).returncode:
            raise UserError(f"{shlex.join(teacher.command())} failed, see above")
