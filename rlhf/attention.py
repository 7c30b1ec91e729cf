"""Attention for bfloat16 on a CPU, where the fused kernel of PyTorch is slow on short rows.

Its backward pass has a fixed cost for each head of each row. Forward and backward of 32 rows of 74
columns with 8 heads of width 32 take 77 ms on one thread, and 14 ms as two matrix products around a
softmax, then in float32. At 229 columns it is 102 against 66 ms (16 rows, 4 heads of 256), and at
512 the fused kernel is ahead. In float32 it has no such cost. The products keep two bytes for each
score until the backward pass: for a token of a row of 256 columns 0.5 kB for each head and layer.
(file: benchmark/results/speed.jsonl)
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_products"
SHORT = 256  # columns


def attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """What transformers' sdpa_attention_forward does: (B, H, t, E), (B, H_kv, L, E) twice.

    attention_mask: broadcast to (B, H, t, L), additive or bool (True: attend); None: causal. A row
    that may attend to nothing is undefined. Returns (B, t, H, E). Scores are float32 inside the
    softmax only.

    PITFALL: whether there will be a backward pass must not matter, or log-probabilities that were
    computed before an update are not those of the update, and the first ratio is not 1.
    """
    slow = query.dtype == torch.bfloat16 and query.is_cpu and query.shape[2] > 1
    more = [options.get(name) is not None for name in ("softcap", "position_bias", "cache")]
    if not slow or key.shape[2] > SHORT or options.get("dropout") or any(more):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scaling = options.get("scaling")
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = query @ key.transpose(2, 3)  # (B, H, t, L)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal:
        attention_mask = scores.new_ones(scores.shape[2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    # float32 inside, rounded at its end: saving float32 for the backward pass takes longer
    return (scores.softmax(3) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def choose_attention(model: PreTrainedModel) -> None:
    """Let a model of transformers use `attention` in place of PyTorch's, if that is its choice."""
    known = type(model).__module__.startswith("transformers.models.")
    chosen = model.config.get_text_config()._attn_implementation
    if known and chosen == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
