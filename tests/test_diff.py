"""benchmark/diff.py: what is counted and shown, and that the HTML survives Markdown."""

import re
from html.parser import HTMLParser
from pathlib import Path

import markdown  # comes with tensorboard; MkDocs and Zensical use it too
import pytest

from benchmark.diff import blocks, count, difference, page, pages, parent_of
from rlhf import UserError
from tests.launch import SCRIPTS
from tests.test_house import docstring

PARENT = '''"""A script."""

import math

# LOSSES ====


def same(x):
    return x


def loss(x):
    """Mean."""
    y = x * 2
    return y.mean()


def gone():
    pass
'''
CHILD = '''"""A script.

Parent: algos/parent.py
"""

import math

# LOSSES ====


def new(x):
    return math.exp(x)


def same(x):
    return x


# a comment on loss
def loss(x):
    """Mean."""
    y = x * 3
    return y.mean()
'''
# What Markdown, HTML and the tests of links would read as theirs.
AWKWARD = '''"""Awkward.

Parent: algos/parent.py
"""


def f(x):
    a = "<b>" if x < 1 and x > 0 else "&amp; &lt;"
    b = _x_ * 2 ** *y* __all__
    c = "`make nothing`" + "![a](b.py)" + "[c](d.md)" + x[0](1)

    d = "<td>" "</table>" "</details>" "<!--" "$m$ ~~s~~ ==h=="
    # <div markdown="1">

    - item
    1. item
    return x\\
'''


class Table(HTMLParser):
    """The texts of all cells of all tables, row by row, and the nesting of tags."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.open, self.cell = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in ("hr", "br", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.cell = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def table(text):
    found = Table(markdown.markdown(text))
    assert not found.open
    return [row for row in found.rows if row]


def awkward(text):
    """Its function with the lines quoted, since they are no Python and blocks() parses them."""
    head, body = text.split("def f(x):\n")
    return f"{head}def f(x):\n    '''\n{body}    '''\n"


# SCRIPTS =========================================================================================


def test_every_child_has_a_page():
    children = {s for s in SCRIPTS if re.search(r"^Parent: ", docstring(s), re.M)}
    assert children and set(pages()) == {Path("diffs") / f"{s}.md" for s in children}


def test_pages_are_modest_and_repeatable():
    found = pages()
    assert found == pages()
    for path, text in found.items():
        assert text.isascii() and len(text) < 150_000, path


@pytest.mark.parametrize("text", pages().values(), ids=map(str, pages()))
def test_pages_show_the_lines_of_the_scripts(text):
    """Each row, as a builder renders it, holds the lines that its numbers name."""
    parent, child = re.findall(r"\]\(\.\./\.\./(algos/\w+\.py)\)", text)[::-1]
    root = Path(__file__).resolve().parents[1]
    old, new = [(root / name).read_text().splitlines() for name in (parent, child)]
    for row in table(text):
        if len(row) == 4:
            for number, line, lines in zip(row[::2], row[1::2], (old, new), strict=True):
                assert line == (lines[int(number) - 1] if number else "")
        elif len(row) == 2:
            assert row[1] in (old[int(row[0]) - 1], new[int(row[0]) - 1])


def test_missing_parent(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    with pytest.raises(UserError, match=r"child\.py: its parent parent\.py"):
        pages(tmp_path)
    (tmp_path / "parent.py").write_text(PARENT)
    assert list(pages(tmp_path)) == [Path("diffs/child.md")]


# COUNTS ==========================================================================================


def test_parent_of():
    assert parent_of(CHILD) == "parent"
    assert parent_of(PARENT) is None
    assert parent_of('"""A."""\nx = """\nParent: algos/y.py\n"""\n') is None


def test_blocks():
    found = blocks(CHILD)
    assert list(found) == ["docstring", "imports", "new", "same", "loss"]
    assert found["new"] == [(11, "def new(x):"), (12, "    return math.exp(x)")]
    assert found["loss"][0] == (19, "# a comment on loss")
    decorated = blocks('"""A."""\n\n@a\n@b\ndef f():\n    pass\n\n\nX = 1\n# end\n')
    assert decorated["f"][0] == (3, "@a")
    assert decorated["X = 1"] == [(9, "X = 1"), (10, "# end")]


def test_counts():
    found = difference(PARENT, CHILD)
    assert {name: dict(count(pairs)) for name, pairs in found.items()} == {
        "docstring": {"changed": 1, "added": 3},
        "imports": {"equal": 1},
        "new": {"added": 2},
        "same": {"equal": 2},
        "loss": {"added": 1, "equal": 3, "changed": 1},
        "gone": {"removed": 2},
    }


def test_page():
    text = page("parent", "child", PARENT, CHILD)
    prose = " ".join(text.split())
    assert "6 of the child's 14 lines (43%) equal the parent's" in prose
    assert "2 are changed, 6 added; 2 of the parent's are removed" in prose
    assert "<p>Equal in both: imports, <code>same</code>.</p>" in text
    assert re.findall(r"<summary>(.*)</summary>", text) == [
        "docstring: 1 changed, 3 added",
        "<code>new</code> (only in the child): 2 added",
        "<code>loss</code>: 1 changed, 1 added",
        "<code>gone</code> (only in the parent): 2 removed",
    ]
    assert "y = x * <del>2</del>" in text and "y = x * <ins>3</ins>" in text


def test_unlike_lines_are_no_pair():
    """They may share a row, where both are marked as a whole. Here a third is common."""
    head = '"""A."""\n'
    text = page("a", "b", head + "import math\n", head + "import os, sys\n")
    assert "0 are changed, 1 added; 1 of the" in " ".join(text.split())
    assert "<del><code>import math</code></del>" in text


def test_lines_pair_with_their_likes():
    old = '"""A."""\nalpha = f(x, y, 1)\nbeta = g(u, v, w)\n'
    new = '"""A."""\nfirst = None\nalpha = f(x, y, 2)\nbeta = g(u, v, z)\n'
    pairs = difference(old, new)["imports"]
    numbers = [(old and old[0], new and new[0]) for old, new in pairs]
    assert numbers == [(None, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("equal", [9, 10, 20])
def test_long_equal_runs_fold(equal):
    """3 lines stay beside each change, and no row stands for fewer than 4."""
    middle = "".join(f"    x{i} = {i}\n" for i in range(equal))
    old = f'"""A."""\ndef f():\n    first = 1\n{middle}    last = 1\n'
    new = old.replace("first = 1", "first = 2").replace("last = 1", "last = 2")
    rows = table(page("a", "b", old, new))
    folds = [row[0] for row in rows if len(row) == 1]
    assert folds == ([f"{equal - 6} equal lines"] if equal >= 10 else [])
    assert len(rows) == 3 + (7 if folds else equal)


def test_equal_lines_at_the_ends_of_a_block_fold():
    """Only the 3 beside the change stay."""
    lines = [f"x{i} = {i}\n" for i in range(21)]
    old, new = ('"""A."""\n' + "".join([*lines[:10], line, *lines[11:]]) for line in ("y\n", "z\n"))
    rows = table(page("a", "b", old, new))
    assert [row[0] for row in rows] == ["7 equal lines", *map(str, range(9, 16)), "7 equal lines"]


# HTML ============================================================================================


@pytest.mark.parametrize("swap", [False, True])
def test_awkward_lines_survive(swap):
    """Every line comes out of Markdown as it was, on whichever side."""
    texts = [PARENT, awkward(AWKWARD)]
    rows = table(page("a", "b", *(texts[::-1] if swap else texts)))
    shown = {line for row in rows for line in row[1::2]}
    assert {line for line in awkward(AWKWARD).splitlines()[5:] if line} <= shown


def test_raw_html_has_no_blank_line():
    """One ends raw HTML in CommonMark, so the rest of the table would be read as Markdown."""
    text = page("parent", "child", PARENT, awkward(AWKWARD))
    found = re.findall(r"^<details.*?^</details>$", text, re.M | re.S)
    assert len(found) == text.count("<details") > 2
    for block in found:
        assert all(line.startswith("<") for line in block.splitlines())


def test_code_is_no_link_and_no_command():
    """The tests of the pages would follow them."""
    text = page("parent", "child", PARENT, awkward(AWKWARD))
    assert len(re.findall(r"\]\([^()\s]+\)", text)) == 2  # the two scripts
    assert "`make" not in text
