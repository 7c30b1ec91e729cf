"""Line numbers in the links from documentation to code.

    python -m benchmark links            rewrites the numbers
    python -m benchmark links --check    changes nothing and fails where one is wrong

A link is [`name`](path/to/file.py#L12), the path relative to its page. `name` is one of

  - a function or a class at the top level of the file,
  - Class.method,
  - an argument of a script, a field of its class Args, as `gamma` or as `--gae-lambda`,
  - any other piece of code that stands in the file exactly once.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Annotated

import tyro

from rlhf import UserError

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(
    r"\[(?P<text>[^\[\]\n]*|`[^`\n]+`)\]\((?P<file>[^()\s#]+\.py)(?P<line>#[^()\s]*)?\)"
)


def pages() -> list[Path]:
    """Everything that people read."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def names(text: str) -> dict[str, set[int]]:
    """{name: lines} of functions, classes, methods and arguments of a source text."""
    found: dict[str, set[int]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, set()).add(node.lineno)
        if not isinstance(node, ast.ClassDef):
            continue
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                found.setdefault(f"{node.name}.{part.name}", set()).add(part.lineno)
            elif isinstance(part, ast.AnnAssign) and node.name == "Args":
                name = part.target.id
                for spelling in {name, "--" + name.replace("_", "-")}:
                    found.setdefault(spelling, set()).add(part.lineno)
    return found


def line_of(name: str, text: str) -> int:
    """The line that a link's name stands for. Raises UserError where that is not one line."""
    lines = names(text).get(name)
    if lines is None:
        starts = [match.start() for match in re.finditer(re.escape(name), text)]
        if len(starts) != 1:
            raise UserError(f"`{name}` stands there {len(starts)} times, not once")
        return text.count("\n", 0, starts[0]) + 1
    if len(lines) > 1:
        raise UserError(f"`{name}` is on lines {sorted(lines)}")
    return min(lines)


def numbered(page: Path) -> tuple[str, list[str]]:
    """The text of a page with right numbers, and a line for each link that was or stays wrong."""
    wrong = []

    def replace(match: re.Match) -> str:
        text, file, line = match["text"], match["file"], match["line"] or ""
        name = text.strip("`")
        if "://" in file or (not line and (name == text or file.endswith(name))):
            return match[0]  # to another place, or to a whole file
        try:
            if name == text:
                raise UserError("the text of a link to a line is a `name`")
            new = f"#L{line_of(text.strip('`'), (page.parent / file).read_text())}"
        except (OSError, SyntaxError, UserError) as error:
            wrong.append(f"{page}: [{text}]({file}{line}): {error}")
            return match[0]
        if new != line:
            wrong.append(f"{page}: [{text}]({file}{line}): is {new}")
        return f"[{text}]({file}{new})"

    return LINK.sub(replace, page.read_text()), wrong


def links(
    page: Annotated[list[Path] | None, tyro.conf.Positional] = None, check: bool = False
) -> None:
    """Set the line numbers of links to code.

    Args:
        page: Markdown files; all of the project if not given.
        check: Change nothing, list what is wrong and fail.
    """
    failed = False
    for path in page or pages():
        text, wrong = numbered(path)
        if not check and text != path.read_text():
            path.write_text(text)
            _, wrong = numbered(path)
            print(f"{path}: numbers set")
        failed |= bool(wrong)
        print("".join(f"{line}\n" for line in wrong), end="")
    if failed:
        sys.exit("some links are wrong" + (": python -m benchmark links" if check else ""))


def main(flags: list[str]) -> None:
    tyro.cli(links, prog="python -m benchmark links", args=flags)
