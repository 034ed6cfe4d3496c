"""Pictures of finished or running runs: python benchmarks/plot.py runs/iql/stitch/pointmaze-umaze-v0

learning_curve.png  Score against updates: the mean of the seeds, in a band from the lowest seed to the highest. From
                    metrics.jsonl alone; several run folders give several lines. Of runs without scores: their losses.
                    Where a run goes on with an environment of its own, a dotted line marks the switch.
maze.png            For datasets of gymnasium-robotics' and OGBench's mazes: walks of the data, and the roll-outs of the
                    policy in the newest checkpoint, a panel for each run folder; a row for each, with a panel for each
                    task, where the data have several tasks. They repeat the run's own evaluation: the same seeds,
                    episodes and starts.

The pictures are written into the run folder, or into --out where several folders are given.
"""

import dataclasses
import importlib
import io
import json
import textwrap
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from sweep import write  # noqa: E402  (benchmarks/sweep.py)

# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvph"
REACHED, MISSED, WALL = "#0072B2", "#D55E00", "#9A9A9A"
GOAL_RADIUS = 0.45  # metres: closer than that, gymnasium-robotics' PointMaze and AntMaze reward
START = {
    "marker": "o",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 13,
    "markeredgewidth": 2.5,
    "linestyle": "none",
}
GOAL = START | {"marker": "*", "color": "#F0E442", "markersize": 22, "markeredgewidth": 1.5}
END = {"marker": "X", "markersize": 8, "markeredgecolor": "white"}
STYLE = {
    "figure.dpi": 150,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders
    out: Path | None = None  # folder of the pictures; by default the run folder, when there is one
    data_episodes: int = 150  # episodes of the data that maze.png draws


def main(options: Options):
    if not options.runs:
        raise SystemExit("Name at least one run folder, e.g. runs/iql/stitch/pointmaze-umaze-v0.")
    if len(options.runs) > 1 and options.out is None:
        raise SystemExit("With several run folders, say with --out where their common pictures go.")
    if options.data_episodes < 1:
        raise SystemExit(f"--data-episodes must be at least 1, not {options.data_episodes}.")
    configs = [read_config(run) for run in options.runs]
    for run, config in zip(options.runs, configs, strict=True):
        if config["grid"]:
            raise SystemExit(f"{run} holds a grid of hyper-parameters: python benchmarks/report.py {run} shows it.")
    plt.rcParams.update(STYLE)
    out = options.out or options.runs[0]
    plot_learning_curve(options.runs, configs, out / "learning_curve.png")
    plot_maze(options.runs, configs, options.data_episodes, out / "maze.png")


# --- Run folders ---------------------------------------------------------------------------------------


def read_json(path: Path, fields: dict[str, type]) -> dict:
    """A JSON object that has at least these fields, of these types. ValueError: the file is torn, or another one."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not an object")
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path.name} lacks {name}, or it is no {kind.__name__}")
    return content


def read_lines(run: Path) -> list[dict]:
    """Of metrics.jsonl, in which NaN is null."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) and "seed" in line for line in lines):
        raise ValueError("metrics.jsonl has a line that is no evaluation")
    return lines


def read_config(run: Path) -> dict:
    """The Config fields of a run, and its `algo`."""
    if not (run / "config.json").exists():
        raise SystemExit(f"{run} is not a run folder: it holds no config.json.")
    try:
        config = read_json(run / "config.json", {"config": dict})["config"]
        config = {**config, "algo": str(config["algo"]), "dataset": str(config["dataset"])}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{run} cannot be read ({type(error).__name__}: {error}).") from error
    return {"grid": {}, **config}


def restore(run: Path, config: dict, row: int | None):
    """The run's policy, by its own algorithm file; one row of its seeds, or all."""
    try:
        return importlib.import_module(f"algos.{config['algo']}").restore(run, row)
    except ImportError as error:
        raise SystemExit(f"{run} is of {config['algo']}, which is no file in algos/ ({error}).") from error


def labels(runs, configs):
    """What each run is called: its algorithm, and its dataset or folder where runs could be confused without."""
    several = len({config["dataset"] for config in configs}) > 1
    names = [config["algo"] + (f", {config['dataset']}" if several else "") for config in configs]
    return [f"{name} ({run.name})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def caption(figure, text):
    """Below a figure whose layout is constrained, so that all else is above its lower edge; as wide as it is."""
    text = textwrap.fill(text, round(12.5 * figure.get_figwidth()), break_on_hyphens=False)
    figure.text(0.5, -0.1 / figure.get_figheight(), text, ha="center", va="top", fontsize=10, color="#333333")


def save(figure, path: Path, source: str = ""):
    """The same picture is the same file: matplotlib's version, which it would name, is left out.

    `source` stands in the file: a report can tell by it whether the result files are still those drawn.
    """
    picture = io.BytesIO()
    metadata = {"Software": None, **({"Source": source} if source else {})}
    figure.savefig(picture, format="png", bbox_inches="tight", facecolor="white", metadata=metadata)
    plt.close(figure)
    write(path, picture.getvalue())
    print(path)


# --- Learning curve ------------------------------------------------------------------------------------


def read_columns(run: Path, names):
    """(updates (n,), {name: (runs, n)}) of the evaluations that every run of a folder has; NaN where nothing is."""
    try:
        lines = read_lines(run) if (run / "metrics.jsonl").exists() else []
        lines = [line for line in lines if "score" in line]  # a first phase is not evaluated
        of = [(json.dumps(line.get("grid", {})), line["seed"]) for line in lines]
        at = {(row, line["step"]): line for row, line in zip(of, lines, strict=True)}
        # A run that is being written, or was cut short, lacks some seeds of its last one
        steps = sorted({line["step"] for line in lines})
        steps = [step for step in steps if all((row, step) in at for row in of)]
        rows = list(dict.fromkeys(of))
        columns = {n: np.array([[at[row, step].get(n) for step in steps] for row in rows], float) for n in names}
    except (OSError, ValueError, TypeError) as error:  # torn, or another file
        raise SystemExit(f"{run} cannot be read ({type(error).__name__}: {error}).") from error
    if not steps:
        raise SystemExit(f"{run} has no evaluation yet: draw it after its first.")
    return np.array(steps), columns


def read_scores(run: Path):
    """(updates (n,), scores (runs, n)); where there is none, NaN."""
    steps, columns = read_columns(run, ["score"])
    return steps, columns["score"]


def draw_line(axes, steps, values, i, label):
    """The mean of the seeds (seeds, steps), in a band from the lowest to the highest."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    axes.plot(steps, values.mean(axis=0), color=colour, marker=marker, linewidth=2, label=label, clip_on=False)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def plot_learning_curve(runs, configs, path):
    names = labels(runs, configs)
    curves = [(run, name, *read_scores(run)) for run, name in zip(runs, names, strict=True)]
    scored = [curve for curve in curves if not np.isnan(curve[-1]).all()]
    if not scored:
        plot_losses(runs, configs, names, path)
        return
    for run in {curve[0] for curve in curves} - {curve[0] for curve in scored}:
        print(f"{run} was not scored: it has no line. Drawn by itself, its losses are shown.")
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for i, (_, name, steps, scores) in enumerate(scored):
        draw_line(axes, steps, scores, i, name)
    for switch in {switch_of(run) for run, *_ in scored} - {None}:
        axes.axvline(switch, color="#333333", linestyle=":", linewidth=1.5, label="from here on-line")
    kinds = set()
    for run, config in zip(runs, configs, strict=True):
        if (run / "summary.json").exists():
            kinds.add(summary_of(run).get("score_kind", ""))
        else:
            print(f"{run} is not finished: its line ends before update {config['num_updates']:,}.")
    kind = kinds.pop() if len(kinds) == 1 else ""
    axes.set_ylabel("score")
    if kind.startswith("normalised"):
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low) if low < -5 else 0, max(100, high) if high > 106 else 100)
    finish(figure, [axes], configs, [scores for *_, scores in scored], f" Score: {kind}." if kind else "")
    save(figure, path)


def summary_of(run: Path) -> dict:
    try:
        return read_json(run / "summary.json", {})
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run} cannot be read ({type(error).__name__}: {error}).") from error


def plot_losses(runs, configs, names, path):
    """A panel for each loss of runs that were not scored."""
    found = {
        name: [key for key in line if key.endswith("loss")]
        for name, line in zip(names, map(first_line, runs), strict=True)
    }
    losses = list(dict.fromkeys(loss for keys in found.values() for loss in keys))
    if not losses:
        print(f"Nothing is drawn: {', '.join(map(str, runs))} have neither scores nor losses.")
        return
    print("These runs were not scored: their losses are drawn.")
    figure, axes = plt.subplots(
        1, len(losses), figsize=(max(5, 3.6 * len(losses)), 4), squeeze=False, layout="constrained"
    )
    shown = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        steps, columns = read_columns(run, found[name])
        shown += columns.values()
        for panel, loss in zip(axes[0], losses, strict=True):
            panel.set_title(loss, fontsize=11)
            if loss in columns:
                draw_line(panel, steps, columns[loss], i, name)
    finish(figure, axes[0], configs, shown, " Not scored: these are the losses, which do not say how good a policy is.")
    save(figure, path)


def first_line(run: Path) -> dict:
    return next((line for line in read_lines(run) if "score" in line), {})


def switch_of(run: Path) -> int | None:
    """After how many updates a run has gone on on-line, if it has."""
    lines = (line for line in read_lines(run) if line.get("online_steps"))
    return next((line["step"] - line["online_steps"] for line in lines), None)


def finish(figure, axes, configs, values, said):
    """What all curves have in common."""
    datasets = sorted({config["dataset"] for config in configs})
    figure.suptitle(datasets[0] if len(datasets) == 1 else f"{len(datasets)} datasets", fontsize=12)
    for panel in axes:
        online = any(config.get("online_steps") for config in configs)
        panel.set_xlabel("updates of each seed, then its steps on-line" if online else "updates of each seed")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        panel.xaxis.set_major_locator(plt.MaxNLocator(5))
        panel.set_xlim(left=0)
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        panel.set_axisbelow(True)
    handles = {line.get_label(): line for panel in axes for line in panel.lines}
    middle, columns = axes[len(axes) // 2], min(2, len(handles))
    middle.legend(handles=handles.values(), loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=10)
    seeds = sorted({len(x) for x in values})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    band = f"Lines: mean of {count} seeds; bands: lowest to highest." if seeds[-1] > 1 else "One seed."
    caption(figure, band + said)


# --- Maze ----------------------------------------------------------------------------------------------


class Maze(NamedTuple):
    """What is drawn of a maze, in the environment's units."""

    walls: np.ndarray  # (n, 2): the centres of square cells
    size: float  # of a cell
    starts: list  # (x, y) of each task; with no tasks, those that are marked in the map, of which any may be it
    goals: list
    jitter: float  # how far from these an episode begins, and its goal is, at most, in each coordinate
    radius: float  # closer than that to its goal, an episode succeeds


def maze_of(env, tasks) -> Maze | None:
    """The maze of an environment of gymnasium-robotics or OGBench; None where it is neither."""
    inner = env.unwrapped
    maze = getattr(inner, "maze", None)
    if maze is not None:  # gymnasium-robotics
        walls = [maze.cell_rowcol_to_xy(cell) for cell in np.argwhere(np.array(maze.maze_map, object) == 1)]
        starts, goals = list(maze.unique_reset_locations), list(maze.unique_goal_locations)
        if any(tasks):
            starts, goals = (
                [maze.cell_rowcol_to_xy(task[name]) for task in tasks] for name in ("reset_cell", "goal_cell")
            )
        size = maze.maze_size_scaling
        return Maze(np.array(walls), size, starts, goals, inner.position_noise_range * size, GOAL_RADIUS)
    if not hasattr(inner, "maze_map"):
        return None
    walls = [inner.ij_to_xy(cell) for cell in np.argwhere(inner.maze_map == 1)]
    of = [inner.task_infos[task["task_id"] - 1] for task in tasks if task]
    starts, goals = ([np.array(info[name]) for info in of] for name in ("init_xy", "goal_xy"))
    size = inner._maze_unit
    return Maze(np.array(walls), size, starts, goals, inner._noise * size / 4, inner._goal_tol)


def plot_maze(runs, configs, data_episodes, path):
    from play import dataset_tasks, make_env, step_limit  # benchmarks/play.py: a learning curve needs no environment

    if len({config["dataset"] for config in configs}) > 1:
        print("No maze is drawn, because the runs are of several datasets.")
        return
    if not all(config["eval_episodes"] for config in configs):  # then nothing that the dataset's metadata name is run
        print("No maze is drawn, because eval_episodes is 0: such a run promises that no environment is made.")
        return
    dataset_id = configs[0]["dataset"]
    try:
        env, tasks = make_env(dataset_id), dataset_tasks(dataset_id)
    except (Exception, SystemExit) as error:  # whatever gymnasium, Minari and the environment's package raise
        print(f"No maze is drawn, because the environment cannot be made ({type(error).__name__}: {error}).")
        return
    maze = maze_of(env, tasks)
    if maze is None:
        print(f"No maze is drawn, because the environment of {dataset_id} is no maze of gymnasium-robotics or OGBench.")
        return
    panels = []
    for run, config, name in zip(runs, configs, labels(runs, configs), strict=True):
        if (run / "checkpoint.msgpack").exists():
            panels.append((name, *rollouts(run, config, env, step_limit(env, config), tasks)))
        else:
            print(f"{run} has no checkpoint yet: its policy is not drawn.")
    several = any(tasks)
    shape = (max(1, len(panels)), 1 + len(tasks) * bool(panels)) if several else (1, 1 + len(panels))
    width, height = maze.walls.max(axis=0) - maze.walls.min(axis=0)
    each = (3.6, 1.1 + 3.6 * height / width) if several else (5, 5.8)
    figure, axes = plt.subplots(
        *shape, figsize=(each[0] * shape[1], each[1] * shape[0]), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.12)
    draw_data(axes[0, 0], maze, walks_of(dataset_id), data_episodes, several)
    for i, (name, step, paths, reached) in enumerate(panels):
        if not several:
            draw_rollouts(axes[0, 1 + i], maze, f"Policy: {name}, {step:,} updates", paths, reached)
            continue
        axes[i, 0].set_visible(i == 0)
        for k, panel in enumerate(axes[i, 1:]):  # episode j of a run plays task j % tasks
            of_task = maze._replace(starts=maze.starts[k : k + 1], goals=maze.goals[k : k + 1])
            title = f"{name}, task {k + 1}: {100 * reached[k :: len(tasks)].mean():.0f} %"
            draw_rollouts(panel, of_task, title, paths[k :: len(tasks)], reached[k :: len(tasks)])
    handles = [
        plt.Line2D([], [], **START, label=f"start, ± {maze.jitter:g} m"),
        plt.Line2D([], [], **GOAL, label=f"goal, ± {maze.jitter:g} m"),
        plt.Line2D([], [], color=REACHED, linewidth=2, label="roll-out that reaches the goal"),
        plt.Line2D([], [], color=MISSED, linewidth=2, **END, label="one that does not, and its end"),
    ]
    shown = handles if panels else [] if several else handles[:2]
    if shown:
        figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=10.5)
    save(figure, path)


def position(observations) -> np.ndarray:
    """Places (steps, 2) of observations: their achieved_goal or, of OGBench's, their first two numbers."""
    of_dict = isinstance(observations, dict)
    return observations["achieved_goal"] if of_dict else np.asarray(observations)[:, :2]


def walks_of(dataset_id: str) -> list[np.ndarray]:
    """Positions (steps, 2) in metres of each episode of the data."""
    import minari

    return [position(episode.observations)[:-1] for episode in minari.load_dataset(dataset_id)]


def rollouts(run: Path, config: dict, env, steps: int, tasks=(None,)):
    """One evaluation of the newest checkpoint: its update, a list of positions (steps, 2), and reached (rollouts,)."""
    from play import episode, starts

    paths, reached = [], []
    for row in range(config["num_seeds"]):
        policy = restore(run, config, row)
        for start in starts(config["seed"] + row, config["eval_episodes"], tasks):
            total, observations = episode(policy, env, start, steps)
            if isinstance(observations[0], dict):
                observations = {key: np.array([x[key] for x in observations]) for key in observations[0]}
            path = position(observations)
            paths.append(path)
            # A sparse return is above 0 only if the goal was reached. A dense one always is: there, the distance
            # to the goal decides.
            if getattr(env.unwrapped, "reward_type", "sparse") == "sparse":
                reached.append(total > 0)
            else:
                distance = np.linalg.norm(path - observations["desired_goal"], axis=-1)
                reached.append((distance <= GOAL_RADIUS).any())
    return policy.step, paths, np.array(reached)


def draw_data(axes, maze, episodes, data_episodes, several=False):
    """A sample of the data's episodes, each in a colour of its own, and a few that lie apart as thick arrows."""
    rng = np.random.default_rng(0)
    sample = [episodes[k] for k in rng.permutation(len(episodes))[:data_episodes]]
    colours = plt.get_cmap("turbo")(rng.permutation(len(sample)) / len(sample))
    thick = apart(np.array([path[len(path) // 2] for path in sample]), 7)
    for k, (path, colour) in enumerate(zip(sample, colours, strict=True)):
        axes.plot(*path.T, color=colour, linewidth=1, alpha=0.6)
        axes.plot(*path[0], color=colour, marker=".", markersize=4, alpha=0.6)
        if k in thick:
            axes.plot(*path.T, color="white", linewidth=5.5, zorder=3)
            axes.plot(*path.T, color=colour, linewidth=3, zorder=3)
            axes.plot(*path[0], color=colour, marker="o", markersize=7, markeredgecolor="white", zorder=3)
            axes.annotate(
                "",
                path[-1],
                path[-len(path) // 6],
                zorder=3,
                arrowprops={"arrowstyle": "-|>", "color": colour, "mutation_scale": 20},
            )
    draw_maze(axes, maze._replace(starts=[], goals=[]) if several else maze)
    axes.set_title(f"Data: {len(episodes):,} episodes" + ("" if several else f", {who_visits_both(maze, episodes)}"))
    axes.set_xlabel(f"{len(sample)} of them, a colour each, dots where they begin")


def who_visits_both(maze, episodes) -> str:
    both = sum(visits(maze, path, maze.starts) and visits(maze, path, maze.goals) for path in episodes)
    return ("none visits" if both == 0 else f"{both:,} visit") + " both start and goal"


def apart(points, count):
    """Indices of `count` of the points (n, 2) that lie far from one another: always the farthest from those chosen."""
    chosen = [0]
    for _ in range(min(count, len(points)) - 1):
        distance = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1)
        chosen.append(int(distance.argmax()))
    return chosen


def visits(maze, path, places):
    """Whether a path (steps, 2) is anywhere in the cell of one of `places` (x, y), all in metres."""
    half = maze.size / 2
    return any((np.abs(path - place) < half).all(axis=-1).any() for place in places)


def draw_rollouts(axes, maze, title, paths, reached):
    """Roll-outs, each (steps, 2): those that reach the goal and, over them, those that do not."""
    for k in np.argsort(~reached, kind="stable"):
        path = paths[k]
        axes.plot(*path.T, color=REACHED if reached[k] else MISSED, linewidth=1.2, alpha=0.6)
        if not reached[k]:
            axes.plot(*path[-1], **END, color=MISSED, zorder=4)
    draw_maze(axes, maze)
    axes.set_title(title)
    axes.set_xlabel(f"{reached.sum()} of {len(reached)} roll-outs come within {maze.radius:g} m of the goal")


def draw_maze(axes, maze):
    """Walls, and the places where evaluation starts and where it should end."""
    for centre in maze.walls:
        axes.add_patch(plt.Rectangle(centre - maze.size / 2, maze.size, maze.size, color=WALL))
    for places, mark in ((maze.starts, START), (maze.goals, GOAL)):
        for place in places if len(places) <= 4 else []:  # where every free cell may be one, marks would say nothing
            axes.plot(*place, **mark, zorder=5)
    # A third of the outer walls is enough to see them
    (left, low), (right, high) = maze.walls.min(axis=0) + maze.size / 6, maze.walls.max(axis=0) - maze.size / 6
    axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
