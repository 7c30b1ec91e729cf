"""Write the pages that rest on results: the scoreboard of claims, a page a paper, the diffs.

    python -m benchmark report
    python -m benchmark report --check

Every number on these pages comes from benchmark/results/ or benchmark/papers/, and names its file.
`--check` writes nothing and fails where a page or a picture is not the one that the files give; a
picture is recognized by the digest of its data that it carries.
"""

import html
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmark import diff, jobs, papers, plots, results, stats
from benchmark.run import plan
from rlhf import UserError

DOCS = jobs.ROOT / "docs"
ORDER = ("paper", "laptop", "smoke")
MIN_RUNS = 3  # of each run and environment: an interval over fewer says too little
VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not run")
UNCOUNTED = ("charts/SPS", "charts/tokens_per_second")  # what a machine does, not an algorithm


@dataclass(frozen=True)
class Evidence:
    """The runs of one paper at one scale, made with the flags that its file has today."""

    name: str
    paper: papers.Paper
    scale: str
    records: dict[str, dict]
    planned: list[jobs.Job]
    folder: Path

    def jobs_of(self, run: str, env: str) -> list[jobs.Job]:
        return [job for job in self.planned if (job.run, job.env) == (run, env)]

    def done(self, run: str, env: str) -> list[jobs.Job]:
        return [job for job in self.jobs_of(run, env) if job.finished(self.records)]

    def failed(self, run: str, env: str) -> list[jobs.Job]:
        return [job for job in self.jobs_of(run, env) if job.failed(self.records)]

    def has_part(self, claim: papers.Claim) -> bool:
        """Whether all that the claim compares is run at this scale."""
        return all(self.jobs_of(*group) for group in self.paper.claim_runs(claim))

    def csv(self, job: jobs.Job) -> Path:
        return self.folder / self.name / self.scale / f"{job.name}.csv"

    def curve(self, job: jobs.Job, metric: str) -> tuple[np.ndarray, np.ndarray]:
        return results.read_curve(self.csv(job), metric)

    def scores(self, run: str, env: str, metric: str, score: str) -> np.ndarray:
        """Of all runs that are done: (R,); score: a name that their records have."""
        found = [self.records[j.name]["scores"][metric][score] for j in self.done(run, env)]
        return np.array(found)

    def claim_scores(self, claim: papers.Claim, run: str, env: str) -> np.ndarray:
        """As the claim has them: (R,). Steps of a curve are the last ones of its stretches.

        Raises ValueError where no run on either side reaches a level: that says nothing.
        """
        if claim.score not in ("mean", "at_step", "steps_to"):
            return self.scores(run, env, claim.metric, claim.score)
        curves = [self.curve(job, claim.metric) for job in self.done(run, env)]
        if claim.score == "mean":
            return np.array([v[s > (claim.step or 0)].mean() for s, v in curves])
        if claim.score == "at_step":
            return np.array([v[np.abs(s - claim.step).argmin()] for s, v in curves])
        level = claim.share * self.scores(claim.run, env, claim.share_of, "last").mean()
        sides = [name for name, e in self.paper.claim_runs(claim) if e == env]
        best = max(self.curve(j, claim.metric)[1].max() for n in sides for j in self.done(n, env))
        if not 0 < level <= best:
            raise ValueError(f"no run reaches {claim.share:g} of {claim.share_of}")
        return np.array([s[v >= level][0] if (v >= level).any() else s[-1] for s, v in curves])


@dataclass(frozen=True)
class Judged:
    claim: papers.Claim
    verdict: Literal["reproduced", "not reproduced", "inconclusive", "not run"]
    scale: str = ""
    interval: stats.Interval | None = None
    runs: str = ""
    reason: str = ""


def gather(name: str, folder: Path, scales: tuple[str, ...]) -> dict[str, Evidence]:
    """{scale: evidence} of a paper, for those of `scales` that it has."""
    paper, found = papers.load(name), {}
    for scale in scales:
        if scale in paper.scales:
            stored = results.records(folder, name, scale)
            # the seeds of the scale, no others: none can be added until a verdict turns
            planned = plan(name, scale, folder=folder)
            current = [job for job in planned if job.finished(stored) or job.failed(stored)]
            today = {job.name: stored[job.name] for job in current}
            found[scale] = Evidence(name, paper, scale, today, planned, folder)
    return found


def judge(claim: papers.Claim, found: dict[str, Evidence]) -> Judged:
    """By the largest scale whose runs are all there."""
    reasons = []
    for scale, evidence in found.items():
        paper = evidence.paper
        groups = paper.claim_runs(claim)
        wanted = [max(MIN_RUNS, paper.seeds(paper.run(name), scale)) for name, _ in groups]
        done = [len(evidence.done(*group)) for group in groups]
        failed = [len(evidence.failed(*group)) for group in groups]
        if not evidence.has_part(claim):
            continue
        if any(d + f < w for d, f, w in zip(done, failed, wanted, strict=True)):
            if any(done) or any(failed):
                why = f"{scale}: {sum(done)} of {sum(wanted)} runs so far"
                reasons.append(why + (f", {sum(failed)} failed" if any(failed) else ""))
            continue
        if any(failed):
            why = f"{sum(failed)} of {sum(done) + sum(failed)} runs failed"
            return Judged(claim, "inconclusive", scale, runs=str(sum(done)), reason=why)
        end = min(evidence.records[j.name]["steps"] for g in groups for j in evidence.done(*g))
        published = [evidence.paper.number(n).steps or 0 for n in claim.numbers]
        asked = max([claim.step or 0, *published])
        if end < 0.99 * asked:  # a batch may not divide the steps, and a CSV has 100 stretches
            reasons.append(f"{scale}: runs end at step {end:,}, before {asked:,}")
            continue
        alike = len(groups) > 1 and len(set(wanted)) == 1
        runs = f"{min(done)} x {len(groups)}" if alike else " + ".join(map(str, done))
        try:
            interval = effect(claim, evidence)
        except ValueError as error:  # a baseline whose mean is not positive, a level never reached
            return Judged(claim, "inconclusive", scale, runs=runs, reason=str(error))
        return Judged(claim, stats.verdict(interval, claim.low, claim.high), scale, interval, runs)
    return Judged(claim, "not run", reason="; ".join(reasons))


def effect(claim: papers.Claim, evidence: Evidence) -> stats.Interval:
    envs = evidence.paper.claim_envs(claim)

    def tasks(run: str) -> list[np.ndarray]:
        return [evidence.claim_scores(claim, run, env) for env in envs]

    if claim.numbers:
        numbers = [evidence.paper.number(name) for name in claim.numbers]
        published = [(n.value, n.spread, n.seeds) for n in numbers]
        return stats.published_interval(tasks(claim.run), published, claim.effect)
    if claim.baseline:
        sides = tasks(claim.run), tasks(claim.baseline)
        return stats.effect_interval(*sides, claim.effect, claim.statistic)
    return stats.score_interval(tasks(claim.run), claim.statistic)


# TEXT ============================================================================================


def number(value: float) -> str:
    """Four significant digits, without an exponent where that stays short."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation (ddof 0), the form of the published tables."""
    if len(values) < MIN_RUNS:
        return number(values.mean()) if len(values) else ""
    std = values.std() if np.ptp(values) else 0.0  # of equal values: no rounding error
    return f"{number(values.mean())} +- {number(std)}"


def bounds(claim: papers.Claim) -> str:
    if claim.low is not None and claim.high is not None:
        return f"{claim.low:g} to {claim.high:g}"
    return f"at least {claim.low:g}" if claim.high is None else f"at most {claim.high:g}"


def kind(claim: papers.Claim) -> str:
    words = {"ratio": "ours / published", "difference": "ours - published"}
    if claim.baseline:
        sign = "/" if claim.effect == "ratio" else "-"
        return f"{claim.run} {sign} {claim.baseline}"
    return words.get(claim.effect, f"`{claim.metric}`")


def scored(claim: papers.Claim) -> str:
    name = f"`{claim.metric}`, {claim.score.replace('_', ' ')}"
    if claim.score == "steps_to":
        return f"{name} {claim.share:g} of `{claim.share_of}`"
    after = " after step" if claim.score == "mean" else ""
    return name + (f"{after} {claim.step:,}" if claim.step else "")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def shown(judged: Judged) -> tuple[str, str]:
    """Effect and interval, as cells of a table."""
    if judged.interval is None:
        return "", ""
    i = judged.interval
    return number(i.value), f"[{number(i.low)}, {number(i.high)}]"


def verdict(judged: Judged) -> str:
    # coloured by docs/styles.css; bold where there is no style sheet
    text = f'<b class="verdict {judged.verdict.replace(" ", "-")}">{judged.verdict}</b>'
    return text + (f" ({judged.reason})" if judged.reason else "")


def scoreboard(board: dict[str, list[Judged]]) -> str:
    counts = Counter(judged.verdict for claims in board.values() for judged in claims)
    lines = [
        "# Scoreboard of claims",
        "",
        diff.MADE,
        "",
        "What papers say, tested by runs that anyone can repeat. A claim names the effects for "
        "which it holds before its runs are made. **Reproduced**: the whole 95 % interval of the "
        "effect lies there. **Not reproduced**: none of it does. **Inconclusive**: a part of it "
        "does, or runs failed. Intervals are bootstrap intervals over runs, stratified over tasks; "
        "where an effect is held against a published mean, the spread of that mean is part of "
        "them. Scale: *paper* is the paper's own budget, *laptop* a smaller one.",
        "",
        ", ".join(f"{counts[v]} {v}" for v in VERDICTS) + ".",
        "",
    ]
    for name, claims in board.items():
        paper = papers.load(name)
        lines += [
            f"## {paper.paper.title}",
            "",
            f"Evidence: [page]({name}.md), `benchmark/results/{name}/`. Claims and published "
            f"values: `benchmark/papers/{name}.toml`.",
            "",
            *header(["claim", "verdict", "effect [95 %]", "holds for", "reported", "runs"]),
        ]
        for judged in claims:
            claim = judged.claim
            value, interval = shown(judged)
            cells = [f"[{cell(claim.statement)}]({name}.md#{claim.id})", verdict(judged)]
            cells.append(f"{kind(claim)}: {value} {interval}" if value else kind(claim))
            cells += [bounds(claim), cell(claim.reported)]
            lines.append(row([*cells, f"{judged.runs}, {judged.scale}" if judged.runs else ""]))
        lines.append("")
    return "\n".join(lines)


def index(board: dict[str, list[Judged]]) -> str:
    lines = [
        "# Papers",
        "",
        diff.MADE,
        "",
        "Papers with a file of claims in `benchmark/papers/`. [The scoreboard](scoreboard.md) has "
        "the verdicts.",
        "",
        *header(["paper", "year", "scripts", *VERDICTS]),
    ]
    for name, claims in board.items():
        paper = papers.load(name)
        about = paper.paper
        scripts = dict.fromkeys(run.script for run in paper.runs)
        links = ", ".join(f"[`{s}`](../algos/{s}.md)" for s in scripts)
        counts = Counter(judged.verdict for judged in claims)
        cells = [f"[{about.title}]({about.link}), {about.authors}; [evidence]({name}.md)"]
        cells += [str(about.year), links, *(str(counts[v] or "") for v in VERDICTS)]
        lines.append(row(cells))
    return "\n".join([*lines, ""])


def page(name: str, found: dict[str, Evidence], claims: list[Judged], pictures: list[str]) -> str:
    paper = papers.load(name)
    about = paper.paper
    links = f"[paper]({about.link})" + (f", [authors' code]({about.code})" if about.code else "")
    lines = [f"# Evidence: {about.title}", "", diff.MADE, ""]
    lines += [f"{about.authors}, {about.year}: {links}. {cell(about.note)}".strip(), ""]
    lines += [f"Files: `benchmark/papers/{name}.toml`, `benchmark/results/{name}/`.", ""]
    lines += ["## Claims"]
    lines += [f"\n![{text}](images/{file})" for file, text in pictures if "claims" in file]
    for judged in claims:
        claim = judged.claim
        value, interval = shown(judged)
        lines += ["", f"### {claim.id}", "", cell(claim.statement) + ".", ""]
        lines.append(f"- Verdict: {verdict(judged)}")
        if value:
            runs = f"{judged.runs} runs at scale {judged.scale}"
            lines.append(f"- Effect: {kind(claim)}, {claim.statistic}: {value} {interval}, {runs}")
        lines.append(f"- Holds for: {bounds(claim)}; score: {scored(claim)}")
        lines.append(
            f"- Source: {cell(claim.source)}" + f": {cell(claim.reported)}." * bool(claim.reported)
        )
        if claim.note:
            lines.append(f"- {cell(claim.note)}")
        parts = (scale for scale, e in found.items() if e.has_part(claim))
        flag = f"--scale {judged.scale or next(parts, 'smoke')} --only {claim.id}"
        lines.append(f"- Repeat: `python -m benchmark run {name} {flag}`")
    for scale, evidence in found.items():
        if any(record["state"] == "done" for record in evidence.records.values()):
            lines += ["", f"## Results at scale {scale}", ""]
            about_scale = cell(paper.scales[scale].about)
            lines += [f"{about_scale[0].upper()}{about_scale[1:]}. {machines(evidence)}", ""]
            here = [p for p in pictures if p[0].startswith(f"{name}-{scale}-")]
            lines += [f"![{text}](images/{file})" for file, text in here]
            lines += table(evidence)
    if paper.numbers:
        lines += ["", "## Published values", "", published(paper)]
    return "\n".join([*lines, ""])


def machines(evidence: Evidence) -> str:
    """Where the runs were made, and what they took."""
    found = [r for r in evidence.records.values() if r["state"] == "done"]
    commits = Counter(r["commit"] + ("-dirty" if r["dirty"] else "") for r in found)
    cpus = Counter(
        f"{r['machine']['cpu']}, {r['machine']['cores']} cores"
        + "".join(f", {gpu}" for gpu in r["machine"].get("gpus", []))
        for r in found
    )
    versions = Counter(", ".join(f"{k} {v}" for k, v in r["versions"].items() if v) for r in found)
    hours = sum(r["wall_seconds"] * r["processes"] for r in found) / 3600
    failed = sum(r["state"] == "failed" for r in evidence.records.values())
    before = sum(r.get("failed_before", 0) for r in found)
    changed = sum(job.changed(evidence.records) for job in evidence.planned)
    return (
        f"{len(found)} runs, {failed} failed; {hours:.1f} hours, added up over processes. "
        "Commits (runs): "
        + ", ".join(f"{c} ({n})" for c, n in sorted(commits.items()))
        + f". Machines: {'; '.join(sorted(cpus))}, one thread a process. "
        + f"Versions: {'; '.join(sorted(versions))}. "
        + f"{before} starts had failed before. " * (before > 0)
        + f"{changed} runs were made with another version of the script than today's. "
        * (changed > 0)
        + f"File: `benchmark/results/{evidence.name}/{evidence.scale}.jsonl`."
    )


def table(evidence: Evidence) -> list[str]:
    """Scores of all runs of each script, mean +- standard deviation (ddof 0) over seeds."""
    targets = {
        (c.run, c.metric, evidence.paper.number(n).env): evidence.paper.number(n)
        for c in evidence.paper.claims
        for n in c.numbers
    }
    scripts = {}
    for run in evidence.paper.runs:
        for env in run.envs or [""]:
            if evidence.done(run.name, env):
                scripts.setdefault(run.script, []).append((run, env))
    lines = []
    for script, groups in scripts.items():
        head = groups[0][0].keys[0]
        apart = len({run.name for run, _ in groups}) > 1  # environments alone do not say which
        names = [f"{run.name} {env}".strip() if apart or not env else env for run, env in groups]
        lines += ["", f"`algos/{script}.py`, `{head}`: mean of the last 100 values of each run, "]
        lines[-1] += "last value, best value of the stored curve, of which a point is the mean of "
        lines[-1] += "a hundredth of the run; mean +- standard deviation over runs."
        titles = ["", "runs", "last 100", "IQM of it [95 %]", "last", "best", "published"]
        lines += ["", *header(titles)]
        for (run, env), name in zip(groups, names, strict=True):
            values = evidence.scores(run.name, env, head, "last_100")
            i = stats.score_interval([values], "iqm")
            cells = [name, str(len(values)), spread(values)]
            few = len(values) < MIN_RUNS
            cells.append("" if few else f"{number(i.value)} [{number(i.low)}, {number(i.high)}]")
            cells += [spread(evidence.scores(run.name, env, head, s)) for s in ("last", "best")]
            target = targets.get((run.name, head, env))
            words = f"{value_of(target)}, {target.seeds} seeds, " if target else ""
            cells.append(f"{words}{target.steps:,} steps" if target else "")
            lines.append(row(cells))
        others = dict.fromkeys(m for run, _ in groups for m in run.keys[1:])
        rows = []
        for metric in [metric for metric in others if metric not in UNCOUNTED]:
            cells = [
                spread(evidence.scores(run.name, env, metric, "last")) if metric in run.keys else ""
                for run, env in groups
            ]
            rows.append(row([f"`{metric}`", *cells]))
        if rows:
            lines += ["", "Last value of the other metrics:", "", *header(["", *names]), *rows]
        flags = {f"`{run.name}`: `{' '.join(run.flags(evidence.scale))}`" for run, _ in groups}
        lines += ["", f"Flags: {'; '.join(sorted(flags))}."]
        teachers = {
            f"{env}: `{record['teacher']}`, {number(record['teacher_score'])}"
            for run, env in groups
            for record in (evidence.records[job.name] for job in evidence.done(run.name, env))
            if "teacher" in record
        }
        if teachers:
            listed = "; ".join(sorted(teachers))
            lines += ["", f"Teachers, mean return of their last 100 episodes: {listed}."]
    return lines


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def header(titles: list[str]) -> list[str]:
    return [row(titles), "|" + "---|" * len(titles)]


def value_of(published: papers.Number) -> str:
    """As it was published, not rounded."""
    spread = "" if published.spread is None else f" +- {published.spread:.12g}"
    return f"{published.value:.12g}{spread}"


def published(paper: papers.Paper) -> str:
    """All published values, folded; HTML, as Markdown is not read inside of <details>."""
    head = ["method", "task", "metric", "value", "seeds", "steps", "versions", "source", "read in"]
    rows = []
    for n in paper.numbers:
        cells = [n.method, n.env, n.metric, value_of(n), n.seeds, f"{n.steps:,}" if n.steps else ""]
        cells += [n.versions, n.source, n.read_in]
        text = "".join(f"<td>{html.escape(str(c if c is not None else ''))}</td>" for c in cells)
        rows.append(f"<tr>{text}</tr>")
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "\n".join(rows)
    return (
        f"<details>\n<summary>{len(rows)} values and where they were read</summary>\n"
        f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</details>"
    )


# PICTURES ========================================================================================


def curve_pictures(evidence: Evidence) -> dict[str, tuple[str, plots.Picture]]:
    """{file: (what it shows, picture)}: a picture for each script, a panel for each environment;
    for a script without environments a panel for each metric that a claim asks for."""
    found, paper = {}, evidence.paper
    groups = {}
    for run in paper.runs:
        groups.setdefault((run.script, bool(run.envs)), []).append(run)
    for (script, with_envs), runs in groups.items():
        if with_envs:
            head = runs[0].keys[0]
            wanted = [(e, head, e) for e in dict.fromkeys(e for r in runs for e in r.envs)]
        else:
            asked = {c.metric for c in paper.claims if c.run in {r.name for r in runs}}
            wanted = [("", m, m) for m in runs[0].keys if m in asked]
        panels = []
        for env, metric, title in wanted:
            lines = {
                run.name: curves_of(evidence, evidence.done(run.name, env), metric)
                for run in runs
                if metric in run.keys and evidence.done(run.name, env)
            }
            if lines:
                reference = reference_of(paper, runs, env, metric)
                panels.append(plots.Panel(title, "steps", metric, lines, reference))
        if panels:
            text = f"{script}: learning curves, mean and 95 % band over runs"
            file = f"{evidence.name}-{evidence.scale}-curves-{script}.png"
            found[file] = (text, plots.curves(panels))
    return found


def family_pictures(evidence: Evidence) -> dict[str, tuple[str, plots.Picture]]:
    """As `curve_pictures`, for [[pictures]]: a panel for each environment, a line for each run."""
    found = {}
    for picture in evidence.paper.pictures:
        panels = {}
        for run in evidence.paper.runs:
            keys = picture.keys(run)
            for env in run.envs or [""]:
                done = evidence.done(run.name, env)
                if keys and done:
                    values = [family(evidence, job, keys, picture.best_of) for job in done]
                    line = np.array(list(keys)), np.array(values)
                    panels.setdefault(env, {})[run.name] = line
        if panels:
            drawn = [
                plots.Panel(env, picture.xlabel, picture.metric, lines)
                for env, lines in panels.items()
            ]
            which = f"where {picture.best_of} was highest" if picture.best_of else "last values"
            text = f"{picture.about}; {which}, mean and 95 % band over runs"
            file = f"{evidence.name}-{evidence.scale}-{picture.name}.png"
            found[file] = (text, plots.curves(drawn))
    return found


def family(evidence: Evidence, job: jobs.Job, keys: dict[int, str], best_of: str) -> list[float]:
    """Values of one run, in the order of `keys`: the last ones, or where `best_of` was highest."""
    if not best_of:
        return [evidence.records[job.name]["scores"][key]["last"] for key in keys.values()]
    steps, values = evidence.curve(job, best_of)
    best = steps[values.argmax()]
    curves = [evidence.curve(job, key) for key in keys.values()]
    return [float(values[steps == best][0]) for steps, values in curves]


def curves_of(evidence: Evidence, done: list[jobs.Job], metric: str):
    return results.table([evidence.csv(job) for job in done], metric)


def reference_of(paper: papers.Paper, runs: list[papers.Run], env: str, metric: str):
    for claim in paper.claims:
        if claim.metric == metric and claim.run in {run.name for run in runs}:
            for found in map(paper.number, claim.numbers):
                if found.env == env:
                    return found.value, found.spread, found.method
    return None


def claim_picture(claims: list[Judged]) -> plots.Picture | None:
    items = []
    for judged in claims:
        if judged.interval:
            claim, i = judged.claim, judged.interval
            paper_value = {"ratio": 1.0, "difference": 0.0}.get(claim.effect)
            reported = paper_value if claim.numbers else None
            region = (claim.low, claim.high)
            label = f"{claim.id} ({kind(claim)})"
            items.append(
                plots.Effect(label, i.value, i.low, i.high, region, reported, judged.verdict)
            )
    return plots.effects(items) if items else None


# COMMAND =========================================================================================


def build(
    folder: Path, scales: tuple[str, ...]
) -> tuple[dict[Path, str], dict[Path, plots.Picture]]:
    """Pages and pictures, by their paths below docs/."""
    board, everything = {}, {}
    for name in papers.names():
        everything[name] = gather(name, folder, scales)
        claims = papers.load(name).claims
        board[name] = [judge(claim, everything[name]) for claim in claims]
    here = Path("benchmark")
    texts = dict(diff.pages())
    texts |= {here / "scoreboard.md": scoreboard(board), here / "papers.md": index(board)}
    images = {}
    for name, found in everything.items():
        drawn = {}
        picture = claim_picture(board[name])
        if picture:
            text = "effect of each claim with its 95 % interval; shaded: where it holds"
            drawn[f"{name}-claims.png"] = (text, picture)
        for evidence in found.values():
            drawn |= curve_pictures(evidence) | family_pictures(evidence)
        pictures = [(file, text) for file, (text, _) in drawn.items()]
        texts[here / f"{name}.md"] = page(name, found, board[name], pictures)
        images |= {here / "images" / file: made for file, (_, made) in drawn.items()}
    return texts, images


def report(
    check: bool = False,
    smoke: bool = False,
    results: Path = results.RESULTS,
    docs: Path = DOCS,
) -> None:
    """Write the pages of the benchmark and of the diffs.

    Args:
        check: write nothing, fail where a page is not the one that the results give
        smoke: take runs of scale smoke, too; they test the harness and no claim
        results: folder of the results
        docs: folder of the pages
    """
    texts, images = build(results, ORDER if smoke else ORDER[:2])
    kept = {docs / path for path in [*texts, *images]}
    stale = [docs / path for path, text in texts.items() if read(docs / path) != text]
    stale += [docs / path for path, image in images.items() if not image.is_at(docs / path)]
    pages = [*(docs / "diffs").glob("*.md"), *(docs / "benchmark").glob("*.md")]
    gone = [path for path in pages if diff.MADE in read(path)]  # a page by hand stays
    gone += (docs / "benchmark" / "images").glob("*.png")
    gone = [path for path in gone if path not in kept]
    if check:
        if stale or gone:
            names = ", ".join(sorted(jobs.relative(path) for path in [*stale, *gone]))
            raise UserError(f"not what the results give: {names}; run python -m benchmark report")
        return
    for path in stale:
        below = path.relative_to(docs)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            images[below].save(path) if below in images else path.write_text(texts[below])
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        print(jobs.relative(path))
    for path in gone:
        path.unlink()
        print(f"{jobs.relative(path)}: removed")


def read(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.exists() else None


def main(flags: list[str]) -> None:
    tyro.cli(report, prog="python -m benchmark report", args=flags)
