"""Run what benchmark/papers/PAPER.toml asks for, and store the evidence in benchmark/results/.

    python -m benchmark run ppo --scale smoke
    python -m benchmark run ppo --scale paper --workers 8 --only hopper
    python -m benchmark run ppo --scale paper --launcher slurm --slurm-partition long

The same command goes on with what was cut off and leaves alone what is done. Two of them at once
share the work.
"""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from benchmark import jobs, papers, results, teachers
from benchmark.papers import Scale
from benchmark.results import records
from rlhf import UserError

RUNS = jobs.ROOT / "runs" / "benchmark"


def plan(
    name: str,
    scale: Scale,
    seeds: int | None = None,
    only: str | None = None,
    folder: Path = results.RESULTS,
) -> list[jobs.Job]:
    """All jobs of a paper at a scale, the first seed of every environment before the second."""
    paper = papers.load(name)
    if scale not in paper.scales:
        raise UserError(f"{name} has no scale {scale!r}; it has {', '.join(paper.scales)}")
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1")
    wanted = None
    if only is not None:
        try:
            claim = paper.claim(only)
        except ValueError as error:
            raise UserError(f"--only: {error}") from error
        wanted = set(paper.claim_runs(claim))
    planned = []
    for seed in range(1, (seeds or paper.scales[scale].seeds) + 1):
        for run in paper.runs:
            flags = run.flags(scale)
            taken = flags is not None and seed <= (seeds or paper.seeds(run, scale))
            for env in (run.envs or [""]) if taken else ():
                if wanted is None or (run.name, env) in wanted:
                    planned.append(job(name, scale, run, env, seed, flags, folder))
    if not planned:
        raise UserError(f"nothing to run: {only or name} has no run at scale {scale}")
    return planned


def job(paper, scale, run: papers.Run, env: str, seed: int, flags: list[str], folder) -> jobs.Job:
    flags = [*(["--env-id", env] if env else []), *flags, "--seed", str(seed)]
    teacher = teachers.link(run.teacher, env, scale, RUNS) if run.teacher else None
    if teacher:
        flags += ["--teacher", str(teacher.relative_to(jobs.ROOT))]
    # other flags are another run: its checkpoints would refuse them
    digest = hashlib.sha256(json.dumps([run.script, run.processes, flags]).encode()).hexdigest()
    return jobs.Job(
        paper=paper,
        scale=scale,
        run=run.name,
        env=env,
        seed=seed,
        script=f"algos/{run.script}.py",
        flags=tuple(flags),
        metrics=tuple(run.keys),
        run_dir=RUNS / paper / scale / f"{run.name}__{env or 'builtin'}__{seed}__{digest[:8]}",
        results=folder,
        processes=run.processes,
        teacher=teacher,
    )


def prepare(planned: list[jobs.Job], paper: papers.Paper, workers: int, console: Console) -> None:
    """What some runs need once before they start."""
    wanted = {job.run: paper.run(job.run) for job in planned}
    for words in dict.fromkeys(run.prepare for run in wanted.values() if run.prepare):
        command = [sys.executable, "-m", *shlex.split(words)]
        if subprocess.run(command, cwd=jobs.ROOT).returncode:
            raise UserError(f"python -m {words} failed, see above")
    pupils = {job.teacher: job for job in planned if job.teacher}
    for path, pupil in pupils.items():
        name, run_name, scale = teachers.source(wanted[pupil.run].teacher, pupil.scale)
        candidates = plan(name, scale, folder=pupil.results)
        candidates = [j for j in candidates if (j.run, j.env) == (run_name, pupil.env)]
        teachers.provide(path, candidates, workers, console)


def run(
    paper: Annotated[str, tyro.conf.Positional],
    scale: Scale = "laptop",
    seeds: int | None = None,
    workers: int | None = None,
    only: str | None = None,
    dry_run: bool = False,
    launcher: Literal["processes", "slurm", "local"] = "processes",
    slurm_partition: str | None = None,
    slurm_hours: float = 24.0,
    gpus: int = 0,
    results: Path = results.RESULTS,
) -> None:
    """Run a paper's experiments, several at a time.

    Args:
        paper: name of a file in benchmark/papers/, without .toml
        scale: smoke takes seconds, laptop an hour or two, paper what the paper took
        seeds: seeds 1 to N; what the scale says if not given
        workers: runs at a time; one for each core if not given
        only: id of a claim: just the runs that test it
        dry_run: print the commands and what is done already
        launcher: processes of this machine; Slurm by submitit; or submitit's local executor
            (all runs at once, to try that path)
        slurm_partition: partition to submit to
        slurm_hours: time limit of a job; one that reaches it is continued by the same command
        gpus: GPUs for each Slurm job
        results: folder of the results
    """
    planned = plan(paper, scale, seeds, only, results)
    workers = jobs.at_a_time(workers, max(job.processes for job in planned))
    stored = records(results, paper, scale)
    finished = [job.finished(stored) for job in planned]
    missing = [job for job, done in zip(planned, finished, strict=True) if not done]
    if dry_run:
        for job, done in zip(planned, finished, strict=True):
            print(f"{'done   ' if done else 'missing'}  {shlex.join(job.command())}")
        return
    console = Console(highlight=False)
    console.print(f"{paper}, {scale}: {len(planned)} runs, {sum(finished)} of them done")
    if not missing:
        return
    try:  # not after hours of runs
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {results}: {error.strerror}") from error
    prepare(missing, papers.load(paper), workers, console)
    if launcher == "processes":
        watch = jobs.launch(missing, workers, console)
    else:
        options = {"name": f"folio-{paper}", "timeout_min": round(slurm_hours * 60)}
        options["cpus_per_task"] = max(job.processes for job in missing)
        options["gpus_per_node"] = gpus
        if launcher == "slurm":
            options["slurm_array_parallelism"] = workers
            if slurm_partition:
                options["slurm_partition"] = slurm_partition
        folder = RUNS / paper / scale / "submitit"
        watch = jobs.submit(missing, launcher, folder, options, console)
    states = list(watch.state.values())
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts.get("elsewhere"):
        console.print(f"{counts['elsewhere']} runs are in the hands of another command")
    if any(state != "done" for state in states if state != "elsewhere"):
        sys.exit(1)


def main(flags: list[str]) -> None:
    tyro.cli(run, prog="python -m benchmark run", args=flags)
