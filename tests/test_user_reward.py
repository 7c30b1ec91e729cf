"""A reward that fails in the middle of a run, over all scripts for language models."""

import importlib
import json
import signal

import pytest
import torch
import tyro

from rlhf import UserError
from tests.launch import assert_same_run, checkpoints
from tests.test_reward_model import causal_folder

SCRIPTS = {
    "grpo_fsdp": "--group-size 4 --eval-samples 2 --num-minibatches 2 --dynamic-sampling",
    "rft_fsdp": "--group-size 4 --eval-samples 2 --success-score 0.5 --source policy",
    "ppo_rlhf_fsdp": "--kl-target 1",
}
# Draws numbers, as some do, before it fails; the n-th call counts from the first evaluation on.
REWARD = """
import random
calls = 0
def f(prompts, completions, **columns):
    global calls
    calls += 1
    drawn = [random.random() + len(text) for text in completions]
    if calls == {bad_call}:
        raise KeyError("answer")
    return drawn
"""

pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(name, run, bad_call, *flags): a run of three updates, in this process."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    folder = causal_folder(tmp_path / "lm")
    prompts = ["a red key", "the ring", "mira walks", "he runs to the lake"] * 3
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (tmp_path / "data.jsonl").write_text("".join(lines))

    def run(name, run_dir, bad_call, *flags):
        script = importlib.import_module(f"algos.{name}")
        monkeypatch.setattr(script, "setup_process", lambda device: (0, 1, torch.device("cpu")))
        (tmp_path / "user.py").write_text(REWARD.format(bad_call=bad_call))
        words = f"--model {folder} --data {tmp_path / 'data.jsonl'} --reward {tmp_path}/user.py:f "
        words += f"--run-dir {run_dir} --batch-size 8 --total-episodes 24 --eval-prompts 4 "
        words += f"--response-length 5 {SCRIPTS[name]}"
        script.main(tyro.cli(script.Args, args=[*words.split(), *flags]))

    yield run
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize("eval_every", ["0", "1"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_update_before_a_failed_reward_is_saved(name, eval_every, start, tmp_path):
    """None was due for ten minutes; the resumed run is the uninterrupted one to the last bit."""
    flags = ["--eval-every", eval_every]
    start(name, tmp_path / "whole", 0, *flags)
    bad_call = 6 if eval_every == "1" else 4  # in the third update
    with pytest.raises(UserError, match=r"raised KeyError: 'answer' at .*user\.py:9") as caught:
        start(name, tmp_path / "cut", bad_call, *flags)
    newest = checkpoints(tmp_path / "cut")[-1]
    assert int(newest.name) == 16
    assert str(caught.value).endswith(f"--resume auto continues from {newest}")
    start(name, tmp_path / "cut", 0, *flags, "--resume", "auto")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


FREE = {
    "reward_timeout": 90.0,
    "cache_gb": 1.0,
    "micro_batch_tokens": 64,
    "activation_checkpointing": True,
    "offload_frozen": True,
    "compile": True,
    "save_every": 1.0,
    "eval_every": 3,
    "device": "cpu",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_resumed_run_may_change(name, tmp_path):
    """What does not enter the mathematics; a longer limit is what a reward that ran late needs."""
    script = importlib.import_module(f"algos.{name}")
    torch.save({"args": script.plain_args(script.Args())}, tmp_path / "rank0.pt")
    for flag, value in FREE.items():
        if hasattr(script.Args, flag):
            assert getattr(script.Args(), flag) != value
            script.load_checkpoint(tmp_path, script.Args(**{flag: value}))
    for flag, value in (("temperature", 0.9), ("update_epochs", 3), ("eval_prompts", 9)):
        with pytest.raises(UserError, match=f"--resume: {flag} was .*, now it is {value}"):
            script.load_checkpoint(tmp_path, script.Args(**{flag: value}))
