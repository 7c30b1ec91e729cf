"""benchmark/links.py: line numbers of links to code, and those of all committed pages."""

import subprocess
import sys

import pytest

from benchmark.links import line_of, numbered, pages
from rlhf import UserError
from tests.launch import ROOT

CODE = '''"""A script."""


class Args:
    gae_lambda: float = 0.95
    """lambda"""


@decorated
def advantage(x):
    return x + 1


class Net:
    def forward(self, x):
        for pair in zip(x, x):
            print(pair[0])  # once
        return advantage(x)
'''


@pytest.fixture
def page(tmp_path):
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "x.py").write_text(CODE)
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs" / "x.md"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Args", 4),
        ("gae_lambda", 5),
        ("--gae-lambda", 5),
        ("advantage", 10),
        ("Net.forward", 15),
        ("return x + 1", 11),
        ("pair[0]", 17),
        ("# once", 17),
        ("forward", 15),
    ],
)
def test_line_of(name, line):
    assert line_of(name, CODE) == line


@pytest.mark.parametrize(("name", "count"), [("pair", 2), ("absent", 0), ("return", 2)])
def test_a_fragment_must_be_unique(name, count):
    with pytest.raises(UserError, match=f"{count} times"):
        line_of(name, CODE)


def test_a_name_with_two_places():
    with pytest.raises(UserError, match="lines"):
        line_of("f", "def f():\n    pass\n\n\ndef f():\n    pass\n")


def test_numbers_are_set(page):
    page.write_text(
        "See [`advantage`](../algos/x.py#L1), [`pair[0]`](../algos/x.py), "
        "[the script](../algos/x.py), [`algos/x.py`](../algos/x.py) and [`f`](https://example.org/x.py#L3).\n"
    )
    text, wrong = numbered(page)
    assert len(wrong) == 2
    assert text == (
        "See [`advantage`](../algos/x.py#L10), [`pair[0]`](../algos/x.py#L17), "
        "[the script](../algos/x.py), [`algos/x.py`](../algos/x.py) and [`f`](https://example.org/x.py#L3).\n"
    )
    page.write_text(text)
    assert numbered(page) == (text, [])


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("[`pair`](../algos/x.py#L16)", "2 times"),
        ("[`gone`](../algos/x.py#L16)", "0 times"),
        ("[`advantage`](../algos/y.py#L1)", "No such file"),
        ("[line 10](../algos/x.py#L10)", "`name`"),
    ],
)
def test_links_that_cannot_be_right(page, link, reason):
    page.write_text(link)
    text, [wrong] = numbered(page)
    assert text == link and reason in wrong and str(page) in wrong


def test_command_line(page):
    def command(*flags):
        words = [sys.executable, "-m", "benchmark", "links", str(page), *flags]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    stale = "[`advantage`](../algos/x.py#L9)"
    page.write_text(stale)
    done = command("--check")
    assert done.returncode == 1 and "is #L10" in done.stdout
    assert page.read_text() == stale
    assert command().returncode == 0
    assert page.read_text() == "[`advantage`](../algos/x.py#L10)"
    assert command("--check").returncode == 0
    page.write_text("[`pair`](../algos/x.py#L9)")
    assert command().returncode == 1


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_pages(path):
    _, wrong = numbered(path)
    assert not wrong, "\n".join([*wrong, "set them with: python -m benchmark links"])
