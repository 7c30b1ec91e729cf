"""Two scripts, or one script with two sets of flags, on the same environments and seeds.

    python -m benchmark compare algos/ppo.py algos/my_ppo.py --env-id CartPole-v1 Acrobot-v1
    python -m benchmark compare algos/ppo.py algos/ppo.py --args-b="--gamma 0.9" --env-id Acrobot-v1

Both run side by side, the seeds of one between those of the other. The runs, their curves, one PNG
and one Markdown table are left in --out; the same command goes on with what was cut off.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

from benchmark import jobs, plots, results, stats
from benchmark.report import number
from rlhf import UserError


def compare(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    env_id: tuple[str, ...] = (),
    seeds: int = 3,
    workers: int | None = None,
    args: str = "",
    args_a: str = "",
    args_b: str = "",
    metric: str = "charts/episodic_return",
    score: Literal["last", "last_100", "best"] = "last_100",
    processes: int = 1,
    out: Path | None = None,
) -> None:
    """Compare script B with script A: curves, IQM, probability of improvement, time per step.

    Args:
        a: path of a script
        b: path of another one, or the same with other --args-b
        env_id: environments; none for a script without --env-id
        seeds: seeds 1 to N of both
        workers: runs at a time; one for each core if not given
        args: flags of both: --args="--total-timesteps 100000"
        args_a: flags of A only
        args_b: flags of B only
        metric: key of metrics.csv to compare; larger is better
        score: the last value, the mean of the last 100 values, or the best of the curve
        processes: of each run, started by torchrun if more than one
        out: folder of the results; below runs/compare/ if not given
    """
    for path in (a, b):
        if not path.is_file():
            raise UserError(f"there is no script {path}")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1")
    labels = ("A", "B") if a.stem == b.stem else (a.stem, b.stem)
    asked = hashlib.sha256(json.dumps([args, args_a, args_b]).encode()).hexdigest()[:6]
    out = out or jobs.ROOT / "runs" / "compare" / f"{a.stem}__{b.stem}__{asked}"
    out = out.resolve()
    sides = dict(zip(labels, ((a, args_a), (b, args_b)), strict=True))
    planned = {}
    for seed in range(1, seeds + 1):
        for env in env_id or [""]:
            for label, (script, own) in sides.items():
                flags = [*(["--env-id", env] if env else []), *shlex.split(f"{args} {own}")]
                # a script that was changed since is another run
                content = [script.read_text(), flags, seed, processes]
                digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
                name = f"{label}__{env or 'builtin'}__{seed}__{digest}"
                planned[label, env, seed] = jobs.Job(
                    paper=out.name,
                    scale="runs",
                    run=label,
                    env=env,
                    seed=seed,
                    script=jobs.relative(script),
                    flags=(*flags, "--seed", str(seed)),
                    metrics=(metric,),
                    run_dir=out / "run_dirs" / name,
                    results=out.parent,
                    processes=processes,
                )
    workers = jobs.at_a_time(workers, processes)
    console = Console(highlight=False)
    stored = results.records(out.parent, out.name, "runs")
    missing = [job for job in planned.values() if not job.finished(stored)]
    console.print(f"{len(planned)} runs, {len(planned) - len(missing)} of them done")
    states = jobs.launch(missing, workers, console).state.values() if missing else []
    if any(state != "done" for state in states):
        console.print("not all runs are done: the same command goes on")
        sys.exit(1)

    records = results.records(out.parent, out.name, "runs")
    found = {key: records[job.name] for key, job in planned.items()}
    panels, lines = [], table_head(labels, metric, score, workers)
    every = {label: [] for label in labels}
    for env in env_id or [""]:
        drawn = {}
        for label in labels:
            group = [planned[label, env, seed] for seed in range(1, seeds + 1)]
            stored = [out / "runs" / f"{job.name}.csv" for job in group]
            drawn[label] = results.table(stored, metric)
            values = [found[label, env, job.seed]["scores"][metric][score] for job in group]
            every[label].append(np.array(values))
        panels.append(plots.Panel(env or "built-in task", "steps", metric, drawn))
        times = [seconds_per_step(found, label, env, seeds) for label in labels]
        lines.append(row(env or "built-in task", [every[label][-1:] for label in labels], times))
    if len(env_id) > 1:  # scores of different tasks have different scales: no IQM over them
        better = stats.probability_of_improvement(every[labels[1]], every[labels[0]])
        lines.append(f"| all | | | | {interval(better)} | |")
    plots.curves(panels).save(out / "compare.png")
    lines += ["", *(f"- {x}: `{words(*sides[x], args)}`" for x in labels)]
    text = "\n".join(lines) + "\n"
    results.write({out / "compare.md": text})
    print(text)
    print(f"picture: {jobs.relative(out / 'compare.png')}")
    print(f"table: {jobs.relative(out / 'compare.md')}")


def words(script: Path, own: str, args: str) -> str:
    """What a side is, as one would start it, but for task and seed."""
    return " ".join(f"python {jobs.relative(script)} {args} {own}".split())


def seconds_per_step(found: dict, label: str, env: str, seeds: int) -> float:
    group = [found[label, env, seed] for seed in range(1, seeds + 1)]
    return sum(r["wall_seconds"] for r in group) / sum(r["steps"] for r in group)


def table_head(labels: tuple[str, str], metric: str, score: str, workers: int) -> list[str]:
    a, b = labels
    words = {"last": "the last value", "best": "the best value of the curve"}
    what = words.get(score, "the mean of the last 100 values")
    return [
        f"{b} against {a}: {what} of `{metric}` of each run; IQM over runs with its 95 % interval",
        "(stratified bootstrap, 10,000 resamples). P: probability that a run of "
        f"{b} beats one of {a}.",
        f"Time per step includes start and evaluation, with {workers} runs at a time.",
        "",
        f"| task | runs | IQM {a} | IQM {b} | P | time per step, {b} / {a} |",
        "|---|---|---|---|---|---|",
    ]


def row(task: str, sides: list[list[np.ndarray]], times: list[float]) -> str:
    cells = [interval(stats.score_interval(side, "iqm"), number) for side in sides]
    cells.append(interval(stats.probability_of_improvement(sides[1], sides[0])))
    runs = " + ".join(str(sum(map(len, side))) for side in sides)
    ratio = f"{times[1] / times[0]:.2f} ({times[1] * 1e6:.0f} / {times[0] * 1e6:.0f} us)"
    return f"| {task} | {runs} | " + " | ".join([*cells, ratio]) + " |"


def interval(found: stats.Interval, put: Callable[[float], str] = "{:.2f}".format) -> str:
    return f"{put(found.value)} [{put(found.low)}, {put(found.high)}]"


def main(flags: list[str]) -> None:
    tyro.cli(compare, prog="python -m benchmark compare", args=flags)
