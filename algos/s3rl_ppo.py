"""S3RL with PPO: training starts in states of a teacher's episodes.

Parent: algos/ppo_continuous_action.py

Paper: Snapshot Reinforcement Learning: Leveraging Prior Trajectories for Efficiency, Zhao, Qian,
Wang, Shan, Qin, 2024, arXiv 2403.00673.

What changes against the parent: where the episodes of a first phase start and when they end. A
frozen teacher, a run of any script with environments, plays some episodes, and every ten steps the
simulator's state is saved. The student starts from these snapshots: from low and high values of the
teacher equally often (status classification, SC), for a hundred steps (trajectory truncation, STT).
    f_i = V(s_i) of the teacher, in snapshot i; of TD3's, SAC's and SRL's Q_1(s_i, a_i)         (9)
    p_i = 1 / (K n_i),  K clusters of f by k-means, n_i snapshots in that of i                 (10)
    the time limit of an episode that starts in step t_i of the teacher's is t_i + L           (11)
    pi(a|s) = softmax(logits(s))_a in place of (6), where actions are Discrete                 (12)
S3RL is the default; --truncation 1000 leaves out STT, --clusters 1 SC, both give SnapshotRL;
--no-snapshots is STT alone, --snapshot-timesteps 0 the parent, whose flags norm-adv, clip-vloss,
anneal-lr, target-kl and ent-coef are gone: all is as it is there by default. So it is with (12):
observations and rewards are normalized and entropy earns nothing, unlike in ppo.py.

Run:  python algos/s3rl_ppo.py --env-id Hopper-v5 --teacher runs/Hopper-v5__ppo_continuous_action__1
      python algos/s3rl_ppo.py --env-id CartPole-v1 --teacher runs/CartPole-v1__ppo__1
      torchrun --standalone --nproc_per_node 2 algos/s3rl_ppo.py --num-envs 2 --teacher RUN

Differs from the paper: unknown, its text was not read. This follows the authors' published code.
Differs from the authors' code: states of simulators, not copies of environments; snapshots one step
    earlier; teachers of any algorithm, a seed for each of their episodes; (12); and what the parent
    lists, save time limits.

Shapes: T steps, N environments, B = T * N, M minibatch, S snapshots, O observation, A action size.
"""

import atexit
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python algos/x.py`

from envs import UserError, report_user_error
from envs.episodes import make_episodes, play_and_save, play_episodes
from envs.make import make_env, make_vector_env
from envs.moments import RunningMoments
from envs.state import limit_steps, restore, set_vector_env_state, vector_env_state
from envs.teacher import teacher_episodes

# ARGS ============================================================================================


@dataclass
class Args:
    seed: int = 1
    """seed of weights, actions, shuffles and environments"""
    env_id: str = "HalfCheetah-v5"
    """gymnasium environment"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, all processes together"""
    learning_rate: float = 3e-4
    """Adam step size at the start"""
    teacher: Path | None = None
    """folder of a run of any script with environments on the same one, or one of its checkpoints"""
    snapshots: bool = True
    """start the episodes of the first phase from the teacher's states"""
    snapshot_timesteps: int = 100_000
    """environment steps of the first phase, counted in total_timesteps (authors' code)"""
    teacher_episodes: int = 10
    """episodes of the teacher, E (authors' code)"""
    snapshot_every: int = 10
    """steps of the teacher from one snapshot to the next, over all episodes (authors' code)"""
    clusters: int = 6
    """K of eq. (10); 1: any snapshot with the same chance (authors' commands)"""
    truncation: int = 100
    """L of eq. (11); the authors' commands have 1000 where they test without STT"""
    num_envs: int = 1
    """environments, all processes together"""
    num_steps: int = 2048
    """steps of each environment in a rollout"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, eq. (2)"""
    num_minibatches: int = 32
    """minibatches of an epoch"""
    update_epochs: int = 10
    """passes over the rollout"""
    clip_coef: float = 0.2
    """eps of eqs. (3) and (4)"""
    vf_coef: float = 0.5
    """weight of the value loss, eq. (5)"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient of all parameters together"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is one"""
    compile: bool = False
    """compile forward and backward (needs a C++ compiler and up to two minutes, then saves time)"""
    run_dir: Path | None = None
    """where logs and checkpoints go; runs/(ENV or TASK)__SCRIPT__SEED if not given"""
    save_every: float = 600.0
    """seconds between checkpoints; 0 saves in every round of logging"""
    resume: str | None = None
    """"auto" continues run_dir from its newest valid checkpoint; or the path of a checkpoint"""
    eval_every: int = 0
    """updates between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    capture_video: bool = False
    """record the first episode of each evaluation (pip install moviepy)"""
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""
    teach: tuple[Path, int, int, int, Path] | None = None
    """play for an S3RL script, which starts this: CHECKPOINT EPISODES SEED EVERY FILE"""

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        rollout = self.num_steps * self.num_envs
        ones = "num_envs num_steps num_minibatches update_epochs eval_episodes teacher_episodes "
        least = dict.fromkeys((ones + "snapshot_every clusters truncation").split(), 1)
        for name, bound in (least | {"total_timesteps": rollout}).items():
            if (value := getattr(self, name)) < bound:
                raise UserError(f"--{name.replace('_', '-')} {value}: less than {bound}")
        if self.num_envs % world_size:
            raise UserError(f"--num-envs {self.num_envs}: not a multiple of {world_size} processes")
        if rollout % (self.num_minibatches * world_size):
            steps = f"{rollout} steps of a rollout on {world_size} processes"
            raise UserError(f"--num-minibatches {self.num_minibatches}: does not divide {steps}")


# NETWORKS ========================================================================================


def layer_init(layer: nn.Linear, gain: float = 2**0.5) -> nn.Linear:
    """Orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, output_gain: float) -> nn.Sequential:
    body = [layer_init(nn.Linear(inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
    return nn.Sequential(*body, layer_init(nn.Linear(64, outputs), output_gain))


class Agent(nn.Module):
    # diverges: actions may be Discrete
    """Actor and critic apart; the actor gives the mean of eq. (6), or the logits of eq. (12)."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        if not isinstance(action_space, gym.spaces.Box | gym.spaces.Discrete):
            raise UserError(f"actions are {action_space}: neither Box nor Discrete")
        if not self.discrete:
            self.low, self.high = action_space.low.ravel(), action_space.high.ravel()
        outputs = gym.spaces.flatdim(action_space)  # A; of Discrete actions it is the number
        self.critic = mlp(observation_space.shape[0], 1, output_gain=1.0)
        self.actor = mlp(observation_space.shape[0], outputs, output_gain=0.01)
        logstd = torch.zeros(outputs)  # with (12) no parameter: the scale of Gumbel noise is 1
        self.actor_logstd = logstd if self.discrete else nn.Parameter(logstd)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs).squeeze(-1)

    def logprob_and_entropy(self, obs: torch.Tensor, actions: torch.Tensor):
        """Of actions (..., A), Discrete ones (...): both (...), but a scalar the entropy of (6)."""
        output = self.actor(obs)
        if self.discrete:
            logp = output.log_softmax(-1)  # eq. (12)
            return logp.gather(-1, actions[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
        z = (actions - output) * (-self.actor_logstd).exp()
        constant = self.actor_logstd.sum() + 0.5 * math.log(2 * math.pi) * actions.shape[-1]
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return -0.5 * z.square().sum(-1) - constant, entropy

    def act(self, output: np.ndarray) -> np.ndarray:
        """What the environment gets, by the actor's output (..., A) with or without noise."""
        if self.discrete:
            return output.argmax(-1)  # of logits plus Gumbel noise: a draw from eq. (12)
        return np.minimum(np.maximum(output, self.low), self.high)


def numpy_mlp(network: nn.Sequential):
    """The same function of numpy arrays, with the weights of this moment.

    For a few rows torch's overhead is most of the time, and a GPU's round trip even more.
    """
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    weights = [[p.detach().cpu().numpy() for p in (layer.weight.T, layer.bias)] for layer in layers]

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in weights[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = weights[-1]
        return x @ weight + bias

    return forward


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Move all parameters into one vector, of which they become views.

    Clipping, gradient exchange and Adam then handle one tensor instead of a dozen small ones.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    for p, part in zip(parameters, flat.data.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return flat


# LOSSES ==========================================================================================


def gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation, eqs. (1) and (2); tensors (T, N).

    PITFALL: where an episode ends in step t, next_values[t] is V of its own last observation, not
    of the first one of the next episode.
    Returns advantages and value targets, both (T, N).
    """
    deltas = rewards + gamma * next_values * ~terminations - values  # eq. (1)
    decay = gamma * gae_lambda * ~(terminations | truncations)
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[0])
    # unbind once: indexing a row costs more than the arithmetic on it
    rows = list(zip(deltas.unbind(), decay.unbind(), advantages.unbind(), strict=True))
    for delta, keep, advantage in reversed(rows):
        running = advantage.copy_(delta + keep * running)  # eq. (2)
    return advantages, advantages + values


def ppo_loss(logprob, entropy, value, mb, args):
    # diverges: values are always clipped, and entropy earns nothing
    """Loss of a minibatch, eqs. (3) to (5); tensors (M,).

    mb: "logprobs" and "values" when the batch was collected, "advantages", "returns".
    Returns the loss and, detached, its parts and the log-ratio (M,).
    """
    eps, advantages = args.clip_coef, mb["advantages"]
    logratio = logprob - mb["logprobs"]
    ratio = logratio.exp()
    pg_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - eps, 1 + eps)).mean()
    v_clipped = mb["values"] + (value - mb["values"]).clamp(-eps, eps)
    v_error = torch.max((value - mb["returns"]).square(), (v_clipped - mb["returns"]).square())
    v_loss, entropy = 0.5 * v_error.mean(), entropy.mean()
    loss = pg_loss + args.vf_coef * v_loss  # eq. (5), without entropy
    parts = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy, "logratio": logratio}
    return loss, {name: part.detach() for name, part in parts.items()}


# DATA ============================================================================================


def take_snapshots(args):
    # diverges: actions may be Discrete
    """Of the teacher: "obs" (S, O) and "states" to start in, "probabilities" (S,); what to log."""
    env = make_env(args.env_id)
    agent = Agent(env.observation_space, env.action_space)
    script = "ppo.py" if agent.discrete else "ppo_continuous_action.py"
    plan = args.teacher_episodes, args.seed + 20_000, args.snapshot_every  # unlike evaluations
    snapshots = teacher_episodes(args.teacher, env, Path(__file__).with_name(script), *plan)
    returns, values = snapshots.pop("returns"), snapshots.pop("values").numpy()  # eq. (9)
    p, sizes = start_probabilities(values, args.clusters)
    snapshots["probabilities"] = torch.from_numpy(p)
    facts = {"charts/teacher_return": returns.mean().item(), "charts/snapshots": len(p)}
    return snapshots, facts | {f"charts/cluster_size@{k}": n for k, n in enumerate(sizes, 1)}


def start_probabilities(values, clusters):
    """The share of each snapshot (S,), and the sizes of the clusters from low to high values."""
    from sklearn.cluster import KMeans  # takes a second

    count = min(clusters, len(np.unique(values)))  # more could not be told apart
    kmeans = KMeans(count, n_init="auto", random_state=0).fit(values.reshape(-1, 1))
    sizes = np.bincount(kmeans.labels_, minlength=count)
    p = 1 / (np.count_nonzero(sizes) * sizes[kmeans.labels_])  # eq. (10)
    return p, sizes[np.argsort(kmeans.cluster_centers_[:, 0])]


def begin_episode(env, obs, snapshots, args):
    """Of the first phase: go to a snapshot, if there are any, and set the time limit."""
    if snapshots:
        p = snapshots["probabilities"].numpy()
        # the environment's own generator: seeded with it, and a part of its saved state
        obs = restore(env, snapshots, env.np_random.choice(len(p), p=p))  # eq. (10)
    limit_steps(env, args.truncation)  # eq. (11)
    return obs


# ROLLOUT =========================================================================================


def scale_rewards(rewards, terminations, state, moments, gamma):
    """Eq. (8) for a rollout (T, N); updates state["discounted_return"] (N,) and moments.

    Step t is divided by the deviation that was known after step t, as if done in the environment.
    """
    discounted = np.empty(rewards.shape)
    for t in range(len(rewards)):
        # PITFALL: gymnasium clears the sum with the reward that ends the episode, not after it,
        # and does not clear it at a time limit; the published numbers come from that.
        kept = gamma * state["discounted_return"] * ~terminations[t]
        discounted[t] = state["discounted_return"] = kept + rewards[t]
    ones = np.full(len(rewards), rewards.shape[1])
    rows = np.stack([ones, discounted.sum(1), np.square(discounted).sum(1)])
    sums = moments.sums[:, None] + rows.cumsum(1)  # (3, T)
    moments.sums = sums[:, -1].copy()
    _, std = moments.mean_and_std(sums)
    return np.clip(rewards / std[:, None], -10, 10).astype(np.float32)


def reset(envs, obs_moments, seed):
    """New episodes: the state of `rollout`."""
    obs, _ = envs.reset(seed=seed)
    obs_moments.update(obs)
    names = "discounted_return episode_return episode_length".split()
    return {"obs": obs_moments.normalize(obs)} | {name: np.zeros(len(obs)) for name in names}


@torch.no_grad()
def rollout(envs, agent, state, obs_moments, return_moments, args, device):
    # diverges: actions of both kinds, normalized observations and rewards
    """T steps of N environments. Returns the batch (T, N, ...) and the episodes that ended.

    state: "obs" (N, O) to act on, normalized, and "episode_return", "episode_length",
    "discounted_return" (N,), updated in place. An episode is (step, return, length).
    """
    T, N = args.num_steps, envs.num_envs
    obs = np.empty((T, *state["obs"].shape), np.float32)
    rewards = np.empty((T, N))
    terminations, truncations = np.empty((2, T, N), bool)
    noise = torch.empty(T, N, agent.actor[-1].out_features)
    noise = -noise.exponential_().log() if agent.discrete else noise.normal_()
    drawn = (noise * agent.actor_logstd.exp().cpu()).numpy()  # outputs of the actor are added
    actor, final_obs, episodes = numpy_mlp(agent.actor), {}, []
    for t in range(T):
        obs[t] = state["obs"]
        drawn[t] += actor(obs[t])
        taken = agent.act(drawn[t]).reshape(envs.action_space.shape)
        next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(taken)
        state["episode_return"] += rewards[t]
        state["episode_length"] += 1
        if "final_obs" in infos:
            for n in np.flatnonzero(infos["_final_obs"]):
                obs_moments.update(infos["final_obs"][n][None])
                if not terminations[t, n]:
                    final_obs[t, n] = obs_moments.normalize(infos["final_obs"][n])
                episodes.append((t, state["episode_return"][n], state["episode_length"][n]))
                state["episode_return"][n] = state["episode_length"][n] = 0
        obs_moments.update(next_obs)
        state["obs"] = obs_moments.normalize(next_obs)  # eq. (7)
    rewards = scale_rewards(rewards, terminations, state, return_moments, args.gamma)
    obs_moments.merge(device)
    return_moments.merge(device)

    # The weights stayed the same, so one pass over the rollout gives what acting did not need.
    actions = drawn.argmax(-1) if agent.discrete else drawn
    batch = {"obs": obs, "actions": actions, "rewards": rewards}
    batch |= {"terminations": terminations, "truncations": truncations & ~terminations}
    batch = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
    batch["logprobs"], _ = agent.logprob_and_entropy(batch["obs"], batch["actions"])
    last_obs = torch.from_numpy(state["obs"]).to(device)
    values = agent.value(torch.cat([batch["obs"], last_obs[None]]))  # (T + 1, N)
    batch["values"], next_values = values[:-1], values[1:].clone()
    for (t, n), last in final_obs.items():
        next_values[t, n] = agent.value(torch.from_numpy(last).to(device))
    ends = batch["terminations"], batch["truncations"]
    inputs = batch["rewards"], batch["values"], next_values, *ends
    batch["advantages"], batch["returns"] = gae(*inputs, args.gamma, args.gae_lambda)
    return batch, episodes


# EVALUATE ========================================================================================


@torch.random.fork_rng(devices=[])  # the first weights take no random numbers of training
def evaluate(checkpoint, episodes, deterministic, video_dir=None, teach=()):
    # diverges: actions of both kinds, and the observation moments of the checkpoint
    """Returns (episodes,) with a saved agent, on the CPU; episode i starts from seed + 10_000 + i.

    deterministic: the likeliest action, else a draw. video_dir: where to record the first episode.
    teach: (episodes, seed, interval, file), to write these and values V for S3RL instead.
    """
    saved = torch.load(checkpoint / "rank0.pt", map_location="cpu", weights_only=True)
    envs = make_episodes(saved["args"]["env_id"], episodes, video_dir)
    agent = Agent(envs[0].observation_space, envs[0].action_space)
    agent.load_state_dict(saved["agent"])
    normalize = RunningMoments.of_state(saved["obs_moments"]).normalize
    seed = teach[1] if teach else saved["args"]["seed"] + 10_000
    actor, generator = numpy_mlp(agent.actor), np.random.default_rng(seed)
    draw = generator.gumbel if agent.discrete else generator.standard_normal
    std = 0.0 if deterministic else agent.actor_logstd.detach().exp().numpy()

    def decide(obs, *_):
        output = actor(normalize(obs))
        return agent.act(output + std * draw(size=output.shape))[:, None]

    def value(obs, _):
        return agent.value(torch.from_numpy(normalize(obs.numpy())))

    if teach:
        return play_and_save(envs[0], decide, value, 1, *teach)
    return play_episodes(envs, seed, [1], decide)[0]


def evaluate_and_log(checkpoint, step, log, args):
    """Rank 0 evaluates a checkpoint with likeliest and with drawn actions."""
    if dist.get_rank() > 0:
        return
    for mode in ("deterministic", "stochastic"):
        video_dir = checkpoint.parents[1] / f"videos/{step}-{mode}" if args.capture_video else None
        returns = evaluate(checkpoint, args.eval_episodes, mode == "deterministic", video_dir)
        log.add(step, {f"eval/{mode}_return": returns.mean(), f"eval/{mode}_std": returns.std()})
        tqdm.write(f"step {step}: {mode} return {returns.mean():.1f} +- {returns.std():.1f}")


# CHECKPOINT ======================================================================================


def rng_state(device):
    """State of every random generator of this process, in types that torch.load takes."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def plain_args(args):
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(run_dir, step, state):
    """Write run_dir/checkpoints/STEP, a file for each process; keep the last two. Returns it.

    It gets its name when it is complete: whatever dies half-way, older checkpoints stay whole.
    """
    path = run_dir / "checkpoints" / f"{step:012d}"
    unfinished = path.with_suffix(".partial")
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        file = unfinished / f"rank{dist.get_rank()}.pt"
        torch.save(state | {"script": Path(__file__).stem}, file)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        digests = gather_lists([(file.name, sha256(file))])
        if dist.get_rank() == 0:
            (unfinished / "manifest.json").write_text(json.dumps(dict(digests), indent=1))
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            done = sorted(path.parent.glob("*[0-9]"))  # a newer one is damaged, or was given up
            for old in set(done) - set([other for other in done if other <= path][-2:]):
                shutil.rmtree(old)
            missing = 3 - len(list(path.parent.iterdir()))  # two are kept while one is written
            needed = missing * sum(file.stat().st_size for file in path.iterdir())
            if shutil.disk_usage(path).free < needed:
                raise OSError(f"the disk has less than the {needed / 1e6:.1f} MB that it will take")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"--run-dir: cannot write {path}: {str(error).splitlines()[-1]}") from error
    dist.barrier()
    return path


def damage(path):
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        altered = [name for name, digest in manifest.items() if sha256(path / name) != digest]
        return f"{altered[0]} is altered or cut off" if altered else None
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def find_checkpoint(run_dir, resume):
    """The checkpoint to continue from, for "auto" the newest valid one; None: start anew.

    Raises UserError where a new run would overwrite another one, and where the checkpoint named
    is damaged or belongs to another number of processes.
    """
    found = [None, None]  # path, error: rank 0 looks, as all must find the same
    paths = sorted((run_dir / "checkpoints").glob("*[0-9]"), reverse=True)
    if resume is None and (run_dir / "args.json").exists():
        found[1] = f"{run_dir} holds a run: --resume auto continues it; or give a --run-dir"
    elif resume not in (None, "auto") and Path(resume).parent not in {p.parent for p in paths}:
        found[1] = f"--resume {resume} is not in --run-dir {run_dir}: give the run's own directory"
    elif resume is not None and dist.get_rank() == 0:
        for path in paths if resume == "auto" else [Path(resume)]:
            flaw, processes = damage(path), len(list(path.glob("rank*.pt")))
            if flaw is None and processes == dist.get_world_size():
                found = [path, None]
                break
            found[1] = f"{path} was written by {processes} processes: start as many"
            found[1] = f"--resume {path}: damaged ({flaw})" if flaw else found[1]
            if flaw is None or resume != "auto":
                break
            print(f"checkpoint {path} is damaged ({flaw}): trying the one before", file=sys.stderr)
    dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def load_checkpoint(path, args):
    """What this process saved. Raises UserError where it ran with other arguments that matter."""
    state = torch.load(path / f"rank{dist.get_rank()}.pt", map_location="cpu", weights_only=True)
    free = "device compile run_dir save_every resume eval_every eval_episodes capture_video track "
    free += "cache_gb micro_batch_tokens activation_checkpointing offload_frozen reward_timeout"
    for name, value in plain_args(args).items():
        if name not in free.split() and value != state["args"].get(name, value):
            raise UserError(f"--resume: {name} was {state['args'][name]}, now it is {value}")
    return state


class RunLog:
    """metrics.csv (step, key, value), TensorBoard and args.json of a run, written by rank 0."""

    def __init__(self, run_dir, args, size=0):
        """size: bytes of metrics.csv to keep, where a checkpoint continues."""
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        packages = {d.name: d.version for d in importlib.metadata.distributions()}
        record = {"args": plain_args(args), "commit": commit, "packages": packages}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(run_dir).free < 2**20:
                raise OSError(errno.ENOSPC, "less than 1 MB free")
            (run_dir / "args.json").write_text(json.dumps(record, indent=1))
            self.file = (run_dir / "metrics.csv").open("a", buffering=1)  # a line at a time
            self.file.truncate(size)
            self.file.write("" if size else "step,key,value\n")
            self.tracker = importlib.import_module(args.track) if args.track else None
        except OSError as error:
            raise UserError(f"--run-dir {run_dir}: {error.strerror}; choose another") from error
        except ImportError as error:
            raise UserError(f"--track {args.track}: pip install {args.track}") from error
        self.board = SummaryWriter(str(run_dir))
        if self.tracker:
            self.tracker.init(project="folio", name=run_dir.name, config=plain_args(args))

    def add(self, step, metrics):
        for key, value in metrics.items() if self.active else ():
            if not math.isfinite(value):
                raise UserError(f"{key} is {value} at step {step}; checkpoints are intact")
            self.file.write(f"{step},{key},{value:.8g}\n")
            self.board.add_scalar(key, value, step)
        if self.active and self.tracker:
            self.tracker.log(metrics, step=step)

    def size(self):
        """Bytes of metrics.csv so far; tell() writes all of them out."""
        return self.file.tell() if self.active else 0


def catch_signals():
    """A list that gets SIGINT or SIGTERM, to be read between updates; a second one ends at once."""
    caught = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda n, _: (caught.append(n), signal.signal(n, signal.SIG_DFL)))
    return caught


# TRAIN ===========================================================================================


def setup_process(device):
    """Join torchrun's process group, or form a group of one. Returns rank, size and device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA here; use --device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    options = {"backend": "nccl" if cuda else "gloo", "timeout": timedelta(hours=1)}
    if "WORLD_SIZE" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    atexit.register(dist.destroy_process_group)  # NCCL asks for it
    atexit.register(time.sleep, 0.2)  # a thread of gloo dropping a tensor as Python ends aborts it
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sum_over_processes(tensor):
    """In place; takes no time where there is one process."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items):
    """The lists of all processes, joined in order of rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def normalize_advantages(advantages):
    """Zero mean and unit standard deviation in each row of (minibatches, M).

    The moments are those of the whole minibatch, whose parts lie on all processes.
    """
    x = advantages.double()
    moments = torch.stack([torch.ones_like(x).sum(1), x.sum(1), x.square().sum(1)])
    count, total, squares = sum_over_processes(moments)[..., None]
    std = ((squares - total.square() / count) / (count - 1)).clamp(min=0).sqrt()
    return ((x - total / count) / (std + 1e-8)).float()


def gradient_vector(loss, module):
    """d loss / d parameters in one vector, in the order of `flatten_parameters`."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def minibatch_gradient(agent, mb, args):
    # diverges: actions of both kinds
    """Gradient of the loss on this process's part of a minibatch, and what to log."""
    logprob, entropy = agent.logprob_and_entropy(mb["obs"], mb["actions"])
    loss, metrics = ppo_loss(logprob, entropy, agent.value(mb["obs"]), mb, args)
    return gradient_vector(loss, agent), metrics


def update(flat, optimizer, batch, gradient, args):
    # diverges: advantages are always normalized, and all epochs done
    """K epochs of minibatch steps on a batch (B, ...). Returns what to log."""
    world_size, logratios = dist.get_world_size(), []
    for _ in range(args.update_epochs):
        # Shuffle once an epoch; a minibatch is then a row, which costs no gather.
        order = torch.randperm(len(batch["obs"])).view(args.num_minibatches, -1).to(flat.device)
        epoch = {name: tensor[order] for name, tensor in batch.items()}
        epoch["advantages"] = normalize_advantages(epoch["advantages"])
        for rows in zip(*epoch.values(), strict=True):
            flat.grad, metrics = gradient(dict(zip(epoch, rows, strict=True)))
            sum_over_processes(flat.grad).div_(world_size)
            grad_norm = flat.grad.norm()
            flat.grad.mul_((args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
            logratios.append(metrics.pop("logratio"))
    residual = (batch["returns"] - batch["values"]).var()
    metrics |= {
        "grad_norm": grad_norm,
        "old_approx_kl": -logratios[-1].mean(),
        "approx_kl": (logratios[-1].exp() - 1 - logratios[-1]).mean(),
        "clipfrac": ((torch.stack(logratios).exp() - 1).abs() > args.clip_coef).float().mean(),
        "explained_variance": 1 - residual / batch["returns"].var().clamp(min=1e-12),
    }
    means = sum_over_processes(torch.stack(list(metrics.values()))) / world_size
    return dict(zip((f"losses/{name}" for name in metrics), means.tolist(), strict=True))


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    torch.set_num_threads(1)  # for layers of 64 units a second thread costs more than it brings
    if args.teach:
        return evaluate(args.teach[0], 1, deterministic=False, teach=args.teach[1:])
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or Path("runs") / f"{args.env_id}__{Path(__file__).stem}__{args.seed}"
    path = find_checkpoint(run_dir, args.resume)
    batch_steps, N = args.num_envs * args.num_steps, args.num_envs // world_size
    num_iterations = args.total_timesteps // batch_steps
    saved = load_checkpoint(path, args) if path else {}
    iteration, log_size = saved.get("iteration", 0), saved.get("log_size", 0)
    snapshots, facts = saved.get("snapshots"), {}
    first_phase = iteration * batch_steps < args.snapshot_timesteps
    if first_phase and args.snapshots and path is None:
        snapshots, facts = take_snapshots(args)
    begin = partial(begin_episode, snapshots=snapshots, args=args) if first_phase else None
    envs = make_vector_env(args.env_id, N, begin=begin)
    seed_everything(args.seed)  # every process builds the same weights
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    flat = flatten_parameters(agent)
    optimizer = torch.optim.Adam([flat], lr=args.learning_rate, eps=1e-5, fused=True)
    # made now, so that the first checkpoint is as large as the last
    moments = {name: torch.zeros_like(flat.data) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[flat] = {"step": torch.zeros((), device=device), **moments}
    gradient = partial(minibatch_gradient, agent, args=args)
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the backward pass with the rest
        gradient = torch.compile(gradient, dynamic=False)

    seed_everything(args.seed + 100_003 * rank)
    obs_moments = RunningMoments(envs.single_observation_space.shape)
    return_moments, seed = RunningMoments(), args.seed + rank * N  # no two environments share one
    state = reset(envs, obs_moments, seed)
    if path:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        obs_moments.load_state(saved["obs_moments"])
        return_moments.load_state(saved["return_moments"])
        if set_vector_env_state(envs, saved["envs"]):
            state = {name: tensor.numpy() for name, tensor in saved["state"].items()}
        set_rng_state(saved["rng"], device)

    def checkpoint():
        whole = {"args": plain_args(args), "iteration": iteration, "log_size": log.size()}
        whole |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        whole |= {"state": {name: torch.from_numpy(array) for name, array in state.items()}}
        whole |= {"obs_moments": obs_moments.state(), "return_moments": return_moments.state()}
        whole |= {"envs": vector_env_state(envs), "rng": rng_state(device), "snapshots": snapshots}
        return save_checkpoint(run_dir, iteration * batch_steps, whole)

    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()
    log.add(0, facts)
    path = path or checkpoint()  # a directory that cannot hold the run shows now, not in an hour
    recent, total = deque(maxlen=100), num_iterations * batch_steps
    bar = tqdm(total=total, initial=iteration * batch_steps, unit="step", disable=rank > 0)
    while True:
        global_step = iteration * batch_steps
        evaluation_due = args.eval_every > 0 and iteration % args.eval_every == 0
        if iteration == num_iterations or (iteration > 0 and evaluation_due):
            evaluate_and_log(path, global_step, log, args)
        if iteration == num_iterations:
            break
        started = time.monotonic()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        batch, episodes = rollout(envs, agent, state, obs_moments, return_moments, args, device)
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}  # (B, ...)
        metrics = update(flat, optimizer, batch, gradient, args)

        kind = "snapshot" if first_phase else "episodic"
        for t, episodic_return, length in gather_lists(episodes):
            recent.append(episodic_return)
            episode = {f"charts/{kind}_return": episodic_return, f"charts/{kind}_length": length}
            log.add(global_step + (t + 1) * args.num_envs, episode)
        iteration += 1
        if first_phase and iteration * batch_steps >= args.snapshot_timesteps:
            # the second phase: ordinary environments; all that was learned and all moments stay
            first_phase, snapshots, envs = False, None, make_vector_env(args.env_id, N)
            state = reset(envs, obs_moments, seed)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = batch_steps / (time.monotonic() - started)
        log.add(iteration * batch_steps, metrics)
        bar.set_postfix(episodic_return=f"{np.mean(recent or [np.nan]):.1f}", refresh=False)
        bar.update(batch_steps)
        save = time.monotonic() - last_save >= args.save_every or iteration == num_iterations
        save |= args.eval_every > 0 and iteration % args.eval_every == 0
        flags = torch.tensor([save, max(stop, default=0)], dtype=torch.int64, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)  # all processes must act alike
        save, signal_number = flags.tolist()
        if save or signal_number:
            path, last_save = checkpoint(), time.monotonic()
        if signal_number:
            tqdm.write(f"stopped by a signal; --resume auto continues from {path}")
            sys.exit(128 + signal_number)
    dist.barrier()  # nobody leaves while rank 0 still evaluates and writes


if __name__ == "__main__":
    sys.excepthook = report_user_error
    main(tyro.cli(Args))
