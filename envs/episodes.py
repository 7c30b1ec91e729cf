"""Whole episodes with a frozen agent, whose decisions may last several steps."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from envs.make import make_env
from envs.state import env_state, stack_states

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


def play_and_save(
    env: gym.Env,
    decide: Decide,
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    length: int,
    episodes: int,
    seed: int,
    save_every: int,
    file: Path,
) -> None:
    """Play one episode after the other and write every `save_every`-th state to `file`.

    Episode i starts from seed + i; the states are counted through all episodes, from 0. decide:
    as in `play_episodes`, but observations keep their type; a decision lasts `length` steps.
    value(obs (S, O), actions (S, A)) gives the values (S,) of the saved states, with the actions
    taken in them. The file gets "returns" (episodes,), "values" and, for `restore`, "obs" (S, O)
    and "states". Closes env.
    """
    saved, steps, returns = [], 0, np.zeros(episodes)
    shape = env.action_space.shape
    for i in range(episodes):
        obs, _ = env.reset(seed=seed + i)
        action, plan, done = np.zeros(math.prod(shape), np.float32), [], False
        while not done:
            if len(plan) == 0:
                plan = decide(obs[None], action[None], length)[0]
            action, plan = plan[0], plan[1:]
            if steps % save_every == 0:
                state = env_state(env)
                # or all episodes that start in this state would meet the same chance
                del state["generator"]
                saved.append((obs.copy(), action, state))
            obs, reward, terminated, truncated, _ = env.step(action.reshape(shape))
            returns[i] += reward
            steps += 1
            done = terminated or truncated
    env.close()
    observations, actions, states = zip(*saved, strict=True)
    obs, actions = torch.from_numpy(np.stack(observations)), torch.from_numpy(np.stack(actions))
    with torch.no_grad():
        written = {"returns": torch.from_numpy(returns), "values": value(obs, actions)}
    torch.save(written | {"obs": obs, "states": stack_states(states)}, file)


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
