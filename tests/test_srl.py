"""srl.py: losses, actor, model, loop, updates; FAS and evaluation at every length, also of SAC."""

import copy
import importlib
import math
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn.functional import linear, mse_loss

from envs import UserError
from envs.episodes import make_episodes, play_episodes
from envs.make import make_env, make_vector_env
from envs.scores import (
    EVALUATED_LENGTHS,
    FAS_LENGTHS,
    FAS_REFERENCE,
    frequency_averaged_score,
    length_metrics,
)
from tests.launch import checkpoints, in_two_processes, needs_compiler, rows, run

sac = importlib.import_module("algos.sac_continuous_action")
srl = importlib.import_module("algos.srl")
O, A, J = 5, 2, 3
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 1.0], np.float32)

pytestmark = pytest.mark.usefixtures("group_of_one")


def make_agent():
    torch.manual_seed(0)
    return srl.Agent(gym.spaces.Box(-np.inf, np.inf, (O,)), gym.spaces.Box(LOW, HIGH))


def random_batch(seed, size=32):
    torch.manual_seed(seed)
    batch = {"obs_action": torch.randn(size, O + A), "next_obs": torch.randn(size, O)}
    batch |= {"previous": torch.randn(size, A), "rewards": torch.randn(size)}
    batch |= {"terminations": (torch.rand(size) < 0.3).float()}
    return batch | {"obs": batch["obs_action"][:, :O], "actions": batch["obs_action"][:, O:]}


# FAS =============================================================================================


def test_fas_of_a_perfect_agent_and_of_a_line():
    assert FAS_LENGTHS == (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
    for env_id in ("InvertedPendulum-v2", "InvertedPendulum-v5"):
        assert frequency_averaged_score([1000] * 16, env_id) == pytest.approx(29 / 30)
    # under a line from 1000 at length 1 to 0 at 30 lies half of that
    line = [1000 * (30 - s) / 29 for s in FAS_LENGTHS]
    assert frequency_averaged_score(line, "InvertedPendulum-v4") == pytest.approx(29 / 60)
    # all at length 1: a triangle of base 1 and height 9400
    peak = [9400, *[0] * 15]
    assert frequency_averaged_score(peak, "InvertedDoublePendulum-v2") == pytest.approx(0.5 / 30)


def test_fas_offsets_and_unknown_environments():
    # (-200 + 1550) / 1350 = 1, and -1550 is 0; nothing is clipped
    assert frequency_averaged_score([-200] * 16, "Pendulum-v1") == pytest.approx(29 / 30)
    assert frequency_averaged_score([-1550] * 16, "Pendulum-v1") == 0
    assert frequency_averaged_score([-1700] * 16, "Pendulum-v1") < 0
    assert frequency_averaged_score([-5] * 16, "Reacher-v4") == pytest.approx(29 / 30)
    assert frequency_averaged_score([100] * 16, "MountainCarContinuous-v0") is None
    assert frequency_averaged_score([100] * 16, "CartPole-v1") is None
    assert len(FAS_REFERENCE) == 11


def test_best_evaluation_is_chosen_by_its_own_return():
    best = {"return": -math.inf, "fas": 0.0}
    low, high = [100.0] * 17, [500.0] * 17
    first = length_metrics(high, 300, best, "InvertedPendulum-v4")
    assert first["eval/fas"] == first["eval/fas_of_best"] == pytest.approx(0.5 * 29 / 30)
    assert first["eval/return@1"] == first["eval/return@30"] == first["eval/return@random"] == 500
    second = length_metrics(low, 300, best, "InvertedPendulum-v4")  # no better: the first stays
    assert second["eval/fas_of_best"] == first["eval/fas"] > second["eval/fas"]
    third = length_metrics(low, 301, best, "InvertedPendulum-v4")  # a lower FAS, but chosen
    assert third["eval/fas_of_best"] == third["eval/fas"] == second["eval/fas"]
    assert best == {"return": 301, "fas": third["eval/fas"]}
    assert not [key for key in length_metrics(low, 9, best, "Acrobot-v1") if "fas" in key]


# EPISODES ========================================================================================


def test_held_actions_are_action_repeat():
    """As training with --action-repeat has it, with actions that depend on the observation."""

    def decide(obs, _, steps):
        return np.sin(9 * obs[:, 1:2])[:, None].repeat(steps, 1)

    for length in (1, 3, 7):  # 7 does not divide the 200 steps of an episode
        [mine] = play_episodes(make_episodes("Pendulum-v1", 3), 5, [length], decide)
        for i, value in enumerate(mine):
            env, total, done = make_env("Pendulum-v1", action_repeat=length), 0.0, False
            obs, _ = env.reset(seed=5 + i)
            while not done:
                obs, reward, terminated, truncated, _ = env.step(np.sin(9 * obs[1:2]))
                total, done = total + reward, terminated or truncated
            assert value == pytest.approx(total, rel=1e-5)


class Recorder(gym.Env):
    """Observes how often it was stepped; reward: the action; ends after `life` steps."""

    def __init__(self, life=5, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = gym.spaces.Box(-100.0, 100.0, (1,), np.float32)
        self.life = life

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1), {}

    def step(self, action):
        self.count += 1
        obs = np.full(1, float(self.count))
        return obs, float(action[0]), self.count == self.life, False, {}


gym.register("Recorder-v0", Recorder)
gym.register("CutRecorder-v0", Recorder, max_episode_steps=5, kwargs={"life": None})


def test_decisions_of_an_evaluation():
    seen = []

    def decide(obs, previous, steps):
        seen.append((obs[:, 0].tolist(), previous[:, 0].tolist(), steps))
        return obs[:, None] * 10 + np.arange(steps)[:, None]

    [returns] = play_episodes(make_episodes("Recorder-v0", 2), 0, [3], decide)
    # the second decision, at count 3, has two of its three actions taken
    assert seen == [([0, 0], [0, 0], 3), ([3, 3], [2, 2], 3)]
    assert returns.tolist() == [0 + 1 + 2 + 30 + 31] * 2


def test_random_lengths():
    asked = []

    def decide(obs, _, steps):
        asked.append((len(obs), steps))
        return np.zeros((len(obs), steps, 1))

    play_episodes(make_episodes("Pendulum-v1", 20), 3, [None], decide)
    again, asked = asked, []
    play_episodes(make_episodes("Pendulum-v1", 20), 3, [None], decide)
    assert again == asked, "the same seed draws the same lengths"
    # 8.5 steps on average: 200 / 8.5 decisions of each of 20 episodes
    assert sum(n for n, _ in asked) == pytest.approx(20 * 200 / 8.5, rel=0.1)
    assert max(steps for _, steps in asked) == 16


# LOSSES ==========================================================================================


def test_actor_and_alpha_loss_by_hand():
    logprob = torch.tensor([[1.0, -3.0], [2.0, 0.0]], requires_grad=True)  # J = 2, M = 2
    q = torch.tensor([[[1.0, 5.0], [0.0, 1.0]], [[2.0, 4.0], [3.0, -1.0]]], requires_grad=True)
    loss, metrics = srl.actor_loss(logprob, q, 0.5)
    # a sum over the sequence of means over the batch
    assert loss.item() == ((0.5 - 1) + (-1.5 - 4)) / 2 + ((1 - 0) + (0 + 1)) / 2
    assert metrics["entropy"].item() == 0
    loss.backward()
    torch.testing.assert_close(logprob.grad, torch.full((2, 2), 0.25))
    lower = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    torch.testing.assert_close(q.grad, -0.5 * lower)

    log_alpha = torch.tensor(0.3, requires_grad=True)
    loss = srl.alpha_loss(log_alpha, logprob, -2)
    assert loss.item() == pytest.approx(-0.3 * (0 - 2))
    loss.backward()
    assert log_alpha.grad.item() == 2, "an entropy of 0 is above H = -2, so alpha must fall"


def test_model_loss_by_hand():
    predicted = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert srl.model_loss(predicted, torch.ones(2, 2)).item() == (0 + 1 + 1 + 9) / 4


def test_losses_of_one_action_are_those_of_sac():
    """J = 1, given the same log-probabilities and values; also the target and L_Q."""
    logprob, q = torch.randn(1, 9), torch.randn(2, 1, 9)
    mine, metrics = srl.actor_loss(logprob, q, 0.4)
    theirs, their_metrics = sac.actor_loss(logprob[0], q[:, 0], 0.4)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(metrics, their_metrics)
    # alpha is pushed to the same side; SAC's gradient has the factor alpha
    slopes = []
    for module, values in ((srl, logprob), (sac, logprob[0])):
        log_alpha = torch.tensor(0.7, requires_grad=True)
        module.alpha_loss(log_alpha, values, -A).backward()
        slopes.append(log_alpha.grad.item())
    assert slopes[1] == pytest.approx(slopes[0] * math.exp(0.7))
    r, term = torch.randn(9), (torch.rand(9) < 0.5).float()
    target = srl.td_target(r, term, q[:, 0], logprob[0], 0.4, 0.99)
    torch.testing.assert_close(target, sac.td_target(r, term, q[:, 0], logprob[0], 0.4, 0.99))
    assert srl.critic_loss(q[:, 0], target)[0] == sac.critic_loss(q[:, 0], target)[0]


def test_squashed_gaussian_is_cut_off():
    raw, noise = torch.tensor([[0.3, 5.0], [0.3, -50.0], [0.3, -1.0]]), torch.ones(3, 1)
    raw.requires_grad_()
    actions, logprob = srl.squashed_gaussian(raw, noise, 2.0, 1.0)
    std = torch.tensor([2.0, -20.0, -1.0]).exp()
    u = 0.3 + std
    torch.testing.assert_close(actions[:, 0], 2 * u.tanh() + 1)
    normal = torch.distributions.Normal(torch.full((3,), 0.3), std)
    expected = normal.log_prob(u) - (2 * (1 - u.tanh() ** 2) + 1e-6).log()
    torch.testing.assert_close(logprob[2], expected[2])
    logprob.sum().backward()
    assert raw.grad[:2, 1].eq(0).all() and raw.grad[2, 1] != 0


# NETWORKS ========================================================================================


def slow_sequence(agent, obs, action, noise):
    """Eqs. (8), (9) and (2) with the gates of a GRU written out."""
    start, cell, heads = (agent.actor[name] for name in ("start", "cell", "heads"))
    h = linear(linear(obs, start[0].weight, start[0].bias).relu(), start[2].weight, start[2].bias)
    actions, logprobs = [], []
    for eps in noise:
        x = linear(action, cell.weight_ih, cell.bias_ih).split(256, 1)
        g = linear(h, cell.weight_hh, cell.bias_hh).split(256, 1)
        reset, keep = (x[0] + g[0]).sigmoid(), (x[1] + g[1]).sigmoid()
        h = (1 - keep) * (x[2] + reset * g[2]).tanh() + keep * h
        out = linear(h, heads.weight, heads.bias)
        mean, std = out[:, :A], out[:, A:].clamp(-20, 2).exp()
        u = mean + std * eps
        action = u.tanh() * agent.scale + agent.middle
        density = torch.distributions.Normal(mean, std).log_prob(u)
        logprobs.append((density - (agent.scale * (1 - u.tanh() ** 2) + 1e-6).log()).sum(1))
        actions.append(action)
    return torch.stack(actions), torch.stack(logprobs)


def test_sequence_is_the_written_out_one():
    agent, obs, previous = make_agent(), torch.randn(6, O), torch.randn(6, A)
    noise = torch.randn(J, 6, A)
    mine, theirs = agent.sample(obs, previous, noise), slow_sequence(agent, obs, previous, noise)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    other, _ = agent.sample(obs, previous + 1, noise)
    assert (other[0] - theirs[0][0]).abs().max() > 1e-3, "the action before counts"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, J, 16])
def test_numpy_policy_is_the_network(steps):
    agent = make_agent()
    flat = srl.flatten_parameters(agent.actor)
    act = srl.numpy_policy(agent)
    obs, previous, noise = torch.randn(4, O), torch.randn(4, A), torch.randn(steps, 4, A)
    for _ in range(2):
        with torch.no_grad():
            expected, _ = agent.sample(obs, previous, noise)
        actions = act(obs.numpy(), previous.numpy(), noise.numpy().swapaxes(0, 1))
        np.testing.assert_allclose(actions, expected.swapaxes(0, 1), atol=1e-4)
        assert (actions >= LOW - 1e-6).all() and (actions <= HIGH + 1e-6).all()
        flat.data.mul_(1.5)  # on a CPU the weights are views, so the next round sees this


def test_initialization():
    """Xavier and zeros, but for the cell; targets are copies."""
    agent = make_agent()
    for name, p in [*agent.actor.named_parameters(), *agent.grader.named_parameters()]:
        if "cell" in name:
            assert p.abs().max() <= 256**-0.5 and p.any()
        elif "bias" in name:
            assert not p.any(), name
        else:
            bound = (6 / sum(p.shape[-2:])) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
    for mine, target in zip(agent.grader.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(mine, target) and mine is not target
    q = agent.grader["critic"](torch.randn(4, O + A))
    assert (q[0] - q[1]).abs().min() > 0, "two critics, not one twice"


def test_spaces_that_are_refused():
    box = gym.spaces.Box(-1, 1, (3,))
    for actions in (gym.spaces.Discrete(2), gym.spaces.Box(-np.inf, 1, (2,))):
        with pytest.raises(UserError, match=r"not a bounded Box: use ppo\.py"):
            srl.Agent(box, actions)


# LOOP ============================================================================================


def played(env_id, steps, length):
    """Rows of the buffer and episodes, one environment; action t of a plan made at `obs` is
    10 obs + t + 1."""
    envs = make_vector_env(env_id, 1)
    obs, _ = envs.reset(seed=0)
    buffer = srl.ReplayBuffer(100, 1, 1, 4, torch.device("cpu"))
    state = {"obs": obs.astype(np.float32), "previous": np.zeros((1, 1), np.float32)}
    state |= {"plan": np.zeros((1, length, 1), np.float32), "position": np.full(1, length)}
    state |= {"episode_return": np.zeros(1), "episode_length": np.zeros(1)}
    episodes, asked = [], []

    def act(obs, previous, noise):
        asked.append((obs[0, 0], previous[0, 0]))
        assert noise.shape == (1, length, 1)
        return 10 * obs[:, None] + 1 + np.arange(length)[:, None]

    for _ in range(steps):
        actions = srl.next_actions(state, act, -1, 1, False)
        episodes += srl.env_step(envs, actions, state, buffer)
    return buffer.rows[: buffer.size].numpy(), episodes, asked


@pytest.mark.parametrize("name", ["Recorder", "CutRecorder"])
def test_sequences_are_open_loop_and_end_with_the_episode(name):
    rows, episodes, asked = played(f"{name}-v0", 10, 3)
    taken = [1, 2, 3, 31, 32] * 2  # the third action of the second plan is dropped
    np.testing.assert_array_equal(rows[:, 0], [0, 1, 2, 3, 4] * 2)
    np.testing.assert_array_equal(rows[:, 1], taken)
    np.testing.assert_array_equal(rows[:, 2], [1, 2, 3, 4, 5] * 2)
    # the action before: 0 at the start of each episode
    np.testing.assert_array_equal(rows[:, 3], [0, 1, 2, 3, 31] * 2)
    np.testing.assert_array_equal(rows[:, 4], taken)
    np.testing.assert_array_equal(rows[:, 5], [0, 0, 0, 0, name == "Recorder"] * 2)
    assert asked == [(0, 0), (3, 3), (0, 0), (3, 3)]
    assert episodes == [(sum(taken[:5]), 5)] * 2


def test_environments_decide_at_their_own_moments():
    state = {"obs": np.zeros((3, O)), "previous": np.zeros((3, A))}
    state |= {"plan": np.zeros((3, 2, A), np.float32), "position": np.array([2, 1, 2])}
    state["plan"][1] = 7

    def act(obs, previous, noise):
        assert noise.shape == (2, 2, A)
        return np.arange(8).reshape(2, 2, A)

    actions = srl.next_actions(state, act, LOW, HIGH, False)
    np.testing.assert_array_equal(actions, [[0, 1], [7, 7], [4, 5]])
    np.testing.assert_array_equal(state["position"], [1, 2, 1])
    actions = srl.next_actions(state, None, LOW, HIGH, True)  # the second one plans at random
    np.testing.assert_array_equal(actions[[0, 2]], [[2, 3], [6, 7]])
    assert (actions[1] >= LOW).all() and (actions[1] <= HIGH).all() and actions[1].any()


def test_buffer_gives_two_batches():
    buffer = srl.ReplayBuffer(6, 2, 1, 200, torch.device("cpu"))
    for t in range(5):  # 2 environments; the first two pairs are overwritten
        i = np.array([10 * t, 10 * t + 1])
        column = i[:, None].astype(float)
        obs, next_obs = np.hstack([column, column + 0.5]), np.hstack([column + 2, column + 3])
        buffer.add(obs, -column, next_obs, column + 0.125, i + 0.25, i % 2 == 1)
    assert buffer.size == 6 and buffer.position == 4
    batches = list(buffer.sample())
    for batch in batches:
        first = batch["obs"][:, 0]
        assert len(first) == 200 and set(first.tolist()) == {20, 21, 30, 31, 40, 41}
        torch.testing.assert_close(batch["obs"][:, 1], first + 0.5)
        both = torch.cat([batch["obs"], -first[:, None]], 1)
        torch.testing.assert_close(batch["obs_action"], both)
        torch.testing.assert_close(batch["actions"], -first[:, None])
        torch.testing.assert_close(batch["next_obs"], torch.stack([first + 2, first + 3], 1))
        torch.testing.assert_close(batch["previous"], first[:, None] + 0.125)
        torch.testing.assert_close(batch["rewards"], first + 0.25)
        torch.testing.assert_close(batch["terminations"], first % 2)
    assert not torch.equal(batches[0]["obs"], batches[1]["obs"])
    again = srl.ReplayBuffer(6, 2, 1, 4, torch.device("cpu"))
    again.load_state(buffer.state())
    assert (again.size, again.position) == (6, 4) and torch.equal(again.rows, buffer.rows)


# UPDATE ==========================================================================================


def learner(length=J, **flags):
    """What main() builds: agent, flat vectors, optimizers, gradients, args."""
    args, agent = srl.Args(sequence_length=length, **flags), make_agent()
    with torch.no_grad():  # so that targets are not the networks
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.std(correction=0) + 0.01)
    flat = {n: srl.flatten_parameters(getattr(agent, n)) for n in ("grader", "actor", "target")}
    flat["alpha"] = agent.log_alpha
    optimizers = {n: srl.adam(flat[n], args.learning_rate) for n in ("grader", "actor", "alpha")}
    gradients = {"grader": srl.grader_gradient, "actor": srl.actor_gradient}
    gradients = {name: partial(f, agent, args=args) for name, f in gradients.items()}
    return SimpleNamespace(
        agent=agent, flat=flat, optimizers=optimizers, gradients=gradients, args=args
    )


def updated(part=slice(None), steps=3, wrap=lambda f: f, **flags):
    """Parameters and metrics after some updates on random batches[part]."""
    s = learner(**flags)
    gradients = {name: wrap(f) for name, f in s.gradients.items()}
    for number in range(steps):
        batches = [{k: v[part] for k, v in random_batch(seed).items()} for seed in (1, 2)]
        torch.manual_seed(10 + number)
        noise = torch.randn(1 + J, 32, A)[:, part]
        metrics = srl.update(s.flat, s.optimizers, gradients, batches, noise, s.args)
    state = {name: vector.detach().clone() for name, vector in s.flat.items()}
    return state, {name: value.item() for name, value in metrics.items()}


def parts(vector, module):
    """{parameter: its part of a vector like that of `flatten_parameters`}."""
    parameters = list(module.parameters())
    cut = vector.split([p.numel() for p in parameters])
    return {p: part.view_as(p) for p, part in zip(parameters, cut, strict=True)}


@pytest.mark.parametrize("length", [1, J])
def test_update_is_plain_torch(length):
    """Separate losses, graphs and Adams, one step of the sequence after the other."""
    s = learner(length)
    ref = copy.deepcopy(s.agent)
    nets = {"actor": ref.actor, "critic": ref.grader["critic"], "model": ref.grader["model"]}
    adams = {name: torch.optim.Adam(net.parameters(), lr=3e-4) for name, net in nets.items()}
    adams["alpha"] = torch.optim.Adam([ref.log_alpha], lr=3e-4)
    first, second = random_batch(1), random_batch(2)
    noise = torch.randn(1 + length, 32, A)
    srl.update(s.flat, s.optimizers, s.gradients, [first, second], noise, s.args)

    slopes = {}

    def step(name, loss):
        adams[name].zero_grad()
        loss.backward()
        slopes[name] = [p.grad.clone() for p in adams[name].param_groups[0]["params"]]
        adams[name].step()

    with torch.no_grad():
        # after s' comes an actor that has just done a
        a, logprob = slow_sequence(ref, first["next_obs"], first["obs_action"][:, O:], noise[:1])
        next_q = ref.target["critic"](torch.cat([first["next_obs"], a[0]], 1)).min(0)[0]
        y = next_q - ref.log_alpha.exp() * logprob[0]
        y = first["rewards"] + 0.99 * (1 - first["terminations"]) * y
    q1, q2 = nets["critic"](first["obs_action"])
    step("critic", mse_loss(q1, y) + mse_loss(q2, y))
    step("model", mse_loss(nets["model"](second["obs_action"]), second["next_obs"]))
    actions, logprob = slow_sequence(ref, second["obs"], second["previous"], noise[1:])
    alpha, loss, x = ref.log_alpha.exp().detach(), 0.0, second["obs"]
    for k in range(length):
        q = nets["critic"](torch.cat([x, actions[k]], 1)).min(0)[0]
        loss = loss + (alpha * logprob[k] - q).mean()
        with torch.no_grad():
            x = ref.target["model"](torch.cat([x, actions[k]], 1))
    step("actor", loss)
    step("alpha", -(ref.log_alpha * (logprob.detach().mean(0) - A)).mean())
    mine, left = {"actor": s.agent.actor} | dict(s.agent.grader.items()), {}
    for name in ("actor", "grader"):
        left |= parts(s.flat[name].grad, getattr(s.agent, name))
    for name, net in mine.items():
        for p, slope, q in zip(
            net.parameters(), slopes[name], nets[name].parameters(), strict=True
        ):
            torch.testing.assert_close(left[p], slope, atol=2e-6, rtol=1e-4)
            # the first step of Adam is nearly a sign, which a gradient near 0 hardly has
            torch.testing.assert_close(p, q, atol=3e-5, rtol=0)
    torch.testing.assert_close(s.agent.log_alpha, ref.log_alpha)
    targets = zip(ref.target.parameters(), ref.grader.parameters(), strict=True)
    for mine, (old, new) in zip(s.agent.target.parameters(), targets, strict=True):
        torch.testing.assert_close(mine, 0.995 * old + 0.005 * new, atol=1e-6, rtol=0)


def test_gradient_reaches_the_actor_and_nothing_else(monkeypatch):
    s, others, original = learner(), [], torch.autograd.grad
    rest = [*s.agent.grader.parameters(), *s.agent.target.parameters()]

    def spy(loss, inputs):
        """Also what the rest of the agent would get."""
        others.extend(original(loss, rest, retain_graph=True, allow_unused=True))
        return original(loss, inputs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    grads, _ = s.gradients["actor"](random_batch(2), torch.randn(J, 32, A))
    assert grads.keys() == {"actor", "alpha"} and grads["alpha"] != 0
    assert all(part.any() for part in parts(grads["actor"], s.agent.actor).values())
    assert others == [None] * 2 * len(rest)


def test_no_gradient_through_the_states_of_the_model():
    """a_1 changes x_2, but only the grades at fixed states pull at it."""
    agent, batch = make_agent(), random_batch(2)
    actions, _ = agent.sample(batch["obs"], batch["previous"], torch.randn(2, 32, A))
    states = agent.recall(batch["obs"], actions)
    assert states.shape == (2, 32, O) and not states.requires_grad
    torch.testing.assert_close(states[0], batch["obs"])
    expected = agent.target["model"](torch.cat([batch["obs"], actions[0]], 1))
    torch.testing.assert_close(states[1], expected)
    # of actions that are given, the second grade has no gradient in the first
    free = actions.detach().requires_grad_()
    x = torch.cat([agent.recall(batch["obs"], free), free], 2)
    agent.grader["critic"](x[1], frozen=True).sum().backward()
    assert not free.grad[0].any() and free.grad[1].any()
    # of actions that the actor fed back, it has
    pull = torch.autograd.grad(actions[1].sum(), agent.actor["cell"].weight_ih)[0]
    assert pull.any()


def test_previous_action_of_the_target_is_that_of_the_transition():
    s, noise = learner(), torch.randn(1, 32, A)

    def loss(**changed):
        batch = random_batch(1) | changed
        _, metrics = s.gradients["grader"]([batch, random_batch(2)], noise)
        return metrics["qf_loss"].item()

    other = torch.randn(32, A)
    assert loss(previous=other) == loss()
    assert loss(actions=other) != loss()


def test_model_and_critics_learn_from_their_own_batches():
    s, noise = learner(), torch.randn(1, 32, A)
    grader = s.agent.grader
    first, second = (
        parts(s.gradients["grader"]([random_batch(1), random_batch(k)], noise)[0]["grader"], grader)
        for k in (2, 3)
    )
    assert all(torch.equal(first[p], second[p]) for p in grader["critic"].parameters())
    assert not any(torch.equal(first[p], second[p]) for p in grader["model"].parameters())


@needs_compiler
def test_compiled_update_is_the_eager_one():
    eager, expected = updated()
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as main() does
        compiled, metrics = updated(wrap=partial(torch.compile, dynamic=False))
    for name, vector in compiled.items():
        torch.testing.assert_close(vector, eager[name], atol=2e-5, rtol=0)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def one_of_two(rank, folder):
    """Updates on its half."""
    state, _ = updated(slice(16 * rank, 16 * (rank + 1)), tau=0.5)
    torch.save(state, folder / f"{rank}.pt")


def test_two_processes_are_one(tmp_path):
    in_two_processes(one_of_two, tmp_path)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    whole, _ = updated(tau=0.5)
    start = learner().flat
    for name, vector in whole.items():
        torch.testing.assert_close(mine[name], vector, atol=2e-6, rtol=0)
        assert torch.equal(mine[name], theirs[name])
        assert (vector - start[name]).abs().max() > 1e-5


# WHOLE RUNS ======================================================================================

PENDULUM = "--env-id Pendulum-v1 --num-envs 2 --batch-size 16 --total-timesteps 600 "
PENDULUM += "--buffer-size 250 --eval-episodes 3 --eval-every 150 --log-every 10 "


@pytest.mark.parametrize(
    ("script", "flags", "updates"),
    [
        ("srl", "--sequence-length 3 --random-steps 100 --updates-per-step 0.5", 585 // 2),
        ("sac_continuous_action", "--action-repeat 2 --learning-starts 100 --eval-lengths", 250),
    ],
)
def test_score_of_the_reloaded_agent(script, flags, updates, tmp_path):
    """Every return in the log is that of the saved agent; the FAS is that of these returns."""
    run(script, 1, *PENDULUM.split(), *flags.split(), "--run-dir", tmp_path / "run")
    table = rows(tmp_path / "run")
    last = {key: value for _, key, value in table}
    newest, module = checkpoints(tmp_path / "run")[-1], importlib.import_module(f"algos.{script}")
    drawn = torch.get_rng_state()
    for mode in ("deterministic", "stochastic"):
        returns = module.evaluate(newest, 3, mode == "deterministic")
        assert returns.mean() == pytest.approx(last[f"eval/{mode}_return"], rel=1e-6)
    curve = module.evaluate(newest, 3, True, lengths=EVALUATED_LENGTHS).mean(1)
    for length, value in zip(EVALUATED_LENGTHS, curve, strict=True):
        assert value == pytest.approx(last[f"eval/return@{length or 'random'}"], rel=1e-6)
    assert torch.equal(torch.get_rng_state(), drawn), "an evaluation changes what training draws"
    fas = frequency_averaged_score(curve[:-1], "Pendulum-v1")
    assert last["eval/fas"] == pytest.approx(fas, rel=1e-6)
    scores = [(s, v) for s, key, v in table if key == "eval/deterministic_return"]
    assert len(scores) > 1
    best = max(scores, key=lambda pair: pair[1])[0]
    of_best = {step: value for step, key, value in table if key == "eval/fas"}[best]
    assert last["eval/fas_of_best"] == of_best
    saved = torch.load(newest / "rank0.pt", weights_only=True)
    assert saved["updates"] == updates
    assert len(saved["buffer"]["rows"]) == 250
