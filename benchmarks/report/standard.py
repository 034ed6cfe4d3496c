"""The pages of the protocol `standard`: a table for each dataset, beside what is published for D4RL's set of that name.

Two scores of a run: of its last evaluation, and the mean of its last five, which vary less by chance.
"""

import tomllib
from pathlib import Path

import numpy as np

from report.estimators import NARROW, mean, with_interval
from report.pictures import curves_of
from report.runs import Failure, Run, join, short, spread

NAME = "standard"
PROTOCOL = tomllib.loads((Path(__file__).parents[1] / "protocols.toml").read_text())[NAME]
FEWEST = 5  # methods that a rank correlation, and README's table, are of


def last_five(run: Run) -> np.ndarray:
    """(seeds,) the mean over the last five evaluations."""
    return run.curve[:, -5:].mean(axis=1)


def ranks(values) -> np.ndarray:
    """From 0; equal values share the mean of their ranks."""
    values = np.asarray(values)
    return (values[:, None] > values).sum(axis=1) + (values[:, None] == values).sum(axis=1) / 2


def rank_correlation(x, y) -> float:
    """Spearman's: Pearson's of the ranks. NaN where all of one are equal."""
    deviations = [ranks(values) - ranks(values).mean() for values in (x, y)]
    size = np.prod([np.linalg.norm(d) for d in deviations])
    return float(np.dot(*deviations) / size) if size else float("nan")


def count(runs: list[Run]) -> str:
    """How many of the protocol's cells are finished."""
    datasets, methods = PROTOCOL["datasets"], PROTOCOL["methods"]
    finished = {(run.dataset, run.method) for run in runs if run.dataset in datasets and run.method in methods}
    cells = f"{len(datasets) * len(methods)} cells ({len(methods)} methods on {len(datasets)} datasets)"
    return f"{len(finished)} of {cells} are finished"


def datasets_of(runs: list[Run]) -> list[str]:
    """Those with a finished run, in the order of the protocol; then what it does not have (after an @: other data)."""
    there = {run.dataset for run in runs}
    return [*(x for x in PROTOCOL["datasets"] if x in there), *sorted(there - PROTOCOL["datasets"].keys())]


def best_first(runs: list[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (-last_five(run).mean(), run.method))


def published_of(run: Run, published: dict) -> str:
    score = published["like"].get(run.dataset, {}).get(run.method)
    return f"({score:.1f})" if score is not None else "–"


def page(runs: list[Run], failures: list[Failure], results: str, root: str, published: dict) -> str:
    """Markdown: what benchmarks/standard.md says. `results` and `root` lead from there to the runs and to the root."""
    parts = [f"**{count(runs)}.**"]
    for dataset in datasets_of(runs):
        own = best_first([run for run in runs if run.dataset == dataset])
        like = published["like"].get(dataset)
        head = [f"(published on {like['name']})"] if like else []
        lines = [["method", "mean of the last five evaluations", "last evaluation", *head]]
        lines.append(["---"] * len(lines[0]))
        for run in own:
            link = join(results, run.place)
            cells = [with_interval(mean, [last_five(run)], link), with_interval(mean, [run.scores])]
            cells += [published_of(run, published)] * bool(like)
            lines.append([f"[{run.method}]({join(root, f'algos/{run.algo}.md')})", *cells])
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        done = {x.method for x in [*own, *failures] if x.dataset == dataset}
        missing = [method for method in PROTOCOL["methods"] if method not in done]
        notes = [f"Not run yet: {', '.join(missing)}."] if missing and dataset in PROTOCOL["datasets"] else []
        both = [(last_five(run).mean(), like[run.method]) for run in own if run.method in (like or {})]
        if len(both) >= FEWEST:
            rho = rank_correlation(*zip(*both, strict=True))
            notes.append(f"Rank correlation with the published scores (Spearman's, {len(both)} methods): {rho:.2f}.")
        more = [f"[{run.method}]({join(results, place)})" for run in own for place in run.more]
        notes += [f"More seeds, in folders of their own: {', '.join(more)}."] * bool(more)
        notes.append(f"[Learning curves]({join(results, curves_of(dataset))}).")
        parts += [f"### {short(dataset)}", table, " ".join(notes)]
    failed = [x for x in failures if not x.refused]
    parts += [" ".join(f"Failed: {x.method} on {short(x.dataset)} ({x.reason})." for x in failed)] * bool(failed)
    return "\n\n".join([*parts, foot(runs, published)] if runs else parts)


def foot(runs: list[Run], published: dict) -> str:
    """What the columns are, and what differs from the published runs."""
    seeds = [len(run.scores) for run in runs]
    updates = spread([run.summary["num_updates"] for run in runs])
    episodes = spread([len(returns) for run in runs for returns in run.summary["returns"]])
    text = (
        f"Each score is a mean over {spread(seeds)} seeds after {updates} updates; an evaluation has {episodes} "
        "episodes of each seed, and five of them vary less by chance than one."
    )
    if min(seeds) > 1:
        text += (
            f" In brackets behind it is the 95 % interval of a bootstrap over the seeds, too narrow with few: {NARROW}."
        )
    if any(run.dataset in published["like"] for run in runs):
        text += (
            f" The last column is published, on D4RL's set of that name ({published['like_source']}), and is no "
            "target: these data were rolled out anew, by policies of other trainings, the environments are v5 of "
            "Gymnasium and not v2 of Gym, and the published runs have 1,000,000 updates (EDAC: 3,000,000)."
        )
    return text


def small(runs: list[Run], failures: list[Failure], results: str, root: str, published: dict) -> str:
    """Markdown for README.md: one table of the protocol's datasets; nothing while too few runs can be compared."""
    runs = [run for run in runs if run.dataset in PROTOCOL["datasets"]]
    datasets = datasets_of(runs)
    if max((sum(run.dataset == dataset for run in runs) for dataset in datasets), default=0) < FEWEST:
        return ""
    methods = list(dict.fromkeys(run.method for run in runs))
    order = [method for method in PROTOCOL["methods"] if method in methods]
    lines = [["method", *map(short, datasets)], ["---"] * (len(datasets) + 1)]
    for method in [*order, *(method for method in methods if method not in order)]:
        cells = dict.fromkeys(datasets, "")
        for run in (run for run in runs if run.method == method):
            cells[run.dataset] = f"[{last_five(run).mean():.1f}]({join(results, run.place)})"
            if published_of(run, published) != "–":
                cells[run.dataset] += f" {published_of(run, published)}"
            algo = run.algo
        lines.append([f"[{method}]({join(root, f'algos/{algo}.md')})", *cells.values()])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    updates = spread([run.summary["num_updates"] for run in runs])
    seeds = spread([len(run.scores) for run in runs])
    text = (
        "With the papers' networks and settings: the mean score of the last five evaluations of "
        f"{updates} updates, over {seeds} seeds, and in parentheses what is published for D4RL's data of the like "
        f"name, after a million updates or more. An empty place is not run yet: {count(runs)}. "
        f"[What differs, intervals and last evaluations]({join(root, 'benchmarks/standard.md')})."
    )
    return f"## Scores on data like D4RL's\n\n{table}\n\n{text}"
