"""Supervised fine-tuning of a causal language model on prompts and completions.

The first of the three stages of "N+ implementation details" (arXiv 2403.17031; papers/ppo_rlhf.md
3.1 and 3.6): next-token cross-entropy, no dropout, Adam with eps 1e-5, learning rate to 0. The
paper's loss runs over all tokens, prompt included (--all-tokens); here over the completion unless
asked. Differs from the paper: gradients are clipped at norm 1.

    python -m rlhf.sft --model Qwen/Qwen2.5-0.5B --data demos.jsonl --out sft_model
    torchrun --nproc_per_node 2 -m rlhf.sft --model ... (N processes, the same loss as one)

Every line of the data has "prompt" and "completion" (or "chosen").
"""

import atexit
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from rlhf import UserError
from rlhf.logprobs import completion_logprobs
from rlhf.tasks import completion_ids, completion_text, load_records, prompt_ids

Example = tuple[list[int], list[int]]  # prompt ids, completion ids with EOS


def collate(examples: Sequence[Example], all_tokens: bool = False) -> tuple[Tensor, Tensor]:
    """Right-padded rows: input_ids (B, L) and the tokens to learn, positions (B, L) bool.

    The first token of a row has nothing before it and is never learned.
    """
    rows = [prompt + completion for prompt, completion in examples]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    positions = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, ((prompt, _), row) in enumerate(zip(examples, rows, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        positions[i, 1 if all_tokens else max(1, len(prompt)) : len(row)] = True
    return input_ids, positions


def sft_loss(model: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Sum of -log p over the tokens at `positions` (B, L); divide by their count for the mean."""
    logprobs, _ = completion_logprobs(model, input_ids, positions, 1.0)
    return -logprobs.sum()


def train_sft(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 1e-5,
    schedule: Literal["linear", "cosine"] = "cosine",
    warmup: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    all_tokens: bool = False,
    bf16: bool = False,
    seed: int = 1,
    progress: bool = True,
) -> float:
    """Train in place; returns the mean loss per token over the last tenth of the steps.

    With torch.distributed set up, every rank takes its share of each batch, and the gradient is
    that of one process with the whole batch: sums are divided by the token count over all ranks.
    """
    rank, world = rank_and_world()
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} is not a multiple of the {world} processes")
    if len(examples) < batch_size:
        raise UserError(f"{len(examples)} examples do not fill one batch of {batch_size}")
    device = next(model.parameters()).device
    model.eval()  # no dropout
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, betas=betas, eps=1e-5, fused=True
    )
    per_epoch = len(examples) // batch_size
    num_steps = max(1, round(epochs * per_epoch))
    generator = torch.Generator().manual_seed(seed)
    recent = []
    bar = tqdm(range(num_steps), desc="SFT", disable=not progress or rank > 0)
    for step in bar:
        if step % per_epoch == 0:
            order = torch.randperm(len(examples), generator=generator).tolist()
        start = step % per_epoch * batch_size
        rows = [examples[i] for i in order[start : start + batch_size]][rank::world]
        input_ids, positions = (x.to(device) for x in collate(rows, all_tokens))
        count = positions.sum().float()
        if world > 1:
            dist.all_reduce(count)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = sft_loss(model, input_ids, positions) / count
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            sum_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule_at(step / num_steps, schedule, warmup)
        optimizer.step()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        if not math.isfinite(loss.item()):
            raise UserError(f"the SFT loss is {loss.item()} at step {step}: lower --learning-rate")
        recent = [*recent, loss.item()][-max(1, num_steps // 10) :]
        bar.set_postfix(loss=f"{recent[-1]:.3f}")
    return sum(recent) / len(recent)


def rank_and_world() -> tuple[int, int]:
    """Rank and number of the processes that work together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_gradients(model: nn.Module) -> None:
    """Add the gradients of all ranks."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def schedule_at(fraction: float, schedule: str, warmup: float = 0.0) -> float:
    """Factor of the learning rate at `fraction` of the steps: up to 1 in the warm-up, then to 0."""
    if fraction < warmup:
        return fraction / warmup
    fraction = (fraction - warmup) / (1 - warmup)
    return 1 - fraction if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * fraction))


def start_processes() -> torch.device:
    """Join the process group under torchrun; the device of this process."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # a thread of gloo that drops a tensor while Python ends aborts the process
        atexit.register(time.sleep, 0.2)
    return device


def save_folder(out: Path, *parts) -> None:
    """Save models and tokenizers by `save_pretrained` under a temporary name, then rename.

    A folder is whole or absent; what stood at `out` goes only once its successor is complete.
    """
    out = Path(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part in parts:
            part.save_pretrained(temporary)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raise before any work if `out` cannot be written, or holds something that is no model."""
    out = Path(out)
    if (
        out.exists()
        and not (out / "config.json").is_file()
        and (out.is_file() or any(out.iterdir()))
    ):
        raise UserError(f"--out {out} exists and is not a model folder: choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out} is not writable: {error}") from error


def load_causal_lm(name: str, trust_remote_code: bool = False, dtype=torch.float32):
    """(model, tokenizer) of a Hugging Face causal LM by name or folder, or a UserError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.attention import choose_attention

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load a causal language model from '{name}': {reason}") from error
    choose_attention(model)
    return model, tokenizer


@dataclass
class Args:
    model: str
    """Hugging Face causal LM, by name or folder"""
    data: str
    """.jsonl file, folder, or Hugging Face data set with prompt and completion (or chosen)"""
    out: Path
    """folder for the result"""
    split: str = "train"
    """split of a folder or data set"""
    prompt_field: str = "prompt"
    """column that holds the prompt"""
    completion_field: str | None = None
    """column that holds the completion; by default `completion`, then `chosen`"""
    prompt_template: str | None = None
    """text with {column} placeholders instead of a prompt column"""
    max_length: int = 1024
    """examples with more tokens are left out"""
    epochs: float = 1.0
    """passes over the data"""
    batch_size: int = 32
    """examples an update, over all processes"""
    learning_rate: float = 1e-5
    """peak learning rate of Adam"""
    schedule: Literal["linear", "cosine"] = "cosine"
    """how the learning rate goes to 0"""
    warmup: float = 0.0
    """fraction of the steps in which the learning rate rises from 0"""
    all_tokens: bool = False
    """learn the prompt's tokens too, as the N+ paper does"""
    bf16: bool = False
    """bfloat16 arithmetic on float32 weights"""
    seed: int = 1
    """order of the examples"""
    trust_remote_code: bool = False
    """run Python code that the model's repository brings along"""


def main(args: Args) -> None:
    check_out(args.out)
    records = load_records(
        args.data, args.split, prompt_field=args.prompt_field, prompt_template=args.prompt_template
    )
    field = args.completion_field or next(
        (f for f in ("completion", "chosen") if f in records[0]), None
    )
    if field is None or any(record.get(field) is None for record in records):
        name = field or "completion"
        raise UserError(
            f"{args.data}: not every record has '{name}' (the first has: {', '.join(records[0])})"
        )
    device = start_processes()
    model, tokenizer = load_causal_lm(args.model, args.trust_remote_code)
    model.to(device)
    examples = [
        (prompt_ids(tokenizer, r["prompt"]), completion_ids(tokenizer, completion_text(r[field])))
        for r in records
    ]
    kept = [e for e in examples if len(e[0]) + len(e[1]) <= args.max_length]
    loss = train_sft(
        model,
        kept,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        warmup=args.warmup,
        all_tokens=args.all_tokens,
        bf16=args.bf16,
        seed=args.seed,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_folder(args.out, model, tokenizer)
        print(
            f"SFT loss {loss:.3f} on {len(kept)} examples "
            f"({len(examples) - len(kept)} too long) -> {args.out}"
        )
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while rank 0 still writes
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
