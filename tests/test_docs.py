"""README and docs: links resolve, commands are ones that the programs know, metrics are explained.

That every script has a page is in test_house.py; line numbers of links are in test_links.py.
"""

import ast
import importlib
import itertools
import re
import shlex

import pytest
import tyro

from benchmark.links import pages
from rlhf.tasks import default_run_dir
from tests.launch import ROOT, SCRIPTS, run
from tests.test_contracts import smoke_flags

KEY = r"(?:charts|losses|eval)/[\w@]+"
LAUNCHERS = r"(?:python|torchrun)"

every_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


# LINKS ===========================================================================================


def headings(page):
    """Anchors of a page's headings, as GitHub and the site builders make them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        path = page.parent / path if path else page
        assert path.exists(), f"{target}: no such file"
        assert ROOT in path.resolve().parents, f"{target}: outside of the project"
        if path.suffix == ".md" and anchor:
            assert anchor in headings(path), f"{target}: no such heading"


def test_site_has_every_page():
    """A page that mkdocs.yml does not list is on no menu."""
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    found = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(found)


# COMMANDS ========================================================================================


def commands(text):
    """The shell commands of a page's code, as lists of words."""
    blocks = re.findall(r"^ *```(?:sh|bash)\n(.*?)^ *```", text, re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    inline = re.findall(rf"`((?:{LAUNCHERS}|make) [^`]+)`", prose)
    found = []
    for block in [*blocks, *inline]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;", line):
                words = shlex.split(part, comments=True)
                if words and re.fullmatch(rf"(?:\S*/)?(?:{LAUNCHERS}|make)", words[0]):
                    found.append(words)
    return found


def flags_of(fields, defaults):
    """{flag: whether a value follows} of dataclass fields or function arguments."""
    flags = {}
    for field, default in zip(fields, defaults, strict=True):
        name = (field.target.id if isinstance(field, ast.AnnAssign) else field.arg).replace(
            "_", "-"
        )
        switch = ast.unparse(field.annotation) == "bool"
        flags["--" + name] = not switch
        if switch and default and default.value:
            flags["--no-" + name] = False
    return flags


def script_flags(path):
    """Flags of the dataclass Args of a file."""
    body = ast.parse(path.read_text()).body
    [args] = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return flags_of(fields, [field.value for field in fields])


def function_flags(path, name):
    """Flags of a function that a command of the benchmark calls; positional ones included."""
    body = ast.parse(path.read_text()).body
    [function] = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    arguments = function.args.args
    missing = [None] * (len(arguments) - len(function.args.defaults))
    flags = flags_of(arguments, [*missing, *function.args.defaults])
    for argument in arguments:
        found = re.search(r"tyro\.conf\.arg\(name='([\w-]+)'", ast.unparse(argument.annotation))
        if found:
            flags["--" + found[1]] = True
    return flags


def check_flags(words, flags):
    while words:
        word, *words = words
        if not word.startswith("--") or word == "--help":
            continue  # or a positional argument, or the value of a flag
        name = word.partition("=")[0].replace("_", "-")
        assert name in flags, f"no flag {name}: {sorted(flags)}"
        if flags[name] and "=" not in word:
            assert words and not words[0].startswith("--"), f"{name} needs a value"


def check_command(words):
    """Raise AssertionError where a command of ours is one that cannot run."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        for word in words[1:]:
            assert "=" in word or word in targets, f"the Makefile has no {word}"
        return
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1] == "benchmark" and words[i + 2 :]:
            known = (ROOT / "benchmark" / "__main__.py").read_text()
            found = re.search(rf'"{words[i + 2]}": "(\w+)"', known)
            assert found, f"no command {words[i + 2]}"
            command, rest = found[1], words[i + 3 :]
            path = ROOT / "benchmark" / f"{command}.py"
            if rest:
                # speed ppo ... is its function ppo, sync NAME ... its function sync
                name = rest[0] if f"def {rest[0]}(" in path.read_text() else command
                check_flags(rest, function_flags(path, name))
            return
        if word == "-m" and words[i + 1].startswith(("rlhf.", "envs.")):
            path = ROOT / (words[i + 1].replace(".", "/") + ".py")
            assert path.exists(), f"no module {words[i + 1]}"
            return check_flags(words[i + 2 :], script_flags(path))
        if re.fullmatch(r"(?:\./)?algos/\w+\.py", word):
            assert (ROOT / word).exists(), f"no script {word}"
            return check_flags(words[i + 1 :], script_flags(ROOT / word))


@every_page
def test_commands_are_known(page):
    for words in commands(page.read_text()):
        try:
            check_command(words)
        except AssertionError as error:
            raise AssertionError(f"{' '.join(words)}\n{error}") from error


def start_in_order(texts, monkeypatch):
    """Raise AssertionError where a command for a language model finds the run of another one in its
    directory, or resumes one of another number of processes."""
    processes_of = {}
    for words in [words for text in texts for words in commands(text)]:
        paths = [word for word in words if re.fullmatch(r"algos/\w+_fsdp\.py", word)]
        if not paths or "--help" in words:
            continue
        counts = dict(itertools.pairwise(words[: words.index(paths[0])]))
        processes = int(counts.get("--nproc_per_node", 1)) * int(counts.get("--nnodes", 1))
        monkeypatch.setenv("WORLD_SIZE", str(processes))  # the batch must go into equal parts
        script = importlib.import_module(paths[0].removesuffix(".py").replace("/", "."))
        args = tyro.cli(script.Args, args=words[words.index(paths[0]) + 1 :])
        run_dir = str(args.run_dir or default_run_dir(args, paths[0]))
        if args.resume:  # auto starts a run where there is none
            known = processes_of.get(run_dir, processes)
            assert known == processes, f"that of {known} processes: {' '.join(words)}"
        else:
            assert run_dir not in processes_of, f"{run_dir} holds a run: {' '.join(words)}"
        processes_of[run_dir] = processes


@every_page
def test_commands_of_a_page_run_in_order(page, monkeypatch):
    start_in_order(re.findall(r"^```sh\n.*?^```", page.read_text(), re.M | re.S), monkeypatch)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith("_fsdp")])
def test_commands_of_a_docstring_run_in_order(script, monkeypatch):
    docstring = ast.get_docstring(ast.parse((ROOT / "algos" / f"{script}.py").read_text()))
    [runs] = re.findall(r"^Run: (.*?)\n\n", docstring, re.M | re.S)
    start_in_order([f"```sh\n{runs}\n```"], monkeypatch)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("python algos/x.py\npython algos/x.py --kl-coef 0", "holds a run: .*kl-coef"),
        ("torchrun --nproc_per_node 2 algos/x.py\npython algos/x.py --resume auto", "of 2 proc"),
    ],
)
def test_commands_that_cannot_follow_each_other_are_found(text, reason, monkeypatch):
    with pytest.raises(AssertionError, match=reason):
        start_in_order([f"```sh\n{text.replace('x.py', 'grpo_fsdp.py')}\n```"], monkeypatch)


@pytest.mark.parametrize(
    ("flags", "run_dir"),
    [
        ({}, "runs/number_sorting__grpo_fsdp__1"),
        ({"task": "countdown", "seed": 3}, "runs/countdown__grpo_fsdp__3"),
        ({"data": "a/prompts.jsonl"}, "runs/prompts__grpo_fsdp__1"),
        ({"data": "openai/gsm8k:main"}, "runs/gsm8k-main__grpo_fsdp__1"),
    ],
)
def test_run_directory_is_named_by_the_task(flags, run_dir):
    script = importlib.import_module("algos.grpo_fsdp")
    needed = {"model": "M", "reward": "m:f"} if "data" in flags else {}
    args = script.Args(**flags, **needed)
    assert str(default_run_dir(args, script.__file__)) == run_dir


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```sh\npython algos/ppo.py --env-idd x\n```\n", "no flag --env-idd"),
        ("```sh\npython algos/ppo.py \\\n  --seed\n```\n", "--seed needs a value"),
        ("run `torchrun algos/nothing.py`", "no script"),
        ("```sh\ncd x && python -m rlhf.sft --modell M\n```\n", "no flag --modell"),
        ("```sh\npython -m benchmark speeed\n```\n", "no command speeed"),
        ("```sh\npython -m benchmark speed ppo --cleanrll x\n```\n", "no flag --cleanrll"),
        ("```sh\nmake demmo\n```\n", "no demmo"),
    ],
)
def test_wrong_commands_are_found(text, reason):
    [words] = commands(text)
    with pytest.raises(AssertionError, match=reason):
        check_command(words)


# METRICS =========================================================================================


def explained(script):
    """The keys in the first column of the tables of a script's page."""
    text = (ROOT / "docs" / "algos" / f"{script}.md").read_text()
    return set(re.findall(rf"^\| `({KEY})` \| \S", text, re.M))


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_that_the_code_names_are_explained(script):
    tree = ast.parse((ROOT / "algos" / f"{script}.py").read_text())
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    named = {word for word in words if isinstance(word, str) and re.fullmatch(KEY, word)}
    named = {re.sub("@$", "@k", word) for word in named}  # f"name@{k}" is one of a family
    assert named, "no metric is named in this script"
    assert named <= explained(script), f"not on the page: {sorted(named - explained(script))}"


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS]
)
def test_logged_metrics_are_explained(script, tmp_path):
    """Most keys are put together at run time, so a short run says which there are."""
    run(script, 1, *smoke_flags(script, tmp_path / "run"))
    text = (tmp_path / "run" / "metrics.csv").read_text()
    logged = {re.sub(r"@\d+", "@k", key) for key in re.findall(rf",({KEY}),", text)}
    assert logged <= explained(script), f"not on the page: {sorted(logged - explained(script))}"
    gone = explained(script) - logged
    assert not gone, f"on the page, but no run logs it: {sorted(gone)}"
