"""Run a script of a CleanRL checkout under gymnasium 1.x: cleanrl.py SCRIPT FLAGS...

CleanRL is pinned to gymnasium 0.29. There the third argument of TransformObservation was optional,
an episode's end and the next reset fell into one step, and infos had other names and shapes.
"""

import runpy
import sys
from pathlib import Path

import gymnasium as gym
from gymnasium.vector import AutoresetMode


class TransformObservation(gym.wrappers.TransformObservation):
    def __init__(self, env, func, observation_space=None):
        super().__init__(env, func, observation_space or env.observation_space)


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions):
        *results, infos = super().step(actions)
        if "final_obs" in infos:
            episodes, ended = infos["final_info"]["episode"], infos["_final_obs"]
            infos["final_observation"] = infos["final_obs"]
            infos["final_info"] = [
                {"episode": {name: episodes[name][i] for name in "rl"}} if end else None
                for i, end in enumerate(ended)
            ]
        return *results, infos


if __name__ == "__main__":
    gym.wrappers.TransformObservation = TransformObservation
    if Path(sys.argv[1]).stem.startswith(("sac", "td3")):  # the PPO scripts cope with NEXT_STEP
        gym.vector.SyncVectorEnv = SyncVectorEnv
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parents[1]))  # cleanrl_utils
    runpy.run_path(sys.argv[0], run_name="__main__")
