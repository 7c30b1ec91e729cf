"""The diff of each child script to its parent, as a page of the documentation.

pages() gives the texts, a pure function of the scripts; the report command writes and checks them.

Scripts are compared block by block: docstring, imports, each class and function by its name. Blocks
that moved are therefore no difference. A page is Markdown with raw HTML tables, which must survive
MkDocs, Zensical and GitHub: no blank line inside of a table, no style that the text depends on, and
nothing that the tests of links and commands could read as a link or a command of the page.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby, zip_longest
from pathlib import Path

from rlhf import UserError

ALGOS = Path(__file__).resolve().parents[1] / "algos"
MADE = "<!-- Written by `python -m benchmark report`; changes by hand are lost. -->"
CONTEXT = 3  # equal lines shown beside a change
FOLD = 4  # fewer equal lines than this are shown: the row that replaces them is a line too
ALIKE = 0.5  # lines are two versions of one from this share of common words on
MARKER = re.compile(r"# [A-Z]+ =+")  # of a section of a script
ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "&#96;", "]": "&#93;"}

Line = tuple[int, str]  # number in its file, text
Pair = tuple[Line | None, Line | None]  # of the parent, of the child; None where one has no such


# COMPARE =========================================================================================


def parent_of(text: str) -> str | None:
    """The name of a script's parent, without .py; None for a root."""
    found = re.search(r"^Parent: algos/(\w+)\.py$", ast.get_docstring(ast.parse(text)) or "", re.M)
    return found[1] if found else None


def blocks(text: str) -> dict[str, list[Line]]:
    """{name: lines} of everything at the top level of a script, in order.

    Statements are "imports" before the first definition; later ones go by their first line. Between
    blocks, comments and decorators belong to what follows, blank lines and section markers to
    nothing.
    """
    tree, lines = ast.parse(text), text.splitlines()
    spans, defined = [], False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, defined = node.name, True
        elif node is tree.body[0] and ast.get_docstring(tree) is not None:
            name = "docstring"
        else:
            name = lines[node.lineno - 1] if defined else "imports"
        if spans and spans[-1][0] == name:
            spans[-1][2] = node.end_lineno
        else:
            spans.append([name, node.lineno, node.end_lineno])
    spans[-1][2] = len(lines)  # comments at the end
    found: dict[str, list[Line]] = {}
    done = 0
    for name, first, last in spans:
        before = [(n, lines[n - 1]) for n in range(done + 1, first)]
        block = found.setdefault(name, [])
        block += [line for line in before if line[1].strip() and not MARKER.match(line[1])]
        block += [(n, lines[n - 1]) for n in range(first, last + 1)]
        done = last
    return found


def likeness(old: str, new: str) -> float:
    """Share of common words and signs; 0 for lines that are not two versions of one."""
    a, b = (re.findall(r"\w+|[^\w\s]", text) for text in (old, new))
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    if not a or not b or matcher.quick_ratio() < ALIKE:  # an upper bound, and cheap
        return 0.0
    ratio = matcher.ratio()
    return ratio if ratio >= ALIKE else 0.0


def align(old: list[Line], new: list[Line]) -> list[Pair]:
    """Pair the lines of a replaced passage, in order, for the largest sum of likenesses."""
    alike = [[likeness(a, b) for _, b in new] for _, a in old]
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]  # of old[i:] and new[j:]
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            pair = alike[i][j] + best[i + 1][j + 1] if alike[i][j] else 0.0
            best[i][j] = max(pair, best[i + 1][j], best[i][j + 1])
    pairs: list[Pair] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if alike[i][j] and best[i][j] == alike[i][j] + best[i + 1][j + 1]:
            pairs.append((old[i], new[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            pairs.append((old[i], None))
            i += 1
        else:
            pairs.append((None, new[j]))
            j += 1
    return pairs + [(line, None) for line in old[i:]] + [(None, line) for line in new[j:]]


def compare(old: list[Line], new: list[Line]) -> list[Pair]:
    """All lines of two versions of a block."""
    texts = [text for _, text in old], [text for _, text in new]
    pairs: list[Pair] = []
    for tag, a, b, c, d in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        if tag == "equal":
            pairs += zip(old[a:b], new[c:d], strict=True)
        else:
            pairs += align(old[a:b], new[c:d])
    return pairs


def kind(pair: Pair) -> str:
    old, new = pair
    if old is None:
        return "added"
    if new is None:
        return "removed"
    return "equal" if old[1] == new[1] else "changed"


def difference(parent: str, child: str) -> dict[str, list[Pair]]:
    """{name: lines} of all blocks of two scripts: the child's, then those of the parent alone."""
    old, new = blocks(parent), blocks(child)
    names = [*new, *(name for name in old if name not in new)]
    return {name: compare(old.get(name, []), new.get(name, [])) for name in names}


def count(pairs: list[Pair]) -> Counter:
    """How many pairs are equal, changed, added and removed."""
    return Counter(kind(pair) for pair in pairs)


# WRITE ===========================================================================================


def escape(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def marked(old: str, new: str) -> tuple[str, str]:
    """HTML of two versions of a line, with <del> and <ins> around the words that differ."""
    a, b = (re.findall(r"\w+|\s+|.", text) for text in (old, new))
    left, right = "", ""
    for tag, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, come = escape("".join(a[i:j])), escape("".join(b[k:m]))
        left += gone if tag == "equal" or not gone else f"<del>{gone}</del>"
        right += come if tag == "equal" or not come else f"<ins>{come}</ins>"
    return left, right


def cells(line: Line | None, html: str) -> str:
    return f"<td>{line[0]}</td><td>{html}</td>" if line else "<td></td><td></td>"


def code(line: Line | None) -> str:
    return f"<code>{escape(line[1])}</code>" if line else ""


def changed_rows(run: list[Pair]) -> Iterator[str]:
    """Rows of a passage without an equal line.

    Versions of one line stand beside each other. Lines of one side share rows with lines of the
    other, marked as a whole, since such a row would else look like an equal one without colours.
    """
    for paired, group in groupby(run, key=lambda pair: kind(pair) == "changed"):
        pairs = list(group)
        if paired:
            for old, new in pairs:
                left, right = marked(old[1], new[1])
                yield cells(old, f"<code>{left}</code>") + cells(new, f"<code>{right}</code>")
            continue
        gone = [old for old, _ in pairs if old]
        come = [new for _, new in pairs if new]
        for old, new in zip_longest(gone, come):
            left, right = code(old), code(new)
            if old and new:
                left, right = f"<del>{left}</del>", f"<ins>{right}</ins>"
            yield cells(old, left) + cells(new, right)


def equal_rows(run: list[Pair], first: bool, last: bool) -> list[tuple[str, list[str]]]:
    """(class, rows) of equal lines; first and last say that the block begins or ends here."""
    head = 0 if first else CONTEXT
    tail = 0 if last else CONTEXT
    hidden = len(run) - head - tail
    rows = [cells(old, code(old)) + cells(new, code(new)) for old, new in run]
    if hidden < FOLD:
        return [("equal", rows)]
    fold = f'<td colspan="4">{hidden} equal lines</td>'
    parts = [("equal", rows[:head]), ("fold", [fold]), ("equal", rows[len(rows) - tail :])]
    return [(name, part) for name, part in parts if part]


def table(pairs: list[Pair], parent: str, child: str) -> str:
    """HTML of a block that differs. A block of one script alone has two columns, else four."""
    kinds = count(pairs)
    if len(kinds) == 1 and "changed" not in kinds:
        [side] = kinds
        lines = [old or new for old, new in pairs]
        parts = [(side, [cells(line, code(line)) for line in lines])]
        heads = [child if side == "added" else parent]
    else:
        parts, heads = [], [parent, child]
        runs = [(e, list(run)) for e, run in groupby(pairs, key=lambda pair: kind(pair) == "equal")]
        for i, (equal, run) in enumerate(runs):
            if equal:
                parts += equal_rows(run, i == 0, i == len(runs) - 1)
            else:
                parts.append(("changed", list(changed_rows(run))))
    lines = [f'<table class="diff{" one" if len(heads) == 1 else ""}">', "<thead><tr>"]
    lines += [f"<th></th><th>algos/{head}.py</th>" for head in heads]
    lines.append("</tr></thead>")
    for name, rows in parts:
        lines += [f'<tbody class="{name}">', *(f"<tr>{row}</tr>" for row in rows), "</tbody>"]
    return "\n".join([*lines, "</table>"])


def label(name: str) -> str:
    return name if name in ("docstring", "imports") else f"<code>{escape(name)}</code>"


def summary(name: str, kinds: Counter) -> str:
    """A block's name and what differs in it."""
    only = {("added",): " (only in the child)", ("removed",): " (only in the parent)"}
    parts = [f"{kinds[k]} {k}" for k in ("changed", "added", "removed") if kinds[k]]
    return f"{label(name)}{only.get(tuple(kinds), '')}: {', '.join(parts)}"


def page(parent: str, child: str, parent_text: str, child_text: str) -> str:
    """The Markdown text for two scripts, given by their names without .py and by their texts."""
    found = difference(parent_text, child_text)
    total = count([pair for pairs in found.values() for pair in pairs])
    size = total["equal"] + total["changed"] + total["added"]
    same = [label(name) for name, pairs in found.items() if set(count(pairs)) == {"equal"}]
    prose = [
        f"[`algos/{child}.py`](../../algos/{child}.py) beside its parent "
        f"[`algos/{parent}.py`](../../algos/{parent}.py), generated from the two files.",
        f"**{total['equal']} of the child's {size} lines ({total['equal'] / size:.0%}) equal the "
        f"parent's; {total['changed']} are changed, {total['added']} added; {total['removed']} of "
        "the parent's are removed.**",
        "Blocks of the same name are compared line by line, comments and empty lines included; "
        "section markers and empty lines between blocks do not count. A changed line has at least "
        "half of its words and signs in common with the line that it replaces.",
    ]
    text = [f"# `{child}`: diff to `{parent}`", MADE, *(textwrap.fill(part, 100) for part in prose)]
    text.append(f"<p>Equal in both: {', '.join(same) or 'nothing'}.</p>")
    for name, pairs in found.items():
        kinds = count(pairs)
        if set(kinds) != {"equal"}:
            head = f"<details open>\n<summary>{summary(name, kinds)}</summary>"
            text.append(f"{head}\n{table(pairs, parent, child)}\n</details>")
    return "\n\n".join(text) + "\n"


def pages(folder: Path = ALGOS) -> dict[Path, str]:
    """{path below docs/: text} of all scripts that have a parent."""
    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    found = {}
    for child, text in texts.items():
        if parent := parent_of(text):
            if parent not in texts:
                raise UserError(f"{folder / child}.py: its parent {parent}.py does not exist")
            found[Path("diffs") / f"{child}.md"] = page(parent, child, texts[parent], text)
    return found
