"""benchmark/papers/*.toml: every file can be run as it stands, and a mistake in one is one line."""

import dataclasses
import importlib
import re

import gymnasium as gym
import pytest
import tyro

from benchmark.papers import SCALES, load, names
from rlhf import UserError
from tests.launch import ROOT

every_paper = pytest.mark.parametrize("name", names())

GOOD = """
[paper]
title = "A Paper"
authors = "Somebody"
year = 2026
link = "https://example.org"

[scales.smoke]
seeds = 2
about = "seconds"

[scales.laptop]
seeds = 3
about = "minutes"

[[runs]]
name = "new"
script = "ppo"
envs = ["CartPole-v1", "Acrobot-v1"]
args = "--device cpu"
smoke = "--total-timesteps 4096"
laptop = "--run-dir 'a b'"
metrics = ["charts/episodic_return", "charts/SPS"]

[[runs]]
name = "old"
script = "ppo"
envs = ["CartPole-v1"]
laptop = ""
metrics = ["charts/episodic_return"]

[[runs]]
name = "text"
script = "ppo_rlhf_fsdp"
smoke = ""
metrics = ["eval/kl"]
prepare = "rlhf.tiny_lm"

[[numbers]]
id = "cartpole"
method = "PPO"
env = "CartPole-v1"
metric = "return"
value = 490
spread = 6.12
source = "table 1"
read_in = "paper"

[[numbers]]
id = "acrobot"
method = "PPO"
env = "Acrobot-v1"
metric = "return"
value = -86.36
source = "table 1"
read_in = "code"

[[numbers]]
id = "rumour"
method = "PPO"
env = "CartPole-v1"
metric = "return"
value = 499.0
source = "nobody knows"
read_in = "unverified"

[[claims]]
id = "as-published"
statement = "PPO reaches the published return"
source = "table 1"
run = "new"
numbers = ["cartpole"]
envs = ["CartPole-v1"]
metric = "charts/episodic_return"
score = "last_100"
effect = "ratio"
statistic = "mean"
low = 0.95

[[claims]]
id = "new-beats-old"
statement = "New is better than old"
source = "figure 2"
run = "new"
baseline = "old"
envs = ["CartPole-v1"]
metric = "charts/episodic_return"
score = "at_step"
step = 4096
effect = "difference"
low = 0.0
high = 500.0

[[claims]]
id = "near-the-reference"
statement = "KL stays small"
source = "section 3"
run = "text"
metric = "eval/kl"
high = 6.0
"""


def read(folder, text):
    (folder / "toy.toml").write_text(text)
    return load("toy", folder=folder)


def test_good_file(tmp_path):
    paper = read(tmp_path, GOOD)
    assert [run.name for run in paper.runs] == ["new", "old", "text"]
    new = paper.run("new")
    assert new.flags("smoke") == "--device cpu --total-timesteps 4096".split()
    assert new.flags("laptop") == ["--device", "cpu", "--run-dir", "a b"]
    assert new.flags("paper") is None
    assert paper.run("old").flags("laptop") == [], "an empty string takes part, without flags"
    assert paper.run("old").flags("smoke") is None
    assert paper.number("cartpole").value == 490
    assert paper.number("acrobot").spread is None
    claim = paper.claim("as-published")
    assert (claim.low, claim.high, claim.baseline) == (0.95, None, None)
    assert paper.claim_envs(claim) == ["CartPole-v1"]
    last = paper.claim("near-the-reference")
    assert (last.score, last.effect, last.statistic) == ("last", "score", "iqm")
    assert paper.claim_envs(last) == [""]


def test_defaults_of_runs(tmp_path):
    text = GOOD.replace("[[runs]]", '[defaults]\nprepare = "x"\nsmoke = "--seed 5"\n\n[[runs]]', 1)
    paper = read(tmp_path, text)
    assert [run.prepare for run in paper.runs] == ["x", "x", "rlhf.tiny_lm"]
    assert paper.run("old").flags("smoke") == ["--seed", "5"]
    assert paper.run("text").flags("smoke") == [], "an own empty string stays"


def test_more_metrics_than_the_default(tmp_path):
    """They stay behind those of [defaults], and a claim may ask for them."""
    wanted = 'metrics = ["eval/kl"]'
    text = GOOD.replace(wanted, 'more_metrics = ["eval/kl"]')
    text = text.replace("[[runs]]", '[defaults]\nmetrics = ["charts/SPS"]\n\n[[runs]]', 1)
    assert read(tmp_path, text).run("text").keys == ["charts/SPS", "eval/kl"]


PICTURE = """
[[pictures]]
name = "sizes"
metric = "eval/x@*"
xlabel = "size"
about = "x over size"
"""
KEYS = 'metrics = ["eval/x@10", "eval/kl", "eval/x@2", "eval/x@random", "eval/xx@3"]'


def test_family_of_a_picture(tmp_path):
    """In the order of its numbers; other keys are no part of it."""
    paper = read(tmp_path, GOOD.replace('metrics = ["eval/kl"]', KEYS) + PICTURE)
    [picture] = paper.pictures
    assert list(picture.keys(paper.run("text")).items()) == [(2, "eval/x@2"), (10, "eval/x@10")]
    assert picture.keys(paper.run("new")) == {}


# What is changed in GOOD, and words of the one line that answers it.
BAD = {
    "typo": ('title = "A Paper"', 'title = "A Paper', "line 3"),
    "unknown default": ("[[runs]]", "[defaults]\nstep = 1\n[[runs]]", "runs 1 step: unknown key"),
    "no TOML at all": ("[paper]", "paper:", "line 2"),
    "unclosed flags": ("--run-dir 'a b'", "--run-dir 'a b", "run 'new', flags: No closing quot"),
    "unknown key": ("envs = [", "environments = [", "runs 1 environments: unknown key"),
    "unknown table": ("[[runs]]", "[extra]\n[[runs]]", "extra: unknown key"),
    "unknown scale": ("[scales.laptop]", "[scales.cluster]", "scales cluster"),
    "no source": ('source = "table 1"', "", "numbers 1 source: missing"),
    "no claim source": ('source = "figure 2"', "", "claims 2 source: missing"),
    "no paper": ("[paper]", "[papers]", "paper: missing"),
    "text for a number": ("value = 490", 'value = "490"', "numbers 1 value: "),
    "number for text": ('script = "ppo"', "script = 1", "runs 1 script: "),
    "half a seed": ("seeds = 3", "seeds = 3.5", "scales laptop seeds: "),
    "no seed": ("seeds = 3", "seeds = 0", "scales laptop seeds: "),
    "no metrics": ('metrics = ["eval/kl"]', "metrics = []", "runs 3 metrics: "),
    "where it was read": ('read_in = "paper"', 'read_in = "a dream"', "numbers 1 read_in: "),
    "name with a space": ('name = "old"', 'name = "old one"', "runs 2 name: "),
    "run": ('run = "text"', 'run = "txt"', "there is no run 'txt'; there is: new, old, text"),
    "baseline": ('baseline = "old"', 'baseline = "older"', "there is no run 'older'"),
    "number": ('["cartpole"]', '["carpole"]', "there is no number 'carpole'"),
    "metric": ('metric = "eval/kl"', 'metric = "eval/k"', "does not keep the metric 'eval/k'"),
    "environment": (
        'numbers = ["cartpole"]\nenvs = ["CartPole-v1"]',
        'numbers = ["cartpole"]\nenvs = ["CartPole-v0"]',
        "run 'new' has no environment 'CartPole-v0'",
    ),
    "environment of the baseline": (
        'baseline = "old"\nenvs = ["CartPole-v1"]',
        'baseline = "old"',
        "run 'old' has no environment 'Acrobot-v1'",
    ),
    "number of another environment": ('["cartpole"]', '["acrobot"]', "must be those of CartPole"),
    "too few numbers": (
        'numbers = ["cartpole"]\nenvs = ["CartPole-v1"]',
        'numbers = ["cartpole"]',
        "numbers must be those of CartPole-v1, Acrobot-v1, in this order",
    ),
    "unverified": ('["cartpole"]', '["rumour"]', "'rumour' is unverified"),
    "ratio to a negative": (
        'numbers = ["cartpole"]\nenvs = ["CartPole-v1"]',
        'numbers = ["acrobot"]\nenvs = ["Acrobot-v1"]',
        "'acrobot' is not positive",
    ),
    "run twice": ('name = "old"', 'name = "new"', "run 'new' is there twice"),
    "number twice": ('id = "acrobot"', 'id = "cartpole"', "number 'cartpole' is there twice"),
    "claim twice": ('"new-beats-old"', '"as-published"', "claim 'as-published' is there twice"),
    "script": ('"ppo_rlhf_fsdp"', '"ppo_rlhf"', "run 'text': there is no algos/ppo_rlhf.py"),
    "scale of a run": ('laptop = ""', 'paper = ""', "run 'old' has paper, but [scales] has not"),
    "low above high": ("low = 0.0", "low = 501.0", "claims 2: low 501.0 is above high 500.0"),
    "no bound": ("high = 6.0", "", "claims 3: give low, high or both"),
    "at_step without step": ("step = 4096", "", "claims 2: step belongs to"),
    "step without at_step": ('score = "at_step"', "", "claims 2: step belongs to"),
    "steps_to without share": (
        'score = "at_step"\nstep = 4096',
        'score = "steps_to"\nshare = 0.5',
        'claims 2: score = "steps_to", share and share_of belong',
    ),
    "share without steps_to": ("high = 6.0", "high = 6.0\nshare = 0.5", "claims 3: score = "),
    "share of nothing": (
        'score = "at_step"\nstep = 4096',
        'score = "steps_to"\nshare = 0.5\nshare_of = "charts/x"',
        "run 'new' does not keep the metric 'charts/x'",
    ),
    "ratio to an iqm": ('effect = "difference"', 'effect = "ratio"', "claims 2: a ratio is one to"),
    "nothing to compare with": ('baseline = "old"', "", "needs either baseline or numbers"),
    "compares and does not": ('effect = "ratio"', "", "compares with nothing"),
    "two comparisons": ('baseline = "old"', 'baseline = "old"\nnumbers = ["cartpole"]', "either"),
    "iqm of published": ('statistic = "mean"', "", "published values are means"),
    "picture of nothing": ("[paper]", f"{PICTURE}[paper]", "'sizes': no run keeps 'eval/x@*'"),
    "picture twice": ("[paper]", f"{PICTURE}{PICTURE}[paper]", "picture 'sizes' is there twice"),
    "two flaws": ("year = 2026\nlink", "yeer = 2026\nlinc", "(and "),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_mistakes_are_one_line(change, tmp_path):
    old, new, words = change
    assert old in GOOD, "the case no longer changes anything"
    with pytest.raises(UserError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert message.startswith("benchmark/papers/toy.toml: ")
    assert words in message
    assert "\n" not in message and "pydantic" not in message


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "toy.toml").write_bytes(b'[paper]\ntitle = "\xff"\n')
    with pytest.raises(UserError, match=r"benchmark/papers/toy\.toml"):
        load("toy", folder=tmp_path)


def test_no_such_paper(tmp_path):
    read(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"^there is no paper 'tony'; there is: toy$"):
        load("tony", folder=tmp_path)


# THE FILES OF THE REPOSITORY =====================================================================


@every_paper
def test_flags_are_accepted(name):
    """Every command line that a file stands for, read as the script reads it."""
    paper, tried = load(name), 0
    for run in paper.runs:
        args = importlib.import_module(f"algos.{run.script}").Args
        takes_env = "env_id" in {field.name for field in dataclasses.fields(args)}
        assert takes_env == bool(run.envs), f"{run.name}: envs and --env-id go together"
        for scale in SCALES:
            flags = run.flags(scale)
            for env in (run.envs or [""]) * (flags is not None):
                where = ["--env-id", env] * takes_env + ["--teacher", "run"] * bool(run.teacher)
                parsed = tyro.cli(args, args=[*flags, *where, "--seed", "2"])
                assert parsed.seed == 2 and getattr(parsed, "env_id", "") == env
                tried += 1
    assert tried >= len(paper.runs), "a run that is part of no scale"


@every_paper
def test_runs_exist(name):
    """Environments are known to gymnasium, metrics to the page of the script."""
    for run in load(name).runs:
        for env in run.envs:
            gym.spec(env)
        page = (ROOT / "docs" / "algos" / f"{run.script}.md").read_text()
        for key in (re.sub(r"@\d+", "@k", metric) for metric in run.keys):
            assert f"\n| `{key}` |" in page, f"{run.name} keeps {key}, unknown to {run.script}.md"
