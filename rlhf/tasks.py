"""Tasks: prompts and a reward.

A task is a list of records and a reward function. A record is a dict with a "prompt" (a string, or
a list of chat messages) and any other columns; a reward function has TRL's calling convention
`reward(prompts, completions, **columns) -> one number per completion`. This file holds

  - the built-in task `stories`, a synthetic-preference world with a known gold reward,
  - loading of records from .jsonl files, folders and Hugging Face data sets,
  - loading and guarded calling of the user's reward function,
  - the step from text to token ids (beginning, end and padding tokens).

Sources: papers/ppo_rlhf.md section 7 (small worlds with a hand-written gold reward), and 3.3
(PAD is never EOS: "N+ implementation details", arXiv 2403.17031).
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import math
import random
import re
import signal
import string
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch.distributed as dist

from rlhf import RewardError, UserError
from rlhf.processes import gather_lists

RewardFunction = Callable[..., Sequence[float]]
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Task:
    """Prompts and how their completions are judged.

    `reward` is what training sees; None means that scores come from a reward model. `gold` is the
    truth behind the reward where it is known; nothing may train on it, evaluation reports it.
    `lenient` is a laxer judge than `reward`, for reports: learning the form of an answer looks like
    learning to reason, unless somebody counts the right answers in the wrong form too.
    """

    name: str
    train: list[dict]
    test: list[dict]
    reward: RewardFunction | None
    gold: RewardFunction | None
    lenient: RewardFunction | None = None


# === STORIES: GRAMMAR ============================================================================
# Word classes in capitals; every other word of a pattern stands for itself. A word belongs to one
# class, so a sentence is well-formed exactly if its row of classes is one of the patterns.

SHE = "mira anna lena zoe ruth".split()
HE = "omar ben karl felix hugo".split()
GOOD_ADJECTIVES = (
    "calm bright warm gentle kind sweet clear merry soft peaceful cheerful lovely".split()
)
BAD_ADJECTIVES = "cold dark cruel grim bitter harsh gloomy rough sad bleak lonely dreadful".split()
GOOD_DEEDS = "helps thanks greets hugs guides".split()
BAD_DEEDS = "robs mocks tricks scares blames".split()
# Verbs that open a quest or do not, and verbs that fulfil it or do not.
OPENS, IDLES = "seeks wants needs misses".split(), "sees passes counts carries".split()
FULFILS, FAILS = "finds keeps wins saves".split(), "loses drops breaks forgets".split()
# A place has luggage and scenery that belong to it.
PLACES = {
    "water": "harbour river lake beach island bay pond".split(),
    "town": "market castle library school village bakery square".split(),
}
LUGGAGE = {
    "water": "raft net oar".split(),
    "town": "cart purse bag".split(),
}
SCENERY = {
    "water": "sea tide wave shore foam reef".split(),
    "town": "street house crowd wall bell gate".split(),
    "any": "wind sky rain sun moon air music day".split(),
}


def words_of(kinds: dict[str, list[str]]) -> list[str]:
    """All words of all kinds."""
    return [word for words in kinds.values() for word in words]


CLASSES = {
    "HERO": SHE + HE,
    "PRON": ["she", "he"],
    "THEIR": ["her", "his"],
    "JOB": "baker sailor doctor painter farmer teacher miller gardener".split(),
    "GOES": "walks runs returns travels hurries".split(),
    "LUGGAGE": words_of(LUGGAGE),
    "PLACE": words_of(PLACES),
    "TIME": "dawn noon dusk night sunrise sunset midnight".split(),
    "OPENS": OPENS + IDLES,
    "LOOK": "young brown wild small red blue wooden heavy long round secret golden".split(),
    "THING": (
        "horse cat dog bird key map ring letter lamp coin book crown basket mirror clock sword"
    ).split(),
    "SCENE": words_of(SCENERY),
    "PERSON": "friend stranger neighbour thief king queen child witch".split(),
    "MOOD": GOOD_ADJECTIVES + BAD_ADJECTIVES,
    "DEED": GOOD_DEEDS + BAD_DEEDS,
    "ENDS": FULFILS + FAILS,
}
PATTERNS = {
    "prompt": ["HERO the JOB takes THEIR LUGGAGE to the PLACE at TIME ."],
    "opening": [
        "HERO OPENS a LOOK THING .",
        "HERO OPENS the LOOK THING .",
        "PRON OPENS a LOOK THING .",
        "PRON OPENS the LOOK THING .",
        "PRON OPENS a LOOK THING near the PLACE .",
    ],
    "middle": [
        "the SCENE is MOOD .",
        "the SCENE is MOOD and MOOD .",
        "the MOOD SCENE is MOOD .",
        "the PLACE is MOOD .",
        "the PLACE is MOOD and MOOD .",
        "a MOOD PERSON DEED HERO .",
        "but the SCENE is MOOD .",
        "PRON GOES to the PLACE .",
    ],
    "closing": [
        "at last HERO ENDS it .",
        "at last PRON ENDS it .",
        "in the end PRON ENDS it .",
        "finally HERO ENDS it .",
        "finally PRON ENDS it .",
    ],
}
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}
ROLE_OF = {tuple(p.split()): role for role, patterns in PATTERNS.items() for p in patterns}
PLACE_OF = {word: kind for table in (PLACES, SCENERY) for kind in table for word in table[kind]}
SENTIMENT = dict.fromkeys(GOOD_ADJECTIVES + GOOD_DEEDS, 1) | dict.fromkeys(
    BAD_ADJECTIVES + BAD_DEEDS, -1
)

# Part of the name of the prepared models' folder: raise it when stories, prompts or gold change.
GRAMMAR_VERSION = 2
# Mean and std of the unscaled gold reward over samples of the SFT model (24 tokens, temperature 1).
GOLD_MEAN, GOLD_STD = -0.36, 1.73
# Bradley-Terry labels: a is preferred to b with probability sigmoid(sharpness * (gold_a - gold_b)).
# At 2 the likelier of two SFT samples wins four times in five.
PREFERENCE_SHARPNESS = 2.0
NUM_TRAIN_PROMPTS, NUM_TEST_PROMPTS = 20_000, 1_000


def story_vocabulary() -> list[str]:
    """All words of the grammar, in a fixed order."""
    fixed = [
        w for patterns in PATTERNS.values() for p in patterns for w in p.split() if w not in CLASSES
    ]
    return list(dict.fromkeys(fixed + list(CLASS_OF)))


@functools.lru_cache(maxsize=1)
def story_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Train and test prompts: disjoint draws without replacement from all that the grammar has."""
    parts = [CLASSES[name] for name in ("HERO", "JOB", "PLACE", "TIME")] + [range(3)]
    drawn = []
    for index in random.Random(0).sample(
        range(math.prod(map(len, parts))), NUM_TRAIN_PROMPTS + NUM_TEST_PROMPTS
    ):
        words = []
        for part in parts:
            index, at = divmod(index, len(part))
            words.append(part[at])
        hero, job, place, time, at = words
        luggage = LUGGAGE[PLACE_OF[place]][at]
        their = "her" if hero in SHE else "his"
        drawn.append(f"{hero} the {job} takes {their} {luggage} to the {place} at {time} .")
    return tuple(drawn[:NUM_TRAIN_PROMPTS]), tuple(drawn[NUM_TRAIN_PROMPTS:])


def write_story(prompt: str, response_tokens: int, rng: random.Random, slips: float = 1.0) -> str:
    """A demonstration of at most `response_tokens - 1` words (the last token is the end of text).

    The writer is grammatical but careless: often about the wrong hero or place, without a quest or
    with one that fails, and with no taste in moods. That leaves room above the models that imitate
    it. `slips` scales how often it happens; at 0 only the moods are left to chance.
    """
    hero, place = prompt.split()[0], prompt.split()[8]
    told = hero if rng.random() > 0.5 * slips else rng.choice(CLASSES["HERO"])
    where = PLACE_OF[place] if rng.random() > 0.8 * slips else rng.choice(list(PLACES))
    tone = rng.choice((0.2, 0.5, 0.8))  # how friendly this story is

    def fill(pattern: str) -> list[str]:
        choices = CLASSES | {
            "HERO": [told],
            "PRON": ["she" if told in SHE else "he"],
            "PLACE": [place] if where == PLACE_OF[place] else PLACES[where],
            "SCENE": SCENERY[where if rng.random() < 0.6 else "any"],
            "OPENS": OPENS if rng.random() > 0.5 * slips else IDLES,
            "ENDS": FULFILS if rng.random() > 0.5 * slips else FAILS,
        }
        sentence = []
        for word in pattern.split():
            if word in ("MOOD", "DEED"):
                tones = {"MOOD": (GOOD_ADJECTIVES, BAD_ADJECTIVES), "DEED": (GOOD_DEEDS, BAD_DEEDS)}
                choices[word] = tones[word][rng.random() > tone]
            allowed = [w for w in choices.get(word, [word]) if w not in sentence]
            sentence.append(rng.choice(allowed or [word]))
        return sentence

    opening, closing = (fill(rng.choice(PATTERNS[role])) for role in ("opening", "closing"))
    # Shorter stories at random, so that the end does not always fall on the last token.
    budget = rng.randint(int(0.75 * response_tokens), response_tokens - 1) - len(opening + closing)
    middle, seen = [], set()
    while fitting := [p for p in PATTERNS["middle"] if len(p.split()) <= budget - len(middle)]:
        sentence = fill(rng.choice(fitting))
        if tuple(sentence) not in seen:
            seen.add(tuple(sentence))
            middle += sentence
    return " ".join(opening + middle + closing)


def check_story_length(response_tokens: int) -> None:
    """Opening, one middle and closing need up to 20 tokens."""
    if response_tokens < 20:
        raise UserError(f"stories need a response of >= 20 tokens, not {response_tokens}")


def write_stories(
    prompts: Sequence[str], response_tokens: int, seed: int, slips: float = 1.0
) -> list[str]:
    """One demonstration a prompt; the same seed writes the same stories."""
    check_story_length(response_tokens)
    rng = random.Random(seed)
    return [write_story(prompt, response_tokens, rng, slips) for prompt in prompts]


# === STORIES: GOLD REWARD ========================================================================


def story_terms(prompt: str, completion: str) -> dict[str, float]:
    """The five terms of the gold reward of one story, each bounded.

    hero     the first sentence is about the prompt's hero, by name or by the right pronoun: +1;
             about another: -1
    place    the first place or scenery of the story belongs to the prompt's kind of place: +1,
             to another kind: -1; there is none: 0
    mood     friendly minus unfriendly words (each counted once), per middle sentence, clipped to
             [-1, 1]: a second friendly word in a sentence earns nothing
    closing  the first sentence opens a quest (she seeks, wants ...), and the last one fulfils it
             (she finds, keeps ... it): +1; nothing was opened, or not fulfilled: -1
    grammar  0 if all sentences are well-formed, in order and new, down to -1 if none is
    """
    hero, place = prompt.split()[0], prompt.split()[8]
    sentences, words = [], []
    for word in completion.split():
        words.append(word)
        if word == ".":
            sentences.append(tuple(words))
            words = []
    if words or not sentences:
        sentences.append(tuple(words))  # cut off: it matches no pattern
    roles = [ROLE_OF.get(tuple(CLASS_OF.get(w, w) for w in s)) for s in sentences]

    # Well-formed: an opening first, a closing last, middles between, nothing said twice.
    wanted = ["opening"] + ["middle"] * (len(roles) - 2) + ["closing"] * (len(roles) > 1)
    good = [
        role == want and sentence not in sentences[:i]
        for i, (role, want, sentence) in enumerate(zip(roles, wanted, sentences, strict=True))
    ]
    sound = [sentence for sentence, ok in zip(sentences, good, strict=True) if ok]
    first = sentences[0] if good[0] else ()
    last = sentences[-1] if good[-1] and len(good) > 1 else ()
    middles = sound[bool(first) : len(sound) - bool(last)]

    about_hero = first[:1] in ((hero,), ("she" if hero in SHE else "he",))
    places = [PLACE_OF[w] for s in sound for w in s if PLACE_OF.get(w, "any") != "any"]
    moods = {w for s in middles for w in s if w in SENTIMENT}
    balance = sum(SENTIMENT[w] for w in moods) / max(1, len(middles))
    return {
        "hero": 1.0 if about_hero else -1.0,
        "place": 0.0 if not places else (1.0 if places[0] == PLACE_OF[place] else -1.0),
        "mood": max(-1.0, min(1.0, balance)),
        "closing": 1.0 if set(OPENS) & set(first) and set(FULFILS) & set(last) else -1.0,
        "grammar": sum(good) / len(good) - 1.0,
    }


TERM_WEIGHTS = {"hero": 1.0, "place": 0.5, "mood": 1.0, "closing": 1.0, "grammar": 3.0}


def story_gold(prompts: Sequence[str], completions: Sequence[str], **_) -> list[float]:
    """Gold reward: weighted sum of the terms, scaled so that SFT samples have mean 0 and std 1."""
    return [
        (sum(TERM_WEIGHTS[k] * v for k, v in story_terms(p, c).items()) - GOLD_MEAN) / GOLD_STD
        for p, c in zip(prompts, completions, strict=True)
    ]


def preference_probability(gold_a: float, gold_b: float) -> float:
    """Bradley-Terry: the probability that a is preferred to b."""
    return 1 / (1 + math.exp(PREFERENCE_SHARPNESS * (gold_b - gold_a)))


def label_pairs(gold_a: Sequence[float], gold_b: Sequence[float], seed: int) -> list[bool]:
    """Noisy labels of pairs: True where a is preferred."""
    rng = random.Random(seed)
    return [
        rng.random() < preference_probability(a, b) for a, b in zip(gold_a, gold_b, strict=True)
    ]


def load_task(name: str, response_tokens: int = 24) -> Task:
    """A built-in task: `stories` (score it with a reward model) or `stories-gold` (gold is paid).

    `response_tokens` is checked here and decides the length of the demonstrations that the tiny
    model imitates (rlhf/tiny_lm.py); prompts and gold reward are the same for every length.
    """
    if name not in ("stories", "stories-gold"):
        raise UserError(f"unknown task '{name}': the built-in tasks are stories and stories-gold")
    check_story_length(response_tokens)
    train, test = ([{"prompt": prompt} for prompt in prompts] for prompts in story_prompts())
    return Task(name, train, test, story_gold if name == "stories-gold" else None, story_gold)


# === RECORDS =====================================================================================


def load_records(
    source: str | Path,
    split: str = "train",
    *,
    prompt_field: str = "prompt",
    prompt_template: str | None = None,
    required: Sequence[str] = ("prompt",),
    limit: int | None = None,
) -> list[dict]:
    """Records from a .jsonl file, a folder with {split}.jsonl, or a Hugging Face data set.

    A Hugging Face data set is named as on the hub, with its configuration behind a colon where it
    has several ("openai/gsm8k:main"). Every record gets a "prompt": the column `prompt_field`, or
    `prompt_template` with its {column} placeholders filled. `required` lists the columns that must
    be there afterwards (PREFERENCE_FIELDS for pairs).
    """
    path = Path(source).expanduser()
    if path.is_dir() and (path / f"{split}.jsonl").is_file():
        path = path / f"{split}.jsonl"
    if path.is_file():
        rows = _read_jsonl(path, limit)
    elif path.suffix in (".jsonl", ".json"):
        raise UserError(f"no such file: {source}")
    elif path.is_dir() and not any(path.glob("*.parquet")) and not any(path.glob("*/*.parquet")):
        found = ", ".join(sorted(p.name for p in path.glob("*.jsonl"))) or "no .jsonl file"
        raise UserError(f"folder {source} has no {split}.jsonl (it has {found})")
    else:
        rows = _read_hub(str(source), split, limit)
    if not rows:
        raise UserError(f"{source} holds no records")

    records = []
    for where, row in rows:
        record = dict(row)
        if prompt_template is not None:
            record["prompt"] = _fill_template(prompt_template, row, where)
        elif prompt_field != "prompt" and prompt_field in row:
            record["prompt"] = record.pop(prompt_field)
        missing = [f for f in required if record.get(f) is None]
        if missing:
            name = prompt_field if missing[0] == "prompt" else missing[0]
            raise UserError(f"{where}: no field '{name}' (it has: {', '.join(row) or 'none'})")
        if not is_prompt(record.get("prompt")):
            raise UserError(
                f"{where}: the prompt must be a non-empty string or a list of chat messages"
            )
        records.append(record)
    return records


def _read_jsonl(path: Path, limit: int | None) -> list[tuple[str, dict]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(rows) >= limit:
                    break
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: each line must be a JSON object with named fields"
                    )
                rows.append((f"{path}:{number}", row))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return rows


def _read_hub(source: str, split: str, limit: int | None) -> list[tuple[str, dict]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"'{source}' is neither a .jsonl file nor a folder with {split}.jsonl; "
            "to load it as a Hugging Face data set: pip install datasets"
        ) from error
    name, _, config = (source, "", "") if Path(source).exists() else source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises many kinds: offline, no such name, no such split
        raise UserError(
            f"cannot load '{source}' (split '{split}') as a file, folder or Hugging Face data set: "
            f"{one_line(error)}"
        ) from error
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    return [(f"{source}[{split}] row {i}", row) for i, row in enumerate(data)]


def _fill_template(template: str, row: dict, where: str) -> str:
    try:
        columns = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"prompt template '{shorten(template)}' is malformed: {error}") from error
    unknown = sorted(columns - row.keys())
    if unknown:
        raise UserError(
            f"{where}: the prompt template asks for '{unknown[0]}' (columns: {', '.join(row)})"
        )
    return template.format_map(row)


def is_prompt(value) -> bool:
    """A non-empty string, or a non-empty list of chat messages."""
    if isinstance(value, str):
        return bool(value)
    messages = isinstance(value, list) and value
    return bool(messages) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    )


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as reward functions and tables see it: chat turns joined by blank lines."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(m["content"]) for m in prompt)


def completion_text(value: str | list[dict]) -> str:
    """A chosen or rejected answer as text; of a chat, the last message."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def load_prompts(tokenizer, args, config, task: Task | None = None) -> Task:
    """The task that a training script's flags describe; each record also has its token "ids".

    A given `task` takes the place of what --data names; --reward replaces its judges too.

    args has the fields data (see `load_records`; None: the built-in stories), data_split,
    eval_split, eval_prompts, prompt_field, prompt_template, reward (see `load_reward`),
    max_prompt_tokens and response_length. Of a single file the last records are held out. Prompts
    that are too long, also for the positions that the model's config gives, are left out, with a
    line that counts them.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = min(args.max_prompt_tokens, positions - args.response_length)
    if task is None and args.data is None:
        task = load_task("stories", args.response_length)
    if task is not None:
        train, test = task.train, task.test
    else:
        options = {"prompt_field": args.prompt_field, "prompt_template": args.prompt_template}
        train = load_records(args.data, args.data_split, **options)
        if Path(args.data).is_file():
            if len(train) < 2:
                raise UserError(f"{args.data}: one record is too few, as some are held out")
            held_out = min(args.eval_prompts, len(train) // 2)
            train, test = train[:-held_out], train[-held_out:]
        else:
            test = load_records(args.data, args.eval_split, limit=args.eval_prompts, **options)
        task = Task(args.data, train, test, reward=None, gold=None)
    kept = []
    for records in (train, test[: args.eval_prompts]):
        records = [record | {"ids": prompt_ids(tokenizer, record["prompt"])} for record in records]
        short = [record for record in records if len(record["ids"]) <= longest]
        if not short:
            raise UserError(f"every prompt has over {longest} tokens: see --max-prompt-tokens")
        if len(short) < len(records):
            left_out = len(records) - len(short)
            print(f"{left_out} of {len(records)} prompts left out, too long", file=sys.stderr)
        kept.append(short)
    if args.reward:
        task = dataclasses.replace(task, reward=load_reward(args.reward), lenient=None)
    return dataclasses.replace(task, train=kept[0], test=kept[1])


def default_run_dir(args, script: str) -> Path:
    """runs/TASK__SCRIPT__SEED; the task is --task, the name of --data, or the built-in stories."""
    task = Path(args.data).stem.replace(":", "-") if args.data else getattr(args, "task", "stories")
    return Path("runs") / f"{task}__{Path(script).stem}__{args.seed}"


# === REWARDS =====================================================================================


def load_reward(spec: str) -> RewardFunction:
    """The function behind "module:function" or "path/to/file.py:function".

    Modules are searched in the current directory first, then where Python finds packages.
    """
    module_name, colon, function_name = spec.rpartition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"reward '{spec}': write module:function or path/to/file.py:function")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name).expanduser()
            if not path.is_file():
                raise UserError(f"reward '{spec}': no such file {module_name}")
            module_spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.remove(str(Path.cwd()))
    except UserError:
        raise
    except Exception as error:  # the user's module may fail in any way
        raise UserError(
            f"reward '{spec}': importing {module_name} failed: {one_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise UserError(
            f"reward '{spec}': {module_name} has no function '{function_name}' "
            f"(it has: {', '.join(known) or 'none'})"
        )
    return function


class OutOfTime(BaseException):
    """A time limit has passed.

    PITFALL: no Exception, as a reward that catches all of those around its parser, to give 0 for
    what does not parse, would catch this one too, and take the next completion.
    """


@contextlib.contextmanager
def time_limit(seconds: float | None):
    """Raise OutOfTime in the block after so many seconds; None: never.

    By SIGALRM, so without effect outside the main thread and on Windows; and Python handles
    signals between its own steps, so a call that never leaves C code is not ended either.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "SIGALRM"):
        yield
        return
    late = False

    def ring(signum, frame):
        nonlocal late
        late = True
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    # It rings again every second: a bare `except:` may have swallowed the first one.
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # should it ring in this very moment
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
            if outer_delay:  # somebody else's alarm, which waited meanwhile
                left = max(1e-3, outer_delay - (time.monotonic() - started))
                signal.setitimer(signal.ITIMER_REAL, left, outer_interval)
    if late:  # swallowed, and the block ended all the same
        raise OutOfTime


def score(
    reward: RewardFunction,
    records: Sequence[dict],
    completions: Sequence[str],
    timeout: float | None = None,
) -> list[float]:
    """Call a reward function on completions of records and check what comes back: (N,) floats.

    Columns that the function does not name are passed only if it takes **kwargs. `timeout` is in
    seconds, for the whole call (see `time_limit`).
    """
    collective = getattr(reward, "collective", False)  # a reward model: all processes call it
    timeout = None if collective else timeout
    if timeout is not None and not 0 < timeout < math.inf:
        raise UserError(f"a reward cannot have {timeout} seconds (--reward-timeout)")
    prompts = [record["prompt"] for record in records]
    if not collective:  # a reward model reads chats by its own template
        prompts = [prompt_text(prompt) for prompt in prompts]
    reserved = {"prompt", "prompts", "completion", "completions", "ids"}
    names = dict.fromkeys(name for record in records for name in record if name not in reserved)
    parameters = inspect.signature(reward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = [name for name in names if name in parameters]
    columns = {name: [record.get(name) for record in records] for name in names}
    called = getattr(reward, "__name__", repr(reward))
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in (1, 3)]
    lacking = [n for n in needed if n not in columns and n not in ("prompts", "completions")]
    if lacking:
        raise UserError(
            f"reward {called} asks for column '{lacking[0]}', which the records do not have"
        )
    try:
        with time_limit(timeout):
            values = reward(prompts=prompts, completions=list(completions), **columns)
    except OutOfTime as error:
        raise UserError(
            f"reward {called} took longer than {timeout:g} seconds for {len(completions)} "
            "completions (--reward-timeout)"
        ) from error
    except Exception as error:
        if collective:  # the others are still inside: to wait for them would be for ever
            raise RuntimeError(f"the reward model failed: {one_line(error)}") from error
        # The user's own line, even if it failed inside a library that it calls.
        frames = traceback.extract_tb(error.__traceback__)[1:] or traceback.extract_tb(
            error.__traceback__
        )
        own = inspect.getsourcefile(inspect.unwrap(reward)) if inspect.isroutine(reward) else None
        frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
        raise UserError(
            f"reward {called} raised {one_line(error)} at {frame.filename}:{frame.lineno}"
        ) from error

    if hasattr(values, "tolist"):
        values = values.tolist()  # a tensor or an array
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(
            f"reward {called} must return a list of numbers, not {type(values).__name__}"
        )
    if len(values) != len(completions):
        raise UserError(
            f"reward {called} returned {len(values)} numbers for {len(completions)} completions"
        )
    scores = []
    for value, prompt in zip(values, prompts, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward {called} returned {shorten(repr(value))} instead of a number "
                f"for the prompt '{shorten(prompt)}'"
            ) from error
        if not math.isfinite(number):
            raise UserError(f"reward {called} returned {number} for the prompt '{shorten(prompt)}'")
        scores.append(number)
    return scores


def score_together(
    reward: RewardFunction,
    records: Sequence[dict],
    completions: Sequence[str],
    timeout: float | None = None,
) -> list[float]:
    """`score` on every process for its own part; if it fails on one, all raise its RewardError.

    Otherwise one process would end with a clear line, and the others with a lost connection.
    """
    try:
        scores, error = score(reward, records, completions, timeout), None
    except UserError as caught:
        scores, error = [], str(caught)
    if dist.is_initialized():
        error = next((text for text in gather_lists([error]) if text is not None), None)
    if error is not None:
        raise RewardError(error)
    return scores


def answer_after_hashes(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the number after #### in the completion is that of the record's answer, else 0.0.

    GSM8K's convention. The answer column holds "... #### 18" or the bare number.
    """
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        wanted = number_after_hashes(str(truth))
        if wanted is None:
            wanted = number_after_hashes(f"#### {truth}")
        if wanted is None:
            raise ValueError(f"the answer column holds no number: {shorten(str(truth))}")
        scores.append(float(number_after_hashes(completion) == wanted))
    return scores


def number_after_hashes(text: str) -> Decimal | None:
    """The number behind the first ####, without $, commas, percent sign and trailing dot.

    The first one counts: a policy must not earn by printing many answers.
    """
    match = re.search(r"####\s*([-+]?)\s*\$?\s*([-+]?)\s*(\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    if not match or (match[1] and match[2]):
        return None
    try:
        return Decimal(match[1] + match[2] + match[3].replace(",", ""))
    except InvalidOperation:
        return None


# === TOKEN IDS ===================================================================================


def prompt_ids(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt: text with the tokenizer's opening tokens (BOS), chat by template."""
    if not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise UserError(
                "the prompts are chat messages but the tokenizer has no chat template: "
                "use a chat model, or plain-text prompts (--prompt-template)"
            )
        return list(
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    ids = list(tokenizer(prompt)["input_ids"])
    # PITFALL: some tokenizers close every text with EOS; the model would continue a finished text.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise UserError(f"the prompt '{shorten(prompt)}' has no tokens")
    return ids


def completion_ids(tokenizer, text: str, eos: bool = True) -> list[int]:
    """Token ids of a completion, without opening tokens, with EOS at its end."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not eos:
        return ids
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: set tokenizer.eos_token and save it again")
    return [*ids, tokenizer.eos_token_id]


def pad_token_id(tokenizer) -> int:
    """A valid id, different from EOS, to fill the right end of rows.

    PITFALL: many tokenizers have no PAD or share it with EOS, and then "everything that is PAD"
    hides the EOS that the model should learn. Nothing here ever asks whether a token is PAD: rows
    are padded on the right, lengths and masks say what is real, and sampling stops by explicit
    stop ids. So any id serves as a filler, the embeddings are never resized, and it differs from
    EOS only to make a mistake visible.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos and pad < len(tokenizer):
        return pad
    return 0 if eos != 0 else 1


def stop_token_ids(tokenizer, stop: str | None = None) -> list[int]:
    """EOS, and the one token that `stop` is (a backslash n is a line break)."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if stop is not None:
        text = stop.encode().decode("unicode_escape")
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(f"stop text {stop!r} is {len(tokens)} tokens of this tokenizer, not 1")
        ids += tokens
    if not ids:
        raise UserError("the tokenizer has no EOS token: give a text to stop at (--stop)")
    return ids


def shorten(text: str, width: int = 80) -> str:
    """Text on one line, cut in the middle."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 3 :]}"


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line."""
    return f"{type(error).__name__}: {shorten(str(error), 200)}"
