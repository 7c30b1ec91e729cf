"""What a paper says and how it is tested: benchmark/papers/*.toml, read and checked.

The models below are the schema; every field is described under it. `load("ppo")` reads one file and
raises UserError, one line, for an unknown or missing key, a value of the wrong kind, a name given
twice, and a claim that names a run, an environment or a number that does not exist.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhf import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("papers")
SCALES = ("smoke", "laptop", "paper")

Scale = Literal["smoke", "laptop", "paper"]


class Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class About(Table):
    """[paper]: what is cited."""

    title: str
    authors: str
    year: int
    link: str
    """address of the paper"""
    code: str = ""
    """address of the authors' code"""
    note: str = ""
    """shown on top of the page: what the paper claims, what can be tested here"""


class Number(Table):
    """[[numbers]]: one published value."""

    id: str
    method: str
    env: str
    """environment and its version, or the task"""
    metric: str
    """what the value is, in words"""
    value: float
    spread: float | None = None
    """standard deviation over the seeds, ddof 0, in the unit of `value`"""
    seeds: int | None = None
    steps: int | None = None
    """environment steps, or episodes of a language model"""
    versions: str = ""
    """of the libraries that produced it"""
    source: str
    """table or page"""
    read_in: Literal["paper", "code", "third-party", "unverified"]
    """where the value was read; "code" includes the documentation beside it. An unverified value is
    shown as such and is never what a claim is held against."""


class Run(Table):
    """[[runs]]: one script with one set of flags, on each environment and seed."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    script: str
    """name of a file in algos/, without .py"""
    envs: list[str] = []
    """values of --env-id; empty for a script that has no such flag"""
    args: str = ""
    """flags at every scale"""
    smoke: str | None = None
    """further flags at this scale; a scale without this key leaves the run out"""
    laptop: str | None = None
    paper: str | None = None
    processes: int = Field(1, ge=1)
    """above 1, torchrun starts them"""
    seeds: int | None = Field(None, ge=1)
    """fewer seeds than the scale has"""
    metrics: list[str] = Field(min_length=1)
    """keys of metrics.csv to keep; a run that lacks one of them has failed"""
    more_metrics: list[str] = []
    """further ones, so that a run may keep more than [defaults] say"""
    prepare: str = ""
    """module, with its flags, to run once before the first run: `python -m PREPARE`"""
    teacher: str = ""
    """"PAPER RUN": --teacher is that run's best seed on the environment, see teachers.py"""

    @property
    def keys(self) -> list[str]:
        """Of metrics.csv, all that are kept."""
        return self.metrics + self.more_metrics

    def flags(self, scale: Scale) -> list[str] | None:
        """The flags at `scale`; None where the run is not part of it."""
        own = getattr(self, scale)
        return None if own is None else shlex.split(f"{self.args} {own}")


class Claim(Table):
    """[[claims]]: a statement that holds where an effect lies between `low` and `high`.

    reproduced: the whole 95 % interval of the effect does; not reproduced: none of it does;
    inconclusive: a part of it does.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    statement: str
    source: str
    """where the paper, or its code, says so"""
    reported: str = ""
    """the effect that it reports, in words"""
    run: str
    baseline: str | None = None
    """the run it is compared with"""
    numbers: list[str] = []
    """or the published values it is compared with, one for each environment"""
    envs: list[str] = []
    """environments of the run; default: all"""
    metric: str
    score: Literal["last", "last_100", "mean", "best", "at_step", "steps_to"] = "last"
    """of a run: the last value, the mean of the last 100 values, or of the stored curve its mean
    after `step`, its largest value, its value at `step`, or the first step at which it is at least
    `share` of `share_of`; a run that never is counts with its last step"""
    step: int | None = None
    share: float | None = None
    share_of: str = ""
    """a metric; its mean over the last values of `run` counts, for `baseline` too; a claim whose
    level no run reaches is inconclusive"""
    effect: Literal["score", "difference", "ratio"] = "score"
    """the score itself, or compared with `baseline` or `numbers`"""
    statistic: Literal["mean", "iqm"] = "iqm"
    """over runs and environments; published values are means, so `numbers` need "mean" """
    low: float | None = None
    high: float | None = None
    note: str = ""
    """shown beside the verdict: why these bounds, what was tried"""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("give low, high or both: the effects for which the statement holds")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.score != "mean" and (self.score == "at_step") != (self.step is not None):
            raise ValueError('step belongs to score = "at_step", which needs it, or "mean"')
        if not (self.score == "steps_to") == (self.share is not None) == bool(self.share_of):
            raise ValueError('score = "steps_to", share and share_of belong together')
        if self.effect == "score" and (self.baseline or self.numbers):
            raise ValueError('effect = "score" compares with nothing: drop baseline and numbers')
        if self.effect != "score" and bool(self.baseline) == bool(self.numbers):
            raise ValueError(f"effect = {self.effect!r} needs either baseline or numbers")
        if self.numbers and self.statistic != "mean":
            raise ValueError('published values are means: statistic = "mean"')
        if self.effect == "ratio" and self.statistic != "mean":
            raise ValueError('a ratio is one to a mean: statistic = "mean"')
        return self


class Picture(Table):
    """[[pictures]]: values of a family of metrics over the number in their names."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    metric: str
    """key in which * stands for the number: "eval/return@*" """
    xlabel: str
    """what the number counts"""
    about: str
    """what the picture shows, in words"""
    best_of: str = ""
    """a metric; drawn is where it was highest. If not given, the last values are"""

    def keys(self, run: Run) -> dict[int, str]:
        """{number: key} of the metrics of `run` that belong to the family, in order."""
        before, _, after = self.metric.partition("*")
        pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        found = [(pattern.fullmatch(key), key) for key in run.keys]
        return dict(sorted((int(match[1]), key) for match, key in found if match))


class ScaleInfo(Table):
    """[scales.NAME]"""

    seeds: int = Field(ge=1)
    """seeds 1, 2, ... of each run and environment"""
    about: str
    """what it costs and on what machine"""


class Paper(Table):
    paper: About
    scales: dict[Scale, ScaleInfo]
    defaults: dict = {}
    """keys of [[runs]] for all that do not have them"""
    runs: list[Run] = Field(min_length=1)
    numbers: list[Number] = []
    claims: list[Claim] = []
    pictures: list[Picture] = []

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, content: dict) -> dict:
        defaults, runs = content.get("defaults", {}), content.get("runs", [])
        if not (isinstance(defaults, dict) and isinstance(runs, list)):
            return content  # the fields say what is wrong
        return content | {"runs": [defaults | r if isinstance(r, dict) else r for r in runs]}

    @model_validator(mode="after")
    def check(self) -> Self:
        for kind, names in (
            ("run", [run.name for run in self.runs]),
            ("number", [number.id for number in self.numbers]),
            ("claim", [claim.id for claim in self.claims]),
            ("picture", [picture.name for picture in self.pictures]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{kind} {sorted(twice)[0]!r} is there twice")
        for run in self.runs:
            if not (ROOT / "algos" / f"{run.script}.py").exists():
                raise ValueError(f"run {run.name!r}: there is no algos/{run.script}.py")
            if run.teacher and len(run.teacher.split()) != 2:
                raise ValueError(f"run {run.name!r}: teacher {run.teacher!r}, want PAPER RUN")
            missing = [s for s in SCALES if getattr(run, s) is not None and s not in self.scales]
            if missing:
                raise ValueError(f"run {run.name!r} has {missing[0]}, but [scales] has not")
            for scale in SCALES:
                try:
                    run.flags(scale)
                except ValueError as error:  # a quotation mark without its partner
                    raise ValueError(f"run {run.name!r}, flags: {error}") from error
        for picture in self.pictures:
            drawn = [run for run in self.runs if picture.keys(run)]
            if not drawn:
                raise ValueError(f"picture {picture.name!r}: no run keeps {picture.metric!r}")
            if picture.best_of and not all(picture.best_of in run.keys for run in drawn):
                raise ValueError(f"picture {picture.name!r}: not all keep {picture.best_of!r}")
        for claim in self.claims:
            try:
                self.check_claim(claim)
            except ValueError as error:
                raise ValueError(f"claim {claim.id!r}: {error}") from error
        return self

    def check_claim(self, claim: Claim) -> None:
        run, envs = self.run(claim.run), self.claim_envs(claim)
        if claim.share_of and claim.share_of not in run.keys:
            raise ValueError(f"run {claim.run!r} does not keep the metric {claim.share_of!r}")
        for name in filter(None, (claim.run, claim.baseline)):
            if claim.metric not in self.run(name).keys:
                raise ValueError(f"run {name!r} does not keep the metric {claim.metric!r}")
            unknown = set(envs) - set(self.run(name).envs or [""])
            if unknown:
                raise ValueError(f"run {name!r} has no environment {sorted(unknown)[0]!r}")
        values = [self.number(name) for name in claim.numbers]
        if values and [value.env for value in values] != envs and run.envs:
            raise ValueError(f"numbers must be those of {', '.join(envs)}, in this order")
        for value in values:
            if value.read_in == "unverified":
                raise ValueError(f"number {value.id!r} is unverified, so it cannot be a target")
            if claim.effect == "ratio" and value.value <= 0:
                raise ValueError(f'number {value.id!r} is not positive: effect = "difference"')

    def run(self, name: str) -> Run:
        return pick(self.runs, "run", "name", name)

    def seeds(self, run: Run, scale: Scale) -> int:
        most = self.scales[scale].seeds
        return min(most, run.seeds or most)

    def number(self, name: str) -> Number:
        return pick(self.numbers, "number", "id", name)

    def claim(self, name: str) -> Claim:
        return pick(self.claims, "claim", "id", name)

    def claim_envs(self, claim: Claim) -> list[str]:
        """Environments that a claim is about; [""] for a script without --env-id."""
        return claim.envs or self.run(claim.run).envs or [""]

    def claim_runs(self, claim: Claim) -> list[tuple[str, str]]:
        """Run and environment of each group of runs that it compares."""
        names = [name for name in (claim.run, claim.baseline) if name]
        return [(name, env) for name in names for env in self.claim_envs(claim)]


def pick(items: list, kind: str, key: str, name: str):
    for item in items:
        if getattr(item, key) == name:
            return item
    known = ", ".join(getattr(item, key) for item in items) or "none"
    raise ValueError(f"there is no {kind} {name!r}; there is: {known}")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, folder: Path = FOLDER) -> Paper:
    """Read and check FOLDER/NAME.toml. Raises UserError with one line that says what to mend."""
    path = folder / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise UserError(f"there is no paper {name!r}; there is: {known}")
    try:
        with path.open("rb") as file:
            return Paper(**tomllib.load(file))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark/papers/{path.name}: {error}") from error
    except ValidationError as error:
        raise UserError(f"benchmark/papers/{path.name}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first flaw that pydantic found, in one line."""
    first = error.errors()[0]
    place = ""
    for part in first["loc"]:
        # positions count from 1, as a reader of the file does
        place += f" {part + 1}" if isinstance(part, int) else f" {part}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; see benchmark/papers.py for those that there are"
    elif first["type"] == "missing":
        message = "missing"
    more = len(error.errors()) - 1
    return f"{place.strip()}: {message}".removeprefix(": ") + (f" (and {more} more)" * (more > 0))
