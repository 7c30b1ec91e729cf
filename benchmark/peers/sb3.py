"""PPO of Stable-Baselines3 with CleanRL's hyperparameters: sb3.py --env-id E --total-timesteps N

Its clipped value loss takes no maximum, and its learning rate is one rollout ahead; the work of a
step is the same. Prints steps a second since the start after each rollout and its update, as
CleanRL's script does.
"""

import argparse
import time

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


class Speed(BaseCallback):
    def _on_training_start(self):
        self.start = time.perf_counter()

    def _on_rollout_start(self):  # the update of the rollout before it is over
        if self.num_timesteps:
            print(f"SPS: {self.num_timesteps / (time.perf_counter() - self.start):.4f}")

    def _on_training_end(self):
        self._on_rollout_start()

    def _on_step(self):
        return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id")
    parser.add_argument("--total-timesteps", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    envs = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(args.env_id))]), gamma=0.99)
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=lambda left: 3e-4 * left,
        n_steps=2048,
        batch_size=64,
        n_epochs=10,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        ent_coef=0.0,
        vf_coef=0.25,  # its value loss is without the 1/2 of CleanRL's
        max_grad_norm=0.5,
        device="cpu",
        seed=1,
    )
    model.learn(args.total_timesteps, callback=Speed())
