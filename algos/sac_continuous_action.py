"""Soft actor-critic (SAC) for continuous actions.

Paper: Soft Actor-Critic, Haarnoja, Zhou, Abbeel, Levine, 2018, arXiv 1801.01290, with the learned
entropy coefficient of Soft Actor-Critic Algorithms and Applications, 2018, arXiv 1812.05905.

Off-policy learning of a policy that earns reward and stays random. CleanRL's hyperparameters.

    a = tanh(u) scale + middle,  u = m(s) + exp(w(s)) eps,  eps ~ Normal(0, I)                  (1)
    log pi(a|s) = sum_i log Normal(u_i; m_i, exp(w_i)) - log(scale_i (1 - tanh(u_i)^2) + 1e-6)  (2)
    y = r + gamma (1 - term) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi(.|s')         (3)
    L_Q = mean (Q_1(s, a) - y)^2 + mean (Q_2(s, a) - y)^2                                       (4)
    L_pi = mean (alpha log pi(b|s) - min_i Q_i(s, b)),  b ~ pi(.|s) by (1)                      (5)
    L_alpha = -alpha mean (log pi(c|s) + H),  c ~ pi(.|s) anew,  H = -A                         (6)
    Q' <- (1 - tau) Q' + tau Q                                                                  (7)
(3), (4) and (7) in each update; (5) and (6) in every second one, then twice on the same batch.

Run:  python algos/sac_continuous_action.py --env-id HalfCheetah-v5
      torchrun --standalone --nproc_per_node 2 algos/sac_continuous_action.py --num-envs 2
      python algos/sac_continuous_action.py --env-id HalfCheetah-v5 --resume auto

Differs from the paper: no value network (the second paper has none either), w in [-5, 2] by tanh,
    actor and alpha learn in pairs of steps, alpha with the critics' step size of 1e-3 (CleanRL).
Differs from the authors' code: it was not read; CleanRL's was. Against that: the first update comes
    one step earlier, and --action-repeat J is the baseline SAC-J of arXiv 2410.08979.

Shapes: N environments, M transitions of a batch (of this process), O observation, A action size.
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

from envs import UserError, check_room, report_user_error
from envs.episodes import make_episodes, play_and_save, play_episodes
from envs.make import make_vector_env
from envs.scores import EVALUATED_LENGTHS, length_metrics
from envs.state import set_vector_env_state, vector_env_state

# ARGS ============================================================================================


@dataclass
class Args:
    seed: int = 1
    """seed of weights, actions, shuffles and environments"""
    env_id: str = "HalfCheetah-v5"
    """gymnasium environment"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, all processes together"""
    policy_lr: float = 3e-4
    """Adam step size of the actor"""
    q_lr: float = 1e-3
    """Adam step size of the critics and of alpha"""
    num_envs: int = 1
    """environments, all processes together"""
    action_repeat: int = 1
    """environment steps of one decision: SAC-J, which sums their rewards without discount"""
    buffer_size: int = 1_000_000
    """transitions kept, all processes together"""
    learning_starts: int = 5_000
    """environment steps with uniform actions before the first update"""
    updates_per_step: float = 1.0
    """gradient updates for each decision of an environment, those of all processes counted"""
    batch_size: int = 256
    """transitions of an update, all processes together"""
    gamma: float = 0.99
    """discount factor of one decision"""
    tau: float = 0.005
    """step of the target critics, eq. (7)"""
    policy_frequency: int = 2
    """updates between those of the actor, which then takes as many steps at once"""
    autotune: bool = True
    """learn alpha by eq. (6)"""
    alpha: float = 0.2
    """entropy coefficient with --no-autotune"""
    precision: Literal["float32", "bf16"] = "float32"
    """of the hidden layers and the actor's outputs; Q, losses and weights stay float32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is one"""
    compile: bool = False
    """compile forward and backward (needs a C++ compiler and up to two minutes, then saves time)"""
    log_every: int = 100
    """decisions of an environment between two rounds of logging, saving and evaluating"""
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
    eval_lengths: bool = False
    """evaluate actions held for 1, 2, 4, ..., 30 and for random numbers of steps, too; FAS"""
    capture_video: bool = False
    """record the first episode of each evaluation (pip install moviepy)"""
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""
    teach: tuple[Path, int, int, int, Path] | None = None
    """play for an S3RL script, which starts this: CHECKPOINT EPISODES SEED EVERY FILE"""

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        for name in ("action_repeat", "policy_frequency", "log_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("num_envs", "batch_size"):
            if (value := getattr(self, name)) < 1 or value % world_size:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag}: not a multiple of {world_size} processes")
        if self.buffer_size < self.num_envs:
            raise UserError(f"--buffer-size {self.buffer_size}: less than --num-envs")
        for name in ("updates_per_step", "alpha"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value}: not a positive number")
        if self.total_timesteps < (steps := self.num_envs * self.action_repeat):
            flag = f"--total-timesteps {self.total_timesteps}"
            raise UserError(f"{flag}: less than the {steps} steps of one decision")


# NETWORKS ========================================================================================


def squashed_gaussian(raw, noise, scale, middle):
    """Actions (M, A), log-probabilities (M,), eqs. (1) and (2); raw: (M, 2A), noise: (M, A)."""
    mean, raw_std = raw.chunk(2, -1)
    log_std = -5 + 3.5 * (raw_std.tanh() + 1)
    squashed = (mean + log_std.exp() * noise).tanh()
    # log Normal(u; mean, std) with (u - mean) / std = noise
    logprob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    logprob = logprob - (scale * (1 - squashed.square()) + 1e-6).log()
    return squashed * scale + middle, logprob.sum(-1)


class TwinCritic(nn.Module):
    """Q_1 and Q_2 as one batch of matrices; initialized like nn.Linear."""

    def __init__(self, inputs: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n, m in ((inputs, 256), (256, 256), (256, 1)):
            self.weights.append(torch.empty(2, n, m).uniform_(-(n**-0.5), n**-0.5))
            self.biases.append(torch.empty(2, 1, m).uniform_(-(n**-0.5), n**-0.5))

    def forward(self, x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """(M, O + A) -> (2, M). frozen: no gradients of the weights, only of x."""
        layers = list(zip(self.biases, self.weights, strict=True))
        if frozen:
            layers = [(bias.detach(), weight.detach()) for bias, weight in layers]
        x = x.expand(2, -1, -1)
        for bias, weight in layers[:-1]:
            x = torch.bmm(x, weight).add_(bias).relu_()
        bias, weight = layers[-1]
        # PITFALL: 701 is 700 in bfloat16. And products with a single column are slow as matrices.
        return (x.float() * weight.mT).sum(-1) + bias[..., 0]


class Agent(nn.Module):
    # diverges: a squashed Gaussian, twin critics with targets, an entropy coefficient
    """Actor, critics and their targets, and log alpha."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space, alpha=1.0):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Box):
            raise UserError(f"actions are {action_space}: ppo.py and s3rl_ppo.py take Discrete")
        if not action_space.is_bounded():
            raise UserError(f"actions are {action_space}: without bounds they cannot be squashed")
        O, A = observation_space.shape[0], math.prod(action_space.shape)
        layers = nn.Linear(O, 256), nn.ReLU(True), nn.Linear(256, 256), nn.ReLU(True)
        self.actor = nn.Sequential(*layers, nn.Linear(256, 2 * A))
        self.critic, self.target = TwinCritic(O + A), TwinCritic(O + A)
        self.target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))
        low, high = torch.tensor(np.stack([action_space.low, action_space.high])).float().flatten(1)
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("middle", (high + low) / 2)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor):
        """Actions (M, A) and their log-probabilities (M,)."""
        return squashed_gaussian(self.actor(obs).float(), noise, self.scale, self.middle)


def numpy_policy(agent: Agent):
    """Eq. (1) for arrays, with the weights of this moment; a noise of 0 gives the likeliest action.

    For a few rows torch's overhead is most of the time, and a GPU's round trip even more. On a CPU
    the weights are views, which follow the optimizer; on a GPU this has to be called again.
    """
    layers = [layer for layer in agent.actor if isinstance(layer, nn.Linear)]
    weights = [[p.detach().cpu().numpy() for p in (layer.weight.T, layer.bias)] for layer in layers]
    scale, middle = agent.scale.cpu().numpy(), agent.middle.cpu().numpy()

    def act(obs: np.ndarray, noise) -> np.ndarray:
        for weight, bias in weights[:-1]:
            obs = np.maximum(obs @ weight + bias, 0)
        mean, raw_std = np.split(obs @ weights[-1][0] + weights[-1][1], 2, -1)
        std = np.exp(-5 + 3.5 * (np.tanh(raw_std) + 1))
        return (np.tanh(mean + std * noise) * scale + middle).astype(np.float32)

    return act


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


def td_target(rewards, terminations, next_q, next_logprob, alpha, gamma):
    """y of eq. (3), (M,); next_q: (2, M), terminations: 0 or 1.

    PITFALL: a time limit is no termination. There the value of the last observation counts.
    """
    return rewards + gamma * (1 - terminations) * (next_q.amin(0) - alpha * next_logprob)


def critic_loss(q, target):
    """Eq. (4); q: (2, M), target: (M,). Returns the loss and, detached, what to log."""
    errors = (q - target).square().mean(1)
    values = q.detach().mean(1)
    metrics = {"qf1_values": values[0], "qf2_values": values[1]}
    metrics |= {"qf_loss": 0.5 * errors.detach().sum()}  # CleanRL logs the mean of the two
    return errors.sum(), metrics


def actor_loss(logprob, q, alpha):
    """Eq. (5); logprob: (M,), q: (2, M). Returns the loss and, detached, what to log."""
    loss = (alpha * logprob - q.amin(0)).mean()
    return loss, {"actor_loss": loss.detach(), "entropy": -logprob.detach().mean()}


def alpha_loss(log_alpha, logprob, target_entropy):
    """Eq. (6); logprob: (M,), which gets no gradient."""
    return -log_alpha.exp() * (logprob.detach() + target_entropy).mean()


# DATA ============================================================================================


class ReplayBuffer:
    """The last transitions, a float32 row each: obs | action | next_obs | reward | termination.

    A batch is then one index_select, and the input of the critics a part of its columns. Rows that
    were not written yet take no memory: the system provides it at the first touch.
    """

    def __init__(self, capacity, obs_size, action_size, batch_size, device):
        self.widths = [obs_size + action_size, obs_size, 1, 1]
        self.rows = torch.empty((capacity, sum(self.widths)), device=device)
        self.batch = self.rows.new_empty((batch_size, sum(self.widths)))
        self.size = self.position = 0

    def add(self, obs, actions, next_obs, rewards, terminations):
        """Arrays (N, ...), in order of time; N divides the capacity."""
        rows = np.column_stack([obs, actions, next_obs, rewards, terminations])
        end = self.position + len(rows)
        self.rows[self.position : end] = torch.from_numpy(rows.astype(np.float32))
        self.size, self.position = max(self.size, end), end % len(self.rows)

    def sample(self):
        """A batch, drawn with replacement: {name: view}, valid until the next call."""
        indices = torch.randint(self.size, (len(self.batch),)).to(self.rows.device)
        torch.index_select(self.rows, 0, indices, out=self.batch)
        obs_action, next_obs, rewards, terminations = self.batch.split(self.widths, 1)
        batch = {"obs": obs_action[:, : self.widths[1]], "obs_action": obs_action}
        batch |= {"next_obs": next_obs, "rewards": rewards[:, 0]}
        return batch | {"terminations": terminations[:, 0]}

    def state(self):
        # PITFALL: torch.save writes all that lies behind a view; behind numpy's view lies no more
        filled = torch.from_numpy(self.rows[: self.size].cpu().numpy())
        return {"rows": filled, "position": self.position}

    def load_state(self, state):
        self.size, self.position = len(state["rows"]), state["position"]
        self.rows[: self.size] = state["rows"]


# ROLLOUT =========================================================================================


def env_step(envs, actions, state, buffer):
    """One decision in N environments, stored. Returns the episodes (return, length) that ended.

    state: "obs" (N, O), "episode_return" and "episode_length" (N,), updated in place.
    """
    actions = actions.reshape(envs.action_space.shape)
    next_obs, rewards, terminations, _, infos = envs.step(actions)
    state["episode_return"] += rewards
    state["episode_length"] += 1
    last_obs, episodes = next_obs.copy(), []
    for n in np.flatnonzero(infos.get("_final_obs", ())):
        # PITFALL: next_obs[n] opens the next episode; what is stored must close this one.
        last_obs[n] = infos["final_obs"][n]
        episodes.append((state["episode_return"][n], state["episode_length"][n]))
        state["episode_return"][n] = state["episode_length"][n] = 0
    buffer.add(state["obs"], actions.reshape(len(actions), -1), last_obs, rewards, terminations)
    state["obs"] = next_obs.astype(np.float32)  # a copy: the environments write over their array
    return episodes


# EVALUATE ========================================================================================


@torch.random.fork_rng(devices=[])  # the first weights take no random numbers of training
def evaluate(checkpoint, episodes, deterministic, video_dir=None, lengths=(), teach=()):
    # diverges: a squashed Gaussian, and decisions that last several steps
    """Returns (episodes,) with a saved agent, on the CPU; episode i starts from seed + 10_000 + i.

    deterministic: the squashed mean, else a draw. video_dir: where to record the first episode.
    lengths: instead (lengths, episodes), from seed + 20_000 + i, of actions held for so many steps.
    teach: (episodes, seed, interval, file), to write these and values Q_1 for S3RL instead.
    """
    # mmap leaves the buffer on disk
    saved = torch.load(checkpoint / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
    envs = make_episodes(saved["args"]["env_id"], episodes, video_dir)
    agent = Agent(envs[0].observation_space, envs[0].action_space)
    agent.load_state_dict(saved["agent"])
    seed = teach[1] if teach else saved["args"]["seed"] + (20_000 if lengths else 10_000)
    act, generator = numpy_policy(agent), np.random.default_rng(seed)

    def decide(obs, _, steps):
        noise = 0.0 if deterministic else generator.standard_normal((len(obs), len(agent.scale)))
        return act(obs, noise)[:, None].repeat(steps, 1)

    J = saved["args"]["action_repeat"]
    if teach:
        q = agent.critic
        return play_and_save(envs[0], decide, lambda *x: q(torch.hstack(x).float())[0], J, *teach)
    returns = play_episodes(envs, seed, lengths or [J], decide)
    return returns if lengths else returns[0]


def evaluate_and_log(checkpoint, step, log, args, best):
    # diverges: --eval-lengths
    """Rank 0 evaluates a checkpoint in all ways; best: as in `length_metrics`."""
    if dist.get_rank() > 0:
        return
    means = {}
    for mode in ("deterministic", "stochastic"):
        video_dir = checkpoint.parents[1] / f"videos/{step}-{mode}" if args.capture_video else None
        returns = evaluate(checkpoint, args.eval_episodes, mode == "deterministic", video_dir)
        log.add(step, {f"eval/{mode}_return": returns.mean(), f"eval/{mode}_std": returns.std()})
        tqdm.write(f"step {step}: {mode} return {returns.mean():.1f} +- {returns.std():.1f}")
        means[mode] = returns.mean()
    if args.eval_lengths:
        returns = evaluate(checkpoint, args.eval_episodes, True, lengths=EVALUATED_LENGTHS)
        log.add(step, length_metrics(returns.mean(1), means["deterministic"], best, args.env_id))


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


def mean_over_processes(tensor):
    """In place; takes no time where there is one process."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
    return tensor


def gather_lists(items):
    """The lists of all processes, joined in order of rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def adam(parameter, learning_rate):
    """With its state made now, so that the first checkpoint is as large as the last."""
    optimizer = torch.optim.Adam([parameter], lr=learning_rate, fused=True)
    moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
    step = torch.zeros((), device=parameter.device)
    optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


def gradient_vector(loss, module):
    """d loss / d parameters in one vector, in the order of `flatten_parameters`."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def critic_gradient(agent, batch, noise, args):
    """Gradient on this process's part of a batch, eqs. (3) and (4), and what to log."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        with torch.no_grad():
            next_actions, next_logprob = agent.sample(batch["next_obs"], noise)
            next_q = agent.target(torch.cat([batch["next_obs"], next_actions], 1))
        q = agent.critic(batch["obs_action"])
    alpha = agent.log_alpha.detach().exp()
    signal = batch["rewards"], batch["terminations"]
    loss, metrics = critic_loss(q, td_target(*signal, next_q, next_logprob, alpha, args.gamma))
    return gradient_vector(loss, agent.critic), metrics


def actor_gradient(agent, obs, noise, args):
    """Gradient on this process's part of a batch, and what to log."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        actions, logprob = agent.sample(obs, noise)
        q = agent.critic(torch.cat([obs, actions], 1), frozen=True)
    loss, metrics = actor_loss(logprob, q, agent.log_alpha.detach().exp())
    return gradient_vector(loss, agent.actor), metrics


@torch.no_grad()
def alpha_gradient(agent, obs, noise, args):
    """Gradient of eq. (6) in log alpha: exp is its own derivative, so it is the loss."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        _, logprob = agent.sample(obs, noise)
    loss = alpha_loss(agent.log_alpha, logprob, -noise.shape[1])
    return loss, {"alpha_loss": loss.clone()}  # processes average the gradient in place


def update(flat, optimizers, gradients, batch, noise, args):
    # diverges: one batch from the buffer; critics, actor, alpha and targets
    """One step of the critics and their targets. Returns what to log, as tensors.

    noise: standard normal (1 + 2 K, M, A), for the critics and for K steps of actor and alpha.
    """

    def descend(name, *inputs):
        grad, found = gradients[name](*inputs)
        flat[name].grad = mean_over_processes(grad)
        optimizers[name].step()
        metrics.update(found)

    metrics = {}
    descend("critic", batch, noise[0])
    for k in range(1, len(noise), 2):
        descend("actor", batch["obs"], noise[k])
        if args.autotune:
            descend("alpha", batch["obs"], noise[k + 1])
    flat["target"].data.lerp_(flat["critic"].data, args.tau)  # eq. (7)
    return metrics


def steps_taken(envs, device, args):
    """By one decision, in all processes; the end of an episode cuts it short."""
    if args.action_repeat == 1:
        return args.num_envs
    steps = torch.tensor(sum(envs.get_attr("steps_taken")), device=device)
    dist.all_reduce(steps)
    return steps.item()


def draw(buffer, number, actions, args):
    """Batch and noise of update `number`, in which the actor learns at every K-th one."""
    pairs = args.policy_frequency if number % args.policy_frequency == 0 else 0
    noise = torch.randn(1 + 2 * pairs, len(buffer.batch), actions)
    return buffer.sample(), noise.to(buffer.rows.device)


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    torch.set_num_threads(1)  # runs side by side share a machine better than threads share a batch
    if args.teach:
        return evaluate(args.teach[0], 1, deterministic=False, teach=args.teach[1:])
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or Path("runs") / f"{args.env_id}__{Path(__file__).stem}__{args.seed}"
    path = find_checkpoint(run_dir, args.resume)

    N, batch_size = args.num_envs // world_size, args.batch_size // world_size
    decision_steps = args.num_envs * args.action_repeat  # at most
    last_start = args.total_timesteps - decision_steps
    envs = make_vector_env(args.env_id, N, args.action_repeat)
    seed_everything(args.seed)  # every process builds the same weights
    alpha = 1.0 if args.autotune else args.alpha
    agent = Agent(envs.single_observation_space, envs.single_action_space, alpha).to(device)
    low, high = envs.single_action_space.low.ravel(), envs.single_action_space.high.ravel()
    flat = {n: flatten_parameters(getattr(agent, n)) for n in ("critic", "actor", "target")}
    flat["alpha"] = agent.log_alpha
    rates = {"critic": args.q_lr, "actor": args.policy_lr, "alpha": args.q_lr}
    optimizers = {name: adam(flat[name], rate) for name, rate in rates.items()}
    gradients = {"critic": critic_gradient, "actor": actor_gradient, "alpha": alpha_gradient}
    gradients = {name: partial(f, agent, args=args) for name, f in gradients.items()}
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the backward pass with the rest
        gradients = {name: torch.compile(f, dynamic=False) for name, f in gradients.items()}

    seed_everything(args.seed + 100_003 * rank)
    obs, _ = envs.reset(seed=args.seed + rank * N)  # no two environments share a seed
    capacity = args.buffer_size // args.num_envs * N
    buffer = ReplayBuffer(capacity, obs.shape[1], len(low), batch_size, device)
    state = {"obs": obs.astype(np.float32)}
    state |= {"episode_return": np.zeros(N), "episode_length": np.zeros(N)}
    global_step = decisions = updates = log_size = 0  # of decisions those that updates follow
    evaluation_due, best = False, {"return": -math.inf, "fas": 0.0}
    if path:
        saved = load_checkpoint(path, args)
        counts = "global_step decisions updates log_size".split()
        global_step, decisions, updates, log_size = (saved[name] for name in counts)
        evaluation_due, best = saved["evaluation_due"], saved.get("best", best)
        agent.load_state_dict(saved["agent"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        buffer.load_state(saved["buffer"])
        if set_vector_env_state(envs, saved["envs"]):
            state = {name: tensor.numpy() for name, tensor in saved["state"].items()}
        set_rng_state(saved["rng"], device)
        del saved  # it holds the buffer a second time
    act = numpy_policy(agent)
    learn = partial(update, flat, optimizers, gradients, args=args)

    def checkpoint():
        whole = {"args": plain_args(args), "global_step": global_step, "updates": updates}
        whole |= {"decisions": decisions, "log_size": log.size(), "evaluation_due": evaluation_due}
        whole |= {"agent": agent.state_dict(), "buffer": buffer.state(), "best": best}
        whole |= {"optimizers": {name: o.state_dict() for name, o in optimizers.items()}}
        whole |= {"state": {name: torch.from_numpy(array) for name, array in state.items()}}
        whole |= {"envs": vector_env_state(envs), "rng": rng_state(device)}
        return save_checkpoint(run_dir, global_step, whole)

    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()
    if path is None:
        path = checkpoint()  # a directory that cannot hold the run shows now, not in an hour
        check_room(run_dir, min(args.buffer_size, args.total_timesteps), buffer.rows[0].nbytes)
    recent = deque(maxlen=100)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=rank > 0)
    while True:
        if global_step > last_start or evaluation_due:
            evaluate_and_log(path, global_step, log, args, best)
        if global_step > last_start:
            break
        started, start_step, start_updates = time.monotonic(), global_step, updates
        metrics, episodes = {}, []
        for _ in range(min(args.log_every, 1 + (last_start - global_step) // decision_steps)):
            if global_step < args.learning_starts:
                actions = np.random.uniform(low, high, (N, len(low))).astype(np.float32)
            else:
                actions = act(state["obs"], np.random.standard_normal((N, len(low))))
            ended = env_step(envs, actions, state, buffer)
            global_step += steps_taken(envs, device, args)
            episodes += [(global_step, *episode) for episode in ended]
            decisions += args.num_envs * (global_step > args.learning_starts)
            due = int(args.updates_per_step * decisions)
            for number in range(updates, due):
                metrics |= learn(*draw(buffer, number, len(low), args))
            if due > updates and device.type == "cuda":
                act = numpy_policy(agent)
            updates = due

        for step, episodic_return, length in gather_lists(episodes):
            recent.append(episodic_return)
            episode = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
            log.add(step, episode)
        metrics["alpha"] = agent.log_alpha.detach().exp()
        means = mean_over_processes(torch.stack(list(metrics.values())))
        metrics = dict(zip((f"losses/{name}" for name in metrics), means.tolist(), strict=True))
        metrics["charts/SPS"] = (global_step - start_step) / (time.monotonic() - started)
        log.add(global_step, metrics)
        bar.set_postfix(episodic_return=f"{np.mean(recent or [np.nan]):.1f}", refresh=False)
        bar.update(global_step - start_step)
        every = args.eval_every or math.inf
        evaluation_due = updates // every > start_updates // every
        save = time.monotonic() - last_save >= args.save_every or global_step > last_start
        flags = torch.tensor([save or evaluation_due, max(stop, default=0)], device=device)
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
