"""The benchmark harness through its command, on small scripts that end in every possible way."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark import flops, jobs, report, results, run, speed
from benchmark.papers import Paper
from rlhf import UserError
from tests.launch import ENVIRONMENT, ROOT, descendants, digests

# A script as the harness sees one. It logs ten steps of 100 and keeps its step as a checkpoint;
# with --wait it stands still in the middle until that file exists.
SCRIPT = """
import argparse, json, os, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--run-dir", "--wait"):
    parser.add_argument(name, type=Path)
for name in ("--resume", "--env-id", "--end", "--key", "--teacher"):
    parser.add_argument(name, default="")
for name in ("--seed", "--bonus", "--fail-seed"):
    parser.add_argument(name, type=int, default=0)
parser.add_argument("--deaf", action="store_true")
args = parser.parse_args()
rank = os.environ.get("RANK", "0")
folder = args.run_dir / rank if rank != "0" else args.run_dir
folder.mkdir(parents=True, exist_ok=True)

told = []
signal.signal(signal.SIGTERM, lambda *_: None if args.deaf else told.append(143))
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
checkpoint = folder / "step"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print(f"starting at {step}", flush=True)
time.sleep(0.1)  # wall times are kept in tenths of a second
if args.end == "silent":
    sys.exit()
packages = {"torch": "2.0", "numpy": "1.0"}
record = {"args": {"total_timesteps": 1000}, "commit": "abc1234-dirty", "packages": packages}
(folder / "args.json").write_text(json.dumps(record))
with (folder / "metrics.csv").open("a") as log:
    log.write("" if step else "step,key,value\\n")
    while step < 10:
        if step == 5 and args.fail_seed == args.seed:
            sys.exit("[Errno 5] [/red] the reason" + 20 * ", in many words")
        if step == 5 and args.wait and not args.wait.exists() or told:
            if told:
                print("stopped")
                sys.exit(143)
            time.sleep(0.01)
            continue
        step += 1
        value = "nan" if args.end == "nan" else 100 * args.seed + step + args.bonus
        if args.end != "header":
            log.write(f"{100 * step},{args.key or 'score'},{value}\\n")
            log.flush()
        new = folder / "step.new"
        new.write_text(str(step))
        new.replace(checkpoint)
"""

PAPER = """
[paper]
title = "A Fake"
authors = "Nobody"
year = 2026
link = "https://example.org"

[scales.smoke]
seeds = 2
about = "seconds"

[scales.laptop]
seeds = 3
about = "minutes"

[[runs]]
name = "new"
script = "fake"
smoke = "FLAGS"
laptop = "FLAGS --bonus 1"
processes = PROCESSES
metrics = ["score"]

[[claims]]
id = "high"
statement = "New scores above 100"
source = "page 1"
run = "new"
metric = "score"
statistic = "mean"
low = 100.0
"""


def copy_folder(name, root, *without):
    skip = shutil.ignore_patterns("results", "peers", "__pycache__", *without)
    shutil.copytree(ROOT / name, root / name, ignore=skip)


VOLATILE = ("started", "wall_seconds")


class Project:
    """A copy of the harness with scripts and papers of its own, so that no test meets real runs."""

    def __init__(self, root, flags="", processes=1):
        self.root = root
        self.results = root / "benchmark" / "results"
        copy_folder("benchmark", root, "papers")
        for path, text in {"algos/fake.py": SCRIPT, "rlhf/__init__.py": None}.items():
            (root / path).parent.mkdir()
            (root / path).write_text(text or (ROOT / path).read_text())
        self.results.mkdir()
        self.write_paper(flags, processes)

    def write_paper(self, flags="", processes=1, old="", new=""):
        text = PAPER.replace("FLAGS", flags).replace("PROCESSES", str(processes))
        assert old in text
        (self.root / "benchmark" / "papers").mkdir(exist_ok=True)
        (self.root / "benchmark" / "papers" / "fake.toml").write_text(text.replace(old, new, 1))

    def start(self, *words):
        return Command(self.root, *words)

    def run(self, *words, code=0, timeout=120):
        """Run to the end. Returns stdout and stderr."""
        with self.start(*words) as command:
            ended, out, err = command.finish(timeout)
        assert ended == code, out + err
        assert "Traceback" not in out + err
        return out, err

    def refuse(self, *words):
        """Run what must be refused in one line. Returns the line."""
        out, err = self.run(*words, code=1)
        assert not out and len(err.splitlines()) == 1 and err.startswith("error: "), out + err
        return err

    def run_dir(self, seed=1):
        """Of the only run with this seed."""
        (found,) = (self.root / "runs" / "benchmark" / "fake" / "smoke").glob(f"new__*__{seed}__*")
        return found

    def starts(self, seed=1):
        """Process ids of all starts of a run."""
        files = (self.root / "runs" / "benchmark" / "fake" / "smoke").glob(f"*__{seed}__*/starts")
        return [int(pid) for file in files for pid in file.read_text().split()]

    def steps(self, seed=1):
        """Steps that its metrics.csv has."""
        with (self.run_dir(seed) / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file)]

    def records(self):
        return results.records(self.results, "fake", "smoke")

    def wait_for_step(self, step, seed=1):
        def reached():
            paths = self.root.glob(f"runs/benchmark/fake/smoke/new__*__{seed}__*/step")
            return any(path.read_text() == str(step) for path in paths)

        wait_until(reached)

    def end_scripts(self):
        for file in self.root.glob("runs/**/starts"):
            for pid in map(int, file.read_text().split()):
                if running(pid, self.root):
                    os.kill(pid, signal.SIGKILL)


class Command:
    """python -m benchmark ..., with all that it started ended at the end of the block."""

    def __init__(self, root, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmark", *map(str, words)],
            cwd=root,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            for pid in [self.process.pid, *descendants(self.process.pid)]:
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def finish(self, timeout=120):
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def running(pid, root):
    """Whether a process with this id is there and belongs to the project in `root`."""
    try:
        there = Path(f"/proc/{pid}/cwd").resolve() == root.resolve()
        return there and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False


def wait_until(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def project(tmp_path):
    """project(flags): a project whose only paper is "fake", run with these flags."""
    made = []

    def make(flags="", processes=1):
        made.append(Project(tmp_path / "project", flags, processes))
        return made[-1]

    yield make
    for one in made:
        one.end_scripts()


# ------------------------------------------------------------------------------- STORED CURVES


def test_stretches_by_hand(monkeypatch):
    monkeypatch.setattr(results, "ROWS", 4)
    series = {
        "a": (np.array([0, 1, 4, 5, 8]), np.array([1.0, 3.0, 5.0, 7.0, 9.0])),
        "b": (np.array([8]), np.array([2.0])),
    }
    edges, columns = results.curves(series, ["a", "b"])
    assert edges.tolist() == [2, 4, 6, 8]
    assert columns["a"].tolist() == [2, 5, 7, 9]  # steps 0 and 1; 4; 5; 8
    np.testing.assert_array_equal(columns["b"], [np.nan, np.nan, np.nan, 2])
    assert results.csv_text(edges, columns) == "step,a,b\n2,2,\n4,5,\n6,7,\n8,9,2\n"
    # a row without any value is left out
    assert results.csv_text(edges, {"b": columns["b"]}) == "step,b\n8,2\n"


@pytest.mark.parametrize(
    ("steps", "edges"),
    [
        ([3], [1, 2, 3]),  # fewer steps than rows
        ([2, 10], [2, 5, 7, 10]),  # no multiple of four
        ([0], [0]),  # a run that logs before its first step only
        ([10, 2], [2, 5, 7, 10]),  # the last line is not the last step
    ],
)
def test_edges(steps, edges, monkeypatch):
    monkeypatch.setattr(results, "ROWS", 4)
    found, columns = results.curves({"a": (np.array(steps), np.ones(len(steps)))}, ["a"])
    assert found.tolist() == edges
    assert np.nansum(columns["a"]) == len(steps)


def test_metrics_with_a_last_line_cut_short(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,key,value\n1,a,2\n1,b,-1e-3\n2,a,4\n3,a,12")
    series = results.read_metrics(tmp_path / "metrics.csv")
    assert {k: (s.tolist(), v.tolist()) for k, (s, v) in series.items()} == {
        "a": ([1, 2], [2.0, 4.0]),
        "b": ([1], [-0.001]),
    }


def test_scores_by_hand():
    values = np.arange(150.0)
    curve = np.array([np.nan, 7.0, 5.0])
    expected = {"last": 149.0, "last_100": 99.5, "best": 7.0, "count": 150}
    assert results.scores(values, curve) == expected
    assert results.scores(np.array([1.0, 4.0]), curve)["last_100"] == 2.5


def test_table_on_the_union_of_steps(tmp_path):
    (tmp_path / "1.csv").write_text("step,a,b\n10,1,\n20,2,9\n")
    (tmp_path / "2.csv").write_text("step,a,b\n10,,8\n15,4,8\n20,5,8\n")
    steps, runs = results.table([tmp_path / "1.csv", tmp_path / "2.csv"], "a")
    assert steps.tolist() == [10, 15, 20]
    np.testing.assert_array_equal(runs, [[1, 1, 2], [np.nan, 4, 5]])


# ------------------------------------------------------------------------------- STORE


def stored(folder, *names, text="step,a\n1,2\n"):
    for name in names:
        results.store(folder, "p", "smoke", {"job": name, "state": "done"}, text)
    return folder / "p" / "smoke.jsonl"


@pytest.mark.parametrize("damage", ["cut", "bytes", "no object", "csv", "no csv"])
def test_damaged_results(damage, tmp_path, capsys):
    path = stored(tmp_path, "r1", "r2", "r3")
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "cut":
        path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    elif damage == "bytes":
        path.write_bytes(lines[0] + b"\xff\xfe\n" + lines[2])
    elif damage == "no object":
        path.write_bytes(lines[0] + b"[1]\n" + lines[2])
    elif damage == "csv":
        (tmp_path / "p" / "smoke" / "r2.csv").write_text("step,a\n1,3\n")
    else:
        (tmp_path / "p" / "smoke" / "r2.csv").unlink()
    assert results.records(tmp_path, "p", "smoke").keys() == {"r1", "r3"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "smoke.jsonl line 2" in line and "missing" in line
    # the next result that is stored leaves out what cannot be read, in silence
    stored(tmp_path, "r2")
    assert results.records(tmp_path, "p", "smoke").keys() == {"r1", "r2", "r3"}
    assert capsys.readouterr().err == ""


def test_line_cut_at_the_end_of_the_file(tmp_path, capsys):
    path = stored(tmp_path, "r1", "r2")
    path.write_bytes(path.read_bytes()[:-30])
    assert results.records(tmp_path, "p", "smoke").keys() == {"r1"}
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize("room_for", [0, 1])
def test_disk_that_fills_keeps_the_old_curve_and_the_old_record(room_for, tmp_path, monkeypatch):
    stored(tmp_path, "r1")
    before, written = digests(tmp_path), []

    def fsync(_):
        written.append(1)
        if len(written) > room_for:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"r1\.csv|smoke\.jsonl") as full:
        stored(tmp_path, "r1", text="step,a\n1,3\n")
    assert full.value.errno == 28
    assert digests(tmp_path) == before


# ------------------------------------------------------------------------------- ONE RUN


def fake_job(tmp_path, *flags, seed=1, processes=1, metrics=("score",)):
    (tmp_path / "fake.py").write_text(SCRIPT)
    return jobs.Job(
        paper="fake",
        scale="smoke",
        run="new",
        env="",
        seed=seed,
        script=str(tmp_path / "fake.py"),
        flags=(*flags, "--seed", str(seed)),
        metrics=metrics,
        run_dir=tmp_path / "run",
        results=tmp_path / "results",
        processes=processes,
    )


def test_record_of_a_run(tmp_path):
    job = fake_job(tmp_path)
    assert jobs.run_job(job) == "done"
    record = job.stored()[job.name]
    scores = {"last": 110.0, "last_100": 105.5, "best": 110.0, "count": 10.0}
    expected = {"state": "done", "exit_code": 0, "steps": 1000, "scores": {"score": scores}}
    expected |= {"commit": "abc1234", "attempts": 1, "seed": 1, "job": job.name}
    # the fake script says so, but only what a run executes counts, not results or pages
    expected["dirty"] = jobs.code_is_dirty()
    assert {key: record[key] for key in expected} == expected
    assert record["versions"]["torch"] == "2.0" and record["versions"]["mujoco"] is None
    assert record["command"] == shlex.join(job.command()) and record["wall_seconds"] > 0
    assert record["machine"]["cores"] >= 1
    text = (tmp_path / "results" / "fake" / "smoke" / f"{job.name}.csv").read_text()
    assert text.splitlines()[:2] == ["step,score", "100,101"] and len(text.splitlines()) == 11
    assert jobs.run_job(job) == "done"
    assert len((tmp_path / "run" / "starts").read_text().split()) == 1, "it was run twice"


def test_record_is_of_the_code_that_started(tmp_path, monkeypatch):
    job = fake_job(tmp_path, "--wait", str(tmp_path / "go"))
    digest = job.digest()
    monkeypatch.setattr(jobs, "code_is_dirty", lambda: job.digest() != digest)

    def change(process):
        while not (tmp_path / "run" / "starts").exists():
            assert process.poll() is None
            time.sleep(0.01)
        Path(job.script).write_text(SCRIPT + "# another version\n")
        (tmp_path / "go").touch()

    assert jobs.run_job(job, change) == "done"
    record = job.stored()[job.name]
    assert (record["script_sha256"], record["dirty"]) == (digest, False)
    assert job.changed(job.stored())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--end", "silent"], "args.json"),
        (["--end", "header"], "no score"),
        (["--key", "other"], "no score"),
        (["--end", "nan"], "score in metrics.csv is not finite"),
    ],
)
def test_exit_code_0_without_metrics_is_a_failure(flags, words, tmp_path):
    job = fake_job(tmp_path, *flags)
    assert jobs.run_job(job) == "failed"
    record = job.stored()[job.name]
    assert record["error"].startswith("exit code 0, but ") and words in record["error"]
    assert record["log"] == [f"$ {shlex.join(job.command())}", "starting at 0"]
    assert not list((tmp_path / "results").rglob("*.csv"))


def test_metric_that_the_paper_asks_for_later(tmp_path):
    """The run is there, so only its files are read again."""
    job = fake_job(tmp_path)
    assert jobs.run_job(job) == "done"
    more = fake_job(tmp_path, metrics=("score", "losses/loss"))
    assert not more.finished(more.stored())
    assert jobs.run_job(more) == "failed"
    assert "no losses/loss" in more.stored()[job.name]["error"]
    assert jobs.run_job(job) == "done"


def test_run_directory_that_cannot_be_made(tmp_path):
    job = fake_job(tmp_path)
    (tmp_path / "run").write_text("precious")
    with pytest.raises(jobs.UserError, match=re.escape(str(tmp_path / "run"))):
        jobs.run_job(job)
    assert (tmp_path / "run").read_text() == "precious"


# ------------------------------------------------------------------------------- MANY RUNS


def test_run_and_run_again(project):
    fake = project()
    out, _ = fake.run("run", "fake", "--scale", "smoke", "--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["missing", "missing"]
    assert not (fake.root / "runs").exists() and not list(fake.results.iterdir())

    out, err = fake.run("run", "fake", "--scale", "smoke")
    assert "2 runs, 0 of them done" in out and out.splitlines()[-1] == "2 done" and not err
    assert fake.records().keys() == {"new__builtin__1", "new__builtin__2"}
    names = {path.name for path in fake.results.rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(".")} == {
        "smoke.jsonl",
        "new__builtin__1.csv",
        "new__builtin__2.csv",
    }

    before = digests(fake.results)
    out, _ = fake.run("run", "fake", "--scale", "smoke")
    assert "2 runs, 2 of them done" in out and digests(fake.results) == before
    out, _ = fake.run("run", "fake", "--scale", "smoke", "--dry-run", "--seeds", 3)
    assert [line.split()[0] for line in out.splitlines()] == ["done", "done", "missing"]
    assert len(fake.starts(1)) == 1

    # other flags are another run, and the results of the old ones do not count
    fake.write_paper("--bonus 5")
    out, _ = fake.run("run", "fake", "--scale", "smoke", "--seeds", 1)
    assert "1 runs, 0 of them done" in out and len(fake.starts(1)) == 2
    assert fake.records()["new__builtin__1"]["scores"]["score"]["last"] == 115
    out, _ = fake.run("run", "fake", "--scale", "smoke", "--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["done", "missing"]


def test_run_killed_half_way(project, tmp_path):
    fake = project(f"--wait {tmp_path / 'go'}")
    words = ["run", "fake", "--scale", "smoke", "--seeds", "1"]
    with fake.start(*words) as command:
        fake.wait_for_step(5)
        os.kill(fake.starts()[0], signal.SIGKILL)
        code, out, err = command.finish()
    assert code == 1 and not err
    record = fake.records()["new__builtin__1"]
    assert (record["state"], record["error"]) == ("failed", "killed by SIGKILL")
    assert record["log"][-1] == "starting at 0" and record["attempts"] == 1
    assert "failed    new__builtin__1: killed by SIGKILL" in out
    assert "    starting at 0" in out.splitlines()
    assert f"    repeat it: {record['command']}" in out.splitlines(), "the command is in one piece"
    first = record["wall_seconds"]
    assert first > 0

    (tmp_path / "go").touch()
    fake.run(*words)
    record = fake.records()["new__builtin__1"]
    assert (record["state"], record["attempts"]) == ("done", 2)
    spans = json.loads((fake.run_dir() / "attempts.json").read_text())
    assert spans[0]["seconds"] == first and spans[0]["started"] == record["started"]
    assert record["wall_seconds"] == round(first + spans[1]["seconds"], 1) > first
    assert fake.steps() == list(range(100, 1100, 100)), "it did not go on from its checkpoint"
    assert "starting at 5" in (fake.run_dir() / "log.txt").read_text().splitlines()


def test_command_that_a_failed_run_prints(project, tmp_path):
    """As it stands, from the root of the project."""
    fake = project("--fail-seed 1")
    out, _ = fake.run("run", "fake", "--scale", "smoke", "--seeds", 1, code=1)
    command = re.search(r"repeat it: python (.*)", out)[1]
    again = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=fake.root, capture_output=True, text=True
    )
    assert again.returncode == 1 and "starting at 5" in again.stdout


def test_failed_run_among_others(project):
    fake = project("--fail-seed 2")
    words = ["run", "fake", "--scale", "smoke", "--seeds", "3", "--workers", "1"]
    out, err = fake.run(*words, code=1)
    states = {name: record["state"] for name, record in fake.records().items()}
    assert list(states.values()) == ["done", "failed", "done"] and not err
    record = fake.records()["new__builtin__2"]
    assert record["error"] == "exit code 1" and record["exit_code"] == 1
    # the reason, with brackets and more than 80 columns, as it was
    assert f"    {record['log'][-1]}" in out.splitlines()
    assert "[/red] the reason, in many words, in" in record["log"][-1]
    assert f"    repeat it: {record['command']}" in out.splitlines()
    assert out.splitlines()[-1] == "2 done, 1 failed"


def test_launcher_killed_while_the_script_lives_on(project, tmp_path):
    fake = project(f"--wait {tmp_path / 'go'}")
    words = ["run", "fake", "--scale", "smoke", "--seeds", "1"]
    with fake.start(*words) as command:
        fake.wait_for_step(5)
        command.process.kill()
        command.finish()
    (pid,) = fake.starts()
    assert running(pid, fake.root) and not fake.records()
    out, _ = fake.run(*words)
    assert "elsewhere new__builtin__1" in out and "in the hands of another command" in out
    table, _ = fake.run("status", "fake", "--scale", "smoke", "--workers", 1)
    assert states_of(table) == {"running": 1, "missing": 1}
    assert fake.starts() == [pid] and running(pid, fake.root)

    (tmp_path / "go").touch()
    wait_until(lambda: not running(pid, fake.root))
    assert not fake.records(), "nobody was there to store it"
    fake.run(*words)
    assert fake.records()["new__builtin__1"]["state"] == "done"
    assert fake.steps() == list(range(100, 1100, 100)), "the second start found all of it done"


def states_of(table):
    """{state: count} of the row of the run "new" in what `status` prints."""
    lines = table.splitlines()
    (head,) = [line for line in lines if line.startswith("run ")]
    (row,) = [line for line in lines if line.startswith("new ")]
    titles = [
        (m.start(), m.end(), m[0])
        for m in re.finditer(r"done|running|failed|cut off|missing", head)
    ]
    found = {name: row[start : max(end, start + 4)].strip() for start, end, name in titles}
    return {name: int(text) for name, text in found.items() if text}


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)]
)
def test_signal_to_the_launcher(number, processes, project, tmp_path):
    fake = project(f"--wait {tmp_path / 'go'}", processes)
    words = ["run", "fake", "--scale", "smoke", "--workers", "1"]
    with fake.start(*words) as command:
        fake.wait_for_step(5)
        os.killpg(command.process.pid, number)  # a terminal signals the whole group
        code, out, err = command.finish()
    assert code == 1 and not err
    assert "stopping" in out and "stopped   new__builtin__1" in out
    assert out.splitlines()[-1] == "1 stopped, 1 waiting"
    assert not fake.records() and not fake.starts(2), "a run that did not start has no record"
    assert not any(running(pid, fake.root) for pid in fake.starts())
    assert "stopped" in (fake.run_dir() / "log.txt").read_text().splitlines()
    table, _ = fake.run("status", "fake", "--scale", "smoke")
    assert states_of(table) == {"cut off": 1, "missing": 1}

    (tmp_path / "go").touch()
    fake.run(*words)
    record = fake.records()["new__builtin__1"]
    assert (record["state"], record["attempts"]) == ("done", 2)
    assert fake.steps() == list(range(100, 1100, 100))


def test_second_signal_does_not_wait(project, tmp_path):
    fake = project(f"--deaf --wait {tmp_path / 'go'}")
    with fake.start("run", "fake", "--scale", "smoke", "--seeds", "1") as command:
        fake.wait_for_step(5)
        command.process.send_signal(signal.SIGINT)
        line = ""
        while "stopping" not in line:
            line = command.process.stdout.readline()
            assert line, "the command ended"
        command.process.send_signal(signal.SIGINT)
        code, _, _ = command.finish()
    assert code == 1 and not fake.records()
    assert not any(running(pid, fake.root) for pid in fake.starts())


def test_damaged_results_through_the_command(project):
    fake = project()
    words = ["run", "fake", "--scale", "smoke", "--seeds", "3"]
    fake.run(*words)
    whole = fake.records()
    path = fake.results / "fake" / "smoke.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # the line of seed 3
    curve = fake.results / "fake" / "smoke" / "new__builtin__1.csv"
    curve.write_text(curve.read_text().replace("101", "901"))
    out, err = fake.run(*words)
    assert "3 runs, 1 of them done" in out
    lines = err.splitlines()
    assert len(lines) == 2 and "line 1" in lines[0] and "line 3" in lines[1], "each once"
    assert all(str(Path("fake") / "smoke.jsonl") in line for line in lines)
    healed = fake.records()
    assert healed.keys() == whole.keys() and "901" not in curve.read_text()
    assert healed["new__builtin__2"] == whole["new__builtin__2"]
    assert all(healed[name]["scores"] == whole[name]["scores"] for name in whole)
    out, err = fake.run(*words)
    assert "3 of them done" in out and not err


def test_two_commands_at_once(project, tmp_path):
    """The loser of the first run takes the second; with workers of its own each goes on."""
    fake = project(f"--wait {tmp_path / 'go'}")
    words = ["run", "fake", "--scale", "smoke", "--seeds", "4", "--workers", "1"]
    with fake.start(*words) as one, fake.start(*words) as two:
        fake.wait_for_step(5, seed=1)
        fake.wait_for_step(5, seed=2)
        (tmp_path / "go").touch()
        ended = [one.finish(), two.finish()]
    assert [(code, err) for code, _, err in ended] == [(0, ""), (0, "")]
    assert [len(fake.starts(seed)) for seed in range(1, 5)] == [1, 1, 1, 1]
    found = fake.records()
    assert [found[f"new__builtin__{seed}"]["state"] for seed in range(1, 5)] == ["done"] * 4
    assert len((fake.results / "fake" / "smoke.jsonl").read_text().splitlines()) == 4
    loser = next(out for _, out, _ in ended if "elsewhere new__builtin__1" in out)
    assert "in the hands of another command" in loser


TEACHER = """
[[runs]]
name = "pupil"
script = "fake"
laptop = "--key charts/episodic_return"
teacher = "fake master"
metrics = ["score"]

[[runs]]
name = "master"
script = "fake"
laptop = "--key charts/episodic_return"
metrics = ["charts/episodic_return"]

[[claims]]"""


def test_best_seed_of_another_run_is_the_teacher(project):
    project = project()
    project.write_paper("--key charts/episodic_return", 1, "[[claims]]", TEACHER)
    path = project.root / "benchmark" / "papers" / "fake.toml"
    path.write_text(path.read_text().replace('"score"', '"charts/episodic_return"'))
    project.run("run", "fake", "--scale", "laptop")
    made = results.records(project.results, "fake", "laptop")
    assert set(made) == {
        f"{run}__builtin__{s}" for run in ("new", "pupil", "master") for s in (1, 2, 3)
    }
    link = project.root / "runs" / "benchmark" / "teachers" / "fake-master--laptop"
    assert f"--teacher {link.relative_to(project.root)}" in made["pupil__builtin__1"]["command"]
    assert link.resolve().name.startswith("master__builtin__3__")  # scores grow with the seed
    pupil, score = made["pupil__builtin__1"], "charts/episodic_return"
    assert pupil["teacher"] == "master__builtin__3"
    assert pupil["teacher_score"] == made["master__builtin__3"]["scores"][score]["last_100"]
    project.run("report")
    page = (project.root / "docs" / "benchmark" / "fake.md").read_text()
    assert f"`master__builtin__3`, {pupil['teacher_score']:.1f}" in page
    assert "| pupil | 3 |" in page

    # results that came from another machine: its best run is made again, or what is missing of
    # it, the others are not
    folder = link.resolve()
    shutil.rmtree(project.root / "runs")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    (project.results / "fake" / "laptop" / "pupil__builtin__1.csv").unlink()
    project.run("run", "fake", "--scale", "laptop")
    assert (link / "metrics.csv").exists() and len(list(link.resolve().parent.iterdir())) == 2
    strip = [{k: v for k, v in r.items() if k not in VOLATILE} for r in made.values()]
    assert strip == [
        {k: v for k, v in r.items() if k not in VOLATILE}
        for r in results.records(project.results, "fake", "laptop").values()
    ]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("fake", "teacher 'fake', want PAPER RUN"),
        ("fake nobody", "there is no run 'nobody'"),
        ("nothing new", "there is no paper 'nothing'"),
        ("fake new", "does not keep charts/episodic_return"),
    ],
)
def test_teacher_that_there_is_not(teacher, words, project):
    project = project()
    project.write_paper("", 1, "[[claims]]", TEACHER.replace("fake master", teacher))
    assert words in project.refuse("run", "fake", "--scale", "laptop")


def test_run_with_fewer_seeds_than_the_scale(project):
    project = project()
    project.write_paper("", 1, 'metrics = ["score"]', 'seeds = 2\nmetrics = ["score"]')
    for flags, seeds in (([], "12"), (["--seeds", 3], "123")):
        out, _ = project.run("run", "fake", "--scale", "laptop", "--dry-run", *flags)
        assert re.findall(r"--seed (\d+)", out) == list(seeds)


def test_full_disk_of_the_results(project, tmp_path):
    fake = project()
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        words = ["run", "fake", "--scale", "smoke", "--results", disk]
        fake.run(*words, "--seeds", 1)
        before = digests(disk)
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        out, err = fake.run(*words, code=1)
        (line,) = [line for line in out.splitlines() if "No space left" in line]
        assert line.startswith("not stored new__builtin__2: ") and str(disk) in line
        assert str(fake.run_dir(2).relative_to(fake.root)) in line and "goes on" in line
        assert out.splitlines()[-1] == "1 not stored" and not err
        (disk / "filler").unlink()
        assert {k: v for k, v in digests(disk).items() if ".lock" not in k} == {
            k: v for k, v in before.items() if ".lock" not in k
        }
        fake.run(*words)
        found = results.records(disk, "fake", "smoke")
        assert [record["state"] for record in found.values()] == ["done", "done"]
        assert fake.steps(2) == list(range(100, 1100, 100)), "the run was kept"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_submitit_gives_the_same_results(project):
    fake = project("--fail-seed 3")
    words = ["run", "fake", "--scale", "smoke", "--launcher", "local", "--seeds", "3"]
    out, _ = fake.run(*words, code=1)
    assert out.splitlines()[-1] == "2 done, 1 failed"
    record = fake.records()["new__builtin__3"]
    assert f"    repeat it: {record['command']}" in out.splitlines()
    mine, curves = fake.records(), digests(fake.results)
    shutil.rmtree(fake.results)
    shutil.rmtree(fake.root / "runs")
    fake.run(*words[:4], "--seeds", 3, code=1)
    same = ("state", "command", "scores", "sha256", "error", "log")
    for name, record in fake.records().items():
        assert [record.get(key) for key in same] == [mine[name].get(key) for key in same]
    assert {k: v for k, v in digests(fake.results).items() if k.endswith(".csv")} == {
        k: v for k, v in curves.items() if k.endswith(".csv")
    }


# ------------------------------------------------------------------------------- BAD INPUT


def test_bad_input(project):
    fake = project()
    (fake.root / "file").write_text("precious")
    refused = {
        "run papper": "there is no paper 'papper'; there is: fake",
        "run fake --scale paper": "fake has no scale 'paper'; it has smoke, laptop",
        "run fake --only lower": "there is no claim 'lower'; there is: high",
        "run fake --seeds 0": "--seeds 0: at least 1",
        "run fake --workers 0": "--workers 0: at least 1",
        "run fake --results file": "--results file: File exists",
        "status papper": "there is no paper 'papper'",
        "status --workers 0": "--workers 0: at least 1",
        "report --docs file": "file",
        "compare algos/fake.py algos/fakir.py": "there is no script algos/fakir.py",
        "compare algos/fake.py algos/fake.py --workers 0": "--workers 0: at least 1",
    }
    for words, expected in refused.items():
        if words == "run fake --results file":
            with fake.start(*words.split()) as command:  # says how many runs there are first
                code, _, err = command.finish()
            assert code == 1 and err == f"error: {expected}\n"
        else:
            assert expected in fake.refuse(*words.split()), words
    assert not (fake.root / "runs").exists()
    assert (fake.root / "file").read_text() == "precious"
    # what cannot be parsed at all is tyro's to tell
    out, err = fake.run("run", "fake", "--scale", "huge", code=2)
    assert "huge" in out + err and "laptop" in out + err
    out, _ = fake.run("rum", code=2)
    assert out.startswith("usage: ")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = 3", "seed = 3", "scales laptop seeds: missing"),
        ("low = 100.0", 'low = "100"', "low"),
        ('source = "page 1"', "", "source: missing"),
        ('metric = "score"', 'metric = "scores"', "does not keep the metric 'scores'"),
        ("[[claims]]", "[[claims]", "at line 24"),
    ],
)
def test_mistake_in_a_paper(old, new, words, project):
    fake = project()
    fake.write_paper(old=old, new=new)
    line = fake.refuse("run", "fake", "--scale", "smoke")
    assert line.startswith("error: benchmark/papers/fake.toml: ") and words in line
    assert not (fake.root / "runs").exists()


# ------------------------------------------------------------------------------- VERDICTS


def claimed(low, steps=None, **more):
    about = {"title": "t", "authors": "a", "year": 2026, "link": "l"}
    runs = [
        {"name": name, "script": "ppo", "envs": ["E"], "laptop": "", "paper": "", "metrics": ["m"]}
        for name in ("new", "old")
    ]
    number = {"id": "n", "method": "x", "env": "E", "metric": "m", "value": 10.0, "source": "s"}
    claim = {"id": "c", "statement": "s", "source": "s", "run": "new", "metric": "m", "low": low}
    return Paper(
        paper=about,
        scales={"laptop": {"seeds": 3, "about": ""}, "paper": {"seeds": 3, "about": ""}},
        runs=runs,
        numbers=[number | {"read_in": "paper", "steps": steps}],
        claims=[claim | more],
    )


def evidence(paper, scale, new=(), old=(), failed=(), stale=()):
    """Runs with these scores; a failed seed of "new"; seeds whose records are of other flags."""
    planned, records = [], {}
    for name, scores in (("new", new), ("old", old)):
        for seed in range(1, 6):
            job = run.job("p", scale, paper.run(name), "E", seed, [], Path("results"))
            planned.append(job)
            record = {"state": "done", "command": shlex.join(job.command()), "steps": 1000}
            if seed in failed and name == "new":
                record["state"] = "failed"
            elif seed <= len(scores):
                kept = dict.fromkeys(("last", "last_100", "best"), scores[seed - 1])
                record["scores"] = {"m": kept}
            else:
                continue
            if seed in stale:
                record["command"] += " --other"
            records[job.name] = record
    return {scale: report.Evidence("p", paper, scale, records, planned, Path("results"))}


def judged(paper, *found):
    order = {scale: one for each in found for scale, one in each.items()}
    made = report.judge(paper.claims[0], order)
    i = made.interval
    return made.verdict, made.scale, made.runs, made.reason, i and (i.value, i.low, i.high)


def test_verdicts_by_hand():
    paper = claimed(10.0)

    def one(*scores):
        return judged(paper, evidence(paper, "paper", scores))

    assert one(12.0, 12.0, 12.0) == ("reproduced", "paper", "3", "", (12, 12, 12))
    assert one(8.0, 8.0, 8.0)[0] == "not reproduced"
    # a quarter of three runs, rounded down, is none: the IQM is their mean, 10
    assert one(8.0, 10.0, 12.0) == ("inconclusive", "paper", "3", "", (10, 8, 12))
    # of four it leaves the least and the largest out
    assert one(0.0, 10.0, 12.0, 99.0)[2:4] == ("4", "")
    assert one(0.0, 10.0, 12.0, 99.0)[4][0] == 11

    versus = claimed(1.5, effect="ratio", baseline="old", statistic="mean")
    found = judged(versus, evidence(versus, "paper", [6.0] * 3, [2.0, 2.0, 2.0, 2.0]))
    assert found == ("reproduced", "paper", "3 x 2", "", (3, 3, 3))
    versus = claimed(5.0, effect="difference", baseline="old")
    found = judged(versus, evidence(versus, "paper", [6.0] * 3, [2.0] * 3))
    assert found == ("not reproduced", "paper", "3 x 2", "", (4, 4, 4))
    published = claimed(0.8, effect="ratio", numbers=["n"], statistic="mean")
    found = judged(published, evidence(published, "paper", [7.0, 9.0, 11.0]))
    assert found[0] == "inconclusive" and found[4] == (0.9, 0.7, 1.1)


def test_verdict_needs_all_runs():
    paper = claimed(10.0)
    complete, good = evidence(paper, "laptop", [12.0] * 3), "reproduced"
    assert judged(paper, evidence(paper, "paper")) == ("not run", "", "", "", None)
    found = judged(paper, evidence(paper, "paper", [12.0] * 2))
    assert found == ("not run", "", "", "paper: 2 of 3 runs so far", None)
    # the largest scale that is complete
    assert judged(paper, evidence(paper, "paper", [12.0] * 2), complete)[:2] == (good, "laptop")
    assert judged(paper, evidence(paper, "paper", [12.0] * 3), complete)[:2] == (good, "paper")
    # of both sides
    versus = claimed(1.5, effect="ratio", baseline="old", statistic="mean")
    found = judged(versus, evidence(versus, "paper", [6.0] * 3, [2.0]))
    assert found == ("not run", "", "", "paper: 4 of 6 runs so far", None)


def test_verdict_of_a_run_with_fewer_seeds():
    """A side needs the seeds that it has, and at least three."""
    paper = claimed(1.5, effect="ratio", baseline="old", statistic="mean")
    old = paper.run("old").model_copy(update={"seeds": 3})
    scales = {"paper": paper.scales["paper"].model_copy(update={"seeds": 5})}
    paper = paper.model_copy(update={"runs": [paper.run("new"), old], "scales": scales})
    found = judged(paper, evidence(paper, "paper", [12.0] * 5, [6.0] * 3))
    assert found[:3] == ("reproduced", "paper", "5 + 3")
    found = judged(paper, evidence(paper, "paper", [12.0] * 4, [6.0] * 3))
    assert found == ("not run", "", "", "paper: 7 of 8 runs so far", None)


def test_failed_runs_and_verdicts():
    paper = claimed(10.0)
    found = judged(paper, evidence(paper, "paper", [12.0] * 3, failed=[2]))
    assert found == ("inconclusive", "paper", "2", "1 of 3 runs failed", None)
    # a failure says nothing while other runs are missing, and is not concealed either
    found = judged(paper, evidence(paper, "paper", [12.0], failed=[2]))
    assert found == ("not run", "", "", "paper: 1 of 3 runs so far, 1 failed", None)
    # neither a result nor a failure of other flags counts
    found = judged(paper, evidence(paper, "paper", [12.0] * 5, failed=[4], stale=[4]))
    assert found[:3] == ("reproduced", "paper", "4")
    found = judged(paper, evidence(paper, "paper", [12.0] * 3, stale=[1]))
    assert found[0] == "not run"


def test_effects_that_cannot_be_had():
    versus = claimed(1.5, effect="ratio", baseline="old", statistic="mean")
    found = judged(versus, evidence(versus, "paper", [6.0] * 3, [-2.0] * 3))
    assert found[0] == "inconclusive" and "positive" in found[3]
    # a shorter run does not test a value of a longer one
    long = claimed(0.8, steps=5000, effect="ratio", numbers=["n"], statistic="mean")
    found = judged(long, evidence(long, "paper", [9.0] * 3))
    assert found[0] == "not run" and "end at step 1,000, before 5,000" in found[3]
    late = claimed(1.5, score="at_step", step=5000)
    found = judged(late, evidence(late, "paper", [6.0] * 3))
    assert found[0] == "not run" and "end at step 1,000, before 5,000" in found[3]


# ------------------------------------------------------------------------------- PAGES


def test_pages_of_a_small_paper(project, tmp_path):
    fake = project()
    fake.run("run", "fake", "--scale", "smoke", "--seeds", 1)
    fake.run("run", "fake", "--scale", "laptop")
    out, _ = fake.run("report")
    assert "docs/benchmark/scoreboard.md" in out.split()
    docs = fake.root / "docs" / "benchmark"
    board, page = (docs / "scoreboard.md").read_text(), (docs / "fake.md").read_text()
    # last values 111, 211 and 311: mean 211, and 27 equal resamples, of which one is all 111
    assert "1 reproduced, 0 not reproduced, 0 inconclusive, 0 not run." in board
    row = next(line for line in board.splitlines() if "New scores above 100" in line)
    for words in (">reproduced<", "211.0 [111.0, 311.0]", "at least 100", "3, laptop"):
        assert words in row
    assert ">reproduced<" in page and "`score`, mean: 211.0 [111.0, 311.0]" in page
    assert "211.0 +- 81.65" in page and "abc1234-dirty (3)" in page
    assert "scale smoke" not in page
    assert sorted(path.name for path in (docs / "images").iterdir()) == [
        "fake-claims.png",
        "fake-laptop-curves-fake.png",
    ]
    for path in (docs / "images").iterdir():
        assert path.name in page and min(Image.open(path).size) > 50
    fake.run("report", "--check")
    out, _ = fake.run("report")
    assert not out, "a second report has nothing to write"

    # everything that --check must see
    for path in [docs / "scoreboard.md", docs / "images" / "fake-claims.png"]:
        content = path.read_bytes()
        path.write_bytes(content[:50] + b"\xff" + content[51:])
        assert path.name in fake.refuse("report", "--check")
        path.unlink()
        assert path.name in fake.refuse("report", "--check")
        path.write_bytes(content)
    (docs / "images" / "old.png").touch()
    assert "old.png" in fake.refuse("report", "--check")
    (docs / "images" / "old.png").unlink()
    fake.run("report", "--check")
    curve = fake.results / "fake" / "laptop" / "new__builtin__2.csv"
    curve.write_bytes(curve.read_bytes()[:-2] + b"9\n")
    _, err = fake.run("report", "--check", code=1)
    damaged, refused = err.splitlines()
    assert "laptop.jsonl line 2" in damaged and "fake.md" in refused and "scoreboard.md" in refused
    fake.run("report")
    assert "(laptop: 2 of 3 runs so far)" in (docs / "fake.md").read_text()
    # results of other flags are not shown as those of today's
    fake.write_paper("--bonus 7")
    fake.run("report")
    assert "Results at scale" not in (docs / "fake.md").read_text()


def test_picture_of_a_family_of_metrics(tmp_path):
    """A panel for each environment, a line for each run; one without results is left out."""
    keys = ["m", "eval/x@4", "eval/x@1", "eval/x@random"]
    base = {"script": "ppo", "laptop": "", "metrics": keys}
    runs = [
        base | {"name": "both", "envs": ["E", "F"]},
        base | {"name": "one", "envs": ["E"]},
        base | {"name": "waits", "envs": ["E"]},
        base | {"name": "other", "envs": ["E"], "metrics": ["m"]},
    ]
    picture = {"name": "x", "metric": "eval/x@*", "xlabel": "size", "about": "x over size"}
    about = {"title": "t", "authors": "a", "year": 2026, "link": "l"}
    scales = {"laptop": {"seeds": 3, "about": ""}}
    paper = Paper(paper=about, scales=scales, runs=runs, pictures=[picture])
    planned, records = [], {}
    for name, env, value in (
        ("both", "E", 1),
        ("both", "F", 2),
        ("one", "E", 3),
        ("other", "E", 4),
    ):
        for seed in (1, 2):
            job = run.job("p", "laptop", paper.run(name), env, seed, [], tmp_path)
            planned.append(job)
            scores = {k: {"last": 10.0 * value + seed + n} for n, k in enumerate(job.metrics)}
            records[job.name] = {"state": "done", "command": shlex.join(job.command())}
            records[job.name]["scores"] = scores
    planned.append(run.job("p", "laptop", paper.run("waits"), "E", 1, [], tmp_path))
    found = report.Evidence("p", paper, "laptop", records, planned, tmp_path)
    [(file, (text, drawn))] = report.family_pictures(found).items()
    assert file == "p-laptop-x.png" and text.startswith("x over size; last values")
    _, panels = drawn.data
    assert [(p.title, p.xlabel, [*p.lines]) for p in panels] == [
        ("E", "size", ["both", "one"]),
        ("F", "size", ["both"]),
    ]
    sizes, values = panels[0].lines["one"]
    assert sizes.tolist() == [1, 4]
    assert values.tolist() == [[33, 32], [34, 33]], "runs in rows, in the order of the sizes"
    drawn.save(tmp_path / file)
    assert drawn.is_at(tmp_path / file) and min(Image.open(tmp_path / file).size) > 100
    for record in records.values():
        record["scores"]["m"]["last"] += 1
    [(_, same)] = report.family_pictures(found).values()
    assert same.is_at(tmp_path / file), "of these metrics only"
    records["one__E__1"]["scores"]["eval/x@4"]["last"] += 1
    [(_, other)] = report.family_pictures(found).values()
    assert not other.is_at(tmp_path / file)


CURVES = {  # seed: value of "m" and of "k@2" at steps 100 to 400
    1: ([1.0, 4.0, 2.0, 9.0], [5.0, 6.0, 7.0, 8.0]),
    2: ([1.0, 8.0, 6.0, 3.0], [1.0, 2.0, 3.0, 4.0]),
    3: ([1.0, 1.0, 1.0, 1.0], [9.0, 8.0, 7.0, 6.0]),
}


@pytest.fixture
def with_curves(tmp_path):
    """Evidence of three runs with the curves above, for claims that are given as a dictionary."""

    def make(claim, picture=None):
        about = {"title": "t", "authors": "a", "year": 2026, "link": "l"}
        base = {"script": "ppo", "laptop": "", "metrics": ["m", "k@2"]}
        runs = [base | {"name": "new", "paper": ""}, base | {"name": "old"}]
        words = {"id": "c", "statement": "s", "source": "s", "run": "new", "metric": "m", "low": 0}
        paper = Paper(
            paper=about,
            scales={name: {"seeds": 3, "about": "x"} for name in ("laptop", "paper")},
            runs=runs,
            claims=[words | claim],
            pictures=[picture] if picture else [],
        )
        planned, records = [], {}
        for seed, columns in CURVES.items():
            job = run.job("p", "laptop", paper.run("new"), "", seed, [], tmp_path)
            rows = zip((100, 200, 300, 400), *columns, strict=True)
            text = "step,m,k@2\n" + "".join(f"{s},{m},{k}\n" for s, m, k in rows)
            path = tmp_path / "p" / "laptop" / f"{job.name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            planned.append(job)
            scores = {key: {"last": c[-1]} for key, c in zip(job.metrics, columns, strict=True)}
            records[job.name] = {"state": "done", "command": shlex.join(job.command())}
            records[job.name]["scores"] = scores
        return report.Evidence("p", paper, "laptop", records, planned, tmp_path)

    return make


@pytest.mark.parametrize(
    ("claim", "scores"),
    [
        ({"score": "mean"}, [4.0, 4.5, 1.0]),
        ({"score": "mean", "step": 200}, [5.5, 4.5, 1.0]),  # the stretch that ends there is over
        ({"score": "at_step", "step": 240}, [4.0, 8.0, 1.0]),
        # the last values of k@2 are 8, 4 and 6, so half of their mean is 3; one run stays below it
        ({"score": "steps_to", "share": 0.5, "share_of": "k@2"}, [200, 200, 400]),
        ({"score": "last"}, [9.0, 3.0, 1.0]),
    ],
)
def test_scores_of_curves(claim, scores, with_curves):
    found = with_curves(claim)
    assert found.claim_scores(found.paper.claims[0], "new", "").tolist() == scores


@pytest.mark.parametrize("share", [-0.5, 5.0])
def test_level_that_no_run_reaches_says_nothing(share, with_curves):
    found = with_curves({"score": "steps_to", "share": share, "share_of": "k@2"})
    with pytest.raises(ValueError, match="no run reaches"):
        found.claim_scores(found.paper.claims[0], "new", "")


def test_picture_of_the_best_evaluation(with_curves):
    picture = {"name": "x", "metric": "k@*", "xlabel": "size", "about": "k", "best_of": "m"}
    [(text, drawn)] = report.family_pictures(with_curves({}, picture)).values()
    _, [panel] = drawn.data
    assert "where m was highest" in text
    assert panel.lines["new"][1].tolist() == [[8.0], [2.0], [9.0]], "the first of equal ones"


def test_claims_name_the_largest_scale_that_runs_all_of_them(with_curves, monkeypatch):
    """The baseline has no part in the scale "paper"."""
    found = with_curves({"baseline": "old", "effect": "difference"})
    paper = found.paper
    jobs = [run.job("p", "paper", paper.run("new"), "", 1, [], found.folder)]
    larger = report.Evidence("p", paper, "paper", {}, jobs, found.folder)
    both = [*found.planned, run.job("p", "laptop", paper.run("old"), "", 1, [], found.folder)]
    found = report.Evidence("p", paper, "laptop", {}, both, found.folder)
    claims = [report.judge(claim, {}) for claim in paper.claims]
    monkeypatch.setattr(report.papers, "load", lambda name: paper)
    page = report.page("p", {"paper": larger, "laptop": found}, claims, [])
    assert "run p --scale laptop --only c`" in page


def test_every_command_of_the_pages_has_something_to_run():
    commands = []
    for path in (report.DOCS / "benchmark").glob("*.md"):
        commands += re.findall(r"`python -m benchmark run ([^`]+)`", path.read_text())
    for words in commands:
        name, _, scale, _, claim = words.split()
        assert run.plan(name, scale, only=claim)
    assert len(commands) > 50


def test_committed_pages_match_results():
    texts, images = report.build(results.RESULTS, report.ORDER[:2])
    stale = [path for path, text in texts.items() if report.read(report.DOCS / path) != text]
    stale += [p for p, image in images.items() if not image.is_at(report.DOCS / p)]
    assert not stale, "python -m benchmark report writes them"


# ------------------------------------------------------------------------------- SPEED


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("grpo --steps 3", "--steps 3: at least 4"),
        ("grpo --micro-batch 0", "--micro-batch 0: want a divisor of 64"),
        ("grpo --micro-batch 24", "--micro-batch 24: want a divisor of 64"),
        ("grpo", "make peers"),
        ("sac", "--cleanrl FOLDER"),
        ("td3 --cleanrl no/folder", "--cleanrl FOLDER"),
        ("td3 --steps 1500", "--steps 1500: at least 1600"),
        ("update --updates 3", "--updates 3: an even number"),
    ],
)
def test_speed_refuses(words, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PEERS_PYTHON", tmp_path / "python")
    with pytest.raises(UserError, match=reason):
        speed.main(words.split())


def test_reward_of_speed_grpo():
    assert speed.answer_share(["", ""], ["a50b", ""], ["50", "1"], level=[1, 2]) == [0.5, 0.0]


def test_cost_of_a_token_without_warm_up():
    parts = {part: [9.0, 9.0, 1.0, 0.5] for part in speed.PARTS}
    found = speed.per_token(parts | {"seconds": [9.0, 9.0, 3.0, 2.0], "tokens": [1, 1, 6, 4]}, 2)
    assert found == {"seconds": 0.5} | dict.fromkeys(speed.PARTS, 0.15)


def test_rates_are_compared_in_pairs(capsys):
    speed.print_rates({"ours": [30.0, 40.0, 10.0], "peer": [10.0, 20.0, 10.0]})
    assert "ours / peer 2.00x [1.00, 3.00] over 3 pairs; steps/s ours 30" in capsys.readouterr().out


def test_share_counts_updates_with_and_without_the_actor(tmp_path, monkeypatch, capsys):
    """In every second update of the script there is twice the work."""
    (tmp_path / "delayed.py").write_text(DELAYED)
    monkeypatch.setitem(sys.modules, "script", None)
    with pytest.raises(SystemExit):
        flops.main(str(tmp_path / "delayed.py"), 4, 1, [])
    found = json.loads(capsys.readouterr().out)
    assert found["flops"] == [2000, 4000, 2000, 4000] and len(found["seconds"]) == 4


DELAYED = """
from dataclasses import dataclass

import torch

@dataclass
class Args:
    updates: int = 50

def update(number):
    a = torch.ones(10, 10 + 10 * (number % 2))
    return a @ a.T

def main(args):
    for number in range(args.updates):
        update(number)
"""


def test_peak_memory_is_that_of_the_script_alone(tmp_path):
    held = bytearray(2**28)  # this process must not count
    held[:: 2**12] = b"1" * 2**16
    printed, peak = speed.run_script(["-c", "print(len(b'1' * 2**27))"], tmp_path)
    assert printed == str(2**27) and 2**27 < peak < len(held)


# ------------------------------------------------------------------------------- REAL SCRIPTS


@pytest.fixture
def copy_of_folio(tmp_path):
    """All of it, with run directories and results of its own."""
    root = tmp_path / "folio"
    for name in ("algos", "benchmark", "envs", "rlhf"):
        copy_folder(name, root)
    return root


def real(root, *words, code=0):
    with Command(root, *words) as command:
        ended, out, err = command.finish(timeout=900)
    assert ended == code, out + err
    return out, err


def test_from_runs_to_pages(copy_of_folio, tmp_path):
    root, to = copy_of_folio, tmp_path / "results"
    docs = tmp_path / "docs"
    real(root, "run", "ppo", "--scale", "smoke", "--seeds", 1, "--results", to)
    found = results.records(to, "ppo", "smoke")
    assert len(found) == 6 and all(record["state"] == "done" for record in found.values())
    assert all(record["scores"]["charts/episodic_return"]["count"] > 0 for record in found.values())
    real(root, "report", "--smoke", "--results", to, "--docs", docs)
    page = (docs / "benchmark" / "ppo.md").read_text()
    pictures = re.findall(r"\]\(images/(.*?)\)", page)
    assert pictures == ["ppo-smoke-curves-ppo.png", "ppo-smoke-curves-ppo_continuous_action.png"]
    for name in pictures:
        assert min(Image.open(docs / "benchmark" / "images" / name).size) > 100
    for record in found.values():
        assert f"| {record['env']} | 1 | " in page
    # one seed is no verdict
    claims = (docs / "benchmark" / "scoreboard.md").read_text()
    assert "0 reproduced, 0 not reproduced, 0 inconclusive, " in claims
    assert re.search(r"not run.*\(smoke: 1 of 3 runs so far\)", claims)
    assert (docs / "diffs" / "ppo_continuous_action.md").exists()
    check = ["report", "--check", "--smoke", "--results", to, "--docs", docs]
    real(root, *check)
    curve = to / "ppo" / "smoke" / "classic_control__CartPole-v1__1.csv"
    curve.write_text(curve.read_text().replace("1", "2", 1))
    _, err = real(root, *check, code=1)
    assert "smoke.jsonl line" in err and "benchmark/ppo.md" in err and "Traceback" not in err


def test_compare_a_script_with_itself(copy_of_folio, tmp_path):
    root, out = copy_of_folio, tmp_path / "out"
    words = ["compare", "algos/ppo.py", "algos/ppo.py", "--seeds", 2, "--env-id", "CartPole-v1"]
    words += ["--args=--total-timesteps 1024 --eval-episodes 1", "--out", out]
    text, _ = real(root, *words)
    table = (out / "compare.md").read_text()
    assert table in text
    row = next(line for line in table.splitlines() if line.startswith("| CartPole-v1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["CartPole-v1", "2 + 2"]
    found = results.records(tmp_path, "out", "runs")
    scores = [
        [
            found[f"{side}__CartPole-v1__{seed}"]["scores"]["charts/episodic_return"]["last_100"]
            for seed in (1, 2)
        ]
        for side in "AB"
    ]
    assert scores[0] == scores[1], "same seeds, same runs"
    # of two runs, two of four resamples are one of them twice: the interval is their range
    low, high = sorted(scores[0])
    for cell in cells[2:4]:
        assert numbers_in(cell) == pytest.approx([(low + high) / 2, low, high], rel=1e-3)
    assert numbers_in(cells[4])[0] == 0.5
    seconds = [
        sum(found[f"{side}__CartPole-v1__{seed}"]["wall_seconds"] for seed in (1, 2)) / 2048
        for side in "AB"
    ]
    expected = [seconds[1] / seconds[0], seconds[1] * 1e6, seconds[0] * 1e6]
    assert numbers_in(cells[5]) == pytest.approx(expected, rel=0.01)
    assert min(Image.open(out / "compare.png").size) > 100

    # again: nothing runs; a script that was changed since does
    text, _ = real(root, *words)
    assert "4 runs, 4 of them done" in text and (out / "compare.md").read_text() == table
    (root / "algos" / "ppo.py").write_text('raise SystemExit("changed")\n')
    text, _ = real(root, *words, code=1)
    assert "4 runs, 0 of them done" in text


def numbers_in(cell):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell)]
