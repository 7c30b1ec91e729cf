"""Rejection-sampling fine-tuning (RFT) of a language model on verifiable tasks, with FSDP.

Papers: Scaling Relationship on Learning Mathematical Reasoning with Large Language Models (RFT),
Yuan et al., 2023, arXiv 2308.01825; DeepSeekMath (online RFT), Shao et al., 2024,
arXiv 2402.03300, sections 5.2 and A.1.
Parent: algos/grpo_fsdp.py
Advantages, reference and KL penalty go: of G responses y_1 .. y_G to one prompt, with scores R_i,
those that are right are imitated, and nothing is learned from the others.

    K = {y_i : R_i >= success}   of the responses to a prompt, of equal ones the first           (1)
    L = - sum_{y in K} sum_t log pi(y_t) / sum_{y in K} |y|                                      (2)

The sums of eq. (2) are over the whole minibatch of all processes. Where responses come from is what
RFT and online RFT differ in, --source: the starting model or the current policy. "demonstrations"
takes those that the built-in model was trained on before, new ones, right or wrong, each as often
as it comes: more supervised fine-tuning, what both should beat. Log-probabilities of eq. (2) are
at temperature 1, as in all supervised fine-tuning: nothing corrects for the sampler here, so a
--temperature below 1 makes the model that is imitated sharper, as it did in the paper (0.7).

Run:  torchrun --standalone --nproc_per_node 2 algos/rft_fsdp.py
      python algos/rft_fsdp.py --source policy --no-distinct --run-dir runs/online_rft

Differs from the paper: a new rollout for each update, in which equal ones are looked for, in place
    of a data set made once; equal are responses of one text, not of one list of equations; the
    first stays, not the one most unlike the others. No human solutions beside the model's own, and
    training goes on from the model that sampled, not from the one before its fine-tuning; both so
    in DeepSeekMath, which has 1/|y| sum_t in eq. (2) and does not look for equal responses.
Differs from the authors' code: constant step size; their loss is a mean of micro-batch means.

Shapes: B responses of this process, P groups of G responses, T tokens of the longest response, L
columns of prompt and response, M rows of a micro-batch.
"""

import atexit
import copy
import errno
import hashlib
import importlib.metadata
import itertools
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python algos/rft_fsdp.py`

from rlhf import RewardError, UserError, check_numbers, report_user_error
from rlhf.batches import Response, micro_batches, response_batch, response_texts, split, stack
from rlhf.evaluate import group_metrics, report, summarize_passes
from rlhf.logprobs import check_head, completion_logprobs
from rlhf.lora import choose_trained, merged
from rlhf.processes import gather_lists, share
from rlhf.reward_model import load_reward_model, reward_function
from rlhf.sampler import generate
from rlhf.sft import load_causal_lm
from rlhf.tasks import (
    completion_ids,
    default_run_dir,
    load_prompts,
    pad_token_id,
    score_together,
    stop_token_ids,
)
from rlhf.tiny_lm import WarmStart, warm_start
from rlhf.verifiable import demonstrations, load_verifiable, next_level

# ARGS ============================================================================================


@dataclass
class Args:
    seed: int = 1
    """seed of weights, actions, shuffles and environments"""
    model: str | None = None
    """causal language model, a Hugging Face name or folder; the built-in tiny one if not given"""
    train: Literal["all", "blocks", "lora"] = "all"
    """weights to train: all, all but embedding and LM head, or adapters of low rank (needs peft)"""
    lora_rank: int = 16
    """rank of the adapters of every linear layer, with --train lora; their alpha is twice that"""
    task: str = "number_sorting"
    """generated task, see rlhf/verifiable.py, if there is no --data"""
    task_config: str = "{}"
    """JSON object of settings of reasoning-gym that replace those of the task's levels"""
    levels: tuple[int, int] = (2, 3)
    """lowest and highest difficulty of the task's prompts, both included"""
    curriculum: bool = False
    """start at the lowest level; up at a success rate over 20 updates of 0.7, down at 0.1"""
    few_shot: int = 0
    """solved examples in front of each prompt of a task, for models without a chat template"""
    data: str | None = None
    """prompts: .jsonl file, folder or Hugging Face data set, in place of a task"""
    data_split: str = "train"
    """split of the data set to train on"""
    eval_split: str = "test"
    """split of the data set to evaluate on"""
    prompt_field: str = "prompt"
    """field of a record that holds the prompt"""
    prompt_template: str | None = None
    """text with {field} placeholders that makes a prompt of a record"""
    reward: str | None = None
    """module:function (or file.py:function) that scores instead of a reward model"""
    reward_model: str | None = None
    """sequence classification model with one output, a Hugging Face name or folder"""
    reward_timeout: float = 60.0
    """seconds that one call of the reward function may take"""
    success_score: float = 1.0
    """a response with this score or more is right: for pass@k, success rates and lengths"""
    max_prompt_tokens: int = 512
    """longer prompts are left out"""
    response_length: int = 24
    """tokens of a response at most, T; the paper's code: 256"""
    stop: str | None = None
    """text of one token that ends a response as EOS does, for base models that never emit EOS"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; only for repositories that you have read"""
    source: Literal["start", "policy", "demonstrations"] = "start"
    """whose responses: the starting model's (RFT), the current policy's (online RFT), or noisy
    demonstrations of the built-in model's task, which are all imitated (more fine-tuning)"""
    distinct: bool = True
    """of equal responses to a prompt keep one, eq. (1); without effect on demonstrations"""
    total_episodes: int = 51_200
    """responses of the whole run, kept or not, all processes together"""
    batch_size: int = 256
    """responses of an update, kept or not, all processes together"""
    group_size: int = 8
    """responses to one prompt, G; the paper: 100"""
    num_minibatches: int = 1
    """minibatches of an epoch"""
    update_epochs: int = 1
    """passes over the kept responses of an update; the paper's code: 3 over all"""
    learning_rate: float = 1e-4
    """Adam step size, constant; the paper's code: 2e-5, falling"""
    warmup_updates: int = 0
    """updates in which the step size rises linearly; the paper's code: 3 % of them"""
    temperature: float = 1.0
    """temperature of sampling, not of the loss; the paper: 0.7"""
    max_grad_norm: float = 1.0
    """bound on the gradient norm"""
    bf16: bool = False
    """compute in bfloat16; master weights and optimizer stay float32"""
    cache_gb: float = 0.0
    """gigabytes for responses that are sampled at once; 0: 4, on a GPU a quarter of its memory"""
    micro_batch_tokens: int = 16_384
    """tokens, with padding, that one forward and backward holds on a process"""
    activation_checkpointing: bool = False
    """recompute the activations of each layer in the backward pass"""
    offload_frozen: bool = False
    """keep the reward model in host memory"""
    eval_prompts: int = 200
    """held-out prompts of an evaluation"""
    eval_samples: int = 16
    """responses to each of them, the largest k of pass@k"""
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
        counts = "batch_size num_minibatches update_epochs response_length lora_rank eval_prompts "
        check_numbers(self, counts + "eval_samples group_size", least=1)
        check_numbers(self, "learning_rate reward_timeout", above=0)
        check_numbers(self, "warmup_updates cache_gb", least=0)
        check_numbers(self, "temperature max_grad_norm", least=0.01)
        if not math.isfinite(self.success_score):
            raise UserError(f"--success-score {self.success_score}: want a finite number")
        parts = int(os.environ.get("WORLD_SIZE", 1)) * self.num_minibatches
        if self.batch_size % self.group_size or self.batch_size % parts:
            what = f"--group-size {self.group_size} and processes * minibatches ({parts})"
            raise UserError(f"--batch-size {self.batch_size}: want a multiple of {what}")
        if self.total_episodes < self.batch_size:
            raise UserError(f"--total-episodes {self.total_episodes} is not one update")
        judges = bool(self.reward) + bool(self.reward_model)
        if judges > 1 or (self.data and (judges == 0 or not self.model or self.curriculum)):
            raise UserError("--data needs --model, --reward or --reward-model, no --curriculum")
        if self.source == "demonstrations" and (self.model or self.data):
            raise UserError("--source demonstrations: not with --model or --data, it has none")
        if self.curriculum and self.levels[0] == self.levels[1]:
            raise UserError(f"--curriculum needs several --levels, not {self.levels}")


# NETWORKS ========================================================================================


class Policy(nn.Module):
    """A causal language model, wrapped as the root of FSDP."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, mb, temperature):
        """A micro-batch -> log-probs and entropies of its responses, (M, T), 0 outside of mask."""
        start = mb["prompt_lengths"][:, None]
        columns = torch.arange(mb["input_ids"].shape[1], device=start.device)
        positions = (columns >= start) & (columns < start + mb["mask"].sum(1, keepdim=True))
        outputs = completion_logprobs(self.model, mb["input_ids"], positions, temperature)
        t = torch.arange(mb["mask"].shape[1], device=start.device)
        places = (start + t).clamp(max=len(columns) - 1)
        return [output.gather(1, places) * mb["mask"] for output in outputs]


def shard(module: nn.Module, mesh, args: Args, frozen: bool = False) -> dict[str, torch.Tensor]:
    # diverges: no critic, and a policy may have frozen weights
    """Split a module over the processes, layer by layer; returns those it trains, by name.

    PITFALL: take the parameters from here. After a forward without backward the root's are
    gathered, and module.named_parameters() shows those copies.
    """
    module.eval()  # no dropout, or the first ratio would not be 1
    if frozen:
        module.requires_grad_(False)
    dtype = None if frozen else torch.float32
    precision = MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32)
    options = {"mesh": mesh, "mp_policy": precision}
    if frozen and args.offload_frozen:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    kinds = {k for part in module.modules() for k in getattr(part, "_no_split_modules", None) or ()}
    for parent in reversed(list(module.modules())):  # inner modules before outer ones
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ in kinds:
                if args.activation_checkpointing and not frozen:
                    layer = checkpoint_wrapper(layer)
                    setattr(parent, name, layer)
                if args.compile:
                    layer.compile(recompile_limit=128)  # sizes, models, passes vary
                fully_shard(layer.to(dtype), **options)  # goes to its device here, one by one
    fully_shard(module.to(dtype), **options)  # with embedding and head, so that tied ones stay tied
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in module.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


@torch.no_grad()
def update_replica(replica: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy trained weights into the whole model that samples; every process takes part."""
    for name, target in replica.named_parameters():
        if target.requires_grad:
            target.copy_(parameters[f"model.{name}"].full_tensor())


# LOSSES ==========================================================================================


def token_nll_loss(logprobs, entropy, mb, tokens):
    """Eq. (2) on a micro-batch; tensors (M, T). tokens: of the whole minibatch that count.

    Returns the loss, and the mean over tokens of the entropy to log.
    """
    sums = [(part * mb["mask"]).sum() for part in (-logprobs, entropy)]
    return torch.stack(sums) / tokens  # eq. (2)


# DATA ============================================================================================


def prompt_batch(records: list[dict], place: int, count: int, seed: int) -> list[dict]:
    # diverges: all processes know all prompts, as a group may lie on two of them
    """`count` records from `place` on in an endless series of shuffled epochs."""
    n, places = len(records), range(place, place + count)
    orders = {e: np.random.default_rng([seed, e]).permutation(n) for e in {p // n for p in places}}
    return [records[orders[p // n][p % n]] for p in places]


# ROLLOUT =========================================================================================


def respond(replica, tokenizer, records, seed, args) -> list[Response]:
    # diverges: not yet a batch, as all responses are gathered before it is chosen
    """Sample a response to each record."""
    completions = generate(
        replica,
        [record["ids"] for record in records],
        max_new_tokens=args.response_length,
        stop_ids=stop_token_ids(tokenizer, args.stop),
        pad_id=pad_token_id(tokenizer),
        temperature=args.temperature,
        cache_gb=args.cache_gb,
        generator=torch.Generator().manual_seed(seed),
    )
    return split(completions, response_texts(tokenizer, completions))


def demonstrate(task, tokenizer, records, seed, args) -> list[Response]:
    """Write a demonstration to each record, as careless as those of the warm start."""
    responses = []
    for text in demonstrations(task, records, seed, WarmStart().slips):
        tokens = completion_ids(tokenizer, text)
        shown, stopped = tokens[: args.response_length], len(tokens) <= args.response_length
        text = tokenizer.decode(shown, skip_special_tokens=True)
        responses.append(Response(shown, [0.0] * len(shown), stopped, text))
    return responses


def sample_groups(sampler, task, pool, place, seed, args) -> tuple[list, int, dict]:
    # diverges: no dynamic sampling; demonstrations in place of responses
    """Groups for an update, on all processes the same: lists of G (record, Response, score).

    Returns groups, the next place in the pool, seconds.
    """
    count = args.batch_size // args.group_size
    records = prompt_batch(pool, place, count, args.seed)
    records = [record for record in records for _ in range(args.group_size)]
    mine, place, started = share(records), place + count, time.monotonic()
    # 1. generate
    if args.source == "demonstrations":
        responses = demonstrate(task, sampler[1], mine, seed, args)
    else:
        responses = respond(*sampler, mine, seed, args)
    sampled_at = time.monotonic()
    # 2. score
    texts = [response.text for response in responses]
    scores = score_together(task.reward, mine, texts, args.reward_timeout)
    found = gather_lists(list(zip(responses, scores, strict=True)))
    seconds = {"generate": sampled_at - started, "score": time.monotonic() - sampled_at}
    rows = [(record, *pair) for record, pair in zip(records, found, strict=True)]
    groups = [rows[i : i + args.group_size] for i in range(0, len(rows), args.group_size)]
    return groups, place, seconds


def kept(group, args) -> list[bool]:
    """Which responses of a group are imitated."""
    if args.source == "demonstrations":
        return [True] * len(group)
    keep, seen = [], set()
    for _, response, score in group:
        keep.append(score >= args.success_score and response.text not in seen)  # eq. (1)
        if keep[-1] and args.distinct:
            seen.add(response.text)
    return keep


def group_batch(groups, args, device) -> tuple[dict[str, torch.Tensor], int]:
    # diverges: a part of the responses, and no advantages
    """This process's part of what is kept, as a batch (see rlhf/batches.py), and how much is kept.

    PITFALL: with FSDP all processes need as many rows in each minibatch, and at least one. Others
    fill them up, with empty masks.
    """
    keep = [which for group in groups for which in kept(group, args)]
    parts = dist.get_world_size() * args.num_minibatches
    size = max(sum(keep) + -sum(keep) % parts, parts)
    rows = [(which, *row) for which, row in zip(keep, itertools.chain(*groups), strict=True)]
    chosen = sorted(rows, key=lambda row: not row[0])[:size]  # sorted keeps their order
    counts, records, responses, _ = zip(*share(chosen), strict=True)
    prompts = [record["ids"] for record in records]
    batch = response_batch(prompts, stack(responses, device), args.response_length)
    batch["mask"] &= torch.tensor(counts, device=device)[:, None]
    return batch, sum(keep)


# EVALUATE ========================================================================================


def evaluate(actor, task, baseline, args) -> tuple[dict, dict]:
    # diverges: several responses to each prompt, for pass@k
    """Held-out prompts, same noise at every call: texts, and a summary against the first one's."""
    records = [record for record in task.test for _ in range(args.eval_samples)]
    # PITFALL: equal shares, as a forward of a sharded reward model needs all processes
    size = len(records) + -len(records) % dist.get_world_size()
    mine = share((records * dist.get_world_size())[:size])
    responses = respond(*actor, mine, args.seed + 10_000 + dist.get_rank(), args)
    texts = [response.text for response in responses]
    judges = [task.reward, task.lenient] if task.lenient else [task.reward]
    scores = [score_together(judge, mine, texts, args.reward_timeout) for judge in judges]
    rows = gather_lists(list(zip(responses, *scores, strict=True)))[: len(records)]
    responses, *scores = zip(*rows, strict=True)
    metrics = summarize_passes(responses, scores, args.eval_samples, args.success_score, baseline)
    texts = [response.text for response in responses[:: args.eval_samples]]
    return {"prompts": [record["prompt"] for record in task.test], "texts": texts}, metrics


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


def update(policy, optimizer, batch, args) -> dict[str, float]:
    # diverges: counts of tokens, and minibatches without any
    """Epochs of minibatch steps on the responses of this process. Returns what to log.

    PITFALL: a loss is a mean over the whole minibatch, on all processes and in all micro-batches
    (eq. (2)). FSDP averages gradients over processes, hence the factor world_size.
    """
    world_size, steps, trained = dist.get_world_size(), [], optimizer.param_groups[0]["params"]
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["mask"])).to(batch["mask"].device)
        for minibatch_rows in order.chunk(args.num_minibatches):
            minibatch = {name: tensor[minibatch_rows] for name, tensor in batch.items()}
            tokens = sum_over_processes(minibatch["mask"].sum())
            if tokens == 0:  # PITFALL: Adam moves weights without a gradient too, by its momentum
                continue
            total = torch.zeros(2, device=tokens.device)
            # Gradients go into the shards after each part: keeping them whole takes 28 GB for 7B.
            for mb, _ in micro_batches(minibatch, args.micro_batch_tokens):
                means = token_nll_loss(*policy(mb, 1.0), mb, tokens)
                (means[0] * world_size).backward()
                total += means.detach()
            norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm).full_tensor()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(torch.cat([sum_over_processes(total), norm[None]]))
    if not steps:
        return {"losses/steps": 0}
    means = zip(["loss", "entropy", "grad_norm"], torch.stack(steps).mean(0).tolist(), strict=True)
    return {"losses/steps": len(steps)} | {f"losses/{name}": mean for name, mean in means}


def main(args):
    torch.set_flush_denormal(True)  # Adam's moments decay to numbers that are slow to add
    name = args.model or warm_start(args.task, args.levels, args.task_config)
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or default_run_dir(args, __file__)
    path = find_checkpoint(run_dir, args.resume)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model, tokenizer = load_causal_lm(name, args.trust_remote_code, dtype)
    check_head(model)
    task = (load_prompts if args.data else load_verifiable)(tokenizer, args, model.config)
    mesh = init_device_mesh(device.type, (world_size,))
    sampler = (copy.deepcopy(model).to(device), tokenizer) if args.source == "start" else None
    choose_trained(model, args.train, args.lora_rank, args.seed)
    # Sampling reads all weights for every token, so each process samples from a whole copy.
    actor = (copy.deepcopy(model).to(device), tokenizer)
    sampler = sampler or actor  # the starting model, which stays as it is, or the policy
    policy = Policy(model)
    parameters = shard(policy, mesh, args)
    if args.reward_model:
        scorer = load_reward_model(args.reward_model, args.trust_remote_code, dtype)
        shard(scorer[0], mesh, args, frozen=True)
        task = replace(task, reward=reward_function(*scorer, device), lenient=None)
    optimizer = torch.optim.Adam(parameters.values(), lr=args.learning_rate, fused=True)
    tensors = sharded_tensors(parameters, optimizer)
    set_seed(args.seed + 100_003 * rank)
    iteration, place, generated, log_size = 0, 0, 0, 0
    level, recent, before, baseline = args.levels[0], [], None, None
    if path:
        saved = load_checkpoint(path, args)
        iteration, place, generated, level, recent = saved["progress"]
        log_size, before, baseline = (saved[k] for k in ("log_size", "before", "baseline"))
        for kind, part in tensors.items():
            dcp.load(part, storage_reader=dcp.HuggingFaceStorageReader(str(path / kind)))
        update_replica(actor[0], parameters)
        set_rng_state(saved["rng"], device)
    log, stop, last_save = RunLog(run_dir, args, log_size), catch_signals(), time.monotonic()

    def checkpoint():
        state = {"args": plain_args(args), "rng": rng_state(device), "log_size": log.size()}
        progress = [iteration, place, generated, level, recent]
        state |= {"progress": progress, "before": before, "baseline": baseline}
        return save_checkpoint(run_dir, iteration * args.batch_size, state, tensors)

    if path is None:
        before, baseline = evaluate(actor, task, None, args)
        log.add(0, baseline)
        path = checkpoint()  # a directory that cannot hold the run shows now, not in an hour
    num_updates = args.total_episodes // args.batch_size
    bar = tqdm(total=num_updates, initial=iteration, unit="update", disable=rank > 0)
    while True:
        due = args.eval_every > 0 and iteration % args.eval_every == 0
        if iteration == num_updates or (iteration > 0 and due):
            after, metrics = evaluate(actor, task, baseline, args)
            log.add(iteration * args.batch_size, metrics)
        if iteration == num_updates:
            break
        lr = args.learning_rate * min(1, (iteration + 1) / max(args.warmup_updates, 1))
        optimizer.param_groups[0]["lr"] = lr

        # 1. generate, 2. score
        pool = [r for r in task.train if not args.curriculum or r["level"] == level]
        seed = args.seed + 100_003 * rank + 1_000_003 * (iteration + 1)
        rng = rng_state(device)  # a reward may draw numbers, and draws them again after --resume
        try:
            groups, place, seconds = sample_groups(sampler, task, pool, place, seed, args)
        except RewardError as error:  # on all processes: keep what was learned before this update
            if int(path.name) < iteration * args.batch_size:
                set_rng_state(rng, device)
                path = checkpoint()
            raise UserError(f"{error}; --resume auto continues from {path}") from error
        started = time.monotonic()
        # 3. KL, 4. advantages: none, but a choice
        batch, count = group_batch(groups, args, device)
        # 5. update
        metrics = update(policy, optimizer, batch, args)
        update_replica(actor[0], parameters)
        seconds["update"] = time.monotonic() - started
        # 6. log
        iteration += 1
        metrics |= group_metrics(groups, args.success_score, seconds)
        metrics["charts/kept_responses"] = count
        generated += metrics["charts/sampled_tokens"] * (args.source != "demonstrations")
        metrics |= {"charts/generated_tokens": generated, "charts/learning_rate": lr}
        if args.curriculum:
            recent = [*recent, metrics["charts/success_rate"]]
            level, recent = next_level(level, recent, *args.levels)
            metrics["charts/level"] = level
        log.add(iteration * args.batch_size, metrics)
        shown = ("success_rate", "response_length", "tokens_per_second")
        bar.set_postfix({name: f"{metrics[f'charts/{name}']:.3g}" for name in shown})
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
        report(run_dir, merged(actor[0]), tokenizer, before, after, metrics)
        print(f"checkpoint: {path}")
    dist.barrier()  # nobody leaves while rank 0 still evaluates and writes


if __name__ == "__main__":
    sys.excepthook = report_user_error
    main(tyro.cli(Args))
