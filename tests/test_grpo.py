"""GRPO: its equations by hand and on a tabular policy, groups, sampling, and one process against
two. The pitfalls of papers/grpo.md, section 7, are named where a test guards against one."""

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from algos import grpo_fsdp as script
from rlhf import UserError
from rlhf.batches import Response, micro_batches, response_batch, split, stack
from rlhf.lora import choose_trained, merged
from rlhf.sft import save_folder
from rlhf.tiny_lm import build_model, build_tokenizer, character_tokenizer
from tests.launch import ROOT, assert_same_run, checkpoints
from tests.test_ppo_rlhf import some_batch, tiny
from tests.test_reward_model import causal_folder

HOW = ["sequence", "token", "constant"]

pytestmark = pytest.mark.usefixtures("group_of_one")


# ADVANTAGES ======================================================================================

SCORES = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 1.0]])
CENTERED = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [2.0, -1.0, -1.0, 0.0]])


def test_advantages_by_hand():
    # squares of the rows sum to 1, 0 and 6, over G - 1 = 3
    std = torch.tensor([[math.sqrt(1 / 3)], [0.0], [math.sqrt(2)]])
    found = script.group_advantages(SCORES, "group")
    torch.testing.assert_close(found, CENTERED / (std + 1e-4))
    assert torch.equal(script.group_advantages(SCORES, "none"), CENTERED)
    # all 12 scores: sum 10, sum of squares 16
    std = math.sqrt((16 - 10**2 / 12) / 11)
    found = script.group_advantages(SCORES, "batch")
    torch.testing.assert_close(found, CENTERED / (std + 1e-4))


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_group_of_equal_scores_gets_exact_zeros(scale):
    """Pitfall 6. Dividing a rounded mean by 1e-4 would give 0.005 in place of 0."""
    for size in range(2, 17):
        for score in (0.1, 0.7, 1 / 3, 5.1, -1.0, 1e6):
            scores = torch.tensor([[score] * size, [0.0] * (size - 1) + [1.0]])
            assert (script.group_advantages(scores, scale)[0] == 0).all(), (size, score)


def test_rloo_differs_from_the_group_mean_by_a_factor():
    """RLOO's baseline is the mean of the others: G / (G - 1) times R_i - mean R."""
    for size in (2, 4, 7):
        scores = torch.rand(5, size, dtype=torch.float64)
        others = (scores.sum(1, keepdim=True) - scores) / (size - 1)
        ours = script.group_advantages(scores, "none") * size / (size - 1)
        torch.testing.assert_close(ours, scores - others)


def test_overlong_penalty_by_hand():
    """DAPO, eq. (13): 0 up to T - c, then linear, 1 at T."""
    lengths = torch.tensor([1, 16, 17, 18, 20])
    found = script.overlong_penalty(lengths, 20, 4).tolist()
    assert found == [0, 0, 0.25, 0.5, 1]
    assert script.overlong_penalty(lengths, 20, 0).tolist() == [0] * 5
    assert script.overlong_penalty(lengths, 20, 20).tolist() == pytest.approx(
        [0.05, 0.8, 0.85, 0.9, 1]
    )


# THE LOSS BY HAND ================================================================================


def arguments(**flags):
    """Settings of a loss without KL penalty, of at most 5 tokens."""
    return script.Args(**{"kl_coef": 0.0, "response_length": 5} | flags)


def hand_made(ratios, advantages, mask=None, **changes):
    """(logprobs, micro-batch) with these ratios (M, T) to the old policy, which sampled."""
    ratios = torch.tensor(ratios)
    old = torch.linspace(-2, -1, ratios.numel()).view(ratios.shape)
    mask = torch.ones(ratios.shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    mb = {"mask": mask, "advantages": torch.tensor(advantages), "logprobs": old}
    mb |= {"sampled_logprobs": old.clone()}
    return (old + ratios.log()).requires_grad_(), mb | changes


def loss_of(logprobs, mb, args, rows=None, tokens=None):
    rows, tokens = rows or int(mb["mask"].any(1).sum()), tokens or int(mb["mask"].sum())
    found = script.token_grpo_loss(logprobs, torch.zeros_like(logprobs), mb, rows, tokens, args)
    names = "loss policy_loss kl entropy approx_kl low high mismatch".split()
    return dict(zip(names, found, strict=True))


# row 0: three tokens with A = 1: 1.5 is cut to 1.28, 0.5 is not; row 1: one token with A = -2,
# 0.5 is cut to 0.8
RATIOS, ADVANTAGES = [[1.5, 0.5, 1.0], [0.5, 9.0, 9.0]], [1.0, -2.0]
MASK = [[1, 1, 1], [1, 0, 0]]
BY_HAND = {
    "sequence": ((-1.28 - 0.5 - 1.0) / 3 + 2 * 0.8) / 2,
    "token": (-1.28 - 0.5 - 1.0 + 2 * 0.8) / 4,
    "constant": (-1.28 - 0.5 - 1.0 + 2 * 0.8) / (2 * 5),
}


@pytest.mark.parametrize("how", HOW)
def test_loss_by_hand(how):
    args = arguments(loss_aggregation=how, clip_coef_high=0.28)
    logprobs, mb = hand_made(RATIOS, ADVANTAGES, MASK)
    found = loss_of(logprobs, mb, args)
    assert found["loss"].item() == pytest.approx(BY_HAND[how], rel=1e-6)
    assert found["policy_loss"].item() == found["loss"].item()
    assert found["low"].item() == found["high"].item() == 1 / 4
    drift = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.0, 0.5)]
    assert found["approx_kl"].item() == pytest.approx(sum(drift) / 4, rel=1e-5)
    # a token whose ratio is cut has no gradient, one behind the end neither
    found["loss"].backward()
    assert (logprobs.grad != 0).tolist() == [[False, True, True], [False, False, False]]


def test_clip_bounds_are_apart():
    """A ratio of 1.25 is cut with eps_high 0.2, which is eps, and free with DAPO's 0.28."""
    logprobs, mb = hand_made([[1.25, 0.75]], [1.0])
    assert loss_of(logprobs, mb, arguments())["loss"].item() == pytest.approx(-(1.2 + 0.75) / 2)
    wide = arguments(clip_coef_high=0.28)
    assert loss_of(logprobs, mb, wide)["loss"].item() == pytest.approx(-(1.25 + 0.75) / 2)
    logprobs, mb = hand_made([[1.25, 0.75]], [-1.0])  # the bound below is eps in both
    assert loss_of(logprobs, mb, wide)["loss"].item() == pytest.approx((1.25 + 0.8) / 2)
    zero = arguments(clip_coef=0.1, clip_coef_high=0.0)
    assert loss_of(logprobs, mb, zero)["loss"].item() == pytest.approx((1.25 + 0.9) / 2)


def test_clip_fractions_count_lost_gradients_only():
    """Outside the bounds on the side where the minimum is the free part, nothing is clipped."""
    logprobs, mb = hand_made([[0.5, 1.5], [0.5, 1.5]], [1.0, -1.0])
    found = loss_of(logprobs, mb, arguments())
    assert found["low"].item() == found["high"].item() == 1 / 4
    found["loss"].backward()
    assert (logprobs.grad != 0).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("how", HOW)
def test_kl_penalty_by_hand(how):
    logprobs, mb = hand_made([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], [[1, 1], [1, 0]])
    mb["ref_logprobs"] = logprobs.detach() + torch.tensor([[0.5, -1.0], [2.0, 50.0]])
    k3 = [math.exp(x) - x - 1 for x in (0.5, -1.0, 2.0)]
    found = loss_of(logprobs, mb, arguments(loss_aggregation=how, kl_coef=0.3))
    means = {"sequence": ((k3[0] + k3[1]) / 2 + k3[2]) / 2, "token": sum(k3) / 3}
    means["constant"] = sum(k3) / (2 * 5)
    assert found["loss"].item() == pytest.approx(0.3 * means[how], rel=1e-5)
    assert found["policy_loss"].item() == 0
    assert found["kl"].item() == pytest.approx(sum(k3) / 3, rel=1e-5)


def test_kl_penalty_does_not_overflow():
    logprobs, mb = hand_made([[1.0, 1.0]], [0.0])
    mb["ref_logprobs"] = logprobs.detach() + torch.tensor([[500.0, -500.0]])
    found = loss_of(logprobs, mb, arguments(kl_coef=0.04))
    found["loss"].backward()
    assert found["loss"].isfinite() and logprobs.grad.isfinite().all()


def test_truncated_importance_sampling_by_hand():
    """Eq. (6): the first part only, min(pi_old / pi_sampler, C), a constant for the gradient."""
    logprobs, mb = hand_made([[1.0, 1.1, 0.9]], [1.0])
    weights = torch.tensor([[0.5, 1.5, 9.0]])
    mb["sampled_logprobs"] = mb["logprobs"] - weights.log()
    mb["ref_logprobs"] = logprobs.detach() + 0.1
    found = loss_of(logprobs, mb, arguments(tis_cap=2.0, kl_coef=0.5))
    expected = -(0.5 * 1.0 + 1.5 * 1.1 + 2.0 * 0.9) / 3
    assert found["policy_loss"].item() == pytest.approx(expected, rel=1e-5)
    k3 = math.exp(0.1) - 0.1 - 1
    assert found["loss"].item() == pytest.approx(expected + 0.5 * k3, rel=1e-4)
    assert found["mismatch"].item() == pytest.approx(weights.log().abs().mean().item(), rel=1e-5)
    found["policy_loss"].backward()
    by_token = -torch.tensor([[0.5 * 1.0, 1.5 * 1.1, 2.0 * 0.9]]) / 3
    torch.testing.assert_close(logprobs.grad, by_token)


def test_truncated_importance_sampling_is_nothing_where_the_sampler_is_exact():
    """Not even a last bit changes; without mb["logprobs"] the current policy is the old one."""
    logprobs, mb = hand_made(RATIOS, ADVANTAGES, MASK)
    plain, weighted = (loss_of(logprobs, mb, arguments(tis_cap=c)) for c in (None, 2.0))
    assert torch.equal(plain["loss"], weighted["loss"]) and weighted["mismatch"] == 0
    del mb["logprobs"]
    mb["sampled_logprobs"] = logprobs.detach() - math.log(1.5)
    found = loss_of(logprobs, mb, arguments(tis_cap=2.0))["loss"]
    assert found.item() == pytest.approx(1.5 * (-1.0 + 2.0) / 2, rel=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_a_part_that_does_not_count_adds_nothing(how):
    """A process with fewer micro-batches repeats a row with empty masks (rlhf/batches.py)."""
    logprobs, mb = hand_made([[9.0, 1e9]], [7.0], [[0, 0]])
    mb |= {"ref_logprobs": torch.tensor([[50.0, -50.0]])}
    mb |= {"sampled_logprobs": torch.tensor([[-90.0, 90.0]])}
    args = arguments(loss_aggregation=how, kl_coef=1.0, tis_cap=2.0)
    found = loss_of(logprobs, mb, args, rows=4, tokens=9)
    assert all(value == 0 for value in found.values())
    found["loss"].backward()
    assert (logprobs.grad == 0).all()


@pytest.mark.parametrize("how", HOW)
def test_loss_of_parts_adds_up(how):
    """The counts are those of the whole minibatch, whatever part a process holds."""
    args = arguments(loss_aggregation=how, kl_coef=0.1)
    logprobs, mb = hand_made(RATIOS, ADVANTAGES, MASK)
    mb["ref_logprobs"] = logprobs.detach() - 0.3
    whole = loss_of(logprobs, mb, args)
    parts = [
        loss_of(logprobs[i : i + 1], {n: t[i : i + 1] for n, t in mb.items()}, args, 2, 4)
        for i in range(2)
    ]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-6)


# TABULAR POLICY ==================================================================================
# Five outcomes of one token: expectations are sums over all of them, gradients exact in float64.


@pytest.fixture
def tabular():
    g = torch.Generator().manual_seed(0)
    theta, ref = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    return theta.requires_grad_(), ref.log_softmax(0)


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def expected_loss(theta, ref, args, scores=None, old=None):
    """Mean of the script's loss over all outcomes, drawn from the old policy."""
    logprobs = theta.log_softmax(0)
    old = logprobs.detach() if old is None else old
    total = 0
    for i in range(len(theta)):
        mb = {"mask": torch.ones(1, 1, dtype=torch.bool), "ref_logprobs": ref[i].view(1, 1)}
        mb |= {"logprobs": old[i].view(1, 1), "sampled_logprobs": old[i].view(1, 1)}
        mb["advantages"] = torch.zeros(1) if scores is None else scores[i : i + 1]
        total = total + old[i].exp() * loss_of(logprobs[i].view(1, 1), mb, args)["loss"]
    return total


def test_gradients_of_the_kl_estimators(tabular):
    """Sheet, 3.2: as a loss, k1 has none, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    theta, ref = tabular
    logprobs = theta.log_softmax(0)
    p, x = logprobs.detach().exp(), logprobs - ref
    forward = (logprobs.exp() * x).sum()  # KL(pi || ref)
    reverse = (ref.exp() * -x).sum()  # KL(ref || pi)
    k1, k2, k3 = x, x**2 / 2, (-x).exp() + x - 1
    torch.testing.assert_close((p * k1).sum(), forward)  # the right values
    torch.testing.assert_close((p * k3).sum(), forward)
    zero = torch.zeros_like(theta)
    torch.testing.assert_close(gradient((p * k1).sum(), theta), zero, atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient((p * k2).sum(), theta), gradient(forward, theta))
    torch.testing.assert_close(gradient((p * k3).sum(), theta), gradient(reverse, theta))
    assert (gradient(forward, theta) - gradient(reverse, theta)).abs().max() > 0.01


def test_kl_part_of_the_loss_is_k3(tabular):
    theta, ref = tabular
    logprobs = theta.log_softmax(0)
    found = expected_loss(theta, ref, arguments(kl_coef=0.3))
    torch.testing.assert_close(found, 0.3 * (logprobs.exp() * (logprobs - ref)).sum())
    reverse = (ref.exp() * (ref - logprobs)).sum()
    torch.testing.assert_close(gradient(found, theta), 0.3 * gradient(reverse, theta))


def test_expected_gradient_is_that_of_the_score(tabular):
    """On-policy, and from another policy where no ratio is cut: importance sampling."""
    theta, ref = tabular
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    wanted = -gradient((theta.softmax(0) * scores).sum(), theta)
    args = arguments(clip_coef=0.5, clip_coef_high=50.0)
    found = expected_loss(theta, ref, args, scores)
    torch.testing.assert_close(gradient(found, theta), wanted)
    near = (theta.detach() + torch.tensor([0.1, -0.1, 0.0, 0.2, -0.2])).log_softmax(0)
    torch.testing.assert_close(
        gradient(expected_loss(theta, ref, args, scores, near), theta), wanted
    )
    with pytest.raises(AssertionError):  # the bounds are what biases it
        tight = arguments(clip_coef=0.01)
        torch.testing.assert_close(
            gradient(expected_loss(theta, ref, tight, scores, near), theta), wanted
        )


# THE STEP ========================================================================================

T = 6


def trainable(args, family="llama", mesh=None, ref_seed=1):
    """A policy with its parameters, and a reference with other weights."""
    policy, reference = (script.Policy(tiny(family, True, s)) for s in (0, ref_seed))
    choose_trained(policy.model, args.train, args.lora_rank, args.seed)
    mesh = mesh or script.init_device_mesh("cpu", (1,))
    script.shard(reference, mesh, args, frozen=True)
    return policy, script.shard(policy, mesh, args), reference


def grouped_batch(rows=8, advantages=None):
    """Ragged responses with advantages that sum to 0 over neighbours, and noise of a sampler."""
    batch = some_batch(rows, T)
    g = torch.Generator().manual_seed(4)
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 0.0])[:rows]
    batch["sampled_logprobs"] = -4 + 0.3 * torch.randn(rows, T, generator=g)
    return batch


def run_update(flags, old=False, filtered=False, mesh=None, lr=1.0):
    """One call of update with plain gradient descent. Returns the move of all weights, metrics."""
    flags = {"kl_coef": 0.1, "max_grad_norm": 1e9, "tis_cap": 2.0, "response_length": T} | flags
    args = script.Args(**flags)
    policy, trained, reference = trainable(args, mesh=mesh)
    parameters = dict(policy.named_parameters())  # the frozen ones too
    batch = grouped_batch()
    if filtered:
        batch["stopped"][3] = False
        batch["mask"] &= batch["stopped"][:, None]  # rows 0 and 3 were cut off
    batch = {name: torch.stack(script.share(list(rows))) for name, rows in batch.items()}
    script.score_tokens(policy, reference, batch, args)
    if old:
        batch["logprobs"] = batch["sampled_logprobs"] * batch["mask"]
    policy.reshard()
    before = {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
    torch.manual_seed(3)
    metrics = script.update(policy, torch.optim.SGD(list(trained.values()), lr=lr), batch, args)
    after = {name: p.full_tensor().detach() for name, p in parameters.items()}
    return {name: after[name] - before[name] for name in before}, metrics


def relative_difference(one, other):
    assert one.keys() == other.keys()
    a, b = (torch.cat([moves[name].flatten().double() for name in one]) for moves in (one, other))
    assert a.norm() > 1e-3
    return ((a - b).norm() / a.norm()).item()


# Without rounding the step of weights near 1 could not be seen to 1e-6 in float32: lr 1,000.
SETTINGS = [
    ({"loss_aggregation": how}, old, filtered)
    for how in HOW
    for old in (False, True)
    for filtered in (False, True)
]


def all_moves(budget, mesh=None):
    return [
        run_update(flags | {"micro_batch_tokens": budget}, old, filtered, mesh, lr=1000.0)
        for flags, old, filtered in SETTINGS
    ]


@pytest.fixture(scope="module")
def whole_moves():
    return all_moves(10_000)


def assert_equal_moves(ours, theirs):
    for (moves, metrics), (others, other_metrics), setting in zip(
        ours, theirs, SETTINGS, strict=True
    ):
        assert relative_difference(moves, others) < 1e-6, setting
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (setting, name)


def test_gradient_accumulation_is_exact(whole_moves):
    """Pitfall 2: 8 rows at once are 8 times one row, for each way to average, and 3 + 3 + 2."""
    parts = [rows.tolist() for _, rows in micro_batches(some_batch(8, T), 1)]
    assert sorted(parts) == [[i] for i in range(8)]
    for budget in (1, 30):
        assert_equal_moves(whole_moves, all_moves(budget))


def test_settings_matter(whole_moves):
    """The comparisons above would see it if a setting did nothing."""
    for i, (a, _) in enumerate(whole_moves):
        for b, _ in whole_moves[:i]:
            assert relative_difference(a, b) > 1e-3


def test_accumulation_within_minibatches_is_exact():
    flags = {"num_minibatches": 2, "update_epochs": 2, "loss_aggregation": "token"}
    one, metrics = run_update(flags, lr=0.01)
    other, other_metrics = run_update(flags | {"micro_batch_tokens": 1}, lr=0.01)
    assert relative_difference(one, other) < 1e-4  # weights have moved by rounded steps
    assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


TWO_PROCESSES = """
import sys, torch
from algos import grpo_fsdp as script
from tests import test_grpo as tests
rank, world_size, _ = script.setup_process("cpu")
mesh = script.init_device_mesh("cpu", (world_size,))
found = {"moves": tests.all_moves(40, mesh), "groups": tests.drawn_groups()}
one, other = script.gather_lists([found["groups"]])
assert one == other, "the processes chose other groups"
if rank == 0:
    torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes compute, in one start of torchrun."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(folder / "two.py"), str(folder / "out.pt")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=240)
    return torch.load(folder / "out.pt", weights_only=True)


def test_two_processes_take_the_step_of_one(whole_moves, two_processes):
    """4 rows each, with unequal token counts and unequal numbers of micro-batches."""
    assert_equal_moves(whole_moves, two_processes["moves"])


def test_first_update_has_loss_zero_and_a_gradient():
    """Pitfall 1: ratio 1 and advantages that sum to 0; with a KL penalty the loss is beta k3."""
    for flags in ({"kl_coef": 0.0}, {"kl_coef": 0.1}):
        moves, metrics = run_update(flags | {"tis_cap": None})
        assert metrics["losses/policy_loss"] == pytest.approx(0, abs=1e-6)
        assert metrics["losses/clipfrac_low"] == metrics["losses/clipfrac_high"] == 0
        assert metrics["losses/approx_kl"] == 0
        assert metrics["losses/grad_norm"] > 0.01
        assert any(move.abs().max() > 0 for move in moves.values())
    assert metrics["losses/loss"] > 1e-3
    # of equally long responses the mean over rows is the mean over tokens that is logged
    args = arguments(kl_coef=0.1)
    logprobs, mb = hand_made([[1.0, 1.0], [1.0, 1.0]], [1.0, -1.0])
    found = loss_of(logprobs, mb | {"ref_logprobs": logprobs.detach() * 1.1}, args)
    assert found["loss"].item() == pytest.approx(0.1 * found["kl"].item())


@pytest.mark.parametrize("how", ["token", "constant"])
def test_first_loss_of_a_mean_over_tokens(how):
    """There it is not 0 but shows how length and advantage go together: -sum A |y| / ..."""
    _, metrics = run_update({"kl_coef": 0.0, "tis_cap": None, "loss_aggregation": how})
    batch = grouped_batch()
    total = -(batch["advantages"] * batch["lengths"]).sum().item()
    count = batch["lengths"].sum().item() if how == "token" else 8 * T
    assert abs(total) > 1
    assert metrics["losses/policy_loss"] == pytest.approx(total / count, rel=1e-5)


def test_old_logprobs_are_kept_only_for_several_steps():
    """With one step they are those of the policy itself; both ways give the same step."""
    args = script.Args(response_length=T)
    policy, _, reference = trainable(args)
    batch = grouped_batch()
    script.score_tokens(policy, reference, batch, args)
    assert "logprobs" not in batch and "ref_logprobs" in batch
    script.score_tokens(policy, None, batch, script.Args(num_minibatches=2))
    logprobs, _ = policy(batch, 1.0)
    assert ((logprobs - batch["logprobs"]).exp() - 1).abs().max() < 1e-6


def test_filtered_rows_leave_the_denominators():
    """Only what is in the loss is counted: the step of the batch without those rows."""
    for how in HOW:
        flags = {"loss_aggregation": how, "kl_coef": 0.1, "response_length": T}
        flags |= {"max_grad_norm": 1e9}
        moves, _ = run_update(flags, filtered=True)
        args = script.Args(**flags, tis_cap=2.0)
        policy, parameters, reference = trainable(args)
        batch = {name: rows[[1, 2, 4, 5, 6, 7]] for name, rows in grouped_batch().items()}
        script.score_tokens(policy, reference, batch, args)
        before = {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
        script.update(policy, torch.optim.SGD(list(parameters.values()), lr=1.0), batch, args)
        other = {n: p.full_tensor().detach() - before[n] for n, p in parameters.items()}
        assert relative_difference(moves, other) < 1e-4


def test_all_responses_filtered_is_a_step_of_zero():
    args = script.Args(kl_coef=0.1, response_length=T)
    policy, parameters, reference = trainable(args)
    batch = grouped_batch()
    batch["mask"] &= False
    script.score_tokens(policy, reference, batch, args)
    metrics = script.update(policy, torch.optim.SGD(list(parameters.values())), batch, args)
    assert all(value == 0 for value in metrics.values()), metrics


# GROUPS ==========================================================================================


def made_groups(sizes=(3, 4), T=5, seed=0):
    """P groups of G (record, Response, score) with lengths and scores of their own."""
    rng, (P, G) = random.Random(seed), sizes
    groups = []
    for p in range(P):
        record = {"prompt": f"p{p}", "ids": [3 + p] * (2 + p)}
        rows = []
        for _ in range(G):
            n = rng.randint(1, T)
            tokens = [rng.randrange(3, 60) for _ in range(n)]
            logprobs = [round(-rng.random(), 3) for _ in range(n)]
            rows.append((record, Response(tokens, logprobs, n < T, "x"), rng.random()))
        groups.append(rows)
    return groups


def as_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_advantages_over_groups_that_lie_on_several_processes(scale, world_size, monkeypatch):
    """Pitfall 8."""
    flags = {"advantage_scale": scale, "response_length": 5, "overlong_penalty_tokens": 2}
    args, cpu, groups = script.Args(**flags), torch.device("cpu"), made_groups()
    one = script.group_batch(groups, args, cpu)
    assert one["advantages"].view(3, 4).sum(1).abs().max() < 1e-4
    assert world_size == 3 or 12 / world_size % 4  # else no group would be cut
    parts = []
    for rank in range(world_size):
        as_process(monkeypatch, rank, world_size)
        parts.append(script.group_batch(groups, args, cpu))
    for name in one.keys() - {"input_ids"}:  # which are as wide as the longest row
        assert torch.equal(torch.cat([part[name] for part in parts]), one[name]), name
    rows = [row for part in parts for row in part["input_ids"].tolist()]
    ends = (one["prompt_lengths"] + one["lengths"]).tolist()
    for ours, theirs, end in zip(rows, one["input_ids"].tolist(), ends, strict=True):
        assert ours[:end] == theirs[:end]


def test_group_batch_by_hand():
    """Penalty and filter: the row that was cut off is paid less, and left out of the loss."""
    record = {"prompt": "p", "ids": [7, 8]}
    rows = [
        (record, Response([4, 2], [-0.5, -0.25], True, "a"), 1.0),
        (record, Response([4, 5, 6, 9], [-1.0, -1.0, -1.0, -1.0], False, "b"), 1.0),
    ]
    flags = {"response_length": 4, "advantage_scale": "none", "overlong_penalty_tokens": 2}
    cpu = torch.device("cpu")
    batch = script.group_batch([rows], script.Args(**flags), cpu)
    assert batch["advantages"].tolist() == [0.5, -0.5]
    assert batch["input_ids"].tolist() == [[7, 8, 4, 2, 0, 0], [7, 8, 4, 5, 6, 9]]
    assert batch["mask"].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["sampled_logprobs"].tolist() == [[-0.5, -0.25, 0, 0], [-1, -1, -1, -1]]
    batch = script.group_batch([rows], script.Args(**flags, overlong_filtering=True), cpu)
    assert batch["mask"].int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["advantages"].tolist() == [0.5, -0.5]  # of the whole group all the same


def test_share_is_a_partition_of_neighbours(monkeypatch):
    for count, world_size in ((12, 2), (12, 3), (7, 2), (3, 4)):
        parts = []
        for rank in range(world_size):
            as_process(monkeypatch, rank, world_size)
            parts.append(script.share(list(range(count))))
        assert [item for part in parts for item in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_prompts_come_in_whole_epochs_however_they_are_asked_for():
    records = [{"id": i} for i in range(10)]

    def series(*counts):
        place, found = 0, []
        for count in counts:
            found += [r["id"] for r in script.prompt_batch(records, place, count, 1)]
            place += count
        return found

    whole = series(40)
    assert whole == series(3, 7, 1, 14, 15) == series(*[1] * 40)
    epochs = [whole[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [r["id"] for r in script.prompt_batch(records, 0, 40, 2)] != whole


# SAMPLING GROUPS =================================================================================

POOL = [{"prompt": f"p{i}", "ids": [i], "chance": (0.0, 0.5, 1.0, 0.5)[i % 4]} for i in range(40)]
TASK = SimpleNamespace(
    reward=lambda prompts, completions: [float(c == "right") for c in completions]
)


def respond(replica, tokenizer, records, seed, args):
    """Right with the chance that the record gives."""
    rng = random.Random(seed)
    texts = ["right" if rng.random() < record["chance"] else "wrong" for record in records]
    return [Response([len(text)], [-1.0], True, text) for text in texts]


def draw(pool=POOL, place=0, seed=5, **flags):
    """groups, all that were sampled, and the next place."""
    args = script.Args(**{"batch_size": 12, "group_size": 3, "total_episodes": 12} | flags)
    own, script.respond = script.respond, respond
    try:
        found = script.sample_groups((0, 0), TASK, pool, place, seed, args)
    finally:
        script.respond = own
    assert found[3].keys() == {"generate", "score"}  # seconds
    return found[:3]


def drawn_groups():
    """With 3 responses a group, two processes must draw an even number of groups."""
    groups, sampled, place = draw(dynamic_sampling=True, batch_size=18, total_episodes=18)
    plain = [[(record["prompt"], r.text, s) for record, r, s in group] for group in groups]
    return [plain, len(sampled), place]


def informative(group):
    return 0 < sum(score for *_, score in group) < len(group)


def test_groups_without_dynamic_sampling():
    groups, sampled, place = draw()
    assert groups == sampled and place == 4 and len(groups) == 4
    wanted = script.prompt_batch(POOL, 0, 4, 1)
    for group, record in zip(groups, wanted, strict=True):
        assert len(group) == 3 and all(row[0] == record for row in group)
        assert all(score == (r.text == "right") for _, r, score in group)


def test_dynamic_sampling_keeps_groups_that_differ():
    groups, sampled, place = draw(dynamic_sampling=True)
    assert len(groups) == 4 and all(map(informative, groups))
    assert place == len(sampled) > 4, "more were needed"
    # the first that differ, in the order in which they were drawn: none is preferred
    assert groups == [group for group in sampled if informative(group)][:4]
    # only what is missing is drawn again
    asked = [row[0]["prompt"] for group in sampled for row in group[:1]]
    assert asked == [r["prompt"] for r in script.prompt_batch(POOL, 0, place, 1)]
    found, rounds = 0, 0
    while found < len(sampled):
        found += 4 - sum(map(informative, sampled[:found]))
        rounds += 1
    assert found == len(sampled) and rounds > 1


def test_dynamic_sampling_is_the_same_again_and_goes_on():
    first = draw(dynamic_sampling=True)
    assert draw(dynamic_sampling=True) == first
    assert draw(dynamic_sampling=True, seed=6) != first
    place = first[2]
    _, sampled, after = draw(dynamic_sampling=True, place=place)
    assert after == place + len(sampled)
    asked = [group[0][0]["prompt"] for group in sampled]
    assert asked == [r["prompt"] for r in script.prompt_batch(POOL, place, len(asked), 1)]


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_dynamic_sampling_gives_up(chance):
    """Pitfall 10: nothing but equal scores. What is missing stays in, with advantages of 0."""
    pool = [record | {"chance": chance} for record in POOL]
    groups, sampled, place = draw(pool, dynamic_sampling=True, max_refills=2)
    assert len(groups) == 4 and len(sampled) == place == 3 * 4
    assert groups == sampled[:4]
    for flags in ({}, {"advantage_scale": "batch"}):
        batch = script.group_batch(groups, script.Args(**flags), torch.device("cpu"))
        assert (batch["advantages"] == 0).all()
    groups, sampled, _ = draw(pool, dynamic_sampling=True, max_refills=0)
    assert groups == sampled and len(groups) == 4


def test_one_informative_group_comes_first():
    """The others fill up what --max-refills leave missing."""
    pool = [record | {"chance": 0.5 if i == 7 else 0.0} for i, record in enumerate(POOL[:8])]
    for seed in range(9):
        groups, sampled, _ = draw(pool, seed=seed, dynamic_sampling=True, max_refills=3)
        good = [group for group in sampled if informative(group)]
        assert groups[: len(good)] == good[:4] and len(groups) == 4
        if good:
            break
    assert good


def test_two_processes_draw_the_same_groups(two_processes):
    """Each its half of the responses; the program has compared the two."""
    groups, count, place = two_processes["groups"]
    assert len(groups) == 6 and place == count and count % 2 == 0
    assert all(len(group) == 3 for group in groups)
    assert all(len({prompt for prompt, *_ in group}) == 1 for group in groups)
    assert all(0 < sum(score for *_, score in group) < 3 for group in groups)


# SAMPLER AND TRAINER =============================================================================


@pytest.fixture(scope="module")
def writer():
    """A model of characters whose pad is its EOS, as in many checkpoints, and what it wrote."""
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = build_model(tokenizer)
    rng = random.Random(1)
    letters = range(4, len(tokenizer))
    records = [{"ids": [2, *rng.choices(letters, k=1 + i % 7)]} for i in range(96)]
    args = script.Args(response_length=8, temperature=0.7)
    responses = script.respond(model, tokenizer, records, 3, args)
    device = torch.device("cpu")
    batch = response_batch([r["ids"] for r in records], stack(responses, device), 8)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, responses=responses, batch=batch, args=args
    )


def test_first_eos_is_in_the_mask_and_in_the_loss(writer):
    """Pitfall 4: a mask of "all that is not pad" would never train the model to stop."""
    eos, batch = writer.tokenizer.eos_token_id, dict(writer.batch)
    assert eos == writer.tokenizer.pad_token_id
    rows = [i for i, r in enumerate(writer.responses) if r.stopped]
    assert rows and len(rows) < len(writer.responses)
    logprobs = batch["sampled_logprobs"].clone().requires_grad_()
    batch |= {"advantages": torch.ones(len(logprobs)), "logprobs": batch["sampled_logprobs"]}
    loss_of(logprobs, batch, arguments(response_length=8))["loss"].backward()
    for i, response in enumerate(writer.responses):
        n = len(response.tokens)
        assert batch["mask"][i].tolist() == [True] * n + [False] * (8 - n)
        assert (response.tokens.index(eos) == n - 1) if response.stopped else n == 8
        assert (logprobs.grad[i, :n] < 0).all() and (logprobs.grad[i, n:] == 0).all()
    start = int(batch["prompt_lengths"][rows[0]])
    end = start + int(batch["lengths"][rows[0]]) - 1
    assert batch["input_ids"][rows[0], end] == eos


def test_text_of_a_response_is_without_its_eos(writer):
    for response in writer.responses:
        ids = response.tokens[:-1] if response.stopped else response.tokens
        assert response.text == writer.tokenizer.decode(ids, skip_special_tokens=True)


def test_scores_are_at_the_temperature_of_the_sampler(writer):
    """Pitfall 5. Sampled at 0.7 with a cache, scored in one pass, row by row right-padded (9)."""
    args = script.Args(num_minibatches=2, response_length=8, temperature=0.7, kl_coef=0.0)
    policy = script.Policy(tiny_copy(writer.model))
    script.shard(policy, script.init_device_mesh("cpu", (1,)), args)
    batch = dict(writer.batch)
    script.score_tokens(policy, None, batch, args)
    torch.testing.assert_close(batch["logprobs"], batch["sampled_logprobs"], atol=2e-5, rtol=1e-5)
    batch["advantages"] = torch.ones(len(batch["mask"]))
    logprobs, _ = policy(batch, 0.7)
    assert loss_of(logprobs, batch, args)["mismatch"] < 1e-5
    policy.model.zero_grad()
    hot = script.Args(num_minibatches=2, response_length=8, temperature=1.0)
    script.score_tokens(policy, None, batch, hot)
    assert (batch["logprobs"] - batch["sampled_logprobs"]).abs().mean() > 0.1


def test_dropout_is_off_in_sampler_scorer_and_update(writer):
    """Pitfall 9: with a model that has it, and that somebody left in training mode."""
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    sizes |= {"vocab_size": len(writer.tokenizer), "eos_token_id": writer.tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drop)).train()
    args = script.Args(num_minibatches=2, response_length=8, kl_coef=0.1)
    replica, reference = copy.deepcopy(model), script.Policy(copy.deepcopy(model))
    policy, mesh = script.Policy(model), script.init_device_mesh("cpu", (1,))
    script.shard(reference, mesh, args, frozen=True)
    parameters = script.shard(policy, mesh, args)
    records = [{"ids": [2, 5 + i]} for i in range(8)]
    responses = script.respond(replica, writer.tokenizer, records, 3, args)
    batch = response_batch([r["ids"] for r in records], stack(responses, torch.device("cpu")), 8)
    batch["advantages"] = torch.tensor([1.0, -1.0] * 4)
    script.score_tokens(policy, reference, batch, args)
    still = torch.optim.SGD(list(parameters.values()), lr=0.0)
    metrics = script.update(policy, still, batch, args)
    for name in ("approx_kl", "kl", "clipfrac_low", "clipfrac_high"):
        assert metrics[f"losses/{name}"] == pytest.approx(0, abs=1e-9), name
    assert metrics["losses/sampler_mismatch"] < 1e-5
    assert metrics["losses/grad_norm"] > 0


def tiny_copy(model):
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_responses_survive_the_way_between_processes(writer):
    device = torch.device("cpu")
    stacked = stack(writer.responses, device)
    assert split(stacked, [r.text for r in writer.responses]) == writer.responses
    assert torch.equal(stacked.lengths, writer.batch["lengths"])


# WEIGHTS THAT ARE TRAINED ========================================================================


def adapted(family, tied=True, rank=4):
    """A model with adapters that do something, and one like it without."""
    model, plain = tiny(family, tied), tiny(family, tied)
    choose_trained(model, "lora", rank, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model, plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_lora_trains_adapters_only(family, tmp_path):
    ids = torch.randint(3, 61, (3, 9))
    fresh, again = tiny(family, True), tiny(family, True)
    plain = fresh(ids).logits
    choose_trained(fresh, "lora", 4, 1)
    torch.rand(7)  # the same seed gives the same adapters wherever the generator stands
    choose_trained(again, "lora", 4, 1)
    pairs = zip(fresh.named_parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    torch.testing.assert_close(fresh(ids).logits, plain)  # B is 0: the policy starts as it was
    trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)

    model, base = adapted(family)
    with torch.no_grad():
        wanted = model(ids).logits
        assert (wanted - base(ids).logits).abs().max() > 1e-3
        whole = merged(model)
        torch.testing.assert_close(whole(ids).logits, wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(ids).logits, wanted), "the model itself is left as it is"
    assert whole.state_dict().keys() == base.state_dict().keys()
    assert merged(base) is base
    whole.save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train", ["lora", "blocks", "all"])
def test_step_moves_what_is_trained(train):
    moves, metrics = run_update({"train": train, "lora_rank": 4})
    moved = {name for name, move in moves.items() if move.abs().max() > 0}
    assert metrics["losses/grad_norm"] > 0
    if train == "lora":  # the first step moves B alone, as B is 0
        assert moved and all("lora_B" in name for name in moved)
    elif train == "blocks":
        embedding = {name for name in moves if "embed_tokens" in name or "lm_head" in name}
        assert embedding and moved == moves.keys() - embedding
    else:
        assert moved == moves.keys()


def test_replica_of_an_adapted_model_equals_the_policy():
    """Export as the script does it: from the replica that samples."""
    model, _ = adapted("llama")
    args = script.Args(train="lora", lora_rank=4)
    replica, _ = adapted("llama")
    policy = script.Policy(model)
    parameters = script.shard(policy, script.init_device_mesh("cpu", (1,)), args)
    with torch.no_grad():
        for name, p in parameters.items():
            assert "lora_" in name
            p.mul_(1.5)
    script.update_replica(replica, parameters)
    batch = some_batch()
    with torch.no_grad():
        ours, _ = policy(batch, 1.0)
        assert torch.equal(ours, script.Policy(replica)(batch, 1.0)[0])
        theirs, _ = script.Policy(merged(replica))(batch, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        choose_trained(tiny("llama", True), "lora", 4, 1)


# WHOLE RUNS ======================================================================================
# main in this process, with a tiny model, a file of prompts and a reward function from a file.

LENGTH = "def f(prompts, completions, **c): return [len(t) % 3 / 2 for t in completions]\n"
PROMPTS = ["a red key", "the ring", "mira walks", "he runs to the lake"] * 3


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(reward, *flags): a run to its end; start.folder, start.run_dir: what it reads, writes.

    The process group is that of this module, and signals keep their handlers.
    """
    monkeypatch.setattr(script, "setup_process", lambda device: (0, 1, torch.device("cpu")))
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    folder = causal_folder(tmp_path / "lm")

    def run(reward, *flags, prompts=PROMPTS):
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (tmp_path / "data.jsonl").write_text("".join(lines))
        (tmp_path / "user.py").write_text(reward)
        words = f"--model {folder} --data {tmp_path / 'data.jsonl'} --reward {tmp_path}/user.py:f "
        words += f"--run-dir {tmp_path / 'run'} --batch-size 8 --group-size 4 --total-episodes 24 "
        words += "--eval-prompts 4 --eval-samples 2 --response-length 5"
        script.main(tyro.cli(script.Args, args=[*words.split(), *map(str, flags)]))

    run.folder, run.run_dir = folder, tmp_path / "run"
    yield run
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


def metric(run_dir, key):
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    return [float(line.split(",")[2]) for line in lines if line.split(",")[1] == key]


def test_run_counts_groups_of_equal_scores(start):
    """Pitfall 6: their share is logged. And all flags of a run together."""
    reward = "def f(prompts, completions, **c): return [0.5] * len(completions)\n"
    start(reward, "--temperature", 0.7, "--tis-cap", 2, "--overlong-filtering")
    assert metric(start.run_dir, "charts/degenerate_groups") == [1, 1, 1]
    assert metric(start.run_dir, "charts/unsolved_groups") == [1, 1, 1]
    assert metric(start.run_dir, "charts/score") == [0.5] * 3
    mismatch = metric(start.run_dir, "losses/sampler_mismatch")
    assert len(mismatch) == 3 and max(mismatch) < 1e-4
    assert max(metric(start.run_dir, "losses/approx_kl")) == 0
    AutoModelForCausalLM.from_pretrained(start.run_dir / "policy")
    assert (start.run_dir / "training.png").stat().st_size > 1000


def test_adapters_alone_are_saved_and_resumed(start):
    flags = "--train lora --lora-rank 4 --num-minibatches 2 --dynamic-sampling".split()
    flags += ["--save-every", 0]
    start(LENGTH, *flags)
    newest = checkpoints(start.run_dir)[-1]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "step"):
        names = [name for file in (newest / kind).glob("*.safetensors") for name in load_file(file)]
        assert names and all("lora_" in name for name in names), kind
    again = start.run_dir.with_name("again")
    shutil.copytree(start.run_dir, again)
    shutil.rmtree(checkpoints(again)[-1])
    start(LENGTH, *flags, "--run-dir", again, "--resume", "auto")
    assert_same_run(again, start.run_dir)
    # the folder of the policy is an ordinary one, with the adapters in its weights
    exported = AutoModelForCausalLM.from_pretrained(start.run_dir / "policy")
    base = AutoModelForCausalLM.from_pretrained(start.folder)
    assert exported.state_dict().keys() == base.state_dict().keys()
    pairs = zip(exported.parameters(), base.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('answer')", r"reward f raised KeyError: 'answer' at .*user.py:5"),
        ("import time; time.sleep(30)", r"reward f took longer than 0.5 seconds .*reward-timeout"),
        ("return [1.0]", r"reward f returned 1 numbers for \d completions"),
        ("return [float('nan')] * len(completions)", r"returned nan for the prompt '"),
        ("return [[1.0]] * len(completions)", r"returned \[1.0\] instead of a number"),
        ("return None", r"must return a list of numbers, not NoneType"),
    ],
)
@pytest.mark.parametrize("good_calls", [0, 2])
def test_bad_rewards_are_one_line_and_nothing_is_lost(body, words, good_calls, start):
    """At the first evaluation, and after the first update, which is saved though none was due."""
    code = "calls = 0\ndef f(prompts, completions, **c):\n    global calls; calls += 1\n"
    code += f"    if calls > {good_calls}:\n        {body}\n    return [0.5] * len(completions)\n"
    with pytest.raises(UserError, match=words) as caught:
        start(code, "--reward-timeout", 0.5)
    assert "\n" not in str(caught.value)
    kept = checkpoints(start.run_dir)
    assert [int(path.name) for path in kept] == ([] if good_calls == 0 else [0, 8])
    assert all(script.damage(path) is None for path in kept)
    if good_calls:  # with a sound reward, or with more time, it goes on from there
        assert f"--resume auto continues from {kept[1]}" in str(caught.value)
        start(LENGTH, "--reward-timeout", 30, "--resume", "auto")
        assert int(checkpoints(start.run_dir)[-1].name) == 24


def test_reward_that_fails_under_torchrun_is_one_line(tmp_path):
    """On one of two processes, in the second update: both end with its line, the first is saved."""
    folder = causal_folder(tmp_path / "lm")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    body = "import os\ncalls = 0\ndef f(prompts, completions, **c):\n    global calls; calls += 1\n"
    body += "    bad = os.environ['RANK'] == '1' and calls == 3\n"  # the first one is an evaluation
    body += "    return [float('nan' if bad else len(t)) for t in completions]\n"
    (tmp_path / "user.py").write_text(body)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "algos/grpo_fsdp.py"), "--model", str(folder)]
    command += ["--data", str(tmp_path / "data.jsonl"), "--reward", f"{tmp_path}/user.py:f"]
    command += ["--run-dir", str(tmp_path / "run"), "--eval-samples", "2"]
    command += "--batch-size 8 --group-size 4 --total-episodes 24 --eval-prompts 4".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert errors and all("returned nan for the prompt" in line for line in errors), done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert not [line for line in ours if "Traceback" in line], ours
    kept = checkpoints(tmp_path / "run")
    assert [int(path.name) for path in kept] == [0, 8]
    assert all(script.damage(path) is None for path in kept)


def test_long_prompts_are_left_out_with_a_count(start, capfd):
    prompts = [*PROMPTS, "the red key " * 40]
    start(LENGTH, "--max-prompt-tokens", 20, prompts=[prompts[-1], *prompts[:-1]])
    assert "1 of 9 prompts left out, too long" in capfd.readouterr().err
    with pytest.raises(UserError, match="every prompt has over 2 tokens"):
        start(LENGTH, "--max-prompt-tokens", 2, "--run-dir", start.run_dir.with_name("other"))
    assert not start.run_dir.with_name("other").exists()


def test_one_record_cannot_be_held_out_and_trained_on(start):
    with pytest.raises(UserError, match="one record is too few"):
        start(LENGTH, prompts=["the ring"])
    assert not start.run_dir.exists()


def test_prompts_fit_the_positions_of_the_model(start, tmp_path):
    """As the sampler would refuse them in the middle of a run."""
    config = json.loads((start.folder / "config.json").read_text())
    config["max_position_embeddings"] = 12
    (start.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="every prompt has over 7 tokens"):
        start(LENGTH, prompts=["the red key " * 4] * 8)


@pytest.mark.parametrize("missing", ["pad", "eos"])
def test_tokenizer_without_pad_or_eos(missing, start):
    tokenizer = build_tokenizer()
    setattr(tokenizer, f"{missing}_token", None)
    save_folder(start.folder, AutoModelForCausalLM.from_pretrained(start.folder), tokenizer)
    if missing == "eos":
        with pytest.raises(UserError, match=r"no EOS token: give a text to stop at \(--stop\)"):
            start(LENGTH)
        shutil.rmtree(start.run_dir)
    start(LENGTH, *(["--stop", "."] if missing == "eos" else []))
    assert len(metric(start.run_dir, "charts/score")) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--group-size 1", "--group-size 1"),
        ("--group-size 16", "--batch-size 8"),
        ("--group-size 3", "--group-size 3"),
        ("--num-minibatches 3", r"processes \* minibatches \(3\)"),
        ("--kl-coef -1", "kl-coef"),
        ("--dynamic-sampling --max-refills -1", "max-refills"),
        ("--reward-model x", "--data needs"),
        ("--curriculum", "--data needs"),
        ("--overlong-penalty-tokens -1", "--overlong-penalty-tokens"),
        ("--overlong-penalty-tokens 6", "penalty-tokens 6: want no more than --response-length 5"),
        ("--clip-coef 0", "--clip-coef 0.0: want more than 0"),
        ("--clip-coef nan", "--clip-coef nan: want more than 0"),
        ("--clip-coef-high -0.1", "--clip-coef-high -0.1: want 0 or more"),
        ("--tis-cap 0", "--tis-cap 0.0: want more than 0"),
        ("--learning-rate 0", "--learning-rate 0.0: want more than 0"),
        ("--warmup-updates -1", "--warmup-updates -1: want 0 or more"),
        ("--success-score nan", "--success-score nan: want a finite number"),
        ("--success-score inf", "--success-score inf: want a finite number"),
        ("--reward-timeout 0", "--reward-timeout 0.0: want more than 0"),
        ("--eval-prompts 0", "--eval-prompts 0: want 1 or more"),
    ],
)
def test_impossible_flags(flags, words, start):
    with pytest.raises(UserError, match=words) as caught:
        start(LENGTH, *flags.split())
    assert "\n" not in str(caught.value)
    assert not start.run_dir.exists()
