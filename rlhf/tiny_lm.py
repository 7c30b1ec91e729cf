"""The built-in model: a small Llama that writes stories, and a reward model for them.

Prepared once, in a minute or two on a laptop, so that a language-model script shows a rising reward
without a download. Two ordinary Hugging Face folders in $FOLIO_CACHE (or ~/.cache/folio):

  policy         the SFT model: first on stories without slips, which teach it to carry a hero, a
                 place and a thing over many tokens, then on those of a careless writer
  reward_model   the same trunk with a scalar head, trained on pairs of the SFT model's samples,
                 labelled by Bradley-Terry from the gold reward (papers/ppo_rlhf.md section 7)

The reward model never sees the gold reward itself, so it can be over-optimised, and the gold reward
shows it.

For the verifiable tasks of GRPO there is a third kind: a character-level Llama after SFT on noisy
demonstrations (WarmStart).

    python -m rlhf.tiny_lm                          prepares the two and prints their folders
    python -m rlhf.tiny_lm --task number_sorting    prepares the model of that task
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import string
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from rlhf import UserError
from rlhf.reward_model import (
    load_reward_model,
    normalize,
    pair_accuracy,
    sample_rows,
    train_reward_model,
)
from rlhf.sft import train_sft
from rlhf.tasks import (
    GRAMMAR_VERSION,
    check_story_length,
    completion_ids,
    label_pairs,
    preference_probability,
    prompt_ids,
    story_gold,
    story_prompts,
    story_vocabulary,
    write_stories,
)
from rlhf.verifiable import demonstrations, settings, verifiable_task

RECIPE_VERSION = 1  # raise it when the code below changes what is prepared
# Adam remembers 20 steps of squared gradients instead of 1,000: a run has a few hundred in all.
TRAINING = dict(schedule="linear", warmup=0.05, betas=(0.9, 0.95))


@dataclass(frozen=True)
class TinyLM:
    """Folders of the prepared models; both load with the Auto classes of transformers."""

    policy: Path
    reward_model: Path


@dataclass(frozen=True)
class Budget:
    """How much work a preparation does; part of the folder's name."""

    careful_stories: int = 5_000
    """stories without slips, from which copying is learned"""
    stories: int = 5_000
    """stories of the careless writer"""
    pairs: int = 7_000
    """labelled pairs for the reward model"""
    test_pairs: int = 500
    """held-out pairs for the accuracy report"""
    seed: int = 1
    """of weights, stories, samples and labels"""


def fast_tokenizer(words: Sequence[str], pre_tokenizer, decoder=None):
    """One token a word of this list; PAD, EOS and BOS are three more. Texts start by BOS."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_tokenizer():
    """One token a word of the stories. Decoded text encodes to the same ids."""
    from tokenizers import pre_tokenizers

    return fast_tokenizer(story_vocabulary(), pre_tokenizers.WhitespaceSplit())


def build_model(tokenizer, seed: int = 1, max_positions: int = 256):
    """A Llama of 1.1 million parameters: 4 layers, width 128, tied embeddings.

    The weights start with std 0.08, near 1 / sqrt(width): with transformers' 0.02 attention starts
    flat, and learning what refers to what takes longer. Loss on held-out careful stories after
    5,000 of them (one seed): 1.18 with 0.02, 1.09 with 0.08. Tied, because stories repeat names.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# === PREPARE =====================================================================================


def prepare(
    cache_dir: str | Path | None = None,
    response_tokens: int = 24,
    quiet: bool = False,
    budget: Budget = Budget(),
) -> TinyLM:
    """SFT model and reward model for stories of `response_tokens` tokens, made once, then reused.

    Safe when several processes call it at once, see `prepared`.
    """
    check_story_length(response_tokens)
    name = f"tiny_lm-{response_tokens}-{recipe_hash(response_tokens, budget)}"
    folder = prepared(name, lambda new: _make(new, response_tokens, budget, quiet), cache_dir)
    return TinyLM(folder / "policy", folder / "reward_model")


def prepared(name: str, make: Callable[[Path], None], cache_dir: str | Path | None = None) -> Path:
    """The folder `name` of the cache; where it is missing, `make` fills a new one.

    Safe when several processes call it at once, as the ranks of torchrun do: one works, with all
    idle cores, and the others wait for it, for other folders too.
    PITFALL: call it before the process group exists. In a group SFT shares its work with processes
    that wait here, and save_pretrained writes nothing but on rank 0.
    """
    from filelock import FileLock

    root = Path(cache_dir or os.environ.get("FOLIO_CACHE") or "~/.cache/folio").expanduser()
    folder = root / name
    if folder.is_dir():  # a folder gets this name when it is complete
        return folder
    try:
        if dist.is_initialized():
            raise RuntimeError("prepare the built-in model before init_process_group")
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".prepare.lock")
        with lock:
            if not folder.is_dir():
                for left_over in root.glob(f".{name}.*.tmp"):
                    shutil.rmtree(left_over)  # of a process that was killed: we hold the lock
                temporary = root / f".{name}.{os.getpid()}.tmp"
                try:
                    with idle_cores():
                        make(temporary)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the built-in model to {root} ({error}): set FOLIO_CACHE elsewhere"
        ) from error
    return folder


def recipe_hash(response_tokens: int, budget: Budget) -> str:
    """Eight digits that change with whatever decides what is prepared."""
    recipe = [GRAMMAR_VERSION, RECIPE_VERSION, response_tokens, dataclasses.asdict(budget)]
    recipe += [story_vocabulary()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


@contextlib.contextmanager
def idle_cores():
    """Use the cores that nobody else works on; torchrun sets OMP_NUM_THREADS=1.

    Threads that wait for each other on a busy machine make small matrices twenty times slower.
    """
    before = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    torch.set_num_threads(max(1, min(round((usable or 1) - busy), 8)))  # more slow these matrices
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make(folder: Path, response_tokens: int, budget: Budget, quiet: bool) -> None:
    """Train both models, save them in `folder`, print one line."""
    started = time.monotonic()
    if not quiet:
        print(f"preparing the built-in model ({response_tokens} tokens a story), once", flush=True)
    tokenizer = build_tokenizer()
    prompts, _ = story_prompts()
    seed = budget.seed

    # 1. supervised fine-tuning
    policy = build_model(tokenizer, seed, max_positions=max(256, 2 * response_tokens))
    for count, slips, learning_rate in (
        (budget.careful_stories, 0.0, 3e-3),
        (budget.stories, 1.0, 1.5e-3),
    ):
        seed += 1
        chosen = [prompts[i % len(prompts)] for i in range(count)]
        stories = write_stories(chosen, response_tokens, seed, slips)
        sft_loss = train_sft(
            policy,
            encode(tokenizer, chosen, stories),
            learning_rate=learning_rate,
            all_tokens=True,
            batch_size=16,
            **TRAINING,
            progress=not quiet,
        )

    # 2. two samples of the SFT model for each prompt, judged by Bradley-Terry from the gold reward
    number = budget.pairs + budget.test_pairs
    asked = [prompts[-1 - i % len(prompts)] for i in range(number)]
    texts, rows = sample_rows(
        policy, tokenizer, asked * 2, response_tokens, seed=seed, batch_size=512
    )
    gold = story_gold(asked * 2, texts)
    a_wins = label_pairs(gold[:number], gold[number:], seed)
    pairs = [
        (a, b) if wins else (b, a)
        for a, b, wins in zip(rows[:number], rows[number:], a_wins, strict=True)
    ]
    train_pairs, test_pairs = pairs[: budget.pairs], pairs[budget.pairs :]

    # 3. the reward model starts from the SFT trunk
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model, _ = load_reward_model(folder / "policy", new_head=True, seed=seed)
    train_reward_model(
        reward_model,
        train_pairs,
        learning_rate=1e-3,
        epochs=1.5,
        batch_size=16,
        **TRAINING,
        progress=not quiet,
    )
    normalize(reward_model, rows[:1024], batch_size=256)
    reward_model.model.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")

    # The best that any judge can reach against noisy labels: always name the likelier one.
    ceiling = statistics.mean(
        max(p, 1 - p)
        for p in map(
            preference_probability, gold[budget.pairs : number], gold[number + budget.pairs :]
        )
    )
    report = {
        "sft_loss": sft_loss,
        "accuracy": pair_accuracy(reward_model, test_pairs, batch_size=256),
        "accuracy_ceiling": ceiling,
        "gold_mean": statistics.mean(gold),
        "gold_std": statistics.pstdev(gold),
        "seconds": time.monotonic() - started,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if not quiet:
        print(
            "SFT loss {sft_loss:.3f}; reward model agrees with {accuracy:.1%} of held-out labels "
            "(at most {accuracy_ceiling:.1%} possible); gold of SFT samples {gold_mean:.2f} +- "
            "{gold_std:.2f}; {seconds:.0f} s".format(**report)
        )


# === WARM START ==================================================================================


@dataclass(frozen=True)
class WarmStart:
    """How a model learns a verifiable task before RL; part of the folder's name.

    More than half of the demonstrations are wrong, so that a model that imitates them knows more
    than it shows: its likeliest answer is right far more often than its samples.
    """

    demonstrations: int = 16_000
    """of different problems; where the task has fewer, with several errors each"""
    epochs: float = 2.0
    """passes over them"""
    slips: float = 0.65
    """share of wrong demonstrations"""
    seed: int = 1
    """of weights, problems and errors"""


def character_tokenizer():
    """One token a printable ASCII character."""
    from tokenizers import Regex, decoders, pre_tokenizers

    letters = [c for c in string.printable if c.isprintable()]
    return fast_tokenizer(letters, pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse())


def warm_start(
    task: str,
    levels: tuple[int, int],
    config: str = "{}",
    cache_dir: str | Path | None = None,
    quiet: bool = False,
    budget: WarmStart = WarmStart(),
) -> Path:
    """Folder of a character-level Llama after SFT on noisy demonstrations of a verifiable task.

    task, levels: as in rlhf.verifiable.verifiable_task; config: its config, as JSON.
    """
    options = settings(config)
    recipe = [RECIPE_VERSION, task, levels, options, dataclasses.asdict(budget)]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]

    def make(folder):
        started = time.monotonic()
        size = budget.demonstrations
        problems = verifiable_task(task, levels=levels, config=options, train_size=size)
        if not quiet:
            print(f"preparing the built-in model for {task}, once", file=sys.stderr, flush=True)
        records = (problems.train * (size // len(problems.train) + 1))[:size]
        texts = demonstrations(problems, records, budget.seed, budget.slips)
        tokenizer = character_tokenizer()
        model = build_model(tokenizer, budget.seed)
        loss = train_sft(
            model,
            encode(tokenizer, [record["prompt"] for record in records], texts),
            epochs=budget.epochs,
            learning_rate=1.5e-3,
            batch_size=64,
            **TRAINING,
            seed=budget.seed,
            progress=not quiet,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if not quiet:
            seconds = time.monotonic() - started
            print(
                f"SFT on {size} demonstrations: loss {loss:.3f}; {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    return prepared(f"warm_start-{task}-{digest}", make, cache_dir)


def encode(tokenizer, prompts: Sequence[str], completions: Sequence[str]):
    """Token ids of prompts and completions, as train_sft takes them."""
    return [
        (prompt_ids(tokenizer, p), completion_ids(tokenizer, c))
        for p, c in zip(prompts, completions, strict=True)
    ]


@dataclass
class Args:
    cache_dir: Path | None = None
    """where to put the models; by default $FOLIO_CACHE or ~/.cache/folio"""
    response_tokens: int = 24
    """longest completion; 64 to 96 for scripts that need long ones"""
    quiet: bool = False
    """print nothing but the folders"""
    task: str | None = None
    """a verifiable task: prepares its warm-started model instead, and nothing for stories"""
    levels: tuple[int, int] = (2, 3)
    """lowest and highest level of the task"""
    task_config: str = "{}"
    """JSON object of settings of reasoning-gym that replace those of the levels"""


def main(args: Args) -> None:
    if args.task is not None:
        print(warm_start(args.task, args.levels, args.task_config, args.cache_dir, args.quiet))
        return
    folders = prepare(args.cache_dir, args.response_tokens, args.quiet)
    print(folders.policy)
    print(folders.reward_model)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
