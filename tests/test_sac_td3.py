"""sac_continuous_action.py and td3_continuous_action.py: formulas, buffer, updates, whole runs.

The updates of their children by S3RL, in several processes, too.
"""

import copy
import importlib
import io
import math
import shutil
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn.functional import linear, mse_loss

from envs import UserError, check_room
from envs.episodes import make_episodes, play_episodes
from envs.make import make_env, make_vector_env
from tests.launch import checkpoints, in_two_processes, needs_compiler, rows, run

sac = importlib.import_module("algos.sac_continuous_action")
td3 = importlib.import_module("algos.td3_continuous_action")
s3rl_sac = importlib.import_module("algos.s3rl_sac")
s3rl_td3 = importlib.import_module("algos.s3rl_td3")
both = pytest.mark.parametrize("module", [sac, td3], ids=["sac", "td3"])
O, A = 5, 2  # of the agents below
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 1.0], np.float32)

pytestmark = pytest.mark.usefixtures("group_of_one")


def make_agent(module):
    torch.manual_seed(0)
    return module.Agent(gym.spaces.Box(-np.inf, np.inf, (O,)), gym.spaces.Box(LOW, HIGH))


def random_batch(size):
    torch.manual_seed(1)
    batch = {"obs_action": torch.randn(size, O + A), "next_obs": torch.randn(size, O)}
    batch |= {"rewards": torch.randn(size), "terminations": (torch.rand(size) < 0.3).float()}
    return batch | {"obs": batch["obs_action"][:, :O]}


# LOSSES ==========================================================================================


def test_td_target_by_hand():
    """gamma 0.5, alpha 0.25: 1 + 0.5 (min(4, 3) - 0.25 * 2) = 2.25; a termination leaves 5."""
    rewards, terminations = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 1.0])
    next_q, logprob = torch.tensor([[4.0, 9.0], [3.0, 9.0]]), torch.tensor([2.0, 2.0])
    target = sac.td_target(rewards, terminations, next_q, logprob, 0.25, 0.5)
    torch.testing.assert_close(target, torch.tensor([2.25, 5.0]))
    torch.testing.assert_close(
        td3.td_target(rewards, terminations, next_q, 0.5), torch.tensor([2.5, 5.0])
    )


@both
def test_critic_loss_by_hand(module):
    q = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    loss, metrics = module.critic_loss(q, torch.tensor([2.0, 4.0]))
    assert loss.item() == (1 + 4) / 2 + (1 + 16) / 2
    loss.backward()
    torch.testing.assert_close(q.grad, torch.tensor([[-1.0, -2.0], [1.0, -4.0]]))
    expected = {"qf1_values": 1.5, "qf2_values": 1.5, "qf_loss": 5.5}
    assert {name: value.item() for name, value in metrics.items()} == expected


def test_sac_actor_and_alpha_loss_by_hand():
    logprob = torch.tensor([1.0, -3.0], requires_grad=True)
    q = torch.tensor([[1.0, 5.0], [2.0, 4.0]], requires_grad=True)
    loss, metrics = sac.actor_loss(logprob, q, 0.5)
    assert loss.item() == ((0.5 - 1) + (-1.5 - 4)) / 2
    assert metrics["entropy"].item() == 1.0
    loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(q.grad, torch.tensor([[-0.5, 0.0], [0.0, -0.5]]))
    # an entropy of 1 is above H = -2, so alpha must fall: the gradient is positive
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    loss = sac.alpha_loss(log_alpha, torch.tensor([1.0, -3.0]), -2)
    assert loss.item() == pytest.approx(-0.5 * (-1.0 - 2))
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(loss.item()), "exp is its own derivative"


def test_td3_actor_loss_and_smoothing_by_hand():
    loss, _ = td3.actor_loss(torch.tensor([[1.0, 3.0]]))
    assert loss.item() == -2
    args = SimpleNamespace(policy_noise=0.2, noise_clip=0.5)
    noise = torch.tensor([[1.0, 10.0], [-10.0, -1.0]])
    scale, middle = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5])
    actions = td3.smoothed_actions(
        torch.tensor([[0.0, 0.5], [-0.5, 0.05]]), noise, scale, middle, args
    )
    # 0 + 2 * 0.2; 0.5 + 0.5 * 0.5; -0.5 - 2 * 0.5 hits -1; 0.05 - 0.5 * 0.2 hits 0
    torch.testing.assert_close(actions, torch.tensor([[0.4, 0.75], [-1.0, 0.0]]))


def test_squashed_gaussian_against_torch():
    raw, noise = torch.randn(64, 2 * A), torch.randn(64, A)
    scale, middle = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5])
    actions, logprob = sac.squashed_gaussian(raw, noise, scale, middle)
    log_std = -5 + 7 * (raw[:, A:].tanh() + 1) / 2
    normal = torch.distributions.Normal(raw[:, :A], log_std.exp())
    u = raw[:, :A] + log_std.exp() * noise
    torch.testing.assert_close(actions, u.tanh() * scale + middle)
    transforms = [
        torch.distributions.TanhTransform(),
        torch.distributions.AffineTransform(middle, scale),
    ]
    reference = torch.distributions.TransformedDistribution(normal, transforms)
    inside = (u.abs() < 2).all(1)  # where the 1e-6 of eq. (2) does not count
    assert inside.sum() > 20
    expected = reference.log_prob(actions).sum(1)
    torch.testing.assert_close(logprob[inside], expected[inside], atol=1e-3, rtol=1e-3)
    far = sac.squashed_gaussian(torch.tensor([[50.0, 0.0]]), torch.zeros(1, 1), 1.0, 0.0)
    assert all(part.isfinite().all() for part in far)


# NETWORKS ========================================================================================


@both
def test_twin_critic_is_two_networks(module):
    agent, x = make_agent(module), torch.randn(6, O + A)
    q = agent.critic(x)
    for k in range(2):
        h = x
        for i, (w, b) in enumerate(zip(agent.critic.weights, agent.critic.biases, strict=True)):
            h = linear(h, w[k].T, b[k, 0])
            h = h.relu() if i < 2 else h
        torch.testing.assert_close(q[k], h[:, 0])
    assert (q[0] - q[1]).abs().min() > 0
    torch.testing.assert_close(agent.target(x), q)
    flag = {"frozen": True} if module is sac else {"for_actor": True}
    torch.testing.assert_close(agent.critic(x, **flag), q if module is sac else q[:1])
    x.requires_grad_()
    agent.critic(x, **flag).sum().backward()
    assert x.grad.any() and all(p.grad is None for p in agent.critic.parameters())


@both
def test_initialization_is_that_of_linear(module):
    agent = make_agent(module)
    layers = [layer for layer in agent.actor if isinstance(layer, torch.nn.Linear)]
    for k in range(2):
        sizes = [O + A, 256, 256]
        for n, w, b in zip(sizes, agent.critic.weights, agent.critic.biases, strict=True):
            assert w[k].shape[0] == n
            assert 0.9 * n**-0.5 < w[k].abs().max() <= n**-0.5
            assert b[k].abs().max() <= n**-0.5
    assert [layer.in_features for layer in layers] == [O, 256, 256]


@both
def test_numpy_policy_is_the_network(module):
    agent = make_agent(module)
    flat = module.flatten_parameters(agent.actor)
    act = module.numpy_policy(agent)
    obs, noise = torch.randn(4, O), torch.randn(4, A) * 0.1
    for _ in range(2):
        with torch.no_grad():
            if module is sac:
                expected, _ = agent.sample(obs, noise)
            else:
                expected = agent.actions(agent.actor, obs) + noise * agent.scale
                low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
                expected = expected.clamp(low, high)
        actions = act(obs.numpy(), noise.numpy())
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        assert (actions >= LOW - 1e-6).all() and (actions <= HIGH + 1e-6).all()
        flat.data.mul_(1.5)  # on a CPU the weights are views, so the next round sees this


@both
def test_spaces_that_are_refused(module):
    box = gym.spaces.Box(-1, 1, (3,))
    with pytest.raises(UserError, match=r"s3rl_ppo\.py take Discrete"):
        module.Agent(box, gym.spaces.Discrete(2))
    with pytest.raises(UserError, match="without bounds"):
        module.Agent(box, gym.spaces.Box(-np.inf, 1, (2,)))


# DATA ============================================================================================


@both
def test_buffer_is_a_ring_of_rows(module):
    cpu = torch.device("cpu")
    buffer = module.ReplayBuffer(6, 2, 1, 400, cpu)
    for t in range(5):  # 2 environments; the first two pairs are overwritten
        i = np.array([10 * t, 10 * t + 1])
        column = i[:, None].astype(float)
        obs, next_obs = np.hstack([column, column + 0.5]), np.hstack([column + 2, column + 3])
        buffer.add(obs, -column, next_obs, i + 0.25, i % 2 == 1)
    assert buffer.size == 6 and buffer.position == 4
    batch = buffer.sample()
    first = batch["obs"][:, 0]
    assert set(first.tolist()) == {20, 21, 30, 31, 40, 41}
    torch.testing.assert_close(batch["obs"][:, 1], first + 0.5)
    torch.testing.assert_close(batch["obs_action"], torch.cat([batch["obs"], -first[:, None]], 1))
    torch.testing.assert_close(batch["next_obs"], torch.stack([first + 2, first + 3], 1))
    torch.testing.assert_close(batch["rewards"], first + 0.25)
    torch.testing.assert_close(batch["terminations"], first % 2)

    again = module.ReplayBuffer(6, 2, 1, 400, cpu)
    again.load_state(buffer.state())
    assert (again.size, again.position) == (6, 4) and torch.equal(again.rows, buffer.rows)


@both
def test_buffer_saves_what_is_filled(module):
    """PITFALL of torch.save: a view brings its whole storage along."""
    buffer = module.ReplayBuffer(1_000_000, 17, 6, 4, torch.device("cpu"))
    ones = np.ones((10, 17))
    buffer.add(ones, ones[:, :6], ones, ones[:, 0], ones[:, 0] > 0)
    file = io.BytesIO()
    torch.save(buffer.state(), file)
    assert file.tell() < 10 * 42 * 4 + 5000
    file.seek(0)
    assert torch.load(file, weights_only=True)["rows"].shape == (10, 42)


class Counter(gym.Env):
    """Observes its step counter, reward 1; ends by itself after `life` steps."""

    def __init__(self, life=None, reward=1.0, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.life, self.reward = life, reward

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1), {}

    def step(self, action):
        self.count += 1
        return np.full(1, float(self.count)), self.reward, self.count == self.life, False, {}


for name, kwargs, limit in (
    ("Cut", {}, 5),
    ("Ends", {"life": 5}, None),
    ("EndsAtLimit", {"life": 5}, 5),
    ("Nan", {"reward": float("nan")}, 5),
):
    gym.register(f"{name}Counter-v0", Counter, max_episode_steps=limit, kwargs=kwargs)


def played(module, env_id, steps, action_repeat=1):
    envs = make_vector_env(env_id, 2, action_repeat)
    obs, _ = envs.reset(seed=0)
    buffer = module.ReplayBuffer(100, 1, 2, 4, torch.device("cpu"))
    state = {"obs": obs.astype(np.float32), "episode_return": np.zeros(2)}
    state["episode_length"] = np.zeros(2)
    episodes = []
    for t in range(steps):
        actions = np.full((2, 2), t / 100, np.float32)
        episodes += module.env_step(envs, actions, state, buffer)
    return buffer.rows[: buffer.size].numpy(), episodes


@both
@pytest.mark.parametrize("name", ["Cut", "Ends", "EndsAtLimit"])
def test_next_obs_closes_its_own_episode(module, name):
    """A cut stores the last observation and bootstraps; an end, also at the limit, does not."""
    rows, episodes = played(module, f"{name}Counter-v0", 12)
    t = np.repeat(np.arange(12), 2)
    np.testing.assert_array_equal(rows[:, 0], t % 5)
    np.testing.assert_array_equal(rows[:, 1], (t / 100).astype(np.float32))
    np.testing.assert_array_equal(rows[:, 3], t % 5 + 1)
    np.testing.assert_array_equal(rows[:, 4], np.ones(24))
    np.testing.assert_array_equal(rows[:, 5], (t % 5 == 4) & (name != "Cut"))
    assert episodes == [(5, 5)] * 4


@both
def test_action_repeat_sums_rewards_and_stops_at_the_end(module):
    rows, episodes = played(module, "CutCounter-v0", 4, action_repeat=3)
    rows = rows[::2]
    np.testing.assert_array_equal(rows[:, 0], [0, 3, 0, 3])
    np.testing.assert_array_equal(rows[:, 3], [3, 5, 3, 5])
    np.testing.assert_array_equal(rows[:, 4], [3, 2, 3, 2])
    assert episodes == [(5, 2)] * 4
    env = make_env("Pendulum-v1", action_repeat=1)
    assert "ActionRepeat" not in str(env)


@both
def test_reward_that_is_not_finite(module):
    with pytest.raises(UserError, match="a reward is not a finite number"):
        played(module, "NanCounter-v0", 1)


def test_reward_of_an_evaluation_that_is_not_finite():
    envs = make_episodes("NanCounter-v0", 1)
    with pytest.raises(UserError, match="--env-id NanCounter-v0: a reward is not a finite number"):
        play_episodes(envs, 0, [1], lambda obs, *_: np.zeros((len(obs), 1, 2), np.float32))


# UPDATE ==========================================================================================


def learner(module, **flags):
    """What main() builds: agent, flat vectors, optimizers, gradients, args."""
    args = module.Args(**flags)
    agent = make_agent(module)
    with torch.no_grad():  # so that targets are not the critics
        for p in agent.target.parameters():
            p.mul_(1.1)
    names = ["critic", "actor", "target"] + (["target_actor"] if module in (td3, s3rl_td3) else [])
    flat = {name: module.flatten_parameters(getattr(agent, name)) for name in names}
    rates = {"critic": 1e-3, "actor": 3e-4}
    gradients = {"critic": module.critic_gradient, "actor": module.actor_gradient}
    if module in (sac, s3rl_sac):
        flat["alpha"] = agent.log_alpha
        rates["alpha"], gradients["alpha"] = 1e-3, module.alpha_gradient
    optimizers = {name: module.adam(flat[name], rate) for name, rate in rates.items()}
    given = {} if module is s3rl_sac else {"args": args}
    gradients = {name: partial(f, agent, **given) for name, f in gradients.items()}
    return SimpleNamespace(
        agent=agent, flat=flat, optimizers=optimizers, gradients=gradients, args=args
    )


def updated(module, part=slice(None), steps=3, wrap=lambda f: f, **flags):
    """Parameters and metrics after some updates on random_batch(32)[part]."""
    s = learner(module, **flags)
    gradients = {name: wrap(f) for name, f in s.gradients.items()}
    for number in range(steps):
        batch = {name: tensor[part] for name, tensor in random_batch(32).items()}
        torch.manual_seed(10 + number)
        noise = torch.randn(5, 32, A)[:, part]
        actor_due = number % 2 == 0
        extra = [noise[0], actor_due]
        if module in (sac, s3rl_sac):
            extra = [noise if actor_due else noise[:1]]
        metrics = module.update(s.flat, s.optimizers, gradients, batch, *extra, s.args)
    state = {name: vector.detach().clone() for name, vector in s.flat.items()}
    return state, {name: value.item() for name, value in metrics.items()}


def test_sac_update_is_plain_torch():
    """Two networks, autograd on modules, separate Adams, written out as in the equations."""
    s = learner(sac)
    ref = copy.deepcopy(s.agent)
    optimizers = {
        "critic": torch.optim.Adam(ref.critic.parameters(), lr=1e-3),
        "actor": torch.optim.Adam(ref.actor.parameters(), lr=3e-4),
        "alpha": torch.optim.Adam([ref.log_alpha], lr=1e-3),
    }
    batch, noise = random_batch(32), torch.randn(5, 32, A)
    sac.update(s.flat, s.optimizers, s.gradients, batch, noise, s.args)

    def step(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    with torch.no_grad():
        a, logprob = ref.sample(batch["next_obs"], noise[0])
        next_q = ref.target(torch.cat([batch["next_obs"], a], 1)).min(0)[0]
        y = next_q - ref.log_alpha.exp() * logprob
        y = batch["rewards"] + 0.99 * (1 - batch["terminations"]) * y
    q1, q2 = ref.critic(batch["obs_action"])
    step("critic", mse_loss(q1, y) + mse_loss(q2, y))
    for k in (1, 3):
        a, logprob = ref.sample(batch["obs"], noise[k])
        q = ref.critic(torch.cat([batch["obs"], a], 1))
        step("actor", (ref.log_alpha.exp().detach() * logprob - q.min(0)[0]).mean())
        with torch.no_grad():
            _, logprob = ref.sample(batch["obs"], noise[k + 1])
        step("alpha", (-ref.log_alpha.exp() * (logprob - A)).mean())
    for mine, theirs in zip(s.agent.parameters(), ref.parameters(), strict=True):
        if not any(theirs is p for p in ref.target.parameters()):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    targets = zip(ref.target.parameters(), ref.critic.parameters(), strict=True)
    for mine, (old, new) in zip(s.agent.target.parameters(), targets, strict=True):
        torch.testing.assert_close(mine, 0.995 * old + 0.005 * new, atol=1e-6, rtol=0)


@pytest.mark.parametrize("actor_due", [True, False])
def test_td3_update_is_plain_torch(actor_due):
    s = learner(td3)
    ref = copy.deepcopy(s.agent)
    critic = torch.optim.Adam(ref.critic.parameters(), lr=1e-3)
    actor = torch.optim.Adam(ref.actor.parameters(), lr=3e-4)
    batch, noise = random_batch(32), 3 * torch.randn(32, A)  # so that its bound acts
    td3.update(s.flat, s.optimizers, s.gradients, batch, noise, actor_due, s.args)
    low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    with torch.no_grad():
        a = ref.target_actor(batch["next_obs"]).tanh() * (high - low) / 2 + (high + low) / 2
        a = a + (0.2 * noise).clamp(-0.5, 0.5) * (high - low) / 2
        next_q = ref.target(torch.cat([batch["next_obs"], a.clamp(low, high)], 1)).min(0)[0]
        y = batch["rewards"] + 0.99 * (1 - batch["terminations"]) * next_q
    q1, q2 = ref.critic(batch["obs_action"])
    (mse_loss(q1, y) + mse_loss(q2, y)).backward()
    critic.step()
    a = ref.actor(batch["obs"]).tanh() * (high - low) / 2 + (high + low) / 2
    (-ref.critic(torch.cat([batch["obs"], a], 1))[0].mean()).backward()
    if actor_due:
        actor.step()
        with torch.no_grad():
            for slow, fast in ((ref.target, ref.critic), (ref.target_actor, ref.actor)):
                for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                    old.copy_(0.995 * old + 0.005 * new)
    for mine, theirs in zip(s.agent.parameters(), ref.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_fixed_alpha_stays():
    state, metrics = updated(sac, autotune=False)
    assert state["alpha"].item() == 0 and "alpha_loss" not in metrics
    state, _ = updated(sac)
    assert state["alpha"].item() != 0


@both
def test_bf16_is_close(module):
    """After three updates of equal noise the parameters are near, and still float32."""
    exact, metrics = updated(module)
    rounded, their_metrics = updated(module, precision="bf16")
    for name, vector in rounded.items():
        assert vector.dtype == torch.float32
        assert (vector - exact[name]).abs().max() < 0.01
    assert their_metrics["qf_loss"] == pytest.approx(metrics["qf_loss"], rel=0.05)


@both
def test_gradients_of_bf16_are_close(module):
    """Of equal weights, batch and noise every gradient has nearly the same direction and length."""
    batch, noise = random_batch(32), torch.randn(32, A)
    inputs = {"critic": [batch, noise], "alpha": [batch["obs"], noise]}
    inputs["actor"] = [batch["obs"]] if module is td3 else [batch["obs"], noise]
    exact, rounded = learner(module), learner(module, precision="bf16")
    for name in exact.gradients:
        expected, found = (s.gradients[name](*inputs[name])[0] for s in (exact, rounded))
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.05 * expected.norm(), name


@both
@needs_compiler
def test_compiled_update_is_the_eager_one(module):
    eager, expected = updated(module)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as main() does
        compiled, metrics = updated(module, wrap=partial(torch.compile, dynamic=False))
    for name, vector in compiled.items():
        torch.testing.assert_close(vector, eager[name], atol=2e-5, rtol=0)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


@both
def test_q_values_of_bf16_have_the_digits_of_float32(module):
    """From 512 to 1024 bfloat16 holds every fourth number only."""
    critic, x = module.TwinCritic(5), torch.randn(100, 5)
    critic.biases[-1].data += 700
    with torch.autocast("cpu", torch.bfloat16):
        rounded = critic(x)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - critic(x)).abs().max() < 0.01


@both
def test_actor_learns_at_every_second_update(module):
    args, cpu = module.Args(batch_size=4), torch.device("cpu")
    buffer = module.ReplayBuffer(3, O, A, 4, cpu)
    ones = np.ones((3, O))
    buffer.add(ones, ones[:, :A], ones, ones[:, 0], ones[:, 0] > 0)
    drawn = [module.draw(buffer, number, A, args) for number in range(4)]
    if module is sac:
        assert [len(noise) for _, noise in drawn] == [5, 1, 5, 1]
    else:
        assert [actor_due for _, _, actor_due in drawn] == [True, False, True, False]


def one_of_two(rank, folder):
    """Updates on its half."""
    half = slice(16 * rank, 16 * (rank + 1))
    torch.save([updated(m, half, tau=0.5)[0] for m in LEARNERS], folder / f"{rank}.pt")


LEARNERS = (sac, td3, s3rl_sac, s3rl_td3)


def test_two_processes_are_one(tmp_path):
    in_two_processes(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for module, mine, theirs in zip(LEARNERS, first, second, strict=True):
        whole, _ = updated(module, tau=0.5)
        start = learner(module).flat
        for name, vector in whole.items():
            torch.testing.assert_close(mine[name], vector, atol=2e-6, rtol=0)
            assert torch.equal(mine[name], theirs[name])
            assert (vector - start[name]).abs().max() > 1e-5


# CHECKPOINT AND WHOLE RUNS =======================================================================


def test_room_for_the_buffer(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    check_room(tmp_path, 20_000, 160)
    with pytest.raises(UserError, match="--buffer-size"):
        check_room(tmp_path, 20_000, 180)


@both
def test_score_of_the_reloaded_agent_and_the_buffer_in_the_checkpoint(module, tmp_path):
    script = module.__name__.removeprefix("algos.")
    flags = "--env-id Pendulum-v1 --num-envs 2 --batch-size 16 --learning-starts 100 "
    flags += "--total-timesteps 600 --action-repeat 2 --buffer-size 250 --eval-episodes 3"
    run(script, 1, *flags.split(), "--run-dir", tmp_path / "run")
    table = rows(tmp_path / "run")
    lengths = {value for _, key, value in table if key == "charts/episodic_length"}
    assert lengths == {100}, "decisions of an episode"
    newest = checkpoints(tmp_path / "run")[-1]
    for mode in ("deterministic", "stochastic"):
        logged = [value for _, key, value in table if key == f"eval/{mode}_return"][-1]
        returns = module.evaluate(newest, 3, mode == "deterministic")
        assert len(returns) == 3 and returns.mean() == pytest.approx(logged, rel=1e-6)
    saved = torch.load(newest / "rank0.pt", weights_only=True)
    assert saved["buffer"]["rows"].shape == (250, 3 + 1 + 3 + 2)
    assert saved["buffer"]["position"] == 300 % 250
    assert saved["updates"] == (600 - 100) // 2
    assert not saved["buffer"]["rows"][:, -1].any(), "Pendulum only ends at its time limit"


@both
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_that_an_end_leaves_out_do_not_count(module, processes, tmp_path):
    """Each step earns 1 here, the last one too; there is an update for every two decisions."""
    script = module.__name__.removeprefix("algos.")
    flags = "--env-id InvertedPendulum-v4 --num-envs 2 --batch-size 16 --learning-starts 100 "
    flags += "--total-timesteps 600 --action-repeat 8 --updates-per-step 0.5 --eval-episodes 1"
    run(script, processes, *flags.split(), "--run-dir", tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    ranks = [torch.load(path, weights_only=True) for path in sorted(newest.glob("rank*.pt"))]
    assert len(ranks) == processes
    rewards = [rank["buffer"]["rows"][:, -2].view(-1, 2 // processes) for rank in ranks]
    rewards = torch.cat(rewards, 1)
    assert rewards.max() == 8 and rewards.min() < 8
    steps = rewards.sum(1).cumsum(0)
    for rank in ranks:
        assert rank["global_step"] == steps[-1] and 600 - 16 < steps[-1] <= 600
        assert rank["updates"] == (steps > 100).sum()


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("sac_continuous_action", ""),
        ("td3_continuous_action", ""),
        ("srl", ""),
        ("s3rl_sac", "--snapshot-timesteps 0"),
        ("s3rl_td3", "--no-snapshots"),  # evaluated in the first phase
        ("s3rl_ppo", "--no-snapshots --num-steps 64"),
    ],
)
def test_video(script, flags, tmp_path):
    flags += " --env-id Pendulum-v1 --total-timesteps 200 --eval-episodes 2 --capture-video"
    run(script, 1, *flags.split(), "--run-dir", tmp_path / "run")
    videos = list((tmp_path / "run" / "videos").rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 1000 for video in videos)
