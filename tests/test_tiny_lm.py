"""The built-in model: tokenizer, folders, one preparation for many processes."""

import contextlib
import json
import os
import string
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
    WarmStart,
    build_model,
    build_tokenizer,
    character_tokenizer,
    encode,
    idle_cores,
    prepare,
    recipe_hash,
    warm_start,
)
from rlhf.verifiable import NAMES, demonstrations, verifiable_task

SMALL = Budget(careful_stories=32, stories=64, pairs=32, test_pairs=16)
FEW = WarmStart(demonstrations=128, epochs=1.0)


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


def test_threads_for_idle_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    before = torch.get_num_threads()
    for load, threads in ((0.1, 4), (1.7, 2), (40.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        with idle_cores():
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before


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
    assert sorted("MADE" in output for output in outputs) == [False, False, True]
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


# === WARM START ==================================================================================


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gsm_symbolic"])
def test_character_tokenizer_round_trip(name):
    """All that is asked and answered, but for the pound signs in the stories of gsm_symbolic."""
    tokenizer = character_tokenizer()
    task = verifiable_task(name, train_size=50, test_size=10)
    prompts = [record["prompt"] for record in task.train]
    for text in [*prompts, *demonstrations(task, task.train, 1, 0.5)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        ended = [*ids, tokenizer.eos_token_id]
        assert tokenizer.decode(ended, skip_special_tokens=True) == text
        assert prompt_ids(tokenizer, text) == [tokenizer.bos_token_id, *ids]


def test_character_tokenizer_by_itself(tmp_path):
    tokenizer = character_tokenizer()
    special = "pad_token_id eos_token_id bos_token_id unk_token_id".split()
    assert len({getattr(tokenizer, name) for name in special}) == 4
    assert len(tokenizer) == 4 + 95 and pad_token_id(tokenizer) == tokenizer.pad_token_id
    visible = "".join(c for c in string.printable if c.isprintable())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (visible, "  two  spaces ", "a , b ?", "(1+2)*3", " '"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == again.decode(ids) == text
    assert tokenizer("\u00e9", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


@pytest.fixture
def one_core(monkeypatch):
    """Threads that wait for each other make such small work slow where other tests run too."""
    monkeypatch.setattr("rlhf.tiny_lm.idle_cores", contextlib.nullcontext)


def test_warm_start_is_made_once(tmp_path, monkeypatch, capsys, one_core):
    arguments = dict(cache_dir=tmp_path, quiet=True, budget=FEW)
    folder = warm_start("chain_sum", (0, 1), **arguments)
    assert "preparing" not in "".join(capsys.readouterr())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    calls = []
    monkeypatch.setattr("rlhf.tiny_lm.train_sft", lambda *_, **__: calls.append(1) or 0.0)
    assert warm_start("chain_sum", (0, 1), **arguments) == folder and not calls
    others = [
        warm_start("chain_sum", (0, 0), **arguments),
        warm_start("products", (0, 1), **arguments),
        warm_start("chain_sum", (0, 1), '{"allow_negation": true}', **arguments),
        warm_start("chain_sum", (0, 1), **arguments | {"budget": WarmStart(64, 1.0)}),
    ]
    assert len({folder, *others}) == 5 and len(calls) == 4
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {folder, *others}


def test_warm_start_shows_a_small_world_several_times(tmp_path, monkeypatch, one_core):
    """The sums of two digits are 90 or so: as many demonstrations all the same."""
    shown = []

    def train(model, examples, **_):
        shown.extend((tuple(prompt), tuple(answer)) for prompt, answer in examples)
        return 0.0

    monkeypatch.setattr("rlhf.tiny_lm.train_sft", train)
    budget = WarmStart(demonstrations=1000)
    warm_start("chain_sum", (0, 0), cache_dir=tmp_path, quiet=True, budget=budget)
    prompts = {prompt for prompt, _ in shown}
    assert len(shown) == 1000 and len(prompts) < 300
    assert len(set(shown)) > len(prompts), "with other errors"


@pytest.mark.parametrize(
    ("task", "levels", "config", "message"),
    [
        ("nope", (0, 0), "{}", "unknown task 'nope'"),
        ("chain_sum", (0, 99), "{}", "levels 0 to 99"),
        ("chain_sum", (0, 0), "{", "not valid JSON"),
        ("chain_sum", (0, 0), '{"nope": 1}', "no configuration field 'nope'"),
    ],
)
def test_warm_start_that_cannot_be(task, levels, config, message, tmp_path, capsys, one_core):
    """One line, which is not that a preparation starts; nothing stays behind."""
    with pytest.raises(UserError, match=message):
        warm_start(task, levels, config, tmp_path, budget=FEW)
    assert capsys.readouterr() == ("", "")
    assert not any(entry.is_dir() for entry in tmp_path.iterdir())


UNDER_TORCHRUN = """
import contextlib, functools, importlib, os, sys, time
from pathlib import Path
from rlhf import tiny_lm
from tests.test_tiny_lm import FEW, SMALL
name, folder = sys.argv[1], Path(sys.argv[2])
script = importlib.import_module(f"algos.{name}")
tiny_lm.idle_cores = contextlib.nullcontext
options = dict(cache_dir=folder / "cache", quiet=True)
def late(make, *arguments, **more):
    time.sleep(3 * (os.environ["RANK"] == "0"))
    return make(*arguments, **more, **options)
settings = dict(total_episodes=8, batch_size=8, eval_prompts=4, run_dir=folder / "run")
if name == "grpo_fsdp":
    options["budget"] = FEW
    script.warm_start = functools.partial(late, script.warm_start)
    settings |= dict(task="chain_sum", levels=(0, 0), group_size=4, eval_samples=2)
else:
    options["budget"] = SMALL
    script.prepare = functools.partial(late, script.prepare)
script.main(script.Args(**settings))
"""


@pytest.mark.parametrize("script", ["grpo_fsdp", "ppo_rlhf_fsdp"])
def test_scripts_prepare_under_torchrun(script, tmp_path):
    """The first run on a machine, by two processes, of which that of rank 1 gets the lock.

    PITFALL: in a process group a training that shares its batches waits for the others for ever, as
    they wait for the lock; and save_pretrained writes a model on rank 0 only.
    """
    (tmp_path / "two.py").write_text(UNDER_TORCHRUN)
    command = ["timeout", "90", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(tmp_path / "two.py"), script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    folder = folder / "policy" if script == "ppo_rlhf_fsdp" else folder
    AutoModelForCausalLM.from_pretrained(folder)
    assert (tmp_path / "run" / "policy").is_dir()


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
