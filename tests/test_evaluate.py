"""Evaluation: win rate and its interval, KL, the summary, tables, the command."""

import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import UserError
from rlhf.batches import Response
from rlhf.evaluate import (
    Args,
    draw_samples,
    group_metrics,
    main,
    mean_interval,
    metrics_table,
    pass_at_k,
    samples_table,
    sequence_kl,
    summarize,
    summarize_passes,
    win_rate,
)
from rlhf.sft import save_folder
from rlhf.tiny_lm import build_tokenizer


def small_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def test_win_rate_by_hand():
    rate, low, high = win_rate([3, 1, 2, 5], [1, 2, 2, 0])  # two wins, a tie, a loss
    assert rate == 2.5 / 4
    # Wilson: 95 of 100 gives (0.8882, 0.9785)
    rate, low, high = win_rate([1] * 95 + [0] * 5, [0] * 95 + [1] * 5)
    assert (rate, round(low, 4), round(high, 4)) == (0.95, 0.8882, 0.9785)
    assert win_rate([1.0], [0.0])[2] == 1.0 and 0 < win_rate([1.0], [0.0])[1] < 0.5
    assert win_rate([0, 0], [0, 0])[0] == 0.5


def test_win_rate_interval_covers():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(500):
        wins = (torch.rand(100, generator=generator) < 0.8).float().tolist()
        _, low, high = win_rate(wins, [0.5] * 100)
        hits += low <= 0.8 <= high
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], []), ([], [])])
def test_win_rate_needs_pairs(ours, theirs):
    with pytest.raises(UserError, match="equally many"):
        win_rate(ours, theirs)


def test_kl_against_full_logits():
    policy, baseline = small_model(0), small_model(1)
    prompts = [[2, 5, 6], [2, 7], [2, 8, 9, 10]]
    completions = [[11, 12, 1], [13, 1], [14]]
    got = sequence_kl(policy, baseline, prompts, completions, temperature=0.7, batch_size=2)
    for prompt, completion, value in zip(prompts, completions, got, strict=True):
        expected = 0.0
        for model, sign in ((policy, 1), (baseline, -1)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
            table = logits.log_softmax(-1)
            for t, token in enumerate(completion):
                expected += sign * table[len(prompt) + t - 1, token].item()
        assert value == pytest.approx(expected, abs=1e-4)
    assert sequence_kl(policy, policy, prompts, completions) == [0.0] * 3


def test_kl_on_own_samples_is_positive():
    policy, baseline, tokenizer = small_model(0), small_model(1), build_tokenizer()
    prompts = [[2, 5 + i % 20] for i in range(64)]
    drawn = draw_samples(policy, tokenizer, prompts, 8, batch_size=16)
    assert drawn == draw_samples(policy, tokenizer, prompts, 8, batch_size=16)
    assert drawn.lengths == [len(ids) for ids in drawn.token_ids]
    assert sum(sequence_kl(policy, baseline, prompts, drawn.token_ids)) / 64 > 0.5


def test_summary():
    metrics = summarize(
        rewards=[1.0, 2.0],
        baseline_rewards=[2.0, 3.0],
        gold=[1.0, 3.0],
        baseline_gold=[0.0, 0.0],
        lengths=[4, 6],
        stopped=[True, False],
        kl=[0.5, 1.5],
    )
    assert metrics["eval/win_rate"] == 1.0 and metrics["eval/win_rate_judge_is_gold"] == 1.0
    expected = {
        "reward": 1.5,
        "baseline_reward": 2.5,
        "gold": 2.0,
        "length": 5,
        "eos_rate": 0.5,
        "kl": 1,
    }
    assert {name: metrics[f"eval/{name}"] for name in expected} == expected
    by_reward = summarize(rewards=[1.0], baseline_rewards=[2.0], lengths=[1], stopped=[True])
    assert by_reward["eval/win_rate"] == 0.0 and "eval/kl" not in by_reward
    assert "eval/win_rate" not in summarize(rewards=[1.0], lengths=[1], stopped=[True])
    assert "| win_rate | 1.000 |" in metrics_table(metrics)


# VERIFIABLE TASKS ================================================================================


def test_pass_at_k_against_all_draws():
    for samples in range(1, 8):
        for right in range(samples + 1):
            marks = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(marks, k))
                share = sum(any(draw) for draw in draws) / len(draws)
                assert pass_at_k(right, samples, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Its mean over batches of 6 is the chance that one of 3 is right, 1 - (1 - p)^3."""
    p, samples, k = 0.3, 6, 3
    chance = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    mean = sum(chance[c] * pass_at_k(c, samples, k) for c in range(samples + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_interval_of_a_mean_covers():
    rng, hits = random.Random(0), 0
    for _ in range(150):
        values = [sum(rng.random() < 0.3 for _ in range(8)) / 8 for _ in range(50)]
        low, high = mean_interval(values)
        assert low < sum(values) / 50 < high
        hits += low <= 0.3 <= high
    assert 0.9 <= hits / 150 <= 0.99
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval([0.25] * 50) == (0.25, 0.25) and mean_interval([1.0]) == (1.0, 1.0)
    # at the edge, where mean +- 1.96 standard errors would go beyond 1
    low, high = mean_interval([1.0] * 49 + [0.5])
    assert low < 0.99 and high <= 1


def answers(*lengths, stopped=True):
    return [Response([5] * n, [-1.0] * n, stopped, "t") for n in lengths]


def test_summary_of_passes():
    """Two prompts with 6 responses each: 3 and 0 right, in another form 4 and 1."""
    strict = [1, 1, 1, 0, 0, 0] + [0] * 6
    lenient = [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    responses = answers(*range(1, 13))
    responses[0] = responses[0]._replace(stopped=False)
    metrics = summarize_passes(responses, [strict, lenient], 6, 1.0)
    expected = {"pass@1": 0.25, "pass@4": 0.5, "pass@6": 0.5, "lenient_pass@1": 5 / 12}
    expected |= {"lenient_pass@4": (1 + 1 - 5 / 15) / 2, "lenient_pass@6": 1.0}
    expected |= {"score": 0.25, "length": 6.5, "length_wrong": 8.0, "eos_rate": 11 / 12}
    bounds = {
        f"{n}@{k}_{side}"
        for n in ("pass", "lenient_pass")
        for k in (1, 6)
        for side in ("low", "high")
    }
    assert metrics.keys() == {f"eval/{name}" for name in expected.keys() | bounds}
    found = {name: metrics[f"eval/{name}"] for name in expected}
    assert found == pytest.approx(expected)
    assert metrics["eval/pass@1_low"] <= 0.25 <= metrics["eval/pass@1_high"]

    # what is "right" depends on the score that it takes
    assert summarize_passes(responses, [strict], 6, 2.0)["eval/pass@6"] == 0
    alone = summarize_passes(responses[:3], [strict[:3]], 3, 1.0)
    assert not [name for name in alone if "lenient" in name or "wrong" in name]
    assert {name for name in alone if name.endswith(("@1", "@3"))} == {"eval/pass@1", "eval/pass@3"}

    later = summarize_passes(responses, [lenient, lenient], 6, 1.0, baseline=metrics)
    assert later["eval/baseline_pass@4"] == metrics["eval/pass@4"]
    assert later["eval/gain_pass@1"] == pytest.approx(5 / 12 - 0.25)
    assert later["eval/gain_lenient_pass@1"] == 0
    assert not [
        name for name in later if "baseline" in name and ("low" in name or "length" in name)
    ]


def test_metrics_of_groups():
    record = {"prompt": "p", "ids": [1]}

    def group(scores, lengths, cut=()):
        rows = zip(scores, lengths, strict=True)
        return [
            (record, Response([5] * n, [0.0] * n, i not in cut, "t"), score)
            for i, (score, n) in enumerate(rows)
        ]

    groups = [
        group([1.0, 0.0, 0.5], [2, 4, 9], cut=[2]),  # 0.5 is not right
        group([1.0, 1.0, 1.0], [3, 3, 9], cut=[2]),  # right though cut off
        group([0.0, 0.0, 0.0], [6, 6, 6]),
        group([0.0, 0.5, 0.0], [6, 6, 6]),
    ]
    metrics = group_metrics(groups, 1.0, {"generate": 1.5, "update": 0.5})
    expected = {"score": 5 / 12, "success_rate": 1 / 3, "degenerate_groups": 0.5}
    expected |= {"unsolved_groups": 0.5, "sampled_groups": 4, "sampled_tokens": 66}
    expected |= {"response_length": 5.5, "eos_rate": 10 / 12, "tokens_per_second": 33}
    expected |= {"length_right": 17 / 4, "length_wrong": 40 / 7, "length_cut_off": 9}
    expected |= {"seconds_generate": 1.5, "seconds_update": 0.5}
    expected |= {"score_std": (4.5 / 12 - (5 / 12) ** 2) ** 0.5}
    assert metrics.keys() == {f"charts/{name}" for name in expected}
    assert {n: metrics[f"charts/{n}"] for n in expected} == pytest.approx(expected)
    lengths = group_metrics(groups[1:2], 1.0, {"generate": 1.0})
    assert "charts/length_right" in lengths
    assert "charts/length_wrong" not in lengths and "charts/length_cut_off" not in lengths


# TABLES AND COMMAND ==============================================================================


def test_samples_table_stays_a_table():
    table = samples_table(
        ["a | b\nc", [{"role": "user", "content": "chat"}], "left out"],
        {"text": ["<pad>", ""], "score": [0.125, 2.0]},
        limit=2,
    )
    assert table.splitlines() == [
        "| prompt | text | score |",
        "|---|---|---|",
        "| a \\| b c | &lt;pad> | 0.12 |",
        "| chat |   | 2.00 |",
    ]


def test_command(tmp_path, capsys):
    tokenizer = build_tokenizer()
    for seed, name in enumerate(("policy", "baseline")):
        save_folder(tmp_path / name, small_model(seed), tokenizer)
    models = dict(model=str(tmp_path / "policy"), baseline=str(tmp_path / "baseline"))
    main(Args(**models, out=tmp_path / "out", num_prompts=20, device="cpu"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"eval/gold", "eval/baseline_gold", "eval/win_rate", "eval/kl"} <= metrics.keys()
    assert len((tmp_path / "out" / "samples.md").read_text().splitlines()) == 22
    assert "| win_rate |" in capsys.readouterr().out

    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "mira walks", "answer": "#### 1"}) + "\n")
    data = dict(data=str(tmp_path), prompt_field="q", out=tmp_path / "data", device="cpu")
    main(Args(**models, **data, reward="rlhf.tasks:answer_after_hashes"))
    assert json.loads((tmp_path / "data" / "metrics.json").read_text())["eval/reward"] == 0.0
    with pytest.raises(UserError, match="nothing judges"):
        main(Args(**models, **data))


def test_command_line_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "rlhf.evaluate", "--model", tmp_path / "gone"]
    command += ["--baseline", "b", "--out", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot load a causal")
    assert "Traceback" not in done.stderr
