"""Keep the blocks that scripts copy from each other identical.

    python -m benchmark sync gae --from algos/ppo.py
    python -m benchmark sync --check

A copy that differs on purpose says why in the first comment of its body, `# diverges: <reason>`.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import tyro

from rlhf import UserError

ALGOS = Path(__file__).resolve().parents[1] / "algos"
OWN = ("Args", "main")  # each script has its own


def blocks(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """The functions and classes at the top level of a script."""
    try:
        body = ast.parse(path.read_text()).body
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: {error}") from error
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def span(node: ast.FunctionDef | ast.ClassDef) -> slice:
    """Its lines, decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def diverges(path: Path, node: ast.FunctionDef | ast.ClassDef) -> str | None:
    """The reason that the first comment in the body gives for a difference, if it gives one."""
    lines = (line.strip() for line in path.read_text().splitlines()[span(node)])
    comment = next((line for line in lines if line.startswith("#")), "")
    found = re.match(r"# diverges: (\S.*)", comment)
    return found[1] if found else None


def differing(folder: Path) -> dict[str, list[list[Path]]]:
    """{name: groups of scripts with equal copies} for each name with several groups.

    Copies are compared as syntax trees with docstrings; comments and layout may differ.
    """
    versions = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.py")):
        for name, node in blocks(path).items():
            if name not in OWN and not diverges(path, node):
                versions[name][ast.dump(node)].append(path)
    return {name: list(same.values()) for name, same in versions.items() if len(same) > 1}


def copy_block(name: str, source: Path, force: bool = False) -> list[Path]:
    """Write the block `name` of `source` over those of its siblings; returns what changed."""
    node = blocks(source).get(name)
    if node is None or name in OWN:
        raise UserError(f"{source} has no function or class {name} to copy")
    if (reason := diverges(source, node)) and not force:
        raise UserError(f"{name} of {source} diverges: {reason}; copy another one, or --force")
    text, changed = source.read_text().splitlines(keepends=True)[span(node)], []
    for target in sorted(source.parent.glob("*.py")):
        old = blocks(target).get(name)
        if old is None or target.resolve() == source.resolve():
            continue
        if (reason := diverges(target, old)) and not force:
            print(f"{target}: left as it is, diverges: {reason}")
            continue
        lines = target.read_text().splitlines(keepends=True)
        if lines[span(old)] != text:
            lines[span(old)] = text
            target.write_text("".join(lines))
            changed.append(target)
    return changed


def sync(
    name: tyro.conf.Positional[str] = "",
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    check: bool = False,
    force: bool = False,
    folder: Path = ALGOS,
) -> None:
    """Copy a function or class from one script over the others that have it.

    Args:
        name: Name of the function or class.
        source: Script to copy from.
        check: List the copies that differ, and exit with 1 if there are any.
        force: Overwrite also where the copy says that it diverges.
        folder: Scripts that --check compares.
    """
    if check:
        for block, groups in (found := differing(folder)).items():
            print(f"{block}: " + " / ".join(", ".join(p.stem for p in group) for group in groups))
        print(f"{len(found)} blocks differ between scripts that do not say why")
        sys.exit(1 if found else 0)
    if not name or source is None:
        raise UserError("sync needs a NAME and --from algos/x.py, or --check")
    changed = copy_block(name, source, force)
    print(f"{name}: wrote {', '.join(map(str, changed)) or 'nothing, all copies are equal'}")


def main(flags: list[str]) -> None:
    tyro.cli(sync, prog="python -m benchmark sync", args=flags)
