"""rlhf/sampler.py against model.generate, against the scorer and against exact probabilities."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf import UserError, sampler
from rlhf.logprobs import completion_logprobs
from rlhf.sampler import (
    SlotCache,
    generate,
    llama_like,
    llama_step,
    plain_step,
    sample,
    sampling_weights,
    slots_within,
)

VOCAB, PAD, STOP = 97, 0, 2
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=STOP,
)
MIXED = dict(
    head_dim=16,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        eos_token_id=STOP,
        bos_token_id=1,
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, **MIXED, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**SIZES, **MIXED),
}


def build(name: str, dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()


def make_prompts(lengths=(3, 1, 9, 9, 2, 12, 5)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def transformers_greedy(model, prompt, limit, stop=STOP) -> list[int]:
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=limit, eos_token_id=stop, pad_token_id=PAD)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def rows(done) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(done.tokens, done.lengths, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("slots", [None, 3, 1])
def test_greedy_equals_generate_on_ragged_prompts(name, slots):
    """Rows stop at different lengths, so with few slots every slot is refilled."""
    model, prompts = build(name), make_prompts()
    prompts = prompts[:3] if slots == 1 else prompts
    limits = [20, 3, 14, 1, 20, 7, 11][: len(prompts)]
    done = generate(
        model,
        prompts,
        max_new_tokens=limits,
        stop_ids=[STOP],
        pad_id=PAD,
        temperature=0,
        slots=slots,
    )
    want = [transformers_greedy(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert rows(done) == want
    assert len({tuple(row[:3]) for row in want if len(row) >= 3}) > 1  # not one constant answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_step_equals_the_models_own_forward(name, dtype):
    """40 rows of different lengths (three groups), and norms that are not all ones."""
    model = build(name, dtype).model if name != "gpt2" else build(name, dtype).transformer
    assert llama_like(model) == (name in ("llama", "llama-tied", "qwen2", "qwen3-tied"))
    if not llama_like(model):
        return
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases
            parameter.data.uniform_(0.5, 1.5)
    caches = [SlotCache(40, 30), SlotCache(40, 30)]
    for columns in (torch.zeros(40, dtype=torch.int64), torch.arange(40) % 29 + 1):
        tokens = torch.randint(VOCAB, (40,))
        with torch.inference_mode():
            states = [
                step(model, cache, tokens, columns, int(columns.max()) + 1)
                for step, cache in zip((plain_step, llama_step), caches, strict=True)
            ]
        exact = dtype == torch.float32
        error = (states[1] - states[0]).float().abs()
        assert error.max() < 1e-4 if exact else error.mean() < 0.02
    hook = model.layers[0].register_forward_hook(lambda *args: None)
    assert not llama_like(model)
    hook.remove()
    assert not llama_like(model.half())


def test_stop_token_ends_a_row():
    """Take as stop ids tokens that greedy decoding meets in the middle of some rows."""
    model, prompts = build("llama"), make_prompts()
    free = [transformers_greedy(model, p, 16) for p in prompts]
    stops = [free[0][4], free[5][9]]
    done = generate(
        model, prompts, max_new_tokens=16, stop_ids=stops, pad_id=PAD, temperature=0, slots=2
    )
    assert done.stopped.any() and not done.stopped.all()
    for i, row in enumerate(free):
        first = next((t for t, token in enumerate(row) if token in stops), None)
        length = 16 if first is None else first + 1
        assert done.lengths[i] == length
        assert done.stopped[i] == (first is not None)
        assert done.tokens[i, :length].tolist() == row[:length]
        assert (done.tokens[i, length:] == PAD).all()
        assert (done.logprobs[i, length:] == 0).all()
    assert done.tokens.shape == done.logprobs.shape == (7, int(done.lengths.max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3"])
def test_logprobs_equal_a_scorer_pass(name):
    """Also with top-k and top-p on: log-probabilities are those before truncation."""
    model, prompts = build(name), make_prompts()
    done = generate(
        model,
        prompts,
        max_new_tokens=12,
        stop_ids=[STOP],
        pad_id=PAD,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        slots=3,
        generator=torch.Generator().manual_seed(0),
    )
    width = 12 + max(map(len, prompts))
    ids = torch.full((len(prompts), width), -1)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows(done), strict=True)):
        ids[i, : len(prompt) + len(row)] = torch.tensor(prompt + row)
        scored[i, len(prompt) : len(prompt) + len(row)] = True
    with torch.no_grad():
        want, _ = completion_logprobs(model, ids, scored, temperature=0.6)
    for i, (prompt, n) in enumerate(zip(prompts, done.lengths, strict=True)):
        torch.testing.assert_close(
            done.logprobs[i, :n], want[i, len(prompt) : len(prompt) + n], rtol=1e-4, atol=1e-4
        )
    with pytest.raises(AssertionError):  # the temperature matters
        cold = completion_logprobs(model, ids, scored, temperature=1.0)[0]
        torch.testing.assert_close(cold, want, rtol=1e-2, atol=1e-2)


def test_equal_prompts_share_one_prefill():
    """A group of one prompt is read once, and its rows are sampled independently."""
    model = build("llama")
    prompts = [p for p in make_prompts((4, 6)) for _ in range(8)]
    batches = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    options = dict(max_new_tokens=6, stop_ids=[STOP], pad_id=PAD)
    greedy = rows(generate(model, prompts, temperature=0, **options))
    hook.remove()
    assert batches[0] == (2, 6)
    for i in (0, 8):
        assert greedy[i : i + 8] == [transformers_greedy(model, prompts[i], 6)] * 8
    drawn = rows(generate(model, prompts, generator=torch.Generator().manual_seed(0), **options))
    assert len(set(map(tuple, drawn))) > 8


def test_long_prefill_is_cut_into_micro_batches(monkeypatch):
    model, prompts = build("gemma3"), make_prompts()
    options = dict(max_new_tokens=5, stop_ids=[STOP], pad_id=PAD, temperature=0)
    want = rows(generate(model, prompts, **options))
    monkeypatch.setattr("rlhf.sampler.PREFILL_TOKENS", 18)
    sizes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert rows(generate(model, prompts, **options)) == want
    hook.remove()
    assert max(sizes) <= 18 and len([s for s in sizes if s > 7]) >= 3


def chi_square(counts, probs) -> float:
    """Statistic over the words with a chance; a word without one must never occur."""
    assert counts[probs == 0].sum() == 0
    expected = counts.sum() * probs[probs > 0]
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 0.8)])
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """40000 draws from 12 words; 11 degrees of freedom, 99.9 % quantile 31.3."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4))
    probs = (logits / temperature).softmax(-1)
    want = probs.clone()
    if top_k:
        want[probs.argsort()[:-top_k]] = 0
        want /= want.sum()
    if top_p < 1:  # the smallest set of words that reaches top_p
        order, mass = want.argsort(descending=True), 0.0
        for word in order.tolist():
            mass, want[word] = mass + want[word].item(), 0 if mass >= top_p else want[word]
        want /= want.sum()
        assert 1 < (want > 0).sum() < top_k
    tokens, logprobs = sample(
        logits.expand(40000, 12), temperature, top_k, top_p, torch.Generator().manual_seed(5)
    )
    assert chi_square(torch.bincount(tokens, minlength=12), want) < 31.3
    if not top_k:
        assert chi_square(torch.bincount(tokens, minlength=12), logits.softmax(-1)) > 31.3 or (
            temperature == 1
        )
    torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_whole_sequences_follow_the_model():
    """First two tokens of 6000 rows (refilled slots) against exact joint probabilities."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "vocab_size": 5, "initializer_range": 0.2})
    model, prompt, stop = AutoModelForCausalLM.from_config(config).eval(), [3, 4, 3], STOP
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[*prompt, a] for a in range(5)])).logits[:, -1].softmax(-1)
    joint = first[:, None] * second
    joint[stop] = 0
    joint[stop, 0] = first[stop]  # a row that stopped at once, with pad 0 behind it
    done = generate(
        model,
        [prompt] * 6000,
        max_new_tokens=2,
        stop_ids=[stop],
        pad_id=0,
        slots=500,
        generator=torch.Generator().manual_seed(1),
    )
    counts = torch.bincount(done.tokens[:, 0] * 5 + done.tokens[:, 1], minlength=25)
    assert chi_square(counts, joint.flatten()) < 45.3  # 20 degrees of freedom, 99.9 %


def test_seed_and_result_are_ordinary():
    """Same generator, same completions; the model keeps its mode; results enter autograd."""
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    options = dict(max_new_tokens=8, stop_ids=[STOP], pad_id=PAD, slots=3)
    runs = [
        generate(model, make_prompts(), generator=torch.Generator().manual_seed(s), **options)
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert rows(runs[0]) != rows(runs[2])
    assert [module.training for module in model.modules()] == modes
    model(runs[0].tokens).logits.sum().backward()
    weight = torch.ones((), requires_grad=True)
    (weight * runs[0].logprobs).sum().backward()
    assert weight.grad == runs[0].logprobs.sum()


def test_generation_config_is_ignored():
    model = build("llama")
    options = dict(max_new_tokens=8, stop_ids=[STOP], pad_id=PAD, temperature=0)
    want = rows(generate(model, make_prompts(), **options))
    model.generation_config.update(min_new_tokens=5, repetition_penalty=3.0, suppress_tokens=[5])
    assert rows(generate(model, make_prompts(), **options)) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2"])  # qwen2 has biases
def test_sampling_weights_change_no_value(name, dtype):
    """The same hidden states inside as outside, and behind it the weights and methods of before."""
    model, ids = build(name, dtype).base_model, torch.tensor([make_prompts()[5]])
    before = {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    forwards = [m.forward.__func__ for m in model.modules()]
    with torch.inference_mode():
        want = model(ids).last_hidden_state
        with sampling_weights(model):
            changed = sum(m.forward.__class__ is partial for m in model.modules())
            found = model(ids).last_hidden_state
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    packs = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert changed == (linears if packs else 0)
    torch.testing.assert_close(found, want)
    assert {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()} == before
    assert [m.forward.__func__ for m in model.modules()] == forwards


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bf16(name):
    """Log-probabilities are float32 and near the exact ones of the same bf16 weights."""
    model, prompts = build(name, torch.bfloat16), make_prompts()
    done = generate(model, prompts, max_new_tokens=6, stop_ids=[STOP], pad_id=PAD, slots=3)
    assert done.logprobs.dtype == torch.float32
    model.float()
    for prompt, row, logprobs in zip(prompts, rows(done), done.logprobs, strict=True):
        ids = torch.tensor([prompt + row])
        scored = torch.arange(ids.shape[1])[None] >= len(prompt)
        want = completion_logprobs(model, ids, scored)[0][0, len(prompt) :]
        assert (logprobs[: len(row)] - want).abs().mean() < 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[5], []]), "prompt 1 is empty"),
        (dict(prompts=[[5], [97]]), "prompt 1 has an id outside 0 to 96"),
        (dict(prompts=[[5] * 50], max_new_tokens=15), "more than the 64 positions"),
        (dict(max_new_tokens=0), "want at least 1"),
        (dict(max_new_tokens=[4]), "1 values in max_new_tokens for 2 prompts"),
        (dict(stop_ids=[]), "stop_ids is empty"),
        (dict(stop_ids=[97]), "ids go from 0 to 96"),
        (dict(temperature=-1.0), "temperature >= 0"),
        (dict(top_p=0.0), "0 < top_p <= 1"),
        (dict(slots=0), "slots >= 1"),
        (dict(cache_gb=-1.0), "cache_gb is -1.0"),
        (dict(cache_gb=float("nan")), "cache_gb is nan"),
    ],
)
def test_bad_requests_are_one_line(change, message):
    request = dict(prompts=[[5], [6, 7]], max_new_tokens=4, stop_ids=[STOP], pad_id=PAD) | change
    with pytest.raises(UserError, match=message) as error:
        generate(build("llama"), **request)
    assert "\n" not in str(error.value)


def test_the_last_position_can_be_used():
    """Prompt and completion fill the model's positions exactly."""
    model = build("gpt2")
    prompt = make_prompts((50,))
    done = generate(model, prompt, max_new_tokens=14, stop_ids=[STOP], pad_id=PAD, temperature=0)
    assert rows(done) == [transformers_greedy(model, prompt[0], 14)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_sampling_stays_within_its_gigabytes(name, monkeypatch):
    """As many rows at once as fit, never fewer than one; greedy tokens do not depend on it."""
    made = []

    class Recorded(SlotCache):
        def __init__(self, slots, columns):
            super().__init__(slots, columns)
            made.append(self)

    monkeypatch.setattr(sampler, "SlotCache", Recorded)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    prompts = [[5 + i, 9, 11] for i in range(7)]
    options = dict(max_new_tokens=6, stop_ids=[STOP], pad_id=PAD, temperature=0)
    want = generate(model, prompts, **options)
    one = sum(x.nbytes for x in (*made[0].keys, *made[0].values)) // len(prompts)
    columns, words = made[0].columns, 20 * VOCAB
    assert made[0].slots == len(prompts)
    for rows, slots in ((3.5, 3), (float("inf"), 7), (0.1, 1)):
        got = generate(model, prompts, cache_gb=rows * (one + words) / 1e9, **options)
        assert made[-1].slots == slots
        assert torch.equal(got.tokens, want.tokens)
    assert slots_within(3.5 * (one + words) / 1e9, model, columns) == 3
    assert slots_within(3.5 * (one / 2 + words) / 1e9, model.bfloat16(), columns) == 3
    assert slots_within(0, model, columns) == int(4e9 / (one / 2 + words))
