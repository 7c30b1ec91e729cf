"""Reward model: the loss by hand, the read-out at the EOS, normalisation, folders, training."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf import UserError, reward_model
from rlhf.reward_model import (
    load_reward_model,
    normalize,
    pair_accuracy,
    pair_rows,
    pairwise_loss,
    reward_function,
    sample_rows,
    score_rows,
    score_texts,
    train_reward_model,
)
from rlhf.sft import save_folder
from rlhf.tasks import prompt_ids, score_together, story_prompts, write_stories
from rlhf.tiny_lm import build_tokenizer

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SHAPE | dict(num_key_value_heads=1)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SHAPE | dict(num_key_value_heads=1)),
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict(n_embd=32, n_layer=2, n_head=2)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        SHAPE | dict(num_key_value_heads=1, head_dim=16, sliding_window=8),
    ),
}


def causal_folder(folder, family="llama"):
    """A random language model with the stories' tokenizer, saved."""
    tokenizer = build_tokenizer()
    model_class, config_class, shape = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2, **shape
    )
    save_folder(folder, model_class(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    model, tokenizer = load_reward_model(
        causal_folder(tmp_path_factory.mktemp("judge") / "lm"), new_head=True
    )
    return model, tokenizer


def texts_of(count, seed=0):
    prompts = list(story_prompts()[1][:count])
    return prompts, write_stories(prompts, 24, seed)


def test_pairwise_loss_by_hand():
    loss = pairwise_loss(torch.tensor([2.0, 0.0, -100.0]), torch.tensor([1.0, 0.0, 100.0]))
    # -log sigmoid(1) = log(1 + 1/e), log 2, and no overflow far out
    expected = [math.log(1 + math.exp(-1)), math.log(2), 200.0]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_head_starts_as_in_the_paper(tmp_path):
    causal_folder(tmp_path / "lm")
    head = load_reward_model(tmp_path / "lm", new_head=True, seed=3)[0].model.score
    again = load_reward_model(tmp_path / "lm", new_head=True, seed=3)[0].model.score
    assert torch.equal(head.weight, again.weight) and head.bias is None
    drawn = torch.cat(
        [
            load_reward_model(tmp_path / "lm", new_head=True, seed=s)[0].model.score.weight
            for s in range(20)
        ]
    )
    assert drawn.std().item() == pytest.approx((32 + 1) ** -0.5, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_does_not_see_padding(family, tmp_path):
    model, tokenizer = load_reward_model(causal_folder(tmp_path / "lm", family), new_head=True)
    prompts, stories = texts_of(6)
    stories[0] = stories[0].split(" . ")[0] + " ."  # rows of different lengths
    alone = torch.cat(
        [score_texts(model, tokenizer, [p], [s]) for p, s in zip(prompts, stories, strict=True)]
    )
    together = score_texts(model, tokenizer, prompts, stories, batch_size=4)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std() > 1e-3

    row = torch.tensor([[2, 17, 4, 1]])
    last = torch.tensor([3])
    expected = model(row, last)
    for filler in (0, 1, 9):  # PAD, EOS, a word
        padded = torch.cat([row, torch.full((1, 5), filler)], 1)
        torch.testing.assert_close(model(padded, last), expected, rtol=1e-4, atol=1e-5)


def test_pad_settings_of_the_config_change_nothing(judge):
    model, tokenizer = judge
    prompts, stories = texts_of(4)
    expected = score_texts(model, tokenizer, prompts, stories)
    other = copy.deepcopy(model)
    for pad in (None, tokenizer.eos_token_id):
        other.config.pad_token_id = pad
        assert torch.equal(score_texts(other, tokenizer, prompts, stories), expected)


def test_number_of_forwards_depends_on_the_number_of_texts_only(judge):
    model, _ = judge
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for rows in ([[2, 5, 1]] * 10, [[2] + [5] * n + [1] for n in range(1, 90, 9)]):
        calls.clear()
        score_rows(model, rows, batch_size=4)
        assert len(calls) == 3
    handle.remove()


def test_as_a_reward_function(judge):
    """It scores like score_texts, whatever the time limit: none may stop a collective call."""
    model, tokenizer = judge
    prompts, stories = texts_of(5)
    reward = reward_function(model, tokenizer, torch.device("cpu"))
    assert reward.collective
    wanted = score_texts(model, tokenizer, prompts, stories).tolist()
    assert reward(prompts, stories) == wanted
    records = [{"prompt": prompt, "ids": [1], "level": 3} for prompt in prompts]
    assert score_together(reward, records, stories, timeout=1e-6) == wanted


def test_as_a_reward_function_of_chats(judge):
    """A chat reaches the reward model as messages, for its own template."""
    model, tokenizer = judge[0], copy.deepcopy(judge[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    reward = reward_function(model, tokenizer, torch.device("cpu"))
    chat = [{"role": "user", "content": "mira"}, {"role": "user", "content": "the ring"}]
    row = tokenizer("mira the ring", add_special_tokens=False)["input_ids"]
    row += tokenizer("she", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    found = score_together(reward, [{"prompt": chat, "ids": [1]}], ["she"])
    assert found == pytest.approx(score_rows(model, [row]).tolist())


def test_normalisation(judge):
    model = copy.deepcopy(judge[0])
    rows = [[2, *range(4 + i, 14 + i), 1] for i in range(100)]
    before = score_rows(model, rows)
    normalize(model, rows)
    after = score_rows(model, rows)
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="do not vary"):
        normalize(model, [[2, 5, 1]] * 4)


def test_folder_is_an_ordinary_one(judge, tmp_path):
    model, tokenizer = copy.deepcopy(judge[0]), judge[1]
    rows = [[2, *range(4 + i, 14 + i), 1] for i in range(10)]
    normalize(model, rows)
    save_folder(tmp_path / "rm", model.model, tokenizer)
    again, _ = load_reward_model(tmp_path / "rm")
    assert torch.equal(score_rows(again, rows), score_rows(model, rows))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        raw = plain(torch.tensor(rows)).logits[:, 0]
    scaled = (raw - plain.config.score_mean) / plain.config.score_std
    torch.testing.assert_close(scaled, score_rows(model, rows), rtol=1e-4, atol=1e-4)
    half, _ = load_reward_model(tmp_path / "rm", torch.bfloat16)
    assert score_rows(half, rows).dtype == torch.float32


def test_clear_errors(tmp_path):
    folder = causal_folder(tmp_path / "lm")
    with pytest.raises(UserError, match="without a reward head"):
        load_reward_model(folder)
    with pytest.raises(UserError, match="cannot load a reward model from"):
        load_reward_model(tmp_path / "nothing")
    model, _ = load_reward_model(folder, new_head=True)
    with pytest.raises(UserError, match="do not fill one batch"):
        train_reward_model(model, [([2, 1], [2, 1])], batch_size=2, progress=False)


def test_training_learns_a_preference(judge):
    """Stories that end well are preferred to those that do not: one word decides."""
    model, tokenizer = copy.deepcopy(judge[0]), judge[1]
    prompts, _ = texts_of(400)
    story = "she seeks a red key . at last she {} the key ."
    records = [
        {"prompt": p, "chosen": story.format("finds"), "rejected": story.format("loses")}
        for p in prompts
    ]
    pairs = pair_rows(tokenizer, records)
    assert tokenizer.decode(pairs[0][0][1:-1]) == prompts[0] + " " + records[0]["chosen"]
    assert pairs[0][0][-1] == tokenizer.eos_token_id
    loss = train_reward_model(
        model, pairs[:320], learning_rate=3e-3, batch_size=32, epochs=2, progress=False
    )
    assert loss < 0.2 and pair_accuracy(model, pairs[320:]) > 0.95
    assert pair_accuracy(model, [(chosen, chosen) for chosen, _ in pairs[:4]]) == 0.5


def test_samples_as_rows(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(build_tokenizer()), num_key_value_heads=1, **SHAPE)
    ).eval()
    tokenizer = build_tokenizer()
    prompts, _ = texts_of(3)
    texts, rows = sample_rows(model, tokenizer, prompts, 6, seed=1)
    assert (texts, rows) == sample_rows(model, tokenizer, prompts, 6, seed=1)
    for prompt, text, row in zip(prompts, texts, rows, strict=True):
        start = prompt_ids(tokenizer, prompt)
        assert row[: len(start)] == start and len(row) <= len(start) + 7
        assert row[len(start) :].index(tokenizer.eos_token_id) == len(row) - len(start) - 1
        assert tokenizer.decode(row[len(start) :], skip_special_tokens=True) == text


def preference_file(folder):
    prompts, stories = texts_of(40)
    with (folder / "prefs.jsonl").open("w") as file:
        for prompt, story in zip(prompts, stories, strict=True):
            row = {"prompt": prompt, "chosen": story, "rejected": "the ."}
            file.write(json.dumps(row) + "\n")
    return folder / "prefs.jsonl"


def test_two_processes_train_as_one(tmp_path):
    """The command under torchrun ends with the weights of the same command in this process."""
    folder, data = causal_folder(tmp_path / "lm"), preference_file(tmp_path)
    options = dict(batch_size=8, samples=16, response_tokens=8, held_out=0.2, learning_rate=1e-3)
    reward_model.main(
        reward_model.Args(model=str(folder), data=str(data), out=tmp_path / "one", **options)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "rlhf.reward_model", "--model", folder, "--data", data]
    command += ["--out", tmp_path / "two"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", value]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "on 8 held-out pairs" in done.stdout
    start, _ = load_reward_model(folder, new_head=True)
    one, two = (load_reward_model(tmp_path / name)[0] for name in ("one", "two"))
    moved = 0.0
    for before, a, b in zip(start.parameters(), one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        moved = max(moved, (a - before).abs().max().item())
    assert moved > 1e-3
    assert one.config.score_mean == pytest.approx(two.config.score_mean, rel=1e-2, abs=1e-3)


def test_command_errors(tmp_path):
    data = preference_file(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for model, out, message in (
        ("lm", tmp_path / "full", "is not a model folder"),
        (tmp_path / "gone", tmp_path / "rm", "cannot load a reward model"),
    ):
        with pytest.raises(UserError, match=message):
            reward_model.main(reward_model.Args(model=str(model), data=str(data), out=out))
