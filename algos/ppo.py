"""Proximal policy optimization (PPO) for discrete actions.

Paper: Proximal Policy Optimization Algorithms. Schulman, Wolski, Dhariwal, Radford, Klimov, 2017,
arXiv 1707.06347. The details are those of The 37 Implementation Details of Proximal Policy
Optimization, Huang et al., ICLR Blog Track 2022, with CleanRL's hyperparameters.

PPO takes several epochs of minibatch steps on one on-policy batch, and clips the probability ratio
so that no step gains from moving far from the policy that collected the batch:

    delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)                               (1)
    A_t = delta_t + gamma lambda (1 - boundary_t) A_{t+1},   R_t = A_t + V(s_t)                (2)
    L_pi = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)],   rho = pi(a|s) / pi_old(a|s)        (3)
    L_v = E[max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)] / 2                    (4)
    L = L_pi - c_entropy E[entropy] + c_value L_v                                              (5)

Run:  python algos/ppo.py --env-id CartPole-v1
      torchrun --standalone --nproc_per_node 2 algos/ppo.py --env-id CartPole-v1
      python algos/ppo.py --env-id CartPole-v1 --resume auto      # continue, or evaluate again

Differs from the paper: value clipping, orthogonal initialization, learning rate annealing and the
    normalization of advantages, all from the authors' code (openai/baselines ppo2).
Differs from the authors' code: values bootstrap at time limits, where s_{t+1} in (1) is the last
    observation of the cut episode; ppo2 and CleanRL treat a cut as an end. Advantages are
    normalized over the minibatch of all processes.

Shapes: T steps of a rollout, N environments of this process, B = T * N, M minibatch, O observation
size, K number of actions.
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
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python algos/ppo.py`

from envs import UserError, report_user_error
from envs.episodes import make_episodes, play_and_save, play_episodes
from envs.make import make_vector_env
from envs.state import set_vector_env_state, vector_env_state

# ARGS ============================================================================================


@dataclass
class Args:
    seed: int = 1
    """seed of weights, actions, shuffles and environments"""
    env_id: str = "CartPole-v1"
    """gymnasium environment"""
    total_timesteps: int = 500_000
    """environment steps of the whole run, all processes together"""
    learning_rate: float = 2.5e-4
    """Adam step size at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    num_envs: int = 4
    """environments, all processes together"""
    num_steps: int = 128
    """steps of each environment in a rollout"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, eq. (2)"""
    num_minibatches: int = 4
    """minibatches of an epoch"""
    update_epochs: int = 4
    """passes over the rollout"""
    norm_adv: bool = True
    """normalize the advantages of each minibatch"""
    clip_coef: float = 0.2
    """eps of eqs. (3) and (4)"""
    clip_vloss: bool = True
    """clip the value loss, eq. (4)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, eq. (5)"""
    vf_coef: float = 0.5
    """weight of the value loss, eq. (5)"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient of all parameters together"""
    target_kl: float | None = None
    """leave the epochs of an update early beyond this KL divergence"""
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
        for name in ("num_steps", "num_minibatches", "update_epochs", "eval_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.num_envs < 1 or self.num_envs % world_size:
            raise UserError(f"--num-envs {self.num_envs}: not a multiple of {world_size} processes")
        if self.num_steps * self.num_envs % (self.num_minibatches * world_size):
            raise UserError(
                f"--num-minibatches {self.num_minibatches}: {self.num_steps} steps of "
                f"{self.num_envs} environments on {world_size} processes do not divide by it"
            )
        if self.total_timesteps < self.num_steps * self.num_envs:
            raise UserError(
                f"--total-timesteps {self.total_timesteps}: less than one rollout, "
                f"{self.num_steps} steps of {self.num_envs} environments"
            )


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
    """Actor and critic apart: sharing a trunk is worse on classic control (37 details, core 13)."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Discrete):
            raise UserError(f"actions are {action_space}: use ppo_continuous_action.py for Box")
        self.critic = mlp(observation_space.shape[0], 1, output_gain=1.0)
        self.actor = mlp(observation_space.shape[0], int(action_space.n), output_gain=0.01)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs).squeeze(-1)

    def action_distribution(self, obs: torch.Tensor) -> Categorical:
        return Categorical(logits=self.actor(obs), validate_args=False)


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
    """Loss of a minibatch, eqs. (3) to (5); tensors (M,).

    mb: "logprobs" and "values" when the batch was collected, "advantages", "returns".
    Returns the loss and, detached, its parts and the log-ratio (M,).
    """
    eps = args.clip_coef
    logratio = logprob - mb["logprobs"]
    ratio = logratio.exp()
    advantages = mb["advantages"]
    pg_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - eps, 1 + eps)).mean()
    v_error = (value - mb["returns"]).square()
    if args.clip_vloss:
        v_clipped = mb["values"] + (value - mb["values"]).clamp(-eps, eps)
        v_error = torch.max(v_error, (v_clipped - mb["returns"]).square())
    v_loss, entropy = 0.5 * v_error.mean(), entropy.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss  # eq. (5)
    parts = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy, "logratio": logratio}
    return loss, {name: part.detach() for name, part in parts.items()}


# ROLLOUT =========================================================================================


@torch.no_grad()
def rollout(envs, agent, state, args, device):
    """T steps of N environments. Returns the batch (T, N, ...) and the episodes that ended.

    state: "obs" (N, O) to act on, "episode_return" and "episode_length" (N,), updated in place.
    An episode is (step, return, length).
    """
    T, N = args.num_steps, envs.num_envs
    obs = np.empty((T, *state["obs"].shape), np.float32)
    rewards = np.empty((T, N), np.float32)
    terminations, truncations = np.empty((2, T, N), bool)
    actions = np.empty((T, N), np.int64)
    # The argmax of logits plus Gumbel noise is a draw; the noise of all steps takes one call.
    gumbel = -torch.empty((T, N, envs.single_action_space.n)).exponential_().log().numpy()
    actor = numpy_mlp(agent.actor)
    final_obs, episodes = {}, []
    for t in range(T):
        obs[t] = state["obs"]
        actions[t] = (actor(obs[t]) + gumbel[t]).argmax(-1)
        next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t])
        state["obs"][:] = next_obs
        state["episode_return"] += rewards[t]
        state["episode_length"] += 1
        for n in np.flatnonzero(terminations[t] | truncations[t]):
            if not terminations[t, n]:
                final_obs[t, n] = infos["final_obs"][n]
            episodes.append((t, state["episode_return"][n], state["episode_length"][n]))
            state["episode_return"][n] = state["episode_length"][n] = 0

    # The weights stayed the same, so one pass over the rollout gives what acting did not need.
    batch = {"obs": obs, "actions": actions, "rewards": rewards}
    batch |= {"terminations": terminations, "truncations": truncations & ~terminations}
    batch = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
    batch["logprobs"] = agent.action_distribution(batch["obs"]).log_prob(batch["actions"])
    last_obs = torch.from_numpy(state["obs"].astype(np.float32)).to(device)
    values = agent.value(torch.cat([batch["obs"], last_obs[None]]))  # (T + 1, N)
    batch["values"], next_values = values[:-1], values[1:].clone()
    for (t, n), last in final_obs.items():
        next_values[t, n] = agent.value(torch.from_numpy(last.astype(np.float32)).to(device))
    batch["advantages"], batch["returns"] = gae(
        batch["rewards"],
        batch["values"],
        next_values,
        batch["terminations"],
        batch["truncations"],
        args.gamma,
        args.gae_lambda,
    )
    return batch, episodes


# EVALUATE ========================================================================================


@torch.random.fork_rng(devices=[])  # the first weights take no random numbers of training
def evaluate(checkpoint, episodes, deterministic, video_dir=None, teach=()):
    """Returns (episodes,) with a saved agent, on the CPU; episode i starts from seed + 10_000 + i.

    deterministic: the likeliest action, else a draw. video_dir: where to record the first episode.
    teach: (episodes, seed, interval, file), to write these and values V for S3RL instead.
    """
    saved = torch.load(checkpoint / "rank0.pt", map_location="cpu", weights_only=True)
    envs = make_episodes(saved["args"]["env_id"], episodes, video_dir)
    agent = Agent(envs[0].observation_space, envs[0].action_space)
    agent.load_state_dict(saved["agent"])
    seed = teach[1] if teach else saved["args"]["seed"] + 10_000
    actor, generator = numpy_mlp(agent.actor), np.random.default_rng(seed)

    def decide(obs, *_):
        logits = actor(obs.astype(np.float32))
        noise = 0.0 if deterministic else generator.gumbel(size=logits.shape)
        return (logits + noise).argmax(-1)[:, None]

    if teach:
        return play_and_save(envs[0], decide, lambda obs, _: agent.value(obs.float()), 1, *teach)
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
    """Gradient of the loss on this process's part of a minibatch, and what to log."""
    distribution = agent.action_distribution(mb["obs"])
    logprob, entropy = distribution.log_prob(mb["actions"]), distribution.entropy()
    loss, metrics = ppo_loss(logprob, entropy, agent.value(mb["obs"]), mb, args)
    return gradient_vector(loss, agent), metrics


def update(flat, optimizer, batch, gradient, args):
    """K epochs of minibatch steps on a batch (B, ...). Returns what to log."""
    world_size, logratios = dist.get_world_size(), []
    for _ in range(args.update_epochs):
        # Shuffle once an epoch; a minibatch is then a row, which costs no gather.
        order = torch.randperm(len(batch["obs"])).view(args.num_minibatches, -1).to(flat.device)
        epoch = {name: tensor[order] for name, tensor in batch.items()}
        if args.norm_adv:
            epoch["advantages"] = normalize_advantages(epoch["advantages"])
        for rows in zip(*epoch.values(), strict=True):
            flat.grad, metrics = gradient(dict(zip(epoch, rows, strict=True)))
            sum_over_processes(flat.grad).div_(world_size)
            grad_norm = flat.grad.norm()
            flat.grad.mul_((args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
            logratios.append(metrics.pop("logratio"))
        # PITFALL: all processes must leave together, or those that stay wait for ever.
        kl = sum_over_processes((logratios[-1].exp() - 1 - logratios[-1]).mean()) / world_size
        if args.target_kl is not None and kl > args.target_kl:
            break
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
    batch_steps = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_steps

    N = args.num_envs // world_size
    envs = make_vector_env(args.env_id, N)
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
    obs, _ = envs.reset(seed=args.seed + rank * N)  # no two environments share a seed
    state = {"obs": obs.copy(), "episode_return": np.zeros(N), "episode_length": np.zeros(N)}
    iteration, log_size = 0, 0
    if path:
        saved = load_checkpoint(path, args)
        iteration, log_size = saved["iteration"], saved["log_size"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        if set_vector_env_state(envs, saved["envs"]):
            state = {name: tensor.numpy() for name, tensor in saved["state"].items()}
        set_rng_state(saved["rng"], device)

    def checkpoint():
        whole = {"args": plain_args(args), "iteration": iteration, "log_size": log.size()}
        whole |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        whole |= {"state": {name: torch.from_numpy(array) for name, array in state.items()}}
        whole |= {"envs": vector_env_state(envs), "rng": rng_state(device)}
        return save_checkpoint(run_dir, iteration * batch_steps, whole)

    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()
    path = path or checkpoint()  # a directory that cannot hold the run shows now, not in an hour
    recent = deque(maxlen=100)
    total = num_iterations * batch_steps
    bar = tqdm(total=total, initial=iteration * batch_steps, unit="step", disable=rank > 0)
    while True:
        global_step = iteration * batch_steps
        evaluation_due = args.eval_every > 0 and iteration % args.eval_every == 0
        if iteration == num_iterations or (iteration > 0 and evaluation_due):
            evaluate_and_log(path, global_step, log, args)
        if iteration == num_iterations:
            break
        started = time.monotonic()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        batch, episodes = rollout(envs, agent, state, args, device)
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}  # (B, ...)
        metrics = update(flat, optimizer, batch, gradient, args)

        for t, episodic_return, length in gather_lists(episodes):
            recent.append(episodic_return)
            episode = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
            log.add(global_step + (t + 1) * args.num_envs, episode)
        iteration += 1
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
