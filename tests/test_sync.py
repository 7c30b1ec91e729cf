"""benchmark/sync.py: copies one block over the others, and finds those that differ."""

import subprocess
import sys

import pytest

from benchmark.sync import blocks, copy_block, differing, diverges
from rlhf import UserError
from tests.launch import ROOT

FIRST = '''"""One."""

import functools


def before():
    return 1


@functools.cache
def shared(x):
    """Says."""
    # why
    return x + 1


class Own:
    pass
'''
SECOND = '''"""Two."""


def shared(x):
    return x


AFTER = 2  # stays
'''
THIRD = '''"""Three."""


def shared(x):
    # diverges: another sign
    return -x
'''


@pytest.fixture
def folder(tmp_path):
    for name, text in (("first", FIRST), ("second", SECOND), ("third", THIRD)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_copy(folder, capsys):
    assert copy_block("shared", folder / "first.py") == [folder / "second.py"]
    assert (folder / "first.py").read_text() == FIRST
    assert (folder / "third.py").read_text() == THIRD
    assert "another sign" in capsys.readouterr().out
    block = FIRST[FIRST.index("@functools") : FIRST.index("\n\nclass")]
    old = SECOND[SECOND.index("def") : SECOND.index("\n\nAFTER")]
    assert (folder / "second.py").read_text() == SECOND.replace(old, block)
    assert copy_block("shared", folder / "first.py") == []


def test_force(folder):
    changed = copy_block("shared", folder / "first.py", force=True)
    assert changed == [folder / "second.py", folder / "third.py"]
    assert not differing(folder) and "diverges" not in (folder / "third.py").read_text()


def test_refusals(folder):
    with pytest.raises(UserError, match="diverges: another sign"):
        copy_block("shared", folder / "third.py")
    with pytest.raises(UserError, match="no function or class nothing"):
        copy_block("nothing", folder / "first.py")
    (folder / "fourth.py").write_text("def broken(:\n")
    with pytest.raises(UserError, match="fourth"):
        copy_block("shared", folder / "first.py")
    assert (folder / "second.py").read_text() == SECOND


def test_differing(folder):
    found = differing(folder)
    assert list(found) == ["shared"]
    assert [[path.stem for path in group] for group in found["shared"]] == [["first"], ["second"]]
    copy_block("shared", folder / "first.py")
    assert not differing(folder)
    text = (folder / "second.py").read_text()
    (folder / "second.py").write_text(text.replace("# why", "# because"))
    assert not differing(folder), "comments are not compared"
    (folder / "second.py").write_text(text.replace("Says.", "Says otherwise."))
    assert differing(folder), "docstrings are"


def test_diverges_is_the_first_comment(folder):
    node = blocks(folder / "third.py")["shared"]
    assert diverges(folder / "third.py", node) == "another sign"
    (folder / "third.py").write_text(
        "def f():\n    # why\n    # diverges: too late\n    return 1\n"
    )
    assert diverges(folder / "third.py", blocks(folder / "third.py")["f"]) is None


def test_command_line(folder):
    def command(*flags):
        words = [sys.executable, "-m", "benchmark", "sync", *map(str, flags)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    done = command("--check", "--folder", folder)
    assert done.returncode == 1 and "shared: first / second" in done.stdout
    done = command("shared", "--from", folder / "first.py")
    assert done.returncode == 0 and "second.py" in done.stdout, done.stderr
    assert command("--check", "--folder", folder).returncode == 0
    done = command("shared")
    assert done.returncode == 1 and done.stderr.startswith("error: sync needs")
