"""Episodes of the agent of another run, to learn from.

How it acts and what a state is worth to it, only the script that made it knows. So that one plays,
as a process: `python algos/SCRIPT.py --teach CHECKPOINT EPISODES SEED EVERY FILE`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import torch

from envs import UserError
from envs.state import refuse_unsaved_state

SCRIPTS = Path(__file__).resolve().parents[1] / "algos"


def teacher_episodes(
    folder: Path | None, env: gym.Env, script: str, episodes: int, seed: int, save_every: int
) -> dict:
    """What `play_and_save` writes of the newest whole checkpoint of `folder`: a run, or itself one.

    It may be of any script with environments. env: of `make_env`, for the states. script: one
    that makes teachers, to be named where there is none. Raises UserError, one line, where no state
    of env can be saved; where there is no whole checkpoint; and where its agent acts in another
    environment, has diverged or cannot be played.
    """
    refuse_unsaved_state(env)  # before hours go into a teacher
    env_id = env.get_wrapper_attr("env_id")
    if folder is None:
        maker = f"`python algos/{script}.py --env-id {env_id}`"
        raise UserError(f"--teacher RUN is missing: {maker} makes one; runs of others will do, too")
    path = _newest(folder)
    # mmap leaves a replay buffer on the disk
    saved = torch.load(path / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
    theirs = saved["args"].get("env_id")
    if theirs != env_id:
        acts = f"acts in {theirs}" if theirs else "acts in no environment"
        raise UserError(f"--teacher {path}: its agent {acts}, not in --env-id {env_id}")
    if "script" not in saved:
        raise UserError(f"--teacher {path}: an older version made it, without its script's name")
    player = SCRIPTS / f"{saved['script']}.py"
    if player not in SCRIPTS.glob("*.py"):  # a checkpoint must not have anything else started
        raise UserError(f"--teacher {path}: its script, {player.name}, is not in algos")
    if not all(tensor.isfinite().all() for tensor in saved["agent"].values()):
        raise UserError(f"--teacher {path}: its weights are not all finite numbers")
    if os.environ.get("RANK", "0") == "0":
        print(f"teacher: {path} of {player.name}, sha256 of rank0.pt {_digest(path / 'rank0.pt')}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "episodes.pt"
        plan = map(str, (path, episodes, seed, save_every, file))
        command = [sys.executable, str(player), "--device", "cpu", "--teach", *plan]
        # each process of torchrun has the episodes played anew: they are the same to the last bit
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[-1]
            raise UserError(f"--teacher {path}: {player.name} cannot play it: {reason}")
        return torch.load(file, weights_only=True)


def _newest(folder: Path) -> Path:
    paths = [folder, *sorted(folder.glob("checkpoints/*[0-9]"), reverse=True)]
    path = next((path for path in paths if _is_whole(path)), None)
    if path is None:
        flaw = "all its checkpoints are damaged" if len(paths) > 1 else "no whole checkpoint there"
        raise UserError(f"--teacher {folder}: {flaw}; give the folder of a run")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the manifest of a checkpoint names rank0.pt, and all that it names is unchanged."""
    try:
        digests = json.loads((path / "manifest.json").read_text())
        whole = all(_digest(path / name) == digest for name, digest in digests.items())
        return whole and "rank0.pt" in digests
    except (OSError, ValueError, AttributeError):
        return False
