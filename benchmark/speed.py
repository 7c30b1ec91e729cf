"""Speed and memory against the usual way, both measured in one run.

    python -m benchmark speed sampler
    python -m benchmark speed scoring
    python -m benchmark speed scoring --model FOLDER --peer trl
    python -m benchmark speed ppo --peer cleanrl --cleanrl CHECKOUT
    python -m benchmark speed ppo --peer sb3
    python -m benchmark speed sac --cleanrl CHECKOUT
    python -m benchmark speed td3 --cleanrl CHECKOUT
    python -m benchmark speed grpo
    python -m benchmark speed update

Peers from pip live in an environment of their own, since their pins are not ours: `make peers`
installs benchmark/peers/requirements.txt into .venv-peers. Other work on the machine slows both
sides alike, so sides alternate and only ratios are reported: median [minimum, maximum] over the
pairs.
"""

import functools
import inspect
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from rlhf import UserError
from rlhf.logprobs import completion_logprobs
from rlhf.sampler import generate
from rlhf.tiny_lm import character_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmark" / "peers"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def peers_python() -> Path:
    if not PEERS_PYTHON.exists():
        raise UserError("the peers from pip are not installed: make peers")
    return PEERS_PYTHON


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}x [{min(values):.2f}, {max(values):.2f}]"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------- SAMPLER


class PlannedLengths(StoppingCriteria):
    """Stops row i of a `model.generate` batch after lengths[i] new tokens."""

    def __init__(self, prompt_length: int, lengths: list[int]):
        self.ends = prompt_length + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def sampler(pairs: int = 5, batch: int = 64, prompt_length: int = 16, threads: int = 2) -> None:
    """Greedy tokens a second of rlhf.sampler against the better of two caches of model.generate.

    A Llama of 6 layers and width 256. Equal: one batch of 64 new tokens a row. Ragged: four times
    as many prompts with 8 to 64 new tokens; generate runs batch after batch.

    Args:
        pairs: Alternating repetitions after one warm-up.
        batch: Rows of model.generate and slots of the sampler.
        prompt_length: Tokens in a prompt.
        threads: CPU threads of torch.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = torch.randint(2, 512, (4 * batch, prompt_length))
    ragged = torch.randint(8, 65, (4 * batch,)).tolist()
    print(f"Llama 6 x 256, {batch} rows, {prompt_length} prompt tokens, {threads} threads")

    for name, ids, lengths in (
        ("equal", prompts[:batch], [64] * batch),
        ("ragged", prompts, ragged),
    ):
        outputs = {}

        def ours(ids=ids, lengths=lengths, outputs=outputs):
            done = generate(
                model,
                ids.tolist(),
                max_new_tokens=lengths,
                stop_ids=[1],
                pad_id=0,
                temperature=0,
                slots=batch,
            )
            rows = zip(done.tokens, done.lengths, strict=True)
            outputs["ours"] = [row[:n].tolist() for row, n in rows]

        def theirs(ids=ids, lengths=lengths, outputs=outputs, **options):
            outputs["theirs"] = rows = []
            for i in range(0, len(ids), batch):
                part, ends = ids[i : i + batch], lengths[i : i + batch]
                tokens = model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    max_new_tokens=max(ends),
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([PlannedLengths(prompt_length, ends)]),
                    **options,
                )
                for row, n in zip(tokens[:, prompt_length:].tolist(), ends, strict=True):
                    row = row[:n]
                    rows.append(row[: row.index(1) + 1] if 1 in row else row)

        static = dict(cache_implementation="static", disable_compile=True)
        times = {"ours": [], "dynamic": [], "static": []}
        for pair in range(-1, pairs):
            for side, function in (
                ("ours", ours),
                ("dynamic", theirs),
                ("static", functools.partial(theirs, **static)),
            ):
                elapsed = seconds(function)
                if pair >= 0:
                    times[side].append(elapsed)
        best = [min(d, s) for d, s in zip(times["dynamic"], times["static"], strict=True)]
        ratios = [b / o for b, o in zip(best, times["ours"], strict=True)]
        differ = sum(a != b for a, b in zip(outputs["ours"], outputs["theirs"], strict=True))
        count = sum(map(len, outputs["ours"]))
        rates = {side: f"{count / statistics.median(t):.0f}" for side, t in times.items()}
        print(
            f"{name:7s} {spread(ratios)} over {pairs} pairs; tokens/s ours {rates['ours']}, "
            f"generate {rates['dynamic']} (static cache {rates['static']}); "
            f"{differ} of {len(ids)} rows differ"
        )


# ------------------------------------------------------------------------------- SCORING


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError("peak memory is read from /proc/self/status: run this on Linux")


def scoring_child(side: str, backward: bool, model_name: str, shape: list[int], out: str) -> None:
    """One pass in a fresh process; writes values to `out` and prints peak bytes and seconds."""
    torch.manual_seed(0)
    if model_name:
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    else:
        config = Gemma3TextConfig(  # the shape of Gemma 3 270M
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
        )
        model = AutoModelForCausalLM.from_config(config)
    model.eval()  # no dropout; gradients are not affected
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False

    def score() -> torch.Tensor:
        if side == "ours":
            return completion_logprobs(model, ids, scored)[0][:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        if side == "trl":
            from trl.trainer.utils import selective_log_softmax

            return selective_log_softmax(logits, ids[:, 1:])
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    # forget the peak of loading
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        values = score()
        if backward:
            values.mean().backward()
    elapsed = time.perf_counter() - start
    peak = resident_bytes("VmHWM") - before
    with torch.no_grad():  # the first sequence in float64, with the plain formula
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1].double()
        logits = hidden @ model.get_output_embeddings().weight.double().t()
        softcap = getattr(model.config, "final_logit_softcapping", None)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        exact = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.save({"values": values.detach(), "exact": exact}, out)
    print(json.dumps({"peak": peak, "seconds": elapsed}))


def scoring(
    model: str = "",
    peer: Literal["naive", "trl"] = "naive",
    pairs: int = 5,
    batch: int = 16,
    length: int = 128,
) -> None:
    """Peak memory and time of one scoring pass against log_softmax of the full logits, or TRL's.

    Every pass runs in its own process; memory is its peak minus what it held after loading.

    Args:
        model: Folder or name of a causal LM; default: random weights in the shape of Gemma 3 270M.
        peer: The plain formula, or selective_log_softmax of TRL (`make peers`).
        pairs: Alternating repetitions.
        batch: Sequences.
        length: Tokens in each.
    """
    if model and not Path(model, "config.json").exists():
        raise UserError(f"no config.json in {model}: pass a folder written by save_pretrained")
    pythons = {"ours": sys.executable, peer: peers_python() if peer == "trl" else sys.executable}
    print(f"{model or 'random Gemma 3 270M'}, {batch} x {length} tokens, float32")
    with tempfile.TemporaryDirectory() as folder:
        for backward in (False, True):
            results = {"ours": [], peer: []}
            for _ in range(pairs):
                for side, runs in results.items():
                    job = [side, backward, model, [batch, length], f"{folder}/{side}"]
                    command = [str(pythons[side]), "-m", "benchmark.speed", json.dumps(job)]
                    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                    if child.returncode:
                        raise UserError(f"the {side} pass failed (see above): out of memory?")
                    runs.append(json.loads(child.stdout.splitlines()[-1]))
            saved = [torch.load(f"{folder}/{side}", weights_only=True) for side in results]
            ours, theirs = (x["values"] for x in saved)
            errors = [(x["values"][0] - x["exact"]).abs().max() for x in saved]
            both = list(zip(results[peer], results["ours"], strict=True))
            gib = {side: max(r["peak"] for r in runs) / 2**30 for side, runs in results.items()}
            print(
                f"{'forward + backward' if backward else 'forward only':18s} "
                f"peak {gib['ours']:.2f} GiB, {peer} {gib[peer]:.2f} GiB: {peer} / ours "
                f"{spread([n['peak'] / o['peak'] for n, o in both])}; time {peer} / ours "
                f"{spread([n['seconds'] / o['seconds'] for n, o in both])}; "
                f"largest difference {(ours - theirs).abs().max():.1e} (from float64: ours "
                f"{errors[0]:.1e}, {peer} {errors[1]:.1e})"
            )


# ----------------------------------------------------------------------------------- PPO


# PITFALL: until its exec a child counts the memory of whoever started it as its own peak, so that
# must be a small process.
RUN = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code != 0)
"""


def run_script(
    words: list[str], folder: Path, python: Path | str = sys.executable, threads: int = 1
) -> tuple[str, int]:
    """Run a training script in `folder`; returns what it printed, and its peak memory in bytes."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, str(python), *words],
        cwd=folder,
        env=os.environ | limits | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise UserError(f"{' '.join(words)} failed, see above")
    printed, _, peak = done.stdout.rstrip().rpartition("\n")
    return printed, int(peak) * (1 if sys.platform == "darwin" else 1024)


def ppo(
    peer: Literal["cleanrl", "sb3"] = "cleanrl",
    cleanrl: Path | None = None,
    pairs: int = 5,
    steps: int = 20_480,
    compile: bool = False,
) -> None:
    """Steps a second of ppo_continuous_action.py against CleanRL's script or Stable-Baselines3.

    HalfCheetah-v5, one environment, one thread, CleanRL's hyperparameters on both sides.
    Rollout and update together; the first two rollouts of each run are warm-up.

    Args:
        peer: CleanRL's script of the same name, or PPO of Stable-Baselines3 (`make peers`).
        cleanrl: Folder of a checkout: git clone https://github.com/vwxyzjn/cleanrl
        pairs: Alternating runs of each side.
        steps: Environment steps of a run, 2048 a rollout.
        compile: Run ours with --compile.
    """
    if steps < 4 * 2048:
        raise UserError(f"--steps {steps}: at least four rollouts of 2048 steps")
    common = ["--env-id", "HalfCheetah-v5", "--total-timesteps", str(steps)]
    if peer == "cleanrl":
        python, words = sys.executable, cleanrl_command(cleanrl, "ppo_continuous_action")
    else:
        python, words = peers_python(), [str(PEERS / "sb3.py")]
    ours = ROOT / "algos" / "ppo_continuous_action.py"
    rates = {"ours": [], peer: []}
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            flags = ["--run-dir", "run", "--eval-episodes", "1", *["--compile"] * compile]
            run_script([str(ours), *common, *flags], folder)
            # by the clock of its log, as the peer's rate: from the second rollout to the last
            events = scalars(folder / "run", "charts/SPS")
            elapsed = events[-1].wall_time - events[1].wall_time
            rates["ours"].append(2048 * (len(events) - 2) / elapsed)

            out, _ = run_script([*words, *common], folder, python)
            # it prints steps / seconds since the start after each rollout
            printed = [float(rate) for rate in re.findall(r"^SPS: ([\d.]+)$", out, re.M)]
            seconds_at = [2048 * (i + 1) / rate for i, rate in enumerate(printed)]
            elapsed = seconds_at[-1] - seconds_at[1]
            rates[peer].append(2048 * (len(printed) - 2) / elapsed)
        print("  ".join(f"{side} {values[-1]:.0f} steps/s" for side, values in rates.items()))
    print_rates(rates)


def cleanrl_command(checkout: Path | None, script: str) -> list[str]:
    """How Python starts a script of a CleanRL checkout; raises UserError where there is none."""
    path = checkout and checkout.resolve() / "cleanrl" / f"{script}.py"
    if not (path and path.exists()):
        raise UserError(
            "git clone https://github.com/vwxyzjn/cleanrl and give its folder: --cleanrl FOLDER"
        )
    return [str(PEERS / "cleanrl.py"), str(path), "--no-cuda"]


def scalars(folder: Path, key: str) -> list:
    """What TensorBoard files hold of a key: step, wall_time and value of each."""
    # not in the environment of the peers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload().Scalars(key)


def print_rates(rates: dict[str, list[float]]) -> None:
    """One line of the steps a second of both sides, ours first."""
    (ours, theirs), (_, peer) = rates.values(), rates
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    medians = [f"{statistics.median(values):.0f}" for values in (ours, theirs)]
    print(
        f"ours / {peer} {spread(ratios)} over {len(ratios)} pairs; steps/s ours {medians[0]}, "
        f"{peer} {medians[1]}"
    )


# ------------------------------------------------------------------------------ SAC, TD3

LEARNING_STARTS, WARM_UP_UPDATES = 1000, 200


def off_policy(
    script: str,
    cleanrl: Path | None,
    pairs: int,
    steps: int,
    precision: Literal["float32", "bf16"],
    compile: bool,
) -> None:
    first = LEARNING_STARTS + WARM_UP_UPDATES
    if steps < first + 400:
        raise UserError(f"--steps {steps}: at least {first + 400}, as {first} are warm-up")
    words = cleanrl_command(cleanrl, script)
    common = ["--env-id", "HalfCheetah-v5", "--total-timesteps", str(steps)]
    common += ["--learning-starts", str(LEARNING_STARTS)]
    flags = ["--device", "cpu", "--run-dir", "run", "--eval-episodes", "1"]
    flags += ["--precision", precision, *["--compile"] * compile]
    commands = {"ours": [str(ROOT / "algos" / f"{script}.py"), *flags], "cleanrl": words}
    rates = {side: [] for side in commands}
    for _ in range(pairs):
        for side, command in commands.items():
            with tempfile.TemporaryDirectory() as name:
                run_script([*command, *common], Path(name))
                logs = next(Path(name).rglob("events.out.tfevents.*")).parent
                # both log every 100 steps; by the clock of the log, as logging is part of the work
                events = [e for e in scalars(logs, "charts/SPS") if e.step >= first]
            start, end = events[0], events[-1]
            rates[side].append((end.step - start.step) / (end.wall_time - start.wall_time))
        print("  ".join(f"{side} {values[-1]:.0f} steps/s" for side, values in rates.items()))
    print_rates(rates)


def sac(
    cleanrl: Path | None = None,
    pairs: int = 5,
    steps: int = 3000,
    precision: Literal["float32", "bf16"] = "float32",
    compile: bool = False,
) -> None:
    """Steps a second of sac_continuous_action.py against CleanRL's script.

    HalfCheetah-v5, one environment, one thread, CleanRL's hyperparameters on both sides: a step is
    one step of the environment and one update. Random steps and the first updates are warm-up.

    Args:
        cleanrl: Folder of a checkout: git clone https://github.com/vwxyzjn/cleanrl
        pairs: Alternating runs of each side.
        steps: Environment steps of a run.
        precision: Of ours; the peer has float32.
        compile: Run ours with --compile.
    """
    off_policy("sac_continuous_action", cleanrl, pairs, steps, precision, compile)


def td3(
    cleanrl: Path | None = None,
    pairs: int = 5,
    steps: int = 3000,
    precision: Literal["float32", "bf16"] = "float32",
    compile: bool = False,
) -> None:
    """Steps a second of td3_continuous_action.py against CleanRL's script, as `speed sac`.

    Args:
        cleanrl: Folder of a checkout: git clone https://github.com/vwxyzjn/cleanrl
        pairs: Alternating runs of each side.
        steps: Environment steps of a run.
        precision: Of ours; the peer has float32.
        compile: Run ours with --compile.
    """
    off_policy("td3_continuous_action", cleanrl, pairs, steps, precision, compile)


# ---------------------------------------------------------------------------------- GRPO

PARTS = ("generate", "score", "update")
RESPONSES, GROUP, RESPONSE_LENGTH, PROMPT_LENGTH = 64, 8, 64, 10  # of a step; tokens at most
WARM_UP_STEPS = 2
WARM_UP_STEPS_COMPILED = 6  # a graph is compiled again when a size changes for the first time


def answer_share(prompts, completions, answer, **columns):
    """A reward that random text earns now and then: the share of its characters in the answer."""
    pairs = zip(completions, answer, strict=True)
    return [sum(c in wanted for c in text) / max(len(text), 1) for text, wanted in pairs]


def grpo_inputs(folder: Path, seed: int = 1) -> None:
    """Write model/, prompts.jsonl and reward.py, which both sides read.

    The weights are random, so that every token is about as likely as any other: of 99 one is EOS,
    half of the responses end before they are cut at 64 tokens, and lengths are ragged.
    """
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng, lines = random.Random(seed), []
    for _ in range(512):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        lines.append(json.dumps({"prompt": f"{a}+{b}-{c}=", "answer": str(a + b - c)}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(inspect.getsource(answer_share))


def grpo_flags(steps: int, micro_batch: int) -> list[str]:
    """What the peer has in benchmark/peers/trl_grpo.py, as flags of algos/grpo_fsdp.py."""
    flags = {
        "device": "cpu",
        "total-episodes": RESPONSES * steps,
        "batch-size": RESPONSES,
        "group-size": GROUP,
        "response-length": RESPONSE_LENGTH,
        "micro-batch-tokens": micro_batch * (PROMPT_LENGTH + RESPONSE_LENGTH),
        "kl-coef": 0.04,
        "clip-coef": 0.2,
        "update-epochs": 1,
        "num-minibatches": 1,
        "max-grad-norm": 1.0,
        "temperature": 1.0,
        "learning-rate": 1e-6,
        "eval-prompts": 8,
        "eval-samples": 1,
        "run-dir": "run",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def per_token(steps: dict[str, list[float]], warm_up: int) -> dict[str, float]:
    """Seconds of a completion token, and those of its parts, without the steps for warm-up."""
    tokens = sum(steps["tokens"][warm_up:])
    return {name: sum(steps[name][warm_up:]) / tokens for name in ("seconds", *PARTS)}


def logged_steps(run_dir: Path) -> dict[str, list[float]]:
    """Seconds, their parts and completion tokens of each update in the logs of algos/grpo_fsdp.py.

    By the clock of the log, as logging is part of a step; the first one has no beginning there.
    """
    lengths = scalars(run_dir, "charts/response_length")
    times = [event.wall_time for event in lengths]
    steps = {"seconds": [0.0, *(b - a for a, b in itertools.pairwise(times))]}
    steps["tokens"] = [round(event.value * RESPONSES) for event in lengths]
    for part in PARTS:
        steps[part] = [event.value for event in scalars(run_dir, f"charts/seconds_{part}")]
    return steps


def grpo(
    peer: Literal["trl"] = "trl",
    pairs: int = 5,
    steps: int = 8,
    threads: int = 1,
    micro_batch: int = 8,
    peer_micro_batch: int = 64,
    bf16: bool = False,
    compile: bool = False,
) -> None:
    """Seconds of a completion token and peak memory of grpo_fsdp.py against TRL's GRPOTrainer.

    A Llama of 6 layers and width 256 with random weights and one token a character, 8 prompts a
    step, 8 responses of at most 64 tokens to each, one update on them. A step is all of it: sample,
    score, update and log; the first two of each run (six with --compile) are warm-up. Memory is
    that of the process.

    Args:
        peer: GRPOTrainer of TRL (`make peers`).
        pairs: Alternating runs of each side.
        steps: Steps of a run.
        threads: CPU threads of torch.
        micro_batch: Responses in one forward and backward pass of ours.
        peer_micro_batch: The same, of the peer; 64 is its fastest, 16 as fast with less memory.
        bf16: Both compute in bfloat16, with weights and optimizer in float32.
        compile: Both run with torch.compile.
    """
    warm_up = WARM_UP_STEPS_COMPILED if compile else WARM_UP_STEPS
    if steps < warm_up + 2:
        raise UserError(f"--steps {steps}: at least {warm_up + 2}, as {warm_up} are warm-up")
    for flag, rows in (("micro-batch", micro_batch), ("peer-micro-batch", peer_micro_batch)):
        if rows < 1 or RESPONSES % rows:
            raise UserError(f"--{flag} {rows}: want a divisor of {RESPONSES}")
    python, inputs = peers_python(), ["--model", "model", "--data", "prompts.jsonl"]
    inputs += ["--reward", "reward.py:answer_share"]
    ours = [str(ROOT / "algos" / "grpo_fsdp.py"), *inputs, *grpo_flags(steps, micro_batch)]
    switches = ["--bf16"] * bf16 + ["--compile"] * compile
    theirs = [str(PEERS / "trl_grpo.py"), *inputs, "--steps", str(steps)]
    theirs += ["--threads", str(threads), "--micro-batch", str(peer_micro_batch)]
    ours, theirs = ours + switches, theirs + switches
    transformers_logging.disable_progress_bar()  # of writing the model
    costs, peaks, lengths = ({"ours": [], peer: []} for _ in range(3))
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            grpo_inputs(folder)
            _, peak = run_script(ours, folder, threads=threads)
            runs = {"ours": logged_steps(folder / "run") | {"memory": peak}}
            out, peak = run_script(theirs, folder, python, threads)
            runs[peer] = json.loads(out.splitlines()[-1]) | {"memory": peak}
        for side, run in runs.items():
            costs[side].append(per_token(run, warm_up))
            peaks[side].append(run["memory"])
            lengths[side] += run["tokens"][warm_up:]
        rates = {side: 1 / found[-1]["seconds"] for side, found in costs.items()}
        print("  ".join(f"{side} {rate:.0f} tokens/s" for side, rate in rates.items()), flush=True)

    kind = ("bfloat16" if bf16 else "float32") + ", compiled" * compile
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*costs.values(), strict=True)]
    memory = [b / a for a, b in zip(*peaks.values(), strict=True)]
    print(
        f"{peer} / ours: time of a completion token {spread(ratios)}, peak memory {spread(memory)} "
        f"over {pairs} pairs; Llama 6 x 256, {kind}, {threads} threads, micro-batches of "
        f"{micro_batch} and {peer_micro_batch} responses"
    )
    for side, found in costs.items():
        rate = statistics.median(1 / cost["seconds"] for cost in found)
        parts = [f"{part} {1e6 * statistics.median(c[part] for c in found):.0f}" for part in PARTS]
        print(
            f"{side:5s} {rate:.0f} tokens/s, {statistics.mean(lengths[side]):.0f} tokens a step; "
            f"microseconds a token: {', '.join(parts)}; peak {max(peaks[side]) / 2**20:.0f} MiB"
        )
    print(f"{peer} holds {runs[peer]['peak'] / 2**20:.0f} MiB of it above what loading left")


# -------------------------------------------------------------------------------- UPDATE


def update(paper: str | None = None, updates: int = 10, threads: int = 1) -> None:
    """The machine's matrix-product rate, and the share of it that each script's update reaches.

    Each script runs with the flags of its first run in benchmark/papers/ (scale laptop), but not
    compiled, in its own process. Before each update the rate of one large float32 product is
    measured. Work counts matrix products only, forward and backward.

    Args:
        paper: Scripts of one file of benchmark/papers/; default: of all.
        updates: Updates to time after two for warm-up, an even number; as many others are counted.
        threads: CPU threads of torch.
    """
    from benchmark import papers  # not in the environment of the peers

    if updates < 2 or updates % 2:
        raise UserError(f"--updates {updates}: an even number of at least 2")
    print(
        f"{'script':24s} {'GFLOP/update':>12s} {'ms/update':>10s}  {'GFLOP/s':>8s}  of the machine"
    )
    seen = set()
    for name in [paper] if paper else papers.names():
        for run in papers.load(name).runs:
            flags = run.flags("laptop") or run.flags("paper")
            if run.script in seen or flags is None or run.teacher:  # whose update is its parent's
                continue
            seen.add(run.script)
            # operators of a compiled update could not be counted
            flags = [flag for flag in flags if flag != "--compile"]
            envs = ["--env-id", run.envs[0]] if run.envs else []
            script = str(ROOT / "algos" / f"{run.script}.py")
            with tempfile.TemporaryDirectory() as folder:
                job = [script, updates, threads, *envs, *flags, "--run-dir", f"{folder}/run"]
                words = [sys.executable, "-m", "benchmark.flops", *map(str, job)]
                child = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            if child.returncode:
                print(child.stderr[-2000:], file=sys.stderr)
                raise UserError(f"{run.script} failed, see above")
            found = json.loads(child.stdout.splitlines()[-1])
            flops = statistics.mean(found["flops"])  # of the updates between the timed ones
            rate = flops / statistics.mean(found["seconds"])
            # two neighbours together: in every second one the actor of SAC and TD3 learns too
            pairs = [
                list(zip(x[::2], x[1::2], strict=True))
                for x in (found["seconds"], found["machine"])
            ]
            shares = [2 * flops / sum(s) / statistics.mean(m) for s, m in zip(*pairs, strict=True)]
            low, middle, high = min(shares), statistics.median(shares), max(shares)
            print(
                f"{run.script:24s} {flops / 1e9:12.2f} "
                f"{statistics.mean(found['seconds']) * 1e3:10.1f}  {rate / 1e9:8.1f}  "
                f"{middle:.1%} [{low:.1%}, {high:.1%}] of "
                f"{statistics.median(found['machine']) / 1e9:.0f} GFLOP/s"
            )


def main(flags: list[str]) -> None:
    commands = (sampler, scoring, ppo, sac, td3, grpo, update)
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__: command for command in commands},
        prog="python -m benchmark speed",
        args=flags,
    )


if __name__ == "__main__":  # a child of scoring(); people start python -m benchmark
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    scoring_child(*json.loads(sys.argv[1]))
