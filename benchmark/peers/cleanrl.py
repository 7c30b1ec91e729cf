"""Run a script of a CleanRL checkout under gymnasium 1.x: cleanrl.py SCRIPT FLAGS...

CleanRL is pinned to gymnasium 0.29, where the third argument of TransformObservation was optional.
"""

import runpy
import sys

import gymnasium as gym


class TransformObservation(gym.wrappers.TransformObservation):
    def __init__(self, env, func, observation_space=None):
        super().__init__(env, func, observation_space or env.observation_space)


if __name__ == "__main__":
    gym.wrappers.TransformObservation = TransformObservation
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
