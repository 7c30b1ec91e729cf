"""Start scripts the way people do, and read what they leave behind."""

import csv
import functools
import hashlib
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
# The exact contracts hold on the CPU; one thread a process, since tests run side by side.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# PyTorch compiles for a CPU with the machine's own compiler, which no pin can install
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++"), reason="--compile needs a C++ compiler"
)
TIMES = (
    "charts/SPS",
    "charts/tokens_per_second",
    *(f"charts/seconds_{s}" for s in ("generate", "score", "update")),
)


def command(script, processes, *flags):
    path = str(ROOT / "algos" / f"{script}.py")
    if processes == 1:
        return [sys.executable, path, *map(str, flags)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(processes), path, *map(str, flags)]


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    "tests.launch torch._dynamo torch.distributed.checkpoint torch.utils.tensorboard tyro "
    "gymnasium.envs.mujoco sklearn.cluster peft".split()
)


class Forked(FORKSERVER.Process):
    """`python WORDS` without the seconds in which Python reads PyTorch: a server has read it."""

    def __init__(self, words, outputs, before):
        """outputs: files of stdout and stderr; before: a function to call before the script."""
        super().__init__()
        self.words, self.outputs, self.before = words, outputs, before
        # the first start starts the server, perhaps within a test that has set variables
        with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
            self.start()

    def run(self):
        for descriptor, path in enumerate(self.outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(ROOT)
        sys.argv = self.words
        others = [path for path in sys.path if path and Path(path) != ROOT]
        sys.path = [str(Path(self.words[0]).parent), *others]
        if self.before:
            self.before()
        try:
            runpy.run_path(self.words[0], run_name="__main__")
        except Exception:
            sys.excepthook(*sys.exc_info())
            sys.exit(1)

    def poll(self):
        return self.exitcode

    def wait(self, timeout):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.exitcode


class Run:
    """A script that runs in the background; its whole process tree ends with the block."""

    def __init__(self, script, processes, *flags, fresh=False, before=None):
        """fresh: by an interpreter of its own, as torchrun starts it too; before: see Forked."""
        words = command(script, processes, *flags)
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        if fresh or processes > 1:
            with self.outputs[0].open("w") as out, self.outputs[1].open("w") as err:
                self.process = subprocess.Popen(
                    words, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=err
                )
        else:
            self.process = Forked(words[1:], self.outputs, before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
        self.folder.cleanup()

    def finish(self, timeout=300):
        """Wait; returns exit code, stdout, stderr."""
        code = self.process.wait(timeout)
        return code, *(path.read_text() for path in self.outputs)

    def poll_until(self, condition, timeout=300):
        """Wait for `condition`, looking often enough to catch any moment of an update."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended too early: {self.finish()}")
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.001)

    def ranks(self):
        """{rank: pid} of the processes that torchrun started."""
        found = {}
        for pid in descendants(self.process.pid):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
        return found

    def kill(self):
        """SIGKILL to the whole tree at once, as when a machine goes down."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        return self.process.wait(10)


def descendants(pid):
    """Children of `pid` and theirs. torchrun gives each rank its own process group."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def run(script, processes, *flags, timeout=300, fresh=False):
    """Run to the end, which must be a good one. Returns stdout and stderr."""
    with Run(script, processes, *flags, fresh=fresh) as started:
        code, out, err = started.finish(timeout)
    assert code == 0, f"{command(script, processes, *flags)} gave {code}:\n{err[-3000:]}"
    return out, err


def in_two_processes(function, *arguments):
    """Call function(rank, *arguments) in two processes, which form a process group."""
    port = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False).port
    mp.spawn(call_in_group, (port, function, arguments), nprocs=2)


def call_in_group(rank, port, function, arguments):
    from algos import ppo  # not above: the server of Forked reads this module, its scripts theirs

    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
        ppo.setup_process("cpu")
    torch.set_num_threads(1)
    function(rank, *arguments)


@functools.cache
def prepare(module):
    """`python -m MODULE`, which may hold arguments, once in this process."""
    subprocess.run([sys.executable, "-m", *module.split()], cwd=ROOT, check=True)


def checkpoints(run_dir):
    """Complete checkpoints, the oldest first."""
    return sorted((run_dir / "checkpoints").glob("*[0-9]"))


def rows(run_dir):
    """metrics.csv without what depends on the clock: a list of (step, key, value)."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["step", "key", "value"]
    return [(int(s), key, float(value)) for s, key, value in table[1:] if key not in TIMES]


def content(checkpoint):
    """{path: leaf} of everything in a checkpoint, less the arguments of the run."""
    leaves = {}
    for file in sorted(checkpoint.rglob("*.pt")):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        collect(saved, file.name, leaves)
    for file in sorted(checkpoint.rglob("*.safetensors")):
        collect(load_file(file), file.name, leaves)
    assert any(isinstance(leaf, torch.Tensor) for leaf in leaves.values())
    own = re.compile(r"/(args|log_size)(/|$)")  # of this folder and of this run's clock
    return {path: leaf for path, leaf in leaves.items() if not own.search(path)}


def collect(tree, path, leaves):
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in pairs:
            collect(child, f"{path}/{key}", leaves)
    else:
        leaves[path] = tree


def assert_same_run(run_dir, other):
    """Equal to the last bit: everything in the last checkpoint, and the logs."""
    mine, theirs = checkpoints(run_dir)[-1], checkpoints(other)[-1]
    assert mine.name == theirs.name
    a, b = content(mine), content(theirs)
    assert a.keys() == b.keys()
    different = [path for path in a if not same(a[path], b[path])]
    assert not different, f"{len(different)} of {len(a)} leaves differ: {different[:5]}"
    assert rows(run_dir) == rows(other)


def same(a, b):
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        # by bytes, so that a NaN equals itself and 0.0 is not -0.0
        return equal and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    return type(a) is type(b) and repr(a) == repr(b)


def digests(folder):
    """{path: digest} of all files, to see that nothing was touched."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
