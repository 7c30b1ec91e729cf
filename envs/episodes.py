"""Whole episodes for evaluation, side by side, with decisions that last several steps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np

from envs.make import make_env

LONGEST_RANDOM = 16
Decide = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def make_episodes(env_id: str, number: int, video_dir: Path | None = None) -> list[gym.Env]:
    """Environments for as many episodes; video_dir: where to record the first one."""
    return [make_env(env_id, None if i else video_dir) for i in range(number)]


def play_episodes(
    envs: list[gym.Env], seed: int, lengths: Sequence[int | None], decide: Decide
) -> np.ndarray:
    """Returns (len(lengths), len(envs)) of an episode in each environment; then closes them.

    Episode i starts from seed + i at every length. decide(obs (n, O), previous (n, A), steps) gives
    the actions (n, steps, A) of n episodes that wait for a decision; previous: the action taken
    last, 0 at the start. A decision lasts `length` steps; None draws that of each anew, uniformly
    from 1 to 16. What is left of it at the end of an episode is dropped.
    """
    returns = np.stack([_play(envs, seed, length, decide) for length in lengths])
    for env in envs:
        env.close()
    return returns


def _play(envs: list[gym.Env], seed: int, length: int | None, decide: Decide) -> np.ndarray:
    shape, generator = envs[0].action_space.shape, np.random.default_rng(seed)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    previous = np.zeros((len(envs), int(np.prod(shape))), np.float32)
    plans, returns = [()] * len(envs), np.zeros(len(envs))
    running = list(range(len(envs)))
    while running:
        waiting = [i for i in running if len(plans[i]) == 0]
        if waiting:
            drawn = generator.integers(1, LONGEST_RANDOM + 1, len(waiting))
            steps = drawn if length is None else np.full(len(waiting), length)
            actions = decide(obs[waiting], previous[waiting], steps.max())
            for i, plan, count in zip(waiting, actions, steps, strict=True):
                plans[i] = plan[:count]
        ended = []
        for i in running:
            action, plans[i] = plans[i][0], plans[i][1:]
            obs[i], reward, terminated, truncated, _ = envs[i].step(action.reshape(shape))
            previous[i] = action
            returns[i] += reward
            if terminated or truncated:
                ended.append(i)
        running = [i for i in running if i not in ended]
    return returns
