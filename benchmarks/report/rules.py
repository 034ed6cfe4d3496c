"""Which policy would one choose without playing any? Rules that need no environment, and what each of them costs."""

import json
import re
from pathlib import Path

import numpy as np
from plot import read_columns  # benchmarks/plot.py

from report.runs import Run, short
from report.selection import BUDGETS, estimates_beside, halves, selection_curve


def peak(values):
    """Index of the evaluation at which the mean Q of the data is highest, as in Kumar et al. (2021).

    While a critic learns, the mean Q of the data's own actions rises. Where it falls again, CQL and its like over-fit:
    https://arxiv.org/abs/2109.10813. NaN (a critic that diverged) is never the peak; all NaN: the last one.
    """
    values = np.where(np.isfinite(values), values, -np.inf)
    return int(values.argmax()) if np.isfinite(values).any() else len(values) - 1


STOPS = {  # which evaluation of a run each rule takes, from the columns of metrics.jsonl
    "last": lambda run: len(run["score"]) - 1,
    "peak of the data's Q": lambda run: peak(run["q"]),
    "highest believed value": lambda run: peak(run["believed_value"]),
}


def stopping(folder: Path) -> dict[str, list[float]]:
    """{rule: the best evaluation's score less that of the one it takes, for each run}; {} where nothing tells."""
    _, columns = read_columns(folder, ("score", "q", "believed_value"))
    if any(np.isnan(column).all() for column in columns.values()) or np.isnan(columns["score"]).any():
        return {}
    runs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {name: [float(run["score"].max() - run["score"][rule(run)]) for run in runs] for name, rule in STOPS.items()}


def stopping_table(found: list[tuple[Path, Run]]) -> str:
    """Markdown: for each dataset, what stopping each run by a rule costs: of all methods with a critic, and of CQL."""
    rows = {}
    for folder, run in found:
        for rule, regrets in stopping(folder).items():
            for group in ("all", *(["CQL"] if run.algo.startswith("cql") else [])):  # for which the peak was proposed
                rows.setdefault((run.dataset, group), {}).setdefault(rule, []).extend(regrets)
    lines = [f"| dataset | methods with a critic | runs | {' | '.join(STOPS)} |", "| --- " * (len(STOPS) + 3) + "|"]
    for (dataset, group), regrets in sorted(rows.items()):
        cells = [f"{np.mean(regrets[rule]):.1f}" for rule in STOPS]
        lines.append("| " + " | ".join([short(dataset), group, str(len(regrets["last"])), *cells]) + " |")
    return "\n".join(lines) if rows else ""


def report_stopping(found: list[tuple[Path, Run]]):
    if table := stopping_table(found):
        print(
            "\nWhich evaluation of a run to take: its score below that of the run's best evaluation, mean over the runs"
        )
        print(table)


def choices(policies: list[dict]) -> dict[str, list[int]]:
    """{rule: the policies that it cannot tell from the best}. A lower bound is that of the estimator's interval.

    Of each training, whose snapshots are folders with different num_updates, the last one and the peak of the data's Q
    take one policy; which training to take they do not say.
    """
    trainings = {}
    for i in sorted(range(len(policies)), key=lambda i: policies[i]["updates"]):
        name = re.sub(r",num_updates=\d+", "", policies[i]["folder"])
        trainings.setdefault((name, policies[i]["seed"], json.dumps(policies[i]["grid"])), []).append(i)
    chosen = {"the last checkpoint": [of[-1] for of in trainings.values()]}
    data_q = [np.array([policies[i].get("q") for i in of], float) for of in trainings.values()]
    if any(np.isfinite(q).sum() > 1 for q in data_q):
        pairs = zip(trainings.values(), data_q, strict=True)
        chosen["peak of the data's Q"] = [of[peak(q)] for of, q in pairs]
    names = list(dict.fromkeys(name for row in policies for name in row["estimates"]))
    columns = {name: (name, 0) for name in names if name not in ("constant", "ESS")}
    columns |= {f"{name}, lower bound": (name, 1) for name in ("FQE", "PDWIS") if name in names}
    for rule, (name, i) in columns.items():
        values = np.array([row["estimates"].get(name, (None,) * 3)[i] for row in policies], float)
        if np.isfinite(values).any():
            chosen[rule] = np.flatnonzero(values == np.nanmax(values)).tolist()
    return chosen


def report_choices(found: list[tuple[Path, Run]]):
    """Prints, for each dataset with estimates, which policy each rule chooses, beside a bandit's choice."""
    for dataset in sorted({run.dataset for _, run in found}):
        policies = []
        for folder, run in found:
            beside = estimates_beside(folder) if run.dataset == dataset else {}
            grid = run.summary.get("grid") or [{}] * len(run.scores)
            seeds = run.summary.get("seeds") or range(len(run.scores))
            for i, at in enumerate(zip(seeds, map(json.dumps, grid), strict=True)):
                if row := beside.get((folder.name, *at)):
                    policies.append(row | {"returns": run.summary["returns"][i], "score": run.scores[i]})
        if policies:
            print(f"\n{dataset}: which of {len(policies)} policies to take. Regret: score below that of the best one")
            print(choices_table(policies))


def choices_table(policies: list[dict]) -> str:
    """Markdown, of policies as benchmarks/ope.py leaves them, with the score and returns of their last evaluation.

    By the halves of report.selection where the policies were scored: no episode chooses and scores.
    """
    returns, scores = [row["returns"] for row in policies], np.array([row["score"] for row in policies], float)
    known = np.isfinite(scores).all() and len({len(x) for x in returns}) == 1 and len(returns[0]) > 1
    lines, best = [], np.nan
    if known:
        parts = list(halves(returns, scores))
        best = np.mean([score[half.mean(axis=1).argmax()] for half, score in parts])
        curves = [selection_curve(*part, max(BUDGETS), len(scores), num_trials=500).mean(axis=1) for part in parts]
        lines = [(f"a bandit, {n} episodes", "", np.mean(curves, axis=0)[n]) for n in BUDGETS]
    for rule, index in choices(policies).items():
        first, one = policies[index[0]], len(index) == 1
        grid = "".join(f", {name} {value:g}" for name, value in first["grid"].items())
        policy = f"{first['folder']}, seed {first['seed']}{grid}" if one else f"any of {len(index)}"
        lines.append((rule, policy, scores[index].mean()))
    rows = ["| rule | chosen | score | regret |", "| --- | --- | --- | --- |"]
    for rule, policy, score in sorted(lines, key=lambda line: -line[2] if known else 0):
        numbers = (f"{score:.1f}", f"{best - score:.1f}") if known else ("–", "–")
        rows.append("| " + " | ".join([rule, policy, *numbers]) + " |")
    return "\n".join(rows)
