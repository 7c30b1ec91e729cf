"""Log-probabilities and entropies of given tokens, without ever holding the full logits.

For a hidden state h, the LM head W and a temperature tau, z = softcap(W h + b) / tau (V,) and

    log p(y) = z_y - logsumexp(z)             d log p(y) / dz = onehot(y) - p
    H        = -sum_v p_v log p_v             d H        / dz = -p * (log p + H)

Both need only running sums over slices of the vocabulary (online logsumexp, as in FlashAttention);
the backward pass recomputes z slice by slice. With 262144 words, 2048 tokens would otherwise hold
2 GB for one copy of the logits, and a plain log_softmax keeps about three.

Letters: B sequences, L columns, N scored tokens, D width of the model, V vocabulary.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf import UserError

SLICE_BYTES = 48 * 2**20  # all temporaries of one slice together: about three (N, slice) arrays
MIN_SLICE = 512  # narrower matrix products leave the machine idle
SHARING_COLUMNS = 256  # rows that are wider do not share: attention would cost more than it saves
# Decoders whose mask starts again where position_ids do; Falcon and GPT-OSS would ignore them
SHARING = {f"{name}Model" for name in "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3Text".split()}


def float_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None):
    """(N, D), (V, D), (V,) -> (N, V) logits in float32 (float64 for float64), never in bf16."""
    if weight.dtype in (torch.float32, torch.float64):
        logits = F.linear(hidden.to(weight.dtype), weight)
    elif hidden.is_cuda and not torch.is_grad_enabled():
        # tensor cores multiply bf16 exactly and add in float32: nothing is rounded to bf16
        logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(hidden.float(), weight.float())
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def slice_size(n_tokens: int, n_vocab: int) -> int:
    """Words in a slice; a small vocabulary is one slice."""
    return min(n_vocab, max(MIN_SLICE, SLICE_BYTES // (12 * max(n_tokens, 1))))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, softcap, vocab_chunk):
        """hidden (N, D), weight (V, D), bias (V,) or None, tokens (N,) -> two tensors (N,)."""
        n, vocab = hidden.shape[0], weight.shape[0]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        # finfo.min and not -inf: 0 * (-inf - x) in the first rescaling would be nan
        top = hidden.new_full((n,), torch.finfo(dtype).min, dtype=dtype)
        total = torch.zeros_like(top)  # sum exp(z - top)
        mean = torch.zeros_like(top)  # sum exp(z - top) (z - top)
        target = torch.zeros_like(top)
        for start in range(0, vocab, vocab_chunk):
            part = slice(start, start + vocab_chunk)
            z = float_logits(hidden, weight[part], None if bias is None else bias[part], softcap)
            z = z.div_(temperature)  # (N, slice)
            inside = (tokens >= start) & (tokens < start + z.shape[1])
            column = (tokens - start).clamp(0, z.shape[1] - 1)
            target = torch.where(inside, z.gather(1, column[:, None])[:, 0], target)
            new_top = torch.maximum(top, z.amax(1))
            z.sub_(new_top[:, None])
            p = z.exp()
            decay = torch.exp(top - new_top)
            mean = decay * (mean + total * (top - new_top)) + z.mul_(p).sum(1)
            total = decay * total + p.sum(1)
            top = new_top
        logsumexp = top + total.log()
        entropy = total.log() - mean / total
        ctx.save_for_backward(hidden, weight, bias, tokens, logsumexp, entropy)
        ctx.options = temperature, softcap, vocab_chunk
        ctx.set_materialize_grads(False)
        return target - logsumexp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, tokens, logsumexp, entropy = ctx.saved_tensors
        temperature, softcap, vocab_chunk = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = logsumexp.dtype
        # accumulated in float32 and rounded to bf16 once, at the end
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        for start in range(0, weight.shape[0], vocab_chunk):
            part = slice(start, start + vocab_chunk)
            z = float_logits(hidden, weight[part], None if bias is None else bias[part], softcap)
            slope = None if softcap is None else 1 - (z / softcap).square_()
            z = z.div_(temperature).sub_(logsumexp[:, None])  # log p (N, slice)
            grad = z.exp()
            if grad_entropy is not None:
                z.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
            else:
                z.zero_()
            if grad_logprobs is not None:
                z.sub_(grad_logprobs[:, None])
            grad.mul_(z)  # -p (g_logprob + g_entropy (log p + H))
            if grad_logprobs is not None:
                inside = (tokens >= start) & (tokens < start + z.shape[1])
                column = (tokens - start).clamp(0, z.shape[1] - 1)[:, None]
                grad.scatter_add_(1, column, torch.where(inside, grad_logprobs, 0)[:, None])
            grad.div_(temperature)
            if slope is not None:
                grad.mul_(slope)
            if need_hidden:
                grad_hidden.addmm_(grad, weight[part].to(dtype))
            if need_weight:
                grad_weight[part] = grad.t() @ hidden.to(dtype)
            if need_bias:
                grad_bias[part] = grad.sum(0)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy of its distribution, from hidden states.

    hidden (..., D), weight (V, D) of the LM head, tokens (...) int64, bias (V,) or None; softcap is
    Gemma 2's cap on logits. Returns two float32 tensors (...), both differentiable with respect to
    hidden, weight and bias. vocab_chunk: words in a slice, chosen from the memory limit if None.
    """
    # PITFALL: divide by the temperature of the sampler everywhere, or the first PPO ratio is not 1
    if not temperature > 0:
        raise UserError(f"temperature must be positive to score tokens, not {temperature}")
    if tokens.shape != hidden.shape[:-1] or hidden.shape[-1] != weight.shape[1]:
        raise UserError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and tokens "
            f"{tuple(tokens.shape)} do not fit: want (..., D), (V, D) and (...)"
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = vocab_chunk or slice_size(flat.shape[0], weight.shape[0])
    logprobs, entropy = _TokenLogprobs.apply(
        flat, weight, bias, tokens.reshape(-1), temperature, softcap, chunk
    )
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class Head(NamedTuple):
    """A causal LM taken apart: decoder(input_ids).last_hidden_state (B, L, D), then the LM head."""

    decoder: nn.Module
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None


def is_transformers(module: nn.Module, names: Collection[str]) -> bool:
    """Whether a module is of one of these classes of transformers, and not remote code."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in names


def lm_head(model: nn.Module) -> Head:
    """Decoder, LM head and soft cap of any Hugging Face causal LM.

    Under FSDP2 call it inside the forward of the root: only there is the head unsharded.
    """
    decoder = getattr(model, "base_model", model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if decoder is model or not isinstance(output, nn.Linear):
        raise UserError(f"{type(model).__name__} has no LM head: load with AutoModelForCausalLM")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(decoder, output.weight, output.bias, softcap)


def check_head(model: nn.Module) -> None:
    """Raise UserError if our log-probabilities are not those of model(...).logits (see below).

    Some architectures (Cohere, Granite) multiply their logits by a constant that each config names
    differently. One forward of 24 tokens finds that out before a run is wasted. Call it unsharded.
    """
    head = lm_head(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        vocab = head.weight.shape[0]
        ids = torch.randint(vocab, (3, 8), generator=torch.Generator().manual_seed(0))
        ids = ids.to(head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        columns = torch.arange(8, device=ids.device)
        scored = (columns > 0) & (columns < torch.tensor([[8], [4], [4]], device=ids.device))
        got = completion_logprobs(model, ids, scored)[0][:, 1:].float()
    model.train(was_training)
    exact = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if exact else 2e-2) * max(1.0, logits.abs().max().item())
    error = ((got - want) * scored[:, 1:]).abs().amax(1)
    for what, off in (
        ("changes its logits after the LM head", error[0]),
        ("lets sequences that share a row attend to each other", error[1:].max()),
    ):
        if not off <= tolerance:
            raise UserError(
                f"{type(model).__name__} {what} (off by {off:.2g} nats): use a Llama, Qwen, GPT-2 "
                f"or Gemma, or extend rlhf/logprobs.py"
            )


def share_rows(decoder: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Lay short sequences behind each other, so that a CPU does less work for pads.

    ids, positions: (B, L), see completion_logprobs. Returns ids (R, W), the place (B, L) in their
    flat view of each column that matters, and further arguments of the decoder. A sequence ends in
    front of its last scored token, since nothing reads the hidden state there; the longest sets W,
    the others go by first-fit decreasing. Sharing makes attention dearer, by a mask: rows of more
    than 256 columns keep to themselves, and all do where less than a tenth of the rows is saved.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    if not (ids.is_cpu and is_transformers(decoder, SHARING)):
        return ids, torch.arange(ids.numel(), device=ids.device).view_as(ids), {}
    ends = (positions * columns).amax(1).clamp(min=1)
    lengths, width = ends.tolist(), int(ends.max())
    alone = ids[:, :width], torch.arange(len(lengths))[:, None] * width + columns, {}
    if width > SHARING_COLUMNS:
        return alone
    free, start = [], [0] * len(lengths)  # columns of each row; place of each sequence
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), len(free))
        free += [width] * (row == len(free))
        start[i] = (row + 1) * width - free[row]
        free[row] -= lengths[i]
    if len(free) > 0.9 * len(lengths):
        return alone
    place, inside = torch.tensor(start)[:, None] + columns, columns < ends[:, None]
    packed = torch.zeros(2, len(free) * width, dtype=ids.dtype)
    packed[0, place[inside]] = ids[inside]
    packed[1, place[inside]] = columns.expand_as(ids)[inside]
    ids, position_ids = packed.view(2, len(free), width)
    return ids, place, {"position_ids": position_ids}


def completion_logprobs(
    model: nn.Module, input_ids: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, L) and entropies (B, L) at the selected positions, zero elsewhere.

    input_ids (B, L) int64, each row [prompt][completion][pads]; positions (B, L) bool selects the
    tokens to score; the token in column p is predicted by the hidden state of column p - 1.
    Causal attention makes pads on the right harmless, and nothing behind the decoder is computed
    for prompts and pads. Pads may be any id, even one the model does not have. A rank
    without any position still gets a graph (with zero gradients).
    """
    head = lm_head(model)
    unknown = (input_ids < 0) | (input_ids >= head.weight.shape[0])
    if positions[:, 0].any():
        raise UserError("positions selects column 0, but nothing predicts the first token")
    if (unknown & positions).any():
        raise UserError("positions selects a token outside the vocabulary (a pad?)")
    ids = input_ids.masked_fill(unknown, 0)
    ids, place, options = share_rows(head.decoder, ids, positions)
    hidden = head.decoder(input_ids=ids, use_cache=False, **options).last_hidden_state  # (R, W, D)
    # PITFALL: hidden state p - 1 predicts token p; scoring h[p] against token p is off by one
    rows = hidden.flatten(0, 1)[place[:, :-1][positions[:, 1:]]]  # (N, D)
    logprobs, entropy = token_logprobs(
        rows, head.weight, input_ids[positions], temperature, head.bias, head.softcap
    )
    zeros = logprobs.new_zeros(input_ids.shape)
    return zeros.masked_scatter(positions, logprobs), zeros.masked_scatter(positions, entropy)
