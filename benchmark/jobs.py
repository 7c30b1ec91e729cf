"""Run scripts side by side: a process a run, one thread each, resumable at any point.

A job owns a run directory. Whoever runs it holds the lock file in it, and so does the script that
it started, so that two commands can share the work and nothing is run twice; a lock ends with the
processes that hold it, however they end.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from benchmark import results
from rlhf import UserError

ROOT = Path(__file__).resolve().parents[1]
LOG_TAIL = 15  # lines of a failed run's log that its record keeps
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    paper: str
    scale: str
    run: str
    env: str
    """"" for a script without --env-id"""
    seed: int
    script: str
    """path, from the root of the project where it lies there"""
    flags: tuple[str, ...]
    metrics: tuple[str, ...]
    """keys of metrics.csv that the run must leave"""
    run_dir: Path
    results: Path
    processes: int = 1
    teacher: Path | None = None
    """the link to its run directory that --teacher names"""

    @property
    def name(self) -> str:
        return f"{self.run}__{self.env or 'builtin'}__{self.seed}"

    def command(self, python: str = "python") -> list[str]:
        """The command line; --resume auto starts a new run where there is none."""
        launcher = [python]
        if self.processes > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            launcher += [*words, str(self.processes)]
        folder = relative(self.run_dir)
        return [*launcher, self.script, *self.flags, "--run-dir", folder, "--resume", "auto"]

    def stored(self) -> dict[str, dict]:
        return results.records(self.results, self.paper, self.scale, tell=False)

    def finished(self, stored: dict[str, dict]) -> bool:
        """Whether `stored` holds this run, made with these flags."""
        record = stored.get(self.name, {"state": "missing"})
        # a metric that was added to the paper's file since is still to be read
        whole = record["state"] == "done" and record["scores"].keys() >= set(self.metrics)
        return whole and record["command"] == shlex.join(self.command())

    def digest(self) -> str:
        """Of the script, as it is now."""
        return hashlib.sha256((ROOT / self.script).read_bytes()).hexdigest()[:16]

    def changed(self, stored: dict[str, dict]) -> bool:
        """Whether `stored` holds this run, made with another version of the script."""
        record = stored.get(self.name, {"state": "missing"})
        return record["state"] == "done" and record["script_sha256"] != self.digest()

    def failed(self, stored: dict[str, dict]) -> bool:
        """Whether it failed with these flags; other flags are another run."""
        record = stored.get(self.name, {"state": "missing"})
        return record["state"] == "failed" and record["command"] == shlex.join(self.command())


def relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def try_lock(lock) -> bool:
    """Take the lock of this open file, for as long as it is open; False: another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Attempts:
    """What each start of a job ran and took, kept in its run directory: wall times add up, and
    code that changes during a run is not taken for what ran."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "attempts.json"
        try:
            self.list = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.list = []

    def start(self, job: Job) -> None:
        self.started = time.monotonic()
        attempt = {"started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "seconds": 0.0}
        attempt |= {"script_sha256": job.digest(), "code_is_dirty": code_is_dirty()}
        self.list.append(attempt)

    def save(self) -> None:
        self.list[-1]["seconds"] = round(time.monotonic() - self.started, 1)
        results.write({self.path: json.dumps(self.list, indent=1)})


# RUN ONE =========================================================================================


def run_job(
    job: Job,
    started: Callable[[subprocess.Popen], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> str:
    """Run a job to its end and store its result; `started` gets the process, and `stopping` says
    whether it was told to stop.

    Returns "done", "failed", "stopped" (by a signal: to be continued) or "elsewhere" (another
    command is at it). Raises UserError where the result cannot be written.
    """
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (job.run_dir / "lock").open("w")
    except OSError as error:
        raise UserError(f"{job.run_dir}: {error.strerror}") from error
    with lock:
        if not try_lock(lock):
            time.sleep(0.5)  # `status` holds it for a moment
            if not try_lock(lock):
                return "elsewhere"
        if job.finished(job.stored()):  # by another command, since this one looked
            return "done"
        try:
            return run_locked(job, lock.fileno(), started, stopping)
        except OSError as error:
            raise UserError(
                f"{error.strerror or error}; the run is kept in {relative(job.run_dir)}, "
                "the same command goes on"
            ) from error


def run_locked(job: Job, lock: int, started: Callable, stopping: Callable[[], bool]) -> str:
    attempts = Attempts(job.run_dir)
    attempts.start(job)
    attempts.save()
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {"PYTHONUNBUFFERED": "1"}
    with (job.run_dir / "log.txt").open("a") as log:
        log.write(f"$ {shlex.join(job.command())}\n")
        log.flush()
        process = subprocess.Popen(
            job.command(sys.executable),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which tells the runs
        )
    started(process)
    while process.poll() is None:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):  # a disk that is full now may have room at the end
                attempts.save()
    attempts.save()
    code = process.returncode
    # torchrun makes 1 of every code of its ranks
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM) or (code and stopping()):
        return "stopped"
    record, text = harvest(job, code, attempts.list)
    old = job.stored().get(job.name, {})
    before = old.get("failed_before", 0) + (job.failed({job.name: old}) if old else 0)
    record |= {"failed_before": before} if before else {}
    results.store(job.results, job.paper, job.scale, record, text)
    return record["state"]


def harvest(job: Job, code: int, attempts: list[dict]) -> tuple[dict, str | None]:
    """The record of an ended run, and its CSV where it ended well."""
    record = {
        "job": job.name,
        "run": job.run,
        "env": job.env,
        "seed": job.seed,
        "state": "failed",
        "exit_code": code,
        "command": shlex.join(job.command()),
        "wall_seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "attempts": len(attempts),
        "started": attempts[0]["started"],
        "processes": job.processes,
        "threads": 1,
        "script_sha256": attempts[-1]["script_sha256"],
        "machine": machine(),
    }
    if job.teacher:  # `provide` has read it
        score = results.last_100(job.teacher / "metrics.csv", results.RETURN)
        record["teacher"] = job.teacher.resolve().name.rpartition("__")[0]
        record["teacher_score"] = float(f"{score:.7g}")
    flaw = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        told = json.loads((job.run_dir / "args.json").read_text())
        record["commit"] = told["commit"].removesuffix("-dirty")
        record["dirty"] = told["commit"].endswith("-dirty") and attempts[-1]["code_is_dirty"]
        names = ("torch", "numpy", "gymnasium", "mujoco", "transformers")
        record["versions"] = {name: told["packages"].get(name) for name in names}
        series = results.read_metrics(job.run_dir / "metrics.csv")
        missing = [key for key in job.metrics if key not in series]
        broken = [k for k in job.metrics if k in series and not np.isfinite(series[k][1]).all()]
        lack = f"metrics.csv has no {', '.join(missing)}" if missing else ""
        lack = lack or (f"{', '.join(broken)} in metrics.csv is not finite" if broken else "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        lack = f"its args.json or metrics.csv cannot be read: {type(error).__name__}: {error}"
    if code == 0 and lack:
        flaw += f", but {lack}"
    if code or lack:
        log = (job.run_dir / "log.txt").read_text(errors="replace").splitlines()
        log = [line.rpartition("\r")[2][:500] for line in log if line.strip()]
        return record | {"error": flaw, "log": log[-LOG_TAIL:]}, None
    edges, table = results.curves(series, list(job.metrics))
    record["steps"] = int(edges[-1])
    record["scores"] = {
        key: {k: float(f"{v:.7g}") for k, v in results.scores(series[key][1], table[key]).items()}
        for key in job.metrics
    }
    return record | {"state": "done"}, results.csv_text(edges, table)


def at_a_time(workers: int | None, processes: int = 1) -> int:
    """--workers, checked; if not given, as many runs of `processes` each as there are cores."""
    if workers is None:
        return max(1, cores() // processes)
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    return workers


def code_is_dirty() -> bool:
    """Whether what a run executes differs from the commit; results, which runs change, do not."""
    paths = ("algos", "envs", "rlhf", "requirements.txt")
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *paths]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.returncode != 0 or bool(found.stdout)


def cores() -> int:
    """That this process may use."""
    may_use = getattr(os, "sched_getaffinity", None)  # not on a Mac
    return len(may_use(0)) if may_use else os.cpu_count()


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and those below it: torchrun's ranks outlive torchrun."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()


def machine() -> dict:
    """CPU, its cores, and the GPU where there is one."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    found = {"cpu": cpu, "cores": cores()}
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        gpus = []
    return found | ({"gpus": gpus} if gpus else {})


# RUN MANY ========================================================================================


def progress(job: Job) -> tuple[int, int]:
    """(steps done, steps of the whole run) from the logs; (0, 0) while there are none."""
    try:
        args = json.loads((job.run_dir / "args.json").read_text())["args"]
        with (job.run_dir / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
        steps = [int(x.partition(",")[0]) for x in lines[1:] if x.endswith("\n") and x[0] != "s"]
        total = int(args.get("total_timesteps") or args.get("total_episodes") or 0)
        return (min(steps[-1], total) if steps else 0), total
    except (OSError, ValueError, KeyError):
        return 0, 0


class Watch:
    """Speed and time left of the jobs that run now, as their logs tell."""

    def __init__(self, jobs: Iterable[Job]):
        self.state = {job: "waiting" for job in jobs}
        self.origin = {}
        self.at = {}

    def look(self) -> None:
        for job, state in self.state.items():
            if state in ("running", "elsewhere"):
                step, total = progress(job)
                now = time.monotonic()
                if step and job not in self.origin:
                    self.origin[job] = (step, now)
                first, since = self.origin.get(job, (step, now))
                rate = (step - first) / (now - since) if step > first else 0.0
                self.at[job] = (step, total, rate)

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("run", "state", "", "", "steps/s", "left"):
            table.add_column(name, justify="right" if name in ("steps/s", "left") else "left")
        for job, state in self.state.items():
            if state in ("waiting", "done", "stopped"):
                continue
            step, total, rate = self.at.get(job, (0, 0, 0.0))
            bar = ProgressBar(total=max(total, 1), completed=step, width=24)
            left = clock((total - step) / rate) if rate else ""
            share = f"{step / total:4.0%}" if total else ""
            table.add_row(job.name, state, bar, share, f"{rate:.0f}" if rate else "", left)
        counts = [f"{list(self.state.values()).count(s)} {s}" for s in ("done", "waiting")]
        table.caption = ", ".join(counts)
        return table


def clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours}:{minutes:02d}:{round(seconds) % 60:02d}"


def run_and_tell(job: Job, *hooks: Callable) -> tuple[str, str]:
    """(state, what to say of it): run_job, with "not stored" where it raises UserError."""
    try:
        state = run_job(job, *hooks)
    except UserError as error:
        return "not stored", f": {error}"
    if state != "failed":
        return state, ""
    record = job.stored()[job.name]
    return state, "\n    ".join(
        [f": {record['error']}", *record["log"], f"repeat it: {record['command']}"]
    )


def say(console: Console, state: str, job: Job, text: str = "") -> None:
    # commands and lines of a log stay whole, to be copied
    console.print(f"{state:9s} {job.name}{text}", markup=False, highlight=False, soft_wrap=True)


def launch(jobs: list[Job], workers: int, console: Console) -> Watch:
    """Run `jobs`, `workers` at a time. SIGINT or SIGTERM lets each write a checkpoint and ends."""
    watch, processes = Watch(jobs), {}
    stop, lock = threading.Event(), threading.RLock()  # a signal may come while one is handled

    def work(job: Job) -> None:
        def started(process: subprocess.Popen) -> None:
            with lock:
                processes[job] = process
                if stop.is_set():  # it came while this one was starting
                    process.terminate()

        if stop.is_set():
            return
        watch.state[job] = "running"
        if not console.is_terminal:
            say(console, "start", job)
        watch.state[job], text = run_and_tell(job, started, stop.is_set)
        say(console, watch.state[job], job, text)

    def interrupt(number: int, _) -> None:
        again = stop.is_set()
        stop.set()
        with lock:
            for process in processes.values():
                if process.poll() is None:
                    # a second signal does not wait for checkpoints
                    kill_tree(process) if again else process.terminate()
        if not again:
            console.print("stopping: every run writes a checkpoint; the same command goes on later")

    old = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, job) for job in jobs]
            follow(watch, lambda: all(future.done() for future in futures), console)
            for future in futures:
                future.result()  # an error of ours must not pass in silence
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return watch


def follow(watch: Watch, ended: Callable[[], bool], console: Console) -> None:
    """Show the table until `ended`; on what is no terminal, nothing."""
    with Live(watch.table(), console=console, refresh_per_second=2, transient=True) as live:
        while not ended():
            time.sleep(0.2)
            if console.is_terminal:
                watch.look()
                live.update(watch.table())


def submit(jobs: list[Job], cluster: str, folder: Path, options: dict, console: Console) -> Watch:
    """Hand `jobs` to Slurm by submitit (cluster "local" tries the same path on this machine).

    Ctrl-C ends the watching only; the jobs go on.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm and local need submitit: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**options)
        handles = dict(zip(jobs, executor.map_array(run_and_tell, jobs), strict=True))
    except (RuntimeError, FileNotFoundError) as error:  # no sbatch here, or it refused
        raise UserError(f"--launcher {cluster}: {error}") from error
    watch, ended_already = Watch(jobs), set()
    words = {"RUNNING": "running", "PENDING": "waiting", "UNKNOWN": "waiting"}

    def ended() -> bool:
        for job, handle in handles.items():
            if not handle.done():
                watch.state[job] = words.get(handle.state, handle.state.lower())
            elif job not in ended_already:
                ended_already.add(job)
                error = handle.exception()
                watch.state[job], text = ("failed", f": {error}") if error else handle.result()
                say(console, watch.state[job], job, text)
        return all(handle.done() for handle in handles.values())

    try:
        follow(watch, ended, console)
    except KeyboardInterrupt:
        console.print("the jobs go on; python -m benchmark status shows them")
    return watch
