"""The house rules of design.md, sections 1 and 2: layout, docstrings, copies, flags, style."""

import ast
import errno
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import envs
import rlhf
from benchmark.gpu_check import FLAGS
from benchmark.papers import load, names
from benchmark.sync import blocks, differing, diverges
from tests.launch import ROOT, SCRIPTS

SECTIONS = "ARGS NETWORKS LOSSES DATA ROLLOUT EVALUATE CHECKPOINT TRAIN".split()
ROOTS = "ppo sac_continuous_action behavior_cloning independent_q_learning ppo_rlhf_fsdp".split()
PACKAGES = {"algos", "rlhf", "envs", "benchmark", "tests"}
MAY_IMPORT = {
    "algos": {"envs", "rlhf"},
    "rlhf": {"rlhf"},
    "envs": {"envs"},
    "benchmark": {"benchmark", "rlhf", "envs"},
}
EVERYWHERE = "seed device compile run_dir save_every resume eval_every track".split()
WITH_ENVIRONMENTS = "env_id total_timesteps eval_episodes capture_video".split()
SAME_DEFAULT = (
    "seed device compile run_dir save_every resume eval_every capture_video track".split()
)
SAME_HELP = [*SAME_DEFAULT, "env_id", "total_timesteps", "eval_episodes"]

every_script = pytest.mark.parametrize("script", SCRIPTS)


def path_of(script):
    return ROOT / "algos" / f"{script}.py"


def source(script):
    return path_of(script).read_text()


def tree(script):
    return ast.parse(source(script))


def docstring(script):
    return ast.get_docstring(tree(script)) or ""


def top_level(script):
    return blocks(path_of(script))


def python_files():
    return sorted(path for name in (*MAY_IMPORT, "tests") for path in (ROOT / name).rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def args_fields(script):
    """{name: (type, default, help)} of the Args of a script."""
    fields, body = {}, top_level(script)["Args"].body
    for node, following in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign):
            text = following.value if isinstance(following, ast.Expr) else None
            text = text.value if isinstance(text, ast.Constant) else None
            default = ast.unparse(node.value) if node.value else None
            fields[node.target.id] = (ast.unparse(node.annotation), default, text)
    return fields


# A SCRIPT, TOP TO BOTTOM =========================================================================


@every_script
def test_sections(script):
    lines = source(script).splitlines()
    markers = [line for line in lines if re.match(r"# .*=====", line)]
    words = [line.split()[1] for line in markers]
    for line, word in zip(markers, words, strict=True):
        assert line == f"# {word} ".ljust(99, "="), f"not padded to one column: {line}"
    assert words == [word for word in SECTIONS if word in words], words
    assert {"ARGS", "LOSSES", "CHECKPOINT", "TRAIN"} <= set(words)


@every_script
def test_docstring(script):
    text = docstring(script)
    lines = text.splitlines()
    assert 20 <= len(lines) <= 45, f"the front page has {len(lines)} lines"
    assert re.search(r"^Papers?: .+", text, re.M)
    assert re.search(r"\barXiv \d{4}\.\d{4,5}", text)
    assert f"python algos/{script}.py" in text
    assert re.search(rf"torchrun .*algos/{script}\.py", text)
    assert re.search(r"^Run: ", text, re.M)
    assert re.search(r"^Differs from the paper: ", text, re.M)
    assert re.search(r"^Differs from the authors' code: ", text, re.M)
    assert re.search(r"^Shapes: ", text, re.M)
    parent = re.search(r"^Parent: algos/(\w+)\.py$", text, re.M)
    if script in ROOTS:
        assert not parent, "a root has no parent"
    else:
        assert parent, "no line `Parent: algos/<script>.py`"
        assert parent[1] in SCRIPTS and parent[1] != script


@every_script
def test_equations_exist(script):
    """Every number that the code names stands in the docstring of the script or of a parent."""
    known, page = set(), docstring(script)
    while True:
        known |= {int(n) for n in re.findall(r"\s\((\d+)\)$", page, re.M)}
        parent = re.search(r"^Parent: algos/(\w+)\.py$", page, re.M)
        if not parent:
            break
        page = docstring(parent[1])
    own = {int(n) for n in re.findall(r"\s\((\d+)\)$", docstring(script), re.M)}
    # what the whole file says after its docstring: comments, help texts, docstrings
    body = source(script).replace(docstring(script), "")
    named = set()
    for words in re.findall(r"\beqs?\. ((?:\(\d+\)(?:, | and | to )?)+)", body, re.I):
        numbers = [int(n) for n in re.findall(r"\((\d+)\)", words)]
        named |= set(range(numbers[0], numbers[-1] + 1) if " to " in words else numbers)
    assert named <= known, f"eqs. {sorted(named - known)} are not in the docstring"
    assert own <= named, f"eqs. {sorted(own - named)} of the docstring are nowhere in the code"


@every_script
def test_length(script):
    lines = source(script).splitlines()
    assert len(lines) <= 800, f"{len(lines)} lines"
    main = top_level(script)["main"]
    assert main.end_lineno - main.lineno + 1 <= 150


@every_script
def test_last_lines(script):
    last = tree(script).body[-1]
    assert ast.unparse(last).startswith("if __name__ == '__main__':")
    assert ast.unparse(last).endswith("main(tyro.cli(Args))")


@every_script
def test_no_parents_but_two(script):
    """No base classes: nn.Module and gym.Wrapper are the only ones."""
    for name, node in top_level(script).items():
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert bases <= {"nn.Module", "gym.Wrapper"}, f"{name} inherits from {bases}"


@every_script
def test_no_mutable_globals(script):
    for node in ast.walk(tree(script)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"
    for node in tree(script).body:
        if isinstance(node, ast.Assign):
            names = [ast.unparse(target) for target in node.targets]
            assert all(name.isupper() for name in names), f"{names}: not a constant"


@every_script
def test_benchmark_file(script):
    """Some benchmark/papers/*.toml runs the script; a file that does not load is an error here."""
    runs = [run for name in names() for run in load(name).runs]
    assert any(run.script == script for run in runs), (
        f"no run in benchmark/papers/*.toml has script = {script!r}: say how its claims are tested"
    )


# ARGS ============================================================================================


@every_script
def test_args_are_documented(script):
    fields = args_fields(script)
    bare = [name for name, (_, _, text) in fields.items() if not text]
    assert not bare, f"no docstring under {bare}"
    assert not [name for name, (_, default, _) in fields.items() if default is None]
    needed = EVERYWHERE + ([] if script.endswith("_fsdp") else WITH_ENVIRONMENTS)
    missing = [name for name in needed if name not in fields]
    assert not missing, f"flags that every script of its kind has: {missing}"


@every_script
def test_denormals_are_flushed_before_anything_else(script):
    """A thread of torch takes this over from the one that starts it, so later is too late."""
    main = next(f for f in tree(script).body if getattr(f, "name", "") == "main")
    assert ast.unparse(main.body[0]) == "torch.set_flush_denormal(True)"


@pytest.mark.parametrize("flag", SAME_HELP)
def test_common_flags(flag):
    found = {name: args_fields(name)[flag] for name in SCRIPTS if flag in args_fields(name)}
    types = {kind for kind, _, _ in found.values()}
    assert len(types) <= 1, f"--{flag} has types {types}"
    texts = {name: text for name, (_, _, text) in found.items()}
    assert len(set(texts.values())) <= 1, f"--{flag} has several help texts: {texts}"
    if flag in SAME_DEFAULT:
        defaults = {name: default for name, (_, default, _) in found.items()}
        assert len(set(defaults.values())) <= 1, f"--{flag} has several defaults: {defaults}"


@every_script
def test_flags_are_read(script):
    """A field that nothing reads is a flag that does nothing; rlhf/ gets the Args of a script."""
    bodies = [source(script), *(path.read_text() for path in (ROOT / "rlhf").glob("*.py"))]
    for name in args_fields(script):
        read = re.compile(rf"\b(args|self)\.{name}\b")
        assert any(read.search(body) for body in bodies), f"--{name} is never read"


# IMPORTS AND COPIES ==============================================================================


def imported(path):
    """The first components of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_direction_of_imports(package):
    siblings = (
        {path.stem for path in (ROOT / "algos").glob("*.py")} if package == "algos" else set()
    )
    for path in sorted((ROOT / package).rglob("*.py")):
        names = imported(path)
        wrong = (names & PACKAGES) - MAY_IMPORT[package]
        assert not wrong, f"{relative(path)} imports {wrong}"
        assert not names & siblings, f"{relative(path)} imports another script"


def test_copied_blocks_are_identical():
    found = {
        name: [[path.stem for path in group] for group in groups]
        for name, groups in differing(ROOT / "algos").items()
    }
    assert not found, (
        f"copies differ: {found}; copy one over the others with `python -m benchmark sync NAME "
        f"--from algos/x.py`, or say why in a first comment `# diverges: <reason>`"
    )


def test_divergence_is_real():
    """`# diverges:` where nothing differs, or where there is nothing to differ from, is stale."""
    for script in SCRIPTS:
        for name, node in top_level(script).items():
            if diverges(path_of(script), node):
                others = [top_level(s).get(name) for s in SCRIPTS if s != script]
                assert any(others), f"{script}.{name}: no other script has it"
                same = [other for other in others if other and ast.dump(node) == ast.dump(other)]
                assert not same or len(same) < len([other for other in others if other])


# STYLE ===========================================================================================


def test_ascii():
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert line.isascii(), f"{relative(path)}:{number}: {line}"


@every_script
def test_docs_page(script):
    page = ROOT / "docs" / "algos" / f"{script}.md"
    assert page.exists(), f"write docs/algos/{script}.md"
    assert f"algos/{script}.py" in page.read_text()


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    ruff = shutil.which("ruff", path=f"{sys.prefix}/bin") or shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@every_script
def test_gpu_check_has_flags(script):
    assert Path(script).stem in FLAGS


@pytest.mark.parametrize("package", [envs, rlhf], ids=["envs", "rlhf"])
def test_what_the_machine_lacks_is_one_line(package, capsys):
    """A full disk, and no compiler for --compile; anything else keeps its traceback."""
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device"), "--resume auto goes on"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler\nfound"), "install g++"),
    ):
        package.report_user_error(type(error), error, None)
        shown = capsys.readouterr().err
        assert words in shown and shown.count("\n") == 1
    package.report_user_error(RuntimeError, RuntimeError("other"), None)
    assert "RuntimeError: other" in capsys.readouterr().err
