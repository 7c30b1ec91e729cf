"""The built-in model: tokenizer, folders, one preparation for many processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf import UserError, sft
from rlhf.reward_model import load_reward_model, sample_rows, score_rows
from rlhf.tasks import pad_token_id, prompt_ids, story_prompts, story_vocabulary, write_stories
from rlhf.tiny_lm import (
    Budget,
    all_cores,
    build_model,
    build_tokenizer,
    encode,
    prepare,
    recipe_hash,
)

SMALL = Budget(careful_stories=32, stories=64, pairs=32, test_pairs=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("cache"), quiet=True, budget=SMALL)


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    ids = [
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    ]
    assert len(set(ids)) == 4 and len(tokenizer) == len(story_vocabulary()) + 4
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    prompts = story_prompts()[1][:200]
    for prompt, story in zip(prompts, write_stories(prompts, 64, 1), strict=True):
        tokens = tokenizer(story, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == story
        assert prompt_ids(tokenizer, prompt)[0] == tokenizer.bos_token_id
        assert (
            tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == story
        )


def test_model_size_and_seed():
    tokenizer = build_tokenizer()
    model, same, other = (build_model(tokenizer, seed) for seed in (1, 1, 2))
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    pairs = list(zip(model.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_folders_are_ordinary(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.policy)
    policy = AutoModelForCausalLM.from_pretrained(prepared.policy).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(prepared.reward_model)
    assert plain.config.num_labels == 1
    prompts = story_prompts()[1][:32]
    _, rows = sample_rows(policy, tokenizer, prompts, 24)
    model, _ = load_reward_model(prepared.reward_model)
    scores = score_rows(model, rows)
    assert scores.isfinite().all() and scores.std() > 0.1
    report = json.loads((prepared.policy.parent / "report.json").read_text())
    assert 0.5 <= report["accuracy_ceiling"] < 1 and report["sft_loss"] < 6


def test_second_call_reuses(prepared, monkeypatch):
    monkeypatch.setattr("rlhf.tiny_lm._make", None)
    root = prepared.policy.parent.parent
    assert prepare(root, quiet=True, budget=SMALL) == prepared
    monkeypatch.setenv("FOLIO_CACHE", str(root))
    assert prepare(quiet=True, budget=SMALL) == prepared
    assert recipe_hash(24, SMALL) != recipe_hash(64, SMALL) != recipe_hash(64, Budget())


def test_concurrent_processes_prepare_once(tmp_path):
    """As the ranks of torchrun do. A killed run's left-over is swept away."""
    left_over = tmp_path / f".tiny_lm-24-{recipe_hash(24, SMALL)}.1.tmp"
    left_over.mkdir()
    code = (
        "from rlhf import tiny_lm; import torch; make = tiny_lm._make\n"
        "def counted(*a):\n    print('MADE with', torch.get_num_threads()); make(*a)\n"
        "tiny_lm._make = counted\n"
        f"print(tiny_lm.prepare({str(tmp_path)!r}, quiet=True, budget=tiny_lm.{SMALL!r}).policy)\n"
        "print('threads after', torch.get_num_threads())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    with all_cores():
        made = f"MADE with {torch.get_num_threads()}"
    assert sorted("MADE" in output for output in outputs) == [False, False, True]
    assert any(made in output for output in outputs)
    assert all("threads after 1" in output for output in outputs)
    folders = [entry.name for entry in tmp_path.iterdir() if entry.is_dir()]
    assert folders == [f"tiny_lm-24-{recipe_hash(24, SMALL)}"]


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    def fails(folder, *_):
        folder.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr("rlhf.tiny_lm._make", fails)
    with pytest.raises(UserError, match=r"no space left.*FOLIO_CACHE"):
        prepare(tmp_path, quiet=True, budget=SMALL)
    assert not any(entry.is_dir() for entry in tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the built-in model"):
        prepare(tmp_path / "file", quiet=True, budget=SMALL)
    with pytest.raises(UserError, match=">= 20"):
        prepare(tmp_path, 12, quiet=True, budget=SMALL)


# === SFT =========================================================================================


def test_collate_marks_what_is_learned():
    input_ids, positions = sft.collate([([2, 5], [6, 1]), ([2], [7, 8, 9, 1])])
    assert input_ids.tolist() == [[2, 5, 6, 1, 0], [2, 7, 8, 9, 1]]
    assert positions.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]
    _, positions = sft.collate([([2, 5], [6, 1]), ([], [7])], all_tokens=True)
    assert positions.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]


def test_sft_loss_is_cross_entropy():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    input_ids, positions = sft.collate([([2, 5], [6, 1]), ([2], [7, 8, 9, 1])])
    labels = input_ids.masked_fill(~positions, -100)
    expected = model(input_ids, labels=labels).loss
    got = sft.sft_loss(model, input_ids, positions) / positions.sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sft_learns(tmp_path):
    """The command lowers the loss; what it wrote loads."""
    tokenizer = build_tokenizer()
    sft.save_folder(tmp_path / "start", build_model(tokenizer), tokenizer)
    prompts = story_prompts()[0][:64]
    stories = write_stories(prompts, 24, 1)
    with (tmp_path / "d.jsonl").open("w") as file:
        for prompt, story in zip(prompts, stories, strict=True):
            file.write(json.dumps({"prompt": prompt, "completion": story}) + "\n")
    sft.main(
        sft.Args(
            model=str(tmp_path / "start"),
            data=str(tmp_path / "d.jsonl"),
            out=tmp_path / "sft",
            epochs=4,
            batch_size=16,
            learning_rate=1e-3,
        )
    )
    examples = encode(tokenizer, prompts, stories)
    losses = []
    for name in ("start", "sft"):
        model, _ = sft.load_causal_lm(tmp_path / name)
        input_ids, positions = sft.collate(examples)
        with torch.no_grad():
            losses.append((sft.sft_loss(model, input_ids, positions) / positions.sum()).item())
    assert losses[1] < losses[0] - 1


def test_schedule():
    assert sft.schedule_at(0.05, "linear", 0.1) == 0.5
    assert sft.schedule_at(0.55, "linear", 0.1) == pytest.approx(0.5)
    assert sft.schedule_at(0.5, "cosine") == pytest.approx(0.5)
    assert sft.schedule_at(0.0, "cosine") == 1.0
