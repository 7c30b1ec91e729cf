"""Evaluation of a policy against the model it started from, on held-out prompts.

Reported are the mean reward, the gold reward where it is known, the share of prompts on which the
policy beats the baseline with its 95 % interval, the length, the share of ended completions, and
the KL divergence KL(policy || baseline), estimated as the sum over tokens of
log pi(y_t) - log pi_sft(y_t) on the policy's samples (papers/ppo_rlhf.md 3.1, 3.2: k1). A reward
without the KL beside it says little: D2's over-optimised seeds had a KL of 50 to 85.

    python -m rlhf.evaluate --model runs/x/policy --baseline SFT_DIR --out report
    python -m rlhf.evaluate --model M --baseline B --data d.jsonl --reward my_rewards:f --out report
"""

import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from rlhf import UserError
from rlhf.batches import Response
from rlhf.logprobs import completion_logprobs
from rlhf.reward_model import load_reward_model, score_texts
from rlhf.sampler import generate
from rlhf.sft import load_causal_lm
from rlhf.tasks import (
    load_records,
    load_reward,
    load_task,
    pad_token_id,
    prompt_ids,
    prompt_text,
    score,
    shorten,
    stop_token_ids,
)


@dataclass(frozen=True)
class Samples:
    """Completions of N prompts, and what is known of them."""

    texts: list[str]
    lengths: list[int]
    """tokens, the EOS included"""
    stopped: list[bool]
    """whether the completion ended by itself"""
    token_ids: list[list[int]]


def win_rate(
    scores: Sequence[float], baseline_scores: Sequence[float]
) -> tuple[float, float, float]:
    """Share of pairs in which `scores` is higher, ties count half: (rate, low, high).

    The 95 % interval is Wilson's score interval, with half wins for ties (which makes it slightly
    wide where there are many).
    """
    from scipy.stats import norm

    if len(scores) != len(baseline_scores) or not len(scores):
        raise UserError(
            f"a win rate compares equally many scores, not {len(scores)} and {len(baseline_scores)}"
        )
    n, z = len(scores), float(norm.ppf(0.975))
    pairs = zip(scores, baseline_scores, strict=True)
    rate = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return rate, max(0.0, center - half), min(1.0, center + half)


def sequence_kl(
    model: nn.Module,
    baseline: nn.Module,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float = 1.0,
    batch_size: int = 32,
) -> list[float]:
    """Sum over the tokens of each completion of log pi - log pi_baseline: (N,).

    Both at the temperature of the sampler, on samples of `model`; the mean over sequences estimates
    the KL divergence.
    """
    device = next(model.parameters()).device
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    result = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        input_ids = torch.zeros(len(chosen), max(len(rows[i]) for i in chosen), dtype=torch.long)
        positions = torch.zeros(input_ids.shape, dtype=torch.bool)
        for at, i in enumerate(chosen):
            input_ids[at, : len(rows[i])] = torch.tensor(rows[i])
            positions[at, len(prompts[i]) : len(rows[i])] = True
        input_ids, positions = input_ids.to(device), positions.to(device)
        with torch.no_grad():
            ours, _ = completion_logprobs(model, input_ids, positions, temperature)
            theirs, _ = completion_logprobs(baseline, input_ids, positions, temperature)
        for i, value in zip(chosen, (ours - theirs).sum(1).tolist(), strict=True):
            result[i] = value
    return result


def draw_samples(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 1,
    batch_size: int = 64,
    stop: str | None = None,
) -> Samples:
    """One completion of each prompt; the same seed draws the same completions."""
    drawn = generate(
        model,
        list(prompts),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(tokenizer, stop),
        pad_id=pad_token_id(tokenizer),
        temperature=temperature,
        slots=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    lengths = drawn.lengths.tolist()
    ids = [row[:n] for row, n in zip(drawn.tokens.tolist(), lengths, strict=True)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return Samples(texts, lengths, drawn.stopped.tolist(), ids)


def summarize(
    *,
    rewards: Sequence[float] | None = None,
    baseline_rewards: Sequence[float] | None = None,
    gold: Sequence[float] | None = None,
    baseline_gold: Sequence[float] | None = None,
    lengths: Sequence[int],
    stopped: Sequence[bool],
    kl: Sequence[float] | None = None,
) -> dict[str, float]:
    """Numbers of one evaluation. What was not given is left out; keys as in the TensorBoard logs.

    The win rate is judged by gold where it is known (`eval/win_rate_judge_is_gold` 1), otherwise by
    the reward.
    """
    metrics = {}
    for name, ours, theirs in (
        ("reward", rewards, baseline_rewards),
        ("gold", gold, baseline_gold),
    ):
        if ours is not None:
            metrics[f"eval/{name}"] = statistics.fmean(ours)
        if theirs is not None:
            metrics[f"eval/baseline_{name}"] = statistics.fmean(theirs)
    judge_is_gold = gold is not None and baseline_gold is not None
    ours, theirs = (gold, baseline_gold) if judge_is_gold else (rewards, baseline_rewards)
    if ours is not None and theirs is not None:
        rate, low, high = win_rate(ours, theirs)
        metrics |= {
            "eval/win_rate": rate,
            "eval/win_rate_low": low,
            "eval/win_rate_high": high,
            "eval/win_rate_judge_is_gold": float(judge_is_gold),
        }
    metrics["eval/length"] = statistics.fmean(lengths)
    metrics["eval/eos_rate"] = statistics.fmean(map(float, stopped))
    if kl is not None:
        metrics["eval/kl"] = statistics.fmean(kl)
    return metrics


def rollout_metrics(batch: dict[str, Tensor], scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Means over the responses of all processes, for the log of a training script.

    batch: see rlhf/batches.py, with logprobs, ref_logprobs and entropy (B, T); scores (B,) as
    paid; rewards (B, T), the scores and the KL penalty of each token.
    """
    lengths = batch["lengths"].float()
    mismatch = (batch["logprobs"] - batch["sampled_logprobs"]).abs()
    columns = {
        "score": scores,
        "episodic_return": rewards.sum(1),
        "kl": (batch["logprobs"] - batch["ref_logprobs"]).sum(1),
        "entropy": batch["entropy"].sum(1) / lengths,
        "response_length": lengths,
        "eos_rate": batch["stopped"].float(),
        "sampler_mismatch": mismatch.sum(1) / lengths,
    }
    means = torch.stack(list(columns.values())).mean(1)
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return {f"charts/{name}": mean for name, mean in zip(columns, means.tolist(), strict=True)}


def group_metrics(groups: Sequence, success: float, seconds: dict[str, float]) -> dict[str, float]:
    """What the groups sampled for an update of GRPO say, for the log of a training script.

    groups: lists of (record, Response, score), on every process the same. A response is right if
    its score is `success` or more; a length is left out where there is no such response. seconds:
    what the steps of the update took on this process.
    """
    scores = [[score for *_, score in group] for group in groups]
    flat = [score for group in scores for score in group]
    rows = [
        (score >= success, len(r.tokens), r.stopped) for group in groups for _, r, score in group
    ]
    lengths = {
        "right": [n for right, n, _ in rows if right],
        "wrong": [n for right, n, stopped in rows if stopped and not right],
        "cut_off": [n for right, n, stopped in rows if not (stopped or right)],
    }
    metrics = {
        "score": statistics.fmean(flat),
        "score_std": statistics.pstdev(flat),
        "success_rate": statistics.fmean(right for right, _, _ in rows),
        "degenerate_groups": statistics.fmean(len(set(group)) == 1 for group in scores),
        "unsolved_groups": statistics.fmean(max(group) < success for group in scores),
        "sampled_groups": len(groups),
        "response_length": statistics.fmean(n for _, n, _ in rows),
        "eos_rate": statistics.fmean(stopped for *_, stopped in rows),
        "sampled_tokens": sum(n for _, n, _ in rows),
        "tokens_per_second": sum(n for _, n, _ in rows) / sum(seconds.values()),
    }
    metrics |= {f"seconds_{name}": value for name, value in seconds.items()}
    metrics |= {f"length_{name}": statistics.fmean(part) for name, part in lengths.items() if part}
    return {f"charts/{name}": value for name, value in metrics.items()}


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that at least one of k responses is right, unbiased, from `samples` of them.

    1 - C(samples - right, k) / C(samples, k): Chen et al., 2021, arXiv 2107.03374, eq. (1).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean: BCa bootstrap; a point where all values are equal."""
    from scipy.stats import bootstrap

    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap((values,), np.mean, n_resamples=2000, rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarize_passes(
    responses: Sequence[Response],
    scores: Sequence[Sequence[float]],
    samples: int,
    success: float,
    baseline: dict[str, float] | None = None,
) -> dict[str, float]:
    """pass@k of k = 1, 4, 16 ... and `samples`, from as many responses to each prompt in a row.

    scores: of the responses, and where there are two lists, also those of a lenient judge. The
    95 % intervals (_low, _high) are over prompts, as responses to one prompt are not independent.
    baseline: of an earlier call; its pass rates and the gains on them stand beside the new ones.
    """
    metrics = {}
    ks = sorted({4**i for i in range(10) if 4**i < samples} | {samples})
    for name, judged in zip(("pass", "lenient_pass"), scores, strict=False):
        right = [s >= success for s in judged]
        counts = [sum(right[i : i + samples]) for i in range(0, len(right), samples)]
        for k in ks:
            values = [pass_at_k(count, samples, k) for count in counts]
            metrics[f"eval/{name}@{k}"] = statistics.fmean(values)
            if k in (1, samples):
                low, high = mean_interval(values)
                metrics |= {f"eval/{name}@{k}_low": low, f"eval/{name}@{k}_high": high}
    lengths = [len(response.tokens) for response in responses]
    wrong = [n for n, score in zip(lengths, scores[0], strict=True) if score < success]
    metrics["eval/score"] = statistics.fmean(scores[0])
    metrics["eval/length"] = statistics.fmean(lengths)
    metrics |= {"eval/length_wrong": statistics.fmean(wrong)} if wrong else {}
    metrics["eval/eos_rate"] = statistics.fmean(float(response.stopped) for response in responses)
    for name, value in (baseline or {}).items():
        if re.fullmatch(r"eval/(lenient_)?pass@\d+", name):
            metrics[name.replace("eval/", "eval/baseline_")] = value
            metrics[name.replace("eval/", "eval/gain_")] = metrics[name] - value
    return metrics


def metrics_table(metrics: dict[str, float]) -> str:
    """Metrics as a Markdown table."""
    rows = [f"| {name.removeprefix('eval/')} | {value:.3f} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def samples_table(
    prompts: Sequence, columns: dict[str, Sequence], limit: int = 10, width: int = 400
) -> str:
    """Prompts and what stands beside them ({title: texts or numbers}) as a Markdown table."""

    def cell(value) -> str:
        text = f"{value:.2f}" if isinstance(value, float) else shorten(str(value), width)
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or " "

    titles = ["prompt", *columns]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for i, prompt in enumerate(prompts[:limit]):
        row = [prompt_text(prompt), *(values[i] for values in columns.values())]
        lines.append("| " + " | ".join(map(cell, row)) + " |")
    return "\n".join(lines)


def plot_training(run_dir: Path) -> Path:
    """Reward, KL and length over updates from metrics.csv, as run_dir/training.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {}
    for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]:
        step, key, value = line.split(",")
        series.setdefault(key, ([], []))
        series[key][0].append(int(step))
        series[key][1].append(float(value))
    passes = sorted(k for k in series if re.fullmatch(r"eval/pass@\d+", k))
    panels = {
        "reward": {"charts/score": "reward", "charts/gold": "gold reward"},
        "held-out prompts": {key: key.removeprefix("eval/") for key in passes},
        "KL to the first model": {"charts/kl": "of a response", "losses/kl": "of a token"},
        "tokens of a response": {"charts/response_length": "length"},
    }
    panels = {title: lines for title, lines in panels.items() if lines.keys() & series.keys()}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, label in lines.items():
            if key in series:
                axis.plot(*series[key], label=label, linewidth=1.4)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
        axis.set(title=title, xlabel="episodes")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path = run_dir / "training.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def report(run_dir: Path, model, tokenizer, before: dict, after: dict, metrics: dict) -> None:
    """What a training run ends with: printed samples, run_dir/policy and run_dir/training.png.

    before, after: "prompts" and "texts" of the same held-out prompts; metrics: of `summarize`.
    """
    print(samples_table(after["prompts"], {"before": before["texts"], "after": after["texts"]}, 3))
    print(metrics_table(metrics))
    unfinished, folder = run_dir / "policy.partial", run_dir / "policy"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"policy: {folder}\npicture: {plot_training(run_dir)}")


@dataclass
class Args:
    model: str
    """policy, a causal LM by name or folder"""
    baseline: str
    """the model it started from"""
    out: Path
    """folder for metrics.json and samples.md"""
    task: str | None = None
    """built-in task; `stories` if no --data is given"""
    data: str | None = None
    """.jsonl file, folder, or Hugging Face data set with prompts"""
    split: str = "test"
    """split of a folder or data set"""
    prompt_field: str = "prompt"
    """column that holds the prompt"""
    prompt_template: str | None = None
    """text with {column} placeholders instead of a prompt column"""
    reward: str | None = None
    """module:function, the user's reward"""
    reward_model: str | None = None
    """reward model, by name or folder"""
    num_prompts: int = 200
    """prompts to answer"""
    response_tokens: int = 24
    """longest completion"""
    temperature: float = 1.0
    """of the samples and of the KL; 0 takes the likeliest token, and has no KL"""
    batch_size: int = 64
    """rows that work at the same time"""
    stop: str | None = None
    """text of one token that ends a completion as EOS does, if the policy was trained with one"""
    seed: int = 1
    """of the samples"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the models run"""
    trust_remote_code: bool = False
    """run Python code that a model's repository brings along"""


def main(args: Args) -> None:
    if args.data is not None and args.task is not None:
        raise UserError("--task and --data both name prompts: give one of them")
    if args.reward is not None and args.reward_model is not None:
        raise UserError("--reward and --reward-model both judge: give one of them")
    reward = load_reward(args.reward) if args.reward else None
    gold = None
    if args.data is None:
        task = load_task(args.task or "stories", args.response_tokens)
        records, gold, reward = task.test, task.gold, reward or task.reward
    else:
        records = load_records(
            args.data,
            args.split,
            prompt_field=args.prompt_field,
            prompt_template=args.prompt_template,
        )
    if reward is None and args.reward_model is None and gold is None:
        raise UserError("nothing judges the completions: give --reward or --reward-model")
    records = records[: args.num_prompts]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} is not writable: {error}") from error

    model, tokenizer = load_causal_lm(args.model, args.trust_remote_code)
    baseline, _ = load_causal_lm(args.baseline, args.trust_remote_code)
    model, baseline = model.to(args.device).eval(), baseline.to(args.device).eval()
    prompts = [record["prompt"] for record in records]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    drawn = [
        draw_samples(
            m,
            tokenizer,
            ids,
            args.response_tokens,
            args.temperature,
            args.seed,
            args.batch_size,
            args.stop,
        )
        for m in (model, baseline)
    ]
    rewards = golds = (None, None)
    if reward is not None:
        rewards = [score(reward, records, d.texts) for d in drawn]
    elif args.reward_model is not None:
        judge, judge_tokenizer = load_reward_model(
            args.reward_model, trust_remote_code=args.trust_remote_code
        )
        judge.to(args.device)
        rewards = [score_texts(judge, judge_tokenizer, prompts, d.texts).tolist() for d in drawn]
    if gold is not None:
        golds = [score(gold, records, d.texts) for d in drawn]
    kl = None
    if args.temperature > 0:
        kl = sequence_kl(
            model, baseline, ids, drawn[0].token_ids, args.temperature, args.batch_size
        )

    metrics = summarize(
        rewards=rewards[0],
        baseline_rewards=rewards[1],
        gold=golds[0],
        baseline_gold=golds[1],
        lengths=drawn[0].lengths,
        stopped=drawn[0].stopped,
        kl=kl,
    )
    columns = {"baseline": drawn[1].texts, "policy": drawn[0].texts}
    for name, values in (("reward", rewards), ("gold", golds)):
        if values[0] is not None:
            columns |= {f"baseline {name}": values[1], f"policy {name}": values[0]}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "samples.md").write_text(samples_table(prompts, columns, limit=50) + "\n")
    print(metrics_table(metrics))
    print(f"\n{args.out / 'metrics.json'}\n{args.out / 'samples.md'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
