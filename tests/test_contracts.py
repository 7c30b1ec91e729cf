"""The contracts of design.md, section 3, over every script in algos/."""

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.cases import CASES, case
from tests.launch import (
    ROOT,
    SCRIPTS,
    TIMES,
    Run,
    assert_same_run,
    checkpoints,
    digests,
    prepare,
    rows,
    run,
)

# Tests of one script share its reference runs, so one worker of pytest-xdist takes them all.
every_script = pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS]
)
one_and_two = pytest.mark.parametrize("processes", [1, 2], ids=["python", "torchrun"])


def smoke_flags(script, run_dir):
    if case(script).prepare:
        prepare(case(script).prepare)
    return [*case(script).smoke.split(), "--save-every", 0, "--run-dir", run_dir]


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """reference(script, processes): the folder of an uninterrupted smoke run."""
    done = {}

    def get(script, processes):
        if (script, processes) not in done:
            run_dir = tmp_path_factory.mktemp(f"{script}-{processes}") / "run"
            run(script, processes, *smoke_flags(script, run_dir), fresh=True)
            done[script, processes] = run_dir
        return done[script, processes]

    return get


@pytest.fixture
def copy(reference, tmp_path):
    """copy(script): a copy of its reference run by one process, to be damaged."""
    return lambda script: shutil.copytree(reference(script, 1), tmp_path / "copy")


def resume(script, processes, run_dir):
    return run(script, processes, *smoke_flags(script, run_dir), "--resume", "auto")


def one_line_error(script, *flags):
    """Run a script that must refuse its flags: one line, no traceback. Returns the line."""
    with Run(script, 1, *flags) as refused:
        code, _, err = refused.finish()
    assert code != 0
    assert "Traceback" not in err
    # transformers shows a bar while it loads a model; torch puts the rank in front of an error
    lines = [line for line in err.splitlines() if line.strip() and "it/s]" not in line]
    lines = [line.removeprefix("[rank0]: ") for line in lines]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_table_of_cases():
    missing = [name for name in SCRIPTS if name not in CASES]
    assert not missing, f"add an entry for {missing} to CASES in tests/cases.py"
    gone = [name for name in CASES if name not in SCRIPTS]
    assert not gone, f"tests/cases.py lists {gone}, which algos/ does not have"


@every_script
def test_help(script):
    """Within ten seconds of CPU; the clock would measure what else runs on the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, _ = run(script, 1, "--help", fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--resume" in out and "--run-dir" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@every_script
@one_and_two
def test_smoke_run(script, processes, reference):
    run_dir = reference(script, processes)
    assert len(checkpoints(run_dir)) == 2, "the last two are kept"
    assert not list(run_dir.rglob("*.partial"))
    assert list(run_dir.glob("events.out.tfevents*"))

    table = rows(run_dir)
    assert len({step for step, _, _ in table}) > 10
    assert any(key.startswith("losses/") for _, key, _ in table)
    assert len({step for step, key, _ in table if key.startswith("eval/")}) >= 2
    text = (run_dir / "metrics.csv").read_text()
    assert any(f",{key}," in text for key in TIMES)

    record = json.loads((run_dir / "args.json").read_text())
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short=4", "HEAD"], capture_output=True, text=True
    )
    if head.returncode == 0:
        assert head.stdout.strip() in record["commit"]
    assert {"torch", "numpy", "tyro"} <= record["packages"].keys()
    assert record["args"]["seed"] == 1
    flags = case(script).smoke.split()
    for flag, value in itertools.pairwise(flags):
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in record["args"] and not value.startswith("--"):
            assert str(record["args"][name]) == value


@every_script
def test_same_seed_same_parameters(script, reference, tmp_path):
    run(script, 1, *smoke_flags(script, tmp_path / "again"))
    assert_same_run(tmp_path / "again", reference(script, 1))


@every_script
def test_other_seed_other_parameters(script, reference, tmp_path):
    run(script, 1, *smoke_flags(script, tmp_path / "other"), "--seed", 2)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", reference(script, 1))


@every_script
@one_and_two
def test_killed_and_resumed_equals_uninterrupted(script, processes, reference, tmp_path):
    uninterrupted, run_dir = reference(script, processes), tmp_path / "run"
    chance = random.Random(f"{script} {processes}")
    steps = sorted({step for step, key, _ in rows(uninterrupted) if key.startswith("losses/")})
    goal = chance.choice(steps[: len(steps) // 2])
    with Run(script, processes, *smoke_flags(script, run_dir)) as killed:
        killed.poll_until(
            lambda: checkpoints(run_dir) and int(checkpoints(run_dir)[-1].name) >= goal
        )
        time.sleep(chance.uniform(0, 0.1))  # any moment of an update, or of the next checkpoint
        assert killed.kill() == -signal.SIGKILL
    reached = checkpoints(run_dir)[-1]
    assert goal <= int(reached.name) < steps[-1], "killed too late to test anything"
    # What a process leaves that dies while it writes.
    partial = checkpoints(uninterrupted)[-1].name + ".partial"
    (run_dir / "checkpoints" / partial).mkdir()
    (run_dir / "checkpoints" / partial / "rank0.pt").write_bytes(b"half a")
    resume(script, processes, run_dir)
    assert_same_run(run_dir, uninterrupted)


@every_script
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_is_named_and_skipped(script, damage, copy, reference):
    run_dir = copy(script)
    newest = checkpoints(run_dir)[-1]
    files = [path for path in newest.rglob("*") if path.is_file() and path.suffix != ".json"]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "altered":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    # by its path: refused
    line = one_line_error(script, *smoke_flags(script, run_dir), "--resume", newest)
    assert newest.name in line and file.name in line
    # by "auto": the one before, to the same end
    _, err = resume(script, 1, run_dir)
    named = [line for line in err.splitlines() if str(newest) in line and "damaged" in line]
    assert len(named) == 1, err
    assert_same_run(run_dir, reference(script, 1))


@every_script
def test_no_valid_checkpoint(script, copy):
    """A run that cannot go on is left as it is; it does not start anew over its own logs."""
    run_dir = copy(script)
    for checkpoint in checkpoints(run_dir):
        (checkpoint / "manifest.json").write_text("{")
    before = digests(run_dir)
    with Run(script, 1, *smoke_flags(script, run_dir), "--resume", "auto") as refused:
        code, _, err = refused.finish()
    assert code != 0 and "Traceback" not in err
    assert sum("error: " in line and "damaged" in line for line in err.splitlines()) == 1
    assert digests(run_dir) == before


@every_script
def test_resume_of_a_finished_run_gives_the_same_score(script, copy, reference):
    run_dir = copy(script)
    before = (run_dir / "metrics.csv").read_text()
    resume(script, 1, run_dir)
    assert (run_dir / "metrics.csv").read_text() == before
    assert_same_run(run_dir, reference(script, 1))


@every_script
@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_signal_writes_a_checkpoint(script, number, processes, reference, tmp_path):
    uninterrupted, run_dir = reference(script, processes), tmp_path / "run"
    # no checkpoint falls due by itself before the first evaluation
    flags = [*smoke_flags(script, run_dir), "--save-every", 10_000]
    with Run(script, processes, *flags) as stopped:
        stopped.poll_until(lambda: checkpoints(run_dir))
        os.kill(stopped.process.pid, number)
        code, out, err = stopped.finish()
    assert code != 0
    if processes == 1:
        assert code == 128 + number
    assert "Traceback" not in err or processes > 1  # torchrun reports any failed rank in its way
    newest = checkpoints(run_dir)[-1]
    assert 0 < int(newest.name) < int(checkpoints(uninterrupted)[-1].name)
    assert str(newest) in out + err
    resume(script, processes, run_dir)
    assert_same_run(run_dir, uninterrupted)


def wait_for_end(process, seconds):
    """Until it is gone, or a zombie that torchrun has not noticed yet."""
    end = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while (status := process.status()) != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"{process} is {status} after {seconds} seconds"
            time.sleep(0.05)


@every_script
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_others(script, victim, tmp_path):
    run_dir = tmp_path / "run"
    with Run(script, 2, *smoke_flags(script, run_dir)) as wounded:
        wounded.poll_until(lambda: len(checkpoints(run_dir)) == 2)
        ranks = wounded.ranks()
        assert sorted(ranks) == [0, 1]
        survivor = psutil.Process(ranks[1 - victim])
        os.kill(ranks[victim], signal.SIGKILL)
        # PITFALL: in about one of a hundred deaths gloo leaves the other rank waiting in a barrier;
        # torchrun kills it after 30 seconds
        wait_for_end(survivor, 60)
        code, _, _ = wounded.finish()
        assert code != 0
        assert not survivor.is_running()


BAD_INPUT = [
    pytest.param(name, flags, words, marks=pytest.mark.xdist_group(name), id=f"{name} {flags}")
    for name in SCRIPTS
    if name in CASES
    for flags, words in CASES[name].bad.items()
]


@pytest.mark.parametrize(("script", "flags", "words"), BAD_INPUT)
def test_bad_input(script, flags, words, tmp_path):
    line = one_line_error(script, *smoke_flags(script, tmp_path / "run"), *flags.split())
    assert words in line
    assert not (tmp_path / "run").exists()


@every_script
def test_run_directory_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").write_text("precious")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(run_dir) in one_line_error(script, *smoke_flags(script, run_dir))
    assert (tmp_path / "file").read_text() == "precious"


@every_script
def test_run_directory_that_holds_a_run(script, reference):
    run_dir = reference(script, 1)
    before = digests(run_dir)
    line = one_line_error(script, *smoke_flags(script, run_dir))
    assert str(run_dir) in line and "--resume auto" in line
    assert digests(run_dir) == before


@every_script
def test_resume_with_changed_arguments(script, reference):
    run_dir, changed = reference(script, 1), case(script).changed
    before = digests(run_dir)
    flags = [*smoke_flags(script, run_dir), *changed.split(), "--resume", "auto"]
    assert changed.split()[0].removeprefix("--").replace("-", "_") in one_line_error(script, *flags)
    assert digests(run_dir) == before


@every_script
def test_resume_by_another_number_of_processes(script, reference):
    run_dir = reference(script, 2)
    before = digests(run_dir)
    line = one_line_error(script, *smoke_flags(script, run_dir), "--resume", "auto")
    assert "2 processes" in line
    assert digests(run_dir) == before


def almost_fill_disk():
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1000)


def assert_refused_before_training(run, run_dir):
    code, _, err = run.finish()
    assert code != 0 and "Traceback" not in err, err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and str(run_dir) in errors[0], err
    metrics = run_dir / "metrics.csv"
    assert not metrics.exists() or "losses/" not in metrics.read_text()


@every_script
def test_almost_full_disk(script, tmp_path):
    flags = smoke_flags(script, tmp_path / "run")
    with Run(script, 1, *flags, before=almost_fill_disk) as refused:
        assert_refused_before_training(refused, tmp_path / "run")


@every_script
@pytest.mark.parametrize("room", [0, 0.5, 1.5], ids="room for {} checkpoints".format)
def test_full_disk(script, room, reference, tmp_path):
    size = sum(path.stat().st_size for path in checkpoints(reference(script, 1))[-1].rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    pages = 2 + int(room * size) // 4096  # a tmpfs of size 0 would have no bound
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with Run(script, 1, *smoke_flags(script, disk / "run")) as refused:
            assert_refused_before_training(refused, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@every_script
def test_learns(script, tmp_path):
    if case(script).prepare:
        prepare(case(script).prepare)
    started, (key, score) = time.monotonic(), case(script).score
    flags = [*case(script).learning.split(), "--run-dir", tmp_path / "run"]
    run(script, case(script).processes, *flags, timeout=600)
    value = [value for _, name, value in rows(tmp_path / "run") if name == key][-1]
    print(f"{script}: {key} {value:.1f} after {time.monotonic() - started:.0f} s")
    assert value >= score
