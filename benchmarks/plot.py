"""Pictures of finished or running runs: python benchmarks/plot.py runs/iql/stitch/pointmaze-umaze-v0

learning_curve.png  Score against updates: the mean of the seeds, in a band from the lowest seed to the highest. From
                    metrics.jsonl alone; several run folders give several lines.
maze.png            For datasets of gymnasium-robotics' mazes: walks of the data, and the roll-outs of the policy in the
                    newest checkpoint (one panel for each run folder). They repeat the run's own evaluation: the same
                    seeds, episodes and starts.

The pictures are written into the run folder, or into --out where several folders are given.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

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
    configs = [read_config(run) for run in options.runs]
    out = options.out or options.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    plot_learning_curve(options.runs, configs, out / "learning_curve.png")
    plot_maze(options.runs, configs, options.data_episodes, out / "maze.png")


def read_config(run: Path) -> dict:
    """The Config fields of a run, and its `algo`."""
    if not (run / "config.json").exists():
        raise SystemExit(f"{run} is not a run folder: it holds no config.json.")
    config = json.loads((run / "config.json").read_text())["config"]
    if config.pop("grid", {}):
        raise SystemExit(f"{run} holds a grid of hyper-parameters: benchmarks/report.py --selection {run} reads it.")
    return config


def labels(runs, configs):
    """What each run is called: its algorithm, and its dataset or folder where runs could be confused without."""
    several = len({config["dataset"] for config in configs}) > 1
    names = [config["algo"] + (f", {config['dataset']}" if several else "") for config in configs]
    return [f"{name} ({run.name})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    print(path)


# --- Learning curve ------------------------------------------------------------------------------------


def read_scores(run: Path):
    """(updates (n,), scores (seeds, n)) of the evaluations that every seed has."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if "score" in line]  # a first phase is not evaluated
    seeds = sorted({line["seed"] for line in lines})
    score = {(line["seed"], line["step"]): line["score"] for line in lines}
    # A run that is being written, or was cut short, lacks some seeds of its last one
    steps = [step for step in sorted({line["step"] for line in lines}) if all((seed, step) in score for seed in seeds)]
    if not steps:
        raise SystemExit(f"{run} has no evaluation yet: draw it after its first.")
    return np.array(steps), np.array([[score[seed, step] for step in steps] for seed in seeds], float)


def plot_learning_curve(runs, configs, path):
    figure, axes = plt.subplots(figsize=(7, 4.2))
    kinds = set()
    for i, (run, config, name) in enumerate(zip(runs, configs, labels(runs, configs), strict=True)):
        steps, scores = read_scores(run)
        if np.isnan(scores).all():
            print(f"{run} was not scored (its dataset came without an environment): it has no line.")
            continue
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        mean, low, high = scores.mean(axis=0), scores.min(axis=0), scores.max(axis=0)
        seeds = f"mean of {len(scores)} seeds, band: lowest to highest" if len(scores) > 1 else "1 seed"
        axes.plot(steps, mean, color=colour, marker=marker, linewidth=2, label=f"{name}  ({seeds})", clip_on=False)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        if (run / "summary.json").exists():
            kinds.add(json.loads((run / "summary.json").read_text())["score_kind"])
        else:
            print(f"{run} is not finished: its line ends at update {steps[-1]:,} of {config['num_updates']:,}.")
    datasets = sorted({config["dataset"] for config in configs})
    kind = kinds.pop() if len(kinds) == 1 else ""
    title = datasets[0] if len(datasets) == 1 else f"{len(datasets)} datasets"
    axes.set_title(f"{title}\n" + (f"score: {kind}" if kind else ""), loc="left", fontsize=11)
    axes.set_xlabel("updates of each seed")
    axes.set_ylabel("score")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlim(left=0)
    if kind.startswith("normalised"):
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low) if low < -5 else 0, max(100, high) if high > 106 else 100)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save(figure, path)


# --- Maze ----------------------------------------------------------------------------------------------


def plot_maze(runs, configs, data_episodes, path):
    from common.datasets import load_dataset  # here, so that a learning curve needs no environment

    if len({config["dataset"] for config in configs}) > 1:
        print("No maze is drawn, because the runs are of several datasets.")
        return
    dataset_id = configs[0]["dataset"]
    data, env = load_dataset(dataset_id, columns=("episode",))
    maze_env = env._envs[0].unwrapped if env._envs else None
    maze = getattr(maze_env, "maze", None)  # gymnasium-robotics' Maze
    if maze is None:
        print(f"No maze is drawn, because the environment of {dataset_id} is not one of gymnasium-robotics' mazes.")
        return
    panels = []
    for run, config, name in zip(runs, configs, labels(runs, configs), strict=True):
        if (run / "checkpoint.msgpack").exists():
            panels.append((name, *rollouts(run, config)))
        else:
            print(f"{run} has no checkpoint yet: its policy is not drawn.")
    count = 1 + len(panels)
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 5.8), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    jitter = maze_env.position_noise_range * maze.maze_size_scaling
    draw_data(axes[0, 0], maze, data, data_episodes)
    for ax, (name, step, paths, reached) in zip(axes[0, 1:], panels, strict=True):
        draw_rollouts(ax, maze, f"Policy: {name}, {step:,} updates", paths, reached)
    handles = [
        plt.Line2D([], [], **START, label=f"start, ± {jitter:g} m"),
        plt.Line2D([], [], **GOAL, label=f"goal, ± {jitter:g} m"),
        plt.Line2D([], [], color=REACHED, linewidth=2, label="roll-out that reaches the goal"),
        plt.Line2D([], [], color=MISSED, linewidth=2, **END, label="one that does not, and its end"),
    ]
    figure.legend(handles=handles[: 4 if panels else 2], loc="outside lower center", ncols=4, fontsize=10.5)
    save(figure, path)


def positions(obs):
    """(x, y) in metres, (..., 2), of flattened observations: their sorted keys begin with "achieved_goal"."""
    return obs[..., :2]


def rollouts(run: Path, config: dict):
    """One evaluation of the newest checkpoint: its update, positions (steps, rollouts, 2) and reached (rollouts,)."""
    import flax
    import jax

    algo = importlib.import_module(f"algos.{config['algo']}")
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name != "algo"}
    try:
        cfg = algo.Config(**fields)
    except TypeError as error:
        raise SystemExit(f"{run} was made by another version of algos/{config['algo']}.py ({error}).") from error
    _, env = algo.load_data(cfg)
    agent = algo.make_agent(cfg, env.spec)
    seeds = np.arange(cfg.seed, cfg.seed + cfg.num_seeds)
    like = jax.eval_shape(jax.vmap(lambda seed: agent.init(jax.random.key(seed))), seeds)
    step, _, states = flax.serialization.from_bytes((0, 0.0, like), (run / "checkpoint.msgpack").read_bytes())
    states = states._replace(key=jax.random.wrap_key_data(states.key))

    @jax.jit
    def policy(states, obs, t):  # main's
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), t))(seeds)
        return jax.vmap(agent.act)(states, obs, keys)

    seen = []

    def record(obs, t):
        seen.append(obs * env._obs_scale + env._obs_mean)  # a new array, in metres again
        return policy(states, obs, t)

    returns = env.evaluate(record, seeds, cfg.eval_episodes).returns
    seen = np.array(seen).reshape(len(seen), returns.size, -1)  # an ended episode stays where it ended
    # A sparse return is above 0 only if the goal was reached. A dense one always is: there, the distance to the goal
    # decides ("desired_goal" is the second of the sorted keys).
    reached = returns.ravel() > 0
    if getattr(env._envs[0].unwrapped, "reward_type", "sparse") == "dense":
        reached = (np.linalg.norm(seen[..., 2:4] - positions(seen), axis=-1) <= GOAL_RADIUS).any(axis=0)
    return step, positions(seen), reached


def draw_data(axes, maze, data, data_episodes):
    """A sample of the data's episodes, each in a colour of its own, and a few that lie apart as thick arrows."""
    episodes = np.split(positions(data.obs), np.flatnonzero(np.diff(data.episode)) + 1)
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
    draw_maze(axes, maze)
    both = sum(
        visits(maze, path, maze.unique_reset_locations) and visits(maze, path, maze.unique_goal_locations)
        for path in episodes
    )
    axes.set_title(
        f"Data: {len(episodes):,} episodes, "
        + ("none visits" if both == 0 else f"{both:,} visit")
        + " both start and goal"
    )
    axes.set_xlabel(f"{len(sample)} of them, a colour each, dots where they begin")


def apart(points, count):
    """Indices of `count` of the points (n, 2) that lie far from one another: always the farthest from those chosen."""
    chosen = [0]
    for _ in range(min(count, len(points)) - 1):
        distance = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1)
        chosen.append(int(distance.argmax()))
    return chosen


def visits(maze, path, places):
    """Whether a path (steps, 2) is anywhere in the cell of one of `places` (x, y), all in metres."""
    half = maze.maze_size_scaling / 2
    return any((np.abs(path - place) < half).all(axis=-1).any() for place in places)


def draw_rollouts(axes, maze, title, paths, reached):
    """Roll-outs (steps, rollouts, 2): those that reach the goal and, over them, those that do not."""
    for k in np.argsort(~reached, kind="stable"):
        path = paths[:, k]
        axes.plot(*path.T, color=REACHED if reached[k] else MISSED, linewidth=1.2, alpha=0.6)
        if not reached[k]:
            axes.plot(*path[-1], **END, color=MISSED, zorder=4)
    draw_maze(axes, maze)
    axes.set_title(title)
    axes.set_xlabel(f"{reached.sum()} of {len(reached)} roll-outs come within {GOAL_RADIUS} m of the goal")


def draw_maze(axes, maze):
    """Walls, and the places where evaluation starts and where it should end."""
    size = maze.maze_size_scaling
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                corner = maze.cell_rowcol_to_xy((i, j)) - size / 2
                axes.add_patch(plt.Rectangle(corner, size, size, color=WALL))
    for places, mark in ((maze.unique_reset_locations, START), (maze.unique_goal_locations, GOAL)):
        for place in places if len(places) <= 4 else []:  # where every free cell may be one, marks would say nothing
            axes.plot(*place, **mark, zorder=5)
    # A third of the outer walls is enough to see them
    width, height = (maze.map_width / 2 - 2 / 3) * size, (maze.map_length / 2 - 2 / 3) * size
    axes.set(xlim=(-width, width), ylim=(-height, height), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
