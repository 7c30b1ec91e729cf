"""From sampled responses to batches of tensors, and from these to micro-batches of equal cost.

Letters: B responses of this process, T tokens of the longest response, L columns of prompt and
response, M rows of a micro-batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.sampler import Completions


class Response(NamedTuple):
    """A completion in plain types, to be sent between processes."""

    tokens: list[int]
    """with the token that ended it"""
    logprobs: list[float]
    stopped: bool
    text: str
    """without that token"""


def split(completions: Completions, texts: list[str]) -> list[Response]:
    """One Response for each prompt; texts: of `response_texts`."""
    columns = (completions.tokens, completions.logprobs, completions.lengths, completions.stopped)
    rows = zip(*(column.tolist() for column in columns), texts, strict=True)
    return [Response(tokens[:n], probs[:n], stop, text) for tokens, probs, n, stop, text in rows]


def stack(responses: list[Response], device: torch.device) -> Completions:
    """The reverse of `split`; behind its end a row holds 0."""
    rows = [torch.tensor(r.tokens, device=device) for r in responses]
    logprobs = [torch.tensor(r.logprobs, device=device) for r in responses]
    return Completions(
        tokens=pad_sequence(rows, batch_first=True),
        lengths=torch.tensor([len(row) for row in rows], device=device),
        logprobs=pad_sequence(logprobs, batch_first=True),
        stopped=torch.tensor([r.stopped for r in responses], device=device),
    )


def response_batch(prompts: list[list[int]], completions: Completions, T: int) -> dict[str, Tensor]:
    """Tensors with a row for each response.

    input_ids (B, L): prompt, response, padding on the right; prompt_lengths and lengths (B,), the
    latter with the token that ended the response; stopped (B,); mask (B, T): the tokens of the
    response; value_mask (B, T): these and the state after the last; sampled_logprobs (B, T).
    """
    device = completions.tokens.device
    lengths = completions.lengths
    responses = zip(prompts, completions.tokens.tolist(), lengths.tolist(), strict=True)
    rows = [torch.tensor(prompt + tokens[:length]) for prompt, tokens, length in responses]
    sampled = torch.zeros(len(prompts), T, device=device)
    sampled[:, : completions.logprobs.shape[1]] = completions.logprobs
    t = torch.arange(T, device=device)
    return {
        "input_ids": pad_sequence(rows, batch_first=True).to(device),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], device=device),
        "lengths": lengths,
        "stopped": completions.stopped,
        "mask": t < lengths[:, None],
        "value_mask": t < lengths[:, None] + 1,
        "sampled_logprobs": sampled,
    }


def response_texts(tokenizer, completions: Completions) -> list[str]:
    """Texts of responses, without the token that ended them."""
    ends = (completions.lengths - completions.stopped.long()).tolist()
    rows = zip(completions.tokens.tolist(), ends, strict=True)
    return [tokenizer.decode(tokens[:end], skip_special_tokens=True) for tokens, end in rows]


def micro_batches(batch: dict[str, Tensor], budget: int) -> Iterator[tuple[dict, Tensor]]:
    """Split a batch into rows of similar length whose padded tokens fit a budget: (part, rows).

    A row longer than the budget goes alone.
    PITFALL: every process must run equally many forwards, or the others wait for ever for its part
    of a sharded model. A process that has fewer repeats a row, with empty masks and `rows` empty.
    """
    lengths = batch["prompt_lengths"] + batch["lengths"]
    groups: list[list[int]] = []
    for row in lengths.argsort(stable=True).tolist():
        if not groups or (len(groups[-1]) + 1) * lengths[row] > budget:
            groups.append([])
        groups[-1].append(row)
    most = torch.tensor(len(groups), device=lengths.device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    for i in range(int(most)):
        rows = torch.tensor(groups[i] if i < len(groups) else groups[0][:1], device=lengths.device)
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["input_ids"] = part["input_ids"][:, : int(lengths[rows].max())]
        if i >= len(groups):
            part |= {name: torch.zeros_like(part[name]) for name in ("mask", "value_mask")}
            rows = rows[:0]
        yield part, rows
