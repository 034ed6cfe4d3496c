"""Dataset cards: what is in a dataset, from the dataset in Minari's folder."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from play import dataset_tasks, make_env  # benchmarks/play.py
from plot import COLOURS, GOAL, START, draw_maze, maze_of, save, walks_of  # benchmarks/plot.py
from sweep import write  # benchmarks/sweep.py

from report.runs import short, spread
from report.tables import fill


def write_card(dataset_id: str, out: Path):
    """DATASET.md and DATASET.png, from the dataset in Minari's folder. The picture is the histogram of its returns or,
    of a maze without rewards, where its episodes are and what the tasks of the evaluation are."""
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise SystemExit(f"{dataset_id} is not in Minari's folder: a run on it builds or downloads it.") from error
    about, name = dataset.storage.metadata, short(dataset_id)
    # Play data go on after a terminal row: it ends an episode only where it is the last one
    episodes = [
        (e.rewards.sum(), len(e.rewards), e.terminations[-1], e.terminations[:-1].sum())
        for e in dataset.iterate_episodes()
    ]
    returns, lengths, terminated, within = map(np.array, zip(*episodes, strict=True))
    quantiles = ", ".join(f"{q:.4g}" for q in np.percentile(returns, [0, 5, 25, 50, 75, 95, 100]))
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    task = json.loads(about.get("eval_env_spec") or about.get("env_spec") or "null")
    rows = {
        "made by": f"{about.get('algorithm_name', 'not recorded')} ({about.get('code_permalink', 'no link to code')})",
        "size": f"{len(returns):,} episodes, {lengths.sum():,} transitions, {about.get('dataset_size', '?')} MB",
        "episode length": f"{spread(lengths)}, median {np.median(lengths):.0f}",
        "ends": f"{terminated.sum():,} terminated, {(~terminated).sum():,} only cut off",
        **({"terminal rows within episodes": f"{within.sum():,}"} if within.any() else {}),
        "observations": f"`{' '.join(str(dataset.observation_space).split())}`",
        "actions": f"`{' '.join(str(dataset.action_space).split())}`",
        "evaluation": f"`{task['id']}`, {task['max_episode_steps']} steps" if task else "no environment in the file",
        "episode return": f"{returns.mean():.4g} ± {returns.std():.4g} (mean ± standard deviation)",
        "its quantiles": f"{quantiles} (0, 5, 25, 50, 75, 95, 100 %)",
        "reference scores": "none in the file" if low is None else f"return {low:.6g} scores 0, {high:.6g} scores 100",
    }
    maze = None
    if "eval_tasks" in about:  # for policies of goals, without rewards
        rows["evaluation"] += f", {len(about['eval_tasks'])} tasks in turn"
        rows["episode return"] = "none: no rewards"
        del rows["its quantiles"], rows["reference scores"]
        maze, paths = maze_of(make_env(dataset_id), dataset_tasks(dataset_id)), []
        if maze is not None:
            paths = walks_of(dataset_id)
            rows["cells of the maze"] = cells_of(maze, paths)
    lines = [f"# {dataset_id}", "", about.get("description") or "No description.", "", "| | |", "| --- | --- |"]
    lines += [f"| {label} | {value} |" for label, value in rows.items()]
    if maze is not None:
        lines += ["", f"![Where the episodes are, and the tasks]({name}.png)", ""]
    elif "eval_tasks" not in about:
        lines += ["", f"![Histogram of the episodes' returns]({name}.png)", ""]
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"{name}.md", "\n".join([*lines, ""] if lines[-1] else lines))
    print(out / f"{name}.md")
    if maze is not None:
        draw_places(dataset_id, maze, np.concatenate(paths), out / f"{name}.png")
    elif "eval_tasks" not in about:
        figure, axes = plt.subplots(figsize=(6, 2.8))
        axes.hist(returns, bins=40, color=COLOURS[0])
        axes.set(title=dataset_id, xlabel="return of an episode", ylabel="episodes")
        save(figure, out / f"{name}.png")
    readme = out / "README.md"
    if readme.exists():
        write(readme, fill(readme.read_text(), "cards", list_of_cards(out), readme))


def cells_of(maze, paths) -> str:
    """How many of the free cells the episodes pass, each (steps, 2), and how many one of them does."""
    corner = maze.walls.min(axis=0)
    columns, rows = np.rint((maze.walls.max(axis=0) - corner) / maze.size).astype(int) + 1
    passed = [np.unique(np.rint((path - corner) / maze.size).astype(int), axis=0) for path in paths]
    seen = len(np.unique(np.concatenate(passed), axis=0))
    each = np.array(list(map(len, passed)))
    free = columns * rows - len(maze.walls)
    return f"{seen} of {free} are visited; an episode passes {spread(each)} of them, median {np.median(each):.0f}"


def draw_places(dataset_id, maze, points, path):
    """How often each place (n, 2) is visited, and each task from its circle to its star."""
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    span = np.ptp(maze.walls, axis=0) / maze.size
    axes.hist2d(*points.T, bins=np.rint(8 * span).astype(int), cmap="Blues", norm="log")
    draw_maze(axes, maze._replace(starts=[], goals=[]))
    for k, (start, goal) in enumerate(zip(maze.starts, maze.goals, strict=True)):
        shift = np.array([0.09 * (k - 2), 0.09 * (2 - k)]) * maze.size  # tasks may share a place
        for place, mark in ((start, START), (goal, GOAL)):
            axes.plot(*(place + shift), **mark | {"markersize": 12 if mark is START else 20}, zorder=5)
            axes.annotate(str(k + 1), place + shift, ha="center", va="center", fontsize=7, zorder=6)
    axes.set(title=dataset_id, xlabel="darker: more often; each task from its circle to its star")
    save(figure, path)


def list_of_cards(folder: Path) -> str:
    """Markdown: a row for each card in the folder, with what stands in it."""
    lines = ["| dataset | episodes, transitions | episode return |", "| --- | --- | --- |"]
    for card in sorted(folder.glob("*-v*.md")):
        cells = dict(re.findall(r"^\| (size|episode return) \| (.*) \|$", card.read_text(), flags=re.MULTILINE))
        size, returns = cells["size"].rpartition(", ")[0], cells["episode return"].partition(" (")[0]
        lines.append(f"| [{card.stem}]({card.name}) | {size} | {returns} |")
    return "\n".join(lines)
