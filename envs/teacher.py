"""Episodes of the agent of another run, to learn from.

How it acts and what a state is worth to it, only the script that made it knows. So that one plays,
as a process: `python algos/SCRIPT.py --teach CHECKPOINT EPISODES SEED EVERY FILE`.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import torch

from envs import UserError
from envs.state import refuse_unsaved_state


def teacher_episodes(
    folder: Path | None, env: gym.Env, maker: Path, episodes: int, seed: int, save_every: int
) -> dict:
    """What `play_and_save` writes of the newest whole checkpoint of `folder`: a run, or itself one.

    It may be of any script with environments, which must lie beside maker, the script to be named
    where there is no teacher. env: of `make_env`, for the states. Raises UserError, one line, where
    no state of env can be saved; where there is no whole checkpoint; and where its agent acts in
    another environment, has diverged or cannot be played.
    """
    refuse_unsaved_state(env)  # before hours go into a teacher
    env_id = env.get_wrapper_attr("env_id")
    if folder is None:
        command = f"`python {maker.parent.name}/{maker.name} --env-id {env_id}`"
        raise UserError(f"--teacher RUN is missing: {command} makes one")
    path = _newest(folder)
    try:  # mmap leaves a replay buffer on the disk
        saved = torch.load(path / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
        theirs, weights = saved["args"]["env_id"], saved["agent"].values()
        finite = all(tensor.isfinite().all() for tensor in weights)
    except (AttributeError, KeyError, RuntimeError, TypeError):
        raise UserError(f"--teacher {path}: it is not of a script with environments") from None
    if theirs != env_id:
        raise UserError(f"--teacher {path}: its agent acts in {theirs}, not in --env-id {env_id}")
    if "script" not in saved:
        raise UserError(f"--teacher {path}: an older version made it; make it anew with this one")
    player = maker.parent / f"{saved['script']}.py"
    if player not in maker.parent.glob("*.py"):  # a checkpoint must not have anything else started
        raise UserError(f"--teacher {path}: its script, {player.name}, is not in {maker.parent}")
    if not finite:
        raise UserError(f"--teacher {path}: its weights are not all finite numbers")
    if os.environ.get("RANK", "0") == "0":
        print(f"teacher: {path} of {player.name}, sha256 of rank0.pt {_digest(path / 'rank0.pt')}")
    played = _played(player, path, episodes, seed, save_every)
    if not played["values"].isfinite().all():
        raise UserError(f"--teacher {path}: the values of its states are not all finite numbers")
    return played


def _played(player: Path, checkpoint: Path, episodes: int, seed: int, save_every: int) -> dict:
    """Each process of torchrun has them played anew: they are the same to the last bit."""
    # a signal must not leave the player behind: `subprocess.run` ends it with any exception
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "episodes.pt"
            plan = checkpoint, episodes, seed, save_every, file
            command = [sys.executable, str(player), "--teach", *map(str, plan)]
            alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
            done = subprocess.run(command, env=alone, capture_output=True, text=True)
            if done.returncode == 0 and file.exists():
                return torch.load(file, weights_only=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = [line.strip() for line in done.stderr.splitlines() if re.search("[a-z]", line)]
    reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
    raise UserError(f"--teacher {checkpoint}: {player.name} cannot play it: {reason}")


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
