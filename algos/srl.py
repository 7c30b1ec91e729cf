"""Sequence Reinforcement Learning (SRL): from one observation, the actions of several steps.

Parent: algos/sac_continuous_action.py
Paper: Overcoming Slow Decision Frequencies in Continuous Control: Model-Based Sequence
Reinforcement Learning for Model-Free Control, Patel, Siegelmann, ICLR 2025, arXiv 2410.08979.

What changes against the parent: the actor gives J actions, which are taken without a look at what
they do. In training a learned model says where each of them is taken, so that the critic of single
steps grades it; acting needs none. Dropped: action repeat, fixed alpha, delayed actor, bf16.

    h_0 = V relu(U s),  h_k = GRU(a_{k-1}, h_{k-1}),  a_0: the action before s, at first 0      (8)
    a_k = tanh(u_k) scale + middle,  u_k = m(h_k) + exp(clip(w(h_k), -20, 2)) eps_k             (9)
    y = r + gamma (1 - term) (min_i Q'_i(s', a'_1) - alpha log pi(a'_1|s', a)),  a' from s'    (10)
    L_f = mean (f(s, a) - s')^2                                                                (11)
    x_1 = s,  x_{k+1} = f'(x_k, a_k), a constant                                               (12)
    L_pi = sum_k mean (alpha log pi(a_k|h_k) - min_i Q_i(x_k, a_k))                            (13)
    L_alpha = -log(alpha) mean (mean_k log pi(a_k|h_k) + H),  H = -A                           (14)
    Q' <- (1 - tau) Q' + tau Q,  f' <- (1 - tau) f' + tau f                                    (15)
log pi is (2), and (10) goes into (4). An update is (4) on one batch, (11), (13), (14) on another,
then (15). With J = 1, (10) and (13) are (3) and (5), and f serves nobody; not the parent's are the
actor, (14) and the second batch.

Run:  python algos/srl.py --env-id HalfCheetah-v5 --sequence-length 8
      torchrun --standalone --nproc_per_node 2 algos/srl.py --num-envs 2

Differs from the paper: unknown, its body was not read. Losses are those of the authors' code; how
    the agent acts while it learns, and at other lengths than J, is a reconstruction.
Differs from the authors' code: alpha is 1 in the first update, not 0.2. No loop for SRL is there,
    nor how often its actor learned: here always.

Shapes: N environments, M transitions of a batch (of this process), O observation, A action size, J.
"""

import atexit
import copy
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
    sequence_length: int = 8
    """actions from one observation, J"""
    learning_rate: float = 3e-4
    """Adam step size of actor, critics, model and alpha"""
    num_envs: int = 1
    """environments, all processes together"""
    buffer_size: int = 1_000_000
    """transitions kept, all processes together"""
    random_steps: int = 10_000
    """environment steps with uniform actions; updates start with the first whole batch"""
    updates_per_step: float = 1.0
    """gradient updates for each environment step, those of all processes counted"""
    batch_size: int = 256
    """transitions of an update, all processes together"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the targets, eq. (15)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is one"""
    compile: bool = False
    """compile forward and backward (needs a C++ compiler and up to two minutes, then saves time)"""
    log_every: int = 100
    """steps of an environment between two rounds of logging, saving and evaluating"""
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
    eval_lengths: bool = True
    """evaluate sequences of 1, 2, 4, ..., 30 and of random numbers of actions, too; FAS"""
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""
    teach: tuple[Path, int, int, int, Path] | None = None
    """play for an S3RL script, which starts this: CHECKPOINT EPISODES SEED EVERY FILE"""

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        for name in ("sequence_length", "log_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("num_envs", "batch_size"):
            if (value := getattr(self, name)) < 1 or value % world_size:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag}: not a multiple of {world_size} processes")
        if not 0 < self.updates_per_step < math.inf:
            raise UserError(f"--updates-per-step {self.updates_per_step}: not a positive number")
        for name in ("total_timesteps", "buffer_size"):
            if (value := getattr(self, name)) < self.num_envs:
                raise UserError(f"--{name.replace('_', '-')} {value}: less than --num-envs")


# NETWORKS ========================================================================================


def squashed_gaussian(raw, noise, scale, middle):
    # diverges: the log standard deviation is cut off, not squashed
    """Actions (M, A), log-probabilities (M,), eqs. (9) and (2); raw: (M, 2A), noise: (M, A)."""
    mean, log_std = raw.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
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
    # diverges: a recurrent actor and a model
    """Actor; what grades its sequences, critic and model, with targets; log alpha."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Box) or not action_space.is_bounded():
            raise UserError(f"actions are {action_space}, not a bounded Box: use ppo.py or another")
        O, A = observation_space.shape[0], math.prod(action_space.shape)
        start = nn.Sequential(nn.Linear(O, 256), nn.ReLU(True), nn.Linear(256, 256))
        self.actor = nn.ModuleDict({"start": start, "cell": nn.GRUCell(A, 256)})
        self.actor["heads"] = nn.Linear(256, 2 * A)  # mean and log standard deviation
        layers = nn.Linear(O + A, 400), nn.ReLU(True), nn.Linear(400, 300), nn.ReLU(True)
        model = nn.Sequential(*layers, nn.Linear(300, O))
        self.grader = nn.ModuleDict({"critic": TwinCritic(O + A), "model": model})
        for name, p in self.named_parameters():
            if "cell" not in name:  # Xavier; torch's own way for the cell
                bound = 0.0 if "bias" in name else (6 / sum(p.shape[-2:])) ** 0.5
                p.data.uniform_(-bound, bound)
        self.target = copy.deepcopy(self.grader)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        low, high = torch.tensor(np.stack([action_space.low, action_space.high])).float().flatten(1)
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("middle", (high + low) / 2)

    def sample(self, obs: torch.Tensor, previous: torch.Tensor, noise: torch.Tensor):
        """Sequences (J, M, A) and their log-probabilities (J, M), for noise (J, M, A)."""
        hidden, action, sequence = self.actor["start"](obs), previous, []
        for eps in noise:
            hidden = self.actor["cell"](action, hidden)  # eq. (8)
            raw = self.actor["heads"](hidden)
            action, logprob = squashed_gaussian(raw, eps, self.scale, self.middle)
            sequence.append((action, logprob))
        return map(torch.stack, zip(*sequence, strict=True))

    @torch.no_grad()
    def recall(self, obs: torch.Tensor, actions: torch.Tensor):
        """Eq. (12): the states (J, M, O) in which the model has the actions (J, M, A) taken."""
        states = [obs]
        for action in actions[:-1]:
            states.append(self.target["model"](torch.cat([states[-1], action], 1)))
        return torch.stack(states)


def numpy_policy(agent: Agent):
    # diverges: sequences of a recurrent actor
    """Eqs. (8) and (9) for arrays, as in the parent; a noise of 0 gives the likeliest actions."""
    U, u, V, v, X, Y, x, y, W, w = (p.detach().cpu().numpy().T for p in agent.actor.parameters())
    scale, middle = agent.scale.cpu().numpy(), agent.middle.cpu().numpy()

    def act(obs: np.ndarray, action: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """(n, O), the actions before them (n, A), (n, J, A) -> (n, J, A)."""
        hidden, sequence = np.maximum(obs @ U + u, 0) @ V + v, []
        for eps in noise.astype(np.float32).swapaxes(0, 1):
            new, old = action @ X + x, hidden @ Y + y  # (n, 3 * 256): reset, keep, candidate
            gates = 0.5 + 0.5 * np.tanh(0.5 * (new + old)[:, :512])  # sigmoid without overflow
            candidate = np.tanh(new[:, 512:] + gates[:, :256] * old[:, 512:])
            hidden = candidate + gates[:, 256:] * (hidden - candidate)
            mean, log_std = np.split(hidden @ W + w, 2, -1)
            action = np.tanh(mean + np.exp(log_std.clip(-20, 2)) * eps) * scale + middle
            sequence.append(action)
        return np.stack(sequence, 1)

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


def model_loss(predicted, next_obs):
    """Eq. (11); both (M, O)."""
    return (predicted - next_obs).square().mean()


def actor_loss(logprob, q, alpha):
    # diverges: a sum over the sequence
    """Eq. (13); logprob: (J, M), q: (2, J, M). Returns the loss and, detached, what to log."""
    loss = (alpha * logprob - q.amin(0)).mean(1).sum()
    return loss, {"actor_loss": loss.detach(), "entropy": -logprob.detach().mean()}


def alpha_loss(log_alpha, logprob, target_entropy):
    # diverges: log alpha is the factor
    """Eq. (14); logprob: (J, M), which gets no gradient."""
    return -log_alpha * (logprob.detach() + target_entropy).mean()


# DATA ============================================================================================


class ReplayBuffer:
    # diverges: actions before the observation
    """The last transitions; a row: obs | action | next_obs | previous | reward | termination."""

    def __init__(self, capacity, obs_size, action_size, batch_size, device):
        self.widths = [obs_size, action_size, obs_size, action_size, 1, 1]
        self.rows = torch.empty((capacity, sum(self.widths)), device=device)
        self.batch = self.rows.new_empty((2 * batch_size, sum(self.widths)))
        self.size = self.position = 0

    def add(self, obs, actions, next_obs, previous, rewards, terminations):
        """Arrays (N, ...), in order of time; N divides the capacity."""
        rows = np.column_stack([obs, actions, next_obs, previous, rewards, terminations])
        end = self.position + len(rows)
        self.rows[self.position : end] = torch.from_numpy(rows.astype(np.float32))
        self.size, self.position = max(self.size, end), end % len(self.rows)

    def sample(self):
        """Two batches, drawn with replacement: {name: view} each, valid until the next call."""
        indices = torch.randint(self.size, (len(self.batch),)).to(self.rows.device)
        torch.index_select(self.rows, 0, indices, out=self.batch)
        names = "obs actions next_obs previous rewards terminations".split()
        for rows in self.batch.chunk(2):
            batch = dict(zip(names, rows.split(self.widths, 1), strict=True))
            batch |= {name: batch[name][:, 0] for name in names[4:]}
            yield batch | {"obs_action": rows[:, : sum(self.widths[:2])]}

    def state(self):
        # PITFALL: torch.save writes all that lies behind a view; behind numpy's view lies no more
        filled = torch.from_numpy(self.rows[: self.size].cpu().numpy())
        return {"rows": filled, "position": self.position}

    def load_state(self, state):
        self.size, self.position = len(state["rows"]), state["position"]
        self.rows[: self.size] = state["rows"]


# ROLLOUT =========================================================================================


def next_actions(state, act, low, high, random):
    """The next action of each environment's plan, (N, A); plans that are through begin anew."""
    due = np.flatnonzero(state["position"] == state["plan"].shape[1])
    if len(due):
        size = len(due), *state["plan"].shape[1:]
        if random:
            state["plan"][due] = np.random.uniform(low, high, size)
        else:
            noise = np.random.standard_normal(size)
            state["plan"][due] = act(state["obs"][due], state["previous"][due], noise)
        state["position"][due] = 0
    state["position"] += 1
    return state["plan"][np.arange(len(state["plan"])), state["position"] - 1]


def env_step(envs, actions, state, buffer):
    # diverges: the actions before and the rest of a sequence
    """One step in N environments, stored. Returns the episodes (return, length) that ended.

    state, updated in place: "obs" (N, O), "previous" actions (N, A), "plan" (N, J, A), and of (N,)
    the "position" in the plan, "episode_return" and "episode_length".
    """
    next_obs, rewards, terminations, _, infos = envs.step(actions.reshape(envs.action_space.shape))
    state["episode_return"] += rewards
    state["episode_length"] += 1
    last_obs, episodes = next_obs.copy(), []
    for n in (ended := np.flatnonzero(infos.get("_final_obs", ()))):
        # PITFALL: next_obs[n] opens the next episode; what is stored must close this one.
        last_obs[n] = infos["final_obs"][n]
        episodes.append((state["episode_return"][n], state["episode_length"][n]))
        state["episode_return"][n] = state["episode_length"][n] = 0
    buffer.add(state["obs"], actions, last_obs, state["previous"], rewards, terminations)
    state["obs"] = next_obs.astype(np.float32)  # a copy: the environments write over their array
    state["previous"] = actions
    state["previous"][ended] = 0
    state["position"][ended] = state["plan"].shape[1]  # the rest of a sequence is dropped
    return episodes


# EVALUATE ========================================================================================


@torch.random.fork_rng(devices=[])  # the first weights take no random numbers of training
def evaluate(checkpoint, episodes, deterministic, video_dir=None, lengths=(), teach=()):
    # diverges: sequences of actions
    """As the parent's evaluate, with sequences of the given lengths in place of held actions."""
    saved = torch.load(checkpoint / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
    envs = make_episodes(saved["args"]["env_id"], episodes, video_dir)
    agent = Agent(envs[0].observation_space, envs[0].action_space)
    agent.load_state_dict(saved["agent"])
    seed = teach[1] if teach else saved["args"]["seed"] + (20_000 if lengths else 10_000)
    act, generator = numpy_policy(agent), np.random.default_rng(seed)

    def decide(obs, previous, steps):
        noise = generator.standard_normal((len(obs), steps, len(agent.scale)))
        return act(obs, previous, noise * (not deterministic))

    J = saved["args"]["sequence_length"]
    if teach:
        q = agent.grader["critic"]
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


def grader_gradient(agent, batches, noise, args):
    """{"grader": gradient} on two batches, eqs. (10), (4) and (11), and what to log."""
    batch, second = batches
    with torch.no_grad():
        # PITFALL: the action before s' is that of this transition, not the one before that
        actions, logprob = agent.sample(batch["next_obs"], batch["actions"], noise)
        next_q = agent.target["critic"](torch.cat([batch["next_obs"], actions[0]], 1))
    signal, alpha = (batch["rewards"], batch["terminations"]), agent.log_alpha.detach().exp()
    target = td_target(*signal, next_q, logprob[0], alpha, args.gamma)
    loss, metrics = critic_loss(agent.grader["critic"](batch["obs_action"]), target)
    error = model_loss(agent.grader["model"](second["obs_action"]), second["next_obs"])
    grads = {"grader": gradient_vector(loss + error, agent.grader)}  # they share no weights
    return grads, metrics | {"model_loss": error.detach()}


def actor_gradient(agent, batch, noise, args):
    # diverges: sequences, graded at the states of the model; alpha learns from them, too
    """{"actor": gradient, "alpha": gradient} on a batch, and what to log."""
    actions, logprob = agent.sample(batch["obs"], batch["previous"], noise)
    # all J steps at once, since none of the states carries a gradient
    x = torch.cat([agent.recall(batch["obs"], actions), actions], 2).flatten(0, 1)
    q = agent.grader["critic"](x, frozen=True).unflatten(1, logprob.shape)
    loss, metrics = actor_loss(logprob, q, agent.log_alpha.detach().exp())
    for_alpha = alpha_loss(agent.log_alpha, logprob, -actions.shape[2])
    grads = {"actor": gradient_vector(loss, agent.actor)}
    grads["alpha"] = torch.autograd.grad(for_alpha, agent.log_alpha)[0]
    return grads, metrics | {"alpha_loss": for_alpha.detach()}


def update(flat, optimizers, gradients, batches, noise, args):
    # diverges: a batch for the critics, another for model, actor and alpha
    """One step of all networks and targets; noise: (1 + J, M, A). Returns what to log."""

    def descend(name, *inputs):
        grads, found = gradients[name](*inputs)
        for part, grad in grads.items():
            flat[part].grad = mean_over_processes(grad)
            optimizers[part].step()
        metrics.update(found)

    metrics = {}
    descend("grader", batches, noise[:1])
    descend("actor", batches[1], noise[1:])
    flat["target"].data.lerp_(flat["grader"].data, args.tau)  # eq. (15)
    return metrics


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    torch.set_num_threads(1)  # runs side by side share a machine better than threads share a batch
    if args.teach:
        return evaluate(args.teach[0], 1, deterministic=False, teach=args.teach[1:])
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or Path("runs") / f"{args.env_id}__{Path(__file__).stem}__{args.seed}"
    path = find_checkpoint(run_dir, args.resume)

    N, batch_size = args.num_envs // world_size, args.batch_size // world_size
    J, total = args.sequence_length, args.total_timesteps // args.num_envs * args.num_envs
    envs = make_vector_env(args.env_id, N)
    seed_everything(args.seed)  # every process builds the same weights
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    low, high = envs.single_action_space.low.ravel(), envs.single_action_space.high.ravel()
    flat = {n: flatten_parameters(getattr(agent, n)) for n in ("grader", "actor", "target")}
    flat["alpha"] = agent.log_alpha
    optimizers = {n: adam(flat[n], args.learning_rate) for n in ("grader", "actor", "alpha")}
    gradients = {"grader": grader_gradient, "actor": actor_gradient}
    gradients = {name: partial(f, agent, args=args) for name, f in gradients.items()}
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the backward pass with the rest
        gradients = {name: torch.compile(f, dynamic=False) for name, f in gradients.items()}

    seed_everything(args.seed + 100_003 * rank)
    obs, _ = envs.reset(seed=args.seed + rank * N)  # no two environments share a seed
    A, capacity = len(low), args.buffer_size // args.num_envs * N
    buffer = ReplayBuffer(capacity, obs.shape[1], A, batch_size, device)
    state = {"obs": obs.astype(np.float32), "previous": np.zeros((N, A), np.float32)}
    state |= {"plan": np.zeros((N, J, A), np.float32), "position": np.full(N, J)}
    state |= {"episode_return": np.zeros(N), "episode_length": np.zeros(N)}
    global_step = updates = log_size = 0
    evaluation_due, best = False, {"return": -math.inf, "fas": 0.0}
    if path:
        saved = load_checkpoint(path, args)
        global_step, updates, log_size = (saved[n] for n in ("global_step", "updates", "log_size"))
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
        whole |= {"log_size": log.size(), "evaluation_due": evaluation_due, "best": best}
        whole |= {"agent": agent.state_dict(), "buffer": buffer.state()}
        whole |= {"optimizers": {name: o.state_dict() for name, o in optimizers.items()}}
        whole |= {"state": {name: torch.from_numpy(array) for name, array in state.items()}}
        whole |= {"envs": vector_env_state(envs), "rng": rng_state(device)}
        return save_checkpoint(run_dir, global_step, whole)

    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()
    if path is None:
        path = checkpoint()  # a directory that cannot hold the run shows now, not in an hour
        check_room(run_dir, min(args.buffer_size, total), buffer.rows[0].nbytes)
    recent = deque(maxlen=100)
    bar = tqdm(total=total, initial=global_step, unit="step", disable=rank > 0)
    while True:
        if global_step == total or evaluation_due:
            evaluate_and_log(path, global_step, log, args, best)
        if global_step == total:
            break
        started, start_step, start_updates = time.monotonic(), global_step, updates
        metrics, episodes = {}, []
        for _ in range(min(args.log_every, (total - global_step) // args.num_envs)):
            if device.type == "cuda" and (state["position"] == J).any():
                act = numpy_policy(agent)  # weights go to the host where a sequence begins
            actions = next_actions(state, act, low, high, global_step < args.random_steps)
            ended = env_step(envs, actions, state, buffer)
            global_step += args.num_envs
            episodes += [(global_step, *episode) for episode in ended]
            due = int(args.updates_per_step * max(0, global_step + 1 - args.batch_size))
            for _ in range(updates, due):
                noise = torch.randn(1 + J, batch_size, A).to(device)
                metrics |= learn(list(buffer.sample()), noise)
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
        save = time.monotonic() - last_save >= args.save_every or global_step == total
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
