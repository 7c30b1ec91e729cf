"""Save and restore the whole state of an environment, so that the same actions give the same bits.

Covered: MuJoCo and classic-control environments under any stack of gymnasium wrappers whose only
own state is that of `TimeLimit`. A state is a dictionary of tensors and plain values, which
`torch.load(weights_only=True)` reads.
"""

import sys

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.wrappers import TimeLimit

from envs import UserError

INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
# PITFALL: the integration state is not all that a MuJoCo environment remembers. Observations and
# rewards read these as the last step left them, and that is one substep older than qpos.
DERIVED = (
    "qacc cacc xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat "
    "subtree_com subtree_linvel subtree_angmom cinert cvel cfrc_ext cfrc_int "
    "qfrc_actuator qfrc_constraint actuator_force sensordata"
).split()


def can_save_state(env: gym.Env) -> bool:
    """Whether `env_state` covers this environment."""
    return _is_mujoco(env.unwrapped) or _is_classic(env.unwrapped)


def refuse_unsaved_state(env: gym.Env) -> None:
    """Raises UserError for an environment that `env_state` does not cover."""
    if not can_save_state(env):
        text = "cannot be saved: only MuJoCo and classic control"
        raise UserError(f"the state of {env.unwrapped} {text}")


def env_state(env: gym.Env) -> dict:
    """Simulator, random generator and time limit of `env`.

    Raises UserError for an environment whose state cannot be saved.
    """
    refuse_unsaved_state(env)
    base = env.unwrapped
    if _is_mujoco(base):
        physics = np.empty(mujoco.mj_stateSize(base.model, INTEGRATION))
        mujoco.mj_getState(base.model, base.data, physics, INTEGRATION)
        simulator = {name: _pack(getattr(base.data, name)) for name in DERIVED}
        simulator["physics"] = _pack(physics)
    else:
        simulator = {name: _pack(value) for name, value in vars(base).items() if _is_plain(value)}
    return {
        "simulator": simulator,
        "generator": base.np_random.bit_generator.state,
        "elapsed_steps": [limit._elapsed_steps for limit in _time_limits(env)],
        "max_steps": [limit._max_episode_steps for limit in _time_limits(env)],
    }


def set_env_state(env: gym.Env, state: dict) -> None:
    """Put `env` where `env_state` found it. The environment must have been reset once.

    What the state lacks stays as it is: the generator of one that `play_and_save` wrote, the length
    of the time limit in older checkpoints.
    """
    base = env.unwrapped
    simulator = {name: _unpack(value) for name, value in state["simulator"].items()}
    if _is_mujoco(base):
        mujoco.mj_setState(base.model, base.data, simulator.pop("physics"), INTEGRATION)
        for name, value in simulator.items():
            getattr(base.data, name)[...] = value
    else:
        for name, value in simulator.items():
            setattr(base, name, value)
    if "generator" in state:
        base.np_random.bit_generator.state = state["generator"]
    limits = _time_limits(env)
    for limit, elapsed in zip(limits, state["elapsed_steps"], strict=True):
        limit._elapsed_steps = elapsed
    for limit, steps in zip(limits, state.get("max_steps", ()), strict="max_steps" in state):
        limit._max_episode_steps = steps


def vector_env_state(envs: gym.vector.SyncVectorEnv) -> list[dict] | None:
    """`env_state` of each environment; None where that is not possible."""
    if not all(can_save_state(env) for env in envs.envs):
        return None
    return [env_state(env) for env in envs.envs]


def set_vector_env_state(envs: gym.vector.SyncVectorEnv, states: list[dict] | None) -> bool:
    """Restore what `vector_env_state` gave. False, and a line of warning, where it gave None."""
    if states is None:
        print(f"{envs.envs[0].spec.id} cannot be restored: new episodes start", file=sys.stderr)
        return False
    for env, state in zip(envs.envs, states, strict=True):
        set_env_state(env, state)
    return True


def stack_states(states):
    """Many results of `env_state` as one, for `restore`: thousands of small tensors save slowly."""
    first = states[0]
    if isinstance(first, dict):
        return {name: stack_states([state[name] for state in states]) for name in first}
    kinds = {(s.shape, s.dtype) if isinstance(s, torch.Tensor) else None for s in states}
    return list(states) if None in kinds or len(kinds) > 1 else torch.stack(list(states))


def restore(env: gym.Env, saved: dict, i: int) -> np.ndarray:
    """Put `env` into state i of those that `play_and_save` wrote. Returns its observation."""
    set_env_state(env, _pick(saved["states"], i))
    return saved["obs"][i].numpy().copy()


def limit_steps(env: gym.Env, steps: int) -> None:
    """Let the time limit cut the running episode after `steps` more steps."""
    limits = _time_limits(env)
    if not limits:
        raise UserError(f"{env.spec.id} has no time limit that could be changed")
    for limit in limits:
        limit._max_episode_steps = limit._elapsed_steps + steps


def _is_mujoco(base: gym.Env) -> bool:
    # Others may keep more than the simulator does, a goal for example.
    return type(base).__module__.startswith("gymnasium.envs.mujoco")


def _is_classic(base: gym.Env) -> bool:
    return type(base).__module__.startswith("gymnasium.envs.classic_control")


def _time_limits(env: gym.Env) -> list[TimeLimit]:
    limits = []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            limits.append(env)
        env = env.env
    return limits


def _is_plain(value) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None | np.ndarray | np.floating)


def _pick(states, i):
    """State number i of those that `stack_states` joined."""
    if isinstance(states, dict):
        return {name: _pick(part, i) for name, part in states.items()}
    return states[i]


def _pack(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, tuple):
        return tuple(_pack(item) for item in value)
    # A numpy scalar keeps its type only as a tensor: float32 arithmetic must stay float32.
    return torch.tensor(value) if isinstance(value, np.floating) else value


def _unpack(value):
    if isinstance(value, tuple):
        return tuple(_unpack(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.numpy().copy() if value.ndim else value.numpy()[()]
    return value
