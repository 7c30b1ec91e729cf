"""S3RL with TD3: training starts in states of a teacher's episodes.

Parent: algos/td3_continuous_action.py

Paper: Snapshot Reinforcement Learning: Leveraging Prior Trajectories for Efficiency, Zhao, Qian,
Wang, Shan, Qin, 2024, arXiv 2403.00673.

What changes against the parent: where the episodes of a first phase start and when they end. A
frozen teacher, a run of any script with environments, plays some episodes, and every ten steps the
simulator's state is saved. The student starts from these snapshots: from low and high values of the
teacher equally often (status classification, SC), for a hundred steps (trajectory truncation, STT).
    f_i = Q_1(s_i, a_i) of the teacher, in snapshot i, where it takes a_i; V(s_i) of PPO's     (14)
    p_i = 1 / (K n_i),  K clusters of f by k-means, n_i snapshots in that of i                 (15)
    the time limit of an episode that starts in step t_i of the teacher's is t_i + L           (16)
S3RL is the default; --truncation 1000 leaves out STT, --clusters 1 SC, both give SnapshotRL;
--no-snapshots is STT alone and --snapshot-timesteps 0 the parent, which has more: action-repeat,
updates-per-step, precision and, at the start, a check of room for the whole buffer.

Run:  python algos/s3rl_td3.py --env-id Hopper-v5 --teacher runs/Hopper-v5__td3_continuous_action__1
      torchrun --standalone --nproc_per_node 2 algos/s3rl_td3.py --num-envs 2 --teacher RUN

Differs from the paper: unknown, its text was not read. This follows the authors' published code.
Differs from the authors' code: states of simulators, not copies of environments; snapshots one step
    earlier; teachers of any algorithm, a seed for each of their episodes; what the parent lists.

Shapes: N environments, M transitions of a batch, S snapshots, O observation, A action size.
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

from envs import UserError, report_user_error
from envs.episodes import make_episodes, play_and_save, play_episodes
from envs.make import make_env, make_vector_env
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
    """Adam step size of actor and critics"""
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
    """K of eq. (15); 1: any snapshot with the same chance (authors' commands)"""
    truncation: int = 100
    """L of eq. (16); the authors' commands have 1000 where they test without STT"""
    num_envs: int = 1
    """environments, all processes together"""
    buffer_size: int = 1_000_000
    """transitions kept, all processes together"""
    learning_starts: int = 25_000
    """environment steps with uniform actions before the first update"""
    batch_size: int = 256
    """transitions of an update, all processes together"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the targets, eq. (13)"""
    policy_frequency: int = 2
    """updates between those of the actor and the targets"""
    exploration_noise: float = 0.1
    """standard deviation of eq. (9), in units of half the width of the bounds"""
    policy_noise: float = 0.2
    """standard deviation of eq. (10), in the same units"""
    noise_clip: float = 0.5
    """bound on that noise"""
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
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""
    teach: tuple[Path, int, int, int, Path] | None = None
    """play for an S3RL script, which starts this: CHECKPOINT EPISODES SEED EVERY FILE"""

    def __post_init__(self):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        ones = "num_envs batch_size policy_frequency log_every eval_episodes teacher_episodes "
        least = dict.fromkeys((ones + "snapshot_every clusters truncation").split(), 1)
        least |= dict.fromkeys(("exploration_noise", "policy_noise", "noise_clip"), 0)
        least |= dict.fromkeys(("buffer_size", "total_timesteps"), self.num_envs)
        for name, bound in least.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not value >= bound:
                raise UserError(f"{flag} {value}: less than {bound}")
            if name in ("num_envs", "batch_size") and value % world_size:
                raise UserError(f"{flag} {value}: not a multiple of {world_size} processes")


# NETWORKS ========================================================================================


def smoothed_actions(actions, noise, scale, middle, args):
    """Eq. (10); actions m'(s') and noise, standard normal: (M, A)."""
    noise = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
    return (actions + scale * noise).clamp(middle - scale, middle + scale)


class TwinCritic(nn.Module):
    # diverges: the actor learns from Q_1 alone
    """Q_1 and Q_2 as one batch of matrices; initialized like nn.Linear."""

    def __init__(self, inputs: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n, m in ((inputs, 256), (256, 256), (256, 1)):
            self.weights.append(torch.empty(2, n, m).uniform_(-(n**-0.5), n**-0.5))
            self.biases.append(torch.empty(2, 1, m).uniform_(-(n**-0.5), n**-0.5))

    def forward(self, x: torch.Tensor, for_actor: bool = False) -> torch.Tensor:
        """(M, O + A) -> (2, M). for_actor: Q_1 alone, (1, M), without gradients of the weights."""
        layers = list(zip(self.biases, self.weights, strict=True))
        if for_actor:
            layers = [(bias[:1].detach(), weight[:1].detach()) for bias, weight in layers]
        x = x.expand(len(layers[0][0]), -1, -1)
        for bias, weight in layers[:-1]:
            x = torch.bmm(x, weight).add_(bias).relu_()
        bias, weight = layers[-1]
        # PITFALL: 701 is 700 in bfloat16. And products with a single column are slow as matrices.
        return (x.float() * weight.mT).sum(-1) + bias[..., 0]


class Agent(nn.Module):
    # diverges: a deterministic actor, and targets of actor and critics
    """Actor and critics, and their targets."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Box):
            raise UserError(f"actions are {action_space}: ppo.py and s3rl_ppo.py take Discrete")
        if not action_space.is_bounded():
            raise UserError(f"actions are {action_space}: without bounds they cannot be squashed")
        O, A = observation_space.shape[0], math.prod(action_space.shape)
        layers = nn.Linear(O, 256), nn.ReLU(True), nn.Linear(256, 256), nn.ReLU(True)
        self.actor = nn.Sequential(*layers, nn.Linear(256, A))
        self.target_actor = copy.deepcopy(self.actor)
        self.critic, self.target = TwinCritic(O + A), TwinCritic(O + A)
        self.target.load_state_dict(self.critic.state_dict())
        low, high = torch.tensor(np.stack([action_space.low, action_space.high])).float().flatten(1)
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("middle", (high + low) / 2)

    def actions(self, actor: nn.Sequential, obs: torch.Tensor):
        """Eq. (8): (M, O) -> (M, A)."""
        return actor(obs).float().tanh() * self.scale + self.middle


def numpy_policy(agent: Agent):
    # diverges: a deterministic actor, and noise of its own
    """Eq. (9) for arrays, with the weights of this moment; noise in units of the scale.

    For a few rows torch's overhead is most of the time, and a GPU's round trip even more. On a CPU
    the weights are views, which follow the optimizer; on a GPU this has to be called again.
    """
    layers = [layer for layer in agent.actor if isinstance(layer, nn.Linear)]
    weights = [[p.detach().cpu().numpy() for p in (layer.weight.T, layer.bias)] for layer in layers]
    scale, middle = agent.scale.cpu().numpy(), agent.middle.cpu().numpy()

    def act(obs: np.ndarray, noise) -> np.ndarray:
        for weight, bias in weights[:-1]:
            obs = np.maximum(obs @ weight + bias, 0)
        squashed = np.tanh(obs @ weights[-1][0] + weights[-1][1])
        return (np.clip(squashed + noise, -1, 1) * scale + middle).astype(np.float32)

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


def td_target(rewards, terminations, next_q, gamma):
    # diverges: no entropy
    """y of eq. (11), (M,); next_q: (2, M), terminations: 0 or 1.

    PITFALL: a time limit is no termination. There the value of the last observation counts.
    """
    return rewards + gamma * (1 - terminations) * next_q.amin(0)


def critic_loss(q, target):
    """Eq. (4); q: (2, M), target: (M,). Returns the loss and, detached, what to log."""
    errors = (q - target).square().mean(1)
    values = q.detach().mean(1)
    metrics = {"qf1_values": values[0], "qf2_values": values[1]}
    metrics |= {"qf_loss": 0.5 * errors.detach().sum()}  # CleanRL logs the mean of the two
    return errors.sum(), metrics


def actor_loss(q):
    # diverges: no entropy
    """Eq. (12); q: (1, M). Returns the loss and, detached, what to log."""
    loss = -q.mean()
    return loss, {"actor_loss": loss.detach()}


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


def take_snapshots(args, script):
    """Of the teacher: "obs" (S, O) and "states" to start in, "probabilities" (S,); what to log."""
    env = make_env(args.env_id)
    Agent(env.observation_space, env.action_space)  # refuses what it cannot learn, at once
    plan = args.teacher_episodes, args.seed + 20_000, args.snapshot_every  # unlike evaluations
    snapshots = teacher_episodes(args.teacher, env, Path(__file__).with_name(script), *plan)
    returns, values = snapshots.pop("returns"), snapshots.pop("values").numpy()  # eq. (14)
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
    p = 1 / (np.count_nonzero(sizes) * sizes[kmeans.labels_])  # eq. (15)
    return p, sizes[np.argsort(kmeans.cluster_centers_[:, 0])]


def begin_episode(env, obs, snapshots, args):
    """Of the first phase: go to a snapshot, if there are any, and set the time limit."""
    if snapshots:
        p = snapshots["probabilities"].numpy()
        # the environment's own generator: seeded with it, and a part of its saved state
        obs = restore(env, snapshots, env.np_random.choice(len(p), p=p))  # eq. (15)
    limit_steps(env, args.truncation)  # eq. (16)
    return obs


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
def evaluate(checkpoint, episodes, deterministic, video_dir=None, teach=()):
    # diverges: a deterministic actor with noise of its own
    """Returns (episodes,) with a saved agent, on the CPU; episode i starts from seed + 10_000 + i.

    deterministic: without exploration noise. video_dir: where to record the first episode.
    teach: (episodes, seed, interval, file), to write these and values Q_1 for S3RL instead.
    """
    # mmap leaves the buffer on disk
    saved = torch.load(checkpoint / "rank0.pt", map_location="cpu", weights_only=True, mmap=True)
    envs = make_episodes(saved["args"]["env_id"], episodes, video_dir)
    agent = Agent(envs[0].observation_space, envs[0].action_space)
    agent.load_state_dict(saved["agent"])
    seed = teach[1] if teach else saved["args"]["seed"] + 10_000
    act, generator = numpy_policy(agent), np.random.default_rng(seed)
    std = 0.0 if deterministic else saved["args"]["exploration_noise"]

    def decide(obs, *_):
        noise = std * generator.standard_normal((len(obs), len(agent.scale)))
        return act(obs, noise)[:, None]

    if teach:
        q = agent.critic
        return play_and_save(envs[0], decide, lambda *x: q(torch.hstack(x).float())[0], 1, *teach)
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
    # diverges: the target actor, smoothed, and no entropy
    """Gradient on this process's part of a batch, eqs. (11) and (4), and what to log."""
    with torch.no_grad():
        next_actions = agent.actions(agent.target_actor, batch["next_obs"])
        next_actions = smoothed_actions(next_actions, noise, agent.scale, agent.middle, args)
        next_q = agent.target(torch.cat([batch["next_obs"], next_actions], 1))
    q = agent.critic(batch["obs_action"])
    target = td_target(batch["rewards"], batch["terminations"], next_q, args.gamma)
    loss, metrics = critic_loss(q, target)
    return gradient_vector(loss, agent.critic), metrics


def actor_gradient(agent, obs, args):
    # diverges: a deterministic actor
    """Gradient on this process's part of a batch, and what to log."""
    actions = agent.actions(agent.actor, obs)
    q = agent.critic(torch.cat([obs, actions], 1), for_actor=True)
    loss, metrics = actor_loss(q)
    return gradient_vector(loss, agent.actor), metrics


def update(flat, optimizers, gradients, batch, noise, actor_due, args):
    # diverges: the targets move with the actor
    """One step of the critics; if actor_due, of actor and targets. Returns what to log, as tensors.

    noise: standard normal (M, A).
    """

    def descend(name, *inputs):
        grad, found = gradients[name](*inputs)
        flat[name].grad = mean_over_processes(grad)
        optimizers[name].step()
        metrics.update(found)

    metrics = {}
    descend("critic", batch, noise)
    if actor_due:
        descend("actor", batch["obs"])
        flat["target"].data.lerp_(flat["critic"].data, args.tau)  # eq. (13)
        flat["target_actor"].data.lerp_(flat["actor"].data, args.tau)
    return metrics


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    torch.set_num_threads(1)  # runs side by side share a machine better than threads share a batch
    if args.teach:
        return evaluate(args.teach[0], 1, deterministic=True, teach=args.teach[1:])
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or Path("runs") / f"{args.env_id}__{Path(__file__).stem}__{args.seed}"
    path = find_checkpoint(run_dir, args.resume)

    N, batch_size = args.num_envs // world_size, args.batch_size // world_size
    total = args.total_timesteps // args.num_envs * args.num_envs
    saved = load_checkpoint(path, args) if path else {}
    snapshots, facts = saved.get("snapshots"), {}
    first_phase = saved.get("global_step", 0) < args.snapshot_timesteps
    if first_phase and args.snapshots and path is None:
        snapshots, facts = take_snapshots(args, "td3_continuous_action.py")
    begin = partial(begin_episode, snapshots=snapshots, args=args) if first_phase else None
    envs = make_vector_env(args.env_id, N, begin=begin)
    seed_everything(args.seed)  # every process builds the same weights
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    low, high = envs.single_action_space.low.ravel(), envs.single_action_space.high.ravel()
    nets = "critic actor target target_actor".split()
    flat = {name: flatten_parameters(getattr(agent, name)) for name in nets}
    optimizers = {name: adam(flat[name], args.learning_rate) for name in ("critic", "actor")}
    gradients = {"critic": critic_gradient, "actor": actor_gradient}
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
    global_step = updates = log_size = 0
    evaluation_due = False
    if path:
        global_step, updates = saved["global_step"], saved["updates"]
        log_size, evaluation_due = saved["log_size"], saved["evaluation_due"]
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
        whole |= {"log_size": log.size(), "evaluation_due": evaluation_due}
        whole |= {"agent": agent.state_dict(), "buffer": buffer.state()}
        whole |= {"optimizers": {name: o.state_dict() for name, o in optimizers.items()}}
        whole |= {"state": {name: torch.from_numpy(array) for name, array in state.items()}}
        whole |= {"envs": vector_env_state(envs), "rng": rng_state(device), "snapshots": snapshots}
        return save_checkpoint(run_dir, global_step, whole)

    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()
    log.add(0, facts)
    path = path or checkpoint()  # a directory that cannot hold the run shows now, not in an hour
    recent = deque(maxlen=100)
    bar = tqdm(total=total, initial=global_step, unit="step", disable=rank > 0)
    while True:
        if global_step == total or evaluation_due:
            evaluate_and_log(path, global_step, log, args)
        if global_step == total:
            break
        started, start_step, start_updates = time.monotonic(), global_step, updates
        metrics, episodes = {}, []
        for _ in range(min(args.log_every, (total - global_step) // args.num_envs)):
            if global_step < args.learning_starts:
                actions = np.random.uniform(low, high, (N, len(low))).astype(np.float32)
            else:
                noise = args.exploration_noise * np.random.standard_normal((N, len(low)))
                actions = act(state["obs"], noise)
            ended = env_step(envs, actions, state, buffer)
            global_step += args.num_envs
            kind = "snapshot" if first_phase else "episodic"
            episodes += [(global_step, kind, *episode) for episode in ended]
            if first_phase and global_step >= args.snapshot_timesteps:
                # the second phase: ordinary environments; all that was learned and stored stays
                first_phase, snapshots, envs = False, None, make_vector_env(args.env_id, N)
                state["obs"] = envs.reset(seed=args.seed + rank * N)[0].astype(np.float32)
                state["episode_return"][:] = state["episode_length"][:] = 0
            due = updates + args.num_envs * (global_step > args.learning_starts)
            for number in range(updates, due):
                noise = torch.randn(batch_size, len(low)).to(device)
                actor_due = number % args.policy_frequency == 0
                metrics |= learn(buffer.sample(), noise, actor_due)
            if due > updates and device.type == "cuda":
                act = numpy_policy(agent)
            updates = due

        for step, kind, episodic_return, length in gather_lists(episodes):
            recent.append(episodic_return)
            episode = {f"charts/{kind}_return": episodic_return, f"charts/{kind}_length": length}
            log.add(step, episode)
        if metrics:  # there was an update
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
