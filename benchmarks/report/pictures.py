"""Pictures: a title of one line and, below, a caption that says what is drawn."""

import hashlib
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from plot import COLOURS, caption, save  # benchmarks/plot.py

from report import sweeps
from report.estimators import NARROW, improvement, interval, iqm, mean, profile
from report.online import is_online, since_switch
from report.runs import Failure, Results, Run, comparable, short, spread


def curves_of(dataset: str) -> str:
    return f"learning_curves_{short(dataset)}.png"


def pictures(runs: list[Run], failures: list[Failure]) -> dict[str, list[Run]]:
    """The name of each picture of a table, and the runs that it shows."""
    names = {}
    datasets, rows = comparable(runs, failures)
    if len(datasets) > 1 and rows:
        names = dict.fromkeys(("iqm.png", "performance_profiles.png", "probability_of_improvement.png"), runs)
    for dataset in sorted({run.dataset for run in runs}):
        names[curves_of(dataset)] = [run for run in runs if run.dataset == dataset]
    return names


def draw(found: Results, folder: Path):
    runs, failures, _ = found
    for sweep in found.sweeps:
        sweeps.draw(sweep, folder / sweeps.picture_of(sweep), digest(sweep.runs))
    shown = pictures(runs, failures)
    for dataset in sorted({run.dataset for run in runs}):
        name = curves_of(dataset)
        curves = {run.method: learning_curve(run.steps, run.curve) for run in shown[name]}
        labels = {"title": dataset, "xlabel": "updates of each seed", "ylabel": "score"}
        text = f"Mean of the seeds. Band: {band([run.scores for run in shown[name]])}."
        if is_online(shown[name]):
            curves = {run.method: learning_curve(since_switch(run), run.curve) for run in shown[name]}
            labels["xlabel"] = "steps on-line (up to 0: updates on the data)"
        draw_panels(curves, folder / name, digest(shown[name]), text, **labels)
    datasets, rows = comparable(runs, failures)
    if len(datasets) < 2 or not rows:
        if len({run.dataset for run in runs}) > 1:
            print("No method has normalised scores on all datasets that most have: no picture is over all datasets.")
        return
    over = f"Over {', '.join(map(short, datasets))}."
    of = band([scores for row in rows.values() for scores in row])
    scores = np.concatenate([scores for row in rows.values() for scores in row])
    levels = np.linspace(min(0, scores.min()), max(100, scores.max()), 101)
    shares = partial(profile, levels=levels)
    curves = {method: (levels, shares(row), *interval(shares, row)) for method, row in rows.items()}
    labels = {"title": "Performance profiles", "xlabel": "score", "ylabel": "share of runs above"}
    draw_panels(curves, folder / "performance_profiles.png", digest(runs), f"{over} Band: {of}.", **labels)
    draw_iqm(rows, f"{over} Bar: {of}.", folder / "iqm.png", digest(runs))
    draw_improvement(rows, over, folder / "probability_of_improvement.png", digest(runs))


def band(scores: list[np.ndarray]) -> str:
    """What the band of a picture is."""
    seeds = [len(x) for x in scores]
    if min(seeds) == 1:
        return "none where there is 1 seed, else the 95 % bootstrap interval" if max(seeds) > 1 else "none, of 1 seed"
    text = f"95 % bootstrap interval over {spread(seeds)} seeds"
    return text + f", too narrow: {NARROW}" if min(seeds) < 5 else text


def digest(runs: list[Run]) -> str:
    return hashlib.sha256(" ".join(f"{run.method} {run.digest}" for run in runs).encode()).hexdigest()


def stale_pictures(found: Results, folder: Path) -> list[str]:
    """Those that are missing, or of other result files than these. How they are drawn is not compared."""
    stale = []
    shown = pictures(found.runs, found.failures) | {sweeps.picture_of(sweep): sweep.runs for sweep in found.sweeps}
    for name, runs in shown.items():
        if not (folder / name).exists() or Image.open(folder / name).info.get("Source") != digest(runs):
            stale.append(name)
    return stale


def learning_curve(steps, curve):
    """Updates, and the mean score of the seeds (seeds, evaluations) with its interval, each (evaluations,)."""
    bounds = [interval(mean, [evaluation]) for evaluation in curve.T]
    return steps, curve.mean(axis=0), *np.transpose(bounds)


def draw_panels(curves, path, source, text, title, xlabel, ylabel, **settings):
    """A panel for each of {name: (x, middle, low, high)}, before the others in grey: many lines stay readable so."""
    width = min(4, len(curves))
    height = math.ceil(len(curves) / width)
    size = (max(5, 3 * width), 2.2 * height + 0.9)
    axes_of = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(height, width, figsize=size, **axes_of)
    for i, (panel, (name, (x, middle, low, high))) in enumerate(zip(axes.flat, curves.items(), strict=False)):
        for other in curves.values():
            panel.plot(*other[:2], color="#D0D0D0", linewidth=1)
        colour = COLOURS[i % len(COLOURS)]
        panel.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        panel.plot(x, middle, color=colour, linewidth=2)
        panel.set_title(name, fontsize=11)
        panel.tick_params(labelsize=8, labelbottom=i + width >= len(curves))  # nothing below it
        panel.set(**settings)
    for panel in axes.flat[len(curves) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(xlabel, fontsize=11)
    figure.supylabel(ylabel, fontsize=11)
    caption(figure, text)
    save(figure, path, source)


def draw_iqm(rows, text, path, source):
    order = sorted(rows, key=lambda method: iqm(rows[method]))
    figure, axes = plt.subplots(figsize=(6, 0.32 * len(rows) + 1.2), layout="constrained")
    for y, method in enumerate(order):
        axes.plot(interval(iqm, rows[method]), [y, y], color=COLOURS[0], linewidth=6, alpha=0.3, solid_capstyle="butt")
        axes.plot(iqm(rows[method]), y, color=COLOURS[0], marker="o")
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("score")
    axes.set_title("Interquartile mean of the scores", fontsize=11)
    caption(figure, text)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    save(figure, path, source)


def draw_improvement(rows, text, path, source):
    names = sorted(rows, key=lambda method: -iqm(rows[method]))
    figure, axes = plt.subplots(figsize=(0.5 * len(names) + 2, 0.4 * len(names) + 1.8), layout="constrained")
    chance = np.array([[improvement(rows[x], rows[y]) for y in names] for x in names])
    axes.imshow(chance, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(chance.shape):
        if i != j:
            low, high = interval(improvement, rows[names[i]], rows[names[j]])
            weight = "bold" if low > 0.5 or high < 0.5 else "normal"
            colour = "white" if abs(chance[i, j] - 0.5) > 0.3 else "black"
            axes.text(j, i, f"{chance[i, j]:.2f}", ha="center", va="center", fontsize=8, weight=weight, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Probability that the row is better than the column", fontsize=11)
    # 9 %: of pairs of the same normal scores, 3 seeds on each of 3 datasets
    caption(
        figure,
        f"{text} Bold: the 95 % bootstrap interval of this pair by itself excludes 0.5. With 3 seeds on 3 datasets it "
        "does so in 9 % of pairs that do not differ.",
    )
    save(figure, path, source)
