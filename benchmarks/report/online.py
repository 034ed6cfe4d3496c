"""Runs that go on on-line: scores at the switch and after some steps, instead of the table of last evaluations."""

from pathlib import Path

import numpy as np
from plot import read_columns  # benchmarks/plot.py

from report.estimators import NARROW, mean, with_interval
from report.runs import Run, short, spread

STEPS = (0, 1_000, 5_000, 20_000)  # on-line; 0: the score at the switch


def is_online(runs: list[Run]) -> bool:
    return any(run.config.get("online_steps") for run in runs)


def since_switch(run: Run) -> np.ndarray:
    """Steps on-line at each evaluation (n,); those before the switch count back from it, in updates."""
    return run.steps - (run.steps[-1] - run.config["online_steps"])


def online_table(runs: list[Run], links: list[tuple[str, str]], folders: list[Path]) -> str:
    """Markdown: a row for each run, in the order of their scores after 5,000 steps. Beside each: links to its folder
    and to the page of its algorithm, and the folder itself."""
    if not runs:
        return "No run yet."
    heads = ["at the switch", *(f"after {n:,}" for n in STEPS[1:]), f"regret to {STEPS[2]:,}"]
    lines = [["data", "method", *heads], ["---"] * (len(heads) + 2)]
    rows = []
    for run, (link, page), folder in zip(runs, links, folders, strict=True):
        at = {n: run.curve[:, i] for i, n in enumerate(since_switch(run))}
        cells = [with_interval(mean, [at[n]], link if n else "") if n in at else "–" for n in STEPS]
        regret = read_columns(folder, ["regret"])[1]["regret"]
        paid = [regret[:, i].mean() for i, n in enumerate(since_switch(run)) if n == STEPS[2]]
        cells.append(f"{paid[0]:.0f}" if paid else "–")
        rank = -at[STEPS[2]].mean() if STEPS[2] in at else np.inf
        rows.append((run.dataset, rank, [short(run.dataset), f"[{run.method}]({page})", *cells]))
    lines += [cells for _, _, cells in sorted(rows, key=lambda row: row[:2])]
    seeds = spread([len(run.scores) for run in runs])
    episodes = spread([len(returns) for run in runs for returns in run.summary["returns"]])
    offline = spread([run.config["num_updates"] for run in runs if run.config["num_updates"]] or [0])
    foot = (
        f"Score of one evaluation ({episodes} episodes), at the switch after {offline} updates on the data and after "
        f"as many steps on-line as the column says: mean over {seeds} seeds and, in brackets, the 95 % interval of a "
        f"bootstrap over them, too narrow with few seeds: {NARROW}. A dash: not trained so long, or not on the data "
        "alone. Regret: by how much the scores of a seed's own episodes stay below 100, on average over them."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot
