"""Sampling from any Hugging Face causal LM, in one process, with a key/value cache of fixed slots.

Faster than `model.generate` for four reasons: the cache is allocated once and written in place
(generate concatenates it anew for every token and layer), a finished row leaves at once and a
waiting prompt takes its slot (generate goes on until the last row of a batch is done), a prompt
that occurs G times is read once (GRPO), and on a CPU Llama-like layers decode by llama_step.
Nothing is taken from model.generation_config.

Every row counts its own columns from 0, so prompts of different lengths need no padding:

    slot 0   p p p y y .         p prompt, y sampled and already in the cache, . free
    slot 1   p y y y y y         the rows at work are always the first n slots; when a row is
    slot 2   p p p p y .         done, the last one moves into its slot, a copy of one row
                                 for each layer

Letters: B prompts, T columns of the result, S slots, n rows at work, C columns in use,
V vocabulary, H key/value heads, E width of a head.
"""

from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rlhf import UserError
from rlhf.logprobs import Head, float_logits, is_transformers, lm_head

PREFILL_TOKENS = 8192  # most tokens, pads included, of one forward over prompts


@dataclass
class Completions:
    """What was sampled, in the order of the prompts."""

    tokens: Tensor
    """(B, T) int64, pad_id behind the stop token; T is the longest completion"""
    lengths: Tensor
    """(B,) int64, the stop token included"""
    logprobs: Tensor
    """(B, T) float32 under softmax(logits / temperature), before top-k and top-p; 0 behind the end.
    For greedy decoding (temperature 0) under softmax(logits)."""
    stopped: Tensor
    """(B,) bool: ended by a stop token, not by max_new_tokens"""


class SlotCache(Cache):
    """Keys and values of each layer (S, H, C_max, E); call a before_ method before each forward."""

    def __init__(self, slots: int, columns: int):
        super().__init__(layers=[])
        self.slots, self.columns = slots, columns
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def before_prefill(self, slots: Tensor, source: Tensor) -> None:
        """Sequence source[i] of the next batch belongs into slots[i]; (k,) both."""
        self.prefill, self.target = True, (slots, source)

    def before_decode(self, positions: Tensor, width: int) -> None:
        """One token for each of the first n slots, at columns positions (n,), all below width."""
        self.prefill, self.target = False, (positions, width)
        self.places: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Called by each attention layer with (n, H, t, E); returns what to attend to."""
        n, heads, length, _ = key_states.shape
        if layer_idx == len(self.keys):
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                # zeros, not empty: a masked column has weight 0, but 0 * nan is nan
                store.append(states.new_zeros(self.slots, heads, self.columns, states.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.prefill:
            slots, source = self.target
            keys[slots, :, :length] = key_states[source]
            values[slots, :, :length] = value_states[source]
            return key_states, value_states
        positions, width = self.target
        if heads not in self.places:  # once a step: the rows of the cache as (S * H * C_max, E)
            rows = torch.arange(n * heads, device=positions.device)
            self.places[heads] = rows * self.columns + positions.repeat_interleave(heads)
        for store, states in ((keys, key_states), (values, value_states)):
            flat = store.view(-1, store.shape[3])
            flat.index_copy_(0, self.places[heads], states.reshape(n * heads, -1))
        return keys[:n, :, :width], values[:n, :, :width]

    def move(self, source: int, target: int, width: int) -> None:
        """Copy the first columns of a row; one by one, because few rows end in the same step."""
        for store in (*self.keys, *self.values):
            store[target, :, :width] = store[source, :, :width]


@contextmanager
def sampling_weights(decoder: nn.Module):
    """Inside, linear layers on a CPU find their weights in the order that is best for few rows.

    W.t() lies along its rows, a quarter faster; bfloat16 is in oneDNN's own order, a third faster
    than with oneDNN reordering at every product. Values stay what they were. It needs a second copy
    of these weights for as long as it lasts; left out on GPUs, where it would gain nothing.
    """
    linears = [m for m in decoder.modules() if isinstance(m, nn.Linear) and m.weight.is_cpu]
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    packed = [
        m
        for m in linears
        if onednn and type(m) is nn.Linear and m.weight.dtype == torch.bfloat16
        if "forward" not in vars(m)  # somebody else's stays
    ]
    originals = [(w, w.data) for w in {m.weight for m in linears if m not in packed}]
    try:
        for weight, data in originals:
            weight.data = data.t().contiguous().t()
        for linear in packed:  # by the operators that compiled code calls
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
            linear.forward = partial(packed_linear, weight=weight, bias=linear.bias)
        yield
    finally:
        for weight, data in originals:
            weight.data = data
        for linear in packed:
            vars(linear).pop("forward", None)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear for a weight of _reorder_linear_weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def attention_masks(config, queries: Tensor, width: int, dtype: torch.dtype):
    """Additive masks (n, 1, t, width) for queries in columns (n, t); transformers takes them as is.

    A dict from layer type to mask where layers differ (Gemma), otherwise the mask itself.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = {"sliding_attention" if sliding else "full_attention"}
    if kinds - {"sliding_attention", "full_attention"}:
        raise UserError(f"cannot sample from layers of type {sorted(kinds)}: only attention layers")
    columns = torch.arange(width, device=queries.device)
    distance = queries[:, None, :, None] - columns  # (n, 1, t, width)
    masks = {}
    for kind in kinds:
        hidden = distance < 0
        if kind == "sliding_attention":
            hidden |= distance >= config.sliding_window
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=queries.device)
        masks[kind] = zeros.masked_fill_(hidden, torch.finfo(dtype).min)
    return masks if len(masks) > 1 else masks.popitem()[1]


def prefill(head: Head, cache: SlotCache, prompts: list[list[int]], first: int) -> Tensor:
    """Read prompts into the slots from `first` on; logits (k, V) of the token behind each."""
    device, dtype = head.weight.device, head.decoder.dtype
    slots_of: dict[tuple[int, ...], list[int]] = {}
    for slot, prompt in enumerate(prompts, first):
        slots_of.setdefault(tuple(prompt), []).append(slot)
    groups = sorted(slots_of.items(), key=lambda group: len(group[0]))
    logits = None
    while groups:
        size = 1  # sequences of this forward; the last is the longest
        while size < len(groups) and (size + 1) * len(groups[size][0]) <= PREFILL_TOKENS:
            size += 1
        batch, groups = groups[:size], groups[size:]
        width = len(batch[-1][0])
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch], device=device)
        last = torch.tensor([len(ids) - 1 for ids, _ in batch], device=device)
        slots = torch.tensor([s for _, shared in batch for s in shared], device=device)
        source = torch.tensor([i for i, (_, s) in enumerate(batch) for _ in s], device=device)
        columns = torch.arange(width, device=device)[None]
        cache.before_prefill(slots, source)
        hidden = head.decoder(
            input_ids=ids,
            attention_mask=attention_masks(head.decoder.config, columns, width, dtype),
            position_ids=columns.expand(size, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # PITFALL: with pads on the right the last column is not the last token of each prompt
        hidden = hidden[torch.arange(size, device=device), last]  # (size, D)
        part = float_logits(hidden, head.weight, head.bias, head.softcap)
        if logits is None:
            logits = part.new_empty(len(prompts), part.shape[1])
        logits[slots - first] = part[source]
    return logits


def plain_step(decoder, cache: SlotCache, tokens: Tensor, columns: Tensor, width: int) -> Tensor:
    """Any model: tokens (n,) of the first n slots enter at columns (n,) -> hidden states (n, D)."""
    cache.before_decode(columns, width)
    queries = columns[:, None]
    return decoder(
        input_ids=tokens[:, None],
        attention_mask=attention_masks(decoder.config, queries, width, decoder.dtype),
        position_ids=queries,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]


def llama_like(decoder: nn.Module) -> bool:
    """Whether llama_step does what the forward methods of this decoder and its layers do."""
    return (
        is_transformers(decoder, ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"))
        and getattr(decoder.config, "sliding_window", None) is None
        # elsewhere a few large kernels are better than many small ones
        and decoder.device.type == "cpu"
        and decoder.dtype in (torch.float32, torch.float64, torch.bfloat16)
        # a hook may belong to a forward that llama_step leaves out
        and not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of few queries (n, H, t, E) to (n, H, w, E) by what is fastest on a CPU."""
    if q.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scaling)
    scores = torch.matmul(q * scaling, keys.transpose(2, 3)).add_(mask)
    return torch.matmul(scores.softmax(3), values)


def llama_step(decoder, cache: SlotCache, tokens: Tensor, columns: Tensor, width: int) -> Tensor:
    """plain_step for llama_like decoders on a CPU: fewer operators, less of the cache is read."""
    cache.before_decode(columns, width)
    x, n, ends = decoder.embed_tokens(tokens), len(tokens), (columns + 1).tolist()
    cos, sin = decoder.rotary_emb(x, position_ids=columns[:, None])  # (n, 1, E)
    half = cos.shape[2] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), 2)  # the sign inside rotate_half
    # Attention waits for memory: do not read the free columns of short rows. A slot is filled when
    # its neighbours are, so 16 of them are about as long as each other; all n slots may not be
    size = 16 if min(ends) + 8 < max(ends) else n
    groups = [(a, min(a + size, n), max(ends[a : a + size])) for a in range(0, n, size)]
    masks = [attention_masks(decoder.config, columns[a:b, None], w, x.dtype) for a, b, w in groups]
    for i, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (linear(h).view(n, -1, attention.head_dim) for linear in linears)
        if hasattr(attention, "q_norm"):  # Qwen3
            q, k = attention.q_norm(q), attention.k_norm(k)
        qk = torch.cat((q, k), 1)  # rotate both at once
        swapped = torch.cat((qk[..., half:], qk[..., :half]), 2)
        q, k = (qk * cos).addcmul_(swapped, sin).split((q.shape[1], k.shape[1]), 1)
        keys, values = cache.update(k[:, :, None], v[:, :, None], i)
        q = q.view(n, k.shape[1], -1, attention.head_dim)  # (n, H, .., E)
        outputs = [
            attend(q[a:b], keys[a:b, :, :w], values[a:b, :, :w], mask, attention.scaling)
            for (a, b, w), mask in zip(groups, masks, strict=True)
        ]
        x = x + attention.o_proj(torch.cat(outputs).view(n, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.norm(x)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens (n,) and their log-probabilities (n,) before truncation, from logits (n, V)."""
    if temperature == 0:
        top, tokens = logits.max(-1)  # on a CPU twice as fast as argmax
        return tokens, top - logits.logsumexp(-1)
    logprobs = (logits / temperature).log_softmax(-1)
    probs = logprobs.exp()
    if 0 < top_k < probs.shape[1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered, words = probs.sort(descending=True)
        mass = ordered.sum(1, keepdim=True) * top_p
        # a word stays if the words before it have not reached the mass: the first always does
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= mass, 0)
        probs = torch.zeros_like(probs).scatter_(1, words, ordered)
    # One uniform number a row instead of V exponential ones (torch.multinomial).
    # PITFALL: a float32 running sum over a large vocabulary loses the rare words: use float64
    cdf = probs.cumsum(1, dtype=torch.float64)
    # drawn where the generator is: one of the CPU gives a GPU the draws that a CPU would see
    place = generator.device if generator else cdf.device
    draw = torch.rand(len(cdf), 1, dtype=torch.float64, device=place, generator=generator)
    draw = draw.to(cdf.device, non_blocking=True)
    tokens = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True).clamp_(max=cdf.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def check_request(model, vocab, prompts, limits, stop_ids, temperature, top_k, top_p, slots):
    """Raise UserError for anything that would fail, or silently mean something else, later."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not prompts:
        raise UserError("no prompts to sample from")
    if len(limits) != len(prompts):
        raise UserError(f"{len(limits)} values in max_new_tokens for {len(prompts)} prompts")
    if not stop_ids:
        raise UserError("stop_ids is empty: pass at least the end-of-sequence id")
    if not all(0 <= stop < vocab for stop in stop_ids):
        raise UserError(f"stop_ids {sorted(stop_ids)}: ids go from 0 to {vocab - 1}")
    enough = slots is None or slots >= 1
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and enough):
        raise UserError(
            f"want temperature >= 0, top_k >= 0, 0 < top_p <= 1, slots >= 1; got "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}, slots={slots}"
        )
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give it at least a start token")
        if limit < 1:
            raise UserError(f"max_new_tokens of prompt {i} is {limit}: want at least 1")
        if longest is not None and len(prompt) + limit > longest:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={limit} that is more "
                f"than the {longest} positions of the model: shorten one of them"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"prompt {i} has an id outside 0 to {vocab - 1}: wrong tokenizer?")


def slots_within(gigabytes: float, model: nn.Module, columns: int) -> int:
    """Rows of so many columns that fit, at least one. gigabytes 0: 4 on a CPU, on a GPU a quarter.

    A row takes its keys and values, for models whose layers are alike, and 20 bytes for each word
    of the vocabulary: logits, probabilities and their running sum.
    """
    head, config = lm_head(model), model.config.get_text_config()
    if gigabytes == 0 and head.weight.is_cuda:
        gigabytes = torch.cuda.get_device_properties(head.weight.device).total_memory / 4e9
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * columns * head.weight.dtype.itemsize
    return max(1, int(min((gigabytes or 4) * 1e9 / (cache + 20 * len(head.weight)), 2**31)))


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int | list[int],
    stop_ids: Collection[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    slots: int | None = None,
    cache_gb: float = 0.0,
    generator: torch.Generator | None = None,
) -> Completions:
    """Sample one completion of each prompt; the model is a plain, unsharded causal LM.

    max_new_tokens: one number, or one for each prompt. temperature 0 is greedy. slots: rows that
    work at the same time; by default as many as fit into cache_gb gigabytes, see slots_within.
    The same generator state gives the same completions for the same slots.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    head = lm_head(model)
    check_request(
        model, len(head.weight), prompts, limits, stop_ids, temperature, top_k, top_p, slots
    )
    longest = max(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True))
    if not cache_gb >= 0:
        raise UserError(
            f"cache_gb is {cache_gb}: want gigabytes for sampling, or 0 for the default"
        )
    if slots is None:
        slots = slots_within(cache_gb, model, longest)
    slots = min(slots, len(prompts))
    device = head.weight.device
    # made outside of inference mode, so that a training pass may save them for its backward
    result = Completions(
        tokens=torch.full((len(prompts), max(limits)), pad_id, device=device),
        lengths=torch.zeros(len(prompts), dtype=torch.int64, device=device),
        logprobs=torch.zeros(len(prompts), max(limits), device=device),
        stopped=torch.zeros(len(prompts), dtype=torch.bool, device=device),
    )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with sampling_weights(head.decoder), torch.inference_mode():
            if device.type == "cpu" and head.weight.dtype in (torch.bfloat16, torch.float16):
                head = head._replace(weight=head.weight.float())  # once, not at every token
            cache = SlotCache(slots, longest)
            options = (temperature, top_k, top_p, generator)
            _run(head, cache, prompts, limits, stop_ids, options, result)
    finally:
        for module in training:
            module.training = True
    width = int(result.lengths.max())
    result.tokens, result.logprobs = result.tokens[:, :width], result.logprobs[:, :width]
    return result


def _run(head, cache, prompts, limits, stop_ids, options, result) -> None:
    """Fill `result`: admit prompts, decode all rows by one token, retire rows, and again."""
    device, slots = head.weight.device, cache.slots
    step = llama_step if llama_like(head.decoder) else plain_step
    limit = torch.tensor(limits, device=device)
    is_stop = torch.zeros(len(head.weight), dtype=torch.bool, device=device)
    is_stop[list(stop_ids)] = True
    # for each slot: its prompt, the column of its newest token, that token, tokens sampled so far
    state = torch.zeros(4, slots, dtype=torch.int64, device=device)
    n = admitted = width = 0
    while n or admitted < len(prompts):
        waiting = prompts[admitted : admitted + slots - n]
        # small prefills waste the machine: wait until an eighth of the slots is free
        if waiting and (n == 0 or len(waiting) >= min(len(prompts) - admitted, slots // 8)):
            new = slice(n, n + len(waiting))
            tokens, logprobs = sample(prefill(head, cache, waiting, n), *options)
            state[0, new] = torch.arange(admitted, admitted + len(waiting), device=device)
            state[1, new] = torch.tensor([len(prompt) for prompt in waiting], device=device)
            state[3, new] = 0
            admitted, n = admitted + len(waiting), n + len(waiting)
            width = max(width, 1 + max(len(prompt) for prompt in waiting))
        else:
            new = slice(0, n)
            hidden = step(head.decoder, cache, state[2, :n], state[1, :n], width)
            logits = float_logits(hidden, head.weight, head.bias, head.softcap)
            tokens, logprobs = sample(logits, *options)
            state[1, :n] += 1
            width += 1
        state[2, new] = tokens
        owner, count = state[0, new], state[3, new]
        result.tokens[owner, count] = tokens
        result.logprobs[owner, count] = logprobs.float()
        count += 1
        stopped = is_stop[tokens]
        done = stopped | (count == limit[owner])
        if not done.any():
            continue
        result.lengths[owner[done]] = count[done]
        result.stopped[owner[done]] = stopped[done]
        keep = torch.ones(n, dtype=torch.bool, device=device)
        keep[new] = ~done
        n = int(keep.sum())
        holes, movers = (~keep[:n]).nonzero()[:, 0], keep[n:].nonzero()[:, 0] + n
        if len(holes):
            state[:, holes] = state[:, movers]
            for move in zip(movers.tolist(), holes.tolist(), state[1, holes].tolist(), strict=True):
                cache.move(*move)
        width = int(state[1, :n].max()) + 1 if n else 0
