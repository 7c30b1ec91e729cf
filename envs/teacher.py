"""Read the agent of another run, to learn from it."""

import hashlib
import json
import os
from pathlib import Path

import gymnasium as gym
import torch

from envs import UserError
from envs.state import refuse_unsaved_state


def load_teacher(folder: Path | None, env: gym.Env, agent: torch.nn.Module, script: str) -> dict:
    """Fill `agent` from the newest whole checkpoint of `folder`: a run, or one checkpoint.

    Returns all that rank 0 saved. env: of `make_env`, in which the teacher is to play and states
    are to be saved. script: which makes such agents. Raises UserError, one line, where no state of
    env can be saved; where there is no whole checkpoint; and where its agent is of another
    algorithm, acts in another environment or has diverged.
    """
    refuse_unsaved_state(env)  # before hours go into a teacher
    env_id = env.get_wrapper_attr("env_id")
    maker = f"`python algos/{script}.py --env-id {env_id}` makes one"
    if folder is None:
        raise UserError(f"--teacher RUN is missing: {maker}")
    paths = [folder, *sorted(folder.glob("checkpoints/*[0-9]"), reverse=True)]
    path = next((path for path in paths if _is_whole(path)), None)
    if path is None:
        flaw = "all its checkpoints are damaged" if len(paths) > 1 else "no whole checkpoint there"
        raise UserError(f"--teacher {folder}: {flaw}; give the folder of a run")
    try:  # mmap leaves a replay buffer on the disk
        saved = torch.load(path / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
        theirs = saved["args"].get("env_id"), saved["args"].get("action_repeat", 1)
        if theirs != (env_id, 1):
            text = f"acts in {theirs[0]} with action repeat {theirs[1]}, not in --env-id {env_id}"
            raise UserError(f"--teacher {path}: {text}")
        agent.load_state_dict(saved["agent"])
    except (AttributeError, KeyError, RuntimeError, TypeError):
        raise UserError(f"--teacher {path}: its agent is of another algorithm; {maker}") from None
    if not all(tensor.isfinite().all() for tensor in agent.state_dict().values()):
        raise UserError(f"--teacher {path}: its weights are not all finite numbers")
    if os.environ.get("RANK", "0") == "0":
        print(f"teacher: {path}, sha256 of rank0.pt {_digest(path / 'rank0.pt')}")
    return saved


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
