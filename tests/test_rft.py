"""RFT: its loss by hand, what is kept and how it is dealt out, and FSDP against one process."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from algos import rft_fsdp as script
from rlhf import UserError
from rlhf.batches import Response
from rlhf.tasks import Task, prompt_ids
from rlhf.tiny_lm import WarmStart, character_tokenizer
from tests.launch import ROOT, rows
from tests.test_ppo_rlhf import tiny

pytestmark = pytest.mark.usefixtures("group_of_one")

CPU = torch.device("cpu")


def response(text, tokens=(5, 6, 2)):
    return Response(list(tokens), [-1.0] * len(tokens), True, text)


def group(*pairs):
    """Responses to one prompt: pairs of text and score."""
    record = {"prompt": "p", "ids": [3, 4]}
    return [(record, response(text), score) for text, score in pairs]


def some_groups(kept, count=8):
    """`count` responses of 1 to 6 tokens, two to a prompt; the first `kept` of them are right."""
    g = torch.Generator().manual_seed(0)
    groups = []
    for i in range(count):
        ids = torch.randint(3, 61, (2 + i // 2 % 5,), generator=g).tolist()
        tokens = torch.randint(3, 61, (1 + 5 * i % 6,), generator=g).tolist()
        row = ({"ids": ids}, response(f"text {i}", [*tokens[:-1], 2]), float(i < kept))
        groups += [[row]] if i % 2 == 0 else []
        groups[-1] += [row] if i % 2 else []
    return groups


# EQUATIONS =======================================================================================


def test_loss_by_hand():
    """Minus the log-probabilities of the tokens in the mask, over the tokens of the minibatch."""
    mb = {"mask": torch.tensor([[True, True, False], [True, False, False]])}
    logprobs = torch.tensor([[0.5, 0.25, 0.01], [0.1, 0.01, 0.01]]).log()
    entropy = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    loss, mean_entropy = script.token_nll_loss(logprobs, entropy, mb, 3).tolist()
    assert loss == pytest.approx((math.log(2) + math.log(4) + math.log(10)) / 3)
    assert mean_entropy == pytest.approx(2.0)
    # a micro-batch of a minibatch of 6 tokens has its part of the mean
    assert script.token_nll_loss(logprobs, entropy, mb, 6)[0].item() == pytest.approx(loss / 2)


def test_loss_is_that_of_supervised_fine_tuning():
    """transformers' own loss on the response and its EOS, at temperature 1 whatever samples."""
    groups = some_groups(kept=1, count=2)
    _, metrics, _ = run_update(groups, {"temperature": 0.5})
    record, kept, _ = groups[0][0]
    ids = torch.tensor([record["ids"] + kept.tokens])
    labels = ids.clone()
    labels[:, : len(record["ids"])] = -100
    expected = tiny("llama", True)(input_ids=ids, labels=labels).loss.item()
    assert kept.tokens[-1] == 2
    assert metrics["losses/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_row_without_mask_adds_nothing():
    mb = {"mask": torch.zeros(1, 4, dtype=torch.bool)}
    logprobs = torch.full((1, 4), -100.0, requires_grad=True)
    loss, entropy = script.token_nll_loss(logprobs, torch.ones(1, 4), mb, 3)
    loss.backward()
    assert loss.item() == entropy.item() == 0 and (logprobs.grad == 0).all()


# WHAT IS KEPT ====================================================================================


def test_right_and_distinct_responses_are_kept():
    answers = group(("a", 1.0), ("b", 0.0), ("a", 1.0), ("c", 0.9), ("d", 2.0), ("b", 0.0))
    assert script.kept(answers, script.Args()) == [True, False, False, False, True, False]
    every = script.Args(distinct=False, success_score=0.9)
    assert script.kept(answers, every) == [True, False, True, True, True, False]


def test_a_rejected_text_does_not_stand_in_the_way():
    """A reward may judge equal texts differently; the first that is right is kept."""
    assert script.kept(group(("a", 0.0), ("a", 1.0)), script.Args()) == [False, True]


def test_equal_responses_to_different_prompts_are_both_kept():
    groups = [group(("a", 1.0), ("a", 1.0)), group(("a", 1.0), ("b", 0.0))]
    batch, count = script.group_batch(groups, script.Args(), CPU)
    assert count == 2 and batch["mask"].any(1).tolist() == [True, True]


def test_all_demonstrations_are_kept():
    answers = group(("a", 1.0), ("b", 0.0), ("a", 1.0))
    assert script.kept(answers, script.Args(source="demonstrations")) == [True] * 3


@pytest.mark.parametrize("processes,minibatches", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("kept", [0, 1, 3, 5, 8])
def test_kept_rows_are_dealt_out_evenly(kept, processes, minibatches, monkeypatch):
    groups, args = some_groups(kept), script.Args(num_minibatches=minibatches)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    sizes, seen = set(), []
    for rank in range(processes):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        batch, count = script.group_batch(groups, args, CPU)
        assert count == kept
        sizes.add(len(batch["mask"]))
        for i, mask in enumerate(batch["mask"]):
            start, length = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
            assert mask.sum() in (0, length)  # whole responses, or rows that only fill up
            seen += [batch["input_ids"][i, start : start + length].tolist()] * bool(mask.any())
    [size] = sizes  # equally many rows on each process, and in each of its minibatches
    assert size % minibatches == 0 and size >= minibatches
    assert processes * size == max(1, -(-kept // (processes * minibatches))) * (
        processes * minibatches
    )
    right = [r.tokens for group in groups for _, r, score in group if score >= 1]
    assert seen == right  # each once, in order


# UPDATE ==========================================================================================


def run_update(groups, flags, rank=0, world_size=1, updates=1):
    """Updates on this process's part of the groups; returns whole parameters, metrics, Adam."""
    args = script.Args(learning_rate=1e-3, response_length=6, **flags)
    policy = script.Policy(tiny("llama", True))
    parameters = script.shard(policy, script.init_device_mesh("cpu", (world_size,)), args)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    for part in groups if updates > 1 else [groups]:
        batch, _ = script.group_batch(part, args, CPU)
        torch.manual_seed(3)
        metrics = script.update(policy, optimizer, batch, args)
    whole = {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
    moments = {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in parameters.items()}
    return whole, metrics, moments


def test_gradient_accumulation_is_exact():
    """Micro-batches of any size give the step of the whole batch."""
    whole, metrics, _ = run_update(some_groups(5), {"micro_batch_tokens": 10_000})
    for budget in (1, 20):
        parts, split, _ = run_update(some_groups(5), {"micro_batch_tokens": budget})
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4, msg=name)
        for name, value in metrics.items():
            assert split[name] == pytest.approx(value, rel=1e-4), name


TWO_PROCESSES = """
import sys, torch
from algos import rft_fsdp as script
from tests.test_rft import run_update, some_groups
rank, world_size, _ = script.setup_process("cpu")
results = {}
for kept in (5, 1):
    flags = {"micro_batch_tokens": 20, "update_epochs": 2}
    whole, metrics, _ = run_update(some_groups(kept), flags, rank, world_size)
    results[kept] = {"whole": whole, "metrics": metrics}
if rank == 0:
    torch.save(results, sys.argv[1])
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    """5 kept responses: 3 on the first, 2 and one that fills up on the second; 1: 1 and 0."""
    program = tmp_path / "two.py"
    program.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(program), str(tmp_path / "out.pt")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=240)
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for kept in (5, 1):
        one, metrics, _ = run_update(some_groups(kept), {"update_epochs": 2})
        two = results[kept]
        assert metrics["losses/steps"] == 2 and two["whole"].keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(two["whole"][name], value, atol=2e-5, rtol=1e-3, msg=name)
        assert two["metrics"] == pytest.approx(metrics, rel=1e-4)


def test_nothing_right_moves_nothing():
    """A step with zero gradients would: Adam's momentum of the step before is not zero."""
    before, _, moments = run_update(some_groups(5), {})
    after, metrics, same = run_update([some_groups(5), some_groups(0)], {}, updates=2)
    assert metrics == {"losses/steps": 0}
    assert max(moment.abs().max() for moment in moments.values()) > 0
    for name in before:
        assert torch.equal(after[name], before[name]) and torch.equal(same[name], moments[name])


def test_a_minibatch_without_kept_responses_is_no_step():
    _, metrics, _ = run_update(some_groups(1), {"num_minibatches": 4, "update_epochs": 3})
    assert metrics["losses/steps"] == 3


# SOURCES =========================================================================================


@pytest.fixture(scope="module")
def sorting():
    pytest.importorskip("reasoning_gym")
    from rlhf.verifiable import verifiable_task

    tokenizer = character_tokenizer()
    task = verifiable_task("number_sorting", levels=(2, 2), train_size=100, test_size=20)
    for record in task.train:
        record["ids"] = prompt_ids(tokenizer, record["prompt"])
    return task, tokenizer


def demonstrated(task: Task, tokenizer, seed=1, **flags):
    args = script.Args(source="demonstrations", batch_size=400, group_size=4, **flags)
    # no model: nothing is generated
    return script.sample_groups((None, tokenizer), task, task.train, 0, seed, args)


def test_demonstrations_are_as_careless_as_those_of_the_warm_start(sorting):
    tokenizer = sorting[1]
    groups, place, _ = demonstrated(*sorting)
    assert place == 100 and [len(group) for group in groups] == [4] * 100
    for record, demonstration, score in itertools.chain(*groups):
        assert demonstration.stopped and demonstration.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(demonstration.tokens[:-1]) == demonstration.text
        assert score == (demonstration.text == record["answer"])
    right = [score for *_, score in itertools.chain(*groups)]
    assert sum(right) / 400 == pytest.approx(1 - WarmStart().slips, abs=0.1)  # four deviations
    assert len({record["prompt"] for (record, *_), *_ in groups}) == 100


def test_demonstrations_follow_from_the_seed(sorting):
    def texts(seed):
        return [r.text for _, r, _ in itertools.chain(*demonstrated(*sorting, seed=seed)[0])]

    assert texts(1) == texts(1) != texts(2)


def test_long_demonstrations_are_cut_off(sorting):
    groups, _, _ = demonstrated(*sorting, response_length=5)
    for _, demonstration, score in itertools.chain(*groups):
        assert len(demonstration.tokens) == 5 and not demonstration.stopped
        assert len(demonstration.text) == 5 and score == 0


@pytest.mark.parametrize("other", [{"model": "x"}, {"model": "x", "data": "y", "reward": "z:f"}])
def test_demonstrations_are_only_of_the_built_in_model(other):
    with pytest.raises(UserError, match="--source demonstrations"):
        script.Args(source="demonstrations", **other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("warmup_updates", -1),
        ("success_score", math.nan),
        ("eval_prompts", 0),
        ("group_size", 0),
        ("reward_timeout", -1.0),
    ],
)
def test_impossible_values(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: want"):
        script.Args(**{name: value})


def launch(tmp_path, name, reward, *flags):
    """Six updates of a tiny random model; returns scores, counts kept, weights before and after."""
    from tests.test_reward_model import causal_folder

    folder = causal_folder(tmp_path / "lm", "llama")
    prompts = [{"prompt": "a b c"}, {"prompt": "b a"}, {"prompt": "c c b"}, {"prompt": "a c"}] * 3
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "user.py").write_text(reward)
    command = [sys.executable, str(ROOT / "algos/rft_fsdp.py"), "--model", str(folder)]
    command += ["--data", str(tmp_path / "data.jsonl"), "--reward", f"{tmp_path / 'user.py'}:f"]
    command += "--batch-size 16 --group-size 4 --total-episodes 96 --eval-prompts 2".split()
    command += "--eval-samples 2 --response-length 5 --learning-rate 0.03".split()
    command += ["--run-dir", str(tmp_path / name), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=240)
    scores = [v for _, key, v in rows(tmp_path / name) if key == "charts/score"]
    kept = [v for _, key, v in rows(tmp_path / name) if key == "charts/kept_responses"]
    weights = load_file(tmp_path / name / "policy" / "model.safetensors")
    return scores, kept, weights, load_file(folder / "model.safetensors")


SHORTER = "def f(prompts, completions, **c): return [1 - len(t) / 1000 for t in completions]\n"


def test_who_samples(tmp_path):
    """RFT samples from the starting model in all updates; online RFT, from what it has become."""
    # nobody is right: nothing moves, so this is what the starting model samples
    still, kept, weights, start = launch(tmp_path, "still", SHORTER)
    assert kept == [0.0] * 6 and len(still) == 6 and weights.keys() == start.keys()
    assert all(torch.equal(weights[name], start[name]) for name in start)
    logged = {key for _, key, _ in rows(tmp_path / "still")}
    assert "losses/steps" in logged and "losses/loss" not in logged

    right = ("--success-score", "0.975")  # at most 25 characters
    offline, kept, weights, _ = launch(tmp_path, "offline", SHORTER, *right)
    assert offline == still and min(kept) > 0
    assert not all(torch.equal(weights[name], start[name]) for name in start)
    online, _, _, _ = launch(tmp_path, "online", SHORTER, *right, "--source", "policy")
    assert online[0] == still[0] and online[1:] != still[1:]
    assert sum(online) > sum(still)  # it learns, and the starting model does not
