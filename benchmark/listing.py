"""The papers with claims and what the results say of them: python -m benchmark list"""

from collections import Counter

import tyro
from rich.console import Console
from rich.table import Table

from benchmark import papers, results
from benchmark.report import ORDER, VERDICTS, gather, judge


def listing() -> None:
    """List the papers: their scales, published numbers, and verdicts on their claims."""
    table = Table("paper", "scales", "numbers", *VERDICTS, box=None, pad_edge=False)
    for name in papers.names():
        paper = papers.load(name)
        found = gather(name, results.RESULTS, ORDER[:2])
        counts = Counter(judge(claim, found).verdict for claim in paper.claims)
        cells = [str(counts[verdict] or "") for verdict in VERDICTS]
        table.add_row(name, ", ".join(paper.scales), str(len(paper.numbers)), *cells)
    Console(highlight=False).print(table)


def main(flags: list[str]) -> None:
    tyro.cli(listing, prog="python -m benchmark list", args=flags)
