"""ppo.py and ppo_continuous_action.py: every formula against hand-computed numbers.

The update of their child by S3RL, in several processes, too.
"""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd

from envs import UserError
from envs.make import make_env, make_vector_env
from tests.launch import ENVIRONMENT, ROOT, checkpoints, in_two_processes, needs_compiler, rows, run

ppo = importlib.import_module("algos.ppo")
continuous = importlib.import_module("algos.ppo_continuous_action")
s3rl_ppo = importlib.import_module("algos.s3rl_ppo")
both = pytest.mark.parametrize("module", [ppo, continuous], ids=["ppo", "continuous"])

pytestmark = pytest.mark.usefixtures("group_of_one")


class Toy(gym.Env):
    """Observes its step counter; reward 1; ends by itself after `life` steps.

    With `ends_at_limit` it terminates in the very step in which the time limit cuts it.
    """

    def __init__(self, discrete, life=None, reward=1.0, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(3) if discrete else box
        self.life, self.reward, self.received = life, reward, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        self.received.append(np.array(action))
        terminated = self.count == self.life
        return np.full(1, self.count, np.float32), self.reward, terminated, False, {}


for name, kwargs, limit in (
    ("Cut", {}, 5),
    ("Ends", {"life": 5}, None),
    ("EndsAtLimit", {"life": 5}, 5),
    ("Nan", {"reward": float("nan")}, 5),
):
    for kind in ("Discrete", "Box"):
        gym.register(
            f"{name}{kind}-v0",
            lambda discrete=kind == "Discrete", **kwargs: Toy(discrete, **kwargs),
            max_episode_steps=limit,
            kwargs=kwargs,
        )


def start(module, env_id, **flags):
    """What main() builds before the first update."""
    args = module.Args(env_id=env_id, **flags)
    envs = make_vector_env(env_id, args.num_envs)
    module.seed_everything(args.seed)
    agent = module.Agent(envs.single_observation_space, envs.single_action_space)
    obs, _ = envs.reset(seed=args.seed)
    N = args.num_envs
    state = {"obs": obs.copy(), "episode_return": np.zeros(N), "episode_length": np.zeros(N)}
    extra = []
    if module is continuous:
        extra = [module.RunningMoments(obs.shape[1:]), module.RunningMoments()]
        extra[0].update(obs)
        state |= {"obs": extra[0].normalize(obs), "discounted_return": np.zeros(N)}
    return SimpleNamespace(args=args, envs=envs, agent=agent, state=state, extra=extra)


def collect(module, s):
    cpu = torch.device("cpu")
    return module.rollout(s.envs, s.agent, s.state, *s.extra, s.args, cpu)


def normalize_nothing(s):
    """Make the moments those of mean 0 and variance 1, and immovable."""
    for moments in s.extra:
        moments.sums[0] = moments.sums[2] = 1e15
        moments.sums[1] = 0
        moments.merged = moments.sums.copy()
    s.state["obs"][:] = 0


# ADVANTAGES ======================================================================================


def column(*values):
    return torch.tensor(values)[:, None]


@both
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # gamma = lambda = 1/2; deltas 1, 3, 6, the middle one 1 where it does not bootstrap
        (False, False, [2.125, 4.5, 6.0]),
        (True, False, [1.25, 1.0, 6.0]),
        (False, True, [1.75, 3.0, 6.0]),
        (True, True, [1.25, 1.0, 6.0]),
    ],
)
def test_gae_by_hand(module, terminated, truncated, expected):
    advantages, returns = module.gae(
        column(1.0, 2.0, 3.0),
        column(1.0, 1.0, 1.0),
        column(2.0, 4.0, 8.0),
        column(False, terminated, False),
        column(False, truncated, False),
        0.5,
        0.5,
    )
    torch.testing.assert_close(advantages, column(*expected))
    torch.testing.assert_close(returns, column(*expected) + 1)


@both
def test_gae_against_the_sum_it_abbreviates(module):
    T, N, gamma, gae_lambda = 40, 3, 0.97, 0.9
    torch.manual_seed(0)
    rewards, values, next_values = torch.randn(3, T, N)
    terminations, truncations = torch.rand(2, T, N) < 0.1
    assert (terminations & truncations).any()
    expected = torch.zeros(T, N)
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if terminations[k, n] else gamma * next_values[k, n]
                expected[t, n] += weight * (rewards[k, n] + bootstrap - values[k, n])
                if terminations[k, n] or truncations[k, n]:
                    break
                weight *= gamma * gae_lambda
    advantages, returns = module.gae(
        rewards, values, next_values, terminations, truncations, gamma, gae_lambda
    )
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


@both
@pytest.mark.parametrize("name", ["Cut", "Ends", "EndsAtLimit"])
def test_bootstrapping_reaches_the_targets(module, name):
    """Reward 1, episodes of 5 steps, V = 2 * counter + 1: all targets are known."""
    env_id = name + ("Discrete-v0" if module is ppo else "Box-v0")
    s = start(
        module, env_id, num_envs=2, num_steps=12, num_minibatches=1, gae_lambda=1.0, gamma=0.5
    )
    normalize_nothing(s)
    s.agent.critic = torch.nn.Linear(1, 1)
    with torch.no_grad():
        s.agent.critic.weight.fill_(2.0)
        s.agent.critic.bias.fill_(1.0)
    batch, episodes = collect(module, s)

    counter = np.arange(12) % 5
    np.testing.assert_allclose(batch["obs"][:, 0, 0], counter, atol=1e-5)
    left = np.minimum(5 - counter, 12 - np.arange(12))  # steps to the cut, or to the rollout's end
    last_value = 2 * (counter + left) + 1.0
    if name != "Cut":
        last_value[:10] = 0.0  # the third episode goes on after the rollout
    expected = 2 * (1 - 0.5**left) + 0.5**left * last_value
    for n in range(2):
        np.testing.assert_allclose(batch["returns"][:, n], expected, rtol=1e-5)
    ends, cuts = batch["terminations"][:, 0].nonzero(), batch["truncations"][:, 0].nonzero()
    assert ends.flatten().tolist() == ([] if name == "Cut" else [4, 9])
    assert cuts.flatten().tolist() == ([4, 9] if name == "Cut" else [])
    assert episodes == [(4, 5, 5), (4, 5, 5), (9, 5, 5), (9, 5, 5)]


@both
def test_rollouts_go_on_where_the_last_one_stopped(module):
    env_id = "CutDiscrete-v0" if module is ppo else "CutBox-v0"
    s = start(module, env_id, num_envs=1, num_steps=3, num_minibatches=1)
    normalize_nothing(s)
    batches = [collect(module, s) for _ in range(4)]
    seen = torch.cat([batch["obs"] for batch, _ in batches]).flatten()
    torch.testing.assert_close(seen, torch.arange(12.0) % 5, atol=1e-5, rtol=0)
    assert [episodes for _, episodes in batches] == [[], [(1, 5, 5)], [], [(0, 5, 5)]]


@both
def test_reward_that_is_not_finite(module):
    env_id = "NanDiscrete-v0" if module is ppo else "NanBox-v0"
    s = start(module, env_id, num_envs=1, num_steps=4, num_minibatches=1)
    with pytest.raises(UserError, match=f"--env-id {env_id}.*not a finite number"):
        collect(module, s)


# LOSS ============================================================================================


@both
@pytest.mark.parametrize(("clip_vloss", "v_loss"), [(True, 1.0175), (False, 0.7375)])
def test_ppo_loss_by_hand(module, clip_vloss, v_loss):
    # ratio 1.5 and 0.5, advantage +1 and -1; the bound acts on the first and on the last
    logprob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    value = torch.tensor([1.0, 0.1, -1.0, 0.3], requires_grad=True)
    mb = {
        "logprobs": torch.zeros(4),
        "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0]),
        "values": torch.zeros(4),
        "returns": torch.tensor([2.0, 1.0, 1.0, 0.0]),
    }
    args = SimpleNamespace(clip_coef=0.2, clip_vloss=clip_vloss, ent_coef=0.1, vf_coef=0.5)
    entropy = torch.tensor([0.5, 0.7, 0.9, 0.7], requires_grad=True)
    loss, parts = module.ppo_loss(logprob, entropy, value, mb, args)
    pg_loss = -(1.2 - 1.5 + 0.5 - 0.8) / 4
    assert parts["policy_loss"].item() == pytest.approx(pg_loss)
    assert parts["value_loss"].item() == pytest.approx(v_loss)
    assert parts["entropy"].item() == pytest.approx(0.7)
    assert loss.item() == pytest.approx(pg_loss - 0.1 * 0.7 + 0.5 * v_loss)
    torch.testing.assert_close(parts["logratio"], logprob.detach())
    assert not any(part.requires_grad for part in parts.values())

    loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4)
    torch.testing.assert_close(entropy.grad, torch.full((4,), -0.1 / 4))
    # the clipped error of the first value is the larger one, and does not depend on the value
    first = 0.0 if clip_vloss else -1.0
    torch.testing.assert_close(value.grad, torch.tensor([first, -0.9, -2.0, 0.3]) * 0.5 / 4)


@both
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "CartPole-v1", "Hopper-v5"])
def test_first_minibatch_has_ratio_one(module, env_id):
    if (module is ppo) != (env_id == "CartPole-v1"):
        pytest.skip("the other kind of actions")
    s = start(module, env_id, num_envs=2, num_steps=64, num_minibatches=4)
    batch, _ = collect(module, s)
    batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    inds = torch.randperm(128)[:32]
    mb = {name: tensor[inds] for name, tensor in batch.items()}
    gradient, metrics = module.minibatch_gradient(s.agent, mb, s.args)
    logratio = metrics["logratio"]
    assert (logratio.exp() - 1).abs().max() < 1e-6
    assert ((logratio.exp() - 1) - logratio).mean().abs() < 1e-7
    assert gradient.abs().max() > 0


# NETWORKS ========================================================================================


@both
def test_numpy_mlp_is_the_module(module):
    torch.manual_seed(0)
    network, x = module.mlp(11, 3, output_gain=1.0), torch.randn(5, 7, 11)
    with torch.no_grad():
        np.testing.assert_allclose(module.numpy_mlp(network)(x.numpy()), network(x), atol=1e-6)
        for p in network.parameters():
            p.add_(0.1)
        np.testing.assert_allclose(module.numpy_mlp(network)(x.numpy()), network(x), atol=1e-5)


@both
def test_initialization(module):
    env = make_env("CartPole-v1" if module is ppo else "Hopper-v5")
    torch.manual_seed(0)
    agent = module.Agent(env.observation_space, env.action_space)
    for network, output_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, output_gain), strict=True):
            assert not layer.bias.any()
            w = layer.weight.detach()
            w = w if w.shape[0] <= w.shape[1] else w.T
            torch.testing.assert_close(
                w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-5 * gain, rtol=0
            )


@both
def test_flatten_parameters_makes_views(module):
    torch.manual_seed(0)
    network = module.mlp(4, 2, output_gain=1.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    flat = module.flatten_parameters(network)
    assert flat.numel() == sum(p.numel() for p in before.values())
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name])

    x = torch.randn(3, 4)
    network(x).sum().backward()
    flat.grad = module.gradient_vector(network(x).sum(), network)
    grads = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert grads.any() and torch.equal(flat.grad, grads)
    torch.optim.SGD([flat], lr=0.1).step()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)

    saved = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flat.data.zero_()
    assert not any(p.any() for p in network.parameters())
    network.load_state_dict(saved)
    expected = torch.cat([tensor.flatten() for tensor in saved.values()])
    assert torch.equal(flat.detach(), expected), "loading must write through to the flat vector"


def test_gaussian_against_torch():
    env = make_env("Hopper-v5")
    torch.manual_seed(0)
    agent = continuous.Agent(env.observation_space, env.action_space)
    agent.actor_logstd.data = torch.tensor([-0.5, 0.2, 1.0])
    obs, actions = torch.randn(6, 2, 11), torch.randn(6, 2, 3)
    with torch.no_grad():
        expected = torch.distributions.Normal(agent.actor(obs), agent.actor_logstd.exp())
        torch.testing.assert_close(agent.logprob(obs, actions), expected.log_prob(actions).sum(-1))
        torch.testing.assert_close(agent.entropy().expand(6, 2), expected.entropy().sum(-1))


# ROLLOUT =========================================================================================


def test_categorical_draws_have_their_frequencies():
    s = start(ppo, "CutDiscrete-v0", num_envs=10, num_steps=2000, num_minibatches=1)
    probabilities = torch.tensor([0.1, 0.3, 0.6])
    with torch.no_grad():
        s.agent.actor[-1].weight.zero_()
        s.agent.actor[-1].bias.copy_(probabilities.log() + 3)
    batch, _ = collect(ppo, s)
    frequencies = np.bincount(batch["actions"].flatten(), minlength=3) / 20_000
    error = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert (np.abs(frequencies - probabilities.numpy()) < 4 * error.numpy()).all()
    expected = probabilities.log()[batch["actions"]]
    torch.testing.assert_close(batch["logprobs"], expected, atol=1e-5, rtol=0)
    # neighbours are independent: also pairs in time and pairs of environments
    a = batch["actions"].numpy()
    for x, y in ((a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        assert np.mean((x == 2) & (y == 2)) == pytest.approx(0.36, abs=0.02)


def test_gaussian_draws_are_stored_whole_and_clipped_for_the_environment():
    s = start(continuous, "CutBox-v0", num_envs=10, num_steps=2000, num_minibatches=1)
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        s.agent.actor[-1].weight.zero_()
        s.agent.actor[-1].bias.copy_(mean)
        s.agent.actor_logstd.copy_(std.log())
    batch, _ = collect(continuous, s)
    actions = batch["actions"].flatten(0, 1)
    assert ((actions.mean(0) - mean).abs() < 4 * std / 20_000**0.5).all()
    assert ((actions.std(0) / std - 1).abs() < 4 / (2 * 20_000) ** 0.5).all()
    received = np.stack([env.unwrapped.received for env in s.envs.envs], 1)
    np.testing.assert_array_equal(received, batch["actions"].clamp(-1, 1))
    expected = torch.distributions.Normal(mean, std).log_prob(batch["actions"]).sum(-1)
    torch.testing.assert_close(batch["logprobs"], expected, atol=1e-5, rtol=1e-5)


def test_running_moments_against_numpy_and_gymnasium():
    generator = np.random.default_rng(0)
    moments, reference = continuous.RunningMoments((3,)), RunningMeanStd(shape=(3,))
    mean, std = moments.mean_and_std()
    np.testing.assert_allclose(mean, 0)
    np.testing.assert_allclose(std, 1)
    chunks = [generator.normal([0, 5, -2], [1, 0.1, 30], (n, 3)) for n in (1, 7, 100, 1)]
    for chunk in chunks:
        moments.update(chunk)
        reference.update(chunk)
        mean, std = moments.mean_and_std()
        np.testing.assert_allclose(mean, reference.mean, rtol=1e-9)
        np.testing.assert_allclose(std, np.sqrt(reference.var + 1e-8), rtol=1e-7)
    whole = np.concatenate(chunks)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, whole.std(0), rtol=5e-3)
    x = np.array([[0.0, 5.0, 1e6]])
    expected = np.clip((x - mean) / std, -10, 10).astype(np.float32)
    np.testing.assert_array_equal(moments.normalize(x), expected)
    assert moments.normalize(x)[0, 2] == 10

    again = continuous.RunningMoments((3,))
    again.load_state(moments.state())
    again.update(whole)
    assert not np.array_equal(again.sums, moments.sums), "a loaded state is a copy"


class Script(gym.Env):
    """Plays back rewards and ends."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, steps):
        self.steps = iter(steps)

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward, terminated, truncated = next(self.steps)
        return np.zeros(1, np.float32), reward, terminated, truncated, {}


def test_scale_rewards_is_gymnasiums_wrapper():
    generator, T, gamma = np.random.default_rng(0), 150, 0.9
    rewards = generator.normal(3, 2, T)
    rewards[140] = 1e4  # hits the bound
    terminations, truncations = np.zeros((2, T), bool)
    terminations[[10, 40]] = True
    truncations[[25, 40]] = True
    wrapper = gym.wrappers.NormalizeReward(
        Script(zip(rewards, terminations, truncations, strict=True)), gamma=gamma, epsilon=1e-8
    )
    wrapper.reset()
    expected = []
    for t in range(T):
        expected.append(np.clip(wrapper.step(np.zeros(1))[1], -10, 10))
        if terminations[t] or truncations[t]:
            wrapper.reset()
    state, moments = {"discounted_return": np.zeros(1)}, continuous.RunningMoments()
    scaled = []
    for part in np.array_split(np.arange(T), [7, 26, 41]):  # rollouts of any length
        scaled += continuous.scale_rewards(
            rewards[part, None], terminations[part, None], state, moments, gamma
        ).tolist()
    np.testing.assert_allclose(np.ravel(scaled), expected, rtol=1e-5)
    assert scaled[140] == [10]


def test_scale_rewards_of_several_environments_shares_the_moments():
    rewards = np.array([[1.0, 5.0], [2.0, -3.0]])
    state, moments = {"discounted_return": np.zeros(2)}, continuous.RunningMoments()
    ends = np.array([[False, False], [False, True]])
    scaled = continuous.scale_rewards(rewards, ends, state, moments, 0.5)
    seen = RunningMeanStd()
    seen.update(np.array([1.0, 5.0]))
    np.testing.assert_allclose(scaled[0], rewards[0] / np.sqrt(seen.var + 1e-8), rtol=1e-6)
    seen.update(np.array([2.5, -3.0]))
    np.testing.assert_allclose(scaled[1], rewards[1] / np.sqrt(seen.var + 1e-8), rtol=1e-6)
    np.testing.assert_array_equal(state["discounted_return"], [2.5, -3.0])


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "CutBox-v0"])
def test_observations_are_those_of_gymnasiums_wrapper(env_id):
    s = start(continuous, env_id, num_envs=1, num_steps=128, num_minibatches=1)
    low, high = s.envs.single_action_space.low, s.envs.single_action_space.high
    batches = [collect(continuous, s)[0] for _ in range(2)]
    batch = {name: torch.cat([b[name] for b in batches])[:, 0].numpy() for name in batches[0]}

    env = gym.wrappers.NormalizeObservation(make_env(env_id), epsilon=1e-8)
    obs, _ = env.reset(seed=s.args.seed)
    episodes = 0
    for t in range(256):
        np.testing.assert_allclose(batch["obs"][t], np.clip(obs, -10, 10), rtol=1e-4, atol=1e-5)
        obs, _, terminated, truncated, _ = env.step(np.clip(batch["actions"][t], low, high))
        assert terminated == batch["terminations"][t]
        if terminated or truncated:
            obs, _ = env.reset()
            episodes += 1
    assert episodes > 10


# UPDATE ==========================================================================================


def random_batch(module, size):
    """A batch on which no two quantities agree by chance."""
    torch.manual_seed(5)
    if module is ppo:
        actions, logprobs = torch.randint(2, (size,)), torch.randn(size) * 0.3 - 0.7
    else:
        actions, logprobs = torch.randn(size, 2), torch.randn(size) * 0.3 - 3.0
    batch = {"obs": torch.randn(size, 4), "actions": actions, "logprobs": logprobs}
    for name in ("values", "advantages", "returns"):
        batch[name] = torch.randn(size) * 2 + 1
    return batch


def updated(module, part, **flags):
    """Parameters and metrics after update() on random_batch(64)[part]."""
    args = module.Args(num_envs=2, num_steps=32, **flags)
    observations = gym.spaces.Box(-1, 1, (4,))
    actions = gym.spaces.Discrete(2) if module is ppo else gym.spaces.Box(-1, 1, (2,))
    torch.manual_seed(0)
    agent = module.Agent(observations, actions)
    flat = module.flatten_parameters(agent)
    start = flat.detach().clone()
    optimizer = torch.optim.Adam([flat], lr=args.learning_rate, eps=1e-5, fused=True)
    batch = {name: tensor[part] for name, tensor in random_batch(module, 64).items()}

    def gradient(mb):
        return module.minibatch_gradient(agent, mb, args)

    metrics = module.update(flat, optimizer, batch, gradient, args)
    return start, flat.detach(), metrics, optimizer


@both
@pytest.mark.parametrize("norm_adv", [True, False])
def test_update_is_plain_torch(module, norm_adv):
    """One minibatch, by autograd on the module's parameters, clip_grad_norm_ and Adam."""
    flags = {"num_minibatches": 1, "update_epochs": 1, "norm_adv": norm_adv, "ent_coef": 0.01}
    _, ours, metrics, _ = updated(module, slice(None), **flags)
    args, batch = module.Args(num_envs=2, num_steps=32, **flags), random_batch(module, 64)
    actions = gym.spaces.Discrete(2) if module is ppo else gym.spaces.Box(-1, 1, (2,))
    torch.manual_seed(0)
    agent = module.Agent(gym.spaces.Box(-1, 1, (4,)), actions)
    if module is ppo:
        distribution = torch.distributions.Categorical(logits=agent.actor(batch["obs"]))
        logprob, entropy = distribution.log_prob(batch["actions"]), distribution.entropy()
    else:
        distribution = torch.distributions.Normal(
            agent.actor(batch["obs"]), agent.actor_logstd.exp()
        )
        logprob = distribution.log_prob(batch["actions"]).sum(-1)
        entropy = distribution.entropy().sum(-1)
    advantages = batch["advantages"]
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (logprob - batch["logprobs"]).exp()
    pg_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    value = agent.critic(batch["obs"]).flatten()
    v_clipped = batch["values"] + (value - batch["values"]).clamp(-0.2, 0.2)
    errors = torch.stack([value, v_clipped]) - batch["returns"]
    loss = pg_loss - 0.01 * entropy.mean() + 0.5 * 0.5 * errors.square().amax(0).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    assert norm > 0.5, "or the bound is not tested"
    torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5).step()
    theirs = torch.cat([p.detach().flatten() for p in agent.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert metrics["losses/policy_loss"] == pytest.approx(pg_loss.item(), rel=1e-4)
    assert metrics["losses/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    clipfrac = ((ratio - 1).abs() > 0.2).float().mean().item()
    assert metrics["losses/clipfrac"] == pytest.approx(clipfrac)
    k3 = ((ratio - 1) - ratio.log()).mean().item()
    assert metrics["losses/approx_kl"] == pytest.approx(k3, rel=1e-4)


@both
def test_explained_variance(module):
    *_, metrics, _ = updated(module, slice(None), num_minibatches=1, update_epochs=1)
    batch = random_batch(module, 64)
    expected = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    assert metrics["losses/explained_variance"] == pytest.approx(expected.item(), rel=1e-5)


@both
def test_every_sample_once_an_epoch(module, monkeypatch):
    seen, original = [], module.minibatch_gradient

    def spy(agent, mb, args):
        seen.append(mb["obs"][:, 0])
        return original(agent, mb, args)

    monkeypatch.setattr(module, "minibatch_gradient", spy)
    *_, optimizer = updated(module, slice(None), num_minibatches=4, update_epochs=3)
    assert [len(part) for part in seen] == [16] * 12
    assert optimizer.state_dict()["state"][0]["step"] == 12
    everything = random_batch(module, 64)["obs"][:, 0].sort().values
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert all(torch.equal(epoch.sort().values, everything) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]), "another order each epoch"


@both
def test_target_kl_leaves_early(module):
    flags = {"num_minibatches": 4, "update_epochs": 3}
    for target_kl, steps in ((None, 12), (1e9, 12), (1e-9, 4)):
        *_, optimizer = updated(module, slice(None), target_kl=target_kl, **flags)
        assert optimizer.state_dict()["state"][0]["step"] == steps


@both
@needs_compiler
def test_compiled_gradient_is_the_eager_one(module, monkeypatch):
    flags = {"num_minibatches": 1, "update_epochs": 2}
    _, eager, expected, _ = updated(module, slice(None), **flags)
    compiled = torch.compile(module.minibatch_gradient, dynamic=False)
    monkeypatch.setattr(module, "minibatch_gradient", compiled)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as main() does
        _, parameters, metrics, _ = updated(module, slice(None), **flags)
    torch.testing.assert_close(parameters, eager, atol=1e-6, rtol=0)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


def one_of_two(rank, folder):
    """update() on its half, and its share of the moments."""
    results = {}
    for module, flags in TWO_PROCESS_UPDATES:
        half = slice(32 * rank, 32 * (rank + 1))
        _, parameters, metrics, _ = updated(module, half, **flags)
        results[f"{module.__name__} {flags}"] = parameters, metrics
    moments, generator = continuous.RunningMoments((2,)), np.random.default_rng(0)
    for rollout in generator.normal(3, 2, (3, 2, 5, 2)):  # three rollouts of two ranks
        moments.update(rollout[rank])
        moments.merge(torch.device("cpu"))
    results["moments"] = moments.state()["sums"]
    torch.save(results, folder / f"{rank}.pt")


ONE_MINIBATCH = {"num_minibatches": 1, "update_epochs": 2}
TWO_PROCESS_UPDATES = [
    (module, ONE_MINIBATCH | {"norm_adv": norm_adv, "target_kl": target_kl})
    for module in (ppo, continuous)
    for norm_adv in (True, False)
    for target_kl in (None, 1e-9)
] + [(s3rl_ppo, ONE_MINIBATCH)]


def test_two_processes_are_one(tmp_path):
    in_two_processes(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for module, flags in TWO_PROCESS_UPDATES:
        start, whole, metrics, _ = updated(module, slice(None), **flags)
        halves, their_metrics = first[f"{module.__name__} {flags}"]
        assert (whole - start).abs().max() > 1e-4
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=0)
        assert torch.equal(halves, second[f"{module.__name__} {flags}"][0])
        for name in ("policy_loss", "value_loss", "grad_norm", "approx_kl", "clipfrac"):
            key = f"losses/{name}"
            assert their_metrics[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6)
    moments = continuous.RunningMoments((2,))
    moments.update(np.random.default_rng(0).normal(3, 2, (3, 2, 5, 2)).reshape(-1, 2))
    for theirs in (first["moments"], second["moments"]):
        np.testing.assert_allclose(theirs, moments.sums, rtol=1e-12)


GLOO_IS_AT_WORK = """
import sys, torch, torch.distributed as dist
from algos import ppo
ppo.setup_process("cpu")
import torch.distributed.nn  # its default arguments keep the group: destroying joins no threads
sys.setswitchinterval(100)
for _ in range(1000):
    dist.all_reduce(torch.ones(1), async_op=True)
"""


@pytest.mark.parametrize("repeat", [1, 2])
def test_process_ends_while_gloo_drops_tensors(repeat):
    """PITFALL: without the wait in setup_process() four of five such processes are aborted.

    The cause is PyTorch's issue 190489.
    """
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GLOO_IS_AT_WORK]
    subprocess.run(command, env=environment, check=True, timeout=120)


# CHECKPOINT ======================================================================================


@both
def test_newer_checkpoints_make_way(module, tmp_path):
    """After a step back the last two are those of the new future, not the damaged newer ones."""

    def names():
        return [path.name.lstrip("0") for path in checkpoints(tmp_path)]

    for step, expected in ((10, ["10"]), (20, ["10", "20"]), (30, ["20", "30"])):
        path = module.save_checkpoint(tmp_path, step, {"x": torch.zeros(3)})
        assert path == checkpoints(tmp_path)[-1] and names() == expected
    (path / "rank0.pt").write_bytes(b"")
    assert module.find_checkpoint(tmp_path, "auto").name.endswith("20")
    path = module.save_checkpoint(tmp_path, 25, {"x": torch.zeros(3)})
    assert path.name.endswith("25") and names() == ["20", "25"]
    assert module.find_checkpoint(tmp_path, "auto") == path


# WHOLE RUNS ======================================================================================


@both
def test_annealing_and_the_score_of_the_reloaded_agent(module, tmp_path):
    script = module.__name__.removeprefix("algos.")
    env_id = "CartPole-v1" if module is ppo else "InvertedPendulum-v5"
    flags = f"--env-id {env_id} --num-envs 2 --num-steps 64 --total-timesteps 600 --eval-episodes 3"
    run(script, 1, *flags.split(), "--run-dir", tmp_path / "run")
    table = rows(tmp_path / "run")
    rates = [value for _, key, value in table if key == "charts/learning_rate"]
    full = module.Args().learning_rate
    assert rates == pytest.approx([full, full * 3 / 4, full / 2, full / 4])

    newest, drawn = checkpoints(tmp_path / "run")[-1], torch.get_rng_state()
    for mode in ("deterministic", "stochastic"):
        logged = [value for _, key, value in table if key == f"eval/{mode}_return"][-1]
        returns = module.evaluate(newest, 3, mode == "deterministic")
        assert len(returns) == 3 and returns.mean() == pytest.approx(logged, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), drawn), "an evaluation changes what training draws"


@both
def test_video(module, tmp_path):
    pytest.importorskip("moviepy")
    script = module.__name__.removeprefix("algos.")
    env_id = "CartPole-v1" if module is ppo else "Pendulum-v1"
    flags = f"--env-id {env_id} --num-envs 2 --num-steps 64 --total-timesteps 128"
    flags += " --eval-episodes 2 --capture-video"
    run(script, 1, *flags.split(), "--run-dir", tmp_path / "run")
    videos = list((tmp_path / "run" / "videos").rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 1000 for video in videos)
