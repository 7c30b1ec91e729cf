"""The S3RL scripts: snapshots, where episodes start and end, both phases, the teacher."""

import hashlib
import importlib
import json
import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import UserError
from envs.episodes import play_and_save
from envs.make import make_env, make_vector_env
from envs.moments import RunningMoments
from envs.state import can_save_state, restore
from envs.teacher import teacher_episodes
from tests.launch import (
    ROOT,
    Run,
    assert_same_run,
    checkpoints,
    collect,
    content,
    descendants,
    needs_compiler,
    rows,
    run,
    same,
)
from tests.test_contracts import one_line_error

PARENTS = {f"s3rl_{base}": f"{base}_continuous_action" for base in ("td3", "sac", "ppo")}
every_script = pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PARENTS]
)
TASKS = [*((script, "Pendulum-v1") for script in PARENTS), ("s3rl_ppo", "CartPole-v1")]
every_task = pytest.mark.parametrize(
    ("script", "env_id"),
    [pytest.param(*task, marks=pytest.mark.xdist_group(task[0])) for task in TASKS],
)
# flags of short runs on Pendulum-v1, whose episodes last 200 steps
OFF_POLICY = "--learning-starts 100 --batch-size 16 --log-every 10"
ON_POLICY = "--num-steps 40 --num-minibatches 2 --update-epochs 2"
SHORT = {name: ON_POLICY if "ppo" in name else OFF_POLICY for name in PARENTS}
# flags of teachers, of every kind
TEACHERS = {parent: SHORT[name] for name, parent in PARENTS.items()}
TEACHERS |= {name: SHORT[name] + " --no-snapshots" for name in PARENTS}
TEACHERS["ppo"] = ON_POLICY
TEACHERS["srl"] = "--random-steps 100 --batch-size 16 --log-every 10 --no-eval-lengths"
IDS = "Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 Swimmer-v5 Walker2d-v5 Reacher-v5 "
IDS += "InvertedPendulum-v5 InvertedDoublePendulum-v5 HumanoidStandup-v5 Hopper-v4 Walker2d-v4 "
IDS += "Swimmer-v4 HalfCheetah-v4 InvertedPendulum-v4 Pendulum-v1 MountainCarContinuous-v0 "
MAKER = ROOT / "algos" / "x.py"
DISCRETE = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]

pytestmark = pytest.mark.usefixtures("group_of_one")


def module(script):
    return importlib.import_module(f"algos.{script}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """teacher(script, env_id, flags): the folder of a run of that script."""
    done = {}

    def get(script, env_id="Pendulum-v1", flags=""):
        key = script, env_id, flags
        if key not in done:
            folder = tmp_path_factory.mktemp("teacher") / "run"
            words = f"--env-id {env_id} --eval-episodes 1 --total-timesteps 400 {flags}"
            run(script, 1, *words.split(), *TEACHERS[script].split(), "--run-dir", folder)
            done[key] = folder
        return done[key]

    return get


def parent_of(script, env_id="Pendulum-v1"):
    """Which script makes the teacher that `script` proposes."""
    return "ppo" if env_id in DISCRETE else PARENTS[script]


def short_flags(script, env_id="Pendulum-v1"):
    return f"--env-id {env_id} --eval-episodes 1 {SHORT[script]}".split()


def short_run(script, run_dir, *flags, env_id="Pendulum-v1"):
    run(script, 1, *short_flags(script, env_id), *flags, "--run-dir", run_dir)
    return run_dir


def play(env, file, episodes, seed, save_every, action=None):
    """What `play_and_save` writes; action: in each step, else random ones."""
    env.action_space.seed(0)

    def decide(*_):
        return np.asarray(env.action_space.sample() if action is None else action)[None, None]

    play_and_save(env, decide, lambda obs, actions: obs[:, 0], 1, episodes, seed, save_every, file)
    return torch.load(file, weights_only=True)


@pytest.fixture
def pendulum_snapshots(tmp_path):
    def get(values, clusters=6):
        """As many snapshots as values, of random play, with the probabilities of td3's script."""
        saved = play(make_env("Pendulum-v1"), tmp_path / "file", 1, 0, 200 // len(values))
        p, _ = module("s3rl_td3").start_probabilities(np.array(values), clusters)
        assert len(saved["obs"]) == len(p)
        return saved | {"probabilities": torch.from_numpy(p)}

    return get


def first_phase(script, snapshots, truncation, num_envs=1):
    args = SimpleNamespace(truncation=truncation, env_id="Pendulum-v1")
    begin = partial(module(script).begin_episode, snapshots=snapshots, args=args)
    return make_vector_env("Pendulum-v1", num_envs, begin=begin)


# SNAPSHOTS =======================================================================================


class Recorder(gym.Wrapper):
    """Keeps all that steps give, an episode a list."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **kwargs):
        self.episodes.append([])
        return self.env.reset(**kwargs)

    def step(self, action):
        result = self.env.step(action)
        self.episodes[-1].append((action, result[0].tobytes(), *result[1:4]))
        return result


@pytest.mark.parametrize("env_id", IDS.split() + DISCRETE)
def test_restored_snapshots_continue_to_the_last_bit(env_id, tmp_path):
    """After a checkpoint's save and load, in any order, in an environment that has moved on."""
    env = Recorder(make_env(env_id))
    saved, episodes = play(env, tmp_path / "file", 3, 5, 7), env.episodes
    assert len(saved["returns"]) == 3
    assert (tmp_path / "file").stat().st_size < 3_000_000 + 40_000 * len(saved["obs"])
    where = [(e, t) for e, steps in enumerate(episodes) for t in range(len(steps))][::7]
    assert len(where) == len(saved["obs"])
    other = make_env(env_id)
    other.reset(seed=99)
    for i in np.random.default_rng(0).permutation(len(where))[:12]:
        e, t = where[i]
        obs = restore(other, saved, i)
        if t:
            assert obs.tobytes() == episodes[e][t - 1][1]
        for action, *expected in episodes[e][t : t + 150]:
            obs, *rest = other.step(action)
            assert [obs.tobytes(), *rest[:3]] == expected


def test_few_tensors(tmp_path):
    """Thousands of small ones would make each checkpoint slow."""
    saved = play(make_env("Hopper-v5"), tmp_path / "file", 20, 0, 1)
    leaves = []

    def walk(tree):
        for part in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(part, dict | list):
                walk(part)
            elif isinstance(part, torch.Tensor):
                leaves.append(part)

    walk(saved)
    assert len(saved["obs"]) > 100 and len(leaves) < 40


def test_interval_counts_the_steps_of_all_episodes(tmp_path):
    saved = play(make_env("Pendulum-v1"), tmp_path / "file", 3, 0, 30)
    elapsed = [e for (e,) in saved["states"]["elapsed_steps"]]
    assert elapsed == [step % 200 for step in range(0, 600, 30)]


def test_saving_leaves_the_episodes_as_they_are(tmp_path):
    plain, expected = make_env("Hopper-v5"), []
    for i in range(4):
        plain.reset(seed=3 + i)
        expected.append(0.0)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = plain.step(np.zeros(3))
            expected[-1] += reward
            done = terminated or truncated
    saved = play(make_env("Hopper-v5"), tmp_path / "file", 4, 3, 7, np.zeros(3))
    assert saved["returns"].tolist() == expected


def test_decisions_of_several_steps(tmp_path):
    """They last to the end of an episode, and the next one knows which action was the last."""
    asked = []

    def decide(obs, previous, steps):
        asked.append((obs.copy(), previous.copy(), steps))
        return np.linspace(-2, 2, 7, dtype=np.float32).reshape(1, 7, 1)

    def value(obs, actions):
        return actions[:, 0]

    env = Recorder(make_env("Pendulum-v1"))
    play_and_save(env, decide, value, 7, 2, 0, 10, tmp_path / "file")
    assert len(asked) == 2 * 29 and {steps for *_, steps in asked} == {7}
    previous = [p.item() for _, p, _ in asked]
    assert previous == ([0.0] + [2.0] * 28) * 2
    taken = [action.item() for steps in env.episodes for action, *_ in steps]
    saved = torch.load(tmp_path / "file", weights_only=True)
    assert saved["values"].tolist() == taken[::10], "the actions taken in the saved states"
    assert taken[6:9] == [2.0, -2.0, pytest.approx(-4 / 3)] and taken[200] == -2.0


# WHERE EPISODES START ============================================================================


@every_script
def test_probabilities_are_exact(script):
    """Three groups of 1, 2 and 5 values: a third for each group."""
    values = np.array([10.0, 0.1, 0.0, 5.0, 5.1, 4.9, 5.05, 4.95], np.float32)
    p, sizes = module(script).start_probabilities(values, 3)
    np.testing.assert_allclose(p, np.array([1, 1 / 2, 1 / 2] + [1 / 5] * 5) / 3, rtol=1e-12)
    assert sizes.tolist() == [2, 5, 1], "from low to high values"
    p, sizes = module(script).start_probabilities(values, 1)
    assert p.tolist() == [1 / 8] * 8 and sizes.tolist() == [8]


@every_script
def test_fewer_values_than_clusters(script, recwarn):
    p, sizes = module(script).start_probabilities(np.array([1.0, 1.0, 1.0, 2.0]), 6)
    np.testing.assert_allclose(p, [1 / 6] * 3 + [1 / 2], rtol=1e-12)
    assert sizes.tolist() == [3, 1]
    assert not recwarn.list


@every_script
def test_empty_clusters_are_dropped(script, monkeypatch):
    class Labels:
        labels_ = np.array([0, 2, 2, 2])
        cluster_centers_ = np.array([[0.0], [1.0], [2.0]])

        def __init__(self, *args, **kwargs):
            self.fit = lambda values: self

    monkeypatch.setattr("sklearn.cluster.KMeans", Labels)
    p, sizes = module(script).start_probabilities(np.arange(4.0), 3)
    np.testing.assert_allclose(p, [1 / 2] + [1 / 6] * 3, rtol=1e-12)
    assert sizes.tolist() == [1, 0, 3]


def networks(script, saved, env):
    """act(obs, previous, generator) -> (steps, A) and value(obs, actions), by its own functions."""
    own, args = module(script), saved["args"]
    A = gym.spaces.flatdim(env.action_space)
    agent = own.Agent(env.observation_space, env.action_space)
    agent.load_state_dict(saved["agent"])
    if "ppo" in script:
        actor = own.numpy_mlp(agent.actor)
        # a run of ppo.py has no moments: its agent sees observations as they are
        moments, normalize = saved.get("obs_moments"), np.float32
        if moments:
            normalize = RunningMoments.of_state(moments).normalize

        def act(obs, _, g):
            output = actor(normalize(obs))
            if isinstance(env.action_space, gym.spaces.Discrete):
                return [(output + g.gumbel(size=A)).argmax()]
            std = agent.actor_logstd.detach().exp().numpy()
            low, high = env.action_space.low, env.action_space.high
            return [(output + std * g.standard_normal(A)).clip(low, high)]

        return act, lambda obs, _: agent.value(torch.from_numpy(normalize(obs.numpy())))
    policy = own.numpy_policy(agent)
    if script == "srl":
        shape = 1, args["sequence_length"], A
        critic = agent.grader["critic"]
        return (
            lambda obs, previous, g: policy(obs[None], previous[None], g.standard_normal(shape))[0],
            lambda obs, actions: critic(torch.cat([obs.float(), actions], 1))[0],
        )
    std = 0.0 if "td3" in script else 1.0
    return (
        lambda obs, _, g: [policy(obs, std * g.standard_normal(A))] * args.get("action_repeat", 1),
        lambda obs, actions: agent.critic(torch.cat([obs.float(), actions], 1))[0],
    )


KINDS = [(script, "CartPole-v1" if script == "ppo" else "Pendulum-v1", "") for script in TEACHERS]
KINDS += [("s3rl_ppo", "CartPole-v1", "")]
KINDS += [(name, "Hopper-v5", "") for name in ("srl", "td3_continuous_action")]
KINDS += [
    (f"{base}_continuous_action", "Pendulum-v1", "--action-repeat 3") for base in ("td3", "sac")
]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.xdist_group(k[0]), id=" ".join(k).strip()) for k in KINDS],
)
def test_episodes_and_values_are_those_of_the_teacher(kind, teacher):
    """By playing its episodes again, one at a time, with the functions of its own script."""
    (script, env_id, _), folder = kind, teacher(*kind)
    env = make_env(env_id)
    found = teacher_episodes(folder, env, MAKER, 2, 23, 3)
    saved = torch.load(checkpoints(folder)[-1] / "rank0.pt", weights_only=True)
    assert saved["script"] == script
    act, value = networks(script, saved, env)
    generator, observations, actions, returns = np.random.default_rng(23), [], [], []
    for episode in range(2):
        obs, _ = env.reset(seed=23 + episode)
        plan, action, done = [], np.zeros(env.action_space.shape, np.float32), False
        returns.append(0.0)
        while not done:
            if not len(plan):
                plan = act(obs, action, generator)
            action, *plan = plan
            observations.append(obs)
            actions.append(action)
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += reward
            done = terminated or truncated
    assert found["returns"].tolist() == pytest.approx(returns)
    obs = torch.from_numpy(np.array(observations[::3]))
    np.testing.assert_allclose(found["obs"], obs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        values = value(obs, torch.from_numpy(np.array(actions[::3])).float())
    np.testing.assert_allclose(found["values"], values, rtol=1e-4, atol=1e-4)
    assert values.std() > 3e-4


@every_script
@pytest.mark.parametrize("clusters", [1, 2])
def test_frequencies_of_starts(script, clusters, pendulum_snapshots):
    values = [0.0, 9.0, 9.1, 9.2, 9.3, 9.4, 9.5, 9.6, 9.7, 9.8]
    snapshots = pendulum_snapshots(values, clusters)
    envs, n = first_phase(script, snapshots, 100), 4000
    envs.reset(seed=0)
    starts = Counter(envs.envs[0].reset()[0].tobytes() for _ in range(n))
    p = snapshots["probabilities"].numpy()
    assert p[0] == pytest.approx(1 / 2 if clusters == 2 else 1 / 10)
    for obs, chance in zip(snapshots["obs"], p, strict=True):
        assert abs(starts[obs.numpy().tobytes()] - n * chance) < 4 * (n * chance) ** 0.5
    assert sum(starts.values()) == n and len(starts) == len(values)


@every_script
def test_environments_draw_apart(script, pendulum_snapshots):
    snapshots = pendulum_snapshots(list(range(50)))
    envs = first_phase(script, snapshots, 100, 4)
    first, other, again = (envs.reset(seed=seed)[0].copy() for seed in (0, 4, 0))
    assert np.array_equal(first, again)
    assert len(np.unique(np.concatenate([first, other]), axis=0)) > 5
    starts = [[env.reset()[0].tobytes() for _ in range(5)] for env in envs.envs]
    assert len({tuple(s) for s in starts}) == 4


# WHERE EPISODES END ==============================================================================


@every_script
@pytest.mark.parametrize("truncation", [5, 300])
def test_limit_counts_from_the_snapshot(script, truncation, pendulum_snapshots):
    """Pendulum's own limit is 200: 300 steps from step 196 go on to 496."""
    snapshots = pendulum_snapshots(list(range(50)))
    envs = first_phase(script, snapshots, truncation)
    envs.reset(seed=0)
    for _ in range(3):
        for t in range(1, truncation + 1):
            _, _, terminations, truncations, _ = envs.step(np.zeros((1, 1), np.float32))
            assert not terminations[0] and truncations[0] == (t == truncation)


@every_script
def test_without_snapshots_only_the_limit_changes(script):
    envs, plain = first_phase(script, None, 5), make_vector_env("Pendulum-v1", 1)
    assert np.array_equal(envs.reset(seed=3)[0], plain.reset(seed=3)[0])
    cuts = [envs.step(np.zeros((1, 1), np.float32))[3][0] for _ in range(10)]
    assert cuts == ([False] * 4 + [True]) * 2


def test_cut_episodes_bootstrap(pendulum_snapshots):
    """In the buffer no transition of a cut episode is terminal, and each closes its own episode."""
    td3, snapshots = module("s3rl_td3"), pendulum_snapshots(list(range(50)))
    envs = first_phase("s3rl_td3", snapshots, 4, 2)
    obs, _ = envs.reset(seed=0)
    state = {"obs": obs.astype(np.float32), "episode_return": np.zeros(2)}
    state["episode_length"] = np.zeros(2)
    buffer = td3.ReplayBuffer(100, 3, 1, 4, torch.device("cpu"))
    ended = []
    for _ in range(12):
        ended += td3.env_step(envs, np.zeros((2, 1), np.float32), state, buffer)
    table = buffer.rows[:24].numpy().reshape(12, 2, -1)
    assert [length for _, length in ended] == [4] * 6
    assert not table[:, :, -1].any()
    for t in range(11):
        goes_on = np.array_equal(table[t, :, 4:7], table[t + 1, :, :3])
        assert goes_on == (t % 4 != 3)
    stored = {row.numpy().astype(np.float32).tobytes() for row in snapshots["obs"]}
    assert all(table[t, n, :3].tobytes() in stored for t in (0, 4, 8) for n in (0, 1))


def test_cut_episodes_bootstrap_in_ppo(pendulum_snapshots):
    """Where V is c everywhere and lambda is 0, each advantage is r + gamma c - c, at cuts too."""
    ppo, snapshots = module("s3rl_ppo"), pendulum_snapshots(list(range(50)))
    envs = first_phase("s3rl_ppo", snapshots, 4, 2)
    agent, c = ppo.Agent(envs.single_observation_space, envs.single_action_space), 3.0
    torch.nn.init.zeros_(agent.critic[-1].weight)
    torch.nn.init.constant_(agent.critic[-1].bias, c)
    moments = RunningMoments((3,)), RunningMoments()
    args = SimpleNamespace(num_steps=12, gamma=0.9, gae_lambda=0.0, env_id="Pendulum-v1")
    state = ppo.reset(envs, moments[0], 0)
    batch, episodes = ppo.rollout(envs, agent, state, *moments, args, torch.device("cpu"))
    assert [(t, length) for t, _, length in episodes] == [(t, 4) for t in (3, 3, 7, 7, 11, 11)]
    assert batch["truncations"].sum() == 6 and not batch["terminations"].any()
    torch.testing.assert_close(batch["advantages"], batch["rewards"] + 0.9 * c - c)


# WHOLE RUNS ======================================================================================


@every_script
def test_without_a_first_phase_it_is_the_parent(script, tmp_path):
    """The same parameters, buffer, random numbers and logs, to the last bit."""
    flags = ["--total-timesteps", 600]
    mine = short_run(script, tmp_path / "child", *flags, "--snapshot-timesteps", 0)
    run(PARENTS[script], 1, *short_flags(script), *flags, "--run-dir", tmp_path / "parent")
    a, b = (content(checkpoints(path)[-1]) for path in (mine, tmp_path / "parent"))
    assert a.pop("rank0.pt/snapshots") is None and a.pop("rank0.pt/script") == script
    assert b.pop("rank0.pt/script") == PARENTS[script]
    more = "rank0.pt/decisions", "rank0.pt/best/"  # of --action-repeat and --eval-lengths
    b = {name: leaf for name, leaf in b.items() if not name.startswith(more)}
    assert a.keys() == b.keys()
    assert not [name for name in a if not same(a[name], b[name])]
    assert rows(mine) == rows(tmp_path / "parent")
    drawn = torch.get_rng_state()
    for mode in (True, False):
        returns = [
            module(name).evaluate(checkpoints(path)[-1], 3, mode)
            for name, path in ((script, mine), (PARENTS[script], tmp_path / "parent"))
        ]
        np.testing.assert_array_equal(*returns)
    assert torch.equal(torch.get_rng_state(), drawn), "an evaluation changes what training draws"


@every_script
@pytest.mark.parametrize("arm", ["S3RL", "SnapshotRL", "STT"])
def test_both_phases(script, arm, teacher, tmp_path):
    """Lengths of episodes before and after the switch, in logs and in the environment."""
    flags = {"S3RL": "", "SnapshotRL": "--clusters 1 --truncation 150", "STT": "--no-snapshots"}[
        arm
    ]
    flags = ["--snapshot-timesteps", 320, "--total-timesteps", 960, *flags.split()]
    if arm != "STT":
        flags += ["--teacher", teacher(PARENTS[script])]
    run_dir = short_run(script, tmp_path / "run", *flags, "--save-every", 0)
    table, length = rows(run_dir), 150 if arm == "SnapshotRL" else 100
    lengths = [(step, value) for step, key, value in table if key == "charts/snapshot_length"]
    assert lengths == [(step, length) for step in range(length, 321, length)]
    lengths = [(step, value) for step, key, value in table if key == "charts/episodic_length"]
    assert lengths == [(520, 200), (720, 200), (920, 200)], "the ordinary limit is back"
    facts = {key: value for step, key, value in table if step == 0}
    if arm == "STT":
        assert not facts
    else:
        assert facts["charts/snapshots"] == 200, "10 episodes of 200 steps, every tenth"
        sizes = [value for key, value in facts.items() if key.startswith("charts/cluster_size@")]
        assert sum(sizes) == 200 and len(sizes) == (6 if arm == "S3RL" else 1)
    assert content(checkpoints(run_dir)[-1])["rank0.pt/snapshots"] is None


def test_moments_of_ppo_stay_at_the_switch(teacher, tmp_path):
    flags = ["--snapshot-timesteps", 320, "--total-timesteps", 960, "--teacher"]
    run_dir = short_run("s3rl_ppo", tmp_path / "run", *flags, teacher("ppo_continuous_action"))
    saved = torch.load(checkpoints(run_dir)[-1] / "rank0.pt", weights_only=True)
    # both resets, each step, and the last observations of 3 episodes in either phase
    assert saved["obs_moments"]["sums"][0] == pytest.approx(torch.full((3,), 2 + 960 + 6 + 1e-4))
    assert saved["return_moments"]["sums"][0] == pytest.approx(960 + 1e-4)


@every_task
def test_resumed_first_phase_needs_no_teacher(script, env_id, teacher, tmp_path):
    folder = shutil.copytree(teacher(parent_of(script, env_id), env_id), tmp_path / "teacher")
    flags = ["--snapshot-timesteps", 400, "--total-timesteps", 640, "--teacher", folder]
    flags += ["--save-every", 0]
    whole = short_run(script, tmp_path / "whole", *flags, env_id=env_id)
    # the same run, which is cut off in its first phase
    part = tmp_path / "part"
    interrupted_in_first_phase(script, part, [*short_flags(script, env_id), *flags])
    newest = checkpoints(part)[-1]
    assert int(newest.name) < 400
    saved = torch.load(newest / "rank0.pt", weights_only=True)
    assert saved["snapshots"]["probabilities"].sum() == pytest.approx(1)
    shutil.rmtree(folder)
    short_run(script, part, *flags, "--resume", "auto", env_id=env_id)
    assert_same_run(part, whole)


def interrupted_in_first_phase(script, run_dir, flags):
    with Run(script, 1, *flags, "--run-dir", run_dir) as started:
        started.poll_until(lambda: checkpoints(run_dir) and int(checkpoints(run_dir)[-1].name) > 99)
        started.kill()


# DISCRETE ACTIONS ================================================================================


def agent_with_logits(logits, env_id="CartPole-v1"):
    """Of s3rl_ppo, with these logits in every state."""
    env = make_env(env_id)
    agent = module("s3rl_ppo").Agent(env.observation_space, env.action_space)
    torch.nn.init.zeros_(agent.actor[-1].weight)
    agent.actor[-1].bias.data.copy_(torch.tensor(logits))
    return agent


def test_categorical_by_hand():
    """Logits log 1, log 2, log 5: the probabilities are 1/8, 1/4 and 5/8."""
    agent = agent_with_logits(np.log([1, 2, 5]), "Acrobot-v1")
    actions = torch.tensor([[0, 1], [2, 2], [1, 0]])
    logprob, entropy = agent.logprob_and_entropy(torch.randn(3, 2, 6), actions)
    torch.testing.assert_close(logprob, torch.tensor([1 / 8, 1 / 4, 5 / 8]).log()[actions])
    # -1/8 log 1/8 - 1/4 log 1/4 - 5/8 log 5/8
    expected = (3 / 8 + 1 / 2 + 15 / 8) * np.log(2) - 5 / 8 * np.log(5)
    torch.testing.assert_close(entropy, torch.full((3, 2), expected, dtype=torch.float32))


def test_categorical_gradients_against_torch():
    env, obs = make_env("Acrobot-v1"), torch.randn(50, 6)
    agent = module("s3rl_ppo").Agent(env.observation_space, env.action_space)
    agent.actor[-1].weight.data.normal_()
    actions, found = torch.randint(3, (50,)), []
    distribution = torch.distributions.Categorical(logits=agent.actor(obs))
    for logprob, entropy in (
        agent.logprob_and_entropy(obs, actions),
        (distribution.log_prob(actions), distribution.entropy()),
    ):
        agent.zero_grad()
        (logprob.exp().sum() + 2 * entropy.sum()).backward()
        found.append([logprob, entropy, *(p.grad.clone() for p in agent.actor.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("script", ["ppo", "s3rl_ppo"])
def test_frequencies_of_discrete_actions(script, tmp_path, monkeypatch):
    """In evaluations."""
    ppo, agent, n = module(script), agent_with_logits(np.log([1, 3])), 4000
    saved = {"args": {"env_id": "CartPole-v1", "seed": 1}, "agent": agent.state_dict()}
    torch.save(saved | {"obs_moments": RunningMoments((4,)).state()}, tmp_path / "rank0.pt")
    monkeypatch.setattr(ppo, "play_episodes", lambda *inputs: [inputs[-1](np.zeros((n, 4)))])
    likeliest, drawn = (ppo.evaluate(tmp_path, 1, mode) for mode in (True, False))
    assert likeliest.shape == (n, 1) and (likeliest == 1).all()
    assert abs(drawn.mean() - 3 / 4) < 4 * (3 / 16 / n) ** 0.5


def test_rollout_of_discrete_actions():
    """They have their frequencies, and the environment got them: a replay sees the same."""
    ppo, agent, n = module("s3rl_ppo"), agent_with_logits(np.log([1, 3])), 2000
    envs = make_vector_env("CartPole-v1", 2)
    moments, replayed = RunningMoments((4,)), RunningMoments((4,))
    args = SimpleNamespace(num_steps=n, gamma=0.9, gae_lambda=0.9)
    state = ppo.reset(envs, moments, 5)
    batch, _ = ppo.rollout(envs, agent, state, moments, RunningMoments(), args, torch.device("cpu"))
    actions = batch["actions"]
    assert actions.shape == (n, 2) and actions.dtype == torch.int64
    assert abs(actions.float().mean() - 3 / 4) < 4 * (3 / 16 / (2 * n)) ** 0.5
    logprob = torch.tensor([1 / 4, 3 / 4]).log()[actions]
    torch.testing.assert_close(batch["logprobs"], logprob)
    ppo.reset(envs, replayed, 5)
    for row in actions.numpy():
        obs, *_, infos = envs.step(row)
        for i in np.flatnonzero(infos.get("_final_obs", ())):
            replayed.update(infos["final_obs"][i][None])
        replayed.update(obs)
    assert np.array_equal(moments.sums, replayed.sums)


@pytest.mark.parametrize("env_id", DISCRETE)
def test_both_phases_with_discrete_actions(env_id, teacher, tmp_path):
    """With a teacher of ppo.py."""
    flags = ["--snapshot-timesteps", 320, "--total-timesteps", 960, "--truncation", 5]
    flags += ["--teacher", teacher("ppo", env_id)]
    run_dir = short_run("s3rl_ppo", tmp_path / "run", *flags, env_id=env_id)
    table = rows(run_dir)
    lengths = [value for _, key, value in table if key == "charts/snapshot_length"]
    assert len(lengths) >= 320 / 5 and max(lengths) == 5
    lengths = [value for _, key, value in table if key == "charts/episodic_length"]
    assert max(lengths) > 5, "the ordinary limit is back"


@needs_compiler
def test_compiled_gradient_with_discrete_actions():
    ppo, agent, found = module("s3rl_ppo"), agent_with_logits([0.0, 1.0]), []
    args = SimpleNamespace(clip_coef=0.2, vf_coef=0.5)
    mb = {"obs": torch.randn(32, 4), "actions": torch.randint(2, (32,))}
    mb |= {name: torch.randn(32) for name in ("logprobs", "values", "advantages", "returns")}
    gradient = partial(ppo.minibatch_gradient, agent, args=args)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as main() does
        for function in (gradient, torch.compile(gradient, dynamic=False)):
            vector, metrics = function(mb)
            found.append([metrics["policy_loss"], metrics["entropy"], vector])
    torch.testing.assert_close(*found)


def test_learns_with_discrete_actions(tmp_path):
    """The score is that of ppo.py; three seeds of three gave 500."""
    words = "--env-id CartPole-v1 --total-timesteps"
    run("ppo", 1, *words.split(), 50_000, "--run-dir", tmp_path / "teacher")
    flags = ["--teacher", tmp_path / "teacher", "--snapshot-timesteps", 10_240]
    run("s3rl_ppo", 1, *words.split(), 32_768, *flags, "--run-dir", tmp_path / "run")
    last = {key: value for _, key, value in rows(tmp_path / "run")}
    assert last["eval/deterministic_return"] >= 475


def test_other_kinds_of_actions_are_refused():
    space = gym.spaces.MultiDiscrete([2, 2])
    with pytest.raises(UserError, match="neither Box nor Discrete"):
        module("s3rl_ppo").Agent(gym.spaces.Box(-1, 1, (2,)), space)


# TEACHERS ========================================================================================


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("s3rl_td3", ("srl", "Pendulum-v1", "")),
        ("s3rl_sac", ("ppo_continuous_action", "Pendulum-v1", "")),
        ("s3rl_ppo", ("td3_continuous_action", "Pendulum-v1", "--action-repeat 3")),
        ("s3rl_ppo", ("s3rl_ppo", "CartPole-v1", "")),
    ],
)
def test_teachers_of_other_kinds(script, kind, teacher, tmp_path):
    """The student starts in their states, with the probabilities of their values."""
    flags = ["--total-timesteps", 120, "--truncation", 5, "--teacher", teacher(*kind)]
    out, _ = run(script, 1, *short_flags(script, kind[1]), *flags, "--run-dir", tmp_path / "run")
    assert f"of {kind[0]}.py, sha256" in out
    played = teacher_episodes(teacher(*kind), make_env(kind[1]), MAKER, 10, 20_001, 10)
    p, sizes = module(script).start_probabilities(played["values"].numpy(), 6)
    facts = {key: value for step, key, value in rows(tmp_path / "run") if step == 0}
    assert facts["charts/teacher_return"] == pytest.approx(played["returns"].mean().item())
    assert facts["charts/snapshots"] == len(p) == sizes.sum() == len(played["obs"])
    assert [facts[f"charts/cluster_size@{k}"] for k in range(1, 7)] == sizes.tolist()
    mine = torch.load(checkpoints(tmp_path / "run")[-1] / "rank0.pt", weights_only=True)
    mine, expected = mine["snapshots"], {"probabilities": torch.from_numpy(p)}
    leaves = [{}, {}]
    for tree, found in zip((mine, played | expected), leaves, strict=True):
        collect({key: tree[key] for key in ("probabilities", "obs", "states")}, "", found)
    assert all(same(leaves[0][name], leaf) for name, leaf in leaves[1].items())


@every_task
def test_a_teacher_is_required(script, env_id, tmp_path):
    line = one_line_error(script, "--env-id", env_id, "--run-dir", tmp_path / "run")
    maker = parent_of(script, env_id)
    assert f"--teacher RUN is missing: `python algos/{maker}.py --env-id {env_id}`" in line
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_the_wrong_kind(teacher, tmp_path):
    pendulum, cartpole = teacher("sac_continuous_action"), teacher("ppo", "CartPole-v1")
    for script, env_id, other, words in (
        ("s3rl_ppo", "CartPole-v1", pendulum, "acts in Pendulum-v1, not in --env-id CartPole-v1"),
        ("s3rl_ppo", "Pendulum-v1", cartpole, "acts in CartPole-v1, not in --env-id Pendulum-v1"),
        ("s3rl_td3", "CartPole-v1", cartpole, "s3rl_ppo.py take"),
    ):
        flags = [*short_flags(script, env_id), "--teacher", other, "--run-dir", tmp_path / "run"]
        assert words in one_line_error(script, *flags)
        assert not (tmp_path / "run").exists()


def write_checkpoint(path, **changes):
    """Change a checkpoint, which is whole again then."""
    saved = torch.load(path / "rank0.pt", weights_only=True) | changes
    torch.save({k: v for k, v in saved.items() if v is not None}, path / "rank0.pt")
    digest = hashlib.sha256((path / "rank0.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"rank0.pt": digest}))


def test_teachers(teacher, tmp_path, capsys):
    folder = shutil.copytree(teacher("td3_continuous_action"), tmp_path / "teacher")
    env = make_env("Pendulum-v1")
    old, new = checkpoints(folder)

    def get(path, env=env):
        return teacher_episodes(path, env, MAKER, 1, 0, 50)

    whole = get(folder)
    assert str(new) in capsys.readouterr().out
    other = get(old)  # a checkpoint instead of a run
    assert str(old) in capsys.readouterr().out
    assert len(whole["obs"]) == len(other["obs"]) == 4 and not whole["obs"].equal(other["obs"])
    with pytest.raises(UserError, match="acts in Pendulum-v1, not in --env-id Hopper-v5"):
        get(folder, make_env("Hopper-v5"))
    saved = torch.load(new / "rank0.pt", weights_only=True)
    nan = {name: tensor * torch.nan for name, tensor in saved["agent"].items()}
    huge = {n: tensor * 1e15 ** n.startswith("critic") for n, tensor in saved["agent"].items()}
    for changes, words in (
        ({"script": None}, "an older version made it"),
        ({"script": "mine"}, "its script, mine.py, is not in .*algos"),
        ({"script": "../tests/teacher"}, "teacher.py, is not in .*algos"),
        ({"args": {"total_episodes": 1}}, "not of a script with environments"),
        ({"agent": None}, "not of a script with environments"),
        ({"agent": nan}, "not all finite"),
        ({"agent": huge}, "values of its states are not all finite"),
        ({"agent": {}}, "td3_continuous_action.py cannot play it: Missing key"),
    ):
        write_checkpoint(new, **changes)
        with pytest.raises(UserError, match=words) as error:
            get(folder)
        assert "\n" not in str(error.value)
        write_checkpoint(new, **saved)
    data = bytearray((new / "rank0.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (new / "rank0.pt").write_bytes(data)
    get(folder)
    assert str(old) in capsys.readouterr().out, "the newest valid one"
    (old / "manifest.json").write_text("{")
    for path, words in ((folder, "all its checkpoints are damaged"), (new, "no whole checkpoint")):
        with pytest.raises(UserError, match=words):
            get(path)
    with pytest.raises(UserError, match="no whole checkpoint"):
        get(tmp_path / "nowhere")


def playing(pid):
    """[(process, the file that it will write)] of teachers that a process has started."""
    found = []
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        except OSError:  # another one, which has just ended
            continue
        if "--teach" in words:
            found.append((child, Path(words[words.index("--teach") + 5])))
    return found


def test_a_signal_does_not_leave_the_teacher_playing(teacher, tmp_path):
    flags = ["--teacher", teacher("srl"), "--teacher-episodes", 10_000]
    flags += [*short_flags("s3rl_td3"), "--run-dir", tmp_path / "run"]
    with Run("s3rl_td3", 1, *flags, fresh=True) as started:
        players = []
        started.poll_until(lambda: players.extend(playing(started.process.pid)) or players)
        ((player, file),) = players
        assert file.parent.is_dir()
        os.kill(started.process.pid, signal.SIGTERM)
        code, *_ = started.finish(30)
    assert code == 128 + signal.SIGTERM
    assert not Path(f"/proc/{player}").exists() and not file.parent.exists()


class NoState(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


gym.register("NoStateBox-v0", NoState)


@every_script
def test_environment_that_cannot_be_saved(script):
    """It is refused before a teacher is asked for."""
    assert not can_save_state(make_env("NoStateBox-v0"))
    args = module(script).Args(env_id="NoStateBox-v0")
    with pytest.raises(UserError, match="cannot be saved"):
        module(script).take_snapshots(args, *["x.py"] * (script != "s3rl_ppo"))
    envs = make_vector_env(
        "NoStateBox-v0", 1, begin=partial(module(script).begin_episode, snapshots=None, args=args)
    )
    with pytest.raises(UserError, match="NoStateBox-v0 has no time limit"):
        envs.reset(seed=0)
