"""Tasks: the gold reward by hand, the story world, records, reward functions, token ids."""

import contextlib
import json
import random
import signal
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf import UserError, tasks
from rlhf.tasks import (
    PREFERENCE_FIELDS,
    answer_after_hashes,
    completion_ids,
    label_pairs,
    load_prompts,
    load_records,
    load_reward,
    load_task,
    number_after_hashes,
    pad_token_id,
    preference_probability,
    prompt_ids,
    score,
    score_together,
    story_gold,
    story_prompts,
    story_terms,
    write_stories,
)

PROMPT = "mira the baker takes her net to the harbour at dawn ."
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"

# === STORIES =====================================================================================

WORST = {"hero": -1, "place": 0, "mood": 0, "closing": -1, "grammar": -1}
BEST = "mira seeks a red letter . the sea is calm . at last she finds it ."


@pytest.mark.parametrize(
    ("story", "changed"),
    [
        (BEST, {}),
        # hero: by name or by the right pronoun +1, anybody else -1
        (BEST.replace("mira", "she"), {}),
        (BEST.replace("mira", "he"), {"hero": -1}),
        (BEST.replace("mira", "anna"), {"hero": -1}),
        # place: only the first that belongs anywhere counts
        (BEST.replace("sea", "street"), {"place": -1}),
        (BEST.replace("sea", "wind"), {"place": 0}),
        (BEST.replace("sea", "pond"), {}),
        (BEST.replace("calm .", "calm . the crowd is warm ."), {}),
        (BEST.replace("mira", "she").replace("letter", "letter near the market"), {"place": -1}),
        # mood: distinct words, per middle sentence, saturating
        (BEST.replace("calm", "cold"), {"mood": -1}),
        (BEST.replace("calm", "calm and cold"), {"mood": 0}),
        (BEST.replace("calm", "calm and warm"), {}),
        (BEST.replace("calm .", "calm . the day is calm ."), {"mood": 0.5}),
        (BEST.replace("calm .", "calm . the day is warm ."), {}),
        (BEST.replace("calm .", "calm . a kind king robs mira ."), {"mood": 0.5}),
        # closing: the end fulfils what the beginning opened
        (BEST.replace("finds", "loses"), {"closing": -1}),
        (BEST.replace("seeks", "passes"), {"closing": -1}),
        (BEST.replace("seeks", "needs").replace("finds", "keeps"), {}),
        # grammar: share of ill-formed sentences; what they say does not count
        (BEST.replace("sea is calm", "is sea calm"), {"grammar": -1 / 3, "mood": 0, "place": 0}),
        (BEST.removesuffix(" ."), {"grammar": -1 / 3, "closing": -1}),
        (BEST.replace("calm .", "calm . the sea is calm ."), {"grammar": -1 / 4}),
        ("mira seeks a red letter .", {"place": 0, "mood": 0, "closing": -1}),
        ("", WORST),
        ("calm calm letter mira . . .", WORST),
    ],
)
def test_terms_by_hand(story, changed):
    best = {"hero": 1, "place": 1, "mood": 1, "closing": 1, "grammar": 0}
    assert story_terms(PROMPT, story) == pytest.approx(best | changed)


def test_gold_is_the_scaled_sum():
    raw = 1 * 1 + 0.5 * 1 + 1 * 1 + 1 * 1
    assert story_gold([PROMPT], [BEST])[0] == pytest.approx(
        (raw - tasks.GOLD_MEAN) / tasks.GOLD_STD
    )
    worst = story_gold([PROMPT], ["."])[0]
    assert worst == pytest.approx((-1 - 1 - 3 - tasks.GOLD_MEAN) / tasks.GOLD_STD)


def test_gold_is_bounded_and_blind_to_length():
    rng = random.Random(0)
    words = tasks.story_vocabulary()
    salads = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(300)]
    gold = story_gold([PROMPT] * 300, salads)
    low, high = ((x - tasks.GOLD_MEAN) / tasks.GOLD_STD for x in (-6.5, 3.5))
    assert all(low <= g <= high for g in gold)
    assert max(gold) < 0 < story_gold([PROMPT], [BEST])[0]
    more = " the day is warm . the sky is soft . the air is sweet ."
    assert story_gold([PROMPT], [BEST.replace(" calm .", " calm ." + more)]) == story_gold(
        [PROMPT], [BEST]
    )


@pytest.mark.parametrize("response_tokens", [24, 64, 96])
def test_stories_fit_and_are_grammatical(response_tokens):
    prompts = story_prompts()[0][:500]
    stories = write_stories(prompts, response_tokens, seed=3)
    assert stories == write_stories(prompts, response_tokens, seed=3)
    assert stories != write_stories(prompts, response_tokens, seed=4)
    lengths = [len(story.split()) + 1 for story in stories]  # and the end of text
    assert max(lengths) <= response_tokens and statistics.mean(lengths) > 0.75 * response_tokens
    terms = [story_terms(p, s) for p, s in zip(prompts, stories, strict=True)]
    assert all(t["grammar"] == 0 for t in terms)
    for name in ("hero", "place", "mood", "closing"):
        assert -0.7 < statistics.mean(t[name] for t in terms) < 0.7  # room in both directions


def test_careful_writer_makes_no_slip():
    prompts = story_prompts()[0][:200]
    stories = write_stories(prompts, 24, seed=3, slips=0.0)
    terms = [story_terms(p, s) for p, s in zip(prompts, stories, strict=True)]
    assert min(t["hero"] for t in terms) == 1 == min(t["closing"] for t in terms)
    assert min(t["place"] for t in terms) == 0


def test_splits_are_disjoint():
    train, test = story_prompts()
    assert len(set(train) | set(test)) == len(train) + len(test)
    task = load_task("stories")
    assert [r["prompt"] for r in task.test] == list(test)
    assert task.reward is None and task.gold is story_gold
    assert load_task("stories-gold", 64).reward is story_gold


def test_a_word_has_one_class_and_sentences_parse_as_what_they_are():
    words = [w for group in tasks.CLASSES.values() for w in group]
    fixed = {w for k in tasks.ROLE_OF for w in k} - set(tasks.CLASSES)
    assert len(words) == len(set(words)) and not fixed & set(words)
    assert len(tasks.ROLE_OF) == sum(map(len, tasks.PATTERNS.values()))


def test_label_frequency_is_bradley_terry():
    for difference in (-1.0, -0.2, 0.0, 0.5, 1.3):
        labels = label_pairs([difference] * 20_000, [0.0] * 20_000, seed=5)
        expected = torch.sigmoid(torch.tensor(tasks.PREFERENCE_SHARPNESS * difference)).item()
        assert preference_probability(difference, 0.0) == pytest.approx(expected)
        assert statistics.mean(labels) == pytest.approx(expected, abs=0.015)  # 4 standard errors


@pytest.mark.parametrize(("name", "tokens"), [("storys", 24), ("stories", 12)])
def test_bad_task(name, tokens):
    with pytest.raises(UserError, match=r"unknown task|>= 20"):
        load_task(name, tokens)


# === RECORDS =====================================================================================


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_file_folder_and_mapping(tmp_path):
    file = write_lines(
        tmp_path / "train.jsonl",
        {"question": "1 + 1", "answer": "2"},
        "",
        {"question": "x", "answer": "y"},
    )
    expected = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "x", "answer": "y"}]
    assert load_records(file, prompt_field="question") == expected
    assert load_records(tmp_path, prompt_field="question", limit=1) == expected[:1]
    filled = load_records(file, prompt_template="Question: {question}\nAnswer:")
    assert filled[0]["prompt"] == "Question: 1 + 1\nAnswer:" and filled[0]["answer"] == "2"


def test_local_files_do_not_need_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # its import now fails
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "p"})
    assert load_records(file) == [{"prompt": "p"}]
    with pytest.raises(UserError, match="pip install datasets"):
        load_records("some/name")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": '], {}, r"d\.jsonl:2: not valid JSON"),
        ([{"prompt": "a"}, "[1]"], {}, r"d\.jsonl:2: each line must be a JSON object"),
        ([{"text": "a"}], {}, r"d\.jsonl:1: no field 'prompt' \(it has: text\)"),
        ([{"text": "a"}], {"prompt_field": "question"}, "no field 'question'"),
        ([{"prompt": "a", "chosen": "b"}], {"required": PREFERENCE_FIELDS}, "no field 'rejected'"),
        ([{"q": "a"}], {"prompt_template": "{x}"}, "asks for 'x'"),
        ([{"q": "a"}], {"prompt_template": "{x"}, "malformed"),
        ([{"prompt": ""}], {}, "must be a non-empty string"),
        ([{"prompt": [{"text": "a"}]}], {}, "chat messages"),
        ([], {}, "no records"),
    ],
)
def test_bad_records(tmp_path, rows, options, message):
    file = write_lines(tmp_path / "d.jsonl", *rows)
    with pytest.raises(UserError, match=message) as caught:
        load_records(file, **options)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_records(tmp_path / "gone.jsonl")
    write_lines(tmp_path / "train.jsonl", {"prompt": "a"})
    with pytest.raises(UserError, match=r"has no test.jsonl \(it has train.jsonl\)"):
        load_records(tmp_path, "test")


def test_hugging_face_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    rows.to_json(tmp_path / "train.jsonl")
    assert load_records(tmp_path) == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    assert load_records(tmp_path / "hub", limit=1) == [{"prompt": "a", "n": 1}]
    with pytest.raises(UserError, match="split 'test'"):
        load_records(tmp_path / "hub", "test")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real GSM8K is not at ../shared/data/gsm8k")
def test_real_gsm8k():
    records = load_records(GSM8K, "test", prompt_template="Question: {question}\nAnswer:")
    assert len(records) == 1319 and records[0]["prompt"].startswith("Question: Janet")
    answers = [r["answer"] for r in records]
    assert score(answer_after_hashes, records, answers) == [1.0] * len(records)
    assert sum(score(answer_after_hashes, records, answers[1:] + answers[:1])) < 50


# === REWARDS =====================================================================================


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 18", 18),
        ("####18.", 18),
        ("#### $1,234,567", 1234567),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### - 5", -5),
        ("#### +3", 3),
        ("#### 2.50 dollars", 2.5),
        ("#### 18.\n", 18),
        ("#### .5", 0.5),
        ("#### 70,", 70),
        ("#### 18 #### 19", 18),
        ("#### eighteen", None),
        ("#### --5", None),
        ("18", None),
        ("", None),
    ],
)
def test_number_after_hashes(text, number):
    found = number_after_hashes(text)
    assert found is None if number is None else float(found) == number


def test_answer_reward():
    truth = ["6 * 3\n#### 18", "18", "#### 1,000"]
    assert answer_after_hashes(["p"] * 3, ["#### 18.0"] * 3, truth) == [1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="holds no number"):
        score(answer_after_hashes, [{"prompt": "p", "answer": "none"}], ["#### 1"])


def test_load_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_a.py").write_text(
        "def length(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "broken_b.py").write_text("import no_such_module_c\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("rlhf.tasks:answer_after_hashes") is answer_after_hashes
    for spec in (
        "my_rewards_a:length",
        "my_rewards_a.py:length",
        f"{tmp_path}/my_rewards_a.py:length",
    ):
        assert score(load_reward(spec), [{"prompt": "p"}], ["abc"]) == [3.0]
    for spec, message in (
        ("length", "write module:function"),
        ("no_such_module_d:f", "ModuleNotFoundError"),
        ("gone.py:f", "no such file"),
        ("broken_b:f", "no_such_module_c"),
        ("my_rewards_a:lenght", r"no function 'lenght' \(it has: length\)"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)


def test_columns_reach_the_reward():
    records = [{"prompt": "p", "answer": 1, "other": 2}, {"prompt": "q", "answer": 3}]
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns)
        return torch.tensor([1.0, 2.0])

    assert score(everything, records, ["a", "b"]) == [1.0, 2.0]
    assert seen == {"answer": [1, 3], "other": [2, None]}
    assert score(lambda prompts, completions, answer: answer, records, ["a", "b"]) == [1.0, 3.0]
    with pytest.raises(UserError, match="asks for column 'gone'"):
        score(lambda prompts, completions, gone: gone, records, ["a", "b"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, float("nan")], "returned nan for the prompt 'the second prompt'"),
        ([1.0, float("-inf")], "returned -inf for the prompt 'the second prompt'"),
        ([1.0, None], "None instead of a number for the prompt 'the second prompt'"),
        ([1.0], "returned 1 numbers for 2 completions"),
        (1.0, "must return a list of numbers, not float"),
        ("12", "must return a list of numbers, not str"),
        (torch.ones(2, 1), "instead of a number"),
    ],
)
def test_bad_rewards_name_the_prompt(returned, message):
    records = [{"prompt": "the first prompt"}, {"prompt": "the second\nprompt"}]
    if isinstance(returned, torch.Tensor):
        returned = [[1.0], [1.0]]
    with pytest.raises(UserError, match=message) as caught:
        score(lambda prompts, completions: returned, records, ["a", "b"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError("of the device"), UserError("of the device")])
def test_failing_reward_model_ends_its_process_at_once(error):
    """The other processes are inside the same forward: there is nobody to agree with."""

    def reward(prompts, completions):
        raise error

    reward.collective = True
    with pytest.raises(RuntimeError, match=r"the reward model failed: .*of the device"):
        score_together(reward, [{"prompt": "p"}], ["c"])


def test_failing_reward_names_its_line(tmp_path):
    file = tmp_path / "failing_e.py"
    file.write_text("import json\n\n\ndef f(prompts, completions):\n    return [json.loads('{')]\n")
    with pytest.raises(
        UserError, match=r"raised JSONDecodeError: .* at .*failing_e\.py:5"
    ) as caught:
        score(load_reward(f"{file}:f"), [{"prompt": "p"}], ["a"])
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def sleeps(prompts, completions):
    time.sleep(30)
    return [0.0]


def catches_exceptions(prompts, completions):
    for _ in range(30):
        with contextlib.suppress(Exception):
            time.sleep(1)
    return [0.0]


def catches_everything(prompts, completions):
    with contextlib.suppress(BaseException):
        time.sleep(30)
    return [0.0]


def is_busy(prompts, completions):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        pass
    return [0.0]


def raises_to_the_power(prompts, completions):
    return [float(len(str(9**9**9)))]


@pytest.mark.parametrize(
    "reward", [sleeps, catches_exceptions, catches_everything, is_busy, raises_to_the_power]
)
@pytest.mark.parametrize("call", [score, score_together])
def test_reward_out_of_time(reward, call):
    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    message = rf"{reward.__name__} took longer than 0.2 seconds .*\(--reward-timeout\)"
    with pytest.raises(UserError, match=message) as caught:
        call(reward, [{"prompt": "p"}], ["a"], timeout=0.2)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 3
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_alarms_of_others_ring_later():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        with pytest.raises(UserError, match="took longer"):
            score(sleeps, [{"prompt": "p"}], ["a"], timeout=0.2)
        assert score(lambda prompts, completions: [1.0], [{"prompt": "p"}], ["a"], 5) == [1.0]
        assert not rung and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.4
        time.sleep(0.7)
        assert len(rung) == 1 and 0.55 < rung[0] - started < 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_time_limit_leaves_the_rest_alone():
    records = [{"prompt": "p"}]

    def fails(prompts, completions):
        raise ValueError("no")

    with pytest.raises(UserError, match=r"raised ValueError: no at .*test_tasks\.py:"):
        score(fails, records, ["a"], timeout=5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="cannot have"):
            score(fails, records, ["a"], timeout=timeout)
    # A thread other than the main one gets no alarm, and no limit.
    scores = []
    slow = threading.Thread(
        target=lambda: scores.extend(
            score(lambda prompts, completions: time.sleep(0.2) or [1.0], records, ["a"], 0.1)
        )
    )
    slow.start()
    slow.join()
    assert scores == [1.0]


# === TOKEN IDS ===================================================================================


class LetterTokenizer:
    """Letters as ids, with the habits of real tokenizers that matter here."""

    bos_token_id, eos_token_id, chat_template = 1, 2, None

    def __init__(self, pad=None, closes=False):
        self.pad_token_id, self.closes = pad, closes

    def __len__(self):
        return 200

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids, *[2] * self.closes] if add_special_tokens else ids}


def test_prompt_and_completion_ids():
    assert prompt_ids(LetterTokenizer(), "ab") == [1, 97, 98]
    assert prompt_ids(LetterTokenizer(closes=True), "ab") == [1, 97, 98]
    assert completion_ids(LetterTokenizer(closes=True), "ab") == [97, 98, 2]
    assert completion_ids(LetterTokenizer(), "ab", eos=False) == [97, 98]
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(LetterTokenizer(), [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(("pad", "expected"), [(None, 0), (2, 0), (5, 5), (200, 0)])
def test_pad_is_never_eos(pad, expected):
    tokenizer = LetterTokenizer(pad)
    assert pad_token_id(tokenizer) == expected
    tokenizer.eos_token_id = 0
    assert pad_token_id(tokenizer) not in (0, 200)


def test_given_task_takes_the_place_of_data():
    records = [{"prompt": "ab", "answer": "1"}, {"prompt": "abcdefgh", "answer": "2"}]
    judges = [lambda prompts, completions: [0.0] * len(prompts) for _ in range(3)]
    task = tasks.Task("own", records, records, *judges)
    args = SimpleNamespace(
        data="gone.jsonl", reward=None, max_prompt_tokens=5, response_length=2, eval_prompts=5
    )
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=50))
    loaded = load_prompts(LetterTokenizer(), args, config, task)
    kept = [{"prompt": "ab", "answer": "1", "ids": [1, 97, 98]}]
    assert loaded == tasks.Task("own", kept, kept, *judges)
    assert "ids" not in records[0]
    args.reward = "rlhf.tasks:answer_after_hashes"
    assert load_prompts(LetterTokenizer(), args, config, task).reward is answer_after_hashes
    args.data = args.reward = None
    args.max_prompt_tokens, args.response_length = 100, 24
    config.get_text_config = lambda: SimpleNamespace()
    stories = load_prompts(LetterTokenizer(), args, config)
    assert stories.name == "stories" and stories.gold is story_gold and stories.reward is None
