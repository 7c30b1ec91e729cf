"""rlhf/logprobs.py: exact values and gradients, without full logits, for every supported head."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf import UserError
from rlhf.logprobs import (
    check_head,
    completion_logprobs,
    lm_head,
    share_rows,
    slice_size,
    token_logprobs,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # the default 0.02 makes flat distributions, which hide mistakes
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=5, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5),
}


def build(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def naive(hidden, weight, tokens, temperature=1.0, bias=None, softcap=None):
    """The same with full logits and autograd; float64."""
    logits = hidden.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def inputs(n=6, d=5, v=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = 2 * make(n, d), make(v, d), make(v)
    tokens = torch.randint(v, (n,), generator=generator)
    return [x.requires_grad_() for x in (hidden, weight, bias)], tokens


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_for_every_slice_width(chunk, softcap):
    (hidden, weight, bias), tokens = inputs()
    tokens[:2] = torch.tensor([0, 10])  # first and last word
    got = token_logprobs(hidden, weight, tokens, 0.7, bias, softcap, chunk)
    want = naive(hidden, weight, tokens, 0.7, bias, softcap)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 2, 6).double()
    for i in (0, 1):  # logprobs alone, entropy alone
        grads = [
            torch.autograd.grad(out[i] @ upstream, (hidden, weight, bias), retain_graph=True)
            for out in (got, want)
        ]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    both = [
        torch.autograd.grad(out[0] @ upstream + 0.3 * out[1].square().sum(), (hidden, weight))
        for out in (got, want)
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    (hidden, weight, bias), tokens = inputs(n=4, d=3, v=7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, tokens, 1.3, b, 1.5, 3), (hidden, weight, bias)
    )


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[100.0], [-100.0]])
    weight = torch.tensor([[9.0], [8.99], [-9.0]])
    tokens = torch.tensor([1, 2])
    got = token_logprobs(hidden, weight, tokens, vocab_chunk=1)
    want = naive(hidden, weight, tokens)
    torch.testing.assert_close(got, tuple(x.float() for x in want), rtol=1e-3, atol=1e-4)


def test_bf16_is_computed_in_float32():
    (hidden, weight, _), tokens = inputs(n=64, d=64, v=300, dtype=torch.bfloat16)
    got, entropy = token_logprobs(hidden, weight, tokens, 0.5, vocab_chunk=64)
    want, want_entropy = naive(hidden, weight, tokens, 0.5)
    assert got.dtype == entropy.dtype == torch.float32
    # bf16 logits of size 50 would be off by about 0.1
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    grads = torch.autograd.grad(want.sum(), (hidden, weight))
    for mine, theirs in zip((hidden.grad, weight.grad), grads, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_never_holds_full_logits():
    """No operation of a forward and backward pass makes a tensor larger than one slice."""
    n, d, v = 512, 8, 65536
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    tokens = torch.randint(v, (n,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        logprobs, entropy = token_logprobs(hidden, weight, tokens)
        (logprobs.sum() + entropy.sum()).backward()
    assert 0 < largest <= slice_size(n, v) * n <= n * v // 4


def test_slice_size():
    assert slice_size(2048, 1000) == 1000
    assert slice_size(2048, 262144) < 3000
    assert slice_size(10**6, 262144) == 512


def test_wrong_input_is_one_line():
    (hidden, weight, _), tokens = inputs()
    with pytest.raises(UserError, match="temperature"):
        token_logprobs(hidden, weight, tokens, temperature=0.0)
    with pytest.raises(UserError, match="do not fit"):
        token_logprobs(hidden, weight, tokens[:-1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_models(name, shared):
    """Ragged right-padded rows: values and all parameter gradients equal the full-logit pass.

    shared: the last two fit into one row, but for GPT-2, whose positions are learned.
    """
    model = build(CONFIGS[name])
    check_head(model)
    lengths, prompts, columns = [9, 4, 5 if shared else 7], [3, 1, 4 if shared else 6], 9
    ids = torch.full((3, columns), -100)  # the pad is no id of the model
    scored = torch.zeros(3, columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    for i, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
        ids[i, :n] = torch.randint(97, (n,), generator=generator)
        scored[i, p:n] = True
    shape = (3, 9) if name == "gpt2" else (2, 8) if shared else (3, 8)
    assert share_rows(model.base_model, ids, scored)[0].shape == shape
    got, entropy = completion_logprobs(model, ids, scored, temperature=0.8)
    assert (got[~scored] == 0).all() and (entropy[~scored] == 0).all()
    (got.sum() + 0.1 * entropy.sum()).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = 0.0
    for i, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
        logp = (model(input_ids=ids[i : i + 1, :n]).logits[0, :-1] / 0.8).log_softmax(-1)
        want = logp.gather(-1, ids[i, 1:n, None])[:, 0]
        want_entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(got[i, p:n], want[p - 1 :], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(entropy[i, p:n], want_entropy[p - 1 :], rtol=1e-4, atol=2e-5)
        loss = loss + want[p - 1 :].sum() + 0.1 * want_entropy[p - 1 :].sum()
    loss.backward()
    wanted = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys() and len(grads) > 5
    for key in wanted:
        torch.testing.assert_close(grads[key], wanted[key], rtol=1e-3, atol=1e-3, msg=key)


def test_sequences_that_share_rows_are_those_alone():
    """Every place of every sequence, random lengths, and no more rows than first-fit needs."""
    model, generator = build(CONFIGS["gemma3"]), torch.Generator().manual_seed(1)
    ids = torch.randint(97, (40, 20), generator=generator)
    first = torch.randint(1, 5, (40, 1), generator=generator)
    last = first + torch.randint(1, 16, (40, 1), generator=generator)
    columns = torch.arange(20)
    scored = (columns >= first) & (columns < last)
    scored[5] = False  # a row without any is a sequence of one token
    packed, place, options = share_rows(model.model, ids, scored)
    ends = (last - 1).clamp(min=1)[:, 0].tolist()
    ends[5] = 1
    assert packed.shape[1] == max(ends) and len(packed) < 1.1 * sum(ends) / max(ends) + 1
    taken = [int(place[i, t]) for i, end in enumerate(ends) for t in range(end)]
    assert len(set(taken)) == len(taken)
    for i, end in enumerate(ends):
        assert torch.equal(packed.flatten()[place[i, :end]], ids[i, :end])
        assert torch.equal(options["position_ids"].flatten()[place[i, :end]], columns[:end])
    together, _ = completion_logprobs(model, ids, scored)
    alone = [completion_logprobs(model, ids[i : i + 1], scored[i : i + 1])[0] for i in range(40)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_no_sharing_where_it_costs_more_than_it_saves():
    """Few rows saved, wide rows, and a decoder whose mask does not follow position_ids."""
    model = build(CONFIGS["llama"]).model

    def rows(decoder, ends):
        columns = torch.arange(max(ends) + 1)
        scored = columns == torch.tensor(ends)[:, None]
        return share_rows(decoder, torch.zeros_like(scored, dtype=torch.int64), scored)[0].shape[0]

    assert rows(model, [9, 4, 5]) == 2
    assert rows(model, [9] * 18 + [4, 5]) == 20
    assert rows(model, [300, 4, 5]) == 3
    falcon = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    assert rows(build(falcon).transformer, [9, 4, 5]) == 3
    check_head(build(falcon))


def test_a_model_whose_sequences_see_each_other_is_refused(monkeypatch):
    """As one would be that does not make its mask from position_ids."""
    model = build(CONFIGS["llama"])
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda position_ids=None, **kw: forward(**kw))
    with pytest.raises(UserError, match="attend to each other"):
        check_head(model)


def test_head_bias_and_softcap_reach_the_scorer():
    model = build(CONFIGS["llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.randn(97))
    check_head(model)
    assert lm_head(model).bias is model.lm_head.bias
    assert lm_head(build(CONFIGS["gemma2"])).softcap == 3.0


def test_no_position_still_has_a_graph():
    model = build(CONFIGS["llama"])
    ids = torch.randint(97, (2, 5))
    got, entropy = completion_logprobs(model, ids, torch.zeros(2, 5, dtype=torch.bool))
    (got.sum() + entropy.sum()).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and (g == 0).all() for g in grads)


def test_positions_that_cannot_be_scored():
    model = build(CONFIGS["llama"])
    ids = torch.tensor([[5, 6, 97]])
    with pytest.raises(UserError, match="column 0"):
        completion_logprobs(model, ids, torch.tensor([[True, False, False]]))
    with pytest.raises(UserError, match="outside the vocabulary"):
        completion_logprobs(model, ids, torch.tensor([[False, True, True]]))


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**SIZES, logit_scale=0.25), GraniteConfig(**SIZES, logits_scaling=4.0)],
    ids=["cohere", "granite"],
)
def test_unknown_logit_scales_are_refused(config):
    with pytest.raises(UserError, match="changes its logits"):
        check_head(build(config))


def test_a_model_without_head_is_refused():
    with pytest.raises(UserError, match="no LM head"):
        lm_head(build(CONFIGS["llama"]).model)
