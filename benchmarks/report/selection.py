"""How good is the policy that one would choose, among several, by a few evaluation episodes?"""

import json
import os
from pathlib import Path

import numpy as np

from report.pictures import draw_panels
from report.runs import apart, read_run, short

BUDGETS = (0, 1, 10, 100)  # evaluation episodes, in the table


def selection_curve(returns, scores, num_episodes, num_candidates=8, num_trials=1_000, seed=0):
    """Scores of the policies chosen after 0 .. num_episodes evaluation episodes: (num_episodes + 1, num_trials).

    In each trial UCB1 (Auer et al. 2002) spends episodes on candidates drawn from the policies. An episode is one of
    the recorded `returns` (policies, episodes) of its policy, with replacement. Chosen is the highest mean so far, or
    any candidate after no episode; `scores` (policies,) say how good it is, and must be of other episodes than these.
    Unlike evaluation.py of unifloral at f2dc127, returns are scaled to [0, 1], as UCB1's bonus needs, and what was not
    tried is not chosen (there its mean is 0).
    """
    returns, scores = np.asarray(returns, float), np.asarray(scores, float)
    rng = np.random.default_rng(seed)
    unit = (returns - returns.min()) / (np.ptp(returns) or 1)
    order = np.tile(np.arange(len(scores)), (num_trials, 1))
    arms = rng.permuted(order, axis=1)[:, :num_candidates]  # (trials, candidates): argmax breaks ties at random
    trials = np.arange(num_trials)
    count, total = np.zeros(arms.shape), np.zeros(arms.shape)
    chosen = [scores[arms[:, 0]]]
    for played in range(num_episodes):
        tried = np.maximum(count, 1)
        bound = np.where(count > 0, total / tried + np.sqrt(2 * np.log(max(played, 1)) / tried), np.inf)
        pull = bound.argmax(axis=1)
        episode = rng.integers(unit.shape[1], size=num_trials)
        total[trials, pull] += unit[arms[trials, pull], episode]
        count[trials, pull] += 1
        best = np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax(axis=1)
        chosen.append(scores[arms[trials, best]])
    return np.array(chosen)


def halves(returns, scores):
    """Twice: the `returns` (policies, episodes) of half of the episodes, and the scores (policies,) of the other half.

    The score of the episodes with which a policy was chosen flatters it: of equal policies, the luckiest is chosen. So
    no episode does both, unlike in unifloral's evaluation.py, whose 1,000 episodes of each policy hide that.
    A score is a linear function of the mean return, which is known from the scores of all episodes.
    """
    returns, scores = np.asarray(returns, float), np.asarray(scores, float)
    means = returns.mean(axis=1)
    slope = 0 if np.allclose(means, means[0]) else np.ptp(scores) / np.ptp(means)
    for first, second in ((returns[:, ::2], returns[:, 1::2]), (returns[:, 1::2], returns[:, ::2])):
        yield first, scores + slope * (second.mean(axis=1) - means)


def estimates_beside(run: Path) -> dict:
    """What benchmarks/ope.py left of this run folder and its siblings: {(name, seed, grid): its row}."""
    folder = run.resolve().parent
    try:
        rows = json.loads((folder.with_name(folder.name + "-ope") / "ope.json").read_text())["policies"]
        return {(row["folder"], row["seed"], json.dumps(row["grid"])): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report_selection(folders, num_candidates: int, out: Path | None):
    """Prints a table of what one would have chosen, and draws it against the number of episodes, for each dataset.

    The last column is the policy that is best by one half of the episodes, scored by the other. Returns the runs, as
    (folder, Run).
    """
    found, kept, policies = [], [], {}
    for folder in folders:
        try:
            found.append(read_run(Path(folder), Path(folder).parent))
            kept.append(Path(folder))
        except (Exception, SystemExit) as error:  # torn, foreign or incomplete, each in its own way
            print(f"{folder} holds no finished run ({type(error).__name__}: {error}): it is left out.")
    found = list(zip(kept, apart(found), strict=True))
    for _, run in found:
        returns, scores = policies.setdefault(run.dataset, {}).setdefault(run.algo, ([], []))
        returns += run.summary["returns"]
        scores += list(run.scores)
    if not policies:
        raise SystemExit("None of these folders holds a finished run.")
    out = out or Path(os.path.commonpath([Path(folder).resolve() for folder in folders]))
    print(f"| dataset | algorithm | policies | score after {' | '.join(map(str, BUDGETS))} episodes | best policy |")
    print("| --- " * (len(BUDGETS) + 4) + "|")
    for dataset, by_algo in sorted(policies.items()):
        blind = all(np.isnan(run.scores).all() for _, run in found if run.dataset == dataset)
        if blind and any(estimates_beside(folder) for folder, run in found if run.dataset == dataset):
            continue  # no episode to choose by, but report.rules has others
        curves = {}
        for algo, (returns, scores) in sorted(by_algo.items()):
            if len({len(episodes) for episodes in returns}) > 1 or np.isnan(scores).any():
                raise SystemExit(f"{algo} on {dataset}: not all runs were scored, with the same number of episodes.")
            if len(returns[0]) < 2:
                raise SystemExit(f"{algo} on {dataset}: one episode cannot both choose a policy and score it.")
            parts = list(halves(returns, scores))
            chosen = [selection_curve(*part, max(BUDGETS), num_candidates, num_trials=500) for part in parts]
            chosen = np.concatenate(chosen, axis=1)
            best = np.mean([score[half.mean(axis=1).argmax()] for half, score in parts])
            cells = [f"{chosen[n].mean():.1f}" for n in BUDGETS]
            print("| " + " | ".join([dataset, algo, str(len(scores)), *cells, f"{best:.1f}"]) + " |")
            curves[algo] = (range(len(chosen)), chosen.mean(axis=1), *np.percentile(chosen, [5, 95], axis=1))
        text = "Score of the chosen policy in other episodes than those that chose it: mean, and 90 % of the trials."
        labels = {"title": dataset, "xlabel": "evaluation episodes", "ylabel": "score"}
        ticks = {"xscale": "symlog", "xticks": BUDGETS, "xticklabels": BUDGETS}
        draw_panels(curves, out / f"selection_{short(dataset)}.png", "", text, **labels, **ticks)
    return found
