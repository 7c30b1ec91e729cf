"""A reward model: a language model's trunk with one scalar head, trained on preference pairs.

"N+ implementation details" (arXiv 2403.17031; papers/ppo_rlhf.md 3.1, 3.3):

    L = -log sigmoid(r(x, y_chosen) - r(x, y_rejected))

chosen and rejected go through one forward; the score is read at the last token, the EOS; the head
starts at N(0, 1 / sqrt(d + 1)), d the width of the trunk. After the training, scores are normalised
so that samples of the SFT model have mean 0 and std 1; the two numbers are `score_mean` and
`score_std` of the model's config, so that they travel with its folder.

    python -m rlhf.reward_model --model sft_model --data prefs.jsonl --out reward_model

Every line of the data has "prompt", "chosen" and "rejected". The result is an ordinary Hugging Face
folder for sequence classification with one label.

Differs from the paper: the head has no bias (a pairwise loss does not see it); gradients are
clipped at norm 1; scores are divided by their std too, as in the first blog post (2023), which
normalises before the training as well.
"""

import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from rlhf import UserError
from rlhf.sampler import generate
from rlhf.sft import (
    check_out,
    load_causal_lm,
    rank_and_world,
    save_folder,
    schedule_at,
    start_processes,
    sum_gradients,
)
from rlhf.tasks import (
    PREFERENCE_FIELDS,
    completion_ids,
    completion_text,
    load_records,
    pad_token_id,
    prompt_ids,
    stop_token_ids,
)

Pair = tuple[
    list[int], list[int]
]  # token ids of prompt + chosen + EOS, and of prompt + rejected + EOS


class ScoreModel(nn.Module):
    """One score for each row, around a Hugging Face sequence-classification model.

    `fully_shard` the decoder layers, then this module as the root, and call it: everything that it
    reads, the head too, is unsharded inside its forward.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError(
                f"{type(model).__name__} has no `score` head with one output: "
                "choose a decoder model (Llama, Qwen, GPT-2, Gemma ...) with num_labels=1"
            )
        self.model = model

    @property
    def config(self):
        return self.model.config

    def normalized_head(self) -> dict[str, Tensor]:
        """Weight (1, d) and bias (1,) of normalised scores, for a critic that starts here."""
        mean = getattr(self.config, "score_mean", 0.0)
        std = getattr(self.config, "score_std", 1.0)
        weight, bias = self.model.score.weight, self.model.score.bias
        bias = torch.zeros(1) if bias is None else bias.detach().float()
        return {"weight": weight.detach().float() / std, "bias": (bias - mean) / std}

    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """input_ids (B, L) padded on the right, last (B,) column of the EOS -> scores (B,)."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        # PITFALL: transformers looks for the last token by config.pad_token_id. With PAD = EOS, or
        # no PAD, it reads the wrong column. The caller knows the lengths: nothing is looked for.
        rows = hidden[torch.arange(len(last), device=last.device), last]  # (B, d)
        head = self.model.score  # in float32: bfloat16 would round scores to 3 digits, and tie them
        bias = None if head.bias is None else head.bias.float()
        return F.linear(rows.float(), head.weight.float(), bias)[:, 0]


# === LOADING =====================================================================================


def load_reward_model(
    name: str | Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    *,
    new_head: bool = False,
    seed: int = 1,
):
    """(ScoreModel, tokenizer) from a sequence-classification folder or name.

    With `new_head` from any causal LM: its trunk, and a fresh head N(0, 1 / sqrt(d + 1)).
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as hf_logging

    from rlhf.attention import choose_attention

    verbosity = hf_logging.get_verbosity()
    if new_head:
        hf_logging.set_verbosity_error()  # it would report at length that the head is new
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=dtype,
            num_labels=1,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load a reward model from '{name}': {reason}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    choose_attention(model)
    score_model = ScoreModel(model)
    score_model.eval()
    if new_head:
        width = model.score.in_features
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.copy_(
                torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
            )
        model.config.score_mean, model.config.score_std = 0.0, 1.0
    elif any("score" in key for key in info["missing_keys"]):
        raise UserError(
            f"'{name}' is a language model without a reward head: "
            "train one with python -m rlhf.reward_model"
        )
    # For others who load the folder and let transformers look for the last token.
    model.config.pad_token_id = pad_token_id(tokenizer)
    return score_model, tokenizer


# === SCORES ======================================================================================


def collate_rows(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids -> input_ids (B, L) right-padded with 0, last (B,) index of each last token."""
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
    return input_ids, torch.tensor([len(row) - 1 for row in rows])


def score_rows(
    model: nn.Module,
    rows: Sequence[list[int]],
    batch_size: int = 32,
    device: torch.device | None = None,
) -> Tensor:
    """Normalised scores (N,), float32 on the CPU, of complete rows of token ids.

    PITFALL: the number of forwards depends on N only, never on lengths: ranks that hold a shard of
    the model each must call it equally often, or all of them wait forever.
    """
    device = device or next(model.parameters()).device
    scores = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in each batch
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, last = collate_rows([rows[i] for i in chosen])
            scores[chosen] = model(input_ids.to(device), last.to(device)).float().cpu()
    mean, std = (getattr(model.config, k, v) for k, v in (("score_mean", 0.0), ("score_std", 1.0)))
    return (scores - mean) / std


def score_texts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence,
    completions: Sequence[str],
    batch_size: int = 32,
    device: torch.device | None = None,
) -> Tensor:
    """Normalised scores (N,) of prompt + completion + EOS, in the reward model's own tokens."""
    rows = [
        prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return score_rows(model, rows, batch_size, device)


def reward_function(model: nn.Module, tokenizer, device: torch.device):
    """The model as a reward function (see rlhf/tasks.py); it may be sharded.

    It is marked as collective: with a sharded model all processes must call it together, with
    equally many completions, and none may be stopped by a time limit.
    """

    def reward(prompts, completions):
        scores = score_texts(model, tokenizer, prompts, completions, device=device)
        if hasattr(model, "reshard"):
            model.reshard()
        return scores.tolist()

    reward.collective = True
    return reward


def normalize(model: nn.Module, rows: Sequence[list[int]], batch_size: int = 32) -> None:
    """Set score_mean and score_std: these rows, samples of the SFT model, get mean 0 and std 1."""
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    raw = score_rows(model, rows, batch_size).double()
    if not (len(raw) > 1 and raw.std() > 0 and torch.isfinite(raw).all()):
        raise UserError(f"cannot normalise on {len(raw)} SFT samples: their scores do not vary")
    model.config.score_mean, model.config.score_std = raw.mean().item(), raw.std().item()


# === TRAINING ====================================================================================


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_c - r_r) of each pair, (B,), (B,) -> (B,)."""
    return F.softplus(rejected - chosen)


def pair_rows(tokenizer, records: Sequence[dict]) -> list[Pair]:
    """Token ids of preference records."""
    pairs = []
    for record in records:
        prompt = prompt_ids(tokenizer, record["prompt"])
        texts = (completion_text(record[name]) for name in ("chosen", "rejected"))
        chosen, rejected = (prompt + completion_ids(tokenizer, text) for text in texts)
        pairs.append((chosen, rejected))
    return pairs


def pair_accuracy(model: nn.Module, pairs: Sequence[Pair], batch_size: int = 32) -> float:
    """Share of pairs in which chosen scores above rejected; ties count half."""
    scores = score_rows(model, [row for pair in pairs for row in pair], batch_size)
    chosen, rejected = scores[0::2], scores[1::2]
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def train_reward_model(
    model: ScoreModel,
    pairs: Sequence[Pair],
    *,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 1e-5,
    schedule: str = "cosine",
    warmup: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    bf16: bool = False,
    seed: int = 1,
    progress: bool = True,
) -> float:
    """Train in place; returns the mean loss over the last tenth of the steps.

    Ranks share each batch, and the gradient is that of one process with the whole batch.
    """
    rank, world = rank_and_world()
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} is not a multiple of the {world} processes")
    if len(pairs) < batch_size:
        raise UserError(f"{len(pairs)} pairs do not fill one batch of {batch_size}")
    device = next(model.parameters()).device
    model.eval()  # no dropout
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, betas=betas, eps=1e-5, fused=True
    )
    per_epoch = len(pairs) // batch_size
    num_steps = max(1, round(epochs * per_epoch))
    generator = torch.Generator().manual_seed(seed)
    recent = []
    bar = tqdm(range(num_steps), desc="reward model", disable=not progress or rank > 0)
    for step in bar:
        if step % per_epoch == 0:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        start = step % per_epoch * batch_size
        batch = [pairs[i] for i in order[start : start + batch_size]][rank::world]
        rows = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
        input_ids, last = (x.to(device) for x in collate_rows(rows))
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            chosen, rejected = model(input_ids, last).float().chunk(2)
        loss = pairwise_loss(chosen, rejected).sum() / batch_size
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
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step}: lower --learning-rate")
        recent = [*recent, loss.item()][-max(1, num_steps // 10) :]
        bar.set_postfix(loss=f"{recent[-1]:.3f}")
    return sum(recent) / len(recent)


def sample_rows(
    model: nn.Module,
    tokenizer,
    prompts: Sequence,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 1,
    batch_size: int = 64,
) -> tuple[list[str], list[list[int]]]:
    """Samples of a language model as texts, and as rows prompt + completion + EOS for scoring."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    drawn = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(tokenizer),
        pad_id=pad_token_id(tokenizer),
        temperature=temperature,
        slots=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    texts, rows = [], []
    for prompt, tokens, length, stopped in zip(
        ids, drawn.tokens.tolist(), drawn.lengths.tolist(), drawn.stopped.tolist(), strict=True
    ):
        words = tokens[: length - 1] if stopped else tokens[:length]
        texts.append(tokenizer.decode(words, skip_special_tokens=True))
        rows.append(prompt + words + [tokenizer.eos_token_id])
    return texts, rows


# === COMMAND =====================================================================================


@dataclass
class Args:
    model: str
    """the SFT model, by name or folder: start of the trunk, source of samples for normalising"""
    data: str
    """.jsonl file, folder, or Hugging Face data set with prompt, chosen, rejected"""
    out: Path
    """folder for the result"""
    split: str = "train"
    """split of a folder or data set"""
    prompt_field: str = "prompt"
    """column that holds the prompt"""
    prompt_template: str | None = None
    """text with {column} placeholders instead of a prompt column"""
    max_length: int = 1024
    """pairs with more tokens are left out"""
    held_out: float = 0.05
    """share of the pairs that is kept for the accuracy report"""
    epochs: float = 1.0
    """passes over the pairs"""
    batch_size: int = 32
    """pairs an update, over all processes"""
    learning_rate: float = 1e-5
    """peak learning rate of Adam, cosine to 0"""
    bf16: bool = False
    """bfloat16 arithmetic on float32 weights"""
    samples: int = 256
    """SFT samples on which scores are normalised"""
    response_tokens: int = 64
    """longest sample"""
    temperature: float = 1.0
    """of the samples"""
    seed: int = 1
    """head, order and samples"""
    trust_remote_code: bool = False
    """run Python code that the model's repository brings along"""


def main(args: Args) -> None:
    check_out(args.out)
    records = load_records(
        args.data,
        args.split,
        prompt_field=args.prompt_field,
        prompt_template=args.prompt_template,
        required=PREFERENCE_FIELDS,
    )
    device = start_processes()
    model, tokenizer = load_reward_model(
        args.model, new_head=True, seed=args.seed, trust_remote_code=args.trust_remote_code
    )
    model.to(device)
    pairs = [p for p in pair_rows(tokenizer, records) if max(map(len, p)) <= args.max_length]
    random.Random(args.seed).shuffle(pairs)
    num_test = max(1, int(args.held_out * len(pairs)))
    loss = train_reward_model(
        model,
        pairs[num_test:],
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        seed=args.seed,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        language_model, _ = load_causal_lm(args.model, args.trust_remote_code)
        prompts = [record["prompt"] for record in records]
        prompts = [prompts[i % len(prompts)] for i in range(args.samples)]
        _, rows = sample_rows(
            language_model.to(device),
            tokenizer,
            prompts,
            args.response_tokens,
            args.temperature,
            args.seed,
        )
        normalize(model, rows)
        accuracy = pair_accuracy(model, pairs[:num_test])
        save_folder(args.out, model.model, tokenizer)
        print(
            f"loss {loss:.3f}, accuracy {accuracy:.3f} on {num_test} held-out pairs -> {args.out}"
        )
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while rank 0 still writes
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
