"""Tables: a row for each method, a column for each dataset. Into pages between marks, or into a report of their own."""

import json
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import speed  # benchmarks/speed.py
import speed_act  # benchmarks/speed_act.py
import speed_online  # benchmarks/speed_online.py
from sweep import write  # benchmarks/sweep.py

from report import standard, sweeps
from report.estimators import NARROW, iqm, mean, with_interval
from report.online import is_online, online_table
from report.pictures import curves_of, pictures
from report.rules import stopping_table
from report.runs import Failure, Results, Run, comparable, join, short, spread

PUBLISHED = tomllib.loads((Path(__file__).parents[1] / "published.toml").read_text())


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "benchmarks").glob("*.md")), *sorted((root / "algos").glob("*.md"))]


def marked(root: Path, protocol: str) -> bool:
    """Whether a page has a place for the table of a folder in benchmarks/results."""
    return any(f"<!-- report:{protocol}:begin -->" in page.read_text() for page in pages(root) if page.exists())


def write_tables(root: Path, protocol: str, runs: list[Run], failures: list[Failure], check: bool) -> list[str]:
    """Fills the marked places of README.md and the pages; returns the files that were not up to date.

    A page in algos/ has the rows of its own algorithm, the others the whole table.
    """
    stale, whole = [], 0
    results = root / "benchmarks" / "results"
    for page in pages(root):
        text = new = page.read_text()
        algo = page.stem if page.parent.name == "algos" else None
        if f"<!-- report:{protocol}:" in text:
            to_root = os.path.relpath(root, page.parent)
            to_results = os.path.relpath(results / protocol, page.parent)
            shown = table(runs, failures, to_results, algo, to_root)
            if is_online(runs):
                own = [run for run in runs if algo in (None, run.algo)]
                links = [(join(to_results, run.place), join(to_root, f"algos/{run.algo}.md")) for run in own]
                shown = online_table(own, links, [results / protocol / run.place for run in own])
            if protocol == standard.NAME and algo is None:
                write_up = standard.small if page.parent == root else standard.page
                shown = write_up(runs, failures, to_results, to_root, PUBLISHED)
            new = fill(new, protocol, shown, page)
            whole += algo is None
        for name in re.findall("<!-- report:speed:(.*):begin -->", text):
            measured = json.loads((results / f"speed-{name}.json").read_text())
            new = fill(new, f"speed:{name}", speed.table(measured), page)
        if "<!-- report:speed-online:begin -->" in text:
            measured = json.loads((results / "online-speed.json").read_text())
            new = fill(new, "speed-online", speed_online.table(measured), page)
        if "<!-- report:speed-act:begin -->" in text and (results / "act-speed.json").exists():
            measured = json.loads((results / "act-speed.json").read_text())
            new = fill(new, "speed-act", speed_act.table(measured), page)
        if f"<!-- report:stopping:{protocol}:begin -->" in text:
            found = [(results / protocol / run.place, run) for run in runs]
            new = fill(new, f"stopping:{protocol}", stopping_table(found), page)
        stale += put(page, new, check, page.relative_to(root).as_posix())
    if not whole:
        marks = " and, below it, ".join(f"<!-- report:{protocol}:{edge} -->" for edge in ("begin", "end"))
        raise SystemExit(f"README.md or a page in benchmarks/ needs the lines {marks}: the table goes between them.")
    return stale


def write_own(root: Path, folder: Path, found: Results, check: bool) -> list[str]:
    """FOLDER/report.md: the table and the sweeps, with the pictures that `draw` leaves beside it."""
    lines = [f"# {folder.resolve().name}"]
    if found.runs or any(not failure.refused for failure in found.failures):
        to_root = os.path.relpath(root.resolve(), folder.resolve())
        lines += ["", table(found.runs, found.failures, ".", root=to_root)]
    for name in pictures(found.runs, found.failures):
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    for sweep in found.sweeps:
        lines += ["", sweeps.section(sweep)]
    return put(folder / "report.md", "\n".join(lines) + "\n", check, "report.md")


def fill(text: str, mark: str, shown: str, page: Path) -> str:
    """The text with `shown` between its marks."""
    begin, end = (f"<!-- report:{mark}:{edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page} needs one line {begin} and, below it, one line {end}.")
    return "".join([text.split(begin)[0], begin, "\n", shown, "\n", end, text.split(end)[1]])


def put(page: Path, new: str, check: bool, name: str) -> list[str]:
    """[name] where the page was not up to date."""
    if page.exists() and page.read_text() == new:
        return []
    if not check:
        write(page, new)
        print(page)
    return [name]


def table(runs: list[Run], failures: list[Failure], results: str, algo: str | None = None, root: str = ".") -> str:
    """Markdown: the rows of all methods, or of one algorithm's.

    `results` and `root` lead from the page to the folder of the runs and to the root.
    """
    aggregated, rows = comparable(runs, failures)

    def rank(method: str):
        """The highest IQM first; then those without one, by the mean of the scores that they have."""
        scores = [run.scores for run in runs if run.method == method]
        return method not in rows, -iqm(rows[method] if method in rows else scores) if scores else np.inf

    runs = [run for run in runs if algo in (None, run.algo)]
    failures = [failure for failure in failures if algo in (None, failure.algo)]
    failed = [failure for failure in failures if not failure.refused]
    if not (runs or failed):
        return "No run yet."
    kinds = {run.dataset: run.summary["score_kind"] for run in runs}
    drawn = set(kinds)
    kinds |= {failure.dataset: "not scored" for failure in failed if failure.dataset not in kinds}
    published = {dataset: PUBLISHED["scores"][dataset] for dataset in kinds if dataset in PUBLISHED["scores"]}
    several = len(aggregated) > 1
    lines = [["method"], ["---"] * (len(kinds) + 1 + several)]
    for dataset, kind in kinds.items():
        link = f"[{short(dataset)}]({join(results, curves_of(dataset))})" if dataset in drawn else short(dataset)
        lines[0].append(link if kind.startswith("normalised") else f"{link}, {kind}")
    lines[0] += ["IQM"] * several
    for method, name in sorted(sorted({(x.method, x.algo) for x in [*runs, *failed]}), key=lambda x: rank(x[0])):
        cells = dict.fromkeys(kinds, "not run")
        for failure in failures:
            if failure.method == method and failure.dataset in kinds:
                cells[failure.dataset] = "–" if failure.refused else "failed"
        for run in runs:
            if run.method == method:
                cells[run.dataset] = with_interval(mean, [run.scores], join(results, run.place))
                if method in published.get(run.dataset, {}):
                    cells[run.dataset] += f"; published {published[run.dataset][method]:.1f}"
                if run.diverged.any():
                    cells[run.dataset] += f"; {run.diverged.sum()} of {len(run.scores)} diverged"
        total = [with_interval(iqm, rows[method]) if method in rows else "–"] * several
        lines.append([f"[{method}]({join(root, f'algos/{name}.md')})", *cells.values(), *total])
        values = {run.dataset: run.values for run in runs if run.method == method and len(run.values)}
        if algo and values:  # on its page
            cells = [over_estimation(values[dataset]) if dataset in values else "–" for dataset in kinds]
            lines.append(["believed − true value", *cells, *["–"] * several])
        by_task = {run.dataset: of_tasks(run) for run in runs if run.method == method and of_tasks(run)}
        if by_task:
            lines.append(["on each task", *(by_task.get(dataset, "–") for dataset in kinds), *["–"] * several])
    foot = [footnote(runs)] if runs else []
    if any("believed" in line[0] for line in lines):
        foot.append(
            "Below it: what the critic believes of the policy at the start states, less what the policy gets there "
            "(in brackets), with rewards as the method sees them; means over the seeds."
        )
    if any("on each task" in line[0] for line in lines):
        foot.append("On each task: the success on task 1, 2, ... of the data's, in %, a mean over the seeds.")
    exact = [run for run in runs if run.summary["score_kind"].endswith("exact")]
    if exact:
        draws = spread([len(returns) for run in exact for returns in run.summary["returns"]])
        foot.append(
            f"On {', '.join(sorted({short(run.dataset) for run in exact}))} no episode is played: a policy is "
            "evaluated exactly, by dynamic programming; a stochastic one's probabilities are the frequencies of "
            f"{draws} draws in each state."
        )
    if several:
        foot.append(f"IQM: interquartile mean over {', '.join(map(short, aggregated))}.")
    if any(run.diverged.any() for run in runs):
        foot.append("Diverged: the networks of that seed are not finite.")
    if any("@" in dataset for dataset in kinds):
        foot.append(
            "After an @: which data, or which scores, where one name has several. They are in no mean together."
        )
    if any(failure.refused for failure in failures):
        foot.append("A dash: the method does not take that dataset's actions.")
    foot += [f"Failed: {failure.method} on {short(failure.dataset)} ({failure.reason})." for failure in failed]
    for source in dict.fromkeys(scores.get("source", PUBLISHED["source"]) for scores in published.values()):
        foot.append(f"Published: {source}.")
    if all(dataset.startswith("stitch/") for dataset in kinds) and not published:
        foot.append(
            "The data are rebuilt by recipes: published scores are on other data, not comparable, and not shown."
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + " ".join(foot)


def footnote(runs: list[Run]) -> str:
    """What a score is, and its interval."""
    seeds = [len(run.scores) for run in runs]
    episodes = spread([len(returns) for run in runs for returns in run.summary["returns"]])
    updates = spread([run.summary["num_updates"] for run in runs])
    foot = f"Score of the last evaluation ({episodes} episodes) after {updates} updates: "
    if max(seeds) == 1:
        return foot + "1 seed, of whose spread nothing is known."
    return foot + (
        f"mean over {spread(seeds)} seeds and, in brackets, the 95 % interval of a bootstrap over them, which is "
        f"too narrow with few seeds: {NARROW}."
    )


def of_tasks(run: Run) -> str:
    """Mean over the seeds of the success on each task; nothing where the data have no tasks."""
    return ", ".join(f"{x:.0f}" for x in np.mean(run.summary.get("success_per_task") or [[]], axis=0))


def over_estimation(values):
    believed, true = values.mean(axis=0)
    if np.isnan(believed - true):
        return "–"
    return f"{number(believed - true, '+')} ({number(true)})"


def number(x, sign=""):
    """Three digits, and whole numbers in full up to a million."""
    return f"{x:{sign},.0f}" if 100 <= abs(x) < 1e6 else f"{x:{sign}.3g}"
