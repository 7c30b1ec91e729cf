"""Proximal policy optimization (PPO) of a language model on a reward (RLHF), with FSDP.

Papers: The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization, Huang
et al., COLM 2024, arXiv 2403.17031 (D2); The N Implementation Details of RLHF with PPO, Huang et
al., Hugging Face blog, 2023 (D1); PPO itself is arXiv 1707.06347.

One update samples a response y of at most T tokens to each prompt x, scores it, and takes K epochs
of clipped steps on it. A token is an action, its reward is the KL penalty, the score comes last:

    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t = min(e + 1, T - 1)] score(x, y)       (1)
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   R = A + V    (2)
    A <- (A - mean A) / std A   over the tokens of all processes                                (3)
    L_pi = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)],   rho = pi(y_t) / pi_old(y_t)         (4)
    L_v = E[max((V - R)^2, (V_old + clip(V - V_old, -eps_v, eps_v) - R)^2)] / 2                 (5)
    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)   if there is a target      (6)

e is the place of the end-of-sequence token (EOS). The score is paid in the state after it, so that
the value of that state learns to predict it. All probabilities are those at the temperature of the
sampler, nothing has dropout, and a response without EOS gets a fixed low score.

Run:  torchrun --standalone --nproc_per_node 2 algos/ppo_rlhf_fsdp.py
      python algos/ppo_rlhf_fsdp.py --resume auto
      torchrun --standalone --nproc_per_node 8 algos/ppo_rlhf_fsdp.py --model M --reward-model R
          --data D --bf16 --activation-checkpointing --offload-frozen

Differs from the paper: none known.
Differs from the authors' code: sampling stops at EOS instead of at T tokens; advantages and rewards
    are whitened over all processes, not in each; losses are means over the tokens of the whole
    minibatch, not means of micro-batch means; weight decay is 0 (AdamW's default 0.01 was left on).

Shapes: B responses of this process, T tokens of the longest response, L columns of prompt and
response, M rows of a micro-batch.
"""

import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python algos/ppo_rlhf_fsdp.py`

from rlhf import UserError
from rlhf.evaluate import metrics_table, plot_training, samples_table, summarize
from rlhf.logprobs import check_head, completion_logprobs
from rlhf.reward_model import load_reward_model, score_texts
from rlhf.sampler import generate
from rlhf.sft import load_causal_lm
from rlhf.tasks import load_prompts, pad_token_id, score, stop_token_ids
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
    total_episodes: int = 9_600
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
    """beta of eq. (1), at the start if it adapts"""
    kl_target: float | None = None
    """KL divergence per response that beta adapts to, eq. (6); D1: 6; fixed beta if not given"""
    kl_horizon: float = 10_000
    """responses over which beta adapts, eq. (6)"""
    missing_eos_score: float | None = -1.0
    """score of a response without EOS, in place of its own; None keeps its own"""
    temperature: float = 0.7
    """temperature of sampling and of all probabilities"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, eq. (2)"""
    clip_coef: float = 0.2
    """eps of eq. (4)"""
    vclip_coef: float = 0.2
    """eps_v of eq. (5)"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    whiten_rewards: bool = False
    """divide rewards by their standard deviation (D1: yes, D2: shorter and worse responses)"""
    max_grad_norm: float | None = None
    """bound on the gradient norm of policy and critic each; the papers have none, libraries 1.0"""
    bf16: bool = False
    """compute in bfloat16; master weights and optimizer stay float32"""
    micro_batch_tokens: int = 16_384
    """tokens, with padding, that one forward and backward holds on a process"""
    activation_checkpointing: bool = False
    """recompute the activations of each layer in the backward pass"""
    offload_frozen: bool = False
    """keep reference and reward model in host memory"""
    rollout_slots: int | None = None
    """responses sampled side by side on a process; all of them if not given"""
    eval_prompts: int = 128
    """held-out prompts of an evaluation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is one"""
    run_dir: Path | None = None
    """where logs and checkpoints go; runs/ENV__SCRIPT__SEED if not given"""
    save_every: float = 600.0
    """seconds between checkpoints; 0 saves after every update"""
    resume: str | None = None
    """"auto" continues run_dir from its newest valid checkpoint; or the path of a checkpoint"""
    eval_every: int = 0
    """updates between evaluations; 0 evaluates at the end only"""
    track: Literal["wandb", "trackio"] | None = None
    """mirror the logs to this tracker, if it is installed"""

    def __post_init__(self):
        parts = int(os.environ.get("WORLD_SIZE", 1)) * self.num_minibatches
        if self.batch_size < 1 or self.batch_size % parts:
            raise UserError(
                f"--batch-size {self.batch_size}: not a multiple of {parts} "
                "(processes times --num-minibatches)"
            )
        if self.total_episodes < self.batch_size:
            raise UserError(
                f"--total-episodes {self.total_episodes}: less than one update "
                f"(--batch-size {self.batch_size})"
            )
        if self.reward and self.reward_model:
            raise UserError(f"--reward {self.reward} and --reward-model {self.reward_model}: one")
        if (self.model or self.data) and not (self.reward or self.reward_model):
            raise UserError("--model and --data need --reward or --reward-model")
        if self.model and not self.data:
            raise UserError(f"--model {self.model} needs --data, the prompts")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature}: must be above 0")


# NETWORKS ========================================================================================


class Policy(nn.Module):
    """A causal language model that returns log-probabilities and never the logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, positions, temperature):
        """ids (M, L), tokens to score (M, L) -> log-probabilities and entropies (M, L)."""
        return completion_logprobs(self.model, input_ids, positions, temperature)


class Critic(nn.Module):
    """A language model's trunk with a scalar head: the value of the state after each token.

    It starts as the reward model, with its scores normalized, where that one reads the policy's
    tokens (D2); else as the policy, with a head of zeros (D1).
    """

    def __init__(self, policy_model: nn.Module, scorer: nn.Module | None, same_tokens: bool):
        super().__init__()
        self.head = nn.Linear(policy_model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trunk = copy.deepcopy((scorer.model if same_tokens else policy_model).base_model)
        if same_tokens:
            mean = getattr(scorer.config, "score_mean", 0.0)
            std = getattr(scorer.config, "score_std", 1.0)
            source = scorer.model.score
            self.head = nn.Linear(source.in_features, 1)
            self.head.weight.data.copy_(source.weight / std)
            self.head.bias.data.fill_(-mean / std)
            if source.bias is not None:
                self.head.bias.data += source.bias.data / std

    def forward(self, input_ids):
        """ids (M, L) -> values (M, L), float32."""
        hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.float() @ self.head.weight[0].float() + self.head.bias.float()


class ActorCritic(nn.Module):
    """Policy and critic share nothing but the root of FSDP, so that one backward serves both."""

    def __init__(self, policy: Policy, critic: Critic):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, input_ids, positions, temperature):
        return *self.policy(input_ids, positions, temperature), self.critic(input_ids)


def shard(module: nn.Module, mesh, args: Args, frozen: bool = False) -> dict[str, torch.Tensor]:
    """Split a module over the processes, layer by layer; returns its parameters by name.

    PITFALL: take the parameters from here. After a forward without backward the root's are
    gathered, and module.named_parameters() shows those copies.
    """
    module.eval()  # no dropout, or the first ratio would not be 1
    module.requires_grad_(not frozen)
    module.to(mesh.device_type)
    compute_dtype = torch.bfloat16 if args.bf16 else None
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(compute_dtype, torch.float32)}
    if frozen and args.offload_frozen:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    kinds = [getattr(part, "_no_split_modules", None) or () for part in module.modules()]
    kinds = {kind for part in kinds for kind in part}
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ in kinds:
                if args.activation_checkpointing and not frozen:
                    layer = checkpoint_wrapper(layer)
                    setattr(parent, name, layer)
                fully_shard(layer, **options)
    fully_shard(module, **options)  # with embedding and head, so that tied ones stay tied
    named = module.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in named}


@torch.no_grad()
def update_replica(replica: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Copy the policy's weights into the whole model that samples; every process takes part."""
    for name, target in replica.named_parameters():
        target.copy_(parameters[f"policy.model.{name}"].full_tensor())


# LOSSES ==========================================================================================


def token_rewards(logprobs, ref_logprobs, scores, lengths, kl_coef):
    """Eq. (1): (B, T), (B, T), (B,), (B,) -> (B, T); both log-probs 0 behind the end."""
    rewards = -kl_coef * (logprobs - ref_logprobs)
    # PITFALL: one step after the EOS, where there is room; lengths count the EOS, so that is T_i.
    last = lengths.clamp(max=rewards.shape[1] - 1)
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def whiten(x, mask, shift_mean=True):
    """Unit variance over the masked entries of all processes, and zero mean; 0 elsewhere."""
    y = x.double() * mask
    moments = torch.stack([mask.double().sum(), y.sum(), y.square().sum()])
    count, total, squares = sum_over_processes(moments)
    mean = total / count
    scale = ((squares / count - mean.square()).clamp(min=0) + 1e-8).rsqrt()
    return ((y - mean * shift_mean) * scale * mask).float()


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


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_coef):
    """Eq. (4); tensors (M, T). Returns sums over the masked tokens: loss, KL and clipped ones."""
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -(torch.min(advantages * ratio, advantages * clipped) * mask).sum()
    outside = ((ratio - 1).abs() > clip_coef) * mask
    return loss, (ratio - 1 - logratio).detach().sum(), outside.sum()


def value_loss(values, old_values, returns, mask, clip_coef):
    """Eq. (5), summed over the masked tokens; tensors (M, T)."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * mask).sum()


def compute_advantages(batch, rewards, args) -> None:
    """Eqs. (2) and (3): add advantages and returns (B, T) to a batch; rewards (B, T)."""
    values = batch["values"]
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # V_T = 0
    never = torch.zeros_like(
        batch["mask"]
    )  # behind its end a response has neither reward nor value
    columns = [x.T for x in (rewards, values, next_values, never, never)]
    advantages, returns = gae(*columns, args.gamma, args.gae_lambda)
    batch["returns"] = returns.T.contiguous()
    batch["advantages"] = whiten(advantages.T, batch["mask"])


def adapt_kl_coef(kl_coef, kl, kl_target, n, horizon):
    """Eq. (6)."""
    return kl_coef * (1 + min(max(kl / kl_target - 1, -0.2), 0.2) * n / horizon)


# DATA ============================================================================================


def prompt_batch(records: list[dict], update: int, args: Args) -> list[dict]:
    """The prompts of an update on this process: a slice of an endless series of shuffled epochs.

    It follows from seed and update alone, so a resumed run goes on where it was.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    places = range(update * args.batch_size + rank, (update + 1) * args.batch_size, world_size)
    orders = {}
    for epoch in {place // len(records) for place in places}:
        orders[epoch] = np.random.default_rng([args.seed, epoch]).permutation(len(records))
    return [records[orders[place // len(records)][place % len(records)]] for place in places]


def micro_batches(lengths: torch.Tensor, budget: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """Rows of about equal length that fit a token budget: pairs (rows, whether they count).

    PITFALL: every process must run equally many forwards, or the others wait for ever in FSDP's
    gathers; a process that has fewer repeats a row that does not count.
    """
    groups, group = [], []
    for row in lengths.argsort(stable=True).tolist():
        if group and (len(group) + 1) * lengths[row] > budget:
            groups.append(group)
            group = []
        group.append(row)
    groups.append(group)
    (most,) = agree([len(groups)], lengths.device)
    for i in range(most):
        rows = groups[i] if i < len(groups) else groups[0][:1]
        yield torch.tensor(rows, device=lengths.device), i < len(groups)


def select(batch: dict, rows: torch.Tensor, counts: bool = True) -> dict:
    """Rows of a batch, cut to their longest sequence; with empty masks where they do not count."""
    mb = {name: tensor[rows] for name, tensor in batch.items()}
    mb["input_ids"] = mb["input_ids"][:, : int((mb["prompt_lengths"] + mb["lengths"]).max())]
    if not counts:
        mb["mask"], mb["value_mask"] = mb["mask"] & False, mb["value_mask"] & False
    return mb


# ROLLOUT =========================================================================================


def respond(replica, tokenizer, records, seed, args) -> tuple[dict, list[str]]:
    """Sample a response to each record. Returns a batch of tensors, rows (B, ...), and the texts.

    input_ids (B, L): prompt, response, padding; prompt_lengths, lengths (B,), the latter with the
    EOS; mask (B, T): the tokens of a response; value_mask (B, T): these and the state after the
    EOS; stopped (B,); sampled_logprobs (B, T).
    """
    device = next(replica.parameters()).device
    T, B = args.response_length, len(records)
    completions = generate(
        replica,
        [record["ids"] for record in records],
        max_new_tokens=T,
        stop_ids=stop_token_ids(tokenizer, args.stop),
        pad_id=pad_token_id(tokenizer),
        temperature=args.temperature,
        slots=args.rollout_slots,
        generator=torch.Generator(device).manual_seed(seed),
    )
    prompt_lengths = torch.tensor([len(record["ids"]) for record in records], device=device)
    rows, texts = [], []
    lengths, stopped = completions.lengths.tolist(), completions.stopped.tolist()
    for i, tokens in enumerate(completions.tokens.tolist()):
        rows.append(torch.tensor(records[i]["ids"] + tokens[: lengths[i]]))
        words = tokens[: lengths[i] - stopped[i]]  # without the token that ended it
        texts.append(tokenizer.decode(words, skip_special_tokens=True))
    t = torch.arange(T, device=device)
    sampled = torch.zeros(B, T, device=device)
    sampled[:, : completions.logprobs.shape[1]] = completions.logprobs
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
        "prompt_lengths": prompt_lengths,
        "lengths": completions.lengths,
        "mask": t < completions.lengths[:, None],
        "value_mask": t < completions.lengths[:, None] + 1,
        "stopped": completions.stopped,
        "sampled_logprobs": sampled,
    }
    return batch, texts


def score_responses(records, texts, task, scorer, scorer_tokenizer, device) -> list[float]:
    """Scores of responses by the task's reward function or the reward model."""
    if task.reward is None:
        prompts = [record["prompt"] for record in records]
        scores = score_texts(scorer, scorer_tokenizer, prompts, texts, device=device)
        scorer.reshard()
        return scores.tolist()
    try:
        scores, errors = score(task.reward, records, texts), []
    except UserError as error:
        scores, errors = [], [str(error)]
    errors = gather_lists(errors)  # all processes end, with the message of the first
    if errors:
        raise UserError(errors[0])
    return scores


def response_tokens(module, mb, temperature):
    """Outputs of Policy or ActorCritic, cut to the response: each (M, T), 0 outside of its mask."""
    columns = torch.arange(mb["input_ids"].shape[1], device=mb["mask"].device)
    start = mb["prompt_lengths"][:, None]
    positions = (columns >= start) & (columns < start + mb["mask"].sum(1, keepdim=True))
    # PITFALL: the state before token t is what the model knows after token t - 1
    starts = (start, start, start - 1)
    masks = (mb["mask"], mb["mask"], mb["value_mask"])
    outputs = []
    for x, first, mask in zip(module(mb["input_ids"], positions, temperature), starts, masks, strict=False):
        places = first + torch.arange(mask.shape[1], device=mask.device)
        outputs.append(x.gather(1, places.clamp(max=x.shape[1] - 1)) * mask)
    return outputs


@torch.no_grad()
def score_tokens(actor_critic, reference, batch, args) -> None:
    """Add logprobs, entropy, values and ref_logprobs (B, T) to a batch."""
    names = ("logprobs", "entropy", "values", "ref_logprobs")
    batch |= {name: torch.zeros_like(batch["sampled_logprobs"]) for name in names}
    lengths = batch["prompt_lengths"] + batch["lengths"]
    for rows, counts in micro_batches(lengths, args.micro_batch_tokens):
        mb = select(batch, rows, counts)
        outputs = response_tokens(actor_critic, mb, args.temperature)
        outputs += response_tokens(reference, mb, args.temperature)[:1]
        for name, output in zip(names, outputs, strict=True):
            if counts:
                batch[name][rows] = output
    actor_critic.reshard()
    reference.reshard()


def rollout_metrics(batch, scores, rewards, kl_coef) -> dict[str, float]:
    """Means over the responses of all processes."""
    kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    lengths = batch["lengths"].float()
    mismatch = (batch["logprobs"] - batch["sampled_logprobs"]).abs().sum(1)
    columns = {
        "score": scores,
        "episodic_return": rewards.sum(1),  # score minus beta KL
        "kl": kl,
        "entropy": batch["entropy"].sum(1) / lengths,
        "response_length": lengths,
        "eos_rate": batch["stopped"].float(),
        "sampler_mismatch": mismatch / lengths,
    }
    sums = torch.stack([torch.ones_like(scores), *columns.values()], dim=1).sum(0)
    count, *sums = sum_over_processes(sums).tolist()
    means = {f"charts/{name}": total / count for name, total in zip(columns, sums, strict=True)}
    return means | {"charts/kl_coef": kl_coef}


# EVALUATE ========================================================================================


def evaluate(replica, models, task, tokenizer, baseline, args) -> tuple[list[dict], dict]:
    """Held-out prompts, with the same noise at every call; every process has a share of them.

    models: actor_critic, reference, scorer and its tokenizer. baseline: the responses of the call
    before training, for the win rate. Returns the responses of all processes and their summary.
    """
    actor_critic, reference, scorer, scorer_tokenizer = models
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = max(1, len(task.test) // world_size)  # PITFALL: equal shares, as forwards need everyone
    records = [task.test[(rank * share + i) % len(task.test)] for i in range(share)]
    batch, texts = respond(replica, tokenizer, records, args.seed + 10_000 + rank, args)
    scores = score_responses(records, texts, task, scorer, scorer_tokenizer, replica.device)
    score_tokens(actor_critic, reference, batch, args)
    columns = {"prompts": [record["prompt"] for record in records], "texts": texts}
    columns |= {
        "rewards": scores,
        "kl": (batch["logprobs"] - batch["ref_logprobs"]).sum(1).tolist(),
    }
    columns |= {"gold": score(task.gold, records, texts)} if task.gold else {}
    columns |= {name: batch[name].tolist() for name in ("lengths", "stopped")}
    columns = {name: gather_lists(column) for name, column in columns.items()}
    judged = {name: column for name, column in columns.items() if name not in ("prompts", "texts")}
    for name in ("rewards", "gold"):
        judged[f"baseline_{name}"] = baseline.get(name) if baseline else None
    return columns, summarize(**judged)


def finish(run_dir, path, replica, tokenizer, before, after, metrics) -> None:
    """Print and save what came out: samples, the policy as an ordinary folder, the picture."""
    columns = {"before": before["texts"], "after": after["texts"]}
    print(samples_table(after["prompts"], columns, limit=3))
    print(metrics_table(metrics))
    unfinished = run_dir / "policy.partial"
    replica.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(run_dir / "policy", ignore_errors=True)
    unfinished.rename(run_dir / "policy")
    print(f"policy: {run_dir / 'policy'}\ncheckpoint: {path}\npicture: {plot_training(run_dir)}")


# CHECKPOINT ======================================================================================


def rng_state(device):
    """State of every random generator of this process, in types that torch.load takes."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state, device):
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def plain_args(args):
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sharded_tensors(parameters, optimizer) -> dict[str, torch.Tensor]:
    """Weights and Adam moments (made here, as 0) by name, for torch.distributed.checkpoint."""
    tensors = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = state | {"step": torch.zeros((), device=p.device)}
        tensors |= {f"{kind}.{name}": moment for kind, moment in state.items()}
        # the file format has no scalars here: a view of one element stands for the step count
        tensors[f"step.{name}"] = optimizer.state[p]["step"].view(1)
    return tensors


def save_checkpoint(run_dir, step, state, tensors):
    # diverges: every process also writes its shards, by torch.distributed.checkpoint
    """Write run_dir/checkpoints/STEP; keep the last two. Returns it.

    state goes into a file for each process, the sharded tensors into safetensors files: unlike
    the default format these need no pickle. The folder gets its name when it is complete: whatever
    dies half-way, older checkpoints stay whole.
    """
    rank = dist.get_rank()
    path = run_dir / "checkpoints" / f"{step:012d}"
    unfinished = path.with_suffix(".partial")
    try:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        torch.save(state, unfinished / f"rank{rank}.pt")
        files = [unfinished / f"rank{rank}.pt", *unfinished.glob(f"shard-{rank + 1:05d}-*")]
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        digests = gather_lists([(file.name, sha256(file)) for file in files])
        if rank == 0:
            (unfinished / "manifest.json").write_text(json.dumps(dict(digests), indent=1))
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            for old in sorted(path.parent.glob("*[0-9]"))[:-2]:
                shutil.rmtree(old)
            size = sum(file.stat().st_size for file in path.iterdir())
            if shutil.disk_usage(path).free < 3 * size:
                raise OSError(f"less than {3 * size / 1e6:.1f} MB free")
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        raise UserError(f"--run-dir: cannot write {path}: {error}") from error
    dist.barrier()
    return path


def find_checkpoint(run_dir, resume):
    """The checkpoint to continue from, for "auto" the newest valid one; None: start anew.

    Raises UserError where a new run would overwrite another one, and where the checkpoint named
    is damaged or belongs to another number of processes.
    """
    if resume is None and (run_dir / "args.json").exists():
        raise UserError(f"{run_dir} holds a run: --resume auto continues it; or give a --run-dir")
    paths = sorted((run_dir / "checkpoints").glob("*[0-9]"), reverse=True)
    for path in paths if resume == "auto" else [Path(resume)] if resume else []:
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            damage = [name for name, digest in manifest.items() if sha256(path / name) != digest]
        except (OSError, ValueError) as error:
            damage = [error]
        if not damage and len(manifest) != dist.get_world_size():
            raise UserError(f"{path} was written by {len(manifest)} processes: start as many")
        if not damage:
            return path
        if resume != "auto":
            raise UserError(f"--resume {path}: damaged ({damage[0]})")
        print(f"checkpoint {path} is damaged ({damage[0]}), trying the one before", file=sys.stderr)
    return None


def load_checkpoint(path, args):
    """What this process saved. Raises UserError where it ran with other arguments."""
    state = torch.load(path / f"rank{dist.get_rank()}.pt", map_location="cpu", weights_only=True)
    free = "device run_dir save_every resume eval_every eval_episodes capture_video track".split()
    for name, value in plain_args(args).items():
        if name not in free and value != state["args"][name]:
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
        record = {"args": plain_args(args), "argv": sys.argv, "python": sys.version}
        record["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        record["packages"] = {d.name: d.version for d in importlib.metadata.distributions()}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "args.json").write_text(json.dumps(record, indent=1))
            self.file = (run_dir / "metrics.csv").open("a")
        except OSError as error:
            raise UserError(f"--run-dir {run_dir}: {error.strerror}; choose another") from error
        self.file.truncate(size)
        if size == 0:
            self.file.write("step,key,value\n")
        self.board = SummaryWriter(str(run_dir))
        self.tracker = importlib.import_module(args.track) if args.track else None
        if self.tracker:
            self.tracker.init(project="folio", name=run_dir.name, config=plain_args(args))

    def add(self, step, metrics):
        if self.active:
            for key, value in metrics.items():
                self.file.write(f"{step},{key},{value:.8g}\n")
                self.board.add_scalar(key, value, step)
            if self.tracker:
                self.tracker.log(metrics, step=step)

    def size(self):
        """Bytes of metrics.csv so far, all of them on disk."""
        if not self.active:
            return 0
        self.file.flush()
        return self.file.tell()


class StopSignal:
    """Remembers SIGINT and SIGTERM for the end of the update; a second one ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def report_user_error(kind, error, traceback):
    """sys.excepthook: a UserError is one line, everything else keeps its traceback."""
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# TRAIN ===========================================================================================


def setup_process(device):
    """Join torchrun's process group, or form a group of one. Returns rank, size and device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA here; use --device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0}
    dist.init_process_group("nccl" if cuda else "gloo", world_size=1 if alone else -1, **alone)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
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


def agree(flags, device):
    """The largest value of each flag over all processes, so that all of them act alike."""
    flags = torch.tensor(flags, dtype=torch.int64, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


def update(actor_critic, optimizer, batch, args) -> dict[str, float]:
    """K epochs of minibatch steps on the responses of this process. Returns what to log.

    PITFALL: a loss is a mean over the tokens of the whole minibatch, on all processes and in all
    micro-batches. FSDP averages gradients over processes, hence the factor world_size.
    """
    world_size, steps = dist.get_world_size(), []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["mask"]), device=batch["mask"].device)
        for minibatch_rows in order.chunk(args.num_minibatches):
            minibatch = select(batch, minibatch_rows)
            counts = torch.stack([minibatch["mask"].sum(), minibatch["value_mask"].sum()])
            tokens, states = sum_over_processes(counts)
            lengths = minibatch["prompt_lengths"] + minibatch["lengths"]
            groups = list(micro_batches(lengths, args.micro_batch_tokens))
            total = torch.zeros(5, device=batch["mask"].device)
            for i, (rows, counted) in enumerate(groups):
                mb = select(minibatch, rows, counted)
                actor_critic.set_requires_gradient_sync(i == len(groups) - 1)
                logprobs, entropy, values = response_tokens(actor_critic, mb, args.temperature)
                pg_loss, approx_kl, clipfrac = policy_loss(
                    logprobs, mb["logprobs"], mb["advantages"], mb["mask"], args.clip_coef
                )
                v_loss = value_loss(
                    values, mb["values"], mb["returns"], mb["value_mask"], args.vclip_coef
                )
                pg_loss, v_loss = pg_loss / tokens, v_loss / states
                ((pg_loss + args.vf_coef * v_loss) * world_size).backward()
                rest = [x / tokens for x in (entropy.detach().sum(), approx_kl, clipfrac)]
                total += torch.stack([pg_loss.detach(), v_loss.detach(), *rest])
            grad_norms = []
            for module in (actor_critic.policy, actor_critic.critic):
                grads = [p.grad for p in module.parameters()]
                grad_norms.append(nn.utils.get_total_norm(grads).full_tensor())
                if args.max_grad_norm is not None:
                    scale = (args.max_grad_norm / (grad_norms[-1] + 1e-6)).clamp(max=1.0)
                    torch._foreach_mul_([grad.to_local() for grad in grads], scale)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(torch.cat([sum_over_processes(total), torch.stack(grad_norms)]))
    names = "policy_loss value_loss entropy approx_kl clipfrac grad_norm critic_grad_norm".split()
    means = torch.stack(steps).mean(0).tolist()
    return {f"losses/{name}": mean for name, mean in zip(names, means, strict=True)}


def main(args):
    rank, world_size, device = setup_process(args.device)
    run_dir = args.run_dir or Path("runs") / f"{Path(__file__).stem}__{args.seed}"
    path = find_checkpoint(run_dir, args.resume)
    seed_everything(args.seed)

    # The built-in world: a tiny model, stories, and a reward model of what readers prefer.
    tiny = None if args.model else prepare(response_tokens=args.response_length)
    model, tokenizer = load_causal_lm(args.model or tiny.policy, args.trust_remote_code)
    check_head(model)
    task = load_prompts(tokenizer, args)
    scorer = scorer_tokenizer = None
    if task.reward is None:
        scorer, scorer_tokenizer = load_reward_model(
            args.reward_model or tiny.reward_model, trust_remote_code=args.trust_remote_code
        )
    same_tokens = scorer is not None and scorer_tokenizer.get_vocab() == tokenizer.get_vocab()
    actor_critic = ActorCritic(Policy(model), Critic(model, scorer, same_tokens))
    reference = Policy(copy.deepcopy(model))
    # Sampling reads all weights for every token, so each process samples from a whole copy.
    replica = copy.deepcopy(model).to(device, torch.bfloat16 if args.bf16 else torch.float32)
    mesh = init_device_mesh(device.type, (world_size,))
    parameters = shard(actor_critic, mesh, args)
    for frozen in (reference, scorer):
        if frozen is not None:
            shard(frozen, mesh, args, frozen=True)
    lrs = {"policy": args.learning_rate}
    lrs["critic"] = args.critic_learning_rate or args.learning_rate
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith(part)], "lr": lr}
        for part, lr in lrs.items()
    ]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    tensors = sharded_tensors(parameters, optimizer)
    models = (actor_critic, reference, scorer, scorer_tokenizer)

    seed_everything(args.seed + 100_003 * rank)
    iteration, log_size, kl_coef, baseline = 0, 0, args.kl_coef, None
    if path:
        saved = load_checkpoint(path, args)
        iteration, log_size = saved["iteration"], saved["log_size"]
        kl_coef, baseline = saved["kl_coef"], saved["baseline"]
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        update_replica(replica, parameters)
        set_rng_state(saved["rng"], device)
    log, stop, last_save = RunLog(run_dir, args, log_size), StopSignal(), time.monotonic()

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
        evaluation_due = args.eval_every > 0 and iteration % args.eval_every == 0
        if iteration == num_updates or (iteration > 0 and evaluation_due):
            result, metrics = evaluate(replica, models, task, tokenizer, baseline, args)
            log.add(iteration * args.batch_size, metrics)
        if iteration == num_updates:
            break
        started = time.monotonic()
        for group, lr in zip(optimizer.param_groups, lrs.values(), strict=True):
            group["lr"] = lr * (1 - iteration / num_updates)

        # 1. generate
        records = prompt_batch(task.train, iteration, args)
        seed = args.seed + 100_003 * rank + 1_000_003 * (iteration + 1)
        batch, texts = respond(replica, tokenizer, records, seed, args)
        # 2. score
        scores = score_responses(records, texts, task, scorer, scorer_tokenizer, device)
        scores = torch.tensor(scores, device=device)
        if args.missing_eos_score is not None:
            scores = torch.where(batch["stopped"], scores, args.missing_eos_score)
        # 3. KL
        score_tokens(actor_critic, reference, batch, args)
        rewards = token_rewards(
            batch["logprobs"], batch["ref_logprobs"], scores, batch["lengths"], kl_coef
        )
        # 4. advantages
        metrics = rollout_metrics(batch, scores, rewards, kl_coef)
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
            gold = gather_lists(score(task.gold, records, texts))
            metrics["charts/gold"] = sum(gold) / len(gold)
        tokens = metrics["charts/response_length"] * args.batch_size
        metrics["charts/tokens_per_second"] = tokens / (time.monotonic() - started)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        log.add(iteration * args.batch_size, metrics)
        shown = {
            "reward": "charts/score",
            "gold": "charts/gold",
            "KL": "charts/kl",
            "tokens/s": "charts/tokens_per_second",
        }
        bar.set_postfix(
            {k: f"{metrics[v]:.3g}" for k, v in shown.items() if v in metrics}, refresh=False
        )
        bar.update()

        save = time.monotonic() - last_save >= args.save_every or iteration == num_updates
        save |= args.eval_every > 0 and iteration % args.eval_every == 0
        save, signal_number = agree([save, stop.number], device)
        if save or signal_number:
            path, last_save = checkpoint(), time.monotonic()
        if signal_number:
            tqdm.write(f"stopped by a signal; --resume auto continues from {path}")
            sys.exit(128 + signal_number)
    bar.close()
    log.size()  # flush
    if rank == 0:
        finish(run_dir, path, replica, tokenizer, baseline, result, metrics)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.excepthook = report_user_error
    main(tyro.cli(Args))
