"""Environments by name, with observations that are flat vectors."""

import math
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs import UserError


def _mujoco_warning(message: str) -> None:
    # MuJoCo 3.10 and later complain about gymnasium's own XML files, at every start.
    if "deprecated" not in message:
        print(f"MuJoCo: {message}", file=sys.stderr)


mujoco.set_mju_user_warning(_mujoco_warning)


class FiniteReward(gym.Wrapper):
    """Raises UserError for a reward that is no finite number, before an agent learns from it."""

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.env_id = env_id

    def step(self, action):
        transition = self.env.step(action)
        if not math.isfinite(transition[1]):
            raise UserError(f"--env-id {self.env_id}: a reward is not a finite number")
        return transition


class ActionRepeat(gym.Wrapper):
    """Takes each action `times` steps, or to the end of the episode; rewards are summed.

    steps_taken: how many they were the last time.
    """

    def __init__(self, env: gym.Env, times: int):
        super().__init__(env)
        self.times, self.steps_taken = times, 0

    def step(self, action):
        total = 0.0
        for step in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            self.steps_taken = step + 1
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class AfterReset(gym.Wrapper):
    """Calls begin(env, obs) after each reset; it returns the observation to start from."""

    def __init__(self, env: gym.Env, begin):
        super().__init__(env)
        self.begin = begin

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.begin(self.env, obs), info


def make_env(env_id: str, video_dir: Path | None = None, action_repeat: int = 1) -> gym.Env:
    """One environment with a one-dimensional Box observation; time limits as registered.

    video_dir: record the first episode there. action_repeat: of every action; a time limit still
    counts steps of the environment. Raises UserError for a name that gymnasium does not know, and
    where the simulator or the recorder is not installed.
    """
    render_mode = "rgb_array" if video_dir else None
    try:
        # The passive checker only warns; it would cost a check of every step's types.
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
        env = FiniteReward(env, env_id)
    except (gym.error.Error, ModuleNotFoundError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--env-id {env_id}: {reason}") from error
    if (
        not isinstance(env.observation_space, gym.spaces.Box)
        or len(env.observation_space.shape) != 1
    ):
        if not env.observation_space.is_np_flattenable:
            raise UserError(
                f"--env-id {env_id}: observations of {env.observation_space} cannot be flattened"
            )
        env = gym.wrappers.FlattenObservation(env)
    if video_dir:
        try:
            env = gym.wrappers.RecordVideo(
                env, str(video_dir), lambda i: i == 0, disable_logger=True
            )
        except gym.error.DependencyNotInstalled as error:
            raise UserError("--capture-video: pip install moviepy") from error
    return ActionRepeat(env, action_repeat) if action_repeat > 1 else env


def make_vector_env(
    env_id: str, num_envs: int, action_repeat: int = 1, begin=None
) -> SyncVectorEnv:
    """`num_envs` copies stepped in turn; begin: see `AfterReset`.

    SAME_STEP: a finished episode resets within the step that ends it. The step returns the first
    observation of the next episode; `infos["final_obs"]` holds the last one of the old episode.
    """

    def make():
        env = make_env(env_id, None, action_repeat)
        return AfterReset(env, begin) if begin else env

    return SyncVectorEnv(
        [make] * num_envs,
        copy=False,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
