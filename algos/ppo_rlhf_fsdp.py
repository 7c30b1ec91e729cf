"""Proximal policy optimization (PPO) of a language model on a reward (RLHF), with FSDP.

Papers: The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization, Huang
et al., COLM 2024, arXiv 2403.17031 (D2); The N Implementation Details of RLHF with PPO, Huang et
al., Hugging Face blog, 2023 (D1); PPO itself is arXiv 1707.06347.

One update samples a response y of at most T tokens to each prompt x, scores it, and takes K epochs
of clipped steps on it. A token is an action, its reward is the KL penalty, the score comes last:

    delta_t = r_t + gamma V_{t+1} - V_t                                                         (1)
    A_t = delta_t + gamma lambda A_{t+1},   R_t = A_t + V_t                                     (2)
    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t = min(e + 1, T - 1)] score(x, y)       (3)
    A <- (A - mean A) / std A   over the tokens of all processes                                (4)
    L_pi = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)],   rho = pi(y_t) / pi_old(y_t)         (5)
    L_v = E[max((V - R)^2, (V_old + clip(V - V_old, -eps_v, eps_v) - R)^2)] / 2                 (6)
    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)   if there is a target      (7)

e is the place of the end-of-sequence token (EOS). The score is paid in the state after it, so that
the value of that state learns to predict it. All probabilities are those at the temperature of the
sampler, nothing has dropout, and a response without EOS gets a fixed low score.

Run:  torchrun --standalone --nproc_per_node 2 algos/ppo_rlhf_fsdp.py
      python algos/ppo_rlhf_fsdp.py --seed 2

Differs from the paper: none known.
Differs from the authors' code: sampling stops at EOS instead of at T tokens; advantages and rewards
    are whitened over all processes, not in each; losses are means over the tokens of the whole
    minibatch, not means of micro-batch means; weight decay is 0 (AdamW's default 0.01 was left on).

Shapes: B responses, T tokens of the longest, L columns with its prompt, M rows of a micro-batch.
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python algos/ppo_rlhf_fsdp.py`

from rlhf import RewardError, UserError, check_numbers, report_user_error
from rlhf.batches import micro_batches, response_batch, response_texts
from rlhf.evaluate import report, rollout_metrics, summarize
from rlhf.logprobs import check_head, completion_logprobs
from rlhf.processes import gather_lists
from rlhf.reward_model import load_reward_model, reward_function
from rlhf.sampler import generate
from rlhf.sft import load_causal_lm
from rlhf.tasks import (
    default_run_dir,
    load_prompts,
    pad_token_id,
    score,
    score_together,
    stop_token_ids,
)
from rlhf.tiny_lm import prepare

# ARGS ============================================================================================


@dataclass
class Args:
    seed: int = 1
    """seed of weights, actions, shuffles and environments"""
    model: str | None = None
    """causal language model, a Hugging Face name or folder; the built-in tiny one if not given"""
    reward_model: str | None = None
    """sequence classification model with one output, a Hugging Face name or folder"""
    reward: str | None = None
    """module:function (or file.py:function) that scores instead of a reward model"""
    data: str | None = None
    """prompts: .jsonl file, folder or Hugging Face data set; the built-in stories if not given"""
    data_split: str = "train"
    """split of the data set to train on"""
    eval_split: str = "test"
    """split of the data set to evaluate on"""
    prompt_field: str = "prompt"
    """field of a record that holds the prompt"""
    prompt_template: str | None = None
    """text with {field} placeholders that makes a prompt of a record"""
    max_prompt_tokens: int = 512
    """longer prompts are left out"""
    response_length: int = 24
    """tokens of a response at most, T; the paper's TL;DR: 53"""
    stop: str | None = None
    """text of one token that ends a response as EOS does, for base models that never emit EOS"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; only for repositories that you have read"""
    total_episodes: int = 6_400
    """responses of the whole run, all processes together; the paper's TL;DR: 1,000,000"""
    batch_size: int = 64
    """responses of an update, all processes together; the paper's TL;DR: 512"""
    num_minibatches: int = 1
    """minibatches of an epoch"""
    update_epochs: int = 4
    """passes over the responses of an update"""
    learning_rate: float = 3e-4
    """Adam step size at the start, lowered linearly to 0; the paper's TL;DR: 3e-6"""
    critic_learning_rate: float | None = None
    """the critic's own step size; the same as the policy's if not given, as in the paper"""
    kl_coef: float = 0.05
    """beta of eq. (3), at the start if it adapts"""
    kl_target: float | None = None
    """KL divergence per response that beta adapts to, eq. (7); D1: 6; fixed beta if not given"""
    kl_horizon: float = 10_000
    """responses over which beta adapts, eq. (7)"""
    missing_eos_score: float | None = -1.0
    """score of a response without EOS, in place of its own; None keeps its own"""
    temperature: float = 0.7
    """temperature of sampling and of all probabilities"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, eq. (2)"""
    clip_coef: float = 0.2
    """eps of eq. (5)"""
    vclip_coef: float = 0.2
    """eps_v of eq. (6)"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    whiten_rewards: bool = False
    """divide rewards by their standard deviation (D1: yes, D2: shorter and worse responses)"""
    max_grad_norm: float = math.inf
    """bound on the gradient norm of policy and critic each; the papers have none, libraries 1.0"""
    bf16: bool = False
    """compute in bfloat16; master weights and optimizer stay float32"""
    cache_gb: float = 0.0
    """gigabytes for responses that are sampled at once; 0: 4, on a GPU a quarter of its memory"""
    micro_batch_tokens: int = 16_384
    """tokens, with padding, that one forward and backward holds on a process"""
    activation_checkpointing: bool = False
    """recompute the activations of each layer in the backward pass"""
    offload_frozen: bool = False
    """keep reference and reward model in host memory"""
    eval_prompts: int = 128
    """held-out prompts of an evaluation"""
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
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""

    def __post_init__(self):
        counts = "batch_size num_minibatches update_epochs response_length eval_prompts kl_horizon"
        check_numbers(self, counts, least=1)
        check_numbers(self, "learning_rate clip_coef vclip_coef kl_target max_grad_norm", above=0)
        check_numbers(self, "critic_learning_rate kl_coef vf_coef cache_gb", least=0)
        check_numbers(self, "temperature", least=0.01)
        parts = int(os.environ.get("WORLD_SIZE", 1)) * self.num_minibatches
        if self.batch_size % parts:
            what = f"{parts}, processes times --num-minibatches"
            raise UserError(f"--batch-size {self.batch_size}: not a multiple of {what}")
        if self.total_episodes < self.batch_size:
            raise UserError(f"--total-episodes {self.total_episodes} is not one update")
        if self.reward and self.reward_model:
            raise UserError(f"--reward {self.reward} and --reward-model {self.reward_model}: one")
        if (self.model and not self.data) or (self.data and not (self.reward or self.reward_model)):
            raise UserError("--model needs --data, and --data needs --reward or --reward-model")


# NETWORKS ========================================================================================


class Critic(nn.Module):
    """A language model's trunk with a scalar head: the value of the state after each token.

    It starts as the reward model, with its scores normalized, where that one reads the policy's
    tokens (D2); else as the policy, with a head of zeros (D1).
    """

    def __init__(self, policy_model: nn.Module, scorer: nn.Module | None, same_tokens: bool):
        super().__init__()
        self.trunk = copy.deepcopy((scorer.model if same_tokens else policy_model).base_model)
        self.head = nn.Linear(self.trunk.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if same_tokens:
            self.head.load_state_dict(scorer.normalized_head())

    def forward(self, input_ids):
        """ids (M, L) -> values (M, L), float32."""
        hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.float() @ self.head.weight[0].float() + self.head.bias.float()


class ActorCritic(nn.Module):
    """A causal language model, and a critic that shares nothing with it but the root of FSDP."""

    def __init__(self, model: nn.Module, critic: Critic | None):
        super().__init__()
        self.model, self.critic = model, critic

    def forward(self, input_ids, positions, temperature):
        """Ids, and which of them to score -> log-probs, entropies and, with a critic, values."""
        outputs = completion_logprobs(self.model, input_ids, positions, temperature)
        return outputs if self.critic is None else (*outputs, self.critic(input_ids))


def shard(module: nn.Module, mesh, args: Args, frozen: bool = False) -> dict[str, torch.Tensor]:
    """Split a module over the processes, layer by layer; returns its parameters by name.

    PITFALL: take the parameters from here. After a forward without backward the root's are
    gathered, and module.named_parameters() shows those copies.
    """
    module.eval()  # no dropout, or the first ratio would not be 1
    module.requires_grad_(not frozen)
    dtype = None if frozen else torch.float32
    precision = MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32)
    options = {"mesh": mesh, "mp_policy": precision}
    if frozen and args.offload_frozen:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    kinds = {k for part in module.modules() for k in getattr(part, "_no_split_modules", None) or ()}
    for parent in reversed(list(module.modules())):  # inner modules before outer ones
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ in kinds | {"Critic"}:
                if args.activation_checkpointing and not (frozen or isinstance(layer, Critic)):
                    layer = checkpoint_wrapper(layer)
                    setattr(parent, name, layer)
                if args.compile and not isinstance(layer, Critic):
                    layer.compile(recompile_limit=128)  # sizes, models, passes vary
                fully_shard(layer.to(dtype), **options)  # goes to its device here, one by one
    fully_shard(module.to(dtype), **options)  # with embedding and head, so that tied ones stay tied
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in module.named_parameters()}


@torch.no_grad()
def update_replica(replica: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy trained weights into the whole model that samples; every process takes part."""
    for name, target in replica.named_parameters():
        if target.requires_grad:
            target.copy_(parameters[f"model.{name}"].full_tensor())


# LOSSES ==========================================================================================


def token_rewards(logprobs, ref_logprobs, scores, lengths, kl_coef):
    """Eq. (3): (B, T), (B, T), (B,), (B,) -> (B, T); both log-probs 0 behind the end."""
    rewards = -kl_coef * (logprobs - ref_logprobs)
    # PITFALL: one step after the EOS, where there is room; lengths count the EOS, so that is T_i.
    last = lengths.clamp(max=rewards.shape[1] - 1)
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def whiten(x, mask, shift_mean=True):
    """Unit variance and zero (or the old) mean over the mask, on all processes; 0 elsewhere."""
    y = x.double() * mask
    moments = torch.stack([mask.double().sum(), y.sum(), y.square().sum()])
    count, total, squares = sum_over_processes(moments)
    mean = total / count
    scale = ((squares / count - mean.square()).clamp(min=0) + 1e-8).rsqrt()
    return (((y - mean) * scale + (0 if shift_mean else mean)) * mask).float()


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


def token_ppo_loss(logprobs, entropy, values, mb, args):
    """Eqs. (5) and (6) on a micro-batch; tensors (M, T), 0 outside of the response.

    Returns sums, to be divided by the tokens of the whole minibatch: policy loss, entropy, KL to
    the old policy, clipped tokens (4,); and by its states, one more a response: value loss (1,).
    """
    mask, eps, eps_v = mb["mask"], args.clip_coef, args.vclip_coef
    logratio = (logprobs - mb["logprobs"]) * mask  # a part that does not count has no mask
    ratio = logratio.exp()
    gain = torch.min(mb["advantages"] * ratio, mb["advantages"] * ratio.clamp(1 - eps, 1 + eps))
    clipped = mb["values"] + (values - mb["values"]).clamp(-eps_v, eps_v)
    error = torch.max((values - mb["returns"]).square(), (clipped - mb["returns"]).square())
    parts = [-gain * mask, entropy, ratio - 1 - logratio, ((ratio - 1).abs() > eps) * mask]
    return torch.stack([part.sum() for part in parts]), 0.5 * (error * mb["value_mask"]).sum()[None]


def compute_advantages(batch, rewards, args) -> None:
    """Eqs. (1), (2) and (4): add advantages and returns (B, T) to a batch; rewards (B, T)."""
    values = batch["values"]
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # V_T = 0
    never = torch.zeros_like(batch["mask"])  # no boundary: behind its end a response is all 0
    columns = [x.T for x in (rewards, values, next_values, never, never)]
    advantages, returns = gae(*columns, args.gamma, args.gae_lambda)
    batch["returns"] = returns.T.contiguous()
    batch["advantages"] = whiten(advantages.T, batch["mask"])


def adapt_kl_coef(kl_coef, kl, kl_target, n, horizon):
    """Eq. (7)."""
    return kl_coef * (1 + min(max(kl / kl_target - 1, -0.2), 0.2) * n / horizon)


# DATA ============================================================================================


def prompt_batch(records: list[dict], update: int, args: Args) -> list[dict]:
    """This process's prompts of an update: shuffled epochs that follow from the seed alone."""
    n, first = len(records), update * args.batch_size
    places = range(first + dist.get_rank(), first + args.batch_size, dist.get_world_size())
    epochs = {place // n for place in places}
    orders = {e: np.random.default_rng([args.seed, e]).permutation(n) for e in epochs}
    return [records[orders[place // n][place % n]] for place in places]


# ROLLOUT =========================================================================================


def respond(replica, tokenizer, records, seed, args) -> tuple[dict, list[str]]:
    """Sample a response to each record. Returns a batch (see rlhf/batches.py) and the texts."""
    prompts = [record["ids"] for record in records]
    completions = generate(
        replica,
        prompts,
        max_new_tokens=args.response_length,
        stop_ids=stop_token_ids(tokenizer, args.stop),
        pad_id=pad_token_id(tokenizer),
        temperature=args.temperature,
        cache_gb=args.cache_gb,
        generator=torch.Generator().manual_seed(seed),
    )
    batch = response_batch(prompts, completions, args.response_length)
    return batch, response_texts(tokenizer, completions)


def response_tokens(module, mb, temperature):
    """Outputs of an ActorCritic, cut to the response: each (M, T), 0 outside of its mask."""
    start = mb["prompt_lengths"][:, None]
    columns = torch.arange(mb["input_ids"].shape[1], device=start.device)
    positions = (columns >= start) & (columns < start + mb["mask"].sum(1, keepdim=True))
    # PITFALL: the state before token t is what the model knows after token t - 1
    wanted = ((start, mb["mask"]), (start, mb["mask"]), (start - 1, mb["value_mask"]))
    outputs = module(mb["input_ids"], positions, temperature)
    t = torch.arange(mb["mask"].shape[1], device=start.device)
    return [
        output.gather(1, (first + t).clamp(max=len(columns) - 1)) * mask
        for output, (first, mask) in zip(outputs, wanted, strict=False)
    ]


@torch.no_grad()
def score_tokens(actor_critic, reference, batch, args) -> None:
    """Add logprobs, entropy, values and ref_logprobs (B, T) to a batch."""
    names = ("logprobs", "entropy", "values", "ref_logprobs")
    batch |= {name: torch.zeros_like(batch["sampled_logprobs"]) for name in names}
    for mb, rows in micro_batches(batch, args.micro_batch_tokens):
        outputs = response_tokens(actor_critic, mb, args.temperature)
        outputs += response_tokens(reference, mb, args.temperature)[:1]
        for name, output in zip(names, outputs, strict=True):
            batch[name][rows] = output[: len(rows)]
    actor_critic.reshard()
    reference.reshard()


# EVALUATE ========================================================================================


def evaluate(replica, models, task, tokenizer, baseline, args) -> tuple[dict, dict]:
    # diverges: a model that lies on all processes is evaluated where it is
    """Held-out prompts, with the same noise at every call. Returns lists over all, and a summary.

    models: actor_critic and reference. baseline: lists of the first call.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = max(1, len(task.test) // world_size)  # PITFALL: equal shares, as forwards need everyone
    records = [task.test[(rank * share + i) % len(task.test)] for i in range(share)]
    batch, texts = respond(replica, tokenizer, records, args.seed + 10_000 + rank, args)
    scores = score_together(task.reward, records, texts)
    score_tokens(*models, batch, args)
    columns = {"prompts": [record["prompt"] for record in records], "texts": texts}
    kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    columns |= {"rewards": scores, "kl": kl.tolist()}
    columns |= {"gold": score(task.gold, records, texts)} if task.gold else {}
    columns |= {name: batch[name].tolist() for name in ("lengths", "stopped")}
    columns = {name: gather_lists(column) for name, column in columns.items()}
    before = {f"baseline_{name}": (baseline or {}).get(name) for name in ("rewards", "gold")}
    now = {name: column for name, column in columns.items() if name not in ("prompts", "texts")}
    return columns, summarize(**now, **before)


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


def sharded_tensors(parameters, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and Adam's state (made here, as 0) by kind and name, for a checkpoint."""
    tensors = {"weight": {name: p.detach() for name, p in parameters.items()}}
    for name, p in parameters.items():
        state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] = torch.zeros(1, device=p.device)  # the file format has no scalars here
        optimizer.state[p] = state | {"step": state["step"].view(())}
        for kind, tensor in state.items():
            tensors.setdefault(kind, {})[name] = tensor
    return tensors


def save_checkpoint(run_dir, step, state, tensors):
    # diverges: every process also writes its shards, by torch.distributed.checkpoint
    """Write run_dir/checkpoints/STEP, keep the last two. It gets its name when it is complete.

    The shards are safetensors: the default format of torch.distributed.checkpoint needs pickle.
    """
    rank = dist.get_rank()
    path = run_dir / "checkpoints" / f"{step:012d}"
    unfinished = path.with_suffix(".partial")
    try:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        for kind, part in tensors.items():  # one by one: a file is put together in memory
            writer = dcp.HuggingFaceStorageWriter(str(unfinished / kind), save_distributed=True)
            dcp.save(part, storage_writer=writer)
        torch.save(state, unfinished / f"rank{rank}.pt")
        files = [unfinished / f"rank{rank}.pt", *unfinished.glob(f"*/shard-{rank + 1:05d}-*")]
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        digests = gather_lists([(str(f.relative_to(unfinished)), sha256(f)) for f in files])
        if rank == 0:
            (unfinished / "manifest.json").write_text(json.dumps(dict(digests), indent=1))
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            done = sorted(path.parent.glob("*[0-9]"))  # a newer one is damaged, or was given up
            for old in set(done) - set([other for other in done if other <= path][-2:]):
                shutil.rmtree(old)
            missing = 3 - len(list(path.parent.iterdir()))  # two are kept while one is written
            needed = missing * sum(file.stat().st_size for file in path.rglob("*"))
            if shutil.disk_usage(path).free < needed:
                raise OSError(f"the disk has less than the {needed / 1e6:.1f} MB that it will take")
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
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


def sum_over_processes(tensor):
    """In place; takes no time where there is one process."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def update(actor_critic, optimizer, batch, args) -> dict[str, float]:
    # diverges: micro-batches of sharded models
    """K epochs of minibatch steps on the responses of this process. Returns what to log.

    PITFALL: a loss is a mean over the tokens of the whole minibatch, on all processes and in all
    micro-batches. FSDP averages gradients over processes, hence the factor world_size.
    """
    world_size, steps = dist.get_world_size(), []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["mask"])).to(batch["mask"].device)
        for minibatch_rows in order.chunk(args.num_minibatches):
            minibatch = {name: tensor[minibatch_rows] for name, tensor in batch.items()}
            counts = torch.stack([minibatch["mask"].sum(), minibatch["value_mask"].sum()])
            tokens, states = sum_over_processes(counts)
            total = torch.zeros(5, device=tokens.device)
            # Gradients go into the shards after each part: keeping them whole takes 28 GB for 7B.
            for mb, _ in micro_batches(minibatch, args.micro_batch_tokens):
                outputs = response_tokens(actor_critic, mb, args.temperature)
                token_sums, state_sums = token_ppo_loss(*outputs, mb, args)
                means = torch.cat([token_sums / tokens, state_sums / states])
                ((means[0] + args.vf_coef * means[4]) * world_size).backward()
                total += means.detach()
            grad_norms = []
            for group in optimizer.param_groups:
                norm = nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                grad_norms.append(norm.full_tensor())
            optimizer.step()
            optimizer.zero_grad()
            steps.append(torch.cat([sum_over_processes(total), torch.stack(grad_norms)]))
    names = "policy_loss entropy approx_kl clipfrac value_loss grad_norm critic_grad_norm".split()
    means = torch.stack(steps).mean(0).tolist()
    return {f"losses/{name}": mean for name, mean in zip(names, means, strict=True)}


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    tiny = None if args.model else prepare(response_tokens=args.response_length)
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or default_run_dir(args, __file__)
    path = find_checkpoint(run_dir, args.resume)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model, tokenizer = load_causal_lm(args.model or tiny.policy, args.trust_remote_code, dtype)
    check_head(model)
    task = load_prompts(tokenizer, args, model.config)
    scorer = scorer_tokenizer = None
    if task.reward is None:
        name = args.reward_model or tiny.reward_model
        scorer, scorer_tokenizer = load_reward_model(name, args.trust_remote_code, dtype)
    mesh = init_device_mesh(device.type, (world_size,))
    reference = ActorCritic(copy.deepcopy(model), None)
    shard(reference, mesh, args, frozen=True)
    # Sampling reads all weights for every token, so each process samples from a whole copy.
    replica = copy.deepcopy(model).to(device)
    same_tokens = scorer is not None and scorer_tokenizer.get_vocab() == tokenizer.get_vocab()
    actor_critic = ActorCritic(model, Critic(model, scorer, same_tokens))
    parameters = shard(actor_critic, mesh, args)
    if scorer is not None:
        shard(scorer, mesh, args, frozen=True)
        task = replace(task, reward=reward_function(scorer, scorer_tokenizer, device))
    critic_lr = args.critic_learning_rate
    lrs = (args.learning_rate, args.learning_rate if critic_lr is None else critic_lr)
    groups = [{"params": [p for n, p in parameters.items() if n.startswith("model.")]}]
    groups += [{"params": [p for n, p in parameters.items() if n.startswith("critic.")]}]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    tensors = sharded_tensors(parameters, optimizer)
    models = (actor_critic, reference)
    set_seed(args.seed + 100_003 * rank)
    iteration, log_size, kl_coef, baseline = 0, 0, args.kl_coef, None
    if path:
        saved = load_checkpoint(path, args)
        iteration, log_size = saved["iteration"], saved["log_size"]
        kl_coef, baseline = saved["kl_coef"], saved["baseline"]
        for kind, part in tensors.items():
            dcp.load(part, storage_reader=dcp.HuggingFaceStorageReader(str(path / kind)))
        update_replica(replica, parameters)
        set_rng_state(saved["rng"], device)
    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()

    def checkpoint():
        state = {"args": plain_args(args), "iteration": iteration, "log_size": log.size()}
        state |= {"kl_coef": kl_coef, "baseline": baseline, "rng": rng_state(device)}
        return save_checkpoint(run_dir, iteration * args.batch_size, state, tensors)

    if path is None:
        baseline, metrics = evaluate(replica, models, task, tokenizer, None, args)
        log.add(0, metrics)
        path = checkpoint()  # a directory that cannot hold the run shows now, not in an hour
    num_updates = args.total_episodes // args.batch_size
    bar = tqdm(total=num_updates, initial=iteration, unit="update", disable=rank > 0)
    while True:
        due = args.eval_every > 0 and iteration % args.eval_every == 0
        if iteration == num_updates or (iteration > 0 and due):
            result, metrics = evaluate(replica, models, task, tokenizer, baseline, args)
            log.add(iteration * args.batch_size, metrics)
        if iteration == num_updates:
            break
        started = time.monotonic()
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * (1 - iteration / num_updates)

        # 1. generate
        records = prompt_batch(task.train, iteration, args)
        seed = args.seed + 100_003 * rank + 1_000_003 * (iteration + 1)
        batch, texts = respond(replica, tokenizer, records, seed, args)
        # 2. score
        rng = rng_state(device)  # a reward may draw numbers, and draws them again after --resume
        try:
            scores = torch.tensor(score_together(task.reward, records, texts), device=device)
        except RewardError as error:  # on all processes: keep what was learned before this update
            if int(path.name) < iteration * args.batch_size:
                set_rng_state(rng, device)
                path = checkpoint()
            raise UserError(f"{error}; --resume auto continues from {path}") from error
        if args.missing_eos_score is not None:
            scores = torch.where(batch["stopped"], scores, args.missing_eos_score)
        # 3. KL
        score_tokens(*models, batch, args)
        rewards = token_rewards(
            batch["logprobs"], batch["ref_logprobs"], scores, batch["lengths"], kl_coef
        )
        # 4. advantages
        metrics = rollout_metrics(batch, scores, rewards) | {"charts/kl_coef": kl_coef}
        if args.whiten_rewards:
            rewards = whiten(rewards, batch["value_mask"], shift_mean=False)
        compute_advantages(batch, rewards, args)
        # 5. update
        metrics |= update(actor_critic, optimizer, batch, args)
        update_replica(replica, parameters)
        if args.kl_target is not None:
            kl_coef = adapt_kl_coef(
                kl_coef, metrics["charts/kl"], args.kl_target, args.batch_size, args.kl_horizon
            )
        # 6. log
        iteration += 1
        if task.gold:
            metrics["charts/gold"] = np.mean(gather_lists(score(task.gold, records, texts)))
        tokens = metrics["charts/response_length"] * args.batch_size
        metrics["charts/tokens_per_second"] = tokens / (time.monotonic() - started)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        log.add(iteration * args.batch_size, metrics)
        shown = {"reward": "score", "KL": "kl", "tokens/s": "tokens_per_second"}
        bar.set_postfix({k: f"{metrics[f'charts/{name}']:.3g}" for k, name in shown.items()})
        bar.update()
        save = time.monotonic() - last_save >= args.save_every or iteration == num_updates
        save |= args.eval_every > 0 and iteration % args.eval_every == 0
        flags = torch.tensor([save, max(stop, default=0)], dtype=torch.int64, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)  # all processes must act alike
        save, signal_number = flags.tolist()
        if save or signal_number:
            path, last_save = checkpoint(), time.monotonic()
        if signal_number:
            tqdm.write(f"stopped by a signal; --resume auto continues from {path}")
            sys.exit(128 + signal_number)
    if rank == 0:
        report(run_dir, replica, tokenizer, baseline, result, metrics)
        print(f"checkpoint: {path}")
    dist.barrier()  # nobody leaves while rank 0 still evaluates and writes


if __name__ == "__main__":
    sys.excepthook = report_user_error
    main(tyro.cli(Args))
