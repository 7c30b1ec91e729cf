"""Pictures of results, without a screen. Each PNG carries a digest of the data that it shows, so
that a page can be checked against the results without drawing anything again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("agg")
from matplotlib import pyplot as plt

from benchmark import stats

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito, told apart by everyone
KEY = "folio-data"


@dataclass(frozen=True)
class Panel:
    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]
    """label -> steps (S,), values of the runs (R, S), NaN where a run has none"""
    reference: tuple[float, float | None, str] | None = None
    """a published value, its spread and its name"""


@dataclass(frozen=True)
class Effect:
    label: str
    value: float
    low: float
    high: float
    region: tuple[float | None, float | None]
    """where the claim holds"""
    published: float | None
    """the effect that equals the published value"""
    verdict: str


@dataclass(frozen=True)
class Picture:
    """What a PNG shows, and how to draw it."""

    data: object = field(repr=False)
    draw: Callable[[], plt.Figure] = field(repr=False)

    def digest(self) -> str:
        text = json.dumps(self.data, default=plain)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = self.draw()
        figure.savefig(path, dpi=110, metadata={KEY: self.digest(), "Software": None})
        plt.close(figure)

    def is_at(self, path: Path) -> bool:
        """Whether `path` is a picture of this data."""
        try:
            with Image.open(path) as image:
                return image.info.get(KEY) == self.digest()
        except OSError:  # nothing is there, or no picture
            return False


def plain(value: object) -> object:
    """Numbers for JSON, to six digits, so that machines agree on them."""
    if isinstance(value, np.ndarray):
        return [f"{number:.6g}" for number in value.ravel()]
    if isinstance(value, Panel | Effect):
        return vars(value)
    raise TypeError(type(value))


def curves(panels: list[Panel], columns: int = 3) -> Picture:
    """Mean over runs with its 95 % bootstrap band, a panel for each environment."""

    def draw() -> plt.Figure:
        wide = min(columns, len(panels))
        high = -(-len(panels) // wide)
        figure, axes = plt.subplots(
            high, wide, figsize=(4.2 * wide, 3.2 * high), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, panel in zip(axes.flat, panels, strict=False):
            for colour, (label, (steps, runs)) in zip(COLOURS, panel.lines.items(), strict=False):
                centre, low, high_ = stats.curve_band(runs)
                name = f"{label}, {len(runs)} run{'s' * (len(runs) != 1)}"
                axis.plot(steps, centre, color=colour, label=name, linewidth=1.5)
                axis.fill_between(steps, low, high_, color=colour, alpha=0.25, linewidth=0)
            if panel.reference:
                value, spread, name = panel.reference
                axis.axhline(value, color="#555555", linestyle="--", linewidth=1, label=name)
                if spread:
                    axis.axhspan(value - spread, value + spread, color="#555555", alpha=0.12)
            axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
            axis.grid(alpha=0.25)
            axis.legend(fontsize=7.5, framealpha=0.6)
        return figure

    return Picture(["curves", panels], draw)


def effects(items: list[Effect]) -> Picture:
    """Effects with their 95 % intervals on the region where each claim holds, each on its own axis;
    a dashed line is the published value."""
    colours = {"reproduced": "#009e73", "not reproduced": "#d55e00", "inconclusive": "#777777"}

    def draw() -> plt.Figure:
        figure, axes = plt.subplots(
            len(items), 1, figsize=(8.4, 0.75 * len(items)), squeeze=False, layout="constrained"
        )
        for axis, item in zip(axes.flat, items, strict=True):
            ends = [item.value, item.low, item.high, *item.region, item.published]
            ends = [end for end in ends if end is not None and np.isfinite(end)]
            margin = 0.12 * (max(ends) - min(ends) or 1)
            left, right = min(ends) - margin, max(ends) + margin
            low, high = item.region
            axis.axvspan(
                left if low is None else low,
                right if high is None else high,
                color="#0072b2",
                alpha=0.13,
                linewidth=0,
            )
            if item.published is not None:
                axis.axvline(item.published, color="#555555", linestyle="--", linewidth=1)
            colour = colours[item.verdict]
            axis.plot(np.clip([item.low, item.high], left, right), [0, 0], color=colour, lw=3)
            axis.plot(item.value, 0, "o", color=colour, markersize=7)
            axis.set(xlim=(left, right), ylim=(-1, 1), yticks=[])
            axis.set_title(f"{item.label}: {item.verdict}", fontsize=8.5, loc="left", pad=2)
            axis.tick_params(labelsize=7.5)
        return figure

    return Picture(["effects", items], draw)
