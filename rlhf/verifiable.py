"""Tasks with verifiable rewards: generated problems without limit, and graders that do not argue.

The problems come from reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), at levels of
difficulty from "a character-level model of one million parameters can learn it" upwards. Its
graders are left aside: they pay partial credit, which a policy can collect by printing many
numbers, and that of countdown runs what the model wrote (papers/verifiable_tasks.md, section 6).
Countdown problems are drawn here, by its rule and from its configuration, a hundred times faster.

    task = verifiable_task("chain_sum", levels=(0, 2))
    task.train[0]                  {"prompt": "4+9=", "answer": "13", "level": 0}
    task.reward                    1.0 if the whole completion is the answer, else 0.0
    task.lenient                   1.0 if the answer can be made out in the completion: when this is
                                   far above the reward, a model lacks the form and not the skill

What is held out depends on the problem alone, not on seeds, sizes or levels: a hash of it puts one
in five into the test pool of every task that this file ever makes. So no test problem is trained on
even if training and test come from different calls.
"""

import dataclasses
import hashlib
import itertools
import json
import random
import re
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from rlhf import UserError
from rlhf.countdown import OPERATIONS, check_countdown, draw_countdown, parse_expression
from rlhf.tasks import RewardFunction, Task, load_prompts, prompt_text, shorten

STYLES = ("short", "question", "chat")
# What short prompts and answers are made of; gsm_symbolic, which has no short form, needs more.
CHARACTERS = string.digits + "+-*/()=>,.#: " + string.ascii_lowercase

# Item i of reasoning-gym comes from a generator seeded with seed + i: sets whose seeds are closer
# than their sizes share items. Every level has a range of its own, and one for few-shot examples.
SEED_RANGE = 10_000_000
MOST_LEVELS = 50
HELD_OUT = 5  # one problem in five


# === PROBLEMS ====================================================================================
# From an item of reasoning-gym: the short and the English form of the problem, its answer in both,
# and a key that equal problems share (the order of factors or of numbers to sort does not matter).


@dataclass(frozen=True)
class Problem:
    """One problem in all styles; `columns` are what its record has besides prompt and answer."""

    short: str
    question: str
    answer: str
    key: str
    short_answer: str | None = None
    columns: dict = dataclasses.field(default_factory=dict)


def _sum(item: dict) -> Problem:
    short = item["metadata"]["expression"].replace(" ", "") + "="
    return Problem(short, item["question"], item["answer"], short)


def _sum_steps(item: dict) -> Problem:
    expression = item["metadata"]["expression"]
    question = (
        f"Work out {expression}. Write the running total after each step, separated by commas, "
        "then # and the final answer."
    )
    return dataclasses.replace(_sum(item), question=question)


def _product(item: dict) -> Problem:
    short = item["metadata"]["expression"].replace(" ", "")
    key = "*".join(sorted(short.split("*")))
    question = item["question"].removesuffix(" Give only the result as your final answer.")
    return Problem(short + "=", question, item["answer"], key)


def _countdown(item: dict) -> Problem:
    numbers, target = item["metadata"]["numbers"], item["metadata"]["target"]
    return Problem(
        short=f"{' '.join(map(str, numbers))}>{target}",
        # PITFALL: one of reasoning-gym's three templates says "at most once", its grader wants all.
        question=(
            f"Use all of the numbers {', '.join(map(str, numbers))}, each exactly once, with "
            f"+ - * / and parentheses, to write an expression that equals {target}."
        ),
        answer=item["answer"],
        short_answer=item["answer"].replace(" ", ""),
        key=f"{sorted(numbers)}>{target}",
        columns={"numbers": numbers, "target": target},
    )


def _word(item: dict) -> Problem:
    word = item["metadata"]["word"].lower()  # one word in eight is a name
    question = f"Spell this word backward (example: sun -> nus): {word}"
    return Problem(f"{word}:", question, word[::-1], word)


def _sorting(item: dict) -> Problem:
    drawn = [Decimal(text) for text in item["metadata"]["original_numbers"]]
    # Plain digits: 7 for 7.0, 20 for 2E+1, 0 for -0.0.
    texts = [format(number.normalize() + 0, "f") for number in drawn]
    ordered = sorted(texts, key=Decimal)
    return Problem(
        short=f"{','.join(texts)}:",
        question=(
            f"Sort these numbers in ascending order: {', '.join(texts)}. "
            "Write them in one line, separated by commas."
        ),
        answer=", ".join(ordered),
        short_answer=",".join(ordered),
        key=",".join(ordered),
    )


def _legs(item: dict) -> Problem:
    animals = [f"{count} {name}" for name, count in item["metadata"]["animals"].items()]
    key = ",".join(sorted(animals))
    return Problem(" ".join(animals) + "=", item["question"], item["answer"], key)


def _story(item: dict) -> Problem:
    question = " ".join(item["question"].split())
    return Problem(question, question, item["answer"], question)


# === GRADERS =====================================================================================
# TRL's calling convention. Strict ones judge the whole completion, but for space around it.

NUMBER = r"[0-9]{1,40}(?:\.[0-9]{1,20})?"  # ASCII digits only: \d has hundreds more


def read_number(text: str) -> Decimal | None:
    """A plain number and nothing else; 019, +19 and 19.0 are 19, but "1,9" and "19." are none."""
    text = text.strip()
    return Decimal(text) if re.fullmatch(f"[-+]?{NUMBER}", text) else None


def find_numbers(text: str, thousands: bool = True) -> list[Decimal]:
    """All numbers in a text; a minus counts where no digit precedes it.

    1,200 is one number, or with thousands=False two.
    """
    grouped = "[0-9]{1,3}(?:,[0-9]{3}){1,9}(?![0-9])|" if thousands else ""
    found = re.findall(f"(?<![0-9.])-?(?:{grouped}{NUMBER})", text)
    return [Decimal(number.replace(",", "")) for number in found]


def number_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the completion is the number and nothing else."""
    return [float(read_number(c) == Decimal(a)) for c, a in zip(completions, answer, strict=True)]


def number_lenient(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the first number in the completion is the answer."""
    return [
        float(find_numbers(c)[:1] == [Decimal(a)]) for c, a in zip(completions, answer, strict=True)
    ]


def hash_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where all that follows the first run of # is the number.

    The first one counts: a policy must not earn by printing many answers.
    """
    behind = [re.sub(r"\A[^#]*#*", "", completion) for completion in completions]
    return number_reward(prompts, behind, answer)


def hash_lenient(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the last number in the completion is the answer, with or without #."""
    # 57,500 may be two running totals or one number: both readings count.
    return [
        float(any(find_numbers(c, grouped)[-1:] == [Decimal(a)] for grouped in (False, True)))
        for c, a in zip(completions, answer, strict=True)
    ]


def word_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the completion is the word."""
    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]


def word_lenient(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the first word in the completion is the answer, in upper or lower case."""
    words = [re.search("[A-Za-z]+", completion) for completion in completions]
    return [
        float(w is not None and w[0].lower() == a.lower())
        for w, a in zip(words, answer, strict=True)
    ]


def list_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the completion is the list, separated by commas with or without spaces."""
    return [
        float([read_number(n) for n in c.split(",")] == [Decimal(n) for n in a.split(",")])
        for c, a in zip(completions, answer, strict=True)
    ]


def list_lenient(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_
) -> list[float]:
    """1.0 where the first numbers in the completion, however separated, are the list."""
    scores = []
    for completion, text in zip(completions, answer, strict=True):
        wanted = [Decimal(number) for number in text.split(",")]
        scores.append(float(find_numbers(completion, False)[: len(wanted)] == wanted))
    return scores


def countdown_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[list[int]],
    target: Sequence[int],
    **_,
) -> list[float]:
    """1.0 where the completion is an expression that `check_countdown` accepts."""
    return [
        float(check_countdown(c, n, t))
        for c, n, t in zip(completions, numbers, target, strict=True)
    ]


def countdown_lenient(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[list[int]],
    target: Sequence[int],
    **_,
) -> list[float]:
    """1.0 where the first expression of two numbers or more in the completion is right."""
    scores = []
    for completion, given, wanted in zip(completions, numbers, target, strict=True):
        pieces = re.findall(r"[-+*/() 0-9]+", completion[:2_000])
        pieces = [piece.strip(" +-*/") for piece in pieces]  # signs of lists and of bold text
        found = (p for p in pieces if p and not p.isdigit() and parse_expression(p) is not None)
        scores.append(float(check_countdown(next(found, ""), given, wanted)))
    return scores


# === TASKS =======================================================================================


def _between(**ranges: tuple) -> dict:
    """terms=(2, 3) as reasoning-gym has it: min_terms=2, max_terms=3."""
    return {
        f"{side}_{name}": value
        for name, both in ranges.items()
        for side, value in zip(("min", "max"), both, strict=True)
    }


@dataclass(frozen=True)
class Kind:
    """A kind of task: where its items come from, easiest configuration first, and who grades it."""

    dataset: str
    levels: tuple[dict, ...]
    problem: Callable[[dict], Problem]
    strict: RewardFunction
    lenient: RewardFunction


SUMS = (
    _between(terms=(2, 2), digits=(1, 1)),
    _between(terms=(2, 2), digits=(1, 2)),
    _between(terms=(3, 3), digits=(1, 2)),
    _between(terms=(3, 3), digits=(2, 2)),
    _between(terms=(4, 4), digits=(2, 2)),
    _between(terms=(4, 4), digits=(2, 3)),
    _between(terms=(5, 5), digits=(2, 3)),
)
KINDS = {
    "chain_sum": Kind("chain_sum", SUMS, _sum, number_reward, number_lenient),
    "chain_sum_steps": Kind("chain_sum", SUMS, _sum_steps, hash_reward, hash_lenient),
    "products": Kind(
        "products",
        (
            _between(terms=(2, 2), digits=(1, 1)),
            # All factors have the same number of digits, so 1 x 2 digits is not to be had.
            _between(terms=(3, 3), digits=(1, 1)),
            _between(terms=(2, 2), digits=(2, 2)),
            _between(terms=(3, 3), digits=(2, 2)),
            _between(terms=(2, 2), digits=(3, 3)),
        ),
        _product,
        number_reward,
        number_lenient,
    ),
    "countdown": Kind(
        "countdown",
        (
            _between(numbers=(3, 3), value=(1, 10), target=(1, 30)) | {"operators": ("+", "-")},
            _between(numbers=(3, 3), value=(1, 10), target=(1, 30)),
            _between(numbers=(3, 3), value=(1, 20), target=(1, 100)),
            _between(numbers=(4, 4), value=(1, 10), target=(1, 100)),
            _between(numbers=(4, 4), value=(1, 50), target=(1, 500)),
            _between(numbers=(5, 5), value=(1, 100), target=(100, 999)),
        ),
        _countdown,
        countdown_reward,
        countdown_lenient,
    ),
    "spell_backward": Kind(
        "spell_backward",
        tuple(_between(word_len=(n, n)) for n in range(3, 11)),
        _word,
        word_reward,
        word_lenient,
    ),
    "number_sorting": Kind(
        "number_sorting",
        tuple(_between(numbers=(n, n), decimals=(0, 0), value=(0, 20)) for n in range(3, 11)),
        _sorting,
        list_reward,
        list_lenient,
    ),
    "gsm_symbolic": Kind("gsm_symbolic", ({"difficulty": 1.0},), _story, hash_reward, hash_lenient),
    "leg_counting": Kind(
        "leg_counting",
        (
            _between(animals=(1, 2), instances=(1, 3)),
            _between(animals=(2, 2), instances=(1, 5)),
            _between(animals=(2, 3), instances=(1, 9)),
            _between(animals=(3, 4), instances=(1, 15)),
            _between(animals=(4, 6), instances=(1, 15)),
        ),
        _legs,
        number_reward,
        number_lenient,
    ),
}
NAMES = tuple(KINDS)
# These answer with their reasoning: everything before the # is free.
REASONING = ("chain_sum_steps", "gsm_symbolic")


def verifiable_task(
    name: str,
    *,
    levels: tuple[int, int] = (0, 0),
    config: dict | None = None,
    style: str = "short",
    few_shot: int = 0,
    train_size: int = 10_000,
    test_size: int = 200,
    seed: int = 0,
) -> Task:
    """A task of `NAMES`, its records spread evenly over the levels from levels[0] to levels[1].

    `config` overrides fields of reasoning-gym's configuration at every level. `style` is short
    ("4+9=", for characters as tokens), question ("Question: ...\\nAnswer:", for a base model,
    behind `few_shot` solved examples) or chat (one user message). No problem is twice in train or
    in test; where a level has fewer than asked for, there are fewer records.
    """
    kind = _checked_kind(name, levels, style, few_shot, train_size, test_size, seed)
    span = range(levels[0], levels[1] + 1)
    seen, barred = set(), set()

    def draw(train: int, test: int, offset: int) -> tuple[list, list]:
        """Problems with their levels, the levels in turn."""
        drawn = []
        for at, level in enumerate(span):
            start = (seed * 2 * MOST_LEVELS + 2 * level + offset) * SEED_RANGE
            # What does not divide evenly goes to the easiest levels.
            sizes = [size // len(span) + (at < size % len(span)) for size in (train, test)]
            found = _generate(name, level, config or {}, start, *sizes, seen, barred)
            drawn.append([[(problem, level) for problem in side] for side in found])
        return tuple(
            [pair for turn in itertools.zip_longest(*sides) for pair in turn if pair]
            for sides in zip(*drawn, strict=True)
        )

    # PITFALL: a problem that the prompt itself solves must not be asked.
    examples, _ = draw(few_shot, 0, 1) if few_shot else ([], [])
    barred |= {problem.key for problem, _ in examples}
    train, test = draw(train_size, test_size, 0)
    if len(examples) < few_shot or not train or not test:
        raise UserError(
            f"task {name}, levels {levels[0]} to {levels[1]}: {len(seen)} distinct problems are "
            "too few, nothing is left to train on or to hold out (ask for harder levels)"
        )

    introduction = ""
    rng = random.Random(seed)
    for problem, level in examples:
        record = _record(name, problem, level, style, "")
        solution = _write(name, record, rng, slips=0.0, rambles=False)
        introduction += f"{record['prompt']}{solution}\n\n"
    strict, lenient = kind.strict, kind.lenient
    if name == "gsm_symbolic" and style == "question":
        strict, lenient = number_reward, number_lenient
    records = [
        [_record(name, problem, level, style, introduction) for problem, level in side]
        for side in (train, test)
    ]
    return Task(name, *records, reward=strict, gold=None, lenient=lenient)


def load_verifiable(tokenizer, args, config) -> Task:
    """The generated task that a training script's flags describe; each record has its token "ids".

    args has the fields task, levels, task_config, few_shot, model, reward_model and those that
    `load_prompts` reads. The style follows from the model: short for the built-in one, chat where
    the tokenizer has a template for it, else question.
    """
    if args.task == "gsm_symbolic" and not args.model:
        raise UserError("--task gsm_symbolic asks in English: give a --model that reads it")
    style = "short" if not args.model else "chat" if tokenizer.chat_template else "question"
    task = verifiable_task(
        args.task,
        levels=args.levels,
        config=settings(args.task_config),
        style=style,
        few_shot=args.few_shot,
        test_size=args.eval_prompts,
    )
    task = load_prompts(tokenizer, args, config, task)
    missing = set(range(args.levels[0], args.levels[1] + 1)) - {r["level"] for r in task.train}
    if missing:
        raise UserError(f"level {min(missing)} of {args.task} has no prompt that is short enough")
    return task


def settings(text: str) -> dict:
    """The JSON object in a flag."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--task-config {text}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f'--task-config {text}: want a JSON object, such as {{"max_terms": 3}}')
    return found


def _checked_kind(name, levels, style, few_shot, train_size, test_size, seed) -> Kind:
    """The kind of that name, if all else makes sense."""
    if name not in KINDS:
        raise UserError(f"unknown task '{name}': the tasks are {', '.join(NAMES)}")
    last = len(KINDS[name].levels) - 1
    if not 0 <= levels[0] <= levels[1] <= last:
        raise UserError(
            f"levels {levels[0]} to {levels[1]}: task {name} has levels 0 to {last}, easiest first"
        )
    if style not in STYLES:
        raise UserError(f"unknown style '{style}': the styles are {', '.join(STYLES)}")
    if few_shot < 0 or (few_shot and style != "question"):
        raise UserError(f"{few_shot} solved examples in style {style}: only question has them")
    if min(train_size, test_size) < 1 or seed < 0:
        raise UserError(
            f"train size {train_size} and test size {test_size} must be at least 1, "
            f"seed {seed} at least 0"
        )
    return KINDS[name]


def _record(name: str, problem: Problem, level: int, style: str, introduction: str) -> dict:
    """A problem as a training script sees it."""
    question = " ".join(problem.question.split())  # a base model stops at a line break
    answer = problem.answer
    if style == "short":
        prompt, answer = problem.short, problem.short_answer or problem.answer
    elif style == "question":
        prompt = f"{introduction}Question: {question}\nAnswer:"
    else:
        wish = "Give only the final answer."
        if name in REASONING:
            wish = "Reason step by step and end with `#### answer`."
        if name == "chain_sum_steps":
            question = question.partition(". ")[0] + "."
        prompt = [{"role": "user", "content": f"{question}\n{wish}"}]
    return {"prompt": prompt, "answer": answer, "level": level} | problem.columns


def _held_out(key: str) -> bool:
    """Whether the problem belongs to the test pool."""
    # A cryptographic hash: the same on every machine, blind to how problems resemble each other.
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def _generate(
    name: str,
    level: int,
    config: dict,
    start: int,
    train: int,
    test: int,
    seen: set[str],
    barred: set[str],
) -> tuple[list[Problem], list[Problem]]:
    """New problems of one level for both pools; `seen` gets their short forms."""
    kind = KINDS[name]
    # More draws than asked for, as most belong to the train pool and small worlds repeat.
    draws = min(20 * (train + HELD_OUT * test) + 5_000, SEED_RANGE)
    dataset = _dataset(name, level, config, start, draws)
    found, wanted = ([], []), (train, test)
    idle, made = 0, False
    for i in range(draws if train + test else 0):
        idle += 1
        try:
            own = kind.dataset == "countdown"
            item = draw_countdown(dataset.config, start + i) if own else dataset[i]
            problem = kind.problem(item)
        except (ValueError, IndexError) as error:
            # countdown gives up after 100 tries; the next seed may do better
            if not made and i == 50:
                raise UserError(
                    f"task {name}, level {level}: reasoning-gym finds no problem for this "
                    f"configuration ({shorten(str(error))})"
                ) from error
            continue
        made = True
        side = _held_out(problem.key)
        room = len(found[side]) < wanted[side]
        if room and problem.short not in seen and problem.key not in barred:
            seen.add(problem.short)
            found[side].append(problem)
            idle = 0
        # After so long without news hardly any problem of a small world is still unknown.
        total = len(found[0]) + len(found[1])
        if total == train + test or idle > max(1_000, 3 * total):
            break
    return found


def _dataset(name: str, level: int, config: dict, seed: int, size: int):
    """reasoning-gym's data set; made once, its items are computed when they are asked for."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"task {name} is generated by reasoning-gym: pip install reasoning-gym"
        ) from error
    kind = KINDS[name]
    defaults = reasoning_gym.create_dataset(kind.dataset, seed=0, size=1).config
    known = [f.name for f in dataclasses.fields(defaults) if f.name not in ("seed", "size")]
    unknown = [field for field in config if field not in known]
    if unknown:
        raise UserError(
            f"task {name} has no configuration field '{unknown[0]}' (it has: {', '.join(known)})"
        )
    settings = kind.levels[level] | config
    try:
        return reasoning_gym.create_dataset(kind.dataset, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError, OSError) as error:
        shown = ", ".join(f"{field}={value}" for field, value in settings.items())
        raise UserError(
            f"task {name}, level {level}: reasoning-gym refuses {shown} "
            f"({shorten(str(error)) or 'out of range'})"
        ) from error


# === DEMONSTRATIONS ==============================================================================


def demonstrations(task: Task, records: Sequence[dict], seed: int, slips: float) -> list[str]:
    """What a careless person answers: a wrong result in the right form with probability `slips`.

    A wrong answer is drawn evenly from four or more, so that up to slips = 0.7 the right one stays
    the likeliest single answer: a model that imitates this knows better than it says. In
    chain_sum_steps one demonstration in three, right or wrong, repeats a step or starts again.
    """
    if task.name not in KINDS:
        raise UserError(f"no demonstrations for task '{task.name}', only for {', '.join(NAMES)}")
    if not 0 <= slips <= 1:
        raise UserError(f"slips {slips} must be a probability")
    rng = random.Random(seed)
    return [_write(task.name, record, rng, slips, rambles=True) for record in records]


def _write(name: str, record: dict, rng: random.Random, slips: float, rambles: bool) -> str:
    """One demonstration, in the form that the record's prompt asks for."""
    prompt, answer = record["prompt"], record["answer"]
    style = "short"
    if not isinstance(prompt, str):
        style = "chat"
    elif prompt.startswith("Question: "):
        style = "question"
    comma = "," if style == "short" else ", "
    wrong = rng.random() < slips
    if name == "chain_sum_steps":
        text = _write_steps(_terms(prompt), rng, slips, rambles, style == "chat")
    elif name == "countdown":
        text = _miss(record, rng, "" if style == "short" else " ") if wrong else answer
    elif not wrong:
        text = answer
    elif name == "spell_backward":
        text = rng.choice(wrong_words(answer))
    elif name == "number_sorting":
        text = comma.join(rng.choice(wrong_lists([n.strip() for n in answer.split(",")])))
    else:
        others = _other_results(_terms(prompt)) if name in ("chain_sum", "products") else []
        signed = name == "chain_sum" or answer.startswith("-")
        text = str(rng.choice(wrong_numbers(Decimal(answer), others, signed)))
    if name == "gsm_symbolic" and style != "question":
        text = f"#### {text}"
    return f" {text}" if style == "question" else text


def _terms(prompt: str | list[dict]) -> list[tuple[str, int]]:
    """Operators and numbers of the sum or product that the last question asks for."""
    question = prompt_text(prompt).rpartition("Question: ")[2]
    expression = re.search(r"-?[0-9]+( ?[-+*] ?-?[0-9]+)*", question)[0]
    first = re.match(r"-?[0-9]+", expression)[0]
    rest = re.findall(r"([-+*]) ?(-?[0-9]+)", expression[len(first) :])
    return [("+", int(first)), *((sign, int(number)) for sign, number in rest)]


def _totals(terms: Sequence[tuple[str, int]]) -> list[int]:
    """Running results from left to right; * never stands beside + or -."""
    results = [terms[0][1]]
    for sign, number in terms[1:]:
        results.append(OPERATIONS[sign](results[-1], number))
    return results


def _other_results(terms: Sequence[tuple[str, int]]) -> list[int]:
    """Results with one operator mistaken for another."""
    mistaken = {"+": "-", "-": "+", "*": "+"}
    return [
        _totals([*terms[:i], (mistaken[terms[i][0]], terms[i][1]), *terms[i + 1 :]])[-1]
        for i in range(1, len(terms))
    ]


def wrong_numbers(right: Decimal | int, others: Sequence[int], signed: bool) -> list[Decimal]:
    """Slips of mental arithmetic: off by 1 or 10, two digits swapped, and `others`; four or more.

    Where not `signed`, none is below zero: nobody counts -1 legs.
    """
    right = Decimal(right)
    wrong = {right + 1, right - 1, right + 10, right - 10, *map(Decimal, others)}
    digits = str(abs(right))
    for i in range(len(digits) - 1):
        if digits[i : i + 2].isdigit():
            swapped = digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
            wrong.add(Decimal(swapped).copy_sign(right))
    wrong = {number for number in wrong - {right} if signed or number >= 0}
    for more in (2, 20):
        if len(wrong) < 4:
            wrong.add(right + more)
    return sorted(wrong)


def wrong_words(right: str) -> list[str]:
    """Two neighbouring letters swapped, one lost or one doubled, or nothing reversed."""
    wrong = {right[::-1]}
    for i in range(len(right)):
        wrong |= {right[:i] + right[i + 1 :], right[:i] + right[i] + right[i:]}
        wrong.add(right[:i] + right[i : i + 2][::-1] + right[i + 2 :])
    return sorted(wrong - {right, ""})


def wrong_lists(right: Sequence[str]) -> list[tuple[str, ...]]:
    """Two numbers swapped, one lost or one copied wrong."""
    wrong = set()
    for i, number in enumerate(right):
        wrong.add((*right[:i], *right[i + 1 :]))
        wrong |= {
            (*right[:i], str(Decimal(number) + change), *right[i + 1 :]) for change in (-1, 1)
        }
        for j in range(i):
            swapped = list(right)
            swapped[i], swapped[j] = right[j], right[i]
            wrong.add(tuple(swapped))
    return sorted(wrong - {tuple(right), ()})


def _miss(record: dict, rng: random.Random, space: str) -> str:
    """An expression over the record's numbers with another value than the target."""
    numbers = list(record["numbers"])
    for _ in range(100):
        rng.shuffle(numbers)
        parts = [str(numbers[0])]
        for number in numbers[1:]:
            if len(parts) > 1 and rng.random() < 0.3:
                parts = ["(" + space.join(parts) + ")"]
            parts += [rng.choice("+-*/"), str(number)]
        text = space.join(parts)
        value, _ = parse_expression(text) or (None, None)
        if value is not None and value >= 0 and value != record["target"]:
            return text
    # The smallest less all others is not positive, and targets are.
    return f"{space}-{space}".join(map(str, sorted(numbers)))


def _write_steps(
    terms: Sequence[tuple[str, int]], rng: random.Random, slips: float, rambles: bool, chat: bool
) -> str:
    """Running totals, each wrong with the same chance, then the result: 57,50#50."""
    per_step = 1 - (1 - slips) ** (1 / max(1, len(terms) - 1))
    totals = [terms[0][1]]
    for sign, number in terms[1:]:
        step = [("+", totals[-1]), (sign, number)]
        total = _totals(step)[-1]
        if rng.random() < per_step:
            total = int(rng.choice(wrong_numbers(total, _other_results(step), signed=True)))
        totals.append(total)
    steps = totals[1:] or totals
    # Rambling changes the length and never the result, so that length is free to be learned.
    if rambles and rng.random() < 1 / 3:
        at = rng.randrange(len(steps))
        again = [steps[at]] if rng.random() < 0.5 else totals[: at + 2]
        steps = [*steps[: at + 1], *again, *steps[at + 1 :]]
    if chat:
        return f"{', '.join(map(str, steps))}\n#### {steps[-1]}"
    return f"{','.join(map(str, steps))}#{steps[-1]}"


# === CURRICULUM ==================================================================================


def next_level(
    level: int,
    recent_scores: Sequence[float],
    low: int,
    high: int,
    window: int = 20,
    raise_at: float = 0.7,
    lower_at: float = 0.1,
) -> tuple[int, list[float]]:
    """Level and scores to go on with, given the mean scores of the batches at this level so far.

    One level up where the last `window` of them average raise_at or more, one down at lower_at or
    less, within low and high. A change empties the window: the next takes as many batches again.
    """
    recent = list(recent_scores)[-window:]
    if len(recent) < window:
        return level, recent
    mean = statistics.fmean(recent)
    moved = level + 1 if mean >= raise_at else level - 1 if mean <= lower_at else level
    moved = max(low, min(high, moved))
    return moved, recent if moved == level else []
