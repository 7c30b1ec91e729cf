"""PPO-RLHF: its equations by hand, its padding and positions, and FSDP against one process."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from algos import ppo_rlhf_fsdp as script
from rlhf import UserError
from rlhf.batches import micro_batches, response_batch
from rlhf.logprobs import completion_logprobs
from rlhf.sampler import Completions
from tests.launch import ROOT, needs_compiler

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def tiny(family: str, tied: bool, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    common = {"tie_word_embeddings": tied, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **common)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=8, **common)).eval()
    if family == "gemma3":
        config = Gemma3TextConfig(**SIZES, **HEADS, head_dim=8, sliding_window=8, **common)
        return Gemma3ForCausalLM(config).eval()
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64, **common)
    return GPT2LMHeadModel(config).eval()


FAMILIES = [(f, t) for f in ("llama", "qwen3", "gemma3", "gpt2") for t in (True, False)]

pytestmark = pytest.mark.usefixtures("group_of_one")


def some_batch(rows: int = 5, T: int = 6, seed: int = 0) -> dict:
    """Prompts of 2 to 6 tokens, responses of 1 to T tokens; the first fills T without an EOS."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 61, (2 + i % 5,), generator=g).tolist() for i in range(rows)]
    lengths = torch.tensor([T, *[1 + (3 * i) % T for i in range(1, rows)]])
    tokens = torch.randint(3, 61, (rows, T), generator=g)
    stopped = torch.arange(rows) > 0
    tokens[stopped, lengths[stopped] - 1] = 2
    done = Completions(tokens, lengths, torch.zeros(rows, T), stopped)
    return response_batch(prompts, done, T)


# EQUATIONS =======================================================================================


def test_score_lands_one_step_after_the_eos():
    logprobs = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -3.0]])
    scores, lengths = torch.tensor([5.0, 7.0]), torch.tensor([2, 4])
    rewards = script.token_rewards(logprobs, ref_logprobs, scores, lengths, kl_coef=0.1)
    # row 0: EOS at t = 1, the score at t = 2; row 1: no room behind the end, so at t = T - 1
    expected = torch.tensor([[-0.1, 0.1, 5.0, 0.0], [0.0, 0.0, 0.0, 7.0 - 0.2]])
    torch.testing.assert_close(rewards, expected)


def test_advantages_of_tokens_by_hand():
    batch = some_batch(rows=2, T=3)
    batch["mask"] = torch.tensor([[True, True, False], [True, True, True]])
    batch["values"] = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])
    rewards = torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
    args = SimpleNamespace(gamma=1.0, gae_lambda=0.5)
    script.compute_advantages(batch, rewards, args)
    # row 0 backwards: 4 - 3 = 1; 3 - 2 + 1/2 = 1.5; 2 - 1 + 0.75 = 1.75. Row 1: 0.5, 0.25, 0.125
    raw = torch.tensor([[1.75, 1.5, 1.0], [0.125, 0.25, 0.5]])
    torch.testing.assert_close(batch["returns"], raw + batch["values"])
    kept = raw[batch["mask"]]
    white = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(batch["advantages"][batch["mask"]], white)
    assert batch["advantages"][0, 2] == 0


def test_whiten_without_shift_keeps_the_mean():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 6.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    out = script.whiten(x, mask, shift_mean=False)
    mean, std = x[mask].mean(), x[mask].std(unbiased=False)
    torch.testing.assert_close(out[mask], (x[mask] - mean) / std + mean)
    assert (out[~mask] == 0).all()


def test_loss_by_hand():
    """One token with the ratio clipped from above, one free; the second state is behind the end."""
    mb = {
        "mask": torch.tensor([[True, True, False]]),
        "value_mask": torch.tensor([[True, True, True]]),
        "logprobs": torch.tensor([[-1.0, -1.0, 0.0]]),
        "advantages": torch.tensor([[2.0, -1.0, 0.0]]),
        "values": torch.tensor([[0.0, 0.0, 0.0]]),
        "returns": torch.tensor([[1.0, 0.1, 1.0]]),
    }
    logprobs = torch.tensor([[-1.0 + math.log(1.5), -1.0 + math.log(0.9), 0.0]])
    values = torch.tensor([[0.5, 0.1, 1.0]])
    args = SimpleNamespace(clip_coef=0.2, vclip_coef=0.2)
    tokens, states = script.token_ppo_loss(logprobs, torch.zeros(1, 3), values, mb, args)
    policy, _, kl, clipped = tokens.tolist()
    assert policy == pytest.approx(-(2 * 1.2) - (-1 * 0.9))
    assert kl == pytest.approx((1.5 - 1 - math.log(1.5)) + (0.9 - 1 - math.log(0.9)))
    assert clipped == 1
    # clipped values: 0.2, 0.1, 0.2; the larger squared errors: 0.64, 0, 0.64
    assert states.item() == pytest.approx(0.5 * (0.64 + 0.0 + 0.64))


def test_a_part_that_does_not_count_adds_nothing():
    """A process with fewer micro-batches repeats a row with empty masks (rlhf/batches.py)."""
    batch = some_batch(rows=1)
    batch |= {name: torch.randn(1, 6) for name in ("advantages", "returns", "values")}
    batch["logprobs"] = torch.full((1, 6), -100.0)
    batch |= {name: torch.zeros(1, 6, dtype=torch.bool) for name in ("mask", "value_mask")}
    logprobs = torch.zeros(1, 6, requires_grad=True)
    tokens, states = script.token_ppo_loss(
        logprobs, torch.zeros(1, 6), torch.zeros(1, 6), batch, script.Args()
    )
    (tokens.sum() + states.sum()).backward()
    assert tokens.tolist() == [0, 0, 0, 0] and states.item() == 0
    assert (logprobs.grad == 0).all()


def test_adaptive_kl_coefficient():
    assert script.adapt_kl_coef(0.1, 9.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert script.adapt_kl_coef(0.1, 6.3, 6.0, 100, 1000) == pytest.approx(0.1 * 1.005)
    assert script.adapt_kl_coef(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)


# POSITIONS AND PADDING ===========================================================================


@pytest.mark.parametrize("family,tied", FAMILIES)
def test_outputs_belong_to_their_tokens(family, tied):
    """Row by row without any padding, with full logits, gives the same log-probs and values."""
    model = tiny(family, tied)
    critic = script.Critic(model, None, False)
    torch.nn.init.normal_(critic.head.weight)
    actor_critic = script.ActorCritic(model, critic)
    batch = some_batch()
    with torch.no_grad():
        logprobs, entropy, values = script.response_tokens(actor_critic, batch, 0.7)
        for i in range(len(batch["mask"])):
            start, n = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
            ids = batch["input_ids"][i : i + 1, : start + n]
            logits = model(input_ids=ids).logits[0].float() / 0.7
            expected = logits.log_softmax(-1)[start - 1 : -1]
            chosen = expected.gather(1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(logprobs[i, :n], chosen, atol=1e-5, rtol=1e-5)
            spread = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(entropy[i, :n], spread, atol=1e-5, rtol=1e-4)
            # the value of step t is read before token t, and once more behind the last token
            states = critic(ids)[0, start - 1 :][: batch["mask"].shape[1]]
            torch.testing.assert_close(values[i, : len(states)], states, atol=1e-5, rtol=1e-4)
            assert (logprobs[i, n:] == 0).all() and (values[i, len(states) :] == 0).all()


def test_pad_content_does_not_matter():
    actor_critic = script.ActorCritic(
        model := tiny("llama", True), script.Critic(model, None, False)
    )
    batch = some_batch()
    wide = dict(batch)
    ends = (batch["prompt_lengths"] + batch["lengths"])[:, None]
    noise = torch.randint(0, 61, (len(ends), batch["input_ids"].shape[1] + 4))
    inside = torch.arange(noise.shape[1]) < ends
    padded = torch.nn.functional.pad(batch["input_ids"], (0, 4))
    wide["input_ids"] = torch.where(inside, padded, noise)
    with torch.no_grad():
        for a, b in zip(
            script.response_tokens(actor_critic, batch, 1.0),
            script.response_tokens(actor_critic, wide, 1.0),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_micro_batches_cover_a_batch_once():
    batch = some_batch(rows=23, T=9)
    lengths = batch["prompt_lengths"] + batch["lengths"]
    seen = []
    for part, rows in micro_batches(batch, budget=40):
        assert part["input_ids"].numel() <= 40 or len(rows) == 1
        assert part["input_ids"].shape[1] == int(lengths[rows].max())
        seen += rows.tolist()
    assert sorted(seen) == list(range(23))


# FIRST MINIBATCH, ACCUMULATION, PROCESSES ========================================================


def prepared(family="llama", tied=True, seed=0):
    """An actor-critic with its reference, and a batch ready for `update`."""
    model = tiny(family, tied, seed)
    critic = script.Critic(model, None, False)
    torch.manual_seed(7)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    return script.ActorCritic(model, critic), script.ActorCritic(tiny(family, tied, seed), None)


def run_update(flags, rank=0, world_size=1, family="llama", tied=True, rows=8):
    """Two epochs on this process's part of a batch; returns whole parameters and metrics."""
    args = script.Args(update_epochs=2, learning_rate=1e-3, kl_coef=0.1, **flags)
    actor_critic, reference = prepared(family, tied)
    mesh = script.init_device_mesh("cpu", (world_size,))
    parameters = script.shard(actor_critic, mesh, args)
    script.shard(reference, mesh, args, frozen=True)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for n, p in parameters.items() if n.startswith(part)]}
            for part in ("model.", "critic.")
        ],
        lr=1e-3,
        eps=1e-5,
    )
    batch = some_batch(rows=rows)
    scores = torch.linspace(-1, 1, rows)[rank::world_size]
    batch = {name: tensor[rank::world_size] for name, tensor in batch.items()}
    script.score_tokens(actor_critic, reference, batch, args)
    first_kl = (batch["logprobs"] - batch["ref_logprobs"]).abs().max()
    rewards = script.token_rewards(
        batch["logprobs"], batch["ref_logprobs"], scores, batch["lengths"], args.kl_coef
    )
    script.compute_advantages(batch, rewards, args)
    torch.manual_seed(3)
    metrics = script.update(actor_critic, optimizer, batch, args)
    whole = {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
    return whole, metrics | {"first_kl": first_kl.item()}, batch


def test_first_minibatch_has_ratio_one_and_kl_zero():
    args = script.Args(temperature=0.7)
    actor_critic, reference = prepared()
    mesh = script.init_device_mesh("cpu", (1,))
    script.shard(actor_critic, mesh, args)
    script.shard(reference, mesh, args, frozen=True)
    batch = some_batch()
    script.score_tokens(actor_critic, reference, batch, args)
    assert torch.equal(batch["logprobs"], batch["ref_logprobs"])
    logprobs, _, values = script.response_tokens(actor_critic, batch, args.temperature)
    assert ((logprobs - batch["logprobs"]).exp() - 1).abs().max() < 1e-6
    assert (values - batch["values"]).abs().max() < 1e-6


def test_gradient_accumulation_is_exact():
    """Micro-batches of any size give the step of the whole batch."""
    whole, metrics, _ = run_update({"micro_batch_tokens": 10_000})
    for budget in (1, 30):
        parts, split, _ = run_update({"micro_batch_tokens": budget})
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4, msg=name)
        for name in ("losses/policy_loss", "losses/value_loss", "losses/approx_kl"):
            assert split[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


def test_activation_checkpointing_changes_nothing():
    plain, _, _ = run_update({})
    recomputed, _, _ = run_update({"activation_checkpointing": True})
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, atol=1e-6, rtol=1e-5, msg=name)


@needs_compiler
def test_compiled_update_is_the_eager_one(monkeypatch):
    """Layers of two types, recomputed ones too; no size falls back to eager code."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    eager, expected, _ = run_update({"micro_batch_tokens": 40}, family="gemma3")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = {"micro_batch_tokens": 40, "activation_checkpointing": True, "compile": True}
    compiled, metrics, _ = run_update(flags, family="gemma3")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_offloaded_reference_gives_the_same_values():
    _, _, batch = run_update({})
    _, _, offloaded = run_update({"offload_frozen": True})
    assert torch.equal(batch["ref_logprobs"], offloaded["ref_logprobs"])


def test_bf16_keeps_float32_weights():
    whole, metrics, _ = run_update({"bf16": True})
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(math.isfinite(value) for value in metrics.values())


TWO_PROCESSES = """
import sys, torch
from algos import ppo_rlhf_fsdp as script
from tests.test_ppo_rlhf import run_update
rank, world_size, _ = script.setup_process("cpu")
family, tied, path = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
whole, metrics, _ = run_update({"micro_batch_tokens": 40}, rank, world_size, family, tied)
if rank == 0:
    torch.save({"whole": whole, "metrics": metrics}, path)
"""


@pytest.mark.parametrize(
    "family,tied",
    [("llama", True), ("llama", False), ("qwen3", True), ("gemma3", True), ("gpt2", True)],
)
def test_two_processes_take_the_step_of_one(family, tied, tmp_path):
    """Parts with unequal token counts, and unequal numbers of micro-batches."""
    program = tmp_path / "two.py"
    program.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(program), family, str(tied)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "out.pt")], check=True, env=environment, timeout=240)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    one, metrics, _ = run_update({}, family=family, tied=tied)
    assert two["whole"].keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two["whole"][name], value, atol=2e-5, rtol=1e-3, msg=name)
    for name in (n for n in metrics if n != "first_kl"):
        assert two["metrics"][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


# WEIGHTS =========================================================================================


@pytest.mark.parametrize("family,tied", FAMILIES)
def test_replica_and_export_equal_the_policy(family, tied, tmp_path):
    args = script.Args(learning_rate=1e-2)
    actor_critic, _ = prepared(family, tied)
    replica = tiny(family, tied, seed=5)  # other weights
    parameters = script.shard(actor_critic, script.init_device_mesh("cpu", (1,)), args)
    script.update_replica(replica, parameters)
    batch = some_batch()
    with torch.no_grad():
        ours = script.response_tokens(actor_critic, batch, 1.0)[0]
        theirs = script.response_tokens(script.ActorCritic(replica, None), batch, 1.0)[0]
    assert torch.equal(ours, theirs)
    replica.save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, replica(ids).logits)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_critic_starts_as_the_normalized_reward_model(tmp_path):
    from rlhf.reward_model import load_reward_model, score_rows
    from tests.test_reward_model import causal_folder

    scorer, _ = load_reward_model(causal_folder(tmp_path / "lm", "llama"), new_head=True)
    scorer.config.score_mean, scorer.config.score_std = 0.3, 2.0
    critic = script.Critic(None, scorer, True)
    rows = [[5, 6, 7, 2], [4, 2]]
    with torch.no_grad():
        for row, expected in zip(rows, score_rows(scorer, rows).tolist(), strict=True):
            assert critic(torch.tensor([row]))[0, -1].item() == pytest.approx(expected, abs=1e-5)


# THE USER'S PARTS ================================================================================


def test_prompt_stream_is_the_same_for_any_number_of_processes(monkeypatch):
    records = [{"id": i} for i in range(10)]
    args = SimpleNamespace(batch_size=4, seed=1)

    def stream(world_size):
        rows = {}
        for update in range(5):
            for rank in range(world_size):
                monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
                monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
                part = script.prompt_batch(records, update, args)
                for i, record in enumerate(part):
                    rows[update * 4 + i * world_size + rank] = record["id"]
        return [rows[i] for i in range(20)]

    one, two = stream(1), stream(2)
    assert one == two
    assert sorted(one[:10]) == sorted(one[10:]) == list(range(10))  # whole epochs
    assert one[:10] != one[10:]


def launch(tmp_path, reward, *flags, processes=2):
    """A short run on a tiny model of our own, with a reward function from a file."""
    from tests.test_reward_model import causal_folder

    folder = causal_folder(tmp_path / "lm", "llama")
    rows = [{"prompt": "a b c"}, {"prompt": "b a"}, {"prompt": "c c b"}, {"prompt": "a c"}] * 3
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "user.py").write_text(reward)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(ROOT / "algos/ppo_rlhf_fsdp.py")]
    command += ["--model", str(folder), "--data", str(tmp_path / "data.jsonl")]
    command += ["--reward", f"{tmp_path / 'user.py'}:f", "--run-dir", str(tmp_path / "run")]
    command += "--batch-size 4 --total-episodes 12 --eval-prompts 4 --response-length 5".split()
    command += ["--save-every", "0", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


NAN_LATER = """
calls = 0
def f(prompts, completions, **columns):
    global calls
    calls += 1
    return [float("nan") if calls > 2 and i == 1 else 1.0 for i in range(len(prompts))]
"""


def test_nan_reward_names_the_prompt_and_keeps_the_checkpoint(tmp_path):
    done = launch(tmp_path, NAN_LATER)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error: " in line and "nan" in line]
    assert lines and "prompt '" in lines[0], done.stderr[-2000:]
    ours = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert not [line for line in ours if "Traceback" in line], ours
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*[0-9]"))
    assert kept and all(script.damage(path) is None for path in kept)


def test_own_reward_and_ragged_responses_run_through(tmp_path):
    """Stops differ between the processes; nothing hangs, and the policy folder loads."""
    reward = "def f(prompts, completions, **c): return [float(len(t)) for t in completions]\n"
    done = launch(tmp_path, reward, "--micro-batch-tokens", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "training.png").stat().st_size > 1000
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("critic_learning_rate", -1e-4),
        ("clip_coef", 0.0),
        ("vclip_coef", -0.2),
        ("kl_coef", -0.05),
        ("kl_target", 0.0),
        ("max_grad_norm", math.nan),
        ("eval_prompts", 0),
        ("response_length", 0),
    ],
)
def test_impossible_values(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: want"):
        script.Args(**{name: value})


def test_log_probabilities_do_not_need_the_wrapper():
    """The wrapper only forwards: the same numbers as the function that it calls."""
    model, batch = tiny("llama", True), some_batch()
    start = batch["prompt_lengths"][:, None]
    columns = torch.arange(batch["input_ids"].shape[1])
    positions = (columns >= start) & (columns < start + batch["lengths"][:, None])
    with torch.no_grad():
        direct, _ = completion_logprobs(model, batch["input_ids"], positions, 0.5)
        wrapped = script.response_tokens(script.ActorCritic(model, None), batch, 0.5)[0]
    torch.testing.assert_close(direct.sum(1), wrapped.sum(1))
