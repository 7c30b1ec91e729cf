"""envs/: saved simulators continue to the last bit, and no transition crosses a reset."""

import copy
import io

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import UserError
from envs.make import make_env, make_vector_env
from envs.state import (
    can_save_state,
    env_state,
    set_env_state,
    set_vector_env_state,
    vector_env_state,
)

MUJOCO = (
    "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum "
    "Pusher Reacher Swimmer Walker2d"
).split()
CLASSIC = ["Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
IDS = [f"{name}-v5" for name in MUJOCO] + [f"{name}-v4" for name in MUJOCO if name != "Pusher"]
IDS += CLASSIC


class NoState(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Words(NoState):
    observation_space = gym.spaces.Sequence(gym.spaces.Discrete(3))


class Picture(NoState):
    observation_space = gym.spaces.Box(0, 255, (4, 5, 3), np.uint8)


gym.register("NoState-v0", NoState)
gym.register("Words-v0", Words)
gym.register("Picture-v0", Picture)


def play(env, actions):
    """Everything that the environment gives, with resets where episodes end."""
    seen = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        seen.append((obs.copy(), reward, terminated, truncated))
        if terminated or truncated:
            seen.append((env.reset()[0].copy(), None, None, None))
    return seen


def assert_same_play(first, second):
    assert len(first) == len(second)
    for t, ((obs, *rest), (other_obs, *other_rest)) in enumerate(zip(first, second, strict=True)):
        assert obs.dtype == other_obs.dtype
        assert obs.tobytes() == other_obs.tobytes(), f"observation {t}"
        assert rest == other_rest, f"step {t}"


@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize("env_id", IDS)
def test_state_continues_to_the_last_bit(env_id):
    env = make_env(env_id)
    env.reset(seed=3)
    env.action_space.seed(1)
    play(env, [env.action_space.sample() for _ in range(37)])  # in the midst of an episode
    assert can_save_state(env)
    state = env_state(env)
    untouched = copy.deepcopy(state)
    actions = [env.action_space.sample() for _ in range(250)]
    expected = play(env, actions)
    assert str(state) == str(untouched), "the state is a copy, which stepping does not change"

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = make_env(env_id)
    other.reset(seed=99)
    play(other, actions[:5])
    set_env_state(other, loaded)
    assert_same_play(play(other, actions), expected)
    # and once more into the same environment, which has gone on since
    set_env_state(env, state)
    assert_same_play(play(env, actions), expected)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5", "Pendulum-v1"])
def test_elapsed_steps_are_part_of_the_state(env_id):
    env = make_env(env_id)
    env.reset(seed=0)
    limit = env.spec.max_episode_steps
    state = env_state(env)
    state["elapsed_steps"] = [limit - 1]
    set_env_state(env, state)
    assert env.step(env.action_space.sample())[3], "the time limit cuts the next step"


def test_state_of_a_vector_environment():
    envs, others = make_vector_env("Hopper-v5", 3), make_vector_env("Hopper-v5", 3)
    envs.reset(seed=0)
    others.reset(seed=50)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(120)]
    for action in actions[:20]:
        envs.step(action)
    assert set_vector_env_state(others, vector_env_state(envs))
    ends = 0
    for action in actions[20:]:
        mine, theirs = envs.step(action), others.step(action)
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            assert a.tobytes() == b.tobytes()
        ends += mine[2].sum()
    assert ends > 3, "resets are part of the test"


def test_state_that_cannot_be_saved(capsys):
    env = make_env("NoState-v0")
    assert not can_save_state(env)
    with pytest.raises(UserError, match="cannot be saved"):
        env_state(env)
    envs = make_vector_env("NoState-v0", 2)
    assert vector_env_state(envs) is None
    assert not set_vector_env_state(envs, None)
    assert "NoState-v0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("Nope-v0", "Nope"),
        ("CartPole-v99", "CartPole"),
        ("not a name", "not a name"),
        ("Words-v0", "cannot be flattened"),
        ("no_such_module:Env-v0", "no_such_module"),
    ],
)
def test_environment_that_does_not_exist(env_id, words):
    with pytest.raises(UserError) as error:
        make_env(env_id)
    message = str(error.value)
    assert env_id in message and words in message and "\n" not in message


def test_observations_are_flat():
    env = make_env("Picture-v0")
    assert env.observation_space.shape == env.reset()[0].shape == (60,)


def test_time_limits_are_those_registered():
    env = make_env("CartPole-v1")
    env.reset(seed=0)
    assert env.spec.max_episode_steps == 500
    env = make_env("Pendulum-v1")
    env.reset(seed=0)
    flags = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(200)]
    assert flags == [(False, False)] * 199 + [(False, True)]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
def test_same_step_resets(env_id):
    """No step is lost and final_obs is the old episode's last one: as in a hand-written loop."""
    envs, env = make_vector_env(env_id, 2), make_env(env_id)
    obs, _ = envs.reset(seed=7)
    assert env.reset(seed=7)[0].tobytes() == obs[0].tobytes()
    envs.action_space.seed(0)
    ends = 0
    for _ in range(450):
        actions = envs.action_space.sample()
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        last, reward, terminated, truncated, _ = env.step(actions[0])
        assert (reward, terminated, truncated) == (rewards[0], terminations[0], truncations[0])
        if terminated or truncated:
            assert infos["_final_obs"][0]
            assert infos["final_obs"][0].tobytes() == last.tobytes()
            last, _ = env.reset()
            ends += 1
        elif "_final_obs" in infos:
            assert not infos["_final_obs"][0]
        assert obs[0].tobytes() == last.tobytes()
    assert ends >= 2


def test_action_repeat():
    """Three steps in one, the state of which is that of the environment within."""
    env, plain = make_env("Hopper-v5", action_repeat=3), make_env("Hopper-v5")
    env.reset(seed=1)
    plain.reset(seed=1)
    env.action_space.seed(0)
    steps = []
    while not steps or not steps[-1][2]:
        action = env.action_space.sample()
        if len(steps) == 3:
            set_env_state(env, env_state(plain))
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps_taken, ended = 0.0, 0, False
        while steps_taken < 3 and not ended:
            last, own, ended, _, _ = plain.step(action)
            total, steps_taken = total + own, steps_taken + 1
        steps.append((steps_taken, truncated, terminated))
        assert obs.tobytes() == last.tobytes() and reward == total and terminated == ended
    assert len(steps) > 4 and {n for n, _, _ in steps[:-1]} == {3}
