"""The answer of a sweep: the score at each value of what was swept, and which value is best."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from plot import COLOURS, caption, save  # benchmarks/plot.py

from report.estimators import NARROW, interval, mean, with_interval
from report.runs import Sweep, in_order, short, spread


def best_of(sweep: Sweep) -> tuple | None:
    """The point with the highest mean score, of those with a score of every seed; None where none has them."""
    scored = [point for point, (scores, _) in sweep.points.items() if not np.isnan(scores).any()]
    return max(scored, key=lambda point: sweep.points[point][0].mean(), default=None)


def ends(sweep: Sweep, point: tuple) -> np.ndarray:
    """(2,) of its interval; the score itself, twice, where one seed gives none; NaN without scores."""
    scores = sweep.points[point][0]
    return np.array([scores.mean()] * 2) if len(scores) == 1 else interval(mean, [scores])


def rivals(sweep: Sweep, best: tuple) -> list[tuple]:
    """The other points, of which the interval reaches that of the best one."""
    low, _ = ends(sweep, best)
    return [point for point in sweep.points if point != best and ends(sweep, point)[1] >= low]


def best_over_the_rest(sweep: Sweep, field: str) -> dict[str, tuple | None]:
    """Each value of a field, and the best point that has it."""
    i = sweep.fields.index(field)
    values = sorted({point[i] for point in sweep.points}, key=lambda value: in_order((value,)))
    return {v: best_of(sweep._replace(points={p: x for p, x in sweep.points.items() if p[i] == v})) for v in values}


def sentence(sweep: Sweep) -> str:
    best = best_of(sweep)
    where = about(sweep)
    if best is None:
        return f"{where}: no value has a score for each of its seeds, so none can be called the best ({sweep.kind})."
    others = rivals(sweep, best)
    if not others:
        doubt = "No other interval reaches its own."
    elif len(others) == len(sweep.points) - 1:
        doubt = "The intervals of all others reach its own: they cannot be told apart."
    else:
        doubt = f"Intervals that reach its own: {'; '.join(say(sweep, point) for point in others)}."
    return f"{where}: best of {len(sweep.points)} is {say(sweep, best)}, score {cell(sweep, best)}. {doubt}"


def about(sweep: Sweep) -> str:
    named = sweep.name in (sweep.algo, f"{sweep.dataset.removeprefix('stitch/')}/{sweep.algo}")
    return f"{sweep.algo} on {sweep.dataset}" + ("" if named else f" ({sweep.name})")


def say(sweep: Sweep, point: tuple) -> str:
    return ", ".join(f"{field} {plain(value)}" for field, value in zip(sweep.fields, point, strict=True))


def plain(value: str) -> str:
    """A JSON value as a reader writes it: 1 for 1.0, and no quotation marks."""
    return str(json.loads(value)).removesuffix(".0")


def cell(sweep: Sweep, point: tuple) -> str:
    scores, diverged = sweep.points[point]
    text = "not scored" if np.isnan(scores).any() else with_interval(mean, [scores])
    return text + (f"; {diverged.sum()} of {len(diverged)} diverged" if diverged.any() else "")


def section(sweep: Sweep) -> str:
    """Markdown: the answer, a row for each point, and the picture."""
    best = best_of(sweep)
    lines = [[*sweep.fields, "score"], ["---"] * (len(sweep.fields) + 1)]
    for point in sweep.points:
        cells = [*map(plain, point), cell(sweep, point)]
        lines.append([f"**{text}**" for text in cells] if point == best else cells)
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = [len(scores) for scores, _ in sweep.points.values()]
    updates = spread([run.summary["num_updates"] for run in sweep.runs])
    foot = f"Score of the last evaluation after {updates} updates ({sweep.kind}): mean over {spread(seeds)} seeds"
    if min(seeds) > 1:
        foot += f" and, in brackets, the 95 % interval of a bootstrap over them, too narrow with few seeds: {NARROW}"
    foot += (
        ". The best of several is flattered by the episodes that chose it: before you report its score, train it with "
        "other seeds."
    )
    picture = picture_of(sweep)
    link = f"![score of {sweep.name} at each value]({picture})"
    return "\n\n".join([f"## Sweep of {' and '.join(sweep.fields)}: {about(sweep)}", sentence(sweep), rows, foot, link])


def picture_of(sweep: Sweep) -> str:
    parts = [sweep.name, *(part for part in (sweep.algo, short(sweep.dataset)) if part not in sweep.name)]
    return f"sweep_{re.sub(r'[^A-Za-z0-9.-]+', '-', '_'.join(parts))}.png"


def draw(sweep: Sweep, path: Path, source: str):
    """A panel for each field: of each value the best point over the other fields and its interval; all in grey."""
    count = len(sweep.fields)
    figure, axes = plt.subplots(
        1, count, figsize=(max(5, 3.4 * count), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, field, colour in zip(axes[0], sweep.fields, COLOURS * count, strict=False):
        i, chosen = sweep.fields.index(field), best_over_the_rest(sweep, field)
        place = {value: x for x, value in enumerate(chosen)}
        if count > 1:
            panel.plot(
                [place[point[i]] for point in sweep.points],
                [scores.mean() for scores, _ in sweep.points.values()],
                color="#BBBBBB", marker=".", linestyle="none",
            )  # fmt: skip
        scores = {value: sweep.points[point][0] for value, point in chosen.items() if point}
        x, middle = [place[value] for value in scores], [score.mean() for score in scores.values()]
        bounds = np.array([interval(mean, [score]) for score in scores.values()]).reshape(-1, 2)
        panel.vlines(x, *bounds.T, color=colour, linewidth=6, alpha=0.3)
        panel.plot(x, middle, color=colour, marker="o")
        panel.set_xticks(range(len(place)), map(plain, place))
        panel.set_xlim(-0.5, len(place) - 0.5)
        panel.set_xlabel(field)
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes[0, 0].set_ylabel("score")
    figure.suptitle(f"{sweep.algo} on {sweep.dataset}", fontsize=11)
    what = "Of each value the best point over the other fields; all points in grey. " if count > 1 else ""
    seeds = [len(scores) for scores, _ in sweep.points.values()]
    bars = (
        f"Bars: 95 % bootstrap interval over {spread(seeds)} seeds. " if min(seeds) > 1 else "One seed: no interval. "
    )
    caption(figure, f"{what}{bars}Score: {sweep.kind}.")
    save(figure, path, source)
