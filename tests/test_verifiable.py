"""Generated tasks: what is held out, graders, the countdown parser, demonstrations, curriculum."""

import dataclasses
import json
import random
import re
import sys
import time
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest

from rlhf import UserError
from rlhf.countdown import check_countdown, draw_countdown, parse_expression
from rlhf.tasks import prompt_text, score
from rlhf.verifiable import (
    CHARACTERS,
    KINDS,
    NAMES,
    STYLES,
    demonstrations,
    find_numbers,
    next_level,
    read_number,
    verifiable_task,
    wrong_lists,
    wrong_numbers,
    wrong_words,
)

pytest.importorskip("reasoning_gym")


def small_task(name, **options):
    return verifiable_task(name, **{"train_size": 80, "test_size": 20} | options)


def prompts_of(records):
    return [prompt_text(record["prompt"]) for record in records]


# === TASKS =======================================================================================


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_every_task_in_every_style(name, style):
    levels = (0, min(1, len(KINDS[name].levels) - 1))
    task = small_task(name, style=style, levels=levels)
    assert task.name == name and task.gold is None
    assert len(task.train) == 80 and len(task.test) == 20
    for record in task.train + task.test:
        assert json.loads(json.dumps(record)) == record
        assert isinstance(record["answer"], str) and record["answer"]
        if style == "question":
            assert record["prompt"].startswith("Question: ")
            assert record["prompt"].endswith("\nAnswer:") and record["prompt"].count("\n") == 1
        elif style == "chat":
            assert [m["role"] for m in record["prompt"]] == ["user"]
            assert ("####" in record["prompt"][0]["content"]) == (
                name in ("chain_sum_steps", "gsm_symbolic")
            )
        elif name != "gsm_symbolic":
            assert set(record["prompt"] + record["answer"]) <= set(CHARACTERS)
    assert Counter(r["level"] for r in task.test) == {
        level: 20 // (levels[1] + 1) for level in range(levels[1] + 1)
    }

    right = demonstrations(task, task.train, seed=1, slips=0.0)
    assert all((text[0] == " ") == (style == "question") for text in right)
    wrong = demonstrations(task, task.train, seed=1, slips=1.0)
    for judge in (task.reward, task.lenient):
        assert score(judge, task.train, right) == [1.0] * 80
        assert sum(score(judge, task.train, wrong)) <= 2  # two wrong steps can cancel
        assert sum(score(judge, task.train, [""] * 80)) == 0
    for spoiled in ("{} or not", "so {}", "{}\n\nQuestion:"):
        spoiled = [spoiled.format(text) for text in right]
        # Only the # says where an answer starts.
        expected = 80 if "#" in right[0] and spoiled[0].startswith("so") else 0
        assert sum(score(task.reward, task.train, spoiled)) == expected
        assert sum(score(task.lenient, task.train, spoiled)) >= 78 * (
            name != "spell_backward" or not spoiled[0].startswith("so")
        )


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("chain_sum", r"\d-\d=|\d\+\d=", r"-?\d+"),
        ("products", r"\d\*\d=", r"\d+"),
        ("countdown", r"\d+ \d+ \d+>\d+", r"[-+*/()\d]+"),
        ("spell_backward", "[a-z]{3}:", "[a-z]{3}"),
        ("number_sorting", r"\d+,\d+,\d+:", r"\d+,\d+,\d+"),
        ("leg_counting", r"(\d [a-z ]+){1,2}=", r"\d+"),
    ],
)
def test_short_form(name, prompt, answer):
    for record in small_task(name, train_size=50, test_size=10).train:
        assert re.fullmatch(prompt, record["prompt"]) and re.fullmatch(answer, record["answer"])


def test_all_levels_can_be_made():
    for name in NAMES:
        last = len(KINDS[name].levels) - 1
        assert last >= 4 or name == "gsm_symbolic"
        task = small_task(name, levels=(0, last), train_size=4 * (last + 1), test_size=last + 1)
        assert Counter(r["level"] for r in task.train) == dict.fromkeys(range(last + 1), 4)
        assert [r["level"] for r in task.test] == list(range(last + 1))  # in turn


def test_held_out_in_every_task_of_that_name():
    first = small_task("chain_sum", levels=(0, 2), train_size=2_000, seed=0)
    held_out = set(prompts_of(first.test))
    for options in (
        {"seed": 7},
        {"levels": (1, 1)},
        {"levels": (0, 6), "train_size": 5_000},
        {"config": {"max_digits": 3}, "levels": (1, 2)},
    ):
        other = small_task("chain_sum", **{"train_size": 2_000} | options)
        assert not held_out & set(prompts_of(other.train))
        assert not set(prompts_of(first.train)) & set(prompts_of(other.test))
    # The order of the numbers makes no new problem.
    for name, separator in (("products", "*"), ("number_sorting", ","), ("countdown", " ")):
        task = small_task(name, levels=(1, 1), train_size=3_000, test_size=300)
        train, test = (
            {
                tuple(sorted(p.replace(">", " >").strip("=:").split(separator)))
                for p in prompts_of(r)
            }
            for r in (task.train, task.test)
        )
        assert train and test and not train & test


@pytest.mark.parametrize(
    ("name", "config", "distinct"),
    [
        ("chain_sum", {}, 200),
        ("products", {}, 100),
        ("number_sorting", {"max_value": 3}, 64),
        ("leg_counting", {"max_animals": 1}, 111),
        ("spell_backward", {}, None),
    ],
)
def test_small_worlds(name, config, distinct):
    task = verifiable_task(name, config=config, train_size=5_000, test_size=5_000)
    train, test = prompts_of(task.train), prompts_of(task.test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert not set(train) & set(test)
    if distinct:
        assert len(train) + len(test) == distinct
    assert 0 < len(test) / len(train + test) < 0.28


def test_same_arguments_same_records_and_another_seed_others():
    first, again, other = (
        small_task("leg_counting", levels=(3, 3), seed=s, train_size=500) for s in (0, 0, 1)
    )
    assert first == again
    assert len(set(prompts_of(first.train)) & set(prompts_of(other.train))) < 25
    more = small_task("leg_counting", levels=(3, 3), train_size=900)
    assert more.train[:500] == first.train and more.test == first.test


def solved_examples(task):
    """Questions and answers of the solved examples, and the questions that are asked."""
    head = task.train[0]["prompt"].rpartition("Question: ")[0]
    examples = [part.split("\nAnswer: ") for part in head.strip().split("\n\n")]
    asked = [r["prompt"].removeprefix(head) for r in task.train + task.test]
    assert all(a.startswith("Question: ") and a.endswith("\nAnswer:") for a in asked)
    return examples, {a.removesuffix("\nAnswer:") for a in asked}


@pytest.mark.parametrize("name", NAMES)
def test_solved_examples(name):
    task = small_task(name, style="question", few_shot=3, train_size=500)
    examples, asked = solved_examples(task)
    assert len(examples) == 3 and all(len(example) == 2 for example in examples)
    assert not {question for question, _ in examples} & asked
    for question, answer in examples:
        if name.startswith("chain_sum"):
            value, _ = parse_expression(re.search("[0-9][-+ 0-9]*[0-9]", question)[0])
            assert answer == (f"{value}#{value}" if name == "chain_sum_steps" else f"{value}")
        if name == "countdown":
            *numbers, target = map(int, re.findall("[0-9]+", question))
            assert check_countdown(answer, numbers, target)


def test_examples_of_a_small_world_are_not_asked():
    task = verifiable_task("products", style="question", few_shot=10, train_size=100)
    examples, asked = solved_examples(task)
    assert len(examples) == 10 and len(asked) == len(task.train) + len(task.test) <= 90
    assert not {question for question, _ in examples} & asked


def test_config_overrides_every_level():
    task = small_task("number_sorting", levels=(0, 1), config={"min_value": 50, "max_value": 99})
    numbers = [int(n) for r in task.train for n in r["answer"].split(",")]
    assert min(numbers) >= 50 and max(numbers) > 90
    decimals = small_task("number_sorting", config={"min_decimals": 1, "max_decimals": 2})
    assert "." in decimals.train[0]["answer"]
    assert score(decimals.reward, decimals.train[:1], [decimals.train[0]["answer"]]) == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chain_sums"}, "unknown task 'chain_sums': the tasks are chain_sum, "),
        (
            {"config": {"terms": 2}},
            r"no configuration field 'terms' \(it has: min_terms, max_terms, min_digits, ",
        ),
        ({"config": {"seed": 2}}, "no configuration field 'seed'"),
        ({"config": {"min_terms": 3}}, "refuses min_terms=3, max_terms=2, .*must be >="),
        ({"config": {"min_terms": "two"}}, "refuses .*min_terms=two"),
        ({"name": "gsm_symbolic", "config": {"difficulty": 2.0}}, "refuses difficulty=2.0"),
        (
            {"name": "countdown", "config": {"min_target": 9_000, "max_target": 9_001}},
            "finds no problem",
        ),
        ({"name": "spell_backward", "config": {"data_file": "gone.txt"}}, "refuses"),
        ({"levels": (0, 7)}, "levels 0 to 7: task chain_sum has levels 0 to 6"),
        ({"levels": (2, 1)}, "levels 2 to 1"),
        ({"style": "long"}, "unknown style 'long'"),
        ({"few_shot": 2}, "2 solved examples in style short"),
        ({"train_size": 0}, "must be at least 1"),
        ({"seed": -1}, "seed -1"),
        (
            {"name": "number_sorting", "config": {"min_numbers": 1, "max_numbers": 1}}
            | {"style": "question", "few_shot": 21},
            "too few",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        verifiable_task(**{"name": "chain_sum"} | arguments)
    assert "\n" not in str(caught.value)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        verifiable_task("products")


# === GRADERS =====================================================================================


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19", 19),
        (" 19\n", 19),
        ("019", 19),
        ("+19", 19),
        ("19.0", 19),
        ("-19", -19),
        ("19.", None),
        ("1,900", None),
        ("19 20", None),
        ("--19", None),
        ("1e3", None),
        ("nan", None),
        ("", None),
        ("19" * 50, None),
        ("\u0661\u0669", None),  # Arabic digits
    ],
)
def test_read_number(text, number):
    assert read_number(text) == number


def test_find_numbers():
    text = "12-5 is 7, or -3.50; 1,200 (not 1,20) .5"
    found = [12, 5, 7, Decimal("-3.5"), 1200, 1, 20]
    assert find_numbers(text) == found
    assert find_numbers("57,500", thousands=False) == [57, 500]


@pytest.mark.parametrize(
    ("name", "style", "columns", "texts"),
    # texts: completion -> (strict, lenient)
    [
        (
            "chain_sum",
            "short",
            {"answer": "13"},
            {
                "13": (1, 1),
                "13 14": (0, 1),
                "= 13.": (0, 1),
                "14 13": (0, 0),
                "113": (0, 0),
                "1": (0, 0),
                "thirteen": (0, 0),
            },
        ),
        (
            "chain_sum_steps",
            "short",
            {"answer": "50"},
            {
                "57,50#50": (1, 1),
                "#50": (1, 1),
                "57####  50 ": (1, 1),
                "57,50": (0, 1),
                "57,50#51": (0, 0),
                "#51#50": (0, 1),
                "#50#51": (0, 0),
                "50#": (0, 1),
            },
        ),
        (
            "gsm_symbolic",
            "chat",
            {"answer": "1200"},
            {
                "so\n#### 1200": (1, 1),
                "so\n#### 1,200": (0, 1),
                "that is 1,200 apples.": (0, 1),
                "1200, thus #### 12": (0, 0),
            },
        ),
        (
            "gsm_symbolic",
            "question",
            {"answer": "2.5"},
            {" 2.5": (1, 1), " 2.50": (1, 1), " #### 2.5": (0, 1), " 2": (0, 0)},
        ),
        (
            "spell_backward",
            "short",
            {"answer": "olleh"},
            {
                "olleh": (1, 1),
                "Olleh": (0, 1),
                '"olleh" it is': (0, 1),
                "ollehh": (0, 0),
                "it is olleh": (0, 0),
            },
        ),
        (
            "number_sorting",
            "question",
            {"answer": "1, 2, 13"},
            {
                " 1, 2, 13": (1, 1),
                " 1,2,13": (1, 1),
                " [1, 2, 13]": (0, 1),
                " 1 2 13": (0, 1),
                " 1, 2, 13, 13": (0, 1),
                " 1, 2": (0, 0),
                " 1, 13, 2": (0, 0),
                " 1,, 2, 13": (0, 1),
            },
        ),
        (
            "countdown",
            "chat",
            {"answer": "3 * 5", "numbers": [5, 3], "target": 15},
            {
                "3 * 5": (1, 1),
                "5*3": (1, 1),
                "5*3 = 15": (0, 1),
                "With 3 and 5: **(3*5)**": (0, 1),
                "- 3 + 5, no, 3 * 5": (0, 0),
                "15": (0, 0),
                "3 5": (0, 0),
            },
        ),
    ],
)
def test_strict_and_lenient(name, style, columns, texts):
    task = small_task(name, style=style, train_size=4, test_size=4)
    records = [{"prompt": "p", "level": 0, **columns}] * len(texts)
    for judge, at in ((task.reward, 0), (task.lenient, 1)):
        expected = [float(pair[at]) for pair in texts.values()]
        assert score(judge, records, list(texts)) == expected


# === COUNTDOWN ===================================================================================


@pytest.mark.parametrize(
    "text",
    [
        "3*5*1",
        "5 * 3 / 1",
        "(3)*((5))*1",
        " 3*(5*1)\n",
        "5/(1/3)",
        "3/(1/5)",
    ],
)
def test_right_expressions(text):
    assert check_countdown(text, [1, 3, 5], 15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "15",
        "3*5",  # unused number
        "3*5*1*1",  # number used twice
        "3*5+1",
        "3*5*1 = 15",
        "3*5*1=",
        "3*5(1)",  # juxtaposition
        "(3)(5)(1)",
        "1 3 5",
        "3*5*01",  # not as given
        "3*5*1.0",
        "+3*5*1",
        "-3*-5*1",  # no signs
        "3*(-5)*(-1)",
        "3--5*1",
        "3**5**1",
        "3//5//1",
        "3*5*1)",
        "(3*5*1",
        "()3*5*1",
        "3*5*1+",
        "3*5/(1-1)",  # division by zero
        "3*5^1",
        "3x5x1",
        "3\u00d75\u00d71",
        "\uff13*5*1",  # fullwidth digits
        "\u0663*\u0665*\u0661",  # Arabic digits
        "3*5\n*1",
        "3*5*1#",
        "__import__('os').system('true')",
        "9**9**9",
        "9**9**9**9**9",
        "1" * 10_000,
        "(" * 10_000,
        "(" * 5_000 + "1" + ")" * 5_000,
        "(" * 21 + "3*5*1" + ")" * 21,  # nested too deeply
        "3*5*1" + " " * 100 + "*1",  # too long
        "3*5*1+(1-1)*" + "9*" * 2_000 + "9",
    ],
)
def test_wrong_expressions_fast(text):
    started = time.perf_counter()
    assert not check_countdown(text, [1, 3, 5], 15)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2-3-4", -5),
        ("2-(3-4)", 3),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("1+2*3-4/2", 5),
        ("1/3+1/6", Fraction(1, 2)),
        ("2*(3+4)*5", 70),
        ("1/0", None),
        ("1/(2-2)+3", None),
        ("0/3", 0),
    ],
)
def test_parse_expression(text, value):
    assert parse_expression(text)[0] == value


def test_parser_agrees_with_python():
    rng = random.Random(0)
    accepted = 0
    for _ in range(20_000):
        text = "".join(rng.choices("12+-*/()", k=rng.randint(1, 9)))
        try:
            # Fractions, so that Python divides exactly too.
            exact = "".join(f"F({c})" if c.isdigit() else c for c in text)
            expected = eval(exact, {"F": Fraction}) if text.isascii() else None
        except (SyntaxError, TypeError):
            expected = "refused"
        except ZeroDivisionError:
            expected = None
        parsed = parse_expression(text)
        if parsed is not None and not any(len(number) > 1 for number in parsed[1]):
            assert parsed[0] == expected, text
            accepted += 1
    assert accepted > 500


def test_countdown_problems_are_those_of_reasoning_gym():
    import reasoning_gym

    settings = KINDS["countdown"].levels[1]
    theirs = reasoning_gym.create_dataset("countdown", seed=0, size=400, **settings)
    ours = [draw_countdown(theirs.config, seed) for seed in range(400)]
    signs = []
    for items in (ours, [theirs[i] for i in range(400)]):
        for item in items:
            drawn = item["metadata"]
            assert check_countdown(item["answer"], drawn["numbers"], drawn["target"])
            assert len(drawn["numbers"]) == 3 and 1 <= min(drawn["numbers"]) <= 10
            assert 1 <= drawn["target"] <= 30
        signs.append([sum(item["answer"].count(sign) for item in items) for sign in "+-*/"])
    assert signs[0] == pytest.approx(signs[1], rel=0.4, abs=40)


def test_longest_texts_are_judged_in_bounded_time():
    numbers = ["9"] * 50
    for text in ("*".join(numbers), "/".join(numbers), "9" * 49 + "*" + "9" * 50):
        assert parse_expression(text) is not None
    long = {"numbers": [1, 3], "target": 3, "answer": "3", "prompt": "p"}
    texts = ["1+" * 50_000, "1 " * 50_000, "(" * 100_000, "1,111" * 20_000, "a#" * 50_000]
    started = time.perf_counter()
    for kind in KINDS.values():
        for text in texts:
            for judge in (kind.strict, kind.lenient):
                assert score(judge, [long], [text]) == [0.0]
    assert time.perf_counter() - started < 5


# === DEMONSTRATIONS ==============================================================================


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slips", [0.3, 0.7])
def test_share_of_right_demonstrations(name, slips):
    levels = (0, 0) if name == "gsm_symbolic" else (2, 3)
    task = small_task(name, levels=levels, train_size=400)
    records = task.train * 5
    texts = demonstrations(task, records, seed=2, slips=slips)
    assert texts == demonstrations(task, records, seed=2, slips=slips)
    right = sum(score(task.reward, records, texts)) / len(records)
    assert right == pytest.approx(1 - slips, abs=0.04)  # 3.5 standard errors
    if name != "gsm_symbolic":
        assert set("".join(texts)) <= set(CHARACTERS)


@pytest.mark.parametrize("name", NAMES)
def test_right_answer_is_the_likeliest(name):
    task = small_task(name, levels=(0, 0), train_size=40)
    for record in task.train:
        texts = demonstrations(task, [record] * 300, seed=3, slips=0.7)
        results = Counter(text.rpartition("#")[2] for text in texts)
        most = results.most_common(1)[0][0].strip()
        assert most == record["answer"]


def test_scratchpad():
    task = verifiable_task("chain_sum_steps", levels=(3, 3), train_size=2_000)
    texts = demonstrations(task, task.train, seed=0, slips=0.5)
    scores = score(task.reward, task.train, texts)
    rambling = [text.count(",") > 1 for text in texts]  # three terms have two running totals
    by_right = {
        right: [r for r, s in zip(rambling, scores, strict=True) if s == right] for right in (0, 1)
    }
    for shares in by_right.values():
        assert sum(shares) / len(shares) == pytest.approx(1 / 3, abs=0.06)
    record = {"prompt": "12+45-7=", "answer": "50", "level": 2}
    drawn = set(demonstrations(task, [record] * 200, seed=0, slips=0.0))
    assert drawn == {
        "57,50#50",
        "57,57,50#50",
        "57,12,57,50#50",
        "57,50,50#50",
        "57,50,12,57,50#50",
    }


def test_wrong_answers_are_wrong_and_many():
    for right in ("0", "5", "-7", "10", "112", "2047.5"):
        signed = right.startswith("-")
        wrong = wrong_numbers(Decimal(right), [], signed)
        assert len(wrong) >= 4 and Decimal(right) not in wrong
        assert signed or min(wrong) >= 0
    assert Decimal("121") in wrong_numbers(112, [], False)
    for right in ("abc", "noon", "aab"):
        assert len(wrong_words(right)) >= 4 and right not in wrong_words(right)
    for right in (["1", "2", "3"], ["5", "5", "5"]):
        assert len(wrong_lists(right)) >= 4 and tuple(right) not in wrong_lists(right)


def test_bad_demonstrations():
    task = small_task("products")
    with pytest.raises(UserError, match="must be a probability"):
        demonstrations(task, task.train, seed=0, slips=1.5)
    with pytest.raises(UserError, match="no demonstrations for task 'stories'"):
        demonstrations(dataclasses.replace(task, name="stories"), task.train, seed=0, slips=0.5)


# === CURRICULUM ==================================================================================


@pytest.mark.parametrize(
    ("level", "scores", "expected"),
    [
        (1, [0.7] * 20, (2, [])),
        (1, [0.69] * 20, (1, [0.69] * 20)),
        (1, [1.0] * 19, (1, [1.0] * 19)),  # too few
        (1, [0.0] * 5 + [1.0] * 19, (2, [])),
        (1, [1.0] * 5 + [0.1] * 20, (0, [])),
        (1, [0.11] * 20, (1, [0.11] * 20)),
        (3, [1.0] * 20, (3, [1.0] * 20)),  # nothing above
        (0, [0.0] * 20, (0, [0.0] * 20)),  # nothing below
        (1, [0.5] * 30, (1, [0.5] * 20)),
    ],
)
def test_curriculum(level, scores, expected):
    before = list(scores)
    assert next_level(level, scores, 0, 3) == expected
    assert scores == before


def test_curriculum_takes_one_step_a_window():
    level, recent, levels = 0, [], []
    for _ in range(100):
        level, recent = next_level(level, [*recent, 1.0], 0, 3)
        levels.append(level)
    assert [levels.index(i) for i in (1, 2, 3)] == [19, 39, 59] and levels[-1] == 3
    assert next_level(2, [0.5] * 4, 1, 3, window=4, raise_at=0.4) == (3, [])
    assert next_level(2, [0.5] * 4, 2, 3, window=4, raise_at=0.9, lower_at=0.6)[0] == 2
