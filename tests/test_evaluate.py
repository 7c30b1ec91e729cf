"""Evaluation: win rate and its interval, KL, the summary, tables, the command."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import UserError
from rlhf.evaluate import (
    Args,
    draw_samples,
    main,
    metrics_table,
    samples_table,
    sequence_kl,
    summarize,
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
