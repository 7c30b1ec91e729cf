"""rlhf/attention.py: bfloat16 attention on a CPU is that of PyTorch, for every kind of mask."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf import attention as module
from rlhf.attention import NAME, attention, choose_attention
from rlhf.logprobs import completion_logprobs
from rlhf.sft import load_causal_lm
from rlhf.tiny_lm import character_tokenizer

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


GPT2_SIZES = dict(
    vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
)


def states(heads: int, length: int, dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(3, heads, length, 8, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def layer(groups: int = 1, causal: bool = True) -> nn.Module:
    result = nn.Module()
    result.num_key_value_groups, result.is_causal = groups, causal
    return result


MASKS = {
    "causal": None,
    "bool": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().triu(-2),
    "additive": torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_values_and_gradients_are_those_of_float64(mask, kv_heads, scaling):
    results = []
    for function, dtype in ((sdpa_attention_forward, torch.float64), (attention, torch.bfloat16)):
        # the same numbers: bfloat16 ones are exact in float64
        inputs = [
            states(h, 7, torch.bfloat16, i).detach() for i, h in enumerate((4, kv_heads, kv_heads))
        ]
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        given = MASKS[mask]
        given = given if given is None or given.dtype == torch.bool else given.to(dtype)
        out, weights = function(layer(4 // kv_heads), *inputs, given, scaling=scaling)
        assert out.shape == (3, 7, 4, 8) and weights is None
        out.square().sum().backward()
        results.append([out.detach().double(), *(x.grad.double() for x in inputs)])
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_only_short_bfloat16_rows_leave_the_fused_kernel(monkeypatch):
    fused = []
    monkeypatch.setattr(
        module, "sdpa_attention_forward", lambda *args, **kw: fused.append(args) or (0, None)
    )
    short, long = states(2, 7, torch.bfloat16), states(2, module.SHORT + 1, torch.bfloat16)
    attention(layer(), short, short, short, None)
    attention(layer(), short.detach(), short.detach(), short.detach(), None)
    assert not fused
    attention(layer(), long, long, long, None)
    attention(layer(), short[:, :, -1:], short, short, None)  # a step of sampling
    attention(layer(), short.float(), short.float(), short.float(), None)
    for name in ("dropout", "softcap", "position_bias", "cache"):
        attention(layer(), short, short, short, None, **{name: 0.1})
    assert len(fused) == 7


def test_a_query_that_is_not_causal_sees_all_columns():
    q = states(2, 5, torch.bfloat16)
    want = sdpa_attention_forward(layer(causal=False), q, q, q, None)[0]
    got = attention(layer(causal=False), q, q, q, None)[0]
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("length", [3, 9])
def test_as_many_columns_as_the_mask_has(length):
    """Queries behind columns that were read before, as in a prefill in parts."""
    q, k = states(2, 5, torch.bfloat16), states(2, length, torch.bfloat16, 1)
    mask = torch.ones(5, length, dtype=torch.bool).tril(length - 5)
    mask[:, 0] = True
    want = sdpa_attention_forward(layer(), q, k, k, mask)[0]
    got = attention(layer(), q, k, k, mask)[0]
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def small_model(config) -> nn.Module:
    torch.manual_seed(0)
    sizes = GPT2_SIZES if config is GPT2Config else SIZES
    extra = {"sliding_window": 4} if config is Gemma3TextConfig else {}
    return AutoModelForCausalLM.from_config(config(**sizes, **extra)).bfloat16().eval()


def test_log_probabilities_are_those_of_the_update_to_the_last_bit():
    """Computed before an update or in it: or the first ratio would not be 1."""
    model = small_model(LlamaConfig)
    choose_attention(model)
    ids = torch.randint(3, 97, (4, 12))
    positions = torch.ones_like(ids, dtype=torch.bool)
    positions[:, 0] = False
    with torch.no_grad():
        before = completion_logprobs(model, ids, positions)[0]
    assert torch.equal(before, completion_logprobs(model, ids, positions)[0].detach())


def test_activations_that_are_computed_again_are_the_same():
    ids = torch.randint(3, 97, (4, 12))
    found = []
    for again in (False, True):
        model = small_model(LlamaConfig)
        choose_attention(model)
        if again:
            layers = model.model.layers
            for i, block in enumerate(layers):
                layers[i] = checkpoint_wrapper(block)
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_with_padding_score_as_with_the_fused_kernel():
    model = small_model(LlamaConfig)
    ids = torch.randint(3, 97, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 9:] = 0
    want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    choose_attention(model)
    got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert (got - want)[real].norm() < 0.05 * want[real].norm()


@pytest.mark.parametrize("config", [LlamaConfig, Gemma3TextConfig, GPT2Config])
def test_a_model_scores_and_learns_as_with_the_fused_kernel(config):
    model = small_model(config)
    ids = torch.randint(3, 97, (4, 12))
    positions = torch.ones_like(ids, dtype=torch.bool)
    positions[:, 0] = False
    found = []
    for _ in range(2):
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, ids, positions)
        logprobs.sum().backward()
        found.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
        choose_attention(model)
    assert model.config._attn_implementation == NAME
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() < 0.05 * want.norm()


def test_loading_chooses_it_saving_forgets_it_and_others_keep_their_own(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "a")
    character_tokenizer().save_pretrained(tmp_path / "a")
    model, _ = load_causal_lm(str(tmp_path / "a"))
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.config._attn_implementation == "sdpa"
    eager = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES), attn_implementation="eager")
    choose_attention(eager)
    assert eager.config._attn_implementation == "eager"
